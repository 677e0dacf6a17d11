"""Sinabs' leaky neurons on our kernels: when the numbers are the same, and the call.

Sinabs computes, one rounded operation after the other: ``m = alpha * v + current`` (with
``norm_input`` a current of ``(1 - alpha) * x``), ``trunc(m / threshold)`` spikes where m is
positive, or one where ``m - threshold >= 0``, ``v = m - spikes * threshold``, and with
``min_v_mem`` ``relu(v - min) + min``. These are our numbers for finite float32 currents, and for
float16 and bfloat16 ones of IAF, which Sinabs widens. What differs: Sinabs' silent neurons emit
-0.0 where the membrane is negative, ours 0.0; more than 2**24 spikes in one step; NaN and
infinities.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import surrogate as _surrogate
from .. import surrogate_foreign
from ..kernels import call
from ..kernels.arguments import MOST_SPIKES, NO_OPTIONS, Options
from ..kernels.spec import SPIKES
from .adapters import Refused
from .checks import PLAIN, WITH_V_SEQ, positive, refuse_transforms, say

__all__ = ["OWN", "check", "forward", "lif_forward"]

_HALVES = (torch.float16, torch.bfloat16)
OWN = "a Sinabs neuron runs Sinabs' own code"


def _number(threshold: Any) -> float | None:
    """The one number in a threshold, None where there are several."""
    if not isinstance(threshold, Tensor):
        return float(threshold)
    held = threshold.detach().reshape(-1)
    return float(held[0]) if held.numel() and bool((held == held[0]).all()) else None


def _least(min_v_mem: Any) -> float | None:
    number = None if min_v_mem is None else _number(min_v_mem)
    if min_v_mem is not None and (number is None or not math.isfinite(number)):
        raise Refused("min_v_mem is not one finite number")
    return number


def check(module: Any, look: bool = True) -> None:
    """Checks that a neuron of Sinabs has the same numbers.

    Args:
        module: the neuron.
        look: also at numbers, for which a GPU has to be waited for.

    Raises:
        Refused: they would not be the same, with the reason.
    """
    _check(
        module.tau_syn if not module.train_alphas else module.alpha_syn,
        module.spike_threshold,
        module.spike_fn,
        module.reset_fn,
        module.surrogate_grad_fn,
        module.min_v_mem,
        look,
    )


def _check(
    alpha_syn: Any,
    threshold: Any,
    spike_fn: Any,
    reset_fn: Any,
    surrogate_grad_fn: Any,
    min_v_mem: Any,
    look: bool,
) -> None:
    if alpha_syn is not None:
        raise Refused("it has a synaptic current (tau_syn)")
    if min_v_mem is not None:
        if isinstance(min_v_mem, Tensor) and min_v_mem.requires_grad:
            raise Refused("its min_v_mem is learned")
        if look:
            _least(min_v_mem)
    if threshold is None or spike_fn is None:
        raise Refused("it gives membranes, not spikes (no spike_fn)")
    if isinstance(threshold, Tensor):
        if threshold.requires_grad:
            raise Refused(
                "its threshold is learned, and Sinabs' gradient leaves the spikes out of it"
            )
        if (look or not threshold.is_cuda) and not positive(threshold):
            raise Refused("a threshold is not positive and finite")
    elif not 0 < threshold < math.inf:
        raise Refused("a threshold is not positive and finite")
    most_spikes(spike_fn)
    resets(reset_fn)
    if look:
        surrogate_of(surrogate_grad_fn, threshold)


def most_spikes(spike_fn: Any) -> int | None:
    """``max_spikes`` of a spike function, None for one spike.

    Raises:
        Refused: a function that is not Sinabs'.
    """
    cls = spike_fn if isinstance(spike_fn, type) else type(spike_fn)
    if cls.__module__.startswith("sinabs."):
        if cls.__name__ == "SingleSpike":
            return None
        if cls.__name__ == "MultiSpike":
            return MOST_SPIKES
        if cls.__name__ == "MaxSpike" and not isinstance(spike_fn, type):
            most = spike_fn.max_num_spikes_per_bin
            if most is None:
                return MOST_SPIKES
            if isinstance(most, int) and 1 <= most <= MOST_SPIKES:
                return most
            raise Refused(f"max_num_spikes_per_bin={most!r} is not a number of spikes we know")
    raise Refused(f"its spike_fn {cls.__name__} is not one of MultiSpike, MaxSpike, SingleSpike")


def resets(reset_fn: Any) -> float | None:
    """``v_reset`` of a reset function.

    Raises:
        Refused: where ours differ.
    """
    cls = type(reset_fn)
    if cls.__module__.startswith("sinabs."):
        if cls.__name__ == "MembraneSubtract":
            if reset_fn.subtract_value is None:
                return None
            raise Refused("subtract_value: it subtracts something other than its threshold")
        if cls.__name__ == "MembraneReset":
            if reset_fn.reset_value == 0:
                return 0.0
            raise Refused(
                f"reset_value={reset_fn.reset_value}: Sinabs adds it to the neurons that did not "
                "fire as well"
            )
    raise Refused(f"its reset_fn {cls.__name__} is not MembraneSubtract or MembraneReset")


def surrogate_of(theirs: Any, threshold: Any) -> _surrogate.Surrogate:
    """Ours with the same derivative.

    Raises:
        Refused: there is none.
    """
    number = _number(threshold)
    name = type(theirs).__name__
    if name == "SingleExponential" and number is None:
        raise Refused("its thresholds differ, and with them the width of its SingleExponential")
    try:
        found = surrogate_foreign.of_sinabs(theirs, number)
    except (TypeError, ValueError, AttributeError) as error:
        raise Refused(f"its surrogate {theirs!r}: {error}") from None
    if found is None:
        raise Refused(
            f"its surrogate {theirs!r} is not one of our kernels' (SingleExponential, "
            "PeriodicExponential, Gaussian around 0)"
        )
    return found


def _check_call(x: Any, v: Any, shape: Any, leaks: bool) -> None:
    """What only a call can tell."""
    if type(x) not in PLAIN or type(v) not in PLAIN:
        raise Refused("the current is no plain tensor")
    if x.dtype in _HALVES:
        if leaks:
            raise Refused(f"with {x.dtype} currents a leaky neuron rounds to {x.dtype} on the way")
    elif x.dtype != torch.float32:
        raise Refused(f"currents are {x.dtype}, ours are float32, float16 or bfloat16")
    if v.dtype != torch.float32 or v.shape != shape or v.device != x.device:
        raise Refused(f"the membrane is {v.dtype} {tuple(v.shape)} on {v.device}")
    refuse_transforms()


def forward(
    x: Tensor,
    v: Tensor,
    threshold: Any,
    spike_fn: Any,
    reset_fn: Any,
    surrogate_grad_fn: Any,
    min_v_mem: Any,
    alpha: Tensor | None,
    norm_input: bool,
    record: bool,
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """All steps of ``[B, T, *]``: spikes, the last membrane, and all of them if asked.

    None, and a warning the first time, where Sinabs' own code must run.
    """
    if x.dim() < 2 or not x.shape[1]:
        return None
    shape = (x.shape[0], *x.shape[2:])
    surrogate = None
    leaves = (x, v) if alpha is None else (x, v, alpha)
    try:
        _check_call(x, v, shape, alpha is not None)
        v_min = _least(min_v_mem)  # it may have been changed since it was looked at
        if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves):
            surrogate = surrogate_of(surrogate_grad_fn, threshold)
    except Refused as refused:
        say(refused, OWN)
        return None
    v_reset, most = resets(reset_fn), most_spikes(spike_fn)
    scale = None
    more = NO_OPTIONS
    if alpha is not None or most is not None or v_min is not None:
        more = Options(beta=alpha, max_spikes=most, v_min=v_min)
    if alpha is not None and norm_input:
        scale = 1 - alpha
    held = threshold.detach() if isinstance(threshold, Tensor) else threshold
    result = call.run(
        x.float(), WITH_V_SEQ if record else SPIKES, v, held, v_reset, surrogate,
        # MembraneReset asks where there is no spike: no gradient passes through that.
        v_reset is not None, None, None, None, scale, ">=", None, False, None, "recompute", "N,T",
        more,
    )  # fmt: skip
    return result[0], result[4], result[5] if record else None


def lif_forward(theirs: Any) -> Any:
    """``sinabs.layers.functional.lif_forward`` on our kernels, where the numbers are the same."""

    def ours(
        input_data: Tensor,
        alpha_mem: Any,
        alpha_syn: Any,
        state: dict[str, Any],
        spike_threshold: Any,
        spike_fn: Any,
        reset_fn: Any,
        surrogate_grad_fn: Any,
        min_v_mem: Any,
        norm_input: bool,
        record_states: bool = False,
    ) -> Any:
        try:
            _check(
                alpha_syn, spike_threshold, spike_fn, reset_fn, surrogate_grad_fn, min_v_mem, False
            )
        except Refused as refused:
            say(refused, OWN)
            found = None
        else:
            # IAF has an alpha of 1 on the CPU.
            fixed = isinstance(alpha_mem, Tensor) and not alpha_mem.requires_grad
            one = fixed and alpha_mem.dim() == 0 and not alpha_mem.is_cuda and alpha_mem == 1
            leaks = norm_input or not one
            found = set(state) == {"v_mem"} and forward(
                input_data, state["v_mem"], spike_threshold, spike_fn, reset_fn,
                surrogate_grad_fn, min_v_mem, alpha_mem if leaks else None, norm_input,
                record_states,
            )  # fmt: skip
        if found:
            spikes, v, v_seq = found
            record = {"v_mem": v_seq} if record_states else {}
            return spikes, {"v_mem": v, "i_syn": input_data[:, -1]}, record
        return theirs(
            input_data=input_data, alpha_mem=alpha_mem, alpha_syn=alpha_syn, state=state,
            spike_threshold=spike_threshold, spike_fn=spike_fn, reset_fn=reset_fn,
            surrogate_grad_fn=surrogate_grad_fn, min_v_mem=min_v_mem, norm_input=norm_input,
            record_states=record_states,
        )  # fmt: skip

    return ours
