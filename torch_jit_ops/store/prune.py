"""Keeps the kernel cache small: variants that nobody used for long go, then those unused for longest, until it fits.

A process that has loaded a variant keeps it: its file lives on until the process ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from torch_jit_ops.store import lock

AGE_S = 90 * 86400.0  # the default: longer than most projects rest
DAY_S = 86400.0
FAILED = 8  # builds whose logs are kept


@dataclass(frozen=True)
class Variant:
    """A built variant in the store: its folder, when it was last used (seconds since 1970, to the day), and its bytes."""

    folder: Path
    used: float
    size: int


@dataclass(frozen=True)
class Pruned:
    """What went and what stayed."""

    removed: tuple[Variant, ...]
    kept: tuple[Variant, ...]

    @property
    def freed(self) -> int:
        """Bytes that went."""
        return sum(variant.size for variant in self.removed)


def folders(folder: Path) -> list[Path]:
    """The folders in a folder, without links; none if it cannot be read."""
    try:
        return sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []


def measure(folder: Path, record: str) -> Variant | None:
    """The variant in a folder; None if it just went."""
    try:
        files = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(folder)}
        state = files.get(record) or folder.stat()
        # Another machine's clock may be ahead: what was used "tomorrow" was used now.
        return Variant(folder, min(state.st_mtime, time.time()), sum(file.st_blocks * 512 for file in files.values()))
    except OSError:
        return None


def prune(
    variants: Iterable[Variant],
    remove: Callable[[Path], bool],
    max_bytes: int | None,
    max_age_s: float | None,
    keep: Path | None,
) -> Pruned:
    """Remove the variants that are too old or too many. ``keep`` stays."""
    oldest_first = sorted(variants, key=lambda variant: (variant.folder == keep, variant.used))
    total = sum(variant.size for variant in oldest_first)
    now = time.time()
    removed, kept = [], []
    for variant in oldest_first:
        too_old = max_age_s is not None and now - variant.used > max_age_s
        too_many = max_bytes is not None and total > max_bytes
        if variant.folder != keep and (too_old or too_many) and remove(variant.folder):
            removed.append(variant)
            total -= variant.size
            with contextlib.suppress(OSError):
                variant.folder.parent.rmdir()  # its last variant is gone
        else:
            kept.append(variant)
    return Pruned(tuple(removed), tuple(kept))


def sweep(staging: Path, log: str, failed: int = FAILED) -> int:
    """Remove what is left in ``staging``: of processes that are gone, or older than a day. Returns how many folders went.

    A folder with a ``log`` is of a build that failed, whose error names it: the latest ``failed`` stay for the day.
    """
    now = time.time()
    ended: list[tuple[float, Path]] = []
    removed = 0
    for folder in folders(staging):
        pid, _, system = folder.name.rpartition("_")[0].partition("_")
        with contextlib.suppress(OSError):
            age = now - folder.stat().st_mtime
            dead = system == lock.system() and pid.isdecimal() and not lock.is_alive(int(pid))
            if age <= DAY_S and os.path.lexists(folder / log):
                ended.append((age, folder))
            elif age > DAY_S or dead:
                shutil.rmtree(folder, ignore_errors=True)
                removed += 1
    for _, folder in sorted(ended)[failed:]:
        shutil.rmtree(folder, ignore_errors=True)
    return removed + len(ended[failed:])
