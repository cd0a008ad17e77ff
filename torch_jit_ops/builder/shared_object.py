"""A compiled library in this process, and how it gets there: also from a file system from which no program can be run."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch_jit_ops import forks
from torch_jit_ops.builder.unit import ABI_VERSION
from torch_jit_ops.store.store import Store
from torch_jit_ops.store.temporary import temporary_folder

# What dlopen says of whole libraries: the file system is mounted noexec; the process has no room.
NOEXEC = re.compile(r"failed to map segment from shared object(?!.*(?:allocate|memory))")
OF_THIS_MOMENT = re.compile(r"Cannot allocate memory|Too many open files")


@dataclass(frozen=True)
class Loaded:
    """A library in this process."""

    library: ctypes.CDLL
    path: Path
    seconds: float
    compiled: bool

    def entry(self, name: str) -> int:
        """The address of the exported function ``name``."""
        return int(ctypes.cast(getattr(self.library, f"jitk_entry_{name}"), ctypes.c_void_p).value or 0)

    def load_kernels(self, device_index: int) -> int:
        """Have CUDA load the library's kernels on the device now, not on their first launch. Returns how many there are.

        Nothing happens for the CPU, whose index is -1.
        """
        if device_index < 0:
            return 0
        with contextlib.suppress(AttributeError, UnicodeDecodeError):  # a library without exports, such as doctor's
            return int(self.library.jitk_load_kernels(device_index))
        return 0

    def signature(self, name: str) -> str:
        """The C++ signature of the exported function, as export.h writes it."""
        function = getattr(self.library, f"jitk_signature_{name}")
        function.restype = ctypes.c_char_p
        return str(function().decode())


def preload(libraries: Iterable[Path]) -> None:
    """Load what a library is linked with, so that the system finds it by its name, wherever the library was built.

    Raises:
        OSError: the system does not load it.
    """
    for library in libraries:
        try:
            ctypes.CDLL(library.name, mode=os.RTLD_NOLOAD)  # PyTorch may have loaded it, from another folder
        except OSError:
            with forks.held_off():
                ctypes.CDLL(str(library))


def open_library(path: Path) -> ctypes.CDLL:
    """Load a library into this process.

    Raises:
        OSError: the system does not load it, or it is of another ABI.
    """
    with forks.held_off():
        library = ctypes.CDLL(str(path))
    # The runtime itself has no ABI to agree with. The system says so with the path, which Python may not be able to read.
    with contextlib.suppress(AttributeError, UnicodeDecodeError):
        if library.jitk_abi_version() != ABI_VERSION:
            raise OSError(f"{path} has ABI version {library.jitk_abi_version()}, expected {ABI_VERSION}")
    return library


def open_from(store: Store, path: Path) -> ctypes.CDLL:
    """Load a library of a store, or a temporary copy of it where the system runs no programs from the store."""
    try:
        return open_library(path)
    except OSError as error:
        if NOEXEC.search(str(error)) is None:
            raise
    store.warn_of_noexec()
    copy = temporary_folder() / path.name
    shutil.copyfile(path, copy)
    try:
        return open_library(copy)
    except OSError as error:
        raise nowhere_to_run(error, store) from error


def nowhere_to_run(error: OSError, store: Store) -> Exception:
    """The error to raise for one of a library in a temporary folder."""
    if NOEXEC.search(str(error)) is None:
        return error
    return RuntimeError(
        f"kernels can be run neither from the kernel cache {store.root} nor from the folder for temporary files "
        f"{tempfile.gettempdir()}: both are on file systems from which no program can be run (noexec)\n"
        "  remedy: set JITK_CACHE_DIR or TMPDIR to a folder elsewhere"
    )
