"""The commands on networks: convert, eval, explain, bench, plot."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import ROOT, in_a_process, optional
from torch import nn

import snnkernels
from snnkernels import cli, files, metrics, models
from snnkernels.commands import datasets, entries, networks

optional("safetensors")

CODE = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(),
                         nn.Flatten(), nn.Linear(96, 12))

network = build()
number = 3

class Holder:
    make = staticmethod(build)

def fails():
    raise KeyError("inner")

def returns_nothing():
    pass

def data(train):
    g = torch.Generator().manual_seed(int(train))
    return [(torch.rand(3, 6, 6, generator=g), i % 12) for i in range(30)]

one = data(True)

def empty():
    return []

def odd():
    return [torch.rand(3, 6, 6)] * 4

def segments():
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with the user's code in net.py."""
    (tmp_path / "net.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that convert wrote; tests do not change it."""
    folder = tmp_path_factory.mktemp("saved")
    (folder / "net.py").write_text(CODE)
    code = f"{folder / 'net.py'}"
    out = folder / "snn"
    argv = ["convert", f"{code}:build", "--data", f"{code}:data", "--T", "4", "--out", str(out)]
    assert cli.main([*argv, "--json"]) == 0
    return out


def run(capsys: Any, *argv: str) -> Any:
    """The document of a command that ends well; stderr must be silent."""
    assert cli.main([*argv, "--json"]) == 0, capsys.readouterr().err
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


def refused(capsys: Any, *argv: str) -> str:
    assert cli.main(list(argv)) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith(f"snnkernels {argv[0]}: ")
    return err


# --- convert --------------------------------------------------------------------------------


def test_convert_writes_a_folder_that_runs_without_the_code(here: Path, capsys: Any) -> None:
    found = run(
        capsys, "convert", "net.py:build", "--data", "net.py:data", "--T", "4", "--out", "snn",
        "--method", "srp:probe=2", "--threshold", "99%", "--no-per-channel",
        "--on-unsupported", "mean", "--calibration", "20",
    )  # fmt: skip
    names = {p.name for p in (here / "snn").iterdir()}
    assert {"model.safetensors", "graph.json", "config.json", "report.html", "report.md",
            "convert.json", "activations.safetensors"} <= names  # fmt: skip
    assert os.listdir(here).count("snn") == 1
    assert not [name for name in os.listdir(here) if name.endswith((".new", ".old"))]
    told = json.loads((here / "snn" / "convert.json").read_text())
    assert {**told, "folder": "snn", "run": found["run"], "notes": found["notes"]} == found
    assert told["model"] == {"name": "build", "entry": "net.py:build"}
    assert told["method"] == "srp(probe=2)"
    assert told["arguments"] == {
        "threshold": "99%", "per_channel": False, "on_unsupported": "mean"
    }  # fmt: skip
    assert told["latency steps"] == 6
    assert told["data"]["calibration images"] == 20
    assert len(told["data"]["calibration sha256"]) == len(told["sha256"]) == 64
    assert told["input"] == {"shape": [3, 6, 6], "dtype": "float32"}
    assert [row["T"] for row in told["accuracy"]["rows"]] == [1, 2, 4]
    assert told["command"].startswith("snnkernels convert net.py:build --data")
    html = (here / "snn" / "report.html").read_text()
    assert "build as a spiking network" in html
    assert "srp(probe=2)" in html
    assert (here / "snn" / "report.md").read_text().startswith("# build as a spiking network")
    # The card is that of the folder, and everybody may read what a colleague gets.
    card = (here / "snn" / "README.md").read_text()
    assert "\n# snn\n" in card
    assert 'snnkernels.load_pretrained("snn")' in card
    usual = here / "usual"
    usual.write_text("")
    assert {p.stat().st_mode for p in (here / "snn").iterdir()} == {usual.stat().st_mode}
    # What the folder gives is what convert made, and the command that is printed runs.
    code = (
        "import sys, torch, snnkernels\n"
        f"snn = snnkernels.load_pretrained({str(here / 'snn')!r})\n"
        "assert not [m for m in sys.modules if 'net' == m or m.startswith('_snnkernels_entry')]\n"
        "g = torch.Generator().manual_seed(5)\n"
        "with torch.no_grad():\n"
        "    print(snn(torch.rand(2, 3, 6, 6, generator=g)).tolist())\n"
    )
    done = in_a_process(code)
    assert done.returncode == 0, done.stderr
    ann = entries.object_of("net.py:build")().eval()
    calibration = torch.stack([x for x, _ in entries.object_of("net.py:data")(True)[:20]])
    from snnkernels.conversion.methods import SRP

    snn = snnkernels.convert(
        ann, calibration, method=SRP(probe=2), T=4, threshold="99%", per_channel=False,
        on_unsupported="mean", progress=False,
    )  # fmt: skip
    x = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert torch.allclose(torch.tensor(json.loads(done.stdout)), snn(x), atol=1e-5)
    assert found["run"] == "snnkernels eval snn --data net.py:data"
    assert run(capsys, *found["run"].split()[1:])["images"] == 30


def test_convert_tells_people_what_to_do_next(here: Path, capsys: Any) -> None:
    argv = ["convert", "net.py:Holder.make", "--data", "net.py:one", "--T", "2"]
    assert cli.main([*argv, "--images", "8"]) == 0
    said = capsys.readouterr().out
    assert "Accuracy (%) on 8 test images" in said
    assert "\n    snnkernels eval make_snn --data net.py:one\n" in said
    assert "report.html" in said
    # Again: refused, then replaced.
    before = (here / "make_snn" / "convert.json").stat().st_mtime_ns
    assert "make_snn exists: name another folder, or pass --force" in refused(capsys, *argv)
    assert (here / "make_snn" / "convert.json").stat().st_mtime_ns == before
    (here / "make_snn" / "mine.txt").write_text("x")
    assert cli.main([*argv, "--force"]) == 0
    assert not (here / "make_snn" / "mine.txt").exists()
    assert sorted(os.listdir(here)) == sorted({*os.listdir(here)})
    assert not [name for name in os.listdir(here) if name.startswith(".make")]


def test_nothing_stays_of_a_conversion_that_fails(
    here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["convert", "net.py:build", "--data", "net.py:data", "--T", "2", "--out", "deep/snn"]
    from snnkernels import html_report

    def fail(*args: Any, **options: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(html_report, "to_html", fail)
    assert "OSError: disk full" in refused(capsys, *argv)
    assert os.listdir(here / "deep") == []


def test_a_missing_package_is_told_before_the_work(
    here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setattr(entries, "object_of", lambda entry: pytest.fail("ran"))
    error = refused(capsys, "convert", "net.py:build", "--data", "net.py:data")
    assert "pip install 'snnkernels[hub]'" in error


def test_convert_without_data_where_thresholds_are_given(here: Path, capsys: Any) -> None:
    found = run(
        capsys, "convert", "net.py:network", "--threshold", "1.5", "--v-init", "0.25", "--T", "2"
    )
    assert found["data"] is None
    assert found["input"] is None
    assert found["accuracy"] is None
    snn = snnkernels.load_pretrained("network_snn")
    (_, first), _ = snn.neurons()
    assert float(first.node.threshold) == 1.5
    assert float(first.node.v_init) == 0.25
    assert "--data is needed" in refused(capsys, "eval", "network_snn")
    assert "--data is needed" in refused(capsys, "bench", "network_snn")
    assert "loader is None, but threshold='mmse'" in refused(
        capsys, "convert", "net.py:network", "--out", "other"
    )


def test_a_checkpoint_and_weights(here: Path, capsys: Any) -> None:
    optional("sklearn")
    torch.manual_seed(0)
    models.save_checkpoint(models.small_cnn().eval(), "cnn.safetensors", "small_cnn")
    argv = ("--data", "digits", "--T", "2", "--calibration", "32", "--images", "16")
    found = run(capsys, "convert", "cnn.safetensors", *argv, "--out", "cnn")
    assert found["model"]["architecture"] == "small_cnn"
    assert len(found["data"]["classes"]) == 10
    net = entries.object_of("net.py:build")()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.rand_like(p) - 0.4)
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, "w.pt")
    from safetensors.torch import save_file

    save_file(net.state_dict(), "w.safetensors")
    for name in ("w.pt", "w.safetensors"):
        given = networks.load_model("net.py:build", Path(name))
        for key, value in given.model.state_dict().items():
            assert torch.equal(value, net.state_dict()[key])
        assert len(given.about["sha256"]) == 64
    error = refused(capsys, "convert", "w.safetensors", *argv)
    assert "file.py:factory with --weights w.safetensors" in error


def test_an_old_torch_is_no_safe_reader_of_its_own_format(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    state = entries.object_of("net.py:build")().state_dict()
    torch.save(state, "w.pt")
    save_file(state, "w.safetensors")
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.9.1+cpu"))
    with pytest.warns(UserWarning, match=r"--weights=w.pt: with torch 2.9.1.*CVE-2026-24747"):
        networks.load_model("net.py:build", Path("w.pt"))
    networks.load_model("net.py:build", Path("w.safetensors"))
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.10.0"))
    networks.load_model("net.py:build", Path("w.pt"))


def test_a_sweep_takes_entries(here: Path, capsys: Any) -> None:
    argv = ("--data", "net.py:data", "--methods", "opi", "--T", "1", "2", "--no-plot")
    found = run(capsys, "sweep", "net.py:build", *argv)
    assert [(row["T"], row["trial"]) for row in found["rows"]] == [(1, "opi"), (2, "opi")]
    name, digest = found["rows"][0]["network"].split()
    assert name == "build"
    assert len(digest) == 12
    # Known again by its weights, whoever brings them; others are another network.
    rows = Path("snnkernels_sweep/sweep.csv").read_text()
    run(capsys, "sweep", "net.py:network", "net.py:build", *argv)
    assert Path("snnkernels_sweep/sweep.csv").read_text().startswith(rows)
    net = entries.object_of("net.py:build")()
    torch.save({k: -v for k, v in net.state_dict().items()}, "w.pt")
    other = run(capsys, "sweep", "net.py:build", "--weights", "w.pt", *argv)["rows"][0]["network"]
    assert other.split()[0] == "build"
    assert other.split()[1] != digest
    assert "--weights=w.pt is for one entry, got 2" in refused(
        capsys, "sweep", "net.py:build", "net.py:network", "--weights", "w.pt", *argv
    )


def test_errors_of_convert_name_argument_value_and_remedy(here: Path, capsys: Any) -> None:
    (here / "broken.py").write_text("import no_such_package_at_all\n")
    torch.save({"weight": torch.zeros(1)}, "small.pt")
    torch.save(nn.Linear(1, 1), "module.pt")
    torch.save({"0.weight": 3}, "numbers.pt")
    (here / "text.pt").write_text("text")
    data = ("--data", "net.py:data")
    for argv, says in (
        (("nothing",), "model='nothing' is neither an entry"),
        (("no.safetensors",), "nor a .safetensors file that exists"),
        (("no.py:build",), "no file no.py"),
        (("no_such_module:build",), "no_such_module cannot be imported"),
        (("broken.py:build",), "ModuleNotFoundError: No module named 'no_such_package_at_all'"),
        (("net.py:nothing",), "net.py has no 'nothing'"),
        (("net.py:",), "is no entry"),
        (("net.py:number",), "'net.py:number' is a int, neither function nor network"),
        (("net.py:fails",), "'net.py:fails' failed: KeyError: 'inner'"),
        (("net.py:returns_nothing",), "returned a NoneType, not a torch.nn.Module"),
        (("net.py:build", "--weights", "no.pt"), "--weights=no.pt: no such file"),
        (("net.py:build", "--weights", "small.pt"), "missing 0.weight; missing 0.bias"),
        (("net.py:build", "--weights", "module.pt"), "holds more than tensors"),
        (("net.py:build", "--weights", "numbers.pt"), "holds no state dict"),
        (("net.py:build", "--weights", "text.pt"), "--weights=text.pt"),
        (("net.py:build", "--method", "opl"), "method='opl' is not known"),
        (("net.py:build", "--method", "srp:probe=x"), "probe='x' is not of type int"),
        (("net.py:build", "--method", "opi:threshold=1", "--threshold", "2"), "give one of them"),
        (("net.py:build", "--data", "nowhere"), "--data=nowhere: no such file or folder"),
        (("net.py:build", "--data", "net.py:number"), "expected a data set"),
        (("net.py:build", "--data", "net.py:empty"), "is empty"),
        (("net.py:build", "--data", "net.py:odd"), "an item must be (input, label)"),
        (("net.py:build", *data, "--size", "3"), "--size: only for a folder of images"),
        (("net.py:build", "--size", "3"), "need --data"),
        (("net.py:build", *data, "--images", "-1"), "--images=-1"),
        (("net.py:segments", *data), "not logits [B, classes]"),
        (("net.py:build", *data, "--threshold", "many"), "threshold='many'"),
    ):
        assert says in refused(capsys, "convert", *argv, "--out", "x"), argv
        assert not (here / "x").exists()
    assert "is the current folder" in refused(
        capsys, "convert", "net.py:build", "--out", str(here), "--force"
    )
    assert "--force replaces folders only" in refused(
        capsys, "convert", "net.py:build", "--out", "net.py", "--force"
    )


def test_an_interrupted_conversion_leaves_nothing(
    here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from snnkernels import hub

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "save_pretrained", interrupt)
    assert cli.main(["convert", "net.py:build", "--data", "net.py:data", "--out", "x"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert sorted(os.listdir(here)) in (["net.py"], ["__pycache__", "net.py"])


def test_new_folders_are_whole(tmp_path: Path) -> None:
    with files.new_folder(tmp_path / "a" / "b") as new:
        (new / "x").write_text("1")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "x").read_text() == "1"

    def half() -> None:
        with files.new_folder(tmp_path / "a" / "b", force=True) as new:
            (new / "x").write_text("2")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert (tmp_path / "a" / "b" / "x").read_text() == "1"
    assert os.listdir(tmp_path / "a") == ["b"]
    with files.new_folder(tmp_path / "a" / "b", force=True) as new:
        (new / "y").write_text("3")
    assert os.listdir(tmp_path / "a") == ["b"]
    assert os.listdir(tmp_path / "a" / "b") == ["y"]


def test_a_new_folder_that_cannot_be_moved_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "b"
    target.mkdir()
    (target / "x").write_text("1")
    rename = Path.rename

    def failing(self: Path, to: Any) -> Path:
        if self.suffix == ".new":
            raise OSError("in use")
        return rename(self, to)

    def again() -> None:
        with files.new_folder(target, force=True) as new:
            (new / "y").write_text("2")

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="in use"):
        again()
    assert os.listdir(tmp_path) == ["b"]
    assert os.listdir(target) == ["x"]


# --- eval -----------------------------------------------------------------------------------


def test_eval_measures_what_the_network_does(saved: Path, capsys: Any) -> None:
    code = str(saved.parent / "net.py")
    argv = ("eval", str(saved), "--data", f"{code}:data")
    found = run(capsys, *argv, "--T", "1", "3", "--images", "20", "--batch-size", "7")
    snn = snnkernels.load_pretrained(saved)
    items = entries.object_of(f"{code}:data")(False)[:20]
    x, y = torch.stack([i for i, _ in items]), torch.tensor([i for _, i in items])
    for row, T in zip(found["rows"], (1, 3), strict=True):
        with torch.no_grad():
            order = snn(x, T=T).topk(5).indices
        assert row["T"] == row["latency steps"] == T
        assert row["accuracy"] == float((order[:, 0] == y).double().mean())
        assert row["top-5"] == float((order == y[:, None]).any(1).double().mean())
        counted = metrics.synaptic_operations(snn, x[:16], T=T)
        assert row["synaptic operations"] == pytest.approx(counted.additions)
        assert row["energy pJ"] == pytest.approx(metrics.energy(counted).snn)
        rates = metrics.firing_rates(snn, x[:16], T=T)
        mean = sum(float(r) for r in rates.values()) / len(rates)
        assert row["spikes per neuron and step"] == pytest.approx(mean)
        assert row["ms per image"] > 0
    lowered = run(capsys, *argv, "--T", "3", "--images", "20", "--engine")
    assert lowered["engine"] is True
    assert lowered["rows"][0]["accuracy"] == found["rows"][1]["accuracy"]
    assert cli.main([*argv, "--images", "8"]) == 0
    said = capsys.readouterr().out
    assert "8 images of" in said
    assert "The ANN at conversion, on 30 images" in said


def test_predictions_of_a_folder_of_images(here: Path, capsys: Any) -> None:
    image = optional("PIL.Image")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for i in range(6):
            path = here / "photos" / split / ("ant", "bee", "cat")[i % 3] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.fromarray(rng.integers(0, 256, (9, 7, 3), np.uint8)).save(path)
    mean = ("--mean", "0.5", "0.5", "0.5", "--std", "0.25", "0.25", "0.25")
    found = run(
        capsys, "convert", "net.py:build", "--data", "photos", "--size", "6", *mean, "--T", "2"
    )
    assert found["data"]["options"] == {"size": 6, "mean": [0.5] * 3, "std": [0.25] * 3}
    # eval knows them, from the folder alone.
    found = run(capsys, "eval", "build_snn", "--predict", "p.csv")
    assert found["images"] == 6
    rows = list(csv.DictReader(Path("p.csv").read_text().splitlines()))
    assert [row["label"] for row in rows] == ["ant", "ant", "bee", "bee", "cat", "cat"]
    assert rows[0]["image"] == str(Path("photos/val/ant/0.png"))
    snn = snnkernels.load_pretrained("build_snn")
    options = {"size": 6, "mean": [0.5] * 3, "std": [0.25] * 3}
    x, _ = datasets.load_data("photos", False, options=options)[:]
    with torch.no_grad():
        logits = snn(x)
    names = ["ant", "bee", "cat", *map(str, range(3, 12))]
    assert [row["prediction"] for row in rows] == [names[i] for i in logits.argmax(1)]
    sure = logits.softmax(1).amax(1)
    assert [float(row["confidence"]) for row in rows] == pytest.approx(sure.tolist(), abs=1e-4)
    # New images, without classes.
    (here / "new").mkdir()
    (here / "photos" / "val" / "ant" / "0.png").rename(here / "new" / "0.png")
    found = run(capsys, "eval", "build_snn", "--data", "new", "--predict", "new.csv")
    assert found["rows"][0]["accuracy"] is None
    (row,) = csv.DictReader(Path("new.csv").read_text().splitlines())
    assert row["label"] == ""
    assert row["prediction"] == rows[0]["prediction"]
    for argv, says in (
        (("--mean", "0.5"), "one value each"),
        (("--predict", "no/p.csv"), "its folder does not exist"),
        (("--device", "abacus"), "allowed: cpu, cuda, cuda:N"),
        (("--device", "meta"), "allowed: cpu, cuda, cuda:N"),
        (("--device", "cuda:77"), "--device=cuda:77: torch sees"),
    ):
        assert says in refused(capsys, "eval", "build_snn", *argv)
    assert run(capsys, "eval", "build_snn", "--device", "cpu", "--images", "2")["images"] == 2


def test_eval_refuses_what_is_no_saved_network(here: Path, saved: Path, capsys: Any) -> None:
    assert "no folder nowhere" in refused(capsys, "eval", "nowhere")
    (here / "empty").mkdir()
    assert "empty" in refused(capsys, "eval", "empty")
    import shutil

    shutil.copytree(saved, "damaged")
    Path("damaged/convert.json").write_text("{")
    assert "convert.json is damaged" in refused(capsys, "eval", "damaged")
    Path("damaged/convert.json").write_text("[]")
    assert "convert.json is damaged" in refused(capsys, "explain", "damaged")
    Path("damaged/convert.json").unlink()
    Path("damaged/activations.safetensors").write_bytes(b"nothing")
    assert "activations.safetensors is damaged" in refused(capsys, "eval", "damaged")


def test_a_folder_does_not_choose_which_code_runs(
    here: Path, saved: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(entry: str) -> Any:
        raise AssertionError(entry)

    monkeypatch.setattr(entries, "object_of", never)
    for command in (("eval",), ("plot", "--kind", "rates")):
        error = refused(capsys, command[0], str(saved), *command[1:])
        assert "code is run only where it is asked for: --data " in error
    about = json.loads((saved / "convert.json").read_text())
    about["data"]["source"] = "photos"  # a folder that the colleague lacks is no code
    copy = here / "copy"
    shutil.copytree(saved, copy)
    (copy / "convert.json").write_text(json.dumps(about))
    error = refused(capsys, "eval", str(copy))
    assert error.rstrip().endswith("converted with 'photos', which is no file or folder here")


# --- explain, bench -------------------------------------------------------------------------


def test_explain(saved: Path, capsys: Any) -> None:
    found = run(capsys, "explain", str(saved), "--engine")
    report = snnkernels.load_pretrained(saved).report
    assert [node["name"] for node in found["nodes"]] == [row.name for row in report.rows]
    assert found["notes"] == report.notes
    layers = [row["name"] for row in found["engine"]["layers"]]
    assert len(layers) == 2
    assert found["engine"]["not lowered"] is None
    assert set(found["engine"]["passes"]) >= {"count_at_end", "reuse_buffers"}
    assert cli.main(["explain", str(saved)]) == 0
    said = capsys.readouterr().out
    assert "largest part of single layers' errors" in said
    assert "The engine" not in said


def test_bench_of_networks(saved: Path, capsys: Any) -> None:
    found = run(capsys, "bench", str(saved), "--T", "1", "2", "--batch", "3", "--rounds", "2")
    assert [(row["T"], row["batch"]) for row in found["rows"]] == [(1, 3), (2, 3)]
    for row in found["rows"]:
        ratio = row["converted ms"] / row["lowered ms"]
        assert row["converted over lowered"] == pytest.approx(ratio)
        assert row["lowered over ANN"] is None
        assert row["same predictions"] == 1.0
    code = str(saved.parent / "net.py")
    argv = ("bench", f"{code}:build", "--data", f"{code}:data", "--batch", "2", "--T", "2")
    found = run(capsys, *argv, "--rounds", "1")
    (row,) = found["rows"]
    assert row["lowered over ANN"] == pytest.approx(row["lowered ms"] / row["ANN ms"])
    assert cli.main([*argv, "--rounds", "1"]) == 0
    said = capsys.readouterr().out
    assert "lowered is times faster" in said
    assert "medians of 1 calls, interleaved" in said
    assert "there are 30 images only" in refused(capsys, *argv[:-2], "--batch", "31")
    assert "--data is needed" in refused(capsys, "bench", f"{code}:build")
    assert "--method=srp: a saved network has been converted" in refused(
        capsys, "bench", str(saved), "--method", "srp"
    )


def test_bench_of_the_neuron(capsys: Any) -> None:
    available = {row.name: row.available for row in snnkernels.backend_info().rows}
    argv = ("bench", "--neuron", "--T", "2", "--batch", "2", "--neurons", "65", "--rounds", "1")
    if not available["cpu"]:
        assert "there is no fused CPU kernel here" in refused(capsys, *argv)
        return
    (row,) = run(capsys, *argv)["neuron"]
    assert row["reference over fused"] == pytest.approx(row["reference ms"] / row["fused ms"])
    assert "one of the two" in refused(capsys, "bench")
    assert "one of the two" in refused(capsys, "bench", "x", "--neuron")
    assert "no meaning with --neuron" in refused(capsys, *argv, "--data", "digits")


# --- plot -----------------------------------------------------------------------------------


KINDS = ("accuracy", "energy", "errors", "correlation", "activation", "rates", "raster",
         "membrane", "layers")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture(kind: str, saved: Path, tmp_path: Path, capsys: Any) -> None:
    optional("matplotlib")
    out = tmp_path / f"{kind}.png"
    data = ("--data", f"{saved.parent / 'net.py'}:data")
    argv = ("plot", str(saved), "--kind", kind, "--out", str(out), "--dpi", "40", *data)
    found = run(capsys, *argv)
    assert found == {
        "source": str(saved), "kind": kind, "picture": str(out), "bytes": out.stat().st_size
    }  # fmt: skip
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert os.listdir(tmp_path) == [out.name]
    pixels = np.asarray(optional("PIL.Image").open(out).convert("L"))
    assert pixels.std() > 5


def test_a_sweep_is_drawn_again(tmp_path: Path, capsys: Any) -> None:
    optional("matplotlib")
    from snnkernels.sweep import COLUMNS

    path = tmp_path / "sweep.csv"
    rows = [
        dict.fromkeys(COLUMNS, "x") | {"for T": "8", "T": str(T), "extra steps": "0", "ANN": "0.9",
                                       "accuracy": str(T / 10), "binary": "True", "images": "10"}
        for T in (1, 2, 4)
    ]  # fmt: skip
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    for name, head in (("a.svg", b"<?xml"), ("a.pdf", b"%PDF"), ("a.png", b"\x89PNG")):
        run(capsys, "plot", str(path), "--out", str(tmp_path / name))
        assert (tmp_path / name).read_bytes().startswith(head)
    assert "has accuracy only" in refused(capsys, "plot", str(path), "--kind", "errors")
    path.write_text("a,b\n1,2\n")
    assert "is not the CSV of a sweep" in refused(capsys, "plot", str(path))


def test_plot_refuses(saved: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    optional("matplotlib")
    for argv, says in (
        (("--out", "x.gif"), "must end in .png, .svg, .pdf"),
        (("--out", "nowhere/x.png"), "its folder does not exist"),
        (("--kind", "raster", "--layer", "9"), "--layer=9 is none of 1, 3"),
        (("--kind", "activation", "--layer", "9"), "--layer=9 is none of 1, 3"),
        (("--kind", "raster", "--image", "99"), "there are images 0 to 29"),
    ):
        data = ("--data", f"{saved.parent / 'net.py'}:data")
        assert says in refused(capsys, "plot", str(saved), *argv, *data), argv
    assert "no folder" in refused(capsys, "plot", "nowhere")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in refused(capsys, "plot", str(saved))


@pytest.mark.parametrize(
    ("method", "raster", "membrane"),
    [
        ("signed", None, None),
        ("ttfs", "neurons of ttfs run all steps at once", "run all steps at once"),
        ("multi_threshold", None, "neurons of multi_threshold have no membranes to draw"),
        ("parallel", "neurons of parallel run all steps at once", "run all steps at once"),
    ],
)
def test_one_layer_of_every_kind_of_neuron(
    here: Path, capsys: Any, method: str, raster: str | None, membrane: str | None
) -> None:
    optional("matplotlib")
    ann, items = entries.object_of("net.py:build")(), entries.object_of("net.py:data")(False)
    x = torch.stack([item[0] for item in items])
    snn = snnkernels.convert(ann, x, method=method, T=4, progress=False)
    snn.save_pretrained("net")
    for kind, says in (("raster", raster), ("membrane", membrane)):
        argv = ("plot", "net", "--kind", kind, "--data", "net.py:data", "--out", f"{kind}.svg")
        if says is None:
            run(capsys, *argv)
            assert Path(f"{kind}.svg").stat().st_size > 1000
        else:
            assert says in refused(capsys, *argv)
            assert not Path(f"{kind}.svg").exists()


def test_pictures_of_what_was_not_measured(here: Path, capsys: Any) -> None:
    optional("matplotlib")
    snn = snnkernels.convert(entries.object_of("net.py:build")(), T=4, threshold=1.0)
    snn.save_pretrained("net")
    for kind in ("accuracy", "energy"):
        says = refused(capsys, "plot", "net", "--kind", kind)
        assert "net has no accuracies: convert with --data and --images, or plot a sweep" in says
    assert "no sample of activations" in refused(capsys, "plot", "net", "--kind", "activation")


def test_rows_of_a_sweep_that_are_no_measurements(tmp_path: Path, capsys: Any) -> None:
    optional("matplotlib")
    from snnkernels.sweep import COLUMNS

    path = tmp_path / "sweep.csv"
    good = dict.fromkeys(COLUMNS, "x") | {
        "for T": "8", "T": "1", "extra steps": "0", "ANN": "0.9", "accuracy": "0.5",
        "binary": "True", "images": "10",
    }  # fmt: skip
    for field in ("T", "accuracy", "ANN"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerow({**good, field: "many"})
        assert "has a row that is no measurement" in refused(capsys, "plot", str(path)), field
    assert os.listdir(tmp_path) == ["sweep.csv"]


# --- the manual -----------------------------------------------------------------------------


def test_the_manual_shows_what_the_parser_takes() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    lines = re.findall(r"^snnkernels (.*)$", text, re.M)
    commands = [cli._parser().parse_args(shlex.split(line)).command for line in lines]
    assert set(commands) == {"info", "methods", "demo", "convert", "eval", "explain", "sweep",
                             "bench", "plot"}  # fmt: skip
    for kind in KINDS:
        assert f"| `{kind}` |" in text
    for code in (0, 1, 2, 130):
        assert f"| {code} |" in text
