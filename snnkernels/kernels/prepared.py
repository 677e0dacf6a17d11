"""Plain calls that came before: arguments checked once, parameters packed once, addresses new.

What a small layer waits for is Python, and between two calls of one layer only addresses differ. A
call is plain when its threshold is a number, its membrane a number or what the last call left, and
everything else as by default.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor

from . import arguments, backends, operands, packing, params, plan, reference
from .backends import Kernels
from .params import DTYPE_CODES
from .spec import Neuron

# The first fields of the structs, which are addresses; what follows them stays.
_ADDRESS, _FORWARD_ADDRESSES, _BACKWARD_ADDRESSES = 8, 7, 12
_FORWARD = struct.Struct(f"@{_FORWARD_ADDRESSES}Q").pack
_BACKWARD = struct.Struct(f"@{_BACKWARD_ADDRESSES}Q").pack
_NUMBERS = (float, int, str)
# Shapes that are remembered; more than a network has layers.
_MOST = 1024


# Of a surrogate the kind, alpha and scale, and detach_reset.
How = tuple[int, float, float, bool]


class Prepared(NamedTuple):
    """What is known of a plain call before its addresses are."""

    neuron: Neuron
    kernels: Kernels
    device: torch.device
    shape: Size
    steps: int
    dtype: torch.dtype
    state: torch.dtype
    align: int  # of every address
    lead: int  # rows of scratch that the backward pass needs
    v_fields: tuple[int, int, int, float]  # of the operand v_init, its address left out
    forward_rest: bytes
    backward_rest: dict[How, bytes]

    def forward(
        self, x: Tensor, v_init: Tensor | None = None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Spikes (in ``out``, if it is given and :meth:`fits`) and final membranes of ``x``."""
        spikes = torch.empty_like(x) if out is None else out
        v = x.new_empty(self.shape, dtype=self.state)
        start = 0 if v_init is None else v_init.data_ptr()
        addresses = _FORWARD(x.data_ptr(), spikes.data_ptr(), 0, 0, 0, v.data_ptr(), start)
        self.kernels.forward(addresses + self.forward_rest, self.device)
        return spikes, v

    def serves(
        self,
        x: Tensor,
        v_init: Tensor | None,
        grad_spikes: Tensor | None,
        grad_v: Tensor | None,
    ) -> bool:
        """Whether the backward kernel can read all of them where they are."""
        return (
            backends.chosen(self.device) is self.kernels
            and (grad_spikes is None or self.fits(grad_spikes, self.dtype))
            and (grad_v is None or self.fits(grad_v, self.state))
            and (v_init is None or self.fits(v_init, self.state))
            and x.is_contiguous()
            and not x.data_ptr() % self.align
        )

    def fits(self, array: Tensor, dtype: torch.dtype) -> bool:
        """Whether kernels can walk ``array``, of a shape that is right, where it is."""
        return (
            type(array) is Tensor
            and array.dtype is dtype
            and array.is_contiguous()
            and not array.data_ptr() % self.align
        )

    def backward(
        self,
        x: Tensor,
        v_init: Tensor | None,
        grad_spikes: Tensor | None,
        grad_v: Tensor | None,
        how: How,
    ) -> Tensor:
        """The gradient for ``x``; the scale of ``how`` is 1."""
        rest = self.backward_rest.get(how)
        if rest is None:
            surrogate, alpha, _, detach_reset = how
            rest = self._packed_backward(surrogate, alpha, detach_reset)
            self.backward_rest[how] = rest
        grad_x = torch.empty_like(x)
        scratch = x.new_empty((self.lead, *self.shape), dtype=self.state) if self.lead else None
        addresses = _BACKWARD(
            x.data_ptr(),
            0,
            0,
            0,
            0 if grad_spikes is None else grad_spikes.data_ptr(),
            0 if grad_v is None else grad_v.data_ptr(),
            grad_x.data_ptr(),
            0,
            0,
            0,
            0 if scratch is None else scratch.data_ptr(),
            0 if v_init is None else v_init.data_ptr(),
        )
        self.kernels.backward(addresses + rest, self.device)
        return grad_x

    def _packed_backward(self, surrogate: int, alpha: float, detach_reset: bool) -> bytes:
        """The parameters of the backward kernel behind the addresses."""
        N, neuron = self.shape.numel(), self.neuron
        packed = params.pack_backward(
            *(0,) * (_BACKWARD_ADDRESSES - 1),
            *self.v_fields,
            *packing.number(neuron.threshold_value),
            *packing.number(1.0),
            self.steps,
            N,
            N,
            *(N, N) * 4,
            alpha,
            1.0,
            DTYPE_CODES[self.dtype],
            reference.word_dtype(self.steps).itemsize,
            params.DETACH_RESET if detach_reset else 0,
            surrogate,
            plan.dense(self.state.itemsize, N) if self.kernels.gpu else 1,
            0,
        )
        return packed[_ADDRESS * _BACKWARD_ADDRESSES :]


