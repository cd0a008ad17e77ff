"""Outputs in memory that Inductor plans (PyTorch 2.13): the functional form becomes the out form in generated code."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from cases import (
    Case,
    call,
    copy_with_storage,
    has_out,
    has_tokens,
    is_first_of_op,
    is_floating,
    outcome,
    over,
    poisoned,
    with_tokens,
)
from expecttest import assert_expected_inline
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import torch_jit_ops
from torch_jit_ops import Sample
from torch_jit_ops.declaring.signature import OUT_FORMS_RETURN
from torch_jit_ops.features import planned_out

planned = pytest.mark.skipif(not OUT_FORMS_RETURN, reason="Inductor plans the outputs of custom ops from PyTorch 2.13")


@planned
@over(has_out, is_first_of_op)
def test_pytorch_finds_the_out_form(case: Case) -> None:
    from torch._library._out_variant import check_out_variant

    check_out_variant(case.op.default, case.op.out)


@over(has_out, is_floating, is_first_of_op)
def test_the_out_form_returns_its_outputs_or_nothing(case: Case) -> None:
    sample = case.sample()
    outs = [poisoned(tensor.shape, tensor.dtype, case.device) for tensor in call(case.op, sample).tensors]
    kwargs = dict(zip(case.op.declaration.outputs, outs, strict=True))
    # No kernel serves float64: the reference does. Indices stay integers.
    for change in (lambda tensor: tensor, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor):
        given = [change(arg) if isinstance(arg, Tensor) else arg for arg in sample.args]
        if not OUT_FORMS_RETURN:
            assert case.op.out(*sample.args, **sample.kwargs, **kwargs) is None
            continue
        outs = [torch.empty_like(tensor) for tensor in call(case.op, Sample(tuple(given), sample.kwargs)).tensors]
        returned = case.op.out(*given, **sample.kwargs, **dict(zip(case.op.declaration.outputs, outs, strict=True)))
        for out, result in zip(outs, returned if isinstance(returned, (tuple, list)) else [returned], strict=True):
            assert result is out


def differs_in_form(case: Case) -> bool:
    """One op of each form: a result, several, options by keyword, constants between the arguments."""
    return case.op.name in ("silu_and_mul", "layernorm_backward", "split_sign", "affine", "scale_shift")


@over(has_out, has_tokens, is_first_of_op, differs_in_form)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_generated_code_calls_the_out_form(case: Case, dynamic: bool) -> None:
    def run(args: Any, kwargs: dict[str, Any]) -> Any:
        results = case.op.default(*[arg + arg if isinstance(arg, Tensor) else arg for arg in args], **kwargs)
        return tuple(results) if isinstance(results, (tuple, list)) else results

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic)
    results, [code] = run_and_get_code(compiled, case.sample().args, dict(case.sample().kwargs))
    name = f"torch.ops.{case.op.declaration.namespace}.{case.op.name}"
    assert len(re.findall(rf"= {re.escape(name)}\.{'out' if OUT_FORMS_RETURN else 'default'}\(", code)) == 1, code
    for tokens in (None, 5, 64) if dynamic else (None,):
        sample = case.sample() if tokens is None else with_tokens(case.sample(), tokens)
        results = compiled(sample.args, dict(sample.kwargs))
        expected = run(sample.args, dict(sample.kwargs))
        for (_, tensor), (_, plain) in zip(
            outcome(case.op, copy_with_storage(sample), results), outcome(case.op, sample, expected), strict=True
        ):
            assert torch.equal(tensor, plain)
            assert tensor.stride() == plain.stride()


@planned
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_memory_is_used_again(dynamic: bool) -> None:
    op = torch_jit_ops.ops.activation.relu2.default
    _, [code] = run_and_get_code(torch.compile(lambda x: op(op(op(x + x))), dynamic=dynamic), torch.randn(6, 16))
    lines = [
        re.sub(r"empty_strided_cpu\(.*", "empty_strided_cpu(...)", line.strip())
        for line in code.partition("def call")[2].partition("return")[0].splitlines()
        if re.search(r"buf\d+ = |del buf", line)
    ]
    assert_expected_inline(
        "\n".join(lines),
        """\
buf0 = empty_strided_cpu(...)
buf2 = empty_strided_cpu(...)
buf1 = torch.ops.jitk.relu2.out(buf0, out=buf2)
del buf1
buf4 = buf0; del buf0  # reuse
buf3 = torch.ops.jitk.relu2.out(buf2, out=buf4)
del buf3
buf6 = buf2; del buf2  # reuse
buf5 = torch.ops.jitk.relu2.out(buf4, out=buf6)
del buf4""",
    )


@pytest.mark.parametrize("kept", [0, 1])
def test_a_result_that_nobody_reads(kept: int) -> None:
    """Inductor removes its buffer, but the out form writes it."""
    op = torch.ops.jitk.rmsnorm_backward.default

    def run(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return op(grad + 1, x, weight)[kept] + 1

    given = torch.randn(6, 16), torch.randn(6, 16), torch.randn(16)
    torch.testing.assert_close(torch.compile(run, fullgraph=True)(*given), run(*given))


@planned
def test_an_inductor_of_another_kind_is_served_by_its_own_lowering(monkeypatch: pytest.MonkeyPatch) -> None:
    """These parts are PyTorch's own affair: a version that changes them must not break a model."""

    monkeypatch.delattr(torch._inductor.ir, "AllocatingMultiOutput")
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    planned_out._warn_once.cache_clear()
    op, x = torch_jit_ops.ops.activation.relu2.default, torch.randn(6, 16)
    with pytest.warns(UserWarning, match="Inductor") as warned:
        made = torch.compile(lambda x: op(op(x + x)) * 2, fullgraph=True)(x)
    torch.testing.assert_close(made, op(op(x + x)) * 2)
    assert_expected_inline(
        "\n".join(str(warning.message) for warning in warned),
        """\
torch_jit_ops does not know the Inductor of PyTorch 9.9.9, and leaves ops' results to it
  AttributeError: module 'torch._inductor.ir' has no attribute 'AllocatingMultiOutput'""",
    )
