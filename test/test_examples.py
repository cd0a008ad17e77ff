"""Examples that use others' libraries: run where that is possible, else compiled, else skipped with a reason."""

from __future__ import annotations

import os
import sys
import zlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from child import ROOT
from torch import Tensor

from torch_jit_ops import MissingCompiler, Op
from torch_jit_ops.backends import CUDA
from torch_jit_ops.builder import load
from torch_jit_ops.testing import check

_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def example(name: str) -> ModuleType:
    """The example's module, which declares its ops once in a process."""
    if str(ROOT / "examples" / name) not in sys.path:
        sys.path.append(str(ROOT / "examples" / name))
    return __import__(name)


def compile_for_hopper(op: Op, *values: torch.dtype | int) -> None:
    """Compile, link and load a variant, also where there is no GPU."""
    if torch.version.cuda is None:
        pytest.skip("a CPU build of PyTorch cannot load a CUDA kernel")
    try:
        CUDA.toolkit()
        unit = op.declaration.unit("cuda", values, "9.0a")
        unit.key()
    except MissingCompiler as missing:  # no nvcc, or no wheel with the headers
        pytest.skip(str(missing).splitlines()[0])
    assert load.load(unit).signature(op.name)


@pytest.mark.skipif(not Path("/usr/include/zlib.h").exists(), reason="zlib's headers are not installed")
def test_zlib() -> None:
    crc32 = example("zlib_op").crc32
    check(crc32)
    data = torch.randint(256, (3, 1 << 20), dtype=torch.uint8)
    expected = [zlib.crc32(bytes(row)) for row in data.tolist()]
    assert crc32(data).tolist() == torch.compile(crc32, fullgraph=True)(data).tolist() == expected
    with pytest.raises(RuntimeError, match="contiguous"):
        crc32(data.t())


def _is_declared(op: Op) -> None:
    """Without its library an op is declared all the same, and is its function."""
    assert op.declaration.samples is not None
    fake = torch.empty(5, 64, device="meta", dtype=torch.bfloat16), torch.empty(32, 64, device="meta", dtype=torch.bfloat16)
    rest: list[Tensor] = [torch.empty(32, device="meta", dtype=torch.bfloat16)]
    rest += [torch.empty((), device="meta") for _ in op.signature.arguments[3:]]
    assert op(*fake, *rest).shape == (5, 32)


def test_cublaslt() -> None:
    linear = example("cublaslt").linear
    _is_declared(linear)
    if torch.cuda.is_available():
        check(linear)
    else:
        compile_for_hopper(linear, torch.bfloat16)


def test_cutlass() -> None:
    linear_relu = example("cutlass_gemm").linear_relu
    _is_declared(linear_relu)
    if not isinstance(sys.modules["cutlass_gemm"].CUTLASS, str):
        try:
            os.fspath(sys.modules["cutlass_gemm"].CUTLASS)
        except MissingCompiler as missing:
            pytest.skip(str(missing).splitlines()[0])
    if _HOPPER:
        check(linear_relu)
    else:
        compile_for_hopper(linear_relu, torch.float8_e4m3fn, 64)


@pytest.mark.parametrize("name", ["cublaslt", "cutlass_gemm"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing only where it is missing")
def test_an_example_explains_itself_without_a_gpu(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert example(name).main() == 1
    assert "PyTorch sees no" in capsys.readouterr().err
