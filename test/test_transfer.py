"""Transfers between KV caches: every layout, page size and index type to the bit, what stays untouched, and what is refused.

On a GPU host memory is pinned, and the copies go both ways; elsewhere both sides are in the CPU's memory.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import fuzz
import pytest
import torch
from cases import bits, devices
from expecttest import assert_expected_inline
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from torch_jit_ops.ops import transfer

ops = torch.ops.jitk
needs_gpu = pytest.mark.skipif("cuda" not in devices(), reason="no GPU")
DEVICE = devices()[-1]
# Where the caches are: read from the first, written in the second.
DIRECTIONS = list(itertools.product(("cpu", "cuda"), repeat=2)) if DEVICE == "cuda" else [("cpu", "cpu")]
DTYPES = [torch.bfloat16, torch.float8_e4m3fn, torch.float32, torch.int8, torch.float64]


def placed(cache: Tensor, device: str) -> Tensor:
    """In the memory of a GPU, or in memory that it reaches."""
    if device == "cuda":
        return cache.cuda()
    return cache.pin_memory() if DEVICE == "cuda" else cache


def noise(shape: Sequence[int], dtype: torch.dtype, device: str) -> Tensor:
    count = torch.empty(shape, dtype=dtype, device="meta").nbytes
    return placed(torch.randint(0, 256, (count,), dtype=torch.uint8).view(dtype).view(tuple(shape)), device)


Make = Callable[[int, int, int, tuple[int, ...], torch.dtype, str], tuple[Tensor, list[Tensor]]]


def layers_first(layers: int, pages: int, size: int, row: tuple[int, ...], dtype: torch.dtype, device: str) -> Any:
    cache = noise((layers, pages, size, *row), dtype, device)
    return cache, list(cache.unbind(0))


def pages_first(layers: int, pages: int, size: int, row: tuple[int, ...], dtype: torch.dtype, device: str) -> Any:
    cache = noise((pages, layers, size, *row), dtype, device)
    return cache, list(cache.unbind(1))


def slots_first(layers: int, pages: int, size: int, row: tuple[int, ...], dtype: torch.dtype, device: str) -> Any:
    cache = noise((pages * size, layers, *row), dtype, device)
    return cache, [layer.unflatten(0, (pages, size)) for layer in cache.unbind(1)]


def beside_values(layers: int, pages: int, size: int, row: tuple[int, ...], dtype: torch.dtype, device: str) -> Any:
    cache = noise((layers, pages, size, 2, *row), dtype, device)
    return cache, [layer[:, :, 1] for layer in cache.unbind(0)]


def behind_an_offset(layers: int, pages: int, size: int, row: tuple[int, ...], dtype: torch.dtype, device: str) -> Any:
    count = torch.Size((layers, pages, size, *row)).numel()
    cache = noise((count + 3,), dtype, device)
    return cache, list(cache[3:].view(layers, pages, size, *row).unbind(0))


LAYOUTS: list[Make] = [layers_first, pages_first, slots_first, beside_values, behind_an_offset]


def indices(chance: random.Random, count: int, below: int, unique: bool, dtype: torch.dtype) -> Tensor:
    chosen = chance.sample(range(below), count) if unique else [chance.randrange(below) for _ in range(count)]
    return torch.tensor(chosen, dtype=dtype, device=DEVICE)


def judge(
    chance: random.Random,
    layouts: tuple[Make, Make],
    directions: tuple[str, str],
    dtype: torch.dtype,
    *,
    size: int,
    row: tuple[int, ...],
    values: tuple[int, ...] | None,
    layers: int = 3,
    max_blocks: int = 0,
) -> None:
    """Copy, by all layers and by each, and compare every byte of both caches with what PyTorch makes of them."""
    pages = chance.randint(2, 7), chance.randint(1, 7)  # written, read
    index = chance.choice([torch.int32, torch.int64])
    count = chance.randint(0, pages[0])
    to = indices(chance, count, pages[0], unique=True, dtype=index)
    where = indices(chance, count, pages[1], unique=False, dtype=index)
    sides: list[list[Any]] = []
    for side in range(2):
        rows = [row] if values is None else [row, values]
        made = [layouts[side](layers, pages[side], size, each, dtype, directions[side]) for each in rows]
        sides.append(made if values is not None else [*made, (None, [])])
    (k_dst, v_dst), (k_src, v_src) = sides
    before = [bits(cache).clone() for cache in (k_src[0], v_src[0]) if cache is not None]
    expected = []
    for (cache, written), (_, read) in zip(sides[0], sides[1], strict=True):
        if cache is None:
            continue
        plain = cache.clone().as_strided(cache.shape, cache.stride())
        for one, other in zip(written, read, strict=True):
            word = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.itemsize]
            target = plain.view(word).as_strided(one.shape, one.stride(), one.storage_offset())
            target[to.to(plain.device).long()] = other.contiguous().view(word)[where.to(other.device).long()].to(plain.device)
        expected.append((cache, plain))
    one_by_one = chance.random() < 0.3
    if one_by_one:
        for layer in range(layers):
            v = (v_dst[1][layer], v_src[1][layer]) if values is not None else (None, None)
            ops.transfer_kv_one_layer(k_dst[1][layer], v[0], to, k_src[1][layer], v[1], where, max_blocks=max_blocks)
    else:
        arrived = torch.zeros(layers, dtype=torch.int32, device=DEVICE) if chance.random() < 0.5 else None
        ops.transfer_kv_all_layers(k_dst[1], v_dst[1], to, k_src[1], v_src[1], where, arrived, max_blocks=max_blocks)
        if arrived is not None:
            assert arrived.tolist() == [1] * layers
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    for cache, plain in expected:
        assert torch.equal(bits(cache), bits(plain))
    for cache, old in zip((k_src[0], v_src[0]), before, strict=False):
        assert torch.equal(bits(cache), old)


@pytest.mark.parametrize("directions", DIRECTIONS, ids="-".join)
@pytest.mark.parametrize(
    "layouts", list(itertools.product(LAYOUTS, LAYOUTS)), ids=lambda pair: "-".join(x.__name__ for x in pair)
)
def test_layouts(layouts: tuple[Make, Make], directions: tuple[str, str]) -> None:
    chance = random.Random(str((layouts[0].__name__, layouts[1].__name__)))
    for size, row, dtype in ((1, (2, 64), torch.bfloat16), (16, (3, 8), torch.float32), (5, (7,), torch.int8)):
        judge(chance, layouts, directions, dtype, size=size, row=row, values=row)


@pytest.mark.parametrize("directions", DIRECTIONS, ids="-".join)
@pytest.mark.parametrize("size", [*range(1, 18), 31, 32, 33, 63, 64, 65, 100, 127, 128, 129])
def test_page_sizes(size: int, directions: tuple[str, str]) -> None:
    chance = random.Random(size)
    for layouts in ((layers_first, pages_first), (slots_first, layers_first)):
        judge(chance, layouts, directions, torch.bfloat16, size=size, row=(1, 72), values=None)


@pytest.mark.parametrize("seed", fuzz.seeds(60))
def test_by_chance(seed: int) -> None:
    chance = random.Random(seed)
    row = tuple(chance.choice([1, 2, 3, 8, 13, 64]) for _ in range(chance.randint(0, 3)))
    values = chance.choice([None, row, (chance.randint(1, 20),)])
    layouts = chance.choice(LAYOUTS), chance.choice(LAYOUTS)
    judge(
        chance,
        layouts,
        chance.choice(DIRECTIONS),
        chance.choice(DTYPES),
        size=chance.choice([1, 1, 2, 7, 16, 65]),
        row=row,
        values=values,
        layers=chance.choice([1, 2, 5, 100]),
        max_blocks=chance.choice([0, 0, 1, 2, 8, 1000]),
    )


def test_no_layers() -> None:
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    ops.transfer_kv_all_layers([], [], none, [], [], none)


# --- what is refused ------------------------------------------------------------------------------


def _caches(*shapes: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [torch.zeros(tuple(shape), dtype=dtype, device=DEVICE) for shape in shapes]


def _refusals() -> dict[str, tuple[Any, ...]]:
    k, v, other = _caches((4, 2, 8), (4, 3), (6, 2, 8))
    to = torch.tensor([0, 1], device=DEVICE)
    odd = torch.zeros(4, 2, 4, 8, dtype=torch.bfloat16, device=DEVICE)[:, :, :3, :4]
    return {
        "rows": (k, None, to, *_caches((6, 4, 8)), None, to),
        "dimensions": (k, None, to, *_caches((6, 16)), None, to),
        "dtype": (k, None, to, *_caches((6, 2, 8), dtype=torch.float16), None, to),
        "one cache of values": (k, v, to, other, None, to),
        "as many items": (k, *_caches((5, 3)), to, other, *_caches((6, 3)), to),
        "as many items to read": (k, v, to, other, *_caches((7, 3)), to),
        "a scalar": (torch.zeros((), device=DEVICE), None, to, torch.zeros((), device=DEVICE), None, to),
        "lists of two lengths": (k, None, to, other, None, to[:1]),
        "lists of two dtypes": (k, None, to, other, None, to.int()),
        "blocks": (k, None, to, other, None, to),
        "itself": (k, None, to, k, None, to),
        "strides": (*_caches((5, 2, 3, 4)), None, to, odd, None, to),
    }


def _said(call: Callable[[], object]) -> str:
    with pytest.raises(RuntimeError) as caught:
        call()
    return str(caught.value).partition("\n  at transfer.c")[0]


def test_what_is_refused() -> None:
    calls = _refusals()
    options = {"blocks": {"max_blocks": -1}}
    said = [_said(lambda name=name: ops.transfer_kv_one_layer(*calls[name], **options.get(name, {}))) for name in calls]
    k = _caches((4, 8), (4, 8), (4, 9))
    to = torch.tensor([0, 1], device=DEVICE)
    flags = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    said += [
        _said(lambda: ops.transfer_kv_all_layers(k[::2], [], to, _caches((4, 8), (4, 8)), [], to)),
        _said(lambda: ops.transfer_kv_all_layers(k[:2], [], to, _caches((4, 8)), [], to)),
        _said(lambda: ops.transfer_kv_all_layers(k[:2], _caches((4, 8)), to, _caches((4, 8), (4, 8)), _caches((4, 8)), to)),
        _said(lambda: ops.transfer_kv_all_layers(k[:2], [], to, _caches((4, 8), (4, 8)), [], to, flags)),
        _said(lambda: ops.transfer_kv_all_layers([k[0], k[0]], [], to, _caches((4, 8), (4, 8)), [], to)),
        _said(lambda: ops.wait_kv_layer(k[0], None, flags, 3)),
    ]
    assert_expected_inline(
        "\n".join(said).replace(f"{DEVICE}:0", DEVICE).replace(DEVICE, "DEVICE"),
        """\
