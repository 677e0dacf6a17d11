"""Max-pooling in a spiking network: where it goes and what it computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from ..maps import pool_geometry, pool_steps
from .errors import ConversionError
from .graphs import add_module, first_input, module_of
from .ops import MAX_POOL_MODULES, Activation
from .steps import Clock

__all__ = ["MAXPOOL_MODES", "CumulativeMaxPool", "average_instead", "check_pools", "pools_first"]

MAXPOOL_MODES = ("cumulative", "pre_spike", "avg")


class CumulativeMaxPool(nn.Module):
    """Max-pool whose output, averaged over time, is the maximum of the averaged inputs.

    With ``S_i(t)`` the running sum of current i, step t gives ``max_i S_i(t) - max_i S_i(t-1)``:
    the sum over any number of steps telescopes to ``max_i S_i``, so the
    pooled mean is exact at every T. The maximum of the currents themselves stays wrong for ever
    when the currents come from spikes. The running sum is carried from call to call until
    :meth:`reset`; it is kept in float32 for 16-bit currents.

    Args:
        pool: an ``nn.MaxPool*d`` or ``nn.AdaptiveMaxPool*d``; its padding (-inf) takes no part.
        clock: of the network; rows before those that answer are a run of their own.

    Shape: ``[T * B, *in]`` to ``[T * B, *out]``, floating point.
    """

    total: Tensor | None
    peak: Tensor | None

    def __init__(self, pool: nn.Module, clock: Clock | None = None) -> None:
        super().__init__()
        self.pool = pool
        self.clock = Clock() if clock is None else clock
        self.reset()

    def reset(self) -> None:
        """Forget the running sums."""
        self.total = None
        self.peak = None

    def forward(self, x: Tensor, T: int) -> Tensor:
        """Pool T steps of currents."""
        steps = x.reshape(T, x.shape[0] // T, *x.shape[1:])
        before = self.clock.steps.before
        if self.clock.steps.bias != "every":
            pooled = self._pooled(self.clock.currents(steps))
            return torch.cat([torch.zeros_like(pooled[:1]), pooled]).flatten(0, 1)
        if not before:
            return self._pooled(steps).flatten(0, 1)
        probe = self._pooled(steps[:before])
        self.reset()
        return torch.cat([probe, self._pooled(steps[before:])]).flatten(0, 1)

    def _pooled(self, steps: Tensor) -> Tensor:
        if isinstance(self.pool, nn.MaxPool2d) and steps.dim() == 5:
            p = self.pool
            window = pool_geometry(p.kernel_size, p.stride, p.padding, p.dilation)
            kernel, stride, padding, dilation = window
            out, self.total, self.peak = pool_steps(
                steps, kernel, stride, padding, dilation, p.ceil_mode, self.total, self.peak, True
            )
        else:
            out = self._by_torch(steps)
        return out

    def _by_torch(self, steps: Tensor) -> Tensor:
        wide = steps.float() if steps.dtype in (torch.float16, torch.bfloat16) else steps
        # Step after step in order, so that a run cut into pieces gives the same bits.
        total = wide[0] if self.total is None else self.total + wide[0]
        totals = [total]
        for step in wide[1:]:
            total = total + step
            totals.append(total)
        peaks = self.pool(torch.stack(totals).flatten(0, 1))
        peaks = peaks.reshape(len(steps), -1, *peaks.shape[1:])
        before = torch.zeros_like(peaks[:1]) if self.peak is None else self.peak[None]
        out = peaks - torch.cat([before, peaks[:-1]])
        self.total, self.peak = total, peaks[-1]
        return out.to(steps.dtype)


def check_pools(net: nn.Module, graph: fx.Graph) -> None:
    """Refuse max-pools that return indices.

    Raises:
        ConversionError: names the pool.
    """
    for node in graph.nodes:
        pool = module_of(net, node)
        if isinstance(pool, MAX_POOL_MODULES) and pool.return_indices:
            raise ConversionError(
                f"{node.target}: max-pool with return_indices=True has no spiking form; "
                "unpooling by indices cannot be converted"
            )


def average_instead(net: nn.Module, graph: fx.Graph) -> list[str]:
    """Replace every max-pool by the average pool of the same windows; returns their paths.

    Source: OPI and QCFS replace max-pools this way before training. Padding takes no part in the
    average, as it takes none in the maximum.

    Raises:
        ConversionError: a dilated max-pool, which has no average counterpart.
    """
    done = []
    for node in graph.nodes:
        pool = module_of(net, node)
        if not isinstance(pool, MAX_POOL_MODULES):
            continue
        rank = int(type(pool).__name__[-2])
        if type(pool).__name__.startswith("Adaptive"):
            kind = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[rank - 1]
            new: nn.Module = kind(pool.output_size)  # type: ignore[arg-type]
        else:
            if pool.dilation not in (1, (1,) * rank):
                raise ConversionError(
                    f"{node.target}: a dilated max-pool has no average counterpart; use "
                    "maxpool='cumulative'"
                )
            average = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[rank - 1]
            new = average(
                pool.kernel_size,  # type: ignore[arg-type]
                pool.stride,  # type: ignore[arg-type]
                pool.padding,  # type: ignore[arg-type]
                ceil_mode=bool(pool.ceil_mode),
                count_include_pad=False,
            )
        net.set_submodule(str(node.target), new)
        done.append(str(node.target))
    return done


def pools_first(net: nn.Module, graph: fx.Graph) -> list[str]:
    """Turn activation -> max-pool into max-pool -> activation; returns the pools that moved.

    An activation never decreases, so both orders compute the same ANN. Pools move up through
    concatenation along channels as well. An activation whose un-pooled output is used elsewhere
    stays for those users and gets a copy behind the pool.
    """
    moved: list[str] = []
    again = True
    while again:
        again = False
        for node in list(graph.nodes):
            if not isinstance(module_of(net, node), MAX_POOL_MODULES):
                continue
            source = first_input(node)
            if isinstance(module_of(net, source), Activation):
                _swap(net, graph, node, source)
            elif _concatenates_activations(net, source):
                _distribute(graph, node, source)
            else:
                continue
            name = str(node.target)
            if name not in moved:
                moved.append(name)
            again = True
            break
    return moved


def _swap(net: nn.Module, graph: fx.Graph, pool: fx.Node, activation: fx.Node) -> None:
    """activation -> pool becomes pool -> a copy of the activation."""
    path = str(activation.target)
    if len(activation.users) > 1:
        old = net.get_submodule(path)
        assert isinstance(old, Activation)
        path = add_module(net, f"{path}_pooled", Activation(old.inner, f"{old.label}_pooled"))
    with graph.inserting_before(pool):
        current = graph.call_module(str(pool.target), (activation.args[0],))
        after = graph.call_module(path, (current,))
    pool.replace_all_uses_with(after)
    graph.erase_node(pool)
    if not activation.users:
        graph.erase_node(activation)


def _concatenates_activations(net: nn.Module, node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    if node.target not in (torch.cat, torch.concat, torch.concatenate):
        return False
    dim = node.kwargs.get("dim", node.kwargs.get("axis", node.args[1] if node.args[1:] else 0))
    parts = node.args[0] if node.args else node.kwargs["tensors"]
    if not isinstance(parts, (list, tuple)):
        return False  # what another operation returned, such as the pieces of a chunk
    # Along channels only: along a pooled dimension the windows would not be the same.
    return bool(dim == 1) and all(_ends_in_activation(net, part) for part in parts)


def _ends_in_activation(net: nn.Module, node: Any) -> bool:
    return isinstance(module_of(net, node), Activation) or _concatenates_activations(net, node)


def _distribute(graph: fx.Graph, pool: fx.Node, cat: fx.Node) -> None:
    """pool(cat(a, b)) becomes cat(pool(a), pool(b))."""
    parts = cat.args[0] if cat.args else cat.kwargs["tensors"]
    with graph.inserting_before(pool):
        pooled = [graph.call_module(str(pool.target), (p,)) for p in parts]  # type: ignore
        new = graph.call_function(torch.cat, (pooled, 1))
    pool.replace_all_uses_with(new)
    graph.erase_node(pool)
    if not cat.users:
        graph.erase_node(cat)
