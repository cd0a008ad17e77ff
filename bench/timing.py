"""Statistics and the order of measurements, shared by every benchmark.

Providers are measured in rounds: each round measures every provider once, in an order that changes from round to round,
so that a slow drift of the machine (clocks, temperature, a neighbour) falls on all of them alike. What is reported is the
median over the rounds, with the 10th and 90th percentile as its spread.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


def percentile(values: Sequence[float], percent: float) -> float:
    """The ``percent``-th percentile of ``values``, interpolated linearly between neighbours.

    Raises:
        ValueError: ``values`` is empty, or ``percent`` is outside [0, 100].
    """
    if not values:
        raise ValueError("no values to take a percentile of")
    if not 0 <= percent <= 100:
        raise ValueError(f"percent is {percent}, expected 0 to 100")
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


@dataclass(frozen=True)
class Samples:
    """Repeated measurements of one thing, all in the same unit."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return percentile(self.values, 50)

    @property
    def low(self) -> float:
        """The 10th percentile."""
        return percentile(self.values, 10)

    @property
    def high(self) -> float:
        """The 90th percentile."""
        return percentile(self.values, 90)

    @property
    def spread(self) -> float:
        """Width of the band from the 10th to the 90th percentile, as a fraction of the median."""
        return (self.high - self.low) / self.median if self.median else 0.0

    def to_json(self) -> dict[str, object]:
        return {"median": self.median, "p10": self.low, "p90": self.high, "values": list(self.values)}


def round_order(names: Sequence[str], index: int) -> list[str]:
    """``names`` in the order of round ``index``: rotated by one each round, and backwards in every other turn.

    Rotation alone would always leave the same provider in front of a given one, and with it the same state of the caches.
    """
    if not names:
        return []
    shift = index % len(names)
    order = [*names[shift:], *names[:shift]]
    return order[::-1] if (index // len(names)) % 2 else order


def interleave(measures: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, Samples]:
    """Call every function of ``measures`` once per round; each returns one measurement."""
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}, expected at least 1")
    values: dict[str, list[float]] = {name: [] for name in measures}
    for index in range(rounds):
        for name in round_order(list(measures), index):
            values[name].append(measures[name]())
    return {name: Samples(tuple(taken)) for name, taken in values.items()}


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Keep Python's cycle collector from running inside a timed region."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def us_per_call(call: Callable[[], object], calls: int, synchronize: Callable[[], object]) -> float:
    """Microseconds of host time per call over ``calls`` calls.

    ``synchronize`` runs before and after, outside the timed region: the queue of the device starts empty and, with few
    hundred calls, stays below the length at which a launch would wait for the device.
    """
    synchronize()
    turns = range(calls)
    start = time.perf_counter_ns()
    for _ in turns:
        call()
    elapsed = time.perf_counter_ns() - start
    synchronize()
    return elapsed / calls / 1e3
