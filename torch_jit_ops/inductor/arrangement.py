"""In which order of dimensions an op takes what it finds, so that its results lie in memory as the model's do.

Heads of queries and keys are often transposed before their norm, or before they turn. What treats each row by itself takes rows
in any order; where several rows share an argument, as the heads of a token share its cosines, another option of the op may
mean that order:

    q * cos.unsqueeze(1) + ...      q is [batch, tokens, heads, head_dim] in memory, and [batch, heads, tokens, head_dim] here
    op(q.transpose(1, 2), ..., unsqueeze_dim=2).transpose(1, 2)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from torch_jit_ops.declaring import layout
from torch_jit_ops.inductor.effects import without_guards
from torch_jit_ops.inductor.expression import AnyFloat, Expression
from torch_jit_ops.inductor.graph_reader import tensor_of
from torch_jit_ops.inductor.match import Match
from torch_jit_ops.inductor.pattern import Pattern, siblings_of
from torch_jit_ops.op import Op

_MOST_DIMS = 5  # of which all orders are tried


@dataclass(frozen=True)
class Arrangement:
    """How an op is called.

    Attributes:
        pattern: whose constants it is given.
        order: of the dimensions of its results, and of those arguments that have as many; None for their own.
    """

    pattern: Pattern
    order: tuple[int, ...] | None

    def is_turned(self, tensor: Tensor) -> bool:
        return self.order is not None and tensor.dim() == len(self.order)

    def turned(self, tensor: Tensor) -> Tensor:
        """As the op takes it."""
        return tensor.permute(self.order) if self.order is not None and self.is_turned(tensor) else tensor

    def arguments_of(self, found: Match) -> list[Any]:
        """What the op is given: nodes that are still as they were found, and constants."""
        return [
            value if isinstance(part, (Expression, AnyFloat)) else part
            for part, value in zip(self.pattern.arguments, found.arguments, strict=True)
        ]

    def results_of(self, found: Match) -> Sequence[Tensor]:
        """What the op makes of tensors without memory.

        Raises:
            RuntimeError, ValueError: it refuses them.
        """
        tensors = iter(found.tensors())
        pairs = zip(found.pattern.op.signature.arguments, self.arguments_of(found), strict=True)
        given = {
            argument.name: self.turned(next(tensors)[1]) if isinstance(value, Node) else value for argument, value in pairs
        }
        with without_guards(tensor_of(found.root).fake_mode), torch.no_grad():
            made = found.pattern.op.default(**given)
        return made if isinstance(made, (tuple, list)) else (made,)

    @property
    def back(self) -> tuple[int, ...]:
        """The order that undoes it."""
        return tuple(self.order.index(dim) for dim in range(len(self.order))) if self.order is not None else ()


def arrangement_of(found: Match) -> Arrangement | None:
    """The first one in which the op reads its arguments and makes results that lie as the model's; None if there is none."""
    return next((each for each in _arrangements(found) if _serves(found, each)), None)


def _arrangements(found: Match) -> Iterator[Arrangement]:
    yield Arrangement(found.pattern, None)
    rank = tensor_of(found.root).dim()
    if not found.pattern.is_by_rows or rank > _MOST_DIMS:
        return
    orders = [(*leading, rank - 1) for leading in itertools.permutations(range(rank - 1))]
    for pattern in (found.pattern, *siblings_of(found.pattern)):
        yield from (Arrangement(pattern, order) for order in orders if _is_the_same(found, pattern, order))


def _is_the_same(found: Match, other: Pattern, order: tuple[int, ...]) -> bool:
    """Whether ``other`` of what is turned to ``order`` is what was found: each argument meets the dimensions that it met."""
    for (mine, tensor), theirs in zip(found.tensors(), _tensors(other), strict=True):
        if tensor.dim() == len(order):
            continue
        met, meets = found.pattern.dims_of(mine), other.dims_of(theirs)
        if met is None or meets is None or len(met) != tensor.dim():
            return False
        if [order[dim] for dim in meets] != [dim + len(order) for dim in met]:
            return False
    return True


def _tensors(pattern: Pattern) -> list[Expression]:
    return [argument for argument in pattern.arguments if isinstance(argument, Expression)]


def _serves(found: Match, arrangement: Arrangement) -> bool:
    given = layouts(found.pattern.op)
    return all(
        layout.lies_so(arrangement.turned(tensor), given.get(part.source, layout.ROWS)) for part, tensor in found.tensors()
    ) and all(_is_dense(arrangement.turned(tensor_of(node))) for node in found.outputs)


def layouts(op: Op) -> dict[str, layout.Layout]:
    """How the op wants its tensors to lie, as far as it says so."""
    return {pattern.name: pattern.layout for pattern in op.declaration.tensors}


def is_rows(tensor: Tensor) -> bool:
    """Whether the last dimension is dense and the leading ones walk in equal steps, as kernels want it."""
    return layout.lies_so(tensor, layout.ROWS)


def _is_dense(tensor: Tensor) -> bool:
    """Whether it lies in memory as the op's result does: what is behind it may look at its strides."""
    if tensor.dim() < 2 or not is_rows(tensor):
        return is_rows(tensor)
    row = next(
        (step for size, step in zip(tensor.shape[-2::-1], tensor.stride()[-2::-1], strict=True) if not _is_one(size)), None
    )
    return row is None or statically_known_true(row == tensor.shape[-1])


def _is_one(size: int | torch.SymInt) -> bool:
    return statically_known_true(size == 1)
