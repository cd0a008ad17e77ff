"""Dtypes argument by argument: what is declared, the combinations that follow, samples of every dtype, and their judge."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trial_library
from expecttest import assert_expected_inline
from torch import Tensor
from trial_library import FP8

from torch_jit_ops import Op, OpLibrary, Sample, SampleMaker
from torch_jit_ops.ahead import build_ahead
from torch_jit_ops.cli import main
from torch_jit_ops.testing import calls, check, oracle

OPS = trial_library.library.ops
_numbers = itertools.count()
F16, BF16, F32, I32, I64 = torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.int64
E5M2, E8M0 = torch.float8_e5m2, torch.float8_e8m0fnu


def pick(x: Tensor, ids: Tensor, weight: Tensor | None = None) -> Tensor:
    """The elements of x at ids."""
    return x[ids.long()]


def _picks(make: SampleMaker) -> Iterator[Sample]:
    ids = make.dtypes.get("ids", I64)
    yield Sample((make.randn(9), make.indices(5, below=9, dtype=ids)), note="five of nine")


def declared(folder: Path, **options: Any) -> Op:
    (folder / "pick.cpp").touch()
    library = OpLibrary(f"typed{next(_numbers)}", csrc=folder)
    given = {"cpu": "pick.cpp", "variant": "pick<{x.dtype}, {ids.dtype}>", "samples": _picks, **options}
    return library.op(**given)(pick)


# --- declarations ---------------------------------------------------------------------------------


def test_a_mapping_that_cannot_be(tmp_path: Path) -> None:
    texts = []
    for dtypes in (
        {},
        {"x": (F32,)},
        {"x": (F32,), "ids": (I64,), "y": (F32,)},
        {"x": (F32,), "ids": ()},
        {"x": F32, "ids": (I64,)},
        {"x": "float32", "ids": (I64,)},
        {"x": (F32,), "ids": ("int64",)},
        {"x": (torch.complex64,), "ids": (I64,)},
    ):
        with pytest.raises((TypeError, ValueError)) as caught:
            declared(tmp_path, dtypes=dtypes)
        texts.append(f"{caught.type.__name__} {str(caught.value).partition('::')[2].partition('; those that')[0]}")
    assert_expected_inline(
        "\n".join(texts),
        """\
ValueError pick: dtypes is empty; name a tensor argument, or give a tuple for all of them
ValueError pick: the dtype of 'ids' picks the kernel, but dtypes does not name it; it names x
ValueError pick: dtypes names 'y'; its tensor arguments are x, ids, weight
ValueError pick: dtypes of 'ids' is empty; it needs one dtype at least
TypeError pick: dtypes of 'x' must be a list, got torch.float32
TypeError pick: dtypes of 'x' must be a list, got 'float32'
TypeError pick: dtypes of 'ids' must hold dtypes of torch, got 'int64'
ValueError pick: dtypes of 'x': torch.complex64 has no C++ type in kernels""",
    )


def test_combinations(tmp_path: Path) -> None:
    named = declared(tmp_path, dtypes={"x": (F16, F32), "ids": (I32, I64)}).declaration.dtypes
    shared = declared(tmp_path, dtypes=(F32, I64)).declaration.dtypes
    shown = [
        " ".join(map(str, combinations))
        for combinations in (
            named.combinations(),
            named.combinations([I64]),
            named.combinations([F32, I32]),
            named.combinations({"x": [F16]}),
            shared.combinations(),
            shared.combinations([I64]),
        )
    ]
    assert_expected_inline(
        "\n".join(shown),
        """\
x=float16,ids=int32 x=float16,ids=int64 x=float32,ids=int32 x=float32,ids=int64
x=float16,ids=int64 x=float32,ids=int64
x=float32,ids=int32
x=float16,ids=int32 x=float16,ids=int64
float32 int64
int64""",
    )
    assert [each.first for each in named.combinations()] == [F16, F16, F32, F32]
    assert dict(shared.combinations()[0].named) == {"x": F32, "ids": F32}
    assert dict(named) == {"x": (F16, F32), "ids": (I32, I64)}


def test_there_is_no_kernel_for_what_is_asked(tmp_path: Path) -> None:
    named = declared(tmp_path, dtypes={"x": (F16, F32), "ids": (I32, I64)})
    shared = declared(tmp_path, dtypes=(F32,))
    texts = []
    for op, only in ((named, [BF16]), (named, {"x": [I32]}), (named, {"y": [F32]}), (shared, [F16]), (shared, {"x": [F32]})):
        with pytest.raises(ValueError) as caught:
            check(op, dtypes=only)
        texts.append(str(caught.value))
    with pytest.raises(ValueError) as caught:
        build_ahead.needed([named], [BF16], backend="cpu")
    texts.append(str(caught.value).partition("::")[2])
    assert_expected_inline(
        "\n".join(texts),
        """\
