"""Our thresholds and neurons inside SpikingJelly's converter; imports SpikingJelly."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import base
from spikingjelly.activation_based.ann2snn.recipes import FXConversionRecipe, step_mode_adapters
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..conversion.calibration import Statistics, batches, parse_rule, rule_threshold
from ..conversion.channels import channels_of
from ..conversion.graphs import add_module, first_input, module_of, place_module
from ..conversion.ops import MAX_POOL_MODULES
from ..conversion.pools import CumulativeMaxPool
from ..joined import Between
from ..neurons import IFNode

__all__ = ["CumulativePool", "OPIRecipe", "RecipeNode"]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_RELU_CALLS = (F.relu, F.relu_, torch.relu, torch.relu_)
_RELU_METHODS = ("relu", "relu_")
# Which modules SpikingJelly turns into its own for many steps.
_STATELESS = tuple(source for source, _ in step_mode_adapters._STEP_MODULE_TYPES)


class RecipeNode(IFNode, Between, base.MemoryModule):
    """Our neuron, and a module with step modes and memory for SpikingJelly, which looks at classes.

    Such a class is made here alone: an IFNode is the same whether SpikingJelly is there or not.
    """


class CumulativePool(CumulativeMaxPool, Between, base.MemoryModule):
    """Our max-pool of running sums with SpikingJelly's step modes; reset it before each batch."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__(pool)
        self.step_mode = "s"

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """``[B, *in]`` (step mode ``"s"``) or ``[T, B, *in]`` to the same with ``*out``."""
        if self.step_mode == "s":
            return super().forward(x, 1)
        pooled = super().forward(x.flatten(0, 1), len(x))
        return pooled.unflatten(0, (len(x), -1))


class OPIRecipe(FXConversionRecipe):
    """See :func:`snnkernels.interop.spikingjelly.recipe`."""

    def __init__(
        self,
        dataloader: Iterable[Any],
        *,
        T: int = 16,
        threshold: str = "mmse",
        per_channel: bool = True,
        v_init: float | str = "half",
    ) -> None:
        if isinstance(T, bool) or not isinstance(T, int) or T < 1:
            raise ValueError(f"T={T!r} must be an int of at least 1")
        if not isinstance(threshold, str) or not isinstance(parse_rule(threshold), (str, float)):
            raise ValueError(
                f"threshold={threshold!r}: allowed here are 'mmse', 'max', 'kl' and percentiles "
                "such as '99.9%'; snnkernels.convert knows the others"
            )
        if v_init != "half" and not (isinstance(v_init, (int, float)) and 0 <= v_init < 1):
            raise ValueError(f"v_init={v_init!r} must be 'half' or a part of θ in [0, 1)")
        self.dataloader, self.T, self.threshold = dataloader, T, threshold
        self.per_channel = per_channel
        self.part = 0.5 if isinstance(v_init, str) else float(v_init)
        self.sites: dict[str, Statistics] = {}

    def validate(self, converter: Any) -> None:
        """Checks that there is something to calibrate on."""
        if self.dataloader is None:
            raise ValueError("dataloader is None: thresholds need calibration data")

    def before_trace(self, converter: Any, ann: nn.Module) -> nn.Module:
        """Evaluation mode; the converter puts the network's own back."""
        return ann.eval()

    def after_trace(self, converter: Any, fx_model: fx.GraphModule) -> fx.GraphModule:
        """A copy in which batch normalisation is folded and every ReLU is a module of its own."""
        net = copy.deepcopy(fx_model)
        for node in list(net.graph.nodes):
            _fold(net, node)
            _own_relu(net, node)
        _pools_first(net)
        return _made(net)

    def calibrate(self, converter: Any, fx_model: fx.GraphModule) -> fx.GraphModule:
        """Histograms of every ReLU's output."""
        self.sites = {}
        memo: dict[Any, Any] = {}
        handles = []
        for node in fx_model.graph.nodes:
            relu = module_of(fx_model, node)
            if type(relu) is nn.ReLU:
                dim, _ = channels_of(fx_model, first_input(node), memo)
                handles.append(relu.register_forward_hook(self._watch(str(node.target), dim)))
        try:
            for x in batches(self.dataloader, torch.device(converter.device)):
                fx_model(x)
        finally:
            for handle in handles:
                handle.remove()
        return fx_model

    def _watch(self, path: str, channel_dim: int) -> Any:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            if path not in self.sites:
                self.sites[path] = Statistics(out.shape, out.dtype, channel_dim)
            self.sites[path].update(path, out, self.per_channel)

        return hook

    def replace(self, converter: Any, fx_model: fx.GraphModule) -> fx.GraphModule:
        """A neuron for every ReLU, SpikingJelly's layers for the others."""
        for path, seen in self.sites.items():
            assert seen.histogram is not None
            theta, _, _ = rule_threshold(self.threshold, seen.histogram, self.T, self.part)
            theta = theta.float() if self.per_channel else theta.float().reshape(())
            v_init: Any = "half" if self.part == 0.5 else self.part * theta
            node = RecipeNode(
                theta,
                step_mode="s",
                v_init=v_init,
                amplitude="threshold",
                channel_dim=seen.channel_dim if self.per_channel else None,
            )
            fx_model.set_submodule(path, node.to(converter.device))
        for graph_node in fx_model.graph.nodes:
            pool = module_of(fx_model, graph_node)
            if isinstance(pool, MAX_POOL_MODULES):
                if pool.return_indices:
                    raise ValueError(f"{graph_node.target}: max-pool with return_indices=True")
                new = CumulativePool(pool)
                graph_node.target = place_module(fx_model, fx_model.graph, graph_node, new)
        if not self.sites:
            raise ValueError("there is no ReLU in this network, or the dataloader is empty")
        return step_mode_adapters.adapt_step_mode_graph(
            fx_model,
            context="snnkernels' recipe",
            wrap_module_types=_STATELESS,
            safe_call_functions=(F.dropout,),
        ).to(converter.device)


