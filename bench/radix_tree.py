"""RadixTree beside SGLang's algorithm in Python (bench/radix_model.py): a scheduler's calls, on a trace of prompts.

python -m bench.radix_tree                               10k requests, pages of 1 and 16 tokens
python -m bench.radix_tree --requests 1000 --tokens list       fewer, and tokens in lists
python -m bench.radix_tree --by-token                          beside a Python that compares token by token, not by slices

Method. Requests of 1024 to 8192 tokens: conversations that go on from an earlier one, and new ones behind one of 20 system
prompts. What a scheduler does with each: find and lock its prefix; take slots for the rest, and evict if there are too few;
when it is done, which is when 64 others have begun, insert it and unlock. The cache has 2 million slots, and many requests have
to evict. All trees get the same calls, and must answer alike. The time is that of the process's CPU, in the calls alone, less
what it costs to take it. Tokens come as they are in a scheduler's memory: int64 arrays, as SGLang has them.
"""

from __future__ import annotations

import argparse
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
    "int64": lambda tokens: tokens,
    "int32": lambda tokens: tokens.to(torch.int32),
    "list": lambda tokens: tokens.tolist(),
}


@dataclass
class Spent:
    """CPU seconds and calls of each kind, and what tells two trees apart."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CALLS, 0.0))
    calls: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CALLS, 0))
    answers: list[int] = field(default_factory=list)

    def call(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        result = function(*args, **kwargs)
        self.seconds[name] += time.process_time() - start
        self.calls[name] += 1
        return result

    def us(self, name: str) -> float:
        return (self.seconds[name] / max(1, self.calls[name]) - cost_of_timing()) * 1e6

    @property
    def per_second(self) -> float:
        calls = sum(self.calls.values())
        return calls / (sum(self.seconds.values()) - calls * cost_of_timing())


@functools.cache
def cost_of_timing() -> float:
    """CPU seconds that a call takes that does nothing."""
    spent = Spent()
    for _ in range(20_000):
        spent.call(CALLS[0], int)
    return spent.seconds[CALLS[0]] / spent.calls[CALLS[0]]


def run(tree: Any, trace: Sequence[Any], values: Any) -> Spent:
    """Make a scheduler's calls. Slots are counted, not kept: which they are is of no matter to a tree."""
    spent = Spent()
    free = SLOTS
    running: deque[tuple[Any, Any, int]] = deque()

    def finish() -> int:
        tokens, node, taken = running.popleft()
        known = spent.call("insert", tree.insert, tokens, values[: len(tokens)])
        spent.call("lock, unlock", tree.unlock, node)
        spent.answers.append(known)
        kept = (len(tokens) // tree.page_size * tree.page_size) - known
        return taken - kept

    for tokens in trace:
        if len(running) == RUNNING:
            free += finish()
        _, node, length = spent.call("match_prefix", tree.match_prefix, tokens)
        spent.call("lock, unlock", tree.lock, node)
        needed = len(tokens) - length
        if free < needed:
            free += len(spent.call("evict", tree.evict, needed))
        free -= needed
        spent.answers += [length, free]
        running.append((tokens, node, needed))
    return spent


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.radix_tree", description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000, metavar="N")
    parser.add_argument("--pages", type=int, nargs="+", default=[1, 16], metavar="N", help="page sizes (default: 1 and 16)")
    parser.add_argument("--tokens", nargs="+", choices=FORMS, default=["array"], help="as what they come (default: array)")
    parser.add_argument("--by-token", action="store_true", help="beside a Python that compares token by token")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    out = report.console()
    report.print_environment(out, environment.describe())
    trace = make_trace(options.requests)
    lengths = [len(tokens) for tokens in trace]
    RadixTree().match_prefix([0])  # compiled here
    rows, wrong = [], []
    of_model = [FORMS["array"](tokens) for tokens in trace]
    for page_size in options.pages:
        model = run((ByToken if options.by_token else Model)(page_size), of_model, torch.arange(LONGEST))
        for form in options.tokens:
            tree = RadixTree(page_size)
            given = of_model if form == "array" else [FORMS[form](tokens) for tokens in trace]
            ours = run(tree, given, torch.arange(LONGEST, dtype=torch.int32 if form == "int32" else torch.int64))
            if ours.answers != model.answers:
                wrong.append(f"pages of {page_size}, {form}: the trees differ")
            for name in CALLS:
                if model.calls[name]:
                    theirs, mine = model.us(name), ours.us(name)
                    row = [
                        str(page_size),
                        form,
                        name,
                        f"{ours.calls[name]}",
                        f"{theirs:.1f}",
                        f"{mine:.1f}",
                        f"{theirs / mine:.1f}",
                    ]
                    rows.append(row)
            theirs, mine = model.per_second, ours.per_second
            rows.append(
                [str(page_size), form, "calls per second", "", f"{theirs:,.0f}", f"{mine:,.0f}", f"{mine / theirs:.1f}"]
            )
            rows.append([str(page_size), form, "bytes per token", "", "", f"{tree.nbytes / max(1, tree.total):.2f}", ""])
    title = f"{options.requests} requests of {min(lengths)} to {max(lengths)} tokens, us of CPU a call"
    report.print_table(out, title, ["page", "tokens", "call", "calls", "Python", "RadixTree", "times"], rows, labels=3)
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
