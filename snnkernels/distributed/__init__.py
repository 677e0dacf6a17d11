"""Calibration, evaluation and training in several processes (``torchrun``)."""

from __future__ import annotations

from .dealing import Split

__all__ = ["Split"]
