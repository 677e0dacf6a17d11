"""Plans: the same answer as the converted network, and the passes that make them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from any_networks import DenseNet, Mixer, MobileNetV2, ResNeXt, SENet, UNet
from conversion_helpers import Everything, dyadic, images, make_dyadic, randomize
from torch import Tensor, nn

import snnkernels
from snnkernels import models
from snnkernels.conversion.spiking import SpikingActivation
from snnkernels.engine import ALL_PASSES, lower
from snnkernels.engine.layers import Dense, SpikingLayer
from snnkernels.engine.map_layers import MapLayer
from snnkernels.engine.network import Network, Node, Term
from snnkernels.engine.passes import PASSES
from snnkernels.kernels.spike_maps import SpikeMap


def vgg(pool: type[nn.Module] = nn.AvgPool2d) -> nn.Module:
    layers: list[nn.Module] = []
    for inner, out, pooled in ((3, 24, True), (24, 70, False), (70, 70, True), (70, 130, True)):
        layers += [nn.Conv2d(inner, out, 3, padding=1), nn.ReLU(), *([pool(2)] * pooled)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(130, 20), nn.ReLU(), nn.Linear(20, 5))


class Block(nn.Module):
    """Two residual blocks, one with a strided shortcut; the mean at the end as users write it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.a1, self.a2 = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.b1, self.b2 = nn.Conv2d(16, 66, 3, 2, 1), nn.Conv2d(66, 66, 3, padding=1)
        self.short, self.bn = nn.Conv2d(16, 66, 1, 2), nn.BatchNorm2d(66)
        self.fc = nn.Linear(66, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.a2(F.relu(self.a1(x))) + x)
        x = F.relu(self.b2(F.relu(self.b1(x))) + self.bn(self.short(x)))
        return self.fc(x.mean([2, 3]))


NETWORKS: dict[str, Any] = {
    "vgg average": vgg,
    "vgg maximum": lambda: vgg(nn.MaxPool2d),
    "residual": Block,
    "everything": Everything,
    "mlp": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(192, 100), nn.ReLU(), nn.Linear(100, 70), nn.ReLU(),
        nn.Linear(70, 5),
    ),
    "small cnn": lambda: models.small_cnn(in_channels=3),
}  # fmt: skip


def dyadic_network(name: str) -> nn.Module:
    torch.manual_seed(3)
    return make_dyadic(NETWORKS[name]()).eval()


def converted(ann: nn.Module, x: Tensor, **given: Any) -> Any:
    return snnkernels.convert(ann, [x], progress=False, **{"T": 8, **given})


def exact(name: str, **given: Any) -> tuple[Any, Tensor]:
    """A network whose sums are all exact: weights and inputs of few bits, θ a power of two."""
    x = dyadic(3, 3, 8, 8, seed=5)
    return converted(dyadic_network(name), x, threshold=4.0, **given), x


def counts_of(snn: Any, x: Tensor, T: int) -> dict[str, Tensor]:
    """Spike counts of every layer of the converted network."""
    found: dict[str, Tensor] = {}
    hooks = []
    for label, layer in snn.neurons():

        def keep(module: Any, args: Any, out: Tensor, label: str = label) -> None:
            rows = out if module.counts else module.count(out.unflatten(0, (T, -1)))
            found[label] = rows

        hooks.append(layer.register_forward_hook(keep))
    with torch.no_grad():
        snn(x, T=T)
    for hook in hooks:
        hook.remove()
    return found


def counts_of_plan(plan: Any, x: Tensor, T: int) -> dict[str, Tensor]:
    """Spike counts of every layer of a plan, by the label of its neurons."""
    plan(x, T=T)
    (built,) = plan._built.values()
    labels = {n.name: n.neurons.module.label for n in built.net if n.neurons is not None}
    found: dict[str, Tensor] = {}
    hooks = []
    for module in built.body.modules():
        if isinstance(module, (SpikingLayer, MapLayer)):

            def keep(layer: Any, args: Any, out: Any) -> None:
                spikes, counts = out
                if isinstance(spikes, SpikeMap):
                    counts = spikes.dense().sum(0)
                else:
                    counts = counts[-1] if spikes is None else spikes.sum(0).permute(0, 3, 1, 2)
                found[labels[layer.name]] = counts.reshape(len(x), *layer.size).to(torch.int32)

            hooks.append(module.register_forward_hook(keep))
    plan(x, T=T)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_all_counts_are_equal_where_sums_are_exact(name: str) -> None:
    snn, x = exact(name)
    plan = lower(snn, without=["choose_convolution"])
    for T in (1, 7, 40):
        want, got = counts_of(snn, x, T), counts_of_plan(plan, x, T)
        assert got, plan.explain()
        for label, counts in got.items():
            assert torch.equal(counts, want[label]), f"{label} at T={T}"
        with torch.no_grad():
            assert torch.equal(plan(x, T=T), snn(x, T=T))
    assert sum(int(c.sum()) for c in want.values()) > 0


@pytest.mark.parametrize("name", NETWORKS)
def test_every_neuron_runs_in_a_layer(name: str) -> None:
    snn, x = exact(name)
    found = lower(snn, without=["choose_convolution"]).explain(x)
    left = [row.name for row in found.layers if "as it was" in row.runs]
    # A padded, overlapping max-pool has no kernel; its neurons run as before.
    assert len(left) == (1 if name == "everything" else 0), found


