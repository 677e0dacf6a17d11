"""Initial potentials: the rules of OPI's ablation, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from snnkernels import convert
from snnkernels.conversion.starts import Start, parse_start


def net() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 3)
    ).eval()


X = torch.randn(16, 1, 6, 6, generator=torch.Generator().manual_seed(0))


def starts(v_init: object, **arguments: object) -> dict[str, Tensor]:
    """v_init over θ of every layer."""
    snn = convert(net(), X, v_init=v_init, **arguments)
    found = {}
    for name, layer in snn.neurons():
        theta = layer.node.threshold.double()
        v = layer.node.v_init
        v = 0.5 * theta if isinstance(v, str) else torch.as_tensor(v).double()
        if v.dim() == 3:
            theta = theta.view(-1, 1, 1) if theta.dim() else theta
        found[name] = v / theta
    return found


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("half", Start(0.5)),
        ("zero", Start(0.0)),
        ("25%", Start(0.25)),
        ("0%", Start(0.0)),
        ("100%", Start(1.0)),
        ("uniform", Start(0.5, "uniform")),
        ("normal", Start(0.5, "normal")),
        ("mse", Start(0.5, "mse")),
    ],
)
def test_words(text: str, start: Start) -> None:
    assert parse_start(text) == start


@pytest.mark.parametrize("text", ["full", "101%", "-1%", "a%", "", "HALF", "nan%"])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not known; allowed: 'half' .*'zero'.*'mse'"):
        parse_start(text)


@pytest.mark.parametrize(("text", "part"), [("zero", 0.0), ("25%", 0.25), ("75%", 0.75)])
def test_constants_are_parts_of_every_threshold(text: str, part: float) -> None:
    for value in starts(text).values():
        torch.testing.assert_close(value, torch.full_like(value, part), rtol=1e-6, atol=0)


def test_half_stays_a_word_and_follows_the_threshold() -> None:
    snn = convert(net(), X)
    node = dict(snn.neurons())["1"].node
    assert node.v_init == "half"
    node.v_threshold *= 2
    assert torch.equal(node.v, 0.5 * node.v_threshold)


def test_uniform_is_drawn_once_for_each_neuron() -> None:
    first, again = starts("uniform"), starts("uniform")
    assert first["1"].shape == (4, 4, 4)
    assert first["4"].shape == (6,)
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert bool(((value >= 0) & (value < 1)).all())
        assert len(value.flatten().unique()) == value.numel()
    assert first["1"].mean().item() == pytest.approx(0.5, abs=0.1)


def test_normal_has_mean_half_and_deviation_a_quarter() -> None:
    value = starts("normal", threshold="max", per_channel=False)["1"]
    assert value.mean().item() == pytest.approx(0.5, abs=0.1)
    assert value.std().item() == pytest.approx(0.25, abs=0.06)
    assert bool((value < 0).any() | (value > 0.9).any())  # not clipped to [0, 1)


def one(value: float = 1.0) -> nn.Sequential:
    ann = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU()).eval()
    with torch.no_grad():
        ann[0].weight.fill_(value)
    return ann


@pytest.mark.parametrize("T", [1, 2, 5])
def test_mse_of_constant_currents_is_half(T: int) -> None:
    """A start of θ/2 rounds a constant current to the nearest level: best for every density."""
    for power in (1, 3):
        x = torch.rand(64, 1, generator=torch.Generator().manual_seed(T)) ** power
        snn = convert(one(), x, threshold=1.0, v_init="mse", T=T)
        plain = convert(one(), x, threshold=1.0, T=T)
        found = dict(snn.neurons())["1"].node.v_init.item()
        assert snn.report["1"].error <= plain.report["1"].error
        assert abs(found - 0.5) <= 1 / 8


def test_mse_worked_by_hand() -> None:
    """θ = 1, T = 2. Level 1/2 is reached from 2x + c >= 1, level 1 from 2x + c >= 2.

    All of x = 3/16 (answered 0 up to c = 9/16, then 1/2): 0 is nearer, so 1/2 it stays. With a
    first layer that answers too little by 1/4 (θ = 1 for activations of 5/4, T = 1), the second
    makes good for it: its current is 1, the ANN's 5/4, and θ = 2 needs c >= 1/2.
    """
    snn = convert(one(), torch.full((4, 1), 3 / 16), threshold=1.0, v_init="mse", T=2)
    assert dict(snn.neurons())["1"].node.v_init.item() == 0.5
    two = nn.Sequential(*one(), *one(0.75)).eval()
    x = torch.full((4, 1), 1.25)
    snn = convert(two, x, threshold={"1": 1.0, "3": 2.0}, v_init={"3": "mse"}, T=1)
    # The current is 0.75: a spike of 2 from c = 5/8 on; 0 is 15/16 off, 2 is 17/16: none.
    assert dict(snn.neurons())["3"].node.v_init.item() == 1.0
    snn = convert(two, x, threshold={"1": 1.0, "3": 1.5}, v_init={"3": "mse"}, T=1)
    # θ = 1.5: half of it is reached exactly at c = 1/2, and 1.5 is nearer to 15/16 than 0.
    assert dict(snn.neurons())["3"].node.v_init.item() == 0.75
    snn = convert(two, x, threshold={"1": 1.0, "3": 1.75}, v_init={"3": "mse"}, T=1)
    # θ = 1.75: 1.75 (13/16 off) beats 0 (15/16 off) and takes c >= 4/7: 10/16 is the first.
    assert dict(snn.neurons())["3"].node.v_init.item() == pytest.approx(1.75 * 10 / 16)


@pytest.mark.parametrize("normalize", ["threshold", "weights"])
def test_mse_of_the_network_is_per_channel(normalize: str) -> None:
    plain = convert(net(), X, T=4, normalize=normalize)
    snn = convert(net(), X, T=4, v_init="mse", normalize=normalize)
    for _name, layer in snn.neurons():
        part = layer.node.v_init / layer.node.threshold
        assert part.shape == (layer.node.v_init.numel(),)
        assert bool(((part >= 0) & (part < 1)).all())
        assert torch.equal((part * 16).round() / 16, part.round(decimals=4))
    assert snn.report["1"].error <= plain.report["1"].error + 1e-6
    assert "v_init was fitted per channel at T=4 on 16 images" in str(snn.report)


def test_absolute_values() -> None:
    assert starts(0.25, threshold=2.0)["1"].item() == 0.125
    full = torch.rand(4, 4, 4)
    snn = convert(net(), X, v_init={"1": full, "4": "25%"})
    layers = dict(snn.neurons())
    assert torch.equal(layers["1"].node.v_init, full)
    torch.testing.assert_close(layers["4"].node.v_init, layers["4"].node.threshold / 4)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"v_init": "uniform"}, ValueError, "v_init='uniform' for 1 needs calibration data"),
        ({"v_init": "mse"}, ValueError, "v_init='mse' for 1 needs calibration data"),
        ({"v_init": math.nan}, ValueError, "v_init of 1 must be finite"),
        ({"v_init": torch.rand(3)}, ValueError, "v_init of 1 has 3 values, .* 4 channels"),
        (
            {"loader": X, "v_init": torch.rand(4, 4, 5)},
            ValueError,
            r"v_init of 1 has shape \(4, 4, 5\); .* layer's shape \(4, 4, 4\)",
        ),
        ({"v_init": {"2": "half"}}, ValueError, r"v_init names \['2'\]"),
        ({"v_init": [0.5]}, ValueError, r"v_init='\[0\.5\]' is not known"),
    ],
    ids=str,
)
def test_bad_starts(arguments: dict, error: type[Exception], says: str) -> None:
    rest = {name: value for name, value in arguments.items() if name != "loader"}
    with pytest.raises(error, match=says):
        convert(net(), arguments.get("loader"), threshold=1.0, **rest)


# ---- one layer, in closed form -------------------------------------------------------------------


@pytest.mark.parametrize("T", [4, 8])
@pytest.mark.parametrize("c", [0.0, 0.25, 0.5, 0.75])
def test_error_of_one_layer_is_the_closed_form(T: int, c: float) -> None:
    """OPI, error of one layer: currents uniform on [0, θ], v_init = c θ.

    E[error] = θ/T (c - 1/2), E[error^2] = θ^2 / 3T^2 (1 - 3c + 3c^2); T = 8, θ = 1: -0.0625 and
    0.0052083 at c = 0, -0.03125 and 0.0022786 at 1/4, 0 and 0.0013021 at 1/2.
    """
    theta = 2.0
    n = 1 << 12
    z = (torch.arange(n, dtype=torch.float64) + 0.5)[:, None] * theta / n  # midpoints
    ann = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Identity()).double().eval()
    with torch.no_grad():
        ann[0].weight.fill_(1.0)
        snn = convert(ann, threshold=theta, v_init=c * theta, T=T)
        error = snn(z) - z
    assert error.mean().item() == pytest.approx(theta / T * (c - 0.5), abs=1e-3 * theta / T)
    expected = theta**2 / (3 * T**2) * (1 - 3 * c + 3 * c * c)
    assert error.square().mean().item() == pytest.approx(expected, rel=0.002)


def test_opi_worked_example() -> None:
    """OPI, soft reset: θ = 1, T = 8, x = 0.3125 gives 2 spikes from 0 and 3 from θ/2."""
    ann = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU()).eval()
    with torch.no_grad():
        ann[0].weight.fill_(1.0)
        x = torch.tensor([[0.3125]])
        for v_init, count in (("zero", 2), ("half", 3)):
            snn = convert(ann, threshold=1.0, v_init=v_init, T=8)
            assert snn(x).item() == count / 8
