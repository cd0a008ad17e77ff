"""Keys that are derived from sizes by rules, and what is said of a placeholder that makes too many variants."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from typing import Any

import fuzz
import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch.fx.experimental import symbolic_shapes

from torch_jit_ops import Op, OpLibrary, manifest, registry
from torch_jit_ops.builder import load as builder
from torch_jit_ops.builder.unit import Unit
from torch_jit_ops.calling import boot, develop, dispatcher, variant_storm
from torch_jit_ops.declaring import variant
from torch_jit_ops.declaring.key_rule import LARGEST, parse_rules
from torch_jit_ops.declaring.signature import signature_of

_TILED = """
#include <jitk/result.h>
#include <jitk/tensor.h>
template <int64_t kTile, bool kDivisible>
void tiled(jitk::TensorView x, jitk::Output& out) {
  float* to = static_cast<float*>(out.empty_like(x).data_ptr());
  for (int64_t i = 0; i < x.numel(); ++i) to[i] = 2.0f * kTile + kDivisible;
}
template <int64_t kN>
void keyed(jitk::TensorView x) {}
template <int64_t kN, int64_t kM>
void grid(jitk::TensorView x) {}
"""


def tiled(x: Tensor) -> Tensor:
    tile = next(2**power for power in range(64) if 2**power >= len(x))
    return torch.full_like(x, 2 * min(max(tile, 4), 64) + int(x.shape[-1] % 16 == 0))


def keyed(x: Tensor, n: int) -> None:
    return None


def grid(x: Tensor, n: int, m: int) -> None:
    return None


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpLibrary]:
    csrc = tmp_path_factory.mktemp("derivedlib")
    (csrc / "tiled.cpp").write_text(_TILED)
    made = OpLibrary("derivedlib", csrc=csrc)
    made.op(cpu="tiled.cpp", variant="tiled<{x.shape[0]:pow2:min4:max64}, {x.shape[-1]:div16}>", fake=torch.empty_like)(tiled)
    made.op(cpu="tiled.cpp", variant="keyed<{n}>")(keyed)
    made.op(cpu="tiled.cpp", variant="grid<{n}, {m}>")(grid)
    yield made
    registry.remove(made)
    for op in made.ops.values():
        develop.withdraw(op._library)


def _pattern(op: Op) -> variant.VariantPattern:
    return op.declaration.kernels["cpu"].pattern


@torch.inference_mode()
def test_sizes_share_kernels(library: OpLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    op = library.ops["tiled"]
    asked = []
    load = builder.load
    monkeypatch.setattr(boot, "load", lambda unit, *rest: asked.append(unit.label) or load(unit, *rest))
    for rows, width in ((1, 16), (3, 32), (4, 5), (5, 5), (8, 3), (200, 48), (65, 16), (2000, 1), (0, 16)):
        x = torch.zeros(rows, width)
        with op.kernels_alone():
            assert torch.equal(op(x), tiled(x)), (rows, width)
    labels = [f"derivedlib::tiled<{tile}, {divisible}>" for tile, divisible in ((4, 1), (4, 0), (8, 0), (64, 1), (64, 0))]
    assert list(dict.fromkeys(label for label in asked if "tiled" in label)) == labels


def test_a_graph_with_an_open_size(library: OpLibrary) -> None:
    op = library.ops["tiled"]
    open_size = symbolic_shapes.StatelessSymbolicContext(
        dynamic_sizes=[symbolic_shapes.DimDynamic.DYNAMIC, symbolic_shapes.DimDynamic.STATIC]
    )
    mode = torch._subclasses.FakeTensorMode(shape_env=symbolic_shapes.ShapeEnv())
    fake = mode.from_tensor(torch.empty(6, 16), symbolic_context=open_size)
    assert _pattern(op).static_words_of([fake]) is None
    assert _pattern(op).static_words_of([torch.empty(6, 16)]) == (8, 1)
    run = torch.compile(op.default, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (6, 40, 900):
            assert torch.equal(run(torch.zeros(rows, 16)), tiled(torch.zeros(rows, 16)))


_EDGES = [0, 1, 2, 3, 5, 15, 16, 17, 47, 48, LARGEST, LARGEST - 1, -1, -16, -(2**40), -LARGEST]
_EDGES += [2**power + by for power in range(2, 63) for by in (-1, 0, 1)]


def _chain(rng: random.Random) -> str:
    numbers = (1, 2, 3, 7, 16, 48, 2**31, 2**62, LARGEST)
    makers = (lambda: "pow2", lambda: f"div{rng.choice(numbers)}", lambda: f"min{rng.choice((0, *numbers))}")
    rules = (*makers, lambda: f"max{rng.choice((0, *numbers))}")
    return ":".join(rng.choice(rules)() for _ in range(rng.randint(1, 4)))


def _counted(x: Tensor, n: int) -> Tensor:
    return x


@torch.inference_mode()
def test_the_dispatcher_derives_what_python_derives() -> None:
    """Sixteen random chains of rules at a time, of numbers at the edges and of any size."""
    signature = signature_of(_counted)
    library = torch.library.Library("rulelib", "FRAGMENT")
    library.define("same(Tensor x, SymInt n) -> Tensor?")
    library.impl("same", lambda x, n: x, "CompositeExplicitAutograd")
    x = torch.zeros(1)
    for seed in fuzz.seeds(6):
        rng = random.Random(seed)
        chains = [_chain(rng) for _ in range(16)]
        name = f"counted{seed}"
        library.define(signature.schema(name))
        pattern = variant.parse_variant(
            "rulelib::counted", f"counted<{', '.join(f'{{n:{chain}}}' for chain in chains)}>", signature
        )
        keys: list[list[int]] = []

        def answer(key: Any, keys: list[list[int]] = keys) -> dispatcher.Once:
            keys.append(list(key[1:]))
            return dispatcher.Once(dispatcher.REFERENCE)

        dispatcher.register(f"rulelib::{name}", "rulelib", name, "CPU", "rulelib::same", pattern.plan(signature), answer)
        op = getattr(torch.ops.rulelib, name).default
        numbers = [*_EDGES, *(rng.randint(0, 2 ** rng.randint(1, 63) - 1) for _ in range(100))]
        for number in numbers:
            op(x, number)
            assert keys.pop() == list(pattern.words_of([x, number])), f"seed {seed}: {chains} of {number}"


def test_rules_by_hand() -> None:
    def values(rules: str, *numbers: int) -> list[int]:
        made = []
        for number in numbers:
            for rule in parse_rules(rules):
                number = rule(number)
            made.append(number)
        return made

    assert values("pow2", 0, 1, 2, 3, 4, 5, 1023, 1025) == [1, 1, 2, 4, 4, 8, 1024, 2048]
    assert values("div16", 0, 1, 15, 16, 32) == [1, 0, 0, 1, 1]
    assert values("min4:max256", 0, 4, 5, 256, 257) == [4, 4, 5, 256, 256]
    assert values("max256:pow2", 200, 300) == [256, 256]


def _op(x: Tensor, n: int, flag: bool, how: str) -> Tensor:
    return x


def test_rules_that_there_are_not() -> None:
    signature = signature_of(_op)
    texts = []
    for placeholder in (
        "x.shape[0]:pow3",
        "x.shape[0]:",
        "x.shape[0]:pow2:",
        "x.shape[0]:div0",
        "x.shape[0]:div",
        "x.shape[0]:min-4",
        "x.shape[0]:max04",
        f"x.shape[0]:max{2**63}",
        "x.shape[0] :pow2",
        "x.dtype:pow2",
        "flag:pow2",
        "x.dim:pow2",
    ):
        with pytest.raises(ValueError) as caught:
            variant.parse_variant("lib::op", f"op<{{{placeholder}}}>", signature)
        texts.append(str(caught.value).replace("lib::op: the variant's placeholder ", ""))
    assert_expected_inline(
        "\n".join(texts),
        """\
{x.shape[0]:pow3}: there is no rule 'pow3'; the rules are pow2, div16, min4 and max256, with any number
{x.shape[0]:}: there is no rule ''; the rules are pow2, div16, min4 and max256, with any number
{x.shape[0]:pow2:}: there is no rule ''; the rules are pow2, div16, min4 and max256, with any number
{x.shape[0]:div0}: there is no rule 'div0'; the rules are pow2, div16, min4 and max256, with any number
{x.shape[0]:div}: there is no rule 'div'; the rules are pow2, div16, min4 and max256, with any number
{x.shape[0]:min-4}: there is no rule 'min-4'; the rules are pow2, div16, min4 and max256, with any number
{x.shape[0]:max04}: there is no rule 'max04'; the rules are pow2, div16, min4 and max256, with any number
{x.shape[0]:max9223372036854775808}: there is no rule 'max9223372036854775808'; the rules are pow2, div16, min4 and max256, with any number
lib::op: of a tensor a variant can use {x.dtype}, {x.shape[i]} and {x.dim}, not {x.shape[0] }
{x.dtype:pow2} has rules, which are for sizes and ints alone
{flag:pow2} has rules, which are for sizes and ints alone
{x.dim:pow2} has rules, which are for sizes and ints alone""",  # noqa: E501
    )


def test_a_derived_int_is_passed_all_the_same() -> None:
    signature = signature_of(_op)
    pattern = variant.parse_variant("lib::op", "op<{n:pow2}, {flag}>", signature)
    assert pattern.template_arguments() == {"flag"}
    assert pattern.cpp_declaration(signature, "op") == "void op(TensorView x, int64_t n, Text how, Output& out)"
    assert pattern.plan(signature).splitlines()[-4:] == ["key 1 value 0 pow2", "key 2 value 0", "output T out", "results 1"]


def test_a_manifest_has_derived_values(library: OpLibrary) -> None:
    op = library.ops["tiled"]
    pattern = _pattern(op)
    entry = manifest.entry_of("derivedlib::tiled", "cpu", pattern, pattern.values((8, 1)), "x86-64")
    assert dict(entry.values) == {"x.shape[0]:pow2:min4:max64": 8, "x.shape[-1]:div16": 1}
    assert manifest.values_of(entry, pattern) == (8, 1)
    part = pattern.placeholders[1]
    assert manifest.value_of("tiled", part, pattern.signature, "0") == 0
    with pytest.raises(ValueError) as caught:
        manifest.value_of("tiled", part, pattern.signature, 16)
    assert str(caught.value) == "tiled: {x.shape[-1]:div16} must be a value that its rule makes; got 16"
    with pytest.raises(ValueError, match="got 65"):
        manifest.value_of("tiled", pattern.placeholders[0], pattern.signature, 65)


@pytest.fixture
def one_kernel_for_all(library: OpLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled but the first variant of an op, which serves all keys."""
    load = builder.load
    first: dict[str, Any] = {}

    def loaded(unit: Unit, *rest: Any) -> Any:
        if unit.name not in first:
            first[unit.name] = load(unit, *rest)
        return first[unit.name]

    monkeypatch.setattr(boot, "load", loaded)
    monkeypatch.setattr(variant_storm, "_seen", {})


