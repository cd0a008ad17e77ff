"""Errors of the norms beside those of the peers and of plain PyTorch.

Method. Each provider gets the same arguments, and its results are compared with the plain PyTorch in float64. An error counts
in units in the last place of the exact result, in the dtype of the output: a correctly rounded result is wrong by at most 0.5.
Relative errors leave out exact results below the dtype's normal range. Arguments are drawn to be hard: a mean far from zero,
squares near underflow and overflow, channels a thousand times larger than the others. Weights are near one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from bench import report
from bench.cases import Case, Operation
from bench.correctness import poison
from bench.providers import PROVIDERS, Call, Unavailable, flashinfer_function, reason
from bench.results import OURS
from bench.slots import Slot, slot_of

DTYPES = (torch.bfloat16, torch.float16)

CASES: tuple[Case, ...] = (
    Case("rmsnorm", (256, 4096)),
    Case("layernorm", (256, 4096)),
    Case("fused_add_rmsnorm", (256, 4096)),
    Case("fused_qknorm", (256, 16, 4, 128)),
)
QUICK: tuple[Case, ...] = (
    Case("rmsnorm", (8, 512)),
    Case("layernorm", (8, 512)),
    Case("fused_add_rmsnorm", (8, 512)),
    Case("fused_qknorm", (8, 4, 2, 64)),
)

# What an op leaves behind, in the order of its results.
RESULTS = {"fused_add_rmsnorm": ("norm", "sum"), "fused_qknorm": ("q", "k")}

NOTE = (
    "fused_add_rmsnorm, norm: jitk normalises the rounded sum, as the two steps do one after the other; "
    "against the exact sum that rounding counts as an error"
)


def _outliers(x: Tensor) -> Tensor:
    x[..., 3::97] *= 1000
    return x


# Of a tensor of normal values.
INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "mean 1000": lambda x: x + 1000,
    "times 1e-4": lambda x: x * 1e-4,  # fp16 holds most of them as subnormal numbers; eps is what they are measured by
    "times 1e4": lambda x: (x * 1e4).clamp(-3e4, 3e4),  # squares are far beyond fp16; sums of two must not be
    "outliers": _outliers,
}


@dataclass(frozen=True)
class Errors:
    """Of one result: the largest and the mean in units in the last place, and the largest relative one."""

    max_ulp: float
    mean_ulp: float
    max_relative: float

    def to_json(self) -> dict[str, float]:
        return {"max_ulp": self.max_ulp, "mean_ulp": self.mean_ulp, "max_relative": self.max_relative}

    def __str__(self) -> str:
        return f"{_short(self.max_ulp)} {_short(self.mean_ulp)} {self.max_relative:.1e}"


@dataclass(frozen=True)
class Result:
    """One result of one op for one kind of input: errors by provider."""

    case: Case
    dtype: torch.dtype
    result: str
    inputs: str
    errors: dict[str, Errors]
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.case.op} {self.result}, {_name(self.dtype)}, {self.inputs}"

    def to_json(self) -> dict[str, object]:
        return {
            "op": self.case.op,
            "sizes": dict(zip(self.case.operation.axes, self.case.sizes, strict=True)),
            "dtype": _name(self.dtype),
            "result": self.result,
            "inputs": self.inputs,
            "errors": {provider: errors.to_json() for provider, errors in self.errors.items()},
            "missing": self.missing,
        }


def _short(value: float) -> str:
    return f"{value:.3f}" if value < 100 else f"{value:.3g}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def errors_of(actual: Tensor, exact: Tensor) -> Errors:
    """The errors of ``actual`` against ``exact``, which is float64. All are infinite where ``actual`` alone is not finite."""
    if actual.numel() == 0:
        return Errors(0.0, 0.0, 0.0)
    numbers = torch.finfo(actual.dtype)
    is_infinity = exact.to(actual.dtype).isinf() & (actual == exact.to(actual.dtype))
    difference = torch.where(is_infinity, 0.0, (actual.double() - exact).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
    exponent = torch.frexp(exact.abs().clamp(min=numbers.smallest_normal)).exponent - 1
    ulps = difference / (torch.exp2(exponent.double()) * numbers.eps)
    is_normal = exact.abs() >= numbers.smallest_normal
    relative = torch.where(is_normal, difference / exact.abs().clamp(min=numbers.smallest_normal), 0.0)
    return Errors(ulps.max().item(), ulps.mean().item(), relative.max().item())


# --- who is measured ------------------------------------------------------------------------------


def _into_results(function: Callable[..., tuple[Tensor, ...]]) -> Call:
    def call(slot: Slot) -> None:
        for result, made in zip(slot.results, function(*slot.inputs), strict=True):
            result.copy_(made)

    return call


def _layernorm(input: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    x = input.float()
    x = x - x.mean(-1, keepdim=True)
    return ((x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight + bias).to(input.dtype),)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def _functional_added(input: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    added = residual + input
    return _rms_norm(added, weight), added


_FUNCTIONAL: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "rmsnorm": lambda input, weight: (_rms_norm(input, weight),),
    "layernorm": lambda input, weight, bias: (F.layer_norm(input, input.shape[-1:], weight, bias, 1e-5),),
    "fused_add_rmsnorm": _functional_added,
    "fused_qknorm": lambda q, k, q_weight, k_weight: (_rms_norm(q, q_weight), _rms_norm(k, k_weight)),
}


def _bind_functional(operation: Operation) -> Call:
    if operation.name not in _FUNCTIONAL:
        raise Unavailable(f"has no {operation.name}")
    return _into_results(_FUNCTIONAL[operation.name])


def _bind_eager(operation: Operation) -> Call:
    return _into_results(_layernorm if operation.name == "layernorm" else operation.results)


def _bind_flashinfer(operation: Operation) -> Call:
    if operation.name != "layernorm":
        return PROVIDERS["flashinfer"].bind(operation)
    function = flashinfer_function("layernorm")  # of bf16 with fp32 weights
    return _into_results(lambda input, weight, bias: (function(input, weight.float(), bias.float(), 1e-5),))


BINDINGS: dict[str, Callable[[Operation], Call]] = {
    OURS: PROVIDERS[OURS].bind,
    "sglang": PROVIDERS["sglang"].bind,
    "flashinfer": _bind_flashinfer,
    "F.*_norm": _bind_functional,  # PyTorch's own function
    "eager": _bind_eager,  # spelled out, in fp32
    "inductor": PROVIDERS["inductor"].bind,
}


# --- measuring ------------------------------------------------------------------------------------


def make_slot(case: Case, kind: str, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Slot:
    """Arguments of ``case``: tensors of tokens as ``INPUTS[kind]`` makes them, weights and biases near one."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for shape in case.operation.shapes(*case.sizes):
        drawn = torch.randn(shape, generator=generator)
        inputs.append((INPUTS[kind](drawn) if len(shape) > 1 else 1 + drawn / 8).to(device, dtype))
    return slot_of(case, tuple(inputs))


