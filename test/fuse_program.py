"""A small program of tensors as Python text: what ``fuse`` is tried on.

A program is a list of lines, each of which computes one thing, so that a mutation can stand between any two. Tensors come from
buffers of numbers, which several of them may share.
"""

from __future__ import annotations

import ast
import copy
import operator
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

END = "# end"  # of a with block


@dataclass
class Input:
    """An argument of the program: ``view``, a Python expression of the buffer ``b``.

    Attributes:
        kind: of the numbers: ``rows`` of very different magnitudes, ``weight``, ``bias``, ``wide`` (beyond fp16).
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str = "rows"
    buffer: str = ""
    view: str = "b"

    def __str__(self) -> str:
        short = str(self.dtype).removeprefix("torch.")
        return f"{self.name} = {self.view}  with b = {self.buffer or self.name}: {list(self.shape)} {short}, {self.kind}"


@dataclass
class Program:
    """``lines`` in order; ``results`` are returned.

    Attributes:
        op: the op that the program without mutations must get.
        transform: around the lines, within what is compiled; ``outside``: around the compiled function.
        grad: whether the inputs need gradients.
    """

    op: str
    inputs: list[Input]
    lines: list[str]
    results: list[str]
    seed: int = 0
    transform: str = ""
    outside: str = ""
    grad: bool = False
    dynamic: bool | None = None
    history: list[str] = field(default_factory=list)

    def clone(self) -> Program:
        return copy.deepcopy(self)

    @property
    def dtype(self) -> torch.dtype:
        return self.inputs[0].dtype

    def names(self) -> list[str]:
        return [given.name for given in self.inputs]

    def find(self, name: str) -> Input:
        return next(given for given in self.inputs if given.name == name)

    def fresh(self, stem: str) -> str:
        text = "\n".join([*self.lines, *self.names()])
        return next(name for number in range(1000) if (name := f"{stem}{number}") not in text)

    def body(self, watched: bool = False) -> str:
        """The function that the lines are in."""
        depth, text = 1, [f"def body({', '.join(self.names())}):"]
        for index, line in enumerate(self.lines):
            if line == END:
                text.append("    " * depth + "pass")
                depth -= 1
                continue
            text.append("    " * depth + line)
            depth += line.startswith("with ")
            if watched:
                text.append("    " * depth + f"watch({index}, dict(locals()))")
        return "\n".join([*text, f"    return {', '.join(self.results)}"])

    def source(self, watched: bool = False) -> str:
        text = self.body(watched)
        if self.transform:
            text += f"\n\ndef program({', '.join(self.names())}):\n{TRANSFORMS[self.transform](self)}"
        else:
            text = text.replace("def body(", "def program(", 1)
        return text

    def describe(self) -> str:
        head = [f"# {self.op}, seed {self.seed}", *(f"# mutation: {entry}" for entry in self.history)]
        head += [f"# {given}" for given in self.inputs]
        facts = {"outside": self.outside, "grad": self.grad, "dynamic": self.dynamic}
        head += [f"# {name}: {value}" for name, value in facts.items() if value]
        return "\n".join([*head, self.source()])

    def function(self, watch: Callable[[int, dict[str, Any]], None] | None = None) -> Callable[..., Any]:
        scope = {**NAMES, "watch": watch}
        exec(compile(self.source(watch is not None), f"<program {self.seed}>", "exec"), scope)
        return scope["program"]

    def buffers(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The numbers; in ``dtype`` the same ones."""
        made: dict[str, Tensor] = {}
        for given in self.inputs:
            name = given.buffer or given.name
            if name not in made:
                made[name] = _numbers(given, name, self.seed)
        return {name: tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor for name, tensor in made.items()}

    def views(self, buffers: dict[str, Tensor]) -> list[Tensor]:
        return [eval(given.view, {"torch": torch, "b": buffers[given.buffer or given.name]}) for given in self.inputs]

    def trace(self) -> list[dict[str, Tensor]]:
        """The tensors that are known after each line. Raises what the program raises."""
        seen: list[dict[str, Tensor]] = [{} for _ in self.lines]

        def watch(index: int, known: dict[str, Any]) -> None:
            seen[index] = {name: value for name, value in known.items() if isinstance(value, Tensor)}

        plain = self.clone()
        plain.transform = ""
        torch.manual_seed(self.seed)
        plain.function(watch)(*self.views(self.buffers()))
        return seen


def _numbers(given: Input, name: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1000 + sum(map(ord, name)))
    shape = given.shape
    numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
    if given.kind == "rows" and shape:
        scales = torch.tensor([1.0, 3.0, 0.002, 20.0, 0.3])
        picked = torch.randint(0, 5, (*shape[:-1], 1) if len(shape) > 1 else (1,), generator=generator)
        numbers = numbers * scales[picked].double()
    elif given.kind == "weight":
        numbers = numbers.sign() * (0.5 + torch.rand(shape, generator=generator, dtype=torch.float64))
    elif given.kind == "wide":
        numbers = numbers * 1e5
    return numbers.to(given.dtype)


