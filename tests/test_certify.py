"""Certificates: what they claim holds for every order of spikes; what they cannot claim is said."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conversion_helpers import Everything, dyadic, images, make_dyadic, randomize
from torch import Tensor, nn

from snnkernels.conversion import QCFS, ConversionError, ConvertedNetwork, RateNorm, convert
from snnkernels.conversion.interval_layers import window_sum
from snnkernels.conversion.intervals import Bounds, affine, cumulative_pool, fire, fired, step_pool

EPS = 2.0**-24


def count(current: list[float], theta: float, v: float) -> int:
    """Spikes of one integrate-and-fire neuron, soft reset: the oracle."""
    n = 0
    for c in current:
        v += c
        if v >= theta:
            v -= theta
            n += 1
    return n


def known(x: Tensor) -> Bounds:
    """The sharpest bounds of one given current ``[T, N]``."""
    x = x.double()
    parts = (x.sum(0), x.sum(0), x.amin(0), x.amax(0), x.clamp(min=0).sum(0))
    return Bounds(*parts, (-x).clamp(min=0).sum(0), len(x))


def holds(bounds: Bounds, x: Tensor, slack: float = 1e-9) -> bool:
    """Whether ``x`` ``[T, *]`` is within ``bounds``."""
    exact = known(x.flatten(1))
    parts = [p.flatten() for p in bounds.parts]
    return bool(
        (parts[0] <= exact.low + slack).all()
        and (parts[1] >= exact.high - slack).all()
        and (parts[2] <= exact.least + slack).all()
        and (parts[3] >= exact.most - slack).all()
        and (parts[4] >= exact.plus - slack).all()
        and (parts[5] >= exact.minus - slack).all()
    )


# The neuron.


def test_certified_bounds_of_one_neuron() -> None:
    """Certified bounds for arbitrary input order (section 0.3), 40,000 random dyadic currents."""
    g = torch.Generator().manual_seed(0)
    for T in (1, 2, 3, 5, 8):
        x = torch.randint(-16, 25, (T, 8000), generator=g) / 8
        start = torch.randint(0, 8, (8000,), generator=g) / 8
        theta = torch.ones(8000)
        low, high = fire(known(x), theta, start, EPS)
        S, plus = x.sum(0), x.clamp(min=0).sum(0)
        E = (x - 1).clamp(min=0).sum(0)
        # The formula of the specification; E is known to ``fire`` only by its own bounds.
        least = torch.floor(S + start - E).clamp(0, T)
        most = torch.floor(plus + start).clamp(0, T)
        assert bool((low <= least).all())
        assert bool((high >= most).all())
        tie = (plus + start) == torch.floor(plus + start)  # rounding may cost one there
        assert bool((high == most)[~tie].all())
        even = (x <= 1).all(0) & (torch.floor(S + start) - start != S)
        assert bool((low == least)[even].all())
        v, n = start.clone(), torch.zeros(8000)
        for step in x:
            v = v + step
            s = (v >= 1).float()
            v, n = v - s, n + s
        assert bool(((low <= n) & (n <= high)).all())
        assert bool((least <= n).all())
        assert bool((n <= most).all())


@pytest.mark.parametrize(
    ("x", "low", "high", "actual"),
    [
        # Worked examples of COS (section 3.5), θ = 1, v_init = 1/2: the desired counts are 0, 2, 2.
        ([1.0, 1.0, -1.0, -1.0], 0, 2, 2),
        ([-2.0, 1.0, 1.0, 2.0], 0, 4, 1),
        ([-3.0, 0.25, 0.25, 4.0], 0, 4, 1),
        ([0.3] * 4, 1, 1, 1),
    ],
)
def test_offset_spikes_are_within_the_bounds(
    x: list[float], low: int, high: int, actual: int
) -> None:
    half = torch.tensor([0.5])
    found = fire(known(torch.tensor(x)[:, None]), torch.ones(1), half, EPS)
    assert count(x, 1.0, 0.5) == actual
    assert [int(n) for n in found] == [low, high]


def test_bounds_hold_for_every_order_of_given_spikes() -> None:
    """All that is known are counts of inputs; currents are random orders of them. The neuron's
    count is inside, for thousands of neurons, weights and orders."""
    rng, checked = random.Random(0), 0
    for trial in range(60):
        T, fan, out = rng.choice([2, 3, 4, 8]), rng.choice([1, 2, 5]), 9
        w = dyadic(out, fan, seed=trial, scale=4, low=-6, high=6).double()
        if trial % 2:
            w = w + torch.randn(w.shape, generator=torch.Generator().manual_seed(trial)) / 9
        b = dyadic(out, seed=trial + 1, scale=8, low=-4, high=4).double()
        n = torch.tensor([[rng.randint(0, T) for _ in range(fan)]])
        up, down = w.clamp(min=0).t(), (-w).clamp(min=0).t()
        spikes = fired(n, n, torch.tensor(1.0), T)
        current = affine(spikes, lambda r, a=up: r @ a, lambda r, a=down: r @ a, b, fan, EPS)
        low, high = fire(current, torch.ones(()), torch.full((), 0.5), EPS)
        for _ in range(10):
            train = torch.zeros(T, fan, dtype=torch.float64)
            for i in range(fan):
                train[rng.sample(range(T), int(n[0, i])), i] = 1
            x = train @ w.t() + b
            assert holds(current, x)
            for j in range(out):
                assert low[0, j] <= count(x[:, j].tolist(), 1.0, 0.5) <= high[0, j]
                checked += 1
    assert checked >= 2000


def test_a_lone_spike_proves_what_it_can() -> None:
    """Weights that sum to less than a threshold with all inputs firing leave no doubt."""
    n = torch.tensor([[2, 1]])
    spikes = fired(n, n, torch.tensor(1.0), 4)
    weight = torch.tensor([[0.25], [0.125]], dtype=torch.float64)
    current = affine(spikes, lambda r: r @ weight, None, None, 2, EPS)
    low, high = fire(current, torch.ones(1), torch.tensor([0.25]), EPS)
    # S = 0.625, nothing negative, nothing above θ: floor(0.875) = 0, whatever the order.
    assert int(low) == int(high) == 0


# Pools.


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(2),
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d(2, 1, dilation=2),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.AdaptiveMaxPool2d(3),
    ],
    ids=str,
)
@pytest.mark.parametrize("cumulative", [True, False])
def test_max_pools_of_any_order(pool: nn.Module, cumulative: bool) -> None:
    """Currents of known sums in random orders stay inside through both max-pools."""
    g = torch.Generator().manual_seed(1)
    for T in (1, 3, 8):
        x = torch.randint(-16, 17, (T, 2, 3, 7, 7), generator=g).double() / 8
        bounds = Bounds(
            x.sum(0), x.sum(0), x.amin(0), x.amax(0), x.clamp(min=0).sum(0),
            (-x).clamp(min=0).sum(0), T,
        )  # fmt: skip
        if cumulative:
            out = cumulative_pool(bounds, pool, window_sum(pool), EPS)
        else:
            out = step_pool(bounds, pool, window_sum(pool))
        for _ in range(20):
            order = torch.stack([torch.randperm(T, generator=g) for _ in range(x[0].numel())], 1)
            y = x.flatten(1).gather(0, order).reshape(x.shape)
            if cumulative:
                peaks = torch.stack([pool(s) for s in y.cumsum(0)])
                z = torch.diff(peaks, dim=0, prepend=torch.zeros_like(peaks[:1]))
            else:
                z = torch.stack([pool(s) for s in y])
            assert holds(out, z)


def test_window_sums_are_sums_or_more() -> None:
    x = torch.rand(1, 2, 7, 7, dtype=torch.float64)
    exact = F.avg_pool2d(x, 2, divisor_override=1)
    torch.testing.assert_close(window_sum(nn.MaxPool2d(2))(x), exact)
    for pool in (nn.MaxPool2d(2, 2, dilation=2), nn.AdaptiveMaxPool2d(2)):
        assert bool((window_sum(pool)(x) >= pool(x)).all())
    assert bool((window_sum(nn.MaxPool1d(2))(x[0]) >= F.avg_pool1d(x[0], 2) * 2 - 1e-12).all())


# Whole networks.


class Parts(nn.Module):
    """Residual sum, concatenation, subtraction, constants, slices, transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(16, 6)
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        g = F.relu(self.b(h) * 0.5 - h + x[:, :1])
        h = F.avg_pool2d(torch.cat([h, g], dim=1), 2)
        h = F.relu(self.bn(self.up(h)) / 2)
        first, second = h.chunk(2, dim=1)
        h = F.relu(F.pad(first - second, (1, 1, 1, 1)))
        h = F.interpolate(h, scale_factor=0.5, mode="nearest")
        h = F.adaptive_avg_pool2d(h, 2).permute(0, 2, 3, 1).reshape(h.shape[0], -1)
        h = torch.cat([h, h.flip(1)], 1)
        return self.last(F.relu(self.fc(h)))


