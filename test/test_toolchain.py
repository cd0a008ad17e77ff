"""Finding the compilers, on machines made up of empty files and stub programs."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch.utils import cpp_extension

from torch_jit_ops import environment, process
from torch_jit_ops.backends import CUDA, MissingCompiler, Toolkit, programs
from torch_jit_ops.backends import cuda as cuda_backend
from torch_jit_ops.builder import compile, compilers
from torch_jit_ops.builder.unit import Unit, include_dir


def program(path: Path, text: str = "#!/bin/sh\necho made up, release 13.0\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def empty(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def whole_toolkit(home: Path, lib: str = "lib64", version: str = "13") -> Path:
    program(home / "bin/nvcc")
    empty(home / "include/cuda_runtime.h")
    empty(home / lib / "libcudart.so")
    empty(home / lib / f"libcudart.so.{version}")
    return home


@dataclass
class Machine:
    """A machine without any CUDA: what a test puts into its folders is all there is."""

    root: Path
    monkeypatch: pytest.MonkeyPatch
    sites: list[Path] = field(default_factory=list)

    def site(self, name: str = "site") -> Path:
        """The folder ``nvidia`` of a site-packages folder on ``sys.path``."""
        self.sites.append(self.root / name)
        return self.root / name / "nvidia"

    def find(self) -> Toolkit:
        process.reset()
        with self.monkeypatch.context() as patch:
            patch.setattr(sys, "path", [str(site) for site in self.sites])
            return CUDA.toolkit()

    def refusal(self) -> str:
        with pytest.raises(MissingCompiler) as caught:
            self.find()
        return str(caught.value).replace(str(self.root), "<root>")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX", "JITK_CUDA_ARCH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cuda_backend, "_USUAL_HOME", tmp_path / "usual")
    yield Machine(tmp_path, monkeypatch)
    process.reset()


# --- nvcc ------------------------------------------------------------------------------------------


def test_the_order_of_the_search(machine: Machine) -> None:
    chosen = whole_toolkit(machine.root / "chosen")
    machine.monkeypatch.setenv("CUDA_HOME", str(chosen))
    on_path = whole_toolkit(machine.root)
    wheels = whole_toolkit(machine.site() / "cu13", lib="lib")
    usual = whole_toolkit(machine.root / "usual")
    met = []
    for _ in range(4):
        found = machine.find()
        met.append((found.home, found.found_by))
        found.nvcc.unlink()
    assert met == [(chosen, "CUDA_HOME"), (on_path, "nvcc on PATH"), (wheels, "wheels"), (usual, "the usual folder")]


def test_cuda_path_is_another_name_of_cuda_home(machine: Machine) -> None:
    home = whole_toolkit(machine.root / "chosen")
    machine.monkeypatch.setenv("CUDA_PATH", str(home))
    assert machine.find() == Toolkit(home, home / "bin/nvcc", (), home / "lib64", "CUDA_HOME")


def test_a_script_on_path_that_starts_the_real_one(machine: Machine) -> None:
    home = whole_toolkit(machine.root / "opt/cuda-13.0")
    program(machine.root / "bin/nvcc", f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    assert machine.find() == Toolkit(home, home / "bin/nvcc", (), home / "lib64", "nvcc on PATH")


def test_a_link_on_path(machine: Machine) -> None:
    home = whole_toolkit(machine.root / "opt/cuda-13.0")
    (machine.root / "bin").mkdir()
    (machine.root / "bin/nvcc").symlink_to(home / "bin/nvcc")
    assert machine.find().home == home


def test_a_link_to_a_script(machine: Machine) -> None:
    home = whole_toolkit(machine.root / "opt/cuda-13.0")
    script = program(machine.root / "etc/alternatives/nvcc", f"#!/bin/sh\n{home}/bin/nvcc $*\n")
    (machine.root / "bin").mkdir()
    (machine.root / "bin/nvcc").symlink_to(script)
    assert machine.find().home == home


def test_conda_keeps_headers_by_target(machine: Machine) -> None:
    home = machine.root
    program(home / "bin/nvcc")
    header = empty(home / "targets/x86_64-linux/include/cuda_runtime.h")
    empty(home / "lib/libcudart.so.13")
    found = machine.find()
    assert (found.home, found.include, found.libraries) == (home, (header.parent,), home / "lib")


def test_debian_keeps_libraries_by_architecture(machine: Machine) -> None:
    home = whole_toolkit(machine.root / "usr", lib="lib/x86_64-linux-gnu")
    machine.monkeypatch.setenv("CUDA_HOME", str(home))
    assert machine.find().libraries == home / "lib/x86_64-linux-gnu"


def test_wheels_that_lie_in_two_environments(machine: Machine) -> None:
    """pip does not install the runtime where the environment beneath has it, beside PyTorch."""
    upper, lower = machine.site("upper") / "cu13", machine.site("lower") / "cu13"
    program(upper / "bin/nvcc")
    empty(upper / "include/crt/host_config.h")
    empty(lower / "include/cuda_runtime.h")
    empty(lower / "include/cccl/nv/target")
    empty(lower / "lib/libcudart.so.13")
    expected = (lower / "include", lower / "include/cccl")
    assert machine.find() == Toolkit(upper, upper / "bin/nvcc", expected, lower / "lib", "wheels")


def test_headers_beside_nvcc_hide_those_of_another_environment(machine: Machine) -> None:
    upper, lower = (whole_toolkit(machine.site(name) / "cu13", lib="lib") for name in ("upper", "lower"))
    assert machine.find() == Toolkit(upper, upper / "bin/nvcc", (), upper / "lib", "wheels")
    (upper / "include/cuda_runtime.h").unlink()
    assert machine.find().include == (lower / "include",)


def test_wheels_with_a_folder_each(machine: Machine) -> None:
    site = machine.site()
    program(site / "cuda_nvcc/bin/nvcc")
    empty(site / "cuda_nvcc/include/crt/host_config.h")
    empty(site / "cuda_runtime/include/cuda_runtime.h")
    empty(site / "cuda_cccl/include/nv/target")
    empty(site / "cuda_runtime/lib/libcudart.so.12")
    machine.monkeypatch.setattr(torch.version, "cuda", "12.8")
    found = machine.find()
    assert found.include == (site / "cuda_runtime/include", site / "cuda_cccl/include")
    assert (found.home, found.libraries) == (site / "cuda_nvcc", site / "cuda_runtime/lib")


@pytest.mark.parametrize(("torch_cuda", "expected"), [("13.2", "cu13"), ("14.0", "cu14"), (None, "cu14")])
def test_the_toolkit_of_pytorchs_major_version(machine: Machine, torch_cuda: str | None, expected: str) -> None:
    site = machine.site()
    for version in ("13", "14"):
        whole_toolkit(site / f"cu{version}", lib="lib", version=version)
    machine.monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    assert machine.find().home == site / expected


def test_the_build_gets_every_part(machine: Machine) -> None:
    """The linker asks for libcudart.so, which wheels lack."""
    upper, lower = machine.site("upper") / "cu13", machine.site("lower") / "cu13"
    program(upper / "bin/nvcc")
    empty(lower / "include/cuda_runtime.h")
    libcudart = empty(lower / "lib/libcudart.so.13.0.96")
    machine.find()
    asked: dict[str, Any] = {}
    machine.monkeypatch.setattr(cpp_extension, "load", lambda *_, **options: asked.update(options))
    machine.monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    unit = Unit("name", "label", CUDA, "9.0a", "", include=(machine.root / "mine",))
    compile._run_cpp_extension(unit, machine.root, [machine.root / "unit.cu"], "module")
    assert str(upper) == cpp_extension.CUDA_HOME
    assert asked["extra_include_paths"] == [str(machine.root / "mine"), str(include_dir()), str(lower / "include")]
    folder = Path(asked["extra_ldflags"][-1].removeprefix("-L"))
    assert (folder / "libcudart.so").resolve() == libcudart
    assert lower / "include" in compile._system_folders(unit)


def test_folders_that_a_command_would_part(machine: Machine) -> None:
    """cpp_extension quotes the folders of headers, and no others."""
    home = machine.root / "my env/cu13"
    program(home / "bin/nvcc")
    empty(home / "include/cuda_runtime.h")
    empty(home / "lib/libcudart.so")
    machine.monkeypatch.setenv("CUDA_HOME", str(home))
    machine.find()
    asked: dict[str, Any] = {}
    machine.monkeypatch.setattr(cpp_extension, "load", lambda *_, **options: asked.update(options))
    machine.monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    machine.monkeypatch.setattr(cpp_extension, "TORCH_LIB_PATH", None)
    machine.monkeypatch.setattr(torch, "__file__", "/my env/torch/__init__.py")
    unit = Unit("name", "label", CUDA, "9.0a", "")
    compile._run_cpp_extension(unit, machine.root, [machine.root / "unit.cu"], "module")
    assert cpp_extension.TORCH_LIB_PATH == "'/my env/torch/lib'"
    assert cpp_extension.CUDA_HOME == "links/toolkit"  # ninja runs in the staging folder
    assert (machine.root / "links/toolkit").resolve() == home
    assert asked["extra_ldflags"][-1] == f"'-L{home}/lib'"


# --- what is missing -------------------------------------------------------------------------------


def test_a_machine_without_anything(machine: Machine) -> None:
    assert_expected_inline(
        machine.refusal(),
        """\
