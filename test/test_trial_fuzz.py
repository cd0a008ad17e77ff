"""Fuzzes the trial ops: random sizes, strides, places and dtypes, against the function in float64.

A call is right, and writes nothing beside what it must; or it is refused with ``.contiguous()`` where a stride is the reason.
"""

from __future__ import annotations

from random import Random

import fuzz
import pytest
import torch
import trial_library
from cases import assert_only_written_inside, call, copy_with_storage, devices, poisoned, writes
from torch import Tensor

from torch_jit_ops import Op, Sample, SampleMaker
from torch_jit_ops.declaring.dtypes import Combination
from torch_jit_ops.testing import oracle

OPS = trial_library.library.ops


def _laid_out(tensor: Tensor, random: Random) -> Tensor:
    """The same values among poison: at an odd place, with gaps between rows and matrices, or as they are."""
    if tensor.dim() == 0 or random.random() < 0.3:
        return tensor
    strides, step = [1], 1
    for size in reversed(tensor.shape[1:]):
        step = step * max(size, 1) + random.choice([0, 0, 1, 8, 13])
        strides.append(step)
    place = poisoned(tensor.shape, tensor.dtype, tensor.device.type, strides[::-1])
    return place.as_strided(place.shape, place.stride(), place.storage_offset() + random.choice([0, 1, 16])).copy_(tensor)


def _rope(random: Random, make: SampleMaker) -> tuple[Tensor, ...]:
    tokens, places, head_dim = random.choice([0, 1, 2, 17, 65]), random.choice([1, 5, 4096]), 2 * random.randint(1, 65)
    q, k = (make.randn(tokens, random.choice([0, 1, 2, 5]), head_dim) for _ in range(2))
    cache = make.randn(places, head_dim, dtype=torch.float32)
    return (
        _laid_out(q, random),
        _laid_out(k, random),
        cache,
        make.positions(tokens, below=places, dtype=make.dtypes["positions"]),
    )


def _store(random: Random, make: SampleMaker) -> tuple[Tensor, ...]:
    slots = random.choice([1, 2, 19, 200])
    tokens = random.randint(0, slots)
    row = random.choice([0, 1, 2, 3]), random.choice([1, 7, 64, 129])
    scale = random.choice([1e-4, 1.0, 300.0])  # of which fp8 has subnormals, and values that saturate
    k, v = (_laid_out(make.randn(tokens, *row, scale=scale), random) for _ in range(2))
    caches = [_laid_out(make.randn(slots, *row, dtype=make.dtypes["k_cache"]), random) for _ in range(2)]
    indices = make.indices(tokens, below=slots, unique=True, dtype=make.dtypes["indices"])
    return k, v, *caches, torch.where(make.booleans(tokens, chance=0.2), torch.full_like(indices, -1), indices)


def _rows(random: Random, make: SampleMaker, largest: int) -> Tensor:
    leading = random.choice([[], [0], [1], [5], [3, 4], [2, 1, 3]])
    rows = make.randn(*leading, random.randint(1, largest), scale=random.choice([1e-3, 1.0, 50.0]))
    # A coarse grid has ties of every kind.
    return _laid_out((rows * 4).round() / 4 if random.random() < 0.3 else rows, random)


def _quant(random: Random, make: SampleMaker) -> tuple[Tensor, ...]:
    return (_rows(random, make, 600),)


def _topk(random: Random, make: SampleMaker) -> tuple[Tensor | int, ...]:
    logits = _rows(random, make, 300)
    return logits, random.randint(0, min(logits.shape[-1], 9))


MAKERS = {"rope": _rope, "store_kv_cache": _store, "quant_fp8_per_token": _quant, "topk_softmax": _topk}


def _case(op: Op, seed: int, device: str) -> tuple[Combination, Sample]:
    random = Random(seed)
    dtypes = random.choice(op.declaration.dtypes.combinations())
    return dtypes, Sample(MAKERS[op.name](random, SampleMaker(device, dtypes, seed)))


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("name", MAKERS)
def test_random_calls(name: str, device: str) -> None:
    op = OPS[name]
    refused = 0
    for seed in fuzz.seeds(60):
        dtypes, given = _case(op, seed, device)
        passed = copy_with_storage(given)
        try:
            with op.kernels_alone():
                actual = call(op, passed)
        except RuntimeError as error:
            assert ".contiguous()" in str(error), f"seed {seed}: {error}"
            refused += 1
            continue
        try:
            oracle.verify(op, device, dtypes, given, actual)
            for argument, old, new in zip(op.signature.arguments, given.args, passed.args, strict=True):
                if isinstance(old, Tensor):
                    assert_only_written_inside(new, old, argument.name)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {dtypes}, {[_described(value) for value in given.args]}: {error}") from error
    assert refused < len(fuzz.seeds(60)) / 2, "most calls must reach the kernel"


@pytest.mark.parametrize("name", [name for name in MAKERS if not writes(OPS[name])])
def test_random_outs(name: str) -> None:
    """The out form into tensors of any layout makes the same bits."""
    op = OPS[name]
    for seed in fuzz.seeds(30):
        _, given = _case(op, seed, "cpu")
        try:
            expected = call(op, copy_with_storage(given))
        except RuntimeError:
            continue  # refused; the other test looks at it
        outs = tuple(_laid_out(torch.empty_like(tensor), Random(seed)) for tensor in expected.tensors)
        before = copy_with_storage(Sample(outs)).args
        try:
            op.out(*given.args, **dict(zip(op.declaration.outputs, outs, strict=True)))
        except RuntimeError as error:
            assert ".contiguous()" in str(error), f"seed {seed}: {error}"
            continue
        for out, tensor, old in zip(outs, expected.tensors, before, strict=True):
            assert torch.equal(out.view(torch.uint8) if out.itemsize == 1 else out, _bytes_of(tensor)), f"seed {seed}"
            assert_only_written_inside(out, old, f"seed {seed}")


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor


def _described(value: object) -> object:
    return (list(value.shape), value.stride(), value.storage_offset()) if isinstance(value, Tensor) else value
