"""Finds the compilers, and says what is missing and how to get it.

Nothing here starts a process while a cached kernel is loaded: identities of compilers are remembered in the cache, beside the
size and time stamp of the program that was asked.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from torch_jit_ops import environment
from torch_jit_ops.forks import subprocess
from torch_jit_ops.store import forms, trust

CPU_ARCH = r"x86-64(-v[2-4])?"
_USUAL_HOME = Path("/usr/local/cuda")
_HEADERS = ("cuda_runtime.h", "crt/host_config.h", "nv/target")  # one of each part of a toolkit that a kernel reads


class MissingCompiler(RuntimeError):
    """No compiler for a backend on this machine. The text says what was looked for and how to get it."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit, whose parts may lie apart, as those of wheels do.

    Attributes:
        home: what CUDA_HOME should be.
        nvcc: the compiler, in ``home``.
        include: folders of headers outside of ``home/include``, which nvcc does not search by itself.
        libraries: the folder that holds libcudart.
        found_by: where the search met it.
    """

    home: Path
    nvcc: Path
    include: tuple[Path, ...]
    libraries: Path
    found_by: str


@functools.cache
def cuda_toolkit() -> Toolkit:
    """The toolkit: CUDA_HOME, then ``nvcc`` on PATH, then toolkits from wheels, then /usr/local/cuda.

    Raises:
        MissingCompiler: there is none whose CUDA is the one that PyTorch is built with, as far as the major version goes.
    """
    tried = []
    for parts, found_by in _candidates():
        found = _inspect(parts, found_by)
        if isinstance(found, Toolkit):
            return found
        tried.append(f"    {parts[0]} ({found_by}): {found}\n")
    if (_torch_cuda() or 13) >= 13:
        remedy = "pip install 'torch_jit_ops[nvcc]', or install the CUDA toolkit and set CUDA_HOME to its folder"
    else:
        remedy = (
            f"install CUDA toolkit {torch.version.cuda} and set CUDA_HOME to its folder (wheels hold an nvcc from CUDA 13 on)"
        )
    raise MissingCompiler(
        f"no CUDA compiler (nvcc) was found, so CUDA kernels cannot be built\n  looked in:\n{''.join(tried)}  remedy: {remedy}"
    )


def _inspect(parts: tuple[Path, ...], found_by: str) -> Toolkit | str:
    """The toolkit whose nvcc is in ``parts[0]`` and whose other parts are in any of them; or what it lacks."""
    home = parts[0]
    nvcc = home / "bin" / "nvcc"
    if not os.access(nvcc, os.X_OK):
        return "no bin/nvcc"
    folders = [part / folder for part in parts for folder in ("include", "include/cccl")]
    holders = {header: next((folder for folder in folders if (folder / header).exists()), None) for header in _HEADERS}
    if holders["cuda_runtime.h"] is None:
        return "no include/cuda_runtime.h"
    libraries = next((found for part in parts if (found := _cudart_dir(part)) is not None), None)
    if libraries is None:
        return "no libcudart"
    version, wanted = _cudart_version(libraries), _torch_cuda()
    if None not in (version, wanted) and version != wanted:
        return f"it is CUDA {version}, but PyTorch is built with CUDA {torch.version.cuda}"
    # Of headers that are there twice, those beside nvcc are of its version.
    include = dict.fromkeys(folder for folder in holders.values() if folder not in (None, *folders[:2]))
    return Toolkit(home, nvcc, tuple(include), libraries, found_by)


def _candidates() -> Iterator[tuple[tuple[Path, ...], str]]:
    """Folders in which the parts of one toolkit may be, nvcc in the first, and how they were found."""
    chosen = environment.cuda_home()
    if chosen is not None:
        yield _with_target(chosen), "CUDA_HOME"
    on_path = shutil.which("nvcc")
    if on_path is not None:
        for home in _homes_behind(Path(on_path)):
            yield _with_target(home), "nvcc on PATH"
    # A virtual environment on top of another holds only those wheels of a toolkit that the other lacks.
    sites = [Path(entry, "nvidia") for entry in dict.fromkeys(sys.path)]
    for name in sorted({folder.name for site in sites for folder in site.glob("cu[0-9]*")}, reverse=True):
        parts = [site / name for site in sites if (site / name).is_dir()]
        for home in parts:
            yield (home, *(part for part in parts if part != home)), "wheels"
    for site in sites:  # CUDA 12: a folder for each wheel. Those of PyPI hold ptxas and no nvcc (12.4 and 12.9 looked at)
        if (site / "cuda_nvcc").is_dir():
            yield (site / "cuda_nvcc", site / "cuda_runtime", site / "cuda_cccl"), "wheels"
    yield _with_target(_USUAL_HOME), "the usual folder"


def _with_target(home: Path) -> tuple[Path, ...]:
    return home, home / "targets" / "x86_64-linux"  # where conda puts headers


def _homes_behind(nvcc: Path) -> Iterator[Path]:
    """Toolkits that an ``nvcc`` on PATH may belong to: it may be a link, or a shell script that starts the real one."""
    real = nvcc.resolve()
    yield real.parent.parent
    try:
        text = real.read_bytes()[:4096].decode()
    except (OSError, UnicodeDecodeError):
        return  # a program
    for target in re.findall(r"(/[^\s\"']+)/bin/nvcc\b", text):
        yield Path(target)


def _cudart_dir(part: Path) -> Path | None:
    for folder in ("lib64", "lib", "lib/x86_64-linux-gnu"):
        if any((part / folder).glob("libcudart.so*")):
            return part / folder
    return None


def _cudart_version(folder: Path) -> int | None:
    """The major version of the libcudart in a folder, which its file name tells."""
    versions = {
        int(found[1]) for file in folder.glob("libcudart.so.*") if (found := re.match(r"libcudart\.so\.(\d+)", file.name))
    }
    return max(versions, default=None)


def _torch_cuda() -> int | None:
    """The major version of CUDA that PyTorch is built with; None if it is built without."""
    return int(torch.version.cuda.split(".")[0]) if torch.version.cuda else None


def host_words() -> tuple[str, ...]:
    """How the C++ compiler is started: CXX, else ``c++``. Programs may stand before it, and flags behind: ``ccache g++ -m64``.

    Raises:
        MissingCompiler: CXX cannot be parted into words.
    """
    chosen = environment.cxx()
    if shutil.which(chosen) is not None:  # a path with spaces
        return (chosen,)
    try:
        return tuple(shlex.split(chosen)) or ("c++",)
    except ValueError as error:
        raise MissingCompiler(f"CXX is {chosen!r}, which is no command ({error}), so kernels cannot be built") from None


def host_command() -> tuple[str, ...]:
    """``host_words``, whose programs are there.

    Raises:
        MissingCompiler: one of them is not.
    """
    words = host_words()
    for word in (words[0], _compiler_word(words)):
        if shutil.which(word) is None:
            raise MissingCompiler(
                f"no C++ compiler was found ({word!r} is not on PATH), so kernels cannot be built\n"
                "  remedy: install g++ 11 or newer (Debian, Ubuntu: apt-get install g++), or set CXX to one"
            )
    return words


def host_compiler() -> Path:
    """The C++ compiler among the words of ``host_command``.

    Raises:
        MissingCompiler: it is not there.
    """
    return Path(str(shutil.which(_compiler_word(host_command()))))


def _compiler_word(words: Sequence[str]) -> str:
    """The last program before the flags, else the first."""
    programs = itertools.takewhile(lambda word: not word.startswith("-"), words)
    return [words[0], *(word for word in programs if "=" not in word)][-1]


def ninja() -> Path:
    """The build tool that ``torch.utils.cpp_extension`` starts: on PATH, else that of the wheel.

    Raises:
        MissingCompiler: it is not there.
    """
    on_path = shutil.which("ninja")
    if on_path is not None:
        return Path(on_path)
    with contextlib.suppress(metadata.PackageNotFoundError):
        for file in metadata.files("ninja") or ():
            found = Path(str(file.locate())).resolve()
            if file.name == "ninja" and os.access(found, os.X_OK):
                return found
    raise MissingCompiler("ninja was not found, so kernels cannot be built\n  remedy: pip install ninja")


_NOTE = forms.fields(program=forms.text("[0-9a-f]{64}"), identity=forms.text(".*"))
_LARGEST_SCRIPT = 1 << 16


def compiler_identity(command: Path | Sequence[str], memory: Path) -> str:
    """What ``command --version`` says. The folder ``memory`` keeps it for as long as the programs behind it are the same."""
    words = [str(command)] if isinstance(command, Path) else list(command)
    state = hashlib.sha256("\0".join((*words, *_states(words))).encode(errors="surrogatepass")).hexdigest()
    note = memory / f"{Path(_compiler_word(words)).name}.json"
    try:
        known = forms.parse(forms.read(note, _LARGEST_SCRIPT), _NOTE)
        if known["program"] == state:
            return str(known["identity"])
    except (OSError, forms.Malformed):
        pass  # not asked yet, or unreadable: ask
    try:
        said = subprocess.run([*words, "--version"], capture_output=True, check=True).stdout.decode(errors="replace")
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", b"") or b"").decode(errors="replace").strip()
        reason = forms.printable(said or error)
        raise MissingCompiler(f"the compiler {words[0]} does not run, so kernels cannot be built\n  {reason}") from error
    lines = [forms.printable(line.strip()) for line in said.splitlines() if re.search(r"\d+\.\d+", line)]
    identity = " ".join(lines[:2])[:1000]
    with contextlib.suppress(OSError):  # a read-only cache: the next process asks again
        trust.make_private(memory)
        trust.replace_file(note, json.dumps({"program": state, "identity": identity}).encode())
    return identity


def scripts_behind(command: Sequence[str]) -> str | None:
    """Digest of the scripts that are started before a compiler is, and of the variables that they name; None without scripts.

    They may add flags, or start another compiler, and answer ``--version`` as before.
    """
    texts = [text for _, text in _programs_behind(command) if text]
    named = sorted(environment.named_in("\n".join(texts)).items())
    content = json.dumps([texts, named])
    return hashlib.sha256(content.encode()).hexdigest()[:16] if texts else None


def _states(command: Sequence[str]) -> Iterator[str]:
    """Path, size and time stamp of every program that may have a part in what the command does."""
    for program, text in _programs_behind(command):
        with contextlib.suppress(OSError):
            state = os.stat(program)
            variables = environment.named_in(text) if text else None
            yield f"{program} {os.path.realpath(program)} {state.st_size} {state.st_mtime_ns} {variables}"


def _programs_behind(command: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Programs of a command, of the scripts among them, and of the variables that those name; and the text of each script.

    Of each name all that PATH has: a program that is a link to ccache starts the next one of that name.
    """
    left = [*command, *map(os.path.basename, command)]
    folders = environment.given_path()
    seen: set[str] = set()
    while left and len(seen) < 200:
        word = left.pop(0)
        for program in [word] if "/" in word else [os.path.join(folder, word) for folder in folders]:
            if program in seen or not (os.path.isfile(program) and os.access(program, os.X_OK)):
                continue
            seen.add(program)
            text = _script(program)
            yield program, text
            values = environment.named_in(text).values() if text else ()
            words = [word for part in (text, *values) for word in re.findall(r"[\w./+@-]+", part)]
            folders += [word for word in words if word.startswith("/") and os.path.isdir(word) and word not in folders]
            left += words


