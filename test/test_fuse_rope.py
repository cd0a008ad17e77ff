"""``inductor.fuse`` on rotary embeddings as models spell them, and on what is nearly one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_fuse import assert_as_right, calls, short, traced_by
from torch import Tensor

from torch_jit_ops.inductor import fuse


def halves(x: Tensor) -> Tensor:
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


def neighbours(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)


def llama(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return (q * cos) + (halves(q) * sin), (k * cos) + (halves(k) * sin)


def phi(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    turned = llama(q[..., : cos.shape[-1]], k[..., : cos.shape[-1]], cos, sin)
    q, k = (torch.cat((part, x[..., cos.shape[-1] :]), dim=-1) for part, x in zip(turned, (q, k), strict=True))
    return q, k


def glm(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = (x.unsqueeze(1)[..., : x.shape[-1] // 2].repeat_interleave(2, dim=-1) for x in (cos, sin))
    width = cos.shape[-1]
    q_turned, k_turned = ((x * cos) + (neighbours(x) * sin) for x in (q[..., :width], k[..., :width]))
    return torch.cat([q_turned, q[..., width:]], dim=-1), torch.cat([k_turned, k[..., width:]], dim=-1)


def cohere(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    dtype, q, k = q.dtype, q.float(), k.float()
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    q, k = (q * cos) + (neighbours(q) * sin), (k * cos) + (neighbours(k) * sin)
    return q.to(dtype=dtype), k.to(dtype=dtype)


def olmo2(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    turned = llama(q, k, cos.float() if q.dtype != torch.float64 else cos, sin.float() if q.dtype != torch.float64 else sin)
    return turned[0].to(q.dtype), turned[1].to(k.dtype)


def heads_behind_tokens(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    return (q * cos) + (halves(q) * sin), (k * cos) + (halves(k) * sin)


MODELS: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], int]] = {
    "llama": (llama, 16),
    "phi": (phi, 6),
    "phi_half": (phi, 8),
    "phi_as_a_whole": (phi, 16),
    "glm": (glm, 8),
    "cohere": (cohere, 16),
    "olmo2": (olmo2, 16),
    "heads_behind_tokens": (heads_behind_tokens, 16),
}


def projected(batch: int, tokens: int, rope_dim: int, dtype: torch.dtype, shared: bool = True) -> list[Tensor]:
    """Queries, keys, cosines and sines; heads lie behind tokens in memory, as they come from a projection."""
    q, k = (torch.randn(batch, tokens, heads, 16).to(dtype).transpose(1, 2) for heads in (4, 2))
    return [q, k, *(torch.randn(1 if shared else batch, tokens, rope_dim).to(dtype) for _ in range(2))]


FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("symbolic", [False, True], ids=["fixed", "symbolic"])
@pytest.mark.parametrize("dtype", FLOATS, ids=["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", MODELS)
def test_a_rotary_embedding_becomes_the_op(name: str, dtype: torch.dtype, symbolic: bool) -> None:
    """One call for queries and keys, with results that lie in memory as they did."""
    model, rope_dim = MODELS[name]
    rewrite = fuse()
    backend = traced_by(rewrite)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for batch, tokens, shared in ((2, 5, True), (3, 7, True)) if symbolic else ((2, 5, False), (1, 1, True)):
        arguments = projected(batch, tokens, rope_dim, dtype, shared)
        for index, argument in enumerate(arguments if symbolic else ()):
            torch._dynamo.mark_dynamic(argument, [0, 2] if index < 2 else [1])
        plain, truth = model(*arguments), model(*(argument.double() for argument in arguments))
        for actual, expected, exact in zip(compiled(*arguments), plain, truth, strict=True):
            assert_as_right(actual, expected, exact)
            steps = [[step for size, step in zip(x.shape, x.stride(), strict=True) if size > 1] for x in (actual, expected)]
            assert steps[0] == steps[1]
    assert len(backend.graphs) == (1 if symbolic else 2)
    for graph in backend.graphs:
        assert [call for call in calls(graph) if "jitk" in call] == ["jitk.rope_qk.default"]
        assert not {"neg", "cat", "stack"} & {call.rpartition(".")[2] for call in calls(graph)}
    assert short(rewrite.report().counts()) == {"rope_qk": 1}
    assert rewrite.report().missed == ()


# --- what is nearly one -----------------------------------------------------------------------------------


def _by(
    other: Callable[[Tensor], Tensor] = halves,
    of_q: Callable[[Tensor, Tensor], Tensor] = lambda turned, sin: turned * sin,
    unsqueeze: Callable[[Tensor], Tensor] = lambda x: x.unsqueeze(1),
    of_k: Callable[[Tensor], Tensor] = lambda cos: cos,
) -> Callable[..., tuple[Tensor, Tensor]]:
    def function(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = unsqueeze(cos), unsqueeze(sin)
        return q * cos + of_q(other(q), sin), k * of_k(cos) + other(k) * sin

    return function


def _written_between(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = (cos * 1.5).unsqueeze(1), sin.unsqueeze(1)
    q = q * cos + halves(q) * sin
    cos.mul_(2)
    return q, k * cos + halves(k) * sin


def _keys_from_queries(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    q = q * cos + halves(q) * sin
    k = k + q.mean()
    return q, k * cos + halves(k) * sin


def _queries_alone(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return llama(q, k, cos, sin)[0], k


def _other_rows(x: Tensor) -> Tensor:
    return torch.cat((-x[:, 1:, :, 8:], x[:, 1:, :, :8]), -1).repeat_interleave(4 if x.shape[1] == 4 else 2, 1)[:, : x.shape[1]]


MISSES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "no_sign": _by(lambda x: torch.cat((x[..., 8:], x[..., :8]), -1)),
    "other_sign": _by(lambda x: torch.cat((x[..., 8:], -x[..., :8]), -1)),
    "both_signs": _by(lambda x: torch.cat((-x[..., 8:], -x[..., :8]), -1)),
    "same_halves": _by(lambda x: torch.cat((-x[..., :8], x[..., 8:]), -1)),
    "one_half": _by(lambda x: torch.cat((-x[..., 8:], x[..., 8:]), -1)),
    "quarters": _by(lambda x: torch.cat((-x[..., 4:], x[..., :4]), -1)),
    "halves_and_neighbours": _by(lambda x: torch.cat((-x[..., 1::2], x[..., ::2]), -1)),
    "neighbours_the_other_way": _by(lambda x: torch.stack((-x[..., ::2], x[..., 1::2]), -1).flatten(-2)),
    "halves_stacked": _by(lambda x: torch.stack((-x[..., 8:], x[..., :8]), -1).flatten(-2)),
    "along_heads": _by(lambda x: torch.cat((-x[:, x.shape[1] // 2 :], x[:, : x.shape[1] // 2]), 1)),
    "of_other_heads": _by(_other_rows),
    "minus": _by(of_q=lambda turned, sin: -(turned * sin)),
    "cosines_for_sines": _by(of_q=lambda turned, sin: turned * sin.flip(-1)),
    "other_cosines_of_keys": _by(of_k=lambda cos: cos * 2),
    "other_tokens_of_keys": _by(of_k=lambda cos: cos.flip(2)),
    "one_token_for_all": _by(unsqueeze=lambda x: x[:, :1].unsqueeze(1)),
    "one_column_for_all": _by(unsqueeze=lambda x: x[..., :1].unsqueeze(1)),
    "written_between": _written_between,
    "keys_from_queries": _keys_from_queries,
    "queries_alone": _queries_alone,
}


@pytest.mark.parametrize("name", MISSES)
def test_what_is_nearly_one_is_left_alone(name: str) -> None:
    arguments = projected(2, 5, 16, torch.float32)
    rewrite = fuse()
    actual = torch.compile(MISSES[name], fullgraph=True, backend=traced_by(rewrite))(*(x.clone() for x in arguments))
    torch.testing.assert_close(actual, MISSES[name](*(x.clone() for x in arguments)))
    assert rewrite.report().done == ()


@pytest.mark.parametrize("tokens", [2, 3])
def test_angles_of_another_dimension_are_others(tokens: int) -> None:
    """As many heads as tokens, and angles that belong to heads."""

    def function(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
        return q * cos + halves(q) * sin, k * cos + halves(k) * sin

    arguments = [torch.randn(2, tokens, tokens, 16) for _ in range(2)] + [torch.randn(2, tokens, 16) for _ in range(2)]
    rewrite = fuse()
    backend = traced_by(rewrite)
    actual = torch.compile(function, fullgraph=True, backend=backend)(*arguments)
    torch.testing.assert_close(actual, function(*arguments))
    call = next(node for node in backend.graphs[0].nodes if "rope_qk" in str(node.target))
    assert call.kwargs["unsqueeze_dim"] == 2


REASONS: dict[str, tuple[Callable[..., Any], str]] = {
    "queries_alone": (_queries_alone, "what else rope_qk makes is not computed ahead of add"),
    "keys_from_queries": (_keys_from_queries, "k is computed after mean"),
    "written_between": (_written_between, "mul_ is called meanwhile, which may change what it reads or how it computes"),
    "one_token_for_all": (
        MISSES["one_token_for_all"],
        "the op refuses it: dimension 1 of q: it has 5 tokens, cos has 1",
    ),
    "one_order_each": (
        lambda q, k, cos, sin: llama(q, k.contiguous(), cos, sin),
        "its result would have other strides than [160, 80, 16, 1]",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_the_report_says_why(name: str) -> None:
    function, reason = REASONS[name]
    rewrite = fuse(["rope_qk"])
    torch.compile(function, fullgraph=True, backend=traced_by(rewrite))(*projected(2, 5, 16, torch.float32))
    assert rewrite.report().done == ()
    assert reason in [entry.reason for entry in rewrite.report().missed]


# --- where it goes ----------------------------------------------------------------------------------------


def _used_before(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    k = k * 2
    q = q * cos + halves(q) * sin
    early = q.sum(-1)
    return q, k * cos + halves(k) * sin, early


def _keys_come_late(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    q = q * cos + halves(q) * sin
    k = k * 2
    return q, k * cos + halves(k) * sin


def _twice(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """The second op takes results of the first; where they go, either may come first."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    q = q * cos + halves(q) * sin
    again = q * cos + halves(q) * sin
    k = k * cos + halves(k) * sin
    return again, k * cos + halves(k) * sin


