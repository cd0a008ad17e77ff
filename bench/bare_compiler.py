"""The compiler alone, on next to nothing: what no library that compiles can be faster than."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bench.child import child_environment, run_child
from bench.environment import REPOSITORY, find_nvcc
from bench.providers import Unavailable

_CPU_ONLY = {"simd.h"}  # of what .cu files do not include

COMPILE, LINK, HEADERS = "compile only", "compile and link", "with every header of jitk"


@dataclass(frozen=True)
class Unit:
    """A source that the bare compiler is timed on, and whether it is linked too."""

    name: str
    source: str
    link: bool = False


def units(device: str, each_header: bool = False) -> list[Unit]:
    """An empty kernel (``cuda``) or function (``cpu``), alone, linked, and with our headers; or with each header alone."""
    if device == "cuda":
        suffixes, first, body = (".h", ".cuh"), "#include <cuda_bf16.h>\n", "__global__ void empty() {}\n"
    else:
        suffixes, first, body = (".h",), "#include <cstdint>\n", "int32_t empty() { return 0; }\n"
    paths = sorted((REPOSITORY / "include" / "jitk").glob("*"))
    headers = [path.name for path in paths if path.suffix in suffixes and not (device == "cuda" and path.name in _CPU_ONLY)]
    includes = {name: f"#include <jitk/{name}>\n" for name in headers}
    found = [Unit(COMPILE, first + body), Unit(LINK, first + body, link=True)]
    if includes:
        found.append(Unit(HEADERS, first + "".join(includes.values()) + body))
    if each_header:
        found += [Unit(f"with jitk/{name}", first + line + body) for name, line in includes.items()]
    return found


def architecture() -> str:
    """The architecture to compile for, as nvcc spells it: that of the GPU, and Hopper's where there is none."""
    import torch

    if not torch.cuda.is_available():
        return "90a"
    major, minor = torch.cuda.get_device_capability()
    # From Hopper on, kernels are built for the very architecture.
    return f"{major}{minor}{'a' if major >= 9 else ''}"


def bare_command(device: str, link: bool, architecture: str) -> list[str]:
    """The compiler's command for ``empty.cu`` or ``empty.cpp``, with the flags that a kernel gets.

    Raises:
        Unavailable: the compiler is not there.
    """
    common = ["-O3", "-std=c++17", f"-I{REPOSITORY / 'include'}", *(["-shared"] if link else ["-c"])]
    if device == "cuda":
        nvcc = find_nvcc()
        if nvcc is None:
            raise Unavailable("nvcc: not found by CUDA_HOME or PATH")
        code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
        target = f"-DJITK_CUDA_ARCH={int(re.sub(r'[^0-9]', '', architecture)) * 10}"  # which our headers ask for
        return [str(nvcc), *common, code, target, "-Xcompiler", "-fPIC", "empty.cu", "-o", "empty.out"]
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise Unavailable("g++: not found by CXX or PATH")
    return [compiler, *common, "-fPIC", "empty.cpp", "-o", "empty.out"]


def time_bare(device: str, unit: Unit, architecture: str) -> float:
    """Seconds of the bare compiler on ``unit``, process start included."""
    command = bare_command(device, unit.link, architecture)
    with tempfile.TemporaryDirectory(prefix="jitk-bench-") as name:
        folder = Path(name)
        (folder / ("empty.cu" if device == "cuda" else "empty.cpp")).write_text(unit.source)
        environment = child_environment(folder)
        start = time.perf_counter()
        run_child(command, environment, folder)
        return time.perf_counter() - start
