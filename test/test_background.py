"""Builds that start while a graph is traced: what starts one, who waits for it, and what it cannot harm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from child import ROOT, run_python
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from torch_jit_ops import OpLibrary, registry
from torch_jit_ops.backends import CPU
from torch_jit_ops.builder import workers
from torch_jit_ops.calling import dispatcher

# An op whose kernel no store has, and a record of who asked for it and who built it.
_PROGRAM = """
import os, sys, threading
from pathlib import Path
import torch
from torch_jit_ops import OpLibrary, process
from torch_jit_ops.calling import boot
from torch_jit_ops.builder import load as load_module

folder = Path({folder!r})
(folder / "twice.cpp").write_text('''
#include <jitk/result.h>
#include <jitk/tensor.h>
template <typename T>
void twice(jitk::TensorView x, jitk::Output& out) {{
  {body}
  T* to = static_cast<T*>(out.empty_like(x).data_ptr());
  for (int64_t i = 0; i < x.numel(); ++i) to[i] = 2 * static_cast<const T*>(x.data_ptr())[i];
}}
''')
library = OpLibrary("ahead", csrc=folder)

@library.op(cpu="twice.cpp", variant="twice<{{x.dtype}}>", dtypes=(torch.float32,))
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x

events = []
started, called = threading.Event(), threading.Event()
load, build = boot.load, load_module._build

def recorded_load(unit, *args):
    if unit.name == "ahead.twice":
        events.append(f"asked by {{threading.current_thread().name}}")
        if threading.current_thread() is threading.main_thread():
            called.set()
    return load(unit, *args)

def recorded_build(unit, *args):
    if unit.name == "ahead.twice":
        events.append(f"built by {{threading.current_thread().name}}")
        started.set()
        {meanwhile}
    return build(unit, *args)

boot.load, load_module._build = recorded_load, recorded_build
x = torch.arange(3.0)
model = torch.compile(lambda x: twice.default(x), fullgraph=True, backend="aot_eager")
"""


def program(folder: Path, then: str, body: str = "", meanwhile: str = "pass") -> str:
    return _PROGRAM.format(folder=str(folder), body=body, meanwhile=meanwhile) + then


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., str]:
    """Runs a program with an empty store; the dispatcher comes from the suite's."""
    folders = [tmp_path / "csrc", tmp_path / "store"]
    for folder in folders:
        folder.mkdir(mode=0o700)
    dispatcher.library()

    def start(then: str, environment: dict[str, str] | None = None, **parts: str) -> str:
        return run_python(
            program(folders[0], then, **parts),
            JITK_CACHE_DIR=folders[1],
            JITK_CACHE_PATH=os.environ["JITK_CACHE_DIR"],
            **(environment or {}),
        )

    return start


@pytest.mark.serial  # the second process starts the thread first, but nothing holds the call back
def test_the_build_starts_before_the_call_which_waits_for_it(run: Callable[..., str]) -> None:
    then = "print(model(x).tolist(), *events, sep='\\n')"
    assert run(then, meanwhile="called.wait(60)").splitlines() == [
        "[0.0, 2.0, 4.0]",
        "asked by jitk",
        "built by jitk",
        "asked by MainThread",
    ]
    # The next process has it in the store, and loads it in the background all the same.
    assert run(then).splitlines() == ["[0.0, 2.0, 4.0]", "asked by jitk", "asked by MainThread"]


def test_switched_off(run: Callable[..., str]) -> None:
    assert run("print(model(x).tolist(), *events, sep='\\n')", {"JITK_BACKGROUND": "0"}).splitlines() == [
        "[0.0, 2.0, 4.0]",
        "asked by MainThread",
        "built by MainThread",
    ]


def test_an_error_comes_at_the_call_and_whole(run: Callable[..., str]) -> None:
    then = """
def failure(function):
    try:
        function(x)
    except Exception as error:
        return str(error)

traced = failure(model)
print(*events, sep="\\n")
print(traced == failure(twice.default))
print(traced.partition("full log")[0])
"""
    assert run(then, body='static_assert(sizeof(T) == 1, "bytes alone");').splitlines() == [
        "asked by jitk",
        "built by jitk",
        "asked by MainThread",
        "True",
        f"ahead::twice<fp32_t> did not compile (cpu, {CPU.arch_of()})",
        "  csrc/twice.cpp:6: static assertion failed: bytes alone",
        "  ",
    ]


