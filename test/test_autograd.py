"""Derivatives: the way to the kernel without one, the transforms of torch.func, and what refuses to have one."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import (
    Case,
    call,
    copy_with_storage,
    has_gradient,
    has_out,
    is_first,
    is_first_of_op,
    is_floating,
    last_dtypes,
    map_tensors,
    over,
    poisoned,
    tensors_of,
    writes,
)
from child import ROOT, run_python
from expecttest import assert_expected_inline
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

import torch_jit_ops
from torch_jit_ops import Op, OpLibrary, Sample
from torch_jit_ops.builder.load import load
from torch_jit_ops.calling import dispatcher
from torch_jit_ops.declaring.signature import OUT_FORMS_RETURN
from torch_jit_ops.features import autograd

_numbers = itertools.count()  # of the namespaces of tests


@pytest.fixture(autouse=True, scope="module")
def _library_for_autograd() -> None:
    """Compiled here, as it would be in the background, so that it is there for all that follows."""
    load(dispatcher.autograd_unit())


def ready(op: Op) -> Op:
    """The op, with its autograd keys handed over to C++."""
    sample = next(iter(op.declaration.samples(torch_jit_ops.SampleMaker("cpu", last_dtypes(op)))))
    for _ in range(2):
        with torch.no_grad():
            call(op, copy_with_storage(sample))
    assert "autograd.cpp" in torch._C._dispatch_dump(op.qualified_name)
    return op


def silu_and_mul() -> Op:
    return ready(torch_jit_ops.ops.activation.silu_and_mul)


def functions_called(run: Callable[[], object]) -> set[str]:
    """The files of this package whose Python functions ``run`` calls."""
    files: set[str] = set()
    package = str(Path(torch_jit_ops.__file__).parent)

    def note(frame: Any, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(package):
            files.add(Path(frame.f_code.co_filename).name)

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return files


# --- the way without a gradient ---------------------------------------------------------------------


def test_no_python_unless_a_gradient_is_wanted() -> None:
    op = silu_and_mul()
    x, out = torch.randn(2, 8), torch.empty(2, 4)
    wanting = x.clone().requires_grad_()
    run, run_out = op.default, op.out
    run_out(x, out=out)  # the first call of a form compiles or finds its kernel
    assert functions_called(lambda: run(x)) == set()
    assert functions_called(lambda: run_out(x, out=out)) == set()
    with torch.no_grad():
        assert functions_called(lambda: run(wanting)) == set()
    with torch.inference_mode():
        assert functions_called(lambda: run(x)) == set()
    assert functions_called(lambda: run(wanting)) == {"autograd.py", "signature.py"}
    assert run(wanting).requires_grad
    assert not run(x).requires_grad


class Seen(TorchDispatchMode):
    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.names: list[str] = []
        self.error = error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        if self.error is not None:
            raise self.error
        return func(*args, **(kwargs or {}))


class Wrapped(Tensor):
    """A subclass that holds a tensor and adds 1 to whatever an op of it returns."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, requires_grad=inner.requires_grad)
        made.inner = inner.detach()
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = tree_map(lambda value: value.inner if isinstance(value, Wrapped) else value, (args, kwargs or {}))
        return tree_map(lambda value: cls(value + 1) if isinstance(value, Tensor) else value, func(*plain[0], **plain[1]))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_modes_and_subclasses_see_the_op(requires_grad: bool) -> None:
    op = silu_and_mul()
    x = torch.randn(2, 8, requires_grad=requires_grad)
    expected = op.reference(x)
    with Seen() as mode:
        seen = op.default(x)
    torch.testing.assert_close(seen, expected)
    assert mode.names == ["jitk.silu_and_mul.default"]

    wrapped = op.default(Wrapped(x))
    assert isinstance(wrapped, Wrapped)
    torch.testing.assert_close(wrapped.inner, expected.detach() + 1)

    with FakeTensorMode() as fakes:
        fake = op.default(fakes.from_tensor(x))
    assert isinstance(fake, FakeTensor)
    assert fake.requires_grad == requires_grad

    functional = torch._to_functional_tensor(x.detach())
    torch._enable_functionalization(reapply_views=True)
    try:
        result = op.default(functional)
    finally:
        torch._disable_functionalization()
    assert torch._is_functional_tensor(result)
    torch.testing.assert_close(torch._from_functional_tensor(result), expected.detach())

    meta = op.default(x.to("meta"))
    assert (meta.device.type, meta.requires_grad) == ("meta", requires_grad)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_an_exception_of_python_keeps_its_type(requires_grad: bool) -> None:
    class Stop(Exception):
        pass

    op = silu_and_mul()
    with pytest.raises(Stop), Seen(Stop()):
        op.default(torch.randn(2, 8, requires_grad=requires_grad))


