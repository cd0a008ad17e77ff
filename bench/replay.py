"""Device time of one call, from replays of CUDA graphs.

Each provider's calls are captured in a graph over rotating buffers; the replays of all providers are interleaved. Before each
replay a buffer larger than L2 is read through, so that every provider starts with cold caches at every size (rotation over
256 MiB alone does it only where a call moves megabytes), and so that the host has enqueued the replay before the device gets to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from bench.cases import Case
from bench.providers import Call, Slot
from bench.timing import Samples, round_order

# What the rotating buffers hold in all: four times the L2 of the largest GPU that this was written on.
ROTATION_BYTES = 256 * 2**20

# Calls in one graph: enough to hide the start of a replay, few enough to capture quickly.
MOST_CALLS = 64
FEWEST_CALLS = 32

# Above this, one call alone outlasts the start of a replay many times over.
LARGE_BYTES = 2**30
CALLS_WHEN_LARGE = 8


@dataclass(frozen=True)
class Plan:
    """How many buffers the calls of one graph rotate over, and how many calls there are."""

    slots: int
    calls: int


def plan(bytes_per_call: int) -> Plan:
    """Buffers and calls for a call that moves ``bytes_per_call``; every buffer is used equally often."""
    if bytes_per_call <= 0:
        raise ValueError(f"bytes_per_call is {bytes_per_call}, expected more than 0")
    slots = min(MOST_CALLS, max(2, -(-ROTATION_BYTES // bytes_per_call)))
    least = CALLS_WHEN_LARGE if bytes_per_call > LARGE_BYTES else FEWEST_CALLS
    return Plan(slots, slots * -(-least // slots))


def make_slots(case: Case, count: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> list[Slot]:
    """``count`` sets of arguments, inputs drawn from a normal distribution, outputs not initialised.

    Every tensor is an allocation of its own, as a caller's would be, and so is aligned to 512 bytes.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    half = case.bytes(dtype.itemsize) // 2 // dtype.itemsize
    slots = []
    for _ in range(count):
        inputs = tuple(
            torch.randn(shape, dtype=dtype, device=device, generator=generator)
            for shape in case.operation.input_shapes(case.tokens, case.d)
        )
        out = torch.empty((case.tokens, case.d), dtype=dtype, device=device)
        copies = [torch.empty(half, dtype=dtype, device=device) for _ in range(2)]
        # Zeros are not representative data: some memory systems move them faster.
        copies[1].normal_(generator=generator)
        slots.append(Slot(inputs, out, copies[0], copies[1]))
    return slots


def capture(call: Call, slots: Sequence[Slot], calls: int, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """A graph of ``calls`` calls over ``slots`` in turn. The first call, which may compile, runs before the capture."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for slot in slots[:3]:
            call(slot)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: compiler workers of the providers may touch CUDA meanwhile.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for index in range(calls):
                call(slots[index % len(slots)])
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


class Evictor:
    """Reads a buffer of four times the L2 (at least 256 MiB) through the caches.

    It reads, and does not write, because modified lines would be written back during the replay that follows.
    """

    def __init__(self, device: torch.device) -> None:
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self._buffer = torch.zeros(max(ROTATION_BYTES, 4 * l2) // 4, dtype=torch.float32, device=device)
        self._result = torch.zeros((), dtype=torch.float32, device=device)

    def __call__(self) -> None:
        torch.sum(self._buffer, dim=0, out=self._result)


def measure(
    graphs: Mapping[str, torch.cuda.CUDAGraph],
    calls: int,
    rounds: int,
    evict: Evictor,
    stream: torch.cuda.Stream,
    warm_up_ms: float = 30.0,
) -> dict[str, Samples]:
    """Microseconds per call for each provider: ``rounds`` replays each, interleaved.

    ``warm_up_ms`` of replays come first: an idle GPU has lowered its clocks, and the compiling before left it idle.
    """
    names = list(graphs)
    if not names:
        return {}
    values: dict[str, list[float]] = {name: [] for name in names}
    with torch.cuda.stream(stream):
        spent = 0.0
        while spent < warm_up_ms:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for name in names:
                evict()
                graphs[name].replay()
            end.record()
            end.synchronize()
            spent += max(start.elapsed_time(end), 0.01)
        for index in range(rounds):
            events = {}
            # One more than each replay gets, so that the host is ahead of the device from the first replay of the round.
            evict()
            for name in round_order(names, index):
                evict()
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                graphs[name].replay()
                end.record()
                events[name] = (start, end)
            stream.synchronize()
            for name, (start, end) in events.items():
                values[name].append(start.elapsed_time(end) * 1e3 / calls)
    return {name: Samples(tuple(taken)) for name, taken in values.items()}
