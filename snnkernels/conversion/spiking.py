"""The pieces of a converted graph that know about time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..neurons import IFNode

__all__ = [
    "CountSpikes",
    "Repeat",
    "SpikingActivation",
    "TimeShape",
    "per_channel_view",
    "split_time",
]


def per_channel_view(value: Tensor, channel_dim: int, dim: int) -> Tensor:
    """``value`` (scalar or ``[C]``) shaped to broadcast against ``dim`` dimensions."""
    if value.dim() != 1:
        return value
    return value.view(*(-1 if d == channel_dim % dim else 1 for d in range(dim)))


def split_time(x: Tensor, T: int) -> Tensor:
    """``[T * B, *]`` to ``[T, B, *]``."""
    return x.reshape(T, x.shape[0] // T, *x.shape[1:])


class SpikingActivation(nn.Module):
    """A layer of integrate-and-fire neurons where the ANN had an activation.

    Args:
        node: the neurons; state is carried from call to call until :meth:`reset`.
        label: the name of the activation in the ANN.
        constant: the current is constant in time: ``[B, *]``, run once for all T steps.
        counts: return spike counts ``[B, *]`` (int32) instead of spikes ``[T * B, *]``.
        scale: what one spike is worth when read out, if it is not the threshold: scalar or
            ``[C]``, used when thresholds are folded into weights.
        channel_dim: the channel dimension, counted with the batch as 0; -1 is the last.
    """

    scale: Tensor | None

    def __init__(
        self,
        node: IFNode,
        label: str,
        *,
        constant: bool,
        counts: bool,
        scale: Tensor | None = None,
        channel_dim: int = 1,
    ) -> None:
        super().__init__()
        self.node = node
        self.label = label
        self.constant = constant
        self.counts = counts
        self.channel_dim = channel_dim
        self.register_buffer("scale", scale)

    def reset(self) -> None:
        """Back to the initial potential."""
        self.node.reset()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SpikingActivation:
        before = self.scale
        super()._apply(fn, recurse)
        # Like the thresholds it stands for: only device and float64 moves are followed.
        if before is not None and self.scale.dtype in (torch.float16, torch.bfloat16):  # type: ignore[union-attr]
            self.scale = before.to(self.scale.device)  # type: ignore[union-attr]
        return self

    def _check_channels(self, shape: torch.Size) -> None:
        for name in ("v_threshold", "v_init"):
            value = getattr(self.node, name)
            if not isinstance(value, Tensor) or value.dim() != 1:
                continue
            found = shape[self.channel_dim] if len(shape) > 1 else 1
            if value.numel() not in (1, found):
                raise ValueError(
                    f"{self.label}: {name} has {value.numel()} values, but the layer has {found} "
                    f"channels: dimension {self.channel_dim} of its current {tuple(shape)}. Give a "
                    "scalar or one value for each channel; for thresholds from data pass "
                    "per_channel=False"
                )

    def forward(self, x: Tensor, T: int) -> Tensor:
        """Run T steps on a current ``[B, *]`` (constant) or ``[T * B, *]``."""
        self._check_channels(x.shape)
        steps = T if self.constant else None
        if not self.constant:
            x = split_time(x, T)
        learning = torch.is_grad_enabled() and (
            x.requires_grad or any(p.requires_grad for p in self.node.parameters())
        )
        self.node.output = "count" if self.counts and not learning else "spikes"
        out = self.node(x, T=steps)
        if not self.counts:
            return out.flatten(0, 1)
        return self.count(out) if learning else out

    def count(self, spikes: Tensor) -> Tensor:
        """Spikes ``[T, B, *]`` to counts: int32, or floating point with the spikes' gradient."""
        count = (spikes != 0).sum(0, dtype=torch.int32)
        if not spikes.requires_grad:
            return count
        wide = spikes.float() if spikes.dtype in (torch.float16, torch.bfloat16) else spikes
        smooth = wide.sum(0)
        if self.scale is None:
            smooth = smooth / per_channel_view(self._threshold(), self.channel_dim, count.dim())
        # The value is the whole number, so that answers do not depend on the gradient mode.
        return count.to(smooth.dtype) + (smooth - smooth.detach())

    def _threshold(self) -> Tensor:
        threshold = self.node.threshold
        return threshold if isinstance(threshold, Tensor) else torch.tensor(threshold)

    def rate(self, count: Tensor, T: int, dtype: torch.dtype) -> Tensor:
        """Spike counts over T steps as activations: ``scale * count / T`` in ``dtype``."""
        scale = self._threshold() if self.scale is None else self.scale
        scale = per_channel_view(scale, self.channel_dim, count.dim())
        return (scale * count / T).to(dtype)

    def extra_repr(self) -> str:
        """Show where the neurons come from."""
        return f"{self.label!r}, constant={self.constant}, counts={self.counts}"


class Repeat(nn.Module):
    """A constant value where one per step is needed: ``[B, *]`` to ``[T * B, *]``."""

    def forward(self, x: Tensor, T: int) -> Tensor:
        """Repeat ``x`` T times, time slowest."""
        return x.unsqueeze(0).expand(T, *x.shape).reshape(T * x.shape[0], *x.shape[1:])


class TimeShape(nn.Module):
    """The shape a value that is constant in time would have if it were repeated T times."""

    def forward(self, x: Tensor, T: int) -> tuple[int, ...]:
        """``(T * B, *)`` for ``x`` of shape ``[B, *]``."""
        return (T * x.shape[0], *x.shape[1:])


class CountSpikes(nn.Module):
    """Spikes ``[T * B, *]`` of a layer to counts ``[B, *]``.

    Args:
        layer: where the spikes come from; not a submodule, it lives elsewhere in the graph.
    """

    def __init__(self, layer: SpikingActivation) -> None:
        super().__init__()
        self._layer = (layer,)

    def forward(self, spikes: Tensor, T: int) -> Tensor:
        """Count over time."""
        return self._layer[0].count(split_time(spikes, T))
