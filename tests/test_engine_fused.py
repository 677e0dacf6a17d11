"""Layers of plans in the form of the fused GPU kernel, by its plain PyTorch form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_engine import NETWORKS, exact
from torch import Tensor

from snnkernels.engine import lower
from snnkernels.engine.fused import FusedLayer
from snnkernels.engine.layers import SpikingLayer
from snnkernels.kernels.fused_conv import NotFusible
from snnkernels.kernels.spike_conv import SpikeMap


def dense(spikes: SpikeMap) -> Tensor:
    """As the GPU kernel reads them."""
    return spikes.dense(torch.uint8).permute(0, 1, 3, 4, 2).contiguous()


def layers_of(name: str, T: int) -> Any:
    """What each layer of a plan on CPUs read and gave: node, net, run, maps, statics, answer."""
    snn, x = exact(name)
    plan = lower(snn, without=["choose_convolution", "reuse_buffers"])
    plan(x, T=T)
    (built,) = plan._built.values()
    seen = []
    hooks = [
        module.register_forward_hook(lambda m, given, out: seen.append((m, given, out)))
        for module in built.body.modules()
        if isinstance(module, SpikingLayer)
    ]
    plan(x, T=T)
    for hook in hooks:
        hook.remove()
    for module, given, (spikes, counts) in seen:
        maps, statics = given[: len(module.sources)], given[len(module.sources) :]
        yield built, built.net[module.name], maps, statics, spikes, counts


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_same_spikes_where_sums_are_exact(name: str, dtype: torch.dtype) -> None:
    ran, refused = 0, []
    for built, node, maps, statics, spikes, counts in layers_of(name, T=9):
        built.run.T, built.run.ends = 9, (9,)
        try:
            layer = FusedLayer(built.net, node, built.run, dtype)
        except NotFusible as error:
            refused.append(str(error))
            continue
        by_name = {
            built.net.origin_of(term.source).name: m
            for term, m in zip(node.terms, maps, strict=True)
        }
        got, counted = layer([dense(by_name[s]) for s in layer.sources], statics)
        # The weights of these networks have few bits: none is lost in 16.
        assert torch.equal(layer.layer.weight.double(), layer._main.weight.permute(0, 2, 3, 1))
        assert (got is None) == (spikes is None)
        if got is not None:
            assert torch.equal(got, dense(spikes)), node.name
        assert (counted is None) == (counts is None)
        if counted is not None:
            assert torch.equal(counted, counts), node.name
        ran += 1
    assert ran
    assert set(refused) <= {
        "a cumulative max-pool lies between the sum and the neurons", "it has no convolution",
        "groups=4; only convolutions with groups=1 are fused",
    }, refused  # fmt: skip


def first(name: str) -> Any:
    """A layer that is fused: net, run, node."""
    for built, node, *_ in layers_of(name, T=2):
        if any(not term.each for term in node.terms) and node.side == 1:
            return built.net, built.run, node
    raise AssertionError(name)


def test_counts_at_several_times_come_from_the_spikes() -> None:
    for built, node, maps, statics, _, counts in layers_of("mlp", T=9):
        if counts is None:
            continue
        built.run.T, built.run.ends = 9, (2, 9)
        layer = FusedLayer(built.net, node, built.run, torch.float16)
        spikes, found = layer([dense(m) for m in maps], statics)
        assert spikes is None
        assert found.shape == (2, *counts.shape[1:])
        assert torch.equal(found[1], counts[0])
        assert bool((found[0] <= found[1]).all())
        return
    raise AssertionError("no layer counts")


def test_why_a_layer_is_not_fused() -> None:
    net, run, node = first("vgg average")
    (term,) = node.terms
    changes: list[tuple[str, dict[str, Any]]] = [
        ("cumulative max-pool", {"side": 2}),
        ("no convolution", {"terms": []}),
        ("groups=2", {"terms": [replace(term, groups=2)]}),
        ("more spikes than one value", {"terms": [replace(term, pool=(16, 16))]}),
        ("beyond torch.float16", {"terms": [replace(term, weight=term.weight * 1e9)]}),
        ("threshold of shape", {"neurons": replace(node.neurons, threshold=torch.ones(2, 3, 4))}),
    ]
    for says, change in changes:
        with pytest.raises(NotFusible, match=says):
            FusedLayer(net, replace(node, **change), run, torch.float16)
    with pytest.raises(ValueError, match=r"dtype=torch\.float32"):
        FusedLayer(net, node, run, torch.float32)
