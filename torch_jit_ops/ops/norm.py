"""RMS and layer normalisation over the last dimension: alone, after a residual addition, in Gemma's form, of queries and keys.

Statistics and arithmetic are fp32 whatever the input, and the output is rounded once. (Hugging Face's Llama and
vLLM's form in PyTorch round ``x / rms(x)`` to the input's dtype before they multiply by the weight: two roundings, so up to one
unit in the last place apart. vLLM's CUDA kernel and Gemma's form round once, there as here.)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torch_jit_ops.declaring.rows import Rows
from torch_jit_ops.declaring.samples import Sample, SampleMaker
from torch_jit_ops.ops import spelling
from torch_jit_ops.ops.library import FLOATS, library


def _wide(x: Tensor) -> Tensor:
    """fp32 of a half type; fp32 and fp64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _inverse_deviation(centred: Tensor, eps: float) -> Tensor:
    """NaN where the sum of squares overflows, as in PyTorch: it tells nothing of the deviation, and 1 / inf would hide that."""
    variance = centred.square().mean(-1, keepdim=True)
    return torch.rsqrt(variance + eps) + 0 * variance


def _layer_norm_written_out(input: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    x = _wide(input)
    x = x - x.mean(-1, keepdim=True)
    y = x * _inverse_rms(x, eps) * weight
    return (y if bias is None else y + bias).to(input.dtype)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = _wide(x)
    return (wide * _inverse_rms(wide, eps) * weight).to(x.dtype)


# --- what tensors must be -------------------------------------------------------------------------

# A weight's dtype is its own: it is not rounded to the input's.
_INPUT = {"input": f"[tokens..., hidden] {FLOATS} rows", "weight": f"[hidden] {FLOATS}"}
_NORM = {**_INPUT, "out": "[tokens..., hidden] input.dtype rows"}
_ADDED = {**_INPUT, "residual": "[tokens..., hidden] input.dtype rows"}
_GRADIENT = {
    **_INPUT,
    "grad": f"[tokens..., hidden] {FLOATS} rows",
    "input": "[tokens..., hidden] grad.dtype rows",
    "grad_input": "[tokens..., hidden] grad.dtype rows",
    "grad_weight": "[hidden] weight.dtype",
}


# --- samples --------------------------------------------------------------------------------------


def _inputs(make: SampleMaker) -> Iterator[tuple[Tensor, str]]:
    yield make.randn(7, 64), "a few rows to a warp"
    yield make.randn(3, 5, 4096), "two leading dimensions, a row to a block"
    yield make.randn(33, 101, scale=20), "odd width, which no vector fits"
    yield make.randn(1000), "no leading dimension; threads without a vector"
    yield make.randn(300, 512, scale=0.01), "many short rows, small values"
    yield make.randn(2, 8448) + 50, "more vectors than threads, a large mean"
    yield make.randn(3, 65536), "a long row"
    yield make.randn(5, 1), "one column"
    yield make.randn(4, 0), "no columns"


def _rms_norms(make: SampleMaker) -> Iterator[Sample]:
    for x, note in _inputs(make):
        yield Sample((x, make.randn(x.shape[-1])), note=note)
    yield Sample((make.randn(6, 896), make.randn(896, dtype=torch.float32), 1e-5), note="fp32 weight, eps given")
    yield Sample((make.randn(4, 24) * 1e-4, make.randn(24), 0.0), note="no eps, tiny values")


def _layer_norms(make: SampleMaker) -> Iterator[Sample]:
    for index, (x, note) in enumerate(_inputs(make)):
        bias = (make.randn(x.shape[-1]),) if index % 2 == 0 else ()
        yield Sample((x, make.randn(x.shape[-1]), *bias), note=note)
    weights = [make.randn(896, dtype=torch.float32) for _ in range(2)]
    yield Sample((make.randn(6, 896), *weights, 1e-6), note="fp32 weight and bias, eps given")


def _added(make: SampleMaker) -> Iterator[Sample]:
    for x, note in _inputs(make):
        yield Sample((x, make.randn(*x.shape), make.randn(x.shape[-1])), note=note)
    shape = (6, 896)
    weight = make.randn(896, dtype=torch.float32)
    yield Sample((make.randn(*shape), make.randn(*shape), weight, 1e-5), note="fp32 weight, eps given")


def _queries_and_keys(make: SampleMaker) -> Iterator[Sample]:
    def sample(tokens: int, q_heads: int, k_heads: int, head_dim: int, note: str, dtype: torch.dtype | None = None) -> Sample:
        q, k = make.randn(tokens, q_heads, head_dim), make.randn(tokens, k_heads, head_dim)
        return Sample((q, k, make.randn(head_dim, dtype=dtype), make.randn(head_dim, dtype=dtype)), note=note)

    yield sample(5, 4, 2, 128, "grouped queries")
    yield sample(3, 8, 1, 64, "one head of keys")
    yield sample(77, 2, 2, 80, "as many heads; lanes without a vector")
    yield sample(2, 3, 1, 96, "a head_dim that is no power of two")
    yield sample(2, 5, 1, 192, "more vectors than half a warp")
    yield sample(4, 4, 4, 256, "a vector for each lane")
    yield sample(2, 6, 2, 512, "two vectors for each lane", torch.float32)
    yield sample(1, 2, 1, 1024, "a wide head")
    yield sample(9, 3, 1, 70, "a head_dim that no vector fits")


def _gradients(make: SampleMaker) -> Iterator[Sample]:
    for x, note in _inputs(make):
        yield Sample((make.randn(*x.shape), x, make.randn(x.shape[-1])), note=note)
    weight = make.randn(896, dtype=torch.float32)
    yield Sample((make.randn(600, 896), make.randn(600, 896), weight, 1e-5), note="many rows, fp32 weight, eps given")


# --- ops ------------------------------------------------------------------------------------------


def _differentiate_rmsnorm(grad: Tensor, input: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return rmsnorm_backward(grad.contiguous(), input, weight, eps)


def _differentiate_gemma_rmsnorm(grad: Tensor, input: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    grad_input, grad_weight = rmsnorm_backward(grad.contiguous(), input, _wide(weight) + 1, eps)
    return grad_input, grad_weight.to(weight.dtype)


def _differentiate_layernorm(
    grad: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    grads = layernorm_backward(grad.contiguous(), input, weight, eps)
    return grads if bias is not None else grads[:2]


@library.op(
    cuda="norm.cu",
    cpu="norm.cpp",
    variant="rmsnorm<{input.dtype}, {weight.dtype}>",
    tensors=_NORM,
    rows=Rows("input"),
    reusable=("input",),
    samples=_rms_norms,
    backward=_differentiate_rmsnorm,
    patterns=spelling.RMS_NORMS,
)
def rmsnorm(input: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """``input / sqrt(mean(input ** 2) + eps) * weight`` over the last dimension (Zhang and Sennrich, arXiv:1910.07467).

    Args:
        input: ``[..., hidden]``, fp16, bf16 or fp32; rows may have any stride.
        weight: ``[hidden]``, fp16, bf16 or fp32.
        eps: added to the mean square.

    Returns:
        The input's shape, contiguous, of its dtype; computed in fp32 and rounded once.
    """
    return _rms_norm(input, weight, eps)


@library.op(
    cuda="norm.cu",
    cpu="norm.cpp",
    variant="gemma_rmsnorm<{input.dtype}, {weight.dtype}>",
    tensors=_NORM,
    rows=Rows("input"),
    reusable=("input",),
    samples=_rms_norms,
    backward=_differentiate_gemma_rmsnorm,
    patterns=(),
)
def gemma_rmsnorm(input: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """``rmsnorm`` with ``weight + 1`` for the weight, the sum taken in fp32, as Gemma stores its weights.

    Args:
        input: ``[..., hidden]``, fp16, bf16 or fp32; rows may have any stride.
        weight: ``[hidden]``, fp16, bf16 or fp32.
        eps: added to the mean square.

    Returns:
        The input's shape, contiguous, of its dtype; computed in fp32 and rounded once.
    """
    return _rms_norm(input, _wide(weight) + 1, eps)


@library.op(
    cuda="norm.cu",
    cpu="norm.cpp",
    variant="layernorm<{input.dtype}, {weight.dtype}>",
    tensors={**_NORM, "bias": "[hidden] weight.dtype"},
    rows=Rows("input"),
    reusable=("input",),
    samples=_layer_norms,
    backward=_differentiate_layernorm,
    patterns=(_layer_norm_written_out, spelling.layer_norm_of_pytorch, spelling.layer_norm_narrow),
)
def layernorm(input: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """``(input - mean) / sqrt(variance + eps) * weight + bias`` over the last dimension (Ba et al., arXiv:1607.06450).

    The variance is the mean of squared distances from the mean, without Bessel's correction; it is not computed as a
    difference of two large numbers.

    Args:
        input: ``[..., hidden]``, fp16, bf16 or fp32; rows may have any stride.
        weight: ``[hidden]``, fp16, bf16 or fp32.
        bias: ``[hidden]``, dtype of ``weight``.
        eps: added to the variance.

    Returns:
        The input's shape, contiguous, of its dtype; computed in fp32 and rounded once.
    """
    x = _wide(input)
    x = x - x.mean(-1, keepdim=True)
    y = x * _inverse_deviation(x, eps) * weight
    return (y if bias is None else y + bias).to(input.dtype)


@library.op(
    cuda="norm.cu",
    cpu="norm.cpp",
    variant="fused_add_rmsnorm<{input.dtype}, {weight.dtype}>",
    mutates=("input", "residual"),
    tensors=_ADDED,
    rows=Rows("input", "residual"),
    samples=_added,
    patterns=spelling.after_addition(spelling.RMS_NORMS),
)
def fused_add_rmsnorm(input: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> None:
    """``residual += input``, then ``input = rmsnorm(residual)``, both in place.

    The sum is rounded to the tensors' dtype, and the rounded sum is normalised: what the two steps give one after the other.

    Args:
        input: ``[..., hidden]``, fp16, bf16 or fp32; rows may have any stride. Receives the norm.
        residual: shape and dtype of ``input``; rows may have any stride. Receives the sum.
        weight: ``[hidden]``, fp16, bf16 or fp32.
        eps: added to the mean square.
    """
    residual.add_(input)
    input.copy_(_rms_norm(residual, weight, eps))


@library.op(
    cuda="norm.cu",
    cpu="norm.cpp",
    variant="gemma_fused_add_rmsnorm<{input.dtype}, {weight.dtype}>",
    mutates=("input", "residual"),
    tensors=_ADDED,
    rows=Rows("input", "residual"),
    samples=_added,
    patterns=(),
)
def gemma_fused_add_rmsnorm(input: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> None:
    """``fused_add_rmsnorm`` with ``weight + 1`` for the weight, the sum taken in fp32.

    Args:
        input: ``[..., hidden]``, fp16, bf16 or fp32; rows may have any stride. Receives the norm.
        residual: shape and dtype of ``input``; rows may have any stride. Receives the sum.
        weight: ``[hidden]``, fp16, bf16 or fp32.
        eps: added to the mean square.
    """
    residual.add_(input)
    input.copy_(_rms_norm(residual, _wide(weight) + 1, eps))


@library.op(
    cuda="norm.cu",
    cpu="norm.cpp",
    variant="fused_qknorm<{q.dtype}, {q_weight.dtype}>",
    mutates=("q", "k"),
    tensors={
        "q": f"[tokens, q_heads, head_dim] {FLOATS} strides [*, *, 1]",
        "k": "[tokens, k_heads, head_dim] q.dtype strides [*, *, 1]",
        "q_weight": f"[head_dim] {FLOATS}",
        "k_weight": "[head_dim] q_weight.dtype",
    },
    rows=Rows("q", "k"),
    samples=_queries_and_keys,
)
def fused_qknorm(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float = 1e-6) -> None:
    """``rmsnorm`` of each head of the queries and of the keys, in place and in one launch (as in Qwen3 and Gemma 3).

    Args:
        q: ``[tokens, q_heads, head_dim]``, fp16, bf16 or fp32; tokens and heads may have any strides.
        k: ``[tokens, k_heads, head_dim]``, dtype of ``q``; tokens and heads may have any strides.
        q_weight: ``[head_dim]``, fp16, bf16 or fp32.
        k_weight: ``[head_dim]``, dtype of ``q_weight``.
        eps: added to the mean square.
    """
    q.copy_(_rms_norm(q, q_weight, eps))
    k.copy_(_rms_norm(k, k_weight, eps))


@library.op(
    cuda="norm_backward.cu",
    cpu="norm.cpp",
    variant="rmsnorm_backward<{input.dtype}, {weight.dtype}>",
    outputs=("grad_input", "grad_weight"),
    tensors=_GRADIENT,
    rows=Rows("grad", "input", sums=("grad_weight",)),
    reusable=("grad", "input"),
    samples=_gradients,
)
def rmsnorm_backward(grad: Tensor, input: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The gradients of ``rmsnorm``. The statistics are computed again, which costs no memory access.

    Args:
        grad: of the result: shape and dtype of ``input``; rows may have any stride.
        input: ``[..., hidden]``, fp16, bf16 or fp32; rows may have any stride.
        weight: ``[hidden]``, fp16, bf16 or fp32.
        eps: added to the mean square.

    Returns:
        The gradients of ``input`` and ``weight``, each contiguous and of its dtype; computed in fp32 and rounded once. The
        order of addition is fixed: the same bits in every run on one kind of device.
    """
    x, grad_y = _wide(input), _wide(grad)
    scale = _inverse_rms(x, eps)
    normal = x * scale
    grad_normal = grad_y * weight
    grad_input = scale * (grad_normal - normal * (grad_normal * normal).mean(-1, keepdim=True))
    return grad_input.to(input.dtype), _sum_rows(grad_y * normal).to(weight.dtype)


@library.op(
    cuda="norm_backward.cu",
    cpu="norm.cpp",
    variant="layernorm_backward<{input.dtype}, {weight.dtype}>",
    outputs=("grad_input", "grad_weight", "grad_bias"),
    tensors={**_GRADIENT, "grad_bias": "[hidden] weight.dtype"},
    rows=Rows("grad", "input", sums=("grad_weight", "grad_bias")),
    reusable=("grad", "input"),
    samples=_gradients,
)
def layernorm_backward(grad: Tensor, input: Tensor, weight: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``layernorm``. The statistics are computed again, which costs no memory access.

    Args:
        grad: of the result: shape and dtype of ``input``; rows may have any stride.
        input: ``[..., hidden]``, fp16, bf16 or fp32; rows may have any stride.
        weight: ``[hidden]``, fp16, bf16 or fp32.
        eps: added to the variance.

    Returns:
        The gradients of ``input``, ``weight`` and ``bias``, each contiguous, the last two of the weight's dtype; computed in
        fp32 and rounded once. The order of addition is fixed: the same bits in every run on one kind of device.
    """
    x, grad_y = _wide(input), _wide(grad)
    x = x - x.mean(-1, keepdim=True)
    scale = _inverse_deviation(x, eps)
    normal = x * scale
    grad_normal = grad_y * weight
    mean = grad_normal.mean(-1, keepdim=True)
    grad_input = scale * (grad_normal - mean - normal * (grad_normal * normal).mean(-1, keepdim=True))
    return grad_input.to(input.dtype), _sum_rows(grad_y * normal).to(weight.dtype), _sum_rows(grad_y).to(weight.dtype)


def _sum_rows(x: Tensor) -> Tensor:
    return x.sum_to_size(x.shape[-1])
