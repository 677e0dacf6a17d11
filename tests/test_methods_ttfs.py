"""Time to first spike, in windows (the family of LC-TTFS): one spike per neuron."""

from __future__ import annotations

import math

import pytest
import torch
from conversion_helpers import Concat, Shortcut, dyadic, make_dyadic
from torch import nn

from snnkernels.conversion import QCFS, convert
from snnkernels.conversion.methods import TTFS
from snnkernels.conversion.methods.ttfs import TTFSActivation


def first_layer(snn) -> TTFSActivation:
    return next(layer for _, layer in snn.neurons())


def oracle(z: float, theta: float, T: int, rounded: bool) -> int:
    """The first t at which the falling threshold is reached; T for never."""
    for t in range(T):
        if z + (theta / (2 * T) if rounded else 0.0) >= theta * (T - t) / T:
            return t
    return T


def test_worked_example_of_ttfs() -> None:
    """Worked example of the windowed time-to-first-spike form: times, values, next layer."""
    net = nn.Sequential(QCFS(8, 1.0), nn.Linear(4, 1, bias=False), QCFS(8, 1.0))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[0.5, -0.25, 1.0, 3.0]]))
    a = torch.tensor([[1.0, 0.5, 0.13, 0.0]])
    snn = convert(net, method=TTFS(round=False), T=8)
    one, two = (layer for _, layer in snn.neurons())
    with torch.no_grad():
        answer = snn(a)
        one.clock.levels = 8
        assert one.times(a).tolist() == [[0, 4, 7, 8]]
        values = one(a, 1)
        assert values.tolist() == [[1.0, 0.5, 0.125, 0.0]]
        z = values @ net[1].weight.T
        assert z.item() == 0.5
        assert two.times(z).item() == 4
    assert answer.item() == 0.5


def test_products_on_times_are_sums_of_potentials_over_the_window() -> None:
    T, theta = 8, 2.0
    weight, bias = dyadic(3, 5, seed=2).double(), dyadic(3, seed=3).double()
    times = [[oracle(float(z), theta, T, False) for z in row] for row in dyadic(4, 5, seed=1)]
    snn = convert(nn.Sequential(nn.ReLU()), method=TTFS(round=False), threshold=theta, T=T)
    values = snn(dyadic(4, 5, seed=1)).double()
    for row, value in zip(times, values, strict=True):
        z = bias.clone()
        for step in range(T):  # a spike adds θ / T at its step and all later ones
            for j, t in enumerate(row):
                if step >= t:
                    z += weight[:, j] * theta / T
        assert torch.equal(z, bias + weight @ value)


@pytest.mark.parametrize("rounded", [True, False])
def test_the_code_is_a_staircase_of_T_levels(rounded: bool) -> None:
    theta, T = 2.0, 8
    z = dyadic(64, 5, seed=3, scale=32, low=-32, high=96)
    snn = convert(nn.Sequential(nn.ReLU()), method=TTFS(round=rounded), threshold=theta, T=T)
    c = 0.5 if rounded else 0.0
    assert torch.equal(snn(z), theta * torch.clamp(torch.floor(z * T / theta + c), 0, T) / T)
    layer = first_layer(snn)
    layer.clock.levels = T
    times = layer.times(z)
    assert times.flatten().tolist() == [oracle(v, theta, T, rounded) for v in z.flatten().tolist()]


@pytest.mark.parametrize(
    ("make", "normalize"),
    [(Shortcut, "threshold"), (Shortcut, "weights"), (Concat, "threshold")],
)
def test_rounded_it_is_the_quantised_network(make, normalize: str) -> None:
    first = make(8)
    size = 9 * (4 if make is Shortcut else 6)
    net = nn.Sequential(first, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(size, 6), QCFS(8, 16.0))
    x = dyadic(3, 3, 6, 6, seed=1)
    make_dyadic(net).eval()
    snn = convert(net, x, method="ttfs", T=8, normalize=normalize, progress=False)
    expected = net(x)
    assert len(expected.unique()) > 3
    assert torch.equal(snn(x), expected)


def test_per_channel_thresholds() -> None:
    theta = torch.tensor([1.0, 2.0, 4.0])
    snn = convert(nn.Sequential(nn.ReLU()), method="ttfs", threshold=theta, T=4)
    z = dyadic(5, 3, 2, 2, seed=5, scale=4)
    t = theta[:, None, None]
    assert torch.equal(snn(z), t * torch.clamp(torch.floor(z * 4 / t + 0.5), 0, 4) / 4)


def test_windows_are_counted_as_extra_steps() -> None:
    net = nn.Sequential(QCFS(8, 1.0), nn.Linear(3, 3), QCFS(8, 1.0), nn.Linear(3, 2))
    x = torch.rand(8, 3, generator=torch.Generator().manual_seed(0))
    snn = convert(net, x, method="ttfs", T=8, progress=False)
    assert snn.extra_steps == 2 * 8  # (layers + 1) T in all
    assert snn.latency() == 24
    assert snn.latency(4) == 12
    assert any("T=8 takes 24 steps" in note for note in snn.report.notes)
    assert snn.report["0"].rate <= 1 / 8
    assert snn.report["0"].error < 0.1


@torch.no_grad()
def test_every_T_is_a_pass_of_its_own() -> None:
    net = make_dyadic(nn.Sequential(nn.Linear(3, 4), QCFS(4, 2.0), nn.Linear(4, 2)))
    x = dyadic(5, 3)
    snn = convert(net, method="ttfs", T=4)
    curve = snn.predict_curve(x, [2, 4, 256])
    assert torch.equal(curve[4], net(x))
    for T, answer in curve.items():
        assert torch.equal(answer, snn(x, T=T))


@pytest.mark.converted_only
def test_gradients_are_those_of_the_staircase() -> None:
    net = make_dyadic(nn.Sequential(nn.Linear(3, 4), QCFS(8, 2.0), nn.Linear(4, 2)))
    x = dyadic(5, 3)
    snn = convert(net, method="ttfs", T=8)
    found = snn(x)
    with torch.no_grad():
        assert torch.equal(found, snn(x))  # answers do not depend on the gradient mode
    found.sum().backward()
    net(x).sum().backward()
    gradients = [p.grad for p in snn.parameters() if p.grad is not None]
    for grad in (net[0].weight.grad, net[2].weight.grad):
        assert any(g.shape == grad.shape and torch.allclose(g, grad) for g in gradients)


def test_edges_never_and_at_once() -> None:
    snn = convert(nn.Sequential(nn.ReLU()), method=TTFS(round=False), threshold=1.0, T=4)
    x = torch.tensor([[-1.0, 0.0, 0.2499, 0.25, 1.0, 5.0, math.inf, math.nan]])
    assert snn(x).tolist() == [[0.0, 0.0, 0.0, 0.25, 1.0, 1.0, 1.0, 0.0]]


def test_what_it_cannot_do_is_an_error() -> None:
    net = nn.Sequential(QCFS(8, 1.0))
    for method in ("ttfs", TTFS(round=False)):
        with pytest.raises(ValueError, match=r"v_init=.* for 0 must be left to"):
            convert(net, method=method, v_init="25%")
        with pytest.raises(ValueError, match="v_init='mse' for 0 must be left to"):
            convert(net, torch.rand(4, 1), method=method, v_init="mse")
    with pytest.raises(TypeError, match="round"):
        TTFS(round=1)
    with pytest.raises(ValueError, match="T from 1 to 32767"):
        convert(net, method="ttfs", T=8)(torch.ones(1, 1), T=2**15)
