"""Bundles: kernels that travel, and files that pretend to be kernels."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torch_jit_ops.backends import CPU
from torch_jit_ops.builder import shared_object
from torch_jit_ops.builder.load import load
from torch_jit_ops.builder.unit import Unit
from torch_jit_ops.store import bundle, listing
from torch_jit_ops.store.digests import digest_of
from torch_jit_ops.store.store import Store

UNIT = Unit(
    "bundled.answer",
    "bundled::answer",
    CPU,
    "x86-64",
    'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n',
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with one small variant."""
    store = Store(tmp_path_factory.mktemp("bundles") / "from")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JITK_CACHE_DIR", str(store.root))
        load(UNIT)
    return store


@pytest.fixture
def exported(built: Store, tmp_path: Path) -> Path:
    file = tmp_path / "kernels.tar.gz"
    assert bundle.export_variants(file, listing.variants(built)) == 1
    return file


def found(store: Store) -> Path | None:
    return store.find(UNIT.name, UNIT.key(), UNIT.roots(), None)


def test_a_variant_travels(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "to")
    for _ in range(2):  # what is there already stays
        assert bundle.import_variants(exported, store) == 1
    library = found(store)
    assert library is not None
    assert shared_object.open_library(library).answer() == 42
    assert list((store.root / "staging").iterdir()) == []
    monkeypatch.setenv("JITK_CACHE_DIR", str(store.root))
    assert not load(UNIT).compiled
    assert [variant.record for variant in listing.variants(store)] == [
        json.loads((library.parent / "variant.json").read_text())
    ]


def test_the_same_kernels_give_the_same_bytes(exported: Path, built: Store, tmp_path: Path) -> None:
    bundle.export_variants(tmp_path / "again", listing.variants(built))
    assert (tmp_path / "again").read_bytes() == exported.read_bytes()


def test_a_damaged_variant_is_replaced(exported: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "to")
    bundle.import_variants(exported, store)
    found(store).write_bytes(b"")
    bundle.import_variants(exported, store)
    assert found(store) is not None


def test_export_takes_the_ops_that_are_named(built: Store) -> None:
    assert [variant.op for variant in listing.variants(built, ["answer"])] == ["bundled::answer"]
    assert [variant.op for variant in listing.variants(built, ["bundled::answer"])] == ["bundled::answer"]
    assert list(listing.variants(built, ["bundled"])) == []