def test_a_negated_view_is_materialised() -> None:
    op = ready(torch_jit_ops.ops.activation.fused_add_relu)
    x = torch.randn(3, 4)
    negative = torch._neg_view(x)
    torch.testing.assert_close(op.default(negative, x), torch.zeros(3, 4))


def test_a_size_stays_a_symbol(tmp_path: Path) -> None:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    (tmp_path / "shift.cpp").write_text(
        "#include <jitk/result.h>\n"
        "void shift(jitk::TensorView x, int64_t by, jitk::Output& output) {\n"
        "  const jitk::TensorView out = output.empty_like(x);\n"
        "  for (int64_t i = 0; i < x.numel(); ++i)\n"
        "    static_cast<float*>(out.data_ptr())[i] = static_cast<const float*>(x.data_ptr())[i] + by;\n"
        "}\n"
    )
    library = OpLibrary("autograd_shift", csrc=tmp_path)

    @library.op(cpu="shift.cpp", variant="shift")
    def shift(x: Tensor, by: int) -> Tensor:
        return x + by

    assert [shift(torch.zeros(1), n).item() for n in (2, 3)] == [2, 3]
    assert "autograd.cpp" in torch._C._dispatch_dump(shift.qualified_name)
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    size = mode.from_tensor(torch.empty(5), static_shapes=False).shape[0]
    for requires_grad in (False, True):
        shift(mode.from_tensor(torch.empty(4, requires_grad=requires_grad)), size)
    assert [str(guard.expr) for guard in environment.guards] == []


def test_what_was_saved_of_a_written_tensor_is_known_to_be_stale() -> None:
    op = silu_and_mul()
    x = torch.randn(2, 8, requires_grad=True)
    y = x * 1
    loss = (y[:, :4] * y[:, 4:]).sum()
    with torch.no_grad():
        before = y._version
        op.out(torch.randn(2, 8), out=y.view(4, 4)[:2])
    assert y._version == before + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_tensor_of_inference_mode_can_be_written() -> None:
    op = silu_and_mul()
    with torch.inference_mode():
        out = torch.empty(2, 4)
    x = torch.randn(2, 8)
    op.out(x, out=out)
    torch.testing.assert_close(out, op.reference(x))


# --- derivatives of every kind ------------------------------------------------------------------------


def total(function: Callable[..., Any]) -> Callable[..., Tensor]:
    return lambda *args: sum(tensor.sin().sum() for tensor in tree_leaves(function(*args)))


def forward_mode(function: Callable[..., Any], *args: Any) -> Any:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(arg, arg.cos()) for arg in args]
        return [tuple(forward_ad.unpack_dual(tensor)) for tensor in tree_leaves(function(*duals))]


def batched_backward(function: Callable[..., Any], *args: Any) -> Any:
    args = [arg.clone().requires_grad_() for arg in args]
    results = [tensor for tensor in tree_leaves(function(*args)) if tensor.requires_grad]
    weights = [torch.stack([tensor.detach().cos(), tensor.detach().sin()]) for tensor in results]
    return torch.autograd.grad(results, args, weights, is_grads_batched=True, allow_unused=True)


def mixed(function: Callable[..., Any], *args: Any) -> Any:
    args = [arg.clone().requires_grad_() for arg in args]
    return torch.autograd.grad(grad(total(function))(*args).square().sum(), args, allow_unused=True)


def partly_without(function: Callable[..., Any], *args: Any) -> Any:
    def product(*again: Any) -> Tensor:
        with torch.no_grad():
            constant = total(function)(*again)
        return constant * total(function)(*again)

    return grad(product)(*args)


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda function, *args: grad(total(function), tuple(range(len(args))))(*args),
    "second grad": lambda f, *args: grad(lambda *again: grad(total(f))(*again).square().sum())(*args),
    "hessian": lambda function, *args: hessian(total(function))(*args),
    "jvp": lambda function, *args: jvp(total(function), args, tuple(arg.cos() for arg in args)),
    "jvp of grad": lambda function, *args: jvp(grad(total(function)), args, args),
    "jacrev": lambda function, *args: jacrev(function)(*args),
    "jacfwd": lambda function, *args: jacfwd(function)(*args),
    "vmap of grad": lambda f, *args: vmap(grad(total(f)))(*(torch.stack([arg, arg.cos()]) for arg in args)),
    "grad of vmap": lambda f, *args: grad(lambda *b: total(vmap(f))(*b))(*(torch.stack([arg, arg.cos()]) for arg in args)),
    "forward mode": forward_mode,
    "batched backward": batched_backward,
    "grad in autograd": mixed,
    "no_grad within grad": partly_without,
}


