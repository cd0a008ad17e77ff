"""Compiles kernels ahead of their first call.

torch_jit_ops.build()                                                every op, as its samples call it
torch_jit_ops.build(["silu_and_mul"], dtypes=[torch.bfloat16])       before a CUDA graph is captured, say
torch_jit_ops.build(["add_constant"], arguments={"constant": [5, 7]}, arch="9.0a")
torch_jit_ops.build(manifest="run.jsonl")                            what JITK_RECORD wrote in another run
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torch_jit_ops import backends, environment, fallback, manifest, progress, registry
from torch_jit_ops.ahead import modules_ahead
from torch_jit_ops.backends import CPU, CUDA, Backend
from torch_jit_ops.builder import compiler_jobs, workers
from torch_jit_ops.builder.errors import BuildError
from torch_jit_ops.builder.load import load as load_unit
from torch_jit_ops.builder.shared_object import Loaded
from torch_jit_ops.builder.unit import Unit
from torch_jit_ops.calling import dispatcher
from torch_jit_ops.declaring.covering import covering
from torch_jit_ops.declaring.dtypes import Combination, shown
from torch_jit_ops.declaring.samples import SampleMaker
from torch_jit_ops.declaring.variant import Value, VariantPattern
from torch_jit_ops.op import Op
from torch_jit_ops.registry import find_ops, nearest


@dataclass(frozen=True)
class Wanted:
    """A variant of an op, for an architecture."""

    op: Op
    backend: Backend
    values: tuple[Value, ...]
    arch: str

    def unit(self) -> Unit:
        return self.op.declaration.unit(self.backend.name, self.values, self.arch)


Names = str | Op | Sequence[str | Op] | None


@dataclass(frozen=True)
class Report:
    """What a warm-up did. ``compiled`` of the ``kernels`` were not in the store; ``failures`` hold an error's text each."""

    kernels: int
    compiled: int
    failures: tuple[str, ...]
    seconds: float


def build(
    ops: Names = None,
    dtypes: torch.dtype | Sequence[torch.dtype] | None = None,
    arguments: Mapping[str, Any] | None = None,
    *,
    arch: str | Sequence[str] | None = None,
    backend: str | Sequence[str] | None = None,
    jobs: int | None = None,
    manifest: str | os.PathLike[str] | None = None,
) -> Report:
    """Compile kernels, several at a time, and load them, so that no call has to. What is in the store is only loaded.

    Args:
        ops: names (``"silu_and_mul"``, ``"mylib::scale"``) or ops, and names of Python modules; default all.
        dtypes: of the tensors; default all that the op has kernels for. Of an op that declares them by argument, each argument
            takes those of them that it has, and one that has none takes all of its own.
        arguments: values of the variant's placeholders, one or a list each: ``{"constant": [5, 7]}``,
            ``{"input.shape[-1]": 4096}``. Those that are not given are as the op's samples have them.
        arch: CUDA architectures, such as ``"9.0a"``; default those of the GPUs here.
        backend: ``"cuda"``, ``"cpu"`` or both; default both, ``"cuda"`` only where ``arch`` names or has one.
        jobs: compilers at a time; default what cores, cgroups and memory allow.
        manifest: build what this file lists instead, for ``arch`` where it is given; ``ops`` and ``backend`` narrow it down.

    Returns:
        What was done; its ``failures`` are empty.

    Raises:
        BuildError: some kernels do not compile, or have no compiler; the others are built all the same.
        ValueError: an op, dtype, placeholder or architecture is unknown; or ``cuda`` has no architecture, or PyTorch no CUDA.
    """
    if manifest is not None and (dtypes is not None or arguments is not None):
        raise ValueError("build takes dtypes and arguments, or a manifest, which holds them")
    units = units_of(ops, dtypes, arguments, arch, backend, None if manifest is None else Path(manifest))
    report = load_all(units, jobs)
    if report.failures:
        raise BuildError(
            f"{len(report.failures)} of {report.kernels} kernels could not be built\n" + "\n".join(report.failures)
        )
    return report


def units_of(
    ops: Names = None,
    dtypes: torch.dtype | Sequence[torch.dtype] | None = None,
    arguments: Mapping[str, Any] | None = None,
    arch: str | Sequence[str] | None = None,
    backend: str | Sequence[str] | None = None,
    manifest: Path | None = None,
    *,
    each_value: bool = False,
) -> list[Unit]:
    """What ``build``'s arguments ask for: variants of ops, and modules. With ``each_value`` no more of them than
    ``holding_each_value`` leaves."""
    names, _ = registry.parted(ops)
    if manifest is not None:
        variants = replayed(manifest, names, arch, backend)
        return [*(each.unit() for each in variants), *modules_ahead.replayed(manifest, ops, backend)]
    variants = needed(names, dtypes, arguments, arch, backend)
    if each_value:
        variants = holding_each_value(variants)
    return [*(each.unit() for each in variants), *modules_ahead.needed(ops, dtypes, arguments, backend)]


