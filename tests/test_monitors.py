"""Monitors, the state of whole networks, and the error for a membrane left in a freed graph."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from typing import Any

import pytest
import torch
from conversion_helpers import dyadic
from support import currents
from torch import nn

from snnkernels import (
    IFNode,
    LIFNode,
    PackedSpikes,
    SpikeMonitor,
    VoltageMonitor,
    convert,
    detach_net,
    functional,
    lower,
    reset_net,
    set_step_mode,
)
from snnkernels.options import Signed


class Rows(nn.Sequential):
    """Two layers of neurons behind linear layers, over [T, B, 6]."""

    def __init__(self, **options: Any) -> None:
        super().__init__(nn.Linear(6, 5), IFNode(0.5, **options), nn.Linear(5, 4), LIFNode(0.8))


def rows(T: int = 7, batch: int = 3, seed: int = 1) -> torch.Tensor:
    return currents(T, batch, 6, seed=seed)


def a_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))


# ---- PackedSpikes.cat ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps", [[1] * 40, [8, 8], [5, 16, 9], [16, 17], [33, 31, 1], [32, 32], [70, 3, 40], [12]]
)
def test_parts_of_a_run_are_put_together(steps: list[int]) -> None:
    T = sum(steps)
    spikes = (torch.rand(T, 3, 2, generator=torch.Generator().manual_seed(T)) < 0.6).float()
    spikes[:, 0] = 1.0  # sign bits of words
    parts = [functional.if_packed(part)[0] for part in spikes.split(steps)]
    whole = PackedSpikes.cat(parts)
    assert whole == functional.if_packed(spikes)[0]
    assert torch.equal(whole.unpack(), spikes)


def test_parts_that_do_not_fit_are_refused() -> None:
    one, other = (functional.if_packed(torch.ones(3, n))[0] for n in (4, 5))
    with pytest.raises(ValueError, match="differ in their neurons"):
        PackedSpikes.cat([one, other])
    with pytest.raises(ValueError, match="parts is empty"):
        PackedSpikes.cat([])


# ---- spikes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["spikes", "packed", "count", "rate"])
@pytest.mark.parametrize("grad", [False, True])
def test_spikes_whatever_the_layer_returns(output: str, grad: bool) -> None:
    node = IFNode(0.5, output=output, v_init="half", amplitude="threshold")
    x = rows().requires_grad_(grad)
    want = node(x)
    reset_net(node)
    with SpikeMonitor(node) as monitor:
        got = node(x)
    if output == "packed":
        assert got == want
    else:
        assert torch.equal(got, want)
    spikes = monitor.spikes["IFNode"]
    assert isinstance(spikes, PackedSpikes)
    assert spikes.words.numel() == 3 * 6
    once = functional.if_multi_step(x, "half", 0.5, amplitude="threshold")[0]
    assert torch.equal(spikes.unpack(), once)
    assert not spikes.unpack().requires_grad
    assert torch.equal(monitor.counts()["IFNode"], (once != 0).sum(0, dtype=torch.int32))
    assert monitor.rates()["IFNode"] == pytest.approx((once != 0).double().mean().item())


def test_gradients_are_those_without_a_monitor() -> None:
    found = []
    for watch in (False, True):
        torch.manual_seed(0)
        net = Rows()
        monitors = [SpikeMonitor(net), VoltageMonitor(net)] if watch else []
        net(rows()).sum().backward()
        found.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
        for monitor in monitors:
            monitor.remove()
    assert len(found[0]) == 4
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "options", [{"max_spikes": 3, "amplitude": "threshold"}, {"signed": Signed(margin=1e-3)}]
)
@pytest.mark.parametrize("output", ["spikes", "count"])
def test_spikes_that_are_no_bits(options: dict[str, Any], output: str) -> None:
    node = IFNode(
        0.5, output=output, v_init=torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5]), **options
    )
    x = 2 * rows()
    with torch.no_grad():
        first, second = node(x), node(x)
        reset_net(node)
        with SpikeMonitor(node) as monitor:
            assert torch.equal(node(x), first)
            assert torch.equal(node(x), second)  # the membrane went on as it would have
    spikes = monitor.spikes["IFNode"]
    assert isinstance(spikes, torch.Tensor)
    assert spikes.dtype == (torch.int8 if "signed" in options else torch.uint8)
    assert spikes.shape == (14, 3, 6)
    assert not set(spikes.unique().tolist()) <= {0, 1}
    weight = 0.5 if "amplitude" in options else 1.0
    both = torch.cat([first, second]) / weight if output == "spikes" else first + second
    if output == "spikes":
        assert torch.equal(spikes.float(), both)
    else:
        assert torch.equal(monitor.counts()["IFNode"], both)
    assert monitor.rates()["IFNode"] == pytest.approx(spikes.double().abs().mean().item())


@pytest.mark.parametrize("layout", ["T,N", "N,T", "T*N", "N*T"])
@pytest.mark.parametrize("options", [{}, {"max_spikes": 2}])
def test_records_are_time_first_in_every_layout(layout: str, options: dict[str, Any]) -> None:
    x = rows(T=7)  # [T, B, 6]
    given = x if layout in ("T,N", "T*N") else x.transpose(0, 1)
    merged = "*" in layout
    given = given.flatten(0, 1) if merged else given
    node = IFNode(0.5, layout=layout, T=7 if merged else None, **options)
    plain = IFNode(0.5, store_v_seq=True, store_charge_seq=True, **options)
    with torch.no_grad():
        spikes = plain(x)
        with (
            SpikeMonitor(node) as fired,
            VoltageMonitor(node) as v,
            VoltageMonitor(node, at="charge") as charged,
        ):
            node(given)
    got = fired.spikes["IFNode"]
    got = got.unpack() if isinstance(got, PackedSpikes) else got.float()
    assert torch.equal(got, spikes)
    assert torch.equal(v.v["IFNode"], plain.v_seq)
    assert torch.equal(charged.v["IFNode"], plain.charge_seq)


def test_one_run_until_the_reset() -> None:
    x = rows(T=40)
    whole, stepped = Rows(), Rows()
    stepped.load_state_dict(whole.state_dict())
    set_step_mode(stepped, "s")
    with torch.no_grad(), SpikeMonitor(whole) as a, SpikeMonitor(stepped) as b:
        with VoltageMonitor(whole) as va, VoltageMonitor(stepped) as vb:
            whole(x[:13]), whole(x[13:])
            for row in x:
                stepped(row)
        assert a.spikes["1"] == b.spikes["1"]
        assert a.spikes["3"].shape == (40, 3, 4)
        assert torch.equal(va.v["1"], vb.v["1"])
        # 40 single steps take two words a neuron, no byte each.
        assert b.nbytes == 3 * (5 + 4) * (4 + 1)
        reset_net(stepped)
        for row in x[:2]:
            stepped(row)
        assert [run.shape[0] for run in b.runs["1"]] == [40, 2]
        assert torch.equal(b.spikes["1"].unpack(), b.runs["1"][0].unpack()[:2])
        stepped(x[0, :2])  # another batch: the membrane starts anew, and so does the run
        assert [run.shape for run in b.runs["3"]] == [(40, 3, 4), (2, 3, 4), (1, 2, 4)]
        stepped[1].v = 0.25
        stepped(x[0, :2])
        assert [len(b.runs[name]) for name in "13"] == [4, 3]
        b.clear()
        assert b.nbytes == 0
        with pytest.raises(KeyError, match="did not call its IFNode"):
            b.spikes["1"]
        assert b.runs["1"] == []


@pytest.mark.parametrize("method", ["opi", "burst", "srp", "signed"])
def test_a_converted_network_by_the_names_of_its_ann(method: str) -> None:
    ann = a_network()
    x = dyadic(16, 6, seed=3)
    snn = convert(ann, [x], method=method, T=8)
    with torch.no_grad():
        plain = snn(x), snn.predict_curve(x, [2, 8])
        with SpikeMonitor(snn) as monitor:
            assert torch.equal(snn(x), plain[0])
            curve = snn.predict_curve(x, [2, 8])
    assert all(torch.equal(curve[T], plain[1][T]) for T in curve)
    assert monitor.layers == tuple(name for name, _ in snn.neurons())
    assert monitor.layers == ("1", "3")
    extra = snn.extra_steps
    for name in monitor.layers:
        # Each run starts at the initial potentials; predict_curve goes on in the same run.
        assert [run.shape[0] for run in monitor.runs[name]] == [8 + extra] * 2
    if method == "opi":
        layer = dict(snn.neurons())["3"]
        got = layer.rate(monitor.counts()["3"], 8, torch.float32)
        assert torch.equal(snn.suffix(got), plain[0])


def test_layers_that_spike_in_other_ways_say_so() -> None:
    x = dyadic(16, 6, seed=3)
    snn = convert(a_network(), [x], method="parallel", T=8)
    with torch.no_grad(), SpikeMonitor(snn) as monitor:
        snn(x)
    assert monitor.rates() == monitor.counts() == {}
    with pytest.raises(KeyError, match=r"did not call its IFNode.*firing_rates"):
        monitor.spikes["1"]


def test_a_plan_whose_network_is_watched() -> None:
    x = dyadic(16, 6, seed=3)
    snn = convert(a_network(), [x], T=8)
    plan = lower(snn)
    with torch.no_grad():
        want = plan(x)
        with SpikeMonitor(snn) as monitor:
            torch.testing.assert_close(plan(x), want)
    assert monitor.spikes["3"].shape == (8, 16, 5)


def test_a_converted_network_in_training() -> None:
    x = dyadic(4, 6, seed=3)
    snn = convert(a_network(), [x], T=4)
    with SpikeMonitor(snn) as monitor:
        snn(x).sum().backward()
        trained = monitor.spikes["3"]
        with torch.no_grad():
            snn(x)
    assert monitor.spikes["3"] == trained


def test_limits() -> None:
    net = Rows()
    with torch.no_grad(), SpikeMonitor(net, max_bytes=60) as monitor:
        net(rows())  # 15 and 12 bytes
        reset_net(net)
        net(rows())
        reset_net(net)
        assert monitor.nbytes == 54
        with pytest.warns(
            RuntimeWarning, match=r"holds 54 bytes and stops at layer '1'.*max_bytes"
        ) as warned:
            net(rows())
        assert warned[0].filename == __file__
        assert monitor.full
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # once is enough
            net(rows())
        assert len(monitor.runs["1"]) == 2
        monitor.clear()
        net(rows())
        assert monitor.nbytes == 27
    with torch.no_grad(), SpikeMonitor(net, "3", every=3) as monitor:
        kept = []
        for i in range(7):
            reset_net(net)
            net(rows(seed=i)), net(rows(seed=10 + i))
            if i % 3 == 0:
                kept.append(monitor.spikes["3"])
        assert monitor.runs["3"] == kept
        assert [run.shape[0] for run in kept] == [14] * 3
        assert monitor.layers == ("3",)


def test_only_some_neurons() -> None:
    node = IFNode(0.5)
    with (
        torch.no_grad(),
        VoltageMonitor(node, neurons=[0, 7]) as some,
        VoltageMonitor(node) as all_,
    ):
        node(rows())
        assert torch.equal(some.v["IFNode"], all_.v["IFNode"].flatten(1)[:, [0, 7]])
        assert some.nbytes == 7 * 2 * 4
    with torch.no_grad(), VoltageMonitor(node, neurons=slice(3)) as first:
        node(rows())
        assert first.v["IFNode"].shape == (7, 3)


def test_charges_are_what_fires() -> None:
    node = LIFNode(0.75, 0.5, v_init="half")
    with (
        torch.no_grad(),
        VoltageMonitor(node, at="charge") as charged,
        VoltageMonitor(node) as after,
        SpikeMonitor(node) as fired,
    ):
        node(rows())
    charges, spikes = charged.v["LIFNode"], fired.spikes["LIFNode"].unpack()
    assert torch.equal(charges >= 0.5, spikes != 0)
    assert torch.equal(charges - 0.5 * spikes, after.v["LIFNode"])


def test_taken_out_it_leaves_nothing() -> None:
    net = Rows(store_v_seq=True)
    before = {name: dict(m.__dict__) for name, m in net.named_modules()}
    one, two = SpikeMonitor(net), SpikeMonitor(net)
    volts = VoltageMonitor(net)
    assert net[1].store_packed
    one.remove(), one.remove()
    assert net[1].store_packed  # the other still needs it
    with torch.no_grad():
        net(rows())
        two.disable()
        net(rows())
        assert two.spikes["1"].shape[0] == 7
        two.enable()
        net(rows())
    assert two.spikes["1"].shape[0] == 14
    two.remove(), volts.remove()
    assert net[1].store_v_seq
    assert not net[3].store_v_seq
    assert net[1].v_seq is not None  # which was asked for before
    assert not net[1].store_packed
    assert net[1].packed is None
    reset_net(net)
    for name, module in net.named_modules():
        assert dict(module.__dict__) == before[name]
    assert two.spikes["1"].shape[0] == 14  # what it holds stays
    with pytest.raises(RuntimeError, match="was removed; make a new one"):
        two.enable()
    assert "removed" in repr(two)


def test_copies_of_a_watched_network_are_not_watched() -> None:
    net = Rows()
    with SpikeMonitor(net) as monitor, torch.no_grad():
        net(rows())
        want = net(rows())  # the second call of the run
        held = monitor.nbytes
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            twin(rows())
            reset_net(twin)
            twin(rows())
            assert torch.equal(twin(rows()), want)
        assert monitor.nbytes == held
        assert monitor.spikes["1"].shape[0] == 14


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("net",), TypeError, "net must be a torch.nn.Module, got str"),
        ((nn.Linear(2, 2),), ValueError, "Linear holds no snnkernels.IFNode"),
        ((Rows(), ["1", "7"]), ValueError, "layers names '7'; there are 1, 3"),
    ],
)
def test_errors(arguments: tuple[Any, ...], error: type[Exception], words: str) -> None:
    for kind in (SpikeMonitor, VoltageMonitor):
        with pytest.raises(error, match=words):
            kind(*arguments)


def test_a_monitor_keeps_no_graph() -> None:
    node = IFNode(max_spikes=2)
    with SpikeMonitor(node) as monitor:
        x = rows().requires_grad_()
        graph = weakref.ref(node(x).grad_fn)
        reset_net(node)
        del x
        gc.collect()
        assert graph() is None
        node(rows())
        assert len(monitor.runs["IFNode"]) == 2


def test_errors_of_options() -> None:
    net = Rows()
    for options, error, words in (
        ({"every": 0}, ValueError, "every=0 must be at least 1"),
        ({"every": None}, TypeError, "every=None must be an int"),
        ({"max_bytes": 1.5}, TypeError, "max_bytes=1.5 must be an int"),
    ):
        with pytest.raises(error, match=words):
            SpikeMonitor(net, **options)
    with pytest.raises(ValueError, match="at='spike' is unknown"):
        VoltageMonitor(net, at="spike")
    assert not net[1]._forward_hooks
    with SpikeMonitor(net) as monitor, pytest.raises(KeyError, match=r"'2' is not watched.*1, 3"):
        monitor.spikes["2"]


# ---- whole networks ------------------------------------------------------------------------------


class Foreign(nn.Module):
    """What other libraries' neurons look like."""

    def __init__(self, modes: tuple[str, ...] = ("s", "m")) -> None:
        super().__init__()
        self.step_mode, self.v, self.modes = "s", torch.ones((), requires_grad=True) * 2, modes

    def supported_step_mode(self) -> tuple[str, ...]:
        return self.modes

    def reset(self) -> None:
        self.v = 0.0

    def detach(self) -> None:
        self.v = self.v.detach()


