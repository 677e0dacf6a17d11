"""Quantisation clip-floor-shift."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConversionError
from ..ops import Activation
from .base import Method

__all__ = ["QCFSMethod"]


@dataclass(frozen=True)
class QCFSMethod(Method):
    """Threshold = learned ceiling, membrane starts at half of it; no data."""

    name = "qcfs"
    source = "Bu, Fang, Ding, Dai, Yu, Huang: Optimal ANN-SNN Conversion (QCFS), ICLR 2022"
    needs = "an ANN trained with QCFS (or ClipReLU) activations; no data"
    trains = "QCFS"
    v_init = "half"

    def check(self, activations: list[Activation]) -> None:
        """Every activation must have a learned ceiling."""
        for activation in activations:
            if activation.learned is None:
                raise ConversionError(
                    f"{activation.label}: method='qcfs' needs QCFS or ClipReLU activations, this "
                    f"is {type(activation.inner).__name__}. Train with snnkernels' QCFS, or use "
                    "method='opi' with a loader, or pass threshold= explicitly"
                )
