"""Runs a program as it is, fused, and in float64, and says what differs.

The float64 run takes from the plain one what numbers alone do not decide: what was drawn at random, and whether a cast was a
copy. A fused result may be wrong by four times the plain one's error in the same row, and by a few units in the last place.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from fuse_program import Program
from torch import Tensor
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from torch_jit_ops import registry

_CASTS = {"float", "half", "bfloat16", "double", "to", "type", "type_as"}
_RANDOM = {"randn_like", "rand_like", "normal", "bernoulli", "dropout", "randn", "rand", "poisson", "multinomial", "randperm"}
_RANDOM |= {"normal_", "uniform_", "bernoulli_", "random_", "exponential_", "log_normal_", "geometric_", "cauchy_", "rrelu"}
_RANDOM |= {"alpha_dropout", "feature_alpha_dropout", "gumbel_softmax", "randint_like", "empty_like", "dropout1d"}


class Undecided(Exception):
    """The float64 run went another way."""


@dataclass
class Outcome:
    """What came of a run. ``facts`` of each result: dtype, shape, strides, what it shares memory with, needs a gradient."""

    error: str = ""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    failed: str = ""  # in the backward pass


class _Log(TorchFunctionMode):
    """Writes down what the float64 run has to follow."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _CASTS:
            result = func(*args, **kwargs)
            same = isinstance(result, Tensor) and result is args[0]
            self.events.append((name, (same, result.dtype)))
            return result
        if name in _RANDOM:
            if name == "dropout":
                with torch._C.DisableTorchFunctionSubclass():
                    state = torch.get_rng_state()
                    mask = func(torch.ones_like(args[0]), *args[1:], **kwargs)
                    torch.set_rng_state(state)
                self.events.append((name, mask.detach().double()))
                return func(*args, **kwargs)
            result = func(*args, **kwargs)
            self.events.append((name, result.detach().clone()))
            return result
        return func(*args, **kwargs)


class _Exact(TorchFunctionMode):
    """Float64 throughout, but for what is narrower than the program's own numbers."""

    def __init__(self, events: list[tuple[str, Any]], base: torch.dtype, noise: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        self._events, self._place, self._base = events, 0, base
        self._noise, self._generator = noise, torch.Generator().manual_seed(seed)

    def _next(self, name: str) -> Any:
        if self._place >= len(self._events) or self._events[self._place][0] != name:
            raise Undecided(name)
        self._place += 1
        return self._events[self._place - 1][1]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self._run(func, args, dict(kwargs or {}))
        if (
            self._noise
            and type(result) is Tensor
            and result.dtype == torch.float64
            and not torch._C._functorch.is_functorch_wrapped_tensor(result)
        ):
            memory = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            if result.untyped_storage()._cdata not in memory:
                off = torch.rand(result.shape, generator=self._generator, dtype=torch.float64) * 2 - 1
                return result * (1 + self._noise * off)
        return result

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = getattr(func, "__name__", "")
        if name in _CASTS:
            same, dtype = self._next(name)
            if not dtype.is_floating_point:
                return func(*args, **kwargs)
            value = args[0]
            if self._narrows(dtype):
                return value.to(dtype).to(torch.float64)
            wide = value.to(torch.float64)
            return wide.clone() if wide is value and not same else wide
        if name in _RANDOM:
            drawn = self._next(name)
            if name.endswith("_"):
                return args[0].copy_(drawn)
            if name == "dropout":
                inplace = kwargs.get("inplace", len(args) > 3 and args[3])
                return args[0].mul_(drawn) if inplace else args[0] * drawn
            return drawn.double() if drawn.is_floating_point() else drawn
        if isinstance(kwargs.get("dtype"), torch.dtype) and kwargs["dtype"].is_floating_point:
            kwargs["dtype"] = torch.float64
        if name == "rms_norm" and kwargs.get("eps", args[3] if len(args) > 3 else None) is None:
            args, kwargs = args[:3], {**kwargs, "eps": torch.finfo(torch.promote_types(self._base, torch.float32)).eps}
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            if name.endswith("_") or kwargs.get("out") is not None:
                raise
        # Some functions have no float64, such as a quantisation.
        narrow = tree_map(lambda x: x.float() if isinstance(x, Tensor) and x.dtype == torch.float64 else x, (args, kwargs))
        result = func(*narrow[0], **narrow[1])
        return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.dtype == torch.float32 else x, result)

    def _narrows(self, dtype: torch.dtype) -> bool:
        mine, base = torch.finfo(dtype), torch.finfo(self._base)
        return mine.eps > base.eps or mine.max < base.max


