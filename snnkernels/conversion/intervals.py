"""What is known of a current whose order in time is not: bounds, and how layers move them.

A value that changes from step to step is enclosed by six numbers (:class:`Bounds`): its sum over
the T steps, its single steps, and the sums of its positive and negative parts. An affine layer
moves them with its weights split into ``W+`` and ``W-``; neurons turn them into spike counts by
the bounds of one integrate-and-fire neuron under currents in any order::

    clip(floor((M + v_init) / θ), 0, T) <= N <= clip(floor((S+ + v_init) / θ), 0, T)

with ``M = sum min(x, θ)``, which is S - E for ``E = sum max(x - θ, 0)``, and
``S+ = sum max(x, 0)``. *Proof.* A spike costs θ. Upper: the membrane after the
last spike is at least 0, and until then the currents brought at most S+ to v_init, so
``θ N <= v_init + S+``. Lower: let t be the last
step without a spike (there is none: N = T). Then ``v_t < θ`` and every later step fires, so
``θ (N - (T - t)) = v_init + sum_{s<=t} x(s) - v_t > v_init + sum_{s<=t} x(s) - θ``; with
``sum_{s>t} θ >= sum_{s>t} min(x, θ)`` this is ``θ N > v_init + M - θ``, and N is whole.

Idea: interval reachability (Davydov et al., CDC 2022) applied to counts. Computed in float64;
every rule widens by the rounding of the network's own arithmetic in any order of summation
(``|fl(sum) - sum| <= γ sum |w x|``), not by that of Winograd, FFT or TF32 algorithms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Bounds",
    "added",
    "affine",
    "cumulative_pool",
    "fire",
    "fired",
    "linear",
    "step_pool",
]

_EPS = 2.0**-52  # of the bounds' own arithmetic, float64


@dataclass(frozen=True)
class Bounds:
    """A value over T steps, ``[B, *]`` float64 each.

    Attributes:
        low, high: the sum over the steps lies between.
        least, most: so does every single step.
        plus, minus: at least the sums of ``max(x, 0)`` and ``max(-x, 0)`` over the steps.
        T: number of steps.
    """

    low: Tensor
    high: Tensor
    least: Tensor
    most: Tensor
    plus: Tensor
    minus: Tensor
    T: int

    @staticmethod
    def held(x: Tensor, T: int) -> Bounds:
        """A value that is the same at every step."""
        x = x.detach().double()
        return Bounds(T * x, T * x, x, x, T * x.clamp(min=0), T * (-x).clamp(min=0), T)

    @staticmethod
    def between(low: Tensor, high: Tensor) -> Bounds:
        """One value, one step: ``T = 1``."""
        low, high = low.detach().double(), high.detach().double()
        return Bounds(low, high, low, high, high.clamp(min=0), (-low).clamp(min=0), 1)

    @staticmethod
    def of(parts: Sequence[Tensor], T: int) -> Bounds:
        """From the six tensors in the order of the attributes."""
        low, high, least, most, plus, minus = parts
        return Bounds(low, high, least, most, plus, minus, T)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The six tensors in the order of the attributes."""
        return self.low, self.high, self.least, self.most, self.plus, self.minus

    @property
    def size(self) -> Tensor:
        """The largest magnitude of a step."""
        return torch.maximum(self.least.abs(), self.most.abs())

    def map(self, function: Callable[[Tensor], Any]) -> Any:
        """The same selection or arrangement of elements in all six; a list if it gives one."""
        done = [function(part) for part in self.parts]
        if isinstance(done[0], Tensor):
            return Bounds.of(done, self.T)
        return type(done[0])(Bounds.of(p, self.T) for p in zip(*done, strict=True))

    def negated(self) -> Bounds:
        """Of ``-x``."""
        low, high, least, most, plus, minus = self.parts
        return Bounds(-high, -low, -most, -least, minus, plus, self.T)

    def tight(self) -> Bounds:
        """The six numbers sharpened by what each says about the others.

        ``S = S+ - S-``; a step lies in ``[l, u]``; and ``max(x, 0)`` is convex, so on ``[l, u]``
        it lies below its chord ``u (x - l) / (u - l)``, whose sum depends on S alone.
        """
        T, low, high, least, most, plus, minus = self.T, *self.parts
        up, down = most.clamp(min=0), (-least).clamp(min=0)
        plus = torch.minimum(plus, T * up)
        minus = torch.minimum(minus, T * down)
        low = torch.maximum(torch.maximum(low, T * least), -minus)
        high = torch.minimum(torch.minimum(high, T * most), plus)
        high = torch.maximum(high, low)  # they may pass each other by their own rounding
        chord = _chord(up, high - T * least, most - least)
        other = _chord(down, T * most - low, most - least)
        mixed = (least < 0) & (most > 0)
        plus = torch.where(mixed, torch.minimum(plus, chord), plus)
        minus = torch.where(mixed, torch.minimum(minus, other), minus)
        plus, minus = torch.minimum(plus, high + minus), torch.minimum(minus, plus - low)
        return Bounds(low, high, least, most, plus.clamp(min=0), minus.clamp(min=0), T)

    def wider(self, total: Tensor, step: Tensor) -> Bounds:
        """With room for an error of ``step`` at every step and ``total`` in all."""
        low, high, least, most, plus, minus = self.parts
        return Bounds(
            low - total,
            high + total,
            least - step,
            most + step,
            plus + total,
            minus + total,
            self.T,
        )


