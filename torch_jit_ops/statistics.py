"""Counts what loading kernels took in this process.

    torch_jit_ops.stats().total      Stats(hits=3, misses=1, builds=1, compile_seconds=1.31, load_seconds=0.002)

Calls of ops are not counted: once a kernel is loaded, its calls reach it without Python.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

from torch_jit_ops import forks


@dataclass(frozen=True)
class Stats:
    """What was loaded, of one op or in total.

    Attributes:
        hits: libraries that were in the store.
        misses: libraries that were not, whether or not they could then be built.
        builds: libraries that this process compiled.
        compile_seconds: wall time of the builds, each from the request to the loaded library.
        load_seconds: wall time of the hits, with any wait for another process that was building the same.
        fallbacks: dtypes of calls that run the PyTorch function, as no kernel takes them.
    """

    hits: int = 0
    misses: int = 0
    builds: int = 0
    compile_seconds: float = 0.0
    load_seconds: float = 0.0
    fallbacks: int = 0

    def __add__(self, other: Stats) -> Stats:
        return Stats(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


@dataclass(frozen=True)
class Statistics:
    """``ops`` by name, as ``jitk::silu_and_mul``; the dispatcher, ``jitk::(dispatcher)``, is among them."""

    total: Stats
    ops: Mapping[str, Stats]


_ops: dict[str, Stats] = {}
_lock = forks.Lock()


def stats() -> Statistics:
    """What was loaded and compiled since the process started, or since ``reset_stats``."""
    with _lock:
        ops = dict(sorted(_ops.items()))
    return Statistics(sum(ops.values(), Stats()), MappingProxyType(ops))


def reset_stats() -> None:
    """Count from zero."""
    with _lock:
        _ops.clear()


def count(name: str, *, compiled: bool, seconds: float) -> None:
    """A library of the unit ``name`` was loaded."""
    took = Stats(misses=1, builds=1, compile_seconds=seconds) if compiled else Stats(hits=1, load_seconds=seconds)
    _add(name, took)


def count_failure(name: str) -> None:
    """A library of the unit ``name`` is not in the store and could not be built."""
    _add(name, Stats(misses=1))


def count_fallback(name: str) -> None:
    """Calls of the op ``name`` come in a dtype that has no kernel."""
    _add(name, Stats(fallbacks=1))


def _add(name: str, more: Stats) -> None:
    shown = "jitk::(dispatcher)" if name == "runtime" else name.replace(".", "::", 1)
    with _lock:
        _ops[shown] = _ops.get(shown, Stats()) + more
