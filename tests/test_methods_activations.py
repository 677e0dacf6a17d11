"""Activations that networks are trained with: values, gradients, names in checkpoints."""

from __future__ import annotations

import math

import pytest
import torch
from support import optional
from torch import Tensor, nn

import snnkernels
from snnkernels import models
from snnkernels.conversion import (
    ACTIVATIONS,
    QCFS,
    ClipReLU,
    RateNorm,
    ThresholdReLU,
    lock_rates,
    name_activation,
    rate_inference_loss,
    record_rates,
)
from snnkernels.conversion.methods import ThresholdReLUMethod

# ---- QCFS --------------------------------------------------------------------------------------


def _qcfs_oracle(x: float, lam: float, levels: int, clip_first: bool) -> tuple[float, float, float]:
    """Value and gradients of one number, with d floor = 1."""
    q = math.floor(x * levels / lam + 0.5)
    value = lam * min(max(q / levels, 0.0), 1.0)
    passes = 0 <= x / lam <= 1 if clip_first else 0 <= q <= levels
    return value, float(passes), (value - x) / lam if passes else value / lam


@pytest.mark.parametrize("gradient", ["floor_clip", "clip_floor"])
def test_qcfs_gradients(gradient: str) -> None:
    """Both orders of floor and clip: values alike, gradients apart beyond [0, lam]."""
    levels, lam = 4, 2.0
    x = torch.tensor([-0.5, -0.25, -0.1, 0.0, 0.2, 0.25, 0.9, 1.74, 2.0, 2.1, 2.24, 2.25, 3.0])
    x = x.double().requires_grad_()
    act = QCFS(levels, lam, gradient).double()
    out = act(x)
    out.sum().backward()
    wanted = [_qcfs_oracle(v, lam, levels, gradient == "clip_floor") for v in x.tolist()]
    assert out.tolist() == [w[0] for w in wanted]
    assert x.grad is not None
    assert x.grad.tolist() == [w[1] for w in wanted]
    assert act.lam.grad is not None
    assert float(act.lam.grad) == pytest.approx(sum(w[2] for w in wanted), rel=1e-12)


def test_qcfs_conventions_differ_beyond_the_ceiling() -> None:
    grads = []
    for gradient in ("floor_clip", "clip_floor"):
        x = torch.tensor([-0.2, 2.2], requires_grad=True)
        QCFS(4, 2.0, gradient)(x).sum().backward()
        assert x.grad is not None
        grads.append(x.grad.tolist())
    assert grads == [[1.0, 1.0], [0.0, 0.0]]
    assert QCFS().gradient == "floor_clip"


def test_qcfs_refuses() -> None:
    with pytest.raises(ValueError, match="gradient='ste' is unknown"):
        QCFS(gradient="ste")
    with pytest.raises(ValueError, match="levels must be a whole number"):
        QCFS(levels=0)


# ---- ThresholdReLU -----------------------------------------------------------------------------


def test_threshold_relu_values_and_closed_gradient() -> None:
    """Threshold ReLU (Deng and Gu): x on [0, V], V above; gradient 1 on the closed interval."""
    x = torch.tensor([-1.0, 0.0, 0.5, 2.0, 2.5], requires_grad=True)
    out = ThresholdReLU(2.0)(x)
    assert out.tolist() == [0.0, 0.0, 0.5, 2.0, 2.0]
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


def test_threshold_relu_shift() -> None:
    """The training shift V / (2 T_ref): V = 2, T_ref = 4 takes 1/4."""
    act = ThresholdReLU(2.0, shift_steps=4)
    assert act.shift == 0.25
    assert ThresholdReLU(2.0).shift == 0
    x = torch.tensor([0.125, 0.25, 0.75, 2.25, 2.5], requires_grad=True)
    out = act(x)
    assert out.tolist() == [0.0, 0.0, 0.5, 2.0, 2.0]
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_activations_keep_dtype_and_nan(dtype: torch.dtype) -> None:
    x = torch.tensor([-1.0, 0.5, 9.0, math.nan], dtype=dtype)
    for act in (ThresholdReLU(2.0, 4), RateNorm().eval(), ClipReLU(), QCFS()):
        out = act(x)
        assert out.dtype == dtype
        assert out[0] == 0
        assert out[:3].isfinite().all()
        assert out[3].isnan()


