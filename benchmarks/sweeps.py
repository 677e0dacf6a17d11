"""Tables of accuracy against steps, from the rows of ``snnkernels sweep`` under results/."""

from __future__ import annotations

import csv
from pathlib import Path

__all__ = ["chosen", "error_tables", "sweep_tables"]

# README shows these; docs/methods.md shows all.
_CHOSEN = (
    "opi:v_init=zero", "opi", "opi:v_init=uniform", "light", "qcfs", "srp", "cos", "parallel",
)  # fmt: skip
Row = dict[str, str]


def _rows(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _curves(rows: list[Row]) -> dict[tuple[str, str], dict[int, Row]]:
    found: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        found.setdefault((row["network"], row["trial"]), {})[int(row["T"])] = row
    return found


def _lines(rows: list[Row]) -> list[str]:
    """A line per trial; those with other spikes than 0 and 1 last, and marked."""
    steps = sorted({int(row["T"]) for row in rows})
    head = ["method", "adds", *(f"T={T}" for T in steps)]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    curves = _curves(rows)
    for (_, trial), curve in sorted(curves.items(), key=lambda c: not _binary(c[1])):
        mark = "" if _binary(curve) else " (not binary)"
        extra = {row["extra steps"] for row in curve.values()}
        adds = extra.pop() if len(extra) == 1 else "by T: " + _by_step(curve)
        cells = [f"{100 * float(curve[T]['accuracy']):.1f}" if T in curve else "" for T in steps]
        lines.append("| " + " | ".join([f"`{trial}`{mark}", adds, *cells]) + " |")
    return lines


def _binary(curve: dict[int, Row]) -> bool:
    return next(iter(curve.values()))["binary"] == "True"


def _by_step(curve: dict[int, Row]) -> str:
    return ", ".join(curve[T]["extra steps"] for T in sorted(curve))


def sweep_tables(path: Path, trials: tuple[str, ...] = ()) -> str:
    """One table per network: all trials, or those named, in the order of the rows."""
    parts = []
    rows = [row for row in _rows(path) if not trials or row["trial"] in trials]
    for network in dict.fromkeys(row["network"] for row in rows):
        mine = [row for row in rows if row["network"] == network]
        first = mine[0]
        images = "/".join(sorted({row["images"] for row in mine}, key=int))
        title = (
            f"**{network.split()[0]}** (checkpoint {network.split()[1]}), ANN "
            f"{100 * float(first['ANN']):.1f}, {images} test images, thresholds from data made for "
            f"T = {first['for T']}:"
        )
        parts += [title, "\n".join(_lines(mine))]
    return "\n\n".join(parts)


def chosen(path: Path) -> str:
    """The tables of README."""
    return sweep_tables(path, _CHOSEN)


def error_tables(path: Path) -> str:
    """Where the error enters, layer by layer, a table per network and method."""
    parts = []
    names = ("rate", "error", "clipping", "quantisation", "unevenness", "inherited")
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in _rows(path):
        groups.setdefault((row["network"], row["method"], row["T"]), []).append(row)
    for (network, method, T), rows in groups.items():
        lines = ["| layer | θ | " + " | ".join(names) + " |", "| --- |" + " ---: |" * 7]
        for row in rows:
            cells = [_percent(row[name]) for name in names]
            lines.append(f"| {row['layer']} | {row['θ']} | " + " | ".join(cells) + " |")
        parts += [f"`{method}` on {network.split()[0]}, T = {T}:", "\n".join(lines)]
    return "\n\n".join(parts)


def _percent(value: str) -> str:
    return f"{100 * float(value):.1f} %" if value else ""
