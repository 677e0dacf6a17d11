"""Threshold rules that a method may be: KL calibration and local threshold balancing (LTB)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snnkernels import ConversionError, convert
from snnkernels.conversion.balancing import Balancing, balanced_threshold
from snnkernels.conversion.divergence import bins_for, kl_threshold
from snnkernels.conversion.histogram import Histogram
from snnkernels.conversion.methods import LTB, SRP
from snnkernels.conversion.steps import Steps


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5), nn.ReLU(), nn.Linear(5, 2)
    ).eval()


def data(count: int = 24, seed: int = 1) -> Tensor:
    return torch.randn(count, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


def one(weight: float = 1.0) -> nn.Sequential:
    """One neuron whose current is its input; the answer is its rate."""
    layers = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        layers[0].weight.fill_(weight)
        layers[2].weight.fill_(1.0)
    return layers.eval()


# ---- KL ------------------------------------------------------------------------------------------


def kl_by_hand(mass: list[float], width: float, T: int, part: float | None, v0: float) -> float:
    """The edge with the least divergence, in scalars; ``part`` of V or ``v0`` is the start."""
    bins, total = len(mass), sum(mass)
    best, chosen = math.inf, bins * width
    for i in range(bins, min(max(bins // 16, T), bins) - 1, -1):
        V = i * width
        start = part if part is not None else v0 / V
        inside = sum(mass[:i])
        P = [m / total for m in mass[:i]]
        P[-1] += (total - inside) / total
        level = [min(max(math.floor((j + 0.5) * T / i + start), 0), T) for j in range(i)]
        found = 0.0
        for k in set(level):
            members = [j for j in range(i) if level[j] == k and mass[j] > 0]
            weight = sum(mass[j] for j in members) / inside if inside else 0.0
            for j in (j for j in range(i) if level[j] == k and P[j] > 0):
                if j not in members:
                    found = math.inf
                else:
                    found += P[j] * math.log(P[j] * len(members) / weight)
        if found < best - 1e-12:
            best, chosen = found, V
    return chosen


def counted(mass: list[int], width: float) -> Histogram:
    """A histogram with ``mass[j]`` values in bin j, the largest at the very end."""
    values = [(j + 0.5) * width for j, m in enumerate(mass) for _ in range(m)]
    values[-1] = len(mass) * width
    histogram = Histogram(1)
    histogram.update(torch.tensor([values], dtype=torch.float64))
    return histogram


def test_kl_worked_by_hand() -> None:
    """KL calibration, Migacz, GTC 2017: four bins, two levels, start 0.

    8, 2, 4, 1 values: clipping at 4 bins diverges by 0.193, at 3 by 0.047, at 2 by 0.179.
    """
    found = kl_threshold(counted([8, 2, 4, 1], 0.25), 2, 0.0, bins=4)
    assert found.item() == 0.75
    # Where every level is flat nothing is lost: the whole range.
    assert kl_threshold(counted([4, 4, 1, 1], 0.25), 2, 0.0, bins=4).item() == 1.0


@pytest.mark.parametrize("start", [0.0, 0.5, "absolute"])
@pytest.mark.parametrize("T", [1, 2, 4, 8, 24])
def test_kl_is_the_best_of_its_candidates(T: int, start: Any) -> None:
    g = torch.Generator().manual_seed(T)
    bins = bins_for(T)
    draws = torch.empty(400).exponential_(generator=g)
    mass = torch.histc(draws, bins, min=0, max=draws.max().item()).int().tolist()
    mass[-1] = max(mass[-1], 1)
    width = 2.0**-6
    v_init: Any = torch.tensor([0.25], dtype=torch.float64) if start == "absolute" else start
    found = kl_threshold(counted(mass, width), T, v_init).item()
    part = None if start == "absolute" else start
    assert found == pytest.approx(kl_by_hand(mass, width, T, part, 0.25), rel=1e-12)


def test_kl_bins() -> None:
    assert [bins_for(T) for T in (1, 8, 16, 128, 4096)] == [128, 128, 256, 2048, 2048]


def test_kl_spreads_finer_bins_evenly() -> None:
    """A range that does not end at a bin's edge: counts go where their values lie."""
    values = torch.linspace(0.0005, 0.7, 50_000, dtype=torch.float64)[None]
    histogram = Histogram(1)
    histogram.update(values[:, :10_000])  # a narrow range first, then wider ones
    histogram.update(values[:, 10_000:])
    assert histogram.range.item() != histogram.maximum.item()
    found = kl_threshold(histogram, 4, 0.0).item()
    assert found == pytest.approx(0.7, rel=0.02)  # flat: every level is, so nothing to clip


