"""Integrate-and-fire neurons over many time steps, as functions with explicit state.

One neuron, one step (OPI, Bu et al., AAAI 2022; QCFS, Bu et al., ICLR 2022, eq. 1-4)::

    m = v + x[t]                  charge
    s = m >= v_threshold          fire
    v = m - v_threshold * s       reset by subtraction (v_reset given: v = v_reset after a spike)
    spikes[t] = amplitude * s

All steps run in one kernel launch. Given the same current every back end returns the same bits.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor

from . import surrogate as _surrogate
from .kernels import operands, ops, reference, run
from .kernels.run import Neuron
from .maps import (
    bit_planes,
    cumulative_max_pool,
    dsr_backward,
    histogram_update,
    mmse_errors,
    mmse_threshold,
    pack_bits,
    popcount,
    qcfs,
    ttfs_decode,
    ttfs_encode,
    unpack_bits,
)

__all__ = [
    "bit_planes",
    "cumulative_max_pool",
    "dsr_backward",
    "histogram_update",
    "if_count",
    "if_multi_step",
    "if_rate",
    "if_step",
    "mmse_errors",
    "mmse_threshold",
    "pack_bits",
    "popcount",
    "qcfs",
    "ttfs_decode",
    "ttfs_encode",
    "unpack_bits",
]

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_PLAIN = (Tensor, torch.nn.Parameter)
_Number = float | int


class _Config(NamedTuple):
    """What a run is told besides tensors; ``neuron`` holds its numbers."""

    T: int | None
    neuron: Neuron
    spikes: bool
    count: bool  # type: ignore[assignment]
    v_seq: bool
    charge_seq: bool
    rate: bool
    surrogate: _surrogate.Surrogate
    detach_reset: bool


def if_multi_step(
    x_seq: Tensor,
    v: Tensor | _Number | str = 0.0,
    v_threshold: Tensor | _Number = 1.0,
    v_reset: _Number | None = None,
    surrogate_function: Any = None,
    detach_reset: bool = False,
    store_v_seq: bool = False,
    *,
    T: int | None = None,
    channel_dim: int | None = None,
    amplitude: Tensor | _Number | str | None = None,
    input_scale: Tensor | _Number | None = None,
    tie: str = ">=",
    spike_dtype: torch.dtype | None = None,
    store_charge_seq: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Runs integrate-and-fire neurons for all time steps in one launch.

    Args:
        x_seq: input current ``[T, *shape]``, float32, float64, float16 or bfloat16. With ``T=n``
            given it is ``[*shape]``, a current held constant for n steps and never expanded.
        v: membrane before the first step: a number, a tensor that broadcasts to ``shape``, or
            ``"half"`` for half the threshold (OPI).
        v_threshold: threshold, positive and finite: a number, or a tensor that is scalar, per
            channel (with ``channel_dim``) or broadcasts to ``shape``.
        v_reset: ``None`` resets by subtraction; a number is what v becomes after a spike.
        surrogate_function: derivative used for spikes in the backward pass: ``None`` (ATan, alpha
            2), ``"atan"``, ``"sigmoid"``, ``"triangle"``, ``"rectangle"``, or an object of
            :mod:`snnkernels.surrogate` or SpikingJelly.
        detach_reset: no gradient through the spike in the reset.
        store_v_seq: also return the membranes after each step.
        T: number of steps of a constant current.
        channel_dim: dimension of ``shape`` (counted without T) along which 1-D ``v``,
            ``v_threshold``, ``amplitude`` and ``input_scale`` are per channel.
        amplitude: what a spike weighs: ``None`` (1), a number, a tensor as for ``v_threshold``, or
            ``"threshold"``. Rounded once to ``spike_dtype``.
        input_scale: ``m = v + round(x * input_scale)``; for neurons in units of their threshold.
        tie: ``">="`` fires at the threshold, ``">"`` only above.
        spike_dtype: dtype of the spikes: that of ``x_seq`` (default) or ``torch.uint8``, which
            holds 0 and 1 whatever the amplitude and carries no gradient; an amplitude given rides
            along as the attribute ``amplitude`` (not under torch.compile).
        store_charge_seq: return the membranes before each reset instead of ``v_seq``.
        out: where the spikes go: contiguous ``[T, *shape]`` of ``spike_dtype``; not with gradients.

    Returns:
        ``(spikes, v, v_seq)``: spikes ``[T, *shape]``; the final membrane ``[*shape]``; and the
        membranes ``[T, *shape]`` after (``store_v_seq``) or before (``store_charge_seq``) reset, or
        ``None``. Membranes are float32, float64 for float64 inputs.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a value out of range or a shape that does not fit; the message names it.
    """
    if store_v_seq and store_charge_seq:
        raise ValueError("store_v_seq and store_charge_seq exclude each other")
    spikes, _, v_last, v_seq, charge_seq = _run(
        x_seq, v, v_threshold, v_reset, surrogate_function, detach_reset, T, channel_dim, amplitude,
        input_scale, tie, spike_dtype, True, False, store_v_seq, store_charge_seq, False, out,
    )  # fmt: skip
    return spikes, v_last, v_seq if store_v_seq else charge_seq if store_charge_seq else None


