"""From a network to a graph of plain, value-returning operations."""

from __future__ import annotations

import copy
import dis
import linecache
import operator
import sys
import threading
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..distributed.dealing import SHARDED, sharded
from ..neurons import IFNode
from .errors import ConversionError
from .graphs import first_input, free_names, module_of
from .inplace import is_meta, remove_inplace
from .inputs import Inputs, Ports, network_input
from .ops import TRAINED, activation_of

__all__ = ["Traced", "own_copy", "trace"]

WAY_OUT = (
    "Rewrite that part without control flow or asserts that depend on the data (or move it outside "
    "the network), or convert the modules that have none and leave the rest as it is: "
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


# torch.fx traces by replacing methods of nn.Module for the whole process: two traces at once would
# put each other's back.
_TRACING = threading.RLock()


class _Tracer(fx.Tracer):
    def __init__(self, ports: Ports | None = None) -> None:
        super().__init__()
        self.ports = ports
        self.stack: list[str] = []
        self.thread = threading.get_ident()

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """One at a time."""
        with _TRACING:
            return super().trace(root, concrete_args)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Placeholders for the inputs; the other parameters of forward keep their values."""
        if self.ports is None:
            return super().create_args_for_root(root_fn, is_module, concrete_args)
        named = {n: self.create_proxy("placeholder", n, (), {}) for n in self.ports.names}
        args, kwargs = self.ports.arguments(named)
        return (lambda root: root_fn(root, *args, **kwargs)), [self.root]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Stop at our activations and at whatever runs a forward of torch.nn itself."""
        if isinstance(m, TRAINED):
            return True
        if isinstance(m, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            return False
        # What a convolution's forward calls may be a subclass's own.
        runs = (type(m).forward, getattr(m, "_conv_forward", nn.Module.__call__))
        # A torch.fx.GraphModule's forward belongs to no module.
        return all((function.__module__ or "").startswith("torch.nn") for function in runs)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Asserts on shapes hold: the network ran on such inputs. Other conditions are errors."""
        frame = sys._getframe(2)  # past Proxy.__bool__
        memo: dict[fx.Node, bool] = {}
        for node in self.graph.nodes:
            is_meta(node, memo)
        if memo.get(obj.node, False) and _asserts(frame):
            return True
        return super().to_bool(obj)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Remember where we are, so that an error can say it; other threads just run."""
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        self.stack.append(f"{self.path_of_module(m)} ({type(m).__name__})")
        out = super().call_module(m, forward, args, kwargs)
        self.stack.pop()
        return out

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Proxies of parameters are for this trace only."""
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Hand out proxies that record in-place arithmetic."""
        return _Proxy(node, self)


def _asserts(frame: Any) -> bool:
    """Whether ``frame`` is about to test a truth value for an ``assert``."""
    code = [i for i in dis.get_instructions(frame.f_code) if i.opname not in ("CACHE", "NOT_TAKEN")]
    at = next((k for k, i in enumerate(code) if i.offset >= frame.f_lasti), None)
    if at is not None and code[at].opname == "TO_BOOL":
        at += 1
    if at is None or at + 1 >= len(code):
        return False
    raises = {i.offset for i in code if "ASSERTION_ERROR" in str(i.opname + str(i.argval)).upper()}
    raises |= {i.offset for i in code if i.argval is AssertionError}
    jump = code[at].opname
    if jump.startswith("POP_JUMP") and jump.endswith("IF_TRUE"):
        return code[at + 1].offset in raises
    return jump.startswith("POP_JUMP") and jump.endswith("IF_FALSE") and code[at].argval in raises


def _user_line(error: BaseException) -> str:
    """The user's line an error comes from: `` (file:line: source)``, or nothing."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)
    ]
    if not frames or frames[-1].lineno is None:
        return ""
    name, line = frames[-1].filename, frames[-1].lineno
    source = linecache.getline(name, line).strip()
    return f" ({Path(name).name}:{line}{': ' + source if source else ''})"


# Hooks of torch that compute a weight before every call: set on the copy once and for all.
_WEIGHT_HOOKS = (BasePruningMethod, SpectralNorm, WeightNorm)


@torch.no_grad()
def _bake_weights(module: nn.Module) -> None:
    """Replace what pruning, weight_norm or spectral_norm compute by the values themselves."""
    names = []
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, _WEIGHT_HOOKS):
            hook(module, ())
            names.append(hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name)
    for name in dict.fromkeys(names):
        value = getattr(module, name).detach().clone()
        for store in (module._parameters, module._buffers, vars(module)):
            for key in [name, *(f"{name}_{part}" for part in ("orig", "mask", "g", "v", "u"))]:
                store.pop(key, None)
        module.register_parameter(name, nn.Parameter(value))


def own_copy(ann: nn.Module, *, share: bool = False) -> tuple[nn.Module, list[str]]:
    """A deep copy in eval mode without the original's wrappers and hooks.

    Weights that hooks of torch compute (pruning, weight_norm, spectral_norm) are computed and
    become plain parameters. ``share``: parameters are the original's, for a copy that only reads.
    Returns the copy and the names of modules whose own forward (pre-)hooks were left out.

    Raises:
        ConversionError: it cannot be copied, is scripted, or spikes already.
    """
    while True:
        if isinstance(ann, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            ann = ann.module
        elif isinstance(getattr(ann, "_orig_mod", None), nn.Module):  # torch.compile
            ann = ann._orig_mod  # type: ignore[assignment]
        else:
            break
    if isinstance(ann, torch.jit.ScriptModule):
        raise ConversionError("a scripted network has no Python to trace: convert the original")
    for path, module in ann.named_modules():
        if isinstance(module, IFNode):
            raise ConversionError(
                f"{path or 'the network'} is an IFNode: the network spikes already, in whole or in "
                "part. Convert the ANN it was made from"
            )
    if sharded(ann):
        raise ConversionError(SHARDED)
    memo: dict[int, Any] = {}
    for module in ann.modules():
        # What a hook computed is no leaf of autograd, so it cannot be copied as it is.
        stale = (v for v in vars(module).values() if isinstance(v, Tensor) and v.grad_fn)
        memo |= {id(v): v.detach().clone() for v in stale}
    if share:
        memo |= {id(p): p for p in ann.parameters()}
    try:
        net = copy.deepcopy(ann, memo)
    except Exception as error:
        raise ConversionError(
            f"the network ({type(ann).__name__}) cannot be copied: {error}. The network is never "
            "modified, so a copy is needed: tensors kept as attributes must be parameters, "
            "buffers, or detached"
        ) from error
    net.eval()
    hooked = []
    for path, module in net.named_modules():
        _bake_weights(module)
        pre = [h for h in module._forward_pre_hooks.values() if not isinstance(h, _WEIGHT_HOOKS)]
        if pre or module._forward_hooks:
            hooked.append(path or type(net).__name__)
        # The hooks are the user's and would report on, or change, a network they do not know.
        for name, hooks in vars(module).items():
            if name.endswith("_hooks") and isinstance(hooks, dict):
                hooks.clear()
    return net, hooked


def _convertible(net: nn.Module, above: str = "") -> list[str]:
    """Paths of the largest modules that can be traced and have weights and activations."""
    found: list[str] = []
    for name, child in net.named_children():
        path = f"{above}.{name}" if above else name
        try:
            graph = _Tracer().trace(child)
        except Exception:
            found += _convertible(child, path)
            continue
        weights = next(child.parameters(), None) is not None
        called = [n for n in graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
        if weights and any(activation_of(node, child) is not None for node in called):
            found.append(path)
    return found


def _way_out(net: nn.Module) -> str:
    paths = _convertible(net)
    if not paths:
        return WAY_OUT + "snnkernels.convert_modules (no module of this network can be, as it is)."
    shown = ", ".join(map(repr, paths[:6])) + (", ..." if len(paths) > 6 else "")
    return WAY_OUT + f"snnkernels.convert_modules(ann, [{shown}], loader)."


@dataclass
class Traced:
    """A copy of a network and its graph.

    Attributes:
        net: the copy.
        graph: what it computes.
        ports: its inputs.
        hooked: modules whose forward (pre-)hooks are not part of it.
    """

    net: nn.Module
    graph: fx.Graph
    ports: Ports
    hooked: list[str] = field(default_factory=list)


def trace(ann: nn.Module, first: Tensor | Inputs | None = None) -> Traced:
    """Copy and trace ``ann``; the graph is free of in-place operations.

    The copy is in eval mode and carries no hooks; ``ann`` is untouched. The graph has one
    placeholder: the input, or an :class:`Inputs` if ``first``, a batch, has several; without it all
    required parameters of forward are inputs. Dropout and identity nodes are gone.

    Raises:
        ConversionError: the network cannot be copied or traced (the message names the module and
            the line), does not take these inputs, or changes a tensor in place through a view.
    """
    net, hooked = own_copy(ann)
    ports = Ports.of(net, first)
    tracer = _Tracer(ports)
    try:
        graph = tracer.trace(net)
    except ConversionError:
        raise
    except Exception as error:
        where = tracer.stack[-1] if tracer.stack else f"the forward of {type(net).__name__}"
        raise ConversionError(
            f"cannot trace the network: {where} failed with {type(error).__name__}: {error}"
            f"{_user_line(error)}. " + _way_out(net)
        ) from error
    for node in graph.nodes:
        node.type = None  # annotations may be strings, which torch.fx cannot pickle
    if ports.packed:
        _pack(graph)
    free_names(net, graph)
    remove_inplace(net, graph)
    _drop_identities(net, graph)
    return Traced(net, graph, ports, hooked)


def _pack(graph: fx.Graph) -> None:
    """Let the graph take its inputs as one :class:`Inputs`."""
    single = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_before(single[0]):
        inputs = graph.placeholder("network_inputs")
    for node in single:
        with graph.inserting_before(node):
            name = str(node.target)
            new = graph.create_node("call_function", network_input, (inputs, name), name=name)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        new.name = name  # as users know it; it is free now


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
            isinstance(module_of(net, node), IDENTITY_MODULES)
            or (node.op == "call_function" and node.target in IDENTITY_FUNCTIONS)
            or (node.op == "call_method" and node.target in ("clone", "detach"))
        )
        if same:
            node.replace_all_uses_with(first_input(node))
            graph.erase_node(node)
    _drop_dead(graph)
