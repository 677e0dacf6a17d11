"""Small kernels around spiking networks: quantised activations, codes, pooling, thresholds.

Each runs in one launch and gives the same bits on every back end. "State dtype" is float64 for
float64 inputs and float32 for all others. A ``threshold`` is positive and finite, also when rounded
to the state dtype: a number, or a tensor that is scalar, per channel (1-D with ``channel_dim``) or
broadcasts; ``channel_dim`` counts without the time dimension. Values of CUDA tensors are not
checked: that would wait for the device.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Size, Tensor

from .kernels import maps as _maps
from .kernels import maps_reference as _reference
from .kernels import operands

__all__ = [
    "bit_planes",
    "cumulative_max_pool",
    "dsr_backward",
    "histogram_update",
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
_WORDS = (torch.uint8, torch.int16, torch.int32)
_CONVENTIONS = ("clip_floor", "floor_clip")
_Number = float | int


# ---- checks ------------------------------------------------------------------------------------


def _names(*dtypes: torch.dtype) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def _tensor(name: str, value: Any, dtypes: tuple[torch.dtype, ...] = _FLOATS) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {value.dtype}; allowed are {_names(*dtypes)}")


def _whole(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be an int")
    if not low <= value <= high:
        raise ValueError(f"{name}={value} is out of range; allowed are {low} to {high}")


def _shared(
    name: str,
    value: Any,
    shape: Size,
    channel_dim: int | None,
    device: torch.device,
    held: torch.dtype | None,
) -> tuple[Tensor | None, float]:
    """``value`` as (tensor that broadcasts to ``shape``, 0.0) or (None, number).

    It must be positive and finite when rounded to ``held``; None: any value will do.
    """
    if channel_dim is not None and type(channel_dim) is not int:
        raise TypeError(f"channel_dim={channel_dim!r} must be an int or None")
    if not isinstance(value, Tensor):
        number = operands.number(name, value)
        if held is not None:
            _check_positive(name, number, held)
        return None, number
    operands.check_real(name, value)
    if not value.dtype.is_floating_point:
        value = value.to(torch.float32)
    if value.device != device:
        raise ValueError(f"{name} is on {value.device} but the input is on {device}")
    if held is not None:
        _check_positive(name, value, held)
    return operands.for_broadcast(name, value, shape, channel_dim), 0.0


def _readable(tensor: Tensor) -> bool:
    """Whether looking at the values waits for nobody."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_positive(name: str, value: Tensor | float, held: torch.dtype) -> None:
    """Raises ValueError unless all of it is positive and finite, also when rounded to ``held``."""
    if not isinstance(value, Tensor):
        rounded = operands.rounded(value, held)
        if not 0.0 < rounded < math.inf:
            what = "" if rounded == value else f"; in {_names(held)} it is {rounded}"
            raise ValueError(f"{name}={value!r} must be positive and finite{what}")
        return
    if not _readable(value) or not value.numel():
        return
    operands.check_threshold(value, name, held)
    if held.itemsize == 2:
        # The state holds all of them; the least and the largest tell for the narrower dtype.
        ends = torch.stack(value.detach().aminmax())
        for given, rounded in zip(ends.tolist(), ends.to(held).tolist(), strict=True):
            if not 0.0 < rounded < math.inf:
                raise ValueError(
                    f"{name} must be positive and finite; {given} is {rounded} in {_names(held)}"
                )


def _finite(name: str, value: Any, held: torch.dtype) -> float:
    """A number rounded to ``held``, in which it must be finite."""
    number = operands.number(name, value)
    rounded = operands.rounded(number, held)
    if math.isinf(rounded):
        what = "" if math.isinf(number) else f"; in {_names(held)} it is {rounded}"
        raise ValueError(f"{name}={number!r} must be finite{what}")
    return rounded


