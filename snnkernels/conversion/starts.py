"""Initial potentials that follow the threshold, and the ablation of OPI (Bu et al., AAAI 2022)."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .calibration import Statistics
from .errors import ConversionError

if TYPE_CHECKING:
    from .thresholds import Site

__all__ = ["Start", "best_fraction", "parse_start", "settled_start"]

_FRACTIONS = 64  # candidates of "mse": v_init / θ = i / 64


class Start(NamedTuple):
    """A rule for v_init: a fraction of θ, or how it is drawn or found, about that fraction."""

    fraction: float
    rule: str | None = None


def parse_start(text: str) -> Start:
    """``"half"``, ``"zero"``, ``"25%"`` (of θ), ``"uniform"``, ``"normal"`` or ``"mse"``.

    Raises:
        ValueError: anything else; lists what is allowed.
    """
    if text == "zero":
        return Start(0.0)
    if text == "half":
        return Start(0.5)
    if text in ("uniform", "normal", "mse"):
        return Start(0.5, text)
    if text.endswith("%"):
        try:
            percent = float(text[:-1])
        except ValueError:
            percent = -1.0
        if 0 <= percent <= 100:
            return Start(percent / 100)
    raise ValueError(
        f"v_init={text!r} is not known; allowed: 'half' (θ/2), 'zero', a part of θ such as '25%', "
        "'uniform' (in [0, θ), drawn once for each neuron), 'normal' (mean θ/2, deviation θ/4), "
        "'mse' (per channel, from data), a number or a tensor (an absolute potential, in the units "
        "of θ; scalar, per channel or of the layer's shape), a dict from layer name to one of these"
    )


def settled_start(site: Site, seen: Statistics | None, T: int) -> str | Tensor:
    """The v_init that the rule ``site.v_init`` means for the threshold ``site.theta``."""
    start = parse_start(site.v_init)
    if start.rule is None:
        # "half" stays a word: it follows a threshold that is trained on.
        return "half" if start.fraction == 0.5 else start.fraction * site.theta
    if seen is None:
        raise ValueError(
            f"v_init={site.v_init!r} for {site.label} needs calibration data (its shape, or its "
            "values): pass loader="
        )
    if start.rule == "mse":
        if seen.histogram is None:
            raise ValueError(
                f"v_init='mse' for {site.label} needs a threshold that comes from data: pass "
                "threshold='mmse', 'max' or a percentile"
            )
        theta = site.theta.double().reshape(-1)
        found = best_fraction(seen, theta, T) * theta
        return found.to(site.theta.dtype).reshape(site.theta.shape)
    shape = seen.shape[1:] or seen.shape
    g = torch.Generator().manual_seed(zlib.crc32(site.label.encode()))
    drawn: Any = torch.rand(shape, generator=g, dtype=torch.float64)
    if start.rule == "normal":
        drawn = 0.5 + 0.25 * torch.randn(shape, generator=g, dtype=torch.float64)
    theta = site.theta.double().cpu()
    if theta.dim() == 1:
        where = (seen.channel_dim - 1) % len(shape)
        theta = theta.view(*(-1 if d == where else 1 for d in range(len(shape))))
    return (drawn * theta).to(site.theta.device, site.theta.dtype)


def best_fraction(seen: Statistics, theta: Tensor, T: int) -> Tensor:
    """v_init / θ of each channel whose staircase fits the activations best, in squared error.

    Args:
        seen: with a histogram of the activations of each channel (or of one for the layer).
        theta: float64 ``[C]`` or ``[1]``.
        T: number of steps.

    Returns:
        float64, of the histogram's channels; of equals the nearest to 1/2.
    """
    if seen.histogram is None:
        raise ConversionError("there is no histogram to fit an initial potential to")
    value, weight = seen.histogram.points()
    theta = theta.to(value.device)[:, None]
    best = torch.full_like(value[:, 0], torch.inf)
    chosen = torch.full_like(best, 0.5)
    for i in sorted(range(_FRACTIONS), key=lambda i: abs(2 * i - _FRACTIONS)):
        c = i / _FRACTIONS
        # Activations of 0 stay at 0 for every start below the threshold.
        steps = torch.floor(value * T / theta + c).clamp_(0, T)
        error = ((value - theta * steps / T).square_() * weight).sum(1)
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, c, chosen)
    return chosen
