"""What is logged for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import optional
from torch import nn

import snnkernels
from snnkernels import convert, metrics


class Writer:
    def __init__(self) -> None:
        self.scalars: dict[str, tuple[float, int]] = {}
        self.histograms: dict[str, tuple[Any, int]] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        assert tag not in self.scalars
        self.scalars[tag] = (value, step)

    def add_histogram(self, tag: str, values: Any, step: int) -> None:
        self.histograms[tag] = (values, step)


@pytest.fixture(scope="module")
def snn() -> Any:
    torch.manual_seed(0)
    ann = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU()).eval()
    return convert(ann, torch.rand(16, 3), T=4, progress=False)


def test_values_are_those_of_the_metrics(snn: Any) -> None:
    x, writer = torch.rand(6, 3), Writer()
    snnkernels.log_to_tensorboard(snn, writer, x, 7, tag="net")
    rates = metrics.firing_rates(snn, x, per="neuron")
    for name, layer in snn.neurons():
        assert writer.scalars[f"net/rate/{name}"] == (float(rates[name].mean()), 7)
        silent = float((rates[name] == 0).double().mean())
        assert writer.scalars[f"net/silent/{name}"] == (silent, 7)
        assert torch.equal(writer.histograms[f"net/rates/{name}"][0], rates[name])
        theta = writer.histograms[f"net/threshold/{name}"][0]
        assert torch.equal(theta, torch.as_tensor(layer.node.threshold).double().flatten())
    found = metrics.synaptic_operations(snn, x)
    assert writer.scalars["net/synaptic_operations"] == (found.additions, 7)
    assert writer.scalars["net/spikes"] == (found.spikes, 7)
    assert writer.scalars["net/energy_pJ"] == (metrics.energy(found).snn, 7)
    assert len(writer.scalars) == 7


def test_a_folder_is_written(snn: Any, tmp_path: Path) -> None:
    optional("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for step in range(2):
        snnkernels.log_to_tensorboard(snn, tmp_path, torch.rand(6, 3), step, T=2)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert "snn/rate/1" in events.Tags()["scalars"]
    assert sorted(e.step for e in events.Scalars("snn/rate/1")) == [0, 1]
    assert "snn/threshold/3" in events.Tags()["histograms"]


def test_what_is_refused(snn: Any, tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(TypeError, match="got list without add_scalar"):
        snnkernels.log_to_tensorboard(snn, [], torch.rand(2, 3), 0)
    with pytest.raises(TypeError, match="must be a converted network"):
        snnkernels.log_to_tensorboard(nn.Linear(1, 1), Writer(), torch.rand(2, 1), 0)
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'snnkernels\[tensorboard\]'"):
        snnkernels.log_to_tensorboard(snn, tmp_path / "runs", torch.rand(2, 3), 0)
