"""What a kernel is made of besides one file: several files, texts, libraries, headers of wheels, options per architecture."""

from __future__ import annotations

import itertools
import re
import subprocess
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from child import run_python
from expecttest import assert_expected_inline
from torch import Tensor

import torch_jit_ops
from torch_jit_ops import BuildError, MissingCompiler, OpLibrary, include_of, library_of, load_jit
from torch_jit_ops.ahead import why
from torch_jit_ops.backends import CPU, wheels
from torch_jit_ops.builder import load, unit
from torch_jit_ops.store.search_path import search_path

_numbers = itertools.count()
_ARCH = CPU.arch_of()
_ADD = """
#include <jitk/tensor.h>

namespace linking {
int64_t number();  // defined by who links

inline void add(jitk::TensorView x) {
  jitk::host::TensorMatcher({-1}).with_dtype<int64_t>().verify(x);
  for (int64_t i = 0; i < x.numel(); ++i) static_cast<int64_t*>(x.data_ptr())[i] += number();
}
}  // namespace linking
"""


@pytest.fixture
def csrc(tmp_path: Path) -> Path:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "add.cpp").write_text(_ADD)
    return tmp_path / "csrc"


def library(csrc: Path | None = None, **options: object) -> OpLibrary:
    return OpLibrary(f"linking{next(_numbers)}", csrc=csrc, **options)  # type: ignore[arg-type]


def add(library: OpLibrary, **options: object) -> torch_jit_ops.Op:
    def add(x: Tensor) -> None:
        raise AssertionError("the function ran instead of the kernel")

    return library.op(variant="linking::add", mutates=("x",), **options)(add)  # type: ignore[arg-type]


def added(op: torch_jit_ops.Op) -> int:
    x = torch.zeros(3, dtype=torch.int64)
    op(x)
    assert x[0] == x[2]
    return int(x[0])


def text_of(error: BaseException) -> str:
    text = re.sub(r"linking\d+", "lib", re.sub(r"full log: \S+", "full log: LOG", str(error)))
    return text.replace(_ARCH, "ARCH").translate({0x2018: "'", 0x2019: "'"})  # a compiler's quotes depend on the locale


# --- several sources -------------------------------------------------------------------------------


def test_files_beside_the_first_are_compiled_and_linked(csrc: Path) -> None:
    (csrc / "parts").mkdir()
    (csrc / "number.cpp").write_text(
        "#include <cstdint>\nnamespace linking { int64_t half(); int64_t number() { return 2 * half(); } }"
    )
    (csrc / "parts" / "number.cpp").write_text("#include <cstdint>\nnamespace linking { int64_t half() { return 21; } }")
    op = add(library(csrc), cpu=["add.cpp", "number.cpp", "parts/number.cpp"])
    assert added(op) == 42
    assert op.declaration.kernels["cpu"].source == "add.cpp"
    built = load.load(op.declaration.unit("cpu", (), _ARCH))
    assert not built.compiled or len(list(built.path.parent.glob("*_beside*.cpp"))) == 2


def test_a_file_beside_the_first_is_a_dependency(csrc: Path) -> None:
    (csrc / "number.h").write_text("constexpr int kNumber = 1;")
    (csrc / "number.cpp").write_text(
        '#include <cstdint>\n#include "number.h"\nnamespace linking { int64_t number() { return kNumber; } }'
    )
    assert added(add(library(csrc), cpu=["add.cpp", "number.cpp"])) == 1
    load._results.clear()
    (csrc / "number.h").write_text("constexpr int kNumber = 22;")
    assert added(add(library(csrc), cpu=["add.cpp", "number.cpp"])) == 22


def test_a_symbol_that_no_file_defines(csrc: Path) -> None:
    with pytest.raises(BuildError) as caught:
        added(add(library(csrc), cpu="add.cpp"))
    assert_expected_inline(
        text_of(caught.value),
        """\
lib::linking::add did not link (cpu, ARCH)
  undefined symbol: linking::number()
  full log: LOG
  remedy: name in ldflags the library that has it, or behind the first source the one that defines it""",
    )


