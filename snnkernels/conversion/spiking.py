"""The pieces of a converted graph that know about time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..maps import qcfs
from ..neurons import IFNode
from .steps import Clock

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
        counts: return spike counts ``[B, *]`` (int32) instead of spikes ``[T * B, *]``; where the
            method's steps are whole, spikes all the same, to be counted at several times.
        scale: what one spike is worth when read out, if it is not the threshold: scalar or
            ``[C]``, used when thresholds are folded into weights.
        channel_dim: the channel dimension, counted with the batch as 0; -1 is the last.
        clock: what the network's layers know about the run they are in.
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
        clock: Clock | None = None,
    ) -> None:
        super().__init__()
        self.node = node
        self.label = label
        self.constant = constant
        self.counts = counts
        self.channel_dim = channel_dim
        self.clock = Clock() if clock is None else clock
        self.register_buffer("scale", scale)

    def reset(self) -> None:
        """Back to the initial potential."""
        self.node.reset()

    @property
    def step_mode(self) -> str:
        """``"m"``: a converted network runs all steps of a layer at once."""
        return "m"

    @step_mode.setter
    def step_mode(self, value: str) -> None:
        if value != "m":
            raise ValueError(f"a converted network has no step_mode={value!r}; it runs in 'm'")

    def supported_step_mode(self) -> tuple[str, ...]:
        """The step modes there are, as in SpikingJelly."""
        return ("m",)

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
        if self.clock.steps.parallel:
            return self._at_once(x, self.clock.levels)
        steps = T if self.constant else None
        if not self.constant:
            x = split_time(x, T)
        learning = torch.is_grad_enabled() and (
            x.requires_grad or any(p.requires_grad for p in self.node.parameters())
        )
        counts = self.counts and not self.clock.steps.whole
        self.node.output = "count" if counts and not learning else "spikes"
        out = self.node(x, T=steps)
        if not counts:
            return out.flatten(0, 1)
        return self.count(out) if learning else out

    @property
    def binary(self) -> bool:
        """Whether its spikes are 0 and 1; else they are whole multiples of what a spike weighs."""
        return self.node.max_spikes is None and self.node.signed is None

    def count(self, spikes: Tensor) -> Tensor:
        """Spikes ``[T, B, *]`` to net counts.

        int32, or floating point with the spikes' gradient. A layer of a parallel run has values
        for spikes, and they stay what they are.
        """
        if self.clock.steps.parallel:
            return spikes[0]
        weight = per_channel_view(self._weight(), self.channel_dim, spikes.dim() - 1)
        if self.binary:
            count = (spikes != 0).sum(0, dtype=torch.int32)
        else:
            # Whole multiples of the weight, rounded to the spikes' dtype each.
            count = (spikes / weight.to(spikes.dtype)).round().to(torch.int32).sum(0)
            count = count.to(torch.int32)
        if not spikes.requires_grad:
            return count
        wide = spikes.float() if spikes.dtype in (torch.float16, torch.bfloat16) else spikes
        smooth = wide.sum(0) / weight
        # The value is the whole number, so that answers do not depend on the gradient mode.
        return count.to(smooth.dtype) + (smooth - smooth.detach())

    def _weight(self) -> Tensor:
        """What a spike weighs in the network."""
        weight = self.node.amplitude
        weight = self.node.threshold if isinstance(weight, str) else weight
        if weight is None:
            weight = 1.0
        return weight if isinstance(weight, Tensor) else torch.tensor(weight)

    def rate(self, count: Tensor, T: int, dtype: torch.dtype) -> Tensor:
        """Spike counts over T steps as activations: ``scale * count / T`` in ``dtype``."""
        scale = self._weight() if self.scale is None else self.scale
        scale = per_channel_view(scale, self.channel_dim, count.dim())
        if self.clock.steps.parallel:
            if self.scale is None:
                return count
            weight = per_channel_view(self._weight(), self.channel_dim, count.dim())
            return (scale * count / weight).to(dtype)
        return (scale * count / T).to(dtype)

    def _net_count(self, out: Tensor, T: int) -> Tensor:
        """The counts over the steps that are read out in an output of :meth:`forward`."""
        steps = self.clock.steps
        if steps.parallel or (self.counts and not steps.whole):
            return out
        rows = split_time(out, steps.rows(T))[steps.before :]
        return self.count(rows[steps.first(T) : T])

    def answer(self, out: Tensor, T: int, dtype: torch.dtype) -> Tensor:
        """The activations that an output of :meth:`forward` in a run of T steps stands for."""
        return self.rate(self._net_count(out, T), T - self.clock.steps.first(T), dtype)

    def spikes_per_step(self, out: Tensor, T: int) -> Tensor:
        """Net spikes of a neuron and step, averaged, in an output of :meth:`forward`."""
        count = self._net_count(out, T).double()
        if self.clock.steps.parallel:
            weight = per_channel_view(self._weight(), self.channel_dim, count.dim())
            return (count / weight).mean()
        return count.mean() / (T - self.clock.steps.first(T))

    def events(self, out: Tensor, T: int) -> Tensor:
        """Spikes emitted in an output of :meth:`forward` of T steps, elementwise, in its shape.

        Of whichever sign; a value of k times the weight of a spike is k spikes. In a parallel run
        they are those of all T steps, and so they are where the output is counts.
        """
        steps = self.clock.steps
        if not steps.parallel:
            if self.counts and not steps.whole:
                return out.abs()
            if self.binary:
                return out != 0
        weight = per_channel_view(self._weight(), self.channel_dim, out.dim()).to(out)
        return (out / weight * (T if steps.parallel else 1)).round().abs()

    def _channels_of(self, threshold: float | Tensor, dims: int) -> int | None:
        """Where a threshold per channel lies in ``dims`` dimensions; None if it is not one."""
        per_channel = isinstance(threshold, Tensor) and threshold.dim() == 1
        return self.channel_dim % dims if per_channel else None

    def _at_once(self, x: Tensor, T: int) -> Tensor:
        """``w / T clip(floor((x T + v_init) / θ), 0, T)`` of a mean current ``[B, *]``.

        w is what a spike weighs, θ unless the method says otherwise.
        """
        node = self.node
        threshold = node.threshold
        if node.bias is not None:
            bias = torch.as_tensor(node.bias, dtype=x.dtype, device=x.device)
            x = x + per_channel_view(bias, self.channel_dim, x.dim())
        weighs_theta = isinstance(node.amplitude, str)
        weighs_theta |= node.amplitude is None and self.scale is not None  # θ = 1, in the weights
        if node.v_init == "half" and weighs_theta:
            # The QCFS network's own expression, and its bits.
            dim = self._channels_of(threshold, x.dim())
            return qcfs(x, threshold, T, 0.5, "floor_clip", dim)
        state = torch.float64 if x.dtype == torch.float64 else torch.float32
        threshold = torch.as_tensor(threshold, dtype=state, device=x.device)
        threshold = per_channel_view(threshold, self.channel_dim, x.dim())
        start = 0.5 * threshold if isinstance(node.v_init, str) else node.v_init
        start = torch.as_tensor(start, dtype=state, device=x.device)
        start = per_channel_view(start, self.channel_dim, x.dim())
        count = torch.floor((x.to(state) * T + start) / threshold).clamp(0, T)
        weight = self._weight().to(device=x.device, dtype=state)
        return (per_channel_view(weight, self.channel_dim, x.dim()) * (count / T)).to(x.dtype)

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
        """Count over the steps that answer: ``[B, *]``, or with times to count at ``[n, B, *]``."""
        layer = self._layer[0]
        rows = split_time(spikes, T)
        if not layer.clock.steps.whole or layer.clock.steps.parallel:
            return layer.count(rows)
        parts = [layer.count(part) for part in layer.clock.answering(rows)]
        return torch.stack(parts).cumsum(0, dtype=parts[0].dtype)
