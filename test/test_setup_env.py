"""The environment that the Makefile sets up: what it asks of Python, what it installs, and what it says."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from child import ROOT

SCRIPT = ROOT / "tools" / "setup_env.py"
_spec: Any = importlib.util.spec_from_file_location("setup_env", SCRIPT)
setup_env: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(setup_env)


class Machine:
    """Commands that are asked for, by what they are for, and whether each succeeds: ``"torch here"`` with this Python."""

    def __init__(self, **succeeds: bool | list[bool]) -> None:
        self.succeeds = succeeds
        self.done: list[str] = []
        self.said: list[str] = []

    def run(self, command: Sequence[str], quiet: bool) -> bool:
        words = " ".join(command[1:])
        own = command[0] == sys.executable
        what = (
            "nvcc" if "backends.CUDA" in words
            else "torch_here" if own and "import torch" in words
            else "torch_there" if "import torch" in words
            else "pip" if words.endswith("--version")
            else "venv" if "-m venv" in words
            else "install"
        )  # fmt: skip
        self.done.append(what)
        answer = self.succeeds.get(what, True)
        return answer.pop(0) if isinstance(answer, list) else answer

    def set_up(self, *, cuda: bool = False) -> None:
        setup_env.set_up(Path("env"), "torch==2.13.0", cuda, self.run, self.said.append)


def test_what_will_do_stays() -> None:
    machine = Machine()
    machine.set_up()
    assert (machine.done, machine.said) == (["pip", "torch_there"], [])


def test_the_torch_of_this_python_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Path] = []
    monkeypatch.setattr(setup_env, "show_packages_of_this_python", shown.append)
    machine = Machine(pip=False, torch_there=False)
    machine.set_up()
    assert machine.done == ["pip", "venv", "torch_there", "torch_here"]
    assert (machine.said, shown) == ([f"setting up env on top of the torch of {sys.executable}"], [Path("env")])


def test_else_one_is_installed() -> None:
    machine = Machine(torch_there=[False, True], torch_here=False)
    machine.set_up()
    assert machine.done == ["pip", "torch_there", "torch_here", "install", "torch_there"]
    assert machine.said == ["setting up env with torch==2.13.0, which may take minutes and gigabytes"]


@pytest.mark.parametrize(
    ("succeeds", "cuda", "text"),
    [
        (
            {"pip": False, "venv": False},
            False,
            f"env cannot be made: {sys.executable} -m venv failed (Debian, Ubuntu: apt-get install python3-venv)",
        ),
        ({"torch_there": False, "torch_here": False}, False, "torch==2.13.0 will not do: it must be torch >= 2.11"),
        (
            {"torch_there": False, "torch_here": False, "install": False},
            True,
            "torch==2.13.0 will not do: it must be torch >= 2.11 built with CUDA",
        ),
    ],
)
def test_what_cannot_be_made(succeeds: dict[str, bool], cuda: bool, text: str) -> None:
    with pytest.raises(SystemExit) as caught:
        Machine(**succeeds).set_up(cuda=cuda)
    assert str(caught.value) == text


@pytest.mark.parametrize("chosen", ["no-such-compiler", "no-such-compiler g++"])
def test_no_compiler(monkeypatch: pytest.MonkeyPatch, chosen: str) -> None:
    monkeypatch.setenv("CXX", chosen)
    with pytest.raises(SystemExit) as caught:
        Machine().set_up()
    assert str(caught.value) == (
        f"no C++ compiler ({chosen}): install g++ 11 or newer (Debian, Ubuntu: apt-get install g++), or set CXX to one"
    )


@pytest.mark.parametrize(
    ("succeeds", "said"),
    [
        ({}, []),
        ({"nvcc": False}, ["there is no CUDA compiler: installing one into env"]),
        (
            {"nvcc": False, "install": False},
            [
                "there is no CUDA compiler: installing one into env",
                "that failed: ops on the GPU will run their PyTorch reference",
            ],
        ),
    ],
)
def test_nvcc(succeeds: dict[str, bool], said: list[str]) -> None:
    machine = Machine(**succeeds)
    setup_env.add_nvcc(Path("env"), machine.run, machine.said.append)
    assert machine.said == said


@pytest.mark.parametrize(
    ("torch", "cuda", "will_do"),
    [("2.11.0", "None", True), ("2.10.1", "None", False), ("2.14.0a0+git1", "None", True), ("2.13.0", "'13.0'", True)],
)
@pytest.mark.parametrize("wants_cuda", [False, True])
def test_which_torch_will_do(tmp_path: Path, torch: str, cuda: str, will_do: bool, wants_cuda: bool) -> None:
    (tmp_path / "torch.py").write_text(f"class version: cuda = {cuda}\n__version__ = {torch!r}\n")
    code = setup_env._TORCH_WILL_DO.format(oldest=setup_env.OLDEST_TORCH, cuda=wants_cuda)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=False)
    assert (done.returncode == 0) == (will_do and (cuda != "None" or not wants_cuda)), done.stderr


def test_an_environment_in_earnest(tmp_path: Path) -> None:
    """By the script itself, on top of this Python, whose packages it sees."""
    command = [sys.executable, str(SCRIPT), str(tmp_path / "env"), "--torch", "torch"]
    first, second = (subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert (first, second) == (f"setting up {tmp_path / 'env'} on top of the torch of {sys.executable}\n", "")
    assert subprocess.run([tmp_path / "env/bin/python", "-c", "import torch"], check=False).returncode == 0
