"""Ops without Python: the folder that ``deploy`` writes, what a program finds in it, and what it is told it does not find."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import OPS, call, copy_with_storage, last_dtypes, samples_of
from child import ROOT, run_python
from torch import Tensor

import torch_jit_ops
from torch_jit_ops import manifest
from torch_jit_ops.ahead import build_ahead, deployment
from torch_jit_ops.backends import CPU
from torch_jit_ops.cli import main
from torch_jit_ops.declaring.signature import OUT_FORMS_RETURN

EXAMPLE = ROOT / "examples/aot_cpp"
ON_CPU = [op for op in OPS if "cpu" in op.declaration.kernels and op.declaration.samples is not None]


# --- a program without Python -----------------------------------------------------------------------


def compile_program(folder: Path) -> Path:
    """The example's program, with CMake where it is. For a CUDA build PyTorch's CMake files want a whole CUDA toolkit."""
    if shutil.which("cmake") and torch.version.cuda is None:
        prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
        commands = [["cmake", "-S", str(EXAMPLE), "-B", str(folder), prefix], ["cmake", "--build", str(folder)]]
    else:
        torch_folder = Path(torch.__file__).parent
        include = [f"-isystem{torch_folder / 'include'}", f"-isystem{torch_folder / 'include/torch/csrc/api/include'}"]
        names = ["torch", "torch_cpu", "c10", *(["torch_cuda", "c10_cuda"] if torch.version.cuda else []), "dl"]
        link = [f"-L{torch_folder / 'lib'}", f"-Wl,-rpath,{torch_folder / 'lib'}", "-Wl,--no-as-needed"]
        link += [f"-l{name}" for name in names]
        commands = [["c++", "-std=c++20", *include, str(EXAMPLE / "main.cpp"), "-o", str(folder / "main"), *link]]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "main"


def test_the_example_runs_without_python(tmp_path: Path) -> None:
    """By each of the ways that check.py tries; and as PyTorch's documentation has it, with CMake."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    check = [sys.executable, str(EXAMPLE / "check.py"), str(tmp_path)]
    done = subprocess.run(check, env=environment, capture_output=True, text=True, check=False)
    _, relu, eager, *ways = done.stdout.splitlines()
    if "ended with SIG" in relu:  # of PyTorch alone
        pytest.skip(f"PyTorch cannot load a package here\n{done.stdout}")
    assert relu == "relu, PyTorch's loader in Python:   runs, and is right"
    assert done.returncode == 0, done.stdout + done.stderr
    x = torch.arange(32.0).view(2, 16) / 16 + 1
    values = eager.partition(":")[2].split()
    expected = [float(value) for value in values]
    torch.testing.assert_close(torch.tensor(expected), (torch.nn.functional.silu(x[:, :8]) * x[:, 8:]).sum(-1))
    titles = ("PyTorch's loader in C++:   ", "AOTInductor's C interface: ")
    assert ways == [f"the op's model, {title} {' '.join(values)}, as eager" for title in titles]

    program = compile_program(tmp_path)
    command = [str(program), "model.pt2", "kernels/libjitk_ops.so"]
    clean = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.partition(":")[2].split() == values

    for file in (program, *(tmp_path / "kernels").glob("*.so")):
        linked = subprocess.run(["ldd", str(file)], capture_output=True, text=True, check=True).stdout
        assert "python" not in linked.replace(str(Path(torch.__file__).parent), ""), linked

    code = f"""
x = torch.arange(32.0).view(2, 16) / 16
model = torch._inductor.aoti_load_package({str(tmp_path / "model.pt2")!r})
print("python:", *(f"{{value:.5f}}" for value in model(x if not torch.cuda.is_available() else x.cuda()).tolist()))
"""
    assert without_package(tmp_path / "kernels/libjitk_ops.so", code).split() == ["python:", *values]

    # The model asks for what is not there: the call says so, in the text of PyTorch's error.
    table = tmp_path / "kernels/ops.txt"
    table.write_text(table.read_text().replace(f" {FLOAT32} ", f" {FLOAT32 + 1} "))
    done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "jitk::silu_and_mul: there is no kernel for input.dtype=float32 on " in done.stderr


FLOAT32 = 2 << 8 | 32  # DLPack's code and bits


