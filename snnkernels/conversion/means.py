"""Operations on running means: exact in the mean for whatever is not affine.

A gate ``x * sigmoid(z)``, a softmax, a layer norm: applied to the spikes of one step it gives
something else than on rates, and more steps need not help (spikes of 0 and θ at rate a have squares
of mean θ a, not a^2). With ``m_t`` the mean of the first t steps of its inputs,
such an operation f emits

    ``o_t = t f(m_t) - (t - 1) f(m_(t-1))``

which sums to ``T f(m_T)``: after any number of steps the mean of what was emitted is f of the
means, the ANN's own operation on rates. It is causal, so it adds no step; it costs f at every
step, and f is no spiking operation: the report names it. ``f(x) = x`` gives back the currents
themselves, so a value may leave the means and return. The cumulative max-pool is the same idea for
the maximum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConversionError
from .inputs import each, parts_of
from .steps import Clock

__all__ = ["FromMeans", "RunningMean"]


class _InTime(nn.Module):
    """A layer with a state; rows before those that answer are a run of their own."""

    def __init__(self, clock: Clock | None = None) -> None:
        super().__init__()
        self.clock = Clock() if clock is None else clock
        self.reset()

    def reset(self) -> None:
        """Forget the steps so far."""
        self.done = 0
        self.last: Any = None

    def _split(self, x: Tensor, T: int) -> Tensor:
        steps = x.reshape(T, x.shape[0] // T, *x.shape[1:])
        before = self.clock.steps.before
        if not before:
            return self._steps(steps).flatten(0, 1)
        probe = self._steps(steps[:before])
        self.reset()
        return torch.cat([probe, self._steps(steps[before:])]).flatten(0, 1)

    def _steps(self, steps: Tensor) -> Tensor:
        raise NotImplementedError


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _numbers(first: int, like: Tensor) -> Tensor:
    """``[first, first + 1, ...]`` to broadcast against the steps ``like``, in its dtype."""
    t = torch.arange(first, first + len(like), device=like.device, dtype=like.dtype)
    return t.view(-1, *(1,) * (like.dim() - 1))


class RunningMean(_InTime):
    """The means of the first 1, 2, ..., T steps: ``[T * B, *]`` to the same shape.

    Sums are carried from call to call until :meth:`reset`, in float32 for 16-bit values. A parallel
    network's one pass is on means already.
    """

    def forward(self, x: Tensor, T: int) -> Tensor:
        """T more steps."""
        return x if self.clock.steps.parallel else self._split(x, T)

    def _steps(self, steps: Tensor) -> Tensor:
        # Step after step in order, so that a run cut into pieces gives the same bits.
        totals, total = [], self.last
        for step in _wide(steps):
            total = step if total is None else total + step
            totals.append(total)
        every = torch.stack(totals)
        means = every / _numbers(self.done + 1, every)
        self.last, self.done = total, self.done + len(steps)
        return means.to(steps.dtype)


class FromMeans(_InTime):
    """Values of an operation on running means as currents whose mean they are.

    Step t emits ``t f_t - (t - 1) f_(t-1)``; ``[T * B, *]`` to the same shape, floating point, or a
    tuple of such.

    Args:
        clock: of the network.
        name: of the operation, for errors.
    """

    def __init__(self, clock: Clock | None = None, name: str = "an operation") -> None:
        super().__init__(clock)
        self.name = name

    def forward(self, value: Any, T: int) -> Any:
        """T more steps."""
        if self.clock.steps.parallel:
            return value
        if isinstance(value, Tensor):
            if not value.is_floating_point():
                raise ConversionError(
                    f"{self.name} on running means gives {value.dtype}, which has no mean in "
                    "time: only operations on means may read it"
                )
            return self._split(value, T)
        parts = parts_of(value)
        if parts is None:
            return value
        # One state for each tensor of a tuple.
        if not hasattr(self, "parts"):
            self.parts = nn.ModuleList(FromMeans(self.clock, self.name) for _ in parts)
        layers = iter(self.parts)
        return each(value, lambda v: next(layers)(v, T))

    def reset(self) -> None:
        """Forget the steps so far."""
        super().reset()
        for part in getattr(self, "parts", ()):
            part.reset()

    def _steps(self, steps: Tensor) -> Tensor:
        wide = _wide(steps)
        weighted = wide * _numbers(self.done + 1, wide)
        before = torch.zeros_like(weighted[:1]) if self.last is None else self.last[None]
        out = weighted - torch.cat([before, weighted[:-1]])
        self.last, self.done = weighted[-1], self.done + len(steps)
        return out.to(steps.dtype)
