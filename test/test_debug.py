"""Debug builds: their flags and checks of indices, and results that are held to the fake."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

import torch_jit_ops
from torch_jit_ops import OpLibrary
from torch_jit_ops.backends import CPU, CUDA, MissingCompiler
from torch_jit_ops.builder.unit import Unit, include_dir

_names = itertools.count()

GROW = """
#include <jitk/result.h>
#include <jitk/tensor.h>

template <typename T>
void grow(jitk::TensorView input, jitk::Output& out) {
  const int64_t size = input.size(0) + MORE;
  jitk::TensorView to = out.empty({&size, 1}, jitk::dtype_of<RESULT>(), input.device());
  for (int64_t i = 0; i < to.numel(); ++i) static_cast<RESULT*>(to.data_ptr())[i] = i < input.numel() ? 1 : 2;
}
"""

TOUCH = """
#include <jitk/result.h>
#include <jitk/tensor.h>

template <typename T>
void touch(jitk::TensorView x, jitk::IntList sizes, int64_t which) {
#ifdef JITK_DEBUG
  static_cast<T*>(x.data_ptr())[0] = 1;
#else
  static_cast<T*>(x.data_ptr())[0] = 2;
#endif
  if (which < 10) x.size(which);
  else if (which < 20) x.stride(which - 10);
  else (void)(sizes[which - 20] + 1);
}
"""


@pytest.fixture
def debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITK_DEBUG", "1")


def library(folder: Path, **sources: str) -> OpLibrary:
    for name, text in sources.items():
        (folder / f"{name}.cpp").write_text(text)
    return OpLibrary(f"debug{next(_names)}", csrc=folder)


def grown(folder: Path, more: int = 1, result: str = "T", **options: Any) -> torch_jit_ops.Op:
    text = GROW.replace("MORE", str(more)).replace("RESULT", result)

    @library(folder, grow=text).op(cpu="grow.cpp", variant="grow<{input.dtype}>", **options)
    def grow(input: Tensor) -> Tensor:
        return torch.nn.functional.pad(input, (0, 1))

    return grow


def touched(folder: Path) -> torch_jit_ops.Op:
    @library(folder, touch=TOUCH).op(cpu="touch.cpp", variant="touch<{x.dtype}>", mutates=("x",))
    def touch(x: Tensor, sizes: list[int], which: int) -> None:
        x.fill_(0)

    return touch


def said(error: pytest.ExceptionInfo[BaseException], op: torch_jit_ops.Op) -> str:
    return str(error.value).replace(op.declaration.namespace, "mylib")


@pytest.mark.usefixtures("debugging")
def test_a_result_of_another_shape_is_an_error(tmp_path: Path) -> None:
    op = grown(tmp_path, more=2)
    with pytest.raises(RuntimeError) as error:
        op(torch.ones(3))
    assert_expected_inline(
        said(error, op),
        """\
mylib::grow: result 'out' is not what the fake says
  expected  [4]  float32  cpu  strides [1]
  got       [5]  float32  cpu  strides [1]
  of the kernel grow in grow.cpp""",
    )


@pytest.mark.usefixtures("debugging")
def test_a_result_of_another_dtype_is_an_error(tmp_path: Path) -> None:
    op = grown(tmp_path, result="jitk::fp64_t")
    with pytest.raises(RuntimeError) as error:
        op(torch.ones(3))
    assert_expected_inline(
        said(error, op),
        """\
mylib::grow: result 'out' is not what the fake says
  expected  [4]  float32  cpu  strides [1]
  got       [4]  float64  cpu  strides [1]
  of the kernel grow in grow.cpp""",
    )


@pytest.mark.usefixtures("debugging")
def test_an_out_tensor_that_the_kernel_alone_takes_is_an_error(tmp_path: Path) -> None:
    op = grown(tmp_path)
    strided = torch.zeros(4, 2)[:, 0]
    op.out(torch.ones(3), out=strided)  # of which the fake says nothing
    with pytest.raises(RuntimeError) as error:
        op.out(torch.ones(3), out=torch.empty(6))
    assert_expected_inline(
        said(error, op),
        """\
