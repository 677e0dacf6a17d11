"""Plans in whole numbers: the same bits in any order of summation, against int64 arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conversion_helpers import randomize
from support import PURE, at_level, extension
from test_engine import NETWORKS, converted, counts_of_plan
from torch import Tensor, nn

from snnkernels import IFNode
from snnkernels.engine import lower
from snnkernels.engine.integers import WholePrefix

LOWERED = ["vgg average", "vgg maximum", "residual", "mlp", "small cnn"]
LEVELS = [] if PURE or extension("_cpu") is None else extension("_cpu").isas()


def network(name: str, **given: Any) -> tuple[Any, Tensor]:
    torch.manual_seed(7)
    ann = randomize(NETWORKS[name]()).eval()
    x = torch.randn(3, 3, 8, 8)
    return converted(ann, x, **given), x


@pytest.fixture(params=[*LEVELS, "reference"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every SIMD level, and plain PyTorch."""
    with at_level(request.param):
        yield request.param


def oracle(plan: Any, x: Tensor, T: int) -> dict[str, Tensor]:
    """The counts of all layers by dense convolutions in float64, exact, and int64 neurons."""
    plan(x, T=1)
    (built,) = plan._built.values()
    statics = built.prefix(x)
    ports = [n for n in built.net if n.op == "static"]
    of = {n.name: statics[i] for n, i in zip(ports, plan.snn._of_body, strict=True)}
    spikes: dict[str, Tensor] = {}
    found = {}
    for node in built.net:
        if node.op != "layer":
            continue
        C = node.size[0]
        size = (*node.size, 1, 1)[:3]
        rows = torch.zeros(T, len(x), C, 1, 1, dtype=torch.float64)
        for name in node.statics:
            value = of[name].reshape(len(x), C, *of[name].shape[2:])
            value = value[..., None, None] if value.dim() == 2 else value
            rows = rows + (value / node.unit.view(-1, 1, 1)).round()
        if node.bias is not None:
            rows = rows + node.bias.view(-1, 1, 1)
        for term in node.terms:
            s = spikes[built.net.origin_of(term.source).name].flatten(0, 1)
            if term.pool != (1, 1):
                s = F.avg_pool2d(s, term.pool, term.pool_stride, divisor_override=1)
            y = F.conv2d(
                s, term.weight, None, term.stride, term.padding, term.dilation, term.groups
            )
            rows = rows + y.unflatten(0, (T, -1))
        total = rows.to(torch.int64)
        assert torch.equal(total.double(), rows)
        if node.side > 1:
            sums = F.max_pool2d(total.cumsum(0).double().flatten(0, 1), node.side)
            total = torch.diff(
                sums.unflatten(0, (T, -1)).to(torch.int64), dim=0,
                prepend=torch.zeros(1, len(x), *size, dtype=torch.int64),
            )  # fmt: skip
        theta, v = (
            t.to(torch.int64).expand(node.size if t.dim() > 1 else C).reshape(C, *(
                size[1:] if t.dim() > 1 else (1, 1)
            ))
            for t in (node.neurons.threshold, node.neurons.v_init)
        )  # fmt: skip
        v = v.expand(len(x), *size)
        fired = []
        for t in range(T):
            v = v + total[t]
            s = v > theta if node.neurons.strict else v >= theta
            v = v - s * theta
            fired.append(s)
        spikes[node.name] = torch.stack(fired).double()
        counts = torch.stack(fired).sum(0, dtype=torch.int32)
        found[node.neurons.module.label] = counts.reshape(len(x), *node.size)
    return found


@pytest.mark.parametrize("name", LOWERED)
def test_counts_are_those_of_whole_numbers(name: str, way: str) -> None:
    snn, x = network(name)
    plan = lower(snn, precision="int8")
    for T in (1, 6, 35):
        want, got = oracle(plan, x, T), counts_of_plan(plan, x, T)
        assert got.keys() == want.keys()
        for label, counts in got.items():
            assert torch.equal(counts, want[label]), f"{label} at T={T}"
    assert sum(int(c.sum()) for c in want.values()) > 0


def test_answers_do_not_depend_on_batch_and_threads() -> None:
    snn, x = network("residual")
    plan = lower(snn, precision="int8")
    want = counts_of_plan(plan, x, 9)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for label, counts in counts_of_plan(plan, x, 9).items():
            assert torch.equal(counts, want[label])
    finally:
        torch.set_num_threads(before)
    for label, counts in counts_of_plan(plan, x[1:2], 9).items():
        assert torch.equal(counts, want[label][1:2])


