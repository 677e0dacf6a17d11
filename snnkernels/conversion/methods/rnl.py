"""Rate norm layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..activations_rates import RateNorm
from ..errors import ConversionError
from ..ops import Activation
from .base import Method

if TYPE_CHECKING:
    from ..context import Context
    from ..thresholds import Site

__all__ = ["RNL"]


@dataclass(frozen=True)
class RNL(Method):
    """Thresholds that rate norm layers were trained with; spikes weigh 1.

    The ANN's activations are the rates themselves, so the next layer takes spikes of weight 1; the
    current stays raw, and the threshold is the layer's theta. Membranes start at 0 as in the paper;
    ``v_init="half"`` is OPI on top of it.
    """

    name = "rnl"
    source = (
        "Ding, Yu, Tian, Huang: Optimal ANN-SNN Conversion for Fast and Accurate Inference in Deep "
        "Spiking Neural Networks (rate norm layers), IJCAI 2021"
    )
    needs = "an ANN trained with RateNorm activations; no data"
    trains = "RateNorm"

    def check(self, activations: list[Activation]) -> None:
        """Every activation must be a rate norm layer."""
        for activation in activations:
            if not isinstance(activation.inner, RateNorm):
                raise ConversionError(
                    f"{activation.label}: method='rnl' needs RateNorm activations, this is "
                    f"{type(activation.inner).__name__}. Train with snnkernels' RateNorm, or use "
                    "method='opi' with a loader"
                )

    def learned(self, activation: Activation) -> Any:
        """The layer's theta."""
        if isinstance(activation.inner, RateNorm):
            return activation.inner.theta.detach()
        return activation.learned

    def neuron(self, site: Site, T: int) -> dict[str, Any]:
        """Spikes of weight 1 behind a rate norm layer."""
        return {"amplitude": 1.0} if isinstance(site.activation.inner, RateNorm) else {}

    def settle(self, context: Context) -> None:
        """A rate norm layer has one threshold: with another it answers with other rates."""
        for site in context.sites:
            if isinstance(site.activation.inner, RateNorm) and site.rule != "learned":
                raise ConversionError(
                    f"{site.label}: threshold={site.rule!r} cannot be combined with method='rnl': "
                    "the rates of a RateNorm are currents over its own theta. Leave threshold= out "
                    "for this layer, or train its scale on (lock_rates)"
                )
