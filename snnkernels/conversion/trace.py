"""From a network to a graph of plain, value-returning operations."""

from __future__ import annotations

import copy
import inspect
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .activations import QCFS, ClipReLU
from .errors import ConversionError
from .inplace import remove_inplace

__all__ = ["trace"]

WAY_OUT = (
    "Rewrite that part without control flow that depends on the data (or move it outside the "
    "network), or convert the convertible part of the network alone."
)


class _Proxy(fx.Proxy):
    """A proxy that keeps ``x += y`` apart from ``x = x + y``: other names of x change with it."""

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Stop at our activations and at whatever runs a forward of torch.nn itself."""
        if isinstance(m, (ClipReLU, QCFS)):
            return True
        if isinstance(m, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            return False
        return type(m).forward.__module__.startswith("torch.nn")

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Remember where we are, so that an error can say it."""
        self.stack.append(f"{self.path_of_module(m)} ({type(m).__name__})")
        out = super().call_module(m, forward, args, kwargs)
        self.stack.pop()
        return out

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Hand out proxies that record in-place arithmetic."""
        return _Proxy(node, self)


def _own_copy(ann: nn.Module) -> nn.Module:
    """A deep copy in eval mode without the original's wrappers and hooks."""
    while True:
        if isinstance(ann, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            ann = ann.module
        elif isinstance(getattr(ann, "_orig_mod", None), nn.Module):  # torch.compile
            ann = ann._orig_mod  # type: ignore[assignment]
        else:
            break
    if isinstance(ann, torch.jit.ScriptModule):
        raise ConversionError("a scripted network has no Python to trace: convert the original")
    try:
        net = copy.deepcopy(ann)
    except Exception as error:
        raise ConversionError(
            f"the network ({type(ann).__name__}) cannot be copied: {error}. The network is never "
            "modified, so a copy is needed; torch.nn.utils.weight_norm is a known cause "
            "(remove_weight_norm, or torch.nn.utils.parametrizations.weight_norm)"
        ) from error
    for module in net.modules():
        # The hooks are the user's and would report on, or change, a network they do not know.
        for name, hooks in vars(module).items():
            if name.endswith("_hooks") and isinstance(hooks, dict):
                hooks.clear()
    return net.eval()


def _defaults(net: nn.Module) -> dict[str, Any]:
    """Values of the optional inputs of ``net.forward``; more than one required is an error."""
    parameters = list(inspect.signature(net.forward).parameters.values())
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    plain = [p for p in parameters if p.kind not in kinds]
    required = [p.name for p in plain if p.default is inspect.Parameter.empty]
    if len(required) > 1 or (len(required) == 0 and not plain):
        raise ConversionError(
            f"{type(net).__name__}.forward takes {len(required)} required inputs {required}; "
            "conversion needs exactly one. Wrap the network in a module with one input"
        )
    kept = required[0] if required else plain[0].name
    return {p.name: p.default for p in plain if p.name != kept}


def trace(ann: nn.Module) -> tuple[nn.Module, fx.Graph]:
    """Copy and trace ``ann``: returns ``(copy, graph)``, the graph free of in-place operations.

    The copy is in eval mode and carries no hooks; ``ann`` is untouched. The graph has one
    placeholder; dropout and identity nodes are gone.

    Raises:
        ConversionError: the network cannot be copied or traced (the message names the module),
            needs more than one input, or changes a tensor in place through a view.
    """
    net = _own_copy(ann)
    tracer = _Tracer()
    try:
        graph = tracer.trace(net, concrete_args=_defaults(net) or None)
    except ConversionError:
        raise
    except Exception as error:
        where = tracer.stack[-1] if tracer.stack else f"the forward of {type(net).__name__}"
        raise ConversionError(
            f"cannot trace the network: {where} failed with {type(error).__name__}: {error}. "
            + WAY_OUT
        ) from error
    for node in graph.nodes:
        node.type = None  # annotations may be strings, which torch.fx cannot pickle
    _one_placeholder(graph)
    remove_inplace(net, graph)
    _drop_identities(net, graph)
    return net, graph


def _one_placeholder(graph: fx.Graph) -> None:
    """Remove the inputs that have default values, and torch.fx's guards on them."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is torch._assert:
            guard = node.args[0]
            graph.erase_node(node)
            if isinstance(guard, fx.Node) and not guard.users:
                graph.erase_node(guard)
    for node in [n for n in graph.nodes if n.op == "placeholder"][1:]:
        if node.users:
            raise ConversionError(
                f"input {node.target!r} is used by the network; conversion needs exactly one "
                "input. Wrap the network in a module with one input"
            )
        graph.erase_node(node)


def _drop_dead(graph: fx.Graph) -> None:
    """Erase what nothing reads; torch.fx's own pass needs an owning module."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


IDENTITY_MODULES = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
IDENTITY_FUNCTIONS = {
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    torch.dropout,
    torch.clone,
    torch.detach,
}


def _drop_identities(net: nn.Module, graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        same = (
            (
                node.op == "call_module"
                and isinstance(net.get_submodule(str(node.target)), IDENTITY_MODULES)
            )
            or (node.op == "call_function" and node.target in IDENTITY_FUNCTIONS)
            or (node.op == "call_method" and node.target in ("clone", "detach"))
        )
        if same:
            source = node.args[0] if node.args else next(iter(node.kwargs.values()))
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    _drop_dead(graph)
