"""The files that a compiler read for a variant: recorded so that a moved checkout matches, and a changed header does not."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch_jit_ops.store import digests


@dataclass(frozen=True)
class Dependency:
    """A file that the compiler read. ``root`` names a folder (``include0``), so that a moved checkout still matches.

    Without a digest it is a file that was not there, and that the compiler would have read in place of another.
    """

    root: str
    path: str
    digest: str | None


def are_unchanged(recorded: Sequence[Mapping[str, str | None]], roots: Mapping[str, Path], notes: Path) -> bool:
    """Whether each file is as its record says.

    Args:
        recorded: ``Dependency`` of each, as a dict.
        roots: where each root is on this machine.
        notes: the store that keeps what is known of files (``digests.indexed``).
    """
    by_root: dict[str, list[tuple[str, str | None]]] = {}
    for item in recorded:
        by_root.setdefault(str(item["root"]), []).append((f"{roots.get(str(item['root']))}/{item['path']}", item["digest"]))
    for name, files in by_root.items():
        if name not in roots:
            return False
        with digests.indexed(notes, str(roots[name]), [path for path, _ in files]):
            if any(digests.digest_of_file(path) != digest for path, digest in files):
                return False
    return True


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
        digest = digests.digest_of_file(real)
        if digest is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(real))
        found[root, path] = Dependency(root, path, digest)
    return [found[place] for place in sorted(found)]


def states_of(folders: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Path, size and time stamp of every file below the folders: where they are equal, nothing has changed meanwhile."""
    files = (Path(top, name) for folder in folders for top, _, names in os.walk(folder) for name in names)
    states = []
    for file in files:
        with contextlib.suppress(OSError):
            state = file.stat()
            states.append((str(file), state.st_size, state.st_mtime_ns))
    return sorted(states)
