"""How single layers move bounds: what the rules of :mod:`.interval_rules` are made of."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .fold import with_weights
from .intervals import Bounds, affine

__all__ = [
    "eps_of",
    "growing",
    "nearest",
    "per_channel",
    "signs",
    "softmax",
    "weighted",
    "window_sum",
]


def eps_of(dtype: torch.dtype) -> float:
    """Unit roundoff of ``dtype``."""
    return torch.finfo(dtype).eps / 2


def window_sum(pool: nn.Module) -> Callable[[Tensor], Tensor]:
    """The sum over the windows of a max-pool, or more, of values that are not negative."""
    if isinstance(pool, nn.MaxPool2d) and pool.dilation in (1, (1, 1)):
        return lambda x: F.avg_pool2d(
            x, pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode, True, 1
        )  # fmt: skip
    rank = int(type(pool).__name__[-2])
    if hasattr(pool, "kernel_size"):
        size = pool.kernel_size
        sides = (size,) * rank if isinstance(size, int) else tuple(size)  # type: ignore[arg-type]

        def members(x: Tensor, out: Tensor) -> int:
            return int(torch.tensor(sides).prod())
    else:

        def members(x: Tensor, out: Tensor) -> int:
            pairs = zip(x.shape[-rank:], out.shape[-rank:], strict=True)
            return int(torch.tensor([-(-a // b) + 1 for a, b in pairs]).prod())

    def at_most(x: Tensor) -> Tensor:
        out = pool(x)
        return members(x, out) * out

    return at_most


def signs(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``W+`` and ``-W-``, float64."""
    weight = weight.detach().double()
    return weight.clamp(min=0), (-weight).clamp(min=0)


def _channel_view(value: Tensor, x: Tensor) -> Tensor:
    return value.detach().double().view(1, -1, *(1,) * (x.dim() - 2))


def weighted(module: nn.Linear | _ConvNd, x: Bounds, eps: float) -> Bounds:
    """A linear layer or a convolution, transposed or not."""
    up, down = (with_weights(module, w, None) for w in signs(module.weight))
    terms = module.weight[0].numel()
    if isinstance(module, _ConvTransposeNd):
        terms = module.weight[:, 0].numel() // module.groups
    bias = module.bias
    if bias is not None and isinstance(module, _ConvNd):
        bias = bias.view(1, -1, *(1,) * (len(module.kernel_size)))
    return affine(x, _detached(up), _detached(down), bias, terms + 1, eps)


def _detached(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: module(x).detach()


def per_channel(x: Bounds, scale: Tensor, shift: Tensor, around: Tensor, eps: float) -> Bounds:
    """``x * scale + shift``; ``around``: magnitudes met on the way to ``shift``."""
    up, down = (_channel_view(w, x.low) for w in signs(scale))
    bias = _channel_view(shift, x.low)
    out = affine(x, lambda r: r * up, lambda r: r * down, bias, 4, eps)
    more = 8 * (eps + 2.0**-52) * _channel_view(around.abs(), x.low)
    return out.wider(x.T * more, more).tight()


def softmax(x: Bounds, dim: int, log: bool, eps: float) -> Bounds:
    """Each output grows with its own logit and falls with every other."""
    low, high = x.low, x.high
    room = 16 * eps * (1 + x.size.amax(dim, keepdim=True))

    def others(own: Tensor, rest: Tensor) -> Tensor:
        # own - log(exp(own) + sum of the others' exp)
        own, rest = own.movedim(dim, -1), rest.movedim(dim, -1)
        size = rest.shape[-1]
        each = rest.unsqueeze(-2).expand(*rest.shape[:-1], size, size).clone()
        each.diagonal(dim1=-2, dim2=-1).copy_(own)
        return (own - each.logsumexp(-1)).movedim(-1, dim)

    low, high = others(low, high) - room, (others(high, low) + room).clamp(max=0)
    if log:
        return Bounds.between(low, high)
    small = eps * eps  # more than any of the dtype's numbers loses at its lower end
    return Bounds.between((low.exp() - small).clamp(min=0), high.exp() + small)


def growing(x: Bounds, function: Callable[[Tensor], Tensor], eps: float) -> Bounds:
    """A function of values in [-1, 1] that never falls."""
    room = 8 * eps
    return Bounds.between(function(x.low) - room, function(x.high) + room)


def nearest(x: Bounds, function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Bounds:
    """Interpolation that picks elements: those of ``[B, C, *]`` it picks in a network of ``dtype``.

    Positions are computed in float32 or float64, as the values are, and do not always round to the
    same element.
    """
    places = x.low.shape[2:]
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    numbers = torch.arange(math.prod(places), device=x.low.device, dtype=kind)
    picked = function(numbers.view(1, 1, *places))
    index = picked.flatten().long()
    return x.map(lambda part: part.flatten(2)[..., index].unflatten(2, picked.shape[2:]))