jitk::transfer_kv_one_layer: argument 'k_src' does not match
  expected  [*, 2, 8]  bfloat16
  got       [6, 4, 8]  bfloat16
  items are those of 'k_dst'
jitk::transfer_kv_one_layer: argument 'k_src' does not match
  expected  [*, 2, 8]  bfloat16
  got       [6, 16]  bfloat16
  items are those of 'k_dst'
jitk::transfer_kv_one_layer: argument 'k_src' does not match
  expected  [*, 2, 8]  bfloat16
  got       [6, 2, 8]  float16
  items are those of 'k_dst'
jitk::transfer_kv_one_layer: argument 'v_src' must have as many layers as 'v_dst', got 0 and 1
jitk::transfer_kv_one_layer: argument 'v_dst' must have as many items as 'k_dst', got 5 and 4
jitk::transfer_kv_one_layer: argument 'v_src' must have as many items as 'k_src', got 7 and 6
jitk::transfer_kv_one_layer: argument 'k_dst' must have a dimension of items, got a scalar
jitk::transfer_kv_one_layer: argument 'indices_src' does not match
  expected  [items=2]  int64  DEVICE  contiguous
  got       [1]        int64  DEVICE
  dimension 0: items was bound to 2 by 'indices_dst'
jitk::transfer_kv_one_layer: argument 'indices_src' does not match
  expected  [items=2]  int64  DEVICE  contiguous
  got       [2]        int32  DEVICE
  dtype int32 is not among those expected
