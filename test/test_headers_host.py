"""The host half of ``include/jitk``: what a kernel's launcher calls before there is a GPU.

``headers/host_tests.cpp`` is compiled once by the host compiler against the headers and pybind11, and nothing else. Users read
the texts of errors, so they are pinned whole; ``EXPECTTEST_ACCEPT=1`` rewrites them after an intended change.
"""

from __future__ import annotations

import importlib.util
import os
import random
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from expecttest import assert_expected_inline

ROOT = Path(__file__).resolve().parent.parent
INCLUDE = ROOT / "include"
CXX = os.environ.get("CXX") or "c++"

pytestmark = pytest.mark.skipif(shutil.which(CXX) is None, reason=f"no host compiler: {CXX} is not on PATH")

# DLPack's (code, bits), which is what the headers compare.
DTYPES = {
    "float32": (2, 32),
    "float16": (2, 16),
    "bfloat16": (4, 16),
    "bool": (6, 8),
    "int32": (0, 32),
    "int64": (0, 64),
    "uint8": (1, 8),
    "float8_e4m3fn": (10, 8),
}
DEVICES = {"cpu": 1, "cuda": 2}


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The compiled ``host_tests.cpp``."""
    pybind11 = pytest.importorskip("pybind11")
    built = tmp_path_factory.mktemp("headers") / f"host_tests{sysconfig.get_config_var('EXT_SUFFIX')}"
    command = [CXX, "-std=c++17", "-O0", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    command += [f"-I{INCLUDE}", f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_paths()['include']}"]
    command += [str(ROOT / "test/headers/host_tests.cpp"), "-o", str(built)]
    compiled = subprocess.run(command, check=False, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    spec = importlib.util.spec_from_file_location("host_tests", built)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tensor(host: ModuleType) -> Any:
    """Makes what a kernel is given: ``tensor("x", [7, 8], strides=[16, 1], dtype="bfloat16", device="cuda:0", address=32)``."""

    def make(
        name: str,
        shape: list[int],
        strides: list[int] | None = None,
        dtype: str = "float32",
        device: str = "cpu",
        address: int = 0,
    ) -> Any:
        if strides is None:
            strides = [1] * len(shape)
            for i in reversed(range(len(shape) - 1)):
                strides[i] = strides[i + 1] * max(shape[i + 1], 1)
        kind, _, index = device.partition(":")
        return host.Argument(shape, strides, DTYPES[dtype], (DEVICES[kind], int(index or 0)), name, address)

    return make


def error(function: Any, *args: Any) -> str:
    """The text that the call raises, without the line of the test's own source."""
    with pytest.raises(RuntimeError) as caught:
        function(*args)
    return re.sub(r"host_tests\.cpp:\d+", "host_tests.cpp:LINE", str(caught.value))


@pytest.mark.parametrize("standard", ["c++17", "c++20"])
def test_every_header_compiles_alone(standard: str) -> None:
    headers = sorted((INCLUDE / "jitk").glob("*.h"))
    assert headers
    failures = []
    for header in headers:
        command = [CXX, "-fsyntax-only", f"-std={standard}", "-Wall", "-Wextra", "-Werror", f"-I{INCLUDE}", "-x", "c++", "-"]
        source = f"#include <jitk/{header.name}>\n"
        compiled = subprocess.run(command, input=source, check=False, capture_output=True, text=True)
        if compiled.returncode != 0:
            failures.append(compiled.stderr)
    assert not failures, "\n".join(failures)


