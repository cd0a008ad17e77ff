"""Two ways to run a reference in float64: without any rounding, and with the roundings that fp32 arithmetic may add."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ROUNDING = 2.0**-24  # the largest relative error of one fp32 operation


class Unrounded(TorchDispatchMode):
    """Float64 stays float64 where a reference widens to fp32, as in ``x.float()`` or ``x.sum(dtype=torch.float32)``.

    Fp32 is what references compute in, so rounding to it is an error of theirs and no part of what they mean. Rounding to a
    half, to 8 bits or to an integer is meant.
    """

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        wide = any(isinstance(arg, Tensor) and arg.dtype == torch.float64 for arg in args)
        if wide and kwargs.get("dtype") == torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


class OneRoundingEach(TorchDispatchMode):
    """Float64 arithmetic, each result of which is off by one fp32 rounding error of random sign.

    A sum of n terms is that of terms that are each off by log2(n) rounding errors: the bound of pairwise addition.

    Args:
        seed: of the signs.
        roundings: by how many of them a result is off.
        only_inexact: results that fp32 can hold are exact. So a tie stays one, where the reference has computed it exactly.
    """

    def __init__(self, seed: int, roundings: int = 1, only_inexact: bool = False) -> None:
        TorchDispatchMode.__init__(self)
        self._seed = seed
        self._roundings = roundings
        self._only_inexact = only_inexact

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in (torch.ops.aten.sum, torch.ops.aten.mean) and args[0].dtype == torch.float64:
            exact = func(*args, **kwargs)
            if self._only_inexact and _fits_into_fp32(exact).all():
                return exact
            added = args[0].numel() / max(exact.numel(), 1)
            args = (self._off(args[0], math.ceil(math.log2(max(added, 1)))), *args[1:])
        result = func(*args, **kwargs)
        returns = func._schema.returns
        if len(returns) != 1 or not isinstance(result, Tensor) or result.dtype != torch.float64:
            return result
        alias = returns[0].alias_info
        if alias is not None and not alias.is_write:
            return result  # a view
        off = self._off(result, 1)
        if self._only_inexact:
            off = torch.where(_fits_into_fp32(result), result, off)
        return result.copy_(off) if alias is not None else off

    def _off(self, exact: Tensor, roundings: int) -> Tensor:
        # The sign is a hash of the value: as in rounding, equal values have equal errors, which add up instead of averaging.
        self._seed += 64  # more than there are trials, so that no two of them have an operation with the same signs
        mixed = (exact.contiguous().view(torch.int64) + self._seed) * 0x5851F42D4C957F2D
        mixed = (mixed ^ (mixed >> 29)) * 0x14057B7EF767814F
        sign = 1 - 2 * ((mixed >> 40) & 1)
        return exact * (1 + self._roundings * roundings * _ROUNDING * sign.to(exact))


def _fits_into_fp32(exact: Tensor) -> Tensor:
    return (exact.float().double() == exact) | exact.isnan()
