"""The two torch operators: schemas, fakes, and the one implementation behind every device.

``if_forward`` and ``if_backward`` here are plain functions that allocate outputs, pick an
implementation and run it; the operators ``torch.ops.snnkernels.*`` wrap them for torch.compile,
export and tensor subclasses. Operands broadcast to the neurons' shape; a missing tensor operand
means the number beside it. Outputs not asked for are empty tensors: the arity is fixed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .. import surrogate as _surrogate
from . import backends, operands, params, reference
from .params import DTYPE_CODES

# spikes, count, v, v_seq, charge_seq; the operators return empty tensors for None.
Results = tuple[Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor | None]
_Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

_INPUTS = (
    "Tensor x, int? T, Tensor? v, float v_value, Tensor? threshold, float threshold_value, "
    "Tensor? amplitude, float amplitude_value, Tensor? input_scale, float? v_reset, bool strict"
)
# Kept for the life of the process: its end would unregister the operators.
_LIBRARY = torch.library.Library("snnkernels", "DEF")
_LIBRARY.define(
    f"if_forward({_INPUTS}, ScalarType spike_dtype, bool spikes, bool count, bool v_seq, "
    "bool charge_seq, int smooth, float alpha) "
    "-> (Tensor spikes, Tensor count, Tensor v, Tensor v_seq, Tensor charge_seq)"
)
_LIBRARY.define(
    f"if_backward({_INPUTS}, ScalarType spike_dtype, Tensor? grad_spikes, bool rate, "
    "Tensor? grad_v, Tensor? grad_v_seq, Tensor? grad_charge_seq, int surrogate, float alpha, "
    "bool detach_reset, bool smooth, bool[5] needs) -> (Tensor grad_x, Tensor grad_v_init, "
    "Tensor grad_threshold, Tensor grad_amplitude, Tensor grad_input_scale)"
)


def _options(
    v_reset: float | None, strict: bool, input_scale: Tensor | None, smooth: bool, detach: bool
) -> int:
    return (
        (params.STRICT if strict else 0)
        | (params.HARD_RESET if v_reset is not None else 0)
        | (params.INPUT_SCALE if input_scale is not None else 0)
        | (params.SMOOTH if smooth else 0)
        | (params.DETACH_RESET if detach else 0)
    )


def _vec(element: int, N: int, *pointers: int) -> int:
    """Neurons per GPU thread: ``16 // element`` when every row starts on 16 bytes, else 1."""
    vec = 16 // element
    return vec if N % vec == 0 and not any(p % 16 for p in pointers) else 1


def _pack(shared: operands.Shared | None, number: float) -> tuple[int, int, int, float]:
    if shared is None:
        return (0, 1, 1, number)
    tensor, inner, elements = shared
    return (tensor.data_ptr(), inner, elements, 0.0)


def _dense(x: Tensor) -> Tensor:
    """``x`` contiguous and aligned to its element size."""
    if not x.is_contiguous():
        x = x.contiguous()
    return x if x.data_ptr() % x.element_size() == 0 else x.clone()


def if_forward(
    x: Tensor,
    T: int | None,
    v: Tensor | None,
    v_value: float,
    threshold: Tensor | None,
    threshold_value: float,
    amplitude: Tensor | None,
    amplitude_value: float,
    input_scale: Tensor | None,
    v_reset: float | None,
    strict: bool,
    spike_dtype: torch.dtype,
    spikes: bool,
    count: bool,
    v_seq: bool,
    charge_seq: bool,
    smooth: int = -1,
    alpha: float = 1.0,
    out: Tensor | None = None,
) -> Results:
    """Runs the neurons; see :func:`snnkernels.functional.if_multi_step` for the arguments.

    ``smooth``: the surrogate whose primitive replaces the spike (float64, tests), or -1.
    ``out``: where spikes go, ``[T, *shape]`` contiguous of ``spike_dtype``.
    """
    kernels = backends.choose(x.device)
    shape = x.shape[1:] if T is None else x.shape
    steps = x.shape[0] if T is None else T
    if kernels is None:
        return _reference_forward(
            x, T, v, v_value, threshold, threshold_value, amplitude, amplitude_value, input_scale,
            v_reset, strict, spike_dtype, spikes, count, v_seq, charge_seq, smooth, alpha, out,
        )  # fmt: skip
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
            options = _options(v_reset, strict, input_scale, smooth >= 0, False)
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
                *(_pack(v_shared, v_value) if v_shared else (0, 1, 1, v_value)),
                *(_pack(th_shared, 0.0) if th_shared else (0, 1, 1, threshold_value)),
                *(_pack(amp_shared, 0.0) if amp_shared else (0, 1, 1, 0.0)),
                *(_pack(scale_shared, 0.0) if scale_shared else (0, 1, 1, 1.0)),
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