no CUDA compiler (nvcc) was found, so CUDA kernels cannot be built
  looked in:
    <root>/usual (the usual folder): no bin/nvcc
  remedy: pip install 'torch_jit_ops[nvcc]', or install the CUDA toolkit and set CUDA_HOME to its folder""",
    )


def test_halves_of_toolkits(machine: Machine) -> None:
    machine.monkeypatch.setenv("CUDA_HOME", str(machine.root / "gone"))
    program(machine.root / "bin/nvcc", "#!/bin/sh\nexec /nowhere/bin/nvcc\n")
    empty(machine.site() / "cu13/lib/libcudart.so.13")
    program(machine.root / "usual/bin/nvcc")
    empty(machine.root / "usual/include/cuda_runtime.h")
    assert_expected_inline(
        machine.refusal(),
        """\
no CUDA compiler (nvcc) was found, so CUDA kernels cannot be built
  looked in:
    <root>/gone (CUDA_HOME): no bin/nvcc
    <root> (nvcc on PATH): no include/cuda_runtime.h
    /nowhere (nvcc on PATH): no bin/nvcc
    <root>/site/nvidia/cu13 (wheels): no bin/nvcc
    <root>/usual (the usual folder): no libcudart
  remedy: pip install 'torch_jit_ops[nvcc]', or install the CUDA toolkit and set CUDA_HOME to its folder""",
    )


def test_a_pytorch_of_another_cuda(machine: Machine) -> None:
    """Its process could not load a kernel that is linked to the other libcudart."""
    machine.monkeypatch.setattr(torch.version, "cuda", "12.8")
    empty(machine.site() / "cuda_nvcc/bin/ptxas")
    whole_toolkit(machine.root / "usual")
    assert_expected_inline(
        machine.refusal(),
        """\
