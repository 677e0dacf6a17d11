"""snnTorch: a feed-forward network of its layers, run layer by layer instead of step by step.

snnTorch's networks are loops over time that users write, so nothing can be patched in place. A
``nn.Sequential`` says enough: :func:`from_snntorch` runs every layer over all steps at once.

``Leaky`` computes, one rounded operation after the other, ``m = beta * m + x``, then (its default,
``reset_delay=True``, subtract) ``m - threshold`` where the membrane *before* has fired, and a spike
where ``m - threshold > 0``: our neuron with a reset delay, bit for bit for finite float32 currents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import surrogate as _surrogate
from .. import surrogate_foreign
from ..kernels import call
from ..kernels.arguments import NO_OPTIONS, Options
from ..kernels.spec import SPIKES, Asked
from .adapters import Refused
from .checks import WITH_V_SEQ, positive

__all__ = ["SnnTorchNetwork", "from_snntorch"]

# Layers that compute every sample alone, so that steps may be stacked on samples.
_STATELESS: tuple[type[nn.Module], ...] = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d,
    nn.ConvTranspose3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d,
    nn.MaxPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.Identity, nn.ReLU,
    nn.LayerNorm, nn.GroupNorm, nn.Upsample, nn.ZeroPad2d,
)  # fmt: skip
# Layers that look at the batch or draw numbers while they train: then one step at a time.
_BY_STEP: tuple[type[nn.Module], ...] = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.Dropout, nn.Dropout1d, nn.Dropout2d,
    nn.Dropout3d, nn.AlphaDropout,
)  # fmt: skip
_WITH_CHARGES = Asked(charge_seq=True)
_WHY = {
    "RLeaky": "it is recurrent: a step needs the spikes of the one before",
    "RSynaptic": "it is recurrent: a step needs the spikes of the one before",
    "SLSTM": "it is recurrent: a step needs the state of the one before",
    "SConv2dLSTM": "it is recurrent: a step needs the state of the one before",
    "Synaptic": "it has a synaptic current of its own",
    "Alpha": "it has synaptic currents of its own",
}


@dataclass(frozen=True)
class _Kind:
    """How a neuron of snnTorch is run."""

    surrogate: _surrogate.Surrogate
    zero: bool  # resets to zero instead of by subtraction
    delay: bool
    lapicque: bool
    returns_mem: bool


class SnnTorchNetwork(nn.Module):
    """A ``nn.Sequential`` of snnTorch's layers over all steps ``[T, N, *]``; see
    :func:`from_snntorch`.

    Attributes:
        net: the network it runs, whose parameters and membranes (``mem``) it uses.
        merged: whether layers without state see all steps as one batch.
    """

    def __init__(
        self, net: nn.Module, steps: list[tuple[nn.Module, _Kind | None]], merged: bool
    ) -> None:
        super().__init__()
        self.net = net
        self.merged = merged
        # Typed loosely: a neuron's membrane is an attribute that comes and goes.
        self._steps: list[tuple[Any, _Kind | None]] = list(steps)

    def forward(self, x_seq: Tensor) -> Any:
        """What the network gives at every step, stacked.

        Args:
            x_seq: input ``[T, N, *]``, float32.

        Returns:
            Spikes ``[T, N, *]``, or ``(spikes, membranes)`` where the last layer gives both.

        Raises:
            TypeError: another dtype: snnTorch's spikes are float32 whatever goes in.
            ValueError: no steps.
        """
        if x_seq.dim() < 2 or not x_seq.shape[0]:
            raise ValueError(f"x_seq {tuple(x_seq.shape)} must be [T, N, *] with at least one step")
        out: Any = x_seq
        for layer, kind in self._steps:
            if kind is not None:
                out = _run(layer, kind, out)
            elif self.merged and not (layer.training and isinstance(layer, _BY_STEP)):
                out = layer(out.flatten(0, 1)).unflatten(0, out.shape[:2])
            else:
                # In net's loop only the input's rows are views, and where memory is aligned decides
                # the order of sums in a matrix product.
                rows = out if out is x_seq else [row.clone() for row in out]
                out = torch.stack([layer(row) for row in rows])
        return out

    def reset(self) -> None:
        """Membranes back to 0, of this network's neurons alone."""
        for layer, kind in self._steps:
            if kind is not None:
                layer.mem = torch.zeros_like(layer.mem)

    def detach(self) -> None:
        """Cuts the graph behind the membranes, for truncated backpropagation through time."""
        for layer, kind in self._steps:
            if kind is not None:
                layer.mem = layer.mem.detach()


