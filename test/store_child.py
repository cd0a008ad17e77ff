"""What the processes of test_store.py do. The environment comes as an argument, as the process that forks them has another."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils import cpp_extension  # noqa: F401  (imported once, by the process that forks the others)

from torch_jit_ops import progress
from torch_jit_ops.backends import CPU
from torch_jit_ops.builder import compile
from torch_jit_ops.builder.load import load as load_unit
from torch_jit_ops.builder.shared_object import Loaded
from torch_jit_ops.builder.unit import Unit
from torch_jit_ops.store import files
from torch_jit_ops.store.store import Store

DEATHS = {
    "compiling": (compile, "_run_cpp_extension"),
    "holding the lock": (progress, "building"),
    "before the rename": (Store, "publish"),
    "ready for the rename": (files, "make_files_private"),
}


def unit(number: int = 0, *, include: Sequence[Path] = (), text: str = "", name: str = "store.tiny") -> Unit:
    """A translation unit that compiles in a fifth of a second, and returns ``number``."""
    body = text or f'extern "C" __attribute__((visibility("default"))) int jitk_value() {{ return {number}; }}\n'
    return Unit(name, f"store::tiny<{number}>", CPU, "x86-64", body, include=tuple(include))


def value(loaded: Loaded) -> int:
    """What the library of a ``unit`` returns."""
    return int(loaded.library.jitk_value())


def load(environment: Mapping[str, str], units: Sequence[Unit], threads: int, start: Any, answers: Any) -> None:
    """Load the units in each of so many threads once ``start`` opens; put a value, or an error, and the seconds for each."""
    os.environ.update(environment)
    sys.stderr = open(environment.get("STDERR", os.devnull), "a", buffering=1)  # noqa: SIM115  (for the whole process)
    if "DEATH" in environment:
        setattr(*DEATHS[environment["DEATH"]], lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    found: list[tuple[int | str, float]] = []

    def work() -> None:
        for wanted in units:
            begin = time.monotonic()
            try:
                result: int | str = value(load_unit(wanted))
            except Exception as error:  # it is the answer
                result = f"{type(error).__name__}: {error}"
            found.append((result, time.monotonic() - begin))

    workers = [threading.Thread(target=work) for _ in range(threads)]
    if start is not None:
        start.wait()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    answers.put((found, [str(warning.message) for warning in caught]))
