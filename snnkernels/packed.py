"""Spikes kept as one bit each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Size, Tensor

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
        amplitude: what a spike weighs, a number or a tensor that broadcasts to ``shape``; the
            words hold 0 and 1.
        dtype: what :meth:`unpack` gives unless told otherwise.

    Raises:
        TypeError: words that are no tensor of the integer type that T asks for.
        ValueError: a number of words that does not fit T.
    """

    def __init__(
        self,
        words: Tensor,
        T: int,
        amplitude: float | Tensor = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
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
        self.words, self.T, self.amplitude, self.dtype = words, T, amplitude, dtype

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

        ``torch.bool`` and integer types hold 0 and 1 whatever the amplitude.
        """
        dtype = dtype or self.dtype
        fired = reference.unpack(self.words, self.T)
        if not dtype.is_floating_point:
            return fired.to(dtype)
        if isinstance(self.amplitude, Tensor):
            weight = self.amplitude.detach().to(dtype)
            return torch.where(fired, weight, torch.zeros((), dtype=dtype, device=self.device))
        if self.amplitude == 1.0:
            return fired.to(dtype)
        number = operands.rounded(float(self.amplitude), dtype)
        return torch.where(
            fired,
            torch.full((), number, dtype=dtype, device=self.device),
            torch.zeros((), dtype=dtype, device=self.device),
        )

    def count(self) -> Tensor:
        """Spikes per neuron, int32 ``[*shape]``."""
        total = torch.zeros(self.words.shape[1:], dtype=torch.int32, device=self.device)
        for word in self.words:
            for k in range(8 * word.element_size()):
                total += (word.int() >> k) & 1
        return total

    def rate(self) -> Tensor:
        """``amplitude * count / T`` in :attr:`dtype`, ``[*shape]``."""
        if self.T == 0:
            raise ValueError("a rate of no steps is undefined")
        state = reference.state_dtype(self.dtype)
        weight: float | Tensor
        if isinstance(self.amplitude, Tensor):
            weight = self.amplitude.detach().to(self.dtype).to(state)
        else:
            weight = operands.rounded(float(self.amplitude), self.dtype)
        return (weight * self.count().to(state) / self.T).to(self.dtype)

    def __getitem__(self, index: Any) -> Any:
        """``[t]`` unpacks a step; ``[:, ...]`` (all steps) indexes the neurons and stays packed."""
        key = index if isinstance(index, tuple) else (index,)
        if key and isinstance(key[0], slice) and key[0] == slice(None):
            neurons = key[1:]
            words = self.words[(slice(None), *neurons)]
            amplitude = self.amplitude
            if isinstance(amplitude, Tensor) and amplitude.dim():
                amplitude = amplitude.expand(self.words.shape[1:])[neurons]
            return PackedSpikes(words, self.T, amplitude, self.dtype)
        if key and type(key[0]) is int:
            t = key[0] + self.T if key[0] < 0 else key[0]
            if not 0 <= t < self.T:
                raise IndexError(f"step {key[0]} is out of range for {self.T} steps")
            word = self.words[t // reference.WORD_STEPS]
            row = PackedSpikes(
                ((word.int() >> t % reference.WORD_STEPS) & 1).to(torch.uint8)[None],
                1,
                self.amplitude,
                self.dtype,
            ).unpack()[0]
            return row[key[1:]] if len(key) > 1 else row
        return self.unpack()[index]

    def to(self, *args: Any, **kwargs: Any) -> PackedSpikes:
        """Moved to a device; a dtype changes what :meth:`unpack` gives, never the words."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        amplitude = self.amplitude
        if isinstance(amplitude, Tensor):
            amplitude = amplitude.to(device, non_blocking=non_blocking)
        words = self.words.to(device, non_blocking=non_blocking)
        return PackedSpikes(words, self.T, amplitude, dtype or self.dtype)

    def cpu(self) -> PackedSpikes:
        """On the CPU."""
        return self.to("cpu")

    def cuda(self, device: Any = "cuda") -> PackedSpikes:
        """On a CUDA device."""
        return self.to(device)

    def clone(self) -> PackedSpikes:
        """With words of its own."""
        return PackedSpikes(self.words.clone(), self.T, self.amplitude, self.dtype)

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
