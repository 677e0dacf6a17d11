"""Conversion methods, small classes of their own."""

from __future__ import annotations

from typing import Any

from ..balancing import Balancing
from .base import Method
from .bursts import Burst, FastSNN
from .calibrated import Advanced, Light
from .cos import COS
from .datta import Datta
from .ltb import LTB
from .opi import OPI
from .parallel import Parallel
from .qcfs import QCFSMethod
from .rnl import RNL
from .rules import KL, MMSE, Max, Percentile
from .srp import SRP
from .threshold_relu import ThresholdReLUMethod

__all__ = [
    "COS",
    "KL",
    "LTB",
    "METHODS",
    "MMSE",
    "OPI",
    "RNL",
    "SRP",
    "Advanced",
    "Balancing",
    "Burst",
    "Datta",
    "FastSNN",
    "Light",
    "Max",
    "Method",
    "Parallel",
    "Percentile",
    "QCFSMethod",
    "ThresholdReLUMethod",
    "find_method",
]

_CLASSES: tuple[type[Method], ...] = (
    OPI, QCFSMethod, COS, SRP, Parallel, ThresholdReLUMethod, RNL, Datta, Max, Percentile, MMSE,
    KL, LTB, Light, Advanced, Burst, FastSNN,
)  # fmt: skip
METHODS: dict[str, type[Method]] = {m.name: m for m in _CLASSES}


def find_method(method: Any) -> Method:
    """The method called ``method``, or ``method`` itself.

    Raises:
        ValueError: no such method; lists those there are.
        TypeError: neither a name nor a method.
    """
    if isinstance(method, Method):
        return method
    if not isinstance(method, str):
        raise TypeError(
            "method must be a name or an object of snnkernels.conversion.methods such as "
            f"SRP(probe=8), got {method!r}"
        )
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not known; allowed: {', '.join(METHODS)}")
    return METHODS[method]()
