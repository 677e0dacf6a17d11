"""Graphs of torch.fx as lists of nodes, and back from lists that are checked line by line."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..conversion.errors import ConversionError
from ..conversion.inputs import network_input
from ..conversion.steps import Clock
from .modules import read_module, write_module
from .store import Reader, Writer
from .tables import ATTRIBUTES, FUNCTIONS, METHODS, NAME_OF_FUNCTION
from .values import decode, encode, plain_name, plain_path

__all__ = ["plain_paths", "read_graph", "read_modules", "write_graph"]

# Attributes of a graph and of the modules in it; nothing else can have these names.
_TAKEN = frozenset(dir(fx.GraphModule({}, fx.Graph()))), frozenset(dir(nn.Module()))
_OPS = ("placeholder", "get_attr", "call_function", "call_method", "call_module", "output")


def write_graph(graph: fx.GraphModule, part: str, to: Writer) -> dict[str, Any]:
    """``{"modules", "attributes", "nodes"}`` of a graph; its modules and tensors go to ``to``.

    Raises:
        ConversionError: a node cannot be saved; names it and says why.
    """
    paths = plain_paths(graph)
    modules: dict[str, int] = {}
    attributes: dict[str, str] = {}
    nodes = []
    # Spiking layers first: what counts their spikes refers to them.
    calls = [n for n in graph.graph.nodes if n.op == "call_module"]
    for node in sorted(
        calls, key=lambda n: type(graph.get_submodule(n.target)).__name__ == "CountSpikes"
    ):
        path = paths[str(node.target)]
        if path not in modules:
            module = graph.get_submodule(str(node.target))
            try:
                modules[path] = to.module(
                    module,
                    lambda module=module, path=path: write_module(module, f"{part}.{path}", to),  # type: ignore[misc]
                )
            except TypeError as error:
                raise _refused(node, part, str(error)) from error
    for node in graph.graph.nodes:
        try:
            _check_names(node, paths)
            if node.op == "get_attr":
                value: Any = graph
                for name in str(node.target).split("."):
                    value = getattr(value, name)
                if not isinstance(value, Tensor):
                    raise TypeError(
                        f"it is a {type(value).__name__}, and only tensors are constants"
                    )
                path = paths[str(node.target)]
                attributes[path] = to.tensor(value, f"{part}.{path}")
            nodes.append(
                {
                    "name": node.name,
                    "op": node.op,
                    "target": _target(node, paths),
                    "args": [encode(a, depth=1) for a in node.args if node.op != "placeholder"],
                    "kwargs": {k: encode(v) for k, v in node.kwargs.items()},
                }
            )
        except TypeError as error:
            raise _refused(node, part, str(error)) from error
    return {"modules": modules, "attributes": attributes, "nodes": nodes}


def _refused(node: fx.Node, part: str, why: str) -> ConversionError:
    name = node.target if node.op in ("call_module", "get_attr") else node.name
    return ConversionError(
        f"{name} ({node.op} in the {part}) cannot be saved: {why}. Saved networks load without the "
        "ANN's code: write it with layers and functions of torch before converting"
    )


def plain_paths(graph: fx.GraphModule) -> dict[str, str]:
    """How paths of modules and constants are saved: exotic letters are spelled in plain ones.

    What lies inside a module that is called itself (a weight that two layers use) stands beside it.
    """
    found = [str(n.target) for n in graph.graph.nodes if n.op in ("call_module", "get_attr")]
    wanted = {path: re.sub(r"[^A-Za-z0-9_.]", "_", path) for path in dict.fromkeys(found)}
    tops = {path.partition(".")[0] for path in wanted.values() if "." in path}
    plain: dict[str, str] = {}
    for path, new in wanted.items():
        if any(path.startswith(f"{other}.") for other in wanted):
            new = new.replace(".", "_")
        first, count = new, 1
        while new in plain.values() or new in tops:
            count += 1
            new = f"{first}_{count}"
        plain[path] = new
    return plain


def _check_names(node: fx.Node, paths: dict[str, str]) -> None:
    path = paths.get(str(node.target), "path") if node.op in ("call_module", "get_attr") else "path"
    if not plain_name(node.name) or not plain_path(path):
        raise TypeError("its name is too long, or its modules are nested too deep")


def _target(node: fx.Node, paths: dict[str, str]) -> str:
    """The target as a word of the closed lists."""
    if node.op in ("placeholder", "output"):
        return node.name if node.op == "placeholder" else "output"
    if node.op in ("call_module", "get_attr"):
        return paths[str(node.target)]
    if node.op == "call_method":
        if node.target not in METHODS:
            raise TypeError(
                f"the method {node.target!r} is not in the list of those that are saved"
            )
        return str(node.target)
    name = NAME_OF_FUNCTION.get(node.target)
    if name is None:
        what: Any = node.target
        raise TypeError(
            f"{getattr(what, '__module__', '')}.{getattr(what, '__qualname__', what)} is your own "
            "code (return tuples, lists or dicts of tensors; call functions of torch), or a "
            "function that is not in the list of those that are saved"
        )
    if name == "builtins.getattr":
        _attribute(node.args, _from_inputs(node))
    return name


def _attribute(args: tuple[Any, ...], of_inputs: bool) -> None:
    """Check ``getattr(value, name)``; a user's input (a dataclass) may have any public field."""
    allowed = len(args) == 2 and isinstance(args[1], str)
    if not allowed or not (args[1] in ATTRIBUTES or (of_inputs and plain_name(args[1]))):
        raise TypeError(f"getattr{args[1:]} is not one of {', '.join(sorted(ATTRIBUTES))}")
    if args[1].startswith("_"):
        raise TypeError(f"getattr{args[1:]} reads a private attribute")


