"""Thresholds that grow with the clipped network they clip: local threshold balancing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, fx, nn

from .errors import ConversionError
from .ops import Activation
from .spiking import per_channel_view

__all__ = ["Balancing", "balance", "balanced_threshold"]


@dataclass(frozen=True)
class Balancing:
    """Local threshold balancing: ``θ += rate * 2 * mean((a - θ)+)`` at every batch, from 0.

    Source: Bu, Li, Yu: Inference-Scale Complexity in ANN-SNN Conversion, CVPR 2025 (LTB), local
    threshold balancing; the step is the gradient of the squared clipping error. The mean is over
    the batch and, per channel, over space, zeros included. Every layer is updated when the batch
    reaches it and clips the activations it hands on at the threshold just updated, so deeper layers
    see the network as it will be clipped. θ tends to the largest activation and comes to rare ones
    last: stopping early is what trims outliers.

    Args:
        updates: batches, in the loader's order, read again from its start as often as that takes.
            The paper has 1,000 to 5,000 of 100 images; the default is for a CPU's patience.
        rate: c of the paper, 1 there.
    """

    updates: int = 200
    rate: float = 1.0

    def __post_init__(self) -> None:
        if type(self.updates) is not int or self.updates < 1:
            raise ValueError(f"ltb: updates={self.updates!r} must be an int of at least 1")
        if isinstance(self.rate, bool) or not 0 < self.rate < math.inf:
            raise ValueError(f"ltb: rate={self.rate!r} must be positive and finite")

    def __str__(self) -> str:
        own = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if getattr(self, f.name) != f.default
        ]
        return "ltb" + (f"({', '.join(own)})" if own else "")


def _batches(
    first: Iterator[Tensor] | None, again: Callable[[], Iterator[Tensor]]
) -> Iterator[Tensor]:
    """Batches over and over; ends if the loader gives none when read anew."""
    items = again() if first is None else first
    while True:
        found = False
        for x in items:
            if len(x) > 0:
                found = True
                yield x
        if not found:
            return
        items = again()


def _bar(total: int, show: bool) -> Any:
    if show:
        try:
            from tqdm import tqdm
        except ImportError:
            return None
        return tqdm(total=total, desc="balancing thresholds", unit="batch", leave=False)
    return None


@torch.no_grad()
def balance(
    model: fx.GraphModule,
    wanted: dict[str, tuple[Balancing, bool, int]],
    first: Iterator[Tensor] | None,
    again: Callable[[], Iterator[Tensor]],
    *,
    progress: bool = True,
) -> tuple[dict[str, Tensor], int]:
    """Run ``model`` with its activations at ``wanted`` clipped at thresholds that grow.

    Args:
        model: the ANN with its activations as :class:`Activation` modules, in eval mode.
        wanted: activation path to ``(rule, per channel, channel dimension)``; other activations
            stay what they are. The dimension counts the batch, or is -1.
        first: batches of the first pass; None: ``again()``.
        again: gives the loader's batches anew.
        progress: show a tqdm bar if tqdm is there.

    Returns:
        Thresholds by path, float64 ``[C]`` (``[1]`` per layer), 0 where nothing ever fired; and the
        number of batches, fewer than asked for if the loader can be read only once.

    Raises:
        ValueError: the loader gave no batch.
        ConversionError: NaN or infinite activations (names the layer), a batch that the network
            does not take.
    """
    thetas: dict[str, Tensor] = {}
    done = 0

    def watch(path: str, rule: Balancing, per_channel: bool, channel_dim: int) -> Any:
        def hook(module: nn.Module, args: Any, a: Tensor) -> Tensor:
            assert isinstance(module, Activation)
            wide = a.float() if a.dtype in (torch.float16, torch.bfloat16) else a
            apart = per_channel and a.dim() > 1
            channel = channel_dim % a.dim() if apart else 0
            if path not in thetas:
                size = a.shape[channel] if apart else 1
                thetas[path] = torch.zeros(size, dtype=torch.float64, device=a.device)
            theta = thetas[path]
            if done < rule.updates:
                over = (wide - _view(theta, channel, a).to(wide.dtype)).clamp_(min=0)
                others = [d for d in range(a.dim()) if not apart or d != channel]
                theta += 2 * rule.rate * over.mean(others, dtype=torch.float64)
                if not bool(torch.isfinite(theta).all()):
                    raise ConversionError(
                        f"{module.label}: the ANN's activations contain NaN or infinite values on "
                        "the calibration data; no threshold can be found. Check the network's "
                        "weights and the loader's inputs"
                    )
            return torch.minimum(a, _view(theta, channel, a).to(a.dtype))

        return model.get_submodule(path).register_forward_hook(hook)

    updates = max(rule.updates for rule, *_ in wanted.values())
    handles = [watch(path, *how) for path, how in wanted.items()]
    bar = _bar(updates, progress)
    try:
        for x in _batches(first, again):
            try:
                model(x)
            except RuntimeError as error:
                raise ConversionError(
                    f"the network fails on batch {done} of loader, of shape {tuple(x.shape)}, "
                    f"{x.dtype}: {error}"
                ) from error
            done += 1
            if bar is not None:
                bar.update()
            if done == updates:
                break
    finally:
        if bar is not None:
            bar.close()
        for handle in handles:
            handle.remove()
    if not done:
        raise ValueError(
            "threshold='ltb' reads the loader once more, and this one gave nothing: pass a loader "
            "that can be read several times (a list, a DataLoader), not an iterator"
        )
    return thetas, done


def _view(theta: Tensor, channel: int, a: Tensor) -> Tensor:
    return theta if theta.numel() == 1 else per_channel_view(theta, channel, a.dim())


def balanced_threshold(grown: Tensor) -> tuple[Tensor, list[int], bool]:
    """Finish ``grown`` ``[C]``: ``(theta, channels that took the layer's value, layer silent)``.

    A channel that never fired takes the largest threshold of its layer; a layer that never fired
    takes 1.
    """
    dead = torch.nonzero(grown <= 0).flatten().tolist()
    largest = grown.amax()
    if not bool(largest > 0):
        return torch.ones_like(grown), dead, True
    return torch.where(grown > 0, grown, largest), dead, False