class SeqToANNContainer(nn.Sequential):
    """Named as SpikingJelly's."""

    step_mode = "m"


def test_step_modes_of_ours_and_theirs() -> None:
    net = nn.Sequential(IFNode(), Foreign(), SeqToANNContainer(Foreign(), nn.Sequential(Foreign())))
    set_step_mode(net, "m")
    assert [net[0].step_mode, net[1].step_mode] == ["m", "m"]
    assert net[2][0].step_mode == net[2][1][0].step_mode == "s"  # theirs inside stay
    set_step_mode(net, "s")
    assert net[0].step_mode == net[1].step_mode == net[2].step_mode == "s"
    with pytest.raises(ValueError, match="step_mode='x' is unknown"):
        set_step_mode(net, "x")
    with pytest.raises(TypeError, match=r"net must be a torch\.nn\.Module, got list"):
        set_step_mode([net], "m")  # type: ignore[arg-type]
    net.append(Foreign(modes=("s",)))
    with pytest.raises(ValueError, match=r"3 \(Foreign\) does not offer step_mode='m'.*'s'"):
        set_step_mode(net, "m")
    assert net[0].step_mode == "s"  # none was changed


def test_a_converted_network_has_one_step_mode() -> None:
    snn = convert(a_network(), [dyadic(4, 6, seed=3)], T=4)
    set_step_mode(snn, "m")
    with pytest.raises(ValueError, match=r"SpikingActivation.*does not offer step_mode='s'"):
        set_step_mode(snn, "s")
    assert all(layer.node.step_mode == "m" for _, layer in snn.neurons())


