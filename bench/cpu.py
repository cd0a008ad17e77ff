"""Time of the CPU kernels beside Inductor's and eager PyTorch.

Method. Outputs passed in, checked against float64 first. Arguments rotate over a few sets, which exceed the last-level cache of
most machines where the call is large, and stay in cache where it is small, as activations do. Blocks of calls, one of every
provider per round; the median over the rounds. Times are of the whole call, from Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from rich.console import Console

from bench import correctness, report
from bench.cases import Case
from bench.providers import PROVIDERS, Call, reason
from bench.results import Result, columns, notes, row
from bench.slots import Slot, make_slots
from bench.timing import Samples, interleave, us_per_call, without_garbage_collection

PROVIDERS_CPU = ("jitk", "eager", "inductor", "copy")

CASES: tuple[Case, ...] = (
    Case("silu_and_mul", (512, 11008)),  # a chunk of prefill of Llama 2 7B: beyond every cache
    Case("silu_and_mul", (8, 1024)),  # a call that costs less than waking the other threads
    Case("silu_and_mul", (1, 11008)),  # decoding
    Case("silu_and_mul", (77, 2880)),  # odd in both
    Case("gelu_tanh_and_mul", (512, 11008)),  # tanh instead of exp
    Case("relu2", (512, 11008)),  # no transcendental: memory alone
    Case("rmsnorm", (512, 4096)),
    Case("rmsnorm", (1, 4096)),
    Case("fused_add_rmsnorm", (512, 4096)),
    Case("layernorm", (512, 4096)),
)
QUICK = CASES[:2]

# Sets of arguments that a call rotates over hold this much, but at most eight.
ROTATION_BYTES = 128 * 2**20
MOST_SLOTS = 8

# One timed block: long beside the clock and short beside a scheduler's slice of a busy machine.
BLOCK_US = 5_000.0


def _cycle(slots: Sequence[Slot]) -> Iterator[Slot]:
    while True:
        yield from slots


def _block(call: Call, slots: Sequence[Slot]) -> Callable[[], float]:
    """A measurement of ``call`` over ``slots`` in turn, of a number of calls that takes about ``BLOCK_US``."""
    turn = _cycle(slots)

    def once() -> None:
        call(next(turn))

    once()
    single = us_per_call(once, len(slots), lambda: None)
    calls = max(1, round(BLOCK_US / max(single, 0.01)))
    return lambda: us_per_call(once, calls, lambda: None)


def measure(case: Case, dtype: torch.dtype, rounds: int, providers: Sequence[str] = PROVIDERS_CPU) -> Result:
    """Check and time every provider on ``case``."""
    size = case.bytes(dtype.itemsize)
    slots = make_slots(case, max(2, min(MOST_SLOTS, ROTATION_BYTES // size)), dtype, torch.device("cpu"))
    allowed = correctness.allowed_error(case.operation, slots)
    blocks: dict[str, Callable[[], float]] = {}
    missing: dict[str, str] = {}
    wrong: dict[str, str] = {}
    errors: dict[str, float] = {}
    with torch.inference_mode():
        for name in providers:
            try:
                call = PROVIDERS[name].bind(case.operation)
                correctness.poison(slots)
                for slot in slots:
                    call(slot)
            except Exception as error:  # Whatever a provider raises, the others are still worth measuring.
                missing[name] = reason(error)
                continue
            if PROVIDERS[name].writes_out:
                errors[name], verdict = correctness.judge(case.operation, slots, allowed)
                if verdict:
                    wrong[name] = verdict
                    continue
            blocks[name] = _block(call, slots)
        with without_garbage_collection():
            samples: dict[str, Samples] = interleave(blocks, rounds)
    return Result(case, size, 1, samples, None, missing, wrong, errors)


def run(
    out: Console, cases: Sequence[Case], dtypes: Sequence[torch.dtype], rounds: int, providers: Sequence[str] = PROVIDERS_CPU
) -> list[tuple[torch.dtype, Result]]:
    """Measure and print a table per dtype."""
    results = []
    for dtype in dtypes:
        of_dtype = [measure(case, dtype, rounds, providers) for case in cases]
        results += [(dtype, result) for result in of_dtype]
        title = f"CPU, {str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads: us per call"
        rows = [[result.case.op, *row(result, providers, "GB/s")] for result in of_dtype]
        report.print_table(out, title, ["op", *columns(providers, "GB/s")], rows, labels=2)
        report.print_notes(out, notes(of_dtype))
    return results
