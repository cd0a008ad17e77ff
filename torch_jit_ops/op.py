"""Declares ops: one decorated PyTorch function is the op, and names the kernel that does it faster.

    library = OpLibrary("mylib", csrc=Path(__file__).parent / "csrc")

    @library.op(cuda="scale.cu", cpu="scale.cpp", variant="mylib::scale<{input.dtype}>")
    def scale(input: Tensor, factor: float) -> Tensor:
        return input * factor

    torch.ops.mylib.scale(x, 2.0)            the kernel, compiled on its first call
    torch.ops.mylib.scale.out(x, 2.0, out=y)

The function gives the op its schema, its fake, the fallback for devices without a kernel and machines without a compiler, its
derivative, and the truth that tests compare with. Defining ops compiles and loads nothing.
"""

from __future__ import annotations

import functools
import inspect
import keyword
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_jit_ops import dispatcher, environment, fallback, forks, variant
from torch_jit_ops import dtypes as dtypes_of_arguments
from torch_jit_ops.backends import toolchain
from torch_jit_ops.builder import loader
from torch_jit_ops.checks import matcher, overlap
from torch_jit_ops.features import autograd, build_while_tracing, dtensor, planned_out, vmap
from torch_jit_ops.samples import Sample, SampleMaker
from torch_jit_ops.signature import Signature, signature_of

FLOATS = (torch.float16, torch.bfloat16, torch.float32)

Samples = Callable[[SampleMaker], Iterable[Sample]]
_SUFFIXES = {"cuda": (".cu",), "cpu": (".cpp", ".cc", ".cxx")}
# Namespaces of PyTorch's own ops, and those that other packages' extensions take by custom.
_RESERVED = ("aten", "prim", "prims", "quantized", "higher_order", "inductor", "c10d", "torch", "_C")
_DISPATCH_KEYS = {"cuda": "CUDA", "cpu": "CPU"}


@dataclass(frozen=True)
class Kernel:
    """Where the kernel of a backend is."""

    source: str
    pattern: variant.VariantPattern


