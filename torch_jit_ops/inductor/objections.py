"""Whether an op may stand where its pattern fits, and why not."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from torch_jit_ops.declaring import layout
from torch_jit_ops.inductor.expression import Expression
from torch_jit_ops.inductor.match import GraphReader, Match, label_of, tensor_of
from torch_jit_ops.op import Op

Objection = Callable[[Match, GraphReader], str | None]


def objection(found: Match, reader: GraphReader) -> str | None:
    """Why the op must not stand where ``found`` is, or None."""
    return next(filter(None, (check(found, reader) for check in _CHECKS)), None)


def _device(found: Match, reader: GraphReader) -> str | None:
    devices = {tensor_of(node).device.type for node in found.nodes()}
    missing = devices - served(found.pattern.op)
    return f"the op has no kernel for {', '.join(sorted(missing))}" if missing else None


def served(op: Op) -> set[str]:
    """The types of devices on which the op is more than its reference."""
    return set(op.declaration.kernels)


def _shapes(found: Match, reader: GraphReader) -> str | None:
    """What has one size in the sample has one here: the op does not broadcast where PyTorch did."""
    pairs = [
        (part.tensor, tensor_of(node), part.source)
        for part, node in zip(found.pattern.arguments, found.arguments, strict=True)
        if isinstance(part, Expression)
    ]
    main_sample, main = pairs[0][:2]
    if main.dim() < 1:
        return "its first argument has no dimension"
    for sample, tensor, name in pairs[1:]:
        same_rank = sample.dim() == main_sample.dim()
        if tensor.dim() != (main.dim() if same_rank else sample.dim()):
            return f"{name} has {tensor.dim()} dimensions"
        depth = tensor.dim() if same_rank and sample.shape == main_sample.shape else min(sample.dim(), main_sample.dim())
        for dim in range(-1, -depth - 1, -1):
            in_sample = -dim > sample.dim() or sample.shape[dim] == main_sample.shape[dim]
            if in_sample and not statically_known_true(tensor.shape[dim] == main.shape[dim]):
                return f"{name} is broadcast, {list(tensor.shape)} to {list(main.shape)}"
    return _sizes(pairs)


def _sizes(pairs: Sequence[tuple[Tensor, Tensor, str]]) -> str | None:
    """A size of the sample is one size of the model, wherever it stands."""
    main_sample, main = pairs[0][:2]
    known: dict[int, int | torch.SymInt] = {}
    for sample, tensor, name in pairs:
        for dim in range(-1, -sample.dim() - 1, -1):
            if -dim > tensor.dim():
                continue
            if dim < -1 and sample.dim() != main_sample.dim() and main.dim() != main_sample.dim():
                return f"{name} has {tensor.dim()} dimensions"  # which of the model's leading dimensions are meant is not said
            size = known.setdefault(sample.shape[dim], tensor.shape[dim])
            if not statically_known_true(size == tensor.shape[dim]):
                return f"{name} has {tensor.shape[dim]} where {size} is expected, {list(tensor.shape)}"
    return None


def _layout(found: Match, reader: GraphReader) -> str | None:
    if leading_order(found) is not None:
        return None
    for part, node in zip(found.pattern.arguments, found.arguments, strict=True):
        if isinstance(part, Expression) and not is_rows(tensor_of(node)):
            return f"{part.source} has strides {list(tensor_of(node).stride())}, which are no rows"
    return f"its result would have other strides than {list(tensor_of(found.root).stride())}"


def leading_order(found: Match) -> tuple[int, ...] | None:
    """The order of dimensions in which the op's tensors are rows; None if there is none.

    What treats each row by itself may take them in any order: heads of queries and keys are often transposed before their
    norm.
    """
    tensors = [tensor_of(node) for node in found.nodes()]
    rank = tensors[0].dim()
    plain = tuple(range(rank))
    if all(map(is_rows, tensors)) and all(_is_dense(tensor_of(node)) for node in found.outputs):
        return plain
    wide = [tensor for tensor in tensors if tensor.dim() > 1]
    if not found.pattern.is_by_rows or len({tensor.dim() for tensor in wide}) != 1 or rank > 5:
        return None
    for leading in itertools.permutations(range(rank - 1)):
        order = (*leading, rank - 1)
        rows = all(is_rows(tensor.permute(order) if tensor.dim() > 1 else tensor) for tensor in tensors)
        if rows and _is_dense(tensor_of(found.root).permute(order)):
            return order
    return None


def is_rows(tensor: Tensor) -> bool:
    """Whether the last dimension is dense and the leading ones walk in equal steps, as kernels want it."""
    return layout.lies_so(tensor, layout.ROWS)


def _is_dense(tensor: Tensor) -> bool:
    """Whether it lies in memory as the op's result does: what is behind it may look at its strides."""
    if tensor.dim() < 2 or not is_rows(tensor):
        return is_rows(tensor)
    row = next(
        (step for size, step in zip(tensor.shape[-2::-1], tensor.stride()[-2::-1], strict=True) if not _is_one(size)), None
    )
    return row is None or statically_known_true(row == tensor.shape[-1])


