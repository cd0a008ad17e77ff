"""List the ops, a line each, and the Python modules. Of those that are named: the schema of each overload, the dtypes of the
kernels, where they are, and which are compiled.

A name may be a pattern, in which * stands for anything: quote it. Elsewhere, and for other dtypes, an op runs its PyTorch
function.

examples:
  python -m torch_jit_ops list
  python -m torch_jit_ops list '*norm*'
  python -m torch_jit_ops list relu2
  python -m torch_jit_ops list --import mylib 'mylib::*'
  python -m torch_jit_ops list --json | jq -r '.[].name'
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import torch

from torch_jit_ops import registry
from torch_jit_ops.backends import CPU
from torch_jit_ops.op import Op
from torch_jit_ops.python_module import ModuleDeclaration
from torch_jit_ops.store import listing
from torch_jit_ops.store.search_path import search_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "ops", nargs="*", metavar="op", help="names, as silu_and_mul or jitk::silu_and_mul, or patterns (default: all)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    found = _find(options.ops)
    if not options.json and (not options.ops or any(map(_is_pattern, options.ops))):
        _print_lines(found)
        return 0
    compiled: dict[str, list[str]] = {}
    for variant in (variant for store in search_path() for variant in listing.variants(store)):
        compiled.setdefault(variant.op, []).append(f"{variant.record['label']} {variant.record['arch']}")
    rows = [_row(each, compiled.get(each.qualified_name, [])) for each in found]
    if options.json:
        print(json.dumps(rows, indent=1))
        return 0
    for row in rows:
        print(*row["schemas"], sep="\n")
        if row["summary"]:
            print("    what     ", row["summary"])
        if row["dtypes"]:
            print("    dtypes   ", _listed(row["dtypes"]))
        print("    kernels  ", ", ".join(f"{backend}: {source}" for backend, source in row["kernels"].items()) or "none")
        print("    compiled ", ", ".join(row["compiled"]) or "none")
        print()
    return 0


def _is_pattern(name: str) -> bool:
    return any(sign in name for sign in "*?[")


Listed = Op | ModuleDeclaration


def _find(names: list[str]) -> list[Listed]:
    """The ops and modules of these names and patterns; all for none.

    Raises:
        ValueError: one of them fits none.
    """
    everything: list[Listed] = [*registry.ops(), *registry.modules()]
    found: list[Listed] = []
    for name in names:
        if not _is_pattern(name):
            ops, modules = registry.parted([name])
            found += [*registry.find_ops(ops), *modules]
            continue
        fitting = [
            each for each in everything if any(fnmatch.fnmatchcase(text, name) for text in (each.name, each.qualified_name))
        ]
        if not fitting:
            known = [each.qualified_name if "::" in name else each.name for each in everything]
            raise ValueError(f"no op fits {name!r}{registry.nearest(name.strip('*?'), known)}")
        found += fitting
    return list(dict.fromkeys(found)) if names else everything


def _print_lines(ops: list[Listed]) -> None:
    """Name and summary of each; what a terminal has no room for is left out."""
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    width = max((len(op.qualified_name) for op in ops), default=0)
    for op in ops:
        line = f"{op.qualified_name:{width}}  {_summary(op)}".rstrip()
        print(line if room is None or len(line) <= room else f"{line[: room - 3]}...")


def _summary(op: Listed) -> str:
    """The first paragraph of the docstring, in one line."""
    if isinstance(op, ModuleDeclaration):
        return f"Python module: {op.summary}" if op.summary else "Python module"
    paragraph, _, _ = (op.reference.__doc__ or "").strip().partition("\n\n")
    return " ".join(paragraph.replace("``", "").split())


def _row(op: Listed, compiled: list[str]) -> dict[str, Any]:
    if isinstance(op, ModuleDeclaration):
        sources = {CPU.name: op.sources.name}
        return {
            "name": op.qualified_name,
            "summary": _summary(op),
            "schemas": [op.qualified_name],
            "dtypes": [],
            "kernels": sources,
            "compiled": sorted(set(compiled)),
        }
    return {
        "name": op.qualified_name,
        "summary": _summary(op),
        "schemas": [str(getattr(op.packet, overload or "default")._schema) for overload in op.declaration.overloads],
        "dtypes": _dtypes(op),
        "kernels": {backend: kernel.source for backend, kernel in op.declaration.kernels.items()},
        "compiled": sorted(set(compiled)),
    }


def _dtypes(op: Op) -> list[str] | dict[str, list[str]]:
    """Those that all arguments share, or those of each."""
    if op.declaration.dtypes.shared is not None:
        return _names(op.declaration.dtypes.shared)
    return {argument: _names(dtypes) for argument, dtypes in op.declaration.dtypes.items()}


def _names(dtypes: Sequence[torch.dtype]) -> list[str]:
    return [str(dtype).removeprefix("torch.") for dtype in dtypes]


def _listed(dtypes: list[str] | dict[str, list[str]]) -> str:
    if isinstance(dtypes, list):
        return " ".join(dtypes)
    return ", ".join(f"{argument}: {' '.join(names)}" for argument, names in dtypes.items())