class OpLibrary:
    """The ops of one namespace, and where their kernels' sources are.

    Args:
        namespace: of ``torch.ops``; an identifier.
        csrc: the folder of the ``.cu`` and ``.cpp`` files that ops name.
        include: further folders for ``#include``. The headers of this package, ``<jitk/...>``, are always found.

    Raises:
        ValueError: the namespace is no identifier, or a folder does not exist.
    """

    def __init__(self, namespace: str, *, csrc: str | os.PathLike[str], include: Sequence[str | os.PathLike[str]] = ()) -> None:
        if not namespace.isidentifier() or keyword.iskeyword(namespace):
            raise ValueError(f"the namespace {namespace!r} must be an identifier")
        taken = any(library.namespace == namespace == "jitk" for library in _libraries)
        if taken or namespace in _RESERVED or hasattr(type(torch.ops), namespace):
            raise ValueError(f"the namespace {namespace!r} is taken: choose one of your own, such as your package's name")
        if isinstance(include, (str, os.PathLike)):
            raise TypeError(f"OpLibrary({namespace!r}): include must be a list of folders, got {include!r}")
        self.namespace = namespace
        self.csrc = Path(csrc).resolve()
        self.include = tuple(Path(folder).resolve() for folder in include)
        for folder in (self.csrc, *self.include):
            if not folder.is_dir():
                raise ValueError(f"OpLibrary({namespace!r}): the folder {folder} does not exist")
        self.ops: dict[str, Op] = {}
        self._definitions = torch.library.Library(namespace, "FRAGMENT")
        _libraries.append(self)

    def __repr__(self) -> str:
        return f"OpLibrary({self.namespace!r}, csrc={str(self.csrc)!r}, {len(self.ops)} ops)"

    def op(
        self,
        *,
        variant: str | Mapping[str, str] | None = None,
        cuda: str | None = None,
        cpu: str | None = None,
        dtypes: Sequence[torch.dtype] | Mapping[str, Sequence[torch.dtype]] = FLOATS,
        mutates: Sequence[str] = (),
        outputs: Sequence[str] | None = None,
        tensors: Mapping[str, str] | None = None,
        rows: Sequence[str] = (),
        sums: Sequence[str] = (),
        elementwise: bool = False,
        reusable: Sequence[str] | None = None,
        samples: Samples | None = None,
        fake: Callable[..., Any] | None = None,
        backward: Callable[..., Any] | None = None,
        flags: Mapping[str, Sequence[str]] | None = None,
        patterns: Sequence[Callable[..., Any]] | None = None,
    ) -> Callable[[Callable[..., Any]], Op]:
        """Make the decorated function an op.

        Args:
            variant: the C++ instantiation to compile; ``variant.py`` lists its placeholders. A mapping from backend where they
                differ; None for an op without kernels. The out form is the function of the same name with ``_out`` behind it;
                both come from one compilation.
            cuda, cpu: the file with the backend's kernel, in the library's ``csrc``. A backend without one runs the function
                itself.
            dtypes: those for which the kernel is compiled, of every tensor whose dtype ``variant`` uses. Others run the
                function itself. A mapping says it argument by argument, ``{"q": HALVES, "positions": (torch.int32,
                torch.int64)}``, and then samples come in every combination; it names all whose dtype ``variant`` uses, and
                may name others for the samples' sake.
            mutates: tensor arguments that are written. Such an op returns what it returns, and has no out form.
            outputs: names of the out form's arguments: by default ``("out",)`` for one result; needed for several.
            tensors: what arguments and outputs must be, as the kernel's matcher says it: ``{"input": "[tokens..., hidden]
                rows", "weight": "[hidden]", "bias": "[hidden] weight.dtype"}``. Where the function or the fake runs, other
                calls are refused as the kernel refuses them. The dtype may also be a choice, ``float16|bfloat16``; the layout
                is ``rows``, ``strides [*, 1]``, or contiguous. All that are named are on one device.
            rows: tensor arguments with any number of leading dimensions, the same for all of them and for all results; what
                the op makes of a row depends on no other row. ``torch.func.vmap`` over them is one call with one more
                dimension; over others it is a call for each element. DTensors may be sharded over any leading dimension.
                An op that writes arguments names those, too; its number of dimensions may be fixed.
            sums: results, by their names in ``outputs``, that have no rows: they are sums over all rows, such as the gradient
                of a weight.
            elementwise: an element of a result depends on the elements in its place of the ``rows`` arguments alone, and
                these may be sharded over the last dimension, too.
            reusable: tensor arguments that the kernel reads, row by row or element by element, before it writes in their
                place: an output may be such an argument, or one of equal parts of its rows. By default ``rows`` of an
                elementwise op, else none; all other arguments that share memory with one that is written are refused.
            samples: makes the arguments that tests and benchmarks call the op with.
            fake: what tracing calls instead of the function.
            backward: called with the gradients of the results and then all arguments; returns the gradient, or None, of each
                tensor. Without it the function is computed again and differentiated.
            flags: further compiler flags for a backend, such as ``{"cuda": ["--use_fast_math"]}``.
            patterns: further functions of the op's arguments that compute the same, to be found in a model beside the op's own
                by ``inductor.fuse``. An op with patterns, if only ``()``, is looked for without being named.

        Raises:
            TypeError: the signature cannot be a schema, or an option is of another type.
            ValueError: the name is taken, a source is missing or of another backend, ``variant`` has an unknown placeholder, or
                an option names what there is not.
        """

        def declare(function: Callable[..., Any]) -> Op:
            name = function.__name__
            who = f"{self.namespace}::{name}"
            for library in _libraries:
                if library.namespace == self.namespace and name in library.ops:
                    raise ValueError(f"{who} is declared twice; the first is in {inspect.getfile(library.ops[name].reference)}")
            names_of = {"mutates": mutates, "reusable": reusable, "outputs": outputs, "rows": rows, "sums": sums}
            _check_lists(who, patterns=patterns, **names_of)
            _check_backends(who, {"cuda": cuda, "cpu": cpu}, variant, flags or {})
            signature = signature_of(function, mutates, (rows if elementwise else ()) if reusable is None else reusable)
            kernels = {}
            for backend, source in (("cuda", cuda), ("cpu", cpu)):
                if source is None:
                    continue
                if not (self.csrc / source).is_file():
                    raise ValueError(f"{who}: its {backend} source {source!r} is not in {self.csrc}")
                text = variant if isinstance(variant, str) else (variant or {}).get(backend)
                if text is None:
                    raise ValueError(f"{who} has a {backend} source, but variant names only {', '.join(variant or {})}")
                kernels[backend] = Kernel(source, _variant.parse_variant(who, text, signature))
            picking = dict.fromkeys(name for kernel in kernels.values() for name in kernel.pattern.arguments_of("dtype"))
            tensor_names = [argument.name for argument in signature.arguments if argument.kind == "T"]
            served = dtypes_of_arguments.parse(who, dtypes, tensor_names, tuple(picking))
            names = _output_names(who, signature, outputs)
            _check_rows(who, signature, rows, names, sums, elementwise)
            op = Op(
                self,
                function,
                signature,
                kernels,
                served,
                names,
                matcher.parse(who, tensors or {}, signature, names),
                dtensor.Rows(tuple(rows), tuple(sums), elementwise),
                samples,
                fake,
                backward,
                dict(flags or {}),
                None if patterns is None else tuple(patterns),
            )
            op._define(self._definitions)
            self.ops[name] = op
            return op

        return declare


