"""What a conversion did, node by node."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..bound import takes_methods
from .errors import ConversionError
from .errors_by_source import Sources, sources, suggestion
from .spiking import SpikingActivation
from .verify import leaves, relative_error

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    from ..metrics import Operations

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
        clipping, quantisation, unevenness, inherited: where that error enters, each over the root
            mean square of the ANN (:mod:`snnkernels.conversion.errors_by_source`), or None.
        points: up to 512 values of the sample, evenly spaced: the ANN's activations and what the
            spikes answer to them, float32 ``[2, n]``; None where no neuron stands or without data.
    """

    name: str
    action: str
    threshold: Tensor | None = None
    rate: float | None = None
    error: float | None = None
    clipping: float | None = None
    quantisation: float | None = None
    unevenness: float | None = None
    inherited: float | None = None
    points: Tensor | None = field(default=None, repr=False, compare=False)

    def cells(self, split: bool = False) -> list[str]:
        """The row as text; ``split``: with where the error enters."""
        theta = "-"
        if self.threshold is not None:
            low, high = self.threshold.min().item(), self.threshold.max().item()
            theta = f"{low:.4g}" if low == high else f"{low:.4g} .. {high:.4g}"
        rate = "-" if self.rate is None else f"{self.rate:.4f}"
        error = "-" if self.error is None else f"{self.error:.2%}"
        parts = [self.clipping, self.quantisation, self.unevenness, self.inherited]
        return [self.name, self.action, theta, rate, error, *map(_part, parts if split else ())]


def _part(value: float | None) -> str:
    """A part of an error; empty where there are no neurons, so that layers stand out."""
    if value is None:
        return ""
    return "0" if value == 0 else f"{value:.1%}"


@takes_methods
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
    SOURCES = ("clipping", "quantisation", "unevenness", "inherited")

    if TYPE_CHECKING:  # from an upper floor, bound in snnkernels/__init__.py

        def to_html(
            self,
            path: str | PathLike[str] | None = None,
            *,
            title: str = "Conversion report",
            settings: Mapping[str, Any] | None = None,
            accuracy: Mapping[int, float] | None = None,
            ann: float | None = None,
            operations: Operations | None = None,
        ) -> str:
            """The report as one HTML page, see :func:`snnkernels.html_report.to_html`."""
            ...

    def _table(self) -> list[list[str]]:
        """Header and rows; sources of errors have columns where one was measured."""
        split = any(getattr(row, s) is not None for row in self.rows for s in self.SOURCES)
        header = [*self.HEADER, *(self.SOURCES if split else ())]
        return [header, *(row.cells(split) for row in self.rows)]

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
        table = self._table()
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in table]
        lines.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join([*(line.rstrip() for line in lines), "", *self._notes()])

    def to_markdown(self) -> str:
        """The table and the notes as GitHub markdown."""
        header, *rows = self._table()
        table = [header, ["---"] * 2 + ["---:"] * (len(header) - 2)]
        table += [[c.replace("|", "\\|") for c in row] for row in rows]
        lines = ["| " + " | ".join(line) + " |" for line in table]
        return "\n".join([*lines, "", *(f"* {note}" for note in self._notes())])

    def __getitem__(self, name: str) -> NodeReport:
        """The row called ``name``."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r} is not in the report; it has {[r.name for r in self.rows]}")


def _some(a: Tensor, answer: Tensor, most: int = 512) -> Tensor | None:
    """Values of both at the same places; None where their shapes differ."""
    if a.shape != answer.shape or not a.numel():
        return None
    places = torch.linspace(0, a.numel() - 1, min(most, a.numel()), device=a.device).long()
    return torch.stack([v.detach().reshape(-1)[places].float() for v in (a, answer)]).cpu()


@torch.no_grad()
def measure(snn: nn.Module, graph: nn.Module, x: Tensor, expected: Any, report: Report) -> None:
    """Fill in rates and errors from one run of both networks on ``x`` ``[B, *]``.

    ``graph``, the normalised ANN, has its activations at the paths at which ``snn.body`` has its
    neurons. ``expected`` is what the user's own ANN answers: every tensor of it gets a row.

    Raises:
        ConversionError: the converted network fails on ``x``.
    """
    T = report.T
    wanted: dict[str, tuple[Tensor, Tensor]] = {}
    split: list[tuple[str, Sources]] = []
    whole: list[str] = []
    handles = []
    layers = {p: m for p, m in snn.body.named_modules() if isinstance(m, SpikingActivation)}  # type: ignore[union-attr]

    def keep(path: str) -> object:
        def hook(module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
            wanted[path] = (args[0], out)

        return hook

    def compare(path: str) -> object:
        def hook(module: SpikingActivation, args: tuple[Tensor, int], out: Tensor) -> None:
            row = report[module.label]
            z, a = wanted.pop(path)
            row.rate = float(module.spikes_per_step(out, T))
            answer = module.answer(out, T, a.dtype)
            row.error = relative_error(answer, a)
            row.points = _some(a, answer)
            found = sources(module, z, a, args[0], answer, T)
            if found is None:
                whole.append(module.label)
                return
            split.append((module.label, found))
            row.clipping, row.quantisation = found.clipping, found.quantisation
            row.unevenness, row.inherited = found.unevenness, found.inherited

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
    if whole:
        report.notes.append(
            f"{', '.join(whole)}: no answer to a held current is defined there, so the error is "
            "not split by source"
        )
    nodes = [layer.node for layer in layers.values()]
    rules = " ".join(report[name].action for name, _ in split)
    half = all(isinstance(node.v_init, str) for node in nodes)
    advice = suggestion(split, report.method, rules, half, T)
    if advice is not None:
        report.notes.append(advice)
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
