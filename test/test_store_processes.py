"""Many processes and threads at one cache: they build once, and no killed one stands in the way of another."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import filelock
import pytest
import store_child
from expecttest import assert_expected_inline

from torch_jit_ops import process
from torch_jit_ops.builder.load import load as load_unit
from torch_jit_ops.builder.unit import Unit
from torch_jit_ops.store import lock
from torch_jit_ops.store.record import LOG
from torch_jit_ops.store.store import Store

_FORK = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module", autouse=True)
def _server() -> None:
    """Forks every process of these tests from one that has imported PyTorch."""
    _FORK.set_forkserver_preload(["store_child"])
    with pytest.MonkeyPatch.context() as patch:  # Python 3.11 does not hand sys.path on
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()


class Machine:
    """A cache, a compiler that writes down what it compiles, and processes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cache = root / "cache"
        self.log = root / "compiled"
        self.stderr = root / "stderr"
        self.compiler = root / "c++"
        self.set_delay(0)
        self.environment = {
            "JITK_CACHE_DIR": str(self.cache),
            "CXX": str(self.compiler),
            "STDERR": str(self.stderr),
            "JITK_VERBOSE": "1",
        }

    def set_delay(self, seconds: float) -> None:
        compile_ = f'echo "$*" >> {self.log}; g++ "$@"; code=$?; sleep {seconds}; exit $code'
        text = f'#!/bin/sh\ncase "$*" in *" -c "*) {compile_};; esac\nexec g++ "$@"\n'
        self.compiler.write_text(text)
        self.compiler.chmod(0o755)

    def compiled(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0

    def start(self, units: Sequence[Unit], processes: int = 1, threads: int = 1, **environment: str) -> Any:
        barrier, answers = _FORK.Barrier(processes), _FORK.Queue()
        self.kept = barrier  # until they have it, too
        arguments = ({**self.environment, **environment}, units, threads, barrier, answers)
        started = [_FORK.Process(target=store_child.load, args=arguments, daemon=True) for _ in range(processes)]
        for child in started:
            child.start()
        return started, answers

    def run(self, units: Sequence[Unit], processes: int = 1, threads: int = 1, **environment: str) -> list[Any]:
        started, answers = self.start(units, processes, threads, **environment)
        results = [answers.get(timeout=60) for _ in started]
        for child in started:
            child.join()
        assert [warning for _, warnings in results for warning in warnings] == []
        return [answer for found, _ in results for answer in found]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    made = Machine(tmp_path)
    for name, text in made.environment.items():
        monkeypatch.setenv(name, text)
    yield made
    process.reset()


def load_here(unit: Unit) -> int:
    process.reset()
    return store_child.value(load_unit(unit))


def test_sixteen_processes_of_four_threads_build_once(machine: Machine) -> None:
    units = [store_child.unit(number) for number in (1, 2)]
    answers = machine.run(units, processes=16, threads=4)
    assert sorted(result for result, _ in answers) == [1] * 64 + [2] * 64
    assert machine.compiled() == 2
    assert os.listdir(machine.cache / "staging") == []


def test_threads_share_a_failure_and_compile_once(machine: Machine) -> None:
    answers = machine.run([store_child.unit(text="static_assert(false);\n")] * 3, threads=4)
    assert {result.split("\n")[0] for result, _ in answers} == {"BuildError: store::tiny<0> did not compile (cpu, x86-64)"}
    assert machine.compiled() == 1


@pytest.mark.serial  # who comes within a second must have come
def test_processes_that_wait_for_a_failure_share_it(machine: Machine) -> None:
    machine.set_delay(1)
    unit = store_child.unit(text="static_assert(false);\n")
    answers = machine.run([unit], processes=8, threads=2)
    assert len({result for result, _ in answers}) == 1
    assert answers[0][0].startswith("BuildError: store::tiny<0> did not compile (cpu, x86-64)\n")
    assert machine.compiled() == 1
    machine.run([unit])
    assert machine.compiled() == 2, "who comes later compiles anew: the cause may be gone"


@pytest.mark.serial  # who comes within a second must have come
def test_a_failure_of_other_inputs_is_not_shared(machine: Machine) -> None:
    machine.set_delay(1)
    folder = machine.root / "csrc"
    folder.mkdir()
    header = folder / "value.h"
    header.write_text("wrong")
    text = '#include "value.h"\nextern "C" __attribute__((visibility("default"))) int jitk_value() { return VALUE; }\n'
    unit = store_child.unit(text=text, include=(folder,))
    _, failing = machine.start([unit])
    while machine.compiled() == 0:
        time.sleep(0.01)
    time.sleep(0.3)  # it has read the header
    _, fixed = machine.start([unit])
    time.sleep(0.3)
    machine.set_delay(0)
    header.write_text("#define VALUE 7\n")
    assert fixed.get(timeout=60)[0][0][0] == 7
    assert failing.get(timeout=60)[0][0][0].startswith("BuildError")


@pytest.mark.parametrize("death", store_child.DEATHS)
def test_a_process_that_is_killed(machine: Machine, death: str) -> None:
    (killed,), _ = machine.start([store_child.unit(3)], DEATH=death)
    killed.join()
    assert killed.exitcode == -9
    start = time.monotonic()
    assert load_here(store_child.unit(3)) == 3
    assert time.monotonic() - start < lock.PATIENCE_S
    assert os.listdir(machine.cache / "staging") == [], "the dead build's folder is still there"
    assert machine.run([store_child.unit(3)])[0][0] == 3
    assert machine.compiled() == (1 if death in ("compiling", "holding the lock") else 2)


def test_a_process_that_is_killed_at_any_time(machine: Machine) -> None:
    chance = random.Random(0)
    for number in range(10):
        (killed,), _ = machine.start([store_child.unit(number)])
        time.sleep(chance.uniform(0, 0.5))
        killed.kill()
        killed.join()
        start = time.monotonic()
        assert load_here(store_child.unit(number)) == number
        assert time.monotonic() - start < lock.PATIENCE_S
    said = machine.stderr.read_text() if machine.stderr.exists() else ""
    assert "waiting" not in said


@pytest.mark.serial  # who comes within a second must have come
def test_a_process_that_is_killed_while_others_wait(machine: Machine) -> None:
    machine.set_delay(1)
    (killed,), _ = machine.start([store_child.unit(4)])
    while machine.compiled() == 0:
        time.sleep(0.01)
    waiting, answers = machine.start([store_child.unit(4)], processes=4)
    time.sleep(0.3)
    killed.kill()
    results = [answers.get(timeout=60)[0][0][0] for _ in waiting]
    assert results == [4] * 4
    assert machine.compiled() == 2


def hold(path: Path, label: str) -> tuple[threading.Event, threading.Thread]:
    """Hold a lock, as another process would: until the event is set."""
    held, done = threading.Event(), threading.Event()

    def work() -> None:
        with lock.building(path, label):
            held.set()
            done.wait()

    thread = threading.Thread(target=work)
    thread.start()
    held.wait()
    return done, thread


def test_who_waits_says_for_whom(machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(lock, "PATIENCE_S", 0.1)
    path = machine.cache / "locks/name.lock"
    done, thread = hold(path, "jitk::silu_and_mul<bf16_t> for sm_90a")
    note = path.with_suffix(".owner")
    note.write_text(json.dumps({**json.loads(note.read_text()), "pid": 1, "host": "node7", "start": 1e9}))
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    threading.Timer(0.5, done.set).start()
    with lock.building(path, "mine"):
        assert lock.owner(path).label == "mine"  # type: ignore[union-attr]
    thread.join()
    monkeypatch.undo()
    time.tzset()
    assert_expected_inline(
        capsys.readouterr().err,
        """\
jitk: waiting for process 1 on node7, which has been compiling jitk::silu_and_mul<bf16_t> for sm_90a since 01:46:40
""",
    )
    assert not note.exists()


def test_a_dead_holder_whose_child_has_its_lock_stops_nobody(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE_S", 0.1)
    path = machine.cache / "locks/name.lock"
    done, thread = hold(path, "theirs")
    note = path.with_suffix(".owner")
    note.write_text(json.dumps({**json.loads(note.read_text()), "pid": 2**22 + 1}))
    with lock.building(path, "mine"):
        assert thread.is_alive()
    done.set()
    thread.join()


@pytest.mark.parametrize("host", ["here", "elsewhere"])
def test_lock_files_that_were_left(machine: Machine, host: str) -> None:
    unit = store_child.unit(5)
    path = Store(machine.cache).lock_path(unit.name, unit.key())
    path.parent.mkdir(parents=True, mode=0o700)
    machine.cache.chmod(0o700)
    path.write_text("half a line")
    system = lock.system() if host == "here" else "another"
    path.with_suffix(".owner").write_text(
        json.dumps({"pid": 2**22 + 1, "host": host, "system": system, "start": 0, "label": ""})
    )
    folder = machine.cache / f"{unit.name}-{unit.key()[:16]}"
    for place in (machine.cache, folder, machine.cache / "staging"):  # as torch.utils.cpp_extension leaves them
        place.mkdir(mode=0o700, exist_ok=True)
        (place / "lock").touch()
    start = time.monotonic()
    assert load_here(unit) == load_here(unit) == 5
    assert time.monotonic() - start < lock.PATIENCE_S
    assert machine.compiled() == 1


@pytest.mark.parametrize("error", [NotImplementedError(), OSError(38, "Function not implemented")])
def test_without_locks_the_rename_is_enough(machine: Machine, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", fail)
    monkeypatch.setattr(Store, "find", lambda *_, **__: None)  # so that both build
    unit = store_child.unit(6)
    for _ in range(2):
        process.reset()
        loaded = load_unit(unit)
        assert store_child.value(loaded) == 6
        assert loaded.path.is_file(), "of the two, the first stays"
    assert machine.compiled() == 2
    monkeypatch.undo()
    variants = list(Store(machine.cache).variants())
    assert len(variants) == 1
    assert os.listdir(machine.cache / "staging") == []


def test_a_fork_in_the_middle_of_a_build(machine: Machine) -> None:
    machine.set_delay(0.5)
    unit = store_child.unit(7)
    process.reset()
    builder = threading.Thread(target=load_unit, args=(unit,))
    builder.start()
    while machine.compiled() == 0:
        time.sleep(0.01)
    child = os.fork()
    if child == 0:
        os._exit(store_child.value(load_unit(unit)))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    builder.join()
    assert machine.compiled() == 1


def test_staging_folders_of_the_living_stay(machine: Machine) -> None:
    store = Store(machine.cache)
    alive, old, failed = store.new_staging(), store.new_staging(), store.new_staging()
    os.utime(old, (0, 0))
    elsewhere = alive.with_name(f"{2**22 + 1}_00000000_0")
    dead, unknown = alive.with_name(f"{2**22 + 1}_{lock.system()}_0"), alive.with_name("unknown")
    shutil.copytree(alive, elsewhere)
    failed = failed.rename(failed.with_name(f"{2**22 + 1}_{lock.system()}_1"))
    (failed / LOG).touch()
    for folder in (dead, unknown):
        folder.mkdir()
    new = store.staging()
    assert set((machine.cache / "staging").iterdir()) == {alive, elsewhere, unknown, failed, new}
