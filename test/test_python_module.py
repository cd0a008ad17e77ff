"""``library.module``: extension modules of users, compiled on first use as kernels are."""

from __future__ import annotations

import json
import os
import pickle
import re
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from child import ROOT, run_python
from expecttest import assert_expected_inline

import torch_jit_ops
from torch_jit_ops import BuildError, OpLibrary, manifest, process, registry
from torch_jit_ops.ahead import build_ahead
from torch_jit_ops.ahead.why import explain
from torch_jit_ops.builder import load as loader
from torch_jit_ops.builder import unit as units
from torch_jit_ops.cli.main import main
from torch_jit_ops.python_module import LazyModule
from torch_jit_ops.store.search_path import search_path

# Python's own headers compile in a second, where pybind11's take ten.
_MODULE = """
#include <Python.h>

namespace {
PyObject* answer(PyObject*, PyObject*) { return PyLong_FromLong(ANSWER); }
PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, "What is asked."}, {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "counted", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};
}  // namespace

#define JOINED_(a, b) a##b
#define JOINED(a, b) JOINED_(a, b)
extern "C" __attribute__((visibility("default"))) PyObject* JOINED(PyInit_, TORCH_EXTENSION_NAME)() {
  return PyModuleDef_Init(&module);
}
"""


def source(answer: object = 42) -> str:
    return _MODULE.replace("ANSWER", str(answer))


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpLibrary]:
    """A library with an own folder and an own store."""
    for name in ("cache", "csrc"):
        (tmp_path / name).mkdir(mode=0o700)
    monkeypatch.setenv("JITK_CACHE_DIR", str(tmp_path / "cache"))
    made = OpLibrary(f"modlib{next(_numbers)}", csrc=tmp_path / "csrc")
    yield made
    registry.remove(made)
    process.reset()


_numbers = iter(range(1000))


def error(call: Callable[[], object]) -> str:
    with pytest.raises(Exception) as caught:
        call()
    text = re.sub(r"modlib\d+", "modlib", f"{type(caught.value).__name__}: {caught.value}")
    text = re.sub(r"/[\w./-]*/(?=csrc\b|cache\b|\w+\.log)", "", text)
    return re.sub(r"x86-64(-v\d)?", "LEVEL", text).replace("\u2018", "'").replace("\u2019", "'")


def stored(tmp_path: Path) -> list[str]:
    return sorted(re.sub(r"-[0-9a-f]{16}$", "", each.name) for each in (tmp_path / "cache").glob("modlib*"))


# --- loading ---------------------------------------------------------------------------------------


def test_nothing_is_compiled_before_it_is_asked_for(library: OpLibrary, tmp_path: Path) -> None:
    (library.csrc / "counted.cpp").write_text(source())  # type: ignore[operator]
    module = library.module("counted", sources=["counted.cpp"], summary="Counts.")
    assert isinstance(module, types.ModuleType)
    assert (module.__name__, module.__doc__) == (f"{library.namespace}.counted", "Counts.")
    assert repr(module) == f"<module '{library.namespace}.counted' of torch_jit_ops>"
    assert repr(library).endswith("0 ops, 1 modules)")
    assert not hasattr(module, "__wrapped__") and not hasattr(module, "_ipython_display_")
    assert pickle.loads(pickle.dumps(module)).__name__ == module.__name__
    assert stored(tmp_path) == []
    assert module.answer() == 42
    assert stored(tmp_path) == [f"{library.namespace}.counted"]
    assert "answer" in vars(module) and "answer" in dir(module)
    assert module.__name__ not in sys.modules
    assert error(lambda: module.question) == "AttributeError: module 'modlib.counted' has no attribute 'question'"
    assert error(lambda: module._hidden) == "AttributeError: module 'modlib.counted' has no attribute '_hidden'"


