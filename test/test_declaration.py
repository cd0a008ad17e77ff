"""Declaring ops: the schemas that come of signatures, and what is refused with which words."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

import torch_jit_ops
from torch_jit_ops import Op, OpLibrary, Rows, libraries
from torch_jit_ops.declaring.signature import OUT_FORMS_RETURN

_numbers = itertools.count()
# The ends of several messages.
FORM = (
    "it must be a shape, a dtype if it matters, and a layout if it is not contiguous, such as "
    "'[tokens..., 2*d] rows', '[hidden] weight.dtype' or '[3, *] float16|bfloat16 strides [*, 1]'"
)
_SUPPORTED = (
    "Tensor, int, float, bool, str, Literal of strings, torch.dtype, torch.device, list[int], list[float], list[Tensor], "
    "and each of them | None"
)
_RESULTS = "Tensor, Tensor | None, list[Tensor], a tuple of them, or None"


@pytest.fixture
def csrc(tmp_path: Path) -> Path:
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "kernels.cpp").write_text("")
    (folder / "kernels.cu").write_text("")
    return folder


@pytest.fixture
def library(csrc: Path) -> OpLibrary:
    return OpLibrary(f"declared{next(_numbers)}", csrc=csrc)


def declare(library: OpLibrary, function: Callable[..., Any], **options: Any) -> Op:
    return library.op(**{"cpu": "kernels.cpp", "variant": "kernel", **options})(function)


def words(caught: pytest.ExceptionInfo[BaseException], csrc: Path) -> str:
    text = str(caught.value).replace(str(csrc), "CSRC").replace(__file__, "FILE")
    text = re.sub(r"declared\d+", "lib", text).replace(f"{__name__}.", "")
    return re.sub(r"test_\w+\.<locals>\.", "", text).replace(_SUPPORTED, "SUPPORTED").replace(_RESULTS, "RESULTS")


# --- schemas ---------------------------------------------------------------------------------------


def schemas(op: Op) -> str:
    """With RETURNED for what the out form returns: its outputs from PyTorch 2.13, and nothing before."""
    texts = [str(op.default._schema)]
    if op.declaration.outputs:
        arguments, _, returned = str(op.out._schema).partition(" -> ")
        outputs = [f"Tensor({re.search(rf'(a[0-9]+!). {name}', arguments)[1]})" for name in op.declaration.outputs]
        outputs = outputs if OUT_FORMS_RETURN else []
        assert returned == (outputs[0] if len(outputs) == 1 else f"({', '.join(outputs)})")
        texts.append(f"{arguments} -> RETURNED")
    return "\n".join(re.sub(r"^declared\d+::", "", text).replace(", *, ", ",\n  *, ") for text in texts)


def test_schema_of_every_kind_of_argument(library: OpLibrary) -> None:
    def op(
        x: Tensor,
        maybe: Tensor | None,
        n: int,
        factor: float,
        flag: bool,
        order: Literal["up", "down"],
        text: str,
        sizes: list[int],
        tail: Sequence[int] = (1, 2),
        *,
        limit: int | None = None,
        scale: float | None = 0.5,
        on: bool = True,
        word: str = "word",
        more: list[int] | None = None,
    ) -> Tensor:
        return x

    assert_expected_inline(
        schemas(declare(library, op)),
        """\
op(Tensor x, Tensor? maybe, SymInt n, float factor, bool flag, str order, str text, SymInt[] sizes, SymInt[] tail=[1, 2],
  *, SymInt? limit=None, float? scale=0.5, bool on=True, str word="word", SymInt[]? more=None) -> Tensor
op.out(Tensor x, Tensor? maybe, SymInt n, float factor, bool flag, str order, str text, SymInt[] sizes, SymInt[] tail=[1, 2],
  *, SymInt? limit=None, float? scale=0.5, bool on=True, str word="word", SymInt[]? more=None, Tensor(a14!) out) -> RETURNED""",
    )


def test_schema_of_written_arguments(library: OpLibrary) -> None:
    def op(x: Tensor, y: Tensor, weight: Tensor) -> None:
        pass

    assert_expected_inline(
        schemas(declare(library, op, mutates=("x", "y"))), """op(Tensor(a0!) x, Tensor(a1!) y, Tensor weight) -> ()"""
    )


def test_schema_of_written_arguments_and_a_result(library: OpLibrary) -> None:
    def op(x: Tensor, y: Tensor | None = None) -> Tensor:
        return x.clone()

    assert_expected_inline(
        schemas(declare(library, op, mutates=("x", "y"))), """op(Tensor(a0!) x, Tensor(a1!)? y=None) -> Tensor"""
    )


def test_schema_of_several_results(library: OpLibrary) -> None:
    def op(x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x

    assert_expected_inline(
        schemas(declare(library, op, outputs=("out", "scale"))),
        """\
