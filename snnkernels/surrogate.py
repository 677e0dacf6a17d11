"""Surrogate gradients: what stands in for the derivative of a spike.

A spike is the step function of ``u = m - threshold``; its derivative is zero or undefined, so
backward passes use one of these instead. Each has its own smooth primitive. ``kind`` is the id that
csrc/params.h uses.
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

    ``scale``, positive and finite, multiplies the derivative: 1 is the formula of the class, which
    has area 1 (:class:`SuperSpike` and :class:`PeriodicExponential` have height 1, as their field
    writes them).

    The kernels know those below and no others: neurons refuse subclasses of your own. ATan,
    Sigmoid, Triangle and Rectangle of scale 1 are the fastest: the plain neuron has kernels for
    each. The others run in the general kernel.

    Calling one on ``u`` (any float tensor) gives spikes (1 where ``u >= 0``) whose gradient is
    :meth:`derivative`, differentiable as often as needed.
    """

    alpha: float = 1.0
    scale: float = 1.0
    kind: ClassVar[int] = -1
    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("scale", self.scale)):
            if not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise ValueError(
                    f"{type(self).__name__}: {name}={value!r} must be a positive finite number"
                )

    @property
    def plain(self) -> bool:
        """Whether the plain neuron has a backward kernel for it."""
        return is_plain(self.kind, self.scale)

    def __call__(self, u: Tensor) -> Tensor:
        """Spikes of ``u``, same shape and dtype, with the surrogate gradient."""
        return _Spike.apply(u, u >= 0, self, None)

    def derivative(self, u: Tensor, threshold: Tensor | float = 1.0) -> Tensor:
        """The surrogate derivative at ``u``, same shape and dtype.

        ``threshold`` is looked at by :class:`PeriodicExponential` alone.
        """
        _check_u(u, threshold)
        return self._scaled(self._derivative(u, threshold))

    def primitive(self, u: Tensor, threshold: Tensor | float = 1.0) -> Tensor:
        """The smooth function whose derivative this is, at ``u``; same shape and dtype.

        ``threshold`` as for :meth:`derivative`.
        From 0 to the area, which is ``scale`` where the formula has area 1.
        """
        _check_u(u, threshold)
        return self._scaled(self._primitive(u, threshold))

    def _scaled(self, value: Tensor) -> Tensor:
        return value if self.scale == 1 else value * self.scale

    def _derivative(self, u: Tensor, threshold: Tensor | float) -> Tensor:
        raise NotImplementedError

    def _primitive(self, u: Tensor, threshold: Tensor | float) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class ATan(Surrogate):
    """``alpha/2 / (1 + (pi/2 alpha u)^2)`` (Fang et al., ICCV 2021); our default, alpha = 2."""

    alpha: float = 2.0
    kind: ClassVar[int] = 0
    name: ClassVar[str] = "atan"

    def _derivative(self, u: Tensor, threshold: Tensor | float) -> Tensor:
        return 0.5 * self.alpha / (1 + (math.pi / 2 * self.alpha * u).square())

    def _primitive(self, u: Tensor, threshold: Tensor | float) -> Tensor:
        return torch.atan(math.pi / 2 * self.alpha * u) / math.pi + 0.5


@dataclass(frozen=True)
class Sigmoid(Surrogate):
    """``alpha s (1 - s)`` with ``s = sigmoid(alpha u)``; alpha = 4."""

    alpha: float = 4.0
    kind: ClassVar[int] = 1
    name: ClassVar[str] = "sigmoid"

    def _derivative(self, u: Tensor, threshold: Tensor | float) -> Tensor:
        z = self.alpha * u
        # Not s (1 - s): 1 - s cancels for large u.
        return self.alpha * torch.sigmoid(z) * torch.sigmoid(-z)

    def _primitive(self, u: Tensor, threshold: Tensor | float) -> Tensor:
        return torch.sigmoid(self.alpha * u)


@dataclass(frozen=True)
class Triangle(Surrogate):
    """``alpha max(0, 1 - alpha |u|)``, a triangle (Bellec et al., NeurIPS 2018).

    SpikingJelly calls it ``PiecewiseQuadratic``, after its primitive. alpha = 1.
    """

    alpha: float = 1.0
    kind: ClassVar[int] = 2
    name: ClassVar[str] = "triangle"

    def _derivative(self, u: Tensor, threshold: Tensor | float) -> Tensor:
        return self.alpha * (1 - self.alpha * u.abs()).clamp(min=0)

    def _primitive(self, u: Tensor, threshold: Tensor | float) -> Tensor:
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

    def _derivative(self, u: Tensor, threshold: Tensor | float) -> Tensor:
        return (u.abs() * self.alpha < 0.5).to(u.dtype) * self.alpha

    def _primitive(self, u: Tensor, threshold: Tensor | float) -> Tensor:
        return (self.alpha * u + 0.5).clamp(0, 1)


