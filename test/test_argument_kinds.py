"""Lists of tensors and floats, dtypes and devices as arguments; lists and None as results.

Each way that a call can take is tried: the kernel, the function, an error, a gradient, a compiled graph.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fuzz
import pytest
import torch
from cases import assert_same_bits
from expecttest import assert_expected_inline
from torch import Tensor

from torch_jit_ops import OpLibrary, registry
from torch_jit_ops.calling import develop, dispatcher

_KERNELS = """
#include <jitk/dtype.h>
#include <jitk/result.h>
#include <jitk/tensor.h>

#include <optional>

using namespace jitk;

template <typename T>
const T* of(const TensorView& x) { return static_cast<const T*>(x.data_ptr()); }
template <typename T>
T* to(const TensorView& x) { return static_cast<T*>(x.data_ptr()); }

// out = x + the weighted sum of the others
template <typename T>
void weigh(TensorView x, TensorList others, FloatList weights, std::optional<TensorList> more, Output& out) {
  host::RuntimeCheck(others.size() == weights.size(), "there must be a weight for each of 'others', got ", weights.size());
  host::SymbolicSize n{"n"};
  host::TensorMatcher({n}).with_dtype<T>().verify(x);
  for (const TensorView& other : others) host::TensorMatcher({n}).with_dtype<T>().verify(other);
  const TensorView sum = out.empty_like(x);
  host::TensorMatcher({n}).with_dtype<T>().verify(sum);
  for (int64_t i = 0; i < n.unwrap(); ++i) {
    T value = of<T>(x)[i];
    for (int64_t k = 0; k < others.size(); ++k) value += static_cast<T>(weights[k]) * of<T>(others[k])[i];
    if (more) value += static_cast<T>(more->size());
    to<T>(sum)[i] = value;
  }
}

template <typename T>
void parts(TensorView x, IntList lengths, OutputList& made) {
  host::RuntimeCheck(lengths.size() < 9, "there are too many parts: ", lengths.size());
  const T* from = of<T>(x);
  for (const int64_t length : lengths) {
    const TensorView part = made.add({&length, 1}, x.dtype(), x.device());
    for (int64_t i = 0; i < length; ++i) to<T>(part)[i] = *from++;
    if (length == 7) host::Panic("no seven");
  }
}

template <typename T>
void largest(TensorView x, bool with_place, Output& value, Output& place, OutputList& both) {
  const int64_t most = x.numel() - 1;
  const TensorView made = value.empty({nullptr, 0}, x.dtype(), x.device());
  to<T>(made)[0] = of<T>(x)[most];
  to<T>(both.add_like(made))[0] = of<T>(x)[most];
  if (with_place) *to<int64_t>(place.empty({nullptr, 0}, dtype_of<int64_t>(), x.device())) = most;
}

template <typename T>
void nothing(TensorView, Output&, Output& scale) { scale.empty({nullptr, 0}, dtype_of<float>(), {kDLCPU, 0}); }

template <typename T>
void described(TensorView x, DLDataType dtype, DLDevice device, std::optional<DLDataType> other, std::optional<DLDevice> there,
               Output& out) {
  const int64_t size = 6;
  const TensorView made = out.empty({&size, 1}, dtype_of<int64_t>(), x.device());
  int64_t* const to = static_cast<int64_t*>(made.data_ptr());
  to[0] = dtype.code, to[1] = dtype.bits, to[2] = device.device_type, to[3] = device.device_id;
  to[4] = other ? other->bits : -1, to[5] = there ? there->device_type : -1;
}

template <typename T, typename To>
void converted(TensorView x, Output& out) {
  const TensorView made = out.empty(x.shape(), dtype_of<To>(), x.device());
  for (int64_t i = 0; i < x.numel(); ++i) to<To>(made)[i] = static_cast<To>(of<T>(x)[i]);
}

