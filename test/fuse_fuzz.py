"""Makes random programs around everything that ``fuse`` looks for, and compares them fused, unfused and in float64.

python test/fuse_fuzz.py --programs 20000 --seed 0      a long run, with a line of figures at its end
python test/fuse_fuzz.py --only 1234                    one program, its fused form and the comparison
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import random
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("JITK_VERBOSE", "0")
os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")

import torch
import user_library  # noqa: F401
from fuse_judge import backend_of, difference, run_compiled, run_exact, run_plain
from fuse_mutations import MUTATIONS, Skip
from fuse_program import Program
from fuse_spellings import SPELLINGS
from torch._dynamo.backends.debugging import aot_eager

from torch_jit_ops import registry
from torch_jit_ops.inductor import Rewrite, fuse

EXTRA = ("relu2", "fused_add_relu", "userlib::affine")  # without patterns of their own: found by their reference


def everything() -> Rewrite:
    """``fuse`` of all ops that it can find."""
    declared = [op for op in registry.ops() if op.declaration.patterns is not None]
    return fuse([*declared, *EXTRA])


# --- making -------------------------------------------------------------------------------------------


def exact(seed: int) -> Program:
    """A program without mutations."""
    rng = random.Random(seed)
    program = SPELLINGS[sorted(SPELLINGS)[seed % len(SPELLINGS)]](rng)
    program.seed = seed
    if "fused_add" not in program.op or program.op == "jitk::fused_add_relu":
        program.grad = rng.random() < 0.4
    return program


def plan(seed: int) -> list[tuple[str, int]]:
    """The mutations of a program, and the seed of each: none depends on those ahead of it."""
    rng = random.Random(f"plan {seed}")
    names = [name for name, (_, weight) in MUTATIONS.items() for _ in range(weight)]
    count = rng.choice([0, 1, 1, 1, 2, 2, 2, 3, 3, 4])
    return [(rng.choice(names), rng.randrange(2**30)) for _ in range(count)]


def build(seed: int, mutations: Iterable[tuple[str, int]]) -> Program:
    """The program of ``seed`` with those mutations of it that leave it runnable."""
    program = exact(seed)
    for name, own in mutations:
        for attempt in range(4):
            changed = program.clone()
            try:
                entry = MUTATIONS[name][0](changed, random.Random(own + attempt))
                runs = not run_plain(changed)[0].error
            except Skip:
                break
            except Exception:  # whatever PyTorch says of a half-made program
                runs = False
            if not runs:
                continue
            changed.history.append(entry)
            program = changed
            break
    return program


# --- judging ------------------------------------------------------------------------------------------


@dataclass
class Verdict:
    """``wrong`` is empty where all is well; ``ops`` were put in; ``skipped`` says why there is nothing to compare."""

    program: Program
    ops: list[str] = field(default_factory=list)
    wrong: str = ""
    skipped: str = ""


def judge(program: Program, rewrite: Callable[[Any], None], inductor: bool = False) -> Verdict:
    plain, events = run_plain(program)
    if plain.error:
        return Verdict(program, skipped=f"eager: {plain.error}")
    truth = run_exact(program, events)
    ops: list[str] = []
    if inductor:
        fused = run_compiled(program, options={**rewrite.options(), "fallback_random": True})
    else:
        fused = run_compiled(program, backend=backend_of(rewrite, counts=ops))
    wrong = difference(program, plain, events, truth, fused)
    if wrong:
        options = {"options": {"fallback_random": True}} if inductor else {"backend": backend_of()}
        control = difference(program, plain, events, truth, run_compiled(program, **options))
        if control:
            return Verdict(program, ops, skipped=f"without fuse: {control}")
    if wrong and not inductor:  # Inductor traces the derivative, and so writes no tensor that is kept for it
        traced = difference(program, plain, events, truth, run_compiled(program, backend=backend_of(rewrite, then=aot_eager)))
        if not traced:
            return Verdict(program, ops, skipped=f"but for AOTAutograd: {wrong}")
    return Verdict(program, ops, wrong)


def shrink(seed: int, mutations: list[tuple[str, int]], rewrite: Callable[[Any], None], inductor: bool = False) -> Verdict:
    """The verdict with as few of the mutations as are wrong too."""
    verdict = judge(build(seed, mutations), rewrite, inductor)
    index = 0
    while index < len(mutations):
        fewer = mutations[:index] + mutations[index + 1 :]
        tried = judge(build(seed, fewer), rewrite, inductor)
        if tried.wrong:
            mutations, verdict = fewer, tried
        else:
            index += 1
    return verdict


@dataclass
class Figures:
    programs: int = 0
    replaced: int = 0
    skipped: int = 0
    exact: int = 0
    found: int = 0
    missed: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    wrong: list[Verdict] = field(default_factory=list)

    def __str__(self) -> str:
        raised = sum("raises" in verdict.wrong for verdict in self.wrong)
        return (
            f"{self.programs} programs, {self.replaced} with an op put in, {self.skipped} not compared, "
            f"{self.found} of {self.exact} exact ones found, {len(self.wrong) - raised} mismatches, {raised} errors"
        )


def campaign(
    seeds: Iterable[int],
    rewrite: Callable[[Any], None] | None = None,
    inductor_every: int = 0,
    report: Callable[[str], None] = lambda text: None,
) -> Figures:
    figures, rewrite = Figures(), rewrite or everything()
    for seed in seeds:
        mutations = plan(seed)
        program = build(seed, mutations)
        verdict = judge(program, rewrite)
        figures.programs += 1
        figures.replaced += bool(verdict.ops)
        if not program.history:
            figures.exact += 1
            figures.found += program.op in verdict.ops
            if program.op not in verdict.ops:
                figures.missed[program.op] += 1
                report(f"NOT FOUND {seed}\n{program.describe()}")
        if verdict.skipped:
            figures.skipped += 1
            figures.reasons[verdict.skipped[:60]] += 1
        if verdict.wrong:
            figures.wrong.append(shrink(seed, mutations, rewrite))
            report(f"WRONG {seed}: {figures.wrong[-1].wrong}\n{figures.wrong[-1].program.describe()}\n")
        elif inductor_every and seed % inductor_every == 0 and not verdict.skipped:
            verdict = judge(program, rewrite, inductor=True)
            if verdict.wrong:
                figures.wrong.append(shrink(seed, mutations, rewrite, inductor=True))
                report(f"WRONG in Inductor {seed}: {verdict.wrong}\n{figures.wrong[-1].program.describe()}\n")
    return figures


@contextlib.contextmanager
def calm() -> Iterator[None]:
    """PyTorch's own logs say of every odd program that it is odd."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


