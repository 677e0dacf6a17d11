"""Sums in a fixed order: the same bits on every back end, whatever runs in parallel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import backends
from .. import maps_reference as reference
from ..maps_reference import LANES
from ..params import DTYPE_CODES
from .launching import kernels_for, launch

_SEGMENT, _SEGMENTS, _TABLE = 1024, 1024, 1 << 18


def segments(rows: int, n: int) -> tuple[int, int]:
    """How rows of n elements are cut, from the sizes alone: ``(length, number)``."""
    wanted = max(1, min(-(-n // _SEGMENT), _SEGMENTS, _TABLE // max(rows, 1)))
    length = max(-(-n // (wanted * LANES)) * LANES, LANES)
    return length, max(-(-n // length), 1)


def segment_sums(
    kernels: backends.Kernels | None, values: Tensor, rows: int, inner: int, length: int, count: int
) -> Tensor:
    """float64 ``[rows, count]``: sums of ``values`` seen as ``[*, rows, inner]``, by segments."""
    each = values.numel() // max(rows, 1)
    if kernels is None:
        table = values.reshape(-1, rows, inner).transpose(0, 1).reshape(rows, each)
        return reference.sums(table, length)
    out = values.new_empty((rows, count), dtype=torch.float64)
    if out.numel():
        launch(
            kernels, "sums", values.device, values=values.data_ptr(), out=out.data_ptr(),
            N=out.numel(), rows=rows, inner=inner, each=each, length=length, segments=count,
            dtype=DTYPE_CODES[values.dtype],
        )  # fmt: skip
    return out


def _row_sums(values: Tensor, rows: int, inner: int) -> Tensor:
    """float64 ``[rows]``: sums of ``values`` seen as ``[*, rows, inner]``, in a fixed order."""
    kernels = kernels_for(values.device)
    if not values.numel():
        return values.new_zeros(rows, dtype=torch.float64)
    length, count = segments(rows, values.numel() // rows)
    partial = segment_sums(kernels, values, rows, inner, length, count)
    return of_segments(partial)


def of_segments(partial: Tensor) -> Tensor:
    """``[rows, segments]`` summed over segments."""
    rows, count = partial.shape
    if count == 1 or rows == 0:
        return partial.reshape(rows)
    length = -(-count // LANES) * LANES
    return segment_sums(kernels_for(partial.device), partial, rows, count, length, 1).reshape(rows)


def summed_to(shares: Tensor, like: Tensor) -> Tensor:
    """Sums ``[*shape]`` to what broadcasts to it: float64 inside, the same bits everywhere."""
    extra = shares.dim() - like.dim()
    sizes = [1] * extra + list(like.shape)
    kept = [i for i, n in enumerate(sizes) if n != 1]
    if [n for n in shares.shape if n != 1] == [sizes[i] for i in kept]:
        return shares.reshape(like.shape).to(like.dtype)
    rows = math.prod(sizes)
    if kept and kept[-1] - kept[0] >= len(kept):
        between = range(kept[0], kept[-1] + 1)
        if any(sizes[i] == 1 and shares.shape[i] != 1 for i in between):
            rest = [i for i in range(shares.dim()) if i not in kept]
            shares = shares.permute(*kept, *rest).contiguous()
            return (
                _row_sums(shares, rows, shares.numel() // max(rows, 1))
                .view(like.shape)
                .to(like.dtype)
            )
    inner = math.prod(shares.shape[kept[-1] + 1 :]) if kept else max(shares.numel(), 1)
    return _row_sums(shares.contiguous(), rows, inner).view(like.shape).to(like.dtype)
