"""What is in a store."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch_jit_ops.store import forms, record
from torch_jit_ops.store.record import DISPATCHER, LARGEST_RECORD, RECORD
from torch_jit_ops.store.store import Store


@dataclass(frozen=True)
class Variant:
    """A built variant. ``record`` is what its variant.json says; ``text`` the translation unit, if it is there."""

    folder: Path
    record: Mapping[str, Any]

    @property
    def op(self) -> str:
        """``jitk::silu_and_mul``, or ``(dispatcher)``."""
        name = str(self.record["name"])
        return "(dispatcher)" if name == DISPATCHER else name.replace(".", "::", 1)

    @property
    def library(self) -> Path:
        return self.folder / Path(str(self.record["library"])).name

    @property
    def bytes(self) -> int:
        """Of all its files."""
        return sum(entry.stat(follow_symlinks=False).st_size for entry in os.scandir(self.folder) if entry.is_file())

    @property
    def used(self) -> float:
        """When it was built or last seen in use, in seconds since 1970."""
        return (self.folder / RECORD).stat().st_mtime

    @property
    def texts(self) -> tuple[str, ...] | None:
        """Its translation units, that of the kernel first; None if one cannot be read."""
        files = sorted((*self.folder.glob("*.cu"), *self.folder.glob("*.cpp")), key=lambda file: (len(file.name), file.name))
        with contextlib.suppress(OSError, forms.Malformed):
            return tuple(os.fsdecode(forms.read(file, LARGEST_RECORD)) for file in files) or None
        return None


def variants(store: Store, ops: Sequence[str] = ()) -> Iterator[Variant]:
    """The variants of a store whose record can be read; of these ops, ``relu2`` or ``jitk::relu2``, if any are named."""
    for folder in store.variants():
        try:
            found = record.read(folder, store.root)
        except (OSError, forms.Malformed):
            continue  # damaged: as good as absent
        if found is not None:
            variant = Variant(folder, found)
            if not ops or {variant.op, variant.op.split("::")[-1]} & set(ops):
                yield variant