def _from_inputs(node: fx.Node) -> bool:
    """Whether ``node`` looks into an input of several parts."""
    while node.op == "call_function":
        if node.target is network_input:
            return True
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return False
        node = source
    return False


# ---- reading -------------------------------------------------------------------------------------


def read_modules(entries: Any, of: Reader, clock: Clock) -> None:
    """Build all modules into ``of.modules``."""
    if not isinstance(entries, list):
        raise of.fail("modules", entries, "a list")
    for number, entry in enumerate(entries):
        of.modules.append(read_module(entry, number, of, clock))


def read_graph(given: Any, part: str, of: Reader, device: torch.device | None) -> fx.GraphModule:
    """The graph that :func:`write_graph` described.

    Torch.fx writes source for it and runs it; names, paths, methods and functions all come from
    closed lists or are letters and digits, and strings are printed as literals.
    """
    if not isinstance(given, dict) or set(given) != {"modules", "attributes", "nodes"}:
        raise of.fail(part, given, "an object of modules, attributes and nodes")
    root: dict[str, Any] = {}
    for field, get in (("modules", of.module), ("attributes", None)):
        entries = given[field]
        if not isinstance(entries, dict):
            raise of.fail(f"{part}.{field}", entries, "an object")
        for path, value in entries.items():
            if not plain_path(path) or path in root:
                raise of.fail(f"{part}.{field}", path, "paths of letters, digits, _ and .")
            first, *others = path.split(".")
            if first in _TAKEN[0] or not _TAKEN[1].isdisjoint(others):
                raise of.fail(f"{part}.{field}", path, "no name of an attribute of modules")
            root[path] = of.tensor(value) if get is None else get(value, f"{part}.{field}.{path}")
    _refuse_nested(root, part, of)
    if not isinstance(given["nodes"], list):
        raise of.fail(f"{part}.nodes", given["nodes"], "a list")
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    for number, entry in enumerate(given["nodes"]):
        _read_node(entry, f"{part}.nodes[{number}]", graph, made, root, of, device)
    if not made or next(reversed(graph.nodes)).op != "output":
        raise of.fail(f"{part}.nodes", "the last node", "an output")
    try:
        graph.lint()
        return fx.GraphModule(root, graph, class_name=part.capitalize()).eval()
    except (RuntimeError, ValueError, TypeError, NameError, SyntaxError) as error:
        raise of.fail(part, error, "a graph that torch.fx accepts") from error


