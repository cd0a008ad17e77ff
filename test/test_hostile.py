"""Arguments that nobody had in mind: layouts, sizes, dtypes and places. The result is right, or the error says what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import (
    Case,
    Outcome,
    assert_only_written_inside,
    assert_same_bits,
    call,
    copy_with_storage,
    devices,
    every_case,
    has_out,
    has_tokens,
    is_batched,
    is_first,
    is_first_of_op,
    map_tensors,
    over,
    poisoned,
    samples_in,
    samples_of,
    tensors_of,
    tokens_of,
    with_tokens,
    writes,
)
from torch import Tensor

from torch_jit_ops import Sample
from torch_jit_ops.testing import oracle
from torch_jit_ops.testing.calls import is_8bit_float

# --- layouts ---------------------------------------------------------------------------------------


def _like(tensor: Tensor, stride: tuple[int, ...], offset: int = 0) -> Tensor:
    """The same values with other strides, among NaNs."""
    place = poisoned(tensor.shape, tensor.dtype, tensor.device.type, stride)
    if offset:
        place = torch.as_strided(place, place.shape, place.stride(), place.storage_offset() + offset)
    return place.copy_(tensor)


def _row_stride(tensor: Tensor, stride: int) -> tuple[int, ...]:
    dense = torch.empty(tensor.shape, device="meta")[..., :1].contiguous().stride()
    return (*(step * stride for step in dense[:-1]), 1)


def offset(tensor: Tensor) -> Tensor:
    return _like(tensor, tensor.contiguous().stride(), offset=1)


def odd_row_stride(tensor: Tensor) -> Tensor:
    return _like(tensor, _row_stride(tensor, tensor.shape[-1] + 3))


def even_row_stride(tensor: Tensor) -> Tensor:
    return _like(tensor, _row_stride(tensor, (tensor.shape[-1] // 64 + 2) * 64))


def transposed(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT


def gap_between_matrices(tensor: Tensor) -> Tensor:
    stride = list(tensor.contiguous().stride())
    stride[0] += 2 * tensor.shape[-1]
    return _like(tensor, tuple(stride))


def leading_dimensions_swapped(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def every_second_element(tensor: Tensor) -> Tensor:
    return _like(tensor, tuple(2 * step for step in tensor.contiguous().stride()))


def lazily_negated(tensor: Tensor) -> Tensor:
    return torch._neg_view(-tensor)


def one_row_many_times(tensor: Tensor) -> Tensor:
    return tensor[:1].contiguous().expand(tensor.shape)


@dataclass(frozen=True)
class Layout:
    make: Callable[[Tensor], Tensor]
    needs_dims: int  # fewer dimensions have no such layout
    served: bool = False  # always; others may be refused
    is_of_rows: bool = False  # decides which loop or which vectors a kernel takes

    def __str__(self) -> str:
        return self.make.__name__

    def fits(self, tensor: Tensor, written: bool = False) -> bool:
        if self.make is lazily_negated and (written or not tensor.is_floating_point() or is_8bit_float(tensor.dtype)):
            # PyTorch negates no 8-bit floats, and has no fallback for a tensor that a custom op writes: MathBitsFallback.h
            return False
        return tensor.dim() >= self.needs_dims


LAYOUTS = [
    Layout(offset, 0, served=True, is_of_rows=True),
    Layout(odd_row_stride, 2, is_of_rows=True),
    Layout(even_row_stride, 2, is_of_rows=True),
    Layout(transposed, 2),
    Layout(gap_between_matrices, 3),
    Layout(leading_dimensions_swapped, 3),
    Layout(every_second_element, 1),
    Layout(lazily_negated, 0, served=True),
]


# Of an op with more samples times tensors than this, most of the calls would be alike: what is refused is refused of every
# sample, and one tensor by itself meets the same loops in every dtype.
_MOST_CALLS = 20


def _takes_many_calls(case: Case) -> bool:
    return samples_in(case.op) * len(tensors_of(case.sample())) > _MOST_CALLS


def _is_worth_a_call(case: Case, layout: Layout, alone: bool = False) -> bool:
    if not _takes_many_calls(case):
        return True
    if layout.is_of_rows and not alone:
        return True
    return case.is_last and (layout.is_of_rows or case.index < 2)


def _in_layouts() -> list[Any]:
    chosen = []
    for case in every_case():
        tensors = tensors_of(case.sample())
        for layout in LAYOUTS:
            fitting = [index for index, tensor in enumerate(tensors) if layout.fits(tensor, writes(case.op))]
            alone = [[index] for index in fitting] if len(tensors) > 1 else []
            for which in ([fitting] if fitting else []) + alone:
                if _is_worth_a_call(case, layout, which is not fitting):
                    name = f"{case}-{layout}-{','.join(map(str, which))}"
                    chosen.append(pytest.param(case, layout, which, id=name))
    return chosen


def _change(sample: Sample, which: list[int], make: Callable[[Tensor], Tensor]) -> Sample:
    chosen = {id(tensor) for index, tensor in enumerate(tensors_of(sample)) if index in which}
    return map_tensors(sample, lambda tensor: make(tensor) if id(tensor) in chosen else tensor)


@pytest.mark.parametrize(("case", "layout", "which"), _in_layouts())
def test_input_layout(case: Case, layout: Layout, which: list[int]) -> None:
    given = _change(case.sample(), which, layout.make)
    passed = given if layout.make is lazily_negated else copy_with_storage(given)
    before = copy_with_storage(given)
    plain = map_tensors(given, lambda tensor: tensor.clone(memory_format=torch.contiguous_format).resolve_neg())
    try:
        actual = call(case.op, passed)
    except RuntimeError as error:
        assert not layout.served, str(error)
        assert ".contiguous()" in str(error)
        return
    oracle.verify(case.op, case.device, case.dtypes, plain, actual)
    if layout.make is not lazily_negated:
        for old, new in zip(tensors_of(before), tensors_of(passed), strict=True):
            assert_only_written_inside(new, old, "an argument")


def _has_several_tokens(case: Case) -> bool:
    """Which is more than a shape: tensors without elements do not overlap."""
    return (tokens_of(case.sample()) or 0) > 1 and tensors_of(case.sample())[0].numel() > 0


@over(_has_several_tokens)
def test_expanded_input(case: Case) -> None:
    tokens = tokens_of(case.sample())
    given = map_tensors(case.sample(), lambda t: one_row_many_times(t) if t.dim() > 1 and t.shape[0] == tokens else t)
    plain = map_tensors(given, lambda tensor: tensor.clone(memory_format=torch.contiguous_format))
    values = case.op.declaration.by_name(given.args, given.kwargs)
    if any(argument.written and values[argument.name].stride(0) == 0 for argument in case.op.signature.arguments):
        with pytest.raises(RuntimeError, match=r"single memory location|overlap"):
            call(case.op, given)
        return
    try:
        actual = call(case.op, given)
    except RuntimeError as error:
        assert ".contiguous()" in str(error)
        return
    oracle.verify(case.op, case.device, case.dtypes, plain, actual)


def _out_layouts() -> list[Any]:
    chosen = []
    for case in every_case():
        if not has_out(case):
            continue
        result = call(case.op, case.sample(), case.op.reference).tensors[0]
        fitting = [layout for layout in LAYOUTS if layout.fits(result, True) and _is_worth_a_call(case, layout)]
        chosen += [pytest.param(case, layout, id=f"{case}-{layout}") for layout in fitting]
    return chosen


def _outs(case: Case, make: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> dict[str, Tensor]:
    """Poisoned tensors for the out form, in another form."""
    results = call(case.op, case.sample()).tensors
    return {
        name: make(poisoned(result.shape, result.dtype, case.device))
        for name, result in zip(case.op.declaration.outputs, results, strict=True)
    }


@pytest.mark.parametrize(("case", "layout"), _out_layouts())
def test_out_layout(case: Case, layout: Layout) -> None:
    outs = _outs(case, lambda tensor: layout.make(tensor) if layout.fits(tensor, True) else tensor)
    before = copy_with_storage(Sample(tuple(outs.values()))).args
    sample = case.sample()
    try:
        case.op.out(*sample.args, **sample.kwargs, **outs)
    except RuntimeError as error:
        assert not layout.served, str(error)
        assert ".contiguous()" in str(error)
        return
    expected = call(case.op, sample)
    for (name, out), old, result in zip(outs.items(), before, expected.tensors, strict=True):
        assert_only_written_inside(out, old, name)
        if not _sums_by_layout(case):
            assert_same_bits(out, result, name)
    if _sums_by_layout(case):
        oracle.verify(case.op, case.device, case.dtypes, sample, Outcome(expected.names, tuple(outs.values())))


def _sums_by_layout(case: Case) -> bool:
    """On a GPU the layout decides how many elements a thread takes at a time, and so the order in which a row is summed."""
    return case.device == "cuda" and oracle.spreads(case.op, case.device, case.dtypes)


@over(has_out, _has_several_tokens)
def test_out_whose_rows_are_one_is_refused(case: Case) -> None:
    outs = _outs(case, lambda tensor: one_row_many_times(tensor) if tensor.dim() > 1 else tensor)
    sample = case.sample()
    with pytest.raises(RuntimeError, match=r"single memory location|overlap"):
        case.op.out(*sample.args, **sample.kwargs, **outs)


@over(has_out, is_first)
def test_out_of_wrong_shape_or_dtype_or_number_of_dimensions(case: Case) -> None:
    sample = case.sample()
    for name in case.op.declaration.outputs:
        for wrong in (
            lambda tensor: tensor.new_empty([*tensor.shape[:-1], tensor.shape[-1] + 1]),
            lambda tensor: tensor.new_empty([tensor.shape[0] + 1, *tensor.shape[1:]]),
            lambda tensor: tensor.new_empty([1, *tensor.shape]),
            lambda tensor: tensor.flatten()[:0],
            lambda tensor: tensor.new_empty(tensor.shape, dtype=torch.float64),
            lambda tensor: tensor.new_empty(tensor.shape, dtype=torch.int16),
        ):
            outs = _outs(case)
            outs[name] = wrong(outs[name])
            with pytest.raises(RuntimeError, match=f"argument '{name}' does not match"):
                case.op.out(*sample.args, **sample.kwargs, **outs)


def _can_be_written_in_place(case: Case) -> bool:
    if len(case.op.declaration.outputs) != 1:
        return False
    first = tensors_of(case.sample())[0]
    result = call(case.op, case.sample(), case.op.reference).tensors[0]
    same = first.dtype == result.dtype and first.shape[:-1] == result.shape[:-1] and first.dim() == result.dim()
    return same and (first.dim() == 0 or first.shape[-1] >= result.shape[-1])


@over(_can_be_written_in_place)
def test_out_in_the_memory_of_an_input(case: Case) -> None:
    """Right where the op declares it reusable, or refused."""
    first = next(argument for argument in case.op.signature.arguments if argument.kind == "T")
    expected = call(case.op, case.sample()).tensors[0]
    for from_end in (False, True):
        passed = case.sample()
        out = tensors_of(passed)[0]
        if out.dim() > 0:
            start = out.shape[-1] - expected.shape[-1] if from_end else 0
            out = out.narrow(-1, start, expected.shape[-1])
        try:
            case.op.out(*passed.args, **passed.kwargs, **{case.op.declaration.outputs[0]: out})
        except RuntimeError as error:
            refused = not first.reusable and f"shares memory with argument '{first.name}'" in str(error)
            assert refused or ".contiguous()" in str(error) or "overlap" in str(error)
            continue
        assert first.reusable or out.numel() == 0, "an op without the promise was allowed to overwrite what it reads"
        assert_same_bits(out, expected, "the memory of an input")


@over(is_first_of_op, _has_several_tokens)
def test_rows_farther_apart_than_an_int32_reaches(case: Case) -> None:
    """Of each tensor with tokens, in turn; the memory between the rows is never touched."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    tokens = 5
    plain = with_tokens(case.sample(), tokens)

    def far(tensor: Tensor) -> Tensor:
        step = 2**31 // (tokens - 1) + tensor[0].numel() + 64
        row = torch.empty(tensor.shape[1:], device="meta").stride()
        memory = torch.empty(step * (tokens - 1) + tensor[0].numel(), dtype=tensor.dtype, device=tensor.device)
        return memory.as_strided(tensor.shape, (step, *row)).copy_(tensor)

    for which, tensor in enumerate(tensors_of(plain)):
        if not is_batched(tensor, tokens):
            continue
        given = _change(copy_with_storage(plain), [which], far)
        try:
            actual = call(case.op, given)
        except RuntimeError as error:
            assert ".contiguous()" in str(error)
            continue
        oracle.verify(case.op, case.device, case.dtypes, plain, actual)
    for place, name in enumerate(case.op.declaration.outputs):
        expected = call(case.op, plain)
        if not is_batched(expected.tensors[place], tokens):
            continue
        outs = dict(zip(case.op.declaration.outputs, (torch.empty_like(tensor) for tensor in expected.tensors), strict=True))
        outs[name] = far(outs[name].fill_(0))
        try:
            case.op.out(*plain.args, **plain.kwargs, **outs)
        except RuntimeError as error:
            assert ".contiguous()" in str(error)
            continue
        for out, tensor in zip(outs.values(), expected.tensors, strict=True):
            assert_same_bits(out, tensor, name)


