"""Where kernels run, and what compiles them: one value for each kind of device."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from torch_jit_ops.backends.backend import Backend as Backend
from torch_jit_ops.backends.backend import Toolkit as Toolkit
from torch_jit_ops.backends.cpu import CPU as CPU
from torch_jit_ops.backends.cuda import CUDA as CUDA
from torch_jit_ops.backends.programs import MissingCompiler as MissingCompiler

ALL: tuple[Backend, ...] = (CUDA, CPU)
NAMES = tuple(backend.name for backend in ALL)


def named(name: str) -> Backend:
    """The backend of this name.

    Raises:
        ValueError: there is none.
    """
    for backend in ALL:
        if backend.name == name:
            return backend
    raise ValueError(f"the backend must be {' or '.join(NAMES)}, got {name!r}")


def of_key(key: str) -> Backend | None:
    """The backend that a declaration means by ``cuda``, ``sm_90``, ``x86-64-v3``; None if it means none."""
    return next((backend for backend in ALL if key == backend.name or re.fullmatch(backend.target_form, key)), None)


def deciding(devices: Iterable[torch.device]) -> list[torch.device]:
    """Those of a call's devices that decide where it runs, in their order: PyTorch passes over the CPU beside another one."""
    known = list(devices)
    return [device for device in known if device.type != CPU.device_type] or known


def of_device(device: torch.device) -> Backend | None:
    """The backend whose kernels run on the device; None if there is none."""
    return next((backend for backend in ALL if backend.serves(device)), None)
