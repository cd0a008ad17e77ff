"""Variant strings: which C++ instantiation serves which arguments.

``"silu_and_mul<{input.dtype}>"`` names a C++ function. Its placeholders are the key of a compiled variant, and nothing else is:

=====================  ====================================================  ==================================
placeholder            value                                                 in C++
=====================  ====================================================  ==================================
``{x.dtype}``          dtype of the tensor ``x``                             ``bf16_t``
``{x.shape[-1]}``      size of a dimension, counted from either end          ``4096``
``{x.dim}``            number of dimensions                                  ``2``
``{n}``                an int, a bool, a dtype, or a str with fixed choices  ``5``, ``true``, ``bf16_t``, ``neox``
``{x.shape[0]:pow2}``  of a size or an int, by rules of ``key_rule.py``      ``128``
=====================  ====================================================  ==================================

An argument that is a placeholder by itself, ``{n}``, is a template argument, and is not passed to the function again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torch_jit_ops.declaring.key_rule import Rule, parse_rules
from torch_jit_ops.declaring.signature import Argument, Signature

# DLPack's (code, bits) of a dtype, packed as the runtime packs them, beside its names.
_DTYPES: dict[int, tuple[torch.dtype, str]] = {
    code << 8 | bits: (dtype, name)
    for code, bits, dtype, name in [
        (6, 8, torch.bool, "bool"),
        (0, 8, torch.int8, "int8_t"),
        (0, 16, torch.int16, "int16_t"),
        (0, 32, torch.int32, "int32_t"),
        (0, 64, torch.int64, "int64_t"),
        (1, 8, torch.uint8, "uint8_t"),
        (1, 16, torch.uint16, "uint16_t"),
        (1, 32, torch.uint32, "uint32_t"),
        (1, 64, torch.uint64, "uint64_t"),
        (2, 16, torch.float16, "fp16_t"),
        (4, 16, torch.bfloat16, "bf16_t"),
        (2, 32, torch.float32, "fp32_t"),
        (2, 64, torch.float64, "fp64_t"),
        (10, 8, torch.float8_e4m3fn, "fp8_e4m3_t"),
        (12, 8, torch.float8_e5m2, "fp8_e5m2_t"),
        (14, 8, torch.float8_e8m0fnu, "fp8_e8m0_t"),
    ]
}
# Dtypes that no kernel has a type for, so that errors can name them.
_WITHOUT_TYPE = {
    5 << 8 | 32: torch.complex32,
    5 << 8 | 64: torch.complex64,
    5 << 8 | 128: torch.complex128,
    11 << 8 | 8: torch.float8_e4m3fnuz,
    13 << 8 | 8: torch.float8_e5m2fnuz,
}
_KEY_OF_DTYPE = {dtype: key for key, (dtype, _) in _DTYPES.items()}
_CPP_NAME = dict(_DTYPES.values())
_NONE = -(2**63)  # the runtime's key of an optional argument that was not given

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_SHAPE = re.compile(r"(\w+)\.shape\[(-?\d+)\]")
_TEMPLATE = re.compile(r"<.*")

Value = torch.dtype | int | bool | str | None


def cpp_name(dtype: torch.dtype) -> str:
    """The C++ type of ``dtype`` in the headers, such as ``bf16_t``.

    Raises:
        ValueError: kernels have no such type.
    """
    if dtype not in _CPP_NAME:
        raise ValueError(f"{dtype} has no C++ type in kernels; those that have one are {', '.join(map(str, _CPP_NAME))}")
    return _CPP_NAME[dtype]


_CPP_ARGUMENT = {
    "T": "TensorView",
    "i": "int64_t",
    "f": "double",
    "b": "bool",
    "s": "Text",
    "l": "IntList",
    "L": "TensorList",
    "F": "FloatList",
    "d": "DLDataType",
    "D": "DLDevice",
    "O": "Output&",
    "P": "OutputList&",
}


def letters_of(signature: str) -> list[tuple[str, bool]]:
    """The parameters in a text of export.h: a letter for each, and whether ``?`` says that it is optional."""
    return [(letter, bool(mark)) for letter, mark in re.findall(r"(\w)(\??)", signature.partition(">")[0])]


def cpp_declaration(signature: str, function: str, names: Sequence[str] = ()) -> str:
    """A C++ declaration from the letters of export.h: ``void scale(TensorView, double, Output&)`` from ``TfO>0``.

    Args:
        signature: a letter for each argument, ``?`` behind an optional one, ``>`` and the number of results.
        function: its name.
        names: of the arguments, all or none.
    """
    types = [
        f"std::optional<{_CPP_ARGUMENT[letter]}>" if optional else _CPP_ARGUMENT[letter]
        for letter, optional in letters_of(signature)
    ]
    if names:
        types = [f"{kind} {name}" for kind, name in zip(types, names, strict=True)]
    made = ["Tensor"] * int(signature.partition(">")[2])
    returned = made[0] if len(made) == 1 else f"std::tuple<{', '.join(made)}>" if made else "void"
    return f"{returned} {function}({', '.join(types)})"


def dtype_of_key(key: int) -> torch.dtype:
    """The dtype of the runtime's number for it.

    Raises:
        KeyError: kernels have no such type.
    """
    return _DTYPES[key][0]


@dataclass(frozen=True)
class Placeholder:
    """One fact about the arguments that picks the kernel."""

    text: str
    argument: int
    what: str  # dtype, size, dim or value: the words of the runtime's plan
    dim: int = 0
    rules: tuple[Rule, ...] = ()


@dataclass(frozen=True)
class VariantPattern:
    """A parsed variant string."""

    text: str
    signature: Signature
    placeholders: tuple[Placeholder, ...]

    def plan(self, signature: Signature) -> str:
        """How the runtime reads the arguments of one overload and makes its key (``csrc/runtime/plan.h``)."""
        lines = []
        for argument in signature.arguments:
            flags = ("?" if argument.optional else "") + ("!" if argument.written else "")
            flags += "=" if argument.reusable else ""
            flags += "<" if argument.name in self.template_arguments() else ""
            flags += ">" if argument.name in signature.returned else ""
            lines.append(f"arg {_letter(argument)}{flags} {argument.name} {','.join(argument.choices)}".rstrip())
        for part in self.placeholders:
            lines.append(f"key {part.argument} {part.what} {part.dim} {','.join(map(str, part.rules))}".rstrip())
        if signature.as_outputs:
            lines += [f"output {made.kind}{'?' if made.optional else ''} {made.name}" for made in signature.made]
        lines.append(f"results {signature.results}")
        return "\n".join(lines)

    def arguments_of(self, what: str) -> list[str]:
        """Names of the arguments of the placeholders of one kind, such as those whose ``dtype`` picks the kernel."""
        return [self.signature.arguments[part.argument].name for part in self.placeholders if part.what == what]

    def template_arguments(self) -> set[str]:
        """Names of the arguments that the C++ function takes as template arguments alone."""
        arguments = self.signature.arguments
        return {arguments[part.argument].name for part in self.placeholders if part.text == arguments[part.argument].name}

    def cpp_signature(self, signature: Signature) -> str:
        """The signature that the C++ function of an overload must have, in the letters of export.h."""
        text = "".join(_letter(argument) + ("?" if argument.optional else "") for argument in self._passed(signature))
        if not signature.as_outputs:
            return f"{text}>{signature.results}"
        return text + "".join("O" if made.kind == "T" else "P" for made in signature.made) + ">0"

    def cpp_declaration(self, signature: Signature, function: str) -> str:
        """The declaration of the C++ function, such as ``void scale(TensorView x, double factor, Output& out)``."""
        names = [argument.name for argument in self._passed(signature)]
        names += [made.name for made in signature.made if signature.as_outputs]
        return cpp_declaration(self.cpp_signature(signature), function, names)

    def _passed(self, signature: Signature) -> list[Argument]:
        return [argument for argument in signature.arguments if argument.name not in self.template_arguments()]

    def values(self, key: Sequence[int]) -> tuple[Value, ...]:
        """The placeholders' values from the runtime's key, without its leading device.

        Raises:
            KeyError: kernels have no type for a dtype among them.
        """
        return tuple(self._value(part, word) for part, word in zip(self.placeholders, key, strict=True))

    def dtypes_of_key(self, words: Sequence[int]) -> dict[str, torch.dtype | None]:
        """The dtypes in the runtime's key, without its leading device, by argument; None for one that DLPack does not know."""
        pairs = [(part, word) for part, word in zip(self.placeholders, words, strict=True) if part.what == "dtype"]
        return {
            self.signature.arguments[part.argument].name: _DTYPES[word][0] if word in _DTYPES else _WITHOUT_TYPE.get(word)
            for part, word in pairs
            if word != _NONE
        }

    def dtypes_of(self, given: Mapping[str, object]) -> dict[str, torch.dtype | None]:
        """The same of the arguments of a call, by name."""
        values = {name: given.get(name) for name in self.arguments_of("dtype")}
        return {
            name: value.dtype if isinstance(value, torch.Tensor) else value
            for name, value in values.items()
            if isinstance(value, (torch.Tensor, torch.dtype))
        }

    def key(self, values: Sequence[Value]) -> tuple[int, ...]:
        """The inverse of ``values``."""
        return tuple(self._word(part, value) for part, value in zip(self.placeholders, values, strict=True))

    def words_of(self, arguments: Sequence[object]) -> tuple[int, ...]:
        """The runtime's key, without its leading device, for all arguments of a call in order."""
        return self.key([_derived(part, _value_of(part, arguments[part.argument])) for part in self.placeholders])

    def static_words_of(self, arguments: Sequence[object]) -> tuple[int, ...] | None:
        """``words_of``; None where one is a symbol of a traced graph, which ``int`` would turn into a constant of it."""
        values = [_value_of(part, arguments[part.argument]) for part in self.placeholders]
        return None if any(isinstance(value, (torch.SymInt, torch.SymBool)) for value in values) else self.words_of(arguments)

    def instantiate(self, values: Sequence[Value]) -> str:
        """The C++ expression for these values."""
        replacements = iter([_cpp(value) for value in values])
        return _PLACEHOLDER.sub(lambda _: next(replacements), self.text)

    def export_name(self) -> str:
        """The function's own name, without namespaces and template arguments."""
        return _TEMPLATE.sub("", self.text).split("::")[-1]

    def _value(self, part: Placeholder, word: int) -> Value:
        if word == _NONE:
            return None
        if part.what == "dtype":
            return dtype_of_key(word)
        argument = self.signature.arguments[part.argument]
        if part.what == "value" and argument.kind == "b":
            return bool(word)
        if part.what == "value" and argument.kind == "s":
            return argument.choices[word]
        return word

    def _word(self, part: Placeholder, value: Value) -> int:
        if value is None:
            return _NONE
        if isinstance(value, torch.dtype):
            return _KEY_OF_DTYPE[value]
        if isinstance(value, str):
            return self.signature.arguments[part.argument].choices.index(value)
        return int(value)


