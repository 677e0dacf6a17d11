"""What methods ask of the neuron: worked examples, and every back end against the reference."""

from __future__ import annotations

import itertools
import math
import random
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support import (
    DTYPES,
    Backend,
    assert_close,
    assert_same_bits,
    currents,
    dtype_id,
    dyadic,
    generator,
    moved,
)
from torch import Tensor

from snnkernels import IFNode, LIFNode, surrogate, use_backend
from snnkernels.functional import Run, if_run, lif_multi_step
from snnkernels.kernels import backward, params, run
from snnkernels.kernels.spec import Asked, Grads, Neuron, Saved
from snnkernels.options import Probe, Signed

OUTPUTS = ("spikes", "packed", "count", "v_seq", "charge_seq")


def row(values: list[float], **given: Any) -> Run:
    """One neuron; v 1/2 and threshold 1 unless told otherwise."""
    x = torch.tensor(values, dtype=torch.float32).reshape(-1, 1)
    return if_run(x, outputs=("spikes", "count"), **{"v": 0.5, **given})


def spikes_of(run: Run) -> list[float]:
    assert run.spikes is not None
    return run.spikes.flatten().tolist()


# ---- by hand -------------------------------------------------------------------------------------


def test_probe_mask_by_hand(backend: Backend) -> None:
    """SRP, theta 1, tau 4: who ends the probe with nothing left is silenced."""
    for probe, last, active in (
        ([1, 1, -1, -1], -1.5, False),
        ([0.3] * 4, 0.7, True),
        ([-0.2] * 4, -0.3, False),
        # Fires at t = 4 and ends at 0: SRP silences it although its mean is positive.
        ([0.125] * 4, 0.0, False),
    ):
        x = moved(torch.tensor([probe + [0.25] * 6]).T.contiguous(), backend.device)
        run = if_run(x, 0.5, outputs=("spikes", "count", "v_seq"), probe=Probe(4))
        assert run.v_seq is not None
        assert run.v_seq[3].item() == pytest.approx(last, abs=1e-6)
        alone = if_run(x[4:], 0.5, outputs=("spikes", "count", "v_seq"))
        want = alone.spikes if active else torch.zeros_like(alone.spikes)
        assert_same_bits(run.spikes[4:], want)
        assert_same_bits(run.spikes[:4], if_run(x[:4], 0.5).spikes)
        assert_same_bits(run.count, alone.count if active else torch.zeros_like(alone.count))
        # The membrane goes on, masked or not.
        assert_same_bits(run.v, alone.v)


def test_probe_shift_by_hand(backend: Backend) -> None:
    """COS, theta 1, rho = T = 4."""
    cases: list[tuple[list[float], int, list[float]]] = [
        ([1, 1, -1, -1], 1, [0, 1, 0, 0]),
        ([1, 1, -1, -1], 2, [0, 0, 0, 0]),
        ([-2, 1, 1, 2], 1, [0, 0, 1, 1]),
        # The count is right after one: a second finds nothing to move.
        ([-2, 1, 1, 2], 2, [0, 0, 1, 1]),
        ([-3, 0.25, 0.25, 4], 1, [0, 0, 1, 1]),
        ([0.3] * 4, 1, [0, 1, 0, 0]),
    ]
    for x, iterations, want in cases:
        assert spikes_of(row(x, probe=Probe(4, "shift", iterations=iterations))) == want
    # Fires at every step and ends above the threshold: nothing to add, no infinite membrane.
    always = row([2.0] * 4, probe=Probe(4, "shift"))
    assert spikes_of(always) == [1, 1, 1, 1]
    assert always.v.item() == 4.5


def test_probes_repeated_end_at_the_count_of_the_quantised_activation(backend: Backend) -> None:
    g = generator(11)
    x = moved((torch.randn(8, 2000, generator=g) * 0.8 + 0.3), backend.device)
    want = torch.floor(x.sum(0) + 0.5).clamp(0, 8)
    wrong = []
    for iterations in (1, 2, 3, 8):
        run = if_run(x, 0.5, outputs="count", probe=Probe(8, "shift", 1e-3, iterations))
        wrong.append(int((run.count != want).sum()))
    assert wrong[0] > wrong[1] > wrong[2] >= wrong[3]
    # A sum within rounding of a multiple of the threshold may fall on either side.
    assert wrong[3] <= 2


def test_packed_spikes_are_bits(backend: Backend) -> None:
    x = moved(torch.tensor([[3.0], [0.0], [-2.0]]), backend.device)
    for more in ({"max_spikes": 3}, {"signed": Signed(low=-5)}):
        with pytest.raises(ValueError, match="packed spikes are bits"):
            if_run(x, outputs=("packed", "count"), **more)
        node = IFNode(output="packed", **more)
        with pytest.raises(ValueError, match="packed spikes are bits"):
            node(x)