def small(case: Case) -> tuple[list[Tensor], Callable[[Callable[..., Any]], Callable[..., Any]]]:
    """A few elements of a case in float64, and what makes a function of these alone of an op. Indices are into two rows."""

    def cut(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor[:2] % 2
        return tensor.double()[(slice(2), ..., slice(8)) if tensor.dim() > 1 else slice(8)].contiguous()

    sample = map_tensors(case.sample(), cut)

    def of_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*tensors: Tensor) -> Any:
            rest = iter(tensors)
            again = map_tensors(sample, lambda tensor: next(rest) if tensor.is_floating_point() else tensor)
            results = tree_leaves(function(*again.args, **again.kwargs))
            return tuple(tensor for tensor in results if tensor.is_floating_point())

        return run

    return [tensor for tensor in tensors_of(sample) if tensor.is_floating_point()], of_tensors


# Plain PyTorch has no gradient for an argument that made only results which are not used: k, where the gradient of q is
# differentiated. An op is one node, which does not know which argument made which result, and gives zeros as PyTorch's own do.
ZEROS_FOR_NONE = {(op, "grad in autograd", 1) for op in ("rope_qk", "rope_qk_backward")}


@over(has_gradient, is_first_of_op)
@pytest.mark.filterwarnings("error:There is a performance drop")
def test_transforms_are_those_of_the_reference(case: Case) -> None:
    tensors, of_tensors = small(case)
    for name, transform in TRANSFORMS.items():
        actual = tree_leaves(transform(of_tensors(case.op.default), *tensors))
        expected = tree_leaves(transform(of_tensors(case.op.reference), *tensors))
        for place, (result, plain) in enumerate(zip(actual, expected, strict=True)):
            if (case.op.name, name, place) in ZEROS_FOR_NONE:
                assert plain is None
                plain = torch.zeros_like(tensors[place])
            torch.testing.assert_close(result, plain, msg=lambda text, name=name: f"{name}: {text}")


@over(has_gradient, is_first_of_op)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(case: Case, reentrant: bool) -> None:
    """Its second forward pass ends by an exception from within the op's autograd function."""

    def run(*args: Any) -> Tensor:
        results = tree_leaves(case.op.default(*(arg * 1 if isinstance(arg, Tensor) else arg for arg in args)))
        return sum(tensor.sin().sum() for tensor in results if tensor.is_floating_point())

    samples = [wanting(case.sample()) for _ in range(2)]
    checkpoint(run, *samples[0].args, use_reentrant=reentrant).backward()
    run(*samples[1].args).backward()
    for actual, expected in zip(*map(tensors_of, samples), strict=True):
        assert not actual.requires_grad or torch.equal(actual.grad, expected.grad)


def test_vmap_is_one_call_where_the_batch_is_more_rows() -> None:
    op = torch_jit_ops.ops.norm.rmsnorm
    x, weights = torch.randn(3, 4, 8), torch.randn(5, 8)
    for run, calls in (
        (lambda: vmap(op.default, (1, None))(x, weights[0]), 1),
        (lambda: vmap(op.default, (None, 0))(x, weights), 5),
        (lambda: vmap(vmap(op.default, (0, None)), (None, 0))(x, weights), 5),
        (lambda: vmap(vmap(op.default, (0, None)), (0, None))(x, weights[0]), 1),
    ):
        with Seen() as mode:
            run()
        assert mode.names.count("jitk.rmsnorm.default") == calls


def test_vmap_of_an_op_that_writes_is_refused() -> None:
    op = torch_jit_ops.ops.norm.fused_add_rmsnorm
    with pytest.raises(RuntimeError, match="Batching rule not implemented for jitk::fused_add_rmsnorm"):
        vmap(op.default)(torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(2, 4))


