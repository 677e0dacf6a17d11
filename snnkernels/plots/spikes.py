"""What neurons do: spikes, membranes, how often they fire."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .style import COLOURS, GREY, INK, INSIDE, LINES, array_of, axes_of, clean, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["membrane", "raster", "rate_histogram"]


def raster(
    spikes: torch.Tensor | np.ndarray, ax: Axes | None = None, *, title: str | None = None
) -> Axes:
    """Draw one row of ticks a neuron, one column a time step.

    Args:
        spikes: ``[T, *shape]`` of any dtype, an element other than zero being a spike; all
            dimensions after the first are laid out as neurons.
        ax: axes to draw into; None makes a figure.
        title: above the axes.

    Returns:
        The axes.

    Raises:
        ValueError: ``spikes`` has fewer than two dimensions.
        ImportError: matplotlib is not installed.
    """
    if isinstance(spikes, torch.Tensor):
        spikes = (spikes.detach() != 0).cpu().numpy()
    if spikes.ndim < 2:
        raise ValueError(f"spikes must be [T, neurons], got {spikes.ndim} dimension(s)")
    steps = spikes.shape[0]
    neurons = math.prod(spikes.shape[1:])
    fired = (spikes != 0).reshape(steps, neurons)
    t, n = fired.nonzero()
    ax = axes_of(ax, (6.4, 3.6))
    width = ax.get_window_extent().width / ax.figure.dpi * 72 / max(1, steps)
    ax.vlines(
        t + 1,
        n - 0.42,
        n + 0.42,
        color=COLOURS[0],
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
        ax.set_title(title, fontsize=10, color=INK, loc="left")
    clean(ax)
    return ax


def membrane(
    v: torch.Tensor | np.ndarray,
    threshold: float | torch.Tensor | np.ndarray | None = None,
    *,
    spikes: torch.Tensor | np.ndarray | None = None,
    labels: list[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw membrane potentials over time, one line a neuron.

    Args:
        v: ``[T]`` or ``[T, neurons]``, after each step; at most 12 neurons.
        threshold: θ, a number or one for each neuron, drawn dashed.
        spikes: of the shape of ``v``; where they are not zero, a mark stands above the lines.
        labels: a name for each neuron.
        ax: axes to draw into; None makes a figure.

    Returns:
        The axes.

    Raises:
        ValueError: a shape does not fit; names it.
        ImportError: matplotlib is not installed.
    """
    lines = array_of(v)
    lines = lines.reshape(-1, 1) if lines.ndim == 1 else lines
    if lines.ndim != 2 or not 1 <= lines.shape[1] <= len(COLOURS):
        raise ValueError(
            f"v must be [T] or [T, neurons] with 1 to {len(COLOURS)} neurons, got shape "
            f"{tuple(lines.shape)}: choose some"
        )
    steps, neurons = lines.shape
    fired = None if spikes is None else array_of(spikes) != 0
    if fired is not None:
        if fired.size != lines.size or fired.shape[:1] != (steps,):
            raise ValueError(
                f"spikes has shape {fired.shape}; it must have that of v, {lines.shape}"
            )
        fired = fired.reshape(lines.shape)
    if labels is not None and len(labels) != neurons:
        raise ValueError(f"labels={labels!r} must have {neurons} names")
    theta = None if threshold is None else array_of(threshold).reshape(-1)
    if theta is not None and theta.size not in (1, neurons):
        raise ValueError(f"threshold has {theta.size} values; v takes one, or {neurons}")
    ax = axes_of(ax, (6.4, 3.2))
    t = np.arange(1, steps + 1)
    if theta is not None:
        one = np.ptp(theta) == 0
        for i, level in enumerate(theta[:1] if one else theta):
            ax.axhline(
                float(level), color=INK if one else COLOURS[i], linewidth=1.1,
                linestyle=(0, (5, 3)), zorder=2,
            )  # fmt: skip
        ax.annotate(
            "θ", (1.0, float(theta.max())), xycoords=("axes fraction", "data"), xytext=(3, 0),
            textcoords="offset points", va="center", fontsize=10, color=INK,
            annotation_clip=False,
        )  # fmt: skip
    for i in range(neurons):
        ax.plot(
            t, lines[:, i], color=COLOURS[i], linewidth=1.5, zorder=3,
            label=None if labels is None else labels[i],
        )  # fmt: skip
    if fired is not None:
        known = [lines.max(), *(() if theta is None else (theta.max(),))]
        low = min(0.0, float(lines.min()))
        top = float(max(known))
        gap = 0.07 * ((top - low) or 1.0)
        for i in range(neurons):
            at = t[fired[:, i]]
            ax.plot(
                at, np.full(len(at), top + gap * (1.2 + i)), color=COLOURS[i], linestyle="none",
                marker="|", markersize=7, markeredgewidth=1.6, zorder=3,
            )  # fmt: skip
    ax.axhline(0.0, color=LINES, linewidth=0.8, zorder=1)
    ax.set_xlim(0.5, steps + 0.5)
    ax.set_xlabel("time step")
    ax.set_ylabel("membrane potential")
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    clean(ax)
    if labels is not None:
        ax.legend(
            frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.04, 0.5),
            handlelength=1.2,
        )  # fmt: skip
    return ax


