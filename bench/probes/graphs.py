"""Ops in graphs: ``torch.compile``, CUDA graphs, ``torch.export``, AOTInductor and programs without Python."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from bench.environment import REPOSITORY
from bench.probes import NotHere, needs_gpu, probe, require
from torch_jit_ops import OpLibrary

COMPILE = "`torch.compile`"
AHEAD = "Export and C++"


def _model(x: Tensor, weight: Tensor) -> Tensor:
    """An op between operations that Inductor fuses, one that it has the memory of, and one that works in place."""
    hidden = torch.ops.jitk.rmsnorm(x + 1, weight)
    residual = x * 2
    torch.ops.jitk.fused_add_rmsnorm(hidden, residual, weight)
    return torch.ops.jitk.silu_and_mul(hidden + residual) - 1


def _given(tokens: int) -> tuple[Tensor, Tensor]:
    return torch.randn(tokens, 96), torch.rand(96)


def _code_of(function: Callable[..., Any], *args: Any) -> tuple[Any, str]:
    """What a compiled function returns, and what Inductor generated for it."""
    from torch._inductor.utils import run_and_get_code

    with torch.no_grad():
        result, codes = run_and_get_code(function, *args)
    return result, "\n".join(codes)


@probe(COMPILE, "`fullgraph=True`")
def whole_graph() -> None:
    x, weight = _given(5)
    assert_close(torch.compile(_model, fullgraph=True)(x, weight), _model(x, weight))


@probe(COMPILE, "other numbers of tokens without a recompile: `dynamic=True`, `mark_dynamic`, and after a second size")
def dynamic_sizes() -> None:
    for way in ("dynamic", "marked", "automatic"):
        torch._dynamo.reset()
        compiled = torch.compile(_model, fullgraph=True, dynamic=True if way == "dynamic" else None)
        first = _given(23)
        if way == "marked":
            torch._dynamo.mark_dynamic(first[0], 0)
        compiled(*first)
        if way == "automatic":
            compiled(*_given(6))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for tokens in (2, 5, 64):
                x, weight = _given(tokens)
                assert_close(compiled(x, weight), _model(x, weight))


@probe(COMPILE, "sizes that only the data know (`nonzero`, `item`)")
def unbacked_sizes() -> None:
    def chosen(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        return _model(x.index_select(0, mask.nonzero()[:, 0]), weight)

    def first(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        count = int(mask.sum().item())
        torch._check(count >= 0)
        torch._check(count <= x.shape[0])
        return _model(x.narrow(0, 0, count).clone(), weight)

    x, weight = _given(23)
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        for function in (chosen, first):
            torch._dynamo.reset()
            compiled = torch.compile(function, fullgraph=True)
            for count in (3, 23, 1, 0, 2):
                mask = torch.arange(23) < count
                with torch._dynamo.config.patch(error_on_recompile=count != 3):
                    assert_close(compiled(x, weight, mask), function(x, weight, mask))


@probe(COMPILE, "training: the gradient in the graph")
def compiled_gradient() -> None:
    def run(x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.jitk.silu_and_mul(torch.ops.jitk.rmsnorm(x + 1, weight)).sin().sum()

    grads = []
    for function in (torch.compile(run, fullgraph=True, dynamic=True), run):
        torch.manual_seed(0)
        given = [tensor.requires_grad_() for tensor in _given(5)]
        function(*given).backward()
        grads.append([tensor.grad for tensor in given])
    assert_close(*grads)


@probe(COMPILE, "results in memory that Inductor plans (it calls `.out`)", since="2.13")
def planned_outputs() -> None:
    op = torch.ops.jitk.silu_and_mul

    def run(x: Tensor) -> Tensor:
        return op(x + x) * 2

    for dynamic in (False, True):
        torch._dynamo.reset()
        x = torch.randn(5, 96)
        made, code = _code_of(torch.compile(run, fullgraph=True, dynamic=dynamic), x)
        assert_close(made, run(x))
        require("jitk.silu_and_mul.out(" in code, "generated code calls the functional form")


_TWICE = """
#include <jitk/result.h>
#include <jitk/tensor.h>

void twice(jitk::TensorView x, jitk::Output& out) {
  float* to = static_cast<float*>(out.empty_like(x).data_ptr());
  for (int64_t i = 0; i < x.numel(); ++i) to[i] = 2 * static_cast<const float*>(x.data_ptr())[i];
}
"""


@probe(COMPILE, "kernels are built in the background meanwhile")
def background_builds() -> None:
    from torch_jit_ops.builder.unit import Unit
    from torch_jit_ops.calling import boot

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "twice.cpp").write_text(_TWICE)
        library = OpLibrary("ahead", csrc=folder)

        @library.op(cpu="twice.cpp", variant="twice", dtypes=(torch.float32,))
        def twice(x: Tensor) -> Tensor:
            return 2 * x

        loaded = threading.Event()
        load = boot.load

        def noted(unit: Unit, *args: Any) -> Any:
            result = load(unit, *args)
            if unit.name == "ahead.twice" and threading.current_thread() is not threading.main_thread():
                loaded.set()
            return result

        def backend(module: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
            require(loaded.wait(60), "nothing was built while the graph was compiled")
            return module.forward

        boot.load = noted
        x = torch.arange(3.0)
        assert_close(torch.compile(lambda x: torch.ops.ahead.twice(x), fullgraph=True, backend=backend)(x), 2 * x)


class _Plain(torch.nn.Module):
    """A model that has not heard of the ops."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(96))
        self.up = torch.nn.Linear(96, 128)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(F.rms_norm(x, (96,), self.weight, 1e-6)).chunk(2, -1)
        return F.silu(gate) * up


