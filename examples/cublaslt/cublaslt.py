"""A linear layer by cuBLASLt, from a wheel or the CUDA toolkit. Run me: ``python cublaslt.py``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_jit_ops import OpLibrary, Sample, SampleMaker, include_of, library_of
from torch_jit_ops.testing import check

_WHEELS = ("nvidia-cublas", "nvidia-cublas-cu12")  # what PyTorch itself is linked with, for CUDA 13 and 12
library = OpLibrary("cublaslt", csrc=Path(__file__).parent)


def _samples(make: SampleMaker) -> Iterator[Sample]:
    yield Sample((make.randn(7, 64), make.randn(96, 64), make.randn(96)), note="tokens")
    # For such sizes cuBLASLt rounds before it adds the bias. Sums of small integers are exact, whoever rounds when.
    odd = (make.randn(*shape).round().clamp(-2, 2) for shape in ((33, 17), (5, 17), (5,)))
    yield Sample(tuple(odd), note="sizes that no vector divides")
    yield Sample((make.randn(4, 128)[:, :64], make.randn(32, 64), make.randn(32)), note="rows of a wider tensor")


@library.op(
    cuda="linear.cu",
    variant="cublaslt::linear<{x.dtype}>",
    dtypes=(torch.float16, torch.bfloat16),
    include={"cuda": [include_of("cublasLt.h", *_WHEELS)]},
    ldflags={"cuda": [library_of("libcublasLt.so", *_WHEELS)]},
    samples=_samples,
)
def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x @ weight.T + bias``: ``x`` [tokens, inputs], ``weight`` [outputs, inputs], ``bias`` [outputs], of one dtype."""
    return F.linear(x, weight, bias)


def main() -> int:
    if not torch.cuda.is_available():
        print("cublaslt.py calls cuBLASLt, but PyTorch sees no CUDA device here.", file=sys.stderr)
        return 1
    check(linear)
    x, weight, bias = (
        torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((64, 4096), (4096, 4096), (4096,))
    )
    torch.testing.assert_close(torch.compile(linear, fullgraph=True)(x, weight, bias), F.linear(x, weight, bias))
    print("torch.ops.cublaslt.linear keeps its promises, in eager and compiled")
    return 0


if __name__ == "__main__":
    sys.exit(main())
