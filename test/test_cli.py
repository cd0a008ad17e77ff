"""The command line: what it prints, and its exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline
from test_docs import compile_for_gpu

import torch_jit_ops
from torch_jit_ops import registry
from torch_jit_ops.ahead.why import explain
from torch_jit_ops.backends import CPU, Toolkit, programs
from torch_jit_ops.builder import compilers
from torch_jit_ops.builder.load import load
from torch_jit_ops.builder.unit import ABI_VERSION, Unit, include_dir
from torch_jit_ops.cli import doctor, main
from torch_jit_ops.store import listing
from torch_jit_ops.store.digests import digest_of
from torch_jit_ops.store.record import RECORD
from torch_jit_ops.store.search_path import default_store, search_path
from torch_jit_ops.store.store import Store

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store."""
    monkeypatch.setenv("JITK_CACHE_DIR", str(tmp_path / "kernels"))
    return default_store()


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Call:
    return Call(capfd)


class Call:
    """Runs a command in this process."""

    def __init__(self, captured: pytest.CaptureFixture[str]) -> None:
        self.captured = captured

    def __call__(self, *arguments: str, code: int = 0) -> str:
        """What it prints to standard output, or to standard error if it fails."""
        try:
            came = main.main(arguments)
        except SystemExit as stop:  # argparse's own
            came = int(stop.code or 0)
        said = self.captured.readouterr()
        assert came == code, said
        return said.out if code == 0 else said.err or said.out


# --- all commands ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", main._COMMANDS)
def test_help_has_examples(call: Call, command: str) -> None:
    text = call(command, "--help")
    assert f"python -m torch_jit_ops {command}" in text
    assert "examples:" in text


def test_help_imports_no_command() -> None:
    program = (
        "import sys; from torch_jit_ops.cli import main\n"
        "try: main.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in sys.modules if name.startswith(('torch_jit_ops.cli.', 'torch.utils.cpp_ext', 'rich'))])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['torch_jit_ops.cli.main']"


@pytest.mark.parametrize(
    "arguments", [["build", "silu_and_mull"], ["list", "silu_and_mull"], ["cache", "why", "silu_and_mull"]], ids=lambda a: a[0]
)
def test_an_unknown_op_is_a_wrong_usage(call: Call, arguments: list[str]) -> None:
    assert call(*arguments, code=2) == "error: there is no op 'silu_and_mull'; did you mean 'silu_and_mul'?\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["build", "--set", "constant"], "error: --set must be of the form name=value or name=value,value; got 'constant'\n"),
        (["build", "--dtype", "bf16"], "error: --dtype must be a dtype, such as bfloat16; got 'bf16'\n"),
        (["build", "add_constant", "--jobs", "0", "--backend", "cpu"], "error: jobs must be at least 1, got 0\n"),
        (["build", "--arch", "90"], "error: the CUDA architecture '90' must be of the form 8.0 or 9.0a\n"),
        (["--import", "no_such_library", "list"], "error: --import no_such_library: No module named 'no_such_library'\n"),
    ],
)
def test_a_wrong_usage(call: Call, arguments: list[str], text: str) -> None:
    assert call(*arguments, code=2) == text


def test_an_interrupt(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(listing, "variants", interrupt)
    assert call("list", "relu2", code=130) == "interrupted\n"


def test_a_reader_that_has_enough(store: Store) -> None:
    shell = f"{sys.executable} -m torch_jit_ops list | head -1"
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == line_of_silu_and_mul([name for name in names() if name.startswith("jitk::")]) + "\n"
    assert done.stderr == ""


SILU_AND_MUL = (
    "silu(gate) * up, where gate and up are the two halves of the last dimension (SwiGLU; Shazeer, arXiv:2002.05202)."
)


def names() -> list[str]:
    return [each.qualified_name for each in (*registry.find_ops(), *registry.modules())]


def line_of_silu_and_mul(listed: list[str]) -> str:
    """Its summary begins behind the longest of the names."""
    return f"{'jitk::silu_and_mul':{max(map(len, listed))}}  {SILU_AND_MUL}"


def test_list_has_a_line_for_each_op(call: Call) -> None:
    lines = call("list").splitlines()
    assert [line.split()[0] for line in lines] == names()
    assert line_of_silu_and_mul(names()) in lines
    assert all(len(line.split(maxsplit=1)) == 2 for line in lines if line.startswith("jitk::")), "an op without a summary"


def test_list_fits_a_terminal(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    lines = call("list", "*silu*", "relu2").splitlines()
    assert lines == [
        "jitk::silu_and_mul  silu(gate) * up, where gate and up ar...",
        "jitk::silu_mul      silu(gate) * up: silu_and_mul where t...",
        "jitk::relu2         relu(input) ** 2 (Primer; So et al., ...",
    ]
    assert {len(line) for line in lines} == {60}


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("silu*", "jitk::silu_and_mul jitk::silu_mul"),
        ("jitk::[rs]*u2", "jitk::relu2"),
        ("*::swap", "userlib::swap"),
        ("relu?", "jitk::relu2"),
    ],
)
def test_list_of_a_pattern(call: Call, pattern: str, names: str) -> None:
    assert " ".join(line.split()[0] for line in call("list", pattern).splitlines()) == names


