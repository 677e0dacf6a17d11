"""Fused forms of SpikingJelly 0.0.0.0.14's classes; imports SpikingJelly: only its adapter does.

Each is a subclass that overrides the arithmetic and nothing else; state, reset values and step mode
are SpikingJelly's own code. In evaluation mode its loops are scripted and give spikes without a
gradient; where that matters they run themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from spikingjelly.activation_based import neuron
from spikingjelly.activation_based.ann2snn import modules
from torch import Tensor

from . import sj_run
from .adapters import Refused
from .checks import say
from .sj_scaled import ScaledNode, ScalerIn, ScalerOut

__all__ = ["BETWEEN_SCALERS", "FUSED", "SCALERS", "FusedIFNode", "FusedLIFNode", "run"]


def _check(node: Any, x: Any, shape: Any) -> None:
    v = node._memories["v"]
    sj_run.check(x, v, node.v_threshold, node.v_reset, shape)
    if not node.training and torch.is_grad_enabled():
        tensors = [t for t in (x, v) if isinstance(t, Tensor)]
        if any(t.requires_grad for t in tensors):
            raise Refused("in evaluation mode its spikes have no gradient, ours would have one")


def run(node: Any, x_seq: Tensor, store: bool, **scaling: Any) -> Tensor | None:
    """The spikes of an ``IFNode`` or ``LIFNode``, or None where SpikingJelly has to run.

    Args:
        node: the neuron; its membrane is carried on.
        x_seq: current ``[T, *shape]``.
        store: whether to fill ``v_seq``.
        scaling: see :func:`.sj_run.run`.
    """
    if not x_seq.shape[0]:
        return None
    try:
        _check(node, x_seq, x_seq.shape[1:])
        surrogate = sj_run.surrogate_of(node.surrogate_function)
        beta = _beta(node, x_seq) if isinstance(node, neuron.LIFNode) else None
    except Refused as refused:
        say(refused, sj_run.OWN)
        return None
    spikes, node._memories["v"], v_seq = sj_run.run(
        x_seq, node._memories["v"], node.v_threshold, node.v_reset, surrogate, node.detach_reset,
        store, beta=beta, **scaling,
    )  # fmt: skip
    if store:
        node.v_seq = v_seq
    return spikes


def _beta(node: Any, x_seq: Tensor) -> float:
    if x_seq.device.type != "cpu":
        raise Refused("on GPUs the leak's sums may be contracted")
    if node.decay_input:
        raise Refused("decay_input=True rounds in another order")
    # A soft reset multiplies, and so does a hard one while training.
    return sj_run.leak_of(node.tau, node.v_reset, exact=node.v_reset is None)


class _Fused(ScaledNode):
    """What the fused nodes share."""

    # Attributes of SpikingJelly's nodes.
    store_v_seq: bool

    def check(self, x: Tensor, shape: torch.Size) -> None:
        """See :class:`.sj_scaled.ScaledNode`."""
        _check(self, x, shape)

    def steps(self, x: Tensor, scaling: dict[str, Any]) -> Tensor:
        """See :class:`.sj_scaled.ScaledNode`."""
        many = self.step_mode == "m"
        spikes = run(self, x if many else x.unsqueeze(0), many and self.store_v_seq, **scaling)
        assert spikes is not None
        return spikes if many else spikes[0]

    def single_step_forward(self, x: Tensor) -> Tensor:
        """One step ``[*shape]``, the membrane carried on."""
        spikes = run(self, x.unsqueeze(0), False)
        return super().single_step_forward(x) if spikes is None else spikes[0]  # type: ignore[misc]

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        """All steps ``[T, *shape]``, the membrane carried on."""
        spikes = run(self, x_seq, self.store_v_seq)
        return super().multi_step_forward(x_seq) if spikes is None else spikes  # type: ignore[misc]


class FusedIFNode(_Fused, neuron.IFNode):
    """:class:`spikingjelly.activation_based.neuron.IFNode` on our kernels."""


class FusedLIFNode(_Fused, neuron.LIFNode):
    """SpikingJelly's ``LIFNode`` with ``decay_input=False`` where the leak is exact; on CPUs."""


class FusedVoltageScalerIn(ScalerIn, modules.VoltageScaler):
    """A ``VoltageScaler`` before a fused neuron."""


class FusedVoltageScalerOut(ScalerOut, modules.VoltageScaler):
    """A ``VoltageScaler`` after a fused neuron."""


# Their exact classes; a class that derives from one may compute anything.
FUSED = {neuron.IFNode: FusedIFNode, neuron.LIFNode: FusedLIFNode}
BETWEEN_SCALERS = (neuron.IFNode,)
SCALERS = {modules.VoltageScaler: (FusedVoltageScalerIn, FusedVoltageScalerOut)}
