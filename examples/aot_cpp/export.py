"""Exports a small model that calls an op, compiles it ahead of time, and writes the op's kernels beside it.

python export.py build            writes build/model.pt2 and build/kernels/; prints what the model returns in eager mode
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

import torch_jit_ops


class Model(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.jitk.silu_and_mul(x + 1).sum(-1)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.arange(32, dtype=torch.float32, device=device).view(2, 16) / 16
    tokens = torch.export.Dim("tokens", max=1024)
    program = torch.export.export(Model(), (x,), dynamic_shapes=({0: tokens},))

    torch_jit_ops.deploy(folder / "kernels", programs=[program])
    torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    print("python:", *(f"{value:.5f}" for value in Model()(x).tolist()))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build"))
