"""Pictures of networks, spikes and conversions.

Each function draws into ``ax`` (a new figure when None) and returns the axes. matplotlib is
imported when a function is called; no setting of it is changed, and with ``ax`` given pyplot is
not touched, so any back end will do.
"""

from .curves import accuracy_curve, accuracy_energy
from .layers import correlations, energy_layers, error_sources, rate_activation
from .spikes import membrane, raster, rate_histogram

__all__ = [
    "accuracy_curve",
    "accuracy_energy",
    "correlations",
    "energy_layers",
    "error_sources",
    "membrane",
    "raster",
    "rate_activation",
    "rate_histogram",
]
