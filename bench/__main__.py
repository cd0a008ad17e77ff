"""Command line of the benchmarks."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

# Nothing here imports torch or a peer before the folder of their compiled code is set.
from bench.environment import compiled_code_in
from bench.first_call import LIBRARIES

if TYPE_CHECKING:
    from bench.cases import Case

OK, WRONG, USAGE, TOO_SLOW, INTERRUPTED = 0, 1, 2, 3, 130

WHAT = ("kernels", "host", "compile", "cpu", "accuracy", "blocks", "all")

DESCRIPTION = """\
Benchmarks of torch_jit_ops beside SGLang, FlashInfer, Inductor and a plain copy.

  kernels   device time of every op, in microseconds, with its share of the memory's bandwidth   (GPU)
  host      host time of one eager call, as a multiple of torch.relu                             (GPU or CPU)
  compile   first call in a new process, cold and warm, beside the bare compiler                 (GPU or CPU)
  cpu       time of the CPU kernels beside eager PyTorch and Inductor                            (CPU)
  accuracy  errors of the norms against float64, in bf16 and fp16, beside the peers' errors       (GPU or CPU)
  blocks    a Llama block and a model of transformers: eager, compiled, fused, with the ops       (GPU or CPU)
  all       everything that this machine can run
"""

EPILOG = """\
examples:
  python -m bench kernels --quick                           a minute, the sizes that matter most
  python -m bench kernels --op silu_and_mul --tokens 1 16   some of the table (--list shows it)
  python -m bench kernels --op relu2 --tokens 640 --d 5120  a size of your own
  python -m bench kernels --providers jitk copy             without the peers
  python -m bench host --device cpu                         no GPU needed
  python -m bench compile --libraries jitk                  how long a new kernel takes to build and to load
  python -m bench accuracy --device cpu --op layernorm      how exact the norms are, no GPU needed
  python -m bench blocks --tokens 1 4096                    whole blocks, what torch.compile and fuse make of them
  python -m bench all --json results.json                   everything, every sample kept

peers are measured when they can be imported (a folder on PYTHONPATH will do) and reported as missing when not:
  pip install sglang apache-tvm-ffi flashinfer-python

