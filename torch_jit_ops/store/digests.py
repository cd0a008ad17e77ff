"""Digests of files and values, and how to know a file's digest without reading it again.

    digest_of_file("/opt/cutlass/include/cute/layout.hpp")      read once for each state of the file
    with indexed(store_root): ...                               and in later processes too: a hit asks for 700 headers, say

A file is the same as long as its size, its inode and the time stamps of its content and of its inode are. That is sound only
if a later write could not leave these stamps as they are, so a file counts as known only once its stamps are older than any
clock tick of a file system: until then it is read each time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch_jit_ops import forks, process
from torch_jit_ops.store import files, forms

FOLDER = "digests"  # in a store
LARGEST_FILE = 512 << 20  # a kernel's library has 0.1 to 3 MB, a source less (November 2026)
_SETTLED_NS = 2_100_000_000  # FAT counts in steps of 2 s; others are finer
_FEW = 8  # files that are read faster than an index is
_LARGEST_INDEX = 16 << 20
_LINE = re.compile(rb"^([0-9a-f]{64}) (\d{1,19}) (\d{1,19}) (\d{1,19}) (\d{1,20}) ([^\n]+)\n", re.MULTILINE)

State = tuple[int, int, int, int]  # size, time stamps of content and inode, inode

_known: dict[str, tuple[State, str]] = process.keep({})
_indices: dict[Path, dict[str, tuple[State, str]]] = process.keep({})  # by file, what it says
_lock = forks.Lock()


def digest_of(data: bytes | str) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def digest_of_record(record: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return digest_of(json.dumps(record, sort_keys=True))


def digest_of_file(path: str | Path) -> str | None:
    """SHA-256 of a plain file, or None if there is none."""
    path = str(path)
    try:
        state = _state(path)
        known = _known.get(path)
        if known is not None and known[0] == state:
            return known[1]
        now = time.time_ns()  # before the file is read: what is written later has later stamps
        digest = digest_of(forms.read(path, LARGEST_FILE, follow=True))
    except (OSError, ValueError):  # a path with a NUL; no plain file
        return None
    if max(state[1], state[2]) < now - _SETTLED_NS:
        _known[path] = (state, digest)
    return digest


def _state(path: str) -> State:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


@contextlib.contextmanager
def indexed(store: Path, folder: str, paths: list[str]) -> Iterator[None]:
    """While the block runs, know the files below ``folder`` that this or another process has read, and note those read now.

    Args:
        store: the root of a store that this user may write, in which the notes are.
        folder: of the files.
        paths: the files that will be asked for.
    """
    if len(paths) < _FEW:
        yield
        return
    index = store / FOLDER / digest_of(os.fsencode(folder))[:16]
    with _lock:
        if index not in _indices:
            _indices[index] = _read(store, index)
    yield
    with _lock:
        _indices.setdefault(index, {})
        new = {path: _known[path] for path in paths if path in _known and _indices[index].get(path) != _known[path]}
        if new:
            _indices[index] |= new
            _write(store, index, _indices[index])


def _read(store: Path, index: Path) -> dict[str, tuple[State, str]]:
    """Take over what an index says of files that this process has not read itself."""
    found: dict[str, tuple[State, str]] = {}
    with contextlib.suppress(OSError, forms.Malformed, files.UntrustedCache):
        files.check_inside(index.parent, index, root=store)
        for digest, size, content, inode_stamp, inode, path in _LINE.findall(forms.read(index, _LARGEST_INDEX)):
            name = os.fsdecode(path)
            found[name] = (int(size), int(content), int(inode_stamp), int(inode)), digest.decode()
            _known.setdefault(name, found[name])
    return found


def _write(store: Path, index: Path, content: Mapping[str, tuple[State, str]]) -> None:
    lines = []
    for path, (state, digest) in sorted(content.items()):
        if "\n" not in path and min(state) >= 0:
            lines.append(f"{digest} {' '.join(map(str, state))} {path}\n")
    with contextlib.suppress(OSError, files.UntrustedCache):  # a read-only store: the next process reads all again
        files.make_private(index.parent)
        files.check_inside(store, index.parent, root=store)
        files.replace_file(index, os.fsencode("".join(lines)))
