"""Type checkers know what an op takes and returns, and the package itself is typed."""

from __future__ import annotations

import importlib.util
import json
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torch_jit_ops
from torch_jit_ops import Op
from torch_jit_ops.ops.norm import rmsnorm

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "test/types/program.py"


def refused_lines() -> set[int]:
    return {number for number, line in enumerate(PROGRAM.read_text().splitlines(), 1) if line.endswith("# refused")}


def mypy() -> str:
    """What mypy says of the package and of the program."""
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed: pip install '.[types]'")
    command = [sys.executable, "-m", "mypy", "torch_jit_ops", str(PROGRAM.relative_to(ROOT))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


def pyright() -> list[tuple[int, str]]:
    """Lines of the program that pyright refuses, and why."""
    if importlib.util.find_spec("pyright") is None:
        pytest.skip("pyright is not installed: pip install '.[types]'")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, str(PROGRAM)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    try:
        found = json.loads(done.stdout)["generalDiagnostics"]
    except ValueError:  # its node, or its own program, could not be had
        pytest.skip(f"pyright does not run here: {(done.stdout + done.stderr).strip()[-200:]}")
    return [(one["range"]["start"]["line"] + 1, one["message"]) for one in found if one["severity"] == "error"]


def test_mypy_refuses_what_is_wrong_and_nothing_else() -> None:
    """In the program and in the package, strictly."""
    said = mypy()
    lines = {int(number) for number in re.findall(r"^test/types/program\.py:(\d+): error:", said, re.MULTILINE)}
    assert lines == refused_lines(), said
    assert re.findall(r"^torch_jit_ops/.*error:.*", said, re.MULTILINE) == []


def test_pyright_refuses_what_is_wrong_and_nothing_else() -> None:
    assert {line for line, _ in pyright()} == refused_lines(), pyright()


def test_mypy_leaves_no_module_out() -> None:
    """Neither by pyproject.toml nor by a comment in the module, nor is an error ignored without saying which."""
    settings = (ROOT / "pyproject.toml").read_text().partition("[tool.mypy]\n")[2].partition("\n[")
    assert "strict = true" in settings[0]
    assert "tool.mypy" not in settings[2]
    files = {file.relative_to(ROOT): file.read_text() for file in (ROOT / "torch_jit_ops").rglob("*.py")}
    assert [name for name, text in files.items() if re.search(r"#\s*mypy:|#\s*type:\s*ignore(?!\[)|@no_type_check", text)] == []


def test_an_op_shows_its_docstring() -> None:
    assert rmsnorm.__doc__ == rmsnorm.reference.__doc__
    shown = pydoc.plain(pydoc.render_doc(rmsnorm))
    assert "``input / sqrt(mean(input ** 2) + eps) * weight`` over the last dimension" in shown
    assert "eps: added to the mean square." in shown


@pytest.mark.parametrize("overload", ["", "default", "out"])
def test_torch_ops_shows_it_below_the_call(overload: str) -> None:
    op = getattr(torch.ops.jitk.rmsnorm, overload) if overload else torch.ops.jitk.rmsnorm
    call, empty, first = op.__doc__.splitlines()[:3]
    assert call == "rmsnorm(input: Tensor, weight: Tensor, eps: float = 1e-06) -> Tensor"
    assert (empty, first.partition(" over ")[0]) == ("", "``input / sqrt(mean(input ** 2) + eps) * weight``")
    assert first in pydoc.plain(pydoc.render_doc(op))


def test_an_op_without_a_docstring_shows_its_call(tmp_path: Path) -> None:
    def silent(x: torch.Tensor, n: int = 3) -> torch.Tensor:
        return x * n

    op: Op = torch_jit_ops.OpLibrary("test_types", csrc=tmp_path).op()(silent)
    assert op.__doc__ is None
    assert op.packet.__doc__ == "silent(x: torch.Tensor, n: int = 3) -> torch.Tensor"
