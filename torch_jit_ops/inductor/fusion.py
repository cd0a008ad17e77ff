"""Puts ops into models that do not know of them."""

from __future__ import annotations

import operator
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node

from torch_jit_ops import registry
from torch_jit_ops.inductor.arrangement import Arrangement, arrangement_of
from torch_jit_ops.inductor.effects import is_transform, is_transformed
from torch_jit_ops.inductor.graph_reader import GraphReader, label_of, tensor_of
from torch_jit_ops.inductor.match import Attempt, Match, matches
from torch_jit_ops.inductor.objections import objection
from torch_jit_ops.inductor.pattern import Pattern, patterns_of
from torch_jit_ops.inductor.report import Entry, entry_at, line_of, module_of
from torch_jit_ops.inductor.rewrite import Rewrite, in_module
from torch_jit_ops.op import Op
from torch_jit_ops.registry import find_ops

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
            for name in dict.fromkeys(root.name for root in pattern.roots):
                self._patterns[name].append(pattern)

    def __repr__(self) -> str:
        return f"fuse({', '.join(op.qualified_name for op in self._ops)})"

    def describe(self) -> str:
        kernels = [f"{op.qualified_name} {sorted(op.declaration.kernels)}" for op in self._ops]
        patterns = sorted(str(pattern) for patterns in self._patterns.values() for pattern in patterns)
        return "\n".join(("fuse", *self._where, *kernels, *patterns))

    def __call__(self, graph: Graph) -> None:
        reader = GraphReader()
        done: list[Entry] = []
        missed: list[Entry] = []
        try:
            switch = next(filter(is_transform, graph.nodes), None)
            if switch is not None or is_transformed():
                # The derivative, or the batch, is taken of the model's own functions. The tensors within a transform cannot be
                # looked at once it was left.
                at = switch or next(iter(graph.nodes))
                self._enter((), (), [_untouched(at, "torch.func or forward mode is at work in it")])
                return
            reader.read(graph)
            places = list(self._places(graph, reader, done, missed))
        except Exception as error:  # the model compiles without the ops, whatever this pass did not expect of it
            at = reader.at or next(iter(graph.nodes))
            entry = _untouched(at, f"{type(error).__name__}: {error}")
            if entry not in self.report().untouched:
                warnings.warn(f"fuse left a graph as it was. {entry}", RuntimeWarning, stacklevel=2)
            self._enter((), (), [entry])
            return
        _put(graph, places)
        self._enter(reversed(done), reversed(missed))

    def _places(self, graph: Graph, reader: GraphReader, done: list[Entry], missed: list[Entry]) -> Iterator[_Place]:
        """What to put where, from the last to the first. Nothing is changed yet."""
        covered: set[Node] = set()
        needed: dict[Node, Node] = {}  # where the first of the ops behind takes a value
        for node in reversed(list(graph.nodes)):  # a large pattern before those that are a part of it
            reader.at = node
            expression = reader[node]
            if node in covered or expression is None or expression.source is not node or not in_module(node, self._where):
                continue
            found, miss = self._best(node, reader, covered, needed)
            if miss is not None:
                missed.append(miss)
            if found is not None:
                yield _place(found, frozenset(filter(reader.is_pure, found.interior)))
                covered |= found.interior
                for argument in found.nodes():
                    needed[argument] = min(found.place, needed.get(argument, found.place))
                done.append(entry_at(found.pattern.op, node))

    def _best(
        self, node: Node, reader: GraphReader, covered: set[Node], needed: dict[Node, Node]
    ) -> tuple[Match | None, Entry | None]:
        """The largest pattern that fits at ``node``, and what to say of one that fits better and may not stand there."""
        expression = reader[node]
        nearest, miss = _NEAR, None
        for pattern in self._patterns.get(expression.name if expression else "", ()):
            attempt = Attempt()
            against = None
            for found in matches(pattern, node, reader, attempt, needed):
                if not covered.isdisjoint(found.outputs):
                    reason: str | None = "another op makes one of its results already"
                else:
                    reason = objection(found, reader)
                if reason is None:
                    other = miss is not None and miss.op != pattern.op.qualified_name
                    return found, miss if nearest >= 1 and other else None
                against = against or reason
            share = 1.0 if against is not None else attempt.fitted / pattern.size
            if share > nearest:
                nearest, miss = share, entry_at(pattern.op, node, against or attempt.reason)
        return None, miss