def from_snntorch(
    net: nn.Module, *, merged: bool = True, stateless: tuple[type[nn.Module], ...] = ()
) -> SnnTorchNetwork:
    """Runs a feed-forward network of snnTorch over all time steps at once.

    For ``nn.Sequential`` (nested too) of ``Leaky``, ``Lapicque`` and layers without state, as
    snnTorch's own tutorials build them (``init_hidden=True``). Instead of a loop that calls ``net``
    with one step, call the result with all of them::

        fast = snnkernels.from_snntorch(net)
        spikes, membranes = fast(x)  # x [T, N, *]

    It shares layers, parameters and membranes with ``net``, which can be called in between, and
    ``snntorch.utils.reset(net)`` works on both. Neurons give the same bits as snnTorch's for finite
    float32 currents; with ``merged`` a matrix product may round otherwise than with one step's
    rows. Dropout that trains draws its numbers layer by layer.

    Args:
        net: the network.
        merged: layers without state see all steps as one batch, which is faster; False runs them
            one step at a time, with the very sums of ``net``. Batch norm and dropout that train run
            by step in any case.
        stateless: more classes of layers that compute every sample alone.

    Returns:
        A :class:`SnnTorchNetwork`.

    Raises:
        TypeError: ``net`` is no module.
        Refused: layers whose numbers would not be the same, each with its name and the reason.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"net={net!r} must be a torch.nn.Module")
    steps: list[tuple[nn.Module, _Kind | None]] = []
    refused: list[str] = []
    if type(net) is not nn.Sequential and not _is_neuron(net):
        raise Refused(
            f"from_snntorch: {type(net).__name__} has a forward of its own, whose loop over time "
            "cannot be seen; give its layers as nn.Sequential"
        )
    layers = list(_layers(net, ""))
    modules = [layer for _, layer in layers]
    for path, layer in layers:
        try:
            kind = _kind(layer, stateless)
            remembers = kind is not None or isinstance(layer, _BatchNorm)
            if remembers and modules.count(layer) > 1:
                raise Refused("it stands in several places, whose calls alternate within a step")
            if kind is not None and kind.returns_mem and layer is not modules[-1]:
                raise Refused(
                    "it returns spikes and membranes, which the layer behind it cannot take; build "
                    "it with init_hidden=True"
                )
            steps.append((layer, kind))
        except Refused as reason:
            refused.append(f"layer {path!r} ({type(layer).__name__}): {reason}")
    if not refused and not any(kind for _, kind in steps):
        refused.append("there is no neuron of snnTorch in it")
    if refused:
        raise Refused("from_snntorch: " + "; ".join(refused))
    return SnnTorchNetwork(net, steps, merged)


def _layers(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    if type(module) is nn.Sequential:
        # Not named_children, which leaves out a layer that it has seen.
        for name, child in module._modules.items():
            assert child is not None
            yield from _layers(child, f"{path}.{name}" if path else name)
        if not len(module):
            yield path, nn.Identity()
    else:
        yield path, module


def _is_neuron(layer: nn.Module) -> bool:
    return any(c.__module__.startswith("snntorch.") for c in type(layer).__mro__)


def _kind(layer: Any, stateless: tuple[type[nn.Module], ...]) -> _Kind | None:
    """How a neuron is run, None for a layer without state; or Refused."""
    cls = type(layer)
    if not _is_neuron(layer):
        if layer._forward_hooks or layer._forward_pre_hooks:
            raise Refused("it has hooks, which would see all steps at once")
        if cls is nn.Flatten:
            if layer.start_dim < 1:
                raise Refused(f"start_dim={layer.start_dim} flattens the samples")
            return None
        if cls is nn.Unflatten:
            if not (isinstance(layer.dim, int) and layer.dim >= 1):
                raise Refused(f"dim={layer.dim!r} splits the samples")
            return None
        if cls in _STATELESS or cls in _BY_STEP or isinstance(layer, tuple(stateless)):
            return None
        raise Refused(
            "it may depend on the batch or on time; if it computes every sample alone, say "
            f"stateless=({cls.__name__},)"
        )
    if not cls.__module__.startswith("snntorch."):
        raise Refused("it derives from a class of snnTorch and may differ")
    if cls.__name__ not in ("Leaky", "Lapicque"):
        raise Refused(_WHY.get(cls.__name__, "there is no kernel for this neuron"))
    return _neuron(layer, cls.__name__ == "Lapicque")


def _neuron(layer: Any, lapicque: bool) -> _Kind:
    if layer.inhibition:
        raise Refused("inhibition: neurons look at each other")
    if layer.surrogate_disable:
        raise Refused("surrogate_disable: its spikes have no gradient")
    if layer.state_quant:
        raise Refused("state_quant: its membranes are quantised")
    if "forward" in layer.__dict__ or layer._forward_hooks or layer._forward_pre_hooks:
        raise Refused("it has hooks or a forward of its own")
    surrogate = surrogate_foreign.of_snntorch(layer.spike_grad)
    if surrogate is None:
        name = getattr(layer.spike_grad, "__qualname__", type(layer.spike_grad).__name__)
        raise Refused(
            f"its spike_grad {name.split('.')[0]} is not one of our kernels' (atan, fast_sigmoid, "
            "sigmoid)"
        )
    # What it was built with; reset_mechanism can be set later and changes nothing.
    reset = layer.state_function.__name__
    delay = getattr(layer, "reset_delay", True)
    if reset == "_base_int":
        raise Refused("reset_mechanism='none'")
    if reset == "_base_sub" and not delay:
        raise Refused(
            "reset_delay=False with 'subtract': a membrane that is above the threshold after the "
            "reset is reset again, and back, by snnTorch"
        )
    factor = layer.graded_spikes_factor
    if not delay and (factor.requires_grad or bool((factor != 1).any())):
        raise Refused("reset_delay=False with a graded_spikes_factor")
    if lapicque:
        if reset == "_base_zero":
            raise Refused("Lapicque with 'zero' sets the membrane to 0 and drops the current")
        if not (bool((layer.R == 1).all()) and bool((layer.time_step == 1).all())):
            raise Refused("R or time_step is not 1: its current is rounded several times")
    if not positive(layer.threshold):
        raise Refused("a threshold is not positive and finite")
    returns_mem = bool(layer.output or not layer.init_hidden)
    return _Kind(surrogate, reset == "_base_zero", delay, lapicque, returns_mem)


def _run(layer: Any, kind: _Kind, x: Tensor) -> Any:
    """All steps of a neuron; its membrane is left in ``layer.mem`` as snnTorch leaves it."""
    if x.dtype != torch.float32:
        raise TypeError(
            f"x_seq reaches a neuron as {x.dtype}; from_snntorch is for float32: snnTorch's spikes "
            "and membranes turn float32 on the way whatever goes in"
        )
    if layer.mem.shape != x.shape[1:]:
        layer.mem = torch.zeros_like(x[0])
    v = layer.mem
    if kind.zero and kind.delay:
        # The reset that snnTorch makes at the next step.
        v = torch.where(v - layer.threshold > 0, torch.zeros_like(v), v)
    scale = None
    if kind.lapicque:
        scale = 1 / (layer.R * layer.C)
        beta: Tensor | None = 1 - layer.time_step / (layer.R * layer.C)
    else:
        beta = layer.beta.clamp(0, 1)
        if not beta.requires_grad and not beta.is_cuda and math.prod(beta.shape) == 1 and beta == 1:
            beta = None
    more = NO_OPTIONS
    if beta is not None or not kind.zero:
        more = Options(beta=beta, reset_delay=not kind.zero)
    asked = SPIKES
    if kind.returns_mem:
        asked = _WITH_CHARGES if kind.zero and kind.delay else WITH_V_SEQ
    elif kind.zero and kind.delay:
        asked = _WITH_CHARGES  # the last one stays behind as mem
    result = call.run(
        x, asked, v, layer.threshold, 0.0 if kind.zero else None, kind.surrogate, kind.delay,
        None, None, layer.graded_spikes_factor, scale, ">", None, False, None, "recompute", "T,N",
        more,
    )  # fmt: skip
    spikes, v_seq, charges = result[0], result[5], result[6]
    layer.mem = result[4] if charges is None else charges[-1]
    if not kind.returns_mem:
        return spikes
    return spikes, v_seq if charges is None else charges
