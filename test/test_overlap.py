"""Arguments that share memory: which are refused, with a kernel and without one, and that no other is."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_jit_ops import OpLibrary, registry
from torch_jit_ops.calling import overlap

_TOUCH = """
#include <jitk/result.h>
#include <jitk/tensor.h>
template <typename T>
void touch(jitk::TensorView, jitk::TensorView) {}
template <typename T>
void reverse(jitk::TensorView x, jitk::Output& out) { out.empty_like(x); }
"""

jitk = torch.ops.jitk


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An op that takes whatever it is given, and one that nothing says may be written in place."""
    folder = tmp_path_factory.mktemp("overlaplib")
    (folder / "touch.cpp").write_text(_TOUCH)
    made = OpLibrary("overlaplib", csrc=folder)
    dtypes = (torch.uint8, torch.int16, torch.float32)

    @made.op(cpu="touch.cpp", variant="touch<{y.dtype}>", dtypes=dtypes, mutates=("y",))
    def touch(x: Tensor, y: Tensor) -> None:
        return None

    @made.op(cpu="touch.cpp", variant="reverse<{x.dtype}>", dtypes=dtypes, rows=("x",))
    def reverse(x: Tensor) -> Tensor:
        return x.flip(-1)

    @made.op(mutates=("y",))
    def touch_without(x: Tensor, y: Tensor) -> None:
        return None

    yield made
    registry.remove(made)


def _bytes(tensor: Tensor) -> list[int]:
    """The places of all bytes of all elements."""
    places = []
    for index in itertools.product(*map(range, tensor.shape)):
        first = tensor.data_ptr() + tensor.element_size() * sum(map(int.__mul__, index, tensor.stride()))
        places += range(first, first + tensor.element_size())
    return places


def _view(memory: Tensor, draw: random.Random) -> Tensor:
    dtype = draw.choice((torch.uint8, torch.int16, torch.float32))
    typed = memory.view(dtype)
    while True:
        shape = [draw.choice((0, 1, 2, 3, 5)) if draw.random() < 0.9 else 7 for _ in range(draw.randrange(4))]
        stride = [draw.choice((0, 1, 1, 2, 3, 4, 6, 8, 12)) for _ in shape]
        span = sum((size - 1) * step for size, step in zip(shape, stride, strict=True) if size > 0)
        if span < typed.numel():
            return typed.as_strided(shape, stride, draw.randrange(typed.numel() - span))


