"""Writes the measured tables of README and docs from benchmarks/results: no figure is typed there.

    python benchmarks/readme.py           rewrites what lies between the markers
    python benchmarks/readme.py --check   fails when a page is not what the results say

Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from textwrap import fill

import engine_tables
from sweeps import chosen, error_tables, sweep_tables

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_OURS = "snnkernels"
_COLUMNS = {
    "PyTorch loop": "PyTorch loop",
    "torch.compile, slices": "torch.compile, slices",
    "torch.compile, stack": "torch.compile, stack",
    "SpikingJelly, function": "SpikingJelly",
    "SpikingJelly, HalfThresholdIFNode": "its half-threshold node",
    "SpikingJelly, torch.compile": "SpikingJelly, compiled",
    "SpikingJelly 0.0.0.0.14, CuPy": "SpikingJelly 0.0.0.0.14, CuPy",
    "snnTorch, Leaky(beta=1)": "snnTorch",
    "Norse, IAF": "Norse",
    "Sinabs, IAF": "Sinabs",
    "snnkernels, save='trace'": "ours, save=trace",
    "snnkernels, save='bits'": "ours, save=bits",
}
Row = dict[str, str]


def load(name: str) -> list[Row]:
    """Rows of a results file that were measured with the allocator tuned for all."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row.get("malloc", "tuned") == "tuned"]


def power(number: str) -> str:
    """A size as one reads it: 1e6, or 2^20."""
    value = int(number)
    if value >= 1000 and value & (value - 1) == 0:
        return f"2^{value.bit_length() - 1}"
    short = f"{value:.0e}".replace("e+0", "e")
    return short if value >= 1000 and float(short) == value else number


