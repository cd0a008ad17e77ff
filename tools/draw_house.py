"""Draws the package's rooms from its imports, as CONTRIBUTING.md shows them, from the top of the house to the ground.

python tools/draw_house.py            prints the picture
python tools/draw_house.py --write    puts it into CONTRIBUTING.md
"""

from __future__ import annotations

import ast
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "torch_jit_ops"
PAGE = ROOT / "CONTRIBUTING.md"
START, END = "<!-- drawn by tools/draw_house.py -->\n", "<!-- end -->\n"
OPS, GROUND = "(an op)", "(ground)"  # modules beside the rooms: those that use a room, and those that do not
_WIDTH, _ROOM = 120, 11


def imports() -> dict[str, set[str]]:
    """For each module, as ``store/files``, the modules that it imports, also inside of functions; not for annotations alone."""
    files = {str(path.relative_to(PACKAGE).with_suffix("")): path for path in PACKAGE.rglob("*.py")}
    files = {name: path for name, path in files.items() if name not in ("__init__", "__main__")}
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                node.body = []
        asked: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                asked |= {each.name for each in node.names}
            elif isinstance(node, ast.ImportFrom):
                asked |= {f"{node.module}.{each.name}" for each in node.names} | {str(node.module)}
        parts = {each.removeprefix("torch_jit_ops.").replace(".", "/") for each in asked if each.startswith("torch_jit_ops.")}
        found[name] = {each if each in files else f"{each}/__init__" for each in parts} & files.keys() - {name}
    return found


def rooms(graph: Mapping[str, set[str]]) -> dict[str, list[str]]:
    """The modules of each room, and of the two groups beside them."""

    def has_room_below(module: str, seen: set[str]) -> bool:
        seen.add(module)
        return "/" in module or any(has_room_below(each, seen) for each in graph[module] - seen)

    found: dict[str, list[str]] = {}
    for module in sorted(graph):
        room, _, name = module.rpartition("/")
        found.setdefault(room or (OPS if has_room_below(module, set()) else GROUND), []).append(name)
    return found


def draw() -> str:
    """The picture: each room, its modules, and below them the rooms that it stands on."""
    graph = imports()
    house = rooms(graph)
    room_of = {f"{room}/{name}" if room not in (OPS, GROUND) else name: room for room, names in house.items() for name in names}
    below = {room: {room_of[each] for module in graph if room_of[module] == room for each in graph[module]} for room in house}
    lines: list[str] = []
    # A room that more of the others stand on, directly or not, is further down.
    for room in sorted(house, key=lambda room: (len(_reached(room, below)), room), reverse=True):
        on = " ".join(sorted(below[room] - {room})) or "PyTorch"
        names = " ".join(name for name in house[room] if name != "__init__") or room
        head = f"{room:<{_ROOM}}"
        lines += textwrap.wrap(names, _WIDTH, initial_indent=head, subsequent_indent=" " * _ROOM)
        lines += textwrap.wrap(f"on {on}", _WIDTH, initial_indent=" " * (_ROOM + 2), subsequent_indent=" " * (_ROOM + 5))
    return "".join(f"    {line}\n" for line in lines)


def _reached(room: str, below: Mapping[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    left = [room]
    while left:
        each = left.pop()
        if each not in seen:
            seen.add(each)
            left += below[each]
    return seen


def main() -> None:
    picture = draw()
    if "--write" not in sys.argv[1:]:
        sys.stdout.write(picture)
        return
    text = PAGE.read_text()
    before, _, rest = text.partition(START)
    PAGE.write_text(f"{before}{START}\n{picture}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
