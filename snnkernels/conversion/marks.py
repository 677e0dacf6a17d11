"""Find the activations and max-pools of a traced network and make each a module of its own."""

from __future__ import annotations

import operator

from torch import fx, nn

from .activations import ThresholdReLU
from .errors import ConversionError
from .graphs import add_module, first_input, module_of
from .inplace import is_meta
from .ops import TRAINED, Activation, activation_of, max_pool_of

__all__ = ["depends_on_input", "mark"]


def depends_on_input(graph: fx.Graph) -> set[fx.Node]:
    """Nodes reached from the network's input; the others are constants."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _become(node: fx.Node, path: str) -> None:
    """Turn ``node`` into a call of the module at ``path`` on its first input."""
    source = first_input(node)
    node.op, node.target, node.args, node.kwargs = "call_module", path, (source,), {}


def _shift_before(graph: fx.Graph, node: fx.Node, shift: float) -> None:
    """Take ``shift`` from the current of ``node``: neurons have no such thing of their own."""
    source = first_input(node)
    with graph.inserting_before(node):
        shifted = graph.call_function(operator.sub, (source, shift))
    shifted.meta.update(source.meta)
    node.args, node.kwargs = (shifted,), {}


def mark(net: nn.Module, graph: fx.Graph) -> list[str]:
    """Replace every activation by an :class:`Activation`, every max-pool by its module.

    Each call site gets a module of its own, so a module called twice becomes two neurons. The shift
    of a :class:`ThresholdReLU` becomes an operation before it. Returns the paths of the activations
    in order.

    Raises:
        ConversionError: there is no activation at all; the message lists what was seen instead.
    """
    live = depends_on_input(graph)
    meta: dict[fx.Node, bool] = {}
    sites: list[tuple[fx.Node, nn.Module]] = []
    for node in list(graph.nodes):
        numbers = is_meta(node, meta)
        if node not in live or numbers or node.op in ("placeholder", "output"):
            continue
        inner = activation_of(node, net)
        if inner is not None:
            sites.append((node, inner))
        elif node.op != "call_module" and (pool := max_pool_of(node, net)) is not None:
            _become(node, add_module(net, node.name, pool))
    found = []
    for node, inner in sites:
        if isinstance(inner, ThresholdReLU) and inner.shift_steps is not None:
            _shift_before(graph, node, inner.shift)
            inner = ThresholdReLU(inner.ceiling)
        path = str(node.target)
        if node.op == "call_module" and path not in found:  # the first call keeps the name
            net.set_submodule(path, Activation(inner, path))
        else:
            wanted = path if node.op == "call_module" else node.name
            path = add_module(net, wanted, Activation(inner, ""))
            net.get_submodule(path).label = path  # type: ignore[assignment]
        _become(node, path)
        found.append(path)
    if not found:
        seen = sorted(
            {
                type(module_of(net, n)).__name__
                if n.op == "call_module"
                else str(getattr(n.target, "__name__", n.target))
                for n in live
                if n.op not in ("placeholder", "output") and not meta[n]
            }
        )
        raise ConversionError(
            "no activation found that a spiking neuron can replace (ReLU, ReLU6, Hardtanh(0, a), "
            f"clamp(min=0), {', '.join(kind.__name__ for kind in TRAINED)}); the network has "
            f"{', '.join(seen) or 'no layers'}. Replace its activations by ReLU and fine-tune; "
            "activations inside a layer of torch.nn (such as TransformerEncoderLayer) are out of "
            "reach: write it out"
        )
    return found
