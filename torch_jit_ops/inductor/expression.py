"""The spelling of a computation without its accidents: two programs that say the same have the same expressions.

A call of PyTorch becomes an ``Expression`` whichever way it was written: ``x.pow(2)``, ``x * x`` and ``torch.square(x)`` are
``square(x)``; a slice, a chunk and a split that give the first half of each row are ``half(x, 0)``; a cast to the dtype that a
tensor has is the tensor; a promotion by a mixed product is a cast. Dimensions count from the last, so that one pattern serves
every rank.

Two calls are one value only if their function and every argument are the same, each under its name. What is not understood to
the last argument is opaque: an ``argument``, equal to nothing but itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from torch_jit_ops.inductor.calls import Bound, Function, bind

COMMUTATIVE = ("add", "mul")

_CASTS = ("to", "float", "half", "bfloat16", "double", "type", "type_as")
_SLICES = ("getitem", "chunk", "split", "narrow", "slice", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split")
_SAME = ("contiguous", "alias", "F.dropout")
# Each value of the first is one of the second.
_WIDER = {
    torch.float16: (torch.float32, torch.float64),
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
}
# Their dimensions are those of the result, which has others than the argument.
_MAKES_DIMENSIONS = ("stack",)


class Opaque(Exception):
    """An argument that is not understood."""


@dataclass(frozen=True)
class AnyFloat:
    """In a pattern, where a float argument of the op stands."""

    name: str

    def __str__(self) -> str:
        return self.name


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
    """A call as a graph or a recorder saw it, tensors among the arguments replaced by their expressions.

    Attributes:
        index: which of several results ``result`` is.
    """

    function: Function
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Tensor
    source: Any
    index: int | None = None

    @property
    def name(self) -> str:
        return self.function.name

    def first(self) -> Any:
        """The argument that the call is a method of."""
        given = [self.kwargs[name] for name in ("self", "input", "tensor") if name in self.kwargs]
        return self.args[0] if self.args else given[0] if given else None

    def bound(self) -> Bound | None:
        """The arguments by name; None if the function does not take them."""
        return bind(self.function, self.args, self.kwargs, _is_expression)


def _is_expression(value: Any) -> bool:
    return isinstance(value, Expression)


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
        """The expression of a call that does nothing but make its result."""
        if call.name in _OF_MEMORY:
            return _OF_MEMORY[call.name](self, call)
        bound = call.bound()
        if bound is None or bound.values.get("inplace"):
            return self.argument(call.result, call.source)
        rule = (_RULES if call.index is None else _RULES_OF_SEVERAL).get(bound.name)
        found = rule(self, bound.values, call) if rule is not None else None
        return found if found is not None else self._generic(bound, call)

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
            key = name, made.inputs, _key(made.constants), made.dtype
        except Opaque:
            return self.argument(tensor, source)
        return self._known.setdefault(key, made)

    def cast(self, value: Expression, dtype: torch.dtype, tensor: Tensor, source: Any = None) -> Expression:
        """``value.to(dtype)``. There and back again through a wider dtype is no cast."""
        if value.dtype == dtype:
            return value
        if value.name == "to":
            inner = value.inputs[0]
            if inner is not None and inner.dtype == dtype and value.dtype in _WIDER.get(dtype, ()):
                return inner
        return self.make("to", (value,), (), tensor, source, dtype)

    def _generic(self, bound: Bound, call: Call) -> Expression:
        inputs: list[Expression] = []
        constants: list[Any] = []
        for name, value in bound.values.items():
            constants.append((name, _without_tensors(value, inputs)))
        if not inputs:  # torch.zeros(3) is new memory each time
            return self.argument(call.result, call.source)
        rank = inputs[0].tensor.dim()
        if bound.name not in _MAKES_DIMENSIONS and rank > 0:
            constants = [(name, _from_the_last(value, rank) if name in _DIMENSIONS else value) for name, value in constants]
        if not _is_pointwise(bound.name) and any(_counts(value) for _, value in constants):
            constants.append(("rank", rank))  # what it does to dimension 1 of 2 says nothing of dimension 1 of 3
        if call.index is not None:
            constants.append(("result", call.index))
        return self.make(bound.name, inputs, constants, call.result, call.source)


_DIMENSIONS = ("dim", "dims", "dim0", "dim1", "dim2")


def _from_the_last(value: Any, rank: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_from_the_last(part, rank) for part in value)
    return value - rank if type(value) is int and value >= 0 else value


def _counts(value: Any) -> bool:
    """Whether there is a whole number in it that may count dimensions, from the first one."""
    if isinstance(value, tuple):
        return any(map(_counts, value))
    return type(value) is int and value >= 0


@functools.cache
def _is_pointwise(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None)
    return packet is not None and any(torch.Tag.pointwise in getattr(packet, each).tags for each in packet.overloads())


class _Tensor:
    """In constants, where a tensor stands."""

    def __repr__(self) -> str:
        return "_"


_TENSOR = _Tensor()


def _without_tensors(value: Any, tensors: list[Expression]) -> Any:
    if isinstance(value, Expression):
        tensors.append(value)
        return _TENSOR
    return tuple(_without_tensors(part, tensors) for part in value) if type(value) in (list, tuple, torch.Size) else value


def _key(value: Any) -> Any:
    """Equal for constants that are the same: 1, 1.0 and True are three, and so are 0.0 and -0.0."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_key, value))
    if isinstance(value, float):
        return float, value.hex()
    if isinstance(value, (bool, int, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None), type(...))):
        return type(value), value
    if isinstance(value, (Node, _Tensor, AnyFloat)):
        return value
    raise Opaque(value)


