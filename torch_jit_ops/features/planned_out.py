"""Outputs of ops in memory that Inductor plans: the functional form becomes the out form in what torch.compile generates.

PyTorch 2.13 does that by itself for an ``.out`` overload with ``torch.Tag.out``, but for few ops: it fails on a dynamic size,
reorders arguments where a tensor comes after a number, calls every single output ``out``, and has no C++ for it
(``FallbackKernel.create`` in torch/_inductor/ir.py). So the ops get a lowering of their own, made of the same parts.
It goes when FallbackKernel.create makes an ExternKernelMultiOut for any op and any size.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from torch_jit_ops.declaring.signature import OUT_FORMS_RETURN

_tag: Any = torch.Tag  # before PyTorch 2.13 there is no such one
TAGS: tuple[torch.Tag, ...] = (_tag.out,) if OUT_FORMS_RETURN else ()

_lowered: set[Any] = set()


def lower(overload: Any, out: Any, outputs: Sequence[str]) -> None:
    """Have Inductor plan the results of ``overload``, if this process has imported Inductor.

    Called whenever the op's fake runs, which Inductor does before it lowers a graph.

    Args:
        overload: the functional form.
        out: the out form.
        outputs: names of its outputs.
    """
    if not OUT_FORMS_RETURN or overload in _lowered or "torch._inductor.lowering" not in sys.modules:
        return
    _lowered.add(overload)
    try:
        _install(overload, out, outputs)
    except Exception as error:  # of any kind: without it, Inductor lowers the op as it would any other
        _warn_once(f"{type(error).__name__}: {error}")


def _install(overload: Any, out: Any, outputs: Sequence[str]) -> None:
    from torch._inductor import lowering
    from torch._inductor.virtualized import V
    from torch._library.utils import get_layout_constraint_tag

    ir: Any = importlib.import_module("torch._inductor.ir")  # which has other classes in each version of PyTorch

    def codegen(self: Any, wrapper: Any) -> None:
        # A result that nobody reads has been removed, but the out form writes it as well.
        for result in self.out_variant_output_nodes:
            V.graph.removed_buffers.discard(result.get_name())
        ir.ExternKernelMultiOut.codegen(self, wrapper)

    Call: Any = type("Call", (ir.ExternKernelMultiOut,), {"codegen": codegen})

    def planned(*args: Any, **kwargs: Any) -> Any:
        with V.graph.fake_mode:
            found = ir.FallbackKernel.process_kernel(overload, *args, **kwargs)
        # A tuple in PyTorch 2.13, which a dataclass of the same five has replaced in 2.15.
        parts = found if isinstance(found, tuple) else [getattr(found, field.name) for field in dataclasses.fields(found)]
        example, tensors, others, unflatten, unbacked = parts
        several = isinstance(example, (tuple, list))
        layouts = [ir.FallbackKernel.tensor_to_layout(tensor) for tensor in (example if several else (example,))]
        layout = ir.MultiOutputLayout(device=ir.FallbackKernel.find_device(tensors, example))
        common = (layout, overload, tensors, others, unflatten)
        if V.graph.cpp_wrapper:
            kind = ir.MultiOutput
            call = ir.FallbackKernel(*common, kwargs=kwargs, unbacked_bindings=unbacked)
        else:
            kind = ir.AllocatingMultiOutput
            call = Call(*common, kwargs=kwargs, unbacked_bindings=unbacked, out_op=out, out_arg_names=list(outputs))
        results = [kind(each, call, [(type(example), i)] if several else []) for i, each in enumerate(layouts)]
        call.outputs = call.out_variant_output_nodes = results
        wrapped = tuple(result.wrap_for_lowering() for result in results)
        return wrapped if several else wrapped[0]

    def lowered(*args: Any, **kwargs: Any) -> Any:
        try:
            return planned(*args, **kwargs)
        except Exception as error:
            # Inductor promises nobody what these parts are like, and its own lowering serves most calls as well. Where the call
            # itself is at fault, that one fails too, and says so.
            results = plain(*args, **kwargs)
            _warn_once(f"{type(error).__name__}: {error}")
            return results

    constraint = lowering.tag_to_layout_constraint(get_layout_constraint_tag(overload, with_default=True))
    lowering.make_fallback(overload, layout_constraint=constraint, warn=False)
    plain = lowering.lowerings[overload]
    lowering.register_lowering(overload, type_promotion_kind=None)(lowered)


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"torch_jit_ops does not know the Inductor of PyTorch {torch.__version__}, and leaves ops' results to it\n"
        f"  {reason.splitlines()[0]}",
        stacklevel=2,
    )
