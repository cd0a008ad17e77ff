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

import inspect
import keyword
import os
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from torch_jit_ops import registry
from torch_jit_ops.backends.wheels import WheelLibrary
from torch_jit_ops.calling import develop
from torch_jit_ops.declaring import matcher, options, per_target, sources
from torch_jit_ops.declaring.declaration import Declaration, Samples
from torch_jit_ops.declaring.dtypes import Given
from torch_jit_ops.declaring.rows import Rows
from torch_jit_ops.declaring.signature import signature_of
from torch_jit_ops.declaring.sources import of_module
from torch_jit_ops.op import Op, Parameters, Results
from torch_jit_ops.python_module import LazyModule, ModuleDeclaration

FLOATS = (torch.float16, torch.bfloat16, torch.float32)

# Namespaces of PyTorch's own ops, and those that other packages' extensions take by custom.
_RESERVED = ("aten", "prim", "prims", "quantized", "higher_order", "inductor", "c10d", "torch", "_C")


class OpLibrary:
    """The ops of one namespace, and where their kernels' sources are.

    Args:
        namespace: of ``torch.ops``; an identifier.
        csrc: the folder of the ``.cu`` and ``.cpp`` files that ops name; None if all their sources are texts.
        include: further folders for ``#include``, also of wheels (``include_of``). The headers of this package,
            ``<jitk/...>``, are always found.

    Raises:
        ValueError: the namespace is no identifier, or a folder does not exist.
    """

    def __init__(
        self,
        namespace: str,
        *,
        csrc: str | os.PathLike[str] | None = None,
        include: Sequence[str | os.PathLike[str]] = (),
    ) -> None:
        if not namespace.isidentifier() or keyword.iskeyword(namespace):
            raise ValueError(f"the namespace {namespace!r} must be an identifier")
        taken = any(library.namespace == namespace == "jitk" for library in registry.libraries())
        if taken or namespace in _RESERVED or hasattr(type(torch.ops), namespace):
            raise ValueError(f"the namespace {namespace!r} is taken: choose one of your own, such as your package's name")
        if isinstance(include, (str, os.PathLike)):
            raise TypeError(f"OpLibrary({namespace!r}): include must be a list of folders, got {include!r}")
        self.namespace: str = namespace
        self.csrc = None if csrc is None else Path(csrc).resolve()
        of_files = () if self.csrc is None else (self.csrc,)
        self._folders = per_target.folders(f"OpLibrary({namespace!r})", (*of_files, *include))
        self.include = self._folders[len(of_files) :]
        self.ops: dict[str, Op] = {}
        self.modules: dict[str, ModuleDeclaration] = {}
        registry.add(self)

    def __repr__(self) -> str:
        csrc = None if self.csrc is None else str(self.csrc)
        modules = f", {len(self.modules)} modules" if self.modules else ""
        return f"OpLibrary({self.namespace!r}, csrc={csrc!r}, {len(self.ops)} ops{modules})"

    def op(
        self,
        *,
        variant: str | Mapping[str, str] | None = None,
        cuda: str | Sequence[str] | None = None,
        cpu: str | Sequence[str] | None = None,
        cuda_source: str | None = None,
        cpu_source: str | None = None,
        dtypes: Given = FLOATS,
        mutates: Sequence[str] = (),
        outputs: Sequence[str] | None = None,
        tensors: Mapping[str, str] | None = None,
        rows: Rows | Sequence[str] = (),
        reusable: Sequence[str] | None = None,
        samples: Samples | None = None,
        fake: Callable[..., Any] | None = None,
        backward: Callable[..., Any] | None = None,
        flags: Mapping[str, Sequence[str]] | None = None,
        include: Mapping[str, Sequence[str | os.PathLike[str]]] | None = None,
        ldflags: Mapping[str, Sequence[str | WheelLibrary]] | None = None,
        patterns: Sequence[Callable[..., Any]] | None = None,
    ) -> Callable[[Callable[Parameters, Results]], Op[Parameters, Results]]:
        """Make the decorated function an op.

        Args:
            variant: the C++ instantiation to compile; ``variant.py`` lists its placeholders. A mapping from backend where they
                differ; None for an op without kernels. The function takes the op's arguments and then ``Output&`` for each
                result, and serves the functional and the out form.
            cuda, cpu: the file with the backend's kernel, in the library's ``csrc``; or a list of files, of which the first has
                the function, and the others are compiled at the same time and linked with it. A backend without one runs the
                function itself.
            cuda_source, cpu_source: the source itself in place of a file, for notebooks and tests.
            dtypes: those for which the kernel is compiled, of every tensor whose dtype ``variant`` uses. Others run the
                function itself. A mapping says it argument by argument, ``{"q": HALVES, "positions": (torch.int32,
                torch.int64)}``, and samples come in every combination; it names all whose dtype ``variant`` uses, and may name
                others for the samples alone.
            mutates: tensor arguments that are written. Such an op returns what it returns, and has no out form.
            outputs: names of the out form's arguments: by default ``("out",)`` for one result; needed for several.
            tensors: what arguments and outputs must be, as the kernel's matcher says it: ``{"input": "[tokens..., hidden]
                rows", "weight": "[hidden]", "bias": "[hidden] weight.dtype"}``. Where the function or the fake runs, other
                calls are refused as the kernel refuses them. The dtype may also be a choice, ``float16|bfloat16``; the layout
                is ``rows``, ``strides [*, 1]``, or contiguous. All that are named are on one device.
            rows: the arguments with rows, each of which is worked on by itself: ``Rows("input")``, or a list of names.
            reusable: tensor arguments that the kernel reads, row by row or element by element, before it writes in their
                place: an output may be such an argument, or one of equal parts of its rows. By default the rows of an
                elementwise op, else none; all other arguments that share memory with one that is written are refused.
            samples: makes the arguments that tests and benchmarks call the op with.
            fake: what tracing calls instead of the function.
            backward: called with the gradients of the results and then all arguments; returns the gradient, or None, of each
                tensor. Without it the function is computed again and differentiated.
            flags: further compiler flags for a backend or an architecture, such as ``{"cuda": ["--use_fast_math"], "sm_100":
                []}``. The most specific key wins, ``sm_90a`` before ``sm_90`` before ``cuda``, and stands alone.
            include: further folders for ``#include``, by the same keys; also those of wheels, ``include_of(...)``.
            ldflags: what to link, by the same keys: ``{"cpu": ["-lz"]}``, ``{"cuda": [library_of(...)]}``.
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
            self._refuse_taken(name, registry.module(who), "module")
            known = registry.declared(self.namespace, name)
            if known is not None and not develop.is_on(self.namespace):
                first = inspect.getfile(known.declaration.function)
                raise ValueError(
                    f"{who} is declared twice; the first is in {first}\n"
                    "  remedy: another name; or, to replace the first, JITK_DEVELOP=1 or library.develop()"
                )
            options.check_lists(who, patterns=patterns, mutates=mutates, reusable=reusable, outputs=outputs)
            if not isinstance(rows, Rows):
                options.check_lists(who, rows=rows)
            texts = {"cuda": cuda_source, "cpu": cpu_source}
            found = sources.of(who, name, self.csrc, {"cuda": cuda, "cpu": cpu}, texts)
            options.check_variant(who, variant, found)
            flags_of = per_target.flags(who, flags, found)
            include_of = per_target.include(who, include, found)
            ldflags_of = per_target.ldflags(who, ldflags, found)
            of_rows = rows if isinstance(rows, Rows) else Rows(*rows)
            own = of_rows.arguments if of_rows.elementwise else ()
            signature = signature_of(function, mutates, own if reusable is None else reusable)
            kernels = options.kernels(who, signature, found, variant)
            names = options.output_names(who, signature, outputs)
            signature = signature.named(names) if names else signature
            of_rows.check(who, signature, names)
            declaration = Declaration(
                namespace=self.namespace,
                function=function,
                signature=signature,
                folders=self._folders,
                kernels=kernels,
                dtypes=options.dtypes_of(who, dtypes, signature, kernels),
                outputs=names,
                tensors=matcher.parse(who, tensors or {}, signature, names),
                rows=of_rows,
                samples=samples,
                fake=fake,
                backward=backward,
                flags=flags_of,
                include=include_of,
                ldflags=ldflags_of,
                patterns=None if patterns is None else tuple(patterns),
            )
            return self._added(declaration, known)

        # To mypy the variables of a result that is itself generic are others than these.
        return declare  # type: ignore[return-value]

    def module(
        self,
        name: str,
        *,
        sources: str | Sequence[str] | None = None,
        source: str | None = None,
        include: Sequence[str | os.PathLike[str]] = (),
        flags: Sequence[str] = (),
        ldflags: Sequence[str | WheelLibrary] = (),
        summary: str = "",
    ) -> types.ModuleType:
        """C++ classes and functions as a Python module, bound with pybind11, for what has a state: a cache, an allocator.

        Nothing is compiled or loaded until the first of its attributes is asked for. Then it is built, kept and loaded as
        kernels are: the same cache, locks, errors, ``JITK_NO_COMPILE`` and ``JITK_DEVELOP``; ``build`` and ``list`` know it.

        Args:
            name: of the module, an identifier; the source says ``PYBIND11_MODULE(TORCH_EXTENSION_NAME, m)``.
            sources: the file with that line, in the library's ``csrc``; or a list of files, of which the first has it, and the
                others are compiled at the same time and linked with it.
            source: the source itself in place of a file, for notebooks and tests.
            include: further folders for ``#include``; also those of wheels, ``include_of(...)``, such as another pybind11.
            flags: of the C++ compiler, behind those that CPU kernels get: ``["-O2"]``.
            ldflags: what to link: ``["-lz"]``, ``[library_of(...)]``.
            summary: one line for ``list`` and ``help``.

        Returns:
            The module, to be asked for its classes and functions where they are used, not where it is declared.

        Raises:
            TypeError: an option is of another type.
            ValueError: the name is taken or no identifier, a source is missing, or a flag or a folder cannot be used.
        """
        who = f"{self.namespace}::{name}"
        if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
            raise ValueError(f"the name of the module {who} must be an identifier that does not begin with _")
        self._refuse_taken(name, registry.declared(self.namespace, name), "op")
        known = registry.module(who)
        if known is not None and not develop.is_on(self.namespace):
            raise ValueError(
                f"the module {who} is declared twice\n"
                "  remedy: another name; or, to replace the first, JITK_DEVELOP=1 or library.develop()"
            )
        declaration = ModuleDeclaration(
            namespace=self.namespace,
            name=name,
            sources=of_module(who, name, self.csrc, sources, source),
            folders=(*self._folders, *per_target.include(who, {"cpu": include}, ("cpu",))["cpu"]),
            flags=per_target.flags(who, {"cpu": flags}, ("cpu",))["cpu"],
            ldflags=per_target.ldflags(who, {"cpu": ldflags}, ("cpu",))["cpu"],
            summary=summary,
        )
        registry.move_module(declaration, self)
        self.modules[name] = declaration
        return LazyModule(declaration)

    def _refuse_taken(self, name: str, other: object | None, kind: str) -> None:
        if other is not None:
            raise ValueError(f"{self.namespace}::{name} is the name of a{'n' * (kind == 'op')} {kind} already: choose another")

    def develop(self) -> None:
        """Switch on the editing loop for the ops of this namespace, as ``JITK_DEVELOP=1`` does for all.

        An edited source is built again at the next call, and an op that is declared again, by a reload or in a notebook,
        replaces the first one.
        """
        develop.start(self.namespace)

    def _added(self, declaration: Declaration, known: Op | None) -> Op:
        if known is None:
            op: Op = Op(declaration)
        else:
            op = known
            op.declare_again(declaration)
            registry.move(op, self)
        self.ops[declaration.name] = op
        return op
