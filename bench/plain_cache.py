"""What one writes in plain PyTorch instead of the ops on positions and caches, for Inductor to make kernels of.

The functions of the ops themselves check their indices and skip -1, which nobody writes who has no need of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _turn(x: Tensor, cos_sin_cache: Tensor, positions: Tensor) -> Tensor:
    """Heads of tokens, not yet rounded."""
    rope_dim = cos_sin_cache.shape[1]
    cos, sin = cos_sin_cache[positions].unsqueeze(1).chunk(2, -1)
    first, second = _wide(x[..., :rope_dim]).chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, _wide(x[..., rope_dim:])), -1)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = _wide(x)
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * _wide(weight)


def rope(x: Tensor, cos_sin_cache: Tensor, positions: Tensor) -> Tensor:
    return _turn(x, cos_sin_cache, positions).to(x.dtype)


def apply_rope(q: Tensor, k: Tensor, cos_sin_cache: Tensor, positions: Tensor) -> None:
    for x in (q, k):
        x.copy_(_turn(x, cos_sin_cache, positions))


def fused_qknorm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos_sin_cache: Tensor, positions: Tensor
) -> None:
    for x, weight in ((q, q_weight), (k, k_weight)):
        x.copy_(_turn(_norm(x, weight), cos_sin_cache, positions))


def store_kv_cache(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, indices: Tensor) -> None:
    k_cache[indices] = k
    v_cache[indices] = v


def apply_rope_store_kv(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cos_sin_cache: Tensor, positions: Tensor, indices: Tensor
) -> None:
    apply_rope(q, k, cos_sin_cache, positions)
    store_kv_cache(k, v, k_cache, v_cache, indices)


def fused_qknorm_rope_store_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin_cache: Tensor,
    positions: Tensor,
    indices: Tensor,
) -> None:
    fused_qknorm_rope(q, k, q_weight, k_weight, cos_sin_cache, positions)
    store_kv_cache(k, v, k_cache, v_cache, indices)


def store_mla_cache(latent: Tensor, rope: Tensor, cache: Tensor, indices: Tensor) -> None:
    cache[indices] = torch.cat((latent, rope), -1)


def gather_kv_cache(cache: Tensor, indices: Tensor) -> Tensor:
    return cache[indices]


def downcast_fp8(k: Tensor, v: Tensor, k_out: Tensor, v_out: Tensor, k_scale: Tensor, v_scale: Tensor, loc: Tensor) -> None:
    for x, out, scale in ((k, k_out, k_scale), (v, v_out, v_scale)):
        out.view(torch.float8_e4m3fn)[loc] = (_wide(x) / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


BASELINES: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        apply_rope,
        rope,
        fused_qknorm_rope,
        store_kv_cache,
        apply_rope_store_kv,
        fused_qknorm_rope_store_kv,
        store_mla_cache,
        gather_kv_cache,
        downcast_fp8,
    )
}
