"""A converted network as a graph of NIR, thresholds folded into the weights between neurons."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..conversion.errors import ConversionError
from ..conversion.fold import ChannelAffine, _scale_and_shift
from ..conversion.network import ConvertedNetwork
from ..conversion.ops import MAX_POOL_MODULES, MAX_POOLS
from ..conversion.pools import CumulativeMaxPool
from ..conversion.spiking import CountSpikes, Repeat, SpikingActivation
from ..conversion.steps import CAUSAL
from ..kernels.backends import outside
from ..monitors import unwatched
from .nir_graph import Graph, Value, fail, nir_package
from .rates import not_plain

__all__ = ["to_nir"]

_AVG_POOL = (
    "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override",
)  # fmt: skip
_NO_MAX_POOL = "NIR has no max-pool; convert with maxpool='avg', or train with averages"
WARNING = (
    "NIR's IF resets to a value and fires above its threshold; these neurons reset by subtraction, "
    "fire at it and start at v_init, which is in the metadata of the nodes. A reader that ignores "
    "metadata gets another network (docs/nir.md)"
)


def to_nir(snn: ConvertedNetwork, example: Tensor, *, fold_thresholds: bool = True) -> Any:
    """A converted network as a ``nir.NIRGraph``; ``nir.write(path, graph)`` makes a file of it.

    Every step passes the whole graph; the answer is the mean of its output over the steps. Neurons
    are ``nir.IF`` with r = 1, v_reset = 0 and in their metadata ``reset="subtract"``, ``tie=">="``,
    ``v_init`` (in units of the threshold in the node) and ``T``. Sums are several edges into a
    node. :func:`from_nir` reads it back: with ``fold_thresholds=False``, or where thresholds are
    powers of two or were folded by ``convert(normalize="weights")``, the same spikes bit for bit;
    else up to the rounding of the folded weights. Networks in float16 or bfloat16 come back in
    float32, whose currents are rounded less: their spikes may differ.

    Args:
        snn: of :func:`snnkernels.convert`, its neurons plain (opi, qcfs, light, ltb, ...).
        example: one batch of inputs ``[B, *]``, to learn shapes from.
        fold_thresholds: every threshold is 1 and what a spike weighs is in the weights behind it,
            which all readers understand. False: thresholds stay in the nodes, and a ``nir.Scale``
            behind each says what its spikes weigh; weights stay as they are.

    Raises:
        ConversionError: NIR has no node for an operation (max-pools, concatenation, softmax, ...),
            or the method's neurons are no IF; names the node and the reason.
        ImportError: nir is not installed.
        TypeError: an argument is of the wrong type.
    """
    nir = nir_package()
    if not isinstance(snn, ConvertedNetwork):
        raise TypeError(f"snn must be a ConvertedNetwork, got {type(snn).__name__}")
    if not isinstance(example, Tensor):
        raise TypeError(f"example must be a tensor [B, *], got {type(example).__name__}")
    _refuse_methods(snn)
    graph = Graph(nir, fold_thresholds, snn.T, example.dtype)
    with unwatched(snn):
        answer = _read(snn, example, graph)
    names = graph.emit(answer, None)
    graph.add("output", nir.Output(output_type={"output": np.array(answer.shape)}), names)
    warnings.warn(WARNING, stacklevel=outside())
    about = {"source": "snnkernels", "T": snn.T, "method": snn.report.method}
    return nir.NIRGraph(graph.nodes, graph.edges, metadata=about)


def _refuse_methods(snn: ConvertedNetwork) -> None:
    of_all = None
    if snn._ports.packed:
        of_all = "it has several inputs"
    elif snn._clock.steps != CAUSAL:
        of_all = "its neurons do not run step by step"
    for name, layer in snn.neurons():
        reason = not_plain(layer, any_tie=True) or of_all
        if reason is not None:
            raise ConversionError(
                f"{name}: method {snn.report.method!r} cannot be written as NIR: {reason}. Convert "
                "by 'opi', 'qcfs', 'light' or another method of plain neurons"
            )


# ---- reading our graphs --------------------------------------------------------------------------


class _Shapes(fx.Interpreter):
    """Runs a graph and keeps every value's shape, or the value if it is no tensor."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.seen: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.seen[n] = value
        return value