def same_number(one: Any, other: Any) -> bool:
    """Whether two constants do the same to a tensor of floats: 2 is 2.0, but 1 is not True, and 0.0 not -0.0."""
    if isinstance(one, bool) or isinstance(other, bool) or not isinstance(one, (int, float)):
        return type(one) is type(other) and bool(one == other)
    if not isinstance(other, (int, float)) or one != other:
        return False
    return one != 0 or math.copysign(1, one) == math.copysign(1, other)


# --- rules ----------------------------------------------------------------------------------------


def _binary(name: str) -> Any:
    def rule(reader: Reader, values: Mapping[str, Any], call: Call) -> Expression | None:
        if set(values) - {"self", "other", "alpha"} or not same_number(values.get("alpha", 1), 1):
            return None
        dtype = call.result.dtype
        left, right = (
            reader.cast(part, dtype, part.tensor) if isinstance(part, Expression) and part.tensor.dim() > 0 else part
            for part in (values["self"], values["other"])
        )
        if name == "mul" and isinstance(left, Expression) and isinstance(right, Expression):
            return _product(reader, left, right, call)
        inverse = _inverse(right) if name == "div" and isinstance(right, Expression) else None
        if inverse is not None:
            if not isinstance(left, Expression):
                return reader.make(*inverse, (), call.result, call.source) if same_number(left, 1) else None
            return _product(reader, left, reader.make(*inverse, (), right.tensor, None), call)
        tensors = [part for part in (left, right) if isinstance(part, Expression)]
        numbers = [part for part in (left, right) if not isinstance(part, Expression)]
        if name not in COMMUTATIVE and numbers:
            numbers.append("first" if isinstance(right, Expression) else "second")
        return reader.make(name, tensors, numbers, call.result, call.source)

    return rule


def _product(reader: Reader, left: Expression, right: Expression, call: Call) -> Expression:
    """``x * x`` is a square, ``x * sigmoid(x)`` is silu, and so it is with a third factor, whichever two come first."""
    if left is right:
        return reader.make("square", (left,), (), call.result, call.source)
    for one, other in ((left, right), (right, left)):
        if _is_sigmoid_of(other, one):
            return reader.make("silu", (one,), (), call.result, call.source)
        factors = other.inputs if other.name == "mul" and len(other.inputs) == 2 else ()
        for factor, third in zip(factors, factors[::-1], strict=True):
            gate = one if _is_sigmoid_of(factor, one) else factor if _is_sigmoid_of(one, factor) else None
            if gate is not None:
                silu = reader.make("silu", (gate,), (), gate.tensor, None)
                return reader.make("mul", (silu, third), (), call.result, call.source)
    return reader.make("mul", (left, right), (), call.result, call.source)


def _is_sigmoid_of(value: Expression | None, gate: Expression | None) -> bool:
    return value is not None and value.name == "sigmoid" and value.inputs[0] is gate


