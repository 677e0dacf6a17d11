"""The spiking layers of a converted network one after the other, and what corrects one of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from .inputs import joined
from .means import FromMeans, RunningMean
from .pools import CumulativeMaxPool
from .spiking import SpikingActivation, split_time
from .steps import CAUSAL

if TYPE_CHECKING:
    from .context import Context
    from .network import ConvertedNetwork
    from .thresholds import Site

__all__ = [
    "Stop",
    "Walk",
    "activations",
    "correct_bias",
    "correct_start",
    "first_images",
    "potential_error",
    "progress_bar",
    "set_operand",
]


class _NoBar:
    def update(self, n: int = 1) -> None:
        """Do nothing."""


@contextmanager
def progress_bar(what: str, total: int, show: bool) -> Iterator[Any]:
    """A tqdm bar if it is wanted and tqdm is there; else something with ``update`` as well."""
    if show:
        try:
            from tqdm import tqdm
        except ImportError:
            show = False
    if not show:
        yield _NoBar()
        return
    with tqdm(total=total, desc=what, unit="step", leave=False) as bar:
        yield bar


def first_images(context: Context, wanted: int) -> Any:
    """The first ``wanted`` inputs of the loader, or all there are: a tensor or ``Inputs``."""
    assert context.batches is not None
    found: list[Any] = []
    missing = wanted
    for x in context.batches():
        found.append(x[:missing])
        missing -= len(found[-1])
        if missing <= 0:
            break
    if missing > 0 and context.sample is not None and missing == wanted:
        found = [context.sample[:wanted]]  # a loader that can be read only once
    images = joined(found)
    if context.source is not None:
        context.source.same(images, "first images")
    if len(images) < wanted:
        context.report.notes.append(
            f"the loader gave {len(images)} of the {wanted} images that calibration asks for"
        )
    return images


@torch.no_grad()
def activations(model: fx.GraphModule, paths: list[str], images: Any) -> dict[str, Tensor]:
    """What the ANN's activations at ``paths`` are on ``images``, by path."""
    found: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        def hook(module: nn.Module, args: object, out: Tensor) -> None:
            found[path] = out

        return hook

    handles = [model.get_submodule(p).register_forward_hook(keep(p)) for p in paths]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


class Walk:
    """Runs a converted network layer by layer on ``images``, T steps each.

    Iterating gives a :class:`Stop` at every spiking layer in order of execution, once the layers
    before it have run; what is changed there (its neurons, the weights before it) is in force for
    the layers behind it. The spikes of a layer are kept until the last layer that reads them.

    Args:
        snn: the network.
        images: ``[B, *]``, or ``Inputs``.
        T: number of steps that answer; a method's other steps are run as well.
        rates: keep mean spikes, for :meth:`Stop.current_of_rates`.
    """

    def __init__(self, snn: ConvertedNetwork, images: Any, T: int, *, rates: bool = False) -> None:
        self.snn, self.images, self.T = snn, images, T
        self.clock = snn._clock
        self.rows = 1 if self.clock.steps.parallel else self.clock.steps.rows(T)
        nodes = list(snn.body.graph.nodes)
        *self.entrances, self.steps = [n for n in nodes if n.op == "placeholder"]
        self.layers = [n for n in nodes if self._spiking(n)]
        self.between = {n: self._between(n) for n in self.layers}
        self.outputs: dict[fx.Node, Tensor] = {}
        self.rates: dict[fx.Node, Tensor] | None = {} if rates else None
        self.statics: list[Tensor] = []
        self.refresh()

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Stop]:
        last = {source: n for n in self.layers for source in self._sources(n)}
        levels, self.clock.levels = self.clock.levels, self.T
        try:
            for node in self.layers:
                stop = Stop(self, node)
                yield stop
                if node in last:
                    self.outputs[node] = stop.output()
                    if self.rates is not None:
                        self.rates[node] = self._mean(self.outputs[node])
                for source in [s for s in self.outputs if last[s] is node]:
                    del self.outputs[source]
        finally:
            self.clock.levels = levels
            self.snn.reset()

    def refresh(self) -> None:
        """Compute what is constant in time again: weights before the first neurons changed."""
        with torch.no_grad():
            statics = self.snn.prefix(self.images)
        self.statics = [statics[i] for i in self.snn._of_body]

    def _spiking(self, node: fx.Node) -> bool:
        called = node.op == "call_module"
        return called and isinstance(
            self.snn.body.get_submodule(str(node.target)), SpikingActivation
        )

    def _between(self, layer: fx.Node) -> list[fx.Node]:
        """What is computed from earlier layers and constants to the current of ``layer``."""
        found: set[fx.Node] = set()
        stack = [n for n in layer.all_input_nodes if n is not self.steps]
        while stack:
            node = stack.pop()
            if node in found or node.op == "placeholder" or self._spiking(node):
                continue
            found.add(node)
            stack.extend(node.all_input_nodes)
        return [n for n in self.snn.body.graph.nodes if n in found]

    def _sources(self, layer: fx.Node) -> set[fx.Node]:
        """The earlier layers that ``layer`` reads."""
        read = {i for n in (layer, *self.between[layer]) for i in n.all_input_nodes}
        return {n for n in read if self._spiking(n)}

    def _mean(self, out: Tensor) -> Tensor:
        steps = self.clock.steps
        if steps.parallel:
            return out
        rows = split_time(out, self.rows)[steps.before :]
        return rows[steps.first(self.T) : self.T].mean(0)

    def run(self, layer: fx.Node, given: dict[fx.Node, Any]) -> Tensor:
        """The current of ``layer`` from values of what it is computed from."""
        runner = fx.Interpreter(self.snn.body, garbage_collect_values=False)
        runner.env = given
        for node in self.between[layer]:
            if node.op == "call_module":
                module = self.snn.body.get_submodule(str(node.target))
                if isinstance(module, (CumulativeMaxPool, RunningMean, FromMeans)):
                    module.reset()
            runner.env[node] = runner.run_node(node)
        source = layer.args[0]
        assert isinstance(source, fx.Node)
        return runner.env[source]