@pytest.mark.parametrize("amplitude", [1.0, 3.0, "threshold"])
def test_a_rate_is_a_float_whatever_its_spikes(backend: Backend, amplitude: Any) -> None:
    x = moved(torch.full((4, 3), 0.4), backend.device)
    found = []
    for spike_dtype in (None, torch.uint8):
        x = x.detach().requires_grad_()
        options = {"amplitude": amplitude, "spike_dtype": spike_dtype}
        rate = if_run(x, 0.0, 0.75, outputs="rate", **options).rate
        assert rate.dtype == torch.float32
        (grad,) = torch.autograd.grad(rate.sum(), x)
        node = IFNode(0.75, output="rate", **options)
        (again,) = torch.autograd.grad(node(x).sum(), x)
        found.append((rate, grad, again))
    for a, b in zip(*found, strict=True):
        assert_same_bits(a, b)
    assert_same_bits(found[0][1], found[0][2])


def test_burst_by_hand(backend: Backend) -> None:
    # AdaFire: floor(m / theta), at most m; a group neuron of 4 has a quarter of the threshold.
    run = row([0.7, 0.7], v=0.125, v_threshold=0.25, max_spikes=4, amplitude=0.25)
    assert spikes_of(run) == [0.75, 0.75]
    assert run.count.item() == 6
    assert spikes_of(row([9.0, -9.0], max_spikes=3)) == [3, 0]


def test_signed_by_hand(backend: Backend) -> None:
    fast = Signed(margin=1e-3)
    run = row([1, 1, -1, -1], signed=fast)
    assert spikes_of(run) == [1, 1, -1, -1]
    assert (run.count.item(), run.v.item()) == (0, 0.5)
    run = row([-2, 1, 1, 2], signed=fast)
    assert spikes_of(run) == [0, 0, 0, 1]
    assert run.v.item() == 1.5
    bif = Signed(high=4)
    run = row([-2, 1, 1, 2, 0], signed=bif)
    assert (run.count.item(), run.v.item()) == (2, 0.5)
    run = row([2.6, 0, 0, 0, 0], signed=bif)
    assert spikes_of(run) == [1, 1, 1, 0, 0]
    assert run.count.item() == 3
    assert run.v.item() == pytest.approx(0.1, abs=1e-6)


def test_parallel_by_hand(backend: Backend) -> None:
    assert spikes_of(row([1, 1, -1, -1], parallel=True)) == [0, 0, 0, 0]
    assert spikes_of(row([-2, 1, 1, 2], parallel=True)) == [1, 1, 0, 0]


@pytest.mark.parametrize("T", [1, 4, 8, 33])
def test_parallel_is_the_quantised_network(backend: Backend, T: int) -> None:
    """clip(floor(mean x * T / theta + 1/2), 0, T): QCFS with L = T, exact on dyadic data."""
    x = dyadic(T, 77, seed=T).float()
    run = if_run(moved(x, backend.device), 1.0, 2.0, outputs=("count", "spikes"), parallel=True)
    want = torch.floor((x.double().sum(0) + 1.0) / 2.0).clamp(0, T)
    assert torch.equal(run.count.cpu().double(), want)
    assert_same_bits(run.spikes.sum(0), run.count.float())
    # Spikes come first, then silence.
    assert bool((run.spikes.diff(dim=0) <= 0).all())


def test_fire_level_by_hand(backend: Backend) -> None:
    """DSR: v from 0, fires at theta/2, subtracts theta; OPI's spikes with v lower by theta/2."""
    run = row([0.4] * 4, v=0.0, fire_level=0.5)
    assert spikes_of(run) == [0, 1, 0, 1]
    assert run.v.item() == pytest.approx(-0.4, abs=1e-6)


def test_dsr_lif_by_hand(backend: Backend) -> None:
    """Vth 1, tau 1, dt 1/2, x = 2: v = beta v + (1 - beta) x, fires at 1/2."""
    beta = math.exp(-0.5)
    run = row([2.0] * 8, v=0.0, beta=beta, input_scale=1 - beta, fire_level=0.5, amplitude=2.0)
    assert spikes_of(run) == [2, 2, 2, 2, 2, 0, 2, 2]
    assert run.v.item() == pytest.approx(-0.1636968, abs=1e-6)


def test_bias_by_hand(backend: Backend) -> None:
    """Deng & Gu: theta/2T at every step; the same count as theta/2 at the start, later spikes."""
    spread = row([0.55] * 4, v=0.0, v_threshold=2.0, bias=0.25)
    ahead = row([0.55] * 4, v=1.0, v_threshold=2.0)
    assert spikes_of(spread) == [0, 0, 1, 0]
    assert spikes_of(ahead) == [0, 1, 0, 0]
    for made in (spread, ahead):
        assert made.v.item() == pytest.approx(1.2, abs=1e-6)


def test_mask_by_hand(backend: Backend) -> None:
    x = torch.full((3, 2), 0.75)
    for mask in (torch.tensor([True, False]), torch.tensor([7, 0], dtype=torch.uint8)):
        run = if_run(x, 0.5, outputs=("spikes", "count"), mask=mask)
        assert run.spikes[:, 0].tolist() == [1, 1, 0]
        assert not run.spikes[:, 1].any()
        assert run.count.tolist() == [2, 0]
        assert run.v[0] == run.v[1]


