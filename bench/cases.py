"""What is measured: the operations in plain PyTorch, and the shapes, each with its reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Operation:
    """One op: what it means in plain PyTorch, and the widths of its arguments in units of ``d``."""

    name: str
    reference: Callable[..., Tensor]
    input_widths: tuple[int, ...]

    def input_shapes(self, tokens: int, d: int) -> list[tuple[int, int]]:
        return [(tokens, width * d) for width in self.input_widths]


def _silu_and_mul(input: Tensor) -> Tensor:
    gate, up = input.chunk(2, -1)
    return F.silu(gate) * up


def _gelu_and_mul(input: Tensor) -> Tensor:
    gate, up = input.chunk(2, -1)
    return F.gelu(gate) * up


def _gelu_tanh_and_mul(input: Tensor) -> Tensor:
    gate, up = input.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


def _relu2(input: Tensor) -> Tensor:
    return F.relu(input).square()


def _fused_add_relu(x: Tensor, y: Tensor) -> Tensor:
    return F.relu(x + y)


OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("silu_and_mul", _silu_and_mul, (2,)),
        Operation("gelu_tanh_and_mul", _gelu_tanh_and_mul, (2,)),
        Operation("gelu_and_mul", _gelu_and_mul, (2,)),
        Operation("relu2", _relu2, (1,)),
        Operation("fused_add_relu", _fused_add_relu, (1, 1)),
    )
}


@dataclass(frozen=True)
class Case:
    """One op at one size: output [tokens, d]."""

    op: str
    tokens: int
    d: int

    @property
    def operation(self) -> Operation:
        return OPERATIONS[self.op]

    @property
    def shape(self) -> str:
        return f"({self.tokens}, {self.d})"

    def elements(self) -> int:
        """Elements read plus elements written: every argument once."""
        read = sum(rows * width for rows, width in self.operation.input_shapes(self.tokens, self.d))
        return read + self.tokens * self.d

    def bytes(self, itemsize: int) -> int:
        return self.elements() * itemsize


# Sizes at which the peers' figures are recorded.
_TARGETS = (
    (1, 4096),  # decoding one sequence: launch latency is all there is
    (1, 14336),  # the same at the intermediate size of Llama 3 8B
    (16, 4096),  # a small decoding batch: fewer blocks than multiprocessors
    (128, 14336),  # a full decoding batch: 11 MB, would sit in L2 if it were not cold
    (1024, 4096),  # a chunk of prefill, 25 MB: between latency and bandwidth
    (4096, 14336),  # prefill of Llama 3 8B: bandwidth alone, many waves
    (16384, 4096),  # many tokens, narrow: bandwidth alone, most blocks
)

# Sizes that a kernel tuned to the table above could lose.
_WIDTHS = (
    2880,  # gpt-oss: no power of two divides it beyond 64
    3584,  # Qwen2 7B, Gemma 2 9B: 7 * 512, no divisor of a large block
    11008,  # Llama 2 7B: 43 * 256, an odd number of vectors per thread
)
_TOKENS = (
    1,  # one row must still fill what it can
    3,  # too few rows to spread by rows, and odd
    77,  # between half and all of the multiprocessors of a large GPU, and odd
    5000,  # no multiple of any tile
)
_OTHERS = tuple((tokens, d) for d in _WIDTHS for tokens in _TOKENS)

# One of each regime for ops that share the kernel of those above.
_FEW = (
    (1, 4096),  # latency
    (77, 2880),  # odd in both
    (1024, 4096),  # between
    (4096, 14336),  # bandwidth
)


def _cases(op: str, sizes: Sequence[tuple[int, int]]) -> list[Case]:
    return [Case(op, tokens, d) for tokens, d in sizes]


CASES: tuple[Case, ...] = (
    *_cases("silu_and_mul", _TARGETS + _OTHERS),
    *_cases("gelu_tanh_and_mul", _TARGETS + _OTHERS),
    *_cases("gelu_and_mul", _FEW),
    *_cases("relu2", _FEW),
    *_cases("fused_add_relu", _FEW),
)

# `--quick`: one of each regime of the two ops that carry the project.
QUICK: tuple[Case, ...] = tuple(
    case for case in CASES if case.op in ("silu_and_mul", "gelu_tanh_and_mul") and (case.tokens, case.d) in _FEW + _TARGETS[3:4]
)


def select(
    cases: Sequence[Case], ops: Sequence[str] = (), tokens: Sequence[int] = (), widths: Sequence[int] = ()
) -> tuple[Case, ...]:
    """The cases whose op, tokens and d are among those named; an empty list names all.

    A size that is not in the table becomes a case of its own when both its tokens and its d are named.

    Raises:
        ValueError: an op is unknown, or nothing is left.
    """
    unknown = sorted(set(ops) - set(OPERATIONS))
    if unknown:
        raise ValueError(f"unknown op {', '.join(unknown)}; known: {', '.join(OPERATIONS)}")
    if tokens and widths:
        chosen = tuple(
            Case(op, t, d) for op in (ops or dict.fromkeys(case.op for case in cases)) for t in tokens for d in widths
        )
    else:
        chosen = tuple(
            case
            for case in cases
            if (not ops or case.op in ops) and (not tokens or case.tokens in tokens) and (not widths or case.d in widths)
        )
    if not chosen:
        raise ValueError("no case has these tokens and d; name both --tokens and --d to measure any size")
    return chosen
