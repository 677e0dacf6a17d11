"""Sinabs' IAF and LIF patched: the same spikes, membranes and gradients as their own code."""

from __future__ import annotations

import copy
import pickle
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from support import assert_close, optional, sixteenths
from torch import Tensor, nn

import snnkernels
from snnkernels import surrogate, surrogate_foreign
from snnkernels.interop import sinabs_run
from snnkernels.interop.sinabs import ADAPTER

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    optional("sinabs")
    from sinabs import activation
    from sinabs import layers as theirs


pytestmark = pytest.mark.usefixtures("everything_is_said")
currents = partial(sixteenths, scale=20)


def both(cls: str = "IAF", **given: Any) -> tuple[Any, Any]:
    layer = getattr(theirs, cls)(**given)
    net = nn.Sequential(copy.deepcopy(layer))
    report = snnkernels.patch(net)
    assert report, report
    return layer, net[0]


def check(layer: Any, ours: Any, x: Tensor, calls: int = 2) -> None:
    """Over calls that carry the membrane on. Equal, not the same bits: Sinabs has -0.0 spikes."""
    for call in range(calls):
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        outs = [node(leaf) for node, leaf in zip((layer, ours), leaves, strict=True)]
        assert torch.equal(*outs), f"call {call}"
        assert torch.equal(layer.v_mem, ours.v_mem)
        assert outs[0].dtype == outs[1].dtype
        assert layer.v_mem.dtype == ours.v_mem.dtype
        assert layer.firing_rate == ours.firing_rate
        g, g_v = torch.randn_like(outs[0]), torch.randn_like(layer.v_mem)
        grads = [
            torch.autograd.grad((out * g).sum() + (node.v_mem * g_v).sum(), leaf)[0]
            for out, node, leaf in zip(outs, (layer, ours), leaves, strict=True)
        ]
        assert bool(grads[0].any())
        assert_close(grads[1], grads[0], 2e-3 if x.dtype == torch.float16 else 2e-6)
        layer.zero_grad()
        ours.zero_grad()


NEURONS: tuple[dict[str, Any], ...] = (
    {},
    {"spike_threshold": torch.tensor(0.7)},
    {"spike_fn": activation.SingleSpike},
    {"spike_fn": activation.MaxSpike(2)},
    {"spike_fn": activation.MaxSpike()},
    {"reset_fn": activation.MembraneReset()},
    {"reset_fn": activation.MembraneReset(), "spike_fn": activation.SingleSpike},
    {"min_v_mem": -1.0},
    {"min_v_mem": -0.3, "spike_fn": activation.SingleSpike, "spike_threshold": torch.tensor(0.7)},
    {"min_v_mem": 0.1, "reset_fn": activation.MembraneReset()},
    {"surrogate_grad_fn": activation.SingleExponential(0.3, 2.0)},
    {"surrogate_grad_fn": activation.PeriodicExponential(), "spike_threshold": torch.tensor(0.8)},
    {"surrogate_grad_fn": activation.Gaussian(sigma=0.4, grad_scale=0.5)},
)


@pytest.mark.parametrize("given", NEURONS, ids=str)
@pytest.mark.parametrize("shape", [(3, 17, 5), (2, 9, 3, 4, 2)], ids=str)
def test_iaf(given: dict[str, Any], shape: tuple[int, ...]) -> None:
    check(*both(**given), currents(*shape))


@pytest.mark.parametrize("given", [*NEURONS[:3], {"min_v_mem": -0.4}], ids=str)
@pytest.mark.parametrize("norm_input", [False, True])
def test_lif(given: dict[str, Any], norm_input: bool) -> None:
    layer, ours = both("LIF", tau_mem=12.0, norm_input=norm_input, **given)
    x = currents(3, 17, 5) * (6 if norm_input else 1)
    check(layer, ours, x)
    # Its time constant learns.
    losses = [node(x).sum() + node.v_mem.sum() for node in (layer, ours)]
    (want,), (got,) = (
        torch.autograd.grad(loss, node.tau_mem)
        for loss, node in zip(losses, (layer, ours), strict=True)
    )
    assert_close(got.reshape(1), want.reshape(1), 1e-5)


