"""What a plan runs: layers on packed spikes, and the ways between those and dense tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..conversion.spiking import SpikingActivation, per_channel_view
from ..kernels.spike_conv import spike_conv
from ..kernels.spike_maps import PANEL, Branch, Layer, SpikeMap, branches_of, lanes_of
from .integers import check_range, current_bounds, units_of
from .network import Network, Node

__all__ = ["CountAt", "Dense", "Pack", "Run", "SpikingLayer"]


class Run:
    """What the layers of one plan know about the run they are in.

    Attributes:
        T: number of steps.
        ends: numbers of steps after which counts are read, rising; the last is T.
        arena: memory of the packed spikes, one int64 tensor, or None: each layer takes its own.
        offsets: where each layer's spikes lie there, in words per image.
    """

    def __init__(self) -> None:
        self.T = 0
        self.ends: tuple[int, ...] = ()
        self.arena: Tensor | None = None
        self.offsets: dict[str, int] = {}

    def words(self, name: str, shape: tuple[int, ...]) -> Tensor | bool:
        """Where the spikes of a layer go."""
        if self.arena is None or name not in self.offsets:
            return True
        start = self.offsets[name] * shape[0]
        size = 1
        for n in shape:
            size *= n
        return self.arena[start : start + size].view(shape)


def panels_of(channels: int) -> int:
    """Words of so many channels."""
    return -(-channels // PANEL)


def _spread(value: Tensor, size: tuple[int, ...], fill: float) -> Tensor:
    """A scalar, ``[C]`` or ``[C, H, W]`` value as the kernel reads it, padded channels ``fill``."""
    value = value.detach()
    value = value if value.dtype == torch.int32 else value.float()
    channels = size[0]
    padding = panels_of(channels) * PANEL - channels
    if value.dim() <= 1:
        return F.pad(value.expand(channels), (0, padding), value=fill).contiguous()
    full = value.expand(size)
    full = full[:, None, None] if full.dim() == 1 else full
    return F.pad(full.permute(1, 2, 0), (0, padding), value=fill).contiguous()


_NEVER = 2**31 - 1  # a threshold


def constant_current(statics: Sequence[Tensor]) -> Tensor | None:
    """The sum of values constant in time, ``[B, C]`` or ``[B, C, H, W]``, with positions."""
    total: Tensor | None = None
    for static in statics:
        total = static if total is None else total + static
    return total[..., None, None] if total is not None and total.dim() == 2 else total


def as_counted(counts: Tensor, size: tuple[int, ...]) -> Tensor:
    """Counts ``[times, B, H, W, C]`` as ``[times, B, *size]``.

    In the order in which the converted network has them: the tail then rounds alike.
    """
    counts = counts.permute(0, 1, 4, 2, 3).contiguous()
    return counts.flatten(2) if len(size) == 1 else counts


class SpikingLayer(nn.Module):
    """Neurons and the linear maps of spikes before them, in one kernel.

    Called with the :class:`SpikeMap` of each source and then the values constant in time, as
    ``[B, C]`` or ``[B, C, H, W]``; returns ``(SpikeMap or None, counts or None)`` with counts
    ``[times, B, *size]`` int32.
    """

    bias: Tensor | None
    threshold: Tensor
    v_init: Tensor
    unit: Tensor | None

    def __init__(self, net: Network, node: Node, run: Run, int16: bool, counted: bool) -> None:
        super().__init__()
        neurons = node.neurons
        assert neurons is not None
        self.name, self.size, self.side = node.name, node.size, node.side
        self.channels, self.panels = node.size[0], panels_of(node.size[0])
        self.strict, self.spikes, self.counted = neurons.strict, node.spikes, counted
        self.sources = [net.origin_of(term.source).name for term in node.terms]
        self._run = (run,)
        self._branches: list[list[Branch]] = []
        for term in node.terms:
            mine = branches_of(
                term.weight.float(), stride=term.stride, padding=term.padding,
                dilation=term.dilation, groups=term.groups, pool=term.pool,
                pool_stride=term.pool_stride, either=term.either,
                int16=int16 and not term.each, whole=node.unit is not None,
            )  # fmt: skip
            self._branches.append(mine)
        columns = [(*net.origin_of(term.source).size, 1, 1)[2] for term in node.terms]
        reads = [(W, b) for W, mine in zip(columns, self._branches, strict=True) for b in mine]
        self.lanes = lanes_of(self.channels, self.side, reads)
        self._branches = [[b.narrow(self.lanes) for b in mine] for mine in self._branches]
        for i, mine in enumerate(self._branches):
            for j, branch in enumerate(mine):
                self.register_buffer(f"weights_{i}_{j}", branch.weights, persistent=False)
        bias = node.whole_bias()
        self.register_buffer(
            "bias", None if bias is None else _spread(bias, node.size, 0.0), persistent=False
        )
        self.register_buffer(
            "threshold",
            _spread(neurons.threshold, node.size, torch.inf if node.unit is None else _NEVER),
            persistent=False,
        )
        self.register_buffer("v_init", _spread(neurons.v_init, node.size, 0), persistent=False)
        self.register_buffer("unit", node.unit, persistent=False)
        self._bound, self._constant = (0.0, 0.0) if node.unit is None else current_bounds(node)
        self._start = 0 if node.unit is None else int(self.v_init.abs().max())

    def forward(self, *values: Any) -> tuple[SpikeMap | None, Tensor | None]:
        """Run all steps."""
        run = self._run[0]
        if self.unit is not None:
            check_range(self.name, run.T, self._bound, self._start, self.side)
        maps = values[: len(self.sources)]
        statics: Sequence[Tensor] = values[len(self.sources) :]
        if self.unit is not None:
            statics = units_of(statics, self.unit, self._constant)
        current = constant_current(statics)
        if current is not None:
            full = current.permute(0, 2, 3, 1)
            current = F.pad(full, (0, self.panels * PANEL - self.channels)).contiguous()
        pairs = [
            (m, branch) for m, mine in zip(maps, self._branches, strict=True) for branch in mine
        ]
        layer = Layer(
            self.panels, self.bias, self.threshold, self.v_init, self.side, self.strict, self.lanes
        )
        batch = len(maps[0].words) if maps else len(statics[0])
        rows, columns = self.size[1:] if len(self.size) == 3 else (1, 1)
        shape = (batch, rows, columns, run.T, self.panels)
        words, counts, _ = spike_conv(
            pairs, layer, current=current,
            spikes=run.words(self.name, shape) if self.spikes else False,
            count_at=run.ends if self.counted else (), T=run.T,
        )  # fmt: skip
        if counts is not None:
            counts = as_counted(counts[..., : self.channels], self.size)
        return None if words is None else SpikeMap(words, self.channels), counts

    def extra_repr(self) -> str:
        """Show what it is made of."""
        return f"{self.name!r}, size={self.size}, reads={self.sources}"


class Dense(nn.Module):
    """Packed spikes as the converted network's layers take them: ``[T * B, *size]``."""

    amplitude: Tensor

    def __init__(self, node: Node) -> None:
        super().__init__()
        assert node.neurons is not None
        self.flat = len(node.size) == 1
        self.register_buffer("amplitude", node.neurons.amplitude.float(), persistent=False)

    def forward(self, spikes: SpikeMap) -> Tensor:
        """Unpack; each spike is the amplitude itself."""
        x = spikes.dense().flatten(0, 1).contiguous()  # a view of it may follow
        x = x * per_channel_view(self.amplitude, 1, 4)
        return x.flatten(1) if self.flat else x


class Pack(nn.Module):
    """Spikes of the converted network's own neurons, ``[T * B, *size]``, packed."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = (run,)

    def forward(self, spikes: Tensor) -> SpikeMap:
        """Pack: what is not 0 is a spike."""
        x = spikes.unflatten(0, (self._run[0].T, -1))
        return SpikeMap.of(x[..., None, None] if x.dim() == 3 else x)


class CountAt(nn.Module):
    """Spikes ``[T * B, *size]`` of the converted network's own neurons, counted at times."""

    def __init__(self, layer: SpikingActivation, run: Run) -> None:
        super().__init__()
        self._of = (layer, run)

    def forward(self, spikes: Tensor) -> Tensor:
        """``[times, B, *size]``."""
        layer, run = self._of
        rows = spikes.unflatten(0, (run.T, -1))
        return torch.stack([layer.count(rows[:end]) for end in run.ends])
