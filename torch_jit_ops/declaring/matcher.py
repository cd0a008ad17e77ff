"""What the tensors of a call must be, declared once and checked wherever no kernel does it: fakes, meta tensors, references.

    tensors={"input": "[tokens..., 2*d] float16|bfloat16 rows", "weight": "[d]", "bias": "[d] weight.dtype"}

It is what a kernel says in C++ with TensorMatcher (include/jitk/tensor.h), and it refuses in the same words. Sizes and strides
may be symbols of a traced graph: what must be equal becomes a guard of the graph, or a check when it runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch_jit_ops.declaring import layout
from torch_jit_ops.declaring.signature import Signature

_TEXT = re.compile(
    r"\[(?P<shape>[^\[\]]*)\](?: (?!rows$|strides )(?P<dtype>\S+))?(?: (?P<layout>rows|strides \[(?P<strides>[^\[\]]*)\]))?"
)
_SIZE = re.compile(r"\*|(?:(\d+)\*)?([A-Za-z_]\w*)|(\d+)")


@dataclass(frozen=True)
class Size:
    """``hidden``, ``2*d``, ``3``, or ``*`` for any."""

    number: int = 1
    name: str | None = None
    any: bool = False


@dataclass(frozen=True)
class TensorPattern:
    """What one argument must be.

    Attributes:
        name: of the argument.
        leading: the name of any number of leading dimensions, if there may be some.
        sizes: of the last dimensions.
        dtypes: those that are served; empty for any.
        dtype_of: the argument whose dtype it has, if it has one's.
        layout: how it lies in memory.
    """

    name: str
    leading: str | None
    sizes: tuple[Size, ...]
    dtypes: tuple[torch.dtype, ...] = ()
    dtype_of: str | None = None
    layout: layout.Layout = layout.CONTIGUOUS


@dataclass
class _Bound:
    """Values that the tensors of a call have given to names, each with the argument that did."""

    sizes: dict[str, tuple[Any, str]] = field(default_factory=dict)
    leading: dict[str, tuple[Sequence[Any], str]] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    device: tuple[torch.device, str] | None = None


def parse(who: str, texts: Mapping[str, str], signature: Signature, outputs: Sequence[str] = ()) -> tuple[TensorPattern, ...]:
    """Parse the ``tensors`` of the op ``who``. Patterns are in the order of the arguments, and then of the ``outputs``.

    Raises:
        ValueError: a text is malformed, or names something that is no tensor argument and no output.
    """
    names = [argument.name for argument in signature.arguments if argument.kind == "T"]
    for name in texts:
        if name not in (*names, *outputs):
            made = f" and its outputs {', '.join(outputs)}" if outputs else ""
            raise ValueError(f"{who}: tensors names {name!r}; its tensor arguments are {', '.join(names) or 'none'}{made}")
    names += outputs
    return tuple(_parse(who, name, texts[name], names) for name in names if name in texts)


def _parse(who: str, name: str, text: str, names: Sequence[str]) -> TensorPattern:
    form = _TEXT.fullmatch(text)
    entries = [entry.strip() for entry in form["shape"].split(",")] if form and form["shape"].strip() else []
    leading = None
    if entries and re.fullmatch(r"[A-Za-z_]\w*\.\.\.", entries[0]):
        leading = entries.pop(0).removesuffix("...")
    sizes = [_SIZE.fullmatch(entry) for entry in entries]
    if form is None or None in sizes:
        raise ValueError(
            f"{who}: tensors says {text!r} of {name!r}; it must be a shape, a dtype if it matters, and a layout if it is not "
            "contiguous, such as '[tokens..., 2*d] rows', '[hidden] weight.dtype' or '[3, *] float16|bfloat16 strides [*, 1]'"
        )
    parts = tuple(
        Size(any=True) if size[0] == "*" else Size(int(size[1] or 1), size[2]) if size[2] else Size(int(size[3]))
        for size in sizes
        if size is not None
    )
    dtype_of, dtypes = None, []
    if form["dtype"] and form["dtype"].endswith(".dtype"):
        dtype_of = form["dtype"].removesuffix(".dtype")
        if dtype_of not in names or names.index(dtype_of) >= names.index(name):
            before = ", ".join(names[: names.index(name)]) or "none"
            raise ValueError(f"{who}: tensors gives {name!r} the dtype of {dtype_of!r}; the tensors before it are {before}")
    elif form["dtype"]:
        for word in form["dtype"].split("|"):
            dtype = getattr(torch, word, None)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{who}: tensors gives {name!r} the dtype {word!r}; PyTorch has no such one")
            dtypes.append(dtype)
    return TensorPattern(
        name, leading, parts, tuple(dtypes), dtype_of, _layout(who, name, form, leading is not None, len(sizes))
    )


def _layout(who: str, name: str, form: re.Match[str], has_leading: bool, fixed: int) -> layout.Layout:
    strides = form["strides"]
    if strides is None:
        return layout.ROWS if form["layout"] else layout.CONTIGUOUS
    entries = [entry.strip() for entry in strides.split(",")] if strides.strip() else []
    right = all(re.fullmatch(r"\*|\d+", entry) for entry in entries) and len(entries) == fixed + has_leading
    if not right or (has_leading and entries[0] != "*"):
        raise ValueError(
            f"{who}: tensors gives {name!r} the strides [{strides}] for [{form['shape']}]; "
            "an entry needs a number or '*', leading dimensions '*'"
        )
    return layout.Layout(strides=tuple(None if entry == "*" else int(entry) for entry in entries[has_leading:]))


Kernels = Callable[[str], Sequence[torch.dtype]]


def verify(who: str, patterns: Sequence[TensorPattern], given: Mapping[str, Any], kernels: Kernels) -> None:
    """Raise unless the tensors of a call are what the patterns say, and on one device.

    Args:
        who: the op, for errors.
        patterns: in the order of the arguments.
        given: arguments by name; those that are no tensors, or for which there is no pattern, may be anything.
        kernels: dtypes of an argument that have kernels, for errors.

    Raises:
        RuntimeError: they are not.
    """
    bound = _Bound()
    for pattern in patterns:
        tensor = given.get(pattern.name)
        if isinstance(tensor, Tensor):
            _verify(who, pattern, tensor, bound, kernels)


def _verify(who: str, pattern: TensorPattern, tensor: Tensor, bound: _Bound, kernels: Kernels) -> None:
    def require(condition: bool | torch.SymBool, why: str) -> None:
        _require(condition, lambda: _refusal(who, pattern, tensor, bound, why))

    fixed = len(pattern.sizes)
    count = tensor.dim() - fixed
    has_rank = count >= 0 if pattern.leading else count == 0
    require(has_rank, f"it has {tensor.dim()} dimensions, expected {'at least ' if pattern.leading else ''}{fixed}")
    if pattern.leading is not None:
        sizes, by = bound.leading.setdefault(pattern.leading, (tensor.shape[:count], pattern.name))
        why = f"leading dimensions: {pattern.leading} was bound to {_sizes(sizes)} by '{by}'"
        require(len(sizes) == count, why)
        for one, other in zip(sizes, tensor.shape, strict=False):
            require(one == other, why)
    for dim, (size, actual) in enumerate(zip(pattern.sizes, tensor.shape[count:], strict=True), start=count):
        if size.any:
            continue
        if size.name is None:
            require(actual == size.number, f"dimension {dim}: expected {size.number}")
        elif size.name in bound.sizes:
            value, by = bound.sizes[size.name]
            require(value * size.number == actual, f"dimension {dim}: {size.name} was bound to {value} by '{by}'")
        else:
            require(actual % size.number == 0, f"dimension {dim}: {actual} is not a multiple of {size.number}")
            bound.sizes[size.name] = actual // size.number, pattern.name
    for dim, condition in layout.unmet(tensor, pattern.layout):
        require(condition, _why_not_so(pattern, tensor, dim))
    if pattern.dtypes:
        some = kernels(pattern.name)
        served = f"; kernels take {', '.join(map(_shown, some))}" if set(some) < set(pattern.dtypes) else ""
        require(tensor.dtype in pattern.dtypes, f"dtype {_shown(tensor.dtype)} is not among those expected{served}")
    expected = bound.dtypes.get(pattern.dtype_of or "", tensor.dtype)
    require(tensor.dtype == expected, f"dtype was bound to {_shown(expected)} by '{pattern.dtype_of}'")
    bound.dtypes[pattern.name] = tensor.dtype
    device, by = bound.device or (tensor.device, pattern.name)
    require(tensor.device == device, f"device was bound to {device} by '{by}'")
    bound.device = device, by


def _why_not_so(pattern: TensorPattern, tensor: Tensor, dim: int) -> str:
    strides = pattern.layout.strides
    if strides is not None:
        expected = strides[dim - tensor.dim() + len(strides)]
        why = f"stride of dimension {dim} is {tensor.stride(dim)}, expected {expected}"
    elif pattern.layout.rows:
        why = "its strides do not walk over dense rows in equal steps"
    else:
        why = "it is not contiguous"
    return f"{why}; pass {pattern.name}.contiguous()"


def refuses(patterns: Sequence[TensorPattern], name: str, dtype: torch.dtype | None) -> bool:
    """Whether the argument must not be of this dtype, whatever the others are."""
    return any(pattern.name == name and pattern.dtypes and dtype not in pattern.dtypes for pattern in patterns)


def verify_output(who: str, name: str, out: Tensor, result: Tensor) -> None:
    """Raise unless ``out`` is what the functional form would return in its place.

    Raises:
        RuntimeError: its shape, dtype or device is another.
    """
    fits = out.dim() == result.dim() and out.dtype == result.dtype and out.device == result.device
    expected, got = ((_sizes(each.shape), _shown(each.dtype), str(each.device)) for each in (result, out))

    def text() -> str:
        return _described(who, name, expected, got, "the functional form returns what is expected")

    _require(fits, text)
    for one, other in zip(out.shape, result.shape, strict=True):
        _require(one == other, text)


def _require(condition: bool | torch.SymBool, text: Callable[[], str]) -> None:
    if isinstance(condition, torch.SymBool):
        torch._check(condition, text)
    elif not condition:
        raise RuntimeError(text())


def _refusal(who: str, pattern: TensorPattern, tensor: Tensor, bound: _Bound, why: str) -> str:
    dtypes = [bound.dtypes[pattern.dtype_of]] if pattern.dtype_of in bound.dtypes else pattern.dtypes
    device = bound.device[0] if bound.device is not None else tensor.device
    expected = (_expected_shape(pattern, bound), "|".join(map(_shown, dtypes)) or "any", str(device), str(pattern.layout))
    dense = tensor.layout is not torch.strided or layout.lies_so(tensor, layout.CONTIGUOUS)
    strides = "" if dense else f"strides {_sizes(tensor.stride())}"
    got = (_sizes(tensor.shape), _shown(tensor.dtype), str(tensor.device), strides)
    return _described(who, pattern.name, expected, got, why)


def _described(who: str, name: str, expected: Sequence[str], got: Sequence[str], why: str) -> str:
    widths = [max(map(len, pair)) for pair in zip(expected, got, strict=True)]
    lines = ["  ".join(map(str.ljust, facts, widths)).rstrip() for facts in (expected, got)]
    return f"{who}: argument '{name}' does not match\n  expected  {lines[0]}\n  got       {lines[1]}\n  {why}"


def _expected_shape(pattern: TensorPattern, bound: _Bound) -> str:
    parts = []
    if pattern.leading is not None:
        sizes = bound.leading.get(pattern.leading, (None,))[0]
        if sizes is None:
            parts.append(f"{pattern.leading}...")
        elif len(sizes) == 1:
            parts.append(f"{pattern.leading}={sizes[0]}")
        else:
            parts += map(str, sizes)
    for size in pattern.sizes:
        if size.any or size.name is None:
            parts.append("*" if size.any else str(size.number))
            continue
        text = size.name if size.number == 1 else f"{size.number}*{size.name}"
        known = bound.sizes.get(size.name)
        parts.append(text if known is None else f"{text}={known[0] * size.number}")
    return f"[{', '.join(parts)}]"


def _sizes(sizes: Sequence[Any]) -> str:
    return f"[{', '.join(map(str, sizes))}]"


def _shown(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
