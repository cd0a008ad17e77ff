"""The environment variables that this package reads, all of them, in one place.

Each function reads its variable when it is called, so a program or a test can set one after the import.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

CUDA_ARCH = r"([1-9][0-9]?)\.([0-9])([af]?)"  # 8.0, 9.0a
# gcc's and clang's search for headers, parts of themselves and libraries; what they write into a library.
_READ_BY_COMPILERS = (
    "CPATH",
    "C_INCLUDE_PATH",
    "CPLUS_INCLUDE_PATH",
    "COMPILER_PATH",
    "GCC_EXEC_PREFIX",
    "LIBRARY_PATH",
    "LD_RUN_PATH",
    "SOURCE_DATE_EPOCH",
    "CCC_OVERRIDE_OPTIONS",
)
_RANKS = ("LOCAL_RANK", "RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")  # torchrun, Slurm, Open MPI


def cache_dir() -> Path | None:
    """``JITK_CACHE_DIR``: where built kernels are kept. Default: ``$XDG_CACHE_HOME/jitk``, else ``~/.cache/jitk``.

    None for a user without a home, of whom the system knows no more than a number.
    """
    chosen = os.environ.get("JITK_CACHE_DIR")
    if chosen:
        return _folder("JITK_CACHE_DIR", chosen)
    above = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return None if above.startswith("~") else _folder("XDG_CACHE_HOME", os.path.join(above, "jitk"))


def cache_path() -> tuple[Path, ...]:
    """``JITK_CACHE_PATH``: further kernel caches, separated by ``:``, which are searched first and never written."""
    folders = os.environ.get("JITK_CACHE_PATH", "").split(os.pathsep)
    return tuple(_folder("JITK_CACHE_PATH", folder) for folder in folders if folder)


def _folder(name: str, text: str) -> Path:
    """An absolute path, as a program may change its folder between two kernels."""
    if re.search(r"\$\{?(ORIGIN|LIB|PLATFORM)\b", text):
        raise ValueError(
            f"{name} is {text!r}; it must not hold $ORIGIN, $LIB or $PLATFORM, for which the system's loader puts other texts"
        )
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise ValueError(f"{name} is {text!r}, but the system knows no home of that user: give the whole path")
    return Path(os.path.abspath(expanded))


def cache_is_trusted() -> bool:
    """``JITK_CACHE_TRUST=1``: load kernels also from a directory that other users can write."""
    return os.environ.get("JITK_CACHE_TRUST", "0") == "1"


def cache_bytes() -> int | None:
    """``JITK_CACHE_SIZE``: bytes that the kernel cache may hold, as ``500M`` or ``4G`` (default); ``0`` is no limit."""
    text = os.environ.get("JITK_CACHE_SIZE") or "4G"
    form = re.fullmatch(r"(\d+)([KMGT]?)(?:i?B)?", text)
    if form is None:
        raise ValueError(f"JITK_CACHE_SIZE is {text!r}; it must be a number of bytes, such as 500M or 4G, or 0 for no limit")
    return int(form[1]) * 1024 ** " KMGT".index(form[2] or " ") or None


def compiling_is_forbidden() -> bool:
    """``JITK_NO_COMPILE=1``: a kernel that is not in a cache is an error instead of a build."""
    return os.environ.get("JITK_NO_COMPILE", "0") == "1"


def developing() -> bool:
    """``JITK_DEVELOP=1``: an edited source is built again at the next call, and an op declared again replaces the first."""
    return os.environ.get("JITK_DEVELOP", "0") == "1"


def debugging() -> bool:
    """``JITK_DEBUG=1``: build kernels for debuggers, with checks of indices, and check what they return against the fake."""
    return os.environ.get("JITK_DEBUG", "0") == "1"


def building_in_background() -> bool:
    """``JITK_BACKGROUND=0``: build no kernel while a graph that will call it is being compiled, only on its first call."""
    return os.environ.get("JITK_BACKGROUND", "1") != "0" and not compiling_is_forbidden()


def is_first_rank() -> bool:
    """Whether this process is alone, or the first one of a parallel job, as far as its launcher says."""
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)


def fallback_is_error() -> bool:
    """``JITK_FALLBACK=error``: a missing compiler, and a dtype without a kernel, is an error. Default ``warn``: the op runs its
    reference and warns once."""
    return _one_of("JITK_FALLBACK", ("warn", "error")) == "error"


def verbosity() -> int:
    """``JITK_VERBOSE``: 0 silent, 1 a line for each build (default), 2 the compilers' commands and output too."""
    return int(_one_of("JITK_VERBOSE", ("1", "0", "2")))


