"""SpikingJelly's neurons on our kernels: when the numbers are the same, and the call.

The same for its releases 0.0.0.0.14 and 2.0.0, whose neurons compute, one rounded operation after
the other in the dtype of ``x``: ``h = v + x``, a spike where ``h - v_threshold >= 0``, then
``h - spike * v_threshold`` or ``spike * v_reset + (1 - spike) * h``. With spikes of 0 and 1 these
are our bits for float32 and float64 currents.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import surrogate as _surrogate
from ..kernels import call
from ..kernels.arguments import NO_OPTIONS, Options
from ..kernels.spec import SPIKES
from .adapters import Refused
from .checks import PLAIN, WITH_V_SEQ, refuse_transforms

__all__ = ["OWN", "SURROGATES", "check", "fire_level", "leak_of", "run", "surrogate_of"]

_STATES = (torch.float32, torch.float64)
SURROGATES = "spikingjelly.activation_based.surrogate"
OWN = "a SpikingJelly neuron runs SpikingJelly's own code"


def surrogate_of(function: Any) -> _surrogate.Surrogate:
    """Ours with the same derivative as a surrogate of SpikingJelly.

    Raises:
        Refused: with the reason there is none.
    """
    cls = type(function)
    if cls.__module__ != SURROGATES:
        raise Refused(f"its surrogate {cls.__name__} is not one of SpikingJelly's own")
    if not function.spiking:
        raise Refused(f"its surrogate {cls.__name__} has spiking=False: outputs are not spikes")
    if function._forward_hooks or function._forward_pre_hooks or "forward" in function.__dict__:
        raise Refused(f"its surrogate {cls.__name__} has hooks or a forward of its own")
    try:
        return _surrogate.resolve(function)
    except (TypeError, ValueError, AttributeError):
        about = ", ".join(f"{k}={v}" for k, v in _parameters(function).items())
        raise Refused(f"its surrogate {cls.__name__}({about}) is not one of our kernels'") from None


def _parameters(function: Any) -> dict[str, Any]:
    return {
        name: getattr(function, name)
        for name in ("alpha", "beta", "w", "leak", "k")
        if hasattr(function, name)
    }


def leak_of(tau: float, v_reset: float | None, exact: bool) -> float:
    """The factor of a leak that leaves the current alone, ``h = v - (v - v_reset) / tau + x``.

    Our ``round(beta * v) + x`` is that bit for bit where the division is exact.

    Args:
        tau: the time constant.
        v_reset: what the membrane decays to, None for 0.
        exact: the library computes ``v * (1 - 1 / tau) + x`` itself.

    Raises:
        Refused: where the roundings differ.
    """
    if v_reset:
        raise Refused(f"it leaks towards v_reset={v_reset}; ours leak towards 0")
    if not exact and math.frexp(tau)[0] != 0.5:
        raise Refused(
            f"tau={tau} is no power of two: v - v / tau is rounded twice, our beta * v once"
        )
    return 1.0 - 1.0 / tau


def check(x: Any, v: Any, v_threshold: Any, v_reset: Any, shape: Any) -> None:
    """Checks that a call is ours.

    Args:
        x: the current of all steps.
        v: the membrane before the first.
        v_threshold, v_reset: of the neuron; a tensor threshold has been checked elsewhere.
        shape: the neurons' shape.

    Raises:
        Refused: the library's own code has to run, with the reason.
    """
    if type(x) not in PLAIN or (isinstance(v, Tensor) and type(v) not in PLAIN):
        raise Refused("the current is no plain tensor")
    if x.device.type not in ("cpu", "cuda") or x.layout != torch.strided:
        raise Refused(f"there are no kernels for {x.layout} tensors on {x.device.type} devices")
    if x.dtype not in _STATES:
        raise Refused(
            f"SpikingJelly keeps the membranes of {x.dtype} currents in {x.dtype}, where ours are "
            "float32: the numbers would differ. Give float32 currents, for example by "
            "x.float() before the neuron or by leaving autocast"
        )
    if isinstance(v, Tensor):
        if v.dtype != x.dtype or v.shape != shape or v.device != x.device:
            raise Refused("the membrane has another dtype, shape or device than the current")
    elif type(v) is not float or not math.isfinite(v):
        raise Refused(f"the membrane is {v!r}")
    if not isinstance(v_threshold, Tensor) and (
        type(v_threshold) not in (float, int) or not 1.2e-38 < v_threshold < 3.4e38
    ):
        raise Refused(f"v_threshold={v_threshold!r} is not positive and finite")
    if v_reset is not None:
        if type(v_reset) not in (float, int) or not math.isfinite(v_reset):
            raise Refused(f"v_reset={v_reset!r} is not finite")
        if v_reset == 0 and math.copysign(1.0, v_reset) < 0:
            raise Refused(
                "v_reset=-0.0 has a sign that our reset keeps and SpikingJelly's sum loses"
            )
    refuse_transforms()


def run(
    x_seq: Tensor,
    v: Any,
    v_threshold: Any,
    v_reset: float | None,
    surrogate: _surrogate.Surrogate,
    detach_reset: bool,
    store_v_seq: bool,
    *,
    beta: float | None = None,
    fire_level: Tensor | None = None,
    input_scale: Tensor | None = None,
    amplitude: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """All steps ``[T, *shape]`` in one launch: ``(spikes, v, v_seq)``, v_seq None unless asked.

    ``input_scale`` and ``amplitude`` broadcast to ``shape``.
    """
    if input_scale is not None and x_seq.device.type == "cpu":
        # The same product rounded the same way; on CPUs the plain kernel behind it is faster than
        # the general one, which alone scales.
        x_seq, input_scale = x_seq * input_scale.to(x_seq.dtype), None
    more = NO_OPTIONS
    if beta is not None or fire_level is not None:
        more = Options(beta=beta, fire_level=fire_level)
    result = call.run(
        x_seq, WITH_V_SEQ if store_v_seq else SPIKES, v, v_threshold, v_reset, surrogate,
        detach_reset, None, None, amplitude, input_scale, ">=", None, False, None,
        "recompute", "T,N", more,
    )  # fmt: skip
    return result[0], result[4], result[5] if store_v_seq else None


def fire_level(threshold: Tensor, offset: Tensor) -> Tensor:
    """The least ``h`` with ``h + offset >= threshold``, the sum rounded; it broadcasts as they do.

    SpikingJelly's activation-aware neuron compares that sum. Rounding is monotone, so comparing
    ``h`` with the result gives the same spikes; found by bisection over the floating-point numbers.
    """
    threshold, offset = torch.broadcast_tensors(threshold.detach(), offset.detach())
    dtype = threshold.dtype
    integer = torch.int32 if dtype == torch.float32 else torch.int64
    top = torch.full_like(threshold, torch.finfo(dtype).max).view(integer)

    def number(key: Tensor) -> Tensor:
        # Keys count the numbers up from -max: negative ones are those below zero.
        return torch.where(key < 0, -((-key).view(dtype)), key.clamp(min=0).view(dtype))

    low, high = -top, top.clone()
    for _ in range(8 * dtype.itemsize):
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        fires = number(middle) + offset >= threshold
        low, high = torch.where(fires, low, middle + 1), torch.where(fires, middle, high)
    return number(high).contiguous()
