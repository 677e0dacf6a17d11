"""Pictures beyond those of test_cli: what they show, what they refuse."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import in_a_process, optional
from torch import Tensor, nn

from snnkernels import convert, metrics, models, plots
from snnkernels.conversion.report import NodeReport, Report
from snnkernels.plots.layers import correlation
from snnkernels.plots.style import shortened

optional("matplotlib")
from matplotlib.figure import Figure  # noqa: E402


@pytest.fixture
def ax() -> Any:
    return Figure(layout="constrained").subplots()


@pytest.fixture(scope="module")
def converted() -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return convert(models.small_cnn().eval(), x, T=4, progress=False), x


def drawn(ax: Any, tmp_path: Path) -> None:
    """It can be drawn, in every format that is offered."""
    for kind in ("png", "svg", "pdf"):
        ax.figure.savefig(tmp_path / f"picture.{kind}")
        assert (tmp_path / f"picture.{kind}").stat().st_size > 1000


def test_accuracy_energy(ax: Any, tmp_path: Path) -> None:
    energies, accuracies = {"a": [1.0, 2.0], "b": [3.0]}, {"a": [0.5, 0.75], "b": [0.6]}
    got = plots.accuracy_energy(energies, accuracies, steps=[4, 8], ann=(9.0, 0.9), ax=ax)
    assert got is ax
    assert [line.get_xdata().tolist() for line in ax.lines[:2]] == [[1.0, 2.0], [3.0]]
    assert [list(line.get_ydata()) for line in ax.lines[:2]] == [[50.0, 75.0], [60.0]]
    assert [text.get_text() for text in ax.texts] == ["T=4", "T=8"]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["a", "b", "ANN (90.0 %)"]
    drawn(ax, tmp_path)
    for energy, acc, more, says in (
        ([1.0], [0.5, 0.6], {}, "1 energies for 2 accuracies"),
        ([], [], {}, "at least one"),
        ([0.0], [0.5], {}, "must be positive and finite, got 0.0"),
        ([math.inf], [0.5], {}, "must be positive and finite, got inf"),
        ([1.0], [0.5], {"ann": (-1.0, 0.5)}, "got -1.0"),
        ({"a": [1.0]}, {"b": [0.5]}, {}, "both must have the same"),
        ([1.0], [0.5], {"steps": [1, 2]}, "one number for each point"),
    ):
        with pytest.raises(ValueError, match=says):
            plots.accuracy_energy(energy, acc, ax=ax, **more)


def test_membrane(ax: Any, tmp_path: Path) -> None:
    v = torch.tensor([[0.5, 0.0], [0.25, 0.75], [0.0, -0.5]])
    spikes = torch.tensor([[0, 0], [1, 0], [1, 1]])
    assert plots.membrane(v, 1.0, spikes=spikes, labels=["a", "b"], ax=ax) is ax
    lines = {tuple(np.asarray(line.get_ydata(), float).tolist()) for line in ax.lines}
    assert {(0.5, 0.25, 0.0), (0.0, 0.75, -0.5), (1.0, 1.0)} <= lines
    marks = [line.get_xdata().tolist() for line in ax.lines if line.get_marker() == "|"]
    assert marks == [[2, 3], [3]]
    assert min(y for line in ax.lines if line.get_marker() == "|" for y in line.get_ydata()) > 1
    drawn(ax, tmp_path)
    plots.membrane(v[:, 0], ax=Figure().subplots())
    plots.membrane(v, torch.tensor([1.0, 2.0]), ax=Figure().subplots())
    for wrong, says in (
        ({"v": torch.zeros(2, 2, 2)}, r"v must be \[T\] or \[T, neurons\]"),
        ({"v": torch.zeros(3, 40)}, "1 to 12 neurons"),
        ({"v": v, "threshold": torch.ones(3)}, "threshold has 3 values; v takes one, or 2"),
        ({"v": v, "labels": ["a"]}, "must have 2 names"),
        ({"v": v, "spikes": torch.zeros(3, 1)}, "spikes has shape"),
    ):
        with pytest.raises(ValueError, match=says):
            plots.membrane(**wrong, ax=ax)


def test_rate_histogram_of_few_layers(ax: Any, tmp_path: Path) -> None:
    rates = {"first": torch.tensor([0.0, 0.0, 0.4, 1.0]), "second": torch.tensor([[0.9, 0.1]])}
    plots.rate_histogram(rates, bins=2, ax=ax)
    assert [patch.get_data().values.tolist() for patch in ax.patches] == [[75.0, 25.0], [50, 50]]
    assert ax.get_legend().get_texts()[0].get_text() == "first (mean 0.350)"
    drawn(ax, tmp_path)


def test_rate_histogram_of_many_layers(ax: Any, tmp_path: Path) -> None:
    rates = {f"layer {i}": torch.full((4,), i / 10) for i in range(6)}
    rates["layer 5"] = torch.tensor([0.05, 2.5])  # bursts
    plots.rate_histogram(rates, bins=5, ax=ax)
    (mesh,) = ax.collections
    grid = mesh.get_array().filled(0.0).reshape(6, 5)
    assert grid.sum(1).tolist() == [100.0] * 6
    assert grid[5].tolist() == [50.0, 0, 0, 0, 50.0]
    assert ax.get_xlim() == (0.0, 2.5)
    assert [t.get_text() for t in ax.get_yticklabels()] == list(rates)
    drawn(ax, tmp_path)


def test_rate_histogram_refuses(ax: Any) -> None:
    for rates, bins, says in (
        ({}, 4, "rates are empty"), (torch.zeros(0), 4, "rates are empty"),
        (torch.tensor([-0.1]), 4, "not negative"), (torch.tensor([math.nan]), 4, "finite"),
        (torch.ones(2), 0, "bins=0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            plots.rate_histogram(rates, bins=bins, ax=ax)


def test_rate_activation(ax: Any, tmp_path: Path) -> None:
    a = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    plots.rate_activation(a, 2 * a, title="layer", ceiling=2.5, ax=ax)
    assert ax.collections[0].get_offsets().tolist() == [[0, 0], [1, 2], [2, 4], [3, 6]]
    assert ax.texts[0].get_text() == "r = 1.0000"
    assert ax.get_title(loc="left") == "layer"
    drawn(ax, tmp_path)
    plots.rate_activation(torch.ones(3), torch.zeros(3), ax=(other := Figure().subplots()))
    assert other.texts[0].get_text() == "constant"
    for one, two in ((torch.ones(3), torch.ones(2)), (torch.ones(0), torch.ones(0))):
        with pytest.raises(ValueError, match="as many, at least one"):
            plots.rate_activation(one, two, ax=ax)


def test_correlation_is_pearsons() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(50, generator=g), torch.rand(50, generator=g)
    assert correlation(x, y) == pytest.approx(np.corrcoef(x.numpy(), y.numpy())[0, 1], rel=1e-5)
    assert correlation(x, torch.ones(50)) is None


def test_error_sources_are_parted(ax: Any, tmp_path: Path) -> None:
    rows = [
        NodeReport("a", "", error=0.5, clipping=0.3, quantisation=0.4, unevenness=0.0, inherited=0),
        NodeReport("b", "", error=math.inf, clipping=math.inf, quantisation=0.0, unevenness=0.0,
                   inherited=0.0),
        NodeReport("c", "", error=0.0, clipping=0.0, quantisation=0.0, unevenness=0.0, inherited=0),
        NodeReport("conv", "every step"),
    ]  # fmt: skip
    plots.error_sources(Report("opi", 4, rows), ax=ax)
    bars = [[bar.get_width() for bar in group] for group in ax.containers]
    assert np.allclose(bars, [[18, 0, 0], [32, 0, 0], [0, 0, 0], [0, 0, 0]])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b", "c"]
    assert any("silent in the ANN" in text.get_text() for text in ax.texts)
    drawn(ax, tmp_path)
    for draw in (plots.error_sources, plots.correlations):
        with pytest.raises(ValueError, match="convert with a loader"):
            draw(Report("opi", 4, rows[3:]), ax=ax)


def test_pictures_of_a_conversion(converted: Any, ax: Any, tmp_path: Path) -> None:
    snn, x = converted
    plots.error_sources(snn.report, ax=ax)
    assert len(ax.get_yticklabels()) == 5
    plots.correlations(snn.report, ax=(second := Figure(layout="constrained").subplots()))
    heights = second.lines[0].get_ydata()
    assert len(heights) == 5
    assert max(heights) > 0.7
    found = metrics.synaptic_operations(snn, x)
    plots.energy_layers(found, ax=(third := Figure(layout="constrained").subplots()))
    cost = metrics.energy(found)
    widths = [[bar.get_width() for bar in group] for group in third.containers]
    assert sum(widths[0]) == pytest.approx(cost.snn / 1e6)
    assert sum(widths[1]) == pytest.approx(cost.ann / 1e6)
    drawn(third, tmp_path)


def test_the_report_keeps_a_sample_of_both(converted: Any) -> None:
    snn, _ = converted
    for name, layer in snn.neurons():
        points = snn.report[name].points
        assert points.shape == (2, 512)
        assert points.dtype == torch.float32
        # Answers are whole numbers of spikes.
        counts = points[1].unsqueeze(1) * 4 / layer._weight().reshape(1, -1)
        assert ((counts - counts.round()).abs() < 1e-4).any(1).all()
    torch.manual_seed(0)
    ann = nn.Sequential(nn.Linear(3, 2), nn.ReLU()).eval()
    few = torch.rand(4, 3)
    report = convert(ann, few, T=8, progress=False).report
    with torch.no_grad():
        assert torch.equal(report["1"].points[0], ann(few).flatten())
    assert "points" not in repr(report)
    assert report["1"].points.shape == (2, 8)


def test_shortened_names_keep_both_ends() -> None:
    assert shortened("layer1.0.relu") == "layer1.0.relu"
    name = shortened("encoder.stages.3.blocks.11.mlp.activation", 20)
    assert len(name) == 20
    assert name.startswith("encode")
    assert name.endswith("activation")


def test_a_figure_is_made_without_axes() -> None:
    code = (
        "import matplotlib; matplotlib.use('Agg')\n"
        "import torch; from snnkernels import plots\n"
        "made = [plots.membrane(torch.zeros(3), 1.0), plots.rate_histogram(torch.rand(9)),\n"
        "        plots.rate_activation(torch.rand(9), torch.rand(9)),\n"
        "        plots.accuracy_energy([1.0], [0.5])]\n"
        "assert len({id(ax.figure) for ax in made}) == 4\n"
    )
    done = in_a_process(code)
    assert done.returncode == 0, done.stderr
