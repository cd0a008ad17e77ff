"""How SGLang and FlashInfer are called for ops on positions and caches, with the arguments of a recipe.

Each entry takes a recipe's inputs and gives the call, so that views and what a peer wants besides are made ahead of the timing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

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


PEERS: dict[str, dict[str, Callable[..., Prepared]]] = {
    "sglang": {
        "apply_rope": _sglang_rope,
        "apply_rope_store_kv": _sglang_rope_store,
        "fused_qknorm_rope": _sglang_normed_rope,
        "fused_qknorm_rope_store_kv": _sglang_normed_rope_store,
        "store_kv_cache": _sglang_store,
    },
    "flashinfer": {"apply_rope": _flashinfer_rope},
}
