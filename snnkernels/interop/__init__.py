"""Other libraries: their neurons made fast where they stand, exchange formats."""

from __future__ import annotations

from . import spikingjelly
from .patching import (
    Adapter,
    Change,
    PatchedModule,
    PatchError,
    PatchReport,
    Refused,
    patch,
    patched,
    register,
    unpatch,
)
from .snntorch import SnnTorchNetwork, from_snntorch

__all__ = [
    "Adapter",
    "Change",
    "PatchError",
    "PatchReport",
    "PatchedModule",
    "Refused",
    "SnnTorchNetwork",
    "from_snntorch",
    "patch",
    "patched",
    "register",
    "spikingjelly",
    "unpatch",
]
