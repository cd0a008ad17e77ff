"""Kernels ahead of their first call: what is counted, what is compiled, what a manifest replays."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import torch_jit_ops
from torch_jit_ops import OpLibrary, manifest, process
from torch_jit_ops.ahead import build_ahead
from torch_jit_ops.backends import CPU
from torch_jit_ops.builder import compiler_jobs
from torch_jit_ops.builder.load import load
from torch_jit_ops.builder.unit import Unit

_SOURCE = """
#include <jitk/result.h>
#include <jitk/tensor.h>

namespace warmlib {

enum Way { forth, back };

template <typename T, int32_t kCount, Way kWay>
void move(jitk::TensorView x, jitk::Output& out) {
  static_assert(kCount != 13, "thirteen is not served");
  out.empty_like(x);
}

}  // namespace warmlib
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpLibrary]:
    folder = tmp_path_factory.mktemp("warmlib")
    (folder / "move.cpp").write_text(_SOURCE)
    made = OpLibrary("warmlib", csrc=folder)

    @made.op(cpu="move.cpp", variant="warmlib::move<{x.dtype}, {count}, warmlib::{way}>")
    def move(x: Tensor, count: int, way: Literal["forth", "back"] = "forth") -> Tensor:
        return x.clone()

    yield made
    torch_jit_ops.registry.remove(made)  # the generic tests of other files want samples


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A store that is empty but for the dispatcher, and counters at zero."""
    shared = tmp_path_factory.getbasetemp() / "warm"
    shared.mkdir(mode=0o700, exist_ok=True)
    monkeypatch.setenv("JITK_CACHE_DIR", str(shared))
    torch_jit_ops.reset_stats()
    yield
    torch_jit_ops.reset_stats()


def forget() -> None:
    """What a new process knows."""
    process.reset()
    torch_jit_ops.reset_stats()


def unit(library: OpLibrary, count: int, way: str = "forth", dtype: torch.dtype = torch.float32) -> Unit:
    return library.ops["move"].declaration.unit("cpu", (dtype, count, way), "x86-64")


def test_loads_are_counted_by_op(library: OpLibrary) -> None:
    load(unit(library, 1))
    load(unit(library, 1))  # in this process already: not a load
    forget()
    load(unit(library, 1))
    load(unit(library, 2))
    with pytest.raises(torch_jit_ops.BuildError):
        load(unit(library, 13))
    found = torch_jit_ops.stats()
    assert list(found.ops) == ["warmlib::move"]
    assert found.total == found.ops["warmlib::move"]
    assert (found.total.hits, found.total.misses, found.total.builds) == (1, 2, 1)
    assert 0 < found.total.load_seconds < found.total.compile_seconds < 60
    torch_jit_ops.reset_stats()
    assert torch_jit_ops.stats() == torch_jit_ops.Statistics(torch_jit_ops.Stats(), {})


# --- what is built ---------------------------------------------------------------------------------


def names(wanted: list[build_ahead.Wanted]) -> list[str]:
    return [f"{each.unit().label} {each.arch}" for each in wanted]


def labels(wanted: list[build_ahead.Wanted]) -> list[str]:
    return [each.unit().label for each in wanted]


def test_samples_say_what_is_needed() -> None:
    units = build_ahead.needed(["silu_and_mul", "add_constant"], backend="cpu")
    assert labels(units) == [
        "jitk::silu_and_mul<fp16_t>",
        "jitk::silu_and_mul<bf16_t>",
        "jitk::silu_and_mul<fp32_t>",
        "jitk::add_constant<5>",
        "jitk::add_constant<-3>",
        "jitk::add_constant<2147483647>",
    ]


def test_each_value_of_each_placeholder_is_there_once_at_least() -> None:
    wanted = build_ahead.needed(["apply_rope_store_kv", "relu2", "wait_kv_layer"], arch=["8.0", "9.0a"], backend="cuda")
    kept = build_ahead.holding_each_value(wanted)
    for op in {each.op for each in wanted}:
        for arch in ("8.0", "9.0a"):
            all_of, some = ([each.values for each in group if (each.op, each.arch) == (op, arch)] for group in (wanted, kept))
            assert set(some) <= set(all_of)
            assert [set(column) for column in zip(*some, strict=True)] == [set(column) for column in zip(*all_of, strict=True)]
    assert len(kept) == 2 * (5 + 3 + 1)  # dtypes of a cache, of a tensor, and no placeholder
    assert len(wanted) > 60


def test_dtypes_and_arguments_say_it_better(library: OpLibrary) -> None:
    assert names(build_ahead.needed("relu2", torch.float16, arch=["8.0", "9.0a"], backend="cuda")) == [
        "jitk::relu2<fp16_t> 8.0",
        "jitk::relu2<fp16_t> 9.0a",
    ]
    assert names(build_ahead.needed("add_constant", arguments={"constant": 7}, arch="9.0a", backend="cuda")) == [
        "jitk::add_constant<7> 9.0a"
    ]
    units = build_ahead.needed("warmlib::move", [torch.float32], {"count": ["1", 2], "way": ["forth", "back"]}, backend="cpu")
    assert labels(units) == [
        "warmlib::move<fp32_t, 1, warmlib::forth>",
        "warmlib::move<fp32_t, 1, warmlib::back>",
        "warmlib::move<fp32_t, 2, warmlib::forth>",
        "warmlib::move<fp32_t, 2, warmlib::back>",
    ]


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        ({"ops": "silu_and_mull"}, "there is no op 'silu_and_mull'; did you mean 'silu_and_mul'?"),
        ({"ops": "jitk::relu"}, "there is no op 'jitk::relu'; did you mean 'jitk::relu2'?"),
        ({"ops": "relu2", "dtypes": torch.int32}, "jitk::relu2 has kernels for float16, bfloat16, float32; got int32"),
        (
            {"ops": "add_constant", "arguments": {"constnt": 5}},
            "no op here has the placeholder 'constnt'; did you mean 'constant'?",
        ),
        ({"ops": "add_constant", "arguments": {"constant": "x"}}, "jitk::add_constant: {constant} must be an int; got 'x'"),
        ({"ops": "move", "arguments": {"way": "up"}}, "warmlib::move: {way} must be one of forth, back; got 'up'"),
        ({"ops": "move"}, "warmlib::move has no samples: give the values of x.dtype, count, way"),
        ({"backend": "rocm"}, "the backend must be cuda or cpu, got 'rocm'"),
        ({"arch": "90"}, "the CUDA architecture '90' must be of the form 8.0 or 9.0a"),
    ],
)
def test_what_cannot_be_built(library: OpLibrary, request_: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as caught:
        build_ahead.needed(**{"backend": "cpu", **request_})
    assert str(caught.value) == text


def test_build_compiles_once(library: OpLibrary) -> None:
    request_ = {"dtypes": torch.float32, "arguments": {"count": [3, 4], "way": "back"}, "backend": "cpu"}
    first = torch_jit_ops.build("move", **request_)
    assert first.kernels == 4  # with the dispatcher and the one for autograd
    assert torch_jit_ops.stats().ops["warmlib::move"].builds == 2
    forget()
    again = torch_jit_ops.build("move", **request_)
    assert (again.kernels, again.compiled, again.failures) == (4, 0, ())
    assert torch_jit_ops.stats().total.hits == 4


def test_a_terminal_shows_one_bar(library: OpLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name, value in {"JITK_VERBOSE": "1", "TERM": "xterm", "COLUMNS": "150"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", Terminal())
    forget()
    torch_jit_ops.build("move", torch.float32, {"count": 31, "way": "forth"}, backend="cpu")
    shown = sys.stderr.getvalue()
    assert "3/3" in shown
    assert "warmlib::move<fp32_t, 31, warmlib::forth> x86-64" in shown
    assert "jitk: compil" not in shown  # the lines of single builds


def test_one_that_does_not_compile_does_not_stop_the_others(library: OpLibrary) -> None:
    forget()
    with pytest.raises(torch_jit_ops.BuildError) as caught:
        torch_jit_ops.build("move", torch.float32, {"count": [13, 21], "way": "forth"}, backend="cpu", jobs=1)
    assert str(caught.value).startswith(
        "1 of 4 kernels could not be built\nwarmlib::move<fp32_t, 13, warmlib::forth> (cpu x86-64-v"
    )
    assert "thirteen is not served" in str(caught.value)
    assert torch_jit_ops.stats().ops["warmlib::move"].builds == 1


# --- manifests -------------------------------------------------------------------------------------


def test_a_run_is_recorded_and_replayed(library: OpLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "run.jsonl"
    monkeypatch.setenv("JITK_RECORD", str(file))
    x = torch.zeros(3)
    for way in ("forth", "back", "forth"):
        library.ops["move"](x, 5, way)
    library.ops["move"](x.double(), 5)  # no kernel, nothing to build
    line = {"op": "warmlib::move", "backend": "cpu", "values": {"x.dtype": "float32", "count": 5, "way": "forth"}}
    expected = [{**line, "arch": CPU.arch_of()}, {**line, "arch": CPU.arch_of()}]
    expected[1]["values"] = {**line["values"], "way": "back"}
    assert [json.loads(text) for text in file.read_text().splitlines()] == expected

    process.reset()  # as in another process
    library.ops["move"](x, 6)
    library.ops["move"]._boot.load(
        "cpu", [-1, *library.ops["move"].declaration.kernels["cpu"].pattern.key((torch.float32, 5, "back"))]
    )
    assert len(file.read_text().splitlines()) == 3

    monkeypatch.delenv("JITK_RECORD")
    assert labels(build_ahead.replayed(file)) == [
        "warmlib::move<fp32_t, 5, warmlib::forth>",
        "warmlib::move<fp32_t, 5, warmlib::back>",
        "warmlib::move<fp32_t, 6, warmlib::forth>",
    ]
    forget()
    report = torch_jit_ops.build(manifest=file)
    assert (report.kernels, report.compiled) == (5, 0)


def test_a_manifest_is_replayed_for_another_gpu(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    file.write_text(
        '{"op": "jitk::add_constant", "backend": "cuda", "values": {"constant": 5}, "arch": "8.0"}\n\n'
        '{"op": "jitk::add_constant", "backend": "cuda", "values": {"constant": 5}, "arch": "8.0"}\n'
        '{"op": "jitk::relu2", "backend": "cpu", "values": {"input.dtype": "float16"}, "arch": "x86-64-v3"}\n'
    )
    relu = "jitk::relu2<fp16_t> x86-64-v3"
    assert names(build_ahead.replayed(file)) == ["jitk::add_constant<5> 8.0", relu]
    assert names(build_ahead.replayed(file, arch="9.0a")) == ["jitk::add_constant<5> 9.0a", relu]
    assert names(build_ahead.replayed(file, arch="9.0a", backend="cuda")) == ["jitk::add_constant<5> 9.0a"]
    assert names(build_ahead.replayed(file, "relu2")) == [relu]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("{", "<file>:1: no line of a manifest: '{'"),
        ("[]", "<file>:1: no line of a manifest: '[]'"),
        (
            '{"op": "away::scale", "backend": "cpu", "values": {}, "arch": ""}',
            "<file> has the op away::scale, which is not declared here: import its library first",
        ),
        (
            '{"op": "jitk::relu2", "backend": "cpu", "values": {"n": 1}, "arch": "x86-64-v3"}',
            "jitk::relu2: the placeholders are input.dtype; got n",
        ),
        (
            '{"op": "jitk::relu2", "backend": "cpu", "values": {"input.dtype": "load"}, "arch": "x86-64-v3"}',
            "jitk::relu2: {input.dtype} must be a dtype, such as bfloat16; got 'load'",
        ),
        ('{"op": "jitk::relu2", "backend": "xpu", "values": {}, "arch": ""}', "<file>: jitk::relu2 has no xpu kernel"),
    ],
)
def test_a_manifest_that_cannot_be_replayed(tmp_path: Path, line: str, text: str) -> None:
    file = tmp_path / "run.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(ValueError) as caught:
        build_ahead.replayed(file)
    assert str(caught.value).replace(str(file), "<file>") == text


def test_a_record_that_cannot_be_written_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITK_RECORD", str(tmp_path / "missing/run.jsonl"))
    with pytest.warns(UserWarning, match=r"run\.jsonl cannot be written \(No such file or directory\); a::b is not recorded"):
        manifest.record(manifest.Entry("a::b", "cpu", (), "x86-64-v3"))


# --- how many at a time ----------------------------------------------------------------------------


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": "MemTotal: 1 kB\nMemAvailable:   100000000 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "jobs"),
    [
        ({}, 16),
        ({"proc/meminfo": "MemAvailable: 4000000 kB\n"}, 2),
        ({"proc/meminfo": "MemAvailable: 1000 kB\n"}, 1),
        # Version 2, a quota in a group around this process's own.
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "350000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
            },
            3,
        ),
        # Version 2 in a container, whose path is the host's.
        ({"proc/self/cgroup": "0::/../x\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": "8000000000\n",
                "sys/fs/cgroup/memory.current": "6000000000\n",
                "sys/fs/cgroup/memory.stat": "anon 2000000000\ninactive_file 4000000000\n",
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/x\n1:name=systemd:/x\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "600000\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
            },
            6,
        ),
    ],
)
def test_jobs_fit_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], jobs: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert compiler_jobs.compiler_jobs(machine(tmp_path, files)) == jobs
