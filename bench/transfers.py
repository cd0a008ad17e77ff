"""Bandwidth of transfers between a GPU and pinned host memory, as a share of ``cudaMemcpyAsync``.

    python -m bench.transfers [--json FILE]

Method. Pages of 64 KiB are picked in random order from caches of 4096 pages on both sides. A call moves 1, 64 or 4096 of them;
``copy`` is one contiguous ``Tensor.copy_`` of as many bytes, which is ``cudaMemcpyAsync``. What a call has moved is compared to
the byte before anything is timed. A sample is a block of calls between two events, behind a kernel that keeps the GPU busy
until the host has launched them; the blocks of all ways are interleaved, and the median is shown. ``rows`` are the same pages
as 64 rows of 1 KiB with an index each, which is how SGLang's kernels take them; ``host`` is the host's time for a call.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench import environment, report
from bench.providers import Unavailable, reason
from bench.timing import Samples, interleave

PAGE_BYTES, ROW_BYTES, POOL = 64 << 10, 1 << 10, 4096
ROWS = PAGE_BYTES // ROW_BYTES
PAGES = (1, 64, 4096)
BOUNDS = (2, 8, 32)
SPIN_CYCLES = 4_000_000  # some 2 ms: 64 calls of 20 us on the host, and what is to spare

Call = Callable[[], object]
Transfer = Callable[[Tensor, Tensor, Tensor, Tensor], object]  # written, its indices, read, its indices


def _ours(max_blocks: int) -> Transfer:
    import torch_jit_ops  # noqa: F401  (defines the op)

    op = torch.ops.jitk.transfer_kv_one_layer.default
    return lambda dst, to, src, where: op(dst, None, to, src, None, where, max_blocks=max_blocks)


def _sglang(block_quota: int | None) -> Transfer:
    """SGLang's kernel for one cache, of rows: by TMA where the GPU has it.

    Raises:
        Unavailable: SGLang is not there.
    """
    try:
        function = importlib.import_module("sglang.kernels.ops.kvcache.hicache").transfer_hicache_one_layer_mla
    except Exception as error:  # of any kind: the package imports a serving stack
        raise Unavailable(f"import: {reason(error)}") from error
    return lambda dst, to, src, where: function(dst, to, src, where, block_quota=block_quota, page_size=ROWS)


class Caches:
    """One direction: both caches as bf16 pages and as rows, and indices of so many pages."""

    def __init__(self, to_device: bool, pages: int) -> None:
        host = torch.randint(-9999, 9999, (POOL, PAGE_BYTES // 2), dtype=torch.int16).view(torch.bfloat16).pin_memory()
        device = torch.empty_like(host, device="cuda")
        self.dst, self.src = (device, host) if to_device else (host, device.normal_())
        order = [torch.randperm(POOL, device="cuda")[:pages] for _ in range(2)]
        self.to, self.where = order
        within = torch.arange(ROWS, device="cuda")
        self.rows_to, self.rows_where = ((x[:, None] * ROWS + within).flatten() for x in order)
        self.pages = pages

    def copy(self) -> None:
        self.dst[: self.pages].copy_(self.src[: self.pages], non_blocking=True)

    def by_pages(self, transfer: Transfer) -> Call:
        return lambda: transfer(self.dst, self.to, self.src, self.where)

    def by_rows(self, transfer: Transfer) -> Call:
        dst, src = (cache.view(-1, ROW_BYTES // 2) for cache in (self.dst, self.src))
        return lambda: transfer(dst, self.rows_to, src, self.rows_where)

    def is_right(self, call: Call) -> bool:
        """Whether the call moves what it should, and nothing else."""
        self.dst.zero_()
        expected = torch.zeros(self.dst.shape, dtype=torch.int16)
        expected[self.to.cpu()] = self.src.cpu().view(torch.int16)[self.where.cpu()]
        call()
        torch.cuda.synchronize()
        return torch.equal(self.dst.cpu().view(torch.int16), expected)


def _timed(call: Call, calls: int) -> float:
    """Microseconds of the device for a call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SPIN_CYCLES)
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1000 / calls


