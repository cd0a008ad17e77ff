"""Look into the store of compiled kernels, explain it, prune it, and carry it elsewhere.

examples:
  python -m torch_jit_ops cache list                        what is there, the largest first
  python -m torch_jit_ops cache why silu_and_mul            is it there, and if not, what differs from what is
  python -m torch_jit_ops cache why add_constant --set constant=7 --arch 9.0a
  python -m torch_jit_ops cache prune --max-size 1G --max-age 30
  python -m torch_jit_ops cache export kernels.tar.gz       then, in the image: cache import kernels.tar.gz
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from torch_jit_ops import backends, environment, registry
from torch_jit_ops.ahead.why import Difference, Finding, explain
from torch_jit_ops.calling import dispatcher
from torch_jit_ops.cli import build, screen
from torch_jit_ops.store import bundle, forms, listing, prune
from torch_jit_ops.store.search_path import default_store, search_path


def _add_ops(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ops", nargs="*", metavar="op", help="names, as silu_and_mul or jitk::silu_and_mul (default: all)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="action", metavar="action", required=True)

    def command(name: str, action: Callable[[argparse.Namespace], int], help_text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=help_text, description=action.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        added.set_defaults(action=action)
        return added

    command("dir", _dir, "where the store is")
    listing = command("list", _list, "the variants that are there")
    _add_ops(listing)
    listing.add_argument("--json", action="store_true", help="print JSON")
    why = command("why", _why, "whether an op's kernels are there, and if not, what differs from those that are")
    why.add_argument("op", help="as silu_and_mul, or 'dispatcher'")
    build.add_choice(why)
    why.add_argument("--json", action="store_true", help="print JSON")
    pruning = command("prune", _prune, "remove what was not used for long")
    pruning.add_argument("--max-size", type=_bytes, metavar="4G", help="keep at most so many bytes (default: JITK_CACHE_SIZE)")
    pruning.add_argument("--max-age", type=float, metavar="DAYS", help="remove what was not used for so long (default: 90)")
    clearing = command("clear", _clear, "remove all variants, or those of some ops")
    _add_ops(clearing)
    exporting = command("export", _export, "write variants into one file")
    exporting.add_argument("file", type=Path, help="as kernels.tar.gz")
    _add_ops(exporting)
    importing = command("import", _import, "put the variants of such a file into the store")
    importing.add_argument("file", type=Path, help="as kernels.tar.gz, from somebody whom you would let run a program")


def run(options: argparse.Namespace) -> int:
    return int(options.action(options))


def _dir(options: argparse.Namespace) -> int:
    """Print the folder of the store; JITK_CACHE_DIR sets it."""
    print(default_store().root)
    return 0


def _list(options: argparse.Namespace) -> int:
    """List the variants that are in the store, the largest first."""
    found = sorted(listing.variants(default_store(), options.ops), key=lambda variant: -variant.bytes)
    if options.json:
        extra = [{"folder": str(each.folder), "bytes": each.bytes, "used": each.used} for each in found]
        print(json.dumps([{**each.record, **more} for each, more in zip(found, extra, strict=True)], indent=1))
        return 0
    table = screen.table("kernel", "for", "size", "compiled in", "used")
    for each in found:
        record = each.record
        target = backends.named(record["backend"]).target(record["arch"])
        took, used = f"{record['seconds']:.1f} s", time.strftime("%Y-%m-%d %H:%M", time.localtime(each.used))
        table.add_row(
            forms.printable(record["label"]),
            target,
            screen.size(each.bytes),
            took,
            used,
        )
    screen.show(table)
    print(f"{len(found)} variants, {screen.size(sum(each.bytes for each in found))} in {default_store().root}")
    return 0


def _why(options: argparse.Namespace) -> int:
    """Say of each kernel that an op needs whether it is in the store. If it is not: which input of its key (a file, the
    compiler, a flag, the architecture, the ABI, PyTorch) differs from the variant that comes nearest."""
    units = [dispatcher.unit()] if options.op == "dispatcher" else build.chosen([options.op], options)
    findings = [explain(unit, search_path()) for unit in units]
    if options.json:
        print(json.dumps([_plain(finding) for finding in findings], indent=1))
        return 0
    for finding in findings:
        name = f"{finding.unit.label} for {finding.unit.target()}"
        if finding.present is not None:
            print(f"{name}: in the store\n  {finding.present}")
        elif finding.nearest is None:
            print(f"{name}: would be compiled; no {finding.unit.backend.name} variant of this op is in the store")
        else:
            print(f"{name}: would be compiled; what differs from the nearest variant, {finding.nearest.folder}:")
            for difference in finding.differences:
                print(_line(difference))
    return 0


def _line(difference: Difference) -> str:
    """A line of text, of which a terminal obeys nothing."""
    return "  " + forms.printable(_text(difference))


def _text(difference: Difference) -> str:
    if "\n" in f"{difference.was}{difference.now}":
        return f"{difference.what}: another text"
    if difference.now is None:
        return f"{difference.what}: {difference.was} is gone"
    return f"{difference.what}: {difference.now}" + (f", was {difference.was}" if difference.was is not None else " is new")


def _plain(finding: Finding) -> dict[str, object]:
    return {
        "kernel": finding.unit.label,
        "backend": finding.unit.backend.name,
        "arch": finding.unit.arch,
        "present": finding.present and str(finding.present),
        "nearest": finding.nearest and str(finding.nearest.folder),
        "differences": [asdict(difference) for difference in finding.differences],
    }


def _prune(options: argparse.Namespace) -> int:
    """Remove variants that nobody used for --max-age days, then those unused for longest until the rest fits into --max-size.
    Builds do the same in passing. What failed builds left goes too, with their logs."""
    store = default_store()
    max_bytes = environment.cache_bytes() if options.max_size is None else options.max_size
    max_age_s = prune.AGE_S if options.max_age is None else options.max_age * prune.DAY_S
    pruned = store.prune(max_bytes, max_age_s)
    store.sweep(failed=0)
    print(
        f"removed {len(pruned.removed)} variants, {screen.size(pruned.freed)}, from {store.root}; {len(pruned.kept)} are left"
    )
    return 0


def _bytes(text: str) -> int:
    form = re.fullmatch(r"(\d+)([KMGT]?)(?:i?B)?", text)
    if form is None:
        raise argparse.ArgumentTypeError(f"must be a number of bytes, such as 500M or 4G; got {text!r}")
    return int(form[1]) << 10 * " KMGT".index(form[2] or " ")


def _clear(options: argparse.Namespace) -> int:
    """Remove all variants from the store, or those of the named ops, and what failed builds left. Processes that have loaded
    one keep it."""
    store = default_store()
    # Without names also what is damaged and has no name that could be read.
    folders = [each.folder for each in listing.variants(store, options.ops)] if options.ops else list(store.variants())
    kept = [folder for folder in folders if not store.remove(folder)]
    store.sweep(failed=0)
    for folder in {folder.parent for folder in folders}:
        with contextlib.suppress(OSError):  # other variants are in it
            folder.rmdir()
    print(f"removed {len(folders) - len(kept)} variants from {store.root}")
    for folder in kept:
        print(f"{forms.printable(folder)} cannot be removed", file=sys.stderr)
    return 1 if kept else 0


def _export(options: argparse.Namespace) -> int:
    """Write the variants in the store, or those of the named ops and the dispatcher, into one .tar.gz."""
    registry.find_ops(registry.parted(options.ops or None)[0])
    wanted = [*options.ops, "(dispatcher)"] if options.ops else []
    count = bundle.export_variants(options.file, listing.variants(default_store(), wanted))
    print(f"{options.file}: {count} variants, {screen.size(options.file.stat().st_size)}")
    return 0


def _import(options: argparse.Namespace) -> int:
    """Put the variants of a bundle into the store. It is refused whole if a digest is wrong, a name leads elsewhere, or a
    member is no plain file. A bundle holds code: import those of people whom you would let run a program."""
    store = default_store()
    count = bundle.import_variants(options.file, store)
    print(f"{count} variants of {options.file} are in {store.root}")
    return 0
