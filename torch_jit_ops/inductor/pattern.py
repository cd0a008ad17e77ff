"""The spellings of an op as patterns: its reference, and the functions that ``patterns=`` names beside it.

A spelling is called on tensors without memory while its calls are recorded, once for each combination of dtypes among the op's
samples. An argument that is a tensor, or a float, stands for any; others have the value of the sample.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_jit_ops.declaring.samples import SampleMaker
from torch_jit_ops.inductor.expression import AnyFloat, Expression
from torch_jit_ops.inductor.recorder import Recorder, Unreadable
from torch_jit_ops.op import Op

# Functions of a row, or of an element.
_BY_ROWS = {"add", "mul", "sub", "div", "to", "neg", "silu", "gelu", "sigmoid", "tanh", "pow", "square", "sqrt", "rsqrt"}
_BY_ROWS |= {"half", "start", "rest", "every_second", "unsqueeze"}
_OVER_LAST = {"mean": ((-1,), True), "rms_norm": (1,), "layer_norm": (1,)}
_ALONG_LAST = {"cat": ("dim", -1), "stack": ("dim", -1), "flatten": ("start_dim", -2)}


@dataclass(frozen=True)
class Pattern:
    """One spelling of an op for one combination of dtypes.

    Attributes:
        arguments: for each of the op's arguments its Expression, its AnyFloat, or the value that it must have.
        outputs: what the op makes: its results, or the new values of the arguments that it writes.
        roots: the outputs that no other is computed from.
        spelling: the function that was recorded.
    """

    op: Op
    arguments: tuple[Any, ...]
    outputs: tuple[Expression, ...]
    roots: tuple[Expression, ...]
    spelling: Callable[..., Any]

    @functools.cached_property
    def parts(self) -> frozenset[Expression]:
        """All that is computed, arguments included."""
        return frozenset().union(*(root.parts() for root in self.roots))

    @property
    def size(self) -> int:
        """The number of its parts."""
        return len(self.parts)

    @functools.cached_property
    def is_by_rows(self) -> bool:
        """Whether it makes each row of its results from the same row of its arguments, from weights, and from what several rows
        share, and writes nothing."""
        return all(map(self._is_of_rows, self.parts)) and not any(argument.written for argument in self.op.signature.arguments)

    def _is_of_rows(self, part: Expression) -> bool:
        if part.name in ("argument", *_BY_ROWS):
            return part.name != "unsqueeze" or (part.constants[0] < -1 and _is_of_argument(part))
        if part.name in _ALONG_LAST:
            pairs = {"stack": "flatten"}.get(part.name)
            read = [user for user in self.parts if part in user.inputs]
            made = part.name != "flatten" or all(each is not None and each.name == "stack" for each in part.inputs)
            return _ALONG_LAST[part.name] in part.constants and made and (pairs is None or {u.name for u in read} == {pairs})
        over = _OVER_LAST.get(part.name)
        return over is not None and part.constants[: len(over)] == over

    @property
    def constants(self) -> tuple[Any, ...]:
        """The arguments that have one value."""
        return tuple(value for value in self.arguments if not isinstance(value, (Expression, AnyFloat)))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of the sample."""
        return tuple(value.tensor for value in self.arguments if isinstance(value, Expression))

    @functools.cached_property
    def form(self) -> str:
        """What it does to rows, wherever the arguments that several rows share stand among their dimensions."""
        return " ".join(_form(output) for output in self.outputs)

    def dims_of(self, argument: Expression) -> tuple[int, ...] | None:
        """The dimensions of the results, from the last, along which an argument's own lie; None if in several ways."""
        found = set()
        readers = [argument]
        while readers:
            value = readers.pop()
            for user in self.parts:
                if value not in user.inputs:
                    continue
                if user.name == "to":
                    readers.append(user)
                    continue
                dims = list(range(-value.tensor.dim() - (user.name == "unsqueeze"), 0))
                if user.name == "unsqueeze":
                    dims.remove(user.constants[0])
                found.add(tuple(dims))
        return found.pop() if len(found) == 1 else None

    def __str__(self) -> str:
        arguments = ", ".join(str(argument) for argument in self.arguments)
        return f"{self.op.qualified_name}({arguments}) = {', '.join(str(output) for output in self.outputs)}"


def _is_of_argument(part: Expression | None) -> bool:
    while part is not None and part.name in ("to", "unsqueeze"):
        part = part.inputs[0]
    return part is not None and part.name == "argument"


