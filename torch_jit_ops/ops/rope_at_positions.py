"""Rotary position embedding by a cache of cosines and sines and the positions of tokens, as servers have them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torch_jit_ops.declaring.rows import Rows
from torch_jit_ops.declaring.samples import Sample, SampleMaker
from torch_jit_ops.ops.library import FLOATS, library
from torch_jit_ops.ops.rotation import angles, checked_heads, normed, require, turned

# --- samples --------------------------------------------------------------------------------------

_POSITIONS = 131  # that caches hold


def angles_of_positions(make: SampleMaker, tokens: int, rope_dim: int, place: int) -> tuple[Tensor, Tensor]:
    """A cache and positions, of each dtype in some of the samples."""
    cache = make.randn(_POSITIONS, rope_dim, dtype=torch.float32 if place % 2 == 0 else None).clamp(-1, 1)
    return cache, make.positions(tokens, below=_POSITIONS, dtype=torch.int64 if place % 3 == 0 else torch.int32)


_SHAPES = (
    (7, 4, 2, 64, 64, True, "grouped queries"),
    (1, 32, 8, 128, 128, True, "one token of a real model"),
    (5, 3, 1, 80, 32, True, "a part of each head; lanes without a pair"),
    (300, 2, 1, 64, 64, False, "neighbours; more tokens than positions"),
    (9, 5, 5, 96, 96, True, "as many heads; no power of two"),
    (4, 6, 1, 576, 64, False, "a small part of a wide head"),
    (2, 3, 2, 512, 512, True, "a wide head"),
    (33, 3, 1, 10, 6, True, "an odd half of a rope_dim"),
    (6, 1, 2, 7, 6, False, "an odd head_dim"),
    (2, 2, 1, 1288, 1280, True, "a head that is too wide for registers"),
    (4, 2, 0, 16, 0, False, "no keys, and nothing that turns"),
)


def _per_token(make: SampleMaker) -> Iterator[Sample]:
    for place, (tokens, q_heads, k_heads, head_dim, rope_dim, is_neox, note) in enumerate(_SHAPES):
        q, k = (make.randn(tokens, heads, head_dim) for heads in (q_heads, k_heads))
        yield Sample((q, k, *angles_of_positions(make, tokens, rope_dim, place)), {"is_neox": is_neox}, note=note)


def _one_tensor(make: SampleMaker) -> Iterator[Sample]:
    for place, (tokens, heads, _, head_dim, rope_dim, is_neox, note) in enumerate(_SHAPES):
        angles = angles_of_positions(make, tokens, rope_dim, place)
        yield Sample((make.randn(tokens, heads, head_dim), *angles), {"is_neox": is_neox}, note=note)


def _weights(make: SampleMaker, head_dim: int, place: int) -> list[Tensor]:
    return [make.randn(head_dim, dtype=torch.float32 if place % 4 == 3 else None) for _ in range(2)]


def _normed_per_token(make: SampleMaker) -> Iterator[Sample]:
    for place, sample in enumerate(_per_token(make)):
        q, k, cache, positions = sample.args
        given = (q, k, *_weights(make, q.shape[-1], place), cache, positions, *((1e-5,) if place % 2 else ()))
        yield Sample(given, {**sample.kwargs, "gemma": place % 3 == 1}, note=sample.note)


# --- in place and of one tensor -------------------------------------------------------------------

TURNED = {
    "q": f"[q_rows..., *] {FLOATS} strides [*, 1]",
    "k": "[k_rows..., *] q.dtype strides [*, 1]",
    "cos_sin_cache": f"[max_position, rope_dim] {FLOATS} strides [*, 1]",
    "positions": "[axes..., tokens] int32|int64 strides [*, *]",
}
WEIGHTS = {"q_weight": f"[q_head_dim] {FLOATS}", "k_weight": "[k_head_dim] q_weight.dtype"}


def _check_apply_rope(
    q: Tensor,
    k: Tensor,
    cos_sin_cache: Tensor,
    positions: Tensor,
    *,
    is_neox: bool = True,
    head_dim: int = 0,
    mrope_section: list[int] | None = None,
    mrope_interleaved: bool = False,
) -> None:
    checked_heads({"q": q, "k": k}, cos_sin_cache, positions, head_dim, mrope_section)


@library.op(
    cuda="rope.cu",
    cpu="rope.cpp",
    variant={
        "cuda": "apply_rope<{q.dtype}, {is_neox}, {positions.dim}>",
        "cpu": "apply_rope<{q.dtype}>",
    },
    mutates=("q", "k"),
    tensors=TURNED,
    rows=Rows("q", "k", per_token=("positions",)),
    samples=_per_token,
    fake=_check_apply_rope,
)
def apply_rope(
    q: Tensor,
    k: Tensor,
    cos_sin_cache: Tensor,
    positions: Tensor,
    *,
    is_neox: bool = True,
    head_dim: int = 0,
    mrope_section: list[int] | None = None,
    mrope_interleaved: bool = False,
) -> None:
    """Rotary position embedding of queries and keys, in place and in one launch.

    Args:
        q: ``[tokens, heads, head_dim]``, fp16, bf16 or fp32; tokens and heads may have any strides, as in slices of a QKV
            projection. Or ``[tokens, heads * head_dim]``, whose heads are of ``head_dim`` elements.
        k: as ``q``, of its dtype, with heads of its own.
        cos_sin_cache: ``[max_position, rope_dim]``, fp16, bf16 or fp32: cosines of each pair, then sines. ``rope_dim`` is even
            and at most head_dim; elements of a head behind it stay what they are.
        positions: ``[tokens]``, int32 or int64, of any stride. A position outside the cache is an error, reported as PyTorch
            reports an index out of range.
        is_neox: element i is paired with ``i + rope_dim / 2``; else 2 i with 2 i + 1.
        head_dim: of a ``q`` and a ``k`` with 2 dimensions; 0 for the width of the cache.
        mrope_section: of multimodal RoPE (Qwen2-VL): how many pairs go by a token's time, height and width; ``positions`` are
            then ``[3, tokens]``.
        mrope_interleaved: the three take turns, as in Qwen3-VL: pairs 1, 4, 7, ... go by the height, 2, 5, 8, ... by the width,
            as many as ``mrope_section`` says, and the rest by time.
    """
    heads = checked_heads({"q": q, "k": k}, cos_sin_cache, positions, head_dim, mrope_section)
    cos, sin = angles(cos_sin_cache, positions, is_neox, mrope_section, mrope_interleaved)
    for x in heads:
        x.copy_(turned(x, cos, sin, is_neox))


@library.op(
    cuda="rope.cu",
    cpu="rope.cpp",
    variant={
        "cuda": "rope<{input.dtype}, {is_neox}, {positions.dim}>",
        "cpu": "rope<{input.dtype}>",
    },
    tensors={
        "input": f"[rows..., *] {FLOATS} strides [*, 1]",
        "cos_sin_cache": TURNED["cos_sin_cache"],
        "positions": TURNED["positions"],
        "out": "[rows..., *] input.dtype strides [*, 1]",
    },
    reusable=("input",),
    samples=_one_tensor,
)
def rope(
    input: Tensor,
    cos_sin_cache: Tensor,
    positions: Tensor,
    *,
    is_neox: bool = True,
    head_dim: int = 0,
    mrope_section: list[int] | None = None,
    mrope_interleaved: bool = False,
) -> Tensor:
    """Rotary position embedding of one tensor: ``apply_rope`` with a result.

    Args:
        input: ``[tokens, heads, head_dim]`` or ``[tokens, heads * head_dim]``, as ``q`` of ``apply_rope``.
        cos_sin_cache: ``[max_position, rope_dim]``, fp16, bf16 or fp32: cosines of each pair, then sines.
        positions: ``[tokens]`` or, with ``mrope_section``, ``[3, tokens]``; int32 or int64.
        is_neox: element i is paired with ``i + rope_dim / 2``; else 2 i with 2 i + 1.
        head_dim: of an ``input`` with 2 dimensions; 0 for the width of the cache.
        mrope_section: as of ``apply_rope``.
        mrope_interleaved: as of ``apply_rope``.

    Returns:
        The input's shape, contiguous, of its dtype; computed in fp32 and rounded once.
    """
    (x,) = checked_heads({"input": input}, cos_sin_cache, positions, head_dim, mrope_section)
    cos, sin = angles(cos_sin_cache, positions, is_neox, mrope_section, mrope_interleaved)
    return turned(x, cos, sin, is_neox).reshape(input.shape)


def check_weights(heads: list[Tensor], q_weight: Tensor, k_weight: Tensor) -> None:
    """``heads`` are q and k."""
    for name, weight, x in zip(("q_weight", "k_weight"), (q_weight, k_weight), heads, strict=True):
        require(weight.shape[0] == x.shape[2], f"{name} has {weight.shape[0]} elements, the heads have {x.shape[2]}")


def _check_fused_qknorm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin_cache: Tensor,
    positions: Tensor,
    eps: float = 1e-6,
    *,
    gemma: bool = False,
    is_neox: bool = True,
    head_dim: int = 0,
    mrope_section: list[int] | None = None,
    mrope_interleaved: bool = False,
) -> None:
    heads = checked_heads({"q": q, "k": k}, cos_sin_cache, positions, head_dim, mrope_section)
    check_weights(heads, q_weight, k_weight)


@library.op(
    cuda="rope.cu",
    cpu="rope.cpp",
    variant={
        "cuda": "fused_qknorm_rope<{q.dtype}, {is_neox}, {positions.dim}>",
        "cpu": "fused_qknorm_rope<{q.dtype}>",
    },
    mutates=("q", "k"),
    tensors={**TURNED, **WEIGHTS},
    rows=Rows("q", "k", per_token=("positions",)),
    samples=_normed_per_token,
    fake=_check_fused_qknorm_rope,
)
def fused_qknorm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin_cache: Tensor,
    positions: Tensor,
    eps: float = 1e-6,
    *,
    gemma: bool = False,
    is_neox: bool = True,
    head_dim: int = 0,
    mrope_section: list[int] | None = None,
    mrope_interleaved: bool = False,
) -> None:
    """``fused_qknorm``, then ``apply_rope``, in place and in one pass (as in Qwen3 and Gemma 3).

    What is between the two is not rounded, as in the fused kernels of SGLang and TensorRT-LLM: one rounding less than the ops
    one after the other.

    Args:
        q: as of ``apply_rope``.
        k: as ``q``, of its dtype, with heads and a head_dim of its own.
        q_weight: ``[head_dim]``, fp16, bf16 or fp32.
        k_weight: ``[head_dim]``, dtype of ``q_weight``.
        cos_sin_cache: ``[max_position, rope_dim]``, fp16, bf16 or fp32: cosines of each pair, then sines.
        positions: ``[tokens]`` or, with ``mrope_section``, ``[3, tokens]``; int32 or int64.
        eps: added to the mean square of a head.
        gemma: ``weight + 1`` for the weights, as Gemma stores them.
        is_neox: element i is paired with ``i + rope_dim / 2``; else 2 i with 2 i + 1.
        head_dim: of a ``q`` and a ``k`` with 2 dimensions; 0 for the width of the cache.
        mrope_section: as of ``apply_rope``.
        mrope_interleaved: as of ``apply_rope``.
    """
    heads = checked_heads({"q": q, "k": k}, cos_sin_cache, positions, head_dim, mrope_section)
    check_weights(heads, q_weight, k_weight)
    cos, sin = angles(cos_sin_cache, positions, is_neox, mrope_section, mrope_interleaved)
    for x, weight in zip(heads, (q_weight, k_weight), strict=True):
        x.copy_(turned(normed(x, weight, eps, gemma), cos, sin, is_neox))