_calling_again = threading.local()  # the ops whose first call is under way in this thread
_variant = variant  # ``op`` has an argument of that name
_libraries: list[OpLibrary] = []


def libraries() -> tuple[OpLibrary, ...]:
    """Every OpLibrary of this process."""
    return tuple(_libraries)


def _declared(namespace: str, name: str, module: str) -> Op:
    """The op of that name, for ``pickle`` and ``copy``.

    Raises:
        RuntimeError: it is not declared in this process.
    """
    for library in _libraries:
        if library.namespace == namespace and name in library.ops:
            return library.ops[name]
    raise RuntimeError(
        f"{namespace}::{name} is not declared in this process\n  remedy: import {module}, which declared it, before unpickling"
    )


def _check_lists(who: str, **options: Any) -> None:
    for option, value in options.items():
        if isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, type(None))):
            raise TypeError(f"{who}: {option} must be a list, got {value!r}")
        for item in value or ():
            if option != "patterns" and not isinstance(item, str):
                raise TypeError(f"{who}: {option} must hold names, got {item!r}")


def _check_backends(
    who: str, sources: Mapping[str, str | None], variants: str | Mapping[str, str] | None, flags: Mapping[str, Sequence[str]]
) -> None:
    """Raise where an option names what there is not, or what cannot work."""
    named = {"flags": flags, **({} if variants is None or isinstance(variants, str) else {"variant": variants})}
    for option, mapping in named.items():
        if not isinstance(mapping, Mapping):
            raise TypeError(f"{who}: {option} must be a mapping from backends, such as {{'cuda': ...}}, got {mapping!r}")
        for backend in mapping:
            if backend not in sources:
                raise ValueError(f"{who}: {option} names the backend {backend!r}; there are {', '.join(sources)}")
    if variants is not None and not any(sources.values()):
        raise ValueError(
            f"{who} has a variant, but no kernel: name its source with cuda= or cpu=, or no variant, and the op is its function"
        )
    if variants is None and any(sources.values()):
        raise ValueError(
            f"{who} has a source, but no variant: name its C++ function, such as '{who.split('::')[-1]}<{{x.dtype}}>'"
        )
    for backend, source in sources.items():
        if source is not None and not str(source).endswith(_SUFFIXES[backend]):
            expected = " or ".join(_SUFFIXES[backend])
            raise ValueError(f"{who}: its {backend} source {str(source)!r} must be a {expected} file")
        given = flags.get(backend, ())
        if isinstance(given, (str, bytes)) or not all(isinstance(flag, str) for flag in given):
            raise TypeError(f"{who}: flags of {backend} must be a list of str, got {given!r}")
        if given and source is None:
            raise ValueError(f"{who}: flags are for {backend}, but it has no {backend} source")
        for flag in given:
            if re.match(r"-l(?!ineinfo$)|-L|-Wl,|-Xlinker", flag):
                raise ValueError(
                    f"{who}: the flag {flag!r} is for linking; flags are for compiling alone, and kernels link nothing"
                )


def _output_names(who: str, signature: Signature, names: Sequence[str] | None) -> tuple[str, ...]:
    if any(argument.written for argument in signature.arguments) or signature.results == 0:
        return ()
    if names is None:
        if signature.results > 1:
            raise ValueError(
                f"{who} returns {signature.results} tensors: name the out form's arguments, outputs=('out', 'scale')"
            )
        names = ("out",)
    if len(names) != signature.results:
        raise ValueError(f"{who} returns {signature.results} tensors, but outputs names {len(names)}: {', '.join(names)}")
    taken = [argument.name for argument in signature.arguments]
    for index, name in enumerate(names):
        if name in taken or name in names[:index]:
            raise ValueError(f"{who}: its out form would have two arguments called {name!r}; name others with outputs")
    return tuple(names)


