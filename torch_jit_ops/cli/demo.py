"""Build a small Llama-style model twice, in plain PyTorch and with jitk ops, run both eagerly and through
torch.compile(fullgraph=True), check every result against plain PyTorch in float64, and time them.

The kernels compile on their first call, which is shown. A second run finds them in the cache. Runs on the GPU if there is one.

examples:
  python -m torch_jit_ops demo
  python -m torch_jit_ops demo --device cpu --dtype float32
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_jit_ops.backends import CPU, CUDA
from torch_jit_ops.builder.load import load
from torch_jit_ops.calling import dispatcher

# The op of each gated activation, and the activation in plain PyTorch.
_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "silu": (lambda x: torch.ops.jitk.silu_and_mul(x), F.silu),
    "gelu": (lambda x: torch.ops.jitk.gelu_and_mul(x), F.gelu),
    "gelu_tanh": (lambda x: torch.ops.jitk.gelu_tanh_and_mul(x), lambda x: F.gelu(x, approximate="tanh")),
}


@dataclass(frozen=True)
class Functions:
    """What the two models differ in.

    Attributes:
        gated: of gate and up, side by side.
        norm: of a tensor and a weight.
        add_norm: of a tensor, the residual and a weight; the norm of the new residual, and that.
    """

    gated: Callable[[Tensor], Tensor]
    norm: Callable[[Tensor, Tensor], Tensor]
    add_norm: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _plain(activation: Callable[[Tensor], Tensor]) -> Functions:
    def gated(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return activation(gate) * up

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, 1e-6)

    def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        residual = residual + x
        return norm(residual, weight), residual

    return Functions(gated, norm, add_norm)


def _jitk(gated: Callable[[Tensor], Tensor]) -> Functions:
    def norm(x: Tensor, weight: Tensor) -> Tensor:
        y: Tensor = torch.ops.jitk.rmsnorm(x, weight)
        return y

    def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        torch.ops.jitk.fused_add_rmsnorm(x, residual, weight)
        return x, residual

    return Functions(gated, norm, add_norm)


_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Size:
    """Llama 3 8B's proportions, scaled down."""

    hidden: int = 512
    intermediate: int = 1792
    layers: int = 2
    heads: int = 8
    kv_heads: int = 2
    vocabulary: int = 4096


class Attention(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.head_dim = size.hidden // size.heads
        self.splits = (size.heads * self.head_dim, size.kv_heads * self.head_dim, size.kv_heads * self.head_dim)
        self.qkv = nn.Linear(size.hidden, sum(self.splits), bias=False)
        self.out = nn.Linear(size.hidden, size.hidden, bias=False)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in self.qkv(x).split(self.splits, -1))
        y = F.scaled_dot_product_attention(_rotate(q, rotation), _rotate(k, rotation), v, is_causal=True, enable_gqa=True)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    cos, sin = rotation
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Mlp(nn.Module):
    """``down(activation(gate) * up)``; gate and up come from one matrix product, side by side."""

    def __init__(self, size: Size, functions: Functions) -> None:
        super().__init__()
        self.gate_up = nn.Linear(size.hidden, 2 * size.intermediate, bias=False)
        self.down = nn.Linear(size.intermediate, size.hidden, bias=False)
        self.gated = functions.gated

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.gated(self.gate_up(x)))
        return y


class Norm(nn.Module):
    """RMSNorm of the residual stream, to which it adds what the layer before has made."""

    def __init__(self, size: Size, functions: Functions) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size.hidden))
        self.functions = functions

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if residual is None:
            return self.functions.norm(x, self.weight), x
        return self.functions.add_norm(x, residual, self.weight)


class Block(nn.Module):
    def __init__(self, size: Size, functions: Functions) -> None:
        super().__init__()
        self.attention_norm = Norm(size, functions)
        self.attention = Attention(size)
        self.mlp_norm = Norm(size, functions)
        self.mlp = Mlp(size, functions)

    def forward(self, x: Tensor, residual: Tensor | None, rotation: Tensor) -> tuple[Tensor, Tensor]:
        x, residual = self.attention_norm(x, residual)
        x, residual = self.mlp_norm(self.attention(x, rotation), residual)
        return self.mlp(x), residual


