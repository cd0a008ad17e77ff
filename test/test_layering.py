"""What may know what: headers know no PyTorch, kernels no other kernels, Python modules only those below them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from child import ROOT, run_python

PACKAGE = ROOT / "torch_jit_ops"
SOURCES = (".h", ".cuh", ".cu", ".cpp")
# Parts of Python modules, which know Python and nothing of PyTorch.
BINDINGS = {"radix_tree_module.cpp", "radix_tree_calls.h", "radix_tree_ints.h", "radix_tree_result.h"}
# Compiled once, and not for each kernel.
OF_MODULES = {"radix_tree.h", "radix_tree_calls.h", "radix_tree_ints.h", "radix_tree_result.h"}
# Together they cost more to compile than a kernel.
HEAVY = {
    "sstream",
    "iostream",
    "ostream",
    "istream",
    "ranges",
    "format",
    "regex",
    "string",
    "vector",
    "functional",
    "algorithm",
}
HEAVY |= {"stdexcept", "tuple", "map", "unordered_map", "memory", "iomanip", "fstream", "filesystem", "string_view"}

# Lower modules first; a module imports from those above it in this list alone. The root module and the CLI see all of them.
ORDER = [
    ("forks", "registry", "declaring/covering"),
    ("process",),
    (
        "environment",
        "store/forms",
        "declaring/layout",
        "builder/compiler_jobs",
        "declaring/key_rule",
    ),
    ("declaring/signature", "statistics"),
    ("declaring/rows", "features/planned_out"),
    (
        "features/vmap",
        "fallback",
        "declaring/matcher",
        "calling/overlap",
        "progress",
        "features/dtensor",
        "store/files",
        "declaring/variant",
    ),
    ("backends", "declaring/dtypes", "store/digests", "store/lock"),
    ("backends/wheels", "builder/errors", "declaring/samples", "store/dependencies", "store/prune", "store/record"),
    ("store/temporary",),
    ("store/store",),
    ("store/search_path", "store/listing"),
    ("builder/log", "builder/unit", "builder/workarounds"),
    ("builder/compilers", "builder/shared_object", "builder/workers"),
    ("builder/compile",),
    ("builder/load",),
    ("builder/on_demand",),
    ("calling/dispatcher", "manifest", "calling/variant_storm"),
    ("calling/develop",),
    ("declaring/per_target", "declaring/sources"),
    ("declaring/declaration",),
    ("calling/debug", "features/build_while_tracing", "declaring/options", "calling/reference"),
    ("calling/boot", "features/autograd", "features/traced"),
    ("op", "jit_module", "python_module"),
    ("op_library",),
    ("ahead/modules_ahead",),
    ("store/bundle", "testing", "ahead/build_ahead", "ahead/why"),
    ("ahead/deployment",),
    ("ops",),
    ("inductor",),
]


def _includes(path: Path) -> Iterator[str]:
    for line in path.read_text().splitlines():
        found = re.match(r'\s*#\s*include\s*[<"]([^>"]+)[>"]', line)
        if found:
            yield found[1]


def _sources(folder: str) -> list[Path]:
    found = sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in SOURCES)
    assert found, f"no sources in {folder}"
    return found


@pytest.mark.parametrize("path", _sources("include") + _sources("csrc"), ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_runtime_knows_pytorch(path: Path) -> None:
    known = [name for name in _includes(path) if re.match(r"(torch|ATen|c10|caffe2|pybind11|Python\.h)\b", name)]
    assert known == [] or (ROOT / "csrc" / "runtime") in path.parents or path.name in BINDINGS
    assert all(name.startswith("pybind11/") for name in known) or path.name not in BINDINGS


@pytest.mark.parametrize("path", _sources("include"), ids=lambda path: path.name)
def test_headers_include_nothing_heavy(path: Path) -> None:
    assert [name for name in _includes(path) if name in HEAVY] == []


@pytest.mark.parametrize("path", _sources("include"), ids=lambda path: path.name)
def test_headers_are_guarded_and_name_each_other_in_full(path: Path) -> None:
    assert "#pragma once" in path.read_text()
    ours = {header.name for header in _sources("include")}
    assert [name for name in _includes(path) if name in ours] == [], "include it as <jitk/...>"


@pytest.mark.parametrize("path", [p for p in _sources("include") if p.suffix == ".h"], ids=lambda path: path.name)
def test_host_headers_need_no_cuda(path: Path) -> None:
    text = path.read_text()
    outside = re.sub(r"#if defined\(__CUDACC__\).*?#endif", "", text, flags=re.DOTALL)
    assert re.findall(r"#include <(cuda\w*\.h|.*\.cuh)>", outside) == []


@pytest.mark.parametrize("path", sorted((ROOT / "csrc").glob("*.c*")), ids=lambda path: str(path.relative_to(ROOT)))
def test_kernels_do_not_include_kernels(path: Path) -> None:
    """What they share is in a header beside them."""
    assert [name for name in _includes(path) if Path(name).suffix in (".cu", ".cpp")] == []


@pytest.mark.parametrize("path", sorted((ROOT / "csrc").glob("*.*h")), ids=lambda path: path.name)
def test_headers_of_kernels_are_guarded_and_light(path: Path) -> None:
    assert "#pragma once" in path.read_text()
    assert path.name in OF_MODULES or [name for name in _includes(path) if name in HEAVY] == []


@pytest.mark.parametrize("path", sorted((ROOT / "csrc").glob("*.*")), ids=lambda path: path.name)
def test_kernels_include_what_is_beside_them_in_quotes(path: Path) -> None:
    """A library of somebody else may have a header of the same name, and its folder is searched first."""
    text = path.read_text()
    beside = {header.name for header in (ROOT / "csrc").glob("*.*h")}
    assert set(re.findall(r'#\s*include "([^"]+)"', text)) <= beside
    assert beside.isdisjoint(re.findall(r"#\s*include <([^>]+)>", text))


# --- Python ----------------------------------------------------------------------------------------


def _modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py"))


def _imported(path: Path) -> set[str]:
    """Names of this package's modules that ``path`` imports, also inside of functions; those for annotations alone left out."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {_module(name.split(".")[1:]) for name in names if name.startswith("torch_jit_ops.")}
    return found


