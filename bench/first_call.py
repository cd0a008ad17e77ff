"""What a user waits for in a new process, as a program of its own: ``python -m bench.first_call jitk cuda``.

Prints one line of JSON: seconds of each stage, and how many child processes it started; those of PyTorch's own import are
nobody's (2.15 starts one). Nothing but the standard library is imported before the clock starts, so that each stage pays for
its own imports.
"""

from __future__ import annotations

import json
import sys
import time

LIBRARIES = ("jitk", "sglang", "flashinfer")

# Stages in order. The second op needs another variant while everything that ops share is loaded already.
STAGES = ("import torch", "import library", "first call", "second call", "next op", "next op again")

# subprocess and os.posix_spawn go by their own names; a fork of a C extension is not seen, strace sees it.
STARTS_A_PROCESS = ("subprocess.Popen", "os.posix_spawn", "os.fork", "os.forkpty", "os.system")


class Children:
    """Counts the child processes that this process starts from Python."""

    def __init__(self) -> None:
        self.count = 0
        self._previous = ""
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[object, ...]) -> None:
        # subprocess may go on to posix_spawn for the same child.
        if event in STARTS_A_PROCESS and not (event == "os.posix_spawn" and self._previous == "subprocess.Popen"):
            self.count += 1
        if event in STARTS_A_PROCESS:
            self._previous = event


def _functions(library: str) -> list:
    """silu_and_mul and gelu_and_mul of ``library``, each taking the input."""
    if library == "jitk":
        import torch

        import torch_jit_ops  # noqa: F401  (registers the ops)

        return [torch.ops.jitk.silu_and_mul, torch.ops.jitk.gelu_and_mul]
    if library == "sglang":
        from sglang.kernels.ops.activation.activation import gelu_and_mul, silu_and_mul

        return [silu_and_mul, gelu_and_mul]
    if library == "flashinfer":
        from flashinfer.activation import gelu_and_mul, silu_and_mul

        return [silu_and_mul, gelu_and_mul]
    raise ValueError(f"unknown library {library}; known: {', '.join(LIBRARIES)}")


def main(library: str, device: str) -> dict[str, object]:
    """Go through the stages with ``library`` on ``device``."""
    children = Children()
    seconds: list[float] = []
    started: list[int] = []
    before, clock = children.count, time.perf_counter()

    def stage_done() -> None:
        nonlocal before, clock
        seconds.append(time.perf_counter() - clock)
        started.append(children.count - before)
        before, clock = children.count, time.perf_counter()

    import torch

    stage_done()
    functions = _functions(library)
    stage_done()
    synchronize = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    with torch.inference_mode():
        x = torch.randn((8, 2048), device=device).to(torch.bfloat16)
        # The CUDA context, the allocator and the loading of a first kernel are nobody's first call.
        torch.relu(x)
        synchronize()
        for function in functions:
            for _ in range(2):
                before, clock = children.count, time.perf_counter()
                function(x)
                synchronize()
                stage_done()
    started[STAGES.index("import torch")] = 0
    return {"seconds": dict(zip(STAGES, seconds, strict=True)), "children": dict(zip(STAGES, started, strict=True))}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:3])))
