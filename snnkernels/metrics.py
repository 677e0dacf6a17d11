"""Firing rates, synaptic operations and energy of converted networks.

A synaptic operation is what one spike causes at one synapse: a weight is added to a membrane. The
count is exact: every spike times the outputs that it reaches, padding left out, with stride,
groups, dilation and transposed convolutions as they are.

How spikes that are not plain ones are counted:

* a value of k times the weight of a spike (bursts, signed spikes, counts of a parallel run) is k
  spikes, so k additions; a spike of several thresholds is one; of bit-serial codes every one bit;
* a sum of spikes (residual additions, means over windows) is all the spikes in it;
* what is neither (a layer behind a layer, an operation on running means) is a value, and costs a
  multiply-add for each connection of a value other than zero, at every step.

What is constant in time is computed once in a sample: the layers before the first neurons take
multiply-adds, and so does the read-out behind the last ones, on rates.

Not counted: the neurons' own updates (one addition and one comparison of a neuron and step),
biases, pooling and residual additions themselves, products of two values (attention; named in
:attr:`Operations.notes`), steps that a method simulates inside its neurons, and all movement of
data, which dominates on most hardware. Energies are those of the arithmetic alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .conversion.inputs import as_given
from .conversion.network import ConvertedNetwork, _steps
from .conversion.operations import CountingRun, Weighted, weighted_layers

__all__ = [
    "ADD_45NM_PJ",
    "MAC_45NM_PJ",
    "Energy",
    "LayerOperations",
    "Operations",
    "energy",
    "firing_rates",
    "synaptic_operations",
]

ADD_45NM_PJ = 0.9
"""Picojoules of one 32-bit floating-point addition in 45 nm at 0.9 V.

