"""Tests marked ``serial``, in a suite of two processes: they run alone, and last."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import alone
import pytest

# Each test writes down when it began and ended.
TESTS = r"""
import os, time
import pytest

def note(name, seconds):
    begin = time.monotonic()
    time.sleep(seconds)
    with open("log", "a") as log:
        log.write(f"{name} {begin} {time.monotonic()}\n")

@pytest.mark.serial
@pytest.mark.parametrize("number", range(3))
def test_serial(number): note("serial", 0.05)

@pytest.mark.parametrize("number", range(20))
def test_other(number): note("other", 0.05)

def test_another(): note("other", 0.05)
"""


@pytest.mark.parametrize("distribution", ["load", "worksteal", "no"])
def test_serial_tests_run_alone(tmp_path: Path, distribution: str) -> None:
    (tmp_path / "test_suite.py").write_text(TESTS)
    processes = "0" if distribution == "no" else "2"
    command = [sys.executable, "-m", "pytest", "-p", "alone", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    environment = {"PATH": "/bin:/usr/bin", "PYTHONPATH": str(Path(alone.__file__).parent), "JITK_TEST_FOLDER": str(tmp_path)}
    done = subprocess.run(
        [*command, "-n", processes, "--dist", distribution],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0
    runs = [
        (name, float(begin), float(end)) for name, begin, end in map(str.split, (tmp_path / "log").read_text().splitlines())
    ]
    assert len(runs) == 24
    serial = [run for run in runs if run[0] == "serial"]
    assert len(serial) == 3
    for run in serial:
        others = [other for other in runs if other is not run and other[1] < run[2] and run[1] < other[2]]
        assert others == []
    if distribution != "no":
        overlaps = [(a, b) for a in runs for b in runs if a is not b and a[1] < b[2] and b[1] < a[2]]
        assert overlaps, "the suite did not run in two processes at all"
    else:
        assert [name for name, _, _ in runs] == ["other"] * 21 + ["serial"] * 3
