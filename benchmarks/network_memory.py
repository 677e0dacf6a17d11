"""What one call of a whole network takes at most, in a process of its own.

    python benchmarks/network_memory.py NETWORK RIVAL BATCH T [DATA]

Prints bytes: the largest resident size during the call less that before it. The network is made and
called once on one image first; freed memory is given back in between. Unlike torch's profiler this
sees memory that does not go through torch. Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import subprocess
import sys
from pathlib import Path

from common import Skip

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _status(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise Skip(f"/proc/self/status has no {field}")


def _trim() -> None:
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def measure(network: str, rival: str, batch: int, T: int, data: Path | None) -> int:
    """Bytes of one call, in this process."""
    import torch
    from network_rivals import made, rivals
    from networks import subject

    found = subject(network, data, batch)
    (chosen,) = [r for r in rivals() if r.name == rival]
    with torch.no_grad():
        run = made(chosen, found)
        run(found.batch(1), 1)
        x = found.batch(batch)
        _trim()
        _CLEAR.write_text("5")  # the peak starts again
        before = _status("VmRSS")
        out = run(x, T)
        peak = _status("VmHWM")
        del out
    return peak - before


def in_a_process(network: str, rival: str, batch: int, T: int, data: Path | None) -> int:
    """Bytes of one call, in another process with the allocator's own settings."""
    if not _CLEAR.exists():
        raise Skip("the peak of a process can be read on Linux only")
    command = [sys.executable, __file__, network, rival, str(batch), str(T)]
    command += [str(data)] if data else []
    # Large buffers go back to the system when they are freed, whoever asked for them.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise Skip(last.removeprefix("common.Skip: ")[:200])
    return int(done.stdout.split()[-1])


if __name__ == "__main__":
    name, rival_name, size, steps = sys.argv[1:5]
    where = Path(sys.argv[5]) if len(sys.argv) > 5 else None
    print(measure(name, rival_name, int(size), int(steps), where))
