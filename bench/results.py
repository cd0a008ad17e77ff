"""What one case gave, and how it is shown: shared by the GPU and the CPU benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from bench import report
from bench.cases import Case
from bench.providers import PROVIDERS
from bench.timing import Samples

OURS, COPY = "jitk", "copy"

# Run-to-run noise is about two percent.
NOISE = 0.02

PREFIXES = {"TB/s": 1e12, "GB/s": 1e9}


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

    @property
    def name(self) -> str:
        return f"{self.case.op} {self.case.shape}"

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
    def bytes_per_second(self) -> float | None:
        ours = self.us(OURS)
        return None if ours is None else self.bytes / ours * 1e6

    @property
    def spread(self) -> float:
        """Widest spread of any provider."""
        return max((samples.spread for samples in self.samples.values()), default=0.0)

    def to_json(self) -> dict[str, object]:
        def samples(of: dict[str, Samples]) -> dict[str, object]:
            return {name: taken.to_json() for name, taken in of.items()}

        return {
            "op": self.case.op,
            "sizes": dict(zip(self.case.operation.axes, self.case.sizes, strict=True)),
            "bytes": self.bytes,
            "calls": self.calls,
            "us": samples(self.samples),
            "first_us": samples(self.first) if self.first else None,
            "best_peer": self.best_peer,
            "ratio": self.ratio,
            "over_copy": self.over_copy,
            "bytes_per_second": self.bytes_per_second,
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


def columns(providers: Sequence[str], unit: str = "TB/s", axes: Sequence[str] = ("tokens", "d")) -> list[str]:
    return [f"({', '.join(axes)})", *providers, "best peer", "best/ours", "ours/copy", unit, "spread"]


def row(result: Result, providers: Sequence[str], unit: str = "TB/s") -> list[str]:
    """Cells of one case, in the order of ``columns``; ``*`` marks a case that was measured twice."""
    over_copy = result.over_copy
    bandwidth = result.bytes_per_second
    return [
        result.case.shape + ("*" if result.first else ""),
        *(report.microseconds(result.us(name)) for name in providers),
        result.best_peer or "-",
        report.ratio(result.ratio),
        "-" if over_copy is None else f"{over_copy:.2f}",
        "-" if bandwidth is None else f"{bandwidth / PREFIXES[unit]:.2f}",
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
        level = sum((result.ratio or 0.0) >= 1 - NOISE for result in rated)
        ahead = sum((result.ratio or 0.0) >= 1.0 for result in rated)
        lines.append(
            f"best/ours: worst {worst[0].ratio:.3f} at {worst[0].name}; "
            f"{ahead} of {len(rated)} cases at 1.00 or more, {level} within {NOISE:.0%} of it"
        )
        below = [f"{item.name} {item.ratio:.3f} ({item.best_peer})" for item in worst if item.ratio < 1.0]
        if below:
            lines.append("below 1.00: " + ", ".join(below[:12]) + (f", and {len(below) - 12} more" if len(below) > 12 else ""))
    copied = [result for result in results if result.over_copy is not None]
    if copied:
        slowest = max(copied, key=lambda result: result.over_copy or 0.0)
        lines.append(f"ours/copy: worst {slowest.over_copy:.3f} at {slowest.name}")
    return lines


def failed(results: Sequence[Result]) -> list[str]:
    """What makes the run a failure: our op absent, raising, or wrong."""
    found = [(result, result.missing | result.wrong) for result in results]
    return report.merge_reasons([(f"{OURS} {result.name}", why[OURS]) for result, why in found if OURS in why])
