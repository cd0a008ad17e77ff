"""What only a GPU can get wrong: streams, graphs, devices, launches that overlap, tensors beyond 2^31 elements."""

from __future__ import annotations

import pytest
import torch
from cases import (
    Case,
    Outcome,
    assert_same_bits,
    call,
    copy_with_storage,
    devices,
    has_out,
    has_tokens,
    is_batched,
    is_first,
    is_first_of_op,
    leaves_of,
    map_tensors,
    over,
    poisoned,
    samples_of,
    tensors_of,
    with_tokens,
    writes,
)
from torch import Tensor

from torch_jit_ops import Op, Sample

pytestmark = pytest.mark.skipif("cuda" not in devices(), reason="no GPU")
_CYCLES = 50_000_000  # of a GPU's clock: some 30 ms, in which a launch on a wrong stream runs ahead


def on_cuda(case: Case) -> bool:
    return case.device == "cuda"


def assert_same_outcome(actual: Outcome, expected: Outcome) -> None:
    for (name, tensor), (_, plain) in zip(actual, expected, strict=True):
        assert_same_bits(tensor, plain, name)


def copy_into(target: Sample, source: Sample) -> None:
    for to, tensor in zip(leaves_of(target), leaves_of(source), strict=True):
        to.copy_(tensor)


def zeroed(sample: Sample) -> Sample:
    return map_tensors(sample, lambda tensor: torch.zeros_like(tensor))


def out_form(op: Op, sample: Sample, outs: tuple[Tensor, ...]) -> None:
    op.out(*sample.args, **sample.kwargs, **dict(zip(op.declaration.outputs, outs, strict=True)))


# --- streams ---------------------------------------------------------------------------------------


@over(on_cuda)
def test_runs_on_the_current_stream(case: Case) -> None:
    """The arguments come to be on that stream only, after a while."""
    expected = call(case.op, copy_with_storage(case.sample()))
    source, passed = case.sample(), zeroed(case.sample())
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(_CYCLES)
        copy_into(passed, source)
        actual = call(case.op, passed)
    stream.synchronize()
    assert_same_outcome(actual, expected)


@over(on_cuda, has_out, is_first)
def test_the_out_form_runs_on_the_current_stream(case: Case) -> None:
    expected = call(case.op, case.sample())
    source, passed = case.sample(), zeroed(case.sample())
    outs = tuple(poisoned(tensor.shape, tensor.dtype, "cuda") for tensor in expected.tensors)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(_CYCLES)
        copy_into(passed, source)
        out_form(case.op, passed, outs)
    stream.synchronize()
    for out, tensor in zip(outs, expected.tensors, strict=True):
        assert_same_bits(out, tensor, "out")


@over(on_cuda, is_first)
def test_does_not_wait_for_the_gpu(case: Case) -> None:
    sample = case.sample()
    call(case.op, copy_with_storage(sample))
    passed = copy_with_storage(sample)
    torch.cuda.synchronize()
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.cuda._sleep(_CYCLES)
    call(case.op, passed)
    assert not torch.cuda.current_stream().query(), "the call returned after the stream was idle"


@over(on_cuda, is_first)
def test_launches_that_follow_each_other(case: Case) -> None:
    """Kernels that start before their predecessor ends wait for what it writes, and for it to read what they overwrite."""
    samples = [samples_of(case.op, "cuda", case.dtypes, seed)[case.index] for seed in range(2)]
    expected = [call(case.op, copy_with_storage(sample)) for sample in samples]
    passed = zeroed(samples[0])
    kept: list[list[Tensor]] = []
    torch.cuda.synchronize()
    torch.cuda._sleep(_CYCLES)  # so that all launches below are queued back to back
    for turn in range(50):
        copy_into(passed, samples[turn % 2])
        kept.append([tensor.clone() for tensor in call(case.op, passed).tensors])
    for turn, tensors in enumerate(kept):
        for tensor, plain in zip(tensors, expected[turn % 2].tensors, strict=True):
            assert_same_bits(tensor, plain, f"turn {turn}")


def _makes_its_own_input(case: Case) -> bool:
    """The result can be the first argument of the next call."""
    if len(case.op.declaration.outputs) != 1 or not case.dtype.is_floating_point:
        return False
    sample = case.sample()
    first, result = tensors_of(sample)[0], call(case.op, sample, case.op.reference).tensors[0]
    return first.shape == result.shape and first.dtype == result.dtype and first.dim() > 0


