"""From a unit to a loaded library: look, lock, look again, stage, compile, load, rename.

``load(unit)`` is the whole interface. A hit starts no process and imports no ``cpp_extension``. The lock saves work; that a
variant is complete, and there once, is the doing of the rename alone.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import torch

from torch_jit_ops import environment, forks, process, progress, statistics
from torch_jit_ops.builder import compilers, errors, shared_object, workers
from torch_jit_ops.builder.errors import BuildError, BuildInterrupted, CompileRefused
from torch_jit_ops.builder.shared_object import NOEXEC, OF_THIS_MOMENT, Loaded, nowhere_to_run
from torch_jit_ops.builder.unit import Unit
from torch_jit_ops.store import lock
from torch_jit_ops.store.dependencies import states_of
from torch_jit_ops.store.digests import digest_of_record
from torch_jit_ops.store.record import LOG
from torch_jit_ops.store.search_path import search_path
from torch_jit_ops.store.store import Store
from torch_jit_ops.store.temporary import temporary_folder

_results: dict[tuple[Unit, tuple[Path, ...]], Future[Loaded]] = process.keep({})
_builders: dict[Future[Loaded], int] = process.keep({})  # the threads
_results_lock = forks.Lock()


def _forget_in_child() -> None:
    """A build of the parent's threads does not end here."""
    for key in [key for key, result in _results.items() if not result.done()]:
        del _results[key]


forks.in_child(_forget_in_child)


def load(unit: Unit, while_compiling: Callable[[], object] | None = None) -> Loaded:
    """Load the unit's library, compiling it if it is nowhere yet. Threads that ask for the same unit share one build.

    Args:
        unit: what to load.
        while_compiling: called in a thread of its own if the unit has to be compiled.

    Raises:
        BuildError: it does not compile. The same error is raised again without compiling again in this process.
        MissingCompiler: it is not in the store, and there is no compiler.
        CompileRefused: it is not in the store, and JITK_NO_COMPILE=1; or a CUDA graph is being captured.
        UntrustedCache: others could have written the kernel.
        Reentered: this thread is in the middle of it, and called from a signal handler.
    """
    stores = search_path()
    key = (unit, tuple(store.root for store in stores))
    with _results_lock:
        result = _results.get(key)
        if result is None or not result.done():
            _refuse_during_capture(unit)
        mine = result is None
        if result is None:
            result = _results[key] = Future()
            _builders[result] = threading.get_ident()
        elif _builders.get(result) == threading.get_ident():
            raise forks.Reentered(f"{unit.label} is being built further down the stack of this thread")
    if mine:
        try:
            loaded = _load(unit, stores, while_compiling)
            statistics.count(unit.name, compiled=loaded.compiled, seconds=loaded.seconds)
            result.set_result(loaded)
        except BaseException as error:
            statistics.count_failure(unit.name)
            if not isinstance(error, BuildError):
                with _results_lock:
                    del _results[key]  # not the kernel's fault: a later call may succeed
            result.set_exception(error)
        finally:
            _builders.pop(result, None)
    failure = result.exception()
    if isinstance(failure, BuildInterrupted) and not mine:
        return load(unit, while_compiling)
    if failure is not None:
        raise failure.with_traceback(None)  # which would grow with every call
    return result.result()


def forget(unit: Unit) -> None:
    """Have the next ``load`` look into the stores again, and build again what could not be built. A build under way goes on."""
    key = (unit, tuple(store.root for store in search_path()))
    with _results_lock:
        if key in _results and _results[key].done():
            del _results[key]


def find(unit: Unit) -> Loaded | None:
    """Load the unit's library if it is in a store; None if it would have to be compiled."""
    stores = search_path()
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return None
    compiler = compilers.compiler_of(unit, stores[-1])
    return _look(unit, unit.key(), stores, compiler, time.monotonic(), repair=False)


def _load(unit: Unit, stores: tuple[Store, ...], while_compiling: Callable[[], object] | None) -> Loaded:
    """The steps, in their order."""
    key = unit.key()
    store = stores[-1]
    compiler, missing = compilers.found_for(unit, store)
    look = functools.partial(_look, unit, key, stores, compiler, time.monotonic())
    loaded = look(repair=False)
    if loaded is not None:
        return loaded
    if environment.compiling_is_forbidden():
        raise CompileRefused(_not_in_the_cache(unit, stores))
    if missing is not None:
        raise missing
    if while_compiling is not None:
        workers.background.submit(while_compiling, at_once=True)
    with contextlib.suppress(OSError):  # a store that cannot be written: staging says so
        store.own_folder("locks")
    with lock.building(store.lock_path(unit.name, key), f"{unit.label} for {unit.target()}") as held:
        loaded = look(repair=True)
        if loaded is not None:
            return loaded
        inputs = digest_of_record([compiler, states_of(unit.folders())])
        failure = held.failure(inputs)
        if failure is not None:
            raise errors.told(failure)
        try:
            with progress.building(f"{unit.label} for {unit.target()}", store.usual_seconds(unit.name, unit.backend.name)):
                return _build(unit, store, key, compiler)
        except BuildError as error:
            held.tell_failure(inputs, str(error))
            raise


