"""The sub-threshold membrane of a leaky neuron over many steps: a linear scan."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["lif_scan"]


def lif_scan(
    x: Tensor, beta: float | Tensor, v_init: float | Tensor = 0.0, *, chunk: int | None = None
) -> Tensor:
    """``v[t] = beta * v[t-1] + x[t]``, all t: leaky charge without threshold and reset.

    The recurrence is linear, so it need not go step by step: chunks of steps are products with
    the triangle of powers ``beta ** (i - j)``, the ends of the chunks are a scan of their own with
    ``beta ** chunk``. Cost and memory are linear in T, and the number of launches falls from T to
    its logarithm. Membranes that fire are not linear: see :func:`lif_multi_step`.

    Idea: time-parallel linear recurrences, as in S-MNN (ICLR 2025, arXiv 2410.06074); the threshold
    itself is not parallel in time.

    Args:
        x: currents ``[T, *shape]``, floating point, T >= 1; 16-bit ones are computed in float32
            and rounded once.
        beta: leak in [-1, 1], a number or a scalar tensor, the same at every step.
        v_init: the membrane before the first step: a number, or a tensor that broadcasts to
            ``[*shape]``.
        chunk: steps a chunk; 1 is the plain loop. None: chunks for many steps of few neurons, the
            loop for the rest.

    Returns:
        Membranes ``[T, *shape]`` in the dtype of ``x``. Differentiable, any number of times, in
        ``x``, ``beta`` and ``v_init``. The plain loop's up to rounding, which differs from chunk to
        chunk.

    Raises:
        TypeError: x is not a floating-point tensor, or beta is no number: a recurrence that depends
            on the membrane (a threshold, a reset) is not linear.
        ValueError: no steps; beta outside [-1, 1] or not a scalar; chunk < 1.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating-point tensor [T, *shape], got {got}")
    if x.dim() == 0 or len(x) == 0:
        raise ValueError(f"x must be [T, *shape] with at least one step, got {tuple(x.shape)}")
    state = torch.promote_types(x.dtype, torch.float32)
    leak = _leak(beta, state, x.device)
    chunk = _faster(x) if chunk is None else chunk
    if type(chunk) is not int or chunk < 1:
        raise ValueError(f"chunk={chunk!r} must be a whole number of at least 1")
    start = torch.as_tensor(v_init, dtype=state, device=x.device)
    shape = x.shape[1:]
    pairs = zip(reversed(start.shape), reversed(shape), strict=False)
    if start.dim() > len(shape) or any(a not in (1, b) for a, b in pairs):
        raise ValueError(
            f"v_init has shape {tuple(start.shape)}, which does not broadcast to the neurons' "
            f"{tuple(shape)}"
        )
    wide = x.to(state)
    if chunk == 1:
        return _loop(wide, leak, start.expand(shape)).to(x.dtype)
    if x.numel() == 0:
        return x.clone()
    rows = wide.reshape(len(x), math.prod(shape))
    return _scan(rows, leak, start.expand(shape).reshape(-1), chunk).view_as(x).to(x.dtype)


def _leak(beta: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    if isinstance(beta, bool) or not isinstance(beta, (int, float, Tensor)):
        raise TypeError(
            f"beta must be a number or a scalar tensor, got {type(beta).__name__}; a leak that "
            "depends on the membrane is not linear"
        )
    if isinstance(beta, Tensor) and (beta.numel() != 1 or not beta.is_floating_point()):
        raise ValueError(
            f"beta must be one floating-point number for all steps and neurons, got "
            f"{tuple(beta.shape)}, {beta.dtype}"
        )
    value = float(beta.detach()) if isinstance(beta, Tensor) else float(beta)
    if not -1 <= value <= 1:  # NaN too
        raise ValueError(f"beta={value:g} must lie in [-1, 1]: otherwise membranes grow for ever")
    if isinstance(beta, Tensor):
        return beta.reshape(()).to(device, dtype)
    return torch.tensor(value, dtype=dtype, device=device)


def _loop(x: Tensor, beta: Tensor, v: Tensor) -> Tensor:
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, beta, v))):
        into = torch.empty_like(x)
        for step, row in zip(x.unbind(0), into.unbind(0), strict=True):
            v = torch.addcmul(step, beta, v, out=row)
        return into
    out = []
    for step in x.unbind(0):
        v = torch.addcmul(step, beta, v)
        out.append(v)
    return torch.stack(out)


def _scan(x: Tensor, beta: Tensor, v: Tensor, chunk: int) -> Tensor:
    """``x`` ``[T, N]``, ``v`` ``[N]``."""
    T, N = x.shape
    if chunk >= T:
        triangle, powers = _powers(beta, T)
        return torch.addr(triangle @ x, powers, v)
    whole = T // chunk * chunk
    triangle, powers = _powers(beta, chunk)
    parts = triangle @ x[:whole].view(-1, chunk, N)  # each chunk from 0
    # The membrane at the end of each chunk: the same recurrence over chunks.
    ends = _scan(parts[:, -1], powers[-1], v, chunk)
    before = torch.cat([v[None], ends[:-1]])
    out = (parts + powers[:, None] * before[:, None]).view(whole, N)
    if whole == T:
        return out
    return torch.cat([out, _scan(x[whole:], beta, ends[-1], chunk)])


def _powers(beta: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """``[n, n]`` of ``beta ** (i - j)`` for i >= j, else 0; and ``beta ** 1 .. n``."""
    at = torch.arange(n, device=beta.device)
    apart = at[:, None] - at
    triangle = torch.where(apart >= 0, beta ** apart.clamp(min=0), beta.new_zeros(()))
    return triangle, beta ** (at + 1)


def _faster(x: Tensor) -> int:
    """The chunk, or 1: what benchmarks/bench_scan.py compares, with and without gradients.

    The triangle costs ``chunk`` multiplications a value where the loop has one, so many neurons
    are the loop's, whose launches they fill.
    """
    steps, neurons = len(x), math.prod(x.shape[1:])
    if steps >= 256 and neurons <= 1024:
        return 16
    return 64 if steps >= 64 and neurons <= 256 else 1
