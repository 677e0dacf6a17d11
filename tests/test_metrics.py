"""Firing rates, synaptic operations and energy, against counts by loops and SpikingJelly's."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import optional
from torch import Tensor, nn

from snnkernels import convert, lower, metrics, models
from snnkernels.conversion import QCFS
from snnkernels.conversion.methods import METHODS, STBIF


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def spikes_of(snn: nn.Module, x: Tensor, T: int, label: str) -> Tensor:
    """Spikes ``[T, B, *]`` of one layer."""
    found = []
    layer = dict(snn.neurons())[label]
    handle = layer.register_forward_hook(lambda m, a, out: found.append(out))
    with torch.no_grad():
        snn(x, T=T)
    handle.remove()
    (out,) = found
    return out.reshape(-1, len(x), *out.shape[1:])


def by_loops(layer: Any, spikes: Tensor, out_shape: tuple[int, ...]) -> list[int]:
    """Synaptic operations of each sample: every spike, tap and output channel of its own group."""
    transposed = isinstance(layer, nn.ConvTranspose2d)
    of_group = layer.out_channels // layer.groups
    totals = [0] * spikes.shape[1]
    for _, b, _, i, j in (spikes != 0).nonzero().tolist():
        for k, m in itertools.product(range(layer.kernel_size[0]), range(layer.kernel_size[1])):
            reached = True
            for at, tap, d in ((i, k, 0), (j, m, 1)):
                step, pad = layer.stride[d], layer.padding[d]
                if transposed:
                    place = at * step + tap * layer.dilation[d] - pad
                else:
                    place = at + pad - tap * layer.dilation[d]
                    reached &= place % step == 0
                    place //= step
                reached &= 0 <= place < out_shape[d]
            totals[b] += of_group * reached
    return totals


LAYERS = {
    "plain": nn.Conv2d(4, 6, 3, padding=1),
    "stride": nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "no padding": nn.Conv2d(4, 6, (3, 2), stride=(1, 3)),
    "groups": nn.Conv2d(4, 6, 3, padding=2, groups=2),
    "depthwise": nn.Conv2d(4, 4, 5, padding=2, groups=4, bias=False),
    "dilation": nn.Conv2d(4, 6, 3, padding=2, dilation=2),
    "transposed": nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
    "transposed groups": nn.ConvTranspose2d(4, 6, 3, dilation=2, groups=2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_operations_are_those_counted_by_loops(name: str) -> None:
    torch.manual_seed(1)
    layer = LAYERS[name]
    ann = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), layer, nn.ReLU()).eval()
    x = images(3, 1, 7, 6)
    snn = convert(ann, x, T=3, threshold="max", progress=False)
    fired = spikes_of(snn, x, 3, "1")
    shape = ann(x).shape[2:]
    found = metrics.synaptic_operations(snn, x)
    wanted = by_loops(layer, fired, shape)
    assert sum(wanted) > 0
    assert found.per_sample.tolist() == wanted
    first, second = found.layers
    assert (first.kind, second.kind) == ("analog", "spikes")
    assert second.arrived == (fired != 0).sum() / 3
    # All neurons firing once: the connections, and the ANN's multiply-adds.
    ones = torch.ones(1, 1, *fired.shape[2:])
    assert second.connections == by_loops(layer, ones, shape)[0]
    assert found.ann_macs == first.connections + second.connections
    assert first.macs == first.connections == by_loops(ann[0], torch.ones(1, 1, 1, 7, 6), (7, 6))[0]


def test_linear_layers_and_energy_by_hand() -> None:
    """One layer of two neurons: currents 1 and 0.25, thresholds 1, start 1/2, T = 4."""
    ann = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 3), nn.ReLU()).eval()
    with torch.no_grad():
        for layer in (ann[0], ann[2]):
            layer.weight.fill_(0.0)
            layer.bias.zero_()
        ann[0].weight.copy_(torch.eye(2))
    snn = convert(ann, T=4, threshold=1.0, progress=False)
    x = torch.tensor([[1.0, 0.25]])
    found = metrics.synaptic_operations(snn, x)
    # 4 spikes and 1: each reaches 3 neurons, whatever the weights are.
    assert found.additions == 15.0
    assert found.macs == 4.0
    assert found.ann_macs == 10.0
    assert found.spikes == 5.0
    cost = metrics.energy(found)
    assert cost.snn == pytest.approx(15 * 0.9 + 4 * 4.6)
    assert cost.ann == pytest.approx(46.0)
    assert cost.ratio == cost.snn / cost.ann
    assert cost.layers == {"0": pytest.approx(18.4), "2": pytest.approx(13.5)}
    assert metrics.energy(found, add_pj=0, mac_pj=1).snn == 4.0
    every = metrics.synaptic_operations(snn, x, input_every_step=True)
    assert every.macs == 16.0
    assert metrics.firing_rates(snn, x)["1"].item() == 5 / 8
    assert metrics.firing_rates(snn, x, per="neuron")["1"].tolist() == [1.0, 0.25]
    assert metrics.firing_rates(snn, x, T=8, per="channel")["1"].tolist() == [1.0, 0.25]


class Residual(nn.Module):
    """Spikes that are pooled by means, added and concatenated on their way to a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(1, 2, 1)
        self.pool = nn.AvgPool2d(2)
        self.last = nn.Linear(2 * 2 * 3 * 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).relu(), self.second(x).relu()
        both = torch.cat([self.pool(a + b), self.pool(b) * 0.5], 1)
        return self.last(both.flatten(1)).relu()


