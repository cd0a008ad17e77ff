"""An op in a package, and a namespace, of one's own.

    import mylib
    y = torch.ops.mylib.scale_shift(x, scale, shift, group=64)

The import defines the op. Its kernel is compiled on the first call.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from torch_jit_ops import OpLibrary, Sample, SampleMaker

_HERE = Path(__file__).parent
library = OpLibrary("mylib", csrc=_HERE / "csrc", include=[_HERE / "include"])


def _samples(make: SampleMaker) -> Iterator[Sample]:
    yield Sample((make.randn(7, 64), make.randn(64), make.randn(64)), note="a scale for each column")
    yield Sample((make.randn(2, 3, 96), make.randn(3), None, 32), note="groups, no shift, two leading dimensions")
    yield Sample((make.randn(5, 303), make.randn(101), make.randn(101), 3), note="groups that no power of two divides")
    yield Sample((make.randn(4, 128)[:, 64:], make.randn(64)), note="rows of a wider tensor")
    yield Sample((make.randn(0, 64), make.randn(64)), note="no tokens")


@library.op(cuda="scale.cu", cpu="scale.cpp", variant="mylib::scale_shift<{input.dtype}, {group}>", samples=_samples)
def scale_shift(input: Tensor, scale: Tensor, shift: Tensor | None = None, group: int = 1) -> Tensor:
    """``input * scale + shift``, where ``group`` neighbouring columns share one scale and one shift.

    Args:
        input: ``[..., groups * group]``, fp16, bf16 or fp32; rows may have any stride.
        scale: ``[groups]``, of the same dtype.
        shift: like ``scale``; without it nothing is added.
        group: the columns of a group. A template argument: each value is a kernel of its own.

    Returns:
        The shape of ``input``, contiguous, of the same dtype; computed in fp32 and rounded once.
    """
    result = input * scale.repeat_interleave(group)
    return result if shift is None else result + shift.repeat_interleave(group)
