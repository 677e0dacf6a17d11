"""The signed neuron with several thresholds (DCGS, Huang et al., ICML 2025)."""

from __future__ import annotations

import pytest
import torch
from conversion_helpers import dyadic, images, make_dyadic
from torch import nn

from snnkernels import IFNode
from snnkernels.conversion import QCFS, ClipReLU, convert
from snnkernels.conversion.methods import MultiThreshold
from snnkernels.conversion.methods.multi_threshold import MultiThresholdActivation


def oracle(x, theta: float, n: int, v: float = 0.0):
    """One neuron, step by step: its spikes, and its membrane at the end."""
    total, out = 0.0, []
    for value in x:
        m, fired = v + value, 0.0
        for k in range(n):
            level = theta / 2**k
            if m >= 0.75 * level:
                fired = level
                break
            if m <= -0.75 * level and total >= level:
                fired = -level
                break
        v, total = m - fired, total + fired
        out.append(fired)
    return out, v


def run(x, theta: float = 1.0, n: int = 3) -> list[float]:
    node = IFNode(torch.tensor(theta), amplitude=torch.tensor(theta / 2 ** (n - 1)))
    layer = MultiThresholdActivation(node, "a", constant=False, counts=False, thresholds=n)
    return layer(torch.tensor(x, dtype=torch.float64)[:, None], len(x)).flatten().tolist()


@pytest.mark.parametrize(
    ("x", "spikes"),
    [
        # thresholds 1, 1/2, 1/4 fire from 3/4, 3/8, 3/16 on
        ([0.75], [1.0]),
        ([0.7], [0.5]),
        ([0.375], [0.5]),
        ([0.1875], [0.25]),
        ([0.18], [0.0]),
        # .3 -> 1/4; .35 -> 1/4; .4 -> 1/2; .2 -> 1/4
        ([0.3, 0.3, 0.3, 0.3], [0.25, 0.25, 0.5, 0.25]),
        # 1; 0 + 2 -> 1, 1 is left; 1 - 3 = -2 -> -1 (out: 1), -1 -> -1 (out: 0), 0
        ([1.0, 2.0, -3.0, 0.0, 0.0], [1.0, 1.0, -1.0, -1.0, 0.0]),
        # only 1/4 has been put out, so only 1/4 is taken back, and then nothing
        ([0.25, -2.0, 0.0], [0.25, -0.25, 0.0]),
        ([-5.0, -5.0], [0.0, 0.0]),
    ],
)
def test_hand_worked_spikes(x: list[float], spikes: list[float]) -> None:
    assert run(x) == spikes
    assert oracle(x, 1.0, 3)[0] == spikes


@pytest.mark.parametrize("n", [1, 2, 5])
def test_spikes_are_those_of_the_scalar_loop(n: int) -> None:
    x = dyadic(12, 60, seed=n, scale=16, low=-24, high=32).double()
    for i in range(60):
        currents = x[:, i].tolist()
        out, v = oracle(currents, 1.5, n)
        assert run(currents, 1.5, n) == out
        assert sum(out) >= 0  # the guard
        assert sum(currents) == sum(out) + v  # nothing is lost


@pytest.mark.parametrize("z", [0.0, 0.3, 0.9, 1.4, 1.9, 2.0])
def test_what_remains_when_the_current_stops_is_below_the_least_threshold(z: float) -> None:
    theta, n = 2.0, 6
    out, v = oracle([z] + [0.0] * 10, theta, n)
    assert abs(v) < 0.75 * theta / 2 ** (n - 1)
    assert run([z] + [0.0] * 10, theta, n) == out


def test_a_constant_current_is_said_to_a_third_of_a_step() -> None:
    theta, n, T = 2.0, 6, 8
    z = dyadic(64, 5, seed=3, scale=64, low=-64, high=128)
    snn = convert(nn.Sequential(nn.ReLU()), method=MultiThreshold(n), threshold=theta, T=T)
    error = (snn(z) - z.clamp(0, theta)).abs()
    # A spike leaves at most a third of the membrane, so at most half of the current remains.
    assert bool((error <= (z.clamp(0, theta) / 2 + theta / 2 ** (n - 1)) / T).all())
    first = (snn(z, T=1) - z.clamp(0, theta)).abs().max()
    assert first <= theta / 4  # one spike: the nearest power of two


@torch.no_grad()
@pytest.mark.parametrize("normalize", ["threshold", "weights"])
def test_a_network_comes_close_in_few_steps(normalize: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(8, 5),
    ).eval()  # fmt: skip
    x = images(16)
    snn = convert(net, x, method="multi_threshold", T=8, normalize=normalize, progress=False)
    assert snn.report["output"].error < 0.05
    assert 0 < snn.report["1"].rate <= 1
    binary = convert(net, x, method="opi", T=8, progress=False)
    assert snn.report["output"].error < 0.5 * binary.report["output"].error
    curve = snn.predict_curve(x, [1, 2, 8])
    for T, answer in curve.items():
        torch.testing.assert_close(answer, snn(x, T=T), rtol=1e-4, atol=1e-5)


def test_both_forms_of_thresholds_spike_the_same() -> None:
    net = make_dyadic(
        nn.Sequential(
            nn.Linear(3, 4), ClipReLU(2.0), nn.Linear(4, 3), ClipReLU(4.0), nn.Linear(3, 2)
        )
    ).eval()
    x = dyadic(6, 3)
    with torch.no_grad():
        one, other = (
            convert(net, method="multi_threshold", T=4, normalize=n)(x)
            for n in ("threshold", "weights")
        )
    assert torch.equal(one, other)


def test_per_channel_thresholds() -> None:
    theta = torch.tensor([1.0, 2.0, 4.0])
    snn = convert(nn.Sequential(nn.ReLU()), method=MultiThreshold(2), threshold=theta, T=1)
    x = torch.full((1, 3, 2, 2), 1.5)
    assert snn(x)[0, :, 0, 0].tolist() == [1.0, 2.0, 2.0]


def test_half_precision_keeps_its_state_in_float32() -> None:
    net = nn.Sequential(nn.ReLU())
    snn = convert(net, method="multi_threshold", threshold=1.0, T=64)
    x = torch.full((1, 1), 1 / 3)
    assert snn(x.half()).dtype == torch.float16
    assert snn(x.half()).item() == pytest.approx(1 / 3, abs=2e-3)


@pytest.mark.converted_only
def test_what_it_cannot_do_is_an_error() -> None:
    for wrong, error in ((0, ValueError), (17, ValueError), (2.0, TypeError)):
        with pytest.raises(error, match="thresholds"):
            MultiThreshold(wrong)
    snn = convert(nn.Sequential(nn.Linear(2, 2), QCFS(4, 1.0)), method="multi_threshold")
    with pytest.raises(ValueError, match="for inference"):
        snn(torch.ones(1, 2))
    assert any("not only 0 and 1" in note for note in snn.report.notes)
