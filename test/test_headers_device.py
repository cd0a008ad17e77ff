"""The device half of ``include/jitk``: every header by itself, the PTX that comes out, and what it computes.

The tests above ``needs_gpu`` need nvcc and no GPU. ``headers/device_tests.cu`` is compiled with the flags that PyTorch's
``cpp_extension`` gives to nvcc, which switch the operators of the half types off. Expected values are exact: Python's integers
and fractions, rounded once.
"""

from __future__ import annotations

import ctypes
import math
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from torch_jit_ops.backends.cuda import CUDA

ROOT = Path(__file__).resolve().parent.parent
INCLUDE = ROOT / "include"
SOURCE = ROOT / "test/headers/device_tests.cu"
TORCH_FLAGS = [
    "-D__CUDA_NO_HALF_OPERATORS__",
    "-D__CUDA_NO_HALF_CONVERSIONS__",
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-D__CUDA_NO_HALF2_OPERATORS__",
    "--expt-relaxed-constexpr",
]
# Before griddepcontrol, with it, and with vectors of 32 bytes.
ARCHITECTURES = ["80", "90a", "100a"]


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")


NVCC = find_nvcc()
pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc: neither $CUDA_HOME/bin nor PATH has it")


def nvcc(architecture: str, *arguments: str) -> subprocess.CompletedProcess:
    numbers = architecture.rstrip("af")
    command = [str(NVCC), f"-gencode=arch=compute_{architecture},code=sm_{architecture}", f"-DJITK_CUDA_ARCH={numbers}0"]
    command += [f"-I{INCLUDE}", "-Werror", "all-warnings", *TORCH_FLAGS, *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def compile_all(jobs: list[tuple[str, ...]]) -> str:
    """What failed of the nvcc calls, empty if nothing did."""
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        done = list(pool.map(lambda job: nvcc(*job), jobs))
    return "\n".join(run.stdout + run.stderr for run in done if run.returncode != 0)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("device")


@pytest.fixture(scope="session")
def ptx(folder: Path) -> dict[str, dict[str, str]]:
    """For each architecture, the instructions of each kernel by its name."""
    jobs = [(a, "-ptx", "-O3", "-std=c++17", str(SOURCE), "-o", str(folder / f"{a}.ptx")) for a in ARCHITECTURES]
    failed = compile_all(jobs)
    assert not failed, failed
    kernels = {}
    for architecture in ARCHITECTURES:
        text = (folder / f"{architecture}.ptx").read_text()
        kernels[architecture] = dict(re.findall(r"\.entry (\w+)\(.*?\)\n.*?^\{(.*?)^\}", text, re.DOTALL | re.MULTILINE))
    return kernels


def test_every_header_compiles_alone(folder: Path) -> None:
    device = [f"jitk/{header.name}" for header in sorted((INCLUDE / "jitk").glob("*.cuh"))]
    # simd.h is in the host compiler's vector types, which nvcc does not have.
    everything = [f"jitk/{header.name}" for header in sorted((INCLUDE / "jitk").glob("*.*h")) if header.name != "simd.h"]
    of_kernels = [header.name for header in sorted((ROOT / "csrc").glob("*.cuh"))]
    jobs = []
    # C++20 once for all: what it breaks does not depend on what was included before.
    alone = [([name], "c++17") for name in (*device, *of_kernels)]
    for names, standard in [*alone, (everything, "c++17"), (everything + of_kernels, "c++20")]:
        source = folder / f"headers{len(jobs)}.cu"
        source.write_text("".join(f"#include <{name}>\n" for name in names))
        jobs.append(("90a", f"-I{ROOT / 'csrc'}", "-ptx", f"-std={standard}", str(source), "-o", f"{source}.ptx"))
    failed = compile_all(jobs)
    assert not failed, failed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-UJITK_CUDA_ARCH"], "JITK_CUDA_ARCH is not defined: compile with -DJITK_CUDA_ARCH=900"),
        (["-UJITK_CUDA_ARCH", "-DJITK_CUDA_ARCH=90"], "JITK_CUDA_ARCH is spelled as __CUDA_ARCH__ is"),
        (["-UJITK_CUDA_ARCH", "-DJITK_CUDA_ARCH=800"], "JITK_CUDA_ARCH is not the architecture of -gencode"),
    ],
)
def test_the_architecture_must_be_injected(folder: Path, flags: list[str], message: str) -> None:
    source = folder / "arch.cu"
    source.write_text("#include <jitk/arch.cuh>\n")
    result = nvcc("90a", *flags, "-ptx", "-std=c++17", str(source), "-o", str(folder / "arch.ptx"))
    assert result.returncode != 0
    assert message in result.stdout + result.stderr


