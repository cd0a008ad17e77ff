"""What PyTorch sees of an op while it traces: fakes, ``torch.compile``, ``torch.export``, functionalisation, autograd."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases import (
    Case,
    Outcome,
    assert_same_bits,
    call,
    copy_with_storage,
    has_gradient,
    has_out,
    has_tokens,
    is_8bit_float,
    is_batched,
    is_first,
    is_first_of_op,
    kept_arguments,
    map_tensors,
    outcome,
    over,
    poisoned,
    tensors_of,
    tokens_of,
    with_tokens,
    writes,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from torch_jit_ops import Op, Sample
from torch_jit_ops.testing.opcheck import opcheck


def assert_same_outcome(actual: Outcome, expected: Outcome) -> None:
    assert actual.names == expected.names
    for (name, tensor), (_, plain) in zip(actual, expected, strict=True):
        assert_same_bits(tensor, plain, name)


def outs_for(op: Op, sample: Sample) -> dict[str, Tensor]:
    results = call(op, sample).tensors
    return {
        name: poisoned(result.shape, result.dtype, result.device.type)
        for name, result in zip(op.declaration.outputs, results, strict=True)
    }


def widest_dtype_or_first(case: Case) -> bool:
    """Every sample in one dtype, and one sample in every dtype: tracing looks at shapes."""
    return is_first(case) or case.is_last


# --- opcheck: schema, autograd registration, fake, aot_dispatch --------------------------------------


@over(widest_dtype_or_first)
def test_opcheck(case: Case) -> None:
    sample = case.sample()
    opcheck(case.op.default, sample, call(case.op, copy_with_storage(sample)).tensors)


@over(has_out, widest_dtype_or_first)
def test_opcheck_of_the_out_form(case: Case) -> None:
    sample = case.sample()
    opcheck(case.op.out, Sample(sample.args, {**sample.kwargs, **outs_for(case.op, sample)}))


@over(has_gradient, is_first)
def test_opcheck_with_gradients(case: Case) -> None:
    sample = map_tensors(case.sample(), lambda tensor: tensor.requires_grad_(tensor.is_floating_point()))
    opcheck(case.op.default, sample, call(case.op, copy_with_storage(sample)).tensors)


@over(is_first, has_tokens)
@pytest.mark.parametrize("tokens", [0, 1])
def test_opcheck_of_few_tokens(case: Case, tokens: int) -> None:
    sample = with_tokens(case.sample(), tokens)
    opcheck(case.op.default, sample, call(case.op, copy_with_storage(sample)).tensors)


# --- fakes -----------------------------------------------------------------------------------------


def facts(result: Outcome) -> list[Any]:
    return [(tuple(t.shape), t.stride() if t.numel() > 0 else None, t.dtype) for t in result.tensors]


def row_strided(tensor: Tensor) -> Tensor:
    if tensor.dim() < 2 or tensor.numel() == 0:
        return tensor
    wide = tensor.new_empty([*tensor.shape[:-1], tensor.shape[-1] + 64])
    return wide[..., : tensor.shape[-1]].copy_(tensor)


@over()
def test_fake_results_are_like_real_ones(case: Case) -> None:
    for change in (lambda tensor: tensor, row_strided):
        sample = map_tensors(case.sample(), change)
        try:
            real = call(case.op, copy_with_storage(sample))
        except RuntimeError:
            continue  # a layout that the kernel refuses: test_hostile.py reads its error
        with FakeTensorMode() as mode:
            fake = call(case.op, map_tensors(sample, mode.from_tensor))
        assert facts(fake) == facts(real)
        assert [tensor.device for tensor in fake.tensors] == [tensor.device for tensor in real.tensors]
        meta = call(case.op, map_tensors(sample, lambda tensor: tensor.to("meta")))
        assert all(tensor.device.type == "meta" for tensor in meta.tensors)
        results = case.op.signature.results  # .to("meta") does not keep the strides of the arguments
        assert facts(meta)[:results] == facts(real)[:results]


@over(is_first_of_op, has_tokens)
def test_fake_keeps_symbols(case: Case) -> None:
    from torch.fx.experimental.symbolic_shapes import DimDynamic as How
    from torch.fx.experimental.symbolic_shapes import ShapeEnv, StatelessSymbolicContext

    sample = case.sample()
    tokens = tokens_of(sample)
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)

    def symbolic(tensor: Tensor) -> Tensor:
        sizes = [How.DUCK if i == 0 and is_batched(tensor, tokens) else How.STATIC for i in range(tensor.dim())]
        return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

    with mode:
        fake = call(case.op, map_tensors(sample, symbolic))
    batches = [tokens in tensor.shape for tensor in call(case.op, case.sample()).tensors]
    assert any(batches) or writes(case.op)  # a cache has slots
    for tensor, batched in zip(fake.tensors, batches, strict=True):
        assert any(isinstance(size, torch.SymInt) for size in tensor.shape) == batched
    assert [str(guard.expr) for guard in environment.guards] == [], "the fake looks at a size that may change"


# --- torch.compile ---------------------------------------------------------------------------------


def compiled_call(op: Op, backend: str, dynamic: bool | None) -> Callable[[Sample], Outcome]:
    def run(args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return op.default(*args, **kwargs)

    function = torch.compile(run, fullgraph=True, dynamic=dynamic, backend=backend)
    return lambda sample: outcome(op, sample, function(sample.args, dict(sample.kwargs)))


@over(widest_dtype_or_first)
def test_compiled_makes_the_same_bits(case: Case) -> None:
    run = compiled_call(case.op, "aot_eager", dynamic=True)
    assert_same_outcome(run(copy_with_storage(case.sample())), call(case.op, copy_with_storage(case.sample())))


def _mark_tokens(sample: Sample) -> Sample:
    tokens = tokens_of(sample)
    for tensor in tensors_of(sample):
        if is_batched(tensor, tokens):
            torch._dynamo.mark_dynamic(tensor, 0)
    return sample


@over(is_first, has_tokens)
@pytest.mark.parametrize("marked", [False, True], ids=["dynamic", "marked"])
def test_another_number_of_tokens_does_not_recompile(case: Case, marked: bool) -> None:
    run = compiled_call(case.op, "inductor" if is_first_of_op(case) else "aot_eager", None if marked else True)
    given = case.sample()
    first = _mark_tokens(copy_with_storage(given)) if marked else copy_with_storage(given)
    assert_same_outcome(run(first), call(case.op, copy_with_storage(given)))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (2, 5, 64):
            sample = with_tokens(case.sample(), tokens)
            assert_same_outcome(run(copy_with_storage(sample)), call(case.op, copy_with_storage(sample)))


@over(is_first_of_op, has_tokens)
def test_between_fused_operations(case: Case) -> None:
    """Inductor chooses the layout of what it gives to an op, and may reuse its memory."""

    kept = kept_arguments(case.op)

    def before(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if is_8bit_float(value.dtype):
            return value.clone()
        return value + 0 if name in kept else value + value

    def run(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
        args = [before(argument.name, value) for argument, value in zip(case.op.signature.arguments, args, strict=False)]
        results = case.op.default(*args, **kwargs)
        results = results if isinstance(results, (tuple, list)) else [] if results is None else [results]
        written = [value for value, argument in zip(args, case.op.signature.arguments, strict=False) if argument.written]
        return [(t.float() if is_8bit_float(t.dtype) else t).transpose(0, -1) * 2 for t in (*results, *written)]

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for tokens in (5, 9):
        sample = with_tokens(case.sample(), tokens)
        actual = compiled(sample.args, dict(sample.kwargs))
        for tensor, plain in zip(actual, run(sample.args, dict(sample.kwargs)), strict=True):
            assert_same_bits(tensor, plain, "result")


@over(is_first_of_op, has_out)
def test_out_form_in_a_graph(case: Case) -> None:
    def run(args: Sequence[Any], kwargs: dict[str, Any], outs: dict[str, Tensor]) -> list[Tensor]:
        case.op.out(*args, **kwargs, **outs)
        return [out.clone() for out in outs.values()]

    sample = case.sample()
    outs = outs_for(case.op, sample)
    made = torch.compile(run, fullgraph=True)(sample.args, dict(sample.kwargs), outs)
    for (name, expected), out, copy in zip(call(case.op, sample), outs.values(), made, strict=True):
        assert_same_bits(out, expected, name)
        assert_same_bits(copy, expected, name)


@over(is_first_of_op, has_gradient)
def test_gradient_in_a_graph(case: Case) -> None:
    def run(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        return sum((tensor * tensor).sum() for tensor in call(case.op, Sample(tuple(args), kwargs)).tensors)

    def wanting(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_(tensor.is_floating_point())

    given = [map_tensors(case.sample(), wanting) for _ in range(2)]
    torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)(given[0].args, dict(given[0].kwargs)).backward()
    run(given[1].args, dict(given[1].kwargs)).backward()
    for actual, expected in zip(*map(tensors_of, given), strict=True):
        if actual.requires_grad:
            assert_same_bits(actual.grad, expected.grad, "gradient")


@over(is_first_of_op)
def test_called_through_its_packet_and_its_declaration(case: Case) -> None:
    """``torch.ops.jitk.op(x)`` and the decorated function are the op too, also in a graph."""
    packet = getattr(getattr(torch.ops, case.op.declaration.namespace), case.op.name)
    expected = call(case.op, copy_with_storage(case.sample()))
    assert_same_outcome(call(case.op, copy_with_storage(case.sample()), packet), expected)
    assert_same_outcome(call(case.op, copy_with_storage(case.sample()), case.op), expected)
    compiled = torch.compile(packet, fullgraph=True, backend="aot_eager")
    assert_same_outcome(call(case.op, copy_with_storage(case.sample()), compiled), expected)


# --- torch.export ----------------------------------------------------------------------------------


class _Module(torch.nn.Module):
    def __init__(self, op: Op, kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.op = op.default
        self.kwargs = kwargs

    def forward(self, *args: Any) -> Any:
        args = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
        results = self.op(*args, **self.kwargs)
        return [arg for arg in args if isinstance(arg, Tensor)] if results is None else results


@over(is_first_of_op, has_tokens)
def test_exported_program_survives_a_file(case: Case) -> None:
    sample = case.sample()
    tokens = tokens_of(sample)
    size = torch.export.Dim("tokens")
    shapes = tuple(
        {0: size} if isinstance(arg, Tensor) and is_batched(arg, tokens) else {} if isinstance(arg, Tensor) else None
        for arg in sample.args
    )
    module = _Module(case.op, dict(sample.kwargs))
    program = torch.export.export(module, sample.args, dynamic_shapes=(shapes,))
    names = {str(node.target) for node in program.graph.nodes}
    assert f"{case.op.declaration.namespace}.{case.op.name}.default" in names, names

    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for count in (tokens or 0, 4):
        again = with_tokens(sample, count)
        expected, actual = module(*again.args), loaded(*again.args)
        for tensor, plain in zip(*(r if isinstance(r, (list, tuple)) else [r] for r in (actual, expected)), strict=True):
            assert_same_bits(tensor, plain, "result")