op(Tensor x) -> (Tensor, Tensor)
op.out(Tensor x,
  *, Tensor(a1!) out, Tensor(a2!) scale) -> RETURNED""",
    )


def test_schema_of_postponed_and_evaluated_annotations_is_the_same(library: OpLibrary) -> None:
    scope: dict[str, Any] = {"Tensor": Tensor}
    exec(compile("def op(x: Tensor, n: int) -> Tensor: return x", __file__, "exec", dont_inherit=True), scope)
    assert scope["op"].__annotations__["n"] is int
    assert schemas(declare(library, scope["op"])) == "op(Tensor x, SymInt n) -> Tensor\nop.out(" + (
        "Tensor x, SymInt n,\n  *, Tensor(a2!) out) -> RETURNED"
    )


def test_the_decorated_function_is_the_op(library: OpLibrary) -> None:
    def scale(x: Tensor, factor: float = 2.0) -> Tensor:
        """Scale."""
        return x * factor

    op = declare(library, scale)
    assert isinstance(op, Op)
    assert op.reference is scale
    assert op.__doc__ == "Scale."
    assert op.__name__ == "scale"
    assert inspect.signature(op) == inspect.signature(scale)
    assert op.packet is getattr(torch.ops, library.namespace).scale
    assert library.ops == {"scale": op}
    assert library in libraries()
    assert re.fullmatch(r"<op declared\d+::scale, kernels for cpu>", repr(op))


def test_an_op_without_a_kernel_runs_its_reference(library: OpLibrary) -> None:
    def plus_one(x: Tensor) -> Tensor:
        return x + 1

    op = declare(library, plus_one, cpu=None, variant=None)
    assert op(torch.zeros(2)).tolist() == [1, 1]
    out = torch.zeros(2)
    op.out(torch.ones(2), out=out)
    assert out.tolist() == [2, 2]


def test_a_fake_and_a_derivative_of_its_own(library: OpLibrary) -> None:
    calls = []

    def double(x: Tensor) -> Tensor:
        return torch.from_numpy(2 * x.detach().numpy())

    def fake(x: Tensor) -> Tensor:
        calls.append("fake")
        return x.new_empty(x.shape)

    def backward(grad: Tensor, x: Tensor) -> Tensor:
        calls.append("backward")
        return 2 * grad

    op = declare(library, double, cpu=None, variant=None, fake=fake, backward=backward)
    x = torch.ones(3, requires_grad=True)
    torch.compile(lambda x: op(x).sum(), fullgraph=True, backend="aot_eager")(x).backward()
    assert x.grad.tolist() == [2, 2, 2]
    assert set(calls) == {"fake", "backward"}


# --- what is refused -------------------------------------------------------------------------------


def test_a_namespace_that_is_no_identifier(csrc: Path) -> None:
    with pytest.raises(ValueError) as caught:
        OpLibrary("my-lib", csrc=csrc)
    assert_expected_inline(words(caught, csrc), """the namespace 'my-lib' must be an identifier""")


def test_a_folder_that_does_not_exist(csrc: Path) -> None:
    for folders in ({"csrc": csrc / "gone"}, {"csrc": csrc, "include": [csrc / "gone"]}):
        with pytest.raises(ValueError) as caught:
            OpLibrary("gone", **folders)
    assert_expected_inline(words(caught, csrc), """OpLibrary('gone'): the folder CSRC/gone does not exist""")
    assert "gone" not in [library.namespace for library in libraries()]


def test_a_name_that_is_taken(library: OpLibrary, csrc: Path) -> None:
    def op(x: Tensor) -> Tensor:
        return x

    declare(library, op)
    with pytest.raises(ValueError) as caught:
        declare(library, op)
    assert_expected_inline(
        words(caught, csrc),
        """\
lib::op is declared twice; the first is in FILE
  remedy: another name; or, to replace the first, JITK_DEVELOP=1 or library.develop()""",
    )


def test_a_name_that_another_library_has_taken(library: OpLibrary, csrc: Path) -> None:
    def op(x: Tensor) -> Tensor:
        return x

    declare(library, op)
    with pytest.raises(ValueError) as caught:
        declare(OpLibrary(library.namespace, csrc=csrc), op)
    assert_expected_inline(
        words(caught, csrc),
        """\
