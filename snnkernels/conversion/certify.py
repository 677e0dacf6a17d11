"""Proofs about a converted network: what its spike counts can be, whatever order spikes come in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from .errors import ConversionError
from .inputs import as_given
from .interval_layers import eps_of, window_sum
from .interval_rules import IntervalInterpreter
from .intervals import Bounds, cumulative_pool, fire, fired
from .pools import CumulativeMaxPool
from .spiking import CountSpikes, Repeat, SpikingActivation, TimeShape, per_channel_view
from .steps import CAUSAL, Steps

if TYPE_CHECKING:
    from .network import ConvertedNetwork

__all__ = ["Certificate", "LayerCounts", "certify"]


@dataclass(frozen=True)
class LayerCounts:
    """Spike counts of one layer.

    Attributes:
        name: of the activation in the ANN.
        low, high: every neuron's count over T steps lies in ``[low, high]``; ``[B, *]`` int32.
    """

    name: str
    low: Tensor
    high: Tensor

    @property
    def certain(self) -> float:
        """The share of neurons whose count is known."""
        return float((self.low == self.high).double().mean())

    @property
    def width(self) -> float:
        """``high - low``, averaged over neurons."""
        return float((self.high - self.low).double().mean())


@dataclass(frozen=True)
class Certificate:
    """What :func:`certify` proves; ``str()`` is a table.

    Attributes:
        T: number of steps.
        layers: spike counts, in order of execution.
        low, high: the answer lies between; the shape of the answer, float64.
        quantised: what the quantised ANN answers: the network whose activations are the staircases
            of T levels that its neurons have for a constant current.
        proven: whether the spiking network predicts the class the quantised ANN predicts, for every
            order of spikes; ``[B, *]`` bool, without the class dimension 1.
    """

    T: int
    layers: list[LayerCounts]
    low: Tensor
    high: Tensor
    quantised: Tensor
    proven: Tensor

    @property
    def prediction(self) -> Tensor:
        """The class the quantised ANN predicts, ``[B, *]``."""
        return self.quantised.argmax(1)

    def __getitem__(self, name: str) -> LayerCounts:
        """The layer called ``name``."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"{name!r} is not a layer; there are {[c.name for c in self.layers]}")

    def __str__(self) -> str:
        lines = [["layer", "neurons", "count certain", "mean width", "largest width"]]
        for layer in self.layers:
            widest = int((layer.high - layer.low).max()) if layer.low.numel() else 0
            lines.append(
                [
                    layer.name,
                    f"{layer.low[0].numel()}" if len(layer.low) else "0",
                    f"{layer.certain:.1%}",
                    f"{layer.width:.2f}",
                    f"{widest} of {self.T}",
                ]
            )
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
            for line in lines
        ]
        table.insert(1, "  ".join("-" * w for w in widths))
        spread = float((self.high - self.low).mean())
        return "\n".join(
            [
                *table,
                "",
                f"T={self.T}: answers are known within {spread:.4g} (mean width)",
                f"prediction proven equal to the quantised ANN's: {int(self.proven.sum())} of "
                f"{self.proven.numel()}",
            ]
        )


class _Body(IntervalInterpreter):
    def __init__(self, body: fx.GraphModule, T: int, dtype: torch.dtype) -> None:
        super().__init__(body, T, dtype)
        self.layers: dict[str, LayerCounts] = {}

    def own_module(self, n: fx.Node, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """Neurons, and what knows about time."""
        if isinstance(module, SpikingActivation):
            return self._neurons(n, module, args[0])
        if isinstance(module, Repeat):
            return args[0]
        if isinstance(module, TimeShape):
            return tuple(args[0].shape)
        if isinstance(module, CountSpikes):
            return args[0]
        if isinstance(module, CumulativeMaxPool):
            return cumulative_pool(args[0], module.pool, window_sum(module.pool), self.eps)
        return NotImplemented

    def _neurons(self, n: fx.Node, layer: SpikingActivation, x: Any) -> Bounds:
        weight = layer._weight()
        if not isinstance(x, Bounds):
            low = high = _run(layer, x, self.T)
        else:
            dim = x.low.dim()
            threshold = per_channel_view(_tensor(layer.node.threshold), layer.channel_dim, dim)
            start = per_channel_view(_start(layer), layer.channel_dim, dim)
            low, high = fire(x, threshold, start, min(self.eps, eps_of(torch.float32)))
        self.layers[str(n.target)] = LayerCounts(layer.label, low, high)
        weight = per_channel_view(weight, layer.channel_dim, low.dim())
        return fired(low, high, weight.to(self.dtype), self.T)


def _tensor(value: Any) -> Tensor:
    return value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float32)


def _start(layer: SpikingActivation) -> Tensor:
    start = layer.node.v_init
    return 0.5 * _tensor(layer.node.threshold) if isinstance(start, str) else _tensor(start)


def _run(layer: SpikingActivation, x: Tensor, T: int) -> Tensor:
    """Counts of a layer whose current is constant: its own run."""
    layer.reset()
    try:
        out = layer.forward(x, T)
        return layer._net_count(out, T).detach().to(torch.int32)
    finally:
        layer.reset()


