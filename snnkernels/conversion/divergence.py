"""Thresholds whose quantised histogram is nearest to the histogram: KL calibration."""

from __future__ import annotations

import torch
from torch import Tensor

from .histogram import Histogram

__all__ = ["bins_for", "kl_threshold"]

_LEAST, _MOST, _PER_LEVEL = 128, 2048, 16
_EMPTY = 1e-9  # less than that of a value in a bin is the rounding of a spread-out count


def bins_for(T: int) -> int:
    """Bins that KL calibration compares: 16 for each of T levels, at least 128, at most 2,048."""
    return min(max(_PER_LEVEL * T, _LEAST), _MOST)


def kl_threshold(
    histogram: Histogram,
    T: int,
    v_init: Tensor | float,
    *,
    bins: int | None = None,
    pooled: bool = False,
) -> Tensor:
    """The clip value V whose T levels keep most of the histogram, by Kullback-Leibler divergence.

    Source: S. Migacz, 8-bit Inference with TensorRT, GTC 2017 (entropy calibration). There 2,048
    bins of the whole range are quantised to 128 levels, here ``bins`` (16 for each level, see
    :func:`bins_for`) equal bins of ``(0, max]`` to the T + 1 levels of the staircase in force,
    ``clip(floor((aT + v_init) / V), 0, T)``, each bin at its centre. As there, a candidate is the
    upper edge of bin i, from a 16th of the range (T bins, if those are more) to all of it; P is the
    histogram up to it with everything above added to its last bin; Q has the mass of each level,
    without what was above, spread evenly over the bins of that level that are not empty; and a bin
    with P but not Q makes the divergence infinite. V is the edge itself, not half a bin above.
    Exact zeros are left out: they are 0 whatever the threshold, and so many that they would hide
    the rest.

    Args:
        histogram: of the ANN's activations; its own bins are spread evenly over these.
        T: number of steps.
        v_init: absolute potential, a tensor, scalar or ``[C]``; or a number, the part of V.
        bins: number of bins, instead of ``bins_for(T)``.
        pooled: all channels as one.

    Returns:
        float64 ``[C]`` (``[1]`` if pooled); 0 for a channel without a positive value. Of equal
        candidates the largest.
    """
    bins = bins_for(T) if bins is None else bins
    largest = histogram.maximum
    largest = largest.amax().expand_as(largest) if pooled else largest
    fired = largest > 0
    width = torch.where(fired, largest, 1.0) / bins
    mass = _spread(histogram, width, bins)
    if pooled:
        mass, width, fired = mass.sum(0, keepdim=True), width[:1], fired[:1]
    best = torch.full_like(width, torch.inf)
    chosen = width * bins
    tables = _Tables(mass)
    for i in range(bins, min(max(bins // _PER_LEVEL, T), bins) - 1, -1):
        edge = width * i
        if isinstance(v_init, Tensor):
            part = v_init.double().to(edge.device).reshape(-1) / edge
        else:
            part = torch.full_like(edge, v_init)
        found = tables.divergence(i, T, part)
        better = found < best
        best, chosen = torch.where(better, found, best), torch.where(better, edge, chosen)
    return torch.where(fired, chosen, 0.0)


def _spread(histogram: Histogram, width: Tensor, bins: int) -> Tensor:
    """The counts of ``histogram`` in ``bins`` bins of ``width`` ``[C]``, float64 ``[C, bins]``."""
    counts = histogram.counts.double()
    own = counts.shape[1]
    total = _from_zero(counts)
    edges = torch.arange(bins + 1, dtype=torch.float64, device=counts.device)
    spread = torch.where(histogram.range > 0, histogram.range, 1.0)
    place = (edges * (width / spread)[:, None] * own).clamp(max=own)
    below = place.floor().clamp(max=own - 1).long()
    cumulated = total.gather(1, below) + (place - below) * counts.gather(1, below)
    cumulated[:, -1] = total[:, -1]  # the largest value lies at the last edge or just below
    mass = cumulated.diff(dim=1)
    return torch.where(mass > _EMPTY, mass, 0.0)


def _from_zero(table: Tensor) -> Tensor:
    """Cumulative sums along dim 1 that begin with 0: one column more."""
    return torch.nn.functional.pad(table.cumsum(1), (1, 0))


class _Tables:
    """Cumulative sums of a histogram ``[C, bins]``, so that a candidate costs T sums."""

    def __init__(self, mass: Tensor) -> None:
        self.each = mass
        self.mass = _from_zero(mass)
        self.used = _from_zero((mass > 0).double())
        self.entropy = _from_zero(torch.xlogy(mass, mass))

    def divergence(self, i: int, T: int, part: Tensor) -> Tensor:
        """KL(P || Q) of clipping at the upper edge of bin i (from 1), v_init being ``part`` V."""
        total = self.mass[:, -1].clamp(min=_EMPTY)
        inside = self.mass[:, i]
        outside = self.mass[:, -1] - inside
        last = self.each[:, i - 1] + outside
        # Sum of p log p, the last bin with what was clipped.
        body = self.entropy[:, i - 1] - self.mass[:, i - 1] * total.log()
        own = (body + torch.xlogy(last, last / total)) / total
        levels = torch.arange(T + 2, dtype=torch.float64, device=part.device)
        # The first bin whose centre reaches level k.
        first = ((levels - part[:, None]) * i / T - 0.5).ceil().clamp(0, i)
        first[:, 0], first[:, -1] = 0, i
        at = first.long()
        below = self.mass.gather(1, at)
        of_q = below.diff(dim=1) / inside.clamp(min=_EMPTY)[:, None]
        below = torch.where(at == i, self.mass[:, -1:], below)
        of_p = below.diff(dim=1) / total[:, None]
        of_q = of_q / self.used.gather(1, at).diff(dim=1).clamp(min=1)
        cross = torch.where(of_p > 0, of_p * of_q.log(), 0.0).sum(1)
        lost = (outside > _EMPTY) & (self.each[:, i - 1] <= 0)
        return torch.where(lost, torch.inf, own - cross)
