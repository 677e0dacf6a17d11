"""SNN Calibration: biases, initial potentials and weights corrected layer by layer."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from conversion_helpers import Concat, Everything, Shortcut, images
from support import optional
from torch import Tensor, nn

from snnkernels import ConversionError, convert
from snnkernels.conversion import ConvertedNetwork
from snnkernels.conversion.correction import Walk, potential_error
from snnkernels.conversion.methods import (
    COS,
    LTB,
    OPI,
    SRP,
    Advanced,
    Burst,
    Light,
    Method,
    Parallel,
)
from snnkernels.conversion.spiking import SpikingActivation
from snnkernels.conversion.weights import staircase


def one() -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        layers[0].weight.fill_(1.0)
        layers[2].weight.fill_(1.0)
    return layers.eval()


def deep(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(),
        nn.AvgPool2d(2), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 7), nn.ReLU(),
        nn.Linear(7, 4),
    ).eval()  # fmt: skip


def answers(snn: ConvertedNetwork, x: Tensor) -> dict[str, Tensor]:
    """What every spiking layer stands for in one run."""
    found: dict[str, Tensor] = {}

    def keep(module: SpikingActivation, args: Any, out: Tensor) -> None:
        found[module.label] = module.answer(out, snn.T, x.dtype)

    handles = [layer.register_forward_hook(keep) for _, layer in snn.neurons()]  # type: ignore
    with torch.no_grad():
        snn(x)
    for handle in handles:
        handle.remove()
    return found


WORKED = torch.tensor([[0.3], [0.55], [0.8]])


def test_bias_worked_example() -> None:
    """SNN Calibration, light pipeline: ANN .3, .55, .8 and SNN .25, .5, .75 at T = 4."""
    plain = convert(one(), WORKED, threshold=1.0, T=4)
    torch.testing.assert_close(
        answers(plain, WORKED)["1"].flatten(), torch.tensor([0.25, 0.5, 0.75])
    )
    snn = convert(one(), WORKED, method="light", threshold=1.0, T=4)
    node = dict(snn.neurons())["1"].node
    assert node.bias.item() == pytest.approx(0.05)
    assert node.v_init == "half"
    assert plain.report["1"].error is not None


def test_potential_worked_example() -> None:
    """SNN Calibration, potential correction: T times what is missing, 4 * 0.05 = 0.2."""
    ann, snn = torch.tensor([[0.3], [0.55], [0.8]]), torch.tensor([[0.25], [0.5], [0.75]])
    assert potential_error(snn, ann, 4).item() == pytest.approx(0.2)
    # In a network the bias goes first, and the potential is what is missing then: here the same.
    found = convert(one(), WORKED, method=Advanced(iterations=0), threshold=1.0, T=4)
    node = dict(found.neurons())["1"].node
    assert node.bias.item() == pytest.approx(0.05)
    assert node.v_init.item() == pytest.approx(0.7)


@pytest.mark.parametrize("normalize", ["threshold", "weights"])
def test_light_is_layer_by_layer(normalize: str) -> None:
    """Each correction is measured behind the corrected layers before it: an oracle in order."""
    ann, x = deep(), images(24)
    kw: dict[str, Any] = {"T": 4, "progress": False, "normalize": normalize, "v_init": "zero"}
    snn = convert(ann, x, method="light", **kw)
    plain = convert(ann, x, **kw)
    wanted = {str(i): ann[: i + 1](x).detach() for i in (1, 3, 6, 9)}
    for (name, layer), (_, done) in zip(plain.neurons(), snn.neurons(), strict=True):
        error = (wanted[name] - answers(plain, x)[name]).double()
        mean = error.mean([d for d in range(error.dim()) if d != 1])
        unit = plain.report[name].threshold.double() if normalize == "weights" else 1.0
        torch.testing.assert_close(done.node.bias.double(), mean / unit, rtol=1e-3, atol=1e-6)
        # Carry on from the corrected layer.
        node = layer.node
        del node.bias
        node.register_buffer("bias", done.node.bias.clone())
        node.channel_dim = 1


@pytest.mark.parametrize("v_init", ["zero", "half"])
@pytest.mark.parametrize("make", [deep, Everything, lambda: Shortcut(4), lambda: Concat(4)])
def test_light_lowers_the_mean_error_of_every_layer(make: Any, v_init: str) -> None:
    """Sums, concatenations, shared and folded layers: the neuron's own bias is there for all."""
    ann, x = make().eval(), images(48)
    plain = convert(ann, x, T=8, v_init=v_init, progress=False)
    light = convert(ann, x, T=8, v_init=v_init, method="light", progress=False)
    total = [0.0, 0.0]
    model = {}
    for i, snn in enumerate((plain, light)):
        for name, out in answers(snn, x).items():
            if name not in model:
                model[name] = ann_activation(ann, x, name)
            error = (out - model[name]).double()
            mean = (
                error.mean([d for d in range(error.dim()) if d != 1]) if error.dim() > 1 else error
            )
            total[i] += (mean / model[name].abs().mean()).square().sum().item()
    assert total[1] < total[0]