# --- running ------------------------------------------------------------------------------------------


def _reset() -> None:
    """What a program that failed in the middle leaves behind."""
    while torch.autograd.forward_ad._current_level >= 0:
        torch.autograd.forward_ad.exit_dual_level()


@contextlib.contextmanager
def _around(program: Program) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if program.outside == "no_grad":
            stack.enter_context(torch.no_grad())
        elif program.outside == "inference":
            stack.enter_context(torch.inference_mode())
        elif program.outside == "autocast":
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        yield


def _wave(tensor: Tensor, step: float) -> Tensor:
    wave = torch.cos(torch.arange(tensor.numel(), dtype=torch.float64) * step + step)
    wave = (wave * 64).round() / 64  # numbers that every dtype has
    return wave.reshape(tensor.shape).to(tensor.dtype)


def _call(program: Program, function: Callable[..., Any], given: list[Tensor]) -> Any:
    if program.outside == "jvp":
        return torch.func.jvp(function, tuple(given), tuple(_wave(x, 0.7) for x in given))
    if program.outside == "dual":
        with torch.autograd.forward_ad.dual_level():
            duals = [torch.autograd.forward_ad.make_dual(x, _wave(x, 0.7)) for x in given]
            results = tree_leaves(function(*duals))
            pairs = [torch.autograd.forward_ad.unpack_dual(r) if isinstance(r, Tensor) else r for r in results]
            return [
                part for pair in pairs if isinstance(pair, tuple) for part in (pair[0].clone(), pair[1]) if part is not None
            ]
    if program.outside == "grad":
        total = lambda *xs: sum(r.double().sum() for r in tree_leaves(function(*xs)) if r.is_floating_point())  # noqa: E731
        return torch.func.grad(total, argnums=tuple(range(len(given))))(*given)
    if program.outside == "vmap":
        dims = tuple(0 if x.kind in ("rows", "wide") else None for x in program.inputs)
        return torch.func.vmap(function, dims)(*given)
    return function(*given)


def _run(
    program: Program,
    function: Callable[..., Any],
    dtype: torch.dtype | None = None,
    mode: contextlib.AbstractContextManager[Any] | None = None,
) -> Outcome:
    outcome = Outcome()
    mode = mode or contextlib.nullcontext()
    leaves = program.buffers(dtype)
    given = {name: leaf.clone() for name, leaf in leaves.items()}
    if program.grad:
        for name, leaf in leaves.items():
            if leaf.is_floating_point():
                given[name] = leaf.requires_grad_().clone()
    torch.manual_seed(program.seed)
    try:
        with _around(program), mode:
            made = [r for r in tree_leaves(_call(program, function, program.views(given))) if isinstance(r, Tensor)]
    except Undecided:
        raise
    except Exception as error:  # whatever a program raises is what it does
        outcome.error = f"{type(error).__name__}: {str(error)[:300]}"
        _reset()
        return outcome
    memory: dict[int, str] = {buffer.untyped_storage()._cdata: name for name, buffer in given.items()}
    for index, result in enumerate(made):
        place = memory.setdefault(result.untyped_storage()._cdata, f"result {index}") if result.numel() else ""
        offset = result.storage_offset() if place != f"result {index}" else 0
        strides = tuple(step for size, step in zip(result.shape, result.stride(), strict=True) if size > 1)
        wants = result.requires_grad
        outcome.facts[f"result {index}"] = (result.dtype, tuple(result.shape), strides, place, offset, wants)
        outcome.tensors[f"result {index}"] = result.detach().clone()
    outcome.tensors |= {f"argument {name}": buffer.detach().clone() for name, buffer in given.items()}
    roots = [r for r in made if r.requires_grad and r.is_floating_point()]
    if program.grad and roots:
        wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
        try:
            waves = [_wave(r, 0.3 + i) for i, r in enumerate(roots)]
            with mode:
                grads = torch.autograd.grad(roots, wanted, waves, allow_unused=True)
        except Undecided:
            raise
        except Exception as error:  # as above
            outcome.failed = f"{type(error).__name__}: {str(error)[:300]}"
            return outcome
        names = [name for name, leaf in leaves.items() if leaf.requires_grad]
        outcome.tensors |= {f"gradient {n}": g for n, g in zip(names, grads, strict=True) if g is not None}
    return outcome


