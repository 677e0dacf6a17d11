"""A converted network as a graph of NIR, thresholds folded into the weights between neurons."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
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
from .rates import not_plain

__all__ = ["nir_package", "to_nir"]

WARNING = (
    "NIR's IF resets to a value and fires above its threshold; these neurons reset by subtraction, "
    "fire at it and start at v_init, which is in the metadata of the nodes. A reader that ignores "
    "metadata gets another network (docs/nir.md)"
)


def nir_package() -> Any:
    """The package nir."""
    try:
        import nir
    except ImportError as error:
        raise ImportError("NIR graphs need nir: pip install 'snnkernels[nir]'") from error
    return nir


@dataclass(eq=False)
class _Value:
    """Something in the graph: ``shape`` without the batch, ``inputs`` it is made of."""

    kind: str
    shape: tuple[int, ...]
    inputs: list[_Value] = field(default_factory=list)
    name: str = ""
    weight: Tensor | None = None  # of layers; of spikes and factors what they weigh
    bias: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)


def to_nir(snn: ConvertedNetwork, example: Tensor, *, fold_thresholds: bool = True) -> Any:
    """A converted network as a ``nir.NIRGraph``; ``nir.write(path, graph)`` makes a file of it.

    Every step passes the whole graph; the answer is the mean of its output over the steps. Neurons
    are ``nir.IF`` with r = 1, v_reset = 0 and in their metadata ``reset="subtract"``, ``tie=">="``,
    ``v_init`` (in units of the threshold in the node) and ``T``. Sums are several edges into a
    node. :func:`from_nir` reads it back: with ``fold_thresholds=False``, or where thresholds are
    powers of two or were folded by ``convert(normalize="weights")``, the same spikes bit for bit;
    else up to the rounding of the folded weights.

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
    graph = _Graph(nir, fold_thresholds, snn.T)
    answer = _read(snn, example, graph)
    names = graph.emit(answer, None)
    graph.add("output", nir.Output(output_type={"output": np.array(answer.shape)}), names)
    warnings.warn(WARNING, stacklevel=2)
    about = {"source": "snnkernels", "T": snn.T, "method": snn.report.method}
    return nir.NIRGraph(graph.nodes, graph.edges, metadata=about)


def _refuse_methods(snn: ConvertedNetwork) -> None:
    for name, layer in snn.neurons():
        reason = not_plain(layer, any_tie=True)
        if reason is not None or snn._clock.steps != CAUSAL or snn._ports.packed:
            reason = reason or (
                "it has several inputs"
                if snn._ports.packed
                else "its neurons do not run step by step"
            )
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
def _read(snn: ConvertedNetwork, example: Tensor, graph: _Graph) -> _Value:
    """The values of prefix, body and suffix, on one step."""
    prefix: Any = snn.prefix
    source = _Value("source", tuple(example.shape[1:]), name="input")
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
    spikes = list(_values(snn.body, [*given, 1], runs.seen, graph))
    rates = []
    for path, value, count in zip(snn._counted, list(spikes), counts, strict=True):
        layer = snn.body.get_submodule(path)
        assert isinstance(layer, SpikingActivation)
        rates.append(layer.rate(count, 1, example.dtype))
        if layer.scale is not None:  # behind the neurons spikes weigh what was folded
            spikes[len(rates) - 1] = _Value(
                "spikes", value.shape, name=value.name, weight=layer.scale.double()
            )
    runs = _Shapes(snn.suffix)
    runs.run(*(statics[i] for i in snn._of_suffix), *rates)
    behind = [static[i] for i in snn._of_suffix]
    answer = _values(snn.suffix, [*behind, *spikes], runs.seen, graph)
    if not isinstance(answer, _Value):
        raise ConversionError(
            "to_nir: the network has several outputs; NIR graphs of ours have one"
        )
    return answer


def _values(part: fx.GraphModule, given: list[Any], seen: dict[fx.Node, Any], to: _Graph) -> Any:
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


def _fail(node: fx.Node, why: str) -> ConversionError:
    name = node.target if node.op == "call_module" else node.name
    return ConversionError(f"{name} cannot be written as NIR: {why}")


