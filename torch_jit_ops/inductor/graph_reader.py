"""What each node of a graph that Dynamo has traced computes, and what it does besides."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node

from torch_jit_ops.inductor.calls import function_of
from torch_jit_ops.inductor.effects import Effect, effect_of
from torch_jit_ops.inductor.expression import OF_THE_FIRST, Call, Expression, Reader


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
        named: the nodes that compute an expression of that name first, in their order.
        at: the node that is looked at.
    """

    def __init__(self) -> None:
        self._reader = Reader()
        self._expressions: dict[Node, Expression] = {}
        self._epochs: dict[Node, int] = {}
        self._effects: dict[Node, Effect] = {}
        self._sharing: dict[int, list[Node]] = defaultdict(list)
        self.barriers: list[Node] = []
        self.named: dict[str, list[Node]] = defaultdict(list)
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
                expression = self._expressions[node] = self._read(node, tensor, effect)
                if expression.source is node:
                    self.named[expression.name].append(node)

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
        if isinstance(value, list):  # a graph has a kind of its own
            return list(map(self._known, value))
        return tuple(map(self._known, value)) if type(value) is tuple else value
