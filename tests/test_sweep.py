"""The sweep: rows, what is read back, the table, the command."""

from __future__ import annotations

import csv
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from support import optional
from torch import Tensor, nn

from snnkernels import cli, models, sweep
from snnkernels.conversion import ConversionError
from snnkernels.conversion.methods import COS, METHODS, SRP, STBIF, ThresholdReLUMethod
from snnkernels.sweep import Trial, parse_trial


class Digits:
    """Twelve inputs whose class is their largest value."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.x = torch.rand(12, 5, generator=g)
        self.y = self.x.argmax(1)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


@pytest.fixture
def ann() -> nn.Module:
    net = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5)).eval()
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight.copy_(torch.eye(5))
            layer.bias.zero_()
    return net


def run(ann: nn.Module, trials: list[Trial], **more: Any) -> list[dict[str, Any]]:
    test = Digits()
    return sweep.sweep(
        ann, test, test.x, trials, more.pop("steps", (1, 4, 64)), network="net", data="digits",
        for_T=16, batch_size=5, **more,
    )  # fmt: skip


def test_accuracies_are_those_of_the_network(ann: nn.Module) -> None:
    rows = run(ann, [parse_trial("opi:threshold=1"), parse_trial("srp:probe=3,threshold=1")])
    assert [(row["trial"], row["T"]) for row in rows] == [
        (name, T) for name in ("opi:threshold=1", "srp:probe=3,threshold=1") for T in (1, 4, 64)
    ]
    x, y = Digits()[:]
    for row in rows[:3]:
        # One layer on a constant current: the staircase, ties to the first class.
        a = torch.floor(x * row["T"] + 0.5).clamp(0, row["T"])
        assert row["accuracy"] == round(float((a.argmax(1) == y).float().mean()), 6)
        assert row["as ANN"] == row["accuracy"]
        assert row["ANN"] == 1.0
        assert row["extra steps"] == 0
        assert row["binary"] is True
        assert 0 < row["spikes"] < 1
    assert rows[2]["accuracy"] == 1.0
    assert {row["extra steps"] for row in rows[3:]} == {3}
    assert set(rows[0]) == set(sweep.COLUMNS)


def test_rows_are_measured_once(
    ann: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted: list[str] = []
    inner = sweep.convert

    def counting(net: nn.Module, loader: Any, **options: Any) -> Any:
        converted.append(str(options["method"]))
        return inner(net, loader, **options)

    monkeypatch.setattr(sweep, "convert", counting)
    store = tmp_path / "new" / "sweep.csv"
    opi, cos = parse_trial("opi"), parse_trial("cos")
    first = run(ann, [opi], store=store)
    assert converted == ["opi"]
    again = run(ann, [opi, cos], store=store)
    assert converted == ["opi", "cos"]
    assert [float(row["accuracy"]) for row in again[:3]] == [row["accuracy"] for row in first]
    # Other steps, images or thresholds are other rows.
    run(ann, [opi], store=store, steps=(1, 4, 8))
    assert converted == ["opi", "cos", "opi"]
    assert len(list(csv.DictReader(store.read_text().splitlines()))) == 7
    # A process killed while it wrote leaves whole lines only.
    text = store.read_text()
    store.write_text(text[: text.rindex("digits") + 3])
    run(ann, [opi, cos], store=store, steps=(1, 4, 8, 64))
    assert len(list(csv.DictReader(store.read_text().splitlines()))) == 8
    assert not list(tmp_path.glob("**/*.new"))


def test_trials_are_read_from_text() -> None:
    assert parse_trial("srp").method == SRP()
    assert parse_trial("cos:probe=2,iterations=3").method == COS(probe=2, iterations=3)
    assert parse_trial("srp:margin=0.5").method == SRP(margin=0.5)
    trial = parse_trial("opi:v_init=25%,threshold=0.5,per_channel=False")
    assert trial.arguments == {"v_init": "25%", "threshold": 0.5, "per_channel": False}
    assert parse_trial("burst:group=False").method.group is False
    for text, says in (
        ("spr", "method='spr' is not known"),
        ("srp:tau=3", "'tau=3' must be OPTION=VALUE with one of probe, margin, threshold"),
        ("srp:probe", "'probe' must be OPTION=VALUE"),
        ("srp:probe=x", "probe='x' is not of type int"),
        ("burst:group=1", "group='1' is not of type bool"),
        ("srp:probe=0", "probe=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=says):
            parse_trial(text)


def test_numbers_of_options_without_a_default_are_whole_where_they_look_it() -> None:
    assert parse_trial("st_bif:levels=8").method == STBIF(levels=8)
    assert parse_trial("threshold_relu:shift_steps=8").method == ThresholdReLUMethod(shift_steps=8)


def test_steps_beyond_a_method_are_not_measured(ann: nn.Module) -> None:
    rows = run(ann, [parse_trial("bit_serial:threshold=1"), parse_trial("opi")], steps=(2, 24, 64))
    assert [row["T"] for row in rows] == [2, 24, 2, 24, 64]
    header, lines = sweep.table(rows)
    assert header[2:] == ["T=2", "T=24", "T=64"]
    assert lines[0][4] == ""


def test_added_steps_of_every_kind() -> None:
    def curve(*extra: int) -> dict[int, dict[str, Any]]:
        return {T: {"extra steps": e} for T, e in zip((1, 2, 8), extra, strict=False)}

    assert sweep.added(curve(4, 4, 4)) == "4"
    assert sweep.added(curve(0, 0, 0)) == "0"
    assert sweep.added(curve(6, 12, 48)) == "6 T"
    assert sweep.added(curve(1, 4, 5)) == "1, 4, 5"
    assert sweep.added(curve(7)) == "7"


def test_what_does_not_convert_is_told_or_raised(ann: nn.Module) -> None:
    trials = [parse_trial(name) for name in ("qcfs", "opi", "rnl")]
    refused: dict[str, str] = {}
    rows = run(ann, trials, refused=refused)
    assert {row["trial"] for row in rows} == {"opi"}
    assert list(refused) == ["qcfs", "rnl"]
    assert "needs QCFS or ClipReLU activations, this is ReLU" in refused["qcfs"]
    with pytest.raises(ConversionError, match="method='qcfs' needs QCFS"):
        run(ann, trials)


def test_nothing_to_sweep(ann: nn.Module) -> None:
    for trials, steps in (([], (1,)), ([parse_trial("opi")], ()), ([parse_trial("opi")], (0, 1))):
        with pytest.raises(ValueError, match="must not be empty, steps at least 1"):
            run(ann, trials, steps=steps)


def test_the_table_parts_what_does_not_compare(ann: nn.Module) -> None:
    rows = run(ann, [parse_trial(text) for text in ("burst", "srp", "opi")])
    header, lines = sweep.table(rows)
    assert header == ["method", "adds", "T=1", "T=4", "T=64"]
    assert [line[:2] for line in lines] == [
        ["srp", "4"], ["opi", "0"], ["", ""], ["burst (not binary)", "0"],
    ]  # fmt: skip


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    optional("sklearn")
    optional("matplotlib")
    torch.manual_seed(0)
    path = tmp_path / "net.safetensors"
    models.save_checkpoint(models.small_cnn().eval(), path, "small_cnn")
    arguments = ["sweep", str(path), "--images", "20", "--calibration", "30", "--T", "1", "2"]
    arguments += ["--methods", "opi", "srp", "signed", "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "net: accuracy (%) on 20 test images of scikit-learn digits" in shown
    assert "signed (not binary)" in shown
    assert (tmp_path / "out" / "sweep.png").stat().st_size > 5000
    assert cli.main([*arguments, "--json", "--no-plot"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["rows"]) == 6
    assert found["picture"] is None
    assert found["csv"] == str(tmp_path / "out" / "sweep.csv")
    assert cli.main([*arguments, "--methods", "opl"]) == 1
    assert "method='opl' is not known" in capsys.readouterr().err
    assert cli.main(["sweep", str(tmp_path / "no.safetensors")]) == 1


def test_without_methods_the_command_tries_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A network trained with plain ReLU: what needs other training is named with its reason."""
    optional("sklearn")
    torch.manual_seed(0)
    path = tmp_path / "net.safetensors"
    models.save_checkpoint(models.small_cnn().eval(), path, "small_cnn")
    arguments = ["sweep", str(path), "--images", "8", "--calibration", "8", "--T", "1", "32"]
    arguments += ["--no-plot"] if find_spec("matplotlib") is None else []
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    refused = {"qcfs", "rnl", "st_bif"}
    words = [line.split()[0] for line in out.splitlines() if line.strip()]
    for name in METHODS:
        assert (f"not converted by {name}: " in err) is (name in refused)
        assert (name in words) is (name not in refused)
    assert "Train with snnkernels' RateNorm" in err


def test_lowered_networks_answer_alike(ann: nn.Module) -> None:
    trials = [parse_trial("opi"), parse_trial("cos")]  # cos runs as it is
    plain, lowered = run(ann, trials), run(ann, trials, engine=True)
    for a, b in zip(plain, lowered, strict=True):
        assert b["hardware"] == a["hardware"] + ", lowered"
        assert {**b, "hardware": ""} == {**a, "hardware": ""}
