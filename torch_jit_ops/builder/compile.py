"""Runs ``torch.utils.cpp_extension`` on one unit, in a staging folder that nobody else knows, under a name that is used once.

So ``cpp_extension`` never sees a folder or a name twice, and its own versioning and locks stay out of play.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sysconfig
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from torch_jit_ops import environment, forks
from torch_jit_ops.backends import programs
from torch_jit_ops.backends.backend import Toolkit
from torch_jit_ops.builder import log, workarounds
from torch_jit_ops.builder.errors import BuildError, BuildInterrupted, UnknownGpu
from torch_jit_ops.builder.shared_object import NOEXEC, OF_THIS_MOMENT
from torch_jit_ops.builder.unit import Unit, file_name, inlined_in
from torch_jit_ops.store import files
from torch_jit_ops.store.dependencies import Dependency, dependencies_of

_EXPORTS = "#include <jitk/export.h>"
_INTERRUPTED = "ninja: build stopped: interrupted by user"


@dataclass(frozen=True)
class Compiled:
    """What a compiler made: the library, from which sources, in which staging folder."""

    staging: Path
    sources: tuple[Path, ...]
    library: Path


def compile_unit(unit: Unit, staging: Path) -> Compiled:
    """Compile the unit in the folder ``staging``.

    Raises:
        BuildError: it does not compile. The compiler's log is in the folder, unless the disk is full.
        BuildInterrupted: Ctrl-C reached the compilers.
        OSError: of the machine, not of the kernel.
    """
    environment.put_on_path(programs.ninja())
    names = (unit.name, *(f"{unit.name}_beside{index}" for index in range(len(unit.beside))))
    sources = tuple(staging / file_name(name, unit.backend) for name in names)
    for source, text in zip(sources, (unit.text, *unit.beside), strict=True):
        source.write_bytes(os.fsencode(text))
    module = f"{sources[0].stem}_{uuid.uuid4().hex[:12]}"
    _run_cpp_extension(unit, staging, sources, module)
    return Compiled(staging, sources, staging / f"{module}.so")


def files_read(unit: Unit, compiled: Compiled) -> list[Dependency] | None:
    """The files that compilers and linker read, but the sources and what a version covers; None if they are not known."""
    read = {file.resolve() for file in _depfile(compiled.staging)}
    sources = {source.resolve() for source in compiled.sources}
    if not sources <= read:
        return None  # ninja could not write its database, and so a change of a header would go unnoticed
    files = sorted((read - sources) | {archive.resolve() for archive in _archives(unit.link_flags())})
    system = _system_folders(unit)
    try:
        return dependencies_of(files, unit.roots(), lambda file: any(folder in file.parents for folder in system))
    except OSError:
        return None  # a file went meanwhile, and so did the knowledge of what was built


def _archives(flags: Sequence[str]) -> Iterator[Path]:
    """The files that go into the library as they are: objects, and static libraries by path or by ``-L`` and ``-l``."""
    folders = [Path(flag.removeprefix("-L")) for flag in flags if flag.startswith("-L")]
    for flag in flags:
        name = flag.removeprefix("-l")
        places = [folder / f"lib{name}.a" for folder in folders] + [folder / name.removeprefix(":") for folder in folders]
        for place in [Path(flag)] if flag.startswith("/") else places if flag.startswith("-l") else []:
            if place.suffix in (".a", ".o") and place.is_file():
                yield place


def remove_leftovers(staging: Path) -> None:
    """Leave in the folder what the store keeps."""
    for leftover in (*staging.glob("*.o"), *staging.glob(".ninja*"), staging / "lock", staging / workarounds.LINKS):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _run_cpp_extension(unit: Unit, staging: Path, sources: Sequence[Path], module: str) -> None:
    with forks.held_off():
        from torch.utils import cpp_extension
    vars(cpp_extension)["subprocess"] = forks.subprocess

    include = [*unit.folders()]
    verbose = environment.verbosity() == 2
    # What a module leaves undefined, Python has: it is not linked with Python's own library, which need not be there.
    link = ["-Wl,--as-needed", *([] if unit.python else ["-Wl,-z,defs"])]
    if unit.torch:
        # The dispatcher needs it for a weak symbol alone (csrc/runtime/call.h), for which the linker keeps no library.
        link = ["-Wl,--no-as-needed", "-lc10", *link]
    # It goes into commands as it is.
    cpp_extension.TORCH_LIB_PATH = workarounds.quoted([shlex.quote(str(Path(torch.__file__).parent / "lib"))])[0]
    if _EXPORTS in unit.text:
        link += unit.backend.exports_link_flags
    toolkit = unit.backend.toolkit()
    if toolkit is not None:
        # Found at its import, and wrong behind a wrapper script, for wheels, and in a CPU build of PyTorch.
        cpp_extension.CUDA_HOME = _cuda_home(toolkit, staging)
        include += toolkit.include
        link += _cudart_flags(toolkit, staging)
    flags = workarounds.quoted(unit.compile_flags())
    command = programs.host_words()
    try:
        with workarounds.started_by(command, staging):
            cpp_extension.load(
                module,
                [str(source) for source in sources],
                extra_cflags=flags if toolkit is None else [],
                extra_cuda_cflags=[] if toolkit is None else flags,
                extra_ldflags=[*link, *workarounds.quoted(shlex.quote(flag) for flag in unit.link_flags())],
                extra_include_paths=[str(folder) for folder in workarounds.plain_folders(staging, include)],
                build_directory=str(staging),
                verbose=verbose,
                with_cuda=toolkit is not None,
                is_python_module=False,
            )
    except (RuntimeError, OSError, UnicodeDecodeError) as error:  # the last of what a compiler wrote
        if isinstance(error, OSError):
            reason = str(error.__cause__ or error)  # PyTorch says of dlopen's errors no more than that there was one
            if error.errno is not None or NOEXEC.search(reason) or OF_THIS_MOMENT.search(reason):
                raise (
                    OSError(reason) if error.errno is None else error
                ) from error.__cause__  # of the machine, not of the kernel
        if _INTERRUPTED in str(error):
            raise BuildInterrupted(f"{unit.label}: the build was interrupted; the next call builds it again") from None
        raise _failure(unit, error, staging) from error


def _failure(unit: Unit, error: Exception, staging: Path) -> BuildError:
    """The error to raise; and the compiler's log, if it shall be kept, in a file beside the source."""
    text = log.text_of(error)
    gpu, toolkit = log.unknown_gpu(text), unit.backend.toolkit()
    if gpu is not None and toolkit is not None:
        return UnknownGpu(
            f"{toolkit.nvcc} does not know {gpu}, so CUDA kernels cannot be built for this GPU\n"
            "  remedy: install a newer CUDA toolkit and set CUDA_HOME to its folder"
        )
    file = log.keep(text, staging)
    names = workarounds.named(staging, unit.folders())
    where = f"{unit.backend.name}, {unit.target()}"
    inlined = dict(inlined_in("".join((unit.text, *unit.beside))))
    return BuildError(log.distill(text, unit.label, where, names, file, loading=isinstance(error, OSError), inlined=inlined))


