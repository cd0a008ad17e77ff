"""CUDA: kernels for an architecture of NVIDIA's, and the search for a toolkit that compiles them."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from torch_jit_ops import environment, process
from torch_jit_ops.backends import programs
from torch_jit_ops.backends.backend import Backend, Toolkit
from torch_jit_ops.backends.programs import MissingCompiler

_USUAL_HOME = Path("/usr/local/cuda")
_HEADERS = ("cuda_runtime.h", "crt/host_config.h", "nv/target")  # one of each part of a toolkit that a kernel reads


@dataclass(frozen=True)
class Cuda(Backend):
    """See ``Backend``."""

    def arch_examples(self) -> str:
        return "8.0 or 9.0a"

    def arch_flags(self, arch: str) -> tuple[str, ...]:
        """Machine code alone, no PTX; and what ``__CUDA_ARCH__`` is, as a macro that host code sees too: 900 for ``9.0a``."""
        major, minor, kind = re.fullmatch(self.arch_form, self.check_arch(arch)).groups()  # type: ignore[union-attr]
        number = f"{major}{minor}{kind}"
        return f"-gencode=arch=compute_{number},code=sm_{number}", f"-DJITK_CUDA_ARCH={major}{minor}0"

    def target(self, arch: str) -> str:
        return f"sm_{arch.replace('.', '')}"

    def keys(self, arch: str) -> tuple[str, ...]:
        return self.target(arch), self.target(arch).rstrip("af"), self.name

    def arch_of(self, index: int) -> str:
        """Of the device itself, or ``JITK_CUDA_ARCH``."""
        chosen = environment.cuda_arch()
        return arch_name(*torch.cuda.get_device_capability(index)) if chosen is None else chosen

    def archs_here(self) -> list[str]:
        return sorted({self.arch_of(index) for index in range(torch.cuda.device_count())})

    def serves(self, device: torch.device) -> bool:
        return super().serves(device) and torch.version.hip is None

    def index_of(self, device: torch.device) -> int:
        return torch.cuda.current_device() if device.index is None else device.index

    def commands(self) -> list[tuple[str, ...]]:
        host = programs.host_command()
        return [(str(self.toolkit().nvcc),), host]

    def toolkit(self) -> Toolkit:
        return toolkit()

    def refusal(self) -> str | None:
        if torch.version.cuda is not None:
            return None
        return (
            f"PyTorch {torch.__version__} is built without CUDA, so no CUDA kernel can be built with it: "
            "install a PyTorch for CUDA, or choose the backend cpu"
        )

    def is_here(self) -> bool:
        return self.refusal() is None and torch.cuda.is_available()

    def is_in_use(self) -> bool:
        return bool(torch.cuda.is_initialized())


# nvcc puts <cmath> before every kernel, and with it, from C++17 on, libstdc++'s Bessel functions and their kin, which four
# passes read: a fifth of an empty kernel's time (0.26 of 1.13 CPU seconds; nvcc 13.0, g++ 12.2, 2026-11-21). This is the guard
# of their header. CUDA's functions stay; host code that calls std::cyl_bessel_j takes flags=("-U_GLIBCXX_BITS_SPECFUN_H",).
_NO_SPECIAL_FUNCTIONS = "-D_GLIBCXX_BITS_SPECFUN_H=1"

CUDA = Cuda(
    name="cuda",
    device_type="cuda",
    dispatch_key="CUDA",
    suffixes=(".cu",),
    arch_form=environment.CUDA_ARCH,
    target_form=r"sm_\d{2,3}[af]?",
    # -O is for the host code alone, most of which runs once an error occurs; ptxas optimises fully by default.
    flags=("-O1", "-Xcompiler=-fvisibility=hidden", _NO_SPECIAL_FUNCTIONS),
    debug_flags=("-g", "-G", "-Xcompiler=-O0", "-DJITK_DEBUG"),  # -G makes line numbers by itself
    exports_link_flags=("-Wl,--wrap=__cudaRegisterFunction",),  # export.h says what it does with it
    # CC is nvcc's host compiler, as in PyTorch.
    variables=("CC", "NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "PYTORCH_NVCC", "CUDA_INC_PATH", "CUDNN_HOME"),
    builds_for_others=True,
)


def arch_name(major: int, minor: int) -> str:
    """``9.0a`` for (9, 0): from Hopper on, the architecture's own instructions need the ``a``."""
    return f"{major}.{minor}{'a' if major >= 9 else ''}"


