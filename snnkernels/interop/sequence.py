"""A converted network on an input that changes from step to step."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from ..conversion.errors import ConversionError
from ..conversion.graphs import is_steps
from ..conversion.network import ConvertedNetwork
from ..conversion.spiking import (
    CountSpikes,
    Repeat,
    SpikingActivation,
    TimeShape,
    per_channel_view,
    split_time,
)
from ..conversion.steps import CAUSAL, Steps

__all__ = ["over_time"]


class _Steps(fx.Interpreter):
    """A body on inputs ``[T * B, *]``; its outputs are spikes of every step, not counts."""

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(str(target))
        if isinstance(module, (Repeat, CountSpikes)):
            return args[0]
        if isinstance(module, TimeShape):
            return tuple(args[0].shape)
        if isinstance(module, SpikingActivation):
            module._check_channels(args[0].shape)
            module.node.output = "spikes"
            return module.node(split_time(args[0], args[1])).flatten(0, 1)
        return super().call_module(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        # The number of elements of a constant input times T: here the input has T already.
        if n.target is operator.mul and any(map(is_steps, n.args)):
            return self.env[n.args[0]]  # type: ignore[index]
        return super().run_node(n)


def over_time(snn: ConvertedNetwork, x_seq: Tensor) -> Tensor:
    """The answer of every step to an input that changes: event frames, another network's spikes.

    Every step passes the whole network; the mean over time of what comes out is, for an input that
    does not change, what ``snn(x, T=T)`` answers (if nothing behind the neurons is nonlinear).

    Args:
        snn: converted by a method whose neurons see every step as it comes, or of ``from_nir``.
        x_seq: ``[T, B, *]``, T at least 1.

    Returns:
        ``[T, B, *]``.

    Raises:
        ConversionError: the method's steps are not that simple, or there are several inputs or
            outputs.
        ValueError: ``x_seq`` has no steps.
    """
    steps: Steps = snn._clock.steps
    prefix, body = snn.prefix, snn.body
    if steps != CAUSAL or snn._ports.packed or not isinstance(prefix, fx.GraphModule):
        raise ConversionError(
            f"over_time takes one input and a method whose neurons see each step as it comes, such "
            f"as 'opi'; this is {snn.report.method!r} with inputs {', '.join(snn.inputs)}"
        )
    if not isinstance(x_seq, Tensor) or x_seq.dim() < 2 or len(x_seq) == 0:
        got = tuple(x_seq.shape) if isinstance(x_seq, Tensor) else type(x_seq).__name__
        raise ValueError(f"x_seq must be a tensor [T, B, *] with T of at least 1, got {got}")
    T = len(x_seq)
    snn.reset()
    try:
        statics = prefix(x_seq.flatten(0, 1))
        spikes = _Steps(body).run(*(statics[i] for i in snn._of_body), T)
        values = []
        for path, fired in zip(snn._counted, spikes, strict=True):
            layer = body.get_submodule(path)
            assert isinstance(layer, SpikingActivation)
            if layer.scale is not None:  # thresholds are in the weights
                worth = layer.scale / layer._weight().to(layer.scale.device)
                fired = (per_channel_view(worth, layer.channel_dim, fired.dim()) * fired).to(fired)
            values.append(fired)
        answer = snn.suffix(*(statics[i] for i in snn._of_suffix), *values)
    finally:
        snn.reset()
    if not isinstance(answer, Tensor):
        raise ConversionError("over_time: the network has several outputs")
    return torch.unflatten(answer, 0, (T, -1))
