"""The examples run, on data and networks made here."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from snnkernels import data, models
from snnkernels.conversion.activations import QCFS

pytest.importorskip("safetensors")
Image = pytest.importorskip("PIL.Image")

EXAMPLES = Path(__file__).parent.parent / "examples"
TRAIN, TEST = 24, 10


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Layers this small only wait for a second thread, for long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "convert_cifar10", EXAMPLES / "convert_cifar10.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    assert [row[3] for row in rows] == ["0", "θ/2"]

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
        assert row[4:] == [f"{100 * a:.1f}" for a in (result["ann"], *curve["accuracy"])]

    markdown = (tmp_path / "out.md").read_text(encoding="utf-8")
    assert f"| net | {checkpoint.hash} | max | θ/2 |" in markdown
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
    assert row[2:4] == ["learned", "θ/2"]


def test_errors_are_one_line(example, bundle: Path, weights: Path, tmp_path, capsys) -> None:
    absent = str(tmp_path / "absent")
    assert example.main(["--weights", absent, "--data", str(bundle)]) == 1
    assert capsys.readouterr().err.startswith("FileNotFoundError: no checkpoint at")
    assert example.main(["--weights", str(weights), "--data", absent]) == 1
    assert capsys.readouterr().err.startswith("FileNotFoundError: no CIFAR-10 at")


@pytest.mark.parametrize(
    "extra", [["--ts", "1,x"], ["--ts", "0"], ["--limit", "0"], ["--v-init", "w"]]
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


def test_examples_import_without_running() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert '__name__ == "__main__"' in path.read_text(encoding="utf-8"), path
    assert "snnkernels" in sys.modules
