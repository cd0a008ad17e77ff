"""Calls of ops whose arguments are more than floating tensors of declared shapes: positions, indices, caches.

A recipe makes the arguments as an engine has them: queries, keys and values are slices of one projection, slots are in no
order, and a cache has twice as many as are written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Sizes = Sequence[int]


@dataclass(frozen=True)
class Make:
    """Draws tensors for one call. On the device ``meta`` there are no values to draw, and no generator."""

    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator | None = None

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, dtype=dtype or self.dtype, device=self.device, generator=self.generator)

    def projection(self, tokens: int, *heads: int, head_dim: int) -> tuple[Tensor, ...]:
        """Queries, keys and values of ``heads`` each, side by side in a row."""
        row = self.randn(tokens, sum(heads) * head_dim)
        return tuple(part.unflatten(1, (-1, head_dim)) for part in row.split([each * head_dim for each in heads], 1))

    def angles(self, positions: int, rope_dim: int) -> Tensor:
        """Cosines and sines of Llama's angles, fp32."""
        frequencies = 500_000.0 ** -torch.arange(0, 1, 2 / rope_dim, dtype=torch.float64)
        angles = torch.outer(torch.arange(positions), frequencies)
        return torch.cat((angles.cos(), angles.sin()), 1).to(torch.float32).to(self.device)

    def positions(self, end: int, count: int) -> Tensor:
        """int64, in no order; of more tokens than positions some are equal."""
        return torch.randint(end, (count,), device=self.device, generator=self.generator)

    def below(self, end: int, count: int) -> Tensor:
        """int64, none of them twice."""
        return torch.randperm(end, device=self.device, generator=self.generator)[:count].clone()


@dataclass(frozen=True)
class Recipe:
    """How calls of an op are made from sizes.

    Attributes:
        axes: names of the sizes, tokens first.
        inputs: the arguments.
        moved: elements that a call reads and writes: a row of cosines is small beside a token's heads, and is not counted.
        keywords: of every call.
    """

    axes: tuple[str, ...]
    inputs: Callable[[Make, Sizes], tuple[Tensor, ...]]
    moved: Callable[[Sizes], int]
    keywords: Mapping[str, Any] = field(default_factory=dict)


_POSITIONS = 8192
_HEADS = ("tokens", "q_heads", "k_heads", "rope_dim", "head_dim")


def _rope(make: Make, sizes: Sizes) -> tuple[Tensor, ...]:
    tokens, q_heads, k_heads, rope_dim, head_dim = sizes
    q, k, _ = make.projection(tokens, q_heads, k_heads, k_heads, head_dim=head_dim)
    return q, k, make.angles(_POSITIONS, rope_dim), make.positions(_POSITIONS, tokens)


def _rope_of_one(make: Make, sizes: Sizes) -> tuple[Tensor, ...]:
    tokens, heads, rope_dim, head_dim = sizes
    x, _, *positions = _rope(make, (tokens, heads, 1, rope_dim, head_dim))
    return x, *positions


def _turned(sizes: Sizes) -> int:
    tokens, q_heads, k_heads, rope_dim, _ = sizes
    return 2 * tokens * (q_heads + k_heads) * rope_dim


def _of_heads(sizes: Sizes) -> int:
    tokens, q_heads, k_heads, _, head_dim = sizes
    return 2 * tokens * (q_heads + k_heads) * head_dim


def _normed_rope(make: Make, sizes: Sizes) -> tuple[Tensor, ...]:
    q, k, *positions = _rope(make, sizes)
    weights = (make.randn(sizes[-1]) for _ in range(2))
    return q, k, *weights, *positions


def _rope_qk(make: Make, sizes: Sizes) -> tuple[Tensor, ...]:
    """Heads ahead of tokens, but behind them in memory, as they are in Hugging Face's models, and in their gradients."""
    tokens, q_heads, k_heads, rope_dim, head_dim = sizes
    q, k = (make.randn(1, tokens, heads, head_dim).transpose(1, 2) for heads in (q_heads, k_heads))
    cos, sin = (part.repeat(1, 2)[None].to(make.dtype) for part in make.angles(tokens, rope_dim).chunk(2, 1))
    return q, k, cos, sin


