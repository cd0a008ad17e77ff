"""Takes ops apart where a model calls them, so that Inductor fuses what they do with its neighbours."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from torch_jit_ops.inductor.report import entry_at
from torch_jit_ops.inductor.rewrite import Rewrite, in_module
from torch_jit_ops.op import Op
from torch_jit_ops.registry import find_ops


class Decomposition(Rewrite):
    """What ``decompose`` returns."""

    def __init__(self, ops: Sequence[Op], where: tuple[str, ...]) -> None:
        super().__init__()
        self._ops = tuple(ops)
        self._where = where

    def __repr__(self) -> str:
        return f"decompose({', '.join(op.qualified_name for op in self._ops)})"

    def describe(self) -> str:
        files = {inspect.getfile(op.reference) for op in self._ops}
        sources = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in sorted(files)]
        return "\n".join(("decompose", *self._where, *(op.qualified_name for op in self._ops), *sources))

    def __call__(self, graph: Graph) -> None:
        ops: dict[Any, Op] = {op.packet: op for op in self._ops} | {op.default: op for op in self._ops}
        done = []
        for node in list(graph.nodes):
            op = ops.get(node.target) if node.op == "call_function" else None
            if op is None or "out" in node.kwargs or not in_module(node, self._where):
                continue
            done.append(entry_at(op, node))
            _inline(graph, node, op)
        self._enter(done)


def _inline(graph: Graph, call: Node, op: Op) -> None:
    """Put the reference's own calls in the place of ``call``."""
    bound = op.declaration.arguments(*call.args, **call.kwargs)
    nodes = [value for value in bound if isinstance(value, Node)]
    examples = [node.meta.get("example_value", node.meta.get("val")) for node in nodes]

    def reference(*values: Any) -> Any:
        given = iter(values)
        filled = [next(given) if isinstance(value, Node) else value for value in bound]
        names = [argument.name for argument in op.signature.arguments if argument.keyword_only]
        positional = filled[: len(filled) - len(names)]
        return op.reference(*positional, **dict(zip(names, filled[len(positional) :], strict=True)))

    with torch.no_grad():  # what autograd would add comes when the whole graph is differentiated
        traced = make_fx(reference)(*[value.detach() if isinstance(value, Tensor) else value for value in examples])
    with graph.inserting_before(call):
        results = _copy(graph, traced.graph, nodes, traced, call)
    for name, value in call.meta.items():
        for result in results:
            result.meta.setdefault(name, value)
    if op.signature.results == 1:
        results[0].meta = dict(call.meta)
        call.replace_all_uses_with(results[0])
    else:
        for user in list(call.users):  # a getitem for each result; an op without results has no users
            place: Any = user.args[1]
            user.replace_all_uses_with(results[place])
            graph.erase_node(user)
    graph.erase_node(call)


def _copy(graph: Graph, traced: Graph, nodes: Sequence[Node], owner: torch.nn.Module, call: Node) -> list[Node]:
    where = {key: call.meta[key] for key in ("nn_module_stack", "stack_trace") if key in call.meta}
    copies: dict[Node, Any] = dict(zip((node for node in traced.nodes if node.op == "placeholder"), nodes, strict=True))
    for node in traced.nodes:
        if node.op == "call_function":
            copies[node] = graph.node_copy(node, lambda inner: copies[inner])
            copies[node].meta = {**where, "example_value": node.meta.get("val")}
        elif node.op == "get_attr":
            # A constant of the reference, such as torch.tensor(1.0): made anew in the graph from its value.
            raise NotImplementedError(f"the reference holds the tensor {getattr(owner, str(node.target))}; use its value")
        elif node.op == "output":
            results = node.args[0] if isinstance(node.args[0], (tuple, list)) else [node.args[0]]
            return [map_arg(result, lambda inner: copies[inner]) for result in results if isinstance(result, Node)]
    return []


def decompose(ops: Iterable[str | Op] | str | Op, *, where: str | tuple[str, ...] = "*") -> Decomposition:
    """Calls of ``ops`` become their PyTorch functions: in ``torch.compile(model, options=decompose("rmsnorm").options())``, or
    for all that is compiled in ``with decompose(...):``. The derivative is that of the function.

    At one place in a model's own code, ``rmsnorm.reference(x, weight)`` of the declared op is the same.

    Args:
        ops: names (``rmsnorm``, ``mylib::scale``) or ops. Their ``.out`` forms stay.
        where: paths of modules, ``fnmatch`` patterns such as ``layers.*.mlp``.

    Raises:
        ValueError: there is no such op.
    """
    chosen = [ops] if isinstance(ops, (str, Op)) else ops
    return Decomposition(find_ops(chosen), (where,) if isinstance(where, str) else tuple(where))
