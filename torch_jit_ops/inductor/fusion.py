"""Puts ops into models that do not know of them."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from torch.fx import Graph, Node

from torch_jit_ops.inductor.match import Attempt, GraphReader, Match, match, tensor_of
from torch_jit_ops.inductor.objections import leading_order, objection
from torch_jit_ops.inductor.pattern import Pattern, patterns_of
from torch_jit_ops.inductor.report import Entry, entry_at
from torch_jit_ops.inductor.rewrite import Rewrite, find_ops, in_module
from torch_jit_ops.op import Op, libraries

# The share of a pattern that fits where a report says why the rest does not: from here on it is no accident.
_NEAR = 0.6


class Fusion(Rewrite):
    """What ``fuse`` returns."""

    def __init__(self, ops: Sequence[Op], where: tuple[str, ...]) -> None:
        super().__init__()
        self._ops = tuple(ops)
        self._where = where
        patterns = sorted((pattern for op in ops for pattern in patterns_of(op)), key=lambda pattern: -pattern.size)
        self._patterns: dict[str, list[Pattern]] = defaultdict(list)
        for pattern in patterns:
            self._patterns[pattern.root.name].append(pattern)

    def __repr__(self) -> str:
        return f"fuse({', '.join(op.qualified_name for op in self._ops)})"

    def describe(self) -> str:
        kernels = [f"{op.qualified_name} {sorted(op.kernels)}" for op in self._ops]
        patterns = sorted(str(pattern) for patterns in self._patterns.values() for pattern in patterns)
        return "\n".join(("fuse", *self._where, *kernels, *patterns))

    def __call__(self, graph: Graph) -> None:
        reader = GraphReader(graph)
        covered: set[Node] = set()
        done: list[Entry] = []
        missed: list[Entry] = []
        for node in reversed(list(graph.nodes)):  # a large pattern before those that are a part of it
            expression = reader[node]
            if node in covered or expression is None or expression.source is not node or not in_module(node, self._where):
                continue
            found, miss = self._best(node, reader)
            if miss is not None:
                missed.append(miss)
            if found is not None:
                _replace(graph, found)
                covered |= found.interior
                done.append(entry_at(found.pattern.op, node))
        self._enter(reversed(done), reversed(missed))

    def _best(self, node: Node, reader: GraphReader) -> tuple[Match | None, Entry | None]:
        """The largest pattern that fits at ``node``, and what to say of one that fits better and may not stand there."""
        expression = reader[node]
        nearest, miss = _NEAR, None
        for pattern in self._patterns.get(expression.name if expression else "", ()):
            attempt = Attempt()
            found = match(pattern, node, reader, attempt)
            against = objection(found, reader) if found is not None else None
            if found is not None and against is None:
                return found, miss if nearest >= 1 else None
            share = 1.0 if found is not None else attempt.fitted / pattern.size
            if share > nearest:
                nearest, miss = share, entry_at(pattern.op, node, against or attempt.reason)
        return None, miss


def _replace(graph: Graph, found: Match) -> None:
    op = found.pattern.op
    with graph.inserting_before(found.place):
        order = leading_order(found)
        arguments = [_permuted(graph, argument, order) for argument in found.arguments]
        made: list[Node] = []
        for index, argument in enumerate(op.signature.arguments):
            if argument.written:
                # What is written is a copy to whoever reads the graph. Inductor leaves it out where nothing reads the original
                # afterwards, and only there objections.py lets the op stand.
                arguments[index] = graph.call_method("clone", (arguments[index],))
                arguments[index].meta = dict(found.arguments[index].meta)
                made.append(arguments[index])
        keywords = {
            argument.name: value
            for argument, value in zip(op.signature.arguments, arguments, strict=True)
            if argument.keyword_only
        }
        positional = [
            value for argument, value in zip(op.signature.arguments, arguments, strict=True) if not argument.keyword_only
        ]
        call = graph.call_function(op.default, tuple(positional), keywords)
        call.meta = {key: value for key, value in found.root.meta.items() if key in ("nn_module_stack", "stack_trace")}
        if not made:
            made = [call]
            tensor = tensor_of(found.root)
            call.meta["example_value"] = tensor.new_empty([tensor.shape[dim] for dim in order or ()])
            if order and order != tuple(sorted(order)):
                made = [graph.call_method("permute", (call, tuple(order.index(dim) for dim in range(len(order)))))]
        if op.signature.results > 1:
            call.meta["example_value"] = tuple(tensor_of(node) for node in found.outputs)
            made = [graph.call_function(operator.getitem, (call, index)) for index in range(op.signature.results)]
    for old, new in zip(found.outputs, made, strict=True):
        new.meta = dict(old.meta)
        old.replace_all_uses_with(new)
    for node in sorted(found.interior, reverse=True):
        if not node.users:
            graph.erase_node(node)


def _permuted(graph: Graph, argument: Any, order: tuple[int, ...] | None) -> Any:
    """``argument`` with its dimensions in that order; weights, which have but one, as they are."""
    if not isinstance(argument, Node) or order is None or order == tuple(sorted(order)) or tensor_of(argument).dim() == 1:
        return argument
    node = graph.call_method("permute", (argument, order))
    node.meta = {**argument.meta, "example_value": tensor_of(argument).permute(order)}
    return node


def fuse(ops: Iterable[str | Op] | None = None, *, where: str | tuple[str, ...] = "*") -> Fusion:
    """Puts ops into a model where it computes what they do: in ``torch.compile(model, options=fuse().options())``, or for all
    that is compiled in ``with fuse():``.

    A place is left as it is where the op would not serve: no kernel for the device, tensors that are no rows, a value on the
    way that is needed elsewhere, a tensor that is written meanwhile. ``report()`` of the result says what was done where.

    Args:
        ops: names (``rmsnorm``, ``mylib::scale``) or ops; by default all that were declared with ``patterns=``.
        where: paths of modules to look into, ``fnmatch`` patterns such as ``layers.*.mlp``.

    Raises:
        ValueError: there is no such op, or it has no spelling that can be found.
    """
    chosen = [op for library in libraries() for op in library.ops.values() if op.patterns is not None]
    return Fusion(chosen if ops is None else find_ops(ops), (where,) if isinstance(where, str) else tuple(where))
