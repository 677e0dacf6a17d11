"""Where error enters: layers built so that exactly one source is present, and what is advised."""

from __future__ import annotations

import pytest
import torch
from conversion_helpers import Everything, dyadic, images, make_dyadic, randomize
from torch import Tensor, nn

from snnkernels.conversion import QCFS, ClipReLU, NodeReport, convert
from snnkernels.conversion.errors_by_source import Sources, ceiling, sources, suggestion
from snnkernels.conversion.methods import Burst

OWN = ("clipping", "quantisation", "unevenness", "inherited")


def first(x: Tensor, **options: object) -> NodeReport:
    """The report of one layer of neurons whose pre-activation is ``x`` ``[B, C]``."""
    return convert(nn.Sequential(nn.ReLU(), nn.Flatten()), x, **options).report.rows[0]  # type: ignore[arg-type]


def values(row: NodeReport) -> dict[str, float]:
    return {name: getattr(row, name) for name in OWN if getattr(row, name) != 0}


def test_only_clipping() -> None:
    """relu(z) of 2, 4 against θ = 2 at T = 4: the error is 2 of sqrt(20)."""
    row = first(torch.tensor([[2.0, 4.0]]), T=4, threshold=2.0, v_init="zero")
    assert values(row) == {"clipping": pytest.approx(2 / 20**0.5)}
    assert row.error == pytest.approx(row.clipping)


def test_only_quantisation() -> None:
    """z = 0.3125 at T = 8, θ = 1: worked example of OPI (section 1), 2 spikes of ideally 2.5."""
    row = first(torch.tensor([[0.3125]]), T=8, threshold=1.0, v_init="zero")
    assert values(row) == {"quantisation": pytest.approx(0.2)}
    row = first(torch.tensor([[0.3125]]), T=8, threshold=1.0, v_init="half")
    assert values(row) == {"quantisation": pytest.approx(0.2)}  # 3 spikes: as far, above
    assert row.error == pytest.approx(0.2)


class Uneven(nn.Module):
    """Two neurons of 1/2 and 1 with weights -2 and 1: the sum of the currents is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.ReLU(), nn.ReLU()
        self.fc = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.fc.weight.copy_(torch.tensor([[-2.0, 1.0], [0.0, 1.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.fc(self.first(x))).flatten(1)


def test_only_unevenness() -> None:
    """From v_init = 0 the first neuron fires at steps 2 and 4, the second at all four: currents
    1, -1, 1, -1 sum to 0, yet the neuron fires, for it cannot know what comes."""
    x = torch.tensor([[0.5, 1.0]])
    report = convert(Uneven(), x, T=4, threshold=1.0, v_init="zero").report
    assert values(report["first"]) == {}
    row = report["second"]
    # The membrane goes 1 (spike, 0), -1, 0, -1: one spike, 1/4, where the ANN has 0; its other
    # neuron is right, so the root mean square of the ANN is that of (0, 1).
    assert values(row) == {"unevenness": pytest.approx(0.25)}
    assert row.error == pytest.approx(0.25)
    assert "unevenness (most at second: 25.00%)" in str(report)
    assert "Methods without it: 'parallel', 'ttfs'" in str(report)


def test_only_inherited() -> None:
    """A layer that repeats the counts of the one below has that one's error and none of its own."""
    net = nn.Sequential(nn.ReLU(), nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Flatten())
    nn.init.ones_(net[1].weight)
    report = convert(net, torch.tensor([[1.5]]), T=4, threshold={"0": 1.0, "2": 1.5}).report
    assert values(report["0"]) == {"clipping": pytest.approx(1 / 3)}
    row = report["2"]
    # Currents of 1 at every step, where the ANN has 1.5, the other layer's θ.
    assert row.clipping == row.quantisation == row.unevenness == 0
    # 0.75 + 4 currents of 1 reach 1.5 three times: 3/4 of 1.5.
    assert row.inherited == row.error == pytest.approx(0.25)


