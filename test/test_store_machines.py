"""Machines that are not as usual: noexec mounts, file systems without locks, users without a home, compilers behind scripts,
and variables that compilers obey."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import store_child
import torch
from child import run_python
from expecttest import assert_expected_inline
from test_store_attacks import ROOT_ALONE, STRANGER, Here, here  # noqa: F401  (a fixture)
from torch.utils import cpp_extension

from torch_jit_ops import environment, process
from torch_jit_ops.ahead import build_ahead
from torch_jit_ops.backends import CPU, CUDA, Backend, MissingCompiler, Toolkit, programs
from torch_jit_ops.backends import cuda as cuda_backend
from torch_jit_ops.builder import compilers, errors, shared_object, workarounds
from torch_jit_ops.builder.errors import BuildError, UnknownGpu
from torch_jit_ops.builder.load import load
from torch_jit_ops.builder.unit import Unit
from torch_jit_ops.calling import dispatcher
from torch_jit_ops.cli import doctor
from torch_jit_ops.store import files, lock
from torch_jit_ops.store.files import UntrustedCache
from torch_jit_ops.store.search_path import default_store
from torch_jit_ops.store.temporary import temporary_folder

# --- noexec ----------------------------------------------------------------------------------------


def mounted(folder: Path, options: str) -> Path:
    folder.mkdir(mode=0o700, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"{options},mode=700", "tmpfs", str(folder)]
    said = subprocess.run(command, capture_output=True, text=True)
    if said.returncode != 0:
        pytest.skip(f"cannot mount: {said.stderr.strip()}")
    return folder


@pytest.fixture
def noexec(here: Here) -> Iterator[Path]:  # noqa: F811
    """A cache from which no program can be run."""
    yield mounted(here.root / "cache", "noexec")
    subprocess.run(["umount", "-l", here.root / "cache"], check=True)


def warned(here: Here, unit: Unit, expected: tuple[int, bool]) -> list[str]:  # noqa: F811
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert here.load(unit) == expected
    return [here.text(warning.message) for warning in caught]


NOEXEC = (
    "the kernel cache <root>/cache is on a file system from which no program can be run (noexec); kernels are copied to a "
    "temporary folder in every process. Set JITK_CACHE_DIR to a folder elsewhere"
)


@ROOT_ALONE
def test_a_cache_that_runs_no_programs(here: Here, noexec: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    assert warned(here, store_child.unit(1), (1, True)) == [NOEXEC]
    assert warned(here, store_child.unit(2), (2, True)) == []
    before = here.tree("cache")
    process.reset()
    assert warned(here, store_child.unit(1), (1, False)) == [NOEXEC]
    assert here.tree("cache") == before
    process.reset()
    (found,) = doctor.CHECKS["cache"]()
    assert (found.state, here.text(found.found), found.remedy) == (
        "problem",
        NOEXEC.partition(". Set")[0],
        "set JITK_CACHE_DIR to a folder elsewhere",
    )


@ROOT_ALONE
def test_a_cache_that_comes_to_run_no_programs(here: Here) -> None:  # noqa: F811
    assert here.load(store_child.unit(1)) == (1, True)
    whole = (here.root / "cache").rename(here.root / "whole")
    mounted(here.root / "cache", "noexec")
    try:
        shutil.copytree(whole, here.root / "cache", dirs_exist_ok=True)
        before = here.tree("cache")
        assert warned(here, store_child.unit(1), (1, False)) == [NOEXEC]
        assert here.tree("cache") == before
    finally:
        subprocess.run(["umount", "-l", here.root / "cache"], check=True)


@ROOT_ALONE
def test_nowhere_to_run_programs(here: Here, noexec: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    elsewhere = mounted(here.root / "temporary", "noexec")
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    expected = (
        "kernels can be run neither from the kernel cache <root>/cache nor from the folder for temporary files "
        "<root>/temporary: both are on file systems from which no program can be run (noexec)\n"
        "  remedy: set JITK_CACHE_DIR or TMPDIR to a folder elsewhere"
    )
    try:
        with pytest.raises(RuntimeError) as caught, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            here.load(store_child.unit(1))
        assert here.text(caught.value) == expected
    finally:
        subprocess.run(["umount", "-l", elsewhere], check=True)


@pytest.mark.parametrize("said", ["", ": Permission denied"])
def test_a_library_that_may_not_be_run(here: Here, said: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """As where a policy of the system forbids it."""
    assert here.load(store_child.unit(1)) == (1, True)
    original = shared_object.open_library

    def refuse(path: Path) -> Any:
        if here.store.root in path.parents:
            raise OSError(f"{path}: failed to map segment from shared object{said}")
        return original(path)

    monkeypatch.setattr(shared_object, "open_library", refuse)
    before = here.tree("cache")
    assert warned(here, store_child.unit(1), (1, False)) == [NOEXEC]
    assert here.tree("cache") == before


@pytest.mark.parametrize("said", ["failed to map segment from shared object: Cannot allocate memory", "x: Too many open files"])
def test_a_process_without_room_deletes_nothing(here: Here, said: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    assert here.load(store_child.unit(1)) == (1, True)

    def refuse(path: Path) -> Any:
        raise OSError(said)

    monkeypatch.setattr(shared_object, "open_library", refuse)
    before = here.tree("cache")
    with pytest.raises(OSError, match=said):
        here.load(store_child.unit(1))
    assert here.tree("cache") == before


# --- staging ---------------------------------------------------------------------------------------


def staged(here: Here) -> list[Path]:  # noqa: F811
    return sorted((here.store.root / "staging").iterdir())


def test_logs_of_failed_builds_are_few_and_go_when_asked(here: Here) -> None:  # noqa: F811
    logs = []
    for number in range(12):
        with pytest.raises(BuildError) as caught:
            here.load(store_child.unit(text=f"static_assert(false, {chr(34)}{number}{chr(34)});"))
        logs.append(Path(str(caught.value).partition("full log: ")[2]))
    assert "static assertion failed: 11" in logs[-1].read_text()
    assert len(staged(here)) <= 9
    alive = here.store.new_staging()
    for command in ("prune", "clear"):
        with pytest.raises(BuildError):
            here.load(store_child.unit(text="static_assert(false);"))
        run_python(f"from torch_jit_ops.cli import main; main.main(['cache', '{command}'])", JITK_CACHE_DIR=here.store.root)
        assert staged(here) == [alive]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), OSError(5, "Input/output error"), ValueError("x")])
def test_a_build_that_ends_otherwise_leaves_nothing(
    here: Here,  # noqa: F811
    error: BaseException,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(cpp_extension, "load", fail)
    with pytest.raises(type(error)):
        here.load(store_child.unit(1))
    assert staged(here) == []


@pytest.mark.parametrize("error", [NotImplementedError(), RuntimeError(), RuntimeError("\n")])
def test_an_error_without_a_text_is_named(here: Here, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(cpp_extension, "load", fail)
    with pytest.raises(BuildError) as caught:
        here.load(store_child.unit(1))
    first, reason, *_ = str(caught.value).splitlines()
    assert (first, reason.strip()) == ("store::tiny<1> did not compile (cpu, x86-64)", repr(error))
    assert caught.value.__cause__ is error


def test_a_lock_of_pytorchs_own_is_not_taken(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """From PyTorch 2.14 on ``load`` locks a file in the build folder, which is of one build alone."""

    class NoLock:
        def __init__(self, path: str) -> None:
            raise NotImplementedError

    original = cpp_extension._jit_compile

    def locking(*args: Any, **options: Any) -> Any:
        with cpp_extension.FileLock("lock"):
            return original(*args, **options)

    monkeypatch.setattr(cpp_extension, "FileLock", NoLock, raising=False)
    monkeypatch.setattr(cpp_extension, "_jit_compile", locking)
    workarounds._install.cache_clear()
    assert here.load(store_child.unit(1)) == (1, True)
    with pytest.raises(NotImplementedError):  # a program's own use
        cpp_extension.FileLock("lock")


# --- no home ---------------------------------------------------------------------------------------


def test_a_user_without_a_home(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    for name in ("JITK_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where the user has no entry in passwd
    process.reset()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert here.load(store_child.unit(1)) == (1, True)
        assert here.load(store_child.unit(1)) == (1, False)
    assert [str(each.message) for each in caught] == [
        f"the user of this process (uid {os.getuid()}) has no home folder, so kernels are built again in every process. "
        "Set JITK_CACHE_DIR to a folder with space that can be written"
    ]
    assert default_store().root.parent == Path(tempfile.gettempdir())
    monkeypatch.setenv("JITK_CACHE_DIR", "~/kernels")
    with pytest.raises(ValueError) as refused:
        default_store()
    assert str(refused.value) == "JITK_CACHE_DIR is '~/kernels', but the system knows no home of that user: give the whole path"


@ROOT_ALONE
def test_a_uid_without_a_name(tmp_path: Path) -> None:
    code = f"""
