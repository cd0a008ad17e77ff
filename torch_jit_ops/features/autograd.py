"""Derivatives of ops: the kernels for PyTorch's autograd key, in Python, and the C++ that spares most calls of them.

A call that wants no gradient would pay 4 us for the kernel in Python to find that out. csrc/runtime/autograd.cpp finds out in
C++, and calls Python where a gradient is wanted. That library takes seconds to compile, so it is made in the background, once
for a version of PyTorch; ``Handover`` hands an op over as soon as it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from torch_jit_ops import dispatcher, forks
from torch_jit_ops.signature import Signature


class Handover:
    """Hands the autograd keys of an op over to C++, once.

    Args:
        overloads: qualified names with their overloads: ``mylib::scale.out``.
        is_due: while it says no, nothing is handed over.
    """

    def __init__(self, overloads: Sequence[str], is_due: Callable[[], bool]) -> None:
        self._overloads = overloads
        self._is_due = is_due
        self._done = False
        self._lock = forks.Lock()

    def hand_over(self) -> None:
        """Hand over if the library is there. Each call that comes to a kernel in Python calls this."""
        if self._done or not self._is_due():
            return
        with self._lock as again:
            self._done = self._done or (not again and dispatcher.differentiate(self._overloads))


def functional_kernel(
    overload: Any,
    signature: Signature,
    reference: Callable[..., Any],
    backward: Callable[..., Any] | None,
    handover: Handover,
) -> Callable[..., Any]:
    """The autograd kernel of an op that returns new tensors.

    Args:
        overload: of PyTorch.
        signature: of the op.
        reference: computes the same from operations that have derivatives.
        backward: what the op declares, or None: the reference is computed again and differentiated.
        handover: of the op.
    """
    positional = sum(not argument.keyword_only for argument in signature.arguments)
    names = [argument.name for argument in signature.arguments[positional:]]
    defaults = [argument.default for argument in signature.arguments]

    def split(values: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Any]]:
        return values[:positional], dict(zip(names, values[positional:], strict=True))

    def run_reference(*values: Any) -> Any:
        args, kwargs = split(values)
        return reference(*args, **kwargs)

    def run_forward(ctx: Any, keys: Any, *values: Any) -> Any:
        args, kwargs = split(values)
        # An autograd function switches gradients off, which must not reach the levels of torch.func below this one.
        nested = torch._C._are_functorch_transforms_active()
        with torch.set_grad_enabled(nested), forward_ad._set_fwd_grad_enabled(nested):
            results = _call_below(overload, keys, args, kwargs)
        ctx.jitk_rest = [None if isinstance(value, Tensor) else value for value in values]
        ctx.jitk_tensors = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
        ctx.save_for_backward(*[values[i] for i in ctx.jitk_tensors])
        return results

    def run_backward(ctx: Any, *grads: Tensor | None) -> Any:
        values = list(ctx.jitk_rest)
        for i, tensor in zip(ctx.jitk_tensors, ctx.saved_tensors, strict=True):
            values[i] = tensor
        if backward is None:
            wanted = [i for i in ctx.jitk_tensors if ctx.needs_input_grad[1 + i]]
            found = dict(zip(wanted, _differentiate(run_reference, values, wanted, grads), strict=True))
        else:
            args, kwargs = split(values)
            found = dict(zip(ctx.jitk_tensors, _as_tuple(backward(*grads, *args, **kwargs)), strict=True))
        return None, *(found.get(i) for i in range(len(values)))

    # Handles one level: functorch picked it before the autograd key ran, and would pick again.
    function: Any = type(
        f"{overload._opname}_derivative",
        (torch.autograd.function._SingleLevelFunction,),
        {
            "forward": staticmethod(run_forward),
            "backward": staticmethod(run_backward),
            "_compiled_autograd_key": staticmethod(torch.autograd.Function._compiled_autograd_key),
        },
    )

    def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
        handover.hand_over()
        if _has_tangent(*args, *kwargs.values()):
            return reference(*args, **kwargs)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args, *kwargs.values()):
            given = [kwargs.get(name, default) for name, default in zip(names, defaults[positional:], strict=True)]
            with enable_single_level_autograd_function():
                return function.apply(keys, *args, *defaults[len(args) : positional], *given)
        return _call_below(overload, keys, args, kwargs)

    return kernel


def writing_kernel(
    overload: Any, signature: Signature, refusal: str, remedies: Mapping[str, str], handover: Handover
) -> Callable[..., Any]:
    """The autograd kernel of an op that writes arguments, and has no derivative.

    Args:
        overload: of PyTorch.
        signature: of the overload.
        refusal: the error where a derivative is wanted.
        remedies: what to do instead, where an argument ``requires grad`` and where it ``has a tangent``.
        handover: of the op.
    """
    names = [argument.name for argument in signature.arguments]
    written = [argument.name for argument in signature.arguments if argument.written]

    def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
        handover.hand_over()
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        for name, value in given.items():
            if torch.is_grad_enabled() and isinstance(value, Tensor) and value.requires_grad:
                reason = "requires grad"
            elif _has_tangent(value):
                reason = "has a tangent"
            else:
                continue
            raise RuntimeError(f"{refusal}, but argument {name!r} {reason}\n  remedy: {remedies[reason]}")
        for name in written:
            tensor = given.get(name)
            # What autograd has saved of it must not be taken for what it was.
            if tensor is not None and not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)
        return _call_below(overload, keys, args, kwargs)

    return kernel


def _call_below(overload: Any, keys: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return overload.redispatch(keys & torch._C._after_autograd_keyset, *args, **kwargs)


def _has_tangent(*values: Any) -> bool:
    """Whether forward-mode differentiation goes through one of them."""
    # Not by forward_ad._current_level, which compiled graphs leave as it is.
    if dispatcher.in_forward_mode is not None and not dispatcher.in_forward_mode():
        return False
    # To ask is to make a view: other layouts have none, and modes and subclasses need not see it.
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        return any(
            isinstance(value, Tensor)
            and value.layout is torch.strided
            and torch._VF._unpack_dual(value, level=0).tangent is not None
            for value in values
        )


def _differentiate(
    reference: Callable[..., Any], values: list[Any], wanted: Sequence[int], grads: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    """The gradients of the wanted values. ``reference`` is called with all of them."""
    if torch._C._are_functorch_transforms_active():
        return _differentiate_in_functorch(reference, values, wanted, grads)
    again = torch.is_grad_enabled()  # a graph of the gradient itself is asked for
    with torch.enable_grad():
        for i in wanted:  # a tensor of its own for each argument: the same one may have been passed for two
            values[i] = values[i].view_as(values[i]) if again else values[i].detach().requires_grad_()
        pairs = zip(_as_tuple(reference(*values)), grads, strict=True)
        # A result that has no derivative, such as integers, may still come with a gradient of zeros.
        results = [(result, grad) for result, grad in pairs if grad is not None and result.requires_grad]
        return torch.autograd.grad(
            [result for result, _ in results],
            [values[i] for i in wanted],
            [grad for _, grad in results],
            create_graph=again,
            allow_unused=True,
        )


def _differentiate_in_functorch(
    reference: Callable[..., Any], values: list[Any], wanted: Sequence[int], grads: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    """The same where tensors belong to levels of torch.func, which torch.autograd.grad does not know."""

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        for i, tensor in zip(wanted, tensors, strict=True):
            values[i] = tensor
        pairs = zip(_as_tuple(reference(*values)), grads, strict=True)
        return tuple(result for result, grad in pairs if grad is not None and result.is_floating_point())

    results, pull_back = torch.func.vjp(run, *[values[i] for i in wanted])
    floating = [grad for grad in grads if grad is not None and grad.is_floating_point()]
    return pull_back(tuple(grad.to(result.dtype) for result, grad in zip(results, floating, strict=True)))


def _as_tuple(results: Any) -> tuple[Any, ...]:
    return results if isinstance(results, tuple) else (results,)
