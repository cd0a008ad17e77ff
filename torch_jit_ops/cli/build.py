"""Compile kernels ahead of their first call: by default every variant that the ops' samples need, and every Python module.

Without a GPU name its architecture: 8.0 (A100), 9.0a (H100, H200), 10.0a (B200). What is in the store already is not compiled
again. JITK_RECORD=FILE makes any program list what it needs; --manifest FILE compiles that, here or on another machine.
Exit code 1 if a kernel does not compile; the errors stand at the end.

examples:
  python -m torch_jit_ops build silu_and_mul relu2 --dtype bfloat16
  python -m torch_jit_ops build add_constant --set constant=5,7 --arch 9.0a
  JITK_RECORD=run.jsonl python serve.py && python -m torch_jit_ops build --manifest run.jsonl --arch 9.0a
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from torch_jit_ops.ahead import build_ahead
from torch_jit_ops.backends import NAMES
from torch_jit_ops.builder import compiler_jobs
from torch_jit_ops.builder.unit import Unit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "ops", nargs="*", metavar="op", help="of ops and modules, as silu_and_mul or jitk::silu_and_mul (default: all)"
    )
    add_choice(parser)
    parser.add_argument(
        "--each-value",
        action="store_true",
        help="of each op only as many variants as hold every value of every placeholder: a check that all compiles",
    )
    parser.add_argument("--manifest", type=Path, metavar="FILE", help="compile what this file lists (JITK_RECORD writes one)")
    parser.add_argument(
        "--jobs", type=int, help=f"compilers at a time (default: {compiler_jobs.compiler_jobs()}, what this machine bears)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def add_choice(parser: argparse.ArgumentParser) -> None:
    """The options that choose kernels of an op."""
    parser.add_argument(
        "--dtype", action="append", metavar="bfloat16", help="of the tensors; repeatable (default: all of the op)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="name=value,...",
        help="values of a placeholder of the variant, as constant=5,7; repeatable (default: those of the samples)",
    )
    parser.add_argument(
        "--backend", choices=sorted(NAMES), action="append", help="default: cuda if it can be built for, and cpu"
    )
    parser.add_argument(
        "--arch", action="append", metavar="9.0a", help="CUDA architecture; repeatable (default: of the GPUs here)"
    )


def chosen(ops: list[str], options: argparse.Namespace, *, each_value: bool = False) -> list[Unit]:
    """The kernels of these ops, all for none, that the options of ``add_choice`` ask for."""
    dtypes, arguments = chosen_values(options)
    return build_ahead.units_of(ops or None, dtypes, arguments or None, options.arch, options.backend, each_value=each_value)


def chosen_values(options: argparse.Namespace) -> tuple[list[torch.dtype] | None, dict[str, list[str]]]:
    """The dtypes and placeholders' values among the options of ``add_choice``."""
    dtypes = [_dtype(name) for name in options.dtype] if options.dtype else None
    return dtypes, dict(map(_assignment, options.set))


def run(options: argparse.Namespace) -> int:
    if options.manifest is not None:
        if options.dtype or options.set or options.each_value:
            raise ValueError("--dtype, --set and --each-value do not go with --manifest, which lists kernels")
        units = build_ahead.units_of(options.ops or None, None, None, options.arch, options.backend, options.manifest)
    else:
        units = chosen(options.ops, options, each_value=options.each_value)
    report = build_ahead.load_all(units, options.jobs)
    for failure in report.failures:
        print(failure, file=sys.stderr)
    if options.json:
        print(json.dumps(asdict(report), indent=1))
    else:
        there = report.kernels - len(report.failures)
        print(f"{there} of {report.kernels} kernels are there, {report.compiled} compiled in {report.seconds:.1f} s")
    return 1 if report.failures else 0


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"--dtype must be a dtype, such as bfloat16; got {name!r}")
    return dtype


def _assignment(text: str) -> tuple[str, list[str]]:
    name, equals, values = text.partition("=")
    if not equals or not values:
        raise ValueError(f"--set must be of the form name=value or name=value,value; got {text!r}")
    return name, values.split(",")
