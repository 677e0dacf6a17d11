"""From what users write to what kernels are told: checks, broadcasting, rounding."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Size, Tensor

from ..options import Probe, Signed
from . import operands, params, reference
from .spec import Neuron

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LAYOUTS = ("T,N", "N,T", "T*N", "N*T")
SAVES = ("recompute", "trace", "bits")

# How long to look for an element that two tensors share before they are taken to.
_WORK = 10_000
# Of a step: float32 counts no further.
MOST_SPIKES = 2**24
MOST_STEPS = 2**31 - 1
# Between these every number is positive and finite in float32 as well.
_SMALLEST, _LARGEST = 1.2e-38, 3.4e38


class Options(NamedTuple):
    """What only the general neuron knows; see :func:`snnkernels.functional.if_run`."""

    beta: Any = None
    bias: Any = None
    fire_level: Any = None
    max_spikes: int | None = None
    signed: Signed | None = None
    mask: Tensor | None = None
    probe: Probe | None = None
    parallel: bool = False
    reset_delay: bool = False
    v_min: float | None = None


NO_OPTIONS = Options()
# What an option cannot be combined with.
_CLASHES = {
    "max_spikes": ("tie='>'", "fire_level", "probe"),
    "signed": ("v_reset", "tie='>'", "fire_level", "probe"),
    "parallel": ("v_reset", "tie='>'", "fire_level", "beta", "probe"),
    "reset_delay": ("max_spikes", "signed", "parallel", "v_reset", "probe"),
    "v_min": ("probe", "parallel", "signed", "reset_delay"),
}


def steps_and_shape(x: Any, T: Any) -> tuple[int, Size]:
    """The number of steps and the neurons' shape of a current; checks both arguments."""
    if not isinstance(x, Tensor):
        raise no_current("x_seq", x)
    if type(x) is not Tensor:
        operands.check_local("x_seq", x)
    if x.dtype not in FLOATS:
        raise no_current("x_seq", x)
    if x.layout is not torch.strided:
        raise TypeError(f"x_seq has layout {x.layout}; allowed is torch.strided (x_seq.to_dense())")
    if T is None:
        if x.dim() == 0:
            raise ValueError("x_seq has no dimensions; it is [T, *shape], or [*shape] with T=n")
        return x.shape[0], x.shape[1:]
    check_steps(T)
    return T, x.shape


def no_current(name: str, x: Any) -> TypeError:
    """The error of a current that is no tensor, or of a dtype that is not offered."""
    if not isinstance(x, Tensor):
        return TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    allowed = "float32, float64, float16 and bfloat16"
    return TypeError(f"{name} has dtype {x.dtype}; allowed are {allowed}")


def check_steps(T: Any) -> None:
    """Raises unless ``T`` is a number of steps."""
    if not isinstance(T, (int, torch.SymInt)) or isinstance(T, bool):
        raise TypeError(f"T={T!r} must be an int")
    if T < 1:
        raise ValueError(f"T={T} must be at least 1")
    if type(T) is int and T > MOST_STEPS:
        raise ValueError(f"T={T} must be at most {MOST_STEPS}: spikes are counted in 32 bits")