@pytest.mark.parametrize("pool", [
    nn.AvgPool2d(2), nn.AvgPool2d(4, 2, 1, count_include_pad=False), nn.AdaptiveAvgPool2d(3),
])  # fmt: skip
def test_sums_and_means_are_the_spikes_in_them(pool: nn.Module) -> None:
    torch.manual_seed(0)
    ann = Residual().eval()
    ann.pool = pool
    x = images(2, 1, 6, 6)
    snn = convert(ann, x, T=4, threshold="max", progress=False)
    found = metrics.synaptic_operations(snn, x)
    a, b = (spikes_of(snn, x, 4, f"relu{i}") != 0 for i in ("", "_1"))
    # How many windows a position is in, by trying each.
    windows = torch.zeros(6, 6)
    for i, j in itertools.product(range(6), range(6)):
        one = torch.zeros(1, 1, 6, 6)
        one[0, 0, i, j] = 1
        windows[i, j] = (pool(one) != 0).sum()
    many = ((a.double() + 2 * b.double()) * windows).sum((0, 2, 3, 4))
    assert found.per_sample.tolist() == (5 * many).tolist()
    assert [row.kind for row in found.layers] == ["analog", "analog", "spikes"]


class Reached(nn.Module):
    """Neurons, a function of their spikes ``[B, 4, 6, 6]``, and a layer behind it."""

    def __init__(self, function: Any, **modules: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.function = nn.Conv2d(1, 4, 3, padding=1), function
        self.scale = nn.Parameter(torch.rand(4, 1, 1) + 0.5)
        self.square = nn.Parameter(torch.rand(6, 6) + 0.5)
        self.kernel = nn.Parameter(torch.rand(3, 2, 3, 2) + 0.5)
        self.last = nn.LazyLinear(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self, self.first(x).relu()).flatten(1)).relu()


MOVED = {
    "cat": lambda net, h: torch.cat([h, h.flip(2)], 1),
    "split": lambda net, h: h.split(2, 1)[1] - h.chunk(2, 1)[0],
    "unbind": lambda net, h: torch.stack([h.unbind(1)[0], h.select(1, 2)], 1),
    "tensor_split": lambda net, h: torch.tensor_split(h, 2, 3)[1],
    "repeat": lambda net, h: h.repeat(1, 2, 1, 1),
    "repeat_interleave": lambda net, h: torch.repeat_interleave(h, 2, 2),
    "movedim": lambda net, h: h.movedim(1, 3).swapaxes(1, 2),
    "pad": lambda net, h: F.pad(h, (1, 2, 0, 1)),
    "scaled": lambda net, h: -(h * net.scale) / 2.0,
    "expand": lambda net, h: h[:, :, None].expand(-1, -1, 3, -1, -1),
    "mean": lambda net, h: h.mean(1),
    "mean by name": lambda net, h: torch.mean(input=h, dim=(2, 3), keepdim=True),
    "sum": lambda net, h: h.sum((1, 3)),
    "window": lambda net, h: F.avg_pool2d(h, 3, 2, 1),
    "window by name": lambda net, h: F.avg_pool2d(h, kernel_size=(3, 2), ceil_mode=True),
    "window 1d": lambda net, h: F.avg_pool1d(h.flatten(2), 4, stride=3),
    "window 3d": lambda net, h: F.avg_pool3d(h[:, None], 2),
    "adaptive": lambda net, h: F.adaptive_avg_pool2d(h, (4, None)),
    "adaptive by name": lambda net, h: F.adaptive_avg_pool2d(h, output_size=5),
    "adaptive 1d": lambda net, h: F.adaptive_avg_pool1d(h.flatten(2), 7),
}


