"""Thresholds folded into weights: the same network with every threshold 1.

Dividing a layer's neuron equation by its θ gives a neuron with threshold 1, weights
``W θ_before / θ`` and bias ``b / θ`` (Bu et al., AAAI 2022: threshold scaling and weight
normalisation are the same). Every value between neurons is then carried in units of a scale:
``u / s`` with s per channel. Neurons emit in units of their θ; layers with weights take any scale
and deliver any; what has no weights hands its input's scale on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .errors import ConversionError
from .fold import ChannelAffine, scale_outputs, with_weights
from .graphs import add_module
from .kinds import Kind, is_activation
from .ops import MAX_POOL_MODULES, SUMS

__all__ = ["fold_thresholds"]

HANDS_ON_MODULES = (
    *MAX_POOL_MODULES,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.Flatten,
    nn.Upsample,
    nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd,
)
HANDS_ON = {
    *(f"avg_pool{n}d" for n in "123"),
    *(f"adaptive_avg_pool{n}d" for n in "123"),
    *("mean", "sum", "interpolate", "contiguous", "flatten", "view", "reshape", "neg"),
}
# Of these, scales per channel survive only into a linear layer, which knows the repetition.
RESHAPES = {"flatten", "view", "reshape", "Flatten"}
ADVICE = "Use normalize='threshold', which is the same network"


class _Folder:
    def __init__(
        self, net: nn.Module, graph: fx.Graph, kinds: dict[fx.Node, Kind], theta: dict[str, Tensor]
    ) -> None:
        self.net, self.graph, self.kinds = net, graph, kinds
        self.theta = {p: t.detach().double().cpu() for p, t in theta.items()}
        self.twin: dict[fx.Node, fx.Node] = {}  # any scaled form of a node: the shape is the same
        self.made: dict[tuple[fx.Node, str], fx.Node] = {}

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if is_activation(self.net, node):
                source = node.args[0]
                assert isinstance(source, fx.Node)
                with self.graph.inserting_before(node):
                    node.args = (self.deliver(source, self.theta[str(node.target)], node),)

    def fail(self, node: fx.Node, why: str) -> ConversionError:
        name = str(node.target) if node.op == "call_module" else node.name
        return ConversionError(f"normalize='weights' cannot pass {name}: {why}. {ADVICE}")

    def refuse_numbers(self, node: fx.Node) -> None:
        """Only tensors can be summed here: a number has no weights to scale."""
        if not all(isinstance(a, (fx.Node, list, tuple)) for a in node.args[:2]) and str(
            getattr(node.target, "__name__", node.target)
        ) in SUMS - {"neg"}:
            raise self.fail(node, "it adds a number, which has no weights to scale")

    def layer(self, node: fx.Node) -> nn.Module | None:
        """The module of ``node`` if it has weights that absorb a scale."""
        if node.op != "call_module":
            return None
        module = self.net.get_submodule(str(node.target))
        return module if isinstance(module, (_ConvNd, nn.Linear, ChannelAffine)) else None

    def operation(self, node: fx.Node) -> str | None:
        """The name of an operation that hands scales on, or None."""
        if node.op == "call_module":
            module = self.net.get_submodule(str(node.target))
            return type(module).__name__ if isinstance(module, HANDS_ON_MODULES) else None
        name = str(getattr(node.target, "__name__", node.target))
        return name if name in HANDS_ON else None

    def copy(self, node: fx.Node, replaced: dict[fx.Node, fx.Node]) -> fx.Node:
        """A copy of ``node`` on replaced inputs; shapes are read off scaled twins."""

        def pick(n: fx.Node) -> fx.Node:
            if n in replaced:
                return replaced[n]
            if self.kinds[n] is Kind.META and any(i in self.twin for i in n.all_input_nodes):
                return self.graph.node_copy(n, lambda i: self.twin.get(i, i))
            return n

        new = self.graph.node_copy(node, pick)
        self.twin[node] = new
        self.kinds[new] = self.kinds[node]
        return new

    def supply(self, node: fx.Node, reader: fx.Node) -> tuple[fx.Node, Tensor]:
        """``node`` in whatever scale comes naturally, and that scale (scalar or ``[C]``)."""
        if is_activation(self.net, node):
            return node, self.theta[str(node.target)]
        if self.layer(node) is not None or node.op in ("placeholder", "get_attr"):
            return self.deliver(node, torch.ones((), dtype=torch.float64), reader), torch.ones(
                (), dtype=torch.float64
            )
        if self.operation(node) is not None:
            source = node.all_input_nodes[0]
            new, scale = self.supply(source, node)
            return self.copy(node, {source: new}), scale
        name = str(getattr(node.target, "__name__", node.target))
        tensors = [n for n in node.all_input_nodes if self.kinds[n] is not Kind.META]
        if name in SUMS or name in ("cat", "concat", "concatenate"):
            self.refuse_numbers(node)
            supplied = {n: self.supply(n, node) for n in tensors}
            scales = [s for _, s in supplied.values()]
            replaced = {n: new for n, (new, _) in supplied.items()}
            if all(torch.equal(s, scales[0]) and s.dim() == 0 for s in scales) or (
                name in SUMS and all(torch.equal(s, scales[0]) for s in scales)
            ):
                return self.copy(node, replaced), scales[0]
            if name in SUMS:
                raise self.fail(node, "its summands come in units of different thresholds")
            sizes = [_channels(n) for n in tensors]
            if None in sizes:
                raise self.fail(
                    node,
                    "the channels of its parts are not known; pass loader= (one batch will do)",
                )
            whole = torch.cat([s.expand(c) for s, c in zip(scales, sizes, strict=True)])  # type: ignore
            return self.copy(node, replaced), whole
        raise self.fail(node, "it has no weights that could take a threshold")

    def deliver(self, node: fx.Node, scale: Tensor, reader: fx.Node) -> fx.Node:
        """A node that computes ``node / scale``."""
        key = (node, str(scale.tolist()))
        if key not in self.made:
            self.made[key] = self._deliver(node, scale, reader)
        return self.made[key]

    def _deliver(self, node: fx.Node, scale: Tensor, reader: fx.Node) -> fx.Node:
        layer = self.layer(node)
        if layer is not None:
            source = node.args[0] if node.args else node.kwargs["input"]
            assert isinstance(source, fx.Node)
            new_source, incoming = self.supply(source, node)
            path = add_module(
                self.net, f"{node.target}_scaled", self._rescaled(node, layer, incoming, scale)
            )
            new = self.copy(node, {source: new_source})
            new.target = path
            return new
        if is_activation(self.net, node) or node.op in ("placeholder", "get_attr"):
            own = self.theta.get(str(node.target), torch.ones((), dtype=torch.float64))
            same = own.numel() == scale.numel() == 1 or own.shape == scale.shape
            if same and torch.equal(own, scale):
                return node
            where = reader.target if reader.op == "call_module" else reader.name
            raise self.fail(
                node, f"it reaches {where} without weights in between, and their thresholds differ"
            )
        name = str(getattr(node.target, "__name__", node.target))
        if name in SUMS:
            replaced = {
                n: self.deliver(n, scale, node)
                for n in node.all_input_nodes
                if self.kinds[n] is not Kind.META
            }
            self.refuse_numbers(node)
            return self.copy(node, replaced)
        operation = self.operation(node)
        if operation is not None and (scale.dim() == 0 or operation not in RESHAPES):
            source = node.all_input_nodes[0]
            return self.copy(node, {source: self.deliver(source, scale, node)})
        raise self.fail(node, "it has no weights that could take a threshold")

    def _rescaled(
        self, node: fx.Node, layer: nn.Module, incoming: Tensor, outgoing: Tensor
    ) -> nn.Module:
        if isinstance(layer, ChannelAffine):
            dtype, device = layer.scale.dtype, layer.scale.device
            scale = (layer.scale.double().cpu() * incoming / outgoing).to(device, dtype)
            shift = (layer.shift.double().cpu() / outgoing).to(device, dtype)
            return ChannelAffine(scale.detach(), shift.detach())
        assert isinstance(layer, (nn.Linear, _ConvNd))
        old = layer.weight.detach()
        size = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        if incoming.dim() == 1 and len(incoming) != size:
            if not isinstance(layer, nn.Linear) or size % len(incoming):
                raise self.fail(node, "the channels of its input are rearranged before it")
            incoming = incoming.repeat_interleave(size // len(incoming))
        weight = scale_outputs(layer, old.cpu(), (1 / outgoing).expand(outputs))
        into = incoming.expand(size)
        if isinstance(layer, nn.Linear):
            weight = weight * into
        elif isinstance(layer, _ConvTransposeNd):
            weight = weight * into.view(-1, *(1,) * (weight.dim() - 1))
        else:  # [out, in / groups, *kernel]
            groups = layer.groups
            split = weight.view(groups, outputs // groups, *weight.shape[1:])
            split = split * into.view(groups, 1, -1, *(1,) * (weight.dim() - 2))
            weight = split.reshape(weight.shape)
        bias = None
        if layer.bias is not None:
            bias = (layer.bias.detach().double().cpu() / outgoing).to(old.device, old.dtype)
        return with_weights(layer, weight.to(old.device, old.dtype), bias)


def _channels(node: fx.Node) -> int | None:
    shape: Any = node.meta.get("shape")
    return None if shape is None else int(shape[1])


class _Shapes(fx.Interpreter):
    """Runs a graph once and notes the shape of every tensor."""

    def run_node(self, n: fx.Node) -> Any:
        """Run ``n`` and keep its shape in ``n.meta``."""
        out = super().run_node(n)
        if isinstance(out, Tensor):
            n.meta["shape"] = tuple(out.shape)
        return out


def fold_thresholds(
    net: nn.Module,
    graph: fx.Graph,
    kinds: dict[fx.Node, Kind],
    theta: dict[str, Tensor],
    sample: Tensor | None,
) -> fx.Graph:
    """Rewire every neuron of ``graph`` to a current in units of its threshold.

    New layers are added to ``net``; the old ones stay for what runs on rates after the neurons.
    ``theta``: path to threshold, scalar or ``[C]``. ``sample``: inputs to learn shapes from, which
    concatenations of per-channel thresholds need. Returns ``graph``.

    Raises:
        ConversionError: a threshold meets no weights that could take it; names the node.
    """
    if sample is not None:
        with torch.no_grad():
            _Shapes(net, graph=graph).run(sample)
    _Folder(net, graph, kinds, theta).run()
    graph.lint()
    return graph
