"""Threshold ReLU with a shift at every step (Deng and Gu, ICLR 2021)."""

from __future__ import annotations

import math

import pytest
import torch
from conversion_helpers import dyadic, images, make_dyadic
from torch import Tensor, nn

import snnkernels
from snnkernels.conversion import ClipReLU, ConversionError, ThresholdReLU
from snnkernels.conversion.methods import ThresholdReLUMethod


def wire(act: nn.Module | None = None) -> nn.Sequential:
    """One current, one activation, one answer."""
    net = nn.Sequential(nn.Linear(1, 1), act or nn.ReLU(), nn.Linear(1, 1))
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight.fill_(1.0)
            layer.bias.zero_()
    return net.eval()


def neuron(snn: nn.Module) -> nn.Module:
    ((_, layer),) = snn.neurons()
    return layer.node


def run(node: nn.Module, current: float, T: int) -> tuple[list[int], float]:
    node.reset()
    node.output = "spikes"
    with torch.no_grad():
        spikes = node(torch.tensor([[current]]), T=T).flatten()
    return (spikes != 0).int().tolist(), float(node.v)


def test_worked_example() -> None:
    """Worked example of Deng-Gu: θ = 2, T = 4, x = 0.55; OPI has its spike earlier, the same v."""
    method = ThresholdReLUMethod(shift_steps=4)
    shifted = snnkernels.convert(wire(), method=method, T=4, threshold=2.0)
    spikes, v = run(neuron(shifted), 0.55, 4)
    assert spikes == [0, 0, 1, 0]
    assert v == pytest.approx(1.2, abs=1e-6)
    half = snnkernels.convert(wire(), method="opi", T=4, threshold=2.0)
    spikes, v = run(neuron(half), 0.55, 4)
    assert spikes == [0, 1, 0, 0]
    assert v == pytest.approx(1.2, abs=1e-6)


def test_worked_example_of_spreading_the_offset() -> None:
    """Worked example of OPI, equivalences: x = 0.3125, T = 8, c = 1/2, at once and spread."""
    spread = snnkernels.convert(wire(), method=ThresholdReLUMethod(8), T=8, threshold=1.0)
    assert run(neuron(spread), 0.3125, 8)[0] == [0, 0, 1, 0, 0, 1, 0, 1]
    at_once = snnkernels.convert(wire(), method="opi", T=8, threshold=1.0)
    assert run(neuron(at_once), 0.3125, 8)[0] == [0, 1, 0, 0, 1, 0, 0, 1]


def test_the_shift_does_not_follow_T() -> None:
    """Trap: the authors' T of the shift is 32 whatever T a run has."""
    snn = snnkernels.convert(wire(), method="threshold_relu", T=4, threshold=2.0)
    assert float(neuron(snn).bias) == 2.0 / 64
    own = snnkernels.convert(wire(), method=ThresholdReLUMethod(None), T=4, threshold=2.0)
    assert float(neuron(own).bias) == 2.0 / 8


def test_counts_of_constant_currents() -> None:
    """With the shift made for T, count = clip(floor((T x + θ/2) / θ), 0, T), from v_init = 0."""
    T, theta = 8, 2.0
    snn = snnkernels.convert(wire(), method=ThresholdReLUMethod(T), T=T, threshold=theta)
    for x in dyadic(40, seed=3, scale=16, low=-16, high=48).tolist():
        spikes, _ = run(neuron(snn), x, T)
        assert sum(spikes) == min(max(math.floor((T * x + theta / 2) / theta), 0), T)


def test_thresholds_are_maxima_of_layers_over_all_batches() -> None:
    net = make_dyadic(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()))
    batches = [images(4, seed=s) for s in range(3)]
    snn = snnkernels.convert(net.eval(), batches, method="threshold_relu", T=4, progress=False)
    first, second = (layer.node for _, layer in snn.neurons())
    with torch.no_grad():
        maxima = [float(part(torch.cat(batches)).amax()) for part in (net[:2], net)]
    assert float(first.v_threshold) == pytest.approx(maxima[0], rel=1e-6)
    assert float(second.v_threshold) == pytest.approx(maxima[1], rel=1e-6)
    assert first.v_init == 0.0
    assert float(first.bias) == pytest.approx(float(first.v_threshold) / 64)


def test_learned_ceilings_are_not_thresholds() -> None:
    x = torch.tensor([[0.25], [0.75]])
    snn = snnkernels.convert(wire(ClipReLU(4.0)), x, method="threshold_relu", T=4, progress=False)
    assert float(neuron(snn).v_threshold) == 0.75
    with pytest.raises(ValueError, match="loader is None"):
        snnkernels.convert(wire(ClipReLU(4.0)), method="threshold_relu")


