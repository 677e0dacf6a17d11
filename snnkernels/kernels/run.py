"""Running the neurons: allocate outputs, pick an implementation, hand it its params.

The reference serves where there is no kernel. What the two functions here compute is said in
:mod:`snnkernels.functional`; the torch operators around them are in :mod:`.ops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import surrogate as _surrogate
from . import backends, operands, params, reference
from .params import DTYPE_CODES

# spikes, count, v, v_seq, charge_seq; None where not asked for.
Results = tuple[Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor | None]
# Gradients for x, v, threshold, amplitude, input_scale; empty where not needed.
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Neuron(NamedTuple):
    """What the neurons are. Tensors broadcast to their shape; None: the number beside it."""

    v: Tensor | None = None
    v_value: float = 0.0
    threshold: Tensor | None = None
    threshold_value: float = 1.0
    amplitude: Tensor | None = None
    amplitude_value: float = 1.0
    input_scale: Tensor | None = None
    v_reset: float | None = None
    strict: bool = False
    spike_dtype: torch.dtype = torch.float32

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """v, threshold, amplitude, input_scale."""
        return self.v, self.threshold, self.amplitude, self.input_scale


class Grads(NamedTuple):
    """Gradients of a run's outputs; ``rate``: ``spikes`` is that of ``amplitude * count / T``."""

    spikes: Tensor | None = None
    rate: bool = False
    v: Tensor | None = None
    v_seq: Tensor | None = None
    charge_seq: Tensor | None = None


def if_forward(
    x: Tensor,
    T: int | None,
    neuron: Neuron,
    spikes: bool,
    count: bool,
    v_seq: bool,
    charge_seq: bool,
    smooth: int = -1,
    alpha: float = 1.0,
    out: Tensor | None = None,
) -> Results:
    """Runs all steps.

    ``smooth``: the surrogate whose primitive replaces the spike (float64, tests), or -1.
    ``out``: where spikes go, ``[T, *shape]`` contiguous of the spikes' dtype.
    """
    kernels = backends.choose(x.device)
    shape = x.shape[1:] if T is None else x.shape
    steps = x.shape[0] if T is None else T
    v, v_value, threshold, threshold_value, amplitude, amplitude_value = neuron[:6]
    input_scale, v_reset, strict, spike_dtype = neuron[6:]
    if kernels is None:
        surrogate = _surrogate.BY_KIND[max(smooth, 0)](alpha)
        with torch.no_grad():
            result = reference.if_forward(
                x, **_for_reference(x, neuron), T=T, surrogate=surrogate, smooth=smooth >= 0
            )
        return (
            None if not spikes else result.spikes if out is None else out.copy_(result.spikes),
            result.count if count else None,
            result.v.clone(memory_format=torch.contiguous_format),
            result.v_seq if v_seq else None,
            result.charge_seq if charge_seq else None,
        )
    x = _dense(x)
    dtype = x.dtype
    state = torch.float64 if dtype == torch.float64 else torch.float32
    N = shape.numel()
    if v is not None and v.shape == shape and v.dtype == state and v.is_contiguous():
        v_out = torch.empty_like(v)
    else:
        v_out = x.new_empty(shape) if dtype == state else x.new_empty(shape, dtype=state)
    s_out = out
    if spikes and out is None:
        same = T is None and dtype == spike_dtype
        s_out = torch.empty_like(x) if same else x.new_empty((steps, *shape), dtype=spike_dtype)
    count_out = x.new_empty(shape, dtype=torch.int32) if count else None
    v_seq_out = x.new_empty((steps, *shape), dtype=state) if v_seq else None
    charge_out = x.new_empty((steps, *shape), dtype=state) if charge_seq else None

    # Locals, so that converted operands live until the kernel has been launched.
    v_shared = None if v is None else operands.share(v, shape, state)
    th_shared = None if threshold is None else operands.share(threshold, shape, state)
    scale_shared = None if input_scale is None else operands.share(input_scale, shape, state)
    amp_shared = None
    if amplitude is not None and spike_dtype.is_floating_point:
        amp_shared = operands.share(amplitude, shape, spike_dtype)
    if N:
        options = 0
        if v_reset is not None or strict or input_scale is not None or smooth >= 0:
            options = _options(neuron, smooth >= 0, False)
        x_address, s_address = x.data_ptr(), 0 if s_out is None else s_out.data_ptr()
        vec = 1
        if kernels.gpu and not (options or v_seq or charge_seq):
            vec = _vec(x.element_size(), N, x_address, s_address)
        kernels.forward(
            params.pack_forward(
                x_address,
                s_address,
                0 if count_out is None else count_out.data_ptr(),
                v_out.data_ptr(),
                0 if v_seq_out is None else v_seq_out.data_ptr(),
                0 if charge_out is None else charge_out.data_ptr(),
                *(_pack(v_shared) if v_shared else (0, 1, 1, v_value)),
                *(_pack(th_shared) if th_shared else (0, 1, 1, threshold_value)),
                *(_pack(amp_shared) if amp_shared else (0, 1, 1, 0.0)),
                *(_pack(scale_shared) if scale_shared else (0, 1, 1, 1.0)),
                steps,
                N,
                N if T is None else 0,
                0.0 if v_reset is None else v_reset,
                alpha,
                operands.bits(amplitude_value, spike_dtype),
                DTYPE_CODES[dtype],
                spike_dtype.itemsize,
                options,
                smooth if smooth > 0 else 0,
                vec,
                0,
            ),
            x.device,
        )
    return s_out, count_out, v_out, v_seq_out, charge_out


