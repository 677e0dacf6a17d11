"""A histogram of non-negative values per channel that widens itself: one pass, fixed memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..maps import histogram_update

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
        # A channel without a positive value has no range and nothing to count.
        histogram_update(self.counts, self.sums, values, self.bins / self.range)

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

        Linear between ranks, as in numpy; a value is known to the mean of its bin.
        """
        value, weight = self.points()
        order = torch.where(weight > 0, value, torch.inf).argsort(1)
        value, weight = value.gather(1, order), weight.gather(1, order)
        zeros = self.total - weight.sum(1, keepdim=True)
        last = zeros + weight.cumsum(1) - 1  # rank of the largest value of each bin, from 0
        wanted = (self.total - 1) * percent / 100

        def at(rank: int) -> Tensor:
            wide = last.new_full((len(last), 1), rank)
            bin_ = torch.searchsorted(last, wide).clamp(max=value.shape[1] - 1)
            found = torch.where(wide < zeros, 0.0, value.gather(1, bin_))[:, 0]
            return self.maximum if rank >= self.total - 1 else found

        low, high = at(math.floor(wanted)), at(math.ceil(wanted))
        return low + (high - low) * (wanted - math.floor(wanted))
