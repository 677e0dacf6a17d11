"""Progressive tandem learning (Wu et al., TPAMI 2021): layers spike one after another."""

from __future__ import annotations

import pytest
import torch
from conversion_helpers import Shortcut, dyadic, make_dyadic
from torch import nn

from snnkernels.conversion import ConversionError, convert
from snnkernels.conversion import ptl as ptl_module
from snnkernels.conversion.ptl import ptl_train
from snnkernels.conversion.tandem import PTLNetwork, hybrid_spikes


def oracle(currents: list[float], theta: float) -> tuple[list[int], float]:
    """The authors' form: the threshold is subtracted at the step after a spike."""
    mem, spike, out = 0.0, 0, []
    for x in currents:
        mem = mem + x - spike * theta
        spike = int(mem >= theta)
        out.append(spike)
    return out, mem


def test_worked_example_of_ptl() -> None:
    """Worked example of PTL: the input at the first step, the bias spread, spikes and membrane."""
    currents = [0.375 + 0.0625, 0.0625, 0.0625, 0.0625]
    assert oracle(currents, 0.25) == ([1, 1, 0, 0], 0.125)
    spikes, count = hybrid_spikes(torch.tensor(currents)[:, None], 0.25)
    assert spikes.flatten().tolist() == [1, 1, 0, 0]
    assert count.tolist() == [2]


def one_layer() -> nn.Module:
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    with torch.no_grad():
        net[0].weight.fill_(1.0)
        net[0].bias.fill_(0.25)
    return net


def test_worked_example_of_ptl_as_a_layer_and_as_a_converted_network() -> None:
    """Worked example of PTL, by the hybrid layer and by method='ptl' (θ / T = 0.25)."""
    x = torch.tensor([[0.375]])
    net = PTLNetwork(one_layer(), T=4).eval()
    net.place(0.25)
    assert net(x).item() == 2.0
    with torch.no_grad():
        snn = convert(one_layer(), method="ptl", threshold=1.0, T=4)
        curve = snn.predict_curve(x, [1, 2, 3, 4])
    assert [curve[t].item() / 0.25 for t in curve][3] == 2.0
    ((_, layer),) = snn.neurons()
    assert layer.node.v_threshold.item() == 0.25


def chain() -> nn.Module:
    return make_dyadic(
        nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(3, 4, 2),
            nn.ReLU(), nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2),
        )
    ).eval()  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("scaled", [False, True])
def test_hybrid_layers_are_the_loop_over_time(scaled: bool) -> None:
    T, thetas = 4, [0.5, 0.5, 1.0]
    ann = chain()
    x = dyadic(3, 2, 6, 6, seed=3)
    net = PTLNetwork(ann, T, scaled).eval()
    for theta in thetas:
        net.place(theta)
    parts = [ann[:2], ann[3:5], ann[6:8]]
    inputs = [x if t == 0 else torch.zeros_like(x) for t in range(T)]
    for part, theta in zip(parts, thetas, strict=True):
        bias = part(torch.zeros_like(inputs[0]))
        v, out = torch.zeros_like(bias), []
        for s in inputs:
            v = v + (part(s) - bias) + bias / T
            fired = (v >= theta).to(v.dtype)
            v = v - theta * fired
            out.append(fired * (theta if scaled else 1.0))
        inputs = out
    count = torch.stack(inputs).sum(0)
    assert 0 < count.sum() < count.numel() * T
    assert torch.equal(net(x), ann[9](count))


def test_the_converted_network_is_the_scaled_hybrid_one() -> None:
    ann = chain()
    x = dyadic(3, 2, 6, 6, seed=3)
    names = {"2": 2.0, "5": 2.0, "8": 4.0}
    hybrid = PTLNetwork(ann, 4, scaled=True).eval()
    for theta in names.values():
        hybrid.place(theta / 4)
    with torch.no_grad():
        snn = convert(ann, x, method="ptl", threshold=names, T=4, progress=False)
        assert torch.equal(snn(x), hybrid(x))


def test_gradients_pass_through_the_twin_on_counts() -> None:
    ann = make_dyadic(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    x = dyadic(6, 3, seed=1)
    g = dyadic(6, 2, seed=2)
    net = PTLNetwork(ann, T=4).eval()
    net.place(0.5)
    (counts,) = net.values(x)
    net(x).backward(g)
    # the tail is differentiated at the counts, the layer as the ReLU of its input
    first, tail = ann[0], ann[2]
    passed = (g @ tail.weight) * (first(x) > 0)
    weights = {tuple(p.shape): p.grad for p in net.parameters()}
    torch.testing.assert_close(weights[4, 3], passed.T @ x)
    torch.testing.assert_close(weights[2, 4], g.T @ counts.detach())
    assert torch.equal(counts, counts.round())


def data(seed: int, n: int = 96) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    y = (x[:, 0] + x[:, 1] > 0).long() + (x[:, 2] > 0.5).long()
    return [(x[i : i + 32], y[i : i + 32]) for i in range(0, n, 32)]


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.1), nn.Linear(24, 16),
        nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3),
    )  # fmt: skip


