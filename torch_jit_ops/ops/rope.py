"""Rotary position embedding (Su et al., arXiv:2104.09864): of queries and keys, with what stands around it in a model.

Each pair of elements of a head turns by an angle that its token's position and its own place decide. In GPT-NeoX's form, which
Llama, Qwen and Gemma have, element i is paired with element ``i + rope_dim / 2``; in GPT-J's, which GLM and DeepSeek have, with
its neighbour. Elements behind ``rope_dim`` pass through.

Arithmetic is fp32 whatever the input, and the output is rounded once. (Hugging Face's form rounds both products and their sum
where cosines and sines have the dtype of a half, so it is up to one and a half units in the last place of the larger product
away. vLLM's and SGLang's kernels round once, there as here, if the cache is fp32.)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torch_jit_ops.declaring.layout import any_of
from torch_jit_ops.declaring.samples import Sample, SampleMaker
from torch_jit_ops.ops import spelling
from torch_jit_ops.ops.library import FLOATS, library
from torch_jit_ops.ops.rope_and_store import apply_rope_store_kv as apply_rope_store_kv
from torch_jit_ops.ops.rope_and_store import fused_qknorm_rope_store_kv as fused_qknorm_rope_store_kv
from torch_jit_ops.ops.rope_at_positions import apply_rope as apply_rope
from torch_jit_ops.ops.rope_at_positions import fused_qknorm_rope as fused_qknorm_rope
from torch_jit_ops.ops.rope_at_positions import rope as rope
from torch_jit_ops.ops.rotation import check_rope_dim, partners, require, turned, wide

# --- Hugging Face's form --------------------------------------------------------------------------

_HEADS = "[batch, *, *, head_dim]"
_QK = {
    "q": f"{_HEADS} {FLOATS} strides [*, *, *, 1]",
    "k": f"{_HEADS} q.dtype strides [*, *, *, 1]",
    "cos": f"[*, tokens, rope_dim] {FLOATS} strides [*, *, 1]",
    "sin": "[*, tokens, rope_dim] cos.dtype strides [*, *, 1]",
    "q_out": f"{_HEADS} q.dtype strides [*, *, *, 1]",
    "k_out": f"{_HEADS} q.dtype strides [*, *, *, 1]",
}
_QK_GRADIENT = {
    "grad_q": _QK["q"],
    "grad_k": f"{_HEADS} grad_q.dtype strides [*, *, *, 1]",
    "cos": _QK["cos"],
    "sin": _QK["sin"],
    "q_grad": f"{_HEADS} grad_q.dtype strides [*, *, *, 1]",
    "k_grad": f"{_HEADS} grad_q.dtype strides [*, *, *, 1]",
}


def _check_angles(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int) -> None:
    if unsqueeze_dim not in (1, 2):
        raise ValueError(f"unsqueeze_dim must be 1 or 2, got {unsqueeze_dim}")
    tokens_dim = 3 - unsqueeze_dim
    for name, x in (("q", q), ("k", k)):
        tokens = x.shape[tokens_dim]
        require(tokens == cos.shape[1], f"dimension {tokens_dim} of {name}: it has {tokens} tokens, cos has {cos.shape[1]}")
    for name, x in (("cos", cos), ("sin", sin)):
        fits = any_of(x.shape[0] == q.shape[0], x.shape[0] == 1)
        require(fits, f"{name} must be for a batch of 1 or {q.shape[0]}, got {x.shape[0]}")
    check_rope_dim(cos.shape[-1], q.shape[-1])


def _angles_per_token(make: SampleMaker, batch: int, tokens: int, rope_dim: int, dtype: torch.dtype | None) -> list[Tensor]:
    """Of halves that are not equal, and of no angle: nothing of the ops' promises depends on that."""
    return [make.randn(batch, tokens, rope_dim, dtype=dtype).clamp(-1, 1) for _ in range(2)]


