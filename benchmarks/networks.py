"""The networks of the whole-network benchmark: trained ones by path, untrained ones made to fire.

The engine's time depends on how often neurons fire, so a network with random weights is no
measurement unless it fires as trained ones do. Its batch norms get their statistics from data, and
a shift of a quarter of a deviation down, chosen by the rates alone: 0.09 to 0.11 spikes per neuron
and step then, as of trained networks (VGG-9 0.08, ResNet-10 0.11), against 0.14 to 0.16 without it
and 0.05 to 0.08 with half a deviation. Thresholds are calibrated on data for all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import Skip
from torch import Tensor, nn

from snnkernels import convert, models
from snnkernels.conversion.network import ConvertedNetwork
from snnkernels.conversion.spiking import SpikingActivation
from snnkernels.data import load_cifar10

STEPS = 16  # that thresholds are made for; runs take any T
_SHIFT = -0.25  # of batch norms
_CALIBRATION = 32  # images


class ResNet34(nn.Module):
    """ResNet-34 with the ImageNet stem (7x7 of stride 2, max-pool) on the library's blocks."""

    def __init__(self, width: int = 64, depths: tuple[int, ...] = (3, 4, 6, 3)) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        )  # fmt: skip
        blocks: list[nn.Module] = []
        channels = width
        for stage, depth in enumerate(depths):
            for i in range(depth):
                out = width << stage
                stride = 2 if stage and not i else 1
                blocks.append(models.BasicBlock(channels, out, stride))
                channels = out
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, 1000]`` of images ``[B, 3, 224, 224]``."""
        return self.classifier(torch.flatten(self.pool(self.blocks(self.stem(x))), 1))


_TINY = (16, "P", 32)
_STUDY = (64, 64, "P", 128, 128, "P", 256, 256, "P")  # of the study that set the floors
# name: (how it is made, side of its images)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "vgg7-max": (lambda: models.VGG(_STUDY, pool="max"), 32),
    "vgg7-avg": (lambda: models.VGG(_STUDY, pool="avg"), 32),
    "vgg9-max": (lambda: models.vgg9(pool="max"), 32),
    "vgg9-avg": (lambda: models.vgg9(pool="avg"), 32),
    "vgg16-max": (lambda: models.vgg16(pool="max"), 32),
    "vgg16-avg": (lambda: models.vgg16(pool="avg"), 32),
    "resnet18": (models.resnet18, 32),
    "resnet20": (models.resnet20, 32),
    "resnet34": (ResNet34, 224),
    # For smoke runs
    "tiny-max": (lambda: models.VGG(_TINY, pool="max"), 8),
    "tiny-resnet": (lambda: models.ResNet(8, [(8, 1), (16, 2)]), 8),
}
DEFAULT = tuple(name for name in NETWORKS if not name.startswith("tiny"))
QUICK = ("tiny-max", "tiny-resnet")


@dataclass
class Subject:
    """A network under test.

    Attributes:
        name: in rows.
        ann: in evaluation mode.
        snn: converted for :data:`STEPS` steps.
        calibration: images that thresholds were made from; images: those that are run.
        rates: spikes per neuron and step of each layer on ``images``.
        rate: of all neurons.
        widest: elements of the largest value of one image, for estimates of memory.
        made: what rivals keep between cases.
    """

    name: str
    ann: nn.Module
    snn: ConvertedNetwork
    calibration: Tensor
    images: Tensor
    rates: dict[str, float]
    rate: float
    widest: int
    made: dict[str, Any] = field(default_factory=dict)

    def batch(self, n: int) -> Tensor:
        """So many images, from the first one again where there are fewer."""
        times = -(-n // len(self.images))
        return self.images.repeat(times, 1, 1, 1)[:n].contiguous()


def _synthetic(n: int, side: int, seed: int) -> Tensor:
    """Images with the smooth structure of photographs, mean 0 and deviation 1."""
    made = torch.Generator().manual_seed(seed)
    x = torch.zeros(n, 3, side, side)
    for scale in (4, 8, side):
        size = min(scale, side)
        noise = torch.randn(n, 3, size, size, generator=made) * 4 / size**0.5
        x += F.interpolate(noise, (side, side), mode="bilinear", align_corners=False)
    return (x - x.mean()) / x.std()


def pictures(data: Path | None, n: int, side: int, train: bool) -> Tensor:
    """``[n, 3, side, side]``: CIFAR-10 (made larger where asked for) or synthetic."""
    if data is None:
        return _synthetic(n, side, seed=int(train))
    x = load_cifar10(data, train=train, limit=n)[:n][0]
    if side == x.shape[-1]:
        return x
    return F.interpolate(x, (side, side), mode="bilinear", align_corners=False)


def _untrained(net: nn.Module, x: Tensor) -> nn.Module:
    """Batch norms with the statistics of data."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.constant_(norm.bias, _SHIFT)
        norm.momentum = None  # the mean of all batches
    net.train()
    with torch.no_grad():
        for part in x.split(16):
            net(part)
    return net.eval()


def _ann(name: str) -> tuple[nn.Module, int, bool]:
    if name.endswith(".safetensors"):
        try:
            return models.load_checkpoint(name).model, 32, True
        except (ImportError, FileNotFoundError) as error:
            raise Skip(str(error)) from None
    torch.manual_seed(0)
    make, side = NETWORKS[name]
    return make(), side, False


def _watched(snn: ConvertedNetwork, x: Tensor) -> tuple[dict[str, float], float, int]:
    """Rates of layers and of all neurons, and the elements of the largest layer."""
    sizes: dict[str, int] = {}
    rates: dict[str, float] = {}
    widest = 0

    def watch(layer: SpikingActivation, _: Any, out: Tensor) -> None:
        nonlocal widest
        steps = 1 if layer.counts else STEPS
        sizes[layer.label] = out.numel() // steps // len(x)
        rates[layer.label] = float(layer.spikes_per_step(out, STEPS))
        widest = max(widest, sizes[layer.label])

    hooks = [layer.register_forward_hook(watch) for _, layer in snn.neurons()]
    with torch.no_grad():
        snn(x, T=STEPS)
    for hook in hooks:
        hook.remove()
    total = sum(sizes.values())
    return rates, sum(rates[n] * sizes[n] for n in rates) / max(total, 1), widest


def subject(name: str, data: Path | None, largest: int) -> Subject:
    """Make, calibrate and convert a network; ``largest``: images that are run at a time."""
    ann, side, trained = _ann(name)
    # Large images are run over and over: their time does not depend on which they are.
    few = 8 if side > 64 else 64
    calibration = pictures(data, few if side > 64 else _CALIBRATION, side, train=True)
    if not trained:
        ann = _untrained(ann, pictures(data, few, side, train=True))
    snn = convert(copy.deepcopy(ann), calibration, T=STEPS, progress=False)
    images = pictures(data, min(largest, few), side, train=False)
    rates, rate, widest = _watched(snn, images[:8])
    short = Path(name).stem if trained else name
    label = f"{short} (trained)" if trained else short
    return Subject(label, ann, snn, calibration, images, rates, rate, widest)