def _check_rows(
    who: str, signature: Signature, rows: Sequence[str], outputs: Sequence[str], sums: Sequence[str], elementwise: bool
) -> None:
    tensors = [argument.name for argument in signature.arguments if argument.kind == "T"]
    for name in rows:
        if name not in tensors:
            raise ValueError(f"{who}: rows names {name!r}; its tensor arguments are {', '.join(tensors) or 'none'}")
    for argument in signature.arguments:
        if rows and argument.written and argument.name not in rows:
            raise ValueError(f"{who}: rows must name {argument.name!r}, too: the op writes it")
    for name in sums:
        if name not in outputs:
            raise ValueError(f"{who}: sums names {name!r}; the out form's arguments are {', '.join(outputs) or 'none'}")
    if not rows and (sums or elementwise):
        raise ValueError(f"{who}: {'sums' if sums else 'elementwise'} is about rows, but rows names none")


class Op:
    """A declared op. Calling it calls ``torch.ops.<namespace>.<name>``; ``out`` is its out form.

    Attributes:
        reference: the decorated function.
        signature: of the functional or in-place form.
        kernels: by backend, ``"cuda"`` and ``"cpu"``.
        dtypes: those that the kernels are compiled for, by argument.
        outputs: names of the out form's arguments; empty if there is no out form.
        tensors: what tensor arguments and outputs must be.
        rows: tensor arguments with rows, results that are sums over them, and whether all is elementwise.
        samples: makes arguments for tests, or None.
        patterns: other spellings of the reference that ``inductor.fuse`` looks for, or None.
    """

    def __init__(
        self,
        library: OpLibrary,
        reference: Callable[..., Any],
        signature: Signature,
        kernels: Mapping[str, Kernel],
        dtypes: dtypes_of_arguments.DTypes,
        outputs: tuple[str, ...],
        tensors: tuple[matcher.TensorPattern, ...],
        rows: dtensor.Rows,
        samples: Samples | None,
        fake: Callable[..., Any] | None,
        backward: Callable[..., Any] | None,
        flags: Mapping[str, Sequence[str]],
        patterns: tuple[Callable[..., Any], ...] | None,
    ) -> None:
        self.library = library
        self.reference = reference
        self.signature = signature
        self.kernels = kernels
        self.dtypes = dtypes
        self.outputs = outputs
        self.tensors = tensors
        self.rows = rows
        self.samples = samples
        self.patterns = patterns
        self._fake = fake
        self._backward = backward
        self._flags = flags
        self._taken_over = False
        self._boot_lock = forks.Lock()
        self._reference_library: torch.library.Library | None = None
        dotted = [f"{library.namespace}::{reference.__name__}{form and '.'}{form}" for form in self.overloads()]
        self._gate = autograd.Gate(dotted, lambda: self._taken_over)
        self.name = reference.__name__
        self.qualified_name = f"{library.namespace}::{self.name}"
        functools.update_wrapper(self, reference)

    def __repr__(self) -> str:
        return f"<op {self.qualified_name}, kernels for {', '.join(self.kernels) or 'no backend'}>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.packet(*args, **kwargs)

    def __reduce__(self) -> Any:
        """By name: a copy is the op itself, and what is pickled is found again where its library has been imported."""
        return _declared, (self.library.namespace, self.name, self.reference.__module__)

    @property
    def packet(self) -> Any:
        """``torch.ops.<namespace>.<name>``."""
        return getattr(getattr(torch.ops, self.library.namespace), self.name)

    @property
    def default(self) -> Any:
        """The functional or in-place overload."""
        return self.packet.default

    @property
    def out(self) -> Any:
        """The out overload.

        Raises:
            AttributeError: the op has none.
        """
        return self.packet.out

    def arguments(self, *args: Any, **kwargs: Any) -> list[Any]:
        """All arguments of a call in the order of the schema, defaults included."""
        bound = inspect.signature(self.reference).bind(*args, **kwargs)
        bound.apply_defaults()
        return list(bound.arguments.values())

    def by_name(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments that a call gives, without defaults."""
        return {**dict(zip((argument.name for argument in self.signature.arguments), args, strict=False)), **kwargs}

    def overloads(self) -> dict[str, Signature]:
        """The signature of each overload, ``""`` and ``"out"``."""
        forms = {"": self.signature}
        if self.outputs:
            forms["out"] = self.signature.with_outputs(self.outputs, returned=planned_out.PLANNED)
        return forms

    def unit(self, backend: str, values: Sequence[variant.Value], arch: str) -> loader.Unit:
        """The translation unit for the placeholders' values: every overload in one library."""
        kernel = self.kernels[backend]
        lines = [
            f"// {self.qualified_name}",
            "#include <jitk/export.h>",
            f'#include "{kernel.source}"',
            "using namespace jitk;",
        ]
        for overload in self.overloads():
            lines.append(
                f"JITK_EXPORT({self._export(kernel, overload)}, {kernel.pattern.instantiate(values, overload and '_out')})"
            )
        return loader.Unit(
            name=f"{self.library.namespace}.{self.name}",
            label=f"{self.library.namespace}::{kernel.pattern.instantiate(values).removeprefix(self.library.namespace + '::')}",
            backend=backend,
            arch=arch,
            text="\n".join(lines) + "\n",
            include=(self.library.csrc, *self.library.include),
            flags=tuple(self._flags.get(backend, ())),
        )

    @staticmethod
    def _export(kernel: Kernel, overload: str) -> str:
        return kernel.pattern.export_name() + (overload and "_out")

    # --- definition -------------------------------------------------------------------------------

    def _define(self, definitions: torch.library.Library) -> None:
        tags = (torch.Tag.pt2_compliant_tag,)
        definitions.define(self.signature.schema(self.name), tags=tags)
        torch.library.register_fake(self.qualified_name, self._run_fake, lib=definitions)
        implementations = {"": self._run_reference}
        if self.outputs:
            # The functional form is defined first: a packet tries its overloads in this order, and a miss costs 4 us.
            definitions.define(self.overloads()["out"].schema(f"{self.name}.out"), tags=(*tags, *planned_out.TAGS))
            torch.library.register_fake(f"{self.qualified_name}.out", self._run_out_fake, lib=definitions)
            implementations["out"] = self._run_out_reference
        dispatcher.reserve(self.qualified_name, len(implementations) * len(self.kernels))
        for overload, implementation in implementations.items():
            call = functools.partial(self._boot_call, overload, implementation)
            # On the key of all devices, so that the dispatcher's kernels come beside it and it can stay: to take a Python
            # kernel away frees it under another thread that has found it and waits for the GIL.
            definitions.impl(self._dotted(overload), call, "CompositeExplicitAutograd")
        for overload, signature in self.overloads().items():
            definitions.impl(self._dotted(overload), self._autograd_kernel(overload), "Autograd", with_keyset=True)
            if any(argument.written for argument in signature.arguments):
                # PyTorch's own kernels for these keys want an op that returns what it writes, and writes one tensor.
                for key in ("Conjugate", "Negative"):
                    definitions.impl(self._dotted(overload), functools.partial(self._write_lazy_views, overload), key)
        if self._is_functional() and not any(part.kind == "T" and part.keyword_only for part in self.signature.arguments):
            rows = () if self.rows.sums else self.rows.arguments
            rule = vmap.rule(self.default, self.signature, rows)
            torch.library.register_vmap(self.qualified_name, rule, lib=definitions)

    def _is_functional(self) -> bool:
        return self.signature.results > 0 and not any(argument.written for argument in self.signature.arguments)

    def _autograd_kernel(self, overload: str) -> Callable[..., Any]:
        signature = self.overloads()[overload]
        function = getattr(self.packet, overload or "default")
        who = f"{self.library.namespace}::{self._dotted(overload)}"
        if overload == "out":
            return autograd.writing_kernel(
                function,
                signature,
                f"{who}: functions with out=... arguments don't support automatic differentiation",
                {
                    "requires grad": "call the functional form, or this one under torch.no_grad()",
                    "has a tangent": "call the functional form",
                },
                self._gate,
            )
        if self._is_functional():
            return autograd.functional_kernel(function, signature, self._checked_reference, self._backward, self._gate)
        return autograd.writing_kernel(
            function,
            signature,
            f"{who}: an op that writes its arguments has no derivative",
            {
                "requires grad": "call it under torch.no_grad(), or write the same with operations that return new tensors",
                "has a tangent": "write the same with operations that return new tensors",
            },
            self._gate,
        )

    def _dotted(self, overload: str) -> str:
        return f"{self.name}.{overload}" if overload else self.name

    # --- what the function gives ------------------------------------------------------------------

    def _verify(self, overload: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Refuse tensors that are not what the declaration says, as the kernel would.

        Raises:
            RuntimeError: one is not.
        """
        if self.tensors:
            who = f"{self.library.namespace}::{self._dotted(overload)}"
            matcher.verify(who, self.tensors, self.by_name(args, kwargs), self.dtypes.of)

    def _verify_fakes(self, overload: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """The same, and what the dispatcher refuses besides and strides tell: written elements that overlap."""
        self._verify(overload, args, kwargs)
        values = self.by_name(args, kwargs)
        for argument in self.overloads()[overload].arguments:
            if argument.written and isinstance(values.get(argument.name), Tensor):
                overlap.refuse_itself(
                    f"{self.library.namespace}::{self._dotted(overload)}", argument.name, values[argument.name]
                )

    def _verify_outputs(self, outs: Sequence[Tensor], results: Any) -> None:
        for name, out, result in zip(self.outputs, outs, _as_tuple(results), strict=True):
            matcher.verify_output(f"{self.qualified_name}.out", name, out, result)

    def _checked_reference(self, *args: Any, **kwargs: Any) -> Any:
        self._verify("", args, kwargs)
        return self.reference(*args, **kwargs)

    def _run_reference(self, *args: Any, **kwargs: Any) -> Any:
        """The reference with results as a kernel returns them: contiguous, and no views of the arguments."""
        results = self._checked_reference(*args, **kwargs)
        if self.signature.results == 0:
            return None
        storages = {_storage(arg) for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)}
        fresh = tuple(
            result.clone(memory_format=torch.contiguous_format) if _storage(result) in storages else result.contiguous()
            for result in _as_tuple(results)
        )
        return fresh if isinstance(results, tuple) else fresh[0]

    def _run_out_reference(self, *args: Any, **kwargs: Any) -> Any:
        returned = self._returned(kwargs)
        self._verify("out", args, kwargs)
        outs = [kwargs.pop(name) for name in self.outputs]
        results = self.reference(*args, **kwargs)
        self._verify_outputs(outs, results)
        for out, result in zip(outs, _as_tuple(results), strict=True):
            out.copy_(result)
        return returned

    def _returned(self, kwargs: Mapping[str, Any]) -> Any:
        """The outputs if the out form's schema returns them."""
        outs = tuple(kwargs[name] for name in self.overloads()["out"].returned)
        return outs if len(outs) > 1 else outs[0] if outs else None

    def _run_out_fake(self, *args: Any, **kwargs: Any) -> Any:
        given = {name: value for name, value in kwargs.items() if name not in self.outputs}
        self._verify_fakes("out", args, kwargs)
        self._verify_outputs([kwargs[name] for name in self.outputs], self._fake_results(args, given))
        self._build_ahead(args, given)
        if planned_out.PLANNED:  # before, DTensor fails on an out form that returns nothing
            dtensor.register(self.out, self.overloads()["out"], self.outputs, self.rows)
        return self._returned(kwargs)

    def _run_fake(self, *args: Any, **kwargs: Any) -> Any:
        self._verify_fakes("", args, kwargs)
        self._build_ahead(args, kwargs)
        if self.outputs:
            planned_out.lower(self.default, self.out, self.outputs)
        names = self.outputs or tuple(f"result {i}" for i in range(self.signature.results))
        dtensor.register(self.default, self.signature, names, self.rows)
        return self._fake_results(args, kwargs)

    def _build_ahead(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        patterns = {backend: kernel.pattern for backend, kernel in self.kernels.items()}
        build_while_tracing.start(self.qualified_name, patterns, self._load, functools.partial(self.arguments, *args, **kwargs))

    def _fake_results(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if self._fake is not None:
            return self._fake(*args, **kwargs)
        if self.signature.results == 0:
            return None
        results = self.reference(*args, **kwargs)
        fresh = tuple(result.new_empty(result.shape) for result in _as_tuple(results))
        return fresh if isinstance(results, tuple) else fresh[0]

    # --- the way to the kernel --------------------------------------------------------------------

    def _boot_call(self, overload: str, reference: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """On a device with a kernel, the first call: hand the op over to the C++ dispatcher, then call it again.

        On other devices every call: the reference. So are tensors that have the device alone, sparse ones, when they come back.
        """
        devices = {value.device.type for value in (*args, *kwargs.values()) if isinstance(value, Tensor)}
        calling = _calling_again.__dict__.setdefault("ops", [])
        if not devices or not devices <= self.kernels.keys() or self in calling:
            return self._call_reference(overload, reference, args, kwargs)
        try:
            self.take_over(args, kwargs)
        except toolchain.MissingCompiler as missing:
            dispatcher.fall_back(self.qualified_name, missing)
            return self._call_reference(overload, reference, args, kwargs)
        except forks.Reentered:
            return self._call_reference(overload, reference, args, kwargs)
        calling.append(self)
        try:
            with dispatcher.raising_what_is_kept():
                return getattr(self.packet, overload or "default")(*args, **kwargs)
        finally:
            calling.pop()

    def _write_lazy_views(self, overload: str, *args: Any, **kwargs: Any) -> Any:
        """The call where tensors have the negative or the conjugate bit: by copies that have none, written back."""
        signature = self.overloads()[overload]
        values = {**dict(zip((argument.name for argument in signature.arguments), args, strict=False)), **kwargs}
        overlap.refuse(f"{self.library.namespace}::{self._dotted(overload)}", signature, values)
        plain = {
            name: value.resolve_conj().resolve_neg() if isinstance(value, Tensor) else value for name, value in values.items()
        }
        with torch._C._AutoDispatchBelowAutograd():
            getattr(self.packet, overload or "default")(**plain)
            for argument in signature.arguments:
                if argument.written and plain.get(argument.name) is not values.get(argument.name):
                    values[argument.name].copy_(plain[argument.name])
        returned = tuple(values[name] for name in signature.returned)
        return returned if len(returned) > 1 else returned[0] if returned else None

    def _call_reference(
        self, overload: str, reference: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """The reference where the dispatcher, which looks at arguments first, is not on the way."""
        signature = self.overloads()[overload]
        if any(argument.written for argument in signature.arguments):
            names = [argument.name for argument in signature.arguments]
            values = {**dict(zip(names, args, strict=False)), **kwargs}
            overlap.refuse(f"{self.library.namespace}::{self._dotted(overload)}", signature, values)
        return reference(*args, **kwargs)

    def take_over(self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> None:
        """Have the C++ dispatcher serve the op. If that must be compiled, the variant for ``args`` is so at the same time."""
        with self._boot_lock as again:
            if self._taken_over:
                return
            if again:
                raise forks.Reentered(
                    f"{self.qualified_name} is being called for the first time further down this thread's stack"
                )
            dispatcher.library(meanwhile=functools.partial(self._prefetch, args, kwargs or {}))
            with forks.held_off():  # all of it or nothing, as a second time would be another registration
                self._register()
                self._taken_over = True

    def _register(self) -> None:
        for backend, kernel in self.kernels.items():
            for overload, signature in self.overloads().items():
                dispatcher.register(
                    f"{self.library.namespace}::{self._dotted(overload)}",
                    self.library.namespace,
                    self._dotted(overload),
                    _DISPATCH_KEYS[backend],
                    f"{self.library.namespace}::{self._reference_name(overload)}",
                    kernel.pattern.plan(signature),
                    functools.partial(self._answer, backend, overload),
                )

    def _prefetch(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        try:
            values = self.arguments(*args, **{name: value for name, value in kwargs.items() if name not in self.outputs})
            device = next(value.device for value in values if isinstance(value, Tensor))
            kernel = self.kernels[device.type]
            key = [device.index if device.type == "cuda" else -1, *kernel.pattern.words_of(values)]
            self._load(device.type, key)
        except Exception:  # the dispatcher will ask for the same and report it where the caller sees it
            return

    def _load(self, backend: str, key: Sequence[int]) -> loader.Loaded | None:
        """The library for a key of the dispatcher; None where the kernel does not serve these dtypes."""
        kernel = self.kernels[backend]
        if self.unserved(kernel.pattern.dtypes_of_key(key[1:])) is not None:
            return None
        values = kernel.pattern.values(key[1:])
        arch = toolchain.device_arch(key[0]) if backend == "cuda" else toolchain.host_isa()
        unit = self.unit(backend, values, arch)
        try:
            loaded = loader.load(unit)
        except loader.BuildError as error:
            # Errors there are about the function that is exported: of another name, place or type than the variant says.
            if re.search(rf"\bjitk/export\.h:|\b{re.escape(unit.name.replace('.', '_'))}\.(cu|cpp):", str(error)):
                raise loader.BuildError(f"{error}\n{self._wanted(kernel, values)}") from error
            raise
        if backend == "cuda":
            loaded.load_kernels(key[0])
        if environment.record_file() is not None:
            from torch_jit_ops import manifest

            manifest.record(manifest.entry_of(self.qualified_name, backend, kernel.pattern, values, arch))
        return loaded

    def _wanted(self, kernel: Kernel, values: Sequence[variant.Value]) -> str:
        """The C++ functions that must be there, as declarations."""
        lines = [
            kernel.pattern.cpp_declaration(signature, kernel.pattern.instantiate(values, overload and "_out"))
            for overload, signature in self.overloads().items()
        ]
        return "\n    ".join([f"  the op needs in {kernel.source}, as templates where a name has <...>:", *lines])

    def unserved(self, dtypes: Mapping[str, torch.dtype | None]) -> fallback.Unserved | None:
        """The first of these dtypes, of the arguments whose dtype picks the kernel, that no kernel is compiled for."""
        for argument, dtype in dtypes.items():
            kernels = self.dtypes.of(argument)
            if dtype not in kernels:
                return fallback.Unserved(self.qualified_name, argument, dtype, kernels)
        return None

    def _answer(self, backend: str, overload: str, key: Sequence[int]) -> int:
        unserved = self.unserved(self.kernels[backend].pattern.dtypes_of_key(key[1:]))
        if unserved is not None and unserved.kernels and not matcher.refuses(self.tensors, unserved.argument, unserved.dtype):
            fallback.note(unserved)
        try:
            loaded = self._load(backend, key)
        except toolchain.MissingCompiler as missing:
            dispatcher.fall_back(self.qualified_name, missing)
            loaded = None
        except forks.Reentered:
            self._define_references()
            raise
        if loaded is None:
            self._define_references()
            return dispatcher.REFERENCE
        return loaded.entry(self.export(backend, overload, loaded))

    def export(self, backend: str, overload: str, loaded: loader.Loaded) -> str:
        """The name by which a variant's library exports the function of an overload.

        Raises:
            RuntimeError: the function does not fit the schema.
        """
        kernel = self.kernels[backend]
        signature = self.overloads()[overload]
        export = self._export(kernel, overload)
        found = loaded.signature(export)
        if found != kernel.pattern.cpp_signature(signature):
            raise RuntimeError(
                f"{self.qualified_name}: the C++ function {export} does not fit the schema\n"
                f"  expected  {kernel.pattern.cpp_declaration(signature, export)}\n"
                f"  got       {variant.cpp_declaration(found, export)}\n"
                f"  in {kernel.source}"
            )
        return export

    def _reference_name(self, overload: str) -> str:
        return f"_reference_{self.name}{overload and '_'}{overload}"

    def _define_references(self) -> None:
        """The reference as ops that the dispatcher can call."""
        with self._boot_lock, forks.held_off():
            if self._reference_library is not None:
                return
            library = torch.library.Library(self.library.namespace, "FRAGMENT")
            implementations = {"": self._run_reference, "out": self._run_out_reference}
            for overload, signature in self.overloads().items():
                name = self._reference_name(overload)
                arguments = signature.schema(name).rpartition(" -> ")[0]
                library.define(f"{arguments} -> ({', '.join(['Tensor?'] * signature.results)})")
                call = functools.partial(self._reference_with_error, implementations[overload], signature.results)
                library.impl(name, call, "CompositeExplicitAutograd")
            self._reference_library = library

    def _reference_with_error(self, implementation: Callable[..., Any], made: int, *args: Any, **kwargs: Any) -> Any:
        dispatcher.keep_error(None)
        try:
            results = implementation(*args, **kwargs)
        except Exception as error:  # an exception would be lost on the way through C
            dispatcher.keep_error(self._named(error, self.by_name(args, kwargs)))
            results = (None,) * made if made > 1 else None
        return results if made else None

    def _named(self, error: Exception, given: Mapping[str, Any]) -> Exception:
        """A RuntimeError that names the op, and the dtype where a kernel for it was missing. Kinds of RuntimeError, such as
        OutOfMemoryError, are what callers look for, and stay what they are."""
        text = self._explained(error, given)
        if isinstance(error, RuntimeError):
            error.args = (text,)
            return error
        named = RuntimeError(text)
        named.__cause__ = error
        return named

    def _explained(self, error: Exception, given: Mapping[str, Any]) -> str:
        text = str(error)
        if text.startswith(self.qualified_name):
            return text
        dtypes = {name: dtype for kernel in self.kernels.values() for name, dtype in kernel.pattern.dtypes_of(given).items()}
        unserved = self.unserved(dtypes)
        return f"{self.qualified_name}: {text}" + (
            f"\n  {unserved}, so the PyTorch function ran" if unserved and unserved.kernels else ""
        )


def _as_tuple(results: Any) -> tuple[Any, ...]:
    return results if isinstance(results, tuple) else (results,)


def _storage(tensor: Tensor) -> int:
    """What tells storages apart; 0 for a tensor without one, such as a sparse one."""
    return tensor.untyped_storage()._cdata if torch._C._has_storage(tensor) else 0
