"""What thresholds are chosen by: errors of candidates, histograms of activations."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import maps as run
from ..kernels import maps_reference as reference
from . import checks

# ---- mmse --------------------------------------------------------------------------------------


def mmse_errors(values: Tensor, candidates: Tensor, T: int, v_init_fraction: float = 0.0) -> Tensor:
    """Squared distance of activations to what T steps can represent, for every candidate threshold.

    Source: Li et al., ICML 2021 (SNN Calibration), with the initial potential in the staircase:
    the sum over a channel of ``(a - V/T clip(floor(a T / V + v_init_fraction), 0, T))^2``, each
    residual in the state dtype, squares and sums in float64 in a fixed order.

    Args:
        values: activations ``[C, n]``, float32, float64, float16 or bfloat16.
        candidates: thresholds ``[C, K]``, positive and finite; rounded to the state dtype.
        T: number of steps, at least 1.
        v_init_fraction: initial potential over threshold, finite; 1/2 for OPI.

    Returns:
        float64 ``[C, K]``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a value out of range or a shape that does not fit.
    """
    checks.tensor("values", values)
    checks.tensor("candidates", candidates)
    if values.dim() != 2:
        raise ValueError(f"values has shape {tuple(values.shape)}; it must be [C, n]")
    if candidates.dim() != 2 or len(candidates) != len(values):
        raise ValueError(
            f"candidates has shape {tuple(candidates.shape)}; it must be [{len(values)}, K] for "
            f"values of shape {tuple(values.shape)}"
        )
    if candidates.device != values.device:
        raise ValueError(f"candidates is on {candidates.device}, values on {values.device}")
    checks.whole("T", T, 1, 2**24)
    state = reference.state_dtype(values.dtype)
    fraction = checks.finite("v_init_fraction", v_init_fraction, state)
    checks.positive("candidates", candidates, state)
    return run.mmse_errors(values.detach(), candidates.detach(), T, fraction)


def mmse_threshold(
    values: Tensor, T: int, v_init_fraction: float = 0.0, candidates: int = 95
) -> tuple[Tensor, Tensor]:
    """The threshold ``max (1 - 0.01 i)``, i from 0, with the least :func:`mmse_errors`.

    Args:
        values, T, v_init_fraction: as there; values are finite.
        candidates: how many i are tried, at most 100.

    Returns:
        ``(threshold, mse)``, float64 ``[C]``: of equal candidates the largest; 0 for a channel
        without a positive value. The mean squared error is that of the threshold rounded to the
        state dtype.

    Raises:
        TypeError, ValueError: as :func:`mmse_errors`; no values, or values that are not finite.
    """
    checks.tensor("values", values)
    if values.dim() != 2 or values.shape[1] == 0:
        raise ValueError(
            f"values has shape {tuple(values.shape)}; it must be [C, n] with n at least 1"
        )
    checks.whole("candidates", candidates, 1, 100)
    largest = values.detach().amax(1).double().clamp(min=0)
    if checks.readable(values) and bool((bad := ~torch.isfinite(values)).any()):
        channel, i = bad.nonzero()[0].tolist()
        raise ValueError(f"values must be finite; channel {channel} has {values[channel, i]:g}")
    grid = 1 - 0.01 * torch.arange(candidates, dtype=torch.float64, device=values.device)
    tried = largest[:, None] * grid
    # A silent channel divides by a tiny threshold instead of 0.
    tiny = torch.finfo(reference.state_dtype(values.dtype)).tiny
    errors = mmse_errors(values, tried.clamp(min=tiny), T, v_init_fraction)
    # The first of equals: argmin does not say which it takes.
    best = (errors == errors.amin(1, keepdim=True)).to(torch.uint8).argmax(1, keepdim=True)
    return tried.gather(1, best)[:, 0], errors.gather(1, best)[:, 0] / values.shape[1]


# ---- histogram ---------------------------------------------------------------------------------


def histogram_update(counts: Tensor, sums: Tensor, values: Tensor, scale: Tensor) -> None:
    """Adds the positive values of each channel to a histogram, in place and in one pass.

    A value v counts in bin ``min(int(v scale), bins - 1)``; its product is float64. Counts are the
    same everywhere. Sums run over the values of a bin in their order on CPUs; on CUDA they are
    torch's ``bincount``. A CUDA scale is not checked: negative products count in the first bin, NaN
    in the last.

    Args:
        counts: int64 ``[C, bins]``, contiguous.
        sums: float64 ``[C, bins]``, contiguous: of the values.
        values: ``[C, n]``, float32, float64, float16 or bfloat16; the others are skipped.
        scale: float64 ``[C]``, bins per unit, positive; infinity counts all in the last bin.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a shape that does not fit, or a scale that is not positive.
    """
    checks.tensor("values", values)
    checks.tensor("counts", counts, (torch.int64,))
    checks.tensor("sums", sums, (torch.float64,))
    checks.tensor("scale", scale, (torch.float64,))
    if values.dim() != 2:
        raise ValueError(f"values has shape {tuple(values.shape)}; it must be [C, n]")
    for name, table in (("counts", counts), ("sums", sums)):
        if table.dim() != 2 or len(table) != len(values) or table.shape[1] < 1:
            raise ValueError(
                f"{name} has shape {tuple(table.shape)}; it must be [{len(values)}, bins]"
            )
        if not table.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    if sums.shape != counts.shape:
        raise ValueError(
            f"sums has shape {tuple(sums.shape)}; that of counts is {tuple(counts.shape)}"
        )
    if scale.shape != values.shape[:1]:
        raise ValueError(f"scale has shape {tuple(scale.shape)}; it must be ({len(values)},)")
    for name, tensor in (("counts", counts), ("sums", sums), ("scale", scale)):
        if tensor.device != values.device:
            raise ValueError(f"{name} is on {tensor.device}, values on {values.device}")
    if checks.readable(scale) and bool((bad := ~(scale > 0)).any()):
        i = int(bad.nonzero()[0])
        raise ValueError(
            f"scale must be positive; element {i} of {len(scale)} is {scale[i].item()}"
        )
    run.histogram_update(counts, sums, values.detach(), scale)