@torch.no_grad()
def _read(snn: ConvertedNetwork, example: Tensor, graph: Graph) -> Value:
    """The values of prefix, body and suffix, on one step."""
    prefix: Any = snn.prefix
    source = Value("source", tuple(example.shape[1:]), name="input")
    graph.add("input", graph.nir.Input(input_type={"input": np.array(source.shape)}), [])
    runs = _Shapes(prefix)
    statics = runs.run(example)
    static = _values(prefix, [source], runs.seen, graph)
    snn.reset()
    try:
        runs = _Shapes(snn.body)
        counts = runs.run(*(statics[i] for i in snn._of_body), 1)
    finally:
        snn.reset()
    given = [static[i] for i in snn._of_body]
    fired = _values(snn.body, [*given, 1], runs.seen, graph)
    spikes, rates = [], []
    for path, value, count in zip(snn._counted, fired, counts, strict=True):
        layer = snn.body.get_submodule(path)
        assert isinstance(layer, SpikingActivation)
        rates.append(layer.rate(count, 1, example.dtype))
        if layer.scale is not None:  # behind the neurons spikes weigh what was folded
            weight = layer.scale.double()
            value = Value("spikes", value.shape, name=value.name, weight=weight)
        spikes.append(value)
    runs = _Shapes(snn.suffix)
    runs.run(*(statics[i] for i in snn._of_suffix), *rates)
    behind = [static[i] for i in snn._of_suffix]
    answer = _values(snn.suffix, [*behind, *spikes], runs.seen, graph)
    if not isinstance(answer, Value):
        raise ConversionError(
            "to_nir: the network has several outputs; NIR graphs of ours have one"
        )
    return answer


def _values(part: fx.GraphModule, given: list[Any], seen: dict[fx.Node, Any], to: Graph) -> Any:
    env: dict[fx.Node, Any] = {}
    inputs = iter(given)
    for node in part.graph.nodes:
        if node.op == "placeholder":
            env[node] = next(inputs)
        elif node.op == "output":
            return fx.node.map_arg(node.args[0], lambda n: env[n])
        elif not isinstance(seen[node], Tensor):
            env[node] = seen[node]  # a shape
        else:
            shape = tuple(seen[node].shape[1:])
            args = fx.node.map_arg(node.args, lambda n: env.get(n))
            kwargs = fx.node.map_arg(node.kwargs, lambda n: env.get(n))
            env[node] = _value(part, node, args, kwargs, shape, to)
    raise AssertionError("a graph without an output")


def _value(
    part: fx.GraphModule, node: fx.Node, args: Any, kwargs: Any, shape: tuple[int, ...], to: Graph
) -> Value:
    x: Any = args[0] if args else kwargs.get("input", next(iter(kwargs.values()), None))
    if node.op == "call_module":
        return _of_module(part.get_submodule(str(node.target)), node, x, shape, to)
    name = str(getattr(node.target, "__name__", node.target))
    if node.op == "get_attr":
        return Value("constant", shape)
    if not isinstance(x, Value) and not any(isinstance(a, Value) for a in args):
        raise fail(node, f"{name} has no node in NIR")
    other: Any = args[1] if len(args) > 1 else kwargs.get("other")
    if name in ("add", "iadd", "sub", "isub") and all(isinstance(v, Value) for v in (x, other)):
        if "constant" in (x.kind, other.kind) or x.shape != other.shape:
            raise fail(node, f"{name} of a constant or of two shapes has no node in NIR")
        _refuse_more(node, 2, ("input", "other", "alpha"))
        factor = float(kwargs.get("alpha", 1)) * (1.0 if "add" in name else -1.0)
        return Value("sum", shape, [x, other if factor == 1 else _times(other, factor)])
    if name in ("mul", "imul", "truediv", "div", "neg"):
        number: Any = -1.0 if name == "neg" else other if isinstance(x, Value) else x
        value = x if isinstance(x, Value) else other
        plain = isinstance(number, (int, float)) and isinstance(value, Value)
        if (plain and not math.isfinite(number)) or ("div" in name and number == 0):
            raise fail(node, f"{name} by {number} gives no numbers")
        if plain and (isinstance(x, Value) or name in ("mul", "imul")):
            _refuse_more(node, 2, ("input", "other"))
            return _times(value, 1 / number if "div" in name else float(number))
    if name in ("flatten", "view", "reshape") and math.prod(shape) != math.prod(x.shape):
        raise fail(node, f"{name} of {x.shape} to {shape} mixes the samples of a batch")
    if name in ("flatten", "view", "reshape") and len(shape) == 1:
        return _flat(x, shape)
    if name in ("contiguous", "flatten", "view", "reshape") and shape == x.shape:
        return x
    if name == "avg_pool2d":
        given = dict(zip(_AVG_POOL, args[1:], strict=False))
        given |= {k: v for k, v in kwargs.items() if k != "input"}
        pool = nn.AvgPool2d(**given)
        return _pool(pool, node, x, shape)
    if name == "adaptive_avg_pool2d":
        return _adaptive(node, x, shape)
    if name == "mean" and len(x.shape) == 3 and len(shape) in (1, 3):
        _refuse_more(node, 3, ("input", "dim", "keepdim"))
        dims: Any = args[1] if len(args) > 1 else kwargs.get("dim")
        if not isinstance(dims, (tuple, list)) or {d % 4 for d in dims} != {2, 3}:
            raise fail(node, f"mean over dimensions {dims} has no node in NIR, (2, 3) has")
        pooled = _adaptive(node, x, (x.shape[0], 1, 1))
        return pooled if len(shape) == 3 else _flat(pooled, shape)
    if node.target in MAX_POOLS or name.startswith(("max_pool", "adaptive_max")):
        raise fail(node, _NO_MAX_POOL)
    raise fail(node, f"{name} has no node in NIR")


