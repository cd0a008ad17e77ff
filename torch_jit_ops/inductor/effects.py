"""What a call does besides making its result: whether it writes memory or changes a mode, whether it draws random numbers.

PyTorch knows: the schemas of the operators that a call makes, and their tags. A call that is not one of the well-known ones is
run on its fake tensors to see its operators. What cannot be known counts as a write.
"""

from __future__ import annotations

import contextlib
import enum
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx import Node
from torch.fx.node import map_arg
from torch.overrides import get_overridable_functions
from torch.utils._python_dispatch import TorchDispatchMode

from torch_jit_ops.inductor.calls import Function, function_of


class Effect(enum.Enum):
    """The worst that a call does."""

    NONE = 0
    DRAWS = 1
    WRITES = 2  # or does what is not known


# Functions that do nothing else, of those that models call most: only to save the time of a run. Any other is run.
_PURE = """
    add mul sub div pow neg abs sqrt rsqrt reciprocal square exp log sin cos tanh sigmoid silu relu gelu softmax
    mean sum matmul linear mm bmm addmm baddbmm embedding cat stack where clamp eq ne lt le gt ge bitwise_and
    bitwise_or and_ or_ invert to float half bfloat16 double int long bool type type_as contiguous detach alias
    clone view reshape transpose permute t expand expand_as flatten unflatten squeeze unsqueeze chunk split
    split_with_sizes tensor_split narrow slice unbind getitem size dim numel stride rms_norm layer_norm
"""
_PURE_PYTHON = ("F.silu", "F.relu", "F.softmax", "F.layer_norm", "F.rms_norm", "F.sigmoid", "F.tanh")
_WELL_KNOWN = frozenset(_PURE.split())


def effect_of(node: Node) -> Effect:
    """Of a node in a graph that Dynamo has traced."""
    if node.op == "call_module":
        return Effect.WRITES
    if node.op not in ("call_function", "call_method"):
        return Effect.NONE
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return Effect.WRITES
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)) and function_of(target) is None:
        overloads = [target] if isinstance(target, torch._ops.OpOverload) else [*_overloads(target)]
        return max((_effect_of_op(op, node.args, node.kwargs) for op in overloads), key=lambda effect: effect.value)
    if not _has_tensors(node):
        return Effect.NONE if _is_of_numbers(target) else Effect.WRITES if not _may_be_run(target) else _seen(node)
    if any(type(value) not in _PLAIN for value in _tensors_of(node)):
        return Effect.WRITES  # a subclass does what it likes
    if target is getattr:
        return Effect.NONE
    function = function_of(target)
    if function is not None and _is_known_as_pure(function, node):
        return Effect.NONE
    return _seen(node) if _may_be_run(target) else Effect.WRITES


def is_transform(node: Node) -> bool:
    """Whether it begins, ends or serves a transform of ``torch.func``, or forward mode."""
    module, name = (getattr(node.target, key, None) or "" for key in ("__module__", "__name__"))
    return node.op == "call_function" and ("functorch" in module or "forward_ad" in module or "dual" in name)