def markdown(head: list[str], lines: list[list[str]], left: int = 1) -> str:
    """A table; columns without a figure are left out."""
    keep = [i for i in range(len(head)) if i < left or any(line[i] for line in lines)]
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    rows = [[line[i] for i in keep] for line in [head, rule, *lines]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def source(rows: list[Row], name: str) -> str:
    """Where rows come from, in a line."""
    told = {(row["device"], row["threads"], row["torch"], row["commit"]) for row in rows}
    device, threads, torch, _ = sorted(told)[-1]
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    peers = sorted({row["peers"] for row in rows}, key=len)[-1]
    where = device if device.startswith("NVIDIA") else f"{threads} cores of an {device}"
    return f"{where}; torch {torch}; {peers}; `benchmarks/results/{name}.csv` at {commits}."


def ratios(rows: list[Row], section: str) -> str:
    """Rivals' times over ours in float32, a line per size."""
    rows = [row for row in rows if row["section"] == section and row["dtype"] == "float32"]
    found: dict[tuple[int, int], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((int(row["T"]), int(row["N"])), {})[row["implementation"]] = row
    gpu = any(row.get("us") for row in rows)
    lines = []
    for (T, N), by_name in found.items():
        ours = by_name.get(_OURS, {})
        rivals = [by_name.get(name, {}).get("relative", "") for name in _COLUMNS]
        if not any(rivals):
            continue
        mine = [percent(ours.get("share of copy", ""))]
        mine = [ours.get("us", ""), *mine] if gpu else mine
        lines.append([f"{T}, {power(str(N))}", *mine, *(times(r) for r in rivals)])
    head = ["T, neurons", *(["ours, µs"] if gpu else []), "ours, share of copy"]
    return markdown([*head, *_COLUMNS.values()], lines)


def outputs(rows: list[Row]) -> str:
    """Forms of answer at the largest size there is."""
    rows = [row for row in rows if row["section"] == "outputs" and row["relative"]]
    if not rows:
        return ""
    last = max((int(r["T"]) * int(r["N"]), r["T"], r["N"]) for r in rows)
    lines = [
        [
            row["implementation"].removeprefix(_OURS).removeprefix(", ") or "spikes",
            row["needed bytes"], row["relative"], percent(row["share of copy"]),
        ]
        for row in rows
        if (row["T"], row["N"]) == last[1:]
    ]  # fmt: skip
    head = [f"output, T = {last[1]}, {power(last[2])} neurons", "bytes per neuron-step"]
    return markdown([*head, "time, of spikes'", "share of copy"], lines)


def memory(name: str) -> str:
    """What training keeps, a line per implementation."""
    rows = [row for row in load(name) if row["dtype"] == "float32"]
    lines = [
        [row["implementation"], row["kept"], row["peak, training"], row["peak, inference"]]
        for row in rows
        if row["kept"] or row["peak, inference"]
    ]
    if not lines:
        return ""
    first = rows[0]
    about = f"T = {first['T']}, {power(first['N'])} neurons"
    size = f"memory in T·N·4 bytes, 1.0 of it the current ({about})"
    return markdown([size, "kept for backward", "peak, training", "peak, inference"], lines)


def overhead(name: str) -> str:
    """A sentence about small calls."""
    rows = [row for row in load(name) if row["kind"] == "module" and row["relative"]]
    rows = [row for row in rows if "snnkernels" not in row["implementation"]]
    small = [row for row in rows if (row["T"], row["N"]) == ("4", "1000")]
    if not small:
        return ""
    told = ", ".join(f"{row['implementation']} {row['relative']}x" for row in small)
    return (
        "One call of a module without gradients (T = 4, 1000 neurons), time relative to our "
        f"`IFNode`: {told}. Rows: `benchmarks/results/{name}.csv`."
    )


def percent(share: str) -> str:
    """0.874 as 87 %."""
    return f"{100 * float(share):.0f} %" if share else ""


def times(ratio: str) -> str:
    """A ratio as one reads it."""
    return f"{ratio}x" if ratio else ""


def on(device: str) -> list[str]:
    """The paragraphs about one kind of device; none where nothing was measured."""
    name = f"neuron_{device}"
    rows = load(name)
    if not rows:
        return []
    parts = [
        "Time of a rival divided by ours, float32, one process, in turns, medians, fresh outputs, "
        "the allocator tuned for all, spikes compared first (the rows say who differs, and why). "
        + source(rows, name),
        "Forward:",
        ratios(rows, "forward"),
        "Forward and backward:",
        ratios(rows, "training"),
        outputs(rows),
        memory(f"memory_{device}"),
        overhead(f"overhead_{device}"),
    ]
    return [part for part in parts if part]


def speed() -> str:
    """What kernels take, against other libraries."""
    gpu = on("cuda") or [
        "GPU figures are pending: there is no results file of a GPU yet. `benchmarks/run_gpu.sh` "
        "makes it in one call; `benchmarks/results/predictions.md` says what to expect."
    ]
    parts = [part if part.startswith("|") else fill(part, 100) for part in (*on("cpu"), *gpu)]
    return "\n\n".join(parts)


def pages() -> dict[str, dict[str, str]]:
    """What stands between which markers of which page."""
    sweep, network = RESULTS / "sweep_cifar10.csv", RESULTS / "network_cpu.csv"
    return {
        "README.md": {
            "accuracy": chosen(sweep),
            "engine": engine_tables.networks(network, (("8", "16"), ("1", "8"))),
            "speed": speed(),
        },
        "docs/engine.md": {
            "networks": engine_tables.networks(network),
            "layers": engine_tables.layers(RESULTS / "spike_conv_cpu.csv"),
            "accuracy": engine_tables.accuracy(RESULTS / "engine_accuracy.csv"),
        },
        "docs/methods.md": {
            "sweep": sweep_tables(sweep),
            "errors": error_tables(RESULTS / "error_sources.csv"),
        },
    }


def filled(page: str, parts: dict[str, str]) -> str:
    """The page with its parts between their markers.

    Raises:
        ValueError: a marker is missing, or there twice.
    """
    for name, text in parts.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise ValueError(f"there must be {begin} and {end}, once each")
        before, rest = page.split(begin)
        page = f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}"
    return page


def main(argv: list[str] | None = None) -> int:
    """Rewrites or checks the pages; 1 when the check fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail when stale")
    args = parser.parse_args(argv)
    stale = []
    for name, parts in pages().items():
        path = ROOT / name
        page = path.read_text(encoding="utf-8")
        try:
            new = filled(page, parts)
        except ValueError as e:
            print(f"{name}: {e}", file=sys.stderr)
            return 1
        if args.check and new != page:
            stale.append(name)
        elif not args.check:
            path.write_text(new, encoding="utf-8")
    if stale:
        print(f"{', '.join(stale)}: stale; run: python benchmarks/readme.py", file=sys.stderr)
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
