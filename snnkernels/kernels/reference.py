"""The neuron in plain PyTorch: the truth every kernel is tested against, and the fallback.

Short and obvious before fast. Autograd through :func:`if_forward` gives the gradients (surrogates
at the spikes), twice if asked; :func:`if_backward` is the same by hand, for where autograd cannot
run: inside an operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import surrogate as _surrogate
from ..options import Probe, Signed

WORD_STEPS = 32


class Result(NamedTuple):
    """What a run of the neuron leaves behind; traces are ``[T, *shape]``, the rest ``[*shape]``."""

    spikes: Tensor
    count: Tensor  # type: ignore[assignment]
    v: Tensor
    v_seq: Tensor
    charge_seq: Tensor
    counts: Tensor  # [len(count_at), *shape]


class _Weigh(torch.autograd.Function):
    """``k a``, selected where k is 0; with a gradient for k there as well."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, a: Tensor) -> Tensor:
        ctx.save_for_backward(k, a)
        return torch.where(k != 0, k * a, torch.zeros_like(a))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        k, a = ctx.saved_tensors
        return (grad * a).expand_as(grad), (grad * k).sum_to_size(a.shape)


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


def word_dtype(T: int) -> torch.dtype:
    """The narrowest integer that holds T packed steps; int32 words of 32 steps beyond."""
    return torch.uint8 if T <= 8 else torch.int16 if T <= 16 else torch.int32


def pack(bits: Tensor) -> Tensor:
    """Packs bool ``[T, *shape]`` along time into words ``[ceil(T / 32), *shape]``."""
    T = bits.shape[0]
    words = []
    for t0 in range(0, T, WORD_STEPS):
        word = torch.zeros(bits.shape[1:], dtype=torch.int32, device=bits.device)
        for k, row in enumerate(bits[t0 : t0 + WORD_STEPS]):
            word |= row.to(torch.int32) << k
        words.append(word.to(word_dtype(T)))
    return torch.stack(words) if words else bits.new_empty(bits.shape, dtype=word_dtype(T))


