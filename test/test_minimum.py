"""The guard against tests that vanish, in suites of two tests that pass and one that is skipped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import minimum
import pytest

TESTS = """
import pytest

def test_one(): pass
def test_two(): pass
def test_skipped(): pytest.skip()
"""


def run(folder: Path, expected: str, *args: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_suite.py").write_text(TESTS)
    environment = {**os.environ, "JITK_TEST_MINIMUM": expected, "PYTHONPATH": str(Path(minimum.__file__).parent)}
    command = [sys.executable, "-m", "pytest", "-p", "minimum", "-p", "no:cacheprovider", "--rootdir", str(folder), *args]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("processes", ["0", "2"])
def test_too_few_tests_fail_the_run(tmp_path: Path, processes: str) -> None:
    done = run(tmp_path, "3", "-n", processes)
    assert done.returncode == 1
    shown = done.stdout[done.stdout.index(" too few tests ") :].splitlines()
    assert shown[1] == "2 tests passed, expected at least 3 (JITK_TEST_MINIMUM): where are the others?"


@pytest.mark.parametrize("expected", ["2", ""])
@pytest.mark.parametrize("processes", ["0", "2"])
def test_enough_tests(tmp_path: Path, expected: str, processes: str) -> None:
    done = run(tmp_path, expected, "-n", processes)
    assert done.returncode == 0
    assert "too few" not in done.stdout


def test_a_suite_without_tests(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = run(tmp_path, "1", "--override-ini", "testpaths=empty")
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
    assert "0 tests passed, expected at least 1" in done.stdout


@pytest.mark.parametrize("choice", [["-k", "one"], ["-m", "not slow"], ["test_suite.py"], ["--collect-only"]], ids=" ".join)
def test_chosen_tests_are_not_counted(tmp_path: Path, choice: list[str]) -> None:
    assert run(tmp_path, "3", *choice).returncode == 0


def test_what_is_no_number(tmp_path: Path) -> None:
    done = run(tmp_path, "all")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert done.stderr == "ERROR: JITK_TEST_MINIMUM is 'all'; it must be a number of tests\n\n"
