"""Parallel conversion."""

from __future__ import annotations

from dataclasses import dataclass

from ..steps import Steps
from .base import Method

__all__ = ["Parallel"]


@dataclass(frozen=True)
class Parallel(Method):
    """Neurons that see all steps at once: ``clip(floor((S + v_init) / θ), 0, T)`` spikes.

    S is the sum of the current over the T steps. What arrives when does not matter, so there is no
    unevenness error, and with T = L the network is the QCFS network it was trained as: same
    expression, same bits (up to folded batch norms). It runs as one pass on counts, without a loop
    over time, at the cost of the ANN; every T is a pass of its own.
    """

    name = "parallel"
    source = "Hao et al.: parallel conversion, ICML 2025 (arXiv 2412.13610)"
    needs = "as opi (the paper: an ANN trained with QCFS)"
    trains = "QCFS"
    threshold = "mmse"
    v_init = "half"

    def steps(self) -> Steps:
        """One pass."""
        return Steps(whole=True, parallel=True)
