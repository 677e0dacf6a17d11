"""What an operation of the graph is: activation, max-pool, affine, or none of these."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from .activations import QCFS, ClipReLU, ThresholdReLU
from .activations_rates import RateNorm
from .fold import ChannelAffine
from .graphs import first_input, module_of

__all__ = [
    "MAX_POOLS",
    "TRAINED",
    "Activation",
    "activation_of",
    "max_pool_of",
    "why_not_affine",
]

# The activations that networks for conversion are trained with.
TRAINED = (ClipReLU, QCFS, ThresholdReLU, RateNorm)


class Activation(nn.Module):
    """One activation at one place of the network: what a spiking neuron will replace.

    Args:
        inner: computes the ANN's function, any shape to the same shape.
        label: the name users see (module path, or node name for functional calls).
    """

    def __init__(self, inner: nn.Module, label: str) -> None:
        super().__init__()
        self.inner = inner
        self.label = label

    @property
    def learned(self) -> Tensor | None:
        """The learned ceiling (``lam``), or None."""
        return self.inner.lam.detach() if isinstance(self.inner, (ClipReLU, QCFS)) else None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the ANN's activation."""
        return self.inner(x)


RELU = {F.relu, torch.relu}
CLAMP = {torch.clamp, torch.clip, torch.clamp_min}
MAX_POOLS: dict[Any, type[nn.Module]] = {
    F.max_pool1d: nn.MaxPool1d,
    F.max_pool2d: nn.MaxPool2d,
    F.max_pool3d: nn.MaxPool3d,
    torch.max_pool1d: nn.MaxPool1d,
    torch.max_pool2d: nn.MaxPool2d,
    torch.max_pool3d: nn.MaxPool3d,
    F.adaptive_max_pool1d: nn.AdaptiveMaxPool1d,
    F.adaptive_max_pool2d: nn.AdaptiveMaxPool2d,
    F.adaptive_max_pool3d: nn.AdaptiveMaxPool3d,
}
MAX_POOL_MODULES = tuple(dict.fromkeys(MAX_POOLS.values()))


def _clip(low: Any, high: Any) -> nn.Module | None:
    """``clamp(low, high)`` as ReLU or a ReLU with a ceiling, if it is one."""
    if isinstance(low, bool) or not isinstance(low, (int, float)) or low != 0:
        return None
    if high is None or high == float("inf"):
        return nn.ReLU()
    if isinstance(high, (int, float)) and high > 0:
        return nn.Hardtanh(0.0, float(high))
    return None


