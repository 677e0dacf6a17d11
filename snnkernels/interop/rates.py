"""The rate form: a converted network as one pass on spike counts, without time."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from ..conversion.errors import ConversionError
from ..conversion.methods.bit_serial import BitSerialActivation
from ..conversion.methods.ttfs import TTFSActivation
from ..conversion.network import ConvertedNetwork
from ..conversion.pools import CumulativeMaxPool
from ..conversion.spiking import SpikingActivation
from ..conversion.steps import Steps
from ..monitors import unwatched
from ..neurons import IFNode

__all__ = ["not_plain", "rate_form"]


class _MaxOfMeans(nn.Module):
    """A max-pool on means: what the cumulative one sums up to."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor, T: int) -> Any:
        """Pool ``[B, *]``."""
        return self.pool(x)


def not_plain(layer: SpikingActivation, any_tie: bool = False) -> str | None:
    """Why the counts of a layer are no staircase of its mean current; None if they are."""
    node = layer.node
    if type(layer) is not SpikingActivation:
        return f"{type(layer).__name__} is no integrate-and-fire neuron"
    if type(node) is not IFNode:
        return f"{type(node).__name__} leaks or is a class of your own"
    options = {
        "v_reset": node.v_reset, "input_scale": node.input_scale, "fire_level": node.fire_level,
        "max_spikes": node.max_spikes, "signed": node.signed, "probe": node.probe,
        "mask": node.mask,
    }  # fmt: skip
    given = [name for name, value in options.items() if value is not None]
    if node.tie != ">=" and not any_tie:
        given.append("tie")
    return f"its neurons have {', '.join(given)}" if given else None


def rate_form(snn: ConvertedNetwork) -> ConvertedNetwork:
    """A copy of ``snn`` that answers in one pass on counts.

    A neuron of mean current z answers ``clip(floor((T z + v_init) / θ), 0, T)`` spikes of its
    weight: what it fires when its T currents are all z. The spiking network gives the same counts
    layer by layer where that holds, and others where currents come unevenly; ``method="parallel"``
    is this form from the start, and so are ``ttfs`` and ``bit_serial``, whose layers wait.

    Raises:
        ConversionError: neurons are not plain, so that their counts are no such staircase (SRP and
            COS look at when spikes come; bursts, signed spikes, leaks); names the layer.
    """
    steps = snn._clock.steps
    for name, layer in snn.neurons():
        waits = steps.parallel and type(layer) in (BitSerialActivation, TTFSActivation)
        reason = None if waits else not_plain(layer)
        if reason is not None:
            raise ConversionError(
                f"{name}: method {snn.report.method!r} has no rate form: {reason}. Convert by "
                "'opi', 'qcfs', 'light', 'parallel' or another method of plain neurons"
            )
    with unwatched(snn):
        twin = copy.deepcopy(snn)
    clock = twin._clock
    if not steps.parallel:
        clock.steps = Steps(whole=True, parallel=True)
    for path, module in list(twin.body.named_modules()):
        if isinstance(module, CumulativeMaxPool):
            twin.body.set_submodule(path, _MaxOfMeans(module.pool))
    return twin