def if_count(
    x_seq: Tensor,
    v: Tensor | _Number | str = 0.0,
    v_threshold: Tensor | _Number = 1.0,
    v_reset: _Number | None = None,
    *,
    T: int | None = None,
    channel_dim: int | None = None,
    input_scale: Tensor | _Number | None = None,
    tie: str = ">=",
    surrogate_function: Any = None,
    detach_reset: bool = False,
) -> tuple[Tensor, Tensor]:
    """Counts spikes without a ``[T, ...]`` tensor; arguments as in :func:`if_multi_step`.

    Returns:
        ``(count, v)``: int32 spike counts and final membranes, both ``[*shape]``. Gradients flow
        through ``v`` only; :func:`if_rate` is the differentiable form.
    """
    _, count, v_last, _, _ = _run(
        x_seq, v, v_threshold, v_reset, surrogate_function, detach_reset, T, channel_dim, None,
        input_scale, tie, None, False, True, False, False, False, None,
    )  # fmt: skip
    return count, v_last


def if_rate(
    x_seq: Tensor,
    v: Tensor | _Number | str = 0.0,
    v_threshold: Tensor | _Number = 1.0,
    v_reset: _Number | None = None,
    *,
    T: int | None = None,
    channel_dim: int | None = None,
    amplitude: Tensor | _Number | str | None = None,
    input_scale: Tensor | _Number | None = None,
    tie: str = ">=",
    surrogate_function: Any = None,
    detach_reset: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mean output ``amplitude * count / T`` without a ``[T, ...]`` tensor, differentiable.

    Arguments as in :func:`if_multi_step`.

    Returns:
        ``(rate, v)``, both ``[*shape]``; the rate has the dtype of ``x_seq``.

    Raises:
        ValueError: also when ``x_seq`` has no time steps.
    """
    rate, _, v_last, _, _ = _run(
        x_seq, v, v_threshold, v_reset, surrogate_function, detach_reset, T, channel_dim, amplitude,
        input_scale, tie, None, False, True, False, False, True, None,
    )  # fmt: skip
    return rate, v_last


def if_step(
    x: Tensor,
    v: Tensor | _Number | str = 0.0,
    v_threshold: Tensor | _Number = 1.0,
    v_reset: _Number | None = None,
    surrogate_function: Any = None,
    detach_reset: bool = False,
    *,
    channel_dim: int | None = None,
    amplitude: Tensor | _Number | str | None = None,
    input_scale: Tensor | _Number | None = None,
    tie: str = ">=",
    spike_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """One time step: current ``[*shape]`` in, ``(spikes, v)`` out, both ``[*shape]``.

    Arguments as in :func:`if_multi_step`.
    """
    spikes, _, v_last, _, _ = _run(
        x, v, v_threshold, v_reset, surrogate_function, detach_reset, 1, channel_dim, amplitude,
        input_scale, tie, spike_dtype, True, False, False, False, False, None,
    )  # fmt: skip
    return first_step(spikes), v_last


def first_step(spikes: Tensor) -> Tensor:
    """The only row of ``spikes``, with the amplitude that integer spikes carry along."""
    row = spikes[0]
    if spikes.dtype == torch.uint8 and hasattr(spikes, "amplitude"):
        row.amplitude = spikes.amplitude  # type: ignore[attr-defined]
    return row


def _run(
    x: Tensor,
    v: Any,
    v_threshold: Any,
    v_reset: Any,
    surrogate_function: Any,
    detach_reset: bool,
    T: int | None,
    channel_dim: int | None,
    amplitude: Any,
    input_scale: Any,
    tie: str,
    spike_dtype: torch.dtype | None,
    spikes: bool,
    count: bool,
    v_seq: bool,
    charge_seq: bool,
    rate: bool,
    out: Tensor | None,
) -> Any:
    """Checks the arguments, then takes the shortest way to a kernel that they allow."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x_seq must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in _FLOATS:
        raise TypeError(
            f"x_seq has dtype {x.dtype}; allowed are float32, float64, float16 and bfloat16"
        )
    if T is None:
        if x.dim() == 0:
            raise ValueError("x_seq has no dimensions; it is [T, *shape], or [*shape] with T=n")
        shape = x.shape[1:]
        if rate and x.shape[0] == 0:
            raise ValueError("x_seq has no time steps: a rate of no steps is undefined")
    else:
        if not isinstance(T, (int, torch.SymInt)) or isinstance(T, bool):
            raise TypeError(f"T={T!r} must be an int")
        if T < 1:
            raise ValueError(f"T={T} must be at least 1")
        shape = x.shape
    if tie != ">=" and tie != ">":
        raise ValueError(f"tie={tie!r} is unknown; allowed are '>=' and '>'")
    if spike_dtype is None:
        spike_dtype = x.dtype
    elif spike_dtype != x.dtype and spike_dtype != torch.uint8:
        raise ValueError(
            f"spike_dtype={spike_dtype} is not offered for {x.dtype} input; allowed are {x.dtype} "
            "and torch.uint8"
        )
    if v_reset is not None:
        v_reset = operands.number("v_reset", v_reset)
        if math.isinf(v_reset):
            raise ValueError(f"v_reset={v_reset!r} must be finite or None")
    if surrogate_function is not None:
        surrogate_function = _surrogate.resolve(surrogate_function)
    if channel_dim is not None and type(channel_dim) is not int:
        raise TypeError(f"channel_dim={channel_dim!r} must be an int or None")

    compiling = torch.compiler.is_compiling()
    th, th_value = _operand("v_threshold", v_threshold, shape, channel_dim, x)
    if th is not None:
        if not compiling:
            operands.check_threshold(th)
    elif not 0.0 < th_value < math.inf:
        raise ValueError(f"v_threshold={th_value!r} must be positive and finite")
    if isinstance(v, str):
        if v != "half":
            raise ValueError(f"v={v!r} is unknown; the only string allowed is 'half'")
        v_tensor, v_value = (None, th_value / 2) if th is None else (th * 0.5, 0.0)
    else:
        v_tensor, v_value = _operand("v", v, shape, channel_dim, x)
    if amplitude is None:
        amp, amp_value = None, 1.0
    elif isinstance(amplitude, str):
        if amplitude != "threshold":
            raise ValueError(
                f"amplitude={amplitude!r} is unknown; the only string allowed is 'threshold'"
            )
        amp, amp_value = th, th_value
    else:
        amp, amp_value = _operand("amplitude", amplitude, shape, channel_dim, x)
    scale = None
    if input_scale is not None:
        scale, scale_value = _operand("input_scale", input_scale, shape, channel_dim, x)
        if scale is None:
            state = reference.state_dtype(x.dtype)
            scale = x.new_full((), operands.rounded(scale_value, state), dtype=state)

    needs_grad = torch.is_grad_enabled() and (
        x.requires_grad
        or (v_tensor is not None and v_tensor.requires_grad)
        or (th is not None and th.requires_grad)
        or (amp is not None and amp.requires_grad)
        or (scale is not None and scale.requires_grad)
    )
    if out is not None:
        _check_out(out, x, shape, T, spike_dtype, needs_grad)
        read = {"x_seq": x, "v": v_tensor, "v_threshold": th, "amplitude": amp}
        _check_no_overlap(out, {**read, "input_scale": scale})
    strict = tie == ">"
    if not needs_grad and not rate:
        neuron = Neuron(
            v_tensor, v_value, th, th_value, amp, amp_value, scale, v_reset, strict, spike_dtype
        )
        if compiling or _through_operator(x):
            result = ops.if_forward(x, T, *neuron, spikes, count, v_seq, charge_seq, -1, 1.0)
            if out is not None:
                out.copy_(result[0])
                result = (out, *result[1:])
        else:
            result = run.if_forward(x, T, neuron, spikes, count, v_seq, charge_seq, out=out)
    else:
        numbers = Neuron(
            None, v_value, None, th_value, None, amp_value, None, v_reset, strict, spike_dtype
        )
        surrogate = _surrogate.resolve(surrogate_function)
        config = _Config(
            T, numbers, spikes, count, v_seq, charge_seq, rate, surrogate, bool(detach_reset)
        )
        result = _IntegrateAndFire.apply(*_distinct(x, v_tensor, th, amp, scale), config)
    if spikes and spike_dtype == torch.uint8 and amplitude is not None and not compiling:
        result[0].amplitude = amp_value if amp is None else amp
    return result


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


def _operand(
    name: str, value: Any, shape: Size, channel_dim: int | None, x: Tensor
) -> tuple[Tensor | None, float]:
    """``value`` as (tensor that broadcasts to shape, 0.0) or (None, number)."""
    if type(value) is float and value == value:
        return None, value
    if not isinstance(value, Tensor):
        return None, operands.number(name, value)
    if not value.dtype.is_floating_point:
        operands.check_real(name, value)
        value = value.to(reference.state_dtype(x.dtype))
    if value.device != x.device:
        if value.dim() == 0 and value.device.type == "cpu" and not value.requires_grad:
            return None, float(value)
        raise ValueError(f"{name} is on {value.device} but x_seq is on {x.device}")
    return operands.for_broadcast(name, value, shape, channel_dim), 0.0


def _check_out(
    out: Tensor, x: Tensor, shape: Size, T: int | None, dtype: torch.dtype, needs_grad: bool
) -> None:
    full = (x.shape[0] if T is None else T, *shape)
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a torch.Tensor, got {type(out).__name__}")
    if needs_grad or out.requires_grad:
        raise ValueError("out cannot be combined with gradients; use torch.no_grad() or drop it")
    if tuple(out.shape) != full or out.dtype != dtype or out.device != x.device:
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)} on {out.device}; expected {dtype} {full} on "
            f"{x.device}"
        )
    if not out.is_contiguous():
        raise ValueError("out must be contiguous")