def test_a_crash_of_the_loader_is_told(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("aot_check", EXAMPLE / "check.py")
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)

    def ending(code: str) -> tuple[str, str]:
        return check.said([sys.executable, "-c", f"print('compiled', flush=True)\nimport os, sys\n{code}"], tmp_path)

    assert ending("os.kill(os.getpid(), 11)") == ("compiled\n", "ended with SIGSEGV")
    assert ending("sys.exit('one\\ntwo')") == ("compiled\n", "two")
    assert ending("sys.exit(3)") == ("compiled\n", "exit status 3")
    assert ending("") == ("compiled\n", "")


# --- every op, in a process that has not heard of this package --------------------------------------


def without_package(library: Path, code: str) -> str:
    """What ``code`` prints in a process that knows the ops from ``library`` alone."""
    program = f"""
import sys
import torch
torch.ops.load_library({str(library)!r})
def failure(function, *args):
    try:
        function(*args)
    except RuntimeError as error:
        return str(error)
{code}
assert "torch_jit_ops" not in sys.modules
"""
    return run_python(program)


@pytest.fixture(scope="module")
def every_op(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deployed")
    wanted = [each for op in ON_CPU for each in build_ahead.needed([op], last_dtypes(op).distinct(), backend="cpu")]
    entries = [
        manifest.entry_of(each.op.qualified_name, "cpu", each.op.declaration.kernels["cpu"].pattern, each.values, each.arch)
        for each in wanted
    ]
    lines = [json.dumps({**asdict(entry), "values": dict(entry.values)}) for entry in entries]
    (folder / "run.jsonl").write_text("\n".join(lines))
    return deployment.deploy(folder / "kernels", manifest=folder / "run.jsonl").folder


def test_every_op_is_itself(every_op: Path, tmp_path: Path) -> None:
    calls = []
    for op in ON_CPU:
        for sample in samples_of(op, "cpu", last_dtypes(op)):
            expected = call(op, copy_with_storage(sample))
            written = [argument.written for argument in op.signature.arguments]
            calls.append((op.declaration.namespace, op.name, sample.args, dict(sample.kwargs), written, list(expected.tensors)))
    torch.save(calls, tmp_path / "calls.pt")
    code = f"""
for namespace, name, args, kwargs, written, expected in torch.load({str(tmp_path / "calls.pt")!r}):
    results = getattr(getattr(torch.ops, namespace), name)(*args, **kwargs)
    results = [] if results is None else list(results) if isinstance(results, (tuple, list)) else [results]
    lists = [arg if isinstance(arg, (tuple, list)) else [arg] for arg, is_written in zip(args, written) if is_written]
    results += [tensor for tensors in lists for tensor in tensors if tensor is not None]
    for actual, plain in zip(results, expected, strict=True):
        assert actual.shape == plain.shape, (namespace, name)
        bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (actual, plain)]
        assert torch.equal(*bits), (namespace, name)
    print(namespace, name)
"""
    said = without_package(every_op / deployment.LIBRARY, code)
    assert set(said.splitlines()) == {f"{op.declaration.namespace} {op.name}" for op in ON_CPU}


# --- what is not there ------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One op, one kernel."""
    deployment.deploy(tmp_path / "kernels", ["relu2"], torch.float32, backend="cpu")
    return tmp_path / "kernels"


def shown(text: str, folder: Path) -> list[str]:
    return text.replace(str(folder), "<folder>").replace(CPU.arch_of(), "<cpu>").splitlines()


def test_calls_without_a_kernel(folder: Path) -> None:
    (kernel,) = folder.glob("jitk.relu2*.so")
    table = folder / "ops.txt"
    lines = table.read_text().splitlines()
    (here,) = {line for line in lines if line.startswith("kernel") and " relu2 " in line}  # of both forms
    elsewhere = here.replace(f" {FLOAT32} ", f" {2 << 8 | 16} ").replace(CPU.arch_of(), "x86-64-v9")
    lines.insert(lines.index(here), elsewhere.replace("fp32_t", "fp16_t"))
    table.write_text("\n".join(lines) + "\n")
    code = f"""
import os
print(failure(torch.ops.jitk.relu2, torch.zeros(3).bfloat16()))
print(failure(torch.ops.jitk.relu2, torch.zeros(3).half()))
os.chmod({str(kernel)!r}, 0o666)
print(failure(torch.ops.jitk.relu2, torch.zeros(3)))
os.rename({str(kernel)!r}, {str(kernel)!r} + ".away")
print(failure(torch.ops.jitk.relu2, torch.zeros(3)))
os.rename({str(kernel)!r} + ".away", {str(kernel)!r})
os.environ["JITK_CACHE_TRUST"] = "1"
print(torch.ops.jitk.relu2(torch.arange(-1.0, 3)).tolist())
"""
    rest = [
        "  there is  jitk::relu2<fp16_t> for x86-64-v9",
        "  there is  jitk::relu2<fp32_t> for <cpu>",
        "  remedy: python -m torch_jit_ops deploy, with this kernel too",
    ]
    assert shown(without_package(folder / "libjitk_ops.so", code), folder) == [
        "jitk::relu2: there is no kernel for input.dtype=bfloat16 on <cpu> in <folder>/ops.txt",
        *rest,
        "jitk::relu2: there is no kernel for input.dtype=float16 on <cpu> in <folder>/ops.txt",
        *rest,
        f"jitk::relu2: <folder>/{kernel.name} can be written by others, so it could be anybody's code",
        "  remedy: chmod -R go-w <folder>, or JITK_CACHE_TRUST=1",
        f"jitk::relu2: <folder>/{kernel.name} is not there",
        "[0.0, 0.0, 1.0, 4.0]",
    ]


def stderr_of(*folders: Path, before: str = "") -> list[str]:
    """What loading the libraries, each in a process that has the ones before it, says."""
    code = f"{before}\nimport torch\n" + "".join(
        f"torch.ops.load_library({str(folder / 'libjitk_ops.so')!r})\n" for folder in folders
    )
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    said = done.stderr
    for folder in folders:
        said = said.replace(str(folder), f"<{folder.name}>")
    return [line for line in said.splitlines() if line.startswith(("jitk: ", "  "))]


def test_folders_that_define_nothing(folder: Path) -> None:
    """And a line says why: PyTorch will only say that it does not know the op."""
    cases: dict[str, tuple[Callable[[Path], object], list[str]]] = {
        "open": (
            lambda copy: copy.chmod(0o777),
            [
                "<open> can be written by others, so it could be anybody's code",
                "  remedy: chmod -R go-w <open>, or JITK_CACHE_TRUST=1",
            ],
        ),
        "table": (
            lambda copy: (copy / "ops.txt").chmod(0o664),
            [
                "<table>/ops.txt can be written by others, so it could be anybody's code",
                "  remedy: chmod -R go-w <table>, or JITK_CACHE_TRUST=1",
            ],
        ),
        "gone": (lambda copy: (copy / "ops.txt").unlink(), ["<gone>/ops.txt is not there"]),
        "newer": (
            lambda copy: (copy / "ops.txt").write_text("jitk 2\n"),
            ["<newer>/ops.txt begins with 'jitk 2', expected 'jitk 1'"],
        ),
        "empty": (lambda copy: (copy / "ops.txt").write_text(""), ["<empty>/ops.txt begins with '', expected 'jitk 1'"]),
        "slot": (
            lambda copy: (copy / "ops.txt").write_text("jitk 1\nslot jitk relu2"),
            ["<slot>/ops.txt is cut short: its last line does not end"],
        ),
        "op": (lambda copy: (copy / "ops.txt").write_text("jitk 1\nop jitk\n"), ["<op>/ops.txt:2: SCHEMA is missing"]),
        "pipe": (
            lambda copy: ((copy / "ops.txt").unlink(), os.mkfifo(copy / "ops.txt")),
            ["<pipe>/ops.txt is no regular file"],
        ),
        "zeros": (
            lambda copy: ((copy / "ops.txt").unlink(), (copy / "ops.txt").symlink_to("/dev/zero")),
            ["<zeros>/ops.txt is no regular file"],
        ),
        "long": (lambda copy: os.truncate(copy / "ops.txt", 1 << 40), ["<long>/ops.txt has more than 16 MiB"]),
    }
    expected = []
    for name, (damage, (first, *rest)) in cases.items():
        copy = folder.parent / name
        shutil.copytree(folder, copy)
        damage(copy)
        expected += [f"jitk: no ops are defined: {first}", *rest]
    assert stderr_of(*(folder.parent / name for name in cases)) == expected


# Lines of a table; the fields that are changed, what to, and what is said.
_TABLE = """jitk 1
op lies pick(Tensor x, Tensor? y, *, str how="larger", SymInt n=3, SymInt[] sizes=[1, 2]) -> Tensor
op lies pick.out(Tensor x, *, Tensor(a1!) out) -> Tensor(a1!)
slot lies pick CPU
arg T= x
arg T? y
arg s< how larger,smaller
arg i n
arg l sizes
key 0 dtype 0
key 1 size -1
key 2 value 0
output T out
results 1
asked x.dtype
asked y.shape[-1]
asked how
kernel lies.pick-0.so pick x86-64-v3 544,7,1 lies::pick<fp32_t, 7, smaller>
slot lies pick.out CUDA
arg T x
arg O!> out
results 0
kernel lies.pick-0.so pick 9.0a - lies::pick
"""
_LIES: list[tuple[str, str, str]] = [
    # the kinds of lines and their order
    (
        "asked how\n",
        "asked how\nmalloc 7\n",
        "18: the kind of line is 'malloc', expected op, slot, arg, key, output, results, asked or kernel",
    ),
    (
        "asked how\n",
        "asked how\n\n",
        "18: the kind of line is '', expected op, slot, arg, key, output, results, asked or kernel",
    ),
    ("slot lies pick CPU\n", "", "4: 'arg' stands before any slot"),
    ("results 1\n", "", "14: 'asked' stands before the line 'results'"),
    ("results 1\n", "results 1\nresults 1\n", "15: 'results' is there twice"),
    ("results 1\n", "results 1\nkey 0 dim 0\n", "15: 'key' stands behind a line 'results'"),
    ("asked how\n", "", "18: the slot of lies::pick has 2 lines 'asked' for 3 lines 'key'"),
    (
        "results 0\nkernel lies.pick-0.so pick 9.0a - lies::pick\n",
        "",
        "22: the slot of lies::pick.out is cut short: it has no line 'results'",
    ),
    # op and slot
    ("op lies pick(", "op li/es pick(", "2: NAMESPACE is 'li/es', expected a name"),
    (
        "-> Tensor\n",
        "-> Tensors\n",
        "2: SCHEMA is 'pick(Tensor x, Tensor? y, *, str how=\"larger\", SymInt n=3, S...', expected one as deploy writes it",
    ),
    ("op lies pick.out(", "op lies pick(", "3: lies::pick is there twice"),
    ("slot lies pick CPU", "slot lies pick CPU ", "4: '' stands behind the last field"),
    ("slot lies pick CPU", "slot lies pick cpu", "4: DEVICE is 'cpu', expected CPU or CUDA"),
    ("slot lies pick CPU", "slot lies pick..out CPU", "4: OVERLOAD is 'pick..out', expected a name, or two with a dot between"),
    ("slot lies pick CPU", "slot lies peck CPU", "4: no line 'op' defines lies::peck"),
    ("slot lies pick.out CUDA", "slot lies pick CPU", "19: the slot of lies::pick on CPU is there twice"),
    # the plan, which the schema knows
    ("arg T= x", "arg i= x", "5: KIND is 'i=', expected that of the schema's 'x'"),
    ("arg T= x", "arg T! x", "5: KIND is 'T!', expected that of the schema's 'x'"),
    ("arg T= x", "arg T=? x", "5: KIND is 'T=?', expected that of the schema's 'x'"),
    ("arg O!> out", "arg O! out", "21: KIND is 'O!', expected that of the schema's 'out'"),
    ("arg T? y", "arg T y", "6: KIND is 'T', expected that of the schema's 'y'"),
    ("arg T? y", "arg T? z", "6: NAME is 'z', expected 'y' as in the schema"),
    ("arg T? y\n", "", "6: KIND is 's<', expected that of the schema's 'y'"),
    ("arg i n", "arg i n 1,2", "8: CHOICES is '1,2', expected words of a str with commas between"),
    ("larger,smaller", "larger,,smaller", "7: CHOICES is 'larger,,smaller', expected words of a str with commas between"),
    ("arg l sizes\n", "", "13: the slot has 4 arguments, and the schema 5"),
    ("arg l sizes\n", "arg l sizes\narg l sizes\n", "10: the schema has only 5 arguments"),
    ("key 0 dtype 0", "key 5 dtype 0", "10: ARGUMENT is '5', expected 0 to 4"),
    ("key 0 dtype 0", "key -1 dtype 0", "10: ARGUMENT is '-1', expected 0 to 4"),
    ("key 0 dtype 0", "key 00 dtype 0", "10: ARGUMENT is '00', expected 0 to 4"),
    (
        "key 0 dtype 0",
        "key 0 value 0",
        "10: WHAT is 'value', expected dtype, size or dim of a tensor, or value of an int, a bool or a str with choices",
    ),
    ("key 1 size -1", "key 1 size -1000000", "11: DIM is '-1000000', expected -64 to 64"),
    ("key 1 size -1", "key 1 size 1e0", "11: DIM is '1e0', expected -64 to 64"),
    ("key 2 value 0", "key 2 value", "12: DIM is missing"),
    ("Tensor? y", "Tensor(a1!)[]? y", "6: KIND is 'T?', expected that of the schema's 'y'"),
    ("Tensor(a1!) out", "Tensor(a1!)[] out", "21: KIND is 'O!>', expected that of the schema's 'out'"),
    (
        "Tensor? y",
        "Tensor[](a1!) y",
        "2: SCHEMA is 'pick(Tensor x, Tensor[](a1!) y, *, str how=\"larger\", SymInt ...', expected one as deploy writes it",
    ),
    ("arg s< how", "arg s how", "14: 'how' must be passed or have its value in the key, and not both"),
    ("results 1", "results 2", "14: COUNT is '2', expected 1 as in the schema"),
    ("arg O!> out", "arg L!> out", "21: KIND is 'L!>', expected that of the schema's 'out'"),
    (
        "key 1 size -1",
        "key 1 size -1 pow2,pow3",
        "11: RULES is 'pow2,pow3', expected pow2, div16, min4 or max256 of a size or an int, with commas between",
    ),
    (
        "key 1 size -1",
        "key 1 size -1 div0",
        "11: RULES is 'div0', expected pow2, div16, min4 or max256 of a size or an int, with commas between",
    ),
    (
        "key 2 value 0",
        "key 2 value 0 pow2",
        "12: RULES is 'pow2', expected pow2, div16, min4 or max256 of a size or an int, with commas between",
    ),
    ("output T out\n", "", "13: the slot has 0 lines 'output', and the schema 1 results"),
    ("output T out\n", "output T out\noutput T out\n", "14: the schema has only 1 results"),
    ("output T out", "output T? out", "13: KIND is 'T?', expected T as in the schema"),
    ("output T out", "output L out", "13: KIND is 'L', expected T as in the schema"),
    ("output T out", "output T o/t", "13: NAME is 'o/t', expected a name"),
    # what is asked, and the kernels
    ("asked how", "asked \x1b[2J", "17: PLACEHOLDER is '\\x1b[2J', expected text"),
    (
        "lies.pick-0.so pick x",
        "../lies.pick-0.so pick x",
        "18: FILE is '../lies.pick-0.so', expected the name of a .so file in this folder",
    ),
    (
        "lies.pick-0.so pick x",
        "/tmp/pick.so pick x",
        "18: FILE is '/tmp/pick.so', expected the name of a .so file in this folder",
    ),
    ("lies.pick-0.so pick x", "...so pick x", "18: FILE is '...so', expected the name of a .so file in this folder"),
    ("lies.pick-0.so pick x", "pick.so;sh pick x", "18: FILE is 'pick.so;sh', expected the name of a .so file in this folder"),
    ("so pick x86", "so pick\x00 x86", "18: ENTRY is 'pick\\x00', expected a name"),
    ("x86-64-v3 ", "9.0a ", "18: ARCH is '9.0a', expected x86-64 or the like of x86-64-v3"),
    ("x86-64-v3 ", "x86-64-v ", "18: ARCH is 'x86-64-v', expected x86-64 or the like of x86-64-v3"),
    ("9.0a", "9.0a ", "23: WORDS is '', expected -"),
    ("9.0a", "sm_90", "23: ARCH is 'sm_90', expected the like of 8.0 or 9.0a"),
    ("544,7,1", "544,7", "18: WORDS is '544,7', expected what the key's 3 parts can be"),
    ("544,7,1", "544,7,2", "18: WORDS is '544,7,2', expected what the key's 3 parts can be"),
    ("544,7,1", "65536,7,1", "18: WORDS is '65536,7,1', expected what the key's 3 parts can be"),
    (
        "544,7,1",
        "544,9223372036854775808,1",
        "18: WORDS is '544,9223372036854775808,1', expected what the key's 3 parts can be",
    ),
    ("544,7,1", "-9223372036854775808,7,1", "18: WORDS is '-9223372036854775808,7,1', expected what the key's 3 parts can be"),
    ("544,7,1", "544, 7,1", "18: WORDS is '544,', expected what the key's 3 parts can be"),
    (" lies::pick<fp32_t, 7, smaller>", "", "18: LABEL is missing"),
    ("lies::pick<fp32_t, 7, smaller>", "a" * 70000, "18: the line has 70045 bytes"),
]


def test_tables_that_lie(folder: Path) -> None:
    """Each field of each line; and none of them defines anything before."""
    expected = []
    for number, (field, lie, said) in enumerate(_LIES):
        copy = folder.parent / f"lie{number:02}"
        shutil.copytree(folder, copy)
        assert _TABLE.count(field) >= 1
        (copy / "ops.txt").write_text(_TABLE.replace(field, lie, 1))
        expected.append(f"jitk: no ops are defined: <lie{number:02}>/ops.txt:{said}")
    true = folder.parent / "true"
    shutil.copytree(folder, true)
    (true / "ops.txt").write_text(_TABLE)
    folders = [folder.parent / f"lie{number:02}" for number in range(len(_LIES))]
    assert stderr_of(*folders, true) == expected


def test_a_kernel_that_lies(folder: Path) -> None:
    """Another function than the slot's would read its arguments as something else."""
    (kernel,) = folder.glob("jitk.relu2*.so")
    table = folder / "ops.txt"
    table.write_text(table.read_text().replace(f"{kernel.name} relu2 ", f"{kernel.name} relu3 "))
    code = f"""
print(failure(torch.ops.jitk.relu2, torch.zeros(3)))
import os
os.remove({str(kernel)!r})
os.mkfifo({str(kernel)!r})
print(failure(torch.ops.jitk.relu2, torch.zeros(3)))
"""
    assert shown(without_package(folder / "libjitk_ops.so", code), folder) == [
        f"jitk::relu2: <folder>/{kernel.name}: undefined symbol: jitk_entry_relu3",
        f"jitk::relu2: <folder>/{kernel.name} is no regular file",
    ]


def test_beside_the_package_itself(folder: Path) -> None:
    assert stderr_of(folder, before="import torch_jit_ops")[-2:] == [
        "jitk: no ops are defined: PyTorch refuses to define jitk::relu2(Tensor input) -> Tensor",
        "  an op is defined once in a process: load one such library for all models, and none where Python has imported "
        "torch_jit_ops",
    ]


# --- what is written --------------------------------------------------------------------------------


def test_the_folder(folder: Path) -> None:
    (kernel,) = folder.glob("jitk.relu2*.so")
    isa = CPU.arch_of()
    assert sorted(file.name for file in folder.iterdir()) == sorted([kernel.name, "libjitk_ops.so", "ops.txt"])
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.iterdir())] == [0o755, 0o644, 0o644, 0o644]
    lines = (folder / "ops.txt").read_text().splitlines()
    assert lines[:3] == [
        "jitk 1",
        "op jitk relu2(Tensor input) -> Tensor",
        f"op jitk relu2.out(Tensor input, *, Tensor(a1!) out) -> {'Tensor(a1!)' if OUT_FORMS_RETURN else '()'}",
    ]
    assert [line for line in lines if line.startswith("kernel")] == [
        f"kernel {kernel.name} relu2 {isa} {FLOAT32} jitk::relu2<fp32_t>",
        f"kernel {kernel.name} relu2 {isa} {FLOAT32} jitk::relu2<fp32_t>",
    ]


