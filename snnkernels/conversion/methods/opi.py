"""Optimized potential initialization."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Method

__all__ = ["OPI"]


@dataclass(frozen=True)
class OPI(Method):
    """Start the membrane at half the threshold: zero expected error, least squared error.

    With ``ClipReLU`` (or ``QCFS``) activations the threshold is the learned ceiling, as in the
    paper, and no data is needed; for plain ReLU networks it comes from the data. The paper's
    ablation is ``v_init="zero"``, ``"25%"`` (of θ, any constant), ``"uniform"``, ``"normal"`` and
    ``"half"``; ``"mse"`` takes the constant of each channel that fits the spikes best.
    """

    name = "opi"
    source = "Bu, Ding, Yu, Huang: Optimized Potential Initialization, AAAI 2022"
    needs = "calibration data, or an ANN trained with ClipReLU or QCFS"
    trains = "ClipReLU"
    threshold = "mmse"
    v_init = "half"
