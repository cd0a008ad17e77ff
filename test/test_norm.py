"""What the norms promise beyond what every op does."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from cases import OPS, assert_same_bits, call, copy_with_storage, devices, map_tensors, poisoned, samples_of
from expecttest import assert_expected_inline
from torch import Tensor

from torch_jit_ops import Op, Sample
from torch_jit_ops.testing import oracle

NORMS = {op.name: op for op in OPS if op.declaration.namespace == "jitk" and "norm" in op.name}
HALVES = [torch.float16, torch.bfloat16]
DEVICES = [device for device in devices() if device in NORMS["rmsnorm"].declaration.kernels]
ops = torch.ops.jitk


def randn(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("weights", [torch.float32, None], ids=["fp32 weight", "weight of the input's dtype"])
@pytest.mark.parametrize(("fused", "norm"), [("fused_add_rmsnorm", "rmsnorm"), ("gemma_fused_add_rmsnorm", "gemma_rmsnorm")])
def test_fused_addition_is_both_steps_to_the_bit(device, dtype, weights, fused, norm):
    for width in (1, 33, 101, 4096, 9000):
        x, residual = (randn(5, width, dtype=dtype, device=device, seed=seed) for seed in range(2))
        weight = randn(width, dtype=weights or dtype, device=device, seed=2)
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
    """Hugging Face's Llama rounds ``x / rms(x)`` before it multiplies; that may move a result by one more rounding."""
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
    sample = samples_of(op, device, op.declaration.dtypes.combinations([torch.bfloat16])[0])[4]
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


def is_right(name: str, device: str, dtype: torch.dtype, *args: object) -> None:
    given = Sample(args)
    oracle.verify(NORMS[name], device, dtype, given, call(NORMS[name], copy_with_storage(given)))


# --- rows at the ends of fp32 ---------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [4, 100, 4096, 12345])
@pytest.mark.parametrize("size", [1e20, 1e30, 3e38])
def test_a_row_whose_variance_overflows_is_nan(device, width, size):
    """As in PyTorch; not the bias, which a scale of 1 / inf leaves. The rows beside it are what they are alone."""
    x = randn(5, width, device=device)
    x[2] = torch.where(x[2] < 0, -size, size)
    x[2, 0] = -x[2, 1]  # of both signs
    weight, bias = (randn(width, device=device, seed=seed) for seed in (1, 2))
    whole = [0, 1, 3, 4]
    out = ops.layernorm(x, weight, bias)
    assert out[2].isnan().all()
    assert NORMS["layernorm"].reference(x, weight, bias)[2].isnan().all()
    assert_same_bits(out[whole], ops.layernorm(x[whole], weight, bias), "the other rows")
    grads = ops.layernorm_backward(x.sign(), x, weight)
    assert grads[0][2].isnan().all()
    assert grads[1].isnan().all()
    assert grads[2].isfinite().all()
    expected = ops.layernorm_backward(x[whole].sign(), x[whole], weight)[0]
    torch.testing.assert_close(grads[0][whole], expected)


