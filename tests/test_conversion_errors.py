"""What cannot be converted says so: the layer, the reason, the way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conversion_helpers import images
from torch import Tensor, nn

from snnkernels.conversion import QCFS, ClipReLU, ConversionError, convert

X = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))


class Between(nn.Module):
    """relu -> middle -> relu."""

    def __init__(self, middle: Callable) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm, self.leaky = nn.LayerNorm(6), nn.LeakyReLU()
        self.batchless = nn.BatchNorm1d(6, track_running_stats=False)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.fc2(self.middle(self, F.relu(self.fc1(x)))))


@pytest.mark.parametrize(
    ("middle", "words"),
    [
        (
            lambda n, h: torch.sigmoid(n.fc2(h)),
            "sigmoid cannot be converted: sigmoid is not affine",
        ),
        (lambda n, h: F.gelu(h), "gelu is not affine"),
        (lambda n, h: h.tanh(), "tanh is not affine"),
        (lambda n, h: h.softmax(1), "softmax is not affine"),
        (lambda n, h: n.norm(h), "norm cannot be converted: LayerNorm is not affine"),
        (lambda n, h: n.leaky(h), "leaky cannot be converted: LeakyReLU"),
        (lambda n, h: h * n.fc2(h), "mul of two values that spike is not linear"),
        (lambda n, h: h * h, "mul of two values that spike is not linear"),
        (lambda n, h: n.fc1(h) @ n.fc2(h).t(), "t is not affine|matmul of two"),
        (lambda n, h: n.fc2(h) / (h + 1), "divides by a value that spikes"),
        (lambda n, h: n.batchless(n.fc2(h)), "without running statistics"),
        (lambda n, h: h - h.mean(0), "mean over dimension 0 mixes the batch"),
        (lambda n, h: h / h.sum(), "sum over all dimensions mixes the batch"),
        (lambda n, h: torch.cat([h, h], 0), "cat over dimension 0"),
        (lambda n, h: h[:2], "picks from the batch"),
        (lambda n, h: h.permute(1, 0), "moves the batch"),
        (lambda n, h: torch.clamp(h, -1, 1), "clamp is not affine"),
        (lambda n, h: torch.maximum(h, n.fc2(h)), "maximum is not affine"),
        (lambda n, h: h**2, "pow is not affine"),
    ],
)
def test_what_is_not_affine_between_neurons(middle: Callable, words: str) -> None:
    with pytest.raises(ConversionError, match=words) as caught:
        convert(Between(middle), X)
    assert "on_unsupported='keep'" in str(caught.value)


def test_no_activation() -> None:
    net = nn.Sequential(nn.Linear(6, 3), nn.GELU())
    with pytest.raises(ConversionError, match=r"no activation found.*GELU, Linear"):
        convert(net, X)


def test_control_flow_on_data_names_the_module() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    net = nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Sequential(Branch()))
    with pytest.raises(ConversionError, match=r"2\.0 \(Branch\) failed with TraceError.*outside"):
        convert(net, X)


def test_two_inputs() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.relu(x + y)

    with pytest.raises(ConversionError, match=r"2 required inputs \['x', 'y'\]"):
        convert(Two(), X)


def test_scripted_network() -> None:
    with pytest.raises(ConversionError, match=r"cannot be copied|scripted|cannot trace"):
        convert(_scripted(), X)


def _scripted() -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Sequential(nn.ReLU()))


def test_write_through_a_view() -> None:
    class View(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            h = self.fc(x)
            h.view(-1, 2, 3).relu_()
            return h

    with pytest.raises(ConversionError, match="relu_ changes view in place while output still"):
        convert(View(), X)


def test_max_pool_with_indices() -> None:
    class Indices(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 3, 3), nn.MaxPool2d(2, return_indices=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(F.relu(self.conv(x)))[0]

    with pytest.raises(ConversionError, match="pool: max-pool with return_indices"):
        convert(Indices(), images(2))


def test_dilated_max_pool_has_no_average() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.MaxPool2d(2, dilation=2))
    with pytest.raises(ConversionError, match="2: a dilated max-pool"):
        convert(net, images(2), maxpool="avg")


@pytest.mark.parametrize("lam", [0.0, -0.5, float("nan"), float("inf")])
@pytest.mark.parametrize("make", [ClipReLU, QCFS])
def test_learned_thresholds_that_are_not_positive(make: Callable, lam: float) -> None:
    net = nn.Sequential(nn.Linear(6, 3), make())
    with torch.no_grad():
        net[1].lam.fill_(lam)
    with pytest.raises(ConversionError, match=r"^1: the learned threshold must be positive"):
        convert(net)


def test_qcfs_needs_its_activations() -> None:
    net = nn.Sequential(nn.Linear(6, 3), QCFS(), nn.Linear(3, 3), nn.ReLU())
    with pytest.raises(ConversionError, match=r"3: method='qcfs' needs QCFS.*this is ReLU"):
        convert(net, X, method="qcfs")


NET = nn.Sequential(nn.Linear(6, 3), nn.ReLU())


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"method": "opy"}, ValueError, "method='opy' is not known; allowed: opi, qcfs"),
        ({"maxpool": "max"}, ValueError, "maxpool='max' is not known; allowed: 'cumulative'"),
        ({"on_unsupported": "warn"}, ValueError, "on_unsupported='warn'.*'error', 'keep'"),
        ({"normalize": "w"}, ValueError, "normalize='w'.*'threshold', 'weights'"),
        ({"threshold": "mse"}, ValueError, "threshold='mse' is not known; allowed: 'mmse', 'max'"),
        ({"threshold": "0%"}, ValueError, "threshold='0%' is not known"),
        ({"threshold": "101%"}, ValueError, "threshold='101%' is not known"),
        ({"threshold": [1]}, TypeError, "threshold must be .* got list"),
        ({"threshold": True}, TypeError, "threshold must be .* got bool"),
        ({"threshold": 0.0}, ConversionError, "1: threshold must be positive and finite, got 0"),
        ({"threshold": -1}, ConversionError, "1: threshold must be positive and finite, got -1"),
        ({"threshold": torch.ones(4)}, ValueError, "threshold of 1 has 4 values, .* 3 channels"),
        ({"threshold": torch.ones(3, 2)}, ValueError, r"threshold of 1 has shape \(3, 2\)"),
        ({"threshold": {"9": 1.0}}, ValueError, r"threshold names \['9'\].*it has \['1'\]"),
        ({"v_init": "full"}, ValueError, "v_init='full' is not known; allowed: 'half'"),
        ({"v_init": torch.ones(2, 2)}, ValueError, r"v_init of 1 has shape \(2, 2\)"),
        ({"v_init": torch.ones(5)}, ValueError, "v_init of 1 has 5 values"),
        ({"loader": None}, ValueError, "loader is None, but threshold='mmse' for 1 needs"),
        ({"loader": []}, ValueError, "loader is empty"),
        ({"loader": [], "threshold": 1.0}, ValueError, "loader is empty"),
        ({"loader": ["text"]}, TypeError, "loader must yield tensors or .* got str"),
        ({"loader": [{"x": X}]}, TypeError, "loader must yield tensors or .* got dict"),
    ],
)
def test_arguments(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        convert(NET, **{"loader": X, **arguments})


def test_not_a_module() -> None:
    with pytest.raises(TypeError, match=r"ann must be a torch\.nn\.Module, got function"):
        convert(F.relu, X)  # type: ignore[arg-type]


def test_activations_of_integers_are_refused() -> None:
    """Found by test_fuzz_networks.py: a TypeError of the histogram, a KeyError of QCFS."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.relu(x.argmax(1))

    with pytest.raises(ConversionError, match=r"torch\.int64"):
        convert(Positions().eval(), torch.rand(4, 3), T=2, progress=False)
    with pytest.raises(TypeError, match=r"x has dtype torch\.int64"):
        QCFS()(torch.ones(3, dtype=torch.int64))
