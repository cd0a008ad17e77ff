"""Runs Python code in a process of its own: for what happens once in a process, or must not happen in this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_python(code: str, **environment: str | os.PathLike[str]) -> str:
    """What ``code`` prints. Fails if it does."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **{name: str(value) for name, value in environment.items()}}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
