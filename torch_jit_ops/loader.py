"""Compiles variants and loads them: from the store if it can, through ``torch.utils.cpp_extension.load`` if it must.

``load(unit)`` is the whole interface. A hit starts no process and imports no ``cpp_extension``. A miss compiles in a private
staging folder under a name that is used once, loads the result, and publishes it by a rename. ``cpp_extension`` never sees a
folder or a name twice, so its own versioning and locks stay out of play.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shlex
import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from torch_jit_ops import cache, environment, progress, toolchain

ABI_VERSION = 1  # kAbiVersion of include/jitk/abi.h
# -O is for the host code alone, most of which runs once an error occurs; ptxas optimises fully by default.
_CUDA_FLAGS = ("-O1", "-Xcompiler=-fvisibility=hidden")
_CPU_FLAGS = ("-O3", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math")
_STANDARD = "-std=c++17"


class BuildError(RuntimeError):
    """A kernel did not compile. The text holds the compiler's first errors and where its whole log is."""


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
        return (*_CPU_FLAGS, *standard, f"-march={self.arch}", *self.flags)

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


def _data_dir(name: str) -> Path:
    here = Path(__file__).resolve().parent
    for folder in (here / name, here.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"torch_jit_ops is installed without its {name}/ folder; looked in {here} and {here.parent}")


_results: dict[tuple[Unit, Path], Future[Loaded]] = {}
_results_lock = threading.Lock()


def load(unit: Unit, meanwhile: Callable[[], object] | None = None) -> Loaded:
    """Load the unit's library, compiling it if it is nowhere yet. Threads that ask for the same unit share one build.

    Args:
        unit: what to load.
        meanwhile: called in a thread of its own if the unit has to be compiled.

    Raises:
        BuildError: it does not compile. The same error is raised again without compiling again in this process.
        MissingCompiler: it is not in the store, and there is no compiler.
    """
    key = (unit, environment.cache_dir())
    with _results_lock:
        result = _results.get(key)
        mine = result is None
        if result is None:
            result = _results[key] = Future()
    if mine:
        try:
            result.set_result(_load(unit, cache.default_store(), meanwhile))
        except BaseException as error:
            if not isinstance(error, BuildError):
                with _results_lock:
                    del _results[key]  # not the kernel's fault: a later call may succeed
            result.set_exception(error)
    return result.result()


def _load(unit: Unit, store: cache.Store, meanwhile: Callable[[], object] | None) -> Loaded:
    start = time.monotonic()
    key = unit.key()
    compiler, missing = _compiler(unit, store)
    path = store.find(unit.name, key, unit.roots(), compiler)
    if path is None and missing is not None:
        raise missing
    if path is not None:
        return Loaded(_open(path), path, time.monotonic() - start, compiled=False)
    if meanwhile is not None:
        threading.Thread(target=meanwhile, daemon=True).start()
    with _lock(store.lock_path(unit.name, key)):
        path = store.find(unit.name, key, unit.roots(), compiler)
        if path is not None:
            return Loaded(_open(path), path, time.monotonic() - start, compiled=False)
        with progress.building(f"{unit.label} for {'sm_' if unit.backend == 'cuda' else ''}{unit.arch.replace('.', '')}"):
            return _compile(unit, store, key, compiler, start)


_compilers: dict[tuple[object, ...], tuple[str | None, toolchain.MissingCompiler | None]] = {}


