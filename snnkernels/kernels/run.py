"""Running the neurons: allocate outputs, pick an implementation, hand it its params.

The reference serves where there is no kernel. What the two functions here compute is said in
:mod:`snnkernels.functional`; the torch operators around them are in :mod:`.ops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import surrogate as _surrogate
from . import backends, layouts, operands, params, plan, reference
from .layouts import Layout, Rows
from .params import DTYPE_CODES
from .spec import Asked, Grads, Neuron, Outputs, Saved

__all__ = ["Gradients", "if_backward", "if_forward"]

# Gradients for x and the operands, in their order; empty where not needed.
Gradients = tuple[Tensor, ...]

_ASKED = Asked()


def if_forward(
    x: Tensor,
    T: int | None,
    neuron: Neuron,
    asked: Asked = _ASKED,
    smooth: int = -1,
    alpha: float = 1.0,
    out: Tensor | None = None,
) -> Outputs:
    """Runs all steps of ``x``: ``[T, *shape]``, or ``[*shape]`` held for ``T`` steps.

    ``smooth``: the surrogate whose primitive replaces the spike (float64, tests), or -1.
    ``alpha``: of that surrogate, or of the rectangle whose window is asked for.
    ``out``: where spikes go, ``[T, *shape]``.
    """
    kernels = backends.choose(x.device)
    if kernels is None:
        return _by_reference(x, T, neuron, asked, smooth, alpha, out)
    constant = T is not None
    x, layout = _located(x, constant)
    shape = x.shape if constant else x.shape[1:]
    steps = x.shape[0] if T is None else T
    dtype, spike_dtype = x.dtype, neuron.spike_dtype
    if out is not None and layout.order is not None and out.stride() != _strides(layout, x, steps):
        x, layout = _located(x.contiguous(), constant)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    plain_layout = layout.order is None and not layout.like_x
    dense = shape if layout.order is None else layout.neurons(shape)
    N = shape.numel()

    def rows(dtype: torch.dtype) -> Tensor:
        return layout.rows(x, steps, shape, dtype)

    def each(dtype: torch.dtype, *leading: int) -> Tensor:
        return layout.restore(x.new_empty((*leading, *dense), dtype=dtype), len(leading))

    s_out = out
    if asked.spikes and out is None:
        same = dtype == spike_dtype and plain_layout and not constant and layout.inner == N
        s_out = torch.empty_like(x) if same else rows(spike_dtype)
    v_out = each(state)
    count = each(torch.int32) if asked.count else None
    words = window = counts = v_seq = charge_seq = None
    word = reference.word_dtype(steps)
    if asked.words or asked.window:
        lead = -(-steps // reference.WORD_STEPS)
        words = each(word, lead) if asked.words else None
        window = each(word, lead) if asked.window else None
    if asked.v_seq or asked.charge_seq:
        v_seq = rows(state) if asked.v_seq else None
        charge_seq = rows(state) if asked.charge_seq else None
    if asked.count_at:
        counts = each(torch.int32, len(asked.count_at))
    outputs = Outputs(s_out, words, count, counts, v_out, v_seq, charge_seq, window)
    if not N:
        return outputs

    # Locals, so that converted operands live until the kernel has been launched.
    v_init, v_kept = _operand(neuron.v, neuron.v_value, layout, shape, state)
    threshold, th_kept = _operand(neuron.threshold, neuron.threshold_value, layout, shape, state)
    amplitude, amp_kept = (0, 1, 1, 0.0), None
    if neuron.amplitude is not None and spike_dtype.is_floating_point:
        amplitude, amp_kept = _operand(neuron.amplitude, 0.0, layout, shape, spike_dtype)
    general = (
        neuron.options or smooth >= 0 or asked.v_seq or asked.charge_seq or bool(asked.count_at)
    )
    spike_bytes, vec = spike_dtype.itemsize, 1
    if kernels.gpu and not general:
        general, vec = plan.forward(x, layout, outputs, threshold, amplitude)
    packed = params.pack_forward(
        x.data_ptr(),
        0 if s_out is None else s_out.data_ptr(),
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
        spike_bytes,
        word.itemsize,
        vec,
    )
    if not general:
        kernels.forward(packed, x.device)
        return outputs
    extra, extra_kept = _more_operands(neuron, layout, shape, state)
    mask = None
    if neuron.mask is not None:
        mask = layout.view(neuron.mask.to(torch.uint8)).expand(dense).contiguous()
    times = asked.count_at
    rest = params.pack_general(
        0 if counts is None else counts.data_ptr(),
        0 if v_seq is None else v_seq.data_ptr(),
        0 if charge_seq is None else charge_seq.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        *extra,
        neuron.v_reset,
        neuron.margin,
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


def if_backward(
    saved: Saved,
    neuron: Neuron,
    grads: Grads,
    surrogate: int,
    alpha: float,
    detach_reset: bool,
    smooth: bool,
    needs: Sequence[bool],
) -> Gradients:
    """Gradients for x and the operands, from what the forward pass saved.

    From ``saved.x`` alone the membranes are recomputed.
    """
    like = _first(saved.x, saved.charges, saved.window)
    kernels = backends.choose(like.device)
    shape = like.shape if saved.constant else like.shape[1:]
    if kernels is None or saved.steps == 0:
        found = _reference_backward(saved, neuron, grads, surrogate, alpha, detach_reset, smooth)
        return _sums(like, *found, neuron, needs)
    steps, dtype = saved.steps, saved.dtype
    x, charges = saved.x, saved.charges
    like, layout = _located(like, saved.constant)
    if x is not None:
        x = like
    elif charges is not None:
        charges = like
    N = shape.numel()
    state = torch.float64 if dtype == torch.float64 else torch.float32
    dense = shape if layout.order is None else layout.neurons(shape)
    if x is None:
        # What lies where is known from the bits or the charges, whose rows these are.
        rows = layout.x if charges is not None else Rows(N, layout.inner)
        layout = layout._replace(x=Rows(N, layout.inner), out=rows, like_x=False)

    def each() -> Tensor:
        return layout.restore(like.new_empty(dense, dtype=state))

    # Rates have one row of gradients for all steps.
    grad_spikes, grad_rows = _rows(grads.spikes, dtype, like, layout, steps, shape, grads.rate)
    grad_v_seq, _ = _rows(grads.v_seq, state, like, layout, steps, shape, False, exact=True)
    grad_charge, _ = _rows(grads.charge_seq, state, like, layout, steps, shape, False, exact=True)
    grad_v = None if grads.v is None else layout.view(grads.v.to(state)).contiguous()

    grad_x = None
    if needs[0]:
        if saved.constant:
            grad_x = layout.restore(like.new_empty(dense, dtype=dtype))
        elif x is not None:
            grad_x = layout.rows(x, steps, shape, dtype)
        else:
            grad_x = layout.restore(like.new_empty((steps, *dense), dtype=dtype), 1)
    if saved.constant:
        grad_x_rows = Rows(0, layout.inner)
    else:
        grad_x_rows = layout.out if x is not None else Rows(N, layout.inner)
    per_neuron = [each() if need else None for need in needs[1:]]
    if not N:
        return _sums(like, grad_x, per_neuron, neuron, needs)

    v_init, v_kept = _operand(neuron.v, neuron.v_value, layout, shape, state)
    threshold, th_kept = _operand(neuron.threshold, neuron.threshold_value, layout, shape, state)
    weight = operands.rounded(neuron.amplitude_value, neuron.spike_dtype)
    given = neuron.amplitude
    if given is not None:
        floating = neuron.spike_dtype.is_floating_point
        given = given.detach().to(neuron.spike_dtype) if floating else None
    amplitude, amp_kept = _operand(given, weight, layout, shape, state)
    options = neuron.options | (params.DETACH_RESET if detach_reset else 0)
    general = (
        options & ~params.DETACH_RESET
        or smooth
        or grads.v_seq is not None
        or grads.charge_seq is not None
        or any(needs[4:])
    )
    vec, scratch = 1, None
    if kernels.gpu:
        if not general:
            general, vec = plan.backward(saved, layout, grad_spikes, grad_rows, grad_x, grad_x_rows)
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
        *(0 if t is None else t.data_ptr() for t in (grad_x, *per_neuron[:3], scratch)),
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
        return _sums(like, grad_x, per_neuron, neuron, needs)
    extra, extra_kept = _more_operands(neuron, layout, shape, state)
    rest = params.pack_backward_general(
        *(0 if t is None else t.data_ptr() for t in (grad_v_seq, grad_charge, *per_neuron[3:])),
        *extra,
        neuron.v_reset,
    )
    kernels.backward_general(packed + rest, like.device)
    del v_kept, th_kept, amp_kept, extra_kept
    return _sums(like, grad_x, per_neuron, neuron, needs)


# ---- memory --------------------------------------------------------------------------------------


def _located(x: Tensor, constant: bool) -> tuple[Tensor, Layout]:
    """``x``, copied if kernels cannot read it where it is, and its layout."""
    layout = layouts.of(x, constant)
    if layout is None or x.data_ptr() % x.element_size():
        x = x.clone(memory_format=torch.contiguous_format)
        layout = layouts.of(x, constant)
        assert layout is not None
    return x, layout


def _strides(layout: Layout, x: Tensor, steps: int) -> tuple[int, ...]:
    """The strides that :meth:`Layout.rows` gives."""
    if layout.like_x:
        return x.stride()
    shape = x.shape[1:] if layout.x.step else x.shape
    return layout.rows(x.new_empty(0, device="meta"), steps, shape, x.dtype).stride()


def _rows(
    grad: Tensor | None,
    dtype: torch.dtype,
    like: Tensor,
    layout: Layout,
    steps: int,
    shape: torch.Size,
    rate: bool,
    exact: bool = False,
) -> tuple[Tensor | None, Rows]:
    """A gradient with rows as kernels walk them, copied only if it lies otherwise.

    ``exact``: its rows must be ``layout.out``.
    """
    if grad is None:
        return None, Rows(0, layout.inner)
    grad = grad.to(dtype)
    if rate:
        return layout.view(grad).contiguous(), Rows(0, layout.inner)
    found = layouts.of(grad, False)
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


def _first(*tensors: Tensor | None) -> Tensor:
    return next(t for t in tensors if t is not None)


def _operand(
    tensor: Tensor | None, number: float, layout: Layout, shape: torch.Size, dtype: torch.dtype
) -> tuple[tuple[int, int, int, float], Tensor | None]:
    """An Operand's fields, and the tensor that must outlive the launch."""
    if tensor is None:
        return (0, 1, 1, number), None
    if layout.order is not None:
        tensor, shape = layout.view(tensor), torch.Size(layout.neurons(shape))
    kept, inner, elements = operands.share(tensor, shape, dtype)
    return (kept.data_ptr(), inner, elements, 0.0), kept


