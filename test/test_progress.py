"""What a person sees of a build."""

from __future__ import annotations

import io
import re
import sys
import threading
from pathlib import Path

import pytest
import store_child
from expecttest import assert_expected_inline

from torch_jit_ops import progress
from torch_jit_ops.builder.load import load
from torch_jit_ops.store.record import RECORD
from torch_jit_ops.store.store import Store


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITK_VERBOSE", "1")
    for name in ("LOCAL_RANK", "RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)


def without_seconds(text: str) -> str:
    return re.sub(r"\d+(\.\d+)? s\b", "N s", text)


def test_a_log_gets_a_line_at_each_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JITK_CACHE_DIR", str(tmp_path / "cache"))
    for number in (1, 2):
        load(store_child.unit(number))
        load(store_child.unit(number))
    assert_expected_inline(
        without_seconds(capsys.readouterr().err),
        """\
jitk: compiling store::tiny<1> for x86-64
jitk: compiled store::tiny<1> for x86-64 in N s
jitk: compiling store::tiny<2> for x86-64 (usually N s)
jitk: compiled store::tiny<2> for x86-64 in N s
""",
    )


@pytest.mark.parametrize(
    ("records", "usual"),
    [
        ([], None),
        ([("jitk.a", "cpu", 1.0), ("jitk.a", "cpu", 3.0), ("jitk.a", "cpu", 99.0), ("jitk.b", "cpu", 7.0)], 3.0),
        ([("jitk.b", "cpu", 7.0), ("jitk.a", "cuda", 20.0)], 7.0),
        ([("jitk.a", "cuda", 20.0)], None),
    ],
)
def test_what_a_build_usually_takes(tmp_path: Path, records: list[tuple[str, str, float]], usual: float | None) -> None:
    for number, (name, backend, seconds) in enumerate(records):
        folder = tmp_path / f"{name}-{number}/0"
        folder.mkdir(parents=True)
        (folder / RECORD).write_text(f'{{"name": "{name}", "backend": "{backend}", "seconds": {seconds}}}')
    (tmp_path / "jitk.a-x/0").mkdir(parents=True)
    assert Store(tmp_path).usual_seconds("jitk.a", "cpu") == usual


@pytest.mark.parametrize("name", ["LOCAL_RANK", "RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"])
@pytest.mark.parametrize(("rank", "verbose", "lines"), [("0", "1", 2), ("3", "1", 0), ("3", "2", 2), ("0", "0", 0)])
def test_one_rank_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, rank: str, verbose: str, lines: int
) -> None:
    monkeypatch.setenv(name, rank)
    monkeypatch.setenv("JITK_VERBOSE", verbose)
    with progress.building("it"):
        pass
    assert len(capsys.readouterr().err.splitlines()) == lines


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_builds_share_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    both = threading.Barrier(2)

    def build(what: str, usual: float) -> None:
        with progress.building(what, usual):
            both.wait()
            progress._live._display.refresh()  # type: ignore[union-attr]
            both.wait()

    workers = [threading.Thread(target=build, args=pair) for pair in (("first[a]", 12.4), ("second", 0.72))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert progress._live._display is None
    lines = [re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", line).strip("\r ") for line in screen.getvalue().splitlines()]
    assert any(re.fullmatch(r". jitk: compiling first\[a\] \(usually 12 s\)\s+0:00:0\d", line) for line in lines), lines
    assert any(re.fullmatch(r". jitk: compiling second \(usually 0\.7 s\)\s+0:00:0\d", line) for line in lines), lines
    assert sorted(without_seconds(line) for line in lines if "compiled" in line) == [
        "jitk: compiled first[a] in N s",
        "jitk: compiled second in N s",
    ]


def test_a_failed_build_leaves_the_terminal_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(RuntimeError), progress.building("it"):
        raise RuntimeError
    assert progress._live._display is None
    assert "compiled" not in sys.stderr.getvalue()  # type: ignore[attr-defined]
