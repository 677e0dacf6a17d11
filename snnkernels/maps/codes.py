"""Codes of activations and spikes: first-spike times, bit planes, bits packed in words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import maps as run
from ..kernels import maps_reference as reference
from . import checks
from .checks import Number

_WORDS = (torch.uint8, torch.int16, torch.int32)


# ---- time to first spike -----------------------------------------------------------------------


def ttfs_encode(
    a: Tensor,
    threshold: Tensor | Number,
    T: int,
    round: bool = False,
    channel_dim: int | None = None,
) -> Tensor:
    """When a neuron with a falling threshold fires: the first t with a >= threshold (T - t) / T.

    Args:
        a: values ``[*shape]``, float32, float64, float16 or bfloat16.
        threshold: as said in :mod:`snnkernels.maps`.
        T: number of steps, 1 to 32767.
        round: add ``threshold / 2T`` to ``a`` first: the nearest level instead of the one below.
        channel_dim: dimension of ``a`` along which a 1-D threshold is per channel.

    Returns:
        Times ``[*shape]``, uint8 up to T = 255, else int16; T says no spike (NaN too).

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a value out of range or a shape that does not fit.
    """
    checks.tensor("a", a)
    checks.whole("T", T, 1, 2**15 - 1)
    state = reference.state_dtype(a.dtype)
    th, value = checks.shared("threshold", threshold, a.shape, channel_dim, a.device, state)
    return run.ttfs_encode(a, th, value, T, bool(round))


def ttfs_decode(
    times: Tensor,
    threshold: Tensor | Number,
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
    checks.tensor("times", times, (torch.uint8, torch.int16))
    checks.whole("T", T, 1, 2**15 - 1)
    if dtype not in checks.FLOATS:
        raise ValueError(
            f"dtype={dtype} is not offered; allowed are {checks.names(*checks.FLOATS)}"
        )
    state = reference.state_dtype(dtype)
    th, value = checks.shared("threshold", threshold, times.shape, channel_dim, times.device, state)
    return run.ttfs_decode(times, th, value, T, dtype)


# ---- bit planes --------------------------------------------------------------------------------


def bit_planes(
    z: Tensor,
    threshold: Tensor | Number,
    T: int,
    planes: bool = False,
    channel_dim: int | None = None,
) -> Any:
    """The T bits of an activation, most significant first: bit-serial spikes.

    Source: Datta et al., 2023. With ``D = threshold / (2^T - 1)`` and ``m = z + D / 2``, step t
    of 1..T fires where ``m >= D 2^(T - t)``, which is then subtracted.

    Args:
        z: activations ``[*shape]``, float32, float64, float16 or bfloat16.
        threshold: as said in :mod:`snnkernels.maps`.
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
    checks.tensor("z", z)
    checks.whole("T", T, 1, 31)
    state = reference.state_dtype(z.dtype)
    th, value = checks.shared("threshold", threshold, z.shape, channel_dim, z.device, state)
    q, rows = run.bit_planes(z, th, value, T, bool(planes))
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
    checks.tensor("spikes", spikes, (*checks.FLOATS, torch.uint8, torch.bool))
    if spikes.dim() == 0 or spikes.shape[0] == 0:
        raise ValueError(
            f"spikes has shape {tuple(spikes.shape)}; it must be [T, *shape] with T at least 1"
        )
    if spikes.dtype == torch.bool:
        spikes = spikes.view(torch.uint8)
    return run.pack_bits(spikes)


def unpack_bits(
    words: Tensor,
    T: int,
    dtype: torch.dtype = torch.float32,
    amplitude: Tensor | Number | None = None,
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
    checks.whole("T", T, 1, 2**31 - 1)
    bits = 8 * words.element_size()
    needed = -(-T // 32) if words.dtype == torch.int32 else 1
    if words.shape[0] != needed or bits * needed < T:
        raise ValueError(
            f"words is {words.dtype} {tuple(words.shape)}, which does not hold T={T} steps: "
            f"allowed are one word of at least T bits, or {-(-T // 32)} of int32"
        )
    if dtype not in (*checks.FLOATS, torch.uint8):
        allowed = checks.names(*checks.FLOATS, torch.uint8)
        raise ValueError(f"dtype={dtype} is not offered; allowed are {allowed}")
    if amplitude is None:
        th, value = None, 1.0
    elif dtype == torch.uint8:
        raise ValueError("amplitude cannot be combined with dtype=torch.uint8, which holds 0 and 1")
    else:
        th, value = checks.shared(
            "amplitude", amplitude, words.shape[1:], channel_dim, words.device, None
        )
        th = None if th is None else th.detach()
    return run.unpack_bits(words, T, dtype, th, value)


def popcount(words: Tensor) -> Tensor:
    """The number of ones in words ``[W, *shape]`` (as of :func:`pack_bits`), int32 ``[*shape]``.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: no dimension of words.
    """
    _words(words)
    return run.popcount(words)


def _words(words: Any) -> None:
    checks.tensor("words", words, _WORDS)
    if words.dim() == 0:
        raise ValueError("words has no dimensions; it is [W, *shape]")
