"""Small networks of the well-known families, each with the activation that is asked for."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Act = Callable[[], nn.Module]


def conv(i: int, o: int, k: int = 3, **given: int) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, bias=False, **given)


class DenseNet(nn.Module):
    """Pre-activation dense blocks (BN, activation, conv, concat) and an average-pool transition."""

    def __init__(self, act: Act, growth: int = 6, layers: int = 3) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.blocks, channels = nn.ModuleList(), 8
        for block in range(2):
            layer = nn.ModuleList()
            for _ in range(layers):
                inner = [nn.BatchNorm2d(channels), act(), conv(channels, 2 * growth, 1)]
                inner += [nn.BatchNorm2d(2 * growth), act(), conv(2 * growth, growth)]
                layer.append(nn.Sequential(*inner))
                channels += growth
            self.blocks.append(layer)
            if block == 0:
                self.transition = nn.Sequential(
                    nn.BatchNorm2d(channels),
                    act(),
                    conv(channels, channels // 2, 1),
                    nn.AvgPool2d(2),
                )
                channels //= 2
        self.head = nn.Sequential(nn.BatchNorm2d(channels), act())
        self.fc = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for i, block in enumerate(self.blocks):
            found = [h]
            for layer in block:
                found.append(layer(torch.cat(found, 1)))
            h = torch.cat(found, dim=1)
            h = self.transition(h) if i == 0 else h
        return self.fc(F.adaptive_avg_pool2d(self.head(h), 1).flatten(1))


class InvertedResidual(nn.Module):
    """MobileNetV2's block: expand, depthwise, linear bottleneck, a sum without activation."""

    def __init__(self, act: Act, i: int, o: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = i * expand
        layers: list[nn.Module] = []
        if expand != 1:
            layers += [conv(i, wide, 1), nn.BatchNorm2d(wide), act()]
        layers += [conv(wide, wide, stride=stride, groups=wide), nn.BatchNorm2d(wide), act()]
        layers += [conv(wide, o, 1), nn.BatchNorm2d(o)]
        self.layers = nn.Sequential(*layers)
        self.adds = stride == 1 and i == o

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.adds else self.layers(x)


class MobileNetV2(nn.Module):
    def __init__(self, act: Act) -> None:
        super().__init__()
        blocks: list[nn.Module] = [conv(3, 8, stride=1), nn.BatchNorm2d(8), act()]
        i = 8
        for expand, o, count, stride in [(1, 8, 1, 1), (3, 12, 2, 2), (3, 16, 2, 1)]:
            for k in range(count):
                blocks.append(InvertedResidual(act, i, o, stride if k == 0 else 1, expand))
                i = o
        blocks += [conv(i, 32, 1), nn.BatchNorm2d(32), act()]
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(32, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean([2, 3]))


class ResNeXt(nn.Module):
    """Grouped convolutions, a channel shuffle, a strided shortcut with its own BN."""

    def __init__(self, act: Act) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), act())
        self.a = nn.Sequential(conv(8, 16, 1, groups=2), nn.BatchNorm2d(16), act())
        self.b = nn.Sequential(conv(16, 16, stride=2, groups=4), nn.BatchNorm2d(16))
        self.short = nn.Sequential(conv(8, 16, 1, stride=2), nn.BatchNorm2d(16))
        self.act, self.fc = act(), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        h = self.a(x)
        b, c, height, width = h.shape
        h = h.view(b, 2, c // 2, height, width).transpose(1, 2).reshape(b, c, height, width)
        return self.fc(self.act(self.b(h) + self.short(x)).mean((2, 3)))


class SqueezeExcite(nn.Module):
    """Channel gates; ``how``: the usual ways to write the product."""

    def __init__(self, act: Act, channels: int, gate: str, how: str) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(channels, 4), nn.Linear(4, channels)
        self.act, self.how = act(), how
        self.gate = {"sigmoid": nn.Sigmoid, "hardsigmoid": nn.Hardsigmoid}[gate]()

    def forward(self, x: Tensor) -> Tensor:
        b, c = x.shape[:2]
        g = F.adaptive_avg_pool2d(x, 1).view(b, c)
        g = self.gate(self.up(self.act(self.down(g)))).view(b, c, 1, 1)
        return x * g.expand_as(x) if self.how == "expand" else g * x


class SENet(nn.Module):
    """A gate on spikes (in the first block) and one on a sum of currents (in the second)."""

    def __init__(self, act: Act, gate: str = "sigmoid", how: str = "broadcast") -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), act())
        self.one = SqueezeExcite(act, 8, gate, how)
        self.conv = nn.Sequential(conv(8, 8), nn.BatchNorm2d(8))
        self.two = SqueezeExcite(act, 8, gate, how)
        self.act, self.last, self.fc = act(), nn.Sequential(conv(8, 8), act()), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(self.stem(x))
        h = self.act(self.two(self.conv(h)) + h)
        return self.fc(self.last(h).mean((2, 3)))


