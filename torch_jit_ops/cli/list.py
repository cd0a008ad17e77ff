"""List the ops: the schema of each overload, the dtypes of the kernels, and the backends that have one.

Elsewhere, and for other dtypes, an op runs its PyTorch function.
"""

from __future__ import annotations

import argparse
import json

from torch_jit_ops.op import Op, libraries


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    rows = [_row(op) for library in libraries() for op in library.ops.values()]
    if options.json:
        print(json.dumps(rows, indent=1))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table("op", "dtypes", "kernels", box=None, pad_edge=False)
    for row in rows:
        table.add_row(
            "\n".join(row["schemas"]), " ".join(row["dtypes"]), "\n".join(f"{k}: {v}" for k, v in row["kernels"].items())
        )
        table.add_row()
    Console().print(table)
    return 0


def _row(op: Op) -> dict[str, object]:
    return {
        "name": op.qualified_name,
        "schemas": [str(getattr(op.packet, overload or "default")._schema) for overload in op.overloads()],
        "dtypes": [str(dtype).removeprefix("torch.") for dtype in op.dtypes],
        "kernels": {backend: kernel.source for backend, kernel in op.kernels.items()},
    }