def convnet(seed: int = 0, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    torch.manual_seed(seed)
    return randomize(
        nn.Sequential(
            *(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), activation(), nn.MaxPool2d(2)),
            *(nn.Conv2d(5, 6, 3), nn.AvgPool2d(2), activation(), nn.Flatten()),
            *(nn.Linear(6, 8), activation(), nn.Linear(8, 4)),
        ),
        seed,
    )


def counts(snn: ConvertedNetwork, x: Tensor, T: int) -> tuple[dict[str, Tensor], Tensor]:
    """Counts of every layer in a run of T steps, and the answer."""
    found: dict[str, Tensor] = {}

    def hook(module: nn.Module, args: object, out: Tensor) -> None:
        found[module.label] = module._net_count(out, T)  # type: ignore[operator, index]

    handles = [layer.register_forward_hook(hook) for _, layer in snn.neurons()]
    with torch.no_grad():
        answer = snn(x, T=T)
    for handle in handles:
        handle.remove()
    return found, answer


def check(snn: ConvertedNetwork, x: Tensor, T: int) -> int:
    """The spiking run and the quantised ANN are inside; returns how many counts were compared."""
    certificate = snn.certify(x, T)
    found, answer = counts(snn, x, T)
    assert [layer.name for layer in certificate.layers] == list(found)
    checked = 0
    for layer in certificate.layers:
        n = found[layer.name]
        assert bool(((layer.low <= n) & (n <= layer.high)).all()), layer.name
        assert bool(((layer.low >= 0) & (layer.high <= T)).all())
        checked += n.numel()
    for y in (answer, certificate.quantised):
        assert bool(((certificate.low <= y) & (y <= certificate.high)).all())
    same = answer.argmax(1) == certificate.prediction
    assert bool(same[certificate.proven].all())
    return checked


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("T", [1, 3, 8])
def test_counts_of_networks_are_inside(T: int, dtype: torch.dtype) -> None:
    checked = 0
    for seed in range(3):
        for net, maxpool in ((convnet(seed), "cumulative"), (convnet(seed), "pre_spike")):
            x = images(6, seed=seed).to(dtype)
            snn = convert(net.to(dtype), x, T=T, maxpool=maxpool)
            checked += check(snn, x, T)
        dyadics = make_dyadic(convnet(seed), seed)
        snn = convert(dyadics.to(dtype), T=T, threshold=1.0, v_init=0.25)
        checked += check(snn, dyadic(6, 3, 8, 8, seed=seed).to(dtype), T)
    assert checked >= 2000