def _host_time(call: Call) -> float:
    """Microseconds of the host for a call: of pinned memory it asks CUDA where it is."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(200):
        call()
    took = (time.perf_counter() - began) * 1e6 / 200
    torch.cuda.synchronize()
    return took


def measure(to_device: bool, pages: int, rounds: int) -> tuple[dict[str, Samples], dict[str, str]]:
    """The samples of each way, in microseconds, and why others are missing."""
    caches = Caches(to_device, pages)
    calls: dict[str, Call] = {"copy": caches.copy}
    missing: dict[str, str] = {}
    ways: list[tuple[str, Callable[[Transfer], Call], Callable[[], Transfer]]] = [
        ("jitk", caches.by_pages, lambda: _ours(0)),
        *((f"jitk {bound}", caches.by_pages, lambda bound=bound: _ours(bound)) for bound in BOUNDS),
        ("jitk rows", caches.by_rows, lambda: _ours(0)),
        ("sglang", caches.by_rows, lambda: _sglang(None)),
        *((f"sglang {bound}", caches.by_rows, lambda bound=bound: _sglang(bound)) for bound in BOUNDS),
    ]
    for name, bind, make in ways:
        try:
            call = bind(make())
            if not caches.is_right(call):
                missing[name] = "WRONG RESULT"
                continue
        except Exception as error:  # Whatever a way raises, the others are still worth measuring.
            missing[name] = reason(error)
            continue
        calls[name] = call
    several = max(2, min(64, (256 << 20) // (pages * PAGE_BYTES)))
    samples = interleave({name: lambda call=call: _timed(call, several) for name, call in calls.items()}, rounds)
    if pages == 1 and "jitk" in calls:
        samples["host"] = Samples(tuple(_host_time(calls["jitk"]) for _ in range(5)))
    return samples, missing


def main(argv: Sequence[str] | None = None) -> int:
    """0 done; 1 a result of ours was wrong or missing; 2 there is no GPU."""
    arguments = argparse.ArgumentParser("python -m bench.transfers", description=(__doc__ or "").partition("\n")[0])
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--json", type=Path)
    given = arguments.parse_args(argv)
    if not torch.cuda.is_available():
        print("there is no GPU to copy to", file=sys.stderr)
        return 2
    out = report.console()
    facts = environment.describe()
    for name, value in facts.items():
        print(f"{name}: {value}", file=out.file)
    kept, wrong = [], False
    for to_device in (True, False):
        rows, reasons = [], {}
        names: list[str] = []
        for pages in PAGES:
            samples, missing = measure(to_device, pages, given.rounds)
            names = names or [name for name in samples if name not in ("copy", "host")]
            reasons |= missing
            wrong = wrong or any(name.startswith("jitk") for name in missing)
            copied = samples["copy"].median
            cells = [f"{pages}", f"{pages * PAGE_BYTES / copied / 1000:.1f}"]
            cells += [report.percent(copied / samples[name].median) if name in samples else "-" for name in names]
            cells.append(report.microseconds(samples["host"].median) if "host" in samples else "-")
            rows.append(cells)
            kept.append(
                {
                    "to_device": to_device,
                    "pages": pages,
                    "us": {name: taken.values for name, taken in samples.items()},
                    "missing": missing,
                }
            )
        title = f"{'host to device' if to_device else 'device to host'}, pages of 64 KiB: share of a copy's bandwidth"
        report.print_table(out, title, ["pages", "copy GB/s", *names, "host us"], rows)
        for name, why in reasons.items():
            print(f"{name}: {why}", file=out.file)
    if given.json:
        given.json.write_text(json.dumps({"environment": facts, "results": kept}, indent=1))
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