@torch.no_grad()
def measure(
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    kinds: Sequence[str] = tuple(INPUTS),
    bindings: Mapping[str, Callable[[Operation], Call]] | None = None,
) -> list[Result]:
    """The errors of every provider on ``case``, for each kind of input and each result of the op."""
    results = {(kind, name): Result(case, dtype, name, kind, {}) for kind in kinds for name in RESULTS.get(case.op, ("out",))}
    for provider, bind in (BINDINGS if bindings is None else bindings).items():
        try:
            call = bind(case.operation)
        except Exception as error:  # Whatever a provider raises, the others are still worth measuring.
            for result in results.values():
                result.missing[provider] = reason(error)
            continue
        for kind in kinds:
            slot = make_slot(case, kind, dtype, device)
            exact = case.operation.results(*(tensor.double() for tensor in slot.given))
            of_kind = [result for (of, _), result in results.items() if of == kind]
            try:
                poison([slot])
                call(slot)
                for result, actual, truth in zip(of_kind, slot.results, exact, strict=True):
                    result.errors[provider] = errors_of(actual, truth)
            except Exception as error:  # As above.
                for result in of_kind:
                    result.missing[provider] = reason(error)
    return list(results.values())


def failed(results: Sequence[Result]) -> list[str]:
    """What makes the run a failure: our op absent, raising, or not finite where the exact result is."""
    found = [(f"{OURS} {result.name}", result.missing[OURS]) for result in results if OURS in result.missing]
    wild = [result for result in results if OURS in result.errors and result.errors[OURS].max_ulp == torch.inf]
    return report.merge_reasons([*found, *((f"{OURS} {result.name}", "wrong result: not finite") for result in wild)])


def print_results(out: Console, results: Sequence[Result], bindings: Sequence[str], title: str) -> None:
    """A table; each cell holds the largest and the mean error in units in the last place, and the largest relative error."""
    rows = [
        [result.case.op, result.result, result.inputs, *(str(result.errors.get(name, "-")) for name in bindings)]
        for result in results
    ]
    report.print_table(out, f"{title}: max ulp, mean ulp, max relative", ["op", "result", "inputs", *bindings], rows, labels=3)
    missing = [(f"{name} {result.case.op}", why) for result in results for name, why in result.missing.items()]
    notes = [NOTE] if any(result.case.op == "fused_add_rmsnorm" for result in results) else []
    report.print_notes(out, report.merge_reasons(missing) + notes)


def run(out: Console, cases: Sequence[Case], device: torch.device) -> list[Result]:
    """Measure and print a table per dtype."""
    everything = []
    for dtype in DTYPES:
        results = [result for case in cases for result in measure(case, dtype, device)]
        print_results(out, results, list(BINDINGS), f"Errors against float64, {device.type}, {_name(dtype)}")
        everything += results
    return everything
