"""Compile kernels ahead of their first call: every variant that the ops' samples need.

Without a GPU name its architecture: 8.0 (A100), 9.0a (H100, H200), 10.0a (B200). What is in the cache already is not compiled
again. Exit code 1 if a kernel does not compile; the errors stand at the end.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from torch_jit_ops import loader, runtime, toolchain
from torch_jit_ops.op import Op, libraries
from torch_jit_ops.samples import SampleMaker


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ops", nargs="*", metavar="op", help="names, as silu_and_mul or jitk::silu_and_mul (default: all)")
    parser.add_argument(
        "--backend", choices=("cpu", "cuda"), action="append", help="default: cuda if it can be built for, and cpu"
    )
    parser.add_argument(
        "--arch", action="append", metavar="9.0a", help="CUDA architecture; repeatable (default: of the GPUs here)"
    )
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compilers at a time (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> int:
    archs = options.arch or sorted({toolchain.device_arch(i) for i in range(torch.cuda.device_count())})
    backends = options.backend or (["cuda", "cpu"] if archs else ["cpu"])
    if "cuda" in backends and not archs:
        print("error: there is no GPU here; say for which to build, such as --arch 9.0a", file=sys.stderr)
        return 2
    ops = _chosen(options.ops)
    units = [runtime.unit()]
    for op in ops:
        for backend in backends:
            for values in _needed(op, backend):
                targets = archs if backend == "cuda" else [toolchain.host_isa()]
                units += [op.unit(backend, values, arch) for arch in targets]
    start = time.monotonic()
    failures = []
    compiled = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for unit, result in [(unit, pool.submit(loader.load, unit)) for unit in dict.fromkeys(units)]:
            try:
                compiled += result.result().compiled
            except (loader.BuildError, toolchain.MissingCompiler) as error:
                failures.append(f"{unit.label} ({unit.backend} {unit.arch}): {error}")
    for failure in failures:
        print(failure, file=sys.stderr)
    total = len(dict.fromkeys(units))
    print(f"{total - len(failures)} of {total} kernels are there, {compiled} compiled in {time.monotonic() - start:.0f} s")
    return 1 if failures else 0


def _chosen(names: list[str]) -> list[Op]:
    ops = {op.qualified_name: op for library in libraries() for op in library.ops.values()}
    chosen = []
    for name in names:
        found = [op for qualified, op in ops.items() if name in (qualified, op.name)]
        if not found:
            raise ValueError(f"there is no op {name!r}; there are {', '.join(ops)}")
        chosen += found
    return chosen or list(ops.values())


def _needed(op: Op, backend: str) -> Iterator[tuple[object, ...]]:
    """The placeholders' values of all samples in all dtypes."""
    if backend not in op.kernels or op.samples is None:
        return
    pattern = op.kernels[backend].pattern
    seen = set()
    for dtype in op.dtypes:
        for sample in op.samples(SampleMaker("cpu", dtype)):
            values = pattern.values(pattern.words_of(op.arguments(*sample.args, **sample.kwargs)))
            if values not in seen:
                seen.add(values)
                yield values
