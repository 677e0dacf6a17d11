"""What all pictures share: colours, axes, and what is left out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "COLOURS",
    "GREY",
    "INK",
    "INSIDE",
    "LINES",
    "MARKERS",
    "MISSING",
    "PARTS",
    "array_of",
    "axes_of",
    "check_report",
    "clean",
    "shortened",
]

# Distinguishable to the colour-blind and, with the markers, in grey.
COLOURS = (
    "#0b6e99", "#d1632a", "#5b8c3e", "#8a5a9e", "#946c00", "#444444", "#c2185b", "#2aa198",
    "#7a5230", "#6a8fd8", "#a0a000", "#e08ea0",
)  # fmt: skip
MARKERS = "osD^vXP<>ph*"
# Parts of one bar: they differ in lightness too.
PARTS = ("#0b4f6c", "#e08a3c", "#8fbf6f", "#c9c9c9")
# More lines than this have their legend beside the axes, where it hides none.
INSIDE = 4
INK = "#333333"
GREY = "#888888"
LINES = "#dddddd"
MISSING = "pictures need matplotlib; install it with: pip install matplotlib"


def shortened(name: str, most: int = 28) -> str:
    """``name``, its middle left out where it is long: ends tell layers apart."""
    if len(name) <= most:
        return name
    tail = (most - 1) * 2 // 3
    return f"{name[: most - 1 - tail]}…{name[-tail:]}"


def check_report(report: Any) -> None:
    """Raise TypeError unless it is the report of a conversion."""
    if not hasattr(report, "rows"):
        raise TypeError(f"report must be a Report (snn.report), got {type(report).__name__}")


def array_of(value: Any) -> np.ndarray:
    """Numbers as numpy has them, wherever they were."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.float() if value.dtype == torch.bfloat16 else value
        return value.numpy()
    return np.asarray(value)


def axes_of(ax: Axes | None, size: tuple[float, float]) -> Any:
    """``ax``, or that of a new figure of ``size`` inches."""
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as e:
        raise ImportError(MISSING) from e
    return pyplot.subplots(figsize=size, layout="constrained")[1]


def clean(ax: Any) -> None:
    """The common look: two spines, quiet ticks."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(GREY)
    ax.tick_params(color=GREY, labelcolor=INK, labelsize=9)
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set_color(INK)
        label.set_size(10)
