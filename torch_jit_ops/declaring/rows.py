"""What an op does with rows: on which arguments each index of the leading dimensions is work of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch_jit_ops.declaring.signature import Signature


@dataclass(frozen=True, init=False)
class Rows:
    """``Rows("q", "k", per_token=("positions",))``: what the op makes of a row of ``q`` depends on no other row.

    ``torch.func.vmap`` over these arguments is then one call with one more dimension, and DTensors of them may be sharded over
    any leading dimension.

    Args:
        arguments: tensor arguments with any number of leading dimensions, the same for all of them and for all results; of an
            op that writes arguments also those, and their number of dimensions may be fixed.
        per_token: tensor arguments with the first of these dimensions alone, such as a position for each token. Along the
            others, such as heads, all rows share an element of theirs.
        sums: results, by their names in ``outputs``, that have no rows: they are sums over all rows, such as the gradient of
            a weight.
        elementwise: an element of a result depends on the elements in its place of ``arguments`` alone, and these may be
            sharded over the last dimension, too.

    Raises:
        TypeError: an option is no list of names.
    """

    arguments: tuple[str, ...]
    per_token: tuple[str, ...]
    sums: tuple[str, ...]
    elementwise: bool

    def __init__(
        self, *arguments: str, per_token: Sequence[str] = (), sums: Sequence[str] = (), elementwise: bool = False
    ) -> None:
        for option, names in {"arguments": arguments, "per_token": per_token, "sums": sums}.items():
            if isinstance(names, (str, bytes)) or not isinstance(names, Sequence):
                raise TypeError(f"Rows: {option} must be a list, got {names!r}")
            for name in names:
                if not isinstance(name, str):
                    raise TypeError(f"Rows: {option} must hold names, got {name!r}")
        object.__setattr__(self, "arguments", tuple(arguments))
        object.__setattr__(self, "per_token", tuple(per_token))
        object.__setattr__(self, "sums", tuple(sums))
        object.__setattr__(self, "elementwise", elementwise)

    def check(self, who: str, signature: Signature, outputs: Sequence[str]) -> None:
        """Refuse what does not fit the op.

        Args:
            who: the op.
            signature: of its functional or in-place form.
            outputs: of its out form.

        Raises:
            ValueError: a name is of no tensor argument or result, or an argument that is written is missing.
        """
        tensors = [argument.name for argument in signature.arguments if argument.kind == "T"]
        for option, names in {"rows": self.arguments, "per_token": self.per_token}.items():
            for name in names:
                if name not in tensors:
                    raise ValueError(f"{who}: {option} names {name!r}; its tensor arguments are {', '.join(tensors) or 'none'}")
        for name in self.per_token:
            if name in self.arguments:
                raise ValueError(f"{who}: {name!r} is among the rows and per_token; it can be one of them")
        for argument in signature.arguments:
            if self.arguments and argument.written and argument.name not in self.arguments:
                raise ValueError(f"{who}: rows must name {argument.name!r}, too: the op writes it")
        for name in self.sums:
            if name not in outputs:
                raise ValueError(f"{who}: sums names {name!r}; the out form's arguments are {', '.join(outputs) or 'none'}")
        if not self.arguments and (self.per_token or self.sums or self.elementwise):
            option = "per_token" if self.per_token else "sums" if self.sums else "elementwise"
            raise ValueError(f"{who}: {option} is about rows, but rows names none")