def _module(parts: Sequence[str]) -> str:
    """What ``ORDER`` calls the module, or the one that holds the name, at ``parts`` below the package."""
    whole = "/".join(parts[:2])
    return whole if any(whole in names for names in ORDER) else parts[0]


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    name = _module(parts)
    if name in ("__init__", "__main__", "cli") or (parts[-1] == "__init__" and name not in ("ops", "inductor", "testing")):
        return
    levels = [level for level, names in enumerate(ORDER) if name in names]
    assert levels, f"{name} has no place in ORDER: say what it may import"
    below = {module for names in ORDER[: levels[0]] for module in names}
    assert _imported(path) - below - {name} <= set(ORDER[levels[0]]) & {"environment"}


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_assert_guards_anything(path: Path) -> None:
    """``python -O`` takes assertions away."""
    assert [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)] == []


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_one_module_reads_the_environment(path: Path) -> None:
    reads = re.findall(r"os\.(?:environ\b|getenv\b)", path.read_text())
    assert reads == [] or path.name in ("environment.py", "new.py")  # new.py holds the text of a test that sets one


def test_the_picture_of_the_house_is_true() -> None:
    """``make house`` draws it anew."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    drawn = run_python("import draw_house; print(draw_house.draw(), end='')", PYTHONPATH=ROOT / "tools")
    assert drawn.startswith("    cli ") and drawn in page


def test_rooms_point_one_way() -> None:
    """A room may stand on modules beside it, such as (an op), whose modules stand on rooms in turn; two rooms never."""
    above = {room: set(line.split()[1:]) for room, line in _drawn()}
    order = list(above)
    for room, below in above.items():
        lower = {each.strip("/") for each in order[order.index(room) + 1 :]}
        assert below - {"(an", "op)", "(ground)", "PyTorch"} <= lower, f"{room} stands on a room above it"


def _drawn() -> list[tuple[str, str]]:
    lines = (ROOT / "CONTRIBUTING.md").read_text().partition("drawn by tools/draw_house.py -->")[2].partition("<!-- end -->")[0]
    found: list[tuple[str, str]] = []
    for line in lines.splitlines():
        if line[4:5].strip():
            found.append((line[4:].split("  ")[0].strip(), ""))
        elif line.strip().startswith("on "):
            found[-1] = (found[-1][0], line.strip())
    return [(room, on) for room, on in found if not room.startswith("(")]


def test_the_import_is_light_and_compiles_nothing(tmp_path: Path) -> None:
    code = """
import sys
import torch
before = set(sys.modules)
events = []
starts = ("subprocess.", "os.fork", "os.exec", "os.posix_spawn", "os.system")
sys.addaudithook(lambda name, args: events.append(name) if name.startswith(starts) else None)
import torch_jit_ops
heavy = {"torch.utils.cpp_extension", "rich", "setuptools"}
heavy |= {"torch._inductor", "torch._dynamo", "torch.distributed.tensor"}
print(sorted(heavy & (set(sys.modules) - before)), events)
"""
    assert run_python(code, JITK_CACHE_DIR=tmp_path / "cache") == "[] []\n"
    assert not (tmp_path / "cache").exists()
