"""Says, once for an op, that one placeholder makes a kernel of its own for each of many values: each waits for a compiler."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch_jit_ops import forks
from torch_jit_ops.declaring.variant import VariantPattern

MOST = 48  # variants of an op on a backend that may differ in one placeholder

_seen: dict[tuple[str, str], set[tuple[int, ...]]] = {}
_lock = forks.Lock()


def note(who: str, backend: str, pattern: VariantPattern, words: Sequence[int]) -> None:
    """A call has a key of the dispatcher, without its leading device, for the first time."""
    with _lock:
        seen = _seen.setdefault((who, backend), set())
        before = len(seen)
        seen.add(tuple(words))
        if before != MOST or len(seen) != MOST + 1:
            return
        counts = [len(set(values)) for values in zip(*seen, strict=True)]
    place = max(range(len(counts)), key=counts.__getitem__)
    rest = max(counts[:place] + counts[place + 1 :], default=1)
    if counts[place] < 4 * rest:  # several differ, as they do for an op that is meant for many cases
        return
    part = pattern.placeholders[place]
    argument = pattern.signature.arguments[part.argument]
    remedies = []
    if part.text == argument.name:
        remedies.append(f"have C++ take {argument.name!r} as an argument")
    if not part.rules and (part.what == "size" or argument.kind == "i"):
        remedies.append(f"derive the key from it, such as {{{part.text}:pow2}}")
    if part.rules:
        remedies.append("a coarser rule for it")
    warnings.warn(
        f"{who} has had {MOST + 1} kernels in this process, {counts[place]} of them for values of {{{part.text}}}: "
        f"each is compiled by itself\n  remedy: {', or '.join(remedies) or 'another variant'}",
        stacklevel=2,
    )