def test_kl_of_channels_is_theirs_and_of_a_layer_is_one() -> None:
    a = torch.rand(1, 5000, generator=torch.Generator().manual_seed(0)).square()
    a = torch.cat([a, 4 * a])
    both = Histogram(2)
    both.update(a)
    each = kl_threshold(both, 8, 0.5)
    assert each[1].item() == pytest.approx(4 * each[0].item(), rel=1e-6)
    assert kl_threshold(both, 8, 0.5, pooled=True).shape == (1,)


def test_kl_trap_zeros_do_not_count() -> None:
    """Most activations are 0 and exact at every threshold; counting them would hide the rest."""
    a = torch.rand(1, 1000, generator=torch.Generator().manual_seed(3)).square()
    plain, sparse = Histogram(1), Histogram(1)
    plain.update(a)
    sparse.update(torch.cat([a, torch.zeros(1, 100_000)], 1))
    assert kl_threshold(plain, 8, 0.5).item() == kl_threshold(sparse, 8, 0.5).item()


def test_kl_silent_channels_take_their_layers_threshold() -> None:
    ann = net()
    with torch.no_grad():
        ann[0].weight[1], ann[0].bias[1] = 0, -1
    snn = convert(ann, data(), method="kl", T=8)
    assert snn.report.silent_channels["1"] == [1]
    assert bool((snn.report["1"].threshold > 0).all())
    assert "θ kl per channel" in snn.report["1"].action


# ---- LTB -----------------------------------------------------------------------------------------


def test_ltb_worked_example() -> None:
    """LTB, Bu et al., CVPR 2025, update rule: x = [-1, .5, 1, 4], θ from 0."""
    x = torch.tensor([[-1.0], [0.5], [1.0], [4.0]])
    for updates, theta in enumerate((2.75, 3.375, 3.6875, 3.84375, 3.921875), start=1):
        snn = convert(one(), x, method=LTB(updates=updates))
        assert snn.report["1"].threshold.item() == theta
    assert convert(one(), x, method=LTB(updates=1, rate=0.5)).report["1"].threshold == 1.375


