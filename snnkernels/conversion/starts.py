"""Initial potentials that follow the threshold, and the ablation of OPI (Bu et al., AAAI 2022)."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .calibration import Statistics

if TYPE_CHECKING:
    from .thresholds import Site

__all__ = ["Start", "parse_start", "settled_start"]


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
        "'mse' (per channel, fitted to data), a number or a tensor (an absolute potential, in the "
        "units of θ; scalar, per channel or of the layer's shape), a dict from layer name to one "
        "of these"
    )


def settled_start(site: Site, seen: Statistics | None) -> str | Tensor:
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
    if start.rule == "mse":  # fitted when the spiking network is there: fit.py
        site.fit_start = True
        return "half"
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
