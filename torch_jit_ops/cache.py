"""The store of built variants: content-addressed, private, and safe without a lock.

A variant's folder is found by two digests. The first is of everything that is known before compiling: the translation unit, the
flags, the architecture, the ABI. The second is of the files that the compiler really read. So a changed header rebuilds its
readers and nothing else, and no path or time stamp matters.

    <root>/<op>-<digest>/<digest of the files read>/   variant.json, the library, the translation unit, the log
    <root>/staging/   builds under way; a finished one is renamed into its place
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch_jit_ops import environment

RECORD = "variant.json"
FORMAT = 1


@dataclass(frozen=True)
class Dependency:
    """A file that the compiler read. ``root`` names a folder (``include0``), so that a moved checkout still matches.

    Without a digest it is a file that was not there, and that the compiler would have read in place of another.
    """

    root: str
    path: str
    digest: str | None


class UntrustedCache(RuntimeError):
    """The cache could be written by others: a kernel from it could be anybody's code."""


def digest_of(data: bytes | str) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def digest_of_record(record: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return digest_of(json.dumps(record, sort_keys=True))


_file_digests: dict[tuple[str, int, int], str] = {}


def digest_of_file(path: Path) -> str | None:
    """SHA-256 of a file, or None if there is none. Read once for each size and time stamp in this process."""
    try:
        state = path.stat()
        key = (str(path), state.st_size, state.st_mtime_ns)
        if key not in _file_digests:
            _file_digests[key] = digest_of(path.read_bytes())
        return _file_digests[key]
    except OSError:
        return None


class Store:
    """The variants under one root."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find(self, name: str, key: str, roots: Mapping[str, Path], compiler: str | None) -> Path | None:
        """The library built from ``key`` and from the files as they are now, or None.

        Args:
            name: the op, for the folder's name.
            key: digest of what is known before compiling.
            roots: where each root of ``Dependency`` is on this machine.
            compiler: identity of the compiler that would be used, or None if there is none, which then rules nothing out.
        """
        folder = self._folder(name, key)
        try:
            candidates = sorted(folder.iterdir())
        except OSError:
            return None
        self._check_private()
        for candidate in candidates:
            library = self._valid(candidate, key, roots, compiler)
            if library is not None:
                return library
        return None

    def make_root(self) -> None:
        """Make the store's folder, for this user alone. As a parent of another folder it would have the umask's mode."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def staging(self) -> Path:
        """A new private folder to build in. It is in the store if that can be written, else temporary, with one warning."""
        try:
            self.make_root()
            self._check_private()
            folder = self.root / "staging" / uuid.uuid4().hex
            folder.mkdir(mode=0o700, parents=True)
            return folder
        except OSError as error:
            warnings.warn(
                f"the kernel cache {self.root} cannot be written ({error.strerror}); kernels are built again in every process. "
                "Set JITK_CACHE_DIR to a folder that can be written",
                stacklevel=2,
            )
            return Path(tempfile.mkdtemp(prefix="jitk-"))

    def publish(
        self, staging: Path, name: str, key: str, library: Path, dependencies: Sequence[Dependency], facts: Mapping[str, Any]
    ) -> Path:
        """Record what was built in ``staging`` and rename it into its place. If another build came first, it stays.

        Returns:
            Where the library is now.
        """
        record = {
            "format": FORMAT,
            "key": key,
            "library": library.name,
            "digest": digest_of_file(library),
            "dependencies": [asdict(dependency) for dependency in dependencies],
            **facts,
        }
        (staging / RECORD).write_text(json.dumps(record, indent=1))
        if self.root not in staging.parents:
            return library
        place = self._folder(name, key) / digest_of_record([record["dependencies"], record.get("compiler")])[:16]
        try:
            place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                staging.rename(place)
            except OSError:
                first = self._intact(place)
                if first is not None:
                    shutil.rmtree(staging, ignore_errors=True)
                    return first[1]
                place.rename(staging.with_name(uuid.uuid4().hex))  # what is there is broken: out of the way with it
                staging.rename(place)
        except OSError:
            return library  # usable in this process; the next process builds again
        return place / library.name

    def lock_path(self, name: str, key: str) -> Path:
        """The file to lock while building ``key``."""
        return self.root / "locks" / f"{name}-{key[:16]}.lock"

    def _folder(self, name: str, key: str) -> Path:
        return self.root / f"{name}-{key[:16]}"

    def _valid(self, folder: Path, key: str, roots: Mapping[str, Path], compiler: str | None) -> Path | None:
        found = self._intact(folder)
        if found is None:
            return None
        record, library = found
        if record.get("key") != key or (compiler is not None and record.get("compiler") != compiler):
            return None
        for item in record["dependencies"]:
            if item["root"] not in roots or digest_of_file(roots[item["root"]] / item["path"]) != item["digest"]:
                return None
        return library

    @staticmethod
    def _intact(folder: Path) -> tuple[dict[str, Any], Path] | None:
        """The record and the library, unless a file is missing, cut short or changed."""
        try:
            record = json.loads((folder / RECORD).read_text())
            library = folder / Path(record["library"]).name
            if record["format"] == FORMAT and digest_of(library.read_bytes()) == record["digest"]:
                return record, library
        except (OSError, ValueError, KeyError, TypeError):
            pass  # half a copy, or another format: as good as absent
        return None

    def _check_private(self) -> None:
        if environment.cache_is_trusted():
            return
        state = self.root.stat()
        others = state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if state.st_uid not in (os.getuid(), 0) or others:
            raise UntrustedCache(
                f"the kernel cache {self.root} can be written by others (owner {state.st_uid}, "
                f"mode {stat.S_IMODE(state.st_mode):o}); "
                f"kernels from it could be anybody's code\n"
                f"  remedy: chmod 700 {self.root}, or set JITK_CACHE_DIR to a folder of your own, or set JITK_CACHE_TRUST=1"
            )


def default_store() -> Store:
    """The store of this user: see ``environment.cache_dir``."""
    return Store(environment.cache_dir())


def dependencies_of(files: Sequence[Path], roots: Mapping[str, Path], ignore: Callable[[Path], bool]) -> list[Dependency]:
    """Name each file by the root that holds it; what no root holds, and ``ignore`` does not drop, by its path from ``/``.

    Roots are searched in order: where an earlier one has no file of that name, its absence is a dependency too.
    """
    found: dict[tuple[str, str], Dependency] = {}
    resolved = {name: folder.resolve() for name, folder in roots.items() if name != "system"}
    order = list(resolved)
    for file in files:
        real = file.resolve()
        root = next((name for name, folder in resolved.items() if folder in real.parents), "system")
        if root == "system" and ignore(real):
            continue
        path = str(real.relative_to(resolved.get(root, Path("/"))))
        for earlier in order[: order.index(root)] if root in resolved else ():
            if not (resolved[earlier] / path).exists():
                found[earlier, path] = Dependency(earlier, path, None)
        digest = digest_of_file(real)
        if digest is not None:
            found[root, path] = Dependency(root, path, digest)
    return [found[place] for place in sorted(found)]