def _keys_first(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    k, q = llama(k, q, cos, sin)
    return q, k


def _three(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    return *llama(q, k, cos, sin), llama(q * 2, k, cos, sin)[0]


PLACES = {"used_before": (_used_before, 1), "keys_come_late": (_keys_come_late, 1), "twice": (_twice, 2)}
PLACES |= {"keys_first": (_keys_first, 1), "three": (_three, 1)}


@pytest.mark.parametrize("name", PLACES)
def test_the_op_goes_ahead_of_the_first_use(name: str) -> None:
    function, count = PLACES[name]
    arguments = projected(2, 5, 16, torch.float32)
    rewrite = fuse(["rope_qk"])
    actual = torch.compile(function, fullgraph=True, backend=traced_by(rewrite))(*arguments)
    torch.testing.assert_close(actual, function(*arguments))
    assert short(rewrite.report().counts()) == {"rope_qk": count}


# --- gradients --------------------------------------------------------------------------------------------


def _loss(results: tuple[Tensor, ...]) -> Tensor:
    return sum(((index + 1) * result.double().square()).mean() for index, result in enumerate(results))


USES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = {
    "both": lambda q, k: (q, k),
    "several_times": lambda q, k: (q, k, q @ k.repeat_interleave(2, 1).mT, q.sum(), k[:, :1] * 3),
    "one": lambda q, k: (q * 2, k.detach()),
}


@pytest.mark.parametrize("angles", [False, True], ids=["angles_fixed", "angles_trained"])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", ["llama", "phi", "glm", "cohere"])
def test_gradients(name: str, use: str, angles: bool) -> None:
    model, rope_dim = MODELS[name]
    rewrite = fuse()
    compiled = torch.compile(lambda *given: USES[use](*model(*given)), fullgraph=True, backend=traced_by(rewrite))
    plain = lambda *given: USES[use](*model(*given))  # noqa: E731
    given = projected(2, 5, rope_dim, torch.bfloat16)
    grads = []
    for function, dtype in ((compiled, None), (plain, None), (plain, torch.float64)):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_(index < 2 or angles) for index, x in enumerate(given)]
        _loss(function(*leaves)).backward()
        grads.append([leaf.grad for leaf in leaves])
    for grad, expected, exact in zip(*grads, strict=True):
        if expected is None:  # no gradient comes to it; of an op with two results they are zeros
            assert grad is None or not grad.any()
        else:
            assert_as_right(grad, expected, exact)
    assert short(rewrite.report().counts()) == {"rope_qk": 1}


def test_keys_without_a_gradient_stay_without_one() -> None:
    q, k, cos, sin = projected(2, 5, 16, torch.float32)
    rewrite = fuse(["rope_qk"])
    compiled = torch.compile(llama, fullgraph=True, backend=traced_by(rewrite))
    results = compiled(q.requires_grad_(), k, cos, sin)
    assert [result.requires_grad for result in results] == [True, False]
    assert [entry.reason for entry in rewrite.report().missed if "derivative" in entry.reason] == [
        "add needs a derivative, and add_1 does not"
    ]


def test_autocast_gives_fp32_where_angles_are() -> None:
    """Half queries times fp32 angles are fp32 in the model; the op's results would not be."""
    q, k, cos, sin = projected(2, 5, 16, torch.float32)
    weight = torch.randn(16, 16)

    def function(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return llama(q @ weight, k @ weight, cos, sin)

    rewrite = fuse()
    compiled = torch.compile(function, fullgraph=True, backend=traced_by(rewrite))
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = compiled(q, k, cos, sin), function(q, k, cos, sin)
        halved = compiled(q, k, cos.bfloat16(), sin.bfloat16())
    torch.testing.assert_close(actual, expected)
    assert actual[0].dtype == torch.float32 and halved[0].dtype == torch.bfloat16
    assert short(rewrite.report().counts()) == {"rope_qk": 1}, "of the halves"