def _look(
    unit: Unit, key: str, stores: tuple[Store, ...], compiler: str | None, start: float, *, repair: bool
) -> Loaded | None:
    """Load the unit from the first store that has it."""
    for store in stores:
        path = store.find(unit.name, key, unit.roots(), compiler, repair=repair)
        if path is None:
            continue
        try:
            shared_object.preload(unit.libraries())
            return Loaded(shared_object.open_from(store, path), path, time.monotonic() - start, compiled=False)
        except OSError as error:  # built on a newer system; or pruned just now
            if OF_THIS_MOMENT.search(str(error)):
                raise
            if repair:
                store.discard(path.parent, str(error))
    return None


def _build(unit: Unit, store: Store, key: str, compiler: str | None) -> Loaded:
    """Build in a staging folder of the store; if that is full or runs no programs, once more in a temporary one."""
    staging = store.staging()
    try:
        return _build_in(staging, unit, store, key, compiler)
    except (OSError, BuildError) as error:
        from torch_jit_ops.builder import log  # here and below: nobody waits for it while all is well

        inside = store.root in staging.parents
        if isinstance(error, OSError) and NOEXEC.search(str(error)):
            if not inside:
                raise nowhere_to_run(error, store) from error
            store.warn_of_noexec()
            elsewhere = temporary_folder
        elif inside and log.is_disk_full(f"{error}\n{error.__cause__}"):
            elsewhere = functools.partial(store.temporary, "No space left on device")
        else:
            raise
    shutil.rmtree(staging, ignore_errors=True)
    return _build_in(elsewhere(), unit, store, key, compiler)


def _build_in(staging: Path, unit: Unit, store: Store, key: str, compiler: str | None) -> Loaded:
    """Compile and load in the folder, and only then publish."""
    from torch_jit_ops.builder import compile

    start, started_ns = time.monotonic(), time.time_ns()
    try:
        shared_object.preload(unit.libraries())  # PyTorch, too, loads what it has built
        compiled = compile.compile_unit(unit, staging)
        loaded = Loaded(shared_object.open_library(compiled.library), compiled.library, time.monotonic() - start, compiled=True)
        dependencies = compile.files_read(unit, compiled)
        if dependencies is None or any(
            _edited_since(f"{unit.roots()[each.root]}/{each.path}", started_ns) for each in dependencies
        ):
            return loaded  # nobody knows what it was built of, so nobody else gets it
        compile.remove_leftovers(staging)
        facts = {**unit.facts(), "compiler": compiler, "seconds": round(loaded.seconds, 3)}
        return replace(loaded, path=store.publish(staging, unit.name, key, compiled.library, dependencies, facts))
    except BaseException:
        if not (staging / LOG).exists():  # nobody was told of the folder
            shutil.rmtree(staging, ignore_errors=True)
        raise


def _edited_since(path: str, time_ns: int) -> bool:
    try:
        return os.stat(path).st_mtime_ns > time_ns
    except OSError:  # it was not there, and is recorded so
        return False


def _refuse_during_capture(unit: Unit) -> None:
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise CompileRefused(
            f"{unit.label} is not loaded yet, and during the capture of a CUDA graph no kernel can be compiled or loaded\n"
            "  remedy: before the capture, call the op once with such arguments, or torch_jit_ops.build(...) it"
        )


def _not_in_the_cache(unit: Unit, stores: tuple[Store, ...]) -> str:
    namespace, _, name = unit.name.partition(".")
    arch = f" --arch {unit.arch}" if unit.backend.builds_for_others else ""
    command = f"python -m torch_jit_ops build {namespace}::{name} --backend {unit.backend.name}{arch}"
    if not name:
        command = "python -m torch_jit_ops build"  # always builds the dispatcher
    if unit.name.startswith(("module.", "runtime.")):
        command = "run the program once without JITK_NO_COMPILE"
    return (
        f"{unit.label} for {unit.target()} is not in the kernel cache, and JITK_NO_COMPILE=1 forbids to compile it\n"
        f"  looked in {', '.join(str(store.root) for store in stores)}\n"
        f"  remedy: {command}"
    )