@pytest.mark.parametrize("options", [{}, {"v_init": "uniform"}, {"fold": False}], ids=str)
def test_every_operation_with_a_rule(options: dict) -> None:
    torch.manual_seed(0)
    x = images(4)
    assert check(convert(randomize(Parts()), x, T=4, **options), x, 4) >= 2000
    assert check(convert(Everything(), x, T=4, **options), x, 4) >= 2000


def test_thresholds_folded_into_weights() -> None:
    x = images(4)
    snn = convert(convnet(), x, T=4, normalize="weights")
    assert check(snn, x, 4) > 300


def test_the_first_layer_is_a_point_and_that_of_its_own_run() -> None:
    x = images(4)
    snn = convert(convnet(), x, T=8)
    first = snn.certify(x).layers[0]
    assert torch.equal(first.low, first.high)
    assert torch.equal(first.low, counts(snn, x, 8)[0][first.name].to(torch.int32))
    assert first.certain == 1
    assert first.width == 0


def test_a_network_of_one_layer_is_proven_and_exact() -> None:
    """Constant current: the spiking network is the QCFS network, and that is a proof."""
    net = make_dyadic(nn.Sequential(nn.Flatten(), nn.Linear(27, 6), QCFS(4, 2.0), nn.Linear(6, 3)))
    x = dyadic(16, 3, 3, 3)
    certificate = convert(net, T=4).certify(x)
    torch.testing.assert_close(certificate.quantised, net(x).detach(), atol=1e-6, rtol=0)
    torch.testing.assert_close(certificate.low, certificate.high, atol=1e-4, rtol=0)
    clear = net(x).topk(2, 1).values.diff(dim=1).abs().squeeze(1) > 1e-3
    assert torch.equal(certificate.proven, clear)
    assert int(clear.sum()) > 0


