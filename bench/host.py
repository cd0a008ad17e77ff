"""Host time of one eager call: what Python, the dispatcher and the launch cost, whatever the kernel does.

Method. Blocks of a few hundred asynchronous calls on [8, 2048], one block of every row per round, the order changing from
round to round; the device is waited for outside the timed region; the median over the rounds. ``torch.relu`` of the input is
the measure: one ATen op that allocates.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from bench import report
from bench.correctness import FLOAT32_ROUNDINGS, relative_error
from bench.providers import flashinfer_function, jitk_packet, reason, sglang_function
from bench.timing import Samples, interleave, us_per_call, without_garbage_collection

TOKENS, WIDTH = 8, 2048

# Below a thousand launches, the length of the queue of CUDA, beyond which a launch waits for the device.
CALLS_PER_BLOCK = 300

MODES = {"inference": torch.inference_mode, "grad": torch.enable_grad}

RELU = "torch.relu(x)"


@dataclass(frozen=True)
class Row:
    """One way to call. ``prepare(x, out)`` returns the function that is timed; ``goal`` is its limit as a ratio to relu."""

    name: str
    prepare: Callable[[Tensor, Tensor], Callable[[], object]]
    goal: float | None = None
    is_ours: bool = False
    is_peer: bool = False


def _eager(x: Tensor) -> Tensor:
    d = x.shape[-1] // 2
    return F.silu(x[..., :d]) * x[..., d:]


def _relu(x: Tensor, out: Tensor) -> Callable[[], object]:
    relu = torch.relu
    return lambda: relu(x)


def _new_empty(x: Tensor, out: Tensor) -> Callable[[], object]:
    shape = out.shape
    return lambda: x.new_empty(shape)


def _plain(x: Tensor, out: Tensor) -> Callable[[], object]:
    return lambda: _eager(x)


def _compiled(x: Tensor, out: Tensor) -> Callable[[], object]:
    compiled = torch.compile(_eager, dynamic=False)
    return lambda: compiled(x)


def _jitk(x: Tensor, out: Tensor) -> Callable[[], object]:
    op = jitk_packet("silu_and_mul")
    return lambda: op(x)


def _jitk_default(x: Tensor, out: Tensor) -> Callable[[], object]:
    op = jitk_packet("silu_and_mul").default
    return lambda: op(x)


def _jitk_out(x: Tensor, out: Tensor) -> Callable[[], object]:
    op = jitk_packet("silu_and_mul").out
    return lambda: op(x, out=out)


def _jitk_packet_out(x: Tensor, out: Tensor) -> Callable[[], object]:
    op = jitk_packet("silu_and_mul")
    return lambda: op(x, out=out)


def _sglang(x: Tensor, out: Tensor) -> Callable[[], object]:
    function = sglang_function("silu_and_mul")
    return lambda: function(x)


def _sglang_out(x: Tensor, out: Tensor) -> Callable[[], object]:
    function = sglang_function("silu_and_mul")
    return lambda: function(x, out)


def _flashinfer(x: Tensor, out: Tensor) -> Callable[[], object]:
    function = flashinfer_function("silu_and_mul")
    return lambda: function(x)


def _flashinfer_out(x: Tensor, out: Tensor) -> Callable[[], object]:
    function = flashinfer_function("silu_and_mul")
    return lambda: function(x, out)


ROWS: tuple[Row, ...] = (
    Row(RELU, _relu),
    Row("x.new_empty(...)", _new_empty),
    Row("F.silu(x[..., :d]) * x[..., d:]", _plain),
    Row("the same, torch.compile", _compiled),
    Row("jitk.silu_and_mul(x)", _jitk, goal=1.0, is_ours=True),
    Row("jitk.silu_and_mul.default(x)", _jitk_default, is_ours=True),
    Row("jitk.silu_and_mul.out(x, out=out)", _jitk_out, goal=0.75, is_ours=True),
    Row("jitk.silu_and_mul(x, out=out)", _jitk_packet_out, is_ours=True),
    Row("SGLang silu_and_mul(x)", _sglang, is_peer=True),
    Row("SGLang silu_and_mul(x, out)", _sglang_out, is_peer=True),
    Row("FlashInfer silu_and_mul(x)", _flashinfer, is_peer=True),
    Row("FlashInfer silu_and_mul(x, out)", _flashinfer_out, is_peer=True),
)


@dataclass(frozen=True)
class Result:
    """One mode: microseconds per call for each row that could be called."""

    mode: str
    device: str
    samples: dict[str, Samples]
    missing: dict[str, str] = field(default_factory=dict)

    def over_relu(self, name: str) -> float | None:
        return self.samples[name].median / self.samples[RELU].median if name in self.samples and RELU in self.samples else None

    def to_json(self) -> dict[str, object]:
        return {
            "mode": self.mode,
            "device": self.device,
            "us": {name: taken.to_json() for name, taken in self.samples.items()},
            "over_relu": {name: self.over_relu(name) for name in self.samples},
            "missing": self.missing,
        }


def _check(call: Callable[[], object], x: Tensor, out: Tensor) -> None:
    """Raise ValueError when what ``call`` returns, or writes to ``out``, is not silu_and_mul of ``x``."""
    out.fill_(math.nan)
    returned = call()
    actual = returned if isinstance(returned, Tensor) else out
    error = relative_error(actual, _eager(x.double()))
    allowed = 2 * relative_error(_eager(x), _eager(x.double())) + FLOAT32_ROUNDINGS
    if not error <= allowed:
        raise ValueError(f"wrong result: relative error {error:.2g}, allowed {allowed:.2g}")


def measure(
    rows: Sequence[Row], device: torch.device, dtype: torch.dtype, mode: str, rounds: int, calls: int = CALLS_PER_BLOCK
) -> Result:
    """Time ``rows`` in ``mode``, one of ``MODES``."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    calls_of: dict[str, Callable[[], object]] = {}
    missing: dict[str, str] = {}
    with MODES[mode]():
        generator = torch.Generator(device=device).manual_seed(0)
        x = torch.randn((TOKENS, WIDTH), dtype=dtype, device=device, generator=generator)
        out = torch.empty((TOKENS, WIDTH // 2), dtype=dtype, device=device)
        for row in rows:
            try:
                call = row.prepare(x, out)
                # Compiling, and what a provider does only in its first calls.
                for _ in range(3):
                    call()
                if row.is_ours or row.is_peer:
                    _check(call, x, out)
                synchronize()
            except Exception as error:  # Whatever a provider raises, the others are still worth measuring.
                missing[row.name] = reason(error)
                continue
            calls_of[row.name] = call
        with without_garbage_collection():
            warm = {name: (lambda call=call: us_per_call(call, calls, synchronize)) for name, call in calls_of.items()}
            interleave(warm, 2)
            samples = interleave(warm, rounds)
    return Result(mode, str(device), samples, missing)


def table(rows: Sequence[Row], results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells: for each mode the median, its spread and the ratio to relu, and last the goal."""
    columns = ["call"]
    for result in results:
        columns += [f"{result.mode}: us", "spread", "x relu"]
    columns.append("goal")
    cells = []
    for row in rows:
        line = [row.name.replace("[", "\\[")]
        for result in results:
            found = result.over_relu(row.name)
            taken = result.samples.get(row.name)
            met = row.goal is None or found is None or found <= row.goal
            text = "-" if found is None else f"{found:.2f}"
            line += [
                report.microseconds(taken.median if taken else None),
                report.percent(taken.spread if taken else None),
                text if met else f"[red]{text}[/red]",
            ]
        cells.append([*line, "" if row.goal is None else f"<= {row.goal:.2f}"])
    return columns, cells


def _prepare() -> None:
    """What is compiled in the background, and then serves every later process, is there before anything is timed."""
    try:
        from torch_jit_ops.builder.load import load
        from torch_jit_ops.calling import dispatcher

        load(dispatcher.autograd_unit())
    except Exception as error:  # the rows of the op will say what is wrong with the package
        print(reason(error), file=sys.stderr)


def run(
    out: Console,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    modes: Sequence[str] = tuple(MODES),
    rows: Sequence[Row] = ROWS,
    calls: int = CALLS_PER_BLOCK,
) -> list[Result]:
    """Measure and print ``rows`` in every one of ``modes``; the peers have kernels for CUDA only."""
    _prepare()
    rows = [row for row in rows if device.type == "cuda" or not row.is_peer]
    results = [measure(rows, device, dtype, mode, rounds, calls) for mode in modes]
    title = f"host time of an eager call, {str(dtype).removeprefix('torch.')} [{TOKENS}, {WIDTH}], {device}"
    report.print_table(out, title, *table(rows, results))
    report.print_notes(out, report.merge_reasons([pair for result in results for pair in result.missing.items()]))
    return results


def failed(rows: Sequence[Row], results: Sequence[Result]) -> list[str]:
    """What makes the run a failure: one of our own calls absent or raising."""
    ours = {row.name for row in rows if row.is_ours}
    return report.merge_reasons([(name, why) for result in results for name, why in result.missing.items() if name in ours])
