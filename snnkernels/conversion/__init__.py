"""ANN to SNN conversion: ``convert`` and what it is made of."""

from __future__ import annotations

from .activations import QCFS, ClipReLU
from .errors import ConversionError
from .modules import ConvertedModules, convert_modules
from .network import ConvertedNetwork
from .pipeline import convert, methods
from .report import NodeReport, Report

__all__ = [
    "QCFS",
    "ClipReLU",
    "ConversionError",
    "ConvertedModules",
    "ConvertedNetwork",
    "NodeReport",
    "Report",
    "convert",
    "convert_modules",
    "methods",
]