def test_a_unit_reads_no_special_functions(folder: Path) -> None:
    """They come with nvcc's own <cmath>, and cost more than all of our headers."""
    source = folder / "nothing.cu"
    source.write_text("#include <jitk/vec.cuh>\n__global__ void nothing(float* x) { *x = j0f(*x) + sqrtf(*x); }\n")
    flags = (*CUDA.flags, "-std=c++17", *CUDA.arch_flags("9.0a"))
    command = [str(NVCC), f"-I{INCLUDE}", *flags, str(source)]
    read = subprocess.run([*command, "-M"], check=True, capture_output=True, text=True).stdout
    assert "/cmath" in read and "tr1/" not in read
    compiled = subprocess.run([*command, "-ptx", "-o", f"{source}.ptx"], check=False, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr


def test_the_kernels_assemble(folder: Path, ptx: dict[str, dict[str, str]]) -> None:
    failed = compile_all([(a, "-cubin", str(folder / f"{a}.ptx"), "-o", str(folder / f"{a}.cubin")) for a in ARCHITECTURES])
    assert not failed, failed


def moves(kernel: str) -> list[str]:
    """The distinct accesses of global memory in a kernel."""
    return sorted(set(re.findall(r"(?:ld|st)\.global[\w.:]*", kernel)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_vector_is_one_instruction(ptx: dict[str, dict[str, str]], architecture: str) -> None:
    kernels = ptx[architecture]
    widest = "v8" if architecture == "100a" else "v4"
    widths = {"1": "u8", "2": "u16", "4": "u32", "8": "v2.u32", "16": "v4.u32", "widest": f"{widest}.u32"}
    widths |= {
        "16_of_1": "v4.u32",
        "16_of_4": "v4.u32",
        "16_of_8": "v4.u32",
        "16_of_16": "v4.u32",
        "widest_of_8": f"{widest}.u32",
    }
    for name, width in widths.items():
        assert moves(kernels[f"copy_{name}"]) == [f"ld.global.nc.{width}", f"st.global.{width}"], name
        streamed = width.replace("v8.u32", "v8.b32")
        assert moves(kernels[f"stream_{name}"]) == [f"ld.global.L1::no_allocate.{streamed}", f"st.global.cs.{streamed}"], name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dependent_launch_is_there_from_hopper_on(ptx: dict[str, dict[str, str]], architecture: str) -> None:
    found = {
        name: re.findall(r"griddepcontrol\.\w+", text) for name, text in ptx[architecture].items() if "griddepcontrol" in text
    }
    hopper = {"pdl_producer": ["griddepcontrol.launch_dependents"], "pdl_consumer": ["griddepcontrol.wait"]}
    assert found == ({} if architecture == "80" else hopper)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_division_where_none_is_needed(ptx: dict[str, dict[str, str]], architecture: str) -> None:
    for name, text in ptx[architecture].items():
        if "divide" in name:
            assert not re.search(r"\b(?:div|rem)\.[us]", text), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reductions_of_a_warp_in_hardware(ptx: dict[str, dict[str, str]], architecture: str) -> None:
    kernels = {
        name: re.findall(r"redux\.sync\.[\w.]+", text) for name, text in ptx[architecture].items() if "warp_reduce" in name
    }
    whole_int = next(found for name, found in kernels.items() if "IiLj32ELj1E" in name)
    whole_float = next(found for name, found in kernels.items() if "IfLj32ELj1E" in name)
    assert sorted(whole_int) == ["redux.sync.add.s32", "redux.sync.max.s32", "redux.sync.min.s32"]
    assert sorted(whole_float) == (["redux.sync.max.f32", "redux.sync.min.f32"] if architecture == "100a" else [])


# What follows runs on the GPU.

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

ELEMENTS = {
    "fp32_t": torch.float32,
    "fp16_t": torch.float16,
    "bf16_t": torch.bfloat16,
    "fp64_t": torch.float64,
    "bool": torch.bool,
    "int8_t": torch.int8,
    "uint8_t": torch.uint8,
    "int16_t": torch.int16,
    "int32_t": torch.int32,
    "uint32_t": torch.uint32,
    "int64_t": torch.int64,
    "uint64_t": torch.uint64,
    "fp8_e4m3_t": torch.float8_e4m3fn,
    "fp8_e5m2_t": torch.float8_e5m2,
}
# In the order of the outputs of `casts` and `casts_of_pairs`.
CAST_TO = ["fp32_t", "fp16_t", "bf16_t", "fp64_t", "int32_t", "int64_t", "fp8_e4m3_t", "fp8_e5m2_t"]
PAIRS = {
    "fp32x2_t": "fp32_t",
    "fp16x2_t": "fp16_t",
    "bf16x2_t": "bf16_t",
    "fp8x2_e4m3_t": "fp8_e4m3_t",
    "fp8x2_e5m2_t": "fp8_e5m2_t",
}
# Bits of the significand, exponent of the smallest normal number, largest number, and what lies beyond.
FORMATS = {
    "fp64_t": (53, -1022, Fraction(2**53 - 1) * 2**971, math.inf),
    "fp32_t": (24, -126, Fraction(2**24 - 1) * 2**104, math.inf),
    "fp16_t": (11, -14, Fraction(65504), math.inf),
    "bf16_t": (8, -126, Fraction(2**8 - 1) * 2**120, math.inf),
    "fp8_e4m3_t": (4, -6, Fraction(448), 448.0),
    "fp8_e5m2_t": (3, -14, Fraction(57344), 57344.0),
}


def rounded(value: float, to: str) -> float:
    """The number of the format that is nearest to the value, ties to even."""
    precision, smallest, largest, beyond = FORMATS[to]
    if isinstance(value, float) and (math.isnan(value) or value == 0):
        return value
    if isinstance(value, float) and math.isinf(value):
        return math.copysign(beyond, value)
    exact = Fraction(value)
    if exact == 0:
        return 0.0
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > size
    quantum = Fraction(2) ** (max(exponent, smallest) - precision + 1)
    result = round(exact / quantum) * quantum
    return math.copysign(beyond, value) if abs(result) > largest else math.copysign(float(result), value)


def same(actual: float, expected: float) -> bool:
    if math.isnan(expected):
        return math.isnan(actual)
    return actual == expected and math.copysign(1, actual) == math.copysign(1, expected)


def check_cast(actual: list[Any], sources: list[Any], to: str, element: str) -> None:
    wrong = []
    for got, source in zip(actual, sources, strict=True):
        if to in ("int32_t", "int64_t"):
            bits = 31 if to == "int32_t" else 63
            if (isinstance(source, float) and not math.isfinite(source)) or not -(2**bits) <= int(source) < 2**bits:
                continue  # C++ leaves it open
            fits = got == int(source)
            expected: Any = int(source)
        else:
            expected = source if to == element else rounded(source, to)
            fits = same(got, expected)
        if not fits:
            wrong.append((source, got, expected))
    assert not wrong, f"{len(wrong)} of {len(actual)} to {to}: (from, got, expected) {wrong[:5]}"


def cast_sources(element: str) -> torch.Tensor:
    """Every value where there are few; else random bits, and what lies beside the middle of two numbers of a smaller format."""
    dtype = ELEMENTS[element]
    random_ = random.Random(element)
    if element == "bool":
        return torch.tensor([False, True])
    if dtype.itemsize == 1:
        return torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)
    if dtype.itemsize == 2:
        return torch.arange(-32768, 32768, 13, dtype=torch.int32).to(torch.int16).view(dtype)
    ties = [2**high + 2**low + near for high in range(63) for low in (0, high - 3, high - 4, high - 8, high - 11, high - 24)
            if 0 <= low < high for near in (-1, 0, 1)]  # fmt: skip
    if not dtype.is_floating_point:
        signed = dtype in (torch.int32, torch.int64)
        bits = dtype.itemsize * 8 - signed
        values = [0, 1, 2**bits - 1] + [v for v in ties if v < 2**bits] + [random_.getrandbits(bits) for _ in range(500)]
        return torch.tensor(values + [-v for v in values if signed], dtype=dtype)
    fractions = [math.ldexp(v, shift) for v in ties for shift in (0, -60, -90, -160)]
    tiny = [math.ldexp(1 + near * 2.0**-20, -power) for power in range(1, 150) for near in (-1, 0, 1)]
    special = [0.0, math.inf, math.nan, 448.0, 464.0, 465.0, 480.0, 57344.0, 61440.0, 65504.0, 65519.0, 65520.0, 3.39e38]
    values = torch.tensor(fractions + tiny + special, dtype=torch.float64).to(dtype)
    bits_dtype = torch.int32 if dtype.itemsize == 4 else torch.int64
    noise = torch.tensor([random_.getrandbits(8 * dtype.itemsize - 1) for _ in range(1000)], dtype=bits_dtype).view(dtype)
    return torch.cat([values, -values, noise, -noise])


Run = Callable[..., None]


@pytest.fixture(scope="session")
def run(folder: Path) -> Run:
    """Calls a case of ``device_tests.cu``: ``run("casts bf16_t", [input, *outputs], count)``; raises what CUDA reports."""
    major, minor = torch.cuda.get_device_capability()
    architecture = f"{major}{minor}" + ("a" if major >= 9 else "")
    library = folder / "device_tests.so"
    flags = ("-shared", "-O3", "-std=c++17", "-Xcompiler", "-fPIC,-Wall,-Wextra", str(SOURCE), "-o", str(library))
    result = nvcc(architecture, *flags)
    assert result.returncode == 0, result.stdout + result.stderr
    function = ctypes.CDLL(str(library)).jitk_test
    function.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

    def call(name: str, buffers: list[torch.Tensor], count: int, extra: int = 0) -> None:
        torch.cuda.synchronize()
        pointers = (ctypes.c_void_p * len(buffers))(*(buffer.data_ptr() for buffer in buffers))
        status = function(name.encode(), pointers, len(buffers), count, extra)
        assert status == 0, f"{name}: cudaError_t {status}"

    return call


def poisoned(shape: tuple[int, ...] | int, dtype: torch.dtype) -> torch.Tensor:
    """Memory that no kernel has written: every byte is 0xA5."""
    size = (shape,) if isinstance(shape, int) else shape
    return torch.full((*size[:-1], size[-1] * dtype.itemsize), 0xA5, dtype=torch.uint8, device="cuda").view(dtype)


def listed(tensor: torch.Tensor) -> list[Any]:
    values = tensor.cpu()
    return values.double().tolist() if values.dtype.is_floating_point else values.tolist()


def test_what_a_launcher_calls(folder: Path) -> None:
    flags = ("-shared", "-std=c++20", "-Xcompiler", "-fPIC,-Wall,-Wextra", str(SOURCE), "-o", str(folder / "linked.so"))
    result = nvcc("90a", *flags)
    assert result.returncode == 0, result.stdout + result.stderr
    library = ctypes.CDLL(str(folder / "linked.so"))

    widest = library.jitk_widest_vector
    widest.argtypes, widest.restype = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64], ctypes.c_uint32
    assert widest(32, 24, 8) == widest(32, -24, 8) == widest(0, 0, 0) == 8
    # A place off by one half, by a pair, by four.
    for off, expected in ((1, 1), (2, 2), (4, 2)):
        places = (32 + 2 * off, 24, 8), (32, 24 + off, 8), (32, -24 - off, 8), (32, 24, 8 + off)
        assert [widest(*place) for place in places] == [expected] * 4
    for name, address, expected in (
        ("bytes", 16, 16),
        ("bytes", 4, 4),
        ("bytes", 2, 1),
        ("doubles", 16, 2),
        ("doubles", 8, 1),
    ):
        function = getattr(library, f"jitk_widest_vector_of_{name}")
        function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_uint32
        assert function(address) == expected, (name, address)

    at_end, after_wait, before_wait = range(3)
    library.jitk_trigger.argtypes = [ctypes.c_int64] * 3
    assert [library.jitk_trigger(n, 0, 132) for n in (1, 132 * 2048, 132 * 2048 + 1)] == [after_wait, after_wait, at_end]
    assert [library.jitk_trigger(n, 256, 132) for n in (1, 132 * 32, 132 * 32 + 1)] == [before_wait, before_wait, after_wait]
    assert library.jitk_trigger(1, 288, 132) == after_wait
    assert library.jitk_trigger(2**40, 256, 132) == at_end

    library.jitk_offset.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64]
    library.jitk_offset.restype = ctypes.c_void_p
    assert library.jitk_offset(1 << 40, -1, 2**31) == (1 << 40) + 4 * (2**31 - 1)


