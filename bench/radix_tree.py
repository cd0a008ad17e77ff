"""RadixTree beside SGLang's RadixCache, and beside its algorithm in Python: a scheduler's calls, on a trace of prompts.

python -m bench.radix_tree                                     10k requests, pages of 1 and 16 tokens
python -m bench.radix_tree --requests 1000 --tokens list       fewer, and tokens in lists
python -m bench.radix_tree --beside by-token                   beside a Python that compares token by token, not by slices

Method. Requests of 1024 to 8192 tokens: conversations that go on from an earlier one, and new ones behind one of 20 system
prompts. What a scheduler does with each: find and lock its prefix; take slots for the rest, and evict if there are too few;
when it is done, which is when 64 others have begun, insert it and unlock. The cache has 2 million slots, and many requests have
to evict. All trees get the same calls, and must answer alike. Tokens come as they are in a scheduler's memory: int64 arrays,
which SGLang's scheduler joins or cuts just before each call, so that they are in the CPU's cache, and the tree is not; `--cold`
has them as they lay since the trace was made. The whole trace is run several times, the trees by turns, and of each call the
fastest counts, since what else the machine does only adds; less what it costs to look at the clock.

SGLang's class (bench/radix_sglang.py) is measured if it can be imported.
"""

from __future__ import annotations

import argparse
import copy
import functools
import random
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench import environment, report
from bench.radix_model import ByToken, Model
from torch_jit_ops import RadixTree

SLOTS, RUNNING, SYSTEM_PROMPTS = 2_000_000, 64, 20
SHORTEST, LONGEST, VOCABULARY = 1024, 8192, 128_000
CALLS = ("match_prefix", "insert", "evict", "lock, unlock")


def make_trace(requests: int, seed: int = 0) -> list[Tensor]:
    """The tokens of each request, int64."""
    choose, draw = random.Random(seed), torch.Generator().manual_seed(seed)

    def tokens(fewest: int, most: int) -> Tensor:
        return torch.randint(VOCABULARY, (choose.randint(fewest, most),), generator=draw)

    systems = [tokens(256, 2048) for _ in range(SYSTEM_PROMPTS)]
    trace: list[Tensor] = []
    for _ in range(requests):
        earlier = trace[-choose.randint(1, min(500, len(trace)))] if trace and choose.random() < 0.6 else None
        if earlier is not None and len(earlier) < LONGEST - 800:
            trace.append(torch.cat([earlier, tokens(100, 800)]))
        else:
            trace.append(torch.cat([choose.choice(systems), tokens(SHORTEST, LONGEST - 2048)]))
    return trace


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "array": lambda tokens: array("q", tokens.tolist()),
    "numpy": lambda tokens: tokens.numpy().copy(),
    "int64": lambda tokens: tokens,
    "int32": lambda tokens: tokens.to(torch.int32),
    "list": lambda tokens: tokens.tolist(),
}


