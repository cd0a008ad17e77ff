"""The options of ``OpLibrary.op``: each is checked where it is declared, before an op of wrong parts meets PyTorch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from torch_jit_ops import variant
from torch_jit_ops.declaration import Kernel
from torch_jit_ops.signature import Signature

_SUFFIXES = {"cuda": (".cu",), "cpu": (".cpp", ".cc", ".cxx")}


def check_lists(who: str, **options: Any) -> None:
    """Refuse an option that is no list, or holds something else than names."""
    for option, value in options.items():
        if isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, type(None))):
            raise TypeError(f"{who}: {option} must be a list, got {value!r}")
        for item in value or ():
            if option not in ("dtypes", "patterns") and not isinstance(item, str):
                raise TypeError(f"{who}: {option} must hold names, got {item!r}")


def check_dtypes(who: str, dtypes: Sequence[torch.dtype]) -> None:
    """Refuse what is no dtype, or one that kernels have no type for."""
    for dtype in dtypes:
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{who}: dtypes must hold dtypes of torch, got {dtype!r}")
        try:
            variant.cpp_name(dtype)
        except ValueError as error:
            raise ValueError(f"{who}: dtypes: {error}") from error


def kernels(
    who: str,
    csrc: Path,
    signature: Signature,
    sources: Mapping[str, str | None],
    variants: str | Mapping[str, str] | None,
) -> dict[str, Kernel]:
    """The kernel of each backend that has a source."""
    found = {}
    for backend, source in sources.items():
        if source is None:
            continue
        if not (csrc / source).is_file():
            raise ValueError(f"{who}: its {backend} source {source!r} is not in {csrc}")
        text = variants if isinstance(variants, str) else (variants or {}).get(backend)
        if text is None:
            raise ValueError(f"{who} has a {backend} source, but variant names only {', '.join(variants or {})}")
        found[backend] = Kernel(source, variant.parse_variant(who, text, signature))
    return found


def check_backends(
    who: str, sources: Mapping[str, str | None], variants: str | Mapping[str, str] | None, flags: Mapping[str, Sequence[str]]
) -> None:
    """Refuse what names a backend that there is not, or a source, a variant or flags that cannot work."""
    named = {"flags": flags, **({} if variants is None or isinstance(variants, str) else {"variant": variants})}
    for option, mapping in named.items():
        if not isinstance(mapping, Mapping):
            raise TypeError(f"{who}: {option} must be a mapping from backends, such as {{'cuda': ...}}, got {mapping!r}")
        for backend in mapping:
            if backend not in sources:
                raise ValueError(f"{who}: {option} names the backend {backend!r}; there are {', '.join(sources)}")
    if variants is not None and not any(sources.values()):
        raise ValueError(
            f"{who} has a variant, but no kernel: name its source with cuda= or cpu=, or no variant, and the op is its function"
        )
    if variants is None and any(sources.values()):
        raise ValueError(
            f"{who} has a source, but no variant: name its C++ function, such as '{who.split('::')[-1]}<{{x.dtype}}>'"
        )
    for backend, source in sources.items():
        if source is not None and not str(source).endswith(_SUFFIXES[backend]):
            expected = " or ".join(_SUFFIXES[backend])
            raise ValueError(f"{who}: its {backend} source {str(source)!r} must be a {expected} file")
        _check_flags(who, backend, source, flags.get(backend, ()))


def _check_flags(who: str, backend: str, source: str | None, flags: Sequence[str]) -> None:
    if isinstance(flags, (str, bytes)) or not all(isinstance(flag, str) for flag in flags):
        raise TypeError(f"{who}: flags of {backend} must be a list of str, got {flags!r}")
    if flags and source is None:
        raise ValueError(f"{who}: flags are for {backend}, but it has no {backend} source")
    for flag in flags:
        if re.match(r"-l(?!ineinfo$)|-L|-Wl,|-Xlinker", flag):
            raise ValueError(
                f"{who}: the flag {flag!r} is for linking; flags are for compiling alone, and kernels link nothing"
            )


def output_names(who: str, signature: Signature, names: Sequence[str] | None) -> tuple[str, ...]:
    """The out form's arguments; none if there is no out form."""
    if any(argument.written for argument in signature.arguments) or signature.results == 0:
        return ()
    if names is None:
        if signature.results > 1:
            raise ValueError(
                f"{who} returns {signature.results} tensors: name the out form's arguments, outputs=('out', 'scale')"
            )
        names = ("out",)
    if len(names) != signature.results:
        raise ValueError(f"{who} returns {signature.results} tensors, but outputs names {len(names)}: {', '.join(names)}")
    taken = [argument.name for argument in signature.arguments]
    for index, name in enumerate(names):
        if name in taken or name in names[:index]:
            raise ValueError(f"{who}: its out form would have two arguments called {name!r}; name others with outputs")
    return tuple(names)
