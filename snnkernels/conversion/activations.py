"""Trainable activations whose learned ceiling becomes the firing threshold."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..maps import qcfs_unchecked

__all__ = ["QCFS", "ClipReLU"]


def _check_positive(name: str, value: float) -> float:
    value = float(value)
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return value


class ClipReLU(nn.Module):
    """``clip(x, 0, lam)`` with a trainable ceiling, the activation OPI networks train with.

    Source: Bu et al., AAAI 2022 (OPI), section on training; the trainable clipping layer itself is
    Ho and Chang, DAC 2021 (TCL). The gradient of ``lam`` is the sum of the upstream gradients
    where ``x > lam``; the gradient of ``x`` passes where ``0 < x <= lam``.

    Args:
        ceiling: start value of ``lam``, positive.

    Shape: any floating-point tensor to the same shape and dtype. ``lam`` is a scalar parameter.

    Raises:
        ValueError: ``ceiling`` is not positive and finite.
    """

    def __init__(self, ceiling: float = 4.0) -> None:
        super().__init__()
        self.lam = nn.Parameter(torch.tensor(_check_positive("ceiling", ceiling)))

    def forward(self, x: Tensor) -> Tensor:
        """Clip ``x`` (any shape) to ``[0, lam]``; NaN stays NaN."""
        # A selection, not arithmetic: values below the ceiling pass bit for bit.
        return torch.where(x > self.lam, self.lam.to(x.dtype), torch.relu(x))

    def extra_repr(self) -> str:
        """Show the current ceiling."""
        return f"lam={self.lam.item():.4g}"


class QCFS(nn.Module):
    """``lam * clip(floor(x L / lam + 1/2) / L, 0, 1)``: quantisation clip-floor-shift.

    Source: Bu et al., ICLR 2022 (arXiv 2303.04347), equation of the QCFS activation. The spiking
    layer with threshold ``lam``, membrane started at ``lam / 2`` and ``T = L`` steps computes the
    same values for a current that is constant in time.

    Gradients are those of the formula as written (floor, then clip) with d floor = 1: ``x``
    receives the upstream gradient where ``0 <= floor(x L / lam + 1/2) <= L``, that is on
    ``[-lam / 2L, lam + lam / 2L)``; ``lam`` receives ``(a - x) / lam`` there, and 1 above (0
    below). The authors published code with this order and code with clip before floor; the
    forward values are the same.

    Args:
        levels: L, the number of steps of the staircase, at least 1.
        ceiling: start value of ``lam``, positive.

    Shape: any floating-point tensor to the same shape and dtype. ``lam`` is a scalar parameter.

    Raises:
        ValueError: ``levels`` < 1, or ``ceiling`` is not positive and finite.
    """

    def __init__(self, levels: int = 8, ceiling: float = 8.0) -> None:
        super().__init__()
        if int(levels) != levels or levels < 1:
            raise ValueError(f"levels must be a whole number of at least 1, got {levels}")
        self.levels = int(levels)
        self.lam = nn.Parameter(torch.tensor(_check_positive("ceiling", ceiling)))

    def forward(self, x: Tensor) -> Tensor:
        """Quantise ``x`` (any shape) to multiples of ``lam / L`` in ``[0, lam]``."""
        return qcfs_unchecked(x, self.lam, 0.0, self.levels, 0.5, clip_first=False)

    def extra_repr(self) -> str:
        """Show the number of levels and the current ceiling."""
        return f"levels={self.levels}, lam={self.lam.item():.4g}"
