"""A histogram of non-negative values per channel that widens itself: one pass, fixed memory."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Histogram"]


class Histogram:
    """Counts and sums of non-negative values per channel in bins that double their width.

    The range of a channel starts at its first positive maximum; when a larger value arrives the
    range doubles and neighbouring bins merge, so at least half the bins stay in use. Sums are kept
    with the counts: a bin is represented by the mean of its values, and a bin with one value by
    that value exactly. Zeros are counted by the total alone.

    Args:
        channels: number of channels.
        bins: bins per channel, even.
        device: where the tables live (16 bytes per bin).
    """

    def __init__(self, channels: int, bins: int = 1024, device: torch.device | None = None) -> None:
        if bins < 2 or bins % 2:
            raise ValueError(f"bins must be even and at least 2, got {bins}")
        self.bins = bins
        self.counts = torch.zeros(channels, bins, dtype=torch.int64, device=device)
        self.sums = torch.zeros(channels, bins, dtype=torch.float64, device=device)
        self.range = torch.zeros(channels, dtype=torch.float64, device=device)
        self.maximum = torch.zeros(channels, dtype=torch.float64, device=device)
        self.total = 0

    def update(self, values: Tensor) -> None:
        """Add ``values`` ``[C, n]``, floating point, each at least 0 and finite."""
        if values.shape[1] == 0:
            return
        largest = values.amax(1).double()
        self.maximum = torch.maximum(self.maximum, largest)
        self.total += values.shape[1]
        self._widen(largest)
        channel, place = torch.nonzero(values > 0, as_tuple=True)
        positive = values[channel, place].double()
        index = (positive * (self.bins / self.range[channel])).long().clamp_(max=self.bins - 1)
        index += channel * self.bins
        size = self.counts.numel()
        self.counts += torch.bincount(index, minlength=size).view_as(self.counts)
        self.sums += torch.bincount(index, positive, minlength=size).view_as(self.sums)

    def _widen(self, largest: Tensor) -> None:
        self.range = torch.where(self.range == 0, largest, self.range)
        while bool((narrow := largest > self.range).any()):
            for name in ("counts", "sums"):
                table = getattr(self, name)
                merged = torch.zeros_like(table)
                merged[:, : self.bins // 2] = table.view(len(table), -1, 2).sum(2)
                setattr(self, name, torch.where(narrow[:, None], merged, table))
            self.range = torch.where(narrow, self.range * 2, self.range)

    def points(self) -> tuple[Tensor, Tensor]:
        """Every bin as ``(value, weight)``, each float64 ``[C, bins]``; empty bins weigh 0."""
        weight = self.counts.double()
        return self.sums / weight.clamp(min=1), weight

    def pooled(self) -> Histogram:
        """All channels as one, its bins those of every channel side by side."""
        one = Histogram(1, 2, self.counts.device)
        one.bins = self.counts.numel()
        one.counts, one.sums = self.counts.view(1, -1), self.sums.view(1, -1)
        one.maximum, one.range = self.maximum.amax().view(1), self.range.amax().view(1)
        one.total = self.total * len(self.counts)
        return one

    def percentile(self, percent: float) -> Tensor:
        """The value ``percent`` % of all values (zeros included) do not exceed, float64 ``[C]``.

        Linear between the bins' means; never above the maximum.
        """
        value, weight = self.points()
        order = torch.where(weight > 0, value, torch.inf).argsort(1)
        value, weight = value.gather(1, order), weight.gather(1, order)
        zeros = self.total - weight.sum(1, keepdim=True)
        # Rank of the last value of each bin, counted from 0 as numpy.quantile does.
        rank = zeros + weight.cumsum(1) - 1
        wanted = (self.total - 1) * percent / 100
        out = torch.zeros_like(self.maximum)
        for c in range(len(out)):
            used = weight[c] > 0
            ranks = torch.cat([zeros[c] - 1, rank[c][used]])
            values = torch.cat([zeros.new_zeros(1), value[c][used]])
            if len(values) > 1:
                values[-1] = self.maximum[c]
            above = int((ranks < wanted).sum())
            if above == 0:
                continue
            if above == len(ranks):
                out[c] = self.maximum[c]
                continue
            low, high = ranks[above - 1], ranks[above]
            # A bin of several values stands for ranks up to its last one.
            share = ((wanted - low) / (high - low)).clamp(0, 1)
            out[c] = values[above - 1] + share * (values[above] - values[above - 1])
        return out
