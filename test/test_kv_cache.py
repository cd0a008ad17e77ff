"""What the ops on KV caches promise beyond what every op does: every layout, to the bit, and nothing beside it."""

from __future__ import annotations

import itertools
from random import Random

import fuzz
import pytest
import torch
from cases import OPS, assert_same_bits, devices, poisoned
from expecttest import assert_expected_inline
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from torch_jit_ops import OpLibrary

NAMES = ("store_kv_cache", "store_mla_cache", "gather_kv_cache", "downcast_fp8")
FAMILY = {op.name: op for op in OPS if op.declaration.namespace == "jitk" and op.name in NAMES}
DEVICES = [device for device in devices() if device in FAMILY["store_kv_cache"].declaration.kernels]
INTEGERS = [torch.int32, torch.int64]
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
# Of each size, and those that PyTorch's own indexing treats in some other way.
COPIED = [torch.bool, torch.uint8, torch.int8, *FP8, torch.int16, torch.bfloat16, torch.float16, torch.uint16]
COPIED += [torch.float32, torch.int32, torch.float64, torch.int64, torch.complex64]
ops = torch.ops.jitk


@pytest.fixture(autouse=True)
def _kernels_alone():
    """No function may run in a kernel's place."""
    with FAMILY["store_kv_cache"].kernels_alone():
        yield


def filled(*shape: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Tensor:
    """Random bytes: any bits are to arrive as they are."""
    size = torch.empty(0, dtype=dtype).element_size()
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (*shape, size), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape).to(device)


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(device, dtype)


def bits(x: Tensor) -> Tensor:
    """Bytes, as the last dimension; NaN differs from NaN and -0 from 0."""
    return x.contiguous().view(torch.uint8).cpu()


def slots_for(tokens: int, slots: int, dtype: torch.dtype, seed: int = 0, skipped: float = 0.2) -> Tensor:
    random = Random(seed)
    chosen = random.sample(range(slots), tokens)
    return torch.tensor([-1 if random.random() < skipped else slot for slot in chosen], dtype=dtype).reshape(tokens)


def stored(rows: Tensor, cache: Tensor, indices: list[int]) -> Tensor:
    """What a cache holds afterwards, one row after the other: the plainest of models. The cache is [slots, ...row]."""
    after = cache.clone()
    for token, slot in enumerate(indices):
        if slot != -1:
            bits_of_row = bits(rows[token]).reshape(-1)
            after[slot] = bits_of_row.view(cache.dtype).reshape(cache.shape[1:]).to(cache.device)
    return after


def to_fp8(x: Tensor, dtype: torch.dtype, scale: float | None = None) -> Tensor:
    wide = x.float() if scale is None else x.float() / torch.tensor(scale)
    largest = torch.finfo(dtype).max
    return wide.clamp(-largest, largest).to(dtype)


def number(value: float, device: str = "cpu") -> Tensor:
    return torch.tensor([value], device=device)


# --- layouts --------------------------------------------------------------------------------------


