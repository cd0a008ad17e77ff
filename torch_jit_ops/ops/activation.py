"""Gated activations and relatives of relu, and the tutorial op ``add_constant``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_jit_ops.declaring.rows import Rows
from torch_jit_ops.declaring.samples import Sample, SampleMaker
from torch_jit_ops.ops import spelling
from torch_jit_ops.ops.library import FLOATS, library

_SILU = spelling.gates(F.silu)
_GELU = spelling.gates(F.gelu)
_GELU_TANH = spelling.gates(spelling.gelu_tanh, spelling.gelu_tanh_written_out)
_GATE_AND_UP = {
    "gate": f"[shape...] {FLOATS} rows",
    "up": "[shape...] gate.dtype rows",
    "out": "[shape...] gate.dtype rows",
}


def _gated(make: SampleMaker) -> Iterator[Sample]:
    yield Sample((make.randn(7, 2 * 64),), note="one vector and more in a row")
    yield Sample((make.randn(3, 5, 2 * 96),), note="two leading dimensions")
    yield Sample((make.randn(2 * 1000),), note="no leading dimension")
    yield Sample((make.randn(33, 2 * 101, scale=20),), note="odd width: halves that no vector fits, and saturated values")
    yield Sample((make.randn(5, 2 * 12),), note="rows that only a narrow vector fits")
    yield Sample((make.randn(2, 2 * 11008, scale=3),), note="a real model's width")
    yield Sample((make.randn(1, 0),), note="no columns")


def _unary(make: SampleMaker) -> Iterator[Sample]:
    yield Sample((make.randn(7, 64),), note="vectors")
    yield Sample((make.randn(3, 5, 101),), note="odd width, dense: one long row")
    yield Sample((make.randn(1),), note="one element")
    yield Sample((make.randn(),), note="no dimension")
    yield Sample((make.randn(4096, 33, scale=100),), note="many blocks and a tail")


def _binary(make: SampleMaker) -> Iterator[Sample]:
    for sample in _unary(make):
        yield Sample((sample.args[0], make.randn(*sample.args[0].shape)), note=sample.note)


def _gate_and_up(make: SampleMaker) -> Iterator[Sample]:
    for shape, note in (
        ((7, 64), "vectors"),
        ((3, 5, 101), "odd width, dense: one long row"),
        ((), "no dimension"),
        ((1000, 33), "many blocks and a tail"),
    ):
        yield Sample((make.randn(*shape, scale=3), make.randn(*shape)), note=note)


def _constants(make: SampleMaker) -> Iterator[Sample]:
    yield Sample((make.randn(1000), 5), note="vectors and a tail")
    yield Sample((make.randn(3, 7), -3), note="two dimensions, a negative constant")
    yield Sample((make.randn(1), 2**31 - 1), note="wraps around")


@library.op(
    cuda="activation.cu",
    cpu="activation.cpp",
    variant="silu_and_mul<{input.dtype}>",
    tensors={"input": f"[tokens..., 2*d] {FLOATS} rows", "out": "[tokens..., d] input.dtype rows"},
    rows=Rows("input"),
    reusable=("input",),
    samples=_gated,
    patterns=spelling.of_halves(_SILU),
)
def silu_and_mul(input: Tensor) -> Tensor:
    """``silu(gate) * up``, where gate and up are the two halves of the last dimension (SwiGLU; Shazeer, arXiv:2002.05202).

    Args:
        input: ``[..., 2 * d]``, fp16, bf16 or fp32; rows may have any stride.

    Returns:
        ``[..., d]``, contiguous, of the same dtype; computed in fp32 and rounded once.
    """
    gate, up = input.chunk(2, -1)
    return F.silu(gate) * up


@library.op(
    cuda="activation.cu",
    cpu="activation.cpp",
    variant="gelu_and_mul<{input.dtype}>",
    tensors={"input": f"[tokens..., 2*d] {FLOATS} rows", "out": "[tokens..., d] input.dtype rows"},
    rows=Rows("input"),
    reusable=("input",),
    samples=_gated,
    patterns=spelling.of_halves(_GELU),
)
def gelu_and_mul(input: Tensor) -> Tensor:
    """``gelu(gate) * up`` with the exact gelu, ``x * Phi(x)`` (GEGLU; Shazeer, arXiv:2002.05202).

    Args:
        input: ``[..., 2 * d]``, fp16, bf16 or fp32; rows may have any stride.

    Returns:
        ``[..., d]``, contiguous, of the same dtype; computed in fp32 and rounded once.
    """
    gate, up = input.chunk(2, -1)
    return F.gelu(gate) * up


@library.op(
    cuda="activation.cu",
    cpu="activation.cpp",
    variant="gelu_tanh_and_mul<{input.dtype}>",
    tensors={"input": f"[tokens..., 2*d] {FLOATS} rows", "out": "[tokens..., d] input.dtype rows"},
    rows=Rows("input"),
    reusable=("input",),
    samples=_gated,
    patterns=spelling.of_halves(_GELU_TANH),
)
def gelu_tanh_and_mul(input: Tensor) -> Tensor:
    """``gelu(gate) * up`` with gelu's tanh approximation (Hendrycks and Gimpel, arXiv:1606.08415), as Gemma uses it.

    Args:
        input: ``[..., 2 * d]``, fp16, bf16 or fp32; rows may have any stride.

    Returns:
        ``[..., d]``, contiguous, of the same dtype; computed in fp32 and rounded once.
    """
    gate, up = input.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


@library.op(
    cuda="activation.cu",
    cpu="activation.cpp",
    variant="silu_mul<{gate.dtype}>",
    tensors=_GATE_AND_UP,
    rows=Rows("gate", "up", elementwise=True),
    samples=_gate_and_up,
    patterns=_SILU,
)
def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``: ``silu_and_mul`` where two matrix products give gate and up, as in Hugging Face's Llama.

    Args:
        gate: any shape, fp16, bf16 or fp32; rows of the last dimension may have any stride.
        up: shape, dtype and device of ``gate``.

    Returns:
        The shape of ``gate``, contiguous, of the same dtype; computed in fp32 and rounded once.
    """
    return F.silu(gate) * up


