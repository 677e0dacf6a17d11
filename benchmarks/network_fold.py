"""A converted network whose neurons fire at 1 and emit 1: what SpikingJelly's ``IFNode`` can run.

Thresholds go into the weights around the neurons. The library's own ``normalize="weights"`` stops
at a shortcut between layers of different thresholds; here such an edge gets one multiplication,
which is the least that a rival without thresholds per channel has to do.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable

import torch
from networks import STEPS, Subject
from torch import Tensor, fx, nn

from snnkernels import IFNode, convert
from snnkernels.conversion.network import ConvertedNetwork
from snnkernels.conversion.pools import CumulativeMaxPool
from snnkernels.conversion.spiking import SpikingActivation, per_channel_view, split_time

Neurons = Callable[[Tensor], Tensor]  # currents [T, B, *] to spikes, from half the threshold 1
_POOLS = (nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.MaxPool2d, nn.Identity, nn.Flatten)


class _Scale(nn.Module):
    scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return x * per_channel_view(self.scale, 1, x.dim())


class Binary(SpikingActivation):
    """Neurons of threshold 1, half of it at the start, whose spikes are 0 and 1."""

    def __init__(self, layer: SpikingActivation, neurons: Neurons) -> None:
        theta = torch.as_tensor(layer.node.threshold).detach()
        super().__init__(
            layer.node, layer.label, constant=layer.constant, counts=layer.counts,
            scale=theta, channel_dim=layer.channel_dim, clock=layer.clock,
        )  # fmt: skip
        self.theta, self.neurons = theta, neurons

    def forward(self, x: Tensor, T: int) -> Tensor:
        """Run T steps; a constant current is divided by the threshold here, once."""
        if self.constant:
            x = x / per_channel_view(self.theta, self.channel_dim, x.dim())
            x = x.expand(T, *x.shape)
        else:
            x = split_time(x, T)
        spikes = self.neurons(x)
        return spikes.sum(0) if self.counts else spikes.flatten(0, 1)


def ours() -> Neurons:
    """The library's own neurons, to compare with."""
    node = IFNode(1.0, v_init=0.5)

    def run(x: Tensor) -> Tensor:
        node.reset()
        return node(x)

    return run


def binary(subject: Subject, neurons: Callable[[], Neurons]) -> ConvertedNetwork:
    """The network with max-pools of each step's currents and neurons of threshold 1."""
    snn = subject.snn
    if any(isinstance(m, CumulativeMaxPool) for m in snn.body.modules()):
        thresholds = {label: layer.node.threshold for label, layer in snn.neurons()}
        snn = convert(
            subject.ann, subject.calibration[:2], T=STEPS, threshold=thresholds,
            maxpool="pre_spike", progress=False,
        )  # fmt: skip
    snn = copy.deepcopy(snn)
    body = snn.body
    layers = {
        node: body.get_submodule(str(node.target))
        for node in body.graph.nodes
        if node.op == "call_module"
    }
    thetas = {
        node: torch.as_tensor(layer.node.threshold).detach()
        for node, layer in layers.items()
        if isinstance(layer, SpikingActivation)
    }
    for node, theta in thetas.items():
        if not layers[node].constant:
            _before(body, layers, thetas, node, 1 / theta)
        for user in list(node.users):
            _behind(layers, user, node, theta)
    for node in thetas:
        body.set_submodule(str(node.target), Binary(layers[node], neurons()))
    body.recompile()
    return snn


def _before(body: fx.GraphModule, layers: dict, thetas: dict, user: fx.Node, scale: Tensor) -> None:
    """Multiply what a node reads."""
    source = user.args[0]
    assert isinstance(source, fx.Node)
    _scaled(body, layers, thetas, source, user, scale)


def _scaled(
    body: fx.GraphModule, layers: dict, thetas: dict, source: fx.Node, user: fx.Node, scale: Tensor
) -> None:
    """Multiply a value for one of its users: in weights where it is a map's, else on the way."""
    layer = layers.get(source)
    if len(source.users) == 1 and isinstance(layer, (nn.Conv2d, nn.Linear)):
        _times(layer, scale, out=True)
    elif len(source.users) == 1 and isinstance(layer, _POOLS):
        _before(body, layers, thetas, source, scale)
    elif len(source.users) == 1 and source.target in (operator.add, operator.iadd, torch.add):
        for part in list(source.all_input_nodes):
            _scaled(body, layers, thetas, part, source, scale)
    else:
        # Spikes on a shortcut: what they weigh comes with it.
        scale = scale * thetas[source] if source in thetas else scale
        path = f"scale_of_{source.name}_for_{user.name}"
        body.add_submodule(path, _Scale(scale))
        with body.graph.inserting_before(user):
            new = body.graph.call_module(path, (source,))
        user.replace_input_with(source, new)


def _behind(layers: dict, user: fx.Node, source: fx.Node, theta: Tensor) -> None:
    """Spikes weigh 1: what they weighed goes into the maps that read them."""
    layer = layers.get(user)
    if isinstance(layer, (nn.Conv2d, nn.Linear)):
        _times(layer, theta, out=False)
    elif isinstance(layer, _POOLS):
        for other in user.users:
            _behind(layers, other, user, theta)


def _times(layer: nn.Module, scale: Tensor, *, out: bool) -> None:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if scale.numel() > 1 and not out and getattr(layer, "groups", 1) > 1:
        raise NotImplementedError("thresholds per channel before a grouped convolution")
    weight.data.mul_(per_channel_view(scale, 0 if out else 1, weight.dim()))
    if out and layer.bias is not None:
        assert isinstance(layer.bias, Tensor)
        layer.bias.data.mul_(scale)
