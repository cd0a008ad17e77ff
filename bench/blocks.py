"""Whole blocks of a model: plain PyTorch, what ``torch.compile`` makes of it, with ``fuse``, and with the ops written in.

Method. Every candidate is checked against float64 first: its error may be at most twice that of plain eager PyTorch. On a GPU
one call of each is captured in a CUDA graph, and the replays of all candidates are interleaved: that is the time of the device.
The time of a call from Python is measured beside it, device included. On a CPU only the latter exists. Median over the rounds.
The weights exceed every cache, so that each call reads them from memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from bench import report
from bench.block_models import Plain, Size, TransformersSize, Written, transformers_llama
from bench.providers import Unavailable, reason
from bench.timing import Samples, interleave, us_per_call, without_garbage_collection

Call = Callable[[], Tensor]

BLOCK = "Llama block"
TRANSFORMERS = "transformers Llama"
TOKENS = (1, 64, 4096)
SMALL = Size(256, 512, 8, 2), TransformersSize(256, 512, 2, 8, 2, 1000)  # for a CPU
BASELINE = "compiled"
CANDIDATES = ("eager", BASELINE, "fused", "jitk eager", "jitk", "jitk, norms apart", "jitk, gates apart")
NORMS = ("rmsnorm", "fused_add_rmsnorm")
GATES = ("silu_and_mul",)


@dataclass(frozen=True)
class Result:
    """One model with one number of tokens. Times are microseconds a call.

    Attributes:
        device: by candidate, replays of a CUDA graph; empty on a CPU.
        host: by candidate, calls from Python, device included.
        kernels: by candidate, what one call launches on the GPU, copies included.
        errors: by candidate, relative to the norm of the result in float64.
        fused: how many places each op got from ``fuse``.
    """

    model: str
    tokens: int
    device: dict[str, Samples] = field(default_factory=dict)
    host: dict[str, Samples] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    fused: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        times = {kind: {name: taken.to_json() for name, taken in getattr(self, kind).items()} for kind in ("device", "host")}
        plain = {kind: getattr(self, kind) for kind in ("kernels", "errors", "missing", "wrong", "fused")}
        return {"model": self.model, "tokens": self.tokens, **times, **plain}


def _candidates(plain: nn.Module, written: nn.Module | None) -> tuple[dict[str, Callable[[Tensor], Tensor]], Any]:
    """What is measured, by its name in the tables, and the fusion whose report says what it did."""
    from torch_jit_ops.inductor import decompose, fuse

    fusion = fuse()

    def compiled(model: nn.Module, options: dict[str, Any] | None = None) -> Callable[[Tensor], Tensor]:
        return torch.compile(model, fullgraph=True, dynamic=False, options=options)

    found: dict[str, Callable[[Tensor], Tensor]] = {"eager": plain, BASELINE: compiled(plain)}
    found["fused"] = compiled(copy.copy(plain), fusion.options())
    if written is not None:
        found["jitk eager"] = written
        found["jitk"] = compiled(written)
        found["jitk, norms apart"] = compiled(copy.copy(written), decompose(NORMS).options())
        found["jitk, gates apart"] = compiled(copy.copy(written), decompose(GATES).options())
    return found, fusion


def measure(
    name: str, plain: nn.Module, written: nn.Module | None, truth: nn.Module, x: Tensor, tokens: int, rounds: int
) -> Result:
    """Check and time every candidate on ``x``."""
    result = Result(name, tokens)
    torch._dynamo.reset()
    candidates, fusion = _candidates(plain, written)
    calls: dict[str, Call] = {}
    graphs: dict[str, Callable[[], object]] = {}
    synchronize = torch.cuda.synchronize if x.is_cuda else lambda: None
    with torch.no_grad():
        exact = truth(x.double())
        for candidate, function in candidates.items():

            def call(function: Callable[[Tensor], Tensor] = function) -> Tensor:
                return function(x)

            try:
                result.errors[candidate] = ((call().double() - exact).norm() / exact.norm()).item()
            except Exception as error:  # Whatever a candidate raises, the others are still worth measuring.
                result.missing[candidate] = reason(error)
                continue
            allowed = 2 * result.errors["eager"] + 1e-6
            if not result.errors[candidate] <= allowed:
                result.wrong[candidate] = f"error {result.errors[candidate]:.1e}, allowed {allowed:.1e}"
                continue
            calls[candidate] = call
        del exact
        result.fused.update(fusion.report().counts())
        if x.is_cuda:
            for candidate, call in calls.items():
                result.kernels[candidate] = _launches(call)
                try:
                    graphs[candidate] = _captured(call)
                except Exception as error:  # such as a model that waits for the device
                    result.missing[f"{candidate} (CUDA graph)"] = reason(error)
        with without_garbage_collection():
            if graphs:
                result.device.update(interleave({key: _replays(replay) for key, replay in graphs.items()}, rounds))
            timed = {key: _block(call, synchronize) for key, call in calls.items()}
            result.host.update(interleave(timed, rounds))
    return result


def _captured(call: Call) -> Callable[[], object]:
    """The replay of one call in a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # libraries allocate their workspaces
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _replays(replay: Callable[[], object], calls: int = 10) -> Callable[[], float]:
    """A measurement of the device's time for a replay, of as many as hide the start of the first one."""

    def once() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        replay()
        start.record()
        for _ in range(calls):
            replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / calls

    return once


