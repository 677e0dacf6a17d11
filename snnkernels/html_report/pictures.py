"""Pictures of a conversion for its page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from functools import partial
from html import escape
from typing import Any

from ..conversion.report import NodeReport, Report
from ..metrics import Operations

__all__ = ["pictures"]


def pictures(
    report: Report,
    accuracy: Mapping[int, float] | None,
    ann: float | None,
    operations: Operations | None,
) -> str:
    """The pictures of a page as data in it; nothing where there is nothing to draw."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return (
            "<p>None: matplotlib is not installed where this page was made "
            "(<code>pip install matplotlib</code>).</p>\n"
        )
    from .. import plots

    done: list[str] = []

    def draw(what: str, size: tuple[float, float], fill: Callable[[Any], Any]) -> None:
        figure = Figure(figsize=size, layout="constrained")
        fill(figure.subplots())
        done.append(_image(figure, what))

    if accuracy:
        steps = sorted(accuracy)
        draw(
            "Accuracy against the number of steps", (5.2, 3.4),
            lambda ax: plots.accuracy_curve(steps, [accuracy[T] for T in steps], ann=ann, ax=ax),
        )  # fmt: skip
    split = [row for row in report.rows if row.error is not None and row.clipping is not None]
    if split:
        draw(
            "Where the error of each layer enters", (6.4, 0.28 * len(split) + 1.3),
            lambda ax: plots.error_sources(report, ax=ax),
        )  # fmt: skip
    known = [row for row in report.rows if row.points is not None]
    if len(known) > 2:
        draw(
            "How well each layer's spikes follow the ANN",
            (min(11.0, max(4.6, 0.36 * len(known) + 1.4)), 3.4),
            lambda ax: plots.correlations(report, ax=ax),
        )  # fmt: skip
    if operations is not None:
        names = len({layer.name for layer in operations.layers})
        draw(
            "Energy of each layer, beside the ANN's", (6.4, 0.34 * names + 1.3),
            lambda ax: plots.energy_layers(operations, ax=ax),
        )  # fmt: skip
    rows = ["".join(done)]
    done.clear()
    for row in _telling(known):
        draw(
            f"Answers against activations, {row.name}", (2.9, 2.9),
            partial(_scatter, plots.rate_activation, row),
        )  # fmt: skip
    rows.append("".join(done))
    return "".join(f'<div class="pictures">\n{row}</div>\n' for row in rows if row)


def _scatter(draw: Callable[..., Any], row: NodeReport, ax: Any) -> None:
    assert row.points is not None
    draw(row.points[0], row.points[1], title=row.name, ax=ax)


def _telling(rows: list[NodeReport], most: int = 4) -> list[NodeReport]:
    """First and last layer and those of the largest error between them, in order."""
    if len(rows) <= most:
        return rows
    inner = sorted(range(1, len(rows) - 1), key=lambda i: -(rows[i].error or 0.0))[: most - 2]
    return [rows[i] for i in (0, *sorted(inner), len(rows) - 1)]


def _image(figure: Any, what: str) -> str:
    from matplotlib import rc_context

    stream = io.BytesIO()
    # No date and no drawn names: the same report is the same page.
    with rc_context({"svg.hashsalt": "snnkernels"}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    width, height = (round(84 * inches) for inches in figure.get_size_inches())
    return (
        f'<figure style="width:{width}px"><img alt="{escape(what)}" width="{width}" '
        f'height="{height}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{escape(what)}</figcaption></figure>\n"
    )
