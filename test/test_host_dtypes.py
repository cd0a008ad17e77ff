"""dtype.h under a host compiler alone: each conversion gives PyTorch's bits, for every value of 8 and of 16 bits."""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

INCLUDE = Path(__file__).resolve().parent.parent / "include"
DTYPES = {
    "fp16_t": torch.float16,
    "bf16_t": torch.bfloat16,
    "fp8_e4m3_t": torch.float8_e4m3fn,
    "fp8_e5m2_t": torch.float8_e5m2,
    "fp8_e8m0_t": torch.float8_e8m0fnu,
}
# DLPack's code and bits.
CODES = {
    "bool": (6, 8),
    "int8_t": (0, 8),
    "int64_t": (0, 64),
    "uint8_t": (1, 8),
    "uint16_t": (1, 16),
    "fp64_t": (2, 64),
    "fp16_t": (2, 16),
    "bf16_t": (4, 16),
    "fp8_e4m3_t": (10, 8),
    "fp8_e5m2_t": (12, 8),
    "fp8_e8m0_t": (14, 8),
}
SOURCE = """
#include <jitk/dtype.h>
using namespace jitk;
#define CONVERSIONS(T)                                                                          \\
  static_assert(sizeof(T) <= 2, "a tensor's element and nothing else");                         \\
  extern "C" void from_##T(int64_t n, const T* from, float* to) {                               \\
    for (int64_t i = 0; i < n; ++i) to[i] = to_float(from[i]);                                  \\
  }                                                                                             \\
  extern "C" void to_##T(int64_t n, const float* from, T* to) {                                 \\
    for (int64_t i = 0; i < n; ++i) to[i] = from_float<T>(from[i]);                             \\
  }
"""
SOURCE += "".join(f"CONVERSIONS({name})\n" for name in DTYPES)
SOURCE += "".join(
    f'extern "C" int dtype_of_{name}() {{ return dtype_of<{name}>().code << 8 | dtype_of<{name}>().bits; }}\n' for name in CODES
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("dtypes")
    (folder / "dtypes.cpp").write_text(SOURCE)
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", f"-I{INCLUDE}"]
    command = [*shlex.split(os.environ.get("CXX", "c++")), *flags, "dtypes.cpp", "-o", "dtypes.so"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "dtypes.so"))


def call(compiled: ctypes.CDLL, name: str, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    getattr(compiled, name)(ctypes.c_int64(x.numel()), ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()))
    return out


def codes(dtype: torch.dtype) -> torch.Tensor:
    """Every value of the dtype."""
    bits = 8 * dtype.itemsize
    return torch.arange(2**bits).to(torch.uint8 if bits == 8 else torch.uint16).view(dtype)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.dtype.itemsize])


def floats() -> torch.Tensor:
    """All of bf16, and of fp32 many; between them the neighbours of every middle of two 8-bit numbers."""
    some = torch.arange(-(2**31), 2**31, 4099).to(torch.int32).view(torch.float32)
    numbers = torch.cat([codes(dtype).float() for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)])
    numbers = numbers[numbers.isfinite()].unique()
    middles = (numbers[1:].double() + numbers[:-1].double()).div(2).float()
    powers = 1.5 * 2.0 ** torch.arange(-126, 128)
    edges = torch.cat([middles, powers, torch.tensor([464.0, 480.0, 61440.0, 65536.0, 2.0**-127, 1.5 * 2.0**-127])])
    near = [torch.nextafter(edges, torch.tensor(to)) for to in (torch.inf, -torch.inf)]
    return torch.cat([codes(torch.bfloat16).float(), some, edges, *near])


@pytest.mark.parametrize("name", DTYPES)
def test_every_code_to_a_float(compiled: ctypes.CDLL, name: str) -> None:
    x = codes(DTYPES[name])
    got, expected = call(compiled, f"from_{name}", x, torch.full((len(x),), 7.0)), x.float()
    assert torch.equal(got.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(bits(got)[numbers], bits(expected)[numbers])


@pytest.mark.parametrize("name", DTYPES)
def test_floats_to_each_type(compiled: ctypes.CDLL, name: str) -> None:
    x = floats()
    got = call(compiled, f"to_{name}", x, torch.zeros(len(x), dtype=DTYPES[name]))
    saturates = torch.tensor(500.0).to(torch.float8_e4m3fn).float() == 448  # PyTorch from 2.13 on; 2.11 makes NaN of it
    expected = (x if saturates or name != "fp8_e4m3_t" else x.clamp(-448, 448)).to(DTYPES[name])
    numbers = ~x.isnan()
    wrong = numbers & (bits(got) != bits(expected))
    assert not wrong.any(), torch.stack([x[wrong], got[wrong].float(), expected[wrong].float()], 1)[:5].tolist()
    assert got[~numbers].float().isnan().all()


@pytest.mark.parametrize("name", CODES)
def test_each_type_has_dlpacks_code(compiled: ctypes.CDLL, name: str) -> None:
    code, width = CODES[name]
    assert getattr(compiled, f"dtype_of_{name}")() == code << 8 | width