def _is_one(size: int | torch.SymInt) -> bool:
    return statically_known_true(size == 1)


def _order(found: Match, reader: GraphReader) -> str | None:
    first = min(found.interior)
    for barrier in reader.barriers:
        if barrier in found.interior or first < barrier < found.root:
            return f"{label_of(barrier)} is called meanwhile, which may change what it reads or how it computes"
    late = [node for node in found.nodes() if not node < found.place]
    return f"{late[0].name} is computed after {found.place.name}" if late else None


def _uses(found: Match, reader: GraphReader) -> str | None:
    """A value that is needed elsewhere is computed anyway: the op would compute it again. Casts, halves and other names of a
    value cost nothing; but a hook that is set on one waits for a gradient that would not come."""
    hooks = set(reader.barriers)
    for node in sorted(found.interior - set(found.outputs)):
        expression = reader[node]
        free = expression is None or expression.name in ("to", "half", "argument") or reader.is_alias(node)
        outside = [user for user in node.users if user not in found.interior and (not free or user in hooks)]
        if outside:
            return f"{node.name} is used elsewhere too, by {outside[0].name}"
    return None


def _writes(found: Match, reader: GraphReader) -> str | None:
    """An op that writes its arguments: only where nothing reads them afterwards, so that no copy has to be made."""
    arguments = zip(found.pattern.op.signature.arguments, found.arguments, strict=True)
    written = [node for argument, node in arguments if argument.written]
    if not written:
        return None
    if any(tensor_of(node).requires_grad for node in found.outputs):
        return "it needs a derivative, which an op that writes its arguments has not"
    for node in written:
        for other in reader.sharing(node):
            if other.op not in ("call_function", "call_method"):
                return f"{other.name} is an input of the graph"
            later = [user for user in other.users if user not in found.interior and user > found.place]
            if later:
                return f"{other.name} is read afterwards, by {later[0].name}"
    if len({reader.sharing(node)[0] for node in written}) < len(written):
        return "it would write one tensor for two arguments"
    return None


def _saved(found: Match, reader: GraphReader) -> str | None:
    """What the op keeps for its derivative may not be written behind it. The model's own calls may have kept something else."""
    if not any(tensor_of(node).requires_grad for node in found.outputs):
        return None
    for node in found.nodes():
        users = {user for other in reader.sharing(node) for user in other.users}
        writers = [user for user in reader.barriers if user in users and user > found.place]
        if writers:
            return f"{node.name} is written afterwards, by {writers[0].name}, and needed for the derivative"
    return None


_CHECKS: tuple[Objection, ...] = (_device, _shapes, _layout, _order, _uses, _writes, _saved)