def test_threshold_relu_refuses() -> None:
    with pytest.raises(ValueError, match="ceiling must be positive"):
        ThresholdReLU(0.0)
    with pytest.raises(ValueError, match="shift_steps must be a whole number"):
        ThresholdReLU(1.0, 0)


# ---- RateNorm ----------------------------------------------------------------------------------


def test_rate_norm_follows_the_maxima() -> None:
    """theta = sigmoid(10) running_max + 1e-6, running_max an average of momentum 0.1."""
    act = RateNorm()
    running = 1.0
    for batch in ([[0.5, 3.0]], [[-2.0, -1.0]], [[7.0, 1.0]]):
        x = torch.tensor(batch)
        running = 0.9 * running + 0.1 * max(0.0, max(batch[0]))
        theta = running / (1 + math.exp(-10)) + 1e-6
        wanted = [min(max(v, 0.0) / theta, 1.0) for v in batch[0]]
        assert act(x).flatten().tolist() == pytest.approx(wanted, rel=1e-6)
        assert float(act.running_max) == pytest.approx(running, rel=1e-6)
        assert float(act.theta) == pytest.approx(theta, rel=1e-6)
    act.eval()
    act(torch.full((2, 2), 100.0))
    assert float(act.running_max) == pytest.approx(running, rel=1e-6)
    act.train()
    act(torch.empty(0, 2))
    assert float(act.running_max) == pytest.approx(running, rel=1e-6)


def test_rate_norm_abs_scale() -> None:
    act = RateNorm(p="abs", scale=-0.5).eval()
    act.running_max.fill_(4.0)
    assert float(act.theta) == pytest.approx(2.0 + 1e-6)
    assert act(torch.tensor([1.0, 3.0])).tolist() == pytest.approx([0.5, 1.0], rel=1e-5)


def test_rate_norm_gradients() -> None:
    """Of x: 1 / theta inside, 0 at and below 0 and above theta; of scale once it is trained."""
    act = RateNorm(p="abs", scale=0.5).double()
    act.running_max.fill_(4.0)
    act.locked = True
    x = torch.tensor([-1.0, 0.5, 1.5, 3.0], dtype=torch.float64, requires_grad=True)
    assert not act.scale.requires_grad
    act.scale.requires_grad_(True)
    act(x).sum().backward()
    theta = float(act.theta.detach())
    assert x.grad is not None
    assert x.grad.tolist() == pytest.approx([0, 1 / theta, 1 / theta, 0])
    assert act.scale.grad is not None
    assert float(act.scale.grad) == pytest.approx(-(0.5 + 1.5) / theta**2 * 4.0, rel=1e-9)


def test_rate_norm_called_twice_in_one_pass() -> None:
    act = RateNorm()
    act.scale.requires_grad_(True)
    x = torch.tensor([0.5, 2.0], requires_grad=True)
    (act(x) + act(2 * x)).sum().backward()
    assert act.scale.grad is not None


def test_rate_norm_refuses() -> None:
    with pytest.raises(ValueError, match="momentum must be in"):
        RateNorm(momentum=0.0)
    with pytest.raises(ValueError, match="p='softplus' is unknown"):
        RateNorm(p="softplus")
    with pytest.raises(ValueError, match="scale must be finite and not 0"):
        RateNorm(p="abs", scale=0.0)


def _rate_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    a, b = RateNorm(scale=1.0), RateNorm(scale=1.0)
    return nn.Sequential(nn.Linear(6, 8), a, nn.Linear(8, 8), b, nn.Linear(8, 3))


def test_second_stage_trains_scales_alone() -> None:
    net = _rate_net()
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    net(x)
    scales = lock_rates(net)
    assert [id(p) for p in net.parameters() if p.requires_grad] == [id(p) for p in scales]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with record_rates(net) as rates:
        net(x)
    assert [r.shape for r in rates] == [(16, 8), (16, 8)]
    loss = rate_inference_loss(rates)
    loss.backward()
    with torch.no_grad():
        for p in scales:
            assert p.grad is not None
            assert p.grad > 0  # smaller thresholds give larger rates, which come sooner
            p -= 0.1 * p.grad
    changed = [k for k, v in net.state_dict().items() if not torch.equal(v, before[k])]
    assert changed == ["1.scale", "3.scale"]
    with record_rates(net) as again, torch.no_grad():
        net(x)
    assert rate_inference_loss(again) < loss


