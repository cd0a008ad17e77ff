"""The store of built kernels: what is found again, what is built again, and whose files are trusted."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from child import ROOT, run_python
from expecttest import assert_expected_inline

from torch_jit_ops import environment, process
from torch_jit_ops.backends import CPU, CUDA
from torch_jit_ops.builder import compilers
from torch_jit_ops.builder.load import load as load_unit
from torch_jit_ops.builder.shared_object import Loaded
from torch_jit_ops.builder.unit import Unit
from torch_jit_ops.store.files import UntrustedCache
from torch_jit_ops.store.record import RECORD

_TEXT = """#include <answer.h>
extern "C" __attribute__((visibility("default"))) int answer() { return ANSWER; }
"""
_NO_HEADER = _TEXT.replace("#include <answer.h>", "#define ANSWER 7")


@pytest.fixture
def include(tmp_path: Path) -> Path:
    folder = tmp_path / "include"
    folder.mkdir()
    (folder / "answer.h").write_text("#define ANSWER 42\n")
    return folder


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("JITK_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[Unit], Loaded]:
    """``load_unit`` as in a process that has loaded nothing."""

    def load(unit: Unit) -> Loaded:
        process.reset()
        return load_unit(unit)

    return load


def unit(include: Path, text: str = _TEXT, name: str = "test.answer") -> Unit:
    return Unit(name=name, label="test::answer", backend=CPU, arch="x86-64", text=text, include=(include,))


def answer(loaded: Loaded) -> int:
    return int(loaded.library.answer())


Load = Callable[[Unit], Loaded]

# --- what is found again ---------------------------------------------------------------------------


def test_what_was_built_is_found_again(root: Path, include: Path, load: Load) -> None:
    first, second = load(unit(include)), load(unit(include))
    assert (first.compiled, second.compiled) == (True, False)
    assert answer(first) == answer(second) == 42
    assert root in second.path.parents
    assert list((root / "staging").iterdir()) == []


def test_a_touched_file_is_the_same_file(root: Path, include: Path, load: Load) -> None:
    load(unit(include))
    os.utime(include / "answer.h", (1, 1))
    assert not load(unit(include)).compiled


def test_a_changed_header_rebuilds_its_readers_alone(root: Path, include: Path, load: Load) -> None:
    reader, other = unit(include), unit(include, _NO_HEADER, name="test.seven")
    load(reader), load(other)
    (include / "answer.h").write_text("#define ANSWER 43\n")
    changed = load(reader)
    assert changed.compiled
    assert answer(changed) == 43
    assert not load(other).compiled
    (include / "answer.h").write_text("#define ANSWER 42\n")
    restored = load(reader)
    assert not restored.compiled, "the first build is still there"
    assert answer(restored) == 42


def test_a_header_that_comes_to_stand_in_front_is_seen(root: Path, include: Path, load: Load, tmp_path: Path) -> None:
    """Of two folders the first has no answer.h, until it has."""
    front = tmp_path / "front"
    front.mkdir()
    both = replace(unit(include), include=(front, include))
    assert answer(load(both)) == 42
    (front / "answer.h").write_text("#define ANSWER 44\n")
    assert answer(load(both)) == 44


def test_another_folder_with_the_same_files_is_the_same(root: Path, include: Path, load: Load, tmp_path: Path) -> None:
    load(unit(include))
    shutil.copytree(include, tmp_path / "moved")
    assert not load(unit(tmp_path / "moved")).compiled


def test_the_record_says_what_was_built_without_saying_where(root: Path, include: Path, load: Load) -> None:
    loaded = load(unit(include))
    text = (loaded.path.parent / RECORD).read_text()
    assert str(include) not in text
    record = json.loads(text)
    assert record["label"] == "test::answer"
    assert [(item["root"], item["path"]) for item in record["dependencies"]] == [("include0", "answer.h")]
    assert (loaded.path.parent / "test_answer.cpp").read_text() == _TEXT


@pytest.mark.parametrize(
    "change",
    [{"text": _TEXT + "\n"}, {"flags": ("-O0",)}, {"arch": "x86-64-v3"}, {"backend": CUDA, "arch": "9.0a"}, {"torch": True}],
    ids=lambda change: next(iter(change)),
)
def test_whatever_changes_the_code_changes_the_key(include: Path, change: dict[str, Any]) -> None:
    assert replace(unit(include), **change).key() != unit(include).key()


def test_the_dispatcher_depends_on_the_version_of_pytorch_and_kernels_do_not(
    include: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, dispatcher = unit(include), replace(unit(include), torch=True)
    before = kernel.key(), dispatcher.key()
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert kernel.key() == before[0]
    assert dispatcher.key() != before[1]


def test_another_compiler_builds_again(root: Path, include: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    load(unit(include))
    monkeypatch.setattr(compilers, "compiler_identity", lambda program, memory: "another compiler 1.0")
    assert load(unit(include)).compiled


_HIT = """
import sys
import torch
events = []
starts = ("subprocess.", "os.fork", "os.exec", "os.posix_spawn", "os.system")
sys.addaudithook(lambda name, args: events.append(name) if name.startswith(starts) else None)
import torch_jit_ops
x = torch.full((2, 2), 3.0)
print(torch.ops.jitk.relu2(x).sum().item(), events, "torch.utils.cpp_extension" in sys.modules, torch_jit_ops.__file__)
"""


def test_a_hit_starts_no_process() -> None:
    torch.ops.jitk.relu2(torch.ones(2, 2))
    printed = run_python(_HIT, JITK_CACHE_DIR=environment.cache_dir())
    assert printed == f"36.0 [] False {ROOT / 'torch_jit_ops' / '__init__.py'}\n"


def test_a_copied_checkout_finds_what_the_first_one_built(tmp_path: Path) -> None:
    torch.ops.jitk.relu2(torch.ones(2, 2))
    for folder in ("torch_jit_ops", "csrc", "include"):
        shutil.copytree(ROOT / folder, tmp_path / "copy" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    printed = run_python(_HIT, JITK_CACHE_DIR=environment.cache_dir(), PYTHONPATH=tmp_path / "copy")
    assert printed == f"36.0 [] False {tmp_path / 'copy' / 'torch_jit_ops' / '__init__.py'}\n"


# --- what is broken --------------------------------------------------------------------------------


def _truncate(library: Path, record: Path) -> None:
    data = library.read_bytes()
    library.unlink()  # another file: what is mapped into this process must stay whole
    library.write_bytes(data[: len(data) // 2])


def _flip_a_bit(library: Path, record: Path) -> None:
    data = bytearray(library.read_bytes())
    data[len(data) // 2] ^= 1
    library.unlink()
    library.write_bytes(data)


def _no_library(library: Path, record: Path) -> None:
    library.unlink()


def _no_record(library: Path, record: Path) -> None:
    record.unlink()


def _half_a_record(library: Path, record: Path) -> None:
    record.write_text(record.read_text()[:40])


def _a_record_of_nothing(library: Path, record: Path) -> None:
    record.write_text("[]")


@pytest.mark.parametrize(
    "damage", [_truncate, _flip_a_bit, _no_library, _no_record, _half_a_record, _a_record_of_nothing], ids=lambda f: f.__name__
)
def test_what_is_broken_is_built_again(root: Path, include: Path, load: Load, damage: Callable[[Path, Path], None]) -> None:
    loaded = load(unit(include))
    damage(loaded.path, loaded.path.parent / RECORD)
    again = load(unit(include))
    assert again.compiled
    assert answer(again) == 42
    assert not load(unit(include)).compiled, "the repaired build was not kept"


# --- who may write ---------------------------------------------------------------------------------


def test_a_cache_that_others_can_write_is_refused(
    root: Path, include: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(unit(include))
    root.chmod(0o775)
    for one in (unit(include), unit(include, _NO_HEADER)):  # to be read, and to be written
        with pytest.raises(UntrustedCache) as caught:
            load(one)
        text = re.sub(r"owner \d+", "owner UID", str(caught.value).replace(str(root), "CACHE"))
        assert_expected_inline(
            text,
            """\
