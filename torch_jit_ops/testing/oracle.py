"""Judges the results of an op by its reference.

Truth is the reference in float64. An element may be wrong by twice as much as the same reference in the op's own dtype gets
wrong elements of that magnitude. Errors count in units in the last place, as an absolute bound would let small results be
anything; and the bound is taken from many elements, as any single one can be exact by chance. Where infinities, NaNs or an
underflow on the way decide, the op may follow the truth or the reference in its dtype.

Where an op spreads one element over many results, as a norm does, results cancel: their errors follow the terms that went into
them, not their magnitude, and those of similar magnitude say nothing. There an element may also be wrong by half a unit, for
rounding, and twice what fp32 arithmetic can do to it. That is measured by stochastic arithmetic: the reference runs in float64,
but what each of its operations computes is off by one fp32 rounding error of random sign.

Integers, booleans and 8-bit floats have steps instead of units: a result is the reference's, that of the float64 reference
rounded as the reference rounds, or one that the float64 reference makes when its operations are off as above. So a quantised
value is a step away, and an expert's id another one, only where a rounding error decides between the two; where fp32 holds all
that the reference computes, as in a tie that is exact, nothing but its own result is right.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_jit_ops.declaring.dtypes import Combination
from torch_jit_ops.declaring.samples import Sample
from torch_jit_ops.op import Op
from torch_jit_ops.testing.calls import (
    Outcome,
    call,
    copy_with_storage,
    is_8bit_float,
    require,
    samples_of,
    tensors_of,
    with_extremes,
)
from torch_jit_ops.testing.truth import Deviations, Reference, Trials, expected, in_float64, outcome_of_reference, widened

_NEIGHBOURS = 64  # on each side, of similar magnitude, whose errors bound an element's
_FLUSHED = torch.finfo(torch.float32).smallest_normal  # computing in fp32, hardware may flush what is smaller to zero
# The truth is not exact either: float64 leaves nothing of 1 + erf(x) below x = -8.3. Errors below this part of the largest
# result are not looked at, unless the values are extreme, where the largest says nothing about the rest.
_UNKNOWN = 2.0**-48


DTypes = torch.dtype | Combination  # of the samples: one of the op's combinations, or one dtype for all tensors


@dataclass(frozen=True)
class Errors:
    """Errors of the reference in the op's dtype, in order of magnitude."""

    magnitude: Tensor
    bound: Tensor

    def at(self, magnitude: Tensor) -> Tensor:
        if self.magnitude.numel() == 0:
            return torch.zeros_like(magnitude)
        index = torch.searchsorted(self.magnitude, magnitude.contiguous()).clamp_(max=self.magnitude.numel() - 1)
        return self.bound[index]


def verify(
    op: Op,
    device: str,
    dtypes: DTypes,
    sample: Sample,
    actual: Outcome,
    extreme: bool = False,
    reference: Reference = outcome_of_reference,
) -> None:
    """Fail unless ``actual``, the op's outcome for ``sample``, is as right as the reference.

    Args:
        op, device, dtypes: where to find the samples that show how wrong the reference is.
        sample: the arguments as they were before the call.
        actual: what came of it.
        extreme: the arguments hold extreme values, where the reference is worse.
        reference: makes the outcome to compare with, such as gradients.
    """
    wanted = expected(op, sample, reference)
    names = wanted.plain.names
    require(actual.names == names, f"results and written arguments are {actual.names}, expected {names}")
    bounds = _errors(op, device, dtypes, extreme, reference)
    deviations = None if extreme or not spreads(op, device, dtypes) else wanted.deviations
    for place, (name, tensor) in enumerate(actual):
        plain = wanted.plain.tensors[place]
        require(tensor.shape == plain.shape, f"{name}: shape {list(tensor.shape)}, expected {list(plain.shape)}")
        require(tensor.dtype == plain.dtype, f"{name}: {tensor.dtype}, expected {plain.dtype}")
        require(tensor.device == plain.device, f"{name}: on {tensor.device}, expected {plain.device}")
        truth = wanted.true.tensors[place].detach()
        if has_steps(plain):
            _compare_steps(name, tensor.detach(), truth, plain.detach(), wanted.trials, place)
            continue
        truth = truth.double()
        _compare(name, tensor.detach(), truth, plain.detach(), bounds[name], _noise(truth, extreme), deviations, place)


