"""Which values of the graph change from step to step."""

from __future__ import annotations

import operator
from enum import Enum

from torch import fx, nn

from .errors import ConversionError
from .graphs import first_input, module_of, name_of
from .inplace import is_meta
from .ops import MAX_POOL_MODULES, Activation, returns_list, why_not_affine

__all__ = ["Kind", "before_neurons", "check_supported", "is_activation", "kinds_of"]


class Kind(Enum):
    """How a value depends on time."""

    CONST = "const"  # no input involved
    META = "meta"  # a shape, dtype or device
    STATIC = "static"  # constant in time: computed once
    TIME = "time"  # one value per step


def is_activation(net: nn.Module, node: object) -> bool:
    """Whether ``node`` is a place where a neuron will stand."""
    return isinstance(module_of(net, node), Activation)


def kinds_of(net: nn.Module, graph: fx.Graph) -> dict[fx.Node, Kind]:
    """The :class:`Kind` of every node but the output, in graph order."""
    kinds: dict[fx.Node, Kind] = {}
    meta: dict[fx.Node, bool] = {}
    timed_shapes: set[fx.Node] = set()  # meta nodes that look at a value that changes
    for node in graph.nodes:
        if node.op == "output":
            continue
        inputs = node.all_input_nodes
        timed = any(kinds[n] is Kind.TIME or n in timed_shapes for n in inputs)
        if is_meta(node, meta):
            kinds[node] = Kind.META
            if timed:
                timed_shapes.add(node)
        elif node.op == "placeholder":
            kinds[node] = Kind.STATIC
        elif timed or is_activation(net, node):
            kinds[node] = Kind.TIME
        elif any(kinds[n] in (Kind.STATIC, Kind.META) for n in inputs):
            kinds[node] = Kind.STATIC
        else:
            kinds[node] = Kind.CONST
        if returns_list(node) or isinstance(module_of(net, node), nn.MultiheadAttention):
            node.meta["tensor_list"] = True
    return kinds


def before_neurons(net: nn.Module, graph: fx.Graph) -> set[fx.Node]:
    """Nodes some neuron depends on, neurons themselves only if another depends on them."""
    found: set[fx.Node] = set()
    stack = [n for node in graph.nodes if is_activation(net, node) for n in node.all_input_nodes]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def check_supported(
    net: nn.Module,
    graph: fx.Graph,
    kinds: dict[fx.Node, Kind],
    keep: bool,
    means: bool = False,
) -> dict[str, str]:
    """Check every operation between neurons; returns reasons of those kept, by name.

    With ``means``, what is not affine is marked ``node.meta["on_means"]``: :func:`parts.cut` lets
    it run on running means.

    Raises:
        ConversionError: an operation between neurons is not affine, ``keep`` and ``means`` are
            False; or with ``means`` it mixes the batch.
    """
    varying = {n for n, kind in kinds.items() if kind is Kind.TIME}
    kept: dict[str, str] = {}
    early = before_neurons(net, graph)
    for node in graph.nodes:
        if node not in early or node not in varying or is_activation(net, node):
            continue
        if isinstance(module_of(net, node), MAX_POOL_MODULES):
            continue
        reason = why_not_affine(node, net, varying)
        if reason is None:
            # One entry of several results of an operation on means.
            source = first_input(node) if means and node.target is operator.getitem else None
            if isinstance(source, fx.Node) and source.meta.get("on_means"):
                node.meta["on_means"] = True
            continue
        name = name_of(node)
        if means and "batch" in reason:
            raise ConversionError(f"{name} cannot be converted, on means either: {reason}")
        if not keep and not means:
            raise ConversionError(
                f"{name} cannot be converted: {reason}, and spiking neurons follow it. Replace it "
                "(an activation by ReLU and fine-tune; a normalisation by BatchNorm), or pass "
                "on_unsupported='mean' to apply it to running means at every step (exact in the "
                "mean, but no spiking operation), or on_unsupported='keep' to apply it to the "
                "spikes of every step as it is"
            )
        kept[name] = reason
        if means:
            node.meta["on_means"] = True
    return kept
