"""The way from a call to a kernel and back: every kind of argument, variants, threads, errors, memory.

All of it through a library that a user might declare, in a folder of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from cases import assert_same_bits
from expecttest import assert_expected_inline
from torch import Tensor

from torch_jit_ops import OpLibrary, environment, registry
from torch_jit_ops.builder import compile
from torch_jit_ops.builder.errors import BuildError, CompileRefused
from torch_jit_ops.builder.unit import Unit, csrc_dir
from torch_jit_ops.calling import dispatcher
from torch_jit_ops.declaring import variant
from torch_jit_ops.declaring.signature import signature_of

Order = Literal["ascending", "descending"]

_DESCRIBE = """
#include <jitk/export.h>  // Text
#include <jitk/result.h>
#include <jitk/tensor.h>

#include <optional>

namespace dispatchlib {

using namespace jitk;
using namespace jitk::host;

enum Order { ascending, descending };

struct Numbers {
  double values[256];
  int64_t count = 0;
  void add(double value) { values[count++] = value; }
  void add(IntList list) {
    add(list.size());
    for (int64_t i : irange(list.size())) add(list[i]);
  }
  void add(Text text) {
    add(text.length);
    for (int32_t i : irange(text.length)) add(static_cast<unsigned char>(text.data[i]));
  }
  void add(TensorView tensor) {
    add(tensor.shape());
    add(tensor.dtype() == dtype_of<float>() ? static_cast<const float*>(tensor.data_ptr())[0] : 0);
  }
  template <typename T>
  void add(std::optional<T> maybe) {
    if (maybe) add(*maybe);
    else add(-1);
  }
  void write(Output& out) const {
    const int64_t size = 256;
    const TensorView result = out.empty({&size, 1}, dtype_of<double>(), {kDLCPU, 0});
    TensorMatcher({256}).with_dtype<double>().verify(result);
    double* data = static_cast<double*>(result.data_ptr());
    for (int64_t i : irange(256)) data[i] = i < count ? values[i] : 0;
  }
};

template <typename T>
void describe(TensorView x, std::optional<TensorView> other, int64_t n, double factor, bool flag, Text order, IntList sizes,
              Text text, int32_t small, std::optional<int64_t> limit, std::optional<double> scale, std::optional<bool> on,
              std::optional<Text> word, std::optional<IntList> more, Output& out) {
  Numbers made;
  made.add(x), made.add(other), made.add(n), made.add(factor), made.add(flag), made.add(order), made.add(sizes);
  made.add(text), made.add(small), made.add(limit), made.add(scale), made.add(on), made.add(word), made.add(more);
  made.write(out);
}

template <typename T>
constexpr int64_t bits() {
  return 8 * sizeof(T);
}
template <>
constexpr int64_t bits<void>() {
  return -1;
}

template <typename T, typename Other, int64_t kWidth, int64_t kRows, int kDims, int64_t kN, bool kFlag, Order kOrder>
void pick(TensorView, std::optional<TensorView>, Output& out) {
  Numbers made;
  made.add(bits<T>()), made.add(bits<Other>()), made.add(kWidth), made.add(kRows), made.add(kDims), made.add(kN);
  made.add(kFlag), made.add(kOrder);
  made.write(out);
}

template <typename T>
void fill(TensorView x, int64_t n, Output& out) {
  const TensorView result = out.empty({&n, 1}, x.dtype(), x.device());
  for (int64_t i : irange(result.numel())) static_cast<T*>(result.data_ptr())[i] = static_cast<const T*>(x.data_ptr())[0];
}

}  // namespace dispatchlib
"""

_FAIL = """
#include <jitk/export.h>  // Text
#include <jitk/result.h>
#include <jitk/tensor.h>

namespace dispatchlib {

using namespace jitk;
using namespace jitk::host;

struct Exception : std::exception {
  const char* what() const noexcept override { return "a std::exception"; }
};

template <typename T>
void fail(TensorView x, Text how, Output& out) {
  SymbolicSize tokens{"tokens"};
  const int64_t huge[] = {int64_t{1} << 58, 3};
  Tensor scratch = empty_like(x);  // is freed whatever happens, as is the output
  if (how.data[0] != 'a') out.empty_like(x);
  switch (how.data[0]) {
    case 'c': RuntimeCheck(x.numel() == 0, "the number of elements must be 0, got ", x.numel());
    case 'm': TensorMatcher({tokens, 2 * tokens}).with_dtype<bf16_t, T>().verify(x);
    case 's': throw Exception();
    case 'u': throw 5;
    case 'a': out.empty({huge, 2}, x.dtype(), x.device());
    case 'p': parallel_for(1 << 20, 1, [](int64_t begin, int64_t) { RuntimeCheck(begin < 0, "in a thread of the pool"); });
  }
}

template <typename T>
void misfit(TensorView x, double n) {}

template <typename T>
void broken(TensorView x) {
  static_assert(sizeof(T) != sizeof(T), "hidden must be a multiple of 8");
}

}  // namespace dispatchlib
"""

_COLD = """
#include <jitk/tensor.h>

