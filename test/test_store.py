"""The store of built variants: what it finds, what it refuses, and what it does without room or rights."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import store_child
from expecttest import assert_expected_inline

from torch_jit_ops import environment, process
from torch_jit_ops.builder.load import load as load_unit
from torch_jit_ops.builder.unit import Unit
from torch_jit_ops.store import files
from torch_jit_ops.store.digests import digest_of
from torch_jit_ops.store.files import UntrustedCache
from torch_jit_ops.store.record import RECORD
from torch_jit_ops.store.store import Store

DAY_S = 86400.0


class Here:
    """A cache of its own for each test, and loads as a new process would do them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = Store(root / "cache")

    def load(self, unit: Unit) -> tuple[int, bool]:
        """What the library returns, and whether it was compiled."""
        process.reset(said=False)
        loaded = load_unit(unit)
        return store_child.value(loaded), loaded.compiled

    def variants(self) -> list[Path]:
        return list(self.store.variants())

    def text(self, text: object) -> str:
        return str(text).replace(str(self.root), "<root>")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Here]:
    monkeypatch.setenv("JITK_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("JITK_CACHE_PATH", "JITK_CACHE_TRUST", "JITK_CACHE_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JITK_VERBOSE", "1")
    process.reset()
    yield Here(tmp_path)
    process.reset()


def reading(folder: Path) -> Unit:
    """A unit that returns what ``value.h`` of a folder defines."""
    text = '#include "value.h"\nextern "C" __attribute__((visibility("default"))) int jitk_value() { return VALUE; }\n'
    return store_child.unit(text=text, include=(folder,))


def checkout(folder: Path, value: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "value.h").write_text(f"#define VALUE {value}\n")
    (folder / "other.h").write_text("")
    return folder


# --- content ---------------------------------------------------------------------------------------


def test_a_header_rebuilds_its_readers_alone(here: Here) -> None:
    folder = checkout(here.root / "csrc", 1)
    other = store_child.unit(5, include=(folder,))
    assert [here.load(reading(folder)), here.load(other)] == [(1, True), (5, True)]
    (folder / "other.h").write_text("// nobody reads it\n")
    assert [here.load(reading(folder)), here.load(other)] == [(1, False), (5, False)]
    (folder / "value.h").write_text("#define VALUE 2\n")
    assert [here.load(reading(folder)), here.load(other)] == [(2, True), (5, False)]
    (folder / "value.h").write_text("#define VALUE 1\n")
    assert here.load(reading(folder)) == (1, False), "the first is kept, as a change of branch comes back to it"


def test_neither_the_place_nor_the_time_of_a_header_matters(here: Here) -> None:
    folder = checkout(here.root / "a/csrc", 1)
    here.load(reading(folder))
    tomorrow = time.time() + DAY_S
    os.utime(folder / "value.h", (tomorrow, tomorrow))
    assert here.load(reading(folder)) == (1, False)
    moved = (here.root / "a").rename(here.root / "b") / "csrc"
    assert here.load(reading(moved)) == (1, False)


def test_two_checkouts_share_a_cache(here: Here) -> None:
    first, second = checkout(here.root / "a", 1), checkout(here.root / "b", 2)
    assert [here.load(reading(first)), here.load(reading(second))] == [(1, True), (2, True)]
    assert [here.load(reading(first)), here.load(reading(second))] == [(1, False), (2, False)]
    assert here.load(reading(checkout(here.root / "c", 2))) == (2, False)


def test_a_hit_starts_no_process(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    units = [store_child.unit(number) for number in range(3)]
    for unit in units:
        here.load(unit)
    process.reset()
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    assert [here.load(unit) for unit in units] == [(number, False) for number in range(3)]


# --- layers ----------------------------------------------------------------------------------------


def test_a_shared_cache_is_searched_first_and_never_written(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    here.load(store_child.unit(1))
    shared = (here.root / "cache").rename(here.root / "shared")
    before = sorted(path for path in shared.rglob("*"))
    monkeypatch.setenv("JITK_CACHE_PATH", f"{here.root / 'missing'}{os.pathsep}{shared}")
    assert here.load(store_child.unit(1)) == (1, False)
    assert here.variants() == []
    assert here.load(store_child.unit(2)) == (2, True)
    assert len(here.variants()) == 1
    assert sorted(path for path in shared.rglob("*")) == before


def test_a_damaged_kernel_of_a_shared_cache_is_left_out(
    here: Here, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here.load(store_child.unit(1))
    shared = (here.root / "cache").rename(here.root / "shared")
    library = next(shared.glob("store*/*/*.so"))
    library.unlink()
    capsys.readouterr()
    monkeypatch.setenv("JITK_CACHE_PATH", str(shared))
    assert here.load(store_child.unit(1)) == (1, True)
    said = here.text(capsys.readouterr().err).splitlines()
    assert said[0] == (
        f"jitk: leaving out the damaged kernel {here.text(library.parent)}: {library.name}: No such file or directory"
    )
    assert here.load(store_child.unit(1)) == (1, False)


# --- damage ----------------------------------------------------------------------------------------


def other_library(path: Path) -> None:
    found = next(
        Path(folder) / "libm.so.6" for folder in ("/lib/x86_64-linux-gnu", "/lib64", "/usr/lib") if os.path.isdir(folder)
    )
    path.unlink()
    shutil.copyfile(found, path)


def truncate(path: Path) -> None:
    size = path.stat().st_size
    path.rename(path.with_suffix(".old"))  # the process still has it mapped
    path.write_bytes(path.with_suffix(".old").read_bytes()[: size // 2])


DAMAGE = {
    "truncated": ("*.so", truncate, "LIBRARY is not the file that was built"),
    "empty": ("*.so", lambda path: (path.unlink(), path.touch()), "LIBRARY is not the file that was built"),
    "foreign": ("*.so", other_library, "LIBRARY is not the file that was built"),
    "missing": ("*.so", Path.unlink, "LIBRARY: No such file or directory"),
    "no record": (RECORD, Path.unlink, "variant.json is missing"),
    "half a record": (RECORD, lambda path: path.write_text(path.read_text()[:99]), "variant.json cannot be read"),
    "list": (RECORD, lambda path: path.write_text("[]"), "variant.json cannot be read"),
    "no digest": (RECORD, lambda path: path.write_text('{"format": 1, "library": ""}'), "variant.json cannot be read"),
    "zeros": (RECORD, lambda path: path.write_bytes(bytes(500)), "variant.json cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_kernel_is_replaced_and_reported(here: Here, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    pattern, damage, reason = DAMAGE[kind]
    here.load(store_child.unit(1))
    (folder,) = here.variants()
    library = next(folder.glob("*.so")).name
    damage(next(folder.glob(pattern)))  # type: ignore[operator]
    capsys.readouterr()
    assert here.load(store_child.unit(1)) == (1, True)
    said = here.text(capsys.readouterr().err).splitlines()
    assert said[0] == f"jitk: replacing the damaged kernel {here.text(folder)}: {reason.replace('LIBRARY', library)}"
    assert here.load(store_child.unit(1)) == (1, False)
    assert here.variants() == [folder]
    assert os.listdir(here.store.root / "staging") == []


def test_a_library_that_this_system_cannot_load_is_replaced(here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    """Built where the C library is newer, and whole."""
    here.load(store_child.unit(1))
    (folder,) = here.variants()
    library = next(folder.glob("*.so"))
    library.unlink()
    library.write_bytes(b"no library")
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps({**record, "digest": digest_of(b"no library")}))
    capsys.readouterr()
    assert here.load(store_child.unit(1)) == (1, True)
    assert "file too short" in capsys.readouterr().err
    assert here.load(store_child.unit(1)) == (1, False)


# --- rights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077, 0o777])
def test_whatever_the_umask(here: Here, umask: int) -> None:
    before = os.umask(umask)
    try:
        files.make_private(here.store.root / "a/b")
        folder = here.store.new_staging()
    finally:
        os.umask(before)
    made = [folder, *folder.parents[:2], here.store.root / "a", here.store.root / "a/b"]
    assert [oct(path.stat().st_mode & 0o777) for path in made] == ["0o700"] * 5


def test_a_build_with_an_open_umask_is_private(here: Here) -> None:
    before = os.umask(0)
    try:
        assert here.load(store_child.unit(1)) == (1, True)
    finally:
        os.umask(before)
    everything = [here.store.root, *here.store.root.rglob("*")]
    assert {path.stat().st_mode & 0o777 for path in everything if path.is_dir()} == {0o700}
    (folder,) = here.variants()
    assert [path.name for path in folder.iterdir() if path.stat().st_mode & 0o022] == []
    assert here.load(store_child.unit(1)) == (1, False)


@pytest.mark.parametrize("what", [".", "store*", "store*/*", "store*/*/variant.json", "store*/*/*.so"])
def test_what_others_can_write_is_refused(here: Here, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here.load(store_child.unit(1))
    path = next(here.store.root.glob(what)) if what != "." else here.store.root
    path.chmod(0o777)
    with pytest.raises(UntrustedCache) as caught:
        here.load(store_child.unit(1))
    assert here.text(caught.value) == (
        f"the kernel cache {here.text(path)} can be written by others (mode 777), so a kernel from it could be anybody's code\n"
        "  remedy: delete <root>/cache, or if you trust what is in it: chmod -R go-w <root>/cache, or JITK_CACHE_TRUST=1"
    )
    monkeypatch.setenv("JITK_CACHE_TRUST", "1")
    assert here.load(store_child.unit(1)) == (1, False)


@pytest.mark.parametrize("what", ["staging", "."])
def test_no_build_where_others_can_write(here: Here, what: str) -> None:
    files.make_private(here.store.root / "staging")
    (here.store.root / what).chmod(0o770)
    with pytest.raises(UntrustedCache, match=r"\(mode 770\)"):
        here.load(store_child.unit(1))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("what", [".", "store*", "store*/*", "store*/*/variant.json", "store*/*/*.so"])
def test_what_belongs_to_another_user_is_refused(here: Here, what: str) -> None:
    here.load(store_child.unit(1))
    path = next(here.store.root.glob(what)) if what != "." else here.store.root
    os.chown(path, 12345, -1)
    with pytest.raises(UntrustedCache) as caught:
        here.load(store_child.unit(1))
    assert_expected_inline(
        here.text(caught.value).replace(here.text(path), "PATH"),
        """\
the kernel cache PATH belongs to another user (uid 12345), so a kernel from it could be anybody's code
  remedy: set JITK_CACHE_DIR to a folder of your own, or JITK_CACHE_TRUST=1 if you trust that user""",
    )


# --- no room ---------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(here: Here) -> Iterator[Path]:
    """A disk of 200 KiB under the cache."""
    here.store.root.mkdir(mode=0o700)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k,mode=700", "tmpfs", here.store.root], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    yield here.store.root
    subprocess.run(["umount", "-l", here.store.root], check=True)


def warned(here: Here, unit: Unit, expected: int) -> list[str]:
    """Load and return the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert here.load(unit) == (expected, True)
    return [here.text(warning.message) for warning in caught]


def test_a_cache_that_cannot_be_written(here: Here, small_disk: Path) -> None:
    assert here.load(store_child.unit(1)) == (1, True)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert here.load(store_child.unit(1)) == (1, False)
    assert warned(here, store_child.unit(2), 2) == [
        "the kernel cache <root>/cache cannot be written (Read-only file system); kernels are built again in every process. "
        "Set JITK_CACHE_DIR to a folder with space that can be written"
    ]
    assert warned(here, store_child.unit(3), 3) == []


@pytest.mark.parametrize("left", [0, 4, 12, 20, 28, 36, 44, 52, 60, 68, 76])
def test_a_disk_that_fills_up(here: Here, small_disk: Path, left: int) -> None:
    """With so many KiB left the disk is full before the build, in the middle of it, or when the record is written."""
    here.load(store_child.unit(1))
    with open(small_disk / "ballast", "wb", buffering=0) as ballast:
        try:
            while True:
                ballast.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC
        ballast.truncate(max(0, ballast.tell() - left * 1024))
    messages = warned(here, store_child.unit(2), 2)
    assert len(messages) <= 1
    assert here.load(store_child.unit(1)) == (1, False)
    if messages:
        assert "No space left on device" in messages[0]
        assert len(here.variants()) == 1
    else:
        assert here.load(store_child.unit(2)) == (2, False)


def test_a_cache_whose_place_is_a_file(here: Here) -> None:
    here.store.root.write_text("")
    assert "Not a directory" in warned(here, store_child.unit(1), 1)[0]


# --- size and age ----------------------------------------------------------------------------------


def used(here: Here, unit: Unit, days_ago: float) -> Path:
    before = set(here.variants())
    here.load(unit)
    (folder,) = set(here.variants()) - before
    when = time.time() - days_ago * DAY_S
    os.utime(folder / RECORD, (when, when))
    return folder


def test_pruning(here: Here) -> None:
    old, middle, new = (used(here, store_child.unit(i), days) for i, days in enumerate((100, 50, -3)))
    assert {variant.folder for variant in here.store.prune(None, None).kept} == {old, middle, new}
    pruned = here.store.prune(None, 90 * DAY_S)
    assert [variant.folder for variant in pruned.removed] == [old]
    assert not old.parent.exists()
    size = pruned.kept[0].size
    pruned = here.store.prune(size, None)
    assert ([variant.folder for variant in pruned.removed], pruned.freed) == ([middle], size)
    assert here.store.prune(0, None, keep=new).removed == ()
    assert [variant.folder for variant in here.store.prune(0, None).removed] == [new]
    assert here.load(store_child.unit(2)) == (2, True)


def test_pruning_in_passing(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    old = used(here, store_child.unit(1), 100)
    other = used(here, store_child.unit(2), 1)
    assert old.exists(), "it is not looked at again within a minute"
    os.utime(here.store.root / "pruned", (0, 0))
    new = used(here, store_child.unit(3), 0)
    assert here.variants() == sorted([other, new])
    monkeypatch.setenv("JITK_CACHE_SIZE", "1")
    os.utime(here.store.root / "pruned", (0, 0))
    newest = used(here, store_child.unit(4), 0)
    assert here.variants() == [newest], "what was just built stays"


@pytest.mark.parametrize("days", [2, -2])
def test_a_hit_counts_as_use(here: Here, days: float) -> None:
    record = used(here, store_child.unit(1), days) / RECORD
    here.load(store_child.unit(1))
    assert abs(record.stat().st_mtime - time.time()) < 60


def test_a_hit_writes_at_most_once_a_day(here: Here) -> None:
    record = used(here, store_child.unit(1), 0.5) / RECORD
    before = record.stat().st_mtime_ns
    here.load(store_child.unit(1))
    assert record.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("text", "size"),
    [("", 4 << 30), ("0", None), ("5", 5), ("2K", 2048), ("500MB", 500 << 20), ("1GiB", 1 << 30), ("2T", 2 << 40)],
)
def test_sizes(monkeypatch: pytest.MonkeyPatch, text: str, size: int | None) -> None:
    monkeypatch.setenv("JITK_CACHE_SIZE", text)
    assert environment.cache_bytes() == size


@pytest.mark.parametrize("text", ["-1", "4 G", "G", "1.5G", "4g"])
def test_what_is_no_size(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("JITK_CACHE_SIZE", text)
    with pytest.raises(ValueError) as caught:
        environment.cache_bytes()
    assert (
        str(caught.value) == f"JITK_CACHE_SIZE is {text!r}; it must be a number of bytes, such as 500M or 4G, or 0 for no limit"
    )


def test_a_variant_that_goes_while_it_is_loaded(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    here.load(store_child.unit(1))
    original = Store.find

    def find_and_prune(store: Store, *args: object, **options: object) -> Path | None:
        found = original(store, *args, **options)  # type: ignore[arg-type]
        store.prune(0, None)
        return found

    monkeypatch.setattr(Store, "find", find_and_prune)
    assert here.load(store_child.unit(1)) == (1, True)
