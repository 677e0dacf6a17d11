"""Residual membrane potential."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...options import Probe
from ..steps import Steps
from .base import Method, whole_number

if TYPE_CHECKING:
    from ..thresholds import Site

__all__ = ["SRP"]


@dataclass(frozen=True)
class SRP(Method):
    """Neurons whose membrane is not above 0 after a probe of the whole network stay silent.

    All layers run ``probe`` steps in step; then every neuron starts from v_init again, for the
    steps that answer, and those with ``v / θ <= margin`` at the end of the probe emit nothing. They
    are the ones that an ANN would leave at 0 and unevenly arriving spikes had fire. Where the
    paper says ``v < 0`` the authors' code says ``v <= 0.001 θ``, which we follow; a current that
    ends a probe exactly at 0 is silenced although QCFS counts it (a flaw of the method).

    Args:
        probe: tau, steps added to the latency: 4 for CIFAR-100, 8 and 14 for ImageNet in the paper.
        margin: 1e-3 in the authors' code.
    """

    name = "srp"
    source = (
        "Hao, Bu, Ding, Huang, Yu: Reducing ANN-SNN Conversion Error through Residual Membrane "
        "Potential (SRP), AAAI 2023"
    )
    needs = "as opi (the paper: an ANN trained with QCFS); adds its probe's steps; inference only"
    trains = "QCFS"
    threshold = "mmse"
    v_init = "half"

    probe: int = 4
    margin: float = 1e-3

    def __post_init__(self) -> None:
        whole_number(self, "probe")
        Probe(self.probe, "mask", self.margin).check()

    def steps(self) -> Steps:
        """The probe's rows, then those that answer."""
        return Steps(before=self.probe, extra=self.probe, whole=True)

    def neuron(self, site: Site, T: int) -> dict[str, Any]:
        """Masked by the probe."""
        return {"probe": Probe(self.probe, "mask", self.margin)}
