"""Autograd around the two operators, and which way a call takes."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import surrogate as _surrogate
from . import backward, double_backward, operands, ops, params, run
from .prepared import How, Prepared
from .spec import OPERANDS, SPIKES, Asked, Grads, Neuron, Outputs, Saved

_PLAIN = (Tensor, torch.nn.Parameter)


class Config(NamedTuple):
    """What a differentiable run is told besides tensors.

    Of ``neuron`` the operands are left out: those in ``present`` come as tensors of their own.
    """

    T: int | None
    neuron: Neuron
    asked: Asked
    rate: bool
    surrogate: _surrogate.Surrogate
    detach_reset: bool
    save: str
    present: tuple[int, ...] = ()

    def with_operands(self, tensors: Sequence[Tensor]) -> Neuron:
        """The neuron with its operands in place."""
        if not self.present:
            return self.neuron
        operands: list[Tensor | None] = [None] * len(OPERANDS)
        for i, tensor in zip(self.present, tensors, strict=True):
            operands[i] = tensor
        return self.neuron.with_tensors(operands)


def through_operator(x: Tensor) -> bool:
    """Whether something beside eager mode has to see the call: compile, export, a subclass."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in _PLAIN
        or bool(torch._C._len_torch_dispatch_stack())
    )


def forward(
    x: Tensor, T: int | None, neuron: Neuron, asked: Asked, alpha: float, out: Tensor | None
) -> Outputs:
    """The forward pass without gradients, by the shortest way to a kernel."""
    if not through_operator(x):
        return run.if_forward(x, T, neuron, asked, -1, alpha, 1.0, out)
    made = ops.if_forward(x, T, *neuron, *asked, -1, alpha, 1.0)
    there = (*asked[:3], bool(asked.count_at), True, *asked[3:6])
    outputs = Outputs._make(
        t if is_there else None for t, is_there in zip(made, there, strict=True)
    )
    if out is not None:
        outputs = outputs._replace(spikes=out.copy_(made[0]))
    return outputs


def differentiable(x: Tensor, config: Config) -> Outputs:
    """The forward pass with a graph behind it; ``spikes`` is the rate where that is asked for."""
    tensors = config.neuron.tensors
    present = tuple([i for i, t in enumerate(tensors) if t is not None])
    if present:
        neuron = config.neuron.with_tensors([None] * len(OPERANDS))
        config = config._replace(neuron=neuron, present=present)
        given = _distinct(x, *(tensors[i] for i in present))
        made = _IntegrateAndFire.apply(config, *given)
    else:
        made = _IntegrateAndFire.apply(config, x)
    if config.asked is SPIKES:
        return outputs(*made)
    each = iter(made)
    return Outputs._make([next(each) if there else None for there in _there(config)])


def outputs(spikes: Tensor, v: Tensor) -> Outputs:
    """Spikes and final membranes, and nothing else."""
    return Outputs(spikes, None, None, None, v, None, None, None)


def plain(
    prepared: Prepared,
    surrogate: _surrogate.Surrogate,
    detach_reset: bool,
    x: Tensor,
    v_init: Tensor | None,
) -> Outputs:
    """A plain run with a graph behind it, and a surrogate that the plain kernels know."""
    how = (surrogate.kind, surrogate.alpha, surrogate.scale, detach_reset)
    return outputs(*_Plain.apply(prepared, how, x, v_init))