def test_detach_net() -> None:
    net = nn.Sequential(IFNode(), Foreign())
    net[0](currents(3, 4, seed=1).requires_grad_())
    assert net[0].v.requires_grad
    v = net[0].v.clone()
    detach_net(net)
    assert not net[0].v.requires_grad
    assert not net[1].v.requires_grad
    assert torch.equal(net[0].v, v)


# ---- backward through a freed graph --------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},  # the short way
        {"v_init": "half", "amplitude": "threshold"},
        {"learn_threshold": True},
        {"output": "rate"},
        {"save": "trace"},
        {"save": "bits", "surrogate_function": "rectangle"},
        {"layout": "N,T"},
        {"step_mode": "s"},
    ],
)
def test_a_second_backward_says_whom_to_reset(options: dict[str, Any]) -> None:
    net = nn.ModuleDict({"first": nn.Sequential(nn.Linear(6, 5), IFNode(0.5, **options))})
    x = rows(T=3)
    x = x[0] if options.get("step_mode") == "s" else x

    def step() -> None:
        net["first"](x).sum().backward()

    step()
    with pytest.raises(RuntimeError, match=r"layer 'first\.1', IFNode\(.*reset_net\(net\)") as e:
        step()
    assert "v [3, 5]" in str(e.value)
    assert "second time" not in str(e.value)
    reset_net(net)
    step()
    detach_net(net)
    step()


