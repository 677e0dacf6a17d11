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

__all__ = [
    "Adapter",
    "Change",
    "PatchError",
    "PatchReport",
    "PatchedModule",
    "Refused",
    "patch",
    "patched",
    "register",
    "spikingjelly",
    "unpatch",
]