def _made(net: fx.GraphModule) -> fx.GraphModule:
    net.graph.lint()
    net.delete_all_unused_submodules()
    net.recompile()
    return net


def _fold(net: fx.GraphModule, node: fx.Node) -> None:
    """Batch normalisation after a convolution that feeds nothing else; others stay as they are."""
    bn = module_of(net, node)
    if not isinstance(bn, nn.modules.batchnorm._BatchNorm) or bn.running_mean is None:
        return
    before = first_input(node)
    layer = module_of(net, before)
    if not isinstance(layer, _CONVS) or len(before.users) != 1:
        return
    before.target = place_module(net, net.graph, before, fuse_conv_bn_eval(layer, bn))
    node.replace_all_uses_with(before)
    net.graph.erase_node(node)


def _own_relu(net: fx.GraphModule, node: fx.Node) -> None:
    """A ReLU module for this call alone."""
    called = type(module_of(net, node)) is nn.ReLU
    function = node.op == "call_function" and node.target in _RELU_CALLS
    method = node.op == "call_method" and node.target in _RELU_METHODS
    if not (called or function or method):
        return
    count = len(list(net.spiking.children())) if hasattr(net, "spiking") else 0  # type: ignore[union-attr]
    path = add_module(net, f"spiking.{count}", nn.ReLU())
    with net.graph.inserting_before(node):
        relu = net.graph.call_module(path, (first_input(node),))
    node.replace_all_uses_with(relu)
    net.graph.erase_node(node)


def _pools_first(net: fx.GraphModule) -> None:
    """Max-pools before the ReLU they follow, which is the same: they take currents, not spikes."""
    for node in list(net.graph.nodes):
        if not isinstance(module_of(net, node), MAX_POOL_MODULES):
            continue
        before = first_input(node)
        if type(module_of(net, before)) is nn.ReLU and len(before.users) == 1:
            current = first_input(before)
            node.replace_all_uses_with(before)
            node.args = (current, *node.args[1:])
            before.args = (node,)
            node.append(before)
