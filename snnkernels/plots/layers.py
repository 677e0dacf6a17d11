"""Layer by layer: rates against activations, where errors enter, what each layer costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .style import (
    COLOURS,
    GREY,
    INK,
    LINES,
    PARTS,
    array_of,
    axes_of,
    check_report,
    clean,
    shortened,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..conversion.report import Report
    from ..metrics import Operations

__all__ = ["correlations", "energy_layers", "error_sources", "rate_activation"]


def rate_activation(
    activation: Any,
    answer: Any,
    *,
    title: str | None = None,
    ceiling: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw what a layer's spikes answer against the ANN's activations.

    On the diagonal they are equal; the corner says their correlation.

    Args:
        activation: the ANN's, of any shape.
        answer: the activations that the spikes stand for (rate times what a spike weighs), of the
            same shape. ``report[name].points`` of a conversion holds a sample of both.
        title: above the axes.
        ceiling: the largest activation that the layer can answer, drawn dotted.
        ax: axes to draw into; None makes a figure.

    Returns:
        The axes.

    Raises:
        ValueError: shapes differ, or there is nothing to draw.
        ImportError: matplotlib is not installed.
    """
    x, y = array_of(activation).reshape(-1), array_of(answer).reshape(-1)
    if x.shape != y.shape or not x.size:
        raise ValueError(
            f"activation has {x.size} values, answer has {y.size}: there must be as many, at "
            "least one"
        )
    ax = axes_of(ax, (3.8, 3.6))
    low, high = min(0.0, x.min(), y.min()), max(x.max(), y.max())
    room = 0.04 * ((high - low) or 1.0)
    ax.plot([low, high], [low, high], color=GREY, linewidth=1.0, zorder=2)
    if ceiling is not None:
        ax.axhline(ceiling, color=INK, linewidth=1.0, linestyle=(0, (1, 2)), zorder=2)
    ax.scatter(
        x, y, s=9, color=COLOURS[0], alpha=0.35, linewidths=0, zorder=3,
        rasterized=x.size > 5_000,
    )  # fmt: skip
    ax.set_xlim(low - room, high + room)
    ax.set_ylim(low - room, high + room)
    ax.set_aspect("equal")
    ax.set_xlabel("activation of the ANN")
    ax.set_ylabel("answer of the spikes")
    r = correlation(x, y)
    said = "constant" if r is None else f"r = {r:.4f}"
    ax.text(0.04, 0.95, said, transform=ax.transAxes, va="top", fontsize=9, color=INK)
    if title:
        ax.set_title(shortened(title), fontsize=10, color=INK, loc="left")
    clean(ax)
    return ax


def correlation(x: Any, y: Any) -> float | None:
    """Pearson's, or None where one side is constant."""
    a, b = (array_of(v).astype(np.float64).reshape(-1) for v in (x, y))
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / size if size > 0 else None


def correlations(report: Report, *, ax: Axes | None = None) -> Axes:
    """Draw how well each layer's spikes follow the ANN: correlation of answers and activations.

    Args:
        report: of a conversion with data.
        ax: axes to draw into; None makes a figure.

    Returns:
        The axes.

    Raises:
        TypeError: ``report`` is no report.
        ValueError: the report has no sample of activations.
        ImportError: matplotlib is not installed.
    """
    check_report(report)
    rows = [(row.name, row.points) for row in report.rows if row.points is not None]
    if not rows:
        raise ValueError("the report has no sample of activations: convert with a loader")
    ax = axes_of(ax, (max(4.2, 0.42 * len(rows) + 1.4), 3.4))
    found = [correlation(points[0], points[1]) for _, points in rows]
    heights = [float("nan") if r is None else r for r in found]
    ax.plot(
        range(len(rows)), heights, color=COLOURS[0], marker="o", markersize=5.5, linewidth=1.8,
        markeredgecolor="white", markeredgewidth=0.8, clip_on=False,
    )  # fmt: skip
    ax.set_xticks(range(len(rows)), [shortened(name, 22) for name, _ in rows], rotation=90)
    known = [r for r in found if r is not None]
    ax.set_ylim(min([*known, 0.95]) - 0.02, 1.0)
    ax.set_ylabel("correlation with the ANN")
    ax.grid(axis="y", color=LINES, linewidth=0.7)
    clean(ax)
    ax.tick_params(axis="x", labelsize=8)
    return ax


