"""Rows of keys and values into the slots of a KV cache and out of it, as they are or as 8-bit floats.

A cache is flat, ``[slots, ...]``, or in blocks, ``[blocks, block_size, ...]``, where slot ``block * block_size + offset`` is at
``[block, offset]``. Behind these dimensions lies a row: ``[width]`` or ``[heads, head_dim]``, for tokens the one and for slots
the other, if need be. Only the last dimension must be dense, so a cache may be a part of a larger tensor: of K and V in one, or
of ``[blocks, heads, block_size, head_dim]`` seen with heads and slots exchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_jit_ops.declaring.samples import Sample, SampleMaker
from torch_jit_ops.ops.indices import in_range
from torch_jit_ops.ops.library import INTEGERS, WORDS, library
from torch_jit_ops.ops.rotation import require, wide

_WIDE = (torch.float16, torch.bfloat16, torch.float32)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


# --- what arguments must be: include/jitk/slots.h and cache_dtype.h, for those that reach no kernel ---------


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _require(condition: bool | torch.SymBool, text: str) -> None:
    require(condition, text, RuntimeError)


def _check_rows(name: str, x: Tensor) -> None:
    shape = list(x.shape)
    _require(x.dim() in (2, 3), f"argument '{name}' must be [tokens, width] or [tokens, heads, head_dim], got {shape}")


def _check_one_each(indices_name: str, indices: Tensor, name: str, x: Tensor) -> None:
    _require(
        indices.shape[0] == x.shape[0],
        f"argument '{indices_name}' must have one for each of the {x.shape[0]} tokens of '{name}', got {list(indices.shape)}",
    )


def _leading(cache_name: str, cache: Tensor, name: str, x: Tensor) -> int:
    """How many dimensions of the cache are before those of a row: 1 or 2."""
    row = x.shape[1:]
    same = cache.dim() - len(row)
    if same in (1, 2) and tuple(cache.shape[same:]) == tuple(row):
        return same
    other = cache.dim() - (3 - len(row))  # heads are a dimension here, and not there
    if other in (1, 2) and cache.shape[other:].numel() == row.numel():
        return other
    sizes = [*map(str, row)]
    raise RuntimeError(
        f"argument '{cache_name}' has no slots for the rows of '{name}'\n"
        f"  expected  [{', '.join(['slots', *sizes])}] or [{', '.join(['blocks', 'block_size', *sizes])}]\n"
        f"  got       {list(cache.shape)}"
    )


def _check_size(name: str, x: Tensor) -> None:
    known = x.element_size() in WORDS
    _require(known, f"argument '{name}' must have elements of 1, 2, 4 or 8 bytes, got {_name(x.dtype)}")


def _check_dtypes(name: str, x: Tensor, cache_name: str, cache: Tensor) -> None:
    if x.dtype == cache.dtype:
        _check_size(name, x)
    elif x.dtype not in _WIDE or cache.dtype not in _FP8:
        text = f"argument '{cache_name}' cannot hold what '{name}' has\n  expected  {_name(x.dtype)}"
        text += ", float8_e4m3fn or float8_e5m2" if x.dtype in _WIDE else ""
        text += f"\n  got       {_name(cache.dtype)}"
        if x.dtype in _WIDE and cache.dtype == torch.uint8:
            text += f"\n  remedy: if its bytes are 8-bit floats, pass {cache_name}.view(torch.float8_e4m3fn)"
        raise RuntimeError(text)


def _check_scale(name: str, scale: Tensor | None) -> None:
    if scale is not None:
        _require(scale.numel() == 1, f"argument '{name}' must hold one number, got {list(scale.shape)}")


def _check_is_fp8(name: str, scale: Tensor | None, cache_name: str, cache: Tensor) -> None:
    # In float64, as tests compute the truth, nothing has 8 bits.
    _require(
        scale is None or cache.dtype in _FP8 or scale.dtype == torch.float64,
        f"argument '{name}' is for caches of 8-bit floats, but '{cache_name}' is {_name(cache.dtype)}",
    )


def _count(cache: Tensor, leading: int) -> int:
    return cache.shape[:leading].numel()


def _check_tokens(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    tokens, shape = other.shape[0], list(x.shape)
    _require(x.shape[0] == tokens, f"argument '{name}' must have the {tokens} tokens of '{other_name}', got {shape}")


def _check_as_many(name: str, slots: int, other_name: str, others: int) -> None:
    _require(slots == others, f"argument '{name}' must have the {others} slots of '{other_name}', got {slots}")


def _check_store(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    indices: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    _check_scale("k_scale", k_scale)
    _check_scale("v_scale", v_scale)
    _check_rows("k", k)
    _check_rows("v", v)
    _check_tokens("v", v, "k", k)
    _check_one_each("indices", indices, "k", k)
    slots = _count(k_cache, _leading("k_cache", k_cache, "k", k))
    _check_as_many("v_cache", _count(v_cache, _leading("v_cache", v_cache, "v", v)), "k_cache", slots)
    _check_dtypes("k", k, "k_cache", k_cache)
    _check_is_fp8("k_scale", k_scale, "k_cache", k_cache)
    _check_is_fp8("v_scale", v_scale, "v_cache", v_cache)


def _check_mla(latent: Tensor, rope: Tensor, cache: Tensor, indices: Tensor, scale: Tensor | None = None) -> None:
    _check_scale("scale", scale)
    for name, x in (("latent", latent), ("rope", rope)):
        _require(
            x.dim() == 2 or (x.dim() == 3 and x.shape[1] == 1),
            f"argument '{name}' must be [tokens, width] or [tokens, 1, width], got {list(x.shape)}",
        )
    _check_tokens("rope", rope, "latent", latent)
    _check_one_each("indices", indices, "latent", latent)
    width = latent.shape[-1] + rope.shape[-1]
    _require(
        cache.dim() in (2, 3, 4) and cache.shape[-1] == width and (cache.dim() < 4 or cache.shape[2] == 1),
        "argument 'cache' has no slots for the rows of 'latent' and 'rope'\n"
        f"  expected  [slots, {width}] or [blocks, block_size, {width}], or with 1 before {width}\n"
        f"  got       {list(cache.shape)}",
    )
    _check_dtypes("latent", latent, "cache", cache)
    _check_is_fp8("scale", scale, "cache", cache)


def _check_gather(
    cache: Tensor, indices: Tensor, scale: Tensor | None, page_size: int, dtype: torch.dtype | None
) -> torch.dtype:
    """The dtype of what is gathered."""
    _check_scale("scale", scale)
    _require(
        cache.dim() in (2, 3, 4),
        "argument 'cache' must be [slots, width], [slots, heads, head_dim] or [blocks, block_size, heads, head_dim], "
        f"got {list(cache.shape)}",
    )
    slots = _count(cache, _leading_of(cache))
    _require(page_size >= 1, f"page_size must be at least 1, got {page_size}")
    _require(slots % page_size == 0, f"page_size must divide the {slots} slots of 'cache', got {page_size}")
    _check_is_fp8("scale", scale, "cache", cache)
    to = dtype or (cache.dtype if scale is None else torch.bfloat16)
    if scale is None and to == cache.dtype:
        _check_size("cache", cache)
        return to
    of_fp8 = cache.dtype in _FP8
    if cache.dtype == torch.float64:  # the truth of tests
        return to
    expected = _name(cache.dtype if scale is None else torch.bfloat16)
    if of_fp8:
        expected += ", bfloat16, float16 or float32" if scale is None else ", float16 or float32"
    _require(of_fp8 and to in _WIDE, f"dtype of what is gathered from 'cache'\n  expected  {expected}\n  got       {_name(to)}")
    return to


def _leading_of(cache: Tensor) -> int:
    return 2 if cache.dim() == 4 else 1


def _check_downcast(
    k: Tensor,
    v: Tensor,
    k_out: Tensor,
    v_out: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    loc: Tensor,
    mult: int = 1,
    offset: int = 0,
) -> None:
    _check_scale("k_scale", k_scale)
    _check_scale("v_scale", v_scale)
    _check_rows("k", k)
    _check_rows("v", v)
    _check_tokens("v", v, "k", k)
    _check_one_each("loc", loc, "k", k)
    for name, x, out in (("k", k, k_out), ("v", v, v_out)):
        sizes = ", ".join(["rows", *map(str, x.shape[1:])])
        _require(
            out.shape[1:] == x.shape[1:],
            f"argument '{name}_out' has no place for the rows of '{name}'\n"
            f"  expected  [{sizes}]\n  got       {list(out.shape)}",
        )
    _check_as_many("v_out", v_out.shape[0], "k_out", k_out.shape[0])
    _require(mult >= 1, f"mult must be at least 1, got {mult}")
    _require(offset >= 0, f"offset must be at least 0, got {offset}")


# --- the work -------------------------------------------------------------------------------------


def cast_to_store(x: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    """What a cache of ``dtype`` holds of ``x``; saturated in 8 bits."""
    if scale is not None:
        x = wide(x) / scale.reshape(())
    if dtype != x.dtype and dtype in _FP8:
        largest = torch.finfo(dtype).max
        x = x.clamp(-largest, largest)
    return x.to(dtype)


def _bits(x: Tensor) -> Tensor:
    """For PyTorch's indexing, which does not know every dtype."""
    return x.view(WORDS[x.element_size()])


