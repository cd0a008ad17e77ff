"""The spellings of an op as patterns: its reference, and the functions that ``patterns=`` names beside it.

A spelling is called on tensors without memory while its calls are recorded, once for each combination of dtypes among the op's
samples. An argument that is a tensor, or a float, stands for any; others have the value of the sample.
"""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torch_jit_ops.declaring.samples import SampleMaker
from torch_jit_ops.inductor.calls import Function, function_of
from torch_jit_ops.inductor.effects import Effect, watch
from torch_jit_ops.inductor.expression import AnyFloat, Call, Expression, Reader
from torch_jit_ops.op import Op

# Functions of a row, or of an element.
_BY_ROWS = {"add", "mul", "sub", "div", "to", "silu", "gelu", "sigmoid", "tanh", "pow", "square", "sqrt", "rsqrt", "half"}
_OVER_LAST = {"mean": ((-1,), True), "rms_norm": (1,), "layer_norm": (1,)}


class Unreadable(Exception):
    """A spelling that cannot be made a pattern, and why."""


@dataclass(frozen=True)
class Pattern:
    """One spelling of an op for one combination of dtypes.

    Attributes:
        arguments: for each of the op's arguments its Expression, its AnyFloat, or the value that it must have.
        outputs: what the op makes: its results, or the new values of the arguments that it writes.
        root: the output that all others are a part of.
    """

    op: Op
    arguments: tuple[Any, ...]
    outputs: tuple[Expression, ...]
    root: Expression

    @functools.cached_property
    def size(self) -> int:
        """The number of its parts, arguments included."""
        return len(self.root.parts())

    @property
    def is_by_rows(self) -> bool:
        """Whether it makes each row of its one result from the same row of its arguments, and from weights."""
        functions = [part for part in self.root.parts() if part.name != "argument"]
        over_last = {part: _OVER_LAST.get(part.name) for part in functions if part.name not in _BY_ROWS}
        return len(self.outputs) == 1 and all(
            expected is not None and part.constants[: len(expected)] == expected for part, expected in over_last.items()
        )

    def __str__(self) -> str:
        arguments = ", ".join(str(argument) for argument in self.arguments)
        return f"{self.op.qualified_name}({arguments}) = {', '.join(str(output) for output in self.outputs)}"


@functools.cache  # a quarter of a second for the built-in ops
def patterns_of(op: Op) -> tuple[Pattern, ...]:
    """The patterns of ``op``, each once, those with the most functions first.

    Raises:
        ValueError: the op has no samples, or none of its spellings can be read; says why.
    """
    found: dict[str, Pattern] = {}
    reasons: list[str] = []
    for sample in _distinct_samples(op):
        plain = _attempt(op, op.reference, sample, reasons)
        for spelling in (op.reference, *(op.declaration.patterns or ())):
            pattern = plain if spelling is op.reference else _attempt(op, spelling, sample, reasons)
            if pattern is None or (plain is not None and _facts(pattern) != _facts(plain)):
                continue  # such as a spelling that promotes to the dtype of a wider weight
            found.setdefault(str(pattern), pattern)
    if not found:
        why = reasons[0] if reasons else "it has no samples with rows, which say what its arguments look like"
        raise ValueError(f"{op.qualified_name} cannot be found in a model: {why}")
    return tuple(sorted(found.values(), key=lambda pattern: -pattern.size))


def _facts(pattern: Pattern) -> list[Any]:
    return [(output.dtype, tuple(output.tensor.shape)) for output in pattern.outputs]


def _attempt(op: Op, spelling: Callable[..., Any], sample: list[Any], reasons: list[str]) -> Pattern | None:
    try:
        return _trace(op, spelling, sample)
    except Unreadable as reason:
        reasons.append(f"{spelling.__name__} {reason}")
        return None


