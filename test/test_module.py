"""``load_jit``: C++ functions without an op of their own, as SGLang's guide calls them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from cases import assert_same_bits
from expecttest import assert_expected_inline
from torch import Tensor

from torch_jit_ops import BuildError, Module, cache_once, load_jit, make_cpp_args

_SOURCE = """
#include <jitk/export.h>  // Text
#include <jitk/result.h>
#include <jitk/tensor.h>

#include <optional>
#include <tuple>

#ifndef OFFSET
#define OFFSET 0
#endif

using namespace jitk;
using namespace jitk::host;

template <int64_t kConstant>
void add(TensorView dst, TensorView src) {
  SymbolicSize n{"n"};
  TensorMatcher({n}).with_dtype<int32_t>().verify(dst).verify(src);
  for (int64_t i : irange(n.unwrap())) {
    static_cast<int32_t*>(dst.data_ptr())[i] = static_cast<const int32_t*>(src.data_ptr())[i] + kConstant + OFFSET;
  }
}

template <typename T>
std::tuple<Tensor, Tensor> scale(TensorView x, double factor, std::optional<TensorView> bias, bool negate, Text mode,
                                 IntList shifts) {
  Tensor out = empty_like(x), shifted = empty_like(x);
  double shift = mode.length;
  for (int64_t i : irange(shifts.size())) shift += shifts[i];
  for (int64_t i : irange(x.numel())) {
    const T value = static_cast<const T*>(x.data_ptr())[i] * static_cast<T>(negate ? -factor : factor);
    static_cast<T*>(out.data_ptr())[i] = value + (bias ? static_cast<const T*>(bias->data_ptr())[i] : T{0});
    static_cast<T*>(shifted.data_ptr())[i] = value + static_cast<T>(shift);
  }
  return {static_cast<Tensor&&>(out), static_cast<Tensor&&>(shifted)};
}

template <typename T>
Tensor twice(TensorView x) {
  Tensor out = empty_like(x);
  for (int64_t i : irange(x.numel())) static_cast<T*>(out.data_ptr())[i] = 2 * static_cast<const T*>(x.data_ptr())[i];
  return out;
}

inline void refuse(int64_t n) { RuntimeCheck(n == 0, "n must be 0, got ", n); }
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("module") / "functions.cpp"
    path.write_text(_SOURCE)
    return path


def load(source: Path, **options: object) -> Module:
    args = make_cpp_args(5, torch.float32)
    wrappers = [("add", "add<5>"), ("scale", "scale<fp32_t>"), ("twice", "twice<fp32_t>"), ("refuse", "refuse")]
    fakes = {"twice": torch.empty_like}
    return load_jit("functions", *args, cpp_files=[source], cpp_wrappers=wrappers, **{"fakes": fakes, **options})


def test_schemas_come_of_the_functions(source: Path) -> None:
    module = load(source)
    functions = [module.add, module.scale, module.twice, module.refuse]
    texts = [re.sub(r"(\w+)::(\w+?)_[0-9a-f]{12}", r"\1::\2", str(function._schema)) for function in functions]
    assert_expected_inline(
        "\n".join(texts),
        """\
jitk_modules::add(Tensor(a0!) arg0, Tensor(a1!) arg1) -> ()
jitk_modules::scale(Tensor arg0, float arg1, Tensor? arg2, bool arg3, str arg4, SymInt[] arg5) -> (Tensor, Tensor)
jitk_modules::twice(Tensor arg0) -> Tensor
jitk_modules::refuse(SymInt arg0) -> ()""",
    )
    assert repr(module) == "<jitk module functions<5, fp32_t>: add, scale, twice, refuse>"


def test_every_kind_of_argument_and_result(source: Path) -> None:
    module = load(source)
    src = torch.arange(4, dtype=torch.int32)
    dst = torch.zeros_like(src)
    assert module.add(dst, src) is None
    assert dst.tolist() == [5, 6, 7, 8]
    x, bias = torch.randn(3), torch.randn(3)
    for given, negate in ((None, False), (bias, True)):
        out, shifted = module.scale(x, 0.5, given, negate, "mode", [10, -3])
        value = x * (-0.5 if negate else 0.5)
        assert_same_bits(out, value if given is None else value + given, "out")
        assert_same_bits(shifted, value + 11, "shifted")
    module.refuse(0)


def test_the_same_call_returns_the_same_module(source: Path) -> None:
    assert load(source) is load(source)
    other = load(source, extra_cflags=["-DOFFSET=100"])
    assert other is not load(source)
    dst = torch.zeros(1, dtype=torch.int32)
    other.add(dst, dst.clone())
    assert dst.item() == 105