def run_plain(program: Program) -> tuple[Outcome, list[tuple[str, Any]]]:
    log = _Log()
    with _quiet():
        return _run(program, program.function(), mode=log), log.events


def run_exact(program: Program, events: list[tuple[str, Any]], noise: float = 0.0, seed: int = 0) -> Outcome | None:
    """None where float64 went another way, as it may where nothing says what to follow.

    ``noise``: each call's results are off by up to so much, at random.
    """
    try:
        with _quiet():
            outcome = _run(program, program.function(), torch.float64, _Exact(events, program.dtype, noise, seed))
    except Undecided:
        return None
    return None if outcome.error else outcome


def backend_of(
    *passes: Callable[[torch.fx.Graph], None],
    counts: list[str] | None = None,
    then: Callable[[GraphModule, Any], Any] = lambda module, inputs: module.forward,
) -> Callable[..., Any]:
    """Runs what ``passes`` make of the graphs, and of the graphs within them, without Inductor."""

    def backend(module: GraphModule, inputs: Any) -> Callable[..., Any]:
        for part in reversed([part for part in module.modules() if isinstance(part, GraphModule)]):
            for change in passes:
                change(part.graph)
            part.graph.lint()
            part.recompile()
            if counts is not None:
                counts.extend(ops_of(part.graph))
        return then(module, inputs)

    return backend


def ops_of(graph: torch.fx.Graph) -> list[str]:
    """The ops of libraries that it calls."""
    declared = {op.default: op.qualified_name for op in registry.ops()}
    return [declared[node.target] for node in graph.nodes if node.op == "call_function" and node.target in declared]


def run_compiled(program: Program, **compile: Any) -> Outcome:
    torch._dynamo.reset()
    with _quiet():
        return _run(program, torch.compile(program.function(), dynamic=program.dynamic, **compile))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- comparing ----------------------------------------------------------------------------------------


def coarsest(program: Program, plain: Outcome) -> float:
    """The largest unit in the last place, relative, of what a program computes in."""
    text = program.source() + program.outside
    dtypes = {given.dtype for given in program.inputs if given.dtype.is_floating_point}
    dtypes |= {tensor.dtype for tensor in plain.tensors.values() if tensor.is_floating_point()}
    if "half" in text or "float16" in text:
        dtypes.add(torch.float16)
    if "float32" in text or ".float()" in text:
        dtypes.add(torch.float32)
    if "bfloat16" in text or "autocast" in text:
        dtypes.add(torch.bfloat16)
    return max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)


_TRIALS = 16


def difference(program: Program, plain: Outcome, events: list[tuple[str, Any]], exact: Outcome | None, fused: Outcome) -> str:
    """What is wrong with ``fused``; empty if nothing is.

    Where a rounding error decides, as next to the steps of a remainder, float64 with errors put in shows how much.
    """
    wrong = _difference(program, plain, exact, fused, {})
    if not wrong or exact is None or wrong.startswith(("raises", "backward")):
        return wrong
    spread: dict[str, Tensor] = {}
    for seed in range(_TRIALS):
        trial = run_exact(program, events, 2 * coarsest(program, plain), seed)
        for name, tensor in trial.tensors.items() if trial else ():
            truth = exact.tensors.get(name)
            if truth is not None and truth.shape == tensor.shape and truth.is_floating_point():
                off = (tensor - truth).abs()
                spread[name] = torch.maximum(spread[name], off) if name in spread else off
    return _difference(program, plain, exact, fused, spread)


