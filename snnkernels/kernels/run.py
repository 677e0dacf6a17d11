"""The forward pass: allocate outputs, pick an implementation, hand it its params.

The reference serves where there is no kernel. What is computed is said in
:mod:`snnkernels.functional`; the torch operators around it are in :mod:`.ops`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends, fallback, layouts, operands, packing, params, plan, reference
from .layouts import Layout
from .params import DTYPE_CODES
from .spec import SPIKES, Asked, Neuron, Outputs


def if_forward(
    x: Tensor,
    T: int | None,
    neuron: Neuron,
    asked: Asked = SPIKES,
    smooth: int = -1,
    alpha: float = 1.0,
    scale: float = 1.0,
    out: Tensor | None = None,
) -> Outputs:
    """Runs all steps of ``x``: ``[T, *shape]``, or ``[*shape]`` held for ``T`` steps.

    ``smooth``: the surrogate whose primitive replaces the spike (float64, tests), or -1.
    ``alpha``, ``scale``: of that surrogate; ``alpha`` also of the rectangle whose window is asked
    for.
    ``out``: where spikes go, ``[T, *shape]``.
    """
    kernels = backends.choose(x.device)
    if kernels is None:
        return fallback.if_forward(x, T, neuron, asked, smooth, alpha, scale, out)
    constant = T is not None
    x, layout = layouts.located(x, constant)
    shape = x.shape if constant else x.shape[1:]
    steps = x.shape[0] if T is None else T
    dtype, spike_dtype = x.dtype, neuron.spike_dtype
    if out is not None:
        into = layouts.written(layout, out, shape.numel())
        if into is None:
            made = if_forward(x, T, neuron, asked, smooth, alpha, scale)
            return made._replace(spikes=out.copy_(made.spikes))  # type: ignore[arg-type]
        layout = into
    state = torch.float64 if dtype == torch.float64 else torch.float32
    N = shape.numel()
    outputs = _outputs(x, layout, steps, shape, asked, spike_dtype, state, out)
    if not N:
        return outputs

    # Locals, so that converted operands live until the kernel has been launched.
    v_init, v_kept = packing.operand(neuron.v, neuron.v_value, layout, shape, state)
    threshold, th_kept = packing.operand(
        neuron.threshold, neuron.threshold_value, layout, shape, state
    )
    amplitude, amp_kept = packing.NONE, None
    if neuron.amplitude is not None and spike_dtype.is_floating_point:
        amplitude, amp_kept = packing.operand(neuron.amplitude, 0.0, layout, shape, spike_dtype)
    general = (
        neuron.options or smooth >= 0 or asked.v_seq or asked.charge_seq or bool(asked.count_at)
    )
    vec = 1
    if kernels.gpu and not general:
        vec = plan.forward(x, layout, N, *outputs)
    spikes, words, count, counts, v_out, v_seq, charge_seq, window = outputs
    packed = params.pack_forward(
        x.data_ptr(),
        0 if spikes is None else spikes.data_ptr(),
        0 if words is None else words.data_ptr(),
        0 if window is None else window.data_ptr(),
        0 if count is None else count.data_ptr(),
        v_out.data_ptr(),
        *v_init,
        *threshold,
        *amplitude,
        steps,
        N,
        layout.inner,
        *layout.x,
        *layout.out,
        alpha,
        operands.bits(neuron.amplitude_value, spike_dtype),
        DTYPE_CODES[dtype],
        spike_dtype.itemsize,
        1 if steps <= 8 else 2 if steps <= 16 else 4,
        vec,
    )
    if not general:
        kernels.forward(packed, x.device)
        return outputs
    extra, extra_kept = packing.more_operands(neuron, layout, shape, state)
    mask = None
    if neuron.mask is not None:
        mask = layout.view(neuron.mask.to(torch.uint8)).expand(layout.neurons(shape)).contiguous()
    times = asked.count_at
    rest = params.pack_general(
        0 if counts is None else counts.data_ptr(),
        0 if v_seq is None else v_seq.data_ptr(),
        0 if charge_seq is None else charge_seq.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        *extra,
        neuron.v_reset,
        neuron.margin,
        scale,
        neuron.v_min,
        neuron.options | (params.SMOOTH if smooth >= 0 else 0),
        max(smooth, 0),
        neuron.max_spikes,
        neuron.probe,
        neuron.iterations,
        neuron.count_low,
        neuron.count_high,
        len(times),
        *times,
        *(0,) * (params.COUNT_TIMES - len(times)),
    )
    kernels.general(packed + rest, x.device)
    del v_kept, th_kept, amp_kept, extra_kept
    return outputs


def _outputs(
    x: Tensor,
    layout: Layout,
    steps: int,
    shape: torch.Size,
    asked: Asked,
    spike_dtype: torch.dtype,
    state: torch.dtype,
    out: Tensor | None,
) -> Outputs:
    """The tensors that a run fills."""
    # The first few lines are what a small layer waits for.
    dense = shape if layout.plain else layout.neurons(shape)
    v = x.new_empty(dense) if x.dtype is state else x.new_empty(dense, dtype=state)
    if not layout.plain:
        v = layout.restore(v)
    spikes = out
    if asked.spikes and out is None:
        if layout.plain and x.dtype is spike_dtype and layout.x.step:
            spikes = torch.empty_like(x)
        else:
            spikes = layout.rows(x, steps, shape, spike_dtype)
    if asked is SPIKES:
        return Outputs(spikes, None, None, None, v, None, None, None)

    def each(there: Any, dtype: torch.dtype, *leading: int) -> Tensor | None:
        if not there:
            return None
        return layout.restore(x.new_empty((*leading, *dense), dtype=dtype), len(leading))

    like = x if out is None else out
    word, lead = reference.word_dtype(steps), -(-steps // reference.WORD_STEPS)
    return Outputs(
        spikes,
        each(asked.words, word, lead),
        each(asked.count, torch.int32),
        each(asked.count_at, torch.int32, len(asked.count_at)),
        v,
        layout.rows(like, steps, shape, state) if asked.v_seq else None,
        layout.rows(like, steps, shape, state) if asked.charge_seq else None,
        each(asked.window, word, lead),
    )
