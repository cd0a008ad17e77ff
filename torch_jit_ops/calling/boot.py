"""From the first call of an op to its kernels.

The C++ dispatcher is loaded and serves the op from then on. Where it has no entry for a key, it asks here.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch_jit_ops import backends, environment, fallback, forks
from torch_jit_ops.backends import MissingCompiler
from torch_jit_ops.builder.errors import BuildError
from torch_jit_ops.builder.on_demand import load
from torch_jit_ops.builder.unit import Unit
from torch_jit_ops.calling import develop, dispatcher, variant_storm
from torch_jit_ops.calling.reference import Reference
from torch_jit_ops.declaring import matcher, variant
from torch_jit_ops.declaring.declaration import Declaration
from torch_jit_ops.declaring.signature import tensors_of

if TYPE_CHECKING:
    from torch_jit_ops.builder.shared_object import Loaded

_under_way = threading.local()  # .boots: those whose first call this thread is making


class Boot:
    """The way of one op to its kernels.

    Args:
        declaration: of the op.
        reference: what runs where there is no kernel.
        overload_of: PyTorch's overload of that name.
    """

    def __init__(self, declaration: Declaration, reference: Reference, overload_of: Callable[[str], Any]) -> None:
        self._declaration = declaration
        self._reference = reference
        self._overload_of = overload_of
        self._lock = forks.Lock()
        self._source: develop.Source | None = None
        self._checked: Any = None  # what stands between the op and the dispatcher in debug mode
        self.promised: Callable[[Sequence[Any], Mapping[str, Any]], Any] | None = None
        self.is_done = False

    def call(self, overload: str, *args: Any, **kwargs: Any) -> Any:
        """On a device with a kernel, the first call: hand the op over to the C++ dispatcher, then call it again.

        On other devices every call: the reference. So are tensors that have the device alone, sparse ones, when they come back.
        """
        devices = backends.deciding({tensor.device for tensor in tensors_of((*args, *kwargs.values()))})
        served = {backend and backend.name for backend in map(backends.of_device, devices)}
        under_way = _under_way.__dict__.setdefault("boots", [])
        if not served or not served <= self._declaration.kernels.keys() or self in under_way:
            return self._reference.call(overload, args, kwargs)
        try:
            self.hand_over(args, kwargs)
        except MissingCompiler as missing:
            dispatcher.fall_back(self._declaration.qualified_name, missing)
            return self._reference.call(overload, args, kwargs)
        except forks.Reentered:
            return self._reference.call(overload, args, kwargs)
        under_way.append(self)
        try:
            with dispatcher.raising_what_is_kept():
                if self._checked is not None:
                    return self._checked.call(overload, args, kwargs)
                return self._overload_of(overload)(*args, **kwargs)
        finally:
            under_way.pop()

    def hand_over(self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> None:
        """Have the C++ dispatcher serve the op. If that must be compiled, the variant for ``args`` is so at the same time."""
        with self._lock as again:
            if self.is_done:
                return
            if again:
                raise forks.Reentered(
                    f"{self._declaration.qualified_name} is being called for the first time further down this thread's stack"
                )
            dispatcher.library(while_compiling=functools.partial(self._prefetch, args, kwargs or {}))
            if environment.debugging() and self.promised is not None:
                from torch_jit_ops.calling import debug

                self._checked = debug.Checked(self._declaration, self.promised)
            with forks.held_off():  # all of it or nothing, as a second time would be another registration
                self._register()
                self.is_done = True

    def follow(self, before: Boot) -> None:
        """Serve the op where it has been handed over as it was declared before."""
        if not before.is_done:
            return
        self.hand_over()
        declaration = self._declaration
        keys = {backends.named(name).dispatch_key for name in declaration.kernels}
        for overload, key in dispatcher.served(declaration.namespace, map(self._served_name, declaration.overloads)):
            if key not in keys:  # C++ serves it still, and no kernel is declared
                self._register_reference(overload, key)

    def _register_reference(self, overload: str, key: str) -> None:
        declaration = self._declaration
        form = overload.partition(".")[2]
        plan = variant.parse_variant(declaration.qualified_name, declaration.name, declaration.signature)

        def answer(_: Sequence[int]) -> int:
            self._reference.define_ops()
            return dispatcher.REFERENCE

        self._serve(form, key, plan, answer)

    def withdraw_twin(self) -> None:
        """Take away what debug mode has defined."""
        if self._checked is not None:
            develop.withdraw(self._checked.library)

    def _served_name(self, overload: str) -> str:
        """The overload that the C++ dispatcher serves."""
        return str(self._checked.dotted(overload)) if self._checked is not None else self._declaration.dotted(overload)

    def _register(self) -> None:
        declaration = self._declaration
        for backend, kernel in declaration.kernels.items():
            for overload in declaration.overloads:
                key = backends.named(backend).dispatch_key
                self._serve(overload, key, kernel.pattern, functools.partial(self._answer, backend))

    def _serve(self, overload: str, key: str, pattern: variant.VariantPattern, answer: dispatcher.Answer) -> None:
        """Have the C++ dispatcher serve the overload on a dispatch key."""
        declaration = self._declaration
        dispatcher.register(
            declaration.who(overload),
            declaration.namespace,
            self._served_name(overload),
            key,
            f"{declaration.namespace}::{self._reference.op_name(overload)}",
            pattern.plan(declaration.overloads[overload]),
            answer,
        )

    def _prefetch(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        declaration = self._declaration
        try:
            given = {name: value for name, value in kwargs.items() if name not in declaration.outputs}
            values = declaration.arguments(*args, **given)
            device = backends.deciding(tensor.device for tensor in tensors_of(values))[0]
            backend = backends.of_device(device)
            if backend is None:
                return
            words = declaration.kernels[backend.name].pattern.words_of(values)
            self.load(backend.name, [backend.index_of(device), *words])
        except Exception:  # the dispatcher will ask for the same and report it where the caller sees it
            return

    def load(self, backend: str, key: Sequence[int]) -> Loaded | None:
        """The library for a key of the dispatcher; None where the kernel does not serve these dtypes."""
        declaration = self._declaration
        pattern = declaration.kernels[backend].pattern
        if declaration.unserved(pattern.dtypes_of_key(key[1:])) is not None:
            return None
        values = pattern.values(key[1:])
        arch = backends.named(backend).arch_of(key[0])
        unit = declaration.unit(backend, values, arch)
        try:
            loaded = self._develop(unit) if develop.is_on(declaration.namespace) else load(unit)
        except BuildError as error:
            # Errors there are about the function that is exported: of another name, place or type than the variant says.
            if re.search(rf"\bjitk/export\.h:|\b{re.escape(unit.name.replace('.', '_'))}\.(cu|cpp):", str(error)):
                raise BuildError(f"{error}\n{declaration.wanted_function(backend, values)}") from error
            raise
        loaded.load_kernels(key[0])
        if environment.record_file() is not None:
            from torch_jit_ops import manifest

            manifest.record(manifest.entry_of(declaration.qualified_name, backend, pattern, values, arch))
        return loaded

    def _develop(self, unit: Unit) -> Loaded:
        if self._source is None:
            self._source = develop.Source(self._declaration.qualified_name, self._declaration.function)
        self._source.warn_if_edited()
        return develop.load(unit)

    def _refuses(self, unserved: fallback.Unserved) -> bool:
        """Whether the function refuses the dtype, too, so that there is nothing to say of a slower way."""
        declaration = self._declaration
        return not unserved.kernels or matcher.refuses(declaration.tensors, unserved.argument, unserved.dtype)

    def _answer(self, backend: str, key: Sequence[int]) -> int | dispatcher.Once:
        """The entry for a key that the dispatcher asks for; in develop mode for this call alone."""
        entry = self._entry(backend, key)
        return dispatcher.Once(entry) if develop.is_on(self._declaration.namespace) else entry

    def _entry(self, backend: str, key: Sequence[int]) -> int:
        """The address of the entry."""
        declaration = self._declaration
        unserved = declaration.unserved(declaration.kernels[backend].pattern.dtypes_of_key(key[1:]))
        if unserved is not None and not self._refuses(unserved):
            fallback.note(unserved)
        try:
            loaded = self.load(backend, key)
        except MissingCompiler as missing:
            dispatcher.fall_back(declaration.qualified_name, missing)
            loaded = None
        except forks.Reentered:
            self._reference.define_ops()
            raise
        if loaded is None:
            self._reference.define_ops()
            return dispatcher.REFERENCE
        variant_storm.note(declaration.qualified_name, backend, declaration.kernels[backend].pattern, key[1:])
        return loaded.entry(declaration.checked_export(backend, loaded))