@pytest.mark.parametrize("off", ALL_PASSES)
@pytest.mark.parametrize("name", ["vgg average", "vgg maximum", "residual", "everything"])
def test_each_pass_can_be_left_out(name: str, off: str) -> None:
    snn, x = exact(name)
    plan = lower(snn, without=[off])
    with torch.no_grad():
        assert torch.equal(plan(x), snn(x))
    assert not plan.explain(x).passes[off]


@pytest.mark.parametrize("family", [DenseNet, MobileNetV2, ResNeXt, SENet, Mixer, UNet])
def test_any_network_is_lowered_as_far_as_it_goes(family: Any) -> None:
    torch.manual_seed(0)
    ann = randomize(family(nn.ReLU))
    x = images(4)
    means = {"on_unsupported": "mean"} if family in (SENet,) else {}
    snn = converted(ann, x, **means)
    plan = lower(snn)
    with torch.no_grad():
        want = snn(x)
    got = plan(x)
    assert got.shape == want.shape
    # Other orders of sums flip spikes at ties; most answers are the same.
    assert float((got - want).norm() / want.norm()) < 0.05


@pytest.mark.parametrize("method", ["opi", "qcfs", "threshold_relu", "light", "ltb", "max"])
@pytest.mark.parametrize("normalize", ["threshold", "weights"])
def test_methods_with_plain_neurons(method: str, normalize: str) -> None:
    torch.manual_seed(0)
    ann: nn.Module = randomize(vgg() if normalize == "weights" else Block())
    if method in ("qcfs", "threshold_relu"):
        kind = {"qcfs": snnkernels.QCFS(8), "threshold_relu": snnkernels.ThresholdReLU(2.0)}[method]
        ann = nn.Sequential(
            nn.Conv2d(3, 8, 3), copy.deepcopy(kind), nn.Conv2d(8, 8, 3), copy.deepcopy(kind),
            nn.Flatten(), nn.Linear(128, 5),
        )  # fmt: skip
    x = images(6)
    snn = converted(ann, x, method=method, normalize=normalize)
    plan = lower(snn)
    with torch.no_grad():
        want, got = snn(x), plan(x)
    assert float((got - want).norm() / want.norm()) < 0.05


@pytest.mark.parametrize("v_init", ["zero", "half", "25%", "uniform", "mse", 0.3])
def test_any_start(v_init: Any) -> None:
    snn, x = exact("residual", v_init=v_init)
    with torch.no_grad():
        want = snn(x)
    if v_init in ("uniform", "mse"):  # starts of many bits: sums are rounded
        assert float((lower(snn)(x) - want).norm() / want.norm()) < 0.05
    else:
        assert torch.equal(lower(snn)(x), want)


@pytest.mark.parametrize("method", ["srp", "cos", "parallel", "signed", "st_bif", "ttfs"])
def test_other_methods_run_as_they_are_and_it_says_so(method: str) -> None:
    ann = nn.Sequential(
        nn.Conv2d(3, 8, 3), snnkernels.QCFS(4), nn.Flatten(), nn.Linear(288, 20),
        snnkernels.QCFS(4), nn.Linear(20, 5),
    ).eval()  # fmt: skip
    x = images(4)
    snn = converted(ann, x, method=method)
    plan = lower(snn)
    with torch.no_grad():
        assert torch.equal(plan(x), snn(x))
        got, want = plan.predict_curve(x, [2, 4]), snn.predict_curve(x, [2, 4])
    assert all(torch.equal(got[T], want[T]) for T in want)
    text = str(plan.explain(x))
    assert "not lowered" in text or "options" in text or "of its own" in text


def test_a_flip_lies_where_the_order_of_a_sum_decides() -> None:
    """Every layer is fed the converted network's own spikes; flips are proven one by one."""
    torch.manual_seed(1)
    ann = randomize(Block())
    x = images(8)
    T = 24
    snn = converted(ann, x)
    plan = lower(snn, without=["choose_convolution"])
    inputs: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda m, a, out, label=label: inputs.update({label: out}))
        for label, layer in snn.neurons()
    ]
    snn_layers = dict(snn.neurons())
    counted = [layer for layer in snn_layers.values() if layer.counts]
    for layer in counted:
        layer.counts = False  # to see its spikes
    snn.reset()
    with torch.no_grad():
        snn.body(*[snn.prefix(x)[i] for i in snn._of_body], T)
    for hook in hooks:
        hook.remove()
    plan(x, T=T)
    (built,) = plan._built.values()
    built.run.T, built.run.ends = T, (T,)
    seen = flips = 0
    for node in built.net:
        if node.op != "layer" or not node.terms:
            continue
        label = node.neurons.module.label
        node.spikes = True
        layer = SpikingLayer(built.net, node, built.run, False, False)
        maps, total, size = [], 0.0, 0.0
        for term in node.terms:
            source = built.net.origin_of(term.source)
            spikes = inputs[source.neurons.module.label].unflatten(0, (T, -1))
            maps.append(SpikeMap.of(spikes if spikes.dim() == 5 else spikes[..., None, None]))
            ones = (spikes != 0).double().flatten(0, 1)
            geometry = (term.stride, term.padding, term.dilation, term.groups)
            total = total + F.conv2d(ones, term.weight, None, *geometry)
            size = size + F.conv2d(ones, term.weight.abs(), None, *geometry)
        if node.bias is not None:
            total = total + node.bias.view(1, -1, 1, 1)
            size = size + node.bias.abs().view(1, -1, 1, 1)
        got = layer(*maps)[0].dense()
        want = inputs[label].unflatten(0, (T, -1)).reshape(got.shape) != 0
        theta = node.neurons.threshold.double().view(-1, 1, 1)
        v = node.neurons.v_init.double().view(-1, 1, 1).expand(got.shape[1:])
        total, size = (t.unflatten(0, (T, -1)) for t in (total, size))
        spread = torch.zeros_like(v)
        alive = torch.ones_like(v, dtype=torch.bool)
        terms = sum(t.weight[0].numel() for t in node.terms) + 2
        for t in range(T):
            v = v + total[t]
            # Each sum of n terms is off by at most n roundings of its size, membranes add one.
            spread = spread + 2 * terms * 2**-24 * size[t] + 4 * 2**-24 * (v.abs() + theta)
            flipped = alive & (got[t].bool() != want[t])
            assert bool(((v - theta).abs() <= spread)[flipped].all()), label
            flips += int(flipped.sum())
            seen += int(alive.sum())
            alive = alive & ~flipped  # behind its first flip a neuron is on another path
            v = torch.where(want[t], v - theta, v)
    assert seen > 100_000
    assert flips < seen / 1000


