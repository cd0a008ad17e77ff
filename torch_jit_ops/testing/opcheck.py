"""``torch.library.opcheck`` for every dtype: by itself it raises for 8-bit floats."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from torch_jit_ops.declaring.samples import Sample
from torch_jit_ops.testing.calls import bits, is_8bit_float, tensors_of

_allclose = torch.allclose


def opcheck(overload: Any, given: Sample, results: Sequence[Tensor] = ()) -> None:
    """Fail unless opcheck accepts the overload.

    Args:
        overload: of PyTorch.
        given: the arguments to call it with.
        results: what comes of such a call; only 8-bit floats among them matter.
    """
    kwargs = dict(given.kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        if not any(is_8bit_float(tensor.dtype) for tensor in (*tensors_of(given), *results)):
            torch.library.opcheck(overload, given.args, kwargs)
            return
        with mock.patch.object(torch, "allclose", _all_close):
            torch.library.opcheck(overload, given.args, kwargs, test_utils="test_schema")
        rest = ["test_autograd_registration", "test_faketensor"]
        # Of results that want a gradient it takes the sum, which 8-bit floats do not have.
        if not any(is_8bit_float(result.dtype) and result.requires_grad for result in results):
            rest.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(overload, given.args, kwargs, test_utils=rest)


def _all_close(one: Tensor, other: Tensor, **options: Any) -> bool:
    """``torch.allclose``, with which opcheck sees whether an argument was written. It raises for 8-bit floats (PyTorch 2.11 to
    2.13): those are compared by their bytes."""
    if is_8bit_float(one.dtype) and one.dtype == other.dtype:
        return one.shape == other.shape and torch.equal(bits(one), bits(other))
    return _allclose(one, other, **options)
