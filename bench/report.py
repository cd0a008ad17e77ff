"""Tables that read well in a terminal and paste as Markdown, and the JSON file beside them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

# Wide enough for every table here: a file or a pipe has no width of its own, and a folded row is hard to read.
PIPE_WIDTH = 200

# A ratio that is more than run-to-run noise away from 1.
BETTER, WORSE = 1.02, 0.98


def console(file: TextIO | None = None, width: int | None = None) -> Console:
    """Where reports go: standard output, in colour when it is a terminal."""
    file = file or sys.stdout
    if width is None and not file.isatty():
        width = PIPE_WIDTH
    return Console(file=file, width=width, highlight=False, soft_wrap=False)


def microseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def ratio(value: float | None, better: float = BETTER, worse: float = WORSE) -> str:
    """A ratio where more than 1 is good, marked green or red beyond the noise."""
    if value is None:
        return "-"
    style = "green" if value >= better else "red" if value < worse else None
    return f"[{style}]{value:.2f}[/{style}]" if style else f"{value:.2f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value * 100:.0f}%"


def print_table(out: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], labels: int = 1) -> None:
    """A Markdown table below ``title``. The first ``labels`` columns are text, the rest numbers; cells may hold rich markup."""
    table = Table(box=box.MARKDOWN, show_edge=True, pad_edge=True)
    for index, column in enumerate(columns):
        table.add_column(escape(column), justify="left" if index < labels else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    out.print(f"[bold]{escape(title)}[/bold]")
    with out.capture() as captured:
        out.print(table)
    # The box has an invisible upper and lower edge, printed as lines of blanks.
    lines = [line.rstrip() for line in captured.get().splitlines()]
    print(*(line for line in lines if line), sep="\n", file=out.file)


def print_environment(out: Console, facts: Mapping[str, str]) -> None:
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        out.print(f"{name:<{width}}  {escape(value)}", soft_wrap=True)
    out.print()


def print_notes(out: Console, notes: Sequence[str]) -> None:
    """Lines below a table: why a cell is empty, what was measured again."""
    for note in notes:
        out.print(f"  {escape(note)}", soft_wrap=True)
    out.print()


def merge_reasons(missing: Sequence[tuple[str, str]]) -> list[str]:
    """``name, name: reason`` for (name, reason) pairs, each reason once."""
    names: dict[str, dict[str, None]] = {}
    for name, why in missing:
        names.setdefault(why, {})[name] = None
    return [f"{', '.join(of)}: {why}" for why, of in names.items()]


def write_json(path: Path, report: Mapping[str, object]) -> None:
    """Write ``report`` to ``path``, in one piece or not at all."""
    text = json.dumps(report, indent=1, sort_keys=False, allow_nan=True) + "\n"
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text)
    temporary.replace(path)
