"""Kernels and CUDA graphs: what is loaded before a capture, and what a capture refuses. Most need a process of their own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from cases import OPS, devices
from child import ROOT, run_python
from expecttest import assert_expected_inline

from torch_jit_ops import library
from torch_jit_ops.backends import CPU, CUDA, MissingCompiler
from torch_jit_ops.builder.load import load

needs_gpu = pytest.mark.skipif("cuda" not in devices(), reason="no GPU")
ON_CUDA = [op for op in OPS if "cuda" in op.declaration.kernels and op.declaration.samples is not None]

_START = """
import os
os.environ["CUDA_MODULE_LOADING"] = "LAZY"  # the default from CUDA 12.2 on
import torch
import trial_library, user_library
import torch_jit_ops
from cases import OPS, assert_same_bits, call, copy_with_storage, is_batched, last_dtypes, map_tensors, samples_of
from torch_jit_ops import Sample

def first(op):
    return samples_of(op, "cuda", last_dtypes(op))[0]

ops = [op for op in OPS if "cuda" in op.declaration.kernels and op.declaration.samples is not None]

def capture(op, sample):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(op, sample)
    return graph, captured

def check(op, graph, captured, sample, expected_of):
    expected = call(op, copy_with_storage(expected_of))
    graph.replay()
    for (name, tensor), (_, plain) in zip(captured, expected, strict=True):
        assert_same_bits(tensor, plain, f"{op.qualified_name}: {name}")
    print(op.qualified_name)
"""


def run(code: str, **environment: str | os.PathLike[str]) -> list[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "test")])
    return run_python(_START + code, PYTHONPATH=path, **environment).splitlines()


def names() -> list[str]:
    return [op.qualified_name for op in ON_CUDA]


@pytest.mark.skipif(torch.version.cuda is None, reason="a CPU build of PyTorch cannot load a CUDA kernel")
@pytest.mark.parametrize("name", ["silu_and_mul", "relu2"])
def test_a_library_knows_its_kernels(name: str) -> None:
    """And so can load them: without a GPU it is only known how many there are."""
    try:
        CUDA.toolkit()
    except MissingCompiler as missing:
        pytest.skip(str(missing).splitlines()[0])
    arch = CUDA.arch_of(0) if torch.cuda.is_available() else "9.0a"
    loaded = load(library.ops[name].declaration.unit("cuda", (torch.bfloat16,), arch))
    assert loaded.load_kernels(0) > 1


def test_a_library_for_the_cpu_has_no_kernels() -> None:
    loaded = load(library.ops["relu2"].declaration.unit("cpu", (torch.float32,), CPU.arch_of()))
    assert loaded.load_kernels(0) == 0


@needs_gpu
@pytest.mark.parametrize("arch", ["", "before"], ids=["built with CUDA in use", "built before CUDA is in use"])
def test_what_was_built_is_captured_without_a_call(arch: str) -> None:
    """``build`` is the whole warm-up, as the error for a cold op promises."""
    arch = repr(CUDA.arch_of(0)) if arch else "None"
    code = f"""
for op in ops:
    torch_jit_ops.build(op, last_dtypes(op).distinct(), backend="cuda", arch={arch})
for op in ops:
    sample = first(op)
    before = copy_with_storage(sample)
    check(op, *capture(op, sample), sample, before)
"""
    assert run(code) == names()


@needs_gpu
def test_another_kernel_of_a_warm_variant_is_captured() -> None:
    """Which kernel of a variant runs depends on strides and sizes: the warm-up need not have met the one that is captured."""
    code = """
def strided(tensor):
    if tensor.dim() < 2 or not is_batched(tensor, rows):
        return tensor
    wide = tensor.new_empty([*tensor.shape[:-1], tensor.shape[-1] + 64])
    return wide[..., : tensor.shape[-1]].copy_(tensor)

for op in ops:
    samples = samples_of(op, "cuda", last_dtypes(op))
    call(op, copy_with_storage(samples[0]))
    for sample in samples:
        before = copy_with_storage(sample)
        graph, captured = capture(op, sample)
        graph.replay()
        for (name, tensor), (_, plain) in zip(captured, call(op, before), strict=True):
            assert_same_bits(tensor, plain, f"{op.qualified_name}: {sample.note}: {name}")
    rows = samples[0].args[0].shape[0]
    sample = map_tensors(samples[0], strided)
    before = copy_with_storage(sample)
    try:
        call(op, copy_with_storage(sample))
    except RuntimeError:
        print(op.qualified_name)  # a layout that the op refuses
        continue
    check(op, *capture(op, sample), sample, before)
