"""The folder of a built variant: what its ``variant.json`` says, and whether the library is still the one that was built."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

from torch_jit_ops import backends
from torch_jit_ops.store import files, forms
from torch_jit_ops.store.digests import LARGEST_FILE, digest_of

RECORD = "variant.json"
LOG = "build.log"
FORMAT = 1
DISPATCHER = "runtime"  # how the names of its units begin
# Of this moment or this process, and not of the file: no reason to build it again.
_PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EIO, errno.ESTALE)
NAME = r"\w[\w.]*"  # of a unit, as jitk.silu_and_mul
LIBRARY = r"\w[\w.-]*\.so"
SHA256 = forms.text("[0-9a-f]{64}")
LARGEST_RECORD = 4 << 20
_ROOT = r"include\d{1,4}|jitk|system"
_PATH = r"(?s)(?!/)(?!(.*/)?\.\.?(/|\Z))[^\0]+"
_LONGEST_PATH = 4096
_DEPENDENCIES = forms.each(
    forms.fields(root=forms.text(_ROOT), path=forms.text(_PATH, _LONGEST_PATH), digest=forms.optional(SHA256))
)
_is_root = re.compile(_ROOT, re.ASCII).fullmatch
_is_path = re.compile(_PATH, re.ASCII).fullmatch
_is_digest = re.compile("[0-9a-f]{64}").fullmatch


def _dependencies(value: object) -> None:
    """What ``_DEPENDENCIES`` says, in a tenth of its time where all is well: there may be 700 of them in front of a call."""
    if isinstance(value, list) and len(value) <= 100_000 and all(map(_is_dependency, value)):
        return
    _DEPENDENCIES(value)


def _is_dependency(item: object) -> bool:
    if not isinstance(item, dict) or len(item) != 3:
        return False
    root, path, digest = item.get("root"), item.get("path"), item.get("digest", 0)
    return (
        isinstance(root, str)
        and isinstance(path, str)
        and (digest is None or (isinstance(digest, str) and _is_digest(digest) is not None))
        and len(path) <= _LONGEST_PATH
        and _is_root(root) is not None
        and _is_path(path) is not None
    )


_FORMAT = forms.fields(others=True, format=forms.whole())
TIMES = forms.fields(others=True, name=forms.text(NAME), backend=forms.one_of(*backends.NAMES), seconds=forms.seconds)
_RECORD = forms.fields(
    format=forms.one_of(FORMAT),
    key=SHA256,
    library=forms.text(LIBRARY),
    digest=SHA256,
    dependencies=_dependencies,
    name=forms.text(NAME),
    label=forms.text(r"(?s).+"),
    backend=forms.one_of(*backends.NAMES),
    arch=forms.either(*(forms.text(backend.arch_form) for backend in backends.ALL)),
    flags=forms.each(forms.text(r"(?s).*")),
    compiler=forms.optional(forms.text(r"(?s).*", 1 << 16)),
    abi=forms.whole(),
    torch=forms.optional(forms.text(r".+")),
    seconds=forms.seconds,
    python=forms.text(r"[\w.-]+", 100),
    imported=forms.one_of(True),
    missing=("imported", "python"),
)


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


def read(folder: Path, root: Path) -> dict[str, Any] | None:
    """The record of the variant in a folder of the store with this root; None if it is of another format.

    Raises:
        OSError: it cannot be read.
        Malformed: it is none.
        UntrustedCache: others could have written it; the root itself is not looked at.
    """
    file = f"{folder}/{RECORD}"
    files.check_inside(folder, file, root=root)
    return parse_record(forms.read(file, LARGEST_RECORD))


def examine(folder: Path, root: Path) -> tuple[dict[str, Any] | None, str | None]:
    """The record, or what is wrong with it; neither if it is of another format, or cannot be read just now."""
    try:
        return read(folder, root), None
    except NotADirectoryError:
        return None, None
    except FileNotFoundError:
        return None, f"{RECORD} is missing" if folder.is_dir() else None
    except OSError as error:
        return None, None if error.errno in _PASSING else f"{RECORD} cannot be read"
    except forms.Malformed:
        return None, f"{RECORD} cannot be read"


def intact(folder: Path, root: Path, record: dict[str, Any]) -> tuple[Path | None, str | None]:
    """The library, unless it is missing, cut short or changed; or what is wrong."""
    library = folder / record["library"]
    try:
        files.check_inside(library, root=root)
        if digest_of(forms.read(library, LARGEST_FILE)) == record["digest"]:
            return library, None
        return None, f"{library.name} is not the file that was built"
    except OSError as error:
        return None, None if error.errno in _PASSING else f"{library.name}: {error.strerror}"
    except forms.Malformed as error:
        return None, f"{library.name}: {error}"