class Mixer(nn.Module):
    """MLP-Mixer with affine gains in the place of layer norms."""

    def __init__(self, act: Act, patches: int = 16, width: int = 12) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 2, stride=2)
        self.blocks = nn.ModuleList()
        for _ in range(2):
            tokens = nn.Sequential(nn.Linear(patches, 24), act(), nn.Linear(24, patches))
            features = nn.Sequential(nn.Linear(width, 24), act(), nn.Linear(24, width))
            self.blocks.append(nn.ModuleDict({"tokens": tokens, "features": features}))
        self.gain = nn.Parameter(torch.rand(width) + 0.5)
        self.shift = nn.Parameter(torch.rand(width) - 0.5)
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch(x).flatten(2).transpose(1, 2)  # [B, patches, width]
        for block in self.blocks:
            h = h + block["tokens"]((h * self.gain + self.shift).transpose(1, 2)).transpose(1, 2)
            h = h + block["features"](h * self.gain + self.shift)
        return self.fc(h.mean(dim=1))


class UNet(nn.Module):
    """Two levels, skips by concatenation; up by a transposed convolution or by interpolation."""

    def __init__(self, act: Act, up: str = "transposed") -> None:
        super().__init__()

        def double(i: int, o: int) -> nn.Sequential:
            first = [conv(i, o), nn.BatchNorm2d(o), act()]
            return nn.Sequential(*first, conv(o, o), nn.BatchNorm2d(o), act())

        self.one, self.two, self.three = double(3, 6), double(6, 10), double(10, 12)
        self.pool, self.how = nn.MaxPool2d(2), up
        if up == "transposed":
            self.up2 = nn.ConvTranspose2d(12, 10, 2, stride=2)
            self.up1 = nn.ConvTranspose2d(10, 6, 3, stride=2, padding=1, output_padding=1)
        else:
            self.up2, self.up1 = conv(12, 10, 1), conv(10, 6, 1)
        if up == "module":
            self.grow = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.back2, self.back1 = double(20, 10), double(12, 6)
        self.head = nn.Conv2d(6, 4, 1)

    def _up(self, layer: nn.Module, h: Tensor, skip: Tensor) -> Tensor:
        if self.how == "transposed":
            return layer(h)
        if self.how == "module":
            return self.grow(layer(h))
        return F.interpolate(layer(h), size=skip.shape[2:], mode="nearest")

    def forward(self, x: Tensor) -> Tensor:
        a = self.one(x)
        b = self.two(self.pool(a))
        h = self.three(self.pool(b))
        h = self.back2(torch.cat([self._up(self.up2, h, b), b], 1))
        h = self.back1(torch.cat([self._up(self.up1, h, a), a], 1))
        return self.head(h)  # [B, classes, height, width]


class Shared(nn.Module):
    """One block called three times, its BN and its activation with it; one call on the input."""

    def __init__(self, act: Act) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.block = nn.Sequential(conv(6, 6), nn.BatchNorm2d(6), act(), nn.MaxPool2d(3, 1, 1))
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.block(self.stem(x))
        h = h + self.block(h)
        return self.fc(self.block(h).mean((2, 3)))


class Attention(nn.Module):
    """A Transformer block written out: layer norm, softmax of q k', ReLU in the MLP."""

    def __init__(self, act: Act, width: int = 12) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, stride=4)
        self.start = nn.Sequential(nn.Linear(width, width), act())
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 24), act(), nn.Linear(24, width))
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.start(self.patch(x).flatten(2).transpose(1, 2))
        h = torch.cat([self.token.expand(h.shape[0], -1, -1), h], dim=1)
        b, n, c = h.shape
        q, k, v = (
            self.qkv(self.norm1(h)).reshape(b, n, 3, 3, c // 3).permute(0, 2, 3, 1, 4).unbind(1)
        )
        weight = (q @ k.transpose(-2, -1) / (c // 3) ** 0.5).softmax(-1)
        h = h + self.out((weight @ v).transpose(1, 2).reshape(b, n, c))
        h = h + self.mlp(self.norm2(h))
        return self.fc(h[:, 0])
