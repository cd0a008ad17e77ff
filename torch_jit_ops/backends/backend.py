"""What a kind of device is to this package: one value that says everything in which it differs from the others.

A new one is a file beside ``cpu.py`` with a value of its own, and a line in ``__init__.py``; nobody compares names.
"""

from __future__ import annotations

import abc
import re
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Toolkit:
    """A compiler for devices and what belongs to it, whose parts may lie apart, as those of wheels do.

    Attributes:
        home: what CUDA_HOME should be.
        nvcc: the compiler, in ``home``.
        include: folders of headers outside of ``home/include``, which the compiler does not search by itself.
        libraries: the folder that holds libcudart.
        found_by: where the search met it.
    """

    home: Path
    nvcc: Path
    include: tuple[Path, ...]
    libraries: Path
    found_by: str


@dataclass(frozen=True)
class Backend(abc.ABC):
    """A kind of device, and how kernels for it are built.

    Attributes:
        name: in declarations, records, manifests and options: ``cuda``.
        device_type: of its tensors, as PyTorch has it. Two backends may share one: ROCm's tensors are ``cuda`` too.
        dispatch_key: under which PyTorch's dispatcher looks for its kernels.
        suffixes: of sources; the first is that of a translation unit.
        arch_form: a regular expression that its architectures match: ``9.0a``.
        target_form: the same of how people and declarations call them: ``sm_90a``.
        flags: for every architecture.
        debug_flags: behind them, in debug builds.
        exports_link_flags: for the linker, where a unit exports functions.
        variables: names of environment variables that its compilers obey by themselves, beyond those of the host's.
        builds_for_others: whether kernels can be built for an architecture that is not here, as somebody chooses.
    """

    name: str
    device_type: str
    dispatch_key: str
    suffixes: tuple[str, ...]
    arch_form: str
    target_form: str
    flags: tuple[str, ...]
    debug_flags: tuple[str, ...]
    exports_link_flags: tuple[str, ...]
    variables: tuple[str, ...]
    builds_for_others: bool

    def check_arch(self, arch: str) -> str:
        """The architecture.

        Raises:
            ValueError: it is none.
        """
        if re.fullmatch(self.arch_form, arch) is None:
            raise ValueError(f"the {self.name.upper()} architecture {arch!r} must be of the form {self.arch_examples()}")
        return arch

    @abc.abstractmethod
    def arch_examples(self) -> str:
        """For errors: ``8.0 or 9.0a``."""

    @abc.abstractmethod
    def arch_flags(self, arch: str) -> tuple[str, ...]:
        """The compiler's flags for an architecture.

        Raises:
            ValueError: it is none.
        """

    @abc.abstractmethod
    def target(self, arch: str) -> str:
        """The architecture as people and declarations call it: ``sm_90a``."""

    def keys(self, arch: str) -> tuple[str, ...]:
        """How a declaration may say that something is for this architecture, the most specific first."""
        return self.target(arch), self.name

    @abc.abstractmethod
    def arch_of(self, index: int) -> str:
        """The architecture to build for, for the device with this index."""

    @abc.abstractmethod
    def archs_here(self) -> list[str]:
        """Those of all devices of this machine, each once."""

    def serves(self, device: torch.device) -> bool:
        """Whether the device's tensors are those of this backend, with this PyTorch."""
        return device.type == self.device_type

    @abc.abstractmethod
    def index_of(self, device: torch.device) -> int:
        """The number by which the dispatcher knows a device; the current one if the device has none. -1 is the CPU."""

    @abc.abstractmethod
    def commands(self) -> list[tuple[str, ...]]:
        """How the compilers are started that have a part in a kernel.

        Raises:
            MissingCompiler: one is not there.
        """

    @abc.abstractmethod
    def toolkit(self) -> Toolkit | None:
        """What compiles for the device; None if the C++ compiler does.

        Raises:
            MissingCompiler: it is not there.
        """

    @abc.abstractmethod
    def refusal(self) -> str | None:
        """Why nothing can be built for this backend with this PyTorch; None if it can."""

    @abc.abstractmethod
    def is_here(self) -> bool:
        """Whether there is a device."""

    @abc.abstractmethod
    def is_in_use(self) -> bool:
        """Whether this process has begun to use the device, so that kernels can be loaded on it."""
