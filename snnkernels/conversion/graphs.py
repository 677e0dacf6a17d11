"""Small helpers on torch.fx graphs."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from .inputs import network_input

__all__ = [
    "add_module",
    "copy_graph",
    "first_input",
    "free_names",
    "is_given",
    "is_steps",
    "module_of",
    "name_of",
    "place_module",
]


def module_of(net: nn.Module, node: object) -> nn.Module | None:
    """The module that ``node`` calls, or None if it is no module call."""
    called = isinstance(node, fx.Node) and node.op == "call_module"
    return net.get_submodule(str(node.target)) if called else None  # type: ignore[attr-defined]


def first_input(node: fx.Node) -> Any:
    """The first argument of a call, however it was passed."""
    return node.args[0] if node.args else next(iter(node.kwargs.values()))


def is_given(node: fx.Node) -> bool:
    """Whether ``node`` is an input or a constant of the network."""
    return node.op in ("placeholder", "get_attr") or node.target is network_input


def is_steps(value: object) -> bool:
    """Whether ``value`` is T, the last input of the graph of a body."""
    if not isinstance(value, fx.Node) or value.op != "placeholder":
        return False
    return value is [n for n in value.graph.nodes if n.op == "placeholder"][-1]


def name_of(node: fx.Node) -> str:
    """What users know ``node`` by: the path of its module, or the name of the call."""
    return str(node.target) if node.op == "call_module" else node.name


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


def free_names(net: nn.Module, graph: fx.Graph) -> None:
    """Move what is called ``graph``, ``code``, ... to ``graph_``: a GraphModule has its own.

    ``net`` is the copy that belongs to ``graph``.
    """
    own = {*dir(fx.GraphModule({}, fx.Graph()))} - {*dir(nn.Module())}
    nodes = [node for node in graph.nodes if node.op in ("call_module", "get_attr")]
    for name in sorted(own & {str(node.target).partition(".")[0] for node in nodes}):
        new = f"{name}_"
        while hasattr(net, new):
            new += "_"
        stores: list[Any] = [net._modules, net._parameters, net._buffers, vars(net)]
        for held in stores:
            if name in held:
                held[new] = held.pop(name)
        for node in nodes:
            first, *rest = str(node.target).split(".")
            if first == name:
                node.target = ".".join([new, *rest])


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