_TRACE = """
torch.export.export(type("M", (torch.nn.Module,), {"forward": lambda self, x: twice.default(x)})(), (x,))
started.wait(60)
"""


def test_a_program_ends_in_the_middle_of_a_build(run: Callable[..., str]) -> None:
    """And leaves no lock that stops the next one."""
    then = _TRACE + "print(*events, sep='\\n')"
    assert run(then, meanwhile="called.wait()").splitlines() == ["asked by jitk", "built by jitk"]
    then = "print(twice.default(x).tolist(), *events, sep='\\n')"
    assert run(then).splitlines() == ["[0.0, 2.0, 4.0]", "asked by MainThread", "built by MainThread"]


def test_a_fork_in_the_middle_of_a_build(run: Callable[..., str]) -> None:
    then = (
        _TRACE
        + """
child = os.fork()
if child == 0:
    os._exit(int(twice.default(x)[1]))
called.set()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), twice.default(x).tolist())
child = os.fork()
if child == 0:
    process.reset()
    model(x)
    os._exit(int(model(x)[2]))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    )
    # Dynamo initialises CUDA where there is a GPU, and PyTorch refuses CUDA in the children of a process that has it.
    no_gpu = {"CUDA_VISIBLE_DEVICES": ""}
    assert run(then, no_gpu, meanwhile="called.wait(60)").splitlines() == ["2 [0.0, 2.0, 4.0]", "4"]


def test_an_interrupt_in_the_middle_of_a_build(tmp_path: Path) -> None:
    """Ctrl-C goes to the compiler too, as it has the same terminal; it must not look like an error in the kernel."""
    compiler = tmp_path / "slow-g++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *twice*) touch "$0.runs"; sleep 1;; esac\nexec c++ "$@"\n')
    compiler.chmod(0o700)
    then = (
        _TRACE
        + f"""
import time
try:
    while not os.path.exists("{compiler}.runs"):
        time.sleep(0.01)
    os.killpg(0, 2)
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted")
print(twice.default(x).tolist(), *events, sep="\\n")
"""
    )
    folders = [tmp_path / "csrc", tmp_path / "store"]
    for folder in folders:
        folder.mkdir(mode=0o700)
    dispatcher.library()
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "JITK_CACHE_PATH": os.environ["JITK_CACHE_DIR"]}
    variables |= {"JITK_CACHE_DIR": str(folders[1]), "CXX": str(compiler)}
    done = subprocess.run(
        [sys.executable, "-c", program(folders[0], then)],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[:4] == ["interrupted", "[0.0, 2.0, 4.0]", "asked by jitk", "built by jitk"]
    assert set(said[4:-1]) == {"asked by MainThread"}  # twice if the build was still about to fail
    assert said[-1] == "built by MainThread"


# --- what starts a build ----------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What builds are asked for, none of which is done."""
    found: list[object] = []
    monkeypatch.setattr(workers.background, "once", lambda what, job: found.append(what))
    return found


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An op whose kernel is picked by a size and an int."""
    folder = tmp_path_factory.mktemp("wide")
    for source in ("wide.cpp", "wide.cu"):
        (folder / source).write_text("")
    library = OpLibrary("aheadwide", csrc=folder)

    @library.op(cpu="wide.cpp", cuda="wide.cu", variant="wide<{x.dtype}, {x.shape[-1]}, {n}>")
    def wide(x: Tensor, n: int) -> Tensor:
        return x + n

    yield wide.default
    registry.remove(library)


def trace(function: Callable[..., Any], *args: Any, dynamic: dict[int, Any] | None = None) -> None:
    class Module(torch.nn.Module):
        def forward(self, *args: Any) -> Any:
            return function(*args)

    shapes = (tuple(dynamic or {} if isinstance(arg, Tensor) else None for arg in args),) if dynamic else None
    torch.export.export(Module(), args, dynamic_shapes=shapes)


FLOAT32 = 2 << 8 | 32  # DLPack's code and bits


def test_sizes_and_numbers_that_are_known(wide: Any, asked: list[object]) -> None:
    x = torch.randn(2, 64)
    trace(lambda x: wide(x, 3), x)
    assert set(asked) == {"dispatcher", ("aheadwide::wide", "cpu", (-1, FLOAT32, 64, 3))}
    asked.clear()
    trace(lambda x: wide(x, 3), x, dynamic={0: torch.export.Dim("tokens")})
    assert set(asked) == {"dispatcher", ("aheadwide::wide", "cpu", (-1, FLOAT32, 64, 3))}


def test_a_symbol_starts_nothing_and_stays_one(wide: Any, asked: list[object]) -> None:
    trace(lambda x: wide(x, 3), torch.randn(2, 64), dynamic={1: torch.export.Dim("width")})
    assert asked == []


def test_fakes_outside_of_a_trace_start_nothing(wide: Any, asked: list[object]) -> None:
    with FakeTensorMode():
        assert wide(torch.empty(2, 64), 3).shape == (2, 64)
    assert asked == []


def test_a_device_that_is_not_here_starts_nothing(wide: Any, asked: list[object]) -> None:
    if torch.cuda.is_initialized():
        pytest.skip("there is a GPU here")
    for device in ("meta", "cuda"):
        with FakeTensorMode():
            x = torch.empty(2, 64, device=device)
        trace(lambda x: wide(x, 3), x)
    assert asked == []


@pytest.mark.parametrize("variable", ["JITK_BACKGROUND=0", "JITK_NO_COMPILE=1"])
def test_switches(wide: Any, asked: list[object], variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(*variable.split("="))
    trace(lambda x: wide(x, 3), torch.randn(2, 64))
    assert asked == []


def test_the_out_form_starts_one_too(asked: list[object]) -> None:
    x = torch.randn(2, 64)
    trace(lambda x: torch.ops.jitk.relu2.out(x, out=torch.empty_like(x)), x)
    assert ("jitk::relu2", "cpu", (-1, FLOAT32)) in asked


def test_no_more_threads_than_compilers() -> None:
    team = workers.Workers(lambda: 2)
    names: list[str] = []
    gate, begun, done = threading.Event(), threading.Semaphore(0), threading.Semaphore(0)

    def job() -> None:
        names.append(str(threading.get_ident()))
        begun.release()
        gate.wait(60)
        done.release()
        raise RuntimeError("for the call to raise")

    for what in (1, 2, 3, 3, 4):
        team.once(what, job)
    assert len(team._threads) == 2
    for _ in range(2):
        assert begun.acquire(timeout=60)
    gate.set()
    for _ in range(4):
        assert done.acquire(timeout=60)
    assert len(names) == 4 and len(set(names)) == 2


def test_what_others_wait_for_has_a_thread_of_its_own() -> None:
    team = workers.Workers(lambda: 1)
    gate = threading.Event()
    slow = team.submit(lambda: gate.wait(60))
    assert team.submit(lambda: "done", at_once=True).result(timeout=60) == "done"
    assert not slow.done()
    gate.set()
    assert slow.result(timeout=60)


def test_a_team_waits_for_what_has_begun_and_begins_nothing_more() -> None:
    begun, gate = threading.Event(), threading.Event()

    def slow() -> str:
        begun.set()
        gate.wait(60)
        return "done"

    with pytest.raises(KeyboardInterrupt), workers.Workers(lambda: 1) as team:
        first, second = team.submit(slow), team.submit(slow)
        assert begun.wait(60)
        threading.Timer(0.1, gate.set).start()
        raise KeyboardInterrupt
    assert first.result(timeout=0) == "done" and second.cancelled()


def test_no_thread_can_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the process ends: a call that waited for it would wait for ever."""
    monkeypatch.setattr(threading.Thread, "start", lambda self: (_ for _ in ()).throw(RuntimeError("can't start new thread")))
    assert workers.Workers(lambda: 2).submit(lambda: 1).cancelled()
