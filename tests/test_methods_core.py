"""Methods that are options of the neurons: OPI, QCFS, SRP, COS, parallel, bursts, signed spikes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from conversion_helpers import Everything, dyadic, images, make_dyadic
from torch import Tensor, nn

from snnkernels import ConversionError, convert, methods
from snnkernels.conversion import QCFS
from snnkernels.conversion.methods import (
    COS,
    METHODS,
    MMSE,
    PTL,
    SRP,
    STBIF,
    Burst,
    FastSNN,
    Max,
    Method,
    Parallel,
    Percentile,
)


def step(theta: Tensor, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step of integrate, fire, reset: membrane before the reset, spikes, membrane."""
    m = v + x
    s = (m >= theta).to(m.dtype)
    return m, s, m - theta * s


def chain(levels: int = 4, seed: int = 0, pool: bool = False) -> nn.Sequential:
    """Three QCFS layers whose numbers are all multiples of 1/8, so that no order rounds."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Conv2d(3, 5, 3, padding=1), QCFS(levels, 2.0)]
    layers += [nn.Conv2d(5, 4, 3, padding=1)]
    layers += [nn.MaxPool2d(2)] if pool else []
    layers += [
        QCFS(levels, 4.0),
        nn.Flatten(),
        nn.Linear(64 if pool else 256, 6),
        QCFS(levels, 2.0),
    ]
    return make_dyadic(nn.Sequential(*layers, nn.Linear(6, 3)), seed).eval()


def parts(net: nn.Sequential) -> tuple[list[nn.Sequential], list[Tensor], nn.Module]:
    """What lies before each activation, the thresholds, the read-out."""
    found, current = [], []
    for module in net:
        if isinstance(module, QCFS):
            found.append(nn.Sequential(*current))
            current = []
        else:
            current.append(module)
    theta = [m.lam.detach() for m in net if isinstance(m, QCFS)]
    return found, theta, nn.Sequential(*current)


@pytest.fixture
def x() -> Tensor:
    return dyadic(4, 3, 8, 8, seed=5, scale=8)


# ---- the list ------------------------------------------------------------------------------------


def test_every_method_says_what_it_is() -> None:
    listed = {m["name"]: m for m in methods()}
    assert set(listed) == set(METHODS)
    for name, m in listed.items():
        assert m["source"]
        assert m["needs"]
        assert isinstance(METHODS[name](), Method)
        assert (METHODS[name].__doc__ or "").strip()
        assert isinstance(m["binary"], bool)
    assert listed["srp"]["options"] == {"probe": 4, "margin": 1e-3}
    assert not listed["burst"]["binary"]


def test_options_show_in_the_report(x: Tensor) -> None:
    assert str(SRP()) == "srp"
    assert str(SRP(probe=8)) == "srp(probe=8)"
    snn = convert(chain(), x, method=COS(probe=2, iterations=3))
    assert "method cos(probe=2, iterations=3)" in str(snn.report)
    assert "adds 6 steps to every T" in str(snn.report)
    assert snn.extra_steps == 6


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: SRP(probe=0), ValueError, "probe=0 must be at least 1"),
        (lambda: SRP(probe=1.5), TypeError, r"probe=1\.5 must be an int"),
        (lambda: SRP(margin=-1), ValueError, "margin=-1"),
        (lambda: COS(iterations=0), ValueError, "iterations=0 must be at least 1"),
        (lambda: Burst(max_spikes=300), ValueError, "max_spikes=300 .* at most 255"),
        (lambda: FastSNN(margin=float("inf")), ValueError, "margin=inf"),
        (lambda: convert(chain(), method="spr"), ValueError, "method='spr' is not known; allowed"),
        (lambda: convert(chain(), method=SRP), TypeError, "method must be a name or an object"),
    ],
    ids=str,
)
def test_bad_options(make: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


# ---- parallel ------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [1, 4, 7, 16])
def test_parallel_is_the_qcfs_network_bit_for_bit(levels: int) -> None:
    """Parallel conversion, Hao et al., ICML 2025: T = L, no unevenness."""
    torch.manual_seed(levels)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), QCFS(levels, 1.3),
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), QCFS(levels, 0.7), nn.AvgPool2d(2),
        nn.Conv2d(8, 6, 3), QCFS(levels, 2.1), nn.Flatten(), nn.Linear(6, 5),
    ).eval()  # fmt: skip
    x = images(6)
    with torch.no_grad():
        net(x)
        want = net(x)
        snn = convert(net, method="parallel", T=levels, fold=False)
        assert torch.equal(snn(x), want)
        folded = convert(net, method="parallel", T=levels)
        assert torch.allclose(folded(x), want, rtol=1e-4, atol=1e-4)
    assert snn.extra_steps == 0


def test_parallel_counts_from_any_start() -> None:
    """clip(floor((S + v_init) / θ), 0, T), worked examples of parallel conversion among them."""
    currents = [[1, 1, -1, -1], [-2, 1, 1, 2]]
    counts = []
    for row in currents:
        net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Identity())
        with torch.no_grad():
            net[0].weight.fill_(1.0)
        snn = convert(net, method="parallel", threshold=1.0, T=4)
        counts.append(snn(torch.tensor([[sum(row) / 4]])).item() * 4)
    assert counts == [0, 2]
    x = dyadic(16, 7, seed=3)
    net = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 2))
    make_dyadic(net)
    for start in (0.0, 0.25, "half", "25%", torch.arange(5) / 8):
        snn = convert(net, method="parallel", threshold=2.0, T=4, v_init=start)
        v0 = {"half": 1.0, "25%": 0.5}.get(start, start) if isinstance(start, str) else start
        with torch.no_grad():
            z = net[0](x)
            want = net[2](torch.floor((z * 4 + v0) / 2.0).clamp(0, 4) * 2 / 4)
            assert torch.equal(snn(x), want)


def test_parallel_at_every_T_is_a_run_of_its_own(x: Tensor) -> None:
    net = chain()
    snn = convert(net, method=Parallel(), T=4)
    with torch.no_grad():
        curve = snn.predict_curve(x, (1, 2, 4, 8))
        for T, out in curve.items():
            assert torch.equal(out, snn(x, T=T))
        assert torch.equal(curve[4], net(x))


# ---- SRP -----------------------------------------------------------------------------------------


def srp_by_hand(net: nn.Sequential, x: Tensor, tau: int, T: int) -> Tensor:
    """Two stages of the whole network, all layers in step."""
    layers, theta, readout = parts(net)

    def stage(steps: int, masks: list[Tensor] | None) -> tuple[list[Tensor], Tensor]:
        v: list[Any] = [t / 2 for t in theta]
        total: Any = 0
        for _ in range(steps):
            out = x
            for i, layer in enumerate(layers):
                _, s, v[i] = step(theta[i], v[i], layer(out))
                out = s * theta[i]
                if masks is not None:
                    out = out * masks[i]
            total = total + out
        return v, total / steps

    v, _ = stage(tau, None)
    masks = [(v[i] / theta[i] > 1e-3).float() for i in range(len(theta))]
    assert 0 < sum(float(m.mean()) for m in masks) / len(masks) < 1
    return readout(stage(T, masks)[1])


@pytest.mark.parametrize("tau", [1, 4, 7])
@pytest.mark.parametrize("T", [1, 2, 5])
@torch.no_grad()
def test_srp_is_two_stages_of_the_whole_network(x: Tensor, tau: int, T: int) -> None:
    net = chain(seed=tau)
    snn = convert(net, method=SRP(probe=tau), T=T)
    assert torch.equal(snn(x), srp_by_hand(net, x, tau, T))
    assert snn.extra_steps == tau


@torch.no_grad()
def test_srp_starts_cumulative_pools_anew(x: Tensor) -> None:
    net = chain(pool=True)
    snn = convert(net, method=SRP(probe=3), T=4)
    alone = convert(net, T=4)
    # Masks that silence nobody leave what a run without a probe answers.
    everything = SRP(probe=3, margin=0.0)
    assert not torch.equal(snn(x), alone(x))
    x = x.abs() + 1
    for module in net:
        if hasattr(module, "weight"):
            module.weight.abs_()
            module.bias.abs_().add_(0.125)
    a, b = convert(net, method=everything, T=4)(x), convert(net, T=4)(x)
    assert torch.equal(a, b)


# ---- COS -----------------------------------------------------------------------------------------


def cos_by_hand(net: nn.Sequential, x: Tensor, rho: int, T: int, iterations: int = 1) -> Tensor:
    """Layer by layer over all rows, from the equations; a neuron off by one spike is moved."""
    layers, theta, readout = parts(net)
    rows = [x] * max(rho, T)
    for layer, th in zip(layers, theta, strict=True):
        current = [layer(row) for row in rows]
        start = torch.full_like(current[0], float(th) / 2)
        for _ in range(iterations):
            v, count = start, torch.zeros_like(start)
            low, high = torch.full_like(start, 1e9), torch.full_like(start, -1e9)
            for row in current[:rho]:
                m, s, v = step(th, v, row)
                low = torch.where(s > 0, torch.minimum(low, m), low)
                high = torch.where(s > 0, high, torch.maximum(high, v))
                count += s
            left = v - (start - th / 2)
            many, few = (left < 0) & (count > 0), (left >= th) & (count < rho)
            less = start - torch.maximum(th, low - th * 0.999)
            more = start + torch.maximum(th, th * 1.001 - high)
            start = torch.where(many, less, torch.where(few, more, start))
        v, rows = start, []
        for row in current:
            _, s, v = step(th, v, row)
            rows.append(s * th)
    return readout(sum(rows[:T]) / T)  # type: ignore[arg-type]


@pytest.mark.parametrize(("rho", "iterations"), [(1, 1), (4, 1), (7, 1), (4, 3)])
@pytest.mark.parametrize("T", [1, 2, 5])
@torch.no_grad()
def test_cos_is_layer_by_layer(x: Tensor, rho: int, T: int, iterations: int) -> None:
    net = chain(seed=rho).double()
    x = x.double()
    snn = convert(net, method=COS(probe=rho, iterations=iterations), T=T)
    assert torch.allclose(snn(x), cos_by_hand(net, x, rho, T, iterations), rtol=0, atol=1e-12)
    assert snn.extra_steps == rho * iterations


@torch.no_grad()
def test_cos_repeated_gives_the_quantised_network() -> None:
    """At T = rho = L every repeated probe brings counts nearer to those of QCFS."""
    net, x = chain(levels=8, seed=3), dyadic(16, 3, 8, 8, seed=9)
    want = net(x)
    errors = [
        (convert(net, method=COS(probe=8, iterations=n), T=8)(x) - want).norm().item()
        for n in (1, 2, 8)
    ]
    plain = (convert(net, T=8)(x) - want).norm().item()
    assert plain > errors[0] > errors[2]


# ---- one pass for all T --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [SRP(probe=3), COS(probe=3), FastSNN(), Burst(max_spikes=2)], ids=str
)
@pytest.mark.parametrize("pool", [False, True])
@torch.no_grad()
def test_curves_are_prefixes(x: Tensor, method: Method, pool: bool) -> None:
    snn = convert(chain(pool=pool), method=method, T=4)
    curve = snn.predict_curve(x, (1, 2, 6, 3))
    assert list(curve) == [1, 2, 3, 6]
    for T, out in curve.items():
        assert torch.equal(out, snn(x, T=T)), T


@torch.no_grad()
def test_runs_leave_nothing_behind(x: Tensor) -> None:
    for method in (SRP(), COS(), Parallel(), FastSNN()):
        snn = convert(chain(), method=method, T=4)
        first = snn(x)
        snn.predict_curve(x, (2, 5))
        assert torch.equal(snn(x), first)
        for other in (copy.deepcopy(snn), pickle.loads(pickle.dumps(snn))):
            assert torch.equal(other(x), first)
            other._clock.levels = 99
        assert torch.equal(snn(x), first)


# ---- bursts and signs ----------------------------------------------------------------------------


@torch.no_grad()
def test_group_neurons_have_m_times_the_levels(x: Tensor) -> None:
    """T steps of a group of m members on a constant current are m T levels of QCFS."""
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(180, 4)).eval()
    make_dyadic(net)
    snn = convert(net, method=Burst(max_spikes=4), threshold=2.0, T=2)
    z = net[0](x)
    want = net[2:](torch.floor(z * 8 / 2 + 0.5).clamp(0, 8) * 2 / 8)
    assert torch.equal(snn(x), want)
    assert "does not compare with the T of binary methods" in str(snn.report)


@torch.no_grad()
def test_signed_spikes_take_back_what_came_early() -> None:
    """Worked examples of Fast-SNN: 1, 1, -1, -1 ends at 0; too few spikes stay too few."""
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(1.0)
        net[0].bias.zero_()
    snn = convert(net, method="signed", threshold=1.0, T=4)
    (layer,) = (m for _, m in snn.neurons())
    rows = torch.tensor([[1, 1, -1, -1], [-2, 1, 1, 2]]).float().t()
    layer.constant = False
    out = layer(rows.reshape(8, 1), 4).view(4, 2)
    assert out.t().tolist() == [[1, 1, -1, -1], [0, 0, 0, 1]]
    assert layer.count(out).tolist() == [0, 1]


# ---- everything, every method --------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(METHODS))
@torch.no_grad()
def test_every_method_on_a_network_of_everything(name: str) -> None:
    net = Everything()
    x = images(8, size=12)
    if METHODS[name].threshold is None or name == "st_bif":  # that needs levels=
        with pytest.raises(ConversionError):
            convert(net, x, method=name, T=8)
        return
    snn = convert(net, x, method=name, T=8)
    out = snn(x)
    assert out.shape == (8, 5)
    assert bool(torch.isfinite(out).all())
    long = convert(net, x, method=name, T=12 if name == "bit_serial" else 64)
    error = (long(x).exp() - net(x).exp()).norm() / net(x).exp().norm()
    assert error < 0.25, f"{name}: {error}"


# datta searches thresholds that are no powers of two, light and advanced need data: their own tests
# fold them.
@pytest.mark.parametrize("name", sorted(set(METHODS) - {"datta", "light", "advanced"}))
@pytest.mark.parametrize("v_init", [None, 0.25, "25%"])
@torch.no_grad()
def test_thresholds_fold_into_weights_for_every_method(name: str, v_init: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), QCFS(8, 2.0), nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 3), QCFS(8, 2.0), nn.Flatten(), nn.Linear(54, 5),
    ).eval()  # fmt: skip
    make_dyadic(net)
    x = dyadic(4, 3, 12, 12, seed=4)
    given = {"method": name, "T": 8, "threshold": 2.0, "v_init": v_init}
    if v_init is not None and name in ("bit_serial", "dsr", "ttfs"):
        with pytest.raises(ValueError, match="v_init"):
            convert(net, **given)
        return
    folded = convert(net, **given, normalize="weights")
    assert torch.equal(folded(x), convert(net, **given)(x))


def test_rules_have_the_papers_start(x: Tensor) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    for method, start in ((Max(), 0.0), (Percentile(), 0.0), (MMSE(), "half")):
        snn = convert(net, x, method=method, T=4)
        (layer,) = (m for _, m in snn.neurons())
        assert layer.node.v_init == start
    rows = {m: convert(net, x, method=m).report["1"].threshold for m in ("max", "percentile")}
    with torch.no_grad():
        assert rows["max"] == torch.relu(net[0](x)).max()
    assert rows["percentile"] < rows["max"]


@pytest.mark.parametrize("method", ["parallel", "ttfs", "bit_serial"])
def test_curves_of_one_pass_networks_with_max_pools_are_separate_runs(
    method: str, x: Tensor
) -> None:
    """Every T is a pass of its own: the running sums of a max-pool are not those of the last."""
    snn = convert(chain(pool=True), method=method, T=4)
    with torch.no_grad():
        curve = snn.predict_curve(x, [1, 2, 4, 8])
        for T, out in curve.items():
            assert torch.equal(out, snn(x, T=T)), T


def test_thresholds_of_bursts_are_made_for_their_levels() -> None:
    """T steps of a group neuron tell m T levels apart, so MMSE reckons with as many."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    torch.manual_seed(0)
    x = images(32)
    for m in (2, 4):
        burst = convert(net, x, method=Burst(max_spikes=m), T=4, progress=False)
        binary = convert(net, x, method="opi", T=4 * m, progress=False)
        theta = burst.report["1"].threshold
        assert torch.equal(theta, binary.report["1"].threshold)
        assert torch.equal(dict(burst.neurons())["1"].node.threshold, theta / m)
    plain = convert(net, x, method=Burst(max_spikes=4, group=False), T=4, progress=False)
    assert torch.equal(
        plain.report["1"].threshold, convert(net, x, T=4, progress=False).report["1"].threshold
    )


@pytest.mark.parametrize(
    ("method", "parts"), [(Burst(max_spikes=4), 4), (STBIF(levels=4), 4), (PTL(), 8)], ids=str
)
def test_starts_of_neurons_with_a_part_of_the_threshold(method: Method, parts: int) -> None:
    """Rules are parts of the threshold in force; numbers are in the units of the current."""
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    for v_init, found in (("half", "half"), ("25%", 0.5 / parts), (0.1, 0.1)):
        snn = convert(net, method=method, threshold=2.0, v_init=v_init, T=8)
        ((_, layer),) = snn.neurons()
        start = layer.node.v_init
        assert start == found if isinstance(found, str) else float(start) == pytest.approx(found)