@probe(COMPILE, "`inductor.fuse` on a plain model")
def fuse() -> None:
    from torch_jit_ops.inductor import fuse

    model, x, rewrite = _Plain(), torch.randn(5, 96), fuse()
    made, code = _code_of(torch.compile(model, fullgraph=True, options=rewrite.options()), x)
    assert_close(made, model(x).detach())
    counts = rewrite.report().counts()
    require(counts == {"jitk::rmsnorm": 1, "jitk::silu_and_mul": 1}, f"it put {counts}")
    require("jitk.rmsnorm" in code and "jitk.silu_and_mul" in code, "generated code does not call the ops")


@probe(COMPILE, "`inductor.decompose`")
def decompose() -> None:
    from torch_jit_ops.inductor import decompose

    x, options = torch.randn(5, 96), decompose("silu_and_mul").options()
    made, code = _code_of(torch.compile(lambda x: torch.ops.jitk.silu_and_mul(x + 1) * 2, fullgraph=True, options=options), x)
    assert_close(made, torch.ops.jitk.silu_and_mul(x + 1) * 2)
    require("jitk" not in code.split("def call")[-1], "generated code still calls the op")


@probe("CUDA graphs", '`torch.compile(mode="reduce-overhead")`')
def reduce_overhead() -> None:
    needs_gpu()
    compiled = torch.compile(_model, fullgraph=True, mode="reduce-overhead")
    with torch.inference_mode():
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            x, weight = (tensor.cuda() for tensor in _given(5))
            assert_close(compiled(x, weight).clone(), _model(x, weight))
    skips = torch._dynamo.utils.counters["inductor"].get("cudagraph_skips", 0)
    require(skips == 0, f"{skips} graphs were not captured")


@probe("CUDA graphs", "manual capture")
def manual_capture() -> None:
    needs_gpu()
    x, weight = (tensor.cuda() for tensor in _given(5))
    _model(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = _model(x, weight)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert_close(y, _model(x, weight))


class _Module(torch.nn.Module):
    forward = staticmethod(_model)


def _exported() -> torch.export.ExportedProgram:
    return torch.export.export(_Module(), _given(23), dynamic_shapes=({0: torch.export.Dim("tokens", max=1024)}, None))


def _check(run: Callable[..., Any]) -> None:
    for tokens in (2, 23, 64):
        x, weight = _given(tokens)
        assert_close(run(x, weight), _model(x, weight))


@probe(AHEAD, "`torch.export`: save, load, run")
def export() -> None:
    file = io.BytesIO()
    torch.export.save(_exported(), file)
    file.seek(0)
    loaded = torch.export.load(file)
    names = {str(node.target) for node in loaded.graph.nodes}
    require("jitk.silu_and_mul.default" in names, f"the program calls {sorted(names)}")
    _check(loaded.module())


@probe(AHEAD, "AOTInductor package, run from Python")
def package_in_python() -> None:
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(_exported(), package_path=str(Path(folder, "model.pt2")))
        _check(torch._inductor.aoti_load_package(path))


@probe(AHEAD, "AOTInductor package and `deploy`, run from C++ without Python")
def package_in_cpp() -> None:
    if shutil.which("c++") is None:
        raise NotHere("no C++ compiler here")
    sys.path.insert(0, str(REPOSITORY / "test"))
    try:
        from test_deployment import compile_program
    except ModuleNotFoundError as missing:
        if missing.name not in ("pytest", "expecttest"):
            raise
        raise NotHere(f"{missing.name} is not installed") from missing
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export = [sys.executable, str(REPOSITORY / "examples/aot_cpp/export.py"), name]
        expected = _said(export, folder, dict(os.environ))
        command = [str(compile_program(folder)), "model.pt2", "kernels/libjitk_ops.so"]
        said = _said(command, folder, {"PATH": os.environ["PATH"], "HOME": name})
        linked = _said(["ldd", command[0]], folder, dict(os.environ))
    require(said.partition(":")[2] == expected.partition(":")[2], f"it printed {said!r}, Python {expected!r}")
    require("libpython" not in linked, "the program is linked with Python")


def _said(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    lines = done.stderr.strip().splitlines()
    require(done.returncode == 0, f"{Path(command[0]).name}: {lines[-1] if lines else done.returncode}")
    return done.stdout