def _inverse(value: Expression) -> tuple[str, tuple[Expression | None, ...]] | None:
    """What one over ``value`` is a function of: ``1 / sqrt(x)`` is rsqrt, ``1 / (1 + exp(-x))`` is sigmoid."""
    if value.name == "sqrt":
        return "rsqrt", value.inputs
    if value.name == "add" and len(value.inputs) == 1 and same_number(value.constants[0], 1):
        exponential = value.inputs[0]
        if exponential is not None and exponential.name == "exp":
            exponent = exponential.inputs[0]
            if exponent is not None and exponent.name == "neg":
                return "sigmoid", exponent.inputs
    return None


def _unary(name: str) -> Any:
    """A function of one tensor and of nothing else."""

    def rule(reader: Reader, values: Mapping[str, Any], call: Call) -> Expression | None:
        return reader.make(name, (values["self"],), (), call.result, call.source) if len(values) == 1 else None

    return rule


def _power(reader: Reader, values: Mapping[str, Any], call: Call) -> Expression | None:
    base, exponent = values["self"], values["exponent"]
    if not isinstance(base, Expression) or isinstance(exponent, bool) or not isinstance(exponent, (int, float)):
        return None
    name = {2: "square", 0.5: "sqrt", -0.5: "rsqrt"}.get(exponent)
    if name is None:
        return reader.make("pow", (base,), (exponent,), call.result, call.source)
    return reader.make(name, (base,), (), call.result, call.source)


def _reciprocal(reader: Reader, values: Mapping[str, Any], call: Call) -> Expression | None:
    inverse = _inverse(values["self"])
    return reader.make(*inverse, (), call.result, call.source) if inverse is not None else None


def _mean(reader: Reader, values: Mapping[str, Any], call: Call) -> Expression | None:
    value, dims = values["self"], values.get("dim")
    if not isinstance(dims, tuple) or values["dtype"] not in (None, value.dtype) or not all(type(dim) is int for dim in dims):
        return None
    last = tuple(sorted(_from_the_last(dims, value.tensor.dim())))
    return reader.make("mean", (value,), (last, bool(values["keepdim"])), call.result, call.source)


def _variance(reader: Reader, values: Mapping[str, Any], call: Call) -> Expression | None:
    """The mean of the squares of what is left without the mean, if nothing is corrected."""
    value, dims, corrected = values["self"], values.get("dim"), values.get("correction", values.get("unbiased", True))
    if corrected is None or isinstance(corrected, Expression) or corrected != 0 or not isinstance(dims, tuple):
        return None
    if values["keepdim"] is not True or call.result.dtype != value.dtype or not all(type(dim) is int for dim in dims):
        return None
    constants = (tuple(sorted(_from_the_last(dims, value.tensor.dim()))), True)
    mean = reader.make("mean", (value,), constants, call.result, None)
    square = reader.make("square", (reader.make("sub", (value, mean), (), value.tensor, None),), (), value.tensor, None)
    return reader.make("mean", (square,), constants, call.result, call.source)


def _variance_and_mean(reader: Reader, values: Mapping[str, Any], call: Call) -> Expression | None:
    if call.index == 0:
        return _variance(reader, values, call)
    return _mean(reader, {"dtype": None, **values}, call) if values.get("keepdim") is True else None


def _gelu(reader: Reader, values: Mapping[str, Any], call: Call) -> Expression | None:
    return reader.make("gelu", (values["self"],), (values["approximate"],), call.result, call.source)


def _rms_norm(reader: Reader, values: Mapping[str, Any], call: Call) -> Expression | None:
    value, eps = values["input"], values["eps"]
    if not isinstance(values["normalized_shape"], tuple) or value.dtype not in (*_WIDER, torch.float64):
        return None
    if eps is None:  # that of the type in which PyTorch computes
        eps = torch.finfo(torch.promote_types(value.dtype, torch.float32)).eps
    constants = (len(values["normalized_shape"]), eps)
    return reader.make("rms_norm", (value, values["weight"]), constants, call.result, call.source)


def _layer_norm(reader: Reader, values: Mapping[str, Any], call: Call) -> Expression | None:
    if not isinstance(values["normalized_shape"], tuple):
        return None
    inputs = (values["input"], values["weight"], values["bias"])
    constants = (len(values["normalized_shape"]), values["eps"])
    return reader.make("layer_norm", inputs, constants, call.result, call.source)


def _unsqueeze(reader: Reader, values: Mapping[str, Any], call: Call) -> Expression | None:
    dim = values["dim"]
    if type(dim) is not int:
        return None
    place = dim - call.result.dim() if dim >= 0 else dim
    return reader.make("unsqueeze", (values["self"],), (place,), call.result, call.source)


