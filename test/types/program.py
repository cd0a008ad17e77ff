# pyright: strict
"""What type checkers make of ops. A line that ends in ``# refused`` is one that they must refuse; all others they must accept.

It is never run.
"""

from array import array
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
from torch import Tensor
from typing_extensions import assert_type

import torch_jit_ops
from torch_jit_ops import Op, OpLibrary, RadixTree, Sample, SampleMaker
from torch_jit_ops.ops.activation import silu_and_mul
from torch_jit_ops.ops.norm import fused_add_rmsnorm, layernorm, rmsnorm, rmsnorm_backward

library = OpLibrary("typed", csrc=Path("csrc"))


def samples(make: SampleMaker) -> Iterator[Sample]:
    yield Sample((make.randn(3),), note="some")


@library.op(samples=samples)
def pick(input: Tensor, index: int, *, stable: bool = False) -> tuple[Tensor, Tensor]:
    """Some."""
    return input[index], input


def calls(x: Tensor, weight: Tensor) -> None:
    assert_type(rmsnorm(x, weight), Tensor)
    assert_type(rmsnorm(x, weight, 1e-5), Tensor)
    assert_type(rmsnorm(x, weight=weight, eps=1e-5), Tensor)
    assert_type(layernorm(x, weight, None), Tensor)
    assert_type(rmsnorm_backward(x, x, weight), tuple[Tensor, Tensor])
    assert_type(pick(x, 3, stable=True), tuple[Tensor, Tensor])
    assert_type(rmsnorm.reference(x, weight), Tensor)
    assert_type(silu_and_mul(x).square(), Tensor)
    fused_add_rmsnorm(x, x, weight)
    for op in torch_jit_ops.library.ops.values():
        op(x, anything=3)
    given: Op = rmsnorm
    print(given.name)

    rmsnorm("a", 3)  # refused
    rmsnorm(x)  # refused
    rmsnorm(x, weight, "1e-5")  # refused
    rmsnorm(x, weight, epsilon=1e-5)  # refused
    rmsnorm(x, None)  # refused
    rmsnorm.reference(x, 3)  # refused
    silu_and_mul(x, x)  # refused
    silu_and_mul(x).squared()  # refused
    rmsnorm_backward(x, x, weight).sum()  # refused
    pick(x, 3, True)  # refused
    pick(x, 1.5)  # refused
    library.op(cuda=3)  # refused
    library.op(variant="f", dtypes="float16")  # refused
    library.op("scale.cu")  # refused
    OpLibrary(3)  # refused
    assert_type(pick(x, 3), Tensor)  # refused


def trees(tokens: Tensor) -> None:
    tree = RadixTree(page_size=16)
    assert_type(tree.insert([1, 2], np.array([1, 2]), extra_key="adapter"), int)
    assert_type(tree.insert(array("q", [1]), range(1), counted=1), int)
    values, node, length = tree.match_prefix(tokens, lock=True)
    assert_type(values, Tensor)
    assert_type(length, int)
    assert_type(tree.evict(5, "lfu"), Tensor)
    assert_type([entry.extra_key for entry in tree.leaves()], list[str | None])
    assert_type(RadixTree.load("file"), RadixTree)
    tree.unlock(node)
    assert_type(library.module("native", source="..."), ModuleType)
    print(library.module("native", source="...").anything)

    tree.match_prefix(3)  # refused
    tree.match_prefix(["a"])  # refused
    tree.insert([1])  # refused
    tree.evict(5, "mru")  # refused
    tree.lock(5)  # refused
    RadixTree("16")  # refused
    library.module("native", sources=3)  # refused