def _more_operands(
    neuron: Neuron, layout: Layout, shape: torch.Size, dtype: torch.dtype
) -> tuple[list[Any], list[Tensor | None]]:
    """The fields of the four operands that only the general kernels read."""
    fields: list[Any] = []
    kept = []
    for tensor, number in zip(neuron[3:7], neuron[10:14], strict=True):
        operand, tensor = _operand(tensor, number, layout, shape, dtype)
        fields += operand
        kept.append(tensor)
    return fields, kept


# ---- the reference -------------------------------------------------------------------------------


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


def _by_reference(
    x: Tensor,
    T: int | None,
    neuron: Neuron,
    asked: Asked,
    smooth: int,
    alpha: float,
    out: Tensor | None,
) -> Outputs:
    options = neuron.options
    surrogate = _surrogate.BY_KIND[max(smooth, 0)](alpha)
    with torch.no_grad():
        given = for_reference(x, neuron, x.dtype)
        result = reference.if_forward(
            x,
            **given,
            T=T,
            surrogate=surrogate,
            smooth=smooth >= 0,
            max_spikes=neuron.max_spikes if options & params.BURST else None,
            signed=neuron.signed,
            mask=neuron.mask,
            probe=neuron.probed,
            parallel=bool(options & params.PARALLEL),
            count_at=asked.count_at,
        )
        window = None
        if asked.window:
            level = given["threshold"] if given["fire_level"] is None else given["fire_level"]
            u = result.charge_seq - level.to(result.v.dtype)
            window = reference.pack(_surrogate.Rectangle(alpha).derivative(u) != 0)
    spikes = result.spikes
    outputs = Outputs(
        spikes if asked.spikes else None,
        reference.pack(spikes != 0) if asked.words else None,
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
    x, layout = _located(x, constant)
    if layout.order is None and not layout.like_x:
        return outputs
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


def _reference_backward(
    saved: Saved,
    neuron: Neuron,
    grads: Grads,
    surrogate: int,
    alpha: float,
    detach_reset: bool,
    smooth: bool,
) -> tuple[Tensor, Sequence[Tensor]]:
    spikes, steps = grads.spikes, saved.steps
    state = reference.state_dtype(saved.dtype)
    if spikes is not None and grads.rate:
        spikes = (spikes.to(state) / steps).expand(steps, *spikes.shape)
    like = _first(saved.x, saved.charges, saved.window)
    with torch.no_grad():
        common = {
            **for_reference(like, neuron, saved.dtype),
            "grad_spikes": spikes,
            "grad_v": grads.v,
            "surrogate": _surrogate.BY_KIND[surrogate](alpha),
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
            )
    grad_x, *per_neuron = found
    return grad_x.to(saved.dtype), per_neuron


# ---- gradients -----------------------------------------------------------------------------------


def _sums(
    like: Tensor,
    grad_x: Tensor | None,
    per_neuron: Sequence[Tensor | None],
    neuron: Neuron,
    needs: Sequence[bool],
) -> Gradients:
    """Gradients in the shapes of what they are for; empty where not needed."""
    grads = [grad_x if grad_x is not None and needs[0] else like.new_empty(0)]
    for grad, operand, need in zip(per_neuron, neuron.tensors, needs[1:], strict=True):
        present = need and grad is not None and operand is not None
        grads.append(_reduced(grad, operand) if present else like.new_empty(0))  # type: ignore[arg-type]
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
