"""A chain of layers that come to spike one after another (PTL, Wu et al., TPAMI 2021)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..functional import if_run
from .errors import ConversionError
from .graphs import name_of
from .kinds import is_activation
from .marks import mark
from .ops import why_not_affine
from .trace import trace

__all__ = ["PTLNetwork", "hybrid_spikes"]


def hybrid_spikes(currents: Tensor, threshold: Tensor | float) -> tuple[Tensor, Tensor]:
    """Binary spikes ``[T, B, *]`` and their counts ``[B, *]`` of currents from membranes at 0.

    The authors subtract the threshold at the step after a spike; the spikes are those of reset by
    subtraction, and no gradient goes through them.
    """
    run = if_run(currents.detach(), v_threshold=threshold, outputs=("spikes", "count"))
    assert run.spikes is not None
    count: Tensor = run.count  # type: ignore[assignment]
    return run.spikes, count.to(currents.dtype)


class PTLNetwork(nn.Module):
    """A chain of layers of which the first ``placed`` spike and the others are still an ANN.

    A spiking layer takes the spikes and the counts of the one before: spikes make its own spikes
    (currents ``A(s_t) - A(0) + A(0) / T`` of its affine part A: the constant terms are spread over
    T), counts its gradient, that of the ANN's activation of ``A(count)``. The first takes the image
    at the first step. Batch norms of spiking layers stay at their running statistics.

    Args:
        ann: a chain of affine operations and ReLU; copied. Max-pools between activations cannot be.
        T: number of steps.
        scaled: spikes weigh the threshold instead of 1, so that the layers behind need not be
            trained for counts; not in the paper.

    Attributes:
        placed: how many layers spike.
        thresholds: ``[layers]``, those of the layers placed; 0 elsewhere.
        history: what :func:`snnkernels.conversion.ptl.ptl_train` did, a dictionary for each epoch.

    Shape: the input and the output of the ANN.

    Raises:
        ConversionError: the network is no such chain; names the operation.
    """

    thresholds: Tensor

    def __init__(self, ann: nn.Module, T: int, scaled: bool = False) -> None:
        super().__init__()
        if isinstance(T, bool) or not isinstance(T, int) or T < 1:
            raise ValueError(f"T={T!r} must be a whole number of at least 1")
        self.T, self.scaled, self.placed = T, scaled, 0
        self.segments, self.activations, self.tail = nn.ModuleList(), nn.ModuleList(), nn.Module()
        self.history: list[dict[str, Any]] = []
        self._cut(ann)
        like = next(p for p in self.parameters() if p.is_floating_point())
        self.register_buffer("thresholds", like.detach().new_zeros(len(self.segments)))

    def _cut(self, ann: nn.Module) -> None:
        traced = trace(ann)
        net, graph = traced.net, traced.graph
        mark(net, graph)
        nodes = [n for n in graph.nodes if n.op != "output"]
        last = max(i for i, n in enumerate(nodes) if is_activation(net, n))
        part: list[fx.Node] = []
        for i, node in enumerate(nodes):
            if node.op == "placeholder":
                continue
            if node.all_input_nodes != [nodes[i - 1]] or len(nodes[i - 1].users) != 1:
                raise ConversionError(
                    f"{name_of(node)}: progressive tandem learning takes a chain of layers, each "
                    "reading the one before and no other; this network branches here. Write "
                    "flatten(1) for view(x.size(0), -1); for shortcuts use another method"
                )
            if is_activation(net, node):
                self.segments.append(_chain(net, part))
                self.activations.append(copy.deepcopy(net.get_submodule(str(node.target))))
                part = []
                continue
            reason = why_not_affine(node, net, set(nodes)) if i < last else None
            if reason is not None:
                raise ConversionError(
                    f"{name_of(node)} cannot spike: {reason}. Use strides or average pools"
                )
            part.append(node)
        self.tail = _chain(net, part)

    def train(self, mode: bool = True) -> PTLNetwork:
        """As usual; layers that spike stay in evaluation mode."""
        super().train(mode)
        for segment in self.segments[: self.placed]:
            segment.eval()
        return self

    def get_extra_state(self) -> int:
        """How many layers spike, for the state dict."""
        return self.placed

    def set_extra_state(self, state: int) -> None:
        """As many layers spike."""
        self.placed = int(state)
        self.train(self.training)

    def place(self, threshold: Tensor | float) -> None:
        """Let the next layer spike at ``threshold``.

        Raises:
            ValueError: all layers spike already, or the threshold is not positive and finite.
        """
        value = float(threshold)
        if self.placed == len(self.segments):
            raise ValueError(f"all {self.placed} layers spike already")
        if not 0 < value < float("inf"):
            raise ValueError(f"threshold={value} must be positive and finite: the layer is silent")
        self.thresholds[self.placed] = value
        self.placed += 1
        self.train(self.training)

    def freeze(self, layers: int) -> None:
        """No gradients for the first ``layers`` layers."""
        for part in (*self.segments[:layers], *self.activations[:layers]):
            part.requires_grad_(False)

    def _currents(self, segment: nn.Module, spikes: Tensor | None, count: Tensor) -> Tensor:
        silent = segment(torch.zeros_like(count[:1]))
        share = silent / self.T
        if spikes is None:  # the image, at the first step
            whole = segment(count)
            currents = share.expand(self.T, *whole.shape).clone()
            currents[0] = (whole - silent) + share
            return currents
        rows = segment(spikes.flatten(0, 1))
        return rows.unflatten(0, (self.T, -1)) - silent + share

    def _hybrid(self, i: int, spikes: Tensor | None, count: Tensor) -> tuple[Tensor, Tensor]:
        segment, weight = self.segments[i], self.thresholds[i]
        with torch.no_grad():
            spikes, value = hybrid_spikes(self._currents(segment, spikes, count), weight)
            if self.scaled:
                spikes, value = spikes * weight, value * weight
        learning = count.requires_grad or any(p.requires_grad for p in segment.parameters())
        if torch.is_grad_enabled() and learning:
            twin = self.activations[i](segment(count))
            value = value + (twin - twin.detach())
        return spikes, value

    def values(self, x: Tensor) -> Iterator[Tensor]:
        """What each layer hands on, in order: counts ``[B, *]``, activations of the ANN."""
        spikes = None
        for i, segment in enumerate(self.segments):
            if i < self.placed:
                spikes, x = self._hybrid(i, spikes, x)
            else:
                x = self.activations[i](segment(x))
            yield x

    def forward(self, x: Tensor) -> Any:
        """The answer for ``[B, *]``."""
        for value in self.values(x):
            x = value
        return self.tail(x)

    @torch.no_grad()
    def estimate(self, x: Tensor, percentile: float = 99.9) -> list[float]:
        """Thresholds that a batch suggests: the percentile of every activation, over T.

        For layers placed already, their own.
        """
        training = self.training
        self.eval()
        found = []
        for i, value in enumerate(self.values(x)):
            if i < self.placed:
                found.append(float(self.thresholds[i]))
                continue
            flat = value.detach().flatten().double()
            rank = max(1, -(-len(flat) * percentile // 100))
            found.append(float(flat.kthvalue(int(rank)).values) / self.T)
        self.train(training)
        return found


def _chain(net: nn.Module, nodes: list[fx.Node]) -> fx.GraphModule:
    """A module of its own that computes ``nodes``, one after another."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    last = graph.placeholder("x")
    root: dict[str, Any] = {}
    for node in nodes:
        env[node.all_input_nodes[0]] = last
        last = graph.node_copy(node, lambda n: env[n])
        if node.op == "call_module":
            root[str(node.target)] = copy.deepcopy(net.get_submodule(str(node.target)))
    graph.output(last)
    return fx.GraphModule(root, graph)
