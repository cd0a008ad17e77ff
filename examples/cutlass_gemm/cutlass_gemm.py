"""A GEMM by CUTLASS for Hopper, fp8 or bf16, with scales, bias and relu in its epilogue. Run me: ``python cutlass_gemm.py``.

CUTLASS's headers come from a wheel, ``pip install nvidia-cutlass``, or from the folder that ``CUTLASS_INCLUDE`` names.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from torch_jit_ops import OpLibrary, Sample, SampleMaker, include_of
from torch_jit_ops.testing import check

CUTLASS = os.environ.get("CUTLASS_INCLUDE") or include_of("cutlass/cutlass.h", "nvidia-cutlass", "flashinfer-python")
library = OpLibrary("cutlass_gemm", csrc=Path(__file__).parent, include=[CUTLASS])


def _samples(make: SampleMaker) -> Iterator[Sample]:
    """Operands are integers from -2 to 2: sums of their products are exact, also in the few bits that Hopper keeps for fp8."""

    def of(tokens: int, inputs: int, outputs: int, note: str) -> Sample:
        operands = (make.randn(rows, inputs, dtype=torch.float32).round().clamp(-2, 2) for rows in (tokens, outputs))
        scales = make.randn(2, dtype=torch.float32).abs()
        x, weight = (operand.to(make.dtype) for operand in operands)
        return Sample((x, weight, make.randn(outputs, dtype=torch.float32), scales[0], scales[1]), note=note)

    yield of(7, 64, 96, "less than a tile of tokens")
    yield of(300, 272, 136, "no multiple of a tile")


@library.op(
    cuda="linear_relu.cu",
    variant="cutlass_gemm::linear_relu<{x.dtype}, {x.shape[0]:pow2:min64:max128}>",  # tiles of 64 or of 128 tokens
    dtypes=(torch.float8_e4m3fn, torch.bfloat16),
    flags={"cuda": ["-DNDEBUG"]},
    samples=_samples,
)
def linear_relu(x: Tensor, weight: Tensor, bias: Tensor, x_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """``relu(x_scale * weight_scale * x @ weight.T + bias)``, accumulated in fp32 and rounded once.

    Args:
        x: [tokens, inputs], fp8 e4m3 or bf16, rows at any distance that is a multiple of 16 bytes.
        weight: [outputs, inputs], of the same dtype, contiguous.
        bias: [outputs], fp32.
        x_scale, weight_scale: [], fp32.

    Returns:
        [tokens, outputs], bf16. Rows of all matrices must be multiples of 16 bytes.
    """
    wide = torch.promote_types(x.dtype, torch.float32) if x.dtype.itemsize > 1 else torch.float32
    result = torch.relu(x_scale * weight_scale * (x.to(wide) @ weight.to(wide).T) + bias)
    return result if wide == torch.float64 else result.to(torch.bfloat16)  # tests ask for the truth in float64


def main() -> int:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        print("cutlass_gemm.py is for Hopper (H100, H200), but PyTorch sees no such GPU here.", file=sys.stderr)
        return 1
    check(linear_relu)
    x, weight = (torch.randn(*shape, device="cuda").to(torch.float8_e4m3fn) for shape in ((4096, 4096), (8192, 4096)))
    bias, scale = torch.randn(8192, device="cuda"), torch.full((), 0.125, device="cuda")
    compiled = torch.compile(linear_relu, fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, bias, scale, scale), linear_relu(x, weight, bias, scale, scale))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(20):
        compiled(x, weight, bias, scale, scale)
    end.record()
    torch.cuda.synchronize()
    milliseconds = start.elapsed_time(end) / 20
    print(f"fp8 [4096, 4096] @ [4096, 8192]: {milliseconds:.3f} ms, {2 * 4096**2 * 8192 / milliseconds / 1e9:.0f} TFLOP/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
