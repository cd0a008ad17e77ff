"""The store of built variants: content-addressed, private, and safe without a lock.

A variant's folder is found by two digests. The first is of everything that is known before compiling: the translation unit, the
flags, the architecture, the ABI. The second is of the files that the compiler really read. So a changed header rebuilds its
readers and nothing else, and no path or time stamp matters.

    <root>/<op>-<digest>/<digest of the files read>/   variant.json, the library, the translation unit, the log
    <root>/staging/    builds under way; a finished one is renamed into its place
    <root>/locks/      see lock.py
    <root>/compilers/  see toolchain.compiler_identity
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch_jit_ops import environment, forks, progress
from torch_jit_ops.backends import toolchain
from torch_jit_ops.builder import workarounds
from torch_jit_ops.store import forms, lock, prune, trust
from torch_jit_ops.store.trust import UntrustedCache as UntrustedCache

RECORD = "variant.json"
LOG = "build.log"
FORMAT = 1
_PRUNE_EVERY_S = 60.0

DISPATCHER = "runtime"  # how the names of its units begin
# Of this moment or this process, and not of the file: no reason to build it again.
_PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EIO, errno.ESTALE)
NAME = r"\w[\w.]*"  # of a unit, as jitk.silu_and_mul
LIBRARY = r"\w[\w.-]*\.so"
SHA256 = forms.text("[0-9a-f]{64}")
LARGEST_RECORD = 4 << 20
LARGEST_FILE = 512 << 20  # a kernel's library has 0.1 to 3 MB, a source less (November 2026)
_FORMAT = forms.fields(others=True, format=forms.whole())
_TIMES = forms.fields(others=True, name=forms.text(NAME), backend=forms.one_of("cuda", "cpu"), seconds=forms.seconds)
_RECORD = forms.fields(
    format=forms.one_of(FORMAT),
    key=SHA256,
    library=forms.text(LIBRARY),
    digest=SHA256,
    dependencies=forms.each(
        forms.fields(
            root=forms.text(r"include\d{1,4}|jitk|system"),
            path=forms.text(r"(?s)(?!/)(?!(.*/)?\.\.?(/|\Z))[^\0]+"),
            digest=forms.optional(SHA256),
        )
    ),
    name=forms.text(NAME),
    label=forms.text(r"(?s).+"),
    backend=forms.one_of("cuda", "cpu"),
    arch=forms.either(forms.text(toolchain.CPU_ARCH), forms.text(environment.CUDA_ARCH)),
    flags=forms.each(forms.text(r"(?s).*")),
    compiler=forms.optional(forms.text(r"(?s).*", 1 << 16)),
    abi=forms.whole(),
    torch=forms.optional(forms.text(r".+")),
    seconds=forms.seconds,
    imported=forms.one_of(True),
    missing=("imported",),
)


@dataclass(frozen=True)
class Dependency:
    """A file that the compiler read. ``root`` names a folder (``include0``), so that a moved checkout still matches.

    Without a digest it is a file that was not there, and that the compiler would have read in place of another.
    """

    root: str
    path: str
    digest: str | None


def digest_of(data: bytes | str) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def digest_of_record(record: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return digest_of(json.dumps(record, sort_keys=True))


_file_digests: dict[tuple[str, int, int], str] = {}


def digest_of_file(path: str | Path) -> str | None:
    """SHA-256 of a plain file, or None if there is none. Read once for each size and time stamp in this process."""
    try:
        state = os.stat(path)
        key = (str(path), state.st_size, state.st_mtime_ns)
        if key not in _file_digests:
            _file_digests[key] = digest_of(forms.read(path, LARGEST_FILE, follow=True))
        return _file_digests[key]
    except (OSError, ValueError):  # a path with a NUL; no plain file
        return None


def forget_digests() -> None:
    """Read every file again when its digest is asked for: an edit may leave size and time stamp as they were."""
    _file_digests.clear()


def parse_record(data: bytes) -> dict[str, Any] | None:
    """What a ``variant.json`` holds; None if it is of another format.

    Raises:
        Malformed: it is none.
    """
    record: dict[str, Any] = forms.parse(data, _FORMAT)
    if record["format"] != FORMAT:
        return None
    _RECORD(record)
    return record


def states_of(folders: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Path, size and time stamp of every file below the folders: where they are equal, nothing has changed meanwhile."""
    files = (Path(top, name) for folder in folders for top, _, names in os.walk(folder) for name in names)
    states = []
    for file in files:
        with contextlib.suppress(OSError):
            state = file.stat()
            states.append((str(file), state.st_size, state.st_mtime_ns))
    return sorted(states)


