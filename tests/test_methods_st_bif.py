"""ST-BIF (SpikeZIP, ICML 2024): signed neurons that settle at the quantised network."""

from __future__ import annotations

import pytest
import torch
from conversion_helpers import Concat, Shortcut, dyadic, images, make_dyadic
from torch import nn

from snnkernels.conversion import QCFS, ConversionError, convert
from snnkernels.conversion.methods import STBIF
from snnkernels.conversion.steps import Clock, Steps
from snnkernels.functional import if_run
from snnkernels.options import Signed

# current, spikes, count, membrane at the end; 4 levels, threshold 1, started at 1/2
EXAMPLES = [
    ([1.0, 1.0, -1.0, -1.0], [1, 1, -1, -1], 0, 0.5),
    ([-2.0, 1.0, 1.0, 2.0], [0, 0, 0, 1], 1, 1.5),
    ([-2.0, 1.0, 1.0, 2.0, 0.0], [0, 0, 0, 1, 1], 2, 0.5),
    ([2.6, 0.0, 0.0, 0.0, 0.0], [1, 1, 1, 0, 0], 3, 0.1),
]


@pytest.mark.parametrize(("x", "spikes", "count", "v"), EXAMPLES)
def test_worked_examples_of_st_bif(x, spikes, count, v) -> None:
    """Worked examples of ST-BIF: step by step, as the neuron that the method builds."""
    x_seq = torch.tensor(x, dtype=torch.float64)[:, None]
    run = if_run(x_seq, 0.5, 1.0, signed=Signed(low=0, high=4))
    assert run.spikes.flatten().tolist() == spikes
    assert run.spikes.sum().item() == count
    assert run.v.item() == pytest.approx(v, abs=1e-12)


@pytest.mark.parametrize(("x", "spikes", "count", "v"), EXAMPLES[3:])
def test_worked_example_of_st_bif_as_a_converted_network(x, spikes, count, v) -> None:
    """Worked example of ST-BIF: the input comes once; the answer is the count, not a rate."""
    snn = convert(nn.Sequential(QCFS(4, 4.0)), method="st_bif", T=5).double()
    curve = snn.predict_curve(torch.tensor([[x[0]]], dtype=torch.float64), range(1, 6))
    counts = [curve[t].item() for t in curve]
    assert [b - a for a, b in zip([0.0, *counts], counts, strict=False)] == spikes
    assert counts[-1] == count
    ((_, layer),) = snn.neurons()
    assert layer.node.v_threshold.item() == 1.0


@torch.no_grad()
def test_a_layer_behind_spikes_of_both_signs() -> None:
    # The first neuron emits 1, 1, 0, ...; the bias of 2.25 reaches the second one once.
    net = nn.Sequential(QCFS(4, 4.0), nn.Linear(1, 1), QCFS(4, 4.0))
    with torch.no_grad():
        net[1].weight.fill_(-1.0)
        net[1].bias.fill_(2.25)
    x = torch.tensor([[2.0]])
    snn = convert(net, method="st_bif", T=7)
    # m = .5 + 2.25 - 1 = 1.75 (+1), .75 - 1 = -.25 (-1), .75, ...
    curve = snn.predict_curve(x, range(1, 8))
    assert [curve[t].item() for t in curve] == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert net(x).item() == 0.0


