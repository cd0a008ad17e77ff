"""Finds the compilers, and says what is missing and how to get it.

Nothing here starts a process while a cached kernel is loaded: identities of compilers are remembered in the cache, beside the
size and time stamp of the program that was asked.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from torch_jit_ops import environment


class MissingCompiler(RuntimeError):
    """No compiler for a backend on this machine. The text says what was looked for and how to get it."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit. ``home`` is what CUDA_HOME should be; ``libraries`` holds libcudart."""

    home: Path
    nvcc: Path
    libraries: Path
    found_by: str


@functools.cache
def cuda_toolkit() -> Toolkit:
    """The toolkit: CUDA_HOME, then ``nvcc`` on PATH, then toolkits from wheels, then /usr/local/cuda.

    Raises:
        MissingCompiler: there is none.
    """
    tried = []
    for home, found_by in _candidate_homes():
        nvcc = home / "bin" / "nvcc"
        if not os.access(nvcc, os.X_OK):
            tried.append(f"{home} ({found_by}): no bin/nvcc")
        elif not (home / "include" / "cuda_runtime.h").exists():
            tried.append(f"{home} ({found_by}): no include/cuda_runtime.h")
        elif (libraries := _cudart_dir(home)) is None:
            tried.append(f"{home} ({found_by}): no libcudart")
        else:
            return Toolkit(home, nvcc, libraries, found_by)
    raise MissingCompiler(
        "no CUDA compiler (nvcc) was found, so CUDA kernels cannot be built\n  looked in:\n"
        + "".join(f"    {line}\n" for line in tried)
        + "  remedy: pip install 'torch_jit_ops[nvcc]', or install the CUDA toolkit and set CUDA_HOME to its folder"
    )


def _candidate_homes() -> Iterator[tuple[Path, str]]:
    chosen = environment.cuda_home()
    if chosen is not None:
        yield chosen, "CUDA_HOME"
    on_path = shutil.which("nvcc")
    if on_path is not None:
        yield _home_behind(Path(on_path)), "nvcc on PATH"
    for site in dict.fromkeys(
        (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), str(Path(torch.__file__).parents[1]))
    ):
        for folder in sorted(Path(site, "nvidia").glob("cu[0-9]*"), reverse=True):
            yield folder, "wheels"
        if Path(site, "nvidia", "cuda_nvcc").is_dir():  # the layout of the CUDA 12 wheels
            yield Path(site, "nvidia", "cuda_nvcc"), "wheels"
    yield Path("/usr/local/cuda"), "the usual folder"


def _home_behind(nvcc: Path) -> Path:
    """The toolkit of an ``nvcc`` on PATH, which may be a link or a shell script that starts the real one."""
    real = nvcc.resolve()
    if (real.parent.parent / "include" / "cuda_runtime.h").exists():
        return real.parent.parent
    try:
        text = real.read_bytes()[:4096].decode()
    except (OSError, UnicodeDecodeError):
        return real.parent.parent
    for target in re.findall(r"(/[^\s\"']+)/bin/nvcc\b", text):
        if Path(target, "bin", "nvcc").exists():
            return Path(target)
    return real.parent.parent


def _cudart_dir(home: Path) -> Path | None:
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib"):
        if any((home / folder).glob("libcudart.so*")):
            return home / folder
    return None


def host_compiler() -> Path:
    """The C++ compiler that ``torch.utils.cpp_extension`` uses: CXX, else ``c++``.

    Raises:
        MissingCompiler: it is not there.
    """
    name = os.environ.get("CXX", "c++")
    found = shutil.which(name)
    if found is None:
        raise MissingCompiler(
            f"no C++ compiler was found ({name!r} is not on PATH), so kernels cannot be built\n"
            "  remedy: install g++ 11 or newer (Debian, Ubuntu: apt-get install g++), or set CXX to one"
        )
    return Path(found)


def compiler_identity(program: Path, memory: Path) -> str:
    """What ``program --version`` says. The folder ``memory`` keeps it for the program's size and time stamp."""
    state = program.stat()
    fingerprint = f"{program} {state.st_size} {state.st_mtime_ns}"
    note = memory / f"{program.name}.json"
    try:
        known = json.loads(note.read_text())
        if known["program"] == fingerprint:
            return str(known["identity"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not asked yet, or unreadable: ask
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    lines = [line.strip() for line in said.splitlines() if re.search(r"\d+\.\d+", line)]
    identity = " ".join(lines[:2])
    try:
        memory.mkdir(parents=True, exist_ok=True)
        note.with_suffix(f".{os.getpid()}").write_text(json.dumps({"program": fingerprint, "identity": identity}))
        note.with_suffix(f".{os.getpid()}").rename(note)
    except OSError:
        pass  # a read-only cache: the next process asks again
    return identity


def device_arch(device_index: int) -> str:
    """The architecture to build for, as ``9.0a``: of the device itself, or ``JITK_CUDA_ARCH``."""
    chosen = environment.cuda_arch()
    if chosen is not None:
        return chosen
    major, minor = torch.cuda.get_device_capability(device_index)
    return arch_name(major, minor)


def arch_name(major: int, minor: int) -> str:
    """``9.0a`` for (9, 0): from Hopper on, the architecture's own instructions need the ``a``."""
    return f"{major}.{minor}{'a' if major >= 9 else ''}"


def gencode(arch: str) -> str:
    """The nvcc flag for ``9.0a``: machine code alone, no PTX.

    Raises:
        ValueError: ``arch`` is not of that form.
    """
    form = re.fullmatch(r"(\d+)\.(\d)([af]?)", arch)
    if form is None:
        raise ValueError(f"the CUDA architecture {arch!r} must be of the form 8.0 or 9.0a")
    number = "".join(form.groups())
    return f"-gencode=arch=compute_{number},code=sm_{number}"


def arch_number(arch: str) -> int:
    """What ``__CUDA_ARCH__`` is for ``9.0a``: 900."""
    major, minor = re.match(r"(\d+)\.(\d)", arch).groups()  # type: ignore[union-attr]
    return int(major) * 100 + int(minor) * 10


_ISA_OF_CAPABILITY = {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3"}


def host_isa() -> str:
    """This machine's x86-64 level, as ``-march`` takes it. Not ``native``: hosts that share a cache may differ."""
    return _ISA_OF_CAPABILITY.get(torch.backends.cpu.get_cpu_capability(), "x86-64-v2")