def _check_no_overlap(out: Tensor, read: dict[str, Tensor | None]) -> None:
    # Threads would read what others have overwritten with spikes.
    start, end = out.data_ptr(), out.data_ptr() + out.numel() * out.element_size()
    for name, tensor in read.items():
        if tensor is None or not tensor.numel() or tensor.device != out.device:
            continue
        first = tensor.data_ptr()
        elements = 1 + sum(s * (n - 1) for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        if first < end and start < first + elements * tensor.element_size():
            raise ValueError(f"out shares memory with {name}")


def _with_tensors(
    numbers: Neuron,
    v: Tensor | None,
    threshold: Tensor | None,
    amplitude: Tensor | None,
    input_scale: Tensor | None,
) -> Neuron:
    return Neuron(
        v, numbers.v_value, threshold, numbers.threshold_value, amplitude, numbers.amplitude_value,
        input_scale, numbers.v_reset, numbers.strict, numbers.spike_dtype,
    )  # fmt: skip


class _IntegrateAndFire(torch.autograd.Function):
    """Autograd around the two operators; of size [T, ...] it keeps nothing but x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        v: Tensor | None,
        threshold: Tensor | None,
        amplitude: Tensor | None,
        input_scale: Tensor | None,
        c: _Config,
    ) -> tuple[Tensor | None, ...]:
        neuron = _with_tensors(c.neuron, v, threshold, amplitude, input_scale)
        asked = (c.spikes, c.count, c.v_seq, c.charge_seq)
        outputs: Any
        if _through_operator(x):
            outputs = ops.if_forward(x, c.T, *neuron, *asked, -1, 1.0)
        else:
            outputs = run.if_forward(x, c.T, neuron, *asked)
        spikes, count, v_last, v_seq, charge_seq = outputs
        if c.rate:
            steps = x.shape[0] if c.T is None else c.T
            if amplitude is None:
                weight: Any = operands.rounded(neuron.amplitude_value, x.dtype)
            else:
                weight = amplitude.to(x.dtype).to(v_last.dtype)
            spikes = (weight * count.to(v_last.dtype) / steps).to(x.dtype)
        ctx.save_for_backward(x, v, threshold, amplitude, input_scale)
        ctx.config = c
        ctx.set_materialize_grads(False)
        whole = (t for t in (spikes, count) if t is not None and not t.dtype.is_floating_point)
        ctx.mark_non_differentiable(*whole)
        return spikes, count, v_last, v_seq, charge_seq

    @staticmethod
    def backward(
        ctx: Any,
        grad_spikes: Tensor | None,
        grad_count: None,
        grad_v: Tensor | None,
        grad_v_seq: Tensor | None,
        grad_charge_seq: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        c: _Config = ctx.config
        x, v, threshold, amplitude, input_scale = ctx.saved_tensors
        neuron = _with_tensors(c.neuron, v, threshold, amplitude, input_scale)
        given = run.Grads(
            grad_spikes if c.spikes or c.rate else None,
            c.rate,
            grad_v,
            grad_v_seq if c.v_seq else None,
            grad_charge_seq if c.charge_seq else None,
        )
        needs = list(ctx.needs_input_grad[:5])
        how = (c.surrogate.kind, c.surrogate.alpha, c.detach_reset, False, needs)
        grads: Any
        if _through_operator(x):
            grads = ops.if_backward(x, c.T, *neuron, *given, *how)
        elif torch.is_grad_enabled():
            grads = run.differentiable_backward(x, c.T, neuron, given, *how)
        else:
            grads = run.if_backward(x, c.T, neuron, given, *how)
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None)


def _through_operator(x: Tensor) -> bool:
    """Whether something beside eager mode has to see the call: compile, export, a subclass."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in _PLAIN
        or bool(torch._C._len_torch_dispatch_stack())
    )
