"""Layers of networks whose input or biases act at one step only, and what their methods check."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from .errors import ConversionError
from .graphs import module_of
from .network import ConvertedNetwork
from .ops import MAX_POOL_MODULES
from .pools import CumulativeMaxPool
from .spiking import SpikingActivation, split_time

__all__ = ["ImpulseActivation", "for_inference", "neuron_depth", "refuse_pools", "take_turns"]


class ImpulseActivation(SpikingActivation):
    """Neurons of a network whose input and biases act at one step (``Steps.bias``).

    The first row is silent (:meth:`Clock.currents <snnkernels.conversion.steps.Clock.currents>`):
    neither the input nor a spike is in it. What the neurons count is the answer, not divided by T.
    """

    def currents(self, x: Tensor, T: int) -> Tensor:
        """The currents ``[T - 1, B, *]`` meant by a constant one ``[B, *]``, or by T rows."""
        if not self.constant:
            return self.clock.currents(split_time(x, T))
        rows = x.new_zeros(T - 1, *x.shape)
        rows[-1 if self.clock.steps.bias == "last" else 0] = x
        return rows

    def fire(self, currents: Tensor) -> Tensor:
        """Spikes ``[T, B, *]`` of currents of that shape."""
        return self.node(currents)

    def forward(self, x: Tensor, T: int) -> Tensor:
        """Run on a current ``[B, *]``, shown once, or ``[T * B, *]``, the first row silent."""
        self._check_channels(x.shape)
        spikes = self.fire(self.currents(x, T))
        return torch.cat([torch.zeros_like(spikes[:1]), spikes]).flatten(0, 1)

    def rate(self, count: Tensor, T: int, dtype: torch.dtype) -> Tensor:
        """What the spikes say together: ``scale * count``."""
        return super().rate(count, 1, dtype)


def neuron_depth(body: fx.GraphModule) -> int:
    """How many neurons the longest path through a converted network's body has."""
    depth: dict[fx.Node, int] = {}
    for node in body.graph.nodes:
        own = isinstance(module_of(body, node), SpikingActivation)
        depth[node] = own + max((depth[n] for n in node.all_input_nodes), default=0)
    return max(depth.values(), default=0)


def take_turns(snn: ConvertedNetwork, windows: int) -> None:
    """Count ``windows`` further windows of T steps in the latency: layers wait for each other."""
    for _, layer in snn.neurons():  # they share one clock
        layer.clock.steps = replace(layer.clock.steps, windows=windows)


def for_inference(method: str, x: Tensor, instead: str = "") -> None:
    """Raise ValueError where a gradient is asked of spikes that have none."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(f"spikes of {method} are for inference: use torch.no_grad(){instead}")


def refuse_pools(snn: ConvertedNetwork, method: str, cumulative: bool = False) -> None:
    """Raise if a max-pool acts on the currents of single steps (or, on request, on running sums).

    Raises:
        ConversionError: names the pool and the way out.
    """
    refused = (*MAX_POOL_MODULES, *([CumulativeMaxPool] if cumulative else []))
    out = "maxpool='avg'" if cumulative else "maxpool='cumulative' or 'avg'"
    for node in snn.body.graph.nodes:
        if isinstance(module_of(snn.body, node), refused):
            raise ConversionError(
                f"{node.target}: method={method!r} cannot max-pool the currents of single steps, "
                f"which are not what the activations are made of; pass {out}"
            )
