"""Carries built variants from one store to another in one file, such as into a container image.

    python -m torch_jit_ops cache export kernels.tar.gz
    python -m torch_jit_ops cache import kernels.tar.gz

A bundle is a .tar.gz: first bundle.json with the SHA-256 of every file, then the files. The digests guard against damage, not
against a stranger: a bundle holds code, so import those of people whom you would let run a program.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shutil
import tarfile
import uuid
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch_jit_ops import cache
from torch_jit_ops.inventory import Variant

INDEX = "bundle.json"
FORMAT = 1
# <op>-<digest>/<digest>/<file>. What has another form is refused, so no name can lead out of the store.
_MEMBER = re.compile(
    r"(\w[\w.]*-[0-9a-f]{16}/[0-9a-f]{16})/(\w[\w.-]*\.so|\w[\w.-]*\.cu|\w[\w.-]*\.cpp|variant\.json|build\.log)"
)
# A kernel's library has 0.1 to 3 MB (November 2026).
_LARGEST_FILE = 512 << 20
_LARGEST_BUNDLE = 16 << 30


class BundleError(RuntimeError):
    """A bundle is damaged, or is none. Nothing of it was imported."""


def export_variants(file: Path, variants: Iterable[Variant]) -> int:
    """Write the variants into a new bundle, which replaces ``file`` at once or not at all. Returns how many.

    Raises:
        OSError: it cannot be written.
    """
    contents: dict[str, bytes] = {}
    count = 0
    for variant in variants:
        place = f"{variant.folder.parent.name}/{variant.folder.name}"
        names = [cache.RECORD, variant.library.name, "build.log", *(each.name for each in variant.folder.glob("*.c*"))]
        for name in names:
            if (variant.folder / name).is_file() and _MEMBER.fullmatch(f"{place}/{name}"):
                contents[f"{place}/{name}"] = (variant.folder / name).read_bytes()
        count += 1
    index = {"format": FORMAT, "files": {name: cache.digest_of(data) for name, data in contents.items()}}
    unfinished = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    try:
        # Without a time stamp or a name in it, the same kernels give the same bytes, and so the same layer of an image.
        with (
            unfinished.open("wb") as raw,
            gzip.GzipFile("", "wb", mtime=0, fileobj=raw) as packed,
            tarfile.open(fileobj=packed, mode="w") as archive,
        ):
            for name, data in {INDEX: json.dumps(index, indent=1).encode(), **contents}.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)
    return count


def import_variants(file: Path, store: cache.Store) -> int:
    """Check a whole bundle, then put its variants into the store. Those that are there already stay. Returns how many it holds.

    Raises:
        BundleError: the bundle is cut short, changed, or holds what no store holds.
        OSError: the bundle cannot be read, or the store cannot be written.
    """
    work = store.new_staging()
    try:
        unpacked = _unpack(file, work)
        for name, records in unpacked.items():
            _publish(store, work / name, name, records)
        return len(unpacked)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _unpack(file: Path, work: Path) -> dict[str, dict[str, Any]]:
    """Write the files of a bundle below ``work``. Returns the records of its variants, by their places."""
    places: set[str] = set()
    try:
        # As a stream: each member is looked at before the next, and nothing is ever extracted by the name it asks for.
        with tarfile.open(file, "r|gz") as archive:
            index = archive.next()
            if index is None or index.name != INDEX or not index.isreg():
                raise BundleError(f"{file} is no bundle of kernels: it does not begin with {INDEX}")
            digests = json.loads(_read(file, archive, index))["files"]
            left = dict(digests)
            total = 0
            while (member := archive.next()) is not None:
                form = _MEMBER.fullmatch(member.name)
                if not member.isreg() or form is None or member.name not in left:
                    raise BundleError(f"{file} holds {member.name!r}, which is no file of a kernel that its {INDEX} lists")
                total += member.size
                if total > _LARGEST_BUNDLE:
                    raise BundleError(f"{file} unpacks to more than {_LARGEST_BUNDLE >> 30} GiB")
                data = _read(file, archive, member)
                if cache.digest_of(data) != left.pop(member.name):
                    raise BundleError(f"{file}: {member.name} is not the file that was exported")
                (work / form[1]).mkdir(mode=0o700, parents=True, exist_ok=True)
                with os.fdopen(os.open(work / member.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o700), "wb") as written:
                    written.write(data)
                places.add(form[1])
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{file} is damaged or no bundle of kernels: {error}") from error
    if left:
        raise BundleError(f"{file} is cut short: {len(left)} of {len(digests)} files are missing")
    return {place: _record(file, work / place, place) for place in sorted(places)}


def _read(file: Path, archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > _LARGEST_FILE:
        raise BundleError(f"{file}: {member.name} has {member.size >> 20} MiB, more than any kernel")
    stream = archive.extractfile(member)
    data = stream.read() if stream is not None else b""
    if len(data) != member.size:
        raise BundleError(f"{file} is cut short: {member.name} has {len(data)} of {member.size} bytes")
    return data


def _record(file: Path, folder: Path, place: str) -> dict[str, Any]:
    """The record of a variant, if it fits its place and its files."""
    try:
        record: dict[str, Any] = json.loads((folder / cache.RECORD).read_text())
        fits = (
            record["format"] == cache.FORMAT
            and place.startswith(f"{record['name']}-{record['key'][:16]}/")
            and re.fullmatch(r"\w[\w.-]*\.so", record["library"]) is not None
            and cache.digest_of((folder / record["library"]).read_bytes()) == record["digest"]
            and all(set(item) == {"root", "path", "digest"} for item in record["dependencies"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        fits = False
    if not fits:
        raise BundleError(f"{file}: {place}/{cache.RECORD} does not describe the files beside it")
    return record


def _publish(store: cache.Store, folder: Path, place: str, record: dict[str, Any]) -> None:
    dependencies = [cache.Dependency(**item) for item in record["dependencies"]]
    known = ("format", "key", "library", "digest", "dependencies")
    facts = {name: value for name, value in record.items() if name not in known} | {"imported": True}
    store.publish(folder, record["name"], record["key"], folder / record["library"], dependencies, facts)
    for built in (store.root / place.partition("/")[0]).glob(f"*/{cache.RECORD}"):
        there = json.loads(built.read_text())
        if (there["key"], there["dependencies"]) == (record["key"], record["dependencies"]):
            return
    raise OSError(f"{place} could not be put into {store.root}")
