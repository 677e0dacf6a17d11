"""Small networks; see :mod:`snnkernels.models` for what they have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

__all__ = [
    "ARCHITECTURES",
    "VGG",
    "Activation",
    "BasicBlock",
    "ResNet",
    "SmallCNN",
    "resnet10",
    "resnet18",
    "resnet20",
    "small_cnn",
    "vgg9",
    "vgg11",
    "vgg16",
]

Activation = Callable[[], nn.Module]


def _check(activation: object, **sizes: object) -> None:
    """Raise unless ``activation`` makes something and ``sizes`` are whole numbers from 1."""
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
    if not callable(activation):
        raise TypeError(f"activation={activation!r} must be nn.ReLU or a function that makes one")


def _pool(kind: str) -> nn.Module:
    if kind == "avg":
        return nn.AvgPool2d(2)
    if kind == "max":
        return nn.MaxPool2d(2)
    raise ValueError(f"pool must be 'avg' or 'max', got {kind!r}")


def _conv_bn(cin: int, cout: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(cin, cout, kernel, stride, padding=kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(cout)]


def _conv_stack(
    plan: Sequence[int | str], in_channels: int, activation: Activation, pool: str
) -> tuple[list[nn.Module], int]:
    """Layers of a plan (a number: conv-BN-activation; ``"P"``: pool) and their channel count."""
    layers: list[nn.Module] = []
    channels = in_channels
    for item in plan:
        if isinstance(item, int):
            layers += [*_conv_bn(channels, item), activation()]
            channels = item
        elif item == "P":
            layers.append(_pool(pool))
        else:
            raise ValueError(f"plan holds {item!r}; it must hold numbers of channels and 'P'")
    return layers, channels


class SmallCNN(nn.Module):
    """Four convolutions and two linear layers for 8x8 images; see :func:`small_cnn`."""

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        *,
        activation: Activation = nn.ReLU,
        pool: str = "avg",
    ) -> None:
        super().__init__()
        _check(activation, num_classes=num_classes, in_channels=in_channels)
        layers, channels = _conv_stack([32, 32, "P", 64, 64, "P"], in_channels, activation, pool)
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.hidden = nn.Sequential(nn.Linear(channels * 2 * 2, 128), activation())
        self.classifier = nn.Linear(128, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, num_classes]`` of images ``x``, ``[B, in_channels, 8, 8]``."""
        return self.classifier(self.hidden(self.features(x)))