def real(x: Tensor | None = None, **given: Any) -> tuple[Any, Tensor]:
    torch.manual_seed(2)
    x = images(9) if x is None else x
    return converted(randomize(Block()), x, **given), x


def test_an_image_does_not_depend_on_its_batch_threads_or_pieces(threads: None) -> None:
    snn, x = real()

    def same(got: Tensor, want: Tensor) -> None:
        # Counts are equal; a library's matrix product at the end may see another batch.
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)

    whole = lower(snn)(x)
    for i in range(0, 9, 4):
        same(lower(snn)(x[i : i + 4]), whole[i : i + 4])
    pieces = lower(snn, max_memory=1)
    same(pieces(x), whole)
    assert pieces.peak_memory(9) == pieces.peak_memory(1)
    for n in (1, 3):
        torch.set_num_threads(n)
        same(lower(snn)(x), whole)


def test_curves_are_the_separate_answers() -> None:
    snn, x = real()
    plan = lower(snn)
    steps = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 33]
    curve = plan.predict_curve(x, steps)
    assert list(curve) == steps
    for T in steps:
        assert torch.equal(curve[T], plan(x, T=T))


def test_weights_are_read_again_when_they_change() -> None:
    snn, x = real()
    plan = lower(snn)
    first = plan(x)
    with torch.no_grad():
        next(snn.body.parameters()).mul_(0.5)
    changed = plan(x)
    assert not torch.equal(first, changed)
    assert torch.equal(changed, lower(snn)(x))
    assert torch.equal(plan(x), changed)


def test_copies_and_pickles() -> None:
    snn, x = real()
    plan = lower(snn, precision="int16", without=["fold_affine"])
    want = plan(x)
    for other in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert torch.equal(other(x), want)
        assert other.precision == "int16"
    assert plan.state_dict().keys() == {f"snn.{key}" for key in snn.state_dict()}


def test_16_bits_are_close() -> None:
    snn, x = real()
    with torch.no_grad():
        want = snn(x, T=32)
    got = lower(snn, precision="int16")(x, T=32)
    assert 0 < float((got - want).norm() / want.norm()) < 0.05


def test_inputs_of_other_shapes_and_no_gradient() -> None:
    snn, x = real()
    plan = lower(snn)
    larger = images(2, size=12)
    with torch.no_grad():
        assert torch.equal(snn.prefix(larger)[0], snn.prefix(larger)[0])
    assert plan(larger).shape == (2, 5)
    assert plan(x).shape == (9, 5)
    assert not plan(x).requires_grad
    assert plan(x[:0]).shape == (0, 5)


def test_several_inputs_and_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
            self.c = nn.Conv2d(8, 8, 3)
            self.fc = nn.Linear(8, 3)

        def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
            h = F.relu(F.relu(self.a(left)) + self.b(right))
            deep = F.relu(self.c(h))
            return {"map": deep, "logits": self.fc(deep.mean((2, 3)))}

    torch.manual_seed(0)
    pairs = (images(4), images(4, seed=1))
    snn = snnkernels.convert(Two(), [pairs], inputs=lambda item: item, T=8, progress=False)
    plan = lower(snn, max_memory=1)
    with torch.no_grad():
        want = snn(*pairs)
    got = plan(left=pairs[0], right=pairs[1])
    assert got.keys() == want.keys()
    for key in want:
        assert float((got[key] - want[key]).norm() / want[key].norm()) < 0.05
    assert "packed spikes" in str(plan.explain(*pairs))


def test_inside_what_is_compiled_a_plan_runs_as_it_is() -> None:
    snn, x = exact("small cnn")
    plan = lower(snn)
    want = plan(x)
    assert torch.equal(torch.compile(plan, backend="eager")(x), want)
    around = torch.compile(lambda x: plan(x * 1.0) + 1, backend="eager")
    assert torch.equal(around(x), want + 1)


# torch warns of a copy that an even kernel takes.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    ("kernel", "padding", "lowered"),
    [(3, "same", True), ((5, 3), "same", True), (3, "valid", True), (4, "same", False)],
)
def test_padding_in_words(kernel: Any, padding: str, lowered: bool) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 20, 3), nn.ReLU(), nn.Conv2d(20, 30, kernel, padding=padding), nn.ReLU()]
    ann = make_dyadic(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())).eval()
    x = dyadic(2, 3, 9, 9)
    snn = converted(ann, x, threshold=4.0)
    plan = lower(snn, without=["choose_convolution"])
    with torch.no_grad():
        same_answer(snn, plan, x)
    (built,) = plan._built.values()
    assert sum(node.op == "layer" for node in built.net) == 1 + lowered