# --- sizes -----------------------------------------------------------------------------------------


def _same_as_the_reference(case: Case, sample: Sample, refusal: str = "", cancels: bool = False) -> None:
    """The op does what its reference does, also if that is an error; or it refuses, with a text that holds ``refusal``.

    What ``cancels``, as a layernorm of one column does, is near the truth instead: all digits of the reference may be wrong.
    """
    try:
        expected = call(case.op, copy_with_storage(sample), case.op.reference)
    except Exception:
        with pytest.raises((RuntimeError, IndexError, TypeError, ValueError)):
            call(case.op, copy_with_storage(sample))
        return
    try:
        actual = call(case.op, copy_with_storage(sample))
    except RuntimeError as error:
        assert refusal, f"refused: {error}"
        assert refusal in str(error)
        return
    if cancels:
        oracle.verify(case.op, case.device, case.dtypes, sample, actual)
        return
    for (name, tensor), (_, plain) in zip(actual, expected, strict=True):
        assert tensor.shape == plain.shape
        assert tensor.dtype == plain.dtype
        torch.testing.assert_close(tensor, plain, msg=lambda text, name=name: f"{name}: {text}")


def _is_one_of_few(case: Case) -> bool:
    """All cases, but of an op with many those of one dtype and the first samples of each."""
    return not _takes_many_calls(case) or case.is_last or case.index < 2


