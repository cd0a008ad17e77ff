"""Finds patterns in a graph that Dynamo has traced, and says why one that nearly fits does not."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from torch_jit_ops.inductor.expression import COMMUTATIVE, Call, Expression, Reader, name_of
from torch_jit_ops.inductor.pattern import AnyFloat, Pattern

# What changes how the calls behind it compute.
_MODES = ("_set_grad_enabled", "_enter_autocast", "_exit_autocast", "_enter_inference_mode", "_exit_inference_mode")
_WRITES_IN_PLACE = ("setitem", "iadd", "imul", "isub", "itruediv", "ifloordiv", "ipow", "iand", "ior", "ixor", "copy_")

Bindings = dict[Any, Any]


def tensor_of(node: Node) -> Any:
    """The fake tensor that Dynamo, or an export, saw as the value of ``node``; None if it saw something else."""
    value = node.meta.get("example_value", node.meta.get("val"))
    return value if isinstance(value, Tensor) else None


def is_barrier(node: Node) -> bool:
    """Whether moving a read of memory across ``node`` could change what is read or computed."""
    if node.op == "call_module":
        return True
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    if isinstance(node.target, torch._ops.OpOverloadPacket):
        return any(getattr(node.target, name)._schema.is_mutable for name in node.target.overloads() if name != "out")
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    name = name_of(node.target)
    return _is_told_to_write(node) or name in _MODES or name in _WRITES_IN_PLACE or name.endswith("_")


def _is_told_to_write(node: Node) -> bool:
    if node.kwargs.get("inplace") is True or node.kwargs.get("out") is not None:
        return True
    if not isinstance(node.target, types.FunctionType):
        return False
    parameters = list(inspect.signature(node.target).parameters)
    return "inplace" in parameters and True in node.args[parameters.index("inplace") :]


class GraphReader:
    """The expressions of a graph's nodes, as they are before it is changed."""

    def __init__(self, graph: Graph) -> None:
        self._reader = Reader()
        self._expressions: dict[Node, Expression] = {}
        self.barriers: list[Node] = []
        for node in graph.nodes:
            if is_barrier(node):
                self.barriers.append(node)
                self._reader.forget()
            tensor = tensor_of(node)
            if tensor is not None:
                self._expressions[node] = self._read(node, tensor)

    def __getitem__(self, node: Node) -> Expression | None:
        return self._expressions.get(node)

    def _read(self, node: Node, tensor: Tensor) -> Expression:
        if node.op not in ("call_function", "call_method") or is_barrier(node):
            return self._reader.argument(tensor, node)
        name, args = name_of(node.target), node.args
        if name == "getitem" and isinstance(args[0], Node) and tensor_of(args[0]) is None:
            name, args = name_of(args[0].target), args[0].args  # a part of a chunk or a split
        kwargs = {key: self._known(value) for key, value in node.kwargs.items()}
        return self._reader.read(Call(name, tuple(map(self._known, args)), kwargs, tensor, node))

    def _known(self, value: Any) -> Any:
        if isinstance(value, Node):
            return self._expressions.get(value, value)
        return type(value)(map(self._known, value)) if type(value) in (list, tuple) else value


@dataclass
class Attempt:
    """How many parts of a pattern fit at best, and what is wrong with the next one."""

    fitted: int = -1
    reason: str = ""

    def fail(self, bound: Bindings, reason: str) -> None:
        if len(bound) > self.fitted:
            self.fitted, self.reason = len(bound), reason


@dataclass(frozen=True)
class Match:
    """Where a pattern fits.

    Attributes:
        arguments: of the op: nodes and constants.
        outputs: the nodes whose values the op makes, in the order of the pattern's outputs.
        interior: all nodes whose values are computed on the way, outputs included.
    """

    pattern: Pattern
    arguments: tuple[Any, ...]
    outputs: tuple[Node, ...]
    interior: frozenset[Node] = field(repr=False)

    @property
    def root(self) -> Node:
        return self.outputs[self.pattern.outputs.index(self.pattern.root)]

    @property
    def place(self) -> Node:
        """The node before which the op goes: ahead of everything that uses what it makes."""
        return min(self.outputs)

    def nodes(self) -> list[Node]:
        """The op's arguments that are nodes."""
        return [argument for argument in self.arguments if isinstance(argument, Node)]