exit status: 0 done; 1 an op of ours is missing, raised or gave a wrong result; 2 bad arguments or no GPU;
3 a ratio is below --fail-under
"""


def parser() -> argparse.ArgumentParser:
    """The arguments of ``python -m bench``."""
    form = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser("python -m bench", description=DESCRIPTION, epilog=EPILOG, formatter_class=form)
    top.add_argument("what", choices=WHAT, help="which benchmark to run")
    top.add_argument("--quick", action="store_true", help="fewer sizes and fewer rounds")
    top.add_argument("--dtype", default="bf16", choices=("bf16", "fp16", "fp32"), help="element type (default: %(default)s)")
    top.add_argument("--json", type=Path, metavar="FILE", help="write every sample and the environment to FILE")
    top.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keep what is compiled in DIR for the next run (default: a temporary directory)",
    )
    kernels = top.add_argument_group("kernels")
    kernels.add_argument("--op", nargs="+", default=[], metavar="OP", help="only these ops")
    kernels.add_argument("--tokens", nargs="+", type=_positive, default=[], metavar="N", help="only these numbers of tokens")
    kernels.add_argument("--d", nargs="+", type=_positive, default=[], metavar="N", help="only these last dimensions")
    kernels.add_argument("--providers", nargs="+", default=[], metavar="NAME", help="only these providers (--list shows them)")
    kernels.add_argument("--rounds", type=_positive, metavar="N", help="replays of each provider (default: 15, quick: 9)")
    kernels.add_argument("--cold", action="store_true", help="empty L2 before each replay, which small calls otherwise stay in")
    kernels.add_argument("--list", action="store_true", help="show ops, sizes and providers, and stop")
    kernels.add_argument("--fail-under", type=float, metavar="RATIO", help="exit with 3 when a best/ours is below RATIO")
    host = top.add_argument_group("host, compile and accuracy")
    host.add_argument("--device", choices=("cuda", "cpu"), help="where to call (default: cuda if there is one)")
    host.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES), help="compile: only these")
    host.add_argument("--headers", action="store_true", help="compile: the cost of each header of include/jitk by itself")
    host.add_argument(
        "--mode", nargs="+", choices=("inference", "grad"), default=["inference", "grad"], help="host: which modes"
    )
    return top


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def _list() -> None:
    from bench.cases import CASES
    from bench.providers import DEFAULT_PROVIDERS, PROVIDERS

    for op in dict.fromkeys(case.op for case in CASES):
        cases = [case for case in CASES if case.op == op]
        axes = ", ".join(cases[0].operation.axes)
        print(f"{op:<18} ({axes}): " + " ".join(case.shape.replace(" ", "") for case in cases))
    print()
    for provider in PROVIDERS.values():
        print(f"{provider.name:<18} {provider.title}{'' if provider.name in DEFAULT_PROVIDERS else '  (not by default)'}")


def _select(arguments: argparse.Namespace) -> tuple[tuple[Case, ...], tuple[str, ...]]:
    """Cases and providers of the kernel benchmark. Raises ValueError for names that do not exist."""
    from bench.cases import CASES, QUICK, select
    from bench.providers import PROVIDERS

    unknown = [name for name in arguments.providers if name not in PROVIDERS]
    if unknown:
        raise ValueError(f"unknown provider {', '.join(unknown)}; known: {', '.join(PROVIDERS)}")
    cases = select(QUICK if arguments.quick else CASES, arguments.op, arguments.tokens, arguments.d)
    return cases, tuple(arguments.providers)


def run(arguments: argparse.Namespace) -> int:
    """Run what ``arguments`` ask for and return the exit status."""
    import torch

    from bench import accuracy, bare_compiler, blocks, compile, cpu, environment, host, kernels, report
    from bench.cases import DTYPES
    from bench.results import failed

    has_gpu = torch.cuda.is_available()
    device = torch.device(arguments.device or ("cuda" if has_gpu else "cpu"))
    needs_gpu = arguments.what == "kernels" or (arguments.what != "cpu" and device.type == "cuda")
    if needs_gpu and not has_gpu:
        print("no CUDA device here; host, compile, cpu and accuracy run without one (--device cpu)", file=sys.stderr)
        return USAGE
    try:
        cases, providers = ((), ()) if arguments.what == "blocks" else _select(arguments)
    except ValueError as error:
        print(error, file=sys.stderr)
        return USAGE

    quick, dtype = arguments.quick, DTYPES[arguments.dtype]
    table = accuracy.QUICK if quick else accuracy.CASES
    norms = [case for case in table if not arguments.op or case.op in arguments.op]
    if arguments.what == "accuracy" and not norms:
        print(f"accuracy has no {', '.join(arguments.op)}; it has: {', '.join(case.op for case in table)}", file=sys.stderr)
        return USAGE
    out = report.console()
    failures: list[str] = []
    slow: list[str] = []

    # Each returns what goes into the JSON file.
    def run_kernels() -> object:
        results = kernels.run(out, cases, dtype, arguments.rounds or (9 if quick else 15), providers, arguments.cold)
        failures.extend(failed(results))
        if arguments.fail_under is not None:
            rated = [(result, result.ratio) for result in results if result.ratio is not None]
            slow.extend(f"{item.name}: best/ours {ratio:.3f}" for item, ratio in rated if ratio < arguments.fail_under)
        return [result.to_json() for result in results]

    def run_host() -> object:
        results = host.run(out, device, dtype, 11 if quick else 31, arguments.mode)
        failures.extend(host.failed(host.ROWS, results))
        return [result.to_json() for result in results]

    def run_compile() -> object:
        rounds = 1 if quick else 3
        result = compile.run(out, device.type, bare_compiler.architecture(), rounds, arguments.libraries, arguments.headers)
        failures.extend(compile.failed(result))
        return result.to_json()

    def run_cpu() -> object:
        dtypes = [DTYPES[name] for name in ("bf16", "fp32")]
        results = cpu.run(out, cpu.QUICK if quick else cpu.CASES, dtypes, 7 if quick else 15)
        failures.extend(failed([result for _, result in results]))
        return [{"dtype": str(of).removeprefix("torch."), **result.to_json()} for of, result in results]

    def run_accuracy() -> object:
        results = accuracy.run(out, norms, device)
        failures.extend(accuracy.failed(results))
        return [result.to_json() for result in results]

    def run_blocks() -> object:
        if device.type == "cuda":
            results = blocks.run(out, device, dtype, 9 if quick else 21, arguments.tokens or blocks.TOKENS)
        else:
            results = blocks.run(out, device, dtype, 3, arguments.tokens or (1, 16), *blocks.SMALL)
        failures.extend(blocks.failed(results))
        return [result.to_json() for result in results]

    parts = {
        "kernels": run_kernels,
        "host": run_host,
        "compile": run_compile,
        "cpu": run_cpu,
        "accuracy": run_accuracy,
        "blocks": run_blocks,
    }
    if arguments.what == "all":
        wanted = [name for name in parts if name not in ("kernels", "blocks") or device.type == "cuda"]
    else:
        wanted = [arguments.what]
    facts = environment.describe()
    report.print_environment(out, facts)
    document: dict[str, object] = {"environment": facts}
    took: dict[str, float] = {}
    for name in wanted:
        start = time.perf_counter()
        document[name] = parts[name]()
        took[name] = time.perf_counter() - start
        document["seconds"] = took
        # After each part: what is measured is kept whatever the next one meets.
        if arguments.json:
            report.write_json(arguments.json, document)
    report.print_notes(out, ["took " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in took.items())])
    for line in failures + slow:
        print(line, file=sys.stderr)
    return WRONG if failures else TOO_SLOW if slow else OK


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.list:
        _list()
        return OK
    try:
        with compiled_code_in(arguments.cache):
            return run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