def test_list_of_a_pattern_that_fits_nothing(call: Call) -> None:
    assert call("list", "*sillu_mul*", code=2) == "error: no op fits '*sillu_mul*'; did you mean 'silu_mul'?\n"
    assert call("list", "jitk::sillu_mul?", code=2) == "error: no op fits 'jitk::sillu_mul?'; did you mean 'jitk::silu_mul'?\n"
    assert call("list", "nothing::*", code=2) == f"error: no op fits 'nothing::*'; there are {', '.join(sorted(names()))}\n"


def test_list(call: Call, store: Store) -> None:
    assert_expected_inline(
        call("list", "add_constant").replace("-> ()", "-> Tensor(a2!)"),  # as PyTorch 2.13 has it
        """\
jitk::add_constant(Tensor src, SymInt constant) -> Tensor
jitk::add_constant.out(Tensor src, SymInt constant, *, Tensor(a2!) out) -> Tensor(a2!)
    what      src + constant: the tutorial op. The constant is a template argument, so each one is a kernel of its own.
    dtypes    int32
    kernels   cuda: add_constant.cu, cpu: add_constant.cpp
    compiled  none

""",
    )
    (row,) = json.loads(call("list", "jitk::add_constant", "--json"))
    assert (row["name"], row["dtypes"], row["compiled"]) == ("jitk::add_constant", ["int32"], [])


# --- what every command takes ---------------------------------------------------------------------