def test_a_folder_is_replaced_as_a_whole(folder: Path) -> None:
    (folder / "jitk.old-0.so").write_text("")
    made = deployment.deploy(folder, ["relu2"], [torch.float32, torch.bfloat16], backend="cpu")
    assert (made.folder, made.library, made.kernels) == (folder, folder / "libjitk_ops.so", 2)
    assert not (folder / "jitk.old-0.so").exists()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_another_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError) as caught:
        deployment.deploy(tmp_path, ["relu2"], torch.float32, backend="cpu")
    assert str(caught.value) == f"{tmp_path} is there, and is no folder that deploy wrote: name another, or remove it"


def export(function: Callable[..., Any], *args: Tensor, dynamic: dict[int, Any] | None = None) -> torch.export.ExportedProgram:
    class Module(torch.nn.Module):
        def forward(self, *args: Tensor) -> Any:
            return function(*args)

    shapes = (tuple(dynamic for _ in args),) if dynamic else None
    return torch.export.export(Module(), args, dynamic_shapes=shapes)


def labels(program: deployment.Program, arch: str | None = None) -> list[str]:
    return [f"{each.unit().label} {each.arch}" for each in deployment.called_by(program, arch)]


def test_a_program_says_what_it_calls(tmp_path: Path) -> None:
    def run(x: Tensor) -> Tensor:
        y = torch.ops.jitk.relu2(x)
        torch.ops.jitk.silu_and_mul.out(x.bfloat16(), out=torch.empty(2, 8, dtype=torch.bfloat16))
        return torch.ops.jitk.add_constant(torch.cond(x.sum() > 0, torch.ops.jitk.relu2, torch.relu, (y.half(),)).int(), 7)

    program = export(run, torch.randn(2, 16))
    torch.export.save(program, tmp_path / "model.pt2")
    isa = CPU.arch_of()
    expected = {
        f"jitk::relu2<fp32_t> {isa}",
        f"jitk::silu_and_mul<bf16_t> {isa}",
        f"jitk::add_constant<7> {isa}",
        f"jitk::relu2<fp16_t> {isa}",
    }
    assert set(labels(program)) == expected
    assert set(labels(tmp_path / "model.pt2")) == expected