class Store:
    """The variants under one root.

    Args:
        root: the folder; need not exist.
        shared: it is only read.
    """

    def __init__(self, root: Path, *, shared: bool = False) -> None:
        self.root = root
        self.shared = shared

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
            trust.check(self.root, folder)
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
        trust.check_above(self.root)
        trust.make_private(self.root)
        trust.check_inside(self.root, root=self.root)
        trust.make_private(self.root / name)
        trust.check_inside(self.root / name, root=self.root)
        return self.root / name

    def new_staging(self) -> Path:
        """A new private folder in this store, whose name says who made it.

        Raises:
            OSError: the store cannot be written.
            UntrustedCache: others could write it.
        """
        folder = self.own_folder("staging") / f"{os.getpid()}_{lock.system()}_{uuid.uuid4().hex[:12]}"
        trust.make_private(folder)
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
        return workarounds.is_plain(self.root) and self.runs_programs()

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
        self, staging: Path, name: str, key: str, library: Path, dependencies: Sequence[Dependency], facts: Mapping[str, Any]
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
        record = {
            "format": FORMAT,
            "key": key,
            "library": library.name,
            "digest": digest_of(library.read_bytes()),
            "dependencies": [asdict(dependency) for dependency in dependencies],
            **facts,
        }
        place = self._folder(name, key) / digest_of_record([record["dependencies"], record.get("compiler")])[:16]
        try:
            trust.replace_file(staging / RECORD, json.dumps(record, indent=1).encode())
            trust.make_files_private(staging)
            if os.path.lexists(place.parent) and not stat.S_ISDIR(os.lstat(place.parent).st_mode):
                self.remove(place.parent)
            trust.make_private(place.parent)
            try:
                os.rename(staging, place)
            except OSError:
                there, _ = self._read(place)
                same = there is not None and all(
                    there[name] == record[name] for name in ("key", "dependencies", "compiler") if name in record
                )
                first, _ = self._intact(place, there) if same else (None, None)
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
            _until_exit(staging)
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
                record = forms.parse(forms.read(folder / RECORD, LARGEST_RECORD), _TIMES)
                if record["backend"] != backend:
                    continue
                if record["name"] == name:
                    same.append(record["seconds"])
                elif not name.startswith(DISPATCHER) and not record["name"].startswith(DISPATCHER):
                    other.append(record["seconds"])
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
        record, damage = self._read(folder)
        if record is None:
            return None, damage
        # What somebody put there on purpose, from a machine that may have had other compilers, is meant to be used.
        given = self.shared or record.get("imported") is True
        if record.get("key") != key or (compiler is not None and record.get("compiler") != compiler and not given):
            return None, None
        for item in record["dependencies"]:
            root = roots.get(item["root"])  # joined as texts: pathlib would take as long as all the rest
            if root is None or digest_of_file(f"{root}/{item['path']}") != item["digest"]:
                return None, None
        library, damage = self._intact(folder, record)
        if library is not None and not self.shared:
            self._touch(folder / RECORD)
        return library, damage

    def record(self, folder: Path) -> dict[str, Any] | None:
        """The record of a variant; None if it is of another format.

        Raises:
            OSError: it cannot be read.
            Malformed: it is none.
            UntrustedCache: others could have written it; the root itself is not looked at.
        """
        file = f"{folder}/{RECORD}"
        trust.check_inside(folder, file, root=self.root)
        return parse_record(forms.read(file, LARGEST_RECORD))

    def _read(self, folder: Path) -> tuple[dict[str, Any] | None, str | None]:
        """The record, or what is wrong with it; neither if it is of another format, or cannot be read just now."""
        try:
            return self.record(folder), None
        except NotADirectoryError:
            return None, None
        except FileNotFoundError:
            return None, f"{RECORD} is missing" if folder.is_dir() else None
        except OSError as error:
            return None, None if error.errno in _PASSING else f"{RECORD} cannot be read"
        except forms.Malformed:
            return None, f"{RECORD} cannot be read"

    def _intact(self, folder: Path, record: dict[str, Any] | None = None) -> tuple[Path | None, str | None]:
        """The library, unless it is missing, cut short or changed; or what is wrong."""
        if record is None:
            record, damage = self._read(folder)
            if record is None:
                return None, damage
        library = folder / record["library"]
        try:
            trust.check_inside(library, root=self.root)
            if digest_of(forms.read(library, LARGEST_FILE)) == record["digest"]:
                return library, None
            return None, f"{library.name} is not the file that was built"
        except OSError as error:
            return None, None if error.errno in _PASSING else f"{library.name}: {error.strerror}"
        except forms.Malformed as error:
            return None, f"{library.name}: {error}"

    @staticmethod
    def _touch(record: Path) -> None:
        """Note, once a day, that a variant is in use: ``prune`` reads the time stamp of its record."""
        with contextlib.suppress(OSError):
            now = time.time()
            if abs(now - os.stat(record).st_mtime) > prune.DAY_S:
                os.utime(record, (now, now))

    def _warn(self, what: str) -> None:
        with _warned_lock:
            if self.root in _warned:
                return
            _warned.add(self.root)
        warnings.warn(forms.printable(f"the kernel cache {self.root} {what}"), stacklevel=2)