def balanced(ann: nn.Sequential, batches: list[Tensor], updates: int) -> list[Tensor]:
    """The thresholds of :func:`net` in float64, per channel and per feature."""
    ann = ann.double()
    first, second = torch.zeros(3, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    with torch.no_grad():
        for i in range(updates):
            z = ann[0](batches[i % len(batches)].double())
            for c in range(3):
                first[c] += 2 * (z[:, c] - first[c]).clamp(min=0).mean()
            a = torch.minimum(torch.relu(z), first.view(1, 3, 1, 1))
            z = ann[3](a.flatten(1))
            for c in range(5):
                second[c] += 2 * (z[:, c] - second[c]).clamp(min=0).mean()
    ann.float()
    return [first, second]


@pytest.mark.parametrize("updates", [1, 3, 10])
def test_ltb_clips_while_it_grows(updates: int) -> None:
    ann, batches = net(), list(data().split(7))
    snn = convert(ann, batches, method=LTB(updates=updates), progress=False)
    for name, theta in zip(("1", "4"), balanced(ann, batches, updates), strict=True):
        found = snn.report[name].threshold
        expected = torch.where(theta > 0, theta, theta.max())
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    assert snn.report["1"].action.endswith(f"θ ltb(updates={updates}) per channel")


def test_ltb_per_layer_is_one_threshold() -> None:
    ann, x = net(), data()
    snn = convert(ann, x, method=LTB(updates=1), per_channel=False)
    z = ann[0](x)
    assert snn.report["1"].threshold.item() == pytest.approx(2 * z.clamp(min=0).mean().item())


def test_ltb_with_other_methods_and_rules() -> None:
    ann, x = net(), data()
    alone = convert(ann, x, method="ltb")
    with_srp = convert(ann, x, method=SRP(), threshold="ltb")
    mixed = convert(ann, x, threshold={"1": Balancing(), "4": "max"})
    for name in ("1", "4"):
        assert torch.equal(alone.report[name].threshold, with_srp.report[name].threshold)
    assert torch.equal(alone.report["1"].threshold, mixed.report["1"].threshold)
    # The rule of its layer alone is clipped: the other sees less than the whole network gives.
    assert mixed.report["4"].threshold.max() == ann[:5](x).amax()
    assert dict(with_srp.neurons())["1"].node.tie == ">="
    assert alone.report.T == 16


def test_ltb_trap_a_tie_does_not_fire() -> None:
    """LTB fires strictly above θ: x = 0.125, θ = 1, v_init = 1/2, T = 4 never does."""
    x = torch.tensor([[0.125], [1.0]])
    with torch.no_grad():
        ltb = convert(one(), x, method="ltb", threshold=1.0, T=4)(x)
        opi = convert(one(), x, method="opi", threshold=1.0, T=4)(x)
    assert ltb[0].item() == 0
    assert opi[0].item() == 0.25


def test_ltb_silent_channels() -> None:
    theta, dead, silent = balanced_threshold(torch.tensor([2.0, 0.0, 3.0]))
    assert theta.tolist() == [2.0, 3.0, 3.0]
    assert (dead, silent) == ([1], False)
    theta, dead, silent = balanced_threshold(torch.zeros(2))
    assert theta.tolist() == [1.0, 1.0]
    assert silent


def test_ltb_reads_the_loader_again_and_again() -> None:
    read: list[int] = []

    class Loader:
        def __iter__(self) -> Any:
            for i in range(3):
                read.append(i)
                yield data(4, seed=i)

    convert(net(), Loader(), method=LTB(updates=8), progress=False)
    assert read == [0, 1, 2, 0, 1, 2, 0, 1]


def test_ltb_with_a_loader_that_can_be_read_once() -> None:
    snn = convert(net(), iter(data().split(6)), method=LTB(updates=9), progress=False)
    assert "thresholds were balanced on 4 batches instead of 9" in str(snn.report)
    with pytest.raises(ValueError, match="reads the loader once more"):
        convert(net(), iter(data().split(6)), threshold={"1": "ltb", "4": "max"}, progress=False)


# ---- delayed read-out ----------------------------------------------------------------------------


def spikes(z: float, theta: float, T: int) -> list[int]:
    v, out = theta / 2, []
    for _ in range(T):
        v += z
        out.append(int(v > theta))
        v -= theta * out[-1]
    return out


@pytest.mark.parametrize(("T", "first"), [(12, 5), (9, 5), (8, 4), (5, 1), (4, 0), (2, 0)])
def test_delayed_read_out(T: int, first: int) -> None:
    """LTB: steps (t0, T] are read out, the last four where fewer would be left."""
    x = torch.tensor([[0.3125], [0.75], [-1.0], [2.0]])
    snn = convert(one(), x, method=LTB(delay=5), threshold=1.0, T=T)
    expected = [sum(spikes(z, 1.0, T)[first:]) / (T - first) for z in x.flatten().tolist()]
    with torch.no_grad():
        torch.testing.assert_close(snn(x).flatten(), torch.tensor(expected))
        assert Steps(whole=True, delay=5).first(T) == first
        curve = snn.predict_curve(x, [3, T, 20])
    torch.testing.assert_close(curve[T].flatten(), torch.tensor(expected))
    late = [sum(spikes(z, 1.0, 20)[5:]) / 15 for z in x.flatten().tolist()]
    torch.testing.assert_close(curve[20].flatten(), torch.tensor(late))
    assert snn.extra_steps == 0


def test_the_report_is_of_what_is_read_out() -> None:
    x = torch.tensor([[0.75], [0.5]])
    snn = convert(one(), x, method=LTB(delay=4), threshold=1.0, T=12)
    rate = [sum(spikes(z, 1.0, 12)[4:]) / 8 for z in (0.75, 0.5)]
    assert snn.report["1"].rate == pytest.approx(sum(rate) / 2)
    assert snn.report["1"].error == 0
    assert "steps 1 to 4 of 12 are run but not read out" in str(snn.report)


# ---- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: LTB(updates=0), ValueError, "updates=0 must be an int of at least 1"),
        (lambda: LTB(rate=math.inf), ValueError, "rate=inf must be positive and finite"),
        (lambda: LTB(delay=-1), ValueError, "delay=-1 must be at least 0"),
        (lambda: Balancing(updates=2.0), ValueError, r"updates=2\.0"),  # type: ignore[arg-type]
        (lambda: convert(net(), method="ltb"), ValueError, "loader is None, but threshold="),
        (lambda: convert(net(), method="kl"), ValueError, "loader is None, but threshold='kl'"),
        (
            lambda: convert(net(), data(), threshold="LTB"),
            ValueError,
            "'mmse', 'max', 'kl', 'ltb' .*percentile .*a number, a tensor, or a dict",
        ),
        (lambda: convert(net(), data(), threshold=[1]), TypeError, "'kl', 'ltb'"),
        (
            lambda: convert(net(), data() * math.inf, method="ltb"),
            ConversionError,
            "1: the ANN's activations contain NaN",
        ),
    ],
    ids=str,
)
def test_bad_arguments(make: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


def test_percentiles_numbers_and_dicts_still_work() -> None:
    ann, x = net(), data()
    snn = convert(ann, x, method="percentile", threshold={"1": 0.75, "4": "90%"})
    assert snn.report["1"].threshold.item() == 0.75
    wanted = torch.quantile(ann[:5](x).detach().double(), 0.9).item()
    assert snn.report["4"].threshold.item() == pytest.approx(wanted, rel=0.02)
