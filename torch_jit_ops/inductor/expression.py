"""The spelling of a computation without its accidents: two programs that say the same have the same expressions.

A call of PyTorch becomes an ``Expression`` whichever way it was written: ``x.pow(2)``, ``x * x`` and ``torch.square(x)`` are
``square(x)``; a slice, a chunk and a split that give the first half of each row are ``half(x, 0)``; a cast to the dtype that a
tensor has is the tensor; a promotion by a mixed product is a cast. Sizes are left out, dimensions count from the last, so that
one pattern serves every rank and symbolic sizes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

COMMUTATIVE = ("add", "mul")

_NAMES = {
    "multiply": "mul",
    "rmul": "mul",
    "radd": "add",
    "truediv": "div",
    "true_divide": "div",
    "divide": "div",
    "subtract": "sub",
    "square_root": "sqrt",
    "_to_copy": "to",
}
_CASTS = ("to", "float", "half", "bfloat16", "type", "type_as")
_SLICES = ("getitem", "chunk", "split", "narrow", "slice", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split")
_SAME = ("contiguous", "alias", "dropout")
_DUNDER = re.compile(r"__(\w+)__$")


@dataclass(frozen=True, eq=False)
class Expression:
    """What a tensor was computed by. Two expressions of one reader are equal if they are the same object.

    Attributes:
        name: of the function; ``argument`` for what is not looked into.
        inputs: the tensors that it is a function of.
        constants: its other arguments.
        dtype: of the tensor.
        tensor: one that knows its shape, strides and device: fake or meta.
        source: where the tensor is: a node of a graph, or the name of an argument; None within a simplified call.
    """

    name: str
    inputs: tuple[Expression | None, ...]
    constants: tuple[Any, ...]
    dtype: torch.dtype
    tensor: Tensor
    source: Any = None

    def __str__(self) -> str:
        if self.name == "argument":
            return f"{self.source}:{str(self.dtype).removeprefix('torch.')}"
        inside = ", ".join(str(part) for part in (*self.inputs, *self.constants))
        return f"{self.name}({inside}):{str(self.dtype).removeprefix('torch.')}"

    def parts(self) -> set[Expression]:
        """It and all that it is computed from."""
        return {self}.union(*(part.parts() for part in self.inputs if part is not None))


@dataclass(frozen=True)
class Call:
    """A call as a graph or a recorder saw it, tensors among the arguments replaced by their expressions."""

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Tensor
    source: Any

    def value(self, position: int, name: str, default: Any = None) -> Any:
        """The argument at ``position`` or of ``name``."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)


def name_of(function: Any) -> str:
    """The name of a function, a method or an operator, however it is spelled."""
    if isinstance(function, str):
        name = function
    elif isinstance(function, torch._ops.OpOverload):
        name = function._schema.name.rpartition("::")[2]
    else:
        name = getattr(function, "__name__", type(function).__name__)
    dunder = _DUNDER.match(name)
    name = dunder[1] if dunder else name
    return _NAMES.get(name, name)


class Reader:
    """Makes expressions. Equal calls give the same object, until ``forget`` says that memory was written."""

    def __init__(self) -> None:
        self._known: dict[Any, Expression] = {}

    def forget(self) -> None:
        self._known.clear()

    def argument(self, tensor: Tensor, source: Any) -> Expression:
        """A tensor that is not looked into."""
        return Expression("argument", (), (), tensor.dtype, tensor, source)

    def read(self, call: Call) -> Expression:
        """The expression of a call."""
        rule = _RULES.get(call.name)
        found = rule(self, call) if rule is not None else None
        return found if found is not None else self._generic(call)

    def make(
        self,
        name: str,
        inputs: Sequence[Expression | None],
        constants: Sequence[Any],
        tensor: Tensor,
        source: Any,
        dtype: torch.dtype | None = None,
    ) -> Expression:
        made = Expression(name, tuple(inputs), tuple(constants), dtype or tensor.dtype, tensor, source)
        try:
            return self._known.setdefault((name, made.inputs, made.constants, made.dtype), made)
        except TypeError:  # a constant that cannot be hashed, such as a slice
            return self.argument(tensor, source)

    def cast(self, value: Expression, dtype: torch.dtype, tensor: Tensor, source: Any = None) -> Expression:
        """``value.to(dtype)``. There and back again through a wider dtype is no cast."""
        if value.dtype == dtype:
            return value
        if value.name == "to":
            inner = value.inputs[0]
            if inner is not None and inner.dtype == dtype and torch.promote_types(dtype, value.dtype) == value.dtype:
                return inner
        return self.make("to", (value,), (), tensor, source, dtype)

    def _generic(self, call: Call) -> Expression:
        inputs: list[Expression | None] = []
        constants: list[Any] = []
        for name, value in [*((None, value) for value in call.args), *sorted(call.kwargs.items())]:
            if isinstance(value, Expression):
                inputs.append(value)
            elif _holds_tensors(value):
                return self.argument(call.result, call.source)
            elif value is not None:
                constants.append(value if name is None else (name, value))
        return self.make(call.name, inputs, constants, call.result, call.source)


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(isinstance(part, Expression) for part in value)


# --- rules ----------------------------------------------------------------------------------------


