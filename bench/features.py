"""Which feature works with which PyTorch.

    python -m bench.features                             the PyTorch of this interpreter, a minute or five
    python -m bench.features fuse vmap                   some of it; --list shows the names
    python -m bench.features --json 2.13.json            and keep it
    python -m bench.features --merge 2.11.json 2.13.json the table of several, as docs/compatibility.md has it

Method. Each feature has a probe in bench/probes, which runs in a process of its own and compares results; kernels are compiled
once and shared, Inductor's caches are off. Files of one version from two machines become one column: what one of them could not
try, for want of a GPU, the other may have. Exit status: 0; 1 if a feature does not work that should; 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.probes import LIMIT_S, NO, NOT_HERE, YES, Outcome, Probe

OK, FAILED, USAGE = 0, 1, 2
_PREFIX = "outcome: "
# These ignore what an op's fake says (pytorch#160472).
_WITHOUT_CACHES = {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}
# The worst is what a column shows where two machines differ.
_RANK = (NOT_HERE, YES, NO)


def known() -> dict[str, Probe]:
    """All probes by name, in the order of the table."""
    from bench.probes import PROBES, calls, gradients, graphs  # noqa: F401  (which declare them)

    order = ("Calls", "Derivatives", "`torch.compile`", "CUDA graphs", "Export and C++", "Tools")
    return dict(sorted(PROBES.items(), key=lambda item: order.index(item[1].group)))


def child(name: str) -> int:
    """Run a probe in this process, and print its outcome."""
    import torch

    from bench.probes import outcome_of

    torch.manual_seed(0)
    outcome = outcome_of(known()[name], torch.__version__)
    print(_PREFIX + json.dumps(dataclasses.asdict(outcome)), flush=True)
    # A crash while the process ends is a crash.
    return OK


def run_probe(command: Sequence[str], environment: Mapping[str, str], limit_s: float = LIMIT_S) -> Outcome:
    """The outcome that a process prints, or how it ended without one."""
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return Outcome(NO, f"still running after {limit_s:g} s")
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return Outcome(NO, f"exit status {done.returncode}: {lines[-1].strip() if lines else 'no message'}")
    said = [line for line in done.stdout.splitlines() if line.startswith(_PREFIX)]
    return Outcome(**json.loads(said[-1].removeprefix(_PREFIX))) if said else Outcome(NO, "it ended without an outcome")


def run(probes: Sequence[Probe]) -> dict[str, dict[str, Any]]:
    """Try each in a process of its own, and say so. The features of a file of results."""
    from bench.child import child_environment

    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="jitk-features-", ignore_cleanup_errors=True) as folder:
        environment = child_environment(Path(folder)) | _WITHOUT_CACHES
        for probe in probes:
            start = time.perf_counter()
            outcome = run_probe([sys.executable, "-m", "bench.features", "--probe", probe.name], environment, probe.limit_s)
            seconds = time.perf_counter() - start
            found[probe.name] = {"group": probe.group, "title": probe.title, **dataclasses.asdict(outcome), "seconds": seconds}
            print(f"{outcome.status:<10} {seconds:5.1f} s  {probe.name}  {outcome.reason}".rstrip(), flush=True)
    return found


def column(document: Mapping[str, Any]) -> str:
    """The PyTorch that a file of results is about, such as ``2.11.0+cu130``."""
    return str(document["environment"]["torch"]).partition(",")[0]


def merge(documents: Sequence[Mapping[str, Any]]) -> str:
    """The table of files of results, in Markdown: a row for each feature, a column for each PyTorch, and notes below.

    Raises:
        ValueError: a file is not one of this command.
    """
    cells: dict[str, dict[str, Outcome]] = {}
    for document in documents:
        if not isinstance(document.get("features"), dict) or "torch" not in document.get("environment", {}):
            raise ValueError("a file holds no features: it must be one of python -m bench.features --json")
        for feature in document["features"].values():
            row = cells.setdefault(f"{feature['group']}: {feature['title']}", {})
            new = Outcome(feature["status"], feature["reason"], feature["expected"])
            old = row.get(column(document), new)
            row[column(document)] = max(old, new, key=lambda outcome: _RANK.index(outcome.status))
    columns = list(dict.fromkeys(column(document) for document in documents))
    notes: dict[str, int] = {}

    def cell(outcome: Outcome | None) -> str:
        if outcome is None or outcome.status == YES:
            return "" if outcome is None else YES
        return f"{outcome.status} ({notes.setdefault(outcome.reason, len(notes) + 1)})"

    lines = [f"| feature | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    for title, row in cells.items():
        lines.append(f"| {title} | {' | '.join(cell(row.get(name)) for name in columns)} |")
    if notes:
        lines += ["", *(f"{number}. {reason}" for reason, number in notes.items())]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m bench.features", description=__doc__, formatter_class=form)
    parser.add_argument("names", nargs="*", metavar="FEATURE", help="only these (default: all)")
    parser.add_argument("--list", action="store_true", help="show the names of the features, and stop")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found, and the environment, to FILE")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="FILE", help="print the table of such files, and try nothing")
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.merge:
        try:
            print(merge([json.loads(path.read_text()) for path in options.merge]), end="")
        except (OSError, ValueError) as error:
            print(error, file=sys.stderr)
            return USAGE
        return OK
    if options.probe:
        return child(options.probe)
    probes = known()
    unknown = [name for name in options.names if name not in probes]
    if unknown:
        print(f"unknown feature {', '.join(unknown)}; known: {', '.join(probes)}", file=sys.stderr)
        return USAGE
    if options.list:
        print("\n".join(f"{probe.name:<22} {probe.group}: {probe.title}" for probe in probes.values()))
        return OK

    from bench import environment, report

    facts = environment.describe() | {"command": " ".join(["python -m bench.features", *(argv or sys.argv[1:])])}
    report.print_environment(report.console(), facts)
    document = {
        "environment": facts,
        "features": run([probe for probe in probes.values() if probe.name in (options.names or probes)]),
    }
    if options.json:
        report.write_json(options.json, document)
    print("\n" + merge([document]), end="")
    failed = [name for name, feature in document["features"].items() if feature["status"] == NO and not feature["expected"]]
    for name in failed:
        print(f"{name}: {document['features'][name]['reason']}", file=sys.stderr)
    return FAILED if failed else OK


if __name__ == "__main__":
    sys.exit(main())
