"""How a tensor must lie in memory: what TensorMatcher checks in C++ (include/jitk/tensor.h, rows.h), told of any tensor.

Strides may be symbols of a traced graph. What they leave open becomes a guard of the graph, or a check when it runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Condition = bool | torch.SymBool


@dataclass(frozen=True)
class Layout:
    """Contiguous, unless it is one of these.

    Attributes:
        rows: the last dimension is dense, and the leading ones walk over it in equal steps.
        strides: of the last dimensions, None for any; there may be others before them.
    """

    rows: bool = False
    strides: tuple[int | None, ...] | None = None

    def __str__(self) -> str:
        if self.strides is not None:
            return f"strides [{', '.join('*' if stride is None else str(stride) for stride in self.strides)}]"
        return "row stride free" if self.rows else "contiguous"


CONTIGUOUS = Layout()
ROWS = Layout(rows=True)


def lies_so(tensor: Tensor, layout: Layout) -> bool:
    """Whether it is known, without a guard, that the tensor lies so."""
    if tensor.layout is not torch.strided:
        return False
    return all(_known(condition) for _, condition in _conditions(tensor, layout, _known))


def unmet(tensor: Tensor, layout: Layout) -> Iterator[tuple[int, Condition]]:
    """What is not known to hold and must, for the tensor to lie so, each with its dimension. A size of 1 has no stride, nor has
    a tensor without elements, nor one that is not strided, which reaches no kernel."""
    if tensor.layout is not torch.strided or lies_so(tensor, layout):
        return
    for dim, condition in _conditions(tensor, layout, _guarded):
        if not _known(condition):
            yield dim, any_of(condition, *(size == 0 for size in tensor.shape))


def _conditions(tensor: Tensor, layout: Layout, decide: Any) -> Iterator[tuple[int, Condition]]:
    sizes, strides, last = tensor.shape, tensor.stride(), tensor.dim() - 1
    if layout.strides is not None:
        first = tensor.dim() - len(layout.strides)
        for dim, stride in enumerate(layout.strides, start=first):
            if stride is not None and not decide(sizes[dim] == 1):
                yield dim, strides[dim] == stride
        return
    expected: Any = 1
    for dim in range(last, -1, -1):
        if not decide(sizes[dim] == 1):
            if expected is not None:
                yield dim, strides[dim] == expected
            expected = strides[dim] * sizes[dim]
        if layout.rows and dim == last:
            expected = None  # the next dimension sets the step


def _known(condition: Condition) -> bool:
    if isinstance(condition, torch.SymBool):
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(condition)
    return bool(condition)


def _guarded(condition: Condition) -> bool:
    """The same, with a guard where one tells; a size that is known only when the graph runs counts as one of many."""
    if isinstance(condition, torch.SymBool):
        from torch.fx.experimental.symbolic_shapes import guard_or_false

        return guard_or_false(condition)
    return bool(condition)


def any_of(*conditions: Condition) -> Condition:
    """Whether one of them is true; of symbols that is a symbol as well, and nothing is guarded on."""
    found: torch.SymBool | None = None
    for condition in conditions:
        if condition is True:
            return True
        if condition is not False:
            found = condition if found is None else found | condition
    return False if found is None else found
