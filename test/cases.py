"""What the generic tests run over: each op of each registered library, on each device, in each dtype, with each sample."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from torch_jit_ops import Op, Sample, libraries
from torch_jit_ops.testing.calls import Outcome as Outcome
from torch_jit_ops.testing.calls import assert_only_written_inside as assert_only_written_inside
from torch_jit_ops.testing.calls import assert_same_bits as assert_same_bits
from torch_jit_ops.testing.calls import bits as bits
from torch_jit_ops.testing.calls import call as call
from torch_jit_ops.testing.calls import copy_with_storage as copy_with_storage
from torch_jit_ops.testing.calls import is_batched as is_batched
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
    dtype: torch.dtype
    index: int

    def __str__(self) -> str:
        return f"{self.op.qualified_name}-{self.device}-{str(self.dtype).removeprefix('torch.')}-{self.index}"

    def sample(self) -> Sample:
        """Fresh arguments, the same in every call."""
        return copy.deepcopy(_kept(self.op, self.device, self.dtype)[self.index])


# Random numbers took most of the suite's time. Tests of one op come one after another, so a few lists are enough.
_kept = functools.lru_cache(maxsize=4)(samples_of)


@functools.cache
def samples_in(op: Op) -> int:
    return len(samples_of(op, "cpu", op.declaration.dtypes[0]))


def every_case() -> list[Case]:
    return [
        Case(op, device, dtype, index)
        for op in OPS
        for device in devices()
        if device in op.declaration.kernels
        for dtype in op.declaration.dtypes
        for index in range(samples_in(op))
    ]


def is_first(case: Case) -> bool:
    """One case for each dtype of each op."""
    return case.index == 0


def is_first_of_op(case: Case) -> bool:
    """One case for each op, in the last of its dtypes."""
    return case.index == 0 and case.dtype == case.op.declaration.dtypes[-1]


def is_floating(case: Case) -> bool:
    return case.dtype.is_floating_point


def has_out(case: Case) -> bool:
    return bool(case.op.declaration.outputs)


def has_gradient(case: Case) -> bool:
    return not writes(case.op) and case.dtype.is_floating_point


def has_tokens(case: Case) -> bool:
    return tokens_of(case.sample()) is not None


def over(*conditions: Callable[[Case], bool]) -> pytest.MarkDecorator:
    """Run the test for each case that meets the conditions."""
    chosen = [case for case in every_case() if all(condition(case) for condition in conditions)]
    return pytest.mark.parametrize("case", chosen, ids=str)
