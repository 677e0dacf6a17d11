"""What a run of the neurons is told and what it returns, between functional, run, ops and tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..options import Probe, Signed
from . import params

# Tensors and numbers of a neuron, in the order of their gradients.
OPERANDS = ("v", "threshold", "amplitude", "input_scale", "beta", "bias", "fire_level")


class Neuron(NamedTuple):
    """What the neurons are. Tensors broadcast to their shape; None: the number below.

    ``options`` are the bits of csrc/params.h; an operand beyond the first three counts only with
    its bit.
    """

    v: Tensor | None = None
    threshold: Tensor | None = None
    amplitude: Tensor | None = None
    input_scale: Tensor | None = None
    beta: Tensor | None = None
    bias: Tensor | None = None
    fire_level: Tensor | None = None
    v_value: float = 0.0
    threshold_value: float = 1.0
    amplitude_value: float = 1.0
    input_scale_value: float = 1.0
    beta_value: float = 1.0
    bias_value: float = 0.0
    fire_level_value: float = 1.0
    options: int = 0
    spike_dtype: torch.dtype = torch.float32
    v_reset: float = 0.0
    mask: Tensor | None = None
    max_spikes: int = 0
    probe: int = 0
    iterations: int = 0
    count_low: int = 0
    count_high: int = 0
    margin: float = 0.0
    v_min: float = 0.0

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The operands, in the order of :data:`OPERANDS`."""
        return self[:7]

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> Neuron:
        """The same numbers and options with other operands."""
        return Neuron._make((*tensors, *self[7:]))

    @property
    def bursts(self) -> int | None:
        """``max_spikes`` as the user said it."""
        return self.max_spikes if self.options & params.BURST else None

    @property
    def delayed(self) -> bool:
        """``reset_delay`` as the user said it."""
        return bool(self.options & params.RESET_DELAY)

    @property
    def clipped(self) -> float | None:
        """``v_min`` as the user said it."""
        return self.v_min if self.options & params.CLIP else None

    @property
    def signed(self) -> Signed | None:
        """As the user said it."""
        if not self.options & params.SIGNED:
            return None
        return Signed(self.count_low, self.count_high, self.margin)

    @property
    def probed(self) -> Probe | None:
        """As the user said it."""
        if self.options & params.PROBE_MASK:
            return Probe(self.probe, "mask", self.margin)
        if self.options & params.PROBE_SHIFT:
            return Probe(self.probe, "shift", self.margin, self.iterations)
        return None


class Asked(NamedTuple):
    """Which outputs to make, beside the final membrane."""

    spikes: bool = True
    words: bool = False
    count: bool = False  # type: ignore[assignment]
    v_seq: bool = False
    charge_seq: bool = False
    window: bool = False
    count_at: tuple[int, ...] = ()


# The usual wish, one object that can be compared with `is`.
SPIKES = Asked()


class Outputs(NamedTuple):
    """What a run returns; None where not asked for."""

    spikes: Tensor | None
    words: Tensor | None
    count: Tensor | None  # type: ignore[assignment]
    counts: Tensor | None
    v: Tensor
    v_seq: Tensor | None
    charge_seq: Tensor | None
    window: Tensor | None


class Saved(NamedTuple):
    """Where a backward pass has its membranes from: x, charges, or the bits of window and words."""

    x: Tensor | None
    charges: Tensor | None
    window: Tensor | None
    words: Tensor | None
    constant: bool
    steps: int
    dtype: torch.dtype

    @property
    def like(self) -> Tensor:
        """A tensor of the neurons' shape and device, behind one other dimension or none."""
        return next(t for t in (self.x, self.charges, self.window) if t is not None)


class Grads(NamedTuple):
    """Gradients of a run's outputs; ``rate``: ``spikes`` is that of ``amplitude * count / T``."""

    spikes: Tensor | None = None
    rate: bool = False
    v: Tensor | None = None
    v_seq: Tensor | None = None
    charge_seq: Tensor | None = None