def _blocks(blocks: int, size: int, heads: int, dim: int, dtype: torch.dtype, device: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Caches of K and V in the layouts of the world, among poison."""

    def make(*shape: int) -> Tensor:
        return poisoned(shape, dtype, device)

    both = make(2, blocks, size, heads, dim)
    beside = make(blocks, 2, size, heads, dim)
    heads_first = make(2, blocks, heads, size, dim).transpose(2, 3)
    packed = make(blocks, size, heads, 2 * dim)
    return {
        "flat": (make(blocks * size, heads, dim), make(blocks * size, heads, dim)),
        "flat rows": (make(blocks * size, heads * dim), make(blocks * size, heads * dim)),
        "blocks": (make(blocks, size, heads, dim), make(blocks, size, heads, dim)),
        "blocks of flat rows": (make(blocks, size, heads * dim), make(blocks, size, heads * dim)),
        "K and V in one": (both[0], both[1]),
        "K and V of a block in one": (beside[:, 0], beside[:, 1]),
        "heads before slots": (heads_first[0], heads_first[1]),
        "K beside V": (packed[..., :dim], packed[..., dim:]),
        "one of each": (make(blocks * size, heads * dim), make(blocks, heads, size, dim).transpose(1, 2)),
    }


LAYOUTS = list(_blocks(1, 1, 1, 1, torch.bfloat16, "cpu"))


def _whole(x: Tensor) -> Tensor:
    """All of the memory that a view is of."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())


def _copies(views: list[Tensor]) -> list[Tensor]:
    """The same views of copies of their memory, which they share where they shared it."""
    memory: dict[int, Tensor] = {}
    for x in views:
        memory.setdefault(x.untyped_storage().data_ptr(), _whole(x).clone())
    copies = []
    for x in views:
        storage = memory[x.untyped_storage().data_ptr()].untyped_storage()
        copies.append(torch.empty(0, dtype=x.dtype, device=x.device).set_(storage, x.storage_offset(), x.shape, x.stride()))
    return copies


def _put(rows: Tensor, cache: Tensor, slots: int, where: list[int]) -> None:
    """The model: one row of the cache's dtype after the other, by its bits."""
    size = cache.shape[1]
    same = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[cache.element_size()]
    for token, slot in enumerate(where):
        if slot >= 0:
            target = cache[slot] if cache.shape[0] == slots else cache[slot // size, slot % size]
            target.view(same).copy_(rows[token].view(same).reshape(target.shape))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("index", INTEGERS, ids=str)
def test_caches_of_any_layout(device: str, layout: str, index: torch.dtype) -> None:
    """All memory is compared: that of other slots, of the other cache, and between."""
    blocks, size, heads, dim, tokens = 5, 4, 3, 24, 11
    qkv = filled(tokens, 7 * heads * dim, dtype=torch.bfloat16, device=device)
    k, v = (part.unflatten(-1, (heads, dim)) for part in qkv.split([heads * dim] * 7, -1)[5:])
    caches = list(_blocks(blocks, size, heads, dim, torch.bfloat16, device)[layout])
    slots = slots_for(tokens, blocks * size, index)
    expected = _copies(caches)
    for x, cache in zip((k, v), expected, strict=True):
        _put(x, cache, blocks * size, slots.tolist())
    ops.store_kv_cache(k, v, *caches, slots.to(device))
    for cache, after in zip(caches, expected, strict=True):
        assert torch.equal(_whole(cache), _whole(after))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", COPIED, ids=str)
def test_every_dtype_is_copied(device: str, dtype: torch.dtype) -> None:
    for width in (1, 3, 16, 33, 128):
        k, v = (filled(9, width, dtype=dtype, device=device, seed=seed) for seed in range(2))
        caches = [filled(12, width, dtype=dtype, device=device, seed=seed) for seed in (2, 3)]
        slots = slots_for(9, 12, torch.int64)
        expected = [stored(x, cache, slots.tolist()) for x, cache in zip((k, v), caches, strict=True)]
        ops.store_kv_cache(k, v, *caches, slots.to(device))
        for cache, after in zip(caches, expected, strict=True):
            assert torch.equal(bits(cache), bits(after))
        again = ops.gather_kv_cache(caches[0], slots.to(device))
        for token, slot in enumerate(slots.tolist()):
            assert torch.equal(bits(again[token]), bits(caches[0][slot] if slot >= 0 else torch.zeros_like(again[token])))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("which", range(4))
def test_places_that_no_wide_vector_fits(device: str, offset: int, which: int) -> None:
    """The start of one tensor is off, or its rows are."""
    tokens, slots, width = 6, 9, 64
    shapes = [(tokens, width), (tokens, width), (slots, width), (slots, width)]
    tensors = [filled(*shape, dtype=torch.uint8, device=device, seed=seed) for seed, shape in enumerate(shapes)]
    for gap in (0, offset):
        room = torch.zeros(shapes[which][0] * (width + gap) + offset, dtype=torch.uint8, device=device)
        moved = room[offset:].view(-1, width + gap)[:, :width].copy_(tensors[which])
        given = [moved if place == which else x.clone() for place, x in enumerate(tensors)]
        where = slots_for(tokens, slots, torch.int32, seed=gap)
        expected = [stored(x, cache, where.tolist()) for x, cache in zip(tensors[:2], tensors[2:], strict=True)]
        ops.store_kv_cache(*given, where.to(device))
        assert torch.equal(given[2], expected[0])
        assert torch.equal(given[3], expected[1])


@pytest.mark.parametrize("device", DEVICES)
def test_indices_that_are_a_column(device: str) -> None:
    k, v = (filled(3, 8, dtype=torch.float16, device=device, seed=seed) for seed in range(2))
    caches = [torch.zeros(5, 8, dtype=torch.float16, device=device) for _ in range(2)]
    table = torch.tensor([[4, 9], [0, 9], [2, 9]], device=device)
    ops.store_kv_cache(k, v, *caches, table[:, 0])
    assert torch.equal(bits(caches[0][[4, 0, 2]]), bits(k))
    assert torch.equal(bits(caches[1][[4, 0, 2]]), bits(v))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [0, 3])
def test_nothing_to_store(device: str, tokens: int) -> None:
    """No tokens, rows without elements, a cache without slots, and -1 alone."""
    for width, slots in ((8, 4), (0, 4), (8, 0)):
        k, v = (filled(tokens, width, dtype=torch.bfloat16, device=device) for _ in range(2))
        caches = [poisoned((slots, width), torch.bfloat16, device) for _ in range(2)]
        before = [bits(cache) for cache in caches]
        nowhere = torch.full((tokens,), -1, device=device)
        ops.store_kv_cache(k, v, *caches, nowhere)
        ops.store_mla_cache(k, v, torch.cat(caches, -1), nowhere)
        assert all(torch.equal(bits(cache), old) for cache, old in zip(caches, before, strict=True))
        assert torch.equal(ops.gather_kv_cache(caches[0], nowhere), torch.zeros_like(k))


@pytest.mark.parametrize("device", DEVICES)
def test_of_tokens_with_one_slot_each_element_is_one_of_theirs(device: str) -> None:
    k, v = (torch.arange(1, 65, dtype=torch.int32, device=device).unsqueeze(1).expand(64, 512).contiguous() for _ in range(2))
    caches = [torch.zeros(4, 512, dtype=torch.int32, device=device) for _ in range(2)]
    ops.store_kv_cache(k, v, *caches, torch.full((64,), 2, device=device))
    for cache in caches:
        assert cache[[0, 1, 3]].eq(0).all()
        assert cache[2].gt(0).all()


# --- 8-bit floats ---------------------------------------------------------------------------------


def _all_halves(dtype: torch.dtype, device: str) -> Tensor:
    """Every value that there is."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(512, 128).to(device)


def _assert_same_fp8(actual: Tensor, expected: Tensor) -> None:
    """To the bit, but one NaN is another: a GPU drops its sign."""
    nans = expected.float().isnan()
    assert torch.equal(actual.float().isnan(), nans)
    wrong = (actual.view(torch.uint8) != expected.view(torch.uint8)) & ~nans
    assert not wrong.any(), f"{int(wrong.sum())} wrong, such as {actual[wrong][0]} in the place of {expected[wrong][0]}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fp8", FP8, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_half_becomes_the_nearest_fp8(device: str, fp8: torch.dtype, dtype: torch.dtype) -> None:
    """Saturated, and NaN stays NaN; over a scale with the quotient that PyTorch's division rounds."""
    half = torch.float16 if dtype is torch.float16 else torch.bfloat16
    x = _all_halves(half, device).to(dtype)
    where = torch.arange(512, device=device)
    for width, scales in itertools.product((128, 127), ((None, None), (0.37, 3.0), (2.0**-20, 7e4))):
        rows = x[:, :width]
        caches = [torch.zeros(512, width, dtype=fp8, device=device) for _ in range(2)]
        steps = [None if scale is None else number(scale, device) for scale in scales]
        ops.store_kv_cache(rows, rows, *caches, where, *steps)
        for cache, scale in zip(caches, scales, strict=True):
            _assert_same_fp8(cache.cpu(), to_fp8(rows.cpu(), fp8, scale))
        if scales[0] is not None:
            outs = [torch.zeros(512, width, dtype=fp8, device=device) for _ in range(2)]
            ops.downcast_fp8(rows, rows, *outs, *steps, where)
            assert all(torch.equal(bits(out), bits(cache)) for out, cache in zip(outs, caches, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fp8", FP8, ids=str)
def test_a_tie_that_the_reciprocal_would_miss(device: str, fp8: torch.dtype) -> None:
    """x = tie * scale, where x * (1 / scale) ends beside the tie."""
    random = Random(0)
    ties = torch.tensor([17.0, 19.0, 21.0, 2.125, 0.59375]) if fp8 is FP8[0] else torch.tensor([9.0, 11.0, 1.125, 0.6875])
    missed = 0
    for _ in range(50):
        scale = torch.tensor(random.randint(2**11, 2**12) / 2**8)
        x = ties * scale  # exact in fp32
        expected = to_fp8(x, fp8, float(scale))
        missed += int((bits((x * (1 / scale)).to(fp8)) != bits(expected)).sum())
        cache = torch.zeros(2, len(ties), dtype=fp8, device=device)
        rows = x.unsqueeze(0).to(device)
        ops.store_kv_cache(rows, rows, cache[:1], cache[1:], torch.tensor([0], device=device), *[scale.view(1).to(device)] * 2)
        assert torch.equal(bits(cache), bits(torch.stack([expected, expected])))
    assert missed > 0, "no tie tells the two apart"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fp8", FP8, ids=str)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gathered_fp8_is_what_was_stored_times_the_scale(device: str, fp8: torch.dtype, dtype: torch.dtype | None) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(fp8).repeat(3, 1).to(device)
    where = torch.tensor([2, -1, 0], device=device)
    for width in (256, 77):
        cache = every[:, :width]
        wide = cache.cpu().float() * torch.tensor(0.37)
        expected = wide.to(dtype or torch.bfloat16)
        gathered = ops.gather_kv_cache(cache, where, number(0.37, device), dtype=dtype).cpu()
        torch.testing.assert_close(
            gathered, torch.stack([expected[2], torch.zeros_like(expected[0]), expected[0]]), rtol=0, atol=0, equal_nan=True
        )
        plain = ops.gather_kv_cache(cache, where, dtype=dtype).cpu()
        assert plain.dtype == (dtype or fp8)
        torch.testing.assert_close(plain[2].float(), cache[0].cpu().to(dtype or fp8).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [0.0, float("inf"), float("nan"), 1e-45, -2.0])
def test_scales_of_any_value(device: str, scale: float) -> None:
    """What PyTorch's arithmetic makes of them; rows that are skipped are zeros all the same."""
    x = torch.tensor([[0.0, -0.0, 1.0, -3.0, 1e-30, float("inf"), float("-inf"), float("nan")]], device=device)
    cache = torch.zeros(2, 8, dtype=FP8[0], device=device)
    step = number(scale, device)
    ops.store_kv_cache(x, x, cache[:1], cache[1:], torch.tensor([0], device=device), step, step)
    _assert_same_fp8(cache.cpu(), to_fp8(x.cpu(), FP8[0], scale).expand(2, -1))
    gathered = ops.gather_kv_cache(cache, torch.tensor([-1, 1], device=device), step, dtype=torch.float32).cpu()
    wanted = torch.stack((torch.zeros(8), cache[1].cpu().float() * torch.tensor(scale)))
    torch.testing.assert_close(gathered, wanted, rtol=0, atol=0, equal_nan=True)
    assert not gathered[0].signbit().any()


@pytest.mark.parametrize("device", DEVICES)
def test_scales_without_dimensions_or_with_many(device: str) -> None:
    rows = randn(3, 16, device=device)
    found = []
    for scale in (torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([[[0.5]]])):
        cache = torch.zeros(2, 3, 16, dtype=FP8[0], device=device)
        ops.store_kv_cache(rows, rows, cache[0], cache[1], torch.arange(3, device=device), scale.to(device), scale.to(device))
        found.append(bits(cache))
    assert all(torch.equal(found[0], other) for other in found)


# --- MLA, pages, downcast -------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("widths", [(512, 64), (33, 7), (64, 1), (0, 8), (1, 0)], ids=str)
def test_the_rows_of_mla_are_written_side_by_side(device: str, widths: tuple[int, int]) -> None:
    tokens, slots = 7, 12
    latent, rope = (filled(tokens, 1, width, dtype=torch.bfloat16, device=device, seed=width) for width in widths)
    where = slots_for(tokens, slots, torch.int32)
    wide = poisoned((slots, sum(widths) + 5), torch.bfloat16, device)  # a cache that is padded
    for cache in (wide[:, : sum(widths)], wide[:, None, : sum(widths)], wide.view(3, 4, -1)[..., : sum(widths)]):
        expected = stored(torch.cat((latent, rope), -1), cache.reshape(slots, 1, -1), where.tolist())
        ops.store_mla_cache(latent, rope.squeeze(1), cache, where.to(device))
        assert torch.equal(bits(cache), bits(expected.view(cache.shape)))
        assert wide[:, sum(widths) :].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page_size", [1, 2, 3, 16, 64, 127, 128, 129])
def test_pages_of_any_size(device: str, page_size: int) -> None:
    """Of a flat cache, of blocks that are pages, and of blocks that are not."""
    pages, row = 6, (2, 5)
    flat = filled(pages * page_size, *row, dtype=torch.bfloat16, device=device)
    caches = [flat, flat.view(pages, page_size, *row), flat.view(page_size, pages, *row)]
    strided = torch.stack((flat, flat), 1).view(pages, page_size, 2, *row)[:, :, 1]
    for cache, index in itertools.product([*caches, strided], INTEGERS):
        which = torch.tensor([5, -1, 0, 5, 3], dtype=index, device=device)
        gathered = ops.gather_kv_cache(cache, which, page_size=page_size)
        expected = flat.view(pages, page_size, *row)[which.clamp(min=0).long()]
        expected[1] = 0
        assert torch.equal(bits(gathered), bits(expected.flatten(0, 1)))


@pytest.mark.parametrize("device", DEVICES)
def test_gather_into_rows_with_gaps(device: str) -> None:
    cache = filled(9, 2, 24, dtype=torch.float16, device=device)
    room = poisoned((3, 4, 24), torch.float16, device)
    which = torch.tensor([8, -1, 0], device=device)
    ops.gather_kv_cache.out(cache, which, out=room[:, 1:3])
    assert torch.equal(bits(room[:, 1:3]), bits(ops.gather_kv_cache(cache, which)))
    assert room[:, 0].isnan().all()
    assert room[:, 3].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("mult", "offset"), [(1, 0), (2, 1), (3, 5)])
@pytest.mark.parametrize("shape", [(4, 64), (3, 7), (1, 1)], ids=str)
def test_downcast_into_every_so_many_rows(device: str, mult: int, offset: int, shape: tuple[int, int]) -> None:
    tokens, rows = 5, 26
    k, v = (randn(tokens, *shape, device=device, seed=seed, scale=300) for seed in range(2))
    loc = torch.tensor([3, 0, -1, 6, 2], device=device)
    for dtype in (torch.uint8, *FP8):
        outs = [filled(rows, *shape, dtype=torch.uint8, device=device, seed=seed).view(dtype) for seed in (2, 3)]
        expected = [bits(out) for out in outs]
        for x, scale, after in zip((k, v), (0.37, 2.0), expected, strict=True):
            values = bits(to_fp8(x.cpu(), FP8[0] if dtype is torch.uint8 else dtype, scale))
            for token, place in enumerate(loc.tolist()):
                if place >= 0:
                    after[place * mult + offset] = values[token]
        ops.downcast_fp8(k, v, *outs, number(0.37, device), number(2.0, device), loc, mult, offset)
        assert all(torch.equal(bits(out), after) for out, after in zip(outs, expected, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_downcast_with_steps_beyond_the_rows(device: str) -> None:
    """One row is in reach, however far the next one would be."""
    k = torch.ones(2, 8, device=device)
    outs = [torch.zeros(4, 8, dtype=torch.float8_e4m3fn, device=device) for _ in range(2)]
    loc = torch.tensor([-1, 0], device=device)
    ops.downcast_fp8(k, k, *outs, number(1.0, device), number(2.0, device), loc, 2**63 - 1, 2)
    for out, value in zip(outs, (1.0, 0.5), strict=True):
        assert out.float()[:, 0].tolist() == [0.0, 0.0, value, 0.0]


# --- refusals -------------------------------------------------------------------------------------


def _said(call, *args, **kwargs) -> str:
    with pytest.raises((RuntimeError, ValueError)) as caught:
        call(*args, **kwargs)
    return "\n".join(line for line in str(caught.value).splitlines() if not line.startswith("  at kv_cache."))


def _by_all(name: str, *args, **kwargs) -> str:
    """What the kernel says, which is what the function says, and tracing, unless it is of values."""
    op = FAMILY[name]
    said = _said(op.default, *args, **kwargs).removeprefix(f"jitk::{name}: ")
    assert _said(op.reference, *args, **kwargs) == said
    if "out of range" not in said:
        with FakeTensorMode() as mode:
            given = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in args]
            assert _said(op.default, *given, **kwargs).removeprefix(f"jitk::{name}: ") == said
    return said


def _store(**changed: object) -> str:
    """What is said of a call with these arguments in the place of right ones."""
    given: dict[str, object] = {name: torch.zeros(3, 2, 8) for name in ("k", "v")}
    given |= {name: torch.zeros(6, 2, 8) for name in ("k_cache", "v_cache")}
    given |= {"indices": torch.arange(3), "k_scale": None, "v_scale": None} | changed
    if given["k_cache"] is given["v_cache"]:
        given["v_cache"] = given["k_cache"].clone()
    return _by_all("store_kv_cache", *given.values())


def test_what_is_refused_of_a_store() -> None:
    half, fp8, wide = (torch.zeros(6, 2, 8, dtype=dtype) for dtype in (torch.bfloat16, FP8[0], torch.complex128))
    assert_expected_inline(
        "\n".join(
            [
                _store(k=torch.zeros(3, 1, 2, 8)),
                _store(v=torch.zeros(4, 2, 8)),
                _store(indices=torch.arange(2)),
                _store(k_cache=torch.zeros(6, 2, 9)),
                _store(k=torch.zeros(3, 16), k_cache=torch.zeros(2, 3, 2, 9)),
                _store(v_cache=torch.zeros(7, 2, 8)),
                _store(k_cache=half, v_cache=half),
                _store(k_cache=half.byte(), v_cache=half.byte()),
                _store(k=half[:3].int(), v=half[:3].int(), k_cache=fp8, v_cache=fp8),
                _store(k=wide[:3], v=wide[:3], k_cache=wide.clone(), v_cache=wide.clone()),
                _store(k_scale=torch.ones(1)),
                _store(k_cache=fp8, v_cache=fp8.clone(), v_scale=torch.ones(2)),
            ]
        ),
        """\
argument 'k' must be [tokens, width] or [tokens, heads, head_dim], got [3, 1, 2, 8]
argument 'v' must have the 3 tokens of 'k', got [4, 2, 8]
argument 'indices' must have one for each of the 3 tokens of 'k', got [2]
argument 'k_cache' has no slots for the rows of 'k'
  expected  [slots, 2, 8] or [blocks, block_size, 2, 8]
  got       [6, 2, 9]
argument 'k_cache' has no slots for the rows of 'k'
  expected  [slots, 16] or [blocks, block_size, 16]
  got       [2, 3, 2, 9]
argument 'v_cache' must have the 6 slots of 'k_cache', got 7
argument 'k_cache' cannot hold what 'k' has
  expected  float32, float8_e4m3fn or float8_e5m2
  got       bfloat16
argument 'k_cache' cannot hold what 'k' has
  expected  float32, float8_e4m3fn or float8_e5m2
  got       uint8
  remedy: if its bytes are 8-bit floats, pass k_cache.view(torch.float8_e4m3fn)
argument 'k_cache' cannot hold what 'k' has
  expected  int32
  got       float8_e4m3fn
argument 'k' must have elements of 1, 2, 4 or 8 bytes, got complex128
argument 'k_scale' is for caches of 8-bit floats, but 'k_cache' is float32
argument 'v_scale' must hold one number, got [2]""",
    )


def test_what_is_refused_of_the_others() -> None:
    latent, rope, cache, three = torch.zeros(3, 8), torch.zeros(3, 2), torch.zeros(6, 10), torch.arange(3)
    fp8, one = torch.zeros(3, 8, dtype=FP8[0]), torch.ones(1)
    k, out = torch.zeros(3, 2, 8), torch.zeros(6, 2, 8, dtype=torch.uint8)
    assert_expected_inline(
        "\n".join(
            [
                _by_all("store_mla_cache", latent.view(3, 2, 4), rope, cache, three, None),
                _by_all("store_mla_cache", latent, rope[:2], cache, three, None),
                _by_all("store_mla_cache", latent, rope, cache[:, 1:], three, None),
                _by_all("store_mla_cache", latent, rope, cache.half(), three, None),
                _by_all("gather_kv_cache", cache[0], three, None),
                _by_all("gather_kv_cache", cache, three, None, page_size=4),
                _by_all("gather_kv_cache", cache, three, None, page_size=0),
                _by_all("gather_kv_cache", cache, three, None, dtype=torch.float16),
                _by_all("gather_kv_cache", fp8, three, None, dtype=torch.float64),
                _by_all("gather_kv_cache", fp8, three, one, dtype=FP8[0]),
                _by_all("gather_kv_cache", cache, three, one),
                _by_all("downcast_fp8", k, k, out[:, 0], out.clone(), one, one, three),
                _by_all("downcast_fp8", k, k, out, out[1:].clone(), one, one, three),
                _by_all("downcast_fp8", k, k, out, out.clone(), one, one, three, 0),
                _by_all("downcast_fp8", k, k, out, out.clone(), one, one, three, 1, -1),
            ]
        ),
        """\
argument 'latent' must be [tokens, width] or [tokens, 1, width], got [3, 2, 4]
argument 'rope' must have the 3 tokens of 'latent', got [2, 2]
argument 'cache' has no slots for the rows of 'latent' and 'rope'
  expected  [slots, 10] or [blocks, block_size, 10], or with 1 before 10
  got       [6, 9]
argument 'cache' cannot hold what 'latent' has
  expected  float32, float8_e4m3fn or float8_e5m2
  got       float16
argument 'cache' must be [slots, width], [slots, heads, head_dim] or [blocks, block_size, heads, head_dim], got [10]
page_size must divide the 6 slots of 'cache', got 4
page_size must be at least 1, got 0
dtype of what is gathered from 'cache'
  expected  float32
  got       float16
dtype of what is gathered from 'cache'
  expected  float8_e4m3fn, bfloat16, float16 or float32
  got       float64
dtype of what is gathered from 'cache'
  expected  bfloat16, float16 or float32
  got       float8_e4m3fn
argument 'scale' is for caches of 8-bit floats, but 'cache' is float32
argument 'k_out' has no place for the rows of 'k'
  expected  [rows, 2, 8]
  got       [6, 8]
argument 'v_out' must have the 6 slots of 'k_out', got 5
mult must be at least 1, got 0
offset must be at least 0, got -1""",
    )


def test_an_index_out_of_range_is_named_and_nothing_is_written() -> None:
    said = []
    for bad in (6, -2, 2**31 - 1):
        caches = [torch.zeros(6, 2, 8) for _ in range(2)]
        said.append(
            _store(
                indices=torch.tensor([0, bad, 1]),
                **dict(zip(("k_cache", "v_cache"), caches, strict=True)),
                k=torch.ones(3, 2, 8),
            )
        )
        assert all(cache.eq(0).all() for cache in caches)
    blocks = torch.zeros(2, 3, 2, 8)
    said.append(_store(k_cache=blocks, indices=torch.tensor([5, 4, 6], dtype=torch.int32)))
    rows, fp8, one = torch.ones(2, 8), torch.zeros(9, 8, dtype=FP8[0]), torch.ones(1)
    said.append(_by_all("store_mla_cache", rows, rows, torch.zeros(4, 16), torch.tensor([4, 0]), None))
    said.append(_by_all("gather_kv_cache", rows, torch.tensor([0, 2]), None))
    said.append(_by_all("gather_kv_cache", torch.zeros(6, 8), torch.tensor([0, 2]), None, page_size=3))
    said.append(_by_all("downcast_fp8", rows, rows, fp8, fp8.clone(), one, one, torch.tensor([-1, 3]), 3, 1))
    said.append(_by_all("downcast_fp8", rows, rows, fp8, fp8.clone(), one, one, torch.tensor([-1, 0]), 3, 9))
    assert_expected_inline(
        "\n".join(said),
        """\
argument 'indices' holds an index out of range
  expected  0 to 5, or -1 to skip
  got       6 at position 1
argument 'indices' holds an index out of range
  expected  0 to 5, or -1 to skip
  got       -2 at position 1
argument 'indices' holds an index out of range
  expected  0 to 5, or -1 to skip
  got       2147483647 at position 1
argument 'indices' holds an index out of range
  expected  0 to 5, or -1 to skip
  got       6 at position 2
argument 'indices' holds an index out of range
  expected  0 to 3, or -1 to skip
  got       4 at position 0
argument 'indices' holds an index out of range
  expected  0 to 1, or -1 to skip
  got       2 at position 1
argument 'indices' holds an index out of range
  expected  0 to 1, or -1 to skip
  got       2 at position 1
argument 'loc' holds an index out of range
  expected  0 to 2, or -1 to skip
  got       3 at position 1
argument 'loc' holds an index out of range
  expected  none, for there is nothing to index, or -1 to skip
  got       0 at position 1""",
    )


def test_a_cache_that_is_also_read_is_refused() -> None:
    pool, other, rows, three = torch.zeros(8, 2, 8), torch.zeros(8, 2, 8), torch.zeros(3, 2, 8), torch.arange(3)
    assert_expected_inline(
        _said(ops.store_kv_cache, pool[:3], rows, pool, other, three),
        """\
jitk::store_kv_cache: argument 'k_cache' is written, but shares memory with argument 'k'
  'k_cache' [8, 2, 8] with strides [16, 8, 1] begins where
  'k' [3, 2, 8] with strides [16, 8, 1] does
  remedy: memory of its own for one of them""",
    )
    assert_expected_inline(
        _said(ops.store_kv_cache, rows, rows, pool, pool, three),
        """\
jitk::store_kv_cache: argument 'k_cache' is written, but shares memory with argument 'v_cache'
  'k_cache' [8, 2, 8] with strides [16, 8, 1] begins where
  'v_cache' [8, 2, 8] with strides [16, 8, 1] does
  remedy: memory of its own for one of them""",
    )
    ops.store_kv_cache(pool[6:], pool[6:], pool[:3], pool[3:6], torch.tensor([1, 2]))  # apart, though of one tensor


# --- within PyTorch -------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dynamic", [False, None, True])
def test_caches_are_mutated_in_compiled_code(device: str, dynamic: bool | None) -> None:
    """K and V in one tensor; where all sizes are symbols, PyTorch 2.13 hands on slices of one tensor without their offsets."""

    def step(x: Tensor, cache: Tensor, where: Tensor, scale: Tensor) -> Tensor:
        k, v = (x * 2).chunk(2, -1)
        other = cache[1].clone() if dynamic else cache[1]
        ops.store_kv_cache(k.unflatten(-1, (2, -1)), v.unflatten(-1, (2, -1)), cache[0], other, where, scale, scale)
        return ops.gather_kv_cache(cache[0], where, scale) + 1

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for tokens in (3, 5):
        x = randn(tokens, 64, dtype=torch.float32, device=device, seed=tokens)
        where = slots_for(tokens, 12, torch.int32, seed=tokens).to(device)
        caches = [torch.zeros(2, 3, 4, 2, 16, dtype=FP8[0], device=device) for _ in range(2)]
        results = [f(x, cache, where, number(0.5, device)) for f, cache in zip((step, compiled), caches, strict=True)]
        assert_same_bits(results[1], results[0], "what was gathered")
        assert torch.equal(bits(caches[0]), bits(caches[1]))
        assert caches[0].float().abs().sum() > 0


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_of_tokens_that_are_known_only_when_the_graph_runs(device: str) -> None:
    def step(k: Tensor, cache: Tensor, where: Tensor, chosen: Tensor, slots: Tensor) -> Tensor:
        rows = k[chosen]
        ops.store_kv_cache(rows, rows, cache[0], cache[1], where[slots])
        return cache + 0

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(step, fullgraph=True)
        k, where = randn(8, 2, 16, dtype=torch.float32, device=device), slots_for(8, 12, torch.int64).to(device)
        odd, first = torch.arange(8, device=device) % 2 == 1, torch.arange(8, device=device) < 4
        caches = [torch.zeros(2, 12, 2, 16, device=device) for _ in range(2)]
        results = [f(k, cache, where, odd, first) for f, cache in zip((step, compiled), caches, strict=True)]
        assert_same_bits(results[1], results[0], "the caches")
        assert results[0].any()
        with pytest.raises(RuntimeError):
            compiled(k, caches[1], where, odd, torch.arange(8, device=device) < 3)
        assert_same_bits(caches[1], caches[0], "what is not written")


# --- at random ------------------------------------------------------------------------------------


def _spread(x: Tensor, random: Random) -> Tensor:
    """The same values with gaps, dimensions exchanged in memory, and a start that nothing is aligned to."""
    order = list(range(x.dim() - 1))
    random.shuffle(order)
    strides, step = [0] * x.dim(), x.shape[-1] + random.choice([0, 0, 1, 3, 8])
    strides[-1] = 1
    for dim in order:
        strides[dim] = step
        step = step * max(x.shape[dim], 1) + random.choice([0, 0, 0, 5, 16])
    start = random.choice([0, 0, 1, 2, 8])
    room = filled(step + start + 64, dtype=x.dtype, device=x.device.type, seed=random.randrange(99))
    return room.as_strided(x.shape, strides, start).copy_(x)


def _cache(random: Random, slots: int, blocks: int, row: tuple[int, int], dtype: torch.dtype, device: str) -> Tensor:
    shape = random.choice([(slots,), (blocks, slots // blocks)])
    shape += random.choice([row, (row[0] * row[1],)])
    return _spread(filled(*shape, dtype=dtype, device=device, seed=random.randrange(99)), random)


@pytest.mark.parametrize("device", DEVICES)
def test_random_stores_and_gathers(device: str) -> None:
    """Against a model of one row after the other. All memory is compared."""
    for seed in fuzz.seeds(150):
        random = Random(seed)
        blocks, size = random.choice([1, 2, 5]), random.choice([1, 3, 16])
        slots = blocks * size
        tokens = random.randint(0, slots)
        dtype = random.choice([torch.bfloat16, torch.float16, torch.float32])
        cache_dtype = random.choice([dtype, *FP8])
        heads = random.choice([1, 2, 5])
        rows = [(heads, random.choice([1, 2, 7, 8, 33, 64, 130])) for _ in range(2)]
        given = [
            randn(tokens, *row, dtype=dtype, device=device, seed=seed, scale=random.choice([1e-3, 1.0, 300.0])) for row in rows
        ]
        given = [_spread(x if random.random() < 0.7 else x.flatten(1), random) for x in given]
        caches = [_cache(random, slots, blocks, row, cache_dtype, device) for row in rows]
        scales = [None if cache_dtype not in FP8 or random.random() < 0.5 else random.choice([0.37, 1e-3, 2.0]) for _ in rows]
        where = slots_for(tokens, slots, random.choice(INTEGERS), seed=seed, skipped=random.choice([0, 0.3]))

        expected = _copies(caches)
        for x, cache, scale in zip(given, expected, scales, strict=True):
            values = x if cache_dtype == dtype else to_fp8(x.cpu(), cache_dtype, scale).to(device)
            _put(values, cache, slots, where.tolist())
        steps = [None if scale is None else number(scale, device) for scale in scales]
        ops.store_kv_cache(*given, *caches, where.to(device), *steps)
        for cache, after in zip(caches, expected, strict=True):
            assert torch.equal(_whole(cache), _whole(after)), f"seed {seed}: {list(cache.shape)} {cache.stride()}"

        page_size = random.choice([page for page in range(1, slots + 1) if slots % page == 0])
        pages = torch.tensor(
            [random.randrange(-1, slots // page_size) for _ in range(random.choice([0, 1, 7]))], dtype=torch.int64
        )
        cache = caches[0] if caches[0].dim() != 3 else caches[0].unsqueeze(2) if caches[0].shape[0] != slots else caches[0]
        gathered = ops.gather_kv_cache(cache, pages.to(device), page_size=page_size)
        flat = cache.reshape(slots, *gathered.shape[1:])
        for number_of_page, page in enumerate(pages.tolist()):
            mine = gathered[number_of_page * page_size : (number_of_page + 1) * page_size]
            other = flat[page * page_size : (page + 1) * page_size] if page >= 0 else torch.zeros_like(mine)
            assert torch.equal(bits(mine), bits(other)), f"seed {seed}: page {page}"


@pytest.mark.parametrize("device", DEVICES)
def test_no_heads(device: str) -> None:
    """Nothing is stored, by the kernel and by the function alike."""
    k, cache = torch.zeros(2, 0, 128, device=device), torch.zeros(3, 4, 0, 128, device=device)
    slots = torch.tensor([5, -1], device=device)
    ops.store_kv_cache(k, k, cache, cache.clone(), slots)
    FAMILY["store_kv_cache"].reference(k, k, cache, cache.clone(), slots)


# --- who moves what -------------------------------------------------------------------------------

_PLAN = """
#include <jitk/row_teams.h>
#include <jitk/tensor.h>

void spread(jitk::TensorView plan, int64_t rows, int64_t first, int64_t second, int64_t table, int64_t sms) {
  using namespace jitk::host;
  const RowTeams teams = spread_rows(rows, first, second, table == 0 ? kCopies : table == 1 ? kCasts : kNarrow, sms);
  auto* numbers = static_cast<int64_t*>(plan.data_ptr());
  numbers[0] = teams.items, numbers[1] = teams.lanes_log2, numbers[2] = teams.first, numbers[3] = teams.second;
  numbers[4] = teams.blocks(rows), numbers[5] = teams.rows_of_launch();
}
"""
plans = OpLibrary("kv_cache_plans")


@plans.op(cpu_source=_PLAN, variant="spread", mutates=("plan",))
def spread(plan: Tensor, rows: int, first: int, second: int, table: int, sms: int) -> None:
    raise AssertionError("there is no function for it")


def _plan(rows: int, first: int, second: int, table: int = 0, sms: int = 132) -> list[int]:
    plan = torch.zeros(6, dtype=torch.int64)
    spread(plan, rows, first, second, table, sms)
    return plan.tolist()


def test_the_spread_of_the_measured_shapes() -> None:
    """items, log2 of lanes, teams of K, teams of V, blocks; bf16 rows in vectors of 16 bytes, 132 SMs."""
    shapes = [(1, 128, 128), (128, 128, 128), (2048, 128, 128), (16384, 128, 128), (2048, 16, 16)]
    shapes += [(1, 64, 8), (128, 64, 8), (5000, 64, 8), (8192, 64, 8)]
    assert_expected_inline(
        "\n".join(f"{shape}: {_plan(*shape)[:5]}" for shape in shapes),
        """\
(1, 128, 128): [1, 5, 4, 4, 1]
(128, 128, 128): [1, 5, 4, 4, 128]
(2048, 128, 128): [2, 5, 2, 2, 1024]
(16384, 128, 128): [4, 5, 1, 1, 4096]
(2048, 16, 16): [1, 4, 1, 1, 256]
(1, 64, 8): [1, 3, 8, 1, 1]
(128, 64, 8): [1, 3, 8, 1, 36]
(5000, 64, 8): [2, 3, 4, 1, 782]
(8192, 64, 8): [4, 3, 2, 1, 768]""",
    )


def test_few_lanes_of_a_row_are_idle() -> None:
    """Of the lanes up to those that the wider part needs, the fewest threads for a row; then the most lanes."""
    for first, second in itertools.product([0, 1, 2, 3, 8, 9, 12, 33, 36, 64, 65, 72, 128, 1000], repeat=2):
        if first + second == 0:
            continue
        for rows, table in itertools.product([1, 5000, 10**6], range(3)):
            items, lanes_log2, teams, others, *_ = _plan(rows, first, second, table)
            vectors = max(first, second)
            needed = next(lanes for lanes in (1, 2, 4, 8, 16, 32) if lanes * items >= vectors or lanes == 32)
            threads = {
                lanes: sum(-(-part // (items * lanes)) for part in (first, second)) * lanes
                for lanes in (1, 2, 4, 8, 16, 32)
                if min(needed, 8) <= lanes <= needed
            }
            assert (teams + others) << lanes_log2 == min(threads.values()), (rows, first, second, table)
            assert 1 << lanes_log2 == max(lanes for lanes in threads if threads[lanes] == min(threads.values()))


def test_every_vector_has_one_thread() -> None:
    random = Random(0)
    for _ in range(2000):
        rows = random.choice([1, 2, 77, 5000, 10**6, 2**33])
        first, second = (random.choice([0, 1, 2, 3, 16, 17, 64, 100, 4096, 2**29]) for _ in range(2))
        if first + second == 0 or rows * (first + second) > 2**50:
            continue
        sms, table = random.choice([1, 20, 132]), random.choice([0, 1, 2])
        items, lanes_log2, teams, others, blocks, at_once = _plan(rows, first, second, table, sms)
        team = items << lanes_log2
        assert items in ((1, 2, 4), (1, 4, 8), (4,))[table]
        assert lanes_log2 <= 5
        for vectors, count in ((first, teams), (second, others)):
            assert (count - 1) * team < vectors <= count * team or vectors == count == 0
        assert (blocks - 1) * 256 < rows * (teams + others) << lanes_log2 <= blocks * 256
        assert at_once >= 1
        assert at_once * (teams + others) << lanes_log2 <= 2**31 or at_once == 1


# --- on a GPU -------------------------------------------------------------------------------------

needs_cuda = pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU")


@needs_cuda
@pytest.mark.serial
def test_a_cache_of_more_than_2_to_the_31_elements() -> None:
    slots, width, tokens = 2**21 + 3, 1024 + 8, 64
    if torch.cuda.mem_get_info()[0] < 2 * slots * width + 2**30:
        pytest.skip("needs 5 GB of a GPU's memory")
    caches = [torch.zeros(slots, width, dtype=torch.uint8, device="cuda") for _ in range(2)]
    k, v = (filled(tokens, width, dtype=torch.uint8, device="cuda", seed=seed) for seed in range(2))
    where = torch.arange(slots - tokens, slots, device="cuda")
    for index in INTEGERS:
        ops.store_kv_cache(k, v, *caches, where.to(index))
        for x, cache in zip((k, v), caches, strict=True):
            assert torch.equal(cache[slots - tokens :], x)
            assert not cache[: slots - tokens].any()
            assert torch.equal(ops.gather_kv_cache(cache, where.to(index)), x)
            cache.zero_()
    blocks = caches[0].view(-1)[: 2**31].view(2, 2**20, 1024).transpose(0, 1)  # blocks whose slots are 2^30 bytes apart
    ops.store_kv_cache(
        k[:, :1024],
        v[:, :1024],
        blocks,
        caches[1].view(-1)[: 2**31].view(2**20, 2, 1024),
        where[:tokens] * 0 + torch.arange(tokens, device="cuda"),
    )
    assert torch.equal(blocks[0, 1], k[1, :1024])


@needs_cuda
def test_many_tokens_and_few() -> None:
    """All spreads of rows over threads: 1, 2 and 4 vectors each, narrow and wide rows."""
    for tokens, width in itertools.product([1, 3, 77, 1000, 20000], [8, 96, 128, 1024, 7168]):
        k, v = (filled(tokens, width, dtype=torch.bfloat16, device="cuda", seed=seed) for seed in range(2))
        caches = [torch.zeros(tokens + 5, width, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
        where = torch.randperm(tokens + 5, device="cuda")[:tokens]
        ops.store_kv_cache(k, v, *caches, where)
        for x, cache in zip((k, v), caches, strict=True):
            assert torch.equal(cache.view(torch.int16)[where], x.view(torch.int16))
        assert torch.equal(ops.gather_kv_cache(caches[0], where).view(torch.int16), k.view(torch.int16))
