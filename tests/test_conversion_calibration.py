"""Thresholds from data: histogram, percentile, MMSE, and what a silent channel gets."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ROOT, optional
from torch import Tensor, nn

from snnkernels.conversion import ClipReLU, ConversionError, convert
from snnkernels.conversion.calibration import mmse_threshold
from snnkernels.conversion.histogram import Histogram


def filled(*batches: Tensor, bins: int = 1024) -> Histogram:
    histogram = Histogram(len(batches[0]), bins)
    for batch in batches:
        histogram.update(batch)
    return histogram


def test_mmse_worked_example() -> None:
    # Worked by hand: best V = 0.99 (i = 10), mse 0.0146896 against 0.0194792 at V = max
    a = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5, 1.1]], dtype=torch.float64)
    V = mmse_threshold(filled(a), 4, torch.zeros(()))
    assert V.item() == pytest.approx(0.99)
    error = (a - V / 4 * torch.floor(torch.clamp(a * 4 / V, 0, 4))).square().mean().item()
    assert error == pytest.approx(0.0146896, abs=1e-7)


@pytest.mark.parametrize("start", ["half", 0.0, 0.2, 1.5])
@pytest.mark.parametrize("T", [1, 4, 16])
def test_mmse_is_the_best_of_the_grid_for_the_staircase_in_force(
    start: float | str, T: int
) -> None:
    a = torch.relu(
        torch.randn(3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(T))
    )
    v_init = 0.5 if start == "half" else torch.tensor(start, dtype=torch.float64)
    chosen = mmse_threshold(filled(a, bins=1 << 16), T, v_init)
    for c in range(3):

        def error(V: float, a: Tensor = a[c]) -> float:
            v0 = V / 2 if start == "half" else float(start)
            count = torch.floor((a * T + v0) / V).clamp(0, T)
            return (a - V / T * count).square().mean().item()

        best = min(error(a[c].max().item() * (1 - 0.01 * i)) for i in range(95))
        assert error(chosen[c].item()) == pytest.approx(best, rel=1e-9)


def test_histogram_widens_without_losing_anything() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.rand(3, 50, generator=generator) * s for s in (0.01, 1.0, 300.0)]
    batches[0][1] = 0  # a channel that starts later than the others
    histogram = filled(*batches)
    everything = torch.cat(batches, 1)
    assert torch.equal(histogram.maximum, everything.amax(1).double())
    value, weight = histogram.points()
    torch.testing.assert_close((value * weight).sum(1), everything.double().sum(1))
    assert torch.equal(histogram.counts.sum(1), (everything > 0).sum(1))
    assert histogram.total == 150
    assert bool((histogram.range <= 2 * histogram.maximum).all())
    width = (histogram.range / histogram.bins)[:, None]
    table = torch.zeros_like(histogram.counts)
    table.scatter_add_(1, (value / width).long(), weight.long())
    assert torch.equal(table, histogram.counts)  # every mean lies in its bin


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=60),
    st.floats(0.5, 100),
)
def test_percentile_of_few_values_is_numpys(values: list[float], percent: float) -> None:
    a = torch.tensor([values])
    histogram = filled(a)
    expected = torch.quantile(a.double(), percent / 100).item()
    width = histogram.range.item() / histogram.bins
    assert abs(histogram.percentile(percent).item() - expected) <= 2 * width + 1e-9


def test_percentile_of_many_values() -> None:
    a = torch.relu(torch.randn(2, 50_000, generator=torch.Generator().manual_seed(1)))
    got = filled(*a.split(10_000, dim=1)).percentile(99.9)
    torch.testing.assert_close(got, torch.quantile(a.double(), 0.999, dim=1), rtol=0.01, atol=0)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))


DATA = torch.randn(64, 4, generator=torch.Generator().manual_seed(5))


def activations(ann: nn.Module) -> list[Tensor]:
    return [ann[:2](DATA).detach(), ann[:4](DATA).detach()]


def test_max_per_channel_and_per_layer() -> None:
    ann = net()
    per_channel, per_layer = (
        convert(ann, DATA, threshold="max", per_channel=flag) for flag in (True, False)
    )
    for name, a in zip(("1", "3"), activations(ann), strict=True):
        alive = a.amax(0) > 0
        theta = per_channel.report[name].threshold
        assert torch.equal(theta[alive], a.amax(0)[alive])
        assert torch.equal(per_layer.report[name].threshold, a.max())


def test_the_split_into_batches_does_not_matter() -> None:
    ann = net()
    for rule in ("max", "99%", "mmse"):
        whole = convert(ann, DATA, threshold=rule)
        for loader in (DATA.split(7), [(b, "label") for b in DATA.split(16)], iter(DATA.split(20))):
            pieces = convert(ann, loader, threshold=rule, progress=False)
            for row in whole.report.rows:
                if row.threshold is not None:
                    other = pieces.report[row.name].threshold
                    torch.testing.assert_close(other, row.threshold, rtol=0.02, atol=0)


def test_percentile_threshold() -> None:
    ann = net()
    snn = convert(ann, DATA, threshold="90%", per_channel=False)
    expected = torch.quantile(activations(ann)[0].double(), 0.9).item()
    assert snn.report["1"].threshold.item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("rule", ["mmse", "max", "99%"])
def test_a_silent_channel_takes_its_layers_threshold_and_is_named(rule: str) -> None:
    ann = net()
    with torch.no_grad():
        ann[0].weight[2] = 0
        ann[0].bias[2] = -1
    snn = convert(ann, DATA, threshold=rule)
    assert snn.report.silent_channels["1"] == [2]
    assert "1: 1 channel never fired on the calibration data" in str(snn.report)
    if rule == "max":
        assert snn.report["1"].threshold[2] == activations(ann)[0].max()
    assert snn.report["1"].threshold[2] > 0


def test_a_silent_layer_converts_and_is_named() -> None:
    ann = net()
    with torch.no_grad():
        ann[0].bias.fill_(-100)
    snn = convert(ann, DATA)
    assert bool((snn.report["1"].threshold == 1).all())
    assert "1 never fired" in str(snn.report)
    torch.testing.assert_close(snn(DATA), ann(DATA), atol=0.2, rtol=0)


def test_numbers_tensors_and_dicts() -> None:
    ann = net()
    assert convert(ann, threshold=2.5).report["3"].threshold.item() == 2.5
    theta = torch.arange(1.0, 7.0)
    snn = convert(ann, DATA, threshold={"1": theta, "3": "max"}, v_init={"1": theta / 4})
    assert torch.equal(snn.report["1"].threshold, theta)
    layers = dict(snn.neurons())
    assert torch.equal(layers["1"].node.v_init, theta / 4)
    assert layers["3"].node.v_init == "half"


def test_learned_thresholds_can_be_overruled() -> None:
    ann = nn.Sequential(nn.Linear(4, 3), ClipReLU(0.5))
    assert convert(ann, DATA).report["1"].threshold.item() == 0.5
    seen = convert(ann, DATA, threshold="max", per_channel=False).report["1"].threshold.item()
    assert seen == pytest.approx(min(0.5, torch.relu(ann[0](DATA)).max().item()))


def test_thresholds_are_for_this_T_and_this_start() -> None:
    ann = net()
    theta = {
        (T, v): convert(ann, DATA, T=T, v_init=v).report["1"].threshold
        for T in (2, 32)
        for v in ("half", 0.0)
    }
    assert not torch.equal(theta[2, "half"], theta[32, "half"])
    assert not torch.equal(theta[2, "half"], theta[2, 0.0])
    assert bool((theta[2, "half"] < theta[32, "half"]).any())


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_activations_that_are_not_finite_name_the_layer(poison: float) -> None:
    ann = net()
    with torch.no_grad():
        ann[2].bias[1] = poison
    with pytest.raises(ConversionError, match=r"^3: the ANN's activations contain"):
        convert(ann, DATA)


def test_float64_networks_keep_float64_thresholds() -> None:
    ann = net().double()
    snn = convert(ann, DATA.double(), T=256, threshold="max")
    assert snn.report["1"].threshold.dtype == torch.float64
    out = snn(DATA.double())
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, ann(DATA.double()), atol=0.02, rtol=0)


def test_progress_bar_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    optional("tqdm")
    convert(net(), DATA.split(16), progress=False)
    assert capsys.readouterr().err == ""
    convert(net(), DATA.split(16), progress=True)
    assert "calibrating" in capsys.readouterr().err


# ---- a histogram is a function of its values -----------------------------------------------------


def same(one: Histogram, other: Histogram) -> bool:
    tables, others = one.tables(), other.tables()
    return all(torch.equal(table, others[name]) for name, table in tables.items())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=40),
    st.randoms(use_true_random=False),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_order_and_batches_leave_no_bit(values: list[float], random, dtype: torch.dtype) -> None:
    whole = filled(torch.tensor([values], dtype=dtype), bins=64)
    random.shuffle(values)
    at = random.randrange(len(values) + 1)
    a, b = torch.tensor([values], dtype=dtype).split([at, len(values) - at], dim=1)
    assert same(filled(a, b, bins=64), whole)
    value, weight = whole.points()
    exact = math.fsum(values)  # every sum of a bin is exact, so only these few are rounded
    assert (value * weight).sum().item() == pytest.approx(exact, rel=1e-12)


def test_values_below_the_first_edge_keep_their_powers_of_two() -> None:
    values = [1.0, 1e-3, 1.5e-3, 2.0**-149, 1e-30, 1e30]
    value, weight = filled(torch.tensor([values])).points()
    a = torch.tensor(values).double()
    assert torch.equal(value[weight > 0], torch.tensor(
        [a[3], a[4], (a[1] + a[2]) / 2, a[0], a[5]], dtype=torch.float64
    ))  # fmt: skip
    tiny = torch.tensor([[5e-324, 1e-310, 3.0]], dtype=torch.float64)
    value, weight = filled(tiny).points()
    assert value[weight > 0].tolist() == pytest.approx([5e-324, 1e-310, 3.0], rel=2.0**-23, abs=0)


class Both:
    """Two histograms in one process, as members of a team: what both have said is told to both."""

    def __init__(self) -> None:
        self.barrier, self.said = threading.Barrier(2), {}

    def member(self, rank: int) -> SimpleNamespace:
        def meet(join):
            def call(tensor: Tensor) -> Tensor:
                self.said[rank] = tensor
                self.barrier.wait(10)
                found = join(self.said[0], self.said[1])
                self.barrier.wait(10)
                return found

            return call

        return SimpleNamespace(sum=meet(torch.add), maximum=meet(torch.maximum))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merged_histograms_are_one_of_all_values(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(3)
    values = torch.relu(torch.randn(4, 6000, generator=g)).to(dtype).pow(3)
    values[1, :3000] = 0  # one member never sees the second channel fire
    parts = [filled(values[:, :3000]), filled(values[:, 3000:].to(dtype))]
    both = Both()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda r: parts[r].merge(both.member(r)), range(2)))
    whole = filled(*values.split(700, dim=1))
    assert same(parts[0], whole)
    assert same(parts[1], whole)
    again = Histogram(4)
    again.load(whole.tables())
    again.update(values)
    assert again.total == 12_000
    assert torch.equal(again.points()[0], whole.points()[0])


@pytest.mark.parametrize(
    ("bins", "kept", "sent"), [(1024, 29_024, 20_832), (8192, 201_056, 135_520)]
)
def test_bytes_of_a_histogram_are_those_of_the_page(bins: int, kept: int, sent: int) -> None:
    """docs/scaling.md counts memory and messages with them."""
    histogram = filled(torch.ones(1, 2), bins=bins)
    tables = [value for value in vars(histogram).values() if isinstance(value, Tensor)]
    assert sum(t.nbytes for t in tables) == kept
    assert sum(t.nbytes for name, t in histogram.tables().items() if name != "total") == sent
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert f"| {kept:,} |" in page
    assert f"{sent:,}" in page


def test_a_bin_that_holds_too_many_values_is_an_error() -> None:
    histogram = filled(torch.ones(1, 2))
    histogram.counts[0, 512] = 2**39 + 1
    histogram.update(torch.ones(1, 1))
    with pytest.raises(OverflowError, match=r"more than 2\^39 values in one bin"):
        histogram.points()
