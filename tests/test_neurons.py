"""IFNode: state, what survives, what is checked; and the errors of the functions below it."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import Backend, assert_same_bits, currents, dyadic, moved
from torch import Tensor, nn

from snnkernels import IFNode, LIFNode, reset_net, surrogate
from snnkernels.functional import if_count, if_multi_step, if_rate, if_step
from snnkernels.options import Signed


def x_of(*shape: int, backend: Backend | None = None, seed: int = 0) -> Tensor:
    return moved(currents(*shape, seed=seed), "cpu" if backend is None else backend.device)


# ---- the same numbers as the functions -----------------------------------------------------------

ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"v_threshold": 0.8, "v_init": "half"},
    {"v_threshold": torch.tensor([0.5, 1.0, 1.5]), "channel_dim": 1, "v_init": "half"},
    {"v_threshold": torch.tensor([0.5, 1.0, 1.5]), "channel_dim": 1, "amplitude": "threshold"},
    {"v_reset": 0.0, "v_init": 0.25, "tie": ">"},
    {"input_scale": 0.7, "amplitude": 2.5},
    {"v_init": torch.linspace(0, 0.9, 12).view(3, 4)},
    {"spike_dtype": torch.uint8},
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda a: "-".join(a) or "defaults")
def test_equals_the_functions(backend: Backend, arguments: dict[str, Any]) -> None:
    x = x_of(6, 2, 3, 4, backend=backend)
    node = IFNode(**arguments).to(backend.device)
    words = {k: moved(v, backend.device) for k, v in arguments.items()}
    v = words.pop("v_init", 0.0)
    spikes, last, _ = if_multi_step(x, v, **words)
    assert_same_bits(node(x), spikes)
    assert_same_bits(node.v, last)
    # The membrane is carried.
    again, carried, _ = if_multi_step(x, last, **words)
    assert_same_bits(node(x), again)
    assert_same_bits(node.v, carried)
    node.reset()
    assert_same_bits(node(x), spikes)

    single = IFNode(step_mode="s", **arguments).to(backend.device)
    assert_same_bits(torch.stack([single(row) for row in x]), spikes)
    assert_same_bits(single.v, last)

    words.pop("spike_dtype", None)
    arguments = {k: a for k, a in arguments.items() if k != "spike_dtype"}
    rate = IFNode(output="rate", **arguments).to(backend.device)
    assert_same_bits(rate(x), if_rate(x, v, **words)[0])
    words.pop("amplitude", None)
    count = IFNode(output="count", **arguments).to(backend.device)
    assert_same_bits(count(x), if_count(x, v, **words)[0])
    assert_same_bits(count.v, last)


def test_constant_current(backend: Backend) -> None:
    z = x_of(2, 5, backend=backend)
    node = IFNode(v_init="half")
    assert_same_bits(node(z, T=6), if_multi_step(z, "half", T=6)[0])
    with pytest.raises(ValueError, match="T is for step_mode='m'"):
        IFNode(step_mode="s")(z, T=6)


def test_single_step_outputs(backend: Backend) -> None:
    x = x_of(7, backend=backend)
    for output in ("spikes", "count", "rate"):
        got = IFNode(step_mode="s", output=output, amplitude=0.5)(x)
        assert got.shape == (7,)
        assert got.dtype == (torch.int32 if output == "count" else torch.float32)
    assert torch.equal(if_step(x)[0], IFNode(step_mode="s")(x))


def test_v_seq(backend: Backend) -> None:
    x = x_of(6, 4, backend=backend)
    node = IFNode(store_v_seq=True)
    node(x)
    assert_same_bits(node.v_seq, if_multi_step(x, store_v_seq=True)[2])
    node.reset()
    assert node.v_seq is None


# ---- state ---------------------------------------------------------------------------------------


def test_state_starts_anew_with_another_shape() -> None:
    node = IFNode(v_init=0.25)
    node(x_of(4, 3, 5))
    first = node(x_of(4, 2, 5))
    assert_same_bits(first, if_multi_step(x_of(4, 2, 5), 0.25)[0])
    assert node.v.shape == (2, 5)


def test_v_before_and_after() -> None:
    node = IFNode(2.0, v_init="half")
    assert node.v == 1.0
    node(x_of(3, 4))
    assert node.v.shape == (4,)
    node.reset()
    assert node.v == 1.0
    node.v = torch.full((4,), 0.5)
    assert_same_bits(node(x_of(3, 4)), if_multi_step(x_of(3, 4), 0.5, 2.0)[0])
    learned = IFNode(2.0, v_init="half", learn_threshold=True)
    with torch.no_grad():
        learned.v_threshold.fill_(3.0)
    assert learned.v.item() == 1.5


V_INIT = [0.3, "half", torch.tensor([0.1, 0.2, 0.3])]


@pytest.mark.parametrize("v_init", V_INIT, ids=["number", "half", "tensor"])
@pytest.mark.parametrize("learn", [False, True])
def test_v_init_survives(v_init: Any, learn: bool) -> None:
    def fresh() -> IFNode:
        return IFNode(0.9, v_init=v_init, learn_v_init=learn)

    x, other = x_of(5, 2, 3), x_of(5, 4, 3)
    want, want_other = fresh()(x), fresh()(other)
    assert bool(want.detach().any())
    node = fresh()
    node(x), node(other)
    assert_same_bits(_after_reset(node, x), want)

    def pickled(n: IFNode) -> IFNode:
        return pickle.loads(pickle.dumps(n))

    def saved(n: IFNode) -> IFNode:
        stream = io.BytesIO()
        torch.save(n, stream)
        stream.seek(0)
        return torch.load(stream, weights_only=False)

    def loaded(n: IFNode) -> IFNode:
        target = fresh()
        target.load_state_dict(n.state_dict())
        return target

    roads: list[Callable[[IFNode], IFNode]] = [
        copy.deepcopy,
        copy.copy,
        pickled,
        saved,
        loaded,
        lambda n: n.to("cpu"),
        lambda n: n.double().float(),
        lambda n: n.half().float(),
        lambda n: n.train().eval(),
    ]
    for road in roads:
        there = road(node)
        assert_same_bits(_after_reset(there, other), want_other)
        assert_same_bits(_after_reset(there, x), want)


def _after_reset(node: IFNode, x: Tensor) -> Tensor:
    node.reset()
    return node(x)


def test_membrane_survives_copies() -> None:
    x = x_of(5, 3).requires_grad_()
    node = IFNode(store_v_seq=True)
    node(x)
    # With a graph hanging on it.
    assert node.v.requires_grad
    for copied in (copy.deepcopy(node), pickle.loads(pickle.dumps(node))):
        assert_same_bits(copied.v, node.v)
        assert not copied.v.requires_grad
        assert_same_bits(copied(x), copy.deepcopy(node)(x))


def test_detach_cuts_the_graph() -> None:
    node = IFNode(learn_threshold=True)
    x = x_of(3, 4).requires_grad_()
    node(x)
    node.detach()
    y = x_of(3, 4, seed=2).requires_grad_()
    (g_x, _) = torch.autograd.grad(node(y).sum(), (x, y), allow_unused=True)
    assert g_x is None


def test_state_is_not_in_the_state_dict() -> None:
    node = IFNode(torch.ones(3), v_init=torch.zeros(3), learn_threshold=True)
    keys = set(node.state_dict())
    node(x_of(4, 3))
    assert set(node.state_dict()) == keys
    assert {"v_threshold", "v_init"} <= keys
    assert not IFNode().state_dict()


def test_reset_net() -> None:
    net = nn.Sequential(nn.Linear(4, 4), IFNode(), nn.Sequential(IFNode(v_init=0.5)))
    with torch.no_grad():
        want = net(x_of(3, 2, 4))
        assert not torch.equal(net(x_of(3, 2, 4)), want)
        reset_net(net)
        assert_same_bits(net(x_of(3, 2, 4)), want)


# ---- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_modules_keep_float32_thresholds(dtype: torch.dtype) -> None:
    for learn in (False, True):
        node = IFNode(
            torch.tensor([0.1, 0.7]), v_init=torch.tensor([0.3, 0.3]), learn_threshold=learn
        )
        before = {k: v.clone() for k, v in node.state_dict().items()}
        node(x_of(3, 2).to(dtype))
        membrane = node.v.clone()
        node = node.to(dtype)
        assert node.v_threshold.dtype == node.v_init.dtype == node.v.dtype == torch.float32
        for k, v in node.state_dict().items():
            assert_same_bits(v, before[k])
        assert_same_bits(node.v, membrane)
        x = x_of(4, 2).to(dtype)
        want = if_multi_step(x, torch.tensor([0.3, 0.3]), torch.tensor([0.1, 0.7]))[0]
        assert_same_bits(_after_reset(node, x), want)
        assert nn.Sequential(node).to(dtype)[0].v_threshold.dtype == torch.float32


def test_double_modules_follow() -> None:
    node = IFNode(torch.tensor([0.1, 0.7]), learn_threshold=True).double()
    assert node.v_threshold.dtype == torch.float64
    assert node(x_of(3, 2).double()).dtype == torch.float64
    assert node.v.dtype == torch.float64


# ---- learning ------------------------------------------------------------------------------------


def test_learned_thresholds_stop_at_their_floor() -> None:
    node = IFNode(2.0, v_init="half", learn_threshold=True)
    assert [n for n, _ in node.named_parameters()] == ["v_threshold"]
    with torch.no_grad():
        node.v_threshold.fill_(-5.0)
    assert node.threshold.item() == pytest.approx(2e-3)
    assert bool(node(x_of(3, 4)).isfinite().all())
    reloaded = IFNode(2.0, learn_threshold=True)
    with pytest.raises(ValueError, match="v_threshold must be positive"):
        reloaded.load_state_dict(node.state_dict())


def test_learned_values_get_gradients_and_move() -> None:
    node = IFNode(1.0, v_init=0.25, learn_threshold=True, learn_v_init=True)
    optimiser = torch.optim.SGD(node.parameters(), 0.1)
    node(dyadic(5, 8).float()).sum().backward()
    assert {n: bool(p.grad != 0) for n, p in node.named_parameters()} == {
        "v_threshold": True,
        "v_init": True,
    }
    optimiser.step()
    assert node.v_threshold.item() != 1.0
    assert node.v_init.item() != 0.25


def test_learned_half_follows_the_threshold() -> None:
    x = dyadic(5, 8).float()
    node = IFNode(1.0, v_init="half", learn_threshold=True)
    node(x).sum().backward()
    v = torch.tensor(0.5, requires_grad=True)
    th = torch.tensor(1.0, requires_grad=True)
    if_multi_step(x, v, th)[0].sum().backward()
    assert node.v_threshold.grad.item() == pytest.approx((th.grad + v.grad / 2).item(), rel=1e-6)
    start = IFNode(torch.tensor([1.0, 2.0]), v_init="half", learn_v_init=True)
    assert start.v_init.tolist() == [0.5, 1.0]


def test_shared_parameter_stays_shared() -> None:
    threshold = nn.Parameter(torch.tensor(0.8))
    nodes = nn.ModuleList([IFNode(threshold), IFNode(threshold)])
    assert len(list(nodes.parameters())) == 1
    sum(n(x_of(4, 3)).sum() for n in nodes).backward()
    assert threshold.grad is not None


def test_given_tensors_are_copied() -> None:
    threshold = torch.tensor([1.0, 2.0])
    node = IFNode(threshold)
    threshold.fill_(9)
    assert node.v_threshold.tolist() == [1.0, 2.0]
    assert "v_threshold" in dict(node.named_buffers())


# ---- words ---------------------------------------------------------------------------------------


def test_signature() -> None:
    parameters = inspect.signature(IFNode).parameters
    positional = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [
        "v_threshold", "v_reset", "surrogate_function", "detach_reset", "step_mode",
    ]  # fmt: skip
    with pytest.raises(TypeError):
        IFNode(1.0, None, None, False, "m", 0.5)
    # Every setting of the module is used by name in the function too.
    assert IFNode().supported_step_mode() == ("s", "m")


def test_extra_repr() -> None:
    text = repr(IFNode(torch.ones(3), v_init="half", channel_dim=0, amplitude=2.0, output="rate"))
    for part in (
        "v_threshold=Tensor(3,)", "v_init='half'", "channel_dim=0", "amplitude=2.0",
        "output='rate'", "step_mode='m'", "ATan(alpha=2.0",
    ):  # fmt: skip
        assert part in text
    assert "amplitude" not in repr(IFNode())


def test_step_mode_can_be_changed_but_not_misspelt() -> None:
    node = IFNode()
    node.step_mode = "s"
    assert node(x_of(3)).shape == (3,)
    with pytest.raises(ValueError, match="step_mode='x' is unknown; allowed are 's' and 'm'"):
        node.step_mode = "x"


def test_surrogate_words() -> None:
    assert IFNode().surrogate_function == surrogate.ATan(2.0)
    assert IFNode(surrogate_function="triangle").surrogate_function == surrogate.Triangle()


# ---- errors --------------------------------------------------------------------------------------

X = torch.zeros(4, 2, 3)
NAN, INF = math.nan, math.inf

# What a bad argument raises, for functions and module alike: name, value, error, what it says.
BOTH = [
    ("v_threshold", 0.0, ValueError, "v_threshold=0.0 must be positive and finite"),
    ("v_threshold", -1, ValueError, "v_threshold=-1.* must be positive"),
    ("v_threshold", INF, ValueError, "v_threshold=inf must be positive"),
    ("v_threshold", NAN, ValueError, "v_threshold"),
    ("v_threshold", torch.tensor([1.0, 0.0, 2.0]), ValueError, "v_threshold.*element 1 of 3 is 0"),
    ("v_threshold", torch.tensor([1.0, 1.0, NAN]), ValueError,
     "v_threshold.*element 2 of 3 is nan"),
    ("v_threshold", torch.tensor([INF, 1.0, 1.0]), ValueError, "v_threshold.*element 0"),
    ("v_threshold", "1", TypeError, "v_threshold='1'.* number"),
    ("v_threshold", None, TypeError, "v_threshold=None.* number"),
    ("v_threshold", True, TypeError, "v_threshold=True.* number"),
    ("v_threshold", torch.ones(5), ValueError,
     r"v_threshold of shape \(5,\).*\(2, 3\).*channel_dim"),
    ("v_threshold", torch.ones(1, 4, 2, 3), ValueError, "v_threshold of shape"),
    ("v_threshold", torch.ones(3, dtype=torch.complex64), TypeError, "v_threshold.*complex64"),
    ("v_threshold", torch.ones(3, dtype=torch.bool), TypeError, "v_threshold.*bool"),
    ("v_reset", "0", TypeError, "v_reset='0'.* number"),
    ("v_reset", True, TypeError, "v_reset=True.* number"),
    ("surrogate_function", "tan", ValueError, "surrogate_function='tan' is unknown; .*'atan'"),
    ("surrogate_function", 3, TypeError, "surrogate_function=3 .*allowed are None"),
    ("amplitude", "theta", ValueError, "amplitude='theta' is unknown; .*'threshold'"),
    ("amplitude", [1.0], TypeError, r"amplitude=\[1.0\].* number"),
    ("amplitude", NAN, ValueError, "amplitude is NaN"),
    ("amplitude", torch.ones(5), ValueError, r"amplitude of shape \(5,\)"),
    ("input_scale", "2", TypeError, "input_scale='2'.* number"),
    ("input_scale", torch.ones(5), ValueError, r"input_scale of shape \(5,\)"),
    ("input_scale", NAN, ValueError, "input_scale is NaN"),
    ("tie", ">==", ValueError, "tie='>==' is unknown; allowed are '>=' and '>'"),
]  # fmt: skip


def _name(value: Any) -> str:
    return str(value).replace("\n", " ")[:30]


@pytest.mark.parametrize(("name", "value", "error", "says"), BOTH, ids=_name)
def test_bad_arguments(name: str, value: Any, error: type[Exception], says: str) -> None:
    x = X.clone().requires_grad_()
    functions: list[Callable[..., Any]] = [if_multi_step, if_step, if_rate]
    if name != "amplitude":
        functions.append(if_count)
    for function in functions:
        with pytest.raises(error, match=says):
            function(x[0] if function is if_step else x, **{name: value})
    with pytest.raises(error, match=says):
        IFNode(**{name: value})(x)


FUNCTIONS = [
    ({"x_seq": 3.0}, TypeError, "x_seq must be a torch.Tensor, got float"),
    ({"x_seq": np.zeros((3, 2))}, TypeError, "x_seq must be a torch.Tensor, got ndarray"),
    ({"x_seq": torch.zeros(3, 2, dtype=torch.int64)}, TypeError,
     "x_seq has dtype torch.int64; .*float32"),
    ({"x_seq": torch.zeros(3, dtype=torch.complex64)}, TypeError,
     "x_seq has dtype torch.complex64"),
    ({"x_seq": torch.tensor(1.0)}, ValueError, r"x_seq has no dimensions.*\[T, \*shape\]"),
    ({"T": 0}, ValueError, "T=0 must be at least 1"),
    ({"T": -3}, ValueError, "T=-3 must be at least 1"),
    ({"T": True}, TypeError, "T=True must be an int"),
    ({"T": 4.0}, TypeError, "T=4.0 must be an int"),
    ({"T": "4"}, TypeError, "T='4' must be an int"),
    ({"v": "third"}, ValueError, "v='third' is unknown; the only string allowed is 'half'"),
    ({"v": NAN}, ValueError, "v is NaN"),
    ({"v": None}, TypeError, "v=None.* number"),
    ({"v": torch.zeros(2, 4)}, ValueError, r"v of shape \(2, 4\) does not broadcast"),
    ({"v": torch.zeros(3), "channel_dim": 2}, ValueError,
     "channel_dim=2 is out of range.*without the time"),
    ({"v": torch.zeros(3), "channel_dim": -3}, ValueError, "channel_dim=-3 is out of range"),
    ({"v": torch.zeros(3), "channel_dim": 0}, ValueError,
     "v has 3 elements but .*channel_dim.* has 2"),
    ({"v": torch.zeros(3), "channel_dim": True}, TypeError, "channel_dim=True"),
    ({"v": torch.zeros(3), "channel_dim": 1.0}, TypeError, "channel_dim=1.0"),
    ({"v": torch.zeros(3, device="meta")}, ValueError, "v is on meta but x_seq is on cpu"),
    ({"spike_dtype": torch.float64}, ValueError, "spike_dtype=torch.float64.*torch.uint8"),
    ({"spike_dtype": torch.int8}, ValueError, "spike_dtype=torch.int8 is not offered"),
    ({"spike_dtype": "uint8"}, (TypeError, ValueError), "spike_dtype"),
    ({"store_v_seq": True, "store_charge_seq": True}, ValueError,
     "store_v_seq and store_charge_seq"),
    ({"out": "x"}, TypeError, "out must be a torch.Tensor, got str"),
    ({"out": torch.zeros(4, 3, 2)}, ValueError,
     r"out is torch.float32 \(4, 3, 2\).*expected.*\(4, 2, 3\)"),
    ({"out": torch.zeros(4, 2, 3, dtype=torch.float64)}, ValueError, "out is torch.float64"),
    ({"out": torch.zeros(2, 3).expand(4, 2, 3)}, ValueError, "out shares memory with itself"),
    ({"out": X}, ValueError, "out shares memory with x_seq"),
    ({"out": torch.zeros(4, 2, 3, requires_grad=True)}, ValueError,
     "out cannot be combined with grad"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "says"), FUNCTIONS, ids=_name)
def test_bad_arguments_of_the_function(
    arguments: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        if_multi_step(**{"x_seq": X, **arguments})


def test_out_and_gradients_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="out cannot be combined with gradients"):
        if_multi_step(X.clone().requires_grad_(), out=torch.zeros(4, 2, 3))


@pytest.mark.parametrize("operand", ["v", "v_threshold", "amplitude", "input_scale"])
def test_out_may_not_overlap_any_input(operand: str) -> None:
    out = torch.ones(4, 2, 3)
    with pytest.raises(ValueError, match=f"out shares memory with {operand}"):
        if_multi_step(X, **{operand: out[0]}, out=out)


NODES = [
    ({"v_init": "third"}, ValueError,
     "v_init='third' is unknown; the only string allowed is 'half'"),
    ({"v_init": None}, TypeError, "v_init=None"),
    ({"v_init": NAN}, ValueError, "v_init"),
    ({"v_reset": INF}, ValueError, "v_reset=inf must be finite or None"),
    ({"v_reset": NAN}, ValueError, "v_reset=nan must be finite or None"),
    ({"step_mode": "multi"}, ValueError, "step_mode='multi' is unknown; allowed are 's' and 'm'"),
    ({"output": "spike"}, ValueError,
     "output='spike' is unknown; allowed are spikes, packed, count, rate"),
    ({"save": "bit"}, ValueError, "save='bit' is unknown; allowed: recompute, trace, bits"),
    ({"layout": "TN"}, ValueError, "layout='TN' is unknown; allowed: T,N, N,T"),
    ({"T": 3}, ValueError, "T=3 is for merged layouts, not layout='T,N'"),
    ({"spike_dtype": torch.int8}, ValueError, "spike_dtype=torch.int8"),
    ({"channel_dim": 1.5}, TypeError, "channel_dim=1.5"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "says"), NODES, ids=_name)
def test_bad_arguments_of_the_module(
    arguments: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        IFNode(**arguments)(X)


@pytest.mark.parametrize("value", [0.0, -1.0, NAN, torch.tensor([1.0, -1.0])], ids=_name)
def test_thresholds_are_checked_when_built(value: Any) -> None:
    with pytest.raises(ValueError, match=r"v_threshold.* must be positive and finite"):
        IFNode(value)


def test_thresholds_are_checked_when_loaded() -> None:
    net = nn.Sequential(IFNode(torch.ones(3)))
    for bad in (0.0, NAN, INF):
        state = {"0.v_threshold": torch.tensor([1.0, bad, 1.0])}
        with pytest.raises(ValueError, match=r"v_threshold.*element 1 of 3"):
            net.load_state_dict(state)
    assert net[0].v_threshold.tolist() == [1.0] * 3


def test_numpy_and_integer_numbers_are_numbers() -> None:
    x = x_of(5, 4)
    want = if_multi_step(x, 0.5, 2.0)[0]
    for number in (2, np.float32(2), np.int64(2), np.float64(2), torch.tensor(2)):
        assert_same_bits(if_multi_step(x, 0.5, number)[0], want)
    assert_same_bits(IFNode(np.float32(2), v_init=np.float64(0.5))(x), want)


# ---- found by review -----------------------------------------------------------------------------


def test_surrogates_of_ones_own_are_refused() -> None:
    """The kernels know four; anything else would silently train with another derivative."""

    class Mine(surrogate.ATan):
        def derivative(self, u: Tensor) -> Tensor:
            return torch.full_like(u, 7.0)

    for own in (Mine(), surrogate.Surrogate(1.0)):
        with pytest.raises(TypeError, match=r"surrogate_function=.*allowed are None, a name"):
            IFNode(surrogate_function=own)
        with pytest.raises(TypeError, match=r"surrogate_function="):
            if_multi_step(X, surrogate_function=own)


def test_integer_spikes_carry_their_amplitude() -> None:
    for spikes in (
        if_multi_step(X, amplitude=2.0, spike_dtype=torch.uint8)[0],
        if_step(X[0], amplitude=2.0, spike_dtype=torch.uint8)[0],
        IFNode(amplitude=2.0, spike_dtype=torch.uint8, step_mode="s")(X[0]),
    ):
        assert spikes.dtype == torch.uint8
        assert spikes.max() <= 1
        assert spikes.amplitude == 2.0


def test_one_neuron_alone_then_several() -> None:
    """A carried membrane without dimensions is a shape like any other: five others start anew."""
    node = IFNode(v_init=0.25)
    node(torch.full((3,), 0.125))
    assert node.v.shape == ()
    node(torch.zeros(1, 5))
    assert_same_bits(node.v, torch.full((5,), 0.25))
    node.v = torch.tensor(0.5)  # set by hand it broadcasts
    node(torch.zeros(1, 5))
    assert_same_bits(node.v, torch.full((5,), 0.5))


def test_traces_follow_a_move() -> None:
    node = IFNode(store_v_seq=True)
    node(X)
    node.double()
    assert node.v.dtype == node.v_seq.dtype == torch.float64


def test_v_reset_must_be_finite_in_functions_too() -> None:
    with pytest.raises(ValueError, match="v_reset=inf must be finite or None"):
        if_multi_step(X, v_reset=INF)


# ---- what a node holds ---------------------------------------------------------------------------


def test_all_state_moves() -> None:
    node = IFNode(store_count=True)
    node(torch.rand(3, 2))
    node.mask = torch.ones(2, dtype=torch.bool)
    node.to("meta")
    assert node.mask.device.type == node.count.device.type == node.v.device.type == "meta"
    assert node.mask.dtype == torch.bool


def test_gradients_stay_as_wide_as_their_threshold() -> None:
    node = IFNode(learn_threshold=True)
    node(torch.rand(3, 2) + 0.5).sum().backward()
    want = node.v_threshold.grad.clone()
    node.half()
    assert node.v_threshold.dtype == node.v_threshold.grad.dtype == torch.float32
    assert torch.allclose(node.v_threshold.grad, want, rtol=1e-3)


def test_loaded_thresholds_are_float32() -> None:
    node = IFNode(torch.tensor([0.3, 0.7]), channel_dim=-1)
    state = {name: tensor.half() for name, tensor in node.state_dict().items()}
    node.load_state_dict(state, assign=True)
    assert node.v_threshold.dtype == torch.float32
    assert state["v_threshold"].dtype == torch.float16


def test_loaded_leaks_are_checked() -> None:
    node = LIFNode(torch.tensor(0.5))
    with pytest.raises((ValueError, RuntimeError), match=r"beta must be within \[0, 1\]"):
        node.load_state_dict({**node.state_dict(), "beta": torch.tensor(7.0)})


def test_an_input_that_is_no_tensor_is_named_at_every_call() -> None:
    node = IFNode()
    for _ in range(2):
        with pytest.raises(TypeError, match=r"x_seq must be a torch\.Tensor, got list"):
            node([1.0, 2.0])
        node(torch.rand(3, 2))


def test_a_single_step_of_signed_spikes_keeps_its_amplitude() -> None:
    node = IFNode(signed=Signed(), spike_dtype=torch.int8, amplitude=2.0, step_mode="s")
    assert node(torch.ones(3)).amplitude == 2.0


def test_amplitudes_of_spikes_are_their_own() -> None:
    node = IFNode(torch.tensor(1.0), amplitude="threshold", spike_dtype=torch.uint8)
    spikes = node(torch.ones(2, 3))
    with torch.no_grad():
        node.v_threshold.mul_(2)
    assert spikes.amplitude == 1.0
    assert not spikes.amplitude.requires_grad