def in_a_process(folder: Path, *arguments: str, console_script: bool = False) -> subprocess.CompletedProcess[str]:
    script = "import sys; from torch_jit_ops.cli.main import main; sys.exit(main())"
    start = ["-P", "-c", script] if console_script else ["-m", "torch_jit_ops"]
    if sys.version_info < (3, 11):
        start = [word for word in start if word != "-P"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *start, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


OWN_OP = '''
from pathlib import Path
from torch import Tensor
from torch_jit_ops import OpLibrary

library = OpLibrary("importlib_test", csrc=Path(__file__).parent)

@library.op(cpu="own.cpp", variant="importlib_test::own<{x.dtype}>")
def own(x: Tensor) -> Tensor:
    """An op of
    one's own.

    And more about it.
    """
    return x + 1
'''


@pytest.mark.parametrize(
    "arguments",
    [
        ["--import", "own_ops", "list", "*own"],
        ["list", "--import", "own_ops", "*own"],
        ["list", "*own", "--import=own_ops"],
        ["list", "--import", "own_ops", "--import", "json", "--", "*own"],
    ],
    ids=" ".join,
)
def test_import_stands_before_or_after_the_command(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "own_ops.py").write_text(OWN_OP)
    (tmp_path / "own.cpp").write_text("")
    done = in_a_process(tmp_path, *arguments, console_script="json" in arguments)
    assert (done.stdout, done.stderr) == ("importlib_test::own  An op of one's own.\n", "")


def test_import_after_an_action(call: Call) -> None:
    assert call("cache", "dir", "--import", "json") == call("cache", "dir")
    assert call("cache", "dir", "--import", "no_such_library", code=2).startswith("error: --import no_such_library: ")
    assert call("cache", "dir", "--import", code=2).endswith("error: argument --import: expected one argument\n")


def test_the_version(call: Call) -> None:
    python = ".".join(map(str, sys.version_info[:3]))
    said = f"torch_jit_ops {torch_jit_ops.__version__} (PyTorch {torch.__version__}, Python {python}"
    assert call("--version").startswith(said)


@pytest.mark.parametrize("arguments", [["list"], ["doctor"], ["new", "fresh::stretch"]], ids=lambda a: a[0])
def test_without_numpy_there_is_no_word_of_it(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "numpy.py").write_text('raise ModuleNotFoundError("No module named \'numpy\'", name="numpy")\n')
    warned = subprocess.run(
        [sys.executable, "-c", "import torch"], cwd=tmp_path, env={**os.environ}, capture_output=True, text=True, check=True
    )
    if "Failed to initialize NumPy" not in warned.stderr:
        pytest.skip("this PyTorch does not mention NumPy")
    done = in_a_process(tmp_path, *arguments)
    assert "NumPy" not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr


# --- cache -----------------------------------------------------------------------------------------


@pytest.fixture
def built(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store with one variant, of an op's unit whose files are in a folder of the test."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc/answer.h").write_text("#define ANSWER 42\n")
    load(unit(tmp_path))
    return store


def unit(folder: Path, *flags: str, label: str = "clitest::answer<1>", text: str = "") -> Unit:
    text = f'#include "answer.h"\nint answer() {{ return ANSWER; }}\n{text}'
    return Unit("clitest.answer", label, CPU, "x86-64", text, include=(folder / "csrc",), flags=flags)


def why(of: Unit, store: Store) -> list[str]:
    from torch_jit_ops.cli import cache as command

    finding = explain(of, [store])
    assert (finding.present is None) == bool(finding.differences)
    return [command._line(difference).strip() for difference in finding.differences]


def test_the_store_is_listed_exported_cleared_and_imported(call: Call, built: Store, tmp_path: Path) -> None:
    assert call("cache", "dir") == f"{built.root}\n"
    table = call("cache", "list").splitlines()
    assert re.fullmatch(r"clitest::answer<1>  x86-64  \d+\.\d KB  \d+\.\d s +\d{4}-\d\d-\d\d \d\d:\d\d", table[1])
    assert re.fullmatch(rf"1 variants, \d+\.\d KB in {built.root}", table[2])
    (record,) = json.loads(call("cache", "list", "--json"))
    assert (record["label"], record["abi"]) == ("clitest::answer<1>", ABI_VERSION)
    file = tmp_path / "kernels.tar.gz"
    assert re.fullmatch(rf"{file}: 1 variants, \d+\.\d KB\n", call("cache", "export", str(file)))
    assert call("cache", "clear") == f"removed 1 variants from {built.root}\n"
    assert call("cache", "list").splitlines()[-1] == f"0 variants, 0 B in {built.root}"
    assert call("cache", "import", str(file)) == f"1 variants of {file} are in {built.root}\n"
    assert why(unit(tmp_path), built) == []
    file.write_bytes(b"no bundle")
    assert call("cache", "import", str(file), code=1).startswith(f"error: {file} is damaged or no bundle of kernels")
    assert call("cache", "import", str(tmp_path / "missing"), code=1).startswith("error: [Errno 2] No such file")


def test_clear_takes_some_ops(call: Call, built: Store) -> None:
    assert call("cache", "clear", "relu2") == f"removed 0 variants from {built.root}\n"
    assert call("cache", "clear", "answer") == f"removed 1 variants from {built.root}\n"


def test_prune_takes_what_is_old_or_too_much(call: Call, built: Store) -> None:
    assert call("cache", "prune").endswith("; 1 are left\n")
    assert call("cache", "prune", "--max-size", "1G", "--max-age", "1").endswith("; 1 are left\n")
    (variant,) = listing.variants(built)
    os.utime(variant.folder / RECORD, (1e9, 1e9))
    said = call("cache", "prune", "--max-age", "1")
    assert re.fullmatch(rf"removed 1 variants, \d+\.\d KB, from {built.root}; 0 are left\n", said)
    assert "must be a number of bytes" in call("cache", "prune", "--max-size", "much", code=2)


def test_clear_takes_what_is_damaged(call: Call, built: Store) -> None:
    (variant,) = listing.variants(built)
    (variant.folder / RECORD).write_text("{")
    assert call("cache", "clear") == f"removed 1 variants from {built.root}\n"
    assert list(built.variants()) == []


def test_a_shared_store_is_looked_into(call: Call, built: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITK_CACHE_PATH", str(built.root))
    monkeypatch.setenv("JITK_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setattr("torch_jit_ops.ahead.why.compiler_of", lambda *_: "c++ 99")  # of no matter to what is shared
    assert explain(unit(tmp_path), search_path()).present is not None
    (tmp_path / "csrc/answer.h").write_text("#define ANSWER 43\n")
    finding = explain(unit(tmp_path), search_path())
    assert [difference.what for difference in finding.differences] == [f"file {tmp_path}/csrc/answer.h"]


def test_why_names_a_changed_and_a_missing_file(built: Store, tmp_path: Path) -> None:
    header = tmp_path / "csrc/answer.h"
    was = digest_of(header.read_bytes())[:12]
    header.write_text("#define ANSWER 43\n")
    now = digest_of(header.read_bytes())[:12]
    assert why(unit(tmp_path), built) == [f"file {header}: {now}, was {was}"]
    header.unlink()
    assert why(unit(tmp_path), built) == [f"file {header}: {was} is gone"]


def test_why_names_a_file_that_comes_first_now(built: Store, tmp_path: Path) -> None:
    """The compiler looked for jitk's header in the op's folder before, in vain."""
    (tmp_path / "csrc/jitk").mkdir()
    of = replace(unit(tmp_path), text="#include <jitk/abi.h>\n")
    load(of)
    (tmp_path / "csrc/jitk/abi.h").write_text("#error not this one\n")
    (line,) = why(of, built)
    assert re.fullmatch(rf"file {tmp_path}/csrc/jitk/abi.h: [0-9a-f]{{12}} is new", line)


def test_why_names_what_else_differs(built: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert why(unit(tmp_path, "-DMORE"), built) == ["flags: -DMORE is new"]
    assert why(unit(tmp_path, text="// more\n"), built) == ["translation unit: another text"]
    assert why(unit(tmp_path, label="clitest::answer<2>"), built) == []  # the label is not in the key
    other = Unit("clitest.answer", "clitest::answer<1>", CPU, "x86-64-v3", unit(tmp_path).text, (tmp_path / "csrc",))
    assert why(other, built) == ["architecture: x86-64-v3, was x86-64", "flags: -march=x86-64-v3, was -march=x86-64"]
    monkeypatch.setattr("torch_jit_ops.ahead.why.compiler_of", lambda *_: "c++ 99")
    (line,) = why(unit(tmp_path), built)
    assert line.startswith("compiler: c++ 99, was ") and line != "compiler: c++ 99, was c++ 99"


def test_why_names_an_older_abi(built: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_jit_ops.builder.unit.ABI_VERSION", 1000)
    assert why(unit(tmp_path), built) == ["ABI version: 1000, was 2"]


def test_why_names_a_damaged_library(built: Store, tmp_path: Path) -> None:
    (variant,) = listing.variants(built)
    variant.library.unlink()  # as it is loaded, writing into it would end this process
    variant.library.write_bytes(b"cut")
    (line,) = why(unit(tmp_path), built)
    assert line.startswith(f"file {variant.library}: damaged or missing, was ")


def test_why_takes_the_nearest(built: Store, tmp_path: Path) -> None:
    """Of two variants the one that needs fewer changes; the same instantiation before another."""
    load(unit(tmp_path, "-DMORE", "-DSTILL_MORE"))
    assert len(why(unit(tmp_path, "-DMORE"), built)) == 1
    load(unit(tmp_path, label="clitest::answer<3>", text="// 3\n"))
    assert "flags" in why(unit(tmp_path, "-DMORE"), built)[0]


def test_why_of_an_op(call: Call, store: Store) -> None:
    isa = CPU.arch_of()
    text = call("cache", "why", "relu2", "--dtype", "float32", "--backend", "cpu")
    assert text == f"jitk::relu2<fp32_t> for {isa}: would be compiled; no cpu variant of this op is in the store\n"
    (found,) = json.loads(call("cache", "why", "dispatcher", "--json"))
    assert (found["kernel"], found["present"], found["differences"]) == ("the dispatcher", None, [])


# --- doctor ----------------------------------------------------------------------------------------


def test_doctor_finds_this_machine_well(call: Call, store: Store) -> None:
    found = json.loads(call("doctor", "--json"))
    states = {check["what"]: check["state"] for check in found}
    assert states["compiling for cpu"] == states["C++ compiler"] == states["ninja"] == states["cache"] == "ok"
    assert call("doctor").endswith("\neverything that should work here does\n")
    assert sorted(path.name for path in store.root.rglob("*")) in (["staging"], [])


def test_doctor_names_each_problem_and_its_remedy(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("JITK_CACHE_DIR", str(tmp_path / "file/kernels"))
    monkeypatch.setenv("JITK_CACHEDIR", "x")
    monkeypatch.setenv("CXX", "g++-99")
    monkeypatch.setattr(torch.version, "cuda", None)
    found = {(check["what"], check["state"]): check for check in json.loads(call("doctor", "--json", code=1))}
    assert found["C++ compiler", "problem"]["remedy"].startswith("install g++ 11 or newer")
    assert found["cache", "problem"]["found"].startswith(
        f"the kernel cache {tmp_path}/file/kernels cannot be written (Not a dir"
    )
    assert found["environment", "note"]["remedy"] == "did you mean JITK_CACHE_DIR?"
    assert not any(what.startswith("compiling") for what, _ in found)
    assert call("doctor", code=1).endswith("\n2 problems\n")


def test_doctor_looks_at_shared_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    (tmp_path / "shared").mkdir(mode=0o755)
    monkeypatch.setenv("JITK_CACHE_PATH", f"{tmp_path}/shared:{tmp_path}/missing")
    first, second, own = doctor._cache()
    assert (first.state, first.found) == ("ok", f"{tmp_path}/shared, searched first and never written")
    assert (second.state, second.found) == ("note", f"{tmp_path}/missing of JITK_CACHE_PATH is not there")
    assert own.state == "ok"
    (tmp_path / "shared").chmod(0o777)
    (found, *_) = doctor._guarded("cache", doctor._cache)
    assert (found.state, found.remedy[:6]) == ("problem", "delete")


def test_doctor_tells_a_compiler_that_compiles_nothing(
    call: Call, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "c++"
    broken.write_text(
        "#!/bin/sh\n[ \"$1\" = --version ] && echo 'c++ 12.2.0' && exit 0\necho 'x.cpp:1: error: no' >&2; exit 1\n"
    )
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setattr(torch.version, "cuda", None)
    found = {check["what"]: check for check in json.loads(call("doctor", "--json", code=1))}
    assert found["C++ compiler"]["state"] == "ok"
    assert found["compiling for cpu"]["state"] == "problem"
    assert found["compiling for cpu"]["found"].startswith("a CPU kernel did not compile")


def test_doctor_refuses_an_old_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers, "compiler_identity", lambda *_: "g++ (Debian 10.2.1-6) 10.2.1")
    (check,) = doctor._cpp_compiler()
    assert (check.state, check.remedy) == ("problem", "install g++ 11 or newer, and set CXX to it")


# --- new -------------------------------------------------------------------------------------------


def test_a_new_op_passes_its_own_test(call: Call, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    said = call("new", "fresh_lib::stretch", "--into", str(tmp_path))
    files = ["fresh_lib/__init__.py", "fresh_lib/csrc/stretch.cu", "fresh_lib/csrc/stretch.cpp", "test_stretch.py"]
    assert said.splitlines() == [
        *(str(tmp_path / file) for file in files),
        "",
        f"try it:  cd {tmp_path} && python -m pytest test_stretch.py",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_stretch.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^1 passed", done.stdout, re.MULTILINE)


def test_a_new_op_compiles_for_a_gpu(call: Call, tmp_path: Path) -> None:
    call("new", "fresh_lib::stretch", "--into", str(tmp_path))
    compile_for_gpu(tmp_path / "fresh_lib/csrc/stretch.cu", ["fresh_lib::stretch<bf16_t>"], tmp_path)


def test_a_new_op_is_formatted(call: Call, tmp_path: Path) -> None:
    formatter = shutil.which("clang-format")
    if formatter is None:
        pytest.skip("no clang-format here")
    call("new", "fresh_lib::stretch", "--into", str(tmp_path))
    for file in (tmp_path / "fresh_lib/csrc").iterdir():
        style = f"--style=file:{ROOT}/.clang-format"
        text = subprocess.run([formatter, style, str(file)], capture_output=True, text=True, check=True).stdout
        assert text == file.read_text()


def test_new_overwrites_nothing(call: Call, tmp_path: Path) -> None:
    (tmp_path / "test_stretch.py").write_text("mine")
    said = call("new", "fresh_lib::stretch", "--into", str(tmp_path), code=2)
    assert said == f"error: {tmp_path}/test_stretch.py is there already, and nothing is overwritten\n"
    assert [path.name for path in tmp_path.iterdir()] == ["test_stretch.py"]


@pytest.mark.parametrize("name", ["double", "Scale", "my-op", "lib::", "../x::y", "device::x", "class"])
def test_new_refuses_what_is_no_name(call: Call, tmp_path: Path, name: str) -> None:
    assert "cannot name a library or an op" in call("new", name, "--into", str(tmp_path), code=2)


@pytest.mark.parametrize("name", ["torch::scale", "math::scale", "userlib::scale"])
def test_new_refuses_the_name_of_another_library(call: Call, tmp_path: Path, name: str) -> None:
    library = name.partition("::")[0]
    assert f"there is a library {library!r} already" in call("new", name, "--into", str(tmp_path), code=2)


# --- clangd ----------------------------------------------------------------------------------------


def flags_of(text: str) -> list[list[str]]:
    return [[json.loads(flag) for flag in re.findall(r"^    - (.*)$", part, re.MULTILINE)] for part in text.split("---\n")]


def test_clangd_is_told_the_folders_and_flags(call: Call, tmp_path: Path) -> None:
    call("new", "fresh_lib::stretch", "--into", str(tmp_path))
    assert call("clangd", str(tmp_path), "--arch", "9.0a").splitlines()[-1] == f"{tmp_path}/.clangd"
    plain, *_ = flags_of((tmp_path / ".clangd").read_text())
    assert plain[:2] == [f"-I{tmp_path}/fresh_lib/csrc", f"-I{include_dir()}"]
    source = tmp_path / "fresh_lib/csrc/stretch.cpp"
    command = [str(programs.host_compiler()), *plain, "-fsyntax-only", str(source)]
    done = subprocess.run([flag for flag in command if flag != "-xc++"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_clangd_is_told_of_cuda(tmp_path: Path) -> None:
    from torch_jit_ops.cli import clangd

    toolkit = Toolkit(Path("/cuda"), Path("/cuda/bin/nvcc"), (Path("/else/include"),), Path("/cuda/lib64"), "CUDA_HOME")
    text = clangd.configuration(tmp_path, "9.0a", toolkit)
    _, cuda, runtime = flags_of(text)
    assert 'PathMatch: ".*\\\\.cuh?"' in text
    expected = ["--cuda-path=/cuda", "--cuda-gpu-arch=sm_90a", "-DJITK_CUDA_ARCH=900", "-I/else/include", "-std=c++17"]
    assert [flag for flag in expected if flag not in cuda] == []
    assert not any(flag.startswith(("-Xcompiler", "-gencode")) for flag in cuda)
    assert runtime[0] == f"-isystem{Path(torch.__file__).parent / 'include'}"
    assert len(flags_of(clangd.configuration(tmp_path, "9.0a", None))) == 2


def test_clangd_keeps_a_foreign_file(call: Call, tmp_path: Path) -> None:
    (tmp_path / ".clangd").write_text("Diagnostics:\n")
    said = call("clangd", str(tmp_path), code=1)
    assert said == f"error: {tmp_path}/.clangd was written by somebody else; --force replaces it\n"
    assert (tmp_path / ".clangd").read_text() == "Diagnostics:\n"
    call("clangd", str(tmp_path), "--force")
    call("clangd", str(tmp_path))  # our own is replaced without a word
    assert call("clangd", str(tmp_path / "missing"), code=2) == f"error: there is no folder {tmp_path}/missing\n"
