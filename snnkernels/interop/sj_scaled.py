"""A converted activation of SpikingJelly, scaler - neuron - scaler, as one fused neuron.

The graph stays as it is. The first scaler hands its input on unscaled, the neuron takes both
scales into its kernel (``m = v + round(x * scale0)``, spikes of ``scale1``), the last scaler hands
the spikes on. What is handed on is wrapped, so that nothing can take it for what it is not. Where
somebody looks (a hook on one of the three), or where a call is not ours, all three do their own
work for that call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as _nn_module

from . import sj_run
from .adapters import Change, Refused
from .checks import positive

__all__ = ["Scaled", "ScaledNode", "ScalerIn", "ScalerOut", "Unscaled", "find"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Unscaled(NamedTuple):
    """A current that the neuron is to scale."""

    x: Tensor


class Scaled(NamedTuple):
    """Spikes that weigh what the last scaler would have made of them."""

    spikes: Tensor


class ScaledNode:
    """A fused neuron that may stand between two scalers."""

    # Set by patch: (first, last). A tuple, so that they are no submodules.
    _scalers: tuple[Any, Any] | None = None
    step_mode: str
    surrogate_function: Any

    def check(self, x: Tensor, shape: torch.Size) -> None:
        """Raises :class:`.Refused` unless a call with this current is ours.

        Args:
            x: of one step or many, as the step mode says.
            shape: the neurons' shape.
        """
        raise NotImplementedError

    def steps(self, x: Tensor, scaling: dict[str, Any]) -> Tensor:
        """Runs the neuron as its step mode says, on a current that is ours."""
        raise NotImplementedError

    def takes(self, x: Any) -> bool:
        """Whether the current is to come unscaled."""
        assert self._scalers is not None
        first, last = self._scalers
        for module in (first, self, last):
            for name in _HOOKS:
                if getattr(module, name):
                    return False
        rows = 1 if self.step_mode == "m" else 0
        if _nn_module._has_any_global_hook() or not isinstance(x, Tensor) or x.dim() < 1 + rows:
            return False
        if rows and not x.shape[0]:
            return False
        try:
            sj_run.surrogate_of(self.surrogate_function)
            self.check(x, x.shape[rows:])
        except Refused:
            return False
        return all(_fits(scaler, x, rows, self.step_mode) for scaler in (first, last))

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """As SpikingJelly's; an unscaled current gives scaled spikes."""
        if type(x) is not Unscaled:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        assert self._scalers is not None
        first, last = self._scalers
        dims = x.x.dim() - (self.step_mode == "m")
        scaling = {"input_scale": _view(first, dims), "amplitude": _view(last, dims)}
        return Scaled(self.steps(x.x, scaling))


def _fits(scaler: Any, x: Tensor, rows: int, step_mode: str) -> bool:
    scale = scaler.scale
    if scale.device != x.device:
        return False
    if scale.dim() == 0:
        return True
    # Per channel: the dimension it means depends on the step mode.
    dims, channel = x.dim() - rows, scaler.channel_dim
    if scaler.step_mode != step_mode or not -dims <= channel < dims:
        return False
    return x.shape[rows + channel % dims] == scale.numel()


def _view(scaler: Any, dims: int) -> Tensor:
    scale: Tensor = scaler.scale
    if scale.dim() == 0:
        return scale
    channel = scaler.channel_dim % dims
    return scale.reshape(*(-1 if i == channel else 1 for i in range(dims)))


class ScalerIn:
    """The first scaler of a fused activation."""

    _node: tuple[ScaledNode]

    def forward(self, x: Any) -> Any:
        """``x``, unscaled where the neuron scales it."""
        return Unscaled(x) if self._node[0].takes(x) else super().forward(x)  # type: ignore[misc]


class ScalerOut:
    """The last scaler of a fused activation."""

    def forward(self, x: Any) -> Any:
        """The spikes, scaled here unless the neuron did."""
        return x.spikes if type(x) is Scaled else super().forward(x)  # type: ignore[misc]


def find(
    model: nn.Module, scalers: tuple[type, ...], nodes: tuple[type, ...]
) -> list[tuple[nn.Module, nn.Module, nn.Module]]:
    """Scaler, neuron, scaler in a row in graphs of ``model``, used there and nowhere else."""
    places: dict[nn.Module, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        places[module] = places.get(module, 0) + 1
    found = []
    for graph_module in model.modules():
        if not isinstance(graph_module, fx.GraphModule):
            continue
        modules = dict(graph_module.named_modules(remove_duplicate=False))
        calls: dict[Any, int] = {}
        for node in graph_module.graph.nodes:
            if node.op == "call_module":
                calls[node.target] = calls.get(node.target, 0) + 1
        for node in graph_module.graph.nodes:
            if node.op != "call_module" or type(modules.get(node.target)) not in nodes:
                continue
            row = [*node.all_input_nodes[:1], node, *node.users]
            if len(row) != 3 or any(
                n.op != "call_module" or len(n.args) != 1 or n.kwargs or calls[n.target] != 1
                for n in row
            ):
                continue
            first, neuron, last = (modules[n.target] for n in row)
            if (
                type(first) in scalers
                and type(last) in scalers
                and list(row[0].users) == [node]
                and all(places[m] == 1 for m in (first, neuron, last))
                and all(_plain(m) for m in (first, last))
            ):
                found.append((first, neuron, last))
    return found


def _plain(scaler: Any) -> bool:
    """Whether a scaler does what its class says, with scales a spike can weigh."""
    scale = scaler.scale
    most = 1 if hasattr(scaler, "channel_dim") else 0
    return (
        "forward" not in scaler.__dict__
        and isinstance(scale, Tensor)
        and scale.dtype == torch.float32
        and scale.dim() <= most
        and positive(scale)
    )


def changes(
    row: tuple[nn.Module, nn.Module, nn.Module],
    first: type[nn.Module],
    node: Change,
    last: type[nn.Module],
) -> dict[nn.Module, Change]:
    """What becomes of a row that :func:`find` found."""
    scaler0, neuron, scaler1 = row
    node.note = "; ".join(filter(None, (node.note, "one with the scalers before and after it")))
    node.attributes["_scalers"] = (scaler0, scaler1)
    return {
        scaler0: Change(first, attributes={"_node": (neuron,)}, helper=True),
        neuron: node,
        scaler1: Change(last, helper=True),
    }
