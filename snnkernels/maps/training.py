"""Activations and gradients that spiking networks train with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Size, Tensor

from ..kernels import maps as run
from ..kernels import maps_reference as reference
from ..kernels import operands
from . import checks
from .checks import Number

_CONVENTIONS = ("clip_floor", "floor_clip")


# ---- qcfs --------------------------------------------------------------------------------------


def qcfs(
    x: Tensor,
    threshold: Tensor | Number,
    levels: int,
    phase: float = 0.5,
    gradient: str = "clip_floor",
    channel_dim: int | None = None,
) -> Tensor:
    """``threshold * clip(floor(x levels / threshold + phase) / levels, 0, 1)``, differentiable.

    Source: quantisation clip-floor-shift, Bu et al., ICLR 2022. Threshold and phase are rounded
    once to the dtype of ``x``, to which every operation rounds: where ``x levels`` overflows (in
    float16 from 65520 on) it is infinite and the result is the threshold, or 0 for negative x. The
    derivative of floor is 1, which leaves two conventions for the same values: the gradient passes
    to x where ``0 <= x / threshold <= 1`` (``"clip_floor"``: clipped, then quantised, the authors'
    newer code) or where ``0 <= floor(...) / levels <= 1`` (``"floor_clip"``, their older code; for
    phase 1/2 from ``-threshold / 2 levels`` up to ``threshold + threshold / 2 levels``). The
    gradient of the threshold is that of the expression: ``out / threshold - x / threshold`` where
    x's passes, ``out / threshold`` elsewhere. It is deterministic.

    Args:
        x: ``[*shape]``, float32, float64, float16 or bfloat16.
        threshold: as said in :mod:`snnkernels.maps`, but in the dtype of ``x``.
        levels: L, at least 1.
        phase: 0.5 in the paper; finite in the dtype of ``x``.
        gradient: ``"clip_floor"`` or ``"floor_clip"``.
        channel_dim: dimension of ``x`` along which a 1-D threshold is per channel.

    Returns:
        ``[*shape]`` of the dtype of ``x``. Keeps nothing for the backward pass but ``x``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a value out of range or a shape that does not fit.
    """
    checks.tensor("x", x)
    checks.whole("levels", levels, 1, 2**31 - 1)
    phase = checks.finite("phase", phase, x.dtype)
    if gradient not in _CONVENTIONS:
        allowed = " and ".join(map(repr, _CONVENTIONS))
        raise ValueError(f"gradient={gradient!r} is unknown; allowed are {allowed}")
    th, value = checks.shared("threshold", threshold, x.shape, channel_dim, x.device, x.dtype)
    return qcfs_unchecked(x, th, value, levels, phase, gradient == "clip_floor")


def qcfs_unchecked(
    x: Tensor, threshold: Tensor | None, value: float, levels: int, phase: float, clip_first: bool
) -> Tensor:
    """:func:`qcfs` of a threshold that training may have made anything; ``phase`` is rounded."""
    checks.tensor("x", x)
    grad = threshold is not None and threshold.requires_grad
    if torch.is_grad_enabled() and (x.requires_grad or grad):
        return _Qcfs.apply(x, threshold, value, levels, phase, clip_first)
    return run.qcfs(x, threshold, value, levels, phase)


class _Qcfs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        threshold: Tensor | None,
        value: float,
        levels: int,
        phase: float,
        clip_first: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, threshold)
        ctx.how = value, levels, phase, clip_first
        return run.qcfs(x, threshold, value, levels, phase)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, threshold = ctx.saved_tensors
        value, levels, phase, clip_first = ctx.how
        need_x, need_threshold = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # To be differentiated again: in PyTorch.
            full = x.new_full((), value) if threshold is None else threshold.to(x.dtype)
            grad_x, shares = reference.qcfs_backward(x, grad, full, levels, phase, clip_first)
            grad_threshold = shares.sum_to_size(full.shape) if need_threshold else None
        else:
            grad_x, grad_threshold = run.qcfs_backward(
                x, grad, threshold, value, levels, phase, clip_first, need_threshold
            )
        if grad_threshold is not None and threshold is not None:
            grad_threshold = grad_threshold.to(threshold.dtype)
        return (
            grad_x if need_x else None, grad_threshold if need_threshold else None,
            None, None, None, None,
        )  # fmt: skip


# ---- dsr ---------------------------------------------------------------------------------------


def dsr_backward(
    x_seq: Tensor,
    grad_out: Tensor,
    threshold: Tensor | Number,
    kind: str = "if",
    tau: float = 1.0,
    dt: float = 1.0,
    channel_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of spikes by differentiation on spike representation.

    Source: Meng et al., CVPR 2022. Spikes stand for their (weighted) mean, a clipped function of
    the mean current. IF: with ``G = sum_t g_t`` and ``m = mean_t x_t``, the gradient of every x_t
    is ``G / T`` where ``0 <= m <= threshold``, that of the threshold the sum of G where
    ``m > threshold``. LIF: means weigh step t by ``exp(-(T - t) dt / tau)``, t from 1;
    ``G = T mean_t g_t``; the gradient of x_t is ``G / (tau T)`` where
    ``0 < m < tau threshold / dt``, that of the threshold ``dt`` times the sum of G where m is
    above. Sums over time run in order, sums over neurons in a fixed order in float64.

    Args:
        x_seq: the current ``[T, *shape]``, float32, float64, float16 or bfloat16; T at least 1.
        grad_out: gradient of the spikes, ``[T, *shape]``.
        threshold: as said in :mod:`snnkernels.maps`.
        kind: ``"if"`` or ``"lif"``.
        tau, dt: positive, finite; read for ``"lif"`` only.
        channel_dim: dimension of ``shape`` along which a 1-D threshold is per channel.

    Returns:
        ``(grad_x, grad_threshold)``: ``[T, *shape]`` of the dtype of ``x_seq``, expanded over T
        (one step's memory), and the threshold's shape and dtype (0-d, dtype of ``x_seq``, for a
        number).

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a value out of range or a shape that does not fit.
    """
    checks.tensor("x_seq", x_seq)
    if x_seq.dim() == 0 or x_seq.shape[0] == 0:
        raise ValueError(
            f"x_seq has shape {tuple(x_seq.shape)}; it must be [T, *shape] with T at least 1"
        )
    _like("grad_out", grad_out, x_seq, x_seq.shape)
    if kind not in ("if", "lif"):
        raise ValueError(f"kind={kind!r} is unknown; allowed are 'if' and 'lif'")
    tau, dt = operands.number("tau", tau), operands.number("dt", dt)
    state, shape = reference.state_dtype(x_seq.dtype), x_seq.shape[1:]
    checks.positive("tau", tau, state)
    checks.positive("dt", dt, state)
    th, value = checks.shared("threshold", threshold, shape, channel_dim, x_seq.device, state)
    grad_x, grad_threshold = run.dsr_backward(x_seq, grad_out, th, value, kind == "lif", tau, dt)
    if isinstance(threshold, Tensor):
        grad_threshold = grad_threshold.reshape(threshold.shape)
    return grad_x.expand(x_seq.shape), grad_threshold


def _like(name: str, value: Any, x: Tensor, shape: Size) -> None:
    checks.tensor(name, value)
    if value.shape != shape or value.device != x.device:
        raise ValueError(
            f"{name} is {tuple(value.shape)} on {value.device}; expected {tuple(shape)} on "
            f"{x.device}"
        )
