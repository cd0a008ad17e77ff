"""``inductor.fuse`` and ``inductor.decompose``: ops in models that know nothing of them, and out of models that do."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import spelled
import torch
import torch.nn.functional as F
from child import run_python
from spelled import Spelling
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import torch_jit_ops
from torch_jit_ops import OpLibrary, Sample, SampleMaker, registry
from torch_jit_ops.inductor import Rewrite, decompose, fuse, objections
from torch_jit_ops.ops.norm import rmsnorm

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def traced_by(rewrite: Rewrite) -> Callable[..., Any]:
    """A backend that runs what the rewrite made of the graph, in a tenth of Inductor's time."""

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        rewrite(module.graph)
        module.graph.lint()
        module.recompile()
        backend.graphs.append(module.graph)
        return module.forward

    backend.graphs = []
    return backend


def short(counts: dict[str, int]) -> dict[str, int]:
    return {name.removeprefix("jitk::"): count for name, count in counts.items()}


def calls(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op in ("call_function", "call_method")]


def assert_as_right(actual: Tensor, plain: Tensor, truth: Tensor) -> None:
    """The error against float64 is at most twice that of plain PyTorch."""
    assert actual.shape == plain.shape and actual.dtype == plain.dtype
    error, allowed = ((tensor.detach().double() - truth).abs().max().item() for tensor in (actual, plain))
    assert error <= 2 * allowed + 1e-6 * truth.abs().max().item()


