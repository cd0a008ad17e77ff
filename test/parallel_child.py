"""One of two processes that train a model with ops: see test_autograd.py. Arguments: the rank and the file to meet at."""

from __future__ import annotations

import copy
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import torch_jit_ops  # noqa: F401


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.rand(16))
        self.up = nn.Linear(16, 64)
        self.down = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.ops.jitk.rmsnorm(x, self.norm)
        return x + self.down(torch.ops.jitk.silu_and_mul(self.up(hidden)))


def gradients(model: nn.Module, batch: Tensor) -> list[Tensor]:
    model(batch).square().mean().backward()
    return [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]


def main() -> None:
    rank = int(sys.argv[1])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model, batch = nn.Sequential(Block(), Block()), torch.randn(6, 16)
    expected = gradients(copy.deepcopy(model), batch)
    own = batch.chunk(2)[rank]
    sharded = copy.deepcopy(model)
    for block in sharded:
        fully_shard(block, mesh=dist.init_device_mesh("cpu", (2,)))
    fully_shard(sharded, mesh=dist.init_device_mesh("cpu", (2,)))
    for parallel in (DistributedDataParallel(copy.deepcopy(model)), sharded):
        for actual, plain in zip(gradients(parallel, own), expected, strict=True):
            torch.testing.assert_close(actual, plain)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