def neuron(
    x: Tensor,
    steps: int,
    shape: Size,
    v: Any,
    v_threshold: Any,
    v_reset: Any,
    channel_dim: int | None,
    amplitude: Any,
    input_scale: Any,
    tie: str,
    spike_dtype: torch.dtype | None,
    more: Options,
) -> Neuron:
    """The neuron that the arguments of :func:`snnkernels.functional.if_run` describe."""
    options = 0
    if tie != ">=":
        if tie != ">":
            raise ValueError(f"tie={tie!r} is unknown; allowed are '>=' and '>'")
        options = params.STRICT
    dtype = x.dtype
    if spike_dtype is None:
        spike_dtype = dtype
    elif spike_dtype != dtype and spike_dtype != torch.uint8:
        signed = more.signed is not None
        if not (signed and spike_dtype == torch.int8):
            allowed = f"{dtype}, torch.uint8" + (" and torch.int8" if signed else "")
            raise ValueError(
                f"spike_dtype={spike_dtype} is not offered for {dtype} input; allowed: {allowed}"
            )
    reset = 0.0
    if v_reset is not None:
        reset = operands.number("v_reset", v_reset)
        if math.isinf(reset):
            raise ValueError(f"v_reset={reset!r} must be finite or None")
        options |= params.HARD_RESET
    if channel_dim is not None and type(channel_dim) is not int:
        raise TypeError(f"channel_dim={channel_dim!r} must be an int or None")

    th, th_value = _operand("v_threshold", v_threshold, shape, channel_dim, x)
    if th is not None:
        if not torch.compiler.is_compiling():
            operands.check_threshold(th, dtype=dtype)
    elif not _SMALLEST < th_value < _LARGEST:
        operands.check_threshold(th_value, dtype=dtype)
    if isinstance(v, str):
        if v != "half":
            raise ValueError(f"v={v!r} is unknown; the only string allowed is 'half'")
        v_tensor, v_value = (None, th_value / 2) if th is None else (th * 0.5, 0.0)
    else:
        v_tensor, v_value = _operand("v", v, shape, channel_dim, x)
    amp: Tensor | None = None
    amp_value = 1.0
    if isinstance(amplitude, str):
        if amplitude != "threshold":
            raise ValueError(
                f"amplitude={amplitude!r} is unknown; the only string allowed is 'threshold'"
            )
        amp, amp_value = th, th_value
    elif amplitude is not None:
        amp, amp_value = _operand("amplitude", amplitude, shape, channel_dim, x)
    scale: Tensor | None = None
    scale_value = 1.0
    if input_scale is not None:
        scale, scale_value = _operand("input_scale", input_scale, shape, channel_dim, x)
        options |= params.INPUT_SCALE
    if more is NO_OPTIONS:
        return Neuron(
            v_tensor, th, amp, scale, None, None, None, v_value, th_value, amp_value, scale_value,
            1.0, 0.0, 1.0, options, spike_dtype, reset,
        )  # fmt: skip
    beta, beta_value, bias, bias_value, level, level_value = None, 1.0, None, 0.0, None, 1.0
    if more.beta is not None:
        beta, beta_value = _operand("beta", more.beta, shape, channel_dim, x)
        options |= params.BETA
    if more.bias is not None:
        bias, bias_value = _operand("bias", more.bias, shape, channel_dim, x)
        options |= params.BIAS
    if more.fire_level is not None:
        level, level_value = _operand("fire_level", more.fire_level, shape, channel_dim, x)
        options |= params.FIRE_LEVEL
    given = Neuron(
        v_tensor, th, amp, scale, beta, bias, level, v_value, th_value, amp_value, scale_value,
        beta_value, bias_value, level_value, options, spike_dtype, reset,
    )  # fmt: skip
    return _with_more_options(given, x, steps, shape, more)


def _with_more_options(given: Neuron, x: Tensor, steps: int, shape: Size, more: Options) -> Neuron:
    options = given.options
    fields: dict[str, Any] = {}
    there = {
        "max_spikes": more.max_spikes is not None,
        "signed": more.signed is not None,
        "parallel": more.parallel,
        "reset_delay": more.reset_delay,
        "v_min": more.v_min is not None,
        "probe": more.probe is not None,
        "v_reset": options & params.HARD_RESET,
        "tie='>'": options & params.STRICT,
        "fire_level": options & params.FIRE_LEVEL,
        "beta": options & params.BETA,
    }
    chosen = [name for name in ("max_spikes", "signed", "parallel") if there[name]]
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)} exclude each other")
    for name, others in _CLASHES.items():
        if there[name]:
            for other in others:
                if there[other]:
                    raise ValueError(f"{name} cannot be combined with {other}")
    if more.max_spikes is not None:
        if type(more.max_spikes) is not int:
            raise TypeError(f"max_spikes={more.max_spikes!r} must be an int or None")
        most = 255 if given.spike_dtype == torch.uint8 else MOST_SPIKES
        if not 1 <= more.max_spikes <= most:
            raise ValueError(
                f"max_spikes={more.max_spikes} is not in 1..{most} (spikes of {given.spike_dtype})"
            )
        options |= params.BURST
        fields["max_spikes"] = more.max_spikes
    if more.signed is not None:
        if not isinstance(more.signed, Signed):
            raise TypeError(f"signed={more.signed!r} must be a snnkernels.options.Signed or None")
        more.signed.check()
        low, high, margin = more.signed
        if given.spike_dtype == torch.uint8:
            raise ValueError("signed spikes do not fit spike_dtype=torch.uint8; use torch.int8")
        options |= params.SIGNED
        fields |= {"count_low": low, "count_high": MOST_STEPS if high is None else high}
        fields["margin"] = float(margin)
    if more.probe is not None:
        if not isinstance(more.probe, Probe):
            raise TypeError(f"probe={more.probe!r} must be a snnkernels.options.Probe or None")
        more.probe.check()
        probe, kind, margin, iterations = more.probe
        if probe > steps or (kind == "mask" and probe == steps):
            room = "fewer than" if kind == "mask" else "at most"
            raise ValueError(f"probe.steps={probe} must be {room} the {steps} steps of x_seq")
        options |= params.PROBE_MASK if kind == "mask" else params.PROBE_SHIFT
        fields |= {"probe": probe, "iterations": iterations, "margin": float(margin)}
    if more.reset_delay:
        options |= params.RESET_DELAY
    if more.v_min is not None:
        v_min = operands.number("v_min", more.v_min)
        if math.isinf(v_min):
            raise ValueError(f"v_min={v_min!r} must be finite or None")
        options |= params.CLIP
        fields["v_min"] = v_min
    if more.mask is not None:
        if not isinstance(more.mask, Tensor) or more.mask.dtype not in (torch.bool, torch.uint8):
            got = more.mask.dtype if isinstance(more.mask, Tensor) else type(more.mask).__name__
            raise TypeError(f"mask must be a tensor of torch.bool or torch.uint8, got {got}")
        if more.mask.device != x.device:
            raise ValueError(f"mask is on {more.mask.device} but x_seq is on {x.device}")
        fields["mask"] = operands.for_broadcast("mask", more.mask, shape, None)
        options |= params.MASK
    if more.parallel:
        options |= params.PARALLEL
    return given._replace(options=options, **fields)


