"""The zoo: shapes, layouts, options; checkpoints: round trip and every refusal."""

from __future__ import annotations

import hashlib

import pytest
import torch
from support import optional
from torch import nn

from snnkernels import models

safetensors_torch = optional("safetensors.torch")


class Staircase(nn.Module):
    """Stands for any activation with a parameter of its own."""

    def __init__(self, L: int) -> None:
        super().__init__()
        self.L = L
        self.lam = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lam * torch.clamp(torch.floor(x * self.L / self.lam + 0.5) / self.L, 0, 1)


# Parameter counts worked out by hand from the layouts (conv and linear weights, BN pairs, biases).
SIZES = {
    "small_cnn": (1, 8, 99_370),
    "vgg9": (3, 32, 1_702_218),
    "vgg11": (3, 32, 9_228_362),
    "vgg16": (3, 32, 14_724_042),
    "resnet10": (3, 32, 1_284_394),
    "resnet18": (3, 32, 11_173_962),
    "resnet20": (3, 32, 272_474),
}


@pytest.mark.parametrize("name", SIZES)
def test_shape_and_size(name: str) -> None:
    channels, side, parameters = SIZES[name]
    model = models.ARCHITECTURES[name]().eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    with torch.no_grad():
        assert model(torch.zeros(2, channels, side, side)).shape == (2, 10)


def test_every_architecture_is_covered() -> None:
    assert set(SIZES) == set(models.ARCHITECTURES)


def test_vgg9_layout() -> None:
    kinds = [type(m).__name__ for m in models.vgg9().features]
    triple = ["Conv2d", "BatchNorm2d", "ReLU"]
    expected = [*triple, "AvgPool2d", *triple, *triple, "AvgPool2d", *triple, *triple]
    assert kinds == [*expected, "AvgPool2d", *triple, "AdaptiveAvgPool2d"]


def test_resnet10_keys() -> None:
    keys = set(models.resnet10().state_dict())
    assert {"stem.0.weight", "stem.1.running_var", "blocks.3.bn2.bias"} <= keys
    assert "blocks.0.shortcut.0.weight" in keys
    assert not any(key.startswith("blocks.1.shortcut") for key in keys)


@pytest.mark.parametrize("name", ["small_cnn", "vgg9", "resnet20"])
def test_activation_factory_is_called_once_a_layer(name: str) -> None:
    made: list[nn.Module] = []

    def factory() -> nn.Module:
        made.append(nn.Hardtanh(0.0, 1.0))
        return made[-1]

    model = models.ARCHITECTURES[name](activation=factory)
    assert not any(isinstance(m, nn.ReLU) for m in model.modules())
    assert [m for m in model.modules() if isinstance(m, nn.Hardtanh)] == made


@pytest.mark.parametrize(("pool", "kind"), [("avg", nn.AvgPool2d), ("max", nn.MaxPool2d)])
def test_pool_option(pool: str, kind: type[nn.Module]) -> None:
    model = models.small_cnn(pool=pool)
    assert sum(isinstance(m, kind) for m in model.modules()) == 2


def test_unknown_pool() -> None:
    with pytest.raises(ValueError, match=r"pool must be.*'sum'"):
        models.vgg9(pool="sum")


def test_checkpoint_round_trip(tmp_path) -> None:
    path = tmp_path / "net.safetensors"
    model = models.small_cnn(7, 2, pool="max").eval()
    models.save_checkpoint(model, path, "small_cnn", pool="max")
    loaded = models.load_checkpoint(path)
    assert loaded.architecture == "small_cnn"
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert loaded.hash == loaded.sha256[:12]
    assert not loaded.model.training
    x = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.model(x), model(x))


def test_checkpoint_with_its_own_activation(tmp_path) -> None:
    path = tmp_path / "net.safetensors"
    model = models.small_cnn(activation=lambda: Staircase(8)).eval()
    models.save_checkpoint(model, path, "small_cnn", activation="qcfs", L=8)
    loaded = models.load_checkpoint(path, activations={"qcfs": lambda m: Staircase(int(m["L"]))})
    assert [m.L for m in loaded.model.modules() if isinstance(m, Staircase)] == [8] * 5
    with pytest.raises(ValueError, match=r"activation 'qcfs', which was not given"):
        models.load_checkpoint(path)
    with pytest.raises(ValueError, match=r"lacks 'levels'"):
        models.load_checkpoint(path, activations={"qcfs": lambda m: Staircase(int(m["levels"]))})


def test_missing_and_foreign_files(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*absent"):
        models.load_checkpoint(tmp_path / "absent.safetensors")
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        models.load_checkpoint(bad)


def test_architecture_in_metadata(tmp_path) -> None:
    path = tmp_path / "net.safetensors"
    state = models.small_cnn().state_dict()
    safetensors_torch.save_file(state, str(path))
    with pytest.raises(ValueError, match="does not name its architecture"):
        models.load_checkpoint(path)
    assert models.load_checkpoint(path, architecture="small_cnn").metadata == {}
    safetensors_torch.save_file(state, str(path), {"architecture": "alexnet"})
    with pytest.raises(ValueError, match=r"unknown architecture 'alexnet'; known: small_cnn"):
        models.load_checkpoint(path)
    with pytest.raises(ValueError, match="unknown architecture"):
        models.save_checkpoint(models.small_cnn(), path, "alexnet")


def test_differing_tensors_are_named(tmp_path) -> None:
    path = tmp_path / "net.safetensors"
    state = models.small_cnn().state_dict()
    del state["hidden.0.bias"]
    state["extra"] = torch.zeros(1)
    state["features.4.bias"] = torch.zeros(3)
    safetensors_torch.save_file(state, str(path), {"architecture": "small_cnn"})
    with pytest.raises(ValueError, match="3 differences") as error:
        models.load_checkpoint(path)
    for part in ("missing hidden.0.bias", "unexpected extra", "features.4.bias is [3]"):
        assert part in str(error.value)
