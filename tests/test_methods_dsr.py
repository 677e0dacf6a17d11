"""DSR (Meng et al., CVPR 2022): spikes trained through what they represent."""

from __future__ import annotations

import math

import pytest
import torch
from conversion_helpers import dyadic, make_dyadic
from torch import nn

from snnkernels.conversion import QCFS, ClipReLU, convert
from snnkernels.conversion.dsr import DSRNode, dsr_spikes, representation, spiking_output
from snnkernels.conversion.methods import DSR


def oracle(x, theta, kind, alpha, tau=1.0, dt=1.0):
    """One neuron, step by step: what it puts out, and its membrane at the end."""
    v, out = 0.0, []
    beta = math.exp(-dt / tau) if kind == "lif" else 1.0
    for value in x:
        v = beta * v + (1 - beta) * value if kind == "lif" else v + value
        s = v >= alpha * theta
        v -= theta * s
        out.append(theta * s / (dt if kind == "lif" else 1.0))
    return out, v


def test_worked_example_of_dsr_if() -> None:
    """Worked example of DSR, IF: spikes, membrane, and OPI's spikes for the same current."""
    x = torch.full((4, 1), 0.4, dtype=torch.float64)
    spikes = dsr_spikes(x, torch.tensor(1.0, dtype=torch.float64))
    assert spikes.flatten().tolist() == [0.0, 1.0, 0.0, 1.0]
    out, v = oracle([0.4] * 4, 1.0, "if", 0.5)
    assert out == [0, 1, 0, 1]
    assert v == pytest.approx(-0.4)


@pytest.mark.parametrize(
    ("current", "dx", "dtheta"), [(0.4, 2.5, 0.0), (1.2, 0.0, 10.0), (-0.4, 0.0, 0.0)]
)
def test_worked_example_of_dsr_gradients(current: float, dx: float, dtheta: float) -> None:
    """Worked example of DSR: the gradient of IF spikes is that of the clipped mean."""
    x = torch.full((4, 1), current, requires_grad=True)
    node = DSRNode(1.0)
    node(x).backward(torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None])
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [dx] * 4
    assert node.v_threshold.grad is not None
    assert node.v_threshold.grad.item() == dtheta


def test_worked_example_of_dsr_lif() -> None:
    """Worked example of DSR, LIF: spikes over dt, membrane, weighted means of both."""
    x = torch.full((8, 1), 2.0, dtype=torch.float64)
    theta = torch.tensor(1.0, dtype=torch.float64)
    spikes = dsr_spikes(x, theta, "lif", alpha=0.5, tau=1.0, dt=0.5)
    assert spikes.flatten().tolist() == [2, 2, 2, 2, 2, 0, 2, 2]
    out, v = oracle([2.0] * 8, 1.0, "lif", 0.5, 1.0, 0.5)
    assert out == spikes.flatten().tolist()
    assert v == pytest.approx(-0.1636968, abs=1e-7)
    assert representation(spikes, "lif", 1.0, 0.5).item() == pytest.approx(1.7051002, abs=1e-7)
    assert representation(x, "lif", 1.0, 0.5).item() == pytest.approx(2.0, abs=1e-12)


@pytest.mark.parametrize("tau", [1.0, 0.7])
def test_gradients_of_lif_are_the_formulas(tau: float) -> None:
    T, theta, dt = 6, 1.5, 0.5
    generator = torch.Generator().manual_seed(0)
    x = 6 * torch.rand(T, 40, generator=generator, dtype=torch.float64) - 1
    g = torch.rand(T, 40, generator=generator, dtype=torch.float64)
    w = torch.tensor([math.exp(-(T - t) * dt / tau) for t in range(1, T + 1)]).double()
    w = (w / w.sum())[:, None]
    mean, G = (w * x).sum(0), T * (w * g).sum(0)
    inside, above = (mean > 0) & (mean < tau * theta / dt), mean > tau * theta / dt
    assert inside.any()
    assert above.any()
    current = x.clone().requires_grad_()
    node = DSRNode(theta, "lif", 0.3, tau, dt, floor=5e-4).double()
    node(current).backward(g)
    expected = torch.where(inside, G / (tau * T), 0.0).expand(T, 40)
    torch.testing.assert_close(current.grad, expected)
    torch.testing.assert_close(node.v_threshold.grad, dt * G[above].sum())


