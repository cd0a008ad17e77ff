"""The op against the function that declares it, on every device that is here."""

from __future__ import annotations

import os

import mylib
import pytest
import torch

from torch_jit_ops import Op
from torch_jit_ops.testing import check

os.environ["JITK_FALLBACK"] = "error"  # or a machine without a compiler would compare the function with itself


@pytest.mark.parametrize("op", mylib.library.ops.values(), ids=lambda op: op.name)
def test_the_op_keeps_its_promises(op: Op) -> None:
    check(op)


def test_a_width_that_groups_do_not_fill_is_refused() -> None:
    with pytest.raises(RuntimeError, match="10 is not a multiple of 4"):
        torch.ops.mylib.scale_shift(torch.randn(3, 10), torch.randn(2), group=4)
