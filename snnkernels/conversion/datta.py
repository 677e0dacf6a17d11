"""The scaling search of Datta and Beerel, DATE 2022: a threshold and a weight for spikes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["OBJECTIVES", "Scaling", "datta_search", "search"]

OBJECTIVES = ("abs_sum", "mse")
BETAS = 201  # candidates of beta: 0, 0.01, ..., 2


class Scaling(NamedTuple):
    """What a search found: θ = alpha mu, a spike weighs beta θ, and the objective there."""

    alpha: float
    beta: float
    loss: float


def datta_search(
    values: Tensor,
    mu: float,
    T: int,
    objective: str = "abs_sum",
    percentiles: Iterable[float] = range(101),
    start: float = 0.0,
) -> Scaling:
    """The pair (alpha, beta) whose staircase is nearest to the clipped activations.

    Source: Datta and Beerel, DATE 2022 (arXiv 2112.12133), after descriptions of it: the authors'
    code is not public. Currents d are small far more often than large, so at few steps neither mu
    nor a shift of half a step suits them. A neuron of threshold ``alpha mu`` whose spikes weigh
    ``beta alpha mu`` answers
    ``y(d) = beta alpha mu clip(floor(T d / (alpha mu) + start), 0, T) / T`` in T steps, and the
    search compares it with ``clip(d, 0, mu)``.

    Candidates for ``alpha mu`` are the percentiles of the values that are in ``(0, mu]``, those for
    beta ``0, 0.01, ..., 2``. Of equal pairs the first wins, alpha before beta, in this order.

    Args:
        values: currents d, negative ones included, any shape, floating point and finite.
        mu: ceiling of the activation, positive.
        T: number of steps, at least 1.
        objective: ``"abs_sum"``, ``|sum(clip(d, 0, mu) - y)|`` as in the paper, or ``"mse"``, the
            mean square of the difference. They choose differently.
        percentiles: numbers in [0, 100]; linear between ranks.
        start: initial potential over the threshold, in [0, 1): 0 in the paper.

    Returns:
        ``Scaling(alpha, beta, loss)``; alpha = beta = 1 where there is nothing to fit (no values,
        one value only, or no percentile in ``(0, mu]``).

    Raises:
        TypeError: ``values`` is not a floating-point tensor.
        ValueError: an argument out of range; names it.
    """
    if not isinstance(values, Tensor) or not values.is_floating_point():
        got = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"values must be a floating-point tensor, got {got}")
    _check(mu, T, objective, start)
    percents = [float(p) for p in percentiles]
    bad = [p for p in percents if not 0 <= p <= 100]
    if bad:
        raise ValueError(f"percentiles must be within [0, 100], got {bad[0]}")
    d = values.detach().double().flatten().sort().values
    if not bool(torch.isfinite(d).all()):
        raise ValueError("values must be finite")
    one = Scaling(1.0, 1.0, _loss_of_one(d, mu, T, objective, start))
    if d.numel() == 0 or bool(d[0] == d[-1]):
        return one
    rank = torch.tensor(percents, dtype=torch.float64, device=d.device) * (d.numel() - 1) / 100
    low, high = d[rank.floor().long()], d[rank.ceil().long()]
    candidates = low + (high - low) * (rank - rank.floor())
    ceiling = torch.full_like(d[:1], mu)
    alpha, beta, loss = search(
        d[None], torch.ones_like(d)[None], d.numel(), candidates[None], ceiling, T, objective, start
    )
    if not bool(loss < torch.inf):
        return one
    return Scaling(float(alpha), float(beta), float(loss))


def search(
    value: Tensor,
    weight: Tensor,
    total: int,
    candidates: Tensor,
    mu: Tensor,
    T: int,
    objective: str,
    start: float | None = 0.0,
    v_init: Tensor | float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`datta_search` of weighted values, for each of C channels.

    Both objectives are polynomials in beta: for every alpha one pass over the values gives all 201.

    Args:
        value, weight: float64 ``[C, n]``: currents, and how often each was seen.
        total: how many of a channel were seen.
        candidates: float64 ``[C, k]``, for ``alpha mu``.
        mu: float64 ``[C]``.
        T, objective: as above.
        start: as above; None: the membrane starts at ``v_init``, in the units of the current.
        v_init: ``[C]`` or a number; see ``start``.

    Returns:
        alpha, beta and the objective, float64 ``[C]``: 1, 1 and infinity for a channel without a
        candidate in ``(0, mu]``.
    """
    beta = torch.arange(BETAS, dtype=torch.float64, device=value.device) / 100
    target = torch.minimum(value.clamp(min=0), mu[:, None])
    sums, squares = (target * weight).sum(1), (target.square() * weight).sum(1)
    best = torch.full_like(mu, torch.inf)
    chosen, scale = torch.ones_like(mu), torch.ones_like(mu)
    for theta in candidates.sort(1).values.unbind(1):
        usable = (theta > 0) & (theta <= mu)
        v = torch.where(usable, theta, mu)
        offset = v_init / v if start is None else torch.full_like(v, start)
        y = v[:, None] * torch.floor(value * T / v[:, None] + offset[:, None]).clamp(0, T) / T
        if objective == "abs_sum":
            losses = (sums[:, None] - beta * (y * weight).sum(1, keepdim=True)).abs()
        else:
            cross = (target * y * weight).sum(1, keepdim=True)
            own = (y.square() * weight).sum(1, keepdim=True)
            losses = (squares[:, None] - 2 * beta * cross + beta.square() * own) / max(total, 1)
        at = losses.argmin(1)  # of equals the first
        loss = losses.gather(1, at[:, None])[:, 0]
        better = usable & (loss < best)
        best = torch.where(better, loss, best)
        chosen = torch.where(better, v / mu, chosen)
        scale = torch.where(better, beta[at], scale)
    return chosen, scale, best


def _loss_of_one(d: Tensor, mu: float, T: int, objective: str, start: float) -> float:
    """The objective at alpha = beta = 1."""
    difference = d.clamp(0, mu) - mu * torch.floor(d * T / mu + start).clamp(0, T) / T
    if objective == "abs_sum":
        return float(difference.sum().abs())
    return float(difference.square().sum() / max(d.numel(), 1))


def _check(mu: float, T: int, objective: str, start: float) -> None:
    if not 0 < mu < math.inf:
        raise ValueError(f"mu must be positive and finite, got {mu}")
    if type(T) is not int or T < 1:
        raise ValueError(f"T must be a whole number of at least 1, got {T!r}")
    if objective not in OBJECTIVES:
        allowed = " and ".join(map(repr, OBJECTIVES))
        raise ValueError(f"objective={objective!r} is unknown; allowed are {allowed}")
    if not 0 <= start < 1:
        raise ValueError(f"start must be in [0, 1), got {start}")
