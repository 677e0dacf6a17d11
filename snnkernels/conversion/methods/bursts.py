"""Neurons beyond one binary spike a step: bursts and spikes of both signs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...options import Signed
from ..steps import Steps
from .base import Method, part_of_start, whole_number

if TYPE_CHECKING:
    from ..thresholds import Site

__all__ = ["Burst", "FastSNN"]


@dataclass(frozen=True)
class Burst(Method):
    """Up to ``max_spikes`` spikes of one threshold at every step.

    ``group=True``: a group neuron of that many members with thresholds ``i θ / m``, which is a
    burst of quanta ``θ / m`` from ``v_init = θ / 2m``; T steps give m T levels. Otherwise a
    burst of quanta θ (adaptive firing): the ceiling of the activation is m θ, for thresholds that
    are made for it (``threshold=``).

    Args:
        max_spikes: m.
        group: see above.
    """

    name = "burst"
    source = (
        "Lv et al.: group neurons, ICASSP 2024; Wang et al.: Adaptive Calibration (adaptive "
        "firing), AAAI 2025"
    )
    needs = "as opi; its spikes are 0..m, so its T compares with no binary method's"
    threshold = "mmse"
    v_init = "half"
    binary = False

    max_spikes: int = 4
    group: bool = True

    def __post_init__(self) -> None:
        whole_number(self, "max_spikes", most=255)

    def neuron(self, site: Site, T: int) -> dict[str, Any]:
        """Bursts."""
        if not self.group:
            return {"max_spikes": self.max_spikes}
        m = self.max_spikes
        start = part_of_start(site, m)
        return {"max_spikes": m, "v_threshold": site.theta / m, "v_init": start}

    def levels_of(self, site: Site, T: int) -> int:
        """m T of a group neuron."""
        return self.max_spikes * T if self.group else T


@dataclass(frozen=True)
class FastSNN(Method):
    """Spikes of -1 take back what arrived too early.

    After firing, a neuron whose membrane is at ``-margin θ`` or below and whose net count is
    positive emits -1 and gains θ. It mends counts that are too high, not those that are too low.

    Args:
        margin: 1e-3 in the authors' code, in units of the current.
    """

    name = "signed"
    source = "Hu, Zheng, Jiang, Pan: Fast-SNN, TPAMI 2023"
    needs = "as opi; its spikes are -1, 0 and 1, so its T compares with no binary method's"
    threshold = "mmse"
    v_init = "half"
    binary = False

    margin: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 <= self.margin < math.inf:
            raise ValueError(f"signed: margin={self.margin!r} must be at least 0 and finite")

    def steps(self) -> Steps:
        """The guard's count does not outlive a call."""
        return Steps(whole=True)

    def neuron(self, site: Site, T: int) -> dict[str, Any]:
        """Signed."""
        return {"signed": Signed(margin=self.margin)}
