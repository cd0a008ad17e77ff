"""What every op promises, as one function."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from torch_jit_ops import backends, fallback
from torch_jit_ops.declaring.dtypes import Combination, Given
from torch_jit_ops.declaring.samples import Sample
from torch_jit_ops.op import Op
from torch_jit_ops.testing import oracle
from torch_jit_ops.testing.calls import (
    Outcome,
    assert_only_written_inside,
    assert_same_bits,
    call,
    copy_with_storage,
    map_tensors,
    may_want_gradient,
    moved,
    poisoned,
    require,
    samples_of,
    storage_bits,
    tensors_of,
    tokens_of,
    with_tokens,
    writes,
)
from torch_jit_ops.testing.opcheck import opcheck


def check(op: Op, *, devices: Sequence[str] | None = None, dtypes: Given | None = None) -> None:
    """Call the op with each of its samples and fail unless

    * it is as right as its function: at most twice as wrong as the function in the same dtype, by the function in float64,
      and as wrong on average; integers, booleans and 8-bit floats are equal, but for what two rounding errors may decide,
    * its results are new and contiguous, and it writes nothing but what its schema says,
    * the out form makes the same bits, and no others beside its outputs,
    * no tokens and one token are served, where the samples have a dimension of tokens,
    * what tracing expects (the fake) has the shapes, strides and dtypes of real results,
    * its gradients, and theirs, are those of finite differences,
    * ``torch.func.vmap`` over the arguments that it declares as ``rows`` gives the results of single calls,
    * each half of the rows alone gives its half of the results, and of ``sums`` a summand; so do halves of the last dimension
      of an op that is ``elementwise``,
    * ``torch.library.opcheck`` accepts its overloads, with and without gradients.

    Args:
        op: with samples; as ``library.op`` returns it.
        devices: ``"cpu"``, ``"cuda"``; default all that are here and that the op has kernels for, ``"cpu"`` if it has none.
        dtypes: fewer than those of the op; of an op that declares them by argument a list, of which each argument takes those
            that it has, or a mapping.

    Raises:
        AssertionError: a promise is broken; the text says which one, and for which sample.
        ValueError: the op has no samples, or no kernels for one of the ``dtypes``.
    """
    if op.declaration.samples is None:
        raise ValueError(f"{op.qualified_name} declares no samples, so there is nothing to check it with")
    combinations = op.declaration.dtypes.combinations(dtypes)
    for device in devices or _devices(op):
        for each in combinations:
            for index in range(len(samples_of(op, device, each))):
                _check_sample(op, device, each, index, thorough=each == combinations[-1], first=index == 0)


def _devices(op: Op) -> list[str]:
    able = (backend.device_type for backend in map(backends.named, op.declaration.kernels) if backend.is_here())
    return list(able) or [backends.CPU.device_type]


def _check_sample(op: Op, device: str, dtypes: Combination, index: int, *, thorough: bool, first: bool) -> None:
    def sample() -> Sample:
        return samples_of(op, device, dtypes)[index]

    def with_few(tokens: int) -> Callable[[], object]:
        return lambda: _right(op, device, dtypes, with_tokens(sample(), tokens))

    differentiable = not writes(op) and any(map(may_want_gradient, tensors_of(sample())))

    checks: list[tuple[str, Callable[[], object]]] = [
        ("the kernel and the function", lambda: _right(op, device, dtypes, sample())),
        ("what it writes", lambda: _writes_what_it_says(op, sample())),
        ("the fake", lambda: _like_its_fake(op, sample())),
    ]
    if op.declaration.outputs:
        checks.append(("the out form", lambda: _out_form(op, sample())))
    if first and tokens_of(sample()) is not None:
        for tokens in (0, 1):
            few = f"{tokens} token{'s' * (tokens != 1)}"
            checks.append((few, with_few(tokens)))
    if first:
        checks.append(("rounding", lambda: _rounds(op, device, dtypes)))
    if first or thorough:
        checks.append(("torch.library.opcheck", lambda: _opcheck(op, sample())))
    if first and differentiable:
        checks.append(("opcheck with gradients", lambda: _opcheck(op, _wanting_gradients(sample()), out_form=False)))
    if first and op.declaration.rows.arguments and not op.declaration.rows.sums and not writes(op):
        checks.append(("torch.func.vmap", lambda: _more_rows(op, sample())))
    if first and thorough and op.declaration.rows.arguments:
        checks.append(("rows", lambda: _rows_apart(op, sample())))
    if first and thorough and differentiable:
        checks.append(("the derivative", lambda: _derivative(op, sample())))
    for name, run in checks:
        try:
            run()
        except Exception as error:  # of any kind: which sample and which promise it was is worth most to the reader
            where = f"{op.qualified_name} on {device} with {dtypes}, sample {index}"
            raise AssertionError(f"{where} ({sample().note or 'no note'}): {name}\n{error}") from error


def _right(op: Op, device: str, dtypes: Combination, given: Sample) -> None:
    if device in op.declaration.kernels:
        unserved = op.declaration.unserved(
            op.declaration.kernels[device].pattern.dtypes_of(op.declaration.by_name(given.args, given.kwargs))
        )
        require(unserved is None, f"the kernel cannot run: {unserved}")
    with op.kernels_alone() if device in op.declaration.kernels else contextlib.nullcontext():
        actual = call(op, copy_with_storage(given))
    oracle.verify(op, device, dtypes, given, actual)
    for name, tensor in Outcome(actual.names[: op.signature.results], actual.tensors[: op.signature.results]):
        require(tensor.is_contiguous(), f"{name} is not contiguous: strides {tensor.stride()}")


def _rounds(op: Op, device: str, dtypes: Combination) -> None:
    """Halves are rounded and not cut off, of which the largest errors may tell nothing."""
    results = call(op, samples_of(op, device, dtypes)[0], op.reference)
    halves = [name for name, tensor in results if tensor.dtype in (torch.float16, torch.bfloat16)]
    errors = oracle.average_errors(op, device, dtypes, lambda sample: call(op, sample)) if halves else {}
    for name in halves:
        error, plain = errors[name]
        require(error <= 1.1 * plain, f"{name}: on average {error:.3f} ulp wrong, plain PyTorch {plain:.3f}")


def _writes_what_it_says(op: Op, given: Sample) -> None:
    passed = copy_with_storage(given)
    results = call(op, passed).tensors[: op.signature.results]
    own = {tensor.untyped_storage().data_ptr() for tensor in tensors_of(passed) if tensor.numel() > 0}
    for place, tensor in enumerate(results):
        require(tensor.untyped_storage().data_ptr() not in own, f"result {place} shares the memory of an argument")
    for argument, old, new in zip(op.signature.arguments, given.args, passed.args, strict=False):
        if isinstance(old, Tensor) and not argument.written:
            require(torch.equal(storage_bits(old), storage_bits(new)), f"argument {argument.name!r} was changed")


def _out_form(op: Op, given: Sample) -> None:
    expected = call(op, given)
    outs = tuple(poisoned(tensor.shape, tensor.dtype, tensor.device.type) for tensor in expected.tensors)
    before = copy_with_storage(Sample(outs))
    op.out(*given.args, **given.kwargs, **dict(zip(op.declaration.outputs, outs, strict=True)))
    for name, out, tensor, old in zip(op.declaration.outputs, outs, expected.tensors, before.args, strict=True):
        assert_same_bits(out, tensor, name)
        assert_only_written_inside(out, old, name)


def _like_its_fake(op: Op, given: Sample) -> None:
    real = call(op, copy_with_storage(given))
    with FakeTensorMode() as mode:
        fake = call(op, map_tensors(given, mode.from_tensor))
    for (name, expected), (_, actual) in zip(fake, real, strict=True):
        facts = [(list(t.shape), t.dtype, t.device, t.stride() if t.numel() > 0 else None) for t in (actual, expected)]
        for what, is_, should in zip(("shape", "dtype", "device", "strides"), *facts, strict=True):
            require(is_ == should, f"{name}: {what} {is_}, the fake says {should}")


def _opcheck(op: Op, given: Sample, *, out_form: bool = True) -> None:
    results = call(op, copy_with_storage(given) if writes(op) else given).tensors
    opcheck(op.default, given, results)
    if op.declaration.outputs and out_form:
        outs = dict(zip(op.declaration.outputs, map(torch.empty_like, results), strict=True))
        opcheck(op.out, Sample(given.args, {**given.kwargs, **outs}))


def _more_rows(op: Op, given: Sample) -> None:
    names = [argument.name for argument in op.signature.arguments[: len(given.args)]]
    rows = op.declaration.rows
    places = [i for i, name in enumerate(names) if name in (*rows.arguments, *rows.per_token)]
    turned = [moved(arg, lambda tensor: tensor.flip(-1)) if i in places else arg for i, arg in enumerate(given.args)]
    calls = [list(given.args), turned]
    stacked = [torch.stack([call[i] for call in calls]) if i in places else arg for i, arg in enumerate(given.args)]
    dims = tuple(0 if i in places else None for i in range(len(given.args)))
    actual = torch.func.vmap(lambda *args: op.default(*args, **given.kwargs), in_dims=dims)(*stacked)
    each = [op.default(*args, **given.kwargs) for args in calls]
    pairs = [list(pair) for pair in zip(*each, strict=True)] if isinstance(actual, tuple) else [each]
    for place, (result, expected) in enumerate(zip(actual if isinstance(actual, tuple) else (actual,), pairs, strict=True)):
        torch.testing.assert_close(result, torch.stack(expected), equal_nan=True, msg=f"result {place} is not that of each row")


def _rows_apart(op: Op, given: Sample) -> None:
    """What DTensor relies on when each process has some of the rows; in float64, where halves of a sum add up."""
    given = _in_float64(given)
    with fallback.allowed():
        _compare_halves(op, given)


def _compare_halves(op: Op, given: Sample) -> None:
    names = [argument.name for argument in op.signature.arguments[: len(given.args)]]
    rows = op.declaration.rows
    places = [i for i, name in enumerate(names) if name in rows.arguments]
    per_token = [i for i, name in enumerate(names) if name in rows.per_token]
    dims = min(given.args[i].dim() for i in places)
    whole = call(op, copy_with_storage(given))
    for dim in range(dims if rows.elementwise else dims - 1):
        if min(given.args[i].shape[dim] for i in places) < 2:
            continue
        split = [*places, *(i for i in per_token if dim < given.args[i].dim())]
        halves = []
        for part in range(2):
            args = [arg.chunk(2, dim)[part] if i in split else arg for i, arg in enumerate(given.args)]
            halves.append(call(op, copy_with_storage(Sample(tuple(args), given.kwargs))))
        for place, expected in enumerate(whole.tensors):
            pair = [half.tensors[place] for half in halves]
            is_sum = place < len(op.declaration.outputs) and op.declaration.outputs[place] in rows.sums
            text = f"result {place} of halves along dimension {dim} is not that of the whole"
            torch.testing.assert_close(
                pair[0] + pair[1] if is_sum else torch.cat(pair, dim), expected, equal_nan=True, msg=text
            )


def _in_float64(given: Sample) -> Sample:
    return map_tensors(given, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def _wanting_gradients(given: Sample) -> Sample:
    return map_tensors(given, lambda tensor: tensor.detach().clone().requires_grad_(may_want_gradient(tensor)))


def _derivative(op: Op, given: Sample) -> None:
    """In float64, where finite differences say something; kernels are not made for it, so the function runs forward."""
    wide = _wanting_gradients(_in_float64(given))
    inputs = [tensor for tensor in tensors_of(wide) if tensor.requires_grad]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        rest = iter(tensors)
        again = map_tensors(wide, lambda tensor: next(rest) if tensor.requires_grad else tensor)
        # What has another dtype by declaration, such as a quantised result or its scale, is too coarse for differences.
        return tuple(tensor for tensor in call(op, again).tensors if tensor.dtype == torch.float64)

    with fallback.allowed():
        if not run(*inputs):
            return
        torch.autograd.gradcheck(run, inputs, fast_mode=True)
        torch.autograd.gradgradcheck(run, inputs, fast_mode=True)