@pytest.mark.parametrize("normalize", ["threshold", "weights"])
@pytest.mark.parametrize(("method", "activation"), [("rnl", RateNorm), ("datta", nn.ReLU)])
def test_the_quantised_network_weighs_spikes_as_the_spiking_one(
    method: str, activation: Callable[[], nn.Module], normalize: str
) -> None:
    """Spikes that do not weigh θ: of one layer the two networks are the same; of two, a loop."""
    x = dyadic(16, 3, 3, 3)
    one = nn.Sequential(nn.Flatten(), nn.Linear(27, 6), activation(), nn.Linear(6, 3))
    one(x)
    snn = convert(one.eval(), x, method=method, T=4, normalize=normalize)
    with torch.no_grad():
        torch.testing.assert_close(snn.certify(x).quantised, snn(x), atol=1e-5, rtol=0)

    torch.manual_seed(1)
    two = nn.Sequential(
        nn.Flatten(), nn.Linear(27, 6), activation(), nn.Linear(6, 5), activation(), nn.Linear(5, 3)
    )
    two(x)
    snn = convert(two.eval(), x, method=method, T=4, normalize=normalize)
    plain = convert(two, x, method=method, T=4)  # spikes of which the weight can be seen
    h = x.flatten(1)
    for (_, layer), linear in zip(plain.neurons(), (two[1], two[3]), strict=True):
        count = (linear(h) * 4 / layer.node.threshold).floor().clamp(0, 4)
        h = layer._weight() * count / 4
    torch.testing.assert_close(snn.certify(x).quantised, two[5](h).detach(), atol=1e-4, rtol=0)


def test_a_proof_that_needs_the_difference_of_two_classes() -> None:
    """Both logits follow the same uncertain neuron, their difference does not."""
    net = nn.Sequential(
        nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1, bias=False), nn.ReLU(), nn.Linear(1, 2)
    )
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0], [1.0]]))
        net[0].bias.copy_(torch.tensor([0.0, 0.0]))
        net[2].weight.copy_(torch.tensor([[1.0, -1.0]]))
        net[4].weight.fill_(8.0)
        net[4].bias.copy_(torch.tensor([0.0, 1.0]))
    snn = convert(net, T=4, threshold=1.0)
    certificate = snn.certify(torch.tensor([[0.5]]))
    layer = certificate.layers[1]
    assert int(layer.low) == 0
    assert int(layer.high) == 2  # two spikes may come before the two that cancel them
    assert certificate.low[0, 1] < certificate.high[0, 0]  # the intervals overlap
    assert certificate.proven.tolist() == [True]
    assert certificate.prediction.tolist() == [1]


@pytest.mark.parametrize(
    "last", [nn.LogSoftmax(1), nn.Softmax(1), nn.Sigmoid(), nn.Tanh()], ids=str
)
def test_answers_behind_a_softmax(last: nn.Module) -> None:
    x = images(4)
    snn = convert(nn.Sequential(convnet(), last), x, T=8)
    assert check(snn, x, 8) > 300


