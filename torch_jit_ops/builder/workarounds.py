"""What ``torch.utils.cpp_extension`` leaves to its callers: words that a shell or ninja would take apart, folders of any name,
compilers that are started by several words, and a lock in a folder that nobody else knows.
"""

from __future__ import annotations

import contextlib
import functools
import shlex
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch_jit_ops.store import files

LINKS = "links"  # folder of links in a staging folder, which go after the build


def quoted(flags: Iterable[str]) -> list[str]:
    """The words of the flags, as a shell parts them, so that the shell behind ninja gives the compiler these words and does
    nothing else: ``$``, ``;`` and the like are letters.

    Raises:
        ValueError: a word cannot be written into a build file.
    """
    words = []
    for flag in flags:
        try:
            for word in shlex.split(flag):
                word.encode()
                if "\n" in word or "\r" in word or "\0" in word:
                    raise ValueError("it holds a newline or a zero")
                words.append(shlex.quote(word).replace("$", "$$"))
        except ValueError as error:
            raise ValueError(f"the compiler's flag {flag!r} cannot be passed on: {error}") from None
    return words


def link(staging: Path, name: str, target: Path) -> Path:
    """The link of that name in the folder of links."""
    made = staging / LINKS / name
    made.parent.mkdir(exist_ok=True)
    made.symlink_to(target)
    return made


def plain_folders(staging: Path, folders: Iterable[Path]) -> list[Path]:
    """The folders, in their order, each by a name that needs no quotes."""
    return [
        folder if files.is_plain(folder) else link(staging, f"include{index}", folder.absolute())
        for index, folder in enumerate(folders)
    ]


def named(staging: Path, folders: Iterable[Path]) -> dict[str, Path]:
    """The folders by all names that compilers may call them by."""
    names: dict[str, Path] = {}
    for index, folder in enumerate(folders):
        names |= {str(folder): folder, str(folder.resolve()): folder, str(staging / LINKS / f"include{index}"): folder}
    return names


_here = threading.local()


@contextlib.contextmanager
def started_by(command: Sequence[str], staging: Path) -> Iterator[None]:
    """Have ``cpp_extension`` start the C++ compiler by this command, and take no lock, in this thread while the block runs."""
    _install()
    if len(command) > 1 or not files.is_plain(command[0]):
        program = staging / LINKS / "c++"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        program.chmod(0o700)
        _here.compiler = f"{LINKS}/c++"  # ninja runs in the staging folder
    _here.building = True
    try:
        yield
    finally:
        _here.__dict__.clear()


@functools.cache
def _install() -> None:
    """Other threads, such as a program's own use of ``cpp_extension``, get what they always got."""
    from torch.torch_version import TorchVersion
    from torch.utils import cpp_extension

    def replace(name: str, answer: Any) -> None:
        original = getattr(cpp_extension, name, None)
        if original is not None:  # not every version of PyTorch has all of them
            setattr(cpp_extension, name, functools.partial(answer, original))

    def compiler(original: Any) -> Any:
        return _here.__dict__.get("compiler") or original()

    def version(original: Any, program: Any) -> Any:  # doctor tells what is too old
        return (True, TorchVersion("0.0.0")) if hasattr(_here, "compiler") else original(program)

    def wrapped(original: Any, program: Any) -> Any:  # by ccache, which the command may begin with
        return [program] if program == _here.__dict__.get("compiler") else original(program)

    def lock(original: Any, *args: Any, **options: Any) -> Any:  # from 2.14 on; there are file systems without locks
        return contextlib.nullcontext() if hasattr(_here, "building") else original(*args, **options)

    replace("get_cxx_compiler", compiler)
    replace("get_compiler_abi_compatibility_and_version", version)
    replace("_wrap_compiler", wrapped)
    replace("FileLock", lock)
