"""What a rewrite did to a model, and where."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch.fx import Node

from torch_jit_ops.op import Op

_LINE = re.compile(r'File "([^"]+)", line (\d+)')
_PREFIX = re.compile(r"^L\['self'\]\.?|^self\.?|^L__self__[._]?")


@dataclass(frozen=True)
class Entry:
    """One place in a model.

    Attributes:
        op: such as ``jitk::rmsnorm``; the node, where a graph was left untouched.
        module: its path in the model, such as ``layers.0.input_layernorm``; empty outside of modules.
        line: of the source, as ``file:line``; empty where PyTorch did not keep it.
        reason: why nothing was changed there; empty where the op was put, or taken away.
    """

    op: str
    module: str
    line: str
    reason: str = ""

    def __str__(self) -> str:
        where = "  ".join(part for part in (self.module, self.line) if part)
        return f"{self.op}  {where}" + (f"\n    {self.reason}" if self.reason else "")


@dataclass(frozen=True)
class Report:
    """What a rewrite has done so far, over all graphs that it was given. A place that was in several graphs, such as those for
    other sizes, is there once.

    Attributes:
        done: where an op was put, or was decomposed.
        missed: where an op nearly fits, and why it does not.
        untouched: where a graph was left as it was, with all its places, and why.
    """

    done: tuple[Entry, ...]
    missed: tuple[Entry, ...] = ()
    untouched: tuple[Entry, ...] = ()

    def counts(self) -> dict[str, int]:
        """How many places each op has got."""
        names = [entry.op for entry in self.done]
        return {name: names.count(name) for name in sorted(set(names))}

    def __str__(self) -> str:
        lines = [f"{len(self.done)} replaced"]
        lines += [f"  {entry}" for entry in self.done]
        if self.missed:
            lines += [f"{len(self.missed)} nearly"]
            lines += [f"  {entry}" for entry in self.missed]
        if self.untouched:
            lines += [f"{len(self.untouched)} untouched"]
            lines += [f"  {entry}" for entry in self.untouched]
        return "\n".join(lines)


def entry_at(op: Op, node: Node, reason: str = "") -> Entry:
    """The entry for ``op`` at the place of ``node``."""
    return Entry(op.qualified_name, module_of(node), line_of(node), reason)


def module_of(node: Node) -> str:
    """The path of the module in whose forward ``node`` was called."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return _PREFIX.sub("", stack[-1][0]) if stack else ""


def line_of(node: Node) -> str:
    """The line of the source that called ``node``, as ``file:line``."""
    lines = _LINE.findall(node.meta.get("stack_trace") or node.stack_trace or "")
    return ":".join(lines[-1]) if lines else ""
