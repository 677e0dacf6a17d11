"""NIR: there and back with the same spikes; what others write; what is refused."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nir_roundtrip
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conversion_helpers import dyadic, images, make_dyadic, randomize
from support import optional
from torch import Tensor, nn

import snnkernels
from snnkernels.conversion.errors import ConversionError
from snnkernels.interop.nir_export import WARNING

nir = optional("nir")
T = 8


def to_nir(*args: Any, **kwargs: Any) -> Any:
    with pytest.warns(UserWarning, match="NIR's IF resets to a value"):
        return snnkernels.to_nir(*args, **kwargs)


def network() -> nn.Module:
    torch.manual_seed(0)
    return randomize(
        nn.Sequential(
            *(nn.Conv2d(3, 6, 3, padding=1, groups=3), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.AvgPool2d(2), nn.Conv2d(6, 4, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 8), nn.ReLU()),
            nn.Linear(8, 5),
        )
    )


class Residual(nn.Module):
    """A shortcut between neurons and one around a convolution, a mean for a pool."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.c, self.act, self.out = nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.a(x))
        g = self.act(self.b(h) + h)
        g = self.act(self.c(g) - 0.5 * h + g)
        return self.out(g.mean((2, 3)))


X = images(4, size=6)


@torch.no_grad()
def spikes(snn: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The answer, and which neurons fired when, by layer."""
    seen: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda m, a, out, name=name: seen.__setitem__(name, out != 0))
        for name, layer in snn.neurons()
    ]
    answer = snn(x)
    for hook in hooks:
        hook.remove()
    return answer, seen


def same_spikes(snn: Any, again: Any, x: Tensor) -> None:
    want, fired = spikes(snn, x)
    got, found = spikes(again, x)
    assert list(fired) == list(found)
    assert all(torch.equal(fired[name], found[name]) for name in fired)
    assert any(bool(f.any()) for f in fired.values())
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert again.T == snn.T


# ---- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("net", [network, Residual])
@pytest.mark.parametrize("v_init", ["half", "zero", "uniform"])
def test_folded_thresholds_stay_as_they_are(net: Any, v_init: str, tmp_path: Path) -> None:
    """Thresholds that are 1 already: nothing is rounded again, through a file and back."""
    options = {} if net is network else {"threshold": 0.5}
    normalize = "weights" if net is network else "threshold"
    snn = snnkernels.convert(
        net().eval(), X, T=T, v_init=v_init, normalize=normalize, progress=False, **options
    )
    nir.write(tmp_path / "net.nir", to_nir(snn, X))
    same_spikes(snn, snnkernels.from_nir(tmp_path / "net.nir"), X)


@pytest.mark.parametrize("net", [network, Residual])
@pytest.mark.parametrize("method", ["opi", "light", "ltb", "mmse"])
def test_unfolded_thresholds_are_exact(net: Any, method: str, tmp_path: Path) -> None:
    if method == "light" and net is Residual:
        method = "opi"
    snn = snnkernels.convert(net().eval(), X, T=T, method=method, fold=False, progress=False)
    graph = to_nir(snn, X, fold_thresholds=False)
    nir.write(tmp_path / "net.nir", graph)
    same_spikes(snn, snnkernels.from_nir(tmp_path / "net.nir"), X)
    assert any(isinstance(node, nir.Scale) for node in graph.nodes.values())


class Then(nn.Module):
    """A convolution, neurons, and a function of both."""

    def __init__(self, then: Callable[[Tensor], Tensor], features: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.act, self.then = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), then
        self.out = nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.then(self.act(self.conv(x))))


@pytest.mark.parametrize(
    "then",
    [
        lambda h: torch.add(h, 2 * h, alpha=3).mean((2, 3)),
        lambda h: torch.sub(other=h, input=2 * h, alpha=0.5).mean((-1, -2)),
        lambda h: h.mean(dim=[3, 2], keepdim=True).flatten(1),
        lambda h: F.avg_pool2d(h, 6, 6, 0, False, True, None).flatten(1),
    ],
    ids=["alpha", "by keyword", "mean", "pool"],
)
def test_functions_keep_their_arguments(then: Callable[[Tensor], Tensor]) -> None:
    snn = snnkernels.convert(Then(then).eval(), X, T=T, progress=False)
    same_spikes(snn, snnkernels.from_nir(to_nir(snn, X, fold_thresholds=False)), X)


@pytest.mark.parametrize(
    ("then", "features", "words"),
    [
        (lambda h: h.div(0.5, rounding_mode="floor").mean((2, 3)), 6, "rounding_mode has no place"),
        (lambda h: h.mean((1, 3)), 6, r"mean over dimensions \(1, 3\)"),
        (lambda h: h.mean((2, 3), dtype=torch.float64).float(), 6, "dtype has no place"),
        (lambda h: F.avg_pool2d(h, 2, 2, 1, False, False).flatten(1), 96, "counts its padding"),
        (lambda h: h.view(-1, 9), 9, "mixes the samples"),
    ],
)
def test_what_would_change_numbers_is_refused(
    then: Callable[[Tensor], Tensor], features: int, words: str
) -> None:
    snn = snnkernels.convert(Then(then, features).eval(), X, T=T, progress=False)
    with pytest.raises(ConversionError, match=words):
        snnkernels.to_nir(snn, X)


class Parts(nn.Module):
    """Something between two layers of neurons, and something behind the last."""

    def __init__(self, inner: Any, outer: Any = nn.Identity()) -> None:  # noqa: B008
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.inner, self.outer = nn.Conv2d(3, 4, 3, padding=1), inner, outer
        self.out = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Any:
        h = F.relu(self.inner(F.relu(self.conv(x))))
        return self.outer(self.out(h.flatten(1)))


def of_parts(*parts: Any, **options: Any) -> tuple[Any, Tensor]:
    """Dyadic, so that folded thresholds (powers of two) are exact too."""
    net, x = Parts(*parts), dyadic(3, 3, 8, 8, seed=5)
    net(x)
    given = {"threshold": 4.0, "T": T, "progress": False, **options}
    return snnkernels.convert(make_dyadic(net.eval()), x, **given), x


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize(
    "inner",
    [
        lambda h: h.clone().add_(h),
        lambda h: -(2 * h - torch.div(h, 4)),
        lambda h: h.view(h.shape[0], 4, 8, 8).contiguous(),
        lambda h: torch.reshape(h, (-1, 256)),
        lambda h: F.avg_pool2d(input=h, kernel_size=2),
        lambda h: F.adaptive_avg_pool2d(output_size=(4, None), input=h),
        lambda h: F.adaptive_avg_pool2d(h, 8) + h,
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 8, (3, 5), groups=2, dilation=(2, 1), padding="valid"),
        nn.BatchNorm2d(4),
        nn.Sequential(nn.Flatten(), nn.BatchNorm1d(256, affine=False)),
        nn.AdaptiveAvgPool2d(4),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operations_one_by_one(inner: Any, fold: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """Found by this test: graphs of float64 networks with batch norms were half in float32."""
    snn, x = of_parts(inner, fold=False)
    snn, x = snn.to(dtype), x.to(dtype)
    nir.write(tmp_path / "net.nir", to_nir(snn, x, fold_thresholds=fold))
    again = snnkernels.from_nir(tmp_path / "net.nir")
    same_spikes(snn, again, x)
    with torch.no_grad():
        assert again(x).dtype == dtype


def test_thresholds_of_float64_are_written_as_they_are() -> None:
    torch.manual_seed(0)
    net, x = Parts(lambda h: h * 0.1 - h / 3), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    net(x.float())
    snn = snnkernels.convert(net.double().eval(), x, T=32, progress=False)
    graph = to_nir(snn, x, fold_thresholds=False)
    same_spikes(snn, snnkernels.from_nir(graph), x)
    scales = [node.scale for node in graph.nodes.values() if isinstance(node, nir.Scale)]
    assert scales
    assert all(scale.dtype == np.float64 for scale in scales)


@pytest.mark.parametrize("fold", [True, False])
def test_thresholds_behind_a_flatten(fold: bool) -> None:
    theta = {"relu": torch.tensor([4.0, 2.0, 1.0, 8.0]), "relu_1": 2.0 ** (torch.arange(256) % 4)}
    snn, x = of_parts(nn.Flatten(), threshold=theta)
    same_spikes(snn, snnkernels.from_nir(to_nir(snn, x, fold_thresholds=fold)), x)


@pytest.mark.parametrize("fold", [True, False])
def test_convolutions_of_signals(fold: bool) -> None:
    net = nn.Sequential(nn.Conv1d(3, 4, 3, 2, 1), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 6, 3))
    net.extend([nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)])
    x = dyadic(3, 3, 16)
    snn = snnkernels.convert(make_dyadic(net.eval()), threshold=2.0, T=T, fold=False)
    same_spikes(snn, snnkernels.from_nir(to_nir(snn, x, fold_thresholds=fold)), x)


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize(
    ("inner", "bias"),
    [
        (nn.Conv2d(4, 4, 1), torch.tensor([0.5, -1.0, 0.25, 2.0])),
        (nn.Conv2d(4, 4, 1, bias=False), torch.tensor([0.5, -1.0, 0.25, 2.0])),
        (lambda h: h + h, None),
    ],
)
def test_a_bias_of_neurons_goes_into_the_layer_before(inner: Any, bias: Any, fold: bool) -> None:
    theta = {"relu": torch.tensor(4.0), "relu_1": torch.tensor([4.0, 2.0, 1.0, 8.0])}
    snn, x = of_parts(inner, threshold=theta)
    layer = list(snn.neurons())[1][1]
    layer.node.bias = bias if bias is not None else 0.5
    if bias is None:
        with pytest.raises(ConversionError, match="a bias, and no layer before them could take it"):
            snnkernels.to_nir(snn, x, fold_thresholds=fold)
    else:
        same_spikes(snn, snnkernels.from_nir(to_nir(snn, x, fold_thresholds=fold)), x)


def two(h: Tensor) -> tuple[Tensor, Tensor]:
    return h, h


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([lambda h: h + 0.5], "add cannot be written as NIR: add has no node in NIR"),
        ([lambda h: h + h.mean((2, 3), keepdim=True)], "add of a constant or of two shapes"),
        ([lambda h: h.flatten(2)], "flatten has no node in NIR"),
        ([lambda h: F.adaptive_avg_pool2d(h, 3)], r"pooling \(4, 8, 8\) to \(4, 3, 3\) takes"),
        (
            [lambda h: F.max_pool2d(h, 2)],
            "max_pool2d cannot be written as NIR: NIR has no max-pool",
        ),
        ([nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")], "padding_mode='reflect' is not"),
        ([nn.Linear(8, 4)], r"NIR's Affine takes a vector, not \(4, 8, 8\)"),
        ([nn.ConvTranspose2d(4, 4, 2)], "inner cannot be written as NIR: ConvTranspose2d has no"),
        ([nn.Flatten(1, 2)], "inner cannot be written as NIR: Flatten has no node"),
        ([nn.Identity(), lambda y: y / 0], "truediv by 0 gives no numbers"),
        ([nn.Identity(), lambda y: y * float("inf")], "mul by inf gives no numbers"),
        ([nn.Identity(), two], "the network has several outputs"),
        ([nn.Identity(), lambda y: y + torch.ones(3)], "cannot be written as NIR"),
        ([nn.Identity(), lambda y: y * y], "mul has no node in NIR"),
        (
            [nn.Identity(), nn.BatchNorm1d(3, affine=False, track_running_stats=False)],
            "BatchNorm1d without running statistics uses those of the batch",
        ),
    ],
)
def test_operations_that_nir_has_not(parts: list[Any], words: str) -> None:
    net, x = Parts(*parts), dyadic(3, 3, 8, 8, seed=5)
    net(x)
    snn = snnkernels.convert(net.eval(), threshold=4.0, T=2)
    with pytest.raises(ConversionError, match=words):
        snnkernels.to_nir(snn, x)


def test_any_threshold_folds_to_one() -> None:
    snn = snnkernels.convert(network(), X, T=T, progress=False)
    graph = to_nir(snn, X)
    neurons = [node for node in graph.nodes.values() if isinstance(node, nir.IF)]
    assert len(neurons) == 3
    for node in neurons:
        assert (node.v_threshold == 1).all()
        assert (node.r == 1).all()
        assert (node.v_reset == 0).all()
        about = {k: node.metadata[k] for k in ("reset", "tie", "T", "v_init")}
        assert about == {"reset": "subtract", "tie": ">=", "T": T, "v_init": 0.5}
    assert not any(isinstance(node, nir.Scale) for node in graph.nodes.values())
    again = snnkernels.from_nir(graph)
    want, fired = spikes(snn, X)
    got, found = spikes(again, X)
    off = [(fired[n] != found[n]).float().mean().item() for n in fired]
    assert max(off) < 0.01  # rounding at a threshold at most
    torch.testing.assert_close(got, want, atol=0.05, rtol=0)


@torch.no_grad()
def test_dyadic_networks_with_any_power_of_two() -> None:
    net = make_dyadic(
        nn.Sequential(
            *(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()),
            *(nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3)),
        )
    )
    x = dyadic(8, 2, 4, 4)
    theta = {"1": torch.tensor([0.5, 2.0, 4.0, 1.0]), "5": torch.tensor(2.0)}
    snn = snnkernels.convert(net, threshold=theta, T=T)
    again = snnkernels.from_nir(to_nir(snn, x))
    same_spikes(snn, again, x)
    assert torch.equal(snn(x), again(x))


@torch.no_grad()
def test_networks_from_nir_are_networks_of_ours(tmp_path: Path) -> None:
    optional("safetensors")
    snn = snnkernels.convert(Residual().eval(), X, T=T, threshold=1.0, progress=False)
    again = snnkernels.from_nir(to_nir(snn, X))
    assert again.report.method == "nir"
    loaded = snnkernels.load_pretrained(again.save_pretrained(tmp_path))
    assert torch.equal(loaded(X, T=3), again(X, T=3))
    torch.testing.assert_close(snnkernels.lower(again)(X), again(X), atol=1e-4, rtol=1e-4)
    assert set(again.predict_curve(X, [1, 4])) == {1, 4}


# ---- inputs that change --------------------------------------------------------------------------


@torch.no_grad()
def test_over_time_of_a_constant_input_is_the_call() -> None:
    for normalize in ("threshold", "weights"):
        snn = snnkernels.convert(network(), X, T=T, normalize=normalize, progress=False)
        out = snn.over_time(X.expand(T, *X.shape))
        assert out.shape == (T, 4, 5)
        torch.testing.assert_close(out.mean(0), snn(X), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_over_time_is_the_neurons_step_by_step() -> None:
    net = make_dyadic(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    snn = snnkernels.convert(net, threshold=2.0, T=T)
    x_seq = dyadic(T, 5, 6)
    v, answers = torch.full((5, 8), 1.0), []
    for x in x_seq:
        v = v + net[0](x)
        fired = (v >= 2).float()
        v = v - 2 * fired
        answers.append(net[2](2 * fired))
    assert torch.equal(snn.over_time(x_seq), torch.stack(answers))
    assert torch.equal(snn.over_time(x_seq), torch.stack(answers))  # no state is left
    with pytest.raises(ValueError, match="T of at least 1"):
        snn.over_time(x_seq[:0])
    srp = snnkernels.convert(net, x_seq[0], method="srp", T=T)
    with pytest.raises(ConversionError, match="each step as it comes"):
        srp.over_time(x_seq)


class Skips(nn.Module):
    """What is constant in time meets spikes, and shapes of either are read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(2, 4, 1), nn.Conv1d(4, 4, 1)
        self.c, self.out = nn.Conv1d(2, 4, 1), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        h = F.relu(self.b(h) + self.c(x)) / (x.numel() // x.size(0) // 3)
        return self.out(F.relu(h.view(x.size(0), -1) - 0.25))


@torch.no_grad()
def test_over_time_of_constant_parts_and_shapes() -> None:
    net, x_seq = make_dyadic(Skips()), dyadic(T, 5, 2, 6)
    snn = snnkernels.convert(net, threshold=2.0, T=T)
    x = x_seq[0]
    assert torch.equal(snn.over_time(x.expand(T, *x.shape)).mean(0), snn(x))
    shapes = [(5, 4, 6), (5, 4, 6), (5, 24)]
    v, answers = [torch.full(shape, 1.0) for shape in shapes], []

    def fire(layer: int, current: Tensor) -> Tensor:
        v[layer] = v[layer] + current
        fired = 2.0 * (v[layer] >= 2)
        v[layer] = v[layer] - fired
        return fired

    for x in x_seq:
        h = fire(0, net.a(x))
        h = fire(1, net.b(h) + net.c(x)) / 4
        answers.append(net.out(fire(2, h.flatten(1) - 0.25)))
    assert torch.equal(snn.over_time(x_seq), torch.stack(answers))


def test_over_time_has_one_answer() -> None:
    snn, x = of_parts(nn.Identity(), two)
    with pytest.raises(ConversionError, match="over_time: the network has several outputs"):
        snn.over_time(x[None])


# ---- graphs of others ----------------------------------------------------------------------------


def foreign(**given: Any) -> Any:
    ones = np.ones(3, dtype=np.float32)
    neuron = nir.IF(**{"r": ones, "v_threshold": ones, "v_reset": 0 * ones, **given})
    weight = np.eye(3, dtype=np.float32)
    return nir.NIRGraph.from_list(nir.Linear(weight=weight), neuron)


def loop(x_seq: Tensor, r: float = 1.0, threshold: float = 1.0, beta: float = 1.0) -> Tensor:
    """NIR's own words: reset to 0, firing above the threshold."""
    v, fired = torch.zeros_like(x_seq[0]), []
    for x in x_seq:
        v = beta * v + r * x
        spikes = (v > threshold).float()
        v = v * (1 - spikes)
        fired.append(spikes)
    return torch.stack(fired)


@torch.no_grad()
def test_the_standard_is_a_hard_reset_above_the_threshold() -> None:
    x_seq = dyadic(16, 4, 3, low=0)
    net = snnkernels.from_nir(foreign())
    assert torch.equal(net.over_time(x_seq), loop(x_seq))
    assert not torch.equal(loop(x_seq), (x_seq.cumsum(0) >= 1).float())
    assert "reset to a value" in str(net.report)
    assert net.T == 16
    assert snnkernels.from_nir(foreign(), T=3).T == 3


@torch.no_grad()
def test_resistances_and_the_length_of_a_step() -> None:
    x_seq = dyadic(16, 4, 3, low=0)
    graph = foreign(r=np.full(3, 1e4, dtype=np.float32), v_threshold=np.full(3, 0.5, np.float32))
    net = snnkernels.from_nir(graph, dt=1e-4)
    assert torch.equal(net.over_time(x_seq), loop(x_seq, threshold=0.5))
    r = np.array([1.0, 2.0, 0.5], dtype=np.float32)
    net = snnkernels.from_nir(foreign(r=r))
    assert torch.equal(net.over_time(x_seq), loop(x_seq * torch.tensor(r)))


@torch.no_grad()
def test_leaky_neurons_by_euler_steps() -> None:
    ones = np.ones(3, dtype=np.float32)
    neuron = nir.LIF(tau=4 * ones, r=4 * ones, v_leak=0 * ones, v_threshold=ones, v_reset=0 * ones)
    graph = nir.NIRGraph.from_list(nir.Linear(weight=np.eye(3, dtype=np.float32)), neuron)
    x_seq = dyadic(12, 4, 3, low=0)
    assert torch.equal(snnkernels.from_nir(graph).over_time(x_seq), loop(x_seq, beta=0.75))


@pytest.mark.parametrize(
    ("graph", "words"),
    [
        (lambda: foreign(v_threshold=np.array([1, np.nan, 1], np.float32)), "if: .*v_threshold"),
        (lambda: foreign(metadata={"reset": "never"}), "metadata reset='never'"),
        (lambda: foreign(metadata={"reset": "subtract", "tie": "<"}), "metadata tie='<'"),
        (lambda: foreign(v_reset=np.array([0, 1, 0], np.float32)), "v_reset differs"),
        (
            lambda: nir.NIRGraph.from_list(
                nir.Linear(weight=np.eye(3, dtype=np.float32)),
                nir.Threshold(threshold=np.ones(3, dtype=np.float32)),
            ),
            r"threshold: nir\.Threshold is not imported",
        ),
        (
            lambda: nir.NIRGraph.from_list(nir.Linear(weight=np.eye(3, dtype=np.float32))),
            "the graph has no neurons",
        ),
    ],
)
def test_graphs_that_are_refused(graph: Any, words: str) -> None:
    with pytest.raises(ConversionError, match=words):
        snnkernels.from_nir(graph())


def test_cycles_edges_and_files(tmp_path: Path) -> None:
    graph = foreign()
    graph.edges.append(("if", "linear"))
    with pytest.raises(ConversionError, match=r"the graph has a cycle, .*recurrent"):
        snnkernels.from_nir(graph)
    graph = foreign()
    graph.edges.append(("if", "nowhere"))
    with pytest.raises(ConversionError, match="if -> nowhere names a node"):
        snnkernels.from_nir(graph)
    with pytest.raises(FileNotFoundError, match="is no file"):
        snnkernels.from_nir(tmp_path / "none.nir")
    (tmp_path / "bad.nir").write_text("no HDF5")
    with pytest.raises(ValueError, match="is no NIR file"):
        snnkernels.from_nir(tmp_path / "bad.nir")
    with pytest.raises(TypeError, match=r"must be a nir\.NIRGraph or a path, got int"):
        snnkernels.from_nir(3)
    for dt in (0, -1.0, float("nan"), True):
        with pytest.raises(ValueError, match="must be a positive finite number"):
            snnkernels.from_nir(foreign(), dt=dt)
    with pytest.raises(ValueError, match="T must be a whole number"):
        snnkernels.from_nir(foreign(), T=0)


# ---- what NIR cannot say -------------------------------------------------------------------------


class Cat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(8 * 36, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return self.out(torch.relu(torch.cat([h, h], 1)).flatten(1))


class Softmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).softmax(-1)


@pytest.mark.parametrize(
    ("net", "options", "words"),
    [
        (
            nn.Sequential(
                *(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1), nn.ReLU()),
                *(nn.Flatten(), nn.Linear(16, 3)),
            ),
            {},
            "2 cannot be written as NIR: NIR has no max-pool",
        ),
        (Cat(), {}, "cat cannot be written as NIR: cat has no node"),
        (Softmax(), {}, "softmax cannot be written as NIR: softmax has no node"),
        (network(), {"method": "srp"}, "method 'srp.*cannot be written as NIR: .*probe"),
        (network(), {"method": "parallel"}, "its neurons do not run step by step"),
        (network(), {"method": "burst"}, "max_spikes"),
    ],
)
def test_what_is_refused(net: nn.Module, options: Any, words: str) -> None:
    snn = snnkernels.convert(net.eval(), X, T=4, progress=False, **options)
    with pytest.raises(ConversionError, match=words):
        snnkernels.to_nir(snn, X)


def test_wrong_types_and_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    snn = snnkernels.convert(network(), X, T=4, progress=False)
    with pytest.raises(TypeError, match="must be a ConvertedNetwork, got Linear"):
        snnkernels.to_nir(nn.Linear(2, 2), X)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"example must be a tensor \[B, \*\], got list"):
        snnkernels.to_nir(snn, [1])  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "nir", None)
    for call in (lambda: snnkernels.to_nir(snn, X), lambda: snnkernels.from_nir("x")):
        with pytest.raises(ImportError, match=r"pip install 'snnkernels\[nir\]'"):
            call()
    assert "docs/nir.md" in WARNING


