"""A plan for inputs of one shape: what the passes left, as modules, and the memory it takes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..conversion.means import FromMeans, RunningMean
from ..conversion.network import ConvertedNetwork
from ..conversion.pools import CumulativeMaxPool
from ..conversion.spiking import SpikingActivation
from .buffers import Buffers, plan_buffers
from .cost import choose_convolution
from .emit import Maps, Packed, emit
from .graphs import Graphs
from .integers import WholePrefix, to_integers
from .layers import Run
from .map_layers import MapLayer
from .passes import PASSES, Pass
from .read import read

__all__ = ["ALL_PASSES", "Built", "device_of"]

ALL_PASSES: dict[str, Pass | None] = {
    **{name: run for name, run in PASSES.items() if name != "count_at_end"},
    "choose_convolution": choose_convolution,
    "count_at_end": PASSES["count_at_end"],
    "reuse_buffers": None,  # of the memory, not of the network
    "fuse_convolutions": None,  # of the kernels on GPUs
    "capture_graphs": None,  # of the calls there
}
_WITH_STATE = (SpikingActivation, CumulativeMaxPool, RunningMean, FromMeans)


def device_of(snn: ConvertedNetwork) -> torch.device:
    """Where its weights are."""
    return next(t.device for t in (*snn.parameters(), *snn.buffers()))


def _form(device: torch.device) -> str:
    """What spikes are between layers: packed words, or maps of uint8."""
    return "packed" if device.type == "cpu" else "maps"


class Built:
    """A plan for inputs of one shape.

    Attributes:
        before, net: the network as it was read, and as the passes left it.
        notes: what each pass did.
        body: runs it.
        maps: its layers on maps of uint8.
    """

    def __init__(
        self, snn: ConvertedNetwork, x: Any, off: frozenset[str], precision: str, backend: Any
    ) -> None:
        self.run = Run()
        device = device_of(snn)
        self.packed = _form(device) == "packed"
        if not self.packed or precision == "int8":
            # Its costs are those of CPUs, and sums of dense convolutions are rounded.
            off = off | {"choose_convolution"}
        self.prefix = WholePrefix(snn.prefix) if precision == "int8" else None
        self.before = read(snn, x)
        self.net = self.before.copy()
        self.notes: dict[str, list[str]] = {name: [] for name in ALL_PASSES}
        changed = True
        while changed:  # one pass may make room for an earlier one
            changed = False
            for name, apply in ALL_PASSES.items():
                done = [] if apply is None or name in off else apply(self.net)
                if done and name != "count_at_end":
                    changed = True
                self.notes[name] += done
        self.notes["integers"] = to_integers(self.net) if precision == "int8" else []
        self.body = emit(
            snn, self.net, self.run,
            Packed(self.run, precision == "int16") if self.packed
            else Maps(self.run, precision, device, "fuse_convolutions" not in off),
        )  # fmt: skip
        self.maps = [m for m in self.body.modules() if isinstance(m, MapLayer)]
        self.reuse = "reuse_buffers" not in off and self.packed
        self.graphs: Graphs | None = None
        if backend is not None and "capture_graphs" not in off:
            self.graphs = Graphs(self.compute, backend)
        self.memory: dict[int, Buffers] = {}
        self.in_pieces: bool | None = None
        if not self.reuse:
            self.notes["reuse_buffers"] = []

    def compute(self, *given: Any) -> tuple[Tensor, ...]:
        """Counts after the numbers of steps that come last, from what is constant in time."""
        *statics, ends = given
        self.run.T, self.run.ends = ends[-1], ends
        self.reset()
        try:
            return tuple(self.body(*statics, ends[-1]))
        finally:
            self.reset()

    def reset(self) -> None:
        """Layers that stayed as they were begin at their initial potential."""
        for module in self.body.modules():
            if isinstance(module, _WITH_STATE):
                module.reset()

    def close(self) -> None:
        """Nothing of it runs any more."""
        if self.graphs is not None:
            self.graphs.clear()

    def buffers(self, T: int) -> Buffers:
        """Places of packed spikes."""
        if T not in self.memory:
            self.memory[T] = plan_buffers(self.body.graph, T)
        return self.memory[T]

    def bytes_per_image(self, T: int) -> int:
        """Most that one image takes at a time: packed spikes, and dense values left."""
        buffers = self.buffers(T)
        packed = 8 * (buffers.words if self.reuse else buffers.apart)
        # A value, what it is made of and what its neurons give live together.
        small = ("layer", "static", "count")
        dense = [12 * T * math.prod(n.size) for n in self.net if n.op not in small and n.size]
        dense += [T * layer.bytes_per_step for layer in self.maps]
        constant = [4 * math.prod(n.size) for n in self.net if n.op == "static"]
        return packed + max(dense, default=0) + 2 * sum(constant)