def _operand(tensor: Tensor | None, number: float, x: Tensor) -> Tensor:
    if tensor is not None:
        return tensor
    # Filled on the device: torch.tensor would copy from the host and wait.
    return x.new_full((), number, dtype=reference.state_dtype(x.dtype))


def _reference_forward(
    x: Tensor,
    T: int | None,
    v: Tensor | None,
    v_value: float,
    threshold: Tensor | None,
    threshold_value: float,
    amplitude: Tensor | None,
    amplitude_value: float,
    input_scale: Tensor | None,
    v_reset: float | None,
    strict: bool,
    spike_dtype: torch.dtype,
    spikes: bool,
    count: bool,
    v_seq: bool,
    charge_seq: bool,
    smooth: int,
    alpha: float,
    out: Tensor | None,
) -> Results:
    with torch.no_grad():
        result = reference.if_forward(
            x,
            _operand(v, v_value, x),
            _operand(threshold, threshold_value, x),
            _amplitude(amplitude, amplitude_value, x, spike_dtype),
            T=T,
            input_scale=input_scale,
            v_reset=v_reset,
            strict=strict,
            spike_dtype=spike_dtype,
            surrogate=_surrogate.BY_KIND[max(smooth, 0)](alpha),
            smooth=smooth >= 0,
        )
    s_out = None
    if spikes:
        s_out = result.spikes if out is None else out.copy_(result.spikes)
    return (
        s_out,
        result.count if count else None,
        result.v.clone(memory_format=torch.contiguous_format),
        result.v_seq if v_seq else None,
        result.charge_seq if charge_seq else None,
    )


def _amplitude(tensor: Tensor | None, number: float, x: Tensor, spike_dtype: torch.dtype) -> Tensor:
    if tensor is not None:
        return tensor
    # float64 holds what was rounded once to the type of the spikes.
    number = operands.rounded(number, spike_dtype)
    return x.new_full((), number, dtype=torch.float64)


def _reduced(per_neuron: Tensor, like: Tensor) -> Tensor:
    """Sums a per-neuron gradient over the neurons that share an element of ``like``.

    On CPUs through NumPy, whose sum runs on one thread in a fixed order: torch's depends on the
    number of threads. float64 inside, so that the order hardly matters for the value either.
    """
    dims = tuple(
        i
        for i, n in enumerate(per_neuron.shape)
        if i < per_neuron.dim() - like.dim() or like.shape[i - per_neuron.dim() + like.dim()] == 1
    )
    dims = tuple(i for i in dims if per_neuron.shape[i] != 1)
    if not dims:
        return per_neuron.reshape(like.shape).to(like.dtype)
    if per_neuron.device.type == "cpu":
        total = torch.from_numpy(
            np.asarray(per_neuron.numpy().sum(axis=dims, dtype=np.float64)).copy()
        )
    else:
        total = per_neuron.sum(dims, dtype=torch.float64)
    return total.reshape(like.shape).to(like.dtype)


