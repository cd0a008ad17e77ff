"""From what a compiler wrote to one distilled error: its first errors, and the remedy where the cause is known and certain."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch_jit_ops.store.forms import printable
from torch_jit_ops.store.record import LOG

# The first pattern that the log has decides. A remedy may use groups of its pattern: {0} is the first.
_REMEDIES = tuple(
    (re.compile(pattern, re.MULTILINE), remedy)
    for pattern, remedy in (
        (
            r"No space left on device|Disk quota exceeded",
            "free space where the kernel cache is (python -m torch_jit_ops cache prune) and in the folder for temporary files, "
            "or set JITK_CACHE_DIR and TMPDIR to folders that have some",
        ),
        (
            r"exit(?:ed with)? (?:code|status) 137\b|\[code=137\]|^Killed$|\bKilled signal terminated program"
            r"|signal: Killed|died due to signal 9\b",
            "the system killed the compiler, as a rule for want of memory: compile fewer kernels at once, or allow more memory",
        ),
        (
            r"Unsupported gpu architecture '(\w+)'",
            "this nvcc does not know {0}: install a newer CUDA toolkit and set CUDA_HOME to its folder",
        ),
        (
            r"unsupported GNU version! gcc versions later than (\d+)",
            "install g++ {0} or older and set CC and CXX to it, or install a newer CUDA toolkit and set CUDA_HOME to it",
        ),
        (
            r"\bPython\.h(?:\"|: No such file)",
            "install the headers of Python (Debian, Ubuntu: apt-get install python3-dev)",
        ),
        (
            r"\b(cuda_runtime\.h|crt/host_config\.h|nv/target)(?:\"|: No such file)",
            "{0} belongs to the CUDA toolkit, which is not whole: pip install 'torch_jit_ops[nvcc]', "
            "or install a toolkit and set CUDA_HOME to its folder",
        ),
        (r"Ninja is required to load C\+\+ extensions|No such file or directory: 'ninja'", "pip install ninja"),
    )
)

_ERROR_LINE = re.compile(
    r"^(?P<file>[^\s:(][^:(]*)(?:\((?P<nv>\d+)\)|:(?P<gcc>\d+)(?::\d+)?): (?:fatal |catastrophic )?error:? ?(?P<text>.*)$"
)
# GNU ld and gold; lld, mold.
_UNDEFINED = re.compile(r"undefined reference to [`'](.+)'$|undefined symbol: (.+)$", re.MULTILINE)
_SYMBOLS = 3
_NO_LIBRARY = re.compile(
    r"cannot find (-l\S+?)(?=: No such file|$)|unable to find library (-l\S+)|library not found: (\S+)", re.MULTILINE
)
_LINK_REMEDIES = (
    (
        _NO_LIBRARY,
        "install it, or name its folder in ldflags, -L/folder and -Wl,-rpath,/folder; for one of a wheel, library_of(...)",
    ),
    (_UNDEFINED, "name in ldflags the library that has it, or behind the first source the one that defines it"),
)
_NONE: Mapping[str, Sequence[str]] = {}
_NINJA_LINE = re.compile(r"^Error building extension|^\[\d+/\d+\] |^FAILED: |^ninja: build stopped| -c .* -o ")


def remedy_for(log: str) -> str | None:
    """What to do about the failure that the log tells of; None if the cause is not known for certain."""
    for pattern, remedy in (*_REMEDIES, *_LINK_REMEDIES):
        found = pattern.search(log)
        if found is not None:
            return remedy.format(*found.groups())
    return None


def is_disk_full(log: str) -> bool:
    """Whether the build failed as it could not write."""
    return _REMEDIES[0][0].search(log) is not None


def unknown_gpu(log: str) -> str | None:
    """The architecture that this nvcc does not know, as ``compute_130a``, if the build failed for that."""
    found = re.search(r"Unsupported gpu architecture '(\w+)'", log)
    return found[1] if found else None


def not_linked(log: str) -> list[str]:
    """What a linker did not find, the first few: libraries; else functions and variables, as C++ writes them."""
    for pattern, what in ((_NO_LIBRARY, "library not found"), (_UNDEFINED, "undefined symbol")):
        found = list(dict.fromkeys(next(filter(None, found.groups())) for found in pattern.finditer(log)))
        if found:
            more = [f"and {len(found) - _SYMBOLS} more"] if len(found) > _SYMBOLS else []
            return [*(f"{what}: {name}" for name in found[:_SYMBOLS]), *more]
    return []


def first_errors(log: str, include: Mapping[str, Path], inlined: Mapping[str, Sequence[str]] = _NONE) -> list[str]:
    """The first errors, as ``csrc/norm.cu:23: what is wrong``; without any, what else speaks of errors, or the last lines.

    Args:
        log: what ninja and the compilers wrote.
        include: folders, by what compilers call them, whose files are named with the folder's own name alone.
        inlined: the lines of the sources that are no files, by what compilers call them. Nobody could look them up.
    """
    roots = sorted(((name + os.sep, folder.name) for name, folder in include.items()), key=lambda pair: -len(pair[0]))
    errors: list[str] = []
    for line in log.splitlines():
        found = _ERROR_LINE.match(line.strip())
        if found is None:
            continue
        file = found["file"]
        for prefix, short in roots:
            if file.startswith(prefix):
                file = f"{printable(short)}/{file.removeprefix(prefix)}"
                break
        number = int(found["nv"] or found["gcc"])
        text = f"{Path(file).name if file.startswith('/') else file}:{number}: {found['text']}"
        if 0 < number <= len(inlined.get(file, ())):
            text += f"\n    {printable(inlined[file][number - 1].strip())}"
        if text not in errors:
            errors.append(text)
    if errors:
        return errors[:3]
    lines = [line.strip() for line in log.splitlines() if line.strip() and not _NINJA_LINE.search(line)]
    return [line for line in lines if re.search(r"\b(error|fatal)\b", line)][:3] or lines[-5:]


def text_of(error: Exception) -> str:
    """What the compilers wrote, out of what ``cpp_extension`` raised."""
    log = str(error.__cause__ or error) if isinstance(error, OSError) else str(error)
    if isinstance(error, UnicodeDecodeError):
        log = error.object.decode(errors="replace")
    return log if log.strip() else repr(error)


def keep(log: str, staging: Path) -> Path:
    """Write the log into the staging folder, unless the disk is full."""
    file = staging / LOG
    with contextlib.suppress(OSError):
        file.write_text(log, errors="replace")
    return file


def distill(
    log: str,
    label: str,
    where: str,
    include: Mapping[str, Path],
    file: Path,
    *,
    loading: bool,
    inlined: Mapping[str, Sequence[str]] = _NONE,
) -> str:
    """The first errors of a compiler's log, where the whole log is, and what to do about it if that is known.

    Args:
        log: what ninja and the compilers wrote.
        label: what was built, for people.
        where: for which backend and architecture.
        include, inlined: see ``first_errors``.
        file: the whole log.
        loading: the library was made, and the system does not load it.
    """
    lacking = not_linked(log)
    known = remedy_for(log)
    failed = "cannot be loaded" if loading else "did not link" if lacking else "did not compile"
    return "\n  ".join(
        (
            f"{label} {failed} ({where})",
            *(lacking or first_errors(log, include, inlined)),
            f"full log: {file}",
            *([f"remedy: {known}"] if known else []),
        )
    )
