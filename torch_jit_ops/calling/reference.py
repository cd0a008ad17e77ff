"""The op's PyTorch function at work: where there is no kernel for a call, and as the truth that a kernel is compared with."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_jit_ops import forks
from torch_jit_ops.calling import develop, dispatcher, overlap
from torch_jit_ops.declaring import matcher
from torch_jit_ops.declaring.declaration import Declaration
from torch_jit_ops.declaring.signature import tensors_of


class Reference:
    """The overloads of an op as its function computes them, with the results, refusals and errors of a kernel."""

    def __init__(self, declaration: Declaration) -> None:
        self._declaration = declaration
        self._function = declaration.function
        self._lock = forks.Lock()
        self._library: torch.library.Library | None = None  # of the ops that the dispatcher calls

    def implementation(self, overload: str) -> Callable[..., Any]:
        """What computes the overload."""
        return {"": self.run, "out": self.run_out}[overload]

    def check(self, overload: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Refuse tensors that are not what the declaration says, as the kernel would.

        Raises:
            RuntimeError: one is not.
        """
        declaration = self._declaration
        if declaration.tensors:
            matcher.verify(
                declaration.who(overload), declaration.tensors, declaration.by_name(args, kwargs), declaration.dtypes.of
            )

    def check_outputs(self, outs: Sequence[Tensor], results: Any) -> None:
        """Refuse outputs that are not like the results."""
        declaration = self._declaration
        for name, out, result in zip(declaration.outputs, outs, as_tuple(results), strict=True):
            matcher.verify_output(declaration.who("out"), name, out, result)

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """The function itself, which may return views and is what derivatives are taken of."""
        self.check("", args, kwargs)
        return self._function(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Results as a kernel returns them: contiguous, and no views of the arguments."""
        results = self.plain(*args, **kwargs)
        if self._declaration.signature.results == 0:
            return None
        storages = {_storage(tensor) for tensor in tensors_of((*args, *kwargs.values()))}

        def fresh(result: Tensor) -> Tensor:
            return result.clone(memory_format=torch.contiguous_format) if _storage(result) in storages else result.contiguous()

        return each_tensor(fresh, results)

    def run_out(self, *args: Any, **kwargs: Any) -> Any:
        """The out form."""
        returned = self._declaration.overloads["out"].returned_of(kwargs)
        self.check("out", args, kwargs)
        outs = [kwargs.pop(name) for name in self._declaration.outputs]
        results = self._function(*args, **kwargs)
        self.check_outputs(outs, results)
        for out, result in zip(outs, as_tuple(results), strict=True):
            out.copy_(result)
        return returned

    def call(self, overload: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """A call that the dispatcher, which looks for arguments that overlap, is not on the way of."""
        declaration = self._declaration
        if declaration.writes(overload):
            values = declaration.by_name(args, kwargs)
            overlap.refuse(declaration.who(overload), declaration.overloads[overload], values)
        return self.implementation(overload)(*args, **kwargs)

    @contextlib.contextmanager
    def replaced(self, function: Callable[..., Any]) -> Iterator[None]:
        """Have another function in the op's place while the block runs, so that a test can tell when it is called."""
        before, self._function = self._function, function
        try:
            yield
        finally:
            self._function = before

    # --- for the dispatcher, which can call ops alone -------------------------------------------------

    def op_name(self, overload: str) -> str:
        """The op that the dispatcher calls where a key has no kernel."""
        return f"_reference_{self._declaration.name}{overload and '_'}{overload}"

    def define_ops(self) -> None:
        """Define these ops. An exception would not pass the dispatcher, so they keep it, and return None for each result."""
        with self._lock, forks.held_off():
            if self._library is not None:
                return
            library = torch.library.Library(self._declaration.namespace, "FRAGMENT")
            for overload, signature in self._declaration.overloads.items():
                name = self.op_name(overload)
                arguments = signature.schema(name).rpartition(" -> ")[0]
                # The dispatcher mixes up results of different types: where one is a list, all are.
                has_lists = any(result.kind == "L" for result in signature.made)
                library.define(f"{arguments} -> ({', '.join(['Tensor[]?' if has_lists else 'Tensor?'] * signature.results)})")
                implementation = self.implementation(overload)
                if has_lists:
                    implementation = functools.partial(_in_lists, implementation)
                call = functools.partial(self._run_keeping_errors, implementation, signature.results)
                library.impl(name, call, "CompositeExplicitAutograd")
            self._library = library

    def withdraw_ops(self) -> None:
        """Take them away again."""
        with self._lock:
            if self._library is not None:
                develop.withdraw(self._library)
                self._library = None

    def _run_keeping_errors(self, implementation: Callable[..., Any], made: int, *args: Any, **kwargs: Any) -> Any:
        dispatcher.keep_error(None)
        try:
            results = implementation(*args, **kwargs)
        except Exception as error:  # of any kind: the dispatcher has it raised
            dispatcher.keep_error(self._named(error, self._declaration.by_name(args, kwargs)))
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
        declaration = self._declaration
        text = str(error)
        if text.startswith(declaration.qualified_name):
            return text
        kernels = declaration.kernels.values()
        dtypes = {name: dtype for kernel in kernels for name, dtype in kernel.pattern.dtypes_of(given).items()}
        unserved = declaration.unserved(dtypes)
        return f"{declaration.qualified_name}: {text}" + (
            f"\n  {unserved}, so the PyTorch function ran" if unserved and unserved.kernels else ""
        )


def as_tuple(results: Any) -> tuple[Any, ...]:
    """What a function returned as a tuple of its results."""
    return results if isinstance(results, tuple) else (results,)


def _in_lists(implementation: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The results, a tensor as a list of one."""
    results = implementation(*args, **kwargs)
    listed = tuple([result] if isinstance(result, Tensor) else result for result in as_tuple(results))
    return listed if isinstance(results, tuple) else listed[0]


def each_tensor(change: Callable[[Tensor], Tensor], results: Any) -> Any:
    """The results with each tensor changed, in lists too; None stays."""
    if isinstance(results, tuple):
        return tuple(each_tensor(change, result) for result in results)
    if isinstance(results, list):
        return [change(result) for result in results]
    return None if results is None else change(results)


def _storage(tensor: Tensor) -> int:
    """What tells storages apart; 0 for a tensor without one, such as a sparse one."""
    return tensor.untyped_storage()._cdata if torch._C._has_storage(tensor) else 0