def _at(cache: Tensor, leading: int, slots: Tensor) -> tuple[Tensor, ...]:
    return (slots,) if leading == 1 else (slots // cache.shape[1], slots % cache.shape[1])


def put_rows(rows: Tensor, cache: Tensor, leading: int, slots: Tensor, kept: Tensor) -> None:
    """Rows of the cache's dtype into its slots, those that are kept."""
    given = _bits(rows)[kept]
    _bits(cache)[_at(cache, leading, slots[kept].long())] = given.reshape(given.shape[0], *cache.shape[leading:])


# --- samples --------------------------------------------------------------------------------------


def _slots(make: SampleMaker, tokens: int, slots: int, *skipped: int, name: str = "indices") -> Tensor:
    """A slot for each token but for those that are skipped."""
    made = make.indices(tokens, below=slots, unique=True, dtype=make.dtypes[name])
    made[list(skipped)] = -1
    return made


def _scale(make: SampleMaker, value: float) -> Tensor:
    return make.kept(make.values(value, dtype=torch.float32))


def _tokens_and_slots(make: SampleMaker) -> Iterator[Sample]:
    def sample(tokens: int, row: tuple[int, ...], cache: tuple[int, ...], indices: Tensor, note: str) -> Sample:
        rows = [make.randn(tokens, *row) for _ in range(2)]
        return Sample((*rows, *(make.randn(*cache) for _ in range(2)), indices), note=note)

    def in_8_bits(row: tuple[int, ...], fp8: torch.dtype, scales: Sequence[float], note: str) -> Sample:
        wide = make.dtype in _WIDE  # others are copied as they are
        rows = [make.randn(7, *row, scale=200) for _ in range(2)]
        caches = [make.randn(4, 4, *row, dtype=fp8 if wide else make.dtype) for _ in range(2)]
        given = [_scale(make, scale) for scale in scales] if wide else []
        return Sample((*rows, *caches, _slots(make, 7, 16, 3), *given), note=note)

    yield sample(7, (2, 64), (16, 2, 64), _slots(make, 7, 16, 2, 5), "two without a slot")
    yield sample(9, (3, 11), (3, 5, 3, 11), _slots(make, 9, 15, 0), "a block table, odd widths")
    narrow = make.randn(3, 24), make.randn(3, 8), make.randn(5, 3, 8), make.randn(5, 8), _slots(make, 3, 5)
    yield Sample(narrow, note="K and V of different widths, heads in the cache alone")
    yield in_8_bits((2, 64), torch.float8_e4m3fn, (), "saturated values in 8 bits")
    yield in_8_bits((2, 33), torch.float8_e5m2, (0.37, 4.0), "scales, odd widths")


def _latents(make: SampleMaker) -> Iterator[Sample]:
    yield Sample((make.randn(7, 512), make.randn(7, 64), make.randn(16, 576), _slots(make, 7, 16, 2)), note="as in DeepSeek")
    parts = make.randn(9, 1, 33), make.randn(9, 1, 7)
    yield Sample((*parts, make.randn(3, 5, 1, 40), _slots(make, 9, 15)), note="blocks, odd widths, one head")
    wide = make.dtype in _WIDE
    cache = make.randn(2, 4, 80, dtype=torch.float8_e4m3fn if wide else make.dtype)
    parts = make.randn(5, 64, scale=200), make.randn(5, 16, scale=200)
    given = [_scale(make, 0.37)] if wide else []
    yield Sample((*parts, cache, _slots(make, 5, 8), *given), note="8-bit floats with a scale")


def _pages(make: SampleMaker) -> Iterator[Sample]:
    def sample(cache: Tensor, indices: Tensor, *scale: Tensor, note: str, **options: Any) -> Sample:
        return Sample((cache, indices, *scale), options, note, has_tokens=False)

    def widened(indices: Tensor, scale: float, dtype: torch.dtype, note: str) -> Sample:
        fp8 = make.dtype in _FP8
        given = [_scale(make, scale)] if fp8 else []
        return sample(make.randn(16, 33), indices, *given, note=note, **({"dtype": dtype} if fp8 else {}))

    yield sample(make.randn(16, 2, 64), _slots(make, 7, 16, 2), note="rows, one of zeros")
    yield sample(make.randn(6, 4, 2, 16), _slots(make, 3, 6, 1), page_size=4, note="blocks")
    twice = make.indices(9, below=4, dtype=make.dtypes["indices"])
    yield sample(make.randn(12, 24), twice, page_size=3, note="flat rows, pages more than once")
    yield widened(_slots(make, 7, 16, 2), 0.37, torch.float16, "a scale undone, odd width")
    yield widened(_slots(make, 7, 16), -2.0, torch.float32, "a negative one")


def _to_downcast(make: SampleMaker) -> Iterator[Sample]:
    def sample(
        tokens: int, row: tuple[int, ...], rows: int, loc: Tensor, mult: int = 1, offset: int = 0, note: str = ""
    ) -> Sample:
        tensors = [make.randn(tokens, *row, scale=100) for _ in range(2)]
        outs = [make.randn(rows, *row, dtype=make.dtypes["k_out"]) for _ in range(2)]
        return Sample((*tensors, *outs, _scale(make, 0.37), _scale(make, 2.0), loc, mult, offset), note=note)

    yield sample(7, (2, 64), 16, _slots(make, 7, 16, 2, name="loc"), note="saturated values")
    yield sample(5, (3, 11), 33, _slots(make, 5, 8, name="loc"), 4, 3, note="every fourth row, odd widths")


# --- ops ------------------------------------------------------------------------------------------

_SCALE = "float32|float64"  # float64 has no kernels, and runs the functions


@library.op(
    cuda="kv_cache.cu",
    cpu="kv_cache.cpp",
    variant="store_kv_cache<{indices.dtype}>",
    dtypes={"k": (*_WIDE, torch.int8, torch.float8_e4m3fn), "indices": INTEGERS},
    mutates=("k_cache", "v_cache"),
    tensors={
        "k": "[k_shape..., *] strides [*, 1]",
        "v": "[v_shape..., *] k.dtype strides [*, 1]",
        "k_cache": "[k_cache_shape..., *] strides [*, 1]",
        "v_cache": "[v_cache_shape..., *] k_cache.dtype strides [*, 1]",
        "indices": "[*] int32|int64 strides [*]",
        "k_scale": f"[k_scale_shape...] {_SCALE}",
        "v_scale": f"[v_scale_shape...] {_SCALE}",
    },
    fake=_check_store,
    samples=_tokens_and_slots,
)
def store_kv_cache(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    indices: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """``k_cache[indices] = k`` and ``v_cache[indices] = v``: a row of keys and one of values for each token, in one launch.

    Args:
        k: ``[tokens, width]`` or ``[tokens, heads, head_dim]``, of any dtype; tokens and heads may have any stride.
        v: the same for values, of the dtype of ``k``; its width is its own.
        k_cache: ``[slots, ...]`` or ``[blocks, block_size, ...]`` with a row of ``k``; any strides but a dense last dimension.
            Of the dtype of ``k``, or fp8 (e4m3fn or e5m2) for fp16, bf16 and fp32.
        v_cache: the same for ``v``, with as many slots, of the dtype of ``k_cache``.
        indices: ``[tokens]``, int32 or int64: the slot of each token, ``block * block_size + offset`` in blocks. -1 stores
            nothing. What a slot holds that several tokens name is not said.
        k_scale: one fp32 number on the device, for an fp8 cache: ``k / k_scale`` is stored.
        v_scale: the same for ``v``.
    """
    _check_store(k, v, k_cache, v_cache, indices, k_scale, v_scale)
    k_leading = _leading("k_cache", k_cache, "k", k)
    in_range(indices, _count(k_cache, k_leading), "indices", skip=True)
    kept = indices >= 0
    put_rows(cast_to_store(k, k_cache.dtype, k_scale), k_cache, k_leading, indices, kept)
    put_rows(cast_to_store(v, v_cache.dtype, v_scale), v_cache, _leading("v_cache", v_cache, "v", v), indices, kept)


@library.op(
    cuda="kv_cache.cu",
    cpu="kv_cache.cpp",
    variant="store_mla_cache<{indices.dtype}>",
    dtypes={"latent": (*_WIDE, torch.int8), "indices": INTEGERS},
    mutates=("cache",),
    tensors={
        "latent": "[latent_shape..., *] strides [*, 1]",
        "rope": "[rope_shape..., *] latent.dtype strides [*, 1]",
        "cache": "[cache_shape..., *] strides [*, 1]",
        "indices": "[*] int32|int64 strides [*]",
        "scale": f"[scale_shape...] {_SCALE}",
    },
    fake=_check_mla,
    samples=_latents,
)
def store_mla_cache(latent: Tensor, rope: Tensor, cache: Tensor, indices: Tensor, scale: Tensor | None = None) -> None:
    """``cache[indices] = torch.cat((latent, rope), -1)``, each byte written once: the cache of MLA.

    Args:
        latent: ``[tokens, width]`` or ``[tokens, 1, width]``, of any dtype; tokens may have any stride.
        rope: the same for the rotated part, of the dtype of ``latent``; its width is its own.
        cache: ``[slots, width]`` or ``[blocks, block_size, width]``, or with 1 before the width, which is that of both parts.
            Any strides but a dense last dimension. Of the dtype of ``latent``, or fp8 (e4m3fn or e5m2) for fp16, bf16 and fp32.
        indices: ``[tokens]``, as for ``store_kv_cache``.
        scale: one fp32 number on the device, for an fp8 cache: both parts over ``scale`` are stored.
    """
    _check_mla(latent, rope, cache, indices, scale)
    leading = 1 if cache.dim() == 2 else 2
    in_range(indices, _count(cache, leading), "indices", skip=True)
    kept, split = indices >= 0, latent.shape[-1]
    for x, part in ((latent, cache[..., :split]), (rope, cache[..., split:])):
        put_rows(cast_to_store(x, cache.dtype, scale), part, leading, indices, kept)


@library.op(
    cuda="kv_cache.cu",
    cpu="kv_cache.cpp",
    variant="gather_kv_cache<{indices.dtype}>",
    dtypes={"cache": (*_WIDE, torch.int8, *_FP8), "indices": INTEGERS},
    tensors={
        "cache": "[cache_shape..., *] strides [*, 1]",
        "indices": "[*] int32|int64 strides [*]",
        "scale": f"[scale_shape...] {_SCALE}",
        "out": "[out_shape..., *] strides [*, 1]",
    },
    samples=_pages,
)
def gather_kv_cache(
    cache: Tensor,
    indices: Tensor,
    scale: Tensor | None = None,
    *,
    page_size: int = 1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``cache[indices]``: rows of a cache, or whole pages of them, one behind the other.

    Args:
        cache: ``[slots, width]``, ``[slots, heads, head_dim]`` or ``[blocks, block_size, heads, head_dim]``, of any dtype; any
            strides but a dense last dimension.
        indices: ``[n]``, int32 or int64: pages, of which page ``i`` is the slots from ``i * page_size`` on. -1 gives zeros.
        scale: one fp32 number on the device, for an fp8 cache: the result is multiplied by it, in fp32.
        page_size: slots of a page; the number of slots is a multiple of it.
        dtype: of the result: that of the cache, or fp16, bf16 or fp32 of an fp8 cache. Default: that of the cache, but bf16
            where there is a scale.

    Returns:
        ``[n * page_size, width]`` or ``[n * page_size, heads, head_dim]``, contiguous.
    """
    to = _check_gather(cache, indices, scale, page_size, dtype)
    leading = _leading_of(cache)
    slots = _count(cache, leading)
    in_range(indices, slots // page_size, "indices", skip=True)
    pages = indices.long().unsqueeze(1)
    of_pages = (pages.clamp(min=0) * page_size + torch.arange(page_size, device=cache.device)).reshape(-1)
    if slots == 0:
        return cache.new_zeros((of_pages.shape[0], *cache.shape[leading:]), dtype=to)
    # Integers for those dtypes that have no derivative, which PyTorch's indexing may not know.
    source = cache if cache.dtype.is_floating_point and cache.element_size() > 1 else _bits(cache)
    rows = source[_at(cache, leading, of_pages)]
    is_copy = scale is None and to == cache.dtype
    if not is_copy:
        rows = rows.view(cache.dtype) if source is not cache else rows
        rows = (rows if scale is None else rows.float() * scale.reshape(())).to(to)
    kept = (pages >= 0).expand(-1, page_size).reshape(-1, *[1] * (rows.dim() - 1))
    rows = torch.where(kept, rows, torch.zeros((), dtype=rows.dtype, device=rows.device))
    return rows.view(to) if is_copy and source is not cache else rows


@library.op(
    cuda="kv_cache.cu",
    cpu="kv_cache.cpp",
    variant="downcast_fp8<{loc.dtype}>",
    dtypes={"k": _WIDE, "k_out": (*_FP8, torch.uint8), "loc": INTEGERS},
    mutates=("k_out", "v_out"),
    tensors={
        "k": "[k_shape..., *] float16|bfloat16|float32|float64 strides [*, 1]",
        "v": "[v_shape..., *] k.dtype strides [*, 1]",
        "k_out": "[k_out_shape..., *] float8_e4m3fn|float8_e5m2|uint8|float64 strides [*, 1]",
        "v_out": "[v_out_shape..., *] k_out.dtype strides [*, 1]",
        "k_scale": f"[k_scale_shape...] {_SCALE}",
        "v_scale": f"[v_scale_shape...] {_SCALE}",
        "loc": "[*] int32|int64 strides [*]",
    },
    fake=_check_downcast,
    samples=_to_downcast,
)
def downcast_fp8(
    k: Tensor,
    v: Tensor,
    k_out: Tensor,
    v_out: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    loc: Tensor,
    mult: int = 1,
    offset: int = 0,
) -> None:
    """``k_out[loc * mult + offset] = k / k_scale`` and the same of v, as fp8: saturated, NaN kept.

    Args:
        k: ``[tokens, heads, head_dim]`` or ``[tokens, width]``, fp16, bf16 or fp32; tokens and heads may have any stride.
        v: the same for values; its width is its own.
        k_out: ``[rows, heads, head_dim]`` or ``[rows, width]``, e4m3fn or e5m2, or uint8 that holds the bytes of e4m3fn.
        v_out: the same for ``v``, with as many rows, of the dtype of ``k_out``.
        k_scale: one fp32 number on the device.
        v_scale: the same for ``v``.
        loc: ``[tokens]``, int32 or int64. -1 writes nothing.
        mult: what ``loc`` is multiplied by, at least 1.
        offset: what is added then, at least 0.
    """
    _check_downcast(k, v, k_out, v_out, k_scale, v_scale, loc, mult, offset)
    rows = k_out.shape[0] - offset
    in_range(loc, -(-rows // mult) if rows > 0 else 0, "loc", skip=True)
    kept = loc >= 0
    for x, out, scale in ((k, k_out, k_scale), (v, v_out, v_scale)):
        to = torch.float8_e4m3fn if out.dtype == torch.uint8 else out.dtype
        put_rows(cast_to_store(x, to, scale).view(out.dtype), out, 1, loc * mult + offset, kept)