def _check(snn: ConvertedNetwork) -> None:
    """Raise unless every neuron is one the bounds are proved for."""
    if snn._clock.steps != CAUSAL:
        raise ConversionError(
            f"certify: method {snn.report.method!r} runs its neurons in another way (probes, "
            "guards of the count, or all steps at once); the bounds hold for plain "
            "integrate-and-fire. A parallel network is the quantised ANN itself"
        )
    for name, layer in snn.neurons():
        node = layer.node
        other = {
            "a forward of its own": type(layer).forward is not SpikingActivation.forward,
            "a reset to a value": node.v_reset is not None,
            "a leak": node.beta is not None,
            "a bias of its own": node.bias is not None,
            "a fire level": node.fire_level is not None,
            "bursts": node.max_spikes is not None,
            "signed spikes": node.signed is not None,
            "a probe": node.probe is not None,
            "a mask": node.mask is not None,
            "parallel counts": node.parallel,
            "an input scale": node.input_scale is not None,
            "tie='>'": node.tie != ">=",
            "a negative amplitude": bool((layer._weight() < 0).any()),
        }
        found = [what for what, present in other.items() if present]
        if found:
            raise ConversionError(
                f"certify: {name} has {', '.join(found)}; the bounds hold for plain "
                "integrate-and-fire neurons with soft reset"
            )
        threshold, start = _tensor(node.threshold), _start(layer)
        if start.dim() > 1:
            threshold = per_channel_view(
                threshold, layer.channel_dim if layer.channel_dim < 0 else layer.channel_dim - 1,
                start.dim(),
            )  # fmt: skip
        if not bool(((start >= 0) & (start < threshold)).all()):
            raise ConversionError(
                f"certify: v_init of {name} must lie in [0, θ) for the bounds to hold; it is "
                f"{float(start.min()):.4g} to {float(start.max()):.4g}"
            )


@contextmanager
def _quantised(snn: ConvertedNetwork) -> Iterator[None]:
    """Within, ``snn`` is the quantised ANN: one pass of staircases."""
    clock = snn._clock
    before, clock.steps = clock.steps, Steps(whole=True, parallel=True)
    try:
        yield
    finally:
        clock.steps = before


@torch.no_grad()
def certify(snn: ConvertedNetwork, x: Any, T: int | None = None) -> Certificate:
    """Bounds of every spike count and answer, and whether predictions are proven.

    For plain integrate-and-fire neurons with soft reset and v_init in [0, θ). The first layer's
    counts are exact. From there intervals are propagated layer by layer
    (:mod:`snnkernels.conversion.intervals` has the proofs), as if spikes came in any order: they
    hold for the run at hand and for every other timing of the same counts. They grow with depth;
    where the widths jump is where order matters. The cost is that of about 14 steps in float64.

    The prediction (largest entry along dimension 1) is proven where no answer within the bounds
    has another largest entry than the quantised ANN; behind a last linear layer the difference of
    two entries is bounded, which is sharper than the entries themselves.

    Args:
        snn: converted; not by a method with probes, bursts, signed spikes, or in parallel.
        x: ``[B, *]``; of several inputs a tuple by position or a dict by name.
        T: number of steps; default: that of the conversion.

    Raises:
        ConversionError: a neuron the bounds do not hold for, an operation without a rule, or an
            answer that is not one tensor ``[B, C, *]``; names it.
        ValueError: T.
    """
    from .network import _steps

    T = snn.T if T is None else _steps(T)
    _check(snn)
    x = snn._ports.bind(as_given(x))
    snn.reset()
    statics = snn.prefix(x)
    inputs = [statics[i] for i in snn._of_body]
    dtype = next(t.dtype for t in inputs if t.is_floating_point())
    body = _Body(snn.body, T, dtype)
    body.run(*inputs, 1)
    rates = []
    for path in snn._counted:
        layer, counts = snn.body.get_submodule(path), body.layers[path]
        assert isinstance(layer, SpikingActivation)
        # Rounded as the network rounds them, which keeps their order.
        ends = [layer.rate(count, T, dtype) for count in (counts.low, counts.high)]
        rates.append(Bounds.between(*ends))
    suffix = IntervalInterpreter(snn.suffix, 1, dtype)
    answer = suffix.run(*(statics[i] for i in snn._of_suffix), *rates)
    if not isinstance(answer, Bounds) or answer.low.dim() < 2:
        raise ConversionError(
            "certify: the answer must be one tensor [B, C, *] that follows from spikes; got "
            + (f"{answer.low.dim()} dimension" if isinstance(answer, Bounds) else str(type(answer)))
        )
    if not answer.low.shape[1]:
        raise ConversionError(
            f"certify: the answer has shape {tuple(answer.low.shape)}; it must be [B, C, *] with "
            "at least one class"
        )
    with _quantised(snn):
        quantised = snn(x, T=T)
    best = quantised.argmax(1, keepdim=True)
    rivals = answer.high.scatter(1, best, -torch.inf)
    proven = answer.low.gather(1, best) > rivals.amax(1, keepdim=True)
    last = suffix.classifier()
    if last is not None and answer.low.dim() == 2:
        proven = proven | _margins(*last, best, eps_of(dtype))
    return Certificate(
        T, list(body.layers.values()), answer.low, answer.high, quantised, proven.squeeze(1)
    )


def _margins(layer: nn.Linear, x: Bounds, room: float, best: Tensor, eps: float) -> Tensor:
    """Where the best class beats every other by more than rounding: ``[B, 1]`` bool."""
    weight = layer.weight.double()
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.double()
    size = x.size @ weight.abs().t() + bias.abs()
    slack = (weight.shape[1] + 4) * (eps + 2.0**-52) * (size + size.gather(1, best))
    won = []
    for i, c in enumerate(best.flatten().tolist()):  # one at a time: C * F numbers each
        apart = weight[c] - weight
        least = apart.clamp(min=0) @ x.low[i] + apart.clamp(max=0) @ x.high[i] + bias[c] - bias
        least = least - slack[i] - room * (1 + size[i].max())
        least[c] = torch.inf
        won.append(least.min() > 0)
    return torch.stack(won)[:, None] if won else best.bool()
