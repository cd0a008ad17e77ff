"""Finds out what runs an AOTInductor package on this machine: a crash of PyTorch's own loader looks like one of the ops.

python check.py build            about two minutes; writes into build/

1. PyTorch's loader in Python, with a model of one relu, in a process that does not import torch_jit_ops.
2. The example's model, which calls an op, without Python: in main.cpp by PyTorch's loader of packages, and in by_hand.cpp by
   AOTInductor's C interface. Both are compared with the model in eager mode.

Exits with 0 if the op's model ran right without Python in one of the two ways.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
LIMIT_S = 300  # of a step: none takes a third of it

RELU = """
import sys, torch
class Model(torch.nn.Module):
    def forward(self, x):
        return torch.relu(x)
device, path = sys.argv[1:]
x = torch.randn(64, device=device)
torch._inductor.aoti_compile_and_package(torch.export.export(Model(), (x,)), package_path=path)
print("compiled", flush=True)
print(torch.equal(torch._inductor.aoti_load_package(path)(x), torch.relu(x)))
assert "torch_jit_ops" not in sys.modules
"""


def compiler(name: str, folder: Path) -> list[str]:
    """Compiles a program of this folder with PyTorch's C++ library: no CMake, and no CUDA toolkit, is needed."""
    home = Path(torch.__file__).parent
    include = [f"-isystem{home / 'include'}", f"-isystem{home / 'include/torch/csrc/api/include'}"]
    names = ["torch", "torch_cpu", "c10", *(["torch_cuda", "c10_cuda"] if torch.version.cuda else []), "dl"]
    link = [f"-L{home / 'lib'}", f"-Wl,-rpath,{home / 'lib'}", "-Wl,--no-as-needed", *(f"-l{each}" for each in names)]
    return [os.environ.get("CXX", "c++"), "-std=c++20", *include, str(HERE / f"{name}.cpp"), "-o", str(folder / name), *link]


def said(command: list[str], folder: Path) -> tuple[str, str]:
    """What a program prints, and how it ended: an empty text if well."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if done.returncode < 0:
        return done.stdout, f"ended with {signal.Signals(-done.returncode).name}"
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return done.stdout, lines[-1] if done.returncode else ""


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.partition(":")[2].split()]


def extracted(package: Path, folder: Path) -> tuple[Path, list[str]]:
    """The library in a package, and the names of the ops that it calls."""
    with zipfile.ZipFile(package) as archive:
        shutil.rmtree(folder, ignore_errors=True)  # of a run before
        archive.extractall(folder)
    (library,) = folder.rglob("*.so")
    listed = library.with_suffix(".json")
    nodes = json.loads(listed.read_text())["nodes"] if listed.exists() else []
    return library, [node["node"]["target"] for node in nodes]


def main(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"PyTorch {torch.__version__}, Python {sys.version.split()[0]}, {device}", flush=True)
    programs = {name: subprocess.Popen(compiler(name, folder)) for name in ("main", "by_hand")}

    printed, failure = said([sys.executable, "-c", RELU, device, str(folder / "relu.pt2")], folder)
    loads = failure or {"compiled\nTrue\n": "runs, and is right"}.get(printed, "gives a wrong result")
    print(f"relu, PyTorch's loader in Python:   {loads}{' once compiled' if failure and printed else ''}", flush=True)

    printed, failure = said([sys.executable, str(HERE / "export.py"), str(folder)], folder)
    expected = numbers(printed)
    print(f"the op's model, eager:              {failure or printed.partition(':')[2].strip()}", flush=True)
    if failure:
        return 1

    right = []
    library, ops = extracted(folder / "model.pt2", folder / "package")
    arguments = {"main": [str(folder / "model.pt2"), "kernels/libjitk_ops.so"]}
    arguments["by_hand"] = [str(library), "kernels/libjitk_ops.so", *ops]
    titles = {"main": "PyTorch's loader in C++:", "by_hand": "AOTInductor's C interface:"}
    for name, program in programs.items():
        if program.wait(LIMIT_S) != 0:
            failure = "the program did not compile"
        else:
            printed, failure = said([str(folder / name), *arguments[name]], folder)
        came = numbers(printed) if not failure else []
        agrees = len(came) == len(expected) and all(map(lambda a, b: math.isclose(a, b, rel_tol=1e-5), came, expected))
        right.append(agrees)
        result = failure or f"{printed.partition(':')[2].strip()}, {'as eager' if agrees else 'WRONG'}"
        print(f"the op's model, {titles[name]:27} {result}", flush=True)
    return 0 if any(right) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "build")))
