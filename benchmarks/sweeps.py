"""Tables of accuracy and of errors, from the rows under results/.

A file that is missing gives a line that says how to make it; a row without a figure is left out; of
two rows about the same the later counts.
"""

from __future__ import annotations

import csv
from pathlib import Path

__all__ = ["chosen", "error_tables", "sweep_tables"]

# README shows these; docs/methods.md shows all.
_CHOSEN = (
    "opi:v_init=zero", "opi", "opi:v_init=uniform", "light", "qcfs", "srp", "srp:probe=8", "cos",
    "parallel",
)  # fmt: skip
_KEY = ("network", "data", "for T", "trial", "T")
_FIGURES = ("images", "extra steps", "accuracy", "ANN", "binary")
_PARTS = ("rate", "error", "clipping", "quantisation", "unevenness", "inherited")
Row = dict[str, str]
Curve = dict[int, Row]


def _rows(path: Path, needed: tuple[str, ...]) -> list[Row]:
    """The rows that have a value in every column of ``needed``."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if all(row.get(name) for name in needed)]


def _curves(rows: list[Row]) -> dict[str, Curve]:
    found: dict[str, Curve] = {}
    for row in rows:
        found.setdefault(row["trial"], {})[int(row["T"])] = row
    return found


def _lines(rows: list[Row]) -> list[str]:
    """A line per trial; those with other spikes than 0 and 1 last, and marked."""
    steps = sorted({int(row["T"]) for row in rows})
    curves = sorted(_curves(rows).items(), key=lambda c: not _binary(c[1]))
    several = len({row["images"] for row in rows}) > 1
    head = ["method", *(["images"] if several else []), "adds", *(f"T={T}" for T in steps)]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for trial, curve in curves:
        mark = "" if _binary(curve) else " (not binary)"
        images = "/".join(sorted({row["images"] for row in curve.values()}, key=int))
        cells = [f"{100 * float(curve[T]['accuracy']):.1f}" if T in curve else "" for T in steps]
        cells = [*([images] if several else []), _added(curve), *cells]
        lines.append("| " + " | ".join([f"`{trial}`{mark}", *cells]) + " |")
    return lines


def _binary(curve: Curve) -> bool:
    return next(iter(curve.values()))["binary"] == "True"


def _added(curve: Curve) -> str:
    """The steps that a method adds: a number, a multiple of T, or a list by T."""
    extra = {T: int(curve[T]["extra steps"]) for T in sorted(curve)}
    if len(set(extra.values())) == 1:
        return str(next(iter(extra.values())))
    parts = {steps / T for T, steps in extra.items()}
    if len(parts) == 1 and (part := parts.pop()).is_integer():
        return f"{int(part)} T"
    return ", ".join(map(str, extra.values()))


def _name(network: str) -> str:
    """``"vgg9 226a9c"`` as a reader is told it."""
    name, _, checkpoint = network.partition(" ")
    return f"**{name}**" + (f" (checkpoint {checkpoint})" if checkpoint else "")


def _told(rows: list[Row]) -> str:
    """Where rows come from, in a line."""
    parts = []
    for name, word in (("data", ""), ("hardware", ""), ("torch", "torch "), ("commit", "commit ")):
        values = sorted({row[name] for row in rows if row.get(name)})
        parts += [word + ", ".join(values)] if values else []
    return "; ".join(parts)


def sweep_tables(path: Path, trials: tuple[str, ...] = ()) -> str:
    """One table per network, data and T of the thresholds: all trials, or those named, in order."""
    rows = [r for r in _rows(path, (*_KEY, *_FIGURES)) if not trials or r["trial"] in trials]
    rows = list({tuple(row[name] for name in _KEY): row for row in rows}.values())
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["network"], row["data"], row["for T"]), []).append(row)
    parts = []
    for (network, _, for_T), mine in groups.items():
        images = "/".join(sorted({row["images"] for row in mine}, key=int))
        if trials:
            mine = sorted(mine, key=lambda row: trials.index(row["trial"]))
        title = (
            f"{_name(network)}, ANN {100 * float(mine[0]['ANN']):.1f}, {images} test images, "
            f"thresholds from data made for T = {for_T}:"
        )
        parts += [title, "\n".join(_lines(mine)), f"({_told(mine)})"]
    return "\n\n".join(parts) or f"No rows yet: `snnkernels sweep` writes `{path.name}`."


def chosen(path: Path) -> str:
    """The tables of README."""
    return sweep_tables(path, _CHOSEN)


def error_tables(path: Path) -> str:
    """Where the error enters, layer by layer, a table per network and method."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in _rows(path, ("network", "method", "T", "layer", "error")):
        groups.setdefault((row["network"], row["method"], row["T"]), []).append(row)
    parts = []
    for (network, method, T), rows in groups.items():
        lines = ["| layer | θ | " + " | ".join(_PARTS) + " |"]
        lines += ["| --- |" + " ---: |" * (len(_PARTS) + 1)]
        for row in rows:
            cells = [_percent(row.get(name) or "") for name in _PARTS]
            lines.append(f"| {row['layer']} | {row.get('θ') or ''} | " + " | ".join(cells) + " |")
        parts += [f"`{method}` on {_name(network)}, T = {T}:", "\n".join(lines)]
    return "\n\n".join(parts) or f"No rows yet: `benchmarks/{path.stem}.py` writes `{path.name}`."


def _percent(value: str) -> str:
    return f"{100 * float(value):.1f} %" if value else ""