def test_the_current_of_the_first_layer_has_exact_sums() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 20, 7, padding=3)
    snn = converted(nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(1280, 4)).eval(),
                    torch.randn(2, 3, 8, 8))  # fmt: skip
    prefix = WholePrefix(snn.prefix)
    x = torch.randn(2, 3, 8, 8) * 100
    (value,) = (t.detach() for t in prefix(x) if t.dim() == 4)
    inner = next(m for m in prefix._run.modules() if isinstance(m, nn.Conv2d))
    x = (x.double() * 2**14).round() / 2**14
    # In any order: channels and taps shuffled.
    order = torch.randperm(3 * 49)
    columns = F.unfold(x, 7, padding=3)[:, order]
    assert inner.bias is not None
    sums = (inner.weight.flatten(1)[:, order] @ columns + inner.bias[:, None]).detach()
    assert torch.equal(sums.view_as(value), value)
    close = conv(x.float()).detach()
    assert float((value - close).abs().max()) < 1e-3 * float(close.abs().max())


@pytest.mark.parametrize("large", [0.0, 1.0, 1e9])
def test_any_bias_leaves_exact_sums(large: float) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3)
    snn = converted(nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)).eval(),
                    torch.randn(2, 3, 8, 8))  # fmt: skip
    (inner,) = (m for m in snn.prefix.modules() if isinstance(m, nn.Conv2d))
    assert inner.bias is not None
    with torch.no_grad():
        inner.weight.mul_(1e-9)
        inner.bias.fill_(large)
    prefix = WholePrefix(snn.prefix)
    (inner,) = (m for m in prefix._run.modules() if isinstance(m, nn.Conv2d))
    assert inner.bias is not None
    assert inner.weight.abs().max() > 0 or large == 1e9
    assert torch.equal(inner.bias, torch.full((4,), large, dtype=torch.float64))
    x = torch.randn(2, 3, 8, 8) * 100
    columns = F.unfold((x.double() * 2**14).round() / 2**14, 3)
    terms = inner.weight.flatten(1)[None, :, :, None] * columns[:, None]
    bias = inner.bias.view(1, 4, 1, 1).expand(2, 4, 1, 36)
    first = torch.cat([bias, terms], 2).cumsum(2)[:, :, -1]
    last = torch.cat([terms, bias], 2).cumsum(2)[:, :, -1]
    assert torch.equal(first, last)
    (value,) = (t for t in prefix(x) if t.dim() == 4)
    assert torch.equal(value.flatten(2), last)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["prefix", "body"])