no CUDA compiler (nvcc) was found, so CUDA kernels cannot be built
  looked in:
    <root>/site/nvidia/cuda_nvcc (wheels): no bin/nvcc
    <root>/usual (the usual folder): it is CUDA 13, but PyTorch is built with CUDA 12.8
  remedy: install CUDA toolkit 12.8 and set CUDA_HOME to its folder (wheels hold an nvcc from CUDA 13 on)""",
    )


def test_a_machine_without_a_cpp_compiler(machine: Machine) -> None:
    with pytest.raises(MissingCompiler) as caught:
        programs.host_compiler()
    assert_expected_inline(
        str(caught.value),
        """\
no C++ compiler was found ('c++' is not on PATH), so kernels cannot be built
  remedy: install g++ 11 or newer (Debian, Ubuntu: apt-get install g++), or set CXX to one""",
    )


def test_a_compiler_that_does_not_run(machine: Machine) -> None:
    broken = program(machine.root / "bin/c++", "#!/bin/sh\necho cannot find cc1plus >&2\nexit 1\n")
    with pytest.raises(MissingCompiler) as caught:
        compilers.compiler_identity(broken, machine.root / "memory")
    assert_expected_inline(
        str(caught.value).replace(str(machine.root), "<root>"),
        """\
the compiler <root>/bin/c++ does not run, so kernels cannot be built
  cannot find cc1plus""",
    )


# --- the C++ compiler ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cxx", "expected"), [(None, "c++"), ("g++-11", "g++-11"), ("ccache g++-11", "g++-11"), ("g++-11 -m64", "g++-11")]
)
def test_the_cpp_compiler(machine: Machine, cxx: str | None, expected: str) -> None:
    for name in ("c++", "g++-11", "ccache"):
        program(machine.root / "bin" / name)
    if cxx is not None:
        machine.monkeypatch.setenv("CXX", cxx)
    assert programs.host_compiler() == machine.root / "bin" / expected


def test_a_cpp_compiler_outside_of_path(machine: Machine) -> None:
    compiler = program(machine.root / "opt/clang++")
    machine.monkeypatch.setenv("CXX", str(compiler))
    assert programs.host_compiler() == compiler


# --- ninja -----------------------------------------------------------------------------------------


def test_ninja_on_path(machine: Machine) -> None:
    found = program(machine.root / "bin/ninja")
    assert programs.ninja() == found


def test_ninja_of_the_wheel_where_the_environment_is_not_activated(machine: Machine) -> None:
    found = program(machine.root / "env/bin/ninja")
    empty(machine.root / "env/site/ninja/__init__.py")
    record = empty(machine.root / "env/site/ninja-1.13.2.dist-info/RECORD")
    record.write_text("ninja/__init__.py,,\n../bin/ninja,,\n")
    (record.parent / "METADATA").write_text("Metadata-Version: 2.1\nName: ninja\nVersion: 1.13.2\n")
    machine.monkeypatch.setattr(sys, "path", [str(machine.root / "env/site"), *sys.path])
    assert programs.ninja() == found
    environment.put_on_path(found)
    environment.put_on_path(found)
    assert os.environ["PATH"] == f"{machine.root}/bin:{machine.root}/env/bin"


def test_a_machine_without_ninja(machine: Machine) -> None:
    machine.monkeypatch.setattr(sys, "path", [])
    with pytest.raises(MissingCompiler) as caught:
        programs.ninja()
    assert_expected_inline(
        str(caught.value),
        """\
