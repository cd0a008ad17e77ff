"""Without a compiler: the reference runs and says so once, or it is an error, as ``JITK_FALLBACK`` wishes."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import user_library
from child import run_python
from expecttest import assert_expected_inline
from torch import Tensor

from torch_jit_ops import OpLibrary, environment

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
