"""Running first-spike times, bit planes and packed bits."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import maps_reference as reference
from .. import operands
from ..maps_reference import state_dtype
from ..params import DTYPE_CODES
from .launching import Shared, dense, filled, kernels_for, launch, operator

# ---- time to first spike -----------------------------------------------------------------------


def _times_dtype(T: int) -> torch.dtype:
    return torch.uint8 if T <= 255 else torch.int16


@operator(
    "ttfs_encode(Tensor a, Tensor? threshold, float value, int T, bool round) -> Tensor",
    lambda a, threshold, value, T, round: a.new_empty(a.shape, dtype=_times_dtype(T)),
)
def ttfs_encode(a: Tensor, threshold: Tensor | None, value: float, T: int, round: bool) -> Tensor:
    """:func:`snnkernels.maps.ttfs_encode`."""
    kernels, state, dtype = kernels_for(a.device), state_dtype(a.dtype), _times_dtype(T)
    if kernels is None:
        times = reference.ttfs_encode(a, filled(a, threshold, value, state), T, round, dtype)
        return times.contiguous()
    a = dense(a)
    shared = Shared(threshold, value, a.shape, state)
    times = a.new_empty(a.shape, dtype=dtype)
    if a.numel():
        launch(
            kernels, "ttfs_encode", a.device, **{"from": a.data_ptr()}, to=times.data_ptr(),
            threshold=shared.packed, N=a.numel(), T=float(T), dtype=DTYPE_CODES[a.dtype],
            bytes=dtype.itemsize, round=round,
        )  # fmt: skip
    return times


@operator(
    "ttfs_decode(Tensor times, Tensor? threshold, float value, int T, ScalarType dtype) -> Tensor",
    lambda times, threshold, value, T, dtype: times.new_empty(times.shape, dtype=dtype),
)
def ttfs_decode(
    times: Tensor, threshold: Tensor | None, value: float, T: int, dtype: torch.dtype
) -> Tensor:
    """:func:`snnkernels.maps.ttfs_decode`."""
    kernels, state = kernels_for(times.device), state_dtype(dtype)
    if kernels is None:
        every = filled(times, threshold, value, state)
        return reference.ttfs_decode(times, every, T, dtype).contiguous()
    times = dense(times)
    shared = Shared(threshold, value, times.shape, state)
    out = times.new_empty(times.shape, dtype=dtype)
    if times.numel():
        launch(
            kernels, "ttfs_decode", times.device, **{"from": times.data_ptr()}, to=out.data_ptr(),
            threshold=shared.packed, N=times.numel(), T=float(T), dtype=DTYPE_CODES[dtype],
            bytes=times.element_size(),
        )  # fmt: skip
    return out


# ---- bit planes --------------------------------------------------------------------------------


def _integer_dtype(T: int) -> torch.dtype:
    """Holds T bits without a sign."""
    return torch.uint8 if T <= 8 else torch.int16 if T <= 15 else torch.int32


@operator(
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
    kernels, state, dtype = kernels_for(z.device), state_dtype(z.dtype), _integer_dtype(T)
    if kernels is None:
        q, rows = reference.bit_planes(z, filled(z, threshold, value, state), T, dtype)
        return q.contiguous(), rows.contiguous() if planes else rows.new_empty(0)
    z = dense(z)
    shared = Shared(threshold, value, z.shape, state)
    q = z.new_empty(z.shape, dtype=dtype)
    rows = z.new_empty((T, *z.shape) if planes else (0,), dtype=torch.uint8)
    if z.numel():
        launch(
            kernels, "bit_planes", z.device, x=z.data_ptr(), q=q.data_ptr(),
            planes=rows.data_ptr() if planes else 0, threshold=shared.packed, N=z.numel(), T=T,
            largest=float(2**T - 1), dtype=DTYPE_CODES[z.dtype], bytes=dtype.itemsize,
        )  # fmt: skip
    return q, rows


# ---- bits --------------------------------------------------------------------------------------


def words_dtype(T: int) -> torch.dtype:
    """What holds the spikes of T steps: one word up to 32 steps, else int32 words."""
    return torch.uint8 if T <= 8 else torch.int16 if T <= 16 else torch.int32


@operator(
    "unpack_bits(Tensor words, int T, ScalarType dtype, Tensor? amplitude, float value) -> Tensor",
    lambda words, T, dtype, amplitude, value: words.new_empty((T, *words.shape[1:]), dtype=dtype),
)
def unpack_bits(
    words: Tensor, T: int, dtype: torch.dtype, amplitude: Tensor | None, value: float
) -> Tensor:
    """:func:`snnkernels.maps.unpack_bits`."""
    kernels, shape = kernels_for(words.device), words.shape[1:]
    if not dtype.is_floating_point:
        amplitude, value = None, 1.0
    if kernels is None:
        every = filled(words, amplitude, value, dtype).expand(shape)
        return reference.unpack_bits(words, T, every).contiguous()
    words = dense(words)
    shared = Shared(amplitude, 0.0, shape, dtype)
    spikes = words.new_empty((T, *shape), dtype=dtype)
    if spikes.numel():
        launch(
            kernels, "unpack_bits", words.device, words=words.data_ptr(), spikes=spikes.data_ptr(),
            amplitude=shared.packed, N=shape.numel(), T=T, W=len(words),
            amplitude_bits=operands.bits(value, dtype), word_bytes=words.element_size(),
            spike_bytes=dtype.itemsize,
        )  # fmt: skip
    return spikes


@operator(
    "popcount(Tensor words) -> Tensor",
    lambda words: words.new_empty(words.shape[1:], dtype=torch.int32),
)
def popcount(words: Tensor) -> Tensor:
    """:func:`snnkernels.maps.popcount`."""
    kernels, shape = kernels_for(words.device), words.shape[1:]
    if kernels is None:
        return reference.popcount(words)
    words = dense(words)
    counts = words.new_empty(shape, dtype=torch.int32)
    if counts.numel():
        launch(
            kernels, "popcount", words.device, words=words.data_ptr(), counts=counts.data_ptr(),
            N=counts.numel(), T=8 * words.element_size() * len(words), W=len(words),
            word_bytes=words.element_size(),
        )  # fmt: skip
    return counts


def _pack_fake(spikes: Tensor) -> Tensor:
    dtype = words_dtype(spikes.shape[0])
    words = -(-spikes.shape[0] // (8 * dtype.itemsize))
    return spikes.new_empty((words, *spikes.shape[1:]), dtype=dtype)


@operator("pack_bits(Tensor spikes) -> Tensor", _pack_fake)
def pack_bits(spikes: Tensor) -> Tensor:
    """:func:`snnkernels.maps.pack_bits`."""
    kernels, T, shape = kernels_for(spikes.device), spikes.shape[0], spikes.shape[1:]
    dtype = words_dtype(T)
    if kernels is None:
        return reference.pack_bits(spikes, dtype)
    spikes = dense(spikes)
    words = spikes.new_empty((-(-T // (8 * dtype.itemsize)), *shape), dtype=dtype)
    if words.numel():
        launch(
            kernels, "pack_bits", spikes.device, words=words.data_ptr(), spikes=spikes.data_ptr(),
            N=shape.numel(), T=T, W=len(words), word_bytes=dtype.itemsize,
            spike_bytes=spikes.element_size(),
        )  # fmt: skip
    return words