def _form(part: Expression | None) -> str:
    if part is None or part.name == "argument":
        return str(part)
    if part.name == "unsqueeze":
        return _form(part.inputs[0])
    constants = () if part.name in ("start", "rest") else part.constants
    return f"{part.name}({', '.join([*map(_form, part.inputs), *map(str, constants)])}):{part.dtype}"


@functools.cache  # less than a second for the built-in ops
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


@functools.cache
def siblings_of(pattern: Pattern) -> tuple[Pattern, ...]:
    """The same spelling with other constants, if these do the same to rows."""
    found: dict[str, Pattern] = {}
    tried: set[tuple[Any, ...]] = {(pattern.constants, ())}
    for other in patterns_of(pattern.op):
        key = other.constants, () if other.constants == pattern.constants else _widths(other.tensors)
        if key in tried:
            continue
        tried.add(key)
        sample = [
            torch.empty(theirs.tensor.shape, dtype=mine.dtype, device="meta")
            if isinstance(theirs, Expression) and isinstance(mine, Expression)
            else 1.0
            if isinstance(theirs, AnyFloat)
            else theirs
            for mine, theirs in zip(pattern.arguments, other.arguments, strict=True)
        ]
        made = _attempt(pattern.op, pattern.spelling, sample, [])
        if made is not None and made.form == pattern.form:
            found.setdefault(str(made), made)
    return tuple(found.values())


@functools.cache
def at_widths(pattern: Pattern, widths: tuple[int, ...]) -> Pattern | None:
    """The same spelling of tensors with other last dimensions; None if it does not run on them."""
    wide = iter(widths)
    sample = [
        torch.empty((*value.tensor.shape[:-1], next(wide)), dtype=value.dtype, device="meta")
        if isinstance(value, Expression)
        else 1.0
        if isinstance(value, AnyFloat)
        else value
        for value in pattern.arguments
    ]
    return _attempt(pattern.op, pattern.spelling, sample, [])


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
            # A head that turns as a whole is another case than one that does in part.
            key = (*map(_kind, arguments), _widths(tensors))
            if not tensors or tensors[0].dim() < 2 or key in seen or _is_too_small(op, tensors):
                continue
            seen.add(key)
            yield arguments


def _widths(tensors: Iterable[Tensor]) -> tuple[tuple[int, bool], ...]:
    """Which tensors are as wide as which, and whether one is half as wide as another."""
    widths = [tensor.shape[-1] for tensor in tensors if tensor.dim() > 0]
    return tuple((widths.index(width), 2 * width in widths) for width in widths)


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.dim()
    return float if isinstance(value, float) else str(value)


def _is_too_small(op: Op, tensors: list[Tensor]) -> bool:
    """Whether there is too little of a sample to say what belongs together: where the op says that itself, it may have rows of
    one token."""
    if declares_shapes(op):
        return any(tensor.numel() == 0 or tensor.shape[-1] < 2 for tensor in tensors)
    return min(tensors[0].shape) < 2


def declares_shapes(op: Op) -> bool:
    """Whether the op says of each of its tensors how many dimensions there are and which are equal, so that nothing has to be
    guessed from samples."""
    fixed = {pattern.name for pattern in op.declaration.tensors if pattern.leading is None}
    tensors = [argument.name for argument in op.signature.arguments if argument.kind == "T"]
    return op.declaration.is_functional and fixed.issuperset(tensors)


def _trace(op: Op, spelling: Callable[..., Any], sample: list[Any]) -> Pattern:
    recorder = Recorder()
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
    roots = tuple(
        output for output in dict.fromkeys(outputs) if not any(_contains(o, output) for o in outputs if o is not output)
    )
    parts = set().union(*(root.parts() for root in roots))
    missing: list[Expression | AnyFloat] = []
    missing += [argument for argument in arguments if isinstance(argument, Expression) and argument not in parts]
    missing += [argument for argument in arguments if isinstance(argument, AnyFloat) and not _is_held(argument, parts)]
    if missing:
        raise Unreadable(f"does not use {missing[0].source if isinstance(missing[0], Expression) else missing[0].name}")
    return Pattern(op, tuple(arguments), outputs, roots, spelling)


def _is_keyword(op: Op, name: str) -> bool:
    return op.signature.arguments[op.signature.index(name)].keyword_only


def _contains(whole: Expression, part: Expression) -> bool:
    return part in whole.parts()


def _is_held(number: AnyFloat, parts: set[Expression]) -> bool:
    return any(_is_among(number, part.constants) for part in parts)


def _is_among(number: AnyFloat, constants: tuple[Any, ...]) -> bool:
    return any(_is_among(number, part) if isinstance(part, tuple) else part == number for part in constants)
