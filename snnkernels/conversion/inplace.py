"""In-place operations as operations that return their result."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .errors import ConversionError

__all__ = ["is_meta", "remove_inplace"]

# Results that alias their input: writing into one of them writes into the other.
VIEWS = {
    *("view", "reshape", "flatten", "transpose", "permute", "squeeze", "unsqueeze", "detach"),
    *("chunk", "split", "getitem", "narrow", "expand", "contiguous", "unflatten", "t", "select"),
}
INPLACE_FUNCTIONS = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    torch.relu_: torch.relu,
    F.relu_: torch.relu,
    F.hardtanh_: F.hardtanh,
    torch.clamp_: torch.clamp,
    torch.clamp_min_: torch.clamp_min,
    torch.dropout_: F.dropout,
}
SHAPE_METHODS = {"size", "dim", "ndimension", "numel", "get_device", "element_size"}
SHAPE_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "is_cuda", "requires_grad"}


def is_meta(node: fx.Node, memo: dict[fx.Node, bool]) -> bool:
    """Whether ``node`` is a shape, dtype, device or arithmetic on such, not a tensor."""
    if node in memo:
        return memo[node]
    target = node.target
    if node.op == "call_method":
        result = target in SHAPE_METHODS or (
            bool(node.all_input_nodes) and all(memo.get(n, False) for n in node.all_input_nodes)
        )
    elif node.op == "call_function" and target is getattr:
        result = node.args[1] in SHAPE_ATTRIBUTES
    elif node.op == "call_function":
        module = getattr(target, "__module__", "") or ""
        result = (
            module in ("_operator", "math", "builtins")
            and bool(node.all_input_nodes)
            and all(memo.get(n, False) for n in node.all_input_nodes)
        )
    else:
        result = False
    memo[node] = result
    return result


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def _inplace_twin(net: nn.Module, node: fx.Node, meta: dict[fx.Node, bool]) -> Any:
    """The value-returning form of an in-place node, or None if the node is not in place."""
    if node.op == "call_function":
        if node.target in INPLACE_FUNCTIONS:
            return INPLACE_FUNCTIONS[node.target]
        return node.target if node.kwargs.get("inplace") else None
    if node.op == "call_method":
        name = str(node.target)
        return name[:-1] if name.endswith("_") and not name.endswith("__") else None
    if node.op == "call_module":
        module = net.get_submodule(str(node.target))
        return node.target if getattr(module, "inplace", False) else None
    return None


def _aliases(node: fx.Node) -> Iterator[fx.Node]:
    """Nodes that share memory with ``node`` through views, ``node`` included."""
    seen = {node}
    stack = [node]
    while stack:
        current = stack.pop()
        yield current
        near = [u for u in current.users if _name(u) in VIEWS]
        if _name(current) in VIEWS and current.all_input_nodes:
            near.append(current.all_input_nodes[0])
        for other in near:
            if other not in seen:
                seen.add(other)
                stack.append(other)


def remove_inplace(net: nn.Module, graph: fx.Graph) -> None:
    """Make every in-place operation return a value that all later users of its input take."""
    meta: dict[fx.Node, bool] = {}
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        numbers = is_meta(node, meta)
        twin = _inplace_twin(net, node, meta)
        if twin is None:
            continue
        if not numbers and node.args and isinstance(node.args[0], fx.Node):
            written = node.args[0]
            for alias in _aliases(written):
                if alias is written:
                    continue
                late = [u for u in alias.users if order[u] > order[node] and u is not node]
                if late and alias is not node:
                    raise ConversionError(
                        f"{node.name} changes {written.name} in place while {late[0].name} still "
                        f"reads the same memory through {alias.name}. Use the form that returns "
                        "a new tensor"
                    )
            for user in list(written.users):
                if order[user] > order[node]:
                    user.replace_input_with(written, node)
        if node.op == "call_module":
            net.get_submodule(str(node.target)).inplace = False  # type: ignore[assignment]
        else:
            node.target = twin
            node.kwargs = {k: v for k, v in node.kwargs.items() if k != "inplace"}