def test_answers_with_positions() -> None:
    """Segmentation: one prediction for each position."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1))
    x = images(2)
    certificate = convert(net, x, T=4).certify(x)
    assert certificate.proven.shape == (2, 6, 6)
    assert bool(certificate.proven.all())


def test_certify_leaves_the_network_as_it_was() -> None:
    x = images(4)
    snn = convert(convnet(), x, T=8)
    with torch.no_grad():
        before = snn(x)
        snn.certify(x, 3)
        assert torch.equal(snn(x), before)
    assert snn.extra_steps == 0
    assert not snn.certify(x).low.requires_grad


def test_the_table() -> None:
    x = images(4)
    certificate = convert(convnet(), x, T=8).certify(x, 4)
    text = str(certificate)
    assert "count certain" in text
    assert [layer.low[0].numel() for layer in certificate.layers] == [80, 6, 8]
    assert "of 4" in text
    assert "T=4" in text
    name = certificate.layers[0].name
    assert certificate[name] is certificate.layers[0]
    with pytest.raises(KeyError, match="there are"):
        certificate["nothing"]


# What is refused.


@pytest.mark.parametrize("method", ["srp", "cos", "parallel", "signed"])
def test_other_ways_to_run_are_refused(method: str) -> None:
    x = images(2)
    with pytest.raises(ConversionError, match=f"method '{method}'"):
        convert(convnet(), x, T=4, method=method).certify(x)


@pytest.mark.parametrize(
    ("attribute", "value", "words"),
    [
        ("max_spikes", 4, "bursts"),
        ("v_reset", 0.0, "a reset to a value"),
        ("tie", ">", "tie='>'"),
        ("beta", 0.5, "a leak"),
        ("bias", 0.5, "a bias of its own"),
        ("fire_level", 0.5, "a fire level"),
        ("mask", torch.ones(1), "a mask"),
    ],
)
def test_other_neurons_are_refused(attribute: str, value: object, words: str) -> None:
    x = images(2)
    snn = convert(convnet(), x, T=4)
    setattr(next(snn.neurons())[1].node, attribute, value)
    with pytest.raises(ConversionError, match=words):
        snn.certify(x)


@pytest.mark.parametrize("v_init", [-0.25, 1.0, 2.0])
def test_starts_outside_are_refused(v_init: float) -> None:
    x = images(2)
    snn = convert(convnet(), x, T=4, threshold=1.0, v_init=v_init)
    with pytest.raises(ConversionError, match=r"v_init of 2 must lie in \[0, θ\)"):
        snn.certify(x)


def test_operations_without_a_rule_are_named() -> None:
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.fc(self.norm(F.relu(x))))

    x = dyadic(4, 6)
    snn = convert(nn.Sequential(Kept(), nn.Linear(6, 2)), x, T=4, on_unsupported="keep")
    with pytest.raises(ConversionError, match=r"0.norm \(LayerNorm\) has no rule"):
        snn.certify(x)
    snn = convert(nn.Sequential(nn.ReLU(), nn.Linear(6, 2), nn.GELU()), x, T=4)
    with pytest.raises(ConversionError, match=r"2 \(GELU\) has no rule"):
        snn.certify(x)


class Between(nn.Module):
    """One operation between two layers of neurons, and one behind the last."""

    def __init__(self, inner: Callable[..., Any], outer: Callable[..., Any] = lambda net, h: h):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.inner, self.outer = nn.Conv2d(3, 4, 3, padding=1), inner, outer
        self.square, self.column = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
        self.maps = nn.Parameter(torch.randn(4, 8, 8))
        self.picks = nn.Buffer(torch.tensor([2, 0, 1]))
        self.norm = randomize(nn.BatchNorm2d(4, affine=False))
        self.zeros, self.mirror = nn.ZeroPad2d(1), nn.ReflectionPad2d(1)
        self.up, self.smooth = nn.Upsample(scale_factor=2), nn.Upsample((5, 11), mode="bilinear")
        self.mean, self.pool = nn.AvgPool2d(3, 2, 1), nn.MaxPool2d(3, 2, 1)
        self.out = nn.LazyLinear(5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.inner(self, F.relu(self.conv(x)) - 0.125))
        return self.outer(self, self.out(F.relu(h.flatten(1) * 0.5)))


def between(*functions: Callable[..., Any], T: int = 4) -> tuple[ConvertedNetwork, Tensor]:
    x = images(3)
    net = Between(*functions)
    net(x)
    return convert(net.eval(), x, T=T, progress=False), x


@pytest.mark.parametrize(
    "inner",
    [
        pytest.param(function, id=name)
        for name, function in {
            "linear": lambda net, h: F.linear(h, net.square, net.column),
            "linear by name": lambda net, h: F.linear(weight=net.square, input=h),
            "matmul": lambda net, h: h @ net.square,
            "matmul of a vector": lambda net, h: h.matmul(net.column),
            "matmul by name": lambda net, h: torch.matmul(h, other=net.square),
            "rsub": lambda net, h: torch.rsub(h, 0.5),
            "neg": lambda net, h: 0.25 - (-h),
            "true_divide": lambda net, h: torch.true_divide(h, -2.0) + 0.25,
            "product": lambda net, h: net.maps * h,
            "stack": lambda net, h: torch.stack([h, 0.5 - h], dim=1).sum(2),
            "cat by name": lambda net, h: torch.cat(tensors=[h, 0.5 - h], dim=1),
            "mean": lambda net, h: h - h.mean(dim=(2, 3), keepdim=True),
            "mT": lambda net, h: h.mT - 0.25 * h,
            "data": lambda net, h: h.data - 0.125,
            "shape": lambda net, h: h.view(h.shape[0], -1)[:, : 8 * h.size(1)] / h.ndim,
            "unbind": lambda net, h: h.unbind(1)[0] - h.tensor_split(2, 1)[1][:, 1],
            "repeat": lambda net, h: h.repeat(1, 2, 1, 1) - h.repeat_interleave(2, 1),
            "roll": lambda net, h: h.roll(1, 2) - h.index_select(1, net.picks).sum(1, keepdim=True),
            "pad": lambda net, h: F.pad(h, (1, 2)) - F.pad(pad=(2, 1), input=h),
            "area": lambda net, h: F.interpolate(h, (3, 5), None, "area"),
            "bilinear": lambda net, h: F.interpolate(h, (11, 5), mode="bilinear"),
            "nearest": lambda net, h: F.interpolate(h, (13, 3)),
            "norm": lambda net, h: net.norm(F.relu(h)),
            "zeros": lambda net, h: net.zeros(h),
            "mirror": lambda net, h: net.mirror(h),
            "up": lambda net, h: net.up(h),
            "smooth": lambda net, h: net.smooth(h),
            "average": lambda net, h: net.mean(h),
            "max": lambda net, h: net.pool(h) - 0.125,
        }.items()
    ],
)
def test_rules_one_by_one(inner: Callable[..., Any]) -> None:
    """Spiking runs of two T, of a prefix of the steps and the quantised ANN are all inside."""
    snn, x = between(inner)
    assert min(check(snn, x, 4), check(snn, x, 1)) > 800


@pytest.mark.parametrize(
    "outer",
    [
        pytest.param(function, id=name)
        for name, function in {
            "softmax": lambda net, h: torch.softmax(h, 1),
            "log_softmax by name": lambda net, h: F.log_softmax(input=h, dim=-1),
            "wider": lambda net, h: F.softmax(h, 1, dtype=torch.float64),
            "sigmoid": lambda net, h: torch.sigmoid(h),
            "tanh": lambda net, h: h.tanh() * torch.ones(5, dtype=h.dtype),
            "over the batch": lambda net, h: F.log_softmax(h, 0),
            "transposed": lambda net, h: h.T,
        }.items()
    ],
)
def test_rules_behind_the_last_neurons(outer: Callable[..., Any]) -> None:
    snn, x = between(lambda net, h: h, outer)
    assert min(check(snn, x, 4), check(snn, x, 1)) > 800


@pytest.mark.parametrize("maxpool", ["cumulative", "pre_spike"])
def test_max_pools_of_currents(maxpool: str) -> None:
    """Behind the second layer: of currents that change from step to step."""
    torch.manual_seed(0)
    convs = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
    net = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    net.extend([nn.Flatten(), nn.Linear(64, 4)])
    x = images(3)
    assert check(convert(net, x, T=4, maxpool=maxpool, progress=False), x, 4) > 800


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_nearest_elements_are_those_the_network_picks(dtype: torch.dtype) -> None:
    """2 to 82 elements: the position of one is rounded up in float32, down in float64."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Conv1d(1, 2, 1), nn.Linear(2 * 82, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = F.interpolate(F.relu(self.first(x)), 82) - 0.125
            return self.last(F.relu(h).flatten(1))

    x = torch.randn(8, 1, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert check(convert(Net().to(dtype), x, T=4, progress=False), x, 4) > 1000


@pytest.mark.parametrize(
    ("inner", "words"),
    [
        (lambda net, h: net.square @ h, r"matmul \(matmul\) with a value .* on the right"),
        (lambda net, h: h @ net.maps, r"matmul \(matmul\) with a batch of matrices"),
        (lambda net, h: torch.add(h, h, alpha=2), r"add_?\d* \(add\) with keywords"),
        (lambda net, h: F.pad(h, (1, 1), value=1.0), r"pad \(pad, value=1.0\) has no rule"),
        (lambda net, h: F.interpolate(h, 9, mode="bicubic"), r"interpolate .*mode='bicubic'\)"),
        (lambda net, h: torch.where(net.maps > 0, h, -h), r"where \(where\) has no rule"),
    ],
)  # fmt: skip
def test_operations_the_rules_leave_out(inner: Callable[..., Any], words: str) -> None:
    snn, x = between(inner)
    with pytest.raises(ConversionError, match=f"certify: {words}"):
        snn.certify(x)


@pytest.mark.parametrize(
    ("outer", "words"),
    [
        (lambda net, h: h / 0.0, r"truediv_?\d* \(truediv\) with a factor that is not finite"),
        (lambda net, h: h * h, r"mul_?\d* \(mul\) of two values that change"),
        (lambda net, h: F.softmax(h, 1, dtype=torch.float16), r"softmax .* in torch.float16, less"),
        (lambda net, h: h.mean(1, dtype=torch.bfloat16), r"mean .* in torch.bfloat16, less exact"),
        (lambda net, h: h + h.nbytes, r"getattr_?\d* \(getattr, 'nbytes'\) has no rule"),
        (lambda net, h: h.exp(), r"exp \(exp\) has no rule"),
    ],
)
def test_operations_the_rules_leave_out_behind_the_last(
    outer: Callable[..., Any], words: str
) -> None:
    snn, x = between(lambda net, h: h, outer)
    with pytest.raises(ConversionError, match=f"certify: {words}"):
        snn.certify(x)


def test_statistics_of_the_batch_have_no_bounds() -> None:
    own = nn.BatchNorm1d(5, track_running_stats=False)
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.ReLU(), own).eval(), images(3)
    with pytest.raises(ConversionError, match=r"\(BatchNorm1d\) uses the statistics of the batch"):
        convert(net, x, T=4, progress=False).certify(x)


