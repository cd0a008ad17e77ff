"""The pieces of the benchmarks, on the CPU and without peers: statistics, checks, reports, and the command line."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import torch_jit_ops
from bench import (
    accuracy,
    bare_compiler,
    block_models,
    blocks,
    cache_peers,
    child,
    compile,
    correctness,
    cpu,
    environment,
    host,
    kernels,
    providers,
    report,
    results,
    transfers,
)
from bench.__main__ import INTERRUPTED, OK, TOO_SLOW, USAGE, WRONG, main
from bench.cases import CASES, OPERATIONS, QUICK, Case, operations_of, select
from bench.providers import PROVIDERS, Provider, Unavailable, reason
from bench.recipes import RECIPES, Make
from bench.slots import FEWEST_CALLS, MOST_CALLS, ROTATION_BYTES, Slot, make_slots, plan
from bench.timing import Samples, interleave, percentile, round_order, us_per_call
from torch_jit_ops import OpLibrary
from torch_jit_ops.inductor import objections

REPOSITORY = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def printed(print_to) -> str:
    """What ``print_to(console)`` prints to a pipe."""
    file = io.StringIO()
    print_to(report.console(file))
    return file.getvalue()


# Statistics and order


def test_percentile_interpolates_between_neighbours():
    assert percentile([4, 1, 3, 2], 50) == 2.5
    assert percentile([10, 20], 10) == 11
    assert percentile([7], 90) == 7
    assert [percentile(range(11), percent) for percent in (0, 10, 90, 100)] == [0, 1, 9, 10]


def test_percentile_refuses_what_has_none():
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)
    with pytest.raises(ValueError, match="percent is 101, expected 0 to 100"):
        percentile([1], 101)


def test_samples_ignore_an_outlier():
    taken = Samples((10.0,) * 20 + (1000.0,))
    assert (taken.median, taken.low, taken.high, taken.spread) == (10, 10, 10, 0)
    assert Samples((9.0, 10.0, 11.0)).spread == pytest.approx(0.16)


def test_every_provider_meets_every_place_and_neighbour():
    names = ["a", "b", "c"]
    rounds = ["".join(round_order(names, index)) for index in range(6)]
    assert rounds == ["abc", "bca", "cab", "cba", "acb", "bac"]
    assert round_order([], 3) == []


def test_interleave_measures_each_once_per_round():
    seen = []
    samples = interleave({name: (lambda name=name: seen.append(name) or len(seen)) for name in "ab"}, 3)
    assert "".join(seen) == "abbaba"
    assert samples == {"a": Samples((1, 4, 6)), "b": Samples((2, 3, 5))}
    with pytest.raises(ValueError, match="rounds is 0"):
        interleave({}, 0)


def test_the_device_is_waited_for_outside_the_timed_region(monkeypatch):
    log = []
    clock = iter([0, 6_000])
    monkeypatch.setattr("bench.timing.time.perf_counter_ns", lambda: log.append("clock") or next(clock))
    assert us_per_call(lambda: log.append("call"), 3, lambda: log.append("wait")) == 2.0
    assert log == ["wait", "clock", "call", "call", "call", "clock", "wait"]


# Cases and arguments


def test_bytes_count_each_argument_once():
    assert Case("silu_and_mul", (4, 8)).bytes(2) == (4 * 16 + 4 * 8) * 2
    assert Case("relu2", (4, 8)).bytes(4) == (4 * 8 + 4 * 8) * 4
    assert Case("fused_add_relu", (4, 8)).bytes(2) == 3 * 4 * 8 * 2
    assert Case("fused_add_rmsnorm", (4, 8)).bytes(2) == 4 * 4 * 8 * 2
    assert Case("fused_qknorm", (4, 3, 1, 8)).bytes(2) == 2 * 2 * 4 * 4 * 8


@pytest.mark.parametrize("size", [1, 24_576, 2**20, 11_010_048, 25_165_824, 352_321_536, 2**31])
def test_buffers_rotate_evenly_and_exceed_the_cache(size):
    arranged = plan(size)
    assert 2 <= arranged.slots <= MOST_CALLS
    assert arranged.slots == MOST_CALLS or arranged.slots * size >= ROTATION_BYTES
    assert arranged.calls % arranged.slots == 0
    assert arranged.calls <= MOST_CALLS
    assert arranged.calls >= FEWEST_CALLS or size > 2**30


def test_plan_refuses_no_bytes():
    with pytest.raises(ValueError, match="bytes_per_call is 0"):
        plan(0)


@pytest.mark.parametrize("op", list(OPERATIONS))
def test_slots_hold_the_arguments_and_a_copy_of_the_same_bytes(op):
    case = Case(op, tuple(range(3, 3 + len(OPERATIONS[op].axes))))
    first, second = make_slots(case, 2, torch.bfloat16, CPU)
    assert all(given.shape == other.shape for given, other in zip(first.inputs, second.inputs, strict=True))
    expected = case.operation.results(*first.inputs)
    assert [result.shape for result in first.results] == [result.shape for result in expected]
    assert 0 <= case.bytes(2) - first.copy_to.nbytes - first.copy_from.nbytes <= 2  # halves of an odd number
    assert not torch.equal(first.inputs[0], second.inputs[0])


def test_every_op_is_measured_but_the_one_of_the_tutorial():
    between_memories = {"transfer_kv_one_layer", "transfer_kv_all_layers", "wait_kv_layer"}  # bench.transfers
    assert set(torch_jit_ops.library.ops) - {case.op for case in CASES} - between_memories == {"add_constant"}


def test_transfers_need_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert transfers.main([]) == 2
    assert capsys.readouterr().err == "there is no GPU to copy to\n"


def test_an_op_is_measured_if_sizes_make_its_calls(tmp_path):
    library = OpLibrary("measured", csrc=tmp_path)

    def declare(tensors, function):
        return library.op(tensors=tensors)(function)

    def gate(x: torch.Tensor, w: torch.Tensor, eps: float = 0.5) -> torch.Tensor:
        return x * w

    def pick(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return x[index]

    def scale(x: torch.Tensor, factor: float) -> torch.Tensor:
        return x * factor

    def undeclared(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y

    def fixed(x: torch.Tensor) -> torch.Tensor:
        return x.sum(0)

    ops = [
        declare({"x": "[tokens..., heads, 3*d] rows", "w": "[d]", "out": "[tokens..., d]"}, gate),
        declare({"x": "[shape...]", "index": "[n] int64"}, pick),
        declare({"x": "[shape...]"}, scale),
        declare({"x": "[shape...]"}, undeclared),
        declare({"x": "[*, d]"}, fixed),
    ]
    found = operations_of(ops)
    assert list(found) == ["gate"]
    assert found["gate"].axes == ("tokens", "heads", "d")
    assert found["gate"].shapes(5, 2, 4) == [(5, 2, 12), (4,)]


@pytest.mark.parametrize("op", [op for op in OPERATIONS if OPERATIONS[op].written])
def test_results_of_an_op_in_place_leave_its_inputs(op):
    slot = make_slots(Case(op, tuple(range(3, 3 + len(OPERATIONS[op].axes)))), 1, torch.float32, CPU)[0]
    before = [tensor.clone() for tensor in slot.inputs]
    made = OPERATIONS[op].results(*slot.inputs)
    assert all(torch.equal(now, then) for now, then in zip(slot.inputs, before, strict=True))
    assert not any(torch.equal(made[i], before[index]) for i, index in enumerate(OPERATIONS[op].written))


def test_the_baseline_computes_what_the_reference_does():
    for name, operation in OPERATIONS.items():
        slot = make_slots(Case(name, tuple(range(3, 3 + len(operation.axes)))), 1, torch.float64, CPU)[0]
        torch.testing.assert_close(operation.baseline_results(*slot.inputs), operation.results(*slot.inputs))


def test_select_narrows_and_makes_sizes_of_its_own():
    assert all(case.op == "relu2" and case.tokens == 1 for case in select(CASES, ["relu2"], [1]))
    assert select(CASES, ["relu2"], [640], [5120]) == (Case("relu2", (640, 5120)),)
    assert set(QUICK) <= set(CASES)
    assert len(set(CASES)) == len(CASES)


def test_select_names_what_it_does_not_know():
    with pytest.raises(ValueError, match="unknown op rmsnrm; known: silu_and_mul, "):
        select(CASES, ["rmsnrm"])
    with pytest.raises(ValueError, match="name both --tokens and --d"):
        select(CASES, [], [12345])


# Correctness


def outputs_of(op: str, compute) -> tuple[float, str | None]:
    """The verdict on ``compute(inputs, out)`` in bf16."""
    case = Case(op, {2: (5, 64), 3: (5, 2, 64), 4: (5, 3, 2, 64), 5: (5, 3, 2, 32, 64)}[len(OPERATIONS[op].axes)])
    slots = make_slots(case, 3, torch.bfloat16, CPU)
    allowed = correctness.allowed_error(case.operation, slots)
    correctness.poison(slots)
    for slot in slots:
        compute(slot.inputs, *slot.results)
    return correctness.judge(case.operation, slots, allowed)


@pytest.mark.parametrize("op", list(OPERATIONS))
def test_the_reference_computed_in_float32_is_right(op):
    def compute(inputs, *results):
        wide = (tensor.float() if tensor.is_floating_point() else tensor for tensor in inputs)
        for result, made in zip(results, OPERATIONS[op].results(*wide), strict=True):
            result.copy_(made)

    assert outputs_of(op, compute)[1] is None


def test_what_an_op_in_place_leaves_undone_is_found():
    def residual_alone(inputs, input, residual):
        residual.copy_(OPERATIONS["fused_add_rmsnorm"].results(*inputs)[1])

    assert outputs_of("fused_add_rmsnorm", residual_alone)[1].startswith("wrong result: relative error ")


def test_an_element_that_is_not_written_is_found():
    def all_but_one(inputs, out):
        out[:4].copy_(OPERATIONS["relu2"].reference(inputs[0][:4]))
        out[4, :-1].copy_(OPERATIONS["relu2"].reference(inputs[0][4, :-1]))

    assert outputs_of("relu2", all_but_one)[1].startswith("wrong result: relative error inf, allowed 0.0")


def test_swapped_halves_are_found():
    silu_and_mul = OPERATIONS["silu_and_mul"].reference
    assert outputs_of("silu_and_mul", lambda inputs, out: out.copy_(silu_and_mul(inputs[0].roll(64, -1))))[1]


def test_the_other_gelu_is_found():
    erf = OPERATIONS["gelu_and_mul"].reference
    assert outputs_of("gelu_tanh_and_mul", lambda inputs, out: out.copy_(erf(inputs[0].float())))[1]


# Providers


def test_a_reason_is_one_line():
    assert reason(Unavailable("not installed")) == "not installed"
    assert reason(ValueError("\nfirst\nsecond")) == "ValueError: first"
    assert reason(ValueError()) == "ValueError: no message"
    assert len(reason(ValueError("x" * 1000))) == 300


def test_loading_is_tried_once():
    tries = []

    def load():
        tries.append(1)
        raise ImportError("no such thing")

    for _ in range(2):
        with pytest.raises(Unavailable, match=r"^ImportError: no such thing$"):
            providers._loaded(load)
    assert len(tries) == 1


def test_a_peer_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(providers, "find_spec", lambda name: None)
    monkeypatch.setattr(providers, "_attempt", providers._attempt.__wrapped__)
    for name in ("sglang", "flashinfer"):
        with pytest.raises(Unavailable, match="not installed; get it with: pip install "):
            PROVIDERS[name].bind(OPERATIONS["silu_and_mul"])


# Reports


def timed(us: float) -> Samples:
    return Samples((us * 0.99, us, us * 1.01))


def some_results() -> list[results.Result]:
    not_there = {"sglang": "not installed", "flashinfer": "has no relu2"}
    return [
        results.Result(
            Case("relu2", (1, 4096)),
            16384,
            64,
            {"jitk": timed(1.0), "inductor": timed(1.2), "copy": timed(1.25)},
            None,
            not_there,
        ),
        results.Result(
            Case("relu2", (1024, 4096)),
            16777216,
            32,
            {"jitk": timed(5.0), "inductor": timed(4.0), "copy": timed(4.0)},
            {"jitk": timed(5.0), "inductor": timed(3.5), "copy": timed(4.0)},
            {"sglang": "not installed"},
        ),
        results.Result(
            Case("relu2", (77, 2880)),
            887040,
            64,
            {"inductor": timed(1.5)},
            None,
            not_there,
            {"jitk": "wrong result: relative error inf, allowed 0.01"},
        ),
    ]


def test_kernel_table_is_pinned():
    given, names = some_results(), ("jitk", "sglang", "flashinfer", "inductor", "copy")

    def show(out):
        report.print_table(out, "relu2", results.columns(names), [results.row(item, names) for item in given])
        report.print_notes(out, results.notes(given))
        report.print_notes(out, results.summary(given))

    assert printed(show) == (
        "relu2\n"
        "| (tokens, d)   | jitk | sglang | flashinfer | inductor | copy | best peer | best/ours | ours/copy | TB/s | spread |\n"
        "|---------------|------|--------|------------|----------|------|-----------|-----------|-----------|------|--------|\n"
        "| (1, 4096)     | 1.00 |      - |          - |     1.20 | 1.25 |  inductor |      1.20 |      0.80 | 0.02 |     2% |\n"
        "| (1024, 4096)* | 5.00 |      - |          - |     4.00 | 4.00 |  inductor |      0.80 |      1.25 | 3.36 |     2% |\n"
        "| (77, 2880)    |    - |      - |          - |     1.50 |    - |  inductor |         - |         - |    - |     2% |\n"
        "  sglang: not installed\n"
        "  flashinfer: has no relu2  [at (1, 4096), (77, 2880)]\n"
        "  jitk: wrong result: relative error inf, allowed 0.01  [at (77, 2880)]\n"
        "  * (1024, 4096): best/ours was 0.70 at first, measured again with more replays\n"
        "\n"
        "  best/ours: worst 0.800 at relu2 (1024, 4096); 1 of 2 cases at 1.00 or more, 1 within 2% of it\n"
        "  below 1.00: relu2 (1024, 4096) 0.800 (inductor)\n"
        "  ours/copy: worst 1.250 at relu2 (1024, 4096)\n"
        "\n"
    )


def test_only_ours_makes_a_run_fail():
    assert results.failed(some_results()) == ["jitk relu2 (77, 2880): wrong result: relative error inf, allowed 0.01"]
    assert results.failed(some_results()[:2]) == []


def test_ratios_beyond_the_noise_are_marked():
    assert [report.ratio(value) for value in (1.5, 1.01, 0.99, 0.9, None)] == [
        "[green]1.50[/green]",
        "1.01",
        "0.99",
        "[red]0.90[/red]",
        "-",
    ]


def test_a_reason_is_printed_once():
    assert report.merge_reasons([("a", "x"), ("b", "y"), ("c", "x"), ("a", "x")]) == ["a, c: x", "b: y"]


def test_json_holds_every_sample(tmp_path):
    target = tmp_path / "results.json"
    report.write_json(target, {"kernels": [item.to_json() for item in some_results()]})
    first = json.loads(target.read_text())["kernels"][0]
    assert first["us"]["jitk"]["values"] == [0.99, 1.0, 1.01]
    assert first["sizes"] == {"tokens": 1, "d": 4096}
    assert (first["op"], first["sizes"]["tokens"], first["ratio"], first["best_peer"]) == ("relu2", 1, 1.2, "inductor")
    assert list(tmp_path.iterdir()) == [target]


def test_the_environment_names_the_software():
    facts = environment.describe()
    assert torch.__version__ in facts["torch"]
    assert {"CPU", "compilers", "peers", "revision", "date", "command"} <= set(facts)


def test_compiled_code_goes_to_a_temporary_folder(monkeypatch):
    monkeypatch.setenv("JITK_CACHE_DIR", "/kept")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    with environment.compiled_code_in(None) as folder:
        assert os.environ["JITK_CACHE_DIR"] == str(folder.resolve() / "jitk")
        assert os.environ["JITK_FALLBACK"] == "error"
    assert not folder.exists()
    assert os.environ["JITK_CACHE_DIR"] == "/kept"
    assert "TRITON_CACHE_DIR" not in os.environ


# Host time


def _right(x, out):
    return lambda: out.copy_(host._eager(x))


def _wrong(x, out):
    return lambda: out.copy_(x[..., : out.shape[-1]])


def _broken(x, out):
    raise Unavailable("not built")


STUBS = (
    host.ROWS[0],
    host.Row("right", _right, goal=0.0, is_ours=True),
    host.Row("wrong", _wrong, is_ours=True),
    host.Row("broken", _broken, is_ours=True),
    host.Row("peer", _broken, is_peer=True),
)


def test_host_times_what_works_and_explains_the_rest():
    out = io.StringIO()
    taken = host.run(report.console(out), CPU, torch.bfloat16, 3, rows=STUBS, calls=5)
    assert [result.mode for result in taken] == ["inference", "grad"]
    for result in taken:
        assert set(result.samples) == {host.RELU, "right"}
        assert result.over_relu("right") > 0
        assert result.missing["broken"] == "not built"
        assert result.missing["wrong"].startswith("ValueError: wrong result: relative error ")
    assert len(host.failed(STUBS, taken)) == 2
    assert "peer" not in out.getvalue()


def test_host_table_is_pinned():
    given = host.Result("inference", "cuda", {host.RELU: timed(4.0), "right": timed(2.0)}, {"broken": "not built"})
    shown = printed(lambda out: report.print_table(out, "host", *host.table(STUBS[:2] + STUBS[3:4], [given])))
    assert shown == (
        "host\n"
        "| call          | inference: us | spread | x relu |    goal |\n"
        "|---------------|---------------|--------|--------|---------|\n"
        "| torch.relu(x) |          4.00 |     2% |   1.00 |         |\n"
        "| right         |          2.00 |     2% |   0.50 | <= 0.00 |\n"
        "| broken        |             - |      - |      - |         |\n"
    )


# CPU kernels


def test_cpu_checks_before_it_times(monkeypatch):
    def forgets_rows(operation):
        return lambda slot: slot.out[1:].copy_(operation.reference(*(tensor[1:] for tensor in slot.inputs)))

    monkeypatch.setitem(PROVIDERS, "jitk", Provider("jitk", "stub", forgets_rows, is_peer=False))
    taken = cpu.measure(Case("relu2", (4, 64)), torch.float32, 2, ("jitk", "eager", "copy"))
    assert set(taken.samples) == {"eager", "copy"}
    assert taken.wrong["jitk"].startswith("wrong result: relative error inf")
    assert taken.best_peer == "eager"


# Compile and load

STUB_PACKAGE = """
import subprocess, sys, torch

