"""The former names, until the last modules that use them are merged."""

from torch_jit_ops.backends import CPU, CUDA
from torch_jit_ops.backends.programs import MissingCompiler as MissingCompiler


def device_arch(index: int) -> str:
    return CUDA.arch_of(index)


def host_isa() -> str:
    return CPU.arch_of()