def test_a_program_for_a_gpu() -> None:
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(2, 16, device="cuda")
    program = export(torch.ops.jitk.relu2, x)
    assert labels(program, "9.0a") == ["jitk::relu2<fp32_t> 9.0a"]


def why_not(program: torch.export.ExportedProgram) -> str:
    with pytest.raises(ValueError) as caught:
        labels(program)
    return str(caught.value)


def test_programs_that_cannot_be_served(tmp_path: Path) -> None:
    x = torch.randn(2, 16)
    assert why_not(export(torch.ops.jitk.relu2, x.double())) == (
        "the program's call of jitk::relu2 is in float64, for which the op has no kernel; it has some for "
        "float16, bfloat16, float32"
    )
    with torch._subclasses.FakeTensorMode():
        cuda = torch.empty(2, 16, device="cuda")
    assert why_not(export(torch.ops.userlib.swap, cuda)) == (
        "the program's call of userlib::swap is on cuda, where the op has no kernel; it has some for cpu"
    )
    (tmp_path / "wide.cpp").write_text("")
    library = torch_jit_ops.OpLibrary("deploywide", csrc=tmp_path)

    @library.op(cpu="wide.cpp", variant="wide<{x.shape[-1]}>")
    def wide(x: Tensor) -> Tensor:
        return x + 1

    try:
        assert why_not(export(wide.default, x, dynamic={1: torch.export.Dim("width")})) == (
            "the program's call of deploywide::wide leaves open what picks its kernel (x.shape[-1]): export it with these "
            "sizes static, or name the op and the values instead of the program"
        )
    finally:
        torch_jit_ops.registry.remove(library)


