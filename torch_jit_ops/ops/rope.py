"""Rotary position embedding (Su et al., arXiv:2104.09864): of queries and keys, with what stands around it in a model.

Each pair of elements of a head turns by an angle that its token's position and its own place decide. In GPT-NeoX's form, which
Llama, Qwen and Gemma have, element i is paired with element ``i + rope_dim / 2``; in GPT-J's, which GLM and DeepSeek have, with
its neighbour. Elements behind ``rope_dim`` pass through.

Arithmetic is fp32 whatever the input, and the output is rounded once. (Hugging Face's form rounds both products and their sum
where cosines and sines have the dtype of a half, so it is up to one and a half units in the last place of the larger product
away. vLLM's and SGLang's kernels round once, there as here, if the cache is fp32.)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torch_jit_ops.declaring.rows import Rows
from torch_jit_ops.declaring.samples import Sample, SampleMaker
from torch_jit_ops.ops.indices import in_range
from torch_jit_ops.ops.library import FLOATS, library


def _wide(x: Tensor) -> Tensor:
    """fp32 of a half type; fp32 and fp64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _partners(x: Tensor, is_neox: bool) -> Tensor:
    """In the place of each element the other one of its pair, negative where that is the second."""
    if is_neox:
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, is_neox: bool) -> Tensor:
    """``cos`` and ``sin`` have an entry for each element; what is behind the last of them passes through."""
    rope_dim = cos.shape[-1]
    wide = _wide(x[..., :rope_dim])
    turned = wide * cos + _partners(wide, is_neox) * sin
    return torch.cat((turned.to(x.dtype), x[..., rope_dim:]), -1)


