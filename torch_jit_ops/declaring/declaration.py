"""What is declared of an op: frozen data, which builds, deployments, tests, benchmarks and passes over graphs read."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from torch_jit_ops import backends, environment
from torch_jit_ops.backends.wheels import Folder, WheelLibrary
from torch_jit_ops.builder.unit import Unit
from torch_jit_ops.declaring import matcher, per_target, variant
from torch_jit_ops.declaring.dtypes import DTypes
from torch_jit_ops.declaring.rows import Rows
from torch_jit_ops.declaring.samples import Sample, SampleMaker
from torch_jit_ops.declaring.signature import OUT_FORMS_RETURN, Signature
from torch_jit_ops.declaring.sources import Source
from torch_jit_ops.fallback import Unserved

if TYPE_CHECKING:
    from torch_jit_ops.builder.shared_object import Loaded

Samples = Callable[[SampleMaker], Iterable[Sample]]


@dataclass(frozen=True)
class Kernel:
    """The kernel of a backend: what it is written in, and which function to instantiate."""

    sources: Source
    pattern: variant.VariantPattern

    @property
    def source(self) -> str:
        """The name of the source with the function, for people."""
        return self.sources.name


@dataclass(frozen=True, eq=False)
class Declaration:
    """An op as it was declared.

    Attributes:
        namespace: of ``torch.ops``.
        function: the decorated one: the op's meaning, in PyTorch.
        signature: of the functional or in-place form.
        folders: where its sources are, if they are files, and then the library's folders of headers.
        kernels: by backend, ``"cuda"`` and ``"cpu"``.
        dtypes: those that the kernels are compiled for, by argument.
        outputs: names of the out form's arguments; empty if there is no out form.
        tensors: what tensor arguments and outputs must be.
        rows: which arguments have rows, and what the op does with them.
        samples: makes arguments for tests, or None.
        fake: what tracing calls instead of the function, or None.
        backward: the derivative, or None: the function is computed again and differentiated.
        flags, include, ldflags: further flags of compilers, folders of headers, and what to link: by backend or architecture.
        patterns: other spellings of the function that ``inductor.fuse`` looks for, or None.
    """

    namespace: str
    function: Callable[..., Any]
    signature: Signature
    folders: tuple[Folder, ...]
    kernels: Mapping[str, Kernel] = field(default_factory=dict)
    dtypes: DTypes = field(default_factory=lambda: DTypes({}, ()))
    outputs: tuple[str, ...] = ()
    tensors: tuple[matcher.TensorPattern, ...] = ()
    rows: Rows = field(default_factory=Rows)
    samples: Samples | None = None
    fake: Callable[..., Any] | None = None
    backward: Callable[..., Any] | None = None
    flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    include: Mapping[str, tuple[Folder, ...]] = field(default_factory=dict)
    ldflags: Mapping[str, tuple[str | WheelLibrary, ...]] = field(default_factory=dict)
    patterns: tuple[Callable[..., Any], ...] | None = None

    @property
    def name(self) -> str:
        """``silu_and_mul``."""
        return self.function.__name__

    @property
    def qualified_name(self) -> str:
        """``jitk::silu_and_mul``."""
        return f"{self.namespace}::{self.name}"

    def dotted(self, overload: str) -> str:
        """``silu_and_mul.out``, as ``torch.library`` names an overload."""
        return f"{self.name}.{overload}" if overload else self.name

    def who(self, overload: str) -> str:
        """``jitk::silu_and_mul.out``, as errors name an overload."""
        return f"{self.namespace}::{self.dotted(overload)}"

    @functools.cached_property
    def overloads(self) -> Mapping[str, Signature]:
        """The signature of each overload, ``""`` and ``"out"``."""
        forms = {"": self.signature}
        if self.outputs:
            forms["out"] = self.signature.with_outputs(self.outputs, returned=OUT_FORMS_RETURN)
        return forms

    def writes(self, overload: str = "") -> bool:
        """Whether the overload writes arguments."""
        return any(argument.written for argument in self.overloads[overload].arguments)

    @property
    def is_functional(self) -> bool:
        """Whether all that the op does is to return new tensors."""
        return self.signature.results > 0 and not self.writes()

    def arguments(self, *args: Any, **kwargs: Any) -> list[Any]:
        """All arguments of a call in the order of the schema, defaults included."""
        bound = inspect.signature(self.function).bind(*args, **kwargs)
        bound.apply_defaults()
        return list(bound.arguments.values())

    def by_name(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments that a call gives, without defaults."""
        return {**dict(zip((argument.name for argument in self.signature.arguments), args, strict=False)), **kwargs}

    def unserved(self, dtypes: Mapping[str, torch.dtype | None]) -> Unserved | None:
        """The first of these dtypes, of the arguments whose dtype picks the kernel, that no kernel is compiled for."""
        for argument, dtype in dtypes.items():
            kernels = self.dtypes.of(argument)
            if dtype not in kernels:
                return Unserved(self.qualified_name, argument, dtype, kernels)
        return None

    # --- the C++ of a variant ---------------------------------------------------------------------

    def unit(self, backend: str, values: Sequence[variant.Value], arch: str) -> Unit:
        """The translation unit for the placeholders' values: one function, which serves every overload."""
        kernel = self.kernels[backend]
        function = kernel.pattern.instantiate(values)
        lines = ["using namespace jitk;", f"JITK_EXPORT({kernel.pattern.export_name()}, {function})"]
        label = function.removeprefix(self.namespace + "::")
        return Unit(
            name=f"{self.namespace}.{self.name}",
            label=f"{self.namespace}::{label}",
            backend=backends.named(backend),
            arch=arch,
            text=kernel.sources.opening(backend, self.qualified_name) + "\n".join(lines) + "\n",
            include=(*self.folders, *per_target.pick(self.include, backend, arch)),
            flags=per_target.pick(self.flags, backend, arch),
            beside=kernel.sources.units_beside(),
            ldflags=per_target.pick(self.ldflags, backend, arch),
            debug=environment.debugging(),
        )

    def checked_export(self, backend: str, loaded: Loaded) -> str:
        """The name by which a variant's library exports its function.

        Raises:
            RuntimeError: the function in the library does not fit the schema.
        """
        kernel = self.kernels[backend]
        export = kernel.pattern.export_name()
        found = loaded.signature(export)
        if found != kernel.pattern.cpp_signature(self.signature):
            raise RuntimeError(
                f"{self.qualified_name}: the C++ function {export} does not fit the schema\n"
                f"  expected  {kernel.pattern.cpp_declaration(self.signature, export)}\n"
                f"  got       {variant.cpp_declaration(found, export)}\n"
                f"  in {kernel.source}"
            )
        return export

    def wanted_function(self, backend: str, values: Sequence[variant.Value]) -> str:
        """The C++ function that the source must have, as a declaration, for errors."""
        kernel = self.kernels[backend]
        declared = kernel.pattern.cpp_declaration(self.signature, kernel.pattern.instantiate(values))
        return f"  the op needs in {kernel.source}, as a template where its name has <...>:\n    {declared}"
