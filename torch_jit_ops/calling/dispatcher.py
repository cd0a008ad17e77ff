"""Loads the C++ dispatcher (csrc/runtime) and answers its misses.

Python talks to it through C functions; it talks to Python through ops of the namespace ``jitk``, as both directions then
work in any thread and without a binding to a version of Python.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from torch_jit_ops import environment, forks, process
from torch_jit_ops.backends import CPU, MissingCompiler
from torch_jit_ops.builder import on_demand as builder
from torch_jit_ops.builder import workers
from torch_jit_ops.builder.unit import Unit, csrc_dir
from torch_jit_ops.declaring import variant


@dataclass(frozen=True)
class Once:
    """An entry that serves the call that asked, and no other: the next one with the same key asks again."""

    entry: int


Answer = Callable[[Sequence[int]], int | Once]

REFERENCE = 0  # the entry that makes the runtime call the op's reference
MAX_SLOTS = 16384  # JITK_MAX_SLOTS of csrc/runtime/slot.h

_answers: dict[int, Answer] = {}  # by what the dispatcher asks with: a slot's number, or what came in its place
_numbers = itertools.count()
_replacements = itertools.count(MAX_SLOTS)
_slots: dict[tuple[str, str], int] = {}  # by overload and dispatch key: PyTorch keeps what C++ has registered
_reserved = 0
_kept = threading.local()  # .error: what failed below the dispatcher, which can hand on no more than a text
_lock = forks.Lock()

_library = torch.library.Library("jitk", "FRAGMENT")
_library.define("_build(int slot, int[] key) -> str")
_library.define("_take_error() -> str")
_library.define("_raise() -> ()")
_library.define("_explain_allocation(int[] sizes, int dtype, int cuda_index) -> str")


def _build(slot: int, key: list[int]) -> str:
    try:
        found = _answers[slot](key)
        return f"once {found.entry}" if isinstance(found, Once) else f"entry {found}"
    except forks.Reentered:
        return "reference"
    except BaseException as error:  # an exception would be lost on the way through C
        keep_error(error)
        return f"error {_text(error)}"


def _take_error() -> str:
    error = _kept.__dict__.get("error")
    return "" if error is None else _text(error)


def _raise() -> None:
    raise _kept.__dict__.pop("error")


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _explain_allocation(sizes: list[int], dtype: int, cuda_index: int) -> str:
    device = torch.device(cuda_index) if cuda_index >= 0 else torch.device(CPU.device_type)
    try:
        torch.empty(sizes, dtype=variant.dtype_of_key(dtype), device=device)
    except Exception as error:  # whatever it is, it is what the caller should read
        return str(error)
    return f"PyTorch could not allocate {sizes} on {device}, but could a moment later"


_library.impl("_build", _build, "CompositeExplicitAutograd")
_library.impl("_take_error", _take_error, "CompositeExplicitAutograd")
_library.impl("_raise", _raise, "CompositeExplicitAutograd")
_library.impl("_explain_allocation", _explain_allocation, "CompositeExplicitAutograd")


def unit() -> Unit:
    """The translation unit of the dispatcher. Its library depends on PyTorch's version; a variant's does not."""
    return _unit("runtime", "the dispatcher", "dispatch.cpp")


def standalone_unit() -> Unit:
    """The translation unit of the dispatcher for programs without Python."""
    return _unit("runtime.standalone", "the dispatcher without Python", "standalone.cpp")


def _unit(name: str, label: str, source: str) -> Unit:
    return Unit(
        name=name,
        label=label,
        backend=CPU,
        arch=CPU.baseline,
        text=f'#include "{source}"\n',
        include=(csrc_dir() / "runtime",),
        flags=("-O2", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
        torch=True,
    )


_loaded: ctypes.CDLL | None = None


def library(while_compiling: Callable[[], object] | None = None) -> ctypes.CDLL:
    """The dispatcher in this process. If it has to be compiled first, ``while_compiling`` is called in a thread of its own.

    Raises:
        MissingCompiler: it is not in the cache, and there is no C++ compiler.
    """
    global _loaded
    if _loaded is None:
        _loaded = _prototyped(builder.load(unit(), while_compiling).library)
    return _loaded


def autograd_unit() -> Unit:
    """The translation unit that looks for wanted gradients. It takes four times as long as the dispatcher to compile."""
    return Unit(
        name="runtime_autograd",
        label="the dispatcher for autograd",
        backend=CPU,
        arch=CPU.baseline,
        text='#include "autograd.cpp"\n',
        include=(csrc_dir() / "runtime",),
        flags=("-O2", "-std=c++20"),
        torch=True,
    )


_autograd: Future[ctypes.CDLL] | None = None
_differentiated: set[str] = set()  # the overloads that C++ does it for
# Whether a tensor can have a tangent; None until the library is there that knows.
in_forward_mode: Callable[[], bool] | None = None


def _forget_in_child() -> None:
    global _autograd
    if _autograd is not None and not _autograd.done():
        _autograd = None


forks.in_child(_forget_in_child)


def differentiate(overloads: Sequence[str]) -> bool:
    """Have C++ tell from now on whether calls of these overloads want a gradient.

    Returns:
        Whether that is done. If not, the library is being compiled: ask again.
    """
    global _autograd, in_forward_mode
    if _autograd is None:
        with _lock:
            if _autograd is None:
                _autograd = _in_background(autograd_unit())
    if not _autograd.done() or _autograd.exception() is not None:
        return False
    loaded = _autograd.result()
    loaded.jitk_in_forward_mode.restype = ctypes.c_bool
    for overload in overloads:
        if overload not in _differentiated:  # of an op that was declared again: it is so for good
            name, _, form = overload.partition(".")
            _checked(loaded.jitk_differentiate, name.encode(), form.encode())
            _differentiated.add(overload)
    in_forward_mode = loaded.jitk_in_forward_mode
    return True


def _let_errors_through() -> None:
    """Have the dispatcher raise exceptions as they are, by the library that can; else their texts, as RuntimeErrors."""
    try:
        loaded = builder.load(autograd_unit()).library
    except Exception:  # whatever it is, the caller should read of the first failure
        return
    library().jitk_set_raise(loaded.jitk_raise)


def _in_background(unit: Unit) -> Future[ctypes.CDLL]:
    """Load the unit at once if it is in the store; else compile it in a thread."""
    result: Future[ctypes.CDLL] = Future()
    found = builder.find(unit)
    if found is not None:
        result.set_result(found.library)
    if found is not None or not environment.building_in_background():
        return result

    # If it fails, ops work without it: a call that wants no gradient takes 4 us more.
    return workers.background.submit(lambda: builder.load(unit).library, at_once=True)


def _prototyped(loaded: ctypes.CDLL) -> ctypes.CDLL:
    loaded.jitk_register.argtypes = [ctypes.c_int32, *[ctypes.c_char_p] * 7, ctypes.c_size_t]
    loaded.jitk_replace.argtypes = [ctypes.c_int32, ctypes.c_int64, *[ctypes.c_char_p] * 4, ctypes.c_size_t]
    loaded.jitk_forget.argtypes = [ctypes.c_int32, ctypes.c_char_p, ctypes.c_size_t]
    with forks.held_off():  # the driver has locks of its own
        loaded.jitk_set_several_devices(torch.cuda.device_count() > 1)
    return loaded


def keep_error(error: BaseException | None) -> None:
    """Keep what failed, or that nothing did, for the dispatcher, which called in this thread and has it raised."""
    _kept.error = error
    if error is not None and not _kept.__dict__.get("raising"):
        _let_errors_through()


@contextlib.contextmanager
def raising_what_is_kept() -> Iterator[None]:
    """Raise in the block what is kept in place of the dispatcher's error, which has its text alone."""
    outer, _kept.raising, _kept.error = _kept.__dict__.get("raising"), True, None
    try:
        yield
    except RuntimeError:
        error = _kept.__dict__.pop("error", None)
        if error is None:
            raise
        raise error from None
    finally:
        _kept.raising = outer