class _Shapes(SampleMaker):
    """Makes tensors without memory: a pattern is made of what is done to them, not of their values."""

    def randn(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    def values(self, *values: float, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(len(values), dtype=dtype or self.dtype, device="meta")


def _distinct_samples(op: Op) -> Iterator[list[Any]]:
    """The arguments of a sample for each combination of dtypes, with rows that a size tells from other dimensions."""
    seen = set()
    for dtypes in op.declaration.dtypes.combinations():
        for sample in op.declaration.samples(_Shapes("meta", dtypes)) if op.declaration.samples else ():
            arguments = op.declaration.arguments(*sample.args, **sample.kwargs)
            tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
            key = tuple((value.dtype, value.dim()) if isinstance(value, Tensor) else type(value) for value in arguments)
            if not tensors or tensors[0].dim() < 2 or min(tensors[0].shape) < 2 or key in seen:
                continue
            seen.add(key)
            yield arguments


def _trace(op: Op, spelling: Callable[..., Any], sample: list[Any]) -> Pattern:
    recorder = _Recorder()
    names = list(inspect.signature(op.reference).parameters)
    values: list[Any] = []
    arguments: list[Any] = []
    for index, (name, value) in enumerate(zip(names, sample, strict=True)):
        if isinstance(value, Tensor):
            value = value.clone()
            arguments.append(recorder.argument(value, name))
        elif isinstance(value, float):
            value = 0.0123456789 + index  # a number that no spelling holds
            recorder.floats[value] = AnyFloat(name)
            arguments.append(recorder.floats[value])
        else:
            arguments.append(value)
        values.append(value)
    positional = [value for name, value in zip(names, values, strict=True) if not _is_keyword(op, name)]
    keywords = {name: value for name, value in zip(names, values, strict=True) if _is_keyword(op, name)}
    try:
        with torch.inference_mode(False), recorder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a dtype that is slow: nothing is computed
            results = spelling(*positional, **keywords)
    except Unreadable:
        raise
    except Exception as error:  # a spelling is a user's function: whatever it cannot do without values is the reason
        raise Unreadable(f"does not run on tensors without values: {error}") from error
    written = [value for value, argument in zip(values, op.signature.arguments, strict=True) if argument.written]
    if op.signature.results:
        made = list(results) if isinstance(results, (tuple, list)) else [results]
    else:
        made = list(results) if isinstance(results, (tuple, list)) else written
    outputs = tuple(recorder.expression(tensor) for tensor in made)
    if any(output.name == "argument" for output in outputs):
        raise Unreadable("gives an argument back, or computes in a way that patterns cannot say")
    roots = [output for output in outputs if all(_contains(output, other) for other in outputs)]
    if not roots:
        raise Unreadable("makes several results of which none is computed from the others")
    missing: list[Expression | AnyFloat] = []
    missing += [argument for argument in arguments if isinstance(argument, Expression) and not _contains(roots[0], argument)]
    missing += [argument for argument in arguments if isinstance(argument, AnyFloat) and not _holds(roots[0], argument)]
    if missing:
        raise Unreadable(f"does not use {missing[0].source if isinstance(missing[0], Expression) else missing[0].name}")
    return Pattern(op, tuple(arguments), outputs, roots[0])


def _is_keyword(op: Op, name: str) -> bool:
    return op.signature.arguments[op.signature.index(name)].keyword_only


def _contains(whole: Expression, part: Expression) -> bool:
    return part in whole.parts()


def _holds(whole: Expression, number: AnyFloat) -> bool:
    return any(_is_among(number, part.constants) for part in whole.parts())


def _is_among(number: AnyFloat, constants: tuple[Any, ...]) -> bool:
    return any(_is_among(number, part) if isinstance(part, tuple) else part == number for part in constants)


class _Recorder(TorchFunctionMode):
    """Makes the expressions of what is called under it. A call that writes a tensor gives the tensor a new expression."""

    def __init__(self) -> None:
        super().__init__()
        self.floats: dict[float, AnyFloat] = {}
        self._reader = Reader()
        self._expressions: dict[int, tuple[Expression, Tensor]] = {}  # by id; the tensor stays, and so its id is its own

    def argument(self, tensor: Tensor, name: str) -> Expression:
        expression = self._reader.argument(tensor, name)
        self._expressions[id(tensor)] = expression, tensor
        return expression

    def expression(self, tensor: Any) -> Expression:
        if id(tensor) not in self._expressions:
            raise Unreadable(f"makes {type(tensor).__name__} of nothing")
        return self._expressions[id(tensor)][0]

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        function = function_of(func)
        result, effect = watch(func, args, kwargs)
        if effect is Effect.DRAWS:
            raise Unreadable("draws random numbers")
        if result is None and effect is Effect.WRITES:
            result = func(*args, **kwargs)
            self._write(function, args, kwargs)
            return result
        several = isinstance(result, (tuple, list))
        for index, part in enumerate(result if several else [result]):
            if isinstance(part, Tensor) and id(part) not in self._expressions:
                call = self._call(function, args, kwargs, part, index if several else None)
                read = self._reader.read(call) if call is not None else self._reader.argument(part, None)
                self._expressions[id(part)] = read, part
        return result

    def _call(
        self, function: Function | None, args: Sequence[Any], kwargs: dict[str, Any], result: Tensor, index: int | None = None
    ) -> Call | None:
        if function is None:
            return None
        known = {key: self._known(value) for key, value in kwargs.items()}
        return Call(function, tuple(self._known(value) for value in args), known, result, None, index)

    def _known(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.expression(value)
        if isinstance(value, float):
            return self.floats.get(value, value)
        return type(value)(map(self._known, value)) if type(value) in (list, tuple) else value

    def _write(self, function: Function | None, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        name = function.name if function is not None else ""
        if not args or "out" in kwargs or not _IN_PLACE.fullmatch(name):
            raise Unreadable("writes a part of a tensor")
        target = args[0]
        if any(tensor is not target and _share(tensor, target) for _, tensor in self._expressions.values()):
            raise Unreadable("writes a part of a tensor")
        if name == "copy_":
            value = self._known(args[1])
            if not isinstance(value, Expression) or value.tensor.shape != target.shape:
                raise Unreadable("copies what is spread over the tensor")
            made = self._reader.cast(value, target.dtype, target)
        else:
            call = self._call(function_of(name.removesuffix("_")), args, kwargs, target)
            made = self._reader.read(call) if call is not None else self._reader.argument(target, None)
        self._expressions[id(target)] = made, target


_IN_PLACE = re.compile(r"[a-z]\w*_")


def _share(one: Tensor, other: Tensor) -> bool:
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)
