"""Llama-style blocks in plain PyTorch and with the ops written in, and a small model of ``transformers``.

Both of ours hold the same weights. The plain one is written as people write it: Hugging Face's norm and rotary embedding,
``silu(gate) * up`` of the halves of one product.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.providers import Unavailable


@dataclass(frozen=True)
class Size:
    """The sizes of Llama 3 8B."""

    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    kv_heads: int = 8
    blocks: int = 2

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


Angles = tuple[Tensor, Tensor]


def angles_of(x: Tensor, head_dim: int) -> Angles:
    """Cosines and sines of the tokens of ``x``, as Hugging Face's models compute them ahead of their blocks."""
    frequencies = 500_000.0 ** -(torch.arange(0, head_dim, 2, device=x.device).float() / head_dim)
    angles = torch.outer(torch.arange(x.shape[1], device=x.device).float(), frequencies).repeat(1, 2)[None]
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Of heads ahead of tokens."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    return turned(q), turned(k)


class Attention(nn.Module):
    rope = staticmethod(rope)

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.head_dim = size.head_dim
        self.splits = [size.heads * size.head_dim, *[size.kv_heads * size.head_dim] * 2]
        self.qkv = nn.Linear(size.hidden, sum(self.splits), bias=False)
        self.out = nn.Linear(size.hidden, size.hidden, bias=False)

    def forward(self, x: Tensor, angles: Angles) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in self.qkv(x).split(self.splits, -1))
        q, k = self.rope(q, k, *angles)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


class PlainNorm(nn.Module):
    """Hugging Face's ``LlamaRMSNorm``."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(hidden) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.attention_norm = PlainNorm(size.hidden)
        self.attention = Attention(size)
        self.mlp_norm = PlainNorm(size.hidden)
        self.gate_up = nn.Linear(size.hidden, 2 * size.intermediate, bias=False)
        self.down = nn.Linear(size.intermediate, size.hidden, bias=False)

    def forward(self, x: Tensor, angles: Angles) -> Tensor:
        x = x + self.attention(self.attention_norm(x), angles)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Plain(nn.Module):
    """Blocks and the norm behind the last one."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.head_dim = size.head_dim
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.blocks))
        self.norm = PlainNorm(size.hidden)

    def forward(self, x: Tensor) -> Tensor:
        angles = angles_of(x, self.head_dim)
        for block in self.blocks:
            x = block(x, angles)
        return self.norm(x)


class Written(Plain):
    """The same with the ops written in: each addition in one op with the norm behind it, in place."""

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        for block in self.blocks:
            block.attention.rope = torch.ops.jitk.rope_qk

    def forward(self, x: Tensor) -> Tensor:
        jitk = torch.ops.jitk
        angles = angles_of(x, self.head_dim)
        residual = x.clone()  # the caller's x stays as it is
        x = jitk.rmsnorm(x, self.blocks[0].attention_norm.weight, 1e-6)
        norms = [block.attention_norm for block in self.blocks[1:]]
        for block, behind in zip(self.blocks, [*norms, self.norm], strict=True):
            x = block.attention(x, angles)
            jitk.fused_add_rmsnorm(x, residual, block.mlp_norm.weight, 1e-6)
            x = block.down(jitk.silu_and_mul(block.gate_up(x)))
            jitk.fused_add_rmsnorm(x, residual, behind.weight, 1e-6)
        return x


class Logits(nn.Module):
    """A model of ``transformers`` from embedded tokens to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(inputs_embeds=x, use_cache=False).logits


@dataclass(frozen=True)
class TransformersSize:
    """A model of 0.2 G parameters."""

    hidden: int = 1024
    intermediate: int = 2816
    layers: int = 8
    heads: int = 16
    kv_heads: int = 4
    vocabulary: int = 32000


def transformers_llama(size: TransformersSize) -> nn.Module:
    """``LlamaForCausalLM`` with random weights.

    Raises:
        Unavailable: ``transformers`` cannot be imported.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except Exception as error:  # an installation that is broken in any way is a model less, not the end of a benchmark
        raise Unavailable(f"transformers: {error}".splitlines()[0]) from error
    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=8192,
    )
    return Logits(LlamaForCausalLM(config))
