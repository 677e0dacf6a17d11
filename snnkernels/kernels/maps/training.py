"""Running QCFS and the gradient of DSR."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from .. import maps_reference as reference
from .. import operands
from ..maps_reference import state_dtype
from ..params import DTYPE_CODES
from .launching import Shared, dense, filled, kernels_for, launch, operator, pointer
from .sums import summed_to

# ---- qcfs --------------------------------------------------------------------------------------


@operator(
    "qcfs(Tensor x, Tensor? threshold, float value, int levels, float phase) -> Tensor",
    lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format),
)
def qcfs(x: Tensor, threshold: Tensor | None, value: float, levels: int, phase: float) -> Tensor:
    """:func:`snnkernels.maps.qcfs` without gradients."""
    kernels = kernels_for(x.device)
    if kernels is None:
        y = reference.qcfs(x, filled(x, threshold, value, x.dtype), levels, phase)
        return y.contiguous()
    x = dense(x)
    shared = _rounded(x, threshold, value)
    out = torch.empty_like(x)
    if x.numel():
        launch(
            kernels, "qcfs", x.device, x=x.data_ptr(), out=out.data_ptr(), threshold=shared.packed,
            N=x.numel(), levels=levels, phase=phase, dtype=DTYPE_CODES[x.dtype],
        )  # fmt: skip
    return out


def _rounded(x: Tensor, threshold: Tensor | None, value: float) -> Shared:
    """A threshold rounded to the dtype of x first, as QCFS does."""
    if threshold is not None:
        threshold = threshold.detach().to(x.dtype)
    return Shared(threshold, operands.rounded(value, x.dtype), x.shape, state_dtype(x.dtype))


@operator(
    "qcfs_backward(Tensor x, Tensor grad, Tensor? threshold, float value, int levels, float phase, "
    "bool clip_first, bool shared) -> (Tensor grad_x, Tensor grad_threshold)",
    lambda x, grad, threshold, value, levels, phase, clip_first, shared: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(threshold, memory_format=torch.contiguous_format)
        if shared
        else x.new_empty(0),
    ),
)
def qcfs_backward(
    x: Tensor,
    grad: Tensor,
    threshold: Tensor | None,
    value: float,
    levels: int,
    phase: float,
    clip_first: bool,
    shared: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients for x and, if ``shared``, for the threshold (else empty)."""
    kernels = kernels_for(x.device)
    x, grad = dense(x), dense(grad.to(x.dtype))
    if kernels is None:
        every = filled(x, threshold, value, x.dtype)
        out, shares = reference.qcfs_backward(x, grad, every, levels, phase, clip_first)
    else:
        th = _rounded(x, threshold, value)
        out = torch.empty_like(x)
        shares = x.new_empty(x.shape if shared else (0,), dtype=state_dtype(x.dtype))
        if x.numel():
            launch(
                kernels, "qcfs_backward", x.device, x=x.data_ptr(), grad=grad.data_ptr(),
                out=out.data_ptr(), grad_threshold=pointer(shares if shared else None),
                threshold=th.packed, N=x.numel(), levels=levels, phase=phase,
                dtype=DTYPE_CODES[x.dtype], clip_first=clip_first,
            )  # fmt: skip
    if not shared or threshold is None:
        return out, x.new_empty(0)
    return out, summed_to(shares, threshold)


# ---- dsr ---------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _weights(T: int, tau: float, dt: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What each step weighs, sum 1: computed in float64 and rounded once."""
    each = [math.exp(-(T - t) * dt / tau) for t in range(1, T + 1)]
    whole = math.fsum(each)
    return torch.tensor([w / whole for w in each], dtype=torch.float64).to(dtype).to(device)


@operator(
    "dsr_backward(Tensor x, Tensor grad, Tensor? threshold, float value, bool lif, float tau, "
    "float dt) -> (Tensor grad_x, Tensor grad_threshold)",
    lambda x, grad, threshold, value, lif, tau, dt: (
        x.new_empty(x.shape[1:]),
        x.new_empty(()) if threshold is None else torch.empty_like(threshold),
    ),
)
def dsr_backward(
    x: Tensor,
    grad: Tensor,
    threshold: Tensor | None,
    value: float,
    lif: bool,
    tau: float,
    dt: float,
) -> tuple[Tensor, Tensor]:
    """The gradient of x (one step's, ``[*shape]``) and of the threshold."""
    kernels = kernels_for(x.device)
    x, grad = dense(x), dense(grad.to(x.dtype))
    state, T, shape = state_dtype(x.dtype), x.shape[0], x.shape[1:]
    weights = _weights(T, tau, dt, state, x.device) if lif else None
    divisor = tau * T if lif else float(T)
    if kernels is None:
        every = filled(x, threshold, value, state)
        # Scalars rounded as the kernels round theirs.
        tau_, dt_, divisor_ = (operands.rounded(v, state) for v in (tau, dt, divisor))
        grad_x, shares = reference.dsr_backward(x, grad, every, weights, tau_, dt_, divisor_)
    else:
        th = Shared(threshold, value, shape, state)
        grad_x, shares = x.new_empty(shape), x.new_empty(shape, dtype=state)
        if grad_x.numel():
            launch(
                kernels, "dsr_backward", x.device, x=x.data_ptr(), grad=grad.data_ptr(),
                weights=pointer(weights), grad_x=grad_x.data_ptr(),
                grad_threshold=shares.data_ptr(), threshold=th.packed, N=grad_x.numel(), T=T,
                tau=tau, dt=dt, divisor=divisor, dtype=DTYPE_CODES[x.dtype],
            )  # fmt: skip
    like = x.new_empty(()) if threshold is None else threshold.detach()
    total = summed_to(shares, like.double())
    return grad_x, (dt * total if lif else total).to(like.dtype)
