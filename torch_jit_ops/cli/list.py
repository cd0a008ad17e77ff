"""List the ops: the schema of each overload, the dtypes of the kernels, where they are, and which are compiled.

Elsewhere, and for other dtypes, an op runs its PyTorch function.

examples:
  python -m torch_jit_ops list relu2
  python -m torch_jit_ops --import mylib list
  python -m torch_jit_ops list --json | jq -r '.[].name'
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from torch_jit_ops import cache, inventory, warmup
from torch_jit_ops.op import Op


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ops", nargs="*", metavar="op", help="names, as silu_and_mul or jitk::silu_and_mul (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    ops = warmup.find_ops(options.ops or None)
    compiled: dict[str, list[str]] = {}
    for variant in (variant for store in cache.stores() for variant in inventory.variants(store)):
        compiled.setdefault(variant.op, []).append(f"{variant.record['label']} {variant.record['arch']}")
    rows = [_row(op, compiled.get(op.qualified_name, [])) for op in ops]
    if options.json:
        print(json.dumps(rows, indent=1))
        return 0
    for row in rows:
        print(*row["schemas"], sep="\n")
        print("    dtypes   ", " ".join(row["dtypes"]))
        print("    kernels  ", ", ".join(f"{backend}: {source}" for backend, source in row["kernels"].items()) or "none")
        print("    compiled ", ", ".join(row["compiled"]) or "none")
        print()
    return 0


def _row(op: Op, compiled: list[str]) -> dict[str, Any]:
    return {
        "name": op.qualified_name,
        "schemas": [str(getattr(op.packet, overload or "default")._schema) for overload in op.overloads()],
        "dtypes": [str(dtype).removeprefix("torch.") for dtype in op.dtypes],
        "kernels": {backend: kernel.source for backend, kernel in op.kernels.items()},
        "compiled": sorted(set(compiled)),
    }