def _compiler(unit: Unit, store: cache.Store) -> tuple[str | None, toolchain.MissingCompiler | None]:
    """The identity of the compilers for the unit, or why there are none. Looked for once in a process and environment."""
    key = (unit.backend, store.root, *environment.compiler_choice())
    if key not in _compilers:
        try:
            programs = [toolchain.host_compiler()]
            if unit.backend == "cuda":
                programs.insert(0, toolchain.cuda_toolkit().nvcc)
            with contextlib.suppress(OSError):  # a cache that cannot be written: staging says so
                store.make_root()
            memory = store.root / "compilers"
            identity = " / ".join(toolchain.compiler_identity(program, memory) for program in programs)
            _compilers[key] = identity, None
        except toolchain.MissingCompiler as missing:
            _compilers[key] = None, missing
    return _compilers[key]


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    with contextlib.suppress(AttributeError):  # the runtime itself has no ABI to agree with
        if library.jitk_abi_version() != ABI_VERSION:
            raise RuntimeError(f"{path} has ABI version {library.jitk_abi_version()}, expected {ABI_VERSION}")
    return library


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Saves work, not correctness: without the lock two processes would build the same variant, and one rename would win."""
    import filelock

    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = filelock.FileLock(path)
        lock.acquire()
    except OSError:
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _compile(unit: Unit, store: cache.Store, key: str, compiler: str | None, start: float) -> Loaded:
    environment.put_on_path(toolchain.ninja())
    staging = store.staging()
    name = re.sub(r"\W+", "_", unit.name)
    source = staging / f"{name}.{'cu' if unit.backend == 'cuda' else 'cpp'}"
    source.write_text(unit.text)
    module = f"{name}_{uuid.uuid4().hex[:12]}"
    try:
        log = _run_cpp_extension(unit, staging, source, module)
    except BuildError as error:
        (staging / "build.log").write_text(str(error.__cause__))
        raise
    (staging / "build.log").write_text(log)
    library = staging / f"{module}.so"
    loaded = Loaded(_open(library), library, time.monotonic() - start, compiled=True)
    files = _files_read(staging)
    system = _system_folders(unit)
    dependencies = cache.dependencies_of(
        [file for file in files if file.resolve() != source.resolve()],
        unit.roots(),
        lambda file: any(folder in file.parents for folder in system),
    )
    for leftover in (*staging.glob("*.o"), *staging.glob(".ninja*"), staging / "lock", staging / _LINKS):
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
        "torch": torch.__version__ if unit.torch else None,
        "seconds": round(loaded.seconds, 3),
    }
    return replace(loaded, path=store.publish(staging, unit.name, key, library, dependencies, facts))


def _run_cpp_extension(unit: Unit, staging: Path, source: Path, module: str) -> str:
    from torch.utils import cpp_extension

    include = [*unit.include, include_dir()]
    verbose = environment.verbosity() == 2
    link = ["-Wl,--as-needed"]
    cpp_extension.TORCH_LIB_PATH = shlex.quote(str(Path(torch.__file__).parent / "lib"))  # it goes into commands as it is
    if unit.backend == "cuda":
        toolkit = toolchain.cuda_toolkit()
        # Found at its import, and wrong behind a wrapper script, for wheels, and in a CPU build of PyTorch.
        cpp_extension.CUDA_HOME = _cuda_home(toolkit, staging)
        include += toolkit.include
        link += _cudart_flags(toolkit, staging)
    cuda = unit.backend == "cuda"
    flags = list(unit.compile_flags())
    try:
        cpp_extension.load(
            module,
            [str(source)],
            extra_cflags=[] if cuda else flags,
            extra_cuda_cflags=flags if cuda else [],
            extra_ldflags=link,
            extra_include_paths=[str(folder) for folder in include],
            build_directory=str(staging),
            verbose=verbose,
            with_cuda=cuda,
            is_python_module=False,
        )
    except RuntimeError as error:
        raise BuildError(_distill(unit, str(error), staging)) from error
    return f"built with {' '.join(flags)}\n"


def _cuda_home(toolkit: toolchain.Toolkit, staging: Path) -> str:
    """A path that needs no quotes, since it gets none: a link, seen from the folder in which ninja runs the commands."""
    home = str(toolkit.home)
    if shlex.quote(home) == home:
        return home
    _link(staging, "toolkit", toolkit.home)
    return f"{_LINKS}/toolkit"


def _cudart_flags(toolkit: toolchain.Toolkit, staging: Path) -> list[str]:
    """Toolkits from wheels bring libcudart.so.13 alone; the linker asks for libcudart.so."""
    folder = toolkit.libraries
    if not (folder / "libcudart.so").exists():
        folder = _link(staging, "libcudart.so", sorted(folder.glob("libcudart.so.*"))[0])
    return [shlex.quote(f"-L{folder}")]


_LINKS = "links"


def _link(staging: Path, name: str, target: Path) -> Path:
    """The folder with a link of that name. It goes after the build."""
    folder = staging / _LINKS
    folder.mkdir(exist_ok=True)
    (folder / name).symlink_to(target)
    return folder


def _files_read(staging: Path) -> list[Path]:
    """The depfile, which ninja keeps in a database of its own."""
    said = subprocess.run(["ninja", "-t", "deps"], cwd=staging, capture_output=True, text=True, check=True).stdout
    return [staging / line.strip() for line in said.splitlines() if line.startswith(" ")]


def _system_folders(unit: Unit) -> list[Path]:
    """Headers in here are known by the compiler's, or PyTorch's, version."""
    folders = [Path("/usr"), Path(torch.__file__).resolve().parent]
    if unit.backend == "cuda":
        toolkit = toolchain.cuda_toolkit()
        folders += [folder.resolve() for folder in (toolkit.home, *toolkit.include)]
    return folders


_ERROR_LINE = re.compile(
    r"^(?P<file>[^\s:(][^:(]*)(?:\((?P<nv>\d+)\)|:(?P<gcc>\d+)(?::\d+)?): (?:fatal |catastrophic )?error:? ?(?P<text>.*)$"
)


def _distill(unit: Unit, log: str, staging: Path) -> str:
    """The first errors of a compiler's log, with the text of the full log kept beside."""
    roots = sorted(
        ((str(folder.resolve()) + os.sep, folder.name) for folder in (*unit.include, include_dir())),
        key=lambda pair: -len(pair[0]),
    )
    errors: list[str] = []
    for line in log.splitlines():
        found = _ERROR_LINE.match(line.strip())
        if found is None:
            continue
        file = found["file"]
        for prefix, short in roots:
            if file.startswith(prefix):
                file = f"{short}/{file.removeprefix(prefix)}"
        text = f"{Path(file).name if file.startswith('/') else file}:{found['nv'] or found['gcc']}: {found['text']}"
        if text not in errors:
            errors.append(text)
    if not errors:
        errors = [line for line in log.splitlines() if line.strip()][-5:]
    target = f"sm_{unit.arch.replace('.', '')}" if unit.backend == "cuda" else unit.arch
    shown = "\n".join(f"  {line}" for line in errors[:3])
    return f"{unit.label} did not compile ({unit.backend}, {target})\n{shown}\n  full log: {staging / 'build.log'}"
