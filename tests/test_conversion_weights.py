"""Thresholds folded into weights: the same spikes with every threshold 1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conversion_helpers import dyadic, images, make_dyadic, randomize
from torch import Tensor, nn

from snnkernels.conversion import ConversionError, ConvertedNetwork, convert


def counts(snn: ConvertedNetwork, x: Tensor) -> dict[str, Tensor]:
    """Spikes (or counts) of every layer, as whole numbers."""
    found: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_hook(
            lambda m, args, out, name=name: found.update({name: (out if m.counts else out != 0)})
        )
        for name, layer in snn.neurons()
    ]
    snn(x)
    for handle in handles:
        handle.remove()
    return found


def plain() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, groups=2, bias=False),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.ConvTranspose2d(6, 4, 2, groups=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4, 5),
        nn.ReLU(),
        nn.Linear(5, 3),
    )
    return make_dyadic(net).eval(), dyadic(4, 3, 6, 6, seed=7, scale=4)


def powers_of_two(names_and_sizes: dict[str, int]) -> dict[str, Tensor]:
    return {
        name: 2.0 ** torch.randint(-1, 4, (n,), generator=torch.Generator().manual_seed(n))
        for name, n in names_and_sizes.items()
    }


@pytest.mark.parametrize("v_init", ["half", 0.0, 0.25])
@pytest.mark.parametrize("per_channel", [False, True])
def test_equal_spikes_on_dyadic_data(v_init: float | str, per_channel: bool) -> None:
    net, x = plain()
    sizes = {"2": 4, "4": 6, "7": 4, "11": 5}
    theta = powers_of_two(sizes)
    if not per_channel:
        theta = {name: t[0] for name, t in theta.items()}
    form = {
        kind: convert(net, threshold=theta, v_init=v_init, T=8, normalize=kind)
        for kind in ("threshold", "weights")
    }
    a, b = (counts(form[kind], x) for kind in ("threshold", "weights"))
    assert all(torch.equal(a[name], b[name]) for name in sizes)
    assert all(a[name].double().mean() > 0 for name in sizes)
    assert torch.equal(form["threshold"](x), form["weights"](x))
    for _, layer in form["weights"].neurons():
        assert layer.node.v_threshold == 1
    for _, layer in form["threshold"].neurons():
        assert torch.equal(layer.node.v_threshold, theta[layer.label])


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)
        self.bn, self.c = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1)
        self.fc = nn.Linear(6, 3)
        randomize(self)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.size(0)
        h = torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1)
        h = F.relu(self.bn(h) + self.c(h))
        h = F.adaptive_avg_pool2d(h, 1).view(batch, -1)
        return self.fc(F.relu(self.fc2(h)) if hasattr(self, "fc2") else h)


def test_concat_sum_and_affine_in_floating_point() -> None:
    net, x = Joined(), images(4)
    a, b = (
        convert(net, x, T=64, threshold="max", normalize=kind) for kind in ("threshold", "weights")
    )
    torch.testing.assert_close(a(x), b(x), atol=1e-2, rtol=0)
    torch.testing.assert_close(b(x), net(x), atol=3e-2, rtol=0)


def test_the_answer_beside_the_neurons_stays_in_real_units() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.fc3 = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.fc2(F.relu(self.fc1(x)))
            return h, self.fc3(F.relu(h))

    torch.manual_seed(0)
    net, x = Heads(), torch.randn(4, 6)
    out = convert(net, x, threshold="max", T=1024, normalize="weights")(x)
    for got, expected in zip(out, net(x), strict=True):
        torch.testing.assert_close(got, expected, atol=5e-3, rtol=0)


def test_a_shortcut_without_weights_is_named() -> None:
    class Identity(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc1, self.fc2 = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.fc1(x))
            return F.relu(self.fc2(h) + h)

    with pytest.raises(ConversionError, match=r"cannot pass relu: it reaches add without.*differ"):
        convert(Identity(), torch.rand(8, 6), normalize="weights")
    same = convert(Identity(), threshold=2.0, normalize="weights")
    assert torch.equal(same(torch.rand(3, 6)) >= 0, torch.ones(3, 6, dtype=torch.bool))


def test_an_input_that_meets_a_neuron_directly_is_named() -> None:
    with pytest.raises(ConversionError, match="normalize='weights' cannot pass"):
        convert(nn.Sequential(nn.ReLU()), threshold=2.0, normalize="weights")


class Through(nn.Module):
    """A function of spikes (and of the input) between two layers of neurons."""

    def __init__(self, first: nn.Module, function: Any, **layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.function = first, function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.function(self, F.relu(self.first(x)), x))
        return y.flatten(1).sum(1, keepdim=True) * torch.tensor([1.0, -1.0])


LAYERS = {
    "conv": lambda: nn.Conv2d(4, 4, 1),
    "wide": lambda: nn.Conv2d(8, 4, 1),
    "skip": lambda: nn.Conv2d(3, 4, 1),
    "flat": lambda: nn.Linear(256, 4),
    "both": lambda: nn.Linear(512, 4),
    "mean": lambda: nn.Linear(4, 4),
    "up": lambda: nn.ConvTranspose2d(4, 4, 2, 2, groups=2),
}
THROUGH: dict[str, Any] = {
    "neg": lambda s, h, x: s.conv(-h),
    "twice": lambda s, h, x: s.conv(s.conv(h)),
    "joined with itself": lambda s, h, x: s.wide(torch.cat([h, h], 1)),
    "joined by name": lambda s, h, x: s.wide(torch.concatenate(tensors=[h, -h], axis=1)),
    "joined with what is constant": lambda s, h, x: s.wide(torch.cat([h, s.skip(x)], -3)),
    "joined, then flat": lambda s, h, x: s.both(torch.cat([h, h], 1).flatten(1)),
    "flat, then joined": lambda s, h, x: s.both(torch.cat([h.flatten(1), -h.flatten(1)], 1)),
    "flat": lambda s, h, x: s.flat(h.view(x.size(0), -1)),
    "other rows": lambda s, h, x: s.conv(h.reshape(x.size(0), 4, 4, 16)),
    "mean": lambda s, h, x: s.mean(h.mean((2, 3))),
    "sum": lambda s, h, x: s.mean(h.sum([-1, -2])),
    "pool": lambda s, h, x: s.conv(F.avg_pool2d(h, 2)),
    "difference": lambda s, h, x: s.conv(h) - s.skip(x),
    "transposed": lambda s, h, x: s.up(h),
    "interpolated": lambda s, h, x: s.conv(F.interpolate(h, scale_factor=2).contiguous()),
}


@pytest.mark.parametrize("function", THROUGH)
@torch.no_grad()
def test_what_hands_thresholds_on(function: str) -> None:
    """Found by this test: spikes joined with themselves had the thresholds of other channels."""
    x = dyadic(3, 3, 8, 8, seed=5)
    net = Through(nn.Conv2d(3, 4, 3, padding=1), THROUGH[function],
                  **{name: make() for name, make in LAYERS.items()})  # fmt: skip
    make_dyadic(net.eval())
    theta = torch.tensor([4.0, 2.0, 1.0, 8.0])
    for of_last in (torch.tensor(2.0), theta.flip(0)):
        given = {"threshold": {"relu": theta, "relu_1": of_last}, "T": 8, "progress": False}
        want, got = (convert(net, [x], normalize=n, **given) for n in ("threshold", "weights"))
        assert torch.equal(want(x), got(x))
        assert bool(want(x).any())


def test_features_joined_with_themselves() -> None:
    x, theta = dyadic(5, 6), torch.tensor([4.0, 2.0, 1.0, 8.0])
    for times in (2, 3):
        net = Through(nn.Linear(6, 4), lambda s, h, x, n=times: s.b(torch.cat([h] * n, 1)),
                      b=nn.Linear(4 * times, 4))  # fmt: skip
        make_dyadic(net.eval())
        given = {"threshold": {"relu": theta, "relu_1": torch.tensor(2.0)}, "T": 8}
        want, got = (convert(net, [x], normalize=n, **given) for n in ("threshold", "weights"))
        with torch.no_grad():
            assert torch.equal(want(x), got(x))
            assert bool(want(x).any())


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda s, h, x: s.conv(h) + h, "relu: it reaches add without weights in between"),
        (lambda s, h, x: s.conv(h + 1.0), "add: it adds a number, which has no weights to scale"),
        (
            lambda s, h, x: s.conv(torch.cat([h, h], 2)),
            "cat: it does not join the dimension",
        ),
        (
            lambda s, h, x: s.wide(h.reshape(-1, 8, 8, 4)),
            "wide: the channels of its input are",
        ),
        (lambda s, h, x: s.rows(h.mean(1)), "mean: it acts on the dimension of the channels"),
        (lambda s, h, x: s.rows(h), "rows: the thresholds before it are not along its input"),
        (lambda s, h, x: s.conv(h * 0.5), "mul: it has no weights that could take a threshold"),
    ],
)
def test_what_does_not_hand_thresholds_on(function: Any, words: str) -> None:
    x = dyadic(3, 3, 8, 8, seed=5)
    net = Through(nn.Conv2d(3, 4, 3, padding=1), function, rows=nn.Linear(8, 4),
                  **{name: make() for name, make in LAYERS.items()})  # fmt: skip
    theta = {"relu": torch.tensor([4.0, 2.0, 1.0, 8.0]), "relu_1": torch.tensor(2.0)}
    with pytest.raises(ConversionError, match=f"normalize='weights' cannot pass {words}"):
        convert(net.eval(), [x], threshold=theta, T=4, normalize="weights", progress=False)