# ---- every back end against the reference --------------------------------------------------------

EXTRAS: dict[str, Any] = {
    "beta": {"beta": 0.9},
    "channels": {"beta": "channel", "bias": "channel", "fire_level": "full", "input_scale": 0.7},
    "everything": {"beta": "full", "bias": 0.1, "fire_level": "channel", "v_reset": -0.1},
    "strict": {"tie": ">", "fire_level": 0.75, "bias": "full"},
    "burst": {"max_spikes": 3},
    "burst leaky": {"max_spikes": 255, "beta": 0.75, "bias": 0.125},
    "clipped": {"v_min": -0.3},
    "clipped burst": {"v_min": -0.7, "max_spikes": 4, "beta": 0.9},
    "reset delay": {"reset_delay": True, "tie": ">"},
    "leaky reset delay": {
        "reset_delay": True,
        "beta": 0.75,
        "input_scale": 0.5,
        "fire_level": 1.25,
    },
    "burst hard": {"max_spikes": 2, "v_reset": -0.25},
    "signed": {"signed": Signed(margin=1e-3)},
    "st-bif": {"signed": Signed(-2, 3), "input_scale": 1.5},
    "signed leaky": {"signed": Signed(-100, None, 0.5), "beta": "channel"},
    "mask": {"mask": True},
    "masked burst": {"mask": True, "max_spikes": 2},
    "srp": {"probe": Probe(2)},
    "srp masked": {"probe": Probe(3, margin=0.25), "mask": True, "bias": 0.1},
    "srp leaky": {"probe": Probe(1, margin=0.0), "beta": 0.9, "tie": ">"},
    "cos": {"probe": Probe(3, "shift")},
    "cos twice": {"probe": Probe(4, "shift", iterations=2), "input_scale": "channel"},
    "cos leaky": {"probe": Probe(2, "shift", margin=0.1), "beta": 0.95},
    "parallel": {"parallel": True},
    "parallel scaled": {"parallel": True, "input_scale": 0.3, "bias": 0.05},
}
TRACELESS = ("parallel", "parallel scaled")


def arguments_of(extra: dict[str, Any], shape: tuple[int, ...], seed: int) -> dict[str, Any]:
    g = generator(seed)
    draw = lambda *s: 0.5 + torch.randint(0, 5, s, generator=g) / 8  # noqa: E731
    made: dict[str, Any] = {"channel_dim": 1}
    for name, value in extra.items():
        if name == "mask":
            value = torch.rand(shape, generator=g) < 0.7
        elif isinstance(value, str) and value == "channel":
            value = draw(shape[1])
        elif isinstance(value, str) and value == "full":
            value = draw(*shape)
        made[name] = value
    return made


def both(backend: Backend, x: Tensor, arguments: dict[str, Any]) -> tuple[Run, Run]:
    there = {k: moved(v, backend.device) for k, v in arguments.items()}
    got = if_run(moved(x, backend.device), **there)
    with use_backend("reference"):
        want = if_run(x.clone(memory_format=torch.contiguous_format), **arguments)
    return got, want


def same(got: Run, want: Run, label: str = "") -> None:
    for name, a, b in zip(Run._fields, got, want, strict=True):
        if a is None or b is None:
            assert a is b is None, f"{label} {name}"
        elif name == "packed":
            assert a.shape == b.shape
            assert torch.equal(a.words.cpu(), b.words), f"{label} {name}"
        else:
            assert_same_bits(a, b)


