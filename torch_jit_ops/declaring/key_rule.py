"""Rules of derived keys: what ``{x.shape[0]:pow2}`` makes of a size, so that many sizes share a kernel.

=========  ==============================  ======================
rule       value                           of 100
=========  ==============================  ======================
``pow2``   the next power of two           ``128``
``div16``  1 if it is divisible, else 0    ``0``
``min4``   that number at least            ``100``
``max64``  that number at most             ``64``
=========  ==============================  ======================

Several are applied from left to right: ``{x.shape[0]:pow2:min16:max256}``. The dispatcher computes the same
(``csrc/runtime/key_rule.h``), without Python.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

LARGEST = 2**63 - 1
_LARGEST_POWER = 2**62
_RULE = re.compile(r"(div|min|max)(0|[1-9]\d{0,18})")
KNOWN = "pow2, div16, min4 and max256, with any number"


@dataclass(frozen=True)
class Rule:
    """One step from a size to a part of the key. ``name``: pow2, div, min or max."""

    name: str
    number: int = 0

    def __str__(self) -> str:
        return self.name if self.name == "pow2" else f"{self.name}{self.number}"

    def __call__(self, value: int) -> int:
        """The value that the key has for ``value``."""
        if self.name == "pow2":
            return 1 if value <= 1 else min(1 << (value - 1).bit_length(), _LARGEST_POWER)
        if self.name == "div":
            return int(value % self.number == 0)
        return max(value, self.number) if self.name == "min" else min(value, self.number)

    def can_be(self, value: int) -> bool:
        """Whether the rule can make ``value``."""
        return value in (0, 1) if self.name == "div" else self(value) == value


def parse_rules(text: str) -> tuple[Rule, ...]:
    """The rules behind a placeholder's colon, ``"pow2:max256"``.

    Raises:
        ValueError: one is unknown; the text names it and the known ones.
    """
    return tuple(_parse(part) for part in text.split(":"))


def _parse(text: str) -> Rule:
    if text == "pow2":
        return Rule(text)
    found = _RULE.fullmatch(text)
    if found is None or int(found[2]) > LARGEST or (found[1] == "div" and int(found[2]) == 0):
        raise ValueError(f"there is no rule {text!r}; the rules are {KNOWN}")
    return Rule(found[1], int(found[2]))