class TestTensorMatcher:
    def norm(self, host: ModuleType, tensor: Any, **changed: Any) -> Any:
        given = {
            "input": tensor("input", [7, 4096], dtype="bfloat16", device="cuda:1"),
            "residual": tensor("residual", [7, 4096], dtype="bfloat16", device="cuda:1"),
            "weight": tensor("weight", [4096], device="cuda:1"),
        } | changed
        return lambda: host.match_norm(*given.values())

    def test_symbols_take_the_values_of_what_they_meet(self, host: ModuleType, tensor: Any) -> None:
        assert self.norm(host, tensor)() == [7, 4096, True, 1]

    def test_size_bound_by_another_tensor(self, host: ModuleType, tensor: Any) -> None:
        residual = tensor("residual", [7, 4097], dtype="bfloat16", device="cuda:1")
        assert_expected_inline(
            error(self.norm(host, tensor, residual=residual)),
            """\
argument 'residual' does not match
  expected  [tokens=7, hidden=4096]  bfloat16  cuda:1  contiguous
  got       [7, 4097]                bfloat16  cuda:1
  dimension 1: hidden was bound to 4096 by 'input'
  at host_tests.cpp:LINE""",
        )

    def test_size_bound_in_another_matcher(self, host: ModuleType, tensor: Any) -> None:
        weight = tensor("weight", [4095], device="cuda:1")
        assert_expected_inline(
            error(self.norm(host, tensor, weight=weight)),
            """\
argument 'weight' does not match
  expected  [hidden=4096]  float32  cuda:1  contiguous
  got       [4095]         float32  cuda:1
  dimension 0: hidden was bound to 4096 by 'input'
  at host_tests.cpp:LINE""",
        )

    def test_rank(self, host: ModuleType, tensor: Any) -> None:
        flat = tensor("input", [4096], dtype="bfloat16", device="cuda:1")
        assert_expected_inline(
            error(self.norm(host, tensor, input=flat)),
            """\
argument 'input' does not match
  expected  [tokens, hidden]  float16|bfloat16  cuda  contiguous
  got       [4096]            bfloat16          cuda:1
  it has 1 dimensions, expected 2
  at host_tests.cpp:LINE""",
        )

    def test_dtype_that_no_tensor_may_have(self, host: ModuleType, tensor: Any) -> None:
        fp8 = tensor("input", [7, 4096], dtype="float8_e4m3fn", device="cuda:1")
        assert_expected_inline(
            error(self.norm(host, tensor, input=fp8)),
            """\
argument 'input' does not match
  expected  [tokens=7, hidden=4096]  float16|bfloat16  cuda  contiguous
  got       [7, 4096]                float8_e4m3fn     cuda:1
  dtype float8_e4m3fn is not among those expected
  at host_tests.cpp:LINE""",
        )

    def test_dtype_bound_by_another_tensor(self, host: ModuleType, tensor: Any) -> None:
        residual = tensor("residual", [7, 4096], dtype="float16", device="cuda:1")
        assert_expected_inline(
            error(self.norm(host, tensor, residual=residual)),
            """\
argument 'residual' does not match
  expected  [tokens=7, hidden=4096]  bfloat16  cuda:1  contiguous
  got       [7, 4096]                float16   cuda:1
  dtype was bound to bfloat16 by 'input'
  at host_tests.cpp:LINE""",
        )

    def test_device_bound_by_another_tensor(self, host: ModuleType, tensor: Any) -> None:
        residual = tensor("residual", [7, 4096], dtype="bfloat16", device="cuda:0")
        assert_expected_inline(
            error(self.norm(host, tensor, residual=residual)),
            """\
argument 'residual' does not match
  expected  [tokens=7, hidden=4096]  bfloat16  cuda:1  contiguous
  got       [7, 4096]                bfloat16  cuda:0
  device was bound to cuda:1 by 'input'
  at host_tests.cpp:LINE""",
        )

    def test_device_of_another_kind(self, host: ModuleType, tensor: Any) -> None:
        residual = tensor("residual", [7, 4096], dtype="bfloat16")
        assert_expected_inline(
            error(self.norm(host, tensor, residual=residual)),
            """\
argument 'residual' does not match
  expected  [tokens=7, hidden=4096]  bfloat16  cuda:1  contiguous
  got       [7, 4096]                bfloat16  cpu
  device was bound to cuda:1 by 'input'
  at host_tests.cpp:LINE""",
        )

    def test_options_stay_with_a_symbol_passed_by_reference(self, host: ModuleType, tensor: Any) -> None:
        host.match_symbols_with_options(tensor("indices", [3], dtype="int64", device="cuda:0"))
        assert_expected_inline(
            error(host.match_symbols_with_options, tensor("indices", [3], dtype="int64")),
            """\
argument 'indices' does not match
  expected  [*]  int64  cuda  contiguous
  got       [3]  int64  cpu
  device cpu is not among those expected
  at host_tests.cpp:LINE""",
        )
        assert_expected_inline(
            error(host.match_symbols_with_options, tensor("indices", [3], device="cuda:0")),
            """\
argument 'indices' does not match
  expected  [*]  int32|int64  cuda  contiguous
  got       [3]  float32      cuda:0
  dtype float32 is not among those expected
  at host_tests.cpp:LINE""",
        )

    def test_the_device_of_a_host_kernel_is_the_cpu(self, host: ModuleType, tensor: Any) -> None:
        host.match_bool(tensor("mask", [3], dtype="bool"))
        assert_expected_inline(
            error(host.match_bool, tensor("mask", [3], dtype="bool", device="cuda:0")),
            """\
argument 'mask' does not match
  expected  [*]  bool  cpu  contiguous
  got       [3]  bool  cuda:0
  device cuda:0 is not among those expected
  at host_tests.cpp:LINE""",
        )

    def test_bool_is_not_uint8(self, host: ModuleType, tensor: Any) -> None:
        assert_expected_inline(
            error(host.match_bool, tensor("mask", [3], dtype="uint8")),
            """\
argument 'mask' does not match
  expected  [*]  bool   cpu  contiguous
  got       [3]  uint8  cpu
  dtype uint8 is not among those expected
  at host_tests.cpp:LINE""",
        )

    def test_dtype_and_device_by_value(self, host: ModuleType, tensor: Any) -> None:
        x = tensor("x", [3], dtype="int32", device="cuda:2")
        host.match_like(x, tensor("y", [5], dtype="int32", device="cuda:2"))
        assert_expected_inline(
            error(host.match_like, x, tensor("y", [5], dtype="int64", device="cuda:2")),
            """\
argument 'y' does not match
  expected  [*]  int32  cuda:2  contiguous
  got       [5]  int64  cuda:2
  dtype int64 is not among those expected
  at host_tests.cpp:LINE""",
        )
        assert_expected_inline(
            error(host.match_like, x, tensor("y", [5], dtype="int32", device="cuda:1")),
            """\
argument 'y' does not match
  expected  [*]  int32  cuda:2  contiguous
  got       [5]  int32  cuda:1
  device cuda:1 is not among those expected
  at host_tests.cpp:LINE""",
        )

    @pytest.mark.parametrize("tokens", [0, 1, 3, 2**40])
    def test_any_size(self, host: ModuleType, tensor: Any, tokens: int) -> None:
        host.match_any_by_8(tensor("x", [tokens, 8]))

    def test_a_number_in_the_pattern(self, host: ModuleType, tensor: Any) -> None:
        assert_expected_inline(
            error(host.match_any_by_8, tensor("x", [3, 9])),
            """\
argument 'x' does not match
  expected  [*, 8]  any      cpu  contiguous
  got       [3, 9]  float32  cpu
  dimension 1: expected 8
  at host_tests.cpp:LINE""",
        )

    def test_multiple_of_a_symbol(self, host: ModuleType, tensor: Any) -> None:
        assert host.match_halves(tensor("input", [3, 14]), tensor("out", [3, 7])) == [3, 7]
        assert host.match_halves(tensor("input", [3, 0]), tensor("out", [3, 0])) == [3, 0]
        assert_expected_inline(
            error(host.match_halves, tensor("input", [3, 7]), tensor("out", [3, 3])),
            """\
argument 'input' does not match
  expected  [tokens=3, 2*d]  any      cpu  contiguous
  got       [3, 7]           float32  cpu
  dimension 1: 7 is not a multiple of 2
  at host_tests.cpp:LINE""",
        )
        assert_expected_inline(
            error(host.match_halves, tensor("input", [3, 8]), tensor("out", [3, 5])),
            """\
argument 'out' does not match
  expected  [tokens=3, d=4]  any      cpu  contiguous
  got       [3, 5]           float32  cpu
  dimension 1: d was bound to 4 by 'input'
  at host_tests.cpp:LINE""",
        )

    def test_not_contiguous(self, host: ModuleType, tensor: Any) -> None:
        assert_expected_inline(
            error(host.match_any_by_8, tensor("x", [3, 8], strides=[1, 3])),
            """\
argument 'x' does not match
  expected  [*, 8]  any      cpu  contiguous
  got       [3, 8]  float32  cpu  strides [1, 3]
  it is not contiguous; pass x.contiguous()
  at host_tests.cpp:LINE""",
        )

    def test_a_size_of_one_or_none_has_any_stride(self, host: ModuleType, tensor: Any) -> None:
        host.match_any_by_8(tensor("x", [1, 8], strides=[77, 1]))
        host.match_any_by_8(tensor("x", [0, 8], strides=[3, 5]))
        host.match_fixed_strides(tensor("x", [1, 4], strides=[77, 1]))
        host.match_fixed_strides(tensor("x", [0, 4], strides=[7, 7]))

    def test_symbol_as_stride(self, host: ModuleType, tensor: Any) -> None:
        assert host.match_row_stride(tensor("x", [3, 8], strides=[24, 1]), tensor("y", [5, 7], strides=[24, 1])) == 24
        assert_expected_inline(
            error(host.match_row_stride, tensor("x", [3, 8], strides=[24, 1]), tensor("y", [5, 7], strides=[7, 1])),
            """\
argument 'y' does not match
  expected  [*, *]  any      cpu  strides [row stride=24, 1]
  got       [5, 7]  float32  cpu
  stride of dimension 0 is 7, expected 24 (row stride was bound by 'x')
  at host_tests.cpp:LINE""",
        )

    def test_number_as_stride(self, host: ModuleType, tensor: Any) -> None:
        assert_expected_inline(
            error(host.match_row_stride, tensor("x", [3, 8], strides=[24, 2]), tensor("y", [3, 8])),
            """\
argument 'x' does not match
  expected  [*, *]  any      cpu  strides [row stride=24, 1]
  got       [3, 8]  float32  cpu  strides [24, 2]
  stride of dimension 1 is 2, expected 1; pass x.contiguous()
  at host_tests.cpp:LINE""",
        )

    def test_leading_dimensions(self, host: ModuleType, tensor: Any) -> None:
        assert host.match_leading(tensor("x", [2, 3, 4]), tensor("y", [2, 3, 4])) == [2, 3]
        assert host.match_leading(tensor("x", [4]), tensor("y", [4])) == []
        assert_expected_inline(
            error(host.match_leading, tensor("x", [2, 3, 4]), tensor("y", [3, 2, 4])),
            """\
argument 'y' does not match
  expected  [2, 3, hidden=4]  any      cpu  contiguous
  got       [3, 2, 4]         float32  cpu
  leading dimensions: batch was bound to [2, 3] by 'x'
  at host_tests.cpp:LINE""",
        )
        assert_expected_inline(
            error(host.match_leading, tensor("x", []), tensor("y", [])),
            """\
argument 'x' does not match
  expected  [batch..., hidden]  any      cpu  contiguous
  got       []                  float32  cpu
  it has 0 dimensions, expected at least 1
  at host_tests.cpp:LINE""",
        )

    def test_rows(self, host: ModuleType, tensor: Any) -> None:
        assert host.match_rows(tensor("x", [2, 3, 4], strides=[30, 10, 1])) == [6, 4, 10]
        assert host.match_rows(tensor("x", [2, 1, 3, 4], strides=[30, 99, 10, 1])) == [6, 4, 10]
        assert host.match_rows(tensor("x", [4])) == [1, 4, 4]
        assert host.match_rows(tensor("x", [3, 1], strides=[5, 9])) == [3, 1, 5]
        assert host.match_rows(tensor("x", [0, 3, 4], strides=[31, 10, 2])) == [0, 4, 4]
        assert_expected_inline(
            error(host.match_rows, tensor("x", [2, 3, 4], strides=[31, 10, 1])),
            """\
argument 'x' does not match
  expected  [2, 3, hidden=4]  any      cpu  row stride free
  got       [2, 3, 4]         float32  cpu  strides [31, 10, 1]
  its strides do not walk over dense rows in equal steps; pass x.contiguous()
  at host_tests.cpp:LINE""",
        )

    def test_more_than_eight_dimensions(self, host: ModuleType, tensor: Any) -> None:
        assert host.match_ten(tensor("x", [2, 1, 2, 1, 2, 1, 2, 1, 2, 5])) == 5
        assert_expected_inline(
            error(host.match_ten, tensor("x", [2, 1, 2, 1, 2, 1, 2, 1, 5])),
            """\
argument 'x' does not match
  expected  [*, *, *, *, *, *, *, *, *, last]  any      cpu  contiguous
  got       [2, 1, 2, 1, 2, 1, 2, 1, 5]        float32  cpu
  it has 9 dimensions, expected 10
  at host_tests.cpp:LINE""",
        )

    def test_strides_for_another_number_of_dimensions(self, host: ModuleType) -> None:
        assert_expected_inline(
            error(host.match_strides_of_another_rank),
            """\
with_strides gives 1 strides for 2 dimensions
  at host_tests.cpp:LINE""",
        )

    def test_alignment(self, host: ModuleType, tensor: Any) -> None:
        host.match_aligned(tensor("x", [3, 8], strides=[24, 1], dtype="bfloat16", address=32))
        host.match_aligned(tensor("x", [1, 8], strides=[9, 1], dtype="bfloat16", address=32))
        pinned = """\
argument 'x' does not match
  expected  [*, *]  any       cpu  strides [*, 1]
  got       [3, 8]  bfloat16  cpu  strides [9, 1]
  its data or a stride is not aligned to 16 bytes
  at host_tests.cpp:LINE"""
        assert error(host.match_aligned, tensor("x", [3, 8], strides=[9, 1], dtype="bfloat16", address=32)) == pinned
        odd_offset = tensor("x", [3, 8], strides=[9, 1], dtype="bfloat16", address=34)
        assert error(host.match_aligned, odd_offset) == pinned

    def test_a_symbol_without_a_value(self, host: ModuleType) -> None:
        assert_expected_inline(
            error(host.unwrap_unbound),
            """\
the size 'hidden' was read before a tensor gave it a value
  at host_tests.cpp:LINE""",
        )
        assert_expected_inline(
            error(host.unwrap_unbound_dtype),
            """\
a symbol was read before a tensor gave it a value
  at host_tests.cpp:LINE""",
        )


