"""Spiking networks from trained ANNs, on fused integrate-and-fire kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import functional, options, surrogate
from .kernels.backends import backend_info, get_backend, set_backend, use_backend
from .memory import tune_malloc
from .neurons import IFNode, LIFNode, reset_net
from .packed import PackedSpikes

if TYPE_CHECKING:
    from .conversion import (
        QCFS,
        ClipReLU,
        ConversionError,
        ConvertedModules,
        ConvertedNetwork,
        RateNorm,
        ThresholdReLU,
        convert_modules,
    )
    from .conversion.pipeline import convert, methods
    from .engine import Plan, lower

__version__ = "0.1.0"
__all__ = [
    "QCFS",
    "ClipReLU",
    "ConversionError",
    "ConvertedModules",
    "ConvertedNetwork",
    "IFNode",
    "LIFNode",
    "PackedSpikes",
    "Plan",
    "RateNorm",
    "ThresholdReLU",
    "backend_info",
    "convert",
    "convert_modules",
    "functional",
    "get_backend",
    "lower",
    "methods",
    "options",
    "reset_net",
    "set_backend",
    "surrogate",
    "tune_malloc",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    # The converter is loaded when first used: users of the neurons alone do not wait for it.
    if name in __all__:
        from . import conversion, engine

        floor = engine if name in engine.__all__ else conversion
        globals()[name] = value = getattr(floor, name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