there are kernels for x: float16, float32; ids: int32, int64; got bfloat16
there are kernels for x: float16, float32; ids: int32, int64; got x: int32
there are kernels for x: float16, float32; ids: int32, int64; got y: float32
there are kernels for float32; got float16
all arguments have the same dtypes, float32; got some for x
pick has kernels for x: float16, float32; ids: int32, int64; got bfloat16""",
    )


def test_what_has_no_kernel_is_said_of_its_argument(tmp_path: Path) -> None:
    unserved = declared(tmp_path, dtypes={"x": (F16, F32), "ids": (I32, I64)}).declaration.unserved
    assert unserved({"x": F32, "ids": I32}) is None
    assert str(unserved({"x": F32, "ids": torch.int16})) == "argument 'ids' is int16, and there are kernels for int32, int64"
    # One that has kernels for another argument.
    assert str(unserved({"x": I32, "ids": I32})) == "argument 'x' is int32, and there are kernels for float16, float32"


def test_build_takes_the_product(tmp_path: Path) -> None:
    def values(op: Op, *args: Any) -> list[str]:
        wanted = build_ahead.needed([op], *args, backend="cpu")
        return [", ".join(str(value).removeprefix("torch.") for value in each.values) for each in wanted]

    named = {"x": (F16, F32), "ids": (I32, I64)}
    without = declared(tmp_path, dtypes=named, samples=None)
    with_weight = declared(tmp_path, dtypes={**named, "weight": (F32,)}, variant="pick<{x.dtype}, {ids.dtype}, {weight.dtype}>")
    texts = [values(without), values(without, [I64]), values(without, None, {"x.dtype": "float32"}), values(with_weight, [F32])]
    assert_expected_inline(
        "\n".join(map(" | ".join, texts)),
        """\
float16, int32 | float16, int64 | float32, int32 | float32, int64
float16, int64 | float32, int64
float32, int32 | float32, int64
float32, int32, None | float32, int64, None""",
    )


def test_list_shows_each_argument(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["list", "trial::store_kv_cache"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "dtypes" in line]
    assert lines == ["    dtypes    k: float16 bfloat16, k_cache: bfloat16 float8_e4m3fn, indices: int32 int64"]


# --- samples --------------------------------------------------------------------------------------


def test_samples_are_the_same_for_a_seed_and_in_their_range() -> None:
    def made() -> dict[str, Tensor]:
        make = SampleMaker("cpu", BF16, seed=3)
        tensors = {str(dtype): make.randn(1000, scale=200, dtype=dtype) for dtype in (BF16, FP8, E5M2, E8M0, torch.uint8, I32)}
        return {
            **tensors,
            "indices": make.indices(50, below=64, dtype=I32),
            "unique": make.indices(64, below=64, unique=True),
            "positions": make.positions(7, below=4096),
            "booleans": make.booleans(1000, chance=0.1),
        }

    one, other = made(), made()
    for name, tensor in one.items():
        calls.assert_same_bits(tensor, other[name], name)
    assert one[str(FP8)].double().abs().max() == 448
    assert sorted({float(value) for value in one[str(E8M0)].double()}) == [2.0**power for power in range(-4, 5)]
    assert one["torch.uint8"].max() == 100
    assert one["torch.int32"].min() == -100
    assert sorted(one["unique"].tolist()) == list(range(64))
    for name, below in (("indices", 64), ("positions", 4096)):
        assert (one[name].min(), one[name].max()) == (0, below - 1), "both ends, where kernels reach too far"
    assert one["indices"].dtype == I32
    assert 50 < int(one["booleans"].sum()) < 200


@pytest.mark.parametrize("count", range(6))
def test_indices_of_any_number_are_unique(count: int) -> None:
    for seed in range(20):
        made = SampleMaker("cpu", F32, seed).indices(count, below=5, unique=True) if count < 6 else None
        assert made is not None
        assert len(set(made.tolist())) == count
        assert all(0 <= index < 5 for index in made.tolist())


def test_more_indices_than_there_are() -> None:
    with pytest.raises(ValueError, match="there are 4 indices below 4, fewer than 5"):
        SampleMaker("cpu", F32).indices(5, below=4, unique=True)
    assert SampleMaker("cpu", F32).indices(0, below=0).tolist() == []


def test_indices_keep_their_values() -> None:
    """Where others become extreme: also for an op whose numbers are of the indices' dtype, or whose author altered them."""
    op = OPS["store_kv_cache"]
    assert (calls.kept_arguments(op), calls.kept_arguments(OPS["rope"])) == ({"indices"}, {"positions"})
    (given, *_) = calls.samples_of(op, "cpu", op.declaration.dtypes.combinations()[0])
    for dtype, changed in ((F16, {0, 1}), (I32, set()), (BF16, {2, 3})):
        extreme = calls.with_extremes(op, given, dtype)
        pairs = enumerate(zip(given.args, extreme.args, strict=True))
        assert {place for place, (old, new) in pairs if not torch.equal(calls.bits(old), calls.bits(new))} == changed