@pytest.mark.parametrize("name", MOVED)
def test_spikes_are_followed_to_where_they_arrive(name: str) -> None:
    """The oracle: which outputs of the function a spike reaches, from its Jacobian."""
    x, net = images(2, 1, 6, 6), Reached(MOVED[name])
    net(x)
    snn = convert(net.eval(), x, T=3, threshold="max", progress=False)
    found = metrics.synaptic_operations(snn, x)
    fired = (spikes_of(snn, x, 3, "relu") != 0).double()
    one = torch.rand(1, 4, 6, 6)
    jacobian = torch.autograd.functional.jacobian(lambda h: net.function(net, h), one)
    reached = (jacobian != 0).reshape(-1, 4, 6, 6).double().sum(0)
    assert found.layers[-1].kind == "spikes"
    assert found.per_sample.tolist() == (5 * (fired * reached)).sum((0, 2, 3, 4)).tolist()
    assert found.additions > 0


@pytest.mark.parametrize(
    "function",
    [
        lambda net, h: F.linear(h, net.square, net.square[0]),
        lambda net, h: F.linear(input=h, weight=net.square),
        lambda net, h: F.conv2d(h[:, :2], net.kernel, None, (2, 1), padding=1),
        lambda net, h: F.conv2d(h[:, 1:3], bias=net.square[0, :3], weight=net.kernel, dilation=2),
    ],
)
def test_functions_with_weights_are_layers(function: Any) -> None:
    x, net = images(2, 1, 6, 6), Reached(lambda net, h: function(net, h).relu())
    net(x)
    snn = convert(net.eval(), x, T=3, threshold="max", progress=False)
    found = metrics.synaptic_operations(snn, x)
    fired = (spikes_of(snn, x, 3, "relu") != 0).double()
    jacobian = torch.autograd.functional.jacobian(
        lambda h: function(net, h), torch.rand(1, 4, 6, 6)
    )
    reached = (jacobian != 0).reshape(-1, 4, 6, 6).double().sum(0)
    row = found.layers[1]
    assert row.kind == "spikes"
    assert row.connections == float(reached.sum())
    assert row.additions == float((fired * reached).sum()) / 2
    assert found.ann_macs == sum(layer.connections for layer in found.layers)


@pytest.mark.parametrize(
    "function",
    [
        lambda net, h: F.pad(h, (1, 1), value=1.0),
        lambda net, h: F.pad(h, (1, 1), "constant", 0.5),
        lambda net, h: h + net.scale,
        lambda net, h: F.interpolate(h, (3, 3), mode="bilinear"),
        lambda net, h: h.cumsum(1),
    ],
)
def test_what_is_not_made_of_spikes_alone(function: Any) -> None:
    x, net = images(2, 1, 6, 6), Reached(function)
    net(x)
    snn = convert(net.eval(), x, T=3, threshold="max", progress=False)
    found = metrics.synaptic_operations(snn, x)
    fired = spikes_of(snn, x, 3, "relu")
    arrives = [(function(net, step) != 0).sum().item() for step in fired]
    row = found.layers[-1]
    assert (row.kind, row.additions) == ("values", 0.0)
    assert row.macs == sum(arrives) * 5 / 2


def test_products_of_values_before_and_behind_the_neurons_are_named() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.fc(torch.einsum("bi,bj->bj", x, x)).relu()
            return torch.matmul(h, h.t())

    x = images(3, 4)
    found = metrics.synaptic_operations(convert(Products(), x, T=3, progress=False), x)
    assert [note.split()[0] for note in found.notes] == ["einsum", "matmul"]


def test_values_that_are_no_spikes_are_multiplied() -> None:
    torch.manual_seed(0)
    ann = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5, bias=False), nn.Linear(5, 3), nn.ReLU()
    ).eval()
    x = images(3, 4)
    snn = convert(ann, x, T=3, progress=False)
    kinds = {row.name: (row.kind, row.additions, row.macs)
             for row in metrics.synaptic_operations(snn, x).layers}  # fmt: skip
    assert kinds["2"][0] == "spikes"
    assert kinds["2"][2] == 0
    silent = float((spikes_of(snn, x, 3, "1").flatten(2) == 0).all(2).sum()) / 3
    assert kinds["3"] == ("values", 0.0, (3 - silent) * 15)


def test_attention_is_named() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            a = self.fc(x).relu()
            return self.out(torch.bmm(a, a.transpose(1, 2)).softmax(-1) @ a).relu()

    x = images(2, 3, 4)
    snn = convert(Product().eval(), x, T=2, on_unsupported="mean", progress=False)
    notes = metrics.synaptic_operations(snn, x).notes
    assert any("multiplies values with each other: not counted" in note for note in notes)


