"""Searching threshold and spike weight together (Datta and Beerel, DATE 2022)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conversion_helpers import images
from torch import Tensor, nn

import snnkernels
from snnkernels.conversion import ClipReLU, ConversionError, datta_search
from snnkernels.conversion.methods import Datta

D = [0.02, 0.05, 0.08, 0.1, 0.15, 0.2, 0.3, 0.45, 0.7, 1.2]
TENS = range(0, 101, 10)


def loss(
    d: list[float], mu: float, T: int, alpha: float, beta: float, objective: str, start: float = 0.0
) -> float:
    """The objective by its definition, number by number."""
    total = 0.0
    for value in d:
        step = min(max(math.floor(T * value / (alpha * mu) + start), 0), T) / T
        difference = min(max(value, 0.0), mu) - beta * alpha * mu * step
        total += difference if objective == "abs_sum" else difference**2
    return abs(total) if objective == "abs_sum" else total / len(d)


def brute_force(
    d: list[float], mu: float, T: int, objective: str, percentiles: range, start: float = 0.0
) -> float:
    """The smallest objective there is."""
    found = [float(np.percentile(d, p)) for p in percentiles]
    return min(
        loss(d, mu, T, p / mu, b / 100, objective, start)
        for p in found
        if 0 < p <= mu
        for b in range(201)
    )


# ---- the search --------------------------------------------------------------------------------


def test_worked_example() -> None:
    """Worked example of Datta and Beerel: both objectives at T = 2, percentiles every 10."""
    d = torch.tensor(D, dtype=torch.float64)
    assert loss(D, 1.0, 2, 1.0, 1.0, "abs_sum") == pytest.approx(1.55)
    assert loss(D, 1.0, 2, 1.0, 1.0, "mse") == pytest.approx(0.04143, abs=5e-6)

    alpha, beta, found = datta_search(d, 1.0, 2, "abs_sum", TENS)
    assert (alpha, beta) == (0.5, 2.0)
    assert found == pytest.approx(0.05)
    assert loss(D, 1.0, 2, alpha, beta, "mse") == pytest.approx(0.02143, abs=5e-6)

    alpha, beta, found = datta_search(d, 1.0, 2, "mse", TENS)
    assert (alpha, beta) == (0.5, 1.66)
    assert found == pytest.approx(0.014205, abs=5e-7)
    assert loss(D, 1.0, 2, alpha, beta, "abs_sum") == pytest.approx(0.56)


@pytest.mark.parametrize("objective", ["abs_sum", "mse"])
@pytest.mark.parametrize("start", [0.0, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_better(objective: str, start: float, seed: int) -> None:
    d = torch.randn(40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    T, mu = 1 + seed, 0.9
    alpha, beta, found = datta_search(d, mu, T, objective, range(0, 101, 5), start)
    wanted = brute_force(d.tolist(), mu, T, objective, range(0, 101, 5), start)
    assert found == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    assert loss(d.tolist(), mu, T, alpha, beta, objective, start) == pytest.approx(found, abs=1e-9)


def test_percentiles_at_or_below_zero_and_above_mu_are_dropped() -> None:
    """Trap: P_j <= 0 is no threshold, P_j > mu no candidate."""
    d = torch.tensor([-3.0, -2.0, -1.0, 0.0, 0.25, 4.0], dtype=torch.float64)
    alpha, beta, _ = datta_search(d, 1.0, 2, "mse", [0, 40, 60, 80, 100])
    assert (alpha, beta) == (0.25, 2.0)


def test_nothing_to_fit() -> None:
    """Trap: empty and constant layers, and those without a positive current, are left alone."""
    for values in ([], [0.5], [0.5, 0.5], [-1.0, -2.0], [0.0, 0.0], [5.0, 6.0, 7.0]):
        d = torch.tensor(values, dtype=torch.float64)
        alpha, beta, found = datta_search(d, 1.0, 2)
        assert (alpha, beta) == (1.0, 1.0)
        assert found == pytest.approx(loss(values, 1.0, 2, 1.0, 1.0, "abs_sum"))


def test_refuses() -> None:
    d = torch.tensor(D)
    with pytest.raises(TypeError, match="values must be a floating-point tensor"):
        datta_search(D, 1.0, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mu must be positive"):
        datta_search(d, 0.0, 2)
    with pytest.raises(ValueError, match="T must be a whole number"):
        datta_search(d, 1.0, 0)
    with pytest.raises(ValueError, match="objective='l1' is unknown"):
        datta_search(d, 1.0, 2, "l1")
    with pytest.raises(ValueError, match="percentiles must be within"):
        datta_search(d, 1.0, 2, percentiles=[101])
    with pytest.raises(ValueError, match="start must be in"):
        datta_search(d, 1.0, 2, start=1.0)
    with pytest.raises(ValueError, match="values must be finite"):
        datta_search(d / 0, 1.0, 2)
    with pytest.raises(ValueError, match="datta: objective='l1' is unknown"):
        Datta(objective="l1")


# ---- the method --------------------------------------------------------------------------------


def currents_net(d: Tensor, act: nn.Module) -> tuple[nn.Sequential, Tensor]:
    """A network whose only currents are ``d``."""
    net = nn.Sequential(nn.Linear(1, 1, bias=False), act, nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        net[0].weight.fill_(1.0)
        net[2].weight.fill_(1.0)
    return net.eval(), d[:, None]


def node_of(snn: nn.Module, index: int = 0) -> nn.Module:
    return list(snn.neurons())[index][1].node


@pytest.mark.parametrize("objective", ["abs_sum", "mse"])
def test_layers_get_what_the_search_finds(objective: str) -> None:
    """θ = alpha mu, a spike weighs beta θ, membranes start at 0; mu is the learned ceiling."""
    net, x = currents_net(torch.tensor(D), ClipReLU(1.0))
    method = Datta(objective=objective)
    snn = snnkernels.convert(net, x, method=method, T=2, progress=False)
    alpha, beta, _ = datta_search(x, 1.0, 2, objective)
    node = node_of(snn)
    assert float(node.v_threshold) == pytest.approx(alpha, rel=1e-6)
    assert float(node.amplitude) == pytest.approx(beta * alpha, rel=1e-6)
    assert node.v_init == 0.0
    with torch.no_grad():
        answers = snn(x, T=2).flatten().tolist()
    for value, answer in zip(x.flatten().tolist(), answers, strict=True):
        step = min(max(math.floor(2 * value / alpha + 1e-6), 0), 2) / 2
        assert answer == pytest.approx(beta * alpha * step, rel=1e-5)


def test_negative_currents_count_in_percentiles() -> None:
    d = torch.randn(500, generator=torch.Generator().manual_seed(0))
    net, x = currents_net(d, ClipReLU(1.5))
    snn = snnkernels.convert(net, x, method="datta", T=4, progress=False)
    alpha, beta, _ = datta_search(d, 1.5, 4)
    assert float(node_of(snn).v_threshold) == pytest.approx(1.5 * alpha, rel=1e-4)
    assert float(node_of(snn).amplitude) == pytest.approx(1.5 * alpha * beta, rel=1e-4)


def test_plain_relu_has_the_largest_activation_as_ceiling() -> None:
    d = torch.randn(300, generator=torch.Generator().manual_seed(1)).abs()
    net, x = currents_net(d, nn.ReLU())
    snn = snnkernels.convert(net, x, method=Datta("mse"), T=3, progress=False)
    alpha, beta, _ = datta_search(d, float(d.max()), 3, "mse")
    assert float(node_of(snn).v_threshold) == pytest.approx(float(d.max()) * alpha, rel=1e-3)
    assert float(node_of(snn).amplitude / node_of(snn).v_threshold) == pytest.approx(
        beta, abs=0.011
    )


def conv_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        ClipReLU(2.0),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 6, 3, padding=1),
        ClipReLU(1.0),
        nn.AvgPool2d(4),
        nn.Flatten(),
        nn.Linear(6, 4),
    ).eval()


@pytest.mark.parametrize("objective", ["abs_sum", "mse"])
def test_every_layer_is_nearer_than_with_its_ceiling(objective: str) -> None:
    """In the objective of each layer, of the ANN's own currents."""
    net, x = conv_net(), images(32)
    snn = snnkernels.convert(net, x, method=Datta(objective), T=2, progress=False)
    with torch.no_grad():
        first = nn.functional.max_pool2d(net[0](x), 2).flatten()
        second = net[:4](x).flatten()
    for i, (d, mu) in enumerate(((first, 2.0), (second, 1.0))):
        theta, weight = float(node_of(snn, i).v_threshold), float(node_of(snn, i).amplitude)
        found = loss(d.tolist(), mu, 2, theta / mu, weight / theta, objective)
        assert found < loss(d.tolist(), mu, 2, 1.0, 1.0, objective)
        exact = datta_search(d, mu, 2, objective).loss
        assert found <= exact * 1.05 + (0.02 * len(d) if objective == "abs_sum" else 0)
    (note,) = [n for n in snn.report.notes if "α, β by layer" in n]
    assert "1 " in note


