"""One process builds a variant while the others wait for it, and know for whom.

The lock is the operating system's: it dies with its holder, so a lock file that a dead process left means nothing. It saves
work, not correctness: where locks do not work, two processes build the same variant, and one rename wins.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch_jit_ops import progress, trust

if TYPE_CHECKING:
    import filelock

PATIENCE_S = 3.0  # a process that waits longer says for whom
_POLL_S = 0.05


@dataclass(frozen=True)
class Owner:
    """Who builds.

    Attributes:
        pid: the process, in the numbering of ``system``.
        host: the name of its machine.
        system: digest of the machine, its start and the process numbering: two containers may share a host name.
        start: seconds since 1970.
        label: what is built.
    """

    pid: int
    host: str
    system: str
    start: float
    label: str

    def is_dead(self) -> bool:
        """Whether the process is known to be gone."""
        return self.system == system() and not is_alive(self.pid)


@functools.cache
def system() -> str:
    """Digest that is the same for two processes only if their process numbers mean the same."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


def is_alive(pid: int) -> bool:
    """Whether there is a process of this number here."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass  # another user's
    return True


@contextlib.contextmanager
def building(path: Path, label: str) -> Iterator[None]:
    """Hold the lock file ``path`` while building ``label``, after waiting for another process that does so."""
    lock = _acquire(path)
    if lock is None:
        yield
        return
    note = path.with_suffix(".owner")
    try:
        _write_owner(note, label)
        yield
    finally:
        with contextlib.suppress(OSError):
            note.unlink(missing_ok=True)
        lock.release()


def owner(path: Path) -> Owner | None:
    """Who holds the lock file ``path``, or held it when killed; None if nobody says so."""
    try:
        return Owner(**json.loads(path.with_suffix(".owner").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _acquire(path: Path) -> filelock.BaseFileLock | None:
    import filelock

    try:
        trust.make_private(path.parent)
        lock = filelock.FileLock(path)
        told = None
        timeout = PATIENCE_S
        while True:
            try:
                lock.acquire(timeout=timeout, poll_interval=_POLL_S)
                return lock
            except filelock.Timeout:
                pass
            if isinstance(lock, filelock.SoftFileLock):
                return None  # filelock falls back to it without OS locks; its file outlives a killed holder
            holder = owner(path)
            if holder is not None and holder.is_dead():
                return None  # a child that it forked still has its lock
            if holder is not None and holder != told:
                progress.waiting(holder.label, holder.pid, holder.host, holder.start)
                told = holder
            timeout = 1.0
    except (OSError, NotImplementedError):
        return None


def _write_owner(note: Path, label: str) -> None:
    me = Owner(os.getpid(), socket.gethostname(), system(), time.time(), label)
    new = note.with_suffix(f".{me.system}-{me.pid}")
    with contextlib.suppress(OSError):  # a full disk: the others wait without knowing for whom
        new.write_text(json.dumps(asdict(me)))
        new.rename(note)
