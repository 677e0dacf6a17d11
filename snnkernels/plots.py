"""Pictures: accuracy against the number of time steps, spike rasters.

Each function draws into ``ax`` (a new figure when None) and returns the axes. matplotlib is
imported when a function is called; no setting of it is changed, and with ``ax`` given pyplot is
not touched, so any back end will do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["accuracy_curve", "raster"]

# Distinguishable to the colour-blind and, with the markers, in grey.
_COLOURS = (
    "#0b6e99", "#d1632a", "#5b8c3e", "#8a5a9e", "#946c00", "#444444", "#c2185b", "#2aa198",
    "#7a5230", "#6a8fd8", "#a0a000", "#e08ea0",
)  # fmt: skip
_MARKERS = "osD^vXP<>ph*"
# More lines than this have their legend beside the axes, where it hides none.
_INSIDE = 4
_INK = "#333333"


def accuracy_curve(
    ts: Sequence[int],
    acc: Sequence[float] | Mapping[str, Sequence[float]],
    *,
    ann: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw accuracies (fractions, 0 to 1) over time steps, on a logarithmic axis of steps.

    ``acc`` holds one value for each of ``ts``, or maps a label to such a sequence for several
    lines. ``ann`` draws the accuracy to be reached as a dashed line. Returns the axes. Raises
    :class:`ValueError` when lengths differ or ``ts`` is empty, :class:`ImportError` without
    matplotlib.
    """
    curves = dict(acc) if isinstance(acc, Mapping) else {"": acc}
    steps = [int(t) for t in ts]
    if not steps or min(steps) < 1:
        raise ValueError(f"ts must hold numbers of steps of at least 1, got {list(ts)}")
    for label, values in curves.items():
        if len(values) != len(steps):
            raise ValueError(
                f"{label or 'acc'} has {len(values)} values for {len(steps)} numbers of steps"
            )
    ax = _axes(ax, (5.2, 3.6))
    if ann is not None:
        ax.axhline(
            100 * ann,
            color=_INK,
            linewidth=1.2,
            linestyle=(0, (5, 3)),
            label=f"ANN ({100 * ann:.1f} %)",
            zorder=2,
        )
    for i, (label, values) in enumerate(curves.items()):
        ax.plot(
            steps,
            [100 * float(v) for v in values],
            color=_COLOURS[i % len(_COLOURS)],
            marker=_MARKERS[i % len(_MARKERS)],
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
    ax.grid(axis="y", color="#dddddd", linewidth=0.7)
    _clean(ax)
    if ann is not None or "" not in curves:
        # Curves rise to the right: what they leave free is the lower right.
        where: dict[str, Any] = {"loc": "lower right"}
        if len(curves) > _INSIDE:
            where = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
        ax.legend(frameon=False, fontsize=9, **where)
    return ax


def raster(
    spikes: torch.Tensor | np.ndarray, ax: Axes | None = None, *, title: str | None = None
) -> Axes:
    """Draw one row of ticks a neuron, one column a time step.

    ``spikes`` is ``[T, *shape]`` of any dtype, an element other than zero being a spike; all
    dimensions after the first are laid out as neurons. Returns the axes. Raises
    :class:`ValueError` for fewer than two dimensions, :class:`ImportError` without matplotlib.
    """
    if isinstance(spikes, torch.Tensor):
        spikes = (spikes.detach() != 0).cpu().numpy()
    if spikes.ndim < 2:
        raise ValueError(f"spikes must be [T, neurons], got {spikes.ndim} dimension(s)")
    steps = spikes.shape[0]
    neurons = math.prod(spikes.shape[1:])
    fired = (spikes != 0).reshape(steps, neurons)
    t, n = fired.nonzero()
    ax = _axes(ax, (6.4, 3.6))
    width = ax.get_window_extent().width / ax.figure.dpi * 72 / max(1, steps)
    ax.vlines(
        t + 1,
        n - 0.42,
        n + 0.42,
        color=_COLOURS[0],
        linewidth=min(3.0, max(0.4, 0.3 * width)),
        snap=False,  # snapped to pixels, ticks of one height come out in two
        # As paths, a million spikes would make a vector file nobody can open.
        rasterized=len(t) > 20_000,
    )
    ax.set_xlim(0.5, max(1, steps) + 0.5)
    ax.set_ylim(-0.8, max(1, neurons) - 0.2)
    ax.set_xlabel("time step")
    ax.set_ylabel("neuron")
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    if title:
        ax.set_title(title, fontsize=10, color=_INK, loc="left")
    _clean(ax)
    return ax


def _axes(ax: Axes | None, size: tuple[float, float]) -> Any:
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as e:
        raise ImportError(
            "pictures need matplotlib; install it with: pip install matplotlib"
        ) from e
    return pyplot.subplots(figsize=size, layout="constrained")[1]


def _clean(ax: Any) -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color("#888888")
    ax.tick_params(color="#888888", labelcolor=_INK, labelsize=9)
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set_color(_INK)
        label.set_size(10)