@over(has_tokens, _is_one_of_few)
@pytest.mark.parametrize("tokens", [0, 1, 2, 17])
def test_other_numbers_of_tokens(case: Case, tokens: int) -> None:
    given = with_tokens(case.sample(), tokens)
    actual = call(case.op, copy_with_storage(given))
    oracle.verify(case.op, case.device, case.dtypes, given, actual)
    if case.op.declaration.outputs:
        outs = tuple(poisoned(tensor.shape, tensor.dtype, case.device) for tensor in actual.tensors)
        case.op.out(*given.args, **given.kwargs, **dict(zip(case.op.declaration.outputs, outs, strict=True)))
        for name, out, tensor in zip(case.op.declaration.outputs, outs, actual.tensors, strict=True):
            assert_same_bits(out, tensor, name)


@over(is_first)
def test_no_columns(case: Case) -> None:
    sample = map_tensors(case.sample(), lambda tensor: tensor.narrow(-1, 0, 0) if tensor.dim() > 0 else tensor)
    _same_as_the_reference(case, sample, refusal="must have columns")


@over(is_first)
def test_no_dimensions(case: Case) -> None:
    _same_as_the_reference(case, map_tensors(case.sample(), lambda tensor: tensor.flatten()[0]), refusal="does not match")


@over(is_first)
def test_many_dimensions(case: Case) -> None:
    tokens = tokens_of(case.sample())
    ranks = {tensors_of(sample)[0].dim() for sample in samples_of(case.op, case.device, case.dtypes)}
    _same_as_the_reference(
        case,
        map_tensors(case.sample(), lambda t: t.reshape(1, 1, *t.shape[:1], 1, *t.shape[1:]) if t.shape[:1] == (tokens,) else t),
        refusal=f"dimensions, expected {min(ranks)}" if len(ranks) == 1 else "",  # an op whose dimensions have names
    )


