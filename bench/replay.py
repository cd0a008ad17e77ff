"""Device time of one call, from replays of CUDA graphs.

Each provider's calls are captured in a graph over rotating buffers, and the replays of all providers are interleaved. Something
runs on the device ahead of each replay, so that the host has enqueued the replay by the time the device gets to it: the
start of the graph on the host is then in no figure.

Rotation alone leaves L2 cold only where a call moves megabytes: 64 calls of 24 KB fit in it. That is how a decoding step meets
its activations, which the layer before has just written. ``Evictor`` empties L2 ahead of each replay instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from bench.providers import Call
from bench.slots import ROTATION_BYTES, Slot
from bench.timing import Samples, round_order

# About 100 us at the clock of a recent GPU, several times what the host takes to start a graph of 64 kernels.
SPIN_CYCLES = 200_000


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


def spin() -> None:
    """Occupy the device for some 100 us without touching memory."""
    torch.cuda._sleep(SPIN_CYCLES)


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
    ahead: Callable[[], None],
    stream: torch.cuda.Stream,
    warm_up_ms: float = 30.0,
) -> dict[str, Samples]:
    """Microseconds per call for each provider: ``rounds`` replays each, interleaved, after ``ahead()`` each.

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
                ahead()
                graphs[name].replay()
            end.record()
            end.synchronize()
            spent += max(start.elapsed_time(end), 0.01)
        for index in range(rounds):
            events = {}
            # One more than each replay gets, so that the host is ahead of the device from the first replay of the round.
            ahead()
            for name in round_order(names, index):
                ahead()
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                graphs[name].replay()
                end.record()
                events[name] = (start, end)
            stream.synchronize()
            for name, (start, end) in events.items():
                values[name].append(start.elapsed_time(end) * 1e3 / calls)
    return {name: Samples(tuple(taken)) for name, taken in values.items()}
