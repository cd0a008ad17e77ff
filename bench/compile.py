"""Compile and load times, as a user meets them: a new process, with nothing cached and with everything cached.

Method. The bare compiler on an empty kernel is the measure. Each round runs everything once, in an order that changes from
round to round. A library runs in a new process with an empty cache folder, then in another on the folder that the first filled.
``first call`` is the call of the public op, which builds or loads all it needs; ``next op`` is the first call of another op
after it, which needs one more variant and nothing else. CUDA itself is initialised before the clock starts.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from bench import bare_compiler, report
from bench.bare_compiler import COMPILE, HEADERS
from bench.child import child_environment, run_child
from bench.first_call import LIBRARIES, STAGES
from bench.providers import Unavailable, reason
from bench.timing import Samples, round_order

OURS = "jitk"

GOALS = {"headers": 1.25, "variant": 1.25, "warm_ms": 1.0, "import_ms": 30.0, "peer": 4.0}


@dataclass(frozen=True)
class FirstCall:
    """One library: seconds and child processes of each stage, over the rounds. ``traced`` counts what strace saw."""

    library: str
    cold: dict[str, Samples] = field(default_factory=dict)
    warm: dict[str, Samples] = field(default_factory=dict)
    cold_children: dict[str, int] = field(default_factory=dict)
    warm_children: dict[str, int] = field(default_factory=dict)
    traced: int | None = None
    missing: str | None = None

    def to_json(self) -> dict[str, object]:
        return {
            "library": self.library,
            "cold_s": {stage: taken.to_json() for stage, taken in self.cold.items()},
            "warm_s": {stage: taken.to_json() for stage, taken in self.warm.items()},
            "cold_children": self.cold_children,
            "warm_children": self.warm_children,
            "warm_children_by_strace": self.traced,
            "missing": self.missing,
        }


@dataclass(frozen=True)
class Result:
    """The bare compiler, by what it was asked for, and every library."""

    device: str
    compiler: str
    bare: dict[str, Samples]
    libraries: dict[str, FirstCall]
    missing: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        return {
            "device": self.device,
            "compiler": self.compiler,
            "bare_s": {name: taken.to_json() for name, taken in self.bare.items()},
            "libraries": [library.to_json() for library in self.libraries.values()],
            "missing": self.missing,
        }


def first_call(library: str, device: str, cache: Path) -> dict[str, dict[str, float]]:
    """What ``bench.first_call`` prints for ``library`` with ``cache`` as it stands."""
    command = [sys.executable, "-m", "bench.first_call", library, device]
    output = run_child(command, child_environment(cache), cache)
    return json.loads(output.strip().splitlines()[-1])


def trace_children(library: str, device: str, cache: Path) -> int | None:
    """Programs that a warm process started beyond those that PyTorch's import starts, as strace counts them; None without
    strace."""
    if shutil.which("strace") is None:
        return None
    measured, bare = ["-m", "bench.first_call", library, device], ["-c", "import torch"]
    return _traced(measured, cache) - _traced(bare, cache)


def _traced(arguments: Sequence[str], cache: Path) -> int:
    log = cache / "strace.log"
    command = ["strace", "-f", "-e", "trace=execve", "-o", str(log), sys.executable, *arguments]
    run_child(command, child_environment(cache), cache)
    return sum("execve(" in line and line.rstrip().endswith("= 0") for line in log.read_text().splitlines())


class _Library:
    """Collects the rounds of one library."""

    def __init__(self, name: str, device: str) -> None:
        self.name, self.device = name, device
        self.cold: list[dict[str, dict[str, float]]] = []
        self.warm: list[dict[str, dict[str, float]]] = []
        self.traced: int | None = None
        self.missing: str | None = None

    def measure(self) -> None:
        if self.missing:
            return
        with tempfile.TemporaryDirectory(prefix="jitk-bench-", ignore_cleanup_errors=True) as name:
            cache = Path(name)
            try:
                if self.name != OURS and find_spec(self.name) is None:
                    raise Unavailable("not installed")
                self.cold.append(first_call(self.name, self.device, cache))
                self.warm.append(first_call(self.name, self.device, cache))
                if self.name == OURS and self.traced is None:
                    self.traced = trace_children(self.name, self.device, cache)
            except Exception as error:  # Whatever stops a library, the others are still worth measuring.
                self.missing = reason(error)

    def result(self) -> FirstCall:
        def samples(runs: list[dict[str, dict[str, float]]]) -> dict[str, Samples]:
            return {stage: Samples(tuple(run["seconds"][stage] for run in runs)) for stage in STAGES} if runs else {}

        def children(runs: list[dict[str, dict[str, float]]]) -> dict[str, int]:
            return {stage: int(max(run["children"][stage] for run in runs)) for stage in STAGES} if runs else {}

        return FirstCall(
            self.name,
            samples(self.cold),
            samples(self.warm),
            children(self.cold),
            children(self.warm),
            self.traced,
            self.missing,
        )


def measure(device: str, architecture: str, rounds: int, libraries: Sequence[str], each_header: bool = False) -> Result:
    """Measure the bare compiler and ``libraries`` on ``device``, ``rounds`` times each."""
    bare: dict[str, list[float]] = {unit.name: [] for unit in bare_compiler.units(device, each_header)}
    missing: dict[str, str] = {}
    collected = {name: _Library(name, device) for name in libraries}

    def compiler(unit: bare_compiler.Unit) -> Callable[[], None]:
        def step() -> None:
            try:
                bare[unit.name].append(bare_compiler.time_bare(device, unit, architecture))
            except Unavailable as error:
                missing[unit.name] = reason(error)

        return step

    steps = {unit.name: compiler(unit) for unit in bare_compiler.units(device, each_header)}
    steps |= {name: library.measure for name, library in collected.items()}
    for index in range(rounds):
        for name in round_order(list(steps), index):
            steps[name]()
    return Result(
        device,
        "nvcc" if device == "cuda" else "g++",
        {what: Samples(tuple(taken)) for what, taken in bare.items() if taken},
        {name: library.result() for name, library in collected.items()},
        missing,
    )


def duration(samples: Samples | None) -> str:
    """A median with a unit that suits it."""
    if samples is None:
        return "-"
    return f"{samples.median:.2f} s" if samples.median >= 0.1 else f"{samples.median * 1e3:.2f} ms"


def table(result: Result) -> tuple[list[str], list[list[str]]]:
    """Columns and cells: a line for the compiler alone, then two for each library.

    ``processes`` are those that the first call and the next op started; ``x bare`` is the next op over the bare compiler.
    """
    columns = ["what", "import torch", "+ library", "first call", "next op", "processes", "x bare"]
    unit = result.bare.get(COMPILE)
    rows = []
    for what, taken in result.bare.items():
        over = taken.median / unit.median if unit else None
        rows.append([f"bare {result.compiler}, {what}", "", "", "", duration(taken), "", "" if over is None else f"{over:.2f}"])
    for library in result.libraries.values():
        for label, taken, children in (
            ("nothing cached", library.cold, library.cold_children),
            ("all cached", library.warm, library.warm_children),
        ):
            following = taken.get("next op")
            over = following.median / unit.median if following and unit else None
            rows.append(
                [
                    f"{library.library}, {label}",
                    *(duration(taken.get(stage)) for stage in ("import torch", "import library", "first call", "next op")),
                    f"{children['first call']} + {children['next op']}" if children else "-",
                    "-" if over is None else f"{over:.2f}",
                ]
            )
    return columns, rows


def _verdict(text: str, value: float, goal: float, at_most: bool = True) -> str:
    met = value <= goal if at_most else value >= goal
    return f"{text} {value:.2f} (goal {'<=' if at_most else '>='} {goal:g}: {'met' if met else 'missed'})"


def summary(result: Result) -> list[str]:
    """Our figures against their goals."""
    lines = []
    bare = result.bare.get(COMPILE)
    if bare and HEADERS in result.bare and result.device == "cuda":
        text = "every header over the bare compiler:"
        lines.append(_verdict(text, result.bare[HEADERS].median / bare.median, GOALS["headers"]))
    ours = result.libraries.get(OURS)
    if ours is None or not ours.cold:
        return lines
    if sum(ours.cold_children.values()) == 0:
        return [*lines, "jitk started no compiler with nothing cached: these ops have no kernel for this device"]
    # An empty C++ function says little about what a vectorised kernel may cost to compile: there is no goal for the CPU.
    if bare and result.device == "cuda":
        lines.append(
            _verdict("new variant over the bare compiler:", ours.cold["next op"].median / bare.median, GOALS["variant"])
        )
    if ours.warm:
        # The steady call is subtracted: it is not loading.
        load = ours.warm["next op"].median - ours.warm["next op again"].median
        lines.append(_verdict("loading a cached variant, ms:", load * 1e3, GOALS["warm_ms"]))
        started = ours.warm_children["first call"] + ours.warm_children["next op"]
        lines.append(_verdict("processes started with all cached:", started, 0))
        if ours.traced is not None:
            lines.append(f"programs that strace saw in that whole process, beyond those of `import torch`: {ours.traced}")
        imported = Samples(ours.cold["import library"].values + ours.warm["import library"].values)
        lines.append(_verdict("import torch_jit_ops over import torch, ms:", imported.median * 1e3, GOALS["import_ms"]))
    for peer in result.libraries.values():
        if peer.library != OURS and peer.cold:
            faster = peer.cold["first call"].median / ours.cold["next op"].median
            text = f"{peer.library}'s first call over our new variant:"
            lines.append(
                _verdict(text, faster, GOALS["peer"], at_most=False) if peer.library == "sglang" else f"{text} {faster:.2f}"
            )
    return lines


def run(
    out: Console,
    device: str,
    architecture: str,
    rounds: int,
    libraries: Sequence[str] = LIBRARIES,
    each_header: bool = False,
) -> Result:
    """Measure and print. Peers have kernels for CUDA only."""
    chosen = [name for name in libraries if device == "cuda" or name == OURS]
    result = measure(device, architecture, rounds, chosen, each_header)
    target = f"sm_{architecture}" if device == "cuda" else "this CPU"
    report.print_table(out, f"compile and load for {target}, median of {rounds}", *table(result))
    absent = {name: library.missing for name, library in result.libraries.items() if library.missing}
    report.print_notes(out, [*report.merge_reasons([*result.missing.items(), *absent.items()]), *summary(result)])
    return result


def failed(result: Result) -> list[str]:
    """What makes the run a failure: our own first call."""
    ours = result.libraries.get(OURS)
    return [f"{OURS}: {ours.missing}"] if ours is not None and ours.missing else []