def _refuse_more(node: fx.Node, most: int, names: tuple[str, ...]) -> None:
    """Refuse arguments that would be left out, and the numbers others."""
    more = [str(a) for a in node.args[most:]] + [k for k in node.kwargs if k not in names]
    if more:
        raise fail(node, f"its {', '.join(more)} has no place in NIR")


def _times(value: Value, factor: float) -> Value:
    return Value("times", value.shape, [value], weight=torch.tensor(factor, dtype=torch.float64))


def _flat(x: Value, shape: tuple[int, ...]) -> Value:
    return x if len(x.shape) == 1 else Value("flatten", shape, [x])


def _of_module(
    module: nn.Module, node: fx.Node, x: Any, shape: tuple[int, ...], to: Graph
) -> Value:
    if isinstance(module, SpikingActivation):
        return to.neurons(module, x, shape, node)
    if isinstance(module, (Repeat, CountSpikes, nn.Identity, nn.Dropout, nn.Dropout2d)):
        return x
    kind = type(module).__name__
    if isinstance(module, (CumulativeMaxPool, *MAX_POOL_MODULES)):
        raise fail(node, _NO_MAX_POOL)
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        if module.padding_mode != "zeros":
            raise fail(node, f"padding_mode={module.padding_mode!r} is not in NIR")
        names = ("stride", "padding", "dilation", "groups")
        options = {name: getattr(module, name) for name in names}
        return _layer(kind, module.weight, module.bias, x, shape, node, options)
    if isinstance(module, nn.Linear):
        if len(x.shape) != 1:
            raise fail(node, f"NIR's Affine takes a vector, not {x.shape}")
        return _layer("Linear", module.weight, module.bias, x, shape, node, {})
    if isinstance(module, (ChannelAffine, _BatchNorm)):
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise fail(node, f"{kind} without running statistics uses those of the batch")
        if isinstance(module, ChannelAffine):
            scale, shift = module.scale.detach(), module.shift.detach()
        else:
            dtype = torch.float64 if to.dtype == np.float64 else torch.float32
            scale, shift = (t.detach().to(dtype) for t in _scale_and_shift(module))
        if len(shape) == 1:
            return _layer("Linear", torch.diag(scale), shift, x, shape, node, {})
        rank = len(shape) - 1
        if rank not in (1, 2):
            raise fail(node, f"{kind} on {shape} has no node in NIR")
        weight = scale.view(-1, *(1,) * (rank + 1))  # one filter of size 1 for each channel
        one = {name: (n,) * rank for name, n in (("stride", 1), ("padding", 0), ("dilation", 1))}
        options = {**one, "groups": len(scale)}
        return _layer(f"Conv{rank}d", weight, shift, x, shape, node, options)
    if isinstance(module, nn.AvgPool2d):
        return _pool(module, node, x, shape)
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return _adaptive(node, x, shape)
    if isinstance(module, nn.Flatten) and shape == (math.prod(x.shape),):
        return _flat(x, shape)
    raise fail(node, f"{kind} has no node in NIR")


def _layer(
    kind: str, weight: Tensor, bias: Tensor | None, x: Value, shape: tuple[int, ...],
    node: fx.Node, options: dict[str, Any],
) -> Value:  # fmt: skip
    bias = None if bias is None else bias.detach()
    return Value(kind, shape, [x], str(node.target), weight.detach(), bias, options)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _pool(pool: nn.AvgPool2d, node: fx.Node, x: Value, shape: tuple[int, ...]) -> Value:
    padding = _pair(pool.padding)
    if pool.ceil_mode or pool.divisor_override or (any(padding) and not pool.count_include_pad):
        raise fail(
            node, "NIR's AvgPool2d has no ceil_mode, no divisor_override and counts its padding"
        )
    options = {"kernel_size": _pair(pool.kernel_size), "stride": _pair(pool.stride)}
    return Value("AvgPool2d", shape, [x], str(node.target), options={**options, "padding": padding})


def _adaptive(node: fx.Node, x: Value, shape: tuple[int, ...]) -> Value:
    size = [(i, o) for i, o in zip(x.shape[1:], shape[1:], strict=True)]
    if len(size) != 2 or any(i % o for i, o in size):
        raise fail(node, f"pooling {x.shape} to {shape} takes windows of several sizes")
    window = tuple(i // o for i, o in size)
    if window == (1, 1):
        return x
    options = {"kernel_size": window, "stride": window, "padding": (0, 0)}
    return Value("AvgPool2d", shape, [x], str(node.target), options=options)
