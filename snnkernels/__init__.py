"""Spiking networks from trained ANNs, on fused integrate-and-fire kernels."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import bound, functional, options, surrogate
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
    from .hub import load_pretrained
    from .interop import PatchReport, from_snntorch, patch, patched, unpatch
    from .interop.nir import from_nir, to_nir
    from .interop.onnx import to_onnx

# Methods whose work is done on an upper floor: {class: {method: module that defines it}}.
bound.METHODS.update(
    {
        "ConvertedNetwork": {
            "save_pretrained": "hub",
            "push_to_hub": "hub",
            "export": "hub",
            "over_time": "interop.sequence",
        },
        "ConvertedModules": {"save_pretrained": "hub", "push_to_hub": "hub"},
    }
)

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
    "PatchReport",
    "Plan",
    "RateNorm",
    "ThresholdReLU",
    "backend_info",
    "compat",
    "convert",
    "convert_modules",
    "from_nir",
    "from_snntorch",
    "functional",
    "get_backend",
    "interop",
    "load_pretrained",
    "lower",
    "methods",
    "options",
    "patch",
    "patched",
    "reset_net",
    "set_backend",
    "surrogate",
    "to_nir",
    "to_onnx",
    "tune_malloc",
    "unpatch",
    "use_backend",
]


# Loaded when first used: users of the neurons alone do not wait for the converter.
_LAZY = {
    "conversion": (
        "QCFS", "ClipReLU", "ConversionError", "ConvertedModules", "ConvertedNetwork", "RateNorm",
        "ThresholdReLU", "convert", "convert_modules", "methods",
    ),
    "engine": ("Plan", "lower"),
    "hub": ("load_pretrained",),
    "interop": ("PatchReport", "from_snntorch", "patch", "patched", "unpatch"),
    "interop.nir": ("from_nir", "to_nir"),
    "interop.onnx": ("to_onnx",),
}  # fmt: skip
_HOME = {name: module for module, names in _LAZY.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in ("compat", "interop"):
        return import_module(f"{__name__}.{name}")
    if name in _HOME:
        module = import_module(f"{__name__}.{_HOME[name]}")
        globals()[name] = value = getattr(module, name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