@pytest.fixture(scope="module")
def quantised() -> nn.Module:
    torch.manual_seed(0)
    return models.small_cnn(activation=lambda: QCFS(levels=4)).eval()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_counted(name: str, quantised: nn.Module) -> None:
    torch.manual_seed(0)
    ann, method = models.small_cnn().eval(), name
    if name in ("qcfs", "st_bif"):
        ann = quantised
    if name == "rnl":
        from snnkernels import RateNorm

        ann = models.small_cnn(activation=RateNorm).eval()
    x = images(4, 1, 8, 8)
    snn = convert(ann, x, T=4, method=method, progress=False)
    found = metrics.synaptic_operations(snn, x)
    assert [row.kind for row in found.layers] == ["analog", *["spikes"] * 4, "analog"]
    assert found.ann_macs == sum(row.connections for row in found.layers)
    for row in found.layers[1:-1]:
        assert 0 <= row.additions <= row.arrived * 9 * 128
    rates = metrics.firing_rates(snn, x)
    assert list(rates) == [label for label, _ in snn.neurons()]
    if METHODS[name].binary and not snn._clock.steps.before and not snn._clock.steps.delay:
        for label, rate in rates.items():
            assert rate.item() == pytest.approx(snn.report[label].rate, rel=1e-6)
            assert rate.item() <= 1
    assert found.per_sample.shape == (4,)
    assert float(found.per_sample.mean()) == pytest.approx(found.additions)


def test_bursts_are_as_many_spikes() -> None:
    ann = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2), nn.ReLU()).eval()
    with torch.no_grad():
        for layer in (ann[0], ann[2]):
            layer.weight.fill_(1.0)
            layer.bias.zero_()
    snn = convert(ann, T=2, threshold=1.0, method="burst", progress=False)
    x = torch.tensor([[3.0]])
    fired = spikes_of(snn, x, 2, "1").flatten()
    found = metrics.synaptic_operations(snn, x)
    # All have one size; more than one comes at a step.
    weight = float(snn.body.get_submodule("1")._weight())
    assert fired.sum() / weight == found.neurons["1"] > 2
    assert found.additions == 2 * found.neurons["1"]


def test_spikes_of_either_sign_count() -> None:
    torch.manual_seed(0)
    ann = nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3), nn.ReLU()
    ).eval()
    x = images(8, 4) * 4 - 2
    snn = convert(ann, x, T=6, method=STBIF(levels=4), progress=False)
    fired = spikes_of(snn, x, 6, "3")
    assert (fired < 0).any()
    found = metrics.synaptic_operations(snn, x)
    assert found.neurons["3"] == pytest.approx(float((fired != 0).sum()) / 8)
    assert found.layers[2].additions == 3 * found.neurons["3"]


def test_a_plan_counts_as_its_network() -> None:
    torch.manual_seed(0)
    x = images(2, 1, 8, 8)
    snn = convert(models.small_cnn().eval(), x, T=4, progress=False)
    plain = metrics.synaptic_operations(snn, x)
    assert metrics.synaptic_operations(lower(snn), x).layers == plain.layers
    # Nothing of the count stays behind.
    assert "forward" not in vars(snn.body)
    with torch.no_grad():
        first = snn(x)
        metrics.firing_rates(snn, x, T=2)
        assert torch.equal(snn(x), first)


def test_what_is_refused() -> None:
    x = images(2, 1, 8, 8)
    snn = convert(models.small_cnn().eval(), x, T=2, progress=False)
    with pytest.raises(TypeError, match="must be a converted network"):
        metrics.synaptic_operations(nn.Linear(2, 2), x)
    with pytest.raises(ValueError, match="per='pixel' is not known"):
        metrics.firing_rates(snn, x, per="pixel")
    with pytest.raises(ValueError, match="no samples"):
        metrics.synaptic_operations(snn, x[:0])
    with pytest.raises(ValueError, match="T must be a whole number"):
        metrics.firing_rates(snn, x, T=0)
    found = metrics.synaptic_operations(snn, x)
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"add_pj=.* must be at least 0"):
            metrics.energy(found, add_pj=bad)


def test_spikingjelly_counts_the_same() -> None:
    """Their counter on our body, layer by layer.

    It counts a convolution or product as synaptic where its input is 0 or 1 only, so thresholds are
    folded into the weights here (with spikes of θ it counts none at all), and it never sees the
    layers before the neurons, whose input is analog. On those inputs the numbers are equal.
    """
    counter = optional("spikingjelly.activation_based.op_counter")
    torch.manual_seed(0)
    ann = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 10), nn.ReLU(), nn.Linear(10, 3),
    ).eval()  # fmt: skip
    x = images(3, 1, 8, 8)
    snn = convert(ann, x, T=4, threshold="max", normalize="weights", progress=False)
    ours = metrics.synaptic_operations(snn, x)
    theirs = counter.SynOpCounter()
    with torch.no_grad(), counter.DispatchCounterMode([theirs]):
        snn(x)
    assert theirs.get_total() == ours.per_sample.sum()
    assert ours.additions > 0
