"""The examples run, on data and networks made here."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from support import optional

from snnkernels import data, models
from snnkernels.conversion.activations import QCFS

optional("safetensors")
Image = optional("PIL.Image")

EXAMPLES = Path(__file__).parent.parent / "examples"
TRAIN, TEST = 24, 10


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Layers this small only wait for a second thread, for long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load("convert_cifar10")


@pytest.fixture(scope="module")
def training() -> Iterator[ModuleType]:
    sys.path.insert(0, str(EXAMPLES))  # as for a script
    yield load("train_cifar10")
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    content = {}
    for split, n in (("train", TRAIN), ("test", TEST)):
        files = []
        for _ in range(n):
            buffer = io.BytesIO()
            pixels = rng.integers(0, 256, (8, 8, 3), np.uint8).repeat(4, 0).repeat(4, 1)
            Image.fromarray(pixels).save(buffer, "JPEG")
            files.append(buffer.getvalue())
        content[f"{split}_bytes"] = np.frombuffer(b"".join(files), np.uint8)
        content[f"{split}_offsets"] = np.cumsum([0, *map(len, files)]).astype(np.int32)
        content[f"{split}_labels"] = rng.integers(0, 10, n).astype(np.uint8)
    path = tmp_path_factory.mktemp("data") / "bundle.npz"
    np.savez(path, **content)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of another layout than any real one, so that nothing depends on VGG-9."""
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    torch.manual_seed(0)
    models.save_checkpoint(models.resnet20(), path, "resnet20")
    return path


def test_table_json_and_markdown(example, bundle: Path, weights: Path, tmp_path, capsys) -> None:
    argv = ["--weights", str(weights), "--data", str(bundle), "--T", "4", "--ts", "1,2,4"]
    argv += ["--threshold", "max", "--calibration", "16", "--batch-size", "4"]
    argv += ["--json", str(tmp_path / "out.json"), "--markdown", str(tmp_path / "out.md")]
    assert example.main(argv) == 0
    checkpoint = models.load_checkpoint(weights)
    printed = capsys.readouterr().out
    assert "CIFAR-10, JPEG copies" in printed
    rows = [line.split() for line in printed.splitlines() if checkpoint.hash in line]
    assert [row[3:7] for row in rows] == [["max", "per", "channel", v] for v in ("0", "θ/2")]

    summary = json.loads((tmp_path / "out.json").read_text())
    assert (summary["test_images"], summary["calibration_images"]) == (TEST, 16)
    assert summary["ts"] == [1, 2, 4]
    (result,) = summary["results"]
    assert result["sha256"] == checkpoint.sha256
    x, y = data.cifar10_jpeg(bundle, train=False)[:]
    with torch.no_grad():
        ann = float((checkpoint.model(x).argmax(1) == y).float().mean())
    assert result["ann"] == pytest.approx(ann)
    assert [c["v_init"] for c in result["curves"]] == [0.0, "half"]
    for row, curve in zip(rows, result["curves"], strict=True):
        assert row[7:] == [f"{100 * a:.1f}" for a in (result["ann"], *curve["accuracy"])]

    markdown = (tmp_path / "out.md").read_text(encoding="utf-8")
    assert f"| net | {checkpoint.hash} | opi | max per channel | θ/2 |" in markdown
    assert "--threshold max" in markdown


def test_accuracies_are_those_of_separate_calls(example, bundle: Path, weights: Path) -> None:
    import snnkernels

    ann = models.load_checkpoint(weights).model
    test = data.cifar10_jpeg(bundle, train=False)
    x, y = test[:]
    snn = snnkernels.convert(ann, [x], T=4, threshold="max", progress=False)
    _, (found,) = example.evaluate(ann, [snn], test, [4, 1], 3, "test")
    with torch.no_grad():
        wanted = [float((snn(x, T=t).argmax(1) == y).double().mean()) for t in (4, 1)]
    assert found == pytest.approx(wanted)


