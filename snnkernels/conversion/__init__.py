"""ANN to SNN conversion: ``convert`` and what it is made of."""

from __future__ import annotations

from .activations import QCFS, ClipReLU, ThresholdReLU
from .activations_named import ACTIVATIONS, name_activation
from .activations_rates import RateNorm, lock_rates, rate_inference_loss, record_rates
from .certify import Certificate
from .datta import datta_search
from .errors import ConversionError
from .modules import ConvertedModules, convert_modules
from .network import ConvertedNetwork
from .pipeline import convert, methods
from .report import NodeReport, Report
from .stochastic import stochastic_prefix

__all__ = [
    "ACTIVATIONS",
    "QCFS",
    "Certificate",
    "ClipReLU",
    "ConversionError",
    "ConvertedModules",
    "ConvertedNetwork",
    "NodeReport",
    "RateNorm",
    "Report",
    "ThresholdReLU",
    "convert",
    "convert_modules",
    "datta_search",
    "lock_rates",
    "methods",
    "name_activation",
    "rate_inference_loss",
    "record_rates",
    "stochastic_prefix",
]
