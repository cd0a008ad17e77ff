"""Compiles variants and loads them: from the store if it can, through ``torch.utils.cpp_extension.load`` if it must.

``load(unit)`` is the whole interface. A hit starts no process and imports no ``cpp_extension``. A miss compiles in a private
staging folder under a name that is used once, loads the result, and publishes it by a rename. ``cpp_extension`` never sees a
folder or a name twice, so its own versioning and locks stay out of play.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import shlex
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from torch_jit_ops import environment, forks, progress, statistics
from torch_jit_ops.backends import toolchain
from torch_jit_ops.builder import driver
from torch_jit_ops.store import cache, lock, trust

ABI_VERSION = 1  # kAbiVersion of include/jitk/abi.h
# -O is for the host code alone, most of which runs once an error occurs; ptxas optimises fully by default.
_CUDA_FLAGS = ("-O1", "-Xcompiler=-fvisibility=hidden")
_CPU_FLAGS = ("-O3", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math")
_STANDARD = "-std=c++17"
_EXPORTS = "#include <jitk/export.h>"
_INTERRUPTED = "ninja: build stopped: interrupted by user"


class BuildError(RuntimeError):
    """A kernel did not compile. The text holds the compiler's first errors and where its whole log is."""


class UnknownGpu(BuildError, toolchain.MissingCompiler):
    """nvcc does not know the GPU: no kernel will compile for it, and an op runs its reference as without a compiler."""


class BuildInterrupted(RuntimeError):
    """Ctrl-C reached the compilers of a thread, as they share the program's terminal. A later call builds again."""


class CompileRefused(RuntimeError):
    """A kernel is not there, and must not be compiled or loaded now. The text says what to do before."""


@dataclass(frozen=True)
class Unit:
    """One translation unit to compile: everything that decides what comes out, but the contents of the files.

    Attributes:
        name: what is built, for folders, progress and errors: ``jitk.silu_and_mul``.
        label: the same for people: ``jitk::silu_and_mul<bf16_t>``.
        backend: ``"cuda"`` or ``"cpu"``.
        arch: ``"9.0a"`` for CUDA, an x86-64 level for CPU.
        text: the translation unit.
        include: folders to search, in this order, before the headers of this package.
        flags: further flags of nvcc or the C++ compiler.
        torch: whether the unit includes PyTorch's headers, and so depends on its version.
    """

    name: str
    label: str
    backend: str
    arch: str
    text: str
    include: tuple[Path, ...] = ()
    flags: tuple[str, ...] = ()
    torch: bool = False

    def roots(self) -> dict[str, Path]:
        """The folders by whose names files are recorded."""
        roots = {f"include{index}": folder for index, folder in enumerate(self.include)}
        return {**roots, "jitk": include_dir(), "system": Path("/")}

    def compile_flags(self) -> tuple[str, ...]:
        """The flags that decide the machine code; no paths."""
        standard = () if any(flag.startswith("-std=") for flag in self.flags) else (_STANDARD,)
        if self.backend == "cuda":
            target = (toolchain.gencode(self.arch), f"-DJITK_CUDA_ARCH={toolchain.arch_number(self.arch)}")
            return (*_CUDA_FLAGS, *standard, *target, *self.flags)
        return (*_CPU_FLAGS, *standard, toolchain.march(self.arch), *self.flags)

    def target(self) -> str:
        """What it is compiled for, for people: ``sm_90a``."""
        return f"sm_{self.arch.replace('.', '')}" if self.backend == "cuda" else self.arch

    def key(self) -> str:
        """Digest of all that is known before compiling."""
        versions = [ABI_VERSION, torch.__version__ if self.torch else None]
        return cache.digest_of_record([self.backend, self.text, self.compile_flags(), versions])


@dataclass(frozen=True)
class Loaded:
    """A library in this process."""

    library: ctypes.CDLL
    path: Path
    seconds: float
    compiled: bool

    def entry(self, name: str) -> int:
        """The address of the exported function ``name``."""
        return int(ctypes.cast(getattr(self.library, f"jitk_entry_{name}"), ctypes.c_void_p).value or 0)

    def load_kernels(self, device_index: int) -> int:
        """Have CUDA load the library's kernels on the device now, not on their first launch. Returns how many there are."""
        with contextlib.suppress(AttributeError, UnicodeDecodeError):  # a library without exports, such as doctor's
            return int(self.library.jitk_load_kernels(device_index))
        return 0

    def signature(self, name: str) -> str:
        """The C++ signature of the exported function, as export.h writes it."""
        function = getattr(self.library, f"jitk_signature_{name}")
        function.restype = ctypes.c_char_p
        return str(function().decode())


