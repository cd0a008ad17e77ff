"""Files that lie, folders of other people, and names that a shell would take apart: none is obeyed, and nothing hangs."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import store_child
from child import run_python
from expecttest import assert_expected_inline

import torch_jit_ops
from torch_jit_ops import manifest, process
from torch_jit_ops.ahead import build_ahead
from torch_jit_ops.ahead.why import explain
from torch_jit_ops.backends import CUDA
from torch_jit_ops.builder.errors import BuildError
from torch_jit_ops.builder.load import load as load_unit
from torch_jit_ops.builder.unit import Unit
from torch_jit_ops.declaring import variant
from torch_jit_ops.declaring.signature import Argument, Signature
from torch_jit_ops.store import files, forms, listing, lock
from torch_jit_ops.store.files import UntrustedCache
from torch_jit_ops.store.record import RECORD
from torch_jit_ops.store.store import Store

ROOT_ALONE = pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away or mount")
STRANGER = 12345


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

    def text(self, text: object) -> str:
        return str(text).replace(str(self.root), "<root>")

    def tree(self, folder: str = ".") -> list[tuple[str, int, int]]:
        return sorted((str(path), path.lstat().st_mode, path.lstat().st_mtime_ns) for path in (self.root / folder).rglob("*"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Here]:
    monkeypatch.setenv("JITK_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("JITK_CACHE_PATH", "JITK_CACHE_TRUST", "JITK_CACHE_SIZE", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JITK_VERBOSE", "1")
    process.reset()
    yield Here(tmp_path)
    process.reset()


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    """A test that waits for a pipe or reads a device that never ends is stopped."""

    def stop(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# --- a manifest ------------------------------------------------------------------------------------

LINE: dict[str, Any] = {"op": "jitk::relu2", "backend": "cpu", "values": {"input.dtype": "float32"}, "arch": "x86-64-v3"}
LIES: dict[str, dict[str, Any]] = {
    "a command": {"arch": "x86-64-v3; touch PWNED; true "},
    "a newline": {"arch": "x86-64-v3\n"},
    "another line": {"arch": "x86-64\n  command = touch PWNED"},
    "a variable of ninja": {"arch": "$in"},
    "another CPU": {"arch": "native"},
    "a GPU for the CPU": {"arch": "9.0a"},
    "a CPU for the GPU": {"backend": "cuda"},
    "a command for nvcc": {"backend": "cuda", "arch": "9.0a;touch PWNED"},
    "other digits": {"backend": "cuda", "arch": "\u0669.\u0660"},
    "no arch": {"arch": None},
    "a list": {"arch": ["x86-64"]},
    "another backend": {"backend": "cpu\n"},
    "no name": {"op": "jitk::relu2; touch PWNED"},
    "no dict": {"values": [["input.dtype", "float32"]]},
    "a placeholder with a command": {"values": {"input.dtype>); touch PWNED": "float32"}},
    "a value with a command": {"values": {"input.dtype": "float32; touch PWNED"}},
    "a value of another kind": {"values": {"input.dtype": {"a": 1}}},
    "a fraction": {"values": {"input.dtype": 1.5}},
    "one field more": {"flags": ["-x"]},
}


@pytest.mark.parametrize("name", LIES)
@pytest.mark.parametrize("reader", ["build", "deploy"])
def test_a_manifest_that_lies_is_refused(here: Here, name: str, reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here.root)
    monkeypatch.setattr(build_ahead, "load_unit", lambda *_: pytest.fail("it was built"))
    Path("manifest").write_text(json.dumps({**LINE, **LIES[name]}) + "\n")
    with pytest.raises(ValueError, match=r"^manifest:1: no line of a manifest: |architecture '\w.*' must be of the form"):
        if reader == "build":
            torch_jit_ops.build(manifest="manifest")
        else:
            torch_jit_ops.deploy("out", manifest="manifest")
    assert os.listdir() == ["manifest"]


def test_what_is_said_of_a_line_that_lies(tmp_path: Path) -> None:
    file = tmp_path / "manifest"
    said = []
    for change in ({"arch": "x; \x1b[2J"}, {"backend": 1}, {"values": {"n": []}}, {"op": "jitk"}, {"more": 1}):
        file.write_text(json.dumps({**LINE, **change}))
        with pytest.raises(ValueError) as caught:
            list(manifest.read(file))
        said.append(str(caught.value).splitlines()[-1])
    assert_expected_inline(
        "\n".join(said),
        """\
  arch: unexpected 'x; \\x1b[2J'
  backend: unexpected 1
  values: n: unexpected list
  op: unexpected 'jitk'
  more is no field here""",
    )


@pytest.mark.parametrize(
    "text", ["{", "[" * 100_000, '{"op": 1, "op": 2}', '{"op": NaN}', "[]", '{"op": ' + "9" * 5000 + "}", "\0"]
)
def test_what_is_no_json_is_no_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest").write_text(text)
    with pytest.raises(ValueError) as caught:
        list(manifest.read(tmp_path / "manifest"))
    assert str(caught.value) == f"{tmp_path}/manifest:1: no line of a manifest: {text[:100]!r}"


def test_a_manifest_tells_true_from_one(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("".join(json.dumps({**LINE, "values": {"n": n}}) + "\n" for n in (1, True, 1, False, 0)))
    assert [entry.values[0][1] for entry in manifest.read(tmp_path / "m")] == [1, True, False, 0]


@pytest.mark.parametrize("given", ["5\n", " 5", "5_0", "5.0", "0x5", "\u0665", "9" * 30, -1, 2**63, True, 5.0, None, [5]])
def test_a_size_is_a_number(given: object) -> None:
    signature = Signature((Argument("x", "T"),), 1)
    pattern = variant.parse_variant("op", "norm<{x.shape[-1]}>", signature)
    with pytest.raises(ValueError, match=r"must be (an int|from 0 to 9223372036854775807); got "):
        manifest.value_of("op", pattern.placeholders[0], signature, given)


# --- what reaches a compiler -----------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["x86-64; touch PWNED", "x86-64\n", "native", "", "x86-64-v5"])
def test_no_other_cpu_reaches_the_compiler(arch: str) -> None:
    with pytest.raises(ValueError) as caught:
        replace(store_child.unit(1), arch=arch).key()
    assert str(caught.value) == f"the CPU architecture {arch!r} must be of the form x86-64 or x86-64-v3"


@pytest.mark.parametrize("arch", ["9.0a; touch PWNED", "9.0a\n", "\u0669.\u0660", "9.0a,code=sm_80", "0.0"])
def test_no_other_gpu_reaches_nvcc(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"must be of the form 8\.0 or 9\.0a"):
        torch_jit_ops.build("relu2", backend="cuda", arch=arch)
    monkeypatch.setenv("JITK_CUDA_ARCH", arch)
    with pytest.raises(ValueError) as caught:
        CUDA.arch_of(0)
    assert str(caught.value) == f"JITK_CUDA_ARCH is {arch!r}; it must be of the form 8.0 or 9.0a"


def test_flags_are_words_and_not_commands(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here.root)
    text = """#include <cstring>
    extern "C" __attribute__((visibility("default"))) int jitk_value() { return std::strcmp(TEXT, "a b;$HOME`touch PWNED`&"); }
    """
    flag = r"""-DTEXT='"a b;$HOME`touch PWNED`&"'"""
    unit = replace(store_child.unit(text=text), flags=(flag, "-DTWO=1 -DWORDS=2"))
    assert here.load(unit) == (0, True)
    with pytest.raises(BuildError):
        here.load(replace(unit, flags=("-DTEXT=1; touch PWNED",)))
    assert sorted(os.listdir()) == ["cache"]
    assert list(here.root.rglob("PWNED")) == []


def test_a_flag_that_no_build_file_can_hold(here: Here) -> None:
    with pytest.raises(ValueError) as caught:
        here.load(replace(store_child.unit(1), flags=("-DTEXT='a\nb'",)))
    assert str(caught.value) == "the compiler's flag \"-DTEXT='a\\nb'\" cannot be passed on: it holds a newline or a zero"


NAMES = [
    " ",
    "a b ",
    ":",
    "$x",
    "$$",
    ";",
    "'",
    '"',
    "\\",
    "\n",
    "#",
    "%",
    ",",
    "(",
    "\u00e9",
    "&",
    "*",
    "-I",
    "`x`",
    b"\xff\xfe",
    "=",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_cache_of_any_name(here: Here, name: str | bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(os.fsdecode(os.fsencode(here.root) + b"/" + os.fsencode(name))) / "c"
    monkeypatch.setenv("JITK_CACHE_DIR", str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert here.load(store_child.unit(1)) == (1, True)
        assert here.load(store_child.unit(1)) == (1, False)
    with pytest.raises(BuildError) as caught:
        here.load(store_child.unit(text="static_assert(false);"))
    log = str(caught.value).partition("full log: ")[2]
    assert "static_assert" in Path(log).read_text()


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_sources_in_a_folder_of_any_name(here: Here, name: str | bytes) -> None:
    folder = Path(os.fsdecode(os.fsencode(here.root) + b"/" + os.fsencode(name)))
    folder.mkdir()
    text = '#include "value.h"\nextern "C" __attribute__((visibility("default"))) int jitk_value() { return VALUE; }\n'
    unit = store_child.unit(text=text, include=(folder,))
    for value in (1, 2):
        (folder / "value.h").write_text(f"#define VALUE {value}\n")
        assert [here.load(unit), here.load(unit)] == [(value, True), (value, False)], "a change of the header goes unnoticed"
    (folder / "value.h").write_text("wrong\n")
    with pytest.raises(BuildError) as caught:
        here.load(unit)
    assert re.search(r"/value\.h:1: .wrong. does not name a type\n", str(caught.value))


@pytest.mark.parametrize("name", ["$ORIGIN", "${LIB}", "a$PLATFORM/b"])
def test_a_cache_whose_name_the_loader_would_change(here: Here, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITK_CACHE_DIR", f"/tmp/{name}")
    with pytest.raises(ValueError) as caught:
        here.load(store_child.unit(1))
    assert str(caught.value) == (
        f"JITK_CACHE_DIR is {f'/tmp/{name}'!r}; it must not hold $ORIGIN, $LIB or $PLATFORM, "
        "for which the system's loader puts other texts"
    )


# --- other people's folders ------------------------------------------------------------------------


def refused(here: Here, pattern: str, place: str = ".") -> str:
    """A load that is refused, and touches nothing."""
    before = here.tree(place)
    with pytest.raises(UntrustedCache, match=pattern) as caught:
        here.load(store_child.unit(1))
    assert here.tree(place) == before
    return here.text(caught.value)


@pytest.mark.parametrize("mode", [0o777, 0o757, 0o703])
def test_a_folder_above_that_others_can_write(here: Here, mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    above = here.root / "above"
    above.mkdir()
    above.chmod(mode)
    for folder in (above / "cache", above / "more/cache"):
        monkeypatch.setenv("JITK_CACHE_DIR", str(folder))
        assert refused(here, "can be written by others") == (
            f"<root>/above, on the way to the kernel cache {here.text(folder)}, can be written by others (mode {mode:o}), "
            "so a kernel from it could be anybody's code\n"
            "  remedy: chmod go-w <root>/above, or set JITK_CACHE_DIR to a folder elsewhere, or JITK_CACHE_TRUST=1"
        )
    above.chmod(mode | 0o1000)  # nobody can replace what is another's
    assert here.load(store_child.unit(1)) == (1, True)
    above.chmod(mode)
    refused(here, "can be written by others")
    monkeypatch.setenv("JITK_CACHE_TRUST", "1")
    assert here.load(store_child.unit(1)) == (1, False)


@ROOT_ALONE
@pytest.mark.parametrize("shared", [False, True])
def test_a_folder_above_of_another_user(here: Here, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert here.load(store_child.unit(1)) == (1, True)
    above = here.root / "theirs"
    above.mkdir(mode=0o755)
    shutil.copytree(here.root / "cache", above / "cache")
    os.chown(above, STRANGER, -1)
    monkeypatch.setenv("JITK_CACHE_PATH" if shared else "JITK_CACHE_DIR", str(above / "cache"))
    assert refused(here, "belongs to another user") == (
        "<root>/theirs, on the way to the kernel cache <root>/theirs/cache, belongs to another user (uid 12345), "
        "so a kernel from it could be anybody's code\n"
        "  remedy: set JITK_CACHE_DIR to a folder of your own, or JITK_CACHE_TRUST=1 if you trust that user"
    )


@ROOT_ALONE
def test_a_link_of_another_user_on_the_way(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    (here.root / "public").mkdir()
    (here.root / "public").chmod(0o1777)
    (here.root / "mine").mkdir(mode=0o700)
    link = here.root / "public/link"
    link.symlink_to(here.root / "mine")
    monkeypatch.setenv("JITK_CACHE_DIR", str(link / "cache"))
    assert here.load(store_child.unit(1)) == (1, True), "a link of one's own is a way as good as any"
    os.lchown(link, STRANGER, -1)
    refused(here, "public/link, on the way to the kernel cache .* belongs to another user")


@ROOT_ALONE
@pytest.mark.parametrize("place", [".", "compilers", "locks", "staging"])
def test_planted_links_are_not_followed(here: Here, place: str) -> None:
    """Another user's folder, with links to what he would like to have overwritten."""
    victim = here.root / "victim"
    victim.write_text("mine")
    folder = here.root / "cache" / place
    folder.mkdir(parents=True, mode=0o700)
    (here.root / "cache").chmod(0o700)
    for number in range(os.getpid() - 50, os.getpid() + 500):
        for name in (f"c++.{number}", f"c++.json.{lock.system()}-{number}"):
            (folder / name).symlink_to(victim)
    (folder / "c++.json").symlink_to(victim)
    os.chown(folder, STRANGER, -1)
    if place == "compilers":  # what cannot be kept is asked again
        before = here.tree("cache/compilers")
        assert here.load(store_child.unit(1)) == (1, True)
        assert here.tree("cache/compilers") == before
    else:
        refused(here, "belongs to another user", f"cache/{place}")
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("place", ["compilers", "locks", "staging"])
def test_a_link_in_the_place_of_a_folder(here: Here, place: str) -> None:
    elsewhere = here.root / "elsewhere"
    elsewhere.mkdir()
    (here.root / "cache").mkdir(mode=0o700)
    (here.root / "cache" / place).symlink_to(elsewhere)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if place == "staging" else "error")
        assert here.load(store_child.unit(1)) == (1, True)
    assert os.listdir(elsewhere) == []