lib::op is declared twice; the first is in FILE
  remedy: another name; or, to replace the first, JITK_DEVELOP=1 or library.develop()""",
    )


@pytest.mark.parametrize(("backend", "suffix"), [("cpu", "cpp"), ("cuda", "cu")])
def test_a_source_that_is_missing(library: OpLibrary, csrc: Path, backend: str, suffix: str) -> None:
    def op(x: Tensor) -> Tensor:
        return x

    with pytest.raises(ValueError) as caught:
        declare(library, op, **{backend: f"gone.{suffix}"})
    assert words(caught, csrc) == f"lib::op: its {backend} source 'gone.{suffix}' is not in CSRC"


def test_options_that_cannot_work(library: OpLibrary, csrc: Path) -> None:
    def op(x: Tensor) -> Tensor:
        return x

    texts = []
    for options in (
        {"cpu": None},
        {"variant": None},
        {"cpu": "kernels.cu"},
        {"cuda": "kernels.cpp"},
        {"flags": {"gpu": ["-O2"]}},
        {"flags": ["-O2"]},
        {"flags": {"cpu": "-O2"}},
        {"flags": {"cpu": [2]}},
        {"flags": {"cuda": ["-O2"]}},
        {"flags": {"cpu": ["-O2", "-lm"]}},
        {"flags": {"cpu": ["-Wl,--as-needed"]}},
        {"flags": {"sm_90x": ["-O2"]}},
        {"flags": {"sm_90a": ["-O2"]}},
        {"ldflags": {"gpu": ["-lz"]}},
        {"ldflags": {"cpu": "-lz"}},
        {"ldflags": {"cuda": ["-lz"]}},
        {"ldflags": {"cpu": ["-L../lib"]}},
        {"ldflags": {"cpu": ["libz.a"]}},
        {"ldflags": {"cpu": ["-l'z"]}},
        {"include": {"cpu": "headers"}},
        {"include": {"cpu": ["/nowhere"]}},
        {"cpu": ["kernels.cpp", "kernels.cpp"]},
        {"cpu": ["kernels.cpp", "gone.cpp"]},
        {"cpu": ["kernels.cpp", "kernels.cu"]},
        {"cpu": []},
        {"cpu": 3},
        {"cpu_source": "int x;"},
        {"cuda_source": " "},
        {"variant": {"cpu": "kernel", "gpu": "kernel"}},
        {"variant": 3},
        {"mutates": "x"},
        {"outputs": "out"},
        {"rows": "x"},
        {"rows": {"x"}},
        {"rows": (0,)},
        {"dtypes": torch.float32},
        {"dtypes": "float32"},
        {"dtypes": ["float32"]},
        {"dtypes": [torch.complex64]},
    ):
        with pytest.raises((TypeError, ValueError)) as caught:
            declare(library, op, **options)
        texts.append(f"{caught.type.__name__} {words(caught, csrc)}")
    assert_expected_inline(
        re.sub("those that have one are .*", "those ...", "\n".join(texts)),
        """\
