"""One of two processes that call ops on DTensors: see test_dtensor.py.

Arguments: the rank, the file to meet at, the file for what is found.
"""

from __future__ import annotations

import copy
import datetime
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import trial_library
from cases import copy_with_storage, map_tensors, samples_of, writes
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

import torch_jit_ops
from torch_jit_ops import Op, OpLibrary, Rows, Sample, fallback
from torch_jit_ops.declaring.signature import OUT_FORMS_RETURN

ops = torch.ops.jitk
library = OpLibrary("sharded", csrc=Path(__file__).parent)


@library.op(outputs=("out", "largest", "total"), rows=Rows("x", sums=("total",)))
def scaled(x: Tensor, *, by: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One that has it all: a weight by keyword, a result without the last dimension, a sum."""
    return x.clone(), x.abs().amax(-1), (x * by).sum_to_size(x.shape[-1])


@library.op(rows=Rows("x"))
def widened(x: Tensor, *, twice: bool = False) -> Tensor:
    return torch.cat([x, x], -1) if twice else x.clone()


@library.op(rows=Rows("x"))
def negated(x: Tensor) -> Tensor:
    return -x


def on(mesh: dist.DeviceMesh, tensor: Tensor, *placements: Placement) -> DTensor:
    """Every process has the same tensor, so no process has to send it."""
    if isinstance(placements[0], Partial):
        return DTensor.from_local(tensor / mesh.size(), mesh, placements)
    sharded = distribute_tensor(tensor.detach().clone(), mesh, placements, src_data_rank=None)
    return sharded.requires_grad_(tensor.requires_grad)


def on_line(tensor: Tensor, *placements: Placement) -> DTensor:
    return on(dist.init_device_mesh("cpu", (2,)), tensor, *placements)


def message(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:  # its type is part of what is looked at
        return f"{type(error).__name__}: {str(error).split('Sharding propagation failed')[0].rstrip()}"
    return "no error"


def results_of(op: Op, args: Sequence[Any]) -> list[Tensor]:
    returned = op.default(*args)
    made = returned if isinstance(returned, tuple) else () if returned is None else (returned,)
    return [*made, *(value for argument, value in zip(op.signature.arguments, args, strict=False) if argument.written)]


def placed(op: Op, sample: Sample, mesh: dist.DeviceMesh, *placements: Placement) -> list[Any]:
    """The arguments; ``placements`` are those of rows, also of what has a value per token, and the others are replicated."""
    args = []
    for argument, arg in zip(op.signature.arguments, sample.args, strict=False):
        own = placements if argument.name in op.declaration.rows.arguments else [Replicate()] * mesh.ndim
        if argument.name in op.declaration.rows.per_token:
            own = [p if isinstance(p, Shard) and p.dim < arg.dim() else Replicate() for p in placements]
        args.append(on(mesh, arg, *own) if isinstance(arg, Tensor) else arg)
    return args


def test_every_op_on_its_rows() -> None:
    """In float64, where all is the function's own arithmetic. Sharded as no rule says: right all the same, or refused."""
    line, square = dist.init_device_mesh("cpu", (2,)), dist.init_device_mesh("cpu", (1, 2))
    for op in (op for op in torch_jit_ops.library.ops.values() if op.declaration.rows.arguments):
        sample = map_tensors(samples_of(op, "cpu", torch.float32)[0], lambda x: x.double() if x.is_floating_point() else x)
        expected = results_of(op, copy_with_storage(sample).args)
        ndim = sample.args[op.signature.index(op.declaration.rows.arguments[0])].dim()
        dims = range(ndim if op.declaration.rows.elementwise else ndim - 1)
        meshes = [(line, (Shard(dim),)) for dim in range(ndim)]
        meshes += [(line, (Replicate(),)), (line, (Partial(),))]
        meshes += [(square, (Shard(0), Shard(0))), (square, (Replicate(), Shard(0)))]
        for mesh, placements in meshes:
            args = placed(op, sample, mesh, *placements)
            kept = all(p == Replicate() or (isinstance(p, Shard) and p.dim in dims) for p in placements)
            if writes(op) and not kept:
                said = message(lambda op=op, args=args: op.default(*args))
                assert "a DTensor that is written or passed by keyword cannot be redistributed" in said, (op, placements, said)
                continue
            results = results_of(op, args)
            for place, (actual, plain) in enumerate(zip(results, expected, strict=True)):
                is_sum = place < len(op.declaration.outputs) and op.declaration.outputs[place] in op.declaration.rows.sums
                own = tuple(Partial() if is_sum and isinstance(p, Shard) else p for p in placements)
                assert not kept or actual.placements == own, (op, placements, actual.placements)
                where = f"{op} {placements}, result {place}: "
                torch.testing.assert_close(actual.full_tensor(), plain, msg=lambda text, where=where: where + text)


def test_rows_of_a_token() -> None:
    """What is one value per token is sharded with the tokens, and whole where rows are sharded by heads."""
    mesh = dist.init_device_mesh("cpu", (2,))
    q, k, cache = torch.randn(6, 4, 16), torch.randn(6, 2, 16), torch.rand(9, 16)
    for kind in (torch.int32, torch.int64):
        positions = torch.tensor([3, 0, 8, 8, 1, 5], dtype=kind)
        plain_q, plain_k = q.clone(), k.clone()
        trial_library.rope(plain_q, plain_k, cache, positions)
        for rows, of_positions in ((Shard(0), Shard(0)), (Shard(1), Replicate()), (Replicate(), Replicate())):
            args = (on(mesh, q, rows), on(mesh, k, rows), on(mesh, cache, Replicate()), on(mesh, positions, of_positions))
            trial_library.rope.default(*args)
            torch.testing.assert_close(args[0].full_tensor(), plain_q)
            torch.testing.assert_close(args[1].full_tensor(), plain_k)
            assert (args[0].placements, args[1].placements) == ((rows,), (rows,))
        for of_q, of_k, of_positions in (
            (Shard(0), Shard(0), Replicate()),
            (Shard(1), Shard(1), Shard(0)),
            (Shard(0), Shard(1), Shard(0)),
            (Shard(2), Shard(2), Replicate()),
        ):
            args = (on(mesh, q, of_q), on(mesh, k, of_k), on(mesh, cache, Replicate()), on(mesh, positions, of_positions))
            said = message(lambda args=args: trial_library.rope.default(*args))
            assert "trial::rope: a DTensor that is written or passed by keyword cannot be redistributed" in said, said
            torch.testing.assert_close(args[0].full_tensor(), q)


def test_gradients() -> None:
    x, y, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((6, 4, 16), (6, 4, 16), (16,), (16,)))
    for op, tensors, placements in (
        (ops.rmsnorm, (x, weight), (Shard(0), Replicate())),
        (ops.rmsnorm, (x, weight), (Shard(1), Replicate())),
        (ops.rmsnorm, (x, weight), (Shard(2), Shard(0))),
        (ops.rmsnorm, (x, weight), (Replicate(), Replicate())),
        (ops.gemma_rmsnorm, (x, weight), (Shard(1), Replicate())),
        (ops.layernorm, (x, weight, bias), (Shard(0), Replicate(), Replicate())),
        (ops.layernorm, (x, weight), (Shard(0), Replicate())),
        (ops.silu_and_mul, (x,), (Shard(1),)),
        (ops.silu_mul, (x, y), (Shard(2), Shard(2))),
    ):
        plain = [tensor.clone().requires_grad_() for tensor in tensors]
        sharded = [on_line(tensor, p) for tensor, p in zip(plain, placements, strict=True)]
        for args in (plain, sharded):
            (op(*args) ** 3).sum().backward()
        for actual, expected in zip(sharded, plain, strict=True):
            torch.testing.assert_close(actual.grad.full_tensor(), expected.grad)


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rmsnorm(x, self.weight)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm()
        self.gate, self.up = (nn.Linear(16, 32, bias=False) for _ in range(2))
        self.down = nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(x)
        return x + self.down(ops.silu_mul(self.gate(hidden), self.up(hidden)))


