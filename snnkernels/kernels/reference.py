"""The neuron in plain PyTorch: the truth every kernel is tested against, and the fallback.

Short and obvious before fast. Autograd through it gives the gradients (surrogates at the spikes).
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
    reset = torch.as_tensor(0.0 if v_reset is None else v_reset, dtype=state, device=x.device)
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