@pytest.mark.parametrize("name", EXTRAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_options_are_the_references(level: Backend, dtype: torch.dtype, name: str) -> None:
    r = random.Random(name)
    for shape, steps in itertools.product(((2, 3), (3, 5, 2, 4), (1, 129)), (5, 9, 16, 33, 40)):
        extra = EXTRAS[name]
        seed = r.randrange(1 << 30)
        x = currents(steps, *shape, seed=seed, dtype=dtype) * r.choice((1, 1, 3))
        if r.random() < 0.3:
            flat = x.reshape(-1)
            for value in (math.nan, math.inf, -math.inf, -0.0):
                flat[r.randrange(flat.numel())] = value
        arguments = arguments_of(extra, shape, seed)
        arguments["v"] = r.choice((0.0, 0.5, "half", -0.0))
        arguments["v_threshold"] = r.choice((1.0, 0.75, 1 + torch.arange(shape[1]) / 8))
        arguments["amplitude"] = r.choice((None, 0.3, "threshold"))
        traces = () if name in TRACELESS or r.random() < 0.3 else ("v_seq", "charge_seq")
        packed = () if {"max_spikes", "signed"} & set(extra) else ("packed",)
        arguments["outputs"] = ("spikes", *packed, "count", *traces)
        counted = steps - (
            extra["probe"].steps if name.startswith("srp") and "probe" in extra else 0
        )
        arguments["count_at"] = tuple(sorted(r.sample(range(1, counted + 1), min(3, counted))))
        if "signed" in extra and r.random() < 0.5:
            arguments["spike_dtype"] = torch.int8
        elif "signed" not in extra and r.random() < 0.3:
            arguments["spike_dtype"] = torch.uint8
        label = f"{name} {shape} T={steps} seed={seed}"
        same(*both(level, x, arguments), label)
        # A constant current.
        constant = {**arguments, "T": steps}
        same(*both(level, x[0], constant), label + " constant")


def test_counts_at_several_times_are_prefix_counts(level: Backend) -> None:
    x = moved(currents(70, 3, 50), level.device)
    at = (1, 2, 4, 8, 16, 31, 32, 33, 64, 70)
    run = if_run(x, "half", outputs="spikes", count_at=at)
    for t, counts in zip(at, run.counts, strict=True):
        assert_same_bits(counts, run.spikes[:t].sum(0).int())
    alone = if_run(x, "half", outputs=(), count_at=at)
    assert alone.spikes is None
    assert_same_bits(alone.counts, run.counts)


# ---- LIF -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
def test_lif_against_a_loop(level: Backend, dtype: torch.dtype) -> None:
    x = currents(40, 6, dtype=dtype)
    beta, gain, threshold = (torch.tensor(n, dtype=dtype) for n in (0.8, 0.6, 0.75))
    v = torch.full((6,), 0.25, dtype=dtype)
    want = []
    for current in x:
        m = beta * v + gain * current
        fired = m >= threshold
        v = torch.where(fired, m - threshold, m)
        want.append(fired.to(dtype))
    spikes, last = lif_multi_step(moved(x, level.device), 0.25, 0.8, 0.75, input_scale=float(gain))
    assert_same_bits(spikes, torch.stack(want))
    assert_same_bits(last, v)


def test_lif_without_leak_is_if(backend: Backend) -> None:
    x = moved(currents(12, 4, 5), backend.device)
    plain = if_run(x, "half", outputs=("spikes",))
    leaky = if_run(x, "half", outputs=("spikes",), beta=1.0)
    assert_same_bits(plain.spikes, leaky.spikes)
    assert_same_bits(plain.v, leaky.v)


def test_lif_node_carries_and_learns(backend: Backend) -> None:
    x = moved(currents(8, 3, 4), backend.device)
    node = LIFNode(0.75, v_init="half", learn_beta=True, learn_threshold=True).to(backend.device)
    whole = node(x)
    node.reset()
    assert_same_bits(torch.cat([node(x[:3]), node(x[3:])]), whole)
    node.reset()
    node(x).sum().backward()
    assert node.beta.grad is not None
    assert float(node.beta.grad.abs()) > 0
    assert set(node.state_dict()) == {"beta", "v_threshold", "_floor"}
    assert "beta=Tensor()" in repr(node)


# ---- what is refused -----------------------------------------------------------------------------

X = torch.zeros(4, 2, 3)

REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"max_spikes": 0}, ValueError, "max_spikes=0 is not in 1..16777216"),
    ({"max_spikes": 1.5}, TypeError, "max_spikes=1.5 must be an int"),
    ({"max_spikes": 2, "parallel": True}, ValueError, "max_spikes and parallel exclude"),
    (
        {"max_spikes": 256, "spike_dtype": torch.uint8},
        ValueError,
        "max_spikes=256 is not in 1..255",
    ),
    ({"signed": Signed(), "v_reset": 0.0}, ValueError, "signed cannot be combined with v_reset"),
    ({"max_spikes": 2, "tie": ">"}, ValueError, "max_spikes cannot be combined with tie='>'"),
    ({"signed": Signed(), "fire_level": 0.5}, ValueError, "signed cannot be combined with fire_l"),
    ({"signed": True}, TypeError, "signed=True must be a snnkernels.options.Signed"),
    ({"signed": Signed(2, 1)}, ValueError, "signed.high=1 is below signed.low=2"),
    ({"signed": Signed(margin=-1)}, ValueError, "signed.margin=-1 must be at least 0"),
    ({"signed": Signed(), "spike_dtype": torch.uint8}, ValueError, "use torch.int8"),
    ({"spike_dtype": torch.int8}, ValueError, "spike_dtype=torch.int8 is not offered"),
    ({"parallel": True, "beta": 0.5}, ValueError, "parallel cannot be combined with beta"),
    (
        {"parallel": True, "reset_delay": True},
        ValueError,
        "reset_delay cannot be combined with par",
    ),
    ({"parallel": True, "outputs": "v_seq"}, ValueError, "parallel neurons have no traces"),
    ({"parallel": True, "probe": Probe(2)}, ValueError, "parallel cannot be combined with probe"),
    ({"probe": 3}, TypeError, "probe=3 must be a snnkernels.options.Probe"),
    ({"probe": Probe(4)}, ValueError, "probe.steps=4 must be fewer than the 4 steps"),
    ({"count_at": 3}, TypeError, "count_at=3 must be a sequence of ints"),
    ({"outputs": None}, TypeError, "outputs=None must be a sequence of names"),
    ({"probe": Probe(5, "shift")}, ValueError, "probe.steps=5 must be at most the 4 steps"),
    ({"probe": Probe(0)}, ValueError, "probe.steps=0 must be at least 1"),
    ({"probe": Probe(2, "srp")}, ValueError, "probe.kind='srp' is unknown"),
    ({"probe": Probe(2, iterations=2)}, ValueError, "probe.iterations=2 is for kind='shift'"),
    ({"probe": Probe(2, margin=math.nan)}, ValueError, "probe.margin=nan must be at least 0"),
    ({"mask": [1, 0]}, TypeError, "mask must be a tensor of torch.bool or torch.uint8"),
    ({"mask": torch.ones(5, dtype=torch.bool)}, ValueError, "mask of shape"),
    ({"beta": "0.9"}, TypeError, "beta='0.9'"),
    ({"bias": math.nan}, ValueError, "bias is NaN"),
    ({"fire_level": torch.ones(4)}, ValueError, "fire_level of shape"),
    ({"outputs": "spike"}, ValueError, "'spike' is unknown"),
    ({"outputs": ("rate", "spikes")}, ValueError, "'rate' and 'spikes' exclude each other"),
    ({"count_at": (0,)}, ValueError, "0 is not in 1..4"),
    ({"count_at": (2, 1)}, ValueError, "must ascend"),
    ({"count_at": (1.0,)}, TypeError, "must hold ints"),
    ({"count_at": (3,), "probe": Probe(2)}, ValueError, "3 is not in 1..2"),
]


