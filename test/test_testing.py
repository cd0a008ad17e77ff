"""``torch_jit_ops.testing.check``: what it finds in ops that break a promise."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import user_library
from expecttest import assert_expected_inline
from torch import Tensor

from torch_jit_ops import Op, OpLibrary, Rows, Sample, SampleMaker
from torch_jit_ops.testing import check

_KERNELS = """\
#include <jitk/result.h>
#include <jitk/tensor.h>

using namespace jitk;

const float* of(TensorView x) { return static_cast<const float*>(x.data_ptr()); }

template <int kFault>
void twice(TensorView x, Output& out) {
  if (kFault == 2 && x.numel() == 0) host::Panic("argument 'x' is empty");
  float* to = static_cast<float*>(out.empty_like(x).data_ptr());
  for (int64_t i = 0; i < x.numel(); ++i) to[i] = 2 * of(x)[i] * (kFault == 3 && i == 5 && !out.is_given() ? 1.0001f : 1.0f);
  if (kFault == 1 && out.is_given()) to[x.numel()] = 0;
  if (kFault == 4 && x.numel() > 0 && !out.is_given()) const_cast<float*>(of(x))[0] = 7;
}
"""
_numbers = itertools.count()


def _samples(make: SampleMaker) -> Iterator[Sample]:
    yield Sample((make.randn(7, 16),), note="a usual one")
    yield Sample((make.randn(3, 5, 8),), note="more dimensions")


def twice_with(folder: Path, fault: int = 0, **options: Any) -> Op:
    (folder / "twice.cpp").write_text(_KERNELS)
    library = OpLibrary(f"checked{next(_numbers)}", csrc=folder)

    def twice(x: Tensor) -> Tensor:
        return 2 * x

    declared = {"cpu": "twice.cpp", "variant": f"twice<{fault}>", "dtypes": (torch.float32,), "samples": _samples}
    return library.op(**{**declared, **options})(twice)


def complaint(op: Op) -> str:
    with pytest.raises(AssertionError) as caught:
        check(op)
    text = re.sub(r"checked\d+", "lib", str(caught.value))
    return "\n".join(re.sub(r"at \[0, 5\]: .*", "at [0, 5]: ...", line.rstrip()) for line in text.splitlines()[:2])


@pytest.mark.parametrize("op", [user_library.split_sign, user_library.accumulate, user_library.swap], ids=lambda op: op.name)
def test_a_right_op_passes(op: Op) -> None:
    check(op)


def test_an_op_without_a_kernel_passes(tmp_path: Path) -> None:
    check(twice_with(tmp_path, cpu=None, variant=None))


def test_an_op_without_samples_cannot_be_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        check(twice_with(tmp_path, samples=None))
    assert re.sub(r"checked\d+", "lib", str(caught.value)) == (
        "lib::twice declares no samples, so there is nothing to check it with"
    )


def test_a_kernel_that_breaks_a_promise(tmp_path: Path) -> None:
    texts = [complaint(twice_with(tmp_path, fault)) for fault in (1, 2, 3, 4)]
    assert_expected_inline(
        "\n".join(texts),
        """\
lib::twice on cpu with float32, sample 0 (a usual one): the out form
out: memory beside it was written
lib::twice on cpu with float32, sample 0 (a usual one): 0 tokens
lib::twice: argument 'x' is empty
lib::twice on cpu with float32, sample 0 (a usual one): the kernel and the function
result 0: 1 of 112 elements are wrong; the worst, at [0, 5]: ...
lib::twice on cpu with float32, sample 0 (a usual one): what it writes
argument 'x' was changed""",
    )


def test_rows_that_are_none(tmp_path: Path) -> None:
    library = OpLibrary(f"checked{next(_numbers)}", csrc=tmp_path)

    @library.op(rows=("x",), samples=_samples, dtypes=(torch.float32,))
    def total(x: Tensor) -> Tensor:
        return x.cumsum(0)

    assert complaint(total) == (
        "lib::total on cpu with float32, sample 0 (a usual one): torch.func.vmap\nresult 0 is not that of each row"
    )


def test_rows_that_are_not_what_they_are_declared(tmp_path: Path) -> None:
    def written(x: Tensor) -> None:
        x.copy_(x.cumsum(0))

    def mean(x: Tensor) -> Tensor:
        return x.mean(0)

    def last(x: Tensor) -> Tensor:
        return x.softmax(-1)

    library = OpLibrary(f"checked{next(_numbers)}", csrc=tmp_path)
    texts = []
    for function, options in (
        (written, {"mutates": ("x",)}),
        (mean, {"rows": Rows("x", sums=("out",))}),
        (last, {"rows": Rows("x", elementwise=True)}),
    ):
        declare = library.op(samples=_samples, dtypes=(torch.float32,), **{"rows": ("x",), **options})
        texts.append(complaint(declare(function)))
    assert_expected_inline(
        "\n".join(texts),
        """\
lib::written on cpu with float32, sample 0 (a usual one): rows
result 0 of halves along dimension 0 is not that of the whole
lib::mean on cpu with float32, sample 0 (a usual one): rows
result 0 of halves along dimension 0 is not that of the whole
lib::last on cpu with float32, sample 0 (a usual one): rows
result 0 of halves along dimension 1 is not that of the whole""",
    )


def test_positions_of_tokens(tmp_path: Path) -> None:
    """An argument with tokens alone goes along where tokens are split, and stays whole where heads are."""

    def samples(make: SampleMaker) -> Iterator[Sample]:
        yield Sample((make.randn(6, 4, 8), make.randn(6)), note="a usual one")

    def turned(x: Tensor, angles: Tensor) -> Tensor:
        return x * angles.cos()[..., None, None]

    def led(x: Tensor, angles: Tensor) -> Tensor:
        return x * angles[..., :1].cos()[..., None, None]

    library = OpLibrary(f"checked{next(_numbers)}", csrc=tmp_path)
    declare = library.op(rows=Rows("x", per_token=("angles",)), samples=samples, dtypes=(torch.float32,))
    check(declare(turned))
    assert complaint(declare(led)) == (
        "lib::led on cpu with float32, sample 0 (a usual one): rows\n"
        "result 0 of halves along dimension 0 is not that of the whole"
    )


def test_a_declaration_that_breaks_a_promise(tmp_path: Path) -> None:
    texts = [
        complaint(twice_with(tmp_path, fake=lambda x: x.new_empty(x.shape[:-1]))),
        complaint(twice_with(tmp_path, fake=lambda x: x.new_empty(x.shape, dtype=torch.float16))),
        complaint(twice_with(tmp_path, backward=lambda grad, x: grad)),
        complaint(twice_with(tmp_path, backward=lambda grad, x: (2 * grad).detach() * x / x.detach())),
    ]
    assert_expected_inline(
        "\n".join(texts),
        """\
lib::twice on cpu with float32, sample 0 (a usual one): the fake
result 0: shape [7, 16], the fake says [7]
lib::twice on cpu with float32, sample 0 (a usual one): the fake
result 0: dtype torch.float32, the fake says torch.float16
lib::twice on cpu with float32, sample 0 (a usual one): the derivative
Jacobian mismatch for output 0 with respect to input 0,
lib::twice on cpu with float32, sample 0 (a usual one): the derivative
Jacobian mismatch for output 0 with respect to input 0,""",
    )