# --- the command ------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.export.save(export(torch.ops.jitk.relu2, torch.randn(3)), tmp_path / "model.pt2")
    folder = tmp_path / "kernels"
    assert main.main(["deploy", str(folder), "--program", str(tmp_path / "model.pt2"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {name: said[name] for name in ("folder", "library", "kernels")} == {
        "folder": str(folder),
        "library": str(folder / "libjitk_ops.so"),
        "kernels": 1,
    }
    arguments = ["deploy", str(folder), "silu_and_mul", "--dtype", "float32", "--backend", "cpu"]
    assert main.main([*arguments, "--program", str(tmp_path / "model.pt2")]) == 0
    assert capsys.readouterr().out.startswith("2 kernels, ")


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--program", "away.pt2"], 1, "error: [Errno 2] No such file or directory: 'away.pt2'\n"),
        (["reluu2"], 2, "error: there is no op 'reluu2'; did you mean 'relu2'?\n"),
        (
            ["--manifest", "run.jsonl", "--dtype", "float32"],
            2,
            "error: --dtype and --set go with ops; --program and --manifest say them themselves\n",
        ),
    ],
)
def test_a_wrong_usage(arguments: list[str], code: int, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["deploy", str(tmp_path / "kernels"), *arguments]) == code
    assert capsys.readouterr().err == text
    assert list(tmp_path.iterdir()) == []