def test_autocast_changes_nothing() -> None:
    """An op computes in the dtype that it is given: the layers around it decide."""
    op = silu_and_mul()
    layer = torch.nn.Linear(4, 8)
    x = torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = layer(x)
        assert (hidden.dtype, op.default(hidden).dtype) == (torch.bfloat16, torch.bfloat16)
        assert op.default(torch.randn(3, 8)).dtype == torch.float32
        op.default(hidden).float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_data_parallel_training_on_two_processes(tmp_path: Path) -> None:
    """DistributedDataParallel and FSDP on gloo get the gradients of one process with the whole batch."""
    script = Path(__file__).with_name("parallel_child.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(tmp_path / "rendezvous")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for process in running:
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said


# --- no derivative ------------------------------------------------------------------------------------


def is_writing(case: Case) -> bool:
    return writes(case.op)


def wanting(sample: Sample) -> Sample:
    return map_tensors(sample, lambda tensor: tensor.detach().clone().requires_grad_(tensor.is_floating_point()))


@over(is_writing, is_floating, is_first)
def test_an_op_that_writes_refuses_to_be_differentiated(case: Case) -> None:
    with pytest.raises(RuntimeError, match="has no derivative"):
        call(case.op, wanting(case.sample()))
    with torch.no_grad():
        call(case.op, wanting(case.sample()))
    call(case.op, case.sample())


@over(has_out, has_gradient, is_first_of_op)
def test_an_out_form_refuses_to_be_differentiated(case: Case) -> None:
    sample = wanting(case.sample())
    outs = [poisoned(tensor.shape, tensor.dtype, case.device) for tensor in call(case.op, sample).tensors]
    kwargs = {**sample.kwargs, **dict(zip(case.op.declaration.outputs, outs, strict=True))}
    with pytest.raises(RuntimeError, match="don't support automatic differentiation"):
        case.op.out(*sample.args, **kwargs)
    with torch.no_grad():
        case.op.out(*sample.args, **kwargs)
    with pytest.raises(RuntimeError, match="don't support automatic differentiation"), forward_ad.dual_level():
        given = map_tensors(case.sample(), lambda t: forward_ad.make_dual(t, t) if t.is_floating_point() else t)
        case.op.out(*given.args, **kwargs)


@pytest.fixture(params=[True, False], ids=["handed over", "in Python"])
def op_without_derivative(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Op, Op]]:
    """An op with an out form and one in place; their autograd keys are C++'s or, as they have no kernel, still Python's."""
    library = OpLibrary(f"autograd_refusal{next(_numbers)}", csrc=tmp_path)

    def twice(x: Tensor) -> Tensor:
        return 2 * x

    def double(x: Tensor, by: Tensor | None = None) -> None:
        x.mul_(2 if by is None else by)

    ops = [
        library.op()(twice),
        library.op(mutates=("x",))(double),
    ]
    if request.param:
        assert dispatcher.differentiate([f"{library.namespace}::{form}" for form in ("twice", "twice.out", "double")])
    yield ops[0], ops[1]


def test_refusals(op_without_derivative: tuple[Op, Op]) -> None:
    twice, double = op_without_derivative
    texts = []
    x = torch.ones(2)
    for run in (
        lambda: twice.out(x.clone().requires_grad_(), out=torch.empty(2)),
        lambda: twice.out(x, out=torch.empty(2, requires_grad=True)),
        lambda: double(x.clone().requires_grad_()),
        lambda: double(x, x.clone().requires_grad_()),
    ):
        with pytest.raises(RuntimeError) as caught:
            run()
        texts.append(str(caught.value).replace(twice.declaration.namespace, "lib"))
    assert_expected_inline(
        "\n".join(texts),
        """\
lib::twice.out: functions with out=... arguments don't support automatic differentiation, but argument 'x' requires grad
  remedy: call the functional form, or this one under torch.no_grad()
lib::twice.out: functions with out=... arguments don't support automatic differentiation, but argument 'out' requires grad
  remedy: call the functional form, or this one under torch.no_grad()
lib::double: an op that writes its arguments has no derivative, but argument 'x' requires grad
  remedy: call it under torch.no_grad(), or write the same with operations that return new tensors
lib::double: an op that writes its arguments has no derivative, but argument 'by' requires grad
  remedy: call it under torch.no_grad(), or write the same with operations that return new tensors""",
    )
    y = x.clone()
    double(y, by=torch.full((2,), 3.0))
    assert (y.tolist(), y._version > 0) == ([3, 3], True)


# --- forward mode in compiled graphs ------------------------------------------------------------------


def _dual(function: Callable[..., Any], x: Tensor, tangent: Tensor) -> Any:
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))))


def _norm(function: Callable[..., Any]) -> Callable[..., Tensor]:
    return lambda x: function(x).square().sum()