@pytest.mark.parametrize("cls", ["IAFSqueeze", "LIFSqueeze"])
def test_squeezed(cls: str) -> None:
    more = {} if cls == "IAFSqueeze" else {"tau_mem": 8.0, "norm_input": False}
    layer, ours = both(cls, batch_size=2, **more)
    check(layer, ours, currents(2 * 7, 3, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_currents_are_widened_as_theirs(dtype: torch.dtype) -> None:
    layer, ours = both()
    x = currents(2, 9, 6).to(dtype)
    assert torch.equal(layer(x), ours(x))
    assert ours.v_mem.dtype == torch.float32


def test_what_only_a_call_can_tell_runs_their_code() -> None:
    layer, ours = both()
    x = currents(2, 9, 6).double()
    with pytest.warns(RuntimeWarning, match="currents are torch.float64"):
        got = ours(x)
    assert torch.equal(layer(x), got)
    assert torch.equal(layer.v_mem, ours.v_mem)
    layer, ours = both()
    layer.spike_fn = ours.spike_fn = None
    with pytest.warns(RuntimeWarning, match="no spike_fn"):
        got = ours(currents(1, 3, 2))
    assert got.shape == (1, 3, 2)


CHANGED: dict[str, tuple[str, Any, str]] = {
    "several least values": ("min_v_mem", torch.tensor([-0.1, -0.2, -9.0]), "min_v_mem is not one"),
    "no least value": ("min_v_mem", float("-inf"), "min_v_mem is not one finite number"),
    "threshold": ("spike_threshold", nn.Parameter(torch.tensor(-1.0), False), "not positive"),
    "spikes": ("spike_fn", activation.MaxSpike(0), "max_num_spikes_per_bin=0"),
    "reset": ("reset_fn", activation.MembraneReset(0.5), "did not fire"),
    "surrogate": ("surrogate_grad_fn", activation.Heaviside(), "Heaviside"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_what_is_changed_later_runs_their_code(case: str) -> None:
    """Found by this test: of several values of min_v_mem none was used."""
    name, value, words = CHANGED[case]
    layer, ours = both()
    x = currents(2, 9, 3).requires_grad_(case == "surrogate")
    for node in (layer, ours):
        setattr(node, name, value)
    with pytest.warns(RuntimeWarning, match=words):
        got = ours(x)
    assert torch.equal(layer(x).nan_to_num(), got.nan_to_num())
    assert torch.equal(layer.v_mem.nan_to_num(), ours.v_mem.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32], ids=str)
def test_leaky_neurons_of_other_currents_run_their_code(dtype: torch.dtype) -> None:
    layer, ours = both("LIF", tau_mem=10.0)
    x = (currents(2, 9, 3) * 8).to(dtype)
    words = "rounds to torch.float16" if dtype == torch.float16 else "currents are torch.int32"
    with pytest.warns(RuntimeWarning, match=words):
        got = ours(x)
    assert torch.equal(layer(x), got)
    assert torch.equal(layer.v_mem, ours.v_mem)


def test_one_row_of_steps_and_no_samples() -> None:
    for x in (currents(4, 9), currents(0, 9, 3)):
        layer, ours = both()
        assert torch.equal(layer(x), ours(x))
    layer, ours = both()
    for x in (currents(5), currents(2, 0, 3)):  # no dimension of time, no steps
        for node in (layer, ours):
            with pytest.raises((ValueError, RuntimeError)):
                node(x)


def test_membranes_of_another_dtype_run_their_code() -> None:
    layer, ours = both()
    x = currents(2, 9, 3)
    for node in (layer, ours):
        node(x)
        node.v_mem = node.v_mem.double()
    with pytest.warns(RuntimeWarning, match=r"the membrane is torch\.float64 \(2, 3\)"):
        got = ours(x)
    assert torch.equal(layer(x), got)


def test_the_forward_pass_of_their_tests() -> None:
    """A run of their tests has our forward pass in their classes, which stay what they are."""
    x, layers = currents(2, 9, 3), (theirs.IAF(), theirs.LIF(tau_mem=9.0), theirs.ALIF(5.0, 5.0))
    want = [layer(x) for layer in layers]
    seen: list[Any] = []
    original, plain = sinabs_run.forward, theirs.LIF.forward

    def forward(*given: Any) -> Any:
        seen.append(given)
        return original(*given)

    with ADAPTER.in_tests(), pytest.MonkeyPatch.context() as m:
        m.setattr(sinabs_run, "forward", forward)
        for layer, spikes in zip(layers, want, strict=True):
            layer.reset_states()
            assert torch.equal(layer(x), spikes)
    assert len(seen) == 2
    assert theirs.LIF.forward is plain
    assert [type(layer) for layer in layers] == [theirs.IAF, theirs.LIF, theirs.ALIF]


def test_states_are_theirs() -> None:
    layer, ours = both(record_states=True)
    x = currents(4, 11, 3)
    layer(x), ours(x)
    assert torch.equal(layer.recordings["v_mem"], ours.recordings["v_mem"])
    assert list(layer.state_dict()) == list(ours.state_dict())
    # Rows of the old state are drawn where the batch changes: the same ones with the same seed.
    for node in (layer, ours):
        torch.manual_seed(3)
        node(x[:2])
    assert torch.equal(layer.v_mem, ours.v_mem)
    # Another shape starts at 0.
    y = currents(2, 5, 7)
    assert torch.equal(layer(y), ours(y))
    for node in (layer, ours):
        node.reset_states()
        assert not node.v_mem.any()
        torch.manual_seed(5)
        node.reset_states(randomize=True, value_ranges={"v_mem": (-1.0, 1.0)})
    assert torch.equal(layer(y), ours(y))
    ours(y.clone().requires_grad_()).sum().backward()
    again = ours(y.clone().requires_grad_()).sum()
    with pytest.raises(RuntimeError, match="an earlier backward"):
        again.backward()


def test_copies_pickles_and_unpatch() -> None:
    _, ours = both(spike_fn=activation.MaxSpike(3))
    net = nn.Sequential(ours)
    x = currents(2, 7, 3)
    net(x)
    for copied_by in (copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))):
        copied = copied_by(net)
        assert isinstance(copied[0], theirs.IAF)
        assert type(copied[0]) is type(ours)
        assert torch.equal(copied[0].v_mem, ours.v_mem)
        assert snnkernels.unpatch(copied) == 1
        assert type(copied[0]) is theirs.IAF
        assert torch.equal(copied(x), net(x))
    assert snnkernels.unpatch(net) == 1
    assert type(net[0]) is theirs.IAF


def with_a_learned_least_value() -> Any:
    layer = theirs.IAF(min_v_mem=-1.0)
    layer.min_v_mem = nn.Parameter(torch.tensor(-1.0))
    return layer


def with_its_own_forward() -> Any:
    layer = theirs.IAF()
    layer.__dict__["forward"] = lambda x: x
    return layer


REFUSED: tuple[tuple[Any, str], ...] = (
    (lambda: theirs.IAF(min_v_mem=torch.tensor([0.0, -1.0])), "min_v_mem is not one"),
    (lambda: theirs.IAF(tau_syn=5.0), "synaptic current"),
    (lambda: theirs.IAF(min_v_mem=float("inf")), "min_v_mem is not one finite"),
    (lambda: with_a_learned_least_value(), "min_v_mem is learned"),
    (lambda: theirs.IAF(spike_fn=activation.MaxSpike(0)), "max_num_spikes_per_bin=0"),
    (lambda: theirs.IAF(spike_fn=activation.Heaviside()), "spike_fn Heaviside is not one of"),
    (lambda: theirs.IAF(reset_fn=nn.Identity()), "reset_fn Identity is not"),
    (lambda: with_its_own_forward(), "has a forward of its own"),
    (lambda: theirs.IAF(spike_fn=None), "membranes, not spikes"),
    (lambda: theirs.IAF(reset_fn=activation.MembraneReset(0.5)), "did not fire"),
    (lambda: theirs.IAF(reset_fn=activation.MembraneSubtract(0.5)), "subtract_value"),
    (lambda: theirs.IAF(surrogate_grad_fn=activation.Heaviside()), "Heaviside"),
    (lambda: theirs.IAF(surrogate_grad_fn=activation.Gaussian(mu=0.1)), "Gaussian"),
    (lambda: theirs.IAF(surrogate_grad_fn=activation.MultiGaussian()), "MultiGaussian"),
    (lambda: theirs.IAF(spike_threshold=torch.tensor([1.0, 2.0])), "thresholds differ"),
    (lambda: theirs.IAF(spike_threshold=torch.tensor(-1.0)), "not positive and finite"),
    (lambda: theirs.IAFRecurrent(nn.Linear(3, 3)), "recurrent"),
    (lambda: theirs.LIFRecurrent(5.0, nn.Linear(3, 3)), "recurrent"),
    (lambda: theirs.ALIF(5.0, 5.0), "adapts"),
    (lambda: theirs.ExpLeak(5.0), "membranes, not spikes"),
    (lambda: type("Mine", (theirs.IAF,), {})(), "derives"),
)


@pytest.mark.parametrize(("make", "says"), REFUSED, ids=lambda v: str(v)[:40])
def test_refused(make: Any, says: str) -> None:
    net = nn.Sequential(make())
    was = type(net[0])
    with pytest.warns(UserWarning, match=says):
        report = snnkernels.patch(net)
    assert len(report.refused) == 1
    assert type(net[0]) is was


def test_a_learned_threshold_is_refused() -> None:
    layer = theirs.IAF()
    layer.spike_threshold.requires_grad_()
    assert "learned" in str(snnkernels.patch(nn.Sequential(layer), on_refused="report"))


def test_the_functional_hook() -> None:
    layer, recorded = theirs.IAF(), theirs.LIF(tau_mem=9.0, record_states=True)
    x = currents(2, 7, 3)
    want = (layer(x), recorded(x), recorded.recordings["v_mem"])
    other = theirs.IAF(tau_syn=5.0)
    kept = other(x)
    for node in (layer, recorded, other):
        node.reset_states()
    plain = theirs.functional.lif_forward
    seen: list[Any] = []
    original = sinabs_run.forward

    def forward(*given: Any) -> Any:
        seen.append(given)
        return original(*given)

    with snnkernels.patched("sinabs"), pytest.MonkeyPatch.context() as m:
        m.setattr(sinabs_run, "forward", forward)
        assert theirs.functional.lif_forward is not plain
        got = (layer(x), recorded(x), recorded.recordings["v_mem"])
        assert len(seen) == 2
        with pytest.warns(RuntimeWarning, match="synaptic current"):
            assert torch.equal(other(x), kept)
    assert theirs.functional.lif_forward is plain
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("threshold", [1.0, 0.6])
def test_surrogates_on_a_dense_grid(threshold: float) -> None:
    m = torch.linspace(-3, 5, 4001, dtype=torch.float64)
    for function in (
        activation.SingleExponential(0.3, 0.7),
        activation.PeriodicExponential(0.4, 1.5),
        activation.Gaussian(sigma=0.3, grad_scale=2.0),
    ):
        ours = surrogate_foreign.of_sinabs(function, threshold)
        assert ours is not None
        want = function(m, torch.tensor(threshold, dtype=torch.float64))
        torch.testing.assert_close(
            ours.derivative(m - threshold, threshold), want, rtol=1e-7, atol=1e-12
        )
    assert surrogate.resolve(activation.PeriodicExponential()) == surrogate.PeriodicExponential()
    with pytest.raises(ValueError, match="relative to the threshold"):
        surrogate.resolve(activation.SingleExponential())
