"""What is measured: the ops of the registry, and the shapes, each with its reason."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import torch_jit_ops
from bench import plain_cache
from bench.recipes import RECIPES, Make, Recipe
from torch_jit_ops import Op
from torch_jit_ops.declaring.matcher import Size, TensorPattern
from torch_jit_ops.ops import spelling

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Operation:
    """A declared op, and what it is measured against: its function, or the form of it that PyTorch has a kernel for.

    Attributes:
        op: of the registry.
        axes: names of the sizes; that of the last dimension comes last.
        baseline: of the inputs, as the op's function is.
        recipe: makes the inputs where the declared shapes do not say them.
    """

    op: Op
    axes: tuple[str, ...]
    baseline: Callable[..., Any]
    recipe: Recipe | None = None

    @property
    def name(self) -> str:
        return self.op.name

    @property
    def reference(self) -> Callable[..., Any]:
        """The declared function: nothing of the package is called."""
        return self.op.reference

    @property
    def is_norm(self) -> bool:
        return self.reference.__module__.endswith(".norm")

    @property
    def written(self) -> tuple[int, ...]:
        """Indices of the inputs that are written; such an op has no out arguments."""
        return tuple(i for i, argument in enumerate(self.op.signature.arguments) if argument.written)

    @property
    def outs(self) -> tuple[str, ...]:
        """Names of the out arguments."""
        return self.op.declaration.outputs

    def inputs(self, make: Make, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        """The arguments of a call, floating ones drawn from a normal distribution."""
        if self.recipe is not None:
            return self.recipe.inputs(make, sizes)
        return tuple(make.randn(*shape) for shape in self.shapes(*sizes))

    def elements(self, sizes: Sequence[int]) -> int:
        """Elements read plus elements written: every argument once, those that are written in place twice.

        Without weights, which are a row of many, and would make the copy of as many bytes an odd one, and so a slow one.
        """
        if self.recipe is not None:
            return self.recipe.moved(sizes)
        read = self.shapes(*sizes)
        written = [read[index] for index in self.written] + self.out_shapes(sizes)
        return sum(math.prod(shape) for shape in read + written if len(shape) > 1)

    def out_shapes(self, sizes: Sequence[int]) -> list[Shape]:
        """Of the out arguments."""
        if not self.outs:
            return []
        inputs = self.inputs(Make(torch.float32, torch.device("meta")), sizes)
        return [tuple(made.shape) for made in self.results(*inputs)]

    def shapes(self, *sizes: int) -> list[Shape]:
        """Of the inputs, as they are declared."""
        of = dict(zip(self.axes, sizes, strict=True))
        inputs = [pattern for pattern in self.op.declaration.tensors if pattern.name not in self.op.declaration.outputs]
        return [tuple(size.number * of[size.name] if size.name else size.number for size in _sizes(each)) for each in inputs]

    def results(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What the function returns, or what it leaves in copies of the inputs that it writes; always a tuple."""
        return self._results(self.reference, *inputs)

    def baseline_results(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The same of the baseline."""
        return self._results(self.baseline, *inputs)

    def _results(self, function: Callable[..., Any], *inputs: Tensor) -> tuple[Tensor, ...]:
        given = [tensor.clone() if index in self.written else tensor for index, tensor in enumerate(inputs)]
        made = function(*given, **(self.recipe.keywords if self.recipe is not None else {}))
        if made is None:
            return tuple(given[index] for index in self.written)
        return made if isinstance(made, tuple) else (made,)


def _sizes(pattern: TensorPattern) -> tuple[Size, ...]:
    """The dimensions with one for all leading ones; ``[shape...]`` is ``[tokens, d]``."""
    leading = (Size(name="tokens"),) if pattern.leading else ()
    return leading + (pattern.sizes or (Size(name="d"),))


def _axes(op: Op) -> tuple[str, ...] | None:
    """Names of the sizes that decide a call; None where more than floating tensors of declared shapes decides it."""
    patterns = {pattern.name: pattern for pattern in op.declaration.tensors}
    names: dict[str, None] = {}
    for argument in op.signature.arguments:
        pattern = patterns.get(argument.name)
        if pattern is None:
            if argument.kind == "T" or argument.default is inspect.Parameter.empty:
                return None
            continue
        sizes = _sizes(pattern)
        if any(size.any for size in sizes) or any(not dtype.is_floating_point for dtype in pattern.dtypes):
            return None
        names |= dict.fromkeys(size.name for size in sizes if size.name)
    if not names:
        return None
    last = _sizes(op.declaration.tensors[0])[-1].name
    return (*(name for name in names if name != last), str(last))


# What a user would write instead of the op, where that is not what the op declares.
_BASELINES: dict[str, Callable[..., Any]] = {
    "layernorm": lambda input, weight, bias: spelling.layer_norm_of_pytorch(input, weight, bias, 1e-5),
    **plain_cache.BASELINES,
}


def operations_of(ops: Iterable[Op]) -> dict[str, Operation]:
    """Those of the ops whose calls can be made from sizes, by name."""
    found = {}
    for op in ops:
        recipe = RECIPES.get(op.name)
        axes = _axes(op) if recipe is None else recipe.axes
        if axes:
            found[op.name] = Operation(op, axes, _BASELINES.get(op.name, op.reference), recipe)
    return found


OPERATIONS = operations_of(torch_jit_ops.library.ops.values())


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

    def bytes(self, itemsize: int) -> int:
        return self.operation.elements(self.sizes) * itemsize


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


# Rotary embeddings: (tokens, q_heads, k_heads, rope_dim, head_dim). The first rows are those at which the peers' figures are
# recorded.
_ROPES = (
    (1, 32, 8, 128, 128),
    (128, 32, 8, 128, 128),
    (1024, 32, 8, 128, 128),
    (8192, 32, 8, 128, 128),
    (8192, 8, 1, 128, 128),
    (3, 64, 8, 128, 128),  # Llama 3 70B
    (77, 64, 8, 128, 128),
    (5000, 64, 8, 128, 128),
    (5000, 32, 8, 64, 64),
    (5000, 32, 32, 96, 96),  # Phi 3: no power of two
    (5000, 8, 4, 256, 256),  # Gemma 3
    (5000, 32, 32, 32, 80),  # Phi 2: a part of each head
)
_FEW_ROPES = (*_ROPES[:4], *_ROPES[6:7], *_ROPES[9:11])

# Stores: (tokens, heads, head_dim). The first rows are those at which the peers' figures are recorded.
_STORES = (
    (1, 8, 128),
    (128, 8, 128),
    (2048, 8, 128),
    (16384, 8, 128),
    (2048, 1, 128),  # narrow: several rows to a warp
    (3, 8, 128),
    (77, 8, 128),
    (5000, 8, 64),
    (5000, 8, 96),  # no power of two
    (5000, 8, 256),  # Gemma 3
)
_MLA = ((1, 512, 64), (128, 512, 64), (5000, 512, 64), (16384, 512, 64))  # DeepSeek
_DOWNCASTS = ((1, 8, 128), (128, 8, 128), (8192, 32, 128))

# Beside these, each op that has two sizes is measured at one of each regime.
_SIZES: dict[str, Sequence[tuple[int, ...]]] = {
    "silu_and_mul": _TARGETS + _OTHERS,
    "gelu_tanh_and_mul": _TARGETS + _OTHERS,
    "rmsnorm": _NORM_TARGETS + _NORM_OTHERS,
    "fused_add_rmsnorm": _NORM_TARGETS + _NORM_OTHERS,
    "fused_qknorm": _HEADS,
    "layernorm": _FEW + _NORM_TARGETS[-1:],
    "rmsnorm_backward": _GRADIENTS,
    "layernorm_backward": _GRADIENTS,
    "apply_rope": _ROPES,
    "rope": ((1, 32, 128, 128), (1024, 32, 128, 128), (8192, 32, 128, 128)),
    "apply_rope_store_kv": _FEW_ROPES,
    "fused_qknorm_rope": _FEW_ROPES,
    "fused_qknorm_rope_store_kv": _FEW_ROPES,
    "rope_qk": _FEW_ROPES,
    "rope_qk_backward": _FEW_ROPES,
    "store_kv_cache": _STORES,
    "store_mla_cache": _MLA,
    "gather_kv_cache": _STORES,
    "downcast_fp8": _DOWNCASTS,
}

CASES: tuple[Case, ...] = tuple(
    Case(name, sizes)
    for name, operation in OPERATIONS.items()
    for sizes in _SIZES.get(name, _FEW if len(operation.axes) == len(_FEW[0]) else ())
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
