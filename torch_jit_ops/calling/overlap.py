"""Whether tensors share memory, told exactly: csrc/runtime/overlap.h for calls that run no kernel.

A call then behaves the same with a kernel and without one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from torch_jit_ops.declaring.signature import Argument, Signature

_PATIENCE = 10_000


def refuse(who: str, signature: Signature, values: Mapping[str, object]) -> None:
    """Refuse a call that writes one place of memory through two elements or two arguments.

    Args:
        who: the op, for the error.
        signature: of the overload.
        values: the call's arguments by name.

    Raises:
        RuntimeError: the elements of a written argument overlap, or it shares memory with another argument and does not take
            the place of one that is ``reusable``.
    """
    given = [part for argument in signature.arguments for part in _tensors(argument, values.get(argument.name))]
    for i, (out, out_name, written) in enumerate(given):
        if not out.written:
            continue
        refuse_itself(who, out_name, written)
        for j, (argument, name, other) in enumerate(given):
            if j == i or (j < i and argument.written) or not _shares_memory(written, other):
                continue
            if argument.reusable and _takes_the_place(written, other):
                continue
            behind = written.data_ptr() - other.data_ptr()
            place = "where" if behind == 0 else f"{abs(behind)} bytes {'before' if behind < 0 else 'behind'}"
            raise RuntimeError(
                f"{who}: argument '{out_name}' is written, but shares memory with argument '{name}'\n"
                f"  {_described(out_name, written)} begins {place}\n"
                f"  {_described(name, other)}{' does' if behind == 0 else ''}\n"
                "  remedy: memory of its own for one of them"
                + (f", or '{out_name}' exactly in the place of '{name}'" if argument.reusable else "")
            )


def refuse_itself(who: str, name: str, written: Tensor) -> None:
    """Refuse to write a tensor two elements of which are in one place, with memory or without.

    Of strides that are symbols of a traced graph only 0 is looked at, as ``expand`` makes it: the rest shows when it runs.

    Raises:
        RuntimeError: its elements overlap.
    """
    if written.layout != torch.strided:
        return
    if all(isinstance(number, int) for number in (*written.shape, *written.stride())):
        overlaps = written.numel() > 0 and _overlaps_itself(written)
    else:
        overlaps = any(
            isinstance(stride, int) and stride == 0 and size > 1
            for size, stride in zip(written.shape, written.stride(), strict=True)
        )
    if overlaps:
        raise RuntimeError(f"{who}: argument '{name}' is written, but its elements overlap\n  {_why(name, written)}")


def _tensors(argument: Argument, value: object) -> list[tuple[Argument, str, Tensor]]:
    """Those of an argument that have memory, with what errors call them."""
    if isinstance(value, (list, tuple)):
        return [(argument, f"{argument.name}[{i}]", item) for i, item in enumerate(value) if _has_memory(item)]
    return [(argument, argument.name, value)] if _has_memory(value) else []  # type: ignore[list-item]


def _has_memory(value: object) -> bool:
    if not isinstance(value, Tensor) or value.layout != torch.strided or not torch._C._has_storage(value):
        return False
    return value.device.type != "meta" and value.numel() > 0


def _described(name: str, tensor: Tensor) -> str:
    return f"'{name}' {list(tensor.shape)} with strides {list(tensor.stride())}"


def _why(name: str, tensor: Tensor) -> str:
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            return f"dimension {dim} has size {size} and stride 0"
    return _described(name, tensor)


def _steps(tensor: Tensor) -> list[tuple[int, int]]:
    """The distance in bytes between neighbours of a dimension, and how many steps there are."""
    width = tensor.element_size()
    return [(width * stride, size - 1) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def _shares_memory(a: Tensor, b: Tensor) -> bool:
    distance = a.data_ptr() - b.data_ptr()
    low, high = 1 - a.element_size() - distance, b.element_size() - 1 - distance
    limits = [(step, 0, most) for step, most in _steps(a)] + [(step, -most, 0) for step, most in _steps(b)]
    merged: dict[int, tuple[int, int]] = {}  # one for each step
    for step, least, most in limits:
        before = merged.get(step, (0, 0))
        merged[step] = (before[0] + least, before[1] + most)
    return _Sums([(step, *merged[step]) for step in merged]).meet(low, high, moved=False)


def _overlaps_itself(tensor: Tensor) -> bool:
    width = tensor.element_size()
    return _Sums([(step, -most, most) for step, most in _steps(tensor)]).meet(1 - width, width - 1, moved=True)


def _takes_the_place(out: Tensor, x: Tensor) -> bool:
    """Whether ``out`` is ``x``, or one of equal parts of its rows."""
    if out.dtype != x.dtype or out.dim() != x.dim():
        return False
    distance = out.data_ptr() - x.data_ptr()
    if x.dim() == 0:
        return distance == 0
    for dim in range(x.dim() - 1):
        if out.shape[dim] != x.shape[dim] or (x.shape[dim] > 1 and out.stride(dim) != x.stride(dim)):
            return False
    if x.shape[-1] % out.shape[-1] != 0 or (out.shape[-1] > 1 and out.stride(-1) != x.stride(-1)):
        return False
    part = out.shape[-1] * (x.stride(-1) if x.shape[-1] > 1 else 1) * x.element_size()
    return distance >= 0 and part > 0 and distance % part == 0 and distance // part < x.shape[-1] // out.shape[-1]


class _Sums:
    """The numbers that a sum of multiples can be: each step times a whole number between two limits."""

    def __init__(self, limits: list[tuple[int, int, int]]) -> None:
        self._terms = sorted(limits, reverse=True)
        self._rest = [(0, 0, 0)]  # of the terms from each on: divisor, least and most
        for step, least, most in reversed(self._terms):
            divisor, low, high = self._rest[-1]
            self._rest.append((math.gcd(divisor, step), low + step * least, high + step * most))
        self._rest.reverse()
        self._patience = _PATIENCE

    def meet(self, low: int, high: int, *, moved: bool, at: int = 0) -> bool:
        """Whether one of them lies in [low, high]; ``moved``: and is made of other numbers than zeros.

        Yes too if that takes long to tell.
        """
        if at == len(self._terms):
            return not moved and low <= 0 <= high
        step, least, most = self._terms[at]
        if step == 0:
            return low <= 0 <= high
        if high // self._rest[at][0] * self._rest[at][0] < low:
            return False
        _, rest_least, rest_most = self._rest[at + 1]
        for x in range(max(least, -((rest_most - low) // step)), min(most, (high - rest_least) // step) + 1):
            self._patience -= 1
            if self._patience < 0:
                return True
            if self.meet(low - step * x, high - step * x, moved=moved and x == 0, at=at + 1):
                return True
        return False
