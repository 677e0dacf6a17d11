"""A call of the neurons: arguments checked, layout taken off, the shortest way to a kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import surrogate as _surrogate
from ..packed import PackedSpikes
from . import arguments, autograd, operands, params, prepared
from .arguments import NO_OPTIONS, Options
from .spec import OPERANDS, SPIKES, Asked, Neuron

# What users call an operand, where that is another word.
_SPELLED = {"threshold": "v_threshold"}


def run(
    x: Tensor,
    asked: Asked,
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
    rate: bool,
    out: Tensor | None,
    save: str = "recompute",
    layout: str = "T,N",
    more: Options = NO_OPTIONS,
) -> Any:
    """Checks the arguments, then takes the shortest way to a kernel that they allow.

    Returns the fields of :class:`.kernels.spec.Outputs`, with the rate in place of the spikes.
    """
    if (
        asked is SPIKES
        and more is NO_OPTIONS
        and T is None
        and v_reset is None
        and amplitude is None
        and input_scale is None
        and spike_dtype is None
        and layout == "T,N"
        and save == "recompute"
        and tie == ">="
        and channel_dim is None
        and isinstance(x, Tensor)
        and not autograd.through_operator(x)
        and (known := prepared.find(x, v, v_threshold)) is not None
    ):
        surrogate = _surrogate.resolve(surrogate_function)
        needs_grad = x.requires_grad and torch.is_grad_enabled()
        start = v if isinstance(v, Tensor) else None
        if out is not None:
            arguments.check_out(out, x, known.steps, known.shape, x.dtype, needs_grad)
            arguments.check_no_overlap(out, "x_seq", x)
            if start is not None:
                arguments.check_no_overlap(out, "v", start)
        if needs_grad and surrogate.plain:
            return autograd.plain(known, surrogate, bool(detach_reset), x, start)
        if not needs_grad and (out is None or known.fits(out, x.dtype)):
            return autograd.outputs(*known.forward(x, start, out))
    if layout != "T,N":
        x, T, out = _time_first(x, T, layout, out)
    steps, shape = arguments.steps_and_shape(x, T)
    if surrogate_function is not None:
        surrogate_function = _surrogate.resolve(surrogate_function)
    neuron = arguments.neuron(
        x, steps, shape, v, v_threshold, v_reset, channel_dim, amplitude, input_scale, tie,
        spike_dtype, more,
    )  # fmt: skip
    if rate:
        if steps == 0:
            raise ValueError("x_seq has no time steps: a rate of no steps is undefined")
        neuron = neuron._replace(spike_dtype=x.dtype)  # there are no spikes, the rate is a float
    if asked.words and neuron.options & (params.BURST | params.SIGNED):
        raise ValueError(
            "packed spikes are bits and hold neither max_spikes nor signed ones; ask for 'spikes' "
            "with spike_dtype=torch.uint8 (torch.int8 if signed)"
        )
    if asked.count_at:
        counted = steps - (neuron.probe if neuron.options & params.PROBE_MASK else 0)
        asked = asked._replace(count_at=arguments.check_count_at(asked.count_at, counted))
    if (asked.v_seq or asked.charge_seq) and neuron.options & params.PARALLEL:
        raise ValueError("parallel neurons have no traces: drop v_seq and charge_seq")
    tensors = neuron.tensors
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or _any_requires_grad(tensors))
    if out is not None:
        arguments.check_out(out, x, steps, shape, neuron.spike_dtype, needs_grad)
        if not torch.compiler.is_compiling():  # operators of a graph copy their answer to out
            arguments.check_no_overlap(out, "x_seq", x)
            for name, tensor in zip(OPERANDS, tensors, strict=True):
                if tensor is not None:
                    arguments.check_no_overlap(out, _SPELLED.get(name, name), tensor)
    if save != "recompute" or needs_grad:
        _check_save(save, neuron, asked, surrogate_function, needs_grad, bool(detach_reset))
    if not needs_grad:
        result: Any = autograd.forward(x, T, neuron, asked, 1.0, out)
        if rate:
            result = result._replace(spikes=autograd.rate(result, neuron, steps, x.dtype))
    else:
        surrogate = _surrogate.DEFAULT if surrogate_function is None else surrogate_function
        config = autograd.Config(T, neuron, asked, rate, surrogate, bool(detach_reset), save)
        result = autograd.differentiable(x, config)
    if layout != "T,N":
        result = _restored(result, layout, rate)
    whole = asked.spikes and not neuron.spike_dtype.is_floating_point
    if whole and amplitude is not None and not torch.compiler.is_compiling():
        weight = neuron.amplitude
        # Its own copy: a threshold that is learned on must not change spikes of before.
        own = neuron.amplitude_value if weight is None else weight.detach().clone()
        result[0].amplitude = own
    return result


def _any_requires_grad(tensors: tuple[Tensor | None, ...]) -> bool:
    # A loop costs half of any() over a generator, and this runs at every call.
    for tensor in tensors:  # noqa: SIM110
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def _check_save(
    save: str, neuron: Neuron, asked: Asked, surrogate: Any, needs_grad: bool, detach_reset: bool
) -> None:
    if save not in arguments.SAVES:
        raise ValueError(f"save={save!r} is unknown; allowed: {', '.join(arguments.SAVES)}")
    if needs_grad and neuron.options & params.INFERENCE_ONLY:
        raise ValueError("signed, mask, probe and parallel are for inference: use torch.no_grad()")
    hard = params.BURST | params.HARD_RESET
    if needs_grad and neuron.options & hard == hard and not detach_reset:
        raise ValueError(
            "max_spikes with v_reset: how the reset depends on a number of spikes is undefined; "
            "use detach_reset=True"
        )
    if needs_grad and neuron.options & params.RESET_DELAY and not detach_reset:
        raise ValueError("reset_delay has no gradient through the reset: use detach_reset=True")
    if save == "recompute" or not needs_grad:
        return
    if neuron.options:
        raise ValueError(
            f"save={save!r} is for plain neurons: reset by subtraction, tie='>=', no input_scale, "
            "beta, bias, fire_level, max_spikes or v_min"
        )
    surrogate = surrogate or _surrogate.DEFAULT
    if not surrogate.plain:
        raise ValueError(
            f"save={save!r} is for 'atan', 'sigmoid', 'triangle' and 'rectangle' of scale 1, not "
            f"{surrogate!r}"
        )
    if asked.v_seq or asked.charge_seq:
        raise ValueError(f"save={save!r} cannot be combined with v_seq or charge_seq")
    if save == "bits" and not isinstance(surrogate, _surrogate.Rectangle):
        raise ValueError(
            "save='bits' keeps where the rectangle surrogate is not 0: it needs "
            f"surrogate_function='rectangle', not {surrogate!r}"
        )


def _time_first(
    x: Tensor, T: int | None, layout: str, out: Tensor | None
) -> tuple[Tensor, int | None, Tensor | None]:
    """``x`` and ``out`` seen as ``[T, N, ...]``."""
    if layout not in arguments.LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown; allowed: {', '.join(arguments.LAYOUTS)}")
    if not isinstance(x, Tensor):
        raise TypeError(f"x_seq must be a torch.Tensor, got {type(x).__name__}")
    if out is not None and (not isinstance(out, Tensor) or out.dim() != x.dim()):
        raise ValueError(
            f"out must be a tensor of x_seq's shape {tuple(x.shape)}, got {_about(out)}"
        )
    if layout == "N,T":
        if T is not None:
            raise ValueError("T is for a constant current, which has no layout 'N,T'")
        if x.dim() < 2:
            raise ValueError(f"layout='N,T' needs [N, T, ...], x_seq has {x.dim()} dimensions")
        return x.transpose(0, 1), None, None if out is None else out.transpose(0, 1)
    if T is None:
        raise TypeError(f"layout={layout!r} needs T, the number of steps it merges")
    arguments.check_steps(T)
    if x.dim() == 0 or x.shape[0] % T:
        raise ValueError(
            f"layout={layout!r}: the first dimension of x_seq {tuple(x.shape)} does not hold "
            f"T={T} steps"
        )

    if out is not None and out.shape[0] != x.shape[0]:
        raise ValueError(f"out must have x_seq's shape {tuple(x.shape)}, got {_about(out)}")

    def split(t: Tensor) -> Tensor:
        neurons = t.shape[0] // T
        if layout == "T*N":
            return t.unflatten(0, (T, neurons))
        return t.unflatten(0, (neurons, T)).transpose(0, 1)

    return split(x), None, None if out is None else split(out)


def _about(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _restored(result: Any, layout: str, rate: bool) -> list[Any]:
    """Spikes and traces as ``layout`` has them."""

    def back(rows: Tensor | None) -> Tensor | None:
        if rows is None:
            return None
        rows = rows if layout == "T*N" else rows.transpose(0, 1)
        return rows if layout == "N,T" else rows.flatten(0, 1)

    given = list(result)
    for i in (0, 5, 6):
        if not (rate and i == 0):
            given[i] = back(given[i])
    return given


def first_step(spikes: Tensor) -> Tensor:
    """The only row of ``spikes``, with the amplitude that integer spikes carry along."""
    row = spikes[0]
    if not spikes.dtype.is_floating_point and hasattr(spikes, "amplitude"):
        row.amplitude = spikes.amplitude  # type: ignore[attr-defined]
    return row


def packed(
    words: Tensor,
    x: Tensor,
    T: int | None,
    layout: str,
    amplitude: Any,
    v_threshold: Any,
    channel_dim: int | None,
) -> PackedSpikes:
    """Packed spikes of a call with these arguments."""
    steps = x.shape[layout == "N,T"] if T is None else T
    if amplitude is None:
        amplitude = 1.0
    elif isinstance(amplitude, str):
        amplitude = v_threshold
    if isinstance(amplitude, Tensor):
        shape = words.shape[1:]
        amplitude = operands.for_broadcast("amplitude", amplitude, shape, channel_dim)
        amplitude = amplitude.detach()
    return PackedSpikes(words, steps, amplitude, x.dtype)