namespace dispatchlib {

template <int64_t kN>
void cold(jitk::TensorView x) {
  for (int64_t i = 0; i < x.numel(); ++i) static_cast<float*>(x.data_ptr())[i] += kN;
}

}  // namespace dispatchlib
"""


def _padded(values: list[float]) -> Tensor:
    return torch.tensor([*values, *[0.0] * (256 - len(values))], dtype=torch.float64)


def _numbers(*values: Any) -> list[float]:
    numbers: list[float] = []
    for value in values:
        if value is None:
            numbers.append(-1)
        elif isinstance(value, str):
            data = value.encode()
            numbers += [len(data), *data]
        elif isinstance(value, Tensor):
            first = float(value.flatten()[0]) if value.dtype == torch.float32 else 0
            numbers += [value.dim(), *value.shape, first]
        elif isinstance(value, (list, tuple)):
            numbers += [len(value), *value]
        else:
            numbers.append(value)
    return numbers


def describe(
    x: Tensor,
    other: Tensor | None,
    n: int,
    factor: float,
    flag: bool,
    order: Order,
    sizes: list[int],
    text: str = "text",
    small: int = 3,
    *,
    limit: int | None = None,
    scale: float | None = None,
    on: bool | None = None,
    word: str | None = None,
    more: list[int] | None = None,
) -> Tensor:
    return _padded(_numbers(x, other, n, factor, flag, order, sizes, text, small, limit, scale, on, word, more))


def pick(x: Tensor, other: Tensor | None, n: int, flag: bool, order: Order) -> Tensor:
    bits = -1 if other is None else other.element_size() * 8
    facts = [x.element_size() * 8, bits, x.shape[-1], x.shape[0], x.dim(), n, flag, order == "descending"]
    return _padded(_numbers(*facts))


def fill(x: Tensor, n: int) -> Tensor:
    return x.flatten()[0].expand(n).clone()


def fail(x: Tensor, how: str) -> Tensor:
    raise ValueError(f"the reference cannot do {how}")


def misfit(x: Tensor, n: int) -> None:
    return None


def broken(x: Tensor) -> None:
    return None


def cold(x: Tensor, n: int) -> None:
    x.add_(n)


def outer(x: Tensor, how: str) -> Tensor:
    return torch.ops.dispatchlib.fail(x, how)


@pytest.fixture(scope="session")  # a process that comes back to this file cannot declare them again
def ops(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The library's ops. Compiled on first use, so each test pays for what it calls."""
    csrc = tmp_path_factory.mktemp("dispatchlib") / "csrc"
    csrc.mkdir()
    for name, text in (("describe.cpp", _DESCRIBE), ("fail.cpp", _FAIL), ("cold.cpp", _COLD)):
        (csrc / name).write_text(text)
    library = OpLibrary("dispatchlib", csrc=csrc)
    floats = (torch.float32,)
    facts = "{x.dtype}, {other.dtype}, {x.shape[-1]}, {x.shape[0]}, {x.dim}, {n}, {flag}, dispatchlib::{order}"
    library.op(cpu="describe.cpp", variant="dispatchlib::describe<{x.dtype}>", dtypes=floats)(describe)
    library.op(cpu="describe.cpp", variant=f"dispatchlib::pick<{facts}>")(pick)
    library.op(cpu="describe.cpp", variant="dispatchlib::fill<{x.dtype}>", dtypes=floats)(fill)
    for function in (fail, misfit, broken):
        library.op(cpu="fail.cpp", variant=f"dispatchlib::{function.__name__}<{{x.dtype}}>", dtypes=floats)(function)
    library.op(cpu="cold.cpp", variant="dispatchlib::cold<{n}>", mutates=("x",))(cold)
    library.op(cpu="fail.cpp", variant="dispatchlib::fail<{x.dtype}>", dtypes=())(outer)
    return SimpleNamespace(**library.ops)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts compilations by label."""
    counts: Counter[str] = Counter()
    original = compile._run_cpp_extension

    def counting(unit: Unit, *args: Any) -> str:
        counts[unit.label] += 1
        return original(unit, *args)

    monkeypatch.setattr(compile, "_run_cpp_extension", counting)
    return counts


def message(error: BaseException) -> str:
    """The text of an error with what differs between machines taken out."""
    text = str(error).replace(str(environment.cache_dir()), "CACHE")
    text = re.sub(r"staging/\w+", "staging/ID", text)
    text = re.sub(r"(export\.h):\d+", r"\1:LINE", text)
    return re.sub(r"x86-64-v\d", "x86-64", text)


# --- arguments ---------------------------------------------------------------------------------------

_X = torch.arange(6.0).reshape(2, 3) + 7
_GIVEN: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((_X, None, 5, 0.5, True, "ascending", [1, 2, 3]), {}),
    ((_X, _X[1:], -(2**40), -1e300, False, "descending", []), {}),
    ((_X, torch.ones(4, dtype=torch.int8), 0, 3, True, "ascending", [2**40, -1], "", -7), {}),
    ((_X, None, 1, 0.0, True, "ascending", [4], "longer than a small string can be, all of it"), {"limit": 0, "scale": 0.0}),
    ((_X, None, 1, 0.0, True, "ascending", [4], "ü"), {"limit": -3, "scale": 2.5, "on": False, "word": "", "more": []}),
    ((_X, _X, 1, 0.0, True, "ascending", [4]), {"on": True, "word": "word", "more": [5, 6]}),
]


@pytest.mark.parametrize(("args", "kwargs"), _GIVEN)
def test_every_kind_of_argument_arrives(ops: SimpleNamespace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    expected = describe(*args, **kwargs)
    assert_same_bits(ops.describe(*args, **kwargs), expected, "functional")
    out = torch.full((256,), torch.nan, dtype=torch.float64)
    ops.describe.out(*args, **kwargs, out=out)
    assert_same_bits(out, expected, "out")


@pytest.mark.parametrize(("args", "kwargs"), _GIVEN)
def test_every_kind_of_argument_arrives_at_the_reference(
    ops: SimpleNamespace, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """A dtype without a kernel: the dispatcher hands the same arguments to Python."""
    args = (args[0].double(), *args[1:])
    expected = describe(*args, **kwargs)
    assert_same_bits(ops.describe(*args, **kwargs), expected, "functional")
    out = torch.full((256,), torch.nan, dtype=torch.float64)
    ops.describe.out(*args, **kwargs, out=out)
    assert_same_bits(out, expected, "out")


def test_every_kind_of_placeholder_picks_the_kernel(ops: SimpleNamespace) -> None:
    calls = [
        (_X, None, 5, True, "ascending"),
        (_X.half(), None, 5, True, "ascending"),
        (_X[:, :2], None, 5, True, "ascending"),
        (_X[:1], None, 5, True, "ascending"),
        (_X[0], None, 5, True, "ascending"),
        (_X, _X.bfloat16(), 5, True, "ascending"),
        (_X, None, -6, False, "descending"),
    ]
    with ThreadPoolExecutor(2) as pool:  # compiles two at a time
        results = list(pool.map(lambda call: ops.pick(*call), calls))
    for call, result in zip(calls, results, strict=True):
        assert_same_bits(result, pick(*call), str(call[1:]))
    for call in calls:  # from the table, which has grown
        assert_same_bits(ops.pick(*call), pick(*call), str(call[1:]))


def test_more_variants_than_the_first_table_holds(ops: SimpleNamespace) -> None:
    dtypes = [torch.float64, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool, torch.float16]
    dtypes += [
        torch.bfloat16,
        torch.complex64,
        torch.complex128,
        torch.float8_e4m3fn,
        torch.uint16,
        torch.uint32,
        torch.float32,
    ]
    for _ in range(2):
        for dtype in dtypes:
            x = torch.ones(2, 2).to(dtype)
            assert_same_bits(ops.fill(x, 3), fill(x, 3), str(dtype))


def test_an_integer_may_be_a_symbol(ops: SimpleNamespace) -> None:
    run = torch.compile(lambda x: ops.fill(x, 2 * x.shape[0]), fullgraph=True, dynamic=True, backend="aot_eager")
    assert run(torch.ones(3, 2)).shape == (6,)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same_bits(run(torch.full((5, 2), 4.0)), torch.full((10,), 4.0), "result")


# --- errors ------------------------------------------------------------------------------------------


def error_of(function: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(RuntimeError) as caught:
        function(*args, **kwargs)
    return message(caught.value)


def test_text_of_a_check(ops: SimpleNamespace) -> None:
    assert_expected_inline(
        error_of(ops.fail, _X, "check"),
        """\
