"""What a build says that fails, or that must not be."""

from __future__ import annotations

import errno
import re
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import store_child
import torch
from expecttest import assert_expected_inline

from torch_jit_ops import process
from torch_jit_ops.backends import CPU, CUDA, MissingCompiler
from torch_jit_ops.builder import log as build_log
from torch_jit_ops.builder.errors import BuildError, CompileRefused
from torch_jit_ops.builder.load import load
from torch_jit_ops.builder.unit import Unit
from torch_jit_ops.calling import dispatcher
from torch_jit_ops.store import files

_LOGS = {
    "disk full": "cc1plus: fatal error: /tmp/ccQ2.s: No space left on device\ncompilation terminated.\n",
    "out of memory, g++": "g++: fatal error: Killed signal terminated program cc1plus\ncompilation terminated.\n",
    "out of memory, nvcc": "nvcc error   : 'cicc' died due to signal 9 (Kill signal)\n",
    "out of memory, a shell": "FAILED: [code=137] name.cuda.o\nKilled\n",
    "new GPU": "nvcc fatal   : Unsupported gpu architecture 'compute_130a'\n",
    "new g++": (
        "/usr/local/cuda/include/crt/host_config.h:137:2: error: #error -- unsupported GNU version! gcc versions later than 15 "
        "are not supported! The nvcc flag '-allow-unsupported-compiler' can be used to override this version check\n"
    ),
    "no Python": "name.cpp:1:10: fatal error: Python.h: No such file or directory\n",
    "no Python, nvcc": 'name.cu(1): error: cannot open source file "Python.h"\n',
    "no CUDA headers": "name.cu:1:10: fatal error: cuda_runtime.h: No such file or directory\n",
    "no ninja": "Ninja is required to load C++ extensions (pip install ninja to get it)\n",
}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("JITK_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("JITK_CACHE_PATH", raising=False)
    process.reset()
    yield
    process.reset()


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that says what ``says`` beside it holds, and fails."""
    program = tmp_path / "c++"
    program.write_text(
        f'#!/bin/sh\ncase "$*" in *" -c "*) echo 1 >> {tmp_path}/runs; cat {tmp_path}/says >&2; exit 1;; esac\nexec g++ "$@"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    return program


def failure(unit: Unit) -> str:
    with pytest.raises(BuildError) as caught:
        load(unit)
    return re.sub(r"full log: .*/build\.log", "full log: LOG", str(caught.value))


def test_the_remedies() -> None:
    remedies = [f"{name}: {build_log.remedy_for(log)}" for name, log in _LOGS.items()]
    assert_expected_inline(
        "\n".join(textwrap.fill(text, 100, subsequent_indent="    ") for text in remedies),
        """\
disk full: free space where the kernel cache is (python -m torch_jit_ops cache prune) and in the
    folder for temporary files, or set JITK_CACHE_DIR and TMPDIR to folders that have some
out of memory, g++: the system killed the compiler, as a rule for want of memory: compile fewer
    kernels at once, or allow more memory
out of memory, nvcc: the system killed the compiler, as a rule for want of memory: compile fewer
    kernels at once, or allow more memory
out of memory, a shell: the system killed the compiler, as a rule for want of memory: compile fewer
    kernels at once, or allow more memory
new GPU: this nvcc does not know compute_130a: install a newer CUDA toolkit and set CUDA_HOME to its
    folder
new g++: install g++ 15 or older and set CC and CXX to it, or install a newer CUDA toolkit and set
    CUDA_HOME to it
no Python: install the headers of Python (Debian, Ubuntu: apt-get install python3-dev)
no Python, nvcc: install the headers of Python (Debian, Ubuntu: apt-get install python3-dev)
no CUDA headers: cuda_runtime.h belongs to the CUDA toolkit, which is not whole: pip install
    'torch_jit_ops[nvcc]', or install a toolkit and set CUDA_HOME to its folder
no ninja: pip install ninja""",
    )


@pytest.mark.parametrize(
    "log",
    [
        "norm.cu:23: error: static assertion failed: hidden must be a multiple of 8\n",
        'norm.cu(7): error: identifier "cuda_runtime" is undefined\n',
        "Killed by a static assertion\n",
        "",
    ],
)
def test_no_remedy_where_the_cause_is_not_known(log: str) -> None:
    assert build_log.remedy_for(log) is None


def test_an_error_with_its_remedy(compiler: Path) -> None:
    compiler.with_name("says").write_text(_LOGS["out of memory, g++"])
    assert_expected_inline(
        failure(store_child.unit(1)),
        """\
store::tiny<1> did not compile (cpu, x86-64)
  g++: fatal error: Killed signal terminated program cc1plus
  full log: LOG
  remedy: the system killed the compiler, as a rule for want of memory: compile fewer kernels at once, or allow more memory""",
    )


def test_an_error_without_a_remedy(compiler: Path) -> None:
    compiler.with_name("says").write_text("csrc/norm.cpp:23:4: error: no such luck\n")
    assert_expected_inline(
        failure(store_child.unit(1)),
        """\
store::tiny<1> did not compile (cpu, x86-64)
  csrc/norm.cpp:23: no such luck
  full log: LOG""",
    )


def test_an_error_is_remembered_and_does_not_grow(compiler: Path) -> None:
    compiler.with_name("says").write_text("wrong\n")
    depths = []
    for _ in range(3):
        with pytest.raises(BuildError) as caught:
            load(store_child.unit(1))
        depths.append(len(caught.traceback))
    assert compiler.with_name("runs").read_text().count("1") == 1
    assert depths[1] == depths[2]


def test_no_room_anywhere(compiler: Path) -> None:
    """The store's disk may be full and another one not: the second build is elsewhere."""
    compiler.with_name("says").write_text(_LOGS["disk full"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert "  remedy: free space" in failure(store_child.unit(1))
    assert len(caught) == 1
    assert compiler.with_name("runs").read_text().count("1") == 2


def test_a_build_that_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "make_files_private", full)
    with pytest.warns(UserWarning) as caught:
        assert store_child.value(load(store_child.unit(8))) == 8
    message = str(caught[0].message).replace(str(tmp_path), "<root>").replace(". ", ".\n")
    assert_expected_inline(
        message,
        """\
the kernel cache <root>/cache could not keep store.tiny (No space left on device); it is built again in the next process.
Set JITK_CACHE_DIR to a folder with space that can be written""",
    )


def test_ninja_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils import cpp_extension

    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: False)
    assert_expected_inline(
        failure(store_child.unit(1)),
        """\
store::tiny<1> did not compile (cpu, x86-64)
  Ninja is required to load C++ extensions (pip install ninja to get it)
  full log: LOG
  remedy: pip install ninja""",
    )


# --- what must not be compiled ---------------------------------------------------------------------


def test_no_compile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JITK_NO_COMPILE", "1")
    monkeypatch.setenv("JITK_CACHE_PATH", "/opt/kernels")
    units = (
        Unit("jitk.silu_and_mul", "jitk::silu_and_mul<bf16_t>", CUDA, "9.0a", ""),
        Unit("jitk.silu_and_mul", "jitk::silu_and_mul<bf16_t>", CPU, "x86-64-v3", ""),
        Unit("module.norm", "norm<float>", CUDA, "9.0a", ""),
        dispatcher.unit(),
    )
    said = []
    for unit in units:
        with pytest.raises(CompileRefused) as caught:
            load(unit)
        said.append(str(caught.value).replace(str(tmp_path), "<root>"))
    assert_expected_inline(
        "\n".join(said),
        """\
jitk::silu_and_mul<bf16_t> for sm_90a is not in the kernel cache, and JITK_NO_COMPILE=1 forbids to compile it
  looked in /opt/kernels, <root>/cache
  remedy: python -m torch_jit_ops build jitk::silu_and_mul --backend cuda --arch 9.0a
jitk::silu_and_mul<bf16_t> for x86-64-v3 is not in the kernel cache, and JITK_NO_COMPILE=1 forbids to compile it
  looked in /opt/kernels, <root>/cache
  remedy: python -m torch_jit_ops build jitk::silu_and_mul --backend cpu
norm<float> for sm_90a is not in the kernel cache, and JITK_NO_COMPILE=1 forbids to compile it
  looked in /opt/kernels, <root>/cache
  remedy: run the program once without JITK_NO_COMPILE
the dispatcher for x86-64 is not in the kernel cache, and JITK_NO_COMPILE=1 forbids to compile it
  looked in /opt/kernels, <root>/cache
  remedy: python -m torch_jit_ops build""",
    )


def test_no_compile_lets_a_kernel_in_the_cache_load(monkeypatch: pytest.MonkeyPatch) -> None:
    unit = store_child.unit(9)
    load(unit)
    process.reset()
    monkeypatch.setenv("JITK_NO_COMPILE", "1")
    assert store_child.value(load(unit)) == 9


def test_no_compile_comes_before_a_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITK_NO_COMPILE", "1")
    monkeypatch.setenv("CXX", "none-such")
    with pytest.raises(CompileRefused):
        load(store_child.unit(1))
    monkeypatch.delenv("JITK_NO_COMPILE")
    with pytest.raises(MissingCompiler):
        load(store_child.unit(1))


def test_the_capture_of_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, cold = store_child.unit(10), store_child.unit(11)
    load(loaded)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert store_child.value(load(loaded)) == 10
    with pytest.raises(CompileRefused) as caught:
        load(cold)
    assert_expected_inline(
        str(caught.value),
        """\
store::tiny<11> is not loaded yet, and during the capture of a CUDA graph no kernel can be compiled or loaded
  remedy: before the capture, call the op once with such arguments, or torch_jit_ops.build(...) it""",
    )
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert store_child.value(load(cold)) == 11
