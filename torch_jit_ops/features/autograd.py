"""Derivatives of ops: the kernels for PyTorch's autograd key, in Python, and the C++ that spares most calls of them.

A call that wants no gradient would pay 4 us for the kernel in Python to find that out. csrc/runtime/autograd.cpp finds out in
C++, and calls Python where a gradient is wanted. That library takes seconds to compile, so it is made in the background, once
for a version of PyTorch; ``Handover`` hands an op over as soon as it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from torch_jit_ops import forks
from torch_jit_ops.calling import dispatcher
from torch_jit_ops.declaring.signature import Signature, tensors_of


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

    # An autograd function sees tensors alone, and neither those in lists of arguments nor those in lists of results: ``form``
    # says where they were in the arguments, and ``made`` is given the same of the results.
    def run_forward(ctx: Any, keys: Any, form: _Form, made: list[_Form], *leaves: Any) -> Any:
        args, kwargs = split(_grouped(form, leaves))
        # An autograd function switches gradients off, which must not reach the levels of torch.func below this one.
        nested = torch._C._are_functorch_transforms_active()
        with torch.set_grad_enabled(nested), forward_ad._set_fwd_grad_enabled(nested):
            results = _call_below(overload, keys, args, kwargs)
        ctx.jitk_form = form
        ctx.jitk_rest = [None if isinstance(value, Tensor) else value for value in leaves]
        ctx.jitk_tensors = [i for i, value in enumerate(leaves) if isinstance(value, Tensor)]
        ctx.save_for_backward(*[leaves[i] for i in ctx.jitk_tensors])
        made[:], flat = [_form_of(_as_tuple(results))], _leaves(_as_tuple(results))
        ctx.jitk_made = made[0]
        return flat if made[0].has_lists or isinstance(results, tuple) else flat[0]

    def run_backward(ctx: Any, *grads: Tensor | None) -> Any:
        leaves = list(ctx.jitk_rest)
        for i, tensor in zip(ctx.jitk_tensors, ctx.saved_tensors, strict=True):
            leaves[i] = tensor

        def run_reference(*leaves: Any) -> Any:
            args, kwargs = split(_grouped(ctx.jitk_form, leaves))
            return _leaves(_as_tuple(reference(*args, **kwargs)))

        if backward is None:
            wanted = [i for i in ctx.jitk_tensors if ctx.needs_input_grad[_BEFORE_LEAVES + i]]
            found = dict(zip(wanted, _differentiate(run_reference, leaves, wanted, grads), strict=True))
        else:
            args, kwargs = split(_grouped(ctx.jitk_form, leaves))
            given = _as_tuple(backward(*_grouped(ctx.jitk_made, grads), *args, **kwargs))
            found = dict(zip(ctx.jitk_tensors, _leaves(given), strict=True))
        return *(None,) * _BEFORE_LEAVES, *(found.get(i) for i in range(len(leaves)))

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
        tensors = list(tensors_of((*args, *kwargs.values())))
        if _has_tangent(*tensors):
            return reference(*args, **kwargs)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors):
            given = [kwargs.get(name, default) for name, default in zip(names, defaults[positional:], strict=True)]
            values = [*args, *defaults[len(args) : positional], *given]
            made: list[_Form] = []
            with enable_single_level_autograd_function():
                results = function.apply(keys, _form_of(values), made, *_leaves(values))
            return results if not made[0].has_lists else _as_results(_grouped(made[0], results))
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
            if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors_of([value])):
                reason = "requires grad"
            elif _has_tangent(*tensors_of([value])):
                reason = "has a tangent"
            else:
                continue
            raise RuntimeError(f"{refusal}, but argument {name!r} {reason}\n  remedy: {remedies[reason]}")
        for tensor in tensors_of(_leaves([given.get(name) for name in written])):
            # What autograd has saved of it must not be taken for what it was.
            if not tensor.is_inference():
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
        results = [(result, grad) for result, grad in pairs if grad is not None and result is not None and result.requires_grad]
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
        return tuple(result for result, grad in pairs if grad is not None and result is not None and result.is_floating_point())

    results, pull_back = torch.func.vjp(run, *[values[i] for i in wanted])[:2]  # there is a third with has_aux alone
    floating = [grad for grad in grads if grad is not None and grad.is_floating_point()]
    found: Sequence[Tensor | None] = pull_back(
        tuple(grad.to(result.dtype) for result, grad in zip(results, floating, strict=True))
    )
    return found


@dataclass(frozen=True)
class _Form:
    """Which of some values are lists of tensors: for each its length, or None."""

    lengths: tuple[int | None, ...]

    @property
    def has_lists(self) -> bool:
        return any(length is not None for length in self.lengths)


_BEFORE_LEAVES = 3  # arguments of the autograd function that are no values of the op


def _form_of(values: Sequence[Any]) -> _Form:
    return _Form(tuple(len(value) if _is_tensor_list(value) else None for value in values))


def _is_tensor_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and isinstance(value[0], Tensor)


def _leaves(values: Sequence[Any]) -> tuple[Any, ...]:
    """The values, those of lists of tensors in place of the lists."""
    return tuple(leaf for value in values for leaf in (value if _is_tensor_list(value) else (value,)))


def _grouped(form: _Form, leaves: Sequence[Any]) -> list[Any]:
    """The values of which these are the leaves."""
    rest = iter(leaves)
    return [next(rest) if length is None else [next(rest) for _ in range(length)] for length in form.lengths]


def _as_results(values: Sequence[Any]) -> Any:
    return values[0] if len(values) == 1 else tuple(values)


def _as_tuple(results: Any) -> tuple[Any, ...]:
    return results if isinstance(results, tuple) else (results,)