@over(on_cuda, _makes_its_own_input)
def test_a_chain_of_launches(case: Case) -> None:
    """Nothing but kernels of ours, each of which reads what the one before it writes and overwrites what that one reads."""
    op, sample = case.op, case.sample()
    start = tensors_of(sample)[0]

    def chain(wait: bool) -> Tensor:
        now, other = start.clone(), torch.empty_like(start)
        for _ in range(40):
            op.out(now, *sample.args[1:], **sample.kwargs, **{op.declaration.outputs[0]: other})
            now, other = other, now
            if wait:
                torch.cuda.synchronize()
        return now

    expected = chain(wait=True)
    for _ in range(5):
        torch.cuda._sleep(_CYCLES // 10)
        assert_same_bits(chain(wait=False), expected, "the end of the chain")


# --- graphs ----------------------------------------------------------------------------------------


@over(on_cuda)
def test_captured_in_a_graph_and_replayed_on_new_values(case: Case) -> None:
    passed = copy_with_storage(case.sample())
    call(case.op, passed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(case.op, passed)
    for seed in (1, 2):
        fresh = samples_of(case.op, "cuda", case.dtypes, seed)[case.index]
        copy_into(passed, fresh)
        graph.replay()
        assert_same_outcome(captured, call(case.op, copy_with_storage(fresh)))


@over(on_cuda, has_out, is_first)
def test_out_form_captured_in_a_graph(case: Case) -> None:
    passed = copy_with_storage(case.sample())
    expected = call(case.op, passed)
    outs = tuple(torch.empty_like(tensor) for tensor in expected.tensors)
    out_form(case.op, passed, outs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_form(case.op, passed, outs)
    fresh = samples_of(case.op, "cuda", case.dtypes, 1)[case.index]
    copy_into(passed, fresh)
    for out in outs:
        out.view(torch.uint8).fill_(0xFF)
    graph.replay()
    for out, tensor in zip(outs, call(case.op, fresh).tensors, strict=True):
        assert_same_bits(out, tensor, "out")


@over(on_cuda, is_first_of_op, has_tokens)
def test_compiled_with_cuda_graphs(case: Case) -> None:
    if writes(case.op):
        pytest.skip("Inductor does not capture a graph that writes its inputs")
    compiled = torch.compile(lambda *args: case.op.default(*args), fullgraph=True, mode="reduce-overhead")
    for seed in range(4):  # eager, recorded, replayed, replayed
        sample = samples_of(case.op, "cuda", case.dtypes, seed)[case.index]
        torch.compiler.cudagraph_mark_step_begin()
        assert_same_outcome(call(case.op, sample, compiled), call(case.op, sample))


# --- devices ---------------------------------------------------------------------------------------


@over(on_cuda, is_first)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_runs_on_the_device_of_its_tensors(case: Case) -> None:
    here, there = (samples_of(case.op, f"cuda:{index}", case.dtypes)[case.index] for index in range(2))
    with torch.cuda.device(0):
        expected = call(case.op, here)
        actual = call(case.op, there)
        assert torch.cuda.current_device() == 0
    for (name, tensor), (_, plain) in zip(actual, expected, strict=True):
        assert tensor.device == torch.device("cuda:1")
        assert_same_bits(tensor.to("cuda:0"), plain, name)


@over(on_cuda, is_first_of_op)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_tensors_on_two_gpus_are_refused(case: Case) -> None:
    sample = case.sample()
    if len(tensors_of(sample)) < 2:
        pytest.skip("takes one tensor")
    moved = Sample((sample.args[0], *(arg.to("cuda:1") if isinstance(arg, Tensor) else arg for arg in sample.args[1:])))
    with pytest.raises(RuntimeError, match="device"):
        call(case.op, moved)


# --- size ------------------------------------------------------------------------------------------


def _is_smallest_with_tokens(case: Case) -> bool:
    """One case for each op, in its smallest dtype: the largest tensors that fit."""
    smallest = min(case.op.declaration.dtypes.combinations(), key=lambda dtypes: dtypes.first.itemsize)
    with_rows = [i for i, sample in enumerate(samples_of(case.op, "cpu", smallest)) if tensors_of(sample)[0].dim() > 1]
    return case.dtypes == smallest and with_rows[:1] == [case.index]


@pytest.mark.serial  # the memory
@over(on_cuda, _is_smallest_with_tokens)
def test_more_than_2_to_the_31_elements(case: Case) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = False
    period = 7  # no power of two is a multiple of it, so an index that wraps around meets other values
    few = with_tokens(case.sample(), period)
    expected = call(case.op, copy_with_storage(few))
    if not any(is_batched(tensor, period) for tensor in expected.tensors):
        pytest.skip("what it leaves behind has no rows, such as a cache")
    row = max(tensor[0].numel() for tensor in tensors_of(few) if is_batched(tensor, period))
    turns = 2**31 // (row * period) + 2
    needed = turns * sum(t.numel() * t.element_size() for t in (*tensors_of(few), *expected.tensors) if is_batched(t, period))
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if needed > 0.9 * free:
        pytest.skip(f"needs {needed >> 30} GiB of GPU memory, there are {free >> 30}")

    def many(tensor: Tensor) -> Tensor:
        if not is_batched(tensor, period):
            return tensor
        return tensor.expand(turns, *tensor.shape).reshape(turns * period, *tensor.shape[1:])

    sample = map_tensors(few, many)
    assert max(tensor.numel() for tensor in tensors_of(sample)) > 2**31
    actual = call(case.op, sample)
    for (name, tensor), (_, plain) in zip(actual, expected, strict=True):
        if not is_batched(plain, period):  # a sum over tokens: another number of them is another sum
            continue
        for begin, part in enumerate(tensor.view(turns, *plain.shape).split(2**27 // plain.numel() + 1)):
            same = (
                (part == plain).all()
                if not plain.is_floating_point()
                else (part.view(torch.uint8) == plain.view(torch.uint8)).all()
            )
            assert same, f"{name}: part {begin} differs"
