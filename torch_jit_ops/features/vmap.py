"""torch.func.vmap of ops: one call where the batch is just more rows, else one call for each element of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_jit_ops.declaring.rows import Rows
from torch_jit_ops.declaring.signature import Signature


def rule(overload: Any, signature: Signature, rows: Rows) -> Callable[..., Any]:
    """The batching rule of an op that returns new tensors, for ``torch.library.register_vmap``.

    Args:
        overload: of PyTorch.
        signature: of the op.
        rows: what the op declares. With results that are sums over all rows, each element of a batch is a call of its own.
    """
    of_rows = () if rows.sums else (*rows.arguments, *rows.per_token)
    names = [argument.name for argument in signature.arguments]

    def batched(info: Any, in_dims: Sequence[int | None], *args: Any, **kwargs: Any) -> Any:
        given = list(zip(names, args, in_dims, strict=False))
        if all(dim is None or name in of_rows for name, _, dim in given):
            moved = [_in_front(value, dim, info.batch_size) if name in of_rows else value for name, value, dim in given]
            results = overload(*moved, **kwargs)
            return results, (0,) * len(results) if isinstance(results, tuple) else 0
        each = []
        for index in range(info.batch_size):
            one = [value if dim is None else value.select(dim, index) for _, value, dim in given]
            each.append(overload(*one, **kwargs))
        if signature.results == 1:
            return torch.stack(each), 0
        return tuple(torch.stack(results) for results in zip(*each, strict=True)), (0,) * signature.results

    return batched


def _in_front(value: Any, dim: int | None, size: int) -> Any:
    """The tensor with the batch as its first dimension; contiguous, as kernels take rows at equal distances."""
    if not isinstance(value, Tensor):
        return value
    return (value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)).contiguous()