Source: Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014.
"""
MAC_45NM_PJ = 4.6
"""Picojoules of one 32-bit floating-point multiply-add there: 3.7 for the product, 0.9 to add."""


@dataclass(frozen=True)
class LayerOperations:
    """One layer with weights; numbers are means over the samples.

    Attributes:
        name: module path in the ANN, or the name of the function call.
        kind: ``"analog"`` (constant in time, once), ``"spikes"`` or ``"values"`` (both at every
            step).
        connections: weights times the places that they are used at: the ANN's multiply-adds.
        arrived: spikes (values other than zero) that reached it, over all steps.
        additions: synaptic operations.
        macs: multiply-adds.
    """

    name: str
    kind: str
    connections: float
    arrived: float
    additions: float
    macs: float


@dataclass(frozen=True)
class Operations:
    """What a run of T steps took, per sample.

    Attributes:
        T: steps that answer.
        layers: in order of execution.
        neurons: spikes of a sample by layer of neurons, over all steps.
        per_sample: synaptic operations of each sample, float64 ``[B]``.
        ann_macs: multiply-adds of the ANN.
        notes: what was not counted.
    """

    T: int
    layers: list[LayerOperations]
    neurons: dict[str, float]
    per_sample: Tensor
    ann_macs: float
    notes: list[str] = field(default_factory=list)

    @property
    def additions(self) -> float:
        """Synaptic operations of a sample."""
        return sum(layer.additions for layer in self.layers)

    @property
    def macs(self) -> float:
        """Multiply-adds of a sample: of the input layer, the read-out and other analog values."""
        return sum(layer.macs for layer in self.layers)

    @property
    def spikes(self) -> float:
        """Spikes of a sample, of all layers of neurons."""
        return sum(self.neurons.values())


@dataclass(frozen=True)
class Energy:
    """Energy of the arithmetic, picojoules of a sample.

    Attributes:
        snn: of the spiking network.
        ann: of the ANN, all of it multiply-adds.
        layers: of the spiking network's layers, by name.
        add_pj, mac_pj: the constants.
    """

    snn: float
    ann: float
    layers: dict[str, float]
    add_pj: float
    mac_pj: float

    @property
    def ratio(self) -> float:
        """The spiking network's over the ANN's: below 1 it takes less."""
        return self.snn / self.ann if self.ann else float("nan")


def _network(snn: Any) -> ConvertedNetwork:
    inner = getattr(snn, "snn", snn)  # a plan's network: the same spikes, up to rounding
    if not isinstance(inner, ConvertedNetwork):
        raise TypeError(
            "snn must be a converted network (snnkernels.convert) or a plan of one "
            f"(snnkernels.lower), got {type(snn).__name__}"
        )
    return inner


@contextmanager
def _watched(snn: ConvertedNetwork, run: CountingRun) -> Iterator[None]:
    """Calls of the body go through ``run``."""
    snn.body.forward = run.start
    try:
        yield
    finally:
        del snn.body.forward  # that of the class again


@torch.no_grad()
def _run(snn: Any, x: Any, T: int | None) -> tuple[ConvertedNetwork, CountingRun, Any, int]:
    net = _network(snn)
    steps = net.T if T is None else _steps(T)
    if not isinstance(net.body, fx.GraphModule):
        raise TypeError(
            "snn has a body of its own (stochastic_prefix): count the network it was drawn from"
        )
    bound = net._ports.bind(as_given(x))
    if not len(bound):
        raise ValueError("x has no samples: operations are means over them")
    run = CountingRun(net.body, len(bound))
    with _watched(net, run):
        for _ in net._segments(bound, [steps]):
            pass
    return net, run, bound, steps


def firing_rates(snn: Any, x: Any, T: int | None = None, per: str = "layer") -> dict[str, Tensor]:
    """Spikes of a neuron and step, by layer of neurons.

    Spikes of either sign count, and of k times the weight of one spike k (see the module); rows
    that a method runs before those that answer count as well. Rates of the report are net rates of
    the steps that answer.

    Args:
        snn: a converted network, or a plan of one.
        x: inputs ``[B, *]``, as ``snn`` takes them (of several a tuple or a dict).
        T: number of steps; None: those of the conversion.
        per: ``"layer"`` (a scalar), ``"channel"`` (``[C]``) or ``"neuron"`` (the layer's shape).

    Returns:
        float64 tensors on the CPU, means over the batch, by name in the ANN, in order of execution.

    Raises:
        TypeError: ``snn`` is no converted network.
        ValueError: ``per`` or ``T`` is not allowed, or ``x`` is empty.
    """
    if per not in ("layer", "channel", "neuron"):
        raise ValueError(f"per={per!r} is not known; allowed: 'layer', 'channel', 'neuron'")
    net, run, _, steps = _run(snn, x, T)
    rows = steps if net._clock.steps.parallel else net._clock.steps.rows(steps)
    found = {}
    for name, layer in net.neurons():
        if name not in run.spikes:
            continue
        rate = (run.spikes[name] / rows).mean(0).cpu()
        if per == "channel" and rate.dim():
            dim = layer.channel_dim % (rate.dim() + 1) - 1  # the batch is gone
            rate = rate.movedim(dim, 0).flatten(1).mean(1) if rate.dim() > 1 else rate
        found[name] = rate.mean() if per == "layer" else rate
    return found


def synaptic_operations(
    snn: Any, x: Any, T: int | None = None, *, input_every_step: bool = False
) -> Operations:
    """Count the operations of a run on ``x``; see the module for what counts.

    Args:
        snn: a converted network of any method, or a plan of one.
        x: inputs ``[B, *]``, as ``snn`` takes them.
        T: number of steps; None: those of the conversion.
        input_every_step: the layers before the first neurons are computed at each of the T steps,
            as hardware does that cannot keep their currents; default once.

    Raises:
        TypeError: ``snn`` is no converted network.
        ValueError: ``T`` is not allowed, or ``x`` is empty.
    """
    net, run, bound, steps = _run(snn, x, T)
    batch = len(bound)
    with torch.no_grad():
        # A method may have wrapped the graph.
        graph = next(m for m in net.prefix.modules() if isinstance(m, fx.GraphModule))
        statics, before, missed = weighted_layers(graph, bound)
        behind, missed_behind = _read_out(net, statics, run, steps)
    times = steps if input_every_step else 1
    found = [_row(w, "analog", times) for w in before]
    found += [_row(w, w.kind) for w in run.found]
    found += [_row(w, "analog") for w in behind]
    seen: dict[int, float] = {}
    for i, w in enumerate([*before, *run.found, *behind]):
        # A layer that runs on spikes and again on rates is one layer of the ANN.
        seen[i if w.module is None else id(w.module)] = w.connections
    notes = [
        f"{name} multiplies values with each other: not counted"
        for name in dict.fromkeys([*missed, *run.uncounted, *missed_behind])
    ]
    idle = net.latency(steps) - steps - net._clock.steps.before
    if net._clock.steps.extra and idle > 0 and net._clock.steps.windows == 0:
        notes.append(f"{idle} extra steps run inside the neurons: their spikes are not counted")
    total = sum((w.operations for w in run.found if w.kind == "spikes"), torch.zeros(batch))
    return Operations(
        T=steps,
        layers=found,
        neurons={k: float(v.flatten(1).sum(1).mean()) for k, v in run.spikes.items()},
        per_sample=torch.as_tensor(total, dtype=torch.float64),
        ann_macs=sum(seen.values()),
        notes=notes,
    )


def _read_out(
    net: ConvertedNetwork, statics: Any, run: CountingRun, T: int
) -> tuple[list[Weighted], list[str]]:
    """What lies behind the last neurons, run on zeros: its layers are dense whatever the rates."""
    rates = []
    for path in net._counted:
        layer = net.body.get_submodule(path)
        spikes = run.spikes[layer.label]  # type: ignore[index]
        rates.append(torch.zeros_like(spikes, dtype=_dtype(net)))
    _, found, missed = weighted_layers(net.suffix, *(statics[i] for i in net._of_suffix), *rates)
    return found, missed


def _dtype(net: ConvertedNetwork) -> torch.dtype:
    tensors = (*net.parameters(), *net.buffers())
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)


def _row(w: Weighted, kind: str, times: int = 1) -> LayerOperations:
    done = times * float(w.operations.mean())
    adds = kind == "spikes"
    return LayerOperations(
        w.name, kind, w.connections, times * float(w.arrived.mean()),
        done if adds else 0.0, 0.0 if adds else done,
    )  # fmt: skip


def energy(
    operations: Operations, *, add_pj: float = ADD_45NM_PJ, mac_pj: float = MAC_45NM_PJ
) -> Energy:
    """Energy of the arithmetic of a sample, beside that of the ANN.

    Args:
        operations: of :func:`synaptic_operations`.
        add_pj: picojoules of an addition.
        mac_pj: picojoules of a multiply-add.

    Raises:
        TypeError: ``operations`` is something else.
        ValueError: a constant is negative or not finite.
    """
    if not isinstance(operations, Operations):
        raise TypeError(
            "operations must be what snnkernels.metrics.synaptic_operations returns, got "
            f"{type(operations).__name__}"
        )
    for name, value in (("add_pj", add_pj), ("mac_pj", mac_pj)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name}={value!r} must be at least 0 and finite, in picojoules")
    layers: dict[str, float] = {}
    for layer in operations.layers:
        cost = add_pj * layer.additions + mac_pj * layer.macs
        layers[layer.name] = layers.get(layer.name, 0.0) + cost
    return Energy(sum(layers.values()), mac_pj * operations.ann_macs, layers, add_pj, mac_pj)
