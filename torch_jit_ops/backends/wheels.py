"""Finds headers and libraries that installed wheels bring: CUTLASS, and cuBLAS, cuDNN and the others of ``nvidia-*``.

    cutlass = include_of("cutlass/cutlass.h", "nvidia-cutlass", "flashinfer-python")       for include=
    cublas = library_of("libcublasLt.so", "nvidia-cublas", "nvidia-cublas-cu12")           for ldflags=

Nothing is looked for until a kernel is to be built or loaded, so that an op can be declared, and runs its function, where the
wheel is not installed. What is found comes from the file lists of the wheels, which name no folder of this machine.
"""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from torch_jit_ops.backends.programs import MissingCompiler


class MissingWheel(MissingCompiler):
    """No installed wheel has a header or a library that a kernel needs. The text says how to get it."""


@dataclass(frozen=True)
class WheelHeaders(os.PathLike[str]):
    """The folder for ``#include`` in which an installed wheel has ``header``."""

    header: str
    wheels: tuple[str, ...]

    def folder(self) -> Path:
        """The folder.

        Raises:
            MissingWheel: none of the wheels has the header.
        """
        file = _find(f"the header <{self.header}>", re.escape(self.header), self.wheels, "include")
        return file.parents[self.header.count("/")]

    def __fspath__(self) -> str:
        return str(self.folder())


Folder = Path | WheelHeaders


@dataclass(frozen=True)
class WheelLibrary:
    """A shared library of an installed wheel, which has no link without a version for the linker to find."""

    name: str
    wheels: tuple[str, ...]

    def file(self) -> Path:
        """The library, as ``.../libcublasLt.so.13``.

        Raises:
            MissingWheel: none of the wheels has it.
        """
        return _find(f"the library {self.name}", re.escape(self.name) + r"(?:\.\d+)*", self.wheels, "ldflags")

    def flags(self) -> tuple[str, ...]:
        """What a linker needs to use it, and the system to find it again in a program without Python."""
        file = self.file()
        return f"-L{file.parent}", f"-l:{file.name}", f"-Wl,-rpath,{file.parent}"


def include_of(header: str, *wheels: str) -> WheelHeaders:
    """The folder for ``#include`` in which an installed wheel has ``header``; for ``include=``.

    Args:
        header: as a source includes it: ``"cutlass/cutlass.h"``.
        wheels: the names that pip knows them by, the preferred one first: ``"nvidia-cutlass", "flashinfer-python"``.

    Raises:
        ValueError: no wheel is named, or the header is named by a path from ``/``.
    """
    if not wheels or header.startswith("/") or not header:
        raise ValueError(f"include_of takes a header and the wheels that may have it, got {(header, *wheels)}")
    return WheelHeaders(header, wheels)


def library_of(name: str, *wheels: str) -> WheelLibrary:
    """A shared library of an installed wheel, to be linked and found again when the kernel is loaded; for ``ldflags=``.

    Args:
        name: of the file, without the version behind it: ``"libcublasLt.so"``.
        wheels: the names that pip knows them by, the preferred one first: ``"nvidia-cublas", "nvidia-cublas-cu12"``.

    Raises:
        ValueError: no wheel is named, or the name is not of the form ``libNAME.so``.
    """
    if not wheels or re.fullmatch(r"lib[^/]+\.so", name) is None:
        raise ValueError(
            f"library_of takes a name like 'libcublasLt.so' and the wheels that may have it, got {(name, *wheels)}"
        )
    return WheelLibrary(name, wheels)


@functools.cache
def _find(what: str, pattern: str, wheels: tuple[str, ...], option: str) -> Path:
    """The file at the end of whose path the pattern stands, in the first wheel that has one."""
    end = re.compile(rf"(?:.*/)?{pattern}")
    tried = []
    for wheel in wheels:
        try:
            installed = metadata.distribution(wheel)
        except metadata.PackageNotFoundError:
            tried.append(f"{wheel} (not installed)")
            continue
        # The list as text: to parse the thousands of lines that some wheels have would take longer than all the rest.
        named = [line.partition(",")[0].strip('"') for line in (installed.read_text("RECORD") or "").splitlines()]
        found = sorted((path for path in named if end.fullmatch(path)), key=lambda path: (path.count("/"), path))
        for path in found:
            file = Path(str(installed.locate_file(path))).resolve()
            if file.is_file():
                return file
        tried.append(f"{wheel} {installed.version} (has no such file)")
    raise MissingWheel(
        f"no installed wheel has {what}\n  looked in {', '.join(tried)}\n"
        f"  remedy: pip install {wheels[0]}, or name its folder in {option}="
    )
