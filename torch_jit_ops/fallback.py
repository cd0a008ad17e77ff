"""Says, once for an op and a dtype, that calls run the PyTorch function because no kernel takes their dtype.

``JITK_FALLBACK=error`` makes it an error. Where the function is what is wanted, as finite differences want float64:

    with fallback.allowed():
        torch.autograd.gradcheck(op, x.double())
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from torch_jit_ops import environment, statistics

_said: dict[str, object] = {}
_allowed: list[None] = []  # an item for each block that is under way, in any thread: autograd has threads of its own


@dataclass(frozen=True)
class Unserved:
    """A dtype that no kernel of an op takes.

    Attributes:
        who: the op.
        argument: the first one that has it.
        dtype: None for one that PyTorch has and kernels do not know of.
        kernels: dtypes of the argument that have kernels.
    """

    who: str
    argument: str
    dtype: torch.dtype | None
    kernels: tuple[torch.dtype, ...]

    def __str__(self) -> str:
        served = ", ".join(map(_shown, self.kernels))
        return f"argument {self.argument!r} is {_shown(self.dtype)}, and there are kernels for {served}"


@contextlib.contextmanager
def allowed() -> Iterator[None]:
    """While the block runs, calls in a dtype without a kernel are meant: they are no error, and nothing is said."""
    _allowed.append(None)
    try:
        yield
    finally:
        _allowed.pop()


def note(unserved: Unserved) -> None:
    """A call comes in this dtype for the first time: count it, and say so.

    Raises:
        RuntimeError: ``JITK_FALLBACK=error``.
    """
    if not _allowed and environment.fallback_is_error():
        raise RuntimeError(f"{unserved.who}: {unserved}\n  remedy: convert it, or unset JITK_FALLBACK=error")
    mine = object()
    key = f"{unserved.who} {unserved.dtype}"
    if _allowed or _said.setdefault(key, mine) is not mine:
        return
    statistics.count_fallback(unserved.who)
    warnings.warn(
        f"{unserved.who} runs its PyTorch function, which is slower: {unserved} (JITK_FALLBACK=error makes this an error)",
        stacklevel=2,
    )


def warn_of_samples(unserved: Unserved) -> None:
    """The op's own samples come in this dtype: nothing is built for them."""
    warnings.warn(f"{unserved.who}: nothing is built for samples whose {unserved}", stacklevel=2)


def _shown(dtype: torch.dtype | None) -> str:
    return "of another dtype" if dtype is None else str(dtype).removeprefix("torch.")
