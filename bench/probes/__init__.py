"""What ``python -m bench.features`` tries: a function for each feature, called in a process that does nothing else.

    @probe("Calls", "out form")
    def out_form() -> None:
        ...                      # returns: it works; NotHere: it cannot be tried; any other exception: it does not

A probe compares what it got with what PyTorch computes without the op; that nothing was raised proves nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

YES, NO, NOT_HERE = "yes", "no", "not tried"

# No probe takes a tenth of it on an idle machine; one that hangs must not hang the rest.
LIMIT_S = 240.0


class NotHere(Exception):
    """This machine cannot try the feature; the text says why."""


@dataclass(frozen=True)
class Probe:
    """A feature. ``since`` is the PyTorch that first has what it needs, if the oldest supported one has it not."""

    name: str
    group: str
    title: str
    run: Callable[[], None]
    since: str | None = None
    limit_s: float = LIMIT_S


@dataclass(frozen=True)
class Outcome:
    """``status`` is YES, NO or NOT_HERE; ``reason`` is a line that says why it is not YES; ``expected`` if it had to be NO."""

    status: str
    reason: str = ""
    expected: bool = False


PROBES: dict[str, Probe] = {}


def probe(group: str, title: str, since: str | None = None) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Make the decorated function a probe of its name."""

    def declare(run: Callable[[], None]) -> Callable[[], None]:
        if run.__name__ in PROBES:
            raise ValueError(f"there are two probes called {run.__name__}")
        PROBES[run.__name__] = Probe(run.__name__, group, title, run, since)
        return run

    return declare


def outcome_of(one: Probe, version: str) -> Outcome:
    """Run a probe in this process. ``version`` is that of PyTorch."""
    try:
        one.run()
    except NotHere as why:
        return Outcome(NOT_HERE, str(why))
    except Exception as error:  # of any kind: that is the outcome
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        if one.since is not None and _numbers(version) < _numbers(one.since):
            return Outcome(NO, f"needs PyTorch {one.since}", expected=True)
        return Outcome(NO, reason)
    return Outcome(YES)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def require(condition: object, otherwise: str) -> None:
    """Fail the probe with the text unless the condition holds."""
    if not condition:
        raise AssertionError(otherwise)


def needs_gpu() -> None:
    """Raises NotHere where there is none."""
    import torch

    if not torch.cuda.is_available():
        raise NotHere("no GPU here")
