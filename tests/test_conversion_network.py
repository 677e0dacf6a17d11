"""The converted network as a module: calls, curves, copies, files, and the untouched ANN."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conversion_helpers import Everything, images, randomize
from support import compiles
from torch import nn

from snnkernels.conversion import QCFS, ConvertedNetwork, convert, methods


@pytest.fixture(scope="module")
def ann() -> nn.Module:
    return Everything()


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return images(6)


@pytest.fixture(scope="module")
def snn(ann: nn.Module, x: torch.Tensor) -> ConvertedNetwork:
    return convert(ann, x, T=8)


def test_the_ann_is_untouched() -> None:
    net = Everything()
    net.train()
    net.bn1.eval()
    calls: list[int] = []
    net.conv1.register_forward_hook(lambda *a: calls.append(1))
    net.fc1.register_forward_pre_hook(lambda *a: calls.append(2))
    before = copy.deepcopy(net.state_dict())
    flags = [m.training for m in net.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()]
    inplace = net.relu.inplace
    snn = convert(net, images(4), normalize="threshold")
    snn(images(4))
    with torch.no_grad():
        for p in snn.parameters():
            p.zero_()
    assert calls == []  # our copy does not call the user's hooks
    assert [m.training for m in net.modules()] == flags
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()] == hooks
    assert net.relu.inplace == inplace
    after = net.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_curve_equals_separate_runs_bit_for_bit(snn: ConvertedNetwork, x: torch.Tensor) -> None:
    curve = snn.predict_curve(x, [5, 1, 2, 8, 2])
    assert list(curve) == [1, 2, 5, 8]
    for T, out in curve.items():
        assert torch.equal(out, snn(x, T=T))


def test_calls_do_not_influence_each_other(snn: ConvertedNetwork, x: torch.Tensor) -> None:
    first = snn(x)
    snn(x[:2], T=3)
    assert torch.equal(snn(x), first)
    assert torch.equal(first, snn(x, T=8))


@pytest.mark.parametrize("batch", [1, 3, 6])
def test_any_batch_size_gives_the_same_answers(
    snn: ConvertedNetwork, x: torch.Tensor, batch: int
) -> None:
    torch.testing.assert_close(snn(x[:batch]), snn(x)[:batch], atol=1e-5, rtol=0)


def test_calibration_does_not_depend_on_the_batch_size(ann: nn.Module, x: torch.Tensor) -> None:
    a, b = (
        convert(ann, x, threshold="max"),
        convert(ann, x.split(1), threshold="max", progress=False),
    )
    for row in a.report.rows:
        if row.threshold is not None:
            torch.testing.assert_close(b.report[row.name].threshold, row.threshold)


def test_training_mode_changes_nothing(snn: ConvertedNetwork, x: torch.Tensor) -> None:
    expected = snn(x)
    snn.train()
    assert snn.training
    assert torch.equal(snn(x), expected)
    assert not snn.eval().training


def test_state_dict_round_trip(snn: ConvertedNetwork, ann: nn.Module, x: torch.Tensor) -> None:
    other = convert(ann, images(4, seed=9), T=4, threshold="max")
    assert not torch.equal(other(x, T=8), snn(x))
    result = other.load_state_dict(snn.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(other(x, T=8), snn(x))
    assert any(key.endswith("v_threshold") for key in snn.state_dict())


def test_deepcopy_and_pickle(snn: ConvertedNetwork, x: torch.Tensor) -> None:
    expected = snn(x)
    for twin in (copy.deepcopy(snn), pickle.loads(pickle.dumps(snn))):
        assert torch.equal(twin(x), expected)
        assert str(twin.report) == str(snn.report)
        with torch.no_grad():
            next(twin.parameters()).add_(1)
        assert not torch.equal(twin(x), expected)
    assert torch.equal(snn(x), expected)


def test_moves_to_float64(snn: ConvertedNetwork, x: torch.Tensor) -> None:
    out = copy.deepcopy(snn).double()(x.double())
    assert out.dtype == torch.float64
    torch.testing.assert_close(out.float(), snn(x), atol=0.1, rtol=0)


def test_bfloat16_answers_in_bfloat16(snn: ConvertedNetwork, x: torch.Tensor) -> None:
    out = copy.deepcopy(snn).bfloat16()(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), snn(x), atol=0.2, rtol=0)


@pytest.mark.converted_only
def test_gradients_reach_the_weights(snn: ConvertedNetwork, x: torch.Tensor) -> None:
    twin = copy.deepcopy(snn)
    twin(x, T=2).sum().backward()
    grads = [p.grad for p in twin.prefix.parameters()]
    assert grads
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in grads)


class Reused(nn.Module):
    """The spikes of one layer go on to other neurons and to the output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.fc1(x))
        return self.fc3(torch.relu(self.fc2(h)) + h)


