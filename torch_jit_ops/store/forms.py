"""What a file may say, told once and checked whole before anything uses it.

    LINE = forms.fields(op=forms.text(r"\\w+::\\w+"), backend=forms.one_of("cuda", "cpu"))
    line = forms.parse(data, LINE)     a dict with these fields and no others, or Malformed, which names the field

A form is a function that takes a value and raises ``Malformed``. Texts match from the first character to the last. ``read``
opens plain files alone and reads no more than it is told, so neither a pipe nor a device nor a link stops or leads it astray.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

Form = Callable[[object], None]

_SHOWN = 80


class Malformed(ValueError):
    """A file does not say what it should. The text holds the field and its value."""


def text(pattern: str, longest: int = 4096) -> Form:
    """A str that the pattern matches whole. ``.`` is any character but a newline."""
    compiled = re.compile(pattern, re.ASCII)

    def check(value: object) -> None:
        if not isinstance(value, str) or len(value) > longest or compiled.fullmatch(value) is None:
            raise _wrong(value)

    return check


def one_of(*values: object) -> Form:
    """One of these values, of the same type."""

    def check(value: object) -> None:
        if not any(type(value) is type(each) and value == each for each in values):
            raise _wrong(value)

    return check


def whole(lowest: int = 0, highest: int = 2**63 - 1) -> Form:
    """An int."""

    def check(value: object) -> None:
        if type(value) is not int or not lowest <= value <= highest:
            raise _wrong(value)

    return check


def seconds(value: object) -> None:
    """A time or a duration: a number that is not negative, below the year 10000."""
    if type(value) not in (int, float) or not 0 <= value < 2.5e11:  # type: ignore[operator]
        raise _wrong(value)


def optional(form: Form) -> Form:
    """None, or what the form says."""
    return lambda value: None if value is None else form(value)


def either(*forms: Form) -> Form:
    """What one of the forms says."""

    def check(value: object) -> None:
        for form in forms:
            try:
                return form(value)
            except Malformed:
                continue
        raise _wrong(value)

    return check


def each(form: Form, most: int = 100_000) -> Form:
    """A list."""

    def check(value: object) -> None:
        if not isinstance(value, list) or len(value) > most:
            raise _wrong(value)
        for index, item in enumerate(value):
            _within(f"[{index}]", form, item)

    return check


def table(key: Form, form: Form, most: int = 100_000) -> Form:
    """A dict whose keys are not known before."""

    def check(value: object) -> None:
        if not isinstance(value, dict) or len(value) > most:
            raise _wrong(value)
        for name, item in value.items():
            key(name)
            _within(_shown(name), form, item)

    return check


def fields(*, missing: tuple[str, ...] = (), others: bool = False, **forms: Form) -> Form:
    """A dict with these fields, of which those in ``missing`` may be so; ``others``: what is not named here may be there."""

    def check(value: object) -> None:
        if not isinstance(value, dict):
            raise _wrong(value)
        for name, form in forms.items():
            if name in value:
                _within(name, form, value[name])
            elif name not in missing:
                raise Malformed(f"{name} is missing")
        if not others and not forms.keys() >= value.keys():
            raise Malformed(f"{_shown(min(value.keys() - forms.keys()))} is no field here")

    return check


def parse(data: bytes, form: Form) -> Any:
    """The JSON value of a text.

    Raises:
        Malformed: it is none, or not of the form.
    """
    try:
        value = json.loads(data.decode(), object_pairs_hook=_once, parse_int=_int, parse_constant=_no_number)
    except RecursionError:
        raise Malformed("it is nested too deeply") from None
    except Malformed:
        raise
    except ValueError as error:  # of the decoder, or of JSON
        raise Malformed(f"it is no JSON: {error}") from None
    form(value)
    return value


def read(path: str | Path, largest: int, *, follow: bool = False) -> bytes:
    """The bytes of a plain file. Nothing else is opened: no pipe, device, socket or folder, and no link unless ``follow``.

    Raises:
        OSError: there is none.
        Malformed: it is no plain file, or has more than ``largest`` bytes.
    """
    state = os.stat(path, follow_symlinks=follow)  # before it is opened, which a device may take for an order
    if not stat.S_ISREG(state.st_mode):
        raise Malformed("it is no plain file")
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    try:
        state = os.fstat(number)
        if not stat.S_ISREG(state.st_mode) or state.st_size > largest:
            raise Malformed(f"it has more than {largest} bytes")
        # Files of /proc claim to be empty, and some never end.
        parts = []
        left = state.st_size + 1
        while left > 0 and (part := os.read(number, left)):
            parts.append(part)
            left -= len(part)
        if left != 1:
            raise Malformed("its size is not what the system says")
        return b"".join(parts)
    finally:
        os.close(number)


def printable(value: object) -> str:
    """A text without what a terminal would obey: newlines, escapes, marks that turn the direction of writing."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(value))


def _within(name: str, form: Form, value: object) -> None:
    try:
        form(value)
    except Malformed as error:
        raise Malformed(f"{name}: {error}") from None


def _wrong(value: object) -> Malformed:
    return Malformed(f"unexpected {type(value).__name__ if isinstance(value, (list, dict)) else _shown(repr(value))}")


def _shown(value: str) -> str:
    return printable(value if len(value) <= _SHOWN else f"{value[:_SHOWN]}...")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Malformed("it has a field twice")
    return found


def _int(digits: str) -> int:
    if len(digits) > 20:  # Python itself refuses some thousands, or takes long
        raise Malformed(f"it has a number of {len(digits)} digits")
    return int(digits)


def _no_number(name: str) -> None:
    raise Malformed(f"{name} is no number")