library = torch.library.Library("jitk", "DEF")

def build(x):
    from pathlib import Path
    import os
    built = Path(os.environ["JITK_CACHE_DIR"]) / "built"
    if not built.exists():
        subprocess.run([sys.executable, "-S", "-c", ""], check=True)
        built.parent.mkdir(parents=True)
        built.touch()
    return x

for name in ("silu_and_mul", "gelu_and_mul"):
    library.define(f"{name}(Tensor input) -> Tensor")
    library.impl(name, build, "CPU")
"""


@pytest.fixture
def stub_package(tmp_path, monkeypatch):
    """A package of our name, found before ours, that starts one process when its cache is empty."""
    (tmp_path / "torch_jit_ops.py").write_text(STUB_PACKAGE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_first_calls_are_timed_cold_and_warm(stub_package):
    taken = compile.measure("cpu", "90a", 1, ["jitk"])
    ours = taken.libraries["jitk"]
    assert ours.missing is None
    assert (ours.cold_children["first call"], ours.cold_children["next op"]) == (1, 0)
    assert sum(ours.warm_children.values()) == 0
    assert ours.cold["first call"].median > ours.warm["first call"].median > 0
    assert taken.bare[bare_compiler.LINK].median > 0
    json.dumps(taken.to_json())


# Python runs a module of this name first: here for an import of torch that starts a process, as that of PyTorch 2.15 does.
STARTS_WITH_TORCH = """
import subprocess, sys