dispatchlib::fail: the number of elements must be 0, got 6
  at fail.cpp:22""",
    )


def test_text_of_a_tensor_that_does_not_match(ops: SimpleNamespace) -> None:
    assert_expected_inline(
        error_of(ops.fail, _X, "match"),
        """\
dispatchlib::fail: argument 'x' does not match
  expected  [tokens=2, 2*tokens=4]  bfloat16|float32  cpu  contiguous
  got       [2, 3]                  float32           cpu
  dimension 1: tokens was bound to 2 by 'x'
  at fail.cpp:23""",
    )


def test_text_of_an_exception(ops: SimpleNamespace) -> None:
    assert_expected_inline(
        error_of(ops.fail, _X, "std"),
        """\
dispatchlib::fail: a std::exception""",
    )


def test_text_of_something_else_thrown(ops: SimpleNamespace) -> None:
    assert_expected_inline(
        error_of(ops.fail, _X, "unknown"),
        """dispatchlib::fail: the kernel's host code threw something that is not a std::exception""",
    )


def test_text_of_a_failed_allocation_is_pytorchs(ops: SimpleNamespace) -> None:
    text = error_of(ops.fail, _X, "allocate")
    assert text.startswith("dispatchlib::fail: ")
    assert re.search(r"allocate \d+ bytes", text), text


