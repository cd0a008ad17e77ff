"""Which stores this process uses, as its environment says."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from torch_jit_ops import environment, process
from torch_jit_ops.store.store import Store
from torch_jit_ops.store.temporary import temporary_folder


def default_store() -> Store:
    """The store of this user: see ``environment.cache_dir``. Without a home it is temporary, with one warning."""
    return Store(environment.cache_dir() or _homeless())


@process.said_once
def _homeless() -> Path:
    warnings.warn(
        f"the user of this process (uid {os.getuid()}) has no home folder, so kernels are built again in every process. "
        "Set JITK_CACHE_DIR to a folder with space that can be written",
        stacklevel=2,
    )
    return temporary_folder()


def search_path() -> tuple[Store, ...]:
    """The stores to search, in this order: those of ``JITK_CACHE_PATH``, then this user's."""
    own = default_store()
    return (*(Store(root, shared=True, notes=own.root) for root in environment.cache_path()), own)
