"""The documents: what they show runs, and what they name exists.

In ``README.md`` and ``docs/*.md`` a fenced block whose first line is a comment that holds a path, ``// mylib/csrc/scale.cu``,
is that file, whole. A Python block whose first line is ``# runs`` is a program: those of a document run one after another, each
in a process of its own, in a folder with the document's files. A ``text`` block behind it is what it prints.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import bench.__main__
import torch_jit_ops
from tools import op_tables
from torch_jit_ops.backends import CUDA, MissingCompiler
from torch_jit_ops.builder.unit import Unit, include_dir
from torch_jit_ops.declaring.signature import OUT_FORMS_RETURN

ROOT = Path(__file__).resolve().parent.parent
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [*GUIDES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
EXAMPLES = ROOT / "examples"

_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"(?:#|//) ([\w./-]+\.(?:py|cpp|cuh|cu|h))\n")


@dataclass(frozen=True)
class Block:
    """A fenced block. ``file`` is the path that its first line names, if it names one."""

    language: str
    text: str
    file: str | None

    @property
    def runs(self) -> bool:
        return self.language == "python" and self.text.startswith("# runs\n")


def blocks(document: Path) -> list[Block]:
    found = []
    for language, text in _FENCE.findall(document.read_text()):
        file = _FILE.match(text)
        found.append(Block(language, text, file[1] if file else None))
    return found


def write_files(document: Path, folder: Path) -> None:
    for block in blocks(document):
        if block.file is not None:
            (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.file).write_text(block.text)


def start(folder: Path, cache: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Python with this checkout and ``folder`` in reach."""
    path = os.pathsep.join([str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "JITK_CACHE_DIR": str(cache), "JITK_FALLBACK": "error"}
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False)