def test_layers_with_a_forward_of_their_own_have_no_bounds() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).abs()

    snn, x = convert(convnet(), images(3), T=4, progress=False), images(3)
    name = next(n for n, m in snn.suffix.named_modules() if isinstance(m, nn.Linear))
    snn.suffix.set_submodule(name, Own(8, 4))
    with pytest.raises(ConversionError, match=r"\(Own\) has a forward of its own") as caught:
        snn.certify(x)
    assert "\n" not in str(caught.value)  # torch.fx adds where it was


def test_no_samples() -> None:
    x = images(3)
    snn = convert(convnet(), x, T=4, progress=False)
    certificate = snn.certify(x[:0])
    assert certificate.low.shape == certificate.quantised.shape == (0, 4)
    assert certificate.proven.shape == (0,)
    assert "of 0" in str(certificate)


def test_answers_that_are_no_scores_are_refused() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = F.relu(x)
            return x, x

    x = dyadic(4, 6)
    with pytest.raises(ConversionError, match="one tensor"):
        convert(Two(), x, T=4).certify(x)


@pytest.mark.parametrize("T", [0, -1, 1.5, True])
def test_steps_are_checked(T: object) -> None:
    x = images(2)
    with pytest.raises(ValueError, match="T must be"):
        convert(convnet(), x, T=4).certify(x, T)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(4, 6), (2, 7, 6)], ids=str)
def test_sums_over_the_batch_behind_the_neurons(shape: tuple[int, ...]) -> None:
    """Found by fuzzing: one sum over all the bounds at once, which seven channels hid."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.flat = nn.Linear(6, 5), nn.Linear(5, 3), len(shape) == 2

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.first(x))
            return self.last(x.mean(0, keepdim=True) if self.flat else x.sum(dim=0))

    x = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    snn = convert(Net().eval(), x, T=8, progress=False)
    with torch.no_grad():
        answer, proof = snn(x), snn.certify(x)
    assert answer.shape == proof.low.shape == proof.quantised.shape
    assert ((proof.low - 1e-5 <= answer) & (answer <= proof.high + 1e-5)).all()
    assert ((proof.low - 1e-5 <= proof.quantised) & (proof.quantised <= proof.high + 1e-5)).all()


def test_an_answer_without_classes_is_refused() -> None:
    """Found by test_fuzz_networks.py: it was an IndexError."""

    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(x)[:, :0]

    snn = convert(Empty().eval(), torch.rand(4, 3), T=2, threshold="max", progress=False)
    with pytest.raises(ConversionError, match=r"answer has shape \(4, 0\)"):
        snn.certify(torch.rand(4, 3))