def unpack(words: Tensor, T: int) -> Tensor:
    """The inverse of :func:`pack`: bool ``[T, *shape]``."""
    rows = [(words[t // WORD_STEPS].int() >> t % WORD_STEPS) & 1 for t in range(T)]
    return torch.stack(rows).bool() if rows else words.new_empty(words.shape, dtype=torch.bool)


class _Stepper:
    """One step of the neuron, with every option; tensors in the state dtype."""

    def __init__(
        self,
        threshold: Tensor,
        beta: Tensor | None,
        fire_level: Tensor | None,
        v_reset: Tensor | None,
        strict: bool,
        surrogate: _surrogate.Surrogate,
        detach_reset: bool,
        smooth: bool,
        max_spikes: int | None,
        signed: Signed | None,
        reset_delay: bool,
        v_min: Tensor | None,
    ) -> None:
        self.threshold, self.beta, self.v_reset = threshold, beta, v_reset
        self.fire_level = threshold if fire_level is None else fire_level
        self.strict, self.surrogate, self.smooth = strict, surrogate, smooth
        self.detach_reset, self.max_spikes, self.signed = detach_reset, max_spikes, signed
        self.reset_delay, self.v_min = reset_delay, v_min
        self.zero = torch.zeros_like(threshold)

    def charge(self, v: Tensor, current: Tensor) -> Tensor:
        m = (v if self.beta is None else self.beta * v) + current
        if not self.reset_delay:
            return m
        fired = self.spike(v, self.zero).detach()
        return m - (self.threshold * fired if self.smooth else _Weigh.apply(fired, self.threshold))

    def spike(self, m: Tensor, count: Tensor) -> Tensor:
        """How many spikes the charged membrane ``m`` emits, after ``count`` so far."""
        u = m - self.fire_level
        if self.smooth:
            return self.surrogate.primitive(u, self.fire_level.detach())
        if self.max_spikes is not None:
            k = torch.floor(m / self.threshold).clamp(max=self.max_spikes)
            k = torch.where(m >= self.threshold, k, self.zero)
            return _surrogate.spike(u, k, self.surrogate, self.fire_level)
        if self.signed is not None:
            low, high, margin = self.signed
            plus = m >= self.threshold
            if high is not None:
                plus = plus & (count < high)
            minus = (m <= -margin if margin > 0 else m < 0) & (count > low) & ~plus
            return plus.to(m.dtype) - minus.to(m.dtype)
        fired = m > self.fire_level if self.strict else m >= self.fire_level
        return _surrogate.spike(u, fired, self.surrogate, self.fire_level)

    def reset(self, m: Tensor, k: Tensor) -> Tensor:
        v = self.unclipped(m, k)
        return v if self.v_min is None else torch.relu(v - self.v_min) + self.v_min

    def unclipped(self, m: Tensor, k: Tensor) -> Tensor:
        if self.reset_delay:
            return m
        kept = k.detach() if self.detach_reset else k
        if self.smooth:
            if self.v_reset is None:
                return m - self.threshold * kept
            return m * (1 - kept) + self.v_reset * kept
        if self.v_reset is None and (self.max_spikes is not None or self.signed is not None):
            return m - _Weigh.apply(kept, self.threshold)
        if self.max_spikes is not None:
            kept = (k.detach() != 0).to(m.dtype)
        if self.v_reset is None:
            return m - _Choose.apply(kept, self.threshold, self.zero)
        return _Choose.apply(kept, self.v_reset, m)


def if_forward(
    x: Tensor,
    v: Tensor,
    threshold: Tensor,
    amplitude: Tensor,
    *,
    T: int | None = None,
    input_scale: Tensor | None = None,
    beta: Tensor | None = None,
    bias: Tensor | None = None,
    fire_level: Tensor | None = None,
    v_reset: float | None = None,
    strict: bool = False,
    spike_dtype: torch.dtype | None = None,
    surrogate: _surrogate.Surrogate = _surrogate.DEFAULT,
    detach_reset: bool = False,
    smooth: bool = False,
    max_spikes: int | None = None,
    signed: Signed | None = None,
    mask: Tensor | None = None,
    probe: Probe | None = None,
    parallel: bool = False,
    reset_delay: bool = False,
    v_min: float | None = None,
    count_at: Sequence[int] = (),
) -> Result:
    """Runs integrate-and-fire neurons over all time steps.

    Args:
        x: input current ``[T, *shape]``, or ``[*shape]`` held constant for ``T`` steps.
        v, threshold, amplitude, input_scale, beta, bias, fire_level: broadcast to ``shape``;
            rounded to the state dtype. ``current = x * input_scale + bias``,
            ``m = beta * v + current``, each operation rounded; fire at ``fire_level`` (default: the
            threshold).
        strict: fire at ``m > level`` instead of ``m >= level``.
        smooth: spikes become the surrogate's primitive (for gradcheck).
        max_spikes: burst: ``floor(m / threshold)`` spikes a step, at most so many (GN, AdaFire);
            their derivative is the surrogate's. With ``v_reset`` the reset is detached.
        signed: spikes of -1 too.
        mask: bool ``[*shape]``; where False nothing is emitted while the membrane goes on.
        probe: probe steps of SRP or COS.
        parallel: all currents first, then ``clip(floor(v / threshold), 0, T)`` spikes in the first
            steps (Hao et al., ICML 2025). No traces.
        reset_delay: the threshold is subtracted after the next charge (snnTorch); the reset is
            detached, and membranes are those that are not reset yet.
        v_min: membranes are clipped after the reset: ``relu(v - v_min) + v_min`` (Sinabs).
        count_at: times whose counts are returned; after the probe with ``Probe(kind="mask")``.

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
    if bias is not None:
        current = current + bias.to(state)
    start = v.to(state).expand(shape)
    threshold = threshold.to(state)
    # Rounded once to the type of the spikes; integer spikes are plain 0 and 1.
    weight = amplitude if spike_dtype.is_floating_point else torch.ones_like(amplitude)
    weight = weight.to(spike_dtype).to(state)
    neuron = _Stepper(
        threshold,
        None if beta is None else beta.to(state),
        None if fire_level is None else fire_level.to(state),
        None if v_reset is None else x.new_full((), v_reset, dtype=state),
        strict, surrogate, detach_reset, smooth, max_spikes, signed,
        reset_delay,
        None if v_min is None else x.new_full((), v_min, dtype=state),
    )  # fmt: skip
    none = torch.zeros(shape, dtype=torch.int32, device=x.device)

    def at(t: int) -> Tensor:
        return current if T is not None else current[t]

    if probe is not None and probe.kind == "shift":
        start = _shifted_start(neuron, start, at, probe, none)
    v, guard, count = start, none, none
    if parallel:
        for t in range(steps):
            v = v + at(t)
        total = torch.floor(v / threshold).clamp(max=steps)
        total = torch.where(total > 0, total, torch.zeros_like(total))
        v = v - torch.where(total != 0, total * threshold, torch.zeros_like(total))
    emitting = torch.ones(shape, dtype=torch.bool, device=x.device) if mask is None else mask != 0
    masks = mask is not None
    spikes, v_seq, charge_seq, counts = [], [], [], []
    first = 0
    for t in range(steps):
        if probe is not None and probe.kind == "mask" and t == probe.steps:
            emitting, masks = emitting & (v / threshold > probe.margin), True
            v, guard, count, first = start, none, none, t
        if parallel:
            k = (t < total).to(state)
        else:
            m = neuron.charge(v, at(t))
            k = neuron.spike(m, guard)
            v = neuron.reset(m, k)
            guard = guard + k.detach().to(torch.int32)
            v_seq.append(v)
            charge_seq.append(m)
        if masks:
            k = torch.where(emitting, k, torch.zeros_like(k))
        if smooth:
            spikes.append(weight * k)
        elif max_spikes is not None or signed is not None:
            spikes.append(_Weigh.apply(k, weight))
        else:
            spikes.append(_Choose.apply(k, weight, torch.zeros_like(weight)))
        fired = k.detach()
        count = count + (fired != 0 if smooth else fired).to(torch.int32)
        if t + 1 - first in count_at and (first or probe is None or probe.kind == "shift"):
            counts.append(count)

    def stacked(rows: list[Tensor], dtype: torch.dtype) -> Tensor:
        return torch.stack(rows).to(dtype) if rows else x.new_empty((0, *shape), dtype=dtype)

    return Result(
        stacked(spikes, spike_dtype),
        count,
        v,
        stacked(v_seq, state),
        stacked(charge_seq, state),
        stacked(counts, torch.int32),
    )


def _shifted_start(neuron: _Stepper, start: Tensor, at: Any, probe: Probe, none: Tensor) -> Tensor:
    """Where the probe steps of COS move the initial membrane (Hao et al., ICLR 2023)."""
    threshold, v_init = neuron.threshold, start
    below, above = (threshold.new_full((), 1 + sign * probe.margin) for sign in (-1, 1))
    for _ in range(probe.iterations):
        v, count = start, none
        least_fired, most_silent = (torch.full_like(v, s * torch.inf) for s in (1, -1))
        for t in range(probe.steps):
            m = neuron.charge(v, at(t))
            k = neuron.spike(m, none)
            fired = k != 0
            least_fired = torch.where(fired & (m < least_fired), m, least_fired)
            most_silent = torch.where(~fired & (m > most_silent), m, most_silent)
            count = count + fired
            v = neuron.reset(m, k)
        less = start - torch.maximum(least_fired - below * threshold, threshold)
        more = start + torch.maximum(above * threshold - most_silent, threshold)
        # A move of the start alone must not ask for the next one.
        residual = v - (start - v_init)
        remove = (residual < 0) & (count > 0)
        add = (residual >= threshold) & (count < probe.steps)
        start = torch.where(remove, less, torch.where(add, more, start))
    return start


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
    beta: Tensor | None = None,
    bias: Tensor | None = None,
    fire_level: Tensor | None = None,
    v_reset: float | None = None,
    strict: bool = False,
    spike_dtype: torch.dtype | None = None,
    surrogate: _surrogate.Surrogate = _surrogate.DEFAULT,
    detach_reset: bool = False,
    smooth: bool = False,
    max_spikes: int | None = None,
    reset_delay: bool = False,
    v_min: float | None = None,
) -> tuple[Tensor, ...]:
    """The adjoint of :func:`if_forward`, step by step from the last.

    Arguments as there; each ``grad_*`` has the shape of its output (spikes' and traces' with T).

    Returns:
        Gradients for x (its shape) and, each ``[*shape]``, for v, threshold, amplitude,
        input_scale, beta, bias and fire_level before summing over neurons that share them; all in
        the state dtype.
    """
    run = if_forward(
        x, v, threshold, amplitude, T=T, input_scale=input_scale, beta=beta, bias=bias,
        fire_level=fire_level, v_reset=v_reset, strict=strict, spike_dtype=spike_dtype,
        surrogate=surrogate, smooth=smooth, max_spikes=max_spikes, reset_delay=reset_delay,
        v_min=v_min,
    )  # fmt: skip
    state = state_dtype(x.dtype)
    start = v.to(state).expand(run.v.shape)
    threshold = threshold.to(state)
    level = threshold if fire_level is None else fire_level.to(state)
    weight = amplitude if (spike_dtype or x.dtype).is_floating_point else torch.ones_like(amplitude)
    weight = weight.to(spike_dtype or x.dtype).to(state)
    scale = None if input_scale is None else input_scale.to(state)

    zero = torch.zeros_like(run.v)
    carry = zero if grad_v is None else grad_v.to(state).clone()
    grad_threshold, grad_amplitude, grad_level = zero, zero, zero
    grad_scale, grad_beta, grad_bias, grad_x = zero, zero, zero, []
    for t in reversed(range(run.charge_seq.shape[0])):
        m = run.charge_seq[t]
        u = m - level
        s = surrogate.primitive(u, level) if smooth else (m > level if strict else m >= level)
        if max_spikes is not None and not smooth:
            s = torch.where(s, torch.floor(m / threshold).clamp(max=max_spikes), zero)
        s = s.to(state)
        grad_out = torch.zeros_like(m) if grad_spikes is None else grad_spikes[t].to(state)
        if grad_v_seq is not None:
            carry = carry + grad_v_seq[t]
        if v_min is not None:
            kept = (
                m * (1 - s) + v_reset * s if smooth and v_reset is not None else m - threshold * s
            )
            if v_reset is not None and not smooth:
                kept = torch.where(s != 0, m.new_full((), v_reset), m)
            carry = torch.where(kept - m.new_full((), v_min) > 0, carry, zero)
        through_reset = -carry * threshold if v_reset is None else carry * (v_reset - m)
        if detach_reset or reset_delay:
            through_reset = torch.zeros_like(carry)
        grad_u = (weight * grad_out + through_reset) * surrogate.derivative(u, level)
        grad_amplitude = grad_amplitude + s * grad_out
        subtracted = carry * s if v_reset is None and not reset_delay else zero
        if fire_level is None:
            grad_threshold = grad_threshold - (grad_u + subtracted)
        else:
            grad_threshold, grad_level = grad_threshold - subtracted, grad_level - grad_u
        resets = s if smooth else s.clamp(max=1)
        carry = grad_u + (carry if v_reset is None else carry * (1 - resets))
        if grad_charge_seq is not None:
            carry = carry + grad_charge_seq[t]
        if reset_delay:
            before = run.v_seq[t - 1] if t else start
            fired = before > level if strict else before >= level
            if smooth:
                fired = surrogate.primitive(before - level, level)
            grad_threshold = grad_threshold - carry * fired
        grad_bias = grad_bias + carry
        if scale is not None:
            grad_scale = grad_scale + carry * (x if T is not None else x[t]).to(state)
        grad_x.append(carry if scale is None else carry * scale)
        if beta is not None:
            grad_beta = grad_beta + carry * (run.v_seq[t - 1] if t else start)
            carry = carry * beta.to(state)
    grads = torch.stack(grad_x[::-1]) if grad_x else x.new_zeros((0, *run.v.shape), dtype=state)
    return (
        grads if T is None else grads.sum(0),
        carry, grad_threshold, grad_amplitude, grad_scale, grad_beta, grad_bias, grad_level,
    )  # fmt: skip


def if_backward_saved(
    charges: Tensor | None,
    bits: tuple[Tensor, Tensor] | None,
    steps: int,
    dtype: torch.dtype,
    *,
    threshold: Tensor,
    amplitude: Tensor,
    spike_dtype: torch.dtype,
    grad_spikes: Tensor | None,
    grad_v: Tensor | None,
    surrogate: _surrogate.Surrogate,
    detach_reset: bool,
) -> tuple[Tensor, ...]:
    """:func:`if_backward` of the plain neuron without its currents.

    From the charged membranes ``[T, *shape]``, or from two bool ``[T, *shape]``: where the
    rectangle's slope is not 0 and, for the gradients of threshold and amplitude, where it fired.
    """
    state = state_dtype(dtype)
    threshold = threshold.to(state)
    weight = amplitude if spike_dtype.is_floating_point else torch.ones_like(amplitude)
    weight = weight.to(spike_dtype).to(state)
    like = charges if charges is not None else bits[0]  # type: ignore[index]
    zero = torch.zeros(like.shape[1:], dtype=state, device=like.device)
    carry = zero if grad_v is None else grad_v.to(state).clone()
    grad_threshold, grad_amplitude, grad_x = zero, zero, []
    for t in reversed(range(steps)):
        if charges is not None:
            slope = surrogate.derivative(charges[t] - threshold)
            s = (charges[t] >= threshold).to(state)
        else:
            inside, fired = (b[t] for b in bits)  # type: ignore[union-attr]
            slope, s = inside * zero.new_full((), surrogate.alpha), fired.to(state)
        grad_out = zero if grad_spikes is None else grad_spikes[t].to(state)
        through_reset = zero if detach_reset else -carry * threshold
        grad_u = (weight * grad_out + through_reset) * slope
        grad_amplitude = grad_amplitude + s * grad_out
        grad_threshold = grad_threshold - (grad_u + carry * s)
        carry = grad_u + carry
        grad_x.append(carry)
    return (
        torch.stack(grad_x[::-1]), carry, grad_threshold, grad_amplitude, zero, zero, zero, zero
    )  # fmt: skip