class Llama(nn.Module):
    frequencies: Tensor

    def __init__(self, size: Size, functions: Functions) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.hidden)
        self.blocks = nn.ModuleList(Block(size, functions) for _ in range(size.layers))
        self.norm = Norm(size, functions)
        self.head = nn.Linear(size.hidden, size.vocabulary, bias=False)
        head_dim = size.hidden // size.heads
        self.register_buffer("frequencies", 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x, residual = self.embedding(tokens), None
        angles = torch.outer(torch.arange(tokens.shape[1], device=tokens.device), self.frequencies)
        rotation = torch.stack((angles.cos(), angles.sin())).to(x.dtype)
        for block in self.blocks:
            x, residual = block(x, residual, rotation)
        x, _ = self.norm(x, residual)
        logits: Tensor = self.head(x)
        return logits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = (CUDA if CUDA.is_here() else CPU).device_type
    parser.add_argument("--device", default=default, help="default here: %(default)s")
    parser.add_argument(
        "--dtype", choices=_DTYPES, default="bfloat16" if CUDA.is_here() else "float32", help="default: %(default)s"
    )
    parser.add_argument("--activation", choices=_ACTIVATIONS, default="silu", help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=128, help="length of the sequence (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    torch.manual_seed(0)
    size, device, dtype = Size(), torch.device(options.device), _DTYPES[options.dtype]
    op, activation = _ACTIVATIONS[options.activation]
    plain = _plain(activation)
    model = Llama(size, plain).to(device, dtype).eval()
    with_jitk = Llama(size, _jitk(op)).to(device, dtype).eval()
    with_jitk.load_state_dict(model.state_dict())
    truth_model = Llama(size, plain).to(device, torch.float64).eval()
    truth_model.load_state_dict(model.state_dict())
    tokens = torch.randint(size.vocabulary, (2, options.tokens), device=device)
    parameters = sum(parameter.numel() for parameter in model.parameters())

    console = Console(soft_wrap=True)
    place = torch.cuda.get_device_name(device) if CUDA.serves(device) else "the CPU"
    console.print(
        f"a Llama of {size.layers} layers, hidden {size.hidden}, intermediate {size.intermediate}, "
        f"{parameters / 1e6:.0f} M parameters, {options.dtype}, on {place}; PyTorch {torch.__version__}"
    )
    console.print("compiling what is not in the caches, which takes the most of the time:")
    with torch.inference_mode():
        truth = truth_model(tokens)
        candidates: dict[str, Callable[[Tensor], Tensor]] = {
            "plain, eager": model,
            "jitk, eager": with_jitk,
            "plain, torch.compile": torch.compile(model, fullgraph=True),
            "jitk, torch.compile fullgraph": torch.compile(with_jitk, fullgraph=True),
        }
        results = {}
        for name, forward in candidates.items():
            start = time.perf_counter()
            error = ((forward(tokens).double() - truth).norm() / truth.norm()).item()
            results[name] = (time.perf_counter() - start, error)
        # What compiles in the background would share the processor with what is timed.
        with contextlib.suppress(RuntimeError):
            load(dispatcher.autograd_unit())
        times = _interleaved(candidates, tokens)

    allowed = 2 * results["plain, eager"][1]
    table = Table("model", "first call", "per call", "error against float64", box=None, pad_edge=False)
    for name, (first, error) in results.items():
        right = error <= allowed
        table.add_row(name, f"{first:.2f} s", f"{times[name] * 1e3:.2f} ms", f"{error:.1e}{'' if right else '  WRONG'}")
    console.print(table)
    wrong = [name for name, (_, error) in results.items() if not error <= allowed]
    if wrong:
        console.print(f"failed: the error may be at most twice that of plain PyTorch in {options.dtype}, {allowed:.1e}")
        return 1
    console.print("all agree: no error is above twice that of plain PyTorch")
    return 0


def _interleaved(candidates: dict[str, Callable[[Tensor], Tensor]], tokens: Tensor, rounds: int = 9) -> dict[str, float]:
    """Median seconds per call, the candidates in turn, so that a noisy moment meets all of them."""
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, forward in candidates.items():
            start = time.perf_counter()
            forward(tokens)
            if tokens.is_cuda:
                torch.cuda.synchronize()
            taken[name].append(time.perf_counter() - start)
    return {name: sorted(values)[rounds // 2] for name, values in taken.items()}