def has_steps(tensor: Tensor) -> bool:
    """Whether its values are counted in steps: integers, booleans and 8-bit floats."""
    return not tensor.is_floating_point() or is_8bit_float(tensor.dtype)


def average_errors(op: Op, device: str, dtypes: DTypes, actual: Callable[[Sample], Outcome]) -> dict[str, tuple[float, float]]:
    """By name, of each tensor that is counted in units, over all samples: the errors of ``actual`` and of the reference.

    Tells rounding from cutting off, which the largest errors cannot. Where the reference errs by units it has lost its digits
    to cancellation; such elements count as one unit.
    """
    sums: dict[str, list[list[Tensor]]] = {}
    for sample in samples_of(op, device, dtypes):
        reference = call(op, copy_with_storage(sample), op.reference)
        plain = reference.tensors
        mine = actual(copy_with_storage(sample)).tensors
        for place, truth in enumerate(in_float64(op, sample).tensors):
            if not has_steps(plain[place]):
                truth = truth.double()
                noise = _noise(truth, extreme=False)
                pair = [_error(tensors[place].detach(), truth, noise).flatten().clamp(max=1) for tensors in (mine, plain)]
                sums.setdefault(reference.names[place], []).append(pair)
    means = {name: [float(torch.cat(part).mean()) for part in zip(*pairs, strict=True)] for name, pairs in sums.items()}
    return {name: (mine, plain) for name, (mine, plain) in means.items()}


@functools.cache
def spreads(op: Op, device: str, dtypes: DTypes) -> bool:
    """Whether one element of an argument decides about more than one element of a result."""
    for sample in samples_of(op, device, dtypes):
        for index, tensor in enumerate(tensors_of(sample)):
            if tensor.is_floating_point() and tensor.numel() > 0:
                wide = widened(sample)
                tensors_of(wide)[index].view(-1)[0] = torch.nan
                if any(int(result.double().isnan().sum()) > 1 for result in call(op, wide, op.reference).tensors):
                    return True
    return False


def largest_extreme(op: Op, device: str, dtypes: DTypes) -> float | None:
    """The largest finite value to try, if that is not the dtype's: where an op adds up, sums must stay finite.

    What comes of sums that overflow on the way depends on the order of addition, which nobody promises.
    """
    dtype = _first(dtypes)
    if not dtype.is_floating_point or not spreads(op, device, dtypes):
        return None
    return min(torch.finfo(dtype).max, torch.finfo(torch.float32).max * 2.0**-20)


def _first(dtypes: DTypes) -> torch.dtype:
    return dtypes if isinstance(dtypes, torch.dtype) else dtypes.first


@functools.cache
def _errors(op: Op, device: str, dtypes: DTypes, extreme: bool, reference: Reference) -> dict[str, Errors]:
    """For each tensor of an outcome, by its name."""
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for seed in range(3):
        for given in samples_of(op, device, dtypes, seed):
            largest = largest_extreme(op, device, dtypes)
            sample = with_extremes(op, given, _first(dtypes), seed + 1, largest) if extreme else given
            true = in_float64(op, sample, reference).tensors
            for (name, tensor), truth in zip(reference(op, copy_with_storage(sample)), true, strict=True):
                pairs.setdefault(name, []).append(_measured(tensor, truth, extreme))
    return {name: _bounds(*map(torch.cat, zip(*measured, strict=True))) for name, measured in pairs.items()}


def _measured(tensor: Tensor, truth: Tensor, extreme: bool) -> tuple[Tensor, Tensor]:
    if has_steps(tensor):
        nothing = tensor.new_empty(0, dtype=torch.float64)
        return nothing, nothing
    truth = truth.double()
    finite = torch.isfinite(tensor) & torch.isfinite(truth.to(tensor.dtype))
    return truth[finite].abs(), _error(tensor, truth, _noise(truth, extreme))[finite]


def _bounds(magnitude: Tensor, error: Tensor) -> Errors:
    order = magnitude.argsort()
    window = 2 * _NEIGHBOURS + 1
    bound = error[order]
    if bound.numel() > 0:
        bound = torch.nn.functional.max_pool1d(bound[None], window, stride=1, padding=_NEIGHBOURS)[0]
    return Errors(magnitude[order], bound)


def _noise(truth: Tensor, extreme: bool) -> float:
    """Absolute errors that say nothing."""
    if extreme or not truth.is_floating_point() or truth.numel() == 0:
        return _FLUSHED
    return max(_FLUSHED, _UNKNOWN * float(truth.nan_to_num(0.0, 0.0, 0.0).abs().max()))