def test_mse_serves_few_steps() -> None:
    """At T = 2 the searched network is nearer to the ANN than one with its ceilings, from 0."""
    net, x = conv_net(), images(32)
    with torch.no_grad():
        wanted = net(x)
        searched = snnkernels.convert(net, x, method=Datta("mse"), T=2, progress=False)(x)
        plain = snnkernels.convert(net, method="opi", T=2, v_init="zero")(x)
    assert (searched - wanted).norm() < (plain - wanted).norm()


@pytest.mark.parametrize("v_init", ["half", "25%", 0.25])
def test_v_init_overrides_and_the_search_knows_it(v_init: object) -> None:
    d = torch.rand(400, generator=torch.Generator().manual_seed(2)) * 1.5
    net, x = currents_net(d, ClipReLU(1.0))
    snn = snnkernels.convert(net, x, method=Datta("mse"), T=2, v_init=v_init, progress=False)
    node = node_of(snn)
    theta, weight = float(node.v_threshold), float(node.amplitude)
    if v_init == "half":
        assert node.v_init == "half"
        start = 0.5
    else:
        start = 0.25 if v_init == "25%" else 0.25 / theta
        assert float(node.v_init) == pytest.approx(start * theta, rel=1e-6)
    plain = snnkernels.convert(net, x, method=Datta("mse"), T=2, progress=False)
    other, heavier = float(node_of(plain).v_threshold), float(node_of(plain).amplitude)
    found = loss(d.tolist(), 1.0, 2, theta, weight / theta, "mse", start)
    alone = 0.25 / other if v_init == 0.25 else start
    assert found <= loss(d.tolist(), 1.0, 2, other, heavier / other, "mse", alone) + 1e-6


