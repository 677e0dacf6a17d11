"""Accuracy against the number of time steps, and against energy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .style import COLOURS, GREY, INK, INSIDE, LINES, MARKERS, axes_of, clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["accuracy_curve", "accuracy_energy"]


def accuracy_curve(
    ts: Sequence[int],
    acc: Sequence[float] | Mapping[str, Sequence[float]],
    *,
    ann: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw accuracies (fractions, 0 to 1) over time steps, on a logarithmic axis of steps.

    Args:
        ts: numbers of time steps.
        acc: one accuracy for each of ``ts``, or a mapping from a label to such a sequence.
        ann: the accuracy to be reached, drawn as a dashed line.
        ax: axes to draw into; None makes a figure.

    Returns:
        The axes.

    Raises:
        ValueError: lengths differ, or ``ts`` is empty or holds less than 1.
        TypeError: ``ann`` is no number.
        ImportError: matplotlib is not installed.
    """
    curves = dict(acc) if isinstance(acc, Mapping) else {"": acc}
    steps = [int(t) for t in ts]
    if not steps or min(steps) < 1:
        raise ValueError(f"ts must hold numbers of steps of at least 1, got {list(ts)}")
    for label, values in curves.items():
        if len(values) != len(steps):
            name = f"acc[{label!r}]" if label else "acc"
            raise ValueError(
                f"{name} has {len(values)} values, ts has {len(steps)}: there must be as many"
            )
    if ann is not None and not isinstance(ann, (int, float)):
        raise TypeError(f"ann={ann!r} must be a number, the accuracy of the ANN, or None")
    ax = axes_of(ax, (5.2, 3.6))
    if ann is not None:
        ax.axhline(
            100 * ann,
            color=INK,
            linewidth=1.2,
            linestyle=(0, (5, 3)),
            label=f"ANN ({100 * ann:.1f} %)",
            zorder=2,
        )
    for i, (label, values) in enumerate(curves.items()):
        ax.plot(
            steps,
            [100 * float(v) for v in values],
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=5.5,
            markeredgecolor="white",
            markeredgewidth=0.8,
            linewidth=1.8,
            label=label or None,
            zorder=3 + 1 / (1 + i),  # where lines meet, the first stays visible
            clip_on=False,
        )
    ax.set_xscale("log", base=2)
    ax.set_xticks(steps, [str(t) for t in steps])
    ax.minorticks_off()
    ax.set_xlabel("time steps T")
    ax.set_ylabel("accuracy (%)")
    low, high = ax.get_ylim()
    ax.set_ylim(max(0.0, low), min(101.0, high))
    ax.grid(axis="y", color=LINES, linewidth=0.7)
    clean(ax)
    if ann is not None or "" not in curves:
        # Curves rise to the right: what they leave free is the lower right.
        where: dict[str, Any] = {"loc": "lower right"}
        if len(curves) > INSIDE:
            where = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
        ax.legend(frameon=False, fontsize=9, **where)
    return ax


def accuracy_energy(
    energy: Sequence[float] | Mapping[str, Sequence[float]],
    acc: Sequence[float] | Mapping[str, Sequence[float]],
    *,
    steps: Sequence[int] | None = None,
    ann: tuple[float, float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw accuracies (fractions) over the energy of one sample, on a logarithmic axis.

    Args:
        energy: microjoules of one sample, one for each accuracy; or a mapping from a label to
            such a sequence.
        acc: accuracies, of the same form.
        steps: numbers of time steps, written beside the points of the first line.
        ann: energy and accuracy of the ANN, drawn as a star.
        ax: axes to draw into; None makes a figure.

    Returns:
        The axes.

    Raises:
        ValueError: labels or lengths differ, there is nothing to draw, or an energy is not
            positive.
        TypeError: ``ann`` is no pair.
        ImportError: matplotlib is not installed.
    """
    if ann is not None and not (isinstance(ann, Sequence) and len(ann) == 2):
        raise TypeError(f"ann={ann!r} must be (energy, accuracy) of the ANN, or None")
    energies = dict(energy) if isinstance(energy, Mapping) else {"": energy}
    accuracies = dict(acc) if isinstance(acc, Mapping) else {"": acc}
    if not energies or list(energies) != list(accuracies):
        raise ValueError(
            f"energy has the labels {list(energies)}, acc has {list(accuracies)}: both must have "
            "the same, at least one"
        )
    for label, values in energies.items():
        if not len(values) or len(values) != len(accuracies[label]):
            raise ValueError(
                f"{label or 'energy'} has {len(values)} energies for {len(accuracies[label])} "
                "accuracies: there must be as many, at least one"
            )
        for value in (*values, *(ann[:1] if ann else ())):
            if not 0 < value < math.inf:
                raise ValueError(f"energies must be positive and finite, got {value!r}")
    if steps is not None and len(steps) != len(next(iter(energies.values()))):
        raise ValueError(f"steps={list(steps)} must have one number for each point")
    ax = axes_of(ax, (5.2, 3.6))
    for i, (label, values) in enumerate(energies.items()):
        heights = [100 * float(v) for v in accuracies[label]]
        ax.plot(
            values, heights, color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)],
            markersize=5.5, markeredgecolor="white", markeredgewidth=0.8, linewidth=1.8,
            label=label or None, zorder=3 + 1 / (1 + i),
        )  # fmt: skip
        for x, y, T in zip(values, heights, (steps or ()) if i == 0 else (), strict=False):
            ax.annotate(
                f"T={T}", (x, y), xytext=(0, 6), textcoords="offset points", fontsize=8,
                color=GREY, ha="center",
            )  # fmt: skip
    if ann is not None:
        ax.plot(
            ann[0], 100 * ann[1], marker="*", markersize=13, color=INK, linestyle="none",
            label=f"ANN ({100 * ann[1]:.1f} %)", zorder=5,
        )  # fmt: skip
    ax.set_xscale("log")
    ax.set_xlabel("energy of the arithmetic, µJ per sample")
    ax.set_ylabel("accuracy (%)")
    ax.margins(x=0.09, y=0.08)
    _plain_decades(ax)
    low, high = ax.get_ylim()
    # Above 100 there is room for the numbers of steps only.
    ax.set_ylim(max(0.0, low), min(105.0 if steps else 101.0, high))
    ax.grid(axis="y", color=LINES, linewidth=0.7)
    clean(ax)
    if ann is not None or "" not in energies:
        ax.legend(frameon=False, fontsize=9, loc="lower right")
    return ax


def _plain_decades(ax: Any) -> None:
    """Numbers instead of powers, and enough of them on a short axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = ax.get_xlim()
    decades = math.log10(high / low)
    subs = (1.0,) if decades > 3 else (1.0, 2.0, 5.0) if decades > 0.6 else tuple(range(1, 10))
    ax.xaxis.set_major_locator(LogLocator(subs=subs))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
