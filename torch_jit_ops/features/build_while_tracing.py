"""Builds kernels while the graph that will call them is still being compiled.

``torch.compile`` and ``torch.export`` run an op's fake long before its kernel. What the fake is called with decides which
kernel that will be, so its build starts then, in a thread, and the first call finds it, or waits for the rest of it.

A build that fails is no error here: the call meets the same one and raises it. Threads end with the process, whatever they do.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Mapping, Sequence

import torch

from torch_jit_ops import backends, dispatcher, environment, forks, progress
from torch_jit_ops.builder import compiler_jobs
from torch_jit_ops.signature import tensors_of
from torch_jit_ops.variant import VariantPattern


def start(
    who: str,
    patterns: Mapping[str, VariantPattern],
    load: Callable[[str, Sequence[int]], object],
    arguments: Callable[[], Sequence[object]],
) -> None:
    """Start to build what a traced call will need. Returns at once and raises nothing.

    Nothing happens outside of ``torch.compile`` and ``torch.export``, for a device that is not here, where a size that picks
    the kernel is a symbol, or where builds are switched off (``JITK_BACKGROUND=0``, ``JITK_NO_COMPILE=1``).

    Args:
        who: the op.
        patterns: of the op's kernels, by backend.
        load: builds and loads the variant for a backend and a key of the dispatcher.
        arguments: gives all arguments of the call, fake tensors among them.
    """
    if not patterns or not _is_tracing() or not environment.building_in_background():
        return
    try:
        values = arguments()
        device = next(tensors_of(values)).device
        backend = backends.of_device(device)
        # Whoever has initialised CUDA has a device, and will not fork and use it there.
        if backend is None or backend.name not in patterns or not backend.is_in_use():
            return
        words = patterns[backend.name].static_words_of(values)
    except Exception:  # the call will say what is wrong with its arguments
        return
    if words is None:
        return
    key = (backend.index_of(device), *words)
    _workers.submit("dispatcher", dispatcher.library)
    _workers.submit((who, backend.name, key), lambda: load(backend.name, key))


def _is_tracing() -> bool:
    return torch._guards.TracingContext.try_get() is not None or torch.compiler.is_compiling()


class _Workers:
    """A few threads, which are there while there is something to do."""

    def __init__(self) -> None:
        self._lock = forks.Lock()
        self._asked: set[object] = set()
        self._jobs: collections.deque[Callable[[], object]] = collections.deque()
        self._threads = 0

    def submit(self, what: object, job: Callable[[], object]) -> None:
        """Run the job in one of the threads, unless the same was asked for before: a fake runs several times."""
        with self._lock:
            if what in self._asked:
                return
            self._asked.add(what)
            self._jobs.append(job)
            if self._threads >= compiler_jobs.compiler_jobs():
                return
            self._threads += 1
        try:
            threading.Thread(target=self._work, name="jitk", daemon=True).start()
        except RuntimeError:  # no more threads, or the process ends: the call builds
            with self._lock:
                self._threads -= 1

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._threads -= 1
                    return
                job = self._jobs.popleft()
            try:
                with progress.in_background():
                    job()
            except Exception:  # of any kind: the call meets it again, where somebody can catch it
                continue


_workers = _Workers()


def _forget_in_child() -> None:
    """The threads are not there."""
    global _workers
    _workers = _Workers()


forks.in_child(_forget_in_child)