def error_sources(report: Report, *, ax: Axes | None = None) -> Axes:
    """Draw where the error of each layer enters: a bar a layer, parted by source.

    The length of a bar is the layer's error against the ANN, as a share of the activation's root
    mean square; its parts are the shares of the squares of clipping, quantisation, unevenness and
    what is inherited. (Squares of parts do not add up to that of the whole, as parts may cancel
    each other: the report has the numbers.) An error that is infinite has no bar and says so.

    Args:
        report: of a conversion with data.
        ax: axes to draw into; None makes a figure.

    Returns:
        The axes.

    Raises:
        TypeError: ``report`` is no report.
        ValueError: the report has no errors of layers.
        ImportError: matplotlib is not installed.
    """
    check_report(report)
    rows = [row for row in report.rows if row.error is not None and row.clipping is not None]
    if not rows:
        raise ValueError(
            "the report has no errors by source: convert with a loader; methods with layers of "
            "their own have none (draw correlations instead)"
        )
    names = report.SOURCES
    ax = axes_of(ax, (6.2, 0.3 * len(rows) + 1.3))
    places = np.arange(len(rows))
    lengths = np.array([100 * (row.error or 0.0) for row in rows])
    endless = ~np.isfinite(lengths)
    lengths[endless] = 0.0
    parts = np.array([[getattr(row, name) or 0.0 for name in names] for row in rows]) ** 2
    parts[~np.isfinite(parts).all(1)] = 0.0
    total = parts.sum(1, keepdims=True)
    shares = np.divide(parts, total, out=np.zeros_like(parts), where=total > 0)
    left = np.zeros(len(rows))
    for i, name in enumerate(names):
        width = shares[:, i] * lengths
        ax.barh(
            places, width, left=left, height=0.72, color=PARTS[i], label=name, zorder=3,
            edgecolor="white", linewidth=0.5,
        )  # fmt: skip
        left += width
    for place in places[endless]:
        ax.text(0, place, " silent in the ANN, not here", va="center", fontsize=8, color=GREY)
    ax.set_xlim(0, max(float(lengths.max()) * 1.04, 0.1))
    ax.set_xlabel("error against the ANN (% of the activation), parted by squares")
    _bars_of_layers(ax, [row.name for row in rows], ncols=len(names), columnspacing=1.2)
    return ax


def energy_layers(operations: Operations, *, ax: Axes | None = None) -> Axes:
    """Draw the energy of each layer with weights, spiking network beside ANN.

    Args:
        operations: of :func:`snnkernels.metrics.synaptic_operations`; the constants are those of
            :func:`snnkernels.metrics.energy`.
        ax: axes to draw into; None makes a figure.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from ..metrics import energy

    cost = energy(operations)
    ann: dict[str, float] = {}
    for row in operations.layers:  # a layer that runs twice is one of the ANN
        ann[row.name] = cost.mac_pj * row.connections
    names = list(cost.layers)
    ax = axes_of(ax, (6.2, 0.36 * len(names) + 1.3))
    places = np.arange(len(names))
    for offset, values, colour, label in (
        (-0.2, cost.layers, COLOURS[0], f"spiking, T = {operations.T}"),
        (0.2, ann, "#c9c9c9", "ANN"),
    ):
        ax.barh(
            places + offset, [values[name] / 1e6 for name in names], height=0.38, color=colour,
            label=f"{label}: {sum(values.values()) / 1e6:.3g} µJ", zorder=3,
        )  # fmt: skip
    ax.set_xlabel("energy of the arithmetic, µJ per sample")
    _bars_of_layers(ax, names, ncols=2)
    return ax


def _bars_of_layers(ax: Any, names: list[str], **legend: Any) -> None:
    """What bars of layers have around them: names from above to below, a legend in one line."""
    ax.set_yticks(range(len(names)), [shortened(name) for name in names])
    ax.invert_yaxis()
    ax.grid(axis="x", color=LINES, linewidth=0.7, zorder=0)
    clean(ax)
    ax.tick_params(axis="y", length=0)
    ax.legend(
        frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(-0.02, 1.0),
        handlelength=1.0, borderaxespad=0.2, **legend,
    )  # fmt: skip