ValueError lib::op has a variant, but no kernel: name its source with cuda= or cpu=, or no variant, and the op is its function
ValueError lib::op has a source, but no variant: name its C++ function, such as 'op<{x.dtype}>'
ValueError lib::op: its cpu source 'kernels.cu' must be a .cpp or .cc or .cxx file
ValueError lib::op: its cuda source 'kernels.cpp' must be a .cu file
ValueError lib::op: flags names 'gpu'; there are the backends cuda, cpu and architectures such as sm_90, sm_90a and x86-64-v3
TypeError lib::op: flags must be a mapping from backends, such as {'cuda': ...}, got ['-O2']
TypeError lib::op: flags of cpu must be a list of str, got '-O2'
TypeError lib::op: flags of cpu must be a list of str, got [2]
ValueError lib::op: flags names 'cuda', but there is no cuda source
ValueError lib::op: the flag '-lm' is for linking, and flags are for compiling: name it in ldflags
ValueError lib::op: the flag '-Wl,--as-needed' is for linking, and flags are for compiling: name it in ldflags
ValueError lib::op: flags names 'sm_90x'; there are the backends cuda, cpu and architectures such as sm_90, sm_90a and x86-64-v3
ValueError lib::op: flags names 'sm_90a', but there is no cuda source
ValueError lib::op: ldflags names 'gpu'; there are the backends cuda, cpu and architectures such as sm_90, sm_90a and x86-64-v3
TypeError lib::op: ldflags of cpu must be a list of str or library_of(...), got '-lz'
ValueError lib::op: ldflags names 'cuda', but there is no cuda source
ValueError lib::op: the linker's flag '-L../lib' names no path from /, and kernels are linked in another folder
ValueError lib::op: the linker's flag 'libz.a' names no path from /, and kernels are linked in another folder
ValueError lib::op: the linker's flag "-l'z" cannot be passed on: No closing quotation
TypeError lib::op: include of cpu must be a list of folders, got 'headers'
ValueError lib::op: include of cpu: the folder /nowhere does not exist
ValueError lib::op: cpu names 'kernels.cpp' twice
ValueError lib::op: its cpu source 'gone.cpp' is not in CSRC
ValueError lib::op: its cpu source 'kernels.cu' must be a .cpp or .cc or .cxx file
TypeError lib::op: cpu must be a file or a list of files, got []
TypeError lib::op: cpu must be a file or a list of files, got 3
ValueError lib::op has both cpu= and cpu_source=: its function can be in one of them alone
TypeError lib::op: cuda_source must be the text of a source, got ' '
ValueError lib::op: variant names the backend 'gpu'; there are cuda, cpu
TypeError lib::op: variant must be a mapping from backends, such as {'cuda': ...}, got 3
TypeError lib::op: mutates must be a list, got 'x'
TypeError lib::op: outputs must be a list, got 'out'
TypeError lib::op: rows must be a list, got 'x'
TypeError lib::op: rows must be a list, got {'x'}
TypeError lib::op: rows must hold names, got 0
TypeError lib::op: dtypes must be a list, got torch.float32
TypeError lib::op: dtypes must be a list, got 'float32'
TypeError lib::op: dtypes must hold dtypes of torch, got 'float32'
ValueError lib::op: dtypes: torch.complex64 has no C++ type in kernels; those ...""",
    )
    assert declare(library, op, cuda="kernels.cu", flags={"cuda": ["-lineinfo"]}).declaration.kernels.keys() == {"cpu", "cuda"}


@pytest.mark.parametrize("namespace", ["aten", "prims", "torch", "_C", "load_library", "jitk", "class", "lambda"])
def test_a_namespace_that_is_taken(csrc: Path, namespace: str) -> None:
    with pytest.raises(ValueError) as caught:
        OpLibrary(namespace, csrc=csrc)
    taken = "is taken: choose one of your own, such as your package's name"
    keyword = "must be an identifier"
    assert str(caught.value) == f"the namespace {namespace!r} {keyword if namespace in ('class', 'lambda') else taken}"


def test_include_is_a_list(csrc: Path) -> None:
    with pytest.raises(TypeError) as caught:
        OpLibrary("included", csrc=csrc, include=str(csrc))
    assert_expected_inline(words(caught, csrc), """OpLibrary('included'): include must be a list of folders, got 'CSRC'""")


def test_functions_that_are_not_in_the_source(library: OpLibrary, csrc: Path) -> None:
    """The functions that are wanted are shown as C++, whatever the compiler says."""

    def op(x: Tensor, n: int, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.clone(), x.clone()

    one = declare(library, op, variant="mylib::op<{x.dtype}>", outputs=("out", "scale"))
    texts = set()
    for source in (
        "",
        "namespace mylib { void op(jitk::TensorView x, jitk::Output& out) { out.empty_like(x); } }",
        "namespace other { template <typename T> void op(jitk::TensorView x, jitk::Output& out) { out.empty_like(x); } }",
        "namespace mylib { template <typename T> int op(jitk::TensorView x) { return 1; } }",
    ):
        (csrc / "kernels.cpp").write_text(f"#include <jitk/result.h>\n{source}")
        with pytest.raises(RuntimeError) as caught:
            one(torch.ones(3), 1)
        text = words(caught, csrc)
        assert "did not compile" in text
        texts.add(text[text.index("  the op needs") :])
    assert_expected_inline(
        "\n".join(texts),
        """\
  the op needs in kernels.cpp, as a template where its name has <...>:
    void mylib::op<fp32_t>(TensorView x, int64_t n, std::optional<TensorView> y, Output& out, Output& scale)""",
    )


def test_placeholders_that_mean_nothing(library: OpLibrary, csrc: Path) -> None:
    def op(x: Tensor, n: int, factor: float, text: str) -> Tensor:
        return x

    texts = []
    for variant in (
        "op<{y.dtype}>",
        "op<{x}>",
        "op<{x.device}>",
        "op<{x.shape}>",
        "op<{x.shape[last]}>",
        "op<{factor}>",
        "op<{text}>",
        "op<{n.dtype}>",
        "op<{}>",
        "op<{x.dtype}",
        "op({x.dtype})",
        "1op",
        "",
    ):
        with pytest.raises(ValueError) as caught:
            declare(library, op, variant=variant)
        texts.append(words(caught, csrc))
    assert_expected_inline(
        "\n".join(texts),
        """\
