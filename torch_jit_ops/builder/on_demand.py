"""The loader, imported when a kernel is first asked for: with the store and its locks it is a quarter of the import."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import TYPE_CHECKING

import filelock  # noqa: F401  (on import it registers what waits for forks, which would wait for this thread if they were held off)

from torch_jit_ops import forks
from torch_jit_ops.builder.unit import Unit

if TYPE_CHECKING:
    from torch_jit_ops.builder.shared_object import Loaded


def load(unit: Unit, while_compiling: Callable[[], object] | None = None) -> Loaded:
    """``builder.load.load``."""
    return _loader().load(unit, while_compiling)  # type: ignore[no-any-return]


def find(unit: Unit) -> Loaded | None:
    """``builder.load.find``."""
    return _loader().find(unit)  # type: ignore[no-any-return]


def forget(unit: Unit) -> None:
    """``builder.load.forget``."""
    _loader().forget(unit)


def _loader() -> types.ModuleType:
    with forks.held_off():  # a child would wait for ever for half an import
        from torch_jit_ops.builder import load

    return load