# --- libraries -------------------------------------------------------------------------------------

_CRC = """
#include <jitk/tensor.h>
#include <zlib.h>

inline void crc(jitk::TensorView bytes, jitk::TensorView sum) {
  const auto* data = static_cast<const unsigned char*>(bytes.data_ptr());
  *static_cast<int64_t*>(sum.data_ptr()) = static_cast<int64_t>(crc32(0, data, static_cast<uInt>(bytes.numel())));
}
"""
_has_zlib = pytest.mark.skipif(not Path("/usr/include/zlib.h").exists(), reason="zlib's headers are not installed")


@_has_zlib
def test_load_jit_links_a_library() -> None:
    module = load_jit("crc", cpp_sources=[_CRC], cpp_wrappers=[("crc", "crc")], extra_ldflags=["-lz"], mutates={"crc": [1]})
    sum = torch.zeros((), dtype=torch.int64)
    module.crc(torch.arange(100, dtype=torch.uint8), sum)
    assert int(sum) == zlib.crc32(bytes(range(100)))


@_has_zlib
def test_a_library_that_is_not_named() -> None:
    with pytest.raises(BuildError) as caught:
        load_jit("crc", cpp_sources=[_CRC], cpp_wrappers=[("crc", "crc")])
    assert_expected_inline(
        text_of(caught.value),
        """\
crc did not link (cpu, ARCH)
  undefined symbol: crc32
  full log: LOG
  remedy: name in ldflags the library that has it, or behind the first source the one that defines it""",
    )


def test_a_library_that_is_not_there(csrc: Path) -> None:
    with pytest.raises(BuildError) as caught:
        added(add(library(csrc), cpu="add.cpp", ldflags={"cpu": ["-lnumbers_of_nobody"]}))
    assert_expected_inline(
        text_of(caught.value),
        """\
lib::linking::add did not link (cpu, ARCH)
  library not found: -lnumbers_of_nobody
  full log: LOG
  remedy: install it, or name its folder in ldflags, -L/folder and -Wl,-rpath,/folder; for one of a wheel, library_of(...)""",
    )


@pytest.mark.parametrize("named", ["by its path", "by -L and -l"])
def test_a_static_library_is_a_dependency(csrc: Path, tmp_path: Path, named: str) -> None:
    folder = tmp_path / "a folder of $libraries"
    folder.mkdir()

    def archive(number: int) -> None:
        (tmp_path / "number.cpp").write_text(f"namespace linking {{ long number() {{ return {number}; }} }}")
        subprocess.run(["c++", "-fPIC", "-c", "number.cpp", "-o", "number.o"], cwd=tmp_path, check=True)
        subprocess.run(["ar", "rcs", folder / "libnumber.a", "number.o"], cwd=tmp_path, check=True)

    flags = [f"'{folder}/libnumber.a'"] if named == "by its path" else [f"'-L{folder}'", "-lnumber"]
    archive(5)
    assert added(add(library(csrc), cpu="add.cpp", ldflags={"cpu": flags})) == 5
    load._results.clear()
    archive(66)
    assert added(add(library(csrc), cpu="add.cpp", ldflags={"cpu": flags})) == 66


# --- wheels ----------------------------------------------------------------------------------------


def wheel(site: Path, name: str, files: dict[str, str]) -> None:
    """An installed wheel."""
    info = site / f"{name.replace('-', '_')}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    for path, text in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        if text:
            (site / path).write_text(text)
    (info / "RECORD").write_text("".join(f"{path},sha256=x,1\n" for path in files))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    wheels._find.cache_clear()
    return tmp_path / "site"


