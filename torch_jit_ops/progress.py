"""Tells a person that a kernel is being compiled: a live line on a terminal, else one line at the start and one at the end."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

from torch_jit_ops import environment

_terminal = threading.Lock()  # one live line at a time


@contextlib.contextmanager
def building(what: str) -> Iterator[None]:
    """Show that ``what`` is being built while the block runs. ``JITK_VERBOSE=0`` shows nothing."""
    if environment.verbosity() == 0:
        yield
        return
    start = time.monotonic()
    if sys.stderr.isatty() and _terminal.acquire(blocking=False):
        try:
            with _live_line(what):
                yield
        finally:
            _terminal.release()
    else:
        _say(f"compiling {what}")
        yield
    _say(f"compiled {what} in {time.monotonic() - start:.1f} s")


@contextlib.contextmanager
def _live_line(what: str) -> Iterator[None]:
    # Imported here: a process that compiles nothing does not pay for it.
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("jitk: compiling {task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(what, total=None)
        yield


def _say(text: str) -> None:
    sys.stderr.write(f"jitk: {text}\n")  # in one piece, as threads speak at once
    sys.stderr.flush()