def _block(call: Call, synchronize: Callable[[], object], block_us: float = 20_000.0) -> Callable[[], float]:
    single = us_per_call(lambda: (call(), synchronize()), 2, synchronize)
    count = max(1, round(block_us / max(single, 0.1)))
    return lambda: us_per_call(lambda: (call(), synchronize()), count, synchronize)


def _launches(call: Call) -> int:
    """How many kernels and copies one call runs on the GPU."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def failed(results: Sequence[Result]) -> list[str]:
    """One line for each candidate that raised or was wrong."""
    lines = []
    for result in results:
        found = {**result.wrong, **{key: why for key, why in result.missing.items() if not key.endswith("(CUDA graph)")}}
        lines += [f"{result.model}, {result.tokens} tokens, {candidate}: {why}" for candidate, why in found.items()]
    return lines


def slower(results: Sequence[Result]) -> list[str]:
    """One line for each candidate with our ops that takes longer than plain compiled, by more than the noise."""
    lines = []
    for result in results:
        times = result.device or result.host
        for candidate in ("fused", "jitk"):
            if BASELINE in times and candidate in times and times[BASELINE].median < report.WORSE * times[candidate].median:
                share = times[BASELINE].median / times[candidate].median
                lines.append(f"{result.model}, {result.tokens} tokens: {candidate} has {share:.3f} of the speed of {BASELINE}")
    return lines


def _table(out: Console, title: str, results: Sequence[Result], cells: Callable[[Result, str], str]) -> None:
    names = [name for name in CANDIDATES if any(name in result.host for result in results)]
    rows = [[result.model, str(result.tokens), *(cells(result, name) for name in names)] for result in results]
    report.print_table(out, title, ["model", "tokens", *names], rows, labels=1)
    out.print()


def _time_cell(times: Mapping[str, Samples], name: str) -> str:
    if name not in times:
        return "-"
    text = f"{times[name].median:.1f}"
    if name != BASELINE and BASELINE in times:
        text += f"  {report.ratio(times[BASELINE].median / times[name].median)}x"
    return text


def _error_cell(result: Result, name: str) -> str:
    return f"{result.errors[name]:.1e}" if name in result.errors else "-"


def print_results(out: Console, results: Sequence[Result], what: str) -> None:
    """Three tables: time of the device, time of a call, kernels. Beside a time, how many times as fast as plain compiled."""
    speed = f"us a call, times as fast as {BASELINE}"
    if any(result.device for result in results):
        _table(out, f"blocks, {what}, CUDA graph: {speed}", results, lambda at, name: _time_cell(at.device, name))
        _table(out, f"blocks, {what}: kernels a call", results, lambda at, name: str(at.kernels.get(name, "-")))
    _table(out, f"blocks, {what}, from Python: {speed}", results, lambda at, name: _time_cell(at.host, name))
    _table(out, f"blocks, {what}: error against float64", results, _error_cell)
    notes = []
    for result in results:
        places = ", ".join(f"{count} {op}" for op, count in result.fused.items())
        notes.append(f"{result.model}, {result.tokens} tokens: fuse put {places or 'nothing'}")
        notes += [f"{result.model}, {result.tokens} tokens, {name}: {why}" for name, why in result.missing.items()]
    report.print_notes(out, notes + slower(results))


def run(
    out: Console,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    tokens: Sequence[int] = TOKENS,
    size: Size | None = None,
    transformers: TransformersSize | None = None,
) -> list[Result]:
    """Measure and print. Without ``transformers`` installed its model is left out, and the report says so."""
    size, transformers = size or Size(), transformers or TransformersSize()
    torch.manual_seed(0)
    results = []

    def measured(name: str, plain: nn.Module, written: nn.Module | None, hidden: int) -> None:
        plain = plain.to(device, dtype).eval()
        truth = copy.deepcopy(plain).double()
        if written is not None:
            # assign: the same memory, as two copies of the weights would only take room
            written.load_state_dict(plain.state_dict(), assign=True)
            written.eval()
        for count in tokens:
            x = torch.randn(1, count, hidden, device=device, dtype=dtype)
            results.append(measure(name, plain, written, truth, x, count, rounds))

    with torch.device(device):
        plain, written = Plain(size), Written(size)
    measured(BLOCK, plain, written, size.hidden)
    del plain, written
    try:
        with torch.device(device):
            model = transformers_llama(transformers)
    except Unavailable as why:
        report.print_notes(out, [f"{TRANSFORMERS} left out: {why}"])
    else:
        measured(TRANSFORMERS, model, None, transformers.hidden)
    print_results(out, results, f"{device.type}, {str(dtype).removeprefix('torch.')}")
    return results
