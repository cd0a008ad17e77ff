"""Models that never heard of the ops, as people write them, and the op that each should get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Spelling:
    """``function`` computes what the op ``op`` does, of the same arguments."""

    op: str
    name: str
    function: Callable[..., Any]

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh((2.0 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3.0))))


HALVES: dict[str, Callable[[Tensor], Any]] = {
    "slices": lambda x: (x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]),
    "chunk": lambda x: x.chunk(2, dim=-1),
    "chunk_positive": lambda x: torch.chunk(x, 2, x.dim() - 1),
    "split": lambda x: x.split(x.shape[-1] // 2, dim=-1),
    "split_sizes": lambda x: torch.split(x, [x.shape[-1] // 2] * 2, -1),
    "tensor_split": lambda x: x.tensor_split(2, -1),
    "narrow": lambda x: (x.narrow(-1, 0, x.shape[-1] // 2), x.narrow(-1, x.shape[-1] // 2, x.shape[-1] // 2)),
}

GATES: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]] = {
    "plain": lambda act, gate, up: act(gate) * up,
    "swapped": lambda act, gate, up: torch.mul(up, act(gate)),
    "float": lambda act, gate, up: (act(gate.float()) * up.float()).to(gate.dtype),
    "float_promoted": lambda act, gate, up: (act(gate.to(torch.float32)) * up).type_as(gate),
    "float_gate": lambda act, gate, up: act(gate.float()).to(dtype=gate.dtype) * up,
}

ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {
    "silu": (
        F.silu,
        torch.nn.SiLU(),
        lambda x: x * torch.sigmoid(x),
        lambda x: x.sigmoid() * x,
        lambda x: x / (1 + torch.exp(-x)),
        lambda x: x * (1.0 / (1.0 + (-x).exp())),
        lambda x: torch.neg(x).exp().add(1).reciprocal() * x,
    ),
    "gelu": (F.gelu, torch.nn.GELU()),
    "gelu_tanh": (gelu_tanh, gelu_new),
}


# The gate's silu is nowhere by itself.
PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sigmoid_times_up": lambda gate, up: gate * (torch.sigmoid(gate) * up),
    "up_times_sigmoid": lambda gate, up: (up * gate.sigmoid()) * gate,
    "gate_times_up": lambda gate, up: gate * up * torch.sigmoid(gate),
    "up_times_gate": lambda gate, up: torch.sigmoid(gate) * (up * gate),
    "over_exponential": lambda gate, up: up * gate / (1 + torch.exp(-gate)),
}


def _gated() -> list[Spelling]:
    found = [Spelling("silu_mul", name, product) for name, product in PRODUCTS.items()]
    for act_name, activations in ACTIVATIONS.items():
        for number, act in enumerate(activations):
            for gate_name, gate in GATES.items():
                if number and gate_name != "plain":
                    continue
                found.append(
                    Spelling(f"{act_name}_mul", f"{number}_{gate_name}", lambda a, b, act=act, gate=gate: gate(act, a, b))
                )
                for halves_name, halves in HALVES.items():
                    if halves_name != "chunk" and (number or gate_name != "plain" or act_name != "silu"):
                        continue
                    name = f"{number}_{gate_name}_{halves_name}"
                    whole = lambda x, act=act, gate=gate, halves=halves: gate(act, *halves(x))  # noqa: E731
                    found.append(Spelling(f"{act_name}_and_mul", name, whole))
    return found


def hugging_face(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    dtype = x.dtype
    x = x.to(torch.float32)
    variance = x.pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + eps)
    return weight * x.to(dtype)


def vllm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    dtype = x.dtype
    x = x.to(torch.float32)
    variance = x.pow(2).mean(dim=-1, keepdim=True)
    x = x * torch.rsqrt(variance + eps)
    x = x.to(dtype)
    return x * weight


def meta_llama(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(torch.mean(wide * wide, dim=-1, keepdim=True) + eps)).type_as(x) * weight


def t5(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return weight * (x * torch.rsqrt(variance + eps)).to(weight.dtype)


def square_root(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide / torch.sqrt(wide.square().mean((-1,), True) + eps) * weight.float()).to(x.dtype)


def power(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.pow((wide**2).mean(-1, keepdim=True) + eps, -0.5) * weight.float()).type_as(x)


def in_its_dtype(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def gemma(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * (1.0 + weight.float())).type_as(x)


def gemma_plus_one(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.float32)
    return ((weight.float() + 1) * (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps))).to(x.dtype)


RMS_NORMS = {
    "hugging_face": hugging_face,
    "vllm": vllm,
    "meta_llama": meta_llama,
    "t5": t5,
    "square_root": square_root,
    "power": power,
    "in_its_dtype": in_its_dtype,
    "pytorch": lambda x, weight, eps: F.rms_norm(x, (x.shape[-1],), weight, eps),
    "pytorch_torch": lambda x, weight, eps: torch.rms_norm(x, weight.shape, weight=weight, eps=eps),
}
GEMMA_NORMS = {"gemma": gemma, "plus_one": gemma_plus_one}


def layer_norm_by_hand(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    normal = centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    return (normal * weight + bias).to(x.dtype)


def layer_norm_by_variance(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * weight + bias


def layer_norm_by_correction(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    wide = x.float()
    normal = (wide - wide.mean(-1, True)) * (torch.var(wide, dim=(-1,), correction=0, keepdim=True) + eps).rsqrt()
    return (normal * weight.float() + bias.float()).type_as(x)


def layer_norm_by_both(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    wide = x.float()
    variance, mean = torch.var_mean(wide, -1, unbiased=False, keepdim=True)
    return (((wide - mean) * torch.rsqrt(variance + eps)) * weight + bias).to(x.dtype)


LAYER_NORMS = {
    "by_variance": layer_norm_by_variance,
    "by_correction": layer_norm_by_correction,
    "by_both": layer_norm_by_both,
    "pytorch": lambda x, weight, bias, eps: F.layer_norm(x, (x.shape[-1],), weight, bias, eps),
    "by_hand": layer_norm_by_hand,
}

GATED = _gated()
NORMS = [
    *(Spelling("rmsnorm", name, norm) for name, norm in RMS_NORMS.items()),
    *(Spelling("gemma_rmsnorm", name, norm) for name, norm in GEMMA_NORMS.items()),
    *(Spelling("layernorm", name, norm) for name, norm in LAYER_NORMS.items()),
]