def include_dir() -> Path:
    """The folder of the headers, to be searched for ``<jitk/...>``: in a checkout, an editable install or a wheel."""
    return _data_dir("include")


def csrc_dir() -> Path:
    """The folder of the built-in kernels' sources."""
    return _data_dir("csrc")


@functools.cache
def _data_dir(name: str) -> Path:
    here = Path(__file__).resolve().parent.parent
    for folder in (here / name, here.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"torch_jit_ops is installed without its {name}/ folder; looked in {here} and {here.parent}")


_results: dict[tuple[Unit, tuple[Path, ...]], Future[Loaded]] = {}
_builders: dict[Future[Loaded], int] = {}  # the threads
_results_lock = forks.Lock()


def _forget_in_child() -> None:
    """A build of the parent's threads does not end here."""
    for key in [key for key, result in _results.items() if not result.done()]:
        del _results[key]


forks.in_child(_forget_in_child)


def load(unit: Unit, meanwhile: Callable[[], object] | None = None) -> Loaded:
    """Load the unit's library, compiling it if it is nowhere yet. Threads that ask for the same unit share one build.

    Args:
        unit: what to load.
        meanwhile: called in a thread of its own if the unit has to be compiled.

    Raises:
        BuildError: it does not compile. The same error is raised again without compiling again in this process.
        MissingCompiler: it is not in the store, and there is no compiler.
        CompileRefused: it is not in the store, and JITK_NO_COMPILE=1; or a CUDA graph is being captured.
        UntrustedCache: others could have written the kernel.
        Reentered: this thread is in the middle of it, and called from a signal handler.
    """
    stores = cache.stores()
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
            loaded = _load(unit, stores, meanwhile)
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
    error = result.exception()
    if isinstance(error, BuildInterrupted) and not mine:
        return load(unit, meanwhile)
    if error is not None:
        raise error.with_traceback(None)  # which would grow with every call
    return result.result()


def find(unit: Unit) -> Loaded | None:
    """Load the unit's library if it is in a store; None if it would have to be compiled."""
    stores = cache.stores()
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return None
    compiler = compiler_of(unit, stores[-1])
    return _look_up(unit, unit.key(), stores, compiler, time.monotonic(), repair=False)


def _load(unit: Unit, stores: tuple[cache.Store, ...], meanwhile: Callable[[], object] | None) -> Loaded:
    key = unit.key()
    store = stores[-1]
    compiler, missing = _compiler(unit, store)
    look_up = functools.partial(_look_up, unit, key, stores, compiler, time.monotonic())
    loaded = look_up(repair=False)
    if loaded is not None:
        return loaded
    if environment.compiling_is_forbidden():
        raise CompileRefused(_not_in_the_cache(unit, stores))
    if missing is not None:
        raise missing
    if meanwhile is not None:
        threading.Thread(target=meanwhile, daemon=True).start()
    with contextlib.suppress(OSError):  # a store that cannot be written: staging says so
        store.own_folder("locks")
    with lock.building(store.lock_path(unit.name, key), f"{unit.label} for {unit.target()}") as held:
        loaded = look_up(repair=True)
        if loaded is not None:
            return loaded
        inputs = cache.digest_of_record([compiler, cache.states_of((*unit.include, include_dir()))])
        failure = held.failure(inputs)
        if failure is not None:
            raise _build_error(failure)
        try:
            with progress.building(f"{unit.label} for {unit.target()}", store.usual_seconds(unit.name, unit.backend)):
                return _build(unit, store, key, compiler)
        except BuildError as error:
            held.tell_failure(inputs, str(error))
            raise


def _look_up(
    unit: Unit, key: str, stores: tuple[cache.Store, ...], compiler: str | None, start: float, *, repair: bool
) -> Loaded | None:
    """Load the unit from the first store that has it."""
    for store in stores:
        path = store.find(unit.name, key, unit.roots(), compiler, repair=repair)
        if path is None:
            continue
        try:
            return Loaded(_open_from(store, path), path, time.monotonic() - start, compiled=False)
        except OSError as error:  # built on a newer system; or pruned just now
            if _OF_THIS_MOMENT.search(str(error)):
                raise
            if repair:
                store.discard(path.parent, str(error))
    return None


