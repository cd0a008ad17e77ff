"""A translation unit to compile: all that is known of a kernel before any compiler runs."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

from torch_jit_ops.backends import Backend, named
from torch_jit_ops.backends.wheels import Folder, WheelLibrary
from torch_jit_ops.store.digests import digest_of_record

ABI_VERSION = 2  # kAbiVersion of include/jitk/abi.h
_STANDARD = "-std=c++17"


@dataclass(frozen=True)
class Unit:
    """One translation unit to compile: everything that decides what comes out, but the contents of the files.

    Attributes:
        name: what is built, for folders, progress and errors: ``jitk.silu_and_mul``.
        label: the same for people: ``jitk::silu_and_mul<bf16_t>``.
        backend: where it runs.
        arch: ``"9.0a"`` for CUDA, an x86-64 level for CPU.
        text: the translation unit.
        include: folders to search, in this order, before the headers of this package; those of wheels are found when asked for.
        flags: further flags of nvcc or the C++ compiler.
        torch: whether the unit includes PyTorch's headers, and so depends on its version.
        python: whether it is a module that Python imports: it depends on Python's ABI, and on the version of PyTorch, whose
            wheel brings the headers of pybind11.
        beside: further translation units, compiled at the same time and linked with it.
        ldflags: what to link: flags of the linker, and libraries of wheels.
        debug: build it for debuggers: unoptimised, and with checks of indices.
    """

    name: str
    label: str
    backend: Backend
    arch: str
    text: str
    include: tuple[Folder, ...] = ()
    flags: tuple[str, ...] = ()
    torch: bool = False
    beside: tuple[str, ...] = ()
    ldflags: tuple[str | WheelLibrary, ...] = ()
    debug: bool = False
    python: bool = False

    def folders(self) -> tuple[Path, ...]:
        """The folders to search for headers, this package's last.

        Raises:
            MissingWheel: one is of a wheel that is not installed.
        """
        return (*(Path(folder) for folder in self.include), include_dir())

    def roots(self) -> dict[str, Path]:
        """The folders by whose names files are recorded. Errors as for ``folders``."""
        *own, jitk = self.folders()
        roots = {f"include{index}": folder for index, folder in enumerate(own)}
        return {**roots, "jitk": jitk, "system": Path("/")}

    def compile_flags(self) -> tuple[str, ...]:
        """The flags that decide the machine code; no paths."""
        standard = () if any(flag.startswith("-std=") for flag in self.flags) else (_STANDARD,)
        debug = self.backend.debug_flags if self.debug else ()
        return (*self.backend.flags, *standard, *self.backend.arch_flags(self.arch), *self.flags, *debug)

    def link_flags(self) -> tuple[str, ...]:
        """The words for the linker, which name the folders of wheels.

        Raises:
            MissingWheel: one is not installed.
        """
        flags = (flag.flags() if isinstance(flag, WheelLibrary) else shlex.split(flag) for flag in self.ldflags)
        return tuple(word for words in flags for word in words)

    def linked(self) -> tuple[str, ...]:
        """The same for the key: a library of a wheel by its file's name alone, wherever the wheel is.

        Raises:
            MissingWheel: one is not installed.
        """
        return tuple(f"-l:{flag.file().name}" if isinstance(flag, WheelLibrary) else flag for flag in self.ldflags)

    def libraries(self) -> tuple[Path, ...]:
        """The libraries of wheels that must be loaded before this one.

        Raises:
            MissingWheel: one is not installed.
        """
        return tuple(flag.file() for flag in self.ldflags if isinstance(flag, WheelLibrary))

    def target(self) -> str:
        """What it is compiled for, for people: ``sm_90a``."""
        return self.backend.target(self.arch)

    def key(self) -> str:
        """Digest of all that is known before compiling."""
        versions = [ABI_VERSION, self._torch_version(), *([python_abi()] if self.python else [])]
        texts = [self.text, *self.beside]
        return digest_of_record([self.backend.name, texts, self.compile_flags(), self.linked(), versions])

    def facts(self) -> dict[str, Any]:
        """What the store keeps about it beside its key, for people and for the question why it is built again."""
        return {
            "name": self.name,
            "label": self.label,
            "backend": self.backend.name,
            "arch": self.arch,
            "flags": (*self.compile_flags(), *self.linked()),
            "abi": ABI_VERSION,
            "torch": self._torch_version(),
            **({"python": python_abi()} if self.python else {}),
        }

    def _torch_version(self) -> str | None:
        return torch.__version__ if self.torch or self.python else None


def python_abi() -> str:
    """What an extension module must have been built for to be imported here: ``cpython-311-x86_64-linux-gnu``."""
    return EXTENSION_SUFFIXES[0].strip(".").removesuffix(".so")


def file_name(name: str, backend: Backend) -> str:
    """The name of the generated source of a unit."""
    return f"{re.sub(r'[^A-Za-z0-9_]+', '_', name)}{backend.suffixes[0]}"


def inlined(name: str, text: str) -> str:
    """A source that is no file, for the text of a unit: compilers call it ``name``, and count its own lines."""
    return f'#line 1 "{name}"\n{text}\n'


def line_directive(text: str, name: str, backend: str) -> str:
    """A line behind inlined sources: what follows is in the generated source again, and not the author's."""
    return f'#line {text.count(chr(10)) + 2} "{file_name(name, named(backend))}"\n'


def inlined_in(text: str) -> Iterator[tuple[str, list[str]]]:
    """The names and the lines of the sources that are no files."""
    parts = re.split(r'^#line 1 "([^"]+)"$\n', text, flags=re.MULTILINE)[1:]
    yield from ((name, lines.split("\n")) for name, lines in zip(parts[::2], parts[1::2], strict=True))


def include_dir() -> Path:
    """The folder of the headers, to be searched for ``<jitk/...>``: in a checkout, an editable install or a wheel."""
    return _data_dir("include")


def csrc_dir() -> Path:
    """The folder of the built-in kernels' sources."""
    return _data_dir("csrc")


@functools.cache
def _data_dir(name: str) -> Path:
    here = Path(__file__).resolve().parent.parent
    for folder in (here / name, here.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"torch_jit_ops is installed without its {name}/ folder; looked in {here} and {here.parent}")