def _heads_first(make: SampleMaker) -> Iterator[Sample]:
    for batch, q_heads, k_heads, tokens, head_dim, rope_dim, shared, is_neox, dtype, note in (
        (2, 4, 1, 7, 64, 64, False, True, None, "grouped queries"),
        (2, 3, 3, 5, 80, 32, True, True, None, "as in Phi: a part of each head, angles of all batches"),
        (1, 8, 2, 9, 128, 64, False, False, torch.float32, "as in GLM: half of each head, of neighbours, fp32 angles"),
        (3, 2, 1, 1, 96, 96, False, True, torch.float32, "one token; no power of two"),
        (1, 2, 2, 33, 10, 6, True, True, None, "an odd half of a rope_dim"),
        (2, 1, 1, 4, 7, 6, False, False, None, "an odd head_dim"),
        (1, 2, 1, 3, 512, 512, True, True, None, "a wide head"),
        (1, 2, 1, 3, 1288, 1280, False, False, None, "a head that is too wide for registers"),
        (2, 2, 1, 3, 16, 0, False, True, None, "nothing that turns"),
        (2, 4, 2, 3, 20, 20, True, False, None, "neighbours, angles of all batches"),
    ):
        q, k = (make.randn(batch, heads, tokens, head_dim) for heads in (q_heads, k_heads))
        angles = _angles_per_token(make, 1 if shared else batch, tokens, rope_dim, dtype)
        yield Sample((q, k, *angles), {"is_neox": is_neox}, note=note)
    q, k = make.randn(2, 6, 4, 64), make.randn(2, 6, 2, 64)
    yield Sample((q, k, *_angles_per_token(make, 2, 6, 64, None)), {"unsqueeze_dim": 2}, note="heads behind tokens")
    neighbours = {"is_neox": False, "unsqueeze_dim": 2}
    yield Sample((q, k, *_angles_per_token(make, 2, 6, 64, None)), neighbours, note="neighbours, heads behind tokens")


def _gradients(make: SampleMaker) -> Iterator[Sample]:
    for sample in _heads_first(make):
        yield Sample(sample.args, sample.kwargs, note=f"gradients: {sample.note}")


def _adjoint(sin: Tensor, is_neox: bool) -> Tensor:
    """The sines that turn back what ``sin`` turned: negative, and those of a pair exchanged."""
    if is_neox:
        first, second = sin.chunk(2, -1)
        return torch.cat((-second, -first), -1)
    return torch.stack((-sin[..., 1::2], -sin[..., ::2]), -1).flatten(-2)


def _dense(grad: Tensor) -> Tensor:
    """As kernels read it; the gradient of a sum has a stride of 0."""
    return grad if grad.stride(-1) == 1 else grad.contiguous()


def _of_batches(grad: Tensor, angles: Tensor) -> Tensor:
    return (grad if grad.shape[0] == angles.shape[0] else grad.sum(0, keepdim=True)).to(angles.dtype)


def _gradient_of_angles(
    grads: tuple[Tensor, Tensor], qk: tuple[Tensor, Tensor], cos: Tensor, sin: Tensor, is_neox: bool, unsqueeze_dim: int
) -> tuple[Tensor, Tensor]:
    """Sums over the heads that an angle turned, of queries and keys, and over all batches if it turned them all."""
    of_cos, of_sin = cos.new_zeros(()), sin.new_zeros(())
    for grad, x in zip(grads, qk, strict=True):
        turning, grad_turning = (wide(each.narrow(-1, 0, cos.shape[-1])) for each in (x, grad))
        of_cos = of_cos + (grad_turning * turning).sum(unsqueeze_dim)
        of_sin = of_sin + (grad_turning * partners(turning, is_neox)).sum(unsqueeze_dim)
    return _of_batches(of_cos, cos), _of_batches(of_sin, sin)


def _differentiate_rope_qk(
    grad_q: Tensor, grad_k: Tensor, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, is_neox: bool, unsqueeze_dim: int
) -> tuple[Tensor | None, ...]:
    of_angles: tuple[Tensor | None, Tensor | None] = (None, None)
    if cos.requires_grad or sin.requires_grad:
        of_angles = _gradient_of_angles((grad_q, grad_k), (q, k), cos, sin, is_neox, unsqueeze_dim)
    grads = rope_qk_backward(_dense(grad_q), _dense(grad_k), cos, sin, is_neox=is_neox, unsqueeze_dim=unsqueeze_dim)
    return *grads, *of_angles


