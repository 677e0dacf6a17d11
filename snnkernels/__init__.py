"""Spiking networks from trained ANNs, on fused integrate-and-fire kernels."""

from __future__ import annotations

from . import functional, surrogate
from .kernels.backends import backend_info, get_backend, set_backend, use_backend
from .neurons import IFNode, reset_net

__version__ = "0.1.0"
__all__ = [
    "IFNode",
    "backend_info",
    "functional",
    "get_backend",
    "reset_net",
    "set_backend",
    "surrogate",
    "use_backend",
]
