"""Methods that are a threshold rule and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Method

__all__ = ["KL", "MMSE", "Max", "Percentile"]


@dataclass(frozen=True)
class Max(Method):
    """Thresholds at the largest activation, membranes at 0: data-based normalisation."""

    name = "max"
    source = "Diehl et al.: Fast-classifying, high-accuracy spiking deep networks, IJCNN 2015"
    needs = "calibration data"
    threshold = "max"
    per_channel = False


@dataclass(frozen=True)
class Percentile(Method):
    """Thresholds at the 99.9th percentile of the activations, membranes at 0.

    Another percentile: ``threshold="99%"``.
    """

    name = "percentile"
    source = (
        "Rueckauer et al.: Conversion of continuous-valued deep networks, Front. Neurosci. 2017"
    )
    needs = "calibration data"
    threshold = "99.9%"
    per_channel = False


@dataclass(frozen=True)
class MMSE(Method):
    """Thresholds whose staircase fits the activations best, membranes at half of them."""

    name = "mmse"
    source = "Li et al.: A Free Lunch From ANN: SNN Calibration, ICML 2021 (its threshold search)"
    needs = "calibration data"
    threshold = "mmse"
    v_init = "half"


@dataclass(frozen=True)
class KL(Method):
    """Thresholds whose T levels keep most of the activations' histogram; membranes at half.

    See :func:`snnkernels.conversion.divergence.kl_threshold` for bins, levels and candidates. A
    histogram of few values is ragged, and the thresholds of its channel then too small: with little
    data pass ``per_channel=False``.
    """

    name = "kl"
    source = "Migacz: 8-bit Inference with TensorRT, GTC 2017 (its entropy calibration)"
    needs = "calibration data"
    threshold = "kl"
    v_init = "half"
