"""From the signature of a Python function to the schema of an op, and to the plan by which the runtime reads its arguments."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

# Before 2.13 functionalisation takes no out form that returns its outputs, and Inductor plans none.
OUT_FORMS_RETURN: bool = torch.__version__ >= (2, 13)  # type: ignore[operator]

_SCHEMA_TYPES = {
    "T": "Tensor",
    "i": "SymInt",
    "f": "float",
    "b": "bool",
    "s": "str",
    "l": "SymInt[]",
    "L": "Tensor[]",
    "F": "float[]",
    "d": "ScalarType",
    "D": "Device",
}
_KINDS: dict[Any, str] = {
    torch.Tensor: "T",
    int: "i",
    float: "f",
    bool: "b",
    str: "s",
    torch.dtype: "d",
    torch.device: "D",
}
_LISTS: dict[Any, str] = {int: "l", torch.Tensor: "L", float: "F"}
# In functions of PyTorch 2.11 to 2.13 that get the arguments of a functionalised op as **kwargs: an .out overload with one of
# these cannot be compiled ("got multiple values for argument 'mode'").
_TAKEN = ("mode", "dispatch_key")
_SUPPORTED = (
    "Tensor, int, float, bool, str, Literal of strings, torch.dtype, torch.device, list[int], list[float], list[Tensor], "
    "and each of them | None"
)
_RESULTS = "Tensor, Tensor | None, list[Tensor], a tuple of them, or None"


@dataclass(frozen=True)
class Argument:
    """One parameter of an op. ``kind`` is a letter of the C++ signature: T i f b s l L F d D.

    ``reusable``: the op reads it, and an argument that is written may take its place in memory. ``output``: it is the place of
    a result in an out form.
    """

    name: str
    kind: str
    optional: bool = False
    written: bool = False
    reusable: bool = False
    choices: tuple[str, ...] = ()
    default: Any = inspect.Parameter.empty
    keyword_only: bool = False
    output: bool = False

    def schema(self, alias: str) -> str:
        """The parameter as the dispatcher's schema spells it; ``alias`` names what it writes, if it writes."""
        kind = _SCHEMA_TYPES[self.kind]
        if self.written:
            kind = kind.replace("Tensor", f"Tensor({alias}!)")
        text = f"{kind}{'?' if self.optional else ''} {self.name}"
        return text if self.default is inspect.Parameter.empty else f"{text}={_literal(self.default)}"


@dataclass(frozen=True)
class Result:
    """What an op makes: a tensor, ``kind`` T, or a list of them, L."""

    name: str
    kind: str = "T"
    optional: bool = False

    def schema(self) -> str:
        """The type as the dispatcher's schema spells it."""
        return _SCHEMA_TYPES[self.kind] + ("?" if self.optional else "")


@dataclass(frozen=True)
class Signature:
    """The arguments of an op and what it makes.

    Attributes:
        made: the results that are new.
        returned: written arguments that it returns behind them.
        as_outputs: the C++ function takes its results as ``Output&`` behind its arguments; else it returns them.
    """

    arguments: tuple[Argument, ...]
    made: tuple[Result, ...] = ()
    returned: tuple[str, ...] = ()
    as_outputs: bool = True

    @property
    def results(self) -> int:
        """How many results are new."""
        return len(self.made)

    @property
    def has_plain_results(self) -> bool:
        """Whether all of them are tensors, which a caller could have made: neither optional nor lists."""
        return all(result.kind == "T" and not result.optional for result in self.made)

    @property
    def has_lists(self) -> bool:
        """Whether an argument or a result is a list of tensors."""
        return any(each.kind == "L" for each in self.arguments) or any(each.kind == "L" for each in self.made)

    def named(self, outputs: Sequence[str]) -> Signature:
        """The same with these names of the results."""
        made = tuple(replace(result, name=name) for result, name in zip(self.made, outputs, strict=True))
        return replace(self, made=made)

    def schema(self, name: str) -> str:
        """The schema, as ``torch.library.Library.define`` reads it."""
        parts: list[str] = []
        starred = False
        for index, argument in enumerate(self.arguments):
            if argument.keyword_only and not starred:
                parts.append("*")
                starred = True
            parts.append(argument.schema(f"a{index}"))
        made = [result.schema() for result in self.made] + [f"Tensor(a{self.index(returned)}!)" for returned in self.returned]
        returns = made[0] if len(made) == 1 else f"({', '.join(made)})"
        return f"{name}({', '.join(parts)}) -> {returns}"

    def with_outputs(self, names: Sequence[str], *, returned: bool) -> Signature:
        """The ``.out`` form: the results become keyword-only arguments that are written, and returned if that is asked for."""
        outputs = tuple(Argument(name, "T", written=True, keyword_only=True, output=True) for name in names)
        return Signature(self.arguments + outputs, (), tuple(names) if returned else ())

    def returned_of(self, values: Mapping[str, Any]) -> Any:
        """What a call with these arguments returns of those that it has written."""
        found = tuple(values[name] for name in self.returned)
        return found if len(found) > 1 else found[0] if found else None

    def index(self, name: str) -> int:
        """The position of the argument."""
        return [argument.name for argument in self.arguments].index(name)


