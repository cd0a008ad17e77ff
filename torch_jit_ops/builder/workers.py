"""Every thread that builds beside the one that asked: while a graph is traced, ahead of calls, or during another build.

    workers.background.once(("jitk::relu2", key), build)      for a call that will come; the same is not begun twice
    with Workers(lambda: jobs) as team: team.submit(build)    several at a time, all of them waited for

Threads are there while there is something to do, and end with the process, whatever they do.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from torch_jit_ops import forks, process
from torch_jit_ops.builder import compiler_jobs

Result = TypeVar("Result")


class Workers:
    """So many threads at most.

    Args:
        limit: says how many, each time that one more would start.
    """

    def __init__(self, limit: Callable[[], int]) -> None:
        self._limit = limit
        self._lock = forks.Lock()
        self._jobs: collections.deque[tuple[Future[Any], Callable[[], Any]]] = collections.deque()
        self._asked: set[object] = process.keep(set())
        self._threads: list[threading.Thread] = []

    def submit(self, job: Callable[[], Result], *, at_once: bool = False) -> Future[Result]:
        """Run the job in one of the threads; ``at_once`` in one of its own, for what others wait for.

        Returns:
            What becomes of it. Cancelled if no thread can start, as when the process ends.
        """
        result: Future[Result] = Future()
        with self._lock:
            self._jobs.appendleft((result, job)) if at_once else self._jobs.append((result, job))
            if at_once or len(self._threads) < self._limit():
                thread = threading.Thread(target=self._work, name="jitk", daemon=True)
                try:
                    thread.start()
                    self._threads.append(thread)
                except RuntimeError:
                    if not self._threads:
                        self._cancel()
        return result

    def once(self, what: object, job: Callable[[], object]) -> None:
        """Run the job, unless the same was asked for before. Nobody hears of its errors: a call will meet them again."""
        with self._lock:
            if what in self._asked:
                return
            self._asked.add(what)
            self.submit(job)

    def cancel(self) -> None:
        """Begin nothing more."""
        with self._lock:
            self._cancel()

    def _cancel(self) -> None:
        while self._jobs:
            self._jobs.popleft()[0].cancel()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._threads.remove(threading.current_thread())
                    return
                result, job = self._jobs.popleft()
            try:
                result.set_result(job())
            except BaseException as error:  # whoever asked for the result decides what to do about it
                result.set_exception(error)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for what has begun."""
        self.cancel()
        for thread in list(self._threads):
            thread.join()

    def forget(self) -> None:
        """In a child the threads are not there, and so nothing of what they were asked for."""
        self._threads.clear()
        self._jobs.clear()
        self._asked.clear()


background = Workers(lambda: compiler_jobs.compiler_jobs())
forks.in_child(background.forget)