def test_a_failed_export_leaves_what_was_there(built: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "kernels.tar.gz"
    file.write_bytes(b"before")
    monkeypatch.setattr(tarfile.TarFile, "addfile", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        bundle.export_variants(file, listing.variants(built))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"kernels.tar.gz": b"before"}


# --- hostile bundles -------------------------------------------------------------------------------

Members = list[tuple[tarfile.TarInfo, bytes]]


def members_of(file: Path) -> Members:
    with tarfile.open(file) as archive:
        return [(member, archive.extractfile(member).read()) for member in archive]


def packed(members: Members) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as archive:
        for member, data in members:
            archive.addfile(member, io.BytesIO(data))
    return raw.getvalue()


def entry(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, len(data)
    return info, data


def listed(members: Members) -> Members:
    """With an index that vouches for all of them: only their names and kinds are wrong."""
    files = {info.name: digest_of(data) for info, data in members[1:]}
    return [entry(bundle.INDEX, json.dumps({"format": 1, "files": files}).encode()), *members[1:]]


def replaced(members: Members, ending: str, change: Callable[[bytes], bytes]) -> Members:
    """Another content, of which the index knows nothing."""
    return [entry(info.name, change(data)) if info.name.endswith(ending) else (info, data) for info, data in members]


def other_record(**changes: Any) -> Callable[[Members], Members]:
    def change(data: bytes) -> bytes:
        return json.dumps({**json.loads(data), **changes}).encode()

    return lambda members: listed(replaced(members, "variant.json", change))


def place_of(members: Members) -> str:
    return members[1][0].name.rpartition("/")[0]


HOSTILE: dict[str, tuple[Callable[[Members], Members], str]] = {
    "a way out": (lambda m: listed([*m, entry("../escaped.so", b"x")]), "holds '../escaped.so', which is no file"),
    "a long way out": (
        lambda m: listed([*m, entry(f"{place_of(m)}/../../../escaped.so", b"x")]),
        r"escaped\.so', which is no file of a kernel",
    ),
    "an absolute name": (lambda m: listed([*m, entry("/tmp/escaped.so", b"x")]), "holds '/tmp/escaped.so', which is no file"),
    "a symbolic link": (
        lambda m: listed([*m, entry(f"{place_of(m)}/link.so", kind=tarfile.SYMTYPE, target="/etc/passwd")]),
        r"link\.so', which is no file",
    ),
    "a folder that is a link": (
        lambda m: listed([m[0], entry(place_of(m), kind=tarfile.SYMTYPE, target="/tmp"), *m[1:]]),
        "which is no file",
    ),
    "a hard link": (
        lambda m: listed([*m, entry(f"{place_of(m)}/link.so", kind=tarfile.LNKTYPE, target="../../../secret")]),
        r"link\.so', which is no file",
    ),
    "a device": (lambda m: listed([*m, entry(f"{place_of(m)}/tty.so", kind=tarfile.CHRTYPE)]), r"tty\.so', which is no file"),
    "a pipe": (lambda m: listed([*m, entry(f"{place_of(m)}/pipe.so", kind=tarfile.FIFOTYPE)]), r"pipe\.so', which is no file"),
    "an unknown file": (lambda m: listed([*m, entry(f"{place_of(m)}/.profile", b"x")]), r"\.profile', which is no file"),
    "a file of the store itself": (lambda m: listed([*m, entry("compilers/c++.json", b"{}")]), "which is no file"),
    "a file that the index lacks": (lambda m: [*m, entry(f"{place_of(m)}/more.so", b"x")], r"more\.so', which is no file"),
    "a file twice": (lambda m: [*m, m[-1]], "which is no file of a kernel that its bundle.json lists"),
    "another content": (lambda m: replaced(m, ".so", lambda data: data[::-1]), r"\.so is not the file that was exported"),
    "another library, listed": (
        lambda m: listed(replaced(m, ".so", lambda data: data[::-1])),
        r"variant\.json does not describe the files beside it",
    ),
    "a library elsewhere": (other_record(library="../../../../bin/sh.so"), r"does not describe the files"),
    "another op's place": (other_record(name="jitk.silu_and_mul"), r"does not describe the files"),
    "a name with a path": (other_record(name="../../x"), r"does not describe the files"),
    "a record that is none": (other_record(dependencies=[{"root": "x"}]), r"does not describe the files"),
    "a missing file": (lambda m: m[:-1], r"is cut short: 1 of \d files are missing"),
    "no index": (lambda m: m[1:], "is no bundle of kernels: it does not begin with bundle.json"),
    "an index that is a link": (
        lambda m: [entry(bundle.INDEX, kind=tarfile.SYMTYPE, target="/etc/passwd"), *m[1:]],
        "does not begin with bundle.json",
    ),
    "an index that is none": (lambda m: [entry(bundle.INDEX, b"[]"), *m[1:]], "is damaged or no bundle of kernels"),
    "nothing": (lambda m: [], "is no bundle of kernels"),
}


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_bundle_is_refused_whole(name: str, exported: Path, tmp_path: Path) -> None:
    change, text = HOSTILE[name]
    exported.write_bytes(packed(change(members_of(exported))))
    before = tree(tmp_path)
    with pytest.raises(bundle.BundleError, match=text):
        bundle.import_variants(exported, Store(tmp_path / "to"))
    assert [path for path in tree(tmp_path) if path not in before] == ["to", "to/staging"]


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.9])
def test_a_truncated_bundle_is_refused_whole(part: float, exported: Path, tmp_path: Path) -> None:
    data = exported.read_bytes()
    exported.write_bytes(data[: int(part * len(data))])
    with pytest.raises(bundle.BundleError, match=r"is cut short|is damaged or no bundle|is no bundle"):
        bundle.import_variants(exported, Store(tmp_path / "to"))
    assert tree(tmp_path / "to") == ["staging"]


def test_a_huge_file_is_refused_unread(exported: Path, tmp_path: Path) -> None:
    """A few bytes that unpack to more than any disk."""
    info, _ = entry(bundle.INDEX)
    info.size = 1 << 40
    exported.write_bytes(gzip.compress(info.tobuf() + bytes(1 << 20)))
    with pytest.raises(bundle.BundleError, match=r"bundle\.json has 1048576 MiB, more than any kernel"):
        bundle.import_variants(exported, Store(tmp_path / "to"))


def header(kind: bytes, data: bytes, size: int | None = None) -> bytes:
    """A header block of a kind, and what belongs to it."""
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, len(data) if size is None else size
    block = info.tobuf(tarfile.GNU_FORMAT)
    return block + data + bytes(-len(data) % 512)


