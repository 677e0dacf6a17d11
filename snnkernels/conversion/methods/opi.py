"""Optimized potential initialization."""

from __future__ import annotations

from .base import Method

__all__ = ["OPI"]


class OPI(Method):
    """Start the membrane at half the threshold: zero expected error, least squared error.

    With ``ClipReLU`` (or ``QCFS``) activations the threshold is the learned ceiling, as in the
    paper, and no data is needed; for plain ReLU networks it comes from the data.
    """

    name = "opi"
    source = "Bu, Ding, Yu, Huang: Optimized Potential Initialization, AAAI 2022"
    needs = "calibration data, or an ANN trained with ClipReLU or QCFS"
    threshold = "mmse"
    per_channel = True
    v_init = "half"
