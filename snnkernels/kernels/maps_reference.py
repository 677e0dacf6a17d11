"""The small kernels in plain PyTorch: the truth their kernels are tested against, and the fallback.

Thresholds come as tensors that broadcast to the elements, in the state dtype unless said
otherwise. What each computes is said in :mod:`snnkernels.maps`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LANES = 8  # sums side by side (kMapLanes of csrc/maps.h)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of thresholds and of what is computed in between."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows(rows: list[Tensor]) -> Tensor:
    """Sequential sum over time."""
    total = rows[0]
    for row in rows[1:]:
        total = total + row
    return total


# ---- qcfs --------------------------------------------------------------------------------------


def qcfs(x: Tensor, threshold: Tensor, levels: int, phase: float) -> Tensor:
    """``threshold`` in the dtype of x, to which every step is rounded."""
    step = torch.floor(x * levels / threshold + phase)
    return threshold * torch.clamp(step / levels, 0, 1)


def qcfs_backward(
    x: Tensor, grad: Tensor, threshold: Tensor, levels: int, phase: float, clip_first: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and each element's share of the threshold's in the state dtype."""
    state = state_dtype(x.dtype)
    q = torch.floor(x * levels / threshold + phase) / levels
    u = x / threshold if clip_first else q
    inside = (u >= 0) & (u <= 1)
    c = torch.clamp(q, 0, 1).to(state)
    share = torch.where(inside, c - x.to(state) / threshold.to(state), c)
    return torch.where(inside, grad, torch.zeros_like(grad)), grad.to(state) * share


# ---- sums --------------------------------------------------------------------------------------


