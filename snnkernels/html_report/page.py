"""The report of a conversion as one HTML page that needs nothing beside itself."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from os import PathLike
from typing import Any

import torch

from ..conversion.report import NodeReport, Report
from ..files import write_text
from ..metrics import Operations, energy
from .pictures import pictures

__all__ = ["to_html", "versions"]


def to_html(
    report: Report,
    path: str | PathLike[str] | None = None,
    *,
    title: str = "Conversion report",
    settings: Mapping[str, Any] | None = None,
    accuracy: Mapping[int, float] | None = None,
    ann: float | None = None,
    operations: Operations | None = None,
) -> str:
    """The report as one HTML page: no other file, no address on the net, light or dark.

    Also a method: ``snn.report.to_html("report.html")``. Pictures are drawn where matplotlib is
    installed; the page says so where it is not.

    Args:
        report: of a conversion.
        path: file to write the page to, whole or not at all; None: only return it.
        title: of the page.
        settings: shown as a table, such as the arguments of ``convert``.
        accuracy: fractions by number of steps.
        ann: the accuracy of the ANN, a fraction.
        operations: of :func:`snnkernels.metrics.synaptic_operations`, for a table of energy.

    Returns:
        The page.

    Raises:
        TypeError: ``report`` is no report of a conversion; ``path`` is no path; ``accuracy`` or
            ``ann`` holds what is no number.
        OSError: ``path`` cannot be written.
    """
    if not isinstance(report, Report):
        raise TypeError(f"report must be a Report (snn.report), got {type(report).__name__}")
    for name, value in (
        ("ann", ann),
        *((f"accuracy[{T!r}]", a) for T, a in (accuracy or {}).items()),
    ):
        if value is not None and not isinstance(value, (int, float)):
            raise TypeError(f"{name}={value!r} must be a fraction, a number")
    if path is not None and not isinstance(path, (str, PathLike)):
        raise TypeError(f"path={path!r} must be the path of a file, or None")
    sections = [
        _summary(report, accuracy, ann, operations),
        _advice(report),
        _section("Pictures", pictures(report, accuracy, ann, operations)),
        _nodes(report),
        _energy_table(operations),
        _notes(report),
        _pairs("Settings", settings),
        _pairs("Made with", versions()),
    ]
    assets = files(__package__)
    head = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>
{(assets / "report.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
<header>
<h1>{escape(title)}</h1>
<p>Method <strong>{escape(report.method)}</strong>, thresholds for T = {report.T}</p>
</header>
"""
    tail = f"""</main>
<script>
{(assets / "report.js").read_text(encoding="utf-8")}</script>
</body>
</html>
"""
    page = head + "".join(sections) + tail
    if path is not None:
        write_text(path, page)
    return page


# --- parts of the page ----------------------------------------------------------------------


def _section(name: str, body: str) -> str:
    return f"<section>\n<h2>{escape(name)}</h2>\n{body}</section>\n" if body else ""


def _summary(
    report: Report,
    accuracy: Mapping[int, float] | None,
    ann: float | None,
    operations: Operations | None,
) -> str:
    layers = [row for row in report.rows if row.threshold is not None]
    rates = [row.rate for row in report.rows if row.rate is not None]
    outputs = [row for row in report.rows if row.name.split(".")[0].startswith("output")]
    tiles = [(str(len(layers)), "layers of neurons")]
    if accuracy:
        T = report.T if report.T in accuracy else max(accuracy)
        beside = "" if ann is None else f", ANN {100 * ann:.1f} %"
        tiles.append((f"{100 * accuracy[T]:.1f} %", f"accuracy at T = {T}{beside}"))
    if rates:
        tiles.append((f"{sum(rates) / len(rates):.3f}", "spikes of a neuron and step"))
    if len(outputs) == 1 and outputs[0].error is not None:
        tiles.append((_percent(outputs[0].error), "error of the answer against the ANN"))
    if operations is not None:
        cost = energy(operations)
        if math.isfinite(cost.ratio):
            tiles.append((f"{cost.ratio:.2f} ×", "the ANN's energy of the arithmetic"))
    silent = sum(len(channels) for channels in report.silent_channels.values())
    if silent:
        tiles.append((str(silent), "channels silent on the calibration data"))
    cells = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(what)}</span></div>\n'
        for value, what in tiles
    )
    return f'<div class="tiles">\n{cells}</div>\n'


_ADVICE = "the largest part of single layers' errors"


def _advice(report: Report) -> str:
    found = [note for note in report.notes if note.startswith(_ADVICE)]
    return "".join(f'<p class="advice">{_sentence(note)}</p>\n' for note in found)


def _sentence(note: str) -> str:
    end = "" if note.endswith((".", "!", "?", ":")) else "."
    first = note.split(maxsplit=1)[0] if note.strip() else ""
    # A sentence begins with a capital, the name of a node as it is.
    return escape(note if first.endswith(":") else note[:1].upper() + note[1:]) + end