@dataclass
class Spent:
    """Seconds of each call by kind, and what tells two trees apart."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in CALLS})
    answers: list[int] = field(default_factory=list)
    bytes_per_token: float = 0

    def call(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        start = time.perf_counter()
        result = function(*args)
        self.seconds[name].append(time.perf_counter() - start)
        return result

    def calls(self, name: str) -> int:
        return len(self.seconds[name])

    def us(self, name: str) -> float:
        return (sum(self.seconds[name]) / max(1, self.calls(name)) - cost_of_timing()) * 1e6

    @property
    def per_second(self) -> float:
        calls = sum(map(self.calls, CALLS))
        return calls / (sum(map(sum, self.seconds.values())) - calls * cost_of_timing())

    def take_faster(self, other: Spent) -> None:
        if self.answers != other.answers:
            raise RuntimeError("a tree answered otherwise when it was asked again")
        for name, seconds in other.seconds.items():
            self.seconds[name] = list(map(min, self.seconds[name], seconds))


@functools.cache
def cost_of_timing() -> float:
    """Seconds that a call takes that does nothing."""
    spent = Spent()
    for _ in range(20_000):
        spent.call(CALLS[0], int)
    return min(spent.seconds[CALLS[0]])


def run(tree: Any, trace: Sequence[Any], values: Any, as_fresh: Callable[[Any], Any]) -> Spent:
    """Make a scheduler's calls. Slots are counted, not kept: which they are is of no matter to a tree."""
    spent = Spent()
    free = SLOTS
    running: deque[tuple[Any, Any, int]] = deque()

    def finish() -> int:
        tokens, held, taken = running.popleft()
        known = spent.call("insert", tree.insert, as_fresh(tokens), values[: len(tokens)])
        spent.call("lock, unlock", tree.unlock, held)
        spent.answers.append(known)
        kept = (len(tokens) // tree.page_size * tree.page_size) - known
        return taken - kept

    for tokens in trace:
        if len(running) == RUNNING:
            free += finish()
        _, node, length = spent.call("match_prefix", tree.match_prefix, as_fresh(tokens))
        receipt = spent.call("lock, unlock", tree.lock, node)
        needed = len(tokens) - length
        if free < needed:
            free += len(spent.call("evict", tree.evict, needed))
        free -= needed
        spent.answers += [length, free]
        running.append((tokens, node if receipt is None else receipt, needed))
    spent.bytes_per_token = tree.nbytes / max(1, tree.total)
    return spent


def fresh(tokens: Any) -> Any:
    return tokens.clone() if isinstance(tokens, Tensor) else copy.copy(tokens)


def as_they_lie(tokens: Any) -> Any:
    return tokens


def peers(wanted: Sequence[str] | None) -> dict[str, Callable[[int], Any]]:
    """What to measure beside, by name."""
    known: dict[str, Callable[[int], Any]] = {"model": Model, "by-token": ByToken}
    try:
        from bench.radix_sglang import SGLang

        known["sglang"] = SGLang
    except ImportError as missing:
        print(f"sglang cannot be imported: {missing}", file=sys.stderr)
    return {name: known[name] for name in wanted or ("sglang", "model") if name in known}


def are_alike(name: str, theirs: Spent, ours: Spent) -> bool:
    """SGLang's may differ in what it evicts (bench/radix_model.py), and so in some of what it finds."""
    if name != "sglang":
        return theirs.answers == ours.answers
    return abs(sum(theirs.answers) - sum(ours.answers)) <= 0.01 * sum(theirs.answers)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.radix_tree", description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000, metavar="N")
    parser.add_argument("--pages", type=int, nargs="+", default=[1, 16], metavar="N", help="page sizes (default: 1 and 16)")
    parser.add_argument("--tokens", nargs="+", choices=FORMS, default=["array"], help="as what they come (default: array)")
    parser.add_argument("--beside", nargs="+", choices=["sglang", "model", "by-token"], help="default: sglang, model")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="of the whole trace (default: 3)")
    parser.add_argument("--cold", action="store_true", help="tokens are not in the CPU's cache")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    out = report.console()
    report.print_environment(out, environment.describe())
    trace = make_trace(options.requests)
    lengths = [len(tokens) for tokens in trace]
    RadixTree().match_prefix([0])  # compiled here
    given = {form: [FORMS[form](tokens) for tokens in trace] for form in {"array", *options.tokens}}
    beside = peers(options.beside)
    rows, wrong = [], []
    for page_size in options.pages:
        # A tree, its tokens, the dtype of its values.
        trees = [(name, make, "array") for name, make in beside.items()]
        trees += [(f"ours {form}", RadixTree, form) for form in options.tokens]
        found: dict[str, Spent] = {}
        for _ in range(options.runs):
            for name, make, form in trees:
                values = torch.arange(LONGEST, dtype=torch.int32 if form == "int32" else torch.int64)
                spent = run(make(page_size), given[form], values, as_they_lie if options.cold else fresh)
                found.setdefault(name, spent).take_faster(spent)
        for form in options.tokens:
            ours = found[f"ours {form}"]
            for name in beside:
                theirs = found[name]
                if not are_alike(name, theirs, ours):
                    wrong.append(f"pages of {page_size}, {form}, beside {name}: the trees differ")
                row = [str(page_size), form, name]
                for call in filter(ours.calls, CALLS):
                    them, us = theirs.us(call), ours.us(call)
                    rows.append([*row, call, f"{ours.calls(call)}", f"{them:.1f}", f"{us:.2f}", f"{them / us:.1f}"])
                them, us = theirs.per_second, ours.per_second
                rows.append([*row, "calls per second", "", f"{them:,.0f}", f"{us:,.0f}", f"{us / them:.1f}"])
                them, us = theirs.bytes_per_token, ours.bytes_per_token
                rows.append([*row, "bytes per token", "", f"{them:.2f}", f"{us:.2f}", f"{them / us:.1f}"])
    title = f"{options.requests} requests of {min(lengths)} to {max(lengths)} tokens, us a call"
    report.print_table(out, title, ["page", "tokens", "beside", "call", "calls", "its", "RadixTree", "times"], rows, labels=4)
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