def test_v_init_overrides() -> None:
    snn = snnkernels.convert(
        wire(), method="threshold_relu", T=4, threshold=2.0, v_init="half", per_channel=True
    )
    assert neuron(snn).v_init == "half"


# ---- the spiking output layer ------------------------------------------------------------------


def logits_net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), ThresholdReLU(1.0), nn.Linear(16, 4))
    return net.eval()


def test_output_layer_clips_negative_logits() -> None:
    """Trap: an output layer of neurons answers 0 for negative logits; θ is the largest."""
    net = logits_net()
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    method = ThresholdReLUMethod(shift_steps=512, spiking_output=True)
    snn = snnkernels.convert(net, x, method=method, T=512, progress=False)
    assert [name for name, _ in snn.neurons()] == ["1", "spiking_output"]
    output = dict(snn.neurons())["spiking_output"].node
    with torch.no_grad():
        logits = net(x)
        answer = snn(x)
        assert float(output.v_threshold) == float(logits.amax())
        assert (logits < 0).any()
        assert (answer >= 0).all()
        assert (answer - logits.clamp(min=0)).abs().max() < 0.05
        ties = snn(x, T=1)
    assert set(ties.unique().tolist()) <= {0.0, float(output.v_threshold)}
    assert any("output layer spikes" in note for note in snn.report.notes)
    assert snn.report.rows[-1].error < 0.05


def test_output_is_read_out_by_default() -> None:
    net = logits_net()
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    snn = snnkernels.convert(net, x, method="threshold_relu", T=512, progress=False)
    with torch.no_grad():
        assert (snn(x) < 0).any()
    assert any("spiking_output=True" in note for note in snn.report.notes)


class TwoAnswers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 2), nn.ReLU())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return h, 2 * h


def test_output_layer_needs_one_answer() -> None:
    with pytest.raises(ConversionError, match="which must be one tensor; this is a tuple"):
        snnkernels.convert(
            TwoAnswers().eval(),
            torch.ones(1, 2),
            method=ThresholdReLUMethod(spiking_output=True),
            progress=False,
        )


# ---- the training shift ------------------------------------------------------------------------


def test_training_shift_and_step_shift_cancel() -> None:
    """A network trained with the shift of T_ref: the neurons answer the plain floor staircase."""
    T, V = 8, 2.0
    net = wire(ThresholdReLU(V, shift_steps=T))
    snn = snnkernels.convert(net, method=ThresholdReLUMethod(T), T=T, threshold=V)
    x = dyadic(64, 1, seed=5, scale=16, low=-16, high=48)
    with torch.no_grad():
        wanted = V * torch.floor(x * T / V).clamp(0, T) / T
        assert torch.equal(snn(x), wanted)


def test_training_shift_stays_for_other_methods() -> None:
    net = wire(ThresholdReLU(2.0, shift_steps=4))
    x = torch.tensor([[0.125], [0.75], [3.0]])
    snn = snnkernels.convert(net, x, method="max", T=8, threshold=2.0, progress=False)
    with torch.no_grad():
        assert torch.equal(snn(x), net(x))  # 0, 1/2 and 2 are on the staircase of 8 steps
    with pytest.raises(ConversionError, match="normalize='weights' cannot pass sub"):
        snnkernels.convert(net, x, T=8, normalize="weights", progress=False)


def test_plain_threshold_relu_with_opi_uses_data() -> None:
    x = torch.rand(256, 1, generator=torch.Generator().manual_seed(0)) * 3
    snn = snnkernels.convert(wire(ThresholdReLU(2.0)), x, T=8, progress=False)
    assert 1.5 < float(neuron(snn).v_threshold) <= 2.0


# ---- options -----------------------------------------------------------------------------------


def test_options() -> None:
    with pytest.raises(ValueError, match="shift_steps=0 must be at least 1"):
        ThresholdReLUMethod(0)
    with pytest.raises(TypeError, match="spiking_output=1 must be a bool"):
        ThresholdReLUMethod(spiking_output=1)  # type: ignore[arg-type]
    (row,) = [m for m in snnkernels.methods() if m["name"] == "threshold_relu"]
    assert row["trains"] == "ThresholdReLU"
    assert row["options"] == {"shift_steps": 32, "spiking_output": False}


def test_folded_thresholds_are_the_same_network() -> None:
    net = logits_net()
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    answers = [
        snnkernels.convert(
            net, x, method="threshold_relu", T=16, normalize=how, progress=False
        ).predict_curve(x, [4, 16])
        for how in ("threshold", "weights")
    ]
    for T in (4, 16):
        assert torch.allclose(answers[0][T], answers[1][T], atol=1e-5)
