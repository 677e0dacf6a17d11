"""What a plan runs on GPUs: layers on maps of uint8 spikes, with their convolution where possible.

Maps are ``[T, B, H, W, C]``, channels innermost, as tensor cores want them: the memory of
``[T, B, C, H, W]`` in channels_last. Layers without positions have ``[T, B, 1, 1, C]``. On CPUs
the same layers run in plain PyTorch, for tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..conversion.spiking import per_channel_view
from ..functional import if_run
from ..kernels.fused_conv import NotFusible, why_not
from ..maps import cumulative_max_pool
from .fused import FusedLayer, current_of
from .integers import check_range, current_bounds, units_of
from .layers import Run, constant_current
from .network import Network, Node, Term

__all__ = ["DTYPES", "FromMap", "MapLayer", "ToMap"]

# Of weights and currents of what is not fused. Whole numbers have exact sums in float64.
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.float64,
}
_FUSED = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}


class MapLayer(nn.Module):
    """Neurons and the linear maps of spikes before them.

    Called with the map of each source and then the values constant in time, as ``[B, C]`` or
    ``[B, C, H, W]``; returns ``(map or None, counts or None)`` with counts ``[times, B, *size]``
    int32.

    Attributes:
        why: why convolution and neurons are apart; nothing: they are fused.
        sources: names of the values that are read.
    """

    bias: Tensor | None
    threshold: Tensor
    v_init: Tensor
    unit: Tensor | None

    def __init__(
        self,
        net: Network,
        node: Node,
        run: Run,
        precision: str,
        counted: bool,
        device: Any,
        fuse: bool = True,
    ) -> None:
        super().__init__()
        neurons = node.neurons
        assert neurons is not None
        self.name, self.size, self.side = node.name, node.size, node.side
        self.strict, self.spikes, self.counted = neurons.strict, node.spikes, counted
        self.dtype = DTYPES[precision]
        self._run = (run,)
        self.fused: FusedLayer | None = None
        self.why = self._fuse(net, node, precision, device) if fuse else "left out"
        terms = list(node.terms)
        self.sources = [net.origin_of(term.source).name for term in terms]
        if self.fused is not None:
            self.sources = self.fused.sources
        self._terms: list[Term] = []
        for term in terms if self.fused is None else ():
            weight = term.weight.to(device, self.dtype, memory_format=torch.channels_last)
            self._terms.append(replace(term, weight=weight))
        bias = node.whole_bias()
        for name, value in (
            ("bias", None if bias is None else bias.to(_wide(self.dtype))),
            ("threshold", neurons.threshold),
            ("v_init", neurons.v_init),
            ("unit", node.unit),
        ):
            held = None if value is None else value.to(device)
            self.register_buffer(name, held, persistent=False)
        self._bound, self._constant = (0.0, 0.0) if node.unit is None else current_bounds(node)
        self._start = 0 if node.unit is None else int(neurons.v_init.abs().max())

    def _fuse(self, net: Network, node: Node, precision: str, device: Any) -> str:
        if precision not in _FUSED:
            return f"{precision} has no fused kernel"
        reason = why_not(device, _FUSED[precision])
        if reason:
            return reason
        try:
            self.fused = FusedLayer(net, node, self._run[0], _FUSED[precision]).place(device)
        except NotFusible as error:
            return str(error)
        return ""

    def forward(self, *values: Any) -> tuple[Tensor | None, Tensor | None]:
        """Run all steps."""
        run = self._run[0]
        maps = values[: len(self.sources)]
        statics: Sequence[Tensor] = values[len(self.sources) :]
        unit = self.unit
        if unit is not None:
            check_range(self.name, run.T, self._bound, self._start, self.side)
            statics = units_of(statics, unit, self._constant)
        if self.fused is not None:
            return self.fused(maps, statics)
        current = self._current(maps, statics)
        ends = run.ends if self.counted else ()
        rows: Tensor | None
        if unit is not None:
            rows = self._whole_neurons(current)
            counts = [rows[:t].sum(0, dtype=torch.int32) for t in ends]
            counted = torch.stack(counts) if ends else None
        else:
            found = if_run(
                current, self.v_init, self.threshold, outputs="spikes" if self.spikes else (),
                count_at=ends, T=None if maps else run.T, channel_dim=1, bias=self.bias,
                tie=">" if self.strict else ">=", spike_dtype=torch.uint8,
            )  # fmt: skip
            rows, counted = found.spikes, found.counts
        if counted is not None:
            # In the order in which the converted network has them: the tail then rounds alike.
            counted = counted.contiguous()
            counted = counted.flatten(2) if len(self.size) == 1 else counted
        if not self.spikes or rows is None:
            return None, counted
        return rows.permute(0, 1, 3, 4, 2).contiguous(), counted

    def _current(self, maps: Any, statics: Any) -> Tensor:
        """``[T, B, C, H, W]`` in channels_last, or constant in time ``[B, C, H, W]``."""
        total = constant_current(statics)
        total = None if total is None else total.to(_wide(self.dtype))
        for spikes, term in zip(maps, self._terms, strict=True):
            added = current_of(spikes, term)
            total = added if total is None else added + total
        assert total is not None
        if self.side > 1:
            steps = total if maps else total.expand(self._run[0].T, *total.shape)
            total = _pooled(steps, self.side)
        return total

    def _whole_neurons(self, current: Tensor) -> Tensor:
        """Spikes as uint8, with membranes of int32."""
        steps = current if current.dim() == 5 else [current] * self._run[0].T
        theta, v = (per_channel_view(x, 1, 4) for x in (self.threshold, self.v_init))
        bias = None if self.bias is None else per_channel_view(self.bias, 1, 4)
        fired = []
        for step in steps:
            step = step if bias is None else step + bias
            v = v + step.to(torch.int32)
            s = v > theta if self.strict else v >= theta
            v = torch.where(s, v - theta, v)
            fired.append(s)
        return torch.stack(fired).to(torch.uint8)

    @property
    def bytes_per_step(self) -> int:
        """Most that an image takes at a time, of one step."""
        outputs = math.prod(self.size)
        if self.fused is not None:
            return 12 * outputs  # maps, and currents that are added
        # Currents lie there before a pool, beside what they are the sum of and what is read.
        return 4 * _wide(self.dtype).itemsize * self.side**2 * outputs

    @property
    def runs(self) -> str:
        """How, in words."""
        how = "fused" if self.fused is not None else f"apart: {self.why}"
        return how + ("" if self.spikes else ", counts")

    def extra_repr(self) -> str:
        """Show what it is made of."""
        how = self.runs
        return f"{self.name!r}, size={self.size}, reads={self.sources}, {how}"


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Of biases and constant currents: at least float32."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _pooled(current: Tensor, side: int) -> Tensor:
    if current.dtype != torch.float64:
        return cumulative_max_pool(current, side, side)
    # Whole numbers: running sums are exact.
    sums = F.max_pool2d(current.cumsum(0).flatten(0, 1), side).unflatten(0, current.shape[:2])
    return torch.diff(sums, dim=0, prepend=torch.zeros_like(sums[:1]))


class FromMap(nn.Module):
    """A map as the converted network's layers take it: ``[T * B, *size]``."""

    amplitude: Tensor

    def __init__(self, node: Node, device: Any) -> None:
        super().__init__()
        assert node.neurons is not None
        self.flat = len(node.size) == 1
        amplitude = node.neurons.amplitude.float().to(device)
        self.register_buffer("amplitude", amplitude, persistent=False)

    def forward(self, spikes: Tensor) -> Tensor:
        """Each spike is the amplitude itself."""
        x = spikes.permute(0, 1, 4, 2, 3).flatten(0, 1).contiguous().float()
        x = x * per_channel_view(self.amplitude, 1, 4)
        return x.flatten(1) if self.flat else x


class ToMap(nn.Module):
    """Spikes of the converted network's own neurons, ``[T * B, *size]``, as a map."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = (run,)

    def forward(self, spikes: Tensor) -> Tensor:
        """What is not 0 is a spike."""
        x = (spikes != 0).to(torch.uint8).unflatten(0, (self._run[0].T, -1))
        x = x[..., None, None] if x.dim() == 3 else x
        return x.permute(0, 1, 3, 4, 2).contiguous()
