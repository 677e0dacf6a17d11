"""Spiking networks from trained ANNs, on fused integrate-and-fire kernels."""

from __future__ import annotations

from . import functional, surrogate
from .conversion import QCFS, ClipReLU, ConversionError, ConvertedNetwork, convert, methods
from .kernels.backends import backend_info, get_backend, set_backend, use_backend
from .neurons import IFNode, reset_net

__version__ = "0.1.0"
__all__ = [
    "QCFS",
    "ClipReLU",
    "ConversionError",
    "ConvertedNetwork",
    "IFNode",
    "backend_info",
    "convert",
    "functional",
    "get_backend",
    "methods",
    "reset_net",
    "set_backend",
    "surrogate",
    "use_backend",
]