def test_truncated_training_raises_no_alarm() -> None:
    net = nn.Sequential(nn.Linear(6, 5), IFNode(0.5))
    net(rows()).sum().backward(retain_graph=True)
    net(rows()).sum().backward()  # through both, as asked for
    with torch.no_grad():
        net(rows())  # carries the membrane on without a graph
    net(rows()).sum().backward()
    with torch.no_grad():
        net(rows())
    net(rows()).sum().backward()


def test_backward_twice_of_one_call_stays_autograds_error() -> None:
    loss = nn.Sequential(nn.Linear(6, 5), IFNode(0.5))(rows()).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="through the graph a second time"):
        loss.backward()


def test_a_function_has_no_name() -> None:
    x = rows().requires_grad_()
    first, v, _ = functional.if_multi_step(x)
    first.sum().backward()
    with pytest.raises(RuntimeError, match="the membrane that a neuron kept"):
        functional.if_multi_step(x, v)[0].sum().backward()


def test_the_graph_does_not_keep_the_neurons() -> None:
    node = IFNode()
    spikes = node(rows().requires_grad_())
    alive = weakref.ref(node)
    del node
    gc.collect()
    assert alive() is None
    spikes.sum().backward()


def test_copies_of_a_watched_network_store_nothing() -> None:
    net = nn.Sequential(IFNode(), IFNode(store_v_seq=True))
    x = currents(3, 4)
    with SpikeMonitor(net), VoltageMonitor(net):
        net(x)
        twins = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
        assert net[0].store_v_seq
    for twin in twins:
        twin(x)
        assert not twin[0].store_v_seq
        assert not twin[0].store_packed
        assert twin[0].packed is None
        assert twin[0].v_seq is None
        assert twin[1].store_v_seq
        assert twin[1].v_seq is not None