the kernel cache CACHE can be written by others (mode 775), so a kernel from it could be anybody's code
  remedy: delete CACHE, or if you trust what is in it: chmod -R go-w CACHE, or JITK_CACHE_TRUST=1""",
        )
    monkeypatch.setenv("JITK_CACHE_TRUST", "1")
    assert not load(unit(include)).compiled


def test_a_cache_of_somebody_else_is_refused(root: Path, include: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    load(unit(include))
    monkeypatch.setattr(os, "getuid", lambda: root.stat().st_uid + 1)
    if root.stat().st_uid == 0:
        assert not load(unit(include)).compiled, "what root has written is trusted"
    else:
        with pytest.raises(UntrustedCache):
            load(unit(include))


def test_a_new_cache_is_private_whatever_the_umask(root: Path, include: Path, load: Load) -> None:
    before = os.umask(0o002)  # the default of many distributions
    try:
        assert answer(load(unit(include))) == 42
        assert not load(unit(include)).compiled
    finally:
        os.umask(before)
    assert root.stat().st_mode & 0o777 == 0o700


def test_a_cache_that_cannot_be_written_warns_and_works(
    tmp_path: Path, include: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JITK_CACHE_DIR", str(tmp_path / "file" / "cache"))  # also root cannot write here
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = load(unit(include))
    assert answer(loaded) == 42
    assert_expected_inline(
        "\n".join(str(one.message) for one in caught).replace(str(tmp_path), "TMP").replace("; ", ";\n"),
        """\
the kernel cache TMP/file/cache cannot be written (Not a directory);
kernels are built again in every process. Set JITK_CACHE_DIR to a folder with space that can be written""",
    )


def test_a_hit_writes_nothing(root: Path, include: Path, load: Load) -> None:
    """So a cache that an administrator has filled can be read-only."""
    load(unit(include))

    def state() -> list[tuple[str, int]]:
        return sorted((str(path), path.stat().st_mtime_ns) for path in root.rglob("*"))

    before = state()
    load(unit(include))
    assert state() == before


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITK_CACHE_DIR", "~/kernels")
    assert environment.cache_dir() == Path.home() / "kernels"
    monkeypatch.delenv("JITK_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert environment.cache_dir() == Path("/somewhere/jitk")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert environment.cache_dir() == Path.home() / ".cache" / "jitk"