def test_bad_arguments() -> None:
    snn, x = real()
    with pytest.raises(TypeError, match="snn must be a converted network"):
        lower(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="precision='int4'"):
        lower(snn, precision="int4")
    with pytest.raises(ValueError, match=r"without=.*no such pass; there are constant_prefix"):
        lower(snn, without=["nothing"])
    for bad in (0, -1, "3 apples", "MiB", 1.5):
        with pytest.raises(ValueError, match="max_memory="):
            lower(snn, max_memory=bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs inputs"):
        lower(snn).explain()
    with pytest.raises(ValueError, match="T must be"):
        lower(snn)(x, T=0)
    with pytest.raises(ValueError, match="steps is empty"):
        lower(snn).predict_curve(x, [])
    assert lower(snn, max_memory="1.5MiB").max_memory == 3 * 2**19


def test_the_plan_says_what_it_did() -> None:
    snn, x = real()
    plan = lower(snn, without=["choose_convolution"])
    found = plan.explain(x)
    assert found.passes["merge_residuals"]
    assert found.passes["constant_prefix"]
    assert found.passes["count_at_end"]
    assert found.arena < found.apart
    rows = {row.name: row for row in found.layers}
    assert len(rows) == 5
    assert all(row.bytes_after < row.bytes_before for row in found.layers)
    deep = next(row for row in found.layers if row.macs)
    assert 0 < deep.additions < deep.macs
    for name in ALL_PASSES:
        assert name in str(found)
    assert "float32" in repr(plan)


def test_memory_of_layers_alive_together_does_not_overlap() -> None:
    snn, x = real()
    plan = lower(snn, without=["choose_convolution"])
    plan(x)
    (built,) = plan._built.values()
    from snnkernels.engine.buffers import _lives, plan_buffers

    found = plan_buffers(built.body.graph, 8)
    lives = {name: (layer, start, end) for name, layer, start, end in _lives(built.body.graph)}
    assert len(lives) == 4
    size = {
        name: layer.size[1] * layer.size[2] * 8 * layer.panels
        for name, (layer, _, _) in lives.items()
    }
    for a in lives:
        for b in lives:
            if a < b and lives[a][1] <= lives[b][2] and lives[b][1] <= lives[a][2]:
                low, high = sorted((a, b), key=lambda n: found.offsets[n])
                assert found.offsets[low] + size[low] <= found.offsets[high]
    assert found.words < found.apart == sum(size.values())


# ---- passes alone -------------------------------------------------------------------------------


def neurons(amplitude: float | Tensor = 2.0) -> Any:
    from snnkernels.engine.network import Neurons

    layer = SpikingActivation(snnkernels.IFNode(2.0), "n", constant=False, counts=False)
    return Neurons(
        layer, torch.tensor(2.0), torch.tensor(1.0), torch.as_tensor(amplitude), None, False
    )


def network(*nodes: Node) -> Network:
    return Network(list(nodes), [nodes[-1].name], {})


def spiking(name: str, size: tuple[int, ...] = (4, 6, 6), **given: Any) -> Node:
    return Node(name, "layer", [], size, neurons=neurons(**given))


def a_map(name: str, source: str, weight: Tensor, size: tuple[int, ...] = (4, 6, 6)) -> Node:
    return Node(name, "linear", [], size, terms=[Term(source, weight.double())])


def test_fold_affine_alone() -> None:
    scale, shift = torch.arange(1.0, 5.0).double(), torch.ones(4).double()
    weight = torch.randn(4, 4, 3, 3)
    net = network(
        spiking("s"), a_map("c", "s", weight),
        Node("bn", "affine", ["c"], (4, 6, 6), scale=scale, shift=shift),
        Node("out", "neurons", ["bn"], (4, 6, 6), neurons=neurons()),
    )  # fmt: skip
    assert PASSES["fold_affine"](net) == ["bn: folded into c"]
    assert "c" not in net.nodes
    assert torch.equal(net["bn"].terms[0].weight, weight.double() * scale.view(-1, 1, 1, 1))
    assert torch.equal(net["bn"].bias, shift)
    assert PASSES["fold_affine"](net) == []


def test_merge_scalers_alone() -> None:
    half, twice = torch.full((4,), 0.5).double(), torch.full((4,), 2.0).double()
    zero = torch.zeros(4).double()
    net = network(
        Node("x", "static", [], (4, 6, 6)),
        Node("before", "affine", ["x"], (4, 6, 6), scale=half, shift=zero),
        Node("n", "neurons", ["before"], (4, 6, 6), neurons=neurons(1.0)),
        Node("behind", "affine", ["n"], (4, 6, 6), scale=twice, shift=zero),
        a_map("out", "behind", torch.ones(4, 4, 1, 1)),
    )
    done = PASSES["merge_scalers"](net)
    assert len(done) == 2
    assert list(net.nodes) == ["x", "n", "out"]
    found = net["n"].neurons
    assert found is not None
    # m = v + x / 2 >= 2 is 2 v + x >= 4, and a spike of 1 weighs 2 behind the scale.
    assert torch.equal(found.threshold.expand(4), torch.full((4,), 4.0))
    assert torch.equal(found.v_init.expand(4), torch.full((4,), 2.0))
    assert torch.equal(found.amplitude.expand(4), torch.full((4,), 2.0))
    assert net["out"].terms[0].source == "n"


def test_scalers_around_neurons_are_one_layer() -> None:
    """As other converters leave networks: scale, neurons of threshold 1, scale."""

    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(128, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.a(x) * 0.25) * 4.0
            x = F.relu(self.b(x) * 0.5) * 2.0
            return self.c(x.flatten(1))

    torch.manual_seed(0)
    ann = make_dyadic(Foreign()).eval()
    x = dyadic(2, 3, 8, 8, seed=1)
    snn = converted(ann, x, threshold=1.0)
    plan = lower(snn, without=["choose_convolution"])
    with torch.no_grad():
        assert torch.equal(plan(x), snn(x))
    found = plan.explain(x)
    assert len(found.passes["merge_scalers"]) == 2  # what is constant in time is scaled before
    assert not any("as it was" in row.runs for row in found.layers)


def test_merge_residuals_alone() -> None:
    net = network(
        spiking("s"), spiking("r"), Node("x", "static", [], (4, 6, 6)),
        a_map("c", "s", torch.randn(4, 4, 1, 1)),
        Node("sum", "add", ["c", "r"], (4, 6, 6)),
        Node("more", "add", ["sum", "x"], (4, 6, 6)),
        Node("out", "neurons", ["more"], (4, 6, 6), neurons=neurons()),
    )  # fmt: skip
    PASSES["merge_residuals"](net)
    assert [t.source for t in net["more"].terms] == ["s", "r"]
    assert net["more"].terms[1].in_place
    assert net["more"].statics == ["x"]
    assert "sum" not in net.nodes
    assert "c" not in net.nodes


def test_split_concats_alone() -> None:
    weight = torch.randn(4, 7, 3, 3).double()
    net = network(
        spiking("a", (3, 6, 6)), spiking("b", (4, 6, 6)), Node("ab", "cat", ["a", "b"], (7, 6, 6)),
        a_map("out", "ab", weight),
    )  # fmt: skip
    assert len(PASSES["split_concats"](net)) == 1
    terms = net["out"].terms
    assert [t.source for t in terms] == ["a", "b"]
    assert torch.equal(torch.cat([t.weight for t in terms], 1), weight)


def test_merge_pools_alone() -> None:
    net = network(
        spiking("s"), Node("p", "avg_pool", ["s"], (4, 3, 3), window=((2, 2), (2, 2))),
        a_map("c", "p", torch.ones(4, 4, 1, 1), (4, 3, 3)),
        Node("m", "max_pool", ["c"], (4, 1, 1), window=((3, 3), (3, 3))),
        Node("out", "neurons", ["m"], (4, 1, 1), neurons=neurons()),
    )  # fmt: skip
    assert len(PASSES["merge_pools"](net)) == 2
    term = net["m"].terms[0]
    assert (term.source, term.pool, net["m"].side) == ("s", (2, 2), 3)
    assert torch.equal(term.weight, torch.full((4, 4, 1, 1), 0.25).double())


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_fold_amplitudes_alone(groups: int) -> None:
    amplitude = torch.tensor([1.0, 2.0, 4.0, 8.0])
    weight = torch.randn(4, 4 // groups, 3, 3).double()
    node = Node("out", "linear", [], (4, 6, 6), terms=[Term("s", weight, groups=groups)])
    net = network(spiking("s", amplitude=amplitude), node)
    assert len(PASSES["fold_amplitudes"](net)) == 1
    assert PASSES["fold_amplitudes"](net) == []
    x = torch.randint(0, 2, (1, 4, 6, 6)).double()
    want = F.conv2d(x * amplitude.view(-1, 1, 1), weight, groups=groups)
    assert torch.equal(F.conv2d(x, net["out"].terms[0].weight, groups=groups), want)
    assert net["out"].terms[0].binary


def test_fuse_neurons_says_why_not() -> None:
    net = network(
        spiking("s"), Node("odd", "torch", ["s"], (4, 6, 6)),
        Node("out", "neurons", ["odd"], (4, 6, 6), neurons=neurons()),
    )  # fmt: skip
    assert PASSES["fuse_neurons"](net) == []
    assert "odd" in net["out"].why
    net = network(
        spiking("s"), a_map("c", "s", torch.ones(4, 4, 1, 1)),
        Node("out", "neurons", ["c"], (4, 6, 6), neurons=neurons()),
    )  # fmt: skip
    assert PASSES["fuse_neurons"](net) == []  # spikes weigh 2
    PASSES["fold_amplitudes"](net)
    assert PASSES["fuse_neurons"](net) == ["out: with c"]
    assert net["out"].op == "layer"


def test_choose_convolution_takes_the_cheaper() -> None:
    from snnkernels.engine.cost import cost_of

    def layer(rate: float) -> tuple[Network, Node]:
        source = spiking("s", (64, 16, 16))
        node = Node("n", "layer", [], (64, 16, 16), neurons=neurons())
        node.terms = [Term("s", torch.randn(64, 64, 3, 3).double(), padding=(1, 1), binary=True)]
        net = network(source, node)
        net.rates = {"n": rate}
        return net, node

    net, node = layer(0.05)
    assert cost_of(net, node).packed < cost_of(net, node).dense
    assert ALL_PASSES["choose_convolution"](net) == []  # type: ignore[misc]
    net, node = layer(40.0)  # no network has so many; the model must turn over somewhere
    assert len(ALL_PASSES["choose_convolution"](net)) == 1  # type: ignore[misc]
    assert node.op == "dense"


def test_dense_layers_are_used_where_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    from snnkernels.engine import cost

    monkeypatch.setattr(cost, "DENSE", 1e15)
    monkeypatch.setattr(cost, "BYTES", 1e15)
    monkeypatch.setattr(cost, "CONVERT", 1e15)
    snn, x = exact("residual")
    plan = lower(snn)
    with torch.no_grad():
        assert torch.equal(plan(x), snn(x))
        curve, want = plan.predict_curve(x, [1, 5]), snn.predict_curve(x, [1, 5])
    assert all(torch.equal(curve[T], want[T]) for T in want)
    assert any("faster" in row.runs for row in plan.explain(x).layers)
    (built,) = plan._built.values()
    assert any(isinstance(m, Dense) for m in built.body.modules())


# ---- what a second reader broke -----------------------------------------------------------------


class Do(nn.Module):
    """Layers by name and what to do with them."""

    def __init__(self, what: Any, **layers: nn.Module) -> None:
        super().__init__()
        self.what = what
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.what(self, x)


def small(inner: int, out: int, **given: Any) -> nn.Module:
    return nn.Conv2d(inner, out, 3, padding=1, **given)


def plain() -> nn.Module:
    return Do(
        lambda s, x: s.fc(F.relu(s.b(F.relu(s.a(x)))).flatten(1)),
        a=small(3, 8), b=small(8, 8), fc=nn.Linear(512, 5),
    )  # fmt: skip


def of(ann: nn.Module, **given: Any) -> tuple[Any, Tensor]:
    torch.manual_seed(3)
    x = dyadic(3, 3, 8, 8, seed=5)
    return converted(make_dyadic(ann).eval(), x, **{"threshold": 4.0, **given}), x


def same_answer(snn: Any, plan: Any, x: Tensor) -> None:
    with torch.no_grad():
        assert torch.equal(plan(x), snn(x))


ODD: dict[str, Any] = {
    # The scale behind neurons that no layer runs is read by a layer that runs as it was.
    "scaler behind neurons as they were": lambda: Do(
        lambda s, x: s.fc(
            F.relu(s.c(F.relu(F.interpolate(s.b(F.relu(s.a(x))), scale_factor=2) * 0.5) * 2.0))
            .flatten(1)
        ),
        a=small(3, 8), b=small(8, 8), c=small(8, 2, padding_mode="circular"),
        fc=nn.Linear(512, 5),
    ),
    "view of spikes": lambda: Do(
        lambda s, x: s.fc(F.relu(s.c(s.bn(F.relu(s.b(F.relu(s.a(x)))).view(x.size(0), -1))))),
        a=small(3, 8), b=small(8, 8), bn=nn.BatchNorm1d(512), c=nn.Linear(512, 9),
        fc=nn.Linear(9, 5),
    ),
    "cat by name": lambda: Do(
        lambda s, x: s.fc(
            F.relu(s.c(torch.cat(tensors=[F.relu(s.a(x)), F.relu(s.b(x))], dim=1))).flatten(1)
        ),
        a=small(3, 8), b=small(3, 8), c=small(16, 2), fc=nn.Linear(128, 5),
    ),
    "cat along an axis": lambda: Do(
        lambda s, x: s.fc(
            F.relu(s.c(torch.cat([F.relu(s.a(x)), F.relu(s.b(x))], axis=1))).flatten(1)
        ),
        a=small(3, 8), b=small(3, 8), c=small(16, 2), fc=nn.Linear(128, 5),
    ),
    "pool of stride None": lambda: Do(
        lambda s, x: s.fc(F.relu(s.b(F.avg_pool2d(F.relu(s.a(x)), 2, None))).flatten(1)),
        a=small(3, 8), b=small(8, 2), fc=nn.Linear(32, 5),
    ),
    "pool of one number in a tuple": lambda: Do(
        lambda s, x: s.fc(F.relu(s.b(s.p(F.avg_pool2d(F.relu(s.a(x)), (2,))))).flatten(1)),
        a=small(3, 8), b=small(8, 2), p=nn.AvgPool2d((2,)), fc=nn.Linear(8, 5),
    ),
    "more inputs than a list can name": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(192, 20_000), nn.ReLU(), nn.Linear(20_000, 7), nn.ReLU(),
        nn.Linear(7, 5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_networks(name: str) -> None:
    given = {"on_unsupported": "keep"} if "scaler" in name else {}
    wide = {"threshold": 64.0} if "more inputs" in name else {}
    snn, x = of(ODD[name](), **given, **wide)
    plan = lower(snn, without=["choose_convolution"])
    with torch.no_grad():
        for T in (1, 8, 33):
            assert torch.equal(plan(x, T=T), snn(x, T=T))


def between(function: Any, **modules: nn.Module) -> nn.Module:
    """A function of spikes ``[B, 4, 8, 8]`` between two layers of neurons."""

    def forward(s: Any, x: Tensor) -> Tensor:
        h = F.relu(function(s, F.relu(s.a(x))) + 0.25)
        return h.flatten(1).sum(1, keepdim=True) * torch.tensor([1.0, -1.0])

    return Do(forward, a=small(3, 4), **modules)


# Functions, whether the neurons behind them run in a layer of the plan, and options of convert.
BETWEEN: dict[str, tuple[Any, bool, dict[str, Any]]] = {
    "add a number": (lambda s, h: torch.add(h, 2), True, {}),
    "add to a number": (lambda s, h: 0.5 + h, False, {}),
    "add in place": (lambda s, h: h.clone().add_(0.5), True, {}),
    "add twice": (lambda s, h: torch.add(h, h, alpha=2), False, {}),
    "add to itself": (lambda s, h: h + h, True, {}),
    "add a constant": (lambda s, h: h + s.a.bias[:, None, None], False, {}),
    "add a mean": (lambda s, h: h.mean((2, 3), keepdim=True) + h, False, {}),
    "subtract a number": (lambda s, h: h - 0.5, True, {}),
    "subtract from a number": (lambda s, h: 1 - h, False, {}),
    "subtract": (lambda s, h: h - h * 0.5, False, {}),
    "multiply": (lambda s, h: 2 * torch.mul(h, -0.5) + h * 2, True, {}),
    "divide": (lambda s, h: torch.div(h / 4, 2), True, {}),
    "concatenate": (lambda s, h: torch.concatenate(tensors=[h, h], dim=-3), True, {}),
    "concatenate rows": (lambda s, h: torch.cat([h, h], 2), False, {}),
    "concatenate a list": (lambda s, h: torch.cat(h.split(2, 1), 1), False, {}),
    "view": (lambda s, h: h.view(h.shape[0], 16, 4, 4), False, {}),
    "the same view": (lambda s, h: h.mean((2, 3)).view(-1, 4), True, {}),
    "permuted": (lambda s, h: h.permute(0, 2, 3, 1), False, {}),
    "contiguous": (lambda s, h: h.contiguous(), True, {}),
    "average": (lambda s, h: F.avg_pool2d(input=h, kernel_size=(2, 4), stride=2), True, {}),
    "average of pads": (lambda s, h: F.avg_pool2d(h, 4, 4, 2), False, {}),
    "average of parts": (lambda s, h: F.avg_pool2d(h, 4, 3, ceil_mode=True), False, {}),
    "average by another number": (lambda s, h: F.avg_pool2d(h, 2, divisor_override=2), False, {}),
    "adaptive": (lambda s, h: F.adaptive_avg_pool2d(h, (4, None)), True, {}),
    "adaptive of several sizes": (lambda s, h: F.adaptive_avg_pool2d(h, 3) * 16.0, False, {}),
    "mean": (lambda s, h: torch.mean(h, dim=[-1, -2], keepdim=True), True, {}),
    "mean of channels": (lambda s, h: h.mean(1), False, {}),
    "mean of rows": (lambda s, h: h.mean(2), False, {}),
    "mean of another dtype": (
        lambda s, h: h.mean((2, 3), dtype=torch.float64).float(), False, {},
    ),
    "another dtype": (lambda s, h: (h.double() * 0.5).half().float(), False, {}),
    "maximum": (lambda s, h: F.max_pool2d(h, (2, 2), ceil_mode=True), True, {}),
    "norm": (lambda s, h: s.bn(h), True, {"fold": False}),
    "norm without weights": (lambda s, h: s.plain(h), True, {"fold": False}),
    "norm of rows": (lambda s, h: s.rows(h.mean(1)), False, {"fold": False}),
    "grouped": (lambda s, h: s.bn8(s.grouped(h)), True, {"fold": False}),
    "transposed": (lambda s, h: s.transposed(h), False, {}),
    "linear of rows": (lambda s, h: s.linear(h), False, {}),
    "reflected": (lambda s, h: s.reflected(h), False, {}),
    "shuffled": (lambda s, h: s.shuffle(h), False, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", BETWEEN)
def test_what_stands_between_neurons_is_read_as_it_is(name: str) -> None:
    function, lowered, given = BETWEEN[name]
    snn, x = of(
        between(
            function, bn=nn.BatchNorm2d(4), plain=nn.BatchNorm2d(4, affine=False),
            rows=nn.BatchNorm1d(8), grouped=nn.Conv2d(4, 8, 3, 2, groups=2),
            bn8=nn.BatchNorm2d(8), transposed=nn.ConvTranspose2d(4, 6, 2, 2),
            linear=nn.Linear(8, 4), reflected=small(4, 6, padding_mode="reflect"),
            shuffle=nn.PixelShuffle(2),
        ),
        T=4, **given,
    )  # fmt: skip
    plan = lower(snn, without=["choose_convolution"])
    same_answer(snn, plan, x)
    want, got = counts_of(snn, x, 4), counts_of_plan(plan, x, 4)
    assert len(got) == 1 + lowered
    for label, counts in got.items():
        assert torch.equal(counts.flatten(), want[label].flatten()), label
    assert int(list(want.values())[-1].sum()) > 0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"fire_level": 1.0}, "its neurons have options"),
        ({"max_spikes": 2}, "its neurons have options"),
        ({"mask": torch.ones(8, 8, 8, dtype=torch.bool)}, "its neurons have options"),
        ({"beta": 0.5}, "its neurons have options"),
        ({"v_reset": 0.0}, "hard reset or input_scale"),
        ({"input_scale": 0.5}, "hard reset or input_scale"),
        ({"amplitude": torch.full((8, 8, 8), 4.0)}, "of a different weight at every position"),
        ({"v_threshold": torch.full((8, 1, 1), 4.0)}, "neither one nor per channel nor of the"),
    ],
)
def test_neurons_with_options_run_as_they_are(given: dict[str, Any], words: str) -> None:
    snn, x = of(plain(), T=4)
    layer = list(snn.neurons())[1][1]
    for name, value in given.items():
        setattr(layer.node, name, value)
    plan = lower(snn, without=["choose_convolution"])
    same_answer(snn, plan, x)
    assert words in str(plan.explain(x))


def test_autocast_runs_the_network_itself() -> None:
    snn, x = of(plain())
    plan = lower(snn)
    want = plan(x)
    with torch.autocast("cpu", torch.bfloat16):
        same_answer(snn, plan, x)
        assert "autocast" in str(plan.explain(x))
    assert torch.equal(plan(x), want)


def test_inference_mode_and_then_none() -> None:
    from snnkernels.kernels.backends import use_backend

    snn, x = exact("residual")
    for backend in dict.fromkeys((snnkernels.get_backend(), "reference")):
        plan = lower(snn, without=["choose_convolution"])
        with use_backend(backend):
            with torch.inference_mode():
                want = plan(x)
            assert torch.equal(plan(x), want)


def test_another_default_dtype() -> None:
    from snnkernels.kernels.backends import use_backend

    snn, x = exact("residual")
    torch.set_default_dtype(torch.float64)
    try:
        with use_backend("reference"):
            plan = lower(snn, without=["choose_convolution"])
            assert plan(x).dtype == torch.float32
            same_answer(snn, plan, x)
    finally:
        torch.set_default_dtype(torch.float32)


def test_weights_that_lie_where_others_lay() -> None:
    snn, x = of(plain())
    plan = lower(snn, without=["choose_convolution"])
    layer = next(m for m in snn.body.modules() if isinstance(m, nn.Conv2d))
    for i in range(12):
        layer.weight = nn.Parameter(dyadic(8, 8, 3, 3, seed=i))
        layer.weight = nn.Parameter(dyadic(8, 8, 3, 3, seed=i + 50))
        same_answer(snn, plan, x)


def test_neurons_that_change() -> None:
    snn, x = of(plain())
    plan = lower(snn, without=["choose_convolution"])
    same_answer(snn, plan, x)
    for name, value in (
        ("v_init", 1.0), ("v_threshold", torch.tensor(2.0)), ("tie", ">"),
        ("mask", torch.arange(8).view(8, 1, 1) < 3),
    ):  # fmt: skip
        for _, layer in snn.neurons():
            setattr(layer.node, name, value)
        same_answer(snn, plan, x)


def test_hooks_are_called_as_the_network_calls_them() -> None:
    snn, x = of(plain())
    plan = lower(snn)
    want = plan(x)
    calls: list[str] = []
    layer = next(m for m in snn.body.modules() if isinstance(m, nn.Conv2d))
    watched = layer.register_forward_hook(lambda m, a, out: calls.append("body") or out * 2)
    same_answer(snn, plan, x)
    assert calls == ["body", "body"]
    assert "a hook of b" in str(plan.explain(x))
    watched.remove()
    assert torch.equal(plan(x), want)
    # Lowering looks at sizes and calls none.
    first = next(m for m in snn.prefix.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_hook(lambda m, a, out: calls.append("prefix"))
    calls.clear()
    lower(snn)(x)
    assert calls == ["prefix"]


def test_answers_of_any_kind_in_pieces() -> None:
    from dataclasses import dataclass

    @dataclass
    class Answer:
        logits: Tensor
        features: Any

    class Rich(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = small(3, 8), small(8, 8), nn.Linear(512, 5)

        def forward(self, x: Tensor) -> Answer:
            h = F.relu(self.b(F.relu(self.a(x)))).flatten(1)
            return Answer(self.fc(h), {"h": h, "more": [h * 2]})

    snn, x = of(Rich())
    with torch.no_grad():
        want = snn(x)
    got = lower(snn, max_memory=1)(x)
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.features["h"], want.features["h"])
    assert torch.equal(got.features["more"][0], want.features["more"][0])


def test_answers_without_a_row_per_image_are_not_cut() -> None:
    class Few(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.scale = plain(), nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y = self.net(x)
            return y, y.t(), self.scale * 2

    snn, x = of(Few())
    with torch.no_grad():
        want = snn(x)
    for a, b in zip(lower(snn, max_memory=1)(x), want, strict=True):
        assert torch.equal(a, b)


def test_the_last_call_is_explained_and_few_shapes_are_kept() -> None:
    from snnkernels.engine import plan as module

    snn, x = real()
    plan = lower(snn)
    plan(x)
    small_maps = plan.peak_memory(1)
    plan(images(1, size=16))
    assert plan.peak_memory(1) > small_maps
    plan(x)
    assert plan.peak_memory(1) == small_maps
    for size in range(8, 8 + 2 * module._SHAPES, 2):
        plan(images(1, size=size))
    assert len(plan._built) == module._SHAPES


def test_memory_counts_dense_maps() -> None:
    ann = Do(
        lambda s, x: s.fc(F.relu(F.max_pool2d(s.b(F.relu(s.a(x))), 4)).flatten(1)),
        a=small(3, 4), b=small(4, 32), fc=nn.Linear(128, 5),
    )  # fmt: skip
    snn, x = of(ann)
    plan = lower(snn, without=["merge_pools"])
    plan(x)
    assert plan.peak_memory(1) >= 2 * 4 * snn.T * 32 * 8 * 8


@pytest.mark.parametrize("bad", ["-5MiB", "0MiB", "infMiB", "nanMiB"])
def test_memory_that_is_none(bad: str) -> None:
    snn, _ = real()
    with pytest.raises(ValueError, match="max_memory="):
        lower(snn, max_memory=bad)
    with pytest.raises(TypeError, match="without=5 must be names"):
        lower(snn, without=5)  # type: ignore[arg-type]


def test_16_bits_of_sums_of_very_many_spikes() -> None:
    """A unit fit for a mean of whole maps would round every weight to nothing."""
    ann = Do(
        lambda s, x: s.fc(F.relu(s.c(F.relu(s.b(F.relu(s.a(x)))).mean((2, 3))))),
        a=small(3, 16), b=small(16, 64), c=nn.Linear(64, 32), fc=nn.Linear(32, 5),
    )  # fmt: skip
    torch.manual_seed(0)
    x = images(2, size=28)
    snn = converted(ann.eval(), x, T=32)
    with torch.no_grad():
        want = snn(x)
    got = lower(snn, precision="int16", without=["choose_convolution"])(x)
    assert float((got - want).norm() / want.norm()) < 0.02
