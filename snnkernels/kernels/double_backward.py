"""The backward pass by autograd through the reference, which can be differentiated again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import surrogate as _surrogate
from . import fallback, reference
from .backward import Gradients
from .spec import Grads, Neuron, Saved


def if_backward(
    saved: Saved,
    neuron: Neuron,
    grads: Grads,
    surrogate: int,
    alpha: float,
    scale: float,
    detach_reset: bool,
    smooth: bool,
    needs: Sequence[bool],
) -> Gradients:
    """As :func:`.backward.if_backward`; needs ``saved.x``."""
    x = saved.x
    if x is None:
        raise RuntimeError(
            "a second derivative needs the currents: call with save='recompute' (the default)"
        )
    with torch.enable_grad():
        # view_as: inputs of this small graph that are still connected to the outer one.
        leaves = [
            None if t is None else (t.view_as(t) if t.requires_grad else t.detach())
            for t in (x, *neuron.tensors)
        ]
        for leaf, need in zip(leaves, needs, strict=True):
            if leaf is not None and need and not leaf.requires_grad:
                leaf.requires_grad_()
        x_leaf = leaves[0]
        assert x_leaf is not None
        inside = neuron.with_tensors(leaves[1:])
        result = reference.if_forward(
            x_leaf,
            **fallback.for_reference(x, inside, x.dtype),
            T=saved.steps if saved.constant else None,
            surrogate=_surrogate.BY_KIND[surrogate](alpha, scale),
            detach_reset=detach_reset,
            smooth=smooth,
            max_spikes=neuron.bursts,
            reset_delay=neuron.delayed,
            v_min=neuron.clipped,
        )
        spikes = result.spikes.to(x.dtype)
        out = spikes.to(result.v.dtype).mean(0).to(x.dtype) if grads.rate else spikes
        pairs = [
            (output, grad.to(output.dtype))
            for output, grad in (
                (out, grads.spikes),
                (result.v, grads.v),
                (result.v_seq, grads.v_seq),
                (result.charge_seq, grads.charge_seq),
            )
            if grad is not None and output.requires_grad
        ]
        wanted = [t for t, need in zip(leaves, needs, strict=True) if t is not None and need]
        found: list[Tensor | None] = [None] * len(wanted)
        if pairs:
            outputs, given = zip(*pairs, strict=True)
            found = list(
                torch.autograd.grad(outputs, wanted, given, create_graph=True, allow_unused=True)
            )
    by_leaf = iter(found)
    result_grads: list[Tensor | None] = []
    for leaf, need in zip(leaves, needs, strict=True):
        if leaf is None or not need:
            result_grads.append(None)
        else:
            grad = next(by_leaf)
            result_grads.append(torch.zeros_like(leaf) if grad is None else grad)
    return tuple(result_grads)
