"""Fused forms of SpikingJelly 2.0.0's classes; imports SpikingJelly, so only its adapter does.

Each is a subclass that overrides the arithmetic and nothing else. State, reset values, step mode,
``v_seq`` and what happens when the batch changes are SpikingJelly's own code.
"""

from __future__ import annotations

from typing import Any

import torch
from spikingjelly.activation_based import functional, neuron
from spikingjelly.activation_based.ann2snn import modules
from torch import Tensor

from . import sj_run
from .adapters import Refused
from .checks import say
from .sj_scaled import ScaledNode, ScalerIn, ScalerOut

__all__ = [
    "BETWEEN_SCALERS",
    "FUSED",
    "SCALERS",
    "FusedActivationAwareIFNode",
    "FusedHalfThresholdIFNode",
    "FusedIFNode",
    "FusedLIFNode",
]


class _Fused(ScaledNode):
    """What the fused nodes share: the numbers of a call, ours or SpikingJelly's."""

    # Attributes of SpikingJelly's nodes.
    v_threshold: Any
    v_reset: float | None
    detach_reset: bool
    store_v_seq: bool
    v_seq: Tensor | None
    _memories: dict[str, Any]
    _neuron_precision: Any = None

    def _beta(self) -> float | None:
        return None

    def _theirs(self, x_seq: Tensor, v: Any, store: bool) -> tuple[Any, Any, Any]:
        """SpikingJelly's numbers, by its own function."""
        precision = self._neuron_precision or (None, "fp32", "fp32")
        return functional.if_multi_step(
            x_seq, v, self.v_threshold, self.v_reset, self.surrogate_function, self.detach_reset,
            store, neuron_storage=precision[0], neuron_fwd=precision[1], neuron_bwd=precision[2],
        )  # fmt: skip

    def _check(self, x: Any, v: Any, shape: Any) -> None:
        if self._neuron_precision is not None:
            raise Refused("PrecisionConfig chose how the membrane is stored")
        sj_run.check(x, v, self.v_threshold, self.v_reset, shape)

    def _run(self, x_seq: Tensor, v: Any, store: bool) -> tuple[Any, Any, Any]:
        if not x_seq.shape[0]:
            return self._theirs(x_seq, v, store)
        try:
            self._check(x_seq, v, x_seq.shape[1:])
            surrogate = sj_run.surrogate_of(self.surrogate_function)
            beta = self._beta()
        except Refused as refused:
            say(refused, sj_run.OWN)
            return self._theirs(x_seq, v, store)
        return sj_run.run(
            x_seq, v, self.v_threshold, self.v_reset, surrogate, self.detach_reset, store, beta=beta
        )

    def check(self, x: Tensor, shape: torch.Size) -> None:
        """See :class:`.sj_scaled.ScaledNode`."""
        # A membrane of another shape or dtype becomes one that fits.
        v = self._memories["v"]
        self._check(x, 0.0 if isinstance(v, Tensor) else v, shape)

    def steps(self, x: Tensor, scaling: dict[str, Any]) -> Tensor:
        """See :class:`.sj_scaled.ScaledNode`."""
        many, store = self.step_mode == "m", self.store_v_seq
        states = tuple(self._memories.values())
        v = self.materialize_states((x,), states, self.step_mode)[0]  # type: ignore[attr-defined]
        spikes, v, v_seq = sj_run.run(
            x if many else x.unsqueeze(0), v, self.v_threshold, self.v_reset,
            sj_run.surrogate_of(self.surrogate_function), self.detach_reset, store and many,
            **scaling,
        )  # fmt: skip
        self._memories["v"] = v
        if many and (store or self.v_seq is not None):
            self.v_seq = v_seq
        elif store:
            self._append_v_seq(v)  # type: ignore[attr-defined]
        return spikes if many else spikes[0]

    def single_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], **kwargs: Any
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """One step with explicit state, as SpikingJelly's."""
        x, v = inputs[0], states[0]
        if x.dim() == 0:
            spikes, v, _ = self._run(x.reshape(1, 1), v.reshape(1), False)
            return (spikes[0, 0],), (v.reshape(()), *states[1:])
        spikes, v, _ = self._run(x.unsqueeze(0), v, False)
        return (spikes[0],), (v, *states[1:])

    def multi_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], **kwargs: Any
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """All steps with explicit state, as SpikingJelly's."""
        spikes, v, _ = self._run(inputs[0], states[0], False)
        return (spikes,), (v, *states[1:])

    def multi_step_forward(self, x_seq: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """All steps ``[T, *shape]``, the membrane carried on."""
        cls = type(self)
        if (
            cls.single_step_functional_forward is not _Fused.single_step_functional_forward
            or cls.multi_step_functional_forward is not _Fused.multi_step_functional_forward
        ):  # a class that derives from ours has steps of its own, as SpikingJelly looks for too
            return neuron.BaseNode.multi_step_forward(self, x_seq, *args, **kwargs)
        inputs, store = (x_seq, *args), self.store_v_seq
        states = self.materialize_states(inputs, tuple(self._memories.values()), "m")  # type: ignore[attr-defined]
        spikes, self._memories["v"], v_seq = self._run(x_seq, states[0], store)
        if store or self.v_seq is not None:
            self.v_seq = v_seq
        return spikes


class FusedIFNode(_Fused, neuron.IFNode):
    """:class:`spikingjelly.activation_based.neuron.IFNode` on our kernels."""


class FusedHalfThresholdIFNode(_Fused, neuron.HalfThresholdIFNode):
    """SpikingJelly's ``HalfThresholdIFNode``: all steps in one launch."""


class FusedLIFNode(_Fused, neuron.LIFNode):
    """SpikingJelly's ``LIFNode`` with ``decay_input=False`` where the leak is exact; on CPUs."""

    tau: float
    decay_input: bool

    def _beta(self) -> float:
        if self.decay_input:
            raise Refused("decay_input=True rounds in another order")
        return sj_run.leak_of(self.tau, self.v_reset, exact=False)

    def _theirs(self, x_seq: Tensor, v: Any, store: bool) -> tuple[Any, Any, Any]:
        precision = self._neuron_precision or (None, "fp32", "fp32")
        return functional.lif_multi_step(
            x_seq, v, self.tau, self.decay_input, self.v_threshold, self.v_reset,
            self.surrogate_function, self.detach_reset, store, neuron_storage=precision[0],
            neuron_fwd=precision[1], neuron_bwd=precision[2],
        )  # fmt: skip

    def _run(self, x_seq: Tensor, v: Any, store: bool) -> tuple[Any, Any, Any]:
        # On GPUs the compiler may contract its sums, and it has a kernel of its own.
        if x_seq.device.type != "cpu":
            return self._theirs(x_seq, v, store)
        return super()._run(x_seq, v, store)


class FusedActivationAwareIFNode(_Fused, neuron.ActivationAwareIFNode):
    """SpikingJelly's ``ActivationAwareIFNode``: thresholds and offsets per channel."""

    v_offset: Tensor
    channel_dim: int

    def _run(self, x_seq: Tensor, v: Any, store: bool) -> tuple[Any, Any, Any]:
        if not x_seq.shape[0]:
            return self._loop(x_seq, v, store)
        x = x_seq[0]
        try:
            sj_run.check(x_seq, v, self.v_threshold, self.v_reset, x.shape)
            surrogate = sj_run.surrogate_of(self.surrogate_function)
        except Refused as refused:
            say(refused, sj_run.OWN)
            return self._loop(x_seq, v, store)
        threshold = self._broadcast_parameter(self.v_threshold, x, "v_threshold")
        return sj_run.run(
            x_seq, v, threshold, self.v_reset, surrogate, self.detach_reset, store,
            fire_level=self._fire_level(threshold, x),
        )  # fmt: skip

    def _fire_level(self, threshold: Tensor, x: Tensor) -> Tensor | None:
        """The least charge that fires, None where that is the threshold; kept while they last."""
        inputs = (self.v_threshold, self.v_offset)
        key = [(id(t), t._version) for t in inputs] + [x.dtype, x.device, x.dim()]
        kept = self.__dict__.get("_level")
        if kept is None or kept[0] != key:
            offset = self._broadcast_parameter(self.v_offset, x, "v_offset")
            none = not bool((offset != 0).any())
            level = None if none else sj_run.fire_level(threshold, offset)
            # The tensors too: an id is good while they live.
            kept = self.__dict__["_level"] = (key, level, inputs)
        return kept[1]

    def _loop(self, x_seq: Tensor, v: Any, store: bool) -> tuple[Any, Any, Any]:
        """SpikingJelly's numbers where ours do not serve."""
        if self._can_use_registered_multi_step(x_seq, v):
            return self._registered_multi_step_functional_forward(x_seq, v, store)
        spikes, voltages = [], []
        for x in x_seq:
            out, (v,) = _step_of_theirs(self, (x,), (v,))
            spikes.append(out[0])
            voltages.append(v)
        return torch.stack(spikes), v, torch.stack(voltages) if store else None


class FusedVoltageScalerIn(ScalerIn, modules.VoltageScaler):
    """A ``VoltageScaler`` before a fused neuron."""


class FusedVoltageScalerOut(ScalerOut, modules.VoltageScaler):
    """A ``VoltageScaler`` after a fused neuron."""


class FusedChannelVoltageScalerIn(ScalerIn, modules.ChannelVoltageScaler):
    """A ``ChannelVoltageScaler`` before a fused neuron."""


class FusedChannelVoltageScalerOut(ScalerOut, modules.ChannelVoltageScaler):
    """A ``ChannelVoltageScaler`` after a fused neuron."""


# Kept: the name of the class may be swapped for ours.
_step_of_theirs = neuron.ActivationAwareIFNode.single_step_functional_forward

# Their exact classes; a class that derives from one may compute anything.
FUSED = {
    neuron.IFNode: FusedIFNode,
    neuron.HalfThresholdIFNode: FusedHalfThresholdIFNode,
    neuron.ActivationAwareIFNode: FusedActivationAwareIFNode,
    neuron.LIFNode: FusedLIFNode,
}

BETWEEN_SCALERS = (neuron.IFNode, neuron.HalfThresholdIFNode)
SCALERS = {
    modules.VoltageScaler: (FusedVoltageScalerIn, FusedVoltageScalerOut),
    modules.ChannelVoltageScaler: (FusedChannelVoltageScalerIn, FusedChannelVoltageScalerOut),
}