def tensors_of(values: Iterable[object]) -> Iterator[torch.Tensor]:
    """The tensors among the values of arguments, those of lists too."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (item for item in value if isinstance(item, torch.Tensor))


def signature_of(function: Callable[..., Any], mutates: Sequence[str] = (), reusable: Sequence[str] = ()) -> Signature:
    """Read the signature of ``function``.

    Args:
        function: annotated with the types named in ``TypeError``'s text; returns Tensor, ``Tensor | None``,
            ``list[Tensor]``, a tuple of them, or None.
        mutates: names of the tensors, and of the lists of tensors, that it writes.
        reusable: names of the tensors that it reads and whose place in memory a written one may take.

    Raises:
        TypeError: an annotation is missing or has no place in a schema.
        ValueError: ``mutates`` or ``reusable`` names no tensor argument, or one has a name that PyTorch cannot take.
    """
    who = f"{function.__module__}.{function.__qualname__}"
    try:
        hints = typing.get_type_hints(function)
    except NameError as error:
        raise TypeError(f"{who}: an annotation names {error.name!r}, which its module does not define at run time") from error
    arguments = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(f"{who}: '*{parameter.name}' cannot be part of a schema; list the arguments")
        if parameter.name in _TAKEN:
            raise ValueError(
                f"{who}: an argument cannot be called {parameter.name!r}: torch.compile passes arguments of an op that writes "
                "by name, next to one of its own of that name"
            )
        if parameter.name not in hints:
            raise TypeError(f"{who}: argument {parameter.name!r} needs a type annotation: {_SUPPORTED}")
        argument = _argument(who, parameter.name, hints[parameter.name])
        arguments.append(
            replace(
                argument,
                written=parameter.name in mutates,
                reusable=parameter.name in reusable and parameter.name not in mutates,
                default=parameter.default,
                keyword_only=parameter.kind is parameter.KEYWORD_ONLY,
            )
        )
    for option, names, kinds in (("mutates", mutates, "TL"), ("reusable", reusable, "T")):
        tensors = [argument.name for argument in arguments if argument.kind in kinds]
        for name in names:
            if name not in tensors:
                raise ValueError(f"{who}: {option} names {name!r}; its tensor arguments are {', '.join(tensors) or 'none'}")
    if "return" not in hints:
        raise TypeError(f"{who}: the return type needs an annotation: {_RESULTS}")
    return Signature(tuple(arguments), _results(who, hints["return"]))


def _argument(who: str, name: str, hint: Any) -> Argument:
    wanted, optional = _without_none(hint)
    choices: tuple[str, ...] = ()
    kind = _KINDS.get(wanted) if isinstance(wanted, type) else None
    if typing.get_origin(wanted) is typing.Literal and all(isinstance(choice, str) for choice in typing.get_args(wanted)):
        kind, choices = "s", typing.get_args(wanted)
        for choice in choices:
            if not choice.isidentifier():
                raise TypeError(f"{who}: argument {name!r}: the choice {choice!r} must be an identifier")
    elif typing.get_origin(wanted) in (list, Sequence):
        kind = _LISTS.get(typing.get_args(wanted)[0])
    if set(typing.get_args(wanted)) >= {int, float} or wanted is torch.types.Number:
        raise TypeError(
            f"{who}: argument {name!r} is annotated {hint!r}, which would be a Scalar; the stable ABI of PyTorch carries none: "
            "annotate it float, or int"
        )
    if kind is None:
        raise TypeError(f"{who}: argument {name!r} is annotated {hint!r}; a schema can hold {_SUPPORTED}")
    return Argument(name, kind, optional=optional, choices=choices)


def _without_none(hint: Any) -> tuple[Any, bool]:
    """What ``X | None`` is optional of, and whether it is."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        rest = [option for option in typing.get_args(hint) if option is not type(None)]
        if len(rest) == 1 and len(typing.get_args(hint)) == 2:
            return rest[0], True
    return hint, False


def _results(who: str, hint: Any) -> tuple[Result, ...]:
    if hint is type(None) or hint is None:
        return ()
    several = typing.get_origin(hint) is tuple and typing.get_args(hint) != () and Ellipsis not in typing.get_args(hint)
    parts = typing.get_args(hint) if several else (hint,)
    results = []
    for index, part in enumerate(parts):
        kind, optional = _without_none(part)
        if kind is not torch.Tensor and (typing.get_origin(kind) is not list or typing.get_args(kind) != (torch.Tensor,)):
            raise TypeError(f"{who}: returns {hint!r}; an op returns {_RESULTS}")
        if optional and kind is not torch.Tensor:
            raise TypeError(f"{who}: returns {hint!r}; a list is empty where there is nothing, and not None")
        name = "out" if len(parts) == 1 else f"out{index}"
        results.append(Result(name, "T" if kind is torch.Tensor else "L", optional))
    return tuple(results)


def _literal(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, torch.device):
        return f'"{value}"'
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(str(item) for item in value)}]"
    return str(value)
