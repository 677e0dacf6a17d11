"""The roofline of the neuron: which share of the machine's best copy each one reaches, by size."""

from __future__ import annotations

import sys
from pathlib import Path

from common import load

_SHOWN = {
    "snnkernels": ("C0", "o-"),
    "snnkernels, packed": ("C9", "o--"),
    "torch.compile, slices": ("C1", "s-"),
    "torch.compile, stack": ("C1", "s--"),
    "SpikingJelly, function": ("C3", "^-"),
    "SpikingJelly, HalfThresholdIFNode": ("C3", "^--"),
    "SpikingJelly 0.0.0.0.14, CuPy": ("C3", "^:"),
    "PyTorch loop": ("C7", "v-"),
}


def picture(rows: Path) -> Path | str:
    """Draws a results file beside itself; says why where it cannot."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return "none, matplotlib is not installed"
    found = [row for row in load(rows) if row["share of copy"] and row["section"] != "limits"]
    panels = [
        (direction, dtype)
        for direction in ("forward", "forward+backward")
        for dtype in ("float32", "bfloat16")
        if any(row["direction"] == direction and row["dtype"] == dtype for row in found)
    ]
    if not panels:
        return "none, there is nothing to draw"
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 4.2), sharey=True, squeeze=False
    )
    for axis, (direction, dtype) in zip(axes[0], panels, strict=True):
        _panel(axis, found, direction, dtype)
    axes[0, 0].set_ylabel("share of the best copy's speed")
    handles = dict[str, object]()
    for axis in axes[0]:
        lines, names = axis.get_legend_handles_labels()
        handles |= dict(zip(names, lines, strict=True))
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize="small"
    )
    figure.suptitle(found[0]["device"])
    figure.subplots_adjust(bottom=0.3, top=0.87, wspace=0.06, left=0.1, right=0.97)
    path = rows.with_suffix(".png")
    # Tight: the legend is wider than one panel.
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return path


def _panel(axis, rows: list[dict[str, str]], direction: str, dtype: str) -> None:
    for name, (colour, style) in _SHOWN.items():
        points: dict[int, float] = {}
        for row in rows:
            if (row["implementation"], row["direction"], row["dtype"]) == (name, direction, dtype):
                size = int(row["T"]) * int(row["N"])
                points[size] = max(points.get(size, 0.0), float(row["share of copy"]))
        if points:
            sizes = sorted(points)
            axis.plot(sizes, [points[s] for s in sizes], style, color=colour, label=name, ms=4)
    axis.axhline(1.0, color="black", lw=0.8)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("neurons x time steps")
    axis.set_title(f"{direction}, {dtype}")
    axis.grid(alpha=0.3)


if __name__ == "__main__":
    print(picture(Path(sys.argv[1])))
