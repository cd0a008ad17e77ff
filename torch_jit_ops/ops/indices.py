"""The check of indices that the PyTorch functions of ops make, as their kernels make it (``include/jitk/index.h``)."""

from __future__ import annotations

import torch
from torch import Tensor


def in_range(indices: Tensor, end: int, name: str, *, skip: bool = False) -> None:
    """Refuse an index that is not below ``end``.

    On the CPU at once; on other devices at the next synchronisation, as PyTorch's own indexing. Tensors without values of their
    own, such as those of a trace, are not looked at.

    Args:
        indices: of any shape, int32 or int64.
        end: what they must be below.
        name: of the argument, for the error.
        skip: whether -1 is an index: of a row that is not to be touched.

    Raises:
        RuntimeError: one is out of range.
    """
    if type(indices) is not Tensor or torch._C._functorch.maybe_get_level(indices) > 0:
        return
    wrong = (indices >= end) | (indices < (-1 if skip else 0))
    if indices.device.type != "cpu":
        torch._assert_async(~wrong.any(), f"argument '{name}' holds an index out of range: not below {end}")
    elif wrong.any():
        position = int(wrong.reshape(-1).nonzero()[0])
        expected = f"0 to {end - 1}" if end > 0 else "none, for there is nothing to index"
        raise RuntimeError(
            f"argument {name!r} holds an index out of range\n  expected  {expected}{', or -1 to skip' if skip else ''}\n"
            f"  got       {int(indices.reshape(-1)[position])} at position {position}"
        )