// total = the sum of all, in the place of none of them
template <typename T>
void fill_all(TensorList written, TensorView value, std::optional<TensorList> more) {
  for (const TensorView& x : written) {
    for (int64_t i = 0; i < x.size(0); ++i) to<T>(x)[i * x.stride(0)] = of<T>(value)[0];
  }
  if (!more) return;
  for (const TensorView& x : *more) {
    for (int64_t i = 0; i < x.size(0); ++i) to<T>(x)[i * x.stride(0)] = -of<T>(value)[0];
  }
}

void touch_all(TensorList) {}

template <typename T>
void add_up(TensorView total, TensorList all) {
  for (int64_t i = 0; i < total.numel(); ++i) {
    to<T>(total)[i] = 0;
    for (const TensorView& each : all) to<T>(total)[i] += of<T>(each)[i];
  }
}
"""


def weigh(x: Tensor, others: list[Tensor], weights: list[float], more: list[Tensor] | None = None) -> Tensor:
    total = x.clone()
    for other, weight in zip(others, weights, strict=True):
        total = total + weight * other
    return total if more is None else total + len(more)


def parts(x: Tensor, lengths: list[int]) -> list[Tensor]:
    return list(x[: sum(lengths)].split(lengths))


def largest(x: Tensor, with_place: bool) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    return x[-1].clone(), torch.tensor(len(x) - 1) if with_place else None, [x[-1].clone()]


def nothing(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, x


def described(
    x: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    other: torch.dtype | None = None,
    there: torch.device | None = None,
) -> Tensor:
    codes = {torch.float32: (2, 32), torch.bfloat16: (4, 16), torch.int64: (0, 64)}
    places = {"cpu": (1, 0), "cuda": (2, device.index), "meta": (12, -1)}
    facts = [*codes[dtype], *places[device.type], -1 if other is None else codes[other][1]]
    return torch.tensor([*facts, -1 if there is None else places[there.type][0]])


def converted(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return x.to(dtype)


def add_up(total: Tensor, all: list[Tensor]) -> None:
    total.copy_(torch.stack(all).sum(0))


def fill_all(written: list[Tensor], value: Tensor, more: list[Tensor] | None = None) -> None:
    for x in written:
        x.fill_(value[0])
    for x in more or []:
        x.fill_(-value[0])


def touch_all(written: list[Tensor]) -> None:
    return None


@pytest.fixture(scope="module")
def ops(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    csrc = tmp_path_factory.mktemp("kindlib")
    (csrc / "kinds.cpp").write_text(_KERNELS)
    library = OpLibrary("kindlib", csrc=csrc)
    floats = (torch.float32,)
    library.op(cpu="kinds.cpp", variant="weigh<{x.dtype}>", dtypes=floats)(weigh)
    library.op(cpu="kinds.cpp", variant="parts<{x.dtype}>", dtypes=floats)(parts)
    library.op(cpu="kinds.cpp", variant="largest<{x.dtype}>", dtypes=floats)(largest)
    library.op(cpu="kinds.cpp", variant="nothing<{x.dtype}>", dtypes=floats, outputs=("out", "scale"))(nothing)
    library.op(cpu="kinds.cpp", variant="described<{x.dtype}>", dtypes=floats)(described)
    library.op(cpu="kinds.cpp", variant="converted<{x.dtype}, {dtype}>", dtypes=(torch.float32, torch.int64))(converted)
    library.op(cpu="kinds.cpp", variant="add_up<{total.dtype}>", dtypes=floats, mutates=("total",))(add_up)
    library.op(cpu="kinds.cpp", variant="fill_all<{value.dtype}>", dtypes=floats, mutates=("written", "more"))(fill_all)
    library.op(cpu="kinds.cpp", variant="touch_all", mutates=("written",))(touch_all)
    yield SimpleNamespace(**library.ops)
    registry.remove(library)
    for op in library.ops.values():
        develop.withdraw(op._library)


_X = torch.arange(6.0)
_CALLS: list[tuple[str, tuple[Any, ...]]] = [
    ("weigh", (_X, [_X + 1, _X + 2], [0.5, -2.0])),
    ("weigh", (_X, [], [])),
    ("weigh", (_X, [_X], [1.0], [_X, _X[:2]])),
    ("weigh", (_X, [_X], [1.0], [])),
    ("parts", (_X, [1, 0, 3])),
    ("parts", (_X, [])),
    ("largest", (_X, True)),
    ("largest", (_X, False)),
    ("described", (_X, torch.bfloat16, torch.device("cpu"))),
    ("described", (_X, torch.int64, torch.device("cuda:3"), torch.float32, torch.device("meta"))),
    ("converted", (_X, torch.int64)),
    ("converted", (_X,)),
]
_each = pytest.mark.parametrize(("name", "args"), _CALLS, ids=[f"{name}{i}" for i, (name, _) in enumerate(_CALLS)])


def _same(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected)
    if isinstance(expected, (tuple, list)):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            _same(one, other)
    elif expected is not None:
        assert_same_bits(actual, expected, "result")


@_each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_call(ops: SimpleNamespace, name: str, args: tuple[Any, ...], dtype: torch.dtype) -> None:
    """By the kernel, and by the function for a dtype that has none."""
    args = (args[0].to(dtype), *args[1:])
    if name == "weigh":
        args = (args[0], [other.to(dtype) for other in args[1]], *args[2:])
    op = getattr(ops, name)
    with op.kernels_alone() if dtype == torch.float32 else contextlib.nullcontext():
        result = op(*args)
    _same(result, op.reference(*args))
    if op.declaration.outputs:
        out = torch.empty_like(result)
        op.out(*args, out=out)
        _same(out, op.reference(*args))


def test_which_have_an_out_form(ops: SimpleNamespace) -> None:
    assert [name for name, op in vars(ops).items() if op.declaration.outputs] == ["weigh", "nothing", "described", "converted"]
    assert str(ops.largest.default._schema) == "kindlib::largest(Tensor x, bool with_place) -> (Tensor, Tensor?, Tensor[])"
    assert str(ops.converted.out._schema).startswith("kindlib::converted.out(Tensor x, ScalarType dtype=6, *, Tensor(a2!) out)")


@_each
def test_a_compiled_call(ops: SimpleNamespace, name: str, args: tuple[Any, ...]) -> None:
    op = getattr(ops, name)
    torch._dynamo.reset()

    def run(x: Tensor) -> Any:
        return op.default(x, *args[1:])

    _same(torch.compile(run, fullgraph=True)(args[0]), op.reference(*args))


@_each
def test_opcheck(ops: SimpleNamespace, name: str, args: tuple[Any, ...]) -> None:
    torch.library.opcheck(getattr(ops, name).default, args)


def test_gradients_through_lists(ops: SimpleNamespace) -> None:
    tensors = [torch.randn(4, requires_grad=True) for _ in range(3)]
    ops.weigh(tensors[0], tensors[1:], [2.0, -3.0]).sum().backward()
    assert [tensor.grad.tolist() for tensor in tensors] == [[1.0] * 4, [2.0] * 4, [-3.0] * 4]  # type: ignore[union-attr]
    x = torch.randn(4, requires_grad=True)
    first, second = ops.parts(x, [1, 3])
    (first.sum() + 2 * second.sum()).backward()
    assert x.grad.tolist() == [1.0, 2.0, 2.0, 2.0]  # type: ignore[union-attr]
    y = torch.randn(4, requires_grad=True)
    value, place, both = ops.largest(y, False)
    assert place is None
    (value + 3 * both[0]).backward()
    assert y.grad.tolist() == [0.0, 0.0, 0.0, 4.0]  # type: ignore[union-attr]
    plain = torch.randn(4)
    assert ops.weigh(plain, [y, y], [1.0, 1.0]).requires_grad
    assert not ops.weigh(plain, [plain], [1.0]).requires_grad


def test_tangents_through_lists(ops: SimpleNamespace) -> None:
    x, other = torch.randn(4), torch.randn(4)
    _, tangent = torch.func.jvp(lambda other: ops.weigh(x, [other], [3.0]), (other,), (torch.ones(4),))
    assert tangent.tolist() == [3.0] * 4


def test_no_gradient_of_what_is_written(ops: SimpleNamespace) -> None:
    with pytest.raises(RuntimeError) as caught:
        ops.add_up(torch.zeros(2), [torch.ones(2), torch.ones(2, requires_grad=True)])
    assert_expected_inline(
        str(caught.value),
        """\
