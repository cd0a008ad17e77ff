"""Calls in eager mode, and ops that a user declares."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.testing import assert_close

import torch_jit_ops
from bench.environment import REPOSITORY
from bench.probes import needs_gpu, probe, require
from torch_jit_ops import load_jit, make_cpp_args
from torch_jit_ops.testing import check

norms = torch_jit_ops.ops.norm


def _kernel_on(device: str) -> None:
    x, weight = torch.randn(5, 96).to(device, torch.bfloat16), torch.rand(96).to(device, torch.bfloat16)
    truth = norms.rmsnorm.reference(x.double(), weight.double())
    assert_close(torch.ops.jitk.rmsnorm(x, weight), truth.bfloat16())
    loaded = torch_jit_ops.stats().ops["jitk::rmsnorm"]
    require(loaded.hits + loaded.builds == 1, f"no kernel was loaded: {loaded}")


@probe("Calls", "C++ kernel, compiled on the first call")
def cpu_kernel() -> None:
    _kernel_on("cpu")


@probe("Calls", "CUDA kernel, compiled on the first call")
def cuda_kernel() -> None:
    needs_gpu()
    _kernel_on("cuda")


@probe("Calls", "`.out` form")
def out_form() -> None:
    x, out = torch.randn(5, 96), torch.full((5, 48), torch.nan)
    torch.ops.jitk.silu_and_mul.out(x, out=out)
    assert_close(out, torch_jit_ops.ops.activation.silu_and_mul.reference(x))


@probe("Calls", "op that works in place")
def in_place() -> None:
    x, residual, weight = torch.randn(5, 96), torch.randn(5, 96), torch.rand(96)
    total = x + residual
    expected = norms.rmsnorm.reference(total, weight)
    torch.ops.jitk.fused_add_rmsnorm(x, residual, weight)
    assert_close(residual, total)
    assert_close(x, expected)


@probe("Calls", "no Python in a call without a gradient")
def no_python() -> None:
    from torch_jit_ops.builder.load import load
    from torch_jit_ops.calling import dispatcher

    load(dispatcher.autograd_unit())  # a thread does it else, at its leisure
    op, x = torch.ops.jitk.relu2.default, torch.randn(8)
    op(x), op(x)
    package = str(Path(torch_jit_ops.__file__).parent)
    called: list[str] = []
    sys.setprofile(lambda frame, event, _: called.append(frame.f_code.co_filename) if event == "call" else None)
    try:
        y = op(x)
    finally:
        sys.setprofile(None)
    assert_close(y, torch.relu(x).square())
    require(not any(name.startswith(package) for name in called), f"the call ran {called}")


@probe("Calls", "a user's op: everything that `testing.check` holds it to, `opcheck` among it")
def users_op() -> None:
    sys.path.insert(0, str(REPOSITORY / "examples/mylib"))
    import mylib

    check(mylib.library.ops["scale_shift"], dtypes=[torch.float32])


_ADD_ONE = """
#include <jitk/tensor.h>

template <typename T>
void add_one(jitk::TensorView dst, jitk::TensorView src) {
  using namespace jitk::host;
  SymbolicSize n{"n"};
  TensorMatcher({n}).with_dtype<T>().verify(dst).verify(src);
  for (int64_t i : irange(n.unwrap())) static_cast<T*>(dst.data_ptr())[i] = static_cast<const T*>(src.data_ptr())[i] + 1;
}
"""


@probe("Calls", "`load_jit`")
def functions_without_an_op() -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "add_one.cpp")
        source.write_text(_ADD_ONE)
        args = make_cpp_args(torch.float32)
        module = load_jit("add_one", *args, cpp_files=[str(source)], cpp_wrappers=[("add_one", f"add_one<{args}>")])
        src, dst = torch.arange(5.0), torch.zeros(5)
        module.add_one(dst, src)
    assert_close(dst, src + 1)


@probe("Tools", "`FakeTensorMode`, also with symbolic sizes")
def fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    symbols = ShapeEnv()
    with FakeTensorMode(shape_env=symbols) as fakes:
        x = fakes.from_tensor(torch.empty(5, 96).bfloat16(), static_shapes=False)
        y = torch.ops.jitk.silu_and_mul(x)
    require(isinstance(y, FakeTensor) and y.dtype == torch.bfloat16, f"the result is {y}")
    require(y.shape[0] is x.shape[0] or y.shape[0] == x.shape[0], "the number of tokens is another symbol")
    require(not torch_jit_ops.stats().ops, "a kernel was loaded")


@probe("Tools", "names and shapes in `torch.profiler`")
def profiler() -> None:
    x, weight, out = torch.randn(5, 96), torch.rand(96), torch.empty(5, 48)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        torch.ops.jitk.rmsnorm(x, weight)
        torch.ops.jitk.silu_and_mul.out(x, out=out)
    shapes = {event.name: event.input_shapes for event in profile.events() if event.name.startswith("jitk::")}
    for name, expected in (("jitk::rmsnorm", [[5, 96], [96]]), ("jitk::silu_and_mul", [[5, 96]])):
        shown = shapes.get(name, [])
        require(shown[: len(expected)] == expected, f"{name} is shown with {shown}, not {expected}")


@probe("Tools", "`DistributedDataParallel` and `fully_shard` (FSDP) on gloo")
def data_parallel() -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(REPOSITORY / "test/parallel_child.py")]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen(
                [*command, str(rank), str(Path(folder, "rendezvous"))],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        said = [process.communicate()[1] for process in processes]
    for process, text in zip(processes, said, strict=True):
        require(process.returncode == 0, text.strip().splitlines()[-1] if text.strip() else f"{process.returncode}")
