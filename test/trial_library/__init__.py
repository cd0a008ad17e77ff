"""Ops of the kinds that are not rows of one dtype: indexed, written in place, quantised, routed.

The generic tests run over them like over any other; ``test_trial_ops.py`` adds ``check``, wrong kernels and a fuzzer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from torch_jit_ops import OpLibrary, Rows, Sample, SampleMaker

library = OpLibrary("trial", csrc=Path(__file__).parent / "csrc", include=[Path(__file__).parent / "csrc"])

HALVES = (torch.float16, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64)
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


# --- rotary embedding -----------------------------------------------------------------------------


def _queries_and_keys(make: SampleMaker) -> Iterator[Sample]:
    for tokens, q_heads, k_heads, head_dim, note in (
        (7, 4, 2, 64, "grouped queries"),
        (33, 3, 1, 10, "an odd half of a head"),
        (1, 8, 8, 128, "one token"),
        (300, 2, 1, 32, "more tokens than positions"),
    ):
        q, k = make.randn(tokens, q_heads, head_dim), make.randn(tokens, k_heads, head_dim)
        cache = make.randn(97, head_dim, dtype=torch.float32).clamp(-1, 1)
        positions = make.positions(tokens, below=97, dtype=make.dtypes["positions"])
        yield Sample((q, k, cache, positions), note=note)


@library.op(
    cuda="rope.cu",
    cpu="rope.cpp",
    variant="trial::rope<{q.dtype}, {positions.dtype}>",
    dtypes={"q": (*HALVES, torch.float32), "positions": INTEGERS},
    mutates=("q", "k"),
    rows=Rows("q", "k", per_token=("positions",)),
    tensors={
        "q": "[tokens, q_heads, head_dim] strides [*, *, 1]",
        "k": "[tokens, k_heads, head_dim] q.dtype strides [*, *, 1]",
        "cos_sin_cache": "[*, head_dim] float32|float64",
        "positions": "[tokens] int32|int64",
    },
    samples=_queries_and_keys,
)
def rope(q: Tensor, k: Tensor, cos_sin_cache: Tensor, positions: Tensor) -> None:
    """Rotates each pair (i, i + head_dim / 2) of q and k by the angle of its token's position.

    A row of the cache holds the cosines of a position and then its sines.
    """
    cos, sin = cos_sin_cache[positions].unsqueeze(1).chunk(2, -1)
    for x in (q, k):
        a, b = x.chunk(2, -1)
        x.copy_(torch.cat((a * cos - b * sin, b * cos + a * sin), -1))


# --- a paged cache --------------------------------------------------------------------------------


def _tokens_and_slots(make: SampleMaker) -> Iterator[Sample]:
    for tokens, heads, head_dim, slots, skipped, note in (
        (7, 2, 64, 16, (2, 5), "a token without a slot"),
        (1, 1, 3, 5, (), "one token, an odd row"),
        (40, 4, 33, 41, range(1, 40, 2), "almost every slot, every second token"),
        (3, 2, 8, 64, (0, 1, 2), "no slot at all"),
    ):
        k, v = (make.randn(tokens, heads, head_dim, scale=3) for _ in range(2))
        k_cache, v_cache = (make.randn(slots, heads, head_dim, dtype=make.dtypes["k_cache"]) for _ in range(2))
        slot_of = make.indices(tokens, below=slots, unique=True, dtype=make.dtypes["indices"])
        slot_of[list(skipped)] = -1
        yield Sample((k, v, k_cache, v_cache, slot_of), note=note)


@library.op(
    cuda="store.cu",
    cpu="store.cpp",
    variant="trial::store_kv_cache<{k.dtype}, {k_cache.dtype}, {indices.dtype}>",
    dtypes={"k": HALVES, "k_cache": (torch.bfloat16, FP8), "indices": INTEGERS},
    mutates=("k_cache", "v_cache"),
    tensors={
        "k": "[tokens, heads, head_dim] strides [*, *, 1]",
        "v": "[tokens, heads, head_dim] k.dtype strides [*, *, 1]",
        "k_cache": "[slots, heads, head_dim] strides [*, *, 1]",
        "v_cache": "[slots, heads, head_dim] k_cache.dtype strides [*, *, 1]",
        "indices": "[tokens] int32|int64",
    },
    samples=_tokens_and_slots,
)
def store_kv_cache(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, indices: Tensor) -> None:
    """``k_cache[indices] = k`` and the same of v, but for tokens whose index is -1; what fp8 cannot hold saturates."""
    kept = indices >= 0
    for x, cache in ((k, k_cache), (v, v_cache)):
        x = x.clamp(-FP8_MAX, FP8_MAX) if cache.dtype == FP8 else x
        cache[indices[kept].long()] = x[kept].to(cache.dtype)


# --- quantisation ---------------------------------------------------------------------------------


def _activations(make: SampleMaker) -> Iterator[Sample]:
    yield Sample((make.randn(7, 64),), note="a few rows")
    yield Sample((make.randn(3, 5, 1000, scale=20),), note="two leading dimensions, a long row")
    yield Sample((make.randn(33, 101) * make.randn(33, 1),), note="odd width, each row with a scale of its own")
    ties = [448, *range(17, 32, 2), *(-tie for tie in range(34, 64, 4)), 9.5, -0.0029296875, 0.0009765625, 0]
    yield Sample((make.values(*ties),), note="no leading dimension; a scale of 1 and ties, some of them subnormal")
    yield Sample((make.values(*([0] * 8), *ties[:8]).view(2, 8),), note="zeros")


@library.op(
    cuda="quant.cu",
    cpu="quant.cpp",
    variant="trial::quant_fp8_per_token<{input.dtype}>",
    dtypes=(*HALVES, torch.float32),
    outputs=("out", "scale"),
    rows=("input",),
    tensors={
        "input": "[tokens..., hidden] rows",
        "out": "[tokens..., hidden] float8_e4m3fn rows",
        "scale": "[tokens..., 1] float32 rows",
    },
    samples=_activations,
)
def quant_fp8_per_token(input: Tensor) -> tuple[Tensor, Tensor]:
    """Each row over its scale, ``max(abs(row)) / 448`` in fp32, in fp8: nearest, ties to even."""
    x = input.float()
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-10) / FP8_MAX
    return (x / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


# --- routing --------------------------------------------------------------------------------------


def _logits(make: SampleMaker) -> Iterator[Sample]:
    yield Sample((make.randn(7, 64), 6), note="a few tokens")
    yield Sample((make.randn(33, 129, scale=4), 8), note="an odd number of experts")
    yield Sample((make.randn(5, 8).round(), 3), note="equal logits: the first of them")
    yield Sample((make.randn(3, 5), 5), note="all experts")
    yield Sample((make.randn(300, 256), 1), note="one expert each")


@library.op(
    cuda="topk.cu",
    cpu="topk.cpp",
    variant="trial::topk_softmax<{logits.dtype}>",
    dtypes=(torch.bfloat16, torch.float32),
    outputs=("weights", "ids"),
    rows=("logits",),
    tensors={
        "logits": "[tokens..., experts] rows",
        "weights": "[tokens..., k] float32 rows",
        "ids": "[tokens..., k] int32 rows",
    },
    samples=_logits,
)
def topk_softmax(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row's softmax, in fp32, largest first, and where they are. Of equals the first comes first."""
    if not 0 <= k <= logits.shape[-1]:
        raise ValueError(f"k must be from 0 to the number of experts, {logits.shape[-1]}, got {k}")
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices[..., :k]
    return logits.float().softmax(-1).gather(-1, order), order.int()
