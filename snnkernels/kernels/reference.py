"""The neuron in plain PyTorch: the truth every kernel is tested against, and the fallback.

Short and obvious before fast. Autograd through :func:`if_forward` gives the gradients (surrogates
at the spikes), twice if asked; :func:`if_backward` is the same by hand, for where autograd cannot
run: inside an operator.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import surrogate as _surrogate


class Result(NamedTuple):
    """What a run of the neuron leaves behind; traces are ``[T, *shape]``, the rest ``[*shape]``."""

    spikes: Tensor
    count: Tensor  # type: ignore[assignment]
    v: Tensor
    v_seq: Tensor
    charge_seq: Tensor


class _Choose(torch.autograd.Function):
    """``s a + (1 - s) b`` for s in {0, 1}, selected: no rounding, no inf * 0."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(s, a, b)
        return torch.where(s != 0, a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s, a, b = ctx.saved_tensors
        grad_s = (grad * (a - b)).expand_as(grad)
        grad_a = (grad * s).sum_to_size(a.shape)
        return grad_s, grad_a, (grad * (1 - s)).sum_to_size(b.shape)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of membranes and thresholds for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def if_forward(
    x: Tensor,
    v: Tensor,
    threshold: Tensor,
    amplitude: Tensor,
    *,
    T: int | None = None,
    input_scale: Tensor | None = None,
    v_reset: float | None = None,
    strict: bool = False,
    spike_dtype: torch.dtype | None = None,
    surrogate: _surrogate.Surrogate = _surrogate.DEFAULT,
    detach_reset: bool = False,
    smooth: bool = False,
) -> Result:
    """Runs integrate-and-fire neurons over all time steps.

    Args:
        x: input current ``[T, *shape]``, or ``[*shape]`` held constant for ``T`` steps.
        v, threshold, amplitude, input_scale: broadcast to ``shape``; rounded to the state dtype.
        strict: fire at ``m > threshold`` instead of ``m >= threshold``.
        smooth: spikes become the surrogate's primitive (for gradcheck).

    Returns:
        Spikes and counts, the final membrane, and the membranes after and before each reset.
    """
    shape = x.shape if T is not None else x.shape[1:]
    steps = T if T is not None else x.shape[0]
    spike_dtype = spike_dtype or x.dtype
    state = state_dtype(x.dtype)
    current = x.to(state)
    if input_scale is not None:
        current = current * input_scale.to(state)
    v = v.to(state).expand(shape)
    threshold = threshold.to(state)
    # Rounded once to the type of the spikes; integer spikes are plain 0 and 1.
    weight = amplitude if spike_dtype.is_floating_point else torch.ones_like(amplitude)
    weight = weight.to(spike_dtype).to(state)
    reset = x.new_full((), 0.0 if v_reset is None else v_reset, dtype=state)
    zero = torch.zeros((), dtype=state, device=x.device)

    count = torch.zeros(shape, dtype=torch.int32, device=x.device)
    spikes, v_seq, charge_seq = [], [], []
    for t in range(steps):
        m = v + (current if T is not None else current[t])
        u = m - threshold
        if smooth:
            s = surrogate.primitive(u)
            out = weight * s
        else:
            s = _surrogate.spike(u, m > threshold if strict else m >= threshold, surrogate)
            out = _Choose.apply(s, weight, zero)
        kept = s.detach() if detach_reset else s
        if smooth:
            v = m - threshold * kept if v_reset is None else m * (1 - kept) + reset * kept
        elif v_reset is None:
            v = m - _Choose.apply(kept, threshold, zero)
        else:
            v = _Choose.apply(kept, reset, m)
        count = count + (s.detach() != 0)
        spikes.append(out)
        v_seq.append(v)
        charge_seq.append(m)

    def stacked(rows: list[Tensor]) -> Tensor:
        return torch.stack(rows) if rows else x.new_empty((0, *shape), dtype=state)

    return Result(
        stacked(spikes).to(spike_dtype),
        count.to(torch.int32),
        v,
        stacked(v_seq),
        stacked(charge_seq),
    )


def if_backward(
    x: Tensor,
    v: Tensor,
    threshold: Tensor,
    amplitude: Tensor,
    *,
    grad_spikes: Tensor | None = None,
    grad_v: Tensor | None = None,
    grad_v_seq: Tensor | None = None,
    grad_charge_seq: Tensor | None = None,
    T: int | None = None,
    input_scale: Tensor | None = None,
    v_reset: float | None = None,
    strict: bool = False,
    spike_dtype: torch.dtype | None = None,
    surrogate: _surrogate.Surrogate = _surrogate.DEFAULT,
    detach_reset: bool = False,
    smooth: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The adjoint of :func:`if_forward`, step by step from the last.

    Arguments as there; each ``grad_*`` has the shape of its output (spikes' and traces' with T).

    Returns:
        Gradients for x (its shape) and, each ``[*shape]``, for v, threshold, amplitude and
        input_scale before summing over neurons that share them; all in the state dtype.
    """
    run = if_forward(
        x, v, threshold, amplitude, T=T, input_scale=input_scale, v_reset=v_reset, strict=strict,
        spike_dtype=spike_dtype, surrogate=surrogate, smooth=smooth,
    )  # fmt: skip
    state = state_dtype(x.dtype)
    threshold = threshold.to(state)
    weight = amplitude if (spike_dtype or x.dtype).is_floating_point else torch.ones_like(amplitude)
    weight = weight.to(spike_dtype or x.dtype).to(state)
    scale = None if input_scale is None else input_scale.to(state)

    carry = torch.zeros_like(run.v) if grad_v is None else grad_v.to(state).clone()
    grad_threshold, grad_amplitude = torch.zeros_like(run.v), torch.zeros_like(run.v)
    grad_scale, grad_x = torch.zeros_like(run.v), []
    for t in reversed(range(run.charge_seq.shape[0])):
        m = run.charge_seq[t]
        u = m - threshold
        s = surrogate.primitive(u) if smooth else (m > threshold if strict else m >= threshold)
        s = s.to(state)
        grad_out = torch.zeros_like(m) if grad_spikes is None else grad_spikes[t].to(state)
        if grad_v_seq is not None:
            carry = carry + grad_v_seq[t]
        through_reset = -carry * threshold if v_reset is None else carry * (v_reset - m)
        if detach_reset:
            through_reset = torch.zeros_like(carry)
        grad_u = (weight * grad_out + through_reset) * surrogate.derivative(u)
        grad_amplitude = grad_amplitude + s * grad_out
        grad_threshold = grad_threshold - grad_u - (carry * s if v_reset is None else 0)
        carry = grad_u + (carry if v_reset is None else carry * (1 - s))
        if grad_charge_seq is not None:
            carry = carry + grad_charge_seq[t]
        if scale is not None:
            grad_scale = grad_scale + carry * (x if T is not None else x[t]).to(state)
        grad_x.append(carry if scale is None else carry * scale)
    grads = torch.stack(grad_x[::-1]) if grad_x else x.new_zeros((0, *run.v.shape), dtype=state)
    return (
        grads if T is None else grads.sum(0),
        carry,
        grad_threshold,
        grad_amplitude,
        grad_scale,
    )