jitk::transfer_kv_one_layer: argument 'max_blocks' must be 0 or more, got -1
jitk::transfer_kv_one_layer: argument 'k_dst' is written, but shares memory with argument 'k_src'
  'k_dst' [4, 2, 8] with strides [16, 8, 1] begins where
  'k_src' [4, 2, 8] with strides [16, 8, 1] does
  remedy: memory of its own for one of them
jitk::transfer_kv_one_layer: argument 'k_src' does not match
  expected  items of dense rows in equal steps
  got       [4, 2, 3, 4]  bfloat16  strides [64, 32, 8, 1]
  its strides do not walk over dense rows in equal steps; pass k_src.contiguous()
jitk::transfer_kv_all_layers: argument 'k_dst[1]' does not match
  expected  [4, 8]  bfloat16
  got       [4, 9]  bfloat16
  layers are those of 'k_dst[0]'
jitk::transfer_kv_all_layers: argument 'k_src' must have as many layers as 'k_dst', got 1 and 2
jitk::transfer_kv_all_layers: argument 'v_dst' must have as many layers as 'k_dst', or none, got 1 and 2
jitk::transfer_kv_all_layers: argument 'arrived' does not match
  expected  [layers=2]  int32  DEVICE  contiguous
  got       [3]         int32  DEVICE
  dimension 0: layers was bound to 2 by 'k_dst'