lib::op: the variant's placeholder {y.dtype} names no argument; they are x, n, factor, text
lib::op: of a tensor a variant can use {x.dtype}, {x.shape[i]} and {x.dim}, not {x}
lib::op: of a tensor a variant can use {x.dtype}, {x.shape[i]} and {x.dim}, not {x.device}
lib::op: of a tensor a variant can use {x.dtype}, {x.shape[i]} and {x.dim}, not {x.shape}
lib::op: of a tensor a variant can use {x.dtype}, {x.shape[i]} and {x.dim}, not {x.shape[last]}
lib::op: the variant's placeholder {factor} must be a tensor's property, an int, a bool, a dtype, or a str with Literal choices
lib::op: the variant's placeholder {text} must be a tensor's property, an int, a bool, a dtype, or a str with Literal choices
lib::op: the variant's placeholder {n.dtype} must be a tensor's property, an int, a bool, a dtype, or a str with Literal choices
lib::op: the variant's placeholder {} names no argument; they are x, n, factor, text
lib::op: the variant 'op<{x.dtype}' must be a C++ function, such as 'norm<{input.dtype}>'
lib::op: the variant 'op({x.dtype})' must be a C++ function, such as 'norm<{input.dtype}>'
lib::op: the variant '1op' must be a C++ function, such as 'norm<{input.dtype}>'
lib::op: the variant '' must be a C++ function, such as 'norm<{input.dtype}>'""",
    )


def test_a_variant_for_each_backend(library: OpLibrary, csrc: Path) -> None:
    def op(x: Tensor) -> Tensor:
        return x

    with pytest.raises(ValueError) as caught:
        declare(library, op, variant={"cuda": "op"})
    assert_expected_inline(words(caught, csrc), """lib::op has a cpu source, but variant names only cuda""")
    declare(library, op, variant={"cuda": "op_cuda<{x.dtype}>", "cpu": "op_cpu"})
    patterns = {backend: kernel.pattern.text for backend, kernel in library.ops["op"].declaration.kernels.items()}
    assert patterns == {"cpu": "op_cpu"}


def test_signatures_that_cannot_be_schemas(library: OpLibrary, csrc: Path) -> None:
    def no_annotation(x: Tensor, n) -> Tensor:  # type: ignore[no-untyped-def]
        return x

    def no_result(x: Tensor):  # type: ignore[no-untyped-def]
        return x

    def positional(x: Tensor, *rest: Tensor) -> Tensor:
        return x

    def keywords(x: Tensor, **rest: Tensor) -> Tensor:
        return x

    def mapping(x: Tensor, where: dict[str, int]) -> Tensor:
        return x

    def lists(x: list[list[Tensor]]) -> Tensor:
        return x[0][0]

    def union(x: Tensor, n: int | float) -> Tensor:
        return x

    def choices(x: Tensor, n: Literal[1, 2]) -> Tensor:
        return x

    def words_with_spaces(x: Tensor, how: Literal["as is"]) -> Tensor:
        return x

    def number(x: Tensor) -> int:
        return 1

    def numbers(x: Tensor) -> list[int]:
        return [1]

    def optional_list(x: Tensor) -> list[Tensor] | None:
        return [x]

    def some(x: Tensor) -> tuple[Tensor, ...]:
        return (x,)

    def undefined(x: Nowhere) -> Tensor:  # type: ignore[name-defined]  # noqa: F821
        return x

    def mode(x: Tensor, mode: str) -> Tensor:
        return x

    functions = [no_annotation, no_result, positional, keywords, mapping, lists, union, choices, words_with_spaces]
    functions += [number, numbers, optional_list, some, undefined, mode]
    texts = []
    for function in functions:
        with pytest.raises((TypeError, ValueError)) as caught:
            declare(library, function)
        texts.append(
            f"{type(caught.value).__name__} {words(caught, csrc)}".replace("; ", ";\n  ").replace("op that", "op\n  that")
        )
        assert function.__name__ not in library.ops
    assert_expected_inline(
        "\n".join(texts),
        """\
