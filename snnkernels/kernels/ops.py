"""The two torch operators: schemas, fakes, registration.

``torch.ops.snnkernels.if_forward`` and ``if_backward`` wrap :mod:`.run` for torch.compile, export
and tensor subclasses; eager calls go to :mod:`.run` directly. The neuron's fields travel one by
one in the order of :class:`.run.Neuron`. Outputs not asked for are empty tensors: the arity is
fixed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference, run
from .run import Gradients, Grads, Neuron

_NEURON = (
    "Tensor? v, float v_value, Tensor? threshold, float threshold_value, Tensor? amplitude, "
    "float amplitude_value, Tensor? input_scale, float? v_reset, bool strict, "
    "ScalarType spike_dtype"
)
_FIELDS = len(Neuron._fields)

# Kept for the life of the process: its end would unregister the operators.
_LIBRARY = torch.library.Library("snnkernels", "DEF")
_LIBRARY.define(
    f"if_forward(Tensor x, int? T, {_NEURON}, bool spikes, bool count, bool v_seq, "
    "bool charge_seq, int smooth, float alpha) "
    "-> (Tensor spikes, Tensor count, Tensor v, Tensor v_seq, Tensor charge_seq)"
)
_LIBRARY.define(
    f"if_backward(Tensor x, int? T, {_NEURON}, Tensor? grad_spikes, bool rate, Tensor? grad_v, "
    "Tensor? grad_v_seq, Tensor? grad_charge_seq, int surrogate, float alpha, bool detach_reset, "
    "bool smooth, bool[5] needs) -> (Tensor grad_x, Tensor grad_v_init, Tensor grad_threshold, "
    "Tensor grad_amplitude, Tensor grad_input_scale)"
)


def _if_forward(x: Tensor, T: int | None, *rest: Any) -> tuple[Tensor, ...]:
    neuron, asked = Neuron(*rest[:_FIELDS]), rest[_FIELDS:]
    spikes, count, v, v_seq, charge_seq = run.if_forward(x, T, neuron, *asked)
    return (
        v.new_empty(0) if spikes is None else spikes,
        v.new_empty(0, dtype=torch.int32) if count is None else count,
        v,
        v.new_empty(0) if v_seq is None else v_seq,
        v.new_empty(0) if charge_seq is None else charge_seq,
    )


def _if_backward(x: Tensor, T: int | None, *rest: Any) -> Gradients:
    neuron, rest = Neuron(*rest[:_FIELDS]), rest[_FIELDS:]
    grads, how = Grads(*rest[: len(Grads._fields)]), rest[len(Grads._fields) :]
    found = run.if_backward(x, T, neuron, grads, *how)
    return tuple(g.contiguous() for g in found)  # type: ignore[return-value]


for _name, _run in (("if_forward", _if_forward), ("if_backward", _if_backward)):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    # Gradients come from the autograd.Function around the operator. Falling through makes a call
    # that bypasses it fail loudly in backward instead of giving no gradient.
    _LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("snnkernels::if_forward")
def _if_forward_fake(x: Tensor, T: int | None, *rest: Any) -> tuple[Tensor, ...]:
    neuron, (spikes, count, v_seq, charge_seq, *_) = Neuron(*rest[:_FIELDS]), rest[_FIELDS:]
    shape = x.shape[1:] if T is None else x.shape
    full = (x.shape[0] if T is None else T, *shape)
    state = reference.state_dtype(x.dtype)
    return (
        x.new_empty(full if spikes else (0,), dtype=neuron.spike_dtype if spikes else state),
        x.new_empty(shape if count else (0,), dtype=torch.int32),
        x.new_empty(shape, dtype=state),
        x.new_empty(full if v_seq else (0,), dtype=state),
        x.new_empty(full if charge_seq else (0,), dtype=state),
    )


@torch.library.register_fake("snnkernels::if_backward")
def _if_backward_fake(x: Tensor, T: int | None, *rest: Any) -> tuple[Tensor, ...]:
    likes, needs = (x, *Neuron(*rest[:_FIELDS]).tensors), rest[-1]
    return tuple(
        x.new_empty(like.shape, dtype=like.dtype) if need and like is not None else x.new_empty(0)
        for like, need in zip(likes, needs, strict=True)
    )


if_forward = torch.ops.snnkernels.if_forward.default
if_backward = torch.ops.snnkernels.if_backward.default
