"""Writes ops and their built kernels as a folder for programs without Python.

    torch_jit_ops.deploy("kernels", programs=[torch.export.export(model, (x,))])      what these programs call
    torch_jit_ops.deploy("kernels", ops=["silu_and_mul"], dtypes=[torch.bfloat16])    said by hand, as for build()
    torch_jit_ops.deploy("kernels", manifest="run.jsonl")                             what a run in Python recorded

A program loads ``kernels/libjitk_ops.so``, which defines the ops by itself, before it loads a model that calls them.
``csrc/runtime/standalone.cpp`` is that library and reads what is written here.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torch_jit_ops import backends, registry
from torch_jit_ops.ahead import build_ahead
from torch_jit_ops.builder.errors import BuildError
from torch_jit_ops.builder.load import load
from torch_jit_ops.builder.unit import Unit
from torch_jit_ops.calling import dispatcher
from torch_jit_ops.declaring.dtypes import shown
from torch_jit_ops.declaring.signature import tensors_of
from torch_jit_ops.op import Op
from torch_jit_ops.store import files

LIBRARY = "libjitk_ops.so"
TABLE = "ops.txt"
_VERSION = "jitk 1"  # Reader of csrc/runtime/table.h

Program = torch.export.ExportedProgram | str | os.PathLike[str]


@dataclass(frozen=True)
class Deployment:
    """A folder that was written: ``library`` to load, and how many ``kernels`` it has."""

    folder: Path
    library: Path
    kernels: int
    compiled: int
    seconds: float


def deploy(
    folder: str | os.PathLike[str],
    ops: build_ahead.Names = None,
    dtypes: torch.dtype | Sequence[torch.dtype] | None = None,
    arguments: Mapping[str, Any] | None = None,
    *,
    programs: Sequence[Program] = (),
    manifest: str | os.PathLike[str] | None = None,
    arch: str | Sequence[str] | None = None,
    backend: str | Sequence[str] | None = None,
    jobs: int | None = None,
) -> Deployment:
    """Write a folder from which a program without Python runs ops. What is not in the store is compiled.

    Args:
        folder: a new one, or one that this function wrote, which is replaced as a whole.
        ops, dtypes, arguments, arch, backend, jobs: as for ``build``; all ops if nothing says which.
        programs: exported programs, or files of ``torch.export.save``, whose calls say which kernels are needed.
        manifest: a file that ``JITK_RECORD`` wrote.

    Raises:
        BuildError: a kernel does not compile.
        FileExistsError: ``folder`` is something else.
        ValueError: as for ``build``; or a program calls an op in a way that has no kernel, or whose kernel depends on a size
            that the program leaves open.
    """
    start = time.monotonic()
    target = Path(folder)
    if target.exists() and not (target / TABLE).is_file() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{target} is there, and is no folder that deploy wrote: name another, or remove it")
    wanted = [each for program in programs for each in called_by(program, arch)]
    if manifest is not None:
        wanted += build_ahead.replayed(Path(manifest), None, arch, backend)
    if ops is not None or not (programs or manifest is not None):
        wanted += build_ahead.needed(ops, dtypes, arguments, arch, backend)
    wanted = list(dict.fromkeys(wanted))
    units = [each.unit() for each in wanted]
    report = build_ahead.load_all([dispatcher.standalone_unit(), *units], jobs)
    if report.failures:
        raise BuildError(
            f"{len(report.failures)} of {report.kernels} kernels could not be built\n" + "\n".join(report.failures)
        )
    with files.replacing(target.resolve()) as unfinished:
        files.make_private(unfinished)
        _write(unfinished, wanted, units)
    return Deployment(target, target / LIBRARY, len(wanted), report.compiled, time.monotonic() - start)


def _write(folder: Path, wanted: Sequence[build_ahead.Wanted], units: Sequence[Unit]) -> None:
    shutil.copyfile(load(dispatcher.standalone_unit()).path, folder / LIBRARY)
    names = {}
    for unit in units:
        names[unit] = f"{unit.name}-{unit.key()[:16]}.so"
        shutil.copyfile(load(unit).path, folder / names[unit])
    lines = [_VERSION]
    for op in dict.fromkeys(each.op for each in wanted):
        forms = op.declaration.overloads
        lines += [f"op {op.declaration.namespace} {signature.schema(_name(op, form))}" for form, signature in forms.items()]
        for backend, kernel in ((backends.named(name), kernel) for name, kernel in op.declaration.kernels.items()):
            for form, signature in forms.items():
                lines.append(f"slot {op.declaration.namespace} {_name(op, form)} {backend.dispatch_key}")
                lines.append(kernel.pattern.plan(signature))
                lines += [f"asked {part.text}" for part in kernel.pattern.placeholders]
                for each, unit in zip(wanted, units, strict=True):
                    if (each.op, each.backend) == (op, backend):
                        export = op.declaration.checked_export(backend.name, load(unit))
                        words = ",".join(map(str, kernel.pattern.key(each.values))) or "-"
                        lines.append(f"kernel {names[unit]} {export} {each.arch} {words} {unit.label}")
    (folder / TABLE).write_text("\n".join(lines) + "\n")
    # Others may read it, such as the user of a service, and only this one write it.
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _name(op: Op, form: str) -> str:
    return f"{op.name}.{form}" if form else op.name


# --- what a program calls ---------------------------------------------------------------------------


def called_by(program: Program, arch: str | Sequence[str] | None = None) -> Iterator[build_ahead.Wanted]:
    """The variants that an exported program needs; those of CUDA for ``arch``, by default of the GPUs here.

    Raises:
        ValueError: a call has no kernel, or it is not known which.
    """
    if isinstance(program, torch.export.ExportedProgram):
        exported = program
    else:
        with open(program, "rb") as file:  # given a name that is not there, PyTorch 2.15 logs a traceback too
            exported = torch.export.load(file)
    ops = {op.qualified_name: op for op in registry.ops()}
    for node in _nodes(exported.graph_module):
        for target in (node.target, *node.args):  # a functionalised call has the op as its first argument
            op = ops.get(target._schema.name) if isinstance(target, torch._ops.OpOverload) else None
            if op is None:
                continue
            if target is not node.target:
                raise ValueError(
                    f"the program's call of {op.qualified_name} is functionalised: pass it as torch.export made it"
                )
            yield from _of_call(op, node, arch)


def _nodes(module: torch.fx.GraphModule) -> Iterable[torch.fx.Node]:
    """The calls of the program and of the bodies of its loops and conditions."""
    parts = (part for part in module.modules() if isinstance(part, torch.fx.GraphModule))
    return (node for part in parts for node in part.graph.nodes if node.op == "call_function")


def _of_call(op: Op, node: torch.fx.Node, arch: str | Sequence[str] | None) -> Iterator[build_ahead.Wanted]:
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda each: each.meta["val"])
    given = {name: value for name, value in kwargs.items() if name not in op.declaration.outputs}
    values = op.declaration.arguments(*args, **given)
    device = next(tensors_of(values)).device
    backend = backends.of_device(device)
    who = f"the program's call of {op.qualified_name}"
    if backend is None or backend.name not in op.declaration.kernels:
        served = ", ".join(op.declaration.kernels) or "none"
        raise ValueError(f"{who} is on {device.type}, where the op has no kernel; it has some for {served}")
    pattern = op.declaration.kernels[backend.name].pattern
    words = pattern.static_words_of(values)
    if words is None:
        names = ", ".join(part.text for part in pattern.placeholders)
        raise ValueError(
            f"{who} leaves open what picks its kernel ({names}): export it with these sizes static, or name the op and the "
            "values instead of the program"
        )
    chosen = pattern.values(words)
    unserved = op.declaration.unserved(pattern.dtypes_of(op.declaration.by_name(args, given)))
    if unserved is not None:
        whose = "is" if op.declaration.dtypes.shared is not None else f"has {unserved.argument!r}"
        asked = "another dtype" if unserved.dtype is None else shown([unserved.dtype])
        raise ValueError(f"{who} {whose} in {asked}, for which the op has no kernel; it has some for {shown(unserved.kernels)}")
    archs = build_ahead.archs_of(backend, build_ahead.targets(arch, backend.name)[1])
    yield from (build_ahead.Wanted(op, backend, chosen, each) for each in archs)
