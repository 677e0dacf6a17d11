"""A histogram of non-negative values per channel that widens itself: one pass, fixed memory."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..maps import histogram_update

__all__ = ["Histogram"]

_BITS = 24  # significant bits that a value keeps: those of float32
_PENDING = 2**29  # so many values of 24 bits, of one binade, have an exact sum in float64
_MOST = 2**39  # and so many in int64
_TABLES = ("counts", "mantissas", "low_counts", "low_mantissas")


class Histogram:
    """Counts and sums of non-negative values per channel in bins that double their width.

    The range of a channel is the least power of two above its maximum; when a larger value arrives
    the range doubles and neighbouring bins merge, so at least half the bins stay in use. Values
    below the first edge have a bin for each power of two. A bin is represented by the mean of its
    values, and a bin with one value by that value exactly. Zeros are counted by the total alone.

    The tables depend on the values alone: not on their order, not on how they come in batches, not
    on how many histograms :meth:`merge` them. Every bin lies within one power of two, where values
    of 24 bits (float64 is rounded up to so many) are multiples of one unit, so that sums are whole
    numbers of it. The maximum is exact in float64 too.

    Args:
        channels: number of channels.
        bins: bins per channel, even.
        device: where the tables live (24 bytes per bin).
    """

    def __init__(self, channels: int, bins: int = 1024, device: torch.device | None = None) -> None:
        if bins < 2 or bins % 2:
            raise ValueError(f"bins must be even and at least 2, got {bins}")
        self.bins = bins
        self.counts = torch.zeros(channels, bins, dtype=torch.int64, device=device)
        self.mantissas = torch.zeros_like(self.counts)  # sums in units of the bin; 0 of bin 0
        self._sums = torch.zeros(channels, bins, dtype=torch.float64, device=device)  # to be added
        self._pending = 0
        self._lowest = -148  # exponent of the first low bin, as frexp has it: of float32
        self.low_counts = torch.zeros(channels, 277, dtype=torch.int64, device=device)
        self.low_mantissas = torch.zeros_like(self.low_counts)
        self.range = torch.zeros(channels, dtype=torch.float64, device=device)
        self.maximum = torch.zeros(channels, dtype=torch.float64, device=device)
        self.total = 0
        self._points: tuple[Tensor, Tensor] | None = None  # of a pooled one

    def update(self, values: Tensor) -> None:
        """Add ``values`` ``[C, n]``, floating point, each at least 0 and finite."""
        for part in values.split(_PENDING, dim=1):
            if part.shape[1]:
                self._add(part)

    def _add(self, values: Tensor) -> None:
        self.maximum = torch.maximum(self.maximum, values.amax(1).double())
        self.total += values.shape[1]
        if values.dtype == torch.float64:
            values = _rounded(values)
            self._deepen()
        self._widen(_power_above(values.amax(1).double()))
        if self._pending + values.shape[1] > _PENDING:
            self._settle()
        self._pending += values.shape[1]
        # A channel without a positive value has no range and nothing to count.
        histogram_update(self.counts, self._sums, values, self.bins / self.range)
        self._add_low(values)

    def _add_low(self, values: Tensor) -> None:
        """Count the values below the first edge by their exponents."""
        first = (self.range / self.bins)[:, None].to(values.dtype)
        place = ((values < first) & (values > 0)).reshape(-1).nonzero()[:, 0]
        mantissa, exponent = torch.frexp(values.reshape(-1)[place].double())
        width = self.low_counts.shape[1]
        channel = place.div(values.shape[1], rounding_mode="floor")
        index = channel * width + (exponent - self._lowest)
        self.low_counts.view(-1).index_add_(0, index, torch.ones_like(index))
        self.low_mantissas.view(-1).index_add_(0, index, (mantissa * 2.0**_BITS).long())

    def _deepen(self) -> None:
        """Make room for the exponents of float64."""
        if self._lowest == -148:
            before, after = 1073 - 148, 1024 - 128
            for name in ("low_counts", "low_mantissas"):
                wide = torch.nn.functional.pad(getattr(self, name), (before, after))
                setattr(self, name, wide)
            self._lowest = -1073

    def _units(self) -> Tensor:
        """What a mantissa of each bin is in, float64 ``[C, bins]``: 2^-24 of the power above it."""
        index = torch.arange(self.bins, device=self.counts.device, dtype=torch.float64)
        return _power_above(index) * 2.0**-_BITS * (self.range / self.bins)[:, None]

    def _settle(self) -> None:
        """Put the sums in float64 into whole numbers."""
        if self._pending == 0:
            return
        units = self._units()[:, 1:]
        self.mantissas[:, 1:] += (self._sums[:, 1:] / torch.where(units > 0, units, 1.0)).long()
        self._sums.zero_()
        self._pending = 0

    def _check(self) -> None:
        if max(int(self.counts.amax()), int(self.low_counts.amax())) > _MOST:
            raise OverflowError(
                "more than 2^39 values in one bin of a histogram: calibrate on fewer inputs, or "
                "per channel"
            )

    def _widen(self, wanted: Tensor) -> None:
        """Ranges of at least ``wanted`` ``[C]``, powers of two or 0."""
        self.range = torch.where(self.range == 0, wanted, self.range)
        if not bool((wanted > self.range).any()):
            return
        self._settle()
        while bool((narrow := wanted > self.range).any()):
            # The bin of the first power of two joins those below it.
            channel = narrow.nonzero()[:, 0]
            at = torch.frexp(self.range / self.bins)[1][channel].long() - self._lowest
            self.low_counts[channel, at] += self.counts[channel, 1]
            self.low_mantissas[channel, at] += self.mantissas[channel, 1]
            self.mantissas[channel, 1] = 0
            for name in ("counts", "mantissas"):
                table = getattr(self, name)
                merged = torch.zeros_like(table)
                merged[:, : self.bins // 2] = table.view(len(table), -1, 2).sum(2)
                setattr(self, name, torch.where(narrow[:, None], merged, table))
            self.range = torch.where(narrow, self.range * 2, self.range)

    def tables(self) -> dict[str, Tensor]:
        """All that was counted: int64 tables, float64 ``range`` and ``maximum``, ``total``."""
        self._settle()
        found = {name: getattr(self, name) for name in (*_TABLES, "range", "maximum")}
        return {**found, "total": torch.tensor(self.total)}

    def load(self, tables: dict[str, Tensor]) -> None:
        """Take over what :meth:`tables` gave of a histogram of the same channels and bins."""
        device = self.counts.device
        if tables["counts"].shape != self.counts.shape:
            raise ValueError(
                f"tables of {tuple(tables['counts'].shape)} channels and bins, expected "
                f"{tuple(self.counts.shape)}"
            )
        for name in (*_TABLES, "range", "maximum"):
            setattr(self, name, tables[name].to(device, copy=True))
        if self.low_counts.shape[1] != 277:
            self._lowest = -1073
        self._sums.zero_()
        self._pending, self.total = 0, int(tables["total"])

    def copy(self) -> Histogram:
        """Another one with the same tables."""
        other = Histogram(len(self.counts), self.bins, self.counts.device)
        other.load(self.tables())
        return other

    def merge(self, team: Any) -> None:
        """Add up the histograms of all members of ``team``, each for the same channels.

        ``team`` has ``sum(tensor)`` and ``maximum(tensor)``, which give the same to all.

        Raises:
            OverflowError: more than 2^39 values in one bin; on every member.
        """
        self.maximum = team.maximum(self.maximum)
        if bool(team.maximum(torch.tensor(self._lowest == -1073, dtype=torch.int64)) > 0):
            self._deepen()
        self._settle()
        self._widen(team.maximum(self.range))
        for name in _TABLES:
            setattr(self, name, team.sum(getattr(self, name)))
        self.total = int(team.sum(torch.tensor(self.total)))
        self._check()

    def points(self) -> tuple[Tensor, Tensor]:
        """Every bin as ``(value, weight)``, float64 ``[C, bins]`` and more; empty bins weigh 0.

        Raises:
            OverflowError: more than 2^39 values in one bin.
        """
        if self._points is not None:
            return self._points
        self._settle()
        self._check()
        weight = torch.cat([self.low_counts, self.counts[:, 1:]], 1).double()
        width = self.low_counts.shape[1]
        exponents = torch.arange(width, device=weight.device) + (self._lowest - _BITS)
        low = _scaled(self.low_mantissas.double(), exponents)
        sums = torch.cat([low, (self.mantissas.double() * self._units())[:, 1:]], 1)
        return sums / weight.clamp(min=1), weight

    def pooled(self) -> Histogram:
        """All channels as one, its bins those of every channel side by side."""
        one = Histogram(1, 2, self.counts.device)
        value, weight = self.points()
        one._points = value.reshape(1, -1), weight.reshape(1, -1)
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


def _power_above(values: Tensor) -> Tensor:
    """The least power of two above each value, at least 2^-1000; 0 of 0."""
    exponent = torch.frexp(values)[1].clamp(min=-1000)
    return torch.where(values > 0, _scaled(torch.ones_like(values), exponent), 0.0)


def _scaled(values: Tensor, exponent: Tensor) -> Tensor:
    """``values * 2^exponent``, float64, exactly (torch.ldexp goes by way of pow)."""
    half = exponent.long().div(2, rounding_mode="floor")  # 2^-1097 is no float64, its root is
    for part in (half, exponent - half):
        values = values * ((part + 1023) << 52).view(torch.float64)
    return values


def _rounded(values: Tensor) -> Tensor:
    """Float64 rounded up to 24 bits: what reached a threshold still does."""
    mantissa, exponent = torch.frexp(values)
    return _scaled((mantissa * 2.0**_BITS).ceil(), exponent - _BITS)
