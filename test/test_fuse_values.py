"""Near misses of ``fuse``: programs in which two values look like one. Each gives what it gives unfused."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_fuse import calls, short, traced_by
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torch_jit_ops.inductor import Fusion, fuse, fusion


def silu_of(x: Tensor) -> Tensor:
    """One silu if both are one value."""
    return x * torch.sigmoid(x)


def run(function: Callable[..., Any], *, grad: bool) -> list[Any]:
    """What it returns, what is in its arguments afterwards, and their gradients."""
    torch.manual_seed(1)
    arguments = [torch.randn(4, 16), torch.rand(16) + 0.5, torch.rand(16) + 0.5]
    if grad:
        arguments = [argument.requires_grad_() for argument in arguments]
    torch.manual_seed(0)
    results = function(*arguments)
    results = list(results) if isinstance(results, (tuple, list)) else [results]
    if grad:
        sum(result.double().sum() for result in results if result.requires_grad).backward()
    return [*results, *arguments, *(argument.grad for argument in arguments)]


def assert_unchanged(function: Callable[..., Any], rewrite: Fusion, *, grad: bool = False) -> None:
    torch._dynamo.reset()
    expected = run(function, grad=grad)
    actual = run(torch.compile(function, backend=traced_by(rewrite)), grad=grad)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


# --- results of one call, and random numbers --------------------------------------------------------


SEVERAL: dict[str, Callable[[Tensor], Any]] = {
    "unbind": lambda x: x.unflatten(-1, (2, 8)).unbind(-2),
    "hsplit": lambda x: torch.hsplit(x, 2)[::-1],
    "split_sizes": lambda x: x.split([3, 3, 10], -1)[:2],
    "odd_chunk": lambda x: x[:, :14].chunk(2, 0),
    "var_mean": lambda x: torch.var_mean(x, -1, keepdim=True),
    "aminmax": lambda x: torch.aminmax(x, dim=0),
    "topk": lambda x: (x.topk(3)[0], x.topk(3, largest=False)[0]),
    "sort": lambda x: (x.sort()[0], x.sort(descending=True)[0]),
    "max": lambda x: (x.max(0)[0], x.max(0)[1].float()),
    "frexp": lambda x: (torch.frexp(x)[0], torch.frexp(x)[1].float()),
    "broadcast": lambda x: torch.broadcast_tensors(x[0], x[1]),
    "checkpoint": lambda x: checkpoint(lambda x: (x.sin(), x.cos()), x, use_reentrant=False),
    "randn_like": lambda x: (torch.randn_like(x), torch.randn_like(x)),
    "rand": lambda x: (torch.rand(4, 16), torch.rand(4, 16)),
    "normal": lambda x: (torch.normal(x, 1.0), torch.normal(x, 1.0)),
    "bernoulli": lambda x: (x.sigmoid().bernoulli(), x.sigmoid().bernoulli()),
    "dropout": lambda x: (F.dropout(x), F.dropout(x)),
    "gumbel": lambda x: (F.gumbel_softmax(x), F.gumbel_softmax(x)),
    "rrelu": lambda x: (F.rrelu(x, training=True), F.rrelu(x, training=True)),
    "attention": lambda x: [F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.5) for _ in range(2)],
}


@pytest.mark.parametrize("name", SEVERAL)
def test_results_of_one_call_and_of_two_draws_are_several_values(name: str) -> None:
    def gated(x: Tensor, *_: Tensor) -> Tensor:
        gate, up = SEVERAL[name](x)
        return F.silu(gate) * up

    def written_out(x: Tensor, *_: Tensor) -> Tensor:
        first, second = SEVERAL[name](x)
        return first * torch.sigmoid(second)

    for function in (gated, written_out):
        assert_unchanged(function, fuse())


# --- positions, keywords and types of arguments ---------------------------------------------------------


PAIRS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "where": lambda x: (torch.where(x > 0, x, 0.5), torch.where(x > 0, 0.5, x)),
    "where_method": lambda x: (torch.where(x > 0, x > 0, x > 1) * 1.0, (x > 0).where(x > 0, x > 1) * 1.0),
    "clamp": lambda x: (x.clamp(None, 0.3), x.clamp(0.3)),
    "clamp_keyword": lambda x: (x.clamp(max=0.3), torch.clamp(x, min=0.3)),
    "pow": lambda x: (torch.pow(x, 3.0), torch.pow(3.0, x)),
    "sub": lambda x: (x - 1, 1 - x),
    "sub_alpha": lambda x: (torch.sub(x, x, alpha=2), torch.sub(x, x, alpha=3)),
    "div": lambda x: (x / 3, 3 / x),
    "rounding": lambda x: (torch.div(x, 2.0, rounding_mode="floor"), torch.div(x, 2.0, rounding_mode="trunc")),
    "lerp": lambda x: (torch.lerp(x, x * 2, 0.5), torch.lerp(x * 2, x, 0.25)),
    "addcmul": lambda x: (torch.addcmul(x, x, x), torch.addcmul(x, x, x, value=2)),
    "sum": lambda x: (x[:, :4].sum(0), x[:, :4].sum(1)),
    "keepdim": lambda x: (x[:, :1].sum(-1, keepdim=True), x[:1, :].sum(-1)),
    "correction": lambda x: (x.var(-1), x.var(-1, correction=0)),
    "zeros": lambda x: (x + 0.0, x + -0.0),
    "softmax": lambda x: (x[:, :4].softmax(0), x[:, :4].softmax(1)),
    "flip": lambda x: (x.flip(0), x.flip(1)),
    "roll": lambda x: (x.roll(1, 0), x.roll(0, 1)),
    "whole_numbers": lambda x: ((x.long() + 2**40 + 1).float(), (x.long() + 2**40 + 1).float().long().float() + 1),
}


@pytest.mark.parametrize("name", PAIRS)
def test_calls_with_other_arguments_are_other_values(name: str) -> None:
    def function(x: Tensor, *_: Tensor) -> Tensor:
        first, second = PAIRS[name](x)
        return torch.sigmoid(first) * second

    rewrite = fuse()
    assert_unchanged(function, rewrite)


def _gelu_of_a_power(x: Tensor, *_: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return 0.5 * gate * (1.0 + torch.tanh((2.0 / torch.pi) ** 0.5 * (gate + 0.044715 * torch.pow(3.0, gate)))) * up


def _indexed(x: Tensor, *_: Tensor) -> Tensor:
    row = x[0]
    return F.silu(row[torch.arange(7, -1, -1)]) * row[8:]


def _masked(x: Tensor, *_: Tensor) -> Tensor:
    row = x[0]
    return F.silu(row[[0, 2, 4, 6, 8, 10, 12, 14]]) * row[8:]


def _in_steps(x: Tensor, *_: Tensor) -> Tensor:
    return F.silu(x[..., ::2]) * x[..., 1::2]


@pytest.mark.parametrize("function", [_gelu_of_a_power, _indexed, _masked, _in_steps])
def test_what_looks_like_the_op_and_is_not(function: Callable[..., Tensor]) -> None:
    rewrite = fuse()
    assert_unchanged(function, rewrite)
    assert set(short(rewrite.report().counts())) <= {"silu_mul"}, "of two tensors, not of halves"


def test_keywords_are_arguments() -> None:
    def function(x: Tensor, *_: Tensor) -> Tensor:
        gate, up = torch.chunk(input=x, chunks=2, dim=-1)
        return torch.mul(input=F.silu(input=gate), other=up) + F.gelu(input=gate) * up

    rewrite = fuse()
    assert_unchanged(function, rewrite)
    assert short(rewrite.report().counts()) == {"gelu_and_mul": 1, "silu_and_mul": 1}


@pytest.mark.parametrize("name", ["relu2", "fused_add_relu"])
def test_an_op_finds_its_own_reference(name: str) -> None:
    rewrite = fuse([name])
    functions = {
        "relu2": lambda x, *_: F.relu(x).square() + torch.relu(input=x * 2) ** 2,
        "fused_add_relu": lambda x, *_: torch.relu(x * 2 + x * 3),
    }
    assert_unchanged(functions[name], rewrite)
    assert short(rewrite.report().counts()) == {name: 2 if name == "relu2" else 1}


# --- writes ------------------------------------------------------------------------------------------


def _written(write: Callable[[Tensor], Any]) -> Callable[..., Any]:
    def function(x: Tensor, *_: Tensor) -> Any:
        sigmoid = torch.sigmoid(x)
        write(x)
        return x * sigmoid, x

    return function


def _imod(x: Tensor) -> None:
    x %= 0.7


def _item(x: Tensor) -> None:
    x[0] = 3


def _view(x: Tensor) -> None:
    x.view(-1)[3:].mul_(2)


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "imod": _imod,
    "setitem": _item,
    "view": _view,
    "index_put": lambda x: x.index_put_((torch.tensor([0]),), torch.tensor(9.0)),
    "scatter": lambda x: x.scatter_(0, torch.zeros(1, 16, dtype=torch.long), 9.0),
    "masked_fill": lambda x: x.masked_fill_(x > 0, 0.5),
    "relu_": lambda x: F.relu_(x),
    "positional": lambda x: F.silu(x, True),
    "keyword": lambda x: F.silu(input=x, inplace=True),
    "out": lambda x: torch.exp(x, out=x),
    "foreach": lambda x: torch._foreach_add_([x], 1.0),
    "batch_norm": lambda x: F.batch_norm(torch.ones(2, 16), x[0], x[1], training=True),
    "instance_norm": lambda x: F.instance_norm(torch.rand(1, 16, 3), x[0], x[1], use_input_stats=True),
    "embedding": lambda x: F.embedding(torch.tensor([0, 1]), x, max_norm=0.1),
    "embedding_bag": lambda x: F.embedding_bag(torch.tensor([[0, 1]]), x, max_norm=0.1),
    "data": lambda x: x.data.mul_(2),
    "dropout": lambda x: F.dropout(x, inplace=True),
}


@pytest.mark.parametrize("name", WRITES)
def test_nothing_is_one_value_across_a_write(name: str) -> None:
    rewrite = fuse()
    assert_unchanged(_written(WRITES[name]), rewrite)
    assert rewrite.report().done == ()


def _twins(x: Tensor, *_: Tensor) -> Tensor:
    """One value until one of the two is written."""
    first, second = x * 2.0, x * 2.0
    first.add_(1)
    return F.silu(second) * first


def _erased(x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    gate = x.clone()
    before = gate.masked_fill(gate > 0, 0.5)
    gate %= 0.7
    after = gate.masked_fill(gate > 0, 0.25)
    wide = before.double()
    return x * (torch.sigmoid(wide) * wide).type_as(after), gate


def _result_of_before(x: Tensor, *_: Tensor) -> Tensor:
    largest = x.max(0)
    x.mul_(2)
    return F.silu(largest[0]) * x.max(0)[0]


@pytest.mark.parametrize("function", [_twins, _erased, _result_of_before])
def test_a_written_value_is_its_own(function: Callable[..., Any]) -> None:
    assert_unchanged(function, fuse())


def test_and_is_no_write() -> None:
    def function(x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = x.chunk(2, -1)
        gate = F.silu(gate)
        mask = (x > 0) & (x < 1)
        return gate * up, mask

    rewrite = fuse()
    assert_unchanged(function, rewrite)
    assert short(rewrite.report().counts()) == {"silu_and_mul": 1}


def test_a_view_that_is_read_later_keeps_a_summand() -> None:
    def function(x: Tensor, weight: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        first, second = x * 2, x * 3
        view = first.view(-1)
        return F.rms_norm(first + second, (16,), weight, 1e-6), view * 2

    rewrite = fuse()
    assert_unchanged(function, rewrite)
    assert short(rewrite.report().counts()) == {"rmsnorm": 1}
    assert [entry.reason for entry in rewrite.report().missed] == ["view is read afterwards, by mul_2"]


def test_two_norms_of_one_sum() -> None:
    def function(x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        total = x * 2 + x * 3
        return F.rms_norm(total, (16,), first, 1e-6), F.rms_norm(total, (16,), second, 1e-6), total

    rewrite = fuse()
    assert_unchanged(function, rewrite)
    assert short(rewrite.report().counts()) == {"fused_add_rmsnorm": 1, "rmsnorm": 1}


# --- gradients ---------------------------------------------------------------------------------------


def _hooked(x: Tensor, weight: Tensor, _: Tensor) -> Tensor:
    wide = x.double()
    y = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).float() * weight
    wide.register_hook(lambda grad: grad * 3)
    return y


def _detached(x: Tensor, *_: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return torch.sigmoid(gate.detach()) * gate * up


def _without_grad(x: Tensor, *_: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    with torch.no_grad():
        sigmoid = torch.sigmoid(gate)
    return sigmoid * gate * up


def _written_behind(x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = (x * 2).bfloat16().chunk(2, -1)
    gate = gate.clone()
    wide = gate.float()
    y = (torch.sigmoid(wide) * wide).type_as(gate) * up
    gate.mul_(2)
    return y, gate


@pytest.mark.parametrize("function", [_hooked, _detached, _without_grad, _written_behind])
def test_gradients_are_those_of_the_model(function: Callable[..., Any]) -> None:
    rewrite = fuse()
    assert_unchanged(function, rewrite, grad=True)
    assert rewrite.report().done == ()


# --- what the pass does not understand -----------------------------------------------------------------


def _gate(x: Tensor) -> Tensor:
    return F.silu(x[..., :8]) * x[..., 8:]


TRANSFORMED: dict[str, Callable[..., Any]] = {
    "vmap": lambda x, *_: torch.vmap(_gate)(x),
    "vmap_grad": lambda x, *_: torch.vmap(torch.func.grad(lambda row: _gate(row).sum()))(x),
    "jvp": lambda x, *_: torch.func.jvp(_gate, (x,), (x * 2,)),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_a_graph_with_a_transform_is_left_alone(name: str) -> None:
    rewrite = fuse()
    assert_unchanged(TRANSFORMED[name], rewrite)
    assert rewrite.report().done == ()
    assert {entry.reason for entry in rewrite.report().untouched} == {"torch.func or forward mode is at work in it"}


def test_forward_mode_around_and_within_is_that_of_the_model() -> None:
    x, tangent = torch.randn(3, 16), torch.randn(3, 16)
    _, expected = torch.func.jvp(_gate, (x,), (tangent,))
    compiled = torch.compile(_gate, options=fuse().options())
    torch.testing.assert_close(torch.func.jvp(compiled, (x,), (tangent,))[1], expected)

    def within(x: Tensor, tangent: Tensor) -> Tensor:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, tangent)
            return torch.autograd.forward_ad.unpack_dual(_gate(dual)).tangent

    torch.testing.assert_close(torch.compile(within, options=fuse().options())(x, tangent), expected)


def test_float8_and_somebody_elses_silu() -> None:
    @torch.library.custom_op("fusevalues::silu", mutates_args=())
    def silu(x: Tensor) -> Tensor:
        return x * 2

    silu.register_fake(torch.empty_like)

    def function(x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        return silu(x[:, :8]) * x[:, 8:], x.to(torch.float8_e4m3fn).float()

    rewrite = fuse()
    assert_unchanged(function, rewrite)
    assert rewrite.report().done == ()


def test_a_nested_tensor_is_left_alone() -> None:
    nested = torch.nested.nested_tensor([torch.randn(2, 16), torch.randn(3, 16)], layout=torch.jagged)
    rewrite = fuse()
    actual = torch.compile(lambda x: F.silu(x) * x, backend=traced_by(rewrite))(nested)
    torch.testing.assert_close(actual.values(), (F.silu(nested) * nested).values())
    assert rewrite.report().done == () and rewrite.report().untouched == ()


def test_an_exception_leaves_the_graph_and_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(fusion, "objection", fail)
    rewrite = fuse()
    x = torch.randn(3, 16)
    for _ in range(2):
        torch._dynamo.reset()
        backend = traced_by(rewrite)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            torch.testing.assert_close(torch.compile(_gate, backend=backend)(x), _gate(x))
        told = [str(warning.message) for warning in warned if "fuse" in str(warning.message)]
        if _ == 0:
            assert [re.sub(r"\S+/(test_\w+.py):\d+", r"\1:1", text) for text in told] == [
                "fuse left a graph as it was. mul  test_fuse_values.py:1\n    KeyError: 'surprise'"
            ]
    assert told == []
    assert len(rewrite.report().untouched) == 1
    assert calls(backend.graphs[0])[-1] == "<built-in function mul>"
    assert "1 untouched\n  mul" in str(rewrite.report())
