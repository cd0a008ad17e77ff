"""Processes that are measured: what they inherit, and what their failure says."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from bench.environment import REPOSITORY, bench_environment
from bench.providers import Unavailable

# A child that hangs must not hang the benchmark: nothing here takes a tenth of it.
TIMEOUT_S = 300


def child_environment(cache: Path) -> dict[str, str]:
    """The environment of a measured process: this checkout importable, and all that is compiled goes below ``cache``."""
    path = [*filter(None, [os.environ.get("PYTHONPATH")]), str(REPOSITORY)]
    # An installed package has its bytecode, so this checkout must be allowed to keep its own.
    return os.environ | bench_environment(cache) | {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPATH": os.pathsep.join(path)}


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