def test_headers_of_a_wheel(site: Path, csrc: Path) -> None:
    files = {"data/deep/inside/include/lib/lib.h": "#error", "data/include/lib/lib.h": "", "data/include/lib/lib.hpp": "x"}
    wheel(site, "headers-of-mine", files)
    wheel(
        site,
        "more-headers",
        {"more/lib/lib.h": "namespace linking { int64_t number() { return 9; } }", "more/other_lib.h": "x"},
    )
    folder = include_of("lib/lib.h", "not-installed", "more-headers", "headers-of-mine")
    assert folder.folder() == site / "more"
    assert include_of("lib/lib.h", "headers-of-mine").folder() == site / "data/deep/inside/include"  # the other is gone
    assert include_of("other_lib.h", "more-headers").folder() == site / "more"
    (csrc / "use.cpp").write_text('#include "add.cpp"\n#include <lib/lib.h>\n')
    assert added(add(library(csrc), cpu="use.cpp", include={"cpu": [folder]})) == 9
    assert added(add(library(csrc, include=[folder]), cpu="use.cpp")) == 9


def test_headers_that_no_wheel_has(site: Path, csrc: Path) -> None:
    wheel(site, "some-wheel", {"include/my_lib.h": "x", "include/lib.hpp": "x"})
    folder = include_of("lib.h", "nobody-has-this", "some-wheel")
    op = add(library(csrc), cpu="add.cpp", include={"cpu": [folder]})  # can be declared
    with pytest.raises(MissingCompiler) as caught:
        op.declaration.unit("cpu", (), _ARCH).folders()
    assert_expected_inline(
        str(caught.value),
        """\
no installed wheel has the header <lib.h>
  looked in nobody-has-this (not installed), some-wheel 1.2 (has no such file)
  remedy: pip install nobody-has-this, or name its folder in include=""",
    )
    with pytest.raises(RuntimeError, match=r"no installed wheel has the header <lib\.h>"):
        op(torch.zeros(3, dtype=torch.int64))


def test_the_other_kernels_are_built_without_a_wheel(site: Path, csrc: Path) -> None:
    (csrc / "use.cpp").write_text('#include "add.cpp"\nnamespace linking { int64_t number() { return 9; } }')
    without = add(library(csrc), cpu="use.cpp", include={"cpu": [include_of("lib.h", "nobody-has-this")]})
    other = add(library(csrc), cpu="use.cpp")
    with pytest.raises(BuildError) as caught:
        torch_jit_ops.build([without, other], backend="cpu")
    assert_expected_inline(
        text_of(caught.value),
        """\
1 of 4 kernels could not be built
lib::linking::add (cpu ARCH): no installed wheel has the header <lib.h>
  looked in nobody-has-this (not installed)
  remedy: pip install nobody-has-this, or name its folder in include=""",
    )
    assert torch_jit_ops.stats().ops[other.qualified_name].builds == 1


@pytest.mark.parametrize("ask", [lambda: include_of("lib.h"), lambda: include_of("/lib.h", "w"), lambda: library_of("lib.so")])
def test_what_is_no_name_is_refused(ask: object) -> None:
    with pytest.raises(ValueError, match="_of takes a"):
        ask()  # type: ignore[operator]
    for name in ("cublasLt", "libz.so.1", "lib/libz.so"):
        with pytest.raises(ValueError, match="library_of takes a name like"):
            library_of(name, "wheel")


