"""Reads the command line and runs the command."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

_COMMANDS = {
    "demo": "compile a small Llama with jitk ops and check it against plain PyTorch",
    "build": "compile kernels ahead of their first call, also for a GPU that is not here",
    "list": "the ops: schemas, dtypes and where their kernels are",
}

_EPILOG = """\
examples:
  python -m torch_jit_ops demo
  python -m torch_jit_ops build --arch 9.0a silu_and_mul
  python -m torch_jit_ops list --json

environment:
  JITK_CACHE_DIR     where built kernels are kept (default: ~/.cache/jitk)
  JITK_VERBOSE       0 silent, 1 a line for each build, 2 the compilers' output too
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m torch_jit_ops",
        description="PyTorch custom ops whose kernels compile themselves on first use.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, help_text in _COMMANDS.items():
        module = importlib.import_module(f"torch_jit_ops.cli.{name}")
        command = commands.add_parser(
            name, help=help_text, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (RuntimeError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
