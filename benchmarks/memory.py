"""Memory that a call takes beyond its inputs: what it holds at the end, and at most.

CPU: the allocation events of torch's profiler, which are exact and see every tensor whoever makes
it; the size of the process would see page rounding, caches and the allocator's own habits instead.
GPU: the counters of torch's caching allocator. Neither sees what does not go through torch (the CPU
kernels' scratch of some KB per thread).
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch._C._profiler import _EventType


def taken(run: Callable[[], object], device: str) -> tuple[int, int]:
    """Bytes held when ``run()`` has returned (its result alive), and the most held on the way."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        held = run()
        torch.cuda.synchronize()
        end, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        del held
        return end - before, peak - before
    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        held = run()
    events = _allocations(profiler.profiler.kineto_results.experimental_event_tree())
    del held
    live: dict[int, int] = {}
    peak = 0
    for _, address, nbytes in sorted(events, key=lambda event: event[0]):
        if nbytes > 0:
            live[address] = nbytes
            peak = max(peak, sum(live.values()))
        else:
            # What an earlier call left, and this one lets go, was never counted.
            live.pop(address, None)
    return sum(live.values()), peak


def _allocations(tree: list[Any]) -> list[tuple[int, int, int]]:
    """(time, address, bytes; negative when freed) of every allocation in an event tree."""
    found, waiting = [], list(tree)
    while waiting:
        event = waiting.pop()
        waiting += event.children
        kind, fields = event.typed
        if kind == _EventType.Allocation and fields.device.type == "cpu":
            found.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    return found