def test_in_a_graph(source: Path) -> None:
    module = load(source)

    def run(x: Tensor, src: Tensor) -> tuple[Tensor, Tensor]:
        dst = torch.empty_like(src)
        module.add(dst, src)
        return module.twice(x + 1) * 2, dst + 1

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (3, 5):
        x, src = torch.randn(size), torch.arange(size, dtype=torch.int32)
        for actual, expected in zip(compiled(x, src), run(x, src), strict=True):
            assert_same_bits(actual, expected, "result")
    torch.library.opcheck(module.add, (torch.zeros(3, dtype=torch.int32), torch.ones(3, dtype=torch.int32)))
    torch.library.opcheck(module.twice, (torch.ones(3),))


def test_a_function_that_returns_modules_runs_while_a_graph_is_traced(source: Path) -> None:
    calls = []

    @cache_once
    def module_for(constant: int) -> Module:
        calls.append(constant)
        args = make_cpp_args(constant)
        return load_jit("traced", *args, cpp_files=[source], cpp_wrappers=[("add", f"add<{args}>")])

    def run(src: Tensor, constant: int) -> Tensor:
        dst = torch.empty_like(src)
        module_for(constant).add(dst, src)
        return dst

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    src = torch.zeros(2, dtype=torch.int32)
    assert compiled(src, 1).tolist() == [1, 1]
    assert compiled(src, 2).tolist() == [2, 2]
    assert run(src, 1).tolist() == [1, 1]
    assert calls == [1, 2]


# --- errors ----------------------------------------------------------------------------------------


def test_text_of_a_failed_check_names_the_function(source: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        load(source).refuse(3)
    first = str(caught.value)
    with pytest.raises(RuntimeError) as caught:
        load(source).add(torch.zeros(2, dtype=torch.int32), torch.zeros(3, dtype=torch.int32))
    assert_expected_inline(
        f"{first}\n{caught.value}",
        """\
functions<5, fp32_t>.refuse: n must be 0, got 3
  at functions.cpp:46
functions<5, fp32_t>.add: argument 'arg1' does not match
  expected  [n=2]  int32  cpu  contiguous
  got       [3]    int32  cpu
  dimension 0: n was bound to 2 by 'arg0'
  at functions.cpp:19""",
    )


def test_what_load_jit_refuses(source: Path) -> None:
    wrappers = [("add", "add<5>")]
    texts = []
    for options in (
        {"cpp_files": ["gone.cpp"], "cpp_wrappers": wrappers},
        {"cpp_files": [source]},
        {"cpp_files": [source], "cpp_wrappers": wrappers * 2},
        {"cpp_files": [source], "cpp_wrappers": wrappers, "mutates": {"sub": [0]}},
        {"cpp_files": [source], "cpp_wrappers": wrappers, "fakes": {"sub": torch.empty_like}},
        {"cpp_files": [source], "cpp_wrappers": wrappers, "mutates": {"add": [2]}},
    ):
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            load_jit("refused", **options)
        texts.append(re.sub(r"(/[^\s,/]+)+", "FOLDER", f"{type(caught.value).__name__} {caught.value}"))
    assert_expected_inline(
        "\n".join(texts),
        """\
FileNotFoundError load_jit('refused'): 'gone.cpp' is not in FOLDER, FOLDER, FOLDER
ValueError load_jit('refused'): cuda_wrappers and cpp_wrappers must name functions, each once; got []
ValueError load_jit('refused'): cuda_wrappers and cpp_wrappers must name functions, each once; got ['add', 'add']
ValueError load_jit('refused'): mutates names sub; the functions are add
ValueError load_jit('refused'): fakes names sub; the functions are add
ValueError refused: mutates says that add writes argument 2; its tensors are [0, 1]""",
    )


def test_a_function_that_does_not_compile_is_a_build_error(source: Path) -> None:
    with pytest.raises(BuildError, match=r"broken<1> did not compile"):
        load_jit("broken", "1", cpp_files=[source], cpp_wrappers=[("gone", "gone<1>")])


def test_arguments_of_templates() -> None:
    assert str(make_cpp_args(1, True, 0.5, torch.bfloat16, "Mode::fast")) == "1, true, 0.5, bf16_t, Mode::fast"
    with pytest.raises(TypeError) as caught:
        make_cpp_args([1])  # type: ignore[list-item]
    assert_expected_inline(str(caught.value), """make_cpp_args takes int, bool, float, str and torch.dtype, got list: [1]""")
    with pytest.raises(ValueError, match="has no C\\+\\+ type"):
        make_cpp_args(torch.complex64)