def ann_activation(ann: nn.Module, x: Tensor, name: str) -> Tensor:
    """The activation called ``name`` of the ANN, as the conversion traces it."""
    found: dict[str, Tensor] = {}

    class Spy(Light):
        def finish(self, snn: ConvertedNetwork, context: Any) -> None:
            for site in context.sites:
                layer = context.model.get_submodule(site.path)

                def hook(m: Any, a: Any, out: Tensor, label: str = site.label) -> None:
                    found.setdefault(label, out.detach())

                layer.register_forward_hook(hook)
            context.model(x)

    convert(ann, x, method=Spy(), progress=False)
    return found[name]


def test_calibration_leaves_the_ann_alone() -> None:
    ann, x = deep(), images(16)
    before = copy.deepcopy(ann.state_dict())
    convert(ann, x, method=Advanced(iterations=3, batch=8), T=4, progress=False)
    for key, value in ann.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(p.grad is None for p in ann.parameters())


@pytest.mark.parametrize(
    "base",
    [OPI(), SRP(probe=2), COS(probe=2), Parallel(), Burst(max_spikes=2), LTB(updates=4, delay=2)],
    ids=str,
)
@pytest.mark.parametrize("normalize", ["threshold", "weights"])
def test_on_top_of_other_methods(base: Method, normalize: str) -> None:
    ann, x = deep(), images(16)
    alone = convert(ann, x, method=base, T=6, normalize=normalize, progress=False)
    light = convert(ann, x, method=Light(base=base), T=6, normalize=normalize, progress=False)
    advanced = convert(
        ann, x, method=Advanced(base=base, iterations=2), T=6, normalize=normalize, progress=False
    )
    for snn in (light, advanced):
        assert snn.extra_steps == alone.extra_steps
        for (name, layer), (_, other) in zip(snn.neurons(), alone.neurons(), strict=True):
            assert torch.equal(snn.report[name].threshold, alone.report[name].threshold)
            assert (layer.node.probe, layer.node.tie) == (other.node.probe, other.node.tie)
            assert layer.node.max_spikes == other.node.max_spikes
            assert other.node.bias is None
            assert layer.node.bias.shape == (layer.node.bias.numel(),)
    with torch.no_grad():
        assert torch.isfinite(advanced(x)).all()
    assert f"method light(base={base})" in str(light.report) or base == OPI()


def test_the_base_may_be_a_name() -> None:
    assert Light(base="srp") == Light(base=SRP())
    assert str(Light()) == "light"
    assert str(Light(base="srp", images=8)) == "light(base=srp, images=8)"
    assert str(Advanced(base=SRP(probe=2))) == "advanced(base=srp(probe=2))"
    assert Light(base="max").v_init == 0.0
    assert Light(base="burst").binary is False
    assert Light(base=LTB(updates=7)).threshold == LTB(updates=7).threshold


def test_every_hook_of_a_method_is_the_bases() -> None:
    hooks = {n for n, v in vars(Method).items() if callable(v) and not n.startswith("__")}
    assert hooks - set(vars(Light.__mro__[1])) == {"finish"}
    assert "finish" in vars(Light)
    assert "finish" in vars(Advanced)


def test_potentials_are_of_every_position() -> None:
    ann, x = deep(), images(16)
    snn = convert(ann, x, method=Advanced(iterations=0), T=4, progress=False)
    shapes = {name: tuple(layer.node.v_init.shape) for name, layer in snn.neurons()}
    assert shapes == {"1": (6, 8, 8), "3": (6, 8, 8), "6": (8, 2, 2), "9": (7,)}
    assert "initial potentials of every position" in str(snn.report)
    plain = convert(ann, x, method=Advanced(iterations=0, potentials=False), T=4, progress=False)
    assert {layer.node.v_init for _, layer in plain.neurons()} == {"half"}


def test_weights_follow_the_floor() -> None:
    """The staircase is floor's, its gradient that of a clipped line."""
    z = torch.tensor([-0.5, 0.1, 0.3, 0.9, 2.0], requires_grad=True)
    theta = torch.tensor(1.0)
    y = staircase(z, theta, torch.tensor(0.5), 4, 4, theta)
    assert y.tolist() == [0.0, 0.0, 0.25, 1.0, 1.0]
    y.sum().backward()
    assert z.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


def test_weights_that_do_not_help_stay() -> None:
    """A rate that destroys every layer: the old weights are back, and the report says so."""
    ann, x = deep(), images(16)
    light = convert(ann, x, method=Light(), T=4, progress=False)
    method = Advanced(iterations=2, lr=1e3, potentials=False)
    snn = convert(ann, x, method=method, T=4, progress=False)
    assert "weights before 1, 3, 6, 9 stayed" in str(snn.report)
    torch.testing.assert_close(snn(x), light(x))