def _letter(argument: Argument) -> str:
    return "O" if argument.output else argument.kind


def _value_of(part: Placeholder, argument: Any) -> Value:
    """The fact itself, before rules."""
    value: Value
    if argument is None or part.what == "value" or isinstance(argument, torch.dtype):
        value = argument
    elif part.what == "dtype":
        value = argument.dtype
    elif part.what == "size":
        value = argument.shape[part.dim]
    else:
        value = argument.dim()
    return value


def _derived(part: Placeholder, value: Value) -> Value:
    if value is None or isinstance(value, (torch.dtype, str)):
        return value  # rules are for numbers
    for rule in part.rules:
        value = rule(int(value))
    return value


def parse_variant(who: str, text: str, signature: Signature) -> VariantPattern:
    """Parse the variant string of the op ``who``.

    Raises:
        ValueError: a placeholder is unknown, or the string is no C++ name.
    """
    if not re.match(r"[A-Za-z_:][\w:]*(<.*>)?$", text.replace("{", "").replace("}", "")):
        raise ValueError(f"{who}: the variant {text!r} must be a C++ function, such as 'norm<{{input.dtype}}>'")
    return VariantPattern(text, signature, tuple(_placeholder(who, part, signature) for part in _PLACEHOLDER.findall(text)))


def _placeholder(who: str, text: str, signature: Signature) -> Placeholder:
    fact, colon, rules = text.partition(":")
    part = _fact(who, fact, signature)
    if not colon:
        return part
    countable = part.what == "size" or (part.what == "value" and signature.arguments[part.argument].kind == "i")
    if not countable:
        raise ValueError(f"{who}: the variant's placeholder {{{text}}} has rules, which are for sizes and ints alone")
    try:
        return Placeholder(text, part.argument, part.what, part.dim, parse_rules(rules))
    except ValueError as error:
        raise ValueError(f"{who}: the variant's placeholder {{{text}}}: {error}") from None