def holding_each_value(variants: Iterable[Wanted]) -> list[Wanted]:
    """Of each op, for each backend and architecture, some variants in which every value of every placeholder occurs.

    An op of 60 variants may be left with 5: what compiles for a dtype and for a layout compiles for both, as a rule.
    """
    groups: dict[tuple[Op, str, str], list[Wanted]] = {}
    for variant in variants:
        groups.setdefault((variant.op, variant.backend.name, variant.arch), []).append(variant)
    return [kept for group in groups.values() for kept in covering(group, lambda variant: list(enumerate(variant.values)))]


def load_all(units: Iterable[Unit], jobs: int | None = None) -> Report:
    """Load the dispatcher and the units, compiling what is not in the store; a bar on a terminal shows how far it is."""
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    wanted = list(dict.fromkeys([dispatcher.unit(), dispatcher.autograd_unit(), *units]))
    for backend in dict.fromkeys(unit.backend for unit in wanted):
        refusal = backend.refusal()
        if refusal is not None:
            raise ValueError(refusal)
    start = time.monotonic()
    failures = []
    compiled = 0
    # Of several GPUs the current one: the others' kernels are loaded, from this process's libraries, when they are called.
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else -1
    here = (CUDA, CUDA.arch_of(device)) if device >= 0 else None
    with _bar(len(wanted)) as working, workers.Workers(lambda: jobs or compiler_jobs.compiler_jobs()) as team:

        def load(unit: Unit) -> Loaded:
            with working(f"{unit.label} {unit.arch}"):
                loaded = load_unit(unit)
                if (unit.backend, unit.arch) == here:
                    loaded.load_kernels(device)
                return loaded

        results = [team.submit(functools.partial(load, unit)) for unit in wanted]
        for unit, result in zip(wanted, results, strict=True):
            try:
                compiled += result.result().compiled
            except (RuntimeError, OSError) as error:  # of this kernel; the others shall be built all the same
                failures.append(f"{unit.label} ({unit.backend.name} {unit.arch}): {error}")
    return Report(len(wanted), compiled, tuple(failures), time.monotonic() - start)


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[str], contextlib.AbstractContextManager[None]]]:
    """A progress bar for ``total`` kernels on a terminal; elsewhere the lines that each build writes are enough."""
    if not sys.stderr.isatty() or environment.verbosity() == 0:
        yield lambda what: contextlib.nullcontext()
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    left = (TimeRemainingColumn(elapsed_when_finished=True), TextColumn("left"))
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), *left, TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as shown, progress.silenced():
        task = shown.add_task("", total=total)
        running: dict[str, None] = {}

        @contextlib.contextmanager
        def working(what: str) -> Iterator[None]:
            running[what] = None
            shown.update(task, description=escape(", ".join(running)))
            try:
                yield
            finally:
                del running[what]
                shown.update(task, advance=1, description=escape(", ".join(list(running))))

        yield working


def needed(
    ops: Names = None,
    dtypes: torch.dtype | Sequence[torch.dtype] | None = None,
    arguments: Mapping[str, Any] | None = None,
    arch: str | Sequence[str] | None = None,
    backend: str | Sequence[str] | None = None,
) -> list[Wanted]:
    """The variants of ``build``'s arguments, without a manifest."""
    chosen = find_ops(ops)
    chosen_backends, archs = targets(arch, backend)
    given = {name: _listed(values) for name, values in (arguments or {}).items()}
    only = _listed(dtypes) if dtypes is not None else None
    known = {part.text for op in chosen for kernel in op.declaration.kernels.values() for part in kernel.pattern.placeholders}
    for name in given:
        if name not in known:
            raise ValueError(f"no op here has the placeholder {name!r}{nearest(name, known)}")
    wanted = []
    for op in chosen:
        combinations = _combinations(op, only, strict=ops is not None)
        for each in chosen_backends:
            if each.name in op.declaration.kernels:
                for values in _values(op, op.declaration.kernels[each.name].pattern, combinations, given):
                    wanted += [Wanted(op, each, values, target) for target in archs_of(each, archs)]
    return wanted