def _difference(program: Program, plain: Outcome, exact: Outcome | None, fused: Outcome, spread: dict[str, Tensor]) -> str:
    if plain.error:
        return ""
    if fused.error:
        return f"raises {fused.error}"
    for name, facts in plain.facts.items():
        got = fused.facts.get(name)
        if got != facts:
            names = ("dtype", "shape", "strides", "memory", "offset", "requires_grad")
            wrong = [f"{n} {g}, expected {e}" for n, g, e in zip(names, got or (None,) * 6, facts, strict=True) if g != e]
            return f"{name}: {'; '.join(wrong)}"
    if fused.failed and not plain.failed:
        return f"backward raises {fused.failed}"
    unit = coarsest(program, plain)
    for name, tensor in plain.tensors.items():
        if name not in fused.tensors:
            if fused.failed or bool((tensor == 0).all()):
                continue
            return f"{name} is missing"
        truth = exact.tensors.get(name) if exact is not None else None
        if truth is not None and truth.shape != tensor.shape:
            truth = None
        wrong = _wrong(tensor, truth, fused.tensors[name], unit, spread.get(name))
        if wrong:
            return f"{name}: {wrong}"
    extra = [n for n, t in fused.tensors.items() if n not in plain.tensors and not plain.failed and bool((t != 0).any())]
    return f"{extra[0]} is there, and should not be" if extra else ""


def _wrong(plain: Tensor, truth: Tensor | None, fused: Tensor, unit: float, spread: Tensor | None) -> str:
    if plain.shape != fused.shape or plain.dtype != fused.dtype:
        return f"{fused.dtype} {list(fused.shape)}, expected {plain.dtype} {list(plain.shape)}"
    if plain.is_complex():
        plain, fused = torch.view_as_real(plain.resolve_conj()), torch.view_as_real(fused.resolve_conj())
        truth = torch.view_as_real(truth.resolve_conj()) if truth is not None and truth.is_complex() else None
    plain, fused = plain.double(), fused.double()
    truth = plain if truth is None else truth.double()
    same = (plain == fused) | (plain.isnan() & fused.isnan())
    if bool(same.all()):
        return ""
    finite = plain.isfinite() & truth.isfinite() & fused.isfinite()
    rows = plain.dim() > 0
    zero = torch.zeros_like(plain)
    own = torch.where(finite, (plain - truth).abs(), zero)
    size = torch.where(finite, truth.abs(), zero)
    if rows and plain.shape[-1] > 1:
        own, size = own.amax(-1, keepdim=True).expand_as(plain), size.amax(-1, keepdim=True).expand_as(plain)
    # Float64 is off by 1e-15 itself where it cancels, as in the tail of gelu.
    allowed = 4 * own + 8 * unit * size + 1e-15
    if spread is not None and spread.shape == allowed.shape:
        allowed = allowed + 2 * spread.nan_to_num(torch.inf)
    bad = torch.where(finite, (fused - truth).abs() > allowed, zero.bool())
    # Where one of them overflows, so may the fused one; or it is right.
    overflows = ~fused.isfinite() & (~plain.isfinite() | ~truth.isfinite())
    right = fused.isfinite() & truth.isfinite() & ((fused - truth).abs() <= 64 * unit * truth.abs())
    bad |= ~finite & ~same & ~overflows & ~right
    if not bool(bad.any()):
        return ""
    worst = int(torch.where(bad, ((fused - truth).abs() / allowed).nan_to_num(1e300), zero - 1).argmax())
    at = [int(i) for i in torch.unravel_index(torch.tensor(worst), plain.shape)] if rows else []
    of = lambda tensor: f"{tensor.flatten()[worst].item():.9g}"  # noqa: E731
    return f"{int(bad.sum())} of {bad.numel()} wrong; at {at} {of(fused)}, plain {of(plain)}, float64 {of(truth)}"