jitk::transfer_kv_all_layers: argument 'k_dst[0]' is written, but shares memory with argument 'k_dst[1]'
  'k_dst[0]' [4, 8] with strides [8, 1] begins where
  'k_dst[1]' [4, 8] with strides [8, 1] does
  remedy: memory of its own for one of them
jitk::wait_kv_layer: argument 'layer' must be below 3, the layers of 'arrived', got 3""",
    )


def test_the_function_and_the_fake_refuse_the_same() -> None:
    for name, args in _refusals().items():
        if name in ("blocks", "itself", "strides") or name.startswith("lists"):
            continue
        said = _said(lambda args=args: ops.transfer_kv_one_layer(*args)).partition(": ")[2]
        assert _said(lambda args=args: transfer.transfer_kv_one_layer.reference(*args)) == said
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in args]
            assert said in _said(lambda fakes=fakes: ops.transfer_kv_one_layer(*fakes))


@pytest.mark.skipif(DEVICE != "cpu", reason="an error of the device there, which no program survives")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_indices_out_of_range(dtype: torch.dtype) -> None:
    """Nothing has been written then."""
    said = []
    for to, where in (([0, 4], [0, 0]), ([0, 1], [-1, 0]), ([1, 0], [0, 6])):
        k_dst, k_src = torch.zeros(4, 8), torch.ones(6, 8)
        lists = torch.tensor(to, dtype=dtype), torch.tensor(where, dtype=dtype)
        for function in (ops.transfer_kv_one_layer, transfer.transfer_kv_one_layer.reference):
            said.append(_said(lambda: function(k_dst, None, lists[0], k_src, None, lists[1])).replace("jitk::", ""))  # noqa: B023
        assert not k_dst.any()
    assert said[0::2] == [f"transfer_kv_one_layer: {text}" for text in said[1::2]]
    assert_expected_inline(
        "\n".join(said[1::2]),
        """\
argument 'indices_dst' holds an index out of range
  expected  0 to 3
  got       4 at position 1
argument 'indices_src' holds an index out of range
  expected  0 to 5
  got       -1 at position 0
