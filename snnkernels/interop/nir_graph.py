"""Values of a converted network, and the nodes of NIR that they are written as."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ..conversion.errors import ConversionError
from ..conversion.spiking import SpikingActivation

__all__ = ["Graph", "Value", "fail", "nir_package"]


def nir_package() -> Any:
    """The package nir."""
    try:
        import nir
    except ImportError as error:
        raise ImportError("NIR graphs need nir: pip install 'snnkernels[nir]'") from error
    return nir


@dataclass(eq=False)
class Value:
    """Something in the graph: ``shape`` without the batch, ``inputs`` it is made of."""

    kind: str
    shape: tuple[int, ...]
    inputs: list[Value] = field(default_factory=list)
    name: str = ""
    weight: Tensor | None = None  # of layers; of spikes and factors what they weigh
    bias: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)


def fail(node: fx.Node, why: str) -> ConversionError:
    """The error for an operation that NIR has no node for."""
    name = node.target if node.op == "call_module" else node.name
    return ConversionError(f"{name} cannot be written as NIR: {why}")


class Graph:
    """Nodes and edges; values are written when it is known in what units they are wanted."""

    def __init__(self, nir: Any, fold: bool, T: int, dtype: torch.dtype) -> None:
        self.nir, self.fold, self.T = nir, fold, T
        self.dtype: Any = np.float64 if dtype == torch.float64 else np.float32
        self.nodes: dict[str, Any] = {}
        self.edges: list[tuple[str, str]] = []
        self._made: dict[tuple[Value, str], list[str]] = {}

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
        full = np.broadcast_to(np.asarray(value, dtype=self.dtype), tuple(map(int, shape)))
        return self.nir.Scale(scale=np.array(full))

    def emit(self, value: Value, scale: Tensor | None) -> list[str]:
        """Names of nodes whose sum is ``value * scale``; ``scale``: None, scalar or ``[C]``."""
        if scale is not None and bool((scale == 1).all()):
            scale = None
        key = (value, "" if scale is None else str(scale.tolist()))
        if key not in self._made:
            self._made[key] = self._emit(value, scale)
        return self._made[key]

    def _emit(self, value: Value, scale: Tensor | None) -> list[str]:
        kind = value.kind
        if kind in ("source", "spikes"):
            weight = _product(value.weight, scale)
            if weight is None or bool((weight == 1).all()):
                return [value.name]
            full = np.array(_spread(weight, value.shape).cpu().numpy(), dtype=self.dtype)
            return [self.add(f"{value.name}_scale", self.nir.Scale(scale=full), [value.name])]
        if kind == "sum":
            return [name for part in value.inputs for name in self.emit(part, scale)]
        if kind == "times":
            return self.emit(value.inputs[0], _product(value.weight, scale))
        if kind == "constant":
            raise ConversionError("to_nir: a constant meets the values of a step; NIR has none")
        if kind == "flatten" and scale is not None and scale.dim():
            names = self.emit(value, None)
            full = np.array(scale.cpu().numpy(), dtype=self.dtype)
            return [self.add("flatten_scale", self.nir.Scale(scale=full), names)]
        if kind in ("flatten", "AvgPool2d"):
            return [self._shaped(value, self.emit(value.inputs[0], scale))]
        return [self._weighted(value, scale)]

    def supply(self, value: Value) -> tuple[list[str], Tensor | None]:
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

    def _shaped(self, value: Value, names: list[str]) -> str:
        if value.kind == "flatten":
            before = {"input": np.array(value.inputs[0].shape)}
            return self.add("flatten", self.nir.Flatten(before, start_dim=0, end_dim=-1), names)
        options = {name: np.array(pair) for name, pair in value.options.items()}
        pool = self.nir.AvgPool2d(**options)
        pool.input_type = {"input": np.array(value.inputs[0].shape)}
        pool.output_type = {"output": np.array(value.shape)}
        return self.add(value.name, pool, names)

    def _weighted(self, value: Value, out: Tensor | None) -> str:
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
        self, layer: SpikingActivation, x: Value, shape: tuple[int, ...], node: fx.Node
    ) -> Value:
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
            raise fail(node, "its thresholds are not along the first dimension of a sample")
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
        return Value("spikes", shape, name=name, weight=weight)


def _with_bias(x: Value, bias: Tensor, node: fx.Node) -> Value:
    """``x`` with the neurons' own bias in the layer before them."""
    if x.kind == "sum":
        for i, part in enumerate(x.inputs):
            if part.kind in ("Conv1d", "Conv2d", "Linear"):
                new = [_with_bias(p, bias, node) if j == i else p for j, p in enumerate(x.inputs)]
                return Value("sum", x.shape, new)
    if x.kind not in ("Conv1d", "Conv2d", "Linear") or bias.dim() > 1 or x.weight is None:
        raise fail(node, "its neurons have a bias, and no layer before them could take it")
    before = torch.zeros(len(x.weight), dtype=x.weight.dtype) if x.bias is None else x.bias.cpu()
    total = before + bias.to(before.dtype)
    return Value(x.kind, x.shape, x.inputs, x.name, x.weight, total, x.options)


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
