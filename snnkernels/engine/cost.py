"""What a layer costs, in multiply-adds and in seconds of one core, by a model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..kernels.spike_maps import PANEL
from .network import Network, Node, Term

__all__ = ["Cost", "choose_convolution", "cost_of"]

# Per second and core, of the machine the model was fitted to (benchmarks/results/engine_cost.csv);
# only their ratios choose. Rows of 64 weights added; lists begun; dense multiply-adds; bytes that
# dense layers and neurons move.
ADDS = 0.85e9
LISTS = 120e6
DENSE = 60e9
BYTES = 6e9
CONVERT = 0.4e9  # bits packed or unpacked, those of padded channels included


@dataclass(frozen=True)
class Cost:
    """Of one image and step.

    Attributes:
        dense_macs: multiply-adds of the dense layers.
        synaptic: additions of weights where there are spikes, at the layer's measured rates.
        packed, dense: seconds of one core, on packed spikes and as a dense convolution with
            neurons behind.
    """

    dense_macs: float
    synaptic: float
    packed: float
    dense: float


def _positions(node: Node) -> int:
    """Positions of the sum of a layer's terms."""
    return math.prod(node.size[1:]) * node.side * node.side


def _of_term(net: Network, node: Node, term: Term) -> tuple[float, float, float]:
    """Dense multiply-adds, weights added, rows of 64 weights added."""
    source = net.origin_of(term.source)
    positions, out = _positions(node), term.weight.shape[0]
    taps = math.prod(term.weight.shape[2:])
    macs = positions * out * term.weight.shape[1] * taps
    rate = min(1.0, net.rate(source) * (1 if term.either else math.prod(term.pool)))
    if not term.either:
        rate = net.rate(source) * math.prod(term.pool)
    if term.groups == out and term.weight.shape[1] == 1:
        return macs, macs * rate, positions * taps * -(-out // PANEL) * min(1.0, rate * PANEL)
    per_panel = term.weight.shape[1] * max(1, min(PANEL * term.groups // out, term.groups))
    return macs, macs * rate, positions * taps * per_panel * rate * -(-out // PANEL)


def _bits(size: tuple[int, ...]) -> float:
    """Bits of a packed map and step."""
    return math.prod(size[1:]) * -(-size[0] // PANEL) * PANEL


def cost_of(net: Network, node: Node) -> Cost:
    """What a layer costs; needs its terms.

    A dense layer among packed ones unpacks what it reads and has its spikes packed again.
    """
    macs = synaptic = rows = lists = 0.0
    converted = _bits(node.size)
    neurons = math.prod(node.size)
    moved = 12.0 * neurons
    for term in node.terms:
        m, s, r = _of_term(net, node, term)
        macs, synaptic, rows = macs + m, synaptic + s, rows + r
        taps = math.prod(term.weight.shape[2:]) * -(-node.size[0] // PANEL)
        # Few channels: a list for a row of outputs, and about as much for each output as two.
        few = node.size[0] <= PANEL // 2 and node.side == 1
        lists += _positions(node) * (min(2, taps) if few else taps)
        source = net.origin_of(term.source)
        moved += 8.0 * math.prod(source.size)
        converted += _bits(source.size)
    packed = rows / ADDS + lists / LISTS + neurons / 10e9
    dense = macs / DENSE + moved / BYTES + converted / CONVERT
    return Cost(macs, synaptic, packed, dense)


def choose_convolution(net: Network) -> list[str]:
    """Layers that a dense convolution runs faster stay as the converted network has them."""
    done = []
    for node in net:
        if node.op != "layer" or not node.terms:
            continue
        cost = cost_of(net, node)
        if cost.dense < cost.packed:
            node.op = "dense"
            node.why = "a dense convolution is expected to be faster"
            done.append(f"{node.name}: dense, {cost.packed / cost.dense:.1f} times faster")
    return done
