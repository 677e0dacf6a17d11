"""A stochastic first layer: what it leaves alone, what it averages, how uncertain it is."""

from __future__ import annotations

import math

import pytest
import torch
from conversion_helpers import Everything, dyadic, images, randomize
from torch import Tensor, nn

from snnkernels.conversion import ConversionError, ConvertedNetwork, convert
from snnkernels.conversion.methods import STBIF
from snnkernels.conversion.stochastic import Prediction, stochastic_prefix


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten()),
        nn.Linear(64, 5),
    )


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("per", ["example", "step"])
@pytest.mark.parametrize("method", ["opi", "srp", "cos", "parallel"])
def test_zero_std_is_the_network_itself(per: str, method: str) -> None:
    x = images(4)
    snn = convert(randomize(Everything()), x, T=4, method=method)
    with torch.no_grad():
        want = snn(x)
    if per == "step" and method == "parallel":
        got = stochastic_prefix(snn, std=0.0, per=per)(x)
        torch.testing.assert_close(got.logits, want)
        return
    for T in (4, 3):
        with torch.no_grad():
            want = snn(x, T=T)
        got = stochastic_prefix(snn, std=0.0, per=per)(x, T)
        # per="step" runs the first layer on T * B rows: another batch, another rounding.
        tolerance = 0.0 if per == "example" else 1e-5
        torch.testing.assert_close(got.logits, want, rtol=0, atol=tolerance)
    assert isinstance(got, Prediction)
    probabilities = want.softmax(1)
    torch.testing.assert_close(got.entropy, -(probabilities * probabilities.log()).sum(1))
    assert bool((got.information == 0).all())


@pytest.mark.parametrize("per", ["example", "step"])
def test_the_same_seed_gives_the_same_answers(per: str) -> None:
    x = images(3)
    snn = convert(small(), x, T=4)
    a, b, c = (stochastic_prefix(snn, std=0.1, per=per, generator=seeded(s)) for s in (1, 1, 2))
    one, two = a(x, samples=3), b(x, samples=3)
    assert torch.equal(one.logits, two.logits)
    assert torch.equal(one.entropy, two.entropy)
    assert not torch.equal(one.logits, c(x, samples=3).logits)
    assert not torch.equal(one.logits, a(x, samples=3).logits)  # the next draw


def test_weights_are_drawn_for_each_example_and_held_in_time() -> None:
    """Two equal examples answer differently; the first neurons' counts are those of a staircase of
    the drawn current: constant in time."""
    x = images(1).expand(6, -1, -1, -1)
    snn = convert(small(), images(4), T=8)
    network = stochastic_prefix(snn, std=0.2, generator=seeded()).network
    assert isinstance(network, ConvertedNetwork)
    seen: list[tuple[Tensor, Tensor]] = []
    _, layer = next(network.neurons())
    handle = layer.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        network(x)
    handle.remove()
    current, spikes = seen[0]
    assert current.shape[0] == 6  # not T * 6
    assert not torch.equal(current[0], current[1])
    theta = layer.node.v_threshold.view(-1, 1, 1).double()
    count = (spikes.view(8, 6, *current.shape[1:]) != 0).sum(0)
    want = ((current.double() * 8 + theta / 2) / theta).floor().clamp(0, 8)
    assert (count != want).double().mean() < 1e-3  # ties in float32


