"""Where a spiking layer's error enters: clipping, quantisation, unevenness, or from below.

Sources: Bu et al., AAAI 2022 (OPI) and ICLR 2022 (QCFS), which split the error of one layer under
equal input into the first three. Here the layer's answer is split value by value into a sum, so
nothing is left over::

    answer - a = (clip(a) - a)               clipping: above what T spikes can say
               + (stair(z) - clip(a))        quantisation: counts are whole
               + (stair(mean x) - stair(z))  inherited: another current than the ANN's arrives
               + (answer - stair(mean x))    unevenness: it arrives unevenly in time

``a`` is the ANN's activation of its pre-activation ``z``, ``x`` the layer's current, and
``stair(c)`` what the layer itself answers to the current ``c`` held for all T steps: for plain
neurons ``θ / T clip(floor((c T + v_init) / θ), 0, T)``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from .spiking import SpikingActivation, per_channel_view, split_time
from .verify import relative_error

__all__ = ["Sources", "ceiling", "sources", "suggestion"]

OWN = ("clipping", "quantisation", "unevenness")


@dataclass(frozen=True)
class Sources:
    """Root mean squares of the four parts over that of the ANN's activation.

    Squares do not add up to that of the error: parts may cancel each other.
    """

    clipping: float
    quantisation: float
    unevenness: float
    inherited: float


def _unit(layer: SpikingActivation) -> Tensor | float:
    """What a current of 1 of the layer is in the ANN (not 1 where θ is folded into weights)."""
    return 1.0 if layer.scale is None else layer.scale / layer._weight().to(layer.scale)


def ceiling(layer: SpikingActivation) -> Tensor:
    """The largest activation the layer can answer: scalar or ``[C]``, units of the ANN."""
    node = layer.node
    most = 1 if node.max_spikes is None else node.max_spikes
    return most * (layer._weight() if layer.scale is None else layer.scale)


@torch.no_grad()
def stair(layer: SpikingActivation, current: Tensor, T: int, dtype: torch.dtype) -> Tensor:
    """What ``layer`` answers to ``current`` ``[B, *]`` held for all steps: ``[B, *]``.

    Leaves the layer at its initial potentials.
    """
    held, counted = layer.constant, layer.counts
    rows = layer.clock.steps.rows(T)
    layer.reset()
    layer.constant, layer.counts = True, True
    try:
        # forward, not a call: hooks are for the network's own runs.
        return layer.answer(layer.forward(current, rows).detach(), T, dtype)
    finally:
        layer.constant, layer.counts = held, counted
        layer.reset()


@torch.no_grad()
def sources(
    layer: SpikingActivation, z: Tensor, a: Tensor, x: Tensor, answer: Tensor, T: int
) -> Sources | None:
    """Split the error of ``answer`` against ``a``; resets the layer.

    Args:
        layer: after its run of T steps.
        z: ``[B, *]``, the ANN's pre-activation.
        a: ``[B, *]``, the ANN's activation of it.
        x: the layer's current, as its forward took it: ``[B, *]`` or ``[rows * B, *]``.
        answer: ``[B, *]``, the activations the layer's spikes stand for.
        T: steps that answer.

    Returns:
        None for a layer with a forward of its own, which need not have a staircase, and where the
        ANN and the spiking network have different shapes.
    """
    if type(layer).forward is not SpikingActivation.forward or answer.shape != a.shape:
        return None
    steps = layer.clock.steps
    # 16-bit means would move ties; a parallel layer computes in the dtype of its current.
    dtype = x.dtype if steps.parallel else torch.promote_types(x.dtype, torch.float32)
    unit = per_channel_view(torch.as_tensor(_unit(layer)), layer.channel_dim, z.dim())
    even = stair(layer, (z.to(dtype) / unit).to(dtype), T, answer.dtype)
    if layer.constant or steps.parallel:
        held = answer  # there is nothing uneven
    else:
        rows = split_time(x, steps.rows(T))[steps.before :][:T]
        held = stair(layer, rows.mean(0, dtype=torch.float64).to(dtype), T, answer.dtype)
    top = per_channel_view(ceiling(layer), layer.channel_dim, a.dim()).to(a)
    # A selection: activations below the ceiling stay themselves bit for bit.
    clipped = torch.where(a > top, top.expand_as(a), a)

    def part(after: Tensor, before: Tensor) -> float:
        return relative_error(a.double() + (after.double() - before.double()), a)

    return Sources(
        clipping=part(clipped, a),
        quantisation=part(even, clipped),
        unevenness=part(answer, held),
        inherited=part(held, even),
    )


_SUM = "the largest part of single layers' errors is {what} (most at {where}: {size:.2%}). "
# What arrives when does not matter to the first; the others mend some of it.
_UNTIMED, _MENDING = ("parallel", "ttfs"), ("cos", "signed", "srp")


def suggestion(
    rows: Iterable[tuple[str, Sources]], method: str, rule: str, half: bool, T: int
) -> str | None:
    """What would remove the source that dominates over all layers; None if there is no error.

    Args:
        rows: ``(layer, its sources)``.
        method: the one in use, which is not suggested again.
        rule: how thresholds came about, as the report says it.
        half: whether membranes start at θ/2.
        T: number of steps.
    """
    found = list(rows)
    # Each layer hands its error on, so layers count alike: squares, added.
    # A layer that is silent in the ANN has no relative error.
    parts = {w: [(getattr(s, w), name) for name, s in found] for w in OWN}
    parts = {w: [(e, name) for e, name in part if isfinite(e)] for w, part in parts.items()}
    size = {w: sum(e * e for e, _ in part) for w, part in parts.items()}
    what = max(OWN, key=lambda w: size[w])
    if not size[what]:
        return None
    worst, where = max(parts[what])
    text = _SUM.format(what=what, where=where, size=worst)
    if what == "clipping":
        learned = "" if "learned" in rule else ", a percentile nearer to 100%"
        return text + f"Larger thresholds remove it: threshold='max'{learned}"
    if what == "quantisation":
        ways = [f"a larger T (it falls as 1/T; now {T})"]
        if not half:
            ways.append("v_init='half'")
        if "mmse" not in rule and "learned" not in rule:
            ways.append("threshold='mmse'")
        return text + f"It takes {', or '.join(ways)}"
    untimed, mending = (
        ", ".join(repr(m) for m in names if not method.startswith(m))
        for names in (_UNTIMED, _MENDING)
    )
    return text + f"Methods without it: {untimed}; methods that lower it: {mending}"