def find(x: Tensor, v: Any, v_threshold: Any) -> Prepared | None:
    """What is prepared for a plain call, or None if ``x`` or the operands are not plain.

    Raises what :mod:`.arguments` raises, for the operands.
    """
    kind = type(v)
    carried = kind is Tensor
    if (not carried and kind not in _NUMBERS) or type(v_threshold) not in _NUMBERS:
        return None
    if not x.is_contiguous():
        return None
    device, shape = x.device, x.shape
    kernels = backends.chosen(device)
    if kernels is None:
        return None
    # Zeros of both signs are equal, their bits are not; 1 and 1.0 give the same numbers.
    start = _CARRIED if carried else v or repr(v)
    key = (shape, x.dtype, device, kernels, start, v_threshold)
    found = _prepared.get(key)
    if found is None:
        found = _prepare(x, device, kernels, 0.0 if carried else v, v_threshold, carried)
        if found is None:
            return None
        if len(_prepared) >= _MOST:
            _prepared.clear()
        _prepared[key] = found
    if carried and not (
        v.shape == found.shape
        and v.device == device
        and found.fits(v, found.state)
        and not (v.requires_grad and torch.is_grad_enabled())
    ):
        return None
    return None if x.data_ptr() % found.align else found


# In a key: the membrane that another call left.
_CARRIED = object()
_prepared: dict[tuple[Any, ...], Prepared] = {}


def _prepare(
    x: Tensor, device: torch.device, kernels: Kernels, v: Any, v_threshold: Any, carried: bool
) -> Prepared | None:
    steps, shape = arguments.steps_and_shape(x, None)
    neuron = arguments.neuron(
        x, steps, shape, v, v_threshold, None, None, None, None, ">=", None, arguments.NO_OPTIONS
    )
    N, dtype = shape.numel(), x.dtype
    if not N or not steps:
        return None
    state = reference.state_dtype(dtype)
    vec = plan.dense(dtype.itemsize, N) if kernels.gpu else 1
    v_fields = (0, 1, N, 0.0) if carried else packing.number(neuron.v_value)
    packed = params.pack_forward(
        *(0,) * (_FORWARD_ADDRESSES - 1),
        *v_fields,
        *packing.number(neuron.threshold_value),
        *packing.NONE,
        steps,
        N,
        N,
        *(N, N) * 2,
        1.0,
        operands.bits(1.0, dtype),
        DTYPE_CODES[dtype],
        dtype.itemsize,
        reference.word_dtype(steps).itemsize,
        vec,
    )
    lead = (steps - 1) // params.CHUNK if kernels.gpu else 0
    align = plan.ALIGNED if kernels.gpu else dtype.itemsize
    rest = packed[_ADDRESS * _FORWARD_ADDRESSES :]
    return Prepared(
        neuron, kernels, device, shape, steps, dtype, state, align, lead, v_fields, rest, {}
    )