@pytest.mark.parametrize("which", ["weight", "bias"])
def test_values_that_are_not_finite_are_refused(bad: float, where: str, which: str) -> None:
    snn, x = network("vgg average")
    part = getattr(snn, where)
    conv = next(m for m in part.modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        getattr(conv, which).view(-1)[1] = bad
    with pytest.raises(ValueError, match=f"finite weights and biases, but .* has {bad}"):
        lower(snn, precision="int8")(x)


def test_what_is_beyond_32_bits_does_not_come_around() -> None:
    for factor in (-1e6, 1e6):
        snn, x = network("mlp")
        (_, first), *_ = snn.neurons()
        first.node.v_init = first.node.v_threshold.expand(100) * factor * 2**20
        with pytest.raises(ValueError, match="too long for precision='int8'"):
            lower(snn, precision="int8")(x, T=1)
    # A threshold that no sum reaches is never reached.
    snn, x = network("small cnn")
    label, layer = list(snn.neurons())[1]
    size = counts_of_plan(lower(snn), x, 1)[label].shape[1:]
    theta = layer.node.v_threshold.expand(size[0])[:, None, None].expand(size).clone()
    theta[:, 0, 0] *= 1e12
    layer.node.v_threshold = theta
    layer.node.v_init, layer.node.amplitude = torch.zeros(()), torch.ones(())
    got = counts_of_plan(lower(snn, precision="int8"), x, 9)[label]
    assert int(got[:, :, 0, 0].sum()) == 0
    assert int(got.sum()) > 0


class StemAdded(nn.Module):
    """What is constant in time and spikes in one sum, behind a max-pool."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(128, 5)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.a(x)
        return self.fc(F.relu(self.pool(self.b(F.relu(stem)) + stem)).flatten(1))


@pytest.mark.parametrize("factor", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("strict", [False, True])
def test_constant_currents_are_cut_where_no_spike_changes(factor: float, strict: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 3, 8, 8)
    snn = converted(StemAdded().eval(), x)
    for _, layer in snn.neurons():
        layer.node.tie = ">" if strict else ">="
    with torch.no_grad():
        for parameter in snn.prefix.parameters():
            parameter.mul_(factor)
    plan = lower(snn, precision="int8")
    want, got = oracle(plan, x, 20), counts_of_plan(plan, x, 20)
    assert len(got) == 2
    for label, counts in got.items():
        assert torch.equal(counts, want[label])


def test_many_steps_stay_in_range() -> None:
    snn, x = network("residual")
    plan = lower(snn, precision="int8")
    want, got = oracle(plan, x, 300), counts_of_plan(plan, x, 300)
    for label, counts in got.items():
        assert torch.equal(counts, want[label])


def test_weights_and_thresholds_are_whole_and_fit() -> None:
    snn, x = network("residual")
    plan = lower(snn, precision="int8")
    plan(x)
    (built,) = plan._built.values()
    layers = [n for n in built.net if n.neurons is not None]
    assert len(layers) == 5
    for node in layers:
        assert node.neurons.threshold.dtype == node.neurons.v_init.dtype == torch.int32
        assert int(node.neurons.threshold.min()) >= 1
        for term in node.terms:
            assert torch.equal(term.weight, term.weight.round())
        largest = [float(term.weight.abs().max()) for term in node.terms if not term.each]
        assert not largest or max(largest) == 127
    assert "a threshold is" in str(plan.explain())


def test_the_unit_leaves_the_least_square_error() -> None:
    from snnkernels.engine.integers import _unit

    torch.manual_seed(0)
    w = torch.randn(8, 20_000, dtype=torch.float64)
    w[0, 0] = 20  # an outlier is worth clipping
    w[1] = 0
    unit = _unit(w, torch.full((8,), 0.25, dtype=torch.float64))

    def error(u: Tensor) -> Tensor:
        return ((w / u[:, None]).round().clamp(-127, 127) * u[:, None] - w).square().sum(1)

    assert float(unit[1]) == 0.25
    assert bool((error(unit)[2:] <= 1.000001 * error(w.abs().amax(1) / 127)[2:]).all())
    assert float(unit[0]) < 20 / 127


def test_accuracy_of_the_plan_is_near() -> None:
    """Rates of the last layer differ by less than an eighth of the largest."""
    snn, x = network("vgg average")
    a, b = lower(snn)(x, T=64), lower(snn, precision="int8")(x, T=64)
    assert float((a - b).abs().max()) < 0.125 * float(a.abs().max())


class TwoConvolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.b(self.a(x))).mean([2, 3]))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.a(x * 0.3)).mean([2, 3]))


@pytest.mark.parametrize(
    ("ann", "words"), [(TwoConvolutions, "2 convolutions"), (Scaled, "found mul")]
)
def test_other_arithmetic_before_the_first_neurons_is_refused(ann: Any, words: str) -> None:
    x = torch.randn(2, 3, 8, 8)
    plan = lower(converted(ann().eval(), x), precision="int8")
    with pytest.raises(ValueError, match=f"needs one convolution.*{words}"):
        plan(x)


def test_what_cannot_be_exact_is_refused() -> None:
    snn, x = network("vgg maximum")
    plan = lower(snn, precision="int8")
    for bad in (x * 1e4, x * math.nan):
        with pytest.raises(ValueError, match="takes inputs below 512"):
            plan(bad)
    with pytest.raises(ValueError, match="too long for precision='int8'"):
        plan(x, T=10**7)
    plan = lower(snn, precision="int8", without=["fuse_neurons"])
    with pytest.raises(ValueError, match="needs every layer of neurons lowered"):
        plan(x)
    snn = converted(NETWORKS["mlp"]().eval(), x, method="signed")
    with pytest.raises(ValueError, match="has no other way to run, but its method"):
        lower(snn, precision="int8")(x)
    with pytest.raises(ValueError, match="has no other way to run, but its weights are"):
        lower(converted(NETWORKS["mlp"]().double().eval(), x.double()), precision="int8")(
            x.double()
        )


@pytest.mark.parametrize("T", [3, 40])
@pytest.mark.parametrize("strict", [False, True])
def test_neurons_of_whole_numbers_are_the_librarys(strict: bool, T: int) -> None:
    """Where all are small whole numbers int32 and float32 neurons are the same."""
    from snnkernels.kernels.spike_conv import spike_conv
    from snnkernels.kernels.spike_maps import Layer

    torch.manual_seed(1)
    current = torch.randint(-9, 30, (2, 3, 4, 64)).float()
    theta, start = torch.randint(1, 40, (64,)), torch.randint(-5, 20, (64,))
    whole = Layer(1, None, theta.int(), start.int(), strict=strict)
    _, counts, _ = spike_conv([], whole, current=current, count_at=(T,), T=T)
    node = IFNode(v_threshold=theta.float(), v_init=start.float(), tie=">" if strict else ">=",
                  channel_dim=-1, output="count")  # fmt: skip
    assert counts is not None
    assert torch.equal(counts[0], node(current, T=T).to(torch.int32))
