"""How models spell the ops: what ``inductor.fuse`` looks for beside each op's own reference.

Where a spelling rounds on the way and the op does not, the op is the more exact one of the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def gelu_tanh_written_out(x: Tensor) -> Tensor:
    """As in GPT-2 and where PyTorch had no tanh gelu yet."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def gates(*activations: Activation) -> tuple[Callable[[Tensor, Tensor], Tensor], ...]:
    """``activation(gate) * up`` as it is, in fp32 throughout, and with the activation alone in fp32."""
    spellings: list[Callable[[Tensor, Tensor], Tensor]] = []
    for activation in activations:

        def plain(gate: Tensor, up: Tensor, activation: Activation = activation) -> Tensor:
            return activation(gate) * up

        def wide(gate: Tensor, up: Tensor, activation: Activation = activation) -> Tensor:
            return (activation(gate.float()) * up.float()).to(gate.dtype)

        def wide_gate(gate: Tensor, up: Tensor, activation: Activation = activation) -> Tensor:
            return activation(gate.float()).to(gate.dtype) * up

        spellings += [plain, wide, wide_gate]
    return tuple(spellings)


def of_halves(spellings: tuple[Callable[[Tensor, Tensor], Tensor], ...]) -> tuple[Callable[[Tensor], Tensor], ...]:
    """The same of gate and up side by side in one tensor."""

    def halved(spelling: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def of_input(input: Tensor) -> Tensor:
            return spelling(*input.chunk(2, -1))

        return of_input

    return tuple(map(halved, spellings))


def rms_norm_rounded_twice(input: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As in Hugging Face's Llama, Qwen, Mistral and T5, and in vLLM's form in PyTorch: rounded before the weight, and after."""
    wide = input.to(torch.float32)
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(input.dtype)


def rms_norm_narrow(input: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Without fp32: half types are rounded at every step."""
    return input * torch.rsqrt(input.pow(2).mean(-1, keepdim=True) + eps) * weight


def rms_norm_of_pytorch(input: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(input, input.shape[-1:], weight, eps)


def layer_norm_of_pytorch(input: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(input, input.shape[-1:], weight, bias, eps)


def layer_norm_narrow(input: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Written out without fp32, as with ``var(unbiased=False)``: half types are rounded at every step."""
    centred = input - input.mean(-1, keepdim=True)
    normal = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight
    return normal if bias is None else normal + bias


RMS_NORMS = (rms_norm_rounded_twice, rms_norm_narrow, rms_norm_of_pytorch)


def after_addition(
    norms: tuple[Callable[[Tensor, Tensor, float], Tensor], ...],
) -> tuple[Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]], ...]:
    """The norm of a sum, and the sum: what the op leaves in ``input`` and in ``residual``."""

    def added(
        norm: Callable[[Tensor, Tensor, float], Tensor],
    ) -> Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]:
        def of_sum(input: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
            total = residual + input
            return norm(total, weight, eps), total

        return of_sum

    return tuple(map(added, norms))


def rope_in_its_dtype(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, is_neox: bool, unsqueeze_dim: int
) -> tuple[Tensor, Tensor]:
    """As in Hugging Face's Llama, and in Phi, of a part of each head: rounded three times where cosines and sines are of a half
    type, and once where they are fp32, as in OLMo 2."""
    if cos.shape[-1] < q.shape[-1]:
        return rope_of_a_part(q, k, cos, sin, is_neox=is_neox, unsqueeze_dim=unsqueeze_dim)
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _turned(q, cos, sin, is_neox).to(q.dtype), _turned(k, cos, sin, is_neox).to(k.dtype)


def rope_of_a_part(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, is_neox: bool, unsqueeze_dim: int
) -> tuple[Tensor, Tensor]:
    """As in Hugging Face's GLM and Phi 3, where the part may be all."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    rope_dim = cos.shape[-1]
    turned = [_turned(x[..., :rope_dim], cos, sin, is_neox).to(x.dtype) for x in (q, k)]
    return torch.cat((turned[0], q[..., rope_dim:]), -1), torch.cat((turned[1], k[..., rope_dim:]), -1)


def rope_in_fp32(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, is_neox: bool, unsqueeze_dim: int) -> tuple[Tensor, Tensor]:
    """As in Hugging Face's Cohere."""
    of_q, of_k = rope_in_its_dtype(q.float(), k.float(), cos, sin, is_neox=is_neox, unsqueeze_dim=unsqueeze_dim)
    return of_q.to(q.dtype), of_k.to(k.dtype)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, is_neox: bool) -> Tensor:
    if is_neox:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin
    return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin


ROPES = (rope_in_its_dtype, rope_of_a_part, rope_in_fp32)
