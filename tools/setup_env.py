"""Makes a virtual environment that has PyTorch, for the Makefile. Needs Python 3.10 or newer, and nothing else.

    python3 tools/setup_env.py .venv --torch torch==2.13.0
    python3 tools/setup_env.py .venv-cuda --torch torch==2.11.0 --cuda
    python3 tools/setup_env.py .venv --nvcc                            a CUDA compiler from wheels, where there is no other

The PyTorch of the Python that runs this is used if it will do, since it is the one built for the machine.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036  (who has an older one reads why, and no traceback)
    sys.exit("torch_jit_ops needs Python 3.10 or newer; set PYTHON=/path/to/python3.x")

OLDEST_TORCH = (2, 11)
_TORCH_WILL_DO = """
import sys
import torch
version = tuple(map(int, torch.__version__.split(".")[:2]))
sys.exit(not (version >= {oldest} and (not {cuda} or torch.version.cuda is not None)))
"""
_HAS_NVCC = "from torch_jit_ops import backends; backends.CUDA.toolkit()"

Run = Callable[[Sequence[str], bool], bool]


def run(command: Sequence[str], quiet: bool) -> bool:
    """Whether the command succeeds; ``quiet`` drops what it says."""
    sink = subprocess.DEVNULL if quiet else None
    try:
        return subprocess.run(command, stdout=sink, stderr=sink, check=False).returncode == 0
    except OSError:  # as of an environment that is not there yet
        return False


def set_up(folder: Path, torch: str, cuda: bool, run: Run = run, say: Callable[[str], object] = print) -> None:
    """Make the environment, or complete it. What is there and will do stays.

    Args:
        folder: of the environment.
        torch: what pip installs if this Python has no PyTorch that will do.
        cuda: whether only a PyTorch built with CUDA will do.
        run: as ``run``.
        say: prints a line.

    Raises:
        SystemExit: it cannot be made; the text says why.
    """
    compiler = os.environ.get("CXX") or "c++"
    # CXX may be several words, "ccache g++ -m64", of which the first is the program.
    if shutil.which(compiler) is None and shutil.which(compiler.split()[0]) is None:
        raise SystemExit(
            f"no C++ compiler ({compiler}): install g++ 11 or newer (Debian, Ubuntu: apt-get install g++), or set CXX to one"
        )
    python = str(folder / "bin" / "python")
    if not run([python, "-m", "pip", "--version"], True) and not run([sys.executable, "-m", "venv", str(folder)], False):
        raise SystemExit(
            f"{folder} cannot be made: {sys.executable} -m venv failed (Debian, Ubuntu: apt-get install python3-venv)"
        )
    check = ["-c", _TORCH_WILL_DO.format(oldest=OLDEST_TORCH, cuda=cuda)]
    if run([python, *check], True):
        return
    if run([sys.executable, *check], True):
        say(f"setting up {folder} on top of the torch of {sys.executable}")
        show_packages_of_this_python(folder)
        return
    say(f"setting up {folder} with {torch}, which may take minutes and gigabytes")
    if not run([python, "-m", "pip", "install", torch], False) or not run([python, *check], True):
        wanted = f"torch >= {'.'.join(map(str, OLDEST_TORCH))}{' built with CUDA' if cuda else ''}"
        raise SystemExit(f"{torch} will not do: it must be {wanted}")


def show_packages_of_this_python(folder: Path) -> None:
    """Have the environment see all packages that this Python sees, also if this is one of a virtual environment itself."""
    packages = [path for path in sys.path if path.endswith("-packages")]
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run(
        [str(folder / "bin" / "python"), "-c", ask], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()
    # The folders alone would do without their own .pth files, such as those of editable installs.
    Path(own, "base.pth").write_text(f"import site; list(map(site.addsitedir, {packages!r}))\n")


def add_nvcc(folder: Path, run: Run = run, say: Callable[[str], object] = print) -> None:
    """Install a CUDA compiler from wheels if there is no other. Without one the ops run their PyTorch function."""
    python = str(folder / "bin" / "python")
    if run([python, "-c", _HAS_NVCC], True):
        return
    say(f"there is no CUDA compiler: installing one into {folder}")
    if not run([python, "-m", "pip", "install", "--quiet", "--editable", ".[nvcc]"], False):
        say("that failed: ops on the GPU will run their PyTorch reference")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--torch", metavar="REQUIREMENT", help="what pip installs where this Python has no PyTorch that will do"
    )
    parser.add_argument("--cuda", action="store_true", help="only a PyTorch built with CUDA will do")
    parser.add_argument("--nvcc", action="store_true", help="add a CUDA compiler, if there is none")
    options = parser.parse_args(arguments)
    if options.torch is not None:
        set_up(options.folder, options.torch, options.cuda)
    if options.nvcc:
        add_nvcc(options.folder)


if __name__ == "__main__":
    main(sys.argv[1:])