def _lanes(each: Tensor, length: int) -> Tensor:
    """Sums ``[..., n]`` of float64 over segments, ``[..., segments]``: lane by lane, in order."""
    segments = max(1, -(-each.shape[-1] // length))
    padded = F.pad(each, (0, segments * length - each.shape[-1]))
    steps = padded.unflatten(-1, (segments, length // LANES, LANES))
    lanes = torch.zeros_like(steps[..., 0, :])
    for i in range(length // LANES):
        lanes = lanes + steps[..., i, :]
    a, b, c, d, e, f, g, h = lanes.unbind(-1)
    return ((a + e) + (c + g)) + ((b + f) + (d + h))


def sums(values: Tensor, length: int) -> Tensor:
    """float64 sums ``[rows, segments]`` of the values ``[rows, n]`` in segments of ``length``."""
    return _lanes(values.double(), length)


# ---- cumulative max-pool -----------------------------------------------------------------------


def cumulative_max_pool(
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    total: Tensor | None,
    peak: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, running sums and maxima after the last step; differentiable."""
    wide = x.to(state_dtype(x.dtype))
    total = wide[0] if total is None else total + wide[0]
    totals = [total]
    for step in wide[1:]:
        total = total + step
        totals.append(total)
    peaks = F.max_pool2d(
        torch.stack(totals).flatten(0, 1), kernel, stride, padding, dilation, ceil_mode
    )
    peaks = peaks.reshape(x.shape[0], x.shape[1], *peaks.shape[1:])
    before = torch.zeros_like(peaks[:1]) if peak is None else peak[None]
    out = peaks - torch.cat([before, peaks[:-1]])
    return out.to(x.dtype), total, peaks[-1]


# ---- dsr ---------------------------------------------------------------------------------------


def dsr_backward(
    x: Tensor,
    grad: Tensor,
    threshold: Tensor,
    weights: Tensor | None,
    tau: float,
    dt: float,
    divisor: float,
) -> tuple[Tensor, Tensor]:
    """The gradient of x at every step, and each neuron's share of the threshold's."""
    state, T = state_dtype(x.dtype), x.shape[0]
    wide, gradient = x.to(state), grad.to(state)
    if weights is None:
        mean = _rows(list(wide)) / T
        total = _rows(list(gradient))
        inside, above = (mean >= 0) & (mean <= threshold), mean > threshold
    else:
        mean = _rows([w * step for w, step in zip(weights, wide, strict=True)])
        total = T * _rows([w * step for w, step in zip(weights, gradient, strict=True)])
        bound = tau * threshold / dt
        inside, above = (mean > 0) & (mean < bound), mean > bound
    zero = torch.zeros_like(total)
    return torch.where(inside, total / divisor, zero).to(x.dtype), torch.where(above, total, zero)


# ---- mmse --------------------------------------------------------------------------------------


def mmse_errors(values: Tensor, candidates: Tensor, T: int, fraction: float, length: int) -> Tensor:
    """float64 ``[C, K, segments]``; ``candidates`` in the state dtype."""
    a = values.to(candidates.dtype)
    errors = []
    for v in candidates.unbind(1):
        v = v[:, None]
        steps = torch.clamp(torch.floor(a * T / v + fraction), 0, T)
        errors.append(_lanes((a - v / T * steps).double().square(), length))
    return torch.stack(errors, 1)


# ---- histogram ---------------------------------------------------------------------------------


def histogram_update(counts: Tensor, sums: Tensor, values: Tensor, scale: Tensor) -> None:
    """Adds to ``counts`` and ``sums`` ``[C, bins]`` in place; ``scale`` ``[C]`` is float64."""
    index, positive = bins_of(values, scale, counts.shape[1])
    counts += torch.bincount(index, minlength=counts.numel()).view_as(counts)
    sums += torch.bincount(index, positive, minlength=counts.numel()).view_as(sums)


def bins_of(values: Tensor, scale: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Where each positive value goes in the flattened table, and the values in float64."""
    channel, place = torch.nonzero(values > 0, as_tuple=True)
    positive = values[channel, place].double()
    # Clipped before it becomes an integer: infinity is no integer, nor is NaN, which goes last.
    index = (positive * scale[channel]).clamp_(0, bins - 1).nan_to_num_(bins - 1).long()
    return index + channel * bins, positive


# ---- time to first spike -----------------------------------------------------------------------


def ttfs_encode(a: Tensor, threshold: Tensor, T: int, round: bool, dtype: torch.dtype) -> Tensor:
    """Times of ``dtype``; T: no spike."""
    a = a.to(threshold.dtype)
    if round:
        a = a + threshold / (2 * T)
    times = torch.full(a.shape, T, dtype=dtype, device=a.device)
    for t in reversed(range(T)):
        times = torch.where(a >= threshold * (T - t) / T, t, times)
    return times.to(dtype)


def ttfs_decode(times: Tensor, threshold: Tensor, T: int, dtype: torch.dtype) -> Tensor:
    """Values of ``dtype``; times are read without their sign: negative ones are late."""
    remaining = (T - (times.to(torch.int32) & 0xFFFF)).clamp(min=0).to(threshold.dtype)
    return (threshold * remaining / T).to(dtype)


# ---- bit planes --------------------------------------------------------------------------------


def bit_planes(z: Tensor, threshold: Tensor, T: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Integers of ``dtype``, and planes uint8 ``[T, *shape]``, most significant first."""
    unit = threshold / (2**T - 1)
    rest = z.to(threshold.dtype) + unit / 2
    q, planes = torch.zeros(z.shape, dtype=torch.int64, device=z.device), []
    for t in range(T):
        h = unit * 2 ** (T - 1 - t)
        set_ = rest >= h
        rest = rest - torch.where(set_, h, torch.zeros_like(h))
        q = 2 * q + set_
        planes.append(set_.to(torch.uint8))
    return q.to(dtype), torch.stack(planes)


# ---- bits --------------------------------------------------------------------------------------


def _bit(words: Tensor, bit: int) -> Tensor:
    return words.to(torch.int64) >> bit & 1


def unpack_bits(words: Tensor, T: int, amplitude: Tensor) -> Tensor:
    """Spikes ``[T, *shape]`` of the dtype of ``amplitude``, which broadcasts to ``shape``."""
    bits, zero = 8 * words.element_size(), torch.zeros_like(amplitude)
    rows = [torch.where(_bit(words[t // bits], t % bits) != 0, amplitude, zero) for t in range(T)]
    return torch.stack(rows)


def popcount(words: Tensor) -> Tensor:
    """int32 ``[*shape]``."""
    count = torch.zeros(words.shape[1:], dtype=torch.int64, device=words.device)
    for word in words:
        for bit in range(8 * words.element_size()):
            count += _bit(word, bit)
    return count.to(torch.int32)


def pack_bits(spikes: Tensor, dtype: torch.dtype) -> Tensor:
    """Words ``[W, *shape]`` of ``dtype``; nonzero is 1."""
    bits = 8 * dtype.itemsize
    words = []
    for first in range(0, spikes.shape[0], bits):
        word = torch.zeros(spikes.shape[1:], dtype=torch.int64, device=spikes.device)
        for bit, row in enumerate(spikes[first : first + bits]):
            word |= (row != 0).to(torch.int64) << bit
        # Wraps: the last bit of a signed word is its sign.
        words.append(word - ((word >> bits - 1) << bits) if dtype.is_signed else word)
    return torch.stack(words).to(dtype)
