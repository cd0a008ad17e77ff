"""Without a compiler: the reference runs and says so once, or it is an error, as ``JITK_FALLBACK`` wishes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import user_library
from child import ROOT, run_python
from expecttest import assert_expected_inline
from torch import Tensor

from torch_jit_ops import OpLibrary, Sample, SampleMaker, environment
from torch_jit_ops.ahead import build_ahead
from torch_jit_ops.testing import check

_WITHOUT_COMPILER = """
import os, warnings
import torch, torch_jit_ops
import torch.nn.functional as F

x = torch.randn(3, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        torch.testing.assert_close(torch.ops.jitk.relu2(x), F.relu(x) ** 2)
        torch.testing.assert_close(torch.ops.jitk.silu_and_mul(x), F.silu(x[:, :4]) * x[:, 4:])
        out = torch.empty(3, 4)
        torch.ops.jitk.silu_and_mul.out(x, out=out)
        torch.testing.assert_close(out, F.silu(x[:, :4]) * x[:, 4:])
print(f"{len(caught)} {caught[0].category.__name__}: {caught[0].message}")

os.environ["JITK_FALLBACK"] = "error"
try:
    torch.ops.jitk.fused_add_relu(x, x)
except torch_jit_ops.MissingCompiler as error:
    print("MissingCompiler:", error)
"""


def test_a_process_without_a_compiler(tmp_path: Path) -> None:
    printed = run_python(_WITHOUT_COMPILER, CXX="/nonexistent", JITK_CACHE_DIR=tmp_path, JITK_FALLBACK="warn")
    assert_expected_inline(
        printed.replace("which is slower: ", "which is slower:\n"),
        """\
1 UserWarning: jitk::relu2 runs its PyTorch reference, which is slower:
no C++ compiler was found ('/nonexistent' is not on PATH), so kernels cannot be built
  remedy: install g++ 11 or newer (Debian, Ubuntu: apt-get install g++), or set CXX to one
  JITK_FALLBACK=error makes this an error
MissingCompiler: no C++ compiler was found ('/nonexistent' is not on PATH), so kernels cannot be built
  remedy: install g++ 11 or newer (Debian, Ubuntu: apt-get install g++), or set CXX to one
""",
    )


def test_a_cached_kernel_needs_no_compiler() -> None:
    """The record of an op that another process built is enough."""
    torch.ops.jitk.relu2(torch.ones(2, 2))
    printed = run_python(
        "import torch, torch_jit_ops; print(torch.ops.jitk.relu2(torch.full((2, 2), 3.0)).sum().item())",
        CXX="/nonexistent",
        JITK_CACHE_DIR=environment.cache_dir(),
        JITK_FALLBACK="error",
    )
    assert printed == "36.0\n"


@pytest.fixture(scope="module")
def library() -> OpLibrary:
    """Ops that nobody has called: their first call happens after the dispatcher has been loaded."""
    library = OpLibrary("fallbacklib", csrc=user_library.library.csrc, include=user_library.library.include)

    def accumulate(total: Tensor, x: Tensor, unused: int) -> Tensor:
        return total.add_(x).amax(-1)

    def swap(x: Tensor) -> Tensor:
        return x.mT

    library.op(cpu="rows.cpp", variant="userlib::accumulate<{x.dtype}, {unused}>", mutates=("total",))(accumulate)
    library.op(cpu="rows.cpp", variant="userlib::swap<{x.dtype}>")(swap)
    return library


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setenv("JITK_CACHE_DIR", str(tmp_path))


@pytest.mark.usefixtures("no_compiler")
def test_a_variant_that_cannot_be_built_is_an_error_where_that_is_asked_for(library: OpLibrary) -> None:
    with pytest.raises(RuntimeError) as caught:
        library.ops["accumulate"](torch.zeros(2, 3), torch.ones(2, 3), 1)
    assert_expected_inline(
        str(caught.value),
        """\
no C++ compiler was found ('/nonexistent' is not on PATH), so kernels cannot be built
  remedy: install g++ 11 or newer (Debian, Ubuntu: apt-get install g++), or set CXX to one""",
    )


@pytest.mark.usefixtures("no_compiler")
def test_a_variant_that_cannot_be_built_runs_the_reference(library: OpLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the dispatcher: results, written arguments and out forms."""
    monkeypatch.setenv("JITK_FALLBACK", "warn")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        total = torch.arange(6.0).reshape(2, 3)
        largest = library.ops["accumulate"](total, torch.ones(2, 3), 2)
        assert total.tolist() == [[1, 2, 3], [4, 5, 6]]
        assert largest.tolist() == [3, 6]
        out = torch.full((3, 2), torch.nan)
        library.ops["swap"].out(total, out=out)
        assert out.tolist() == [[1, 4], [2, 5], [3, 6]]
        swapped = library.ops["swap"](total)
        assert swapped.is_contiguous()
        assert swapped.tolist() == out.tolist()


def test_a_wrong_setting_is_named(library: OpLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITK_FALLBACK", "never")
    with pytest.raises(ValueError) as caught:
        environment.fallback_is_error()
    assert_expected_inline(str(caught.value), """JITK_FALLBACK is 'never'; it must be one of error, warn""")


# --- a dtype without a kernel ----------------------------------------------------------------------

_DTYPES = """
import os, warnings
import torch, torch_jit_ops
import user_library
from torch_jit_ops import fallback

warnings.simplefilter("always")
warnings.showwarning = lambda message, *_, **__: print(message)
x, weight = torch.ones(3, 8), torch.ones(8)
for _ in range(2):
    torch.ops.jitk.rmsnorm(x.double(), weight.double())
    torch.ops.jitk.rmsnorm.out(x.double(), weight.double(), out=x.double())
    torch.ops.jitk.rmsnorm(x, weight.double())
    torch.ops.jitk.relu2(x.double())
    torch.ops.jitk.relu2(x)
print({name: each.fallbacks for name, each in torch_jit_ops.stats().ops.items() if each.fallbacks})

with fallback.allowed():
    torch.ops.jitk.fused_add_relu(x.double(), x.double())
print(torch_jit_ops.stats().total.fallbacks)

for call in (
    lambda: torch.ops.jitk.silu_and_mul(x.int()),
    lambda: torch.ops.userlib.split_sign(x.to(torch.complex64)),
    lambda: torch.ops.userlib.accumulate(x, x.to(torch.float8_e5m2fnuz)),
):
    try:
        call()
    except RuntimeError as error:
        print(error)

os.environ["JITK_FALLBACK"] = "error"
for _ in range(2):
    try:
        torch.ops.jitk.silu_mul(x.double(), x.double())
    except RuntimeError as error:
        print(error)
"""


def test_a_dtype_without_a_kernel_is_said_once() -> None:
    printed = run_python(_DTYPES, JITK_FALLBACK="warn", PYTHONPATH=f"{ROOT}{os.pathsep}{Path(__file__).parent}")
    assert_expected_inline(
        printed.replace("which is slower: ", "which is slower:\n").replace(" (JITK_FALLBACK", "\n(JITK_FALLBACK"),
        """\
jitk::rmsnorm runs its PyTorch function, which is slower:
argument 'input' is float64, and there are kernels for float16, bfloat16, float32
(JITK_FALLBACK=error makes this an error)
jitk::relu2 runs its PyTorch function, which is slower:
argument 'input' is float64, and there are kernels for float16, bfloat16, float32
(JITK_FALLBACK=error makes this an error)
{'jitk::relu2': 1, 'jitk::rmsnorm': 1}
2
jitk::silu_and_mul: argument 'input' does not match
  expected  [tokens=3, 2*d=8]  float16|bfloat16|float32|float64  cpu  row stride free
  got       [3, 8]             int32                             cpu
  dtype int32 is not among those expected; kernels take float16, bfloat16, float32
userlib::split_sign runs its PyTorch function, which is slower:
argument 'x' is complex64, and there are kernels for float32
(JITK_FALLBACK=error makes this an error)
userlib::split_sign: clamp is not supported for complex types
  argument 'x' is complex64, and there are kernels for float32, so the PyTorch function ran
userlib::accumulate runs its PyTorch function, which is slower:
argument 'x' is float8_e5m2fnuz, and there are kernels for float32
(JITK_FALLBACK=error makes this an error)
userlib::accumulate: Promotion for Float8 Types is not supported, attempted to promote Float and Float8_e5m2fnuz
  argument 'x' is float8_e5m2fnuz, and there are kernels for float32, so the PyTorch function ran
jitk::silu_mul: argument 'gate' is float64, and there are kernels for float16, bfloat16, float32
  remedy: convert it, or unset JITK_FALLBACK=error
jitk::silu_mul: argument 'gate' is float64, and there are kernels for float16, bfloat16, float32
  remedy: convert it, or unset JITK_FALLBACK=error
""",
    )


@pytest.fixture(scope="module")
def picking() -> OpLibrary:
    """An op whose kernel never runs: ``dtypes`` is about the indices, too, and does not have theirs."""
    library = OpLibrary("pickinglib", csrc=user_library.library.csrc, include=user_library.library.include)

    def samples(make: SampleMaker) -> Iterator[Sample]:
        yield Sample((make.randn(5), torch.arange(3, device=make.device)), note="three of five")

    def pick(x: Tensor, ids: Tensor) -> Tensor:
        return x[ids]

    library.op(cpu="rows.cpp", variant="userlib::pick<{x.dtype}, {ids.dtype}>", samples=samples)(pick)
    return library


def test_check_says_that_the_kernel_cannot_run(picking: OpLibrary) -> None:
    with pytest.raises(AssertionError) as caught:
        check(picking.ops["pick"], devices=["cpu"])
    assert_expected_inline(
        str(caught.value),
        """\
pickinglib::pick on cpu with float16, sample 0 (three of five): the kernel and the function
the kernel cannot run: argument 'ids' is int64, and there are kernels for float16, bfloat16, float32""",
    )


def test_build_says_that_nothing_is_built(picking: OpLibrary) -> None:
    with pytest.warns(UserWarning) as caught:
        assert build_ahead.needed(["pickinglib::pick"], backend="cpu") == []
    assert_expected_inline(
        "\n".join({str(warning.message): None for warning in caught}).replace(", and", ",\nand"),
        """\
pickinglib::pick: nothing is built for samples whose argument 'ids' is int64,
and there are kernels for float16, bfloat16, float32""",
    )
