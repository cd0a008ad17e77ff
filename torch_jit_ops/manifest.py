"""Variants as lines of a file: what one run needed, another builds ahead.

    {"op": "jitk::add_constant", "backend": "cuda", "values": {"constant": 5}, "arch": "9.0a"}

``JITK_RECORD=FILE`` has every variant that a process loads or compiles written there, once each, whatever number of processes
writes; ``python -m torch_jit_ops build --manifest FILE`` compiles them. Functions of ``load_jit`` are not ops and not recorded.
The line of a Python module has its name for the op, and no values.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from torch_jit_ops import environment, process
from torch_jit_ops.declaring.signature import Signature
from torch_jit_ops.declaring.variant import Placeholder, Value, VariantPattern, cpp_name
from torch_jit_ops.store import forms

_LOWEST = -(2**63) + 1  # the dispatcher's key has another meaning for the one below
_LARGEST = 64 << 20
_PLACEHOLDER_VALUE = forms.either(
    forms.optional(forms.one_of(True, False)), forms.whole(_LOWEST), forms.text(r"[\w .,:+-]*", 100)
)
_LINE = forms.fields(
    op=forms.text(r"[A-Za-z_]\w*::[A-Za-z_]\w*"),
    backend=forms.text(r"\w+", 20),
    values=forms.table(forms.text(r"[\w.\[\]:-]+"), _PLACEHOLDER_VALUE, 100),
    arch=forms.text(r"[\w.-]*", 20),
)


@dataclass(frozen=True)
class Entry:
    """One line. ``values`` are pairs of a placeholder's text and its value as JSON holds it."""

    op: str
    backend: str
    values: tuple[tuple[str, int | bool | str | None], ...]
    arch: str


def entry_of(op: str, backend: str, pattern: VariantPattern, values: Sequence[Value], arch: str) -> Entry:
    """The line of a variant."""
    plain = (str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value for value in values)
    return Entry(op, backend, tuple(zip((part.text for part in pattern.placeholders), plain, strict=True)), arch)


def values_of(entry: Entry, pattern: VariantPattern) -> tuple[Value, ...]:
    """The placeholders' values of a line, in the pattern's order.

    Raises:
        ValueError: the op's placeholders are others, or a value is none of its placeholder.
    """
    given = dict(entry.values)
    texts = [part.text for part in pattern.placeholders]
    if set(given) != set(texts):
        raise ValueError(f"{entry.op}: the placeholders are {', '.join(texts) or 'none'}; got {', '.join(given) or 'none'}")
    return tuple(value_of(entry.op, part, pattern.signature, given[part.text]) for part in pattern.placeholders)


def value_of(who: str, part: Placeholder, signature: Signature, given: object) -> Value:
    """The value of a placeholder from JSON or from the command line: ``"bfloat16"``, ``4096``, ``"true"``, ``None``.

    Raises:
        ValueError: it cannot be a value of this placeholder.
    """
    argument = signature.arguments[part.argument]
    if argument.optional and given in (None, "none"):
        return None
    if part.what == "dtype":
        dtype = given if isinstance(given, torch.dtype) else getattr(torch, str(given).removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{who}: {{{part.text}}} must be a dtype, such as bfloat16; got {given!r}")
        cpp_name(dtype)
        return dtype
    if part.what == "value" and argument.kind == "b":
        if str(given).lower() not in ("true", "false"):
            raise ValueError(f"{who}: {{{part.text}}} must be true or false; got {given!r}")
        return str(given).lower() == "true"
    if part.what == "value" and argument.kind == "s":
        if given not in argument.choices:
            raise ValueError(f"{who}: {{{part.text}}} must be one of {', '.join(argument.choices)}; got {given!r}")
        return str(given)
    lowest = 0 if part.what in ("size", "dim") else _LOWEST
    # From the command line as a text. True is none, though Python takes it for 1.
    if type(given) is not int and re.fullmatch(r"-?\d{1,19}", given if isinstance(given, str) else "", re.ASCII) is None:
        raise ValueError(f"{who}: {{{part.text}}} must be an int; got {given!r}")
    number = int(given)  # type: ignore[call-overload]
    if not lowest <= number < 2**63:
        raise ValueError(f"{who}: {{{part.text}}} must be from {lowest} to {2**63 - 1}; got {number}")
    if part.rules and not part.rules[-1].can_be(number):
        raise ValueError(f"{who}: {{{part.text}}} must be a value that its rule makes; got {number}")
    return int(number)


def read(file: Path) -> Iterator[Entry]:
    """The lines of a manifest, each once.

    Raises:
        OSError: it cannot be read.
        ValueError: a line is none of a manifest; the text names it.
    """
    seen = set()
    lines = forms.read(file, _LARGEST, follow=True).split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        who = f"{file}:{number}: no line of a manifest: {line[:100].decode(errors='replace')!r}"
        try:
            record = forms.parse(line, forms.fields(others=True))
        except forms.Malformed:
            raise ValueError(who) from None
        try:
            _LINE(record)
        except forms.Malformed as error:
            raise ValueError(f"{who}\n  {error}") from None
        entry = Entry(record["op"], record["backend"], tuple(record["values"].items()), record["arch"])
        # True and 1 are equal, and other values of a placeholder.
        if (entry, repr(entry)) not in seen:
            seen.add((entry, repr(entry)))
            yield entry


_recorded: set[tuple[str, Entry]] = process.keep(set())


def record(entry: Entry) -> None:
    """Append the line to the file of ``JITK_RECORD``, unless it holds it. A file that cannot be written is a warning."""
    file = environment.record_file()
    if file is None or (str(file), entry) in _recorded:
        return
    _recorded.add((str(file), entry))
    line = json.dumps({"op": entry.op, "backend": entry.backend, "values": dict(entry.values), "arch": entry.arch}) + "\n"
    try:
        with file.open("a+") as lines:
            with contextlib.suppress(OSError):  # without locks a line may come twice, which readers bear
                fcntl.flock(lines, fcntl.LOCK_EX)
            lines.seek(0)
            if line not in lines:
                lines.write(line)
    except OSError as error:
        warnings.warn(f"JITK_RECORD: {file} cannot be written ({error.strerror}); {entry.op} is not recorded", stacklevel=2)
