"""Calibrating offset spikes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...options import Probe
from ..steps import Steps
from .base import Method, whole_number

if TYPE_CHECKING:
    from ..thresholds import Site

__all__ = ["COS"]


@dataclass(frozen=True)
class COS(Method):
    """Layer by layer, a probe moves v_init by the spike that is missing or one too many.

    A layer first runs ``probe`` steps of its actual input. A neuron that fired and ends below 0
    has fired once too often, one that ends at θ or above once too rarely: its v_init moves by the
    least that removes, or adds, exactly one spike, and the layer runs again, all steps. The next
    layer's probe sees the spikes of that. ``iterations`` repeats the probe for neurons that are
    off by more; the authors' code has one. A neuron that fired at every step keeps its v_init (the
    authors' would become infinite; both fire at every step).

    Args:
        probe: rho, steps added to the latency: 4 for CIFAR-100, 8 for ImageNet in the paper.
        iterations: of the probe, each at the price of its steps.
        margin: by how much of θ the moved membrane passes the threshold: 1e-3 in the code.
    """

    name = "cos"
    source = (
        "Hao, Ding, Bu, Huang, Yu: Bridging the Gap between ANNs and SNNs by Calibrating Offset "
        "Spikes (COS), ICLR 2023"
    )
    needs = "as opi (the paper: an ANN trained with QCFS); adds its probe's steps; inference only"
    trains = "QCFS"
    threshold = "mmse"
    v_init = "half"

    probe: int = 4
    iterations: int = 1
    margin: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("probe", "iterations"):
            whole_number(self, name)
        Probe(self.probe, "shift", self.margin, self.iterations).check()

    def steps(self) -> Steps:
        """At least the probe's rows."""
        return Steps(least=self.probe, extra=self.probe * self.iterations, whole=True)

    def neuron(self, site: Site, T: int) -> dict[str, Any]:
        """Shifted by the probe."""
        return {"probe": Probe(self.probe, "shift", self.margin, self.iterations)}
