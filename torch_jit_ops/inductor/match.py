"""Finds patterns in a graph, and says why one that nearly fits does not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from torch_jit_ops.inductor.expression import COMMUTATIVE, AnyFloat, Expression, same_number
from torch_jit_ops.inductor.graph_reader import GraphReader, tensor_of
from torch_jit_ops.inductor.pattern import Pattern, at_widths

Bindings = dict[Any, Any]


@dataclass
class Attempt:
    """How many parts of a pattern fit at best, and what is wrong with the next one.

    Attributes:
        exact: whether slices must be as wide as the pattern's.
    """

    fitted: int = -1
    reason: str = ""
    exact: bool = False

    def fail(self, bound: Bindings, reason: str, fitted: int | None = None) -> None:
        fitted = len(bound) if fitted is None else fitted
        if fitted > self.fitted:
            self.fitted, self.reason = fitted, reason


@dataclass(frozen=True)
class Match:
    """Where a pattern fits.

    Attributes:
        arguments: of the op: nodes and constants.
        squeezed: by its place among ``arguments``, a dimension of size 1 that an argument has in the model and not in the op.
        outputs: the nodes whose values the op makes, in the order of the pattern's outputs.
        interior: all nodes whose values are computed on the way, outputs included.
        place: the node before which the op goes: ahead of everything that uses what it makes.
    """

    pattern: Pattern
    arguments: tuple[Any, ...]
    squeezed: Mapping[int, int]
    outputs: tuple[Node, ...]
    interior: frozenset[Node] = field(repr=False)
    place: Node

    @property
    def root(self) -> Node:
        """The last node of all that is computed."""
        return max(self.outputs)

    def nodes(self) -> list[Node]:
        """The op's arguments that are nodes."""
        return [argument for argument in self.arguments if isinstance(argument, Node)]

    def tensors(self) -> list[tuple[Expression, Tensor]]:
        """The op's arguments that are tensors, as in the pattern and as in the model."""
        found = []
        for index, (part, node) in enumerate(zip(self.pattern.arguments, self.arguments, strict=True)):
            if isinstance(part, Expression):
                tensor = tensor_of(node)
                found.append((part, tensor.squeeze(self.squeezed[index]) if index in self.squeezed else tensor))
        return found


def matches(
    pattern: Pattern, node: Node, reader: GraphReader, attempt: Attempt, needed: Mapping[Node, Node]
) -> Iterator[Match]:
    """Fit ``pattern`` to the computation of ``node``, which is the last of the op's results. ``attempt`` says how far it went.

    An op that makes several results of which none is computed from the others may have them from anywhere ahead of ``node``:
    the nearest comes first.

    Args:
        needed: where an argument of another op is used, if that is ahead of the model's own use of it.
    """
    expression = reader[node]
    if expression is None or expression.source is not node or (len(pattern.roots) > 1 and not node.users):
        return
    for root in reversed(pattern.roots):
        others = [other for other in pattern.roots if other is not root]
        for bound in _unify(root, expression, {}, attempt):
            for whole in _join(others, node, bound, reader, attempt):
                found = _resolve(pattern, whole, node, reader, attempt, needed)
                if found is not None:
                    yield found
                    if not others:
                        return
            if others:
                reason = f"what else {pattern.op.name} makes is not computed ahead of {node.name}"
                attempt.fail(bound, reason, pattern.size)


def has_its_columns(found: Match, reader: GraphReader) -> bool:
    """Whether slices have the columns that the op takes of tensors as wide as these: its spelling is recorded of such."""
    if not {"start", "rest"} & {part.name for part in found.pattern.parts}:
        return True
    widths = tuple(tensor.shape[-1] if tensor.dim() > 0 else 0 for _, tensor in found.tensors())
    if not all(type(width) is int for width in widths):
        return False
    exact = at_widths(found.pattern, widths)
    bounds: list[Bindings] = [{}]
    for output, node in zip(exact.outputs if exact is not None else (), found.outputs, strict=exact is not None):
        bounds = [each for bound in bounds for each in _unify_all([output], [reader[node]], bound, Attempt(exact=True))]
    return exact is not None and len(bounds) > 0


