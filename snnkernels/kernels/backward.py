"""The backward pass: gradients from what the forward pass saved."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .. import surrogate as _surrogate
from . import backends, fallback, layouts, operands, packing, params, plan, reference
from .layouts import Layout, Rows
from .params import DTYPE_CODES
from .spec import OPERANDS, Grads, Neuron, Saved

# Gradients for x and the operands, in their order; None where not needed.
Gradients = tuple[Tensor | None, ...]
_NO_GRADS = (None,) * len(OPERANDS)


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
    """Gradients for x and the operands, from what the forward pass saved.

    From ``saved.x`` alone the membranes are recomputed.
    """
    like = saved.like
    kernels = backends.choose(like.device)
    shape = like.shape if saved.constant else like.shape[1:]
    if kernels is None or saved.steps == 0:
        how = (surrogate, alpha, scale, detach_reset, smooth)
        found = fallback.if_backward(saved, neuron, grads, *how)
        return _sums(*found, neuron, needs)
    steps, dtype = saved.steps, saved.dtype
    x, charges = saved.x, saved.charges
    like, layout = layouts.located(like, saved.constant)
    if x is not None:
        x = like
    elif charges is not None:
        charges = like
    N = shape.numel()
    state = torch.float64 if dtype == torch.float64 else torch.float32
    dense = shape if layout.order is None else layout.neurons(shape)
    if x is None:
        # What lies where is known from the bits or the charges, whose rows these are.
        where = layout.x if charges is not None else Rows(N, layout.inner)
        layout = layout._replace(x=Rows(N, layout.inner), out=where, like_x=False)

    def each() -> Tensor:
        return layout.restore(like.new_empty(dense, dtype=state))

    # Rates have one row of gradients for all steps.
    grad_spikes, grad_rows = _rows(grads.spikes, dtype, like, layout, steps, shape, grads.rate)
    grad_v_seq = grad_charge = None
    if grads.v_seq is not None:
        grad_v_seq, _ = _rows(grads.v_seq, state, like, layout, steps, shape, exact=True)
    if grads.charge_seq is not None:
        grad_charge, _ = _rows(grads.charge_seq, state, like, layout, steps, shape, exact=True)
    grad_v = None if grads.v is None else layout.view(grads.v.to(state)).contiguous()

    grad_x = None
    if needs[0]:
        if layout.plain and x is not None:
            grad_x = torch.empty_like(x)
        elif saved.constant:
            grad_x = layout.restore(like.new_empty(dense, dtype=dtype))
        elif x is not None:
            grad_x = layout.rows(x, steps, shape, dtype)
        else:
            grad_x = layout.restore(like.new_empty((steps, *dense), dtype=dtype), 1)
    if saved.constant:
        grad_x_rows = Rows(0, layout.inner)
    else:
        grad_x_rows = layout.out if x is not None else Rows(N, layout.inner)
    per_neuron: Sequence[Tensor | None] = _NO_GRADS
    if True in needs[1:]:
        per_neuron = [each() if need else None for need in needs[1:]]
    grad_v_init, grad_threshold, grad_amplitude = per_neuron[:3]
    if not N:
        return _sums(grad_x, per_neuron, neuron, needs)

    v_init, v_kept = packing.operand(neuron.v, neuron.v_value, layout, shape, state)
    threshold, th_kept = packing.operand(
        neuron.threshold, neuron.threshold_value, layout, shape, state
    )
    weight = operands.rounded(neuron.amplitude_value, neuron.spike_dtype)
    given = neuron.amplitude
    if given is not None:
        floating = neuron.spike_dtype.is_floating_point
        given = given.detach().to(neuron.spike_dtype) if floating else None
    amplitude, amp_kept = packing.operand(given, weight, layout, shape, state)
    options = neuron.options | (params.DETACH_RESET if detach_reset else 0)
    general = (
        options & ~params.DETACH_RESET
        or smooth
        or not _surrogate.is_plain(surrogate, scale)
        or grads.v_seq is not None
        or grads.charge_seq is not None
        or True in needs[4:]
    )
    vec, scratch = 1, None
    if kernels.gpu:
        if not general:
            rows = (layout.x, layout.out, grad_rows, grad_x_rows)
            arrays = (x, charges, saved.window, saved.words, grad_spikes, grad_x, *per_neuron)
            vec = plan.backward(state.itemsize, layout, N, rows, *arrays)
        if x is not None:
            lead = max((steps - 1) // params.CHUNK, 0)
            scratch = like.new_empty((lead, *dense), dtype=state)
    window, words = saved.window, saved.words
    packed = params.pack_backward(
        0 if x is None else x.data_ptr(),
        0 if charges is None else charges.data_ptr(),
        0 if window is None else window.data_ptr(),
        0 if words is None else words.data_ptr(),
        0 if grad_spikes is None else grad_spikes.data_ptr(),
        0 if grad_v is None else grad_v.data_ptr(),
        0 if grad_x is None else grad_x.data_ptr(),
        0 if grad_v_init is None else grad_v_init.data_ptr(),
        0 if grad_threshold is None else grad_threshold.data_ptr(),
        0 if grad_amplitude is None else grad_amplitude.data_ptr(),
        0 if scratch is None else scratch.data_ptr(),
        *v_init,
        *threshold,
        *amplitude,
        steps,
        N,
        layout.inner,
        *layout.x,
        *layout.out,
        *grad_rows,
        *grad_x_rows,
        alpha,
        1.0 / steps if grads.rate else 1.0,
        DTYPE_CODES[dtype],
        reference.word_dtype(steps).itemsize,
        options | (params.SMOOTH if smooth else 0),
        surrogate,
        vec,
        0,
    )
    if not general:
        kernels.backward(packed, like.device)
        return _sums(grad_x, per_neuron, neuron, needs)
    extra, extra_kept = packing.more_operands(neuron, layout, shape, state)
    rest = params.pack_backward_general(
        *(0 if t is None else t.data_ptr() for t in (grad_v_seq, grad_charge, *per_neuron[3:])),
        *extra,
        neuron.v_reset,
        scale,
        neuron.v_min,
        neuron.max_spikes,
        0,
    )
    kernels.backward_general(packed + rest, like.device)
    del v_kept, th_kept, amp_kept, extra_kept
    return _sums(grad_x, per_neuron, neuron, needs)


def _rows(
    grad: Tensor | None,
    dtype: torch.dtype,
    like: Tensor,
    layout: Layout,
    steps: int,
    shape: torch.Size,
    rate: bool = False,
    exact: bool = False,
) -> tuple[Tensor | None, Rows]:
    """A gradient with rows as kernels walk them, copied only if it lies otherwise.

    ``exact``: its rows must be ``layout.out``.
    """
    if grad is None:
        return None, Rows(0, layout.inner)
    if grad.dtype is not dtype:
        grad = grad.to(dtype)
    if rate:
        return layout.view(grad).contiguous(), Rows(0, layout.inner)
    found = layouts.of(grad, False)
    if found is layout and layout.plain and grad.data_ptr() % grad.element_size() == 0:
        return grad, layout.out
    N = shape.numel()
    if found is not None and grad.data_ptr() % grad.element_size() == 0:
        rows = found.x if found.inner == layout.inner else Rows(found.x.step, layout.inner)
        usable = found.order == layout.order and found.inner in (N, layout.inner)
        if usable and (rows == layout.out or not exact):
            return grad, rows
    # In the order of memory, rows dense; or exactly where layout.out says.
    if layout.like_x or layout.out != Rows(N, layout.inner):
        copy = torch.empty_strided(like.shape, like.stride(), dtype=dtype, device=like.device)
        return copy.copy_(grad), layout.out
    dense = like.new_empty((steps, *layout.neurons(shape)), dtype=dtype)
    return layout.restore(dense, 1).copy_(grad), layout.out


def _sums(
    grad_x: Tensor | None,
    per_neuron: Sequence[Tensor | None],
    neuron: Neuron,
    needs: Sequence[bool],
) -> Gradients:
    """Gradients in the shapes of what they are for."""
    if per_neuron is _NO_GRADS:
        return (grad_x, *_NO_GRADS)
    grads = [grad_x if needs[0] else None]
    for grad, operand, need in zip(per_neuron, neuron.tensors, needs[1:], strict=True):
        wanted = need and grad is not None and operand is not None
        grads.append(_reduced(grad, operand) if wanted else None)  # type: ignore[arg-type]
    return tuple(grads)


def _reduced(per_neuron: Tensor, like: Tensor) -> Tensor:
    """Sums a per-neuron gradient over the neurons that share an element of ``like``.

    The second stage of the reduction: the kernel has summed over time. On CPUs through NumPy, whose
    sum runs on one thread in a fixed order: torch's depends on the number of threads. float64
    inside, so that the order hardly matters for the value either.
    """
    extra = per_neuron.dim() - like.dim()
    dims = tuple(
        i
        for i, n in enumerate(per_neuron.shape)
        if n != 1 and (i < extra or like.shape[i - extra] == 1)
    )
    if not dims:
        return per_neuron.reshape(like.shape).to(like.dtype)
    if per_neuron.device.type == "cpu":
        total = per_neuron.numpy().sum(axis=dims, dtype=np.float64)
        summed = torch.from_numpy(np.asarray(total).copy())
    else:
        wide = per_neuron.dtype if per_neuron.device.type == "mps" else torch.float64
        summed = per_neuron.sum(dims, dtype=wide)
    return summed.reshape(like.shape).to(like.dtype)
