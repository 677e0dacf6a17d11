"""How many operations spikes cause, found by running the graph with the spikes of every value.

Beside each value runs how many spikes are in it, so that a layer's input is known to be spikes,
sums or means of spikes (each of which is added), or something else (which is multiplied).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call

from .graphs import module_of, name_of
from .inplace import is_meta
from .means import FromMeans, RunningMean
from .pools import CumulativeMaxPool
from .spiking import CountSpikes, Repeat, SpikingActivation, TimeShape, split_time

__all__ = ["CountingRun", "Weighted", "weighted_layers"]

_MODULES = (
    nn.Linear,
    nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
_FUNCTIONS = {
    F.linear,
    F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d,
    F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
    torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
}  # fmt: skip
_PRODUCTS = {torch.matmul, operator.matmul, torch.mm, torch.bmm, torch.einsum, torch.addmm,
             torch.baddbmm, F.bilinear, F.scaled_dot_product_attention, torch.cdist}  # fmt: skip
_SUMS = {operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub, "add",
         "add_", "sub", "sub_"}  # fmt: skip
_SCALES = {operator.mul, operator.imul, operator.truediv, operator.itruediv, operator.neg,
           torch.mul, torch.div, torch.neg, "mul", "mul_", "div", "div_", "neg"}  # fmt: skip
_MEANS = {torch.mean, "mean", torch.sum, "sum"}
# What only moves values: spikes move with them.
_MOVES = {
    torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze,
    torch.cat, torch.concat, torch.stack, torch.chunk, torch.split, torch.narrow, torch.flip,
    torch.roll, torch.clone, F.pad, F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle,
    torch.swapaxes, torch.movedim, torch.select, torch.unbind, torch.tensor_split,
    torch.repeat_interleave, operator.getitem,
    "flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "contiguous",
    "chunk", "split", "narrow", "flip", "roll", "clone", "expand", "unflatten", "detach",
    "swapaxes", "movedim", "select", "unbind", "tensor_split",
    "repeat_interleave", "repeat",
}  # fmt: skip
_MOVING = (nn.Flatten, nn.Unflatten, nn.Identity, nn.PixelShuffle, nn.PixelUnshuffle,
           nn.ChannelShuffle, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.Dropout, nn.Dropout1d,
           nn.Dropout2d, nn.Dropout3d)  # fmt: skip
_MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d,
              nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)  # fmt: skip
_MEAN_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
               nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)  # fmt: skip
_ADAPTIVE = {F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
             torch.adaptive_avg_pool1d}  # fmt: skip
_MEAN_POOL_FUNCTIONS = {
    F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, torch.avg_pool1d, *_ADAPTIVE,
}  # fmt: skip


@dataclass
class Weighted:
    """What reached one layer with weights.

    Attributes:
        name: of the layer.
        kind: ``"spikes"``, or ``"values"`` that are not spikes nor sums or means of them.
        connections: weights times places they are used at, padding left out, of one sample.
        operations: ``[B]``, float64: additions of a weight (spikes) or multiply-adds (values).
        arrived: ``[B]``, float64: spikes, or values other than zero.
        module: tells one layer from another; None for a function.
    """

    name: str
    kind: str
    connections: float
    operations: Tensor
    arrived: Tensor
    module: nn.Module | None


def _linear_map(net: nn.Module, node: fx.Node, args: Any, kwargs: Any) -> Callable[..., Tensor]:
    """The layer with weights of one and no bias."""
    module = module_of(net, node)
    if module is not None:
        ones = {"weight": torch.ones_like(module.weight)}  # type: ignore[arg-type]
        if module.bias is not None:
            ones["bias"] = torch.zeros_like(module.bias)  # type: ignore[arg-type]
        return lambda x: functional_call(module, ones, (x,))
    names = ("input", "weight", "bias")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    weight = torch.ones_like(given["weight"])
    rest = {k: v for k, v in kwargs.items() if k not in names}
    return lambda x: node.target(x, weight, None, *args[3:], **rest)  # type: ignore[operator]


def _reached(function: Callable[..., Tensor], shape: torch.Size, like: Tensor) -> Tensor:
    """How many outputs each value of one sample reaches: ``[1, *shape]``."""
    with torch.enable_grad():
        x = torch.zeros(1, *shape, dtype=like.dtype, device=like.device, requires_grad=True)
        (reached,) = torch.autograd.grad(function(x).sum(), x)
    return reached


def _is_weighted(net: nn.Module, node: fx.Node) -> bool:
    return isinstance(module_of(net, node), _MODULES) or (
        node.op == "call_function" and node.target in _FUNCTIONS
    )


def weighted_layers(graph: fx.GraphModule, *args: Any) -> tuple[Any, list[Weighted], list[str]]:
    """Run a graph without neurons: its output, its layers with weights, and what is not counted."""
    run = _Dense(graph)
    return run.run(*args), run.found, run.uncounted


class _Dense(fx.Interpreter):
    """Every layer with weights takes part with all of its connections."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.found: list[Weighted] = []
        self.uncounted: list[str] = []

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if _is_weighted(self.module, n):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            x = args[0] if args else kwargs["input"]
            reached = _reached(_linear_map(self.module, n, args, kwargs), x.shape[1:], x)
            total = float(reached.double().sum())
            every = torch.full((len(x),), total, dtype=torch.float64)
            arrived = torch.full((len(x),), float(reached.numel()), dtype=torch.float64)
            module = module_of(self.module, n)
            self.found.append(Weighted(name_of(n), "values", total, every, arrived, module))
        elif n.op == "call_function" and n.target in _PRODUCTS:
            self.uncounted.append(name_of(n))
        return out


