"""Conversion methods, small classes of their own."""

from __future__ import annotations

from typing import Any

from ..balancing import Balancing
from .base import Method
from .bit_serial import BitSerial
from .bursts import Burst, FastSNN
from .calibrated import Advanced, Light
from .cos import COS
from .datta import Datta
from .dsr import DSR
from .ltb import LTB
from .multi_threshold import MultiThreshold
from .opi import OPI
from .parallel import Parallel
from .ptl import PTL
from .qcfs import QCFSMethod
from .rnl import RNL
from .rules import KL, MMSE, Max, Percentile
from .srp import SRP
from .st_bif import STBIF
from .threshold_relu import ThresholdReLUMethod
from .ttfs import TTFS

__all__ = [
    "COS",
    "DSR",
    "KL",
    "LTB",
    "METHODS",
    "MMSE",
    "OPI",
    "PTL",
    "RNL",
    "SRP",
    "STBIF",
    "TTFS",
    "Advanced",
    "Balancing",
    "BitSerial",
    "Burst",
    "Datta",
    "FastSNN",
    "Light",
    "Max",
    "Method",
    "MultiThreshold",
    "Parallel",
    "Percentile",
    "QCFSMethod",
    "ThresholdReLUMethod",
    "find_method",
]

# In the order in which they are listed: trained for, thresholds from data, corrected on data, other
# ways to spike, training beyond the conversion.
_CLASSES: tuple[type[Method], ...] = (
    OPI, QCFSMethod, COS, SRP, Parallel, RNL, ThresholdReLUMethod, Datta,
    Max, Percentile, MMSE, KL, LTB, Light, Advanced,
    BitSerial, TTFS, Burst, FastSNN, STBIF, MultiThreshold,
    DSR, PTL,
)  # fmt: skip
METHODS: dict[str, type[Method]] = {m.name: m for m in _CLASSES}


def find_method(method: Any, argument: str = "method") -> Method:
    """The method called ``method``, or ``method`` itself; errors call it ``argument``.

    Raises:
        ValueError: no such method; lists those there are.
        TypeError: neither a name nor a method.
    """
    if isinstance(method, Method):
        return method
    if not isinstance(method, str):
        raise TypeError(
            f"{argument} must be a name or an object of snnkernels.conversion.methods such as "
            f"SRP(probe=8), got {method!r}"
        )
    if method not in METHODS:
        raise ValueError(f"{argument}={method!r} is not known; allowed: {', '.join(METHODS)}")
    return METHODS[method]()
