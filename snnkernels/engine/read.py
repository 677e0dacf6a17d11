"""The body of a converted network as the nodes that passes work on."""

from __future__ import annotations

import math
import operator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..conversion.graphs import is_steps
from ..conversion.network import ConvertedNetwork
from ..conversion.pools import CumulativeMaxPool
from ..conversion.spiking import CountSpikes, Repeat, SpikingActivation
from .network import Network, Neurons, Node, Term, channels_first

__all__ = ["mark", "read", "settings"]

_ADD = (operator.add, operator.iadd, torch.add)
_CAT = (torch.cat, torch.concat, torch.concatenate)
_VIEWS = ("flatten", "view", "reshape", "squeeze", torch.flatten, torch.reshape, torch.squeeze)

# What a neuron's module holds as plain values: numbers and choices.
_SETTINGS = (
    *("v_threshold", "v_init", "amplitude", "input_scale", "beta", "bias", "fire_level"),
    *("v_reset", "tie", "max_spikes", "signed", "probe", "mask", "parallel"),
)


def mark(value: Tensor) -> tuple[int, int | None]:
    """Where a tensor lies, and how often it was written to."""
    return value.data_ptr(), None if value.is_inference() else value._version


def settings(layer: SpikingActivation) -> tuple[Any, ...]:
    """Plain values that a plan depends on; two that differ need another plan."""
    held = layer.node.__dict__
    values = (held.get(name) for name in _SETTINGS)
    return tuple(mark(v) if isinstance(v, Tensor) else v for v in values)