def _pair(name: str, value: Any, low: int) -> list[int]:
    pair = list(value) if isinstance(value, (tuple, list)) else [value, value]
    if len(pair) != 2:
        raise ValueError(f"{name}={value!r} must be an int or two of them")
    for one in pair:
        if not isinstance(one, (int, torch.SymInt)) or isinstance(one, bool):
            raise TypeError(f"{name}={value!r} must be an int or two of them")
        if one < low:
            raise ValueError(f"{name}={value!r} must be at least {low}")
    return pair


def _like(name: str, value: Any, x: Tensor, shape: Size) -> None:
    _tensor(name, value)
    if value.shape != shape or value.device != x.device:
        raise ValueError(
            f"{name} is {tuple(value.shape)} on {value.device}; expected {tuple(shape)} on "
            f"{x.device}"
        )


# ---- qcfs --------------------------------------------------------------------------------------


def qcfs(
    x: Tensor,
    threshold: Tensor | _Number,
    levels: int,
    phase: float = 0.5,
    gradient: str = "clip_floor",
    channel_dim: int | None = None,
) -> Tensor:
    """``threshold * clip(floor(x levels / threshold + phase) / levels, 0, 1)``, differentiable.

    Source: quantisation clip-floor-shift, Bu et al., ICLR 2022. Threshold and phase are rounded
    once to the dtype of ``x``, to which every operation rounds: where ``x levels`` overflows (in
    float16 from 65520 on) it is infinite and the result is the threshold, or 0 for negative x. The
    derivative of floor is 1, which leaves two conventions for the same values: the gradient passes
    to x where ``0 <= x / threshold <= 1`` (``"clip_floor"``: clipped, then quantised, the authors'
    newer code) or where ``0 <= floor(...) / levels <= 1`` (``"floor_clip"``, their older code; for
    phase 1/2 from ``-threshold / 2 levels`` up to ``threshold + threshold / 2 levels``). The
    gradient of the threshold is that of the expression: ``out / threshold - x / threshold`` where
    x's passes, ``out / threshold`` elsewhere. It is deterministic.

    Args:
        x: ``[*shape]``, float32, float64, float16 or bfloat16.
        threshold: as said in the module, but in the dtype of ``x``.
        levels: L, at least 1.
        phase: 0.5 in the paper; finite in the dtype of ``x``.
        gradient: ``"clip_floor"`` or ``"floor_clip"``.
        channel_dim: dimension of ``x`` along which a 1-D threshold is per channel.

    Returns:
        ``[*shape]`` of the dtype of ``x``. Keeps nothing for the backward pass but ``x``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a value out of range or a shape that does not fit.
    """
    _tensor("x", x)
    _whole("levels", levels, 1, 2**31 - 1)
    phase = _finite("phase", phase, x.dtype)
    if gradient not in _CONVENTIONS:
        allowed = " and ".join(map(repr, _CONVENTIONS))
        raise ValueError(f"gradient={gradient!r} is unknown; allowed are {allowed}")
    th, value = _shared("threshold", threshold, x.shape, channel_dim, x.device, x.dtype)
    return qcfs_unchecked(x, th, value, levels, phase, gradient == "clip_floor")


def qcfs_unchecked(
    x: Tensor, threshold: Tensor | None, value: float, levels: int, phase: float, clip_first: bool
) -> Tensor:
    """:func:`qcfs` of a threshold that training may have made anything; ``phase`` is rounded."""
    grad = threshold is not None and threshold.requires_grad
    if torch.is_grad_enabled() and (x.requires_grad or grad):
        return _Qcfs.apply(x, threshold, value, levels, phase, clip_first)
    return _maps.qcfs(x, threshold, value, levels, phase)