def record_file() -> Path | None:
    """``JITK_RECORD``: list every kernel that the run loads or compiles in this file, for ``build --manifest``."""
    chosen = os.environ.get("JITK_RECORD")
    return Path(chosen).expanduser() if chosen else None


def cuda_arch() -> str | None:
    """``JITK_CUDA_ARCH``: build for this architecture (``9.0a``) instead of the tensor's device's."""
    chosen = os.environ.get("JITK_CUDA_ARCH") or None
    if chosen is not None and re.fullmatch(CUDA_ARCH, chosen) is None:
        raise ValueError(f"JITK_CUDA_ARCH is {chosen!r}; it must be of the form 8.0 or 9.0a")
    return chosen


def cuda_home() -> Path | None:
    """``CUDA_HOME`` or ``CUDA_PATH``: the CUDA toolkit to use."""
    chosen = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return Path(chosen) if chosen else None


def cxx() -> str:
    """``CXX``: the C++ compiler, as ``torch.utils.cpp_extension`` reads it. Default: ``c++``."""
    return os.environ.get("CXX") or "c++"


def compiler_settings(further: Iterable[str]) -> dict[str, str]:
    """The variables that are set and that compilers, linkers and ``cpp_extension`` obey by themselves, so that they change
    what is built: those of every C++ compiler, and ``further`` ones of a backend."""
    return {name: os.environ[name] for name in (*_READ_BY_COMPILERS, *further) if os.environ.get(name)}


def compiler_choice(further: Iterable[str]) -> tuple[object, ...]:
    """All variables that decide which compilers are found, and what they make."""
    names = ("CXX", "PATH", "CUDA_HOME", "CUDA_PATH")
    return (*map(os.environ.get, names), *compiler_settings(further).items())


def named_in(text: str) -> dict[str, str]:
    """The variables that are set and that a script names, but for those that tell where it was started, and ``PATH``: what
    counts is which programs it leads to."""
    names = set(re.findall(r"[A-Za-z_]\w*", text)) - {"_", "OLDPWD", "PATH", "PWD", "SHLVL"}
    return {name: os.environ[name] for name in sorted(names & os.environ.keys())}


def given() -> dict[str, str]:
    """All variables of this package that are set, known or not."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith("JITK_")}


@contextlib.contextmanager
def overridden(**values: str) -> Iterator[None]:
    """Set variables while the block runs."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def put_on_path(program: Path) -> None:
    """Append the program's folder to ``PATH`` if no folder there has it.

    A Python that is started by its path, its environment not activated, does not have the programs beside it on ``PATH``.
    """
    if shutil.which(program.name) is None:
        _put_on_path.add(str(program.parent))
        os.environ["PATH"] = os.pathsep.join([*filter(None, [os.environ.get("PATH")]), str(program.parent)])


_put_on_path: set[str] = set()


def given_path() -> list[str]:
    """The folders of ``PATH`` without those of ``put_on_path``, so that a compiler is the same before a build and after."""
    return [folder for folder in os.get_exec_path() if folder not in _put_on_path]


def _one_of(name: str, values: tuple[str, ...]) -> str:
    value = os.environ.get(name) or values[0]
    if value not in values:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(sorted(values))}")
    return value
