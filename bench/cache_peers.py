"""How SGLang and FlashInfer are called for ops on positions and caches, with the arguments of a recipe.

Each entry takes a recipe's inputs and gives the call, so that views and what a peer wants besides are made ahead of the timing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Prepared = Callable[[], object]


def _sglang(module: str) -> Any:
    return importlib.import_module(f"sglang.kernels.ops.{module}")


def _sglang_rope(q: Tensor, k: Tensor, angles: Tensor, positions: Tensor) -> Prepared:
    function = _sglang("attention.rope").apply_rope_inplace
    part = angles.shape[1]
    turning = q[..., :part], k[..., :part]
    return lambda: function(*turning, angles, positions, is_neox=True)


def _sglang_rope_store(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, angles: Tensor, positions: Tensor, slots: Tensor
) -> Prepared:
    function = _sglang("attention.rope").apply_rope_inplace_with_kvcache
    k_rows, v_rows = k_cache.flatten(1), v_cache.flatten(1)
    return lambda: function(q, k, v, k_rows, v_rows, angles, positions, slots, is_neox=True)


def _sglang_store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> Prepared:
    function = _sglang("kvcache.kvcache").store_cache
    given = [tensor.flatten(1) for tensor in (k, v, k_cache, v_cache)]
    return lambda: function(*given, slots, reserved_skip_index=-1)  # or it leaves out slot 0


def _sglang_store_mla(latent: Tensor, rope: Tensor, cache: Tensor, slots: Tensor) -> Prepared:
    """Its kernel for Hopper, which its dispatcher takes there."""
    function = _sglang("kvcache.set_mla_kv_buffer").set_mla_kv_buffer
    return lambda: function(cache, slots, latent, rope, reserved_skip_index=-1)  # or it leaves out slot 0


def _sglang_downcast(
    k: Tensor, v: Tensor, k_out: Tensor, v_out: Tensor, k_scale: Tensor, v_scale: Tensor, rows: Tensor
) -> Prepared:
    """Its store into caches of 8 bits, without queries: it multiplies by the reciprocal of a scale, and knows e4m3 alone."""
    function = _sglang("kvcache.fused_fp8_qkv_kv_cache").fused_fp8_qkv_kv_cache
    outs = [out.view(torch.float8_e4m3fn) for out in (k_out, v_out)]
    return lambda: function(None, k, v, *outs, rows, k_scale, v_scale)


def _sglang_normed_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, angles: Tensor, positions: Tensor
) -> Prepared:
    """It computes the angles itself, and works on the whole projection, of which ``q`` and ``k`` are slices."""
    function = _sglang("attention.fused_qknorm_rope").fused_qk_norm_rope_out
    projection, narrow = q._base, positions.int()
    assert projection is not None
    heads, head_dim = projection.shape[1] // q.shape[2], q.shape[2]
    values = heads - q.shape[1] - k.shape[1]
    counts = (q.shape[1], k.shape[1], values, head_dim)
    return lambda: function(
        projection, q_weight, k_weight, narrow, *counts, 1e-6, 500_000.0, True, 1.0, 1.0, 1.0, 1.0, angles.shape[1]
    )


def _sglang_normed_rope_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    angles: Tensor,
    positions: Tensor,
    slots: Tensor,
) -> Prepared:
    """Two launches: it has none for both."""
    turn = _sglang_normed_rope(q, k, q_weight, k_weight, angles, positions)
    store = _sglang_store(k, v, k_cache, v_cache, slots)

    def call() -> None:
        turn()
        store()

    return call


def _flashinfer_rope(q: Tensor, k: Tensor, angles: Tensor, positions: Tensor) -> Prepared:
    function = importlib.import_module("flashinfer.rope").apply_rope_with_cos_sin_cache_inplace
    rows = q.flatten(1), k.flatten(1)
    return lambda: function(positions, *rows, q.shape[2], angles)


def _single_pages(slots: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Slots as FlashInfer names them: each token the first of a sequence of its own, in a page of one slot.

    What comes before the caches among its arguments, and what comes behind them.
    """
    every = torch.arange(slots.shape[0] + 1, dtype=torch.int32, device=slots.device)
    return (every[:-1], torch.zeros_like(every[:-1])), (slots.int(), every, torch.ones_like(every[:-1]))


def _flashinfer_store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> Prepared:
    function = importlib.import_module("flashinfer.page").append_paged_kv_cache
    before, behind = _single_pages(slots)
    pages = k_cache.unsqueeze(1), v_cache.unsqueeze(1)
    return lambda: function(k, v, *before, pages, *behind)


def _flashinfer_store_mla(latent: Tensor, rope: Tensor, cache: Tensor, slots: Tensor) -> Prepared:
    function = importlib.import_module("flashinfer.page").append_paged_mla_kv_cache
    before, behind = _single_pages(slots)
    pages = cache.unsqueeze(1).split([latent.shape[1], rope.shape[1]], 2)
    return lambda: function(latent, rope, *before, *pages, *behind)


PEERS: dict[str, dict[str, Callable[..., Prepared]]] = {
    "sglang": {
        "apply_rope": _sglang_rope,
        "apply_rope_store_kv": _sglang_rope_store,
        "fused_qknorm_rope": _sglang_normed_rope,
        "fused_qknorm_rope_store_kv": _sglang_normed_rope_store,
        "store_kv_cache": _sglang_store,
        "store_mla_cache": _sglang_store_mla,
        "downcast_fp8": _sglang_downcast,
    },
    "flashinfer": {
        "apply_rope": _flashinfer_rope,
        "store_kv_cache": _flashinfer_store,
        "store_mla_cache": _flashinfer_store_mla,
    },
}
