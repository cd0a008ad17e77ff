"""A few of many things, among which everything occurs that occurs in any."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

Thing = TypeVar("Thing")


def covering(things: Sequence[Thing], values_of: Callable[[Thing], Iterable[Hashable]]) -> list[Thing]:
    """Some of ``things``, one at least, in which each of their values occurs: again and again the first that has most of those
    still missing."""
    missing = {value for thing in things for value in values_of(thing)}
    kept: list[Thing] = []
    while things and (missing or not kept):
        kept.append(max(things, key=lambda thing: len(missing.intersection(values_of(thing)))))
        missing.difference_update(values_of(kept[-1]))
    return kept