@over(is_first)
def test_any_width(case: Case) -> None:
    for width in range(1, 20):
        sample = map_tensors(case.sample(), lambda tensor, width=width: tensor[..., :width].contiguous())
        _same_as_the_reference(case, sample, refusal="does not match", cancels=True)


# --- dtypes and devices ----------------------------------------------------------------------------


@over(is_first)
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool, torch.complex64], ids=str)
def test_other_dtypes_do_as_plain_pytorch(case: Case, dtype: torch.dtype) -> None:
    _same_as_the_reference(case, map_tensors(case.sample(), lambda tensor: tensor.to(dtype)), refusal="dtype")


def _takes_two_tensors(case: Case) -> bool:
    return len(tensors_of(case.sample())) > 1


def _mixed_dtypes() -> list[Any]:
    chosen = []
    for case in every_case():
        if not is_first(case) or not _takes_two_tensors(case):
            continue
        half = torch.bfloat16 if case.dtype == torch.float16 else torch.float16
        # A kernel may serve a mixture of those it knows, and then each is a compilation.
        serves = [half] if case.is_last or not _takes_many_calls(case) else []
        chosen += [pytest.param(case, dtype, id=f"{case}-{dtype}") for dtype in (torch.float64, torch.int64, *serves)]
    return chosen


@pytest.mark.parametrize(("case", "dtype"), _mixed_dtypes())
def test_mixed_dtypes_do_as_plain_pytorch_or_name_the_argument(case: Case, dtype: torch.dtype) -> None:
    for which in range(len(tensors_of(case.sample()))):
        sample = _change(case.sample(), [which], lambda tensor: tensor.to(dtype))
        _same_as_the_reference(case, sample, refusal="argument '")


@over(is_first_of_op, _takes_two_tensors)
@pytest.mark.skipif("cuda" not in devices(), reason="needs a second kind of device")
def test_tensors_on_two_devices_are_refused(case: Case) -> None:
    other = "cpu" if case.device == "cuda" else "cuda"
    for which in range(len(tensors_of(case.sample()))):
        with pytest.raises(RuntimeError, match="device"):
            call(case.op, _change(case.sample(), [which], lambda tensor: tensor.to(other)))
        torch.cuda.synchronize()


@over(is_first_of_op)
def test_in_inference_mode(case: Case) -> None:
    expected = call(case.op, copy_with_storage(case.sample()))
    with torch.inference_mode():
        actual = call(case.op, case.sample())
    for (name, tensor), (_, plain) in zip(actual, expected, strict=True):
        assert_same_bits(tensor, plain, name)