@pytest.mark.parametrize("device", DEVICES)
def test_rms_norms_of_rows_at_the_ends_are_those_of_pytorch(device):
    values = [[1e30, -2e30], [3e38, 1.0], [torch.inf, 1.0], [-torch.inf, torch.inf], [torch.nan, 1.0], [0.0, 0.0], [1e-30, 0.0]]
    x, weight = torch.tensor(values, device=device), torch.tensor([2.0, -3.0], device=device)
    for eps in (1e-6, 0.0):
        expected = torch.nn.functional.rms_norm(x.cpu(), (2,), weight.cpu(), eps)
        torch.testing.assert_close(ops.rmsnorm(x, weight, eps).cpu(), expected, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("eps", [1e-5, 1e-12])
@pytest.mark.parametrize("width", [1, 2, 4, 64])  # sums of which are exact
def test_the_gradient_of_equal_elements_is_zero(device, eps, width):
    """To the bit, if all have the same gradient and weight: the scale of such a row would make any rest large."""
    grad = (1e3 * randn(200, 1, device=device)).expand(200, width).contiguous()
    x = randn(200, 1, device=device, seed=1).expand(200, width).contiguous()
    for seed in range(3):
        weight = randn(1, device=device, seed=seed).expand(width).contiguous()
        grad_input, grad_weight, _ = ops.layernorm_backward(grad, x, weight, eps)
        assert not grad_input.any()
        assert not grad_weight.any()


@pytest.mark.parametrize("device", DEVICES)
def test_the_gradients_of_nothing(device):
    """No columns, or no rows, or neither."""
    for rows, width in ((3, 0), (0, 5), (0, 0)):
        x, weight = torch.ones(rows, width, device=device), torch.ones(width, device=device)
        for name in ("rmsnorm_backward", "layernorm_backward"):
            grads = getattr(ops, name)(x, x, weight)
            assert [list(grad.shape) for grad in grads] == [[rows, width], *[[width]] * (len(grads) - 1)]
            assert not any(grad.any() for grad in grads)


# --- sizes and places that no sample has ----------------------------------------------------------

HIDDEN = [
    1,  # its norm is a sign
    2,  # one pair of halves
    7,  # odd: no two elements at once
    100,  # vectors of 4 bytes but not of 16: peers refuse it
    2880,  # no power of two beyond 64 divides it
    8448,  # peers refuse it; more than a block's threads have vectors, in part
    12345,  # long and odd
    65536 + 8,  # one vector more than a power of two of them
    131072,  # the longest row that a cluster holds in registers, or beyond it
    300000,  # read again for each use
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_any_hidden_size(device, dtype, hidden):
    tokens = 2 if hidden > 65536 else 3
    x, residual = (randn(tokens, hidden, dtype=dtype, device=device, seed=seed) for seed in range(2))
    weight = randn(hidden, dtype=dtype, device=device, seed=2)
    is_right("rmsnorm", device, dtype, x, weight)
    is_right("fused_add_rmsnorm", device, dtype, x, residual, weight)


def odd(tensor: Tensor) -> Tensor:
    """The same values, one element behind where vectors start."""
    place = poisoned([tensor.numel() + 1], tensor.dtype, tensor.device.type)[1:].view(tensor.shape)
    return place.copy_(tensor)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("hidden", [64, 4096, 16384])
def test_a_weight_at_an_odd_offset_beside_aligned_rows(device, weights, hidden):
    dtype = torch.bfloat16
    x, residual = (randn(3, hidden, dtype=dtype, device=device, seed=seed) for seed in range(2))
    weight = odd(randn(hidden, dtype=weights, device=device, seed=2))
    is_right("rmsnorm", device, dtype, x, weight)
    is_right("layernorm", device, dtype, x, weight, weight)
    is_right("layernorm", device, dtype, x, weight.clone(), weight)  # the bias alone
    is_right("fused_add_rmsnorm", device, dtype, x, residual, weight)
    heads = x.view(3, -1, 64)
    is_right("fused_qknorm", device, dtype, heads, heads[:, :1].clone(), weight[:64], weight[:64].clone())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "dtype", "weights"),
    [
        ("rmsnorm", torch.bfloat16, torch.float16),  # neither holds all values of the other
        ("rmsnorm", torch.float16, torch.bfloat16),
        ("rmsnorm", torch.float32, torch.float16),  # narrower than the input; fp32 beside halves is a sample of each op
        ("layernorm", torch.bfloat16, torch.float16),
        ("fused_qknorm", torch.bfloat16, torch.float16),
        ("layernorm_backward", torch.bfloat16, torch.float16),
    ],
    ids=str,
)
def test_a_weight_of_any_dtype(device, name, dtype, weights):
    """Samples of the op, with another dtype for what has one dimension beside tensors of more."""
    for sample in samples_of(NORMS[name], device, dtype)[:3]:
        given = map_tensors(sample, lambda tensor: tensor.to(weights) if tensor.dim() == 1 else tensor)
        changed = [tensor.dtype for tensor in given.args if isinstance(tensor, Tensor) and tensor.dim() == 1]
        assert changed == [weights] * len(changed) != []
        is_right(name, device, dtype, *given.args)


# --- errors ---------------------------------------------------------------------------------------


def refusal(call_op: Callable[[], object]) -> str:
    """The text of the error, with what differs among devices as it is on the CPU."""
    with pytest.raises(RuntimeError) as error:
        call_op()
    text = re.sub(r"cuda(:\d+)?", "cpu", str(error.value))
    text = re.sub(r"at norm\w*\.(cu|cpp):\d+", "at norm", text)
    return re.sub(r"strides \[[^\]]*, 1\]", "strides [*, *, 1]", text)


