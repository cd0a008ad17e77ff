"""The Python modules of libraries among what is built ahead: each counts as one CPU kernel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch_jit_ops import manifest, registry
from torch_jit_ops.backends import CPU
from torch_jit_ops.builder.unit import Unit

Names = str | Any | Iterable[Any] | None  # as ``build`` takes them
Backends = str | Sequence[str] | None


def needed(ops: Names, dtypes: object, arguments: Mapping[str, Any] | None, backend: Backends) -> list[Unit]:
    """The modules that ``build``'s arguments name: all without names, unless dtypes or values narrow it down to ops."""
    narrowed = ops is None and (dtypes is not None or bool(arguments))
    return [] if narrowed else [each.unit() for each in registry.parted(ops)[1] if _is_chosen(backend)]


def replayed(file: Path, ops: Names, backend: Backends) -> list[Unit]:
    """The modules that a manifest lists."""
    listed = {entry.op for entry in manifest.read(file)}
    return [each.unit() for each in registry.parted(ops)[1] if each.qualified_name in listed and _is_chosen(backend)]


def _is_chosen(backend: Backends) -> bool:
    return backend is None or CPU.name in ([backend] if isinstance(backend, str) else backend)