def _chord(height: Tensor, offset: Tensor, width: Tensor) -> Tensor:
    return torch.where(width > 0, height * offset / width.clamp(min=1e-300), height.new_zeros(()))


def _gamma(terms: int, eps: float) -> float:
    """Relative error of a sum of ``terms`` products, any order, plus that of the bounds."""
    at = (terms + 3) * (eps + _EPS)
    return at / (1 - at) if at < 1 else float("inf")


def affine(
    x: Bounds,
    up: Callable[[Tensor], Tensor],
    down: Callable[[Tensor], Tensor] | None,
    bias: Tensor | None,
    terms: int,
    eps: float,
) -> Bounds:
    """Of ``W x + b`` in every step.

    Args:
        x: ``[B, *in]``.
        up, down: apply ``W+`` and ``-W-`` (not negative both), without bias, to ``[B, *in]``;
            ``down`` is None where no weight is negative.
        bias: what is added to every step, broadcasting to ``[B, *out]``, or None.
        terms: products in a sum.
        eps: unit roundoff of the network's arithmetic.
    """

    def apply(function: Callable[[Tensor], Tensor]) -> Tensor:
        # One after the other: behind the neurons a map may sum over the batch.
        return torch.stack([function(part) for part in (*x.parts, x.size)])

    a = apply(up)
    d = torch.zeros_like(a) if down is None else apply(down)
    T = x.T
    low, high = a[0] - d[1], a[1] - d[0]
    least, most = a[2] - d[3], a[3] - d[2]
    plus, minus, size = a[4] + d[5], a[5] + d[4], a[6] + d[6]
    if bias is not None:
        bias = bias.detach().double()
        low, high, least, most = low + T * bias, high + T * bias, least + bias, most + bias
        plus, minus = plus + T * bias.clamp(min=0), minus + T * (-bias).clamp(min=0)
        size = size + bias.abs()
    g = _gamma(terms, eps)
    return (
        Bounds(low, high, least, most, plus, minus, T).wider(g * (plus + minus), g * size).tight()
    )


def linear(x: Bounds, function: Callable[[Tensor], Tensor], terms: int, eps: float) -> Bounds:
    """Of a linear map without bias or negative weights: sums, averages, interpolation."""
    return affine(x, function, None, None, terms, eps)


def added(a: Bounds, b: Bounds, eps: float) -> Bounds:
    """Of ``a + b`` in every step."""
    out = Bounds.of([p + q for p, q in zip(a.parts, b.parts, strict=True)], a.T)
    g = _gamma(1, eps)
    return out.wider(g * (out.plus + out.minus), g * (a.size + b.size)).tight()


