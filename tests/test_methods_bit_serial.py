"""Bit-serial conversion (Datta et al., 2023): T steps carry the T bits of an activation."""

from __future__ import annotations

import pytest
import torch
from conversion_helpers import Concat, Shortcut, dyadic, images, make_dyadic
from torch import nn

from snnkernels.conversion import QCFS, ConversionError, convert
from snnkernels.conversion.methods import BitSerial

EXAMPLES = [
    (1.1, "100", 1.0),
    (3.0, "111", 1.75),
    (-0.2, "000", 0.0),
    (0.875, "100", 1.0),
    (0.124, "000", 0.0),
    (0.125, "001", 0.25),
]
FORMS = [False, True]


def bits_of(snn, x: torch.Tensor) -> list[torch.Tensor]:
    """The planes ``[T, B, *]`` of every layer."""
    found: list[torch.Tensor] = []
    handles = [
        layer.register_forward_hook(
            lambda m, args, out: found.append(out.unflatten(0, (-1, len(x)))[1:] != 0)
        )
        for _, layer in snn.neurons()
    ]
    with torch.no_grad():
        snn(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(("z", "bits", "value"), EXAMPLES)
def test_worked_example_of_bit_serial(z: float, bits: str, value: float) -> None:
    """Worked example of bit-serial conversion: the planes, their value, and QCFS with 7 levels."""
    net = nn.Sequential(QCFS(7, 1.75))
    x = torch.tensor([[z]])
    unrolled = convert(net, method=BitSerial(unrolled=True), T=3)
    (planes,) = bits_of(unrolled, x)
    assert "".join(str(int(b)) for b in planes.flatten()) == bits
    assert unrolled(x).item() == value
    assert convert(net, method="bit_serial", T=3)(x).item() == value
    assert net(x).item() == value


def oracle(currents: list[float], bias: float, theta: float, T: int) -> list[int]:
    """Accumulate T planes by doubling, add the bias once, compare with halving thresholds."""
    z, D = 0.0, theta / (2**T - 1)
    for y in currents:
        z = 2 * z + y
    m, bits = z + bias + D / 2, []
    for t in range(1, T + 1):
        h = D * 2 ** (T - t)
        bits.append(int(m >= h))
        m -= h * bits[-1]
    return bits


def test_planes_are_accumulated_by_doubling_and_the_bias_acts_once() -> None:
    T = 3
    net = nn.Sequential(QCFS(7, 1.75), nn.Linear(5, 4), QCFS(7, 3.5))
    make_dyadic(net, seed=3)
    x = dyadic(6, 5, seed=4)
    first, second = bits_of(convert(net, method=BitSerial(unrolled=True), T=T), x)
    weight, bias = (p.detach().double() for p in net[1].parameters())
    for b in range(len(x)):
        for i in range(4):
            y = [float((weight[i] * 0.25 * first[t, b].double()).sum()) for t in range(T)]
            assert second[:, b, i].int().tolist() == oracle(y, float(bias[i]), 3.5, T)
    assert 0 < second.float().mean() < 1


class Deep(nn.Module):
    """Biases, batch norm, a shortcut, numbers and pools between neurons."""

    def __init__(self, L: int, theta: float) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.bn, self.skip = nn.BatchNorm2d(4), nn.Conv2d(3, 4, 1)
        self.act1, self.act2, self.act3 = QCFS(L, theta), QCFS(L, 2 * theta), QCFS(L, theta)
        self.pool, self.c, self.out = nn.AvgPool2d(2), nn.Linear(16, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.act1(self.a(x))
        h = self.act2(self.pool(self.bn(self.b(h)) + self.skip(x) + 0.25))
        return self.out(self.act3(self.c(h.flatten(1))))


@pytest.mark.parametrize("unrolled", FORMS)
@pytest.mark.parametrize("T", [1, 2, 3])
def test_both_forms_are_the_quantised_network_exactly(T: int, unrolled: bool) -> None:
    L = 2**T - 1
    for net, size in (
        (Deep(L, L / 4), 4), (Shortcut(L), 6), (Concat(L), 6),
    ):  # fmt: skip
        make_dyadic(net).eval()
        for act in net.modules():
            if isinstance(act, QCFS):  # L D with a dyadic D
                act.lam.data.fill_(L / 4)
        x = dyadic(5, 3, size, size, seed=1)
        expected = net(x)
        assert len(expected.unique()) > 1
        snn = convert(net, method=BitSerial(unrolled=unrolled), T=T)
        with torch.no_grad():
            assert torch.equal(snn(x), expected)


@pytest.mark.parametrize("normalize", ["threshold", "weights"])
def test_unrolled_planes_are_the_one_pass(normalize: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), QCFS(15, 2.0), nn.Conv2d(8, 8, 3), QCFS(15, 2.0), nn.Flatten(),
        nn.Linear(128, 5),
    ).eval()  # fmt: skip
    x = images(16)
    one = convert(net, method="bit_serial", T=4, normalize=normalize)
    many = convert(net, method=BitSerial(unrolled=True), T=4, normalize=normalize)
    with torch.no_grad():
        torch.testing.assert_close(many(x), one(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one(x), net(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("unrolled", FORMS)
@torch.no_grad()
def test_every_T_of_a_curve_is_a_pass_of_its_own(unrolled: bool) -> None:
    net = make_dyadic(Deep(7, 1.75)).eval()
    x = dyadic(2, 3, 4, 4, seed=3)
    snn = convert(net, method=BitSerial(unrolled=unrolled), T=3)
    curve = snn.predict_curve(x, [1, 3, 4])
    assert torch.equal(curve[3], net(x))
    for T, answer in curve.items():
        assert torch.equal(answer, snn(x, T=T))


@pytest.mark.parametrize("unrolled", FORMS)
def test_layers_that_wait_for_each_other_are_counted(unrolled: bool) -> None:
    net = make_dyadic(Deep(7, 1.75)).eval()
    snn = convert(net, dyadic(4, 3, 4, 4), method=BitSerial(unrolled=unrolled), T=3)
    assert snn.extra_steps == 2 * 3  # three layers on the longest path
    assert any("T=3 takes 9 steps" in note for note in snn.report.notes)
    assert 0 < snn.report["act1"].rate < 1
    assert snn.report["act1"].error == 0.0


def test_rates_are_ones_per_plane() -> None:
    # 1.1 is 100 and 3.0 is 111: four ones in six planes
    for unrolled in FORMS:
        x = torch.tensor([[1.1], [3.0]])
        snn = convert(nn.Sequential(QCFS(7, 1.75)), x, method=BitSerial(unrolled=unrolled), T=3)
        assert snn.report["0"].rate == pytest.approx(4 / 6)


def test_levels_that_were_not_trained_for_are_said() -> None:
    notes = " ".join(convert(nn.Sequential(QCFS(8, 2.0)), method="bit_serial", T=3).report.notes)
    assert "another number of levels than 7: 0 for 8" in notes


@pytest.mark.converted_only
def test_one_pass_has_gradients_planes_have_not() -> None:
    net = nn.Sequential(nn.Linear(2, 2), QCFS(7, 1.75))
    x = torch.ones(1, 2)
    snn = convert(net, method="bit_serial", T=3)
    snn(x).sum().backward()
    assert any(p.grad is not None for p in snn.parameters())
    with pytest.raises(ValueError, match="for inference"):
        convert(net, method=BitSerial(unrolled=True), T=3)(x)


def test_what_it_cannot_do_is_an_error() -> None:
    net = nn.Sequential(QCFS(7, 1.75))
    with pytest.raises(ValueError, match="v_init must be 'half'"):
        convert(net, method="bit_serial", v_init="zero", T=3)
    with pytest.raises(ValueError, match=r"v_init='mse' for 0: .* v_init must be 'half'"):
        convert(net, torch.rand(4, 1), method="bit_serial", v_init="mse", T=3)
    with pytest.raises(ValueError, match=r"T=25: .* takes T from 1 to 24"):
        convert(net, method="bit_serial", T=25)
    with pytest.raises(ValueError, match=r"T=32: .* takes T from 1 to 24"):
        convert(net, method="bit_serial", T=3)(torch.ones(1, 1), T=32)
    pooled = nn.Sequential(QCFS(7, 1.75), nn.Conv1d(2, 2, 1), nn.MaxPool1d(2), QCFS(7, 1.75))
    with pytest.raises(ConversionError, match="cannot max-pool"):
        convert(pooled, method=BitSerial(unrolled=True), T=3)
    x = dyadic(2, 2, 4)
    make_dyadic(pooled)
    with torch.no_grad():
        assert torch.equal(convert(pooled, method="bit_serial", T=3)(x), pooled(x))
