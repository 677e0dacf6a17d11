"""The node with SpikingJelly's defaults, without SpikingJelly, against a loop over its steps."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
import warnings

import pytest
import torch
from support import assert_close, assert_same_bits
from torch import Tensor, nn

import snnkernels
from snnkernels import surrogate
from snnkernels.compat import memory
from snnkernels.compat.spikingjelly import IFNode

pytestmark = pytest.mark.usefixtures("everything_is_said")


def loop(x_seq: Tensor, v: Tensor, v_reset: float | None, detach: bool) -> tuple[Tensor, Tensor]:
    spikes = []
    for x in x_seq:
        m = v + x
        s = surrogate.Sigmoid(4.0)(m - 0.75)
        r = s.detach() if detach else s
        v = m - r * 0.75 if v_reset is None else r * v_reset + (1 - r) * m
        spikes.append(s)
    return torch.stack(spikes), v


def test_defaults_are_theirs() -> None:
    node = IFNode()
    assert (node.v_threshold, node.v_reset, node.detach_reset) == (1.0, 0.0, False)
    assert (node.step_mode, node.store_v_seq, node.v, node.v_seq) == ("s", False, 0.0, None)
    assert node.surrogate_function == surrogate.Sigmoid(4.0)
    kinds = [p.kind for p in inspect.signature(IFNode).parameters.values()]
    assert (
        kinds
        == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 5 + [inspect.Parameter.KEYWORD_ONLY] * 2
    )
    with pytest.raises(TypeError):
        IFNode(1.0, 0.0, None, False, "s", "torch")  # type: ignore[misc]
    assert snnkernels.compat.spikingjelly.IFNode is IFNode


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("v_reset", [None, 0.0, -0.25])
@pytest.mark.parametrize("detach", [False, True])
def test_the_numbers(detach: bool, v_reset: float | None, dtype: torch.dtype) -> None:
    x = ((torch.randn(6, 3, 4) * 12).round() / 16).to(dtype).requires_grad_()
    start = torch.full((3, 4), v_reset or 0.0, dtype=dtype)
    want, v = loop(x, start, v_reset, detach)
    (gradient,) = torch.autograd.grad(want.sum(), x)
    for step_mode in ("m", "s"):
        node = IFNode(0.75, v_reset, detach_reset=detach, step_mode=step_mode)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if dtype == torch.bfloat16 else "error", RuntimeWarning)
            got = node(x) if step_mode == "m" else torch.stack([node(t) for t in x])
        assert_same_bits(got, want)
        assert_same_bits(node.v, v)
        assert_close(torch.autograd.grad(got.sum(), x)[0], gradient, 1e-5)


def test_state() -> None:
    node = IFNode(v_reset=-0.5, store_v_seq=True)
    assert node.v == -0.5
    for _ in range(3):
        node(torch.ones(2))
    assert node.v_seq.shape == (3, 2)
    assert list(node.named_memories()) == [("v", node.v)]
    assert list(node.state_dict()) == []
    for twin in (copy.deepcopy(node), pickle.loads(pickle.dumps(node))):
        assert_same_bits(twin.v, node.v)
    node(torch.ones(5))  # another shape begins anew
    assert_same_bits(node.v, torch.full((5,), 0.5))
    node.v = torch.full((5,), 0.25)
    node.step_mode = "m"
    node(torch.zeros(1, 5))
    assert_same_bits(node.v, torch.full((5,), 0.25))
    assert node.v_seq.shape == (1, 5)
    node.double()
    assert node.v.dtype == torch.float64
    x = torch.ones(1, 5, requires_grad=True)
    node(x)
    node.detach()
    assert not node.v.requires_grad
    node.set_reset_value("v", 0.125)
    snnkernels.reset_net(nn.Sequential(node))
    assert node.v == 0.125
    assert node.v_seq is None
    node.v = 3.0
    assert node(torch.zeros(1, 5)).sum() == 5


def test_any_callable_is_a_surrogate() -> None:
    x = torch.rand(6, 5)
    odd = IFNode(surrogate_function=lambda u: (u >= 0).to(u), step_mode="m")
    with pytest.warns(RuntimeWarning, match="step by step") as warned:
        got = odd(x)
    assert warned[0].filename == __file__
    assert_same_bits(got, IFNode(step_mode="m")(x))
    assert_same_bits(IFNode(surrogate_function="atan", step_mode="m")(x), got)


def test_wrong_arguments() -> None:
    for arguments, error, message in (
        ({"v_threshold": "1"}, TypeError, "v_threshold='1' must be a number"),
        ({"v_threshold": 0.0}, ValueError, "not positive"),
        ({"v_reset": True}, TypeError, "number or None"),
        ({"v_reset": float("inf")}, ValueError, "not finite"),
        ({"step_mode": "x"}, ValueError, "step_mode='x'"),
        ({"backend": 1}, TypeError, "backend=1"),
        ({"surrogate_function": 3}, TypeError, "cannot be called"),
        ({"surrogate_function": "no"}, ValueError, "'no' is unknown"),
    ):
        with pytest.raises(error, match=message):
            IFNode(**arguments)  # type: ignore[arg-type]
    node = IFNode()
    with pytest.raises(TypeError, match="floating-point"):
        node(torch.ones(3, dtype=torch.int64))
    node.step_mode = "m"
    with pytest.raises(ValueError, match="T > 0"):
        node(torch.ones(0, 3))
    with pytest.raises(ValueError, match="an attribute already"):
        node.register_memory("training", 0)


def test_without_spikingjelly_there_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "spikingjelly"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "spikingjelly", None)
    with pytest.raises(ImportError, match="pip install spikingjelly"):
        snnkernels.patched("spikingjelly").__enter__()
    with pytest.raises(ImportError, match="pip install spikingjelly"):
        snnkernels.interop.spikingjelly.recipe([torch.ones(1)])
    assert type(snnkernels.IFNode()) is snnkernels.IFNode


def test_memories() -> None:
    """Attributes that a reset puts back and that move with the module; in no state dict."""

    class Net(memory.MemoryModule):
        def __init__(self) -> None:
            super().__init__(step_mode="m")
            self.weight = nn.Parameter(torch.ones(2))
            self.register_memory("v", torch.zeros(2))
            self.register_memory("seen", [])

    net = Net()
    assert net.supported_step_mode() == ("s", "m")
    assert (net.step_mode, net.backend) == ("m", "torch")
    assert "torch" in net.supported_backends
    assert dict(net.named_memories()).keys() == {"v", "seen"}
    net.v = net.v + net.weight
    net.seen.append(1)
    assert [torch.as_tensor(m).tolist() for m in net.memories()] == [[1.0, 1.0], [1]]
    assert net.v.requires_grad
    copied = copy.deepcopy(net)
    assert torch.equal(copied.v, net.v.detach())
    net.detach()
    assert not net.v.requires_grad
    replica = net._replicate_for_data_parallel()
    replica.v = torch.full((2,), 7.0)
    assert net.v.tolist() == [1.0, 1.0]
    net.reset()
    assert (net.v.tolist(), net.seen) == ([0.0, 0.0], [])
    net.set_reset_value("v", torch.full((2,), 0.5))
    net.double().reset()
    assert net.v.tolist() == [0.5, 0.5]
    assert net.v.dtype == torch.float64
    assert copied.double().v.dtype == torch.float64
    assert list(net.state_dict()) == ["weight"]
    del net.v
    assert not hasattr(net, "v")
    net.reset()
    assert not hasattr(net, "v")
    del net.weight
    assert not hasattr(net, "weight")
    with pytest.raises(ValueError, match="'seen' is an attribute already"):
        net.register_memory("seen", 0)
    with pytest.raises(ValueError, match="step_mode='x' is unknown; allowed are 's' and 'm'"):
        net.step_mode = "x"
    with pytest.raises(TypeError, match="backend=3 must be a string"):
        net.backend = 3  # type: ignore[assignment]
