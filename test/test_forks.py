"""A fork, or a signal, at any moment of an op's first call."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from child import run_python

from torch_jit_ops.builder.load import load
from torch_jit_ops.calling import dispatcher

# A process makes an op's first call in a thread, and forks meanwhile. The child makes the same call.
_FORK = """
import os, random, sys, threading, time
import torch
from torch_jit_ops import OpLibrary

torch.set_num_threads(1)
library = OpLibrary("forkedlib", csrc={folder!r})

@library.op(cpu="thrice.cpp", variant="thrice<{{x.dtype}}>", dtypes=(torch.float32,))
def thrice(x: torch.Tensor) -> torch.Tensor:
    return 3 * x

x = torch.arange(4.0)
thread = threading.Thread(target=thrice, args=(x,))
thread.start()
time.sleep({delay})
child = os.fork()
if child == 0:
    said = 1
    try:
        out = torch.empty(4)
        thrice.out(x, out=out)
        said = 0 if thrice(x).tolist() == out.tolist() == [0, 3, 6, 9] else 2
    except BaseException as error:
        print("child:", repr(error), flush=True)
    finally:
        os._exit(said)
deadline = time.monotonic() + 60
while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
    time.sleep(0.01)
if ended[0] == 0:
    os.kill(child, 9)
    os.waitpid(child, 0)
    print("the child hangs")
else:
    print(os.waitstatus_to_exitcode(ended[1]))
thread.join()
print(thrice(x).tolist())
"""

_THRICE = """
#include <jitk/result.h>
#include <jitk/tensor.h>
template <typename T>
void thrice(jitk::TensorView x, jitk::Output& output) {
  const jitk::TensorView out = output.empty_like(x);
  for (int64_t i = 0; i < x.numel(); ++i) static_cast<T*>(out.data_ptr())[i] = 3 * static_cast<const T*>(x.data_ptr())[i];
}
"""

_PROGRAMS = int(os.environ.get("JITK_TEST_FORKS", "20")) // 2  # each forks twice


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    csrc = tmp_path / "csrc"
    csrc.mkdir()
    (csrc / "thrice.cpp").write_text(_THRICE)
    dispatcher.library()
    load(dispatcher.autograd_unit())
    return csrc


def _run(folder: Path, number: int, program: str) -> list[str]:
    """With an empty store, and the dispatcher from the suite's: the call takes 1 s then, and 10 ms the next time."""
    store = folder.parent / f"store{number // 2}"
    store.mkdir(mode=0o700, exist_ok=True)
    return run_python(program, JITK_CACHE_DIR=store, JITK_CACHE_PATH=os.environ["JITK_CACHE_DIR"]).splitlines()


@pytest.mark.parametrize("number", range(_PROGRAMS))
def test_a_fork_in_the_middle_of_a_first_call(folder: Path, number: int) -> None:
    draw = random.Random(number)
    for part, longest in enumerate((1.5, 0.02)):  # compiled, and loaded
        delay = draw.uniform(0, longest) * draw.random()
        said = _run(folder, part, _FORK.format(folder=str(folder), delay=delay))
        assert said == ["0", "[0.0, 3.0, 6.0, 9.0]"], f"after {delay} s"


def test_a_signal_in_the_middle_of_a_first_call(folder: Path) -> None:
    program = """
import signal, time
import torch
from torch_jit_ops import OpLibrary, statistics
from torch_jit_ops.builder.load import load

library = OpLibrary("forkedlib", csrc={folder!r})

@library.op(cpu="thrice.cpp", variant="thrice<{{x.dtype}}>", dtypes=(torch.float32, torch.float64))
def thrice(x: torch.Tensor) -> torch.Tensor:
    return 3 * x

said = []

def called(*_):
    said.append(thrice(x).tolist())
    if len(said) < 50:
        signal.setitimer(signal.ITIMER_REAL, 0.05)

signal.signal(signal.SIGALRM, called)
for x in (torch.arange(4.0), torch.arange(4.0, dtype=torch.float64)):
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    said.append(thrice(x).tolist())
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert len(said) > 2 and all(one == [0, 3, 6, 9] for one in said), said
    said.clear()
assert statistics.stats().ops["forkedlib::thrice"].builds == 2
print("all right")
"""
    assert _run(folder, 0, program.format(folder=str(folder))) == ["all right"]
