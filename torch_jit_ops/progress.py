"""Tells a person that a kernel is being compiled: a live line on a terminal, else one line at the start and one at the end.

Of the processes of a parallel job only the first speaks, as all of them come to the same kernels at the same time.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch_jit_ops import environment, forks

if TYPE_CHECKING:
    from rich.progress import Progress

_silenced = threading.Event()
_background = threading.local()


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Say nothing of single builds while the block runs: a bar speaks for all of them."""
    _silenced.set()
    try:
        yield
    finally:
        _silenced.clear()


@contextlib.contextmanager
def in_background() -> Iterator[None]:
    """Builds of this thread are lines while the block runs: a live one would be left on the terminal of a program that ends."""
    _background.on = True
    try:
        yield
    finally:
        _background.on = False


@contextlib.contextmanager
def building(what: str, usual_s: float | None = None) -> Iterator[None]:
    """Show that ``what`` is being built while the block runs, and that it takes ``usual_s`` seconds as a rule."""
    if not _speaks() or _silenced.is_set():
        yield
        return
    start = time.monotonic()
    usual = "" if usual_s is None else f" (usually {_duration(usual_s)})"
    background = getattr(_background, "on", False)
    if sys.stderr.isatty() and not background and environment.verbosity() < 2:  # 2: the compilers write there themselves
        with _live.line(f"{what}{usual}"):
            yield
    else:
        say(f"compiling {what}{' in the background' if background else ''}{usual}")
        yield
    say(f"compiled {what} in {time.monotonic() - start:.1f} s")


def waiting(what: str, pid: int, host: str, since: float) -> None:
    """Say that another process compiles ``what`` since a time, in seconds since 1970."""
    clock = time.strftime("%H:%M:%S", time.localtime(since))
    say(f"waiting for process {pid} on {host}, which has been compiling {what} since {clock}")


def say(text: str) -> None:
    """Write a line to stderr, unless this process is silent."""
    if not _speaks():
        return
    if not _live.write(f"jitk: {text}"):
        sys.stderr.write(f"jitk: {text}\n")  # in one piece, as threads speak at once
        sys.stderr.flush()


def _speaks() -> bool:
    verbosity = environment.verbosity()
    return verbosity == 2 or (verbosity == 1 and environment.is_first_rank())


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


class _Live:
    """The live lines of all builds of this process: one display, as a terminal bears no more."""

    def __init__(self) -> None:
        self._lock = forks.Lock()
        self._display: Progress | None = None
        self._lines = 0

    @contextlib.contextmanager
    def line(self, text: str) -> Iterator[None]:
        # Imported here: a process that compiles nothing does not pay for it.
        with forks.held_off():
            from rich.console import Console
            from rich.markup import escape
            from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        with self._lock:
            if self._display is None:
                columns = (SpinnerColumn(), TextColumn("jitk: compiling {task.description}"), TimeElapsedColumn())
                self._display = Progress(*columns, console=Console(stderr=True), transient=True)
                self._display.start()
            display = self._display
            task = display.add_task(escape(text), total=None)
            self._lines += 1
        try:
            yield
        finally:
            with self._lock:
                display.remove_task(task)
                self._lines -= 1
                if self._lines == 0:
                    display.stop()
                    self._display = None

    def write(self, line: str) -> bool:
        """Write above the live lines; False if there are none."""
        with self._lock:
            if self._display is None:
                return False
            self._display.console.print(line, markup=False, highlight=False)
            return True


_live = _Live()


def _forget_in_child() -> None:
    """The lines are of builds of the parent's threads, and so is the display."""
    global _live
    _live = _Live()


forks.in_child(_forget_in_child)
