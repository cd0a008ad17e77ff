"""Files that nobody else can write, and that nobody finds half written.

Whoever can write a kernel can run code as the user who loads it. So folders are made for this user alone, whatever the umask,
and a folder or file that another user could have written is refused. What is written replaces what was there by one rename.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import pwd
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from torch_jit_ops import environment

# cpp_extension quotes some paths for the shell, and none for ninja; compilers write them into depfiles as they please.
_PLAIN = re.compile(r"[A-Za-z0-9/._+~-]+")
_MOST_LINKS = 40  # as many as Linux follows


class UntrustedCache(RuntimeError):
    """The cache could be written by others: a kernel from it could be anybody's code."""


def is_plain(path: str | Path) -> bool:
    """Whether every build tool takes the path as it is, without quotes."""
    return _PLAIN.fullmatch(str(path)) is not None


def make_private(folder: Path) -> None:
    """Make ``folder``, and what is missing above it, with mode 0700. What exists stays as it is.

    Raises:
        OSError: it cannot be made.
    """
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        if not stat.S_ISDIR(os.lstat(folder).st_mode):  # nor a link to one, which somebody may have put there
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None
        return
    except FileNotFoundError:
        make_private(folder.parent)
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.mkdir(folder, 0o700)
    os.chmod(folder, 0o700)  # a umask may have taken the user's own rights


def make_files_private(folder: Path) -> None:
    """Take from others the right to write the files of ``folder``, which compilers made with whatever umask there was."""
    for entry in os.scandir(folder):
        if entry.is_file(follow_symlinks=False):
            os.chmod(entry.path, entry.stat().st_mode & 0o755 | stat.S_IRUSR | stat.S_IWUSR)


def write_file(path: Path, data: bytes) -> None:
    """Write a new file for this user alone. What is there already, a link too, is an error.

    Raises:
        OSError: it cannot be written.
    """
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
        file.write(data)


def replace_file(path: Path, data: bytes) -> None:
    """Put a new file in the place of ``path``: whoever opens it finds the old or the new one, whole.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as new:
        write_file(new, data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` for the block to make a file or folder of, which then takes the place of ``path``.

    If the block fails, what was there stays. A folder gives way a moment before the new one is there, as none can be replaced.

    Raises:
        OSError: it cannot be written.
    """
    new = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        yield new
        if new.is_dir() and path.exists():
            old = new.with_name(f"{new.name}.old")
            os.rename(path, old)
            os.rename(new, path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            shutil.rmtree(new) if new.is_dir() else os.unlink(new)
        raise


def check(root: Path, *paths: Path) -> None:
    """Refuse what others could have written, or could put something else in the place of. ``paths`` lie under ``root``.

    Raises:
        UntrustedCache: a path, or a folder above the root, belongs to neither this user nor root, or others may write it. Above
            the root a folder may be one in which nobody can remove what is another's, such as /tmp.
        OSError: a path is not there, or is a link.
    """
    check_above(root)
    check_inside(root, *paths, root=root)


def check_inside(*paths: str | Path, root: Path) -> None:
    """``check`` for paths under a root that was checked."""
    if environment.cache_is_trusted():
        return
    for path in paths:
        state = os.stat(path, follow_symlinks=path is root)
        if stat.S_ISLNK(state.st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        if state.st_uid not in _trusted():
            raise UntrustedCache(_of_another(state, f"the kernel cache {path}"))
        if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise UntrustedCache(
                f"the kernel cache {path} can be written by others (mode {stat.S_IMODE(state.st_mode):o}), "
                "so a kernel from it could be anybody's code\n"
                f"  remedy: delete {root}, or if you trust what is in it: chmod -R go-w {root}, or JITK_CACHE_TRUST=1"
            )


def check_above(root: Path) -> None:
    """Refuse a root in whose place others could put something else, whether it is there or not.

    Raises:
        UntrustedCache: as for ``check``.
    """
    if not environment.cache_is_trusted():
        for path, state in _way_to(str(root)):
            _check_above(root, path, state)


def _check_above(root: Path, path: str, state: os.stat_result) -> None:
    if state.st_uid not in _trusted():
        raise UntrustedCache(_of_another(state, f"{path}, on the way to the kernel cache {root},"))
    others = state.st_mode & stat.S_IWOTH or (state.st_mode & stat.S_IWGRP and not _is_own_group(state.st_gid))
    if stat.S_ISDIR(state.st_mode) and others and not state.st_mode & stat.S_ISVTX:
        raise UntrustedCache(
            f"{path}, on the way to the kernel cache {root}, can be written by others (mode {stat.S_IMODE(state.st_mode):o}), "
            "so a kernel from it could be anybody's code\n"
            f"  remedy: chmod go-w {path}, or set JITK_CACHE_DIR to a folder elsewhere, or JITK_CACHE_TRUST=1"
        )


def _of_another(state: os.stat_result, who: str) -> str:
    return (
        f"{who} belongs to another user (uid {state.st_uid}), so a kernel from it could be anybody's code\n"
        "  remedy: set JITK_CACHE_DIR to a folder of your own, or JITK_CACHE_TRUST=1 if you trust that user"
    )


def _trusted() -> tuple[int, int]:
    return os.getuid(), 0


def _way_to(path: str) -> Iterator[tuple[str, os.stat_result]]:
    """The folders and links that the system passes on its way to ``path``, without the last, as far as there are any."""
    here, left, links = "/", path.split("/")[::-1], 0
    yield here, os.lstat(here)
    while left:
        part = left.pop()
        if part in ("", "."):
            continue
        if part == "..":
            here = os.path.dirname(here)
            continue
        step = os.path.join(here, part)
        try:
            state = os.lstat(step)
            target = os.readlink(step) if stat.S_ISLNK(state.st_mode) else None
        except OSError:
            return
        if target is None:
            if any(part for part in left):
                yield step, state
            here = step
        else:
            yield step, state
            links += 1
            if links > _MOST_LINKS:
                return
            here = "/" if target.startswith("/") else here
            left += target.split("/")[::-1]


def _is_own_group(group: int) -> bool:
    """Whether nobody but this user is in the group, as where each user has a group of the same name."""
    with contextlib.suppress(KeyError):
        known, me = grp.getgrgid(group), pwd.getpwuid(os.getuid())
        return group == me.pw_gid != 0 and known.gr_name == me.pw_name and set(known.gr_mem) <= {me.pw_name}
    return False
