"""A translation unit to compile: all that is known of a kernel before any compiler runs."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from torch_jit_ops.backends import toolchain
from torch_jit_ops.store import cache

ABI_VERSION = 1  # kAbiVersion of include/jitk/abi.h
# -O is for the host code alone, most of which runs once an error occurs; ptxas optimises fully by default.
_CUDA_FLAGS = ("-O1", "-Xcompiler=-fvisibility=hidden")
_CPU_FLAGS = ("-O3", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math")
# -G makes line numbers by itself, and says so where it meets -lineinfo.
_CUDA_DEBUG = ("-g", "-G", "-Xcompiler=-O0", "-DJITK_DEBUG")
_CPU_DEBUG = ("-O0", "-g", "-DJITK_DEBUG")
_STANDARD = "-std=c++17"


@dataclass(frozen=True)
class Unit:
    """One translation unit to compile: everything that decides what comes out, but the contents of the files.

    Attributes:
        name: what is built, for folders, progress and errors: ``jitk.silu_and_mul``.
        label: the same for people: ``jitk::silu_and_mul<bf16_t>``.
        backend: ``"cuda"`` or ``"cpu"``.
        arch: ``"9.0a"`` for CUDA, an x86-64 level for CPU.
        text: the translation unit.
        include: folders to search, in this order, before the headers of this package.
        flags: further flags of nvcc or the C++ compiler.
        torch: whether the unit includes PyTorch's headers, and so depends on its version.
        debug: build it for debuggers: unoptimised, and with checks of indices.
    """

    name: str
    label: str
    backend: str
    arch: str
    text: str
    include: tuple[Path, ...] = ()
    flags: tuple[str, ...] = ()
    torch: bool = False
    debug: bool = False

    def roots(self) -> dict[str, Path]:
        """The folders by whose names files are recorded."""
        roots = {f"include{index}": folder for index, folder in enumerate(self.include)}
        return {**roots, "jitk": include_dir(), "system": Path("/")}

    def compile_flags(self) -> tuple[str, ...]:
        """The flags that decide the machine code; no paths."""
        standard = () if any(flag.startswith("-std=") for flag in self.flags) else (_STANDARD,)
        if self.backend == "cuda":
            target = (toolchain.gencode(self.arch), f"-DJITK_CUDA_ARCH={toolchain.arch_number(self.arch)}")
            return (*_CUDA_FLAGS, *standard, *target, *self.flags, *(_CUDA_DEBUG if self.debug else ()))
        return (*_CPU_FLAGS, *standard, toolchain.march(self.arch), *self.flags, *(_CPU_DEBUG if self.debug else ()))

    def target(self) -> str:
        """What it is compiled for, for people: ``sm_90a``."""
        return f"sm_{self.arch.replace('.', '')}" if self.backend == "cuda" else self.arch

    def key(self) -> str:
        """Digest of all that is known before compiling."""
        versions = [ABI_VERSION, torch.__version__ if self.torch else None]
        return cache.digest_of_record([self.backend, self.text, self.compile_flags(), versions])

    def facts(self) -> dict[str, object]:
        """What the store keeps about it beside its key, for people and for the question why it is built again."""
        return {
            "name": self.name,
            "label": self.label,
            "backend": self.backend,
            "arch": self.arch,
            "flags": self.compile_flags(),
            "abi": ABI_VERSION,
            "torch": torch.__version__ if self.torch else None,
        }


def include_dir() -> Path:
    """The folder of the headers, to be searched for ``<jitk/...>``: in a checkout, an editable install or a wheel."""
    return _data_dir("include")


def csrc_dir() -> Path:
    """The folder of the built-in kernels' sources."""
    return _data_dir("csrc")


@functools.cache
def _data_dir(name: str) -> Path:
    here = Path(__file__).resolve().parent.parent
    for folder in (here / name, here.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"torch_jit_ops is installed without its {name}/ folder; looked in {here} and {here.parent}")
