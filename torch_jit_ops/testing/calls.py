"""What tests of ops are made of: samples, the same with other strides and layouts, calls, and comparisons of what is left."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torch_jit_ops.backends import CPU
from torch_jit_ops.declaring import signature
from torch_jit_ops.declaring.dtypes import Combination
from torch_jit_ops.declaring.samples import Sample, SampleMaker
from torch_jit_ops.op import Op


def samples_of(op: Op, device: str, dtypes: torch.dtype | Combination, seed: int = 0) -> list[Sample]:
    """Fresh arguments, the same in every call."""
    make = op.declaration.samples
    return list(make(SampleMaker(device, dtypes, seed))) if make is not None else []


@functools.cache
def kept_arguments(op: Op) -> frozenset[str]:
    """Names of the arguments that samples make of indices: another value would be another call, or none at all."""
    names: set[str] = set()
    declaration, samples = op.declaration, op.declaration.samples
    for dtypes in declaration.dtypes.combinations() if samples is not None else ():
        make = SampleMaker(CPU.device_type, dtypes)
        for sample in samples(make) if samples is not None else ():
            given = declaration.by_name(sample.args, sample.kwargs)
            names |= {name for name, value in given.items() if isinstance(value, Tensor) and make.is_kept(value)}
    return frozenset(names)


def writes(op: Op) -> bool:
    """Whether the op writes arguments."""
    return any(argument.written for argument in op.signature.arguments)


def require(condition: bool | Tensor, text: str) -> None:
    """Raise AssertionError unless the condition holds; also where Python strips assertions."""
    if not condition:
        raise AssertionError(text)


# --- the same samples with other strides, offsets and layouts --------------------------------------


def map_tensors(sample: Sample, change: Callable[[Tensor], Tensor]) -> Sample:
    def apply(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [apply(item) for item in value]
        return change(value) if isinstance(value, Tensor) else value

    kwargs = {name: apply(value) for name, value in sample.kwargs.items()}
    return replace(sample, args=tuple(map(apply, sample.args)), kwargs=kwargs)


def tensors_of(sample: Sample) -> list[Tensor]:
    return [value for value in (*sample.args, *sample.kwargs.values()) if isinstance(value, Tensor)]


def leaves_of(sample: Sample) -> list[Tensor]:
    """Its tensors, and those of its lists."""
    return list(signature.tensors_of((*sample.args, *sample.kwargs.values())))


def tokens_of(sample: Sample) -> int | None:
    """The size that all tensors with tokens share: the first dimension of the first one, if it is not its only one."""
    first = tensors_of(sample)[0]
    return first.shape[0] if sample.has_tokens and first.dim() > 1 else None


def is_batched(tensor: Tensor, tokens: int | None) -> bool:
    return tensor.dim() > 0 and tensor.shape[0] == tokens


def with_tokens(sample: Sample, count: int) -> Sample:
    """The sample with ``count`` tokens, its own ones again and again."""
    tokens = tokens_of(sample)

    def resize(tensor: Tensor) -> Tensor:
        if not is_batched(tensor, tokens):
            return tensor
        return tensor.index_select(0, torch.arange(count, device=tensor.device) % max(tokens or 1, 1))

    return map_tensors(sample, resize)


def with_extremes(op: Op, sample: Sample, dtype: torch.dtype, seed: int = 0, largest: float | None = None) -> Sample:
    """The sample with most values of ``dtype`` replaced by infinities, NaN, the largest and smallest numbers and zeros.

    Indices stay what they are.
    """
    generator = torch.Generator().manual_seed(seed)
    special = _special_values(dtype, largest)
    given = op.declaration.by_name(sample.args, sample.kwargs)
    kept = {id(given[name]) for name in kept_arguments(op) if name in given}

    def extreme(tensor: Tensor) -> Tensor:
        if tensor.dtype != dtype or id(tensor) in kept:
            return tensor
        picked = special[torch.randint(len(special), tensor.shape, generator=generator)].to(tensor.device)
        return torch.where(torch.rand(tensor.shape, generator=generator).to(tensor.device) < 0.8, picked, tensor)

    return map_tensors(sample, extreme)


def _special_values(dtype: torch.dtype, largest: float | None) -> Tensor:
    if dtype is torch.bool:
        return torch.tensor([False, True])
    if not dtype.is_floating_point:
        numbers = torch.iinfo(dtype)
        middle = [0, 1] if numbers.min == 0 else [-1, 0, 1]
        return torch.tensor([numbers.min, numbers.min + 1, *middle, numbers.max], dtype=dtype)
    format = torch.finfo(dtype)
    sizes = [largest or format.max, min(20.0, format.max), 1.0, format.tiny]
    if dtype is torch.float8_e8m0fnu:  # powers of two, neither zero nor negative
        return torch.tensor([torch.nan, *sizes], dtype=torch.float64).to(dtype)
    sizes += [format.tiny * format.eps, 0.0]
    if dtype not in WITHOUT_INFINITIES:
        sizes = [torch.inf, *sizes]
    return torch.tensor([torch.nan, *sizes, *(-size for size in sizes)], dtype=torch.float64).to(dtype)


# What becomes of an infinity that is converted to one of these depends on PyTorch's version and on the device.
WITHOUT_INFINITIES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu)


def copy_with_storage(sample: Sample) -> Sample:
    """Every tensor with its layout, in a storage of its own that is copied whole."""

    def copy(tensor: Tensor) -> Tensor:
        fresh = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return fresh.set_(tensor.untyped_storage().clone(), tensor.storage_offset(), tensor.size(), tensor.stride())

    return map_tensors(sample, copy)


def bits(tensor: Tensor) -> Tensor:
    """Bytes that compare equal only if the tensors do to the last bit, NaNs included."""
    tensor = tensor.detach()
    if tensor.itemsize == 1:
        tensor = tensor.view(torch.uint8)  # a copy of a bool is 0 or 1, whatever byte is there
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def storage_bits(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def moved(tensor: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
    """``move(tensor)`` for a function that only moves elements: 8-bit floats go as bytes, which more operations take."""
    if not is_8bit_float(tensor.dtype):
        return move(tensor)
    return move(tensor.view(torch.uint8)).view(tensor.dtype)


def is_8bit_float(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize == 1


def may_want_gradient(tensor: Tensor) -> bool:
    """8-bit floats are storage: nothing that they went through has a derivative."""
    return tensor.is_floating_point() and not is_8bit_float(tensor.dtype)


def assert_same_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    """Raise AssertionError unless the two are equal to the last bit."""
    require(actual.shape == expected.shape, f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}")
    require(actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}")
    differs = bits(actual) != bits(expected)
    require(not differs.any(), f"{what}: {int(differs.sum())} of {differs.numel()} bytes differ")


def poisoned(shape: Sequence[int], dtype: torch.dtype, device: str, stride: Sequence[int] | None = None) -> Tensor:
    """A tensor whose memory, and 64 elements on both sides of it, would be noticed in any result: NaN, or an odd number."""
    guard = 64
    if stride is None:
        stride = torch.empty(tuple(shape), device="meta").stride()
    reach = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if 0 not in shape else 0
    memory = torch.empty(guard + reach + guard, dtype=dtype, device=device)
    memory.view(torch.uint8).fill_(0xFF if dtype.is_floating_point else 0xA5)
    return memory.as_strided(tuple(shape), tuple(stride), guard)


def assert_only_written_inside(tensor: Tensor, before: Tensor, what: str) -> None:
    """All bytes of the storage but the tensor's own are still those of ``before``, an older copy with the same layout."""
    expected = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    expected.set_(before.untyped_storage().clone(), tensor.storage_offset(), tensor.size(), tensor.stride()).copy_(tensor)
    require(torch.equal(storage_bits(tensor), storage_bits(expected)), f"{what}: memory beside it was written")


# --- calls ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """All tensors that a call leaves behind: what it returns, and then the arguments that it may write."""

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(zip(self.names, self.tensors, strict=True))


def outcome(op: Op, sample: Sample, results: Any) -> Outcome:
    made = () if results is None else results if isinstance(results, (tuple, list)) else (results,)
    arguments = op.signature.arguments
    given = {**{argument.name: value for argument, value in zip(arguments, sample.args, strict=False)}, **sample.kwargs}
    written: dict[str, Tensor] = {}
    for name in (argument.name for argument in arguments if argument.written):
        value = given.get(name)
        listed = value if isinstance(value, (list, tuple)) else ()
        written |= {f"{name}[{index}]": item for index, item in enumerate(listed)}
        written |= {name: value} if isinstance(value, Tensor) else {}
    names = (*(f"result {index}" for index in range(len(made))), *written)
    return Outcome(names, (*made, *written.values()))


def call(op: Op, sample: Sample, function: Callable[..., Any] | None = None) -> Outcome:
    """Call the op, or ``function`` in its place. Arguments that it writes are written."""
    return outcome(op, sample, (function or op.default)(*sample.args, **sample.kwargs))
