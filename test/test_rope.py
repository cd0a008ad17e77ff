"""What the rotary embeddings promise beyond what every op does."""

from __future__ import annotations

from random import Random
from typing import Any

import fuzz
import pytest
import torch
from cases import OPS, assert_only_written_inside, assert_same_bits, call, copy_with_storage, devices, poisoned
from expecttest import assert_expected_inline
from torch import Tensor

from torch_jit_ops import Op, Sample, SampleMaker, fallback
from torch_jit_ops.declaring.dtypes import Combination
from torch_jit_ops.testing import oracle

ROPES: dict[str, Op] = {op.name: op for op in OPS if op.declaration.namespace == "jitk" and "rope" in op.name}
DEVICES = [device for device in devices() if device in ROPES["rope"].declaration.kernels]
HALVES = [torch.float16, torch.bfloat16]
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
ops = torch.ops.jitk


def randn(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def cache_of(positions: int, rope_dim: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """As models have it."""
    frequency = 10000.0 ** -(torch.arange(0, rope_dim, 2) / max(rope_dim, 1))
    angles = torch.outer(torch.arange(positions), frequency)
    return torch.cat((angles.cos(), angles.sin()), -1).to(device, dtype)


def is_right(name: str, device: str, dtypes: torch.dtype | Combination, *args: Any, **kwargs: Any) -> list[Any]:
    """Calls the op's kernel, in place, and compares with the truth; returns the arguments it was passed."""
    op, given = ROPES[name], Sample(args, kwargs)
    passed = copy_with_storage(given)
    with op.kernels_alone():
        actual = call(op, passed)
    oracle.verify(op, device, dtypes, given, actual)
    for argument, old, new in zip(op.signature.arguments, given.args, passed.args, strict=False):
        if isinstance(old, Tensor):
            assert_only_written_inside(new, old, argument.name)
    return list(passed.args)


# --- models ---------------------------------------------------------------------------------------

MODELS = [  # tokens, q heads, k heads, head_dim, rope_dim
    (33, 32, 8, 128, 128),
    (3, 64, 8, 128, 128),
    (77, 8, 1, 64, 64),  # grouped 8:1
    (5, 32, 32, 96, 96),
    (5, 32, 32, 80, 32),  # Phi
    (9, 8, 4, 256, 256),
    (2, 16, 1, 512, 512),
    (4, 16, 1, 576, 64),  # DeepSeek's latent keys
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_slices_of_a_projection(device: str, dtype: torch.dtype, is_neox: bool, model: tuple[int, ...]) -> None:
    """q and k are slices of one tensor, and v between the tokens is left alone; heads may also lie side by side."""
    tokens, q_heads, k_heads, head_dim, rope_dim = model
    cache = cache_of(1000, rope_dim, device)
    positions = torch.randint(1000, (tokens,), generator=torch.Generator().manual_seed(1)).to(device)
    for flat in (False, True):
        qkv = randn(tokens, q_heads + 2 * k_heads, head_dim, dtype=dtype, device=device)
        q, k, _ = qkv.split([q_heads, k_heads, k_heads], 1)
        options: dict[str, Any] = {"is_neox": is_neox}
        if flat:
            flattened = qkv.view(tokens, -1)
            q, k = flattened[:, : q_heads * head_dim], flattened[:, q_heads * head_dim : (q_heads + k_heads) * head_dim]
            options["head_dim"] = head_dim
        is_right("apply_rope", device, dtype, q, k, cache, positions.int() if flat else positions, **options)


@pytest.mark.parametrize("device", DEVICES)
def test_in_place_and_with_a_result_are_the_same_bits(device: str) -> None:
    q, k = (randn(9, heads, 80, dtype=torch.bfloat16, device=device, seed=heads) for heads in (4, 2))
    cache, positions = cache_of(64, 32, device), torch.arange(9, device=device) * 7
    expected = [ops.rope(x, cache, positions) for x in (q, k)]
    flat = [ops.rope(x.flatten(1), cache, positions, head_dim=80) for x in (q, k)]
    out = torch.empty_like(q)
    ops.rope.out(q, cache, positions, out=out)
    ops.apply_rope(q, k, cache, positions)
    for name, x, same, side_by_side in zip("qk", (q, k), expected, flat, strict=True):
        assert_same_bits(x, same, name)
        assert_same_bits(x, side_by_side.view_as(x), name)
    assert_same_bits(out, expected[0], "out")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("is_neox", [True, False])
def test_rope_qk_is_rope_with_the_angles_of_each_token(device: str, is_neox: bool) -> None:
    q, k = (randn(7, heads, 64, device=device, seed=heads) for heads in (4, 2))
    cache, positions = cache_of(64, 32, device), torch.arange(7, device=device) * 9
    halves = cache[positions].chunk(2, -1)
    cos, sin = (torch.cat((x, x), -1) if is_neox else x.repeat_interleave(2, -1) for x in halves)
    results = ops.rope_qk(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None], is_neox=is_neox)
    behind = ops.rope_qk(q[None], k[None], cos[None], sin[None], is_neox=is_neox, unsqueeze_dim=2)
    for x, result, same in zip((q, k), results, behind, strict=True):
        assert_same_bits(result[0].transpose(0, 1).contiguous(), same[0], "heads behind tokens")
        torch.testing.assert_close(same[0], ops.rope(x, cache, positions, is_neox=is_neox))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("is_neox", [True, False])
def test_what_cancels_is_zero(device: str, is_neox: bool) -> None:
    """An FMA would leave what the rounding of one product took away."""
    values = randn(5, 2, 32, device=device)
    x = torch.cat((values, values), -1) if is_neox else values.repeat_interleave(2, -1)
    cache = torch.rand(8, 32, generator=torch.Generator().manual_seed(1)).repeat(1, 2).to(device)  # angles of 45 degrees
    turned = ops.rope(x, cache, torch.arange(5, device=device), is_neox=is_neox)
    assert not (turned[..., :32] if is_neox else turned[..., ::2]).any()


def test_as_hugging_face_has_it() -> None:
    """To the two roundings that it makes more of."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    glm = pytest.importorskip("transformers.models.glm.modeling_glm")
    for dtype, error in ((torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 0.03)):
        q, k = (randn(2, 5, heads, 64, dtype=dtype, seed=heads).transpose(1, 2) for heads in (4, 2))
        cos, sin = (randn(2, 5, 64, dtype=dtype, seed=seed).clamp(-1, 1) for seed in (7, 8))
        with fallback.allowed():
            pairs = [(llama.apply_rotary_pos_emb(q, k, cos, sin), ops.rope_qk(q, k, cos, sin))]
            of_pairs = [x[..., :16].repeat_interleave(2, -1) for x in (cos, sin)]  # GLM turns half of a head
            half = (cos[..., :32], sin[..., :32])
            pairs.append((glm.apply_rotary_pos_emb(q, k, *half), ops.rope_qk(q, k, *of_pairs, is_neox=False)))
        for expected, got in pairs:
            for one, other in zip(expected, got, strict=True):
                torch.testing.assert_close(one, other, atol=error, rtol=error)


# --- three positions ------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("section", [[16, 24, 24], [11, 11, 10], [0, 5, 3], [4, 0, 0]], ids=str)
def test_multimodal_positions(device: str, dtype: torch.dtype, is_neox: bool, interleaved: bool, section: list[int]) -> None:
    rope_dim = 2 * sum(section)
    q, k = (randn(9, heads, rope_dim + 8, dtype=dtype, device=device, seed=heads) for heads in (4, 2))
    cache = cache_of(50, rope_dim, device, dtype)
    wide = torch.randint(50, (3, 20), generator=torch.Generator().manual_seed(0)).to(device)
    positions = wide[:, 5:14]  # a slice of a buffer
    options = {"is_neox": is_neox, "mrope_section": section, "mrope_interleaved": interleaved}
    is_right("apply_rope", device, dtype, q, k, cache, positions, **options)
    is_right("rope", device, dtype, q, cache, positions.int(), **options)
    weights = [randn(rope_dim + 8, dtype=dtype, device=device, seed=seed) for seed in (3, 4)]
    is_right("fused_qknorm_rope", device, dtype, q, k, *weights, cache, positions, **options)


def test_the_sections_are_those_of_qwen() -> None:
    """In order as in Qwen2-VL, in turns as in Qwen3-VL: spelled out pair by pair."""
    section, pairs = [8, 12, 12], 32
    in_order = [0] * 8 + [1] * 12 + [2] * 12
    in_turns = [pair % 3 if pair % 3 > 0 and pair < 36 else 0 for pair in range(pairs)]
    x, cache = randn(5, 2, 64), cache_of(40, 64)
    positions = torch.randint(40, (3, 5), generator=torch.Generator().manual_seed(2))
    for interleaved, axes in ((False, in_order), (True, in_turns)):
        expected = torch.empty_like(x)
        for token in range(5):
            for pair, axis in enumerate(axes):
                row = cache[positions[axis, token]]
                cos, sin = row[pair], row[pairs + pair]
                a, b = x[token, :, pair], x[token, :, pairs + pair]
                expected[token, :, pair], expected[token, :, pairs + pair] = a * cos - b * sin, b * cos + a * sin
        got = ops.rope(x, cache, positions, mrope_section=section, mrope_interleaved=interleaved)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_three_equal_positions_are_one(device: str) -> None:
    x, cache = randn(9, 2, 64, device=device), cache_of(40, 64, device)
    positions = torch.arange(9, device=device) * 4
    for interleaved in (False, True):
        thrice = ops.rope(x, cache, positions.expand(3, 9), mrope_section=[8, 12, 12], mrope_interleaved=interleaved)
        assert_same_bits(thrice, ops.rope(x, cache, positions), "three positions")


# --- norms and stores -----------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gemma", [False, True])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_norm_and_rotation_are_the_ops_in_sequence_but_for_a_rounding(device: str, dtype: torch.dtype, gemma: bool) -> None:
    q, k = (randn(33, heads, 96, dtype=dtype, device=device, seed=heads) for heads in (5, 2))
    q_weight, k_weight = (randn(96, device=device, seed=seed) for seed in (3, 4))
    cache, positions = cache_of(64, 96, device), torch.arange(33, device=device)
    norm = ops.gemma_rmsnorm if gemma else ops.rmsnorm
    wide = [ops.rope(norm(x.float(), w, 1e-5), cache, positions) for x, w in ((q, q_weight), (k, k_weight))]
    ops.fused_qknorm_rope(q, k, q_weight, k_weight, cache, positions, 1e-5, gemma=gemma)
    for x, exact in zip((q, k), wide, strict=True):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(x.float(), exact, atol=eps if dtype in HALVES else 1e-5, rtol=0.51 * eps + 2e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [0.0, 2.0**-10], ids=str)
def test_a_head_is_normed_before_its_weight_counts(device: str, value: float) -> None:
    """The product of a small head's scale and a large weight may be infinite, where the normed head is not."""
    q, k = (torch.full((2, n, 64), value, device=device) for n in (2, 1))
    weights = [torch.full((64,), 2.0**120, device=device) for _ in range(2)]
    ops.fused_qknorm_rope(q, k, *weights, torch.zeros(1, 32, device=device), torch.zeros(2, dtype=torch.int64, device=device))
    assert q.isfinite().all()
    assert k.isfinite().all()
    assert (q[..., 32:] != 0).all() == (value != 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, *FP8], ids=str)
@pytest.mark.parametrize("normed", [False, True])
def test_what_is_stored_is_what_is_in_place(device: str, stored: torch.dtype, normed: bool) -> None:
    """Bits of k as it is rounded in place, and of v, converted once; nothing else of the caches is written."""
    tokens, heads, head_dim, v_dim = 9, 2, 80, 48
    q, k = (randn(tokens, n, head_dim, dtype=torch.bfloat16, device=device, seed=n) for n in (6, heads))
    v = randn(tokens, heads, v_dim, dtype=torch.bfloat16, device=device, seed=9) * 300
    weights = [randn(head_dim, dtype=torch.bfloat16, device=device, seed=seed) for seed in (3, 4)] if normed else []
    cache, positions = cache_of(64, 32, device), torch.arange(tokens, device=device) * 5
    indices = torch.tensor([3, 11, -1, 0, 7, -1, 8, 23, 12], device=device)
    scales = [torch.tensor(x, device=device) for x in (0.25, 3.0)] if stored in FP8 else [None, None]
    name = "fused_qknorm_rope" if normed else "apply_rope"
    expected = [q.clone(), k.clone()]
    getattr(ops, name)(*expected, *weights, cache, positions)
    for blocks in ([24], [6, 4]):
        caches = [poisoned([*blocks, heads, dim], stored, device) for dim in (head_dim, v_dim)]
        before = copy_with_storage(Sample(tuple(caches))).args
        turned = [q.clone(), k.clone()]
        named = dict(zip(("k_scale", "v_scale"), scales, strict=True))
        args = (*turned, v, *caches, *weights, cache, positions, indices)
        getattr(ops, f"{name}_store_kv")(*args, **named)
        assert_same_bits(turned[0], expected[0], "q")
        assert_same_bits(turned[1], expected[1], "k")
        for x, into, old, scale in zip((turned[1], v), caches, before, scales, strict=True):
            rows = x.float() if scale is None else x.float() / scale
            if stored in FP8:
                rows = rows.clamp(-torch.finfo(stored).max, torch.finfo(stored).max)
            wanted = old.flatten(0, len(blocks) - 1).clone()
            kept = indices >= 0
            as_bytes = wanted.view(torch.uint8)
            as_bytes[indices[kept]] = rows.to(stored)[kept].contiguous().view(torch.uint8)
            got = into.flatten(0, len(blocks) - 1).view(torch.uint8)
            assert torch.equal(got, as_bytes), f"{(got != as_bytes).sum()} bytes differ"
            assert_only_written_inside(into, old, "a cache")


@pytest.mark.parametrize("device", DEVICES)
def test_two_tokens_of_one_slot(device: str) -> None:
    """Each element of the slot is either's."""
    q, k, v = (randn(2, 1, 16, device=device, seed=seed) for seed in range(3))
    caches = [torch.zeros(4, 1, 16, device=device) for _ in range(2)]
    indices = torch.tensor([2, 2], device=device)
    ops.apply_rope_store_kv(q, k, v, *caches, cache_of(4, 16, device), torch.arange(2, device=device), indices)
    for into, rows in zip(caches, (k, v), strict=True):
        assert ((into[2] == rows[0]) | (into[2] == rows[1])).all()
        assert not into[[0, 1, 3]].any()


# --- many tokens ----------------------------------------------------------------------------------

MANY = 6000  # so that a lane of a large GPU has several heads, the last of them fewer


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("is_neox", [True, False])
def test_many_tokens_are_turned_as_few_are(device: str, dtype: torch.dtype, is_neox: bool) -> None:
    """A token's bits are those of a call for some tokens, which have the GPU to themselves and a head for each team."""
    q, k, v = (randn(MANY, heads, 128, dtype=dtype, device=device, seed=heads) for heads in (5, 3, 3))
    cache, positions = cache_of(MANY, 96, device), torch.randperm(MANY).to(device)
    some = torch.tensor([0, 1, MANY // 2 + 1, MANY - 1], device=device)
    expected = [ops.rope(x[some], cache, positions[some], is_neox=is_neox) for x in (q, k)]
    slots = torch.randperm(MANY + 1, generator=torch.Generator().manual_seed(3))[:MANY].to(device)
    slots[some[1]] = -1
    caches = [poisoned([MANY + 1, 3, 128], dtype, device) for _ in range(2)]
    before = [x.clone() for x in caches]
    results = [ops.rope(x, cache, positions, is_neox=is_neox) for x in (q, k)]
    ops.apply_rope_store_kv(q, k, v, *caches, cache, positions, slots, is_neox=is_neox)
    for x, result, small in zip((q, k), results, expected, strict=True):
        assert_same_bits(result[some], small, "a result")
        assert_same_bits(x, result, "in place")
    kept, empty = slots >= 0, torch.ones(MANY + 1, dtype=torch.bool, device=device)
    empty[slots[kept]] = False
    for into, x, old in zip(caches, (k, v), before, strict=True):
        assert_same_bits(into[slots[kept]], x[kept], "a slot")
        assert_same_bits(into[empty], old[empty], "a slot of no token")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads", [(5, 3), (2, 1), (16, 0)], ids=str)
def test_many_tokens_are_normed_as_few_are(device: str, heads: tuple[int, int]) -> None:
    q, k = (randn(MANY, n, 128, device=device, seed=n) for n in heads)
    weights = [randn(128, device=device, seed=seed) for seed in (3, 4)]
    cache, positions = cache_of(MANY, 96, device), torch.randperm(MANY).to(device)
    some = torch.tensor([0, 7, MANY - 1], device=device)
    few = [x[some].contiguous() for x in (q, k)]
    ops.fused_qknorm_rope(*few, *weights, cache, positions[some])
    ops.fused_qknorm_rope(q, k, *weights, cache, positions)
    for x, small in zip((q, k), few, strict=True):
        torch.testing.assert_close(x[some], small)


needs_cuda = pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU")


@needs_cuda
@pytest.mark.serial
def test_places_behind_the_two_thousand_millionth() -> None:
    """Of tokens, of slots and of rows of the cache of cosines; 32 bits count none of them."""
    far = 2**31 + 64
    if torch.cuda.mem_get_info()[0] < 4 * 2 * far + 2**30:
        pytest.skip("needs 18 GiB of GPU memory")
    qk = torch.zeros(2, far, dtype=torch.bfloat16, device="cuda")
    q, k = (qk.as_strided((2, n, 64), (far, 64, 1), at) for n, at in ((2, 0), (1, 128)))
    q.copy_(randn(2, 2, 64))
    k.copy_(randn(2, 1, 64, seed=1))
    caches = [torch.zeros(far // 64, 1, 64, dtype=torch.float8_e5m2, device="cuda") for _ in range(2)]
    angles = torch.zeros(far // 64 + 1, 64, dtype=torch.bfloat16, device="cuda")
    angles[-1] = cache_of(9, 64, "cuda", torch.bfloat16)[8]
    positions, slots = torch.tensor([far // 64, far // 64], device="cuda"), torch.tensor([far // 64 - 1, 2], device="cuda")
    expected = [ops.rope(x.contiguous(), angles[-1:].clone(), torch.zeros_like(positions)) for x in (q, k)]
    ops.apply_rope_store_kv(q, k, k.clone(), *caches, angles, positions, slots)
    assert_same_bits(q.contiguous(), expected[0], "q")
    assert_same_bits(k.contiguous(), expected[1], "k")
    assert_same_bits(caches[0].view(torch.uint8)[slots], expected[1].to(torch.float8_e5m2).view(torch.uint8), "slots")


# --- refusals -------------------------------------------------------------------------------------


def refusal(run: Any) -> str:
    with pytest.raises(RuntimeError) as raised:
        run()
    return "\n".join(line for line in str(raised.value).splitlines() if not line.startswith("  at "))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("wrong", [-1, 40, 2**31 - 1])
def test_a_position_outside_of_the_cache(dtype: torch.dtype, wrong: int) -> None:
    q, k = randn(5, 2, 16), randn(5, 1, 16)
    before = q.clone()
    positions = torch.tensor([0, 39, 3, wrong, 4], dtype=dtype)
    expected = (
        "jitk::apply_rope: argument 'positions' holds an index out of range\n  expected  0 to 39\n"
        f"  got       {wrong} at position 3"
    )
    assert refusal(lambda: ops.apply_rope(q, k, cache_of(40, 16), positions)) == expected
    assert torch.equal(q, before), "nothing is written before the check"
    three = torch.stack((positions.clamp(0, 39), positions, positions))
    expected = expected.replace("apply_rope", "rope").replace("position 3", "position 8")
    call_it = lambda: ops.rope(q, cache_of(40, 16), three.T.contiguous().T, mrope_section=[2, 3, 3])  # noqa: E731
    assert refusal(call_it) == expected
    with fallback.allowed(), pytest.raises(RuntimeError, match="out of range"):
        ops.rope(q.double(), cache_of(40, 16), positions)


def test_a_slot_outside_of_the_cache() -> None:
    q, k, v = randn(3, 2, 16), randn(3, 1, 16), randn(3, 1, 16)
    caches = [torch.zeros(2, 3, 1, 16) for _ in range(2)]
    args = (q, k, v, *caches, cache_of(8, 16), torch.arange(3))
    assert_expected_inline(
        refusal(lambda: ops.apply_rope_store_kv(*args, torch.tensor([0, 6, -2]))),
        """\
jitk::apply_rope_store_kv: argument 'indices' holds an index out of range
  expected  0 to 5, or -1 to skip
  got       6 at position 1""",
    )
    assert not any(cache.any() for cache in caches)


def test_what_does_not_fit_together() -> None:
    q, k, cache, positions = randn(3, 2, 16), randn(3, 1, 16), cache_of(8, 16), torch.arange(3)

    def refused(*args: Any, **kwargs: Any) -> str:
        return refusal(lambda: ops.apply_rope(*args, **kwargs))

    assert_expected_inline(
        "\n".join(
            [
                refused(q, k, cache_of(8, 18), positions),
                refused(q, k, torch.zeros(8, 5), positions),
                refused(q, k[:2], cache, positions),
                refused(q, k, cache, positions[:2]),
                refused(q, k, cache, torch.zeros(3, 3, dtype=torch.int64)),
                refused(q, k, cache, positions, mrope_section=[2, 3, 3]),
                refused(q, k, cache, torch.zeros(3, 3, dtype=torch.int64), mrope_section=[2, 3, 4]),
                refused(q.flatten(1), k, cache, positions, head_dim=12),
                refused(q, k, cache, positions, head_dim=12),
                refused(q, k.bfloat16(), cache, positions),
            ]
        ),
        """\
jitk::apply_rope: rope_dim must be even and at most head_dim, 16, got 18
jitk::apply_rope: argument 'cos_sin_cache' must be [max_position, rope_dim] with an even rope_dim, got [8, 5]
jitk::apply_rope: argument 'k' does not match
  expected  [tokens=3, k_heads, head_dim]  float32  cpu  strides [*, *, 1]
  got       [2, 1, 16]                     float32  cpu
  dimension 0: tokens was bound to 3 by 'q'
jitk::apply_rope: argument 'positions' does not match
  expected  [tokens=3]  int32|int64  cpu  strides [*]
  got       [2]         int64        cpu
  dimension 0: tokens was bound to 3 by 'q'
jitk::apply_rope: argument 'positions' does not match
  expected  [tokens=3]  int32|int64  cpu  strides [*]
  got       [3, 3]      int64        cpu
  it has 2 dimensions, expected 1
jitk::apply_rope: argument 'positions' does not match
  expected  [3, tokens=3]  int32|int64  cpu  strides [*, *]
  got       [3]            int64        cpu
  it has 1 dimensions, expected 2
jitk::apply_rope: mrope_section must be 3 numbers whose sum is rope_dim / 2, 8, got [2, 3, 4]
jitk::apply_rope: argument 'q' has rows of 32 elements, which are no heads of 12
jitk::apply_rope: argument 'q' does not match
  expected  [tokens=3, q_heads=2, head_dim=12]  float32  cpu  strides [*, *, 1]
  got       [3, 2, 16]                          float32  cpu
  dimension 2: head_dim was bound to 12 by 'head_dim'
jitk::apply_rope: argument 'k' does not match
  expected  [tokens=3, k_heads=1, head_dim=16]  float32   cpu  strides [*, *, 1]
  got       [3, 1, 16]                          bfloat16  cpu
  dtype bfloat16 is not among those expected""",
    )


def test_a_traced_call_is_refused_as_well() -> None:
    q, k, cache = (torch.empty(shape, device="meta") for shape in ((3, 2, 16), (3, 1, 16), (8, 18)))
    positions = torch.empty(3, device="meta", dtype=torch.int64)
    with pytest.raises(ValueError, match="rope_dim must be even and at most head_dim, 16, got 18"):
        ops.apply_rope(q, k, cache, positions)
    with pytest.raises(ValueError, match="positions are of 2 tokens, the first argument has 3"):
        ops.apply_rope(q, k, cache[:, :16], positions[:2])


# --- derivatives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
def test_derivatives_of_angles_that_are_not_equal(is_neox: bool, unsqueeze_dim: int) -> None:
    """Also of cosines and sines; those of one batch, for all of them."""
    q, k = (randn(2, 3, 3, 8, dtype=torch.float64, seed=seed).requires_grad_() for seed in (1, 2))
    cos = randn(2, 3, 6, dtype=torch.float64, seed=3).requires_grad_()
    sin = randn(1, 3, 6, dtype=torch.float64, seed=4).requires_grad_()

    def run(*args: Tensor) -> Any:
        return ops.rope_qk(*args, is_neox=is_neox, unsqueeze_dim=unsqueeze_dim)

    with fallback.allowed():
        assert torch.autograd.gradcheck(run, (q, k, cos, sin))
        assert torch.autograd.gradcheck(run, (q, k, cos.detach(), sin.detach()))
        assert torch.autograd.gradgradcheck(run, (q, k, cos, sin))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_gradients_have_a_kernel_and_turn_back(device: str, dtype: torch.dtype) -> None:
    q, k = (randn(2, 5, heads, 64, dtype=dtype, device=device).transpose(1, 2).requires_grad_() for heads in (4, 2))
    angles = cache_of(5, 64, device)
    cos, sin = (torch.cat((half, half), -1)[None] for half in angles.chunk(2, -1))
    with ROPES["rope_qk"].kernels_alone(), ROPES["rope_qk_backward"].kernels_alone():
        results = ops.rope_qk(q, k, cos, sin)
        grads = torch.autograd.grad(results, (q, k), results)
    eps = 2 * torch.finfo(dtype).eps
    for x, grad in zip((q, k), grads, strict=True):  # a rotation and its inverse
        torch.testing.assert_close(grad, x, atol=4 * eps, rtol=eps)
    torch.autograd.grad(ops.rope_qk(q, k, cos, sin)[0].sum(), (q,))  # a gradient with strides of 0


# --- compiled -------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_for_any_number_of_tokens(device: str) -> None:
    cache = cache_of(100, 64, device)

    def block(qkv: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        q, k, _ = qkv.split([4, 2, 2], 1)
        q, k = q + 0.5, k + 0.5
        ops.apply_rope(q, k, cache, positions)
        again = ops.rope(q * 2, cache, positions, is_neox=False)
        heads = ops.rope_qk(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
        return q, k, again, *heads

    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for tokens in (7, 20, 1):
        qkv = randn(tokens, 8, 64, dtype=torch.bfloat16, device=device)
        positions = torch.arange(tokens, device=device)
        angles = [randn(1, tokens, 64, device=device, seed=seed) for seed in (5, 6)]
        for got, expected in zip(compiled(qkv, positions, *angles), block(qkv, positions, *angles), strict=True):
            torch.testing.assert_close(got, expected)


# --- random calls ---------------------------------------------------------------------------------


def _laid_out(tensor: Tensor, random: Random) -> Tensor:
    """The same values among poison: at an odd place, with gaps, with dimensions in another order, or as they are."""
    if tensor.dim() == 0 or random.random() < 0.3:
        return tensor
    order = [*range(tensor.dim() - 1)]
    random.shuffle(order)
    strides, step = [0] * (tensor.dim() - 1) + [1], max(tensor.shape[-1], 1) + random.choice([0, 0, 1, 8, 24])
    for dim in order:
        strides[dim] = step
        step = step * max(tensor.shape[dim], 1) + random.choice([0, 0, 1, 8])
    place = poisoned(tensor.shape, tensor.dtype, tensor.device.type, strides)
    return place.as_strided(place.shape, place.stride(), place.storage_offset() + random.choice([0, 0, 1, 16])).copy_(tensor)


def _random_call(name: str, random: Random, make: SampleMaker) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
    tokens, places = random.choice([0, 1, 2, 17, 65]), random.choice([3, 5, 300])
    head_dim = random.choice([1, 2, 7, 16, 24, 64, 96, 128, 192, 256, 520, random.randint(1, 700)])
    rope_dim = random.choice([head_dim // 2 * 2, head_dim // 4 * 2, 2 * random.randint(0, head_dim // 2)])
    q_heads, k_heads = random.choice([0, 1, 3, 8]), random.choice([0, 1, 2])
    options: dict[str, Any] = {"is_neox": random.random() < 0.5}
    angle_dtype = random.choice([torch.float32, torch.bfloat16, torch.float16])
    if name.startswith("rope_qk"):
        batch, options["unsqueeze_dim"] = random.choice([1, 2, 3]), random.choice([1, 2])
        shapes = [(batch, tokens, n, head_dim) for n in (q_heads, k_heads)]
        if options["unsqueeze_dim"] == 1:
            shapes = [(b, n, t, d) for b, t, n, d in shapes]
        qk = [_laid_out(make.randn(*shape), random) for shape in shapes]
        angles = [make.randn(random.choice([1, batch]), tokens, rope_dim, dtype=angle_dtype).clamp(-1, 1) for _ in range(2)]
        return (*qk, *[_laid_out(x, random) for x in angles]), options
    cache = _laid_out(make.randn(places, rope_dim, dtype=angle_dtype).clamp(-1, 1), random)
    index_dtype = random.choice([torch.int32, torch.int64])
    positions = make.positions(tokens, below=places, dtype=index_dtype)
    if random.random() < 0.25:
        positions = make.positions(3 * tokens, below=places, dtype=index_dtype).view(3, tokens)
        cuts = sorted(random.randint(0, rope_dim // 2) for _ in range(2))
        options["mrope_section"] = [cuts[0], cuts[1] - cuts[0], rope_dim // 2 - cuts[1]]
        options["mrope_interleaved"] = random.random() < 0.5
    x = [make.randn(tokens, n, head_dim) for n in (q_heads, k_heads, k_heads)]
    if random.random() < 0.2:
        x, options["head_dim"] = [each.flatten(1) for each in x], head_dim
    q, k, v = (_laid_out(each, random) for each in x)
    if name == "rope":
        return (q, cache, positions), options
    weights = [make.randn(head_dim, dtype=random.choice([angle_dtype])) for _ in range(2)]
    if "qknorm" in name:
        options["gemma"] = random.random() < 0.5
    if not name.endswith("store_kv"):
        return (q, k, *(weights if "qknorm" in name else []), cache, positions), options
    slots = random.choice([[tokens + 3], [random.randint(1, 9), tokens + 1]])
    caches = [_laid_out(make.randn(*slots, k_heads, head_dim, dtype=make.dtypes["k_cache"]), random) for _ in range(2)]
    count = slots[0] * (slots[1] if len(slots) > 1 else 1)
    indices = make.indices(tokens, below=count, unique=True, dtype=index_dtype)
    indices = torch.where(make.booleans(tokens, chance=0.2), torch.full_like(indices, -1), indices)
    if random.random() < 0.5 and caches[0].dtype.itemsize == 1:
        options |= {"k_scale": make.values(0.5, dtype=torch.float32), "v_scale": make.values(3, dtype=torch.float32)}
    return (q, k, v, *caches, *(weights if "qknorm" in name else []), cache, positions, indices), options


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ROPES)
def test_random_calls(name: str, device: str) -> None:
    """Shapes, layouts, places and dtypes at random, against the truth; nothing else is written."""
    op = ROPES[name]
    for seed in fuzz.seeds(40):
        random = Random(seed)
        dtypes = random.choice(op.declaration.dtypes.combinations())
        args, options = _random_call(name, random, SampleMaker(device, dtypes, seed))
        try:
            is_right(name, device, dtypes, *args, **options)
        except Exception as error:
            shapes = [(list(x.shape), x.stride(), x.dtype) for x in args if x is not None]
            raise AssertionError(f"seed {seed}, {dtypes}, {shapes}, {options}: {error}") from error
