"""The error every part of the conversion raises."""

from __future__ import annotations

__all__ = ["ConversionError"]


class ConversionError(ValueError):
    """A network that cannot be converted: names the layer, the reason and the way out."""