@dataclass(frozen=True)
class SuperSpike(Surrogate):
    """``1 / (1 + alpha |u|)^2``, of height 1 and area ``2/alpha`` (Zenke, Ganguli, 2018).

    alpha = 25, as snnTorch's ``fast_sigmoid(slope=25)``. SpikingJelly's ``SuperSpike(a)`` is
    ``SuperSpike(1, scale=a)`` and its ``SoftSign(a)``, of area 1, ``SuperSpike(a, scale=a/2)``.
    """

    alpha: float = 25.0
    kind: ClassVar[int] = 4
    name: ClassVar[str] = "superspike"

    def _derivative(self, u: Tensor, threshold: Tensor | float) -> Tensor:
        return 1 / (1 + self.alpha * u.abs()).square()

    def _primitive(self, u: Tensor, threshold: Tensor | float) -> Tensor:
        z = self.alpha * u
        return (1 + z / (1 + z.abs())) / self.alpha


@dataclass(frozen=True)
class Exponential(Surrogate):
    """``alpha/2 exp(-alpha |u|)`` (Shrestha, Orchard, NeurIPS 2018); alpha = 1.

    SpikingJelly's ``PiecewiseExp``. Sinabs' ``SingleExponential(grad_width=w, grad_scale=s)`` of a
    threshold θ is ``Exponential(1 / (w θ), scale=2 s)``.
    """

    alpha: float = 1.0
    kind: ClassVar[int] = 5
    name: ClassVar[str] = "exponential"

    def _derivative(self, u: Tensor, threshold: Tensor | float) -> Tensor:
        return 0.5 * self.alpha * torch.exp(-self.alpha * u.abs())

    def _primitive(self, u: Tensor, threshold: Tensor | float) -> Tensor:
        # Clamped, not |u|, whose gradient at 0 is 0.
        above = 1 - 0.5 * torch.exp(-self.alpha * u.clamp(min=0))
        return torch.where(u >= 0, above, 0.5 * torch.exp(self.alpha * u.clamp(max=0)))


@dataclass(frozen=True)
class Erf(Surrogate):
    """``alpha/sqrt(pi) exp(-(alpha u)^2)``, a Gaussian of deviation ``1/(sqrt(2) alpha)``.

    alpha = 2, as SpikingJelly's. Norse's ``"heavi_erfc"`` is ``Erf(alpha, scale=2/alpha)``.
    """

    alpha: float = 2.0
    kind: ClassVar[int] = 6
    name: ClassVar[str] = "erf"

    def _derivative(self, u: Tensor, threshold: Tensor | float) -> Tensor:
        return self.alpha / math.sqrt(math.pi) * torch.exp(-(self.alpha * u).square())

    def _primitive(self, u: Tensor, threshold: Tensor | float) -> Tensor:
        return 0.5 * torch.erfc(-self.alpha * u)


@dataclass(frozen=True)
class PeriodicExponential(Surrogate):
    """A peak of height 1 at every multiple of the threshold, for ``max_spikes``; alpha = 2.

    ``exp(-alpha |u|)`` below the threshold, ``exp(-2 alpha d)`` above, with d the distance to the
    nearest multiple: the form of Sinabs' ``PeriodicExponential`` (Weidel, Sheik, arXiv 2111.01456),
    whose ``grad_width`` is ``1/alpha``.
    """

    alpha: float = 2.0
    kind: ClassVar[int] = 7
    name: ClassVar[str] = "periodic_exponential"

    def _derivative(self, u: Tensor, threshold: Tensor | float) -> Tensor:
        phase = u / threshold + 0.5
        beyond = threshold * (2 * (phase - torch.floor(phase)) - 1)
        return torch.exp(-self.alpha * torch.where(u < 0, u, beyond).abs())

    def _primitive(self, u: Tensor, threshold: Tensor | float) -> Tensor:
        n = torch.floor(u / threshold + 0.5)
        rest = u - n * threshold
        after = 1 - torch.exp(-2 * self.alpha * rest.clamp(min=0))
        before = torch.exp(2 * self.alpha * rest.clamp(max=0)) - 1
        side = torch.where(rest < 0, before, after) / (2 * self.alpha)
        period = (1 - torch.exp(-self.alpha * threshold * torch.ones_like(u))) / self.alpha
        beyond = 1 / self.alpha + n * period + side
        below = torch.exp(self.alpha * u.clamp(max=0)) / self.alpha
        return torch.where(u < 0, below, beyond)


