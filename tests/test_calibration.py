"""Calibration piece by piece: loaders, statistics of an activation, the pass, rules by name."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from snnkernels.conversion import ClipReLU, ConversionError, calibration
from snnkernels.conversion.balancing import Balancing
from snnkernels.conversion.calibration import mmse_threshold
from snnkernels.conversion.histogram import Histogram
from snnkernels.conversion.inputs import Inputs
from snnkernels.conversion.ops import Activation
from snnkernels.conversion.source import Source
from snnkernels.distributed.team import Team

DATA = torch.randn(64, 4, generator=torch.Generator().manual_seed(5))


def filled(batch: Tensor) -> Histogram:
    histogram = Histogram(len(batch))
    histogram.update(batch)
    return histogram


# ---- what calibration is told --------------------------------------------------------------------


class Items(Dataset):
    def __init__(self, count: int = 3) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Tensor:
        if i >= self.count:
            raise IndexError(i)
        return torch.full((4,), float(i))


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(DATA.split(16))


class Indexed:
    """A sequence of the old kind: no __iter__."""

    def __getitem__(self, i: int) -> Tensor:
        return DATA.split(16)[i]


WHOLE = torch.zeros(2, 4)
IMAGES, LABELS = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
LOADERS = [DATA, Stream(), Indexed(), [DATA], DATA.split(16), iter([DATA]), [(IMAGES, LABELS)]]
LOADERS += [
    (WHOLE, WHOLE),  # two batches
    [IMAGES, IMAGES],
    (LABELS, LABELS),
    (IMAGES, "name"),
    ("name", IMAGES),
    (IMAGES, LABELS, LABELS),
    (IMAGES,),
]


@pytest.mark.parametrize("loader", LOADERS, ids=lambda v: type(v).__name__)
def test_loaders_of_batches_pass(loader: Any) -> None:
    calibration.check_loader(loader)


@pytest.mark.parametrize(
    ("loader", "says"),
    [
        (Items(), r"loader is a Dataset \(Items\), .*DataLoader\(dataset"),
        ((IMAGES, LABELS), r"loader is a tuple of two .*torch.float32 \(2, 4\) and torch.int64"),
        ([IMAGES, LABELS], "loader is a list of two different tensors"),
        ((IMAGES, IMAGES[:, 0]), "loader is a tuple of two"),
        ((IMAGES, LABELS.view(2, 1)), "loader is a tuple of two"),
        ((LABELS, IMAGES), "loader is a tuple of two"),
        (3, "loader must be an iterable of input batches or one tensor, got int"),
        (None, "loader must be an iterable .* got NoneType"),
    ],
    ids=lambda v: str(v)[:20],
)
def test_what_is_no_loader_of_batches(loader: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        calibration.check_loader(loader)


def test_a_function_of_items_knows_what_a_pair_is() -> None:
    calibration.check_loader((IMAGES, LABELS), inputs=lambda item: item)
    with pytest.raises(TypeError, match="loader is a Dataset"):
        calibration.check_loader(Items(), inputs=lambda item: item)


def test_the_batch_of_an_item() -> None:
    for item in (IMAGES, (IMAGES, LABELS), [IMAGES], (IMAGES,)):
        assert calibration.batch_of(item) is IMAGES
    assert calibration.batch_of({"x": IMAGES}, lambda item: item["x"]) is IMAGES
    several = calibration.batch_of((LABELS, IMAGES), lambda item: (item[1], item[0]))
    assert isinstance(several, Inputs)
    assert several.args == (IMAGES, LABELS)
    for item in ("text", {}, (), [], ("text", IMAGES), 3.0):
        with pytest.raises(TypeError, match=rf"loader must yield .* got {type(item).__name__}\."):
            calibration.batch_of(item)
    with pytest.raises(TypeError, match="inputs must give a tensor"):
        calibration.batch_of(IMAGES, lambda item: 3)
    for inputs in (None, lambda item: item):
        with pytest.raises(TypeError, match="loader yields scalars"):
            calibration.batch_of(torch.tensor(1.0), inputs)
        with pytest.raises(ValueError, match=r"loader yields \(2, 4\) on the meta device"):
            calibration.batch_of(IMAGES.to("meta"), inputs)
    assert calibration.batch_of(torch.zeros(1)).shape == (1,)


def test_batches_go_to_the_device_they_are_wanted_on() -> None:
    pairs = [(IMAGES, LABELS), (IMAGES + 1, LABELS)]
    found = list(calibration.batches(pairs, None))
    assert found[0] is IMAGES
    assert torch.equal(found[1], IMAGES + 1)
    assert [b.device.type for b in calibration.batches(pairs, torch.device("meta"))] == ["meta"] * 2
    assert list(calibration.batches(IMAGES, None)) == [IMAGES]  # one tensor is one batch
    swapped = calibration.batches([(LABELS, IMAGES)], None, lambda item: item[1])
    assert next(swapped) is IMAGES
    with pytest.raises(TypeError, match="loader is a tuple of two"):
        next(calibration.batches((IMAGES, LABELS), None))


# ---- statistics of one activation ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "given", "dim", "channels"),
    [
        ((7, 3, 5, 2), 1, 1, 3),
        ((7, 3, 5, 2), -1, 3, 2),
        ((7, 3), 1, 1, 3),
        ((7, 3), -1, 1, 3),
        ((7,), 1, 0, 1),
        ((7,), -1, 0, 1),
        ((), 1, 0, 1),
    ],
)
def test_the_channels_of_an_activation(
    shape: tuple[int, ...], given: int, dim: int, channels: int
) -> None:
    seen = calibration.Statistics(torch.Size(shape), torch.float32, given)
    assert (seen.channel_dim, seen.channels, seen.dtype) == (dim, channels, torch.float32)
    a = torch.arange(1.0, 1 + math.prod(shape)).view(shape)
    seen.update("here", a, True)
    assert seen.histogram is not None
    largest = a.movedim(dim, 0).flatten(1).amax(1) if len(shape) > 1 else a.amax().view(1)
    assert torch.equal(seen.histogram.maximum, largest.double())
    assert seen.histogram.total == a.numel() // channels
    layer = calibration.Statistics(torch.Size(shape), torch.float32, given)
    layer.update("here", a, False)
    assert layer.histogram is not None
    assert layer.histogram.maximum.tolist() == [a.amax().item()]
    assert layer.histogram.total == a.numel()


def test_the_channel_dimension_is_the_first_unless_told() -> None:
    assert calibration.Statistics(torch.Size((2, 3, 4)), torch.float32).channels == 3


@pytest.mark.parametrize(("per_channel", "bins"), [(True, 1024), (False, 8192), (None, None)])
def test_bins_are_those_of_the_page(per_channel: bool | None, bins: int | None) -> None:
    """docs/scaling.md: 1024 a channel, 8192 a layer."""
    seen = calibration.Statistics(torch.Size((4, 3)), torch.float32)
    for _ in range(2):
        seen.update("here", torch.ones(4, 3), per_channel)
    assert (None if seen.histogram is None else seen.histogram.bins) == bins
    if seen.histogram is not None:
        assert len(seen.histogram.counts) == (3 if per_channel else 1)
        assert seen.histogram.total == (8 if per_channel else 24)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_activations_of_every_dtype_are_counted(dtype: torch.dtype) -> None:
    seen = calibration.Statistics(torch.Size((2, 1)), dtype)
    # 1/3 has more bits than float32 holds: only float64 keeps them.
    seen.update("here", torch.full((2, 1), 1 / 3, dtype=dtype, requires_grad=True), True)
    assert seen.histogram is not None
    assert seen.histogram.maximum.item() == torch.tensor(1 / 3, dtype=dtype).item()
    assert not seen.histogram.maximum.requires_grad


@pytest.mark.parametrize("per_channel", [True, False, None])
def test_activations_that_give_no_threshold(per_channel: bool | None) -> None:
    seen = calibration.Statistics(torch.Size((2, 3)), torch.float32)
    for a, says in (
        (torch.ones(2, 3, dtype=torch.int64), r"^here: its activations .* are torch.int64, no fl"),
        (torch.tensor([[1.0, math.nan]]), "^here: .* contain NaN on"),
        (torch.tensor([[math.inf, math.nan]]), "^here: .* contain NaN on"),
        (torch.tensor([[1.0, math.inf]]), "^here: .* contain infinite values on"),
        (torch.tensor([[1.0, -math.inf]]), "^here: .* contain infinite values on"),
    ):
        with pytest.raises(ConversionError, match=says):
            seen.update("here", a, per_channel)
    assert seen.histogram is None
    seen.update("here", torch.zeros(0, 3), per_channel)  # nothing is no error
    assert seen.histogram is None or seen.histogram.total == 0


def test_channels_may_not_change_their_number() -> None:
    seen = calibration.Statistics(torch.Size((2, 3)), torch.float32)
    seen.update("here", torch.ones(2, 3), True)
    for channels in (2, 4):
        with pytest.raises(ConversionError, match=f"here: {channels} channels in one batch, 3 in"):
            seen.update("here", torch.ones(2, channels), True)
    assert seen.histogram is not None
    assert seen.histogram.total == 2
    layer = calibration.Statistics(torch.Size((2, 3)), torch.float32)
    for channels in (2, 3, 4):
        layer.update("here", torch.ones(2, channels), False)
    assert layer.histogram is not None
    assert layer.histogram.total == 18


# ---- the pass ------------------------------------------------------------------------------------


class Counted(nn.Module):
    """x, then its activation; remembers its batches. ``fails`` is raised at the second."""

    def __init__(self, fails: Exception | None = None) -> None:
        super().__init__()
        self.act = Activation(nn.ReLU(), "label")
        self.seen: list[int] = []
        self.fails = fails

    def forward(self, x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()  # a graph of the whole ANN would be kept
        self.seen.append(len(x))
        if self.fails is not None and len(self.seen) > 1:
            raise self.fails
        return self.act(x)


def gathered(net: Counted, loader: Any, how: bool | None = True, **named: Any) -> Any:
    source = Source(loader, None, None, Team())
    return calibration.collect(net, {"act": (how, 1)}, source, **named)["act"]


def test_collect_sees_every_batch_once() -> None:
    net, batches = Counted(), DATA.split(20)
    found = gathered(net, batches, progress=False)
    assert net.seen == [20, 20, 20, 4]
    assert torch.equal(found.histogram.maximum, DATA.amax(0).double())
    assert found.histogram.total == 64
    assert (found.shape, found.dtype, found.channels) == ((20, 4), torch.float32, 4)
    with torch.no_grad():
        net(DATA)  # nothing watches any longer
    assert found.histogram.total == 64
    assert not found.histogram.maximum.requires_grad


def test_collect_of_the_first_inputs_alone() -> None:
    net = Counted()
    found = gathered(net, DATA.split(40), once=True)
    assert net.seen == [calibration.SAMPLE]
    assert found.histogram.total == 32
    assert torch.equal(found.histogram.maximum, DATA[:32].amax(0).relu().double())


def test_collect_of_currents() -> None:
    """What the activation receives, not what it gives: its ceiling is not in the way."""
    net = Counted()
    net.act = Activation(ClipReLU(0.25), "label")
    assert gathered(net, DATA).histogram.maximum.amax().item() == 0.25
    found = gathered(net, DATA, currents=True).histogram
    assert torch.equal(found.maximum, DATA.amax(0).relu().double())
    assert int(found.counts.sum()) == int((DATA > 0).sum())


def test_collect_without_a_histogram_checks_and_notes_the_shape() -> None:
    found = gathered(Counted(), DATA, None)
    assert (found.histogram, found.shape) == (None, (64, 4))
    with pytest.raises(ConversionError, match=r"^label: .* NaN"):
        gathered(Counted(), DATA * math.nan, None)


def test_a_rank_that_continues_knows_the_shapes_first(tmp_path: Path) -> None:
    """With a checkpoint the network sees its first inputs once more, which are not counted."""
    net = Counted()
    source = Source(DATA.split(40), None, None, Team(), checkpoint=tmp_path / "statistics")
    found = calibration.collect(net, {"act": (True, 1)}, source, progress=False)["act"]
    assert net.seen == [32, 40, 24]
    assert found.histogram is not None
    assert found.histogram.total == 64


@pytest.mark.parametrize("error", [RuntimeError("shapes"), ConversionError("said"), KeyError("k")])
def test_a_batch_that_fails_is_named_and_nothing_stays(error: Exception) -> None:
    net = Counted(error)
    says = {
        RuntimeError: r"fails on item 1 of loader, of shape \(20, 4\), torch.float32: shapes",
        ConversionError: "^said$",
        KeyError: "k",
    }[type(error)]
    kind = KeyError if isinstance(error, KeyError) else ConversionError
    with pytest.raises(kind, match=says):
        gathered(net, DATA.split(20), progress=False)
    assert not net.act._forward_hooks


@pytest.mark.parametrize(
    ("loader", "progress", "shown"),
    [(DATA.split(16), True, True), (DATA.split(16), False, False), (DATA, True, False)],
)
def test_the_bar_counts_batches_and_is_closed(
    monkeypatch: pytest.MonkeyPatch, loader: Any, progress: bool, shown: bool
) -> None:
    said: list[Any] = []

    def bar_of(loader: Any, team: Team, what: str, show: bool) -> Any:
        said.append((what, show))
        if not show:
            return None
        return SimpleNamespace(
            update=lambda: said.append("batch"), close=lambda: said.append("closed")
        )

    monkeypatch.setattr(calibration, "bar_of", bar_of)
    gathered(Counted(), loader, progress=progress)
    batches = ["batch"] * 4 + ["closed"] if shown else []
    assert said == [("calibrating", shown), *batches]
    said.clear()
    gathered(Counted(), loader)  # shown unless told
    assert said[0] == ("calibrating", not isinstance(loader, Tensor))


# ---- rules ---------------------------------------------------------------------------------------


def test_rules_by_name() -> None:
    for rule in ("mmse", "max", "kl"):
        assert calibration.parse_rule(rule) == rule
    assert isinstance(calibration.parse_rule("ltb"), Balancing)
    for rule, percent in (("99.9%", 99.9), ("100%", 100.0), ("1e-3%", 0.001), ("0.5%", 0.5)):
        assert calibration.parse_rule(rule) == percent
    for rule in ("", "%", "0%", "-1%", "100.1%", "101%", "nan%", "x%", "99.9", "mean", "MAX"):
        with pytest.raises(ValueError, match=f"threshold='{rule}' is not known; allowed: 'mmse'"):
            calibration.parse_rule(rule)


def joined(channels: list[list[float]]) -> list[float]:
    return [value for channel in channels for value in channel]


def ruled(rule: str, values: list[list[float]], v_init: Any = 0.5, T: int = 4) -> Any:
    histogram = filled(torch.tensor(values, dtype=torch.float64))
    theta, dead, silent = calibration.rule_threshold(rule, histogram, T, v_init)
    assert theta.dtype == torch.float64
    return theta.tolist(), dead, silent


@pytest.mark.parametrize("rule", ["max", "mmse", "kl", "50%"])
def test_channels_without_a_value_take_their_layers(rule: str) -> None:
    values = [[1.0, 2.0, 3.0, 4.0], [0.0] * 4, [0.25, 0.5, 0.5, 0.5], [0.0] * 4]
    theta, dead, silent = ruled(rule, values)
    alive = ruled(rule, [values[0], values[2]])[0]
    assert (dead, silent) == ([1, 3], False)
    assert [theta[0], theta[2]] == (alive if rule != "kl" else [theta[0], theta[2]])
    assert theta[1] == theta[3] > 0
    if rule == "max":
        assert theta == [4.0, 4.0, 0.5, 4.0]
    if rule == "mmse":
        # Of all 16 values, the zeros among them, as one channel.
        assert theta[1] == ruled(rule, [joined(values)])[0][0]


def test_a_start_per_channel_is_the_mean_for_the_layer() -> None:
    values = [[1.0, 2.0, 3.0, 4.0], [0.0] * 4]
    starts = torch.tensor([0.25, 1.75])
    theta, dead, _ = ruled("mmse", values, starts, 2)
    assert dead == [1]
    assert theta[0] == ruled("mmse", values[:1], starts[:1], 2)[0][0]
    assert theta[1] == ruled("mmse", [joined(values)], torch.tensor([1.0]), 2)[0][0]
    assert theta[1] != ruled("mmse", [joined(values)], torch.tensor([0.25]), 2)[0][0]


def test_a_percentile_of_nothing_takes_the_layers_largest_value() -> None:
    values = [[0.0] * 9 + [2.0], [0.0] * 9 + [3.0]]
    assert ruled("50%", values) == ([3.0, 3.0], [0, 1], False)


def test_a_layer_without_a_value_takes_one() -> None:
    for rule in ("max", "mmse", "kl", "99%"):
        assert ruled(rule, [[0.0, 0.0], [0.0, 0.0]]) == ([1.0, 1.0], [0, 1], True)


def test_a_layer_of_small_values_is_not_silent() -> None:
    assert ruled("max", [[0.25, 0.5], [0.0, 0.0]]) == ([0.5, 0.5], [1], False)


def test_nothing_is_said_of_channels_that_all_fire() -> None:
    assert ruled("max", [[1.0, 0.5], [0.125, 0.0]]) == ([1.0, 0.125], [], False)


def test_of_equal_candidates_the_largest() -> None:
    """Too far below to fire at all: each candidate leaves the whole activation as its error."""
    below = torch.tensor([-100.0])
    assert mmse_threshold(filled(torch.tensor([[2.0, 1.0, 0.0]])), 4, below).item() == 2.0


def test_the_grid_of_candidates() -> None:
    """From the maximum down to 0.06 of it."""
    assert mmse_threshold(filled(torch.tensor([[1.0]])), 1, 0.0).item() == 1.0
    # 2 and 0, from V: both become V, and (V - 2)^2 + V^2 is least at 1.
    found = mmse_threshold(filled(torch.tensor([[2.0, 0.0]])), 1, 1.0)
    assert found.item() == pytest.approx(1.0, abs=1e-12)
    # Zeros that become V pull it to the end.
    many = filled(torch.tensor([[1.0] + [0.0] * 1000]))
    assert mmse_threshold(many, 1, 1.0).item() == pytest.approx(0.06, abs=1e-12)


def test_every_value_counts_as_often_as_it_is_there() -> None:
    """Zeros too, which no table holds: an absolute start makes the staircase fire on them."""
    rows = [[1.0] + [0.75] * 5 + [0.3], [1.0, 0.7, 0.7, 0.2, 0.0, 0.0, 0.0], [1.0, 1.0] + [0.0] * 5]
    a = torch.tensor(rows, dtype=torch.float64)
    T = 2
    for start in ([0.3, 0.6, 0.3], [0.6, 1.2, 0.5], [0.9, 0.3, 2.0]):
        starts = torch.tensor(start, dtype=torch.float64)
        found = mmse_threshold(filled(a), T, starts)
        for c in range(3):

            def error(V: float, c: int = c, starts: Tensor = starts) -> float:
                level = torch.floor((a[c] * T + starts[c]) / V).clamp(0, T)
                return (a[c] - level * V / T).square().sum().item()

            least = min(error(1 - 0.01 * i) for i in range(95))
            assert error(found[c].item()) == pytest.approx(least, rel=1e-9)
