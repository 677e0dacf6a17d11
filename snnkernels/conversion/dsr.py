"""Spikes that are trained through what they represent (DSR, Meng et al., CVPR 2022)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import dsr_backward, if_run
from .activations import ClipReLU

__all__ = ["DSRNode", "dsr_spikes", "representation", "spiking_output"]

_KINDS = ("if", "lif")


def check_dsr(kind: Any, alpha: Any, tau: Any, dt: Any) -> None:
    """Raise ValueError or TypeError that names the argument unless all are allowed."""
    if kind not in _KINDS:
        raise ValueError(f"kind={kind!r} is unknown; allowed are 'if' and 'lif'")
    for name, value in (("alpha", alpha), ("tau", tau), ("dt", dt)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}={value!r} must be a number")
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value!r} must be positive and finite")
    if alpha > 1:
        raise ValueError(f"alpha={alpha!r} must be at most 1: neurons fire at alpha * threshold")


def step_weights(T: int, kind: str, tau: float, dt: float, like: Tensor) -> Tensor:
    """What each of T steps counts in a mean over time: ``[T]``, the last 1 (IF: all)."""
    steps = torch.arange(T - 1, -1, -1, dtype=torch.float64, device=like.device)
    weights = torch.ones_like(steps) if kind == "if" else torch.exp(-dt / tau * steps)
    return weights.to(like.dtype)


def representation(spikes: Tensor, kind: str = "if", tau: float = 1.0, dt: float = 0.05) -> Tensor:
    """What spikes stand for: their mean over time, for LIF weighted by ``exp(-(T - t) dt / tau)``.

    Args:
        spikes: ``[T, *shape]``, floating point, T at least 1.
        kind, tau, dt: as for :class:`DSRNode`.

    Returns:
        ``[*shape]`` of the dtype of ``spikes``; differentiable.

    Raises:
        ValueError, TypeError: an argument is not allowed, or there are no steps.
    """
    check_dsr(kind, 1.0, tau, dt)
    if spikes.dim() == 0 or len(spikes) == 0:
        raise ValueError(f"spikes has shape {tuple(spikes.shape)}; it must be [T, *shape], T >= 1")
    if kind == "if":
        return spikes.mean(0)
    weights = step_weights(len(spikes), kind, tau, dt, spikes)
    return torch.tensordot(weights / weights.sum(), spikes, dims=1)


class _Spikes(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_seq: Tensor,
        threshold: Tensor,
        kind: str,
        alpha: float,
        tau: float,
        dt: float,
        channel_dim: int | None,
    ) -> Tensor:
        # Nothing of the T membranes is kept.
        ctx.save_for_backward(x_seq, threshold)
        ctx.how = kind, tau, dt, channel_dim
        return _forward(x_seq, threshold, kind, alpha, tau, dt, channel_dim)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_seq, threshold = ctx.saved_tensors
        grad_x, grad_threshold = dsr_backward(x_seq, grad, threshold, *ctx.how)
        need_x, need_threshold = ctx.needs_input_grad[:2]
        return (
            grad_x if need_x else None, grad_threshold if need_threshold else None,
            None, None, None, None, None,
        )  # fmt: skip


def _forward(
    x_seq: Tensor,
    threshold: Tensor,
    kind: str,
    alpha: float,
    tau: float,
    dt: float,
    channel_dim: int | None,
) -> Tensor:
    leak: dict[str, Any] = {}
    amplitude = threshold
    if kind == "lif":
        leak = {"beta": math.exp(-dt / tau), "input_scale": -math.expm1(-dt / tau)}
        amplitude = threshold / dt
    run = if_run(
        x_seq,
        v_threshold=threshold,
        fire_level=alpha * threshold,
        amplitude=amplitude,
        channel_dim=channel_dim,
        **leak,
    )
    assert run.spikes is not None
    return run.spikes


def dsr_spikes(
    x_seq: Tensor,
    threshold: Tensor,
    kind: str = "if",
    alpha: float = 0.5,
    tau: float = 1.0,
    dt: float = 0.05,
    channel_dim: int | None = None,
) -> Tensor:
    """Spikes of ``x_seq`` with the gradients of their representation; nothing goes through time.

    Source: Meng et al., CVPR 2022 (DSR). IF: ``v += x; s = v >= alpha θ; v -= θ s``, output
    ``θ s``, from v = 0. LIF, with ``β = exp(-dt / tau)``: ``v = β v + (1 - β) x``, the rest the
    same, output ``θ s / dt``. Gradients are those of the representation, ``clip(mean x, 0, θ)`` or
    ``clip(weighted mean x / tau, 0, θ / dt)``: :func:`snnkernels.functional.dsr_backward`; for them
    only ``x_seq`` is kept.

    Args:
        x_seq: current ``[T, *shape]``, floating point, T at least 1.
        threshold: θ, positive: a scalar, or ``[C]`` with ``channel_dim`` (in ``shape``).
        kind: ``"if"`` or ``"lif"``.
        alpha: the level that fires, as a part of θ, in (0, 1].
        tau, dt: time constant and step of LIF.
        channel_dim: dimension of ``shape`` along which θ is per channel.

    Returns:
        ``[T, *shape]`` of the dtype of ``x_seq``.

    Raises:
        ValueError, TypeError: an argument is not allowed.
    """
    check_dsr(kind, alpha, tau, dt)
    learning = torch.is_grad_enabled() and (x_seq.requires_grad or threshold.requires_grad)
    run = _Spikes.apply if learning else _forward
    return run(x_seq, threshold, kind, alpha, tau, dt, channel_dim)


class DSRNode(nn.Module):
    """IF or LIF neurons with a trainable threshold, trained by DSR (:func:`dsr_spikes`).

    Source: Meng et al., CVPR 2022. In the paper's networks there is one behind every normalisation,
    behind pooling, and behind the last linear layer as well, so that answers are rates, not
    negative; :meth:`read` is the read-out. Their IF networks have a threshold of 6, alpha 0.5 and
    a floor of 0.01; LIF 0.3, alpha 0.3, tau 1, dt 0.05 and a floor of 5e-4; T = 20. Batch norms
    between layers see ``[T * B, *]``. With several GPUs the authors sum the gradient of the
    threshold over them; DistributedDataParallel averages it.

    Args:
        v_threshold: start of the threshold, one for the layer; a parameter.
        kind, alpha, tau, dt: as for :func:`dsr_spikes`.
        floor: the threshold in force is at least this (it gets no gradient below).

    Shape: ``[T, *shape]`` to ``[T, *shape]``, T at least 1.

    Raises:
        ValueError, TypeError: an argument is not allowed.
    """

    def __init__(
        self,
        v_threshold: float = 6.0,
        kind: str = "if",
        alpha: float = 0.5,
        tau: float = 1.0,
        dt: float = 0.05,
        floor: float = 0.01,
    ) -> None:
        super().__init__()
        check_dsr(kind, alpha, tau, dt)
        for name, value in (("v_threshold", v_threshold), ("floor", floor)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name}={value!r} must be positive and finite")
        self.kind, self.alpha, self.tau, self.dt = kind, float(alpha), float(tau), float(dt)
        self.floor = float(floor)
        self.v_threshold = nn.Parameter(torch.tensor(float(v_threshold)))

    @property
    def threshold(self) -> Tensor:
        """The threshold in force."""
        return self.v_threshold.clamp(min=self.floor)

    def forward(self, x_seq: Tensor) -> Tensor:
        """Spikes ``[T, *shape]`` of currents ``[T, *shape]``."""
        return dsr_spikes(x_seq, self.threshold, self.kind, self.alpha, self.tau, self.dt)

    def read(self, spikes: Tensor) -> Tensor:
        """What spikes ``[T, *shape]`` stand for: :func:`representation`."""
        return representation(spikes, self.kind, self.tau, self.dt)

    def extra_repr(self) -> str:
        """Show what the neurons are."""
        leak = f", tau={self.tau:g}, dt={self.dt:g}" if self.kind == "lif" else ""
        v = self.v_threshold.item()
        return f"{self.kind}, v_threshold={v:.4g}, alpha={self.alpha:g}{leak}, floor={self.floor:g}"


def spiking_output(ann: nn.Module, ceiling: float) -> nn.Module:
    """``ann`` with neurons behind its output as well, once converted: rates from 0 to ``ceiling``.

    In networks of DSR, and of Deng and Gu (ICLR 2021), the last layer spikes too. Negative logits
    all become 0, so of classes below it none is told from another.

    Args:
        ann: answers with one tensor.
        ceiling: start of the threshold of the output neurons, positive.

    Raises:
        ValueError: ``ceiling`` is not positive and finite.
    """
    output = ClipReLU(ceiling)
    like = next((p for p in ann.parameters() if p.is_floating_point()), None)
    if like is not None:
        output.to(like.device)
    return nn.Sequential(ann, output).train(ann.training)
