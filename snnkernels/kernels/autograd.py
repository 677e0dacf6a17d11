"""Autograd around the two operators, and which way a call takes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import surrogate as _surrogate
from . import double_backward, operands, ops, params, run
from .spec import OPERANDS, Asked, Grads, Neuron, Outputs, Saved

_PLAIN = (Tensor, torch.nn.Parameter)


class Config(NamedTuple):
    """What a differentiable run is told besides tensors; those of ``neuron`` are left out."""

    T: int | None
    neuron: Neuron
    asked: Asked
    rate: bool
    surrogate: _surrogate.Surrogate
    detach_reset: bool
    save: str


def through_operator(x: Tensor) -> bool:
    """Whether something beside eager mode has to see the call: compile, export, a subclass."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in _PLAIN
        or bool(torch._C._len_torch_dispatch_stack())
    )


def forward(
    x: Tensor, T: int | None, neuron: Neuron, asked: Asked, alpha: float, out: Tensor | None
) -> Outputs:
    """The forward pass without gradients, by the shortest way to a kernel."""
    if not through_operator(x):
        return run.if_forward(x, T, neuron, asked, -1, alpha, out)
    made = ops.if_forward(x, T, *neuron, *asked, -1, alpha)
    there = (*asked[:3], bool(asked.count_at), True, *asked[3:6])
    outputs = Outputs._make(
        t if is_there else None for t, is_there in zip(made, there, strict=True)
    )
    if out is not None:
        outputs = outputs._replace(spikes=out.copy_(made[0]))
    return outputs


def differentiable(x: Tensor, config: Config) -> Outputs:
    """The forward pass with a graph behind it; ``spikes`` is the rate where that is asked for."""
    neuron = config.neuron
    config = config._replace(neuron=neuron.with_tensors([None] * len(OPERANDS)))
    return Outputs._make(_IntegrateAndFire.apply(*_distinct(x, *neuron.tensors), config))


def _distinct(*tensors: Tensor | None) -> list[Tensor | None]:
    """Replaces repeated tensors by views: torch.compile refuses one tensor given twice."""
    seen: list[Tensor] = []
    out: list[Tensor | None] = []
    for tensor in tensors:
        repeated = tensor is not None and any(tensor is t for t in seen)
        out.append(tensor.view_as(tensor) if repeated and tensor is not None else tensor)
        if tensor is not None:
            seen.append(tensor)
    return out


class _IntegrateAndFire(torch.autograd.Function):
    """Autograd around the two operators; of size [T, ...] it keeps x, or what ``save`` says."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
        tensors, c = rest[:-1], rest[-1]
        neuron = c.neuron.with_tensors(tensors)
        asked: Asked = c.asked
        # A constant current has no [T, ...] tensor to save on.
        save = "recompute" if c.T is not None else c.save
        if save == "trace":
            asked = asked._replace(charge_seq=True)
        elif save == "bits":
            fired = any(ctx.needs_input_grad[2:4])
            asked = asked._replace(window=True, words=asked.words or fired)
        outputs = forward(x, c.T, neuron, asked, c.surrogate.alpha, None)
        steps = x.shape[0] if c.T is None else c.T
        spikes, v = outputs.spikes, outputs.v
        if c.rate:
            amplitude, count = neuron.amplitude, outputs.count
            assert count is not None
            if amplitude is None:
                weight: Any = operands.rounded(neuron.amplitude_value, x.dtype)
            else:
                weight = amplitude.to(x.dtype).to(v.dtype)
            counted = steps - (neuron.probe if neuron.options & params.PROBE_MASK else 0)
            spikes = (weight * count.to(v.dtype) / counted).to(x.dtype)
        words = outputs.words
        ctx.save_for_backward(
            x if save == "recompute" else None,
            outputs.charge_seq if save == "trace" else None,
            outputs.window if save == "bits" else None,
            words if save == "bits" and any(ctx.needs_input_grad[2:4]) else None,
            *tensors,
        )
        ctx.config, ctx.steps, ctx.dtype = c, steps, x.dtype
        ctx.set_materialize_grads(False)
        result = (
            spikes, words if c.asked.words else None, outputs.count, outputs.counts, v,
            outputs.v_seq, outputs.charge_seq if c.asked.charge_seq else None, None,
        )  # fmt: skip
        whole = (t for t in result if t is not None and not t.dtype.is_floating_point)
        ctx.mark_non_differentiable(*whole)
        return result

    @staticmethod
    def backward(
        ctx: Any,
        grad_spikes: Tensor | None,
        grad_words: None,
        grad_count: None,
        grad_counts: None,
        grad_v: Tensor | None,
        grad_v_seq: Tensor | None,
        grad_charge_seq: Tensor | None,
        grad_window: None,
    ) -> tuple[Tensor | None, ...]:
        c: Config = ctx.config
        kept = ctx.saved_tensors
        saved = Saved._make((*kept[:4], c.T is not None, ctx.steps, ctx.dtype))
        neuron = c.neuron.with_tensors(kept[4:])
        given = Grads(
            grad_spikes if c.asked.spikes or c.rate else None,
            c.rate,
            grad_v,
            grad_v_seq if c.asked.v_seq else None,
            grad_charge_seq if c.asked.charge_seq else None,
        )
        needs = list(ctx.needs_input_grad[:-1])
        how = (c.surrogate.kind, c.surrogate.alpha, c.detach_reset, False, needs)
        grads: Any
        like = next(t for t in kept[:3] if t is not None)
        if through_operator(like):
            grads = ops.if_backward(*saved, *neuron, *given, *how)
        elif torch.is_grad_enabled():
            grads = double_backward.if_backward(saved, neuron, given, *how)
        else:
            grads = run.if_backward(saved, neuron, given, *how)
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None)