def rate_histogram(
    rates: torch.Tensor | np.ndarray | Mapping[str, torch.Tensor],
    *,
    bins: int = 40,
    ax: Axes | None = None,
) -> Axes:
    """Draw how many neurons fire how often, as shares of each layer, logarithmically.

    Up to four layers are lines, more are rows of colours.

    Args:
        rates: spikes of a neuron and step, of any shape; or a mapping from layer to such, as
            :func:`snnkernels.metrics.firing_rates` with ``per="neuron"`` gives.
        bins: number of bins from 0 to the largest rate (1, unless it is larger).
        ax: axes to draw into; None makes a figure.

    Returns:
        The axes.

    Raises:
        ValueError: there is nothing to draw, or a rate is negative or not finite.
        ImportError: matplotlib is not installed.
    """
    layers = dict(rates) if isinstance(rates, Mapping) else {"": rates}
    values = {name: array_of(r).astype(np.float64).reshape(-1) for name, r in layers.items()}
    if not values or any(v.size == 0 for v in values.values()):
        raise ValueError("rates are empty: there is nothing to draw")
    if bins < 1:
        raise ValueError(f"bins={bins} must be at least 1")
    for name, v in values.items():
        if not np.isfinite(v).all() or v.min() < 0:
            raise ValueError(f"rates {name} must be finite and not negative")
    top = max(1.0, *(float(v.max()) for v in values.values()))
    edges = np.linspace(0.0, top, bins + 1)
    shares = {name: 100 * np.histogram(v, edges)[0] / v.size for name, v in values.items()}
    if len(values) > INSIDE:
        ax = axes_of(ax, (6.4, 0.3 * len(values) + 1.1))
        _rows_of_shares(ax, shares, edges, {name: v.mean() for name, v in values.items()})
    else:
        ax = axes_of(ax, (5.6, 3.6))
        for i, (name, share) in enumerate(shares.items()):
            label = f"{shortened(name)} (mean {values[name].mean():.3f})" if name else None
            ax.stairs(share, edges, color=COLOURS[i], linewidth=1.5, label=label)
        ax.set_yscale("log")
        ax.set_ylim(min(float(s[s > 0].min()) for s in shares.values()) / 2, 150)
        ax.set_ylabel("neurons (%)")
        from matplotlib.ticker import FuncFormatter

        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.grid(axis="y", color=LINES, linewidth=0.7)
        if "" not in values:
            ax.legend(frameon=False, fontsize=8, loc="upper right")
    ax.set_xlim(0, top)
    ax.set_xlabel("spikes of a neuron and step")
    clean(ax)
    return ax


def _rows_of_shares(
    ax: Any, shares: Mapping[str, np.ndarray], edges: np.ndarray, means: Mapping[str, float]
) -> None:
    """A row of colours for each of many layers: lines would hide each other."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter

    grid = np.array(list(shares.values()))
    grid = np.ma.masked_equal(grid, 0.0)
    rows = np.arange(len(shares) + 1) - 0.5
    norm = LogNorm(max(float(grid.min()), 1e-3), 100)
    drawn = ax.pcolormesh(edges, rows, grid, cmap="cividis_r", norm=norm, rasterized=True)
    ax.plot(list(means.values()), range(len(means)), "|", color="#d1632a", markersize=11,
            markeredgewidth=2.2, label="mean")  # fmt: skip
    ax.set_yticks(range(len(shares)), [shortened(name) for name in shares])
    ax.set_ylim(len(shares) - 0.5, -0.5)
    ax.legend(frameon=False, fontsize=8, loc="lower right", handlelength=0.8)
    bar = ax.figure.colorbar(drawn, ax=ax, pad=0.02)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    bar.set_label("neurons (%)", color=INK, size=9)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, labelcolor=INK, color=GREY)
