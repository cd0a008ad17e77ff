"""Compile and load times, as a user meets them: a new process, with nothing cached and with everything cached.

Method. The bare compiler on an empty kernel is the measure. Each round runs everything once, in an order that changes from
round to round. A library runs in a new process with an empty cache folder, then in another on the folder that the first filled.
``first call`` is the call of the public op, which builds or loads all it needs; ``next op`` is the first call of another op
after it, which needs one more variant and nothing else. CUDA itself is initialised before the clock starts.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from bench import report
from bench.environment import REPOSITORY, bench_environment, find_nvcc
from bench.first_call import LIBRARIES, STAGES
from bench.providers import Unavailable, reason
from bench.timing import Samples, round_order

OURS = "jitk"

COMPILE, LINK, HEADERS = "compile only", "compile and link", "with every header of jitk"

# A child that hangs must not hang the benchmark: nothing here takes a tenth of it.
TIMEOUT_S = 300

GOALS = {"headers": 1.25, "variant": 1.25, "warm_ms": 1.0, "import_ms": 30.0, "peer": 4.0}


@dataclass(frozen=True)
class Unit:
    """A source that the bare compiler is timed on, and whether it is linked too."""

    name: str
    source: str
    link: bool = False


def units(device: str, each_header: bool = False) -> list[Unit]:
    """An empty kernel (``cuda``) or function (``cpu``), alone, linked, and with our headers; or with each header alone."""
    if device == "cuda":
        suffixes, first, body = (".h", ".cuh"), "#include <cuda_bf16.h>\n", "__global__ void empty() {}\n"
    else:
        suffixes, first, body = (".h",), "#include <cstdint>\n", "int32_t empty() { return 0; }\n"
    headers = [path.name for path in sorted((REPOSITORY / "include" / "jitk").glob("*")) if path.suffix in suffixes]
    includes = {name: f"#include <jitk/{name}>\n" for name in headers}
    found = [Unit(COMPILE, first + body), Unit(LINK, first + body, link=True)]
    if includes:
        found.append(Unit(HEADERS, first + "".join(includes.values()) + body))
    if each_header:
        found += [Unit(f"with jitk/{name}", first + line + body) for name, line in includes.items()]
    return found


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


def child_environment(cache: Path) -> dict[str, str]:
    """The environment of a measured process: this checkout importable, and all that is compiled goes below ``cache``."""
    path = [*filter(None, [os.environ.get("PYTHONPATH")]), str(REPOSITORY)]
    return os.environ | bench_environment(cache) | {"PYTHONPATH": os.pathsep.join(path)}


def run_child(command: Sequence[str], environment: dict[str, str], cwd: Path) -> str:
    """Standard output of ``command``.

    Raises:
        Unavailable: it failed or took longer than ``TIMEOUT_S``; the message is the first compiler error that it printed, or
            its last line, where Python names the exception.
    """
    try:
        done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"still running after {TIMEOUT_S} s: {' '.join(command)}") from error
    except OSError as error:
        raise Unavailable(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        telling = [line for line in lines if "error: " in line] + lines[-1:]
        raise Unavailable(f"exit status {done.returncode}: {telling[0] if telling else 'no message'}")
    return done.stdout


def architecture() -> str:
    """The architecture to compile for, as nvcc spells it: that of the GPU, and Hopper's where there is none."""
    import torch

    if not torch.cuda.is_available():
        return "90a"
    major, minor = torch.cuda.get_device_capability()
    # From Hopper on, kernels are built for the very architecture.
    return f"{major}{minor}{'a' if major >= 9 else ''}"


def bare_command(device: str, link: bool, architecture: str) -> list[str]:
    """The compiler's command for ``empty.cu`` or ``empty.cpp``, with the flags that a kernel gets.

    Raises:
        Unavailable: the compiler is not there.
    """
    common = ["-O3", "-std=c++17", f"-I{REPOSITORY / 'include'}", *(["-shared"] if link else ["-c"])]
    if device == "cuda":
        nvcc = find_nvcc()
        if nvcc is None:
            raise Unavailable("nvcc: not found by CUDA_HOME or PATH")
        code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
        return [str(nvcc), *common, code, "-Xcompiler", "-fPIC", "empty.cu", "-o", "empty.out"]
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise Unavailable("g++: not found by CXX or PATH")
    return [compiler, *common, "-fPIC", "empty.cpp", "-o", "empty.out"]


def time_bare(device: str, unit: Unit, architecture: str) -> float:
    """Seconds of the bare compiler on ``unit``, process start included."""
    command = bare_command(device, unit.link, architecture)
    with tempfile.TemporaryDirectory(prefix="jitk-bench-") as name:
        folder = Path(name)
        (folder / ("empty.cu" if device == "cuda" else "empty.cpp")).write_text(unit.source)
        environment = child_environment(folder)
        start = time.perf_counter()
        run_child(command, environment, folder)
        return time.perf_counter() - start


def first_call(library: str, device: str, cache: Path) -> dict[str, dict[str, float]]:
    """What ``bench.first_call`` prints for ``library`` with ``cache`` as it stands."""
    command = [sys.executable, "-m", "bench.first_call", library, device]
    output = run_child(command, child_environment(cache), cache)
    return json.loads(output.strip().splitlines()[-1])


def trace_children(library: str, device: str, cache: Path) -> int | None:
    """Programs that a warm process started, as strace counts them; None without strace."""
    strace = shutil.which("strace")
    if strace is None:
        return None
    log = cache / "strace.log"
    command = [strace, "-f", "-e", "trace=execve", "-o", str(log), sys.executable, "-m", "bench.first_call", library, device]
    run_child(command, child_environment(cache), cache)
    started = [line for line in log.read_text().splitlines() if "execve(" in line and line.rstrip().endswith("= 0")]
    # The first is the process itself.
    return len(started) - 1


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
    bare: dict[str, list[float]] = {unit.name: [] for unit in units(device, each_header)}
    missing: dict[str, str] = {}
    collected = {name: _Library(name, device) for name in libraries}

    def compiler(unit: Unit) -> Callable[[], None]:
        def step() -> None:
            try:
                bare[unit.name].append(time_bare(device, unit, architecture))
            except Unavailable as error:
                missing[unit.name] = reason(error)

        return step

    steps = {unit.name: compiler(unit) for unit in units(device, each_header)}
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
            lines.append(f"programs that strace saw in that whole process: {ours.traced}")
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