HEADERS: dict[str, tuple[bytes, str]] = {
    "a huge extended header": (header(tarfile.XHDTYPE, bytes(1 << 16), 1 << 32), "x has 4096 MiB, more than any kernel"),
    "a huge long name": (header(tarfile.GNUTYPE_LONGNAME, bytes(1 << 16), 1 << 32), "x has 4096 MiB, more than any kernel"),
    "a huge long link": (header(tarfile.GNUTYPE_LONGLINK, bytes(1 << 16), 1 << 32), "does not begin with bundle.json"),
    "a global header": (header(tarfile.XGLTYPE, b"12 path=abc\n"), "does not begin with bundle.json"),
    "a sparse file": (header(tarfile.GNUTYPE_SPARSE, bytes(1 << 16)), "does not begin with bundle.json"),
    "sparse records": (header(tarfile.XHDTYPE, b"22 GNU.sparse.major=1\n"), "a header holds more than a name and a size"),
    "a record that is longer": (header(tarfile.XHDTYPE, b"99 path=abc\n"), "a header holds more than a name and a size"),
    "a record of no length": (header(tarfile.XHDTYPE, b"0 path=abc\n"), "a header holds more than a name and a size"),
    "a negative size": (header(tarfile.XHDTYPE, b"11 size=-5\n"), "'-5' is no size"),
    "a size of other digits": (header(tarfile.XHDTYPE, "12 size=\u0665\n".encode()), "is no size|holds more than"),
    "header upon header": (header(tarfile.XHDTYPE, b"12 path=abc\n") * 5000, "does not begin with bundle.json"),
    "a huge index": (header(tarfile.REGTYPE, b"", 1 << 40).replace(b"x", b"bundle.json", 1), "is damaged|does not begin"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_are_bounded_before_they_are_read(name: str, tmp_path: Path) -> None:
    data, text = HEADERS[name]
    file = tmp_path / "kernels.tar.gz"
    file.write_bytes(gzip.compress(data + bytes(1024)))
    with pytest.raises(bundle.BundleError, match=text):
        bundle.import_variants(file, Store(tmp_path / "to"))
    assert tree(tmp_path / "to") == ["staging"]


def test_long_names_are_read(exported: Path, tmp_path: Path) -> None:
    """In either of the two ways in which they are written."""
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        raw = io.BytesIO()
        with tarfile.open(fileobj=raw, mode="w:gz", format=form) as archive:
            name = f"{'n' * 120}-{'0' * 16}/{'0' * 16}/a.so"
            files = {"files": {name: digest_of(b"x")}, "format": 1}
            for member, data in (entry(bundle.INDEX, json.dumps(files).encode()), entry(name, b"x")):
                archive.addfile(member, io.BytesIO(data))
        exported.write_bytes(raw.getvalue())
        with pytest.raises(bundle.BundleError, match=r"n-0{16}/0{16}/variant\.json does not describe the files beside it"):
            bundle.import_variants(exported, Store(tmp_path / "to"))


def test_a_bomb_is_refused(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = members_of(exported)
    place = place_of(members)
    zeros = [entry(f"{place}/{number}.so", bytes(8 << 20)) for number in range(10)]
    exported.write_bytes(packed(listed([*members[:1], *zeros, *members[1:]])))
    most = (64 << 20) + 100 * exported.stat().st_size >> 20
    assert most < 80
    with pytest.raises(bundle.BundleError) as caught:
        bundle.import_variants(exported, Store(tmp_path / "to"))
    assert str(caught.value) == f"{exported} unpacks to more than {most} MiB, more than kernels do"
    assert tree(tmp_path / "to") == ["staging"]


LYING: dict[str, Any] = {
    "a list for a label": {"label": [1]},
    "an arch with a command": {"arch": "x86-64; touch PWNED"},
    "a key with a newline": {"key": "0" * 64 + "\n"},
    "flags as a text": {"flags": "-O2"},
    "a time as a text": {"seconds": "1"},
    "a dependency upwards": {"dependencies": [{"root": "system", "path": "../x", "digest": None}]},
    "a field more": {"more": 1},
}


@pytest.mark.parametrize("name", LYING)
def test_a_bundle_whose_record_lies_is_refused(name: str, exported: Path, tmp_path: Path) -> None:
    exported.write_bytes(packed(other_record(**LYING[name])(members_of(exported))))
    with pytest.raises(bundle.BundleError, match=r"variant\.json does not describe the files beside it"):
        bundle.import_variants(exported, Store(tmp_path / "to"))
    assert tree(tmp_path / "to") == ["staging"]


@pytest.mark.filterwarnings("ignore:the kernel cache")
def test_a_link_in_the_way_is_not_followed(exported: Path, tmp_path: Path) -> None:
    """Somebody's link where a variant belongs leads nowhere."""
    store, elsewhere = Store(tmp_path / "to"), tmp_path / "elsewhere"
    store.root.mkdir(mode=0o700)
    elsewhere.mkdir()
    place = members_of(exported)[1][0].name.partition("/")[0]
    (store.root / place).mkdir()
    (store.root / members_of(exported)[1][0].name.rpartition("/")[0]).symlink_to(elsewhere)
    with contextlib.suppress(OSError):  # replaced or left as it is: either is safe
        bundle.import_variants(exported, store)
        assert found(store) is not None
    assert list(elsewhere.iterdir()) == []