@pytest.mark.parametrize("kind", ["threshold", "weights"])
def test_spikes_read_twice_count_the_same(kind: str) -> None:
    net, x = Reused(), torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    snn = convert(net, x, threshold="max", T=512, normalize=kind)
    torch.testing.assert_close(snn(x), net(x), atol=5e-3, rtol=0)
    with torch.no_grad():
        without = snn(x, T=7)
    assert torch.equal(snn(x, T=7), without)  # gradients do not change the answer
    twin = copy.deepcopy(snn)
    assert torch.equal(twin(x, T=7), without)


@pytest.mark.converted_only
def test_gradient_of_a_rate_is_that_of_the_mean_spike() -> None:
    snn = convert(nn.ReLU(), threshold=2.0, v_init=0.0, T=4)
    x = torch.tensor([[2.0, 0.5]], requires_grad=True)
    snn(x).sum().backward()
    plain = x.detach().clone().requires_grad_()
    node = next(snn.neurons())[1].node
    node.output = "rate"
    node(plain, T=4).sum().backward()
    assert x.grad is not None
    assert bool((x.grad > 0).all())
    torch.testing.assert_close(x.grad, plain.grad)


@compiles
@pytest.mark.converted_only
def test_compiles(x: torch.Tensor, snn: ConvertedNetwork) -> None:
    twin = copy.deepcopy(snn)
    compiled = torch.compile(twin, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x, T=3), snn(x, T=3))


def test_nothing_is_kept_between_calls(snn: ConvertedNetwork, x: torch.Tensor) -> None:
    snn(x)
    assert all(not isinstance(layer.node._v, torch.Tensor) for _, layer in snn.neurons())


def test_report(snn: ConvertedNetwork) -> None:
    text, markdown = str(snn.report), snn.report.to_markdown()
    for word in ("conv1", "batch norm folded into conv1", "θ mmse per channel", "T=8", "max-pool"):
        assert word in text
        assert word in markdown
    header, rule = markdown.splitlines()[:2]
    assert header.count("|") == rule.count("|") == 10
    rows = {row.name: row for row in snn.report.rows}
    assert rows["bn3"].action == "batch norm kept as scale and shift"
    for name, layer in snn.neurons():
        assert 0 < rows[name].rate < 1
        assert 0 < rows[name].error < 1
        assert torch.equal(rows[name].threshold, layer.node.v_threshold)
    assert 0 < rows["output"].error < 0.5
    with pytest.raises(KeyError, match="it has"):
        snn.report["nothing"]


def test_report_measures_what_hooks_see(ann: nn.Module, x: torch.Tensor) -> None:
    snn = convert(ann, x, T=8)
    spikes: list[torch.Tensor] = []
    name, layer = next(snn.neurons())
    layer.register_forward_hook(lambda m, args, out: spikes.append(out))
    snn(x)
    assert snn.report[name].rate == pytest.approx((spikes[0] != 0).double().mean().item())


def test_qcfs_network_needs_no_data_and_is_reported_without_rates() -> None:
    net = randomize(
        nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), QCFS(8), nn.Flatten(), nn.Linear(144, 3)
        )
    )
    snn = convert(net, method="qcfs", T=8)
    assert snn.report["2"].rate is None
    assert "learned" in snn.report["2"].action
    torch.testing.assert_close(snn(images(4)), net(images(4)), atol=1e-4, rtol=0)
    assert convert(net, images(2), method="qcfs").report["2"].rate is not None


def test_methods_are_listed_with_source_and_needs() -> None:
    listed = {m["name"]: m for m in methods()}
    assert set(listed) >= {"opi", "qcfs"}
    assert "AAAI 2022" in listed["opi"]["source"]
    assert "ICLR 2022" in listed["qcfs"]["source"]
    assert all(m["needs"] for m in listed.values())


@pytest.mark.parametrize("T", [0, -1, 1.5, True, "4"])
def test_steps_are_checked(snn: ConvertedNetwork, x: torch.Tensor, T: object) -> None:
    with pytest.raises(ValueError, match="T must be a whole number of at least 1"):
        snn(x, T=T)
    with pytest.raises(ValueError, match="T must be"):
        snn.predict_curve(x, [1, T])
    with pytest.raises(ValueError, match="T must be"):
        convert(nn.ReLU(), threshold=1.0, T=T)


def test_empty_curve_is_an_error(snn: ConvertedNetwork, x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="steps is empty"):
        snn.predict_curve(x, [])


def test_a_single_activation_converts() -> None:
    x = torch.rand(4, 3)
    torch.testing.assert_close(convert(nn.ReLU(), threshold=1.0, T=64)(x), x, atol=0.01, rtol=0)
