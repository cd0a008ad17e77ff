"""Carries built variants from one store to another in one file, such as into a container image.

    python -m torch_jit_ops cache export kernels.tar.gz
    python -m torch_jit_ops cache import kernels.tar.gz

A bundle is a .tar.gz: first bundle.json with the SHA-256 of every file, then the files. The digests guard against damage, not
against a stranger: a bundle holds code, so import those of people whom you would let run a program.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch_jit_ops.store import files, forms, prune, record
from torch_jit_ops.store.dependencies import Dependency
from torch_jit_ops.store.digests import LARGEST_FILE, digest_of
from torch_jit_ops.store.listing import Variant
from torch_jit_ops.store.record import LARGEST_RECORD, LIBRARY, NAME, RECORD, SHA256, parse_record
from torch_jit_ops.store.store import Store

INDEX = "bundle.json"
FORMAT = 1
# <op>-<digest>/<digest>/<file>. What has another form is refused, so no name can lead out of the store.
_FORM = rf"({NAME}-[0-9a-f]{{16}}/[0-9a-f]{{16}})/({LIBRARY}|\w[\w.-]*\.cu|\w[\w.-]*\.cpp|variant\.json|build\.log)"
_MEMBER = re.compile(_FORM, re.ASCII)
_LARGEST_NAME = 1 << 12
_INDEX = forms.fields(format=forms.one_of(FORMAT), files=forms.table(forms.text(r"(?s).+", _LARGEST_NAME), SHA256))
_LARGEST_INDEX = 16 << 20
_LARGEST_BUNDLE = 16 << 30
_BLOCK = 512  # of a tar file


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
        names = [RECORD, variant.library.name, "build.log", *(each.name for each in variant.folder.glob("*.c*"))]
        for name in names:
            if (variant.folder / name).is_file() and _MEMBER.fullmatch(f"{place}/{name}"):
                contents[f"{place}/{name}"] = (variant.folder / name).read_bytes()
        count += 1
    index = {"format": FORMAT, "files": {name: digest_of(data) for name, data in contents.items()}}
    # Without a time stamp or a name in it, the same kernels give the same bytes, and so the same layer of an image.
    with (
        files.replacing(file) as unfinished,
        unfinished.open("wb") as raw,
        gzip.GzipFile("", "wb", mtime=0, fileobj=raw) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for name, data in {INDEX: json.dumps(index, indent=1).encode(), **contents}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return count


def import_variants(file: Path, store: Store) -> int:
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
    # Of kernels a tenth is left. What unpacks to a thousand times its size holds none.
    most = min(_LARGEST_BUNDLE, (64 << 20) + 100 * file.stat().st_size)
    try:
        # As a stream: each member is looked at before it is read, and nothing is ever written by the name that it asks for.
        with gzip.open(file) as archive:
            index = _next(file, archive)
            if index is None or index.name != INDEX or not index.isreg():
                raise BundleError(f"{file} is no bundle of kernels: it does not begin with {INDEX}")
            digests = forms.parse(_read(file, archive, index, _LARGEST_INDEX), _INDEX)["files"]
            left = dict(digests)
            total = 0
            while (member := _next(file, archive)) is not None:
                form = _MEMBER.fullmatch(member.name)
                if not member.isreg() or form is None or member.name not in left:
                    raise BundleError(f"{file} holds {member.name!r}, which is no file of a kernel that its {INDEX} lists")
                total += member.size
                if total > most:
                    raise BundleError(f"{file} unpacks to more than {most >> 20} MiB, more than kernels do")
                data = _read(file, archive, member, LARGEST_FILE)
                if digest_of(data) != left.pop(member.name):
                    raise BundleError(f"{file}: {member.name} is not the file that was exported")
                (work / form[1]).mkdir(mode=0o700, parents=True, exist_ok=True)
                files.write_file(work / member.name, data)
                places.add(form[1])
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, forms.Malformed, UnicodeError) as error:
        raise BundleError(f"{file} is damaged or no bundle of kernels: {forms.printable(error)}") from error
    if left:
        raise BundleError(f"{file} is cut short: {len(left)} of {len(digests)} files are missing")
    return {place: _record(file, work / place, place) for place in sorted(places)}


def _next(file: Path, archive: gzip.GzipFile) -> tarfile.TarInfo | None:
    """The header of the next member, None at the end. A long name or size may come before it, and nothing else."""
    longer: dict[str, str] = {}
    while True:
        block = archive.read(_BLOCK)
        if not block.strip(b"\0"):
            return None
        member = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        if longer or member.type not in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            member.name = longer.get("path", member.name)
            member.size = int(longer.get("size", member.size))
            return member
        text = _read(file, archive, member, _LARGEST_NAME)
        longer = _pax(file, text) if member.type == tarfile.XHDTYPE else {"path": text.rstrip(b"\0").decode()}


def _pax(file: Path, text: bytes) -> dict[str, str]:
    """The records of an extended header: each its own length, a space, ``name=value`` and a newline."""
    found = {}
    while text:
        form = re.match(rb"(\d{1,4}) (path|size)=", text)
        record = text[: int(form[1])] if form else b""
        if form is None or len(record) != int(form[1]) or len(record) <= form.end() or not record.endswith(b"\n"):
            raise BundleError(f"{file} is damaged or no bundle of kernels: a header holds more than a name and a size")
        found[form[2].decode()] = record[form.end() : -1].decode()
        text = text[len(record) :]
    if not re.fullmatch(r"\d{1,18}", found.get("size", "0"), re.ASCII):
        raise BundleError(f"{file} is damaged or no bundle of kernels: {found['size']!r} is no size")
    return found


def _read(file: Path, archive: gzip.GzipFile, member: tarfile.TarInfo, largest: int) -> bytes:
    if member.size > largest:
        raise BundleError(f"{file}: {member.name} has {member.size >> 20} MiB, more than any kernel")
    size = -(-member.size // _BLOCK) * _BLOCK
    data = archive.read(size)
    if len(data) != size:
        raise BundleError(f"{file} is cut short: {member.name} has {len(data)} of {member.size} bytes")
    return data[: member.size]


def _record(file: Path, folder: Path, place: str) -> dict[str, Any]:
    """The record of a variant, if it fits its place and its files."""
    found = None
    try:
        found = parse_record(forms.read(folder / RECORD, LARGEST_RECORD))
        fits = (
            found is not None
            and place.startswith(f"{found['name']}-{found['key'][:16]}/")
            and digest_of(forms.read(folder / found["library"], LARGEST_FILE)) == found["digest"]
        )
    except (OSError, forms.Malformed):
        fits = False
    if found is None or not fits:
        raise BundleError(f"{file}: {place}/{RECORD} does not describe the files beside it")
    return found


def _publish(store: Store, folder: Path, place: str, given: dict[str, Any]) -> None:
    dependencies = [Dependency(**item) for item in given["dependencies"]]
    known = ("format", "key", "library", "digest", "dependencies")
    facts = {name: value for name, value in given.items() if name not in known} | {"imported": True}
    store.publish(folder, given["name"], given["key"], folder / given["library"], dependencies, facts)
    for built in prune.folders(store.root / place.partition("/")[0]):
        with contextlib.suppress(OSError, forms.Malformed):
            there = record.read(built, store.root)
            if there is not None and (there["key"], there["dependencies"]) == (given["key"], given["dependencies"]):
                return
    raise OSError(f"{place} could not be put into {store.root}")