# --- by hand ------------------------------------------------------------------------------------------


def _one(seed: int) -> int:
    program = build(seed, plan(seed))
    print(program.describe())
    graphs: list[str] = []
    try:
        verdict = judge(program, everything())
        run_compiled(program, backend=backend_of(everything(), lambda graph: graphs.append(str(graph))))
    except Exception:
        traceback.print_exc()
        return 2
    print("\n".join(graphs[:3]))
    print(f"ops: {verdict.ops}\nskipped: {verdict.skipped}\nwrong: {verdict.wrong}")
    if verdict.wrong:
        print(f"\nsmallest:\n{shrink(seed, plan(seed), everything()).program.describe()}")
    return bool(verdict.wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0, help="of the first program")
    parser.add_argument("--only", type=int, help="the seed of one program")
    parser.add_argument("--inductor", type=int, default=100, help="every how many programs one runs through Inductor; 0: none")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    with calm():
        if options.only is not None:
            return _one(options.only)
        total = Figures()
        for first in range(options.seed, options.seed + options.programs, 100):
            last = min(first + 100, options.seed + options.programs)
            part = campaign(range(first, last), None, options.inductor, lambda text: print(text, flush=True))
            for name, value in vars(part).items():
                mine = getattr(total, name)
                setattr(total, name, mine + value)
            print(f"{time.monotonic() - start:6.0f} s  {total}", flush=True)
    for reason, count in total.reasons.most_common(12):
        print(f"not compared, {count}: {reason}")
    print(total)
    return bool(total.wrong) or total.found < total.exact


if __name__ == "__main__":
    sys.exit(main())
