"""The store of built variants: content-addressed, private, and safe without a lock.

A variant's folder is found by two digests. The first is of everything that is known before compiling: the translation unit, the
flags, the architecture, the ABI. The second is of the files that the compiler really read. So a changed header rebuilds its
readers and nothing else, and no path or time stamp matters.

    <root>/<op>-<digest>/<digest of the files read>/   variant.json, the library, the translation unit, the log
    <root>/staging/    builds under way; a finished one is renamed into its place
    <root>/locks/      see lock.py
    <root>/digests/    see digests.py
    <root>/compilers/  see builder/compilers.py

People call it the kernel cache: JITK_CACHE_DIR, ``python -m torch_jit_ops cache``.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch_jit_ops import environment, process, progress
from torch_jit_ops.store import dependencies, files, forms, lock, prune, record
from torch_jit_ops.store.dependencies import Dependency
from torch_jit_ops.store.digests import digest_of, digest_of_record
from torch_jit_ops.store.record import DISPATCHER, FORMAT, LARGEST_RECORD, LOG, RECORD
from torch_jit_ops.store.temporary import temporary_folder, until_exit

_PRUNE_EVERY_S = 60.0


class Store:
    """The variants under one root.

    Args:
        root: the folder; need not exist.
        shared: it is only read.
        notes: root of the store that keeps what is known of files; by default this one.
    """

    def __init__(self, root: Path, *, shared: bool = False, notes: Path | None = None) -> None:
        self.root = root
        self.shared = shared
        self.notes = notes or root

    def find(
        self, name: str, key: str, roots: Mapping[str, Path], compiler: str | None, *, repair: bool = False
    ) -> Path | None:
        """The library built from ``key`` and from the files as they are now, or None.

        Args:
            name: the op, for the folder's name.
            key: digest of what is known before compiling.
            roots: where each root of ``Dependency`` is on this machine.
            compiler: identity of the compiler that would be used, or None if there is none, which then rules nothing out.
            repair: remove variants that are damaged, and say so.

        Raises:
            UntrustedCache: others could have written the variant.
        """
        folder = self._folder(name, key)
        try:
            candidates = sorted(os.listdir(folder))
            files.check(self.root, folder)
        except OSError:
            return None
        for candidate in candidates:
            library, damage = self._inspect(folder / candidate, key, roots, compiler)
            if damage is not None and repair:
                self.discard(folder / candidate, damage)
            if library is not None:
                return library
        return None

    def discard(self, folder: Path, reason: str) -> None:
        """Remove a damaged variant, in a shared store only leave it out, and say so in a line."""
        what = "leaving out" if self.shared else "replacing"
        progress.say(forms.printable(f"{what} the damaged kernel {folder}: {reason}"))
        if not self.shared:
            self.remove(folder)

    def remove(self, folder: Path) -> bool:
        """Remove a variant, or what is in its place, at once, as far as others can see. False if it cannot be removed."""
        try:
            if not stat.S_ISDIR(os.lstat(folder).st_mode):
                os.unlink(folder)
                return True
            trash = self.new_staging()
        except OSError:
            return False
        with contextlib.suppress(OSError):
            os.rename(folder, trash)  # an empty folder gives way
        shutil.rmtree(trash, ignore_errors=True)
        return not folder.exists()

    def own_folder(self, name: str) -> Path:
        """A folder of the store itself, made if it is not there, that nobody else can write.

        Raises:
            OSError: the store cannot be written.
            UntrustedCache: others could write it.
        """
        files.check_above(self.root)
        files.make_private(self.root)
        files.check_inside(self.root, root=self.root)
        files.make_private(self.root / name)
        files.check_inside(self.root / name, root=self.root)
        return self.root / name

    def new_staging(self) -> Path:
        """A new private folder in this store, whose name says who made it.

        Raises:
            OSError: the store cannot be written.
            UntrustedCache: others could write it.
        """
        folder = self.own_folder("staging") / f"{os.getpid()}_{lock.system()}_{uuid.uuid4().hex[:12]}"
        files.make_private(folder)
        return folder

    def staging(self) -> Path:
        """A new private folder to build in: in the store, if compilers can work there, else temporary.

        With one warning if nothing can be kept in the store, or run from it.
        """
        try:
            folder = self.new_staging()
        except OSError as error:
            return self.temporary(error.strerror or str(error))
        self.sweep()
        if self._bears_compilers():
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        if not self.runs_programs():
            self.warn_of_noexec()
        return temporary_folder()

    def runs_programs(self) -> bool:
        """Whether the system loads libraries from the store's file system."""
        try:
            return not os.statvfs(self.root).f_flag & os.ST_NOEXEC
        except OSError:
            return True

    def _bears_compilers(self) -> bool:
        """Whether kernels can be built in the store itself; else they are built elsewhere, and copied."""
        return files.is_plain(self.root) and self.runs_programs()

    def warn_of_noexec(self) -> None:
        self._warn(
            "is on a file system from which no program can be run (noexec); kernels are copied to a temporary folder in every "
            "process. Set JITK_CACHE_DIR to a folder elsewhere"
        )

    def temporary(self, reason: str) -> Path:
        """A new private folder outside of the store, which goes with this process; and one warning with the reason."""
        self._warn(
            f"cannot be written ({reason}); kernels are built again in every process. "
            "Set JITK_CACHE_DIR to a folder with space that can be written"
        )
        return temporary_folder()

    def sweep(self, failed: int = prune.FAILED) -> int:
        """Remove what killed builds left, and of the failed ones all but so many. Returns how many folders went."""
        return prune.sweep(self.root / "staging", LOG, failed)

    def publish(
        self, staging: Path, name: str, key: str, library: Path, read: Sequence[Dependency], facts: Mapping[str, Any]
    ) -> Path:
        """Record what was built in ``staging`` and rename it into its place. If another build came first, it stays.

        Returns:
            Where the library is now. Where it could not be published it is usable in this process.
        """
        if self.root not in staging.parents:
            if self._bears_compilers():
                return library  # it cannot be written, or its disk is full, as a warning said
            try:
                kept = self.new_staging()
                shutil.copytree(staging, kept, symlinks=True, dirs_exist_ok=True)
            except (OSError, shutil.Error):
                return library
            staging, library = kept, kept / library.name
        facts = {
            "format": FORMAT,
            "key": key,
            "library": library.name,
            "digest": digest_of(library.read_bytes()),
            "dependencies": [asdict(dependency) for dependency in read],
            **facts,
        }
        place = self._folder(name, key) / digest_of_record([facts["dependencies"], facts.get("compiler")])[:16]
        try:
            files.replace_file(staging / RECORD, json.dumps(facts, indent=1).encode())
            files.make_files_private(staging)
            if os.path.lexists(place.parent) and not stat.S_ISDIR(os.lstat(place.parent).st_mode):
                self.remove(place.parent)
            files.make_private(place.parent)
            try:
                os.rename(staging, place)
            except OSError:
                there, _ = record.examine(place, self.root)
                same = ("key", "dependencies", "compiler")
                if there is not None and any(there[name] != facts[name] for name in same if name in facts):
                    there = None
                first, _ = record.intact(place, self.root, there) if there is not None else (None, None)
                if first is not None:
                    shutil.rmtree(staging, ignore_errors=True)
                    return first
                self.remove(place)
                os.rename(staging, place)
        except OSError as error:
            self._warn(
                f"could not keep {name} ({error.strerror}); it is built again in the next process. "
                "Set JITK_CACHE_DIR to a folder with space that can be written"
            )
            until_exit(staging)
            return library
        self._prune_in_passing(place)
        return place / library.name

    def lock_path(self, name: str, key: str) -> Path:
        """The file to lock while building ``key``."""
        return self.root / "locks" / f"{name}-{key[:16]}.lock"

    def variants(self) -> Iterator[Path]:
        """The folders of all variants, whole or not."""
        for folder in prune.folders(self.root):
            if "-" in folder.name:
                yield from prune.folders(folder)

    def usual_seconds(self, name: str, backend: str) -> float | None:
        """How long builds of the op took, else of any op for the backend; the median. None if there were none.

        A dispatcher takes as long as dispatchers do, which tells nothing of kernels.
        """
        same: list[float] = []
        other: list[float] = []
        for folder in self.variants():
            with contextlib.suppress(OSError, forms.Malformed):
                built = forms.parse(forms.read(folder / RECORD, LARGEST_RECORD), record.TIMES)
                if built["backend"] != backend:
                    continue
                if built["name"] == name:
                    same.append(built["seconds"])
                elif not name.startswith(DISPATCHER) and not built["name"].startswith(DISPATCHER):
                    other.append(built["seconds"])
        seconds = sorted(same or other)
        return seconds[len(seconds) // 2] if seconds else None

    def prune(self, max_bytes: int | None, max_age_s: float | None, keep: Path | None = None) -> prune.Pruned:
        """Remove variants that nobody used for ``max_age_s``, then those unused for longest until ``max_bytes`` hold the rest.

        ``None`` is no limit; the variant ``keep`` stays. Use counts to the day.
        """
        sizes = (prune.measure(folder, RECORD) for folder in self.variants())
        return prune.prune((size for size in sizes if size is not None), self.remove, max_bytes, max_age_s, keep)

    def _prune_in_passing(self, built: Path) -> None:
        """At most once a minute in all processes: a look at every variant may take seconds on a network's file system."""
        stamp = self.root / "pruned"
        with contextlib.suppress(OSError):
            if stamp.exists() and abs(time.time() - stamp.stat().st_mtime) < _PRUNE_EVERY_S:
                return
            stamp.touch(mode=0o600)
            self.prune(environment.cache_bytes(), prune.AGE_S, keep=built)

    def _folder(self, name: str, key: str) -> Path:
        return self.root / f"{name}-{key[:16]}"

    def _inspect(
        self, folder: Path, key: str, roots: Mapping[str, Path], compiler: str | None
    ) -> tuple[Path | None, str | None]:
        """The library if it is the one that is wanted, or what is wrong with it; neither if it is another one."""
        found, damage = record.examine(folder, self.root)
        if found is None:
            return None, damage
        # What somebody put there on purpose, from a machine that may have had other compilers, is meant to be used.
        given = self.shared or found.get("imported") is True
        if found.get("key") != key or (compiler is not None and found.get("compiler") != compiler and not given):
            return None, None
        if not dependencies.are_unchanged(found["dependencies"], roots, self.notes):
            return None, None
        library, damage = record.intact(folder, self.root, found)
        if library is not None and not self.shared:
            self._touch(folder / RECORD)
        return library, damage

    @staticmethod
    def _touch(file: Path) -> None:
        """Note, once a day, that a variant is in use: ``prune`` reads the time stamp of its record."""
        with contextlib.suppress(OSError):
            now = time.time()
            if abs(now - os.stat(file).st_mtime) > prune.DAY_S:
                os.utime(file, (now, now))

    def _warn(self, what: str) -> None:
        if process.first_time("store", self.root):
            warnings.warn(forms.printable(f"the kernel cache {self.root} {what}"), stacklevel=2)