def test_threads_share_one_build_and_one_module(library: OpLibrary) -> None:
    torch_jit_ops.reset_stats()
    module = library.module("counted", source=source())
    functions: list[Any] = []
    threads = [threading.Thread(target=lambda: functions.append(module.answer)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(functions) == 6 and len({id(function) for function in functions}) == 1
    assert torch_jit_ops.stats().total.builds == 1


_PROGRAM = """
import os, sys
from pathlib import Path
from torch_jit_ops import OpLibrary, reset_stats, stats
library = OpLibrary("elsewhere", csrc=Path({folder!r}))
module = library.module("counted", sources="counted.cpp")
{body}
"""


def test_another_process_loads_what_one_has_built(tmp_path: Path) -> None:
    (tmp_path / "counted.cpp").write_text(source())
    (tmp_path / "cache").mkdir(mode=0o700)
    body = "print(module.answer(), stats().total.builds, 'torch.utils.cpp_extension' in sys.modules)"
    program = _PROGRAM.format(folder=str(tmp_path), body=body)
    cache = {"JITK_CACHE_DIR": tmp_path / "cache", "JITK_VERBOSE": "0"}
    assert run_python(program, **cache) == "42 1 True\n"
    assert run_python(program, JITK_NO_COMPILE="1", **cache) == "42 0 False\n"


def test_a_child_loads_it_for_itself(tmp_path: Path) -> None:
    """One that was forked while a thread of its parent builds, too."""
    (tmp_path / "counted.cpp").write_text(source())
    (tmp_path / "cache").mkdir(mode=0o700)
    body = """
import threading, time
thread = threading.Thread(target=lambda: module.answer())
thread.start()
time.sleep(0.2)
child = os.fork()
if child == 0:
    os._exit(0 if module.answer() == 42 else 1)
print(os.waitpid(child, 0)[1])
thread.join()
print(module.answer())
"""
    program = _PROGRAM.format(folder=str(tmp_path), body=body)
    assert run_python(program, JITK_CACHE_DIR=tmp_path / "cache", JITK_VERBOSE="0") == "0\n42\n"


def test_several_sources_are_linked(library: OpLibrary) -> None:
    folder: Any = library.csrc
    (folder / "first.cpp").write_text(f"long second();\n{source('second()')}")
    (folder / "second.cpp").write_text('#include "number.h"\nlong second() { return kNumber + MORE; }\n')
    (folder / "number.h").write_text("constexpr long kNumber = 7;\n")
    module = library.module("counted", sources=["first.cpp", "second.cpp"], flags=["-DMORE=3"])
    assert module.answer() == 10


def test_it_is_built_for_this_python_and_this_pytorch(library: OpLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    library.module("counted", source=source())
    unit = library.modules["counted"].unit()
    assert unit.python and unit.facts()["python"].startswith(f"cpython-{sys.version_info[0]}{sys.version_info[1]}")
    key = unit.key()
    with monkeypatch.context() as patched:
        patched.setattr(units, "EXTENSION_SUFFIXES", [".cpython-399-x86_64-linux-gnu.so"])
        assert unit.key() != key
    with monkeypatch.context() as patched:
        patched.setattr(torch, "__version__", "9.9.9")
        assert unit.key() != key
    assert unit.key() == key
    loader.load(unit)
    with monkeypatch.context() as patched:
        patched.setattr(units, "EXTENSION_SUFFIXES", [".cpython-399-x86_64-linux-gnu.so"])
        finding = explain(unit, search_path())
    assert [(each.what, each.now) for each in finding.differences] == [("Python", "cpython-399-x86_64-linux-gnu")]


def test_an_edit_is_seen_in_develop_mode(library: OpLibrary) -> None:
    file: Any = library.csrc / "counted.cpp"  # type: ignore[operator]
    file.write_text(source(1))
    library.develop()
    module = library.module("counted", sources="counted.cpp")
    first = module.answer
    assert first() == 1
    file.write_text(source(2))
    assert (module.answer(), first()) == (2, 1)
    file.write_text("that is no C++")
    assert "counted.cpp:1: " in error(lambda: module.answer)
    file.write_text(source(3))
    assert module.answer() == 3
    again = library.module("counted", source=source(4))  # as a cell that is run twice
    assert again.answer() == 4


# --- what cannot be had ----------------------------------------------------------------------------


def test_errors_of_the_source(library: OpLibrary) -> None:
    folder: Any = library.csrc
    (folder / "broken.cpp").write_text("#include <Python.h>\nint broken() { return undeclared; }\n")
    (folder / "nothing.cpp").write_text("int nothing;\n")
    (folder / "unlinked.cpp").write_text(f"long unlinked();\n{source('unlinked()')}")
    raises = (
        source()
        .replace("return PyModuleDef_Init", 'PyErr_SetString(PyExc_KeyError, "mine"), (void)')
        .replace("(void)(&module);", "(void)module;\n  return nullptr;")
    )
    modules = [
        library.module("broken", sources="broken.cpp"),
        library.module("inline_broken", source="\n\nint broken() { return z; }\n"),
        library.module("nothing", sources="nothing.cpp"),
        library.module("unlinked", sources="unlinked.cpp"),
        library.module("raises", source=raises),
    ]
    texts = [error(lambda module=module: module.answer) for module in modules]
    again = [error(lambda module=module: module.answer) for module in modules]
    assert texts == again
    text = "\n".join(re.sub(r"modlib_\w+\.so", "LIBRARY.so", each) for each in texts)
    assert_expected_inline(
        text,
        """\
BuildError: modlib::broken did not compile (cpu, LEVEL)
  csrc/broken.cpp:2: 'undeclared' was not declared in this scope
  full log: build.log
BuildError: modlib::inline_broken did not compile (cpu, LEVEL)
  inline_broken.source:3: 'z' was not declared in this scope
    int broken() { return z; }
  full log: build.log
BuildError: modlib::nothing is no Python module
  expected  PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) in nothing.cpp
  got       dynamic module does not define module export function (PyInit_nothing)
BuildError: modlib::unlinked cannot be loaded (cpu, LEVEL)
  undefined symbol: _Z8unlinkedv
  full log: build.log
  remedy: name in ldflags the library that has it, or behind the first source the one that defines it
KeyError: 'mine'""",
    )


def test_without_a_compile(library: OpLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    module = library.module("counted", source=source())
    monkeypatch.setenv("JITK_NO_COMPILE", "1")
    assert_expected_inline(
        error(lambda: module.answer),
        """\
CompileRefused: modlib::counted for LEVEL is not in the kernel cache, and JITK_NO_COMPILE=1 forbids to compile it
  looked in cache
  remedy: python -m torch_jit_ops build modlib::counted --backend cpu""",
    )
    monkeypatch.delenv("JITK_NO_COMPILE")
    assert module.answer() == 42


def test_what_is_refused(library: OpLibrary) -> None:
    given: Any = library

    @library.op()
    def taken(x: torch.Tensor) -> torch.Tensor:
        return x

    library.module("twice", source=source())

    def op_of_that_name() -> None:
        @library.op()
        def twice(x: torch.Tensor) -> torch.Tensor:
            return x

    (given.csrc / "here.cpp").write_text("int here;")
    calls: list[Callable[[], object]] = [
        lambda: given.module("no name", source="x"),
        lambda: given.module("_hidden", source="x"),
        lambda: given.module("class", source="x"),
        lambda: given.module("none"),
        lambda: given.module("both", source="x", sources="x.cpp"),
        lambda: given.module("empty", source=" "),
        lambda: given.module("empty", sources=[]),
        lambda: given.module("gone", sources="gone.cpp"),
        lambda: given.module("cuda", sources="here.cu"),
        lambda: given.module("again", sources=["here.cpp", "here.cpp"]),
        lambda: given.module("flags", sources="here.cpp", flags="-O2"),
        lambda: given.module("flags", sources="here.cpp", flags=["-lz"]),
        lambda: given.module("linked", sources="here.cpp", ldflags=["libz.so"]),
        lambda: given.module("include", sources="here.cpp", include=["/nowhere"]),
        lambda: given.module("taken", source="x"),
        lambda: given.module("twice", source="x"),
        op_of_that_name,
    ]
    assert_expected_inline(
        "\n".join(map(error, calls)),
        """\
ValueError: the name of the module modlib::no name must be an identifier that does not begin with _
ValueError: the name of the module modlib::_hidden must be an identifier that does not begin with _
ValueError: the name of the module modlib::class must be an identifier that does not begin with _
ValueError: modlib::none needs either sources= or source=, the text itself
ValueError: modlib::both needs either sources= or source=, the text itself
TypeError: modlib::empty: source must be the text of a source, got ' '
TypeError: modlib::empty: sources must be a file or a list of files, got []
ValueError: modlib::gone: its cpu source 'gone.cpp' is not in csrc
ValueError: modlib::cuda: its cpu source 'here.cu' must be a .cpp or .cc or .cxx file
ValueError: modlib::again: sources names 'here.cpp' twice
TypeError: modlib::flags: flags of cpu must be a list of str, got '-O2'
ValueError: modlib::flags: the flag '-lz' is for linking, and flags are for compiling: name it in ldflags
ValueError: modlib::linked: the linker's flag 'libz.so' names no path from /, and kernels are linked in another folder
ValueError: modlib::include: include of cpu: the folder /nowhere does not exist
ValueError: modlib::taken is the name of an op already: choose another
ValueError: the module modlib::twice is declared twice
  remedy: another name; or, to replace the first, JITK_DEVELOP=1 or library.develop()
ValueError: modlib::twice is the name of a module already: choose another""",
    )


# --- ahead -----------------------------------------------------------------------------------------


def test_it_is_built_ahead_listed_and_replayed(
    library: OpLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = library.module("counted", source=source(), summary="Counts.")
    name = f"{library.namespace}::counted"
    assert [unit.label for unit in build_ahead.units_of([name], backend="cpu")] == [name]
    assert [unit.label for unit in build_ahead.units_of("counted")] == [name]
    with monkeypatch.context() as alone:  # other tests' libraries may have ops without samples, of which not all can be built
        alone.setattr(
            registry, "_libraries", [each for each in registry.libraries() if each.namespace in ("jitk", library.namespace)]
        )
        assert name in [unit.label for unit in build_ahead.units_of(backend="cpu")]
        assert name not in [unit.label for unit in build_ahead.units_of(dtypes=torch.float16, backend="cpu")]
    assert build_ahead.units_of([name], backend="cuda", arch="9.0a") == []
    unit = library.modules["counted"].unit()
    found: list[Any] = []
    monkeypatch.setattr(
        build_ahead, "load_all", lambda given, jobs=None: found.append(given) or build_ahead.Report(1, 1, (), 0)
    )
    torch_jit_ops.build(name)
    assert found == [[unit]]
    with pytest.raises(ValueError, match="there is no op 'countered'"):
        torch_jit_ops.build(["counted", "countered"])

    monkeypatch.setenv("JITK_RECORD", str(tmp_path / "run.jsonl"))
    assert module.answer() == 42
    line = {"op": name, "backend": "cpu", "values": {}, "arch": unit.arch}
    assert json.loads((tmp_path / "run.jsonl").read_text()) == line
    assert list(manifest.read(tmp_path / "run.jsonl")) == [manifest.Entry(name, "cpu", (), unit.arch)]
    assert build_ahead.units_of(manifest=tmp_path / "run.jsonl") == [unit]
    assert build_ahead.units_of("relu2", manifest=tmp_path / "run.jsonl") == []
    monkeypatch.delenv("JITK_RECORD")

    def say(*arguments: str) -> str:
        assert main(list(arguments)) == 0
        return re.sub(r"modlib\d+", "modlib", capsys.readouterr().out)

    assert "modlib::counted" in say("list")
    assert re.sub(r"x86-64(-v\d)?", "LEVEL", say("list", name)) == (
        "modlib::counted\n"
        "    what      Python module: Counts.\n"
        "    kernels   cpu: counted.source\n"
        "    compiled  modlib::counted LEVEL\n\n"
    )
    assert "modlib::counted" in say("cache", "list", name)
    assert say("cache", "why", name).startswith("modlib::counted for x86-64")
    assert "1 variants" in say("cache", "export", str(tmp_path / "bundle.tar.gz"), name)
    assert say("cache", "clear", name).startswith("removed 1 variants")
    assert say("cache", "import", str(tmp_path / "bundle.tar.gz")).startswith("1 variants")


# --- pybind11 --------------------------------------------------------------------------------------

_COUNTER = """
#include <pybind11/pybind11.h>

struct Counter {
  explicit Counter(int from) : count(from) {}
  int next() { return count += STEP; }
  int count;
};

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  pybind11::class_<Counter>(m, "Counter").def(pybind11::init<int>(), pybind11::arg("from")).def("next", &Counter::next);
}
"""


def test_classes_of_the_same_name_do_not_meet() -> None:
    """Two modules, which pybind11 would otherwise refuse; compiled at the same time into the store of all tests."""
    library = OpLibrary("islands")
    try:
        one = library.module("one", source=_COUNTER.replace("STEP", "1"), flags=["-O0"])
        two = library.module("two", source=_COUNTER.replace("STEP", "2"), flags=["-O0"])
        thread = threading.Thread(target=lambda: two.Counter)
        thread.start()
        counters = one.Counter(5), two.Counter(5)
        thread.join()
        assert [counter.next() for counter in counters] == [6, 7]
        assert one.Counter.__module__ == "islands.one"
        assert isinstance(one, LazyModule)
        with pytest.raises(TypeError, match="incompatible constructor arguments"):
            one.Counter("five")
    finally:
        registry.remove(library)


def test_the_example() -> None:
    allocator = ROOT / "examples/block_allocator/block_allocator.py"
    code = f"import runpy; made = runpy.run_path({str(allocator)!r}); made['main']()\n"
    code += """
native = made["native"]
allocator = native.BlockAllocator(3)
assert allocator.allocate(2) == [0, 1] and allocator.free == 1
for call, kind in (
    (lambda: allocator.allocate(2), RuntimeError),
    (lambda: allocator.release([2]), ValueError),
    (lambda: native.BlockAllocator(-1), ValueError),
):
    try:
        call()
    except kind as error:
        print(error)
allocator.release([0])
assert allocator.allocate(2) == [0, 2]
"""
    printed = run_python(code, JITK_CACHE_DIR=os.environ["JITK_CACHE_DIR"])
    assert_expected_inline(
        printed,
        """\
taken [0, 1, 2], 5 of 8 blocks are free
2 blocks were asked for, and 1 are free
block 2 is not taken
blocks must not be negative, got -1
""",
    )


def test_build_errors_are_of_the_kind_that_kernels_have(library: OpLibrary) -> None:
    module = library.module("broken", source="that is no C++")
    with pytest.raises(BuildError):
        module.answer()
