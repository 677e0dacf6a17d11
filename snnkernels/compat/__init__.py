"""Neurons with other libraries' names, defaults and habits, which do not need those libraries."""

from __future__ import annotations

from . import spikingjelly

__all__ = ["spikingjelly"]