"""
    # A variant may depend on more than the dtype; what the samples need is there before.
    build = 'torch_jit_ops.build(ops, backend="cuda")\n'
    assert run(build + code) == names()


@needs_gpu
def test_a_cold_op_is_refused_and_the_capture_can_be_repeated(tmp_path: Path) -> None:
    code = """
torch_jit_ops.build("silu_and_mul", [torch.bfloat16], backend="cuda")  # the dispatcher, and another variant
x = torch.randn(4, 64, device="cuda", dtype=torch.float16)
torch.relu(x)
try:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.ops.jitk.silu_and_mul(x)
except RuntimeError as error:
    print(error)
torch.cuda.synchronize()
op = torch_jit_ops.library.ops["silu_and_mul"]
expected = op.default(x)
graph, captured = capture(op, Sample((x,)))
graph.replay()
assert_same_bits(captured.tensors[0], expected, "result")
"""
    (tmp_path / "store").mkdir(mode=0o700)
    assert_expected_inline(
        "\n".join(run(code, JITK_CACHE_DIR=tmp_path / "store")),
        """\
jitk::silu_and_mul<fp16_t> is not loaded yet, and during the capture of a CUDA graph no kernel can be compiled or loaded
  remedy: before the capture, call the op once with such arguments, or torch_jit_ops.build(...) it""",
    )


@needs_gpu
@pytest.mark.parametrize("background", ["0", "1"])
def test_reduce_overhead_with_an_empty_store(background: str, tmp_path: Path) -> None:
    """Inductor runs a graph before it captures it, while other kernels may still be under way in the background."""
    code = """
x = torch.randn(8, 512, device="cuda", dtype=torch.bfloat16)

def model(x):
    y = torch.ops.jitk.silu_and_mul(x * 2)
    z = torch.ops.jitk.gelu_and_mul(x + 1)
    return torch.ops.jitk.fused_add_relu(y, z), torch.ops.jitk.relu2(y - z)

compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
with torch.inference_mode():
    for step in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        given = x * (step + 1)
        made = [tensor.clone() for tensor in compiled(given)]
        for index, (tensor, plain) in enumerate(zip(made, model(given), strict=True)):
            torch.testing.assert_close(tensor, plain)
skipped = dict(torch._dynamo.utils.counters["inductor"])
print(skipped.get("cudagraph_skips", 0), "graphs were not captured")
"""
    (tmp_path / "store").mkdir(mode=0o700)
    environment = {"JITK_CACHE_DIR": tmp_path / "store", "TORCHINDUCTOR_CACHE_DIR": tmp_path / "inductor"}
    assert run(code, JITK_BACKGROUND=background, **environment) == ["0 graphs were not captured"]


@needs_gpu
def test_a_build_in_the_background_does_not_spoil_a_capture(tmp_path: Path) -> None:
    """It loads kernels in another thread while this one captures, which CUDA forbids unless that thread says it knows."""
    code = """
import threading
op = torch_jit_ops.library.ops["silu_and_mul"]
x = torch.randn(4, 64, device="cuda", dtype=torch.bfloat16)
op.default(x)
arch = torch_jit_ops.backends.CUDA.arch_of(0)
loaded = [torch_jit_ops.builder.load.load(each.declaration.unit("cuda", (torch.float16,), arch))
          for each in torch_jit_ops.library.ops.values() if each.name != "add_constant" and "cuda" in each.declaration.kernels
          and [part.what for part in each.declaration.kernels["cuda"].pattern.placeholders] == ["dtype"]]
started, go = threading.Event(), threading.Event()

def load_all():
    started.set()
    go.wait()
    for each in loaded:
        print(each.load_kernels(0) > 0)

thread = threading.Thread(target=load_all)
thread.start()
started.wait()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y = op.default(x)
    go.set()
    thread.join()
    z = op.default(x)
graph.replay()
assert_same_bits(y, op.default(x), "first")
assert_same_bits(z, op.default(x), "second")
"""
    said = run(code)
    assert said and set(said) == {"True"}
