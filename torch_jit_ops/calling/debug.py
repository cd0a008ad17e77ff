"""Debug mode, ``JITK_DEBUG=1``: what a kernel returns is held to what the op's fake promised for the call.

``torch.compile`` allocates and fuses by the fake; a kernel that returns another shape or dtype gives wrong results there, far
from the call. In this mode the C++ dispatcher serves a twin of each op, ``_unchecked_<name>``, and the op itself calls it and
looks at what comes back. The kernels themselves are built for debuggers (``builder/unit.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_jit_ops import backends
from torch_jit_ops.declaring.declaration import Declaration


class Checked:
    """The twin of an op, and the check of what it returns.

    Args:
        declaration: of the op.
        promised: the results of the fake for the arguments of a call.
    """

    def __init__(self, declaration: Declaration, promised: Callable[[Sequence[Any], Mapping[str, Any]], Any]) -> None:
        self._declaration = declaration
        self._promised = promised
        self.library = torch.library.Library(declaration.namespace, "FRAGMENT")
        for overload, signature in declaration.overloads.items():
            self.library.define(signature.schema(self.dotted(overload)))

    def dotted(self, overload: str) -> str:
        """The twin's overload, as ``torch.library`` names it."""
        return f"_unchecked_{self._declaration.dotted(overload)}"

    def call(self, overload: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call the twin.

        Raises:
            RuntimeError: it returned something else than the fake says.
        """
        twin = getattr(getattr(torch.ops, self._declaration.namespace), f"_unchecked_{self._declaration.name}")
        results = getattr(twin, overload or "default")(*args, **kwargs)
        if not overload and self._declaration.is_functional:
            self._check(_tuple(results), args, kwargs, _described)
        elif overload == "out":  # the caller's tensors, of any strides, which the kernel has accepted
            given = {name: value for name, value in kwargs.items() if name not in self._declaration.outputs}
            self._check([kwargs[name] for name in self._declaration.outputs], args, given, _described_by_size)
        return results

    def _check(
        self, results: Sequence[Any], args: Sequence[Any], kwargs: Mapping[str, Any], described: Callable[[Tensor], str]
    ) -> None:
        from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

        mode = FakeTensorMode(allow_non_fake_inputs=True)

        def fake(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [fake(item) for item in value]
            return mode.from_tensor(value.detach()) if isinstance(value, Tensor) else value

        try:
            with mode:
                promised = self._promised([fake(value) for value in args], {name: fake(kwargs[name]) for name in kwargs})
        except (DataDependentOutputException, DynamicOutputShapeException):
            return  # it promises nothing
        names = self._declaration.outputs or ("result",)
        for name, got, expected in zip(names, results, _tuple(promised), strict=False):
            if isinstance(got, Tensor) and isinstance(expected, Tensor) and described(got) != described(expected):
                kernels = self._declaration.kernels.items()
                kernel = next(kernel for name, kernel in kernels if backends.named(name).serves(got.device))
                raise RuntimeError(
                    f"{self._declaration.qualified_name}: result {name!r} is not what the fake says\n"
                    f"  expected  {described(expected)}\n"
                    f"  got       {described(got)}\n"
                    f"  of the kernel {kernel.pattern.export_name()} in {kernel.source}"
                )


def _described_by_size(tensor: Tensor) -> str:
    return f"{list(tensor.shape)}  {str(tensor.dtype).removeprefix('torch.')}  {tensor.device}"


def _described(tensor: Tensor) -> str:
    return f"{_described_by_size(tensor)}  strides {list(tensor.stride())}"


def _tuple(results: Any) -> tuple[Any, ...]:
    return tuple(results) if isinstance(results, (tuple, list)) else (results,)
