"""The options of ``OpLibrary.op``: each is checked where it is declared, before an op of wrong parts meets PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch_jit_ops.declaring import dtypes, variant
from torch_jit_ops.declaring.declaration import Kernel
from torch_jit_ops.declaring.signature import Signature
from torch_jit_ops.declaring.sources import SUFFIXES, Source


def check_lists(who: str, **options: Any) -> None:
    """Refuse an option that is no list, or holds something else than names."""
    for option, value in options.items():
        if isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, type(None))):
            raise TypeError(f"{who}: {option} must be a list, got {value!r}")
        for item in value or ():
            if option != "patterns" and not isinstance(item, str):
                raise TypeError(f"{who}: {option} must hold names, got {item!r}")


def kernels(
    who: str, signature: Signature, sources: Mapping[str, Source], variants: str | Mapping[str, str] | None
) -> dict[str, Kernel]:
    """The kernel of each backend that has a source."""
    found = {}
    for backend, source in sources.items():
        text = variants if isinstance(variants, str) else (variants or {}).get(backend)
        if text is None:
            raise ValueError(f"{who} has a {backend} source, but variant names only {', '.join(variants or {})}")
        found[backend] = Kernel(source, variant.parse_variant(who, text, signature))
    return found


def dtypes_of(who: str, given: dtypes.Given, signature: Signature, kernels: Mapping[str, Kernel]) -> dtypes.DTypes:
    """The dtypes that have kernels, by argument."""
    tensors = [argument.name for argument in signature.arguments if argument.kind == "T"]
    picking = dict.fromkeys(name for kernel in kernels.values() for name in kernel.pattern.arguments_of("dtype"))
    return dtypes.parse(who, given, tensors, tuple(picking))


def check_variant(who: str, variants: str | Mapping[str, str] | None, sources: Mapping[str, Source]) -> None:
    """Refuse a variant without a source, a source without one, and one for a backend that there is not."""
    if variants is not None and not isinstance(variants, str):
        if not isinstance(variants, Mapping):
            raise TypeError(f"{who}: variant must be a mapping from backends, such as {{'cuda': ...}}, got {variants!r}")
        for backend in variants:
            if backend not in SUFFIXES:
                raise ValueError(f"{who}: variant names the backend {backend!r}; there are {', '.join(SUFFIXES)}")
    if variants is not None and not sources:
        raise ValueError(
            f"{who} has a variant, but no kernel: name its source with cuda= or cpu=, or no variant, and the op is its function"
        )
    if variants is None and sources:
        raise ValueError(
            f"{who} has a source, but no variant: name its C++ function, such as '{who.split('::')[-1]}<{{x.dtype}}>'"
        )


def output_names(who: str, signature: Signature, names: Sequence[str] | None) -> tuple[str, ...]:
    """The out form's arguments; none if there is no out form."""
    if any(argument.written for argument in signature.arguments) or not signature.made or not signature.has_plain_results:
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
