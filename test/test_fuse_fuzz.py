"""``inductor.fuse`` on random programs: none may compute anything else than without it. And the fuzzer itself."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator

import fuzz
import pytest
import torch
from fuse_fuzz import EXTRA, build, calm, campaign, everything, exact, judge, plan
from fuse_kept import KEPT
from fuse_program import Program
from fuse_spellings import SPELLINGS
from torch.fx import Graph, Node

from torch_jit_ops import registry

CHUNK = 25


@pytest.fixture(autouse=True)
def _calm() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with calm():
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("chunk", fuzz.seeds(16))
def test_a_fused_program_computes_what_it_did(chunk: int) -> None:
    figures = campaign(range(chunk * CHUNK, (chunk + 1) * CHUNK))
    assert not figures.wrong, "\n\n".join(f"{verdict.wrong}\n{verdict.program.describe()}" for verdict in figures.wrong)
    assert figures.found == figures.exact, f"not found: {dict(figures.missed)}"
    assert figures.skipped <= CHUNK // 4, figures.reasons
    assert figures.replaced >= CHUNK // 5, figures


@pytest.mark.parametrize("seed", fuzz.seeds(8))
def test_through_inductor(seed: int) -> None:
    program = build(seed, plan(seed))
    verdict = judge(program, everything(), inductor=True)
    assert not verdict.wrong, f"{verdict.wrong}\n{program.describe()}"


@pytest.mark.parametrize("name", KEPT)
def test_what_went_wrong_once(name: str) -> None:
    verdict = judge(KEPT[name], everything())
    assert not verdict.skipped
    assert not verdict.wrong, f"{verdict.wrong}\n{KEPT[name].describe()}"


def test_every_op_that_is_looked_for_has_programs() -> None:
    declared = {op.qualified_name for op in registry.ops() if op.declaration.patterns is not None}
    extra = {name if "::" in name else f"jitk::{name}" for name in EXTRA}
    assert {name for name in declared | extra if name.startswith(("jitk::", "userlib::"))} == set(SPELLINGS)


def test_the_same_seed_makes_the_same_program() -> None:
    for seed in range(40):
        assert build(seed, plan(seed)).describe() == build(seed, plan(seed)).describe()


# --- passes that are wrong ------------------------------------------------------------------------------


def _ops(graph: Graph, name: str) -> list[Node]:
    return [node for node in graph.nodes if node.op == "call_function" and str(node.target).startswith(f"jitk.{name}")]


def _swaps_gate_and_up(graph: Graph) -> None:
    everything()(graph)
    for node in _ops(graph, "silu_mul"):
        node.args = (node.args[1], node.args[0])


def _another_eps(graph: Graph) -> None:
    everything()(graph)
    for node in _ops(graph, "rmsnorm"):
        node.args = (*node.args[:-1], 2 * node.args[-1])


def _takes_tanh_for_erf(graph: Graph) -> None:
    everything()(graph)
    for node in _ops(graph, "gelu_and_mul"):
        node.target = torch.ops.jitk.gelu_tanh_and_mul.default


def _turns_the_other_pairs(graph: Graph) -> None:
    everything()(graph)
    for node in _ops(graph, "rope_qk"):
        node.kwargs = {**node.kwargs, "is_neox": not node.kwargs["is_neox"]}


def _turns_back(graph: Graph) -> None:
    everything()(graph)
    for node in _ops(graph, "rope_qk"):
        with graph.inserting_before(node):
            node.args = (*node.args[:3], graph.call_method("neg", (node.args[3],)))


def _merges_results(graph: Graph) -> None:
    for node in graph.nodes:
        if node.target is operator.getitem and isinstance(node.args[1], int):
            node.args = (node.args[0], 0)


def _without(*names: str) -> Callable[[Graph], None]:
    def change(graph: Graph) -> None:
        for node in reversed(list(graph.nodes)):
            if str(node.target) in names and not node.users:
                graph.erase_node(node)

    return change


def _merges_draws(graph: Graph) -> None:
    seen: dict[object, Node] = {}
    for node in list(graph.nodes):
        if node.target in (torch.randn_like, torch.rand_like, torch.nn.functional.dropout):
            first = seen.setdefault((node.target, node.args[0]), node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


def _result(method: str, *arguments: object) -> Callable[[Graph], None]:
    def change(graph: Graph) -> None:
        everything()(graph)
        for node in _ops(graph, ""):
            if len(node.users) > 0 and "fused_add_rms" not in str(node.target):
                with graph.inserting_after(node):
                    made = graph.call_method(method, (node, *arguments))
                node.replace_all_uses_with(made, delete_user_cb=lambda user, made=made: user is not made)

    return change


def _raises(graph: Graph) -> None:
    if any(str(node.target) == "silu" or "gelu" in str(node.target) for node in graph.nodes):
        raise IndexError("tuple index out of range")


def _transposed(graph: Graph) -> None:
    _result("transpose", 0, -1)(graph)
    for node in list(graph.nodes):
        if node.target == "transpose" and node.args[1:] == (0, -1) and "jitk" in str(getattr(node.args[0], "target", "")):
            with graph.inserting_after(node):
                dense = graph.call_method("contiguous", (node,))
            node.replace_all_uses_with(dense, delete_user_cb=lambda user, dense=dense: user is not dense)
            with graph.inserting_after(dense):
                back = graph.call_method("transpose", (dense, 0, -1))
            dense.replace_all_uses_with(back, delete_user_cb=lambda user, back=back: user is not back)


# By a word of the programs that may show it.
WRONG: dict[str, tuple[str, Callable[[Graph], None]]] = {
    "swaps_gate_and_up": ("# jitk::silu_mul", _swaps_gate_and_up),
    "another_eps": ("# jitk::rmsnorm", _another_eps),
    "takes_tanh_for_erf": ("# jitk::gelu_and_mul", _takes_tanh_for_erf),
    "turns_the_other_pairs": ("# jitk::rope_qk", _turns_the_other_pairs),
    "turns_back": ("# jitk::rope_qk", _turns_back),
    "merges_results": ("= x", _merges_results),
    "loses_a_write": ("mutation: write", _without("mul_", "add_", "zero_", "copy_", "<built-in function setitem>")),
    "merges_draws": ("_like", _merges_draws),
    "loses_the_gradient": ("grad: True", _result("detach")),
    "other_dtype": ("", _result("double")),
    "other_strides": ("", _transposed),
    "raises": ("", _raises),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_pass_is_noticed(name: str) -> None:
    word, wrong = WRONG[name]
    programs = (program for seed in range(1000) if word in (program := build(seed, plan(seed))).describe())
    assert any(judge(program, wrong).wrong for program in programs), "1000 programs show nothing"


def test_a_pass_that_finds_nothing_is_noticed() -> None:
    figures = campaign((seed for seed in range(60) if not plan(seed)), rewrite=lambda graph: None)
    assert figures.exact > 0 and figures.found == 0 and figures.replaced == 0 and not figures.wrong


@pytest.mark.parametrize("op", SPELLINGS)
def test_every_exact_program_gets_its_op(op: str) -> None:
    place = sorted(SPELLINGS).index(op)
    programs: list[Program] = [exact(place + len(SPELLINGS) * number) for number in range(6)]
    for program in programs:
        verdict = judge(program, everything())
        assert verdict.ops == [op] and not verdict.wrong and not verdict.skipped, program.describe()
