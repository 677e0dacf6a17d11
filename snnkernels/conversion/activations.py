"""Activations that ANNs are trained with so that spiking neurons can take their place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..maps import qcfs_unchecked

__all__ = ["QCFS", "ClipReLU", "ThresholdReLU", "clamped"]

_GRADIENTS = ("floor_clip", "clip_floor")


def _check_positive(name: str, value: float) -> float:
    value = float(value)
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return value


def _check_steps(name: str, value: int) -> int:
    if int(value) != value or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value}")
    return int(value)


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

    The derivative of floor is taken as 1, and the authors published code in both orders, with the
    same values and two gradients:

    * ``"floor_clip"`` (their older code, and the default here): ``x`` receives the upstream
      gradient where ``0 <= floor(x L / lam + 1/2) <= L``, that is on
      ``[-lam / 2L, lam + lam / 2L)``;
    * ``"clip_floor"`` (their newer code): where ``0 <= x <= lam``.

    ``lam`` receives ``(a - x) / lam`` where the gradient of x passes, and ``a / lam`` (1 above, 0
    below) elsewhere.

    Args:
        levels: L, the number of steps of the staircase, at least 1.
        ceiling: start value of ``lam``, positive.
        gradient: ``"floor_clip"`` or ``"clip_floor"``.

    Shape: any floating-point tensor to the same shape and dtype. ``lam`` is a scalar parameter.

    Raises:
        ValueError: ``levels`` < 1, ``ceiling`` is not positive and finite, or ``gradient`` is
            neither of the two.
    """

    def __init__(self, levels: int = 8, ceiling: float = 8.0, gradient: str = "floor_clip") -> None:
        super().__init__()
        self.levels = _check_steps("levels", levels)
        if gradient not in _GRADIENTS:
            allowed = " and ".join(map(repr, _GRADIENTS))
            raise ValueError(f"gradient={gradient!r} is unknown; allowed are {allowed}")
        self.gradient = gradient
        self.lam = nn.Parameter(torch.tensor(_check_positive("ceiling", ceiling)))

    def forward(self, x: Tensor) -> Tensor:
        """Quantise ``x`` (any shape) to multiples of ``lam / L`` in ``[0, lam]``."""
        clip_first = self.gradient == "clip_floor"
        return qcfs_unchecked(x, self.lam, 0.0, self.levels, 0.5, clip_first=clip_first)

    def extra_repr(self) -> str:
        """Show the number of levels, the current ceiling and the gradient."""
        return f"levels={self.levels}, lam={self.lam.item():.4g}, gradient={self.gradient!r}"


def clamped(x: Tensor, high: float) -> Tensor:
    """``x`` clipped to ``[0, high]``, with a gradient of 1 on the closed interval.

    ``torch.clamp`` has that gradient up to torch 2.14; in 2.15 it is 0 at both ends.
    """
    return torch.where((x < 0) | (x > high), x.detach().clamp(0, high), x)


class ThresholdReLU(nn.Module):
    """``clip(x, 0, V)`` with a ceiling V that is fixed: threshold ReLU.

    Source: Deng and Gu, ICLR 2021 (arXiv 2103.00476). The gradient of ``x`` is 1 on the closed
    interval ``[0, V]`` and 0 outside. The thresholds of the spiking network are not V but the
    largest activations over the training data (``method="threshold_relu"``); V only keeps those
    from being outliers. What V the paper trained with is not in the sources we could read.

    With ``shift_steps`` the current is lowered first, ``clip(x - V / (2 shift_steps), 0, V)``: an
    option of the authors' training, off by default there too. It makes up for the floor of a
    membrane that starts at 0 without a bias at every step. The shift belongs to the function, so
    conversion keeps it as an operation of its own before the neurons.

    Args:
        ceiling: V, positive.
        shift_steps: the number of steps T_ref that the shift is made for, at least 1; None: no
            shift.

    Shape: any floating-point tensor to the same shape and dtype. There are no parameters.

    Raises:
        ValueError: ``ceiling`` is not positive and finite, or ``shift_steps`` < 1.
    """

    def __init__(self, ceiling: float = 2.0, shift_steps: int | None = None) -> None:
        super().__init__()
        self.ceiling = _check_positive("ceiling", ceiling)
        self.shift_steps = None if shift_steps is None else _check_steps("shift_steps", shift_steps)

    @property
    def shift(self) -> float:
        """What is taken from the current: ``V / (2 shift_steps)``, or 0."""
        return 0.0 if self.shift_steps is None else self.ceiling / (2 * self.shift_steps)

    def forward(self, x: Tensor) -> Tensor:
        """Shift and clip ``x`` (any shape) to ``[0, V]``; NaN stays NaN."""
        if self.shift_steps is not None:
            x = x - self.shift
        return clamped(x, self.ceiling)

    def extra_repr(self) -> str:
        """Show ceiling and shift."""
        shift = "" if self.shift_steps is None else f", shift_steps={self.shift_steps}"
        return f"ceiling={self.ceiling:g}{shift}"
