"""Norse's integrate-and-fire on our kernels: when the numbers are the same, and the call.

Norse computes ``m = v + x``, a spike where ``m - v_th > 0``, then ``v = (1 - z) m + z v_reset``:
our bits for finite float32 and float64 currents (a -0.0 that its sum turns into 0.0 stays -0.0 in
ours). Of float16 currents Norse keeps the membranes in float16, which ours do not.
"""

from __future__ import annotations

import math
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .. import surrogate as _surrogate
from .. import surrogate_foreign
from ..kernels import call
from ..kernels.spec import SPIKES
from .adapters import Refused
from .checks import PLAIN, WITH_V_SEQ, positive, refuse_transforms, say

__all__ = ["check_parameters", "feed_forward_step", "forward", "surrogate_of"]

_OWN = "a Norse neuron runs Norse's own code"


@lru_cache(maxsize=64)
def surrogate_of(method: str, alpha: float) -> _surrogate.Surrogate:
    """Ours with the derivative that Norse's ``threshold(u, method, alpha)`` has.

    Its releases differ: 1.1.0 leaves alpha out of ``"super"``. So it is asked.

    Raises:
        Refused: there is none.
    """
    candidates = [found] if (found := surrogate_foreign.of_norse(method, alpha)) else []
    if method == "super":
        candidates.append(_surrogate.SuperSpike(1.0))
    u = torch.linspace(-2, 2, 101, dtype=torch.float64, requires_grad=True)
    module = import_module("norse.torch.functional.threshold")
    for ours in candidates:
        with torch.enable_grad():
            fired = module.threshold(u, method, torch.as_tensor(alpha))
            (slope,) = torch.autograd.grad(fired.sum(), u)
        if torch.allclose(slope, ours.derivative(u.detach()), rtol=1e-5, atol=1e-9):
            return ours
    raise Refused(f"its surrogate {method!r} (alpha={alpha}) is not one of our kernels'")


def _number(value: Any) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)


def check_parameters(p: Any) -> None:
    """Checks that neurons with these parameters have the same numbers.

    Raises:
        Refused: they would not, with the reason.
    """
    for name in ("v_th", "v_reset"):
        value = getattr(p, name)
        if not isinstance(value, (Tensor, float, int)):
            raise Refused(f"{name}={value!r} is not a tensor or a number")
    reset, threshold = torch.as_tensor(p.v_reset).detach(), torch.as_tensor(p.v_th).detach()
    if reset.numel() != 1 or not math.isfinite(float(reset)):
        raise Refused("v_reset is not one finite number")
    if not positive(threshold):
        raise Refused("a threshold is not positive and finite")
    surrogate_of(p.method, _number(p.alpha))


def forward(x: Any, v: Any, p: Any, record: bool) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """All steps of ``x`` ``[T, *shape]``: spikes, the last membrane, and all of them if asked.

    ``v`` is what Norse's state holds. None, and a warning the first time, where Norse's own code
    must run.
    """
    try:
        check_parameters(p)
        _check_call(x, v)
    except Refused as refused:
        say(refused, _OWN)
        return None
    # Norse asks for a gradient of the value that resets, which all start from as well.
    reset = p.v_reset if isinstance(p.v_reset, Tensor) and p.v_reset.requires_grad else None
    taps: list[Tensor] = []
    if reset is not None and torch.is_grad_enabled():
        x = _Before.apply(x, reset, taps)
    else:
        reset = None
    result = call.run(
        x, WITH_V_SEQ if record else SPIKES, v, p.v_th, _number(p.v_reset),
        surrogate_of(p.method, _number(p.alpha)), False, None, None, None, None, ">", None, False,
        None,
    )  # fmt: skip
    spikes, last, v_seq = result[0], result[4], result[5] if record else None
    if reset is not None:
        fired = spikes.detach()
        taps.append(fired)
        last = _After.apply(last, reset, fired[-1])
        if v_seq is not None:
            v_seq = _After.apply(v_seq, reset, fired)
    return spikes, last, v_seq


class _Before(torch.autograd.Function):
    """The current as it is, and a gradient for what membranes of the step before were reset to.

    A change of that moves the next charge as the current does.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, reset: Tensor, taps: list[Tensor]) -> Tensor:
        ctx.taps, ctx.like = taps, reset.detach()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (fired,) = ctx.taps
        return grad, _of_reset(grad[1:] * fired[:-1], ctx.like), None


class _After(torch.autograd.Function):
    """Membranes as they are, and their gradient for what they were reset to."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, reset: Tensor, fired: Tensor) -> Tensor:
        ctx.save_for_backward(fired)
        ctx.like = reset.detach()
        return v.view_as(v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (fired,) = ctx.saved_tensors
        return grad, _of_reset(grad * fired, ctx.like), None


def _of_reset(grad: Tensor, like: Tensor) -> Tensor:
    return grad.sum().to(like.dtype).reshape(like.shape)


def _check_call(x: Any, v: Any) -> None:
    if type(x) not in PLAIN or type(v) not in PLAIN or x.layout != torch.strided:
        raise Refused("the current is no plain tensor")
    if not x.dim() or not x.shape[0]:
        raise Refused("there are no steps")
    if x.dtype not in (torch.float32, torch.float64):
        raise Refused(
            f"Norse keeps the membranes of {x.dtype} currents in {x.dtype}, ours are float32"
        )
    if v.dim() and (v.shape != x.shape[1:] or v.dtype != x.dtype or v.device != x.device):
        raise Refused(f"the membrane is {v.dtype} {tuple(v.shape)} on {v.device}")
    refuse_transforms()


def feed_forward_step(theirs: Any) -> Any:
    """``iaf_feed_forward_step`` on our kernels, where the numbers are the same."""

    def ours(input_spikes: Any, state: Any, p: Any = None, dt: float = 0.001) -> Any:
        module = import_module("norse.torch.functional.iaf")
        if p is None:
            p = module.IAFParameters()
        x = input_spikes.unsqueeze(0) if isinstance(input_spikes, Tensor) else input_spikes
        found = forward(x, state.v, p, False)
        if found is None:
            return theirs(input_spikes, state, p, dt)
        return found[0][0], module.IAFFeedForwardState(v=found[1])

    return ours