ninja was not found, so kernels cannot be built
  remedy: pip install ninja""",
    )


# --- identity --------------------------------------------------------------------------------------


@pytest.fixture
def talker(tmp_path: Path) -> Path:
    """A compiler that writes down each start."""
    text = f"#!/bin/sh\necho {tmp_path.name} >> {tmp_path}/starts\necho 'stub (made up) 1.2.3'\necho 'No warranty'\n"
    return program(tmp_path / "bin/stub", text)


def starts(talker: Path) -> int:
    return len((talker.parent.parent / "starts").read_text().splitlines())


def test_a_compiler_is_asked_once(talker: Path, tmp_path: Path) -> None:
    for _ in range(3):
        assert compilers.compiler_identity(talker, tmp_path / "memory") == "stub (made up) 1.2.3"
    assert starts(talker) == 1


def test_a_compiler_that_changed_is_asked_again(talker: Path, tmp_path: Path) -> None:
    compilers.compiler_identity(talker, tmp_path / "memory")
    talker.write_text(talker.read_text().replace("1.2.3", "1.2.4"))  # as long as before
    os.utime(talker, ns=(0, 1))
    assert compilers.compiler_identity(talker, tmp_path / "memory") == "stub (made up) 1.2.4"
    assert starts(talker) == 2


def test_another_compiler_of_the_same_name_is_asked(talker: Path, tmp_path: Path) -> None:
    compilers.compiler_identity(talker, tmp_path / "memory")
    (tmp_path / "other").mkdir()
    compilers.compiler_identity(Path(shutil.copy2(talker, tmp_path / "other")), tmp_path / "memory")
    assert starts(talker) == 2


@pytest.mark.parametrize("note", ["", "{", "[]", '{"program": 1}'])
def test_a_note_that_cannot_be_read_is_written_anew(talker: Path, tmp_path: Path, note: str) -> None:
    compilers.compiler_identity(talker, tmp_path / "memory")
    (tmp_path / "memory/stub.json").write_text(note)
    for _ in range(2):
        assert compilers.compiler_identity(talker, tmp_path / "memory") == "stub (made up) 1.2.3"
    assert starts(talker) == 2


def test_a_memory_that_cannot_be_written(talker: Path) -> None:
    assert compilers.compiler_identity(talker, talker / "memory") == "stub (made up) 1.2.3"


# --- architectures ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "name", "flag", "number"),
    [
        ((8, 0), "8.0", "-gencode=arch=compute_80,code=sm_80", 800),
        ((8, 9), "8.9", "-gencode=arch=compute_89,code=sm_89", 890),
        ((9, 0), "9.0a", "-gencode=arch=compute_90a,code=sm_90a", 900),
        ((10, 3), "10.3a", "-gencode=arch=compute_103a,code=sm_103a", 1030),
        ((12, 0), "12.0a", "-gencode=arch=compute_120a,code=sm_120a", 1200),
    ],
)
def test_architectures(capability: tuple[int, int], name: str, flag: str, number: int) -> None:
    assert cuda_backend.arch_name(*capability) == name
    assert CUDA.arch_flags(name) == (flag, f"-DJITK_CUDA_ARCH={number}")


@pytest.mark.parametrize("arch", ["", "90", "sm_90", "9.0b", "9.0a;8.0", "9.0+PTX"])
def test_what_is_no_architecture(arch: str) -> None:
    with pytest.raises(ValueError) as caught:
        CUDA.arch_flags(arch)
    assert str(caught.value) == f"the CUDA architecture {arch!r} must be of the form 8.0 or 9.0a"


def test_the_architecture_is_of_the_tensors_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JITK_CUDA_ARCH", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", {0: (9, 0), 1: (8, 6)}.__getitem__)
    assert [CUDA.arch_of(index) for index in (0, 1)] == ["9.0a", "8.6"]
    monkeypatch.setenv("JITK_CUDA_ARCH", "10.0a")
    assert CUDA.arch_of(0) == "10.0a"
