"""Rate norm layers (Ding et al., IJCAI 2021)."""

from __future__ import annotations

import pytest
import torch
from conversion_helpers import dyadic
from torch import nn

import snnkernels
from snnkernels.conversion import ClipReLU, ConversionError, RateNorm
from snnkernels.conversion.methods import RNL


def rate_norm(theta: float) -> RateNorm:
    """One whose threshold is ``theta`` in float32, 1e-6 and all."""
    act = RateNorm(p="abs")
    act.running_max.fill_(theta - 1e-6)
    assert float(act.theta) == theta
    return act.eval()


def wires(*thetas: float) -> nn.Sequential:
    """Dyadic linear layers of four features with rate norms between them."""
    layers: list[nn.Module] = []
    for i, theta in enumerate(thetas):
        layers += [nn.Linear(4, 4), rate_norm(theta)]
        with torch.no_grad():
            layers[-2].weight.copy_(dyadic(4, 4, seed=i, scale=4, low=-4, high=8))
            layers[-2].bias.copy_(dyadic(4, seed=9 + i, scale=4, low=-2, high=2))
    layers.append(nn.Linear(4, 2))
    with torch.no_grad():
        layers[-1].weight.copy_(dyadic(2, 4, seed=20, scale=4))
        layers[-1].bias.zero_()
    return nn.Sequential(*layers).eval()


def test_neurons_are_those_of_the_paper() -> None:
    """Rate norm conversion: threshold theta, membranes from 0, spikes of weight 1, raw current."""
    snn = snnkernels.convert(wires(2.0, 4.0), method="rnl", T=8)
    for (_, layer), theta in zip(snn.neurons(), (2.0, 4.0), strict=True):
        node = layer.node
        assert float(node.v_threshold) == theta
        assert node.v_init == 0.0
        assert node.amplitude == 1.0
        assert node.v_reset is None
        assert node.input_scale is None


def test_answer_is_the_rates_by_a_float64_loop() -> None:
    """Two layers step by step: the second sees binary spikes through its own raw weights."""
    T, net = 8, wires(2.0, 4.0)
    snn = snnkernels.convert(net, method="rnl", T=T)
    x = dyadic(5, 4, seed=30)
    w0, w1, w2 = net[0].weight.double(), net[2].weight.double(), net[4].weight.double()
    b0, b1 = net[0].bias.double(), net[2].bias.double()
    v0 = torch.zeros(5, 4, dtype=torch.float64)
    v1, count = v0.clone(), v0.clone()
    for _ in range(T):
        v0 += x.double() @ w0.T + b0
        s0 = v0 >= 2.0
        v0 -= 2.0 * s0
        v1 += s0.double() @ w1.T + b1
        s1 = v1 >= 4.0
        v1 -= 4.0 * s1
        count += s1
    with torch.no_grad():
        assert torch.equal(snn(x).double(), (count / T) @ w2.T)


def test_rates_of_one_layer_are_the_floor_staircase_of_the_ann() -> None:
    """count / T = floor(T r) / T where the ANN's rate is r: never more, less by at most 1 / T."""
    T, net = 8, wires(2.0)
    snn = snnkernels.convert(net, method="rnl", T=T)
    x = dyadic(64, 4, seed=31)
    (_, layer), *_ = snn.neurons()
    with torch.no_grad():
        r = net[:2](x)
        layer.reset()
        layer.node.output = "spikes"
        found = (layer.node(net[0](x), T=T) != 0).float().mean(0)
    assert torch.equal(found, torch.floor(r * T) / T)


def test_half_a_threshold_composes() -> None:
    """OPI on top of it: v_init = theta / 2 halves the error of the rates' mean."""
    net = wires(2.0, 4.0)
    x = dyadic(256, 4, seed=32)
    with torch.no_grad():
        wanted = net(x)
        plain = snnkernels.convert(net, method="rnl", T=8)(x)
        half = snnkernels.convert(net, method="rnl", T=8, v_init="half")
        assert next(half.neurons())[1].node.v_init == "half"
        assert (half(x) - wanted).norm() < (plain - wanted).norm()


def test_folded_thresholds_are_the_same_network() -> None:
    net = wires(2.0, 4.0)
    x = dyadic(16, 4, seed=33)
    with torch.no_grad():
        a = snnkernels.convert(net, method="rnl", T=8)
        b = snnkernels.convert(net, method="rnl", T=8, normalize="weights")
        for T in (2, 8):
            assert torch.equal(a(x, T=T), b(x, T=T))


def test_no_data_is_needed_and_a_loader_measures() -> None:
    net = wires(2.0, 4.0)
    snn = snnkernels.convert(net, dyadic(16, 4, seed=34), method="rnl", T=64, progress=False)
    assert snn.report["1"].action == "RateNorm -> IF, θ learned"
    assert snn.report["1"].error < 0.05
    assert snn.report.rows[-1].error < 0.1


def test_other_methods_refuse_rates() -> None:
    """Trap: thresholds from data would be in units of rates, spikes would weigh θ."""
    for method in ("opi", "max", "srp", "datta"):
        with pytest.raises(ConversionError, match="is a RateNorm, which answers in rates"):
            snnkernels.convert(wires(2.0), dyadic(4, 4), method=method, progress=False)
    with pytest.raises(ConversionError, match="is a RateNorm"):
        snnkernels.convert(wires(2.0), method="opi", threshold=1.0)


def test_needs_rate_norms() -> None:
    net = nn.Sequential(nn.Linear(4, 4), ClipReLU(), nn.Linear(4, 2))
    with pytest.raises(ConversionError, match="needs RateNorm activations, this is ClipReLU"):
        snnkernels.convert(net, method="rnl")
    with pytest.raises(ConversionError, match="cannot be combined with method='rnl'"):
        snnkernels.convert(wires(2.0), method="rnl", threshold=1.0)
    with pytest.raises(ConversionError, match="cannot be combined with method='rnl'"):
        snnkernels.convert(wires(2.0), dyadic(4, 4), method=RNL(), threshold="max", progress=False)


def test_in_the_list() -> None:
    (row,) = [m for m in snnkernels.methods() if m["name"] == "rnl"]
    assert row["trains"] == "RateNorm"
    assert row["binary"]
