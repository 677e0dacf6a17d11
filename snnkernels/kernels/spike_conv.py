"""Convolution of packed spikes with the neurons behind it: Python's side of csrc/spike_conv.h.

On CPUs a compiled kernel runs it; elsewhere, and where that is not there, the reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends
from .maps.launching import pointer
from .spike_conv_reference import reference
from .spike_maps import CONV, PANEL, Branch, Layer, SpikeMap

__all__ = ["spike_conv"]


def spike_conv(
    sources: Sequence[tuple[SpikeMap, Branch]],
    layer: Layer,
    *,
    current: Tensor | None = None,
    spikes: bool | Tensor = True,
    count_at: Sequence[int] = (),
    currents: bool = False,
    T: int | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """All steps of one layer.

    Args:
        sources: maps of one batch and number of steps, and what each adds.
        layer: bias, pool and neurons.
        current: float32 ``[B, OH, OW, panels * 64]``, added at every step.
        spikes: return the neurons' spikes; a tensor is where they go.
        count_at: numbers of steps after which counts are wanted, rising, at most 16.
        currents: return what the neurons got.
        T: number of steps; needed without sources.

    Returns:
        ``(words, counts, currents)``: int64 ``[B, rows, columns, T, panels]``; int32
        ``[times, B, rows, columns, panels * 64]``; float32 ``[T, B, rows, columns, panels * 64]``;
        each None where not asked for.
    """
    if sources:
        first = sources[0][0].words
        T, (OH, OW) = first.shape[3], sources[0][1].size(*first.shape[1:3])
    else:
        assert current is not None
        first, (OH, OW) = current, current.shape[1:3]
    assert T is not None
    B, panels = first.shape[0], layer.panels
    shape = (B, OH // layer.pool, OW // layer.pool)
    _check(sources, layer, current, spikes, (B, T, OH, OW))
    kernels = backends.choose(first.device)
    if kernels is None or kernels.spike_conv is None:
        wanted = spikes is not False
        words, counts, rows = reference(
            sources, layer, current, wanted, count_at, currents, T, (OH, OW)
        )
        if isinstance(spikes, Tensor) and words is not None:
            words = spikes.copy_(words)
        return words, counts, rows
    new = first.new_empty
    words = spikes if isinstance(spikes, Tensor) else None
    if words is None and spikes is not False:
        words = new((*shape, T, panels), dtype=torch.int64)
    counts = new((len(count_at), *shape, panels * PANEL), dtype=torch.int32) if count_at else None
    rows = new((T, *shape, panels * PANEL), dtype=torch.float32) if currents else None
    positions = {
        f"{name}_position": panels * PANEL if value is not None and value.dim() == 3 else 0
        for name, value in (("threshold", layer.threshold), ("v_init", layer.v_init))
    }
    packed = CONV.pack(
        bias=pointer(layer.bias), current=pointer(current), threshold=pointer(layer.threshold),
        v_init=pointer(layer.v_init), spikes=pointer(words), counts=pointer(counts),
        currents=pointer(rows), B=B, T=T, OH=OH, OW=OW, panels=panels, pool=layer.pool,
        strict=int(layer.strict), times=len(count_at), lanes=layer.lanes,
        integers=int(layer.integers), **positions,
        **{f"count_at{i}": t for i, t in enumerate(count_at)},
    )  # fmt: skip
    kernels.spike_conv(packed, b"".join(b.pack(m.words) for m, b in sources))
    return words, counts, rows


def _check(
    sources: Sequence[tuple[SpikeMap, Branch]],
    layer: Layer,
    current: Tensor | None,
    spikes: bool | Tensor,
    size: tuple[int, int, int, int],
) -> None:
    """What the kernel cannot see behind its pointers.

    Raises:
        ValueError: a tensor is not of the size, dtype or layout that the kernel reads or writes.
    """
    B, T, OH, OW = size
    wanted = [("a source", m.words, (B, *m.words.shape[1:3], T, -(-m.channels // PANEL)))
              for m, _ in sources]  # fmt: skip
    if isinstance(spikes, Tensor):
        shape = (B, OH // layer.pool, OW // layer.pool, T, layer.panels)
        wanted.append(("spikes", spikes, shape))
    if current is not None:
        wanted.append(("current", current, (B, OH, OW, layer.panels * PANEL)))
    for name, value, shape in wanted:
        dtype = torch.float32 if name == "current" else torch.int64
        if tuple(value.shape) != shape or value.dtype != dtype or not value.is_contiguous():
            raise ValueError(
                f"{name} must be a contiguous {dtype} tensor of shape {shape}, got "
                f"{value.dtype} {tuple(value.shape)}"
            )