# What dlopen says of whole libraries: the file system is mounted noexec; the process has no room.
_NOEXEC = re.compile(r"failed to map segment from shared object(?!.*(?:allocate|memory))")
_OF_THIS_MOMENT = re.compile(r"Cannot allocate memory|Too many open files")


def _open_from(store: cache.Store, path: Path) -> ctypes.CDLL:
    """Open a library of a store, or a temporary copy of it where the system runs no programs from the store."""
    try:
        return _open(path)
    except OSError as error:
        if _NOEXEC.search(str(error)) is None:
            raise
    store.warn_of_noexec()
    copy = cache.temporary_folder() / path.name
    shutil.copyfile(path, copy)
    try:
        return _open(copy)
    except OSError as error:
        raise _nowhere_to_run(error, store) from error


def _nowhere_to_run(error: OSError, store: cache.Store) -> Exception:
    """The error to raise for one of a library in a temporary folder."""
    if _NOEXEC.search(str(error)) is None:
        return error
    return RuntimeError(
        f"kernels can be run neither from the kernel cache {store.root} nor from the folder for temporary files "
        f"{tempfile.gettempdir()}: both are on file systems from which no program can be run (noexec)\n"
        "  remedy: set JITK_CACHE_DIR or TMPDIR to a folder elsewhere"
    )


def _refuse_during_capture(unit: Unit) -> None:
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise CompileRefused(
            f"{unit.label} is not loaded yet, and during the capture of a CUDA graph no kernel can be compiled or loaded\n"
            "  remedy: before the capture, call the op once with such arguments, or torch_jit_ops.build(...) it"
        )


def _not_in_the_cache(unit: Unit, stores: tuple[cache.Store, ...]) -> str:
    namespace, _, name = unit.name.partition(".")
    arch = f" --arch {unit.arch}" if unit.backend == "cuda" else ""
    command = f"python -m torch_jit_ops build {namespace}::{name} --backend {unit.backend}{arch}"
    if not name:
        command = "python -m torch_jit_ops build"  # always builds the dispatcher
    if unit.name.startswith(("module.", "runtime.")):
        command = "run the program once without JITK_NO_COMPILE"
    return (
        f"{unit.label} for {unit.target()} is not in the kernel cache, and JITK_NO_COMPILE=1 forbids to compile it\n"
        f"  looked in {', '.join(str(store.root) for store in stores)}\n"
        f"  remedy: {command}"
    )


def compiler_of(unit: Unit, store: cache.Store) -> str | None:
    """The identity of the compilers that would build the unit; None if they are missing."""
    return _compiler(unit, store)[0]


_compilers: dict[tuple[object, ...], tuple[str | None, toolchain.MissingCompiler | None]] = {}


def _compiler(unit: Unit, store: cache.Store) -> tuple[str | None, toolchain.MissingCompiler | None]:
    """The identity of the compilers for the unit, or why there are none. Looked for once in a process and environment."""
    key = (unit.backend, store.root, *environment.compiler_choice(unit.backend))
    if key not in _compilers:
        try:
            commands = [toolchain.host_command()]
            if unit.backend == "cuda":
                commands.insert(0, (str(toolchain.cuda_toolkit().nvcc),))
            try:
                memory = store.own_folder("compilers")
            except (OSError, trust.UntrustedCache):  # who reads or writes a kernel there says so
                memory = Path(os.devnull)
            _compilers[key] = " / ".join(_identity(unit.backend, commands, memory)), None
        except toolchain.MissingCompiler as missing:
            _compilers[key] = None, missing
    return _compilers[key]


def _identity(backend: str, commands: Iterable[tuple[str, ...]], memory: Path) -> Iterator[str]:
    """The compilers' versions, and what else of the machine changes what they make."""
    for command in commands:
        yield toolchain.compiler_identity(command, memory)
        scripts = toolchain.scripts_behind(command)
        if scripts is not None:
            yield f"started by scripts {scripts}"
        if len(command) > 1:
            yield f"as {shlex.join(command)}"
    yield from (f"{name}={value}" for name, value in environment.compiler_settings(backend).items())


def _open(path: Path) -> ctypes.CDLL:
    with forks.held_off():
        library = ctypes.CDLL(str(path))
    # The runtime itself has no ABI to agree with. The system says so with the path, which Python may not be able to read.
    with contextlib.suppress(AttributeError, UnicodeDecodeError):
        if library.jitk_abi_version() != ABI_VERSION:
            raise OSError(f"{path} has ABI version {library.jitk_abi_version()}, expected {ABI_VERSION}")
    return library