def _differentiate_rope_qk_backward(
    q: Tensor, k: Tensor, grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor, is_neox: bool, unsqueeze_dim: int
) -> tuple[Tensor | None, ...]:
    """``q`` and ``k`` are gradients of the gradients, which turn forward again."""
    of_angles: tuple[Tensor | None, Tensor | None] = (None, None)
    if cos.requires_grad or sin.requires_grad:
        of_angles = _gradient_of_angles((grad_q, grad_k), (q, k), cos, sin, is_neox, unsqueeze_dim)
    return *rope_qk(_dense(q), _dense(k), cos, sin, is_neox=is_neox, unsqueeze_dim=unsqueeze_dim), *of_angles


@library.op(
    cuda="rope.cu",
    cpu="rope.cpp",
    variant={
        "cuda": "rope_qk<{q.dtype}, {is_neox}>",
        "cpu": "rope_qk<{q.dtype}>",
    },
    outputs=("q_out", "k_out"),
    tensors=_QK,
    samples=_heads_first,
    backward=_differentiate_rope_qk,
    patterns=spelling.ROPES,
)
def rope_qk(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, is_neox: bool = True, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of queries and keys by cosines and sines of each token, as in Hugging Face's models.

    ``x * cos + partner * sin`` for each element of the first ``rope_dim`` of a head, where its partner is the other one
    of its pair, negative if that is the second. The others pass through.

    Args:
        q: ``[batch, heads, tokens, head_dim]``, fp16, bf16 or fp32; any strides with a dense last dimension. With
            ``unsqueeze_dim=2`` it is ``[batch, tokens, heads, head_dim]``.
        k: as ``q``, with heads of its own.
        cos: ``[batch, tokens, rope_dim]`` or ``[1, tokens, rope_dim]``, fp16, bf16 or fp32: an entry for each element, so the
            two of a pair may have cosines of their own. ``rope_dim`` is even and at most head_dim.
        sin: shape and dtype of ``cos``; it may have another batch, 1 or that of ``q``.
        is_neox: element i is paired with ``i + rope_dim / 2``; else 2 i with 2 i + 1.
        unsqueeze_dim: the dimension of heads, 1 or 2.

    Returns:
        The shapes of ``q`` and ``k``, contiguous, of their dtype; computed in fp32 and rounded once. Attention that reads heads
        behind tokens, as FlashAttention does, is served best by ``unsqueeze_dim=2``, whose results need no copy.
    """
    _check_angles(q, k, cos, sin, unsqueeze_dim)
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return turned(q, cos, sin, is_neox), turned(k, cos, sin, is_neox)


@library.op(
    cuda="rope.cu",
    cpu="rope.cpp",
    variant={
        "cuda": "rope_qk_backward<{grad_q.dtype}, {is_neox}>",
        "cpu": "rope_qk_backward<{grad_q.dtype}>",
    },
    outputs=("q_grad", "k_grad"),
    tensors=_QK_GRADIENT,
    samples=_gradients,
    backward=_differentiate_rope_qk_backward,
)
def rope_qk_backward(
    grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor, *, is_neox: bool = True, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """The gradients of ``rope_qk``: the rotation by the negative angle, where the two of a pair have the same one.

    Where they have not, it is the adjoint all the same: the sines change places with their signs.

    Args:
        grad_q: of the first result: shape and dtype of ``q``; any strides with a dense last dimension.
        grad_k: of the second result, as ``grad_q``.
        cos: that of ``rope_qk``.
        sin: that of ``rope_qk``.
        is_neox: that of ``rope_qk``.
        unsqueeze_dim: that of ``rope_qk``.

    Returns:
        The gradients of ``q`` and ``k``, contiguous, of their dtype; computed in fp32 and rounded once.
    """
    _check_angles(grad_q, grad_k, cos, sin, unsqueeze_dim)
    cos, sin = cos.unsqueeze(unsqueeze_dim), _adjoint(sin, is_neox).unsqueeze(unsqueeze_dim)
    return turned(grad_q, cos, sin, is_neox), turned(grad_k, cos, sin, is_neox)
