"""What every benchmark shares: rows that say where they come from, arguments, a table.

CPU rows hold ratios measured side by side, never times: a shared machine's times are its weather.
GPU rows hold times and the name of the GPU.
"""

from __future__ import annotations

import argparse
import csv
import logging
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

import snnkernels

RESULTS = Path(__file__).parent / "results"
PEERS = ("spikingjelly", "snntorch", "norse", "sinabs", "triton", "cupy-cuda13x")
ROUNDS = 15
# Processes that ran beside this one when it began: rows of a busy machine are no results.
_LOAD = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan


class Skip(Exception):
    """Something that cannot run here, and why; the reason is printed and kept in the row."""


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


def tune_malloc() -> None:
    """Keeps freed memory in the process, for all competitors alike (glibc only).

    A fresh output of tens of MB otherwise costs more in page faults than any kernel here.
    """
    if hasattr(snnkernels, "tune_malloc"):
        snnkernels.tune_malloc()
        return
    import ctypes

    try:
        libc = ctypes.CDLL(None)
        m_mmap_threshold, m_trim_threshold = -3, -1
        libc.mallopt(m_mmap_threshold, 2**31 - 1)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
    except (OSError, AttributeError):
        print("mallopt is not there: fresh large outputs will cost page faults")


# ---- where a row comes from ----------------------------------------------------------------------


def machine(device: str = "cpu") -> dict[str, str]:
    """Where and with what a row was measured."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "peers": peers(),
        "load": f"{_LOAD:.1f}",
        "commit": _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": " ".join(["python", *_shown(sys.argv)]),
    }


def peers() -> str:
    """Name and version of every rival that is installed."""
    found = []
    for package in PEERS:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return "; ".join(found)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    if os.environ.get("COMMIT"):  # a copy without .git
        return os.environ["COMMIT"]
    here = Path(__file__).parent
    try:
        commit = ["git", "rev-parse", "--short", "HEAD"]
        found = subprocess.run(commit, capture_output=True, text=True, cwd=here).stdout.strip()
        # Rows saved a minute ago do not make another program of it.
        changed = ["git", "diff", "--quiet", "HEAD", "--", "..", ":!results"]
        return found + ("-dirty" if found and subprocess.run(changed, cwd=here).returncode else "")
    except OSError:
        return ""


def _shown(argv: Sequence[str]) -> list[str]:
    # Folders of the machine at hand say nothing to others.
    inside = Path(__file__).resolve().parents[1]
    shown = []
    for word in argv:
        path = Path(word)
        if path.is_absolute():
            local = path.resolve().is_relative_to(inside)
            word = str(path.resolve().relative_to(inside)) if local else path.name
        shown.append(word)
    return shown


# ---- rows ----------------------------------------------------------------------------------------


def save(
    name: str,
    rows: Iterable[dict[str, object]],
    *,
    key: Sequence[str] = (),
    folder: Path | None = None,
    device: str = "cpu",
) -> Path:
    """Writes rows to ``<name>.csv`` with the machine beside each.

    With ``key`` given, rows already there whose key columns match none of the new ones are kept,
    so that sections measured one by one end up in one file.
    """
    about = machine(device)
    new = [{**row, **about} for row in rows]
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.csv"
    replaced = {tuple(str(row.get(k, "")) for k in key) for row in new}
    old = load(path) if key else []
    kept = [row for row in old if tuple(row.get(k, "") for k in key) not in replaced]
    everything = [*kept, *new]
    columns = list(dict.fromkeys(column for row in everything for column in row))
    # The machine's columns stay last, whatever file the other ones come from.
    columns = [c for c in columns if c not in about] + list(about)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(everything)
    return path


def load(path: Path) -> list[dict[str, str]]:
    """The rows of a file that :func:`save` wrote; none when it is not there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(rows: Sequence[dict[str, object]], columns: Sequence[str]) -> str:
    """Rows as aligned text; what is empty everywhere is left out."""
    columns = [c for c in columns if any(row.get(c, "") != "" for row in rows)]
    cells = [list(columns), *([str(row.get(c, "")) for c in columns] for row in rows)]
    width = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(line, width, strict=True)).rstrip() for line in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def short(number: float) -> float | int:
    """Three significant digits: more would be noise."""
    rounded = float(f"{number:.3g}")
    return int(rounded) if rounded == int(rounded) and abs(rounded) >= 100 else rounded


# ---- arguments -----------------------------------------------------------------------------------


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, help="CPU threads of everybody")
    parser.add_argument(
        "--malloc", choices=["tuned", "default"], default="tuned", help="of everybody"
    )
    parser.add_argument("--out", type=Path, help="folder of the results (default: results/)")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="start no case after this long"
    )
    return parser


def start(args: argparse.Namespace) -> argparse.Namespace:
    """Puts the options into effect; everybody in the process gets the same."""
    logging.disable(logging.WARNING)
    args.deadline = time.monotonic() + args.seconds
    if args.quick:
        args.rounds = min(args.rounds, 3)
        # Figures of a smoke run must not replace measured ones.
        args.out = args.out or Path(tempfile.mkdtemp(prefix="snnkernels_quick_"))
    args.out = args.out or RESULTS
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.malloc == "tuned":
        tune_malloc()
    if args.device == "cpu" and _LOAD > 0.5:
        print(f"NOTE: load {_LOAD:.1f} at the start: other programs run, rows will be noise")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA device")
    return args


def late(args: argparse.Namespace, what: str) -> bool:
    """Whether ``--seconds`` is over; says what is left out."""
    over = time.monotonic() > args.deadline
    if over:
        print(f"left out, --seconds is over: {what}")
    return over
