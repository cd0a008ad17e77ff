"""What the norms promise beyond what every op does."""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import OPS, assert_same_bits, call, copy_with_storage, devices, samples_of
from torch import Tensor

from torch_jit_ops import Op, Sample

NORMS = {op.name: op for op in OPS if op.library.namespace == "jitk" and "norm" in op.name}
HALVES = [torch.float16, torch.bfloat16]
DEVICES = [device for device in devices() if device in NORMS["rmsnorm"].kernels]
ops = torch.ops.jitk


def randn(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("fused", "norm"), [("fused_add_rmsnorm", "rmsnorm"), ("gemma_fused_add_rmsnorm", "gemma_rmsnorm")])
def test_fused_addition_is_both_steps_to_the_bit(device, dtype, weights, fused, norm):
    for width in (1, 33, 101, 4096, 9000):
        x, residual = (randn(5, width, dtype=dtype, device=device, seed=seed) for seed in range(2))
        weight = randn(width, dtype=weights, device=device, seed=2)
        total = residual + x
        expected = getattr(ops, norm)(total, weight, 1e-5)
        getattr(ops, fused)(x, residual, weight, 1e-5)
        assert_same_bits(residual, total, "residual")
        assert_same_bits(x, expected, "input")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mean", [1000.0, -30000.0])
def test_layernorm_of_a_large_mean(device, mean):
    """Its error is that of small numbers, though fp32 holds neither the mean nor the sum of squares so exactly."""
    x = randn(8, 4096, device=device) + mean
    ones = torch.ones(4096, device=device)
    truth = torch.nn.functional.layer_norm(x.double(), (4096,))
    error = (ops.layernorm(x, ones, ones * 0).double() - truth).abs().max()
    assert error < 16 * 2.0**-24 * truth.abs().max()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_queries_and_keys_in_one_projection(device, dtype):
    """q and k are slices of one tensor: tokens and heads have strides of their own, and v is between the tokens."""
    q_heads, k_heads, head_dim = 4, 2, 80
    for heads_outside in (False, True):
        qkv = randn(7, q_heads + 2 * k_heads, head_dim, dtype=dtype, device=device)
        if heads_outside:
            qkv = qkv.transpose(0, 1).contiguous().transpose(0, 1)
        before = qkv.clone()
        q, k, v = qkv.split([q_heads, k_heads, k_heads], 1)
        weights = [randn(head_dim, dtype=dtype, device=device, seed=seed) for seed in (1, 2)]
        ops.fused_qknorm(q, k, *weights)
        assert_same_bits(v, before[:, q_heads + k_heads :], "v")
        assert_same_bits(q, ops.rmsnorm(before[:, :q_heads].contiguous(), weights[0]), "q")
        assert_same_bits(k, ops.rmsnorm(before[:, q_heads : q_heads + k_heads].contiguous(), weights[1]), "k")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_rounding_from_the_spelling_that_rounds_twice(device, dtype):
    """Hugging Face's Llama and vLLM round ``x / rms(x)`` before they multiply; that may move a result by one more rounding."""
    x, weight = randn(64, 1024, dtype=dtype, device=device), randn(1024, dtype=dtype, device=device, seed=1)
    wide = x.float()
    normal = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(dtype)
    twice = weight * normal
    difference = (ops.rmsnorm(x, weight).double() - twice.double()).abs()
    eps = torch.finfo(dtype).eps  # two roundings there and one here, each by at most eps / 2 of the result
    smallest = torch.finfo(dtype).smallest_normal
    assert (difference <= 1.5 * eps * (1 + eps) * twice.double().abs() + 1.5 * eps * smallest).all()
    assert difference.max() > 0  # they are not the same formula


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("width", [31, 128, 1000])
def test_a_weight_of_another_dtype_is_not_rounded(device, dtype, width):
    x = randn(6, width, dtype=dtype, device=device)
    weight = randn(width, device=device, seed=1) * (1 + 2.0**-14)
    for name in ("rmsnorm", "gemma_rmsnorm", "layernorm"):
        given = Sample((x, weight))
        oracle.verify(NORMS[name], device, dtype, given, call(NORMS[name], copy_with_storage(given)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", NORMS.values(), ids=lambda op: op.name)
def test_the_same_bits_in_twenty_runs_and_for_any_number_of_threads(device: str, op: Op) -> None:
    sample = samples_of(op, device, torch.bfloat16)[4]
    expected = call(op, copy_with_storage(sample))
    threads = torch.get_num_threads()
    try:
        for run in range(20):
            torch.set_num_threads(1 + run % 4)
            for (name, tensor), (_, first) in zip(call(op, copy_with_storage(sample)), expected, strict=True):
                assert_same_bits(tensor, first, name)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["rmsnorm", "layernorm"])
def test_a_nan_stays_in_its_row(device, name):
    x, weight = randn(9, 200, device=device), randn(200, device=device, seed=1)
    expected = getattr(ops, name)(x, weight)
    x[3, 150], x[5, 199] = torch.nan, torch.inf
    got = getattr(ops, name)(x, weight)
    whole = [row for row in range(9) if row not in (3, 5)]
    assert_same_bits(got[whole], expected[whole], "the other rows")
    assert got[3].isnan().all()
    assert got[5, 199].isnan()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["rmsnorm_backward", "layernorm_backward"])
def test_the_oracle_sees_a_small_error_of_a_gradient(device, name):
    """Its bound for what cancels is tight enough: an eps ten times too large is found."""
    given = Sample(
        (randn(40, 512, device=device), randn(40, 512, device=device, seed=1), randn(512, device=device, seed=2), 1e-6)
    )
    other = Sample((*given.args[:3], 1e-5))
    op = NORMS[name]
    oracle.verify(op, device, torch.float32, given, call(op, copy_with_storage(given)))
    with pytest.raises(AssertionError, match="elements are wrong"):
        oracle.verify(op, device, torch.float32, given, call(op, copy_with_storage(other)))


@pytest.mark.parametrize("device", DEVICES)
def test_the_weight_of_another_size_is_named(device):
    with pytest.raises(RuntimeError, match="argument 'weight' does not match") as error:
        ops.rmsnorm(randn(3, 64, device=device), randn(63, device=device))
    assert "hidden was bound to 64 by 'input'" in str(error.value)
    with pytest.raises(RuntimeError, match="it has 0 dimensions, expected at least 1"):
        ops.rmsnorm(randn(device=device), randn(1, device=device))