def cumulative_pool(
    x: Bounds, pool: Callable[[Tensor], Tensor], window: Callable[[Tensor], Tensor], eps: float
) -> Bounds:
    """Of a max-pool that gives ``max_i S_i(t) - max_i S_i(t-1)`` at step t, S_i running sums.

    *Sum.* It telescopes to ``max_i S_i(T)``, between ``max_i low_i`` and ``max_i high_i``.
    *Step.* With ``S_i(t) = S_i(t-1) + x_i(t)``, let j attain the maximum at t - 1 and k at t. The
    output is at least ``S_j(t) - S_j(t-1) = x_j(t)`` and at most ``S_k(t) - S_k(t-1) = x_k(t)``
    (all sums are 0 at t = 0): between ``min_i least_i`` and ``max_i most_i``.
    *Parts.* So ``max(out, 0) <= sum_i max(x_i, 0)`` and ``max(-out, 0) <= sum_i max(-x_i, 0)``:
    sums over the window of ``plus_i`` and ``minus_i``.
    *Rounding.* Each running sum is off by at most eps times its magnitude a step; so is the
    difference of two of them.

    Args:
        x: ``[B, *in]``.
        pool: the max-pool; its padding takes no part.
        window: the sum over the same windows, or more.
        eps: unit roundoff.
    """
    low, high, least, most, plus, minus = x.parts
    around = pool(plus + minus) * 3 * (eps + _EPS)
    out = Bounds(pool(low), pool(high), -pool(-least), pool(most), window(plus), window(minus), x.T)
    return out.wider(x.T * around, around).tight()


def step_pool(
    x: Bounds, pool: Callable[[Tensor], Tensor], window: Callable[[Tensor], Tensor]
) -> Bounds:
    """Of the maximum of the currents of every step.

    It is at least each current, so its sum is at least ``max_i low_i`` and its negative part at
    most ``min_i minus_i``; its positive part is at most that of the sum over the window.
    """
    low, _, least, most, plus, minus = x.parts
    total = window(plus)
    return Bounds(pool(low), total, pool(least), pool(most), total, -pool(-minus), x.T).tight()


def fire(x: Bounds, threshold: Tensor, start: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Least and largest count of integrate-and-fire neurons with soft reset, ``[B, *]`` int32.

    For the proof see the module. ``M`` is bounded below by its chord on ``[l, u]``,
    ``min(x, θ) >= l + (θ - l) (x - l) / (u - l)``, and for ``u > θ`` by
    ``S - (1 - θ/u) S+`` and ``(θ/u) S - (1 - θ/u) S-``, since ``max(x - θ, 0) <= (1 - θ/u) x``
    on ``[0, u]``. A membrane rounded to eps at each of 2T operations is that of a current which
    differs by at most ``eps (v_init + S+ + S-)`` each.

    Args:
        x: currents, ``[B, *]``.
        threshold, start: θ > 0 and v_init in [0, θ), broadcasting to ``[B, *]``.
        eps: unit roundoff of the membrane's arithmetic.
    """
    T = x.T
    low, _, least, most, plus, minus = x.parts
    threshold, start = threshold.double(), start.double()
    width = most - least
    kept = T * least + _chord(threshold - least, low - T * least, width)
    over = (1 - threshold / torch.maximum(most, threshold)).clamp(0, 1)
    kept = torch.maximum(kept, low - over * plus)
    kept = torch.maximum(kept, (1 - over) * low - over * minus)
    kept = torch.where(least >= threshold, T * threshold, kept)
    kept = torch.where(most <= threshold, low, kept)
    room = (2 * T * eps + 16 * _EPS) * (start + plus + minus + threshold)
    fewest = torch.floor((kept + start - room) / threshold).clamp(0, T)
    largest = torch.floor((plus + start + room) / threshold).clamp(0, T)
    return fewest.to(torch.int32), torch.maximum(fewest, largest).to(torch.int32)


def fired(fewest: Tensor, largest: Tensor, weight: Tensor, T: int) -> Bounds:
    """Of spikes that weigh ``weight >= 0``, given bounds of their counts ``[B, *]``."""
    weight = weight.double()
    low, high = weight * fewest, weight * largest
    least = torch.where(fewest == T, weight, weight.new_zeros(()))
    most = torch.where(largest > 0, weight, weight.new_zeros(()))
    return Bounds(low, high, least, most, high, torch.zeros_like(high), T)
