"""Where a figure was taken: the first lines of every report, and part of every JSON file."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

REPOSITORY = Path(__file__).resolve().parent.parent

# Distribution names of what is measured beside.
PEERS = ("sglang", "apache-tvm-ffi", "flashinfer-python", "triton")

# Where each library keeps what it compiles, below one folder.
CACHE_VARIABLES = {
    "JITK_CACHE_DIR": "jitk",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "CUDA_CACHE_PATH": "cuda",
    "SGLANG_CACHE_DIR": "sglang",
    "SGLANG_JIT_CACHE_DIR": "sglang/jit",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "TVM_FFI_CACHE_DIR": "tvm_ffi",
}


# Without a compiler our ops run their reference, which must not be taken for a kernel; and compiler caches would be
# what is timed.
SWITCHES = {"JITK_FALLBACK": "error", "JITK_VERBOSE": "0", "TORCH_NO_COMPILER_WRAPPER": "1", "CCACHE_DISABLE": "1"}


def bench_environment(folder: Path) -> dict[str, str]:
    """Environment variables that keep every library's compiled code below ``folder``, and ``SWITCHES``."""
    return {variable: str(folder / name) for variable, name in CACHE_VARIABLES.items()} | SWITCHES


@contextlib.contextmanager
def compiled_code_in(folder: Path | None) -> Iterator[Path]:
    """Keep what the measured libraries compile in ``folder``, or in a temporary directory when it is None.

    Has to be entered before torch or a peer is imported: some read these variables once.
    """
    with contextlib.ExitStack() as stack:
        if folder is None:
            # Compiler workers may still write while the directory is removed; what they leave is in the system's /tmp.
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="jitk-bench-", ignore_cleanup_errors=True)))
        variables = bench_environment(folder.resolve())
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            yield folder
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def _first_line(command: list[str], cwd: Path | None = None) -> str | None:
    """First line that ``command`` prints, or None when it is absent or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if lines else ""


def revision() -> str:
    """Git revision of the checkout, with ``+`` when the tree differs from it; ``unknown`` outside a checkout."""
    commit = _first_line(["git", "rev-parse", "--short=10", "HEAD"], cwd=REPOSITORY)
    if commit is None:
        return "unknown"
    return commit + ("+" if _first_line(["git", "status", "--porcelain"], cwd=REPOSITORY) else "")


def installed_version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def find_nvcc() -> Path | None:
    """The nvcc that CUDA_HOME names, else the one of the usual folder, else the one on PATH, which may be a wrapper."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for home in filter(None, homes):
        if Path(home, "bin", "nvcc").is_file():
            return Path(home, "bin", "nvcc")
    found = shutil.which("nvcc")
    return Path(found) if found else None


def nvcc_version() -> str | None:
    nvcc = find_nvcc()
    if nvcc is None:
        return None
    done = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"release \S+, V(\S+)", done.stdout)
    return found.group(1) if found else None


def describe() -> dict[str, str]:
    """What identifies this machine and this software, in the order in which it is printed."""
    import torch

    facts: dict[str, str] = {}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        memory = properties.total_memory / 2**30
        l2 = properties.L2_cache_size / 2**20
        facts["GPU"] = f"{properties.name}, {properties.multi_processor_count} SMs, {l2:.0f} MiB L2, {memory:.0f} GiB"
        facts["driver"] = _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) or "unknown"
    facts["CPU"] = f"{cpu_model()}, {os.cpu_count()} cores"
    facts["torch"] = f"{torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}"
    compilers = {"nvcc": nvcc_version(), "g++": _first_line(["g++", "-dumpfullversion"])}
    facts["compilers"] = ", ".join(f"{name} {version}" for name, version in compilers.items() if version) or "none"
    peers = {name: installed_version(name) for name in PEERS}
    facts["peers"] = ", ".join(f"{name} {version}" for name, version in peers.items() if version) or "none"
    facts["revision"] = revision()
    facts["date"] = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    facts["command"] = "python -m bench " + " ".join(sys.argv[1:])
    return facts