def _operand(
    name: str, value: Any, shape: Size, channel_dim: int | None, x: Tensor
) -> tuple[Tensor | None, float]:
    """``value`` as (tensor that broadcasts to shape, 0.0) or (None, number)."""
    if type(value) is float and value == value:
        return None, value
    if not isinstance(value, Tensor):
        return None, operands.number(name, value)
    if type(value) is not Tensor:
        operands.check_local(name, value)
    if not value.dtype.is_floating_point:
        operands.check_real(name, value)
        value = value.to(reference.state_dtype(x.dtype))
    if value.device != x.device:
        if value.dim() == 0 and value.device.type == "cpu" and not value.requires_grad:
            return None, float(value)
        raise ValueError(f"{name} is on {value.device} but x_seq is on {x.device}")
    return operands.for_broadcast(name, value, shape, channel_dim), 0.0


def check_count_at(count_at: Any, steps: int) -> tuple[int, ...]:
    """The times at which counts are asked for, ascending; raises if one does not fit."""
    times = tuple(count_at)
    for t in times:
        if type(t) is not int:
            raise TypeError(f"count_at={count_at!r} must hold ints")
        if not 1 <= t <= steps:
            raise ValueError(f"count_at={count_at!r}: {t} is not in 1..{steps}")
    if any(a >= b for a, b in itertools.pairwise(times)):
        raise ValueError(f"count_at={count_at!r} must ascend")
    if len(times) > params.COUNT_TIMES:
        raise ValueError(f"count_at has {len(times)} times; at most {params.COUNT_TIMES} a call")
    return times


def check_out(
    out: Any, x: Tensor, steps: int, shape: Size, dtype: torch.dtype, needs_grad: bool
) -> None:
    """Raises unless spikes can be written to ``out``."""
    full = (steps, *shape)
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a torch.Tensor, got {type(out).__name__}")
    if needs_grad or out.requires_grad:
        raise ValueError("out cannot be combined with gradients; use torch.no_grad() or drop it")
    if tuple(out.shape) != full or out.dtype != dtype or out.device != x.device:
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)} on {out.device}; expected {dtype} {full} on "
            f"{x.device}"
        )
    if any(s == 0 and n > 1 for n, s in zip(full, out.stride(), strict=True)):
        raise ValueError("out shares memory with itself: it is expanded")


class _Addresses:
    """A tensor's memory as NumPy sees an array's; nobody reads it."""

    def __init__(self, t: Tensor) -> None:
        size = t.element_size()
        self.__array_interface__ = {
            "shape": tuple(t.shape),
            "strides": tuple(s * size for s in t.stride()),
            "typestr": f"|V{size}",
            "data": (t.data_ptr(), True),
            "version": 3,
        }


def check_no_overlap(out: Tensor, name: str, read: Tensor) -> None:
    """Raises if ``out`` shares memory with the tensor called ``name``."""
    # Threads would read what others have overwritten with spikes.
    if not (out.numel() and read.numel()) or read.device != out.device:
        return
    if not (_starts_within(out, read) or _starts_within(read, out)):
        return
    try:
        shared = np.shares_memory(
            np.asarray(_Addresses(out)),
            np.asarray(_Addresses(read)),
            max_work=_WORK,  # type: ignore[arg-type]
        )
    except np.exceptions.TooHardError:
        shared = True
    if shared:
        raise ValueError(f"out shares memory with {name}")


def _starts_within(a: Tensor, b: Tensor) -> bool:
    """Whether the first address of ``a`` lies between those of ``b``."""
    extent = 1 + sum(s * (n - 1) for n, s in zip(b.shape, b.stride(), strict=True))
    return 0 <= a.data_ptr() - b.data_ptr() < extent * b.element_size()