TypeError no_annotation: argument 'n' needs a type annotation: SUPPORTED
TypeError no_result: the return type needs an annotation: RESULTS
TypeError positional: '*rest' cannot be part of a schema;
  list the arguments
TypeError keywords: '*rest' cannot be part of a schema;
  list the arguments
TypeError mapping: argument 'where' is annotated dict[str, int];
  a schema can hold SUPPORTED
TypeError lists: argument 'x' is annotated list[list[torch.Tensor]];
  a schema can hold SUPPORTED
TypeError union: argument 'n' is annotated int | float, which would be a Scalar;
  the stable ABI of PyTorch carries none: annotate it float, or int
TypeError choices: argument 'n' is annotated typing.Literal[1, 2];
  a schema can hold SUPPORTED
TypeError words_with_spaces: argument 'how': the choice 'as is' must be an identifier
TypeError number: returns <class 'int'>;
  an op returns RESULTS
TypeError numbers: returns list[int];
  an op returns RESULTS
TypeError optional_list: returns list[torch.Tensor] | None;
  a list is empty where there is nothing, and not None
TypeError some: returns tuple[torch.Tensor, ...];
  an op returns RESULTS
TypeError undefined: an annotation names 'Nowhere', which its module does not define at run time
ValueError mode: an argument cannot be called 'mode': torch.compile passes arguments of an op
  that writes by name, next to one of its own of that name""",
    )


def test_mutates_that_names_no_tensor(library: OpLibrary, csrc: Path) -> None:
    def op(x: Tensor, n: int) -> None:
        pass

    texts = []
    for mutates in (("y",), ("n",)):
        with pytest.raises(ValueError) as caught:
            declare(library, op, mutates=mutates)
        texts.append(words(caught, csrc))
    assert_expected_inline(
        "\n".join(texts),
        """\
op: mutates names 'y'; its tensor arguments are x
op: mutates names 'n'; its tensor arguments are x""",
    )


def test_rows_that_are_no_lists_of_names() -> None:
    texts = []
    for arguments, options in ((("x",), {"sums": "out"}), (("x",), {"per_token": {"y"}}), ((0,), {}), (("x",), {"sums": (1,)})):
        with pytest.raises(TypeError) as caught:
            Rows(*arguments, **options)
        texts.append(str(caught.value))
    assert_expected_inline(
        "\n".join(texts),
        """\
Rows: sums must be a list, got 'out'
Rows: per_token must be a list, got {'y'}
Rows: arguments must hold names, got 0
Rows: sums must hold names, got 1""",
    )


def test_rows_that_mean_nothing(library: OpLibrary, csrc: Path) -> None:
    def op(x: Tensor, n: int) -> Tensor:
        return x

    def accumulate(total: Tensor, x: Tensor) -> None:
        total.add_(x)

    texts = []
    for function, options in (
        (op, {"rows": ("y",)}),
        (op, {"rows": ("n",)}),
        (accumulate, {"rows": ("x",), "mutates": ("total",)}),
        (op, {"rows": Rows("x", sums=("x",))}),
        (accumulate, {"rows": Rows("x", "total", sums=("total",)), "mutates": ("total",)}),
        (op, {"rows": Rows(sums=("out",))}),
        (op, {"rows": Rows(elementwise=True)}),
        (op, {"rows": Rows(per_token=("x",))}),
        (op, {"rows": Rows("x", per_token=("n",))}),
        (op, {"rows": Rows("x", per_token=("x",))}),
    ):
        with pytest.raises(ValueError) as caught:
            declare(library, function, **options)
        texts.append(words(caught, csrc))
    assert_expected_inline(
        "\n".join(texts),
        """\
