"""Copies between KV caches by index lists: of device memory, of pinned host memory, and from one to the other.

A cache is one tensor, or for several layers a list of one tensor each. An index names an *item*, a place along the first
dimension, and all that lies behind it is copied. So the layout of a cache is in its strides, and nothing else has to be said of
it. For a list of layers, made once with ``unbind``:

========================================  =====================================  ==========================
the cache                                 its layers                             an item
========================================  =====================================  ==========================
a tensor for each layer                   the list itself                        a row, or a page
``[layers, slots, heads, head_dim]``      ``cache.unbind(0)``                    a row
``[layers, pages, page_size, ...]``       ``cache.unbind(0)``                    a page of each layer
``[slots, layers, heads, head_dim]``      ``cache.unbind(1)``                    a row (page first, by rows)
``[pages, layers, page_size, ...]``       ``cache.unbind(1)``                    a page (page first)
========================================  =====================================  ==========================

``layer.unflatten(0, (-1, page_size))`` makes items of pages where they were rows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from torch_jit_ops.declaring.samples import Sample, SampleMaker
from torch_jit_ops.ops.indices import in_range
from torch_jit_ops.ops.library import INTEGERS, WORDS, library

_INDICES = {"indices_dst": "[items] int32|int64", "indices_src": "[items] indices_dst.dtype"}
_PATIENCE = 60.0  # seconds, as in transfer.cu


# --- what is refused, in the words of items.h ------------------------------------------------------


def _facts(count: object, tensor: Tensor) -> str:
    return f"[{', '.join(map(str, (count, *tensor.shape[1:])))}]  {str(tensor.dtype).removeprefix('torch.')}"


def _same_items(a: Tensor, b: Tensor, first: int) -> bool:
    if a.dim() != b.dim() or a.dtype != b.dtype:
        return False
    return all(one == other for one, other in zip(a.shape[first:], b.shape[first:], strict=True))


def _refuse(name: str, tensor: Tensor, like_name: str, like: Tensor, what: str) -> None:
    count = like.shape[0] if what == "layers" else "*"
    raise RuntimeError(
        f"argument {name!r} does not match\n  expected  {_facts(count, like)}\n  got       {_facts(tensor.shape[0], tensor)}\n"
        f"  {what} are those of {like_name!r}"
    )


def _match_layers(name: str, layers: Sequence[Tensor], is_list: bool) -> None:
    for index, layer in enumerate(layers):
        if layer.dim() == 0:
            raise RuntimeError(f"argument '{_item(name, index, is_list)}' must have a dimension of items, got a scalar")
        if not _same_items(layer, layers[0], 0):
            _refuse(_item(name, index, is_list), layer, _item(name, 0, is_list), layers[0], "layers")


def _item(name: str, index: int, is_list: bool) -> str:
    return f"{name}[{index}]" if is_list else name


def _match(
    k_dst: Sequence[Tensor],
    v_dst: Sequence[Tensor],
    k_src: Sequence[Tensor],
    v_src: Sequence[Tensor],
    max_blocks: int,
    is_list: bool,
) -> None:
    """Refuse caches between which there is no copy."""
    pairs = (("k_dst", k_dst, "k_src", k_src), ("v_dst", v_dst, "v_src", v_src))
    for dst_name, dst, src_name, src in pairs:
        if len(dst) != len(src):
            raise RuntimeError(f"argument {src_name!r} must have as many layers as {dst_name!r}, got {len(src)} and {len(dst)}")
        _match_layers(dst_name, dst, is_list)
        _match_layers(src_name, src, is_list)
        if dst and not _same_items(src[0], dst[0], 1):
            _refuse(_item(src_name, 0, is_list), src[0], _item(dst_name, 0, is_list), dst[0], "items")
    if v_dst and len(v_dst) != len(k_dst):
        raise RuntimeError(f"argument 'v_dst' must have as many layers as 'k_dst', or none, got {len(v_dst)} and {len(k_dst)}")
    for side, k, v in (("dst", k_dst, v_dst), ("src", k_src, v_src)):
        if v and v[0].shape[0] != k[0].shape[0]:
            raise RuntimeError(
                f"argument 'v_{side}' must have as many items as 'k_{side}', got {v[0].shape[0]} and {k[0].shape[0]}"
            )
    if max_blocks < 0:
        raise RuntimeError(f"argument 'max_blocks' must be 0 or more, got {max_blocks}")


# --- what the ops do ------------------------------------------------------------------------------


def _copy(dst: Tensor, indices_dst: Tensor, src: Tensor, indices_src: Tensor) -> None:
    word = WORDS.get(dst.itemsize, dst.dtype)
    items = src.view(word).index_select(0, indices_src.to(src.device))
    dst.view(word).index_copy_(0, indices_dst.to(dst.device, torch.int64), items.to(dst.device))


def _transfer(
    k_dst: Sequence[Tensor],
    v_dst: Sequence[Tensor],
    indices_dst: Tensor,
    k_src: Sequence[Tensor],
    v_src: Sequence[Tensor],
    indices_src: Tensor,
) -> None:
    if not k_dst:
        return
    in_range(indices_dst, k_dst[0].shape[0], "indices_dst")
    in_range(indices_src, k_src[0].shape[0], "indices_src")
    for dst, src in zip((*k_dst, *v_dst), (*k_src, *v_src), strict=True):
        _copy(dst, indices_dst, src, indices_src)


def _one(tensor: Tensor | None) -> list[Tensor]:
    return [] if tensor is None else [tensor]


# --- samples --------------------------------------------------------------------------------------


def _lists(make: SampleMaker, items: int, dst: int, src: int) -> tuple[Tensor, Tensor]:
    dtype = make.dtypes["indices_dst"]
    return make.indices(items, below=dst, unique=True, dtype=dtype), make.indices(items, below=src, dtype=dtype)


def _one_layer(make: SampleMaker) -> Iterator[Sample]:
    def sample(
        note: str, items: int, k_dst: Tensor, v_dst: Tensor | None, k_src: Tensor, v_src: Tensor | None, *, max_blocks: int = 0
    ) -> Sample:
        to, where = _lists(make, items, k_dst.shape[0], k_src.shape[0])
        return Sample((k_dst, v_dst, to, k_src, v_src, where), {"max_blocks": max_blocks}, note, has_tokens=False)

    def rows(slots: int, *row: int) -> list[Tensor]:
        return [make.randn(slots, *row) for _ in range(2)]

    yield sample("rows", 7, *rows(16, 2, 64), *rows(11, 2, 64))
    yield sample("MLA: no values", 33, make.randn(40, 1, 72), None, make.randn(40, 1, 72), None, max_blocks=1)
    host = make.randn(4, 3, 16, 2, 2, 8)[:, 1]
    yield sample("pages first, keys beside values", 3, *rows(5, 16, 2, 8), *host.unbind(2))
    other = make.randn(9, 3), make.randn(9, 10), make.randn(6, 3), make.randn(6, 10)
    yield sample("an odd row; other values", 5, *other, max_blocks=2)
    yield sample("no items", 0, *rows(3, 4), *rows(3, 4))
    yield sample("an item is an element", 19, make.randn(20), None, make.randn(30), None)
    yield sample("a long row", 2, *rows(2, 4096), *rows(2, 4096))


def _all_layers(make: SampleMaker) -> Iterator[Sample]:
    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return make.randn(*shape, dtype=dtype)

    def each(layers: int, *shape: int) -> list[Tensor]:
        return [random(*shape) for _ in range(layers)]

    def sample(note: str, items: int, *caches: Sequence[Tensor], flags: bool = False) -> Sample:
        k_dst, v_dst, k_src, v_src = map(list, caches)
        to, where = _lists(make, items, k_dst[0].shape[0], k_src[0].shape[0])
        arrived = make.kept(make.values(*[0] * len(k_dst), dtype=torch.int32)) if flags else None
        return Sample((k_dst, v_dst, to, k_src, v_src, where, arrived), note=note, has_tokens=False)

    def pair(layers: int, *shape: int) -> list[list[Tensor]]:
        return [each(layers, *shape) for _ in range(2)]

    yield sample("rows", 7, *pair(3, 16, 2, 64), *pair(3, 11, 2, 64), flags=True)
    host = [random(6, 4, 16, 2, 8).unbind(1) for _ in range(2)]
    yield sample("from pages first", 5, *pair(4, 5, 16, 2, 8), *host)
    host = [random(6, 4, 2, 8).unbind(1) for _ in range(2)]
    yield sample("to rows first", 5, *host, *(random(4, 9, 2, 8).unbind(0) for _ in range(2)), flags=True)
    narrow = [random(3, 12, 1, 52, dtype=torch.float8_e4m3fn).unbind(0) for _ in range(2)]
    yield sample("MLA in 8 bits: no values", 12, narrow[0], [], narrow[1], [])
    yield sample("no items, and yet they have arrived", 0, each(2, 3, 8), [], each(2, 3, 8), [], flags=True)


def _waits(make: SampleMaker) -> Iterator[Sample]:
    for layer, note in ((0, "the first layer"), (2, "the last layer; no values")):
        arrived = make.kept(make.values(1, 0, 1, dtype=torch.int32))
        v = None if layer else make.randn(4, 8)
        yield Sample((make.randn(4, 8), v, arrived, layer), note=note, has_tokens=False)


# --- ops ------------------------------------------------------------------------------------------


def _fake_one_layer(
    k_dst: Tensor,
    v_dst: Tensor | None,
    indices_dst: Tensor,
    k_src: Tensor,
    v_src: Tensor | None,
    indices_src: Tensor,
    *,
    max_blocks: int = 0,
) -> None:
    _match(_one(k_dst), _one(v_dst), _one(k_src), _one(v_src), max_blocks, is_list=False)


@library.op(
    cuda="transfer.cu",
    cpu="transfer.cpp",
    variant="transfer_kv_one_layer<{indices_dst.dtype}>",
    dtypes={"k_dst": (torch.bfloat16, torch.uint8), "indices_dst": INTEGERS},
    mutates=("k_dst", "v_dst"),
    tensors=_INDICES,
    fake=_fake_one_layer,
    samples=_one_layer,
)
def transfer_kv_one_layer(
    k_dst: Tensor,
    v_dst: Tensor | None,
    indices_dst: Tensor,
    k_src: Tensor,
    v_src: Tensor | None,
    indices_src: Tensor,
    *,
    max_blocks: int = 0,
) -> None:
    """``k_dst[indices_dst] = k_src[indices_src]``, and the same of v, between caches on a GPU and in pinned host memory.

    An index names a row, or a page: all that lies behind a place of the first dimension. Each cache is on the GPU of the
    indices or in pinned memory of the CPU, whichever side it is. The call returns at once, as every kernel's does: keep pinned
    tensors until the stream is done with them, as PyTorch's allocator does not know of it. An index that is out of range is an
    error; where ``indices_dst`` names an item twice, one of the two is left there.

    Args:
        k_dst: ``[slots or pages, ...]`` of any dtype; items of dense rows in equal steps, with any stride from item to item.
        v_dst: the same with as many items, perhaps of another shape; None for MLA, which has one cache.
        indices_dst: ``[items]``, int32 or int64, on the GPU.
        k_src: items of the shape and dtype of ``k_dst``'s, with strides of their own.
        v_src: items of the shape and dtype of ``v_dst``'s.
        indices_src: ``[items]``, dtype of ``indices_dst``.
        max_blocks: of the GPU's blocks, each of which takes most of one SM, so that others can compute meanwhile; 0 for what
            fills the link to the host, or for all SMs where both sides are on the GPU.
    """
    caches = _one(k_dst), _one(v_dst), _one(k_src), _one(v_src)
    _match(*caches, max_blocks, is_list=False)
    _transfer(*caches[:2], indices_dst, *caches[2:], indices_src)


def _match_flags(k_dst: Sequence[Tensor], arrived: Tensor | None) -> None:
    if arrived is not None and arrived.shape[0] != len(k_dst):
        raise RuntimeError(f"argument 'arrived' must have a flag for each layer, got {arrived.shape[0]} for {len(k_dst)}")


def _fake_all_layers(
    k_dst: list[Tensor],
    v_dst: list[Tensor],
    indices_dst: Tensor,
    k_src: list[Tensor],
    v_src: list[Tensor],
    indices_src: Tensor,
    arrived: Tensor | None = None,
    *,
    max_blocks: int = 0,
) -> None:
    _match_flags(k_dst, arrived)
    _match(k_dst, v_dst, k_src, v_src, max_blocks, is_list=True)


@library.op(
    cuda="transfer.cu",
    cpu="transfer.cpp",
    variant="transfer_kv_all_layers<{indices_dst.dtype}>",
    dtypes={"indices_dst": INTEGERS},
    mutates=("k_dst", "v_dst", "arrived"),
    tensors={**_INDICES, "arrived": "[layers] int32"},
    fake=_fake_all_layers,
    samples=_all_layers,
)
def transfer_kv_all_layers(
    k_dst: list[Tensor],
    v_dst: list[Tensor],
    indices_dst: Tensor,
    k_src: list[Tensor],
    v_src: list[Tensor],
    indices_src: Tensor,
    arrived: Tensor | None = None,
    *,
    max_blocks: int = 0,
) -> None:
    """``transfer_kv_one_layer`` of every layer, the first one first, in one launch for up to 96 layers.

    ``arrived`` lets another stream begin with the first layer before the last one is there: ``wait_kv_layer`` waits for its
    flags. A flag is 1 when all of its layer can be read, and 0 or less before; it must be 0 when the call is made.

    Args:
        k_dst: a tensor for each layer, all of one shape and with the same strides: ``cache.unbind(0)`` of a cache with layers
            first, ``cache.unbind(1)`` of one with pages or slots first.
        v_dst: the same; empty for MLA.
        indices_dst: ``[items]``, int32 or int64, on the GPU.
        k_src: a tensor for each layer, of another layout perhaps.
        v_src: the same; empty for MLA.
        indices_src: ``[items]``, dtype of ``indices_dst``.
        arrived: ``[layers]`` int32 on the GPU, zeros.
        max_blocks: of the GPU's blocks; 0 for what fills the link to the host.
    """
    _match_flags(k_dst, arrived)
    _match(k_dst, v_dst, k_src, v_src, max_blocks, is_list=True)
    _transfer(k_dst, v_dst, indices_dst, k_src, v_src, indices_src)
    if arrived is not None:
        arrived.fill_(1)


def _match_layer(arrived: Tensor, layer: int) -> None:
    if not 0 <= layer < arrived.shape[0]:
        raise RuntimeError(f"argument 'layer' must be below {arrived.shape[0]}, the layers of 'arrived', got {layer}")


def _fake_wait(k_cache: Tensor, v_cache: Tensor | None, arrived: Tensor, layer: int) -> None:
    _match_layer(arrived, layer)


@library.op(
    cuda="transfer.cu",
    cpu="transfer.cpp",
    variant="wait_kv_layer",
    dtypes={"k_cache": (torch.bfloat16,)},
    mutates=("k_cache", "v_cache"),
    tensors={"arrived": "[layers] int32"},
    fake=_fake_wait,
    samples=_waits,
)
def wait_kv_layer(k_cache: Tensor, v_cache: Tensor | None, arrived: Tensor, layer: int) -> None:
    """Hold the current stream until a layer of ``transfer_kv_all_layers`` has arrived.

    The transfer must have been launched before, on another stream, and ``arrived`` zeroed on this one. The layer's caches count
    as written, so a compiled model leaves the wait before whatever reads them.

    Args:
        k_cache: of the layer.
        v_cache: of the layer; None for MLA.
        arrived: ``[layers]`` int32, as the transfer got it.
        layer: which of them.

    Raises:
        RuntimeError: on the CPU, where a transfer ends before its call returns: the layer has not arrived. On a GPU it is an
            error of the device after 60 s.
    """
    _match_layer(arrived, layer)
    give_up = time.monotonic() + _PATIENCE
    while int(arrived[layer]) <= 0:
        if arrived.device.type == "cpu":
            raise RuntimeError(f"layer {layer} has not arrived, and on the CPU no transfer is under way")
        if time.monotonic() > give_up:
            raise RuntimeError(f"layer {layer} has not arrived within 60 s: launch the transfer before the wait")
