"""Why a kernel is not in the store: which input of its key is not as it was when the nearest variant there was built."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch_jit_ops.builder.compilers import compiler_of
from torch_jit_ops.builder.unit import Unit
from torch_jit_ops.store.digests import digest_of_file
from torch_jit_ops.store.listing import Variant, variants
from torch_jit_ops.store.store import Store


@dataclass(frozen=True)
class Difference:
    """An input of the key that is not as it was. ``was`` or ``now`` is None where there was or is none."""

    what: str
    was: str | None
    now: str | None


@dataclass(frozen=True)
class Finding:
    """Whether a unit is in the store, and if not, what differs from the variant there that is nearest to it."""

    unit: Unit
    present: Path | None
    nearest: Variant | None
    differences: tuple[Difference, ...]


def explain(unit: Unit, stores: Sequence[Store]) -> Finding:
    """Look for the unit, as a load would, and compare with what comes nearest."""
    for store in stores:
        found = store.find(unit.name, unit.key(), unit.roots(), compiler_of(unit, store))
        if found is not None:
            return Finding(unit, found.parent, None, ())
    best: Finding | None = None
    for store in stores:
        compiler = compiler_of(unit, store)
        for variant in variants(store):
            if (variant.record["name"], variant.record["backend"]) != (unit.name, unit.backend.name):
                continue
            # What was imported, or is in a shared store, is used whatever compiler built it.
            given = store.shared or variant.record.get("imported") is True
            differences = tuple(_differences(unit, variant, None if given else compiler))
            if best is None or _rank(differences, variant) < _rank(best.differences, best.nearest):
                best = Finding(unit, None, variant, differences)
    return best or Finding(unit, None, None, ())


def _rank(differences: Sequence[Difference], variant: Variant | None) -> tuple[bool, int, float]:
    """Another instantiation is further away than the same one from other files; of two equal ones the later is nearer."""
    other = any(difference.what in ("architecture", "instantiation") for difference in differences)
    return other, len(differences), -variant.used if variant is not None else 0


def _differences(unit: Unit, variant: Variant, compiler: str | None) -> Iterator[Difference]:
    record = variant.record
    facts = unit.facts()
    for what, field in (
        ("architecture", "arch"),
        ("instantiation", "label"),
        ("PyTorch", "torch"),
        ("ABI version", "abi"),
        ("Python", "python"),
    ):
        if record.get(field) != facts.get(field):
            yield Difference(what, str(record.get(field)), str(facts.get(field)))
    if compiler is not None and record.get("compiler") != compiler:
        yield Difference("compiler", record.get("compiler"), compiler)
    was, now = list(record.get("flags", ())), list(facts["flags"])
    gone = [flag for flag in was if flag not in now]
    new = [flag for flag in now if flag not in was]
    if gone or new:
        yield Difference("flags", " ".join(gone) or None, " ".join(new) or None)
    elif was != now:
        yield Difference("order of flags", " ".join(was), " ".join(now))
    texts = (unit.text, *unit.beside)
    if record.get("label") == unit.label and variant.texts is not None and variant.texts != texts:
        yield Difference("translation unit", "".join(variant.texts), "".join(texts))
    roots = unit.roots()
    for item in record["dependencies"]:
        if item["root"] not in roots:
            yield Difference(f"file {item['path']}", f"in {item['root']}", None)
            continue
        file = roots[item["root"]] / item["path"]
        digest = digest_of_file(file)
        if digest != item["digest"]:
            yield Difference(f"file {file}", _short(item["digest"]), _short(digest))
    if digest_of_file(variant.library) != record["digest"]:
        yield Difference(f"file {variant.library}", str(record["digest"])[:12], "damaged or missing")


def _short(digest: str | None) -> str | None:
    """A file that is not there has no digest: neither now, nor where the compiler looked for it in vain."""
    return None if digest is None else digest[:12]
