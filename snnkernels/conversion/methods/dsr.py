"""Differentiation on spike representation: a network that goes on training as it spikes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..dsr import check_dsr, dsr_spikes, step_weights
from ..spiking import SpikingActivation, per_channel_view, split_time
from ..steps import Steps
from .base import Method

if TYPE_CHECKING:
    from ..thresholds import Site

__all__ = ["DSR", "DSRActivation"]


class DSRActivation(SpikingActivation):
    """A layer of :func:`snnkernels.conversion.dsr.dsr_spikes` with a trainable threshold.

    Args:
        args, kwargs: as for :class:`SpikingActivation`; the node holds the threshold.
        how: ``kind``, ``alpha``, ``tau`` and ``dt``.
    """

    def __init__(self, *args: Any, how: DSR, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.how = how

    def forward(self, x: Tensor, T: int) -> Tensor:
        """Spikes ``[T * B, *]`` of a current ``[B, *]`` (constant) or ``[T * B, *]``."""
        self._check_channels(x.shape)
        how, threshold = self.how, torch.as_tensor(self.node.threshold)
        if how.kind == "lif" and how.tau != 1:
            x = x * how.tau  # what spikes stand for is the current over tau
        rows = x.unsqueeze(0).expand(T, *x.shape) if self.constant else split_time(x, T)
        dim = self._channels_of(threshold, x.dim())
        spikes = dsr_spikes(rows, threshold, how.kind, how.alpha, how.tau, how.dt, dim)
        return spikes.flatten(0, 1)

    def _weight(self) -> Tensor:
        """What a spike weighs in the network."""
        threshold = torch.as_tensor(self.node.threshold)
        return threshold if self.how.kind == "if" else threshold / self.how.dt

    def count(self, spikes: Tensor) -> Tensor:
        """Spikes ``[T, B, *]`` counted; those of LIF neurons by the weights of their steps."""
        if self.how.kind == "if":
            return super().count(spikes)
        wide = spikes.float() if spikes.dtype in (torch.float16, torch.bfloat16) else spikes
        weights = step_weights(len(spikes), "lif", self.how.tau, self.how.dt, wide)
        weight = per_channel_view(self._weight(), self.channel_dim, spikes.dim() - 1)
        return torch.tensordot(weights, wide, dims=1) / weight

    def rate(self, count: Tensor, T: int, dtype: torch.dtype) -> Tensor:
        """The mean over T steps that counts say, weighted for LIF."""
        weight = self._weight() if self.scale is None else self._weight() * self.scale
        weight = per_channel_view(weight, self.channel_dim, count.dim())
        total: Any = T
        if self.how.kind == "lif":
            total = step_weights(T, "lif", self.how.tau, self.how.dt, weight).sum()
        return (weight * count / total).to(dtype)

    def events(self, out: Tensor, T: int) -> Tensor:
        """Spikes, elementwise; those of LIF neurons weigh differently from step to step."""
        return out != 0

    def spikes_per_step(self, out: Tensor, T: int) -> Tensor:
        """Spikes of a neuron and step, averaged."""
        return (split_time(out, T) != 0).double().mean()


@dataclass(frozen=True)
class DSR(Method):
    """Neurons that fire at ``alpha θ`` and subtract θ, trained on through what spikes stand for.

    A training method: the ANN is where the training starts. The converted network's gradients are
    those of the representation (:func:`snnkernels.conversion.dsr.dsr_spikes`), without a graph over
    time; its weights and thresholds (at least 1e-3 of where they started; the paper has absolute
    floors) are parameters. To train from scratch build a network of
    :class:`snnkernels.conversion.dsr.DSRNode`. For neurons behind the last layer too, as in the
    paper, convert :func:`snnkernels.conversion.dsr.spiking_output` of the ANN.

    ``kind="if"`` spikes like OPI with ``v_init = (1 - alpha) θ`` (alpha 1/2: half the threshold).
    ``kind="lif"`` leaks: read-outs weigh step t by ``exp(-(T - t) dt / tau)``, every T is a run of
    its own, and the threshold of the membrane is ``θ dt``. What remains of the membrane never
    averages out (about ``θ dt / tau``), and a current is scaled by
    ``(1 - exp(-dt / tau)) tau / dt``, not quite 1: train before use. The gradient of a LIF
    threshold is the authors', with dt where that of the representation has 1 / dt; the gradient
    behind a weighted read-out is ``T Σ w²`` times that of the representation (w sums to 1).

    Args:
        kind: ``"if"`` or ``"lif"``.
        alpha: level that fires, as a part of θ; the paper has 0.5 (IF) and 0.3 (LIF, T = 20).
        tau, dt: time constant and step of LIF.
    """

    name = "dsr"
    source = (
        "Meng et al.: Training High-Performance Low-Latency SNNs by Differentiation on Spike "
        "Representation (DSR), CVPR 2022"
    )
    needs = "training of the converted network; the ANN is its start (data for plain ReLU)"
    trains = "ClipReLU"
    threshold = "max"
    per_channel = False
    v_init = "zero"

    kind: str = "if"
    alpha: float = 0.5
    tau: float = 1.0
    dt: float = 0.05

    def __post_init__(self) -> None:
        check_dsr(self.kind, self.alpha, self.tau, self.dt)

    def steps(self) -> Steps:
        """LIF weighs steps by how far the end is: every T is a run of its own."""
        return Steps(whole=True, apart=self.kind == "lif")

    def neuron(self, site: Site, T: int) -> dict[str, Any]:
        """The threshold is all a node holds here."""
        if isinstance(site.v_init, str) or torch.as_tensor(site.v_init).any():
            raise ValueError(
                f"v_init={site.asked_start} for {site.label}: membranes start at 0 with "
                "method='dsr', whose alpha does what v_init would: alpha=0.5 is v_init='half'"
            )
        lif = self.kind == "lif"
        return {
            "v_threshold": site.theta * self.dt if lif else site.theta,
            "amplitude": site.theta,
            "v_init": 0.0,
            "learn_threshold": True,
        }

    def layer(self, site: Site) -> Callable[..., SpikingActivation]:
        """Spikes with the gradients of their representation."""
        return partial(DSRActivation, how=self)