kindlib::add_up: an op that writes its arguments has no derivative, but argument 'all' requires grad
  remedy: call it under torch.no_grad(), or write the same with operations that return new tensors""",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_overlap_with_a_tensor_of_a_list(ops: SimpleNamespace, dtype: torch.dtype) -> None:
    x = torch.arange(6.0, dtype=dtype)
    with pytest.raises(RuntimeError) as caught:
        ops.add_up(x[:3], [torch.ones(3, dtype=dtype), x[2:5]])
    assert_expected_inline(
        str(caught.value).replace(" 16 bytes", " 8 bytes"),
        """\
kindlib::add_up: argument 'total' is written, but shares memory with argument 'all[1]'
  'total' [3] with strides [1] begins 8 bytes before
  'all[1]' [3] with strides [1]
  remedy: memory of its own for one of them""",
    )
    total = x[:3]
    ops.add_up(total, [x[3:], x[3:]])  # two that are read may be one
    assert total.tolist() == [6.0, 8.0, 10.0]


# --- lists of tensors that are written ------------------------------------------------------------


def _value(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor([3.0], dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lists_that_are_written(ops: SimpleNamespace, dtype: torch.dtype) -> None:
    """By the kernel, and by the function for a dtype that has none."""
    assert str(ops.fill_all.default._schema) == (
        "kindlib::fill_all(Tensor(a0!)[] written, Tensor value, Tensor(a2!)[]? more=None) -> ()"
    )
    buffer = torch.zeros(4, 3, dtype=dtype)
    with ops.fill_all.kernels_alone() if dtype == torch.float32 else contextlib.nullcontext():
        ops.fill_all(list(buffer.unbind(1))[:2], _value(dtype))
        assert buffer.tolist() == [[3, 3, 0]] * 4
        ops.fill_all([], _value(dtype), [buffer[0], buffer[1]])
        assert buffer.tolist() == [[-3, -3, -3]] * 2 + [[3, 3, 0]] * 2
        ops.fill_all([], _value(dtype))


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_they_count_as_changed(ops: SimpleNamespace, mode: Any) -> None:
    """With the kernels of autograd in Python and in C++, and by what takes their place in inference mode."""
    written, read = [torch.zeros(2), torch.zeros(2)], _value()
    for _ in range(2):
        before = [x._version for x in (*written, read)]
        with mode():
            ops.fill_all.default(written, read, [])
        after = [x._version for x in (*written, read)]
        assert [b > a for a, b in zip(before, after, strict=True)] == [True, True, False]
        while not dispatcher.differentiate(["kindlib::fill_all"]):
            time.sleep(0.1)


def test_they_are_compiled(ops: SimpleNamespace) -> None:
    torch._dynamo.reset()

    def run(x: Tensor, y: Tensor, value: Tensor) -> Tensor:
        before = x + y
        ops.fill_all.default([x, y], value)
        return before + x + y

    x, y = torch.ones(4), torch.ones(4)
    assert torch.compile(run, fullgraph=True)(x, y, _value()).tolist() == [8.0] * 4
    assert (x.tolist(), y.tolist()) == ([3.0] * 4, [3.0] * 4)
    torch.library.opcheck(ops.fill_all.default, ([torch.ones(4), torch.ones(4)], _value(), [torch.ones(2)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_their_tensors_have_memory_of_their_own(ops: SimpleNamespace, dtype: torch.dtype) -> None:
    x, value = torch.zeros(12, dtype=dtype), _value(dtype)
    ops.fill_all([x[::3], x[1::3]], value, [x[2::3]])
    assert x.tolist() == [3, 3, -3] * 4
    calls: list[tuple[Any, ...]] = [
        ([x[:4], x[3:7]], value),
        ([x[:4], x[4:7]], x[6:]),
        ([x[:4]], value, [x[6:8], x[3:5]]),
        ([x[:4], x[:1].expand(3)], value),
    ]
    texts = [_error(ops.fill_all, *call) for call in calls]
    scale = dtype.itemsize // 4
    assert_expected_inline(
        "\n".join(texts).replace(f" {12 * scale} bytes", " 12 bytes").replace(f" {8 * scale} bytes", " 8 bytes"),
        """\