def _script(program: str) -> str:
    """The text of a script; nothing for a program of machine code."""
    try:
        with open(program, "rb") as file:
            start = file.read(_LARGEST_SCRIPT)
    except OSError:
        return ""  # it may be run and not read
    return start.decode(errors="surrogateescape") if start.startswith(b"#!") else ""


def device_arch(device_index: int) -> str:
    """The architecture to build for, as ``9.0a``: of the device itself, or ``JITK_CUDA_ARCH``."""
    chosen = environment.cuda_arch()
    if chosen is not None:
        return chosen
    major, minor = torch.cuda.get_device_capability(device_index)
    return arch_name(major, minor)


def arch_name(major: int, minor: int) -> str:
    """``9.0a`` for (9, 0): from Hopper on, the architecture's own instructions need the ``a``."""
    return f"{major}.{minor}{'a' if major >= 9 else ''}"


def gencode(arch: str) -> str:
    """The nvcc flag for ``9.0a``: machine code alone, no PTX.

    Raises:
        ValueError: ``arch`` is not of that form.
    """
    form = re.fullmatch(environment.CUDA_ARCH, arch)
    if form is None:
        raise ValueError(f"the CUDA architecture {arch!r} must be of the form 8.0 or 9.0a")
    number = "".join(form.groups())
    return f"-gencode=arch=compute_{number},code=sm_{number}"


def arch_number(arch: str) -> int:
    """What ``__CUDA_ARCH__`` is for ``9.0a``: 900."""
    major, minor = re.match(r"(\d+)\.(\d)", arch).groups()  # type: ignore[union-attr]
    return int(major) * 100 + int(minor) * 10


def march(arch: str) -> str:
    """The C++ compiler's flag for ``x86-64-v3``.

    Raises:
        ValueError: ``arch`` is not of that form.
    """
    if re.fullmatch(CPU_ARCH, arch) is None:
        raise ValueError(f"the CPU architecture {arch!r} must be of the form x86-64 or x86-64-v3")
    return f"-march={arch}"


_ISA_OF_CAPABILITY = {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3"}


def host_isa() -> str:
    """This machine's x86-64 level, as ``-march`` takes it. Not ``native``: hosts that share a cache may differ."""
    return _ISA_OF_CAPABILITY.get(torch.backends.cpu.get_cpu_capability(), "x86-64-v2")
