"""Small helpers on torch.fx graphs."""

from __future__ import annotations

from torch import fx, nn

__all__ = ["add_module", "copy_graph", "place_module"]


def add_module(net: nn.Module, wanted: str, module: nn.Module) -> str:
    """Put ``module`` into ``net`` at ``wanted`` (``wanted_2``, ... if taken); returns where."""
    path, count = wanted, 1
    while _taken(net, path):
        count += 1
        path = f"{wanted}_{count}"
    parent = net
    *above, name = path.split(".")
    for part in above:
        if not hasattr(parent, part):
            parent.add_module(part, nn.Module())
        parent = getattr(parent, part)
    parent.add_module(name, module)
    return path


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """The same graph in new nodes, so that changing one leaves the other alone."""
    new = fx.Graph()
    new.output(new.graph_copy(graph, {}))
    return new


def place_module(net: nn.Module, graph: fx.Graph, node: fx.Node, module: nn.Module) -> str:
    """Give ``node`` (a module call) a ``module`` of its own; returns its path.

    The old path if no other call uses it, else a new one next to it.
    """
    path = str(node.target)
    if sum(n.op == "call_module" and n.target == path for n in graph.nodes) > 1:
        return add_module(net, path, module)
    net.set_submodule(path, module)
    return path


def _taken(net: nn.Module, path: str) -> bool:
    here: object = net
    for part in path.split("."):
        if not hasattr(here, part):
            return False
        here = getattr(here, part)
    return True