_RULES = {
    **{name: _binary(name) for name in ("add", "mul", "sub", "div")},
    **{name: _unary(name) for name in ("square", "sqrt", "rsqrt", "sigmoid", "tanh", "silu", "relu")},
    "pow": _power,
    "reciprocal": _reciprocal,
    "mean": _mean,
    "var": _variance,
    "gelu": _gelu,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "unsqueeze": _unsqueeze,
}


# Of functions that have several results: the rule is told by ``call.index`` which one.
_RULES_OF_SEVERAL = {"var_mean": _variance_and_mean}


# --- rules that look at the result alone, whatever the arguments ------------------------------------


def _cast(reader: Reader, call: Call) -> Expression:
    value = call.first()
    plain = isinstance(value, Expression) and value.tensor.shape == call.result.shape
    if not plain or value.tensor.device != call.result.device or value.tensor.layout != call.result.layout:
        return reader.argument(call.result, call.source)
    return reader.cast(value, call.result.dtype, call.result, call.source)


def _same(reader: Reader, call: Call) -> Expression:
    """A call that gives back its first argument: the same values in the same places of the same memory."""
    value = call.first()
    same = isinstance(value, Expression) and value.tensor.dim() == call.result.dim() and is_view(value.tensor, call.result)
    same = same and _all(
        mine == theirs
        for mine, theirs in zip(
            (*value.tensor.shape, *value.tensor.stride(), value.tensor.storage_offset()),
            (*call.result.shape, *call.result.stride(), call.result.storage_offset()),
            strict=True,
        )
    )
    return value if same else reader.argument(call.result, call.source)


def _slice(reader: Reader, call: Call) -> Expression:
    """A part of the columns, by where it lies in memory; any other slice is not looked into."""
    whole = call.first()
    part = call.result
    if isinstance(whole, Expression) and 0 < whole.tensor.dim() == part.dim() and is_view(whole.tensor, part):
        columns = _columns(whole.tensor, part)
        if columns is not None:
            name, constants = columns
            return whole if name == "all" else reader.make(name, (whole,), constants, part, call.source)
    return reader.argument(part, call.source)


def _columns(whole: Tensor, part: Tensor) -> tuple[str, tuple[int, ...]] | None:
    """Which columns of ``whole`` the view ``part`` has, all rows of it: ``half`` or ``every_second`` with the index of the
    first one, ``start`` or ``rest`` with their number, ``all``; None for others."""
    width, total, step = part.shape[-1], whole.shape[-1], whole.stride(-1)
    same = [mine == theirs for mine, theirs in zip(whole.shape[:-1], part.shape[:-1], strict=True)]
    if not _all([*same, *(mine == theirs for mine, theirs in zip(whole.stride()[:-1], part.stride()[:-1], strict=True))]):
        return None
    offset = part.storage_offset() - whole.storage_offset()
    is_half = _all([total == 2 * width, width > 0])
    if not statically_known_true(part.stride(-1) == step):
        if is_half and statically_known_true(part.stride(-1) == 2 * step):
            return next((("every_second", (i,)) for i in (0, 1) if statically_known_true(offset == i * step)), None)
        return None
    if _all([width == total, offset == 0]):
        return "all", ()
    for index in (0, 1) if is_half else ():
        if statically_known_true(offset == index * width * step):
            return "half", (index,)
    if _all([offset == 0, width > 0]):
        return "start", (width,)
    return ("rest", (width,)) if statically_known_true(offset == (total - width) * step) else None


def is_view(whole: Tensor, part: Tensor) -> bool:
    """Whether two tensors of one dtype lie in the same memory."""
    if whole.dtype != part.dtype or whole.layout is not torch.strided or part.layout is not torch.strided:
        return False
    return bool(whole.untyped_storage()._cdata == part.untyped_storage()._cdata)


def _all(facts: Any) -> bool:
    return all(statically_known_true(fact) for fact in facts)


# Functions whose value is that of their first argument, or a part of it.
OF_THE_FIRST = (*_CASTS, *_SLICES, *_SAME)
_OF_MEMORY = {
    **dict.fromkeys(_CASTS, _cast),
    **dict.fromkeys(_SLICES, _slice),
    **dict.fromkeys(_SAME, _same),
}