mylib::grow: result 'out' is not what the fake says
  expected  [4]  float32  cpu
  got       [6]  float32  cpu
  of the kernel grow in grow.cpp""",
    )
    with pytest.raises(RuntimeError, match=r"the fake says\n  expected  \[4\]  float32  cpu\n  got       \[4\]  int32"):
        op.out(torch.ones(3), out=torch.empty(4, dtype=torch.int32))


@pytest.mark.usefixtures("debugging")
def test_a_result_as_promised_is_none(tmp_path: Path) -> None:
    op = grown(tmp_path)
    x = torch.ones(3, requires_grad=True)
    assert op(x).tolist() == [1, 1, 1, 2]
    op(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1, 1, 1]
    out = torch.empty(4)
    with torch.inference_mode():
        op.out(torch.ones(3), out=out)
        assert op(torch.ones(2)).tolist() == [1, 1, 2]
    assert out.tolist() == [1, 1, 1, 2]


def test_outside_of_debug_mode_nothing_is_checked(tmp_path: Path) -> None:
    op = grown(tmp_path, more=2)
    assert op(torch.ones(3)).shape == (5,)
    assert not hasattr(getattr(torch.ops, op.declaration.namespace), "_unchecked_grow")


@pytest.mark.usefixtures("debugging")
def test_indices_of_tensors_and_lists_are_checked(tmp_path: Path) -> None:
    op, x = touched(tmp_path), torch.zeros(2, 3)
    for within in (0, 1, -1, 10, 11, 20, 22):
        op(x, [4, 5, 6], within)
    assert x[0, 0] == 1
    errors = []
    for outside in (2, -3, 12, 23):
        with pytest.raises(RuntimeError) as error:
            op(x, [4, 5, 6], outside)
        errors.append(said(error, op))
    assert_expected_inline(
        "\n".join(errors),
        """\
mylib::touch: dimension 2 of x, which has 2
mylib::touch: dimension -1 of x, which has 2
mylib::touch: dimension 2 of x, which has 2
mylib::touch: element 3 of a list, which has 3""",
    )


def test_a_debug_build_is_a_variant_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    op, x = touched(tmp_path), torch.zeros(2, 3)
    op(x, [], 0)
    assert x[0, 0] == 2
    usual = op.declaration.unit("cpu", (torch.float32,), CPU.arch_of())
    monkeypatch.setenv("JITK_DEBUG", "1")
    debug = op.declaration.unit("cpu", (torch.float32,), CPU.arch_of())
    assert usual.key() != debug.key()
    assert set(debug.compile_flags()) - set(usual.compile_flags()) == {"-O0", "-g", "-DJITK_DEBUG"}
    assert {"-G", "-g", "-DJITK_DEBUG"} <= set(Unit("u", "u", CUDA, "9.0a", "", debug=True).compile_flags())


VECTOR = """
#include <jitk/vec.cuh>
__global__ void kernel(float* x, int i) {
  jitk::device::AlignedVector<float, 4> vector;
  vector.load(x);
  vector[i] = 1;
  vector.store(x);
}
"""


@pytest.mark.parametrize("debug", [False, True])
def test_elements_of_vectors_are_checked(tmp_path: Path, debug: bool) -> None:
    """By what the compiled kernel says; test_cuda.py is where one runs."""
    try:
        nvcc = CUDA.commands()[0][0]
    except MissingCompiler as missing:
        pytest.skip(str(missing).splitlines()[0])
    (tmp_path / "vector.cu").write_text(VECTOR)
    flags = Unit("u", "u", CUDA, "9.0a", "", debug=debug).compile_flags()
    command = [nvcc, *flags, f"-I{include_dir()}", "-Werror", "all-warnings", "-cubin", "vector.cu"]
    command += ["-o", "vector.cubin"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (b"an AlignedVector" in (tmp_path / "vector.cubin").read_bytes()) == debug


@pytest.mark.usefixtures("debugging")
def test_an_op_declared_again_is_checked_as_it_is_now(tmp_path: Path) -> None:
    op = grown(tmp_path)
    assert op(torch.ones(3)).shape == (4,)
    library = next(each for each in torch_jit_ops.libraries() if op in each.ops.values())
    library.develop()

    @library.op(cpu="grow.cpp", variant="grow<{input.dtype}>")
    def grow(input: Tensor) -> Tensor:
        return torch.nn.functional.pad(input, (0, 2))

    with pytest.raises(RuntimeError, match=r"result 'out' is not what the fake says\n  expected  \[5\]"):
        grow(torch.ones(3))
