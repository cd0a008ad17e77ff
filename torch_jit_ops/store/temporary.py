"""Folders outside of the store, for what cannot be kept in it or run from it. They go with this process."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

from torch_jit_ops.store import files, forms
from torch_jit_ops.store.record import LOG, RECORD


def temporary_folder() -> Path:
    """A new private folder, which goes with this process.

    Raises:
        OSError: there is no folder for temporary files.
        RuntimeError: compilers cannot work in it.
        UntrustedCache: others could put something else in its place.
    """
    above = os.path.abspath(tempfile.gettempdir())
    if not files.is_plain(above):
        raise RuntimeError(
            f"kernels cannot be built in the folder for temporary files, {forms.printable(above)!r}: the build tools bear only "
            "letters, digits and /._+-~ in its name\n  remedy: set TMPDIR to another folder"
        )
    files.check_above(Path(above, "jitk"))
    return until_exit(Path(tempfile.mkdtemp(prefix="jitk-", dir=above)))


def until_exit(folder: Path) -> Path:
    """Remove the folder when this process ends, unless it holds the log of a failed build, or was renamed by then."""
    made_by = os.getpid()

    def remove() -> None:
        if os.getpid() == made_by and (not (folder / LOG).exists() or (folder / RECORD).exists()):
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder
