"""Time against T of everybody who runs a whole network: a panel per network."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from common import load

_SHOWN = {
    "plan": ("C0", "o-"),
    "plan, int16": ("C9", "o--"),
    "unlowered": ("C2", "D-"),
    "unlowered, channels_last": ("C2", "D:"),
    "unlowered, bf16": ("C2", "D--"),
    "SpikingJelly, IFNode": ("C3", "^-"),
    "SpikingJelly, RateCodingRecipe": ("C1", "^--"),
    "SpikingJelly, LTB recipe": ("C1", "v:"),
    "ANN, channels_last": ("C7", "x-"),
    "ANN, bf16, channels_last": ("C7", "x:"),
}
_ACROSS = 4


def picture(rows: Path, batch: str = "8") -> Path | str:
    """Draws a results file beside itself; says why where it cannot."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return "none, matplotlib is not installed"
    found = [row for row in load(rows) if row["section"] == "time" and row["ANN passes"]]
    batches = {row["batch"] for row in found}
    if not found:
        return "none, there is nothing to draw"
    batch = batch if batch in batches else max(batches, key=int)
    found = [row for row in found if row["batch"] == batch]
    networks = list(dict.fromkeys(row["network"] for row in found))
    across = min(_ACROSS, len(networks))
    down = -(-len(networks) // across)
    figure, axes = pyplot.subplots(
        down, across, figsize=(3.6 * across, 3.4 * down), sharey=True, squeeze=False
    )
    for axis, network in zip(axes.flat, networks, strict=False):
        _panel(axis, [row for row in found if row["network"] == network])
    for axis in list(axes.flat)[len(networks) :]:
        axis.set_visible(False)
    for line in axes:
        line[0].set_ylabel("time, in dense float32 passes of the ANN")
    handles = dict[str, object]()
    for axis in axes.flat:
        lines, names = axis.get_legend_handles_labels()
        handles |= dict(zip(names, lines, strict=True))
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.legend(
        handles.values(), handles.keys(), loc="upper center", ncols=min(5, 1 + 2 * across),
        fontsize="small", bbox_to_anchor=(0.5, 0.0),
    )  # fmt: skip
    threads = found[0]["threads"]
    figure.suptitle(f"batch {batch}, {threads} cores of an {found[0]['device']}", fontsize="medium")
    path = rows.with_suffix(".png")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return path


def _panel(axis, rows: list[dict[str, str]]) -> None:
    for name, (colour, style) in _SHOWN.items():
        points = {int(r["T"]): float(r["ANN passes"]) for r in rows if r["implementation"] == name}
        if points:
            steps = sorted(points)
            axis.plot(steps, [points[T] for T in steps], style, color=colour, label=name, ms=4)
    steps = sorted({int(row["T"]) for row in rows})
    rates = [float(row["rate"]) for row in rows if row["rate"]]
    axis.axhline(1.0, color="black", lw=0.8)  # the unit
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(steps, [str(T) for T in steps])
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    rate = f", {100 * rates[0]:.0f} % fire" if rates and math.isfinite(rates[0]) else ""
    axis.set_title(f"{rows[0]['network']}{rate}", fontsize="medium")
    axis.set_xlabel("time steps T")
    axis.grid(alpha=0.3)


if __name__ == "__main__":
    print(picture(Path(sys.argv[1]), *sys.argv[2:3]))