def reserve(who: str, slots: int) -> None:
    """Count the slots that ``who`` will need.

    Raises:
        ValueError: there are no more.
    """
    global _reserved
    with _lock:
        if _reserved + slots > MAX_SLOTS:
            raise ValueError(
                f"{who}: a process can have {MAX_SLOTS} kernels, one for each overload of an op and each backend; "
                f"{_reserved} are declared, and this makes {slots} more"
            )
        _reserved += slots


def register(
    who: str,
    namespace: str,
    overload: str,
    dispatch_key: str,
    reference: str,
    plan: str,
    answer: Answer,
) -> int:
    """Have the dispatcher serve an overload from now on.

    One that it has served before it serves as it is declared now, with another plan, reference and answer. Calls under way end
    as they began.

    Args:
        who: the overload as errors name it.
        namespace: of the op.
        overload: the op's name with its overload: ``silu_and_mul.out``.
        dispatch_key: ``CPU`` or ``CUDA``.
        reference: qualified name of the op to call where ``answer`` says ``REFERENCE``.
        plan: how to read the arguments (``VariantPattern.plan``).
        answer: from a key to the address of an entry, for good or ``Once``; its exceptions reach the caller of the op.

    Returns:
        The number of the slot.
    """
    place = (f"{namespace}::{overload}", dispatch_key)
    number = _slots.get(place)
    if number is not None:
        asks = next(_replacements)
        _answers[asks] = answer
        _checked(library().jitk_replace, number, asks, *(text.encode() for text in (who, reference, plan)))
        return number
    number = next(_numbers)
    _answers[number] = answer
    texts = (who, namespace, overload, dispatch_key, reference, plan)
    _checked(library().jitk_register, number, *(text.encode() for text in texts))
    _slots[place] = number
    return number


def served(namespace: str, overloads: Iterable[str]) -> list[tuple[str, str]]:
    """Of these overloads of a namespace, those that the dispatcher has ever served, each with the dispatch key."""
    wanted = {f"{namespace}::{overload}": overload for overload in overloads}
    return [(wanted[name], key) for name, key in _slots if name in wanted]


def forget_all(namespace: str) -> None:
    """Have the ops of the namespace ask for every key again."""
    for (name, _), number in list(_slots.items()):
        if name.partition("::")[0] == namespace:
            forget(number)


def forget(number: int) -> None:
    """Have the slot ask for every key again. Calls under way end with the entry that they found."""
    _checked(library().jitk_forget, number)


def _checked(function: Callable[..., int], *args: object) -> None:
    error = ctypes.create_string_buffer(1024)
    with forks.held_off():  # PyTorch has a lock for registrations
        failed = function(*args, error, len(error)) != 0
    if failed:
        raise RuntimeError(error.value.decode())


def fall_back(who: str, missing: MissingCompiler) -> None:
    """Warn, once for each cause, that ``who`` runs its reference.

    Raises:
        MissingCompiler: ``JITK_FALLBACK=error``.
    """
    if environment.fallback_is_error():
        raise missing
    if process.first_time("no compiler", str(missing)):
        warnings.warn(
            f"{who} runs its PyTorch reference, which is slower: {missing}\n  JITK_FALLBACK=error makes this an error",
            stacklevel=2,
        )
