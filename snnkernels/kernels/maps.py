"""Running the small kernels: allocate outputs, pick an implementation, hand it its params.

What each computes is said in :mod:`snnkernels.maps`, which checks the arguments. Each function here
is also a torch operator of the same name, for torch.compile, export and tensor subclasses; eager
calls skip the dispatcher. A threshold is a tensor that broadcasts, or None and a number beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Size, Tensor

from . import backends, maps_params, operands
from . import maps_reference as reference
from .maps_reference import LANES, state_dtype
from .params import DTYPE_CODES

# Kept for the life of the process: its end would unregister the operators.
_LIBRARY = torch.library.Library("snnkernels", "FRAGMENT")
_PLAIN = (Tensor, torch.nn.Parameter)
_SEGMENT, _SEGMENTS, _TABLE = 1024, 1024, 1 << 18
_TAPS = 64  # kPoolTaps


def _operator(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Registers a function as an operator; calls of the result go through it where that matters."""

    def register(run: Callable) -> Callable:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        # Gradients come from the autograd.Function around the operator: a call that bypasses it
        # fails loudly in backward.
        _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"snnkernels::{name}", fake)
        operator = getattr(torch.ops.snnkernels, name).default

        @wraps(run)
        def call(first: Tensor, *rest: Any) -> Any:
            if (
                torch.compiler.is_compiling()
                or type(first) not in _PLAIN
                or torch._C._len_torch_dispatch_stack()
            ):
                return operator(first, *rest)
            with torch.no_grad():
                return run(first, *rest)

        return call

    return register


def _kernels(device: torch.device) -> backends.Kernels | None:
    kernels = backends.choose(device)
    return None if kernels is None or kernels.map is None else kernels


def _launch(kernels: backends.Kernels, name: str, device: torch.device, **values: Any) -> None:
    assert kernels.map is not None
    kernels.map(name, maps_params.RECORDS[name].pack(**values), device)


def _dense(x: Tensor) -> Tensor:
    """``x`` contiguous and aligned to its element size."""
    x = x.contiguous()
    return x if x.data_ptr() % x.element_size() == 0 else x.clone()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class _Shared:
    """A threshold or amplitude as kernels read it; keeps its memory alive."""

    def __init__(self, value: Tensor | None, number: float, shape: Size, dtype: torch.dtype):
        if value is None:
            self.packed: tuple[int, int, int, float] = (0, 1, 1, number)
        else:
            self.tensor, inner, count = operands.share(value.detach(), shape, dtype)
            self.packed = (self.tensor.data_ptr(), inner, count, 0.0)


def _filled(x: Tensor, value: Tensor | None, number: float, dtype: torch.dtype) -> Tensor:
    """The same as a tensor, for the reference; rounded before filling, which refuses overflow."""
    if value is not None:
        return value.detach().to(dtype)
    return x.new_full((), operands.rounded(number, dtype), dtype=dtype)


# ---- sums in a fixed order ---------------------------------------------------------------------


