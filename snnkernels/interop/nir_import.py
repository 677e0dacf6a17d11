"""A graph of NIR as a converted network."""

from __future__ import annotations

import graphlib
import keyword
import math
import operator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..conversion.errors import ConversionError
from ..conversion.graphs import add_module
from ..conversion.kinds import kinds_of
from ..conversion.network import ConvertedNetwork, _steps
from ..conversion.ops import Activation
from ..conversion.parts import cut
from ..conversion.report import NodeReport, Report
from ..conversion.spiking import SpikingActivation
from ..conversion.steps import Clock
from ..neurons import IFNode, LIFNode
from .nir_graph import nir_package

__all__ = ["from_nir"]


def from_nir(graph: Any, *, T: int | None = None, dt: float = 1.0) -> ConvertedNetwork:
    """A network of integrate-and-fire neurons from a graph of NIR.

    What :func:`to_nir` wrote comes back as it was (reset by subtraction, ties, initial potentials
    in the nodes' metadata). Neurons of others are what the standard says: reset to ``v_reset``,
    firing only above the threshold, from 0, with ``m = v + dt r x``; leaky ones (``nir.LIF``, with
    v_leak 0) by Euler steps, ``m = (1 - dt / tau) v + dt r / tau x``. What a library's own reset
    was, if it was not that, the file does not say.

    Args:
        graph: a ``nir.NIRGraph`` or the path of a file; without cycles, one input, one output.
        T: number of steps, the default of a call; None: what the metadata says, else 16.
        dt: the length of a step, in the unit of the file's time constants: 1.0 for files of ours
            and most others, 1e-4 for SpikingJelly's default.

    Returns:
        A converted network: ``net(x)`` on a constant input ``[B, *]`` answers the mean output of T
        steps, ``net.over_time(x_seq)`` takes and gives ``[T, B, *]``.

    Raises:
        ConversionError: a node is not known here, or the graph has a cycle; names the node.
        ValueError, TypeError: an argument is not allowed.
        ImportError: nir is not installed.
        FileNotFoundError: there is no such file.
    """
    nir = nir_package()
    if isinstance(graph, (str, Path)):
        if not Path(graph).is_file():
            raise FileNotFoundError(f"graph={str(graph)!r} is no file")
        try:
            # Without nir's check of shapes, which takes a filter's channels for the input's.
            graph = nir.read(str(graph), type_check=False)
        except (OSError, KeyError, AssertionError) as error:
            raise ValueError(f"graph={str(graph)!r} is no NIR file: {error}") from error
    if not isinstance(graph, nir.NIRGraph):
        raise TypeError(f"graph must be a nir.NIRGraph or a path, got {type(graph).__name__}")
    if isinstance(dt, bool) or not isinstance(dt, (int, float)) or not 0 < dt < math.inf:
        raise ValueError(f"dt={dt!r} must be a positive finite number")
    asked = None if T is None else _steps(T)
    return _Importer(nir, graph, float(dt), asked).build()


