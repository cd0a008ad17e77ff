"""Derivatives and transforms, beside those of the PyTorch function that an op is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import torch_jit_ops
from bench.probes import probe, require

silu_and_mul = torch_jit_ops.ops.activation.silu_and_mul
rmsnorm = torch_jit_ops.ops.norm.rmsnorm


class _Seen(TorchDispatchMode):
    """The ops that reach the kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _gradients(function: Callable[..., Tensor], *args: Tensor) -> tuple[Tensor, ...]:
    args = tuple(arg.detach().clone().requires_grad_() for arg in args)
    return torch.autograd.grad(function(*args).sin().sum(), args)


@probe("Derivatives", "of the PyTorch function, where no backward is declared")
def default_derivative() -> None:
    x = torch.randn(5, 96)
    assert_close(_gradients(silu_and_mul.default, x), _gradients(silu_and_mul.reference, x))


@probe("Derivatives", "declared backward, with a kernel")
def declared_backward() -> None:
    given = torch.randn(5, 96), torch.rand(96)
    with _Seen() as seen:
        found = _gradients(rmsnorm.default, *given)
    assert_close(found, _gradients(rmsnorm.reference, *given))
    require("jitk.rmsnorm_backward.default" in seen.names, "the declared backward was not called")


@probe("Derivatives", "double backward")
def double_backward() -> None:
    def twice(function: Callable[..., Tensor], *args: Tensor) -> tuple[Tensor, ...]:
        args = tuple(arg.detach().clone().requires_grad_() for arg in args)
        first = torch.autograd.grad(function(*args).sin().sum(), args, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), args)

    for op, given in ((silu_and_mul, [torch.randn(5, 96)]), (rmsnorm, [torch.randn(5, 96), torch.rand(96)])):
        assert_close(twice(op.default, *given), twice(op.reference, *given), rtol=1e-4, atol=1e-4)


@probe("Derivatives", "`torch.func.grad`")
def functional_gradient() -> None:
    x, weight = torch.randn(5, 96), torch.rand(96)

    def gradient(function: Callable[..., Tensor]) -> Any:
        return torch.func.grad(lambda *args: function(*args).sin().sum(), (0, 1))(x, weight)

    assert_close(gradient(rmsnorm.default), gradient(rmsnorm.reference))


@probe("Derivatives", "`torch.func.vmap`, over rows in one call")
def vmap() -> None:
    x, weight = torch.randn(3, 5, 96), torch.rand(96)
    with _Seen() as seen:
        y = torch.func.vmap(rmsnorm.default, (1, None))(x, weight)
    assert_close(y, torch.func.vmap(rmsnorm.reference, (1, None))(x, weight))
    calls = seen.names.count("jitk.rmsnorm.default")
    require(calls == 1, f"there were {calls} calls")


@probe("Derivatives", "`torch.func.jvp`, in eager mode")
def jvp() -> None:
    x, tangent = torch.randn(5, 96), torch.randn(5, 96)
    assert_close(
        torch.func.jvp(silu_and_mul.default, (x,), (tangent,)), torch.func.jvp(silu_and_mul.reference, (x,), (tangent,))
    )


def _dual(function: Callable[..., Tensor], x: Tensor, tangent: Tensor) -> Any:
    with torch.autograd.forward_ad.dual_level():
        return tuple(torch.autograd.forward_ad.unpack_dual(function(torch.autograd.forward_ad.make_dual(x, tangent))))


@probe("Derivatives", "forward mode within a compiled graph: `jvp`, `dual_level`, `hessian`")
def compiled_forward_mode() -> None:
    x, tangent, weight = torch.randn(3, 8), torch.randn(3, 8), torch.rand(8)
    transforms: tuple[Callable[..., Any], ...] = (
        lambda function: torch.func.jvp(function, (x,), (tangent,)),
        lambda function: _dual(function, x, tangent),
        lambda function: torch.func.hessian(lambda y: function(y).square().sum())(x),
    )
    for op, *rest in ((silu_and_mul,), (rmsnorm, weight)):
        for transform in transforms:
            expected = transform(lambda y, op=op, rest=rest: op.reference(y, *rest))
            for backend in ("aot_eager", "inductor"):
                torch._dynamo.reset()
                compiled = torch.compile(
                    lambda transform=transform, op=op, rest=rest: transform(lambda y: op.default(y, *rest)), backend=backend
                )
                assert_close(compiled(), expected)


@probe("Derivatives", "forward mode around a compiled function: `jvp`")
def forward_mode_around() -> None:
    x, tangent = torch.randn(5, 96), torch.randn(5, 96)
    expected = torch.func.jvp(silu_and_mul.reference, (x,), (tangent,))
    for backend in ("aot_eager", "inductor"):
        compiled = torch.compile(lambda y: silu_and_mul.default(y), backend=backend)
        assert_close(torch.func.jvp(compiled, (x,), (tangent,)), expected)


@probe("Derivatives", "`torch.autocast`: an op computes in the dtype that it is given")
def autocast() -> None:
    layer, x = torch.nn.Linear(8, 16), torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = layer(x)
        y = silu_and_mul.default(hidden)
        whole = silu_and_mul.default(hidden.float())
        y.float().sum().backward()
    require((y.dtype, whole.dtype) == (torch.bfloat16, torch.float32), f"the results are {y.dtype} and {whole.dtype}")
    assert_close(y, silu_and_mul.reference(hidden.float()).bfloat16())
    require(layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32, "the layer has no gradient")


@probe("Derivatives", "`torch.utils.checkpoint`")
def checkpoint() -> None:
    x, weight = torch.randn(5, 96), torch.rand(96)
    plain = _gradients(rmsnorm.default, x, weight)
    for reentrant in (False, True):

        def run(*args: Tensor, reentrant: bool = reentrant) -> Tensor:
            return torch.utils.checkpoint.checkpoint(rmsnorm.default, *args, use_reentrant=reentrant)

        given = [tensor.clone().requires_grad_() for tensor in (x, weight)]
        run(*given).sin().sum().backward()
        assert_close([tensor.grad for tensor in given], list(plain), rtol=0, atol=0)