def segments(rows: int, n: int) -> tuple[int, int]:
    """How rows of n elements are cut, from the sizes alone: ``(length, number)``."""
    wanted = max(1, min(-(-n // _SEGMENT), _SEGMENTS, _TABLE // max(rows, 1)))
    length = max(-(-n // (wanted * LANES)) * LANES, LANES)
    return length, max(-(-n // length), 1)


def _segment_sums(
    kernels: backends.Kernels | None, values: Tensor, rows: int, inner: int, length: int, count: int
) -> Tensor:
    each = values.numel() // max(rows, 1)
    if kernels is None:
        table = values.reshape(-1, rows, inner).transpose(0, 1).reshape(rows, each)
        return reference.sums(table, length)
    out = values.new_empty((rows, count), dtype=torch.float64)
    if out.numel():
        _launch(
            kernels, "sums", values.device, values=values.data_ptr(), out=out.data_ptr(),
            N=out.numel(), rows=rows, inner=inner, each=each, length=length, segments=count,
            dtype=DTYPE_CODES[values.dtype],
        )  # fmt: skip
    return out


def _row_sums(values: Tensor, rows: int, inner: int) -> Tensor:
    """float64 ``[rows]``: sums of ``values`` seen as ``[*, rows, inner]``, in a fixed order."""
    kernels = _kernels(values.device)
    if not values.numel():
        return values.new_zeros(rows, dtype=torch.float64)
    length, count = segments(rows, values.numel() // rows)
    partial = _segment_sums(kernels, values, rows, inner, length, count)
    return _of_segments(partial)


def _of_segments(partial: Tensor) -> Tensor:
    """``[rows, segments]`` summed over segments."""
    rows, count = partial.shape
    if count == 1 or rows == 0:
        return partial.reshape(rows)
    length = -(-count // LANES) * LANES
    return _segment_sums(_kernels(partial.device), partial, rows, count, length, 1).reshape(rows)


def _summed_to(shares: Tensor, like: Tensor) -> Tensor:
    """Sums ``[*shape]`` to what broadcasts to it: float64 inside, the same bits everywhere."""
    extra = shares.dim() - like.dim()
    sizes = [1] * extra + list(like.shape)
    kept = [i for i, n in enumerate(sizes) if n != 1]
    if [n for n in shares.shape if n != 1] == [sizes[i] for i in kept]:
        return shares.reshape(like.shape).to(like.dtype)
    rows = math.prod(sizes)
    if kept and kept[-1] - kept[0] >= len(kept):
        between = range(kept[0], kept[-1] + 1)
        if any(sizes[i] == 1 and shares.shape[i] != 1 for i in between):
            rest = [i for i in range(shares.dim()) if i not in kept]
            shares = shares.permute(*kept, *rest).contiguous()
            return (
                _row_sums(shares, rows, shares.numel() // max(rows, 1))
                .view(like.shape)
                .to(like.dtype)
            )
    inner = math.prod(shares.shape[kept[-1] + 1 :]) if kept else max(shares.numel(), 1)
    return _row_sums(shares.contiguous(), rows, inner).view(like.shape).to(like.dtype)


# ---- qcfs --------------------------------------------------------------------------------------


@_operator(
    "qcfs(Tensor x, Tensor? threshold, float value, int levels, float phase) -> Tensor",
    lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format),
)
def qcfs(x: Tensor, threshold: Tensor | None, value: float, levels: int, phase: float) -> Tensor:
    """:func:`snnkernels.maps.qcfs` without gradients."""
    kernels = _kernels(x.device)
    if kernels is None:
        y = reference.qcfs(x, _filled(x, threshold, value, x.dtype), levels, phase)
        return y.contiguous()
    x = _dense(x)
    shared = _rounded(x, threshold, value)
    out = torch.empty_like(x)
    if x.numel():
        _launch(
            kernels, "qcfs", x.device, x=x.data_ptr(), out=out.data_ptr(), threshold=shared.packed,
            N=x.numel(), levels=levels, phase=phase, dtype=DTYPE_CODES[x.dtype],
        )  # fmt: skip
    return out


def _rounded(x: Tensor, threshold: Tensor | None, value: float) -> _Shared:
    """A threshold rounded to the dtype of x first, as QCFS does."""
    if threshold is not None:
        threshold = threshold.detach().to(x.dtype)
    return _Shared(threshold, operands.rounded(value, x.dtype), x.shape, state_dtype(x.dtype))


@_operator(
    "qcfs_backward(Tensor x, Tensor grad, Tensor? threshold, float value, int levels, float phase, "
    "bool clip_first, bool shared) -> (Tensor grad_x, Tensor grad_threshold)",
    lambda x, grad, threshold, value, levels, phase, clip_first, shared: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(threshold, memory_format=torch.contiguous_format)
        if shared
        else x.new_empty(0),
    ),
)
def qcfs_backward(
    x: Tensor,
    grad: Tensor,
    threshold: Tensor | None,
    value: float,
    levels: int,
    phase: float,
    clip_first: bool,
    shared: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients for x and, if ``shared``, for the threshold (else empty)."""
    kernels = _kernels(x.device)
    x, grad = _dense(x), _dense(grad.to(x.dtype))
    if kernels is None:
        filled = _filled(x, threshold, value, x.dtype)
        out, shares = reference.qcfs_backward(x, grad, filled, levels, phase, clip_first)
    else:
        th = _rounded(x, threshold, value)
        out = torch.empty_like(x)
        shares = x.new_empty(x.shape if shared else (0,), dtype=state_dtype(x.dtype))
        if x.numel():
            _launch(
                kernels, "qcfs_backward", x.device, x=x.data_ptr(), grad=grad.data_ptr(),
                out=out.data_ptr(), grad_threshold=_pointer(shares if shared else None),
                threshold=th.packed, N=x.numel(), levels=levels, phase=phase,
                dtype=DTYPE_CODES[x.dtype], clip_first=clip_first,
            )  # fmt: skip
    if not shared or threshold is None:
        return out, x.new_empty(0)
    return out, _summed_to(shares, threshold)


# ---- cumulative max-pool -----------------------------------------------------------------------


def pooled_size(n: int, k: int, s: int, p: int, d: int, ceil_mode: bool) -> int:
    """The number of windows along a dimension, as torch counts them."""
    size = (n + 2 * p - d * (k - 1) - 1 + (s - 1 if ceil_mode else 0)) // s + 1
    return size - 1 if ceil_mode and (size - 1) * s >= n + p else size


def _pool_fake(x, kernel, stride, padding, dilation, ceil_mode, total, peak, state):  # type: ignore
    geometry = zip(x.shape[3:], kernel, stride, padding, dilation, strict=True)
    size = [pooled_size(*g, ceil_mode) for g in geometry]
    wide, full = state_dtype(x.dtype), (*x.shape[1:3], *size)
    return (
        x.new_empty((x.shape[0], *full)),
        x.new_empty(x.shape[1:] if state else (0,), dtype=wide),
        x.new_empty(full if state else (0,), dtype=wide),
    )


@_operator(
    "cumulative_max_pool(Tensor x, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, "
    "bool ceil_mode, Tensor? total, Tensor? peak, bool state) "
    "-> (Tensor out, Tensor total, Tensor peak)",
    _pool_fake,
)
def cumulative_max_pool(
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
    """Output and, if ``state`` (else empty), running sums and maxima after the last step.

    Sums of currents under no window are unspecified. ``total`` and ``peak``: those before.
    """
    kernels = _kernels(x.device)
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = kernel, stride, padding, dilation
    wide, T = state_dtype(x.dtype), x.shape[0]
    H, W = x.shape[3:]
    OH = pooled_size(H, kh, sh, ph, dh, ceil_mode)
    OW = pooled_size(W, kw, sw, pw, dw, ceil_mode)
    shape = (*x.shape[1:3], OH, OW)
    nothing = x.new_empty(0, dtype=wide)
    if T == 0 or not math.prod(shape):
        before = [x.new_zeros(s, dtype=wide) for s in (x.shape[1:], shape)]
        before = [
            b if t is None else t.to(wide, copy=True)
            for b, t in zip(before, (total, peak), strict=True)
        ]
        return x.new_empty((T, *shape)), *(before if state else (nothing, nothing))
    size = 2 if max(kh, kw) <= 2 else 3 if max(kh, kw) <= 3 else 0
    if kernels is None or (kernels.gpu and size == 0 and kh * kw > _TAPS):
        if total is not None:
            total = total.to(wide)
        out, total, peak = reference.cumulative_max_pool(
            x, kernel, stride, padding, dilation, ceil_mode, total,
            None if peak is None else peak.to(wide),
        )  # fmt: skip
        if not state:
            return out.contiguous(), nothing, nothing
        # Copies: of one step the sum is the input itself.
        own = [t.clone(memory_format=torch.contiguous_format) for t in (total, peak)]
        return out.contiguous(), own[0], own[1]
    x = _dense(x)
    total_in = None if total is None else _dense(total.to(wide))
    peak_in = None if peak is None else _dense(peak.to(wide))
    out = x.new_empty((T, *shape))
    kept = state or not kernels.gpu  # on CPUs the sums live in their output
    total_out = x.new_empty(x.shape[1:], dtype=wide) if kept else None
    peak_out = x.new_empty(shape, dtype=wide) if kept else None
    gh, gw = math.gcd(sh, dh), math.gcd(sw, dw)
    _launch(
        kernels, "cumulative_max_pool", x.device, x=x.data_ptr(), out=out.data_ptr(),
        total_in=_pointer(total_in), total=_pointer(total_out), peak_in=_pointer(peak_in),
        peak=_pointer(peak_out), N=math.prod(shape), T=T, planes=math.prod(shape[:2]), H=H, W=W,
        OH=OH, OW=OW, kh=kh, kw=kw, sh=sh, sw=sw, ph=ph, pw=pw, dh=dh, dw=dw, owner_mh=dh // gh,
        owner_jh=sh // gh, owner_mw=dw // gw, owner_jw=sw // gw, dtype=DTYPE_CODES[x.dtype],
        size=size,
    )  # fmt: skip
    if not state or total_out is None or peak_out is None:
        return out, nothing, nothing
    return out, total_out, peak_out


# ---- dsr ---------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _weights(T: int, tau: float, dt: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What each step weighs, sum 1: computed in float64 and rounded once."""
    each = [math.exp(-(T - t) * dt / tau) for t in range(1, T + 1)]
    whole = math.fsum(each)
    return torch.tensor([w / whole for w in each], dtype=torch.float64).to(dtype).to(device)


@_operator(
    "dsr_backward(Tensor x, Tensor grad, Tensor? threshold, float value, bool lif, float tau, "
    "float dt) -> (Tensor grad_x, Tensor grad_threshold)",
    lambda x, grad, threshold, value, lif, tau, dt: (
        x.new_empty(x.shape[1:]),
        x.new_empty(()) if threshold is None else torch.empty_like(threshold),
    ),
)
def dsr_backward(
    x: Tensor,
    grad: Tensor,
    threshold: Tensor | None,
    value: float,
    lif: bool,
    tau: float,
    dt: float,
) -> tuple[Tensor, Tensor]:
    """The gradient of x (one step's, ``[*shape]``) and of the threshold."""
    kernels = _kernels(x.device)
    x, grad = _dense(x), _dense(grad.to(x.dtype))
    state, T, shape = state_dtype(x.dtype), x.shape[0], x.shape[1:]
    weights = _weights(T, tau, dt, state, x.device) if lif else None
    divisor = tau * T if lif else float(T)
    if kernels is None:
        filled = _filled(x, threshold, value, state)
        # Scalars rounded as the kernels round theirs.
        tau_, dt_, divisor_ = (operands.rounded(v, state) for v in (tau, dt, divisor))
        grad_x, shares = reference.dsr_backward(x, grad, filled, weights, tau_, dt_, divisor_)
    else:
        th = _Shared(threshold, value, shape, state)
        grad_x, shares = x.new_empty(shape), x.new_empty(shape, dtype=state)
        if grad_x.numel():
            _launch(
                kernels, "dsr_backward", x.device, x=x.data_ptr(), grad=grad.data_ptr(),
                weights=_pointer(weights), grad_x=grad_x.data_ptr(),
                grad_threshold=shares.data_ptr(), threshold=th.packed, N=grad_x.numel(), T=T,
                tau=tau, dt=dt, divisor=divisor, dtype=DTYPE_CODES[x.dtype],
            )  # fmt: skip
    like = x.new_empty(()) if threshold is None else threshold.detach()
    total = _summed_to(shares, like.double())
    return grad_x, (dt * total if lif else total).to(like.dtype)


# ---- mmse --------------------------------------------------------------------------------------


@_operator(
    "mmse_errors(Tensor values, Tensor candidates, int T, float fraction) -> Tensor",
    lambda values, candidates, *rest: candidates.new_empty(candidates.shape, dtype=torch.float64),
)
def mmse_errors(values: Tensor, candidates: Tensor, T: int, fraction: float) -> Tensor:
    """:func:`snnkernels.maps.mmse_errors`."""
    kernels = _kernels(values.device)
    values = _dense(values)
    candidates = _dense(candidates.to(state_dtype(values.dtype)))
    (C, n), K = values.shape, candidates.shape[1]
    length, count = segments(C * K, n)
    if not C * K or not n:
        return candidates.new_zeros((C, K), dtype=torch.float64)
    if kernels is None:
        fraction = operands.rounded(fraction, candidates.dtype)
        partial = reference.mmse_errors(values, candidates, T, fraction, length)
    else:
        partial = values.new_empty((C, K, count), dtype=torch.float64)
        _launch(
            kernels, "mmse_errors", values.device, values=values.data_ptr(),
            candidates=candidates.data_ptr(), out=partial.data_ptr(), N=partial.numel(),
            channels=C, each=n, K=K, length=length, segments=count, T=float(T), fraction=fraction,
            dtype=DTYPE_CODES[values.dtype],
        )  # fmt: skip
    return _of_segments(partial.flatten(0, 1)).view(C, K)


# ---- histogram ---------------------------------------------------------------------------------


@_operator(
    "histogram_update(Tensor(a!) counts, Tensor(b!) sums, Tensor values, Tensor scale) -> ()",
    lambda *arguments: None,
)
def histogram_update(counts: Tensor, sums: Tensor, values: Tensor, scale: Tensor) -> None:
    """:func:`snnkernels.maps.histogram_update`."""
    kernels = _kernels(values.device)
    if not values.numel():
        return
    if kernels is None:
        reference.histogram_update(counts, sums, values, scale)
        return
    values, scale, bins = _dense(values), _dense(scale), counts.shape[1]
    # On GPUs the kernel counts, by integer atomics; sums would need atomics on floats, whose
    # order shows, and a table for every thread is larger than the data: they stay with torch.
    scratch = None if kernels.gpu else torch.zeros_like(sums)
    _launch(
        kernels, "histogram_update", values.device, values=values.data_ptr(),
        counts=counts.data_ptr(), sums=sums.data_ptr(), scale=scale.data_ptr(),
        scratch=_pointer(scratch), N=values.numel(), channels=len(values), each=values.shape[1],
        bins=bins, dtype=DTYPE_CODES[values.dtype],
    )  # fmt: skip
    if kernels.gpu:
        index, positive = reference.bins_of(values, scale, bins)
        sums += torch.bincount(index, positive, minlength=sums.numel()).view_as(sums)


# ---- time to first spike -----------------------------------------------------------------------


def _times_dtype(T: int) -> torch.dtype:
    return torch.uint8 if T <= 255 else torch.int16


@_operator(
    "ttfs_encode(Tensor a, Tensor? threshold, float value, int T, bool round) -> Tensor",
    lambda a, threshold, value, T, round: a.new_empty(a.shape, dtype=_times_dtype(T)),
)
def ttfs_encode(a: Tensor, threshold: Tensor | None, value: float, T: int, round: bool) -> Tensor:
    """:func:`snnkernels.maps.ttfs_encode`."""
    kernels, state, dtype = _kernels(a.device), state_dtype(a.dtype), _times_dtype(T)
    if kernels is None:
        times = reference.ttfs_encode(a, _filled(a, threshold, value, state), T, round, dtype)
        return times.contiguous()
    a = _dense(a)
    shared = _Shared(threshold, value, a.shape, state)
    times = a.new_empty(a.shape, dtype=dtype)
    if a.numel():
        _launch(
            kernels, "ttfs_encode", a.device, **{"from": a.data_ptr()}, to=times.data_ptr(),
            threshold=shared.packed, N=a.numel(), T=float(T), dtype=DTYPE_CODES[a.dtype],
            bytes=dtype.itemsize, round=round,
        )  # fmt: skip
    return times


@_operator(
    "ttfs_decode(Tensor times, Tensor? threshold, float value, int T, ScalarType dtype) -> Tensor",
    lambda times, threshold, value, T, dtype: times.new_empty(times.shape, dtype=dtype),
)
def ttfs_decode(
    times: Tensor, threshold: Tensor | None, value: float, T: int, dtype: torch.dtype
) -> Tensor:
    """:func:`snnkernels.maps.ttfs_decode`."""
    kernels, state = _kernels(times.device), state_dtype(dtype)
    if kernels is None:
        filled = _filled(times, threshold, value, state)
        return reference.ttfs_decode(times, filled, T, dtype).contiguous()
    times = _dense(times)
    shared = _Shared(threshold, value, times.shape, state)
    out = times.new_empty(times.shape, dtype=dtype)
    if times.numel():
        _launch(
            kernels, "ttfs_decode", times.device, **{"from": times.data_ptr()}, to=out.data_ptr(),
            threshold=shared.packed, N=times.numel(), T=float(T), dtype=DTYPE_CODES[dtype],
            bytes=times.element_size(),
        )  # fmt: skip
    return out


# ---- bit planes --------------------------------------------------------------------------------


def _integer_dtype(T: int) -> torch.dtype:
    """Holds T bits without a sign."""
    return torch.uint8 if T <= 8 else torch.int16 if T <= 15 else torch.int32


@_operator(
    "bit_planes(Tensor z, Tensor? threshold, float value, int T, bool planes) "
    "-> (Tensor q, Tensor planes)",
    lambda z, threshold, value, T, planes: (
        z.new_empty(z.shape, dtype=_integer_dtype(T)),
        z.new_empty((T, *z.shape) if planes else (0,), dtype=torch.uint8),
    ),
)
def bit_planes(
    z: Tensor, threshold: Tensor | None, value: float, T: int, planes: bool
) -> tuple[Tensor, Tensor]:
    """:func:`snnkernels.maps.bit_planes`; the planes are empty unless asked for."""
    kernels, state, dtype = _kernels(z.device), state_dtype(z.dtype), _integer_dtype(T)
    if kernels is None:
        q, rows = reference.bit_planes(z, _filled(z, threshold, value, state), T, dtype)
        return q.contiguous(), rows.contiguous() if planes else rows.new_empty(0)
    z = _dense(z)
    shared = _Shared(threshold, value, z.shape, state)
    q = z.new_empty(z.shape, dtype=dtype)
    rows = z.new_empty((T, *z.shape) if planes else (0,), dtype=torch.uint8)
    if z.numel():
        _launch(
            kernels, "bit_planes", z.device, x=z.data_ptr(), q=q.data_ptr(),
            planes=rows.data_ptr() if planes else 0, threshold=shared.packed, N=z.numel(), T=T,
            largest=float(2**T - 1), dtype=DTYPE_CODES[z.dtype], bytes=dtype.itemsize,
        )  # fmt: skip
    return q, rows


# ---- bits --------------------------------------------------------------------------------------


def words_dtype(T: int) -> torch.dtype:
    """What holds the spikes of T steps: one word up to 32 steps, else int32 words."""
    return torch.uint8 if T <= 8 else torch.int16 if T <= 16 else torch.int32


@_operator(
    "unpack_bits(Tensor words, int T, ScalarType dtype, Tensor? amplitude, float value) -> Tensor",
    lambda words, T, dtype, amplitude, value: words.new_empty((T, *words.shape[1:]), dtype=dtype),
)
def unpack_bits(
    words: Tensor, T: int, dtype: torch.dtype, amplitude: Tensor | None, value: float
) -> Tensor:
    """:func:`snnkernels.maps.unpack_bits`."""
    kernels, shape = _kernels(words.device), words.shape[1:]
    if not dtype.is_floating_point:
        amplitude, value = None, 1.0
    if kernels is None:
        filled = _filled(words, amplitude, value, dtype).expand(shape)
        return reference.unpack_bits(words, T, filled).contiguous()
    words = _dense(words)
    shared = _Shared(amplitude, 0.0, shape, dtype)
    spikes = words.new_empty((T, *shape), dtype=dtype)
    if spikes.numel():
        _launch(
            kernels, "unpack_bits", words.device, words=words.data_ptr(), spikes=spikes.data_ptr(),
            amplitude=shared.packed, N=shape.numel(), T=T, W=len(words),
            amplitude_bits=operands.bits(value, dtype), word_bytes=words.element_size(),
            spike_bytes=dtype.itemsize,
        )  # fmt: skip
    return spikes


@_operator(
    "popcount(Tensor words) -> Tensor",
    lambda words: words.new_empty(words.shape[1:], dtype=torch.int32),
)
def popcount(words: Tensor) -> Tensor:
    """:func:`snnkernels.maps.popcount`."""
    kernels, shape = _kernels(words.device), words.shape[1:]
    if kernels is None:
        return reference.popcount(words)
    words = _dense(words)
    counts = words.new_empty(shape, dtype=torch.int32)
    if counts.numel():
        _launch(
            kernels, "popcount", words.device, words=words.data_ptr(), counts=counts.data_ptr(),
            N=counts.numel(), T=8 * words.element_size() * len(words), W=len(words),
            word_bytes=words.element_size(),
        )  # fmt: skip
    return counts


def _pack_fake(spikes: Tensor) -> Tensor:
    dtype = words_dtype(spikes.shape[0])
    words = -(-spikes.shape[0] // (8 * dtype.itemsize))
    return spikes.new_empty((words, *spikes.shape[1:]), dtype=dtype)


@_operator("pack_bits(Tensor spikes) -> Tensor", _pack_fake)
def pack_bits(spikes: Tensor) -> Tensor:
    """:func:`snnkernels.maps.pack_bits`."""
    kernels, T, shape = _kernels(spikes.device), spikes.shape[0], spikes.shape[1:]
    dtype = words_dtype(T)
    if kernels is None:
        return reference.pack_bits(spikes, dtype)
    spikes = _dense(spikes)
    words = spikes.new_empty((-(-T // (8 * dtype.itemsize)), *shape), dtype=dtype)
    if words.numel():
        _launch(
            kernels, "pack_bits", spikes.device, words=words.data_ptr(), spikes=spikes.data_ptr(),
            N=shape.numel(), T=T, W=len(words), word_bytes=dtype.itemsize,
            spike_bytes=spikes.element_size(),
        )  # fmt: skip
    return words