def test_shared_scale_is_one_parameter(tmp_path) -> None:
    optional("safetensors")
    net = models.resnet20(activation=RateNorm)
    (scale,) = lock_rates(net, shared=True)
    assert scale.item() == 2.5
    layers = [m for m in net.modules() if isinstance(m, RateNorm)]
    assert all(m.scale is scale and m.locked for m in layers)
    path = tmp_path / "shared.safetensors"
    models.save_checkpoint(net, path, "resnet20", **name_activation(layers[0]))
    loaded = models.load_checkpoint(path, activations=ACTIVATIONS).model
    assert {float(m.scale) for m in loaded.modules() if isinstance(m, RateNorm)} == {2.5}


def test_rate_inference_loss_by_hand() -> None:
    """||r||_1 / ||r||_2^2 of each sample, the mean over samples, the sum over layers."""
    a = torch.tensor([[0.5, 0.5], [0.0, 0.0]])  # 1 / 0.5 = 2, and a silent sample: 0
    b = torch.tensor([[1.0, 0.5], [0.25, 0.0]])  # 1.5 / 1.25 = 1.2 and 4
    assert float(rate_inference_loss([a, b])) == pytest.approx(1.0 + 2.6)
    a.requires_grad_()
    rate_inference_loss([a]).backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()
    assert a.grad[1].tolist() == [0, 0]
    with pytest.raises(ValueError, match="rates is empty"):
        rate_inference_loss([])
    with pytest.raises(ValueError, match="has no RateNorm"):
        lock_rates(nn.Linear(2, 2))


def test_rate_inference_loss_bounds_the_error_of_rates() -> None:
    """The fit curve: relative squared error of floored rates after t steps is below 2 Omega / t."""
    r = torch.rand(64, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in (1, 2, 4, 8, 32):
        found = torch.floor(r * t) / t
        relative = ((found - r).square().sum(1) / r.square().sum(1)).mean()
        assert float(relative) < 2 * float(rate_inference_loss([r])) / t


# ---- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module",
    [
        nn.ReLU(),
        ClipReLU(3.0),
        QCFS(4, 2.0, "clip_floor"),
        ThresholdReLU(1.5),
        ThresholdReLU(1.5, 8),
        RateNorm(p="abs"),
    ],
    ids=repr,
)
def test_checkpoints_bring_their_activation_back(module: nn.Module, tmp_path) -> None:
    optional("safetensors")
    import copy

    net = models.resnet20(activation=lambda: copy.deepcopy(module)).eval()
    path = tmp_path / "net.safetensors"
    models.save_checkpoint(net, path, "resnet20", **name_activation(module))
    loaded = models.load_checkpoint(path, activations=ACTIVATIONS).model
    assert repr(loaded.stem[2]) == repr(module)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(net(x), loaded(x))


def test_unknown_activation_has_no_name() -> None:
    with pytest.raises(ValueError, match="GELU has no name in checkpoints"):
        name_activation(nn.GELU())


def test_they_are_public() -> None:
    assert snnkernels.ThresholdReLU is ThresholdReLU
    assert snnkernels.RateNorm is RateNorm
    assert {"ThresholdReLU", "RateNorm"} <= set(dir(snnkernels))


# ---- found by the converter --------------------------------------------------------------------


class _Twice(nn.Module):
    """One activation module called at two places."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.act(self.b(self.act(self.a(x)))))


@pytest.mark.parametrize(
    ("act", "method"),
    [
        (ThresholdReLU(1.0), ThresholdReLUMethod(None)),
        (ThresholdReLU(1.0, 4), ThresholdReLUMethod(None)),
        (RateNorm(), "rnl"),
    ],
    ids=["threshold_relu", "shifted", "rate_norm"],
)
def test_every_call_becomes_neurons(act: nn.Module, method: object) -> None:
    torch.manual_seed(0)
    net = _Twice(act).eval()
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    snn = snnkernels.convert(net, x, method=method, T=1024, progress=False)
    assert [name for name, _ in snn.neurons()] == ["act", "act_2"]
    with torch.no_grad():
        assert (snn(x) - net(x)).norm() / net(x).norm() < 0.02