def is_transformed() -> bool:
    """Whether such a one is at work around what is compiled."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


_PLAIN = (Tensor, FakeTensor, torch.nn.Parameter)


def _is_known_as_pure(function: Function, node: Node) -> bool:
    if "out" in node.kwargs or "inplace" in node.kwargs:
        return False
    if function.name == "F.dropout":
        training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
        return training is False and (len(node.args) < 4 or node.args[3] is False)
    if function.name == "scaled_dot_product_attention":
        dropout = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
        return type(dropout) is float and dropout == 0.0
    return function.name in _WELL_KNOWN or (function.name in _PURE_PYTHON and True not in node.args)


def _is_of_numbers(target: Any) -> bool:
    """Whether a call without tensors does no more than arithmetic."""
    module = getattr(target, "__module__", "")
    return (
        module in (operator.add.__module__, math.sqrt.__module__, "builtins")
        or getattr(target, "__name__", "").startswith("sym_")
        or target in ("size", "dim", "numel", "stride", "__getitem__")
    )


def _may_be_run(target: Any) -> bool:
    """Whether it is a function of tensors, and no switch of a mode: only such a one may be run without harm."""
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return True
    if isinstance(target, str):
        target = getattr(torch.Tensor, target, None)
    if getattr(target, "__module__", None) == operator.add.__module__:
        return True
    name = getattr(target, "__name__", "")
    c: Any = torch._C  # whose stubs lack some of these
    owners = (c._VariableFunctions, c._nn, c._special, c._linalg, c._fft)
    if any(getattr(owner, name, None) is target for owner in owners):
        return True
    return any(target in functions for functions in _overridable().values())


_overridable = get_overridable_functions  # cached by PyTorch


def _has_tensors(node: Node) -> bool:
    return next(_tensors_of(node), None) is not None


def _tensors_of(node: Node) -> Iterator[Any]:
    """Tensors among the arguments, and the result."""
    for other in (*node.all_input_nodes, node):
        value = _value(other)
        yield from (part for part in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(part, Tensor))


def _value(node: Node) -> Any:
    return node.meta.get("example_value", node.meta.get("val"))


def _seen(node: Node) -> Effect:
    """What the operators of the call do, by a run on fake tensors."""
    args, kwargs = map_arg((node.args, node.kwargs), _value)
    tensors = list(_tensors_of(node))
    fake = next((value.fake_mode for value in tensors if isinstance(value, FakeTensor)), None)
    if fake is None:
        return Effect.WRITES
    function = getattr(torch.Tensor, node.target) if isinstance(node.target, str) else node.target
    with without_guards(fake):
        try:
            return watch(function, args, kwargs)[1]
        except Exception:  # whatever the call cannot do on fake tensors: it is not known what it does on others
            return Effect.WRITES


@contextlib.contextmanager
def without_guards(fake: FakeTensorMode) -> Iterator[None]:
    """For runs on fake tensors that leave no trace in what Dynamo knows of sizes."""
    with contextlib.ExitStack() as stack:
        if fake.shape_env is not None:
            stack.enter_context(fake.shape_env.suppress_guards())
            stack.enter_context(fake.shape_env.ignore_fresh_unbacked_symbols())
        stack.enter_context(fake)
        yield


def watch(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Effect]:
    """Call ``function``, and say what its operators do. At the first write it stops, without having written."""
    watcher = _Watcher([*_flat(args), *_flat(list(kwargs.values()))])
    try:
        with torch.no_grad(), watcher:
            result = function(*args, **kwargs)
    except _Written:
        return None, Effect.WRITES
    return result, watcher.effect if watcher.seen else Effect.WRITES


class _Written(Exception):
    """A call writes what was there before it."""


class _Watcher(TorchDispatchMode):
    def __init__(self, given: Sequence[Any]) -> None:
        TorchDispatchMode.__init__(self)
        self.effect = Effect.NONE
        self.seen = False
        self._memory = {_memory(value) for value in given if isinstance(value, Tensor)}

    def __torch_dispatch__(self, op: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.seen = True
        effect = _effect_of_op(op, args, kwargs, self._memory)
        if effect is Effect.WRITES:
            raise _Written
        if effect is Effect.DRAWS:
            self.effect = Effect.DRAWS
        return op(*args, **kwargs)


def _effect_of_op(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], memory: set[int] | None = None) -> Effect:
    """``memory``: what was there before; a write to other memory is none. Without it, any write is one."""
    if not isinstance(op, torch._ops.OpOverload):
        return Effect.WRITES
    for index, argument in enumerate(op._schema.arguments):
        writes = argument.alias_info is not None and argument.alias_info.is_write
        # Statistics that normalisation keeps are written without the schema saying so.
        if not writes and argument.name not in ("running_mean", "running_var"):
            continue
        value = args[index] if index < len(args) and not argument.kwarg_only else kwargs.get(argument.name)
        if not writes and (value is None or _argument(op, "training", args, kwargs) is False):
            continue
        written = [part for part in _flat([value]) if isinstance(part, (Tensor, Node))]
        if memory is None or any(isinstance(part, Node) or _memory(part) in memory for part in written):
            return Effect.WRITES
    return Effect.DRAWS if torch.Tag.nondeterministic_seeded in op.tags else Effect.NONE


def _argument(op: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    names = [argument.name for argument in op._schema.arguments]
    if name not in names:
        return None
    position = names.index(name)
    return args[position] if position < len(args) else kwargs.get(name)


def _overloads(packet: Any) -> Iterator[Any]:
    return (getattr(packet, name) for name in packet.overloads() if name != "out")


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _flat(value)
        else:
            yield value
