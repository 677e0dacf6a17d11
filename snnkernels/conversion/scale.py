"""Thresholds folded into weights: the same network with every threshold 1.

Dividing a layer's neuron equation by its θ gives a neuron with threshold 1, weights
``W θ_before / θ`` and bias ``b / θ`` (Bu et al., AAAI 2022: threshold scaling and weight
normalisation are the same). Every value between neurons is then carried in units of a scale:
``u / s`` with s per channel. Neurons emit in units of their θ; layers with weights take any scale
and deliver any; what has no weights hands its input's scale on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .errors import ConversionError
from .fold import ChannelAffine, scale_outputs, with_weights
from .graphs import add_module, first_input, is_given, module_of, name_of
from .kinds import Kind, is_activation
from .ops import MAX_POOL_MODULES, SCALE_FREE_MODULES, SUMS, WEIGHTED_MODULES
from .verify import note_shapes

__all__ = ["Scale", "fold_thresholds"]

HANDS_ON_MODULES = (*MAX_POOL_MODULES, *SCALE_FREE_MODULES)
HANDS_ON = {
    *(f"avg_pool{n}d" for n in "123"),
    *(f"adaptive_avg_pool{n}d" for n in "123"),
    *("mean", "sum", "interpolate", "contiguous", "flatten", "view", "reshape", "neg"),
}
# Of these, scales per channel survive only into a linear layer, which knows the repetition.
RESHAPES = {"flatten", "view", "reshape", "Flatten"}
ADVICE = "Use normalize='threshold', which is the same network"


@dataclass
class Scale:
    """The units of a value: one factor, or one for each channel.

    Attributes:
        value: scalar or ``[C]``.
        dim: the channel dimension, the batch being 0; -1 for the last.
        tiled: channels came last before a reshape to ``[B, n * C]``, so they repeat as a block.
    """

    value: Tensor
    dim: int = 1
    tiled: bool = False

    @property
    def single(self) -> bool:
        """Whether one factor holds for everything."""
        return self.value.dim() == 0

    def same(self, other: Scale, node: fx.Node) -> bool:
        """Equal factors along the same dimension of ``node``."""
        if not torch.equal(self.value, other.value) or self.tiled != other.tiled:
            return False
        return self.single or _dim(node, self.dim) == _dim(node, other.dim)

    def along(self, node: fx.Node, dim: int) -> bool:
        """Whether this fits dimension ``dim`` of ``node``; unknown shapes count as ``[B, C]``."""
        return self.single or _dim(node, self.dim) == _dim(node, dim)


ONE = Scale(torch.ones((), dtype=torch.float64))


def _dim(node: fx.Node, dim: int) -> int:
    return dim % len(node.meta["shape"]) if "shape" in node.meta else 1


class _Folder:
    def __init__(
        self, net: nn.Module, graph: fx.Graph, kinds: dict[fx.Node, Kind], theta: dict[str, Scale]
    ) -> None:
        self.net, self.graph, self.kinds = net, graph, kinds
        self.theta = {
            p: replace(t, value=t.value.detach().double().cpu()) for p, t in theta.items()
        }
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
        return ConversionError(f"normalize='weights' cannot pass {name_of(node)}: {why}. {ADVICE}")

    def refuse_numbers(self, node: fx.Node) -> None:
        """Only tensors can be summed here: a number has no weights to scale."""
        if not all(isinstance(a, (fx.Node, list, tuple)) for a in node.args[:2]) and str(
            getattr(node.target, "__name__", node.target)
        ) in SUMS - {"neg"}:
            raise self.fail(node, "it adds a number, which has no weights to scale")

    def layer(self, node: fx.Node) -> nn.Module | None:
        """The module of ``node`` if it has weights that absorb a scale."""
        module = module_of(self.net, node)
        return module if isinstance(module, WEIGHTED_MODULES) else None

    def operation(self, node: fx.Node) -> str | None:
        """The name of an operation that hands scales on, or None."""
        module = module_of(self.net, node)
        if module is not None:
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

    def supply(self, node: fx.Node, reader: fx.Node) -> tuple[fx.Node, Scale]:
        """``node`` in whatever scale comes naturally, and that scale (scalar or ``[C]``)."""
        if is_activation(self.net, node):
            return node, self.theta[str(node.target)]
        if self.layer(node) is not None or is_given(node):
            return self.deliver(node, ONE, reader), ONE
        if (operation := self.operation(node)) is not None:
            source = node.all_input_nodes[0]
            new, scale = self.supply(source, node)
            return self.copy(node, {source: new}), self.after(node, operation, source, scale)
        name = str(getattr(node.target, "__name__", node.target))
        tensors = [n for n in node.all_input_nodes if self.kinds[n] is not Kind.META]
        if name in SUMS or name in ("cat", "concat", "concatenate"):
            self.refuse_numbers(node)
            supplied = {n: self.supply(n, node) for n in tensors}
            joined = node.args[0] if node.args else node.kwargs.get("tensors")
            if name not in SUMS and isinstance(joined, (list, tuple)):
                tensors = list(joined)  # as often as they occur
            scales = [supplied[n][1] for n in tensors]
            replaced = {n: new for n, (new, _) in supplied.items()}
            if all(s.same(scales[0], node) and (name in SUMS or s.single) for s in scales):
                return self.copy(node, replaced), scales[0]
            if name in SUMS:
                raise self.fail(node, "its summands come in units of different thresholds")
            dim = node.kwargs.get("dim", node.kwargs.get("axis", (*node.args[1:], 0)[0]))
            if not all(s.along(n, 1) for n, s in ((n, s) for n, (_, s) in supplied.items())) or (
                not isinstance(dim, int) or _dim(node, dim) != 1
            ):
                raise self.fail(node, "it does not join the dimension of the channels")
            sizes = [_channels(n) for n in tensors]
            if None in sizes:
                raise self.fail(
                    node,
                    "the channels of its parts are not known; pass loader= (one batch will do)",
                )
            each = zip(scales, sizes, strict=True)
            whole = torch.cat([self.spread(s, c, node) for s, c in each])  # type: ignore[arg-type]
            return self.copy(node, replaced), Scale(whole)
        raise self.fail(node, "it has no weights that could take a threshold")

    def spread(self, scale: Scale, size: int, node: fx.Node) -> Tensor:
        """One factor for each of ``size`` features, of which a channel may have several."""
        if scale.single:
            return scale.value.expand(size)
        times, more = divmod(size, len(scale.value))
        if more:
            raise self.fail(node, "the channels of its input are rearranged before it")
        return scale.value.repeat(times) if scale.tiled else scale.value.repeat_interleave(times)

    def after(self, node: fx.Node, operation: str, source: fx.Node, scale: Scale) -> Scale:
        """``scale`` of ``source`` as the scale of ``node``, an operation without weights on it."""
        if scale.single or operation in ("contiguous", "neg"):
            return scale
        if operation in RESHAPES:
            if len(node.meta.get("shape", ())) > 2 and scale.dim != 1:
                raise self.fail(node, "it rearranges the channels")
            # Blocks of channels follow each other where the channels were the last of several.
            return Scale(scale.value, 1, tiled=not scale.along(source, 1))
        self.check_dims(node, operation, source, scale)
        return scale

    def check_dims(self, node: fx.Node, operation: str, source: fx.Node, scale: Scale) -> None:
        """Refuse pools and means over the dimension that a scale per channel belongs to."""
        if operation in ("mean", "sum"):
            dims: Any = node.args[1] if node.args[1:] else node.kwargs.get("dim")
            flat = dims if isinstance(dims, (tuple, list)) else [dims]
            bad = [d for d in flat if not isinstance(d, int) or d == 1 or scale.along(source, d)]
            known = "shape" in source.meta
            if any(not isinstance(d, int) or d == 1 or known for d in bad):
                raise self.fail(node, "it acts on the dimension of the channels")
        if not scale.along(source, 1):
            raise self.fail(node, "it acts on the dimension of the channels")

    def deliver(self, node: fx.Node, scale: Scale, reader: fx.Node) -> fx.Node:
        """A node that computes ``node / scale``."""
        key = (node, f"{scale.value.tolist()} {scale.dim}")
        if key not in self.made:
            self.made[key] = self._deliver(node, scale, reader)
        return self.made[key]

    def _deliver(self, node: fx.Node, scale: Scale, reader: fx.Node) -> fx.Node:
        layer = self.layer(node)
        if layer is not None:
            source = first_input(node)
            assert isinstance(source, fx.Node)
            new_source, incoming = self.supply(source, node)
            path = add_module(
                self.net,
                f"{node.target}_scaled",
                self._rescaled(node, source, layer, incoming, scale),
            )
            new = self.copy(node, {source: new_source})
            new.target = path
            return new
        if is_activation(self.net, node) or is_given(node):
            own = self.theta.get(str(node.target), ONE)
            single = own.value.numel() == scale.value.numel() == 1
            if own.same(scale, node) or (single and bool(own.value == scale.value)):
                return node
            raise self.fail(
                node,
                f"it reaches {name_of(reader)} without weights in between, and their thresholds "
                "differ",
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
        if operation is not None and (scale.single or operation not in RESHAPES):
            source = node.all_input_nodes[0]
            if not scale.single and operation not in ("contiguous", "neg"):
                self.check_dims(node, operation, source, scale)
            return self.copy(node, {source: self.deliver(source, scale, node)})
        raise self.fail(node, "it has no weights that could take a threshold")

    def _rescaled(
        self, node: fx.Node, source: fx.Node, layer: nn.Module, into: Scale, out: Scale
    ) -> nn.Module:
        dim = -1 if isinstance(layer, nn.Linear) else 1
        if not into.along(source, dim):
            raise self.fail(node, "the thresholds before it are not along its input channels")
        if not out.along(node, dim):
            raise self.fail(node, "the thresholds behind it are not along its output channels")
        incoming, outgoing = into.value, out.value
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
            if not isinstance(layer, nn.Linear):
                raise self.fail(node, "the channels of its input are rearranged before it")
            incoming = self.spread(into, size, node)
        weight = scale_outputs(layer, old.cpu(), (1 / outgoing).expand(outputs))
        columns = incoming.expand(size)
        if isinstance(layer, nn.Linear):
            weight = weight * columns
        elif isinstance(layer, _ConvTransposeNd):
            weight = weight * columns.view(-1, *(1,) * (weight.dim() - 1))
        else:  # [out, in / groups, *kernel]
            groups = layer.groups
            split = weight.view(groups, outputs // groups, *weight.shape[1:])
            split = split * columns.view(groups, 1, -1, *(1,) * (weight.dim() - 2))
            weight = split.reshape(weight.shape)
        bias = None
        if layer.bias is not None:
            bias = (layer.bias.detach().double().cpu() / outgoing).to(old.device, old.dtype)
        return with_weights(layer, weight.to(old.device, old.dtype), bias)


def _channels(node: fx.Node) -> int | None:
    shape: Any = node.meta.get("shape")
    return None if shape is None else int(shape[1])


def fold_thresholds(
    net: nn.Module,
    graph: fx.Graph,
    kinds: dict[fx.Node, Kind],
    theta: dict[str, Scale],
    sample: Tensor | None,
) -> fx.Graph:
    """Rewire every neuron of ``graph`` to a current in units of its threshold.

    New layers are added to ``net``; the old ones stay for what runs on rates after the neurons.
    ``theta``: path to threshold. ``sample``: inputs to learn shapes from, which
    concatenations of per-channel thresholds need. Returns ``graph``.

    Raises:
        ConversionError: a threshold meets no weights that could take it; names the node.
    """
    if sample is not None:
        note_shapes(net, graph, sample)
    _Folder(net, graph, kinds, theta).run()
    graph.lint()
    return graph