def _join(
    roots: Sequence[Expression], before: Node, bound: Bindings, reader: GraphReader, attempt: Attempt
) -> Iterator[Bindings]:
    """Fit the other results of an op, too."""
    if not roots:
        yield bound
        return
    for node in reversed(reader.named[roots[-1].name]):
        if node < before and node.users:
            for found in _unify_all(roots[-1:], [reader[node]], bound, Attempt()):
                yield from _join(roots[:-1], before, found, reader, attempt)


def _resolve(
    pattern: Pattern, bound: Bindings, node: Node, reader: GraphReader, attempt: Attempt, needed: Mapping[Node, Node]
) -> Match | None:
    squeezed, arguments = {}, []
    for index, argument in enumerate(pattern.arguments):
        value = bound[argument] if isinstance(argument, (Expression, AnyFloat)) else argument
        if isinstance(value, Expression) and value.name == "squeeze":
            squeezed[index] = value.constants[0]
            value = value.inputs[0]
        arguments.append(value.source if isinstance(value, Expression) else value)
    outputs = tuple(bound[output].source for output in pattern.outputs)
    wanted = zip((*pattern.arguments, *pattern.outputs), (*arguments, *outputs), strict=True)
    if all(isinstance(value, Node) for part, value in wanted if isinstance(part, Expression)):
        given = [value for value in arguments if isinstance(value, Node)]
        interior = frozenset().union(*(_between(bound[root].source, given, reader) for root in pattern.roots))
        if interior.issuperset(outputs):
            place = min(outputs)
            if len(pattern.roots) > 1:  # not before it must be: what the later results are made from comes late as well
                users = [user for output in outputs for user in output.users if user not in interior]
                place = min([max(outputs), *users, *(needed[output] for output in outputs if output in needed)])
            return Match(pattern, tuple(arguments), squeezed, outputs, interior, place)
    attempt.fail(bound, "an argument has no place in the graph")
    return None


def _unify(pattern: Expression, target: Expression, bound: Bindings, attempt: Attempt) -> Iterator[Bindings]:
    """Every way in which ``target`` can be what ``pattern`` says, given what was found for its other parts."""
    if pattern in bound:
        if _is_one(bound[pattern], target):
            yield bound
        return
    if pattern.dtype != target.dtype:
        attempt.fail(bound, f"{pattern.name} of {_short(pattern.dtype)}: the model has {_short(target.dtype)}")
        return
    if pattern.name == "argument":
        yield {**bound, pattern: target}
        return
    if pattern.name == "unsqueeze" or (pattern.name in _OF_VIEWS and not attempt.exact):
        inner = _OF_VIEWS[pattern.name](pattern, target)
        if inner is not None:
            yield from _unify_all(pattern.inputs, [inner], {**bound, pattern: target}, attempt)
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


def _is_one(known: Any, target: Expression) -> bool:
    both = known.name == target.name == "squeeze" and known.constants == target.constants
    return known is target or (both and known.inputs[0] is target.inputs[0])


def _squeezed(pattern: Expression, target: Expression) -> Expression | None:
    """What has a dimension of size 1 more in ``target``, as something that is spread over heads."""
    if target.name == "unsqueeze" and target.constants == pattern.constants:
        return target.inputs[0]
    dim = pattern.constants[0]
    if target.tensor.dim() != pattern.tensor.dim() or not statically_known_true(target.tensor.shape[dim] == 1):
        return None
    return Expression("squeeze", (target,), (dim,), target.dtype, target.tensor.squeeze(dim))


def _started(pattern: Expression, target: Expression) -> Expression | None:
    """The tensor whose first columns, as many as there may be, are ``target``: it may be all of them."""
    first_half = target.name == "half" and target.constants == (0,)
    return target.inputs[0] if target.name == "start" or first_half else target


def _ended(pattern: Expression, target: Expression) -> Expression | None:
    last_half = target.name == "half" and target.constants == (1,)
    return target.inputs[0] if target.name == "rest" or last_half else None


_OF_VIEWS = {"unsqueeze": _squeezed, "start": _started, "rest": _ended}


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
