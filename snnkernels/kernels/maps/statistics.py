"""Running MMSE errors and histograms."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import maps_reference as reference
from .. import operands
from ..maps_reference import state_dtype
from ..params import DTYPE_CODES
from .launching import dense, kernels_for, launch, operator, pointer
from .sums import of_segments, segments

# ---- mmse --------------------------------------------------------------------------------------


@operator(
    "mmse_errors(Tensor values, Tensor candidates, int T, float fraction) -> Tensor",
    lambda values, candidates, *rest: candidates.new_empty(candidates.shape, dtype=torch.float64),
)
def mmse_errors(values: Tensor, candidates: Tensor, T: int, fraction: float) -> Tensor:
    """:func:`snnkernels.maps.mmse_errors`."""
    kernels = kernels_for(values.device)
    values = dense(values)
    candidates = dense(candidates.to(state_dtype(values.dtype)))
    (C, n), K = values.shape, candidates.shape[1]
    length, count = segments(C * K, n)
    if not C * K or not n:
        return candidates.new_zeros((C, K), dtype=torch.float64)
    if kernels is None:
        fraction = operands.rounded(fraction, candidates.dtype)
        partial = reference.mmse_errors(values, candidates, T, fraction, length)
    else:
        partial = values.new_empty((C, K, count), dtype=torch.float64)
        launch(
            kernels, "mmse_errors", values.device, values=values.data_ptr(),
            candidates=candidates.data_ptr(), out=partial.data_ptr(), N=partial.numel(),
            channels=C, each=n, K=K, length=length, segments=count, T=float(T), fraction=fraction,
            dtype=DTYPE_CODES[values.dtype],
        )  # fmt: skip
    return of_segments(partial.flatten(0, 1)).view(C, K)


# ---- histogram ---------------------------------------------------------------------------------


@operator(
    "histogram_update(Tensor(a!) counts, Tensor(b!) sums, Tensor values, Tensor scale) -> ()",
    lambda *arguments: None,
)
def histogram_update(counts: Tensor, sums: Tensor, values: Tensor, scale: Tensor) -> None:
    """:func:`snnkernels.maps.histogram_update`."""
    kernels = kernels_for(values.device)
    if not values.numel():
        return
    if kernels is None:
        reference.histogram_update(counts, sums, values, scale)
        return
    values, scale, bins = dense(values), dense(scale), counts.shape[1]
    # On GPUs the kernel counts, by integer atomics; sums would need atomics on floats, whose
    # order shows, and a table for every thread is larger than the data: they stay with torch.
    scratch = None if kernels.gpu else torch.zeros_like(sums)
    launch(
        kernels, "histogram_update", values.device, values=values.data_ptr(),
        counts=counts.data_ptr(), sums=sums.data_ptr(), scale=scale.data_ptr(),
        scratch=pointer(scratch), N=values.numel(), channels=len(values), each=values.shape[1],
        bins=bins, dtype=DTYPE_CODES[values.dtype],
    )  # fmt: skip
    if kernels.gpu:
        index, positive = reference.bins_of(values, scale, bins)
        sums += torch.bincount(index, positive, minlength=sums.numel()).view_as(sums)
