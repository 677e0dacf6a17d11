"""Max-pool: exact in the mean, before its neurons, through concatenation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conversion_helpers import dyadic, images, relative
from torch import Tensor, nn

from snnkernels.conversion import convert
from snnkernels.conversion.pools import CumulativeMaxPool


@pytest.mark.parametrize(
    "pool",
    [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 1, 1), nn.AdaptiveMaxPool2d(2)],
)
@pytest.mark.parametrize("T", [1, 3, 8])
def test_sum_of_outputs_is_the_maximum_of_the_sums(pool: nn.Module, T: int) -> None:
    x = dyadic(T, 2, 3, 5, 5, seed=T)
    out = CumulativeMaxPool(pool)(x.flatten(0, 1), T).view(T, 2, 3, -1)
    assert torch.equal(out.sum(0), pool(x.sum(0)).flatten(2))


def test_padding_takes_no_part_in_the_maximum() -> None:
    x = -torch.ones(4 * 2, 1, 3, 3)
    out = CumulativeMaxPool(nn.MaxPool2d(3, 2, 1))(x, 4)
    assert torch.equal(out, -torch.ones(8, 1, 2, 2))


def test_constant_current_is_pooled_as_it_is() -> None:
    x = dyadic(2, 3, 4, 4)
    pool = nn.MaxPool2d(2)
    out = CumulativeMaxPool(pool)(x.repeat(5, 1, 1, 1), 5)
    assert torch.equal(out, pool(x).repeat(5, 1, 1, 1))


def test_pieces_carry_the_running_sum_and_reset_forgets_it() -> None:
    x = torch.randn(6, 2, 3, 4, 4)
    pool = CumulativeMaxPool(nn.MaxPool2d(2))
    whole = pool(x.flatten(0, 1), 6)
    pool.reset()
    parts = torch.cat([pool(x[:1].flatten(0, 1), 1), pool(x[1:].flatten(0, 1), 5)])
    assert torch.equal(parts, whole)
    assert not torch.equal(pool(x.flatten(0, 1), 6), whole)
    pool.reset()
    assert torch.equal(pool(x.flatten(0, 1), 6), whole)


def test_sixteen_bit_currents_are_summed_in_float32() -> None:
    x = torch.full((64, 1, 2, 2), 0.1, dtype=torch.bfloat16)
    out = CumulativeMaxPool(nn.MaxPool2d(2))(x, 64)
    assert out.dtype == torch.bfloat16
    assert out.float().sum().item() == pytest.approx(64 * 0.1, rel=5e-3)


def pooled_net(after: bool = True) -> nn.Module:
    torch.manual_seed(0)
    act, pool = nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        *((act, pool) if after else (pool, act)),
        nn.Flatten(),
        nn.Linear(256, 5),
    ).eval()


def test_error_vanishes_where_the_naive_ways_stay_wrong() -> None:
    net, x = pooled_net(), images(8)
    expected = net(x)
    error = {}
    for mode in ("cumulative", "pre_spike", "avg"):
        snn = convert(net, x, threshold="max", T=512, maxpool=mode)
        curve = snn.predict_curve(x, [16, 512])
        error[mode] = {T: relative(y, expected) for T, y in curve.items()}
    assert error["cumulative"][512] < 0.01 < error["cumulative"][16] / 5
    assert error["pre_spike"][512] > 10 * error["cumulative"][512]
    assert error["avg"][512] > 10 * error["cumulative"][512]


def test_average_is_exact_for_the_averaged_network() -> None:
    net, x = pooled_net(), images(4)
    averaged = nn.Sequential(*net[:4], nn.AvgPool2d(2), *net[5:])
    snn = convert(net, x, threshold="max", T=512, maxpool="avg")
    assert relative(snn(x), averaged(x)) < 0.01
    assert any("average" in note for note in snn.report.notes)
    assert "averaged" in snn.report["4"].action


def test_pool_goes_before_its_neurons_and_order_does_not_matter() -> None:
    x = images(4)
    after, before = pooled_net(True), pooled_net(False)
    a, b = (convert(n, x, threshold="max") for n in (after, before))
    assert torch.equal(a(x), b(x))
    assert "moved before its neurons" in a.report["4"].action
    layers = [layer for _, layer in a.neurons()]
    sizes: list[torch.Size] = []
    layers[1].register_forward_hook(lambda m, args, out: sizes.append(args[0].shape))
    a(x, T=2)
    assert sizes == [torch.Size([8, 16, 4, 4])]  # 8 x 8 before the pool


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv0 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv1, self.conv2 = nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 6, 3)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv0(x))
        both = torch.cat([F.relu(self.conv1(x)), F.relu(self.conv2(x))], 1)
        return F.relu(self.conv3(self.pool(both)))


def test_pools_move_through_concatenation() -> None:
    net, x = Branches(), images(4)
    snn = convert(net, x, threshold="max", T=512)
    assert len(list(snn.neurons())) == 4
    assert sum(isinstance(m, CumulativeMaxPool) for m in snn.modules()) == 2
    assert relative(snn(x), net(x)) < 0.01


class Fork(Branches):
    """Un-pooled activations are used as well."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv0(x))
        h = F.relu(self.conv1(x))
        up = F.interpolate(self.pool(h), scale_factor=2)
        return F.relu(self.conv3(torch.cat([h, up], 1)))


def test_neurons_are_doubled_where_unpooled_spikes_are_used_too() -> None:
    net, x = Fork(), images(4)
    snn = convert(net, x, threshold="max", T=512)
    assert [name for name, _ in snn.neurons()] == ["relu", "relu_1", "relu_1_pooled", "relu_2"]
    assert relative(snn(x), net(x)) < 0.01


def test_a_pool_of_averages_needs_no_neuron_behind_it() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 3, 1),
    )
    x = images(3)
    snn = convert(net, x, threshold="max", T=512)
    assert relative(snn(x), net(x)) < 0.01
    assert isinstance(snn.suffix.get_submodule("3"), nn.MaxPool2d)


def test_a_pool_module_used_twice_keeps_two_running_sums() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.convs = nn.ModuleList(nn.Conv2d(c, 8, 3, padding=1) for c in (3, 8, 8, 8))
            self.pool = nn.MaxPool2d(2)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.convs[0](x))
            x = self.pool(F.relu(self.convs[1](x)))
            x = self.pool(F.relu(self.convs[2](x)))
            return F.relu(self.convs[3](x))

    net, x = Net(), images(3)
    snn = convert(net, x, threshold="max", T=512)
    assert sum(isinstance(m, CumulativeMaxPool) for m in snn.modules()) == 2
    assert relative(snn(x), net(x)) < 0.02


class OfPieces(nn.Module):
    """A max-pool behind a concatenation of what another operation returned as one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.relu = nn.Conv2d(2, 4, 1), nn.ReLU()
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.conv(x))
        return self.fc(self.pool(torch.cat(h.chunk(2, 1)[::-1], 1)).flatten(1))


@pytest.mark.parametrize("normalize", ["threshold", "weights"])
def test_a_pool_behind_a_concatenation_of_pieces(normalize: str) -> None:
    """Found by test_fuzz_networks.py: it was a TypeError."""
    ann = OfPieces().eval()
    x = images(4, 2, 4)
    snn = convert(ann, x, T=256, threshold="max", normalize=normalize, progress=False)
    with torch.no_grad():
        assert (snn(x) - ann(x)).abs().max() < 0.02
