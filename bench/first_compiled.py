"""From the start of a process to the first result of a compiled model, with builds in the background and without.

    python -m bench.first_compiled cuda --rounds 5
    python -m bench.first_compiled cpu --json results.json

Method. A new process for each figure, with an empty kernel cache, or one that an earlier round filled, and empty caches of
Inductor. The model has four gated layers with two kernels of ours. The clock starts before the process does and stops when the
result is on the host; the order changes from round to round.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

WAYS = ("cold, background", "cold", "warm, background", "warm")
START = "BENCH_STARTED_AT"  # when the parent started this process, in seconds since 1970


def child(device: str) -> dict[str, float]:
    """Seconds since the start: torch and the library imported, the first result, and the second one for comparison."""
    start = float(os.environ[START])
    stages: dict[str, float] = {}
    import torch

    import torch_jit_ops  # noqa: F401  (registers the ops)

    stages["imported"] = time.time() - start

    class Layer(torch.nn.Module):
        def __init__(self, op: object) -> None:
            super().__init__()
            self.up, self.down, self.op = torch.nn.Linear(512, 2048), torch.nn.Linear(1024, 512), op

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(self.op(self.up(x)))

    with torch.inference_mode():
        ops = [torch.ops.jitk.silu_and_mul, torch.ops.jitk.gelu_and_mul] * 2
        model = torch.nn.Sequential(*map(Layer, ops)).to(device, torch.bfloat16)
        x = torch.randn(8, 512).to(device, torch.bfloat16)
        # Not ours: the CUDA context, cuBLAS and its first kernels.
        torch.nn.functional.linear(x, x).cpu()
        stages["model"] = time.time() - start
        compiled = torch.compile(model, fullgraph=True)
        for stage in ("first result", "second result"):
            compiled(x).cpu()
            stages[stage] = time.time() - start
    return stages


def measure(device: str, rounds: int) -> dict[str, list[dict[str, float]]]:
    """The stages of each process, by way."""
    from bench.child import child_environment, run_child
    from bench.timing import round_order

    taken: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(prefix="jitk-bench-", ignore_cleanup_errors=True) as name:
        warm = Path(name) / "warm"
        warm.mkdir(mode=0o700)
        for index in range(-1, rounds):  # the first one fills the warm cache
            for way in ("warm",) if index < 0 else round_order(list(WAYS), index):
                folder = Path(tempfile.mkdtemp(dir=name))
                environment = child_environment(folder)
                if way.startswith("warm"):
                    environment["JITK_CACHE_DIR"] = str(warm)
                environment["JITK_BACKGROUND"] = "1" if way.endswith("background") else "0"
                environment[START] = repr(time.time())
                said = run_child([sys.executable, "-m", "bench.first_compiled", device, "--child"], environment, folder)
                if index >= 0:
                    taken[way].append(json.loads(said.splitlines()[-1]))
    return taken


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.first_compiled", description=__doc__.splitlines()[0])
    parser.add_argument("device", choices=("cuda", "cpu"))
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure and the environment to FILE")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        print(json.dumps(child(options.device)))
        return 0

    from bench import environment, report
    from bench.timing import Samples

    out = report.console()
    facts = environment.describe()
    report.print_environment(out, facts)
    taken = measure(options.device, options.rounds)
    columns = ["kernel cache, builds", "imported", "model", "first result", "spread", "second result"]
    rows = []
    for way, runs in taken.items():
        median = {stage: Samples(tuple(run[stage] for run in runs)).median for stage in runs[0]}
        first = [run["first result"] for run in runs]
        again = median["second result"] - median["first result"]
        cells = [median["imported"], median["model"], median["first result"]]
        rows.append([way, *(f"{cell:.2f} s" for cell in cells), f"{min(first):.2f}..{max(first):.2f}", f"{again * 1e3:.1f} ms"])
    report.print_table(
        out, f"seconds since the process started, on {options.device}, median of {options.rounds}", columns, rows
    )
    if options.json:
        report.write_json(options.json, {"environment": facts, "first_compiled": taken})
    return 0


if __name__ == "__main__":
    sys.exit(main())
