"""simd.h at every instruction set of this machine: conversions to torch's bit, functions in units in the last place."""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

INCLUDE = Path(__file__).resolve().parent.parent / "include"
LEVELS = ("x86-64", "x86-64-v3", "x86-64-v4")  # SSE2 without FMA and F16C, AVX2, AVX-512
RUNS_HERE = {"AVX512": LEVELS, "AVX2": LEVELS[:2]}.get(torch.backends.cpu.get_cpu_capability(), LEVELS[:1])

SOURCE = """
#include <jitk/simd.h>
namespace simd = jitk::host::simd;
using simd::Floats;
#define FUNCTION(NAME, T, EXPRESSION) \\
  extern "C" void NAME(int64_t n, const T* a, const T* b, T* out) { \\
    simd::transform(n, out, [](Floats x, Floats y) { (void)y; return EXPRESSION; }, a, b); \\
  }
FUNCTION(product_fp32, jitk::fp32_t, x * y)
FUNCTION(product_fp16, jitk::fp16_t, x * y)
FUNCTION(product_bf16, jitk::bf16_t, x * y)
FUNCTION(exponential, float, simd::exp(x))
FUNCTION(sigmoid, float, simd::sigmoid(x))
FUNCTION(gaussian_cdf, float, simd::gaussian_cdf(x))
FUNCTION(at_least, float, simd::at_least(x, 0.f))
FUNCTION(at_most, float, simd::at_most(x, 0.f))
#define MIXED(NAME, T, W) \\
  extern "C" void product_##NAME(int64_t n, const T* a, const W* b, T* out) { \\
    simd::transform(n, out, [](Floats x, Floats y) { return x * y; }, a, b); \\
  } \\
  extern "C" void sum_##NAME(int64_t n, const T* a, const W* b, float* out) { \\
    *out = simd::sum(n, [](Floats x, Floats y) { return x * y + 1.f; }, a, b); \\
  }
MIXED(fp32_fp32, jitk::fp32_t, jitk::fp32_t)
MIXED(fp32_fp16, jitk::fp32_t, jitk::fp16_t)
MIXED(fp32_bf16, jitk::fp32_t, jitk::bf16_t)
MIXED(fp16_fp32, jitk::fp16_t, jitk::fp32_t)
MIXED(fp16_fp16, jitk::fp16_t, jitk::fp16_t)
MIXED(fp16_bf16, jitk::fp16_t, jitk::bf16_t)
MIXED(bf16_fp32, jitk::bf16_t, jitk::fp32_t)
MIXED(bf16_fp16, jitk::bf16_t, jitk::fp16_t)
MIXED(bf16_bf16, jitk::bf16_t, jitk::bf16_t)
#define CONVERSION(NAME, T) \\
  extern "C" void NAME(int64_t n, const float* from, T* to, float* back) { \\
    for (int64_t i = 0; i < n; ++i) to[i] = jitk::from_float<T>(from[i]), back[i] = jitk::to_float(to[i]); \\
  }
CONVERSION(convert_fp16, jitk::fp16_t)
CONVERSION(convert_bf16, jitk::bf16_t)
"""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(scope="module", params=LEVELS)
def compiled(request, tmp_path_factory) -> ctypes.CDLL:
    if platform.machine() != "x86_64" or request.param not in RUNS_HERE:
        pytest.skip(f"this machine does not run {request.param}")
    folder = tmp_path_factory.mktemp("simd")
    (folder / "simd.cpp").write_text(SOURCE)
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = ["-std=c++17", "-O2", f"-march={request.param}", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", f"-I{INCLUDE}"]
    subprocess.run([*compiler, *flags, "simd.cpp", "-o", "simd.so"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "simd.so"))


def call(compiled: ctypes.CDLL, name: str, *tensors: torch.Tensor) -> None:
    getattr(compiled, name)(ctypes.c_int64(tensors[0].numel()), *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors))


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    """NaN is compared as NaN: its sign and payload differ between processors."""
    assert torch.equal(got.isnan(), expected.isnan())
    bits = torch.int32 if got.dtype == torch.float32 else torch.int16
    numbers = ~expected.isnan()
    assert torch.equal(got[numbers].view(bits), expected[numbers].view(bits))


