"""One rule for each operation: how it moves the bounds of what changes from step to step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from .errors import ConversionError
from .fold import ChannelAffine
from .graphs import module_of, name_of
from .interval_layers import (
    eps_of,
    growing,
    nearest,
    per_channel,
    signs,
    softmax,
    weighted,
    window_sum,
)
from .intervals import Bounds, added, affine, linear, step_pool
from .ops import MAX_POOL_MODULES

__all__ = ["IntervalInterpreter"]

# Elements are selected, moved or repeated: the six numbers go along.
MOVES = {
    *("flatten", "view", "reshape", "permute", "transpose", "swapaxes", "movedim", "unsqueeze"),
    *("squeeze", "getitem", "chunk", "split", "narrow", "select", "flip", "unflatten", "expand"),
    *("contiguous", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "unfold", "clone"),
    *("zero_pad2d", "repeat", "repeat_interleave", "roll", "unbind", "tensor_split"),
    "index_select",
}
MOVING_ATTRIBUTES = {"T", "mT", "H", "mH", "data", "real"}  # H and real: of real numbers
MOVING_MODULES = (
    nn.Flatten,
    nn.Unflatten,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
    nn.Unfold,
    nn.Identity,
    nn.modules.dropout._DropoutNd,
    nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd,
    nn.modules.padding._CircularPadNd,
)
AVERAGES = (
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
)
SUMMING = {
    *(f"avg_pool{n}d" for n in "123"),
    *(f"adaptive_avg_pool{n}d" for n in "123"),
    *("mean", "sum"),
}
JOINS = {"cat", "concat", "concatenate", "stack"}
GROWING = {"sigmoid", "tanh"}  # monotone, where only one step is left: on rates


class IntervalInterpreter(fx.Interpreter):
    """Runs a graph on :class:`Bounds`; what does not change from step to step stays a tensor.

    Rows of time are not laid out: shapes are those of one step.

    Args:
        module: the graph.
        T: number of steps.
        dtype: of the network.
    """

    def __init__(self, module: fx.GraphModule, T: int, dtype: torch.dtype) -> None:
        super().__init__(module)
        self.extra_traceback = False  # an error names the node itself
        self.T, self.dtype, self.eps = T, dtype, eps_of(dtype)
        self.last_linear: dict[fx.Node, tuple[nn.Linear, Bounds]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """``n`` by its rule, or as it is where nothing it takes changes."""
        if n.op not in ("call_module", "call_function", "call_method"):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        args, kwargs = tuple(args), dict(kwargs)
        module = module_of(self.module, n)
        if module is not None and (own := self.own_module(n, module, args)) is not NotImplemented:
            return own
        if not _holds_bounds((args, kwargs)):
            return super().run_node(n)
        if module is not None:
            return self.module_rule(n, module, args[0] if args else next(iter(kwargs.values())))
        name = str(getattr(n.target, "__name__", n.target))
        return self.function_rule(n, name, args, kwargs)

    def own_module(self, n: fx.Node, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """For modules that only a subclass knows."""
        return NotImplemented

    def classifier(self) -> tuple[nn.Linear, Bounds, float] | None:
        """The last linear layer if its largest output is the answer's, its input, and how much
        larger it has to be, relative, for rounding behind it not to matter."""
        node = next(n for n in self.graph.nodes if n.op == "output").args[0]
        room = 0.0
        if isinstance(node, fx.Node) and node not in self.last_linear:
            name = str(getattr(node.target, "__name__", node.target))
            module = module_of(self.module, node)
            if isinstance(module, nn.LogSoftmax):
                dim: Any = module.dim
            else:
                dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
            known = name == "log_softmax" or isinstance(module, nn.LogSoftmax)
            if known and dim in (1, -1):  # of [B, C]: each row minus its own number
                node, room = node.all_input_nodes[0], 32 * self.eps
        found = self.last_linear.get(node) if isinstance(node, fx.Node) else None
        return None if found is None else (*found, room)

    def refuse(self, n: fx.Node, what: str, why: str = "has no rule for intervals") -> Any:
        """Raise for an operation without a rule."""
        raise ConversionError(
            f"certify: {name_of(n)} ({what}) {why}. Operations with a rule: convolutions, linear "
            "layers, batch norms, sums, products with constants, concatenation, average and "
            "max-pools, reshaping, and on rates softmax, log_softmax, sigmoid, tanh"
        )

    def module_rule(self, n: fx.Node, module: nn.Module, x: Bounds) -> Any:
        """A module whose input changes."""
        if isinstance(module, (nn.Linear, _ConvNd)):
            if type(module).forward not in _PLAIN_FORWARDS:
                return self.refuse(n, type(module).__name__, "has a forward of its own")
            if isinstance(module, nn.Linear):
                self.last_linear[n] = (module, x)
            return weighted(module, x, self.eps)
        if isinstance(module, ChannelAffine):
            return per_channel(x, module.scale, module.shift, module.shift, self.eps)
        if isinstance(module, _BatchNorm):
            return self._batch_norm(n, module, x)
        if isinstance(module, MOVING_MODULES):
            return x.map(module)
        if isinstance(module, AVERAGES):
            return linear(x, module, _spatial(x), self.eps)
        if isinstance(module, MAX_POOL_MODULES):
            return step_pool(x, module, window_sum(module))
        if isinstance(module, nn.Upsample):
            return self._interpolate(n, x, module.mode, module)
        if isinstance(module, nn.modules.padding._ConstantPadNd):
            return self._padded(n, x, module, module.value)
        if isinstance(module, (nn.Softmax, nn.LogSoftmax)) and x.T == 1 and module.dim is not None:
            return softmax(x, module.dim, isinstance(module, nn.LogSoftmax), self.eps)
        if isinstance(module, (nn.Sigmoid, nn.Tanh)) and x.T == 1:
            return growing(x, module, self.eps)
        return self.refuse(n, type(module).__name__)

    def function_rule(
        self, n: fx.Node, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A function or method of which some argument changes."""
        # Without positions, what changes may be any of the keywords.
        key = "" if args else next(k for k, v in kwargs.items() if _holds_bounds(v))
        first = args[0] if args else kwargs[key]
        rest = {k: v for k, v in kwargs.items() if k != key}

        def again(x: Tensor) -> Any:
            """The same call on one of the six tensors."""
            if n.op == "call_method":
                return getattr(x, name)(*args[1:], **kwargs)
            if args:
                return n.target(x, *args[1:], **kwargs)  # type: ignore[operator]
            return n.target(**rest, **{key: x})  # type: ignore[operator]

        if name in JOINS:
            return self._joined(n, args, kwargs)
        if name in ("add", "sub", "rsub", "mul", "multiply", "div", "divide", "truediv"):
            return self._arithmetic(n, name, args, kwargs)
        if name == "true_divide":
            return self._arithmetic(n, "div", args, kwargs)
        if name in ("matmul", "linear", "__matmul__"):
            return self._product(n, name, args, kwargs)
        if name == "getitem" and not isinstance(first, Bounds):
            return first[args[1]]
        if not isinstance(first, Bounds) or _holds_bounds((args[1:], rest)):
            return self.refuse(n, name)
        for given in (*args, *kwargs.values()):
            if isinstance(given, torch.dtype) and not self._as_exact(given):
                return self.refuse(n, name, f"computes in {given}, less exact than {self.dtype}")
        if name == "getattr":
            return self._attribute(n, first, args[1])
        if name in ("size", "dim"):
            return again(first.low)
        if name == "neg":
            return first.negated()
        if name in MOVES:
            return first.map(again)
        if name in SUMMING:
            summed = first.low.numel() // max(1, again(first.low).numel())
            terms = summed if name in ("mean", "sum") else _spatial(first)
            return linear(first, again, terms, self.eps)
        if name in ("interpolate", "upsample"):
            mode = kwargs.get("mode", args[3] if len(args) > 3 else "nearest")
            return self._interpolate(n, first, mode, again)
        if name == "pad":
            mode = kwargs.get("mode", args[2] if len(args) > 2 else "constant")
            value = kwargs.get("value", args[3] if len(args) > 3 else 0) or 0
            return first.map(again) if mode != "constant" else self._padded(n, first, again, value)
        if name in ("softmax", "log_softmax") and first.T == 1:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if dim is not None:
                return softmax(first, dim, name == "log_softmax", self.eps)
        if name in GROWING and first.T == 1:
            return growing(first, again, self.eps)
        return self.refuse(n, name)

    def _batch_norm(self, n: fx.Node, module: _BatchNorm, x: Bounds) -> Bounds:
        if module.training or module.running_mean is None or module.running_var is None:
            return self.refuse(n, type(module).__name__, "uses the statistics of the batch")
        scale = torch.rsqrt(module.running_var.double() + module.eps)
        scale = scale if module.weight is None else scale * module.weight.double()
        shift, around = -module.running_mean.double() * scale, module.running_mean.double() * scale
        around = around.abs()
        if module.bias is not None:
            shift, around = shift + module.bias.double(), around + module.bias.double().abs()
        return per_channel(x, scale, shift, around, self.eps)

    def _joined(self, n: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bounds:
        rest = dict(kwargs)
        tensors = args[0] if args else rest.pop("tensors")
        all_of = [self._changing(t) for t in tensors]
        parts = [
            n.target([b.parts[i] for b in all_of], *args[1:], **rest)  # type: ignore[operator]
            for i in range(6)
        ]
        return Bounds.of(parts, self.T)

    def _as_exact(self, dtype: torch.dtype) -> bool:
        return dtype.is_floating_point and eps_of(dtype) <= self.eps

    def _attribute(self, n: fx.Node, x: Bounds, name: str) -> Any:
        if name in MOVING_ATTRIBUTES:
            return x.map(lambda part: getattr(part, name))
        if name in ("shape", "ndim", "device"):
            return getattr(x.low, name)
        return self.dtype if name == "dtype" else self.refuse(n, f"getattr, {name!r}")

    def _changing(self, value: Any) -> Bounds:
        return value if isinstance(value, Bounds) else Bounds.held(torch.as_tensor(value), self.T)

    def _arithmetic(
        self, n: fx.Node, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if len(args) != 2 or kwargs:
            return self.refuse(n, name, "with keywords has no rule for intervals")
        a, b = args
        if name in ("add", "sub", "rsub"):
            a, b = self._changing(a), self._changing(b)
            if name == "rsub":
                a, b = b, a
            return added(a, b if name == "add" else b.negated(), self.eps)
        if name in ("mul", "multiply"):
            a, b = (b, a) if isinstance(b, Bounds) else (a, b)
        if isinstance(b, Bounds):
            return self.refuse(n, name, "of two values that change has no rule for intervals")
        factor = torch.as_tensor(b).double()
        factor = 1 / factor if name in ("div", "divide", "truediv") else factor
        if not bool(factor.isfinite().all()):
            return self.refuse(n, name, "with a factor that is not finite has no bounds")
        up, down = signs(factor)
        return affine(a, lambda part: part * up, lambda part: part * down, None, 2, self.eps)

    def _product(self, n: fx.Node, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = ("input", "weight", "bias") if name == "linear" else ("input", "other")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x, weight, bias = given["input"], given[names[1]], given.get("bias")
        if not isinstance(x, Bounds) or _holds_bounds((weight, bias)):
            return self.refuse(n, name, "with a value that changes on the right has no rule")
        if name == "linear":
            weight = weight.t()
        if weight.dim() > 2:
            return self.refuse(n, name, "with a batch of matrices has no rule for intervals")
        up, down = signs(weight)
        return affine(x, lambda r: r @ up, lambda r: r @ down, bias, weight.shape[0] + 1, self.eps)

    def _interpolate(
        self, n: fx.Node, x: Bounds, mode: str, function: Callable[[Tensor], Tensor]
    ) -> Any:
        if mode in ("nearest", "nearest-exact"):
            return nearest(x, function, self.dtype)
        if mode not in ("linear", "bilinear", "trilinear", "area"):
            return self.refuse(n, f"interpolate, mode={mode!r}")
        # Positions are rounded too: in terms of a step, by the index they multiply.
        return linear(x, function, 8 + _spatial(x), self.eps)

    def _padded(
        self, n: fx.Node, x: Bounds, function: Callable[[Tensor], Tensor], value: float
    ) -> Any:
        if value != 0:
            return self.refuse(n, f"pad, value={value}")
        return x.map(function)


def _spatial(x: Bounds) -> int:
    """Positions of a channel: the most an average can take in."""
    return max(1, math.prod(x.low.shape[2:]))


def _holds_bounds(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_bounds, value.values()))
    if isinstance(value, (tuple, list)):
        return any(map(_holds_bounds, value))
    return isinstance(value, Bounds)


_PLAIN_FORWARDS = {
    c.forward
    for c in (
        nn.Linear,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
    )
}