class _Sizes(fx.Interpreter):
    """Runs a graph and keeps what every node gave, without time and batch; calls no hooks."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.sizes: dict[fx.Node, tuple[int, ...]] = {}
        self.dtypes: dict[fx.Node, torch.dtype] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.fetch_attr(target).forward(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.sizes[n] = tuple(result.shape[1:])
            self.dtypes[n] = result.dtype
        return result


def read(snn: ConvertedNetwork, x: Any) -> Network:
    """Nodes of ``snn.body`` for inputs of the shape of ``x`` (one image is enough)."""
    with torch.no_grad():
        snn.reset()
        statics = _Sizes(snn.prefix).run(x)
        sizes = _Sizes(snn.body)
        try:
            sizes.run(*(statics[i] for i in snn._of_body), 1)
        finally:
            snn.reset()
    return _on_cpu(_Reader(snn, sizes).network())


def _on_cpu(net: Network) -> Network:
    """Passes fold there, whatever device the network is on."""
    for node in net:
        node.terms = [replace(term, weight=term.weight.cpu()) for term in node.terms]
        for name in ("bias", "scale", "shift"):
            if (value := getattr(node, name)) is not None:
                setattr(node, name, value.cpu())
        if node.neurons is not None:
            names = ("threshold", "v_init", "amplitude", "bias")
            held = {name: getattr(node.neurons, name) for name in names}
            moved = {name: value.cpu() for name, value in held.items() if value is not None}
            node.neurons = replace(node.neurons, **moved)
    return net


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return int(value[0]), int(value[-1])


def _padding(conv: nn.Conv2d) -> tuple[int, int] | None:
    """Zeros on each side; None where they are no zeros, or not as many on both sides."""
    if conv.padding_mode != "zeros":
        return None
    if conv.padding == "same":
        reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return None if any(n % 2 for n in reach) else (reach[0] // 2, reach[1] // 2)
    return (0, 0) if isinstance(conv.padding, str) else _pair(conv.padding)


class _Reader:
    def __init__(self, snn: ConvertedNetwork, sizes: _Sizes) -> None:
        self.snn, self.body = snn, snn.body
        self.sizes, self.dtypes = sizes.sizes, sizes.dtypes
        self.nodes: dict[str, Node] = {}

    def network(self) -> Network:
        outputs: list[str] = []
        for node in self.body.graph.nodes:
            if node.op == "output":
                outputs = [n.name for n in node.args[0]]
            else:
                self.nodes[node.name] = self._read(node)
        rates = {r.name: r.rate for r in self.snn.report.rows if r.rate is not None}
        return Network(self._counted(outputs), outputs, rates)

    def _counted(self, outputs: list[str]) -> list[Node]:
        """Every output becomes the count of some neurons, by a node of its own."""
        for i, name in enumerate(outputs):
            node = self.nodes[name]
            if node.op == "count":
                continue
            count = Node(f"{name}_count", "count", [name], node.size, node.origin)
            self.nodes[count.name] = count
            outputs[i] = count.name
        return list(self.nodes.values())

    def _read(self, n: fx.Node) -> Node:
        inputs = [i.name for i in n.all_input_nodes if not is_steps(i)]
        node = Node(n.name, "torch", inputs, self.sizes.get(n, ()), n)
        if n.op == "placeholder":
            node.op = "static"
        elif n.op == "call_module":
            self._module(node, self.body.get_submodule(str(n.target)))
        elif n.op in ("call_function", "call_method"):
            self._function(node, n)
        return node

    def _size_of(self, name: str) -> tuple[int, ...]:
        return self.nodes[name].size

    def _is_map(self, name: str) -> bool:
        """Whether a value is ``[B, C]`` or ``[B, C, H, W]`` of float32."""
        node = self.nodes[name].origin
        floats = node is not None and self.dtypes.get(node) == torch.float32
        return floats and len(self._size_of(name)) in (1, 3)

    def _module(self, node: Node, module: nn.Module) -> None:
        if isinstance(module, SpikingActivation):
            node.op, node.neurons = "neurons", self._neurons(module, node)
        elif isinstance(module, CountSpikes):
            node.op = "count"
        elif isinstance(module, Repeat):
            node.op = "same"  # what is constant in time is the same with a step or without
        elif not node.inputs or not self._is_map(node.inputs[0]):
            return
        elif type(module) is nn.Conv2d:
            padding = _padding(module)
            if padding is not None:
                self._linear(
                    node, node.inputs[0], module.weight, module.bias, stride=_pair(module.stride),
                    padding=padding, dilation=_pair(module.dilation), groups=module.groups,
                )  # fmt: skip
        elif type(module) is nn.Linear and len(node.size) == 1:
            source, weight = self._unflattened(node.inputs[0], module.weight)
            self._linear(node, source, weight, module.bias)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.training:
            self._batch_norm(node, module)
        elif isinstance(module, nn.Flatten):
            self._view(node)
        elif isinstance(module, nn.AvgPool2d):
            plain = not any(_pair(module.padding)) and module.divisor_override is None
            stride = module.kernel_size if module.stride is None else module.stride
            if plain:
                self._avg_pool(node, _pair(module.kernel_size), _pair(stride), module.ceil_mode)
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            self._adaptive(node)
        elif isinstance(module, CumulativeMaxPool):
            self._max_pool(node, module.pool)

    def _function(self, node: Node, n: fx.Node) -> None:
        if not node.inputs or not node.size or not self._is_map(node.inputs[0]):
            return
        target = n.target
        if target in _ADD or target in ("add", "add_"):
            if len(n.args) == 2 and not n.kwargs:
                self._add(node, n)
        elif target in _CAT:
            dim = n.kwargs.get("dim", n.kwargs.get("axis", n.args[1] if n.args[1:] else 0))
            if dim in (1, -len(node.size)) and all(map(self._is_map, node.inputs)):
                node.op = "cat"
                parts: Any = n.args[0] if n.args else n.kwargs["tensors"]
                node.inputs = [part.name for part in parts]
        elif target in _VIEWS:
            self._view(node)
        elif target == "contiguous":
            node.op = "same"
        elif target is F.adaptive_avg_pool2d:
            self._adaptive(node)
        elif target is F.avg_pool2d:
            kernel = n.args[1] if n.args[1:] else n.kwargs.get("kernel_size")
            stride = (n.args[2] if n.args[2:] else n.kwargs.get("stride")) or kernel
            more = {**n.kwargs, **dict(zip(("padding",), n.args[3:4], strict=False))}
            unusual = n.args[4:] or {"ceil_mode", "divisor_override"} & set(more)
            if not unusual and not any(_pair(more.get("padding", 0))):
                self._avg_pool(node, _pair(kernel), _pair(stride), False)
        elif target in ("mean", torch.mean):
            dims = n.kwargs.get("dim", n.args[1] if n.args[1:] else None)
            size = self._size_of(node.inputs[0])
            whole = isinstance(dims, (tuple, list)) and sorted(d % 4 for d in dims) == [2, 3]
            if whole and len(size) == 3:
                self._adaptive(node)
        elif target in (operator.mul, torch.mul, operator.truediv, torch.div, operator.sub):
            self._by_number(node, n)

    def _linear(self, node: Node, source: str, weight: Tensor, bias: Any, **geometry: Any) -> None:
        weight = weight.detach().double()
        if weight.dim() == 2:
            weight = weight[:, :, None, None]
        node.op = "linear"
        node.inputs = []
        node.terms = [Term(source, weight, **geometry)]
        node.bias = None if bias is None else bias.detach().double()

    def _unflattened(self, source: str, weight: Tensor) -> tuple[str, Tensor]:
        """A linear layer on a flattened map is a convolution as large as the map."""
        node = self.nodes[source]
        while node.op == "same":
            node = self.nodes[node.inputs[0]]
        if node.op != "flatten":
            return source, weight
        size = self._size_of(node.inputs[0])
        return node.inputs[0], weight.reshape(len(weight), *size)

    def _batch_norm(self, node: Node, module: Any) -> None:
        if module.running_var is None or self._size_of(node.inputs[0]) != node.size:
            return
        scale = (module.running_var.double() + module.eps).rsqrt()
        shift = -module.running_mean.double() * scale
        if module.affine:
            weight, bias = module.weight.detach().double(), module.bias.detach().double()
            scale, shift = weight * scale, weight * shift + bias
        node.op, node.scale, node.shift = "affine", scale, shift

    def _by_number(self, node: Node, n: fx.Node) -> None:
        numbers = [a for a in n.args if isinstance(a, (int, float))]
        if len(n.args) != 2 or len(numbers) != 1 or n.kwargs:
            return
        ones = torch.ones(node.size[0], dtype=torch.float64)
        number = float(numbers[0])
        first = isinstance(n.args[0], fx.Node)
        if n.target in (operator.mul, torch.mul):
            node.op, node.scale, node.shift = "affine", ones * number, ones * 0
        elif n.target in (operator.truediv, torch.div) and first:
            node.op, node.scale, node.shift = "affine", ones / number, ones * 0
        elif n.target is operator.sub and first:
            node.op, node.scale, node.shift = "affine", ones, ones * -number

    def _add(self, node: Node, n: fx.Node) -> None:
        values = [a for a in n.args if isinstance(a, fx.Node)]
        if len(values) == 2:
            if all(self._is_map(v.name) and self._size_of(v.name) == node.size for v in values):
                node.op, node.inputs = "add", [v.name for v in values]
        elif isinstance(n.args[1], (int, float)):
            ones = torch.ones(node.size[0], dtype=torch.float64)
            node.op, node.scale, node.shift = "affine", ones, ones * float(n.args[1])

    def _view(self, node: Node) -> None:
        """Flattening, whose input a linear layer finds; other shapes stay what they are."""
        before = self._size_of(node.inputs[0])
        flat = len(node.size) == 1 and len(before) in (1, 3)
        if flat and math.prod(before) == node.size[0]:
            node.op = "same" if before[0] == node.size[0] else "flatten"
            node.inputs = node.inputs[:1]

    def _avg_pool(self, node: Node, kernel: Any, stride: Any, ceil: bool) -> None:
        size = self._size_of(node.inputs[0])
        fits = all((n - k) % s == 0 for n, k, s in zip(size[1:], kernel, stride, strict=True))
        if len(size) == 3 and (not ceil or fits):
            node.op, node.window = "avg_pool", (kernel, stride)

    def _adaptive(self, node: Node) -> None:
        """Adaptive average pools (and means) whose windows are all of one size."""
        size, out = self._size_of(node.inputs[0]), (*node.size, 1, 1)[:3]
        if len(size) == 3 and not (size[1] % out[1] or size[2] % out[2]):
            kernel = (size[1] // out[1], size[2] // out[2])
            node.op, node.window = "avg_pool", (kernel, kernel)

    def _max_pool(self, node: Node, pool: nn.Module) -> None:
        if type(pool) is not nn.MaxPool2d:
            return
        kernel, size = _pair(pool.kernel_size), self._size_of(node.inputs[0])
        stride = kernel if pool.stride is None else _pair(pool.stride)
        plain = not any(_pair(pool.padding)) and _pair(pool.dilation) == (1, 1)
        fits = not pool.ceil_mode or not (size[1] % kernel[0] or size[2] % kernel[1])
        if plain and stride == kernel and kernel[0] == kernel[1] and fits:
            node.op, node.window = "max_pool", (kernel, kernel)

    def _neurons(self, module: SpikingActivation, node: Node) -> Neurons:
        inner = module.node
        theta = torch.as_tensor(inner.threshold).detach()
        start = 0.5 * theta if isinstance(inner.v_init, str) else torch.as_tensor(inner.v_init)
        weight = inner.amplitude
        weight = (
            theta if isinstance(weight, str) else torch.as_tensor(1.0 if weight is None else weight)
        )
        bias = None if inner.bias is None else torch.as_tensor(inner.bias).detach()
        found = Neurons(module, theta, start.detach(), weight.detach(), bias, inner.tie == ">")
        found.plain = self._why_not(module, node, found)
        return found

    def _why_not(self, module: SpikingActivation, node: Node, found: Neurons) -> str:
        inner, size = module.node, node.size
        if type(module) is not SpikingActivation:
            return f"a layer of its own ({type(module).__name__})"
        options = (inner.fire_level, inner.max_spikes, inner.signed, inner.mask, inner.probe)
        if any(o is not None for o in options) or inner.parallel or inner.beta is not None:
            return "its neurons have options"
        if inner.v_reset is not None or inner.input_scale is not None:
            return "hard reset or input_scale"
        if len(size) not in (1, 3) or not self._is_map(node.inputs[0]):
            return f"its current is not float32 [B, C] or [B, C, H, W] but of size {size}"
        values = (found.threshold, found.v_init, found.amplitude, found.bias)
        if not all(channels_first(v, size, module.channel_dim) for v in values):
            return "thresholds that are neither one nor per channel nor of the layer's shape"
        if found.amplitude.dim() > 1 or (found.bias is not None and found.bias.dim() > 1):
            return "spikes of a different weight at every position"
        return ""
