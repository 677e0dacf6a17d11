"""One layer at a time: bit-exact against QCFS, worked examples of the methods' papers."""

from __future__ import annotations

import pytest
import torch
from conversion_helpers import Concat, Shortcut, dyadic, make_dyadic
from torch import nn

from snnkernels.conversion import QCFS, ClipReLU, convert

STEPS = [4, 8, 16]


def layer(kind: str, T: int) -> tuple[nn.Module, torch.Tensor]:
    """A network of one layer and its activation, and an input; all numbers dyadic."""
    act = QCFS(T, 2.0)
    x = dyadic(3, 3, 6, 6, seed=1)
    nets: dict[str, tuple[nn.Module, torch.Tensor]] = {
        "none": (nn.Sequential(act), x),
        "conv2d": (nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), act), x),
        "no bias": (nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), act), x),
        "grouped": (nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), act), x),
        "dilated, strided": (nn.Sequential(nn.Conv2d(3, 4, 2, stride=2, dilation=2), act), x),
        "conv1d": (nn.Sequential(nn.Conv1d(3, 4, 3), act), x.flatten(2)),
        "conv3d": (nn.Sequential(nn.Conv3d(3, 4, 3), act), dyadic(2, 3, 4, 4, 4)),
        "transposed": (nn.Sequential(nn.ConvTranspose2d(3, 4, 3, 2, 1, 1), act), x),
        "linear": (nn.Sequential(nn.Linear(6, 7), act), dyadic(16, 6, seed=2)),
        "conv + bn": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), act), x),
        "bn without bias": (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), act),
            x,
        ),
        "grouped + bn": (
            nn.Sequential(nn.Conv2d(3, 6, 3, groups=3, bias=False), nn.BatchNorm2d(6), act),
            x,
        ),
        "dilated + bn": (
            nn.Sequential(nn.Conv2d(3, 6, 2, dilation=2), nn.BatchNorm2d(6), act),
            x,
        ),
        "transposed + bn": (
            nn.Sequential(nn.ConvTranspose2d(3, 6, 2, groups=3), nn.BatchNorm2d(6), act),
            x,
        ),
        "conv1d + bn": (nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), act), x.flatten(2)),
        "conv3d + bn": (
            nn.Sequential(nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4), act),
            dyadic(2, 3, 3, 3, 3),
        ),
        "linear + bn": (
            nn.Sequential(nn.Flatten(), nn.Linear(108, 7, bias=False), nn.BatchNorm1d(7), act),
            x / 16,
        ),
        "bn alone": (nn.Sequential(nn.BatchNorm2d(3), act), x),
        "avg pool": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(2), act), x),
        "adaptive pool": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(2), act), x / 4),
        "max pool": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), act), x),
        "max pool after": (nn.Sequential(nn.Conv2d(3, 4, 3), act, nn.MaxPool2d(3, 2, 1)), x),
        "residual": (Shortcut(T), x),
        "concat": (Concat(T), x),
    }
    net, x = nets[kind]
    return make_dyadic(net).eval(), x


KINDS = [
    *("none", "conv2d", "no bias", "grouped", "dilated, strided", "conv1d", "conv3d", "transposed"),
    *("linear", "conv + bn", "bn without bias", "grouped + bn", "dilated + bn", "transposed + bn"),
    *("conv1d + bn", "conv3d + bn", "linear + bn", "bn alone", "avg pool", "adaptive pool"),
    *("max pool", "max pool after", "residual", "concat"),
]


