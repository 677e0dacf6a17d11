"""What a plan is, as text: what the passes did, and what every layer moves and computes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .buffers import Buffers
from .cost import cost_of
from .layers import panels_of
from .network import Network, Node

__all__ = ["Explanation", "LayerRow", "explain"]


@dataclass(frozen=True)
class LayerRow:
    """One layer of neurons, for one image and all T steps.

    Attributes:
        name: of the layer; what it reads and how it runs follow.
        bytes_before, bytes_after: of its spikes and currents, as the converted network has them in
            memory and as the plan has.
        macs: multiply-adds of dense layers over T steps.
        additions: of weights where there are spikes, at the rates that the report measured.
    """

    name: str
    runs: str
    reads: str
    bytes_before: int
    bytes_after: int
    macs: float
    additions: float


@dataclass(frozen=True)
class Explanation:
    """What :meth:`Plan.explain` found; ``str()`` is a text.

    Attributes:
        reason: why the network runs as it is, or nothing.
        passes: what each pass did, line by line, in order.
        layers: a row each.
        arena: bytes of packed spikes of one image at a time.
        apart: the same if no place were used again.
    """

    reason: str
    passes: dict[str, list[str]]
    layers: list[LayerRow]
    arena: int
    apart: int

    def __str__(self) -> str:
        if self.reason:
            return f"not lowered: {self.reason}"
        lines = []
        for name, done in self.passes.items():
            lines.append(f"{name}: {len(done)} place{'' if len(done) == 1 else 's'}")
            lines += [f"    {line}" for line in done]
        head = ("layer", "runs", "reads", "bytes before", "after", "MACs", "additions")
        rows = [
            (r.name, r.runs, r.reads, _si(r.bytes_before), _si(r.bytes_after), _si(r.macs),
             _si(r.additions))
            for r in self.layers
        ]  # fmt: skip
        widths = [max(len(str(row[i])) for row in (head, *rows)) for i in range(len(head))]
        lines.append("")
        for row in (head, *rows):
            lines.append("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())
        if not self.arena:
            return "\n".join(lines)
        lines.append("")
        lines.append(
            f"packed spikes of an image: {_si(self.arena)}B at a time "
            f"({_si(self.apart)}B if each layer kept its place)"
        )
        return "\n".join(lines)


def _si(value: float) -> str:
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.3g} "


def _runs(node: Node) -> str:
    if node.op == "layer":
        parts = "constant current" if not node.terms else "packed spikes"
        return parts + ("" if node.spikes else ", counts")
    return f"as it was: {node.why}" if node.why else "as it was"


def explain(
    before: Network,
    net: Network,
    notes: dict[str, list[str]],
    buffers: Buffers,
    T: int,
    maps: dict[str, str] | None = None,
) -> Explanation:
    """An explanation of a lowered network; ``maps``: how layers on maps of uint8 run."""
    rows = []
    for node in net:
        if node.neurons is None:
            continue
        neurons = math.prod(node.size)
        cost = cost_of(net, node) if node.terms else None
        layer = node.op == "layer"
        reads = ", ".join(dict.fromkeys([*(t.source for t in node.terms), *node.statics]))
        # Before: the current of every step and its spikes, in float32.
        was = 4 * neurons * T * 2 if not layer or node.terms else 4 * neurons * (T + 1)
        packed = 8 * math.prod(node.size[1:]) * panels_of(node.size[0]) * T
        packed = packed if maps is None else neurons * T
        after = (packed if node.spikes else 4 * neurons) if layer else was
        rows.append(
            LayerRow(
                node.name,
                (maps or {}).get(node.name) or _runs(node),
                reads or ", ".join(node.inputs),
                was,
                after,
                T * cost.dense_macs if cost else 0,
                T * cost.synaptic if cost else 0,
            )
        )
    return Explanation("", notes, rows, 8 * buffers.words, 8 * buffers.apart)