def replayed(
    file: Path, ops: Names = None, arch: str | Sequence[str] | None = None, backend: str | Sequence[str] | None = None
) -> list[Wanted]:
    """The variants that a manifest lists; CUDA kernels for ``arch`` where it is given, else for what they were recorded for."""
    chosen = {op.qualified_name: op for op in find_ops(ops)}
    everything = {op.qualified_name for op in registry.ops()} | {module.qualified_name for module in registry.modules()}
    archs = _listed(arch) if arch is not None else []
    wanted = []
    for entry in manifest.read(file):
        if entry.op not in everything:
            raise ValueError(f"{file} has the op {entry.op}, which is not declared here: import its library first")
        if entry.op not in chosen or (backend is not None and entry.backend not in _listed(backend)):
            continue
        op = chosen[entry.op]
        if entry.backend not in op.declaration.kernels:
            raise ValueError(f"{file}: {entry.op} has no {entry.backend} kernel")
        of_entry = backends.named(entry.backend)
        of_entry.check_arch(entry.arch)
        values = manifest.values_of(entry, op.declaration.kernels[entry.backend].pattern)
        targets = archs if of_entry.builds_for_others and archs else [entry.arch]
        wanted += [Wanted(op, of_entry, values, target) for target in targets]
    return wanted


def targets(arch: str | Sequence[str] | None, backend: str | Sequence[str] | None) -> tuple[list[Backend], list[str]]:
    """Backends, and the architectures for those that build for other machines than this one."""
    others = [each for each in backends.ALL if each.builds_for_others]
    archs = _listed(arch) if arch is not None else [name for each in others for name in each.archs_here()]
    for each in others:
        for name in archs:
            each.check_arch(name)
    if backend is not None:
        chosen = [backends.named(name) for name in _listed(backend)]
    else:
        chosen = [each for each in backends.ALL if archs or not each.builds_for_others]
    if not archs and any(each.builds_for_others for each in chosen):
        raise ValueError("there is no GPU here: say for which to build, such as arch 9.0a (H100, H200) or 8.0 (A100)")
    return chosen, archs


def archs_of(backend: Backend, archs: list[str]) -> list[str]:
    """Those to build for: what was chosen, or what this machine has."""
    return archs if backend.builds_for_others else backend.archs_here()


def _combinations(op: Op, only: Sequence[torch.dtype] | None, strict: bool) -> list[Combination]:
    """The op's combinations of dtypes in ``only``. If not all of those are the op's, an error if ``strict``, else fewer."""
    if only is None or strict:
        try:
            return op.declaration.dtypes.combinations(only)
        except ValueError:
            raise ValueError(f"{op.qualified_name} has kernels for {op.declaration.dtypes}; got {shown(only or ())}") from None
    known = {dtype for dtypes in (*op.declaration.dtypes.values(), op.declaration.dtypes.shared or ()) for dtype in dtypes}
    asked = [dtype for dtype in only if dtype in known]
    return op.declaration.dtypes.combinations(asked) if asked else []


def _values(
    op: Op, pattern: VariantPattern, combinations: Sequence[Combination], given: Mapping[str, Sequence[Any]]
) -> Iterator[tuple[Value, ...]]:
    """The placeholders' values that are asked for: given ones, dtypes, and what samples have for the rest."""
    chosen = {
        part.text: [manifest.value_of(op.qualified_name, part, pattern.signature, value) for value in given[part.text]]
        for part in pattern.placeholders
        if part.text in given
    }
    found: dict[tuple[Value, ...], None] = {}
    for dtypes in combinations:
        for values in _seeds(op, pattern, dtypes, chosen):
            options = (chosen.get(part.text, [value]) for part, value in zip(pattern.placeholders, values, strict=True))
            found.update(dict.fromkeys(itertools.product(*options)))
    yield from found


def _seeds(
    op: Op, pattern: VariantPattern, dtypes: Combination, chosen: Mapping[str, Sequence[Value]]
) -> Iterator[tuple[Value, ...]]:
    rest = [part for part in pattern.placeholders if part.text not in chosen]
    # Tensors for which one dtype is declared may still have several in a sample, such as a weight of its own.
    may_miss = any(pattern.signature.arguments[part.argument].optional for part in rest)
    names_all = len(rest) <= 1 if dtypes.is_shared else not (may_miss and op.declaration.samples)
    if names_all and all(part.what == "dtype" for part in rest):  # samples would tell nothing more
        named = dict(dtypes.named)
        names = (pattern.signature.arguments[part.argument].name for part in pattern.placeholders)
        yield tuple(named.get(name, dtypes.first) for name in names)
    elif op.declaration.samples is not None:
        for sample in op.declaration.samples(SampleMaker(CPU.device_type, dtypes)):
            unserved = op.declaration.unserved(pattern.dtypes_of(op.declaration.by_name(sample.args, sample.kwargs)))
            if unserved is None:
                yield pattern.values(pattern.words_of(op.declaration.arguments(*sample.args, **sample.kwargs)))
            else:
                fallback.warn_of_samples(unserved)
    else:
        raise ValueError(f"{op.qualified_name} has no samples: give the values of {', '.join(part.text for part in rest)}")


def _listed(values: Any) -> list[Any]:
    return list(values) if isinstance(values, (list, tuple, set, frozenset, range)) else [values]