argument 'indices_src' holds an index out of range
  expected  0 to 5
  got       6 at position 1""",
    )


def test_a_wait_for_what_was_not_sent() -> None:
    if DEVICE == "cuda":
        pytest.skip("it ends after a minute, with an error of the device")
    flags = torch.tensor([1, 0], dtype=torch.int32)
    k = torch.zeros(2, 2)
    ops.wait_kv_layer(k, None, flags, 0)
    assert_expected_inline(
        _said(lambda: ops.wait_kv_layer(k, None, flags, 1)),
        """jitk::wait_kv_layer: layer 1 has not arrived, and on the CPU no transfer is under way""",
    )


# --- compiled -------------------------------------------------------------------------------------


def test_a_compiled_model_waits_before_it_reads() -> None:
    torch._dynamo.reset()
    flags = torch.ones(2, dtype=torch.int32, device=DEVICE)

    def run(caches: list[Tensor], q: Tensor) -> Tensor:
        for layer, cache in enumerate(caches):
            ops.wait_kv_layer(cache, None, flags, layer)
            q = q + cache.sum()
        return q

    caches = [torch.full((3, 4), float(i + 1), device=DEVICE) for i in range(2)]
    q = torch.zeros(2, device=DEVICE)
    assert torch.compile(run, fullgraph=True)(caches, q).tolist() == [36.0, 36.0]
    assert [cache.unique().tolist() for cache in caches] == [[1.0], [2.0]]


# --- on a GPU -------------------------------------------------------------------------------------


@needs_gpu
def test_pageable_memory_and_other_devices_are_errors() -> None:
    k, host, to = torch.zeros(4, 8, device="cuda"), torch.zeros(6, 8), torch.tensor([0, 1], device="cuda")
    said = [
        _said(lambda: ops.transfer_kv_one_layer(k, None, to, host, None, to)),
        _said(lambda: ops.transfer_kv_all_layers([k], [], to, [host], [], to)),
        _said(lambda: ops.transfer_kv_one_layer(host, None, to, k, None, to)),
        _said(lambda: ops.transfer_kv_one_layer(k, None, to.cpu(), host.pin_memory(), None, to.cpu())),
    ]
    expected = """\
