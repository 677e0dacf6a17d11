"""How the neurons of a tensor lie in memory, so that kernels read and write it where it is.

Kernels number neurons in the order of memory and know rows ``[T, N]`` by three numbers: neuron n of
step t is element ``t * step + (n // inner) * outer + n % inner``. That covers ``[T, N, ...]``,
``[N, T, ...]`` seen through a transpose, slices along one dimension, and channels_last of either.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Step and outer stride of an array's rows, in elements."""

    step: int
    outer: int


class Layout(NamedTuple):
    """Where the currents of a call lie, and where what has their shape should."""

    order: tuple[int, ...] | None  # neuron dimensions as memory has them, slowest first; None: same
    inner: int  # neurons in a row without a gap
    x: Rows
    out: Rows
    like_x: bool  # outputs take the strides of x; else dense, T slowest, neurons in memory order
    plain: bool = False  # x is contiguous and so are outputs

    def neurons(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """``shape`` in the order of memory."""
        return shape if self.order is None else tuple(shape[d] for d in self.order)

    def view(self, value: Tensor) -> Tensor:
        """``value`` (broadcasts to the neurons' shape) with dimensions in the order of memory."""
        if self.order is None:
            return value
        missing = len(self.order) - value.dim()
        return value.reshape((1,) * missing + value.shape).permute(self.order)

    def restore(self, value: Tensor, leading: int = 0) -> Tensor:
        """The inverse of :meth:`view`, behind ``leading`` other dimensions."""
        if self.order is None:
            return value
        back = [0] * len(self.order)
        for place, d in enumerate(self.order):
            back[d] = place + leading
        return value.permute(*range(leading), *back)

    def rows(self, x: Tensor, steps: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A new ``[T, *shape]``, as :attr:`out` says."""
        if self.like_x:
            return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=x.device)
        return self.restore(x.new_empty((steps, *self.neurons(shape)), dtype=dtype), 1)


def of(x: Tensor, constant: bool) -> Layout | None:
    """The layout of ``x``: ``[T, *shape]``, or ``[*shape]`` if ``constant``.

    None if kernels cannot read it in place: the caller makes it contiguous.
    """
    if x.is_contiguous():
        # Not Size.numel(), which would fix a dynamic dimension.
        n = x.numel() if constant else math.prod(x.shape[1:])
        return (_cached_plain if type(n) is int else _plain)(n, constant)
    find = _find if torch.compiler.is_compiling() or _symbolic(x) else _cached
    sizes, strides = tuple(x.shape), x.stride()
    if constant:
        return find(None, 0, sizes, strides)
    return find(sizes[0], strides[0], sizes[1:], strides[1:])


def _plain(n: int, constant: bool) -> Layout:
    return Layout(None, n, Rows(0 if constant else n, n), Rows(n, n), False, True)


def _symbolic(x: Tensor) -> bool:
    return any(not isinstance(n, int) for n in (*x.shape, *x.stride()))


def _find(
    steps: int | None, step: int, sizes: tuple[int, ...], strides: tuple[int, ...]
) -> Layout | None:
    if any(n == 0 for n in sizes):
        return None
    wide = [d for d in range(len(sizes)) if sizes[d] > 1]
    if any(strides[d] == 0 for d in wide):
        return None
    order = tuple(range(len(sizes)))
    if any(strides[a] < strides[b] for a, b in itertools.pairwise(wide)):
        order = tuple(sorted(order, key=lambda d: -strides[d] if sizes[d] > 1 else 0))
    inner, outer, gap = 1, 0, False
    for d in reversed(order):
        if sizes[d] == 1:
            continue
        if not gap and strides[d] == inner:
            inner *= sizes[d]
        elif not gap:
            gap, outer, reach = True, strides[d], strides[d] * sizes[d]
        elif strides[d] == reach:
            reach *= sizes[d]
        else:
            return None
    N = math.prod(sizes)
    if gap and (inner == 1 or outer < inner):
        return None
    moved = None if order == tuple(range(len(sizes))) else order
    x = Rows(step, outer if gap else N)
    dense = Rows(N, inner)
    if steps is None or step == 0:
        return Layout(moved, inner, x, dense, False)
    like_x = (not gap and step == N) or (gap and step == inner and outer == steps * inner)
    return Layout(moved, inner, x, x if like_x else dense, like_x)


_cached = lru_cache(maxsize=512)(_find)
_cached_plain = lru_cache(maxsize=512)(_plain)


def written(layout: Layout, out: Tensor, N: int) -> Layout | None:
    """``layout`` with outputs where ``out`` ``[T, *shape]`` has its elements.

    None if kernels cannot walk both as one: the caller copies.
    """
    if out.data_ptr() % out.element_size():
        return None
    found = of(out, False)
    if found is None or found.order != layout.order:
        return None
    if layout.plain and found.plain:
        return layout
    x, rows, inner = layout.x, found.x, layout.inner
    if found.inner != inner:
        # Neurons without a gap are split wherever the other's are.
        if found.inner == N:
            rows = Rows(rows.step, inner)
        elif inner == N:
            x, inner = Rows(x.step, found.inner), found.inner
        else:
            return None
    return Layout(layout.order, inner, x, rows, True)


def located(x: Tensor, constant: bool) -> tuple[Tensor, Layout]:
    """``x``, copied if kernels cannot read it where it is, and its layout."""
    layout = of(x, constant)
    # A subclass (a fake tensor of an export) may have no memory.
    plain = type(x) in (Tensor, torch.nn.Parameter)
    if layout is None or (plain and x.data_ptr() % x.element_size()):
        x = x.clone(memory_format=torch.contiguous_format)
        layout = of(x, constant)
        assert layout is not None
    return x, layout