@pytest.mark.parametrize("kind", ["if", "lif"])
def test_spikes_are_those_of_the_scalar_loop(kind: str) -> None:
    x = 4 * torch.rand(7, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 1
    node = DSRNode(1.25, kind, 0.3, 0.9, 0.4).double()
    for found in (node(x), node(x.requires_grad_())):
        for i in range(30):
            out = oracle(x[:, i].tolist(), 1.25, kind, 0.3, 0.9, 0.4)[0]
            assert found[:, i].tolist() == pytest.approx(out, abs=1e-12)


def test_only_the_current_is_kept_for_the_backward_pass() -> None:
    x = torch.rand(8, 5, requires_grad=True)
    node = DSRNode(1.0)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        node(x)
    assert sorted(t.numel() for t in kept if t.dim()) == [40]


def test_the_threshold_does_not_fall_below_its_floor() -> None:
    node = DSRNode(0.5, floor=0.01)
    with torch.no_grad():
        node.v_threshold.fill_(-3.0)
    x = torch.full((4, 1), 0.02)
    assert node.threshold.item() == pytest.approx(0.01)
    assert node(x).flatten().tolist() == pytest.approx([0.01] * 4)
    node(x).sum().backward()
    assert node.v_threshold.grad.item() == 0.0


def test_a_network_of_nodes_learns() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    y = (x[:, 0] * x[:, 1] > 0).long()
    T = 8
    for kind, theta in (("if", 1.0), ("lif", 0.3)):
        torch.manual_seed(1)
        layers = [nn.Linear(4, 32), nn.Linear(32, 2)]
        nodes = [DSRNode(theta, kind, 0.5, 1.0, 0.1, floor=1e-3) for _ in layers]
        net = nn.ModuleList([*layers, *nodes])
        optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
        losses = []
        for _ in range(120):
            h = x.expand(T, *x.shape)
            for layer, node in zip(layers, nodes, strict=True):
                h = node(layer(h))
            loss = nn.functional.cross_entropy(4 * nodes[1].read(h), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.6 * losses[0], kind


# ---- as a conversion method --------------------------------------------------------------------


def small(L: int = 4) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), QCFS(L, 2.0), nn.Conv2d(4, 4, 3), QCFS(L, 4.0),
        nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("normalize", ["threshold", "weights"])
def test_if_spikes_like_opi(normalize: str) -> None:
    net = make_dyadic(small()).eval()
    x = dyadic(3, 3, 6, 6, seed=1)
    snn = convert(net, method="dsr", T=8, normalize=normalize)
    opi = convert(net, method="opi", T=8)
    curve = snn.predict_curve(x, [1, 3, 8])
    for T, answer in curve.items():
        assert torch.equal(answer, opi(x, T=T))
        assert torch.equal(answer, snn(x, T=T))


def test_one_layer_of_a_constant_current_is_the_quantised_one() -> None:
    net = make_dyadic(nn.Sequential(nn.Linear(3, 5), QCFS(8, 2.0))).eval()
    x = dyadic(6, 3, seed=2)
    assert torch.equal(convert(net, method="dsr", T=8)(x), net(x))


@pytest.mark.parametrize("normalize", ["threshold", "weights"])
@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_lif_approximates_the_network_as_dt_shrinks(tau: float, normalize: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(ClipReLU(1.0), nn.Linear(8, 8), ClipReLU(0.5))
    x = torch.rand(64, 8)
    errors = []
    for dt, T in ((0.1, 40), (0.01, 400)):
        method = DSR(kind="lif", tau=tau, dt=dt)
        snn = convert(net, x, method=method, T=T, normalize=normalize, progress=False)
        errors.append(snn.report["2"].error)
        assert 0 < snn.report["2"].rate < 1
    assert errors[1] < 0.5 * errors[0]
    assert errors[1] < 0.05


@torch.no_grad()
def test_a_lif_curve_is_separate_runs() -> None:
    net = nn.Sequential(nn.Linear(3, 4), ClipReLU(1.0), nn.Linear(4, 2), ClipReLU(1.0))
    x = torch.rand(5, 3, generator=torch.Generator().manual_seed(0))
    snn = convert(net, method=DSR(kind="lif", dt=0.1), T=8)
    for T, answer in snn.predict_curve(x, [2, 8]).items():
        torch.testing.assert_close(answer, snn(x, T=T))


@pytest.mark.converted_only
def test_the_gradient_of_a_converted_network_is_that_of_the_clipped_one() -> None:
    # One layer, where that is the definition. A weighted read-out hands step t the gradient w_t g,
    # and LIF weighs those once more: T sum w^2 times the gradient, 1 for equal weights.
    net = make_dyadic(nn.Sequential(nn.Linear(3, 5), ClipReLU(0.75)))
    x = dyadic(32, 3, seed=2) + 0.01  # no mean current at an edge
    g = dyadic(32, 5, seed=3)
    w = torch.exp(-0.2 * torch.arange(8))
    for method, factor in (
        ("dsr", 1.0),
        (DSR(kind="lif", tau=0.5, dt=0.1), 8 * float((w / w.sum()).square().sum())),
    ):
        net.zero_grad()
        snn = convert(net, method=method, T=8)
        net(x).backward(g)
        snn(x).backward(g)
        ((_, layer),) = snn.neurons()
        weight = next(p for n, p in snn.named_parameters() if p.shape == (5, 3))
        torch.testing.assert_close(weight.grad, factor * net[0].weight.grad)
        # The authors' gradient of a LIF threshold has dt where the representation has 1 / dt.
        scale = 1.0 if method == "dsr" else 0.1
        torch.testing.assert_close(layer.node.v_threshold.grad, scale * factor * net[1].lam.grad)
        assert net[1].lam.grad.abs() > 0
        with torch.no_grad():
            torch.testing.assert_close(snn(x), convert(net, method=method, T=8)(x))


@pytest.mark.converted_only
def test_converted_networks_train() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), ClipReLU(1.0), nn.Linear(16, 16), ClipReLU(1.0),
                        nn.Linear(16, 2))  # fmt: skip
    x = torch.randn(64, 4)
    y = (x[:, 0] * x[:, 1] > 0).long()
    for method in ("dsr", DSR(kind="lif", dt=0.1)):
        snn = convert(net, method=method, T=8)
        optimizer = torch.optim.Adam(snn.parameters(), lr=0.02)
        losses = []
        for _ in range(80):
            loss = nn.functional.cross_entropy(snn(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0], method
        thresholds = [layer.node.v_threshold for _, layer in snn.neurons()]
        assert any(p.grad is not None and p.grad.abs().item() > 0 for p in thresholds)


@torch.no_grad()
def test_the_output_layer_can_spike() -> None:
    net = make_dyadic(nn.Sequential(nn.Linear(3, 4), QCFS(8, 2.0), nn.Linear(4, 3))).eval()
    x = dyadic(9, 3, seed=4)
    snn = convert(spiking_output(net, 2.0), method="dsr", T=16)
    out = snn(x)
    assert len(list(snn.neurons())) == 2
    assert torch.equal(out * 8, (out * 8).round())  # rates: whole spikes of 2 in 16 steps
    assert out.min() >= 0  # the trap: negative logits are not told apart
    assert out.max() <= 2
    with pytest.raises(ValueError, match="ceiling"):
        spiking_output(net, 0.0)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"kind": "soft"}, ValueError, "kind='soft'"),
        ({"alpha": 1.5}, ValueError, "alpha=1.5 must be at most 1"),
        ({"tau": 0.0}, ValueError, "tau"),
        ({"dt": "1"}, TypeError, "dt"),
    ],
)
def test_what_cannot_be_is_refused(options, error, match) -> None:
    with pytest.raises(error, match=match):
        DSR(**options)
    with pytest.raises(error, match=match):
        DSRNode(1.0, **options)


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match="membranes start at 0"):
        convert(nn.Sequential(QCFS(4, 1.0)), method="dsr", v_init="half")
    with pytest.raises(ValueError, match="floor"):
        DSRNode(1.0, floor=0.0)
    with pytest.raises(ValueError, match="T >= 1"):
        representation(torch.zeros(0, 3))
