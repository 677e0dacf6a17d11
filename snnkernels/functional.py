"""Integrate-and-fire neurons over many time steps, as functions with explicit state.

One neuron, one step (OPI, Bu et al., AAAI 2022; QCFS, Bu et al., ICLR 2022, eq. 1-4)::

    m = v + x[t]                  charge
    s = m >= v_threshold          fire
    v = m - v_threshold * s       reset by subtraction (v_reset given: v = v_reset after a spike)
    spikes[t] = amplitude * s

All steps run in one kernel launch. Given the same current every back end returns the same bits.
Currents and outputs may lie in memory as ``[T, N, ...]``, as a transpose of ``[N, T, ...]``, as
channels_last or as slices of either: kernels walk strides and copy nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kernels import arguments, call
from .kernels.arguments import NO_OPTIONS, Options
from .kernels.spec import SPIKES, Asked
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
from .options import Probe, Signed
from .packed import PackedSpikes
from .scan import lif_scan

__all__ = [
    "Run",
    "bit_planes",
    "cumulative_max_pool",
    "dsr_backward",
    "histogram_update",
    "if_count",
    "if_multi_step",
    "if_packed",
    "if_rate",
    "if_run",
    "if_step",
    "lif_multi_step",
    "lif_scan",
    "mmse_errors",
    "mmse_threshold",
    "pack_bits",
    "popcount",
    "qcfs",
    "ttfs_decode",
    "ttfs_encode",
    "unpack_bits",
]

_Number = float | int
_OUTPUTS = ("spikes", "packed", "count", "rate", "v_seq", "charge_seq")
_COUNT = Asked(spikes=False, count=True)
_WORDS = Asked(spikes=False, words=True)


class Run(NamedTuple):
    """What :func:`if_run` returns; None where not asked for."""

    v: Tensor
    spikes: Tensor | None = None
    packed: PackedSpikes | None = None
    count: Tensor | None = None  # type: ignore[assignment]
    counts: Tensor | None = None
    rate: Tensor | None = None
    v_seq: Tensor | None = None
    charge_seq: Tensor | None = None


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
    save: str = "recompute",
    layout: str = "T,N",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Runs integrate-and-fire neurons for all time steps in one launch.

    Args:
        x_seq: input current ``[T, *shape]``, float32, float64, float16 or bfloat16. With ``T=n``
            given it is ``[*shape]``, a current held constant for n steps and never expanded (nor is
            an ``x_seq`` that ``expand`` has repeated over time).
        v: membrane before the first step: a number, a tensor that broadcasts to ``shape``, or
            ``"half"`` for half the threshold (OPI).
        v_threshold: threshold, positive and finite: a number, or a tensor that is scalar, per
            channel (with ``channel_dim``) or broadcasts to ``shape``.
        v_reset: ``None`` resets by subtraction; a number is what v becomes after a spike.
        surrogate_function: derivative used for spikes in the backward pass: ``None`` (ATan, alpha
            2), a name (``"atan"``, ``"superspike"``, ...), or an object of
            :mod:`snnkernels.surrogate` or of another library, see
            :func:`snnkernels.surrogate.resolve`.
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
        out: where the spikes go: ``[T, *shape]`` of ``spike_dtype``, written where it lies when it
            is contiguous or has the strides of ``x_seq``, else by a copy; not with gradients.
        save: what a forward pass keeps for its backward pass, per neuron-step beside the graph of
            ``x_seq`` itself: ``"recompute"`` keeps ``x_seq`` and recomputes the membranes;
            ``"trace"`` keeps the membranes instead (4 bytes, 8 for float64); ``"bits"``, for the
            rectangle surrogate, keeps 1 bit (2 with a gradient for threshold or amplitude). The
            last two are for plain neurons without traces and have no second derivative; with
            ``T=n`` all are ``"recompute"``, which keeps one row.
        layout: how time and neurons share the leading dimensions of ``x_seq``: ``"T,N"`` (default),
            ``"N,T"`` (``[N, T, ...]``), or one merged dimension, ``"T*N"`` or ``"N*T"``, with
            ``T`` giving the number of steps. Spikes and traces have it as well; ``shape`` is the
            rest, N first.

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
    asked = SPIKES
    if store_v_seq or store_charge_seq:
        asked = Asked(v_seq=bool(store_v_seq), charge_seq=bool(store_charge_seq))
    run = call.run(
        x_seq, asked, v, v_threshold, v_reset, surrogate_function, detach_reset, T, channel_dim,
        amplitude, input_scale, tie, spike_dtype, False, out, save, layout,
    )  # fmt: skip
    return run[0], run[4], run[5] if store_v_seq else run[6]


def lif_multi_step(
    x_seq: Tensor,
    v: Tensor | _Number | str = 0.0,
    beta: Tensor | _Number = 0.9,
    v_threshold: Tensor | _Number = 1.0,
    v_reset: _Number | None = None,
    surrogate_function: Any = None,
    detach_reset: bool = False,
    *,
    T: int | None = None,
    channel_dim: int | None = None,
    amplitude: Tensor | _Number | str | None = None,
    input_scale: Tensor | _Number | None = None,
    tie: str = ">=",
    spike_dtype: torch.dtype | None = None,
    layout: str = "T,N",
) -> tuple[Tensor, Tensor]:
    """Leaky integrate-and-fire: ``m = round(beta * v) + round(input_scale * x)``, the rest as IF.

    ``beta`` (and every other operand) is a number or a tensor as ``v_threshold`` is, with a
    gradient. A time constant ``tau`` is ``beta = 1 - 1 / tau``, with ``input_scale = 1 / tau``
    where the input decays as well. Other arguments as in :func:`if_multi_step`.

    Returns:
        ``(spikes, v)``.
    """
    run = call.run(
        x_seq, SPIKES, v, v_threshold, v_reset, surrogate_function, detach_reset, T, channel_dim,
        amplitude, input_scale, tie, spike_dtype, False, None, "recompute", layout, Options(beta),
    )  # fmt: skip
    return run[0], run[4]


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
    layout: str = "T,N",
) -> tuple[Tensor, Tensor]:
    """Counts spikes without a ``[T, ...]`` tensor; arguments as in :func:`if_multi_step`.

    Returns:
        ``(count, v)``: int32 spike counts and final membranes, both ``[*shape]``. Gradients flow
        through ``v`` only; :func:`if_rate` is the differentiable form.
    """
    run = call.run(
        x_seq, _COUNT, v, v_threshold, v_reset, surrogate_function, detach_reset, T, channel_dim,
        None, input_scale, tie, None, False, None, "recompute", layout,
    )  # fmt: skip
    return run[2], run[4]


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
    save: str = "recompute",
    layout: str = "T,N",
) -> tuple[Tensor, Tensor]:
    """Mean output ``amplitude * count / T`` without a ``[T, ...]`` tensor, differentiable.

    Arguments as in :func:`if_multi_step`.

    Returns:
        ``(rate, v)``, both ``[*shape]``; the rate has the dtype of ``x_seq``.

    Raises:
        ValueError: also when ``x_seq`` has no time steps.
    """
    run = call.run(
        x_seq, _COUNT, v, v_threshold, v_reset, surrogate_function, detach_reset, T, channel_dim,
        amplitude, input_scale, tie, None, True, None, save, layout,
    )  # fmt: skip
    return run[0], run[4]


def if_packed(
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
    layout: str = "T,N",
) -> tuple[PackedSpikes, Tensor]:
    """Spikes as one bit each; arguments as in :func:`if_multi_step`.

    Returns:
        ``(spikes, v)``: :class:`snnkernels.PackedSpikes` of shape ``[T, *shape]`` and the final
        membranes. Gradients flow through ``v`` only.
    """
    run = call.run(
        x_seq, _WORDS, v, v_threshold, v_reset, None, False, T, channel_dim, amplitude,
        input_scale, tie, None, False, None, "recompute", layout,
    )  # fmt: skip
    return call.packed(run[1], x_seq, T, layout, amplitude, v_threshold, channel_dim), run[4]


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
    if not isinstance(x, Tensor) or x.dtype not in arguments.FLOATS:
        raise arguments.no_current("x", x)
    run = call.run(
        x, SPIKES, v, v_threshold, v_reset, surrogate_function, detach_reset, 1, channel_dim,
        amplitude, input_scale, tie, spike_dtype, False, None,
    )  # fmt: skip
    return call.first_step(run[0]), run[4]


def if_run(
    x_seq: Tensor,
    v: Tensor | _Number | str = 0.0,
    v_threshold: Tensor | _Number = 1.0,
    v_reset: _Number | None = None,
    surrogate_function: Any = None,
    detach_reset: bool = False,
    *,
    outputs: Sequence[str] | str = ("spikes",),
    count_at: Sequence[int] = (),
    T: int | None = None,
    channel_dim: int | None = None,
    amplitude: Tensor | _Number | str | None = None,
    input_scale: Tensor | _Number | None = None,
    tie: str = ">=",
    spike_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    save: str = "recompute",
    layout: str = "T,N",
    beta: Tensor | _Number | None = None,
    bias: Tensor | _Number | None = None,
    fire_level: Tensor | _Number | None = None,
    max_spikes: int | None = None,
    signed: Signed | None = None,
    mask: Tensor | None = None,
    probe: Probe | None = None,
    parallel: bool = False,
    reset_delay: bool = False,
    v_min: float | None = None,
) -> Run:
    """Every output and every option of the neuron, in one launch.

    ``m = round(beta * v) + round(round(x * input_scale) + bias)``. Arguments that
    :func:`if_multi_step` has mean what they mean there.

    Args:
        outputs: any of ``"spikes"``, ``"packed"``, ``"count"``, ``"rate"``, ``"v_seq"`` and
            ``"charge_seq"``; a rate has a gradient and excludes spikes.
        count_at: up to 16 ascending times in 1..T: ``counts`` ``[len(count_at), *shape]`` holds the
            counts after each, for accuracy-against-T curves from one pass.
        spike_dtype: as there; a rate is of the input's dtype whatever it says.
        beta: leak. With a gradient, as ``bias`` and ``fire_level``; each a number or a tensor as
            for ``v_threshold``.
        bias: added to the current at every step.
        fire_level: the neuron fires at it and subtracts ``v_threshold`` (DSR, Meng et al., CVPR
            2022: ``alpha * v_threshold``).
        max_spikes: bursts of ``min(floor(m / v_threshold), max_spikes)`` spikes (AdaFire, Wang et
            al., AAAI 2025; a group neuron of m members, Lv et al., ICASSP 2024, has a threshold of
            ``theta / m``). Spikes and uint8 spikes hold how many; packed ones cannot. At most 255
            with uint8 spikes, else ``2**24``. The derivative of their number is the surrogate's at
            ``m - v_threshold``, however many they are; with ``v_reset`` gradients need
            ``detach_reset=True``.
        signed: spikes of -1 as well; ``spike_dtype`` may be ``torch.int8``; not packed.
        mask: bool or uint8 ``[*shape]``; where 0 a neuron emits nothing.
        probe: the probe steps of SRP or COS. Spikes, packed ones too, have the rows of a mask's
            probe as well; counts and rates have not.
        parallel: ``clip(floor((v + sum x) / v_threshold), 0, T)`` spikes, in the first steps
            (Parallel conversion, Hao et al., ICML 2025): the QCFS network with L = T, without
            unevenness. No traces.
        reset_delay: what a spike subtracts is subtracted after the next charge, as snnTorch does:
            ``m = beta * v + current``, then ``m - v_threshold`` where ``v`` has fired. ``v`` and
            ``v_seq`` are membranes that are not reset yet. Gradients need ``detach_reset=True``.
        v_min: membranes are clipped after the reset, as Sinabs does: ``relu(v - v_min) + v_min``,
            each operation rounded. A number, without a gradient of its own.

    ``signed``, ``mask``, ``probe`` and ``parallel`` are for inference.

    Returns:
        A :class:`Run`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an unknown name in ``outputs``, options that exclude each other, a value out of
            range or a shape that does not fit; the message names it.
    """
    names = (outputs,) if isinstance(outputs, str) else _tuple("outputs", outputs, "names")
    for name in names:
        if name not in _OUTPUTS:
            raise ValueError(f"outputs={outputs!r}: {name!r} is unknown; allowed: {_OUTPUTS}")
    if "rate" in names and "spikes" in names:
        raise ValueError(
            f"outputs={outputs!r}: 'rate' and 'spikes' exclude each other; ask for 'count'"
        )
    asked = Asked(
        "spikes" in names, "packed" in names, "count" in names or "rate" in names,
        "v_seq" in names, "charge_seq" in names, False,
        _tuple("count_at", count_at, "ints"),
    )  # fmt: skip
    more = Options(
        beta, bias, fire_level, max_spikes, signed, mask, probe, parallel, reset_delay, v_min
    )
    if all(value is None or value is False for value in more):
        more = NO_OPTIONS
    run = call.run(
        x_seq, asked, v, v_threshold, v_reset, surrogate_function, detach_reset, T, channel_dim,
        amplitude, input_scale, tie, spike_dtype, "rate" in names, out, save, layout, more,
    )  # fmt: skip
    packed = None
    if asked.words:
        packed = call.packed(run[1], x_seq, T, layout, amplitude, v_threshold, channel_dim)
    return Run(
        run[4],
        run[0] if "spikes" in names else None,
        packed,
        run[2] if "count" in names else None,
        run[3],
        run[0] if "rate" in names else None,
        run[5],
        run[6],
    )


def _tuple(name: str, values: Any, what: str) -> tuple[Any, ...]:
    try:
        return tuple(values)
    except TypeError:
        raise TypeError(f"{name}={values!r} must be a sequence of {what}") from None