def if_backward(
    x: Tensor,
    T: int | None,
    neuron: Neuron,
    grads: Grads,
    surrogate: int,
    alpha: float,
    detach_reset: bool,
    smooth: bool,
    needs: Sequence[bool],
) -> Gradients:
    """Gradients for x and the neuron's tensors.

    Keeps nothing of the forward pass but its inputs and recomputes the membranes.
    """
    kernels = backends.choose(x.device)
    shape = x.shape[1:] if T is None else x.shape
    steps = x.shape[0] if T is None else T
    if kernels is None or steps == 0:
        return _sums(x, *_reference_backward(x, T, neuron, grads, surrogate, alpha, detach_reset,
                                             smooth), neuron, needs)  # fmt: skip
    x = _dense(x)
    state = torch.float64 if x.dtype == torch.float64 else torch.float32
    N = shape.numel()
    v, v_value, threshold, threshold_value, amplitude, amplitude_value = neuron[:6]

    def dense(grad: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return None if grad is None else _dense(grad.to(dtype))

    grad_spikes = dense(grads.spikes, x.dtype)
    grad_v, grad_v_seq = dense(grads.v, state), dense(grads.v_seq, state)
    grad_charge_seq = dense(grads.charge_seq, state)
    v_shared = None if v is None else operands.share(v, shape, state)
    th_shared = None if threshold is None else operands.share(threshold, shape, state)
    scale = neuron.input_scale
    scale_shared = None if scale is None else operands.share(scale, shape, state)
    amp_shared = None
    if amplitude is not None and neuron.spike_dtype.is_floating_point:
        amp_shared = operands.share(amplitude.detach().to(neuron.spike_dtype), shape, state)

    grad_x = torch.empty_like(x) if needs[0] else None
    per_neuron = [x.new_empty(shape, dtype=state) if need else None for need in needs[1:]]
    if N:
        options = _options(neuron, smooth, detach_reset)
        vec, scratch = 1, None
        if kernels.gpu:
            traces = grad_v_seq is not None or grad_charge_seq is not None
            general = options & ~params.DETACH_RESET or T is not None or needs[2] or needs[3]
            if not general and not traces:
                aligned = [t.data_ptr() for t in (x, grad_spikes, grad_x) if t is not None]
                vec = _vec(state.itemsize, N, *aligned)
            scratch = x.new_empty((max((steps - 1) // params.CHUNK, 0), *shape), dtype=state)
        tensors = (x, grad_spikes, grad_v, grad_v_seq, grad_charge_seq, grad_x, *per_neuron)
        kernels.backward(
            params.pack_backward(
                *(0 if t is None else t.data_ptr() for t in (*tensors, scratch)),
                *(_pack(v_shared) if v_shared else (0, 1, 1, v_value)),
                *(_pack(th_shared) if th_shared else (0, 1, 1, threshold_value)),
                *(
                    _pack(amp_shared)
                    if amp_shared
                    else (0, 1, 1, operands.rounded(amplitude_value, neuron.spike_dtype))
                ),
                *(_pack(scale_shared) if scale_shared else (0, 1, 1, 1.0)),
                steps,
                N,
                N if T is None else 0,
                0 if grads.rate else N,
                0.0 if neuron.v_reset is None else neuron.v_reset,
                alpha,
                1.0 / steps if grads.rate else 1.0,
                DTYPE_CODES[x.dtype],
                options,
                surrogate,
                vec,
            ),
            x.device,
        )
    return _sums(x, grad_x, per_neuron, neuron, needs)


def differentiable_backward(
    x: Tensor,
    T: int | None,
    neuron: Neuron,
    grads: Grads,
    surrogate: int,
    alpha: float,
    detach_reset: bool,
    smooth: bool,
    needs: Sequence[bool],
) -> Gradients:
    """:func:`if_backward` by autograd through the reference: can be differentiated again."""
    with torch.enable_grad():
        # view_as: inputs of this small graph that are still connected to the outer one.
        leaves = [
            None if t is None else (t.view_as(t) if t.requires_grad else t.detach())
            for t in (x, *neuron.tensors)
        ]
        for leaf, need in zip(leaves, needs, strict=True):
            if leaf is not None and need and not leaf.requires_grad:
                leaf.requires_grad_()
        x_leaf, v, threshold, amplitude, input_scale = leaves
        assert x_leaf is not None
        inside = neuron._replace(
            v=v, threshold=threshold, amplitude=amplitude, input_scale=input_scale
        )
        result = reference.if_forward(
            x_leaf,
            **_for_reference(x, inside),
            T=T,
            surrogate=_surrogate.BY_KIND[surrogate](alpha),
            detach_reset=detach_reset,
            smooth=smooth,
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
    result_grads = []
    for leaf, need in zip(leaves, needs, strict=True):
        if leaf is None or not need:
            result_grads.append(x.new_empty(0))
        else:
            grad = next(by_leaf)
            result_grads.append(torch.zeros_like(leaf) if grad is None else grad)
    return tuple(result_grads)  # type: ignore[return-value]


def _reference_backward(
    x: Tensor,
    T: int | None,
    neuron: Neuron,
    grads: Grads,
    surrogate: int,
    alpha: float,
    detach_reset: bool,
    smooth: bool,
) -> tuple[Tensor, Sequence[Tensor]]:
    spikes = grads.spikes
    if spikes is not None and grads.rate:
        steps = x.shape[0] if T is None else T
        spikes = (spikes.to(reference.state_dtype(x.dtype)) / steps).expand(steps, *spikes.shape)
    with torch.no_grad():
        grad_x, *per_neuron = reference.if_backward(
            x,
            **_for_reference(x, neuron),
            grad_spikes=spikes,
            grad_v=grads.v,
            grad_v_seq=grads.v_seq,
            grad_charge_seq=grads.charge_seq,
            T=T,
            surrogate=_surrogate.BY_KIND[surrogate](alpha),
            detach_reset=detach_reset,
            smooth=smooth,
        )
    return grad_x.to(x.dtype), per_neuron


def _for_reference(x: Tensor, neuron: Neuron) -> dict[str, Any]:
    """The neuron's part of the reference's arguments: numbers become tensors."""

    state = reference.state_dtype(x.dtype)

    def tensor(given: Tensor | None, number: float) -> Tensor:
        if given is not None:
            return given
        # Filled on the device (torch.tensor would copy from the host and wait), and rounded before:
        # filling refuses what rounds to the largest float32.
        return x.new_full((), operands.rounded(number, state), dtype=state)

    amplitude = operands.rounded(neuron.amplitude_value, neuron.spike_dtype)
    v_reset = None if neuron.v_reset is None else operands.rounded(neuron.v_reset, state)
    return {
        "v": tensor(neuron.v, neuron.v_value),
        "threshold": tensor(neuron.threshold, neuron.threshold_value),
        "amplitude": tensor(neuron.amplitude, amplitude),
        "input_scale": neuron.input_scale,
        "v_reset": v_reset,
        "strict": neuron.strict,
        "spike_dtype": neuron.spike_dtype,
    }


def _options(neuron: Neuron, smooth: bool, detach: bool) -> int:
    return (
        (params.STRICT if neuron.strict else 0)
        | (params.HARD_RESET if neuron.v_reset is not None else 0)
        | (params.INPUT_SCALE if neuron.input_scale is not None else 0)
        | (params.SMOOTH if smooth else 0)
        | (params.DETACH_RESET if detach else 0)
    )


def _vec(element: int, N: int, *pointers: int) -> int:
    """Neurons per GPU thread: ``16 // element`` when every row starts on 16 bytes, else 1."""
    vec = 16 // element
    return vec if N % vec == 0 and not any(p % 16 for p in pointers) else 1


def _pack(shared: operands.Shared) -> tuple[int, int, int, float]:
    tensor, inner, elements = shared
    return (tensor.data_ptr(), inner, elements, 0.0)


def _dense(x: Tensor) -> Tensor:
    """``x`` contiguous and aligned to its element size."""
    if not x.is_contiguous():
        x = x.contiguous()
    return x if x.data_ptr() % x.element_size() == 0 else x.clone()


def _sums(
    x: Tensor,
    grad_x: Tensor | None,
    per_neuron: Sequence[Tensor | None],
    neuron: Neuron,
    needs: Sequence[bool],
) -> Gradients:
    """Gradients in the shapes of what they are for; empty where not needed."""
    grads = [grad_x if grad_x is not None and needs[0] else x.new_empty(0)]
    for grad, like, need in zip(per_neuron, neuron.tensors, needs[1:], strict=True):
        present = need and grad is not None and like is not None
        grads.append(_reduced(grad, like) if present else x.new_empty(0))  # type: ignore[arg-type]
    return tuple(grads)  # type: ignore[return-value]


def _reduced(per_neuron: Tensor, like: Tensor) -> Tensor:
    """Sums a per-neuron gradient over the neurons that share an element of ``like``.

    On CPUs through NumPy, whose sum runs on one thread in a fixed order: torch's depends on the
    number of threads. float64 inside, so that the order hardly matters for the value either.
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
