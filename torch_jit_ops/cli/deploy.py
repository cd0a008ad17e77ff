"""Write ops and their kernels as a folder for programs without Python, such as a C++ server that runs an AOTInductor package.

The folder holds libjitk_ops.so, which defines the ops when a program loads it (dlopen, or linked), and the kernels that it
opens on their first call. Nothing is compiled there: a call that needs another kernel fails, and says which ones there are.
What the folder needs is PyTorch's C++ library of the version with which it was written, on the same kind of machine.

Which kernels: those that exported programs call (--program), that a run recorded (--manifest), or that ops, --dtype, --set,
--backend and --arch name, as for build; all of these together. An existing folder of this command is replaced as a whole.

examples:
  python -m torch_jit_ops deploy kernels --program model.pt2
  python -m torch_jit_ops deploy kernels --program a.pt2 --program b.pt2 --arch 9.0a
  python -m torch_jit_ops deploy kernels silu_and_mul --dtype bfloat16 --backend cuda --arch 9.0a
  python -m torch_jit_ops --import mylib deploy kernels --manifest run.jsonl
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from torch_jit_ops.ahead import deployment
from torch_jit_ops.cli import build


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="to write: a new one, or one that this command wrote")
    parser.add_argument("ops", nargs="*", metavar="op", help="names, as silu_and_mul or jitk::silu_and_mul")
    parser.add_argument(
        "--program", action="append", default=[], type=Path, metavar="FILE", help="of torch.export.save; repeatable"
    )
    parser.add_argument("--manifest", type=Path, metavar="FILE", help="what a run recorded with JITK_RECORD=FILE")
    build.add_choice(parser)
    parser.add_argument("--jobs", type=int, help="compilers at a time (default: what this machine bears)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(options: argparse.Namespace) -> int:
    if not options.ops and (options.dtype or options.set) and (options.program or options.manifest is not None):
        raise ValueError("--dtype and --set go with ops; --program and --manifest say them themselves")
    done = deployment.deploy(
        options.folder,
        options.ops or None,
        *build.chosen_values(options),
        programs=options.program,
        manifest=options.manifest,
        arch=options.arch,
        backend=options.backend,
        jobs=options.jobs,
    )
    if options.json:
        print(json.dumps({**asdict(done), "folder": str(done.folder), "library": str(done.library)}, indent=1))
    else:
        print(f"{done.kernels} kernels, {done.compiled} compiled in {done.seconds:.1f} s: load {done.library}")
    return 0
