"""Timing side by side in one process, and rows that say where they come from."""

from __future__ import annotations

import csv
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def interleaved(
    runs: dict[str, Callable[[], object]],
    *,
    rounds: int = 9,
    inner_seconds: float = 0.02,
    wait: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Median seconds per call of each run, measured in turns so that drift hits all alike."""
    loops = {}
    for name, run in runs.items():
        run()
        wait()
        start = time.perf_counter()
        run()
        wait()
        once = time.perf_counter() - start
        loops[name] = max(1, int(inner_seconds / max(once, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(loops[name]):
                run()
            wait()
            times[name].append((time.perf_counter() - start) / loops[name])
    return {name: statistics.median(values) for name, values in times.items()}


def machine() -> dict[str, str]:
    """Where and with what a row was measured."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    device = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
        ]
        device = names[0].split(":")[1].strip() if names else device
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else device,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "spikingjelly": _version("spikingjelly"),
        "commit": commit,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": " ".join(["python", *sys.argv]),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "-"


def save(name: str, rows: Iterable[dict[str, object]]) -> Path:
    """Writes rows to benchmarks/results/<name>.csv with the machine beside each."""
    rows = [{**row, **machine()} for row in rows]
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def tune_malloc() -> None:
    """Keeps freed memory in the process, for all competitors alike (glibc only).

    A fresh output of tens of MB otherwise costs more in page faults than any kernel here.
    """
    import ctypes

    try:
        libc = ctypes.CDLL(None)
        m_mmap_threshold, m_trim_threshold = -3, -1
        libc.mallopt(m_mmap_threshold, 2**31 - 1)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
    except (OSError, AttributeError):
        print("mallopt is not there: fresh large outputs will cost page faults")
