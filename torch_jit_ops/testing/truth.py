"""The truth about a sample: its reference in float64, and how far from it fp32 arithmetic may be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_jit_ops.declaring.samples import Sample
from torch_jit_ops.op import Op
from torch_jit_ops.testing.arithmetic import OneRoundingEach, Unrounded
from torch_jit_ops.testing.calls import Outcome, bits, call, copy_with_storage, map_tensors

_TRIALS = 16  # of stochastic arithmetic: the largest of sixteen normal deviations is 0.7 to 3.5 standard deviations
Reference = Callable[[Op, Sample], Outcome]
Run = Callable[[], tuple[Tensor, ...]]


def outcome_of_reference(op: Op, sample: Sample) -> Outcome:
    return call(op, sample, op.reference)


def in_float64(op: Op, sample: Sample, reference: Reference = outcome_of_reference) -> Outcome:
    """The outcome of the reference for the same values in float64, unrounded where the reference does not mean to round."""
    with Unrounded():
        return reference(op, widened(sample))


def widened(sample: Sample) -> Sample:
    return map_tensors(sample, lambda tensor: tensor.detach().double() if tensor.is_floating_point() else tensor.clone())


class Deviations:
    """The largest deviation from the truth of each element, in as many trials as were asked for."""

    def __init__(self, op: Op, sample: Sample, reference: Reference, true: Outcome) -> None:
        self._run: Run = lambda: in_float64(op, sample, reference).tensors
        self._true = [truth.detach().double() for truth in true.tensors]
        self._trials = 0
        self.largest = [torch.zeros_like(truth, dtype=torch.float64) for truth in self._true]

    def try_again(self) -> bool:
        """One more trial, unless there were enough: then False."""
        if self._trials == _TRIALS:
            return False
        with OneRoundingEach(self._trials):
            trial = self._run()
        self._trials += 1
        for place, truth in enumerate(self._true):
            self.largest[place] = torch.maximum(self.largest[place], (trial[place].detach().double() - truth).abs())
        return True


class Trials:
    """What comes of a sample in float64 when operations are off by one fp32 rounding error, or by two: as much as a kernel may
    be. What is exact in fp32 is exact here."""

    def __init__(self, op: Op, sample: Sample, reference: Reference) -> None:
        self._run: Run = lambda: in_float64(op, sample, reference).tensors
        self._made: list[tuple[Tensor, ...]] = []

    def of(self, place: int) -> Iterator[Tensor]:
        """That tensor of each trial's outcome."""
        for trial in range(_TRIALS):
            if trial == len(self._made):
                with OneRoundingEach(trial, roundings=1 + trial % 2, only_inexact=True):
                    self._made.append(tuple(tensor.detach() for tensor in self._run()))
            yield self._made[trial][place]


@dataclass(frozen=True)
class Expected:
    """What an outcome for ``sample`` is compared with: the reference as it is, the truth, and how far off fp32 may be."""

    op: Op
    sample: Sample
    reference: Reference
    plain: Outcome
    true: Outcome
    deviations: Deviations
    trials: Trials

    def is_of(self, op: Op, sample: Sample, reference: Reference) -> bool:
        if (self.op, self.reference, self.sample.kwargs.keys()) != (op, reference, sample.kwargs.keys()):
            return False
        mine = (*self.sample.args, *self.sample.kwargs.values())
        others = (*sample.args, *sample.kwargs.values())
        return len(mine) == len(others) and all(map(_same, mine, others))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return type(one) is type(other) and one == other
    facts = [(x.shape, x.stride(), x.dtype, x.device, x.requires_grad) for x in (one, other)]
    return facts[0] == facts[1] and torch.equal(bits(one), bits(other))


_last: list[Expected] = []


def expected(op: Op, sample: Sample, reference: Reference) -> Expected:
    """What to compare with; of the last sample at no cost, as many tests in a row have the same one in other layouts."""
    if not _last or not _last[0].is_of(op, sample, reference):
        plain = reference(op, copy_with_storage(sample))
        true = in_float64(op, sample, reference)
        kept = copy_with_storage(sample)
        trials = Trials(op, kept, reference)
        _last[:] = [Expected(op, kept, reference, plain, true, Deviations(op, kept, reference, true), trials)]
    return _last[0]