# ---- other libraries -----------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("library", ["nirtorch", "spikingjelly", "snntorch", "sinabs"])
def test_other_libraries_run_our_files(library: str, tmp_path: Path) -> None:
    """What each reads out of a file of ours; docs/nir.md has the table."""
    optional("nirtorch")
    if library != "nirtorch":
        optional(library)
    conv = library not in ("sinabs", "snntorch")
    layers = [nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)]
    if conv:
        layers = [
            *(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()),
            *(nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3)),
        ]
    x = dyadic(5, 2, 4, 4) if conv else dyadic(5, 8)
    # Sinabs fires several spikes a step and holds membranes above -θ: neither happens at 64.
    threshold = 64.0 if library == "sinabs" else 2.0
    v_init = "half" if library == "nirtorch" else "zero"
    snn = snnkernels.convert(
        make_dyadic(nn.Sequential(*layers)), threshold=threshold, v_init=v_init, T=32
    )
    graph, x_seq = to_nir(snn, x), x.expand(32, *x.shape)
    path = str(tmp_path / "net.nir")
    nir.write(path, graph)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if library == "snntorch":
            with pytest.raises(TypeError, match="not tuple"):  # of 1.0.0: docs/nir.md
                nir_roundtrip.run_snntorch(path, x_seq)
            return
        got = nir_roundtrip.RUN[library](path, x_seq)
    if library == "spikingjelly":
        # It reads the standard, fires at the threshold and knows no metadata.
        for node in graph.nodes.values():
            if isinstance(node, nir.IF):
                node.metadata.update(reset="value", tie=">=", v_init=0.0)
        want = snnkernels.from_nir(graph).over_time(x_seq)
        assert not torch.equal(want, snn.over_time(x_seq))
    else:
        want = snn.over_time(x_seq)
    assert torch.equal(got, want)
    assert want.unique().numel() > 3


