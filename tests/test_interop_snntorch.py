"""snnTorch's networks over all steps at once, against their own loop over time."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from support import assert_close, assert_same_bits, optional, sixteenths
from torch import Tensor, nn

import snnkernels
from snnkernels import surrogate, surrogate_foreign
from snnkernels.interop import Refused

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    snn = optional("snntorch")
    from snntorch import surrogate as slopes
    from snntorch import utils


pytestmark = pytest.mark.usefixtures("everything_is_said")
currents = partial(sixteenths, scale=20)


def loop(net: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    made = [net(row) for row in x]
    if isinstance(made[0], Tensor):
        return (torch.stack(made),)
    return tuple(torch.stack(rows) for rows in zip(*made, strict=True))


def check(net: nn.Module, x: Tensor, rtol: float = 2e-6, **given: Any) -> None:
    """Outputs over two calls that carry the membrane on, gradients of x and parameters."""
    other = copy.deepcopy(net)
    fast = snnkernels.from_snntorch(other, **given)
    for call in range(2):
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        want, got = loop(net, leaves[0]), fast(leaves[1])
        got = got if isinstance(got, tuple) else (got,)
        assert len(got) == len(want)
        weights = [torch.randn_like(w) for w in want]
        grads = []
        for outs, leaf, module in ((want, leaves[0], net), (got, leaves[1], other)):
            loss = sum((o * w).sum() for o, w in zip(outs, weights, strict=True))
            wanted = [leaf, *module.parameters()]
            grads.append(torch.autograd.grad(loss, wanted))
        for a, b in zip(got, want, strict=True):
            # 0 * membrane and - reset * threshold leave zeros of either sign.
            assert torch.equal(a, b), f"call {call}"
            assert a.dtype == b.dtype
        for a, b in zip(grads[1], grads[0], strict=True):
            assert_close(a, b, rtol)
        for a, b in zip(net.modules(), other.modules(), strict=True):
            if hasattr(a, "mem"):
                assert torch.equal(a.mem, b.mem)
                a.mem, b.mem = a.mem.detach(), b.mem.detach()


NEURONS: tuple[dict[str, Any], ...] = (
    {},
    {"beta": 0.9, "spike_grad": slopes.fast_sigmoid()},
    {"beta": 0.8, "threshold": 0.7, "spike_grad": slopes.sigmoid(4)},
    {"beta": 0.5, "reset_mechanism": "zero"},
    {"beta": 0.5, "reset_mechanism": "zero", "reset_delay": False},
    {"beta": 0.9, "learn_beta": True, "learn_threshold": True},
    {"beta": 0.9, "reset_mechanism": "zero", "learn_beta": True, "learn_threshold": True},
    {"beta": 0.75, "graded_spikes_factor": 1.5, "learn_graded_spikes_factor": True},
    {"beta": torch.tensor([0.0, 0.5, 1.0, 0.9, 0.25]), "threshold": torch.full((5,), 0.75)},
)


@pytest.mark.parametrize("given", NEURONS, ids=str)
@pytest.mark.parametrize("output", [False, True])
def test_leaky(given: dict[str, Any], output: bool) -> None:
    layer = snn.Leaky(**{"beta": 1.0, "init_hidden": True, "output": output, **given})
    check(nn.Sequential(layer), currents(70, 3, 5), 1e-5)


def test_leaky_alone_returns_its_membranes() -> None:
    check(snn.Leaky(beta=0.9), currents(9, 3, 5))


@pytest.mark.parametrize("beta", [0.5, 0.9])
def test_lapicque(beta: float) -> None:
    check(nn.Sequential(snn.Lapicque(beta=beta, init_hidden=True)), 3 * currents(9, 3, 5))


def test_membranes_before_the_reset_are_the_same_bits() -> None:
    layer = snn.Leaky(beta=0.9, init_hidden=True, output=True)
    fast = snnkernels.from_snntorch(nn.Sequential(copy.deepcopy(layer)))
    x = torch.randn(50, 200) * 2
    for got, want in zip(fast(x[:, None]), loop(layer, x[:, None]), strict=True):
        assert_same_bits(got, want)


def network(dyadic: bool) -> nn.Sequential:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.MaxPool2d(2),
        snn.Leaky(beta=0.875, init_hidden=True),
        nn.Sequential(nn.Flatten(), nn.Linear(4 * 9, 10), nn.Dropout(0.0)),
        snn.Leaky(beta=0.5, init_hidden=True, output=True, spike_grad=slopes.fast_sigmoid(5)),
    )
    if dyadic:  # sums are exact in any order
        with torch.no_grad():
            for p in net.parameters():
                p.copy_((p * 32).round() / 16)
    return net


def test_a_network_is_bit_equal() -> None:
    check(network(True), currents(8, 3, 1, 6, 6), 1e-5)
    check(network(False), torch.randn(8, 3, 1, 6, 6) * 2, 1e-5, merged=False)


def test_by_step_the_sums_are_those_of_the_loop() -> None:
    """Rows of odd lengths: a row inside of all steps is aligned otherwise than one alone."""
    for seed in range(30):
        torch.manual_seed(seed)
        net = nn.Sequential(
            *(nn.Linear(6, 5), snn.Leaky(beta=0.5, init_hidden=True)),
            *(nn.Linear(5, 4), snn.Leaky(beta=0.9, init_hidden=True, output=True)),
        )
        x = torch.randn(7, 3, 6) * 2
        fast = snnkernels.from_snntorch(copy.deepcopy(net), merged=False)
        for got, want in zip(fast(x), loop(net, x), strict=True):
            assert_same_bits(got, want)


def test_batch_norm_that_trains_sees_one_step_at_a_time() -> None:
    net = nn.Sequential(nn.BatchNorm1d(5), snn.Leaky(beta=0.5, init_hidden=True))
    other = copy.deepcopy(net)
    x = currents(6, 4, 5)
    assert torch.equal(loop(net, x)[0], snnkernels.from_snntorch(other)(x))
    assert torch.equal(net[0].running_var, other[0].running_var)


def test_a_layer_in_two_places_runs_in_both() -> None:
    shared = nn.Linear(5, 5)
    neurons = [snn.Leaky(beta=0.875, init_hidden=True) for _ in range(2)]
    check(
        nn.Sequential(shared, neurons[0], shared, neurons[1]), 4 * currents(9, 3, 5), merged=False
    )
    for layer in (neurons[0], nn.BatchNorm1d(5)):
        with pytest.raises(Refused, match=r"layer '2' .*several places"):
            snnkernels.from_snntorch(nn.Sequential(layer, nn.Linear(5, 5), layer, neurons[1]))


def test_it_shares_layers_and_membranes() -> None:
    net = network(True)
    fast = snnkernels.from_snntorch(net)
    assert {p.data_ptr() for p in fast.parameters()} == {p.data_ptr() for p in net.parameters()}
    assert list(fast.state_dict()) == [f"net.{name}" for name in net.state_dict()]
    x = currents(9, 2, 1, 6, 6)
    with torch.no_grad():
        want = loop(net, x)[0]
        utils.reset(net)
        fast.reset()
        # Three steps by them, three by us, three by them.
        first, middle, last = loop(net, x[:3])[0], fast(x[3:6])[0], loop(net, x[6:])[0]
        assert torch.equal(torch.cat([first, middle, last]), want)
        fast.reset()
        assert not net[2].mem.any()
        assert torch.equal(fast(x)[0], want)
        # Another batch starts at 0.
        assert torch.equal(fast(x[:, :1])[0], want[:, :1])
    fast(x)[0].sum().backward()
    fast.detach()
    fast(x)[0].sum().backward()


REFUSED: tuple[tuple[Any, str], ...] = (
    (lambda: snn.Leaky(0.9, init_hidden=True, reset_mechanism="none"), "'none'"),
    (lambda: snn.Leaky(0.9, init_hidden=True, reset_delay=False), "reset_delay=False"),
    (lambda: snn.Leaky(0.9, init_hidden=True, spike_grad=slopes.heaviside()), "heaviside"),
    (lambda: snn.Leaky(0.9, init_hidden=True, spike_grad=slopes.spike_rate_escape()), "spike_rate"),
    (lambda: snn.Leaky(0.9, init_hidden=True, surrogate_disable=True), "no gradient"),
    (lambda: snn.Leaky(0.9, init_hidden=True, threshold=0.0), "not positive"),
    (lambda: snn.Leaky(0.9, init_hidden=True, state_quant=lambda m: m), "state_quant"),
    (lambda: snn.Lapicque(R=2.0, C=3.0, init_hidden=True), "rounded several times"),
    (
        lambda: snn.Lapicque(beta=0.5, init_hidden=True, reset_mechanism="zero"),
        "drops the current",
    ),
    (lambda: snn.RLeaky(0.9, init_hidden=True, linear_features=5), "recurrent"),
    (lambda: snn.Synaptic(0.9, 0.8, init_hidden=True), "synaptic current"),
    (lambda: nn.Flatten(0), "flattens the samples"),
    (lambda: nn.LSTM(5, 5), r"stateless=\(LSTM,\)"),
)


@pytest.mark.parametrize(("make", "says"), REFUSED, ids=lambda v: str(v)[:40])
def test_refused(make: Any, says: str) -> None:
    net = nn.Sequential(nn.Linear(5, 5), make(), snn.Leaky(0.9, init_hidden=True))
    with pytest.raises(Refused, match=rf"layer '1' .*{says}"):
        snnkernels.from_snntorch(net)


def test_other_networks_are_refused() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(Refused, match="Net has a forward of its own"):
        snnkernels.from_snntorch(Net())
    with pytest.raises(TypeError, match="must be a torch"):
        snnkernels.from_snntorch("net")  # type: ignore[arg-type]
    with pytest.raises(Refused, match="no neuron"):
        snnkernels.from_snntorch(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(Refused, match=r"layer '0' .*init_hidden=True"):
        snnkernels.from_snntorch(nn.Sequential(snn.Leaky(0.9), snn.Leaky(0.9)))
    own = type("Own", (nn.Linear,), {})
    net = nn.Sequential(own(3, 3), snn.Leaky(0.9, init_hidden=True))
    with pytest.raises(Refused, match="Own"):
        snnkernels.from_snntorch(net)
    fast = snnkernels.from_snntorch(net, stateless=(own,))
    assert fast(torch.zeros(2, 1, 3)).shape == (2, 1, 3)
    with pytest.raises(TypeError, match="float64"):
        snnkernels.from_snntorch(nn.Sequential(snn.Leaky(0.9)))(torch.zeros(2, 3).double())
    with pytest.raises(ValueError, match="at least one step"):
        fast(torch.zeros(0, 1, 3))


def test_surrogates_on_a_dense_grid() -> None:
    u = torch.linspace(-3, 3, 2001, requires_grad=True)
    for made in (
        slopes.fast_sigmoid(),
        slopes.fast_sigmoid(3),
        slopes.atan(1.5),
        slopes.sigmoid(5),
    ):
        ours = surrogate.resolve(made)
        (want,) = torch.autograd.grad(made(u).sum(), u)
        torch.testing.assert_close(ours.derivative(u.detach()), want, rtol=1e-4, atol=1e-6)
    assert surrogate_foreign.of_snntorch(slopes.triangular()) is None
    with pytest.raises(TypeError, match="one of these"):
        surrogate.resolve(slopes.triangular())
