"""Whether an op may stand where its pattern fits, and why not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from torch_jit_ops.declaring import layout
from torch_jit_ops.inductor.arrangement import arrangement_of, layouts
from torch_jit_ops.inductor.expression import Expression
from torch_jit_ops.inductor.graph_reader import GraphReader, label_of, tensor_of
from torch_jit_ops.inductor.match import Match, has_its_columns
from torch_jit_ops.inductor.pattern import declares_shapes
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
    """What has one size in the sample has one here: the op does not broadcast where PyTorch did. An op that says itself what is
    equal is asked, at the end."""
    pairs = found.tensors()
    main_sample, main = pairs[0][0].tensor, pairs[0][1]
    if main.dim() < 1:
        return "its first argument has no dimension"
    asked = declares_shapes(found.pattern.op)
    for part, tensor in pairs[0 if asked else 1 :]:
        sample, name = part.tensor, part.source
        same_rank = sample.dim() == main_sample.dim() and not asked
        if tensor.dim() != (main.dim() if same_rank else sample.dim()):
            return f"{name} has {tensor.dim()} dimensions"
        depth = tensor.dim() if same_rank and sample.shape == main_sample.shape else min(sample.dim(), main_sample.dim())
        for dim in () if asked else range(-1, -depth - 1, -1):
            in_sample = -dim > sample.dim() or sample.shape[dim] == main_sample.shape[dim]
            if in_sample and not statically_known_true(tensor.shape[dim] == main.shape[dim]):
                return f"{name} is broadcast, {list(tensor.shape)} to {list(main.shape)}"
    return None if asked else _sizes(pairs)


def _sizes(pairs: Sequence[tuple[Expression, Tensor]]) -> str | None:
    """A size of the sample is one size of the model, wherever it stands."""
    main_sample, main = pairs[0][0].tensor, pairs[0][1]
    known: dict[int, int | torch.SymInt] = {}
    for part, tensor in pairs:
        sample, name = part.tensor, part.source
        for dim in range(-1, -sample.dim() - 1, -1):
            if -dim > tensor.dim():
                continue
            if dim < -1 and sample.dim() != main_sample.dim() and main.dim() != main_sample.dim():
                return f"{name} has {tensor.dim()} dimensions"  # which of the model's leading dimensions are meant is not said
            size = known.setdefault(sample.shape[dim], tensor.shape[dim])
            if not statically_known_true(size == tensor.shape[dim]):
                return f"{name} has {tensor.shape[dim]} where {size} is expected, {list(tensor.shape)}"
    return None


def _columns(found: Match, reader: GraphReader) -> str | None:
    return None if has_its_columns(found, reader) else "it takes other columns than the op does"


def _layout(found: Match, reader: GraphReader) -> str | None:
    if arrangement_of(found) is not None:
        return None
    given = layouts(found.pattern.op)
    for part, tensor in found.tensors():
        wanted = given.get(part.source, layout.ROWS)
        if not layout.lies_so(tensor, wanted):
            expected = "which are no rows" if wanted.strides is None else f"expected {wanted}"
            return f"{part.source} has strides {list(tensor.stride())}, {expected}"
    return f"its result would have other strides than {list(tensor_of(found.root).stride())}"


def _order(found: Match, reader: GraphReader) -> str | None:
    first = min(found.interior)
    for barrier in reader.barriers:
        if barrier in found.interior or first < barrier < found.root:
            return f"{label_of(barrier)} is called meanwhile, which may change what it reads or how it computes"
    late = [node for node in found.nodes() if not node < found.place]
    return f"{late[0].name} is computed after {found.place.name}" if late else None


_FREE = ("argument", "to", "half", "every_second", "start", "rest", "unsqueeze")


def _uses(found: Match, reader: GraphReader) -> str | None:
    """A value that is needed elsewhere is computed anyway: the op would compute it again. Casts, halves and other names of a
    value cost nothing; but a hook that is set on one waits for a gradient that would not come."""
    hooks = set(reader.barriers)
    for node in sorted(found.interior - set(found.outputs)):
        expression = reader[node]
        free = expression is None or expression.name in _FREE or reader.is_alias(node)
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


def _derivatives(found: Match, reader: GraphReader) -> str | None:
    """Of results that one op makes, all need a derivative or none does."""
    needing = [node for node in found.outputs if tensor_of(node).requires_grad]
    others = [node for node in found.outputs if node not in needing]
    if len(found.pattern.roots) > 1 and needing and others:
        return f"{needing[0].name} needs a derivative, and {others[0].name} does not"
    return None


def _asked(found: Match, reader: GraphReader) -> str | None:
    """An op that says what its tensors must be is asked: it has to make what the model has of tensors without memory."""
    arrangement = arrangement_of(found) if declares_shapes(found.pattern.op) else None
    if arrangement is None:
        return None
    if not all(isinstance(tensor_of(node), FakeTensor) for node in (*found.nodes(), *found.outputs)):
        return "its tensors are no fake ones"
    try:
        made = arrangement.results_of(found)
    except (RuntimeError, ValueError) as error:
        return f"the op refuses it: {' '.join(str(error).split())}"
    for result, node in zip(made, found.outputs, strict=True):
        wanted = arrangement.turned(tensor_of(node))
        equal = [mine == theirs for mine, theirs in zip(result.shape, wanted.shape, strict=True)]
        if result.dtype != wanted.dtype or not all(map(statically_known_true, equal)):
            return f"{node.name} has the shape {list(wanted.shape)}, the op makes {list(result.shape)}"
    return None


_CHECKS: tuple[Objection, ...] = (_device, _shapes, _columns, _layout, _order, _uses, _writes, _saved, _derivatives, _asked)
