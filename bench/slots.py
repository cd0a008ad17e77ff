"""The arguments of the timed calls: several sets of them, used in turn.

A call that always met the same buffers would measure the cache. The sets rotate, ``ROTATION_BYTES`` in all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases import Case
from bench.recipes import Make

# What the rotating buffers hold in all: four times the L2 of the largest GPU that this was written on.
ROTATION_BYTES = 256 * 2**20

# Calls in one graph: enough to hide the start of a replay, few enough to capture quickly.
MOST_CALLS = 64
FEWEST_CALLS = 32

# Above this, one call alone outlasts the start of a replay many times over.
LARGE_BYTES = 2**30
CALLS_WHEN_LARGE = 8


@dataclass(frozen=True, eq=False)
class Slot:
    """The arguments of one call. ``copy_to`` and ``copy_from`` are half of the call's bytes each.

    Attributes:
        given: what the inputs that the op writes were; others are the inputs themselves.
        results: the outs, or the inputs that the op writes.
    """

    inputs: tuple[Tensor, ...]
    outs: tuple[Tensor, ...]
    copy_to: Tensor
    copy_from: Tensor
    given: tuple[Tensor, ...]
    results: tuple[Tensor, ...]

    @property
    def out(self) -> Tensor:
        """The only out argument."""
        (out,) = self.outs
        return out

    def restore(self) -> None:
        """Undo what calls have written to the inputs."""
        for now, then in zip(self.inputs, self.given, strict=True):
            if now is not then:
                now.copy_(then)


@dataclass(frozen=True)
class Plan:
    """How many buffers the calls of one graph rotate over, and how many calls there are."""

    slots: int
    calls: int


def plan(bytes_per_call: int) -> Plan:
    """Buffers and calls for a call that moves ``bytes_per_call``; every buffer is used equally often."""
    if bytes_per_call <= 0:
        raise ValueError(f"bytes_per_call is {bytes_per_call}, expected more than 0")
    slots = min(MOST_CALLS, max(2, -(-ROTATION_BYTES // bytes_per_call)))
    least = CALLS_WHEN_LARGE if bytes_per_call > LARGE_BYTES else FEWEST_CALLS
    return Plan(slots, slots * -(-least // slots))


def slot_of(case: Case, inputs: tuple[Tensor, ...], copies: tuple[Tensor, Tensor] | None = None) -> Slot:
    """The arguments of one call with these inputs; outputs are not initialised. ``copies``: to and from."""
    to, source = copies or (inputs[0].new_empty(0), inputs[0].new_empty(0))
    outs = tuple(inputs[0].new_empty(shape) for shape in case.operation.out_shapes(case.sizes))
    written = case.operation.written
    given = tuple(tensor.clone() if index in written else tensor for index, tensor in enumerate(inputs))
    results = outs or tuple(inputs[index] for index in written)
    return Slot(inputs, outs, to, source, given, results)


def make_slots(case: Case, count: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> list[Slot]:
    """``count`` sets of arguments, inputs drawn from a normal distribution, outputs not initialised.

    Every tensor is an allocation of its own, as a caller's would be, and so is aligned to 512 bytes.
    """
    make = Make(dtype, device, torch.Generator(device=device).manual_seed(seed))
    half = case.bytes(dtype.itemsize) // 2 // dtype.itemsize
    slots = []
    for _ in range(count):
        inputs = case.operation.inputs(make, case.sizes)
        to, source = (torch.empty(half, dtype=dtype, device=device) for _ in range(2))
        # Zeros are not representative data: some memory systems move them faster.
        source.normal_(generator=make.generator)
        slots.append(slot_of(case, inputs, (to, source)))
    return slots
