"""Whether an output is right: against the plain PyTorch in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from bench.cases import Operation
from bench.slots import Slot

# Beyond twice the error of the plain PyTorch in the same dtype, a few roundings of the float32 arithmetic inside a kernel,
# fast exponentials included.
FLOAT32_ROUNDINGS = 16 * 2.0**-24


def poison(slots: Sequence[Slot]) -> None:
    """Fill every output with NaN, which no right answer contains: what a kernel leaves out then shows."""
    for slot in slots:
        slot.restore()
        for out in slot.outs:
            out.fill_(math.nan)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest |actual - expected| / (|expected| + 0.001 rms(expected)); infinite where ``actual`` is not finite.

    The second term keeps results next to zero, where cancellation inside a kernel is legitimate, from deciding.
    """
    expected = expected.double()
    floor = 1e-3 * expected.square().mean().sqrt()
    error = ((actual.double() - expected).abs() / (expected.abs() + floor)).max().item()
    return error if math.isfinite(error) else math.inf


def _worst(operation: Operation, slot: Slot, actual: Sequence[Tensor]) -> float:
    expected = operation.results(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in slot.given))
    return max(relative_error(mine, truth) for mine, truth in zip(actual, expected, strict=True))


def output_error(operation: Operation, slots: Sequence[Slot]) -> float:
    """``relative_error`` of the results of all ``slots`` against the float64 reference of what they were given."""
    return max(_worst(operation, slot, slot.results) for slot in slots)


def allowed_error(operation: Operation, slots: Sequence[Slot]) -> float:
    """Twice the error that the plain PyTorch makes in the dtype of the slots, on the same inputs."""
    return 2 * max(_worst(operation, slot, operation.results(*slot.given)) for slot in slots) + FLOAT32_ROUNDINGS


def judge(operation: Operation, slots: Sequence[Slot], allowed: float) -> tuple[float, str | None]:
    """The error of the outputs of ``slots``, and what is wrong with them, if anything is."""
    error = output_error(operation, slots)
    return error, None if error <= allowed else f"wrong result: relative error {error:.2g}, allowed {allowed:.2g}"