class _Importer:
    def __init__(self, nir: Any, graph: Any, dt: float, T: int | None) -> None:
        self.nir, self.given, self.dt, self.T = nir, graph, dt, T
        self.net = nn.Module()
        self.graph = fx.Graph()
        self.neurons: dict[str, SpikingActivation] = {}
        self.clock = Clock()
        self.rows: list[NodeReport] = []
        self.foreign: list[str] = []
        self.sizes: dict[str, tuple[int, ...]] = {}  # of neurons, as their node says

    def build(self) -> ConvertedNetwork:
        before = self._order()
        env: dict[str, fx.Node] = {}
        outputs = []
        for name in before:
            node = self.given.nodes[name]
            sources = [env[s] for s in before[name]]
            if isinstance(node, self.nir.Input):
                env[name] = self.graph.placeholder("x")
                continue
            if not sources:
                raise ConversionError(f"{name} ({type(node).__name__}) has no input")
            total = sources[0]
            for other in sources[1:]:
                total = self.graph.call_function(operator.add, (total, other))
            if isinstance(node, self.nir.Output):
                outputs.append(total)
            else:
                env[name] = self._node(name, node, total)
        if len(outputs) != 1 or sum(n.op == "placeholder" for n in self.graph.nodes) != 1:
            raise ConversionError("the graph must have one input and one output")
        if not self.neurons:
            raise ConversionError("the graph has no neurons (nir.IF or nir.LIF)")
        self.graph.output(outputs[0])
        self.graph.lint()
        self._check_sizes()
        kinds = kinds_of(self.net, self.graph)
        parts = cut(self.net, self.graph, kinds, self.neurons, cumulative=False)
        T = self.T or 16
        report = Report("nir", T, self.rows)
        if self.foreign:
            report.notes.append(
                f"{', '.join(self.foreign)}: reset to a value, firing above the threshold, as NIR "
                "says; there was no metadata of snnkernels"
            )
        return ConvertedNetwork(parts, T, report, self.clock)

    @torch.no_grad()
    def _check_sizes(self) -> None:
        """Refuse nodes that do not fit each other: torch would broadcast them."""
        (source,) = (n for n in self.given.nodes.values() if isinstance(n, self.nir.Input))
        try:
            shape = [int(n) for n in np.asarray(source.input_type["input"]).reshape(-1)]
            if math.prod(shape) > _MOST_TRIED:
                return
            weights = (t.dtype for t in self.net.parameters())
            x = torch.zeros(1, *shape, dtype=next(weights, torch.float32))
            _Sizes(self.net, self.graph, self.sizes).run(x)
        except ConversionError:
            raise
        except (TypeError, ValueError, RuntimeError, KeyError):
            return  # an input of unknown shape; a call says what does not fit

    def _order(self) -> dict[str, list[str]]:
        """Names in order of execution, with their sources."""
        edges = dict.fromkeys((str(a), str(b)) for a, b in self.given.edges)
        sources: dict[str, list[str]] = {str(name): [] for name in self.given.nodes}
        for a, b in edges:
            if a not in sources or b not in sources:
                raise ConversionError(f"the edge {a} -> {b} names a node that is not there")
            sources[b].append(a)
        try:
            order = list(graphlib.TopologicalSorter(sources).static_order())
        except graphlib.CycleError as error:
            raise ConversionError(
                f"the graph has a cycle, {' -> '.join(error.args[1])}: recurrent networks are not "
                "imported"
            ) from error
        return {name: sources[name] for name in order}

    def _node(self, name: str, node: Any, x: fx.Node) -> fx.Node:
        nir = self.nir
        kind = type(node).__name__
        if isinstance(node, (nir.IF, nir.LIF)):
            path = self._put(name, Activation(nn.ReLU(), name))
            about = node.metadata if isinstance(node.metadata, dict) else {}
            neuron = self._neuron(name, node, about)
            self.sizes[path] = np.shape(node.v_threshold)
            label = _text(about.get("label", name))
            self.neurons[path] = SpikingActivation(
                neuron, label, constant=False, counts=False, channel_dim=1, clock=self.clock
            )
            theta = torch.as_tensor(neuron.v_threshold)
            self.rows.append(NodeReport(label, f"nir.{kind} {name}", theta.reshape(-1)[:1].clone()))
            return self.graph.call_module(path, (x,))
        if isinstance(node, nir.Scale):
            scale = _tensor(node.scale)
            flat = scale.reshape(len(scale), -1) if scale.dim() else scale.reshape(1, 1)
            if scale.dim() > 1 and bool((flat == flat[:, :1]).all()):
                scale = flat[:, 0].reshape(-1, *(1,) * (scale.dim() - 1))
            holder = nn.Module()
            holder.register_buffer("scale", scale[None])
            path = self._put(name, holder)
            value = self.graph.get_attr(f"{path}.scale")
            self.rows.append(NodeReport(name, "nir.Scale: kept"))
            return self.graph.call_function(operator.mul, (x, value))
        module = self._module(name, node)
        self.rows.append(NodeReport(name, f"nir.{kind}: kept"))
        return self.graph.call_module(self._put(name, module), (x,))

    def _put(self, name: str, module: nn.Module) -> str:
        plain = "".join(c if c.isascii() and (c.isalnum() or c == "_") else "_" for c in name)
        if not plain.isidentifier() or keyword.iskeyword(plain):
            plain = f"node_{plain}"  # torch.fx writes it into source
        return add_module(self.net, plain, module)

    def _module(self, name: str, node: Any) -> nn.Module:
        nir = self.nir
        if isinstance(node, (nir.Affine, nir.Linear)):
            weight = _tensor(node.weight)
            if weight.dim() != 2:
                raise ConversionError(
                    f"{name}: weight of shape {tuple(weight.shape)}, not a matrix"
                )
            bias = _tensor(node.bias) if isinstance(node, nir.Affine) else None
            with torch.device("meta"):
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
            return _filled(linear, weight, bias)
        if isinstance(node, (nir.Conv1d, nir.Conv2d)):
            weight, bias = _tensor(node.weight), _tensor(node.bias)
            groups = int(np.asarray(node.groups))
            padding = _text(node.padding) if _is_text(node.padding) else _ints(node.padding)
            make: Any = nn.Conv1d if isinstance(node, nir.Conv1d) else nn.Conv2d
            with torch.device("meta"):
                conv = make(
                    weight.shape[1] * groups,
                    weight.shape[0],
                    tuple(weight.shape[2:]),
                    stride=_ints(node.stride),
                    padding=padding,
                    dilation=_ints(node.dilation),
                    groups=groups,
                )
            return _filled(conv, weight, bias)
        if isinstance(node, (nir.AvgPool2d, nir.SumPool2d)):
            given = [_ints(getattr(node, n)) for n in ("kernel_size", "stride", "padding")]
            one = 1 if isinstance(node, nir.SumPool2d) else None
            return nn.AvgPool2d(given[0], given[1], given[2], divisor_override=one)
        if isinstance(node, nir.Flatten):
            start, end = int(node.start_dim), int(node.end_dim)
            return nn.Flatten(start + 1 if start >= 0 else start, end + 1 if end >= 0 else end)
        raise ConversionError(
            f"{name}: nir.{type(node).__name__} is not imported; known are Affine, Linear, Conv1d, "
            "Conv2d, Scale, AvgPool2d, SumPool2d, Flatten, IF and LIF"
        )

    def _neuron(self, name: str, node: Any, about: dict[str, Any]) -> IFNode:
        threshold, per_channel = _shared(_tensor(node.v_threshold))
        given: dict[str, Any] = {"v_threshold": threshold}
        r = np.asarray(node.r, dtype=np.float64) * self.dt
        if isinstance(node, self.nir.LIF):
            if np.any(np.asarray(node.v_leak) != 0):
                raise ConversionError(f"{name}: v_leak is not 0, which neurons here leak to")
            share = self.dt / np.asarray(node.tau, dtype=np.float64)
            given["beta"], channels = _shared(torch.tensor(1 - share))
            per_channel = per_channel or channels
            r = r / np.asarray(node.tau, dtype=np.float64)
        if not np.all(np.isfinite(r)):
            raise ConversionError(f"{name}: r is not finite")
        if np.any(r != 1):
            scale = torch.tensor(r).to(_tensor(node.v_threshold).dtype)
            given["input_scale"], channels = _shared(scale)
            per_channel = per_channel or channels
        reset = _text(about.get("reset", "value"))
        if reset not in ("subtract", "value"):
            raise ConversionError(f"{name}: metadata reset={reset!r}; known: subtract, value")
        if reset == "value":
            value = np.unique(np.asarray(node.v_reset))
            if value.size != 1:
                raise ConversionError(f"{name}: v_reset differs between neurons of the node")
            given["v_reset"] = float(value[0])
        given["tie"] = _text(about.get("tie", ">"))
        if given["tie"] not in (">", ">="):
            raise ConversionError(f"{name}: metadata tie={given['tie']!r}; known: > and >=")
        if "v_init" in about:
            try:
                start = _tensor(about["v_init"]).to(_tensor(node.v_threshold).dtype)
            except (TypeError, ValueError) as error:
                raise ConversionError(f"{name}: metadata v_init: {error}") from error
            if start.numel() not in (1, np.size(node.v_threshold)) or not start.isfinite().all():
                raise ConversionError(
                    f"{name}: metadata v_init of shape {tuple(start.shape)} must be one finite "
                    f"number or {np.shape(node.v_threshold)} of them"
                )
            given["v_init"], channels = _shared(start)
            per_channel = per_channel or channels
        if "T" in about and self.T is None:
            self.T = _steps(int(np.asarray(about["T"])))
        if "reset" not in about:
            self.foreign.append(name)
        make = LIFNode if isinstance(node, self.nir.LIF) else IFNode
        try:
            return make(channel_dim=1 if per_channel else None, **given)
        except (TypeError, ValueError) as error:
            raise ConversionError(f"{name}: {error}") from error


