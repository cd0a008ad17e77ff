"""Which function of PyTorch a call means, and what it is given under which name, however it is spelled.

    F.relu(x), torch.relu(input=x), x.relu()         relu(self=x)
    x.clamp(max=1), torch.clamp(x, None, 1)          clamp(self=x, min=None, max=1)
    1 - x, x.__rsub__(1), torch.sub(1, x)            sub(self=1, other=x, alpha=1)

A function is known by its identity, not by its name: somebody else's ``silu`` is not PyTorch's. Its parameters, their types and
defaults are those of its Python signature or of its schema.
"""

from __future__ import annotations

import functools
import inspect
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

_DUNDER = re.compile(r"__(\w+)__$")
_SYNONYMS = {
    "multiply": "mul",
    "truediv": "div",
    "true_divide": "div",
    "divide": "div",
    "subtract": "sub",
    "floordiv": "floor_divide",
    "mod": "remainder",
    "_to_copy": "to",
}
# Given the other way around: x.__rsub__(1) is 1 - x.
_REFLECTED = {"radd": "add", "rmul": "mul", "rsub": "sub", "rdiv": "div", "rtruediv": "div", "rpow": "pow", "rmatmul": "matmul"}
# Python functions that do nothing but call the function of that name; others of torch.functional take other arguments.
_PLAIN_PYTHON = ("split",)


@dataclass(frozen=True)
class Function:
    """A function of PyTorch.

    Attributes:
        name: as its schema has it; ``F.`` and ``torch.`` and ``Tensor.`` begin those that are written in Python.
        method: its first argument is ``self``, wherever the schema has that.
        reflected: its two arguments are swapped.
        python: its signature is asked for its parameters.
    """

    name: str
    method: bool = False
    reflected: bool = False
    python: Callable[..., Any] | None = None


def function_of(target: Any) -> Function | None:
    """The function that is called by a node with this target; None if it is none of PyTorch's, or one that is not known."""
    if isinstance(target, str):
        target = getattr(torch.Tensor, target, None)
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        return Function(_SYNONYMS.get(name, name)) if namespace == "aten" else None
    if isinstance(target, torch._ops.OpOverloadPacket):
        namespace, _, name = target._qualified_op_name.partition("::")
        return Function(_SYNONYMS.get(name, name)) if namespace == "aten" else None
    try:
        return _functions().get(target)
    except TypeError:  # a callable that cannot be hashed
        return None


@functools.cache
def _functions() -> dict[Any, Function]:
    found: dict[Any, Function] = {}
    for name in dir(torch.Tensor):
        method = getattr(torch.Tensor, name)
        if not callable(method):
            continue
        dunder = _DUNDER.match(name)
        plain = dunder[1] if dunder else name
        if plain in _REFLECTED:
            function = Function(_REFLECTED[plain], method=True, reflected=True)
        elif inspect.isfunction(method) and not dunder and plain not in _PLAIN_PYTHON:
            function = Function(f"Tensor.{name}", python=method)
        else:
            function = Function(_SYNONYMS.get(plain, plain), method=True)
        found.setdefault(method, function)
    for owner in (torch, torch._C._nn, torch.functional):
        for name in dir(owner):
            member = getattr(owner, name)
            if inspect.isbuiltin(member):
                found.setdefault(member, Function(_SYNONYMS.get(name, name)))
            elif inspect.isfunction(member) and member.__module__ == "torch.functional":
                plain = name in _PLAIN_PYTHON
                found.setdefault(member, Function(name) if plain else Function(f"torch.{name}", python=member))
    for name in dir(F):
        member = getattr(F, name)
        if inspect.isfunction(member) and member.__module__ == F.__name__:
            found.setdefault(member, Function(f"F.{name}", python=member))
    for name in dir(operator):
        member = getattr(operator, name)
        if inspect.isbuiltin(member) and not name.startswith("__"):
            found.setdefault(member, Function(_SYNONYMS.get(name, name)))
    return found


# --- arguments -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bound:
    """The name of a function, and its arguments by the names of its parameters, defaults included."""

    name: str
    values: Mapping[str, Any]