def _value(
    part: fx.GraphModule, node: fx.Node, args: Any, kwargs: Any, shape: tuple[int, ...], to: _Graph
) -> _Value:
    x: Any = args[0] if args else next(iter(kwargs.values()), None)
    if node.op == "call_module":
        return _of_module(part.get_submodule(str(node.target)), node, x, shape, to)
    name = str(getattr(node.target, "__name__", node.target))
    if node.op == "get_attr":
        return _Value("constant", shape)
    if not isinstance(x, _Value) and not any(isinstance(a, _Value) for a in args):
        raise _fail(node, f"{name} has no node in NIR")
    other: Any = args[1] if len(args) > 1 else kwargs.get("other")
    if name in ("add", "iadd", "sub", "isub") and all(isinstance(v, _Value) for v in (x, other)):
        if "constant" in (x.kind, other.kind) or x.shape != other.shape:
            raise _fail(node, f"{name} of a constant or of two shapes has no node in NIR")
        second = other if "add" in name else _times(other, -1.0)
        return _Value("sum", shape, [x, second])
    if name in ("mul", "imul", "truediv", "div", "neg"):
        number: Any = -1.0 if name == "neg" else other if isinstance(x, _Value) else x
        value = x if isinstance(x, _Value) else other
        plain = isinstance(number, (int, float)) and isinstance(value, _Value)
        if plain and (isinstance(x, _Value) or name in ("mul", "imul")):
            return _times(value, 1 / number if "div" in name else float(number))
    if name in ("flatten", "view", "reshape") and len(shape) == 1:
        return _flat(x, shape)
    if name in ("contiguous", "flatten", "view", "reshape") and shape == x.shape:
        return x
    if name == "avg_pool2d":
        given = dict(
            zip(("kernel_size", "stride", "padding", "ceil_mode"), args[1:5], strict=False)
        )
        given |= {k: v for k, v in kwargs.items() if k != "input"}
        pool = nn.AvgPool2d(**given)
        return _pool(pool, node, x, shape)
    if name == "adaptive_avg_pool2d":
        return _adaptive(node, x, shape)
    if name == "mean" and len(x.shape) == 3 and shape in (x.shape[:1], (x.shape[0], 1, 1)):
        pooled = _adaptive(node, x, (x.shape[0], 1, 1))
        return pooled if len(shape) == 3 else _flat(pooled, shape)
    if node.target in MAX_POOLS or name.startswith(("max_pool", "adaptive_max")):
        raise _fail(node, "NIR has no max-pool; convert with maxpool='avg', or train with averages")
    raise _fail(node, f"{name} has no node in NIR")


def _times(value: _Value, factor: float) -> _Value:
    return _Value("times", value.shape, [value], weight=torch.tensor(factor, dtype=torch.float64))


def _flat(x: _Value, shape: tuple[int, ...]) -> _Value:
    return x if len(x.shape) == 1 else _Value("flatten", shape, [x])


def _of_module(
    module: nn.Module, node: fx.Node, x: Any, shape: tuple[int, ...], to: _Graph
) -> _Value:
    if isinstance(module, SpikingActivation):
        return to.neurons(module, x, shape, node)
    if isinstance(module, (Repeat, CountSpikes, nn.Identity, nn.Dropout, nn.Dropout2d)):
        return x
    kind = type(module).__name__
    if isinstance(module, (CumulativeMaxPool, *MAX_POOL_MODULES)):
        raise _fail(node, "NIR has no max-pool; convert with maxpool='avg', or train with averages")
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        if module.padding_mode != "zeros":
            raise _fail(node, f"padding_mode={module.padding_mode!r} is not in NIR")
        names = ("stride", "padding", "dilation", "groups")
        options = {name: getattr(module, name) for name in names}
        return _layer(kind, module.weight, module.bias, x, shape, node, options)
    if isinstance(module, nn.Linear):
        if len(x.shape) != 1:
            raise _fail(node, f"NIR's Affine takes a vector, not {x.shape}")
        return _layer("Linear", module.weight, module.bias, x, shape, node, {})
    if isinstance(module, (ChannelAffine, _BatchNorm)):
        scale, shift = (
            (module.scale, module.shift)
            if isinstance(module, ChannelAffine)
            else _scale_and_shift(module)
        )
        dtype = scale.dtype if isinstance(module, ChannelAffine) else torch.float32
        scale, shift = scale.detach().to(dtype), shift.detach().to(dtype)
        if len(shape) == 1:
            return _layer("Linear", torch.diag(scale), shift, x, shape, node, {})
        rank = len(shape) - 1
        if rank not in (1, 2):
            raise _fail(node, f"{kind} on {shape} has no node in NIR")
        weight = scale.view(-1, *(1,) * (rank + 1))  # one filter of size 1 for each channel
        one = {name: (n,) * rank for name, n in (("stride", 1), ("padding", 0), ("dilation", 1))}
        options = {**one, "groups": len(scale)}
        return _layer(f"Conv{rank}d", weight, shift, x, shape, node, options)
    if isinstance(module, nn.AvgPool2d):
        return _pool(module, node, x, shape)
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return _adaptive(node, x, shape)
    if isinstance(module, nn.Flatten) and len(shape) == 1:
        return _flat(x, shape)
    raise _fail(node, f"{kind} has no node in NIR")