import os, warnings
from torch_jit_ops.store.search_path import default_store
os.setgid({STRANGER}); os.setuid({STRANGER})
os.environ.pop("HOME", None)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    store = default_store()
print(len(caught), store.root.is_dir(), store.new_staging().is_dir())
"""
    environment_ = dict.fromkeys(("XDG_CACHE_HOME", "JITK_CACHE_DIR"), "")
    assert run_python(code, TORCHINDUCTOR_CACHE_DIR="/tmp/x", USER="somebody", **environment_) == "1 True True\n"


# --- what changes a build --------------------------------------------------------------------------

INCLUDES = """#include <jitk_value.h>
extern "C" __attribute__((visibility("default"))) int jitk_value() { return VALUE; }
"""


def header(folder: Path, value: int) -> Path:
    folder.mkdir()
    (folder / "jitk_value.h").write_text(f"#define VALUE {value}\n")
    return folder


@pytest.mark.parametrize("name", ["CPATH", "CPLUS_INCLUDE_PATH"])
def test_folders_of_headers_in_the_environment(here: Here, name: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    unit = store_child.unit(text=INCLUDES)
    for value in (1, 2, 1):
        folder = here.root / str(value)
        monkeypatch.setenv(name, str(folder if folder.exists() else header(folder, value)))
        assert here.load(unit)[0] == value
    assert here.load(unit) == (1, False)


@pytest.mark.parametrize(
    ("name", "cpu", "cuda"),
    [
        *((name, True, True) for name in environment._READ_BY_COMPILERS),
        *((name, False, True) for name in CUDA.variables),
        ("TORCH_CUDA_ARCH_LIST", False, False),
        ("MAX_JOBS", False, False),
    ],
)
def test_variables_that_compilers_obey(name: str, cpu: bool, cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def identity(backend: Backend) -> list[str]:
        return list(compilers.identity(backend, [programs.host_command()], Path(os.devnull)))

    monkeypatch.delenv(name, raising=False)
    before = [identity(backend) for backend in (CPU, CUDA)]
    monkeypatch.setenv(name, "7")
    assert [identity(backend) != was for backend, was in zip((CPU, CUDA), before, strict=True)] == [cpu, cuda]


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


VALUE = """extern "C" __attribute__((visibility("default"))) int jitk_value() { return VALUE; }\n"""


def test_a_script_that_adds_a_flag(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    compiler = here.root / "bin/c++"
    monkeypatch.setenv("CXX", str(compiler))
    for value in (1, 2, 1):
        script(compiler, f'exec g++ -DVALUE={value} "$@"')
        assert here.load(store_child.unit(text=VALUE))[0] == value
    assert here.load(store_child.unit(text=VALUE)) == (1, False)


def test_a_script_behind_a_script_and_a_variable(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("CXX", str(script(here.root / "bin/c++", 'exec "$JITK_TEST_REAL" "$@"')))
    for value in (1, 2):
        monkeypatch.setenv("JITK_TEST_REAL", str(script(here.root / f"bin/{value}", f'exec g++ -DVALUE={value} "$@"')))
        assert here.load(store_child.unit(text=VALUE)) == (value, True)
    script(here.root / "bin/2", 'exec g++ -DVALUE=3 "$@"')
    assert here.load(store_child.unit(text=VALUE)) == (3, True)
    assert here.load(store_child.unit(text=VALUE)) == (3, False)


def test_a_compiler_that_is_replaced_behind_a_script(tmp_path: Path) -> None:
    """The script stays as it is; the program that it starts is another one."""
    real = script(tmp_path / "opt/g++", "echo real 1.2.3")
    front = script(tmp_path / "bin/c++", f'exec {real} "$@"')
    memory = tmp_path / "memory"
    assert compilers.compiler_identity(front, memory) == "real 1.2.3"
    script(real, "echo real 1.2.34")
    assert compilers.compiler_identity(front, memory) == "real 1.2.34"


COMMANDS = ["ccache g++", "g++ -DVALUE=5", "launcher --quiet g++ -DVALUE=5", "env VALUE=1 g++ -DVALUE=5", "SPACE"]


@pytest.mark.parametrize("cxx", COMMANDS)
def test_a_compiler_of_several_words(here: Here, cxx: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("PATH", f"{here.root}/bin:{os.environ['PATH']}")
    for name in ("ccache", "launcher"):
        script(here.root / f"bin/{name}", f'echo {name} "$@" >> {here.root}/started\n[ "$1" = --quiet ] && shift\nexec "$@"')
    script(here.root / "bin dir/g++", 'exec g++ "$@"')
    monkeypatch.setenv("CXX", cxx.replace("SPACE", str(here.root / "bin dir/g++")))
    unit = store_child.unit(text=VALUE if "VALUE=5" in cxx else VALUE.replace("VALUE; }", "5; }"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert here.load(unit) == (5, True)
    if cxx.startswith(("ccache", "launcher")):
        assert cxx in (here.root / "started").read_text()
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    assert here.load(unit) == (5, False)


@pytest.mark.parametrize(
    ("cxx", "text"),
    [
        ("nothing g++", "no C++ compiler was found ('nothing' is not on PATH), so kernels cannot be built"),
        ("env nothing -O2", "no C++ compiler was found ('nothing' is not on PATH), so kernels cannot be built"),
        ("g++ 'x", 'CXX is "g++ \'x", which is no command (No closing quotation), so kernels cannot be built'),
    ],
)
def test_what_is_no_compiler(cxx: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", cxx)
    with pytest.raises(MissingCompiler) as caught:
        programs.host_compiler()
    assert str(caught.value).splitlines()[0] == text


# --- linking, and a GPU that nvcc does not know ----------------------------------------------------


def test_a_failed_link_names_the_symbol(here: Here) -> None:  # noqa: F811
    text = """namespace mylib { template <int N> int helper(int, const char*); }
    extern "C" __attribute__((visibility("default"))) int jitk_value() { return mylib::helper<7>(1, ""); }
    """
    unit = store_child.unit(text=text)
    process.reset()
    errors = []
    for _ in range(2):
        with pytest.raises(BuildError) as caught:
            load(unit)
        errors.append(caught.value)
    log = re.findall("full log: (.*)", str(errors[0]))[0]
    assert_expected_inline(
        str(errors[0]).replace(log, "LOG"),
        """\
