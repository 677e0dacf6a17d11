"""The neurons that take the place of an activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..neurons import IFNode
from .methods import Method
from .spiking import SpikingActivation
from .steps import Clock
from .thresholds import Site

__all__ = ["place"]

# What a neuron has in the units of its current: divided by θ where θ is folded into the weights.
_IN_UNITS = ("v_threshold", "v_init", "amplitude", "bias", "fire_level")


def place(site: Site, method: Method, T: int, folded: bool, clock: Clock) -> SpikingActivation:
    """The spiking layer of one activation."""
    given: dict[str, Any] = {
        "v_threshold": site.theta,
        "v_init": site.v_init,
        "amplitude": "threshold",
        **method.neuron(site, T),
    }
    weight = given["amplitude"]
    weight = given["v_threshold"] if isinstance(weight, str) else weight
    if folded:
        for name in _IN_UNITS:
            value = given.get(name)
            if value is not None and not isinstance(value, str):
                given[name] = _over(value, site)
        if given["amplitude"] == "threshold" and given["v_threshold"].dim() == 0:
            given["amplitude"] = None if bool(given["v_threshold"] == 1) else "threshold"
    tensors = [value for value in given.values() if isinstance(value, Tensor)]
    per_channel = any(t.dim() == 1 and t.numel() > 1 for t in tensors)
    node = IFNode(**given, channel_dim=site.channel_dim if per_channel else None)
    scale = torch.as_tensor(weight, dtype=site.theta.dtype, device=site.theta.device)
    return method.layer(site)(
        node,
        site.label,
        constant=False,
        counts=False,
        scale=scale.clone() if folded else None,
        channel_dim=site.channel_dim,
        clock=clock,
    )


def _over(value: Any, site: Site) -> Tensor:
    """``value`` in units of the threshold."""
    theta = site.theta
    if value is theta:
        return theta.new_ones(())
    value = torch.as_tensor(value, dtype=theta.dtype, device=theta.device)
    if theta.dim() == 1 and value.dim() > 1:
        where = (site.channel_dim if site.channel_dim < 0 else site.channel_dim - 1) % value.dim()
        theta = theta.view(*(-1 if d == where else 1 for d in range(value.dim())))
    return value / theta
