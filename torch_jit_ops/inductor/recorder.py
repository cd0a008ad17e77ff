"""What a function does to tensors, as expressions: its calls are recorded while it runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from torch_jit_ops.inductor.calls import Function, function_of
from torch_jit_ops.inductor.effects import Effect, watch
from torch_jit_ops.inductor.expression import AnyFloat, Call, Expression, Reader


class Unreadable(Exception):
    """A spelling that cannot be made a pattern, and why."""


class Recorder(TorchFunctionMode):
    """Makes the expressions of what is called under it. A call that writes a tensor gives the tensor a new expression."""

    def __init__(self) -> None:
        super().__init__()
        self.floats: dict[float, AnyFloat] = {}
        self._reader = Reader()
        self._expressions: dict[int, tuple[Expression, Tensor]] = {}  # by id; the tensor stays, and so its id is its own

    def argument(self, tensor: Tensor, name: str) -> Expression:
        expression = self._reader.argument(tensor, name)
        self._expressions[id(tensor)] = expression, tensor
        return expression

    def expression(self, tensor: Any) -> Expression:
        if id(tensor) not in self._expressions:
            raise Unreadable(f"makes {type(tensor).__name__} of nothing")
        return self._expressions[id(tensor)][0]

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        function = function_of(func)
        result, effect = watch(func, args, kwargs)
        if effect is Effect.DRAWS:
            raise Unreadable("draws random numbers")
        if result is None and effect is Effect.WRITES:
            result = func(*args, **kwargs)
            self._write(function, args, kwargs)
            return result
        several = isinstance(result, (tuple, list))
        for index, part in enumerate(result if several else [result]):
            if isinstance(part, Tensor) and id(part) not in self._expressions:
                call = self._call(function, args, kwargs, part, index if several else None)
                read = self._reader.read(call) if call is not None else self._reader.argument(part, None)
                self._expressions[id(part)] = read, part
        return result

    def _call(
        self, function: Function | None, args: Sequence[Any], kwargs: dict[str, Any], result: Tensor, index: int | None = None
    ) -> Call | None:
        if function is None:
            return None
        known = {key: self._known(value) for key, value in kwargs.items()}
        return Call(function, tuple(self._known(value) for value in args), known, result, None, index)

    def _known(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.expression(value)
        if isinstance(value, float):
            return self.floats.get(value, value)
        return type(value)(map(self._known, value)) if type(value) in (list, tuple) else value

    def _write(self, function: Function | None, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        name = function.name if function is not None else ""
        if not args or "out" in kwargs or not _IN_PLACE.fullmatch(name):
            raise Unreadable("writes a part of a tensor")
        target = args[0]
        if any(tensor is not target and _share(tensor, target) for _, tensor in self._expressions.values()):
            raise Unreadable("writes a part of a tensor")
        if name == "copy_":
            value = self._known(args[1])
            if not isinstance(value, Expression) or value.tensor.shape != target.shape:
                raise Unreadable("copies what is spread over the tensor")
            made = self._reader.cast(value, target.dtype, target)
        else:
            call = self._call(function_of(name.removesuffix("_")), args, kwargs, target)
            made = self._reader.read(call) if call is not None else self._reader.argument(target, None)
        self._expressions[id(target)] = made, target


_IN_PLACE = re.compile(r"[a-z]\w*_")


def _share(one: Tensor, other: Tensor) -> bool:
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)
