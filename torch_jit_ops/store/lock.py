"""One process builds a variant while the others wait for it, and know for whom.

The lock is the operating system's: it dies with its holder, so a lock file that a dead process left means nothing. It saves
work, not correctness: where locks do not work, two processes build the same variant, and one rename wins.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import filelock  # here: on import it registers what waits for forks, which would wait for this thread if they were held off

from torch_jit_ops import progress
from torch_jit_ops.store import files, forms

PATIENCE_S = 3.0  # a process that waits longer says for whom
_POLL_S = 0.05


_LARGEST_NOTE = 1 << 20
_OWNER = forms.fields(
    pid=forms.whole(0, 2**31 - 1),
    host=forms.text(r".*"),
    system=forms.text(r".*"),
    start=forms.seconds,
    label=forms.text(r"(?s).*"),
)
_FAILURE = forms.fields(owner=_OWNER, inputs=forms.text(r".*"), error=forms.text(r"(?s).*", _LARGEST_NOTE))


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
def building(path: Path, label: str) -> Iterator[Building]:
    """Hold the lock file ``path`` while building ``label``, after waiting for another process that does so."""
    lock, waited_for = _acquire(path)
    me = Owner(os.getpid(), socket.gethostname(), system(), time.time(), label)
    held = Building(path.with_suffix(".failed"), me, waited_for)
    if lock is None:
        yield held
        return
    note = path.with_suffix(".owner")
    try:
        _write(note, asdict(me))
        yield held
    finally:
        with contextlib.suppress(OSError):
            note.unlink(missing_ok=True)
        lock.release()


@dataclass(frozen=True)
class Building:
    """A build under the lock, and the one that was waited for."""

    note: Path
    me: Owner
    waited_for: Owner | None

    def tell_failure(self, inputs: str, error: str) -> None:
        """Spare those who wait now: a build of the same ``inputs`` fails with the same ``error``."""
        _write(self.note, {"owner": asdict(self.me), "inputs": inputs, "error": error})

    def failure(self, inputs: str) -> str | None:
        """The error of the build that was waited for, if it had the same ``inputs``. One before that counts for nothing."""
        try:
            told = forms.parse(forms.read(self.note, _LARGEST_NOTE), _FAILURE)
        except (OSError, forms.Malformed):
            return None
        mine = self.waited_for is not None and Owner(**told["owner"]) == self.waited_for
        return str(told["error"]) if mine and told["inputs"] == inputs else None


def owner(path: Path) -> Owner | None:
    """Who holds the lock file ``path``, or held it when killed; None if nobody says so."""
    try:
        return Owner(**forms.parse(forms.read(path.with_suffix(".owner"), _LARGEST_NOTE), _OWNER))
    except (OSError, forms.Malformed):
        return None


def _acquire(path: Path) -> tuple[filelock.BaseFileLock | None, Owner | None]:
    """The lock, None where locks do not work, and who held it when this process came."""
    with contextlib.suppress(OSError, NotImplementedError):
        files.make_private(path.parent)
        lock = filelock.FileLock(path)
        first = told = None
        # At first and soon after: whom to wait for, who may not have written who it is yet.
        for attempt in itertools.count():
            timeout = (0.0, 0.1, PATIENCE_S)[attempt] if attempt < 3 else 1.0
            try:
                lock.acquire(timeout=timeout, poll_interval=_POLL_S)
                return lock, first
            except filelock.Timeout:
                pass
            if isinstance(lock, filelock.SoftFileLock):
                return None, None  # filelock falls back to it without OS locks; its file outlives a killed holder
            holder = owner(path)
            if attempt < 2:
                first = first or holder
                continue
            if holder is not None and holder.is_dead():
                return None, None  # a child that it forked still has its lock
            if holder is not None and holder != told:
                progress.waiting(forms.printable(holder.label), holder.pid, forms.printable(holder.host), holder.start)
                told = holder
    return None, None  # locks do not work here


def _write(note: Path, content: dict[str, object]) -> None:
    with contextlib.suppress(OSError):  # a full disk: the others wait without knowing for whom
        files.replace_file(note, json.dumps(content).encode())
