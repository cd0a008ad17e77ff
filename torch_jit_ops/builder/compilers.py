"""Which compilers would build a unit: their identity decides whether what is in the store still counts."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch_jit_ops import environment
from torch_jit_ops.backends import toolchain
from torch_jit_ops.builder.errors import MissingCompiler
from torch_jit_ops.builder.unit import Unit
from torch_jit_ops.store import cache, trust

_known: dict[tuple[object, ...], tuple[str | None, MissingCompiler | None]] = {}


def compiler_of(unit: Unit, store: cache.Store) -> str | None:
    """The identity of the compilers that would build the unit; None if they are missing."""
    return found_for(unit, store)[0]


def found_for(unit: Unit, store: cache.Store) -> tuple[str | None, MissingCompiler | None]:
    """The identity of the compilers for the unit, or why there are none. Looked for once in a process and environment."""
    key = (unit.backend, store.root, *environment.compiler_choice(unit.backend))
    if key not in _known:
        try:
            commands = [toolchain.host_command()]
            if unit.backend == "cuda":
                commands.insert(0, (str(toolchain.cuda_toolkit().nvcc),))
            try:
                memory = store.own_folder("compilers")
            except (OSError, trust.UntrustedCache):  # who reads or writes a kernel there says so
                memory = Path(os.devnull)
            _known[key] = " / ".join(identity(unit.backend, commands, memory)), None
        except MissingCompiler as missing:
            _known[key] = None, missing
    return _known[key]


def identity(backend: str, commands: Iterable[tuple[str, ...]], memory: Path) -> Iterator[str]:
    """The compilers' versions, and what else of the machine changes what they make."""
    for command in commands:
        yield toolchain.compiler_identity(command, memory)
        scripts = toolchain.scripts_behind(command)
        if scripts is not None:
            yield f"started by scripts {scripts}"
        if len(command) > 1:
            yield f"as {shlex.join(command)}"
    yield from (f"{name}={value}" for name, value in environment.compiler_settings(backend).items())
