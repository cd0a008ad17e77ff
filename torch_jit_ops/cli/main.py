"""Reads the command line and runs the command."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
from collections.abc import Sequence

import torch

import torch_jit_ops

_PROGRAM = "python -m torch_jit_ops"
_COMMANDS = {
    "demo": "compile a small Llama with jitk ops and check it against plain PyTorch",
    "doctor": "check everything that compiling needs, and say how to get what is missing",
    "list": "the ops, a line each; of those that are named also schemas, dtypes, kernels, and what is compiled",
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
  python -m torch_jit_ops list --import mylib             with the ops of a library of your own

environment:
  JITK_CACHE_DIR     where built kernels are kept (default: ~/.cache/jitk)
  JITK_VERBOSE       0 silent, 1 a line for each build, 2 the compilers' output too
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    try:
        options = _parse(list(sys.argv[1:] if arguments is None else arguments))
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
        prog=_PROGRAM,
        description="PyTorch custom ops whose kernels compile themselves on first use.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    _add_import(parser)
    arguments = _import(arguments)
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, help_text in _COMMANDS.items():
        if name not in arguments:  # its module, with all that it needs, would be imported for nothing
            commands.add_parser(name, help=help_text)
            continue
        module = importlib.import_module(f"torch_jit_ops.cli.{name}")
        command = commands.add_parser(
            name, help=help_text, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        _add_import(command)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser.parse_args(arguments)


def _version() -> str:
    return f"torch_jit_ops {torch_jit_ops.__version__} (PyTorch {torch.__version__}, Python {platform.python_version()})"


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--import",
        action="append",
        default=[],
        metavar="MODULE",
        dest="imports",
        help="import this first: a library whose ops the command shall know; repeatable",
    )


def _import(arguments: list[str]) -> list[str]:
    """Import the modules that ``--import`` names, wherever it stands: what a command offers may depend on the ops that they
    declare. Returns the other arguments."""
    reader = argparse.ArgumentParser(prog=_PROGRAM, add_help=False, allow_abbrev=False)
    _add_import(reader)
    found, others = reader.parse_known_args(arguments)
    for name in found.imports:
        if os.getcwd() not in sys.path and "" not in sys.path:  # `python -m` looks here, a console script does not
            sys.path.append(os.getcwd())
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(f"--import {name}: {error}") from error
    return others
