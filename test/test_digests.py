"""Digests of files that are known without reading the files: when they may be, and when not."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from torch_jit_ops import process
from torch_jit_ops.store import digests, files, forms
from torch_jit_ops.store.digests import digest_of, digest_of_file, indexed


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    process.reset()
    yield
    process.reset()


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were read."""
    names: list[str] = []
    original = forms.read

    def noted(path: str | Path, largest: int, *, follow: bool = False) -> bytes:
        names.append(Path(path).name)
        return original(path, largest, follow=follow)

    monkeypatch.setattr(forms, "read", noted)
    return names


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as old at once: a test need not wait for two seconds, nor can it set the time stamp of an inode."""
    monkeypatch.setattr(digests, "_SETTLED_NS", -(10**12))


def tree(folder: Path, count: int = 10) -> list[str]:
    folder.mkdir()
    for index in range(count):
        (folder / f"{index}.h").write_text(f"// {index}\n")
    return sorted(str(path) for path in folder.iterdir())


def ask(store: Path, folder: Path, paths: list[str]) -> list[str | None]:
    with indexed(store, str(folder), paths):
        return [digest_of_file(path) for path in paths]


@pytest.mark.usefixtures("settled")
def test_a_file_is_read_once_for_each_state(tmp_path: Path, read: list[str]) -> None:
    file = tmp_path / "a.h"
    file.write_text("one")
    assert [digest_of_file(file), digest_of_file(file)] == [digest_of("one")] * 2
    assert read == ["a.h"]
    file.write_text("two")
    assert digest_of_file(file) == digest_of("two")


@pytest.mark.usefixtures("settled")
def test_an_edit_that_keeps_size_and_time_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "a.h"
    file.write_text("one")
    before = file.stat()
    assert digest_of_file(file) == digest_of("one")
    time.sleep(0.05)  # the clock of the inode's time stamp ticks
    file.write_text("two")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert digest_of_file(file) == digest_of("two")


@pytest.mark.usefixtures("settled")
def test_another_file_in_its_place_is_seen(tmp_path: Path) -> None:
    file, other = tmp_path / "a.h", tmp_path / "b.h"
    file.write_text("one")
    other.write_text("two")
    assert digest_of_file(file) == digest_of("one")
    os.rename(other, file)
    assert digest_of_file(file) == digest_of("two")


def test_a_second_edit_within_one_tick_of_the_clock_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stamps of a file system with coarse ones, which two writes share."""
    file = tmp_path / "a.h"
    file.write_text("one")
    now = time.time_ns() // 2_000_000_000 * 2_000_000_000
    monkeypatch.setattr(digests, "_state", lambda path: (3, now, now, 1))
    assert digest_of_file(file) == digest_of("one")
    file.write_text("two")
    assert digest_of_file(file) == digest_of("two")
    assert digests._known == {}


def test_an_old_file_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: list[str]) -> None:
    file = tmp_path / "a.h"
    file.write_text("one")
    then = time.time_ns() - 3_000_000_000
    monkeypatch.setattr(digests, "_state", lambda path: (3, then, then, 1))
    assert [digest_of_file(file), digest_of_file(file)] == [digest_of("one")] * 2
    assert read == ["a.h"]


@pytest.mark.usefixtures("settled")
def test_a_later_process_reads_the_index_alone(tmp_path: Path, read: list[str]) -> None:
    paths = tree(tmp_path / "include")
    first = ask(tmp_path / "store", tmp_path / "include", paths)
    (index,) = (tmp_path / "store/digests").iterdir()
    assert first == [digest_of(f"// {number}\n") for number in range(10)]
    process.reset()
    read.clear()
    assert ask(tmp_path / "store", tmp_path / "include", paths) == first
    assert read == [index.name]


@pytest.mark.usefixtures("settled")
def test_what_changed_since_is_read_and_noted(tmp_path: Path, read: list[str]) -> None:
    paths = tree(tmp_path / "include")
    ask(tmp_path / "store", tmp_path / "include", paths)
    Path(paths[3]).write_text("// new\n")
    for expected in (["3.h"], []):
        process.reset()
        read.clear()
        assert ask(tmp_path / "store", tmp_path / "include", paths)[3] == digest_of("// new\n")
        assert read[1:] == expected


@pytest.mark.usefixtures("settled")
def test_an_index_is_no_more_than_its_whole_lines(tmp_path: Path, read: list[str]) -> None:
    paths = tree(tmp_path / "include")
    expected = ask(tmp_path / "store", tmp_path / "include", paths)
    (index,) = (tmp_path / "store/digests").iterdir()
    lines = index.read_text().splitlines(keepends=True)
    state = lines[0].split(" ", 1)[1]
    for damaged in (
        lines[0][1:],  # the digest is cut
        f"{'0' * 64} -1 {state.split(' ', 1)[1]}",
        f"{'0' * 64} {'9' * 30} {state.split(' ', 1)[1]}",
        f" {'0' * 64} {state}",
        f"{'G' * 64} {state}",
        lines[0].replace(paths[0], ""),
    ):
        index.write_text("".join([damaged, *lines[1:-1], lines[-1].rstrip("\n")]))
        process.reset()
        read.clear()
        assert ask(tmp_path / "store", tmp_path / "include", paths) == expected
        assert read[1:] == ["0.h", "9.h"], damaged


@pytest.mark.usefixtures("settled")
def test_an_index_that_others_could_write_counts_for_nothing(tmp_path: Path) -> None:
    paths = tree(tmp_path / "include")
    expected = ask(tmp_path / "store", tmp_path / "include", paths)
    (index,) = (tmp_path / "store/digests").iterdir()
    index.write_text(index.read_text().replace(str(expected[0]), "0" * 64))
    process.reset()
    assert ask(tmp_path / "store", tmp_path / "include", paths)[0] == "0" * 64, "else this test shows nothing"
    for way in (index, index.parent):
        mode = way.stat().st_mode
        way.chmod(0o777)
        process.reset()
        assert ask(tmp_path / "store", tmp_path / "include", paths) == expected
        way.chmod(mode)


@pytest.mark.usefixtures("settled")
def test_a_store_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = tree(tmp_path / "include")
    monkeypatch.setattr(files, "make_private", lambda folder: (_ for _ in ()).throw(PermissionError()))
    assert None not in ask(tmp_path / "store", tmp_path / "include", paths)


@pytest.mark.usefixtures("settled")
def test_few_files_have_no_index(tmp_path: Path) -> None:
    paths = tree(tmp_path / "include", 3)
    assert None not in ask(tmp_path / "store", tmp_path / "include", paths)
    assert not (tmp_path / "store").exists()


@pytest.mark.usefixtures("settled")
def test_names_that_a_line_cannot_hold(tmp_path: Path) -> None:
    folder = tmp_path / "include"
    paths = tree(folder)
    paths += [str(folder / "two\nlines.h"), str(folder / "a b.h"), os.fsdecode(os.fsencode(folder) + b"/\xff.h")]
    for path in paths[10:]:
        Path(path).write_text(path, errors="surrogateescape")
    expected = ask(tmp_path / "store", folder, paths)
    process.reset()
    assert ask(tmp_path / "store", folder, paths) == expected
    assert None not in expected