def shared_library(folder: Path, number: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "number.cpp").write_text(f"namespace linking {{ long number() {{ return {number}; }} }}")
    command = ["c++", "-shared", "-fPIC", "number.cpp", "-Wl,-soname,liblinkingnumber.so.3", "-o", "liblinkingnumber.so.3"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "liblinkingnumber.so.3"


def test_a_library_of_a_wheel_is_found_wherever_the_wheel_is(tmp_path: Path, csrc: Path) -> None:
    """Built with the wheel in one environment, the kernel is loaded with that in another, whose folder is elsewhere."""
    code = f"""
import sys, torch
sys.path.insert(0, SITE)
from torch_jit_ops import OpLibrary, library_of, stats
library = OpLibrary("linkingwheel", csrc={str(csrc)!r})
def add(x: torch.Tensor) -> None: raise AssertionError
numbers = library_of("liblinkingnumber.so", "number-of-mine")
op = library.op(cpu="add.cpp", variant="linking::add", mutates=("x",), ldflags={{"cpu": [numbers]}})(add)
x = torch.zeros(3, dtype=torch.int64)
op(x)
print(int(x[0]), [op.builds for name, op in stats().ops.items() if "linkingwheel" in name])
"""
    said = []
    for place in ("one", "two"):
        site = tmp_path / place / "site"
        shared_library(site / "number" / "lib", 7)
        wheel(site, "number-of-mine", {"number/lib/liblinkingnumber.so.3": "", "number/lib/README": "x"})
        said.append(run_python(code.replace("SITE", repr(str(site))), JITK_CACHE_DIR=tmp_path / "cache", JITK_VERBOSE="0"))
        (site / "number").rename(site / "gone")  # what the first built names its folder, and must do without it
    assert said == ["7 [1]\n", "7 [0]\n"]


def test_a_library_that_no_wheel_has(site: Path) -> None:
    wheel(site, "some-wheel", {"lib/libnumber.so.3": ""})
    with pytest.raises(MissingCompiler) as caught:
        library_of("libnumber.so", "some-wheel", "nobody-has-this").flags()
    assert_expected_inline(
        str(caught.value),
        """\
no installed wheel has the library libnumber.so
  looked in some-wheel 1.2 (has no such file), nobody-has-this (not installed)
  remedy: pip install some-wheel, or name its folder in ldflags=""",
    )


# --- texts -----------------------------------------------------------------------------------------


def test_an_op_without_a_file() -> None:
    source = _ADD.replace("int64_t number();", "inline int64_t number() { return 17; }")
    lib = library()
    assert added(add(lib, cpu_source=source)) == 17
    assert re.fullmatch(r"OpLibrary\('linking\d+', csrc=None, 1 ops\)", repr(lib))
    with pytest.raises(ValueError) as caught:
        add(library(), cpu="add.cpp")
    assert_expected_inline(
        text_of(caught.value),
        """lib::add: its cpu source 'add.cpp' is in no folder, as the library has no csrc""",
    )


def test_errors_name_the_line_of_the_text() -> None:
    with pytest.raises(BuildError) as caught:
        added(
            add(
                library(),
                cpu_source="#include <jitk/tensor.h>\n\nnamespace linking {\nvoid add(jitk::TensorView) { nothing(); }\n}",
            )
        )
    assert_expected_inline(
        text_of(caught.value),
        """\
lib::linking::add did not compile (cpu, ARCH)
  add.cpu_source:4: 'nothing' was not declared in this scope
    void add(jitk::TensorView) { nothing(); }
  full log: LOG""",
    )


def test_errors_of_a_text_at_work_name_its_line() -> None:
    op = add(library(), cpu_source=_ADD.replace("int64_t number();", "inline int64_t number() { return 17; }"))
    with pytest.raises(RuntimeError) as caught:
        op(torch.zeros(2, 2, dtype=torch.int64))
    assert text_of(caught.value).endswith("at add.cpu_source:8")


def test_a_function_that_the_text_does_not_have() -> None:
    with pytest.raises(BuildError) as caught:
        added(add(library(), cpu_source="#include <jitk/tensor.h>\nnamespace linking {}"))
    assert_expected_inline(
        re.sub(", as .* has <...>:", ":", text_of(caught.value)),
        """\
lib::linking::add did not compile (cpu, ARCH)
  lib_add.cpp:8: 'add' is not a member of 'linking'
  full log: LOG
  the op needs in add.cpu_source:
    void linking::add(TensorView x)""",
    )


def test_texts_of_load_jit() -> None:
    one = "template <int kBy>\njitk::Tensor same(jitk::TensorView x) { return jitk::host::empty_like(x); }"
    module = load_jit("texts", cpp_sources=["#include <jitk/result.h>", one], cpp_wrappers=[("same", "same<1>")])
    assert module.same(torch.zeros(4)).shape == (4,)
    with pytest.raises(TypeError, match="cpp_sources must be a list of texts, got 'int x;'"):
        load_jit("texts", cpp_sources="int x;", cpp_wrappers=[("same", "same<1>")])
    with pytest.raises(BuildError) as caught:
        load_jit("texts", cpp_sources=["#include <jitk/result.h>", f"{one}\n\nint x = y;"], cpp_wrappers=[("same", "same<1>")])
    assert_expected_inline(
        text_of(caught.value),
        """\
texts did not compile (cpu, ARCH)
  texts.cpp_sources[1]:4: 'y' was not declared in this scope
    int x = y;
  full log: LOG""",
    )


# --- options for an architecture -------------------------------------------------------------------


def test_the_most_specific_key_wins(csrc: Path, tmp_path: Path) -> None:
    (csrc / "add.cu").write_text("")
    flags = {
        "cuda": ["--use_fast_math"],
        "sm_90": ["-DHOPPER"],
        "sm_90a": [],
        "sm_100": ["-DBLACKWELL"],
        "cpu": ["-DCPU"],
        _ARCH: ["-DHERE"],
    }
    folder = {"cuda": [tmp_path], "sm_90": []}
    op = add(
        library(csrc), cuda="add.cu", cpu="add.cpp", flags=flags, include=folder, ldflags={"sm_80": ["-lz"], "cuda": ["-lm"]}
    )

    def of(backend: str, arch: str) -> tuple[object, ...]:
        made: unit.Unit = op.declaration.unit(backend, (), arch)
        return made.flags, len(made.include), made.ldflags

    assert of("cuda", "8.0") == (("--use_fast_math",), 2, ("-lz",))
    assert of("cuda", "9.0") == (("-DHOPPER",), 1, ("-lm",))
    assert of("cuda", "9.0a") == ((), 1, ("-lm",))
    assert of("cuda", "10.0a") == (("-DBLACKWELL",), 2, ("-lm",))
    assert of("cuda", "10.3a") == (("--use_fast_math",), 2, ("-lm",))
    assert of("cpu", _ARCH) == (("-DHERE",), 1, ())
    assert of("cpu", "x86-64") == (("-DCPU",), 1, ())


def test_what_is_linked_is_in_the_key(csrc: Path) -> None:
    (csrc / "more.cpp").write_text("")
    lib = library(csrc)
    options: list[dict[str, object]] = [
        {},
        {"ldflags": {"cpu": ["-lm"]}},
        {"cpu": ["add.cpp", "more.cpp"]},
        {"flags": {"cpu": ["-lineinfo"]}},
    ]
    keys = set()
    for given in options:
        op = add(lib, **{"cpu": "add.cpp", **given})
        keys.add(op.declaration.unit("cpu", (), _ARCH).key())
        lib.ops.clear()
        lib = library(csrc)
    assert len(keys) == len(options)


def test_why_names_what_was_linked_and_what_stood_beside(csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITK_CACHE_DIR", str(tmp_path / "cache"))
    for name, number in (("a_longer_name", 1), ("b", 2)):
        (csrc / f"{name}.cpp").write_text(
            f"#include <cstdint>\nnamespace linking {{ int64_t number() {{ return {number}; }} }}"
        )
    op = add(library(csrc), cpu=["add.cpp", "b.cpp"], ldflags={"cpu": ["-lm"]})
    assert added(op) == 2
    built = op.declaration.unit("cpu", (), _ARCH)

    def differences(of: unit.Unit) -> list[str]:
        finding = why.explain(of, search_path())
        return [f"{each.what}: {each.was} -> {each.now}" for each in finding.differences]

    assert differences(built) == []
    assert differences(replace(built, ldflags=())) == ["flags: -lm -> None"]
    other = replace(built, beside=('#include "a_longer_name.cpp"\n',))
    (difference,) = differences(other)
    assert difference.startswith("translation unit: ") and difference.endswith('#include "a_longer_name.cpp"\n')
