"""DTensor's sharding rules of ops, derived from what an op declares about its rows.

    rmsnorm: Rows("input")                       input Shard(0), weight Replicate  ->  result Shard(0)
    rmsnorm_backward: sums=("grad_weight",)      the same, and grad Shard(0)       ->  grad_input Shard(0), grad_weight Partial
    apply_rope: per_token=("positions",)         q, k Shard(0), positions Shard(0); q, k Shard(1), positions Replicate

``register`` is called whenever an op's fake runs. DTensor runs it to learn the results' shapes, just before it looks for the
rule; so nothing must be called beforehand, and a program without DTensors pays a look into ``sys.modules``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from torch_jit_ops import forks
from torch_jit_ops.declaring.rows import Rows
from torch_jit_ops.declaring.signature import Argument, Signature

_registered: set[Any] = set()
_lock = forks.Lock()


def register(overload: Any, signature: Signature, results: Sequence[str], rows: Rows) -> None:
    """Give DTensor the rule of an overload, if this process can have DTensors and nobody has given it another.

    Args:
        overload: of PyTorch.
        signature: of the overload.
        results: names of what it returns; of the out form, those of arguments.
        rows: what the op declares. Without arguments there is no rule, and DTensor says so.
    """
    if not rows.arguments or overload in _registered or "torch.distributed.tensor" not in sys.modules:
        return
    # Dynamo imports DTensor, too: whoever compiles for one device need not wait for the rest of it.
    if not torch.distributed.is_initialized():
        return
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.experimental import register_sharding

    def acceptable(*args: Any, **kwargs: Any) -> list[tuple[list[Any], list[Any]]]:
        return _acceptable(overload.name(), signature, results, rows, args, kwargs)

    propagator = DTensor._op_dispatcher.sharding_propagator
    with _lock:
        if overload in _registered:
            return
        if overload not in propagator.op_strategy_funcs and overload not in propagator.op_single_dim_strategy_funcs:
            register_sharding(overload)(acceptable)
            propagator.op_to_schema_info[overload] = _what_decides(signature)
        _registered.add(overload)


def _what_decides(signature: Signature) -> Any:
    """The arguments for which DTensor remembers a decision, beside DTensors that are passed by position.

    ``register_sharding`` names integers only (PyTorch 2.11 to 2.13), and a call with another bool gets the shape of the last
    one's result, or an out form the rule of another ``out``. Names of arguments by position are needed, too: with no name at
    all, the decision of the very first call, for which DTensor did not have this list yet, would be found again.
    """
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo

    plain = [i for i, argument in enumerate(signature.arguments) if argument.kind != "T"]
    return RuntimeSchemaInfo(
        static_argnum=min(plain, default=len(signature.arguments)),
        static_kwargkey=[argument.name for argument in signature.arguments],
    )


def _acceptable(
    who: str, signature: Signature, results: Sequence[str], rows: Rows, args: Sequence[Any], kwargs: dict[str, Any]
) -> list[tuple[list[Any], list[Any]]]:
    """For one dimension of the mesh: placements of the results, and of the tensors given, that go together."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    by_name = {argument.name: argument for argument in signature.arguments}
    given = [*zip(signature.arguments, args, strict=False), *((by_name[name], value) for name, value in kwargs.items())]
    tensors = [(argument, spec) for argument, spec in given if argument.kind == "T" and spec is not None]
    dims = min((spec.ndim for argument, spec in tensors if argument.name in rows.arguments), default=0)

    lengths = {argument.name: spec.ndim for argument, spec in tensors}

    def placed(name: str, dim: int) -> Any:
        if name in rows.sums:
            return Partial()
        if name in rows.per_token and dim < lengths.get(name, 0):
            return Shard(dim)
        return Shard(dim) if name in rows.arguments or name in results else Replicate()

    names = (*by_name, *results)
    ways = [{name: Replicate() for name in names}]
    ways += [{name: placed(name, dim) for name in names} for dim in range(dims if rows.elementwise else dims - 1)]
    # DTensor redistributes into a copy, which is no use for what is written, and never what is passed by keyword.
    if any(argument.written or argument.keyword_only for argument, _ in tensors):
        ways = _as_they_are(who, ways, tensors)
    return [([way[name] for name in results], [way[argument.name] for argument, _ in tensors]) for way in ways]


def _as_they_are(who: str, ways: list[dict[str, Any]], tensors: list[tuple[Argument, Any]]) -> list[dict[str, Any]]:
    """Those of the ways that the tensors come in, so that there is nothing to redistribute.

    Raises:
        RuntimeError: they come in none of them; or a tensor has fewer rows than shards, which DTensor would gather.
    """
    fitting = []
    mesh = tensors[0][1].mesh
    for mesh_dim in range(mesh.ndim):
        found = {argument.name: spec.placements[mesh_dim] for argument, spec in tensors}
        way = next((way for way in ways if all(way[name] == placement for name, placement in found.items())), None)
        if way is None:
            raise RuntimeError(
                f"{who}: a DTensor that is written or passed by keyword cannot be redistributed\n"
                f"  expected  {f'{chr(10)}            '.join(_described(way, tensors) for way in ways)}\n"
                f"  got       {_described(found, tensors)}\n  remedy: redistribute() it before the call"
            )
        fitting += [way] if way not in fitting else []
    for argument, spec in tensors:
        for dim, length in enumerate(spec.shape):
            shards = 1
            for mesh_dim, placement in enumerate(spec.placements):
                shards *= mesh.size(mesh_dim) if placement.is_shard(dim) else 1
            if length < shards:
                raise RuntimeError(
                    f"{who}: argument {argument.name!r} cannot be used as it is sharded\n"
                    f"  expected  at least {shards} in dimension {dim}, one for each shard\n  got       {length}\n"
                    "  remedy: replicate it before the call"
                )
    return fitting


def _described(way: dict[str, Any], tensors: list[tuple[Argument, Any]]) -> str:
    return ", ".join(f"{argument.name} {way[argument.name]!r}" for argument, _ in tensors)
