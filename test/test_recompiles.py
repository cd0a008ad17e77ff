"""No graph breaks and no recompiles for any number of tokens: each scenario in a process that has compiled nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import OPS, last_dtypes, samples_of, tokens_of
from child import ROOT


def run(scenario: str, backend: str, folder: Path) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "test")]),
        "TORCHINDUCTOR_CACHE_DIR": str(folder),  # and its caches of graphs are off in all of this suite
    }
    command = [sys.executable, str(ROOT / "test/recompile_child.py"), scenario, backend]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("scenario", "backend", "graphs"),
    [
        ("marked", "aot_eager", 1),  # mark_dynamic
        ("dynamic", "aot_eager", 1),  # torch.compile(dynamic=True)
        ("automatic", "aot_eager", 2),  # a static graph, then one for all sizes
        ("nonzero", "inductor", 1),  # a size that is known when the graph runs
        ("item", "aot_eager", 1),  # the same, with torch._check
    ],
)
def test_one_graph_of_all_ops_serves_every_number_of_tokens(scenario: str, backend: str, graphs: int, tmp_path: Path) -> None:
    ops = [op for op in OPS if any((tokens_of(sample) or 0) > 1 for sample in samples_of(op, "cpu", last_dtypes(op)))]
    assert len(ops) > 10
    assert run(scenario, backend, tmp_path) == f"{len(ops)} ops, 0 graph breaks, {graphs} graphs\n"
