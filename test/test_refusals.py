"""Every way to call an op accepts, or refuses, the same arguments: kernel, function, fake, meta tensors and torch.compile.

Arguments come of the op's own: small ones that fit, of which some are changed in one of the ways of ``_CHANGES``. ``_HOSTILE``
seeds run here; ``JITK_TEST_REFUSALS=5000`` runs that many for each op.
"""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import OPS, devices, kept_arguments, last_dtypes, samples_of, tensors_of
from expecttest import assert_expected_inline
from torch import Tensor
from torch._dynamo import testing as dynamo_testing
from torch._subclasses.fake_tensor import FakeTensorMode

from torch_jit_ops import Op, Sample

_HOSTILE = int(os.environ.get("JITK_TEST_REFUSALS", "60"))
_COMPILED = 6  # of them


def _is_of_declared_tensors(op: Op) -> bool:
    """Others, whose tensors are in lists or may be on another device, say what they refuse in tests of their own."""
    named = {pattern.name for pattern in op.declaration.tensors}
    return all(argument.kind not in "TL" or argument.name in named for argument in op.signature.arguments)


BUILT_IN = [op for op in OPS if op.declaration.namespace == "jitk" and _is_of_declared_tensors(op)]
DEVICE = devices()[-1]
DTYPES = [torch.float64, torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float16]


# --- arguments ------------------------------------------------------------------------------------


_SIZES = {"hidden": 8, "d": 4, "head_dim": 8, "tokens": 3, "q_heads": 4, "k_heads": 2}


def _arguments(op: Op, rng: random.Random) -> dict[str, Any]:
    """Arguments by name that fit: sizes that are as distinct as the op lets them be."""
    if any(size.name not in (None, *_SIZES) for pattern in op.declaration.tensors for size in pattern.sizes) or _indices(op):
        return _of_a_sample(op, rng)
    leading = rng.choice([[3, 5], [3, 5], [3], [2, 3, 5]])
    given: dict[str, Any] = {}
    first, dtypes = last_dtypes(op).first, dict(last_dtypes(op).named)
    for argument in op.signature.arguments:
        pattern = next((pattern for pattern in op.declaration.tensors if pattern.name == argument.name), None)
        if pattern is not None:
            shape = (leading if pattern.leading else []) + [
                size.number * _SIZES[size.name] for size in pattern.sizes if size.name
            ]
            given[argument.name] = torch.ones(shape, dtype=dtypes.get(argument.name, first))
        elif argument.kind == "i":
            given[argument.name] = 5
    return given


def _of_a_sample(op: Op, rng: random.Random) -> dict[str, Any]:
    """What the op itself says that its arguments may be: one of its smaller samples, where sizes depend on one another."""
    sample = rng.choice(_small_samples(op, rng.randrange(len(op.declaration.dtypes.combinations()))))
    return op.declaration.by_name(sample.args, sample.kwargs)


@functools.cache
def _small_samples(op: Op, combination: int) -> list[Sample]:
    samples = samples_of(op, "cpu", op.declaration.dtypes.combinations()[combination])
    return sorted(samples, key=lambda sample: sum(tensor.numel() for tensor in tensors_of(sample)))[:5]


@functools.cache
def _indices(op: Op) -> frozenset[str]:
    """Arguments whose values must be in range."""
    integers = [
        pattern.name for pattern in op.declaration.tensors if not any(dtype.is_floating_point for dtype in pattern.dtypes)
    ]
    return kept_arguments(op) & frozenset(integers)


