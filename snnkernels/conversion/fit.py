"""Initial potentials fitted to the spiking network: the part of θ with the least squared error."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .correction import Stop, Walk, activations, first_images, progress_bar, set_operand

if TYPE_CHECKING:
    from .context import Context
    from .network import ConvertedNetwork
    from .thresholds import Site

__all__ = ["fit_starts"]

IMAGES = 64
_FRACTIONS = 16  # candidates: v_init / θ = i / 16


def fit_starts(snn: ConvertedNetwork, context: Context) -> None:
    """Give every layer whose rule is "mse" the v_init that fits the ANN's activations best.

    One part of θ per channel, of 0, 1/16, ..., 15/16, found layer by layer in order of execution on
    the spikes that the layers before it really send. For currents that are constant in time there
    is nothing to find: θ/2 rounds to the nearest level, which is best whatever the activations'
    density. What differs from it makes good for spikes that arrive unevenly, and for the errors
    of the layers before.
    """
    sites = {site.path: site for site in context.sites if site.fit_start}
    if not sites:
        return
    images = first_images(context, IMAGES)
    wanted = activations(context.model, list(sites), images)
    walk = Walk(snn, images, context.T)
    with progress_bar("fitting v_init", len(walk), context.progress) as bar:
        for stop in walk:
            if stop.path in sites:
                _fit(stop, wanted.pop(stop.path), sites[stop.path])
            bar.update()
    context.report.notes.append(
        f"v_init was fitted per channel at T={context.T} on {len(images)} images"
    )


@torch.no_grad()
def _fit(stop: Stop, ann: Tensor, site: Site) -> None:
    """Try every candidate on one layer; of equals the nearest to θ/2."""
    node = stop.layer.node
    theta = torch.as_tensor(node.threshold)
    channel = site.channel_dim % ann.dim() if ann.dim() > 1 else None
    others = [d for d in range(ann.dim()) if d != channel]
    best = chosen = None
    for i in sorted(range(_FRACTIONS), key=lambda i: abs(2 * i - _FRACTIONS)):
        set_operand(node, "v_init", theta * (i / _FRACTIONS))
        error = (stop.answer(ann) - ann).square().mean(others, dtype=torch.float64)
        part = torch.full_like(error, i / _FRACTIONS)
        if best is None or chosen is None:
            best, chosen = error, part
        else:
            chosen = torch.where(error < best, part, chosen)
            best = torch.minimum(best, error)
    assert chosen is not None
    set_operand(node, "v_init", (chosen * theta).to(theta.dtype))
    if chosen.dim() == 1:
        node.channel_dim = site.channel_dim
