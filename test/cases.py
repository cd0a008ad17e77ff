"""What the generic tests run over: each op of each registered library, on each device, in each dtype, with each sample."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

import fuzz
import pytest
import torch

from torch_jit_ops import Op, Sample, libraries
from torch_jit_ops.declaring.covering import covering
from torch_jit_ops.declaring.dtypes import Combination
from torch_jit_ops.testing.calls import Outcome as Outcome
from torch_jit_ops.testing.calls import assert_only_written_inside as assert_only_written_inside
from torch_jit_ops.testing.calls import assert_same_bits as assert_same_bits
from torch_jit_ops.testing.calls import bits as bits
from torch_jit_ops.testing.calls import call as call
from torch_jit_ops.testing.calls import copy_with_storage as copy_with_storage
from torch_jit_ops.testing.calls import is_8bit_float as is_8bit_float
from torch_jit_ops.testing.calls import is_batched as is_batched
from torch_jit_ops.testing.calls import kept_arguments as kept_arguments
from torch_jit_ops.testing.calls import leaves_of as leaves_of
from torch_jit_ops.testing.calls import map_tensors as map_tensors
from torch_jit_ops.testing.calls import outcome as outcome
from torch_jit_ops.testing.calls import poisoned as poisoned
from torch_jit_ops.testing.calls import samples_of as samples_of
from torch_jit_ops.testing.calls import storage_bits as storage_bits
from torch_jit_ops.testing.calls import tensors_of as tensors_of
from torch_jit_ops.testing.calls import tokens_of as tokens_of
from torch_jit_ops.testing.calls import with_extremes as with_extremes
from torch_jit_ops.testing.calls import with_tokens as with_tokens
from torch_jit_ops.testing.calls import writes as writes


def devices() -> list[str]:
    chosen = os.environ.get("JITK_TEST_DEVICES")
    return chosen.split(",") if chosen else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


# Taken when the tests are collected: libraries that a test declares for itself stay out.
OPS: tuple[Op, ...] = tuple(op for library in libraries() for op in library.ops.values())


@dataclass(frozen=True)
class Case:
    """One call of one op. Two cases are the same call if their text is."""

    op: Op
    device: str
    dtypes: Combination
    index: int

    def __str__(self) -> str:
        return f"{self.op.qualified_name}-{self.device}-{self.dtypes}-{self.index}"

    @property
    def dtype(self) -> torch.dtype:
        """That of most tensors: the first that the op declares, or the one that all share."""
        return self.dtypes.first

    @property
    def is_last(self) -> bool:
        """Whether this is the last of the op's combinations of dtypes, where one is enough."""
        return self.dtypes == last_dtypes(self.op)

    def sample(self) -> Sample:
        """Fresh arguments, the same in every call."""
        return copy.deepcopy(_kept(self.op, self.device, self.dtypes)[self.index])


# Random numbers took most of the suite's time. Tests of one op come one after another, so a few lists are enough.
_kept = functools.lru_cache(maxsize=4)(samples_of)


def last_dtypes(op: Op) -> Combination:
    return op.declaration.dtypes.combinations()[-1]


_EVERY_COMBINATION = len(fuzz.seeds(1)) > 1


@functools.cache
def dtypes_once(op: Op) -> tuple[Combination, ...]:
    """Combinations in which every argument has each of its dtypes: a few, where an op takes several by argument."""
    combinations = op.declaration.dtypes.combinations()
    return tuple(covering(combinations[::-1], lambda each: each.named or [each.first]))  # the last one is among them


@functools.cache
def samples_in(op: Op) -> int:
    return len(samples_of(op, "cpu", last_dtypes(op)))


def every_case() -> list[Case]:
    """Of dtypes that an op takes by argument each one once: `make nightly` makes a case of every combination."""
    return [
        Case(op, device, dtypes, index)
        for op in OPS
        for device in devices()
        if device in op.declaration.kernels
        for dtypes in (op.declaration.dtypes.combinations() if _EVERY_COMBINATION else dtypes_once(op))
        for index in range(samples_in(op))
    ]


def is_first(case: Case) -> bool:
    """One case for each combination of dtypes of each op."""
    return case.index == 0


def is_first_of_op(case: Case) -> bool:
    """One case for each op, in the last of its dtypes."""
    return case.index == 0 and case.is_last


def is_floating(case: Case) -> bool:
    return case.dtype.is_floating_point


def has_out(case: Case) -> bool:
    return bool(case.op.declaration.outputs)


def has_gradient(case: Case) -> bool:
    if writes(case.op) or not case.dtype.is_floating_point:
        return False
    # A gradient of 8 bits cannot be added to another.
    return not any(is_8bit_float(result.dtype) for result in call(case.op, case.sample(), case.op.reference).tensors)


def has_tokens(case: Case) -> bool:
    return tokens_of(case.sample()) is not None


def over(*conditions: Callable[[Case], bool]) -> pytest.MarkDecorator:
    """Run the test for each case that meets the conditions."""
    chosen = [case for case in every_case() if all(condition(case) for condition in conditions)]
    return pytest.mark.parametrize("case", chosen, ids=str)
