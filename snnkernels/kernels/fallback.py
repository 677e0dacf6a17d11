"""The reference in place of a kernel: the same arguments, the same outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import surrogate as _surrogate
from . import layouts, operands, params, reference
from .spec import Asked, Grads, Neuron, Outputs, Saved


def if_forward(
    x: Tensor,
    T: int | None,
    neuron: Neuron,
    asked: Asked,
    smooth: int,
    alpha: float,
    scale: float,
    out: Tensor | None,
) -> Outputs:
    """:func:`.run.if_forward` by the reference."""
    options = neuron.options
    surrogate = _surrogate.BY_KIND[max(smooth, 0)](alpha, scale)
    with torch.no_grad():
        given = for_reference(x, neuron, x.dtype)
        weight = given["amplitude"]
        if asked.words:
            # Weighed afterwards: a spike that weighs 0 is a spike.
            given["amplitude"] = torch.ones_like(weight)
        result = reference.if_forward(
            x,
            **given,
            T=T,
            surrogate=surrogate,
            smooth=smooth >= 0,
            max_spikes=neuron.bursts,
            signed=neuron.signed,
            mask=neuron.mask,
            probe=neuron.probed,
            parallel=bool(options & params.PARALLEL),
            reset_delay=neuron.delayed,
            v_min=neuron.clipped,
            count_at=asked.count_at,
        )
        window = None
        if asked.window:
            level = given["threshold"] if given["fire_level"] is None else given["fire_level"]
            u = result.charge_seq - level.to(result.v.dtype)
            window = reference.pack(_surrogate.Rectangle(alpha).derivative(u) != 0)
    spikes = result.spikes
    fired = spikes != 0 if asked.words else None
    if fired is not None and spikes.is_floating_point():
        spikes = torch.where(fired, weight.to(spikes.dtype), torch.zeros_like(spikes))
    outputs = Outputs(
        spikes if asked.spikes else None,
        None if fired is None else reference.pack(fired),
        result.count if asked.count else None,
        result.counts if asked.count_at else None,
        result.v.clone(memory_format=torch.contiguous_format),
        result.v_seq if asked.v_seq else None,
        result.charge_seq if asked.charge_seq else None,
        window,
    )
    outputs = _laid_out(outputs, x, T)
    return outputs if out is None else outputs._replace(spikes=out.copy_(spikes))


def _laid_out(outputs: Outputs, x: Tensor, T: int | None) -> Outputs:
    """The reference's outputs where a kernel's would lie in memory."""
    constant = T is not None
    x, layout = layouts.located(x, constant)
    if layout.order is None and not layout.like_x:
        # Steps stacked from currents of another order lie as those do.
        return Outputs._make(None if made is None else made.contiguous() for made in outputs)
    shape = x.shape if constant else x.shape[1:]
    steps = x.shape[0] if T is None else T

    def placed(name: str, made: Tensor | None) -> Tensor | None:
        if made is None:
            return None
        if name in ("spikes", "v_seq", "charge_seq"):
            return layout.rows(x, steps, shape, made.dtype).copy_(made)
        leading = made.shape[: made.dim() - len(shape)]
        dense = made.new_empty((*leading, *layout.neurons(shape)))
        return layout.restore(dense, len(leading)).copy_(made)

    return Outputs._make(placed(*pair) for pair in zip(outputs._fields, outputs, strict=True))


def if_backward(
    saved: Saved,
    neuron: Neuron,
    grads: Grads,
    surrogate: int,
    alpha: float,
    scale: float,
    detach_reset: bool,
    smooth: bool,
) -> tuple[Tensor, Sequence[Tensor]]:
    """:func:`.backward.if_backward`, per neuron: sums over what they share are still to be made."""
    spikes, steps = grads.spikes, saved.steps
    state = reference.state_dtype(saved.dtype)
    if spikes is not None and grads.rate:
        spikes = (spikes.to(state) / steps).expand(steps, *spikes.shape)
    like = saved.like
    with torch.no_grad():
        common = {
            **for_reference(like, neuron, saved.dtype),
            "grad_spikes": spikes,
            "grad_v": grads.v,
            "surrogate": _surrogate.BY_KIND[surrogate](alpha, scale),
            "detach_reset": detach_reset,
        }
        if saved.x is None:
            bits = None
            if saved.window is not None:
                fired = saved.window if saved.words is None else saved.words
                bits = (reference.unpack(saved.window, steps), reference.unpack(fired, steps))
            for name in ("v", "input_scale", "beta", "bias", "fire_level", "v_reset", "strict"):
                del common[name]
            found = reference.if_backward_saved(saved.charges, bits, steps, saved.dtype, **common)
        else:
            found = reference.if_backward(
                saved.x,
                **common,
                grad_v_seq=grads.v_seq,
                grad_charge_seq=grads.charge_seq,
                T=steps if saved.constant else None,
                smooth=smooth,
                max_spikes=neuron.bursts,
                reset_delay=neuron.delayed,
                v_min=neuron.clipped,
            )
    grad_x, *per_neuron = found
    return grad_x.to(saved.dtype), per_neuron


def for_reference(x: Tensor, neuron: Neuron, dtype: torch.dtype) -> dict[str, Any]:
    """The neuron's part of the reference's arguments for currents of ``dtype``.

    Numbers become tensors on the device of ``x``.
    """
    state = reference.state_dtype(dtype)
    options = neuron.options

    def tensor(given: Tensor | None, number: float, dtype: torch.dtype = state) -> Tensor:
        if given is not None:
            return given
        # Filled on the device (torch.tensor would copy from the host and wait), and rounded before:
        # filling refuses what rounds to the largest float32.
        return x.new_full((), operands.rounded(number, dtype), dtype=state)

    def option(bit: int, given: Tensor | None, number: float) -> Tensor | None:
        return tensor(given, number) if options & bit else None

    weight = neuron.spike_dtype
    return {
        "v": tensor(neuron.v, neuron.v_value),
        "threshold": tensor(neuron.threshold, neuron.threshold_value),
        "amplitude": tensor(neuron.amplitude, neuron.amplitude_value, weight),
        "input_scale": option(params.INPUT_SCALE, neuron.input_scale, neuron.input_scale_value),
        "beta": option(params.BETA, neuron.beta, neuron.beta_value),
        "bias": option(params.BIAS, neuron.bias, neuron.bias_value),
        "fire_level": option(params.FIRE_LEVEL, neuron.fire_level, neuron.fire_level_value),
        "v_reset": (
            operands.rounded(neuron.v_reset, state) if options & params.HARD_RESET else None
        ),
        "strict": bool(options & params.STRICT),
        "spike_dtype": neuron.spike_dtype,
    }