def _normed(x: Tensor, weight: Tensor, eps: float, gemma: bool) -> Tensor:
    """Not rounded."""
    wide = _wide(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide * scale * (_wide(weight) + 1 if gemma else weight)


# --- what arguments must be -----------------------------------------------------------------------


def _require(condition: bool | torch.SymBool, text: str) -> None:
    if isinstance(condition, torch.SymBool):
        torch._check(condition, lambda: text)
    elif not condition:
        raise ValueError(text)


def _check_rope_dim(rope_dim: int, head_dim: int) -> None:
    if rope_dim % 2 != 0 or rope_dim > head_dim:
        raise ValueError(f"rope_dim must be even and at most head_dim, {head_dim}, got {rope_dim}")


def _in_heads(name: str, x: Tensor, head_dim: int) -> Tensor:
    """A view with the shape ``[tokens, heads, head_dim]``."""
    if x.dim() == 3:
        return x
    if x.dim() != 2:
        raise ValueError(f"{name} must have 3 dimensions, or 2 if heads lie side by side, got {list(x.shape)}")
    if head_dim <= 0 or x.shape[1] % head_dim != 0:
        raise ValueError(f"{name} has rows of {x.shape[1]} elements, which are no heads of {head_dim}")
    return x.unflatten(1, (x.shape[1] // head_dim, head_dim))


def _check_positions(positions: Tensor, tokens: int, cos_sin_cache: Tensor, mrope_section: list[int] | None) -> None:
    if positions.dim() not in (1, 2) or (positions.dim() == 2) != (mrope_section is not None):
        wanted = "[tokens]" if mrope_section is None else "[3, tokens], as mrope_section is given"
        raise ValueError(f"positions must be {wanted}, got {list(positions.shape)}")
    if mrope_section is not None:
        half = cos_sin_cache.shape[1] // 2
        _require(
            positions.shape[0] == 3, f"positions must be [3, tokens], as mrope_section is given, got {list(positions.shape)}"
        )
        if len(mrope_section) != 3 or min(mrope_section) < 0 or sum(mrope_section) != half:
            raise ValueError(f"mrope_section must be 3 numbers whose sum is rope_dim / 2, {half}, got {list(mrope_section)}")
    _require(positions.shape[-1] == tokens, f"positions are of {positions.shape[-1]} tokens, the first argument has {tokens}")


def _checked_heads(
    given: dict[str, Tensor], cos_sin_cache: Tensor, positions: Tensor, head_dim: int, mrope_section: list[int] | None
) -> list[Tensor]:
    """The tensors that turn, with a dimension of heads."""
    if cos_sin_cache.dim() != 2 or cos_sin_cache.shape[1] % 2 != 0:
        raise ValueError(
            f"cos_sin_cache must be [max_position, rope_dim] with an even rope_dim, got {list(cos_sin_cache.shape)}"
        )
    rope_dim = cos_sin_cache.shape[1]
    heads = [_in_heads(name, x, head_dim or rope_dim) for name, x in given.items()]
    tokens = heads[0].shape[0]
    for name, x in zip(given, heads, strict=True):
        _require(x.shape[0] == tokens, f"{name} has {x.shape[0]} tokens, the first argument has {tokens}")
        if head_dim > 0:
            _require(x.shape[2] == head_dim, f"{name} has heads of {x.shape[2]} elements, head_dim is {head_dim}")
        _check_rope_dim(rope_dim, x.shape[2])
    _check_positions(positions, tokens, cos_sin_cache, mrope_section)
    return heads


# --- angles of positions --------------------------------------------------------------------------


def _of_sections(rows: Tensor, section: list[int], interleaved: bool) -> Tensor:
    """Of ``[3, tokens, pairs]`` the entry of the position that each pair goes by."""
    time, height, width = rows.unbind(0)
    if not interleaved:
        return torch.cat([part[axis] for axis, part in enumerate(rows.split(section, -1))], -1)
    pair = torch.arange(rows.shape[-1], device=rows.device)
    by_height = (pair % 3 == 1) & (pair < 3 * section[1])
    by_width = (pair % 3 == 2) & (pair < 3 * section[2])
    return torch.where(by_height, height, torch.where(by_width, width, time))


def _angles(
    cos_sin_cache: Tensor, positions: Tensor, is_neox: bool, mrope_section: list[int] | None, mrope_interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Cosines and sines for each element of ``[tokens, heads, rope_dim]``."""
    in_range(positions, cos_sin_cache.shape[0], "positions")
    halves = cos_sin_cache[positions].chunk(2, -1)
    if mrope_section is not None:
        halves = tuple(_of_sections(half, mrope_section, mrope_interleaved) for half in halves)
    both = [torch.cat((half, half), -1) if is_neox else half.repeat_interleave(2, -1) for half in halves]
    return both[0].unsqueeze(1), both[1].unsqueeze(1)


# --- samples --------------------------------------------------------------------------------------

_POSITIONS = 131  # that caches hold


def _angles_of_positions(make: SampleMaker, tokens: int, rope_dim: int, place: int) -> tuple[Tensor, Tensor]:
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
        yield Sample((q, k, *_angles_of_positions(make, tokens, rope_dim, place)), {"is_neox": is_neox}, note=note)


def _one_tensor(make: SampleMaker) -> Iterator[Sample]:
    for place, (tokens, heads, _, head_dim, rope_dim, is_neox, note) in enumerate(_SHAPES):
        angles = _angles_of_positions(make, tokens, rope_dim, place)
        yield Sample((make.randn(tokens, heads, head_dim), *angles), {"is_neox": is_neox}, note=note)


def _weights(make: SampleMaker, head_dim: int, place: int) -> list[Tensor]:
    return [make.randn(head_dim, dtype=torch.float32 if place % 4 == 3 else None) for _ in range(2)]


def _normed_per_token(make: SampleMaker) -> Iterator[Sample]:
    for place, sample in enumerate(_per_token(make)):
        q, k, cache, positions = sample.args
        given = (q, k, *_weights(make, q.shape[-1], place), cache, positions, *((1e-5,) if place % 2 else ()))
        yield Sample(given, {**sample.kwargs, "gemma": place % 3 == 1}, note=sample.note)


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
        angles = _angles_of_positions(make, tokens, rope_dim, place)
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


# --- in place and of one tensor -------------------------------------------------------------------

_TURNED = {
    "q": f"[q_rows..., *] {FLOATS} strides [*, 1]",
    "k": "[k_rows..., *] q.dtype strides [*, 1]",
    "cos_sin_cache": f"[max_position, rope_dim] {FLOATS} strides [*, 1]",
    "positions": "[axes..., tokens] int32|int64 strides [*, *]",
}
_WEIGHTS = {"q_weight": f"[q_head_dim] {FLOATS}", "k_weight": "[k_head_dim] q_weight.dtype"}
_STORED = {
    **_TURNED,
    "v": "[v_rows..., *] q.dtype strides [*, 1]",
    "k_cache": f"[k_slots..., *] {FLOATS}|float8_e4m3fn|float8_e5m2 strides [*, 1]",
    "v_cache": "[v_slots..., *] k_cache.dtype strides [*, 1]",
    "indices": "[tokens] int32|int64 strides [*]",
}
_STORED_DTYPES = {
    "q": (torch.float16, torch.bfloat16, torch.float32),
    "k_cache": (torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2),
}


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
    _checked_heads({"q": q, "k": k}, cos_sin_cache, positions, head_dim, mrope_section)


@library.op(
    cuda="rope.cu",
    cpu="rope.cpp",
    variant={
        "cuda": "apply_rope<{q.dtype}, {is_neox}, {positions.dim}>",
        "cpu": "apply_rope<{q.dtype}>",
    },
    mutates=("q", "k"),
    tensors=_TURNED,
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
    heads = _checked_heads({"q": q, "k": k}, cos_sin_cache, positions, head_dim, mrope_section)
    cos, sin = _angles(cos_sin_cache, positions, is_neox, mrope_section, mrope_interleaved)
    for x in heads:
        x.copy_(_turned(x, cos, sin, is_neox))


@library.op(
    cuda="rope.cu",
    cpu="rope.cpp",
    variant={
        "cuda": "rope<{input.dtype}, {is_neox}, {positions.dim}>",
        "cpu": "rope<{input.dtype}>",
    },
    tensors={
        "input": f"[rows..., *] {FLOATS} strides [*, 1]",
        "cos_sin_cache": _TURNED["cos_sin_cache"],
        "positions": _TURNED["positions"],
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
    (x,) = _checked_heads({"input": input}, cos_sin_cache, positions, head_dim, mrope_section)
    cos, sin = _angles(cos_sin_cache, positions, is_neox, mrope_section, mrope_interleaved)
    return _turned(x, cos, sin, is_neox).reshape(input.shape)


def _check_weights(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> None:
    for name, weight, x in (("q_weight", q_weight, q), ("k_weight", k_weight, k)):
        _require(weight.shape[0] == x.shape[2], f"{name} has {weight.shape[0]} elements, the heads have {x.shape[2]}")


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
    heads = _checked_heads({"q": q, "k": k}, cos_sin_cache, positions, head_dim, mrope_section)
    _check_weights(*heads, q_weight, k_weight)


@library.op(
    cuda="rope.cu",
    cpu="rope.cpp",
    variant={
        "cuda": "fused_qknorm_rope<{q.dtype}, {is_neox}, {positions.dim}>",
        "cpu": "fused_qknorm_rope<{q.dtype}>",
    },
    mutates=("q", "k"),
    tensors={**_TURNED, **_WEIGHTS},
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
    heads = _checked_heads({"q": q, "k": k}, cos_sin_cache, positions, head_dim, mrope_section)
    _check_weights(*heads, q_weight, k_weight)
    cos, sin = _angles(cos_sin_cache, positions, is_neox, mrope_section, mrope_interleaved)
    for x, weight in zip(heads, (q_weight, k_weight), strict=True):
        x.copy_(_turned(_normed(x, weight, eps, gemma), cos, sin, is_neox))


# --- and into the cache ---------------------------------------------------------------------------


def _in_slots(name: str, cache: Tensor, x: Tensor) -> Tensor:
    """A view with the shape ``[blocks, slots, heads, head_dim]``, for rows of ``x``."""
    heads, head_dim = x.shape[1:]
    shape = list(cache.shape)
    if cache.dim() == 2:
        _require(shape[1] == heads * head_dim, f"{name} has rows of {shape[1]} elements, expected {heads} heads of {head_dim}")
        return cache.unflatten(1, (heads, head_dim)).unsqueeze(0)
    if cache.dim() not in (3, 4):
        raise ValueError(f"{name} must be [slots, heads, head_dim] or [blocks, slots, heads, head_dim], got {shape}")
    _require(shape[-2] == heads, f"{name} has {shape[-2]} heads, expected {heads}")
    _require(shape[-1] == head_dim, f"{name} has heads of {shape[-1]} elements, expected {head_dim}")
    return cache if cache.dim() == 4 else cache.unsqueeze(0)


def _checked_stores(
    heads: list[Tensor], caches: tuple[Tensor, Tensor], indices: Tensor, scales: tuple[Tensor | None, Tensor | None]
) -> list[Tensor]:
    """The caches, as blocks of slots. ``heads`` are q, k and v."""
    _, k, v = heads
    _require(v.shape[1] == k.shape[1], f"v has {v.shape[1]} heads, k has {k.shape[1]}")
    _require(indices.shape[0] == k.shape[0], f"indices are of {indices.shape[0]} tokens, the first argument has {k.shape[0]}")
    slots = [_in_slots(name, cache, x) for name, cache, x in zip(("k_cache", "v_cache"), caches, (k, v), strict=True)]
    same = [slots[0].shape[i] == slots[1].shape[i] for i in range(2)]
    for condition in same:
        _require(condition, f"v_cache has slots {list(slots[1].shape[:2])}, k_cache has {list(slots[0].shape[:2])}")
    for name, scale in zip(("k_scale", "v_scale"), scales, strict=True):
        if scale is not None and (scale.numel() != 1 or scale.dtype not in (torch.float32, torch.float64)):
            raise ValueError(f"{name} must be one float32, got {list(scale.shape)} of {scale.dtype}")
    return slots


def _store(x: Tensor, slots: Tensor, indices: Tensor, scale: Tensor | None) -> None:
    kept = indices >= 0
    rows, places = x[kept], indices[kept].long()
    if scale is not None:
        rows = _wide(rows) / scale.reshape(())
    if slots.dtype.itemsize == 1:
        rows = rows.clamp(-torch.finfo(slots.dtype).max, torch.finfo(slots.dtype).max)
    slots[places // slots.shape[1], places % slots.shape[1]] = rows.to(slots.dtype)


def _heads_to_store(
    q: Tensor, k: Tensor, v: Tensor, cos_sin_cache: Tensor, positions: Tensor, head_dim: int, mrope_section: list[int] | None
) -> list[Tensor]:
    turned = _checked_heads({"q": q, "k": k}, cos_sin_cache, positions, head_dim, mrope_section)
    heads = _in_heads("v", v, head_dim or cos_sin_cache.shape[1])
    _require(
        heads.shape[0] == turned[0].shape[0], f"v has {heads.shape[0]} tokens, the first argument has {turned[0].shape[0]}"
    )
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
            two tokens have one slot it holds either's row.
        k_scale: one fp32, by which what is stored is divided first: the scale of a cache of 8-bit floats.
        v_scale: as ``k_scale``.
        is_neox: element i is paired with ``i + rope_dim / 2``; else 2 i with 2 i + 1.
        head_dim: of a ``q``, ``k`` and ``v`` with 2 dimensions; 0 for the width of the cache of cosines.
        mrope_section: as of ``apply_rope``.
        mrope_interleaved: as of ``apply_rope``.
    """
    heads = _heads_to_store(q, k, v, cos_sin_cache, positions, head_dim, mrope_section)
    slots = _checked_stores(heads, (k_cache, v_cache), indices, (k_scale, v_scale))
    in_range(indices, slots[0].shape[0] * slots[0].shape[1], "indices", skip=True)
    cos, sin = _angles(cos_sin_cache, positions, is_neox, mrope_section, mrope_interleaved)
    for x in heads[:2]:
        x.copy_(_turned(x, cos, sin, is_neox))
    for x, cache, scale in zip(heads[1:], slots, (k_scale, v_scale), strict=True):
        _store(x, cache, indices, scale)


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
    _check_weights(*heads[:2], q_weight, k_weight)
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
    tensors={**_STORED, **_WEIGHTS},
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
            two tokens have one slot it holds either's row.
        eps: added to the mean square of a head.
        k_scale: one fp32, by which what is stored is divided first: the scale of a cache of 8-bit floats.
        v_scale: as ``k_scale``.
        gemma: ``weight + 1`` for the weights, as Gemma stores them.
        is_neox: element i is paired with ``i + rope_dim / 2``; else 2 i with 2 i + 1.
        head_dim: of a ``q``, ``k`` and ``v`` with 2 dimensions; 0 for the width of the cache of cosines.
        mrope_section: as of ``apply_rope``.
        mrope_interleaved: as of ``apply_rope``.
    """
    heads = _heads_to_store(q, k, v, cos_sin_cache, positions, head_dim, mrope_section)
    _check_weights(*heads[:2], q_weight, k_weight)
    slots = _checked_stores(heads, (k_cache, v_cache), indices, (k_scale, v_scale))
    in_range(indices, slots[0].shape[0] * slots[0].shape[1], "indices", skip=True)
    cos, sin = _angles(cos_sin_cache, positions, is_neox, mrope_section, mrope_interleaved)
    for x, weight in zip(heads[:2], (q_weight, k_weight), strict=True):
        x.copy_(_turned(_normed(x, weight, eps, gemma), cos, sin, is_neox))
    for x, cache, scale in zip(heads[1:], slots, (k_scale, v_scale), strict=True):
        _store(x, cache, indices, scale)


# --- Hugging Face's form --------------------------------------------------------------------------

_HEADS = "[batch, *, *, head_dim]"
_QK = {
    "q": f"{_HEADS} {FLOATS} strides [*, *, *, 1]",
    "k": f"{_HEADS} q.dtype strides [*, *, *, 1]",
    "cos": f"[*, tokens, rope_dim] {FLOATS} strides [*, *, 1]",
    "sin": "[*, tokens, rope_dim] cos.dtype strides [*, *, 1]",
    "q_out": f"{_HEADS} q.dtype strides [*, *, *, 1]",
    "k_out": f"{_HEADS} q.dtype strides [*, *, *, 1]",
}
_QK_GRADIENT = {
    "grad_q": _QK["q"],
    "grad_k": f"{_HEADS} grad_q.dtype strides [*, *, *, 1]",
    "cos": _QK["cos"],
    "sin": _QK["sin"],
    "q_grad": f"{_HEADS} grad_q.dtype strides [*, *, *, 1]",
    "k_grad": f"{_HEADS} grad_q.dtype strides [*, *, *, 1]",
}


def _check_angles(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int) -> None:
    if unsqueeze_dim not in (1, 2):
        raise ValueError(f"unsqueeze_dim must be 1 or 2, got {unsqueeze_dim}")
    tokens_dim = 3 - unsqueeze_dim
    for name, x in (("q", q), ("k", k)):
        tokens = x.shape[tokens_dim]
        _require(tokens == cos.shape[1], f"dimension {tokens_dim} of {name}: it has {tokens} tokens, cos has {cos.shape[1]}")
    for name, x in (("cos", cos), ("sin", sin)):
        if x.shape[0] != 1:
            _require(x.shape[0] == q.shape[0], f"{name} must be for a batch of 1 or {q.shape[0]}, got {x.shape[0]}")
    _check_rope_dim(cos.shape[-1], q.shape[-1])


def _angles_per_token(make: SampleMaker, batch: int, tokens: int, rope_dim: int, dtype: torch.dtype | None) -> list[Tensor]:
    """Of halves that are not equal, and of no angle: nothing of the ops' promises depends on that."""
    return [make.randn(batch, tokens, rope_dim, dtype=dtype).clamp(-1, 1) for _ in range(2)]


def _heads_first(make: SampleMaker) -> Iterator[Sample]:
    for batch, q_heads, k_heads, tokens, head_dim, rope_dim, shared, is_neox, dtype, note in (
        (2, 4, 1, 7, 64, 64, False, True, None, "grouped queries"),
        (2, 3, 3, 5, 80, 32, True, True, None, "as in Phi: a part of each head, angles of all batches"),
        (1, 8, 2, 9, 128, 64, False, False, torch.float32, "as in GLM: half of each head, of neighbours, fp32 angles"),
        (3, 2, 1, 1, 96, 96, False, True, torch.float32, "one token; no power of two"),
        (1, 2, 2, 33, 10, 6, True, True, None, "an odd half of a rope_dim"),
        (2, 1, 1, 4, 7, 6, False, False, None, "an odd head_dim"),
        (1, 2, 1, 3, 512, 512, True, True, None, "a wide head"),
        (1, 2, 1, 3, 1288, 1280, False, False, None, "a head that is too wide for registers"),
        (2, 2, 1, 3, 16, 0, False, True, None, "nothing that turns"),
    ):
        q, k = (make.randn(batch, heads, tokens, head_dim) for heads in (q_heads, k_heads))
        angles = _angles_per_token(make, 1 if shared else batch, tokens, rope_dim, dtype)
        yield Sample((q, k, *angles), {"is_neox": is_neox}, note=note)
    q, k = make.randn(2, 6, 4, 64), make.randn(2, 6, 2, 64)
    yield Sample((q, k, *_angles_per_token(make, 2, 6, 64, None)), {"unsqueeze_dim": 2}, note="heads behind tokens")


def _gradients(make: SampleMaker) -> Iterator[Sample]:
    for sample in _heads_first(make):
        yield Sample(sample.args, sample.kwargs, note=f"gradients: {sample.note}")


def _adjoint(sin: Tensor, is_neox: bool) -> Tensor:
    """The sines that turn back what ``sin`` turned: negative, and those of a pair exchanged."""
    if is_neox:
        first, second = sin.chunk(2, -1)
        return torch.cat((-second, -first), -1)
    return torch.stack((-sin[..., 1::2], -sin[..., ::2]), -1).flatten(-2)


def _dense(grad: Tensor) -> Tensor:
    """As kernels read it; the gradient of a sum has a stride of 0."""
    return grad if grad.stride(-1) == 1 else grad.contiguous()


def _gradient_of_angles(
    grads: tuple[Tensor, Tensor], qk: tuple[Tensor, Tensor], cos: Tensor, sin: Tensor, is_neox: bool, unsqueeze_dim: int
) -> tuple[Tensor, Tensor]:
    """Sums over the heads that an angle turned, of queries and keys, and over all batches if it turned them all."""
    of_cos, of_sin = 0, 0
    for grad, x in zip(grads, qk, strict=True):
        wide_grad, wide = (_wide(each[..., : cos.shape[-1]]) for each in (grad, x))
        of_cos = of_cos + (wide_grad * wide).sum(unsqueeze_dim)
        of_sin = of_sin + (wide_grad * _partners(wide, is_neox)).sum(unsqueeze_dim)
    return of_cos.sum_to_size(cos.shape).to(cos.dtype), of_sin.sum_to_size(sin.shape).to(sin.dtype)


def _differentiate_rope_qk(
    grad_q: Tensor, grad_k: Tensor, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, is_neox: bool, unsqueeze_dim: int
) -> tuple[Tensor | None, ...]:
    of_angles: tuple[Tensor | None, Tensor | None] = (None, None)
    if cos.requires_grad or sin.requires_grad:
        of_angles = _gradient_of_angles((grad_q, grad_k), (q, k), cos, sin, is_neox, unsqueeze_dim)
    options = {"is_neox": is_neox, "unsqueeze_dim": unsqueeze_dim}
    return *rope_qk_backward(_dense(grad_q), _dense(grad_k), cos, sin, **options), *of_angles


def _differentiate_rope_qk_backward(
    q: Tensor, k: Tensor, grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor, is_neox: bool, unsqueeze_dim: int
) -> tuple[Tensor | None, ...]:
    """``q`` and ``k`` are gradients of the gradients, which turn forward again."""
    of_angles: tuple[Tensor | None, Tensor | None] = (None, None)
    if cos.requires_grad or sin.requires_grad:
        of_angles = _gradient_of_angles((grad_q, grad_k), (q, k), cos, sin, is_neox, unsqueeze_dim)
    return *rope_qk(_dense(q), _dense(k), cos, sin, is_neox=is_neox, unsqueeze_dim=unsqueeze_dim), *of_angles


@library.op(
    cuda="rope.cu",
    cpu="rope.cpp",
    variant={
        "cuda": "rope_qk<{q.dtype}, {is_neox}>",
        "cpu": "rope_qk<{q.dtype}>",
    },
    outputs=("q_out", "k_out"),
    tensors=_QK,
    samples=_heads_first,
    backward=_differentiate_rope_qk,
)
def rope_qk(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, is_neox: bool = True, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of queries and keys by cosines and sines of each token, as in Hugging Face's models.

    ``x * cos + partner * sin`` for each element of the first ``rope_dim`` of a head, where its partner is the other one
    of its pair, negative if that is the second. The others pass through.

    Args:
        q: ``[batch, heads, tokens, head_dim]``, fp16, bf16 or fp32; any strides with a dense last dimension. With
            ``unsqueeze_dim=2`` it is ``[batch, tokens, heads, head_dim]``.
        k: as ``q``, with heads of its own.
        cos: ``[batch, tokens, rope_dim]`` or ``[1, tokens, rope_dim]``, fp16, bf16 or fp32: an entry for each element, so the
            two of a pair may have cosines of their own. ``rope_dim`` is even and at most head_dim.
        sin: shape and dtype of ``cos``; it may have another batch, 1 or that of ``q``.
        is_neox: element i is paired with ``i + rope_dim / 2``; else 2 i with 2 i + 1.
        unsqueeze_dim: the dimension of heads, 1 or 2.

    Returns:
        The shapes of ``q`` and ``k``, contiguous, of their dtype; computed in fp32 and rounded once. Attention that reads heads
        behind tokens, as FlashAttention does, is served best by ``unsqueeze_dim=2``, whose results need no copy.
    """
    _check_angles(q, k, cos, sin, unsqueeze_dim)
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _turned(q, cos, sin, is_neox), _turned(k, cos, sin, is_neox)


@library.op(
    cuda="rope.cu",
    cpu="rope.cpp",
    variant={
        "cuda": "rope_qk_backward<{grad_q.dtype}, {is_neox}>",
        "cpu": "rope_qk_backward<{grad_q.dtype}>",
    },
    outputs=("q_grad", "k_grad"),
    tensors=_QK_GRADIENT,
    samples=_gradients,
    backward=_differentiate_rope_qk_backward,
)
def rope_qk_backward(
    grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor, *, is_neox: bool = True, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """The gradients of ``rope_qk``: the rotation by the negative angle, where the two of a pair have the same one.

    Where they have not, it is the adjoint all the same: the sines change places with their signs.

    Args:
        grad_q: of the first result: shape and dtype of ``q``; any strides with a dense last dimension.
        grad_k: of the second result, as ``grad_q``.
        cos: that of ``rope_qk``.
        sin: that of ``rope_qk``.
        is_neox: that of ``rope_qk``.
        unsqueeze_dim: that of ``rope_qk``.

    Returns:
        The gradients of ``q`` and ``k``, contiguous, of their dtype; computed in fp32 and rounded once.
    """
    _check_angles(grad_q, grad_k, cos, sin, unsqueeze_dim)
    cos, sin = cos.unsqueeze(unsqueeze_dim), _adjoint(sin, is_neox).unsqueeze(unsqueeze_dim)
    return _turned(grad_q, cos, sin, is_neox), _turned(grad_k, cos, sin, is_neox)
