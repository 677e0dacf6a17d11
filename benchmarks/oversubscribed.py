"""Kernels beside busy processes: what OpenMP's waiting costs, by OMP_WAIT_POLICY.

    python benchmarks/oversubscribed.py --out benchmarks/results/oversubscribed.csv

Twice as many processes as there are cores do nothing but count. Beside them a process per setting
calls kernels with one thread and with a thread per core, turn by turn; a row gives the times with
all threads over those with one (median, and the worst tenth), so that only ratios leave this
machine. Under a minute.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

SETTINGS = {
    "default": {},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "GOMP_SPINCOUNT=100": {"GOMP_SPINCOUNT": "100"},
}
COLUMNS = [
    "cores", "busy_processes", "setting", "neuron_steps", "calls",
    "median_vs_one_thread", "worst_tenth_vs_one_thread",
]  # fmt: skip
SIZES = {"8 x 40,000": (8, 40_000), "8 x 400,000": (8, 400_000)}


def measure(seconds: float, cores: int) -> None:
    """In a process with its setting: prints the ratios."""
    import torch

    from snnkernels import functional

    found = {}
    for name, shape in SIZES.items():
        x = torch.rand(shape)
        times: dict[int, list[float]] = {1: [], cores: []}
        end = time.perf_counter() + seconds / len(SIZES)
        while time.perf_counter() < end or len(times[1]) < 5:
            for threads, those in times.items():
                torch.set_num_threads(threads)
                functional.if_count(x)
                began = time.perf_counter()
                functional.if_count(x)
                those.append(time.perf_counter() - began)
        one, all_ = (sorted(those) for those in times.values())
        found[name] = [
            len(one),
            all_[len(all_) // 2] / one[len(one) // 2],
            all_[len(all_) * 9 // 10] / one[len(one) * 9 // 10],
        ]
    print(json.dumps(found))


def busy() -> None:
    while True:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=6.0, help="per setting")
    parser.add_argument("--out", type=Path, default=Path("oversubscribed.csv"))
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    cores = max(2, len(os.sched_getaffinity(0)))
    if options.measure:
        measure(options.seconds, cores)
        return
    rows = []
    for beside in (0, 2 * cores):
        others = [multiprocessing.Process(target=busy, daemon=True) for _ in range(beside)]
        for other in others:
            other.start()
        try:
            for setting, environment in SETTINGS.items():
                command = [sys.executable, __file__, "--measure", "--seconds", str(options.seconds)]
                done = subprocess.run(
                    command, check=True, capture_output=True, text=True, timeout=120,
                    env={**os.environ, **environment},
                )  # fmt: skip
                for size, (calls, median, worst) in json.loads(done.stdout).items():
                    row = [cores, beside, setting, size, calls, f"{median:.2f}", f"{worst:.2f}"]
                    rows.append(row)
                    print(*row, sep="  ")
        finally:
            for other in others:
                other.terminate()
                other.join()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)


if __name__ == "__main__":
    main()
