"""What every op promises, on every device, in every dtype, for every sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    OPS,
    Case,
    Outcome,
    assert_only_written_inside,
    assert_same_bits,
    call,
    copy_with_storage,
    devices,
    has_gradient,
    has_out,
    is_first,
    is_first_of_op,
    is_floating,
    map_tensors,
    over,
    poisoned,
    samples_of,
    storage_bits,
    tensors_of,
    with_extremes,
)
from torch import Tensor

from torch_jit_ops import Op, Sample
from torch_jit_ops.testing import oracle


def made_by_out(op: Op, sample: Sample, outs: tuple[Tensor, ...]) -> None:
    op.out(*sample.args, **sample.kwargs, **dict(zip(op.declaration.outputs, outs, strict=True)))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.qualified_name)
def test_has_samples_of_each_dtype(op: Op) -> None:
    assert op.declaration.samples is not None, f"{op.qualified_name} declares no samples, so nothing tests it"
    assert set(op.declaration.kernels) & set(devices()), f"{op.qualified_name} has no kernel that this machine can run"
    for dtypes in op.declaration.dtypes.combinations():
        samples = samples_of(op, "cpu", dtypes)
        assert len(samples) > 1, f"{op.qualified_name} has {len(samples)} samples for {dtypes}"
        assert all(sample.note for sample in samples), "each sample says why it is there"
        given = [op.declaration.by_name(sample.args, sample.kwargs) for sample in samples]
        for name, dtype in dtypes.named:
            assert any(name in args and args[name].dtype == dtype for args in given), f"no sample has {name} in {dtype}"
        assert any(tensor.dtype == dtypes.first for sample in samples for tensor in tensors_of(sample)), f"no sample: {dtypes}"


@over()
def test_is_as_right_as_the_reference(case: Case) -> None:
    given = case.sample()
    with case.op.kernels_alone():
        actual = call(case.op, copy_with_storage(given))
    oracle.verify(case.op, case.device, case.dtypes, given, actual)


@over(is_first, is_floating)
def test_is_as_exact_on_average(case: Case) -> None:
    errors = oracle.average_errors(case.op, case.device, case.dtypes, lambda sample: call(case.op, sample))
    for error, plain in errors.values():
        assert error <= 1.1 * plain, f"on average {error:.3f} ulp wrong, plain PyTorch {plain:.3f}"


@over(has_out)
def test_out_form_makes_the_same_bits(case: Case) -> None:
    sample = case.sample()
    expected = call(case.op, sample)
    outs = tuple(poisoned(tensor.shape, tensor.dtype, case.device) for tensor in expected.tensors)
    before = copy_with_storage(Sample(outs))
    with case.op.kernels_alone():
        made_by_out(case.op, sample, outs)
    for name, out, tensor, old in zip(case.op.declaration.outputs, outs, expected.tensors, before.args, strict=True):
        assert_same_bits(out, tensor, name)
        assert_only_written_inside(out, old, name)


@over()
def test_results_are_new_contiguous_tensors(case: Case) -> None:
    sample = case.sample()
    results = call(case.op, sample).tensors[: case.op.signature.results]
    places = {tensor.untyped_storage().data_ptr() for tensor in tensors_of(sample)}
    for tensor in results:
        assert tensor.is_contiguous()
        assert tensor.numel() == 0 or tensor.untyped_storage().data_ptr() not in places


@over()
def test_writes_nothing_but_what_the_schema_says(case: Case) -> None:
    given = case.sample()
    passed = copy_with_storage(given)
    call(case.op, passed)
    written = {argument.name for argument in case.op.signature.arguments if argument.written}
    names = [argument.name for argument in case.op.signature.arguments]
    for name, old, new in zip(names, given.args, passed.args, strict=False):
        if isinstance(old, Tensor) and name not in written:
            assert torch.equal(storage_bits(old), storage_bits(new)), f"argument {name!r} was changed"


@over()
def test_same_bits_every_time(case: Case) -> None:
    sample = case.sample()
    first = call(case.op, copy_with_storage(sample))
    for _ in range(3):
        again = call(case.op, copy_with_storage(sample))
        for (name, tensor), (_, expected) in zip(again, first, strict=True):
            assert_same_bits(tensor, expected, name)


@over(is_first)
def test_extreme_values(case: Case) -> None:
    largest = oracle.largest_extreme(case.op, case.device, case.dtypes)
    sample = with_extremes(case.op, case.sample(), case.dtype, largest=largest)
    with case.op.kernels_alone():
        actual = call(case.op, copy_with_storage(sample))
    oracle.verify(case.op, case.device, case.dtypes, sample, actual, extreme=True)


# --- derivatives ----------------------------------------------------------------------------------


def takes_two_tensors(case: Case) -> bool:
    return len(tensors_of(case.sample())) > 1


def differentiable(sample: Sample) -> Sample:
    return map_tensors(sample, lambda tensor: tensor.detach().clone().requires_grad_(tensor.is_floating_point()))


def gradients(op: Op, sample: Sample, function: Any = None) -> list[Tensor | None]:
    results = [tensor for tensor in call(op, sample, function).tensors if tensor.requires_grad]
    # Multiples of an eighth, which every dtype holds.
    eighths = [torch.randint(-16, 17, tensor.shape, generator=torch.Generator().manual_seed(1)) for tensor in results]
    torch.autograd.backward(results, [(number / 8).to(tensor) for number, tensor in zip(eighths, results, strict=True)])
    return [tensor.grad for tensor in tensors_of(sample) if tensor.is_floating_point()]


def has_gradient_of_its_own(case: Case) -> bool:
    return has_gradient(case) and case.op.declaration.backward is not None


def has_derived_gradient(case: Case) -> bool:
    return has_gradient(case) and case.op.declaration.backward is None


def gradients_of_reference(op: Op, sample: Sample) -> Outcome:
    return gradient_outcome(op, sample, op.reference)


def gradient_outcome(op: Op, sample: Sample, function: Any = None) -> Outcome:
    grads = [grad for grad in gradients(op, differentiable(sample), function) if grad is not None]
    return Outcome(tuple(f"gradient {index}" for index in range(len(grads))), tuple(grads))


@over(has_gradient_of_its_own)
def test_declared_gradient_is_as_right_as_that_of_plain_pytorch(case: Case) -> None:
    sample = case.sample()
    actual = gradient_outcome(case.op, sample)
    oracle.verify(case.op, case.device, case.dtypes, sample, actual, reference=gradients_of_reference)


@over(has_derived_gradient)
def test_gradient_is_that_of_plain_pytorch(case: Case) -> None:
    sample = case.sample()
    actual = gradients(case.op, differentiable(sample))
    expected = gradients(case.op, differentiable(sample), case.op.reference)
    assert any(grad is not None for grad in expected)
    for index, (grad, plain) in enumerate(zip(actual, expected, strict=True)):
        assert (grad is None) == (plain is None)
        if grad is not None and plain is not None:
            assert_same_bits(grad, plain, f"gradient {index}")


def computes_in_float64(case: Case) -> bool:
    """A result that is fp32 whatever the arguments are is too coarse for finite differences."""
    sample = map_tensors(case.sample(), lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    return any(tensor.dtype == torch.float64 for tensor in call(case.op, sample, case.op.reference).tensors)


@over(has_gradient, is_first_of_op, computes_in_float64)
def test_gradcheck(case: Case) -> None:
    wide = map_tensors(case.sample(), lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    sample = differentiable(wide)
    inputs = [tensor for tensor in tensors_of(sample) if tensor.requires_grad]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        rest = iter(tensors)
        again = map_tensors(sample, lambda tensor: next(rest) if tensor.requires_grad else tensor)
        return tuple(tensor for tensor in call(case.op, again).tensors if tensor.dtype == torch.float64)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@over(has_gradient, is_first_of_op, takes_two_tensors)
def test_only_wanted_gradients_are_computed(case: Case) -> None:
    sample = case.sample()
    for chosen in range(sum(tensor.is_floating_point() for tensor in tensors_of(sample))):
        again = differentiable(sample)
        for index, tensor in enumerate(tensor for tensor in tensors_of(again) if tensor.is_floating_point()):
            tensor.requires_grad_(index == chosen)
        grads = gradients(case.op, again)
        assert [grad is not None for grad in grads] == [index == chosen for index in range(len(grads))]


def test_gradient_of_one_tensor_passed_twice() -> None:
    x = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(torch.ops.jitk.fused_add_relu(x, x).square().sum(), x, create_graph=True)
    assert grad.tolist() == [0.0, 4.0, 16.0]
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert second.tolist() == [0.0, 8.0, 8.0]


@over(is_first_of_op)
def test_the_profiler_shows_the_op_and_its_shapes(case: Case) -> None:
    """For a call, for one of the out form, and for one that wants a gradient."""
    sample = case.sample()
    outs = tuple(map(torch.empty_like, call(case.op, copy_with_storage(sample)).tensors)) if has_out(case) else ()
    wanting = map_tensors(case.sample(), lambda tensor: tensor.requires_grad_(tensor.is_floating_point()))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        case.op.default(*sample.args, **sample.kwargs)
        if has_out(case):
            made_by_out(case.op, sample, outs)
        if has_gradient(case):
            case.op.default(*wanting.args, **wanting.kwargs)
    shown = [event.input_shapes for event in profile.events() if event.name == case.op.qualified_name]
    values = case.op.declaration.arguments(*sample.args, **sample.kwargs)
    shapes = [list(value.shape) if isinstance(value, Tensor) else [] for value in values]
    assert len(shown) == 1 + has_out(case) + has_gradient(case)
    for one in shown:
        assert one[: len(shapes)] == shapes