@pytest.mark.parametrize("method", ["opi", "srp", "cos", "parallel", "signed", Burst(2)])
@pytest.mark.parametrize("normalize", ["threshold", "weights"])
def test_the_parts_add_up_to_the_error(method: object, normalize: str) -> None:
    """Value by value, so their sizes obey the triangle inequality from both sides."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 8, 2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 9), nn.ReLU()),
    )
    net, x = randomize(net), images(4)
    snn = convert(net, x, T=4, method=method, normalize=normalize)  # type: ignore[arg-type]
    twin = convert(net, x, T=4, method=method)  # type: ignore[arg-type]
    for name, _ in snn.neurons():
        row = snn.report[name]
        parts = [getattr(row, part) for part in OWN]
        assert all(p is not None and 0 <= p < 2 for p in parts)
        assert row.error <= sum(parts) + 1e-6
        assert row.error >= max(parts) - (sum(parts) - max(parts)) - 1e-6
        assert method != "parallel" or row.unevenness == 0
        for part in OWN[:2]:  # folded thresholds are the same network up to rounding
            expected = pytest.approx(getattr(twin.report[name], part), abs=2e-3)
            assert getattr(row, part) == expected


def test_parts_of_a_plain_layer_against_a_scalar_loop() -> None:
    """Second layer of a dyadic network at T = 4: the four parts by hand, float64."""
    T, theta = 4, 1.0
    net = make_dyadic(
        nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Flatten())
    )
    x = dyadic(8, 6, seed=3, scale=32)
    report = convert(net, x, T=T, threshold=theta).report

    def spikes(current: list[float]) -> list[int]:
        v, out = theta / 2, []
        for c in current:
            v += c
            out.append(int(v >= theta))
            v -= theta * out[-1]
        return out

    w1, b1 = net[0].weight.double(), net[0].bias.double()
    w2, b2 = net[2].weight.double(), net[2].bias.double()
    sums = dict.fromkeys(OWN, 0.0)
    size = 0.0
    for row in x.double():
        z1 = (w1 @ row + b1).tolist()
        trains = torch.tensor([spikes([z] * T) for z in z1], dtype=torch.float64)
        current = w2 @ trains + b2[:, None]
        z2 = w2 @ torch.tensor(z1).clamp(min=0).double() + b2
        for z, c in zip(z2.tolist(), current.tolist(), strict=True):
            a = max(z, 0.0)
            clipped = min(a, theta)
            even = sum(spikes([z] * T)) / T
            held = sum(spikes([sum(c) / T] * T)) / T
            got = sum(spikes(c)) / T
            for name, part in zip(
                OWN, (clipped - a, even - clipped, got - held, held - even), strict=True
            ):
                sums[name] += part**2
            size += a**2
    for name in OWN:
        assert getattr(report["3"], name) == pytest.approx((sums[name] / size) ** 0.5, rel=1e-6)
        assert sums[name] > 0


def test_learned_ceilings_do_not_clip_and_qcfs_at_its_levels_has_no_error() -> None:
    """With T = L the neuron's staircase is the activation (Theorem 1 of QCFS)."""
    x = dyadic(4, 6)
    report = convert(nn.Sequential(QCFS(8, 2.0), nn.Flatten()), x, T=8).report
    assert values(report.rows[0]) == {}
    report = convert(nn.Sequential(QCFS(8, 2.0), nn.Flatten()), x, T=4).report
    assert set(values(report.rows[0])) == {"quantisation"}
    report = convert(nn.Sequential(ClipReLU(1.0), nn.Flatten()), x, T=4).report
    assert report.rows[0].clipping == 0


