"""Neurons with several thresholds, each half of the one before, and spikes of both signs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..impulse import for_inference
from ..spiking import SpikingActivation, per_channel_view, split_time
from ..steps import Steps
from .base import Method, whole_number

if TYPE_CHECKING:
    from ..thresholds import Site

__all__ = ["MultiThreshold", "MultiThresholdActivation"]

_FIRES = 0.75  # of its threshold: the middle between this one and the next lower


class MultiThresholdActivation(SpikingActivation):
    """Neurons whose spikes weigh ``±θ / 2^k``, k = 0..n-1.

    With the membrane charged to m a neuron fires the largest ``θ_k = θ / 2^k`` with
    ``m >= 0.75 θ_k``; else minus the largest with ``m <= -0.75 θ_k`` of those that it has put out
    in sum, so that the sum never falls below 0, as that of a ReLU. What it fires is subtracted.

    Args:
        args, kwargs: as for :class:`SpikingActivation`; the node's amplitude is the least
            threshold.
        thresholds: n.
    """

    def __init__(self, *args: Any, thresholds: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.thresholds = thresholds

    @property
    def binary(self) -> bool:
        """Spikes are whole multiples of the least threshold."""
        return False

    def forward(self, x: Tensor, T: int) -> Tensor:
        """Spikes ``[T * B, *]`` of a current ``[B, *]`` (constant) or ``[T * B, *]``."""
        self._check_channels(x.shape)
        for_inference("multi_threshold", x)
        rows = x.unsqueeze(0).expand(T, *x.shape) if self.constant else split_time(x, T)
        state = torch.float64 if x.dtype == torch.float64 else torch.float32
        dims, node = x.dim(), self.node

        def view(value: Any) -> Tensor:
            tensor = torch.as_tensor(value, dtype=state, device=x.device)
            return per_channel_view(tensor, self.channel_dim, dims)

        theta = view(node.threshold)
        start = 0.5 * theta if isinstance(node.v_init, str) else view(node.v_init)
        # Halving is exact, and so is the sum of what was put out, in units of the least threshold.
        levels = [(theta * 0.5**k, 2 ** (self.thresholds - 1 - k)) for k in range(self.thresholds)]
        v = start.expand(rows.shape[1:])
        zero = torch.zeros_like(v)
        total = torch.zeros_like(v, dtype=torch.int32)
        spikes = []
        for row in rows:
            m, fired = v + row.to(state), zero
            for level, units in reversed(levels):  # the larger ones have the last word
                least = _FIRES * level
                fired = torch.where(m >= least, level, fired)
                fired = torch.where((m <= -least) & (total >= units), -level, fired)
            v = m - fired
            total = total + (fired / levels[-1][0]).round().to(torch.int32)
            spikes.append(fired.to(x.dtype))
        return torch.cat(spikes)

    def events(self, out: Tensor, T: int) -> Tensor:
        """Spikes of any size and sign, elementwise: one is one."""
        return out != 0

    def spikes_per_step(self, out: Tensor, T: int) -> Tensor:
        """Spikes of any size and sign of a neuron and step, averaged."""
        return (split_time(out, T) != 0).double().mean()


@dataclass(frozen=True)
class MultiThreshold(Method):
    """Spikes of n sizes and both signs: few steps, each of which says more.

    A neuron fires the largest of ``θ, θ/2, ..., θ/2^(n-1)`` of which its membrane reaches three
    quarters, with a minus if it is that far below 0 and has put out as much
    (:class:`MultiThresholdActivation`). A step passes at most θ, so θ is the ceiling of the
    activation, and n says how fine: once currents have stopped, what remains in a membrane is below
    ``0.75 θ / 2^(n-1)``; while they come, up to a third of what it was charged to remains. It
    starts at 0: three quarters round already.

    Spikes are multi-valued: T compares with no binary method's. Of the source only the neuron is
    here, rate-coded: not its differential coding (spikes that correct a running mean), nor its
    iteration of thresholds from a Gaussian's mean and variance.

    Args:
        thresholds: n.
    """

    name = "multi_threshold"
    source = "Huang et al.: differential coding (DCGS), ICML 2025 (arXiv 2503.00301); its neuron"
    needs = (
        "as opi; its spikes have n sizes and both signs, so its T compares with no binary "
        "method's; inference only"
    )
    threshold = "max"
    v_init = "zero"
    binary = False

    thresholds: int = 8

    def __post_init__(self) -> None:
        whole_number(self, "thresholds", most=16)

    def steps(self) -> Steps:
        """The guard's sum does not outlive a call."""
        return Steps(whole=True)

    def neuron(self, site: Site, T: int) -> dict[str, Any]:
        """Spikes are counted in units of the least threshold."""
        return {"amplitude": site.theta * 0.5 ** (self.thresholds - 1)}

    def layer(self, site: Site) -> Callable[..., SpikingActivation]:
        """Neurons of n thresholds."""
        return partial(MultiThresholdActivation, thresholds=self.thresholds)
