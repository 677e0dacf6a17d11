"""Tables of the engine, from the rows of its benchmarks under results/."""

from __future__ import annotations

import csv
from pathlib import Path

__all__ = ["accuracy", "layers", "networks"]

Row = dict[str, str]
# Who stands in the tables, and as what.
_RIVALS = {
    "SpikingJelly, IFNode": "SpikingJelly, same network",
    "SpikingJelly, RateCodingRecipe": "its RateCodingRecipe",
    "SpikingJelly, LTB recipe": "its LTB recipe",
    "unlowered": "unlowered",
    "plan, int16": "plan, int16",
    "ANN": "ANN, one pass",
}


def _rows(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _table(head: list[str], lines: list[list[str]]) -> str:
    rule = "| " + " | ".join(["---"] + ["---:"] * (len(head) - 1)) + " |"
    return "\n".join(["| " + " | ".join(line) + " |" for line in (head,)] + [rule]
                     + ["| " + " | ".join(line) + " |" for line in lines])  # fmt: skip


def networks(path: Path, cases: tuple[tuple[str, str], ...] = ()) -> str:
    """Time of everybody over the plan's, a line for each network, batch and T (or those named)."""
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in _rows(path):
        if row["section"] == "time" and (not cases or (row["batch"], row["T"]) in cases):
            key = (row["network"], row["batch"], row["T"])
            found.setdefault(key, {})[row["implementation"]] = row
    if not found:
        return "No rows yet: `benchmarks/bench_network.py` writes `network_cpu.csv`."
    names = [n for n in _RIVALS if any(n in rows for rows in found.values())]
    head = [
        "network, batch, T",
        "spikes a step",
        *(_RIVALS[n] for n in names),
        "plan in ANN passes",
    ]
    lines = []
    for (network, batch, T), rows in sorted(found.items(), key=_order):
        plan = rows.get("plan", {})
        times = [_times(rows.get(name, {}).get("relative", "")) for name in names]
        rate = plan.get("rate", "")
        rate = f"{100 * float(rate):.1f} %" if rate else ""
        lines.append([f"{network}, {batch}, {T}", rate, *times, plan.get("ANN passes", "")])
    return _table(head, lines)


def _order(item: tuple[tuple[str, str, str], object]) -> tuple[str, int, int]:
    network, batch, T = item[0]
    return network, int(batch), int(T)


def _times(value: str) -> str:
    return f"{value}x" if value else ""


def layers(path: Path) -> str:
    """Time of a dense convolution over the layer's, by the rate of spikes."""
    rows = _rows(path)
    if not rows:
        return "No rows yet: `benchmarks/bench_spike_conv.py` writes `spike_conv_cpu.csv`."
    rates = list(dict.fromkeys(row["rate"] for row in rows))
    head = ["layer", *(f"{100 * float(rate):.0f} % fire" for rate in rates)]
    lines = []
    for layer in dict.fromkeys((row["layer"], row["pool"]) for row in rows):
        mine = {row["rate"]: row for row in rows if (row["layer"], row["pool"]) == layer}
        name = layer[0] + ("" if layer[1] == "1" else ", average pool before")
        cells = []
        for rate in rates:
            best = min(float(mine[rate][f"{n} / ours"]) for n in ("NCHW", "channels_last"))
            cells.append(f"{best:.3g}x")
        lines.append([name, *cells])
    return _table(head, lines)


def _against(row: Row) -> str:
    other = row.get("against") or "converted"
    return "" if other == "converted" else f" (from the {other}'s)"


def accuracy(path: Path) -> str:
    """Accuracy of plans, and how many predictions differ from whose."""
    rows = _rows(path)
    if not rows:
        return "No rows yet: `benchmarks/engine_accuracy.py` writes `engine_accuracy.csv`."
    lines = [
        [
            f"{row['network'].split()[0]}, T = {row['T']}", row["run"], row["accuracy"],
            f"{row['differing']} of {row['images']}" + _against(row),
        ]
        for row in rows
    ]  # fmt: skip
    return _table(["network", "run", "accuracy (%)", "predictions that differ"], lines)