def test_learned_thresholds_and_limit(example, bundle: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "qcfs.safetensors"
    torch.manual_seed(0)
    model = models.resnet20(activation=lambda: QCFS(levels=4))
    models.save_checkpoint(model, path, "resnet20", activation="qcfs", L=4)
    argv = ["--weights", str(path), "--data", str(bundle), "--T", "4", "--ts", "4"]
    assert example.main([*argv, "--v-init", "half", "--limit", "3", "--calibration", "8"]) == 0
    (row,) = [line.split() for line in capsys.readouterr().out.splitlines() if "qcfs " in line]
    assert row[2:5] == ["opi", "learned", "θ/2"]


def test_many_methods_in_one_table(example, bundle: Path, weights: Path, tmp_path, capsys) -> None:
    argv = ["--weights", str(weights), "--data", str(bundle), "--T", "4", "--ts", "2,4"]
    argv += ["--method", "opi", "srp", "burst", "datta", "threshold_relu", "parallel"]
    argv += ["--calibration", "8", "--limit", "3"]
    assert example.main([*argv, "--json", str(tmp_path / "out.json")]) == 0
    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
    curves = result["curves"]
    names = ["opi", "opi", "srp", "burst", "datta", "threshold_relu", "parallel"]
    assert [c["method"] for c in curves] == names
    assert [c["extra_steps"] for c in curves] == [0, 0, 4, 0, 0, 0, 0]
    assert [c["v_init"] for c in curves] == [0.0, "half", "half", "half", 0.0, 0.0, "half"]
    assert curves[4]["threshold"] == "max per layer"
    printed = capsys.readouterr().out
    assert "srp +4 steps" in printed
    assert "burst, not binary" in printed


def test_options_of_methods(example, bundle: Path, weights: Path, capsys) -> None:
    argv = ["--weights", str(weights), "--data", str(bundle), "--T", "2", "--ts", "2"]
    argv += ["--method", "datta:objective=mse", "--v-init", "own,25%"]
    assert example.main([*argv, "--limit", "2", "--calibration", "8"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("datta(objective='mse')") == 2
    assert "datta:objective=mse" in printed
    assert "25%" in printed


def test_errors_are_one_line(example, bundle: Path, weights: Path, tmp_path, capsys) -> None:
    absent = str(tmp_path / "absent")
    assert example.main(["--weights", absent, "--data", str(bundle)]) == 1
    assert capsys.readouterr().err.startswith("FileNotFoundError: no checkpoint at")
    assert example.main(["--weights", str(weights), "--data", absent]) == 1
    assert capsys.readouterr().err.startswith("FileNotFoundError: no CIFAR-10 at")


@pytest.mark.parametrize(
    "extra",
    [
        ["--ts", "1,x"],
        ["--ts", "0"],
        ["--limit", "0"],
        ["--v-init", "w"],
        ["--method", "opi", "nothing"],
        ["--method", "srp:probe"],
        ["--method", "srp:probes=4"],
        ["--method", "srp:probe=0"],
    ],
)
def test_wrong_arguments(example, extra: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        example.main(["--weights", "w", "--data", "d", *extra])
    assert error.value.code == 2


def test_ctrl_c(example, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def interrupt(args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(example, "convert", interrupt)
    assert example.main(["--weights", "w", "--data", "d"]) == 130
    assert "interrupted" in capsys.readouterr().err


# ---- training ----------------------------------------------------------------------------------


def train_argv(bundle: Path, out: Path, *more: str) -> list[str]:
    argv = ["--data", str(bundle), "--out", str(out), "--network", "resnet20", "--limit", "16"]
    return [*argv, "--batch-size", "8", "--epochs", "2", "--device", "cpu", *more]


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


@pytest.mark.parametrize(
    ("name", "more", "method"),
    [
        ("relu", ["--precision", "fp32"], "mmse"),
        ("clip", ["--ceiling", "2"], "opi"),
        ("qcfs", ["--levels", "4", "--gradient", "clip_floor"], "qcfs"),
        ("threshold_relu", ["--shift-steps", "8"], "threshold_relu"),
        ("ratenorm", ["--rate-epochs", "1", "--rate-tolerance", "100"], "rnl"),
    ],
)
def test_train_then_convert(
    training, example, bundle: Path, tmp_path: Path, capsys, name: str, more: list, method: str
) -> None:
    """Every activation: one short training, and the checkpoint converts by its own method."""
    out = tmp_path / f"{name}.safetensors"
    assert training.main(train_argv(bundle, out, "--activation", name, *more)) == 0
    printed = capsys.readouterr().out
    epochs = 3 if name == "ratenorm" else 2
    assert f"epoch {epochs}/{epochs}: loss" in printed
    checkpoint = models.load_checkpoint(out, activations=example.ACTIVATIONS)
    assert checkpoint.metadata["set"] == "CIFAR-10, JPEG copies"
    assert checkpoint.metadata["epochs"] == str(epochs)
    assert f"test accuracy {checkpoint.metadata['accuracy']} %" in printed
    argv = ["--weights", str(out), "--data", str(bundle), "--method", method, "--T", "2"]
    assert example.main([*argv, "--ts", "2", "--limit", "2", "--calibration", "8"]) == 0


@pytest.mark.parametrize(
    ("more", "at"), [([], 1), (["--activation", "ratenorm", "--rate-epochs", "2"], 3)]
)
def test_resumed_training_is_uninterrupted_training(
    training, bundle: Path, tmp_path: Path, monkeypatch, capsys, more: list[str], at: int
) -> None:
    """Killed in the middle of an epoch, then run again: the same bits."""
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    assert training.main(train_argv(bundle, whole, "--rate-tolerance", "100", *more)) == 0
    original = training.evaluate
    seen = []

    def killed(*args: object) -> float:
        seen.append(args)
        if len(seen) == at + 1:
            raise KeyboardInterrupt
        return original(*args)

    argv = train_argv(bundle, parts, "--rate-tolerance", "100", *more)
    monkeypatch.setattr(training, "evaluate", killed)
    assert training.main(argv) == 130
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(training, "evaluate", original)
    assert training.main(argv) == 0
    assert f"{at} of " in capsys.readouterr().out
    a, b = weights_of(whole), weights_of(parts)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert len({k for k in a if not torch.equal(a[k], torch.zeros_like(a[k]))}) > 20


def test_other_settings_do_not_resume(training, bundle: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "net.safetensors"
    assert training.main(train_argv(bundle, out, "--minutes", "0")) == 0
    assert not out.exists()
    assert "time is up" in capsys.readouterr().out
    assert training.main(train_argv(bundle, out)) == 0
    assert training.main(train_argv(bundle, out, "--lr", "0.5")) == 1
    assert "other settings (lr 0.1 -> 0.5)" in capsys.readouterr().err
    assert training.main(train_argv(bundle, out, "--lr", "0.5", "--fresh")) == 0


def test_starts_from_a_checkpoint(training, bundle: Path, tmp_path: Path, capsys) -> None:
    """From ReLU to QCFS and back: the weights go over, what one activation learns stays behind."""
    relu, qcfs, again = (tmp_path / f"{name}.safetensors" for name in ("relu", "qcfs", "again"))
    assert training.main(train_argv(bundle, relu)) == 0
    still = ("--lr", "0", "--epochs", "1")
    argv = train_argv(bundle, qcfs, *still, "--activation", "qcfs", "--ceiling", "3")
    assert training.main([*argv, "--init", str(relu)]) == 0
    argv = train_argv(bundle, again, *still)
    assert training.main([*argv, "--init", str(qcfs)]) == 0
    a, b, c = (weights_of(path) for path in (relu, qcfs, again))
    assert a.keys() == c.keys() < b.keys()
    added = b.keys() - a.keys()
    assert added
    assert all((b[k] == 3).all() for k in added)
    argv = train_argv(bundle, again, *still, "--fresh", "--activation", "clip")
    for more, want in (((), 3), (("--ceiling", "5"), 5)):
        assert training.main([*argv, "--init", str(qcfs), *more]) == 0
        assert all((weights_of(again)[k] == want).all() for k in added)
    weights = [k for k in a if k.endswith("weight")]
    assert all(torch.equal(a[k], b[k]) and torch.equal(a[k], c[k]) for k in weights)
    capsys.readouterr()
    argv = train_argv(bundle, tmp_path / "x.safetensors", "--network", "resnet10")
    assert training.main([*argv, "--init", str(relu)]) == 1
    assert "is a resnet20, not a resnet10" in capsys.readouterr().err


def test_second_stage_keeps_what_costs_little(training) -> None:
    args = training.parse(["--data", "d", "--out", "o", "--epochs", "2", "--rate-tolerance", "1"])
    assert training.kept([[1.0, 50.0], [1.0, 90.0]], args) == (1, 90.0)
    history = [[1.0, 50.0], [1.0, 90.0], [1.0, 89.5], [1.0, 88.0]]
    assert training.kept(history, args) == (2, 89.5)


def test_crops_and_flips(training) -> None:
    """Each is a 32x32 window of the image in a black margin of 4, or its mirror image."""
    images = data.ImageSet(
        torch.arange(1, 1 + 3 * 32 * 32).remainder(251).to(torch.uint8).view(1, 3, 32, 32) + 1,
        torch.zeros(1, dtype=torch.int64),
        name="",
        classes=[],
        mean=(0.0,) * 3,
        std=(1 / 255,) * 3,
    )
    found = training.Images(images, torch.device("cpu"))
    order, rows, columns = training.draw(64, seed=0, epoch=3)
    assert sorted(order.tolist()) == list(range(64))
    again = training.draw(64, seed=0, epoch=3)
    assert torch.equal(again[1], rows)
    assert not torch.equal(training.draw(64, seed=0, epoch=4)[1], rows)
    x, _ = found.batch(torch.zeros(64, dtype=torch.int64), rows, columns)
    assert x.is_contiguous(memory_format=torch.channels_last)
    margin = torch.nn.functional.pad(images.images[0].float(), (4, 4, 4, 4))
    flipped = 0
    for i in range(64):
        top, left = int(rows[i].min()), int(columns[i].min())
        window = margin[:, top : top + 32, left : left + 32]
        if columns[i, 0] > columns[i, 1]:
            window, flipped = window.flip(2), flipped + 1
        assert torch.equal(x[i], window)
    assert 16 < flipped < 48
    plain, _ = found.batch(torch.tensor([0]))
    assert torch.equal(plain[0], images[0][0])


def test_two_processes(bundle: Path, tmp_path: Path) -> None:
    """Under torchrun with gloo: both take half of every batch, one writes."""
    out = tmp_path / "net.safetensors"
    script = str(EXAMPLES / "train_cifar10.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", script]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    argv = train_argv(bundle, out, "--activation", "qcfs")
    done = subprocess.run([*command, *argv], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("epoch 1/2") == done.stdout.count("epoch 2/2") == 1
    state = torch.load(tmp_path / "net.safetensors.state", weights_only=True)
    assert state["settings"]["processes"] == 2
    assert len(state["history"]) == 2
    assert all(torch.equal(v, state["model"][k]) for k, v in weights_of(out).items())


@pytest.mark.parametrize(
    "extra", [["--epochs", "0"], ["--network", "lenet"], ["--activation", "gelu"], ["--limit", "0"]]
)
def test_wrong_arguments_of_training(training, extra: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        training.main(["--data", "d", "--out", "o", *extra])
    assert error.value.code == 2


def test_training_without_data(training, tmp_path: Path, capsys) -> None:
    absent = str(tmp_path / "absent")
    assert training.main(["--data", absent, "--out", str(tmp_path / "o"), "--device", "cpu"]) == 1
    assert capsys.readouterr().err.startswith("FileNotFoundError: no CIFAR-10 at")


def test_examples_import_without_running() -> None:
    for path in EXAMPLES.glob("*_cifar10.py"):
        assert '__name__ == "__main__"' in path.read_text(encoding="utf-8"), path
    assert "snnkernels" in sys.modules
