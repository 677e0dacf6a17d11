"""The two torch operators: schemas, fakes, registration.

``torch.ops.snnkernels.if_forward`` and ``if_backward`` wrap :mod:`.run` and :mod:`.backward` for
torch.compile, export and tensor subclasses; eager calls go there directly. The fields of a neuron
and of what is asked or saved travel one by one in the order of :mod:`.spec`. Outputs not asked for
are empty tensors: the arity is fixed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backward, layouts, reference, run
from .spec import OPERANDS, Asked, Grads, Neuron, Outputs, Saved

_NEURON = ", ".join(
    [
        *(f"Tensor? {name}" for name in OPERANDS),
        *(f"float {name}_value" for name in OPERANDS),
        "int options, ScalarType spike_dtype, float v_reset, Tensor? mask, int max_spikes",
        "int probe, int iterations, int count_low, int count_high, float margin, float v_min",
    ]
)
_ASKED = (
    "bool spikes, bool words, bool count, bool v_seq, bool charge_seq, bool window, int[] count_at"
)
_SAVED = (
    "Tensor? x, Tensor? charges, Tensor? window, Tensor? words, bool constant, SymInt steps, "
    "ScalarType dtype"
)
_GRADS = "Tensor? grad_spikes, bool rate, Tensor? grad_v, Tensor? grad_v_seq, Tensor? grad_charge"
_NEURON_END = len(Neuron._fields)
_ASKED_END = _NEURON_END + len(Asked._fields)
_SAVED_END = len(Saved._fields)

# Kept for the life of the process: its end would unregister the operators.
_LIBRARY = torch.library.Library("snnkernels", "DEF")
_LIBRARY.define(
    f"if_forward(Tensor x, SymInt? T, {_NEURON}, {_ASKED}, int smooth, float alpha, "
    "float scale) -> (" + ", ".join(f"Tensor {name}_out" for name in Outputs._fields) + ")"
)
_LIBRARY.define(
    f"if_backward({_SAVED}, {_NEURON}, {_GRADS}, int surrogate, float alpha, float scale, "
    f"bool detach_reset, bool smooth, bool[{1 + len(OPERANDS)}] needs) -> (Tensor grad_of_x, "
    + ", ".join(f"Tensor grad_of_{name}" for name in OPERANDS)
    + ")"
)


def _if_forward(x: Tensor, T: int | None, *rest: Any) -> tuple[Tensor, ...]:
    neuron, asked = Neuron(*rest[:_NEURON_END]), Asked(*rest[_NEURON_END:_ASKED_END])
    # AOTInductor hands None over for an empty list.
    asked = asked._replace(count_at=tuple(asked.count_at or ()))
    outputs = run.if_forward(x, T, neuron, asked, *rest[_ASKED_END:])
    return tuple(
        x.new_empty(0, dtype=dtype) if output is None else output
        for output, dtype in zip(outputs, _dtypes(x, neuron), strict=True)
    )


def _dtypes(x: Tensor, neuron: Neuron) -> tuple[torch.dtype, ...]:
    """Of the outputs; of words where there are none."""
    state = reference.state_dtype(x.dtype)
    i32 = torch.int32
    return neuron.spike_dtype, i32, i32, i32, state, state, state, i32


def _if_backward(*all_: Any) -> tuple[Tensor, ...]:
    saved, rest = Saved(*all_[:_SAVED_END]), all_[_SAVED_END:]
    neuron, rest = Neuron(*rest[:_NEURON_END]), rest[_NEURON_END:]
    grads, how = Grads(*rest[: len(Grads._fields)]), rest[len(Grads._fields) :]
    found = backward.if_backward(saved, neuron, grads, *how)
    like = saved.like
    return tuple(like.new_empty(0) if g is None else g.contiguous() for g in found)


for _name, _run in (("if_forward", _if_forward), ("if_backward", _if_backward)):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    # Gradients come from the autograd.Function around the operator. Falling through makes a call
    # that bypasses it fail loudly in backward instead of giving no gradient.
    _LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("snnkernels::if_forward")
def _if_forward_fake(x: Tensor, T: int | None, *rest: Any) -> tuple[Tensor, ...]:
    neuron, asked = Neuron(*rest[:_NEURON_END]), Asked(*rest[_NEURON_END:_ASKED_END])
    layout = layouts.of(x, T is not None)
    if layout is None:
        x = x.new_empty(x.shape)
        layout = layouts.of(x, T is not None)
        assert layout is not None
    found = layout
    shape = x.shape if T is not None else x.shape[1:]
    steps = x.shape[0] if T is None else T
    dtypes = _dtypes(x, neuron)
    word = reference.word_dtype(steps)
    lead = (steps + reference.WORD_STEPS - 1) // reference.WORD_STEPS

    def rows(there: bool, dtype: torch.dtype) -> Tensor:
        return found.rows(x, steps, shape, dtype) if there else x.new_empty(0, dtype=dtype)

    def each(there: bool, dtype: torch.dtype, *leading: Any) -> Tensor:
        if not there:
            return x.new_empty(0, dtype=torch.int32)
        dense = x.new_empty((*leading, *found.neurons(shape)), dtype=dtype)
        return found.restore(dense, len(leading))

    return (
        rows(asked.spikes, dtypes[0]),
        each(asked.words, word, lead),
        each(asked.count, torch.int32),
        each(bool(asked.count_at), torch.int32, len(asked.count_at)),
        each(True, dtypes[4]),
        rows(asked.v_seq, dtypes[5]),
        rows(asked.charge_seq, dtypes[6]),
        each(asked.window, word, lead),
    )


@torch.library.register_fake("snnkernels::if_backward")
def _if_backward_fake(*all_: Any) -> tuple[Tensor, ...]:
    saved, needs = Saved(*all_[:_SAVED_END]), all_[-1]
    neuron = Neuron(*all_[_SAVED_END : _SAVED_END + _NEURON_END])
    like = saved.like
    shape = like.shape if saved.constant else (saved.steps, *like.shape[1:])
    grad_x = like.new_empty(shape, dtype=saved.dtype) if needs[0] else like.new_empty(0)
    return (
        grad_x,
        *(
            like.new_empty(operand.shape, dtype=operand.dtype)
            if need and operand is not None
            else like.new_empty(0)
            for operand, need in zip(neuron.tensors, needs[1:], strict=True)
        ),
    )


if_forward = torch.ops.snnkernels.if_forward.default
if_backward = torch.ops.snnkernels.if_backward.default