def _caches(make: Make, tokens: int, heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    slots = 2 * tokens
    return make.randn(slots, heads, head_dim), make.randn(slots, heads, head_dim), make.below(slots, tokens)


def _rope_store(make: Make, sizes: Sizes) -> tuple[Tensor, ...]:
    tokens, q_heads, k_heads, rope_dim, head_dim = sizes
    q, k, v = make.projection(tokens, q_heads, k_heads, k_heads, head_dim=head_dim)
    k_cache, v_cache, slots = _caches(make, tokens, k_heads, head_dim)
    return q, k, v, k_cache, v_cache, make.angles(_POSITIONS, rope_dim), make.positions(_POSITIONS, tokens), slots


def _of_store(sizes: Sizes) -> int:
    """Keys are written to the cache as well, and values are read and written."""
    tokens, _, k_heads, _, head_dim = sizes
    return 3 * tokens * k_heads * head_dim


def _normed_rope_store(make: Make, sizes: Sizes) -> tuple[Tensor, ...]:
    *heads, angles, positions, slots = _rope_store(make, sizes)
    weights = (make.randn(sizes[-1]) for _ in range(2))
    return *heads, *weights, angles, positions, slots


def _store(make: Make, sizes: Sizes) -> tuple[Tensor, ...]:
    tokens, heads, head_dim = sizes
    k, v = make.projection(tokens, heads, heads, head_dim=head_dim)
    return k, v, *_caches(make, tokens, heads, head_dim)


def _store_mla(make: Make, sizes: Sizes) -> tuple[Tensor, ...]:
    tokens, latent, rope = sizes
    slots = 2 * tokens
    parts = make.randn(tokens, latent), make.randn(tokens, rope)
    return *parts, make.randn(slots, latent + rope), make.below(slots, tokens)


def _gather(make: Make, sizes: Sizes) -> tuple[Tensor, ...]:
    tokens, heads, head_dim = sizes
    return make.randn(2 * tokens, heads, head_dim), make.below(2 * tokens, tokens)


def _downcast(make: Make, sizes: Sizes) -> tuple[Tensor, ...]:
    tokens, heads, head_dim = sizes
    k, v = (make.randn(tokens, heads, head_dim) for _ in range(2))
    outs = [torch.zeros(2 * tokens, heads, head_dim, dtype=torch.uint8, device=make.device) for _ in range(2)]
    scales = [torch.full((1,), 0.37, device=make.device) for _ in range(2)]
    return k, v, *outs, *scales, make.below(2 * tokens, tokens)


_ROWS = ("tokens", "heads", "head_dim")

RECIPES: dict[str, Recipe] = {
    "apply_rope": Recipe(_HEADS, _rope, _turned),
    "rope": Recipe(("tokens", "heads", "rope_dim", "head_dim"), _rope_of_one, lambda sizes: 2 * sizes[0] * sizes[1] * sizes[3]),
    "fused_qknorm_rope": Recipe(_HEADS, _normed_rope, _of_heads),
    "apply_rope_store_kv": Recipe(_HEADS, _rope_store, lambda sizes: _turned(sizes) + _of_store(sizes)),
    "fused_qknorm_rope_store_kv": Recipe(_HEADS, _normed_rope_store, lambda sizes: _of_heads(sizes) + _of_store(sizes)),
    "rope_qk": Recipe(_HEADS, _rope_qk, _of_heads),
    "rope_qk_backward": Recipe(_HEADS, _rope_qk, _of_heads),
    "store_kv_cache": Recipe(_ROWS, _store, lambda sizes: 4 * sizes[0] * sizes[1] * sizes[2]),
    "store_mla_cache": Recipe(("tokens", "latent", "rope"), _store_mla, lambda sizes: 2 * sizes[0] * (sizes[1] + sizes[2])),
    "gather_kv_cache": Recipe(_ROWS, _gather, lambda sizes: 2 * sizes[0] * sizes[1] * sizes[2]),
    # A byte is written for each half that is read.
    "downcast_fp8": Recipe(_ROWS, _downcast, lambda sizes: 3 * sizes[0] * sizes[1] * sizes[2]),
}
