"""Develop mode: edited sources are built again, ops declared again replace the first; and nothing of it outside of the mode."""

from __future__ import annotations

import importlib
import itertools
import linecache
import os
import pickle
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

import torch_jit_ops
from torch_jit_ops import BuildError, Op, OpLibrary, registry
from torch_jit_ops.builder import load as builder
from torch_jit_ops.calling import develop, dispatcher

_names = itertools.count()

ADD = """
#include <jitk/tensor.h>

#include "value.h"

template <typename T>
void add(jitk::TensorView x) {
  jitk::host::SymbolicDims shape{"shape"};
  jitk::host::TensorMatcher({shape}).with_dtype<T>().verify(x);
  for (int64_t i = 0; i < x.numel(); ++i) static_cast<T*>(x.data_ptr())[i] += VALUE;
}
"""


def declare(library: OpLibrary) -> Op:
    @library.op(cpu="add.cpp", variant="add<{x.dtype}>", mutates=("x",))
    def add(x: Tensor) -> None:
        """In place."""
        x.add_(1000)

    return add


class Bench:
    """A library whose op ``add`` adds what a header says, 1 at first."""

    def __init__(self, csrc: Path, develop: bool = True) -> None:
        self.csrc = csrc
        csrc.mkdir()
        self.write(ADD)
        self.say(1)
        self.library = OpLibrary(f"develop{next(_names)}", csrc=csrc)
        if develop:
            self.library.develop()
        self.op = declare(self.library)

    def write(self, source: str) -> None:
        """The kernel's file. Nobody else has the same: the cache is that of all tests, and what is built is counted."""
        (self.csrc / "add.cpp").write_text(f"// {self.csrc}\n{source}")

    def say(self, value: object) -> None:
        (self.csrc / "value.h").write_text(f"#define VALUE {value}\n")

    def added(self) -> float:
        return added_by(self.op)

    def builds(self) -> int:
        taken = torch_jit_ops.stats().ops.get(self.op.qualified_name)
        return taken.builds if taken else 0

    def misses(self) -> int:
        return torch_jit_ops.stats().ops[self.op.qualified_name].misses


def added_by(op: Callable[..., Any]) -> float:
    x = torch.zeros(3)
    op(x)
    assert (x == x[0]).all()
    return x[0].item()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "csrc")


# --- edited sources --------------------------------------------------------------------------------


def test_an_edit_of_a_header_alone_is_noticed(bench: Bench) -> None:
    assert (bench.added(), bench.added(), bench.builds()) == (1, 1, 1)
    bench.say(2)
    assert (bench.added(), bench.added(), bench.builds()) == (2, 2, 2)
    bench.say(1)  # what was built before is loaded
    assert (bench.added(), bench.builds()) == (1, 2)


def test_an_edit_of_the_source_is_noticed(bench: Bench) -> None:
    assert bench.added() == 1
    bench.write(ADD.replace("+= VALUE", "+= 10 * VALUE"))
    assert (bench.added(), bench.builds()) == (10, 2)


def test_what_the_compiler_did_not_read_builds_nothing(bench: Bench) -> None:
    assert bench.added() == 1
    (bench.csrc / "other.h").write_text("#define VALUE 5\n")
    (bench.csrc / "add.cpp").touch()
    bench.say(1)
    assert (bench.added(), bench.builds(), bench.misses()) == (1, 1, 1)


def test_an_edit_that_leaves_size_and_time_stamp_is_noticed(bench: Bench) -> None:
    header = bench.csrc / "value.h"
    stamp = time.time_ns() - 10**8
    os.utime(header, ns=(stamp, stamp))
    assert bench.added() == 1
    for value in (2, 3):
        bench.say(value)
        os.utime(header, ns=(stamp, stamp))
        assert bench.added() == value


def test_an_edit_that_breaks_is_an_error_until_it_is_mended(bench: Bench) -> None:
    assert bench.added() == 1
    bench.say("unknown")
    with pytest.raises(BuildError, match=r"value\.h:1: .unknown. was not declared in this scope"):
        bench.added()
    misses = bench.misses()
    with pytest.raises(BuildError, match=r"value\.h:1: .unknown. was not declared in this scope"):
        bench.added()
    assert bench.misses() == misses  # nothing was edited, so nothing was tried
    bench.say(7)
    assert bench.added() == 7


