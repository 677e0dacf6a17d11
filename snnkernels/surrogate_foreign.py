"""Surrogates of other libraries as ours. None of the libraries is imported."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .surrogate import (
    ATan,
    Erf,
    Exponential,
    PeriodicExponential,
    Rectangle,
    Sigmoid,
    SuperSpike,
    Surrogate,
    Triangle,
)

__all__ = ["of_norse", "of_sinabs", "of_snntorch", "of_spikingjelly", "resolve"]

# By class: ours from the alpha of theirs.
_SPIKINGJELLY: dict[str, Callable[[float], Surrogate]] = {
    "ATan": ATan,
    "Sigmoid": Sigmoid,
    "PiecewiseQuadratic": Triangle,
    "Rect": Rectangle,
    "SoftSign": lambda a: SuperSpike(a, scale=a / 2),
    "SuperSpike": lambda a: SuperSpike(1.0, scale=a),
    "PiecewiseExp": Exponential,
    "Erf": Erf,
}
# By function, whose one parameter is the first of these names.
_SNNTORCH: dict[str, tuple[str, type[Surrogate]]] = {
    "fast_sigmoid": ("slope", SuperSpike),
    "atan": ("alpha", ATan),
    "sigmoid": ("slope", Sigmoid),
}
_SINABS = ("SingleExponential", "PeriodicExponential", "Gaussian")
NAMES = (
    f"SpikingJelly's {', '.join(_SPIKINGJELLY)}; snnTorch's {', '.join(_SNNTORCH)}; Sinabs' "
    "PeriodicExponential and Gaussian"
)


def of_spikingjelly(theirs: Any) -> Surrogate | None:
    """Ours for a SpikingJelly surrogate object, or None if it is none of those we have.

    Raises:
        ValueError: if it gives no spikes (``spiking=False``).
    """
    cls = type(theirs)
    if not cls.__module__.startswith("spikingjelly.") or cls.__name__ not in _SPIKINGJELLY:
        return None
    if not getattr(theirs, "spiking", True):
        raise ValueError(
            "surrogate_function: a SpikingJelly surrogate with spiking=False gives no spikes"
        )
    return _SPIKINGJELLY[cls.__name__](float(theirs.alpha))


def of_snntorch(theirs: Any) -> Surrogate | None:
    """Ours for what ``snntorch.surrogate.fast_sigmoid(...)``, ``atan`` or ``sigmoid`` returns.

    None if it is none of these.
    """
    if getattr(theirs, "__module__", None) != "snntorch.surrogate":
        return None
    name = getattr(theirs, "__qualname__", "").split(".")[0]
    closure, code = getattr(theirs, "__closure__", None), getattr(theirs, "__code__", None)
    if name not in _SNNTORCH or not closure or code is None:
        return None
    parameter, cls = _SNNTORCH[name]
    given = dict(zip(code.co_freevars, closure, strict=True))
    if set(given) != {parameter}:
        return None
    return cls(float(given[parameter].cell_contents))


def of_norse(method: str, alpha: float) -> Surrogate | None:
    """Ours for a ``method`` of Norse's neurons, or None if we have none.

    ``"super"`` as documented: with alpha. Norse 1.1.0 leaves alpha out, see ``interop.norse``.
    """
    alpha = float(alpha)
    if method == "super":
        return SuperSpike(alpha)
    if method == "triangle":
        return Triangle(1.0, scale=alpha)
    if method == "tanh":
        # 1 - tanh(a u)^2 = 4 s (1 - s) with s = sigmoid(2 a u)
        return Sigmoid(2 * alpha, scale=2 / alpha)
    if method == "heavi_erfc":
        return Erf(alpha, scale=2 / alpha)
    return None


def of_sinabs(theirs: Any, threshold: float | None = None) -> Surrogate | None:
    """Ours for a Sinabs surrogate object, or None if we have none.

    Args:
        theirs: ``SingleExponential``, ``PeriodicExponential`` or ``Gaussian`` (of ``mu`` 0).
        threshold: of the neuron; the width of a ``SingleExponential`` is relative to it.

    Raises:
        ValueError: for a ``SingleExponential`` without a threshold.
    """
    cls = type(theirs)
    if not cls.__module__.startswith("sinabs.") or cls.__name__ not in _SINABS:
        return None
    scale = float(theirs.grad_scale)
    if cls.__name__ == "Gaussian":
        if theirs.mu != 0:
            return None
        return Erf(1 / (math.sqrt(2) * float(theirs.sigma)), scale=scale)
    width = float(theirs.grad_width)
    if cls.__name__ == "PeriodicExponential":
        return PeriodicExponential(1 / width, scale=scale)
    if threshold is None:
        raise ValueError(
            "surrogate_function: the width of Sinabs' SingleExponential is relative to the "
            "threshold θ; use snnkernels.surrogate.Exponential(1 / (grad_width * θ), "
            "scale=2 * grad_scale)"
        )
    return Exponential(1 / (width * threshold), scale=2 * scale)


def resolve(theirs: Any) -> Surrogate | None:
    """Ours for a surrogate object of another library, or None."""
    for of in (of_spikingjelly, of_snntorch, of_sinabs):
        found = of(theirs)
        if found is not None:
            return found
    return None