def _build(unit: Unit, store: cache.Store, key: str, compiler: str | None) -> Loaded:
    environment.put_on_path(toolchain.ninja())
    staging = store.staging()
    try:
        return _compile(unit, store, staging, key, compiler)
    except (OSError, BuildError) as error:
        from torch_jit_ops.builder import remedy

        inside = store.root in staging.parents
        if isinstance(error, OSError) and _NOEXEC.search(str(error)):
            if not inside:
                raise _nowhere_to_run(error, store) from error
            store.warn_of_noexec()
            elsewhere = cache.temporary_folder
        elif inside and remedy.is_disk_full(f"{error}\n{error.__cause__}"):
            elsewhere = functools.partial(store.temporary, "No space left on device")
        else:
            raise
    shutil.rmtree(staging, ignore_errors=True)
    return _compile(unit, store, elsewhere(), key, compiler)


def _compile(unit: Unit, store: cache.Store, staging: Path, key: str, compiler: str | None) -> Loaded:
    try:
        return _compile_in(unit, store, staging, key, compiler)
    except BaseException:
        if not (staging / cache.LOG).exists():  # nobody was told of the folder
            shutil.rmtree(staging, ignore_errors=True)
        raise


def _compile_in(unit: Unit, store: cache.Store, staging: Path, key: str, compiler: str | None) -> Loaded:
    start = time.monotonic()
    name = re.sub(r"\W+", "_", unit.name, flags=re.ASCII)
    source = staging / f"{name}.{'cu' if unit.backend == 'cuda' else 'cpp'}"
    source.write_bytes(os.fsencode(unit.text))
    module = f"{name}_{uuid.uuid4().hex[:12]}"
    _run_cpp_extension(unit, staging, source, module)
    library = staging / f"{module}.so"
    loaded = Loaded(_open(library), library, time.monotonic() - start, compiled=True)
    files = [file.resolve() for file in _files_read(staging)]
    if source.resolve() not in files:
        return loaded  # ninja could not write its database, and so a change of a header would go unnoticed
    files.remove(source.resolve())
    system = _system_folders(unit)
    try:
        dependencies = cache.dependencies_of(files, unit.roots(), lambda file: any(folder in file.parents for folder in system))
    except OSError:
        return loaded  # a file went meanwhile, and so did the knowledge of what was built
    for leftover in (*staging.glob("*.o"), *staging.glob(".ninja*"), staging / "lock", staging / driver.LINKS):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    facts = {
        "name": unit.name,
        "label": unit.label,
        "backend": unit.backend,
        "arch": unit.arch,
        "flags": unit.compile_flags(),
        "compiler": compiler,
        "abi": ABI_VERSION,
        "torch": torch.__version__ if unit.torch else None,
        "seconds": round(loaded.seconds, 3),
    }
    return replace(loaded, path=store.publish(staging, unit.name, key, library, dependencies, facts))


def _run_cpp_extension(unit: Unit, staging: Path, source: Path, module: str) -> None:
    with forks.held_off():
        from torch.utils import cpp_extension
    cpp_extension.subprocess = forks.subprocess

    include = [*unit.include, include_dir()]
    verbose = environment.verbosity() == 2
    link = ["-Wl,--as-needed", "-Wl,-z,defs"]
    # It goes into commands as it is.
    cpp_extension.TORCH_LIB_PATH = driver.quoted([shlex.quote(str(Path(torch.__file__).parent / "lib"))])[0]
    if unit.backend == "cuda":
        toolkit = toolchain.cuda_toolkit()
        # Found at its import, and wrong behind a wrapper script, for wheels, and in a CPU build of PyTorch.
        cpp_extension.CUDA_HOME = _cuda_home(toolkit, staging)
        include += toolkit.include
        if _EXPORTS in unit.text:
            link.append("-Wl,--wrap=__cudaRegisterFunction")  # what that header does with it stands there
        link += _cudart_flags(toolkit, staging)
    cuda = unit.backend == "cuda"
    flags = driver.quoted(unit.compile_flags())
    command = toolchain.host_words()
    try:
        with driver.started_by(command, staging):
            cpp_extension.load(
                module,
                [str(source)],
                extra_cflags=[] if cuda else flags,
                extra_cuda_cflags=flags if cuda else [],
                extra_ldflags=link,
                extra_include_paths=[str(folder) for folder in driver.plain_folders(staging, include)],
                build_directory=str(staging),
                verbose=verbose,
                with_cuda=cuda,
                is_python_module=False,
            )
    except (RuntimeError, OSError, UnicodeDecodeError) as error:  # the last of what a compiler wrote
        if isinstance(error, OSError):
            reason = str(error.__cause__ or error)  # PyTorch says of dlopen's errors no more than that there was one
            if error.errno is not None or _NOEXEC.search(reason) or _OF_THIS_MOMENT.search(reason):
                raise (
                    OSError(reason) if error.errno is None else error
                ) from error.__cause__  # of the machine, not of the kernel
        if _INTERRUPTED in str(error):
            raise BuildInterrupted(f"{unit.label}: the build was interrupted; the next call builds it again") from None
        raise _failure(unit, error, staging) from error


