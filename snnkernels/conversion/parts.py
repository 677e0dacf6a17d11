"""Cut the graph in three: before the neurons, the neurons with what lies between, after them."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from .graphs import add_module, first_input, module_of, name_of
from .kinds import Kind, is_activation
from .means import FromMeans, RunningMean
from .ops import MAX_POOL_MODULES
from .pools import CumulativeMaxPool
from .spiking import CountSpikes, Repeat, SpikingActivation, TimeShape
from .steps import Clock

__all__ = ["Parts", "cut"]


@dataclass
class Parts:
    """The three graphs of a converted network.

    ``prefix(x) -> statics``; ``body(*statics, T) -> counts``; ``suffix(*statics, *rates) -> y``.
    """

    prefix: fx.GraphModule
    body: fx.GraphModule
    suffix: fx.GraphModule
    counted: list[str]  # modules of the body whose spike counts it returns, in order
    statics_of_body: list[int]  # which outputs of the prefix the body takes
    statics_of_suffix: list[int]


class _Cutter:
    def __init__(
        self,
        net: nn.Module,
        graph: fx.Graph,
        kinds: dict[fx.Node, Kind],
        cumulative: bool,
    ) -> None:
        self.net, self.kinds, self.cumulative = net, kinds, cumulative
        self.nodes = list(graph.nodes)
        self.output = self.nodes[-1]
        self._demands()

    def _demands(self) -> None:
        """What each part must compute, going backwards from the output."""
        self.in_suffix, suffix_edge = self._closure(
            self.output.all_input_nodes, stop_at_neurons=True
        )
        neurons = [n for n in suffix_edge if self.kinds[n] is Kind.TIME]
        self.counted = [n for n in self.nodes if n in set(neurons)]
        self.in_body, body_edge = self._closure(self.counted, stop_at_neurons=False)
        statics = {n for n in suffix_edge | body_edge if self.kinds[n] is Kind.STATIC}
        self.statics = [n for n in self.nodes if n in statics]
        self.of_body = [n for n in self.statics if n in body_edge]
        self.of_suffix = [n for n in self.statics if n in suffix_edge]
        self.in_prefix: set[fx.Node] = set()
        stack = list(self.statics)
        while stack:
            node = stack.pop()
            if node not in self.in_prefix:
                self.in_prefix.add(node)
                stack.extend(node.all_input_nodes)

    def _closure(
        self, start: list[fx.Node], stop_at_neurons: bool
    ) -> tuple[set[fx.Node], set[fx.Node]]:
        inside: set[fx.Node] = set()
        edge: set[fx.Node] = set()
        stack = list(start)
        while stack:
            node = stack.pop()
            if node in inside or node in edge:
                continue
            if self.kinds[node] is Kind.STATIC or (
                stop_at_neurons and is_activation(self.net, node)
            ):
                edge.add(node)
                continue
            inside.add(node)
            stack.extend(node.all_input_nodes)
        return inside, edge

    def _module(self, root: dict[str, Any], graph: fx.Graph, name: str) -> fx.GraphModule:
        for node in graph.nodes:
            if node.op == "call_module" and node.target not in root:
                root[node.target] = self.net.get_submodule(node.target)
            elif node.op == "get_attr":
                value: Any = self.net
                for part in node.target.split("."):
                    value = getattr(value, part)
                root[node.target] = value
        graph.lint()
        return fx.GraphModule(root, graph, class_name=name)

    def prefix(self) -> fx.GraphModule:
        """What is computed once, before the first neuron."""
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        for node in self.nodes:
            if node in self.in_prefix or node.op == "placeholder":
                env[node] = graph.node_copy(node, lambda n: env[n])
        graph.output(tuple(env[n] for n in self.statics))
        return self._module({}, graph, "Prefix")

    def suffix(self) -> fx.GraphModule:
        """What runs once on rates, after the last neurons."""
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        for node in (*self.of_suffix, *self.counted):
            env[node] = graph.placeholder(f"in_{node.name}")
        for node in self.nodes:
            if node in self.in_suffix:
                env[node] = graph.node_copy(node, lambda n: env[n])
        graph.output(fx.node.map_arg(self.output.args[0], lambda n: env[n]))
        return self._module({}, graph, "Suffix")

    def body(self, neurons: dict[str, SpikingActivation]) -> fx.GraphModule:
        """The neurons and what lies between them, T steps at a time."""
        return _Body(self, neurons).build()


class _Body:
    def __init__(self, cutter: _Cutter, neurons: dict[str, SpikingActivation]) -> None:
        self.cut, self.neurons = cutter, neurons
        self.clock = next((n.clock for n in neurons.values()), Clock())
        self.kinds, self.net = cutter.kinds, cutter.net
        self.graph = fx.Graph()
        self.raw = {n: self.graph.placeholder(f"in_{n.name}") for n in cutter.of_body}
        self.steps = self.graph.placeholder("T")
        self.env: dict[fx.Node, fx.Node] = {}
        self.repeated: dict[fx.Node, fx.Node] = {}
        self.means: dict[fx.Node, fx.Node] = {}  # nodes by their running means
        self.root: dict[str, Any] = {}

    def build(self) -> fx.GraphModule:
        for node in self.cut.nodes:
            if node not in self.cut.in_body:
                continue
            if node.meta.get("on_means") and self.kinds[node] is Kind.TIME:
                self.means[node] = self.graph.node_copy(node, self._mean)
            else:
                self.env[node] = self._copy(node)
        counts = []
        for node in self.cut.counted:
            out = self.env[node]
            layer = self.neurons[str(node.target)]
            if not layer.counts or layer.clock.steps.whole:
                out = self._helper(CountSpikes(layer), "count_spikes", out)
            counts.append(out)
        self.graph.output(tuple(counts))
        return self.cut._module(self.root, self.graph, "Body")

    def _helper(self, module: nn.Module, path: str, value: fx.Node) -> fx.Node:
        """Call a module that takes (value, T) and does not exist in the ANN."""
        while path in self.root or hasattr(self.net, path.split(".")[0]):
            path = f"{path}_"
        self.root[path] = module
        return self.graph.call_module(path, (value, self.steps))

    def _timed(self, node: fx.Node) -> fx.Node:
        """``node`` with a value for every step."""
        if self.kinds[node] is not Kind.STATIC:
            if node not in self.env:  # known by its running means
                layer = FromMeans(self.clock, name_of(node))
                self.env[node] = self._helper(layer, "from_means", self.means[node])
            return self.env[node]
        if node not in self.repeated:
            self.repeated[node] = self._helper(Repeat(), "repeat", self.raw[node])
        return self.repeated[node]

    def _mean(self, node: fx.Node) -> fx.Node:
        """``node`` as an operation on running means takes it."""
        if self.kinds[node] is not Kind.TIME:
            return self._timed(node)  # the mean of what is constant in time is itself
        if node not in self.means:
            layer = RunningMean(self.clock)
            self.means[node] = self._helper(layer, "running_mean", self._timed(node))
        return self.means[node]

    def _copy(self, node: fx.Node) -> fx.Node:
        if is_activation(self.net, node):
            path, source = str(node.target), node.args[0]
            assert isinstance(source, fx.Node)
            self.root[path] = self.neurons[path]
            current = self.raw[source] if self.neurons[path].constant else self._timed(source)
            return self.graph.call_module(path, (current, self.steps))
        if self.kinds[node] is Kind.META:
            return self._shape(node)
        if (
            self.cut.cumulative
            and self.kinds[node] is Kind.TIME
            and isinstance(pool := module_of(self.net, node), MAX_POOL_MODULES)
        ):
            source = first_input(node)
            assert isinstance(source, fx.Node)
            path = str(node.target)
            while path in self.root:  # one running sum for each call
                path = add_module(self.net, path, pool)
            self.root[path] = CumulativeMaxPool(pool, self.clock)
            return self.graph.call_module(path, (self._timed(source), self.steps))
        return self.graph.node_copy(node, self._timed)

    def _shape(self, node: fx.Node) -> fx.Node:
        """A shape, as the operations on ``[T * B, ...]`` must see it."""
        of = node.args[0] if node.args else None
        static = isinstance(of, fx.Node) and self.kinds[of] is Kind.STATIC
        if not static or not isinstance(of, fx.Node):
            return self.graph.node_copy(node, self._timed)
        raw = self.raw[of]
        if node.target == "size" or (node.target is getattr and node.args[1] == "shape"):
            shape = self._helper(TimeShape(), "time_shape", raw)
            dim = node.args[1] if node.target == "size" and node.args[1:] else None
            dim = node.kwargs.get("dim", dim)
            if dim is None:
                return shape
            return self.graph.call_function(operator.getitem, (shape, dim))
        copy = self.graph.node_copy(node, lambda n: self.raw[n] if n is of else self._timed(n))
        if node.target == "numel":
            return self.graph.call_function(operator.mul, (copy, self.steps))
        return copy


def cut(
    net: nn.Module,
    graph: fx.Graph,
    kinds: dict[fx.Node, Kind],
    neurons: dict[str, SpikingActivation],
    *,
    cumulative: bool,
) -> Parts:
    """Build the three graphs; sets ``constant`` and ``counts`` of every neuron used.

    What lies behind the last neurons is copied back to the neurons it hangs on: an affine layer
    that also feeds later neurons runs in the body on spikes and once more on rates behind it.
    """
    cutter = _Cutter(net, graph, kinds, cumulative)
    counted = set(cutter.counted)
    for node in cutter.nodes:
        if node not in cutter.in_body or not is_activation(net, node):
            continue
        neuron = neurons[str(node.target)]
        source = node.args[0]
        neuron.constant = isinstance(source, fx.Node) and kinds[source] is Kind.STATIC
        inside = any(user in cutter.in_body for user in node.users)
        neuron.counts = node in counted and not inside
    return Parts(
        prefix=cutter.prefix(),
        body=cutter.body(neurons),
        suffix=cutter.suffix(),
        counted=[str(n.target) for n in cutter.counted],
        statics_of_body=[cutter.statics.index(n) for n in cutter.of_body],
        statics_of_suffix=[cutter.statics.index(n) for n in cutter.of_suffix],
    )