kindlib::fill_all: argument 'written[0]' is written, but shares memory with argument 'written[1]'
  'written[0]' [4] with strides [1] begins 12 bytes before
  'written[1]' [4] with strides [1]
  remedy: memory of its own for one of them
kindlib::fill_all: argument 'written[1]' is written, but shares memory with argument 'value'
  'written[1]' [3] with strides [1] begins 8 bytes before
  'value' [6] with strides [1]
  remedy: memory of its own for one of them
kindlib::fill_all: argument 'written[0]' is written, but shares memory with argument 'more[1]'
  'written[0]' [4] with strides [1] begins 12 bytes before
  'more[1]' [2] with strides [1]
  remedy: memory of its own for one of them
kindlib::fill_all: argument 'written[1]' is written, but its elements overlap
  dimension 0 has size 3 and stride 0""",
    )


def test_a_list_that_is_written_wants_no_gradient(ops: SimpleNamespace) -> None:
    with pytest.raises(RuntimeError, match="but argument 'written' requires grad"):
        ops.fill_all([torch.zeros(2), torch.zeros(2, requires_grad=True)], _value())


def test_many_layers_of_one_buffer_are_told_apart(ops: SimpleNamespace) -> None:
    """Their ranges all meet; what lies between the rows of each is the others'."""
    buffer = torch.zeros(9, 40, 5, 3)
    layers = list(buffer.view(9, 40, 15).unbind(1))
    ops.fill_all([layer[:, 0] for layer in layers], _value())
    assert buffer.sum() == 9 * 40 * 3
    with pytest.raises(RuntimeError, match=r"argument 'written\[\d+\]' is written, but shares memory with argument 'written"):
        ops.fill_all([*(layer[:, 0] for layer in layers), buffer.view(-1)[1500:1507]], _value())