def _binary(reader: Reader, call: Call) -> Expression | None:
    if len(call.args) != 2 or call.kwargs.get("alpha", 1) != 1 or set(call.kwargs) - {"alpha"}:
        return None
    dtype = call.result.dtype
    left, right = (
        reader.cast(part, dtype, part.tensor) if isinstance(part, Expression) and part.tensor.dim() > 0 else part
        for part in call.args
    )
    if call.name == "mul" and left is right:
        return reader.make("square", (left,), (), call.result, call.source)
    if call.name == "mul":
        for gate, sigmoid in ((left, right), (right, left)):
            if isinstance(sigmoid, Expression) and sigmoid.name == "sigmoid" and sigmoid.inputs[0] is gate:
                return reader.make("silu", (gate,), (), call.result, call.source)
    if call.name == "div" and isinstance(right, Expression) and right.name == "sqrt":
        inverse = reader.make("rsqrt", right.inputs, (), right.tensor, None if isinstance(left, Expression) else call.source)
        if not isinstance(left, Expression):
            return inverse if left == 1 else None
        return reader.make("mul", (left, inverse), (), call.result, call.source)
    tensors = [part for part in (left, right) if isinstance(part, Expression)]
    numbers = [part for part in (left, right) if not isinstance(part, Expression)]
    if call.name not in COMMUTATIVE and numbers:
        numbers.append("first" if isinstance(right, Expression) else "second")
    return reader.make(call.name, tensors, numbers, call.result, call.source)


def _power(reader: Reader, call: Call) -> Expression | None:
    exponent = call.value(1, "exponent")
    name = {2: "square", 0.5: "sqrt", -0.5: "rsqrt"}.get(exponent) if isinstance(exponent, (int, float)) else None
    return reader.make(name, (call.args[0],), (), call.result, call.source) if name and not call.kwargs else None


def _reciprocal(reader: Reader, call: Call) -> Expression | None:
    value = call.args[0]
    return reader.make("rsqrt", value.inputs, (), call.result, call.source) if value.name == "sqrt" else None


def _cast(reader: Reader, call: Call) -> Expression | None:
    value = call.args[0] if call.args else None
    if not isinstance(value, Expression) or value.tensor.device != call.result.device:
        return reader.argument(call.result, call.source)
    return reader.cast(value, call.result.dtype, call.result, call.source)


def _same(reader: Reader, call: Call) -> Expression | None:
    """A call that gives back its first argument: the same values in the same places."""
    value = call.args[0] if call.args else None
    if not isinstance(value, Expression) or (call.name == "dropout" and call.value(2, "training", True) is not False):
        return reader.argument(call.result, call.source)
    if len(call.args) > 1 and call.name == "contiguous":
        return reader.argument(call.result, call.source)
    same = value.tensor.shape == call.result.shape and _all(
        mine == theirs for mine, theirs in zip(value.tensor.stride(), call.result.stride(), strict=True)
    )
    return value if same else reader.argument(call.result, call.source)


def _slice(reader: Reader, call: Call) -> Expression | None:
    """The first or the second half of each row, by where it lies in memory; any other slice is not looked into."""
    whole = call.args[0] if call.args else None
    part = call.result
    if isinstance(whole, Expression) and 0 < whole.tensor.dim() == part.dim():
        tensor = whole.tensor
        width = part.shape[-1]
        aligned = [tensor.shape[-1] == 2 * width, width > 0]
        aligned += [mine == theirs for mine, theirs in zip(tensor.stride(), part.stride(), strict=True)]
        aligned += [mine == theirs for mine, theirs in zip(tensor.shape[:-1], part.shape[:-1], strict=True)]
        if _all(aligned):
            offset = part.storage_offset() - tensor.storage_offset()
            for index, start in enumerate((0, width * tensor.stride(-1))):
                if statically_known_true(offset == start):
                    return reader.make("half", (whole,), (index,), part, call.source)
    return reader.argument(part, call.source)


def _all(facts: Any) -> bool:
    return all(statically_known_true(fact) for fact in facts)


def _mean(reader: Reader, call: Call) -> Expression | None:
    value, dims = call.args[0], call.value(1, "dim")
    if dims is None or call.value(3, "dtype") not in (None, value.dtype):
        return None
    dims = [dims] if isinstance(dims, int) else dims
    rank = value.tensor.dim()
    last = tuple(sorted(dim if dim < 0 else dim - rank for dim in dims))
    return reader.make("mean", (value,), (last, bool(call.value(2, "keepdim", False))), call.result, call.source)


def _gelu(reader: Reader, call: Call) -> Expression | None:
    return reader.make("gelu", (call.args[0],), (call.value(1, "approximate", "none"),), call.result, call.source)


def _silu(reader: Reader, call: Call) -> Expression | None:
    inplace = call.value(1, "inplace", False)
    return None if inplace else reader.make("silu", (call.args[0],), (), call.result, call.source)


def _rms_norm(reader: Reader, call: Call) -> Expression | None:
    value, eps = call.args[0], call.value(3, "eps")
    if eps is None:  # that of the type in which PyTorch computes
        eps = torch.finfo(torch.promote_types(value.dtype, torch.float32)).eps
    constants = (len(call.value(1, "normalized_shape")), eps)
    return reader.make("rms_norm", (value, call.value(2, "weight")), constants, call.result, call.source)


def _layer_norm(reader: Reader, call: Call) -> Expression | None:
    inputs = (call.args[0], call.value(2, "weight"), call.value(3, "bias"))
    constants = (len(call.value(1, "normalized_shape")), call.value(4, "eps", 1e-5))
    return reader.make("layer_norm", inputs, constants, call.result, call.source)


_RULES = {
    **dict.fromkeys(("add", "mul", "sub", "div"), _binary),
    **dict.fromkeys(_CASTS, _cast),
    **dict.fromkeys(_SLICES, _slice),
    **dict.fromkeys(_SAME, _same),
    "pow": _power,
    "reciprocal": _reciprocal,
    "mean": _mean,
    "gelu": _gelu,
    "silu": _silu,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
}
