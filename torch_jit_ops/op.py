"""An op: what ``torch.ops`` calls, made of a declaration and registered with PyTorch."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Generic, NoReturn

import torch
from torch import Tensor
from typing_extensions import ParamSpec, TypeVar  # which PyTorch needs, too: plain ``Op`` is any op

from torch_jit_ops import registry
from torch_jit_ops.calling import develop, dispatcher, overlap
from torch_jit_ops.calling.boot import Boot
from torch_jit_ops.calling.reference import Reference
from torch_jit_ops.declaring.declaration import Declaration
from torch_jit_ops.declaring.signature import Signature
from torch_jit_ops.features import autograd, planned_out, vmap
from torch_jit_ops.features.traced import Fake

Parameters = ParamSpec("Parameters", default=...)
Results = TypeVar("Results", covariant=True, default=Any)


class Op(Generic[Parameters, Results]):
    """A declared op. Calling it calls ``torch.ops.<namespace>.<name>``; ``out`` is its out form.

    To a type checker it is the decorated function: ``rmsnorm("a", 3)`` is refused, and the result is a Tensor.

    Attributes:
        declaration: what was declared of it.
        name: ``silu_and_mul``.
        qualified_name: ``jitk::silu_and_mul``.
    """

    def __init__(self, declaration: Declaration) -> None:
        dispatcher.reserve(declaration.qualified_name, _slots(declaration))
        self._be(declaration)

    def declare_again(self, declaration: Declaration) -> None:
        """Be this op from now on, for everybody who has imported it. No other thread may call it meanwhile.

        The kernels that the C++ dispatcher has registered stay, since nothing takes them away, and get the new op's plan.
        """
        dispatcher.reserve(declaration.qualified_name, max(0, _slots(declaration) - _slots(self.declaration)))
        before = dict(self.__dict__)
        try:
            self._withdraw()
            self.__dict__.clear()
            self._be(declaration)
            self._boot.follow(before["_boot"])
        except BaseException:
            self._withdraw()
            self.__dict__.clear()
            self._be(before["declaration"])
            self._boot.follow(before["_boot"])
            raise
        finally:
            develop.reset_compiled_models()

    def _withdraw(self) -> None:
        """Take from PyTorch what ``_be`` has given it."""
        if "_library" in self.__dict__:
            develop.withdraw(self._library)
            self._reference.withdraw_ops()
            self._boot.withdraw_twin()

    def _be(self, declaration: Declaration) -> None:
        self.declaration = declaration
        self.name = declaration.name
        self.qualified_name = declaration.qualified_name
        self._reference = Reference(declaration)
        self._boot = Boot(declaration, self._reference, self.overload)
        self._fake = Fake(declaration, self._reference, self.overload, self._boot.load)
        self._boot.promised = self._fake.results
        dotted = [f"{declaration.namespace}::{declaration.dotted(form)}" for form in declaration.overloads]
        self._handover = autograd.Handover(dotted, lambda: self._boot.is_done)
        functools.update_wrapper(self, declaration.function)
        self._library = torch.library.Library(declaration.namespace, "FRAGMENT")
        self._define()

    def __repr__(self) -> str:
        return f"<op {self.qualified_name}, kernels for {', '.join(self.declaration.kernels) or 'no backend'}>"

    def __call__(self, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Results:
        results: Results = self.packet(*args, **kwargs)
        return results

    def __reduce__(self) -> Any:
        """By name: a copy is the op itself, and what is pickled is found again where its library has been imported."""
        return registry.unpickled, (self.declaration.namespace, self.name, self.declaration.function.__module__)

    @property
    def reference(self) -> Callable[Parameters, Results]:
        """The decorated function."""
        return self.declaration.function

    @property
    def signature(self) -> Signature:
        """Of the functional or in-place form."""
        return self.declaration.signature

    @property
    def packet(self) -> Any:
        """``torch.ops.<namespace>.<name>``."""
        return getattr(getattr(torch.ops, self.declaration.namespace), self.name)

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

    def overload(self, name: str) -> Any:
        """PyTorch's overload, ``""`` or ``"out"``."""
        return getattr(self.packet, name or "default")

    def hand_over(self) -> None:
        """Have the C++ dispatcher serve the op, as its first call would."""
        self._boot.hand_over()

    @contextlib.contextmanager
    def kernels_alone(self) -> Iterator[None]:
        """Have no help from the function while the block runs: a call that would run it raises AssertionError."""

        def refuse(*args: Any, **kwargs: Any) -> NoReturn:
            raise AssertionError(f"{self.qualified_name}: the function ran instead of the kernel")

        with self._reference.replaced(refuse):
            yield

    # --- definition -------------------------------------------------------------------------------

    def _define(self) -> None:
        declaration, library = self.declaration, self._library
        fakes = {"": self._fake.run, "out": self._fake.run_out}
        tags = {"": (torch.Tag.pt2_compliant_tag,), "out": (torch.Tag.pt2_compliant_tag, *planned_out.TAGS)}
        # The functional form is defined first: a packet tries its overloads in this order, and a miss costs 4 us.
        for overload, signature in declaration.overloads.items():
            dotted = declaration.dotted(overload)
            library.define(signature.schema(dotted), tags=tags[overload])
            torch.library.register_fake(f"{declaration.namespace}::{dotted}", fakes[overload], lib=library)
        for overload, signature in declaration.overloads.items():
            dotted = declaration.dotted(overload)
            # On the key of all devices, so that the dispatcher's kernels come beside it and it can stay: to take a Python
            # kernel away frees it under another thread that has found it and waits for the GIL.
            library.impl(dotted, functools.partial(self._boot.call, overload), "CompositeExplicitAutograd")
            library.impl(dotted, self._autograd_kernel(overload, signature), "Autograd", with_keyset=True)
            if declaration.writes(overload):
                # PyTorch's own kernels for these keys want an op that returns what it writes, and writes one tensor.
                for key in ("Conjugate", "Negative"):
                    library.impl(dotted, functools.partial(self._write_lazy_views, overload), key)
        plain = self.signature.has_plain_results and not self.signature.has_lists
        if (
            declaration.is_functional
            and plain
            and not any(part.kind == "T" and part.keyword_only for part in self.signature.arguments)
        ):
            torch.library.register_vmap(
                self.qualified_name, vmap.rule(self.default, self.signature, declaration.rows), lib=library
            )

        self.packet.__doc__ = _documented(declaration)
        for overload in declaration.overloads:
            self.overload(overload).__doc__ = self.packet.__doc__

    def _autograd_kernel(self, overload: str, signature: Signature) -> Callable[..., Any]:
        function = self.overload(overload)
        who = self.declaration.who(overload)
        if overload == "out":
            return autograd.writing_kernel(
                function,
                signature,
                f"{who}: functions with out=... arguments don't support automatic differentiation",
                {
                    "requires grad": "call the functional form, or this one under torch.no_grad()",
                    "has a tangent": "call the functional form",
                },
                self._handover,
            )
        if self.declaration.is_functional:
            return autograd.functional_kernel(
                function, signature, self._reference.plain, self.declaration.backward, self._handover
            )
        return autograd.writing_kernel(
            function,
            signature,
            f"{who}: an op that writes its arguments has no derivative",
            {
                "requires grad": "call it under torch.no_grad(), or write the same with operations that return new tensors",
                "has a tangent": "write the same with operations that return new tensors",
            },
            self._handover,
        )

    def _write_lazy_views(self, overload: str, *args: Any, **kwargs: Any) -> Any:
        """The call where tensors have the negative or the conjugate bit: by copies that have none, written back."""
        signature = self.declaration.overloads[overload]
        values = self.declaration.by_name(args, kwargs)
        overlap.refuse(self.declaration.who(overload), signature, values)
        plain = {
            name: value.resolve_conj().resolve_neg() if isinstance(value, Tensor) else value for name, value in values.items()
        }
        with torch._C._AutoDispatchBelowAutograd():
            self.overload(overload)(**plain)
            for argument in signature.arguments:
                if argument.written and plain.get(argument.name) is not values.get(argument.name):
                    values[argument.name].copy_(plain[argument.name])
        return signature.returned_of(values)


def _slots(declaration: Declaration) -> int:
    """How many of the dispatcher's an op needs."""
    return len(declaration.overloads) * len(declaration.kernels)


def _documented(declaration: Declaration) -> str:
    """The docstring below the call, as ``help`` shows those of functions in C."""
    doc = inspect.cleandoc(declaration.function.__doc__ or "")
    parameters = str(inspect.signature(declaration.function)).replace("'", "")
    return f"{declaration.name}{parameters}\n\n{doc}".rstrip()
