"""``python -m bench.features``: what becomes of a probe, what the table says, and that probes can fail."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from child import ROOT
from expecttest import assert_expected_inline
from torch import Tensor

import torch_jit_ops
from bench import environment, features
from bench.features import FAILED, OK, USAGE, main, merge, run_probe
from bench.probes import NO, NOT_HERE, YES, NotHere, Outcome, Probe, gradients, needs_gpu, outcome_of, require


def document(version: str, **features: tuple[str, str]) -> dict[str, Any]:
    """A file of results: the status and the reason of each feature."""
    return {
        "environment": {"torch": f"{version}, CUDA None, Python 3.11"},
        "features": {
            name: {"group": "Calls", "title": name, "status": status, "reason": reason, "expected": False, "seconds": 1.0}
            for name, (status, reason) in features.items()
        },
    }


def test_the_table_of_several_versions() -> None:
    old = document("2.11.0", plain=(YES, ""), planned=(NO, "needs PyTorch 2.13"), graph=(NOT_HERE, "no GPU here"))
    with_gpu = document("2.11.0", plain=(YES, ""), planned=(YES, ""), graph=(YES, ""))
    new = document("2.15.0", plain=(NO, "TypeError: changed"), graph=(NOT_HERE, "no GPU here"), another=(YES, ""))
    assert_expected_inline(
        merge([old, with_gpu, new]),
        """\
| feature | 2.11.0 | 2.15.0 |
| --- | --- | --- |
| Calls: plain | yes | no (1) |
| Calls: planned | no (2) |  |
| Calls: graph | yes | not tried (3) |
| Calls: another |  | yes |

1. TypeError: changed
2. needs PyTorch 2.13
3. no GPU here
""",
    )


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("print('noise'); print('outcome: {\"status\": \"yes\"}'); print('more')", Outcome(YES)),
        ("pass", Outcome(NO, "it ended without an outcome")),
        (
            "import sys; print('a warning', file=sys.stderr); sys.exit('no such thing')",
            Outcome(NO, "exit status 1: no such thing"),
        ),
        # One that dies after its outcome has none.
        ('import os; print(\'outcome: {"status": "yes"}\', flush=True); os.abort()', Outcome(NO, "exit status -6: no message")),
        ("import time; time.sleep(60)", Outcome(NO, "still running after 1 s")),
    ],
)
def test_how_a_process_may_end(code: str, outcome: Outcome) -> None:
    assert run_probe([sys.executable, "-c", code], {"PYTHONDONTWRITEBYTECODE": "1"}, limit_s=1) == outcome


def away() -> None:
    raise NotHere("no such machine")


def wrong() -> None:
    require(2 * 2 == 5, "two by two\nis four")


@pytest.mark.parametrize(
    ("run", "since", "version", "outcome"),
    [
        (lambda: None, None, "2.11.0+cpu", Outcome(YES)),
        (away, None, "2.11.0", Outcome(NOT_HERE, "no such machine")),
        (wrong, None, "2.11.0", Outcome(NO, "AssertionError: two by two")),
        (wrong, "2.13", "2.11.0+cu130", Outcome(NO, "needs PyTorch 2.13", expected=True)),
        (wrong, "2.13", "2.13.0", Outcome(NO, "AssertionError: two by two")),
        (lambda: None, "2.13", "2.11.0", Outcome(YES)),
        (lambda: {}[""], None, "2.11.0", Outcome(NO, "KeyError: ''")),
    ],
)
def test_what_a_probe_comes_to(run: Callable[[], None], since: str | None, version: str, outcome: Outcome) -> None:
    assert outcome_of(Probe("name", "group", "title", run, since), version) == outcome


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for name in ("cuda_kernel", "reduce_overhead", "manual_capture"):
        assert outcome_of(features.known()[name], "2.13") == Outcome(NOT_HERE, "no GPU here")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    needs_gpu()


def twice_as_much(input: Tensor) -> Tensor:
    return torch_jit_ops.ops.activation.silu_and_mul.default(input.detach()) * 2 + 0 * input.sum()


def test_a_wrong_result_is_a_no(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("out_form", "default_derivative", "jvp", "autocast")
    probes = features.known()
    for name in names:
        assert outcome_of(probes[name], "2.13") == Outcome(YES)
    op = (
        torch_jit_ops.ops.activation.silu_and_mul
    )  # itself it follows its reference, so the probes get another one to compare with
    other = SimpleNamespace(default=op.default, out=op.out, reference=twice_as_much)
    for module in (torch_jit_ops.ops.activation, gradients):
        monkeypatch.setattr(module, "silu_and_mul", other)
    for name in names:
        assert outcome_of(probes[name], "2.13").status == NO


@pytest.mark.parametrize(
    ("status", "expected", "code", "err"),
    [
        (YES, False, OK, ""),
        (NO, True, OK, ""),
        (NOT_HERE, False, OK, ""),
        (NO, False, FAILED, "jvp: it is broken\n"),
    ],
)
def test_exit_status(
    status: str,
    expected: bool,
    code: int,
    err: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[str] = []

    def outcome(command: list[str], *_: object) -> Outcome:
        asked.append(command[-1])
        return Outcome(status, "" if status == YES else "it is broken", expected)

    monkeypatch.setattr(features, "run_probe", outcome)
    monkeypatch.setattr(environment, "describe", lambda: {"torch": "2.13.0"})
    file = tmp_path / "found.json"
    assert main(["jvp", "--json", str(file)]) == code
    said = capsys.readouterr()
    assert (asked, said.err) == (["jvp"], err)
    assert "| feature | 2.13.0 |\n" in said.out
    assert main(["--merge", str(file)]) == OK
    assert said.out.endswith(capsys.readouterr().out)


def test_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["jvpp"]) == USAGE
    assert capsys.readouterr().err.startswith("unknown feature jvpp; known: cpu_kernel, ")
    (tmp_path / "other.json").write_text(json.dumps({"environment": {"torch": "2.13"}, "kernels": []}))
    assert main(["--merge", str(tmp_path / "other.json")]) == USAGE
    assert capsys.readouterr().err == "a file holds no features: it must be one of python -m bench.features --json\n"
    assert main(["--merge", str(tmp_path / "away.json")]) == USAGE
    assert "No such file or directory" in capsys.readouterr().err


def test_a_probe_in_its_own_process() -> None:
    (found,) = features.run([features.known()["cuda_kernel"]]).values()
    assert (found["status"], found["reason"]) == ((YES, "") if torch.cuda.is_available() else (NOT_HERE, "no GPU here"))


def test_the_document_has_every_feature() -> None:
    rows = re.findall(r"^\| (\S.*?) \|", (ROOT / "docs/compatibility.md").read_text(), re.MULTILINE)
    assert rows[2:] == [f"{probe.group}: {probe.title}" for probe in features.known().values()]
