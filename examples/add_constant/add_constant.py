"""A kernel without a declared op: compile a function, call it. Run me: ``python add_constant.py``."""

from __future__ import annotations

import sys

import torch

from torch_jit_ops import Module, cache_once, load_jit, make_cpp_args


@cache_once
def _module(constant: int) -> Module:
    args = make_cpp_args(constant)
    return load_jit(
        "add_constant",
        *args,
        cuda_files=["add_constant.cuh"],
        cuda_wrappers=[("add_constant", f"add_constant<{args}>")],
    )


def add_constant(src: torch.Tensor, constant: int) -> torch.Tensor:
    """``src + constant`` for a 1-D, dense int32 tensor on a CUDA device. Each constant is a kernel of its own."""
    dst = torch.empty_like(src)
    _module(constant).add_constant(dst, src)
    return dst


def main() -> int:
    if not torch.cuda.is_available():
        print("add_constant.py compiles a CUDA kernel and calls it, but PyTorch sees no CUDA device here.", file=sys.stderr)
        print("The same op with a CPU kernel beside it: torch.ops.jitk.add_constant(src, 5).", file=sys.stderr)
        return 1
    src = torch.arange(10, dtype=torch.int32, device="cuda")
    print("eager    ", add_constant(src, 5).tolist())
    print("compiled ", torch.compile(add_constant, fullgraph=True)(src, 7).tolist())
    return 0


if __name__ == "__main__":
    sys.exit(main())
