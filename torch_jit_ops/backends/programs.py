"""Finds the programs that every backend needs, and says what is missing and how to get it."""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from torch_jit_ops import environment


class MissingCompiler(RuntimeError):
    """No compiler for a backend on this machine. The text says what was looked for and how to get it."""


def host_words() -> tuple[str, ...]:
    """How the C++ compiler is started: CXX, else ``c++``. Programs may stand before it, and flags behind: ``ccache g++ -m64``.

    Raises:
        MissingCompiler: CXX cannot be parted into words.
    """
    chosen = environment.cxx()
    if shutil.which(chosen) is not None:  # a path with spaces
        return (chosen,)
    try:
        return tuple(shlex.split(chosen)) or ("c++",)
    except ValueError as error:
        raise MissingCompiler(f"CXX is {chosen!r}, which is no command ({error}), so kernels cannot be built") from None


def host_command() -> tuple[str, ...]:
    """``host_words``, whose programs are there.

    Raises:
        MissingCompiler: one of them is not.
    """
    words = host_words()
    for word in (words[0], compiler_word(words)):
        if shutil.which(word) is None:
            raise MissingCompiler(
                f"no C++ compiler was found ({word!r} is not on PATH), so kernels cannot be built\n"
                "  remedy: install g++ 11 or newer (Debian, Ubuntu: apt-get install g++), or set CXX to one"
            )
    return words


def host_compiler() -> Path:
    """The C++ compiler among the words of ``host_command``.

    Raises:
        MissingCompiler: it is not there.
    """
    return Path(str(shutil.which(compiler_word(host_command()))))


def compiler_word(words: Sequence[str]) -> str:
    """The last program before the flags, else the first."""
    programs = itertools.takewhile(lambda word: not word.startswith("-"), words)
    return [words[0], *(word for word in programs if "=" not in word)][-1]


def ninja() -> Path:
    """The build tool that ``torch.utils.cpp_extension`` starts: on PATH, else that of the wheel.

    Raises:
        MissingCompiler: it is not there.
    """
    on_path = shutil.which("ninja")
    if on_path is not None:
        return Path(on_path)
    with contextlib.suppress(metadata.PackageNotFoundError):
        for file in metadata.files("ninja") or ():
            found = Path(str(file.locate())).resolve()
            if file.name == "ninja" and os.access(found, os.X_OK):
                return found
    raise MissingCompiler("ninja was not found, so kernels cannot be built\n  remedy: pip install ninja")
