"""Spikes kept as one bit each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Size, Tensor

from . import maps
from .kernels import operands, reference

__all__ = ["PackedSpikes"]


class PackedSpikes:
    """Spikes ``[T, *shape]`` in words of one neuron and up to 32 steps.

    Bit ``t % 32`` of ``words[t // 32]`` is the spike of step t. ``words`` is ``[ceil(T / 32),
    *shape]``: uint8 for T <= 8, int16 for T <= 16, int32 beyond (int16 and int32 are bit patterns,
    not numbers).

    Args:
        words: as above.
        T: number of steps.
        amplitude: what a spike weighs, a number or a real tensor that broadcasts to ``shape``, on
            the device of the words (0-d tensors of the CPU too); the words hold 0 and 1. A tensor
            is detached and copied: whoever gave it may go on changing it.
        dtype: what :meth:`unpack` gives unless told otherwise.

    Raises:
        TypeError: words that are no tensor of the integer type that T asks for, or an amplitude
            that is no real number or tensor of those.
        ValueError: a number of words that does not fit T; an amplitude that is NaN, does not
            broadcast or is on another device; a dtype that holds no spikes.
    """

    def __init__(
        self,
        words: Tensor,
        T: int,
        amplitude: float | Tensor = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        _check_words(words, T)
        _check_dtype(dtype)
        self.words, self.T, self.dtype = words, T, dtype
        self.amplitude: float | Tensor = _own_amplitude(amplitude, words)

    @classmethod
    def _sharing(
        cls, words: Tensor, T: int, amplitude: float | Tensor, dtype: torch.dtype
    ) -> PackedSpikes:
        """With an amplitude that has been checked, and is not copied again."""
        _check_words(words, T)
        spikes = cls.__new__(cls)
        spikes.words, spikes.T, spikes.amplitude, spikes.dtype = words, T, amplitude, dtype
        return spikes

    @property
    def shape(self) -> Size:
        """``[T, *shape]``, that of the unpacked spikes."""
        return Size((self.T, *self.words.shape[1:]))

    @property
    def device(self) -> torch.device:
        """Where the words are."""
        return self.words.device

    @property
    def nbytes(self) -> int:
        """Bytes of the words."""
        return self.words.numel() * self.words.element_size()

    def dim(self) -> int:
        """Number of dimensions, time included."""
        return self.words.dim()

    def numel(self) -> int:
        """Number of spikes and silences."""
        return self.shape.numel()

    def __len__(self) -> int:
        return self.T

    def unpack(self, dtype: torch.dtype | None = None) -> Tensor:
        """Spikes ``[T, *shape]``: 0 and the amplitude, rounded once to ``dtype``.

        ``torch.bool`` and integer types hold 0 and 1 whatever the amplitude; another ``dtype``
        is a ValueError.
        """
        dtype = dtype or self.dtype
        _check_dtype(dtype)
        if self.T == 0:
            return torch.empty(self.shape, dtype=dtype, device=self.device)
        if dtype.is_floating_point:
            return maps.unpack_bits(self.words, self.T, dtype, self.amplitude)
        return maps.unpack_bits(self.words, self.T, torch.uint8).to(dtype)

    def count(self) -> Tensor:
        """Spikes per neuron, int32 ``[*shape]``."""
        return maps.popcount(self.words)

    def rate(self) -> Tensor:
        """``amplitude * count / T`` ``[*shape]``, in :attr:`dtype` or, for integers, float32."""
        if self.T == 0:
            raise ValueError("a rate of no steps is undefined")
        dtype = self.dtype if self.dtype.is_floating_point else torch.float32
        state = reference.state_dtype(dtype)
        weight: float | Tensor
        if isinstance(self.amplitude, Tensor):
            weight = self.amplitude.to(dtype).to(state)
        else:
            weight = operands.rounded(self.amplitude, dtype)
        return (weight * self.count().to(state) / self.T).to(dtype)

    def __getitem__(self, index: Any) -> Any:
        """``[t]`` unpacks a step; ``[:, ...]`` (all steps) indexes the neurons and stays packed."""
        key = index if isinstance(index, tuple) else (index,)
        if key and isinstance(key[0], slice) and key[0] == slice(None):
            neurons = key[1:]
            every_word = (slice(None), *neurons)
            words = self.words[every_word]
            amplitude = self.amplitude
            if isinstance(amplitude, Tensor) and amplitude.dim():
                amplitude = amplitude.expand(self.words.shape[1:])[neurons]
            return self._sharing(words, self.T, amplitude, self.dtype)
        if key and type(key[0]) is int:
            t = key[0] + self.T if key[0] < 0 else key[0]
            if not 0 <= t < self.T:
                raise IndexError(f"step {key[0]} is out of range for {self.T} steps")
            word = self.words[t // reference.WORD_STEPS]
            bit = ((word.int() >> t % reference.WORD_STEPS) & 1).to(torch.uint8)[None]
            row = self._sharing(bit, 1, self.amplitude, self.dtype).unpack()[0]
            return row[key[1:]] if len(key) > 1 else row
        return self.unpack()[index]

    def to(self, *args: Any, **kwargs: Any) -> PackedSpikes:
        """Moved to a device; a dtype changes what :meth:`unpack` gives, never the words."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        amplitude = self.amplitude
        if isinstance(amplitude, Tensor):
            amplitude = amplitude.to(device, non_blocking=non_blocking)
        words = self.words.to(device, non_blocking=non_blocking)
        _check_dtype(dtype or self.dtype)
        return self._sharing(words, self.T, amplitude, dtype or self.dtype)

    def cpu(self) -> PackedSpikes:
        """On the CPU."""
        return self.to("cpu")

    def cuda(self, device: Any = "cuda") -> PackedSpikes:
        """On a CUDA device."""
        return self.to(device)

    def clone(self) -> PackedSpikes:
        """With words and an amplitude of its own."""
        return PackedSpikes(self.words.clone(), self.T, self.amplitude, self.dtype)

    @classmethod
    def cat(cls, parts: Sequence[PackedSpikes]) -> PackedSpikes:
        """Parts of one run in time, one after the other, as one: T is the sum of theirs.

        Args:
            parts: at least one, of the same neurons, on one device. Amplitude and dtype are those
                of the first.

        Raises:
            ValueError: no parts, or parts of other neurons or on other devices.
            TypeError: a part that is no PackedSpikes.
        """
        if not parts:
            raise ValueError(
                "parts is empty: there is nothing to put together; allowed: one or more"
            )
        for i, part in enumerate(parts):
            if not isinstance(part, PackedSpikes):
                raise TypeError(f"parts[{i}] must be PackedSpikes, got {type(part).__name__}")
        first = parts[0]
        for part in parts[1:]:
            if part.words.shape[1:] != first.words.shape[1:] or part.device != first.device:
                raise ValueError(
                    f"parts differ in their neurons: {first!r} and {part!r}; they must have one "
                    "shape behind T and one device"
                )
        T = sum(part.T for part in parts)
        size = reference.WORD_STEPS
        words = first.words.new_zeros((-(-T // size), *first.words.shape[1:]), dtype=torch.int32)
        at = 0
        for part in parts:
            for i, word in enumerate(part.words):
                word = word.int()
                if part.words.dtype == torch.int16:
                    word = word & 0xFFFF  # a bit pattern, not a number with a sign
                place, shift = divmod(at + i * size, size)
                words[place] |= word << shift
                if shift and place + 1 < len(words):
                    # What is left of the word, its highest bit not taken for a sign.
                    words[place + 1] |= (word >> (size - shift)) & ((1 << shift) - 1)
            at += part.T
        return cls._sharing(words.to(reference.word_dtype(T)), T, first.amplitude, first.dtype)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PackedSpikes):
            return NotImplemented
        same = self.T == other.T and torch.equal(self.words, other.words)
        return same and torch.equal(*(torch.as_tensor(p.amplitude) for p in (self, other)))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return (
            f"PackedSpikes(shape={tuple(self.shape)}, words={self.words.dtype}, "
            f"device={self.device}, {self.nbytes} bytes)"
        )


def _check_dtype(dtype: Any) -> None:
    if not isinstance(dtype, torch.dtype) or dtype.is_complex:
        raise ValueError(f"dtype={dtype!r} holds no spikes; allowed are real types of torch")


def _check_words(words: Any, T: Any) -> None:
    if isinstance(T, bool) or not isinstance(T, int):
        raise TypeError(f"T={T!r} must be an int")
    if T < 0:
        raise ValueError(f"T={T} must not be negative")
    wanted = reference.word_dtype(T)
    if not isinstance(words, Tensor) or words.dtype != wanted:
        given = words.dtype if isinstance(words, Tensor) else type(words).__name__
        raise TypeError(f"words for T={T} must be a tensor of {wanted}, got {given}")
    if words.dim() == 0 or words.shape[0] != -(-T // reference.WORD_STEPS):
        raise ValueError(
            f"words of shape {tuple(words.shape)} do not hold T={T} steps; expected "
            f"[{-(-T // reference.WORD_STEPS)}, *shape]"
        )


def _own_amplitude(value: Any, words: Tensor) -> float | Tensor:
    """``value`` as a number, or as a tensor that shares no memory and broadcasts to the neurons."""
    if not isinstance(value, Tensor):
        return operands.number("amplitude", value)
    operands.check_real("amplitude", value)
    if value.device != words.device:
        if value.dim() == 0 and value.device.type == "cpu":
            return operands.number("amplitude", value.detach())
        raise ValueError(f"amplitude is on {value.device} but the words are on {words.device}")
    shape = words.shape[1:]
    sizes = zip(reversed(value.shape), reversed(shape), strict=False)
    if value.dim() > len(shape) or any(a not in (1, b) for a, b in sizes):
        if value.numel() != 1:
            raise ValueError(
                f"amplitude of shape {tuple(value.shape)} does not broadcast to the neurons' "
                f"{tuple(shape)}"
            )
        value = value.reshape(())
    return value.detach().clone()
