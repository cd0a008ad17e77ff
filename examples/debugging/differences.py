"""An op with a bug, and a program that meets it. docs/debugging.md finds it.

python examples/debugging/differences.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from torch_jit_ops import OpLibrary

library = OpLibrary("debugging", csrc=Path(__file__).parent)


@library.op(cuda="differences.cu", variant="debugging::differences", mutates=("out",), flags={"cuda": ["-lineinfo"]})
def differences(input: Tensor, out: Tensor) -> None:
    """``out[i] = input[i + 1] - input[i]``."""
    out.copy_(input.diff())


def main() -> None:
    squares = torch.arange(129.0, device="cuda") ** 2
    out = torch.empty(128, device="cuda")
    other = torch.zeros(128, device="cuda")
    differences(squares, out)
    torch.testing.assert_close(out, squares.diff())
    print("the differences are right")
    print("a tensor that nobody passed begins with", other[:3].tolist())


if __name__ == "__main__":
    main()
