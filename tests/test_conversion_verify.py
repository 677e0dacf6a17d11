"""Errors a conversion must see: against the ANN itself, hooks, batches, shapes, asserts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conversion_helpers import Asserts, images, randomize, relative
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.data import TensorDataset

from snnkernels import IFNode
from snnkernels.conversion import QCFS, ConversionError, convert, pipeline


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mlp(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), *layers, nn.Linear(8, 3)).eval()


class Middle(nn.Module):
    """linear -> relu -> a function of (module, tensor) -> relu -> linear."""

    def __init__(self, middle: Callable, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(width, 3)
        self.middle = middle

    def forward(self, x: Tensor) -> Any:
        return self.fc3(F.relu(self.middle(self, F.relu(self.fc1(x)))))


# The report and the check against the ANN itself.


def test_the_output_row_is_the_error_against_the_ann(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = mlp(), tokens(8, 6)
    snn = convert(net, x, T=16)
    with torch.no_grad():
        assert snn.report["output"].error == pytest.approx(relative(snn(x), net(x)), rel=1e-6)

    net = mlp(nn.MaxPool1d(3, 1, 1))  # averaging makes another network: the row must show it
    snn = convert(net, x, T=256, maxpool="avg", threshold="max")
    with torch.no_grad():
        true = relative(snn(x), net(x))
    assert true > 0.05
    assert snn.report["output"].error == pytest.approx(true, rel=1e-6)


def test_a_wrong_fold_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(net: nn.Module, graph: Any) -> dict[str, str]:
        with torch.no_grad():
            net.get_submodule("0").weight.mul_(0.5)
        return {}

    monkeypatch.setattr(pipeline, "fold_batch_norm", wrong)
    with pytest.raises(ConversionError, match="does not compute what the network computes: output"):
        convert(mlp(), tokens(8, 6))


def test_every_tensor_of_the_output_gets_a_row() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, x: Tensor) -> dict[str, Any]:
            y = self.body(x)
            return {"a": y, "b": (y.softmax(1), y * 2)}

    net, x = Heads(), tokens(8, 6)
    snn = convert(net, x)
    expected = net(x)
    with torch.no_grad():
        out = snn(x)
    for name, got, want in [
        ("output.a", out["a"], expected["a"]),
        ("output.b.0", out["b"][0], expected["b"][0]),
        ("output.b.1", out["b"][1], expected["b"][1]),
    ]:
        assert snn.report[name].error == pytest.approx(relative(got, want), rel=1e-5)


def test_analog_operations_behind_the_neurons_are_noted() -> None:
    net = mlp(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU())
    note = "2 operations behind the last neurons stay analog and run once, on rates: 3 (GELU), 5"
    assert note in str(convert(net, tokens(4, 6)).report)
    assert "analog" not in str(convert(mlp(), tokens(4, 6)).report)


# Linear layers on more than two dimensions.


def test_batch_norm_behind_a_linear_layer_on_tokens_acts_on_dimension_1() -> None:
    torch.manual_seed(0)
    net = randomize(
        nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    )
    x = tokens(16, 8, 8)
    for normalize in ("threshold", "weights"):
        snn = convert(net, x, T=512, threshold="max", normalize=normalize)
        assert "kept as scale and shift" in snn.report["1"].action
        with torch.no_grad():
            assert relative(snn(x), net(x)) < 0.02
    without_data = convert(net, T=512, threshold=4.0)
    with torch.no_grad():
        assert relative(without_data(x), net(x)) < 0.05
    flat = randomize(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)))
    assert "folded into 0" in convert(flat, tokens(9, 8)).report["1"].action


@pytest.mark.parametrize("normalize", ["threshold", "weights"])
@pytest.mark.parametrize("count", [5, 8])
@pytest.mark.parametrize("tail", ["linear", "flatten", "mean"])
def test_thresholds_behind_a_linear_layer_are_per_feature(
    normalize: str, count: int, tail: str
) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 8)
            self.fc3 = nn.Linear(8 * count if tail == "flatten" else 8, 3)
            with torch.no_grad():
                self.fc1.weight.mul_(torch.linspace(0.2, 3, 8)[:, None])

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.fc2(F.relu(self.fc1(x))))
            if tail == "flatten":
                h = F.relu(self.fc3(h.flatten(1)))
            elif tail == "mean":
                h = F.relu(self.fc3(h.mean(1)))
            else:
                h = F.relu(self.fc3(h))
            return h

    net, x = Tokens(), tokens(16, count, 6)
    if normalize == "weights" and tail == "mean":
        with pytest.raises(ConversionError, match=r"normalize='weights' cannot pass mean"):
            convert(net, x, normalize=normalize)
        return
    snn = convert(net, x, threshold="max", T=512, normalize=normalize)
    assert snn.report["relu"].threshold.shape == (8,)
    assert snn.report["relu"].threshold[7] > 3 * snn.report["relu"].threshold[0]
    with torch.no_grad():
        assert relative(snn(x), net(x)) < 0.02
        if tail != "flatten":  # as the ANN, at any number of tokens
            assert relative(snn(x[:, 2:]), net(x[:, 2:])) < 0.05


def test_thresholds_that_cannot_enter_the_weights_are_refused() -> None:
    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.fc = nn.Conv1d(6, 6, 3, padding=1), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.fc(F.relu(self.conv(x))))

    net, x = Crossed(), tokens(8, 6, 6)
    with pytest.raises(ConversionError, match="fc: the thresholds before it are not along"):
        convert(net, x, normalize="weights")
    snn = convert(net, x, threshold="max", T=512)
    with torch.no_grad():
        assert relative(snn(x), net(x)) < 0.02


def test_scale_stays_float32_through_half() -> None:
    snn = convert(mlp(), tokens(8, 6), normalize="weights").half()
    assert all(layer.scale.dtype == torch.float32 for _, layer in snn.neurons())


# Hooks.


def pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", amount=0.5)
    prune.random_unstructured(layer, "bias", amount=0.25)


def normed(make: Callable) -> Callable:
    def apply(layer: nn.Module) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make(layer)

    return apply


COMPUTED = {
    "prune": pruned,
    "weight_norm": normed(torch.nn.utils.weight_norm),
    "spectral_norm": normed(torch.nn.utils.spectral_norm),
    "parametrized weight_norm": parametrizations.weight_norm,
    "parametrized spectral_norm": parametrizations.spectral_norm,
}


@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("stale", [False, True])
def test_computed_weights_are_those_of_the_parameters(name: str, stale: bool) -> None:
    net, x = mlp(nn.Linear(8, 8), nn.ReLU()), tokens(8, 6)
    COMPUTED[name](net[2])
    net.eval()
    if stale:  # new parameters; the old weights are still lying around
        with torch.no_grad():
            net(x)
        net.load_state_dict({k: v * 1.5 + 0.01 for k, v in net.state_dict().items()})
    before = {k: v.clone() for k, v in net.state_dict().items()}
    snn = convert(net, x, threshold="max", T=512)
    with torch.no_grad():
        assert relative(snn(x), net(x)) < 0.03
    assert "hook" not in str(snn.report)
    after = net.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_other_hooks_are_named() -> None:
    net, x = mlp(), tokens(8, 6)
    net[0].register_forward_hook(lambda m, args, out: out * 0.1)
    net[2].register_forward_pre_hook(lambda m, args: None)
    assert "forward hooks of 0, 2 were not called" in str(convert(net, x).report)


# Batches.


@pytest.mark.parametrize(
    ("middle", "words"),
    [
        (lambda n, h: n.fc2(h) - h.mean(-2), "mean over dimension 0 mixes the batch"),
        (lambda n, h: n.fc2(h).flip(-2), "flip over dimension 0"),
        (lambda n, h: n.fc2(h).flip([0]), "flip over dimension 0"),
        (lambda n, h: torch.cat([h, h], -2), "cat over dimension 0"),
        (lambda n, h: h.transpose(-2, -1).reshape(-1, 8), "moves the batch"),
        (lambda n, h: h.unflatten(-2, (-1, 1)).flatten(1), "unflatten over dimension 0"),
        (lambda n, h: h.view(-1, 8, 1).permute(2, 1, 0)[0].reshape(-1, 8), "permute moves"),
    ],
)
def test_what_mixes_the_batch_is_named(middle: Callable, words: str) -> None:
    with pytest.raises(ConversionError, match=words):
        convert(Middle(middle), tokens(8, 6))


def test_an_unknown_mixture_is_found_on_data() -> None:
    net = Middle(lambda n, h: n.fc2(h).reshape(8, -1).flip(1).reshape(-1, 8))
    with pytest.raises(ConversionError, match="reshape mixes the samples of a batch"):
        convert(net, tokens(8, 6))
    there_and_back = Middle(lambda n, h: n.fc2(h).reshape(8, -1).reshape(-1, 8))
    assert convert(there_and_back, tokens(8, 6)).report["output"].error < 1


def test_a_network_that_mixes_before_or_behind_the_neurons_converts() -> None:
    class Free(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x - x.mean(0)).softmax(0)

    net, x = Free(), tokens(8, 6)
    snn = convert(net, x, threshold="max", T=256)
    with torch.no_grad():
        assert relative(snn(x), net(x)) < 0.05


def test_an_assumed_batch_size_is_named() -> None:
    net = Middle(lambda n, h: n.fc2(h).view(16, 8))
    with pytest.raises(ConversionError, match=r"view fails on a batch of 2.*x\.shape\[0\]"):
        convert(net, tokens(16, 6))
    with pytest.raises(ConversionError, match="runs on 64 inputs, so it assumes its batch size"):
        convert(Middle(lambda n, h: n.fc2(h).view(64, 8)), tokens(64, 6))


def test_a_named_tuple_from_before_the_neurons_meets_spikes() -> None:
    class Largest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            top = x.max(1, keepdim=True)
            return F.relu(self.fc2(F.relu(self.fc1(x))) + top.values)

    for samples in (1, 8):
        assert convert(Largest(), tokens(samples, 6), T=64).report["output"].error < 0.1


def test_one_sample_is_enough() -> None:
    assert convert(mlp(), tokens(1, 6)).report["output"].error < 1


@pytest.mark.parametrize(
    ("loader", "error", "words"),
    [
        (5, TypeError, "loader must be an iterable .* got int"),
        (TensorDataset(torch.rand(4, 6)), TypeError, r"loader is a Dataset.*DataLoader\("),
        ((torch.rand(4, 6), torch.arange(4)), TypeError, r"inputs and labels.*\[\(inputs, labels"),
        ([torch.rand(4, 6), torch.arange(4)], TypeError, "loader is a list of two different"),
        (torch.tensor(1.0), TypeError, "loader yields scalars"),
        ([torch.rand(4, 5)], ConversionError, r"itself fails on .*\(4, 5\).*loader must yield"),
        ([torch.rand(4, 6), torch.rand(4, 5)], ConversionError, r"item 1 of loader.*\(4, 5\)"),
    ],
)
def test_loaders_that_are_none(loader: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        convert(mlp(), loader)


def test_two_batches_in_a_tuple() -> None:
    assert convert(mlp(), (tokens(4, 6), tokens(4, 6, seed=1))).report["output"].error < 1


# Tracing.


def test_asserts_on_shapes_are_passed() -> None:
    net, x = Asserts(mlp()), tokens(8, 6)
    with torch.no_grad():
        assert relative(convert(net, x, threshold="max", T=256)(x), net(x)) < 0.05


@pytest.mark.parametrize("how", ["if", "assert", "shape"])
def test_trace_errors_name_the_line(how: str) -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if how == "assert":
                assert x.sum() > 0
            elif how == "if":
                return x if x.sum() > 0 else -x
            elif x.shape[1] == 3:
                return F.relu(x)
            return x

    line = {"if": "return x if", "assert": r"assert x\.sum", "shape": r"elif x\.shape"}[how]
    with pytest.raises(ConversionError, match=rf"test_conversion_verify\.py:\d+: {line}") as e:
        convert(mlp(Branches()), tokens(8, 6))
    assert "asserts" in str(e.value)


def test_a_traced_child_converts() -> None:
    x = tokens(8, 6)
    net = nn.Sequential(torch.fx.symbolic_trace(mlp(nn.Linear(8, 8), nn.ReLU())), nn.Linear(3, 2))
    with torch.no_grad():
        assert relative(convert(net, x, threshold="max", T=512)(x), net(x)) < 0.05


def test_a_network_that_spikes_already_is_refused() -> None:
    snn = convert(mlp(), tokens(8, 6))
    with pytest.raises(ConversionError, match=r"1\.node is an IFNode: the network spikes already"):
        convert(snn, tokens(8, 6))
    with pytest.raises(ConversionError, match="2 is an IFNode"):
        convert(mlp(IFNode()), tokens(8, 6))


def test_a_black_box_is_named() -> None:
    box = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    with pytest.raises(ConversionError, match="the network has TransformerEncoderLayer"):
        convert(nn.Sequential(box), tokens(4, 3, 6))


def test_a_tuple_from_a_module_is_no_batch() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.fc1(x))
            return F.relu(self.fc2(self.attention(h, h, h)[0]))

    snn = convert(Attends().eval(), tokens(4, 3, 6), on_unsupported="keep")
    assert "KEPT" in snn.report["attention"].action
    assert "KEPT" not in snn.report["getitem"].action


# Arguments.


def test_a_given_threshold_gets_no_advice_on_training() -> None:
    with pytest.raises(ConversionError, match=r"got -1$"):
        convert(mlp(), threshold=-1)


@pytest.mark.parametrize("start", [float("inf"), float("nan"), torch.tensor([0.0, -torch.inf])])
def test_v_init_must_be_finite(start: Any) -> None:
    with pytest.raises(ValueError, match="v_init of 1 must be finite"):
        convert(mlp(), threshold=1.0, v_init=start)


def test_wrong_numbers_of_values_without_data() -> None:
    with pytest.raises(ValueError, match="threshold of 1 has 5 values, but the layer has 8"):
        convert(mlp(), threshold=torch.ones(5))
    with pytest.raises(ValueError, match="v_init of 1 has 5 values, but the layer has 8"):
        convert(mlp(), threshold=1.0, v_init=torch.ones(5))
    hidden = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(6, 3))
    snn = convert(hidden, threshold=torch.ones(5))
    with pytest.raises(ValueError, match="1: v_threshold has 5 values, but the layer has 6"):
        snn(tokens(4, 6))


def test_learned_thresholds_need_no_data_behind_batch_norm() -> None:
    torch.manual_seed(0)
    net = randomize(
        nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), QCFS(8, 2.0), nn.Linear(8, 3))
    )
    x = tokens(16, 6)
    with torch.no_grad():
        torch.testing.assert_close(convert(net, T=8)(x), net(x), atol=1e-4, rtol=0)
    assert convert(net, images(1)[:, 0, :, :6].reshape(-1, 6), T=8).report["output"].error < 1e-4
