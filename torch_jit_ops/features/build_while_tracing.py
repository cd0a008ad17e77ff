"""Builds kernels while the graph that will call them is still being compiled.

``torch.compile`` and ``torch.export`` run an op's fake long before its kernel. What the fake is called with decides which
kernel that will be, so its build starts then, in a thread, and the first call finds it, or waits for the rest of it.

A build that fails is no error here: the call meets the same one and raises it. Threads end with the process, whatever they do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from torch_jit_ops import backends, environment, progress
from torch_jit_ops.builder import workers
from torch_jit_ops.calling import dispatcher
from torch_jit_ops.declaring.signature import tensors_of
from torch_jit_ops.declaring.variant import VariantPattern


def start(
    who: str,
    patterns: Mapping[str, VariantPattern],
    load: Callable[[str, Sequence[int]], object],
    arguments: Callable[[], Sequence[object]],
) -> None:
    """Start to build what a traced call will need. Returns at once and raises nothing.

    Nothing happens outside of ``torch.compile`` and ``torch.export``, for a device that is not here, where a size that picks
    the kernel is a symbol, or where builds are switched off (``JITK_BACKGROUND=0``, ``JITK_NO_COMPILE=1``).

    Args:
        who: the op.
        patterns: of the op's kernels, by backend.
        load: builds and loads the variant for a backend and a key of the dispatcher.
        arguments: gives all arguments of the call, fake tensors among them.
    """
    if not patterns or not _is_tracing() or not environment.building_in_background():
        return
    try:
        values = arguments()
        device = backends.deciding(tensor.device for tensor in tensors_of(values))[0]
        backend = backends.of_device(device)
        # Whoever has initialised CUDA has a device, and will not fork and use it there.
        if backend is None or backend.name not in patterns or not backend.is_in_use():
            return
        words = patterns[backend.name].static_words_of(values)
    except Exception:  # the call will say what is wrong with its arguments
        return
    if words is None:
        return
    key = (backend.index_of(device), *words)
    workers.background.once("dispatcher", lambda: _quietly(dispatcher.library))
    workers.background.once((who, backend.name, key), lambda: _quietly(lambda: load(backend.name, key)))


def _quietly(build: Callable[[], object]) -> None:
    with progress.in_background():
        build()


def _is_tracing() -> bool:
    return torch._guards.TracingContext.try_get() is not None or torch.compiler.is_compiling()
