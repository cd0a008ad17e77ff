"""Indices out of range: what the PyTorch functions of ops say of them, as the kernels do."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch._subclasses.fake_tensor import FakeTensorMode

from torch_jit_ops.ops.indices import in_range


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_what_is_in_range(dtype: torch.dtype) -> None:
    in_range(torch.tensor([0, 6, 3], dtype=dtype), 7, "positions")
    in_range(torch.tensor([-1, 6], dtype=dtype), 7, "indices", skip=True)
    in_range(torch.empty(0, dtype=dtype), 0, "indices")
    in_range(torch.tensor(6, dtype=dtype), 7, "positions")


@pytest.mark.parametrize("bad", [[0, 7], [7], [-1], [[3, 9], [0, 0]], [-2], [2**31 - 1]])
def test_what_is_not(bad: list[int]) -> None:
    with pytest.raises(RuntimeError, match="'positions' holds an index out of range"):
        in_range(torch.tensor(bad), 7, "positions")


def test_its_text() -> None:
    said = []
    for values, end, skip in (([3, 8, -2], 7, True), ([[0, 1], [-1, 9]], 7, False), ([0], 0, False)):
        with pytest.raises(RuntimeError) as caught:
            in_range(torch.tensor(values), end, "indices", skip=skip)
        said.append(str(caught.value))
    assert_expected_inline(
        "\n".join(said),
        """\
argument 'indices' holds an index out of range
  expected  0 to 6, or -1 to skip
  got       8 at position 1
argument 'indices' holds an index out of range
  expected  0 to 6
  got       -1 at position 2
argument 'indices' holds an index out of range
  expected  none, for there is nothing to index
  got       0 at position 0""",
    )


def test_what_has_no_values_is_not_looked_at() -> None:
    with FakeTensorMode():
        in_range(torch.zeros(3, dtype=torch.int64), 0, "indices")
    in_range(torch.zeros(3, dtype=torch.int64, device="meta"), 0, "indices")
    assert torch.vmap(lambda index: (in_range(index, 0, "indices"), index)[1])(torch.tensor([5, 6])).tolist() == [5, 6]