@process.cached
def toolkit() -> Toolkit:
    """The toolkit: CUDA_HOME, then ``nvcc`` on PATH, then toolkits from wheels, then /usr/local/cuda.

    Raises:
        MissingCompiler: there is none whose CUDA is the one that PyTorch is built with, as far as the major version goes.
    """
    tried = []
    for parts, found_by in _candidates():
        found = _inspect(parts, found_by)
        if isinstance(found, Toolkit):
            return found
        tried.append(f"    {parts[0]} ({found_by}): {found}\n")
    if (_torch_cuda() or 13) >= 13:
        remedy = "pip install 'torch_jit_ops[nvcc]', or install the CUDA toolkit and set CUDA_HOME to its folder"
    else:
        remedy = (
            f"install CUDA toolkit {torch.version.cuda} and set CUDA_HOME to its folder (wheels hold an nvcc from CUDA 13 on)"
        )
    raise MissingCompiler(
        f"no CUDA compiler (nvcc) was found, so CUDA kernels cannot be built\n  looked in:\n{''.join(tried)}  remedy: {remedy}"
    )


def _inspect(parts: tuple[Path, ...], found_by: str) -> Toolkit | str:
    """The toolkit whose nvcc is in ``parts[0]`` and whose other parts are in any of them; or what it lacks."""
    home = parts[0]
    nvcc = home / "bin" / "nvcc"
    if not os.access(nvcc, os.X_OK):
        return "no bin/nvcc"
    folders = [part / folder for part in parts for folder in ("include", "include/cccl")]
    holders = {header: next((folder for folder in folders if (folder / header).exists()), None) for header in _HEADERS}
    if holders["cuda_runtime.h"] is None:
        return "no include/cuda_runtime.h"
    libraries = next((found for part in parts if (found := _cudart_dir(part)) is not None), None)
    if libraries is None:
        return "no libcudart"
    version, wanted = _cudart_version(libraries), _torch_cuda()
    if None not in (version, wanted) and version != wanted:
        return f"it is CUDA {version}, but PyTorch is built with CUDA {torch.version.cuda}"
    # Of headers that are there twice, those beside nvcc are of its version.
    include = dict.fromkeys(folder for folder in holders.values() if folder is not None and folder not in folders[:2])
    return Toolkit(home, nvcc, tuple(include), libraries, found_by)


def _candidates() -> Iterator[tuple[tuple[Path, ...], str]]:
    """Folders in which the parts of one toolkit may be, nvcc in the first, and how they were found."""
    chosen = environment.cuda_home()
    if chosen is not None:
        yield _with_target(chosen), "CUDA_HOME"
    on_path = shutil.which("nvcc")
    if on_path is not None:
        for home in _homes_behind(Path(on_path)):
            yield _with_target(home), "nvcc on PATH"
    # A virtual environment on top of another holds only those wheels of a toolkit that the other lacks.
    sites = [Path(entry, "nvidia") for entry in dict.fromkeys(sys.path)]
    for name in sorted({folder.name for site in sites for folder in site.glob("cu[0-9]*")}, reverse=True):
        parts = [site / name for site in sites if (site / name).is_dir()]
        for home in parts:
            yield (home, *(part for part in parts if part != home)), "wheels"
    for site in sites:  # CUDA 12: a folder for each wheel. Those of PyPI hold ptxas and no nvcc (12.4 and 12.9 looked at)
        if (site / "cuda_nvcc").is_dir():
            yield (site / "cuda_nvcc", site / "cuda_runtime", site / "cuda_cccl"), "wheels"
    yield _with_target(_USUAL_HOME), "the usual folder"


def _with_target(home: Path) -> tuple[Path, ...]:
    return home, home / "targets" / "x86_64-linux"  # where conda puts headers


def _homes_behind(nvcc: Path) -> Iterator[Path]:
    """Toolkits that an ``nvcc`` on PATH may belong to: it may be a link, or a shell script that starts the real one."""
    real = nvcc.resolve()
    yield real.parent.parent
    try:
        text = real.read_bytes()[:4096].decode()
    except (OSError, UnicodeDecodeError):
        return  # a program
    for target in re.findall(r"(/[^\s\"']+)/bin/nvcc\b", text):
        yield Path(target)


def _cudart_dir(part: Path) -> Path | None:
    for folder in ("lib64", "lib", "lib/x86_64-linux-gnu"):
        if any((part / folder).glob("libcudart.so*")):
            return part / folder
    return None


def _cudart_version(folder: Path) -> int | None:
    """The major version of the libcudart in a folder, which its file name tells."""
    versions = {
        int(found[1]) for file in folder.glob("libcudart.so.*") if (found := re.match(r"libcudart\.so\.(\d+)", file.name))
    }
    return max(versions, default=None)


def _torch_cuda() -> int | None:
    """The major version of CUDA that PyTorch is built with; None if it is built without."""
    return int(torch.version.cuda.split(".")[0]) if torch.version.cuda else None