class Deep(nn.Module):
    """Biases, batch norm, a shortcut, constants and pools between neurons."""

    def __init__(self, L: int, pool: nn.Module) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.bn, self.skip = nn.BatchNorm2d(4), nn.Conv2d(3, 4, 1)
        self.act1, self.act2, self.act3 = QCFS(L, 2.0), QCFS(L, 4.0), QCFS(L, 1.0)
        self.pool, self.c, self.out = pool, nn.Linear(16, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.act1(self.a(x))
        h = self.act2(self.pool(self.bn(self.b(h)) + self.skip(x) + 0.25))
        return self.out(self.act3(self.c(h.flatten(1))))


@pytest.mark.parametrize("normalize", ["threshold", "weights"])
@pytest.mark.parametrize("pool", [nn.AvgPool2d(2), nn.MaxPool2d(2)], ids=["avg", "max"])
def test_settled_it_is_the_quantised_network_exactly(pool: nn.Module, normalize: str) -> None:
    L = 4
    net = make_dyadic(Deep(L, pool)).eval()
    x = dyadic(5, 3, 4, 4, seed=1)
    if normalize == "weights":  # no scale goes through the sum of two branches and a number
        net = nn.Sequential(net.a, net.act1, net.b, net.bn, net.pool, net.act2).eval()
    settled = len([m for m in net.modules() if isinstance(m, QCFS)]) * (L - 1) + 1
    snn = convert(net, method="st_bif", T=settled, normalize=normalize)
    expected = net(x)
    assert len(expected.unique()) > 3
    with torch.no_grad():
        assert torch.equal(snn(x), expected)
        assert torch.equal(snn(x, T=settled + 5), expected)  # and stays there
        assert not torch.equal(snn(x, T=1), expected)  # settling steps are needed


@pytest.mark.parametrize("make", [Shortcut, Concat])
def test_one_layer_settles_in_as_many_steps_as_levels(make) -> None:
    net = make_dyadic(make(8)).eval()
    x = dyadic(3, 3, 6, 6, seed=1)
    with torch.no_grad():
        assert torch.equal(convert(net, method="st_bif", T=8)(x), net(x))


@torch.no_grad()
def test_a_curve_is_separate_runs() -> None:
    net = make_dyadic(Deep(4, nn.AvgPool2d(2))).eval()
    x = dyadic(2, 3, 4, 4, seed=3)
    snn = convert(net, method="st_bif", T=10)
    with torch.no_grad():
        for T, answer in snn.predict_curve(x, [1, 3, 10]).items():
            assert torch.equal(answer, snn(x, T=T))


def test_rounding_moves_no_more_than_neurons_at_the_edge_of_a_level() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), QCFS(8, 2.0), nn.Conv2d(8, 8, 3), QCFS(8, 2.0), nn.Conv2d(8, 8, 3),
        QCFS(8, 2.0),
    ).eval()  # fmt: skip
    x = images(4)
    snn = convert(net, x, method="st_bif", T=22)
    assert snn.report["5"].error < 1e-3
    assert snn.report["5"].rate is not None


def test_the_report_says_when_it_has_settled_and_that_spikes_are_signed() -> None:
    net = nn.Sequential(QCFS(4, 2.0), nn.Linear(2, 2), QCFS(4, 2.0))
    notes = " ".join(convert(net, method="st_bif", T=7).report.notes)
    assert "exact from T=7 on" in notes
    assert "is enough" in notes
    assert "not only 0 and 1" in notes
    assert "may cut it short" in " ".join(convert(net, method="st_bif", T=6).report.notes)
    assert convert(net, method="st_bif").extra_steps == 0


def test_levels_must_be_known() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(ConversionError, match=r"needs a number of levels.*STBIF\(levels=8\)"):
        convert(net, method="st_bif", threshold=1.0)
    snn = convert(net, method=STBIF(levels=4), threshold=2.0, T=4)
    x = dyadic(8, 2)
    make_dyadic(net)
    snn = convert(net, method=STBIF(levels=4), threshold=2.0, T=4)
    expected = 0.5 * torch.clamp(torch.floor((net[0](x) + 0.25) / 0.5), 0, 4)
    with torch.no_grad():
        assert torch.equal(snn(x), expected)


def test_thresholds_from_data_are_made_for_the_levels_not_for_T() -> None:
    net = nn.Sequential(nn.ReLU())
    x = torch.rand(256, 1, generator=torch.Generator().manual_seed(0))
    theta = [
        convert(net, x, method=STBIF(levels=4), T=T, progress=False).report["0"].threshold.item()
        for T in (4, 64)
    ]
    assert theta[0] == theta[1]


@pytest.mark.converted_only
def test_what_it_cannot_do_is_an_error() -> None:
    net = nn.Sequential(QCFS(4, 2.0), nn.Conv1d(2, 2, 1), nn.MaxPool1d(2), QCFS(4, 2.0))
    with pytest.raises(ConversionError, match="cannot max-pool the currents of single steps"):
        convert(net, method="st_bif", maxpool="pre_spike")
    for wrong, error in ((0, ValueError), (2.0, TypeError)):
        with pytest.raises(error, match="levels"):
            STBIF(levels=wrong)
    snn = convert(nn.Sequential(nn.Linear(2, 2), QCFS(4, 2.0)), method="st_bif")
    with pytest.raises(ValueError, match="inference"):
        snn(torch.ones(1, 2))


@pytest.mark.parametrize(
    ("bias", "expected"),
    [
        ("first", [3.0, 2.0, 4.0]),
        ("last", [2.0, 2.0, 5.0]),
        ("spread", [2 + 1 / 3, 2 + 1 / 3, 4 + 1 / 3]),
    ],
)
def test_constant_terms_act_when_the_steps_say(bias: str, expected: list[float]) -> None:
    rows = torch.tensor([1.0, 3.0, 3.0, 5.0], dtype=torch.float64)[:, None]  # silent: 1
    found = Clock(Steps(before=1, whole=True, bias=bias)).currents(rows)
    torch.testing.assert_close(found.flatten(), torch.tensor(expected, dtype=torch.float64))
