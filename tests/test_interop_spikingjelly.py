"""SpikingJelly's neurons patched: the same spikes and membranes bit for bit, the same gradients.

In this process with the release that is installed (2.0.0); with 0.0.0.0.14 in a process of its own
where SNNKERNELS_TEST_SJ14 names the folder that holds it.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import PACKAGE, assert_close, assert_same_bits, optional
from support import sixteenths as currents
from torch import Tensor, nn

import snnkernels
from snnkernels import kernels
from snnkernels.interop import pytest_plugin, sj_run, sj_scaled
from snnkernels.interop.patching import PatchError
from snnkernels.interop.spikingjelly import release

optional("spikingjelly")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch.jit.script is deprecated, 0.0.0.0.14 uses it
    from spikingjelly.activation_based import (
        ann2snn,
        base,
        functional,
        layer,
        neuron,
        surrogate,
    )

RELEASE = release()
only_2 = pytest.mark.skipif(RELEASE != "2", reason="0.0.0.0.14 does not have it")
SURROGATES = {
    name: alpha
    for name, alpha in {
        "Sigmoid": 3.0, "ATan": 2.0, "PiecewiseQuadratic": 2.0, "Rect": 1.5, "SuperSpike": 0.7,
        "SoftSign": 1.5, "PiecewiseExp": 2.0, "Erf": 2.0,
    }.items()
    if hasattr(surrogate, name)
}  # fmt: skip
RESETS = (None, 0.0, -0.3)


pytestmark = pytest.mark.usefixtures("everything_is_said")


def run(node: nn.Module, x: Tensor) -> Tensor:
    if node.step_mode == "m":
        return node(x)
    return torch.stack([node(step) for step in x])


def same(a: Any, b: Any, x: Tensor, store: bool = False, calls: int = 2) -> None:
    """Spikes, membranes and gradients over calls that carry the membrane on."""
    xa, xb = x.clone().requires_grad_(), x.clone().requires_grad_()
    ya, yb = [], []
    for _ in range(calls):
        ya.append(run(a, xa))
        yb.append(run(b, xb))
        assert_same_bits(yb[-1], ya[-1], "spikes")
        assert_same_bits(b.v, a.v, "v")
        if store:
            assert_same_bits(b.v_seq, a.v_seq, "v_seq")
    weight = torch.randn_like(ya[0])
    loss_a, loss_b = ((sum(y) * weight).sum() + z.v.sin().sum() for y, z in ((ya, a), (yb, b)))
    (ga,), (gb,) = torch.autograd.grad(loss_a, xa), torch.autograd.grad(loss_b, xb)
    assert_close(gb, ga, 1e-12 if x.dtype == torch.float64 else 2e-5)


def twins(node: nn.Module, **counts: int) -> tuple[Any, Any]:
    """A node and its patched copy."""
    ours = copy.deepcopy(node)
    assert snnkernels.patch(ours).counts == {"fused": 1, "already": 0, "refused": 0, **counts}
    return node, ours


# ---- one neuron ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("v_reset", RESETS)
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_if(step_mode: str, v_reset: float | None, name: str, dtype: torch.dtype) -> None:
    store = RELEASE == "2" or step_mode == "m"
    for detach in (False, True):
        function = getattr(surrogate, name)(SURROGATES[name])
        a, b = twins(
            neuron.IFNode(0.75, v_reset, function, detach, step_mode=step_mode, store_v_seq=store)
        )
        same(a, b, currents(5, 3, 4, dtype=dtype), store)
    for node in (a, b):
        functional.reset_net(node)
        assert node.v == (v_reset or 0.0)
        assert getattr(node, "v_seq", None) is None


def test_if_evaluation_mode() -> None:
    for v_reset in RESETS:
        a, b = twins(neuron.IFNode(v_reset=v_reset, step_mode="m", store_v_seq=True).eval())
        x = currents(6, 50)
        for _ in range(2):
            assert_same_bits(b(x), a(x))
            assert_same_bits(b.v, a.v)
            assert_same_bits(b.v_seq, a.v_seq)


@only_2
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_half_threshold(step_mode: str) -> None:
    a, b = twins(neuron.HalfThresholdIFNode(0.75, step_mode=step_mode, store_v_seq=True))
    assert a.v == b.v == 0.375
    same(a, b, currents(5, 3, 4), store=True)
    # A batch of another size begins at half the threshold.
    x = currents(4, 2, 4)
    assert_same_bits(run(b, x), run(a, x))
    functional.reset_net(b)
    assert b.v == 0.375


@only_2
@pytest.mark.parametrize("v_reset", RESETS)
@pytest.mark.parametrize("offset", [0.0, 0.3, "channels"])
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_activation_aware(step_mode: str, offset: Any, v_reset: float | None) -> None:
    threshold = torch.tensor([0.5, 1.0, 1.3])
    if offset == "channels":
        offset = torch.tensor([0.1, -0.7, 2.0])
    a, b = twins(
        neuron.ActivationAwareIFNode(
            threshold, offset, 1, v_reset, surrogate.ATan(), step_mode=step_mode, store_v_seq=True
        )
    )
    same(a, b, currents(5, 2, 3, 4), store=step_mode == "m")
    with torch.no_grad():
        # Currents around the level at which the rounded sum reaches the threshold.
        for node in (a, b):
            node.reset()
            node.v_offset.mul_(1.7)
        x = currents(5, 2, 3, 4) + torch.randn(5, 2, 3, 4) * 1e-7
        assert_same_bits(run(b, x), run(a, x))
        assert_same_bits(b.v, a.v)
    with pytest.raises(ValueError, match="channels"):
        run(b, currents(5, 2, 4, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fire_level_is_the_least_that_fires(dtype: torch.dtype) -> None:
    threshold = torch.rand(2000, dtype=dtype) * 3 + 1e-3
    offset = torch.randn(2000, dtype=dtype) * torch.logspace(-12, 6, 2000, dtype=dtype)
    level = sj_run.fire_level(threshold, offset)
    below = torch.nextafter(level, torch.full_like(level, -torch.inf))
    assert bool((level + offset >= threshold).all())
    assert not bool((below + offset >= threshold).any())


@pytest.mark.parametrize("tau", [2.0, 4.0])
@pytest.mark.parametrize("v_reset", [None, 0.0])
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_lif_where_its_leak_is_exact(step_mode: str, v_reset: float | None, tau: float) -> None:
    a, b = twins(neuron.LIFNode(tau, False, 0.75, v_reset, step_mode=step_mode))
    same(a, b, torch.randn(7, 3, 40))
    a.eval()
    b.eval()
    for node in (a, b):
        node.reset()
    with torch.no_grad():
        x = torch.randn(7, 3, 40)
        assert_same_bits(run(b, x), run(a, x))
        assert_same_bits(b.v, a.v)


@pytest.mark.skipif(RELEASE != "14", reason="2.0.0 divides by tau")
def test_lif_of_14_multiplies() -> None:
    a, b = twins(neuron.LIFNode(1.7, False, 0.75, None, step_mode="m"))
    same(a, b, torch.randn(7, 3, 40))


# ---- what is refused -----------------------------------------------------------------------------


class Derived(neuron.IFNode):
    pass


def hooked() -> Any:
    function = surrogate.ATan()
    function.register_forward_hook(lambda *_: None)
    return neuron.IFNode(surrogate_function=function)


def with_its_own(name: str) -> Any:
    node = neuron.IFNode()
    node.__dict__[name] = lambda x: x
    return node


def changed(**attributes: Any) -> Any:
    node = neuron.IFNode()
    for name, value in attributes.items():
        setattr(node, name, value)
    return node


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "derived": (Derived, "Derived derives from IFNode"),
    "not spiking": (
        lambda: neuron.IFNode(surrogate_function=surrogate.ATan(spiking=False)),
        "spiking=False",
    ),
    "surrogate": (
        lambda: neuron.IFNode(surrogate_function=surrogate.LeakyKReLU()),
        r"LeakyKReLU\(.*\) is not one of our kernels'",
    ),
    "own surrogate": (lambda: neuron.IFNode(surrogate_function=torch.sign), "not one of SpikingJ"),
    "hooked surrogate": (hooked, "hooks or a forward of its own"),
    "own forward": (lambda: with_its_own("forward"), "has a forward of its own"),
    "own reset": (lambda: with_its_own("reset"), "has a reset of its own"),
    "threshold": (lambda: neuron.IFNode(-1.0), "not positive and finite"),
    "tensor threshold": (lambda: changed(v_threshold=torch.ones(3)), "set to a tensor"),
    "infinite reset": (lambda: neuron.IFNode(v_reset=float("inf")), "not finite"),
    "sign of reset": (lambda: neuron.IFNode(v_reset=-0.0), "sign"),
    "decay_input": (lambda: neuron.LIFNode(), "decay_input=True"),
    "tau": (lambda: neuron.LIFNode(3.0, False, v_reset=0.0), "no power of two"),
    "v_reset": (lambda: neuron.LIFNode(2.0, False, v_reset=-0.3), "ours leak towards 0"),
    "plif": (lambda: neuron.ParametricLIFNode(), "learned leak"),
    "qif": (lambda: neuron.QIFNode(), "there is no kernel"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    make, reason = REFUSED[name]
    model = nn.Sequential(nn.Linear(3, 3), make())
    before = type(model[1])
    with pytest.raises(PatchError, match=reason):
        snnkernels.patch(model, on_refused="error")
    with pytest.warns(UserWarning, match=reason):
        report = snnkernels.patch(model)
    assert [line.path for line in report.refused] == ["1"]
    assert type(model[1]) is before


def test_layers_that_hold_no_neurons_are_no_matter() -> None:
    model = nn.Sequential(layer.Linear(3, 3), layer.Dropout(), neuron.IFNode())
    assert [line.path for line in snnkernels.patch(model)] == ["2"]


# ---- calls that are left to SpikingJelly ---------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_keeps_their_numbers(dtype: torch.dtype) -> None:
    a, b = twins(neuron.IFNode(v_reset=None, step_mode="m"))
    x = (torch.rand(20, 200) * 0.7).to(dtype)
    with pytest.warns(RuntimeWarning, match="keeps the membranes"):
        yb = b(x)
    assert_same_bits(yb, a(x))
    assert_same_bits(b.v, a.v)
    assert b.v.dtype == dtype
    # It would have been another answer, and it is said once.
    assert not torch.equal(snnkernels.functional.if_multi_step(x)[0], yb)
    b(x)
    # Back to float32.
    for node in (a, b):
        node.reset()
    assert_same_bits(b(x.float()), a(x.float()))


def test_odd_calls_are_theirs() -> None:
    odd = (IndexError, TypeError, RuntimeError, AttributeError)
    a, b = twins(neuron.IFNode(step_mode="m"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for x in (torch.ones(0, 3), torch.tensor(1.0), None):
            errors = []
            for node in (a, b):
                with pytest.raises(odd) as error:
                    node(x)
                errors.append(type(error.value))
            assert errors[0] is errors[1]
        a.step_mode = b.step_mode = "s"
        assert_same_bits(b(torch.tensor(1.5)), a(torch.tensor(1.5)))
        for node in (a, b):
            node.reset()
            node.v_threshold = -0.5
        x = torch.zeros(3) - 0.5
        assert_same_bits(b(x), a(x))
        assert_same_bits(b.v, a.v)


def _all_steps(node: Any, x: Tensor) -> Any:
    return node.multi_step_functional_forward((x,), (torch.zeros_like(x[0]),))


def _one_step(node: Any, x: Tensor) -> Any:
    return node.single_step_functional_forward((x[0],), (torch.zeros_like(x[0]),))


def _one_number(node: Any, x: Tensor) -> Any:
    return node.single_step_functional_forward((x[0, 0, 0],), (torch.zeros(()),))


def _by_steps(node: Any, x: Tensor) -> Any:
    return [node(step) for step in x], node.v_seq


def _all(node: Any, x: Tensor) -> Any:
    return node(x), node.v_seq


THEIRS: dict[str, tuple[Any, dict[str, Any], Any, torch.dtype]] = {
    **{
        f"{kind} {how.__name__} {dtype}": (kind, {}, how, dtype)
        for kind in ("if", "half", "lif", "aware")
        for how in (_all, _all_steps, _one_step)
        for dtype in (torch.float32, torch.float16)
    },
    "a number": ("if", {}, _one_number, torch.float32),
    "a leaky number": ("lif", {}, _one_number, torch.float32),
    "stored": ("if", {"store_v_seq": True}, _all, torch.float32),
    "stored step by step": (
        "half", {"store_v_seq": True, "step_mode": "s"}, _by_steps, torch.float32,
    ),
    "stored in halves": ("aware", {"store_v_seq": True}, _all, torch.float16),
    "changed surrogate": ("aware", {"surrogate_function": "S2NN"}, _all, torch.float32),
    "changed threshold": ("if", {"v_threshold": -1.0}, _all, torch.float32),
    "changed leak": ("lif", {"decay_input": True}, _all, torch.float32),
    "membrane of another shape": ("half", {"v": torch.ones(2, 2)}, _all, torch.float32),
    "membrane that is a number": ("lif", {"v": 0.25}, _all, torch.float32),
}  # fmt: skip


@only_2
@pytest.mark.parametrize("case", THEIRS)
def test_every_way_to_call_gives_their_numbers(case: str) -> None:
    kind, changes, how, dtype = THEIRS[case]
    torch.manual_seed(0)
    make = {
        "if": lambda: neuron.IFNode(step_mode="m"),
        "half": lambda: neuron.HalfThresholdIFNode(step_mode="m"),
        "lif": lambda: neuron.LIFNode(decay_input=False, step_mode="m"),
        "aware": lambda: neuron.ActivationAwareIFNode(
            torch.rand(5) + 0.5, torch.rand(5) / 8, step_mode="m"
        ),
    }[kind]
    a, b = twins(make())
    for name, value in changes.items():
        for node in (a, b):
            setattr(node, name, getattr(surrogate, value)() if value == "S2NN" else value)
    x = currents(4, 3, 5).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want, got = how(a, x), how(b, x)
    leaves = [torch.utils._pytree.tree_leaves((out, node.v)) for out, node in ((want, a), (got, b))]
    assert len(leaves[0]) == len(leaves[1]) > 0
    for p, q in zip(*leaves, strict=True):
        assert type(p) is type(q)
        if isinstance(p, Tensor):
            assert_same_bits(q, p)
        else:
            assert p == q


@only_2
def test_transforms_of_torch_func_are_theirs() -> None:
    a, b = twins(neuron.IFNode(step_mode="m"))
    x = currents(4, 3, 5, dtype=torch.float64)

    def loss(node: Any) -> Callable[[Tensor], Tensor]:
        def of(x: Tensor) -> Tensor:
            node.reset()
            return node(x).sum()

        return of

    with pytest.warns(RuntimeWarning, match=r"torch\.func"):
        got = torch.func.grad(loss(b))(x)
    assert_close(got, torch.func.grad(loss(a))(x), 1e-6)


@pytest.mark.skipif(RELEASE != "14", reason="2.0.0 has gradients in evaluation mode")
def test_evaluation_mode_of_14_has_no_gradient() -> None:
    a, b = twins(neuron.IFNode(step_mode="m").eval())
    x = currents(4, 3).requires_grad_()
    assert not a(x).requires_grad
    with pytest.warns(RuntimeWarning, match="no gradient"):
        assert not b(x).requires_grad
    assert_same_bits(b.v, a.v)


# ---- state and what reads it ---------------------------------------------------------------------


def test_the_module_stays_and_comes_back() -> None:
    node = neuron.IFNode(v_reset=None, step_mode="m")
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4), node), "b": node}).eval()
    node(currents(3, 4))
    v = node.v
    report = snnkernels.patch(model)
    assert report.fused[0].shared == ("b",)
    assert model["b"] is node
    assert isinstance(node, neuron.IFNode)
    assert isinstance(node, base.MemoryModule)
    assert node.v is v
    assert not node.training
    node.v = torch.full((4,), 0.5)
    assert node(torch.full((1, 4), 0.5)).sum() == 4
    assert snnkernels.patch(model).counts == {"fused": 0, "already": 1, "refused": 0}
    twin = copy.deepcopy(model)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    for net in (model, twin, loaded):
        assert type(net["b"]).__name__ == "FusedIFNode"
        assert net["a"][1] is net["b"]
        assert snnkernels.unpatch(net) == 1
        assert type(net["b"]) is neuron.IFNode
        assert_same_bits(net["b"].v, node.v)
    assert model["b"] is node


def test_helpers_of_theirs_work_on_a_patched_net() -> None:
    def net() -> nn.Sequential:
        return nn.Sequential(
            layer.Linear(6, 8), neuron.IFNode(), layer.Linear(8, 4), neuron.IFNode(v_reset=None)
        )

    a = net()
    b = copy.deepcopy(a)
    functional.reset_net(b)  # 2.0.0 keeps references to what it resets
    snnkernels.patch(b)
    x = torch.rand(5, 3, 6) * 2
    for mode in ("s", "m", "s"):
        for model in (a, b):
            functional.set_step_mode(model, mode)
            functional.reset_net(model)
            if hasattr(functional, "set_backend"):
                functional.set_backend(model, "torch")
        ya, yb = (
            model(x) if mode == "m" else torch.stack([model(t) for t in x]) for model in (a, b)
        )
        assert_same_bits(yb, ya)
        assert_same_bits(b[3].v, a[3].v)
    functional.detach_net(b)
    assert not b[3].v.requires_grad
    assert list(b.state_dict()) == list(a.state_dict())
    b.load_state_dict(a.state_dict())
    assert repr(b).replace("Fused", "") == repr(a)
    names = [name for name, _ in base.named_memories(b)] if hasattr(base, "named_memories") else []
    assert names == ([name for name, _ in base.named_memories(a)] if names else [])


def test_the_membrane_after_a_batch_of_another_size() -> None:
    a, b = twins(neuron.IFNode(v_reset=-0.25, step_mode="m"))
    if RELEASE == "2":
        for node in (a, b):
            node.set_reset_value("v", 0.5)
            node.reset()
        assert b.v == 0.5
    for n in (3, 3, 2):
        x = currents(4, n)
        errors = []
        for node in (a, b):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore" if n == 2 else "error", RuntimeWarning)
                    node(x)
            except RuntimeError as error:  # 0.0.0.0.14 adds what does not broadcast
                errors.append(type(error))
        assert len(errors) in (0, 2)
    assert_same_bits(b.v, a.v)


def test_monitors() -> None:
    optional("tensorboard")
    from spikingjelly.activation_based import monitor

    def net() -> nn.Sequential:
        return nn.Sequential(
            layer.Linear(6, 8),
            neuron.IFNode(step_mode="m", store_v_seq=True),
            layer.Linear(8, 4),
            neuron.IFNode(step_mode="m", store_v_seq=True),
        )

    a = net()
    b = copy.deepcopy(a)
    snnkernels.patch(b)
    functional.set_step_mode(a, "m")
    functional.set_step_mode(b, "m")
    records = []
    for model in (a, b):
        out = monitor.OutputMonitor(model, neuron.IFNode)
        inputs = monitor.InputMonitor(model, neuron.IFNode)
        v_seq = monitor.AttributeMonitor("v_seq", False, model, neuron.IFNode)
        grads = monitor.GradOutputMonitor(model, neuron.IFNode)
        torch.manual_seed(3)
        x = torch.rand(5, 3, 6) * 2
        model(x).sum().backward()
        assert out.monitored_layers == ["1", "3"]
        records.append((out.records, inputs.records, v_seq.records, grads.records))
        for each in (out, inputs, v_seq, grads):
            each.remove_hooks()
    for theirs, ours in zip(*records, strict=True):
        assert len(ours) == len(theirs) > 0
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_it_trains_the_same() -> None:
    torch.manual_seed(1)
    a = nn.Sequential(
        layer.Linear(6, 16), neuron.IFNode(surrogate_function=surrogate.ATan()),
        layer.Linear(16, 3), neuron.IFNode(v_reset=None),
    )  # fmt: skip
    functional.set_step_mode(a, "m")
    b = copy.deepcopy(a)
    snnkernels.patch(b)
    losses = []
    for model in (a, b):
        torch.manual_seed(2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(5):
            optimizer.zero_grad()
            loss = (model(torch.rand(4, 8, 6) * 2).mean(0) - 0.5).square().mean()
            loss.backward()
            optimizer.step()
            functional.reset_net(model)
            losses.append(loss.item())
    assert losses[:5] == pytest.approx(losses[5:], rel=1e-5)
    assert losses[4] != losses[0]


# ---- networks that SpikingJelly converted --------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.relu1, self.relu2, self.relu3 = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.pool, self.flatten = nn.AvgPool2d(2), nn.Flatten()
        self.fc1, self.fc2 = nn.Linear(128, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn(self.conv1(x)))
        x = self.relu2(self.conv2(x)) + x
        return self.fc2(self.relu3(self.fc1(self.flatten(self.pool(x)))))


RECIPES = {"layer": {}, "99.9%": {"mode": "99.9%"}}
if RELEASE == "2":
    RECIPES |= {
        "channel": {"channel_wise": True},
        "half": {"channel_wise": True, "half_threshold": True},
    }


def converted(name: str) -> nn.Module:
    torch.manual_seed(4)
    ann = Net()
    for _ in range(3):
        ann(torch.randn(16, 3, 8, 8))
    loader = [(torch.randn(4, 3, 8, 8), torch.zeros(4)) for _ in range(2)]
    os.environ["TQDM_DISABLE"] = "1"
    if RELEASE == "14":
        return ann2snn.Converter(dataloader=loader, **RECIPES[name])(ann.eval())
    recipe = ann2snn.RateCodingRecipe(loader, **RECIPES[name])
    return ann2snn.Converter(recipe=recipe).convert(ann.eval())


def neurons(net: nn.Module) -> list[Any]:
    return [m for m in net.modules() if isinstance(m, neuron.BaseNode)]


@pytest.mark.parametrize("name", RECIPES)
def test_converted_networks(name: str) -> None:
    theirs = converted(name)
    ours = copy.deepcopy(theirs)
    report = snnkernels.patch(ours)
    assert report.counts == {"fused": 3, "already": 0, "refused": 0}
    assert all("one with the scalers" in line.reason for line in report)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(6, 2, 3, 8, 8)
    with torch.no_grad():
        for step in x:
            assert_same_bits(ours(step), theirs(step))
        for a, b in zip(neurons(theirs), neurons(ours), strict=True):
            assert_same_bits(b.v, a.v)
    if RELEASE == "2":
        for net in (theirs, ours):
            functional.reset_net(net)
            functional.set_step_mode(net, "m")
        xs = [x.clone().requires_grad_() for _ in range(2)]
        answers = [net(x) for net, x in zip((theirs, ours), xs, strict=True)]
        assert_same_bits(answers[1], answers[0])
        want, got = (torch.autograd.grad(y.sum(), x)[0] for y, x in zip(answers, xs, strict=True))
        assert_close(got, want, 1e-5)
    assert snnkernels.patch(ours).counts["already"] == 3
    assert snnkernels.unpatch(ours) == 3
    pairs = list(zip(ours.modules(), theirs.modules(), strict=True))
    for one, other in pairs[1:]:  # each GraphModule has a class of its own
        assert type(one) is type(other)
        assert set(one.__dict__) == set(other.__dict__)


def test_scalers_and_neuron_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    net = converted("layer")
    snnkernels.patch(net)
    calls = []
    inner = sj_run.run

    def counted(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(set(kwargs) & {"input_scale", "amplitude"})
        return inner(x, *args, **kwargs)

    monkeypatch.setattr(sj_run, "run", counted)
    net(torch.randn(2, 3, 8, 8))
    assert calls == [{"input_scale", "amplitude"}] * 3


@only_2
def test_a_patched_network_is_compiled_in_one_graph() -> None:
    theirs = converted("half")
    ours = copy.deepcopy(theirs)
    snnkernels.patch(ours)
    for net in (theirs, ours):
        functional.set_step_mode(net, "m")
    x = torch.randn(4, 2, 3, 8, 8)
    with torch.no_grad():
        got = torch.compile(ours, backend="eager", fullgraph=True)(x)
        assert_same_bits(got, theirs(x))


def test_whoever_looks_at_one_of_the_three_sees_what_was_there() -> None:
    theirs = converted("layer")
    ours = copy.deepcopy(theirs)
    snnkernels.patch(ours)
    kinds = (neuron.IFNode, type(theirs.get_submodule(scaler_path(theirs))))
    x = torch.randn(2, 3, 8, 8)
    seen = []
    for net in (theirs, ours):
        handles = []
        values: list[Tensor] = []
        for module in net.modules():
            if isinstance(module, kinds):
                handles.append(
                    module.register_forward_hook(
                        lambda m, args, out, values=values: values.extend((args[0], out))
                    )
                )
        for _ in range(3):
            net(x)
        seen.append(values)
        for handle in handles:
            handle.remove()
    assert len(seen[0]) == len(seen[1]) == 3 * 9 * 2
    for got, want in zip(seen[1], seen[0], strict=True):
        assert_same_bits(got, want)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, args, out: None)
    try:
        assert_same_bits(ours(x), theirs(x))
    finally:
        handle.remove()
    assert_same_bits(ours(x), theirs(x))


def scaler_path(net: nn.Module) -> str:
    return next(n for n, m in net.named_modules() if "Scaler" in type(m).__name__)


def test_converted_networks_in_half_precision() -> None:
    theirs = converted("layer")
    ours = copy.deepcopy(theirs)
    snnkernels.patch(ours)
    x = torch.randn(2, 3, 8, 8).bfloat16()
    theirs.bfloat16()
    ours.bfloat16()
    with pytest.warns(RuntimeWarning, match="keeps the membranes"):
        got = ours(x)
    assert_same_bits(got, theirs(x))


def test_a_scaler_used_twice_stays_a_scaler() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = ann2snn.modules.VoltageScaler(2.0)
            self.node = neuron.IFNode(v_reset=None)
            self.last = ann2snn.modules.VoltageScaler(0.5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(self.node(x)) + x

    theirs = torch.fx.GraphModule(Twice(), twice_graph())
    ours = copy.deepcopy(theirs)
    assert snnkernels.patch(ours).fused[0].reason == ""
    x = torch.rand(5)
    assert_same_bits(ours(x), theirs(x))


def twice_graph() -> torch.fx.Graph:
    graph = torch.fx.Graph()
    x = graph.call_module("first", (graph.placeholder("x"),))
    out = graph.call_module("last", (graph.call_module("node", (x,)),))
    graph.output(graph.call_method("add", (out, x)))
    return graph


def test_what_is_handed_on_is_nothing_else() -> None:
    """A graph that is changed afterwards fails instead of taking unscaled currents for scaled."""
    net: Any = converted("layer")
    snnkernels.patch(net)
    scaler = net.get_submodule(scaler_path(net))
    out = scaler(torch.randn(2, 8, 8, 8))
    assert type(out) is sj_scaled.Unscaled
    with pytest.raises(TypeError):
        torch.relu(out)


# ---- patched() -----------------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many steps each call of our kernels had."""
    calls: list[int] = []
    inner = sj_run.run

    def counted(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(x.shape[0])
        return inner(x, *args, **kwargs)

    monkeypatch.setattr(sj_run, "run", counted)
    return calls


def test_patched(launches: list[int]) -> None:
    x = currents(5, 3, 4)
    want = neuron.IFNode(step_mode="m")(x)
    owner = functional if RELEASE == "2" else neuron.IFNode
    name = "if_multi_step" if RELEASE == "2" else "multi_step_forward"
    theirs = getattr(owner, name)
    with snnkernels.patched("spikingjelly"):
        assert_same_bits(neuron.IFNode(step_mode="m")(x), want)
        node = neuron.IFNode()
        assert_same_bits(torch.stack([node(step) for step in x]), want)
        assert launches == [5, 1, 1, 1, 1, 1]
        with snnkernels.patched("spikingjelly"):
            pass
        assert getattr(owner, name) is not theirs
    assert getattr(owner, name) is theirs
    with pytest.raises(RuntimeError, match="inside"), snnkernels.patched("spikingjelly"):
        raise RuntimeError("inside")
    assert getattr(owner, name) is theirs
    launches.clear()
    neuron.IFNode(step_mode="m")(x)
    assert launches == []


def test_patched_leaves_what_would_differ(launches: list[int]) -> None:
    x = torch.randn(5, 3, 40)
    nodes: dict[str, Callable[[], Any]] = {
        "decay_input": lambda: neuron.LIFNode(step_mode="m"),
        "plif": lambda: neuron.ParametricLIFNode(step_mode="m"),
        "derived": lambda: OwnCharge(step_mode="m"),
        "spiking": lambda: neuron.IFNode(
            surrogate_function=surrogate.ATan(spiking=False), step_mode="m"
        ),
    }
    for name, make in nodes.items():
        want = make()(x)
        with snnkernels.patched("spikingjelly"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            assert_same_bits(make()(x), want, name)
    assert launches == []


class OwnCharge(neuron.IFNode):
    """Its own charge, as both releases let one write it."""

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v + 2 * x

    if RELEASE == "2":

        def single_step_functional_forward(self, inputs: Any, states: Any, **kwargs: Any) -> Any:
            v = states[0] + 2 * inputs[0]
            spike = self.surrogate_function(v - self.v_threshold)
            return (spike,), (v - spike, *states[1:])

        multi_step_functional_forward = base.MemoryModule.multi_step_functional_forward


@only_2
def test_patched_functions(launches: list[int]) -> None:
    x, v = currents(4, 6), torch.zeros(6)
    calls = [
        lambda: functional.if_multi_step(x, v),
        lambda: functional.if_multi_step(x, v, 0.5, None, surrogate.ATan(), True, True),
        lambda: functional.lif_multi_step(x, v, 2.0, False, 0.5, None),
        lambda: functional.if_step(x[0], v, 1.0, 0.0, surrogate.ATan()),
    ]
    for call in calls:
        want = call()
        with snnkernels.patched("spikingjelly"):
            got = call()
        for one, other in zip(got, want, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert_same_bits(one, other)
    assert launches == [4, 4, 4, 1]


# ---- compat --------------------------------------------------------------------------------------


@only_2
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("v_reset", RESETS)
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_compat_node(step_mode: str, v_reset: float | None, dtype: torch.dtype) -> None:
    a = neuron.IFNode(v_reset=v_reset, step_mode=step_mode, store_v_seq=True)
    b = snnkernels.compat.spikingjelly.IFNode(
        v_reset=v_reset, step_mode=step_mode, store_v_seq=True, backend="cupy"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if dtype == torch.bfloat16 else "error", RuntimeWarning)
        if dtype == torch.bfloat16:
            x = currents(5, 3, 4, dtype=dtype)
            assert_same_bits(run(b, x), run(a, x))
        else:
            same(a, b, currents(5, 3, 4, dtype=dtype), store=True)
        x = currents(4, 2, dtype=dtype)
        assert_same_bits(run(b, x), run(a, x))
        assert_same_bits(b.v, a.v)
    functional.reset_net(b)
    assert b.v == (v_reset or 0.0)


def test_compat_nodes_are_their_memory_modules() -> None:
    node = snnkernels.compat.spikingjelly.IFNode()
    assert isinstance(node, base.MemoryModule)
    net = nn.Sequential(layer.Linear(3, 3), node)
    functional.set_step_mode(net, "m")
    net(torch.rand(4, 2, 3))
    functional.detach_net(net)
    functional.reset_net(net)
    net.to(torch.float64)
    assert node(torch.rand(4, 2, 3)).shape == (4, 2, 3)
    for twin in (copy.deepcopy(node), pickle.loads(pickle.dumps(node))):
        assert type(twin) is type(node)
        assert twin.step_mode == "m"
    # A pickle of one names the class that is always there.
    assert b"joined" in pickle.dumps(node)
    plain = pickle.dumps(snnkernels.compat.spikingjelly.IFNode(surrogate_function="sigmoid"))
    assert b"spikingjelly.activation_based" not in plain


def test_our_own_classes_are_the_same_with_spikingjelly_loaded(tmp_path: Path) -> None:
    for cls in (snnkernels.IFNode, snnkernels.LIFNode):
        node = cls()
        assert type(node) is cls
        functional.set_step_mode(nn.Sequential(node), "s")  # it says so and does it
        assert node.step_mode == "s"
        node(torch.ones(3))
        functional.reset_net(nn.Sequential(node))
        assert node.v == 0.0
    optional("safetensors")
    x = torch.rand(4, 6)
    ann = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    snn = snnkernels.convert(ann, x, T=4, progress=False)
    snn.save_pretrained(tmp_path)
    with torch.no_grad():
        assert_same_bits(snnkernels.load_pretrained(tmp_path)(x), snn(x))


# ---- the converter -------------------------------------------------------------------------------


@only_2
def test_their_recipe_with_our_neurons() -> None:
    torch.manual_seed(4)
    ann = Net().eval()
    loader = [torch.randn(4, 3, 8, 8)]
    answers = []
    for factory in (
        lambda scale: snnkernels.compat.spikingjelly.IFNode(v_reset=None),
        lambda scale: neuron.IFNode(v_reset=None),
    ):
        recipe = ann2snn.RateCodingRecipe(loader, neuron_factory=factory)
        net = ann2snn.Converter(recipe=recipe).convert(ann)
        functional.set_step_mode(net, "m")
        answers.append(net(loader[0].expand(6, *loader[0].shape)))
    assert_same_bits(*answers)


@only_2
def test_our_recipe_in_their_converter() -> None:
    import torch.nn.functional as F

    class Pooled(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.bn(self.conv1(x)))
            x = self.max(self.relu2(self.conv2(x)))
            return self.fc2(self.fc1(self.flatten(x)).relu())

        def __init__(self) -> None:
            super().__init__()
            self.max = nn.MaxPool2d(2)

    torch.manual_seed(4)
    ann = Pooled()
    for _ in range(3):
        ann(torch.randn(16, 3, 8, 8))
    ann.eval()
    kept = {name: t.clone() for name, t in ann.state_dict().items()}
    x = torch.randn(8, 3, 8, 8)
    recipe = snnkernels.interop.spikingjelly.recipe([(x, None)], T=8)
    snn = ann2snn.Converter(recipe=recipe).convert(ann)
    for name, t in ann.state_dict().items():
        assert torch.equal(t, kept[name])
    nodes = [m for m in snn.modules() if isinstance(m, snnkernels.IFNode)]
    assert len(nodes) == 3
    assert all(n.v_init == "half" and n.amplitude == "threshold" for n in nodes)
    # The same network as our own converter's.
    mine = snnkernels.convert(ann, x, T=8, progress=False)
    with torch.no_grad():
        for T in (1, 8, 32):
            functional.reset_net(snn)
            by_step = sum(snn(x) for _ in range(T)) / T
            functional.reset_net(snn)
            functional.set_step_mode(snn, "m")
            at_once = snn(x.expand(T, *x.shape)).mean(0)
            functional.set_step_mode(snn, "s")
            assert_close(at_once, by_step, 1e-5)
            assert_close(by_step, mine(x, T=T), 1e-3)
    for options, message in (
        ({"T": 0}, "T=0"),
        ({"threshold": "most"}, "'most' is not known"),
        ({"threshold": "ltb"}, "allowed here"),
        ({"v_init": 2.0}, r"v_init=2\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            snnkernels.interop.spikingjelly.recipe([x], **options)
    with pytest.raises(ValueError, match="no ReLU"):
        ann2snn.Converter(recipe=snnkernels.interop.spikingjelly.recipe([x])).convert(
            nn.Conv2d(3, 2, 1)
        )


# ---- the pytest plug-in --------------------------------------------------------------------------


SUITE = """
import torch
from spikingjelly.activation_based import neuron

def test_a_node_of_theirs():
    node = neuron.IFNode(step_mode="m")
    assert node(torch.full((4, 3), 0.6)).sum() == 6
    assert type(node).__module__.startswith("snnkernels")

class Own(neuron.IFNode):
    def single_step_functional_forward(self, inputs, states, **kwargs):
        return (inputs[0] * 0 + 7,), states

def test_what_derives_keeps_its_own_steps():
    if hasattr(neuron.IFNode, "multi_step_functional_forward"):
        node = Own()
        assert node(torch.zeros(3)).sum() == 21
"""


@pytest.mark.slow
def test_plugin(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)
    path = filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH")))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull]
    command += ["-p", "snnkernels.interop.pytest_plugin", "--snnkernels=spikingjelly"]
    done = subprocess.run(
        [*command, "--rootdir", str(tmp_path), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    assert "snnkernels: 1 calls on its kernels" in done.stdout


def test_plugin_wants_a_library_and_puts_all_back() -> None:
    class Config:
        def __init__(self, *libraries: str) -> None:
            self.stash, self.libraries = pytest.Stash(), list(libraries)

        def getoption(self, name: str) -> list[str]:
            return self.libraries

    before = (neuron.IFNode, kernels.call.run)
    for libraries, message in (((), "name the library"), (("no",), "'no' is unknown")):
        with pytest.raises(pytest.UsageError, match=message):
            pytest_plugin.pytest_configure(Config(*libraries))
        assert (neuron.IFNode, kernels.call.run) == before
    config: Any = Config("spikingjelly")
    pytest_plugin.pytest_configure(config)
    assert neuron.IFNode.__module__.startswith("snnkernels")
    assert "spikingjelly" in pytest_plugin.pytest_report_header(config)
    pytest_plugin.pytest_unconfigure(config)
    assert (neuron.IFNode, kernels.call.run) == before


# ---- release 0.0.0.0.14 --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif("SNNKERNELS_TEST_SJ14" not in os.environ, reason="SNNKERNELS_TEST_SJ14 not set")
def test_release_14() -> None:
    """This file again, with the older release first on the path."""
    environment = dict(os.environ)
    folder = Path(environment.pop("SNNKERNELS_TEST_SJ14"))
    assert (folder / "spikingjelly").is_dir(), folder
    path = filter(None, (str(folder), str(PACKAGE.parent), environment.get("PYTHONPATH")))
    environment["PYTHONPATH"] = os.pathsep.join(path)
    # Not `python -m pytest`, which puts the folder it runs in before the package under test.
    run = "import sys, pytest; sys.path[:] = filter(None, sys.path); sys.exit(pytest.main())"
    command = [sys.executable, "-c", run, "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [*command, "-W", "ignore::DeprecationWarning"],
        env=environment, capture_output=True, text=True, check=False,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout
    assert int(passed[1]) > 100, done.stdout  # what only the other release has is skipped
