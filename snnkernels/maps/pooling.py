"""Max-pooling of currents by their running sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import maps as run
from ..kernels import maps_reference as reference
from . import checks


def cumulative_max_pool(
    x_seq: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """Max-pool of currents whose mean over time is the maximum of the mean currents.

    With ``S_i(t)`` the running sum of current i in the state dtype, step t gives
    ``max_i S_i(t) - max_i S_i(t - 1)``, the maximum before the first step being 0. Padding takes no
    part; NaN propagates. No running sum is stored.

    Args:
        x_seq: ``[T, B, C, H, W]``, float32, float64, float16 or bfloat16.
        kernel_size, stride, padding, dilation, ceil_mode: as for ``torch.nn.MaxPool2d``.

    Returns:
        ``[T, B, C, OH, OW]`` of the dtype of ``x_seq``. Differentiable (through PyTorch).

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a value out of range or a shape that does not fit.
    """
    checks.tensor("x_seq", x_seq)
    if x_seq.dim() != 5:
        raise ValueError(f"x_seq has shape {tuple(x_seq.shape)}; it must be [T, B, C, H, W]")
    if 0 in x_seq.shape[3:]:
        raise ValueError(
            f"x_seq has shape {tuple(x_seq.shape)}; H and W must be at least 1: an empty map has "
            "no maximum"
        )
    geometry = pool_geometry(kernel_size, stride, padding, dilation)
    kernel, steps, around, apart = geometry
    for n, k, s, p, d in zip(x_seq.shape[3:], *geometry, strict=True):
        if run.pooled_size(n, k, s, p, d, ceil_mode) < 1:
            raise ValueError(
                f"kernel_size={kernel_size!r} with dilation={dilation!r} does not fit into x_seq "
                f"of shape {tuple(x_seq.shape)} with padding={padding!r}"
            )
    return pool_steps(x_seq, kernel, steps, around, apart, bool(ceil_mode), None, None, False)[0]


def pool_geometry(kernel_size: Any, stride: Any, padding: Any, dilation: Any) -> list[list[int]]:
    """Kernel, stride, padding and dilation as pairs; raises as :func:`cumulative_max_pool`."""
    kernel = _pair("kernel_size", kernel_size, 1)
    steps = kernel if stride is None else _pair("stride", stride, 1)
    around, apart = _pair("padding", padding, 0), _pair("dilation", dilation, 1)
    if any(2 * p > k for p, k in zip(around, kernel, strict=True)):
        raise ValueError(f"padding={padding!r} must be at most half of kernel_size={kernel_size!r}")
    return [kernel, steps, around, apart]


def pool_steps(
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    total: Tensor | None,
    peak: Tensor | None,
    state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`cumulative_max_pool` that goes on from ``total`` and ``peak`` (None: from 0).

    Returns:
        The output, and, if ``state``, running sums ``[B, C, H, W]`` (unspecified under no window)
        and maxima ``[B, C, OH, OW]`` in the state dtype.
    """
    if x.shape[0] and torch.is_grad_enabled():
        given = (x, total, peak)
        if any(t is not None and t.requires_grad for t in given):
            return reference.cumulative_max_pool(
                x, kernel, stride, padding, dilation, ceil_mode, total, peak
            )
    return run.cumulative_max_pool(
        x, kernel, stride, padding, dilation, ceil_mode, total, peak, state
    )


def _pair(name: str, value: Any, low: int) -> list[int]:
    pair = list(value) if isinstance(value, (tuple, list)) else [value, value]
    if len(pair) != 2:
        raise ValueError(f"{name}={value!r} must be an int or two of them")
    for one in pair:
        if not isinstance(one, (int, torch.SymInt)) or isinstance(one, bool):
            raise TypeError(f"{name}={value!r} must be an int or two of them")
        if one < low:
            raise ValueError(f"{name}={value!r} must be at least {low}")
    return pair
