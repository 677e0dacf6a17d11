"""Networks and data shared by the conversion tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import snnkernels
from snnkernels.conversion import QCFS, ClipReLU
from snnkernels.conversion.activations import ThresholdReLU
from snnkernels.conversion.activations_rates import RateNorm


def dyadic(*shape: int, seed: int = 0, scale: int = 8, low: int = -16, high: int = 16) -> Tensor:
    """Random multiples of 1/scale: sums and products of a few are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator) / scale


def make_dyadic(net: nn.Module, seed: int = 0) -> nn.Module:
    """Multiples of 1/4 as weights; BN whose scale is a power of two with its own eps of 1/4."""
    with torch.no_grad():
        for i, module in enumerate(net.modules()):
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eps = 0.25
                module.running_var.fill_(0.75 if i % 2 else 3.75)
                module.running_mean.copy_(dyadic(module.num_features, seed=seed + i, scale=4))
                if module.affine:
                    module.weight.fill_(2.0)
                    module.bias.copy_(dyadic(module.num_features, seed=seed + i + 1, scale=4))
            elif hasattr(module, "weight") and isinstance(module.weight, nn.Parameter):
                module.weight.copy_(
                    dyadic(*module.weight.shape, seed=seed + i, scale=4, low=-4, high=4)
                )
                if module.bias is not None:
                    module.bias.copy_(dyadic(*module.bias.shape, seed=seed + i + 1, scale=4))
    return net


def randomize(net: nn.Module, seed: int = 0) -> nn.Module:
    """Non-trivial BN statistics and affine parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.uniform_(-0.3, 0.3, generator=generator)
                module.running_var.uniform_(0.3, 2.0, generator=generator)
                if module.affine:
                    module.weight.uniform_(0.5, 1.5, generator=generator)
                    module.bias.uniform_(-0.3, 0.3, generator=generator)
    return net.eval()


def images(batch: int = 8, channels: int = 3, size: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


_TRAINED: dict[str, Callable[[], nn.Module]] = {
    "": nn.ReLU,
    "QCFS": lambda: QCFS(8, 1.5),
    "ClipReLU": lambda: ClipReLU(1.5),
    "RateNorm": RateNorm,
    "ThresholdReLU": ThresholdReLU,
}


def activation_for(method: Any) -> Callable[[], nn.Module]:
    """What a network has to be trained with for a conversion method."""
    name = method if isinstance(method, str) else method.name
    (trains,) = (m["trains"] for m in snnkernels.methods() if m["name"] == name)
    return _TRAINED[trains]


class Everything(nn.Module):
    """Residual, concat, grouped and dilated convolutions, BN with and without one, all pools."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8, eps=1e-2)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4)
        self.bn2 = nn.BatchNorm2d(8)
        self.bn3 = nn.BatchNorm2d(16)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.conv3 = nn.Conv2d(16, 12, 3, bias=False)
        self.drop = nn.Dropout()
        self.fc1 = nn.Linear(12, 20)
        self.bn4 = nn.BatchNorm1d(20)
        self.fc2 = nn.Linear(20, 5)
        randomize(self)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.size(0)
        h = self.relu(self.bn1(self.conv1(x)))
        shortcut = h
        h = self.relu(self.bn2(self.conv2(h)))
        h += shortcut
        h = F.relu(self.bn3(torch.cat([h, shortcut], 1)))
        h = self.drop(self.pool(h))
        h = F.avg_pool2d(torch.clamp(self.conv3(h), min=0), 2)
        h = F.adaptive_avg_pool2d(h, 1).view(batch, -1)
        h = self.bn4(self.fc1(h)).relu_()
        return F.log_softmax(self.fc2(h), dim=1)


class Shortcut(nn.Module):
    """Activation of a sum of two convolutions."""

    def __init__(self, T: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1, bias=False)
        self.act = QCFS(T, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.a(x) + self.b(x))


class Concat(nn.Module):
    """Activation of a concatenation."""

    def __init__(self, T: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)
        self.act = QCFS(T, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(torch.cat([self.a(x), self.b(x)], dim=1))


class Asserts(nn.Module):
    """Asserts on shapes; here because pytest rewrites the asserts of test files."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 6
        assert x.dim() == 2, f"two dimensions, not {x.dim()}"
        assert x.size(0) > 0 and x.shape[1] != 7  # noqa: PT018
        return self.body(x)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()
