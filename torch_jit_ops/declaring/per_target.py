"""Options that are said per backend or architecture, ``{"cuda": [...], "sm_100": [...]}``: flags, include, ldflags.

The most specific key wins, ``sm_90a`` before ``sm_90`` before ``cuda``, and what the others say does not count: so fast math
can be on for CUDA and off for one architecture.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch_jit_ops import backends
from torch_jit_ops.backends.wheels import Folder, WheelHeaders, WheelLibrary

_LINKS = r"-l(?!ineinfo$)|-L|-Wl,|-Xlinker"


def backend_of(key: str) -> str | None:
    """``cuda`` for ``cuda``, ``sm_90`` and ``sm_90a``; None for a key that is none."""
    backend = backends.of_key(key)
    return None if backend is None else backend.name


def pick(option: Mapping[str, tuple[Any, ...]], backend: str, arch: str) -> tuple[Any, ...]:
    """What the option says for an architecture such as ``9.0a`` or ``x86-64-v3``."""
    return next((option[key] for key in backends.named(backend).keys(arch) if key in option), ())


def flags(who: str, given: Mapping[str, Sequence[str]] | None, sources: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The flags of compilers.

    Args:
        who: the op, for errors.
        given: the option.
        sources: the backends that have a source.

    Raises:
        TypeError: it is no mapping from names to lists of str.
        ValueError: a key is no backend or architecture, or of a backend without a source; or a flag is for linking.
    """
    checked = _lists(who, "flags", "str", given, sources, (str,))
    for listed in checked.values():
        for flag in listed:
            if re.match(_LINKS, flag):
                raise ValueError(f"{who}: the flag {flag!r} is for linking, and flags are for compiling: name it in ldflags")
    return checked


def ldflags(
    who: str, given: Mapping[str, Sequence[str | WheelLibrary]] | None, sources: Iterable[str]
) -> dict[str, tuple[str | WheelLibrary, ...]]:
    """What is linked. Arguments and errors as for ``flags``.

    Raises:
        ValueError: besides, a folder is not given by its path from ``/``, or a flag cannot be parted into words.
    """
    checked = _lists(who, "ldflags", "str or library_of(...)", given, sources, (str, WheelLibrary))
    for flag in (flag for listed in checked.values() for flag in listed if isinstance(flag, str)):
        try:
            words = shlex.split(flag)
        except ValueError as error:
            raise ValueError(f"{who}: the linker's flag {flag!r} cannot be passed on: {error}") from None
        for word in words:
            if re.match(r"-L[^/]|(?!-)[^/]", word):
                raise ValueError(
                    f"{who}: the linker's flag {word!r} names no path from /, and kernels are linked in another folder"
                )
    return checked


def include(who: str, given: Mapping[str, Sequence[Any]] | None, sources: Iterable[str]) -> dict[str, tuple[Folder, ...]]:
    """The folders for ``#include``. Arguments and errors as for ``flags``.

    Raises:
        ValueError: besides, a folder does not exist.
    """
    listed = _lists(who, "include", "folders", given, sources, (str, os.PathLike))
    return {key: folders(f"{who}: include of {key}", of_key) for key, of_key in listed.items()}


def folders(who: str, given: Iterable[Any]) -> tuple[Folder, ...]:
    """Folders that exist, by their paths from ``/``. Those of wheels are looked for when a kernel is built.

    Raises:
        ValueError: one does not exist.
    """
    made = tuple(folder if isinstance(folder, WheelHeaders) else Path(folder).resolve() for folder in given)
    for folder in made:
        if isinstance(folder, Path) and not folder.is_dir():
            raise ValueError(f"{who}: the folder {folder} does not exist")
    return made


def _lists(
    who: str,
    option: str,
    holds: str,
    given: Mapping[str, Sequence[Any]] | None,
    sources: Iterable[str],
    types: tuple[type, ...],
) -> dict[str, tuple[Any, ...]]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(f"{who}: {option} must be a mapping from backends, such as {{'cuda': ...}}, got {given!r}")
    for key, listed in given.items():
        backend = backend_of(key) if isinstance(key, str) else None
        if backend is None:
            raise ValueError(
                f"{who}: {option} names {key!r}; there are the backends {', '.join(backends.NAMES)} and architectures such as "
                "sm_90, sm_90a and x86-64-v3"
            )
        if (
            isinstance(listed, (str, bytes))
            or not isinstance(listed, Sequence)
            or not all(isinstance(x, types) for x in listed)
        ):
            raise TypeError(f"{who}: {option} of {key} must be a list of {holds}, got {listed!r}")
        if listed and backend not in sources:
            raise ValueError(f"{who}: {option} names {key!r}, but there is no {backend} source")
    return {key: tuple(listed) for key, listed in given.items()}