class TestChecks:
    def test_values_in_the_text(self, host: ModuleType) -> None:
        assert_expected_inline(
            error(host.check_values, -5, 0.1, True, "text", [1, -2]),
            """\
-5 0.1 true text [1, -2]
  at host_tests.cpp:LINE""",
        )

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (0.0, "0"),
            (1.0, "1"),
            (-0.001, "-0.001"),
            (2.5e-5, "0.000025"),
            (1e-6, "1e-6"),
            (1e-7, "1e-7"),
            (3.14159265, "3.14159"),
            (99999.95, "100000"),
            (1e300, "1e300"),
            (5e-324, "4.94066e-324"),
            (float("inf"), "inf"),
            (float("-inf"), "-inf"),
            (float("nan"), "nan"),
        ],
    )
    def test_numbers(self, host: ModuleType, value: float, text: str) -> None:
        assert error(host.check_values, 0, value, False, "", []) == f"0 {text} false  []\n  at host_tests.cpp:LINE"

    def test_integers_to_their_limits(self, host: ModuleType) -> None:
        assert_expected_inline(
            error(host.check_limits),
            """\
-9223372036854775808 9223372036854775807 18446744073709551615 -128 (null)
  at host_tests.cpp:LINE""",
        )

    def test_without_text(self, host: ModuleType) -> None:
        host.check_without_text(False)
        assert_expected_inline(
            error(host.check_without_text, True),
            """\
a check failed
  at host_tests.cpp:LINE""",
        )

    def test_panic(self, host: ModuleType) -> None:
        assert_expected_inline(
            error(host.panic_with_values, 100),
            """\
unsupported head_dim 100
  at host_tests.cpp:LINE""",
        )

    def test_a_text_beyond_the_capacity_is_cut(self, host: ModuleType) -> None:
        text = error(host.check_long, "x" * 5000)
        assert text == "x" * 3072

    def test_irange_and_div_ceil(self, host: ModuleType) -> None:
        assert host.count_to(3) == [0, 1, 2]
        assert host.count_to(0) == host.count_to(-1) == host.count(3, 1) == []
        assert host.count(-1, 2) == [-1, 0, 1]
        for a, b in [(0, 5), (1, 5), (5, 5), (6, 5), (2**63 - 1, 2), (2**63 - 1, 2**63 - 1)]:
            assert host.div_ceil(a, b) == -(-a // b)


class TestFastDivisor:
    """Against Python's integers: every pair of the edges, and random pairs of random widths."""

    EDGES = sorted(
        {
            value
            for power in (0, 1, 2, 8, 15, 16, 31, 32, 33, 39, 40, 41, 63, 64)
            for value in (2**power - 1, 2**power, 2**power + 1)
        }
        | {3, 5, 6, 7, 10, 11, 127, 641, 4096, 14336, 2**32 // 3, 2**64 // 3, 2**64 // 5, 6700417, 2**64 - 59}
    )

    def numerators(self, divisor: int, below: int, random_: random.Random) -> list[int]:
        near = [q * divisor + r for q in (0, 1, 2, 3, (below - 1) // divisor, (below - 1) // divisor // 2) for r in (-1, 0, 1)]
        wide = [random_.getrandbits(random_.randint(1, below.bit_length())) for _ in range(20)]
        return [n for n in {*self.EDGES, *near, *wide, below - 1} if 0 <= n < below]

    @pytest.mark.parametrize(("function", "bits"), [("u64", 64), ("i64", 63), ("u32", 32), ("i32", 31), ("u8", 8)])
    def test_exact(self, host: ModuleType, function: str, bits: int) -> None:
        divide = getattr(host, f"divide_{function}")
        random_ = random.Random(bits)
        divisors = [d for d in self.EDGES if 0 < d < 2**64] + [
            random_.getrandbits(random_.randint(1, 64)) or 1 for _ in range(500)
        ]
        for divisor in divisors:
            numerators = self.numerators(divisor, 2**bits, random_)
            assert divide(divisor, numerators) == [divmod(n, divisor) for n in numerators], f"divisor {divisor}"

    def test_the_divisor_of_an_empty_tensor_can_be_made(self, host: ModuleType) -> None:
        assert host.divide_u32(0, []) == []