class _Qcfs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        threshold: Tensor | None,
        value: float,
        levels: int,
        phase: float,
        clip_first: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, threshold)
        ctx.how = value, levels, phase, clip_first
        return _maps.qcfs(x, threshold, value, levels, phase)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, threshold = ctx.saved_tensors
        value, levels, phase, clip_first = ctx.how
        need_x, need_threshold = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # To be differentiated again: in PyTorch.
            full = x.new_full((), value) if threshold is None else threshold.to(x.dtype)
            grad_x, shares = _reference.qcfs_backward(x, grad, full, levels, phase, clip_first)
            grad_threshold = shares.sum_to_size(full.shape) if need_threshold else None
        else:
            grad_x, grad_threshold = _maps.qcfs_backward(
                x, grad, threshold, value, levels, phase, clip_first, need_threshold
            )
        if grad_threshold is not None and threshold is not None:
            grad_threshold = grad_threshold.to(threshold.dtype)
        return (
            grad_x if need_x else None, grad_threshold if need_threshold else None,
            None, None, None, None,
        )  # fmt: skip


# ---- cumulative max-pool -----------------------------------------------------------------------


def cumulative_max_pool(
    x_seq: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """Max-pool of currents whose mean over time is the maximum of the mean currents.

    With ``S_i(t)`` the running sum of current i in the state dtype, step t gives
    ``max_i S_i(t) - max_i S_i(t - 1)``, the maximum before the first step being 0. Padding takes no
    part; NaN propagates. No running sum is stored.

    Args:
        x_seq: ``[T, B, C, H, W]``, float32, float64, float16 or bfloat16.
        kernel_size, stride, padding, dilation, ceil_mode: as for ``torch.nn.MaxPool2d``.

    Returns:
        ``[T, B, C, OH, OW]`` of the dtype of ``x_seq``. Differentiable (through PyTorch).

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a value out of range or a shape that does not fit.
    """
    _tensor("x_seq", x_seq)
    if x_seq.dim() != 5:
        raise ValueError(f"x_seq has shape {tuple(x_seq.shape)}; it must be [T, B, C, H, W]")
    geometry = pool_geometry(kernel_size, stride, padding, dilation)
    kernel, steps, around, apart = geometry
    for n, k, s, p, d in zip(x_seq.shape[3:], *geometry, strict=True):
        if _maps.pooled_size(n, k, s, p, d, ceil_mode) < 1:
            raise ValueError(
                f"kernel_size={kernel_size!r} with dilation={dilation!r} does not fit into x_seq "
                f"of shape {tuple(x_seq.shape)} with padding={padding!r}"
            )
    return pool_steps(x_seq, kernel, steps, around, apart, bool(ceil_mode), None, None, False)[0]


def pool_geometry(kernel_size: Any, stride: Any, padding: Any, dilation: Any) -> list[list[int]]:
    """Kernel, stride, padding and dilation as pairs; raises as :func:`cumulative_max_pool`."""
    kernel = _pair("kernel_size", kernel_size, 1)
    steps = kernel if stride is None else _pair("stride", stride, 1)
    around, apart = _pair("padding", padding, 0), _pair("dilation", dilation, 1)
    if any(2 * p > k for p, k in zip(around, kernel, strict=True)):
        raise ValueError(f"padding={padding!r} must be at most half of kernel_size={kernel_size!r}")
    return [kernel, steps, around, apart]


def pool_steps(
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    total: Tensor | None,
    peak: Tensor | None,
    state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`cumulative_max_pool` that goes on from ``total`` and ``peak`` (None: from 0).

    Returns:
        The output, and, if ``state``, running sums ``[B, C, H, W]`` (unspecified under no window)
        and maxima ``[B, C, OH, OW]`` in the state dtype.
    """
    if x.shape[0] and torch.is_grad_enabled():
        given = (x, total, peak)
        if any(t is not None and t.requires_grad for t in given):
            return _reference.cumulative_max_pool(
                x, kernel, stride, padding, dilation, ceil_mode, total, peak
            )
    return _maps.cumulative_max_pool(
        x, kernel, stride, padding, dilation, ceil_mode, total, peak, state
    )


# ---- dsr ---------------------------------------------------------------------------------------


def dsr_backward(
    x_seq: Tensor,
    grad_out: Tensor,
    threshold: Tensor | _Number,
    kind: str = "if",
    tau: float = 1.0,
    dt: float = 1.0,
    channel_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of spikes by differentiation on spike representation.

    Source: Meng et al., CVPR 2022. Spikes stand for their (weighted) mean, a clipped function of
    the mean current. IF: with ``G = sum_t g_t`` and ``m = mean_t x_t``, the gradient of every x_t
    is ``G / T`` where ``0 <= m <= threshold``, that of the threshold the sum of G where
    ``m > threshold``. LIF: means weigh step t by ``exp(-(T - t) dt / tau)``, t from 1;
    ``G = T mean_t g_t``; the gradient of x_t is ``G / (tau T)`` where
    ``0 < m < tau threshold / dt``, that of the threshold ``dt`` times the sum of G where m is
    above. Sums over time run in order, sums over neurons in a fixed order in float64.

    Args:
        x_seq: the current ``[T, *shape]``, float32, float64, float16 or bfloat16; T at least 1.
        grad_out: gradient of the spikes, ``[T, *shape]``.
        threshold: as said in the module.
        kind: ``"if"`` or ``"lif"``.
        tau, dt: positive, finite; read for ``"lif"`` only.
        channel_dim: dimension of ``shape`` along which a 1-D threshold is per channel.

    Returns:
        ``(grad_x, grad_threshold)``: ``[T, *shape]`` of the dtype of ``x_seq``, expanded over T
        (one step's memory), and the threshold's shape and dtype (0-d, dtype of ``x_seq``, for a
        number).

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a value out of range or a shape that does not fit.
    """
    _tensor("x_seq", x_seq)
    if x_seq.dim() == 0 or x_seq.shape[0] == 0:
        raise ValueError(
            f"x_seq has shape {tuple(x_seq.shape)}; it must be [T, *shape] with T at least 1"
        )
    _like("grad_out", grad_out, x_seq, x_seq.shape)
    if kind not in ("if", "lif"):
        raise ValueError(f"kind={kind!r} is unknown; allowed are 'if' and 'lif'")
    tau, dt = operands.number("tau", tau), operands.number("dt", dt)
    state, shape = _reference.state_dtype(x_seq.dtype), x_seq.shape[1:]
    _check_positive("tau", tau, state)
    _check_positive("dt", dt, state)
    th, value = _shared("threshold", threshold, shape, channel_dim, x_seq.device, state)
    grad_x, grad_threshold = _maps.dsr_backward(x_seq, grad_out, th, value, kind == "lif", tau, dt)
    if isinstance(threshold, Tensor):
        grad_threshold = grad_threshold.reshape(threshold.shape)
    return grad_x.expand(x_seq.shape), grad_threshold


# ---- mmse --------------------------------------------------------------------------------------


def mmse_errors(values: Tensor, candidates: Tensor, T: int, v_init_fraction: float = 0.0) -> Tensor:
    """Squared distance of activations to what T steps can represent, for every candidate threshold.

    Source: Li et al., ICML 2021 (SNN Calibration), with the initial potential in the staircase:
    the sum over a channel of ``(a - V/T clip(floor(a T / V + v_init_fraction), 0, T))^2``, each
    residual in the state dtype, squares and sums in float64 in a fixed order.

    Args:
        values: activations ``[C, n]``, float32, float64, float16 or bfloat16.
        candidates: thresholds ``[C, K]``, positive and finite; rounded to the state dtype.
        T: number of steps, at least 1.
        v_init_fraction: initial potential over threshold, finite; 1/2 for OPI.

    Returns:
        float64 ``[C, K]``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a value out of range or a shape that does not fit.
    """
    _tensor("values", values)
    _tensor("candidates", candidates)
    if values.dim() != 2:
        raise ValueError(f"values has shape {tuple(values.shape)}; it must be [C, n]")
    if candidates.dim() != 2 or len(candidates) != len(values):
        raise ValueError(
            f"candidates has shape {tuple(candidates.shape)}; it must be [{len(values)}, K] for "
            f"values of shape {tuple(values.shape)}"
        )
    if candidates.device != values.device:
        raise ValueError(f"candidates is on {candidates.device}, values on {values.device}")
    _whole("T", T, 1, 2**24)
    state = _reference.state_dtype(values.dtype)
    fraction = _finite("v_init_fraction", v_init_fraction, state)
    _check_positive("candidates", candidates, state)
    return _maps.mmse_errors(values.detach(), candidates.detach(), T, fraction)


def mmse_threshold(
    values: Tensor, T: int, v_init_fraction: float = 0.0, candidates: int = 95
) -> tuple[Tensor, Tensor]:
    """The threshold ``max (1 - 0.01 i)``, i from 0, with the least :func:`mmse_errors`.

    Args:
        values, T, v_init_fraction: as there; values are finite.
        candidates: how many i are tried, at most 100.

    Returns:
        ``(threshold, mse)``, float64 ``[C]``: of equal candidates the largest; 0 for a channel
        without a positive value. The mean squared error is that of the threshold rounded to the
        state dtype.

    Raises:
        TypeError, ValueError: as :func:`mmse_errors`; no values, or values that are not finite.
    """
    _tensor("values", values)
    if values.dim() != 2 or values.shape[1] == 0:
        raise ValueError(
            f"values has shape {tuple(values.shape)}; it must be [C, n] with n at least 1"
        )
    _whole("candidates", candidates, 1, 100)
    largest = values.detach().amax(1).double().clamp(min=0)
    if _readable(values) and bool((bad := ~torch.isfinite(values)).any()):
        channel, i = bad.nonzero()[0].tolist()
        raise ValueError(f"values must be finite; channel {channel} has {values[channel, i]:g}")
    grid = 1 - 0.01 * torch.arange(candidates, dtype=torch.float64, device=values.device)
    tried = largest[:, None] * grid
    # A silent channel divides by a tiny threshold instead of 0.
    tiny = torch.finfo(_reference.state_dtype(values.dtype)).tiny
    errors = mmse_errors(values, tried.clamp(min=tiny), T, v_init_fraction)
    # The first of equals: argmin does not say which it takes.
    best = (errors == errors.amin(1, keepdim=True)).to(torch.uint8).argmax(1, keepdim=True)
    return tried.gather(1, best)[:, 0], errors.gather(1, best)[:, 0] / values.shape[1]


# ---- histogram ---------------------------------------------------------------------------------


def histogram_update(counts: Tensor, sums: Tensor, values: Tensor, scale: Tensor) -> None:
    """Adds the positive values of each channel to a histogram, in place and in one pass.

    A value v counts in bin ``min(int(v scale), bins - 1)``; its product is float64. Counts are the
    same everywhere. Sums run over the values of a bin in their order on CPUs; on CUDA they are
    torch's ``bincount``. A CUDA scale is not checked: negative products count in the first bin, NaN
    in the last.

    Args:
        counts: int64 ``[C, bins]``, contiguous.
        sums: float64 ``[C, bins]``, contiguous: of the values.
        values: ``[C, n]``, float32, float64, float16 or bfloat16; the others are skipped.
        scale: float64 ``[C]``, bins per unit, positive; infinity counts all in the last bin.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a shape that does not fit, or a scale that is not positive.
    """
    _tensor("values", values)
    _tensor("counts", counts, (torch.int64,))
    _tensor("sums", sums, (torch.float64,))
    _tensor("scale", scale, (torch.float64,))
    if values.dim() != 2:
        raise ValueError(f"values has shape {tuple(values.shape)}; it must be [C, n]")
    for name, table in (("counts", counts), ("sums", sums)):
        if table.dim() != 2 or len(table) != len(values) or table.shape[1] < 1:
            raise ValueError(
                f"{name} has shape {tuple(table.shape)}; it must be [{len(values)}, bins]"
            )
        if not table.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    if sums.shape != counts.shape:
        raise ValueError(
            f"sums has shape {tuple(sums.shape)}; that of counts is {tuple(counts.shape)}"
        )
    if scale.shape != values.shape[:1]:
        raise ValueError(f"scale has shape {tuple(scale.shape)}; it must be ({len(values)},)")
    for name, tensor in (("counts", counts), ("sums", sums), ("scale", scale)):
        if tensor.device != values.device:
            raise ValueError(f"{name} is on {tensor.device}, values on {values.device}")
    if _readable(scale) and bool((bad := ~(scale > 0)).any()):
        i = int(bad.nonzero()[0])
        raise ValueError(
            f"scale must be positive; element {i} of {len(scale)} is {scale[i].item()}"
        )
    _maps.histogram_update(counts, sums, values.detach(), scale)


# ---- time to first spike -----------------------------------------------------------------------


def ttfs_encode(
    a: Tensor,
    threshold: Tensor | _Number,
    T: int,
    round: bool = False,
    channel_dim: int | None = None,
) -> Tensor:
    """When a neuron with a falling threshold fires: the first t with a >= threshold (T - t) / T.

    Args:
        a: values ``[*shape]``, float32, float64, float16 or bfloat16.
        threshold: as said in the module.
        T: number of steps, 1 to 32767.
        round: add ``threshold / 2T`` to ``a`` first: the nearest level instead of the one below.
        channel_dim: dimension of ``a`` along which a 1-D threshold is per channel.

    Returns:
        Times ``[*shape]``, uint8 up to T = 255, else int16; T says no spike (NaN too).

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a value out of range or a shape that does not fit.
    """
    _tensor("a", a)
    _whole("T", T, 1, 2**15 - 1)
    state = _reference.state_dtype(a.dtype)
    th, value = _shared("threshold", threshold, a.shape, channel_dim, a.device, state)
    return _maps.ttfs_encode(a, th, value, T, bool(round))


def ttfs_decode(
    times: Tensor,
    threshold: Tensor | _Number,
    T: int,
    dtype: torch.dtype = torch.float32,
    channel_dim: int | None = None,
) -> Tensor:
    """What :func:`ttfs_encode` represents: ``threshold (T - t) / T``; 0 without a spike.

    Args:
        times: ``[*shape]``, uint8 or int16. T and above say no spike; so do negative times.
        threshold, T, channel_dim: as there.
        dtype: float32, float64, float16 or bfloat16.

    Returns:
        ``[*shape]`` of ``dtype``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a value out of range or a shape that does not fit.
    """
    _tensor("times", times, (torch.uint8, torch.int16))
    _whole("T", T, 1, 2**15 - 1)
    if dtype not in _FLOATS:
        raise ValueError(f"dtype={dtype} is not offered; allowed are {_names(*_FLOATS)}")
    state = _reference.state_dtype(dtype)
    th, value = _shared("threshold", threshold, times.shape, channel_dim, times.device, state)
    return _maps.ttfs_decode(times, th, value, T, dtype)


# ---- bit planes --------------------------------------------------------------------------------


def bit_planes(
    z: Tensor,
    threshold: Tensor | _Number,
    T: int,
    planes: bool = False,
    channel_dim: int | None = None,
) -> Any:
    """The T bits of an activation, most significant first: bit-serial spikes.

    Source: Datta et al., 2023. With ``D = threshold / (2^T - 1)`` and ``m = z + D / 2``, step t
    of 1..T fires where ``m >= D 2^(T - t)``, which is then subtracted.

    Args:
        z: activations ``[*shape]``, float32, float64, float16 or bfloat16.
        threshold: as said in the module.
        T: number of bits, 1 to 31.
        planes: also return the bits one by one.
        channel_dim: dimension of ``z`` along which a 1-D threshold is per channel.

    Returns:
        Integers ``[*shape]``: uint8 up to 8 bits, int16 up to 15, else int32; with ``planes`` the
        pair of them and uint8 ``[T, *shape]``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a value out of range or a shape that does not fit.
    """
    _tensor("z", z)
    _whole("T", T, 1, 31)
    state = _reference.state_dtype(z.dtype)
    th, value = _shared("threshold", threshold, z.shape, channel_dim, z.device, state)
    q, rows = _maps.bit_planes(z, th, value, T, bool(planes))
    return (q, rows) if planes else q


# ---- bits --------------------------------------------------------------------------------------


def pack_bits(spikes: Tensor) -> Tensor:
    """Spikes as bits: step t is bit ``t % bits`` of word ``t // bits``; whatever is not 0 is 1.

    Args:
        spikes: ``[T, *shape]``, T at least 1: float32, float64, float16, bfloat16, uint8 or bool.

    Returns:
        Words ``[W, *shape]``: one uint8 up to T = 8, one int16 up to 16, else int32 words of 32
        steps each; unused bits are 0.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: no time steps.
    """
    _tensor("spikes", spikes, (*_FLOATS, torch.uint8, torch.bool))
    if spikes.dim() == 0 or spikes.shape[0] == 0:
        raise ValueError(
            f"spikes has shape {tuple(spikes.shape)}; it must be [T, *shape] with T at least 1"
        )
    if spikes.dtype == torch.bool:
        spikes = spikes.view(torch.uint8)
    return _maps.pack_bits(spikes)


def unpack_bits(
    words: Tensor,
    T: int,
    dtype: torch.dtype = torch.float32,
    amplitude: Tensor | _Number | None = None,
    channel_dim: int | None = None,
) -> Tensor:
    """What :func:`pack_bits` packed.

    Args:
        words: ``[W, *shape]``, uint8, int16 or int32: one word of at least T bits, or
            ``ceil(T / 32)`` int32 words.
        T: number of steps, at least 1.
        dtype: of the spikes: float32, float64, float16, bfloat16 or uint8.
        amplitude: what a spike weighs: ``None`` (1), a number or a tensor that broadcasts to
            ``shape``; rounded once to ``dtype``, selected and never multiplied. Not for uint8.
        channel_dim: dimension of ``shape`` along which a 1-D amplitude is per channel.

    Returns:
        Spikes ``[T, *shape]`` of ``dtype``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a value out of range or a shape that does not fit.
    """
    _words(words)
    _whole("T", T, 1, 2**31 - 1)
    bits = 8 * words.element_size()
    needed = -(-T // 32) if words.dtype == torch.int32 else 1
    if words.shape[0] != needed or bits * needed < T:
        raise ValueError(
            f"words is {words.dtype} {tuple(words.shape)}, which does not hold T={T} steps: "
            f"allowed are one word of at least T bits, or {-(-T // 32)} of int32"
        )
    if dtype not in (*_FLOATS, torch.uint8):
        allowed = _names(*_FLOATS, torch.uint8)
        raise ValueError(f"dtype={dtype} is not offered; allowed are {allowed}")
    if amplitude is None:
        th, value = None, 1.0
    elif dtype == torch.uint8:
        raise ValueError("amplitude cannot be combined with dtype=torch.uint8, which holds 0 and 1")
    else:
        th, value = _shared(
            "amplitude", amplitude, words.shape[1:], channel_dim, words.device, None
        )
        th = None if th is None else th.detach()
    return _maps.unpack_bits(words, T, dtype, th, value)


def popcount(words: Tensor) -> Tensor:
    """The number of ones in words ``[W, *shape]`` (as of :func:`pack_bits`), int32 ``[*shape]``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: no dimension of words.
    """
    _words(words)
    return _maps.popcount(words)


def _words(words: Any) -> None:
    _tensor("words", words, _WORDS)
    if words.dim() == 0:
        raise ValueError("words has no dimensions; it is [W, *shape]")
