"""What is measured: the operations in plain PyTorch, and the shapes, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Operation:
    """One op: what it means in plain PyTorch, and the shapes of its arguments.

    Attributes:
        reference: of the inputs; returns what is new, and for an op that works in place what the written inputs become.
        shapes: of the inputs, for the sizes of a case.
        axes: names of the sizes.
        written: indices of the inputs that are written; such an op has no out arguments.
        outs: names of the out arguments.
    """

    name: str
    reference: Callable[..., Tensor | tuple[Tensor, ...]]
    shapes: Callable[..., list[Shape]]
    axes: tuple[str, ...] = ("tokens", "d")
    written: tuple[int, ...] = ()
    outs: tuple[str, ...] = ("out",)
    is_norm: bool = False

    def results(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The reference's results, always as a tuple."""
        made = self.reference(*inputs)
        return made if isinstance(made, tuple) else (made,)


def _wide(count: int) -> Callable[[int, int], list[Shape]]:
    return lambda tokens, d: [(tokens, count * d)]


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


def _inverse_rms(x: Tensor) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def _float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _rmsnorm(input: Tensor, weight: Tensor) -> Tensor:
    x = _float(input)
    return (x * _inverse_rms(x) * weight).to(input.dtype)


def _gemma_rmsnorm(input: Tensor, weight: Tensor) -> Tensor:
    x = _float(input)
    return (x * _inverse_rms(x) * (_float(weight) + 1)).to(input.dtype)