def test_shapes_of_the_input_behind_the_first_neurons() -> None:
    """Found by this test: the number of its elements was taken T times too often."""

    class Shapes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.out = nn.Conv1d(2, 4, 1), nn.Linear(24, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.first(x)) / (x.numel() // x.size(0) // 3)
            return self.out(torch.relu(h.view(x.size(0), -1) - 0.05))

    x = torch.randn(5, 2, 6, generator=seeded())
    snn = convert(Shapes(), x, T=8)
    with torch.no_grad():
        for per in ("example", "step"):
            got = stochastic_prefix(snn, std=0.0, per=per)(x)
            torch.testing.assert_close(got.logits, snn(x), rtol=0, atol=1e-5)


def test_weights_of_a_step_make_the_current_uneven() -> None:
    x = images(2)
    snn = convert(small(), images(4), T=8)
    network = stochastic_prefix(snn, std=0.2, per="step", generator=seeded()).network
    seen: list[Tensor] = []
    _, layer = next(network.neurons())
    handle = layer.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    with torch.no_grad():
        network(x)
        network.predict_curve(x, [2, 8])
    handle.remove()
    assert [len(c) for c in seen] == [16, 4, 12]
    steps = seen[0].view(8, 2, -1)
    assert bool((steps.std(0) > 0).all())
    assert layer.constant  # as it was


@pytest.mark.parametrize("per", ["example", "step"])
def test_expectation_of_a_linear_read_out(per: str) -> None:
    """One layer of neurons that never saturate: E[spikes] follows E[current], so many samples
    average to the deterministic logits, up to a part of the staircase's step of 1/64."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].bias.fill_(1.0)
        net[0].weight.mul_(0.2)
    x = dyadic(2, 3, low=-4, high=4)
    snn = convert(net, x, T=256, threshold=4.0)
    with torch.no_grad():
        want = snn(x)
    found = stochastic_prefix(snn, std=0.1, per=per, generator=seeded())(x, samples=1000)
    torch.testing.assert_close(found.logits, want, atol=0.02, rtol=0)


def test_entropy_rises_with_std() -> None:
    """One input and weights of ±1 into two classes: certain without noise, a coin toss with much.
    Without noise the logits are 8 and 0."""
    net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        net[2].weight.copy_(8 * torch.eye(2))
    x = torch.tensor([[1.0]])
    snn = convert(net, T=8, threshold=1.0)
    entropies = [
        float(stochastic_prefix(snn, std=std, generator=seeded())(x, samples=4000).entropy)
        for std in (0.0, 0.25, 0.5, 1.0, 4.0)
    ]
    assert entropies == sorted(entropies)
    p = 1 / (1 + math.exp(-8))
    assert entropies[0] == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), rel=1e-3)
    assert entropies[-1] > 0.6  # ln 2 = 0.693
    found = stochastic_prefix(snn, std=4.0, generator=seeded())(x, samples=4000)
    # Most of it is disagreement between draws, which one draw cannot show.
    assert 0.25 < float(found.information) < float(found.entropy)
    assert float(stochastic_prefix(snn, std=4.0, generator=seeded())(x).information) == 0


def test_a_spread_of_its_own_for_every_channel() -> None:
    x = images(2)
    snn = convert(small(), images(4), T=4)
    std = torch.zeros(6, 1, 1, 1)
    std[2] = 0.5
    network = stochastic_prefix(snn, std=std, generator=seeded()).network
    sampled, plain = network.prefix(x)[0], snn.prefix(x)[0]
    same = torch.isclose(sampled, plain, atol=1e-6).flatten(2).all(2).all(0)
    assert same.tolist() == [True, True, False, True, True, True]


def test_the_network_is_shared_and_unchanged() -> None:
    x = images(2)
    snn = convert(small(), x, T=4)
    with torch.no_grad():
        before = snn(x)
        for per in ("example", "step"):
            twin = stochastic_prefix(snn, std=0.1, per=per)
            twin(x)
            assert {id(p) for p in twin.parameters()} == {id(p) for p in snn.parameters()}
        assert torch.equal(snn(x), before)
    assert type(snn.body).__name__ == "Body"


def test_what_is_refused() -> None:
    x = images(2)
    snn = convert(small(), x, T=4)
    with pytest.raises(ValueError, match="per='batch' is not known"):
        stochastic_prefix(snn, std=0.1, per="batch")
    for std in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="std="):
            stochastic_prefix(snn, std=std)
    with pytest.raises(ValueError, match="does not broadcast"):
        stochastic_prefix(snn, std=torch.ones(5))
    with pytest.raises(ValueError, match="does not broadcast"):
        stochastic_prefix(snn, std=torch.ones(2, 6, 3, 3, 3))
    for samples in (0, 1.5):
        with pytest.raises(ValueError, match="samples must be"):
            stochastic_prefix(snn, std=0.1)(x, samples=samples)  # type: ignore[arg-type]
    bare = convert(nn.Sequential(nn.ReLU(), nn.Flatten()), dyadic(2, 4))
    with pytest.raises(ConversionError, match="no linear layer or convolution"):
        stochastic_prefix(bare, std=0.1)
    maps = convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), x, T=4)
    with pytest.raises(ConversionError, match=r"\[B, C\]"):
        stochastic_prefix(maps, std=0.1)(x)


def test_a_first_layer_called_twice_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.fc(self.fc(x))).flatten(1)

    with pytest.raises(ConversionError, match="fc is called more than once"):
        stochastic_prefix(convert(Twice(), dyadic(2, 4)), std=0.1)


def test_methods_whose_input_comes_once_are_refused_where_it_matters() -> None:
    x = images(2)
    settled = convert(small(), x, method=STBIF(levels=4), T=12)
    got = stochastic_prefix(settled, std=0.0)(x)
    with torch.no_grad():
        torch.testing.assert_close(got.logits, settled(x))
    with pytest.raises(ConversionError, match=r"'st_bif\(levels=4\)' shows its input once"):
        stochastic_prefix(settled, std=0.1, per="step")
    with pytest.raises(ConversionError, match="'ptl' shows its input once"):
        stochastic_prefix(convert(small(), x, method="ptl"), std=0.1)


@pytest.mark.parametrize("per", ["example", "step"])
def test_several_inputs(per: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.c(torch.relu(self.a(left)) + torch.relu(self.b(right)))

    g = seeded(1)
    batch = (torch.randn(5, 4, generator=g), torch.randn(5, 3, generator=g))
    snn = convert(Two().eval(), [batch], inputs=lambda item: item, T=4, progress=False)
    same = stochastic_prefix(snn, std=0.0, per=per)
    with torch.no_grad():
        want = snn(*batch)
    for given in (batch, {"right": batch[1], "left": batch[0]}):
        torch.testing.assert_close(same(given, samples=3).logits, want)
    drawn = stochastic_prefix(snn, std=0.5, per=per, generator=seeded())(batch, samples=8)
    assert bool((drawn.information > 0).any())
    with pytest.raises(TypeError, match="right missing"):
        same(batch[0])
