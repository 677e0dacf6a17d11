"""Find the activations and max-pools of a traced network and make each a module of its own."""

from __future__ import annotations

from torch import fx, nn

from .activations import QCFS, ClipReLU
from .errors import ConversionError
from .graphs import add_module, place_module
from .ops import Activation, activation_of, max_pool_of
from .trace import is_meta

__all__ = ["depends_on_input", "mark"]


def depends_on_input(graph: fx.Graph) -> set[fx.Node]:
    """Nodes reached from the network's input; the others are constants."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def mark(net: nn.Module, graph: fx.Graph) -> list[str]:
    """Replace every activation by an :class:`Activation`, every max-pool by its module.

    Each call site gets a module of its own, so a module called twice becomes two neurons. Returns
    the paths of the activations in order.

    Raises:
        ConversionError: there is no activation at all; the message lists what was seen instead.
    """
    live = depends_on_input(graph)
    meta: dict[fx.Node, bool] = {}
    found = []
    for node in list(graph.nodes):
        numbers = is_meta(node, meta)
        if node not in live or numbers or node.op in ("placeholder", "output"):
            continue
        inner = activation_of(node, net)
        pool = max_pool_of(node, net) if inner is None else None
        if inner is None and pool is None:
            continue
        new: nn.Module
        if pool is not None:
            if node.op == "call_module":
                continue
            new, path = pool, add_module(net, node.name, pool)
        elif node.op == "call_module":
            assert inner is not None
            new = Activation(inner, "")
            path = place_module(net, graph, node, new)
        else:
            assert inner is not None
            new = Activation(inner, "")
            path = add_module(net, node.name, new)
        if isinstance(new, Activation):
            new.label = path
            found.append(path)
        source = node.args[0] if node.args else node.kwargs["input"]
        node.op, node.target, node.args, node.kwargs = "call_module", path, (source,), {}
    if not found:
        seen = sorted(
            {type(m).__name__ for m in net.modules() if not list(m.children()) and m is not net}
        )
        raise ConversionError(
            "no activation found that a spiking neuron can replace (ReLU, ReLU6, Hardtanh(0, a), "
            f"clamp(min=0), {ClipReLU.__name__}, {QCFS.__name__}); the network has "
            f"{', '.join(seen) or 'no layers'}. Replace its activations by ReLU and fine-tune"
        )
    return found