def run(folder: Path, cache: Path, *command: str) -> str:
    """What a program prints. Its failure shows all that it said."""
    done = start(folder, cache, *command)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store, shared by the examples: the dispatcher is built once."""
    folder = tmp_path_factory.mktemp("cache")
    folder.chmod(0o700)
    return folder


RUNNING = [document for document in GUIDES if any(block.runs for block in blocks(document))]


@pytest.mark.parametrize("document", RUNNING, ids=lambda d: d.name)
def test_the_examples_run(document: Path, tmp_path: Path, cache: Path) -> None:
    write_files(document, tmp_path)
    shown = blocks(document)
    for number, block in enumerate(shown):
        if not block.runs:
            continue
        program = tmp_path / f"example_{number}.py"
        program.write_text(block.text)
        printed = run(tmp_path, cache, program.name)
        expected = [behind.text for behind in shown[number + 1 : number + 2] if behind.language == "text"]
        assert [printed] == (expected or [""])


# A file of a document, and a function of it to compile: templates that nobody instantiates are hardly checked.
CUDA_FUNCTIONS = [
    ("README.md", "mylib/csrc/scale.cu", "mylib::scale<bf16_t>"),
    ("docs/tutorial.md", "csrc/add_constant.cu", "add_constant<5>"),
    ("docs/tutorial.md", "add_constant_vectors.cuh", "add_constant<5>"),
    ("docs/headers.md", "row_sums.cu", "mylib::row_sums<bf16_t>"),
    ("docs/debugging.md", "examples/debugging/differences.cu", "debugging::differences"),
    ("docs/tutorial.md", "examples/add_constant/add_constant.cuh", "add_constant<5>"),
]


QUOTED = [(guide, block) for guide in GUIDES for block in blocks(guide) if block.file and (ROOT / block.file).exists()]


@pytest.mark.parametrize(("document", "block"), QUOTED, ids=[f"{guide.name}-{block.file}" for guide, block in QUOTED])
def test_a_quoted_file_is_quoted_whole(document: Path, block: Block) -> None:
    assert block.text.partition("\n")[2] == (ROOT / str(block.file)).read_text()


def compile_for_gpu(source: Path, functions: list[str], folder: Path, *include: Path) -> None:
    """Compile without linking, as the build would."""
    try:
        toolkit = CUDA.toolkit()
    except MissingCompiler as missing:
        pytest.skip(str(missing).splitlines()[0])
    exports = [f"JITK_EXPORT(function{number}, {function})" for number, function in enumerate(functions)]
    text = "\n".join(["#include <jitk/export.h>", f'#include "{source}"', "using namespace jitk;", *exports, ""])
    unit = Unit("docs", "docs", CUDA, "9.0a", text)
    (folder / "unit.cu").write_text(text)
    folders = [f"-I{place}" for place in (source.parent, *include, include_dir())]
    halves = ["-D__CUDA_NO_HALF_OPERATORS__", "-D__CUDA_NO_HALF_CONVERSIONS__", "-D__CUDA_NO_HALF2_OPERATORS__"]
    command = [str(toolkit.nvcc), "-c", "unit.cu", "-o", "unit.o", "-Werror", "all-warnings"]
    command += [*unit.compile_flags(), *halves, *folders]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("document", "file", "function"), CUDA_FUNCTIONS, ids=[file for _, file, _ in CUDA_FUNCTIONS])
def test_the_cuda_examples_compile(document: str, file: str, function: str, tmp_path: Path) -> None:
    write_files(ROOT / document, tmp_path)
    compile_for_gpu(tmp_path / file, [function], tmp_path)


def test_the_user_package_passes_its_own_tests(cache: Path) -> None:
    folder = EXAMPLES / "mylib"
    run(folder, cache, "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mylib.py")


@pytest.mark.parametrize("dtype", ["fp16_t", "bf16_t", "fp32_t"])
def test_the_user_package_compiles_for_a_gpu(dtype: str, tmp_path: Path) -> None:
    package = EXAMPLES / "mylib/mylib"
    functions = [f"mylib::scale_shift<{dtype}, {group}>" for group in (1, 3, 64)]
    compile_for_gpu(package / "csrc/scale.cu", functions, tmp_path, package / "include")


def test_the_guides_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    compile_for_gpu(EXAMPLES / "add_constant/add_constant.cuh", ["add_constant<5>", "add_constant<-7>"], tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing only where it is missing")
def test_the_guides_example_explains_itself_without_a_gpu(tmp_path: Path, cache: Path) -> None:
    program = str(EXAMPLES / "add_constant/add_constant.py")
    done = start(tmp_path, cache, program)
    assert done.returncode == 1
    assert done.stderr == (
        "add_constant.py compiles a CUDA kernel and calls it, but PyTorch sees no CUDA device here.\n"
        "The same op with a CPU kernel beside it: torch.ops.jitk.add_constant(src, 5).\n"
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_guides_example_runs(tmp_path: Path, cache: Path) -> None:
    printed = run(tmp_path, cache, str(EXAMPLES / "add_constant/add_constant.py"))
    assert printed == f"eager     {list(range(5, 15))}\ncompiled  {list(range(7, 17))}\n"


def test_every_cuda_example_is_compiled() -> None:
    shown = {(str(guide.relative_to(ROOT)), block.file) for guide in GUIDES for block in blocks(guide) if block.file}
    cuda = {(document, file) for document, file in shown if file.endswith((".cu", ".cuh"))}
    assert cuda == {(document, file) for document, file, _ in CUDA_FUNCTIONS}


@pytest.mark.parametrize("op", torch_jit_ops.library.ops.values(), ids=lambda op: op.name)
def test_every_overload_has_its_schema_in_the_reference(op: torch_jit_ops.Op) -> None:
    text = (ROOT / "docs/ops.md").read_text()
    assert f"## {op.name}\n" in text
    for overload in op.declaration.overloads:
        schema = str(getattr(op.packet, overload or "default")._schema)
        if overload == "out" and not OUT_FORMS_RETURN:  # the document is that of PyTorch 2.13
            outputs = re.findall(r"Tensor\(a\d+!\)", schema)
            schema = schema.replace("-> ()", f"-> {', '.join(outputs)}" if len(outputs) == 1 else f"-> ({', '.join(outputs)})")
        assert f"    {schema}\n" in text, schema


def test_the_reference_has_no_other_ops() -> None:
    named = re.findall(r"^## (\w+)$", (ROOT / "docs/ops.md").read_text(), re.MULTILINE)
    assert named == list(torch_jit_ops.library.ops)


# Both documents are written by `make docs`.
OPS = list(torch_jit_ops.library.ops.values())


def test_the_table_of_the_readme_is_that_of_the_registry() -> None:
    text = (ROOT / "README.md").read_text()
    assert op_tables.readme_with(text, OPS) == text


def test_a_row_of_the_readme_that_says_something_else_is_found() -> None:
    text = (ROOT / "README.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| `layernorm("))
    for other in (row.replace("eps=1e-5", "eps=1e-6"), row.replace(", bias=None", ""), row.replace("fp16, bf16", "bf16")):
        assert other != row
        assert op_tables.readme_with(text.replace(row, other), OPS) == text
    assert op_tables.readme_with(text.replace(f"{row}\n", ""), OPS) == text
    with pytest.raises(ValueError, match=r"the README has 0 tables of ops, expected 1"):
        op_tables.readme_with(text.replace("| op | result |", "| name | result |"), OPS)


@pytest.mark.skipif(not OUT_FORMS_RETURN, reason="the document is that of PyTorch 2.13")
def test_the_reference_is_written_from_the_registry() -> None:
    text = (ROOT / "docs/ops.md").read_text()
    assert op_tables.reference_with(text, OPS) == text
    assert op_tables.reference_with(text.replace("Tensor? bias=None", "Tensor bias"), OPS) == text
    with pytest.raises(ValueError, match=r"docs/ops.md has sections for what is no op: layernorm$"):
        op_tables.reference_with(text, [op for op in OPS if op.name != "layernorm"])


@pytest.mark.skipif(not OUT_FORMS_RETURN, reason="the document is that of PyTorch 2.13")
def test_an_op_without_a_section_gets_one_in_its_place() -> None:
    text = (ROOT / "docs/ops.md").read_text()
    start, end = text.index("## relu2\n"), text.index("## fused_add_relu\n")
    made = op_tables.reference_with(text[:start] + text[end:], OPS)
    assert (made[:start], made[made.index("## fused_add_relu\n") :]) == (text[:start], text[end:])
    assert made[start : made.index("## fused_add_relu\n")] == (
        "## relu2\n\n"
        "    jitk::relu2(Tensor input) -> Tensor\n"
        "    jitk::relu2.out(Tensor input, *, Tensor(a1!) out) -> Tensor(a1!)\n\n"
        "`relu(input) ** 2` (Primer; So et al., arXiv:2109.08668).\n\n"
        "**Args**\n\n* input: any shape, fp16, bf16 or fp32; rows of the last dimension may have any stride.\n\n"
        "**Returns**\n\nThe input's shape, contiguous, of the same dtype; computed in fp32 and rounded once.\n\n"
    )


@pytest.mark.parametrize("document", ["README.md", "docs/cache.md"])
def test_the_environment_variables_are_those_that_are_read(document: str) -> None:
    read = set(re.findall(r"\bJITK_[A-Z_]+", (ROOT / "torch_jit_ops/environment.py").read_text()))
    table = re.findall(r"^\| (`[A-Z_`, ]+) \|", (ROOT / document).read_text(), re.MULTILINE)
    named = {name for cell in table for name in re.findall(r"`(\w+)`", cell)}
    assert {name for name in named if name.startswith("JITK_")} == read
    sources = "".join(file.read_text() for file in (ROOT / "torch_jit_ops").rglob("*.py"))
    assert [name for name in named if f'"{name}"' not in sources] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_what_a_document_names_exists(document: Path) -> None:
    text = document.read_text()
    missing = []
    prose = re.sub(r"^    .*$|`[^`\n]*`", "", _FENCE.sub("", text), flags=re.MULTILINE)
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose):
        if "://" not in link and not (document.parent / link).exists():
            missing.append(link)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    missing += [f"make {name}" for name in re.findall(r"(?:`|^    )make ([a-z-]+)", text, re.MULTILINE) if name not in targets]
    headers = {header.name for header in (ROOT / "include/jitk").iterdir()}
    missing += [f"<jitk/{name}>" for name in re.findall(r"jitk/(\w+\.c?u?h)\b", text) if name not in headers]
    sources = [*ROOT.glob("torch_jit_ops/**/*.py"), *ROOT.glob("include/jitk/*"), *ROOT.glob("csrc/**/*.c*")]
    code = "".join(file.read_text() for file in sources)
    missing += [name for name in re.findall(r"\bJITK_[A-Z][A-Z_]*[A-Z]", text) if name not in code]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_the_bench_commands_are_understood(document: Path) -> None:
    for command in re.findall(r"python -m bench((?: [^\s`]+)+)", document.read_text()):
        bench.__main__.parser().parse_args(command.split())


def test_every_header_has_a_section() -> None:
    named = re.findall(r"^### (\w+\.c?u?h)\b", (ROOT / "docs/headers.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(header.name for header in (ROOT / "include/jitk").iterdir())


def test_the_changelog_knows_this_version() -> None:
    assert re.search(rf"^## \[{re.escape(torch_jit_ops.__version__)}\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_commit_hooks_use_the_formatters_of_the_linter() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    pinned = re.findall(r"^    ([\w-]+) == ([\d.]+)$", (ROOT / "setup.cfg").read_text().partition("\nlint =")[2], re.MULTILINE)
    assert [f"{name}=={version}" for name, version in pinned if f"{name}=={version}" not in hooks] == []
    assert len(pinned) == 2