def every_float(step: int) -> torch.Tensor:
    """Every ``step``-th fp32 value, infinities, NaN, subnormals and zeros of both signs among them."""
    some = torch.arange(-(2**31), 2**31, step).to(torch.int32).view(torch.float32)
    special = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 2.0**-149, -(2.0**-126), 88.8, -88.8, -103.9, -104.1, 13.2, -14.4]
    )
    return torch.cat([some, special])


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_every_half_times_others(compiled, dtype):
    """Loads, stores, their rounding and the order of lanes at once: the products overflow, tie and become subnormal."""
    torch.manual_seed(0)
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(DTYPES[dtype])
    for factor in (torch.ones(2**16), torch.randn(2**16), torch.rand(2**16) * 2.0**-12, torch.full((2**16,), 1.5)):
        others = factor.to(values.dtype)
        out = torch.full_like(values, 7)
        call(compiled, f"product_{dtype}", values, others, out)
        assert_same_bits(out, (values.float() * others.float()).to(values.dtype))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_scalar_conversions(compiled, dtype):
    x = every_float(step=4099)
    to, back = torch.empty(x.shape, dtype=DTYPES[dtype]), torch.empty(x.shape)
    call(compiled, f"convert_{dtype}", x, to, back)
    assert_same_bits(to, x.to(to.dtype))
    assert_same_bits(back, to.float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_no_more_than_n(compiled, dtype):
    for n in range(70):  # two blocks of the widest registers and a tail
        x = torch.arange(n + 1).to(DTYPES[dtype])[1:]  # one element off any alignment
        out = torch.full((n + 2,), -1.0, dtype=x.dtype)
        call(compiled, f"product_{dtype}", x, x, out[1:])
        assert out.tolist() == [-1.0, *(x * x).tolist(), -1.0]


# The bounds are those that simd.h states. Below -88.7 exp(-x) overflows and sigmoid is 0, as PyTorch's is.
@pytest.mark.parametrize(
    ("name", "truth", "ulp", "domain"),
    [
        ("exponential", torch.exp, 1.02, -torch.inf),
        ("sigmoid", torch.sigmoid, 2.5, -88.7),
        ("gaussian_cdf", lambda x: torch.special.erfc(-x * 0.5**0.5) / 2, 7.6, -torch.inf),
    ],
)
def test_functions(compiled, name, truth, ulp, domain):
    x = torch.cat([every_float(step=1999), torch.linspace(-110, 95, 1_000_003)])
    out = torch.empty_like(x)
    call(compiled, name, x, x, out)
    expected = truth(x.double())
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.float().isinf())
    compared = expected.float().isfinite() & (x >= domain)
    last_place = torch.exp2(expected.clamp(min=2.0**-126).log2().floor() - 23)
    errors = ((out.double() - expected).abs() / last_place)[compared]
    assert errors.max() <= ulp


@pytest.mark.parametrize(("name", "relative"), [("at_least", torch.maximum), ("at_most", torch.minimum)])
def test_limits_keep_nan(compiled, name, relative):
    x = every_float(step=65537)
    out = torch.empty_like(x)
    call(compiled, name, x, x, out)
    assert_same_bits(out + 0.0, relative(x, torch.zeros(())) + 0.0)


@pytest.mark.parametrize("second", DTYPES)
@pytest.mark.parametrize("first", DTYPES)
def test_rows_of_different_types_meet_element_by_element(compiled, first, second):
    for n in (*range(1, 70), 200):
        x, y = torch.randn(n).to(DTYPES[first]), torch.randn(n).to(DTYPES[second])
        out = torch.full_like(x, 7)
        call(compiled, f"product_{first}_{second}", x, y, out)
        assert_same_bits(out, (x.float() * y.float()).to(x.dtype))


@pytest.mark.parametrize("second", DTYPES)
@pytest.mark.parametrize("first", DTYPES)
def test_sums(compiled, first, second):
    """Of products that are exact in fp32; the elements past the end, for which the term is 1, do not count."""
    for n in (*range(70), 128, 2047, 2048, 2049, 65536, 100_003):
        x, y = (torch.randint(-8, 9, (n,)).to(DTYPES[dtype]) for dtype in (first, second))
        out = torch.full((1,), torch.nan)
        getattr(compiled, f"sum_{first}_{second}")(ctypes.c_int64(n), *(ctypes.c_void_p(t.data_ptr()) for t in (x, y, out)))
        assert out.item() == (x.double() * y.double() + 1).sum().item()


def test_a_long_sum_is_not_a_running_one(compiled):
    """Chains of additions are short: a running sum of so many terms is wrong by hundreds of units in the last place."""
    x = torch.rand(1 << 20) + 0.5
    out = torch.zeros(1)
    compiled.sum_fp32_fp32(ctypes.c_int64(x.numel()), *(ctypes.c_void_p(t.data_ptr()) for t in (x, x, out)))
    truth = (x.double().square() + 1).sum().item()
    assert abs(out.item() - truth) <= 8 * 2.0**-24 * truth