lib::op: rows names 'y'; its tensor arguments are x
lib::op: rows names 'n'; its tensor arguments are x
lib::accumulate: rows must name 'total', too: the op writes it
lib::op: sums names 'x'; the out form's arguments are out
lib::accumulate: sums names 'total'; the out form's arguments are none
lib::op: sums is about rows, but rows names none
lib::op: elementwise is about rows, but rows names none
lib::op: per_token is about rows, but rows names none
lib::op: per_token names 'n'; its tensor arguments are x
lib::op: 'x' is among the rows and per_token; it can be one of them""",
    )


def test_tensors_that_mean_nothing(library: OpLibrary, csrc: Path) -> None:
    def op(x: Tensor, n: int, y: Tensor) -> Tensor:
        return x

    texts = []
    for tensors in (
        {"z": "[n]"},
        {"n": "[n]"},
        {"x": "n"},
        {"x": "[2*3]"},
        {"x": "[hidden, tokens...]"},
        {"x": "[n]  float32"},
        {"x": "[n] float31"},
        {"x": "[n] float32|y"},
        {"x": "[n] y.dtype"},
        {"y": "[n] n.dtype"},
        {"out": "[n] z.dtype"},
        {"x": "[n] rows float32"},
        {"x": "[n] float32 row"},
        {"x": "[n] strides"},
        {"x": "[n, 2] strides [1]"},
        {"x": "[n] int8 strides [n]"},
        {"x": "[b..., n] strides [1, 1]"},
    ):
        with pytest.raises(ValueError) as caught:
            declare(library, op, tensors=tensors)
        texts.append(words(caught, csrc))
    assert_expected_inline(
        "\n".join(texts).replace(FORM, "FORM"),
        """\
lib::op: tensors names 'z'; its tensor arguments are x, y and its outputs out
lib::op: tensors names 'n'; its tensor arguments are x, y and its outputs out
lib::op: tensors says 'n' of 'x'; FORM
lib::op: tensors says '[2*3]' of 'x'; FORM
lib::op: tensors says '[hidden, tokens...]' of 'x'; FORM
lib::op: tensors says '[n]  float32' of 'x'; FORM
lib::op: tensors gives 'x' the dtype 'float31'; PyTorch has no such one
lib::op: tensors gives 'x' the dtype 'y'; PyTorch has no such one
lib::op: tensors gives 'x' the dtype of 'y'; the tensors before it are none
lib::op: tensors gives 'y' the dtype of 'n'; the tensors before it are x
lib::op: tensors gives 'out' the dtype of 'z'; the tensors before it are x, y
lib::op: tensors says '[n] rows float32' of 'x'; FORM
lib::op: tensors says '[n] float32 row' of 'x'; FORM
lib::op: tensors gives 'x' the dtype 'strides'; PyTorch has no such one
lib::op: tensors gives 'x' the strides [1] for [n, 2]; an entry needs a number or '*', leading dimensions '*'
lib::op: tensors gives 'x' the strides [n] for [n]; an entry needs a number or '*', leading dimensions '*'
lib::op: tensors gives 'x' the strides [1, 1] for [b..., n]; an entry needs a number or '*', leading dimensions '*'""",
    )


def test_tensors_of_every_form(library: OpLibrary) -> None:
    def op(x: Tensor, y: Tensor, z: Tensor, free: Tensor, maybe: Tensor | None = None) -> Tensor:
        return x.clone()

    tensors = {"maybe": "[n]", "z": "[3, *]", "y": "[] x.dtype", "x": "[batch..., n, 2*n] float32|int8"}
    declared = declare(library, op, cpu=None, variant=None, tensors=tensors)
    x = torch.ones(5, 2, 4)
    declared(x, torch.ones(()), torch.ones(3, 9), torch.ones(7, dtype=torch.int64, device="meta"))
    declared(x, torch.ones(()), torch.ones(3, 9), x, torch.ones(2))
    for wrong in (
        (torch.ones(2, 5), torch.ones(())),
        (x.half(), torch.ones(()).half()),
        (x, torch.ones(1)),
        (x.char(), torch.ones(())),
    ):
        with pytest.raises(RuntimeError, match="does not match"):
            declared(*wrong, torch.ones(3, 9), x)
    with pytest.raises(RuntimeError, match="dimension 0: expected 3"):
        declared(x, torch.ones(()), torch.ones(4, 9), x)


def test_layouts_of_every_form(library: OpLibrary) -> None:
    def op(rows: Tensor, dense: Tensor, fixed: Tensor, free: Tensor) -> Tensor:
        return rows.clone()

    tensors = {
        "rows": "[tokens..., n] rows",
        "dense": "[tokens..., n] rows.dtype",
        "fixed": "[tokens..., n] strides [*, 4]",
        "free": "[*, *] strides [*, *]",
        "out": "[tokens..., n] rows.dtype rows",
    }
    declared = declare(library, op, cpu=None, variant=None, tensors=tensors)
    good = {
        "rows": torch.ones(5, 3, 8)[..., :4],
        "dense": torch.ones(5, 3, 4),
        "fixed": torch.ones(5, 3, 16)[..., ::4],
        "free": torch.ones(1, 3).expand(2, 3),
        "out": torch.ones(5, 3, 8)[..., :4],
    }

    def call(**changed: Tensor) -> None:
        given = {**good, **changed}
        for device in ("cpu", "meta"):
            on = {name: torch.empty_strided(x.shape, x.stride(), device=device) for name, x in given.items()}
            if "free" not in changed:
                on["free"] = given["free"].to(device)
            declared.out(**on)

    call()
    call(free=torch.ones(2, 3).t())
    for name, x in good.items():
        other = x.transpose(0, 1).contiguous().transpose(0, 1)
        if name == "fixed":
            other = torch.ones(5, 3, 4)
        if name != "free":
            with pytest.raises(RuntimeError, match=f"argument '{name}' does not match"):
                call(**{name: other})


def test_an_output_that_is_not_named_is_what_the_functional_form_returns(library: OpLibrary, csrc: Path) -> None:
    def op(x: Tensor) -> Tensor:
        return x[0].double()

    declared = declare(library, op, cpu=None, variant=None, tensors={"x": "[n, m] float32"})
    x = torch.ones(2, 3, device="meta")
    declared.out(x, out=torch.ones(6, dtype=torch.float64, device="meta")[::2])
    with pytest.raises(RuntimeError) as caught:
        declared.out(x, out=x[1])
    assert_expected_inline(
        words(caught, csrc),
        """\
