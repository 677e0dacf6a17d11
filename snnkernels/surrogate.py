"""Surrogate gradients: what stands in for the derivative of a spike.

A spike is the step function of ``u = m - threshold``; its derivative is zero or undefined, so
backward passes use one of these instead. Each has area 1 and its own smooth primitive. ``kind`` is
the id that csrc/params.h uses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Surrogate:
    """Base of the surrogate functions; ``alpha`` is the inverse width, positive and finite.

    The kernels know the four below and no others: neurons refuse subclasses of your own.

    Calling one on ``u`` (any float tensor) gives spikes (1 where ``u >= 0``) whose gradient is
    :meth:`derivative`, differentiable as often as needed.
    """

    alpha: float = 1.0
    kind: ClassVar[int] = -1
    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if not (isinstance(self.alpha, (int, float)) and 0 < self.alpha < math.inf):
            raise ValueError(
                f"{type(self).__name__}: alpha={self.alpha!r} must be a positive finite number"
            )

    def __call__(self, u: Tensor) -> Tensor:
        """Spikes of ``u``, same shape and dtype, with the surrogate gradient."""
        return _Spike.apply(u, u >= 0, self)

    def derivative(self, u: Tensor) -> Tensor:
        """The surrogate derivative at ``u``, same shape and dtype."""
        raise NotImplementedError

    def primitive(self, u: Tensor) -> Tensor:
        """The smooth function whose derivative this is, from 0 to 1, same shape and dtype."""
        raise NotImplementedError


@dataclass(frozen=True)
class ATan(Surrogate):
    """``alpha/2 / (1 + (pi/2 alpha u)^2)`` (Fang et al., ICCV 2021); our default, alpha = 2."""

    alpha: float = 2.0
    kind: ClassVar[int] = 0
    name: ClassVar[str] = "atan"

    def derivative(self, u: Tensor) -> Tensor:
        """See :class:`Surrogate`."""
        return 0.5 * self.alpha / (1 + (math.pi / 2 * self.alpha * u).square())

    def primitive(self, u: Tensor) -> Tensor:
        """See :class:`Surrogate`."""
        return torch.atan(math.pi / 2 * self.alpha * u) / math.pi + 0.5


@dataclass(frozen=True)
class Sigmoid(Surrogate):
    """``alpha s (1 - s)`` with ``s = sigmoid(alpha u)``; alpha = 4."""

    alpha: float = 4.0
    kind: ClassVar[int] = 1
    name: ClassVar[str] = "sigmoid"

    def derivative(self, u: Tensor) -> Tensor:
        """See :class:`Surrogate`."""
        z = self.alpha * u
        # Not s (1 - s): 1 - s cancels for large u.
        return self.alpha * torch.sigmoid(z) * torch.sigmoid(-z)

    def primitive(self, u: Tensor) -> Tensor:
        """See :class:`Surrogate`."""
        return torch.sigmoid(self.alpha * u)


@dataclass(frozen=True)
class Triangle(Surrogate):
    """``alpha max(0, 1 - alpha |u|)``, a triangle (Bellec et al., NeurIPS 2018).

    SpikingJelly calls it ``PiecewiseQuadratic``, after its primitive. alpha = 1.
    """

    alpha: float = 1.0
    kind: ClassVar[int] = 2
    name: ClassVar[str] = "triangle"

    def derivative(self, u: Tensor) -> Tensor:
        """See :class:`Surrogate`."""
        return self.alpha * (1 - self.alpha * u.abs()).clamp(min=0)

    def primitive(self, u: Tensor) -> Tensor:
        """See :class:`Surrogate`."""
        z = (self.alpha * u).clamp(-1, 1)
        return z - 0.5 * z * z.abs() + 0.5


@dataclass(frozen=True)
class Rectangle(Surrogate):
    """``alpha`` where ``|u| < 1/(2 alpha)``, else 0 (Wu et al., Front. Neurosci. 2018).

    alpha = 1.
    """

    alpha: float = 1.0
    kind: ClassVar[int] = 3
    name: ClassVar[str] = "rectangle"

    def derivative(self, u: Tensor) -> Tensor:
        """See :class:`Surrogate`."""
        return (u.abs() * self.alpha < 0.5).to(u.dtype) * self.alpha

    def primitive(self, u: Tensor) -> Tensor:
        """See :class:`Surrogate`."""
        return (self.alpha * u + 0.5).clamp(0, 1)


class _Spike(torch.autograd.Function):
    """Spikes given as booleans, with the surrogate gradient with respect to ``u``."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, fired: Tensor, surrogate: Surrogate) -> Tensor:
        ctx.save_for_backward(u)
        ctx.surrogate = surrogate
        return fired.to(u.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (u,) = ctx.saved_tensors
        return grad * ctx.surrogate.derivative(u), None, None


def spike(u: Tensor, fired: Tensor, surrogate: Surrogate) -> Tensor:
    """Spikes ``fired`` (bool) as numbers of ``u``'s dtype, with the surrogate gradient at ``u``."""
    return _Spike.apply(u, fired, surrogate)


DEFAULT = ATan()
BY_NAME: dict[str, type[Surrogate]] = {c.name: c for c in (ATan, Sigmoid, Triangle, Rectangle)}
BY_KIND: tuple[type[Surrogate], ...] = (ATan, Sigmoid, Triangle, Rectangle)

# SpikingJelly's classes with the same derivative and the same alpha.
_SPIKINGJELLY: dict[str, type[Surrogate]] = {
    "ATan": ATan,
    "Sigmoid": Sigmoid,
    "PiecewiseQuadratic": Triangle,
    "Rect": Rectangle,
}


def resolve(surrogate_function: Any) -> Surrogate:
    """The surrogate meant by ``surrogate_function``.

    Args:
        surrogate_function: ``None`` (ATan, alpha 2), a name (``"atan"``, ``"sigmoid"``,
            ``"triangle"``, ``"rectangle"``), a :class:`Surrogate`, or a SpikingJelly surrogate
            object (ATan, Sigmoid, PiecewiseQuadratic, Rect).

    Raises:
        ValueError: for an unknown name.
        TypeError: for any other object.
    """
    if surrogate_function is None:
        return DEFAULT
    if type(surrogate_function) in BY_KIND:
        return surrogate_function
    if isinstance(surrogate_function, str):
        if surrogate_function not in BY_NAME:
            raise ValueError(
                f"surrogate_function={surrogate_function!r} is unknown; allowed are "
                + ", ".join(map(repr, BY_NAME))
            )
        return BY_NAME[surrogate_function]()
    cls = type(surrogate_function)
    if cls.__module__.startswith("spikingjelly.") and cls.__name__ in _SPIKINGJELLY:
        if not getattr(surrogate_function, "spiking", True):
            raise ValueError(
                "surrogate_function: a SpikingJelly surrogate with spiking=False gives no spikes"
            )
        return _SPIKINGJELLY[cls.__name__](float(surrogate_function.alpha))
    raise TypeError(
        f"surrogate_function={surrogate_function!r} is of type {cls.__name__}; allowed are None, a "
        f"name ({', '.join(map(repr, BY_NAME))}), a snnkernels surrogate, or SpikingJelly's ATan, "
        "Sigmoid, PiecewiseQuadratic or Rect"
    )