@pytest.mark.parametrize("scaled", [False, True])
def test_a_small_network_is_trained_layer_by_layer(scaled: bool) -> None:
    ann = mlp()
    before = {k: v.clone() for k, v in ann.state_dict().items()}
    train, test = data(1, 512), data(2, 128)
    net = ptl_train(ann, train, test, T=8, epochs=60, patience=4, lr=1e-2, scaled=scaled)
    assert all(torch.equal(v, before[k]) for k, v in ann.state_dict().items())
    assert net.placed == 2
    assert not net.training
    assert net.history[0]["placed"] == 1
    assert net.history[-1]["placed"] == 2
    x, y = (torch.cat(parts) for parts in zip(*test, strict=True))
    with torch.no_grad():
        accuracy = (net(x).argmax(1) == y).double().mean().item()
        values = list(net.values(x))
    best = max(h["accuracy"] for h in net.history if h["placed"] == 2)
    assert accuracy == pytest.approx(best)  # the best of the last stage came back
    assert accuracy > 0.7
    for value, theta in zip(values, net.thresholds, strict=True):
        counts = value / theta if scaled else value
        torch.testing.assert_close(counts, counts.round())
        assert counts.max() <= 8


def test_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, int, bool]] = []

    class Stage(ptl_module._Stage):
        def __init__(self, net, lr, weight_decay) -> None:
            super().__init__(net, lr, weight_decay)
            frozen = [all(not p.requires_grad for p in s.parameters()) for s in net.segments]
            seen.append((lr, net.placed, frozen))

        def note(self, accuracy: float) -> int:
            return super().note(0.5)  # the first epoch of a stage is its best

    monkeypatch.setattr(ptl_module, "_Stage", Stage)
    net = ptl_train(mlp(), data(1), data(2), T=4, epochs=50, patience=3)
    # the first layer learns in its stage; later ones are frozen as they are placed
    assert seen == [(1e-3, 1, [False, False]), (pytest.approx(1e-4), 2, [True, True])]
    assert [h["placed"] for h in net.history] == [1] * 4 + [2] * 4  # 1 + patience each


def test_epochs_that_run_out_are_said() -> None:
    with pytest.warns(UserWarning, match="1 layers still to spike"):
        net = ptl_train(mlp(), data(1), data(2), T=4, epochs=2)
    assert net.placed == 2


def test_thresholds_are_the_percentile_over_T() -> None:
    net = PTLNetwork(nn.Sequential(nn.ReLU(), nn.Linear(1, 1)), T=4)
    x = torch.arange(1.0, 1001.0)[:, None]
    assert net.estimate(x, 99.9) == [999.0 / 4]
    assert net.estimate(x, 100) == [1000.0 / 4]


def test_state_dicts_know_what_spikes() -> None:
    net = PTLNetwork(chain(), T=4).eval()
    net.place(0.5)
    other = PTLNetwork(chain(), T=4).eval()
    other.load_state_dict(net.state_dict())
    x = dyadic(3, 2, 6, 6)
    assert other.placed == 1
    assert torch.equal(other(x), net(x))


def test_what_it_cannot_do_is_an_error() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(torch.relu(self.a(x)) + x)

    with pytest.raises(ConversionError, match="takes a chain of layers"):
        PTLNetwork(Branches(), T=4)
    pooled = nn.Sequential(nn.ReLU(), nn.MaxPool1d(2), nn.ReLU())
    with pytest.raises(ConversionError, match="Use strides or average pools"):
        PTLNetwork(pooled, T=4)
    with pytest.raises(ValueError, match="T=0"):
        PTLNetwork(nn.Sequential(nn.Linear(1, 1), nn.ReLU()), T=0)
    net = PTLNetwork(nn.Sequential(nn.Linear(1, 1), nn.ReLU()), T=4)
    with pytest.raises(ValueError, match="the layer is silent"):
        net.place(0.0)
    net.place(1.0)
    with pytest.raises(ValueError, match="all 1 layers spike already"):
        net.place(1.0)
    for wrong, match in (
        ({"epochs": 0}, "epochs=0"), ({"patience": 1.5}, "patience=1.5"),
        ({"percentile": 0}, "percentile=0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            ptl_train(mlp(), data(1), data(2), **wrong)
    with pytest.raises(ValueError, match="loader is empty"):
        ptl_train(mlp(), [], data(2))
    with pytest.raises(ValueError, match="loader is empty in a later epoch"):
        ptl_train(mlp(), iter(data(1, 32)), data(2))
    with pytest.raises(ValueError, match="validation is empty"):
        ptl_train(mlp(), data(1), [])
    skip = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.side, self.act = skip, nn.Conv2d(3, 3, 1), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(self.body(x) + self.side(x))

    with pytest.raises(ConversionError, match="show the input once"):
        convert(Around(), method="ptl", threshold=1.0)
    convert(Shortcut(4), method="ptl", threshold=1.0)  # before the first neuron all is well
