"""The ways in which a kernel cannot be had."""

from __future__ import annotations

from torch_jit_ops.backends.programs import MissingCompiler


class BuildError(RuntimeError):
    """A kernel did not compile. The text holds the compiler's first errors and where its whole log is."""


class UnknownGpu(BuildError, MissingCompiler):
    """nvcc does not know the GPU: no kernel will compile for it, and an op runs its reference as without a compiler."""


class BuildInterrupted(RuntimeError):
    """Ctrl-C reached the compilers of a thread, as they share the program's terminal. A later call builds again."""


class CompileRefused(RuntimeError):
    """A kernel is not there, and must not be compiled or loaded now. The text says what to do before."""


def told(text: str) -> BuildError:
    """The error of another process, from its text."""
    return UnknownGpu(text) if " does not know compute_" in text.partition("\n")[0] else BuildError(text)
