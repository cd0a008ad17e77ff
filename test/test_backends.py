"""Which backend a call belongs to."""

from __future__ import annotations

import torch

from torch_jit_ops import backends


def test_the_cpu_beside_another_device_decides_nothing() -> None:
    """So PyTorch dispatches: tensors in pinned memory are arguments of a kernel of the GPU."""
    cpu, first, second, meta = map(torch.device, ("cpu", "cuda:0", "cuda:1", "meta"))
    assert backends.deciding([cpu, first, cpu]) == [first]
    assert backends.deciding([cpu, cpu]) == [cpu, cpu]
    assert backends.deciding([second, cpu, first]) == [second, first]
    assert backends.deciding(iter([cpu, meta])) == [meta]
    assert backends.deciding([]) == []
