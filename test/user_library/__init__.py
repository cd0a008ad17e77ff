"""A user's library, with what the built-in ops do not have: written arguments, several results, optional arguments, choices.

The generic tests run over it like over any other, on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from torch_jit_ops import OpLibrary, Sample, SampleMaker

library = OpLibrary("userlib", csrc=Path(__file__).parent / "csrc", include=[Path(__file__).parent / "include"])


def _rows(make: SampleMaker) -> Iterator[Sample]:
    yield Sample((make.randn(7, 33), make.randn(33)), note="rows")
    yield Sample((make.randn(2, 3, 8), make.randn(8)), note="two leading dimensions")
    yield Sample((make.randn(16), make.randn(16)), note="one row")


def _pairs(make: SampleMaker) -> Iterator[Sample]:
    for sample in _rows(make):
        yield Sample((sample.args[0], make.randn(*sample.args[0].shape)), note=sample.note)


def _single(make: SampleMaker) -> Iterator[Sample]:
    for sample in _rows(make):
        yield Sample((sample.args[0],), note=sample.note)


def _affine(make: SampleMaker) -> Iterator[Sample]:
    for sample in _rows(make):
        width = sample.args[0].shape[-1]
        yield Sample(sample.args, note=f"{sample.note}, defaults")
        options = {"factor": 0.5, "direction": "reverse"}
        yield Sample((*sample.args, make.randn(width)), options, note=f"{sample.note}, everything given")


@library.op(cpu="rows.cpp", variant="userlib::scale_rows<{input.dtype}>", mutates=("input",), samples=_rows)
def scale_rows(input: Tensor, weight: Tensor) -> None:
    """``input *= weight``."""
    input.mul_(weight)


@library.op(
    cpu="rows.cpp",
    variant="userlib::accumulate<{x.dtype}>",
    mutates=("total",),
    dtypes=(torch.float32,),
    samples=_pairs,
)
def accumulate(total: Tensor, x: Tensor) -> Tensor:
    """``total += x``, and returns the largest element of each row of the sum."""
    return total.add_(x).amax(-1)


@library.op(
    cpu="rows.cpp",
    variant="userlib::split_sign<{x.dtype}>",
    outputs=("positive", "negative"),
    dtypes=(torch.float32,),
    samples=_single,
)
def split_sign(x: Tensor) -> tuple[Tensor, Tensor]:
    """``max(x, 0)``, and whether x is negative."""
    return x.clamp(min=0), x < 0


@library.op(
    cpu="rows.cpp",
    variant="userlib::affine<{x.dtype}, userlib::{direction}>",
    dtypes=(torch.float32,),
    reusable=("x",),
    samples=_affine,
)
def affine(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    factor: float = 1.0,
    direction: Literal["straight", "reverse"] = "straight",
) -> Tensor:
    """``factor * x * weight + bias``, with the weight read from its end in direction ``reverse``."""
    y = factor * x * (weight if direction == "straight" else weight.flip(-1))
    return y if bias is None else y + bias


@library.op(cpu="rows.cpp", variant="userlib::swap<{x.dtype}>", dtypes=(torch.float32,), samples=_single)
def swap(x: Tensor) -> Tensor:
    """The last two dimensions exchanged: its reference returns a view, which no kernel does."""
    return x.transpose(-1, -2) if x.dim() > 1 else x
