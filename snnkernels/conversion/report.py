"""What a conversion did, node by node."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConversionError
from .spiking import SpikingActivation
from .verify import leaves, relative_error

__all__ = ["NodeReport", "Report", "measure"]


@dataclass
class NodeReport:
    """One node of the network.

    Attributes:
        name: module path in the ANN, or the name of the function call.
        action: what was done with it.
        threshold: θ, scalar or ``[C]``; None where no neuron stands.
        rate: spikes per neuron and step on the sample, or None.
        error: root mean square of SNN - ANN over that of the ANN on the sample, or None.
    """

    name: str
    action: str
    threshold: Tensor | None = None
    rate: float | None = None
    error: float | None = None

    def cells(self) -> list[str]:
        """The row as text."""
        theta = "-"
        if self.threshold is not None:
            low, high = self.threshold.min().item(), self.threshold.max().item()
            theta = f"{low:.4g}" if low == high else f"{low:.4g} .. {high:.4g}"
        rate = "-" if self.rate is None else f"{self.rate:.4f}"
        error = "-" if self.error is None else f"{self.error:.2%}"
        return [self.name, self.action, theta, rate, error]


@dataclass
class Report:
    """The report of a conversion; ``str()`` is a table, :meth:`to_markdown` the same for papers.

    Attributes:
        method: the method's name.
        T: the number of steps the thresholds belong to.
        rows: one for each node, in order.
        silent_channels: channels that never fired on the calibration data, by layer.
        notes: what else one has to know.
    """

    method: str
    T: int
    rows: list[NodeReport] = field(default_factory=list)
    silent_channels: dict[str, list[int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    HEADER = ("node", "what was done", "threshold", "rate", "error vs ANN")

    def _notes(self) -> list[str]:
        notes = [
            f"method {self.method}; the thresholds belong to T={self.T}, other T reuse them",
            *self.notes,
        ]
        for layer, channels in self.silent_channels.items():
            shown = ", ".join(map(str, channels[:16])) + (", ..." if len(channels) > 16 else "")
            notes.append(
                f"{layer}: {len(channels)} channel{'s' if len(channels) > 1 else ''} never fired "
                f"on the calibration data and took the layer's threshold: {shown}"
            )
        return notes

    def __str__(self) -> str:
        table = [list(self.HEADER), *(row.cells() for row in self.rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(self.HEADER))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in table]
        lines.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join([*(line.rstrip() for line in lines), "", *self._notes()])

    def to_markdown(self) -> str:
        """The table and the notes as GitHub markdown."""
        table = [list(self.HEADER), ["---", "---", "---:", "---:", "---:"]]
        table += [[c.replace("|", "\\|") for c in row.cells()] for row in self.rows]
        lines = ["| " + " | ".join(line) + " |" for line in table]
        return "\n".join([*lines, "", *(f"* {note}" for note in self._notes())])

    def __getitem__(self, name: str) -> NodeReport:
        """The row called ``name``."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r} is not in the report; it has {[r.name for r in self.rows]}")


@torch.no_grad()
def measure(snn: nn.Module, graph: nn.Module, x: Tensor, expected: Any, report: Report) -> None:
    """Fill in rates and errors from one run of both networks on ``x`` ``[B, *]``.

    ``graph``, the normalised ANN, has its activations at the paths at which ``snn.body`` has its
    neurons. ``expected`` is what the user's own ANN answers: every tensor of it gets a row.

    Raises:
        ConversionError: the converted network fails on ``x``.
    """
    T = report.T
    wanted: dict[str, Tensor] = {}
    handles = []
    layers = {p: m for p, m in snn.body.named_modules() if isinstance(m, SpikingActivation)}  # type: ignore[union-attr]

    def keep(path: str) -> object:
        def hook(module: nn.Module, args: object, out: Tensor) -> None:
            wanted[path] = out

        return hook

    def compare(path: str) -> object:
        def hook(module: SpikingActivation, args: object, out: Tensor) -> None:
            row = report[module.label]
            row.rate = float(module.spikes_per_step(out, T))
            row.error = relative_error(module.answer(out, T, wanted[path].dtype), wanted[path])

        return hook

    try:
        for path, layer in layers.items():
            handles.append(graph.get_submodule(path).register_forward_hook(keep(path)))  # type: ignore
            handles.append(layer.register_forward_hook(compare(path)))  # type: ignore
        graph(x)
        answer = snn(x, T=T)
    except RuntimeError as error:
        raise ConversionError(
            f"the converted network fails on the loader's first inputs, of shape "
            f"{tuple(x.shape)}: {error}. Between neurons everything runs on [T * B, *]: shapes "
            "must be computed from x.shape[0], and values that meet spikes need the batch as "
            "their first dimension"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    answers = dict(leaves(answer))
    for name, value in leaves(expected):
        report.rows.append(
            NodeReport(
                name,
                f"on rates over {T} steps; error against the ANN itself",
                error=relative_error(answers[name], value),
            )
        )
    if not answers:
        report.notes.append(
            f"the output is a {type(expected).__name__}, not tensors in tuples, lists or dicts: "
            "there is no error of the answer"
        )