def _map(transform: str, weights: bool) -> Callable[[Program], str]:
    """``vmap`` over the first dimension of what is no weight."""

    def text(program: Program) -> str:
        dims = tuple(0 if weights or given.kind in ("rows", "wide") else None for given in program.inputs)
        return f"    return {transform.format(dims=dims, all=', '.join(program.names()))}"

    return text


def _call(text: str) -> Callable[[Program], str]:
    def made(program: Program) -> str:
        names = program.names()
        return text.format(all=", ".join(names), first=names[0], ones=", ".join(f"torch.ones_like({n})" for n in names))

    return made


_SUM = "lambda *given: sum(r.double().sum() for r in torch.utils._pytree.tree_leaves(body(*given)))"
TRANSFORMS: dict[str, Callable[[Program], str]] = {
    "vmap": _map("torch.func.vmap(body, {dims})({all})", False),
    "vmap_all": _map("torch.func.vmap(body, {dims})({all})", True),
    "vmap_grad": _map(f"torch.func.vmap(torch.func.grad({_SUM}), {{dims}})({{all}})", False),
    "grad": _call(f"    return torch.func.grad({_SUM})({{all}})"),
    "jvp": _call("    return torch.func.jvp(body, ({all},), ({ones},))"),
    "vjp": _call(f"    return torch.func.vjp({_SUM}, {{all}})[0]"),
    "checkpoint": _call("    return torch.utils.checkpoint.checkpoint(body, {all}, use_reentrant=False)"),
    "autocast": _call("    with torch.autocast('cpu', torch.bfloat16):\n        return body({all})"),
    "no_grad": _call("    with torch.no_grad():\n        return body({all})"),
    "inference": _call("    with torch.inference_mode():\n        return body({all})"),
    "twice": _call("    first = body({all})\n    return first, body({all})"),
}


def _two(x: Tensor) -> tuple[Tensor, Tensor]:
    return x * 2, x * 3


NAMES = {
    "torch": torch,
    "F": F,
    "math": __import__("math"),
    "operator": operator,
    "checkpoint": lambda x: torch.utils.checkpoint.checkpoint(_two, x, use_reentrant=False),
}


# --- lines --------------------------------------------------------------------------------------------


def flatten(text: str) -> list[str]:
    """Each call and each operator of a program on a line of its own."""
    lines: list[str] = []
    counter = iter(range(1000))
    for statement in ast.parse(text).body:
        if not isinstance(statement, ast.Assign):
            lines.append(ast.unparse(statement))
            continue
        value = _Flatten(lines, counter).parts_of(statement.value)
        lines.append(f"{ast.unparse(statement.targets[0])} = {ast.unparse(value)}")
    return lines


def _is_tensor(node: ast.expr) -> bool:
    if isinstance(node, ast.Name):
        return node.id not in NAMES
    if isinstance(node, ast.Call):
        return not (isinstance(node.func, ast.Attribute) and node.func.attr in ("dim", "size", "numel"))
    if isinstance(node, ast.BinOp):
        return _is_tensor(node.left) or _is_tensor(node.right)
    if isinstance(node, (ast.UnaryOp, ast.Subscript)):
        return _is_tensor(node.operand if isinstance(node, ast.UnaryOp) else node.value)
    return False


class _Flatten(ast.NodeTransformer):
    def __init__(self, lines: list[str], counter: Any) -> None:
        self._lines, self._counter = lines, counter

    def parts_of(self, node: ast.expr) -> ast.expr:
        """``node`` with its parts hoisted."""
        return super().generic_visit(node)

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.Lambda) or not isinstance(node, ast.expr):
            return node if isinstance(node, ast.Lambda) else super().generic_visit(node)
        if isinstance(node, (ast.Call, ast.BinOp, ast.Subscript)) and _is_tensor(node) and not _is_module(node):
            made = super().generic_visit(node)
            name = f"t{next(self._counter)}"
            self._lines.append(f"{name} = {ast.unparse(made)}")
            return ast.Name(name, ast.Load())
        return super().generic_visit(node)


def _is_module(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in NAMES


def uses(line: str) -> list[str]:
    """The names that a line reads."""
    try:
        return [n.id for n in ast.walk(ast.parse(line)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]
    except SyntaxError:
        return []


def targets(line: str) -> list[str]:
    try:
        return [n.id for n in ast.walk(ast.parse(line)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    except SyntaxError:
        return []


def rename(line: str, old: str, new: str, chance: Callable[[], bool] = lambda: True) -> str:
    """``line`` with reads of ``old`` replaced where ``chance`` says so."""
    tree = ast.parse(line)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id == old and chance():
            node.id = new
    return ast.unparse(tree)


Rng = random.Random
