"""The trial library: ``check`` accepts its kernels, and none of many that are nearly right."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
import trial_library
from trial_library import FP8

from torch_jit_ops import Op, OpLibrary
from torch_jit_ops.testing import check

OPS = trial_library.library.ops
_numbers = itertools.count()


@pytest.mark.parametrize("name", OPS)
def test_passes(name: str) -> None:
    check(OPS[name])


def altered(folder: Path, op: Op, old: str, new: str) -> Op:
    """The op in a library of its own, with its kernel for the CPU altered in one place."""
    for file in Path(trial_library.__file__).with_name("csrc").iterdir():
        (folder / file.name).write_text(file.read_text())
    declaration = op.declaration
    kernel = declaration.kernels["cpu"]
    text = (folder / kernel.source).read_text()
    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {kernel.source}"
    (folder / kernel.source).write_text(text.replace(old, new))
    library = OpLibrary(f"altered{next(_numbers)}", csrc=folder, include=[folder])
    declare = library.op(
        cpu=kernel.source,
        variant=kernel.pattern.text,
        dtypes=dict(declaration.dtypes) if declaration.dtypes.shared is None else declaration.dtypes.shared,
        mutates=[argument.name for argument in declaration.signature.arguments if argument.written],
        outputs=declaration.outputs or None,
        rows=declaration.rows,
        samples=declaration.samples,
    )
    return declare(declaration.function)


_HALF_UP = """\
  const float exact = to_float(x[i]) / step;
  const float below = to_float(from_float<fp8_e4m3_t>(std::nextafter(exact, 0.0f)));
  const float above = to_float(from_float<fp8_e4m3_t>(std::nextafter(exact, exact * 2)));
  y[i] = from_float<fp8_e4m3_t>(std::fabs(below) == std::fabs(above) ? exact : above);
"""
_TRUNCATED = """\
  const float exact = to_float(x[i]) / step;
  y[i] = from_float<fp8_e4m3_t>(exact);
  if (std::fabs(to_float(y[i])) > std::fabs(exact)) --y[i].bits;
"""
_TO_BFLOAT = "from_float<T>(bits_as<float>(bits_as<uint32_t>({}) & 0xffff0000u))"
BF16, I32, I64 = torch.bfloat16, torch.int32, torch.int64

WRONG = {
    "a sign": ("rope", "a * cos[i] - b * sin[i]", "a * cos[i] + b * sin[i]", [BF16, I64]),
    "the position of the token before": ("rope", "(positions.data_ptr())[token]", "(positions.data_ptr())[token / 2]", [BF16]),
    "a position read in the other integer": ("rope", "<const Position*>", "<const int32_t*>", [BF16, I64]),
    "what was written is read again": (
        "rope",
        "b * cos[i] + a * sin[i]",
        "b * cos[i] + to_float(row[i]) * sin[i]",
        [BF16, I32],
    ),
    "k is left as it is": ("rope", "rotate(q, token), rotate(k, token)", "rotate(q, token)", [BF16, I32]),
    "a half that is cut off": (
        "rope",
        "from_float<T>(a * cos[i] - b * sin[i])",
        _TO_BFLOAT.format("a * cos[i] - b * sin[i]"),
        [BF16, I32],
    ),
    "v in the place of k": ("store_kv_cache", "store(k, k_cache, token, slot)", "store(v, k_cache, token, slot)", [BF16, I32]),
    "slot 0 is skipped": ("store_kv_cache", "if (slot < 0) continue;", "if (slot <= 0) continue;", [BF16, I32]),
    "-1 is slot 0": (
        "store_kv_cache",
        "token];\n",
        "token] < 0 ? 0 : static_cast<const Index*>(indices.data_ptr())[token];\n",
        [I64],
    ),
    "an fp8 that is cut off": (
        "store_kv_cache",
        "to[i] = from_float<Stored>(to_float(from[i]));",
        "to[i] = from_float<Stored>(to_float(from[i]) * (63.0f / 64));",
        {"k": [BF16], "k_cache": [FP8], "indices": [I32]},
    ),
    "quantised and cut off": (
        "quant_fp8_per_token",
        "y[i] = from_float<fp8_e4m3_t>(to_float(x[i]) / step);",
        f"{{{_TRUNCATED}}}",
        [BF16],
    ),
    "ties away from zero": (
        "quant_fp8_per_token",
        "y[i] = from_float<fp8_e4m3_t>(to_float(x[i]) / step);",
        f"{{{_HALF_UP}}}",
        [BF16],
    ),
    "the scale of the row before": (
        "quant_fp8_per_token",
        "[row * scales.stride] = step",
        "[row / 2 * scales.stride] = step",
        [BF16],
    ),
    "the scale's inverse": ("quant_fp8_per_token", "[row * scales.stride] = step", "[row * scales.stride] = 1 / step", [BF16]),
    "the largest number in place of the largest magnitude": (
        "quant_fp8_per_token",
        "std::fabs(to_float(x[i]))",
        "to_float(x[i])",
        [BF16],
    ),
    "a scale in bf16": (
        "quant_fp8_per_token",
        "const float step = largest / 448.0f",
        "const float step = to_float(from_float<bf16_t>(largest / 448.0f))",
        [BF16],
    ),
    "the id behind": (
        "topk_softmax",
        "static_cast<int32_t>(expert_of(best));",
        "static_cast<int32_t>(expert_of(best)) + 1;",
        [BF16],
    ),
    "the last of equals": (
        "topk_softmax",
        "rank < last && rank > best",
        "rank < last && rank >> 32 >= best >> 32",
        [BF16],
    ),
    "weights in the order of the experts": (
        "topk_softmax",
        "std::exp(to_float(x[expert_of(best)]) - largest)",
        "std::exp(to_float(x[k - 1 - place]) - largest)",
        [BF16],
    ),
    "a weight of another row": (
        "topk_softmax",
        "[row * weighed.stride + place]",
        "[(from.count - 1 - row) * weighed.stride + place]",
        [BF16],
    ),
    "the best twice": ("topk_softmax", "rank < last && rank > best", "rank <= last && rank > best", [BF16]),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_kernel_that_is_nearly_right_is_noticed(fault: str, tmp_path: Path) -> None:
    name, old, new, dtypes = WRONG[fault]
    with pytest.raises(AssertionError) as caught:
        check(altered(tmp_path, OPS[name], old, new), dtypes=dtypes)
    lines = str(caught.value).splitlines()
    assert re.search(r"(the kernel and the function|rounding)$", lines[0]), caught.value
    assert re.search(r"elements are wrong|on average", lines[1]), caught.value


def test_what_is_right_in_another_way_passes(tmp_path: Path) -> None:
    """The reciprocal of the scale is off by a rounding error, and decides ties that only a rounding error made."""
    other = "y[i] = from_float<fp8_e4m3_t>(to_float(x[i]) * (1 / step))"
    check(
        altered(tmp_path, OPS["quant_fp8_per_token"], "y[i] = from_float<fp8_e4m3_t>(to_float(x[i]) / step)", other),
        dtypes=[BF16],
    )
