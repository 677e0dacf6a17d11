"""Weights tuned so that a spiking layer answers what the ANN's activation is."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from .activations import clamped
from .correction import Stop, units
from .ops import WEIGHTED_MODULES
from .spiking import per_channel_view

if TYPE_CHECKING:
    from .network import ConvertedNetwork
    from .thresholds import Site

__all__ = ["own_weights", "staircase", "tune"]


def own_weights(snn: ConvertedNetwork) -> None:
    """Give ``snn`` its own copies of layers with weights; a layer in two places stays one."""
    copies: dict[int, nn.Module] = {}
    for part in (snn.prefix, snn.body, snn.suffix):
        for path, module in list(part.named_modules(remove_duplicate=False)):
            if isinstance(module, WEIGHTED_MODULES):
                if id(module) not in copies:
                    with torch.inference_mode(False):  # they are to have gradients
                        copies[id(module)] = copy.deepcopy(module)
                part.set_submodule(path, copies[id(module)])


def staircase(
    z: Tensor, threshold: Tensor, v_init: Tensor, T: int, most: int, weight: Tensor
) -> Tensor:
    """``weight / T clip(floor((z T + v_init) / θ), 0, most)``; the floor passes gradients on."""
    count = (z * T + v_init) / threshold
    count = count + (count.floor() - count).detach()
    return weight / T * clamped(count, most)


class _Way:
    """From the network's input and earlier layers to a layer's current, and its weights."""

    def __init__(self, stop: Stop) -> None:
        self.stop = stop
        walk = stop.walk
        snn = walk.snn
        self.body_nodes = walk.between[stop.node]
        read = {i for n in (stop.node, *self.body_nodes) for i in n.all_input_nodes}
        results = next(n for n in snn.prefix.graph.nodes if n.op == "output").args[0]
        self.results: dict[int, fx.Node] = {  # which entrance of the body is which prefix node
            i: results[snn._of_body[i]] for i, n in enumerate(walk.entrances) if n in read
        }
        wanted: set[fx.Node] = set()
        stack = list(self.results.values())
        while stack:
            node = stack.pop()
            if node not in wanted and node.op != "placeholder":
                wanted.add(node)
                stack.extend(node.all_input_nodes)
        self.prefix_nodes = [n for n in snn.prefix.graph.nodes if n in wanted]

    def modules(self) -> list[nn.Module]:
        """Layers with weights on the way, each once."""
        snn = self.stop.walk.snn
        found: dict[int, nn.Module] = {}
        for part, nodes in ((snn.prefix, self.prefix_nodes), (snn.body, self.body_nodes)):
            for node in nodes:
                if node.op == "call_module":
                    module = part.get_submodule(str(node.target))
                    if isinstance(module, WEIGHTED_MODULES):
                        found[id(module)] = module
        return list(found.values())

    def current(self, pick: Tensor) -> Tensor:
        """The mean current of the images ``pick``, with gradients to the weights."""
        walk = self.stop.walk
        statics = [s[pick] if s.dim() > 0 else s for s in walk.statics]
        if self.prefix_nodes:
            runner = fx.Interpreter(walk.snn.prefix, garbage_collect_values=False)
            entrance = next(n for n in walk.snn.prefix.graph.nodes if n.op == "placeholder")
            runner.env = {entrance: walk.images[pick]}
            for node in self.prefix_nodes:
                runner.env[node] = runner.run_node(node)
            for i, node in self.results.items():
                statics[i] = runner.env[node]
        assert walk.rates is not None
        return self.stop.current_of_rates(statics, {n: r[pick] for n, r in walk.rates.items()})


def tune(
    stop: Stop,
    target: Tensor,
    site: Site,
    done: set[int],
    *,
    iterations: int,
    lr: float,
    batch: int,
    draw: torch.Generator,
    step: Callable[[], Any],
) -> bool | None:
    """Adam on the weights between the layers before ``stop`` and it.

    Args:
        stop: the layer.
        target: the ANN's activations ``[B, *]`` on the walk's images.
        site: of the layer.
        done: ids of modules that earlier layers have been tuned with; theirs are added.
        iterations, lr, batch: of Adam; its rate falls to 0 like a cosine.
        draw: which images an iteration takes.
        step: called after every iteration.

    Returns:
        Whether the squared error of the layer's answer fell (else the old weights are back); None
        if there are no weights that are this layer's to tune.
    """
    way = _Way(stop)
    modules = [m for m in way.modules() if id(m) not in done]
    done |= {id(m) for m in way.modules()}
    parameters = [p for m in modules for p in m.parameters()]
    if not parameters:
        for _ in range(iterations):
            step()
        return None
    layer, walk, count = stop.layer, stop.walk, len(target)
    before = (stop.answer(target) - target).double().square().mean()
    old = [p.detach().clone() for p in parameters]
    required = [p.requires_grad for p in parameters]
    unit = units(stop, site)

    def shaped(value: Any) -> Tensor:
        value = torch.as_tensor(value, device=target.device)
        return per_channel_view(value, site.channel_dim, target.dim()).to(target.dtype)

    goal = target if unit is None else target / shaped(unit)
    threshold = shaped(layer.node.threshold).detach()
    weight = shaped(layer._weight()).detach()
    start = layer.node.v_init
    start = 0.5 * threshold if isinstance(start, str) else shaped(start).detach()
    bias = None if layer.node.bias is None else shaped(layer.node.bias)
    most = walk.T * (layer.node.max_spikes or 1)
    with torch.inference_mode(False), torch.enable_grad():
        # Copies: what inference mode made cannot be part of a gradient.
        goal, threshold, weight, start = (t.clone() for t in (goal, threshold, weight, start))
        bias = None if bias is None else bias.clone()
        for p in parameters:
            p.requires_grad_(True)
        adam = torch.optim.Adam(parameters, lr=lr)
        for i in range(iterations):
            adam.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * i / iterations))
            pick = torch.randperm(count, generator=draw)[:batch].to(target.device)
            z = way.current(pick)
            z = z if bias is None else z + bias
            answer = staircase(z, threshold, start, walk.T, most, weight)
            loss = (answer - goal[pick]).square().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            step()
    for p, require in zip(parameters, required, strict=True):
        p.grad = None
        p.requires_grad_(require)

    def anew() -> None:
        if way.prefix_nodes:
            walk.refresh()
        stop.forget()

    anew()
    better = bool((stop.answer(target) - target).double().square().mean() < before)
    if not better:
        with torch.no_grad():
            for p, value in zip(parameters, old, strict=True):
                p.copy_(value)
        anew()
    return better