def _failure(unit: Unit, error: Exception, staging: Path) -> BuildError:
    """The error to raise, and its log, if it shall be kept, beside the source."""
    from torch_jit_ops.builder import remedy  # here and above: nobody waits for it while all is well

    log = str(error.__cause__ or error) if isinstance(error, OSError) else str(error)
    if isinstance(error, UnicodeDecodeError):
        log = error.object.decode(errors="replace")
    log = log if log.strip() else repr(error)
    gpu = remedy.unknown_gpu(log)
    if gpu is not None:
        nvcc = toolchain.cuda_toolkit().nvcc
        return UnknownGpu(
            f"{nvcc} does not know {gpu}, so CUDA kernels cannot be built for this GPU\n"
            "  remedy: install a newer CUDA toolkit and set CUDA_HOME to its folder"
        )
    with contextlib.suppress(OSError):
        (staging / cache.LOG).write_text(log, errors="replace")
    return BuildError(_distill(unit, log, staging, loading=isinstance(error, OSError)))


def _build_error(text: str) -> BuildError:
    """The error of another process, from its text."""
    return UnknownGpu(text) if " does not know compute_" in text.partition("\n")[0] else BuildError(text)


def _cuda_home(toolkit: toolchain.Toolkit, staging: Path) -> str:
    """A path that needs no quotes, since it gets none: a link, seen from the folder in which ninja runs the commands."""
    if driver.is_plain(toolkit.home):
        return str(toolkit.home)
    driver.link(staging, "toolkit", toolkit.home)
    return f"{driver.LINKS}/toolkit"


def _cudart_flags(toolkit: toolchain.Toolkit, staging: Path) -> list[str]:
    """Toolkits from wheels bring libcudart.so.13 alone; the linker asks for libcudart.so."""
    folder = toolkit.libraries
    if not (folder / "libcudart.so").exists():
        folder = driver.link(staging, "libcudart.so", sorted(folder.glob("libcudart.so.*"))[0]).parent
    return driver.quoted([shlex.quote(f"-L{folder}")])


def _files_read(staging: Path) -> list[Path]:
    """The depfile, which ninja keeps in a database of its own."""
    said = os.fsdecode(forks.subprocess.run(["ninja", "-t", "deps"], cwd=staging, capture_output=True, check=True).stdout)
    return [staging / line.strip() for line in said.split("\n") if line.startswith(" ")]


def _system_folders(unit: Unit) -> list[Path]:
    """Headers in here are known by the compiler's, or PyTorch's, version."""
    folders = [Path("/usr"), Path(torch.__file__).resolve().parent]
    if unit.backend == "cuda":
        toolkit = toolchain.cuda_toolkit()
        folders += [folder.resolve() for folder in (toolkit.home, *toolkit.include)]
    return folders


def _distill(unit: Unit, log: str, staging: Path, *, loading: bool) -> str:
    """The first errors of a compiler's log, where the whole log is, and what to do about it if that is known."""
    from torch_jit_ops.builder import remedy

    errors = remedy.first_errors(log, driver.named(staging, (*unit.include, include_dir())))
    undefined = remedy.undefined_symbols(log)
    known = remedy.remedy_for(log)
    failed = "cannot be loaded" if loading else "did not link" if undefined else "did not compile"
    return "\n  ".join(
        (
            f"{unit.label} {failed} ({unit.backend}, {unit.target()})",
            *(undefined or errors),
            f"full log: {staging / cache.LOG}",
            *([f"remedy: {known}"] if known else []),
        )
    )