def _bound(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def activation_of(node: fx.Node, net: nn.Module) -> nn.Module | None:
    """The module that computes ``node``'s activation function, or None if it is not a ReLU kin."""
    target = node.target
    module = module_of(net, node)
    if module is not None:
        if isinstance(module, TRAINED):
            return module
        if isinstance(module, nn.Hardtanh):  # ReLU6 is one
            return _clip(module.min_val, module.max_val)
        if isinstance(module, nn.Threshold) and module.threshold == module.value == 0:
            return nn.ReLU()
        return nn.ReLU() if isinstance(module, nn.ReLU) else None
    name = target if node.op == "call_method" else None
    if target in RELU or name == "relu":
        return nn.ReLU()
    if target is F.relu6:
        return nn.Hardtanh(0.0, 6.0)
    if target is F.hardtanh:
        return _clip(_bound(node, 1, "min_val", -1.0), _bound(node, 2, "max_val", 1.0))
    if target in CLAMP or name in ("clamp", "clip", "clamp_min"):
        high = None if name == "clamp_min" else _bound(node, 2, "max")
        return _clip(_bound(node, 1, "min"), high)
    return None


def max_pool_of(node: fx.Node, net: nn.Module) -> nn.Module | None:
    """The max-pool module that computes ``node``, or None."""
    if node.op == "call_module":
        module = module_of(net, node)
        return module if isinstance(module, MAX_POOL_MODULES) else None
    if node.op == "call_function" and node.target in MAX_POOLS:
        kind = MAX_POOLS[node.target]
        if any(isinstance(a, fx.Node) for a in (*node.args[1:], *node.kwargs.values())):
            return None  # a window that depends on a shape stays a function
        kwargs = {k: v for k, v in node.kwargs.items() if k != "input"}
        return kind(*node.args[1:], **kwargs)
    return None


WEIGHTED_MODULES = (_ConvNd, nn.Linear, ChannelAffine)
# Homogeneous and without weights: scaled inputs give outputs in the same scale, per channel.
SCALE_FREE_MODULES = (
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.Flatten,
    nn.Upsample,
    nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd,
)
AFFINE_MODULES = (
    *WEIGHTED_MODULES,
    *SCALE_FREE_MODULES,
    _BatchNorm,
    nn.Unflatten,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
    nn.Fold,
    nn.Unfold,
    nn.modules.padding._ConstantPadNd,
    nn.modules.padding._CircularPadNd,
)
SUMS = {"add", "sub", "neg", "rsub"}
PRODUCTS = {"mul", "multiply", "matmul", "linear", "bilinear", "__matmul__", "bmm", "mm", "einsum"}
CONVOLUTIONS = {f"conv{n}d" for n in "123"} | {f"conv_transpose{n}d" for n in "123"}
QUOTIENTS = {"div", "truediv", "divide", "true_divide"}
# Linear maps whose dims must leave the batch (dim 0) alone: (position, keyword) of the dims.
WITH_DIMS: dict[str, tuple[int, str]] = {
    "mean": (1, "dim"),
    "sum": (1, "dim"),
    "cat": (1, "dim"),
    "concat": (1, "dim"),
    "concatenate": (1, "dim"),
    "stack": (1, "dim"),
    "chunk": (2, "dim"),
    "split": (2, "dim"),
    "squeeze": (1, "dim"),
    "unsqueeze": (1, "dim"),
    "flatten": (1, "start_dim"),
    "narrow": (1, "dim"),
    "unflatten": (1, "dim"),
    "select": (1, "dim"),
    "flip": (1, "dims"),
    "unbind": (1, "dim"),
    "tensor_split": (2, "dim"),
    "cumsum": (1, "dim"),
    "index_select": (1, "dim"),
    "roll": (2, "dims"),
    "repeat_interleave": (2, "dim"),
}
DEFAULT_DIM = {
    **{"cat": 0, "concat": 0, "concatenate": 0, "stack": 0},
    **{"chunk": 0, "split": 0, "unbind": 0, "tensor_split": 0},
}
WHOLE = ("mean", "sum", "roll", "repeat_interleave")  # without dims these take all dimensions
FREE = {
    *(f"avg_pool{n}d" for n in "123"),
    *(f"adaptive_avg_pool{n}d" for n in "123"),
    *("pad", "interpolate", "upsample", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
    *("fold", "unfold", "contiguous", "view", "reshape", "getitem", "batch_norm"),
    *("to", "type", "float", "double", "half", "bfloat16", "type_as", "permute", "transpose"),
    *("zero_pad2d", "swapaxes", "movedim", "expand", "expand_as", "view_as", "reshape_as"),
    # Constants in the shape of a value, and choices that the input or a constant makes.
    *("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"),
    *("where", "masked_fill"),
}
# Of these, (position, keyword) of what must not spike: it chooses.
CHOICES = {
    "where": (0, "condition"),
    "masked_fill": (1, "mask"),
    "index_select": (2, "index"),
    "repeat_interleave": (1, "repeats"),
}
ATTRIBUTES = {"mT", "data"}  # of a tensor, linear in it


def why_not_affine(node: fx.Node, net: nn.Module, varying: set[fx.Node]) -> str | None:
    """Why ``node`` may not run step by step between neurons; None if it may.

    ``varying`` holds the nodes whose value changes from step to step.
    """
    if (module := module_of(net, node)) is not None:
        kind = type(module).__name__
        if isinstance(module, nn.Flatten) and _from_front(node, module.start_dim) == 0:
            return "it mixes the batch dimension"
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            return f"{kind} without running statistics uses those of the batch"
        return None if isinstance(module, AFFINE_MODULES) else f"{kind} is not affine"
    name = str(getattr(node.target, "__name__", node.target))
    if node.target in MAX_POOLS:
        return "a max-pool whose window is computed cannot be placed; give it numbers"
    changing: list[fx.Node] = []  # as often as they occur: x * x has one input, but two values

    def note(n: fx.Node) -> fx.Node:
        if n in varying:
            changing.append(n)
        return n

    fx.node.map_arg((node.args, node.kwargs), note)
    if name in SUMS:
        return None
    if name in PRODUCTS or name in CONVOLUTIONS:
        return f"{name} of two values that spike is not linear" if len(changing) > 1 else None
    if name in QUOTIENTS:
        divisor = _bound(node, 1, "other")
        return "it divides by a value that spikes" if divisor in varying else None
    if name in CHOICES and _bound(node, *CHOICES[name]) in varying:
        return f"{name} by a value that spikes is not linear"
    if name in WITH_DIMS:
        return _dim_reason(node, name)
    if name == "getattr" and node.args[1] in ATTRIBUTES:
        return None
    if name == "repeat":
        return _repeat_reason(node)
    if name in ("permute", "transpose", "swapaxes", "movedim", "getitem"):
        return _order_reason(node, name)
    if name == "batch_norm" and _bound(node, 5, "training", False):
        return "batch_norm with training=True uses the statistics of the batch"
    return None if name in FREE else f"{name} is not affine"


def _from_front(node: fx.Node, dim: Any, added: int = 0) -> Any:
    """``dim`` of ``node``'s input counted from the front, if that is known."""
    source = next(iter(node.all_input_nodes), None)
    shape = None if source is None else source.meta.get("shape")
    if shape is None or not isinstance(dim, int) or dim >= 0:
        return dim
    return dim + len(shape) + added


def _dim_reason(node: fx.Node, name: str) -> str | None:
    where, keyword = WITH_DIMS[name]
    default = DEFAULT_DIM.get(name)
    dims = node.args[where:] if name == "flip" else _bound(node, where, keyword, default)
    if name in ("cat", "concat", "concatenate"):
        dims = node.kwargs.get("axis", dims)
    if name == "flatten" and dims is None:
        dims = 0
    if name in WHOLE and dims is None:
        return f"{name} over all dimensions mixes the batch"
    flat = dims if isinstance(dims, (tuple, list)) else [dims]
    if name == "flip" and len(flat) == 1 and isinstance(flat[0], (tuple, list)):
        flat = flat[0]
    added = 1 if name in ("stack", "unsqueeze") else 0
    if any(_from_front(node, d, added) == 0 for d in flat) or (name == "squeeze" and dims is None):
        return f"{name} over dimension 0 mixes the batch"
    return None


def _repeat_reason(node: fx.Node) -> str | None:
    times = node.args[1:] or tuple(node.kwargs.values())
    times = tuple(times[0]) if len(times) == 1 and isinstance(times[0], (tuple, list)) else times
    shape = first_input(node).meta.get("shape")
    added = shape is not None and len(times) > len(shape)
    return "repeat along dimension 0 mixes the batch" if added or times[0] != 1 else None


def _order_reason(node: fx.Node, name: str) -> str | None:
    if name == "getitem":
        index = node.args[1]
        source = node.args[0]
        if isinstance(source, fx.Node) and "tensor_list" in source.meta:
            return None
        first = index[0] if isinstance(index, tuple) and index else index
        whole = first == slice(None) or first is Ellipsis
        return None if whole else "indexing dimension 0 picks from the batch"
    moved = node.args[1:] if node.args[1:] else tuple(node.kwargs.values())
    if name == "permute":
        order = moved[0] if isinstance(moved[0], (tuple, list)) else moved
        first_dim = _from_front(node, order[0])
        return None if first_dim == 0 else "permute moves the batch dimension"
    dims = [d for m in moved for d in (m if isinstance(m, (tuple, list)) else [m])]
    touched = any(_from_front(node, d) == 0 for d in dims)
    return "it moves the batch dimension" if touched else None


def returns_list(node: fx.Node) -> bool:
    """Whether ``node`` returns several tensors (chunk, split, unbind, topk, ...)."""
    name = str(getattr(node.target, "__name__", node.target))
    several = ("chunk", "split", "unbind", "tensor_split", "topk", "sort")
    return node.op in ("call_function", "call_method") and name in several
