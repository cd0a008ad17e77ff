"""How commands print: tables as wide as they need to be where nobody looks, such as in a pipe."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table


def table(*columns: str) -> Table:
    """A table without lines. On a terminal that is too narrow the last column is folded."""
    made = Table(box=None, pad_edge=False)
    for column in columns:
        made.add_column(column, no_wrap=column != columns[-1], overflow="fold")
    return made


def show(table: Table) -> None:
    """Print a table to standard output. In a pipe no line is broken, and none ends in spaces."""
    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else 10_000, markup=False, highlight=False, emoji=False)
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def size(count: float) -> str:
    """``1.5 MB``."""
    units = ["KB", "MB", "GB"]
    if count < 1000:
        return f"{count:.0f} B"
    while (count := count / 1000) >= 1000 and len(units) > 1:
        units.pop(0)
    return f"{count:.1f} {units[0]}"