@pytest.mark.parametrize("T", STEPS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_layer_equals_qcfs_bit_for_bit(kind: str, T: int) -> None:
    net, x = layer(kind, T)
    snn = convert(net, method="qcfs", T=T)
    expected = net(x)
    assert len(expected.unique()) > 2  # the case says something
    assert torch.equal(snn(x), expected)


@pytest.mark.parametrize(
    ("z", "a"),
    [(-0.3, 0.0), (0.2, 0.0), (0.25, 0.5), (0.9, 1.0), (1.74, 1.5), (1.75, 2.0), (2.5, 2.0)],
)
def test_qcfs_worked_example(z: float, a: float) -> None:
    net = nn.Sequential(QCFS(levels=4, ceiling=2.0))
    x = torch.tensor([[z]])
    assert net(x).item() == a
    assert convert(net, method="qcfs", T=4)(x).item() == a


@pytest.mark.parametrize(
    ("x", "T", "start", "spikes"),
    [
        (0.3125, 8, 0.0, [0, 0, 0, 1, 0, 0, 1, 0]),
        (0.3125, 8, "half", [0, 1, 0, 0, 1, 0, 0, 1]),
        (1.25, 4, "half", [1, 1, 1, 1]),
        (-0.25, 4, "half", [0, 0, 0, 0]),
        (0.125, 4, "half", [0, 0, 0, 1]),
    ],
)
def test_opi_worked_example(x: float, T: int, start: float | str, spikes: list[int]) -> None:
    snn = convert(nn.Sequential(nn.ReLU()), threshold=1.0, v_init=start, T=T)
    curve = snn.predict_curve(torch.tensor([[x]]), range(1, T + 1))
    counts = [round(curve[t].item() * t) for t in curve]
    assert [b - a for a, b in zip([0, *counts], counts, strict=False)] == spikes


@pytest.mark.parametrize("start", [0.0, 0.25, "half", torch.tensor(0.75)])
def test_staircase_of_every_initial_potential(start: float | torch.Tensor | str) -> None:
    theta, T = 2.0, 8
    z = dyadic(64, 5, seed=3, scale=32, low=-32, high=96)
    snn = convert(nn.Sequential(nn.ReLU()), threshold=theta, v_init=start, T=T)
    v = theta / 2 if start == "half" else float(start)
    expected = theta * torch.clamp(torch.floor((T * z + v) / theta), 0, T) / T
    assert torch.equal(snn(z), expected)


def test_clip_relu_clips_and_sends_the_gradient_of_the_clipped_to_lam() -> None:
    act = ClipReLU(1.5)
    x = torch.tensor([-1.0, 0.5, 1.5, 2.0, 3.0], requires_grad=True)
    out = act(x)
    assert out.tolist() == [0.0, 0.5, 1.5, 1.5, 1.5]
    out.backward(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]))
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 2.0, 4.0, 0.0, 0.0]
    assert act.lam.grad is not None
    assert act.lam.grad.item() == 24.0


def test_qcfs_gradients_are_those_of_the_documented_convention() -> None:
    act = QCFS(levels=4, ceiling=2.0)
    x = torch.tensor([-0.5, -0.25, 0.6, 1.9, 2.2, 2.3], requires_grad=True)
    act(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    a = act(x).detach()
    inside = ((a - x) / 2.0)[1:5].sum()
    assert act.lam.grad is not None
    torch.testing.assert_close(act.lam.grad, (inside + 1.0).detach())


@pytest.mark.parametrize("make", [lambda: ClipReLU(0.0), lambda: QCFS(8, -1.0), lambda: QCFS(0)])
def test_activations_refuse_what_cannot_be(make) -> None:
    with pytest.raises(ValueError, match="must be"):
        make()


def test_learned_ceiling_loads_from_a_plain_state_dict() -> None:
    net = nn.Sequential(nn.Linear(3, 4), QCFS(8))
    state = {**net.state_dict(), "1.lam": torch.tensor(1.25)}
    net.load_state_dict(state)
    snn = convert(net, T=8)
    assert snn.report["1"].threshold.item() == 1.25
    assert "learned" in snn.report["1"].action


def test_half_a_threshold_cuts_the_squared_error_four_times() -> None:
    # OPI: theta^2 / 12 T^2 against theta^2 / 3 T^2, mean error 0 against -theta / 2T
    T, x = 8, torch.linspace(0, 1, 4001)[:, None]
    net = nn.Sequential(ClipReLU(1.0))  # the threshold is learned: no data
    error = {v: convert(net, T=T, v_init=v)(x) - net(x) for v in ("half", 0.0)}
    assert error["half"].square().mean().item() == pytest.approx(1 / (12 * T**2), rel=0.01)
    assert error[0.0].square().mean().item() == pytest.approx(1 / (3 * T**2), rel=0.01)
    assert error["half"].mean().item() == pytest.approx(0.0, abs=1e-3)
    assert error[0.0].mean().item() == pytest.approx(-1 / (2 * T), rel=0.01)