def _check_u(u: Any, threshold: Any) -> None:
    if not isinstance(u, Tensor) or not u.dtype.is_floating_point:
        got = u.dtype if isinstance(u, Tensor) else type(u).__name__
        raise TypeError(f"u must be a floating-point tensor, got {got}")
    if isinstance(threshold, (int, float)) and not 0 < threshold < math.inf:
        raise ValueError(f"threshold={threshold!r} must be positive and finite")


class _Spike(torch.autograd.Function):
    """Spikes given as booleans or numbers, with the surrogate gradient with respect to ``u``."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, fired: Tensor, surrogate: Surrogate, threshold: Tensor | float | None
    ) -> Tensor:
        ctx.save_for_backward(u)
        ctx.surrogate = surrogate
        ctx.threshold = threshold.detach() if isinstance(threshold, Tensor) else threshold
        return fired.to(u.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (u,) = ctx.saved_tensors
        # Surrogates of a user's own may know of no threshold.
        more = () if ctx.threshold is None else (ctx.threshold,)
        return grad * ctx.surrogate.derivative(u, *more), None, None, None


def spike(
    u: Tensor, fired: Tensor, surrogate: Surrogate, threshold: Tensor | float = 1.0
) -> Tensor:
    """Spikes ``fired`` (bool, or how many) in ``u``'s dtype, with the surrogate gradient at ``u``.

    ``threshold``, where they fire, is taken as constant by the gradient.

    Raises:
        TypeError: ``u`` or ``fired`` is no tensor, or ``surrogate`` has no ``derivative``.
        ValueError: ``fired`` is not of ``u``'s shape, or ``threshold`` is not positive.
    """
    _check_u(u, threshold)
    if not isinstance(fired, Tensor):
        raise TypeError(f"fired must be a torch.Tensor, got {type(fired).__name__}")
    if fired.shape != u.shape or fired.device != u.device:
        raise ValueError(
            f"fired is {tuple(fired.shape)} on {fired.device}; expected {tuple(u.shape)} on "
            f"{u.device}, as u is"
        )
    if not callable(getattr(surrogate, "derivative", None)):
        raise TypeError(
            f"surrogate={surrogate!r} must have a method derivative(u, threshold); "
            "snnkernels.surrogate.resolve makes one of a name"
        )
    return _Spike.apply(u, fired, surrogate, threshold)


DEFAULT = ATan()
BY_KIND: tuple[type[Surrogate], ...] = (
    ATan, Sigmoid, Triangle, Rectangle, SuperSpike, Exponential, Erf, PeriodicExponential,
)  # fmt: skip
BY_NAME: dict[str, type[Surrogate]] = {c.name: c for c in BY_KIND}


def is_plain(kind: int, scale: float) -> bool:
    """Whether the plain neuron has a backward kernel for a surrogate of this kind and scale."""
    return kind <= Rectangle.kind and scale == 1


def resolve(surrogate_function: Any) -> Surrogate:
    """The surrogate meant by ``surrogate_function``.

    Args:
        surrogate_function: ``None`` (ATan, alpha 2), a name (``"atan"``, ``"sigmoid"``,
            ``"triangle"``, ``"rectangle"``, ``"superspike"``, ``"exponential"``, ``"erf"``,
            ``"periodic_exponential"``), a :class:`Surrogate`, a SpikingJelly surrogate object
            (ATan, Sigmoid, PiecewiseQuadratic, Rect, SoftSign, SuperSpike, PiecewiseExp, Erf), what
            snnTorch's ``fast_sigmoid``, ``atan`` or ``sigmoid`` returns, or Sinabs'
            PeriodicExponential or Gaussian.

    Raises:
        ValueError: for an unknown name, or what gives no spikes.
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
    from . import surrogate_foreign

    found = surrogate_foreign.resolve(surrogate_function)
    if found is not None:
        return found
    cls = type(surrogate_function)
    raise TypeError(
        f"surrogate_function={surrogate_function!r} is of type {cls.__name__}; allowed are None, a "
        f"name ({', '.join(map(repr, BY_NAME))}), a snnkernels surrogate, or one of these: "
        f"{surrogate_foreign.NAMES}"
    )
