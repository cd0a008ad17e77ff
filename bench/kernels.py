"""Device time of every op beside its peers and beside a copy of the same bytes.

Method. Each provider's calls are captured in a CUDA graph of 32 to 64 calls over rotating buffers of 256 MiB in all, with the
outputs passed in. What the graph writes is compared with a float64 reference before anything is timed. The replays of all
providers are interleaved, and the median is reported with its spread. Bytes are counted from the arguments: every input read
once, every output written once; what is written in place is both. ``copy`` is ``Tensor.copy_`` moving the same number of bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from rich.console import Console

from bench import correctness, replay, report
from bench.cases import Case
from bench.providers import PROVIDERS, default_providers, reason
from bench.results import NOISE, Result, columns, notes, peer_ratio, row, summary
from bench.slots import make_slots, plan

# A case that looks slower than the best peer by more than the noise is measured again, with this many times the replays.
MORE_ROUNDS = 4


class Bench:
    """What the cases of one run share: a stream, what runs ahead of each replay, and the number of replays."""

    def __init__(self, dtype: torch.dtype, rounds: int, providers: Sequence[str] = (), cold: bool = False) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.dtype = dtype
        self.rounds = rounds
        self.providers = tuple(providers)
        self.stream = torch.cuda.Stream(self.device)
        self.ahead = replay.Evictor(self.device) if cold else replay.spin

    @torch.no_grad()
    def run(self, case: Case) -> Result:
        """Check and time every provider on ``case``."""
        size = case.bytes(self.dtype.itemsize)
        arranged = plan(size)
        slots = make_slots(case, arranged.slots, self.dtype, self.device)
        allowed = correctness.allowed_error(case.operation, slots)
        graphs: dict[str, torch.cuda.CUDAGraph] = {}
        missing: dict[str, str] = {}
        wrong: dict[str, str] = {}
        errors: dict[str, float] = {}
        for name in self.providers or default_providers(case.operation):
            try:
                call = PROVIDERS[name].bind(case.operation)
                graph = replay.capture(call, slots, arranged.calls, self.stream)
            except Exception as error:  # Whatever a provider raises, the others are still worth measuring.
                missing[name] = reason(error)
                torch.cuda.synchronize(self.device)
                continue
            if PROVIDERS[name].writes_out:
                correctness.poison(slots)
                if case.operation.written:  # the graph writes each slot several times
                    for slot in slots:
                        call(slot)
                else:
                    graph.replay()
                torch.cuda.synchronize(self.device)
                errors[name], verdict = correctness.judge(case.operation, slots, allowed)
                if verdict:
                    wrong[name] = verdict
                    continue
            graphs[name] = graph
        samples = replay.measure(graphs, arranged.calls, self.rounds, self.ahead, self.stream)
        first = None
        found = peer_ratio(samples)
        if found is not None and found < 1 - NOISE:
            first = samples
            samples = replay.measure(graphs, arranged.calls, self.rounds * MORE_ROUNDS, self.ahead, self.stream)
        return Result(case, size, arranged.calls, samples, first, missing, wrong, errors)


def _progress(text: str) -> None:
    """Dots for whoever watches; a log keeps the tables alone."""
    if sys.stderr.isatty():
        print(text, end="", file=sys.stderr, flush=True)


def run(
    out: Console,
    cases: Sequence[Case],
    dtype: torch.dtype,
    rounds: int,
    providers: Sequence[str] = (),
    cold: bool = False,
    progress: Callable[[str], None] | None = None,
) -> list[Result]:
    """Measure ``cases``; a table per op is printed as soon as its cases are done. ``cold`` empties L2 ahead of each replay.

    Without ``providers`` each op is measured beside those who are its peers.
    """
    progress = progress or _progress
    bench = Bench(dtype, rounds, providers, cold)
    results: list[Result] = []
    for op in dict.fromkeys(case.op for case in cases):
        of_op = []
        for case in (case for case in cases if case.op == op):
            of_op.append(bench.run(case))
            progress(".")
        progress("\r")
        results += of_op
        caches = "L2 emptied before each replay" if cold else "rotating buffers"
        operation = of_op[0].case.operation
        shown = providers or default_providers(operation)
        title = f"{op}, {str(dtype).removeprefix('torch.')}, {caches}: us per call"
        report.print_table(out, title, columns(shown, axes=operation.axes), [row(result, shown) for result in of_op])
        report.print_notes(out, notes(of_op))
    report.print_notes(out, summary(results))
    return results