class CountingRun(fx.Interpreter):
    """Runs the body of a converted network and counts.

    Attributes:
        found: a row for each layer with weights, in order of execution.
        spikes: by name of the layer of neurons: spikes ``[B, *]``, float64, over all rows.
        uncounted: operations that multiply values with each other, which no row counts.
    """

    def __init__(self, body: fx.GraphModule, batch: int) -> None:
        super().__init__(body)
        self.batch = batch
        self.found: list[Weighted] = []
        self.spikes: dict[str, Tensor] = {}
        self.uncounted: list[str] = []
        self.inside: dict[fx.Node, Any] = {}  # spikes in a value; absent: it is no such sum
        self.T = 1
        self._meta: dict[fx.Node, bool] = {}

    def start(self, *args: Any) -> Any:
        """The body's forward: rows of one run; call again for more."""
        self.inside.clear()
        self.T = args[-1]
        return self.run(*args)

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, and what it does to spikes."""
        out = super().run_node(n)
        module = module_of(self.module, n)
        if isinstance(module, SpikingActivation):
            self._neurons(n, module, out)
        elif _is_weighted(self.module, n):
            self._weights(n, module)
        elif n.op in ("call_module", "call_function", "call_method"):
            inside = None
            if not isinstance(out, Tensor):
                inside = self._moved(n, None) if n.target in _MOVES else None  # a list of parts
            elif not is_meta(n, self._meta):
                inside = self._inside(n, module, out)
            if inside is not None:
                self.inside[n] = inside
        for done in self.user_to_last_uses.get(n, ()):
            self.inside.pop(done, None)
        return out

    def _neurons(self, n: fx.Node, layer: SpikingActivation, out: Tensor) -> None:
        steps = layer.clock.steps
        events = layer.events(out, layer.clock.levels if steps.parallel else self.T).float()
        flat = steps.parallel or (layer.counts and not steps.whole)
        total = (events if flat else split_time(events, self.T).sum(0)).double()
        before = self.spikes.get(layer.label)
        self.spikes[layer.label] = total if before is None else before + total
        self.inside[n] = events

    def _weights(self, n: fx.Node, module: nn.Module | None) -> None:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        x = args[0] if args else kwargs["input"]
        source = n.args[0] if n.args else n.kwargs["input"]
        inside = self.inside.get(source) if isinstance(source, fx.Node) else None
        kind = "values" if inside is None else "spikes"
        many = (x != 0).float() if inside is None else inside
        reached = _reached(_linear_map(self.module, n, args, kwargs), x.shape[1:], x).double()
        many = split_time(many, self._rows(len(x))).sum(0).double()
        operations = (many * reached).flatten(1).sum(1).cpu()
        arrived = many.flatten(1).sum(1).cpu()
        total = float(reached.sum())
        self.found.append(Weighted(name_of(n), kind, total, operations, arrived, module))

    def _rows(self, length: int) -> int:
        """Rows in a value: one where it is constant in time."""
        return self.T if length == self.T * self.batch else 1

    def _moved(self, n: fx.Node, module: nn.Module | None) -> Any:
        """The same move on spikes; None unless every tensor that it reads is made of them."""
        if n.target is F.pad and n.kwargs.get("value", n.args[3] if n.args[3:] else None):
            return None  # what it puts around them is none
        whole = True

        def spikes(node: fx.Node) -> Any:
            nonlocal whole
            value = self.env[node]
            if node in self.inside:
                return self.inside[node]
            whole = whole and not _holds_tensor(value)
            return value

        args = fx.node.map_arg(n.args, spikes)
        kwargs = fx.node.map_arg(n.kwargs, spikes)
        if not whole:
            return None
        if module is not None:
            return module(*args, **kwargs)
        if n.op == "call_method":
            return getattr(args[0], n.target)(*args[1:], **kwargs)  # type: ignore[arg-type]
        return n.target(*args, **kwargs)  # type: ignore[operator]

    def _inside(self, n: fx.Node, module: nn.Module | None, out: Tensor) -> Tensor | None:
        sources = n.all_input_nodes
        known = [s for s in sources if s in self.inside]
        if n.op == "call_function" and n.target in _PRODUCTS:
            self.uncounted.append(name_of(n))
            return None
        if not known or isinstance(
            module, (CumulativeMaxPool, RunningMean, FromMeans, CountSpikes, Repeat, TimeShape)
        ):
            return None
        if isinstance(module, _MOVING) or (n.target in _MOVES and module is None):
            return self._moved(n, module)
        if isinstance(module, _MAX_POOLS):
            return self._moved(n, module)
        first = self.inside.get(known[0])
        if isinstance(module, _MEAN_POOLS) or (module is None and n.target in _MEAN_POOL_FUNCTIONS):
            # A spike in k windows is k spikes behind the pool.
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            if n.target in _ADAPTIVE:
                kwargs = {"output_size": args[1] if len(args) > 1 else kwargs["output_size"]}
            if not isinstance(first, Tensor) or first.dim() < 3:
                return None
            return _window_sums(first, module, args, kwargs)
        if module is None and n.target in _MEANS and isinstance(first, Tensor):
            mean = self._moved(n, None)
            if mean is None or n.target in (torch.sum, "sum"):
                return mean
            return mean * (first.numel() / mean.numel())
        tensors = [s for s in sources if _holds_tensor(self.env[s])]
        if module is None and n.target in _SUMS and len(known) == len(tensors):
            parts = [self.inside[s] for s in known]
            if known == [known[0]] and n.args.count(known[0]) == 2:
                parts = [parts[0], parts[0]]
            return parts[0] if len(parts) == 1 else parts[0] + parts[1]
        if module is None and n.target in _SCALES and len(known) == 1:
            others = [self.env[s] for s in tensors if s is not known[0]]
            constant = all(s.op == "get_attr" for s in tensors if s is not known[0])
            if constant and isinstance(first, Tensor):
                return first.expand_as(out) if not others else first.broadcast_to(out.shape)
        return None


def _window_sums(
    x: Tensor, module: nn.Module | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """The sum of each window of a mean-pool of ``x``, where the pool has the mean."""
    adaptive = module is None and "output_size" in kwargs
    if module is not None:
        adaptive = hasattr(module, "output_size")
        names = ("output_size",) if adaptive else ("kernel_size", "stride", "padding", "ceil_mode")
        given = {name: getattr(module, name) for name in names}
    else:
        names = ("kernel_size", "stride", "padding", "ceil_mode")
        given = {**dict(zip(names, args[1:], strict=False)), **kwargs}
    dims = x.dim() - 2
    if adaptive:
        return _adaptive_sums(x, given["output_size"], dims)

    def each(value: Any, dim: int) -> int:
        return value[dim] if isinstance(value, (tuple, list)) else value

    kernel = given["kernel_size"]
    stride, padding = given.get("stride") or kernel, given.get("padding", 0)
    for dim in range(dims):
        # A sum along one dimension after the other, as windows are boxes.
        x = x.movedim(2 + dim, -1)
        flat = x.reshape(1, -1, x.shape[-1]).unsqueeze(-2)
        flat = F.avg_pool2d(
            flat, (1, each(kernel, dim)), (1, each(stride, dim)), (0, each(padding, dim)),
            bool(given.get("ceil_mode", False)), divisor_override=1,
        )  # fmt: skip
        x = flat.reshape(*x.shape[:-1], flat.shape[-1]).movedim(-1, 2 + dim)
    return x


def _adaptive_sums(x: Tensor, size: Any, dims: int) -> Tensor:
    for dim in range(dims):
        out = size[dim] if isinstance(size, (tuple, list)) else size
        have = x.shape[2 + dim]
        out = have if out is None else out
        parts = [
            x.narrow(2 + dim, start, end - start).sum(2 + dim)
            for start, end in ((i * have // out, -(-(i + 1) * have // out)) for i in range(out))
        ]
        x = torch.stack(parts, 2 + dim)
    return x


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_holds_tensor(v) for v in value)
    return isinstance(value, Tensor)
