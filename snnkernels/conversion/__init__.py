"""ANN to SNN conversion: ``convert`` and what it is made of."""

from __future__ import annotations

from .activations import QCFS, ClipReLU
from .errors import ConversionError
from .network import ConvertedNetwork
from .pipeline import convert, methods
from .report import NodeReport, Report

__all__ = [
    "QCFS",
    "ClipReLU",
    "ConversionError",
    "ConvertedNetwork",
    "NodeReport",
    "Report",
    "convert",
    "methods",
]