jitk::transfer_kv_one_layer: argument 'k_src' is in pageable memory, which the device does not reach
  expected  cuda:0, or pinned memory of the CPU
  got       [6, 8]  float32  cpu
  remedy: k_src.pin_memory(), or torch.empty(..., pin_memory=True)"""
    assert said[0] == expected
    assert said[1] == expected.replace("one_layer", "all_layers").replace("k_src", "k_src[0]")
    assert said[2] == expected.replace("k_src", "k_dst")
    assert "argument 'indices_dst' does not match" in said[3]


@needs_gpu
def test_kinds_of_pinned_memory() -> None:
    k, to = torch.zeros(4, 8, device="cuda"), torch.tensor([2, 3], device="cuda")
    registered = torch.arange(1024.0)
    assert torch.cuda.cudart().cudaHostRegister(registered.data_ptr(), registered.nbytes, 0).value == 0
    try:
        for host in (
            registered[:48].view(6, 8),
            torch.arange(48.0).pin_memory().view(6, 8),
            torch.empty(6, 8, pin_memory=True).fill_(7.0),
        ):
            k.zero_()
            ops.transfer_kv_one_layer(k, None, to, host, None, to)
            assert torch.equal(k.cpu()[2:], host[2:4])
            assert not k[:2].any()
    finally:
        torch.cuda.cudart().cudaHostUnregister(registered.data_ptr())


@needs_gpu
def test_what_the_host_has_just_written_is_what_is_read() -> None:
    host, k = torch.empty(64, 512, pin_memory=True), torch.empty(64, 512, device="cuda")
    every = torch.arange(64, device="cuda")
    for turn in range(20):
        host.fill_(turn)
        ops.transfer_kv_one_layer(k, None, every, host, None, every)
        torch.cuda.synchronize()
        assert (k == turn).all()


@needs_gpu
@pytest.mark.parametrize("max_blocks", [0, 1, 2, 132, 10_000])
def test_layers_arrive_in_order_and_can_be_waited_for(max_blocks: int) -> None:
    """The waits are launched before the transfer has begun, and what follows each of them sees the layer."""
    layers, pages = 40, 16
    host = torch.randn(layers, pages, 64, 128).pin_memory()
    cache = torch.zeros(layers, pages, 64, 128, device="cuda")
    every = torch.arange(pages, device="cuda", dtype=torch.int32)
    arrived = torch.zeros(layers, dtype=torch.int32, device="cuda")
    loading, seen = torch.cuda.Stream(), []
    for _ in range(3):
        seen.clear()
        arrived.zero_()
        cache.zero_()
        loading.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(loading):
            torch.cuda._sleep(20_000_000)
            ops.transfer_kv_all_layers(
                list(cache.unbind(0)), [], every, list(host.unbind(0)), [], every, arrived, max_blocks=max_blocks
            )
        for layer in range(layers):
            ops.wait_kv_layer(cache[layer], None, arrived, layer)
            seen.append((cache[layer].clone(), arrived.clone()))
        torch.cuda.synchronize()
        for layer, (copy, flags) in enumerate(seen):
            assert torch.equal(copy.cpu(), host[layer])
            assert (flags[: layer + 1] == 1).all()
    if max_blocks < 8:  # whose registers leave room for the kernels that look
        assert seen[0][1][-1] <= 0, "the last layer was there as soon as the first"


@needs_gpu
@pytest.mark.parametrize("max_blocks", [1, 3, 8])
@pytest.mark.parametrize("items", [1, 5, 40])
def test_small_planes_of_many_layers(items: int, max_blocks: int) -> None:
    """Fewer units than warps, K and V of different widths, more layers than a launch takes; then flags that say so."""
    layers, device = 100, torch.device("cuda")
    hosts = [torch.randn(layers, 50, *row).pin_memory() for row in ((7, 264), (3, 24))]
    caches = [torch.zeros(layers, 60, *host.shape[2:], device=device) for host in hosts]
    to, where = torch.randperm(60, device=device)[:items], torch.randperm(50, device=device)[:items]
    arrived = torch.zeros(layers, dtype=torch.int32, device=device)
    expected = [
        torch.zeros_like(cache).index_copy_(1, to, host.cuda()[:, where]) for cache, host in zip(caches, hosts, strict=True)
    ]
    for flags in (None, arrived):
        for cache in caches:
            cache.zero_()
        (k, v), (k_host, v_host) = ([list(x.unbind(0)) for x in side] for side in (caches, hosts))
        ops.transfer_kv_all_layers(k, v, to, k_host, v_host, where, flags, max_blocks=max_blocks)
        assert all(torch.equal(cache, right) for cache, right in zip(caches, expected, strict=True))
    assert (arrived == 1).all()


@needs_gpu
def test_a_graph_with_transfer_and_waits() -> None:
    host, cache = torch.randn(4, 8, 256).pin_memory(), torch.zeros(4, 8, 256, device="cuda")
    every, arrived = torch.arange(8, device="cuda"), torch.zeros(4, dtype=torch.int32, device="cuda")
    loading, total = torch.cuda.Stream(), torch.zeros(4, device="cuda")

    def step() -> None:
        arrived.zero_()
        loading.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(loading):
            ops.transfer_kv_all_layers(list(cache.unbind(0)), [], every, list(host.unbind(0)), [], every, arrived)
        for layer in range(4):
            ops.wait_kv_layer(cache[layer], None, arrived, layer)
            total[layer] = cache[layer].sum()
        torch.cuda.current_stream().wait_stream(loading)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(3):
        host.normal_()
        cache.zero_()
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(total, host.cuda().sum((1, 2)))


@needs_gpu
@pytest.mark.serial
def test_a_cache_of_more_than_2_31_bytes() -> None:
    cache = torch.zeros(2**20 + 3, 4096, dtype=torch.uint8, device="cuda")
    host = torch.randint(0, 256, (5, 4096), dtype=torch.uint8).pin_memory()
    to = torch.tensor([2**20 + 2, 2**19, 2**19 + 1, 0, 7], device="cuda")
    where = torch.arange(5, device="cuda")
    ops.transfer_kv_one_layer(cache, None, to, host, None, where)
    assert torch.equal(cache[to].cpu(), host)
    assert int(cache.any(1).sum()) == 5
