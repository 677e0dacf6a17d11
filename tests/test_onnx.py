"""ONNX of the rate form: onnxruntime answers as our parallel network does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_helpers import Everything, dyadic, images, make_dyadic
from support import optional
from torch import Tensor, nn

import snnkernels
from snnkernels.conversion.errors import ConversionError
from snnkernels.conversion.methods import Burst
from snnkernels.interop.rates import rate_form

X = images(4, size=4)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3)),
    ).eval()


def session(path: Path) -> Any:
    runtime = optional("onnxruntime")
    return runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def run(path: Path, *inputs: Tensor) -> list[Tensor]:
    there = session(path)
    names = [i.name for i in there.get_inputs()]
    given = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return [torch.tensor(y) for y in there.run(None, given)]


# ---- the rate form, in torch ---------------------------------------------------------------------


@torch.no_grad()
def test_the_rate_form_is_the_parallel_network() -> None:
    snn = snnkernels.convert(network(), X, T=8, progress=False)
    parallel = snnkernels.convert(network(), X, method="parallel", T=8, progress=False)
    for T in (1, 3, 8):
        assert torch.equal(rate_form(snn)(X, T=T), parallel(X, T=T))
    assert not torch.equal(snn(X), parallel(X))  # it is another network than that of T steps
    again = rate_form(parallel)
    assert torch.equal(again(X), parallel(X))
    assert snn._clock.steps.parallel is False


@torch.no_grad()
def test_counts_of_one_layer_are_those_of_the_steps() -> None:
    """Of a constant current the T steps fire what the staircase says, on dyadic data exactly."""
    net = make_dyadic(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    snn = snnkernels.convert(net, threshold=2.0, T=8)
    x = dyadic(16, 6)
    assert torch.equal(rate_form(snn)(x), snn(x))


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("srp", "its neurons have probe"),
        ("cos", "its neurons have probe"),
        ("signed", "its neurons have signed"),
        (Burst(), "its neurons have max_spikes"),
        ("multi_threshold", "MultiThresholdActivation is no"),
        ("dsr", "DSRActivation is no"),
    ],
)
def test_what_has_no_rate_form(method: Any, words: str) -> None:
    snn = snnkernels.convert(network(), X, method=method, T=4, progress=False)
    with pytest.raises(ConversionError, match=f"has no rate form: {words}"):
        rate_form(snn)


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["opi", "ttfs"])
def test_onnxruntime_gives_our_logits(method: str, tmp_path: Path) -> None:
    optional("onnxscript")
    snn = snnkernels.convert(network(), X, method=method, T=8, progress=False)
    path = snnkernels.to_onnx(snn, tmp_path / "net.onnx", X)
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    form = rate_form(snn)
    for batch in (1, 3, 4):
        (got,) = run(path, X[:batch])
        with torch.no_grad():
            torch.testing.assert_close(got, form(X[:batch]), atol=1e-5, rtol=1e-5)
    onnx = optional("onnx")
    model = onnx.load(path)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert {node.domain for node in model.graph.node} == {""}  # operators of the standard


@pytest.mark.slow
def test_counts_are_equal_on_dyadic_data(tmp_path: Path) -> None:
    """Where sums are exact and nothing is rounded, the counts are the same one by one."""
    optional("onnxscript")
    net = make_dyadic(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU()))
    snn = snnkernels.convert(net, threshold=2.0, T=8)
    x = dyadic(64, 6)
    (got,) = run(snnkernels.to_onnx(snn, tmp_path / "net.onnx", x, T=4), x)
    with torch.no_grad():
        want = rate_form(snn)(x, T=4)
    assert torch.equal(got, want)
    assert want.unique().numel() > 3


@pytest.mark.slow
def test_everything_and_several_outputs(tmp_path: Path) -> None:
    optional("onnxscript")

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Everything()

        def forward(self, image: Tensor) -> dict[str, Tensor]:
            y = self.net(image)
            return {"logits": y, "probabilities": y.exp()}

    x = images(3)
    snn = snnkernels.convert(Wrapped().eval(), x, T=4, progress=False)
    path = tmp_path / "net.onnx"
    path.write_text("an older file")
    snnkernels.to_onnx(snn, path, x, dynamic_batch=False)
    there = session(path)
    assert [i.name for i in there.get_inputs()] == ["image"]
    assert [o.name for o in there.get_outputs()] == ["logits", "probabilities"]
    with torch.no_grad():
        want = rate_form(snn)(x)
    for got, name in zip(run(path, x), want, strict=True):
        torch.testing.assert_close(got, want[name], atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_others_may_read_the_file(tmp_path: Path) -> None:
    optional("onnxscript")
    (tmp_path / "usual").write_text("")
    path = snnkernels.to_onnx(
        snnkernels.convert(network(), X, T=4, progress=False), tmp_path / "net.onnx", X
    )
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_bad_arguments_leave_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optional("onnxscript")
    snn = snnkernels.convert(network(), X, T=4, progress=False)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        snnkernels.to_onnx(snn, tmp_path / "no" / "net.onnx", X)
    with pytest.raises(TypeError, match="must be a ConvertedNetwork, got Linear"):
        snnkernels.to_onnx(nn.Linear(2, 2), tmp_path / "net.onnx", X)  # type: ignore[arg-type]
    monkeypatch.setattr(
        torch.onnx, "export", lambda *a, **k: (_ for _ in ()).throw(OSError("full"))
    )
    (tmp_path / "net.onnx").write_text("old")
    with pytest.raises(ConversionError, match=r"torch\.onnx cannot write this network: OSError"):
        snnkernels.to_onnx(snn, tmp_path / "net.onnx", X)
    assert os.listdir(tmp_path) == ["net.onnx"]
    assert (tmp_path / "net.onnx").read_text() == "old"
    import sys

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"onnxscript: pip install 'snnkernels\[onnx\]'"):
        snnkernels.to_onnx(snn, tmp_path / "net.onnx", X)
