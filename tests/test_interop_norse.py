"""Norse's IAF patched: the same spikes, states and gradients as its own code."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from support import assert_close, optional
from support import sixteenths as currents
from torch import nn

import snnkernels
from snnkernels.interop import norse_run

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    optional("norse")
    from norse.torch.functional import iaf as functional
    from norse.torch.functional import threshold as thresholds
    from norse.torch.module import iaf, lif

METHODS = ("super", "triangle", "tanh", "heavi_erfc")


pytestmark = pytest.mark.usefixtures("everything_is_said")


def parameters(**given: Any) -> Any:
    # Its defaults are tensors that all neurons share, and that it asks for gradients.
    return functional.IAFParameters(**{"v_reset": torch.tensor(0.0), **given})


def patched(module: nn.Module) -> Any:
    net = nn.Sequential(copy.deepcopy(module))
    report = snnkernels.patch(net)
    assert report, report
    return net[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("v_reset", [0.0, -0.25])
def test_iaf(method: str, dtype: torch.dtype, v_reset: float) -> None:
    p = parameters(
        v_th=torch.tensor(0.75), v_reset=torch.tensor(v_reset), method=method,
        alpha=torch.tensor(2.0),
    )  # fmt: skip
    module = iaf.IAF(p)
    ours = patched(module)
    x = currents(13, 4, 5).to(dtype)
    states: list[Any] = [None, None]
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        outs = []
        for i, node in enumerate((module, ours)):
            out, states[i] = node(leaves[i], states[i])
            outs.append(out)
        assert torch.equal(*outs)
        assert type(states[1]) is type(states[0])
        assert torch.equal(states[0].v, states[1].v)
        assert states[0].v.dtype == states[1].v.dtype
        g = torch.randn_like(x)
        grads = [
            torch.autograd.grad((out * g).sum() + state.v.sum(), leaf)[0]
            for out, state, leaf in zip(outs, states, leaves, strict=True)
        ]
        assert bool(grads[0].any())
        assert_close(grads[1], grads[0], 2e-6 if dtype == torch.float32 else 1e-7)
        states = [type(s)(v=s.v.detach()) for s in states]


def test_cell_and_record_states() -> None:
    p = parameters()
    cell, ours = iaf.IAFCell(p), patched(iaf.IAFCell(p))
    states: list[Any] = [None, None]
    for x in currents(6, 3, 2):
        (a, states[0]), (b, states[1]) = cell(x, states[0]), ours(x, states[1])
        assert torch.equal(a, b)
        assert torch.equal(states[0].v, states[1].v)
    module = iaf.IAF(p)
    module.record_states = True
    fused = patched(module)
    x = currents(6, 3, 2)
    (_, want), (_, got) = module(x), fused(x)
    assert want.v.shape == (6, 3, 2)
    assert torch.equal(want.v, got.v)


@pytest.mark.parametrize("record", [False, True])
def test_the_shared_v_reset_has_its_gradient(record: bool) -> None:
    found = []
    for fuse in (False, True):
        reset = torch.tensor(-0.125)
        module = iaf.IAF(parameters(v_reset=reset, method="triangle", alpha=torch.tensor(0.5)))
        module.record_states = record
        node = patched(module) if fuse else module
        node.p = module.p
        torch.manual_seed(1)
        out, state = node(currents(9, 4, 3))
        assert reset.requires_grad  # Norse sets it
        loss = (out * torch.randn(9, 4, 3)).sum() + (state.v * torch.randn_like(state.v)).sum()
        found.append(torch.autograd.grad(loss, reset)[0])
    assert found[0] != 0
    assert_close(found[1].reshape(1), found[0].reshape(1), 1e-5)


def test_a_learned_threshold_has_its_gradient() -> None:
    found = []
    for fuse in (False, True):
        threshold = torch.tensor(0.75, requires_grad=True)
        module = iaf.IAF(parameters(v_th=threshold, method="tanh", alpha=torch.tensor(1.5)))
        node = patched(module) if fuse else module
        if fuse:  # deepcopy made a threshold of its own
            node.p = module.p
        torch.manual_seed(1)
        out, state = node(currents(9, 4, 3))
        found.append(torch.autograd.grad(out.sum() + state.v.sum(), threshold)[0])
    assert_close(found[1].reshape(1), found[0].reshape(1), 1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("alpha", [0.3, 1.0, 100.0])
def test_surrogates_on_a_dense_grid(method: str, alpha: float) -> None:
    ours = norse_run.surrogate_of(method, alpha)
    u = torch.linspace(-4, 4, 2001, dtype=torch.float64, requires_grad=True)
    fired = thresholds.threshold(u, method, torch.tensor(alpha))
    (want,) = torch.autograd.grad(fired.sum(), u)
    torch.testing.assert_close(ours.derivative(u.detach()), want, rtol=1e-6, atol=1e-9)


def with_its_own(name: str, value: Any) -> Any:
    module = iaf.IAF(parameters())
    module.__dict__[name] = value
    return module


REFUSED: tuple[tuple[Any, str], ...] = (
    (lambda: iaf.IAF(parameters(method="circ")), "'circ'"),
    (lambda: iaf.IAF(parameters(v_reset=torch.tensor([0.0, 0.1]))), "one finite number"),
    (lambda: iaf.IAF(parameters(v_th=torch.tensor(0.0))), "not positive"),
    (lambda: iaf.IAF(parameters(v_th="1")), "v_th='1' is not a tensor or a number"),
    (lambda: lif.LIF(), "no kernel"),
    (lambda: lif.LIFRecurrent(3, 3), "recurrent"),
    (lambda: with_its_own("forward", lambda x: x), "has a forward of its own"),
    (lambda: with_its_own("activation", torch.relu), "is not iaf_feed_forward_step"),
    (lambda: type("Mine", (iaf.IAF,), {})(parameters()), "derives"),
)


@pytest.mark.parametrize(("make", "says"), REFUSED, ids=lambda v: str(v)[:40])
def test_refused(make: Any, says: str) -> None:
    net = nn.Sequential(make())
    with pytest.warns(UserWarning, match=says):
        assert not snnkernels.patch(net)


def test_half_currents_run_their_code() -> None:
    module = iaf.IAF(parameters())
    ours = patched(module)
    x = currents(4, 3).half()
    with pytest.warns(RuntimeWarning, match="in torch.float16"):
        out, state = ours(x)
    want, kept = module(x)
    assert torch.equal(out, want)
    assert torch.equal(state.v, kept.v)


def test_what_only_a_call_can_tell_runs_their_code() -> None:
    module = iaf.IAF(parameters())
    x = currents(4, 3)
    for state, words in (
        (functional.IAFFeedForwardState(v=torch.zeros(3, dtype=torch.float64)), "torch.float64"),
        (functional.IAFFeedForwardState(v=torch.zeros(2, 3)), r"the membrane is .* \(2, 3\)"),
    ):
        ours = patched(module)
        with pytest.warns(RuntimeWarning, match=words):
            out, kept = ours(x, state)
        want, first = module(x, state)
        assert torch.equal(out, want)
        assert torch.equal(kept.v, first.v)
    ours = patched(module)
    for node in (module, ours):
        node.p = parameters(v_th=torch.tensor([1.0, -1.0, 0.5]))
    with pytest.warns(RuntimeWarning, match="not positive"):
        assert torch.equal(ours(x)[0], module(x)[0])


def test_calls_without_steps_fail_as_theirs() -> None:
    module = iaf.IAF(parameters())
    ours, errors = patched(module), []
    for node in (module, ours):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            try:
                errors.append(node(torch.zeros(0, 3))[0].shape)
            except (RuntimeError, IndexError) as error:
                errors.append(type(error))
    assert errors[0] == errors[1]


def test_sparse_steps_are_theirs() -> None:
    cell = iaf.IAFCell(parameters())
    ours = patched(cell)
    x = currents(4, 3).to_sparse()
    state = functional.IAFFeedForwardState(v=torch.zeros(4, 3))
    with pytest.warns(RuntimeWarning, match="no plain tensor"):
        out, kept = ours(x, state)
    want, first = cell(x, state)
    assert torch.equal(out.to_dense(), want.to_dense())
    assert torch.equal(torch.as_tensor(kept.v).to_dense(), torch.as_tensor(first.v).to_dense())


def test_copies_pickles_and_unpatch() -> None:
    ours = patched(iaf.IAF(parameters()))
    net = nn.Sequential(ours)
    x = currents(4, 3)
    want = net(x)[0]
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(copied(x)[0], want)
        assert snnkernels.unpatch(copied) == 1
        assert type(copied[0]) is iaf.IAF
        assert torch.equal(copied(x)[0], want)


def test_the_functional_hook() -> None:
    p, x = parameters(), currents(5, 3)
    module, cell = iaf.IAF(p), iaf.IAFCell(p)
    want = (module(x)[0], cell(x[0])[0])
    theirs = functional.iaf_feed_forward_step
    state = functional.IAFFeedForwardState(v=torch.full((3,), 0.5))
    stepped = theirs(x[0], state, p)
    with snnkernels.patched("norse"):
        assert functional.iaf_feed_forward_step is not theirs
        got = (module(x)[0], cell(x[0])[0])
        step = functional.iaf_feed_forward_step(x[0], state, p)
        assert functional.iaf_feed_forward_step(x[0], state)[0].shape == (3,)
    assert functional.iaf_feed_forward_step is theirs
    for a, b in zip((*got, step[0], step[1].v), (*want, stepped[0], stepped[1].v), strict=True):
        assert torch.equal(a, b)
