"""What the kernel of a backend is written in: a file, several files, or a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch_jit_ops import backends
from torch_jit_ops.backends import CPU
from torch_jit_ops.builder import unit

SUFFIXES = {backend.name: backend.suffixes for backend in backends.ALL}


@dataclass(frozen=True)
class Source:
    """The sources of one backend.

    Attributes:
        name: of the first, which holds the function: ``scale.cu``, or ``scale.cuda_source`` for a text.
        text: of the first if it is no file.
        beside: further files, each compiled by itself at the same time, and linked with the first.
    """

    name: str
    text: str | None = None
    beside: tuple[str, ...] = ()

    def opening(self, backend: str, op: str) -> str:
        """The start of the translation unit of ``op``: the first source, as if it stood there."""
        start = f"// {op}\n#include <jitk/export.h>\n"
        if self.text is None:
            return f'{start}#include "{self.name}"\n'
        start += unit.inlined(self.name, self.text)
        return start + unit.line_directive(start, op, backend)

    def units_beside(self) -> tuple[str, ...]:
        """The translation units of the other files."""
        return tuple(f'#include "{file}"\n' for file in self.beside)


def of(
    who: str, name: str, csrc: Path | None, files: Mapping[str, str | Sequence[str] | None], texts: Mapping[str, str | None]
) -> dict[str, Source]:
    """The sources of each backend that has any.

    Args:
        who: the op, for errors.
        name: of the op.
        csrc: the folder of the files, or None if the library has none.
        files: for each backend a file, several, or None.
        texts: for each backend the source itself, or None.

    Raises:
        TypeError: a source is none of these.
        ValueError: a file is missing or of another backend, or a backend has a file and a text.
    """
    found = {}
    for backend, given in files.items():
        text = texts[backend]
        if text is not None:
            if given is not None:
                raise ValueError(f"{who} has both {backend}= and {backend}_source=: its function can be in one of them alone")
            if not isinstance(text, str) or not text.strip():
                raise TypeError(f"{who}: {backend}_source must be the text of a source, got {text!r}")
            found[backend] = Source(f"{name}.{backend}_source", text)
        elif given is not None:
            first, *beside = [given] if isinstance(given, str) else _listed(who, backend, given)
            for file in (first, *beside):
                _check(who, backend, file, csrc)
            found[backend] = Source(first, beside=tuple(beside))
    return found


def of_module(who: str, name: str, csrc: Path | None, files: str | Sequence[str] | None, text: str | None) -> Source:
    """The sources of a Python module: files, or a text.

    Raises:
        TypeError: a source is neither.
        ValueError: there is none, or both; or a file is missing or no C++.
    """
    if (files is None) == (text is None):
        raise ValueError(f"{who} needs either sources= or source=, the text itself")
    if text is not None:
        if not isinstance(text, str) or not text.strip():
            raise TypeError(f"{who}: source must be the text of a source, got {text!r}")
        return Source(f"{name}.source", text)
    first, *beside = [files] if isinstance(files, str) else _listed(who, "sources", files)
    for file in (first, *beside):
        _check(who, CPU.name, file, csrc)
    return Source(first, beside=tuple(beside))


def _listed(who: str, option: str, given: Any) -> list[str]:
    is_list = isinstance(given, Sequence) and not isinstance(given, (bytes, bytearray))
    if not is_list or not given or not all(isinstance(file, str) for file in given):
        raise TypeError(f"{who}: {option} must be a file or a list of files, got {given!r}")
    twice = [file for index, file in enumerate(given) if file in given[:index]]
    if twice:
        raise ValueError(f"{who}: {option} names {twice[0]!r} twice")
    return list(given)


def _check(who: str, backend: str, file: str, csrc: Path | None) -> None:
    if not file.endswith(SUFFIXES[backend]):
        raise ValueError(f"{who}: its {backend} source {file!r} must be a {' or '.join(SUFFIXES[backend])} file")
    if csrc is None:
        raise ValueError(f"{who}: its {backend} source {file!r} is in no folder, as the library has no csrc")
    if not (csrc / file).is_file():
        raise ValueError(f"{who}: its {backend} source {file!r} is not in {csrc}")
