"""Compiles one graph that calls every op, and calls it with other numbers of tokens: ``recompile_child.py marked inductor``.

A process of its own, since a graph that another test compiled, or a size that Dynamo saw there, would hide what it guards on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import trial_library  # noqa: F401  (its ops join the registry)
import user_library  # noqa: F401  (the same)
from cases import (
    OPS,
    assert_same_bits,
    copy_with_storage,
    devices,
    is_batched,
    last_dtypes,
    samples_of,
    tensors_of,
    tokens_of,
    with_tokens,
)
from torch import Tensor

from torch_jit_ops import Op, Sample

DEVICE = devices()[-1]
TOKENS = 23  # no other size of a sample: Dynamo takes equal sizes for one
Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


def _first_with_tokens(op: Op) -> Sample | None:
    """Of at least two tokens, since Dynamo takes 0 and 1 for constants."""
    samples = samples_of(op, DEVICE, last_dtypes(op))
    return next((with_tokens(sample, TOKENS) for sample in samples if (tokens_of(sample) or 0) > 1), None)


SAMPLES = {op: sample for op in OPS if (sample := _first_with_tokens(op)) is not None}


def calls(tokens: int) -> Calls:
    """Arguments for each op, which the ops may write."""
    samples = [copy_with_storage(with_tokens(sample, tokens)) for sample in SAMPLES.values()]
    return [(tuple(sample.args), dict(sample.kwargs)) for sample in samples]


def run_all(arguments: Calls) -> list[Tensor]:
    """What all ops return and write."""
    found: list[Tensor] = []
    for op, (args, kwargs) in zip(SAMPLES, arguments, strict=True):
        results = op.default(*args, **kwargs)
        found += results if isinstance(results, (tuple, list)) else [] if results is None else [results]
        found += [arg for arg, argument in zip(args, op.signature.arguments, strict=False) if argument.written]
    return found


def _with_rows(arguments: Calls, pick: Callable[[Tensor], Tensor]) -> Calls:
    """``pick`` of each tensor that has as many rows: those with tokens."""
    return [
        (tuple(pick(arg) if isinstance(arg, Tensor) and is_batched(arg, TOKENS) else arg for arg in args), kwargs)
        for args, kwargs in arguments
    ]


def run_nonzero(arguments: Calls, mask: Tensor) -> list[Tensor]:
    """The tokens of the mask: how many there are only the data know."""
    rows = mask.nonzero()[:, 0]
    return run_all(_with_rows(arguments, lambda tensor: tensor.index_select(0, rows)))


def run_item(arguments: Calls, mask: Tensor) -> list[Tensor]:
    """As many of the first tokens as the mask has."""
    first = int(mask.sum().item())
    torch._check(first >= 0)
    torch._check(first <= TOKENS)
    return run_all(_with_rows(arguments, lambda tensor: tensor.narrow(0, 0, first).clone()))


def check(
    compiled: Callable[..., list[Tensor]], plain: Callable[..., list[Tensor]], make: Callable[[], tuple[Any, ...]]
) -> None:
    """Results of a graph are those of eager calls."""
    for index, (actual, expected) in enumerate(zip(compiled(*make()), plain(*make()), strict=True)):
        assert_same_bits(actual, expected, f"result {index}")


def main(scenario: str, backend: str) -> None:
    for name in ("capture_scalar_outputs", "capture_dynamic_output_shape_ops"):
        setattr(torch._dynamo.config, name, True)
    plain = {"nonzero": run_nonzero, "item": run_item}.get(scenario, run_all)
    compiled = torch.compile(plain, fullgraph=True, dynamic=True if scenario == "dynamic" else None, backend=backend)
    sizes = [TOKENS, 2, 5, 64]
    if scenario in ("nonzero", "item"):
        for count in (3, TOKENS, 1, 0, 2):
            mask = torch.arange(TOKENS, device=DEVICE) < count
            check(compiled, plain, lambda mask=mask: (calls(TOKENS), mask))
            torch._dynamo.config.error_on_recompile = True
        sizes = []
    if scenario == "automatic":  # a second size shows Dynamo which sizes change
        for tokens in (TOKENS, 6):
            check(compiled, plain, lambda tokens=tokens: (calls(tokens),))
            torch._dynamo.config.error_on_recompile = tokens == 6
    if scenario == "marked":
        first = calls(TOKENS)
        for args, kwargs in first:
            for tensor in tensors_of(Sample(args, kwargs)):
                if is_batched(tensor, TOKENS):
                    torch._dynamo.mark_dynamic(tensor, 0)
        compiled(first)
        torch._dynamo.config.error_on_recompile = True
    for tokens in sizes:
        check(compiled, plain, lambda tokens=tokens: (calls(tokens),))
        torch._dynamo.config.error_on_recompile = True
    counters = torch._dynamo.utils.counters
    print(
        len(SAMPLES),
        "ops,",
        sum(counters["graph_break"].values()),
        "graph breaks,",
        counters["stats"]["unique_graphs"],
        "graphs",
    )


if __name__ == "__main__":
    with torch.no_grad():
        main(*sys.argv[1:])