class _Plain(torch.autograd.Function):
    """:class:`_IntegrateAndFire` for what is prepared: of the operands only x has a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        prepared: Prepared,
        how: How,
        x: Tensor,
        v_init: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, v_init)
        ctx.prepared, ctx.how = prepared, how
        ctx.set_materialize_grads(False)
        return prepared.forward(x, v_init)

    @staticmethod
    def backward(
        ctx: Any, grad_spikes: Tensor | None, grad_v: Tensor | None
    ) -> tuple[None, None, Tensor, None]:
        x, v_init = _saved(ctx, grad_v)
        prepared, how = ctx.prepared, ctx.how
        direct = not torch.is_grad_enabled() and not through_operator(x)
        if direct and prepared.serves(x, v_init, grad_spikes, grad_v):
            return None, None, prepared.backward(x, v_init, grad_spikes, grad_v, how), None
        saved = Saved(x, None, None, None, False, prepared.steps, prepared.dtype)
        given = Grads(grad_spikes, False, grad_v)
        needs = [True] + [False] * len(OPERANDS)
        neuron = prepared.neuron if v_init is None else prepared.neuron._replace(v=v_init)
        found = _backward(saved, neuron, given, how, needs)
        return None, None, found[0], None


def _there(c: Config) -> tuple[bool, ...]:
    """Which outputs a run has; a rate takes the place of the spikes."""
    a = c.asked
    return (
        a.spikes or c.rate, a.words, a.count, bool(a.count_at), True, a.v_seq, a.charge_seq, False
    )  # fmt: skip


def _distinct(*tensors: Tensor | None) -> list[Tensor | None]:
    """Replaces repeated tensors by views: torch.compile refuses one tensor given twice."""
    seen: list[Tensor] = []
    out: list[Tensor | None] = []
    for tensor in tensors:
        repeated = tensor is not None and any(tensor is t for t in seen)
        out.append(tensor.view_as(tensor) if repeated and tensor is not None else tensor)
        if tensor is not None:
            seen.append(tensor)
    return out


class _IntegrateAndFire(torch.autograd.Function):
    """Autograd around the two operators; of size [T, ...] it keeps x, or what ``save`` says.

    Takes and returns only the tensors there are: each None costs a small layer's time.
    """

    @staticmethod
    def forward(ctx: Any, c: Config, x: Tensor, *operands_: Tensor) -> tuple[Tensor | None, ...]:
        neuron, asked = c.with_operands(operands_), c.asked
        # A constant current has no [T, ...] tensor to save on, nor have no steps.
        save = "recompute" if c.T is not None or not x.shape[0] else c.save
        fired = save == "bits" and any(
            ctx.needs_input_grad[2 + i]
            for i, operand in enumerate(c.present)
            if OPERANDS[operand] in ("threshold", "amplitude")
        )
        if save == "trace":
            asked = asked._replace(charge_seq=True)
        elif save == "bits":
            asked = asked._replace(window=True, words=asked.words or fired)
        outputs = forward(x, c.T, neuron, asked, c.surrogate.alpha, None)
        steps = x.shape[0] if c.T is None else c.T
        if c.rate:
            outputs = outputs._replace(spikes=rate(outputs, neuron, steps, x.dtype))
        if save == "recompute":
            ctx.save_for_backward(x, *operands_)
        else:
            kept = outputs.charge_seq if save == "trace" else outputs.window
            ctx.save_for_backward(kept, outputs.words if fired else None, *operands_)
        ctx.config, ctx.save, ctx.steps, ctx.dtype = c, save, steps, x.dtype
        ctx.set_materialize_grads(False)
        result: tuple[Any, ...]
        if c.asked is SPIKES:
            result = (outputs.spikes, outputs.v)
            if neuron.spike_dtype.is_floating_point:
                return result
        else:
            result = tuple([t for t, there in zip(outputs, _there(c), strict=True) if there])
        ctx.mark_non_differentiable(*(t for t in result if not t.dtype.is_floating_point))
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        c: Config = ctx.config
        if c.asked is SPIKES:
            given = Grads(grads[0], False, grads[1])
        else:
            each = iter(grads)
            spikes, _, _, _, v, v_seq, charge_seq, _ = (
                next(each) if there else None for there in _there(c)
            )
            given = Grads(spikes, c.rate, v, v_seq, charge_seq)
        kept = _saved(ctx, given.v)
        fields: tuple[Tensor | None, ...]
        if ctx.save == "recompute":
            fields, operands_ = (kept[0], None, None, None), kept[1:]
        elif ctx.save == "trace":
            fields, operands_ = (None, kept[0], None, None), kept[2:]
        else:
            fields, operands_ = (None, None, kept[0], kept[1]), kept[2:]
        saved = Saved._make((*fields, c.T is not None, ctx.steps, ctx.dtype))
        neuron = c.with_operands(operands_)
        asked_for = ctx.needs_input_grad
        needs = [asked_for[1]] + [False] * len(OPERANDS)
        for i, operand in enumerate(c.present):
            needs[1 + operand] = asked_for[2 + i]
        how = (c.surrogate.kind, c.surrogate.alpha, c.surrogate.scale, c.detach_reset)
        found = _backward(saved, neuron, given, how, needs)
        wanted = [found[0] if needs[0] else None]
        wanted += [found[1 + i] if needs[1 + i] else None for i in c.present]
        return (None, *wanted)


def _saved(ctx: Any, grad_v: Tensor | None) -> tuple[Any, ...]:
    """What forward saved; where it is gone and a later call's membrane led here, who, and a cure.

    ``ctx.neuron`` is a weak reference that :class:`snnkernels.IFNode` leaves.
    """
    try:
        kept: tuple[Any, ...] = ctx.saved_tensors
        return kept
    except RuntimeError as error:
        if grad_v is None or "second time" not in str(error):
            raise
        neuron = ctx.neuron() if hasattr(ctx, "neuron") else None
        who = "a neuron" if neuron is None else _named(neuron)
        raise RuntimeError(
            f"snnkernels: the gradient went through the membrane that {who} kept from an earlier "
            f"call, v {list(grad_v.shape)}, into the graph of that call, which an earlier "
            "backward() has freed. Call snnkernels.reset_net(net) before each batch, or "
            "snnkernels.detach_net(net) to carry the membranes on without their gradient; only if "
            "gradients shall run through both calls, give the earlier backward() "
            "retain_graph=True."
        ) from error


def _named(module: torch.nn.Module) -> str:
    """A module by its name in the network that holds it, which modules themselves do not know."""
    names = [""]
    for thing in gc.get_objects():  # slow, but an error is on its way
        if issubclass(type(thing), torch.nn.Module):
            names += [name for name, inner in thing.named_modules() if inner is module]
    name = max(names, key=len)
    return f"layer {name!r}, {module!r}," if name else f"{module!r}"


def _backward(
    saved: Saved,
    neuron: Neuron,
    given: Grads,
    how: How,
    needs: list[bool],
) -> Sequence[Any]:
    """The backward pass, by the shortest way to a kernel."""
    if through_operator(saved.like):
        return ops.if_backward(*saved, *neuron, *given, *how, False, needs)
    if torch.is_grad_enabled():
        return double_backward.if_backward(saved, neuron, given, *how, False, needs)
    return backward.if_backward(saved, neuron, given, *how, False, needs)


def rate(outputs: Outputs, neuron: Neuron, steps: int, dtype: torch.dtype) -> Tensor:
    """``amplitude * count / T``, rounded once to ``dtype``."""
    count, state = outputs.count, outputs.v.dtype
    assert count is not None
    counted = steps - (neuron.probe if neuron.options & params.PROBE_MASK else 0)
    # A tensor of no dimensions makes whole numbers membranes on the way, without a copy of them.
    weighted = count
    if neuron.amplitude is not None:
        weighted = neuron.amplitude.to(dtype).to(state) * count
    elif neuron.amplitude_value != 1.0:
        weight = operands.rounded(neuron.amplitude_value, dtype)
        weighted = count * torch.tensor(weight, dtype=state)
    result = weighted / torch.tensor(float(counted), dtype=state)
    # No `to` that changes nothing: torch 2.11's compiler loses the gradient of an autograd.Function
    # that ends with one.
    return result if state == dtype else result.to(dtype)
