"""Keeps others out of the kernel cache: whoever can write a kernel can run code as the user who loads it.

Folders are made for this user alone, whatever the umask; a folder or file that another user could have written is refused.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

from torch_jit_ops import environment


class UntrustedCache(RuntimeError):
    """The cache could be written by others: a kernel from it could be anybody's code."""


def make_private(folder: Path) -> None:
    """Make ``folder``, and what is missing above it, with mode 0700. What exists stays as it is.

    Raises:
        OSError: it cannot be made.
    """
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        if not folder.is_dir():
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


def check(root: Path, *paths: Path) -> None:
    """Refuse what others could have written. ``paths`` lie under ``root``.

    Raises:
        UntrustedCache: a path belongs to neither this user nor root, or its group or others may write it.
        OSError: a path is not there.
    """
    if environment.cache_is_trusted():
        return
    mine = (os.getuid(), 0)
    for path in (root, *paths):
        state = os.stat(path)
        if state.st_uid not in mine:
            raise UntrustedCache(
                f"the kernel cache {path} belongs to another user (uid {state.st_uid}), "
                "so a kernel from it could be anybody's code\n"
                "  remedy: set JITK_CACHE_DIR to a folder of your own, or JITK_CACHE_TRUST=1 if you trust that user"
            )
        if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise UntrustedCache(
                f"the kernel cache {path} can be written by others (mode {stat.S_IMODE(state.st_mode):o}), "
                "so a kernel from it could be anybody's code\n"
                f"  remedy: delete {root}, or if you trust what is in it: chmod -R go-w {root}, or JITK_CACHE_TRUST=1"
            )
