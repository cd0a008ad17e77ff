"""Which ops and modules this process has declared, and finding them by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch_jit_ops.op import Op
    from torch_jit_ops.op_library import OpLibrary
    from torch_jit_ops.python_module import ModuleDeclaration

_libraries: list[OpLibrary] = []


def add(library: OpLibrary) -> None:
    """Have ``libraries`` name it."""
    _libraries.append(library)


def remove(library: OpLibrary) -> None:
    """Have ``libraries`` name it no longer. Its ops stay in ``torch.ops``."""
    _libraries.remove(library)


def move(op: Op, to: OpLibrary) -> None:
    """Take the op from other libraries. One that had no other goes: a module that is reloaded makes a new one."""
    for library in [library for library in _libraries if library is not to and library.ops.get(op.name) is op]:
        del library.ops[op.name]
        _remove_if_empty(library)


def move_module(declaration: ModuleDeclaration, to: OpLibrary) -> None:
    """The same of a module that is declared again."""
    for library in [library for library in _libraries if library is not to and library.namespace == to.namespace]:
        if library.modules.pop(declaration.name, None) is not None:
            _remove_if_empty(library)


def _remove_if_empty(library: OpLibrary) -> None:
    if not library.ops and not library.modules:
        remove(library)


def libraries() -> tuple[OpLibrary, ...]:
    """Every OpLibrary of this process."""
    return tuple(_libraries)


def ops() -> list[Op]:
    """Every op of this process."""
    return [op for library in _libraries for op in library.ops.values()]


def find_ops(names: str | Op | Iterable[str | Op] | None = None) -> list[Op]:
    """The ops of these names, ``mylib::scale`` or ``scale``, which is every op of that name; all for None.

    Raises:
        ValueError: there is no such op; the text names the nearest.
    """
    everything = ops()
    if names is None:
        return everything
    chosen: list[Op] = []
    for name in [names] if isinstance(names, str) or not isinstance(names, Iterable) else names:
        found = [op for op in everything if op is name or name in (op.qualified_name, op.name)]
        if not found:
            known = [op.qualified_name if "::" in str(name) else op.name for op in everything]
            raise ValueError(f"there is no op {str(name)!r}{nearest(str(name), known)}")
        chosen += found
    return list(dict.fromkeys(chosen))


def modules() -> list[ModuleDeclaration]:
    """Every module of this process."""
    return [module for library in _libraries for module in library.modules.values()]


def module(qualified_name: str) -> ModuleDeclaration | None:
    """The module ``mylib::block_allocator``, or None."""
    return next((module for module in modules() if module.qualified_name == qualified_name), None)


Names = str | Any | Iterable[Any] | None  # of ops and modules, or ops


def parted(names: Names) -> tuple[list[Any] | None, list[ModuleDeclaration]]:
    """What the names leave for ``find_ops``, and the modules of these names; all modules for None."""
    if names is None:
        return None, modules()
    listed = [names] if isinstance(names, str) or not isinstance(names, Iterable) else list(names)
    asked = {name for name in listed if isinstance(name, str)}
    found = [module for module in modules() if asked & {module.name, module.qualified_name}]
    of_modules: set[str] = set()
    for module in found:
        of_modules |= {module.name, module.qualified_name}
    return [name for name in listed if not isinstance(name, str) or name not in of_modules or _is_op(name)], found


def _is_op(name: str) -> bool:
    return any(name in (op.qualified_name, op.name) for op in ops())


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error about a name: the one that was meant, or all that there are."""
    near = difflib.get_close_matches(name, sorted(set(known)), n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(sorted(set(known))) or 'none'}"


def declared(namespace: str, name: str) -> Op | None:
    """The op ``namespace::name``, or None."""
    return next((library.ops[name] for library in _libraries if library.namespace == namespace and name in library.ops), None)


def unpickled(namespace: str, name: str, module: str) -> Op:
    """The op of that name, for ``pickle`` and ``copy``.

    Raises:
        RuntimeError: it is not declared in this process.
    """
    op = declared(namespace, name)
    if op is None:
        raise RuntimeError(
            f"{namespace}::{name} is not declared in this process\n"
            f"  remedy: import {module}, which declared it, before unpickling"
        )
    return op