def _error(tensor: Tensor, truth: Tensor, noise: float) -> Tensor:
    """In units in the last place of the truth."""
    return _units(((tensor.double() - truth).abs() - noise).clamp(min=0), tensor.dtype, truth)


def _units(difference: Tensor, dtype: torch.dtype, truth: Tensor) -> Tensor:
    format = torch.finfo(dtype)
    exponent = torch.frexp(truth.abs().clamp(min=format.smallest_normal)).exponent - 1
    return difference / (torch.exp2(exponent.double()) * format.eps)


def _kind(tensor: Tensor) -> Tensor:
    """0 finite, 1 inf, 2 -inf, 3 NaN."""
    return tensor.isposinf().int() + 2 * tensor.isneginf().int() + 3 * tensor.isnan().int()


def _compare(
    name: str,
    actual: Tensor,
    truth: Tensor,
    plain: Tensor,
    bounds: Errors,
    noise: float,
    deviations: Deviations | None,
    place: int,
) -> None:
    rounded = truth.to(actual.dtype)
    kind = _kind(actual)
    _report(name, (kind != _kind(rounded)) & (kind != _kind(plain)), actual, truth, plain)

    as_truth = (kind == 0) & torch.isfinite(rounded)
    allowed = 2 * torch.maximum(bounds.at(truth.abs()), torch.where(torch.isfinite(plain), _error(plain, truth, noise), 0.0))
    # A correctly rounded result is right whatever the reference does; the little more is what fp32 adds before it rounds.
    allowed = allowed.clamp(min=0.5 + 2.0**-8)
    error = _error(actual, truth, noise)
    # Another trial only allows more, and most errors are within what the first ones show.
    while deviations is not None and (as_truth & (error > allowed)).any():
        allowed = torch.maximum(allowed, 0.5 + 2 * _units(deviations.largest[place], actual.dtype, truth))
        if not (as_truth & (error > allowed)).any() or not deviations.try_again():
            break
    worst = torch.where(as_truth, error - allowed, -torch.inf)
    _report(name, worst > 0, actual, truth, plain, worst, error, allowed)
    # Finite like the reference, where the truth rounds to infinity: there is no error to measure but the distance between them.
    as_plain = (kind == 0) & ~torch.isfinite(rounded)
    _report(name, as_plain & (_error(actual, plain.double(), noise) > 2), actual, truth, plain)


def _compare_steps(name: str, actual: Tensor, truth: Tensor, plain: Tensor, trials: Trials, place: int) -> None:
    wrong = _differs(actual, plain) & _differs(actual, truth.to(plain.dtype))
    for trial in trials.of(place) if wrong.any() else ():
        wrong &= _differs(actual, trial.to(plain.dtype))
        if not wrong.any():
            return
    _report(name, wrong, actual, truth, plain)


def _differs(one: Tensor, other: Tensor) -> Tensor:
    """Where they are not the same number. One NaN is another, and -0 is 0; but a bool is the byte 0 or 1."""
    if one.dtype == torch.bool:
        return one.view(torch.uint8) != other.view(torch.uint8)
    if not one.is_floating_point():
        return one != other
    one, other = one.double(), other.double()  # which hold all 8-bit floats, and have the operations that those lack
    return (one != other) & ~(one.isnan() & other.isnan())


def _report(
    name: str,
    wrong: Tensor,
    actual: Tensor,
    truth: Tensor,
    plain: Tensor,
    by: Tensor | None = None,
    error: Tensor | None = None,
    allowed: Tensor | None = None,
) -> None:
    if not wrong.any():
        return
    flat = int((by if by is not None else wrong.double()).argmax())
    place = [int(index) for index in torch.unravel_index(torch.tensor(flat), wrong.shape)]
    text = (
        f"{name}: {int(wrong.sum())} of {wrong.numel()} elements are wrong; the worst, at {place}: "
        f"got {actual.flatten()[flat].item()!r}, truth {truth.flatten()[flat].item()!r}, "
        f"plain PyTorch {plain.flatten()[flat].item()!r}"
    )
    if error is not None and allowed is not None:
        text += f"; wrong by {error.flatten()[flat].item():.3g} ulp, allowed {allowed.flatten()[flat].item():.3g}"
    raise AssertionError(text)