def _notes(report: Report) -> str:
    notes = [note for note in report._notes() if not note.startswith(_ADVICE)]
    items = "".join(f"<li>{_sentence(note)}</li>\n" for note in notes)
    return _section("Notes", f"<ul>\n{items}</ul>\n")


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %" if math.isfinite(value) else "∞"


_LEGEND = (
    "θ is the threshold of a layer, its smallest and largest where channels differ; the rate is in "
    "spikes of a neuron and step. "
)
_ERRORS = (
    "Errors are root mean squares over those of the ANN's activation, on the sample that the "
    "conversion was measured on: by clipping (above what T spikes can say), quantisation (counts "
    "are whole), unevenness (currents arrive unevenly in time), and inherited from the layers "
    "before. "
)


def _nodes(report: Report) -> str:
    split = any(getattr(row, s) is not None for row in report.rows for s in report.SOURCES)
    names = ["node", "what was done", "θ", "rate", "error", *(report.SOURCES if split else ())]
    values = [_sort_values(row, report, split) for row in report.rows]
    # Columns in which there is nothing only make the page wide.
    shown = [any(v[i] is not None for v in values) for i in range(len(names) - 2)]
    lines = []
    for row, numbers in zip(report.rows, values, strict=True):
        cells = row.cells(split)
        tds = [f'<th scope="row">{_breakable(cells[0])}</th>', f"<td>{escape(cells[1])}</td>"]
        for text, value, keep in zip(cells[2:], numbers, shown, strict=True):
            if keep:
                key = "" if value is None else f' data-value="{value:.9g}"'
                tds.append(f'<td class="n"{key}>{escape(_cell(text, value))}</td>')
        lines.append("<tr>" + "".join(tds) + "</tr>\n")
    heads = [n for n, keep in zip(names, (True, True, *shown), strict=True) if keep]
    text = _LEGEND + (_ERRORS if "error" in heads else "")
    return _section("Nodes", f"<p>{text.strip()}</p>\n{_sortable(heads, lines)}")


def _sortable(names: list[str], rows: list[str]) -> str:
    """A table that a click on a heading sorts; columns from the third on are numbers."""
    heads = "".join(
        f'<th scope="col"{_number(i >= 2)}><button type="button">{escape(name)}</button></th>'
        for i, name in enumerate(names)
    )
    return (
        f'<div class="scroll" tabindex="0"><table class="sortable">\n<thead><tr>{heads}</tr>'
        f"</thead>\n<tbody>\n{''.join(rows)}</tbody>\n</table></div>\n"
    )


def _cell(text: str, value: float | None) -> str:
    if value is None:
        return ""
    return "∞" if value == math.inf else text.replace("%", " %")


def _number(yes: bool) -> str:
    return ' class="n"' if yes else ""


def _breakable(name: str) -> str:
    """Long module paths may break behind their dots."""
    return escape(name).replace(".", ".<wbr>")


def _sort_values(row: NodeReport, report: Report, split: bool) -> list[float | None]:
    theta = None if row.threshold is None else float(row.threshold.max())
    parts = [getattr(row, source) for source in report.SOURCES] if split else []
    return [theta, row.rate, row.error, *parts]


def _energy_table(operations: Operations | None) -> str:
    if operations is None:
        return ""
    cost = energy(operations)
    rows = []
    for layer in operations.layers:
        picojoules = cost.add_pj * layer.additions + cost.mac_pj * layer.macs
        numbers = (layer.connections, layer.arrived, layer.additions, layer.macs, picojoules / 1e6)
        cells = "".join(f'<td class="n" data-value="{v:.9g}">{_short(v)}</td>' for v in numbers)
        rows.append(
            f'<tr><th scope="row">{_breakable(layer.name)}</th><td>{escape(layer.kind)}</td>'
            f"{cells}</tr>\n"
        )
    names = ["layer", "kind", "connections", "spikes in", "additions", "MACs", "µJ"]
    text = (
        f"<p>Of one sample and T = {operations.T}: {cost.snn / 1e6:.3g} µJ of arithmetic, the "
        f"ANN {cost.ann / 1e6:.3g} µJ, with {cost.add_pj} pJ an addition and {cost.mac_pj} pJ a "
        "multiply-add (45 nm; Horowitz, ISSCC 2014). Movement of data, which dominates on most "
        "hardware, and the neurons' own updates are not in it.</p>\n"
    )
    notes = "".join(f"<li>{_sentence(note)}</li>\n" for note in operations.notes)
    text += f"<ul>\n{notes}</ul>\n" if notes else ""
    return _section("Operations and energy", text + _sortable(names, rows))


def _short(value: float) -> str:
    if value == 0:
        return "0"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def _pairs(name: str, values: Mapping[str, Any] | None) -> str:
    if not values:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(str(key))}</th><td class="wrap">{escape(str(value))}</td>'
        "</tr>\n"
        for key, value in values.items()
    )
    return _section(name, f'<table class="pairs"><tbody>\n{rows}</tbody></table>\n')


def versions() -> dict[str, str]:
    """What this runs on: of the package, torch, Python and the platform."""
    from .. import __version__

    return {
        "snnkernels": __version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "platform": platform.platform(),
    }
