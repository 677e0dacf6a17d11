"""NIR: converted networks as graphs that other libraries read, and theirs as networks of ours."""

from __future__ import annotations

from .nir_export import to_nir
from .nir_import import from_nir

__all__ = ["from_nir", "to_nir"]