def test_foreign_nodes_that_do_not_fit() -> None:
    weight = np.ones((3, 4), dtype=np.float32)

    def read(size: int = 3, more: Any = None, **given: Any) -> Any:
        fields = {"r": np.ones(size), "v_threshold": np.ones(size), "v_reset": np.zeros(size)}
        nodes = {
            "i": nir.Input({"input": np.array([4])}),
            "a": nir.Linear(weight),
            "n": nir.IF(**{**fields, **given}),
            "o": nir.Output({"output": np.array([size])}),
        }
        edges = [("i", "a"), ("a", "n"), ("n", "o")]
        if more is not None:
            nodes["b"] = more
            edges += [("i", "b"), ("b", "n")]
        return snnkernels.from_nir(nir.NIRGraph(nodes, edges, type_check=False))

    assert read()(torch.ones(2, 4)).shape == (2, 3)
    for given, words in (
        ({"size": 5}, r"n: \(5,\) neurons, but its input is \(3,\)"),
        ({"more": nir.Linear(weight[:1])}, r"edges into one node bring \(3,\) and \(1,\)"),
        ({"r": np.full(3, np.inf)}, "n: r is not finite"),
        ({"metadata": {"reset": "subtract", "v_init": np.zeros(7)}}, r"v_init of shape \(7,\)"),
        ({"metadata": {"reset": "subtract", "v_init": np.nan}}, "one finite number"),
        ({"metadata": {"reset": "subtract", "v_init": "half"}}, "n: metadata v_init"),
    ):
        with pytest.raises(ConversionError, match=words):
            read(**given)