@needs_gpu
@pytest.mark.parametrize("element", ELEMENTS)
def test_casts_round_once(run: Run, element: str) -> None:
    source = cast_sources(element)
    outputs = [poisoned(len(source), ELEMENTS[to]) for to in CAST_TO]
    run(f"casts {element}", [source.cuda(), *outputs], len(source))
    for to, output in zip(CAST_TO, outputs, strict=True):
        check_cast(listed(output), listed(source), to, element)


@needs_gpu
@pytest.mark.parametrize("pair", PAIRS)
def test_casts_of_pairs_round_once(run: Run, pair: str) -> None:
    source = cast_sources(PAIRS[pair])
    source = source[: len(source) // 2 * 2]
    outputs = [poisoned(len(source), ELEMENTS[to]) for to in PAIRS.values()]
    run(f"casts_of_pairs {pair}", [source.cuda(), *outputs], len(source) // 2)
    for to, output in zip(PAIRS.values(), outputs, strict=True):
        check_cast(listed(output), listed(source), to, PAIRS[pair])


@needs_gpu
def test_casts_of_powers_are_pytorchs(run: Run) -> None:
    source = torch.cat([cast_sources("fp32_t"), 1.5 * 2.0 ** torch.arange(-130, 128)])
    powers, back = poisoned(len(source), torch.float8_e8m0fnu), poisoned(len(source), torch.float32)
    run("casts_of_e8m0", [source.cuda(), powers, back], len(source))
    expected = source.to(torch.float8_e8m0fnu)
    assert torch.equal(powers.cpu().view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(back.cpu().nan_to_num(-1.0), expected.float().nan_to_num(-1.0))


@needs_gpu
def test_casts_of_quads_round_once(run: Run) -> None:
    source = cast_sources("fp32_t")
    source = source[: len(source) // 4 * 4]
    packed = [poisoned(len(source), ELEMENTS[to]) for to in ("fp8_e4m3_t", "fp8_e5m2_t")]
    widened = [poisoned(len(source), torch.float32) for _ in range(2)]
    run("casts_of_quads", [source.cuda(), *packed, *widened], len(source) // 4)
    for to, output, back in zip(("fp8_e4m3_t", "fp8_e5m2_t"), packed, widened, strict=True):
        check_cast(listed(output), listed(source), to, "fp32_t")
        assert torch.equal(output.float().nan_to_num(-1.0), back.nan_to_num(-1.0))


@needs_gpu
@pytest.mark.parametrize("pair", ["fp16x2_t", "bf16x2_t"])
def test_arithmetic_of_pairs(run: Run, pair: str) -> None:
    dtype = ELEMENTS[PAIRS[pair]]
    torch.manual_seed(0)
    x, y = (torch.randn(512, device="cuda").to(dtype) for _ in range(2))
    x[0], y[1] = math.nan, math.nan
    outputs = [poisoned(512, dtype) for _ in range(5)]
    run(f"pair_arithmetic {pair}", [x, y, *outputs], 256)
    largest, smallest, absolute, total, swapped = outputs
    assert torch.equal(largest, torch.fmax(x, y))
    assert torch.equal(smallest, torch.fmin(x, y))
    assert torch.equal(absolute[1:], x[1:].abs())
    assert torch.equal(total[2:], (x.float() + y.float()).to(dtype)[2:])
    assert torch.equal(swapped.view(torch.int16), x.view(-1, 2).flip(1).reshape(-1).view(torch.int16))


@needs_gpu
@pytest.mark.parametrize("how", ["copy", "stream"])
@pytest.mark.parametrize(
    "name", ["1", "2", "4", "8", "16", "16_of_1", "16_of_4", "16_of_8", "16_of_16", "widest", "widest_of_8"]
)
def test_vectors(run: Run, how: str, name: str) -> None:
    widest = 32 if torch.cuda.get_device_capability()[0] >= 10 else 16
    width = widest if name.startswith("widest") else int(name.split("_")[0])
    source = torch.randint(0, 256, (1000, width), dtype=torch.uint8, device="cuda")
    output = poisoned((1000, width), torch.uint8)
    run(f"{how} {name}", [source, output], 1000)
    assert torch.equal(output, source.flip(0))


@needs_gpu
def test_fill(run: Run) -> None:
    source = torch.randn(100, device="cuda").bfloat16()
    output = poisoned((100, 8), torch.bfloat16)
    run("fill", [source, output], 100)
    expected = source[:, None].repeat(1, 8)
    expected[:, 3] = -1
    assert torch.equal(output, expected)


def by_group(values: torch.Tensor, start: int, finish: int) -> torch.Tensor:
    """[count, ...] -> [groups, members of a group, same place in the group, ...] of reduce<start, finish>."""
    return values.reshape(-1, start // finish, finish, *values.shape[1:])


@needs_gpu
@pytest.mark.parametrize(
    ("element", "start", "finish"),
    [
        *[("fp32_t", *group) for group in ((32, 1), (8, 1), (32, 8), (2, 1), (1, 1))],
        *[("int32_t", 32, 1), ("int32_t", 16, 2), ("uint32_t", 32, 1), ("int8_t", 32, 1), ("uint8_t", 32, 1)],
        *[("int64_t", 32, 1), ("fp64_t", 32, 1), ("fp16_t", 32, 1), ("bf16_t", 4, 1), ("bf16x2_t", 32, 1), ("fp32x2_t", 32, 1)],
    ],
)
def test_warp_reductions(run: Run, element: str, start: int, finish: int) -> None:
    scalar = PAIRS.get(element, element)
    shape = (1024, 2) if element in PAIRS else (1024,)
    signed = not scalar.startswith("u")
    torch.manual_seed(start)
    # Small integers: their sums are exact in every type and order.
    values = torch.randint(-3 if signed else 0, 4, shape, dtype=torch.int64)
    if scalar == "int64_t":
        values *= 2**50 + 1
    source = values.to(ELEMENTS[scalar]).cuda()
    outputs = [poisoned(shape, ELEMENTS[scalar]) for _ in range(3)]
    run(f"warp_reduce {element} {start} {finish}", [source, *outputs], 1024)
    groups = by_group(values, start, finish)
    for output, expected in zip(outputs, (groups.sum(1), groups.amax(1), groups.amin(1)), strict=True):
        spread = expected.unsqueeze(1).expand_as(groups).reshape(shape)
        assert torch.equal(output.cpu().to(torch.int64), spread)


@needs_gpu
@pytest.mark.parametrize("start", [32, 8])
def test_warp_maximum_passes_over_nan(run: Run, start: int) -> None:
    source = torch.randn(1024, device="cuda")
    source[::3] = math.nan
    source[:64] = math.nan
    outputs = [poisoned(1024, torch.float32) for _ in range(3)]
    run(f"warp_reduce fp32_t {start} 1", [source, *outputs], 1024)
    groups = by_group(source, start, 1).squeeze(-1)
    largest = groups.nan_to_num(-math.inf).amax(1, keepdim=True).expand_as(groups).reshape(-1)
    smallest = groups.nan_to_num(math.inf).amin(1, keepdim=True).expand_as(groups).reshape(-1)
    assert outputs[1][:64].isnan().all() and outputs[2][:64].isnan().all()
    assert torch.equal(outputs[1][64:], largest[64:])
    assert torch.equal(outputs[2][64:], smallest[64:])


@needs_gpu
def test_a_warp_that_is_not_whole(run: Run) -> None:
    source = torch.arange(256, dtype=torch.float32, device="cuda")
    output = torch.full((256,), -1.0, device="cuda")
    run("warp_reduce_masked", [source, output], 256)
    sums = source.view(-1, 8).sum(1, keepdim=True).expand(-1, 8).reshape(-1, 32).clone()
    sums[:, 24:] = -1
    assert torch.equal(output.view(-1, 32), sums)


@needs_gpu
@pytest.mark.parametrize(("element", "width"), [("fp32_t", 32), ("int32_t", 32), ("int64_t", 8)])
def test_warp_scans(run: Run, element: str, width: int) -> None:
    torch.manual_seed(0)
    values = torch.randint(-100, 100, (1024,))
    source = values.to(ELEMENTS[element]).cuda()
    outputs = [poisoned(1024, ELEMENTS[element]) for _ in range(2)] + [poisoned(1024, torch.int32)]
    run(f"warp_scan {element} {width}", [source, *outputs], 1024)
    groups = values.view(-1, width)
    lanes = torch.arange(width).expand_as(groups)
    for output, wanted in zip(outputs, (groups.cumsum(1), groups.cumsum(1), lanes), strict=True):
        assert torch.equal(output.cpu().to(torch.int64).view(-1, width), wanted)


# The size of a team, with blocks of 256 threads and clusters of 4 blocks; lanes are what log2 says.
TEAMS = [*(("lanes", 1 << log2, log2) for log2 in range(6)), ("warp", 32, 5), ("block", 256, 5), ("cluster", 1024, 5)]


def skip_without_clusters(team: str) -> None:
    if team == "cluster" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("clusters are there from Hopper on")


@needs_gpu
@pytest.mark.parametrize(("team", "size", "lanes_log2"), TEAMS)
def test_teams_reduce(run: Run, team: str, size: int, lanes_log2: int) -> None:
    skip_without_clusters(team)
    count = 64 * 1024
    torch.manual_seed(size)
    values = torch.randint(-100, 100, (count,))
    total, index, rank, sizes = (poisoned(count, dtype) for dtype in (torch.float32, torch.int64, torch.int32, torch.int32))
    extremes = poisoned((count, 2), torch.float32)
    run(f"team_reduce {team}", [values.float().cuda(), total, extremes, index, rank, sizes], count, lanes_log2)
    groups = values.view(-1, size)
    both = torch.stack([groups.amax(1), -groups.amin(1)], -1)
    teams = torch.arange(len(groups))
    assert torch.equal(total.cpu().long().view(-1, size), groups.sum(1, keepdim=True).expand_as(groups))
    assert torch.equal(extremes.cpu().long().view(-1, size, 2), both[:, None].expand(-1, size, 2))
    assert torch.equal(index.cpu().view(-1, size), teams[:, None].expand_as(groups))
    assert torch.equal(rank.cpu().long().view(-1, size), torch.arange(size).expand_as(groups))
    assert (sizes == size).all()


@needs_gpu
@pytest.mark.parametrize("team", ["lanes 4", "block 2", "block 0", "cluster 2"])
@pytest.mark.parametrize("part", [1.0, 0.37])
def test_a_row_is_shared_out_once(run: Run, team: str, part: float) -> None:
    skip_without_clusters(team.split()[0])
    size, items = {"lanes": 8, "block": 256, "cluster": 1024}[team.split()[0]], int(team.split()[1])
    width = int(size * (items or 7) * part)
    blocks = 4
    rows = blocks * 256 // size
    marks = torch.zeros(rows, width, dtype=torch.int32, device="cuda")
    run(f"team_share {team}", [marks], width, blocks)
    assert (marks == 1).all(), "a vector without a thread, or with two"


@needs_gpu
@pytest.mark.parametrize(
    ("element", "named", "threads"),
    [
        *[("fp32_t", str(threads), threads) for threads in (32, 64, 96, 256, 992, 1024)],
        *[("fp32_t", "cta::kBlockDim", threads) for threads in (32, 64, 224, 1024)],
        *[("int32_t", "160", 160), ("int64_t", "1024", 1024), ("bf16_t", "256", 256)],
    ],
)
def test_block_reductions_share_a_buffer(run: Run, element: str, named: str, threads: int) -> None:
    blocks = 500
    torch.manual_seed(threads)
    low, high = (0, 2) if element == "bf16_t" else (-100, 100)
    values = torch.randint(low, high, (blocks, threads))
    source = values.to(ELEMENTS[element]).cuda()
    outputs = [poisoned((blocks, threads), ELEMENTS[element]) for _ in range(5)]
    run(f"cta_reduce {element} {named}", [source, *outputs], blocks * threads, threads)
    total, largest, smallest = (values.sum(1), values.amax(1), values.amin(1))
    for output, expected in zip(outputs, (total, largest, smallest, total, largest), strict=True):
        assert torch.equal(output.cpu().to(torch.int64), expected[:, None].expand_as(values))


@needs_gpu
def test_functions(run: Run) -> None:
    x = torch.cat([torch.linspace(-80, 80, 4001), torch.logspace(-30, 1, 500), -torch.logspace(-30, 1, 500)]).cuda()
    outputs = [poisoned(len(x), torch.float32) for _ in range(4)]
    run("functions", [x, *outputs], len(x))
    y = x.double()
    ulp = 2.0**-23
    exact, fast = 6 * ulp, (8 + 3 * y.abs()) * ulp  # relative
    expected = [
        ("sigmoid_fast", 1 / (1 + torch.exp(-y)), fast),
        ("exp2_fast", torch.exp(y), fast),
        ("rsqrt", y.abs().rsqrt(), exact),
        ("reciprocal_fast", y.reciprocal(), exact),
    ]
    for (name, wanted, relative), output in zip(expected, outputs, strict=True):
        ok = ((output.double() - wanted).abs() <= relative * wanted.abs()) | (output == wanted)
        assert ok.all(), f"{name}: at {x[~ok][:3].tolist()} got {output[~ok][:3].tolist()}, expected {wanted[~ok][:3].tolist()}"


@needs_gpu
def test_sigmoid_at_the_ends(run: Run) -> None:
    x = torch.tensor([-math.inf, -200.0, -88.8, 88.8, 200.0, math.inf], device="cuda")
    outputs = [poisoned(len(x), torch.float32) for _ in range(4)]
    run("functions", [x, *outputs], len(x))
    sigmoid = outputs[0].tolist()
    assert sigmoid[:2] == [0.0, 0.0] and 0 <= sigmoid[2] < 1e-37 and sigmoid[3:] == [1.0, 1.0, 1.0]


@needs_gpu
@pytest.mark.parametrize(("element", "bits"), [("int64_t", 63), ("uint32_t", 32), ("int32_t", 31)])
@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 641, 4096, 14336, 2**31 - 1, 2**32 - 1, 2**32 + 1, 2**40 - 87, 2**62 + 1])
def test_fast_division(run: Run, element: str, bits: int, divisor: int) -> None:
    random_ = random.Random(divisor)
    near = [q * divisor + r for q in (1, 2, 3, 2**bits // divisor) for r in (-1, 0, 1)]
    values = [0, 1, 2**bits - 1, *near, *(random_.getrandbits(random_.randint(1, bits)) for _ in range(300))]
    values = [n for n in values if 0 <= n < 2**bits]
    source = torch.tensor(values, dtype=ELEMENTS[element]).cuda()
    quotient, remainder = (poisoned(len(values), ELEMENTS[element]) for _ in range(2))
    run(f"divide {element}", [source, quotient, remainder], len(values), divisor)
    assert list(zip(quotient.tolist(), remainder.tolist(), strict=True)) == [divmod(n, divisor) for n in values]


@needs_gpu
def test_a_dependent_kernel_sees_what_the_first_wrote(run: Run) -> None:
    count = 64 * 256
    for _ in range(5):
        data, output = poisoned(count, torch.float32), poisoned(count, torch.float32)
        run("pdl", [data, output], count)
        assert torch.equal(output, torch.arange(count, dtype=torch.float32, device="cuda"))