def arguments_of(op: str, dtype: torch.dtype, shape: Sequence[int], weight_dtype: torch.dtype | None = None) -> list[Any]:
    def make(*size: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(size).to(of)

    width = shape[-1]
    if op.endswith("_and_mul"):
        return [make(*shape[:-1], 2 * width)]
    if op.endswith("_mul"):
        return [make(*shape), make(*shape)]
    weights = [make(width, of=weight_dtype or dtype) for _ in range(2 if op == "layernorm" else 1)]
    return [make(*shape), *weights, 1e-5]


def truth_of(op: str, arguments: Sequence[Any]) -> Tensor:
    reference = torch_jit_ops.library.ops[op].reference
    return reference(*(value.double() if isinstance(value, Tensor) else value for value in arguments))


# --- what is found ----------------------------------------------------------------------------------


COMPUTES = re.compile("silu|gelu|sigmoid|tanh|sqrt|mean|norm|pow|square")


def assert_becomes_the_op(spelling: Spelling, dtype: torch.dtype, shapes: Sequence[Sequence[int]], symbolic: bool) -> None:
    rewrite = fuse()
    backend = traced_by(rewrite)
    compiled = torch.compile(spelling.function, fullgraph=True, backend=backend)
    for shape in shapes:
        arguments = arguments_of(spelling.op, dtype, shape)
        for argument in arguments if symbolic else ():
            if isinstance(argument, Tensor):
                torch._dynamo.mark_dynamic(argument, list(range(argument.dim() - 1)))
        actual = compiled(*arguments)
        assert_as_right(actual, spelling.function(*arguments), truth_of(spelling.op, arguments))
    assert len(backend.graphs) == (1 if symbolic else len(shapes))
    for graph in backend.graphs:
        assert [name for name in calls(graph) if COMPUTES.search(name)] == [f"jitk.{spelling.op}.default"]
    assert short(rewrite.report().counts()) == {spelling.op: 1}
    assert rewrite.report().missed == ()


@pytest.mark.parametrize("spelling", [*spelled.GATED, *spelled.NORMS], ids=str)
def test_a_spelling_becomes_the_op(spelling: Spelling) -> None:
    """The number of tokens is symbolic."""
    assert_becomes_the_op(spelling, torch.bfloat16, [(2, 3, 32), (5, 7, 32)], symbolic=True)


ONE_OF_EACH_OP = list({spelling.op: spelling for spelling in [*spelled.GATED, *spelled.NORMS]}.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
@pytest.mark.parametrize("spelling", ONE_OF_EACH_OP, ids=str)
def test_every_dtype_with_sizes_first_fixed_and_then_symbolic(spelling: Spelling, dtype: torch.dtype) -> None:
    assert_becomes_the_op(spelling, dtype, [(6, 32), (9, 32)], symbolic=False)


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", ["square_root", "power", "gemma", "by_hand"])
def test_a_weight_of_fp32_stays_one(name: str, dtype: torch.dtype) -> None:
    spelling = next(spelling for spelling in spelled.NORMS if spelling.name == name)
    rewrite = fuse()
    arguments = arguments_of(spelling.op, dtype, (4, 32), torch.float32)
    actual = torch.compile(spelling.function, fullgraph=True, backend=traced_by(rewrite))(*arguments)
    assert short(rewrite.report().counts()) == {spelling.op: 1}
    assert_as_right(actual, spelling.function(*arguments), truth_of(spelling.op, arguments))


def test_a_result_of_another_dtype_is_left_alone() -> None:
    """Hugging Face's norm with a fp32 weight gives fp32, which the op does not."""
    rewrite = fuse()
    arguments = arguments_of("rmsnorm", torch.bfloat16, (4, 32), torch.float32)
    actual = torch.compile(spelled.hugging_face, fullgraph=True, backend=traced_by(rewrite))(*arguments)
    assert actual.dtype == torch.float32
    assert rewrite.report().done == ()
    torch.testing.assert_close(actual, spelled.hugging_face(*arguments))


def test_eps_and_what_pytorch_takes_for_it() -> None:
    graphs = {}
    for eps in (1e-6, 0.25, None):
        torch._dynamo.reset()
        backend = traced_by(fuse())
        torch.compile(lambda x, w, eps=eps: F.rms_norm(x, (8,), w, eps), fullgraph=True, backend=backend)(
            torch.randn(3, 8), torch.randn(8)
        )
        graphs[eps] = next(node for node in backend.graphs[0].nodes if "rmsnorm" in str(node.target)).args[2]
    assert graphs == {1e-6: 1e-6, 0.25: 0.25, None: torch.finfo(torch.float32).eps}


def test_bias_is_optional() -> None:
    for bias in (None, torch.randn(8)):
        rewrite = fuse()
        x, weight = torch.randn(3, 8), torch.randn(8)
        norm = lambda x, w, b: F.layer_norm(x, (8,), w, b)  # noqa: E731
        torch._dynamo.reset()
        actual = torch.compile(norm, fullgraph=True, backend=traced_by(rewrite))(x, weight, bias)
        assert short(rewrite.report().counts()) == {"layernorm": 1}
        torch.testing.assert_close(actual, norm(x, weight, bias))


def test_rows_of_a_wider_tensor_are_read_in_place() -> None:
    def norm_of_a_part(x: Tensor, weight: Tensor) -> Tensor:
        return spelled.hugging_face(x[:, 8:40], weight, 1e-6)

    rewrite = fuse()
    x, weight = torch.randn(5, 48), torch.randn(32)
    actual = torch.compile(norm_of_a_part, fullgraph=True, backend=traced_by(rewrite))(x, weight)
    assert short(rewrite.report().counts()) == {"rmsnorm": 1}
    torch.testing.assert_close(actual, norm_of_a_part(x, weight))


@pytest.mark.parametrize("symbolic", [False, True], ids=["fixed", "symbolic"])
def test_transposed_heads_are_taken_in_their_order_in_memory(symbolic: bool) -> None:
    """As in Gemma 3; the result has the layout that it had."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return spelled.gemma(x.unflatten(-1, (-1, 8)).transpose(1, 2), weight, 1e-6)

    rewrite = fuse()
    compiled = torch.compile(norm, fullgraph=True, backend=traced_by(rewrite))
    for tokens in (3, 5):
        x, weight = torch.randn(2, tokens, 32), torch.randn(8)
        if symbolic:
            torch._dynamo.mark_dynamic(x, [0, 1])
        actual, expected = compiled(x, weight), norm(x, weight)
        torch.testing.assert_close(actual, expected)
        assert actual.stride() == expected.stride()
    assert short(rewrite.report().counts()) == {"gemma_rmsnorm": 1}


def test_halves_the_other_way_around_are_two_tensors() -> None:
    def model(x: Tensor) -> Tensor:
        up, gate = x.chunk(2, -1)
        return F.silu(gate) * up

    rewrite = fuse()
    x = torch.randn(5, 48)
    actual = torch.compile(model, fullgraph=True, backend=traced_by(rewrite))(x)
    assert short(rewrite.report().counts()) == {"silu_mul": 1}
    torch.testing.assert_close(actual, model(x))


# --- what is left alone -----------------------------------------------------------------------------


def _written_meanwhile(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    gate = F.silu(gate)
    x.mul_(2)
    return gate * up


def _told_to_write(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    gate = F.silu(gate)
    F.relu(x, True)
    return gate * up


def _used_elsewhere(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return x * scale * weight, scale


def _grad_mode_changes(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    with torch.no_grad():
        gate = F.silu(gate)
    return gate * up


REFUSED: dict[str, tuple[Callable[..., Any], Callable[[], list[Tensor]], str]] = {
    "transposed": (
        lambda x, w: spelled.hugging_face(x, w, 1e-6),
        lambda: [torch.randn(32, 6).t(), torch.randn(32)],
        "jitk::rmsnorm: input has strides [1, 6], which are no rows",
    ),
    "gaps_between_heads": (
        lambda x, w: F.rms_norm(x[:, :, 1:], (8,), w, 1e-6),
        lambda: [torch.randn(2, 3, 4, 8), torch.randn(8)],
        "jitk::rmsnorm: input has strides [96, 32, 8, 1], which are no rows",
    ),
    "other_strides": (
        lambda x, w: F.rms_norm(x.transpose(0, 1), (8,), w, 1e-6).contiguous().view(-1),
        lambda: [torch.randn(3, 4, 8), torch.randn(8)],
        "jitk::rmsnorm: input has strides [8, 32, 1], which are no rows",
    ),
    "weight_for_each_row": (
        lambda x, w: spelled.hugging_face(x, w, 1e-6),
        lambda: [torch.randn(6, 32), torch.randn(6, 32)],
        "jitk::rmsnorm: weight has 2 dimensions",
    ),
    "one_weight": (
        lambda x, w: spelled.hugging_face(x, w, 1e-6),
        lambda: [torch.randn(6, 32), torch.randn(1)],
        "jitk::rmsnorm: weight is broadcast, [1] to [6, 32]",
    ),
    "up_is_broadcast": (
        lambda gate, up: F.silu(gate) * up,
        lambda: [torch.randn(6, 32), torch.randn(1, 32)],
        "jitk::silu_mul: up is broadcast, [1, 32] to [6, 32]",
    ),
    "over_columns": (
        lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-6)),
        lambda: [torch.randn(6, 32), torch.randn(32)],
        "jitk::rmsnorm: mean with (-1,): the model has (-2,)",
    ),
    "used_elsewhere": (
        _used_elsewhere,
        lambda: [torch.randn(6, 32), torch.randn(32)],
        "jitk::rmsnorm: scale is used elsewhere too, by output",
    ),
    "written_meanwhile": (
        _written_meanwhile,
        lambda: [torch.randn(6, 32)],
        "jitk::silu_and_mul: mul_ is called meanwhile, which may change what it reads or how it computes",
    ),
    "told_to_write": (
        _told_to_write,
        lambda: [torch.randn(6, 32)],
        "jitk::silu_and_mul: relu is called meanwhile, which may change what it reads or how it computes",
    ),
    "grad_mode_changes": (
        _grad_mode_changes,
        lambda: [torch.randn(6, 32)],
        "jitk::silu_and_mul: _set_grad_enabled is called meanwhile, which may change what it reads or how it computes",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_op_would_not_serve_is_left_alone(name: str) -> None:
    function, make, reason = REFUSED[name]
    rewrite = fuse()
    arguments = make()
    copies = [argument.clone() for argument in arguments]
    actual = torch.compile(function, fullgraph=True, backend=traced_by(rewrite))(*arguments)
    torch.testing.assert_close(actual, function(*copies))
    assert rewrite.report().done == ()
    assert [f"{entry.op}: {entry.reason}" for entry in rewrite.report().missed] == [reason]


# --- add and norm, in place ---------------------------------------------------------------------------


class Block(nn.Module):
    """Two residual additions, each with the norm behind it; the sum lives on."""

    def __init__(self, norm: Callable[[Tensor, Tensor, float], Tensor]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 32)
        self.layers = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(2))
        self.weights = nn.ParameterList(torch.rand(32) for _ in range(3))
        self.norm = norm

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer, weight in zip(self.layers, self.weights, strict=False):
            x = x + layer(self.norm(x, weight, 1e-6))
        return self.norm(x, self.weights[2], 1e-6)


ADDED = [("fused_add_rmsnorm", spelled.hugging_face), ("gemma_fused_add_rmsnorm", spelled.gemma)]


@pytest.mark.parametrize(("op", "norm"), ADDED, ids=[op for op, _ in ADDED])
def test_add_and_norm_are_one_op_in_place(op: str, norm: Callable[..., Tensor]) -> None:
    """Without a copy: Inductor's code has one kernel of its own, the embedding."""
    model = Block(norm).bfloat16()
    truth = Block(norm).double()
    truth.load_state_dict(model.state_dict())
    rewrite = fuse()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, options=rewrite.options())
    with torch.no_grad():
        actual, (code,) = run_and_get_code(compiled, torch.arange(15).reshape(3, 5))
        again = torch.arange(14).reshape(2, 7)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert_as_right(compiled(again), model(again), truth(again))
        ids = torch.arange(15).reshape(3, 5)
        assert_as_right(actual, model(ids), truth(ids))
    assert short(rewrite.report().counts()) == {op: 2, op.replace("fused_add_", ""): 1}
    assert code.count(f"torch.ops.jitk.{op}.default(") == 2
    assert len(re.findall(r"^cpp_fused\w* = ", code, re.MULTILINE)) == 1, code


def test_what_would_have_to_be_copied_is_not_written() -> None:
    def read_again(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        y = y * 2
        total = x * 3 + y
        return spelled.hugging_face(total, weight, 1e-6) + total, y

    def inputs(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        return spelled.hugging_face(x + y, weight, 1e-6)

    reasons = []
    for function in (read_again, inputs):
        rewrite = fuse()
        arguments = torch.randn(4, 32), torch.randn(4, 32), torch.randn(32)
        actual = torch.compile(function, fullgraph=True, backend=traced_by(rewrite))(*arguments)
        torch.testing.assert_close(actual, function(*arguments))
        assert short(rewrite.report().counts()) == {"rmsnorm": 1}
        reasons += [f"{entry.op}: {entry.reason}" for entry in rewrite.report().missed]
    assert reasons == [
        "jitk::fused_add_rmsnorm: y is read afterwards, by output",
        "jitk::fused_add_rmsnorm: l_y_ is an input of the graph",
    ]


# --- training ----------------------------------------------------------------------------------------


def gradients(function: Callable[..., Tensor], model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    model.zero_grad()
    function(*inputs).double().square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Linear(32, 128, bias=False)
        self.down = nn.Linear(64, 32, bias=False)
        self.weight = nn.Parameter(torch.rand(32))
        self.bias = nn.Parameter(torch.rand(32))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(F.layer_norm(x, (32,), self.weight, self.bias)).chunk(2, -1)
        x = x + self.down(F.silu(gate) * up)
        return spelled.hugging_face(x, self.weight, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_a_fused_model_is_trained(dtype: torch.dtype) -> None:
    """Gradients by the ops' own derivatives; nothing that needs one is written in place."""
    model, truth = Mlp().to(dtype), Mlp().double()
    truth.load_state_dict(model.state_dict())
    rewrite = fuse()
    compiled = torch.compile(model, fullgraph=True, options=rewrite.options())
    x = torch.randn(6, 32).to(dtype)
    actual = gradients(compiled, model, x)
    for grad, plain, exact in zip(actual, gradients(model, model, x), gradients(truth, truth, x.double()), strict=True):
        assert_as_right(grad, plain, exact)
    assert short(rewrite.report().counts()) == {"layernorm": 1, "rmsnorm": 1, "silu_and_mul": 1}
    assert [f"{entry.op}: {entry.reason}" for entry in rewrite.report().missed] == [
        "jitk::fused_add_rmsnorm: it needs a derivative, which an op that writes its arguments has not"
    ]


# --- Inductor ----------------------------------------------------------------------------------------


def test_as_a_context_and_where() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Mlp(), Mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    model, x = Two(), torch.randn(4, 32)
    rewrite = fuse(["silu_and_mul", torch_jit_ops.library.ops["layernorm"]], where=("second", "nowhere"))
    with torch.no_grad():
        expected = model(x)
        with rewrite:
            actual, (code,) = run_and_get_code(torch.compile(model, fullgraph=True), x)
        assert torch._inductor.config.pre_grad_custom_pass is None
    torch.testing.assert_close(actual, expected)
    assert sorted(re.findall(r"torch\.ops\.jitk\.(\w+)\.(?:default|out)\(", code)) == ["layernorm", "silu_and_mul"]
    report = rewrite.report()
    assert [(entry.op, entry.module) for entry in report.done] == [
        ("jitk::layernorm", "second"),
        ("jitk::silu_and_mul", "second"),
    ]
    here = Path(__file__)
    assert all(Path(entry.line.partition(":")[0]).name == here.name for entry in report.done)
    text = re.sub(r"\S+/test_fuse.py:\d+", "test_fuse.py:1", str(report))
    assert text == "2 replaced\n  jitk::layernorm  second  test_fuse.py:1\n  jitk::silu_and_mul  second  test_fuse.py:1"


def test_rewrites_stand_beside_each_other_and_beside_those_of_others() -> None:
    seen = []
    x = torch.randn(4, 32)
    with torch._inductor.config.patch(pre_grad_custom_pass=lambda graph: seen.append(len(graph.nodes))):
        both = fuse(["silu_and_mul"]) + decompose("relu2")
        with both:
            compiled = torch.compile(lambda x: torch.ops.jitk.relu2(F.silu(x[:, :16]) * x[:, 16:]), fullgraph=True)
            actual, (code,) = run_and_get_code(compiled, x)
    assert len(seen) == 1
    assert re.findall(r"torch\.ops\.jitk\.(\w+)\.(?:default|out)\(", code) == ["silu_and_mul"]
    assert short(both.report().counts()) == {"silu_and_mul": 1, "relu2": 1}
    torch.testing.assert_close(actual, (F.silu(x[:, :16]) * x[:, 16:]).relu().square())


def test_inductors_cache_knows_the_patterns() -> None:
    assert fuse().uuid() == fuse().uuid()
    others = [fuse(), fuse(["rmsnorm"]), fuse(["rmsnorm"], where="layers.*"), decompose("rmsnorm"), decompose("relu2")]
    others.append(others[0] + others[1])
    assert len({rewrite.uuid() for rewrite in others}) == len(others)
    code = """
import torch, torch.nn.functional as F
from torch._dynamo.utils import counters
from torch_jit_ops.ops.norm import rmsnorm
from torch_jit_ops.inductor import fuse
for options in ({}, fuse().options(), fuse().options(), fuse(["rmsnorm"]).options()):
    torch._dynamo.reset()
    counters.clear()
    torch.compile(lambda x: F.silu(x[:, :16]) * x[:, 16:], fullgraph=True, options=options)(torch.ones(3, 32))
    print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""
    printed = run_python(code, TORCHINDUCTOR_FX_GRAPH_CACHE="1", JITK_FALLBACK="warn")
    assert printed.splitlines()[1:3] == ["0 1", "1 0"], printed


# --- ops of one's own -----------------------------------------------------------------------------------


def _softcap_of_mul(x: Tensor, cap: float) -> Tensor:
    return torch.tanh(x * (1 / cap)) * cap


def _softcap_swapped(x: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(x / cap)


@pytest.fixture
def own(tmp_path: Path) -> Iterator[OpLibrary]:
    (tmp_path / "softcap.cpp").touch()
    library = OpLibrary("fuselib", csrc=tmp_path)

    def samples(make: SampleMaker) -> Iterator[Sample]:
        yield Sample((make.randn(7, 33), 30.0))

    @library.op(samples=samples, patterns=(_softcap_of_mul, _softcap_swapped))
    def softcap(x: Tensor, cap: float) -> Tensor:
        return torch.tanh(x / cap).mul(cap)

    def wide(make: SampleMaker) -> Iterator[Sample]:
        yield Sample((make.randn(7, 33),))

    @library.op(samples=wide, tensors={"x": "[rows, columns]"})
    def four_columns(x: Tensor) -> Tensor:
        return torch.cat((x[:, :4].sin(), x[:, 4:]), -1)

    @library.op(samples=wide, outputs=("sine", "cosine"))
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.sin(), x.cos()

    @library.op(samples=samples)
    def unnamed(x: Tensor, cap: float) -> Tensor:
        return x * cap

    @library.op(patterns=())
    def sampleless(x: Tensor) -> Tensor:
        return x.sin()

    @library.op(samples=samples)
    def looks(x: Tensor, cap: float) -> Tensor:
        return x * cap if x.sum() > 0 else x

    @library.op(samples=samples)
    def writes(x: Tensor, cap: float) -> Tensor:
        y = x * cap
        return torch.neg(input=x, out=y)

    yield library
    registry.remove(library)
    for op in library.ops.values():
        op._library._destroy()


def test_an_op_of_ones_own_is_found_by_its_reference_and_its_patterns(own: OpLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objections, "served", lambda op: {"cpu"})  # it has no kernel
    x = torch.randn(2, 3, 8)
    models = (
        lambda x: torch.tanh(x / 30.0) * 30.0,
        lambda x: 50.0 * (x / 50.0).tanh(),
        lambda x: own.ops["softcap"].reference(x, 7.0),
    )
    for model in models:
        torch._dynamo.reset()
        rewrite = fuse(["fuselib::softcap"])
        actual = torch.compile(model, fullgraph=True, backend=traced_by(rewrite))(x)
        torch.testing.assert_close(actual, model(x))
        assert rewrite.report().counts() == {"fuselib::softcap": 1}

    rewrite = fuse(["fuselib::softcap"])
    torch._dynamo.reset()
    torch.compile(lambda x: torch.tanh(x / 30.0) * 31.0, fullgraph=True, backend=traced_by(rewrite))(x)
    assert rewrite.report().counts() == {}, "one argument, two numbers"


def test_columns_are_those_that_the_op_takes(own: OpLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objections, "served", lambda op: {"cpu"})
    x = torch.randn(3, 20)
    for columns, counts in ((4, {"fuselib::four_columns": 1}), (5, {}), (10, {})):
        torch._dynamo.reset()
        rewrite = fuse(["fuselib::four_columns"])

        def model(x: Tensor, columns: int = columns) -> Tensor:
            return torch.cat((x[:, :columns].sin(), x[:, columns:]), -1)

        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend=traced_by(rewrite))(x), model(x))
        assert rewrite.report().counts() == counts
        assert [entry.reason for entry in rewrite.report().missed] == (
            [] if counts else ["it takes other columns than the op does"]
        )


def test_results_of_which_none_is_made_from_another_are_one_call(own: OpLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objections, "served", lambda op: {"cpu"})

    def model(x: Tensor) -> tuple[Tensor, ...]:
        cosine = x.cos()
        return cosine * 2, x.sin(), (x * 2).sin()

    rewrite = fuse(["fuselib::both"])
    x = torch.randn(3, 20)
    backend = traced_by(rewrite)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend=backend)(x), model(x))
    assert rewrite.report().counts() == {"fuselib::both": 1}
    assert calls(backend.graphs[0])[0] == "fuselib.both.default", "ahead of the first use"


def message(function: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as error:
        function()
    return str(error.value)


def test_what_cannot_be_found_says_so(own: OpLibrary) -> None:
    assert message(lambda: fuse(["fuselib::sampleless"])) == (
        "fuselib::sampleless cannot be found in a model: it has no samples with rows, which say what its arguments look like"
    )
    assert message(lambda: fuse(["fuselib::looks"])).startswith(
        "fuselib::looks cannot be found in a model: looks does not run on tensors without values: "
    )
    assert message(lambda: fuse(["fuselib::writes"])) == (
        "fuselib::writes cannot be found in a model: writes writes a part of a tensor"
    )
    said, _, names = message(lambda: decompose("nothing")).partition(" are ")
    assert said == "there is no op 'nothing'; there"
    assert {"looks", "rmsnorm"} <= set(names.split(", "))
    assert names.split(", ") == sorted(names.split(", "))


# --- taking apart ---------------------------------------------------------------------------------------


def _called(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.jitk.rmsnorm(torch.ops.jitk.silu_and_mul(x) * 2, weight).relu()


def _called_apart(x: Tensor, weight: Tensor) -> Tensor:
    return rmsnorm.reference(torch.ops.jitk.silu_and_mul(x) * 2, weight).relu()


@pytest.mark.parametrize(
    ("function", "rewrite", "left"),
    [
        (_called, lambda: decompose("rmsnorm"), {"silu_and_mul"}),
        (_called, lambda: decompose(["rmsnorm", "jitk::silu_and_mul"]), set()),
        (_called, lambda: decompose("rmsnorm", where="layers.*"), {"silu_and_mul", "rmsnorm"}),
        (_called_apart, lambda: decompose([]), {"silu_and_mul"}),
    ],
    ids=["one", "both", "elsewhere", "call_site"],
)
def test_a_decomposed_op_is_fused_with_its_neighbours(
    function: Callable[..., Tensor], rewrite: Callable[[], Rewrite], left: set[str]
) -> None:
    x, weight = torch.randn(4, 64, requires_grad=True), torch.randn(32, requires_grad=True)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, options=rewrite().options())
    _, codes = run_and_get_code(lambda: compiled(x, weight).sum().backward())
    grads = x.grad.clone(), weight.grad.clone()
    x.grad = weight.grad = None
    function(x, weight).sum().backward()
    torch.testing.assert_close(grads, (x.grad, weight.grad))
    assert set(re.findall(r"torch\.ops\.jitk\.(\w+)\.(?:default|out)\(", codes[0])) == left


def test_an_op_that_writes_is_decomposed() -> None:
    def function(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        x = x * 2
        torch.ops.jitk.fused_add_rmsnorm(x, residual, weight, 1e-5)
        return x, residual + 1

    rewrite = decompose("fused_add_rmsnorm")
    arguments = [torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)]
    copies = [argument.clone() for argument in arguments]
    actual, (code,) = run_and_get_code(torch.compile(function, fullgraph=True, options=rewrite.options()), *arguments)
    torch.testing.assert_close(actual, function(*copies))
    torch.testing.assert_close(arguments, copies)
    assert "jitk.fused_add_rmsnorm.default(" not in code
    assert rewrite.report().counts() == {"jitk::fused_add_rmsnorm": 1}


def test_several_results_are_decomposed() -> None:
    def function(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        grad_input, grad_weight = torch.ops.jitk.rmsnorm_backward(grad, x, weight)
        return grad_input * grad_weight

    rewrite = decompose("rmsnorm_backward")
    arguments = [torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)]
    backend = traced_by(rewrite)
    actual = torch.compile(function, fullgraph=True, backend=backend)(*arguments)
    torch.testing.assert_close(actual, function(*arguments))
    assert not [name for name in calls(backend.graphs[0]) if "jitk" in name]