def _cuda_home(toolkit: Toolkit, staging: Path) -> str:
    """A path that needs no quotes, since it gets none: a link, seen from the folder in which ninja runs the commands."""
    if files.is_plain(toolkit.home):
        return str(toolkit.home)
    workarounds.link(staging, "toolkit", toolkit.home)
    return f"{workarounds.LINKS}/toolkit"


def _cudart_flags(toolkit: Toolkit, staging: Path) -> list[str]:
    """Toolkits from wheels bring libcudart.so.13 alone; the linker asks for libcudart.so."""
    folder = toolkit.libraries
    if not (folder / "libcudart.so").exists():
        folder = workarounds.link(staging, "libcudart.so", sorted(folder.glob("libcudart.so.*"))[0]).parent
    return workarounds.quoted([shlex.quote(f"-L{folder}")])


def _depfile(staging: Path) -> list[Path]:
    """The depfile, which ninja keeps in a database of its own."""
    said = os.fsdecode(forks.subprocess.run(["ninja", "-t", "deps"], cwd=staging, capture_output=True, check=True).stdout)
    return [staging / line.strip() for line in said.split("\n") if line.startswith(" ")]


def _system_folders(unit: Unit) -> list[Path]:
    """Headers in here are known by the compiler's, PyTorch's or Python's version."""
    folders = [Path("/usr"), Path(torch.__file__).resolve().parent]
    if unit.python:
        folders.append(Path(sysconfig.get_path("include")).resolve())
    toolkit = unit.backend.toolkit()
    if toolkit is not None:
        folders += [folder.resolve() for folder in (toolkit.home, *toolkit.include)]
    return folders
