"""The op against the function that declares it, on every device that is here."""

from __future__ import annotations

import os

import mylib
import pytest
import torch

from torch_jit_ops import Op, SampleMaker

os.environ["JITK_FALLBACK"] = "error"  # or a machine without a compiler would compare the function with itself
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("op", mylib.library.ops.values(), ids=lambda op: op.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_the_kernel_computes_the_function(op: Op, dtype: torch.dtype, device: str) -> None:
    for sample in op.samples(SampleMaker(device, dtype)):
        doubles = [arg.double() if isinstance(arg, torch.Tensor) else arg for arg in sample.args]
        expected = op.reference(*doubles)
        result = op(*sample.args)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(result.double(), expected, rtol=eps, atol=eps, msg=sample.note)
        out = torch.full_like(result, torch.nan)
        op.out(*sample.args, out=out)
        assert torch.equal(out, result), sample.note


@pytest.mark.parametrize("op", mylib.library.ops.values(), ids=lambda op: op.name)
@pytest.mark.parametrize("device", DEVICES)
def test_pytorch_accepts_the_op(op: Op, device: str) -> None:
    for sample in op.samples(SampleMaker(device, torch.float32)):
        torch.library.opcheck(op.default, sample.args)


def test_a_width_that_groups_do_not_fill_is_refused() -> None:
    with pytest.raises(RuntimeError, match="10 is not a multiple of 4"):
        torch.ops.mylib.scale_shift(torch.randn(3, 10), torch.randn(2), group=4)
