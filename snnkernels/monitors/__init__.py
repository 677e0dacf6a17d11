"""Monitors: what the neurons of any network fire, and where their membranes are, call by call.

A monitor hooks into every :class:`snnkernels.IFNode` and :class:`snnkernels.LIFNode` of a network
(converted ones included) and changes none of its numbers, whatever the neurons return. What it
keeps is detached from gradients. Calls inside a ``torch.compile`` graph are not seen, nor layers of
methods that spike in other ways (``parallel``, ``ttfs``, ``bit_serial``, ``multi_threshold``,
``dsr``), whose spikes :mod:`snnkernels.metrics` counts. A plan whose network is watched runs it.

Calls between two resets are one run in time: T calls of a single step each, or one call of T steps,
give the same record. A reset, a membrane set by hand or another neuron shape begins the next run.
"""

from .hooks import flags_before, unwatched
from .spikes import SpikeMonitor
from .voltages import VoltageMonitor

__all__ = ["SpikeMonitor", "VoltageMonitor", "flags_before", "unwatched"]