def _untouched(node: Node, reason: str) -> Entry:
    label = label_of(node) if node.op in ("call_function", "call_method") else node.name
    return Entry(label, module_of(node), line_of(node), reason)


@dataclass(frozen=True)
class _Place:
    """An op, where it goes, and what has to be made for it: all that could fail is done.

    Attributes:
        arrangement: how the op is called.
        arguments: the fake tensors of those arguments that are given in another shape.
        example: the op's own result.
        spent: the nodes that go unless something else uses them.
    """

    found: Match
    arrangement: Arrangement
    arguments: dict[int, list[_Step]]
    example: Any
    spent: frozenset[Node]


@dataclass(frozen=True)
class _Step:
    """A view that an argument is given as: a method, what it is called with, and what it makes of the fake tensor."""

    method: str
    parameter: Any
    tensor: Tensor


def _place(found: Match, spent: frozenset[Node]) -> _Place:
    arrangement = arrangement_of(found)
    if arrangement is None:
        raise RuntimeError(f"{found.pattern.op.qualified_name} has no arrangement at {found.root.name}")
    steps: dict[int, list[_Step]] = defaultdict(list)
    for index, value in enumerate(found.arguments):
        if not isinstance(value, Node):
            continue
        tensor = tensor_of(value)
        if index in found.squeezed:
            tensor = tensor.squeeze(found.squeezed[index])
            steps[index].append(_Step("squeeze", found.squeezed[index], tensor))
        if arrangement.is_turned(tensor):
            steps[index].append(_Step("permute", arrangement.order, arrangement.turned(tensor)))
    example: Any = None
    wanted = [arrangement.turned(tensor_of(node)) for node in found.outputs]
    if found.pattern.op.signature.results > 1:
        example = tuple(tensor.new_empty(tensor.shape) for tensor in wanted)
    elif found.pattern.op.signature.results == 1:
        example = wanted[0].new_empty(wanted[0].shape)
    return _Place(found, arrangement, steps, example, spent)


def _put(graph: Graph, places: Sequence[_Place]) -> None:
    replaced: dict[Node, Node] = {}  # a result of one may be an argument of the next
    for place in places:
        made = _insert(graph, place, replaced)
        for old, new in zip(place.found.outputs, made, strict=True):
            new.meta = dict(old.meta)
            old.replace_all_uses_with(new)
            replaced[old] = new
    for node in sorted(set().union(*(place.spent for place in places)), reverse=True):
        if not node.users:
            graph.erase_node(node)


def _insert(graph: Graph, place: _Place, replaced: dict[Node, Node]) -> list[Node]:
    """The nodes that stand for the outputs of what was found."""
    found, arrangement = place.found, place.arrangement
    op = found.pattern.op
    with graph.inserting_before(found.place):
        arguments = []
        written: list[Node] = []
        for index, (parameter, given) in enumerate(zip(op.signature.arguments, arrangement.arguments_of(found), strict=True)):
            argument = replaced.get(given, given) if isinstance(given, Node) else given
            for step in place.arguments.get(index, ()):
                argument = graph.call_method(step.method, (argument, step.parameter))
                argument.meta = {**given.meta, "example_value": step.tensor}
            if parameter.written:
                # What is written is a copy to whoever reads the graph. Inductor leaves it out where nothing reads the original
                # afterwards, and only there objections.py lets the op stand.
                argument = graph.call_method("clone", (argument,))
                argument.meta = dict(given.meta)
                written.append(argument)
            arguments.append(argument)
        pairs = list(zip(op.signature.arguments, arguments, strict=True))
        positional = tuple(value for parameter, value in pairs if not parameter.keyword_only)
        call = graph.call_function(
            op.default, positional, {parameter.name: value for parameter, value in pairs if parameter.keyword_only}
        )
        call.meta = {key: value for key, value in found.root.meta.items() if key in ("nn_module_stack", "stack_trace")}
        if written:
            return written
        call.meta["example_value"] = place.example
        made = [call]
        if op.signature.results > 1:
            made = [graph.call_function(operator.getitem, (call, index)) for index in range(op.signature.results)]
            for result, tensor in zip(made, place.example, strict=True):
                result.meta = {**call.meta, "example_value": tensor}
        if arrangement.order is not None:
            made = [graph.call_method("permute", (result, arrangement.back)) for result in made]
        return made


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
    chosen = [op for op in registry.ops() if op.declaration.patterns is not None]
    return Fusion(chosen if ops is None else find_ops(ops), (where,) if isinstance(where, str) else tuple(where))
