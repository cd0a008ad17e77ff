"""What threads hold when the process forks, or when a signal handler runs.

    lock = forks.Lock()         re-entrant, and free in a child if a thread held it that the child does not have
    with forks.held_off(): ...  a fork waits until the block ends: half an import, or half a library, would stay so in the child
    forks.in_child(forget)      called in each child, to forget what its missing threads will never finish
    forks.subprocess            the module, but a fork waits while a process starts: a child that has the pipe by which its
                                start is reported would keep the thread that started it waiting, as long as the child lives

A handler that calls an op while its own thread is building it finds the locks its own, and ``Reentered`` where it would wait
for itself.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess as original
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

_PATIENCE_S = 30.0  # a fork goes ahead then: the program may hold what the block waits for


class Reentered(RuntimeError):
    """A signal handler asks for what its own thread is in the middle of making."""


class Lock:
    """A re-entrant lock: ``with lock as again:`` tells whether this thread holds it already."""

    def __init__(self) -> None:
        self._make()
        _locks.add(self)

    def __enter__(self) -> bool:
        self._lock.acquire()
        self._depth += 1
        return self._depth > 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        self._lock.release()

    def _make(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0

    def _free_in_child(self) -> None:
        if not self._lock._is_owned():  # type: ignore[attr-defined]
            self._make()


_locks: weakref.WeakSet[Lock] = weakref.WeakSet()
_held_off = threading.RLock()
_forking = threading.local()  # .waited: for each fork of this thread under way, whether it holds ``_held_off``


@contextlib.contextmanager
def held_off() -> Iterator[None]:
    """Have forks wait while the block runs, which should be short."""
    with _held_off:
        yield


def _subprocess() -> types.ModuleType:
    """A copy, so that no other program's processes are changed."""
    spec: Any = importlib.util.find_spec("subprocess")
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def start(*args: Any, **kwargs: Any) -> Any:
        with held_off():
            return original.Popen(*args, **kwargs)

    module.Popen = start
    return module  # type: ignore[no-any-return]


subprocess = _subprocess()


def in_child(forget: Callable[[], None]) -> None:
    """Call ``forget`` in each child, after its locks are free."""
    os.register_at_fork(after_in_child=forget)


def _before() -> None:
    _forking.__dict__.setdefault("waited", []).append(_held_off.acquire(timeout=_PATIENCE_S))


def _after_in_parent() -> None:
    if _forking.waited.pop():
        _held_off.release()


def _after_in_child() -> None:
    global _held_off
    if _forking.waited.pop():
        _held_off.release()
    else:
        _held_off = threading.RLock()
    for lock in list(_locks):
        lock._free_in_child()


os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
