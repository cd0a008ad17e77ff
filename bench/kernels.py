"""Device time of every op beside its peers and beside a copy of the same bytes.

Method. Each provider's calls are captured in a CUDA graph of 32 to 64 calls over rotating buffers of 256 MiB in all, with the
outputs passed in. What the graph writes is compared with a float64 reference before anything is timed. The replays of all
providers are interleaved, and the median is reported with its spread. Bytes are counted from the arguments: every input read
once, the output written once. ``copy`` is ``Tensor.copy_`` moving the same number of bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from rich.console import Console

from bench import correctness, replay, report
from bench.cases import Case
from bench.providers import DEFAULT_PROVIDERS, PROVIDERS, reason
from bench.slots import make_slots, plan
from bench.timing import Samples

# Below this ratio a case is measured again with more replays, because two percent is what one run differs from the next.
SUSPICIOUS_RATIO = 0.98
MORE_ROUNDS = 4

OURS, COPY = "jitk", "copy"


@dataclass(frozen=True)
class Result:
    """One case. Samples are microseconds per call; ``first`` holds those that a second measurement replaced."""

    case: Case
    bytes: int
    calls: int
    samples: dict[str, Samples]
    first: dict[str, Samples] | None = None
    missing: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    def us(self, provider: str) -> float | None:
        return self.samples[provider].median if provider in self.samples else None

    @property
    def best_peer(self) -> str | None:
        return best_peer(self.samples)

    @property
    def ratio(self) -> float | None:
        """Time of the best peer over ours: 1 or more is what we want."""
        return peer_ratio(self.samples)

    @property
    def over_copy(self) -> float | None:
        """Our time over that of the copy: 1 or less is what we want."""
        ours, copy = self.us(OURS), self.us(COPY)
        return None if ours is None or copy is None else ours / copy

    @property
    def terabytes_per_second(self) -> float | None:
        ours = self.us(OURS)
        return None if ours is None else self.bytes / ours / 1e6

    @property
    def spread(self) -> float:
        """Widest spread of any provider."""
        return max((samples.spread for samples in self.samples.values()), default=0.0)

    def to_json(self) -> dict[str, object]:
        def samples(of: dict[str, Samples]) -> dict[str, object]:
            return {name: taken.to_json() for name, taken in of.items()}

        return {
            "op": self.case.op,
            "tokens": self.case.tokens,
            "d": self.case.d,
            "bytes": self.bytes,
            "calls": self.calls,
            "us": samples(self.samples),
            "first_us": samples(self.first) if self.first else None,
            "best_peer": self.best_peer,
            "ratio": self.ratio,
            "over_copy": self.over_copy,
            "terabytes_per_second": self.terabytes_per_second,
            "missing": self.missing,
            "wrong": self.wrong,
            "relative_error": self.errors,
        }


def best_peer(samples: dict[str, Samples]) -> str | None:
    peers = [name for name in samples if PROVIDERS[name].is_peer]
    return min(peers, key=lambda name: samples[name].median, default=None)


def peer_ratio(samples: dict[str, Samples]) -> float | None:
    peer = best_peer(samples)
    return None if peer is None or OURS not in samples else samples[peer].median / samples[OURS].median


class Bench:
    """What the cases of one run share: a stream, what runs ahead of each replay, and the number of replays."""

    def __init__(
        self, dtype: torch.dtype, rounds: int, providers: Sequence[str] = DEFAULT_PROVIDERS, cold: bool = False
    ) -> None:
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
        for name in self.providers:
            try:
                graph = replay.capture(PROVIDERS[name].bind(case.operation), slots, arranged.calls, self.stream)
            except Exception as error:  # Whatever a provider raises, the others are still worth measuring.
                missing[name] = reason(error)
                torch.cuda.synchronize(self.device)
                continue
            if name != COPY:
                correctness.poison(slots)
                graph.replay()
                torch.cuda.synchronize(self.device)
                errors[name] = correctness.output_error(case.operation, slots)
                if not errors[name] <= allowed:
                    wrong[name] = f"wrong result: relative error {errors[name]:.2g}, allowed {allowed:.2g}"
                    continue
            graphs[name] = graph
        samples = replay.measure(graphs, arranged.calls, self.rounds, self.ahead, self.stream)
        first = None
        found = peer_ratio(samples)
        if found is not None and found < SUSPICIOUS_RATIO:
            first = samples
            samples = replay.measure(graphs, arranged.calls, self.rounds * MORE_ROUNDS, self.ahead, self.stream)
        return Result(case, size, arranged.calls, samples, first, missing, wrong, errors)


def columns(providers: Sequence[str]) -> list[str]:
    return ["(tokens, d)", *providers, "best peer", "best/ours", "ours/copy", "TB/s", "spread"]


def row(result: Result, providers: Sequence[str]) -> list[str]:
    """Cells of one case, in the order of ``columns``; ``*`` marks a case that was measured twice."""
    over_copy = result.over_copy
    bandwidth = result.terabytes_per_second
    return [
        result.case.shape + ("*" if result.first else ""),
        *(report.microseconds(result.us(name)) for name in providers),
        result.best_peer or "-",
        report.ratio(result.ratio),
        "-" if over_copy is None else f"{over_copy:.2f}",
        "-" if bandwidth is None else f"{bandwidth:.2f}",
        report.percent(result.spread),
    ]


def notes(results: Sequence[Result]) -> list[str]:
    """Why cells are empty, each reason once, and what the first measurement of a repeated case gave."""
    reasons: dict[str, list[str]] = {}
    for result in results:
        for name, why in {**result.missing, **result.wrong}.items():
            reasons.setdefault(f"{name}: {why}", []).append(result.case.shape)
    lines = []
    for why, shapes in reasons.items():
        lines.append(why if len(shapes) == len(results) else f"{why}  [at {', '.join(shapes)}]")
    for result in results:
        if result.first:
            first = peer_ratio(result.first)
            lines.append(
                f"* {result.case.shape}: best/ours was {report.ratio(first, 9, 0)} at first, measured again with more replays"
            )
    return lines


def summary(results: Sequence[Result]) -> list[str]:
    """The worst ratios, and how many cases reach a goal."""
    rated = [result for result in results if result.ratio is not None]
    lines = []
    if rated:
        worst = sorted(rated, key=lambda result: result.ratio or 0.0)
        level = sum((result.ratio or 0.0) >= SUSPICIOUS_RATIO for result in rated)
        ahead = sum((result.ratio or 0.0) >= 1.0 for result in rated)
        lines.append(
            f"best/ours: worst {worst[0].ratio:.3f} at {worst[0].case.op} {worst[0].case.shape}; "
            f"{ahead} of {len(rated)} cases at 1.00 or more, {level} at 0.98 or more"
        )
        below = [f"{item.case.op} {item.case.shape} {item.ratio:.3f} ({item.best_peer})" for item in worst if item.ratio < 1.0]
        if below:
            lines.append("below 1.00: " + ", ".join(below[:12]) + (f", and {len(below) - 12} more" if len(below) > 12 else ""))
    copied = [result for result in results if result.over_copy is not None]
    if copied:
        slowest = max(copied, key=lambda result: result.over_copy or 0.0)
        lines.append(f"ours/copy: worst {slowest.over_copy:.3f} at {slowest.case.op} {slowest.case.shape}")
    return lines


def run(
    out: Console,
    cases: Sequence[Case],
    dtype: torch.dtype,
    rounds: int,
    providers: Sequence[str] = DEFAULT_PROVIDERS,
    cold: bool = False,
    progress: Callable[[str], None] = lambda text: print(text, end="", file=sys.stderr, flush=True),
) -> list[Result]:
    """Measure ``cases``; a table per op is printed as soon as its cases are done. ``cold`` empties L2 ahead of each replay."""
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
        title = f"{op}, {str(dtype).removeprefix('torch.')}, {caches}: us per call"
        report.print_table(out, title, columns(providers), [row(result, providers) for result in of_op])
        report.print_notes(out, notes(of_op))
    report.print_notes(out, summary(results))
    return results


def failed(results: Sequence[Result]) -> list[str]:
    """What makes the run a failure: our op absent, raising, or wrong."""
    return [
        f"{OURS} {result.case.op} {result.case.shape}: {(result.missing | result.wrong)[OURS]}"
        for result in results
        if OURS in result.missing or OURS in result.wrong
    ]