@pytest.mark.parametrize("device", DEVICES)
def test_a_weight_of_another_size(device):
    x, weight = randn(3, 64, dtype=torch.bfloat16, device=device), randn(63, dtype=torch.bfloat16, device=device)
    assert_expected_inline(
        refusal(lambda: ops.rmsnorm(x, weight)),
        """\
jitk::rmsnorm: argument 'weight' does not match
  expected  [hidden=64]  bfloat16  cpu  contiguous
  got       [63]         bfloat16  cpu
  dimension 0: hidden was bound to 64 by 'input'
  at norm""",
    )


@pytest.mark.parametrize("device", DEVICES)
def test_a_residual_of_another_dtype(device):
    x, weight = randn(3, 64, dtype=torch.bfloat16, device=device), randn(64, device=device)
    residual = randn(3, 64, dtype=torch.float16, device=device)
    assert_expected_inline(
        refusal(lambda: ops.fused_add_rmsnorm(x, residual, weight)),
        """\
jitk::fused_add_rmsnorm: argument 'residual' does not match
  expected  [tokens=3, hidden=64]  bfloat16  cpu  row stride free
  got       [3, 64]                float16   cpu
  dtype float16 is not among those expected
  at norm""",
    )


@pytest.mark.parametrize("device", DEVICES)
def test_a_residual_of_another_number_of_tokens(device):
    x, weight = randn(3, 64, device=device), randn(64, device=device)
    assert_expected_inline(
        refusal(lambda: ops.fused_add_rmsnorm(x, randn(4, 64, device=device), weight)),
        """\
jitk::fused_add_rmsnorm: argument 'residual' does not match
  expected  [tokens=3, hidden=64]  float32  cpu  row stride free
  got       [4, 64]                float32  cpu
  leading dimensions: tokens was bound to [3] by 'input'
  at norm""",
    )


@pytest.mark.parametrize("device", DEVICES)
def test_a_bias_of_another_dtype(device):
    x, weight = randn(3, 64, dtype=torch.bfloat16, device=device), randn(64, dtype=torch.bfloat16, device=device)
    assert_expected_inline(
        refusal(lambda: ops.layernorm(x, weight, weight.float())),
        """\
jitk::layernorm: argument 'bias' does not match
  expected  [hidden=64]  bfloat16  cpu  contiguous
  got       [64]         float32   cpu
  dtype float32 is not among those expected
  at norm""",
    )


@pytest.mark.parametrize("device", DEVICES)
def test_a_key_of_another_head_dim(device):
    q, k, weight = randn(3, 4, 64, device=device), randn(3, 2, 80, device=device), randn(64, device=device)
    assert_expected_inline(
        refusal(lambda: ops.fused_qknorm(q, k, weight, weight.clone())),
        """\
jitk::fused_qknorm: argument 'k' does not match
  expected  [tokens=3, k_heads=2, head_dim=64]  float32  cpu  strides [*, *, 1]
  got       [3, 2, 80]                          float32  cpu
  dimension 2: head_dim was bound to 64 by 'q'
  at norm""",
    )


@pytest.mark.parametrize("device", DEVICES)
def test_a_query_without_heads(device):
    q, k, weight = randn(3, 64, device=device), randn(3, 2, 64, device=device), randn(64, device=device)
    assert_expected_inline(
        refusal(lambda: ops.fused_qknorm(q, k, weight, weight.clone())),
        """\
jitk::fused_qknorm: argument 'q' does not match
  expected  [tokens, q_heads, head_dim]  float32  cpu  strides [*, *, 1]
  got       [3, 64]                      float32  cpu
  it has 2 dimensions, expected 3
  at norm""",
    )


@pytest.mark.parametrize("device", DEVICES)
def test_an_input_that_is_a_scalar(device):
    assert_expected_inline(
        refusal(lambda: ops.rmsnorm(randn(device=device), randn(1, device=device))),
        """\
jitk::rmsnorm: argument 'input' does not match
  expected  [tokens..., hidden]  float32  cpu  row stride free
  got       []                   float32  cpu
  it has 0 dimensions, expected at least 1
  at norm""",
    )


@pytest.mark.parametrize("device", DEVICES)
def test_an_input_whose_columns_are_not_dense(device):
    x = randn(3, 64, device=device).t()
    assert_expected_inline(
        refusal(lambda: ops.rmsnorm(x, randn(3, device=device))),
        """\
jitk::rmsnorm: argument 'input' does not match
  expected  [tokens=64, hidden=3]  float32  cpu  row stride free
  got       [64, 3]                float32  cpu  strides [1, 64]
  its strides do not walk over dense rows in equal steps; pass input.contiguous()
  at norm""",
    )
