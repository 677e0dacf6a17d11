"""Bit-serial conversion: T steps carry T bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...maps import bit_planes, popcount
from ..activations import QCFS
from ..impulse import (
    ImpulseActivation,
    for_inference,
    neuron_depth,
    refuse_pools,
    take_turns,
)
from ..spiking import SpikingActivation, per_channel_view, split_time
from ..steps import Steps
from .base import Method, check_steps

if TYPE_CHECKING:
    from ..context import Context
    from ..network import ConvertedNetwork
    from ..thresholds import Site

__all__ = ["BitSerial", "BitSerialActivation"]


class BitSerialActivation(ImpulseActivation):
    """Neurons that first accumulate T planes of spikes, then emit T of their own.

    Of the planes ``y(1..T)`` that arrive, each twice the weight of the next, the current is
    ``z = 2 z + y(t)`` step by step, plus the bias, once. What is emitted are the bits of
    ``clip(floor(z / D + 1/2), 0, 2^T - 1)`` with ``D = θ / (2^T - 1)``, found by comparing
    ``z + D / 2`` with ``2^(T - t) D``; a spike weighs D.
    """

    def forward(self, x: Tensor, T: int) -> Tensor:
        """``[B, *]`` to values ``[B, *]`` in one pass; else planes ``[T * B, *]``, one silent."""
        bits = self.clock.levels
        check_steps(BitSerial, bits)
        if self.clock.steps.parallel:
            self._check_channels(x.shape)
            return self._at_once(x, 2**bits - 1)
        return super().forward(x, T)

    def fire(self, currents: Tensor) -> Tensor:
        """Planes of spikes ``[T, B, *]``, the most significant first."""
        for_inference("unrolled bit_serial", currents, "; BitSerial(unrolled=False) has gradients")
        bits, wide = len(currents), currents
        if wide.dtype in (torch.float16, torch.bfloat16):
            wide = wide.float()
        z = wide[0]
        for row in wide[1:]:
            z = 2 * z + row
        threshold = self.node.threshold
        dim = self._channels_of(threshold, z.dim())
        planes = bit_planes(z, threshold, bits, planes=True, channel_dim=dim)[1]
        weight = per_channel_view(self._weight().to(z), self.channel_dim, z.dim())
        unit = (weight / (2**bits - 1)).to(currents.dtype)
        return torch.where(planes != 0, unit, torch.zeros_like(unit))

    def count(self, spikes: Tensor) -> Tensor:
        """Planes ``[T, B, *]`` as the whole number they write."""
        if self.clock.steps.parallel:
            return spikes[0]
        q = torch.zeros(spikes.shape[1:], dtype=torch.int32, device=spikes.device)
        for plane in spikes:
            q = 2 * q + (plane != 0)
        return q

    def rate(self, count: Tensor, T: int, dtype: torch.dtype) -> Tensor:
        """``θ count / (2^T - 1)``."""
        if self.clock.steps.parallel:
            return super().rate(count, T, dtype)
        scale = self._weight() if self.scale is None else self.scale
        scale = per_channel_view(scale, self.channel_dim, count.dim())
        return (scale * count / (2**T - 1)).to(dtype)

    def events(self, out: Tensor, T: int) -> Tensor:
        """Ones of all planes, elementwise; of a plane where it runs in planes."""
        if not self.clock.steps.parallel:
            return out != 0
        weight = per_channel_view(self._weight(), self.channel_dim, out.dim())
        q = (out / weight * (2**T - 1)).round().to(torch.int32)
        return popcount(q[None])

    def spikes_per_step(self, out: Tensor, T: int) -> Tensor:
        """Ones of a neuron and plane, averaged."""
        if not self.clock.steps.parallel:
            return (split_time(out, T + 1)[1:] != 0).double().mean()
        weight = per_channel_view(self._weight(), self.channel_dim, out.dim())
        q = (out / weight * (2**T - 1)).round().to(torch.int32)
        return popcount(q[None]).double().mean() / T


@dataclass(frozen=True)
class BitSerial(Method):
    """Spikes with the weights of bits: T steps tell ``2^T - 1`` levels apart.

    A layer waits until all T planes of spikes have arrived, accumulating them, and then emits T
    planes of its own (:class:`BitSerialActivation`): the network of QCFS activations with
    ``L = 2^T - 1`` levels, whatever the currents. T = 3 is L = 7, so a network trained for 8 levels
    is matched by neither 3 nor 4 steps, only approximated.

    It runs as one pass of that network, at the cost of the ANN (and with its gradients);
    ``unrolled=True`` runs the planes: the same up to the rounding of sums in another order. Layers
    wait for each other, which is counted: n layers of neurons take n T steps. Every T is a pass of
    its own.

    The source is described by its abstract and its reviews only; how bits are accumulated and
    generated is our specification of it. Not part: its training with a penalty on bits.

    Args:
        unrolled: run T planes of binary spikes instead of one pass; no gradients, no max-pools.
    """

    name = "bit_serial"
    source = "Datta et al., 2023 (arXiv 2312.06900)"
    needs = (
        "as opi (the paper: an ANN trained with QCFS, here of 2^T - 1 levels); layers take turns, "
        "which adds T steps for each but the first"
    )
    trains = "QCFS"
    threshold = "mmse"
    v_init = "half"
    most_steps = 24  # whole numbers of more bits are no longer exact in float32

    unrolled: bool = False

    def steps(self) -> Steps:
        """One pass; or the silent row and T planes, the bias with the last, whose weight is 1."""
        if not self.unrolled:
            return Steps(whole=True, parallel=True)
        return Steps(before=1, whole=True, apart=True, bias="last")

    def levels_of(self, site: Site, T: int) -> int:
        """``2^T - 1``."""
        return 2 ** min(T, self.most_steps) - 1

    def neuron(self, site: Site, T: int) -> dict[str, Any]:
        """Half a level is added before bits are taken: no other start."""
        if site.fit_start or site.v_init != "half":
            raise ValueError(
                f"v_init={site.asked_start} for {site.label}: bits are taken of z + D / 2 with "
                "method='bit_serial', so v_init must be 'half'"
            )
        return {}

    def layer(self, site: Site) -> Callable[..., SpikingActivation]:
        """Neurons that wait for all planes."""
        return BitSerialActivation

    def finish(self, snn: ConvertedNetwork, context: Context) -> None:
        """Count the layers that wait, and refuse what planes cannot pass."""
        if self.unrolled:
            refuse_pools(snn, self.name, cumulative=True)
        take_turns(snn, neuron_depth(snn.body) - 1)
        levels = 2**snn.T - 1
        context.report.notes.append(
            f"layers take turns of T steps: T={snn.T} takes {snn.T + snn.extra_steps} steps, and "
            f"tells {levels} levels apart"
        )
        trained = {
            site.label: site.activation.inner.levels
            for site in context.sites
            if isinstance(site.activation.inner, QCFS) and site.activation.inner.levels != levels
        }
        if trained:
            context.report.notes.append(
                f"trained for another number of levels than {levels}: "
                + ", ".join(f"{label} for {n}" for label, n in trained.items())
            )