def test_per_channel() -> None:
    net, x = conv_net(), images(16)
    how = {"method": Datta("mse"), "threshold": "max", "per_channel": True}
    snn = snnkernels.convert(net, x, T=4, progress=False, **how)
    node = node_of(snn)
    assert node.v_threshold.shape == node.amplitude.shape == (6,)
    with torch.no_grad():
        currents = nn.functional.max_pool2d(net[0](x), 2).movedim(1, 0).flatten(1)
    for d, theta, weight in zip(currents, node.v_threshold, node.amplitude, strict=True):
        mu = float(d.clamp(0, 2).max())
        found = loss(d.tolist(), mu, 4, float(theta) / mu, float(weight / theta), "mse")
        assert found <= datta_search(d, mu, 4, "mse").loss * 1.02


def test_folded_thresholds_are_the_same_network() -> None:
    net, x = conv_net(), images(8)
    with torch.no_grad():
        a = snnkernels.convert(net, x, method="datta", T=4, progress=False)(x)
        b = snnkernels.convert(net, x, method="datta", T=4, normalize="weights", progress=False)(x)
    assert torch.allclose(a, b, atol=1e-4)


def test_a_loader_that_is_read_once() -> None:
    net, x = conv_net(), images(8)
    once = snnkernels.convert(net, iter([x]), method="datta", T=2, progress=False)
    again = snnkernels.convert(net, [x], method="datta", T=2, progress=False)
    assert float(node_of(once).v_threshold) == float(node_of(again).v_threshold)


def test_silent_layer_keeps_its_ceiling() -> None:
    net, x = currents_net(torch.tensor([-1.0, -2.0]), ClipReLU(1.0))
    snn = snnkernels.convert(net, x, method="datta", T=2, progress=False)
    assert float(node_of(snn).v_threshold) == 1.0
    assert float(node_of(snn).amplitude) == 1.0


def test_combinations_that_cannot_be() -> None:
    net, x = currents_net(torch.tensor(D), ClipReLU(1.0))
    with pytest.raises(ValueError, match="method='datta' fits thresholds to currents"):
        snnkernels.convert(net, method="datta", T=2)
    with pytest.raises(ConversionError, match="v_init='mse' cannot be combined"):
        snnkernels.convert(
            net, x, method="datta", threshold="max", v_init="mse", T=2, progress=False
        )