@library.op(
    cuda="activation.cu",
    cpu="activation.cpp",
    variant="gelu_mul<{gate.dtype}>",
    tensors=_GATE_AND_UP,
    rows=Rows("gate", "up", elementwise=True),
    samples=_gate_and_up,
    patterns=_GELU,
)
def gelu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """``gelu(gate) * up`` with the exact gelu: ``gelu_and_mul`` of two tensors.

    Args:
        gate: any shape, fp16, bf16 or fp32; rows of the last dimension may have any stride.
        up: shape, dtype and device of ``gate``.

    Returns:
        The shape of ``gate``, contiguous, of the same dtype; computed in fp32 and rounded once.
    """
    return F.gelu(gate) * up


@library.op(
    cuda="activation.cu",
    cpu="activation.cpp",
    variant="gelu_tanh_mul<{gate.dtype}>",
    tensors=_GATE_AND_UP,
    rows=Rows("gate", "up", elementwise=True),
    samples=_gate_and_up,
    patterns=_GELU_TANH,
)
def gelu_tanh_mul(gate: Tensor, up: Tensor) -> Tensor:
    """``gelu(gate) * up`` with gelu's tanh approximation: ``gelu_tanh_and_mul`` of two tensors, as in Hugging Face's Gemma.

    Args:
        gate: any shape, fp16, bf16 or fp32; rows of the last dimension may have any stride.
        up: shape, dtype and device of ``gate``.

    Returns:
        The shape of ``gate``, contiguous, of the same dtype; computed in fp32 and rounded once.
    """
    return F.gelu(gate, approximate="tanh") * up


@library.op(
    cuda="activation.cu",
    cpu="activation.cpp",
    variant="relu2<{input.dtype}>",
    tensors={"input": f"[shape...] {FLOATS} rows", "out": "[shape...] input.dtype rows"},
    rows=Rows("input", elementwise=True),
    samples=_unary,
    patterns=(),
)
def relu2(input: Tensor) -> Tensor:
    """``relu(input) ** 2`` (Primer; So et al., arXiv:2109.08668).

    Args:
        input: any shape, fp16, bf16 or fp32; rows of the last dimension may have any stride.

    Returns:
        The input's shape, contiguous, of the same dtype; computed in fp32 and rounded once.
    """
    return F.relu(input).square()


@library.op(
    cuda="activation.cu",
    cpu="activation.cpp",
    variant="fused_add_relu<{x.dtype}>",
    tensors={"x": f"[shape...] {FLOATS} rows", "y": "[shape...] x.dtype rows", "out": "[shape...] x.dtype rows"},
    rows=Rows("x", "y", elementwise=True),
    samples=_binary,
)
def fused_add_relu(x: Tensor, y: Tensor) -> Tensor:
    """``relu(x + y)``.

    Args:
        x: any shape, fp16, bf16 or fp32; rows of the last dimension may have any stride.
        y: shape, dtype and device of ``x``.

    Returns:
        The shape of ``x``, contiguous, of the same dtype; computed in fp32 and rounded once.
    """
    return F.relu(x + y)


@library.op(
    cuda="add_constant.cu",
    cpu="add_constant.cpp",
    variant="add_constant<{constant}>",
    tensors={"src": "[shape...] int32", "out": "[shape...] int32"},
    dtypes=(torch.int32,),
    reusable=("src",),
    samples=_constants,
)
def add_constant(src: Tensor, constant: int) -> Tensor:
    """``src + constant``: the tutorial op. The constant is a template argument, so each one is a kernel of its own.

    Args:
        src: any shape, int32, contiguous.
        constant: fits into an int32; sums wrap around.

    Returns:
        The shape and dtype of ``src``.
    """
    return src + constant
