"""The environment variables that this package reads, all of them, in one place.

Each function reads its variable when it is called, so a program or a test can set one after the import.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def cache_dir() -> Path:
    """``JITK_CACHE_DIR``: where built kernels are kept. Default: ``$XDG_CACHE_HOME/jitk``, else ``~/.cache/jitk``."""
    chosen = os.environ.get("JITK_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jitk"


def cache_is_trusted() -> bool:
    """``JITK_CACHE_TRUST=1``: load kernels also from a directory that other users can write."""
    return os.environ.get("JITK_CACHE_TRUST", "0") == "1"


def fallback_is_error() -> bool:
    """``JITK_FALLBACK=error``: a missing compiler is an error. Default ``warn``: the op runs its reference and warns once."""
    return _one_of("JITK_FALLBACK", ("warn", "error")) == "error"


def verbosity() -> int:
    """``JITK_VERBOSE``: 0 silent, 1 a line for each build (default), 2 the compilers' commands and output too."""
    return int(_one_of("JITK_VERBOSE", ("1", "0", "2")))


def cuda_arch() -> str | None:
    """``JITK_CUDA_ARCH``: build for this architecture (``9.0a``) instead of the tensor's device's."""
    return os.environ.get("JITK_CUDA_ARCH") or None


def cuda_home() -> Path | None:
    """``CUDA_HOME`` or ``CUDA_PATH``: the CUDA toolkit to use."""
    chosen = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return Path(chosen) if chosen else None


def cxx() -> str:
    """``CXX``: the C++ compiler, as ``torch.utils.cpp_extension`` reads it. Default: ``c++``."""
    return os.environ.get("CXX", "c++")


def compiler_choice() -> tuple[str | None, ...]:
    """All variables that decide which compilers are found."""
    return tuple(os.environ.get(name) for name in ("CXX", "PATH", "CUDA_HOME", "CUDA_PATH"))


def put_on_path(program: Path) -> None:
    """Append the program's folder to ``PATH`` if no folder there has it.

    A Python that is started by its path, its environment not activated, does not have the programs beside it on ``PATH``.
    """
    if shutil.which(program.name) is None:
        os.environ["PATH"] = os.pathsep.join([*filter(None, [os.environ.get("PATH")]), str(program.parent)])


def _one_of(name: str, values: tuple[str, ...]) -> str:
    value = os.environ.get(name) or values[0]
    if value not in values:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(sorted(values))}")
    return value
