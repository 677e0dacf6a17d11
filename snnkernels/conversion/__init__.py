"""ANN to SNN conversion: ``convert`` and what it is made of."""

from __future__ import annotations

from .activations import QCFS, ClipReLU
from .certify import Certificate
from .errors import ConversionError
from .network import ConvertedNetwork
from .pipeline import convert, methods
from .report import NodeReport, Report
from .stochastic import stochastic_prefix

__all__ = [
    "QCFS",
    "Certificate",
    "ClipReLU",
    "ConversionError",
    "ConvertedNetwork",
    "NodeReport",
    "Report",
    "convert",
    "methods",
    "stochastic_prefix",
]