def test_a_kernel_that_never_compiled_is_tried_again_when_its_header_appears(bench: Bench) -> None:
    (bench.csrc / "value.h").unlink()
    with pytest.raises(BuildError, match=r"value\.h: No such file or directory"):
        bench.added()
    bench.say(4)
    assert bench.added() == 4


def test_threads_that_call_while_an_edit_is_built_share_the_build(bench: Bench) -> None:
    assert bench.added() == 1
    seen: list[list[float]] = [[], []]
    started = threading.Barrier(3)

    def call(results: list[float]) -> None:
        started.wait()
        while not results or (results[-1] != 2 and len(results) < 100_000):
            results.append(bench.added())

    threads = [threading.Thread(target=call, args=(results,)) for results in seen]
    for thread in threads:
        thread.start()
    started.wait()
    bench.say(2)
    for thread in threads:
        thread.join()
    assert [sorted(results) == results and set(results) <= {1, 2} and results[-1] == 2 for results in seen] == [True, True]
    assert bench.builds() == 2


def test_an_edit_while_it_is_built_is_built_next(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_jit_ops.builder import compile

    original = compile.compile_unit

    def edited_meanwhile(*args: Any) -> Any:
        made = original(*args)
        bench.say(9)
        monkeypatch.setattr(compile, "compile_unit", original)
        return made

    monkeypatch.setattr(compile, "compile_unit", edited_meanwhile)
    assert (bench.added(), bench.added()) == (1, 9)
    bench.say(1)
    assert bench.added() == 1


def test_outside_of_the_mode_nothing_is_noticed(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "csrc", develop=False)
    asked: list[int] = []
    assert bench.added() == 1
    number = dispatcher._slots[f"{bench.op.qualified_name}", "CPU"]
    answer = dispatcher._answers[number]
    dispatcher._answers[number] = lambda key: asked.append(1) or answer(key)  # type: ignore[func-returns-value]
    bench.say(2)
    assert (bench.added(), bench.builds(), asked) == (1, 1, [])
    bench.library.develop()  # from here on, also what was loaded before
    assert (bench.added(), bench.builds()) == (2, 2)


def test_the_variable_switches_it_on_for_every_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITK_DEVELOP", "1")
    bench = Bench(tmp_path / "csrc", develop=False)
    assert bench.added() == 1
    bench.say(2)
    assert bench.added() == 2
    assert declare(bench.library) is bench.op


# --- files -----------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "file.h"
    file.write_text("one")
    return file


def watch(file: Path) -> develop.Watched:
    return develop.Watched.below([file.parent])


def test_files_that_come_and_go_are_noticed(file: Path) -> None:
    watched = watch(file)
    other = file.with_name("other.h")
    other.write_text("")
    assert watched.changed()
    other.unlink()
    assert not watched.changed()
    file.unlink()
    assert watched.changed()


# --- ops declared again ----------------------------------------------------------------------------


def test_outside_of_the_mode_a_second_declaration_is_refused(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "csrc", develop=False)
    with pytest.raises(ValueError) as caught:
        declare(bench.library)
    text = str(caught.value).replace(bench.library.namespace, "mylib").replace(__file__, "FILE")
    assert_expected_inline(
        text,
        """\
mylib::add is declared twice; the first is in FILE
  remedy: another name; or, to replace the first, JITK_DEVELOP=1 or library.develop()""",
    )


def test_an_op_with_another_schema_replaces_one_that_cpp_serves(bench: Bench) -> None:
    first = bench.op
    assert bench.added() == 1
    overload = first.default

    @bench.library.op(outputs=("twice", "thrice"))
    def add(x: Tensor, by: Tensor, *, times: int = 1) -> tuple[Tensor, Tensor]:
        """Two results."""
        return (x + by) * times, x * by

    assert add is first and bench.library.ops == {"add": add}
    assert overload is not add.default
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    total, product = add(x, x.detach(), times=3)
    assert (total.tolist(), product.tolist()) == ([6, 12], [1, 4])
    (total.sum() + product.sum()).backward()
    assert x.grad is not None and x.grad.tolist() == [4, 5]
    outs = [torch.empty(2), torch.empty(2)]
    add.out(x.detach(), x.detach(), twice=outs[0], thrice=outs[1])
    assert outs[1].tolist() == [1, 4]
    torch.library.opcheck(add.default, (x, x.detach()))
    with pytest.raises(RuntimeError, match="missing value for argument 'by'"):
        add(x)
    assert add.packet.__doc__.startswith("add(x: Tensor, by: Tensor, *, times: int = 1) -> tuple[Tensor, Tensor]")


def test_an_op_gets_its_kernel_back(bench: Bench) -> None:
    assert bench.added() == 1

    @bench.library.op(mutates=("x",))
    def add(x: Tensor) -> None:
        x.add_(50)

    assert (bench.added(), bench.op.declaration.kernels) == (50, {})
    declare(bench.library)
    assert bench.added() == 1
    bench.say(3)
    assert bench.added() == 3


def test_another_source_and_placeholder_replace_the_first(bench: Bench) -> None:
    assert bench.added() == 1
    (bench.csrc / "more.cpp").write_text(
        ADD.replace("template <typename T>", "template <typename T, int N>").replace("VALUE", "N")
    )

    @bench.library.op(cpu="more.cpp", variant="add<{x.dtype}, {n}>", mutates=("x",))
    def add(x: Tensor, n: int) -> None:
        x.add_(n)

    assert [added_by(lambda x, n=n: add(x, n)) for n in (4, 5, 4)] == [4, 5, 4]


def test_an_op_that_was_differentiated_in_cpp_is_differentiated_anew(bench: Bench) -> None:
    @bench.library.op()
    def power(x: Tensor) -> Tensor:
        return x**2

    def gradient() -> float:
        x = torch.tensor(3.0, requires_grad=True)
        power(x).backward()
        assert x.grad is not None
        return x.grad.item()

    assert gradient() == 6
    builder.load(dispatcher.autograd_unit())
    dispatcher.differentiate([power.qualified_name])
    assert gradient() == 6
    handed = set(dispatcher._differentiated)

    @bench.library.op(backward=lambda grad, x: grad * 100)
    def power(x: Tensor) -> Tensor:
        return x**3

    assert gradient() == 100
    assert torch.func.vmap(power)(torch.arange(3.0)).tolist() == [0, 1, 8]
    assert power.qualified_name in handed
    assert dispatcher._differentiated == handed


def test_a_declaration_that_fails_leaves_the_first(bench: Bench) -> None:
    assert bench.added() == 1

    def add(x: Tensor, tensor: Tensor) -> None:
        x.add_(tensor)

    with pytest.raises(ValueError, match=r"its cpu source 'gone\.cpp' is not in"):
        bench.library.op(cpu="gone.cpp", variant="add<{x.dtype}>")(add)
    assert bench.added() == 1


def test_a_declaration_that_pytorch_refuses_leaves_the_first(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench.added() == 1

    @bench.library.op(mutates=("x",))
    def other(x: Tensor) -> None:
        x.add_(1)

    original = Op._define

    def refused(op: Op) -> None:
        monkeypatch.setattr(Op, "_define", original)
        original(op)
        raise RuntimeError("no")

    monkeypatch.setattr(Op, "_define", refused)
    with pytest.raises(RuntimeError, match=r"^no$"):
        bench.library.op()(lambda_named("add"))
    assert (bench.added(), bench.op.signature.results) == (1, 0)


def lambda_named(name: str) -> Callable[..., Any]:
    def function(x: Tensor) -> Tensor:
        return x + 1

    function.__name__ = name
    return function


CELL = '''
@library.op(mutates=("x",))
def cell(x: Tensor) -> None:
    """Of a notebook."""
    x.add_({value})
'''


def run_cell(number: int, value: int, names: dict[str, Any]) -> None:
    """As IPython does: the text is no file, and linecache has it."""
    text, file = CELL.format(value=value), f"<ipython-input-{number}-jitk>"
    linecache.cache[file] = (len(text), None, text.splitlines(True), file)
    exec(compile(text, file, "exec"), names)


def test_a_cell_can_be_run_twice(bench: Bench) -> None:
    names = {"library": bench.library, "Tensor": Tensor, "__name__": __name__}
    run_cell(1, 5, names)
    first = names["cell"]
    assert added_by(names["cell"]) == 5
    run_cell(1, 5, names)
    assert added_by(names["cell"]) == 5
    run_cell(2, 6, names)
    assert (added_by(names["cell"]), added_by(first), list(bench.library.ops)) == (6, 6, ["add", "cell"])


def test_a_pickled_op_is_the_one_that_replaced_it(bench: Bench) -> None:
    before = pickle.dumps(bench.op)

    @bench.library.op(mutates=("x",))
    def add(x: Tensor) -> None:
        x.add_(8)

    assert added_by(pickle.loads(before)) == 8
    assert pickle.loads(pickle.dumps(bench.op)) is add


PACKAGE = """
from pathlib import Path

from torch import Tensor

from torch_jit_ops import OpLibrary

library = OpLibrary("reloaded", csrc=Path(__file__).parent)
library.develop()


@library.op(mutates=("x",))
def add(x: Tensor) -> None:
    x.add_(VALUE)


@library.op()
def same(x: Tensor) -> Tensor:
    return x.clone()
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    (tmp_path / "reloaded.py").write_text(PACKAGE.replace("VALUE", "1"))
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("reloaded")
    yield module
    registry.remove(module.library)
    del sys.modules["reloaded"]


def test_a_module_can_be_reloaded(package: types.ModuleType) -> None:
    add, libraries = package.add, len(torch_jit_ops.libraries())
    assert added_by(add) == 1
    Path(str(package.__file__)).write_text(PACKAGE.replace("VALUE", "1 + 1"))
    importlib.reload(package)
    assert (added_by(add), added_by(torch.ops.reloaded.add)) == (2, 2)
    assert len(torch_jit_ops.libraries()) == libraries
    assert registry.declared("reloaded", "add") is package.add


def test_an_edit_of_the_function_is_told_until_its_module_is_reloaded(bench: Bench, tmp_path: Path) -> None:
    file = tmp_path / "functions.py"

    def write(value: int, more: str = "") -> None:
        file.write_text(f"def function(x):\n    return x + {value}\n{more}")

    write(1)
    names: dict[str, Any] = {"__name__": "functions"}
    exec(compile(file.read_text(), str(file), "exec"), names)
    source = develop.Source("mylib::function", names["function"])

    def told() -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            source.warn_if_edited()
        return [str(each.message).replace(str(file), "FILE") for each in caught]

    write(1, "other = 3\n")
    assert told() == []
    file.write_text("def function(:")
    assert told() == []
    write(2)
    assert told() == [
        "mylib::function is still what it was declared as before FILE was edited\n"
        "  remedy: importlib.reload(functions), which declares it again"
    ]
    assert told() == []


# --- torch.compile ---------------------------------------------------------------------------------


def test_a_compiled_model_calls_the_edited_kernel(bench: Bench) -> None:
    add = bench.op.default

    def model(x: Tensor) -> Tensor:
        y = x.clone()
        add(y)
        return y * 2

    compiled = torch.compile(model, fullgraph=True)
    assert compiled(torch.zeros(3)).tolist() == [2, 2, 2]
    bench.say(5)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert compiled(torch.zeros(3)).tolist() == [10, 10, 10]


def test_a_compiled_model_is_compiled_anew_for_an_op_declared_again(bench: Bench) -> None:
    @bench.library.op()
    def halve(x: Tensor) -> Tensor:
        return x[: x.shape[0] // 2] + 0

    namespace = getattr(torch.ops, bench.library.namespace)
    compiled = torch.compile(lambda x: namespace.halve(x) * 2, fullgraph=True)
    assert compiled(torch.ones(8)).shape == (4,)

    @bench.library.op()
    def halve(x: Tensor) -> Tensor:  # noqa: F811
        return x[: x.shape[0] // 4] + 1

    assert compiled(torch.ones(8)).tolist() == [4, 4]


# --- load_jit --------------------------------------------------------------------------------------


def test_a_module_of_load_jit_follows_its_sources(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITK_DEVELOP", "1")

    def made() -> torch_jit_ops.Module:
        files = [bench.csrc / "add.cpp"]
        include = [bench.csrc]
        wrappers = [("add", "add<float>")]
        return torch_jit_ops.load_jit("developed", cpp_files=files, cpp_wrappers=wrappers, extra_include_paths=include)

    bench.say("unknown")
    with pytest.raises(BuildError):
        made()
    bench.say(1)
    module: Any = made()
    assert added_by(module.add) == 1
    bench.say(2)
    assert added_by(module.add) == 2
    bench.write(ADD.replace("jitk::TensorView x)", "jitk::TensorView x, int64_t n)"))
    with pytest.raises(RuntimeError) as caught:
        module.add(torch.zeros(3))
    assert_expected_inline(
        str(caught.value),
        """\
developed: the arguments of add have changed since load_jit made it
  expected  void add(TensorView)
  got       void add(TensorView, int64_t)
  remedy: start the program again""",
    )