_warned: set[Path] = set()
_warned_lock = forks.Lock()


def temporary_folder() -> Path:
    """A new private folder, which goes with this process.

    Raises:
        OSError: there is no folder for temporary files.
        RuntimeError: compilers cannot work in it.
        UntrustedCache: others could put something else in its place.
    """
    above = os.path.abspath(tempfile.gettempdir())
    if not workarounds.is_plain(above):
        raise RuntimeError(
            f"kernels cannot be built in the folder for temporary files, {forms.printable(above)!r}: the build tools bear only "
            "letters, digits and /._+-~ in its name\n  remedy: set TMPDIR to another folder"
        )
    trust.check_above(Path(above, "jitk"))
    return _until_exit(Path(tempfile.mkdtemp(prefix="jitk-", dir=above)))


def _until_exit(folder: Path) -> Path:
    """Remove the folder when this process ends, unless it holds the log of a failed build, or was renamed by then."""
    made_by = os.getpid()

    def remove() -> None:
        if os.getpid() == made_by and (not (folder / LOG).exists() or (folder / RECORD).exists()):
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def default_store() -> Store:
    """The store of this user: see ``environment.cache_dir``. Without a home it is temporary, with one warning."""
    return Store(environment.cache_dir() or _homeless())


@functools.cache
def _homeless() -> Path:
    warnings.warn(
        f"the user of this process (uid {os.getuid()}) has no home folder, so kernels are built again in every process. "
        "Set JITK_CACHE_DIR to a folder with space that can be written",
        stacklevel=2,
    )
    return temporary_folder()


def stores() -> tuple[Store, ...]:
    """The stores to search, in this order: those of ``JITK_CACHE_PATH``, then this user's."""
    return (*(Store(root, shared=True) for root in environment.cache_path()), default_store())


def dependencies_of(files: Sequence[Path], roots: Mapping[str, Path], ignore: Callable[[Path], bool]) -> list[Dependency]:
    """Name each file by the root that holds it; what no root holds, and ``ignore`` does not drop, by its path from ``/``.

    Roots are searched in order: where an earlier one has no file of that name, its absence is a dependency too.

    Raises:
        OSError: a file is gone, or cannot be read as a whole: a change of it would go unnoticed.
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
        if digest is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(real))
        found[root, path] = Dependency(root, path, digest)
    return [found[place] for place in sorted(found)]
