"""The functions' own part: documented defaults, arguments that arrive, the outputs asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import support
import torch
from support import assert_same_bits, currents
from torch import Tensor

from snnkernels import PackedSpikes, functional, surrogate
from snnkernels.functional import Run, if_run
from snnkernels.kernels import backends, params

# What the pages say of each argument that is not given.
NEURON: dict[str, Any] = {
    "v": 0.0, "v_threshold": 1.0, "v_reset": None, "channel_dim": None, "input_scale": None,
    "tie": ">=",
}  # fmt: skip
LEARNS = {"surrogate_function": surrogate.ATan(2.0), "detach_reset": False}
SPIKES: dict[str, Any] = {"amplitude": None, "spike_dtype": None}
MANY = {"T": None, "layout": "T,N"}
SAVES = {"save": "recompute"}
DEFAULTS: dict[str, dict[str, Any]] = {
    "if_multi_step": {
        **NEURON, **LEARNS, **SPIKES, **MANY, **SAVES, "store_v_seq": False,
        "store_charge_seq": False, "out": None,
    },
    "lif_multi_step": {**NEURON, **LEARNS, **SPIKES, **MANY, "beta": 0.9},
    "if_count": {**NEURON, **LEARNS, **MANY},
    "if_rate": {**NEURON, **LEARNS, **MANY, **SAVES, "amplitude": None},
    "if_packed": {**NEURON, **MANY, "amplitude": None},
    "if_step": {**NEURON, **LEARNS, **SPIKES},
    "if_run": {
        **NEURON, **LEARNS, **SPIKES, **MANY, **SAVES, "outputs": ("spikes",), "count_at": (),
        "beta": None, "bias": None, "parallel": False, "reset_delay": False, "mask": None,
        "max_spikes": None, "signed": None, "probe": None, "fire_level": None, "v_min": None,
    },
}  # fmt: skip


def tensors(found: Any) -> list[Tensor | None]:
    return [value.unpack() if isinstance(value, PackedSpikes) else value for value in found]


def with_gradient(name: str, x: Tensor, **given: Any) -> tuple[list[Tensor | None], Tensor]:
    """What a function returns, and the gradient of a sum of all that has one."""
    x = x.detach().clone().requires_grad_()
    found = tensors(getattr(functional, name)(x, **given))
    weighed = [
        t * torch.linspace(1, 2 + i, t.numel()).view_as(t) for i, t in enumerate(found) if _grows(t)
    ]
    return found, torch.autograd.grad(sum(w.sum() for w in weighed), x)[0]


def _grows(value: Tensor | None) -> bool:
    return value is not None and value.requires_grad


def same(one: Any, other: Any) -> None:
    for a, b in zip(tensors(one), tensors(other), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_same_bits(a, b)


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_those_of_the_page(name: str) -> None:
    x = currents(3, 5) if name == "if_step" else currents(6, 3, 5)
    (left, gradient), (spelt, other) = with_gradient(name, x), with_gradient(
        name, x, **DEFAULTS[name]
    )  # fmt: skip
    same(left, spelt)
    assert_same_bits(gradient, other, "gradient")
    assert any(bool(t.any()) for t in left if t is not None)
    assert bool(gradient.any())


# For each argument a value that changes what comes out, or its gradient.
OTHERS: dict[str, Any] = {
    "v": 0.375, "v_threshold": 0.75, "v_reset": 0.125, "input_scale": 0.5, "tie": ">",
    "surrogate_function": "rectangle", "detach_reset": True, "amplitude": 2.5, "beta": 0.5,
    "bias": 0.25, "fire_level": 0.625, "max_spikes": 3, "v_min": -0.25, "store_v_seq": True,
    "store_charge_seq": True, "outputs": ("rate",), "count_at": (1, 3), "layout": "N,T",
}  # fmt: skip


@pytest.mark.parametrize("name", DEFAULTS)
def test_every_argument_arrives(name: str) -> None:
    # Quarters of 1/2 meet the threshold exactly, so that the tie counts.
    x = (currents(4, 4, 5) * 4).round() / 4
    x = x[0] if name == "if_step" else x
    found, gradient = with_gradient(name, x)
    for argument in sorted(OTHERS.keys() & DEFAULTS[name].keys()):
        value = OTHERS[argument]
        others, other = with_gradient(name, x, **{argument: value})
        changed = not torch.equal(gradient, other) or any(
            (a is None) != (b is None)
            or (a is not None and (a.shape != b.shape or not torch.equal(a, b)))
            for a, b in zip(found, others, strict=True)
        )
        assert changed, f"{name}({argument}={value!r}) is {name}()"


@pytest.mark.parametrize("name", [name for name in DEFAULTS if "T" in DEFAULTS[name]])
def test_constant_currents_thresholds_of_channels_and_dtypes_arrive(name: str) -> None:
    function = getattr(functional, name)
    x, threshold = currents(2, 3, 5), torch.tensor([0.5, 1.0, 1.5])
    given: dict[str, Any] = {"v_threshold": threshold, "channel_dim": 1}
    apart = {"v_threshold": threshold.view(1, 3, 1)}
    expanded = x.expand(4, *x.shape).contiguous()
    same(function(x, T=4, **given), function(expanded, **apart))
    if "spike_dtype" in DEFAULTS[name]:
        whole = function(x, T=4, spike_dtype=torch.uint8)
        spikes = whole.spikes if isinstance(whole, Run) else whole[0]
        assert spikes.dtype == torch.uint8
        floats = function(x, T=4)
        want = floats.spikes if isinstance(floats, Run) else floats[0]
        assert torch.equal(spikes.to(torch.float32), want)


@pytest.mark.parametrize("outputs", ["spikes", "packed", "count", "rate", "v_seq", "charge_seq"])
def test_a_run_gives_what_was_asked_for_and_nothing_else(outputs: str) -> None:
    x = currents(6, 3, 5)
    everything = if_run(
        x, 0.5, outputs=("spikes", "packed", "count", "v_seq", "charge_seq"), count_at=(2, 6)
    )
    rate = if_run(x, 0.5, outputs="rate").rate
    for given in (outputs, [outputs]):
        run = if_run(x, 0.5, outputs=given)
        assert {name for name, value in run._asdict().items() if value is not None} == {
            "v",
            outputs,
        }
        assert_same_bits(run.v, everything.v)
        want = rate if outputs == "rate" else getattr(everything, outputs)
        same([getattr(run, outputs)], [want])
    times = if_run(x, 0.5, outputs=outputs, count_at=(2, 6))
    assert_same_bits(times.counts, everything.counts)
    assert {name for name, value in times._asdict().items() if value is not None} == {
        "v",
        "counts",
        outputs,
    }


def test_a_run_of_nothing_gives_the_membrane() -> None:
    x = currents(6, 3, 5)
    run = if_run(x, outputs=())
    assert [value is None for value in run] == [False] + [True] * 7
    assert_same_bits(run.v, functional.if_multi_step(x)[1])


@pytest.mark.parametrize("also", ["packed", "count", "v_seq", "charge_seq"])
def test_a_rate_comes_with_all_but_spikes(also: str) -> None:
    x = currents(4, 3)
    run = if_run(x, outputs=("rate", also))
    assert_same_bits(run.rate, functional.if_rate(x)[0])
    assert run.spikes is None
    assert getattr(run, also) is not None
    assert (run.count is None) == (also != "count")
    with pytest.raises(ValueError, match="'rate' and 'spikes' exclude each other"):
        if_run(x, outputs=("spikes", "rate", also))


def test_traces_are_after_or_before_the_reset() -> None:
    x = currents(6, 3)
    after = functional.if_multi_step(x, store_v_seq=True)[2]
    before = functional.if_multi_step(x, store_charge_seq=True)[2]
    run = if_run(x, outputs=("v_seq", "charge_seq", "spikes"))
    assert_same_bits(after, run.v_seq)
    assert_same_bits(before, run.charge_seq)
    assert_same_bits(before - run.spikes, after)
    assert functional.if_multi_step(x)[2] is None
    with pytest.raises(ValueError, match="store_v_seq and store_charge_seq exclude each other"):
        functional.if_multi_step(x, store_v_seq=True, store_charge_seq=True)


@pytest.mark.parametrize("x", [3.0, None, torch.zeros(2, dtype=torch.int64)], ids=str)
def test_a_step_names_its_current(x: Any) -> None:
    with pytest.raises(TypeError, match=r"^x "):
        functional.if_step(x)


@pytest.mark.parametrize("name", DEFAULTS)
def test_every_function_ends_with_the_same_membrane(name: str) -> None:
    given = {"v": 0.25, "v_threshold": 0.75, "amplitude": 2.5, "input_scale": 0.5}
    given = {key: value for key, value in given.items() if key in DEFAULTS[name]}
    x = currents(1 if name == "if_step" else 6, 3, 5).requires_grad_()
    leak = {"beta": 0.9} if name == "lif_multi_step" else {}
    want = if_run(x, **given, **leak).v
    found = getattr(functional, name)(x[0] if name == "if_step" else x, **given, **leak)
    v = found.v if isinstance(found, Run) else found[1]
    assert_same_bits(v, want)
    weights = torch.linspace(1, 2, v.numel()).view_as(v)
    gradients = [torch.autograd.grad((w * weights).sum(), x)[0] for w in (v, want)]
    assert_same_bits(*gradients)


def test_no_steps_are_no_spikes_and_have_no_rate() -> None:
    x = torch.zeros(0, 3)
    count, v = functional.if_count(x, 0.25)
    assert count.tolist() == [0, 0, 0]
    assert v.tolist() == [0.25] * 3
    with pytest.raises(ValueError, match="no time steps"):
        functional.if_rate(x)


@pytest.mark.parametrize(
    ("call", "made"),
    [
        (lambda x: functional.if_multi_step(x), {"spikes"}),
        (lambda x: functional.if_count(x), {"count"}),
        (lambda x: functional.if_rate(x), {"count"}),
        (lambda x: functional.if_packed(x), {"words"}),
        (lambda x: functional.if_step(x[0]), {"spikes"}),
        (lambda x: if_run(x), {"spikes"}),
        (lambda x: if_run(x, outputs=()), set()),
        (lambda x: if_run(x, outputs="rate"), {"count"}),
        (lambda x: if_run(x, outputs=("packed", "count")), {"words", "count"}),
    ],
)
def test_nothing_is_written_that_was_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[Tensor], Any], made: set[str]
) -> None:
    """Counts and packed spikes need no tensor of all steps; the plain neuron has its own kernel."""
    launches: list[tuple[str, bytes]] = []
    told = support.spy("told", lambda name, packed, _: launches.append((name, packed)), False)
    monkeypatch.setattr(backends, "_made", {"told": told})
    monkeypatch.setitem(backends._MAKERS, "told", lambda: told)
    with backends.use_backend("told"):
        call(torch.zeros(4, 3))
    ((name, packed),) = launches
    assert name == "forward"
    record = np.frombuffer(packed, params.IF_FORWARD)[0]
    outputs = ("spikes", "words", "window", "count")
    assert {output for output in outputs if record[output]} == made