WITHIN: dict[str, Callable[..., Any]] = {
    "jvp": lambda f, x, t: jvp(f, (x,), (t,)),
    "dual_level": _dual,
    "jacfwd": lambda f, x, t: jacfwd(_norm(f))(x),
    "hessian": lambda f, x, t: hessian(_norm(f))(x),
    "vmap of jvp": lambda f, x, t: vmap(lambda x, t: jvp(f, (x,), (t,)))(x, t),
    "jvp of vmap": lambda f, x, t: jvp(vmap(f), (x,), (t,)),
    "jvp of grad": lambda f, x, t: jvp(grad(_norm(f)), (x,), (t,)),
    "grad of jvp": lambda f, x, t: grad(lambda x: jvp(f, (x,), (t,))[1].sum())(x),
}


@pytest.fixture(params=["handed over", "in Python"])
def op_in_graphs(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Op:
    """A user's op, before and after the library is there that knows of forward mode."""
    library = OpLibrary(f"autograd_forward{next(_numbers)}", csrc=tmp_path)

    def gate(x: Tensor, up: Tensor) -> Tensor:
        return torch.nn.functional.silu(x) * up

    op = library.op()(gate)
    if request.param == "handed over":
        assert dispatcher.differentiate([op.qualified_name, f"{op.qualified_name}.out"])
    else:
        monkeypatch.setattr(dispatcher, "in_forward_mode", None)
    return op


def assert_same_within(op: Callable[..., Tensor], reference: Callable[..., Tensor], backend: str, *names: str) -> None:
    x, tangent = torch.randn(3, 16), torch.randn(3, 16)
    for name in names:
        torch._dynamo.reset()
        compiled = torch.compile(lambda x, t, name=name: WITHIN[name](op, x, t), fullgraph=True, backend=backend)
        for given in ((x, tangent), (tangent, x)):
            expected = WITHIN[name](reference, *given)
            torch.testing.assert_close(compiled(*given), expected, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_forward_mode_within_a_graph(op_in_graphs: Op, backend: str) -> None:
    assert_same_within(
        lambda x: op_in_graphs.default(x, x.sin()), lambda x: op_in_graphs.reference(x, x.sin()), backend, *WITHIN
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_forward_mode_of_an_op_with_a_declared_backward_within_a_graph(backend: str) -> None:
    op, weight = ready(torch_jit_ops.ops.norm.rmsnorm), torch.rand(16)
    names = ("jvp", "dual_level", "hessian") if backend != "inductor" else ("jvp",)
    assert_same_within(lambda x: op.default(x, weight), lambda x: op.reference(x, weight), backend, *names)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("warm", [False, True], ids=["first", "later"])
def test_forward_mode_around_a_graph(op_in_graphs: Op, backend: str, warm: bool) -> None:
    x, tangent = torch.randn(3, 16), torch.randn(3, 16)
    for name in ("jvp", "dual_level", "vmap of jvp"):
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: op_in_graphs.default(x, x.sin()), backend=backend)
        if warm:
            compiled(x)
        expected = WITHIN[name](lambda x: op_in_graphs.reference(x, x.sin()), x, tangent)
        torch.testing.assert_close(WITHIN[name](compiled, x, tangent), expected)


def test_a_dual_level_around_a_graph_of_inductor_is_refused_where_pytorch_drops_the_tangent() -> None:
    """The op comes first and meets the tangent; Inductor's own kernels lose it, those of a plain function too. PyTorch 2.15
    runs such a call eagerly."""
    op, weight = ready(torch_jit_ops.ops.norm.rmsnorm), torch.rand(16)
    x, tangent = torch.randn(3, 16), torch.randn(3, 16)
    drops = _dual(torch.compile(torch.sin), x, tangent)[1] is None
    compiled = torch.compile(lambda x: op.default(x, weight))
    if drops and OUT_FORMS_RETURN:
        with pytest.raises(RuntimeError) as caught:
            _dual(compiled, x, tangent)
        assert_expected_inline(
            str(caught.value),
            """\
jitk::rmsnorm.out: functions with out=... arguments don't support automatic differentiation, but argument 'input' has a tangent
  remedy: call the functional form""",
        )
    else:
        torch.testing.assert_close(_dual(compiled, x, tangent), _dual(lambda x: op.reference(x, weight), x, tangent))


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_refusals_in_forward_mode(op_without_derivative: tuple[Op, Op], backend: str | None) -> None:
    """Also of the tangent that no argument of ``compile`` has: it comes within the graph."""
    twice, double = op_without_derivative
    texts = []

    def write(x: Tensor) -> Tensor:
        out = torch.empty(2)
        twice.out(x, out=out)
        return out

    def change(x: Tensor) -> Tensor:
        y = x * 1
        double(y)
        return y

    for function in (write, change):

        def run(x: Tensor, function: Callable[..., Tensor] = function) -> Any:
            return _dual(function, x, x)

        with pytest.raises(Exception, match=r"automatic differentiation|no derivative") as caught:
            (run if backend is None else torch.compile(run, backend=backend))(torch.ones(2))
        while forward_ad._current_level >= 0:  # Dynamo leaves it entered where tracing ends by an error
            forward_ad.exit_dual_level()
        said = str(caught.value).replace(twice.declaration.namespace, "lib")
        texts.append(said[said.index("lib::") :].split("\n\n")[0])
    if backend is None:
        assert_expected_inline(
            "\n".join(texts),
            """\
lib::twice.out: functions with out=... arguments don't support automatic differentiation, but argument 'x' has a tangent
  remedy: call the functional form
lib::double: an op that writes its arguments has no derivative, but argument 'x' has a tangent
  remedy: write the same with operations that return new tensors""",
        )
    else:
        assert "argument 'x' has a tangent" in texts[0] and "argument 'x' has a tangent" in texts[1]


def test_a_sparse_argument_has_no_tangent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "in_forward_mode", None)
    assert not autograd._has_tangent(torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr())


def test_who_asks_for_tangents_is_not_seen(op_in_graphs: Op) -> None:
    with Seen() as mode:
        op_in_graphs.default(torch.randn(3), torch.randn(3))
    assert [name for name in mode.names if "alias" in name or "fw_primal" in name] == []


# --- compiled autograd, and versions ------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_autograd(backend: str) -> None:
    from torch._dynamo import compiled_autograd

    def run(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
        """Through a declared backward, a number that it needs, and the reference's derivative."""
        y = torch.ops.jitk.rmsnorm(x, weight, eps).square().sum() + torch.ops.jitk.silu_and_mul(x).sum()
        y.backward()
        grads = x.grad, weight.grad
        x.grad = weight.grad = None
        return grads

    x, weight = torch.randn(4, 64, requires_grad=True), torch.randn(64, requires_grad=True)
    for eps in (1e-6, 0.5, 2.0):
        expected = run(x, weight, eps)
        with compiled_autograd._enable(torch.compile(backend=backend)):
            for _ in range(2):
                torch.testing.assert_close(run(x, weight, eps), expected)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_what_is_written_counts_as_changed(mode: Any) -> None:
    ready(torch_jit_ops.ops.norm.fused_add_rmsnorm)
    ready(torch_jit_ops.ops.norm.rmsnorm)
    weight = torch.ones(64, requires_grad=True)
    saved, residual, out, x = (torch.randn(4, 64) for _ in range(4))
    for write, changed in (
        (lambda: torch.ops.jitk.fused_add_rmsnorm(saved, residual, weight.detach()), (saved, residual)),
        (lambda: torch.ops.jitk.rmsnorm.out(x, weight.detach(), out=out), (out,)),
        (lambda: torch.ops.jitk.rmsnorm.out(x.double(), weight.detach(), out=out.double()), ()),
    ):
        products = [(tensor * weight).sum() for tensor in changed]
        versions = [tensor._version for tensor in changed]
        with mode():
            write()
        for tensor, version, product in zip(changed, versions, products, strict=True):
            assert tensor._version > version
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                product.backward()


def test_tensors_of_inference_mode_are_written_anywhere() -> None:
    with torch.inference_mode():
        x, residual, out = (torch.randn(4, 64) for _ in range(3))
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            torch.ops.jitk.fused_add_rmsnorm(x, residual, torch.ones(64))
            torch.ops.jitk.rmsnorm.out(x, torch.ones(64), out=out)


def test_versions_before_the_library_is_there() -> None:
    """And in the first call of a process, which is in Python."""
    code = """
import torch, torch_jit_ops
x, residual, out, weight = torch.randn(4, 64), torch.randn(4, 64), torch.empty(4, 64), torch.ones(64)
with torch.inference_mode():
    for _ in range(3):
        versions = x._version, residual._version, out._version
        torch.ops.jitk.fused_add_rmsnorm(x, residual, weight)
        torch.ops.jitk.rmsnorm.out(x, weight, out=out)
        assert all(a < b for a, b in zip(versions, (x._version, residual._version, out._version)))
"""
    run_python(code, JITK_BACKGROUND="0")
