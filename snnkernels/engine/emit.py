"""From the nodes that the passes left to a graph that runs."""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx, nn

from ..conversion.network import ConvertedNetwork
from ..conversion.spiking import SpikingActivation
from .layers import CountAt, Dense, Pack, Run, SpikingLayer
from .map_layers import FromMap, MapLayer, ToMap
from .network import Network, Node

__all__ = ["Form", "Maps", "Packed", "emit"]


class Form(Protocol):
    """What the layers of a plan are, and the ways between their spikes and dense tensors."""

    def layer(self, net: Network, node: Node, counted: bool) -> Any:
        """A module with ``sources``: names of the values whose spikes it is called with."""

    def pack(self) -> nn.Module:
        """From spikes ``[T * B, *size]``."""

    def dense(self, node: Node) -> nn.Module:
        """To those, each of its weight."""


@dataclass(frozen=True)
class Packed:
    """Words of 64 channels, for CPUs."""

    run: Run
    int16: bool

    def layer(self, net: Network, node: Node, counted: bool) -> Any:
        """As :meth:`Form.layer`."""
        return SpikingLayer(net, node, self.run, self.int16, counted)

    def pack(self) -> nn.Module:
        """As :meth:`Form.pack`."""
        return Pack(self.run)

    def dense(self, node: Node) -> nn.Module:
        """As :meth:`Form.dense`."""
        return Dense(node)


@dataclass(frozen=True)
class Maps:
    """uint8 with channels innermost, for GPUs."""

    run: Run
    precision: str
    device: torch.device
    fuse: bool

    def layer(self, net: Network, node: Node, counted: bool) -> Any:
        """As :meth:`Form.layer`."""
        return MapLayer(net, node, self.run, self.precision, counted, self.device, self.fuse)

    def pack(self) -> nn.Module:
        """As :meth:`Form.pack`."""
        return ToMap(self.run)

    def dense(self, node: Node) -> nn.Module:
        """As :meth:`Form.dense`."""
        return FromMap(node, self.device)


def emit(snn: ConvertedNetwork, net: Network, run: Run, form: Form) -> fx.GraphModule:
    """``body(*statics, T) -> counts [times, B, *]``, of layers and of what stayed as it was."""
    return _Emitter(snn, net, run, form).build()


class _Emitter:
    def __init__(self, snn: ConvertedNetwork, net: Network, run: Run, form: Form) -> None:
        self.snn, self.net, self.run, self.form = snn, net, run, form
        self.graph = fx.Graph()
        self.root: dict[str, Any] = {}
        self.of: dict[str, fx.Node] = {n.name: n for n in snn.body.graph.nodes}
        self.given: dict[str, fx.Node] = {}
        self.calls: dict[str, fx.Node] = {}  # layers
        self.packed: dict[str, fx.Node] = {}
        self.dense: dict[str, fx.Node] = {}

    def build(self) -> fx.GraphModule:
        for node in self.snn.body.graph.nodes:
            if node.op == "placeholder":
                self.given[node.name] = self.graph.placeholder(node.name)
        self.dense.update(self.given)
        self.graph.output(tuple(self._count(name) for name in self.net.outputs))
        self.graph.lint()
        return fx.GraphModule(self.root, self.graph, class_name="Plan")

    def _add(self, path: str, module: nn.Module, *args: Any) -> fx.Node:
        path = path.replace(".", "_")
        while path in self.root:
            path = f"{path}_"
        self.root[path] = module
        return self.graph.call_module(path, args)

    def _count(self, name: str) -> fx.Node:
        source = self.net.origin_of(self.net[name].inputs[0])
        if source.op == "layer":
            return self.graph.call_function(operator.getitem, (self._layer(source), 1))
        assert source.neurons is not None
        counter = CountAt(source.neurons.module, self.run)
        return self._add(f"{source.name}_count", counter, self._dense(source.name))

    def _counted(self, name: str) -> bool:
        return any(user.op == "count" for user in self.net.users(name))

    def _layer(self, node: Node) -> fx.Node:
        if node.name not in self.calls:
            counted = self._counted(node.name)
            layer = self.form.layer(self.net, node, counted)
            sources = [self._packed(name) for name in layer.sources]
            statics = [self._dense(name) for name in node.statics]
            self.calls[node.name] = self._add(node.name, layer, *sources, *statics)
        return self.calls[node.name]

    def _packed(self, name: str) -> fx.Node:
        """The spikes of a value as layers read them."""
        node = self.net.origin_of(name)
        if node.name not in self.packed:
            if node.op == "layer":
                packed = self.graph.call_function(operator.getitem, (self._layer(node), 0))
            else:
                packed = self._add(f"{node.name}_pack", self.form.pack(), self._dense(node.name))
            self.packed[node.name] = packed
        return self.packed[node.name]

    def _dense(self, name: str) -> fx.Node:
        """A value as the converted network has it."""
        if name in self.dense:
            return self.dense[name]
        other = self.net.nodes.get(self.net.aliases.get(name, name))
        if other is not None and other.op == "layer":
            name = other.name  # neurons that stayed as they were do not have the scale behind them
        if name in self.dense:
            return self.dense[name]
        node = self.net.nodes.get(name)
        if node is not None and node.op == "layer":
            made = self._add(f"{name}_dense", self.form.dense(node), self._packed(name))
        elif node is not None and node.op == "static":
            made = self.given[name]
        else:
            made = self._as_it_was(self.of[name])
        self.dense[name] = made
        return made

    def _as_it_was(self, origin: fx.Node) -> fx.Node:
        arguments = {n: self._dense(n.name) for n in origin.all_input_nodes}
        made = self.graph.node_copy(origin, lambda n: arguments[n])
        if origin.op == "call_module":
            module = self.snn.body.get_submodule(str(origin.target))
            if isinstance(module, SpikingActivation) and module.counts:
                # Its spikes are counted at several times: a copy that gives them, on the same
                # neurons.
                module = copy.copy(module)
                module.counts = False
            path = origin.name
            while path in self.root:
                path = f"{path}_"
            self.root[path] = module
            made.target = path
        elif origin.op == "get_attr":
            value: Any = self.snn.body
            for part in str(origin.target).split("."):
                value = getattr(value, part)
            self.root[origin.name] = value
            made.target = origin.name
        return made