class VGG(nn.Module):
    """3x3 convolutions with batch norm, 2x2 pools, a global average and one linear layer.

    Keys of the state dict are ``features.<i>.*`` and ``classifier.*``.

    Args:
        plan: output channels of each convolution, with ``"P"`` for a pool.
        num_classes: number of logits.
        in_channels: channels of the images.
        activation: makes an activation.
        pool: ``"avg"`` or ``"max"``.

    Raises:
        ValueError: a ``pool`` that is neither, or a size below 1.
        TypeError: ``activation`` is no function.
    """

    def __init__(
        self,
        plan: Sequence[int | str],
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        activation: Activation = nn.ReLU,
        pool: str = "avg",
    ) -> None:
        super().__init__()
        _check(activation, num_classes=num_classes, in_channels=in_channels)
        layers, channels = _conv_stack(plan, in_channels, activation, pool)
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1))
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, num_classes]`` of images ``x``, ``[B, in_channels, H, W]``."""
        return self.classifier(torch.flatten(self.features(x), 1))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a sum; a 1x1 convolution on the shortcut where shapes differ.

    Args:
        cin: channels of the input.
        cout: channels of the output.
        stride: of the first convolution and the shortcut.
        activation: makes an activation.

    Raises:
        ValueError: a size below 1.
        TypeError: ``activation`` is no function.
    """

    def __init__(
        self, cin: int, cout: int, stride: int = 1, *, activation: Activation = nn.ReLU
    ) -> None:
        super().__init__()
        _check(activation, cin=cin, cout=cout, stride=stride)
        self.conv1, self.bn1 = _conv_bn(cin, cout, stride=stride)
        self.relu1 = activation()
        self.conv2, self.bn2 = _conv_bn(cout, cout)
        changes = stride != 1 or cin != cout
        self.shortcut = nn.Sequential(*_conv_bn(cin, cout, 1, stride)) if changes else nn.Identity()
        self.relu2 = activation()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` of ``[B, cin, H, W]`` to ``[B, cout, H / stride, W / stride]``."""
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Residual network for 32x32 images: stem, basic blocks, a global average, a linear layer.

    Keys of the state dict are ``stem.*``, ``blocks.<i>.*`` and ``classifier.*``.

    Args:
        stem: output channels of the first convolution.
        blocks: ``(channels, stride)`` of each basic block.
        num_classes: number of logits.
        in_channels: channels of the images.
        activation: makes an activation.

    Raises:
        ValueError: a size below 1, or no blocks.
        TypeError: ``activation`` is no function.
    """

    def __init__(
        self,
        stem: int,
        blocks: Sequence[tuple[int, int]],
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        activation: Activation = nn.ReLU,
    ) -> None:
        super().__init__()
        _check(activation, stem=stem, num_classes=num_classes, in_channels=in_channels)
        if not blocks:
            raise ValueError(f"blocks={blocks!r} must hold at least one (channels, stride)")
        self.stem = nn.Sequential(*_conv_bn(in_channels, stem), activation())
        layers = []
        channels = stem
        for cout, stride in blocks:
            layers.append(BasicBlock(channels, cout, stride, activation=activation))
            channels = cout
        self.blocks = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, num_classes]`` of images ``x``, ``[B, in_channels, H, W]``."""
        return self.classifier(torch.flatten(self.pool(self.blocks(self.stem(x))), 1))


def small_cnn(
    num_classes: int = 10,
    in_channels: int = 1,
    *,
    activation: Activation = nn.ReLU,
    pool: str = "avg",
) -> SmallCNN:
    """Return the demo's network: 0.1 M parameters, five activations, images ``[B, C, 8, 8]``.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        activation: makes an activation: ``nn.ReLU``, or a function that returns a fresh module.
        pool: ``"avg"`` or ``"max"``.

    Raises:
        ValueError: a ``pool`` that is neither, or a size below 1.
        TypeError: ``activation`` is no function.
    """
    return SmallCNN(num_classes, in_channels, activation=activation, pool=pool)


_VGG9 = (64, "P", 128, 128, "P", 256, 256, "P", 256)
_VGG11 = (64, "P", 128, "P", 256, 256, "P", 512, 512, "P", 512, 512, "P")
_VGG16 = (64, 64, "P", 128, 128, "P", *(256,) * 3, "P", *(512,) * 3, "P", *(512,) * 3, "P")


def vgg9(
    num_classes: int = 10,
    in_channels: int = 3,
    *,
    activation: Activation = nn.ReLU,
    pool: str = "avg",
) -> VGG:
    """Return a small VGG for CIFAR: six convolutions, 1.7 M parameters.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        activation: makes an activation: ``nn.ReLU``, or a function that returns a fresh module.
        pool: ``"avg"`` or ``"max"``.

    Raises:
        ValueError: a ``pool`` that is neither, or a size below 1.
        TypeError: ``activation`` is no function.
    """
    return VGG(_VGG9, num_classes, in_channels, activation=activation, pool=pool)


def vgg11(
    num_classes: int = 10,
    in_channels: int = 3,
    *,
    activation: Activation = nn.ReLU,
    pool: str = "max",
) -> VGG:
    """Return VGG-11 with batch norm for CIFAR: eight convolutions, one linear layer.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        activation: makes an activation: ``nn.ReLU``, or a function that returns a fresh module.
        pool: ``"avg"`` or ``"max"``.

    Raises:
        ValueError: a ``pool`` that is neither, or a size below 1.
        TypeError: ``activation`` is no function.
    """
    return VGG(_VGG11, num_classes, in_channels, activation=activation, pool=pool)


def vgg16(
    num_classes: int = 10,
    in_channels: int = 3,
    *,
    activation: Activation = nn.ReLU,
    pool: str = "max",
) -> VGG:
    """Return VGG-16 with batch norm for CIFAR: thirteen convolutions, one linear layer.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        activation: makes an activation: ``nn.ReLU``, or a function that returns a fresh module.
        pool: ``"avg"`` or ``"max"``.

    Raises:
        ValueError: a ``pool`` that is neither, or a size below 1.
        TypeError: ``activation`` is no function.
    """
    return VGG(_VGG16, num_classes, in_channels, activation=activation, pool=pool)


def resnet10(
    num_classes: int = 10, in_channels: int = 3, *, activation: Activation = nn.ReLU
) -> ResNet:
    """Return a small ResNet for CIFAR: four basic blocks, 1.3 M parameters.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        activation: makes an activation: ``nn.ReLU``, or a function that returns a fresh module.
    """
    blocks = [(64, 2), (64, 1), (128, 2), (256, 2)]
    return ResNet(32, blocks, num_classes, in_channels, activation=activation)


def resnet18(
    num_classes: int = 10, in_channels: int = 3, *, activation: Activation = nn.ReLU
) -> ResNet:
    """Return ResNet-18 with the CIFAR stem (3x3, stride 1, no pool).

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        activation: makes an activation: ``nn.ReLU``, or a function that returns a fresh module.
    """
    stages = [(64, 1), (128, 2), (256, 2), (512, 2)]
    blocks = [block for width, stride in stages for block in ((width, stride), (width, 1))]
    return ResNet(64, blocks, num_classes, in_channels, activation=activation)


def resnet20(
    num_classes: int = 10, in_channels: int = 3, *, activation: Activation = nn.ReLU
) -> ResNet:
    """Return ResNet-20 for CIFAR (16, 32, 64 channels), with 1x1 convolutions on shortcuts.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        activation: makes an activation: ``nn.ReLU``, or a function that returns a fresh module.
    """
    stages = [(16, 1), (32, 2), (64, 2)]
    blocks = [
        block for width, stride in stages for block in ((width, stride), (width, 1), (width, 1))
    ]
    return ResNet(16, blocks, num_classes, in_channels, activation=activation)


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    f.__name__: f for f in (small_cnn, vgg9, vgg11, vgg16, resnet10, resnet18, resnet20)
}
"""Networks that a checkpoint may name."""