def test_weights_lower_the_error() -> None:
    ann, x = deep(), images(64)
    plain = convert(ann, x, T=2, progress=False)
    method = Advanced(iterations=50, potentials=False)
    snn = convert(ann, x, method=method, T=2, progress=False)
    layers = [name for name, _ in snn.neurons()]
    assert sum(snn.report[n].error for n in layers) < sum(plain.report[n].error for n in layers)
    assert not torch.equal(snn.body.get_submodule("2").weight, ann[2].weight)


def test_a_walk_is_a_run() -> None:
    """Layer by layer the same spikes as in one run, max-pools and probes included."""
    ann, x = Everything(), images(8)
    for method in (OPI(), SRP(probe=3), COS(probe=2), Parallel()):
        snn = convert(ann, x, method=method, T=5, progress=False)
        whole = answers(snn, x)
        for stop in Walk(snn, x, 5):
            torch.testing.assert_close(stop.answer(x), whole[stop.layer.label])


class Gated(nn.Module):
    """A gate that two layers read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.gate = nn.Linear(6, 8), nn.Linear(8, 8)
        self.b, self.c, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        g = h * torch.sigmoid(self.gate(h))
        return self.out(torch.relu(self.b(g)) + torch.relu(self.c(g)))


def test_a_walk_over_running_means_is_a_run() -> None:
    """What an operation on running means has seen at one layer is not there at the next."""
    ann, x = Gated(), torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    for method in (OPI(), SRP(probe=3), COS(probe=2), Parallel()):
        snn = convert(ann, x, method=method, T=5, on_unsupported="mean", progress=False)
        whole = answers(snn, x)
        currents: dict[str, Tensor] = {}

        def keep(module: SpikingActivation, args: Any, into: dict[str, Tensor] = currents) -> None:
            into.setdefault(module.label, args[0])

        for _, layer in snn.neurons():
            layer.register_forward_pre_hook(keep)
        with torch.no_grad():
            snn(x)
        for stop in Walk(snn, x, 5):
            torch.testing.assert_close(stop.answer(x), whole[stop.layer.label])
            spikes = stop.output()
            stop.forget()
            assert torch.equal(stop.output(), spikes)
            torch.testing.assert_close(stop._current, currents[stop.layer.label])


def test_calibrated_networks_copy_and_pickle() -> None:
    ann, x = deep(), images(8)
    snn = convert(ann, x, method=Advanced(iterations=1), T=4, progress=False)
    with torch.no_grad():
        out = snn(x)
        assert torch.equal(copy.deepcopy(snn)(x), out)
        assert torch.equal(pickle.loads(pickle.dumps(snn))(x), out)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_weights_are_tuned_whatever_the_gradient_mode(mode: Any) -> None:
    ann, x = deep(), images(32)
    method = Advanced(iterations=5)
    want = convert(ann, x, method=method, T=4, progress=False)
    with mode():
        got = convert(ann, x, method=method, T=4, progress=False)
        assert torch.equal(got(x), want(x))


def test_one_pass_loaders_and_few_images() -> None:
    ann, x = deep(), images(12)
    snn = convert(ann, iter([x]), method="light", T=4, progress=False)
    assert "the loader gave 12 of the 128 images" in str(snn.report)
    snn = convert(ann, [x[:4], x[4:]], method=Light(images=6), T=4, progress=False)
    assert "on 6 images" in str(snn.report)


def test_progress_bar_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    optional("tqdm")
    ann, x = deep(), images(8)
    convert(ann, x, method=Advanced(iterations=1), T=2, progress=False)
    assert capsys.readouterr().err == ""
    convert(ann, x, method=Advanced(iterations=1), T=2)
    assert "advanced calibration" in capsys.readouterr().err


class _Own(SpikingActivation):
    def forward(self, x: Tensor, T: int) -> Tensor:
        return super().forward(x, T)


class _OwnLayer(OPI):
    name = "own"

    def layer(self, site: Any) -> type[SpikingActivation]:
        return _Own


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Light(base="lihgt"), ValueError, "base='lihgt' is not known"),
        (lambda: Light(base=Light()), ValueError, "base=light is a calibration itself"),
        (lambda: Light(images=0), ValueError, "images=0 must be at least 1"),
        (lambda: Advanced(iterations=-1), ValueError, "iterations=-1 must be at least 0"),
        (lambda: Advanced(lr=0.0), ValueError, r"lr=0\.0 must be positive"),
        (lambda: Advanced(batch=0), ValueError, "batch=0 must be at least 1"),
        (
            lambda: convert(deep(), method="light", threshold=1.0),
            ValueError,
            "loader is None, but method='light' compares",
        ),
        (
            lambda: convert(deep(), images(4), method=Light(base=_OwnLayer()), progress=False),
            ConversionError,
            "method='light' corrects the bias .* base=own .*_Own",
        ),
    ],
    ids=str,
)
def test_bad_arguments(make: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()