class Stop:
    """One spiking layer whose input is known: it can be run, changed, and run again.

    Attributes:
        walk: where it is on.
        node: its node in the body's graph.
        path: of its module, in the body as in the ANN.
        layer: the module.
    """

    def __init__(self, walk: Walk, node: fx.Node) -> None:
        self.walk, self.node, self.path = walk, node, str(node.target)
        layer = walk.snn.body.get_submodule(self.path)
        assert isinstance(layer, SpikingActivation)
        self.layer = layer
        self._current: Tensor | None = None

    def forget(self) -> None:
        """Compute the current anew: weights before this layer changed."""
        self._current = None

    @torch.no_grad()
    def output(self) -> Tensor:
        """What the layer hands on, all rows."""
        walk = self.walk
        if self._current is None:
            known: dict[fx.Node, Any] = dict(zip(walk.entrances, walk.statics, strict=True))
            self._current = walk.run(self.node, {**known, **walk.outputs, walk.steps: walk.rows})
        self.layer.reset()
        out = self.layer(self._current, walk.rows)
        self.layer.reset()
        return out

    @torch.no_grad()
    def answer(self, like: Tensor) -> Tensor:
        """The activations that the layer's spikes stand for, in the dtype of ``like``."""
        return self.layer.answer(self.output(), self.walk.T, like.dtype)

    def current_of_rates(self, statics: list[Tensor], rates: dict[fx.Node, Tensor]) -> Tensor:
        """The mean current that constants and mean spikes of a few images give, with gradients."""
        walk = self.walk
        known: dict[fx.Node, Any] = dict(zip(walk.entrances, statics, strict=True))
        steps, walk.clock.steps = walk.clock.steps, CAUSAL  # one row, no probes
        try:
            return walk.run(self.node, {**known, **rates, walk.steps: 1})
        finally:
            walk.clock.steps = steps


def set_operand(node: nn.Module, name: str, value: Tensor) -> None:
    """Make ``value`` the operand ``name`` (bias, v_init) of an ``IFNode``: a buffer."""
    if name in vars(node):
        delattr(node, name)
    node.register_buffer(name, value.detach().clone())


def units(stop: Stop, site: Site) -> Tensor | None:
    """What the layer's potentials are in units of: its θ if that is in the weights, else None."""
    return None if stop.layer.scale is None else site.theta


def over_positions(value: Tensor, channel_dim: int, dim: int) -> Tensor:
    """A scalar or ``[C]`` shaped to broadcast against a layer's ``dim`` dimensions, no batch."""
    if value.dim() != 1 or dim == 0:
        return value
    channel = (channel_dim if channel_dim < 0 else channel_dim - 1) % dim
    return value.view(*(-1 if d == channel else 1 for d in range(dim)))


def _channel(site: Site, dim: int) -> int:
    return site.channel_dim % dim


@torch.no_grad()
def correct_bias(stop: Stop, ann: Tensor, site: Site) -> None:
    """``bias -= mean(snn) - mean(ann)`` per channel, means over batch and space."""
    error = ann.double() - stop.answer(ann).double()
    if error.dim() > 1:
        channel = _channel(site, error.dim())
        error = error.mean([d for d in range(error.dim()) if d != channel])
    else:
        error = error.mean()
    unit = units(stop, site)
    error = error if unit is None else error / unit.double()
    node = stop.layer.node
    old = node.bias
    if isinstance(old, Tensor) and old.dim() > 1:
        error = over_positions(error, site.channel_dim, old.dim())
    error = error if old is None else old + error
    set_operand(node, "bias", error.to(site.theta.dtype))
    if error.dim() == 1:
        node.channel_dim = site.channel_dim


def potential_error(snn: Tensor, ann: Tensor, T: int) -> Tensor:
    """``T (mean(ann) - mean(snn))`` over the batch: what a membrane is short of, ``[*shape]``."""
    return T * (ann.double() - snn.double()).mean(0)


@torch.no_grad()
def correct_start(stop: Stop, ann: Tensor, site: Site) -> None:
    """``v_init += T (mean(ann) - mean(snn))`` for every neuron, means over the batch."""
    missing = potential_error(stop.answer(ann), ann, stop.walk.T)
    shape, node = missing.shape, stop.layer.node

    def spread(value: Any) -> Tensor:
        value = torch.as_tensor(value, dtype=torch.float64, device=missing.device)
        return over_positions(value, site.channel_dim, len(shape))

    unit = units(stop, site)
    missing = missing if unit is None else missing / spread(unit)
    start = 0.5 * node.threshold if isinstance(node.v_init, str) else node.v_init
    set_operand(node, "v_init", (spread(start) + missing).to(site.theta.dtype))
    if len(shape) == 1:
        node.channel_dim = site.channel_dim