def _fact(who: str, text: str, signature: Signature) -> Placeholder:
    arguments = {argument.name: argument for argument in signature.arguments}
    shape = _SHAPE.fullmatch(text)
    name = shape[1] if shape else text.split(".")[0]
    if name not in arguments:
        raise ValueError(f"{who}: the variant's placeholder {{{text}}} names no argument; they are {', '.join(arguments)}")
    index, argument = signature.index(name), arguments[name]
    if argument.kind == "T":
        if shape:
            return Placeholder(text, index, "size", int(shape[2]))
        if text == f"{name}.dtype":
            return Placeholder(text, index, "dtype")
        if text == f"{name}.dim":
            return Placeholder(text, index, "dim")
        raise ValueError(
            f"{who}: of a tensor a variant can use {{{name}.dtype}}, {{{name}.shape[i]}} and {{{name}.dim}}, not {{{text}}}"
        )
    if text == name and argument.kind == "d":
        return Placeholder(text, index, "dtype")
    if text == name and (argument.kind in "ib" or argument.choices):
        return Placeholder(text, index, "value")
    raise ValueError(
        f"{who}: the variant's placeholder {{{text}}} must be a tensor's property, an int, a bool, a dtype, "
        "or a str with Literal choices"
    )


def _cpp(value: Value) -> str:
    if isinstance(value, torch.dtype):
        return cpp_name(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return "void" if value is None else str(value)