def _layer(
    kind: str, weight: Tensor, bias: Tensor | None, x: _Value, shape: tuple[int, ...],
    node: fx.Node, options: dict[str, Any],
) -> _Value:  # fmt: skip
    bias = None if bias is None else bias.detach()
    return _Value(kind, shape, [x], str(node.target), weight.detach(), bias, options)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _pool(pool: nn.AvgPool2d, node: fx.Node, x: _Value, shape: tuple[int, ...]) -> _Value:
    padding = _pair(pool.padding)
    if pool.ceil_mode or pool.divisor_override or (any(padding) and not pool.count_include_pad):
        raise _fail(
            node, "NIR's AvgPool2d has no ceil_mode, no divisor_override and counts its padding"
        )
    options = {"kernel_size": _pair(pool.kernel_size), "stride": _pair(pool.stride)}
    return _Value(
        "AvgPool2d", shape, [x], str(node.target), options={**options, "padding": padding}
    )


def _adaptive(node: fx.Node, x: _Value, shape: tuple[int, ...]) -> _Value:
    size = [(i, o) for i, o in zip(x.shape[1:], shape[1:], strict=True)]
    if len(size) != 2 or any(i % o for i, o in size):
        raise _fail(node, f"pooling {x.shape} to {shape} takes windows of several sizes")
    window = tuple(i // o for i, o in size)
    if window == (1, 1):
        return x
    options = {"kernel_size": window, "stride": window, "padding": (0, 0)}
    return _Value("AvgPool2d", shape, [x], str(node.target), options=options)


# ---- writing NIR ---------------------------------------------------------------------------------


class _Graph:
    """Nodes and edges; values are written when it is known in what units they are wanted."""

    def __init__(self, nir: Any, fold: bool, T: int) -> None:
        self.nir, self.fold, self.T = nir, fold, T
        self.nodes: dict[str, Any] = {}
        self.edges: list[tuple[str, str]] = []
        self._made: dict[tuple[_Value, str], list[str]] = {}

    def add(self, wanted: str, node: Any, inputs: list[str]) -> str:
        """Put a node in, under a name of its own."""
        plain = re.sub(r"[^A-Za-z0-9_]", "_", wanted)
        if not plain or not plain[0].isalpha():
            plain = f"node_{plain}"  # readers make them names of attributes and variables
        name, count = plain, 1
        while name in self.nodes:
            count += 1
            name = f"{plain}_{count}"
        self.nodes[name] = node
        for source in dict.fromkeys(inputs):
            times = inputs.count(source)
            if times > 1:  # an edge says something once
                shape = node.input_type["input"]
                source = self.add(f"{source}_x{times}", self._scale(times, shape), [source])
            self.edges.append((source, name))
        return name

    def _scale(self, value: Any, shape: Any) -> Any:
        full = np.broadcast_to(np.asarray(value, dtype=np.float32), tuple(map(int, shape)))
        return self.nir.Scale(scale=np.array(full))

    def emit(self, value: _Value, scale: Tensor | None) -> list[str]:
        """Names of nodes whose sum is ``value * scale``; ``scale``: None, scalar or ``[C]``."""
        if scale is not None and bool((scale == 1).all()):
            scale = None
        key = (value, "" if scale is None else str(scale.tolist()))
        if key not in self._made:
            self._made[key] = self._emit(value, scale)
        return self._made[key]

    def _emit(self, value: _Value, scale: Tensor | None) -> list[str]:
        kind = value.kind
        if kind in ("source", "spikes"):
            weight = _product(value.weight, scale)
            if weight is None or bool((weight == 1).all()):
                return [value.name]
            full = np.asarray(_spread(weight, value.shape).float())
            return [self.add(f"{value.name}_scale", self.nir.Scale(scale=full), [value.name])]
        if kind == "sum":
            return [name for part in value.inputs for name in self.emit(part, scale)]
        if kind == "times":
            return self.emit(value.inputs[0], _product(value.weight, scale))
        if kind == "constant":
            raise ConversionError("to_nir: a constant meets the values of a step; NIR has none")
        if kind == "flatten" and scale is not None and scale.dim():
            names = self.emit(value, None)
            full = np.asarray(scale.float().numpy())
            return [self.add("flatten_scale", self.nir.Scale(scale=full), names)]
        if kind in ("flatten", "AvgPool2d"):
            return [self._shaped(value, self.emit(value.inputs[0], scale))]
        return [self._weighted(value, scale)]

    def supply(self, value: _Value) -> tuple[list[str], Tensor | None]:
        """Nodes whose sum times the scale is ``value``, in the units that they come in."""
        if not self.fold or value.kind not in ("spikes", "times", "flatten", "AvgPool2d"):
            return self.emit(value, None), None
        if value.kind == "spikes":
            return [value.name], value.weight
        names, scale = self.supply(value.inputs[0])
        if value.kind == "times":
            return names, _product(value.weight, scale)
        if value.kind == "flatten" and scale is not None and scale.dim():
            scale = _spread(scale, value.inputs[0].shape).flatten()
        key = (value, "supplied")
        if key not in self._made:
            self._made[key] = [self._shaped(value, names)]
        return self._made[key], scale

    def _shaped(self, value: _Value, names: list[str]) -> str:
        if value.kind == "flatten":
            before = {"input": np.array(value.inputs[0].shape)}
            return self.add("flatten", self.nir.Flatten(before, start_dim=0, end_dim=-1), names)
        options = {name: np.array(pair) for name, pair in value.options.items()}
        pool = self.nir.AvgPool2d(**options)
        pool.input_type = {"input": np.array(value.inputs[0].shape)}
        pool.output_type = {"output": np.array(value.shape)}
        return self.add(value.name, pool, names)

    def _weighted(self, value: _Value, out: Tensor | None) -> str:
        names, into = self.supply(value.inputs[0])
        weight, bias, linear = value.weight, value.bias, value.kind == "Linear"
        assert weight is not None
        dtype, groups = weight.dtype, value.options.get("groups", 1)
        if into is not None or out is not None:
            wide = weight.double().cpu()
            if into is not None:
                columns = into.double().cpu().expand(weight.shape[1] * groups)
                split = wide.view(groups, -1, *weight.shape[1:])
                shape = (groups, 1, weight.shape[1], *(1,) * (weight.dim() - 2))
                wide = (split * columns.reshape(shape)).view(weight.shape)
            if out is not None:
                rows = out.double().cpu().expand(len(weight))
                wide = wide * rows.view(-1, *(1,) * (weight.dim() - 1))
                bias = None if bias is None else (bias.double().cpu() * rows).to(dtype)
            weight = wide.to(dtype)
        given = np.asarray(_floats(weight))
        offset = None if bias is None else np.asarray(_floats(bias))
        if linear:
            node = (
                self.nir.Linear(weight=given)
                if offset is None
                else self.nir.Affine(weight=given, bias=offset)
            )
            return self.add(value.name, node, names)
        options = dict(value.options)
        spatial = value.inputs[0].shape[1:]
        if value.kind == "Conv1d":
            options = {k: v[0] if isinstance(v, tuple) else v for k, v in options.items()}
            size: Any = int(spatial[0])
        else:
            size = tuple(map(int, spatial))
        offset = np.zeros(len(weight), dtype=given.dtype) if offset is None else offset
        make = getattr(self.nir, value.kind)
        node = make(input_shape=size, weight=given, bias=offset, **options)
        # nir takes the channels of the filter for those of the input; grouped ones have fewer.
        node.input_type = {"input": np.array(value.inputs[0].shape)}
        node.output_type = {"output": np.array(value.shape)}
        return self.add(value.name, node, names)

    def neurons(
        self, layer: SpikingActivation, x: _Value, shape: tuple[int, ...], node: fx.Node
    ) -> _Value:
        """A layer of neurons on the current ``x``."""
        inner = layer.node
        theta = torch.as_tensor(inner.threshold).detach().double().cpu()
        start = 0.5 * theta if isinstance(inner.v_init, str) else torch.as_tensor(inner.v_init)
        start = start.detach().double().cpu()
        weight = inner.amplitude
        weight = (
            theta if isinstance(weight, str) else torch.as_tensor(1.0 if weight is None else weight)
        )
        weight = weight.detach().double().cpu()
        if layer.channel_dim != 1 and any(
            t.dim() == 1 and t.numel() > 1 for t in (theta, start, weight)
        ):
            raise _fail(node, "its thresholds are not along the first dimension of a sample")
        if inner.bias is not None:
            x = _with_bias(x, torch.as_tensor(inner.bias).detach().cpu(), node)
        fold = self.fold and theta.dim() < 2
        names = self.emit(x, 1 / theta if fold else None)
        if fold:
            start = (
                _spread(start, shape) / _spread(theta, shape) if start.dim() > 1 else start / theta
            )
            theta = torch.ones(())
        state = (
            np.float64 if (x.weight is not None and x.weight.dtype == torch.float64) else np.float32
        )
        full = {
            n: np.array(_spread(t, shape).numpy(), dtype=state)
            for n, t in (("v", theta), ("s", start))
        }
        # One number where one holds for all: files have no arrays without dimensions.
        same = not full["s"].size or np.ptp(full["s"]) == 0
        v_init: Any = float(full["s"].reshape(-1)[0]) if full["s"].size and same else full["s"]
        about = {
            "source": "snnkernels",
            "reset": "subtract",
            "tie": inner.tie,
            "v_init": v_init,
            "T": self.T,
            "label": layer.label,
        }
        spiking = self.nir.IF(
            r=np.ones(shape, dtype=state),
            v_threshold=full["v"],
            v_reset=np.zeros(shape, dtype=state),
            metadata=about,
        )
        name = self.add(layer.label, spiking, names)
        return _Value("spikes", shape, name=name, weight=weight)


def _with_bias(x: _Value, bias: Tensor, node: fx.Node) -> _Value:
    """``x`` with the neurons' own bias in the layer before them."""
    if x.kind == "sum":
        for i, part in enumerate(x.inputs):
            if part.kind in ("Conv1d", "Conv2d", "Linear"):
                new = [_with_bias(p, bias, node) if j == i else p for j, p in enumerate(x.inputs)]
                return _Value("sum", x.shape, new)
    if x.kind not in ("Conv1d", "Conv2d", "Linear") or bias.dim() > 1 or x.weight is None:
        raise _fail(node, "its neurons have a bias, and no layer before them could take it")
    before = torch.zeros(len(x.weight), dtype=x.weight.dtype) if x.bias is None else x.bias.cpu()
    total = before + bias.to(before.dtype)
    return _Value(x.kind, x.shape, x.inputs, x.name, x.weight, total, x.options)


def _floats(tensor: Tensor) -> Tensor:
    wide = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
    return wide.detach().cpu()


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    if a.dim() > 1 or b.dim() > 1:
        raise ConversionError(
            "to_nir: spikes of each position weigh something else; NIR has no node"
        )
    return a.double().cpu() * b.double().cpu()


def _spread(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A scalar, one value for each channel or for each position, over ``shape``."""
    if value.dim() == 1 and value.numel() > 1:
        value = value.view(-1, *(1,) * (len(shape) - 1))
    return value.expand(shape)