def test_new_files_follow_no_link(tmp_path: Path) -> None:
    victim, link = tmp_path / "victim", tmp_path / "link"
    victim.write_text("mine")
    link.symlink_to(victim)
    with pytest.raises(FileExistsError):
        files.write_file(link, b"theirs")
    files.replace_file(link, b"theirs")
    assert (victim.read_text(), link.read_text(), link.is_symlink()) == ("mine", "theirs", False)
    assert sorted(os.listdir(tmp_path)) == ["link", "victim"]


# --- records ---------------------------------------------------------------------------------------


def other(**changes: Any) -> Callable[[Path], None]:
    """A record with other fields; Ellipsis takes one away."""

    def change(file: Path) -> None:
        record = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({name: value for name, value in record.items() if value is not ...}))

    return change


def bytes_of(data: bytes) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(data) and None


def socket_at(file: Path) -> None:
    file.unlink()
    before = os.getcwd()
    os.chdir(file.parent)  # its path may be too long for a socket's name
    try:
        socket.socket(socket.AF_UNIX).bind(file.name)
    finally:
        os.chdir(before)


def instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        file.unlink()
        make(file)

    return change


def huge(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.truncate(1 << 40)


DEPENDENCY = {"root": "system", "path": "etc/hostname", "digest": "0" * 64}
FIELDS = ("key", "library", "digest", "dependencies", "name", "label", "backend", "arch", "flags", "abi", "seconds")
BAD_RECORDS: dict[str, Callable[[Path], None]] = {
    **{f"no {name}": other(**{name: ...}) for name in FIELDS},
    **{f"a dict for {name}": other(**{name: {"a": 1}}) for name in FIELDS},
    **{f"a list in a list for {name}": other(**{name: [[1]]}) for name in FIELDS},
    **{f"None for {name}": other(**{name: None}) for name in FIELDS},
    **{f"a NUL in {name}": other(**{name: "a\0b"}) for name in ("key", "library", "digest", "name", "backend", "arch")},
    "format as a text": other(format="1"),
    "format as true": other(format=True),
    "a library elsewhere": other(library="../../../etc/passwd.so"),
    "a library with a newline": other(library="a.so\n"),
    "imported": other(imported="yes"),
    "one field more": other(more=1),
    "endless time": other(seconds=1e400),
    "a huge number": other(abi=10**4000),
    "a dependency without a digest": other(dependencies=[{"root": "system", "path": "x"}]),
    "a dependency that is a list": other(dependencies=[["system", "x", None]]),
    "a dependency with another root": other(dependencies=[{**DEPENDENCY, "root": "home"}]),
    "a dependency with a list for a root": other(dependencies=[{**DEPENDENCY, "root": ["system"]}]),
    "a dependency with a NUL": other(dependencies=[{**DEPENDENCY, "path": "a\0"}]),
    "a dependency upwards": other(dependencies=[{**DEPENDENCY, "path": "../../etc/passwd"}]),
    "an absolute dependency": other(dependencies=[{**DEPENDENCY, "path": "/etc/passwd"}]),
    "a dependency with one field more": other(dependencies=[{**DEPENDENCY, "more": 1}]),
    "deep lists": bytes_of(b"[" * 100_000),
    "deep dicts": bytes_of(b'{"format":' * 50_000),
    "deep in a field": lambda file: (
        file.write_text(file.read_text().replace('"flags": [', '"flags": [' + "[" * 50_000)) and None
    ),
    "no UTF-8": bytes_of(b"\xff\xfe\0"),
    "UTF-16": lambda file: file.write_bytes(file.read_text().encode("utf-16")) and None,
    "a field twice": lambda file: file.write_text(file.read_text().replace("{", '{"format": 1,', 1)) and None,
    "more behind": lambda file: file.write_text(file.read_text() + "{}") and None,
    "NaN": lambda file: file.write_text(file.read_text().replace('"seconds": ', '"seconds": NaN, "x": ')) and None,
    "a number of thousands of digits": bytes_of(b'{"format": ' + b"9" * 10_000 + b"}"),
    "empty": bytes_of(b""),
    "a number": bytes_of(b"1"),
    "a text": bytes_of(b'"x"'),
    "huge": huge,
    "a pipe": instead(os.mkfifo),
    "a folder": instead(Path.mkdir),
    "a socket": socket_at,
    "a link to nowhere": instead(lambda file: file.symlink_to("nowhere")),
    "a link to itself": instead(lambda file: file.symlink_to(file)),
    "a link to a device": instead(lambda file: file.symlink_to("/dev/zero")),
    "a link to another's record": lambda file: file.rename(file.with_name("x")).parent and file.symlink_to("x"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one variant, to be copied."""
    root = tmp_path_factory.mktemp("whole") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JITK_CACHE_DIR", str(root))
        patch.delenv("CXX", raising=False)  # as for the tests
        process.reset()
        load_unit(store_child.unit(1))
    return root


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_record_that_lies_counts_as_damage(here: Here, whole: Path, name: str) -> None:
    shutil.copytree(whole, here.root / "cache")
    here.store.root.chmod(0o700)
    (folder,) = here.store.variants()
    BAD_RECORDS[name](folder / RECORD)
    unit = store_child.unit(1)
    assert here.store._inspect(folder, unit.key(), unit.roots(), None) == (None, "variant.json cannot be read")
    assert list(listing.variants(here.store)) == []
    here.store.usual_seconds("store.tiny", "cpu")
    assert here.store.find(unit.name, unit.key(), unit.roots(), None, repair=True) is None
    assert list(here.store.variants()) == []


@pytest.mark.parametrize("name", ["a dict for flags", "a pipe", "deep lists"])
def test_a_record_that_lies_is_replaced(here: Here, whole: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(whole, here.root / "cache")
    here.store.root.chmod(0o700)
    (folder,) = here.store.variants()
    BAD_RECORDS[name](folder / RECORD)
    capsys.readouterr()
    assert here.load(store_child.unit(1)) == (1, True)
    assert (
        capsys.readouterr().err.splitlines()[0] == f"jitk: replacing the damaged kernel {folder}: variant.json cannot be read"
    )
    assert here.load(store_child.unit(1)) == (1, False)
    assert list(here.store.variants()) == [folder]


ODD_FILES: dict[str, Callable[[Path], None]] = {
    name: BAD_RECORDS[name] for name in ("huge", "a pipe", "a folder", "a socket", "a link to a device", "a link to itself")
}


@pytest.mark.parametrize("name", ODD_FILES)
def test_a_library_that_is_no_file_is_replaced(here: Here, whole: Path, name: str) -> None:
    shutil.copytree(whole, here.root / "cache")
    here.store.root.chmod(0o700)
    ODD_FILES[name](next(here.store.root.glob("store*/*/*.so")))
    assert here.load(store_child.unit(1)) == (1, True)
    assert here.load(store_child.unit(1)) == (1, False)


@pytest.mark.parametrize("name", ODD_FILES)
@pytest.mark.parametrize("level", ["store*", "store*/*"])
def test_what_is_no_folder_gives_way(here: Here, whole: Path, name: str, level: str) -> None:
    shutil.copytree(whole, here.root / "cache")
    here.store.root.chmod(0o700)
    place = next(here.store.root.glob(level))
    shutil.rmtree(place)
    place.touch()
    ODD_FILES[name](place)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert here.load(store_child.unit(1)) == (1, True)
    assert here.load(store_child.unit(1)) == (1, False)


@pytest.mark.parametrize(
    "path", ["dev/zero", "dev/random", "dev/full", "proc/kmsg", "proc/self/mem", "proc/kcore", "PIPE", "etc"]
)
def test_a_dependency_that_never_ends(here: Here, whole: Path, path: str) -> None:
    shutil.copytree(whole, here.root / "cache")
    here.store.root.chmod(0o700)
    os.mkfifo(here.root / "pipe")
    (folder,) = here.store.variants()
    named = path.replace("PIPE", str(here.root / "pipe")[1:])
    other(dependencies=[{**DEPENDENCY, "path": named}])(folder / RECORD)
    assert here.load(store_child.unit(1)) == (1, True)
    assert here.load(store_child.unit(1)) == (1, False)


@pytest.mark.parametrize("name", ODD_FILES)
def test_a_note_of_a_compiler_that_is_no_file(here: Here, whole: Path, name: str) -> None:
    shutil.copytree(whole, here.root / "cache")
    here.store.root.chmod(0o700)
    (note,) = (here.store.root / "compilers").iterdir()
    ODD_FILES[name](note)
    assert here.load(store_child.unit(1)) == (1, False)


@pytest.mark.parametrize("ending", [".owner", ".failed"])
@pytest.mark.parametrize("name", [*ODD_FILES, "deep lists", "no UTF-8", "a list"])
def test_a_note_beside_a_lock_that_lies(here: Here, ending: str, name: str) -> None:
    unit = store_child.unit(1)
    note = here.store.lock_path(unit.name, unit.key()).with_suffix(ending)
    files.make_private(note.parent)
    note.touch()
    {**BAD_RECORDS, "a list": bytes_of(b"[]")}[name](note)
    assert lock.owner(note.with_suffix(".lock")) is None
    assert here.load(unit) == (1, True)


@pytest.mark.parametrize("change", [{"pid": "1"}, {"pid": -1}, {"pid": 2**40}, {"start": 1e300}, {"label": 1}, {"host": None}])
def test_an_owner_that_lies(tmp_path: Path, change: dict[str, Any]) -> None:
    honest = {"pid": 1, "host": "a", "system": "b", "start": 1.0, "label": "c"}
    (tmp_path / "x.owner").write_text(json.dumps(honest))
    assert lock.owner(tmp_path / "x.lock") == lock.Owner(**honest)  # type: ignore[arg-type]
    (tmp_path / "x.owner").write_text(json.dumps({**honest, **change}))
    assert lock.owner(tmp_path / "x.lock") is None


# --- random records --------------------------------------------------------------------------------

VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    1.5,
    1e308,
    10**30,
    "",
    "a",
    "\0",
    "../x",
    "x\n",
    "\x1b[2J",
    "\ud800",
    [],
    {},
    [[]],
    {"": 0},
]


def mutated(chance: random.Random, record: Any) -> bytes:
    """A record of which one to three things are other than they were: a value, a name, or the bytes of the file."""

    def change(value: Any) -> Any:
        if isinstance(value, dict) and value and chance.random() < 0.8:
            name = chance.choice([*value])
            kept = {other: each for other, each in value.items() if other != name}
            return chance.choice(
                [kept, {**value, name: change(value[name])}, {**value, chance.choice("xyz"): chance.choice(VALUES)}]
            )
        if isinstance(value, list) and value and chance.random() < 0.8:
            at = chance.randrange(len(value))
            return chance.choice([value[:at], [*value, value[at]], [*value[:at], change(value[at]), *value[at + 1 :]]])
        if isinstance(value, str) and value and chance.random() < 0.5:
            at = chance.randrange(len(value))
            return value[:at] + chance.choice(["", "\n", "/", "..", "\0", "\u0660", value]) + value[at + 1 :]
        return chance.choice(VALUES)

    for _ in range(chance.randint(1, 3)):
        record = change(record)
    data = bytearray(json.dumps(record, indent=chance.choice([None, 1])).encode())
    if chance.random() < 0.3 and data:
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(data) + 1)
            data[at : at + chance.randint(0, 3)] = chance.randbytes(chance.randint(0, 3))
    return bytes(data)


@pytest.mark.parametrize("seed", range(4))
def test_random_records_are_read_or_refused(here: Here, whole: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In ``JITK_TEST_RECORDS`` cases a seed. Each is the variant that it was, another one, or damaged: never an error."""
    shutil.copytree(whole, here.root / "cache")
    here.store.root.chmod(0o700)
    (folder,) = here.store.variants()
    library = next(folder.glob("*.so"))
    file = folder / RECORD
    good = json.loads(file.read_text())
    good["dependencies"] = [DEPENDENCY, {**DEPENDENCY, "digest": None}]
    unit = store_child.unit(1)
    chance = random.Random(seed)
    counts = {"found": 0, "another": 0, "damaged": 0}
    for _ in range(int(os.environ.get("JITK_TEST_RECORDS", "500"))):
        file.write_bytes(mutated(chance, good))
        found, damage = here.store._inspect(folder, unit.key(), unit.roots(), None)
        assert found in (None, library) and (found is None or damage is None)
        counts["found" if found else "damaged" if damage else "another"] += 1
        list(listing.variants(here.store))
        here.store.usual_seconds(unit.name, "cpu")
    assert counts["damaged"] > counts["found"]


# --- what people see -------------------------------------------------------------------------------


def test_what_is_listed_commands_no_terminal(here: Here, whole: Path) -> None:
    shutil.copytree(whole, here.root / "cache")
    (folder,) = here.store.variants()
    label = "\x1b]0;owned\x07\x1b[2Jtiny\r\n\u202egnp [bold]"
    other(label=label, flags=["\x1b[31m"], compiler="\x1b[32m")(folder / RECORD)
    code = "import sys; from torch_jit_ops.cli import main; sys.exit(main.main(['cache', 'list']))"
    printed = run_python(code, JITK_CACHE_DIR=here.store.root)
    assert "\\x1b]0;owned\\x07\\x1b[2Jtiny\\r\\n\\u202egnp [bold]  x86-64" in printed
    assert all(c.isprintable() or c == "\n" for c in printed)
    unit = store_child.unit(2)
    assert forms.printable(explain(unit, [here.store]).differences).isprintable()
