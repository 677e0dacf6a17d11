"""What the passes work on: a converted network as nodes with their inputs by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx

from ..conversion.spiking import SpikingActivation

__all__ = ["Network", "Neurons", "Node", "Term"]

Pair = tuple[int, int]


@dataclass(frozen=True)
class Term:
    """One linear map of a value; a linear node is the sum of its terms.

    Attributes:
        source: the value it reads.
        weight: float64 ``[C_out, C_in / groups, kh, kw]``: folded in float64, rounded once when a
            layer is built.
        pool, pool_stride: windows of the source whose values are added first.
        either: such windows have a spike where one of their positions has one, instead.
        binary: the source's spikes count 0 and 1 here: what a spike weighs is in ``weight``.
    """

    source: str
    weight: Tensor
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    pool: Pair = (1, 1)
    pool_stride: Pair = (1, 1)
    either: bool = False
    binary: bool = False

    @property
    def each(self) -> bool:
        """Whether it maps every position and channel to itself."""
        return self.groups == self.weight.shape[0] and self.at_once

    @property
    def at_once(self) -> bool:
        """Whether it is a map of channels at every position."""
        return self.weight.shape[2:] == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0)

    @property
    def inputs(self) -> int:
        """C_in."""
        return self.weight.shape[1] * self.groups

    @property
    def in_place(self) -> bool:
        """:attr:`each`, without a pool."""
        return self.each and self.pool == (1, 1) and self.pool_stride == (1, 1)


@dataclass
class Neurons:
    """The neurons of a node.

    Attributes:
        module: as the converter placed them.
        threshold, v_init: float32, scalar, ``[C]`` or of the layer's shape.
        amplitude: what a spike weighs, float32, scalar or ``[C]``.
        bias: added to the current at every step, float32, scalar or ``[C]``; or None.
        strict: they fire above the threshold, not at it.
        plain: an engine layer can run them; else why not.
    """

    module: SpikingActivation
    threshold: Tensor
    v_init: Tensor
    amplitude: Tensor
    bias: Tensor | None
    strict: bool
    plain: str = ""


@dataclass
class Node:
    """One value and how it comes about.

    Attributes:
        name: unique.
        op: ``static`` (constant in time), ``linear``, ``affine`` (per channel), ``add``, ``cat``,
            ``avg_pool``, ``max_pool``, ``same`` (its input), ``flatten``, ``neurons``, ``count``,
            ``layer`` (neurons with what lies before them, run by one kernel), ``dense`` (the same,
            run as the converted network runs it) or ``torch`` (anything else).
        inputs: names.
        size: shape of the value without time and batch; () where it is no tensor.
        origin: the node of the converted network's body that computes the same.
        terms, bias, statics, side: of a linear node and of a layer: the sum of the terms, float64
            ``[C_out]``, values constant in time added to it, and the side of a cumulative max-pool
            behind.
        scale, shift: of an affine node, float64 ``[C]``.
        window: of a pool, ``(kernel, stride)``.
        neurons: of neurons and layers.
        spikes: whether a layer's spikes are read, beside its counts.
        why: why a node was left as it is.
        unit: of a layer in whole numbers: what 1 means in each channel, float64 ``[C]``.
    """

    name: str
    op: str
    inputs: list[str]
    size: tuple[int, ...]
    origin: fx.Node | None = None
    terms: list[Term] = field(default_factory=list)
    bias: Tensor | None = None
    statics: list[str] = field(default_factory=list)
    side: int = 1
    scale: Tensor | None = None
    shift: Tensor | None = None
    window: tuple[Pair, Pair] = ((1, 1), (1, 1))
    neurons: Neurons | None = None
    spikes: bool = True
    why: str = ""
    unit: Tensor | None = None

    def whole_bias(self) -> Tensor | None:
        """The sum's bias and that of the neurons, ``[C]``; None: neither."""
        if self.neurons is None or self.neurons.bias is None:
            return self.bias
        own = self.neurons.bias.double().expand(self.size[0])
        return own if self.bias is None else self.bias + own

    def reads(self) -> list[str]:
        """All values it needs."""
        return [*self.inputs, *(t.source for t in self.terms), *self.statics]


class Network:
    """Nodes by name in the order of execution, and which of them are the counts that are read."""

    def __init__(self, nodes: list[Node], outputs: list[str], rates: dict[str, float]) -> None:
        self.nodes = {node.name: node for node in nodes}
        self.outputs = outputs
        self.rates = rates  # measured spikes per neuron and step, by what the report calls a layer
        self.aliases: dict[str, str] = {}  # values that a pass took away, and who gives them now

    def __iter__(self) -> Iterator[Node]:
        return iter(list(self.nodes.values()))

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    def users(self, name: str) -> list[Node]:
        """Who reads a value; counts that are outputs count as well."""
        return [node for node in self.nodes.values() if name in node.reads()]

    def only_user(self, name: str) -> bool:
        """Whether a value is read once."""
        return sum(node.reads().count(name) for node in self.nodes.values()) == 1

    def origin_of(self, name: str) -> Node:
        """The node behind nodes that only pass their input on."""
        node = self.nodes[name]
        while node.op == "same":
            node = self.nodes[node.inputs[0]]
        return node

    def drop_unread(self) -> list[str]:
        """Remove what nobody reads; returns the names."""
        gone: list[str] = []
        for node in reversed(list(self.nodes.values())):
            if node.name not in self.outputs and not self.users(node.name):
                del self.nodes[node.name]
                gone.append(node.name)
        return gone

    def rate(self, node: Node) -> float:
        """Spikes per neuron and step of a layer: as the report measured, else 0.15."""
        label = node.neurons.module.label if node.neurons is not None else ""
        return self.rates.get(label, 0.15)

    def copy(self) -> Network:
        """Nodes that passes may change without changing these."""
        nodes = [
            replace(
                node, inputs=list(node.inputs), terms=list(node.terms), statics=list(node.statics)
            )
            for node in self
        ]
        copy = Network(nodes, list(self.outputs), self.rates)
        copy.aliases = dict(self.aliases)
        return copy

    def summary(self) -> list[tuple[str, str, str]]:
        """``(name, op, reads)`` of every node."""
        return [(node.name, node.op, ", ".join(node.reads())) for node in self]


def channels_first(value: Any, size: tuple[int, ...], channel_dim: int) -> bool:
    """Whether a threshold or the like is a scalar or has one value for each first dimension."""
    if not isinstance(value, Tensor) or value.dim() == 0 or value.numel() == 1:
        return True
    if value.dim() == 1:
        return channel_dim % (len(size) + 1) == 1
    return tuple(value.shape) == tuple(size)
