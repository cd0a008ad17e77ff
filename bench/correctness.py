"""Whether an output is right: against the plain PyTorch in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bench.cases import Operation
from bench.slots import Slot

# Elements compared at a time, so that the float64 intermediates stay within a few GiB.
GROUP_ELEMENTS = 2**26

# Beyond twice the error of the plain PyTorch in the same dtype, a few roundings of the float32 arithmetic inside a kernel,
# fast exponentials included.
FLOAT32_ROUNDINGS = 16 * 2.0**-24


def poison(slots: Sequence[Slot]) -> None:
    """Fill every output with NaN, which no right answer contains: what a kernel leaves out then shows."""
    for slot in slots:
        slot.out.fill_(math.nan)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest |actual - expected| / (|expected| + 0.001 rms(expected)); infinite where ``actual`` is not finite.

    The second term keeps results next to zero, where cancellation inside a kernel is legitimate, from deciding.
    """
    expected = expected.double()
    floor = 1e-3 * expected.square().mean().sqrt()
    error = ((actual.double() - expected).abs() / (expected.abs() + floor)).max().item()
    return error if math.isfinite(error) else math.inf


def _groups(slots: Sequence[Slot]) -> list[Sequence[Slot]]:
    size = max(1, GROUP_ELEMENTS // max(1, sum(tensor.numel() for tensor in slots[0].inputs)))
    return [slots[start : start + size] for start in range(0, len(slots), size)]


def output_error(operation: Operation, slots: Sequence[Slot]) -> float:
    """``relative_error`` of the outputs of all ``slots`` against the float64 reference of their inputs."""
    worst = 0.0
    for group in _groups(slots):
        inputs = [torch.stack(tensors).double() for tensors in zip(*(slot.inputs for slot in group), strict=True)]
        expected = operation.reference(*inputs)
        worst = max(worst, relative_error(torch.stack([slot.out for slot in group]), expected))
    return worst


def allowed_error(operation: Operation, slots: Sequence[Slot]) -> float:
    """Twice the error that the plain PyTorch makes in the dtype of the slots, on the same inputs."""
    worst = 0.0
    for group in _groups(slots):
        inputs = [torch.stack(tensors) for tensors in zip(*(slot.inputs for slot in group), strict=True)]
        expected = operation.reference(*(tensor.double() for tensor in inputs))
        worst = max(worst, relative_error(operation.reference(*inputs), expected))
    return 2 * worst + FLOAT32_ROUNDINGS


def judge(operation: Operation, slots: Sequence[Slot], allowed: float) -> tuple[float, str | None]:
    """The error of the outputs of ``slots``, and what is wrong with them, if anything is."""
    error = output_error(operation, slots)
    return error, None if error <= allowed else f"wrong result: relative error {error:.2g}, allowed {allowed:.2g}"
