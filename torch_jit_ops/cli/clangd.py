"""Write a .clangd, so that an editor that asks clangd finds the headers and compiles kernels as the build does.

The folder is a library of your own or a checkout of torch_jit_ops; its folders include/ and csrc/, and those of its packages,
are searched. The file holds paths of this machine: keep it out of version control.

examples:
  python -m torch_jit_ops clangd
  python -m torch_jit_ops clangd ~/src/mylib --arch 9.0a
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from pathlib import Path

import torch

from torch_jit_ops.backends import CPU, CUDA, MissingCompiler, Toolkit
from torch_jit_ops.builder.unit import Unit, include_dir

_MARK = "# Written by python -m torch_jit_ops clangd, which replaces it when it is run again.\n"
_NO_SUCH_IN_CLANG = ("-Xcompiler", "-gencode")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", type=Path, default=Path(), help="where the file is written (default: here)")
    parser.add_argument("--arch", metavar="9.0a", help="CUDA architecture (default: of the GPU here, else 9.0a)")
    parser.add_argument("--force", action="store_true", help="replace a .clangd that somebody else wrote")


def run(options: argparse.Namespace) -> int:
    file = options.folder / ".clangd"
    if not options.folder.is_dir():
        raise ValueError(f"there is no folder {options.folder}")
    if file.exists() and not file.read_text().startswith(_MARK) and not options.force:
        raise FileExistsError(f"{file} was written by somebody else; --force replaces it")
    arch = options.arch or (CUDA.arch_of(0) if CUDA.is_here() else "9.0a")
    try:
        toolkit = CUDA.toolkit()
    except MissingCompiler as missing:
        print(f"without CUDA: {missing}")
        toolkit = None
    file.write_text(configuration(options.folder.resolve(), arch, toolkit))
    print(file)
    return 0


def configuration(folder: Path, arch: str, toolkit: Toolkit | None) -> str:
    """The text of a .clangd for the sources in ``folder``."""
    own = [
        place for name in ("include", "csrc") for place in sorted({folder / name, *folder.glob(f"*/{name}")}) if place.is_dir()
    ]
    include = [f"-I{place}" for place in dict.fromkeys([*own, include_dir()])]
    cpu = Unit("", "", CPU, CPU.arch_of(), "").compile_flags()
    parts = [_part(None, [*include, "-xc++", *cpu])]
    if toolkit is not None:
        flags = Unit("", "", CUDA, arch, "").compile_flags()
        cuda = [flag for flag in flags if not flag.startswith(_NO_SUCH_IN_CLANG)]
        cuda += ["-xcuda", f"--cuda-path={toolkit.home}", f"--cuda-gpu-arch={CUDA.target(arch)}"]
        # clangd only reads: it needs no device library, and knows the newest CUDA well enough.
        cuda += ["-nogpulib", "-Wno-unknown-cuda-version", *(f"-I{place}" for place in toolkit.include)]
        parts.append(_part(r".*\.cuh?", cuda))
    headers = Path(torch.__file__).parent / "include"
    from_torch = [headers, headers / "torch/csrc/api/include", Path(sysconfig.get_paths()["include"])]
    parts.append(_part(r".*/csrc/runtime/.*", [f"-isystem{place}" for place in from_torch]))
    return _MARK + "---\n".join(parts)


def _part(path: str | None, flags: list[str]) -> str:
    """One document of the file. JSON's strings are YAML's too, whatever a path holds."""
    head = f"If:\n  PathMatch: {json.dumps(path)}\n" if path is not None else ""
    lines = "".join(f"    - {json.dumps(flag)}\n" for flag in flags)
    return f"{head}CompileFlags:\n  Add:\n{lines}"
