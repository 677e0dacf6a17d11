"""Every graph feature: found, converted, and converging to the ANN."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conversion_helpers import Everything, images, randomize, relative
from torch import Tensor, nn

from snnkernels.conversion import convert


class Functional(nn.Module):
    """A small network whose middle is a function of (module, tensor)."""

    def __init__(self, middle: Callable, channels: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(channels, 6, 3)
        self.relu = nn.ReLU()
        self.relu_inplace = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.same = nn.Identity()
        self.gain = nn.Parameter(torch.rand(8, 1, 1) + 0.5)
        self.fc = nn.Linear(6, 4)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        h = self.middle(self, F.relu(self.conv1(x)))
        h = torch.relu(self.conv3(h))
        return self.fc(h.mean((2, 3)))


def residual_inplace(net: Functional, h: Tensor) -> Tensor:
    out = net.conv2(h)
    out += h
    return net.relu(out)


def inplace_on_shared_input(net: Functional, h: Tensor) -> Tensor:
    current = net.conv2(h)
    kept = current  # sees what relu_ writes
    current.relu_()
    return kept + h


def shuffle(net: Functional, h: Tensor) -> Tensor:
    b, c, height, width = h.shape
    h = h.view(b, 2, c // 2, height, width).transpose(1, 2).contiguous()
    return net.relu(net.conv2(h.view(b, -1, height, width)))


def split_and_join(net: Functional, h: Tensor) -> Tensor:
    a, b = net.conv2(h).chunk(2, dim=1)
    return net.relu(torch.cat([b, a], dim=1))


# The middle and how many spiking layers the whole network has.
MIDDLES: dict[str, tuple[Callable, int]] = {
    "F.relu": (lambda n, h: F.relu(n.conv2(h)), 3),
    "torch.relu": (lambda n, h: torch.relu(n.conv2(h)), 3),
    "x.relu()": (lambda n, h: n.conv2(h).relu(), 3),
    "x.relu_()": (lambda n, h: n.conv2(h).relu_(), 3),
    "F.relu(inplace)": (lambda n, h: F.relu(n.conv2(h), inplace=True), 3),
    "nn.ReLU(inplace)": (lambda n, h: n.relu_inplace(n.conv2(h)), 3),
    "nn.ReLU6": (lambda n, h: F.relu6(8 * n.conv2(h)), 3),
    "F.hardtanh": (lambda n, h: F.hardtanh(n.conv2(h), 0.0, 0.5), 3),
    "clamp(min)": (lambda n, h: n.conv2(h).clamp(min=0), 3),
    "clamp(0, a)": (lambda n, h: torch.clamp(n.conv2(h), 0, 0.5), 3),
    "clamp_min": (lambda n, h: torch.clamp_min(n.conv2(h), 0), 3),
    "clamp_": (lambda n, h: n.conv2(h).clamp_(min=0.0), 3),
    "reused module": (lambda n, h: n.relu(n.conv2(n.relu(n.conv2(h)))), 4),
    "add": (lambda n, h: n.relu(n.conv2(h) + h), 3),
    "torch.add": (lambda n, h: n.relu(torch.add(n.conv2(h), h)), 3),
    "x.add": (lambda n, h: n.relu(n.conv2(h).add(h)), 3),
    "x.add_": (lambda n, h: n.relu(n.conv2(h).add_(h)), 3),
    "+=": (residual_inplace, 3),
    "sub": (lambda n, h: n.relu(h - n.conv2(h)), 3),
    "written through another name": (inplace_on_shared_input, 3),
    "gain": (lambda n, h: n.relu(n.conv2(h) * n.gain * 2 / 1.5), 3),
    "dropout, identity": (lambda n, h: n.same(n.drop(n.relu(n.conv2(h)))), 3),
    "F.dropout": (lambda n, h: F.dropout(n.relu(n.conv2(h)), training=n.training), 3),
    "F.avg_pool2d": (lambda n, h: n.relu(F.avg_pool2d(n.conv2(h), 2)), 3),
    "F.adaptive_avg_pool2d": (lambda n, h: n.relu(F.adaptive_avg_pool2d(n.conv2(h), 4)), 3),
    "F.max_pool2d": (lambda n, h: F.max_pool2d(n.relu(n.conv2(h)), 2), 3),
    "F.adaptive_max_pool2d": (lambda n, h: F.adaptive_max_pool2d(n.relu(n.conv2(h)), 4), 3),
    "channel shuffle": (shuffle, 3),
    "chunk and cat": (split_and_join, 3),
    "interpolate": (lambda n, h: n.relu(F.interpolate(n.conv2(h), scale_factor=2)), 3),
    "pad": (lambda n, h: n.relu(F.pad(n.conv2(h), (1, 1, 1, 1))), 3),
    "slice": (lambda n, h: n.relu(n.conv2(h)[:, :, 1:, 1:]), 3),
    "functional conv": (lambda n, h: n.relu(F.conv2d(h, n.conv2.weight * 2, padding=1)), 3),
}


@pytest.mark.parametrize("name", MIDDLES)
def test_feature_converts_and_converges(name: str) -> None:
    middle, layers = MIDDLES[name]
    net = Functional(middle).eval()
    x = images(6)
    expected = net(x)
    snn = convert(net, x, threshold="max", T=256)
    assert len(list(snn.neurons())) == layers
    error = {T: relative(y, expected) for T, y in snn.predict_curve(x, [4, 32, 256]).items()}
    assert error[256] < 0.02
    assert error[256] < error[32] < error[4]


def test_everything_converges_to_the_ann() -> None:
    net = Everything()
    x = images(8)
    snn = convert(net, x, threshold="max", T=512)
    curve = snn.predict_curve(x, [8, 64, 512])
    error = {T: relative(y.exp(), net(x).exp()) for T, y in curve.items()}
    assert error[512] < 5e-3
    assert error[512] < error[64] < error[8]


def test_a_value_from_before_the_neurons_meets_spikes() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            still = torch.tanh(self.conv1(x))  # not affine, but constant in time: exact
            return F.relu(self.conv2(F.relu(still)) + still)

    net, x = Skip(), images(3)
    snn = convert(net, x, threshold="max", T=512)
    assert relative(snn(x), net(x)) < 0.01
    assert "before the neurons" in snn.report["tanh"].action


def test_batch_size_from_the_input_is_right_between_neurons() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.fc3 = nn.Linear(12, 8), nn.Linear(8, 6), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            batch = x.shape[0]
            h = F.relu(self.fc1(x.view(batch, -1)))
            h = F.relu(self.fc2(h.view(batch, 8)))
            return self.fc3(h.view(batch * 2, 3)).view(batch, -1)

    torch.manual_seed(0)
    net, x = Net(), torch.rand(5, 3, 4)
    snn = convert(net, x, threshold="max", T=512)
    for batch in (1, 2, 5):
        assert relative(snn(x[:batch]), net(x[:batch])) < 0.02


def test_a_layer_that_feeds_neurons_and_the_output_runs_on_rates_behind_them() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc1, self.fc2, self.fc3 = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = self.fc2(F.relu(self.fc1(x)))
            return {"features": h, "answer": self.fc3(F.relu(h)).softmax(1)}

    net, x = TwoHeads(), torch.randn(4, 6)
    out = convert(net, x, threshold="max", T=1024)(x)
    expected = net(x)
    assert set(out) == {"features", "answer"}
    for key, value in out.items():
        torch.testing.assert_close(value, expected[key], atol=5e-3, rtol=0)


def test_batch_norm_folds_with_its_own_eps() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False, groups=1), nn.BatchNorm2d(4, eps=0.5), nn.ReLU()
    )
    with torch.no_grad():
        net[1].running_var.fill_(1e-3)
        net[1].running_mean.fill_(0.1)
        net[1].weight.fill_(-2.0)
    net.eval()
    x = images(2)
    snn = convert(net, x)
    torch.testing.assert_close(snn.prefix(x)[0], net[1](net[0](x)))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in snn.modules())
    assert "folded into 0" in snn.report["1"].action


def test_a_convolution_shared_by_two_batch_norms_folds_twice() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.bn2(self.conv(F.relu(self.bn1(self.conv(x))))))

    net = randomize(Shared())
    x = images(4)
    assert relative(convert(net, x, threshold="max", T=512)(x), net(x)) < 0.01


def test_batch_norm_behind_a_used_convolution_stays() -> None:
    class Used(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.conv2(F.relu(self.conv1(x)))
            return F.relu(self.bn(h)) + h

    net = randomize(Used())
    x = images(4)
    snn = convert(net, x, threshold="max", T=512)
    assert "kept as scale and shift" in snn.report["bn"].action
    assert relative(snn(x), net(x)) < 0.01


def test_first_layer_runs_once_and_last_layer_runs_once() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
    )
    x = images(2)
    snn = convert(net, x)
    sizes: dict[str, list[int]] = {}
    for name, module in snn.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(
                lambda m, args, out, name=name: sizes.setdefault(name, []).append(len(args[0]))
            )
    snn(x, T=5)
    assert sizes == {"prefix.0": [2], "body.2": [10], "suffix.5": [2]}


def test_kept_operations_run_and_are_named() -> None:
    net = Functional(lambda n, h: torch.sigmoid(n.conv2(h))).eval()
    x = images(4)
    snn = convert(net, x, on_unsupported="keep")
    assert "KEPT" in snn.report["sigmoid"].action
    assert math.isfinite(snn(x).sum().item())


def test_nonlinear_tail_runs_once_on_rates() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3), nn.Tanh(), nn.Softmax(1))
    x = torch.rand(4, 6)
    snn = convert(net, x, T=256)
    torch.testing.assert_close(snn(x).sum(1), torch.ones(4))
    assert "once, on rates" in snn.report["4"].action


def test_optional_arguments_take_their_defaults() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor, double: bool = False, scale: float = 1.0) -> Tensor:
            x = self.fc(x)
            if double:
                x = x * 2
            return F.relu(x * scale)

    torch.manual_seed(0)
    net, x = Optional(), torch.rand(4, 3)
    assert relative(convert(net, x, threshold="max", T=512)(x), net(x)) < 0.02


def test_user_subclasses_of_torch_layers_are_known() -> None:
    class Padded(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.pad(x, (1, 1, 1, 1)))

    class MyReLU(nn.ReLU):
        pass

    torch.manual_seed(0)
    net = nn.Sequential(Padded(3, 4, 3), MyReLU(), Padded(4, 4, 3), MyReLU())
    x = images(2)
    assert relative(convert(net, x, threshold="max", T=256)(x), net(x)) < 0.02