@pytest.mark.parametrize("seed", fuzz.seeds(200))
def test_pairs_of_layouts_by_chance(ops: SimpleNamespace, seed: int) -> None:
    """Of equal rows in equal steps, and nearly so: refused if an element is in both, and else not."""
    chance = random.Random(seed)
    buffer, places = torch.zeros(400), torch.arange(400)
    width, gap, rows = chance.randint(1, 6), chance.randint(0, 8), chance.randint(1, 5)
    sizes, strides = [rows, width], [width + gap, 1]
    if chance.random() < 0.4:
        sizes, strides = [chance.randint(1, 4), *sizes], [rows * (width + gap) + chance.choice([0, 0, 1, 7]), *strides]
    first = chance.randint(0, 150)
    other = first + chance.choice([0, width, gap, width + gap, rows * (width + gap), chance.randint(-50, 50)])
    views = [x.as_strided(sizes, strides, max(0, place)) for place in (first, other) for x in (buffer, places)]
    if chance.random() < 0.2:
        part = chance.randint(1, width)
        views[2:] = [view[..., :part] for view in views[2:]]
    meet = not set(views[1].flatten().tolist()).isdisjoint(views[3].flatten().tolist())
    with pytest.raises(RuntimeError, match="shares memory") if meet else contextlib.nullcontext():
        ops.touch_all([views[0], views[2]])


