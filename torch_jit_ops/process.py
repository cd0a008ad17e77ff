"""What this process has found out and need not find out again: what is loaded, which compilers there are, what was said.

    _known = process.keep({})         a container that belongs to a module and is emptied with all others
    @process.cached                   functools.cache, likewise
    process.first_time("noexec", x)   whether nobody asked this before: for what is said once
    process.reset()                   know what a new process knows; for tests

What PyTorch and the C++ dispatcher were told stays, since neither can be told to forget it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol, TypeVar

from torch_jit_ops import forks


class _Clearable(Protocol):
    def clear(self) -> None: ...


Kept = TypeVar("Kept", bound=_Clearable)
Result = TypeVar("Result")

_forgets: list[Callable[[], None]] = []
_unsays: list[Callable[[], None]] = []
_said: set[tuple[object, ...]] = set()
_said_lock = forks.Lock()
_unsays.append(_said.clear)


def keep(container: Kept) -> Kept:
    """The container, which ``reset`` empties."""
    _forgets.append(container.clear)
    return container


def cached(function: Callable[[], Result]) -> Callable[[], Result]:
    """The function, called once until ``reset``."""
    once = functools.cache(function)
    _forgets.append(once.cache_clear)
    return once


def said_once(function: Callable[[], Result]) -> Callable[[], Result]:
    """The function, which says something, called once until ``reset`` of what was said."""
    once = functools.cache(function)
    _unsays.append(once.cache_clear)
    return once


def first_time(*what: object) -> bool:
    """Whether this is the first time that anybody asks for ``what``, in any thread."""
    with _said_lock:
        is_first = what not in _said
        _said.add(what)
        return is_first


def reset(*, said: bool = True) -> None:
    """Forget everything; with ``said=False`` all but what was said already."""
    for forget in (*_forgets, *(_unsays if said else ())):
        forget()