def _resized(tensor: Tensor, dim: int, size: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = size
    return torch.ones(shape, dtype=tensor.dtype)


def _dimension(tensor: Tensor, rng: random.Random) -> int:
    return rng.randrange(tensor.dim()) if tensor.dim() else 0


_CHANGES: dict[str, Callable[[Tensor, random.Random], Tensor]] = {
    "one size is 1": lambda x, rng: _resized(x, _dimension(x, rng), 1) if x.dim() else x,
    "one size is 0": lambda x, rng: _resized(x, _dimension(x, rng), 0) if x.dim() else x,
    "one size is one more": lambda x, rng: _resized(x, i := _dimension(x, rng), x.shape[i] + 1) if x.dim() else x,
    "one size is doubled": lambda x, rng: _resized(x, i := _dimension(x, rng), x.shape[i] * 2) if x.dim() else x,
    "one size is halved": lambda x, rng: _resized(x, i := _dimension(x, rng), x.shape[i] // 2) if x.dim() else x,
    "no dimension": lambda x, rng: torch.ones((), dtype=x.dtype),
    "one dimension": lambda x, rng: torch.ones(x.shape[-1:], dtype=x.dtype),
    "a dimension less": lambda x, rng: torch.ones(x.shape[1:], dtype=x.dtype),
    "a dimension of 1 more": lambda x, rng: torch.ones((1, *x.shape), dtype=x.dtype),
    "another dimension of 1": lambda x, rng: torch.ones((*x.shape, 1), dtype=x.dtype),
    "sizes in another order": lambda x, rng: torch.ones(rng.sample(list(x.shape), x.dim()), dtype=x.dtype),
    "leading dimensions in one": lambda x, rng: torch.ones(_merged(x), dtype=x.dtype),
    "another dtype": lambda x, rng: torch.ones(x.shape).to(rng.choice(DTYPES)),
    "another device": lambda x, rng: x.to("meta"),
}

# The same sizes in other places of memory.
_LAYOUTS: dict[str, Callable[[Tensor, random.Random], Tensor]] = {
    "transposed": lambda x, rng: _in_order(x, rng.sample(range(x.dim()), x.dim())),
    "channels first in memory": lambda x, rng: _in_order(x, [*range(1, x.dim()), 0]) if x.dim() else x,
    "channels last in memory": lambda x, rng: _in_order(x, [0, x.dim() - 1, *range(1, x.dim() - 1)]) if x.dim() > 1 else x,
    "every other one": lambda x, rng: _resized(x, i := _dimension(x, rng), 2 * x.shape[i])[_every(i, step=2)] if x.dim() else x,
    "a slice": lambda x, rng: _resized(x, i := _dimension(x, rng), x.shape[i] + 4)[_every(i, begin=4)] if x.dim() else x,
    "expanded": lambda x, rng: _resized(x, _dimension(x, rng), 1).expand(x.shape) if x.dim() else x,
    "expanded from one element": lambda x, rng: torch.ones((), dtype=x.dtype).expand(x.shape),
    "behind an offset": lambda x, rng: torch.ones(x.numel() + 3, dtype=x.dtype)[3:].view(x.shape),
    "some strides": lambda x, rng: _strided(x.shape, [rng.choice([0, 1, 2, *x.shape, *_steps(x)]) for _ in x.shape], x),
    "nearly its strides": lambda x, rng: _strided(x.shape, [step + rng.choice([0, 0, 1]) for step in x.stride()], x),
    "a size of 1 with some stride": lambda x, rng: _strided([*x.shape[:-1], 1], [*x.stride()[:-1], 7], x) if x.dim() else x,
}
_CHANGES |= _LAYOUTS


def _in_order(x: Tensor, order: list[int]) -> Tensor:
    """The dimensions lie in memory in this order, the outermost first."""
    return torch.ones([x.shape[dim] for dim in order], dtype=x.dtype).permute([order.index(dim) for dim in range(x.dim())])


def _every(dim: int, begin: int = 0, step: int = 1) -> tuple[slice, ...]:
    return (*(slice(None) for _ in range(dim)), slice(begin, None, step))


def _steps(x: Tensor) -> list[int]:
    return list(torch.ones(x.shape, device="meta").stride())


def _strided(shape: Any, strides: Any, like: Tensor) -> Tensor:
    if like.device.type == "meta":
        return torch.empty_strided(shape, strides, dtype=like.dtype, device="meta")
    storage = torch.ones(
        torch.empty_strided(shape, strides, device="meta").untyped_storage().nbytes() // 4 + 1, dtype=like.dtype
    )
    return storage.as_strided(shape, strides)


def _merged(x: Tensor) -> list[int]:
    return [x.shape[0] * x.shape[1], *x.shape[2:]] if x.dim() > 1 else list(x.shape)


def _hostile(op: Op, seed: int) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """Arguments and outputs, and what is wrong with them; outputs are for half of the calls of ops that have any."""
    rng = random.Random(f"{op.qualified_name} {seed}")
    given = _arguments(op, rng)
    outs: dict[str, Tensor] = {}
    if op.declaration.outputs and rng.random() < 0.5:
        results = op.default(**given)
        results = results if isinstance(results, tuple) else (results,)
        outs = dict(zip(op.declaration.outputs, map(torch.empty_like, results), strict=True))
    said = []
    for _ in range(rng.choice([0, 1, 1, 1, 1, 2, 2])):
        both = {**given, **outs}
        name = rng.choice([name for name, value in both.items() if isinstance(value, Tensor)])
        how = rng.choice([*rng.choice([_CHANGES, _LAYOUTS]), "swapped"])
        if how == "swapped":
            other = rng.choice([other for other, value in both.items() if isinstance(value, Tensor)])
            both[name], both[other] = both[other], both[name]
            how = f"swapped with {other}"
        else:
            both[name] = _CHANGES[how](both[name], rng)
        given, outs = ({key: both[key] for key in part} for part in (given, outs))
        said.append(f"{name}: {how}")
    return given, outs, ", ".join(said) or "nothing"


# --- ways -----------------------------------------------------------------------------------------


def _on_meta(value: Any) -> Any:
    """What was on a device is on meta, and the other way around: tensors that were apart stay apart."""
    if not isinstance(value, Tensor):
        return value
    elsewhere = "meta" if value.device.type != "meta" else "cpu"
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=elsewhere)


def _copied(value: Any, number: int) -> Any:
    """With its strides, and memory of its own that holds the number."""
    if not isinstance(value, Tensor) or value.device.type == "meta":
        return value
    return value.new_full((value.untyped_storage().nbytes() // value.element_size(),), number).as_strided(
        value.shape, value.stride(), value.storage_offset()
    )


def _called(op: Op, given: dict[str, Any], outs: dict[str, Tensor]) -> Any:
    return op.out(**given, **outs) if outs else op.default(**given)


def _by_function(op: Op, given: dict[str, Any], outs: dict[str, Tensor]) -> Any:
    return op._reference.call("out" if outs else "", (), {**given, **outs})


def _by_fake(op: Op, given: dict[str, Any], outs: dict[str, Tensor]) -> Any:
    with FakeTensorMode() as mode:
        fakes = [
            {name: mode.from_tensor(value) if isinstance(value, Tensor) else value for name, value in part.items()}
            for part in (given, outs)
        ]
        return _called(op, *fakes)


def _by_meta(op: Op, given: dict[str, Any], outs: dict[str, Tensor]) -> Any:
    return _called(op, *({name: _on_meta(value) for name, value in part.items()} for part in (given, outs)))


def _by_compile(op: Op, given: dict[str, Any], outs: dict[str, Tensor], *, dynamic: bool) -> Any:
    torch._dynamo.reset()
    return torch.compile(_called, fullgraph=True, dynamic=dynamic, backend="eager")(op, given, outs)


def _outcome(way: Callable[..., Any], op: Op, given: dict[str, Any], outs: dict[str, Tensor]) -> str:
    numbers = {**dict.fromkeys([*given, *outs], 1), **dict.fromkeys(_indices(op), 0)}
    try:
        results = way(op, *({name: _copied(value, numbers[name]) for name, value in part.items()} for part in (given, outs)))
    except Exception as error:  # of any kind: it is refused
        return _OUT_OF_RANGE if "holds an index out of range" in str(error) else "refused"
    if outs or results is None:  # what the out form returns depends on the version of PyTorch
        return "accepted"
    return str([(list(one.shape), one.dtype) for one in (results if isinstance(results, tuple) else (results,))])


# What only those who see values refuse; a cache that has lost its slots is such a case, for then no index is in range.
_OUT_OF_RANGE = "accepted, if the values of indices were others"
_WITHOUT_VALUES = ("fake", "meta")


def _differing(op: Op, seed: int, ways: dict[str, Callable[..., Any]]) -> str | None:
    given, outs, wrong = _hostile(op, seed)
    found = {name: _outcome(way, op, given, outs) for name, way in ways.items()}
    seen = {outcome for name, outcome in found.items() if name not in _WITHOUT_VALUES}
    without = set(found.values()) if seen != {_OUT_OF_RANGE} else {found[name] for name in _WITHOUT_VALUES if name in found}
    agree = len(without) <= 1 and "refused" not in (without if seen == {_OUT_OF_RANGE} else ())
    return None if agree else f"seed {seed} ({wrong}): {found}"


@pytest.mark.parametrize("op", BUILT_IN, ids=lambda op: op.name)
def test_all_ways_accept_the_same(op: Op) -> None:
    ways = {"kernel": _called, "function": _by_function, "fake": _by_fake, "meta": _by_meta}
    assert not [text for seed in range(_HOSTILE) if (text := _differing(op, seed, ways))]


@pytest.mark.parametrize("op", BUILT_IN, ids=lambda op: op.name)
def test_a_compiled_call_accepts_the_same(op: Op) -> None:
    ways = {
        "kernel": _called,
        "compiled": lambda *args: _by_compile(*args, dynamic=False),
        "compiled, dynamic": lambda *args: _by_compile(*args, dynamic=True),
    }
    assert not [text for seed in range(_COMPILED) if (text := _differing(op, seed, ways))]


@pytest.mark.parametrize("op", BUILT_IN, ids=lambda op: op.name)
def test_hostile_arguments_are_of_both_kinds(op: Op) -> None:
    found = {_outcome(_called, op, *_hostile(op, seed)[:2]) == "refused" for seed in range(_HOSTILE)}
    assert found == {True, False}


# --- with which words -----------------------------------------------------------------------------


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(RuntimeError) as caught:
        call()
    return str(caught.value)


def test_what_a_fake_says() -> None:
    ops = torch.ops.jitk
    x, weight = torch.ones(3, 5, 8, device="meta"), torch.ones(8, device="meta")
    calls: list[Callable[[], object]] = [
        lambda: ops.rmsnorm(x, weight[:1]),
        lambda: ops.rmsnorm(x, torch.ones(8)),
        lambda: ops.layernorm(x, weight, weight.bfloat16()),
        lambda: ops.fused_add_rmsnorm(x, x[0], weight),
        lambda: ops.silu_and_mul(x[..., :7]),
        lambda: ops.silu_and_mul(x.int()),
        lambda: ops.fused_qknorm(x[0], x, weight, weight),
        lambda: ops.relu2.out(x, out=x[..., :4]),
    ]
    assert_expected_inline(
        "\n".join(map(refusal, calls)),
        """\
jitk::rmsnorm: argument 'weight' does not match
  expected  [hidden=8]  float16|bfloat16|float32|float64  meta  contiguous
  got       [1]         float32                           meta
  dimension 0: hidden was bound to 8 by 'input'
jitk::rmsnorm: argument 'weight' does not match
  expected  [hidden=8]  float16|bfloat16|float32|float64  meta  contiguous
  got       [8]         float32                           cpu
  device was bound to meta by 'input'
jitk::layernorm: argument 'bias' does not match
  expected  [hidden=8]  float32   meta  contiguous
  got       [8]         bfloat16  meta
  dtype was bound to float32 by 'weight'
jitk::fused_add_rmsnorm: argument 'residual' does not match
  expected  [3, 5, hidden=8]  float32  meta  row stride free
  got       [5, 8]            float32  meta
  leading dimensions: tokens was bound to [3, 5] by 'input'
jitk::silu_and_mul: argument 'input' does not match
  expected  [3, 5, 2*d]  float16|bfloat16|float32|float64  meta  row stride free
  got       [3, 5, 7]    float32                           meta  strides [40, 8, 1]
  dimension 2: 7 is not a multiple of 2
jitk::silu_and_mul: argument 'input' does not match
  expected  [3, 5, 2*d=8]  float16|bfloat16|float32|float64  meta  row stride free
  got       [3, 5, 8]      int32                             meta
  dtype int32 is not among those expected; kernels take float16, bfloat16, float32
jitk::fused_qknorm: argument 'q' does not match
  expected  [tokens, q_heads, head_dim]  float16|bfloat16|float32|float64  meta  strides [*, *, 1]
  got       [5, 8]                       float32                           meta
  it has 2 dimensions, expected 3
jitk::relu2.out: argument 'out' does not match
  expected  [3, 5, 8]  float32  meta  row stride free
  got       [3, 5, 4]  float32  meta  strides [40, 8, 1]
  leading dimensions: shape was bound to [3, 5, 8] by 'input'""",
    )


def test_what_a_fake_says_of_strides() -> None:
    ops = torch.ops.jitk
    x, weight = torch.ones(3, 5, 8, device="meta"), torch.ones(8, device="meta")
    wide = torch.ones(16, device="meta")
    calls: list[Callable[[], object]] = [
        lambda: ops.rmsnorm(x.transpose(0, 1), weight),
        lambda: ops.rmsnorm(x, wide[::2]),
        lambda: ops.fused_qknorm(x, x.transpose(1, 2), weight[:5], weight[:5]),
        lambda: ops.fused_qknorm(x, torch.ones(3, 8, 2, device="meta").mT, weight, weight),
        lambda: ops.relu2.out(x, out=torch.ones(8, 5, 3, device="meta").permute(2, 1, 0)),
        lambda: ops.add_constant.out(x.int(), 5, out=torch.ones(3, 5, 9, device="meta").int()[..., :8]),
        lambda: ops.relu2.out(x, out=x[:1].expand(3, 5, 8)),
        lambda: ops.fused_add_rmsnorm(x[0], weight.expand(5, 8), weight),
    ]
    assert_expected_inline(
        "\n".join(map(refusal, calls)),
        """\
jitk::rmsnorm: argument 'input' does not match
  expected  [5, 3, hidden=8]  float16|bfloat16|float32|float64  meta  row stride free
  got       [5, 3, 8]         float32                           meta  strides [8, 40, 1]
  its strides do not walk over dense rows in equal steps; pass input.contiguous()
jitk::rmsnorm: argument 'weight' does not match
  expected  [hidden=8]  float16|bfloat16|float32|float64  meta  contiguous
  got       [8]         float32                           meta  strides [2]
  it is not contiguous; pass weight.contiguous()
jitk::fused_qknorm: argument 'k' does not match
  expected  [tokens=3, k_heads=8, head_dim=8]  float32  meta  strides [*, *, 1]
  got       [3, 8, 5]                          float32  meta  strides [40, 1, 8]
  dimension 2: head_dim was bound to 8 by 'q'
jitk::fused_qknorm: argument 'k' does not match
  expected  [tokens=3, k_heads=2, head_dim=8]  float32  meta  strides [*, *, 1]
  got       [3, 2, 8]                          float32  meta  strides [16, 1, 2]
  stride of dimension 2 is 2, expected 1; pass k.contiguous()
jitk::relu2.out: argument 'out' does not match
  expected  [3, 5, 8]  float32  meta  row stride free
  got       [3, 5, 8]  float32  meta  strides [1, 3, 15]
  its strides do not walk over dense rows in equal steps; pass out.contiguous()
jitk::add_constant.out: argument 'out' does not match
  expected  [3, 5, 8]  int32  meta  contiguous
  got       [3, 5, 8]  int32  meta  strides [45, 9, 1]
  it is not contiguous; pass out.contiguous()
jitk::relu2.out: argument 'out' does not match
  expected  [3, 5, 8]  float32  meta  row stride free
  got       [3, 5, 8]  float32  meta  strides [0, 8, 1]
  its strides do not walk over dense rows in equal steps; pass out.contiguous()
jitk::fused_add_rmsnorm: argument 'residual' is written, but its elements overlap
  dimension 0 has size 5 and stride 0""",
    )


def test_an_op_refuses_strides_that_a_graph_gives_it() -> None:
    """They are those of the program as eager PyTorch runs it, whatever Inductor would choose for the values between."""
    x, filters = torch.randn(2, 4, 6, 6), torch.randn(3, 4, 3, 3)

    def dense(x: Tensor) -> Tensor:
        return torch.ops.jitk.relu2(torch.nn.functional.conv2d(x, filters))  # channels last in memory, if Inductor may choose

    def transposed(x: Tensor) -> Tensor:
        return torch.ops.jitk.relu2(x.transpose(1, 3) + 1)

    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(dense, fullgraph=True, dynamic=dynamic)
        torch.testing.assert_close(compiled(x), dense(x))
        with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match="its strides do not walk over dense rows"):
            torch.compile(transposed, fullgraph=True, dynamic=dynamic)(x)
        with pytest.raises(RuntimeError, match="its strides do not walk over dense rows"):
            transposed(x)


def test_strides_are_compared_as_symbols() -> None:
    """One graph serves all sizes of a slice of rows, of several steps too, and nothing becomes a constant."""
    counter = dynamo_testing.CompileCounter()
    compiled = torch.compile(torch.ops.jitk.silu_and_mul, fullgraph=True, dynamic=True, backend=counter)
    for batch, tokens, wide, hidden in ((3, 5, 64, 32), (4, 6, 128, 96), (2, 7, 34, 16)):
        compiled(torch.ones(batch, tokens, wide)[..., :hidden])
    assert counter.frame_count == 1
    with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match="do not walk over dense rows"):
        compiled(torch.ones(3, 5, 64)[:, :4])


def test_sizes_that_must_agree_are_guards_of_a_graph() -> None:
    """One graph serves all sizes that agree, and none is compiled for those that do not."""
    counter = dynamo_testing.CompileCounter()
    compiled = torch.compile(torch.ops.jitk.rmsnorm, fullgraph=True, dynamic=True, backend=counter)
    for tokens, hidden in ((3, 64), (4, 64), (7, 32)):
        compiled(torch.ones(tokens, hidden), torch.ones(hidden))
    assert counter.frame_count == 1
    with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match="hidden was bound to s"):
        compiled(torch.ones(3, 64), torch.ones(63))


def test_a_size_that_is_known_only_when_the_graph_runs() -> None:
    def chosen(x: Tensor, which: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.jitk.rmsnorm(x[:, which.nonzero().flatten()].contiguous(), weight)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(chosen, fullgraph=True, backend="eager")
        which = torch.arange(8) % 2 == 0
        assert compiled(torch.ones(3, 8), which, torch.ones(4)).shape == (3, 4)
        with pytest.raises(RuntimeError):
            compiled(torch.ones(3, 8), which, torch.ones(5))