lib::op.out: argument 'out' does not match
  expected  [3]  float64  meta
  got       [3]  float32  meta
  the functional form returns what is expected""",
    )


def test_a_copy_of_an_op_is_the_op(library: OpLibrary) -> None:
    """Also in a module that holds one, and through pickle."""

    def op(x: Tensor) -> Tensor:
        return x.clone()

    declared = declare(library, op)
    module = torch.nn.Module()
    module.op, module.weight = declared, torch.nn.Parameter(torch.ones(2))
    assert copy.copy(declared) is copy.deepcopy(declared) is declared
    assert copy.deepcopy(module).op is declared
    assert copy.deepcopy(module).weight is not module.weight
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(module, protocol)).op is declared


def test_an_op_that_is_not_declared_where_it_is_unpickled(library: OpLibrary, csrc: Path) -> None:
    def op(x: Tensor) -> Tensor:
        return x.clone()

    pickled = pickle.dumps(declare(library, op))
    del library.ops["op"]
    with pytest.raises(RuntimeError) as caught:
        pickle.loads(pickled)
    assert_expected_inline(
        words(caught, csrc),
        """\
lib::op is not declared in this process
  remedy: import test_declaration, which declared it, before unpickling""",
    )


def test_outputs_that_do_not_fit(library: OpLibrary, csrc: Path) -> None:
    def two(x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x

    def one(x: Tensor) -> Tensor:
        return x

    texts = []
    for function, outputs in ((two, None), (two, ("out",)), (one, ("out", "scale")), (one, ("x",)), (two, ("out", "out"))):
        with pytest.raises(ValueError) as caught:
            declare(library, function, outputs=outputs)
        texts.append(words(caught, csrc))
    assert_expected_inline(
        "\n".join(texts),
        """\
lib::two returns 2 tensors: name the out form's arguments, outputs=('out', 'scale')
lib::two returns 2 tensors, but outputs names 1: out
lib::one returns 1 tensors, but outputs names 2: out, scale
lib::one: its out form would have two arguments called 'x'; name others with outputs
lib::two: its out form would have two arguments called 'out'; name others with outputs""",
    )


def test_a_failed_declaration_can_be_repaired(library: OpLibrary) -> None:
    """As in a notebook, where the same cell runs again."""

    def op(x: Tensor) -> Tensor:
        return x

    with pytest.raises(ValueError):
        declare(library, op, cpu="gone.cpp")
    assert schemas(declare(library, op)).startswith("op(Tensor x) -> Tensor")


def test_the_public_names() -> None:
    """What users import; a name that goes is a promise broken."""
    public = sorted(name for name in vars(torch_jit_ops) if name[0].isupper() and name != "TYPE_CHECKING")
    assert_expected_inline(
        " ".join(public),
        """BuildError MissingCompiler Module Op OpLibrary RadixTree Rows Sample SampleMaker Statistics Stats""",
    )