@pytest.mark.parametrize(("arguments", "error", "says"), REFUSED, ids=lambda v: str(v)[:60])
def test_bad_options(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        if_run(X, **arguments)


def test_seventeen_times_are_too_many() -> None:
    with pytest.raises(ValueError, match="at most 16"):
        if_run(torch.zeros(20, 2), count_at=tuple(range(1, 18)))


@pytest.mark.parametrize(
    "extra",
    [{"signed": Signed()}, {"parallel": True}, {"probe": Probe(2)}, {"probe": Probe(2, "shift")},
     {"mask": torch.ones(2, 3, dtype=torch.bool)}],
    ids=str,
)  # fmt: skip
def test_inference_options_refuse_gradients(extra: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="are for inference"):
        if_run(X.clone().requires_grad_(), **extra)
    with torch.no_grad():
        if_run(X.clone().requires_grad_(), **extra)


@pytest.mark.parametrize(
    "extra",
    [{"tie": ">"}, {"v_reset": 0.0}, {"input_scale": 0.5}, {"detach_reset": True}, {"beta": 0.5},
     {"bias": 0.25}, {"fire_level": 0.5}, {"max_spikes": 3}, {"v_min": -0.5},
     {"reset_delay": True, "detach_reset": True}],
    ids=str,
)  # fmt: skip
def test_all_other_options_have_gradients(extra: dict[str, Any]) -> None:
    x = currents(4, 2, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(if_run(x, 0.25, **extra).spikes.sum(), x)
    assert bool(gradient.any())


@pytest.mark.parametrize("beta", [-0.1, 1.5, torch.tensor([0.5, 2.0])], ids=str)
def test_beta_of_a_node_is_a_fraction(beta: Any) -> None:
    with pytest.raises(ValueError, match="beta"):
        LIFNode(beta)


# ---- gradients of what has them ------------------------------------------------------------------

OPERANDS = ("v", "threshold", "amplitude", "input_scale", "beta", "bias", "fire_level")
LEAKY = params.INPUT_SCALE | params.BETA | params.BIAS | params.FIRE_LEVEL


class _Smooth(torch.autograd.Function):
    """Both operators with the surrogate's primitive in place of the spike, every operand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Any:
        operands, (T, options, kind, detach) = rest[:-1], rest[-1]
        neuron = Neuron(*operands, options=options, v_reset=-0.125, spike_dtype=torch.float64)
        made = run.if_forward(x, T, neuron, Asked(v_seq=True, charge_seq=True), kind, 1.5, 0.75)
        ctx.save_for_backward(x, *operands)
        ctx.c = (T, neuron.with_tensors([None] * 7), kind, detach)
        return made.spikes, made.v, made.v_seq, made.charge_seq

    @staticmethod
    def backward(ctx: Any, g_s: Tensor, g_v: Tensor, g_seq: Tensor, g_charge: Tensor) -> Any:  # type: ignore[override]
        T, neuron, kind, detach = ctx.c
        x, *operands = ctx.saved_tensors
        saved = Saved(x, None, None, None, T is not None, len(x) if T is None else T, x.dtype)
        grads = backward.if_backward(
            saved, neuron.with_tensors(operands), Grads(g_s, False, g_v, g_seq, g_charge), kind,
            1.5, 0.75, detach, True, [True] * 8,
        )  # fmt: skip
        return (*grads, None)


@pytest.mark.parametrize("T", [1, 2, 5, 19])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("constant", [False, True])
def test_gradcheck_of_every_operand(kernel: Backend, T: int, hard: bool, constant: bool) -> None:
    g = generator(T)
    options = LEAKY | (params.HARD_RESET if hard else 0)
    x = torch.rand((2, 3) if constant else (T, 2, 3), generator=g, dtype=torch.float64)
    sizes = ((2, 3), (3,), (1,), (2, 1), (2, 3), (3,), (2, 3))
    drawn = [0.2 + 0.7 * torch.rand(s, generator=g, dtype=torch.float64) for s in sizes]
    leaves = [t.to(kernel.device).requires_grad_() for t in (x, *drawn)]
    for kind, more in ((0, 0), (1, 0), (6, 0), (1, params.BURST)):
        how = (T if constant else None, options | more, kind, False)
        call = lambda *a, how=how: _Smooth.apply(*a, how)  # noqa: E731
        assert torch.autograd.gradcheck(call, leaves, fast_mode=T > 5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("names", [("beta",), ("bias",), ("fire_level",), OPERANDS[3:]], ids=str)
@pytest.mark.parametrize("detach", [False, True])
def test_gradients_are_autograds(
    level: Backend, dtype: torch.dtype, names: tuple[str, ...], detach: bool
) -> None:
    """Through the kernels against autograd through the reference."""
    state = torch.float64 if dtype == torch.float64 else torch.float32
    g = generator(len(names))
    x = currents(23, 2, 5, 7, seed=1, dtype=dtype)
    weights = currents(23, 2, 5, 7, seed=2, dtype=state)
    forms = {"v": (2, 5, 7), "v_threshold": (5,), "amplitude": (), "beta": (5,), "bias": (5, 7)}
    found = []
    for where in (level.device, "reference"):
        device = "cpu" if where == "reference" else where
        leaves = {"x_seq": moved(x, device).requires_grad_()}
        g.manual_seed(7)
        for name in ("v", "v_threshold", "amplitude", *names):
            size = forms.get(name, (5,))
            value = 0.5 + 0.4 * torch.rand(size, generator=g, dtype=torch.float64)
            leaves[name] = value.to(state).to(device).requires_grad_()
        x_leaf, others = leaves["x_seq"], {k: t for k, t in leaves.items() if k != "x_seq"}
        given = {"channel_dim": 1, "detach_reset": detach, "outputs": ("spikes", "v_seq")}
        if where == "reference":
            with use_backend("reference"):
                made = if_run(x_leaf, **others, **given)
        else:
            made = if_run(x_leaf, **others, **given)
        w = weights.to(device)
        loss = (made.spikes.to(state) * w).sum() + (made.v_seq * w.flip(0)).sum()
        found.append(torch.autograd.grad(loss, list(leaves.values())))
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    for name, a, b in zip(leaves, *found, strict=True):
        assert_close(a, b, rtol, name)


BURSTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("exponential", {"max_spikes": 3}),
    ("periodic_exponential", {"max_spikes": 2**24, "bias": 0.25}),
    ("superspike", {"max_spikes": 2, "beta": 0.75, "input_scale": 1.5}),
    ("atan", {"max_spikes": 2, "v_reset": -0.25, "detach_reset": True}),
    ("erf", {"beta": 0.5}),
    ("superspike", {"v_reset": 0.125}),
    ("exponential", {"v_min": -0.3, "max_spikes": 3}),
    ("atan", {"v_min": -0.1, "v_reset": -0.25, "beta": 0.75}),
    ("sigmoid", {"reset_delay": True, "detach_reset": True, "tie": ">"}),
    ("erf", {"reset_delay": True, "detach_reset": True, "beta": 0.75}),
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize(("name", "given"), BURSTS, ids=str)
def test_gradients_of_bursts_are_autograds(
    level: Backend, dtype: torch.dtype, name: str, given: dict[str, Any]
) -> None:
    """Through the kernels against autograd through the reference, over chunks and rates too."""
    state = torch.float64 if dtype == torch.float64 else torch.float32
    x, start = currents(70, 2, 5, 7, seed=1, dtype=dtype), currents(2, 5, 7, seed=3, dtype=state)
    threshold = 0.5 + torch.arange(5, dtype=state) / 8
    slopes = surrogate.BY_NAME[name](scale=0.5)
    weights = currents(70, 2, 5, 7, seed=2, dtype=state)
    found = []
    for where in (level.name, "reference"):
        device = "cpu" if where == "reference" else level.device
        leaves = [moved(t, device).requires_grad_() for t in (x, start / 4, threshold)]
        amplitude = torch.full((), 0.75, dtype=state, device=device, requires_grad=True)
        call = {"amplitude": amplitude, "channel_dim": 1, "surrogate_function": slopes, **given}
        with use_backend(where) if where == "reference" else nullcontext():
            made = if_run(*leaves, **call, outputs=("spikes", "v_seq"))
            rate = if_run(*leaves, **call, outputs="rate")
        w = weights.to(device)
        loss = (made.spikes.to(state) * w).sum() + (made.v_seq * w.flip(0)).sum()
        loss = loss + (rate.rate.to(state) * w[0]).sum() + rate.v.sum()
        grads = torch.autograd.grad(loss, [*leaves, amplitude])
        found.append((made.spikes.detach(), *grads))
    assert_same_bits(found[0][0], found[1][0])
    if given.get("max_spikes", 1) > 1:
        assert found[0][0].max() > 1
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    for leaf, a, b in zip(
        ("x", "v", "threshold", "amplitude"), *(f[1:] for f in found), strict=True
    ):
        assert_close(a, b, rtol, leaf)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("v_reset", [None, -0.25])
def test_gradients_of_a_burst_by_hand(
    backend: Backend, detach: bool, v_reset: float | None
) -> None:
    if v_reset is not None and not detach:
        pytest.skip("refused, see below")
    T, cap, amplitude = 12, 3, 0.75
    x = dyadic(T, 1, seed=5) * 2
    threshold, v0 = 0.75, 0.25
    g = dyadic(T, 1, seed=6).flatten().tolist()
    leaf = moved(x, backend.device).requires_grad_()
    v = torch.full((1,), v0, dtype=torch.float64, device=backend.device, requires_grad=True)
    th = torch.full((1,), threshold, dtype=torch.float64, device=v.device, requires_grad=True)
    am = torch.full((1,), amplitude, dtype=torch.float64, device=v.device, requires_grad=True)
    made = if_run(
        leaf, v, th, v_reset, "exponential", detach, amplitude=am, max_spikes=cap
    )  # fmt: skip
    loss = (made.spikes.flatten() * torch.tensor(g, dtype=torch.float64, device=v.device)).sum()
    loss = loss + 2 * made.v.sum()
    got = torch.autograd.grad(loss, (leaf, v, th, am))
    charges, counts, membrane = [], [], v0
    for current in x.flatten().tolist():
        m = membrane + current
        k = min(max(math.floor(m / threshold), 0), cap)
        membrane = v_reset if v_reset is not None and k else m - k * threshold
        charges.append(m)
        counts.append(k)
    assert made.spikes.flatten().tolist() == [k * amplitude for k in counts]
    assert max(counts) == cap
    carry, of_x, of_threshold, of_amplitude = 2.0, [0.0] * T, 0.0, 0.0
    for t in reversed(range(T)):
        m, k = charges[t], counts[t]
        slope = 0.5 * math.exp(-abs(m - threshold))
        of_amplitude += k * g[t]
        through = amplitude * g[t]
        if v_reset is None:
            through -= 0 if detach else carry * threshold
            of_threshold -= carry * k
        of_threshold -= through * slope
        carry = through * slope + (0.0 if v_reset is not None and k else carry)
        of_x[t] = carry
    want = (of_x, [carry], [of_threshold], [of_amplitude])
    for a, b in zip(got, want, strict=True):
        assert_close(a.flatten(), torch.tensor(b, dtype=torch.float64), 1e-12)


def test_reset_delay_by_hand(backend: Backend) -> None:
    """snnTorch: m = beta m + x, minus the threshold where the membrane before has fired."""
    x = moved(torch.tensor([[1.5], [0.25], [0.75], [3.0], [0.0]]), backend.device)
    run = if_run(
        x, v_threshold=1.0, tie=">", beta=0.5, reset_delay=True, outputs=("spikes", "v_seq")
    )
    # 1.5; 0.75 + 0.25 - 1 = 0; 0.75; 0.375 + 3; 1.6875 - 1
    assert run.v_seq is not None
    assert run.v_seq.flatten().tolist() == [1.5, 0.0, 0.75, 3.375, 0.6875]
    assert spikes_of(run) == [1, 0, 0, 1, 0]
    assert run.v.item() == 0.6875
    # A membrane that has fired is reset in the next call.
    again = if_run(x[:1], run.v_seq[3], tie=">", beta=0.5, reset_delay=True)
    assert again.v.item() == 3.375 / 2 + 1.5 - 1


def test_clipping_by_hand(backend: Backend) -> None:
    x = moved(torch.tensor([[-3.0], [0.75], [1.0], [-0.3]]), backend.device)
    run = if_run(x, v_min=-0.5, outputs=("spikes", "v_seq"))
    assert run.v_seq is not None
    # The roundings of Sinabs' two operations: -0.05 + 0.5 - 0.5 is not -0.05.
    want = [-0.5, 0.25, 0.25, (torch.tensor(0.25 - 0.3) + 0.5 - 0.5).item()]
    assert run.v_seq.flatten().tolist() == pytest.approx(want, abs=1e-7)
    assert spikes_of(run) == [0, 0, 1, 0]
    for more, name in (({"parallel": True}, "parallel"), ({"signed": Signed()}, "signed")):
        with pytest.raises(ValueError, match=f"v_min cannot be combined with {name}"):
            if_run(X, v_min=0.0, **more)
    with pytest.raises(ValueError, match="v_min=-inf must be finite"):
        if_run(X, v_min=-math.inf)


def test_reset_delay_has_no_gradient_through_the_reset() -> None:
    x = X.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"reset_delay has no gradient.*detach_reset=True"):
        if_run(x, reset_delay=True)
    for more, name in (({"v_reset": 0.0}, "v_reset"), ({"max_spikes": 2}, "max_spikes")):
        with pytest.raises(ValueError, match=f"reset_delay cannot be combined with {name}"):
            if_run(X, reset_delay=True, **more)


def test_a_burst_that_resets_to_a_value_has_no_gradient_through_it() -> None:
    x = X.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"max_spikes with v_reset.*use detach_reset=True"):
        if_run(x, v_reset=0.0, max_spikes=2)
    if_run(x, v_reset=0.0, max_spikes=2, detach_reset=True).spikes.sum().backward()


def test_surrogates_of_the_general_kernel_cannot_be_saved_for() -> None:
    x = X.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"save='trace' is for 'atan'.* not SuperSpike"):
        if_run(x, surrogate_function="superspike", save="trace")
    with pytest.raises(ValueError, match=r"not Rectangle\(alpha=1.0, scale=2.0\)"):
        if_run(x, surrogate_function=surrogate.Rectangle(scale=2.0), save="bits")


def test_double_backward_of_a_burst(backend: Backend) -> None:
    x = torch.rand(6, 4, generator=generator(3), dtype=torch.float64) * 1.5
    x = moved(x, backend.device).requires_grad_()
    how: dict[str, Any] = {"max_spikes": 3, "surrogate_function": surrogate.Erf(1.0, scale=0.5)}
    spikes = if_run(x, **how).spikes
    (g,) = torch.autograd.grad(spikes.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(g.square().sum(), x)
    assert torch.isfinite(second).all()
    assert second.any()
    # With the reset detached the gradient is smooth in x while no count changes: no surrogate
    # stands between it and differences.
    how["detach_reset"] = True
    (g,) = torch.autograd.grad(if_run(x, **how).spikes.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(g.square().sum(), x)
    step = 1e-6 * torch.ones_like(x)
    sums = [
        torch.autograd.grad(if_run(z, **how).spikes.sum(), z)[0].square().sum()
        for z in ((x + s * step).detach().requires_grad_() for s in (1, -1))
    ]
    assert_close(((sums[0] - sums[1]) / 2e-6).reshape(1), second.sum().reshape(1), 1e-6)


def test_double_backward_of_a_leaky_neuron(backend: Backend) -> None:
    x = moved(currents(6, 4, dtype=torch.float64), backend.device).requires_grad_()
    beta = torch.full((4,), 0.8, dtype=torch.float64, device=backend.device, requires_grad=True)
    run_ = if_run(x, "half", beta=beta, surrogate_function="sigmoid")
    (g,) = torch.autograd.grad(run_.spikes.sum(), x, create_graph=True)
    second = torch.autograd.grad(g.square().sum(), (x, beta))
    assert all(torch.isfinite(t).all() and t.any() for t in second)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (Signed(low=1.0), TypeError, r"signed\.low=1\.0 must be an int"),  # type: ignore[arg-type]
        (Signed(high=True), TypeError, r"signed\.high=True must be an int"),
        (Signed(low=-(2**31)), ValueError, r"signed\.low=-2147483648 does not fit 32 bits"),
        (Signed(high=2**31), ValueError, r"signed\.high=2147483648 does not fit 32 bits"),
        (Signed(low=2, high=1), ValueError, r"signed\.high=1 is below signed\.low=2"),
        (Signed(margin="1"), TypeError, r"signed\.margin='1' must be a number"),  # type: ignore[arg-type]
        (Signed(margin=float("nan")), ValueError, r"signed\.margin=nan must be at least 0 and fin"),
        (Probe(1, "look"), ValueError, r"probe\.kind='look' is unknown; allowed are 'mask' and"),
        (Probe(1.0), TypeError, r"probe\.steps=1\.0 must be an int"),  # type: ignore[arg-type]
        (Probe(0), ValueError, r"probe\.steps=0 must be at least 1"),
        (Probe(1, "shift", iterations=True), TypeError, r"probe\.iterations=True must be an int"),
        (Probe(1, iterations=2), ValueError, r"probe\.iterations=2 is for kind='shift'"),
        (Probe(1, margin=True), TypeError, r"probe\.margin=True must be a number"),
        (Probe(1, margin=-1.0), ValueError, r"probe\.margin=-1\.0 must be at least 0"),
    ],
)
def test_fields_of_options(given: Any, error: type[Exception], words: str) -> None:
    for call in (
        given.check,
        lambda: if_run(torch.ones(4, 3), **{type(given).__name__.lower(): given}),
    ):
        with pytest.raises(error, match=words):
            call()