store::tiny<0> did not link (cpu, x86-64)
  undefined symbol: int mylib::helper<7>(int, char const*)
  full log: LOG
  remedy: name in ldflags the library that has it, or behind the first source the one that defines it""",
    )
    assert errors[0] is errors[1]
    assert "undefined reference" in Path(log).read_text()


@pytest.mark.parametrize("unit", [dispatcher.unit, dispatcher.standalone_unit, dispatcher.autograd_unit])
def test_the_dispatchers_lack_nothing(unit: Any) -> None:
    """They are linked with -z defs as well: what they use of PyTorch is in libraries that they are linked with."""
    assert load(unit()).path.is_file()


def nvcc_that_says(root: Path, text: str) -> Toolkit:
    nvcc = script(root / "bin/nvcc", f'echo start >> {root}/started\necho "{text}" >&2\nexit 1')
    (root / "lib").mkdir()
    (root / "lib/libcudart.so").touch()
    return Toolkit(root, nvcc, (), root / "lib", "test")


def test_a_gpu_that_nvcc_does_not_know(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    toolkit = nvcc_that_says(here.root, "nvcc fatal   : Unsupported gpu architecture 'compute_130a'")
    monkeypatch.setattr(cuda_backend, "toolkit", lambda: toolkit)
    monkeypatch.setattr(compilers, "identity", lambda *_: ["nvcc"])
    unit = replace(store_child.unit(1), backend=CUDA, arch="13.0a")
    with pytest.raises(BuildError) as caught:
        here.load(unit)
    assert isinstance(caught.value, MissingCompiler)
    assert here.text(caught.value) == (
        "<root>/bin/nvcc does not know compute_130a, so CUDA kernels cannot be built for this GPU\n"
        "  remedy: install a newer CUDA toolkit and set CUDA_HOME to its folder"
    )
    assert isinstance(errors.told(str(caught.value)), UnknownGpu)
    assert type(errors.told("x did not compile")) is BuildError
    assert staged(here) == []
    process.reset()
    monkeypatch.setenv("JITK_FALLBACK", "warn")
    with pytest.warns(UserWarning, match="runs its PyTorch reference, which is slower: .* does not know compute_130a") as said:
        for who in ("jitk::a", "jitk::b"):
            dispatcher.fall_back(who, caught.value)
    assert len(said) == 1
    monkeypatch.setenv("JITK_FALLBACK", "error")
    with pytest.raises(BuildError):
        dispatcher.fall_back("jitk::a", caught.value)


def test_cuda_kernels_without_cuda_are_one_line(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(build_ahead, "load_unit", lambda *_: pytest.fail("a compiler was started"))
    with pytest.raises(ValueError) as caught:
        build_ahead.load_all([replace(store_child.unit(1), backend=CUDA, arch="9.0a")])
    assert str(caught.value) == (
        f"PyTorch {torch.__version__} is built without CUDA, so no CUDA kernel can be built with it: "
        "install a PyTorch for CUDA, or choose the backend cpu"
    )


# --- folders for temporary files -------------------------------------------------------------------


def test_a_folder_for_temporary_files_of_another_name(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    (here.root / "a b").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(here.root / "a b"))
    with pytest.raises(RuntimeError) as caught:
        temporary_folder()
    assert here.text(caught.value) == (
        "kernels cannot be built in the folder for temporary files, '<root>/a b': the build tools bear only letters, digits "
        "and /._+-~ in its name\n  remedy: set TMPDIR to another folder"
    )


def test_the_group_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many systems give each user a group of the same name, and let it write what the user makes."""
    root = tmp_path / "above/cache"
    root.mkdir(parents=True, mode=0o700)
    root.chmod(0o700)
    root.parent.chmod(0o775)
    monkeypatch.setattr(files, "_is_own_group", lambda group: True)
    files.check(root)
    monkeypatch.setattr(files, "_is_own_group", lambda group: False)
    with pytest.raises(UntrustedCache, match=r"mode 775"):
        files.check(root)
    assert lock.is_alive(os.getpid())