def if_backward(
    x: Tensor,
    T: int | None,
    v: Tensor | None,
    v_value: float,
    threshold: Tensor | None,
    threshold_value: float,
    amplitude: Tensor | None,
    amplitude_value: float,
    input_scale: Tensor | None,
    v_reset: float | None,
    strict: bool,
    spike_dtype: torch.dtype,
    grad_spikes: Tensor | None,
    rate: bool,
    grad_v: Tensor | None,
    grad_v_seq: Tensor | None,
    grad_charge_seq: Tensor | None,
    surrogate: int,
    alpha: float,
    detach_reset: bool,
    smooth: bool,
    needs: list[bool],
) -> _Five:
    """Gradients for x, v, threshold, amplitude and input_scale; those not needed are empty.

    Keeps nothing of the forward pass but its inputs and recomputes the membranes. ``rate``:
    ``grad_spikes`` is ``[*shape]``, the gradient of ``amplitude * count / T``.
    """
    kernels = backends.choose(x.device)
    shape = x.shape[1:] if T is None else x.shape
    steps = x.shape[0] if T is None else T
    if kernels is None or steps == 0:
        if grad_spikes is not None and rate:
            grad_spikes = (grad_spikes.to(reference.state_dtype(x.dtype)) / steps).expand(
                steps, *shape
            )
        with torch.no_grad():
            found = reference.if_backward(
                x,
                _operand(v, v_value, x),
                _operand(threshold, threshold_value, x),
                _amplitude(amplitude, amplitude_value, x, spike_dtype),
                grad_spikes=grad_spikes,
                grad_v=grad_v,
                grad_v_seq=grad_v_seq,
                grad_charge_seq=grad_charge_seq,
                T=T,
                input_scale=input_scale,
                v_reset=v_reset,
                strict=strict,
                spike_dtype=spike_dtype,
                surrogate=_surrogate.BY_KIND[surrogate](alpha),
                detach_reset=detach_reset,
                smooth=smooth,
            )
        return _sums(
            x, found[0].to(x.dtype), found[1:], (v, threshold, amplitude, input_scale), needs
        )
    x = _dense(x)
    state = torch.float64 if x.dtype == torch.float64 else torch.float32
    N = shape.numel()

    def dense(grad: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return None if grad is None else _dense(grad.to(dtype))

    grad_spikes = dense(grad_spikes, x.dtype)
    grad_v, grad_v_seq = dense(grad_v, state), dense(grad_v_seq, state)
    grad_charge_seq = dense(grad_charge_seq, state)
    v_shared = None if v is None else operands.share(v, shape, state)
    th_shared = None if threshold is None else operands.share(threshold, shape, state)
    scale_shared = None if input_scale is None else operands.share(input_scale, shape, state)
    amp_shared = None
    if amplitude is not None and spike_dtype.is_floating_point:
        amp_shared = operands.share(amplitude.detach().to(spike_dtype), shape, state)

    grad_x = torch.empty_like(x) if needs[0] else None
    per_neuron = [x.new_empty(shape, dtype=state) if need else None for need in needs[1:]]
    if N:
        options = _options(v_reset, strict, input_scale, smooth, detach_reset)
        vec, scratch = 1, None
        if kernels.gpu:
            plain = not (
                options & ~params.DETACH_RESET
                or T is not None
                or needs[2]
                or needs[3]
                or grad_v_seq is not None
                or grad_charge_seq is not None
            )
            if plain:
                aligned = [t.data_ptr() for t in (x, grad_spikes, grad_x) if t is not None]
                vec = _vec(state.itemsize, N, *aligned)
            scratch = x.new_empty((max((steps - 1) // params.CHUNK, 0), *shape), dtype=state)
        addresses = [
            0 if t is None else t.data_ptr()
            for t in (x, grad_spikes, grad_v, grad_v_seq, grad_charge_seq, grad_x, *per_neuron)
        ]
        kernels.backward(
            params.pack_backward(
                *addresses,
                0 if scratch is None else scratch.data_ptr(),
                *_pack(v_shared, v_value),
                *_pack(th_shared, threshold_value),
                *_pack(amp_shared, operands.rounded(amplitude_value, spike_dtype)),
                *_pack(scale_shared, 1.0),
                steps,
                N,
                N if T is None else 0,
                0 if rate else N,
                0.0 if v_reset is None else v_reset,
                alpha,
                1.0 / steps if rate else 1.0,
                DTYPE_CODES[x.dtype],
                options,
                surrogate,
                vec,
            ),
            x.device,
        )
    return _sums(x, grad_x, per_neuron, (v, threshold, amplitude, input_scale), needs)


def _sums(
    x: Tensor,
    grad_x: Tensor | None,
    per_neuron: Sequence[Tensor | None],
    likes: Sequence[Tensor | None],
    needs: list[bool],
) -> _Five:
    """Gradients in the shapes of what they are for; empty where not needed."""
    grads = [grad_x if grad_x is not None and needs[0] else x.new_empty(0)]
    for grad, like, need in zip(per_neuron, likes, needs[1:], strict=True):
        present = need and grad is not None and like is not None
        grads.append(_reduced(grad, like) if present else x.new_empty(0))  # type: ignore[arg-type]
    return tuple(grads)  # type: ignore[return-value]


def differentiable_backward(
    x: Tensor,
    T: int | None,
    v: Tensor | None,
    v_value: float,
    threshold: Tensor | None,
    threshold_value: float,
    amplitude: Tensor | None,
    amplitude_value: float,
    input_scale: Tensor | None,
    v_reset: float | None,
    strict: bool,
    spike_dtype: torch.dtype,
    grad_spikes: Tensor | None,
    rate: bool,
    grad_v: Tensor | None,
    grad_v_seq: Tensor | None,
    grad_charge_seq: Tensor | None,
    surrogate: int,
    alpha: float,
    detach_reset: bool,
    smooth: bool,
    needs: list[bool],
) -> _Five:
    """:func:`if_backward` by autograd through the reference: can be differentiated again."""
    given = (x, v, threshold, amplitude, input_scale)
    with torch.enable_grad():
        # view_as: inputs of this small graph that are still connected to the outer one.
        leaves = [
            None if t is None else (t.view_as(t) if t.requires_grad else t.detach()) for t in given
        ]
        for leaf, need in zip(leaves, needs, strict=True):
            if leaf is not None and need and not leaf.requires_grad:
                leaf.requires_grad_()
        x_leaf = leaves[0]
        assert x_leaf is not None
        result = reference.if_forward(
            x_leaf,
            _operand(leaves[1], v_value, x),
            _operand(leaves[2], threshold_value, x),
            _amplitude(leaves[3], amplitude_value, x, spike_dtype),
            T=T,
            input_scale=leaves[4],
            v_reset=v_reset,
            strict=strict,
            spike_dtype=spike_dtype,
            surrogate=_surrogate.BY_KIND[surrogate](alpha),
            detach_reset=detach_reset,
            smooth=smooth,
        )
        spikes = result.spikes.to(x.dtype)
        out = spikes.to(result.v.dtype).mean(0).to(x.dtype) if rate else spikes
        pairs = [
            (o, g)
            for o, g in (
                (out, grad_spikes),
                (result.v, grad_v),
                (result.v_seq, grad_v_seq),
                (result.charge_seq, grad_charge_seq),
            )
            if g is not None and o.requires_grad
        ]
        wanted = [
            leaf for leaf, need in zip(leaves, needs, strict=True) if leaf is not None and need
        ]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs],
                wanted,
                [g.to(o.dtype) for o, g in pairs],
                create_graph=True,
                allow_unused=True,
            )
            if pairs
            else [None] * len(wanted)
        )
    grads = []
    for leaf, need in zip(leaves, needs, strict=True):
        if leaf is None or not need:
            grads.append(x.new_empty(0))
            continue
        grad = next(found)
        grads.append(torch.zeros_like(leaf) if grad is None else grad)
    return tuple(grads)  # type: ignore[return-value]


def _if_forward_op(x: Tensor, *args: object) -> _Five:
    spikes, count, v, v_seq, charge_seq = if_forward(x, *args)  # type: ignore[arg-type]
    return (
        v.new_empty(0) if spikes is None else spikes,
        v.new_empty(0, dtype=torch.int32) if count is None else count,
        v,
        v.new_empty(0) if v_seq is None else v_seq,
        v.new_empty(0) if charge_seq is None else charge_seq,
    )


def _if_backward_op(*args: object) -> _Five:
    return tuple(g.contiguous() for g in if_backward(*args))  # type: ignore[arg-type, return-value]


for _name, _run in (("if_forward", _if_forward_op), ("if_backward", _if_backward_op)):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    # Gradients come from the autograd.Function around the operator. Falling through makes a call
    # that bypasses it fail loudly in backward instead of giving no gradient.
    _LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("snnkernels::if_forward")
def _if_forward_fake(
    x: Tensor,
    T: int | None,
    v: Tensor | None,
    v_value: float,
    threshold: Tensor | None,
    threshold_value: float,
    amplitude: Tensor | None,
    amplitude_value: float,
    input_scale: Tensor | None,
    v_reset: float | None,
    strict: bool,
    spike_dtype: torch.dtype,
    spikes: bool,
    count: bool,
    v_seq: bool,
    charge_seq: bool,
    smooth: int,
    alpha: float,
) -> _Five:
    shape = x.shape[1:] if T is None else x.shape
    full = (x.shape[0] if T is None else T, *shape)
    state = reference.state_dtype(x.dtype)
    return (
        x.new_empty(full if spikes else (0,), dtype=spike_dtype if spikes else state),
        x.new_empty(shape if count else (0,), dtype=torch.int32),
        x.new_empty(shape, dtype=state),
        x.new_empty(full if v_seq else (0,), dtype=state),
        x.new_empty(full if charge_seq else (0,), dtype=state),
    )


@torch.library.register_fake("snnkernels::if_backward")
def _if_backward_fake(
    x: Tensor,
    T: int | None,
    v: Tensor | None,
    v_value: float,
    threshold: Tensor | None,
    threshold_value: float,
    amplitude: Tensor | None,
    amplitude_value: float,
    input_scale: Tensor | None,
    v_reset: float | None,
    strict: bool,
    spike_dtype: torch.dtype,
    grad_spikes: Tensor | None,
    rate: bool,
    grad_v: Tensor | None,
    grad_v_seq: Tensor | None,
    grad_charge_seq: Tensor | None,
    surrogate: int,
    alpha: float,
    detach_reset: bool,
    smooth: bool,
    needs: list[bool],
) -> _Five:
    likes = (x, v, threshold, amplitude, input_scale)
    return tuple(
        x.new_empty(like.shape, dtype=like.dtype) if need and like is not None else x.new_empty(0)
        for like, need in zip(likes, needs, strict=True)
    )  # type: ignore[return-value]