def _layernorm(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(input, input.shape[-1:], weight, bias, 1e-5)


def _fused_add_rmsnorm(input: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    added = residual + input
    return _rmsnorm(added, weight), added


def _fused_qknorm(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
    return _rmsnorm(q, q_weight), _rmsnorm(k, k_weight)


def _rmsnorm_backward(grad: Tensor, input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    x, grad_y = _float(input), _float(grad)
    scale = _inverse_rms(x)
    normal = x * scale
    grad_normal = grad_y * weight
    grad_input = scale * (grad_normal - normal * (grad_normal * normal).mean(-1, keepdim=True))
    return grad_input.to(input.dtype), (grad_y * normal).sum(0).to(weight.dtype)


def _layernorm_backward(grad: Tensor, input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, grad_y = _float(input), _float(grad)
    x = x - x.mean(-1, keepdim=True)
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
    normal = x * scale
    grad_normal = grad_y * weight
    grad_input = scale * (
        grad_normal - grad_normal.mean(-1, keepdim=True) - normal * (grad_normal * normal).mean(-1, keepdim=True)
    )
    return grad_input.to(input.dtype), (grad_y * normal).sum(0).to(weight.dtype), grad_y.sum(0).to(weight.dtype)


_NORM = {"axes": ("tokens", "hidden"), "is_norm": True}
_GRADIENT = {**_NORM, "shapes": lambda tokens, hidden: [(tokens, hidden), (tokens, hidden), (hidden,)]}

OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("silu_and_mul", _silu_and_mul, _wide(2)),
        Operation("gelu_tanh_and_mul", _gelu_tanh_and_mul, _wide(2)),
        Operation("gelu_and_mul", _gelu_and_mul, _wide(2)),
        Operation("relu2", _relu2, _wide(1)),
        Operation("fused_add_relu", _fused_add_relu, lambda tokens, d: [(tokens, d), (tokens, d)]),
        Operation("rmsnorm", _rmsnorm, lambda tokens, hidden: [(tokens, hidden), (hidden,)], **_NORM),
        Operation("gemma_rmsnorm", _gemma_rmsnorm, lambda tokens, hidden: [(tokens, hidden), (hidden,)], **_NORM),
        Operation("layernorm", _layernorm, lambda tokens, hidden: [(tokens, hidden), (hidden,), (hidden,)], **_NORM),
        Operation(
            "fused_add_rmsnorm",
            _fused_add_rmsnorm,
            lambda tokens, hidden: [(tokens, hidden), (tokens, hidden), (hidden,)],
            written=(0, 1),
            outs=(),
            **_NORM,
        ),
        Operation(
            "fused_qknorm",
            _fused_qknorm,
            lambda tokens, q, k, d: [(tokens, q, d), (tokens, k, d), (d,), (d,)],
            axes=("tokens", "q_heads", "k_heads", "head_dim"),
            written=(0, 1),
            outs=(),
            is_norm=True,
        ),
        Operation("rmsnorm_backward", _rmsnorm_backward, outs=("grad_input", "grad_weight"), **_GRADIENT),
        Operation("layernorm_backward", _layernorm_backward, outs=("grad_input", "grad_weight", "grad_bias"), **_GRADIENT),
    )
}


@dataclass(frozen=True)
class Case:
    """One op at one size."""

    op: str
    sizes: tuple[int, ...]

    @property
    def operation(self) -> Operation:
        return OPERATIONS[self.op]

    @property
    def tokens(self) -> int:
        return self.sizes[0]

    @property
    def width(self) -> int:
        """The last size: d, hidden or head_dim."""
        return self.sizes[-1]

    @property
    def shape(self) -> str:
        return f"({', '.join(map(str, self.sizes))})"

    @property
    def input_shapes(self) -> list[Shape]:
        return self.operation.shapes(*self.sizes)

    @property
    def out_shapes(self) -> list[Shape]:
        """Of the out arguments."""
        inputs = [torch.empty(shape, device="meta") for shape in self.input_shapes]
        return [tuple(made.shape) for made in self.operation.results(*inputs)] if self.operation.outs else []

    def elements(self) -> int:
        """Elements read plus elements written: every argument once, those that are written in place twice.

        Without weights, which are a row of many, and would make the copy of as many bytes an odd one, and so a slow one.
        """
        read = self.input_shapes
        written = [read[index] for index in self.operation.written] + self.out_shapes
        return sum(math.prod(shape) for shape in read + written if len(shape) > 1)

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


# Norms: (tokens, hidden). The first rows are those at which the peers' figures are recorded.
_NORM_TARGETS = (
    (1, 4096),
    (1, 8192),
    (16, 4096),
    (128, 7168),
    (1024, 4096),
    (4096, 8192),
    (16384, 4096),
    (32768, 512),  # short rows: several to a block
)
_NORM_OTHERS = (
    (3, 2880),  # gpt-oss; too few rows to fill a GPU, and odd
    (77, 2880),
    (5000, 2880),
    (300, 3584),  # Qwen2 7B, Gemma 2 9B
    (5000, 3584),
    (3, 5120),  # Qwen2.5 32B, Llama 2 13B
    (300, 5120),
    (5000, 5120),
    (1, 16384),  # Llama 3 405B
    (77, 16384),
    (2048, 16384),
    (1, 65536),  # longer than a block's registers like
    (300, 65536),
    (1024, 65536),
)
_GRADIENTS = ((4096, 4096), (16384, 8192), (300, 2880), (32768, 512))

_HEADS = (
    (1, 32, 8, 128),
    (128, 32, 8, 128),
    (1024, 32, 8, 128),
    (8192, 32, 8, 128),
    (4096, 16, 2, 512),
    (4096, 8, 1, 64),
    (3, 16, 8, 128),  # Qwen3 0.6B, few tokens
    (77, 64, 4, 128),  # Qwen3 235B
    (5000, 32, 8, 80),  # a head_dim that is no power of two
    (300, 16, 4, 96),
    (5000, 8, 4, 256),  # Gemma 3
    (300, 16, 16, 192),
    (300, 4, 1, 1024),
)


def _cases(op: str, sizes: Sequence[tuple[int, ...]]) -> list[Case]:
    return [Case(op, each) for each in sizes]


CASES: tuple[Case, ...] = (
    *_cases("silu_and_mul", _TARGETS + _OTHERS),
    *_cases("gelu_tanh_and_mul", _TARGETS + _OTHERS),
    *_cases("gelu_and_mul", _FEW),
    *_cases("relu2", _FEW),
    *_cases("fused_add_relu", _FEW),
    *_cases("rmsnorm", _NORM_TARGETS + _NORM_OTHERS),
    *_cases("fused_add_rmsnorm", _NORM_TARGETS + _NORM_OTHERS),
    *_cases("fused_qknorm", _HEADS),
    *_cases("layernorm", _FEW + _NORM_TARGETS[-1:]),
    *_cases("gemma_rmsnorm", _FEW),
    *_cases("rmsnorm_backward", _GRADIENTS),
    *_cases("layernorm_backward", _GRADIENTS),
)

# `--quick`: one of each regime of the ops that carry the project.
_QUICK_SIZES = (*_FEW, *_TARGETS[3:4], *_NORM_TARGETS, (1024, 32, 8, 128))
QUICK: tuple[Case, ...] = tuple(
    case
    for case in CASES
    if case.op in ("silu_and_mul", "gelu_tanh_and_mul", "rmsnorm", "fused_add_rmsnorm", "fused_qknorm")
    and case.sizes in _QUICK_SIZES
)


def select(
    cases: Sequence[Case], ops: Sequence[str] = (), tokens: Sequence[int] = (), widths: Sequence[int] = ()
) -> tuple[Case, ...]:
    """The cases whose op, tokens and width (d, hidden or head_dim) are among those named; an empty list names all.

    A size that is not in the table becomes a case of its own when both its tokens and its width are named; the sizes between
    them are those of the op's first case.

    Raises:
        ValueError: an op is unknown, or nothing is left.
    """
    unknown = sorted(set(ops) - set(OPERATIONS))
    if unknown:
        raise ValueError(f"unknown op {', '.join(unknown)}; known: {', '.join(OPERATIONS)}")
    if tokens and widths:
        firsts = {case.op: case for case in reversed(CASES)}
        chosen = tuple(
            Case(op, (t, *firsts[op].sizes[1:-1], d))
            for op in (ops or dict.fromkeys(case.op for case in cases))
            for t in tokens
            for d in widths
        )
    else:
        chosen = tuple(
            case
            for case in cases
            if (not ops or case.op in ops) and (not tokens or case.tokens in tokens) and (not widths or case.width in widths)
        )
    if not chosen:
        raise ValueError("no case has these tokens and this width; name both --tokens and --d to measure any size")
    return chosen
