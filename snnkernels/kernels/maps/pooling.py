"""Running the cumulative max-pool."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import maps_reference as reference
from ..maps_reference import state_dtype
from ..params import DTYPE_CODES
from .launching import dense, kernels_for, launch, operator, pointer

TAPS = 64  # kPoolTaps


def pooled_size(n: int, k: int, s: int, p: int, d: int, ceil_mode: bool) -> int:
    """The number of windows along a dimension, as torch counts them."""
    size = (n + 2 * p - d * (k - 1) - 1 + (s - 1 if ceil_mode else 0)) // s + 1
    return size - 1 if ceil_mode and (size - 1) * s >= n + p else size


def _pool_fake(x, kernel, stride, padding, dilation, ceil_mode, total, peak, state):  # type: ignore
    geometry = zip(x.shape[3:], kernel, stride, padding, dilation, strict=True)
    size = [pooled_size(*g, ceil_mode) for g in geometry]
    wide, full = state_dtype(x.dtype), (*x.shape[1:3], *size)
    return (
        x.new_empty((x.shape[0], *full)),
        x.new_empty(x.shape[1:] if state else (0,), dtype=wide),
        x.new_empty(full if state else (0,), dtype=wide),
    )


@operator(
    "cumulative_max_pool(Tensor x, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, "
    "bool ceil_mode, Tensor? total, Tensor? peak, bool state) "
    "-> (Tensor out, Tensor total, Tensor peak)",
    _pool_fake,
)
def cumulative_max_pool(
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
    """Output and, if ``state`` (else empty), running sums and maxima after the last step.

    Sums of currents under no window are unspecified. ``total`` and ``peak``: those before.
    """
    kernels = kernels_for(x.device)
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = kernel, stride, padding, dilation
    wide, T = state_dtype(x.dtype), x.shape[0]
    H, W = x.shape[3:]
    OH = pooled_size(H, kh, sh, ph, dh, ceil_mode)
    OW = pooled_size(W, kw, sw, pw, dw, ceil_mode)
    shape = (*x.shape[1:3], OH, OW)
    # Two: outputs of an operator must not share memory.
    nothing, nothing_too = x.new_empty(0, dtype=wide), x.new_empty(0, dtype=wide)
    if T == 0 or not math.prod(shape):
        before = [x.new_zeros(s, dtype=wide) for s in (x.shape[1:], shape)]
        before = [
            b if t is None else t.to(wide, copy=True)
            for b, t in zip(before, (total, peak), strict=True)
        ]
        return x.new_empty((T, *shape)), *(before if state else (nothing, nothing_too))
    size = 2 if max(kh, kw) <= 2 else 3 if max(kh, kw) <= 3 else 0
    if kernels is None or (kernels.gpu and size == 0 and kh * kw > TAPS):
        if total is not None:
            total = total.to(wide)
        out, total, peak = reference.cumulative_max_pool(
            x, kernel, stride, padding, dilation, ceil_mode, total,
            None if peak is None else peak.to(wide),
        )  # fmt: skip
        if not state:
            return out.contiguous(), nothing, nothing_too
        # Copies: of one step the sum is the input itself.
        own = [t.clone(memory_format=torch.contiguous_format) for t in (total, peak)]
        return out.contiguous(), own[0], own[1]
    x = dense(x)
    total_in = None if total is None else dense(total.to(wide))
    peak_in = None if peak is None else dense(peak.to(wide))
    out = x.new_empty((T, *shape))
    kept = state or not kernels.gpu  # on CPUs the sums live in their output
    total_out = x.new_empty(x.shape[1:], dtype=wide) if kept else None
    peak_out = x.new_empty(shape, dtype=wide) if kept else None
    gh, gw = math.gcd(sh, dh), math.gcd(sw, dw)
    launch(
        kernels, "cumulative_max_pool", x.device, x=x.data_ptr(), out=out.data_ptr(),
        total_in=pointer(total_in), total=pointer(total_out), peak_in=pointer(peak_in),
        peak=pointer(peak_out), N=math.prod(shape), T=T, planes=math.prod(shape[:2]), H=H, W=W,
        OH=OH, OW=OW, kh=kh, kw=kw, sh=sh, sw=sw, ph=ph, pw=pw, dh=dh, dw=dw, owner_mh=dh // gh,
        owner_jh=sh // gh, owner_mw=dw // gw, owner_jw=sw // gw, dtype=DTYPE_CODES[x.dtype],
        size=size,
    )  # fmt: skip
    if not state or total_out is None or peak_out is None:
        return out, nothing, nothing_too
    return out, total_out, peak_out