def bind(function: Function, args: Sequence[Any], kwargs: Mapping[str, Any], is_tensor: Callable[[Any], bool]) -> Bound | None:
    """None if no signature of the function takes the arguments."""
    if function.reflected:
        args = args[::-1]
    if function.python is not None:
        return _bind_python(function, args, kwargs, is_tensor)
    for parameters in _overloads(function.name):
        values = _bind(parameters, args, kwargs, is_tensor, function.method and not function.reflected)
        if values is not None:
            return Bound(function.name, values)
    return None


def _bind_python(
    function: Function, args: Sequence[Any], kwargs: Mapping[str, Any], is_tensor: Callable[[Any], bool]
) -> Bound | None:
    try:
        bound = _signature(function.python).bind(*args, **kwargs)
    except TypeError:
        return None
    bound.apply_defaults()
    values = dict(bound.arguments)
    values.pop("_stacklevel", None)
    space, _, name = function.name.partition(".")
    if space == "F" and not values.get("inplace", False):
        # F.relu(x, inplace=False) is torch.relu(x), where the schema has the same parameters.
        given = {key: value for key, value in values.items() if key != "inplace"}
        for parameters in _overloads(name):
            names = {parameter.name for parameter in parameters}
            if {"self" if key == "input" and "input" not in names else key for key in given} <= names:
                known = _bind(parameters, (), given, is_tensor, False)
                if known is not None:
                    return Bound(name, known)
    return Bound(function.name, values)


@functools.cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


@dataclass(frozen=True)
class _Parameter:
    name: str
    type: str
    default: Any = inspect.Parameter.empty
    keyword_only: bool = False


_TENSOR_OR_NUMBER = "tensor or number"
_OPERATORS = {
    "add": (_Parameter("alpha", "number", 1, keyword_only=True),),
    "sub": (_Parameter("alpha", "number", 1, keyword_only=True),),
    "mul": (),
    "div": (),
}


@functools.cache
def _overloads(name: str) -> tuple[tuple[_Parameter, ...], ...]:
    """The parameters of each overload of ``name``, without those that write their result into an argument."""
    found = []
    if name in _OPERATORS:  # with a number on either side
        found.append((_Parameter("self", _TENSOR_OR_NUMBER), _Parameter("other", _TENSOR_OR_NUMBER), *_OPERATORS[name]))
    for schema in torch._C._jit_get_schemas_for_operator(f"aten::{name}"):
        if any(argument.is_out for argument in schema.arguments):
            continue
        found.append(
            tuple(
                _Parameter(
                    argument.name,
                    str(argument.type),
                    argument.default_value if argument.has_default_value() else inspect.Parameter.empty,
                    argument.kwarg_only,
                )
                for argument in schema.arguments
            )
        )
    return tuple(found)


def _bind(
    parameters: Sequence[_Parameter],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    is_tensor: Callable[[Any], bool],
    method: bool,
) -> dict[str, Any] | None:
    names = [parameter.name for parameter in parameters if not parameter.keyword_only]
    if method and "self" in names and names[0] != "self" and args:  # x.where(condition, y)
        names = ["self", *(name for name in names if name != "self")]
    if len(args) > len(names):
        return None
    given = dict(zip(names, args, strict=False))
    known = {parameter.name for parameter in parameters}
    for key, value in kwargs.items():
        name = "self" if key == "input" and "input" not in known else key
        if name in given or name not in known:
            return None
        given[name] = value
    values = {}
    for parameter in parameters:
        value = given.get(parameter.name, parameter.default)
        if value is inspect.Parameter.empty:
            return None
        if parameter.name in given:
            if not _fits(parameter.type, value, is_tensor):
                return None
            if "List[" in parameter.type and isinstance(value, int):
                value = (value,)
        values[parameter.name] = tuple(value) if isinstance(value, list) else value
    return values


def _fits(type: str, value: Any, is_tensor: Callable[[Any], bool]) -> bool:
    if type.startswith("Optional["):
        return value is None or _fits(type[len("Optional[") : -1], value, is_tensor)
    tensor = is_tensor(value)
    if type == _TENSOR_OR_NUMBER:
        return tensor or (value is not None and not isinstance(value, (list, tuple, str)))
    if type == "Tensor":
        return tensor
    if tensor or value is None:
        return False
    if type.startswith("List["):
        inner = type[len("List[") : -1]
        if isinstance(value, (list, tuple)):
            return all(_fits(inner, part, is_tensor) for part in value)
        return inner == "int" and not isinstance(value, (bool, float, str))
    return not isinstance(value, (list, tuple)) and (type != "str" or isinstance(value, str))
