"""Compiles C++ functions and calls them, without declaring an op: the form of SGLang's guide to JIT kernels.

    args = make_cpp_args(constant)
    wrappers = [("add_constant", f"add_constant<{args}>")]
    module = load_jit("add_constant", *args, cuda_files=["add_constant.cuh"], cuda_wrappers=wrappers)
    module.add_constant(dst, src)

A function is an op all the same, in the namespace ``jitk_modules``: its C++ signature is the schema. It works in eager and
inside ``torch.compile``. What a declared op has beyond that, a fallback, a derivative, a fake, comes from its PyTorch function,
which is not here.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from torch_jit_ops import environment, forks
from torch_jit_ops.backends import CPU, CUDA, Backend
from torch_jit_ops.backends.wheels import WheelLibrary
from torch_jit_ops.builder.on_demand import load
from torch_jit_ops.builder.unit import Unit, csrc_dir, inlined, line_directive
from torch_jit_ops.calling import develop, dispatcher
from torch_jit_ops.declaring import per_target, variant
from torch_jit_ops.declaring.signature import Argument, Result, Signature
from torch_jit_ops.store.digests import digest_of_record

if TYPE_CHECKING:
    from torch_jit_ops.builder.shared_object import Loaded

NAMESPACE = "jitk_modules"
CppArg = int | bool | float | str | torch.dtype
Function = TypeVar("Function", bound=Callable[..., Any])

_definitions = torch.library.Library(NAMESPACE, "DEF")
_modules: dict[str, Module] = {}
_modules_lock = forks.Lock()


class CppArgs(list[str]):
    """Template arguments; as text, a list for angle brackets."""

    def __str__(self) -> str:
        return ", ".join(self)


def make_cpp_args(*args: CppArg) -> CppArgs:
    """Spell Python values as C++ template arguments: ints, bools, floats, dtypes (``bf16_t``), and strings as they are.

    Raises:
        TypeError: a value of another type.
    """
    return CppArgs(_cpp(arg) for arg in args)


def _cpp(arg: CppArg) -> str:
    if isinstance(arg, bool):
        return "true" if arg else "false"
    if isinstance(arg, (int, float, str)):
        return str(arg)
    if isinstance(arg, torch.dtype):
        return variant.cpp_name(arg)
    raise TypeError(f"make_cpp_args takes int, bool, float, str and torch.dtype, got {type(arg).__name__}: {arg!r}")


def cache_once(function: Function) -> Function:
    """Keep a function's results by its arguments, for functions that return a module of ``load_jit``.

    Inside ``torch.compile`` the function runs while the graph is traced, which ``functools.lru_cache`` would have the compiler
    trace.
    """
    names: dict[Any, str] = {}
    results = types.SimpleNamespace()
    lock = forks.Lock()

    def ensure(keywords: tuple[str, ...], values: tuple[Any, ...]) -> str:
        with lock:
            name = names.get((keywords, values))
            if name is None:
                name = f"result{len(names)}"
                positional = len(values) - len(keywords)
                kwargs = dict(zip(keywords, values[positional:], strict=True))
                setattr(results, name, function(*values[:positional], **kwargs))
                names[keywords, values] = name
            return name

    # The compiler takes a name for a constant, and then reads the attribute as it would any other; it could not guard the
    # module itself.
    name_of = torch.compiler.assume_constant_result(ensure)

    @functools.wraps(function)
    def cached(*args: Any, **kwargs: Any) -> Any:
        # To the compiler a key of a dict is a constant: this is where a symbolic int becomes one.
        values = tuple(next(iter({value: None})) for value in (*args, *kwargs.values()))
        return getattr(results, name_of(tuple(kwargs), values))

    return cached  # type: ignore[return-value]


class Module:
    """The functions of one ``load_jit`` call, as attributes."""

    def __init__(self, name: str, functions: Mapping[str, Any]) -> None:
        self.__name__ = name
        for export, function in functions.items():
            setattr(self, export, function)

    def __repr__(self) -> str:
        functions = ", ".join(name for name in vars(self) if name != "__name__")
        return f"<jitk module {self.__name__}: {functions}>"


def load_jit(
    name: str,
    *args: str,
    cuda_files: Sequence[str | Path] = (),
    cuda_wrappers: Sequence[tuple[str, str]] = (),
    cpp_files: Sequence[str | Path] = (),
    cpp_wrappers: Sequence[tuple[str, str]] = (),
    cuda_sources: Sequence[str] = (),
    cpp_sources: Sequence[str] = (),
    extra_cuda_cflags: Sequence[str] = (),
    extra_cflags: Sequence[str] = (),
    extra_ldflags: Sequence[str | WheelLibrary] = (),
    extra_include_paths: Sequence[str | os.PathLike[str]] = (),
    mutates: Mapping[str, Sequence[int]] | None = None,
    fakes: Mapping[str, Callable[..., Any]] | None = None,
) -> Module:
    """Compile files, or find what was compiled from them, and return a module of their functions.

    Args:
        name: for folders, progress and errors.
        args: what distinguishes this instantiation in them, usually ``*make_cpp_args(...)``.
        cuda_files, cpp_files: for nvcc and for the C++ compiler. Relative paths start at the file that calls, or its folder
            ``csrc``.
        cuda_wrappers, cpp_wrappers: pairs of the name in Python and the C++ function, such as ``("scale", "scale<bf16_t>")``.
            Arguments may be all that ``docs/declaring.md`` lists; results are ``Output&`` behind them, or a Tensor or a tuple
            of it that is returned, or none.
        cuda_sources, cpp_sources: sources that are no files, behind those that are.
        extra_cuda_cflags, extra_cflags: further flags of the two compilers.
        extra_ldflags: what to link: ``["-lz"]``, or ``library_of(...)`` for a library of a wheel.
        extra_include_paths: further folders for ``#include``, or ``include_of(...)`` for those of a wheel.
        mutates: for each function, the positions of the arguments that it writes. Default: every tensor if it returns nothing,
            else none.
        fakes: for each function, what tracing calls instead of it. A function that returns nothing needs none.

    Returns:
        An object with the wrappers as attributes. The same call returns the same object.

    Raises:
        BuildError: it does not compile.
        FileNotFoundError: a file is in none of the folders.
        MissingCompiler: there is nothing compiled and no compiler.
        TypeError: sources are no list of texts.
        ValueError: nothing is exported, ``mutates`` or ``fakes`` names no function, or a flag or a folder cannot be used.
    """
    here = Path(inspect.stack()[1].filename).resolve().parent
    label = f"{name}<{', '.join(args)}>" if args else name
    exports = [export for export, _ in (*cuda_wrappers, *cpp_wrappers)]
    for kind, names in (("mutates", mutates or ()), ("fakes", fakes or ())):
        unknown = sorted(set(names) - set(exports))
        if unknown:
            raise ValueError(f"load_jit({name!r}): {kind} names {', '.join(unknown)}; the functions are {', '.join(exports)}")
    if not exports or len(set(exports)) != len(exports):
        raise ValueError(f"load_jit({name!r}): cuda_wrappers and cpp_wrappers must name functions, each once; got {exports}")
    who = f"load_jit({name!r})"
    include = tuple(Path(folder) for folder in per_target.folders(who, extra_include_paths))
    parts = []
    for backend, wrappers, files, texts, flags in (
        (CUDA, cuda_wrappers, cuda_files, cuda_sources, extra_cuda_cflags),
        (CPU, cpp_wrappers, cpp_files, cpp_sources, extra_cflags),
    ):
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            kind = _SOURCES[backend]
            raise TypeError(f"{who}: {kind} must be a list of texts, got {texts!r}")
        if wrappers:
            found = [_find(name, file, here) for file in files]
            linked = per_target.ldflags(who, {backend.name: extra_ldflags}, (backend.name,))[backend.name]
            parts.append(_Part(backend, name, label, found, tuple(texts), tuple(wrappers), include, tuple(flags), linked))
    units = [part.unit(_default_arch(part.backend)) for part in parts]
    places = [[str(folder) for folder in unit.folders()] for unit in units]
    written = {export: list(positions) for export, positions in (mutates or {}).items()}
    key = digest_of_record([name, [unit.key() for unit in units], places, written])
    with _modules_lock:
        if key not in _modules:
            functions: dict[str, Any] = {}
            for part in parts:
                functions.update(part.define(key[:12], mutates or {}, fakes or {}))
            _modules[key] = Module(label, functions)
        return _modules[key]


def _find(name: str, file: str | Path, here: Path) -> Path:
    places = [here / file, here / "csrc" / file, csrc_dir() / file]
    for place in places:
        if place.is_file():
            return place.resolve()
    raise FileNotFoundError(f"load_jit({name!r}): {str(file)!r} is not in {', '.join(str(place.parent) for place in places)}")


_SOURCES = {CUDA: "cuda_sources", CPU: "cpp_sources"}  # load_jit's names for them


def _default_arch(backend: Backend) -> str:
    return backend.arch_of(backend.index_of(torch.device(backend.device_type)) if backend.is_here() else 0)


class _Part:
    """The functions of one backend."""

    def __init__(
        self,
        backend: Backend,
        name: str,
        label: str,
        files: Sequence[Path],
        texts: tuple[str, ...],
        wrappers: tuple[tuple[str, str], ...],
        include: tuple[Path, ...],
        flags: tuple[str, ...],
        ldflags: tuple[str | WheelLibrary, ...],
    ) -> None:
        self.backend = backend
        self.name = name
        self.label = label
        self.files = files
        self.texts = texts
        self.wrappers = wrappers
        self.include = include
        self.flags = flags
        self.ldflags = ldflags

    def unit(self, arch: str) -> Unit:
        unit = f"module.{re.sub(r'[^A-Za-z0-9_]', '_', self.name)}"
        kind = _SOURCES[self.backend]
        text = f"// {self.label}\n#include <jitk/export.h>\n"
        text += "".join(f'#include "{file.name}"\n' for file in self.files)
        text += "".join(inlined(f"{unit.partition('.')[2]}.{kind}[{place}]", source) for place, source in enumerate(self.texts))
        text += line_directive(text, unit, self.backend.name) if self.texts else ""
        text += "using namespace jitk;\n"
        text += "".join(f"JITK_EXPORT({export}, {function})\n" for export, function in self.wrappers)
        folders = tuple(dict.fromkeys(file.parent for file in self.files))
        return Unit(
            name=unit,
            label=self.label,
            backend=self.backend,
            arch=arch,
            text=text,
            include=(*folders, *self.include),
            flags=self.flags,
            ldflags=self.ldflags,
            debug=environment.debugging(),
        )

    def define(
        self, digest: str, mutates: Mapping[str, Sequence[int]], fakes: Mapping[str, Callable[..., Any]]
    ) -> dict[str, Any]:
        loaded = self._load(_default_arch(self.backend))
        dispatcher.library()
        functions = {}
        with forks.held_off():
            for export, _ in self.wrappers:
                signature = _signature(self.label, export, loaded.signature(export), mutates.get(export))
                op = f"{export}_{digest}"
                _definitions.define(signature.schema(op), tags=(torch.Tag.pt2_compliant_tag,))
                fake = fakes.get(export, _nothing if signature.results == 0 else None)
                if fake is not None:
                    torch.library.register_fake(f"{NAMESPACE}::{op}", fake, lib=_definitions)
                plan = variant.parse_variant(op, export, signature).plan(signature)
                # A function of a CUDA file may take CPU tensors as well, or be told by its own checks that it may not.
                who = export if self.label.partition("<")[0] == export else f"{self.label}.{export}"
                dispatch_keys = tuple(dict.fromkeys((self.backend.dispatch_key, CPU.dispatch_key)))
                if not any(argument.kind == "T" for argument in signature.arguments):
                    dispatch_keys = ("CompositeExplicitAutograd",)  # without a tensor there is no device to go by
                dispatcher.reserve(f"load_jit({self.name!r})", len(dispatch_keys))
                answer = functools.partial(self._answer, export, loaded.signature(export))
                for dispatch_key in dispatch_keys:
                    dispatcher.register(who, NAMESPACE, op, dispatch_key, "", plan, answer)
                functions[export] = getattr(getattr(torch.ops, NAMESPACE), op).default
        return functions

    def _load(self, arch: str) -> Loaded:
        unit = self.unit(arch)
        return develop.load(unit) if develop.is_on(NAMESPACE) else load(unit)

    def _answer(self, export: str, signature: str, key: Sequence[int]) -> int | dispatcher.Once:
        loaded = self._load(self.backend.arch_of(key[0]) if key[0] >= 0 else _default_arch(self.backend))
        found = loaded.signature(export)
        if found != signature:  # edited in develop mode
            raise RuntimeError(
                f"{self.label}: the arguments of {export} have changed since load_jit made it\n"
                f"  expected  {variant.cpp_declaration(signature, export)}\n"
                f"  got       {variant.cpp_declaration(found, export)}\n"
                "  remedy: start the program again"
            )
        loaded.load_kernels(key[0])
        entry = loaded.entry(export)
        return dispatcher.Once(entry) if develop.is_on(NAMESPACE) else entry


def _signature(label: str, export: str, text: str, written: Sequence[int] | None) -> Signature:
    """The schema from the text that export.h writes: letters, ``?`` behind an optional one, ``>`` and the number of results."""
    letters = variant.letters_of(text)
    kinds = [(kind, optional) for kind, optional in letters if kind not in "OP"]
    outputs = ["T" if kind == "O" else "L" for kind, _ in letters if kind in "OP"]
    returned = ["T"] * int(text.partition(">")[2])
    if letters[: len(kinds)] != kinds:
        raise ValueError(f"{label}: {export} has arguments behind its Output& parameters, which come last")
    made = [Result(f"out{i}" if len(outputs) > 1 else "out", kind) for i, kind in enumerate(outputs or returned)]
    tensors = [index for index, (kind, _) in enumerate(kinds) if kind == "T"]
    said = written is not None  # else a caller may know that two of them are only read
    if written is None:
        written = [] if made else tensors
    for index in written:
        if index not in tensors:
            raise ValueError(f"{label}: mutates says that {export} writes argument {index}; its tensors are {tensors}")
    arguments = []
    for i, (kind, optional) in enumerate(kinds):
        is_written = i in written
        # What may be read only, or is read and then written by the kernel as its author says, may be given twice.
        arguments.append(
            Argument(f"arg{i}", kind, optional=optional, written=is_written, reusable=kind == "T" and not (said and is_written))
        )
    return Signature(tuple(arguments), tuple(made), as_outputs=bool(outputs))


def _nothing(*args: Any) -> None:
    return None