def parallel(block: Block) -> nn.Module:
    """Tokens are sharded outside of the matrix products, and the intermediate dimension inside."""
    columns = ColwiseParallel(input_layouts=Shard(1), use_local_output=False)
    plan = {"norm": SequenceParallel(), "gate": columns, "up": columns, "down": RowwiseParallel(output_layouts=Shard(1))}
    return parallelize_module(block, dist.init_device_mesh("cpu", (2,)), plan)


def compare_with_one_process(run: Callable[[nn.Module], Callable[[Tensor], Tensor]]) -> None:
    """With the kernels, in float32."""
    torch.manual_seed(1)
    whole, x = Block(), torch.randn(3, 8, 16, requires_grad=True)
    block = parallel(copy.deepcopy(whole))
    own = x.detach().chunk(2, 1)[dist.get_rank()].contiguous().requires_grad_()
    expected, actual = whole(x), run(block)(own)
    for result in (expected, actual):
        result.square().sum().backward()
    torch.testing.assert_close(actual, expected.chunk(2, 1)[dist.get_rank()])
    torch.testing.assert_close(own.grad, x.grad.chunk(2, 1)[dist.get_rank()])
    for (name, parameter), (_, plain) in zip(block.named_parameters(), whole.named_parameters(), strict=True):
        assert isinstance(parameter, DTensor), name
        torch.testing.assert_close(parameter.grad.full_tensor(), plain.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_tensor_and_sequence_parallel_training() -> None:
    compare_with_one_process(lambda block: block)


def test_the_same_compiled() -> None:
    """As far as gradients and DTensor go, which is before Inductor comes: its C++ would take most of a minute to compile."""
    compare_with_one_process(lambda block: torch.compile(block, fullgraph=True, backend="aot_eager"))


def test_inductor() -> None:
    def run(x: Tensor, weight: Tensor) -> Tensor:
        return ops.silu_and_mul(ops.rmsnorm(x, weight))

    x, weight = torch.randn(6, 16), torch.randn(16)
    actual = torch.compile(run, fullgraph=True)(on_line(x, Shard(0)), on_line(weight, Replicate()))
    assert actual.placements == (Shard(0),)
    torch.testing.assert_close(actual.full_tensor(), run(x, weight))


def test_writing_ops_compiled() -> None:
    def run(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        x, residual = x + 1, residual + 2
        ops.fused_add_rmsnorm(x, residual, weight)
        return x * residual

    tensors = torch.randn(6, 16), torch.randn(6, 16), torch.randn(16)
    sharded = [on_line(tensor, p) for tensor, p in zip(tensors, (Shard(0), Shard(0), Replicate()), strict=True)]
    actual = torch.compile(run, fullgraph=True, backend="aot_eager")(*sharded)
    assert actual.placements == (Shard(0),)
    torch.testing.assert_close(actual.full_tensor(), run(*tensors))


def test_an_op_of_anybodys() -> None:
    x, by = torch.randn(6, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    results = scaled.default(on_line(x, Shard(0)), by=on_line(by, Replicate()))
    assert [result.placements for result in results] == [(Shard(0),), (Shard(0),), (Partial(),)]
    for actual, expected in zip(results, scaled.default(x, by=by), strict=True):
        torch.testing.assert_close(actual.full_tensor(), expected)


def test_a_shape_that_a_bool_decides() -> None:
    x = torch.randn(6, 4)
    sharded = on_line(x, Shard(0))
    for given in ({"twice": True}, {}, {"twice": True}):  # the first call of all, and each another than the last one
        assert widened.default(sharded, **given).shape == widened.default(x, **given).shape


def test_a_rule_of_the_users_stays() -> None:
    @register_sharding(negated.default)
    def linear(x: Any) -> list[Any]:
        return [([Partial()], [Partial()])]

    x = torch.randn(4, 4)
    actual = negated(on_line(x, Partial()))
    assert actual.placements == (Partial(),)
    torch.testing.assert_close(actual.full_tensor(), -x)


def test_out_forms() -> None:
    x, weight, out = on_line(torch.randn(6, 16), Shard(0)), on_line(torch.randn(16), Replicate()), torch.zeros(6, 16)

    def call(placement: Placement) -> DTensor:
        given = on_line(out, placement)
        ops.rmsnorm.out(x, weight, out=given)
        return given

    if not OUT_FORMS_RETURN:
        said = message(lambda: call(Shard(0)))
        assert said == "NotImplementedError: Operator jitk.rmsnorm.out does not have a sharding strategy registered."
        return
    torch.testing.assert_close(call(Shard(0)).full_tensor(), ops.rmsnorm(x, weight).full_tensor())
    for placement in (Replicate(), Shard(1)):
        assert "cannot be redistributed" in message(lambda placement=placement: call(placement))


def test_errors() -> str:
    x, few, weight = torch.randn(6, 16), torch.randn(1, 16), torch.randn(16)
    q, k = torch.randn(5, 4, 16), torch.randn(5, 2, 16)
    rows, all_rows = Shard(0), Replicate()

    def qknorm(placement: Placement) -> None:
        ops.fused_qknorm(on_line(q, placement), on_line(k, placement), *[on_line(weight, all_rows)] * 2)

    def add(first: Tensor, placements: Sequence[Placement]) -> None:
        ops.fused_add_rmsnorm(*[on_line(t, p) for t, p in zip((first, first, weight), placements, strict=True)])

    by_keyword = {"by": on_line(torch.randn(4), Shard(0))}
    said = [
        message(lambda: add(x, (Shard(1), Shard(1), all_rows))),
        message(lambda: add(x, (rows, all_rows, all_rows))),
        message(lambda: add(x, (rows, rows, Shard(0)))),
        message(lambda: add(few, (rows, rows, all_rows))),
        message(lambda: qknorm(Shard(2))),
        message(lambda: scaled(on_line(torch.randn(6, 4), Shard(0)), **by_keyword)),
        message(lambda: ops.add_constant(on_line(torch.ones(4, dtype=torch.int32), Shard(0)), 1)),
    ]
    return "\n".join(said)


TESTS = [function for name, function in list(globals().items()) if name.startswith("test_")]


def main() -> None:
    rank, rendezvous, findings = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=limit)
    found = {}
    for function in TESTS:
        torch.manual_seed(0)
        import time

        print(function.__name__, time.perf_counter(), file=sys.stderr)
        try:
            with fallback.allowed():  # float64 has no kernels
                found[function.__name__] = {"said": function()}
        except Exception:  # the next one may be right
            found[function.__name__] = {"failed": traceback.format_exc()}
    findings.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
