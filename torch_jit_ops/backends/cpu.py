"""The CPU: kernels in C++, for an x86-64 level."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torch_jit_ops.backends import programs
from torch_jit_ops.backends.backend import Backend, Toolkit

_LEVEL_OF_CAPABILITY = {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3"}


@dataclass(frozen=True)
class Cpu(Backend):
    """See ``Backend``.

    Attributes:
        baseline: the architecture that every machine of the kind has, for what is no kernel.
    """

    baseline: str

    def arch_examples(self) -> str:
        return "x86-64 or x86-64-v3"

    def arch_flags(self, arch: str) -> tuple[str, ...]:
        return (f"-march={self.check_arch(arch)}",)

    def target(self, arch: str) -> str:
        return arch

    def arch_of(self, index: int = -1) -> str:
        """This machine's level. Not ``native``: hosts that share a store may differ."""
        return _LEVEL_OF_CAPABILITY.get(torch.backends.cpu.get_cpu_capability(), "x86-64-v2")

    def archs_here(self) -> list[str]:
        return [self.arch_of(-1)]

    def index_of(self, device: torch.device) -> int:
        return -1

    def commands(self) -> list[tuple[str, ...]]:
        return [programs.host_command()]

    def toolkit(self) -> Toolkit | None:
        return None

    def refusal(self) -> str | None:
        return None

    def is_here(self) -> bool:
        return True

    def is_in_use(self) -> bool:
        return True


CPU = Cpu(
    name="cpu",
    device_type="cpu",
    dispatch_key="CPU",
    suffixes=(".cpp", ".cc", ".cxx"),
    arch_form=r"x86-64(-v[2-4])?",
    target_form=r"x86-64(-v[2-4])?",
    flags=("-O3", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"),
    debug_flags=("-O0", "-g", "-DJITK_DEBUG"),
    exports_link_flags=(),
    variables=(),
    builds_for_others=False,
    baseline="x86-64",
)
