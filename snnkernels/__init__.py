"""Spiking networks from trained ANNs, on fused integrate-and-fire kernels."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import bound, functional, options, surrogate
from .kernels.backends import backend_info, get_backend, set_backend, use_backend
from .memory import tune_malloc
from .neurons import IFNode, LIFNode
from .packed import PackedSpikes
from .state import detach_net, reset_net, set_step_mode

if TYPE_CHECKING:
    from . import compat, distributed, interop, metrics, plots
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
    from .monitors import SpikeMonitor, VoltageMonitor
    from .tensorboard import log_to_tensorboard

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
        "Report": {"to_html": "html_report"},
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
    "SpikeMonitor",
    "ThresholdReLU",
    "VoltageMonitor",
    "backend_info",
    "compat",
    "convert",
    "convert_modules",
    "detach_net",
    "distributed",
    "from_nir",
    "from_snntorch",
    "functional",
    "get_backend",
    "interop",
    "load_pretrained",
    "log_to_tensorboard",
    "lower",
    "methods",
    "metrics",
    "options",
    "patch",
    "patched",
    "plots",
    "reset_net",
    "set_backend",
    "set_step_mode",
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
    "monitors": ("SpikeMonitor", "VoltageMonitor"),
    "tensorboard": ("log_to_tensorboard",),
    "hub": ("load_pretrained",),
    "interop": ("PatchReport", "from_snntorch", "patch", "patched", "unpatch"),
    "interop.nir": ("from_nir", "to_nir"),
    "interop.onnx": ("to_onnx",),
}  # fmt: skip
_LAZY_MODULES = ("compat", "distributed", "interop", "metrics", "plots")
_HOME = {name: module for module, names in _LAZY.items() for name in names}


if not TYPE_CHECKING:  # where every name would be taken for one of ours

    def __getattr__(name: str) -> Any:
        if name in _LAZY_MODULES:
            return import_module(f"{__name__}.{name}")
        if name in _HOME:
            module = import_module(f"{__name__}.{_HOME[name]}")
            globals()[name] = value = getattr(module, name)
            return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
