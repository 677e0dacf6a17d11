"""Time to first spike: one spike says it all by when it comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...maps import qcfs, ttfs_decode, ttfs_encode
from ..impulse import neuron_depth, take_turns
from ..spiking import SpikingActivation
from ..steps import Steps
from .base import Method, check_steps

if TYPE_CHECKING:
    from ..context import Context
    from ..network import ConvertedNetwork
    from ..thresholds import Site

__all__ = ["TTFS", "TTFSActivation"]


class TTFSActivation(SpikingActivation):
    """Neurons that spike at most once in a window of T steps, the earlier the larger the current.

    Args:
        args, kwargs: as for :class:`SpikingActivation`.
        round: the nearest of the T levels instead of the one below.
    """

    def __init__(self, *args: Any, round: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.round = round

    def times(self, x: Tensor) -> Tensor:
        """When the neurons spike for a current ``[B, *]``: uint8 or int16, T for never."""
        threshold = self.node.threshold
        dim = self._channels_of(threshold, x.dim())
        return ttfs_encode(x, threshold, self.clock.levels, self.round, dim)

    def forward(self, x: Tensor, T: int) -> Tensor:
        """What the spikes of the window say: ``θ (T - t) / T``, 0 without one; ``[B, *]``."""
        self._check_channels(x.shape)
        steps, threshold = self.clock.levels, self.node.threshold
        check_steps(TTFS, steps)
        dim = self._channels_of(threshold, x.dim())
        value = ttfs_decode(self.times(x), threshold, steps, x.dtype, dim)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return value
        # Times have no gradient; the staircase they are has that of QCFS.
        smooth = qcfs(x, threshold, steps, 0.5 if self.round else 0.0, "floor_clip", dim)
        return value + (smooth - smooth.detach())

    def events(self, out: Tensor, T: int) -> Tensor:
        """The spikes of the window, elementwise: at most one."""
        return out != 0

    def spikes_per_step(self, out: Tensor, T: int) -> Tensor:
        """Spikes of a neuron and step of its window, averaged: at most one in T."""
        return (out != 0).double().mean() / T


@dataclass(frozen=True)
class TTFS(Method):
    """Every neuron spikes at most once in a window of T steps; the time is the value.

    A neuron fires at the first step t of its window, counted from 0, at which its current reaches
    ``θ (T - t) / T``, and never if it stays below ``θ / T``; a spike at t says ``θ (T - t) / T``.
    The next layer sums ``W`` times that, which is what step-shaped postsynaptic potentials of θ / T
    add up to from t to the window's end, and its bias once: a staircase of T levels, a product
    instead of a loop over time. ``round=True`` adds ``θ / 2T`` to the current first: with T = L
    the network of QCFS activations.

    Each layer waits for the window of the one before, and the image takes the first: with n layers
    of neurons an answer takes ``(n + 1) T`` steps, of which n T are counted as extra. Every T is a
    pass of its own. The windowed form is our specification, of the family of LC-TTFS; of the paper
    named as the source only the abstract was available.

    Args:
        round: the nearest level instead of the one below.
    """

    name = "ttfs"
    source = "Srivatsa et al.: You Only Spike Once, 2020 (arXiv 2006.09982)"
    needs = "as opi; one spike per neuron, but layers take turns, which adds T steps for each"
    threshold = "mmse"
    v_init = "half"
    most_steps = 2**15 - 1  # times are int16

    round: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.round, bool):
            raise TypeError(f"ttfs: round={self.round!r} must be True or False")
        if not self.round:
            # What thresholds from data reckon with.
            object.__setattr__(self, "v_init", "zero")

    def steps(self) -> Steps:
        """One pass on what the times say."""
        return Steps(whole=True, parallel=True)

    def neuron(self, site: Site, T: int) -> dict[str, Any]:
        """There is no membrane to start: ``round`` says what v_init would."""
        start = site.v_init
        plain = start == "half" if self.round else isinstance(start, Tensor) and not start.any()
        if site.fit_start or not plain:
            raise ValueError(
                f"v_init={site.asked_start} for {site.label} must be left to method='ttfs', which "
                "has no membrane to start: TTFS(round=False) takes the level below, "
                "TTFS(round=True) the nearest"
            )
        return {}

    def layer(self, site: Site) -> Callable[..., SpikingActivation]:
        """Neurons of one spike."""
        return partial(TTFSActivation, round=self.round)

    def finish(self, snn: ConvertedNetwork, context: Context) -> None:
        """Count the windows."""
        take_turns(snn, neuron_depth(snn.body))
        context.report.notes.append(
            f"layers take turns of T steps, the image first: T={snn.T} takes "
            f"{snn.T + snn.extra_steps} steps"
        )