def match(pattern: Pattern, node: Node, reader: GraphReader, attempt: Attempt) -> Match | None:
    """Fit ``pattern`` to the computation of ``node``. ``attempt`` says how far it went."""
    expression = reader[node]
    if expression is None or expression.source is not node:
        return None
    for bound in _unify(pattern.root, expression, {}, attempt):
        arguments = tuple(
            bound[argument].source
            if isinstance(argument, Expression)
            else bound[argument]
            if isinstance(argument, AnyFloat)
            else argument
            for argument in pattern.arguments
        )
        outputs = tuple(bound[output].source for output in pattern.outputs)
        wanted = zip((*pattern.arguments, *pattern.outputs), (*arguments, *outputs), strict=True)
        if all(isinstance(value, Node) for part, value in wanted if isinstance(part, Expression)):
            interior = frozenset(_between(node, [value for value in arguments if isinstance(value, Node)]))
            return Match(pattern, arguments, outputs, interior)
        attempt.fail(bound, "an argument has no place in the graph")
    return None


def _unify(pattern: Expression, target: Expression, bound: Bindings, attempt: Attempt) -> Iterator[Bindings]:
    """Every way in which ``target`` can be what ``pattern`` says, given what was found for its other parts."""
    if pattern in bound:
        if bound[pattern] is target:
            yield bound
        return
    if pattern.dtype != target.dtype:
        attempt.fail(bound, f"{pattern.name} of {_short(pattern.dtype)}: the model has {_short(target.dtype)}")
        return
    if pattern.name == "argument":
        yield {**bound, pattern: target}
        return
    if pattern.name != target.name or len(pattern.inputs) != len(target.inputs):
        attempt.fail(
            bound, f"wants {pattern.name}, the model has {target.name if target.name != 'argument' else target.source}"
        )
        return
    if len(pattern.constants) != len(target.constants):
        attempt.fail(bound, f"{pattern.name} with {pattern.constants}: the model has {target.constants}")
        return
    bound = {**bound, pattern: target}
    for wanted, found in zip(pattern.constants, target.constants, strict=True):
        if isinstance(wanted, AnyFloat):
            if not isinstance(found, (int, float)) or bound.setdefault(wanted, found) != found:
                attempt.fail(bound, f"{wanted.name} is no constant of the model")
                return
        elif wanted != found:
            attempt.fail(bound, f"{pattern.name} with {wanted}: the model has {found}")
            return
    orders = [target.inputs]
    if pattern.name in COMMUTATIVE and len(target.inputs) == 2:
        orders.append(target.inputs[::-1])
    for order in orders:
        yield from _unify_all(pattern.inputs, order, bound, attempt)


def _unify_all(
    patterns: Sequence[Expression | None], targets: Sequence[Expression | None], bound: Bindings, attempt: Attempt
) -> Iterator[Bindings]:
    if not patterns:
        yield bound
        return
    if patterns[0] is None or targets[0] is None:
        if patterns[0] is targets[0]:
            yield from _unify_all(patterns[1:], targets[1:], bound, attempt)
        return
    for found in _unify(patterns[0], targets[0], bound, attempt):
        yield from _unify_all(patterns[1:], targets[1:], found, attempt)


def _between(root: Node, arguments: Sequence[Node]) -> Iterator[Node]:
    """The nodes from which ``root`` is computed, back to the arguments."""
    seen: set[Node] = set(arguments)
    rest = [root]
    while rest:
        node = rest.pop()
        if node in seen or node.op not in ("call_function", "call_method"):
            continue
        value = node.meta.get("example_value", node.meta.get("val"))
        if not isinstance(value, (Tensor, tuple, list)):
            continue  # a size
        seen.add(node)
        yield node
        rest += node.all_input_nodes


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
