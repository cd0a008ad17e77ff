"""Who is measured: this library, and everybody who offers the same op.

A provider is bound to an operation before it is timed; binding imports it, and may compile. What cannot be had raises
``Unavailable`` with the reason, which the report prints: a peer that is missing or broken never ends a benchmark.
"""

from __future__ import annotations

import functools
import importlib
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TypeVar

import torch
from torch import Tensor

from bench import cache_peers
from bench.cases import OPERATIONS, Operation
from bench.slots import Slot


class Unavailable(Exception):
    """A provider that cannot be measured here, and why."""


Call = Callable[[Slot], object]
Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Provider:
    """``bind(operation)`` gives the call that is timed; its result is in ``slot.out`` when ``writes_out``."""

    name: str
    title: str
    bind: Callable[[Operation], Call]
    is_peer: bool = True
    writes_out: bool = True


def reason(error: BaseException) -> str:
    """One line that says what went wrong, for a report."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no message"
    if not isinstance(error, Unavailable):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= 300 else text[:297] + "..."


@functools.cache
def _attempt(load: Callable[[], Loaded]) -> tuple[Loaded | None, str]:
    """What ``load`` returns, or None and why not. A second attempt would cost as much, and may fail for another reason."""
    try:
        return load(), ""
    except Exception as error:  # Whatever stops a provider is the answer to why its column is empty.
        return None, reason(error)


def _loaded(load: Callable[[], Loaded]) -> Loaded:
    """What ``load`` returns, tried once per process. Raises ``Unavailable`` each time if it failed."""
    found, why = _attempt(load)
    if found is None:
        raise Unavailable(why)
    return found


def _import_jitk() -> types.ModuleType:
    try:
        return importlib.import_module("torch_jit_ops")
    except Exception as error:
        raise Unavailable(f"import torch_jit_ops: {reason(error)}") from error


def jitk_packet(name: str) -> torch._ops.OpOverloadPacket:
    """``torch.ops.jitk.<name>``, with the package imported.

    Raises:
        Unavailable: the package or the op is not there.
    """
    _loaded(_import_jitk)
    if not hasattr(torch.ops.jitk, name):
        raise Unavailable(f"torch.ops.jitk.{name} is not registered")
    return getattr(torch.ops.jitk, name)


def _bind_jitk(operation: Operation) -> Call:
    packet = jitk_packet(operation.name)
    if not operation.outs:
        overload = packet.default

        def in_place(slot: Slot) -> None:
            overload(*slot.inputs)

        return in_place
    overload = packet.out
    if len(operation.outs) == 1:

        def into_one(slot: Slot) -> None:
            overload(*slot.inputs, out=slot.out)

        return into_one

    def into_several(slot: Slot) -> None:
        overload(*slot.inputs, **dict(zip(operation.outs, slot.outs, strict=True)))

    return into_several


# What a fused op does, by ops of which each has a launch of its own: names of the arguments of each.
_PARTS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {}
_PARTS["apply_rope_store_kv"] = (
    ("apply_rope", ("q", "k", "cos_sin_cache", "positions")),
    ("store_kv_cache", ("k", "v", "k_cache", "v_cache", "indices")),
)
_PARTS["fused_qknorm_rope"] = (
    ("fused_qknorm", ("q", "k", "q_weight", "k_weight")),
    ("apply_rope", ("q", "k", "cos_sin_cache", "positions")),
)
_PARTS["fused_qknorm_rope_store_kv"] = (*_PARTS["fused_qknorm_rope"], _PARTS["apply_rope_store_kv"][1])


def _bind_parts(operation: Operation) -> Call:
    if operation.name not in _PARTS:
        raise Unavailable("is no fusion of ops")
    names = [argument.name for argument in operation.op.signature.arguments]
    calls = [
        (jitk_packet(part).default, [names.index(argument) for argument in arguments])
        for part, arguments in _PARTS[operation.name]
    ]

    def call(slot: Slot) -> None:
        for overload, places in calls:
            overload(*(slot.inputs[place] for place in places))

    return call


def _bind_copy(operation: Operation) -> Call:
    def call(slot: Slot) -> None:
        slot.copy_to.copy_(slot.copy_from)

    return call


def _bind_eager(operation: Operation) -> Call:
    def call(slot: Slot) -> None:
        operation.baseline(*slot.inputs)

    return call


def compiled_reference(operation: Operation) -> Callable[..., None]:
    """``torch.compile`` of the plain PyTorch, writing into given results, specialised to the shapes that it meets."""

    def into(results: Sequence[Tensor], *inputs: Tensor) -> None:
        for result, made in zip(results, operation.baseline_results(*inputs), strict=True):
            result.copy_(made)

    # Without this the tenth shape would meet the recompilation limit and run eagerly.
    torch._dynamo.reset()
    return torch.compile(into, dynamic=False, fullgraph=True)


def _bind_inductor(operation: Operation) -> Call:
    into = compiled_reference(operation)
    made_anew = torch.compile(operation.baseline_results, dynamic=False, fullgraph=True)

    def call(slot: Slot) -> None:
        if operation.written and slot.inputs[0].device.type == "cpu":
            # Inductor's C++ backend raises KeyError where results go into arguments that they come from (2.13).
            for result, made in zip(slot.results, made_anew(*slot.inputs), strict=True):
                result.copy_(made)
        else:
            into(slot.results, *slot.inputs)

    return call


def _require(module: str, install: str) -> None:
    if find_spec(module) is None:
        raise Unavailable(f"not installed; get it with: {install}")


def _sglang_functions() -> dict[str, Callable[..., Tensor]]:
    _require("sglang", "pip install sglang apache-tvm-ffi")
    try:
        module = importlib.import_module("sglang.kernels.ops.activation.activation")
    except (
        Exception
    ) as error:  # The package imports a serving stack, any part of which may be missing; the kernels do not need it.
        try:
            return _sglang_kernels_alone()
        except Exception as second:
            raise Unavailable(f"import: {reason(error)}; its kernels alone: {reason(second)}") from error
    names = ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul", "relu2")
    return {name: getattr(module, name) for name in names if hasattr(module, name)}


def _sglang_kernels_alone() -> dict[str, Callable[..., Tensor]]:
    """SGLang's kernels with nothing of its package run but the JIT loader."""
    for name in [name for name in sys.modules if name == "sglang" or name.startswith("sglang.")]:
        del sys.modules[name]
    spec = find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable("the package has no folder")
    folder = next(iter(spec.submodule_search_locations))
    for package, path in (("sglang", ""), ("sglang.kernels", "/kernels"), ("sglang.srt.utils", "/srt/utils")):
        stub = types.ModuleType(package)
        stub.__path__ = [folder + path]
        sys.modules[package] = stub
    platform = types.ModuleType("sglang.srt.utils.common")
    platform.is_cuda = lambda: True  # type: ignore[attr-defined]
    sys.modules[platform.__name__] = platform
    jit = importlib.import_module("sglang.kernels.jit.utils")

    @functools.cache
    def module(dtype: torch.dtype):
        arguments = jit.make_cpp_args(dtype, jit.is_arch_support_pdl())
        kernels = ("run_activation", "run_unary_activation")
        return jit.load_jit(
            "activation",
            *arguments,
            cuda_files=["elementwise/activation.cuh"],
            extra_cuda_cflags=jit.get_activation_cuda_cflags(),
            cuda_wrappers=[(kernel, f"ActivationKernel<{arguments}>::{kernel}") for kernel in kernels],
        )

    def gated(activation: str) -> Callable[..., Tensor]:
        def function(input: Tensor, out: Tensor | None = None) -> Tensor:
            out = input.new_empty(*input.shape[:-1], input.shape[-1] // 2) if out is None else out
            module(input.dtype).run_activation(input, out, activation)
            return out

        return function

    def relu2(input: Tensor, out: Tensor | None = None) -> Tensor:
        out = torch.empty_like(input) if out is None else out
        module(input.dtype).run_unary_activation(input, out, "relu2")
        return out

    return {
        "silu_and_mul": gated("silu"),
        "gelu_and_mul": gated("gelu"),
        "gelu_tanh_and_mul": gated("gelu_tanh"),
        "relu2": relu2,
    }


def _sglang_norms() -> dict[str, Callable[..., Tensor]]:
    _loaded(_sglang_functions)  # decides whether the package imports or its kernels alone do
    module = importlib.import_module("sglang.kernels.ops.layernorm.norm")
    return {
        "rmsnorm": module.rmsnorm,
        "fused_add_rmsnorm": module.fused_add_rmsnorm,
        "fused_qknorm": module.fused_inplace_qknorm,
    }


def sglang_function(name: str) -> Callable[..., Tensor]:
    """SGLang's public function ``name``: ``(*inputs, out)``, or ``(*inputs)`` where it works in place.

    Raises:
        Unavailable: SGLang is not there, or has no such op.
    """
    functions = _loaded(_sglang_norms if OPERATIONS[name].is_norm else _sglang_functions)
    if name not in functions:
        raise Unavailable(f"has no {name}")
    return functions[name]


def _bind_prepared(library: str, operation: Operation) -> Call:
    """A peer's call of an op on positions or caches."""
    prepare = cache_peers.PEERS[library].get(operation.name)
    if prepare is None:
        raise Unavailable(f"has no {operation.name}")
    prepared = functools.cache(lambda slot: prepare(*slot.inputs))
    return lambda slot: prepared(slot)()


def _bind_sglang(operation: Operation) -> Call:
    if operation.recipe is not None:
        _loaded(_sglang_functions)  # decides whether the package imports or its kernels alone do
        return _bind_prepared("sglang", operation)
    function = sglang_function(operation.name)

    def call(slot: Slot) -> None:
        function(*slot.inputs, *slot.outs)

    return call


def _flashinfer(module: str) -> types.ModuleType:
    _require("flashinfer", "pip install flashinfer-python")
    try:
        return importlib.import_module(f"flashinfer.{module}")
    except Exception as error:
        raise Unavailable(f"import: {reason(error)}") from error


def flashinfer_function(name: str) -> Callable[..., Tensor]:
    """FlashInfer's public function; PDL is on by default from sm_90.

    Raises:
        Unavailable: FlashInfer is not there, or has no such op.
    """
    module = _loaded(functools.partial(_flashinfer, "norm" if OPERATIONS[name].is_norm else "activation"))
    if not hasattr(module, name):
        raise Unavailable(f"has no {name}")
    return getattr(module, name)


def _bind_flashinfer(operation: Operation, enable_pdl: bool | None = None) -> Call:
    if operation.recipe is not None:
        _require("flashinfer", "pip install flashinfer-python")
        return _bind_prepared("flashinfer", operation)
    if operation.name == "fused_qknorm":  # two calls, which is how its users normalise queries and keys
        norm = flashinfer_function("rmsnorm")

        def both(slot: Slot) -> None:
            q, k, q_weight, k_weight = slot.inputs
            norm(q, q_weight, 1e-6, q, enable_pdl)
            norm(k, k_weight, 1e-6, k, enable_pdl)

        return both
    function = flashinfer_function(operation.name)
    if operation.name == "layernorm":
        raise Unavailable("allocates, and wants weights in fp32")
    if operation.is_norm:

        def norm_call(slot: Slot) -> None:
            function(*slot.inputs, 1e-6, *slot.outs, enable_pdl)

        return norm_call

    def call(slot: Slot) -> None:
        function(*slot.inputs, slot.out, enable_pdl)

    return call


def _bind_liger(operation: Operation) -> Call:
    """Liger's gradients. The statistics, which its forward saves, are made before the timing; the results are its own."""
    _require("liger_kernel", "pip install liger-kernel")
    if operation.name == "rmsnorm_backward":
        rms = importlib.import_module("liger_kernel.ops.rms_norm")

        @functools.cache
        def saved_rms(slot: Slot) -> tuple[object, ...]:
            _, input, weight = slot.inputs
            _, _, scale, block, warps, mode = rms.rms_norm_forward(input, weight, 1e-6, 0.0, "gemma", None)
            return scale, 0.0, mode, block, warps, False, None

        return lambda slot: rms.rms_norm_backward(*slot.inputs, *saved_rms(slot))
    if operation.name == "layernorm_backward":
        layer = importlib.import_module("liger_kernel.ops.layer_norm")

        @functools.cache
        def saved_layer(slot: Slot) -> tuple[Tensor, ...]:
            _, input, weight = slot.inputs
            _, _, mean, scale, _, _ = layer.layer_norm_forward(input, weight, weight, 1e-5)
            return weight, mean, scale

        return lambda slot: layer.layer_norm_backward(*slot.inputs, *saved_layer(slot))
    if operation.name == "rope_qk_backward":
        rope = importlib.import_module("liger_kernel.ops.rope")
        return lambda slot: rope.rope_backward(*slot.inputs)
    raise Unavailable(f"is measured for gradients, not for {operation.name}")


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider("jitk", "this library, `.out`", _bind_jitk, is_peer=False),
        Provider("sglang", "SGLang's JIT kernel, into out", _bind_sglang),
        Provider("flashinfer", "FlashInfer, into out, PDL as it chooses", _bind_flashinfer),
        Provider(
            "flashinfer-nopdl", "FlashInfer, into out, without PDL", functools.partial(_bind_flashinfer, enable_pdl=False)
        ),
        Provider("liger", "Liger's gradients, allocating", _bind_liger, writes_out=False),
        Provider("inductor", "torch.compile of the plain PyTorch, into out", _bind_inductor),
        Provider("eager", "the plain PyTorch, op by op, allocating", _bind_eager, writes_out=False),
        Provider("parts", "this library, an op for each step", _bind_parts, is_peer=False, writes_out=False),
        Provider("copy", "Tensor.copy_ of the same bytes", _bind_copy, is_peer=False, writes_out=False),
    )
}

DEFAULT_PROVIDERS = ("jitk", "sglang", "flashinfer", "inductor", "copy")
_OF_GRADIENTS = ("jitk", "liger", "inductor", "copy")


def default_providers(operation: Operation) -> tuple[str, ...]:
    """Who is measured unless names are given: for gradients the libraries that have any, beside a fusion its parts."""
    if operation.name.endswith("_backward"):
        return _OF_GRADIENTS
    return (*DEFAULT_PROVIDERS, "parts") if operation.name in _PARTS else DEFAULT_PROVIDERS
