"""C++ classes and functions as a Python module, compiled on first use: what has a state, and so cannot be an op.

    native = library.module("block_allocator", sources=["block_allocator.cpp"])
    allocator = native.BlockAllocator(64)            compiled here, the first time

The source is one for pybind11, whose headers PyTorch brings. It says ``PYBIND11_MODULE(TORCH_EXTENSION_NAME, m)``, as that of
an extension of PyTorch does. It is compiled and kept as kernels are: the same store, locks, errors and modes.

Each module is an island: its C++ types are known to no other module, so that two may have classes of the same name, and an
edited one can be loaded beside what it was before.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_jit_ops import environment, forks, registry
from torch_jit_ops.backends import CPU
from torch_jit_ops.backends.wheels import Folder, WheelLibrary
from torch_jit_ops.builder.errors import BuildError
from torch_jit_ops.builder.on_demand import load
from torch_jit_ops.builder.unit import Unit, inlined, line_directive
from torch_jit_ops.calling import develop
from torch_jit_ops.declaring.sources import Source

if TYPE_CHECKING:
    from torch_jit_ops.builder.shared_object import Loaded

# pybind11 keeps the types of all modules whose ABI has the same name in one table. A build's own name, which PyTorch gives it,
# is in that of this module, which makes it the only one.
_ISLAND = """\
#define JITK_TEXT_OF(name) #name
#define JITK_TEXT(name) JITK_TEXT_OF(name)
#define PYBIND11_STDLIB "_" JITK_TEXT(TORCH_EXTENSION_NAME)
"""

_imported: dict[Path, types.ModuleType] = {}  # by library; Python cannot unload one
_lock = forks.Lock()


@dataclass(frozen=True)
class ModuleDeclaration:
    """A module as it was declared.

    Attributes:
        namespace: of its library.
        name: what Python calls it.
        sources: what it is written in.
        folders: where its sources are, if they are files, and folders of headers.
        flags, ldflags: further flags of the compiler, and what to link.
        summary: what it is for, for people.
    """

    namespace: str
    name: str
    sources: Source
    folders: tuple[Folder, ...] = ()
    flags: tuple[str, ...] = ()
    ldflags: tuple[str | WheelLibrary, ...] = ()
    summary: str = ""

    @property
    def qualified_name(self) -> str:
        """``jitk::radix_tree``."""
        return f"{self.namespace}::{self.name}"

    def unit(self) -> Unit:
        """The translation unit of the first source, and those of the others."""
        name = f"{self.namespace}.{self.name}"
        start = f"// {self.qualified_name}\n{_ISLAND}"
        text = f"{start}#undef TORCH_EXTENSION_NAME\n#define TORCH_EXTENSION_NAME {self.name}\n"
        if self.sources.text is None:
            text += f'#include "{self.sources.name}"\n'
        else:
            text += inlined(self.sources.name, self.sources.text)
            text += line_directive(text, name, CPU.name)
        return Unit(
            name=name,
            label=self.qualified_name,
            backend=CPU,
            arch=CPU.arch_of(),
            text=text,
            include=self.folders,
            flags=self.flags,
            beside=tuple(f"{start}{beside}" for beside in self.sources.units_beside()),
            ldflags=self.ldflags,
            debug=environment.debugging(),
            python=True,
        )

    def load(self) -> types.ModuleType:
        """The module, compiled if it is in no store, and imported once in a process; in develop mode what its sources hold now.

        Raises:
            BuildError: it does not compile, or is no module of this name.
            MissingCompiler: it is in no store, and there is no compiler.
            CompileRefused: it is in no store, and JITK_NO_COMPILE=1.
            Exception: whatever the module raises when it is imported.
        """
        unit = self.unit()
        loaded = develop.load(unit) if develop.is_on(self.namespace) else load(unit)
        module = self._import(loaded)
        if environment.record_file() is not None:
            from torch_jit_ops import manifest

            manifest.record(manifest.Entry(self.qualified_name, CPU.name, (), unit.arch))
        return module

    def _import(self, loaded: Loaded) -> types.ModuleType:
        # Where it was loaded from, unless it was built there and published since: the system knows it by its inode.
        opened = Path(str(loaded.library._name))
        path = opened if opened.exists() else loaded.path
        with _lock:
            if loaded.path not in _imported:
                name = f"{self.namespace}.{self.name}"
                loader = ExtensionFileLoader(name, str(path))
                spec = spec_from_file_location(name, path, loader=loader)
                with forks.held_off():  # a child would have half a module
                    try:
                        module = module_from_spec(spec)  # type: ignore[arg-type]
                    except ImportError as error:
                        if "PyInit_" not in str(error):
                            raise
                        raise BuildError(
                            f"{self.qualified_name} is no Python module\n"
                            f"  expected  PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) in {self.sources.name}\n"
                            f"  got       {error}"
                        ) from error
                    loader.exec_module(module)
                _imported[loaded.path] = module
            return _imported[loaded.path]


class LazyModule(types.ModuleType):
    """Stands for a module until, and after, something is asked of it: only then it is compiled or loaded.

    To type checkers the attributes of a module that they do not know are ``Any``.
    """

    def __init__(self, declaration: ModuleDeclaration) -> None:
        super().__init__(f"{declaration.namespace}.{declaration.name}", declaration.summary or None)
        self.__dict__["__declaration__"] = declaration

    def __getattr__(self, name: str) -> Any:
        # inspect, pickle, pytest and notebooks ask everything for names like these, which shall compile nothing.
        if name.startswith("_"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        declaration: ModuleDeclaration = self.__dict__["__declaration__"]
        module = declaration.load()
        value = getattr(module, name)
        if not develop.is_on(declaration.namespace):
            self.__dict__.setdefault(name, value)  # the next access is a plain one
        return value

    def __dir__(self) -> list[str]:
        return dir(self.__dict__["__declaration__"].load())

    def __repr__(self) -> str:
        return f"<module {self.__name__!r} of torch_jit_ops>"

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.__dict__["__declaration__"].qualified_name,)


def _unpickled(name: str) -> types.ModuleType:
    found = registry.module(name)
    if found is None:
        raise RuntimeError(f"the module {name} is not declared in this process: import what declares it before unpickling")
    return LazyModule(found)