@pytest.mark.usefixtures("one_kernel_for_all")
@torch.inference_mode()
def test_a_storm_of_variants(library: OpLibrary) -> None:
    x = torch.zeros(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n in range(variant_storm.MOST):
            library.ops["keyed"](x, n)
            library.ops["keyed"](x, n)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n in range(variant_storm.MOST, 2 * variant_storm.MOST):
            library.ops["keyed"](x, n)
    assert_expected_inline(
        "\n".join(str(each.message) for each in caught),
        """\
derivedlib::keyed has had 49 kernels in this process, 49 of them for values of {n}: each is compiled by itself
  remedy: have C++ take 'n' as an argument, or derive the key from it, such as {n:pow2}""",
    )


@pytest.mark.usefixtures("one_kernel_for_all")
@torch.inference_mode()
@pytest.mark.parametrize(("others", "said"), [(2, "{m}"), (7, None)])
def test_a_storm_along_one_of_two_placeholders(library: OpLibrary, others: int, said: str | None) -> None:
    """Values of one placeholder for two of the other are a storm, and a square of both is none."""
    x = torch.zeros(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(70):
            library.ops["grid"](x, 100 * others + step % others, step // others)
    assert [said in str(each.message) for each in caught if said] == [True] * (said is not None)
    assert said is not None or not caught
