"""Rate norm layers: activations that answer in firing rates, and their second stage of training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["RateNorm", "lock_rates", "rate_inference_loss", "record_rates"]

_SCALES = ("sigmoid", "abs")
_LEAST = 1e-6  # what the authors' code adds to a threshold
_SHARED = 2.5  # start of a scale that all layers share


class RateNorm(nn.Module):
    """``clip(relu(x) / theta, 0, 1)``: the firing rate of a neuron of threshold theta.

    Source: Ding, Yu, Tian, Huang, IJCAI 2021 (arXiv 2105.11654), rate norm layer.
    ``theta = p * running_max + 1e-6`` with ``p = sigmoid(scale)`` or ``|scale|``, and
    ``running_max`` an average of the largest current of each training batch,
    ``0.9 running_max + 0.1 max(x)`` for a momentum of 0.1. The batch's own maximum counts in the
    theta of its forward pass; no gradient passes through it. As its activations are rates, the
    layer behind it is trained for spikes of weight 1: convert with ``method="rnl"``.

    Training has two stages. In the first, weights are trained and ``scale`` stays (it needs no
    gradient); then :func:`lock_rates` holds weights and ``running_max`` and has ``scale`` trained
    alone, with :func:`rate_inference_loss`.

    Not in the sources we could read, and ours: ``running_max`` starts at 1, counts a batch without
    a positive current as 0, and the start of ``|scale|`` is 1.

    Under DistributedDataParallel ``running_max`` is that of rank 0, like the statistics of batch
    norms.

    Args:
        momentum: weight of a batch's maximum in the average, in (0, 1].
        p: ``"sigmoid"`` (p in (0, 1)) or ``"abs"``.
        scale: its start; None: 10 for the sigmoid (p = 0.99995), 1 for abs.

    Shape: any floating-point tensor to the same shape and dtype. ``scale`` is a scalar parameter,
    ``running_max`` a scalar buffer.

    Raises:
        ValueError: an argument out of range; names it.
    """

    running_max: Tensor

    def __init__(
        self, momentum: float = 0.1, p: str = "sigmoid", scale: float | None = None
    ) -> None:
        super().__init__()
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must be in (0, 1], got {momentum}")
        if p not in _SCALES:
            raise ValueError(f"p={p!r} is unknown; allowed are 'sigmoid' and 'abs'")
        start = float({"sigmoid": 10.0, "abs": 1.0}[p] if scale is None else scale)
        if not abs(start) < float("inf") or (p == "abs" and start == 0):
            raise ValueError(f"scale must be finite{' and not 0' * (p == 'abs')}, got {scale}")
        self.momentum = float(momentum)
        self.p = p
        self.locked = False
        self.scale = nn.Parameter(torch.tensor(start), requires_grad=False)
        self.register_buffer("running_max", torch.ones(()))

    @property
    def theta(self) -> Tensor:
        """The threshold, scalar, with the gradient of ``scale``."""
        part = torch.sigmoid(self.scale) if self.p == "sigmoid" else self.scale.abs()
        # A copy: a second call in the same pass would change what autograd keeps.
        return part * self.running_max.clone() + _LEAST

    def forward(self, x: Tensor) -> Tensor:
        """Rates in ``[0, 1]`` of currents ``x`` (any shape); NaN stays NaN."""
        if self.training and not self.locked and x.numel():
            with torch.no_grad():
                largest = x.detach().amax().clamp(min=0).to(self.running_max)
                self.running_max.lerp_(largest, self.momentum)
        return torch.clamp(torch.relu(x) / self.theta.to(x.dtype), max=1.0)

    def extra_repr(self) -> str:
        """Show the threshold and how it comes about."""
        locked = ", locked" if self.locked else ""
        return f"theta={self.theta.item():.4g}, p={self.p!r}{locked}"


def _layers(net: nn.Module) -> list[RateNorm]:
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
    found = [m for m in net.modules() if isinstance(m, RateNorm)]
    if not found:
        raise ValueError(f"net ({type(net).__name__}) has no RateNorm layer; it must have one")
    return found


def lock_rates(net: nn.Module, shared: bool = False) -> list[nn.Parameter]:
    """Begin the second stage: everything in ``net`` is held but the scales of its rate norms.

    Parameters need no gradient any more, except the scales; running maxima are locked. Batch norms
    are the caller's business: put ``net`` in eval mode, or their statistics go on moving.

    Args:
        net: with :class:`RateNorm` layers.
        shared: one scale for all layers, of one parameter that starts at 2.5.

    Returns:
        What is left to train: the scales, or the one.

    Raises:
        ValueError: there is no rate norm layer.
    """
    layers = _layers(net)
    net.requires_grad_(False)
    if shared:
        one = nn.Parameter(torch.full_like(layers[0].scale, _SHARED))
    for layer in layers:
        layer.locked = True
        if shared:
            layer.scale = one
        layer.scale.requires_grad_(True)
    return [one] if shared else [layer.scale for layer in layers]


@contextmanager
def record_rates(net: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the outputs of the rate norm layers of ``net``, in order, while the block runs.

    Every forward pass in the block adds its own; each is ``[B, *]`` and part of the graph.

    Raises:
        ValueError: there is no rate norm layer.
    """
    rates: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda module, args, out: rates.append(out))
        for layer in _layers(net)
    ]
    try:
        yield rates
    finally:
        for handle in handles:
            handle.remove()


def rate_inference_loss(rates: Iterable[Tensor]) -> Tensor:
    """``sum over layers of ||r||_1 / ||r||_2^2``, the mean over the batch: how slowly rates come.

    Source: Ding et al., IJCAI 2021, rate inference loss. The authors' code adds 0.1 times the sum
    over layers to the cross-entropy. That a layer's coefficient is made of these two norms is all
    that we could read at the source; this form is the bound of the paper as a summary by others
    has it, ``||r(t) - r||_2^2 / ||r||_2^2 < 2 ||r||_1 / (t ||r||_2^2)``. By that summary the paper
    divides the sum by the number of layers, and the rest of its loss is the cosine distance of
    the answers rather than the cross-entropy. Norms are those of each sample, ours to choose; one
    without any rate counts as 0.

    Args:
        rates: ``[B, *]`` for each layer, floating point, at least 0; see :func:`record_rates`.

    Returns:
        A scalar, float32 at least, with its gradient.

    Raises:
        ValueError: there are no rates.
    """
    total: Tensor | None = None
    for r in rates:
        flat = r.flatten(1)
        flat = flat if flat.dtype == torch.float64 else flat.float()
        squares = flat.square().sum(1)
        active = squares > 0
        layer = torch.where(active, flat.sum(1) / torch.where(active, squares, 1.0), 0.0).mean()
        total = layer if total is None else total + layer
    if total is None:
        raise ValueError("rates is empty: run the network inside record_rates")
    return total
