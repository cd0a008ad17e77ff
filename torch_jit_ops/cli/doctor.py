"""Check everything that compiling kernels needs, and say how to get what is missing.

Nothing is changed. A small kernel is really compiled and loaded, and called where there is a GPU for it, for each backend that
should work here. Exit code 1 if something that should work does not.

examples:
  python -m torch_jit_ops doctor
  python -m torch_jit_ops doctor --json | jq '.[] | select(.state == "problem")'
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from torch_jit_ops import environment
from torch_jit_ops.backends import CPU, CUDA, MissingCompiler, programs
from torch_jit_ops.builder import compiler_jobs, compilers
from torch_jit_ops.builder.load import load
from torch_jit_ops.builder.unit import Unit
from torch_jit_ops.cli import screen
from torch_jit_ops.store import files
from torch_jit_ops.store.search_path import default_store, search_path
from torch_jit_ops.store.store import Store

_OLDEST_TORCH = (2, 11)
_OLDEST_GCC = 11
_OLDEST_NVCC = (12, 1)
_LITTLE_SPACE = 1 << 30
_ANSWER = 42
_CPU_KERNEL = """
#include <jitk/tensor.h>
extern "C" __attribute__((visibility("default"))) int jitk_doctor() { return 42; }
"""
_CUDA_KERNEL = """
#include <jitk/tensor.h>
__global__ void answer(int* to) { *to = 42; }
extern "C" __attribute__((visibility("default"))) int jitk_doctor() {
  int* there = nullptr;
  int here = 0;
  if (cudaMalloc(&there, sizeof(int)) != cudaSuccess) return -1;
  answer<<<1, 1>>>(there);
  cudaMemcpy(&here, there, sizeof(int), cudaMemcpyDeviceToHost);
  cudaFree(there);
  return here;
}
"""


@dataclass(frozen=True)
class Check:
    """What was looked at, what came out (``ok``, ``note`` or ``problem``), and what to do about it."""

    what: str
    state: str
    found: str
    remedy: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    found = [check for what, look in CHECKS.items() for check in _guarded(what, look)]
    problems = sum(check.state == "problem" for check in found)
    if options.json:
        print(json.dumps([asdict(check) for check in found], indent=1))
        return 1 if problems else 0
    table = screen.table("state", "what", "found")
    for check in found:
        text = check.found + (f"\nremedy: {check.remedy}" if check.remedy else "")
        table.add_row(check.state if check.state == "ok" else check.state.upper(), check.what, text)
    screen.show(table)
    print(f"\n{problems} problem{'s' * (problems > 1)}" if problems else "\neverything that should work here does")
    return 1 if problems else 0


def _guarded(what: str, look: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """A check that fails itself is a finding, not the end of all others."""
    try:
        yield from look()
    except (RuntimeError, OSError, ValueError) as error:
        yield _of_error(what, error)


def _of_error(what: str, error: Exception) -> Check:
    text, _, remedy = str(error).partition("\n  remedy: ")
    return Check(what, "problem", text, remedy)


def _python() -> Iterator[Check]:
    yield Check("Python", "ok", f"{sys.version.split()[0]}, {sys.executable}")


def _pytorch() -> Iterator[Check]:
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA: only CPU kernels"
    check = Check("PyTorch", "ok", f"{torch.__version__}, {cuda}")
    if tuple(map(int, torch.__version__.split(".")[:2])) < _OLDEST_TORCH:
        check = replace(check, state="problem", remedy="install PyTorch 2.11 or newer")
    yield check


def _settings() -> Iterator[Check]:
    known = set(re.findall(r"JITK_[A-Z_]+", Path(environment.__file__).read_text()))
    given = environment.given()
    for name in given:
        if name not in known and name != "JITK_FUZZ" and not name.startswith("JITK_TEST_"):  # those are the test suite's
            near = difflib.get_close_matches(name, sorted(known), n=1)
            remedy = f"did you mean {near[0]}?" if near else f"those that are read are {', '.join(sorted(known))}"
            yield Check("environment", "note", f"{name} is set, and nothing reads it", remedy)
    environment.verbosity(), environment.fallback_is_error()  # each refuses what it does not know
    if environment.cuda_arch() is not None:
        CUDA.check_arch(str(environment.cuda_arch()))
    yield Check("environment", "ok", " ".join(f"{name}={value}" for name, value in given.items()) or "no JITK_ variable is set")


def _cpp_compiler() -> Iterator[Check]:
    command = programs.host_command()
    identity = compilers.compiler_identity(command, Path(os.devnull))
    started = f", started as {' '.join(command)}" if len(command) > 1 else ""
    check = Check("C++ compiler", "ok", f"{identity}, {programs.host_compiler()}{started}")
    version = re.search(r"(\d+)\.\d+\.\d+\s*$", identity)
    if version is not None and "clang" not in identity and int(version[1]) < _OLDEST_GCC:
        check = replace(check, state="problem", remedy="install g++ 11 or newer, and set CXX to it")
    yield check


def _ninja() -> Iterator[Check]:
    program = programs.ninja()
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    yield Check("ninja", "ok", f"{said}, {program}")


def _cuda_compiler() -> Iterator[Check]:
    if not _cuda_should_work():
        return
    toolkit = CUDA.toolkit()
    identity = compilers.compiler_identity(toolkit.nvcc, Path(os.devnull))
    version = tuple(map(int, re.search(r"release (\d+)\.(\d+)", identity).groups()))  # type: ignore[union-attr]
    check = Check("nvcc", "ok", f"{version[0]}.{version[1]}, {toolkit.nvcc} (found by: {toolkit.found_by})")
    if version < _OLDEST_NVCC:
        check = replace(check, state="problem", remedy="install CUDA toolkit 12.1 or newer, and set CUDA_HOME to its folder")
    yield check


def _gpus() -> Iterator[Check]:
    if not _cuda_should_work():
        return
    listed = _nvidia_smi()
    if not torch.cuda.is_available():
        if listed:
            found = f"PyTorch cannot use {listed[0][0]}, whose driver is {listed[0][1]}"
            remedy = f"install a driver for CUDA {torch.version.cuda}, or a PyTorch built for an older CUDA"
            yield Check("GPU", "problem", found, remedy)
        else:
            yield Check("GPU", "note", "none here: kernels can be built for one, with build --arch")
        return
    known = _archs_of_nvcc()
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        driver = f", driver {listed[0][1]}" if listed else ""
        arch = CUDA.arch_of(index)
        check = Check("GPU", "ok", f"cuda:{index} {torch.cuda.get_device_name(index)}, kernels for {arch}{driver}")
        if known and f"sm_{major}{minor}" not in known:
            check = replace(
                check, state="problem", remedy=f"this nvcc does not know sm_{major}{minor}: install a newer CUDA toolkit"
            )
        yield check


def _nvidia_smi() -> list[list[str]]:
    """Name and driver of each GPU."""
    try:
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
        return [line.split(", ") for line in said.splitlines()]
    except (OSError, subprocess.SubprocessError):
        return []


def _archs_of_nvcc() -> list[str]:
    try:
        command: list[str | Path] = [CUDA.toolkit().nvcc, "--list-gpu-code"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (MissingCompiler, OSError, subprocess.SubprocessError):
        return []


def _cache() -> Iterator[Check]:
    *shared, store = search_path()
    for each in shared:
        if each.root.is_dir():
            yield from _shared(each)
        else:
            yield Check("cache", "note", f"{each.root} of JITK_CACHE_PATH is not there")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        shutil.rmtree(store.staging(), ignore_errors=True)
    if said:
        text, _, remedy = str(said[0].message).partition(". Set JITK")
        yield Check("cache", "problem", text, f"set JITK{remedy}")
        return
    free = shutil.disk_usage(store.root).free
    check = Check("cache", "ok", f"{store.root}, {screen.size(free)} free")
    if free < _LITTLE_SPACE:
        remedy = "python -m torch_jit_ops cache prune --max-size 100M, or set JITK_CACHE_DIR to a larger disk"
        check = replace(check, state="problem", remedy=remedy)
    yield check


def _shared(store: Store) -> Iterator[Check]:
    try:
        files.check(store.root)
    except (OSError, files.UntrustedCache) as error:
        yield _of_error("cache", error)
        return
    check = Check("cache", "ok", f"{store.root}, searched first and never written")
    if not store.runs_programs():
        found = f"{check.found}, from which no program can be run (noexec): kernels are copied in every process"
        check = replace(check, state="note", found=found)
    yield check


def _machine() -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0))
    jobs = compiler_jobs.compiler_jobs()
    yield Check("machine", "ok", f"{cores} cores, {CPU.arch_of()}; build runs {jobs} compilers at a time")


def _compiling() -> Iterator[Check]:
    # It warns at its import that there is no GPU, which was said above.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with contextlib.suppress(MissingCompiler):
        programs.host_compiler()
        yield _try(Unit("doctor", "a CPU kernel", CPU, CPU.arch_of(), _CPU_KERNEL), call=True)
        if _cuda_should_work():
            CUDA.toolkit()
            here = torch.cuda.is_available()
            arch = CUDA.arch_of(0) if here else environment.cuda_arch() or "9.0a"
            yield _try(Unit("doctor", "a CUDA kernel", CUDA, arch, _CUDA_KERNEL), call=here)


def _cuda_should_work() -> bool:
    return torch.version.cuda is not None


def _try(unit: Unit, *, call: bool) -> Check:
    what = f"compiling for {unit.backend.name}"
    start = time.monotonic()
    try:
        with _empty_store():
            library = load(unit).library
    except (RuntimeError, OSError) as error:
        return _of_error(what, error)
    took = f"{unit.label} for {unit.arch} in {time.monotonic() - start:.1f} s"
    if not call:
        return Check(what, "ok", f"{took}; there is no GPU to run it")
    answer = library.jitk_doctor()
    if answer != _ANSWER:
        return Check(
            what, "problem", f"{took}, but it returns {answer} instead of {_ANSWER}", "look for errors in dmesg; reboot"
        )
    return Check(what, "ok", f"{took}, and it runs")


@contextlib.contextmanager
def _empty_store() -> Iterator[None]:
    """A store on the disk of the real one, which may forbid to run programs, if it can be written."""
    place = default_store().root / "staging"
    folder = tempfile.mkdtemp(prefix="doctor", dir=place if os.access(place, os.W_OK) else None)
    try:
        with environment.overridden(JITK_CACHE_DIR=folder, JITK_VERBOSE="0", JITK_NO_COMPILE="0", JITK_CACHE_PATH=""):
            yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


CHECKS: dict[str, Callable[[], Iterator[Check]]] = {
    "Python": _python,
    "PyTorch": _pytorch,
    "environment": _settings,
    "machine": _machine,
    "C++ compiler": _cpp_compiler,
    "ninja": _ninja,
    "nvcc": _cuda_compiler,
    "GPU": _gpus,
    "cache": _cache,
    "compiling": _compiling,
}