def _refusal(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    try:
        function(*args, **kwargs)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("seed", range(4))
def test_random_views_are_told_exactly(library: OpLibrary, seed: int) -> None:
    draw = random.Random(seed)
    memory = torch.zeros(96, dtype=torch.uint8)
    found = {"": 0, "elements": 0, "shares": 0}
    for _ in range(500):
        x, y = _view(memory, draw), _view(memory, draw)
        places = _bytes(y)
        expected = "elements" if len(set(places)) < len(places) else "shares" if set(places) & set(_bytes(x)) else ""
        for op in (library.ops["touch"], library.ops["touch_without"]):
            said = _refusal(op, x, y)
            about = (x.shape, x.stride(), x.storage_offset(), x.dtype, y.shape, y.stride(), y.storage_offset(), y.dtype)
            assert (expected in said) if expected else not said, (about, said)
            assert said.replace("_without", "") == _refusal(library.ops["touch"], x, y)
        found[expected] += 1
    assert min(found.values()) > 25, found


# --- what models do -----------------------------------------------------------------------------------


def test_disjoint_parts_of_one_buffer_are_written() -> None:
    qkv = torch.randn(7, (4 + 2 + 2) * 16)
    weight = torch.randn(16)
    q, k = qkv[:, :64].view(7, 4, 16), qkv[:, 64:96].view(7, 2, 16)
    expected = q.clone(), k.clone()
    jitk.fused_qknorm(*expected, weight, weight)
    jitk.fused_qknorm(q, k, weight, weight)
    assert torch.equal(q, expected[0]) and torch.equal(k, expected[1])


def test_splits_and_interleavings_do_not_overlap(library: OpLibrary) -> None:
    touch = library.ops["touch"]
    pairs = torch.zeros(64, 128, 2)
    touch(pairs[..., 0], pairs[..., 1])
    cache = torch.zeros(2000, 2, 16, 8, 64)
    touch(cache[:, 0], cache[:, 1])
    heads = torch.zeros(4096, 32, 128).transpose(0, 1)
    touch(heads[:8], heads[8:])
    touch(heads[..., :96], heads[..., 96:])
    every = torch.zeros(100_000)
    touch(every[::2], every[1::6])
    touch(every[:0], every)
    touch(every.expand(3, -1), torch.zeros(3))
    assert "shares" in _refusal(touch, every[::2], every[::3])


@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul"])
@pytest.mark.parametrize("half", [0, 1])
def test_either_half_of_the_input_takes_the_result(name: str, half: int) -> None:
    x = torch.randn(33, 2 * 101)
    expected = getattr(jitk, name)(x)
    out = x.chunk(2, -1)[half]
    getattr(jitk, name).out(x, out=out)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("shape", [(7, 64), (3, 5, 101), (2, 8448)])
def test_the_input_takes_the_result(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape[-1])
    for op, *rest in ((jitk.rmsnorm, weight), (jitk.gemma_rmsnorm, weight), (jitk.layernorm, weight, weight), (jitk.relu2,)):
        x = torch.randn(*shape)
        expected = op(x, *rest)
        op.out(x, *rest, out=x)
        assert torch.equal(x, expected)
    for place in (0, 1):
        both = [torch.randn(*shape), torch.randn(*shape)]
        expected = jitk.silu_mul(*both)
        jitk.silu_mul.out(*both, out=both[place])
        assert torch.equal(both[place], expected)


@pytest.mark.parametrize("name", ["rmsnorm_backward", "layernorm_backward"])
@pytest.mark.parametrize("place", [0, 1])
def test_a_gradient_takes_the_result(name: str, place: int) -> None:
    tensors = [torch.randn(300, 101), torch.randn(300, 101)]
    weight = torch.randn(101)
    expected = getattr(jitk, name)(*tensors, weight)
    sums = {key: torch.empty(101) for key in ("grad_weight", "grad_bias")[: len(expected) - 1]}
    getattr(jitk, name).out(*tensors, weight, grad_input=tensors[place], **sums)
    assert torch.equal(tensors[place], expected[0])
    for made, sum in zip(sums.values(), expected[1:], strict=True):
        assert torch.equal(made, sum)


def test_two_outputs_in_one_place() -> None:
    x, weight, sums = torch.randn(5, 64), torch.randn(64), torch.empty(64)
    with pytest.raises(RuntimeError) as error:
        jitk.layernorm_backward.out(x, x, weight, grad_input=torch.empty(5, 64), grad_weight=sums, grad_bias=sums)
    assert str(error.value) == (
        "jitk::layernorm_backward.out: argument 'grad_weight' is written, but shares memory with argument 'grad_bias'\n"
        "  'grad_weight' [64] with strides [1] begins where\n"
        "  'grad_bias' [64] with strides [1] does\n"
        "  remedy: memory of its own for one of them"
    )


_SHARING = {
    "one tensor for two": (
        lambda b, w: jitk.fused_add_rmsnorm(b, b, w),
        "jitk::fused_add_rmsnorm: argument 'input' is written, but shares memory with argument 'residual'\n"
        "  'input' [6, 64] with strides [64, 1] begins where\n"
        "  'residual' [6, 64] with strides [64, 1] does\n"
        "  remedy: memory of its own for one of them",
    ),
    "a shifted slice": (
        lambda b, w: jitk.rmsnorm.out(b[:5], w, out=b[1:]),
        "jitk::rmsnorm.out: argument 'out' is written, but shares memory with argument 'input'\n"
        "  'out' [5, 64] with strides [64, 1] begins 256 bytes behind\n"
        "  'input' [5, 64] with strides [64, 1]\n"
        "  remedy: memory of its own for one of them, or 'out' exactly in the place of 'input'",
    ),
    "a weight inside the input": (
        lambda b, w: jitk.rmsnorm.out(b[:5], b[5], out=b[1:]),
        "jitk::rmsnorm.out: argument 'out' is written, but shares memory with argument 'input'\n"
        "  'out' [5, 64] with strides [64, 1] begins 256 bytes behind\n"
        "  'input' [5, 64] with strides [64, 1]\n"
        "  remedy: memory of its own for one of them, or 'out' exactly in the place of 'input'",
    ),
    "a weight inside the output": (
        lambda b, w: jitk.rmsnorm.out(b, b[2], out=b),
        "jitk::rmsnorm.out: argument 'out' is written, but shares memory with argument 'weight'\n"
        "  'out' [6, 64] with strides [64, 1] begins 512 bytes before\n"
        "  'weight' [64] with strides [1]\n"
        "  remedy: memory of its own for one of them",
    ),
    "beside the half": (
        lambda b, w: jitk.silu_and_mul.out(b, out=b[:, 1:33]),
        "jitk::silu_and_mul.out: argument 'out' is written, but shares memory with argument 'input'\n"
        "  'out' [6, 32] with strides [64, 1] begins 4 bytes behind\n"
        "  'input' [6, 64] with strides [64, 1]\n"
        "  remedy: memory of its own for one of them, or 'out' exactly in the place of 'input'",
    ),
    "heads that overlap": (
        lambda b, w: jitk.fused_qknorm(b.view(6, 4, 16)[:, :3], b.view(6, 4, 16)[:, 2:], w[:16], w[:16]),
        "jitk::fused_qknorm: argument 'q' is written, but shares memory with argument 'k'\n"
        "  'q' [6, 3, 16] with strides [64, 16, 1] begins 128 bytes before\n"
        "  'k' [6, 2, 16] with strides [64, 16, 1]\n"
        "  remedy: memory of its own for one of them",
    ),
    "rows that overlap": (
        lambda b, w: jitk.relu2.out(b, out=torch.empty(200).as_strided((6, 64), (5, 1))),
        "jitk::relu2.out: argument 'out' is written, but its elements overlap\n  'out' [6, 64] with strides [5, 1]",
    ),
}


@pytest.mark.parametrize("case", _SHARING)
def test_what_is_refused_and_how(case: str) -> None:
    call, text = _SHARING[case]
    buffer = torch.randn(6, 64)
    before = buffer.clone()
    with pytest.raises(RuntimeError) as error:
        call(buffer, torch.ones(64))
    assert str(error.value) == text
    assert torch.equal(buffer, before)


def test_without_a_declaration_no_place_is_taken(library: OpLibrary) -> None:
    x = torch.randn(4, 8)
    assert "shares memory with argument 'x'" in _refusal(library.ops["reverse"].out, x, out=x)
    with torch.inference_mode():
        assert "shares memory with argument 'x'" in _refusal(library.ops["reverse"].out, x, out=x)


def test_the_place_of_an_argument() -> None:
    x = torch.zeros(4, 12)
    takes = overlap._takes_the_place
    assert takes(x, x) and takes(x[:, :4], x) and takes(x[:, 8:], x) and takes(x[:, 4:5], x)
    assert takes(torch.zeros(()), torch.zeros(())) is False
    for other in (
        x[:, :5],
        x[:, 2:6],
        x[:3],
        x.t(),
        x[1:],
        x.view(torch.int32),
        x[:, ::2],
        x.view(-1)[1:].as_strided((4, 12), (11, 1)),
    ):
        assert not takes(other, x)


# --- lazy views --------------------------------------------------------------------------------------


def _negative(x: Tensor) -> Tensor:
    """A tensor whose memory holds ``-x``."""
    return torch._neg_view((-x).clone())


def test_tensors_with_the_negative_bit() -> None:
    x, residual, weight = torch.randn(3, 64), torch.randn(3, 64), torch.randn(64)
    assert torch.equal(jitk.rmsnorm(_negative(x), _negative(weight)), jitk.rmsnorm(x, weight))
    assert torch.equal(jitk.silu_mul(x, _negative(residual)), jitk.silu_mul(x, residual))
    expected = x.clone(), residual.clone()
    jitk.fused_add_rmsnorm(*expected, weight)
    for bits in itertools.product((False, True), repeat=3):
        given = [_negative(tensor) if bit else tensor.clone() for tensor, bit in zip((x, residual, weight), bits, strict=True)]
        version = given[0]._version
        assert jitk.fused_add_rmsnorm(*given) is None
        assert torch.equal(given[0], expected[0]) and torch.equal(given[1], expected[1])
        assert given[0]._version > version and given[0].is_neg() is bits[0]
    out = _negative(torch.zeros(3, 64))
    returned = jitk.rmsnorm.out(x, weight, out=out)
    assert torch.equal(out, jitk.rmsnorm(x, weight)) and (returned is None or returned is out)


def test_the_imaginary_part_of_a_conjugate_is_written() -> None:
    z = torch.randn(3, 64, dtype=torch.complex64)
    imaginary, residual, weight = z.conj().imag, torch.randn(3, 64), torch.ones(64)
    expected = imaginary.clone(), residual.clone()
    jitk.fused_add_rmsnorm(*expected, weight)
    before = z.real.clone()
    with torch.inference_mode():
        jitk.fused_add_rmsnorm(imaginary, residual, weight)
    assert torch.equal(-z.imag, expected[0]) and torch.equal(residual, expected[1]) and torch.equal(z.real, before)


def test_a_lazy_view_does_not_hide_what_it_shares() -> None:
    y = torch.randn(3, 64)
    with pytest.raises(RuntimeError, match="argument 'input' is written, but shares memory with argument 'residual'"):
        jitk.fused_add_rmsnorm(torch._neg_view(y), y, torch.ones(64))
