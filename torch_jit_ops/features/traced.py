"""What is set off when an op is traced: its kernel's build, Inductor's planned outputs, DTensor's rule.

All of it hangs on the op's fake, and on nothing else. ``torch.compile``, ``torch.export`` and DTensor have no hook that a
library could use before they need these things, but each of them runs the fake first: Dynamo to learn the shapes of a graph
whose kernels are then needed, Inductor before it lowers the graph, DTensor just before it looks for a rule. A program that does
none of this pays for a few look-ups, and none of it is imported for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch_jit_ops.calling import overlap
from torch_jit_ops.calling.reference import Reference, each_tensor
from torch_jit_ops.declaring.declaration import Declaration
from torch_jit_ops.declaring.signature import OUT_FORMS_RETURN, tensors_of
from torch_jit_ops.features import build_while_tracing, dtensor, planned_out

Load = Callable[[str, Sequence[int]], object]


class Fake:
    """The fakes of an op: the function on fake tensors, or what the op declares, with the refusals of the kernel.

    Args:
        declaration: of the op.
        reference: its function.
        overload_of: PyTorch's overload of that name.
        load: builds and loads the variant for a backend and a key of the dispatcher.
    """

    def __init__(self, declaration: Declaration, reference: Reference, overload_of: Callable[[str], Any], load: Load) -> None:
        self._declaration = declaration
        self._reference = reference
        self._overload_of = overload_of
        self._load = load

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Of the functional or in-place form."""
        declaration = self._declaration
        self._check("", args, kwargs)
        self._build(args, kwargs)
        if declaration.outputs:
            planned_out.lower(self._overload_of(""), self._overload_of("out"), declaration.outputs)
        names = declaration.outputs or tuple(f"result {i}" for i in range(declaration.signature.results))
        if not declaration.signature.has_lists:  # of which DTensor's rules know nothing
            dtensor.register(self._overload_of(""), declaration.signature, names, declaration.rows)
        return self.results(args, kwargs)

    def run_out(self, *args: Any, **kwargs: Any) -> Any:
        """Of the out form."""
        declaration = self._declaration
        given = {name: value for name, value in kwargs.items() if name not in declaration.outputs}
        self._check("out", args, kwargs)
        self._reference.check_outputs([kwargs[name] for name in declaration.outputs], self.results(args, given))
        self._build(args, given)
        if OUT_FORMS_RETURN:  # before, DTensor fails on an out form that returns nothing
            dtensor.register(self._overload_of("out"), declaration.overloads["out"], declaration.outputs, declaration.rows)
        return declaration.overloads["out"].returned_of(kwargs)

    def _check(self, overload: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Refuse what the function refuses, and written elements that overlap, which strides tell."""
        declaration = self._declaration
        self._reference.check(overload, args, kwargs)
        values = declaration.by_name(args, kwargs)
        for argument in declaration.overloads[overload].arguments:
            value = values.get(argument.name)
            listed = isinstance(value, (list, tuple))
            for index, tensor in enumerate(tensors_of([value]) if argument.written else ()):
                name = f"{argument.name}[{index}]" if listed else argument.name
                overlap.refuse_itself(declaration.who(overload), name, tensor)

    def _build(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        declaration = self._declaration
        patterns = {backend: kernel.pattern for backend, kernel in declaration.kernels.items()}
        arguments = functools.partial(declaration.arguments, *args, **kwargs)
        build_while_tracing.start(declaration.qualified_name, patterns, self._load, arguments)

    def results(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What the functional or in-place form returns, and nothing set off."""
        declaration = self._declaration
        if declaration.fake is not None:
            return declaration.fake(*args, **kwargs)
        if declaration.signature.results == 0:
            return None
        results = declaration.function(*args, **kwargs)
        return each_tensor(lambda result: result.new_empty(result.shape), results)