def _error(function: Any, *args: Any) -> str:
    with pytest.raises(RuntimeError) as caught:
        function(*args)
    return str(caught.value)


def test_errors(ops: SimpleNamespace) -> None:
    texts = [
        _error(ops.weigh, _X, [_X, _X[:2]], [1.0, 1.0]),
        _error(ops.weigh, _X, [_X], []),
        _error(ops.parts, torch.zeros(9), [1, 7]),
        _error(ops.nothing, _X),
        _error(ops.described, _X, torch.float4_e2m1fn_x2, torch.device("cpu")),
    ]
    assert_expected_inline(
        "\n".join(texts),
        """\
kindlib::weigh: argument 'others[1]' does not match
  expected  [n=6]  float32  cpu  contiguous
  got       [2]    float32  cpu
  dimension 0: n was bound to 6 by 'x'
  at kinds.cpp:21
kindlib::weigh: there must be a weight for each of 'others', got 0
  at kinds.cpp:18
kindlib::parts: no seven
  at kinds.cpp:39
kindlib::nothing: the kernel made no 'out'
kindlib::described: argument 'dtype' is a dtype that kernels do not know""",
    )


def _in_inference(op: Any, *args: Any) -> Any:
    with torch.inference_mode():
        return op.default(*args)


def test_tensors_are_freed(ops: SimpleNamespace) -> None:
    """Those of lists too: on the way to a kernel, to the function, and where either fails."""

    def calls() -> Iterator[Tensor]:
        for dtype in (torch.float32, torch.float64):
            x, y, z = (torch.ones(9, dtype=dtype) for _ in range(3))
            yield from (x, y, z, _in_inference(ops.weigh, x, [y, y], [1.0, 2.0], [z]))
            yield from _in_inference(ops.parts, x, [2, 3])
            _error(_in_inference, ops.weigh, x, [y, z[:2]], [1.0, 1.0])
            _error(_in_inference, ops.add_up, x, [y, x[:9]])
        _error(_in_inference, ops.parts, torch.ones(9), [1, 7])
        value, _, both = _in_inference(ops.largest, torch.ones(9), True)
        yield from (value, *both)
        _error(_in_inference, ops.nothing, torch.ones(9))

    references = [weakref.ref(tensor) for tensor in calls()]
    gc.collect()
    alive = [index for index, reference in enumerate(references) if reference() is not None]
    assert alive == [], f"tensors {alive} are still owned by somebody"


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("path", ["lists", "optional", "results", "None", "failure", "nothing", "dtype"])
def test_calls_leave_no_memory_behind(ops: SimpleNamespace, path: str) -> None:
    x = torch.zeros(20)
    many, weights, lengths = [x] * 20, [0.5] * 20, [2] * 8
    calls = {
        "lists": lambda: ops.weigh.default(x, many, weights),
        "optional": lambda: ops.weigh.default(x, many, weights, many),
        "results": lambda: ops.parts.default(x, lengths),
        "None": lambda: ops.largest.default(x, False),
        "failure": lambda: ops.parts.default(x, [2, 2, 2, 7]),
        "nothing": lambda: ops.nothing.default(x),
        "dtype": lambda: ops.described.default(x, torch.int64, torch.device("cpu"), torch.int64, torch.device("cpu")),
    }

    def call() -> None:
        with contextlib.suppress(RuntimeError), torch.inference_mode():
            calls[path]()

    for _ in range(500):
        call()
    before = _resident()
    for _ in range(3000):
        call()
    assert _resident() - before < 3000 * 60
