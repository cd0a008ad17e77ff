"""Reads the command line and runs the command."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

_COMMANDS = {
    "demo": "compile a small Llama with jitk ops and check it against plain PyTorch",
    "doctor": "check everything that compiling needs, and say how to get what is missing",
    "list": "the ops: schemas, dtypes, where their kernels are, and which are compiled",
    "build": "compile kernels ahead of their first call, also for a GPU that is not here",
    "deploy": "write ops and their kernels as a folder for programs without Python",
    "cache": "look into the store of compiled kernels, explain it, prune it, carry it elsewhere",
    "new": "start an op of your own: declaration, kernels, samples and a test that passes",
    "clangd": "write a .clangd, so that an editor understands kernels",
}

_EPILOG = """\
examples:
  python -m torch_jit_ops demo
  python -m torch_jit_ops doctor
  python -m torch_jit_ops build --arch 9.0a silu_and_mul
  python -m torch_jit_ops cache why silu_and_mul
  python -m torch_jit_ops --import mylib list --json      with the ops of a library of your own

environment:
  JITK_CACHE_DIR     where built kernels are kept (default: ~/.cache/jitk)
  JITK_VERBOSE       0 silent, 1 a line for each build, 2 the compilers' output too
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = _parse(arguments)
        return int(options.run(options))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `... | head` has read enough; Python would complain once more when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m torch_jit_ops",
        description="PyTorch custom ops whose kernels compile themselves on first use.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name in _imports(parser, arguments):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(f"--import {name}: {error}") from error
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, help_text in _COMMANDS.items():
        if name not in arguments:  # its module, with all that it needs, would be imported for nothing
            commands.add_parser(name, help=help_text)
            continue
        module = importlib.import_module(f"torch_jit_ops.cli.{name}")
        command = commands.add_parser(
            name, help=help_text, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser.parse_args(arguments)


def _imports(parser: argparse.ArgumentParser, arguments: list[str]) -> list[str]:
    """Modules to import before the command is read, for the ops that they declare."""
    for reader in (parser, early := argparse.ArgumentParser(add_help=False, allow_abbrev=False)):
        reader.add_argument(
            "--import",
            action="append",
            default=[],
            metavar="MODULE",
            dest="imports",
            help="import this first: a library whose ops the command shall know; repeatable",
        )
    before = arguments[: next((i for i, word in enumerate(arguments) if word in _COMMANDS), None)]
    return list(early.parse_known_args(before)[0].imports)