class Finder:
    def find_spec(self, name, *_):
        if name == "torch":
            sys.meta_path.remove(self)
            subprocess.run([sys.executable, "-S", "-E", "-c", ""], check=True)

sys.meta_path.insert(0, Finder())
"""


def test_what_the_import_of_torch_starts_is_not_counted(stub_package, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(STARTS_WITH_TORCH)
    (tmp_path / "cache").mkdir()
    started = compile.first_call("jitk", "cpu", tmp_path / "cache")["children"]
    assert started == {stage: int(stage == "first call") for stage in compile.STAGES}


def test_strace_counts_what_pytorch_does_not_start(tmp_path, monkeypatch):
    """As strace writes it, with a stand-in: the program, a child of `import torch`, and one of the library."""
    (tmp_path / "bin").mkdir()
    strace = tmp_path / "bin/strace"
    strace.write_text(
        "#!/bin/sh\nfor last; do :; done\n"
        'echo \'1 execve("python") = 0\' >"$5"; echo \'2 execve("of torch") = 0\' >>"$5"\n'
        'echo \'2 execve("gone") = -1 ENOENT\' >>"$5"\n'
        '[ "$last" = "import torch" ] || echo \'3 execve("of the library") = 0\' >>"$5"\n'
    )
    strace.chmod(0o755)
    monkeypatch.setenv("PATH", str(strace.parent), prepend=os.pathsep)
    assert compile.trace_children("jitk", "cpu", tmp_path) == 1


def test_a_library_that_fails_is_a_reason(tmp_path, monkeypatch):
    (tmp_path / "torch_jit_ops.py").write_text("raise ImportError('broken on purpose')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ours = compile.measure("cpu", "90a", 1, ["jitk"]).libraries["jitk"]
    assert ours.missing == "exit status 1: ImportError: broken on purpose"


def test_the_compilers_own_words_are_the_reason(tmp_path):
    script = "import sys; sys.exit('a.cu(1): note\\na.cu(2): error: no such type\\ncompilation terminated.')"
    with pytest.raises(Unavailable, match=r"^exit status 1: a\.cu\(2\): error: no such type$"):
        child.run_child([sys.executable, "-c", script], dict(os.environ), tmp_path)
    with pytest.raises(Unavailable, match="no-such-compiler: "):
        child.run_child(["no-such-compiler"], dict(os.environ), tmp_path)


def test_compile_report_is_pinned():
    def stages(torch_s, library_s, first, following):
        seconds = (torch_s, library_s, first, 0.00001, following, 0.00001)
        return {stage: Samples((value,)) for stage, value in zip(compile.STAGES, seconds, strict=True)}

    def children(first, following):
        return dict(zip(compile.STAGES, (0, 0, first, 0, following, 0), strict=True))

    ours = compile.FirstCall(
        "jitk", stages(2, 0.02, 2.5, 1.2), stages(2, 0.02, 0.003, 0.0005), children(6, 3), children(0, 0), 0
    )
    peer = compile.FirstCall("sglang", stages(2, 4.8, 6.0, 0.0001), stages(2, 4.8, 0.1, 0.0001), children(9, 0), children(4, 0))
    gone = compile.FirstCall("flashinfer", missing="not installed")
    bare = {bare_compiler.COMPILE: Samples((1.0,)), bare_compiler.LINK: Samples((1.1,)), bare_compiler.HEADERS: Samples((1.3,))}
    given = compile.Result("cuda", "nvcc", bare, {item.library: item for item in (ours, peer, gone)})

    def show(out):
        report.print_table(out, "compile", *compile.table(given))
        report.print_notes(out, compile.summary(given))

    assert printed(show) == (
        "compile\n"
        "| what                                 | import torch | + library | first call | next op | processes | x bare |\n"
        "|--------------------------------------|--------------|-----------|------------|---------|-----------|--------|\n"
        "| bare nvcc, compile only              |              |           |            |  1.00 s |           |   1.00 |\n"
        "| bare nvcc, compile and link          |              |           |            |  1.10 s |           |   1.10 |\n"
        "| bare nvcc, with every header of jitk |              |           |            |  1.30 s |           |   1.30 |\n"
        "| jitk, nothing cached                 |       2.00 s |  20.00 ms |     2.50 s |  1.20 s |     6 + 3 |   1.20 |\n"
        "| jitk, all cached                     |       2.00 s |  20.00 ms |    3.00 ms | 0.50 ms |     0 + 0 |   0.00 |\n"
        "| sglang, nothing cached               |       2.00 s |    4.80 s |     6.00 s | 0.10 ms |     9 + 0 |   0.00 |\n"
        "| sglang, all cached                   |       2.00 s |    4.80 s |     0.10 s | 0.10 ms |     4 + 0 |   0.00 |\n"
        "| flashinfer, nothing cached           |            - |         - |          - |       - |         - |      - |\n"
        "| flashinfer, all cached               |            - |         - |          - |       - |         - |      - |\n"
        "  every header over the bare compiler: 1.30 (goal <= 1.25: missed)\n"
        "  new variant over the bare compiler: 1.20 (goal <= 1.25: met)\n"
        "  loading a cached variant, ms: 0.49 (goal <= 1: met)\n"
        "  processes started with all cached: 0.00 (goal <= 0: met)\n"
        "  programs that strace saw in that whole process, beyond those of `import torch`: 0\n"
        "  import torch_jit_ops over import torch, ms: 20.00 (goal <= 30: met)\n"
        "  sglang's first call over our new variant: 5.00 (goal >= 4: met)\n"
        "\n"
    )


def test_the_cpu_has_no_goal_for_the_compiler():
    seconds = {stage: Samples((0.1,)) for stage in compile.STAGES}
    ours = compile.FirstCall("jitk", seconds, seconds, dict.fromkeys(compile.STAGES, 1), dict.fromkeys(compile.STAGES, 0))
    bare = {bare_compiler.COMPILE: Samples((0.02,)), bare_compiler.HEADERS: Samples((0.06,))}
    assert compile.summary(compile.Result("cpu", "g++", bare, {"jitk": ours}))[0].startswith("loading a cached variant, ms: ")


# Accuracy


def test_errors_count_units_in_the_last_place():
    exact = torch.tensor([1.0, 2.0, 1.5, 0.0, -4.0], dtype=torch.float64)
    actual = torch.tensor([1.0078125, 2.0, 1.5, 0.0, -4.03125], dtype=torch.bfloat16)
    assert accuracy.errors_of(actual, exact) == accuracy.Errors(1.0, 2 / 5, 0.0078125)
    assert str(accuracy.errors_of(actual, exact)) == "1.000 0.400 7.8e-03"
    small = torch.tensor([2.0**-24], dtype=torch.float64)
    assert accuracy.errors_of(torch.tensor([0.0], dtype=torch.float16), small) == accuracy.Errors(1.0, 1.0, 0.0)


def test_an_infinity_is_right_only_where_the_exact_result_rounds_to_one():
    exact = torch.tensor([1e6, 1.0], dtype=torch.float64)
    assert accuracy.errors_of(torch.tensor([torch.inf, 1.0], dtype=torch.float16), exact).max_ulp == 0
    for wrong in (torch.nan, torch.inf):
        assert accuracy.errors_of(torch.tensor([torch.inf, wrong], dtype=torch.float16), exact).max_ulp == torch.inf
    assert accuracy.errors_of(torch.tensor([-torch.inf, 1.0], dtype=torch.float16), exact).max_ulp == torch.inf


@pytest.mark.parametrize("kind", accuracy.INPUTS)
def test_hard_inputs_are_finite_and_sums_of_two_are(kind):
    for case in accuracy.QUICK:
        slot = accuracy.make_slot(case, kind, torch.float16, CPU)
        assert all((tensor + tensor).isfinite().all() for tensor in slot.inputs)


@pytest.mark.parametrize("case", accuracy.QUICK, ids=lambda case: case.op)
@pytest.mark.parametrize("dtype", accuracy.DTYPES, ids=str)
def test_the_norms_are_nearly_correctly_rounded(case, dtype):
    names = ("jitk", "F.*_norm", "eager")
    taken = accuracy.measure(case, dtype, CPU, bindings={name: accuracy.BINDINGS[name] for name in names})
    assert len(taken) == len(accuracy.INPUTS) * len(accuracy.RESULTS.get(case.op, ("out",)))
    assert accuracy.failed(taken) == []
    for result in taken:
        assert set(result.errors) == set(names)
        ours, plain = result.errors["jitk"], result.errors["eager"]
        assert 0 < ours.mean_ulp <= 1.05 * plain.mean_ulp, result.name
        assert ours.max_ulp <= 2 * max(plain.max_ulp, 0.5), result.name


def test_a_provider_that_writes_nothing_is_not_finite():
    bindings = {"jitk": lambda operation: lambda slot: None, "sglang": lambda operation: 1 / 0}
    taken = accuracy.measure(accuracy.QUICK[0], torch.bfloat16, CPU, ["normal"], bindings)
    assert taken[0].errors["jitk"].max_ulp == float("inf")
    assert taken[0].missing == {"sglang": "ZeroDivisionError: division by zero"}
    assert accuracy.failed(taken) == ["jitk rmsnorm out, bfloat16, normal: wrong result: not finite"]


def test_the_table_of_errors():
    case = Case("fused_add_rmsnorm", (8, 512))
    given = [
        accuracy.Result(
            case,
            torch.bfloat16,
            "norm",
            "mean 1000",
            {"jitk": accuracy.Errors(0.5, 0.25, 0.004), "F.*_norm": accuracy.Errors(1234.0, 0.25, 1.0)},
            {"sglang": "not installed"},
        )
    ]
    shown = printed(lambda out: accuracy.print_results(out, given, ["jitk", "sglang", "F.*_norm"], "Errors"))
    assert shown == (
        "Errors: max ulp, mean ulp, max relative\n"
        "| op                | result | inputs    |                jitk | sglang |               F.*_norm |\n"
        "|-------------------|--------|-----------|---------------------|--------|------------------------|\n"
        "| fused_add_rmsnorm | norm   | mean 1000 | 0.500 0.250 4.0e-03 |      - | 1.23e+03 0.250 1.0e+00 |\n"
        "  sglang fused_add_rmsnorm: not installed\n"
        "  fused_add_rmsnorm, norm: jitk normalises the rounded sum, as the two steps do one after the other; "
        "against the exact sum that rounding counts as an error\n"
        "\n"
    )


def test_inductor_runs_what_works_in_place():
    case = Case("fused_add_rmsnorm", (3, 64))
    (slot,) = make_slots(case, 1, torch.bfloat16, CPU)
    allowed = correctness.allowed_error(case.operation, [slot])
    PROVIDERS["inductor"].bind(case.operation)(slot)
    assert correctness.judge(case.operation, [slot], allowed)[1] is None


def test_accuracy_writes_what_it_shows(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(environment, "describe", lambda: {"date": "today"})
    monkeypatch.setattr(accuracy, "BINDINGS", {"jitk": accuracy.BINDINGS["jitk"]})
    monkeypatch.setattr(accuracy, "DTYPES", accuracy.DTYPES[:1])
    target = tmp_path / "errors.json"
    assert main(["accuracy", "--quick", "--op", "rmsnorm", "--device", "cpu", "--json", str(target)]) == OK
    written = json.loads(target.read_text())["accuracy"]
    assert {row["inputs"] for row in written} == set(accuracy.INPUTS)
    assert all(row["errors"]["jitk"]["max_ulp"] <= 0.51 for row in written)
    assert "Errors against float64, cpu, bfloat16" in capsys.readouterr().out


def test_accuracy_of_an_op_that_it_has_not_is_a_usage_error(capsys):
    assert main(["accuracy", "--device", "cpu", "--op", "relu2"]) == USAGE
    expected = "accuracy has no relu2; it has: rmsnorm, layernorm, fused_add_rmsnorm, fused_qknorm\n"
    assert capsys.readouterr().err == expected


# Blocks


def test_blocks_are_checked_and_timed(monkeypatch, capsys):
    monkeypatch.setattr(objections, "served", lambda op: {"cpu"})

    def absent(size):
        raise Unavailable("transformers: not here")

    monkeypatch.setattr(blocks, "transformers_llama", absent)
    size = block_models.Size(64, 128, 4, 2, 1)
    (result,) = blocks.run(report.console(), CPU, torch.bfloat16, 2, (3,), size)
    assert blocks.failed([result]) == []
    assert set(result.host) == set(result.errors) == set(blocks.CANDIDATES)
    assert result.fused == {"jitk::fused_add_rmsnorm": 1, "jitk::rmsnorm": 2, "jitk::rope_qk": 1, "jitk::silu_and_mul": 1}
    assert all(samples.median > 0 for samples in result.host.values())
    json.dumps(result.to_json(), allow_nan=False)
    printed = capsys.readouterr().out
    assert "transformers Llama left out: transformers: not here" in printed
    assert (
        "Llama block, 3 tokens: fuse put 1 jitk::fused_add_rmsnorm, 2 jitk::rmsnorm, 1 jitk::rope_qk, 1 jitk::silu_and_mul"
        in printed
    )


def test_a_block_that_is_wrong_is_not_timed():
    class Wrong(torch.nn.Module):
        def forward(self, x):
            return x * 1.5

    class Plain(torch.nn.Module):
        def forward(self, x):
            return x + 1

    taken = blocks.measure("tiny", Plain(), Wrong(), Plain(), torch.randn(1, 4, 8), 4, 1)
    assert set(taken.host) == {"eager", "compiled", "fused"}
    assert set(taken.wrong) == {"jitk eager", "jitk", "jitk, norms apart", "jitk, gates apart"}
    assert blocks.failed([taken])[0].startswith("tiny, 4 tokens, jitk eager: error ")


def test_what_is_slower_than_plain_compiled_is_told():
    times = {"compiled": Samples((10.0,)), "fused": Samples((10.1,)), "jitk": Samples((12.5,))}
    assert blocks.slower([blocks.Result("block", 64, times)]) == ["block, 64 tokens: jitk has 0.800 of the speed of compiled"]


# Command line


def test_help_teaches():
    done = subprocess.run([sys.executable, "-m", "bench", "--help"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for text in ("examples:", "python -m bench kernels --quick", "exit status: 0 done; 1 ", "--json FILE"):
        assert text in done.stdout


def test_kernels_without_a_gpu_is_a_usage_error(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["kernels"]) == USAGE
    assert capsys.readouterr().err == "no CUDA device here; host, compile, cpu and accuracy run without one (--device cpu)\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["host", "--device", "cpu", "--op", "nothing"], "unknown op nothing; known: silu_and_mul, "),
        (["host", "--device", "cpu", "--providers", "nobody"], "unknown provider nobody; known: jitk, "),
    ],
)
def test_a_name_that_does_not_exist_is_a_usage_error(arguments, message, capsys):
    assert main(arguments) == USAGE
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["kernels", "--tokens", "0"]])
def test_bad_arguments_exit_with_2(arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == USAGE


def test_list_shows_ops_and_providers(capsys):
    assert main(["kernels", "--list"]) == OK
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*OPERATIONS, *PROVIDERS))


@pytest.mark.parametrize(
    ("given", "status"), [(some_results()[:1], OK), (some_results()[:2], TOO_SLOW), (some_results(), WRONG)]
)
def test_exit_status_tells_wrong_from_slow(given, status, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(environment, "describe", lambda: {"date": "today"})
    monkeypatch.setattr(kernels, "run", lambda *arguments: given)
    target = tmp_path / "results.json"
    assert main(["kernels", "--fail-under", "0.95", "--json", str(target)]) == status
    written = json.loads(target.read_text())
    assert written["environment"] == {"date": "today"}
    assert len(written["kernels"]) == len(given)
    assert "took kernels 0 s" in capsys.readouterr().out


def test_what_is_measured_is_kept_when_a_later_part_stops(monkeypatch, tmp_path):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(environment, "describe", lambda: {"date": "today"})
    monkeypatch.setattr(host, "run", lambda *arguments: [host.Result("grad", "cpu", {host.RELU: timed(1.0)})])
    monkeypatch.setattr(compile, "run", stop)
    target = tmp_path / "results.json"
    assert main(["all", "--device", "cpu", "--json", str(target)]) == INTERRUPTED
    assert json.loads(target.read_text())["host"][0]["us"][host.RELU]["median"] == 1.0


def test_the_kernel_benchmark_keeps_going_past_a_provider_that_raises(monkeypatch):
    """The whole of ``Bench.run`` but for the GPU: graphs that are loops, and timings that are given."""

    class Graph:
        def __init__(self, call, slots):
            self.replay = lambda: [call(slot) for slot in slots]

    def raises(operation):
        raise RuntimeError("no such kernel\nand more")

    def reference(operation):
        def call(slot: Slot) -> None:
            slot.out.copy_(operation.reference(*slot.inputs))

        return call

    rounds_seen = []

    def measure(graphs, calls, rounds, ahead, stream):
        rounds_seen.append(rounds)
        return {name: timed(2.0 if name == "jitk" else 1.0) for name in graphs}

    monkeypatch.setattr("bench.replay.capture", lambda call, slots, calls, stream: Graph(call, slots))
    monkeypatch.setattr("bench.replay.measure", measure)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setitem(PROVIDERS, "jitk", Provider("jitk", "stub", reference, is_peer=False))
    monkeypatch.setitem(PROVIDERS, "inductor", Provider("inductor", "stub", reference))
    monkeypatch.setitem(PROVIDERS, "sglang", Provider("sglang", "stub", raises))
    bench = object.__new__(kernels.Bench)
    bench.device, bench.dtype, bench.rounds, bench.stream, bench.ahead = CPU, torch.bfloat16, 9, None, None
    bench.providers = ("jitk", "sglang", "inductor", "copy")
    taken = bench.run(Case("silu_and_mul", (3, 64)))
    assert set(taken.samples) == {"jitk", "inductor", "copy"}
    assert taken.missing == {"sglang": "RuntimeError: no such kernel"}
    assert taken.wrong == {}
    assert taken.ratio == 0.5
    assert rounds_seen == [9, 9 * kernels.MORE_ROUNDS]
    assert taken.first is not None


# Peers' stores, by stand-ins that do what the peers' documentation says


def _set_mla_kv_buffer(cache, loc, nope, rope, *, reserved_skip_index):
    kept = loc != reserved_skip_index
    cache[loc[kept]] = torch.cat((nope, rope), 1)[kept]


def _fused_fp8_qkv_kv_cache(q, k, v, k_cache, v_cache, loc, k_scale, v_scale):
    assert q is None
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        assert cache.dtype == torch.float8_e4m3fn
        cache.view(torch.uint8)[loc] = (x.float() / scale).to(torch.float8_e4m3fn).view(torch.uint8)


def _append(rows, batch_indices, positions, cache, indices, indptr, last_page_len):
    """``cache``: [pages, page_size, ...]; of FlashInfer's page.cuh."""
    assert {x.dtype for x in (batch_indices, positions, indices, indptr, last_page_len)} == {torch.int32}
    assert (indptr.diff() == 1).all()
    place = indptr[batch_indices.long()] * cache.shape[1] + positions
    cache[indices[(place // cache.shape[1]).long()].long(), (place % cache.shape[1]).long()] = rows


def _append_paged_kv_cache(k, v, batch_indices, positions, caches, *pages):
    for x, cache in zip((k, v), caches, strict=True):
        assert cache.dim() == 4
        _append(x, batch_indices, positions, cache, *pages)


def _append_paged_mla_kv_cache(ckv, kpe, batch_indices, positions, ckv_cache, kpe_cache, *pages):
    _append(ckv, batch_indices, positions, ckv_cache, *pages)
    _append(kpe, batch_indices, positions, kpe_cache, *pages)


@pytest.mark.parametrize(
    ("library", "op", "module", "function"),
    [
        ("sglang", "store_mla_cache", "sglang.kernels.ops.kvcache.set_mla_kv_buffer", _set_mla_kv_buffer),
        ("sglang", "downcast_fp8", "sglang.kernels.ops.kvcache.fused_fp8_qkv_kv_cache", _fused_fp8_qkv_kv_cache),
        ("flashinfer", "store_kv_cache", "flashinfer.page", _append_paged_kv_cache),
        ("flashinfer", "store_mla_cache", "flashinfer.page", _append_paged_mla_kv_cache),
    ],
)
def test_peers_are_asked_to_store_what_the_op_stores(monkeypatch, library, op, module, function):
    stand_in = types.ModuleType(module)
    setattr(stand_in, function.__name__.removeprefix("_"), function)
    for end in range(module.count(".") + 1):
        parent = ".".join(module.split(".")[: end + 1])
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, module, stand_in)
    sizes = (5, 512, 64) if op == "store_mla_cache" else (5, 2, 16)
    inputs = RECIPES[op].inputs(Make(torch.bfloat16, CPU, torch.Generator().manual_seed(0)), sizes)
    theirs = tuple(tensor.clone() for tensor in inputs)
    OPERATIONS[op].reference(*inputs)
    cache_peers.PEERS[library][op](*theirs)()
    assert all(torch.equal(mine, other) for mine, other in zip(inputs, theirs, strict=True))