@pytest.mark.parametrize("threads", [1, 2])
def test_text_of_a_check_in_a_thread_of_the_pool(ops: SimpleNamespace, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_expected_inline(
            error_of(ops.fail, _X, "parallel"),
            """\
dispatchlib::fail: in a thread of the pool
  at fail.cpp:27""",
        )
    finally:
        torch.set_num_threads(before)


def test_text_of_a_failed_reference(ops: SimpleNamespace) -> None:
    assert_expected_inline(
        error_of(ops.fail, _X.double(), "this"),
        """\
dispatchlib::fail: the reference cannot do this
  argument 'x' is float64, and there are kernels for float32, so the PyTorch function ran""",
    )


def test_text_of_a_failed_op_within_a_reference(ops: SimpleNamespace) -> None:
    assert_expected_inline(
        error_of(ops.outer, _X, "check"),
        """\
dispatchlib::outer: dispatchlib::fail: the number of elements must be 0, got 6
  at fail.cpp:22""",
    )


def test_text_of_a_wrong_choice(ops: SimpleNamespace) -> None:
    assert_expected_inline(
        error_of(ops.describe, _X, None, 5, 0.5, True, "sideways", []),
        """dispatchlib::describe: argument 'order' must be one of 'ascending', 'descending', got 'sideways'""",
    )


def test_text_of_an_integer_that_is_too_large(ops: SimpleNamespace) -> None:
    assert_expected_inline(
        error_of(ops.describe, _X, None, 5, 0.5, True, "ascending", [], "", 2**31),
        """\
dispatchlib::describe: the integer argument 2147483648 does not fit into 4 bytes
  at export.h:LINE""",
    )


def test_text_of_a_dimension_that_is_not_there(ops: SimpleNamespace) -> None:
    assert_expected_inline(
        error_of(ops.pick, _X[0, 0], None, 5, True, "ascending"),
        """dispatchlib::pick: argument 'x' has 0 dimensions; dimension -1 is needed to choose the kernel""",
    )


def test_text_of_elements_that_overlap(ops: SimpleNamespace) -> None:
    assert_expected_inline(
        error_of(ops.cold, torch.zeros(1).expand(3), 1),
        """\
dispatchlib::cold: argument 'x' is written, but its elements overlap
  dimension 0 has size 3 and stride 0""",
    )


def test_text_of_a_function_that_does_not_fit_the_schema(ops: SimpleNamespace) -> None:
    assert_expected_inline(
        error_of(ops.misfit, _X, 1),
        """\
dispatchlib::misfit: the C++ function misfit does not fit the schema
  expected  void misfit(TensorView x, int64_t n)
  got       void misfit(TensorView, double)
  in fail.cpp""",
    )


def test_text_of_a_kernel_that_does_not_compile(ops: SimpleNamespace, compiled: Counter[str]) -> None:
    text = error_of(ops.broken, _X)
    log = Path(re.search(r"full log: (.*)", text)[1].replace("CACHE", str(environment.cache_dir())))  # type: ignore[index]
    assert_expected_inline(
        text.replace(log.parent.name, "ID"),
        """\
dispatchlib::broken<fp32_t> did not compile (cpu, x86-64)
  csrc/fail.cpp:36: static assertion failed: hidden must be a multiple of 8
  full log: CACHE/staging/ID/build.log""",
    )
    assert error_of(ops.broken, _X) == text
    assert compiled == {"dispatchlib::broken<fp32_t>": 1}, "the second call compiled again"


def test_the_log_of_a_failed_build_is_whole(ops: SimpleNamespace) -> None:
    with pytest.raises(RuntimeError) as caught:
        ops.broken(_X)
    log = Path(re.search(r"full log: (.*)", str(caught.value))[1]).read_text()  # type: ignore[index]
    assert "hidden must be a multiple of 8" in log
    assert "-std=c++17" in log, "the command is missing"


def test_an_op_works_after_errors(ops: SimpleNamespace) -> None:
    for how in ("check", "match", "std", "unknown"):
        error_of(ops.fail, _X, how)
        args = _GIVEN[0][0]
        assert_same_bits(ops.describe(*args), describe(*args), "result")


# --- threads -----------------------------------------------------------------------------------------


def _at_once(count: int, call: Any) -> list[Any]:
    barrier = threading.Barrier(count)

    def run(index: int) -> Any:
        barrier.wait()
        return call(index)

    with ThreadPoolExecutor(count) as pool:
        return [future.result() for future in [pool.submit(run, index) for index in range(count)]]


def test_threads_that_meet_a_cold_op_build_once(ops: SimpleNamespace, compiled: Counter[str]) -> None:
    def call(index: int) -> Tensor:
        x = torch.full((100,), float(index))
        ops.cold(x, 1 + index % 2)
        return x

    for index, x in enumerate(_at_once(16, call)):
        assert_same_bits(x, torch.full((100,), float(index) + 1 + index % 2), f"thread {index}")
    fresh = environment.cache_dir() != Path(os.environ.get("JITK_TEST_CACHE_DIR", ""))
    assert compiled == ({"dispatchlib::cold<1>": 1, "dispatchlib::cold<2>": 1} if fresh else compiled)


def test_threads_that_meet_an_op_before_its_dispatcher_does(tmp_path: Path) -> None:
    """PyTorch frees a kernel that is taken away, also under a thread that is about to call it: one op in a hundred crashed."""
    (tmp_path / "none.cpp").write_text("")
    library = OpLibrary("manylib", csrc=tmp_path)
    for number in range(50):

        def add(x: Tensor, number: int = number) -> Tensor:
            return x + number

        add.__name__ = f"add_{number}"
        op = library.op(cpu="none.cpp", variant="add<{x.dtype}>", dtypes=())(add)
        for result in _at_once(16, lambda _, op=op: op(torch.zeros(2))):
            assert_same_bits(result, torch.full((2,), float(number)), "result")


def test_a_tensor_that_only_shares_the_device_runs_the_reference(tmp_path: Path) -> None:
    """A sparse tensor is on the CPU, and no kernel for the CPU gets it."""
    (tmp_path / "none.cpp").write_text("")

    def total(x: Tensor) -> Tensor:
        return x.sum().to_dense()

    op = OpLibrary("sparselib", csrc=tmp_path).op(cpu="none.cpp", variant="total<{x.dtype}>")(total)
    for _ in range(2):
        assert op(torch.eye(3).to_sparse()).item() == 3


def test_threads_at_work(ops: SimpleNamespace) -> None:
    """Hits, misses of dtypes without a kernel, and errors, all at once."""

    def call(index: int) -> None:
        for step in range(200):
            args = (_X, None, step, index / 8, True, "ascending", [step, index])
            assert_same_bits(ops.describe(*args), describe(*args), "kernel")
            if step % 10 == 0:
                args = (_X.double(), *args[1:])
                assert_same_bits(ops.describe(*args), describe(*args), "reference")
                assert f"got {_X.numel() + index}" in error_of(ops.fail, torch.zeros(_X.numel() + index), "check")
                assert f"cannot do {index}" in error_of(ops.fail, _X.double(), f"{index}")

    _at_once(8, call)


def test_called_from_threads_that_python_did_not_start(ops: SimpleNamespace) -> None:
    """The interpreter of TorchScript runs forks in a pool of C++ threads; the first call there is a miss."""

    @torch.jit.script
    def add(x: Tensor, n: int) -> Tensor:
        torch.ops.dispatchlib.cold(x, n)
        return x

    @torch.jit.script
    def forks(x: Tensor) -> list[Tensor]:
        futures = [torch.jit.fork(add, x + float(i), 7 + i % 2) for i in range(8)]
        return [torch.jit.wait(future) for future in futures]

    for index, x in enumerate(forks(torch.zeros(10))):
        assert_same_bits(x, torch.full((10,), float(index + 7 + index % 2)), f"fork {index}")


# --- memory ------------------------------------------------------------------------------------------


def test_tensors_are_freed(ops: SimpleNamespace) -> None:
    """A tensor that C++ still owned would keep its Python object, and so its weak reference, alive."""

    def calls() -> Iterator[Tensor]:
        x, other = torch.ones(2, 3), torch.ones(4)
        yield from (x, other, ops.describe(x, other, 1, 1.0, True, "ascending", [1]))
        y = torch.ones(2, 3)
        error_of(ops.fail, y, "check")
        error_of(ops.describe, y, y, 1, 1.0, True, "sideways", [1])
        yield y
        z = torch.ones(2, 3, dtype=torch.float64)
        yield from (z, ops.describe(z, z, 1, 1.0, True, "ascending", [1]))
        error_of(ops.fail, z, "this")
        out = torch.zeros(256, dtype=torch.float64)
        ops.describe.out(z, None, 1, 1.0, True, "ascending", [1], out=out)
        ops.describe.out(x, None, 1, 1.0, True, "ascending", [1], out=out)
        yield out

    for _ in range(2):
        references = [weakref.ref(tensor) for tensor in calls()]
        gc.collect()
        alive = [index for index, reference in enumerate(references) if reference() is not None]
        assert alive == [], f"tensors {alive} are still owned by somebody"


def _resident() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("path", ["kernel", "check", "reference", "failed reference"])
def test_calls_leave_no_memory_behind(ops: SimpleNamespace, path: str) -> None:
    # The references here have no str or int[]: PyTorch 2.11 to 2.13 lose 51 and 34 bytes of them a call (pytorch#191340).
    x, y = _X, _X.double()
    options = {"limit": 3, "scale": 0.5, "on": True, "word": "w" * 30, "more": list(range(8))}

    def call() -> None:
        if path == "kernel":
            ops.describe(x, x, 1, 1.0, True, "ascending", [1, 2], "text" * 4, **options)
        elif path == "check":
            with contextlib.suppress(RuntimeError):
                ops.fail(x, "check" + " " * 2000)
        elif path == "reference":
            ops.fill(y, 300)
        else:
            with contextlib.suppress(RuntimeError):
                ops.fill(y, -300)

    count = 5000
    for _ in range(count):
        call()
    before = _resident()
    for _ in range(count):
        call()
    lost = (_resident() - before) / count
    assert lost < 16, f"{lost:.0f} bytes a call are lost"


# --- memory, and many of everything -----------------------------------------------------------------


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """Ops with a list behind an optional tensor, and one with a key for each number."""
    csrc = tmp_path_factory.mktemp("listlib")
    (csrc / "lists.cpp").write_text(
        "#include <jitk/tensor.h>\n#include <optional>\n"
        "template <typename T>\nvoid scan(std::optional<jitk::TensorView>, jitk::TensorView, jitk::IntList) {}\n"
        "template <typename T, int64_t n>\nvoid keyed(jitk::TensorView) {}\n"
    )
    library = OpLibrary("listlib", csrc=csrc)

    @library.op(cpu="lists.cpp", variant="scan<{x.dtype}>", dtypes=(torch.float32,), mutates=("y",))
    def scan(y: Tensor | None, x: Tensor, sizes: list[int]) -> None:
        return None

    @library.op(cpu="lists.cpp", variant="keyed<{x.dtype}, {n}>", dtypes=(torch.float32,))
    def keyed(x: Tensor, n: int) -> None:
        return None

    yield SimpleNamespace(**library.ops)
    registry.remove(library)


@pytest.mark.parametrize("path", ["hit", "hit after None", "reference", "refused"])
@torch.inference_mode()
def test_lists_leave_no_memory_behind(lists: SimpleNamespace, path: str) -> None:
    x = torch.zeros(4, dtype=torch.float64 if path == "reference" else torch.float32)
    y = {"hit": x + 1, "refused": x[:1].expand(4)}.get(path)
    sizes = list(range(100))

    def call() -> None:
        with contextlib.suppress(RuntimeError):
            lists.scan.default(y, x, sizes)

    for _ in range(500):
        call()
    before = _resident()
    for _ in range(4000):
        call()
    assert _resident() - before < 4000 * 100  # a list alone is 808 bytes


@torch.inference_mode()
def test_ten_thousand_keys_are_small(lists: SimpleNamespace) -> None:
    x = torch.zeros(4, dtype=torch.float64)  # has no kernel, so nothing is compiled
    for n in range(500):
        lists.keyed.default(x, n)
    before = _resident()
    for n in range(500, 10_500):
        lists.keyed.default(x, n)
    assert _resident() - before < 5e6


def test_keys_that_are_found_while_others_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers take no lock: no key may be lost, or found twice, while the table grows."""
    signature = signature_of(_number)
    library = torch.library.Library("growinglib", "FRAGMENT")
    library.define(signature.schema("number"))
    asked: Counter[int] = Counter()

    def answer(key: Any) -> int:
        asked[key[1]] += 1
        return dispatcher.REFERENCE

    library.define(signature.schema("reference").replace("-> Tensor", "-> Tensor?"))
    library.impl("reference", lambda x, n: x + n, "CompositeExplicitAutograd")
    plan = variant.parse_variant("growinglib::number", "number<{n}>", signature).plan(signature)
    dispatcher.register("growinglib::number", "growinglib", "number", "CPU", "growinglib::reference", plan, answer)

    def work(first: int) -> None:
        with torch.inference_mode():
            for n in range(2000):
                at = (first * 500 + n) % 2000
                assert torch.ops.growinglib.number(torch.zeros(1), at).item() == at

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    assert len(asked) == 2000
    asked.clear()
    work(0)
    assert not asked


def _number(x: Tensor, n: int) -> Tensor:
    return x + n


def test_more_kernels_than_there_is_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is told when the op is declared, not when it is called."""
    assert f"JITK_MAX_SLOTS {dispatcher.MAX_SLOTS} " in (csrc_dir() / "runtime" / "slot.h").read_text()
    monkeypatch.setattr(dispatcher, "_reserved", dispatcher.MAX_SLOTS - 3)
    (tmp_path / "many.cpp").write_text("")
    library = OpLibrary("manylib", csrc=tmp_path)
    declare = library.op(cpu="many.cpp", variant="many")

    def first(x: Tensor) -> Tensor:
        return x

    def second(x: Tensor) -> Tensor:
        return x

    declare(first)
    with pytest.raises(ValueError) as error:
        declare(second)
    registry.remove(library)
    assert str(error.value) == (
        "manylib::second: a process can have 16384 kernels, one for each overload of an op and each backend; "
        "16383 are declared, and this makes 2 more"
    )


def test_the_last_slot_works() -> None:
    """Its trampoline is made by the assembler."""
    signature = signature_of(_number)
    library = torch.library.Library("lastlib", "FRAGMENT")
    library.define(signature.schema("number"))
    library.define(signature.schema("reference").replace("-> Tensor", "-> Tensor?"))
    library.impl("reference", lambda x, n: x + n, "CompositeExplicitAutograd")
    plan = variant.parse_variant("lastlib::number", "number<{n}>", signature).plan(signature)
    texts = ("lastlib::number", "lastlib", "number", "CPU", "lastlib::reference", plan)
    last = dispatcher.MAX_SLOTS - 1
    dispatcher._answers[last] = lambda key: dispatcher.REFERENCE
    dispatcher._checked(dispatcher.library().jitk_register, last, *(text.encode() for text in texts))
    assert torch.ops.lastlib.number(torch.zeros(1), 7).item() == 7
    with pytest.raises(RuntimeError, match="a process has at most 16384 op overloads"):
        dispatcher._checked(dispatcher.library().jitk_register, last + 1, *(text.encode() for text in texts))


# --- slots that change --------------------------------------------------------------------------------


def _reference_of(library: torch.library.Library, name: str, result: Any) -> str:
    library.define(f"{name}(Tensor x, SymInt n) -> Tensor?")
    library.impl(name, result, "CompositeExplicitAutograd")
    return f"{library.ns}::{name}"


def _changing(namespace: str) -> tuple[torch.library.Library, str, Any]:
    """A library with an op ``number`` and a reference, the op's plan, and its overload."""
    signature = signature_of(_number)
    library = torch.library.Library(namespace, "FRAGMENT")
    library.define(signature.schema("number"))
    _reference_of(library, "plus", lambda x, n: x + n)
    plan = variant.parse_variant(f"{namespace}::number", "number<{n}>", signature).plan(signature)
    return library, plan, getattr(torch.ops, namespace).number.default


@torch.inference_mode()
def test_a_key_is_asked_for_again_once_it_is_forgotten() -> None:
    _library, plan, op = _changing("forgetlib")
    asked: list[int] = []

    def answer(key: Any) -> int:
        asked.append(key[1])
        return dispatcher.REFERENCE

    number = dispatcher.register("forgetlib::number", "forgetlib", "number", "CPU", "forgetlib::plus", plan, answer)
    for _ in range(2):
        assert [op(torch.zeros(1), n).item() for n in (1, 2, 1, 2)] == [1, 2, 1, 2]
        dispatcher.forget(number)
    assert asked == [1, 2, 1, 2]
    with pytest.raises(RuntimeError, match="there is no slot 16000"):
        dispatcher.forget(16000)


@torch.inference_mode()
def test_an_entry_for_one_call(ops: SimpleNamespace) -> None:
    _library, plan, op = _changing("oncelib")
    asked: list[int] = []

    def answer(key: Any) -> dispatcher.Once:
        asked.append(key[1])
        return dispatcher.Once(dispatcher.REFERENCE)

    dispatcher.register("oncelib::number", "oncelib", "number", "CPU", "oncelib::plus", plan, answer)
    assert [op(torch.zeros(1), 3).item() for _ in range(3)] == [3, 3, 3]
    assert asked == [3, 3, 3]


@torch.inference_mode()
def test_a_build_that_is_forgotten_while_it_runs_serves_its_call_alone() -> None:
    _library, plan, op = _changing("stalelib")
    asked: list[int] = []

    def answer(key: Any) -> int:
        asked.append(key[1])
        if len(asked) == 1:
            dispatcher.forget(number)  # as an edit of its source would
        return dispatcher.REFERENCE

    number = dispatcher.register("stalelib::number", "stalelib", "number", "CPU", "stalelib::plus", plan, answer)
    assert [op(torch.zeros(1), 3).item() for _ in range(3)] == [3, 3, 3]
    assert asked == [3, 3]


@torch.inference_mode()
def test_an_op_that_is_declared_again_with_another_schema() -> None:
    library, plan, op = _changing("againlib")
    number = dispatcher.register(
        "againlib::number", "againlib", "number", "CPU", "againlib::plus", plan, lambda key: dispatcher.REFERENCE
    )
    assert op(torch.zeros(1), 7).item() == 7
    del op
    library._destroy()

    def swapped(n: int, x: Tensor, factor: float = 2.0) -> Tensor:
        return factor * x + n

    signature = signature_of(swapped)
    again = torch.library.Library("againlib", "FRAGMENT")
    again.define(signature.schema("number"))
    again.define(signature.schema("other").replace("-> Tensor", "-> Tensor?"))
    again.impl("other", swapped, "CompositeExplicitAutograd")
    plan = variant.parse_variant("againlib::number", "number<{x.dtype}>", signature).plan(signature)
    keys = []

    def answer(key: Any) -> int:
        keys.append(list(key[1:]))
        return dispatcher.REFERENCE

    assert number == dispatcher.register("againlib::number", "againlib", "number", "CPU", "againlib::other", plan, answer)
    assert torch.ops.againlib.number(1, torch.ones(1)).item() == 3
    assert torch.ops.againlib.number(1, torch.ones(1), 5.0).item() == 6
    assert keys == [[variant._KEY_OF_DTYPE[torch.float32]]]


def test_keys_are_found_while_slots_forget_and_change() -> None:
    _library, plan, _op = _changing("busylib")

    def answer(key: Any) -> int:
        return dispatcher.REFERENCE

    texts = ("busylib::number", "busylib", "number", "CPU", "busylib::plus", plan)
    number = dispatcher.register(*texts, answer)
    done = threading.Event()

    def change() -> None:
        while not done.is_set():
            dispatcher.forget(number)
            dispatcher.register(*texts, answer)

    def call(first: int) -> None:
        with torch.inference_mode():
            for n in range(500):
                assert torch.ops.busylib.number(torch.zeros(1), first + n % 50).item() == first + n % 50

    with ThreadPoolExecutor(4) as threads:
        changing = threads.submit(change)
        for calling in [threads.submit(call, first) for first in (0, 25, 50)]:
            calling.result()
        done.set()
        changing.result()


# --- errors as they were raised -----------------------------------------------------------------------


@pytest.mark.parametrize("text", ["12345", "0", "reference", "entry 12345", "", "a\nb"])
def test_an_error_that_looks_like_an_answer(text: str) -> None:
    dispatcher._answers[-1] = _raising(BuildError(text))
    said = dispatcher._build(-1, [0])
    assert said == f"error {text or 'BuildError'}"
    del dispatcher._answers[-1]


def _raising(error: Exception) -> Any:
    def answer(key: Any) -> int:
        raise error

    return answer


@pytest.mark.parametrize("times", [1, 2, 3])
def test_calls_raise_what_the_build_raised(ops: SimpleNamespace, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (BuildError("12345"), CompileRefused("not now"), KeyError("a key")):
        monkeypatch.setattr(ops.cold._boot, "load", lambda *_, error=error: _raising(error)(None))
        with pytest.raises(type(error)) as caught:
            ops.cold(torch.ones(3), 7000 + times)  # a key that no other test has
        assert caught.value is error


def test_a_kind_of_runtime_error_of_a_reference_stays(ops: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(ops.fail._reference, "_function", fail)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError, match="no more"):
            ops.fail(_X.double(), "this")
    assert ops.describe(*_GIVEN[0][0]).numel() == 256  # and nothing of it is left for another call