@pytest.mark.parametrize("dtype", [FP8, E5M2, E8M0, torch.bool, torch.uint8, I64], ids=str)
def test_extreme_values_of_every_dtype(dtype: torch.dtype) -> None:
    special = calls._special_values(dtype, None)
    assert special.dtype == dtype
    if dtype.is_floating_point:
        numbers = special.double()
        assert numbers.isnan().sum() == 1
        assert numbers.nan_to_num(0, torch.inf).max() == (torch.inf if dtype == E5M2 else torch.finfo(dtype).max)


@pytest.mark.parametrize("dtype", [FP8, E5M2, E8M0, torch.bool, torch.uint8, I64, BF16], ids=str)
def test_poison_is_no_result(dtype: torch.dtype) -> None:
    poison = calls.poisoned([3, 5], dtype, "cpu", [16, 2])
    assert poison.stride() == (16, 2)
    if dtype.is_floating_point:
        assert poison.double().isnan().all()
    else:
        assert not set(calls.bits(poison).tolist()) & {0, 1}


# --- the judge ------------------------------------------------------------------------------------


def blocks(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each row over a power of two, in e5m2; that power, in e8m0; where x was negative; and the nearest integers."""
    wide = x.float()
    scale = torch.exp2(torch.floor(torch.log2(wide.abs().amax(-1, keepdim=True))) - 8)
    return (wide / scale).to(E5M2), scale.to(E8M0), x < 0, (wide * 8).round().clamp(-127, 127).to(torch.int8)


def _blocks(make: SampleMaker) -> Iterator[Sample]:
    yield Sample((make.randn(5, 32),), note="a few rows")
    yield Sample((make.values(4, 0.5625, 0.6875, 0.1875, 1 / 3).view(1, 5),), note="ties")


@pytest.fixture(scope="module")
def judged() -> Op:
    library = OpLibrary("judged", csrc=Path(__file__).parent)
    return library.op(dtypes=(BF16, F32), samples=_blocks, outputs=("out", "scale", "negative", "nearest"))(blocks)


def test_an_op_of_every_dtype_passes(judged: Op) -> None:
    check(judged)


def _step(tensor: Tensor, place: int) -> None:
    bytes_ = tensor.view(torch.uint8).view(-1)
    bytes_[place] += 1 if bytes_[place] % 2 == 0 else -1


def _to_nan(tensor: Tensor, place: int) -> None:
    tensor.view(torch.uint8).view(-1)[place] = 0xFF


def _negated(tensor: Tensor, place: int) -> None:
    tensor.view(torch.uint8).view(-1)[place] ^= 0x80 if tensor.dtype != torch.bool else 1


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("change", [_step, _to_nan, _negated])
@pytest.mark.parametrize("result", range(4))
def test_one_step_is_noticed(judged: Op, result: int, change: Callable[[Tensor, int], None], dtype: torch.dtype) -> None:
    for given in calls.samples_of(judged, "cpu", dtype):
        for place in (0, 2):
            actual = calls.call(judged, given, judged.reference)
            oracle.verify(judged, "cpu", dtype, given, actual)
            change(actual.tensors[result], place % actual.tensors[result].numel())
            with pytest.raises(AssertionError, match=f"result {result}: 1 of .* elements are wrong"):
                oracle.verify(judged, "cpu", dtype, given, actual)


def test_a_rounding_error_may_decide_a_tie(judged: Op) -> None:
    """Where the reference has computed the tie exactly there is none, and only the even neighbour is right."""
    library = OpLibrary(f"judged{next(_numbers)}", csrc=Path(__file__).parent)

    def exact(x: Tensor) -> Tensor:
        return (x.float() / 4 * 4).to(E5M2)

    def inexact(x: Tensor) -> Tensor:
        return (x.float() / 5 * 5).to(E5M2)

    given = Sample((torch.tensor([[4.5]]),))
    for function, right in ((exact, [4.0]), (inexact, [4.0, 5.0])):
        op = library.op(dtypes=(F32,), samples=_blocks)(function)
        for value in (3.5, 4.0, 5.0, 6.0):
            actual = calls.outcome(op, given, torch.tensor([[value]]).to(E5M2))
            with contextlib.nullcontext() if value in right else pytest.raises(AssertionError, match="elements are wrong"):
                oracle.verify(op, "cpu", F32, given, actual)


def test_what_fp32_holds_beside_a_half_is_no_rounding(judged: Op) -> None:
    """``x.float()`` in a reference is no rounding of the truth: a scale is judged by what it would be without any."""
    library = OpLibrary(f"judged{next(_numbers)}", csrc=Path(__file__).parent)

    def scale(x: Tensor) -> Tensor:
        return x.float().abs().amax(-1, keepdim=True) / 448

    op = library.op(dtypes=(BF16,), samples=_blocks)(scale)
    (given, *_) = calls.samples_of(op, "cpu", BF16)
    truth = oracle.in_float64(op, given).tensors[0]
    assert truth.dtype == torch.float64
    assert (truth.float().double() != truth).any()
    actual = calls.call(op, given, op.reference)
    oracle.verify(op, "cpu", BF16, given, actual)
    actual.tensors[0].mul_(1 + 2.0**-21)
    with pytest.raises(AssertionError, match="elements are wrong"):
        oracle.verify(op, "cpu", BF16, given, actual)
