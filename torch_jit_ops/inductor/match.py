"""Finds patterns in a graph that Dynamo has traced, and says why one that nearly fits does not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node

from torch_jit_ops.inductor.calls import function_of
from torch_jit_ops.inductor.effects import Effect, effect_of
from torch_jit_ops.inductor.expression import COMMUTATIVE, OF_THE_FIRST, AnyFloat, Call, Expression, Reader, same_number
from torch_jit_ops.inductor.pattern import Pattern

Bindings = dict[Any, Any]


def tensor_of(node: Node) -> Any:
    """The fake tensor that Dynamo, or an export, saw as the value of ``node``; None if it saw something else, such as a tensor
    of another kind, which computes as it likes."""
    value: Any = node.meta.get("example_value", node.meta.get("val"))
    plain = type(value) in (FakeTensor, Tensor, torch.nn.Parameter) and value.layout is torch.strided
    return value if plain else None


def label_of(node: Node) -> str:
    """What is called, for a message."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name.rpartition("::")[2])
    return target if isinstance(target, str) else getattr(target, "__name__", type(target).__name__)


class GraphReader:
    """The expressions of a graph's nodes, as they are before it is changed.

    A node that writes memory, or changes how those behind it compute, begins a new epoch. What two nodes of different epochs
    compute is never one value: in a later epoch, a node whose value stood for another's is opaque.

    Attributes:
        barriers: the nodes that begin an epoch.
        at: the node that is looked at.
    """

    def __init__(self) -> None:
        self._reader = Reader()
        self._expressions: dict[Node, Expression] = {}
        self._epochs: dict[Node, int] = {}
        self._effects: dict[Node, Effect] = {}
        self._sharing: dict[int, list[Node]] = defaultdict(list)
        self.barriers: list[Node] = []
        self.at: Node | None = None

    def read(self, graph: Graph) -> None:
        """Make the expressions of all nodes."""
        for node in graph.nodes:
            self.at = node
            effect = self._effects[node] = effect_of(node)
            if effect is Effect.WRITES:
                self.barriers.append(node)
                self._reader.forget()
            self._epochs[node] = len(self.barriers)
            tensor = tensor_of(node)
            if tensor is not None:
                self._sharing[tensor.untyped_storage()._cdata].append(node)
                self._expressions[node] = self._read(node, tensor, effect)

    def __getitem__(self, node: Node) -> Expression | None:
        return self._expressions.get(node)

    def is_alias(self, node: Node) -> bool:
        """Whether its value is that of another node, so that nothing is lost with it."""
        expression = self._expressions.get(node)
        return expression is not None and isinstance(expression.source, Node) and expression.source is not node

    def is_pure(self, node: Node) -> bool:
        """Whether it does nothing but make its value."""
        return self._effects[node] is Effect.NONE

    def inputs(self, node: Node) -> Sequence[Node]:
        """The nodes that its value is computed from: of ``x.type_as(y)`` it is ``x`` alone."""
        function = function_of(node.target)
        if function is not None and function.name in OF_THE_FIRST:
            return [value for value in node.args[:1] if isinstance(value, Node)] or node.all_input_nodes
        return [self._expressions[node].source] if self.is_alias(node) else node.all_input_nodes

    def sharing(self, node: Node) -> Sequence[Node]:
        """The nodes whose tensors lie in the same memory, or overlap it."""
        return self._sharing[tensor_of(node).untyped_storage()._cdata]

    def _read(self, node: Node, tensor: Tensor, effect: Effect) -> Expression:
        if node.op not in ("call_function", "call_method") or effect is not Effect.NONE:
            return self._reader.argument(tensor, node)
        call: Node = node
        index: int | None = None
        if label_of(node) == "getitem" and isinstance(node.args[0], Node) and tensor_of(node.args[0]) is None:
            parts: Any = node.args
            call, index = parts  # a part of a chunk or a split
            known = call.op in ("call_function", "call_method") and type(index) is int
            if not known or self._epochs[call] != self._epochs[node] or self._effects[call] is not Effect.NONE:
                return self._reader.argument(tensor, node)
        function = function_of(call.target)
        if function is None:
            return self._reader.argument(tensor, node)
        kwargs = {key: self._known(value) for key, value in call.kwargs.items()}
        return self._reader.read(Call(function, tuple(map(self._known, call.args)), kwargs, tensor, node, index))

    def _known(self, value: Any) -> Any:
        if isinstance(value, Node):
            expression = self._expressions.get(value)
            if expression is None:
                return value
            if expression.source is not value and self._epochs[value] != len(self.barriers):
                # Its memory may have been written since, or that of the node whose value it was.
                expression = self._expressions[value] = self._reader.argument(expression.tensor, value)
            return expression
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
            interior = frozenset(_between(node, [value for value in arguments if isinstance(value, Node)], reader))
            if interior.issuperset(outputs):
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
        wrong = _unlike(wanted, found, bound)
        if wrong is not None:
            attempt.fail(bound, wrong or f"{pattern.name} with {wanted}: the model has {found}")
            return
    orders = [target.inputs]
    if pattern.name in COMMUTATIVE and len(target.inputs) == 2:
        orders.append(target.inputs[::-1])
    for order in orders:
        yield from _unify_all(pattern.inputs, order, bound, attempt)


def _unlike(wanted: Any, found: Any, bound: Bindings) -> str | None:
    """Why a constant is not what the pattern has there; empty if all is said by the two."""
    if isinstance(wanted, AnyFloat):
        number = isinstance(found, (int, float)) and not isinstance(found, bool)
        same = number and same_number(bound.setdefault(wanted, found), found)
        return None if same else f"{wanted.name} is no constant of the model"
    if isinstance(wanted, tuple) and isinstance(found, tuple) and len(wanted) == len(found):
        return next((wrong for each in zip(wanted, found, strict=True) if (wrong := _unlike(*each, bound)) is not None), None)
    return None if same_number(wanted, found) else ""


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


def _between(root: Node, arguments: Sequence[Node], reader: GraphReader) -> Iterator[Node]:
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
        rest += reader.inputs(node)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