def test_bursts_clip_at_the_burst() -> None:
    """Two members of θ / 2 answer at most θ; two quanta of θ at most 2 θ."""
    x = torch.tensor([[2.0, 4.0]])
    kind = Burst(2)
    snn = convert(nn.Sequential(nn.ReLU(), nn.Flatten()), x, T=4, method=kind, threshold=2.0)
    assert ceiling(next(snn.neurons())[1]) == 2
    assert snn.report.rows[0].clipping == pytest.approx(2 / 20**0.5)
    kind = Burst(2, group=False)
    snn = convert(nn.Sequential(nn.ReLU(), nn.Flatten()), x, T=4, method=kind, threshold=2.0)
    assert ceiling(next(snn.neurons())[1]) == 4
    assert snn.report.rows[0].clipping == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    net = randomize(Everything()).to(dtype)
    report = convert(net, images(2).to(dtype), T=4).report
    assert report["relu"].unevenness == report["relu"].inherited == 0
    assert 0 < report["relu"].quantisation < 1


def test_measuring_leaves_the_network_as_it_was() -> None:
    net, x = randomize(Everything()), images(4)
    snn = convert(net, x, T=8)
    flags = [(layer.constant, layer.counts) for _, layer in snn.neurons()]
    with torch.no_grad():
        before = snn(x)
        other = snn(x)
    assert torch.equal(before, other)
    assert flags[0] == (True, False)
    assert flags[-1] == (False, True)
    assert all(not isinstance(layer.node._v, Tensor) for _, layer in snn.neurons())


def test_a_layer_of_its_own_kind_is_not_split() -> None:
    """Nothing is silent: None, so that the report says so."""
    snn = convert(nn.Sequential(nn.ReLU(), nn.Flatten()), torch.ones(1, 2), threshold=1.0)
    layer = next(snn.neurons())[1]

    class Other(type(layer)):  # type: ignore[misc]
        def forward(self, x: Tensor, T: int) -> Tensor:
            return super().forward(x, T)

    x = torch.ones(1, 2)
    assert sources(layer, x, x, x, x, 4) == Sources(0, 0, 0, 0)
    layer.__class__ = Other
    assert sources(layer, x, x, x, x, 4) is None


def test_the_table_has_the_columns_only_where_something_was_measured() -> None:
    net = nn.Sequential(QCFS(8), nn.Flatten())
    assert "unevenness" not in str(convert(net))
    assert "unevenness" not in convert(net).report.to_markdown()
    text = convert(net, torch.rand(2, 3)).report.to_markdown()
    header, rule = text.splitlines()[:2]
    assert header.endswith("| clipping | quantisation | unevenness | inherited |")
    assert header.count("|") == rule.count("|") == 10


@pytest.mark.parametrize(
    ("parts", "options", "words"),
    [
        ((0.5, 0.1, 0.1), {}, ["clipping (most at a: 50.00%)", "threshold='max'", "percentile"]),
        ((0.1, 0.5, 0.1), {}, ["larger T", "now 8"]),
        ((0.1, 0.5, 0.1), {"half": False}, ["v_init='half'"]),
        ((0.1, 0.5, 0.1), {"rule": "θ max"}, ["threshold='mmse'"]),
        ((0.1, 0.1, 0.5), {}, ["without it: 'parallel', 'ttfs'", "it: 'cos', 'signed', 'srp'"]),
        ((0.1, 0.1, 0.5), {"method": "srp(probe=8)"}, ["that lower it: 'cos', 'signed'"]),
    ],
)
def test_advice(parts: tuple[float, ...], options: dict, words: list[str]) -> None:
    given = {"method": "opi", "rule": "θ mmse", "half": True, "T": 8, **options}
    rows = [("a", Sources(*parts, 0.9)), ("b", Sources(0.01, 0.01, 0.01, 0.0))]
    text = suggestion(rows, **given)
    assert text is not None
    assert all(word in text for word in words)


def test_no_advice_without_error() -> None:
    assert suggestion([("a", Sources(0, 0, 0, 0.5))], "opi", "", True, 8) is None
    # A layer silent in the ANN has no relative error and does not decide.
    silent = ("a", Sources(0, float("inf"), 0, 0))
    assert suggestion([silent], "opi", "", True, 8) is None
    found = suggestion([silent, ("b", Sources(0.1, 0, 0, 0))], "opi", "", True, 8)
    assert found is not None
    assert "clipping (most at b" in found
