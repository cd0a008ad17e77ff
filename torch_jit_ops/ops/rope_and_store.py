"""Rotary position embedding, and then keys and values into slots of the KV cache: one launch before attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torch_jit_ops.declaring.samples import Sample, SampleMaker
from torch_jit_ops.ops.indices import in_range
from torch_jit_ops.ops.kv_cache import cast_to_store, put_rows
from torch_jit_ops.ops.library import FLOATS, library
from torch_jit_ops.ops.rope_at_positions import TURNED, WEIGHTS, angles_of_positions, check_weights
from torch_jit_ops.ops.rotation import angles, checked_heads, in_heads, normed, require, turned

# --- samples --------------------------------------------------------------------------------------

_STORES = (
    (7, 4, 2, 64, 64, True, (19,), "a token without a slot"),
    (1, 8, 2, 128, 128, True, (40, 4), "one token, pages"),
    (40, 3, 1, 80, 32, False, (3, 16), "a part of each head, almost every slot"),
    (5, 3, 2, 10, 6, True, (9,), "an odd half of a rope_dim"),
    (2, 2, 1, 1288, 1280, False, (6,), "a head that is too wide for registers"),
)


def _stored(make: SampleMaker) -> Iterator[Sample]:
    for place, (tokens, q_heads, k_heads, head_dim, rope_dim, is_neox, slots, note) in enumerate(_STORES):
        q, k, v = (make.randn(tokens, heads, head_dim) for heads in (q_heads, k_heads, k_heads))
        caches = [make.randn(*slots, k_heads, head_dim, dtype=make.dtypes["k_cache"]) for _ in range(2)]
        angles = angles_of_positions(make, tokens, rope_dim, place)
        below = slots[0] * (slots[1] if len(slots) > 1 else 1)
        indices = make.indices(tokens, below=below, unique=True, dtype=torch.int32 if place % 2 else torch.int64)
        if tokens > 2:
            indices[2] = -1
        scales = {}
        if make.dtypes["k_cache"].itemsize == 1 and place % 2 == 0:
            scales = {"k_scale": make.values(0.25, dtype=torch.float32), "v_scale": make.values(0.01, dtype=torch.float32)}
        yield Sample((q, k, v, *caches, *angles, indices), {"is_neox": is_neox, **scales}, note=note)


def _normed_stored(make: SampleMaker) -> Iterator[Sample]:
    for place, sample in enumerate(_stored(make)):
        q, k, v, k_cache, v_cache, *angles = sample.args
        weights = [make.randn(q.shape[-1]) for _ in range(2)]
        given = (q, k, v, k_cache, v_cache, *weights, *angles, *((1e-5,) if place % 2 else ()))
        yield Sample(given, {**sample.kwargs, "gemma": place % 3 == 1}, note=sample.note)


# --- and into the cache ---------------------------------------------------------------------------

_STORED = {
    **TURNED,
    "v": "[v_rows..., *] q.dtype strides [*, 1]",
    "k_cache": f"[k_slots..., *] {FLOATS}|float8_e4m3fn|float8_e5m2 strides [*, 1]",
    "v_cache": "[v_slots..., *] k_cache.dtype strides [*, 1]",
    "indices": "[tokens] int32|int64 strides [*]",
}
_STORED_DTYPES = {
    "q": (torch.float16, torch.bfloat16, torch.float32),
    "k_cache": (torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2),
}


def _in_slots(name: str, cache: Tensor, x: Tensor) -> Tensor:
    """A view with the shape ``[blocks, slots, heads, head_dim]``, for rows of ``x``."""
    heads, head_dim = x.shape[1:]
    shape = list(cache.shape)
    if cache.dim() == 2:
        require(shape[1] == heads * head_dim, f"{name} has rows of {shape[1]} elements, expected {heads} heads of {head_dim}")
        return cache.view(shape[0], heads, head_dim).unsqueeze(0)
    if cache.dim() not in (3, 4):
        raise ValueError(f"{name} must be [slots, heads, head_dim] or [blocks, slots, heads, head_dim], got {shape}")
    require(shape[-2] == heads, f"{name} has {shape[-2]} heads, expected {heads}")
    require(shape[-1] == head_dim, f"{name} has heads of {shape[-1]} elements, expected {head_dim}")
    return cache if cache.dim() == 4 else cache.unsqueeze(0)


def _checked_stores(
    heads: list[Tensor], caches: tuple[Tensor, Tensor], indices: Tensor, scales: tuple[Tensor | None, Tensor | None]
) -> list[Tensor]:
    """The caches, as blocks of slots. ``heads`` are q, k and v."""
    _, k, v = heads
    require(v.shape[1] == k.shape[1], f"v has {v.shape[1]} heads, k has {k.shape[1]}")
    require(indices.shape[0] == k.shape[0], f"indices are of {indices.shape[0]} tokens, the first argument has {k.shape[0]}")
    slots = [_in_slots(name, cache, x) for name, cache, x in zip(("k_cache", "v_cache"), caches, (k, v), strict=True)]
    same = [slots[0].shape[i] == slots[1].shape[i] for i in range(2)]
    for condition in same:
        require(condition, f"v_cache has slots {list(slots[1].shape[:2])}, k_cache has {list(slots[0].shape[:2])}")
    for name, scale in zip(("k_scale", "v_scale"), scales, strict=True):
        if scale is not None and (scale.numel() != 1 or scale.dtype not in (torch.float32, torch.float64)):
            raise ValueError(f"{name} must be one float32, got {list(scale.shape)} of {scale.dtype}")
    for name, scale, cache in zip(("k", "v"), scales, caches, strict=True):
        # In float64, as tests compute the truth, nothing has 8 bits.
        if scale is not None and cache.dtype.itemsize != 1 and scale.dtype != torch.float64:
            raise ValueError(f"{name}_scale is for caches of 8-bit floats, but {name}_cache is {cache.dtype}")
    return slots


def _store(heads: list[Tensor], slots: list[Tensor], indices: Tensor, *scales: Tensor | None) -> None:
    for x, cache, scale in zip(heads, slots, scales, strict=True):
        put_rows(cast_to_store(x, cache.dtype, scale), cache, 2, indices, indices >= 0)


def _heads_to_store(
    q: Tensor, k: Tensor, v: Tensor, cos_sin_cache: Tensor, positions: Tensor, head_dim: int, mrope_section: list[int] | None
) -> list[Tensor]:
    turned = checked_heads({"q": q, "k": k}, cos_sin_cache, positions, head_dim, mrope_section)
    heads = in_heads("v", v, head_dim or cos_sin_cache.shape[1])
    require(heads.shape[0] == turned[0].shape[0], f"v has {heads.shape[0]} tokens, the first argument has {turned[0].shape[0]}")
    return [*turned, heads]


def _check_apply_rope_store_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cos_sin_cache: Tensor,
    positions: Tensor,
    indices: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    is_neox: bool = True,
    head_dim: int = 0,
    mrope_section: list[int] | None = None,
    mrope_interleaved: bool = False,
) -> None:
    heads = _heads_to_store(q, k, v, cos_sin_cache, positions, head_dim, mrope_section)
    _checked_stores(heads, (k_cache, v_cache), indices, (k_scale, v_scale))


@library.op(
    cuda="rope.cu",
    cpu="rope.cpp",
    variant={
        "cuda": "apply_rope_store_kv<{q.dtype}, {k_cache.dtype}, {is_neox}, {positions.dim}>",
        "cpu": "apply_rope_store_kv<{q.dtype}>",
    },
    dtypes=_STORED_DTYPES,
    mutates=("q", "k", "k_cache", "v_cache"),
    tensors=_STORED,
    samples=_stored,
    fake=_check_apply_rope_store_kv,
)
def apply_rope_store_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cos_sin_cache: Tensor,
    positions: Tensor,
    indices: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    is_neox: bool = True,
    head_dim: int = 0,
    mrope_section: list[int] | None = None,
    mrope_interleaved: bool = False,
) -> None:
    """``apply_rope``, and then ``k`` and ``v`` into slots of the KV cache, in one launch.

    Args:
        q: as of ``apply_rope``.
        k: as ``q``, of its dtype, with heads of its own. It is turned in place, and stored as it is rounded there.
        v: ``[tokens, k_heads, v_head_dim]`` or ``[tokens, k_heads * v_head_dim]``, dtype of ``q``; any strides.
        k_cache: ``[slots, k_heads, head_dim]``, ``[slots, k_heads * head_dim]`` or, where a slot is counted through blocks,
            ``[blocks, slots of a block, k_heads, head_dim]``; fp16, bf16, fp32, fp8 e4m3 or e5m2. Any strides with a dense last
            dimension. What fp8 cannot hold saturates.
        v_cache: as ``k_cache``, with the head_dim of ``v``.
        cos_sin_cache: ``[max_position, rope_dim]``, fp16, bf16 or fp32: cosines of each pair, then sines.
        positions: ``[tokens]`` or, with ``mrope_section``, ``[3, tokens]``; int32 or int64.
        indices: ``[tokens]``, int32 or int64: the slot of each token, or -1 for none. One outside the cache is an error. Where
            two tokens have one slot, each of its elements is one of theirs, and which is not said.
        k_scale: one fp32, by which what is stored is divided first; for a cache of 8-bit floats alone.
        v_scale: as ``k_scale``.
        is_neox: element i is paired with ``i + rope_dim / 2``; else 2 i with 2 i + 1.
        head_dim: of a ``q``, ``k`` and ``v`` with 2 dimensions; 0 for the width of the cache of cosines.
        mrope_section: as of ``apply_rope``.
        mrope_interleaved: as of ``apply_rope``.
    """
    heads = _heads_to_store(q, k, v, cos_sin_cache, positions, head_dim, mrope_section)
    slots = _checked_stores(heads, (k_cache, v_cache), indices, (k_scale, v_scale))
    in_range(indices, slots[0].shape[0] * slots[0].shape[1], "indices", skip=True)
    cos, sin = angles(cos_sin_cache, positions, is_neox, mrope_section, mrope_interleaved)
    for x in heads[:2]:
        x.copy_(turned(x, cos, sin, is_neox))
    _store(heads[1:], slots, indices, k_scale, v_scale)


def _check_fused_qknorm_rope_store_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin_cache: Tensor,
    positions: Tensor,
    indices: Tensor,
    eps: float = 1e-6,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    gemma: bool = False,
    is_neox: bool = True,
    head_dim: int = 0,
    mrope_section: list[int] | None = None,
    mrope_interleaved: bool = False,
) -> None:
    heads = _heads_to_store(q, k, v, cos_sin_cache, positions, head_dim, mrope_section)
    check_weights(heads[:2], q_weight, k_weight)
    _checked_stores(heads, (k_cache, v_cache), indices, (k_scale, v_scale))


@library.op(
    cuda="rope.cu",
    cpu="rope.cpp",
    variant={
        "cuda": "fused_qknorm_rope_store_kv<{q.dtype}, {k_cache.dtype}, {is_neox}, {positions.dim}>",
        "cpu": "fused_qknorm_rope_store_kv<{q.dtype}>",
    },
    dtypes=_STORED_DTYPES,
    mutates=("q", "k", "k_cache", "v_cache"),
    tensors={**_STORED, **WEIGHTS},
    samples=_normed_stored,
    fake=_check_fused_qknorm_rope_store_kv,
)
def fused_qknorm_rope_store_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin_cache: Tensor,
    positions: Tensor,
    indices: Tensor,
    eps: float = 1e-6,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    gemma: bool = False,
    is_neox: bool = True,
    head_dim: int = 0,
    mrope_section: list[int] | None = None,
    mrope_interleaved: bool = False,
) -> None:
    """``fused_qknorm_rope``, and then ``k`` and ``v`` into slots of the KV cache: all that is between the QKV projection and
    attention, in one launch.

    Args:
        q: as of ``apply_rope``.
        k: as ``q``, of its dtype, with heads of its own. It is normed and turned in place, and stored as it is rounded there.
        v: ``[tokens, k_heads, v_head_dim]`` or ``[tokens, k_heads * v_head_dim]``, dtype of ``q``; any strides.
        k_cache: ``[slots, k_heads, head_dim]``, ``[slots, k_heads * head_dim]`` or, where a slot is counted through blocks,
            ``[blocks, slots of a block, k_heads, head_dim]``; fp16, bf16, fp32, fp8 e4m3 or e5m2. Any strides with a dense last
            dimension. What fp8 cannot hold saturates.
        v_cache: as ``k_cache``, with the head_dim of ``v``.
        q_weight: ``[head_dim]``, fp16, bf16 or fp32.
        k_weight: ``[head_dim]``, dtype of ``q_weight``.
        cos_sin_cache: ``[max_position, rope_dim]``, fp16, bf16 or fp32: cosines of each pair, then sines.
        positions: ``[tokens]`` or, with ``mrope_section``, ``[3, tokens]``; int32 or int64.
        indices: ``[tokens]``, int32 or int64: the slot of each token, or -1 for none. One outside the cache is an error. Where
            two tokens have one slot, each of its elements is one of theirs, and which is not said.
        eps: added to the mean square of a head.
        k_scale: one fp32, by which what is stored is divided first; for a cache of 8-bit floats alone.
        v_scale: as ``k_scale``.
        gemma: ``weight + 1`` for the weights, as Gemma stores them.
        is_neox: element i is paired with ``i + rope_dim / 2``; else 2 i with 2 i + 1.
        head_dim: of a ``q``, ``k`` and ``v`` with 2 dimensions; 0 for the width of the cache of cosines.
        mrope_section: as of ``apply_rope``.
        mrope_interleaved: as of ``apply_rope``.
    """
    heads = _heads_to_store(q, k, v, cos_sin_cache, positions, head_dim, mrope_section)
    check_weights(heads[:2], q_weight, k_weight)
    slots = _checked_stores(heads, (k_cache, v_cache), indices, (k_scale, v_scale))
    in_range(indices, slots[0].shape[0] * slots[0].shape[1], "indices", skip=True)
    cos, sin = angles(cos_sin_cache, positions, is_neox, mrope_section, mrope_interleaved)
    for x, weight in zip(heads[:2], (q_weight, k_weight), strict=True):
        x.copy_(turned(normed(x, weight, eps, gemma), cos, sin, is_neox))
    _store(heads[1:], slots, indices, k_scale, v_scale)
