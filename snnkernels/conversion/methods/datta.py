"""Thresholds and spike weights that are searched for together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..calibration import Statistics, collect
from ..datta import OBJECTIVES, search
from ..errors import ConversionError
from ..starts import parse_start, settled_start
from .base import Method

if TYPE_CHECKING:
    from ..context import Context
    from ..thresholds import Site

__all__ = ["Datta"]


@dataclass(frozen=True)
class Datta(Method):
    """Threshold ``alpha mu``, spikes of weight ``beta alpha mu``, membranes from 0.

    mu is the ceiling that the ANN learned (``ClipReLU``), else what ``threshold=`` says, by default
    the largest activation. For each layer :func:`snnkernels.conversion.datta_search` looks for the
    pair that fits the currents of the calibration data at the T of the conversion, over all of
    their percentiles; here they are in a histogram of 8192 bins for a layer, each as the mean of
    its values. The search knows the v_init in force. The paper then trains the spiking network on,
    as leaky neurons with surrogate gradients; that is up to the caller.

    Args:
        objective: ``"abs_sum"`` (the paper) or ``"mse"``.
    """

    name = "datta"
    source = (
        "Datta, Beerel: Can Deep Neural Networks be Converted to Ultra Low-Latency Spiking Neural "
        "Networks?, DATE 2022"
    )
    needs = "calibration data (the paper: an ANN trained with ClipReLU)"
    trains = "ClipReLU"
    threshold = "max"
    per_channel = False

    objective: str = "abs_sum"

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            allowed = " and ".join(map(repr, OBJECTIVES))
            raise ValueError(
                f"datta: objective={self.objective!r} is unknown; allowed are {allowed}"
            )

    def neuron(self, site: Site, T: int) -> dict[str, Any]:
        """What the search found."""
        return {} if site.amplitude is None else {"amplitude": site.amplitude}

    def settle(self, context: Context) -> None:
        """The search, layer by layer."""
        if context.batches is None or context.sample is None:
            raise ValueError(
                "loader is None, but method='datta' fits thresholds to currents: pass loader= (an "
                "iterable of input batches, or one tensor)"
            )
        for site in context.sites:
            if isinstance(site.start, str) and site.start == "mse":
                raise ConversionError(
                    f"{site.label}: v_init='mse' cannot be combined with method='datta': it fits "
                    "spikes that weigh θ. Pass 'half', 'zero', a part of θ or a number"
                )
        seen = _currents(context)
        found = []
        for site in context.sites:
            alpha, beta = _scaling(site, seen[site.path], context.T, self.objective)
            mu = site.theta
            site.theta = (alpha * mu.double()).to(mu.dtype)
            site.amplitude = (beta * site.theta.double()).to(mu.dtype)
            if isinstance(site.start, str):
                site.v_init = site.start
                site.v_init = settled_start(site, context.seen.get(site.path))
                if isinstance(site.v_init, Tensor):
                    site.v_init = site.v_init.to(mu.device, mu.dtype)
            found.append(f"{site.label} {_short(alpha)}, {_short(beta)}")
        context.report.notes.append(
            "θ is α times the ceiling, a spike weighs β θ; α, β by layer: " + "; ".join(found)
        )


def _short(value: Tensor) -> str:
    low, high = float(value.min()), float(value.max())
    return f"{low:.3g}" if low == high else f"{low:.3g} .. {high:.3g}"


def _currents(context: Context) -> dict[str, Statistics]:
    """Histograms of the positive currents at every activation, over the loader."""
    assert context.source is not None
    how: dict[str, tuple[bool | None, int]] = {
        s.path: (s.theta.dim() == 1, s.channel_dim) for s in context.sites
    }
    return collect(context.model, how, context.source, progress=False, currents=True)


def _scaling(site: Site, seen: Statistics, T: int, objective: str) -> tuple[Tensor, Tensor]:
    """alpha and beta of a layer, float64, of the shape of its threshold."""
    histogram = seen.histogram
    assert histogram is not None
    value, weight = histogram.points()
    silent = histogram.total - weight.sum(1, keepdim=True)
    candidates = torch.stack([histogram.percentile(float(p)) for p in range(101)], 1)
    mu = site.theta.double().reshape(-1).to(value.device)
    start, v_init = None, torch.zeros_like(mu)
    if isinstance(site.start, str):
        start = parse_start(site.start).fraction
    else:
        given = torch.as_tensor(site.start, dtype=torch.float64).to(value.device)
        v_init = given if given.numel() == len(mu) else given.mean()
        v_init = v_init.reshape(-1).expand(len(mu))
    alpha, beta, _ = search(
        torch.cat([value, torch.zeros_like(silent)], 1),
        torch.cat([weight, silent], 1),
        histogram.total,
        candidates,
        mu,
        T,
        objective,
        start,
        v_init,
    )
    # Of a layer that answers one value there is nothing to choose.
    constant = ((weight > 0).sum(1) + (silent[:, 0] > 0)) < 2
    alpha, beta = torch.where(constant, 1.0, alpha), torch.where(constant, 1.0, beta)
    shape, device = site.theta.shape, site.theta.device
    return alpha.reshape(shape).to(device), beta.reshape(shape).to(device)