# Elements of a larger input are not looked at: memory would be the file's to choose.
_MOST_TRIED = 2**24


class _Sizes(fx.Interpreter):
    """Runs a graph and compares what meets."""

    def __init__(self, net: nn.Module, graph: fx.Graph, sizes: dict[str, tuple[int, ...]]) -> None:
        super().__init__(net, graph=graph)
        self.sizes = sizes

    def run_node(self, n: fx.Node) -> Any:
        """One node."""
        value = super().run_node(n)
        if n.target is operator.add:
            shapes = [tuple(self.env[a].shape[1:]) for a in n.all_input_nodes]
            if len({*shapes}) > 1:
                raise ConversionError(f"edges into one node bring {shapes[0]} and {shapes[1]}")
        wanted = self.sizes.get(str(n.target)) if n.op == "call_module" else None
        if wanted is not None and math.prod(wanted) != 1:
            there = tuple(value.shape[1:])
            full = wanted if len(wanted) != 1 else (*wanted, *(1,) * (len(there) - 1))
            if len(full) != len(there) or any(
                a not in (1, b) for a, b in zip(full, there, strict=True)
            ):
                raise ConversionError(f"{n.target}: {wanted} neurons, but its input is {there}")
        return value


def _filled(layer: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer.eval()


def _tensor(value: Any) -> Tensor:
    array = np.asarray(value)
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float32)
    return torch.tensor(array)


def _shared(value: Tensor) -> tuple[Any, bool]:
    """As few numbers as say the same: one, one for each channel, or all; whether per channel."""
    if value.numel() and bool((value == value.reshape(-1)[0]).all()):
        return value.reshape(-1)[0].clone(), False
    flat = value.reshape(len(value), -1) if value.dim() else value
    if value.dim() and bool((flat == flat[:, :1]).all()):
        return flat[:, 0].clone(), True
    return value, False


def _ints(value: Any) -> Any:
    array = np.asarray(value)
    return int(array) if array.ndim == 0 else tuple(int(v) for v in array)


def _is_text(value: Any) -> bool:
    return isinstance(value, (str, bytes)) or np.asarray(value).dtype.kind in "SUO"


def _text(value: Any) -> str:
    value = value.item() if isinstance(value, np.ndarray) else value
    return value.decode() if isinstance(value, bytes) else str(value)
