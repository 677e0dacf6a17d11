"""Times of many implementations, taken in turns on a CPU or a GPU.

CPU: wall clock. GPU: CUDA events around calls queued back to back over rotating inputs and kept
outputs, so that neither comes from the L2 cache; below 20 microseconds the queue would be timed
instead of the kernel, so the same calls are replayed as a CUDA graph.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Call = Callable[[torch.Tensor], object]
_GRAPH_BELOW = 20e-6
_MOST_SETS = 256


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median, smallest and largest round; how; eagerly, where a graph ran."""

    median: float
    low: float
    high: float
    how: str = ""
    eager: float = math.nan


def first_call(run: Callable[[], object], device: str) -> float:
    """Seconds of one call, the first of its kind when the caller made it so."""
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def sets(nbytes: int, device: str) -> int:
    """How many buffer sets to rotate so that 3 times the L2 cache lies between two uses of one."""
    if device != "cuda":
        return 1  # on a CPU a size is in or out of cache as its user's would be
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(_MOST_SETS, math.ceil(3 * l2 / max(nbytes, 1))))


def measure(
    runs: dict[str, Call],
    inputs: list[torch.Tensor],
    *,
    rounds: int,
    most: float = 20.0,
) -> dict[str, Timing]:
    """Times every run in turns.

    Args:
        runs: implementations by name, each a function of one input.
        inputs: buffer sets to rotate through.
        rounds: turns each run gets; fewer (at least 3) where all would take over ``most`` seconds.
        most: seconds for everything together, about.
    """
    device = inputs[0].device.type
    # What one turn of one run lasts at least: events are finer clocks than a CPU's weather.
    inner = 0.005 if device == "cuda" else 0.02
    work = {name: _over(run, inputs) for name, run in runs.items()}
    once = {name: _once(calls, device) for name, calls in work.items()}
    eager: dict[str, float] = {}
    if device == "cuda":
        for name in work:
            if once[name] / len(inputs) < _GRAPH_BELOW:
                replay = _graph(work[name])
                if replay is not None:
                    eager[name] = once[name] / len(inputs)
                    work[name], once[name] = replay, _once(replay, device)
    loops = {name: max(1, int(inner / max(seconds, 1e-7))) for name, seconds in once.items()}
    turn = sum(loops[name] * once[name] for name in work)
    rounds = max(3, min(rounds, int(most / max(turn, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    with _no_collection():
        for _ in range(rounds):
            for name, calls in work.items():
                calls_made = loops[name] * len(inputs)
                times[name].append(_timed(calls, loops[name], device) / calls_made)
    return {
        name: Timing(
            statistics.median(values),
            min(values),
            max(values),
            "graph" if name in eager else "eager",
            eager.get(name, math.nan),
        )
        for name, values in times.items()
    }


def _over(run: Call, inputs: list[torch.Tensor]) -> Callable[[], object]:
    held: list[object] = [None] * len(inputs)

    def rotating() -> None:
        # Outputs are kept for a turn: the allocator hands out other memory for the next input.
        for i, x in enumerate(inputs):
            held[i] = None
            held[i] = run(x)

    return rotating if len(inputs) > 1 else lambda: run(inputs[0])


def _once(calls: Callable[[], object], device: str) -> float:
    calls()
    return min(_timed(calls, 1, device) for _ in range(2))


def _timed(calls: Callable[[], object], loops: int, device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(loops):
            calls()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before.record()
    for _ in range(loops):
        calls()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def _graph(calls: Callable[[], object]) -> Callable[[], None] | None:
    """The calls as a CUDA graph, or None where they cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            calls()
    except Exception:
        torch.cuda.synchronize()
        return None
    return graph.replay


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