def _refuse_nested(root: dict[str, Any], part: str, of: Reader) -> None:
    """No module may lie inside another: one would replace what the other holds."""
    for path in root:
        above = path
        while "." in above:
            above = above.rpartition(".")[0]
            if above in root:
                raise of.fail(f"{part}.modules", path, f"no path inside that of {above}")


def _read_node(
    entry: Any,
    field: str,
    graph: fx.Graph,
    made: dict[str, fx.Node],
    root: dict[str, Any],
    of: Reader,
    device: torch.device | None,
) -> None:
    keys = {"name", "op", "target", "args", "kwargs"}
    if not isinstance(entry, dict) or set(entry) != keys:
        raise of.fail(field, entry, f"an object of {', '.join(sorted(keys))}")
    name, op, target = entry["name"], entry["op"], entry["target"]
    if not plain_name(name) or name in made or name == "self":
        raise of.fail(f"{field}.name", name, "a new name of letters, digits and _")
    if op not in _OPS:
        raise of.fail(f"{field}.op", op, ", ".join(_OPS))
    if made and made[next(reversed(made))].op == "output":
        raise of.fail(field, name, "nothing behind the output")

    def fail(why: str) -> Exception:
        return of.fail(f"{field}.args", why, "plain values and nodes before it")

    def node(wanted: str) -> fx.Node:
        if wanted not in made:
            raise fail(f"{wanted!r} is no node before it")
        return made[wanted]

    args = decode(entry["args"], fail, node, device=device)
    given = entry["kwargs"]
    if not isinstance(args, list) or not isinstance(given, dict):
        raise fail("args must be a list and kwargs an object")
    for key in given:
        if not plain_name(key):
            raise of.fail(f"{field}.kwargs", key, "names of letters, digits and _")
    kwargs = {k: decode(v, fail, node, device=device) for k, v in given.items()}
    found: Any = target
    if op == "placeholder":
        if target != name or args or kwargs:
            raise of.fail(f"{field}.target", target, "the node's own name, and no arguments")
    elif op == "output":
        if target != "output" or len(args) != 1 or kwargs:
            raise of.fail(f"{field}.target", target, "output, and one argument")
    elif op == "call_function":
        if not isinstance(target, str) or target not in FUNCTIONS:
            raise of.fail(
                f"{field}.target",
                target,
                "functions of the list snnkernels.hub.tables.FUNCTIONS (written by a newer "
                "snnkernels or torch? then upgrade)",
            )
        found = FUNCTIONS[target]
    elif op == "call_method":
        if not isinstance(target, str) or target not in METHODS:
            raise of.fail(
                f"{field}.target", target, "methods of the list snnkernels.hub.tables.METHODS"
            )
        if not args or not isinstance(args[0], fx.Node):
            raise fail("a method is called on a node")
    elif not isinstance(target, str) or not isinstance(
        root.get(target), nn.Module if op == "call_module" else Tensor
    ):
        raise of.fail(
            f"{field}.target",
            target,
            f"a path under {'modules' if op == 'call_module' else 'attributes'}",
        )
    new = graph.create_node(op, found, tuple(args), kwargs, name=name)
    if new.name != name:
        raise of.fail(f"{field}.name", name, "a name that torch.fx accepts")
    made[name] = new
    if op == "call_function" and target == "builtins.getattr":
        try:
            if kwargs or not isinstance(args[0], fx.Node):
                raise TypeError("getattr is of a node")
            _attribute(tuple(args), _from_inputs(new))
        except (TypeError, IndexError) as error:
            raise of.fail(f"{field}.args", error, "an attribute of a tensor") from error
