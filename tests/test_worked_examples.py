"""The worked examples of the method specification (methods.md), one after another, by section.

The numbers are that document's; neurons run on every back end. What else is true of a method is
tested in the file of its name.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from support import Backend
from torch import Tensor, nn

from snnkernels import convert, functional, maps
from snnkernels.conversion import datta_search
from snnkernels.conversion.correction import potential_error
from snnkernels.conversion.dsr import DSRNode, representation
from snnkernels.conversion.methods import (
    COS,
    LTB,
    SRP,
    STBIF,
    TTFS,
    BitSerial,
    Burst,
    FastSNN,
    ThresholdReLUMethod,
)
from snnkernels.conversion.ops import Activation
from snnkernels.conversion.tandem import hybrid_spikes
from snnkernels.conversion.thresholds import Site
from snnkernels.functional import if_run


def run(device: str, x: list[float] | float, T: int | None = None, **options: Any) -> Any:
    """One neuron on float32 currents, a list or one for all T steps: everything it does."""
    given = torch.tensor(x, device=device)
    given = given[:, None] if T is None else given.expand(T, 1)
    outputs = ("spikes", "count") if options.get("parallel") else ("spikes", "count", "v_seq")
    return if_run(given, outputs=outputs, **options)


def plain(values: Tensor) -> list[Any]:
    return values.flatten().tolist()


def wire(layers: int = 1) -> nn.Sequential:
    """The current is the input, the answer what the (last) neuron says."""
    net = nn.Sequential()
    for _ in range(layers):
        net.append(nn.Linear(1, 1, bias=False)).append(nn.ReLU())
        nn.init.ones_(net[-2].weight)
    return net.eval()


def site(theta: float) -> Site:
    """What a method is told about a neuron of threshold ``theta``."""
    relu = Activation(nn.ReLU(), "relu")
    return Site("relu", relu, "learned", "half", False, theta=torch.tensor(theta))


# ---- 0.3 -----------------------------------------------------------------------------------------


def test_0_3_staircase_of_a_constant_input(backend: Backend) -> None:
    """methods.md 0.3: 4,000 dyadic cases, N = clip(floor((Tz + v0) / θ), 0, T), none amiss."""
    draw = random.Random(0)
    for T in (1, 2, 3, 5, 8, 13, 16, 32):
        theta = [draw.randint(1, 64) / 16 for _ in range(500)]
        start = [draw.randrange(int(16 * th)) / 16 for th in theta]
        z = [draw.randint(-32, 96) / 16 for _ in theta]
        given = [torch.tensor(v, device=backend.device) for v in (z, start, theta)]
        count = functional.if_count(given[0], given[1], given[2], T=T)[0]
        N = [
            min(max(math.floor((T * a + v) / th), 0), T)
            for a, v, th in zip(z, start, theta, strict=True)
        ]
        assert count.tolist() == N


def test_0_3_counts_in_any_order_are_within_their_bounds(backend: Backend) -> None:
    """methods.md 0.3: 40,000 dyadic currents in any order, none outside; θ = 1.

    That snn.certify keeps to these bounds is tested in test_certify.py.
    """
    g = torch.Generator().manual_seed(0)
    for T in (1, 2, 4, 8):
        x = torch.randint(-32, 33, (T, 10_000), generator=g) / 16
        v = torch.randint(0, 16, (10_000,), generator=g) / 16
        N = functional.if_count(x.to(backend.device), v.to(backend.device))[0].cpu()
        E = (x - 1).clamp(min=0).sum(0)
        low = (x.sum(0) + v - E).floor().clamp(0, T)
        high = (x.clamp(min=0).sum(0) + v).floor().clamp(0, T)
        assert bool((low <= N).all())
        assert bool((high >= N).all())
        # One spike too many takes a negative current, one too few a current above θ.
        fair = (x.sum(0) + v).floor().clamp(0, T)
        assert bool((x < 0).any(0)[fair < N].all())
        assert bool((x > 1).any(0)[fair > N].all())
        assert T == 1 or bool((fair != N).any())


def test_0_3_precision_decides_ties(backend: Backend) -> None:
    """methods.md 0.3: five steps of 0.1 from 0.5: float32 fires at the fifth, float64 does not."""
    single = run(backend.device, 0.1, 5, v=0.5)
    assert plain(single.spikes) == [0, 0, 0, 0, 1]
    assert single.v.item() == pytest.approx(1.19e-7, rel=0.01)
    x = torch.full((5, 1), 0.1, dtype=torch.float64, device=backend.device)
    double = if_run(x, 0.5, outputs=("spikes",))
    assert plain(double.spikes) == [0, 0, 0, 0, 0]
    assert double.v.item() == 0.9999999999999999


def test_0_3_dividing_by_the_threshold_first_counts_otherwise(backend: Backend) -> None:
    """methods.md 0.3: on boundaries x against θ and x/θ against 1 differ often, by one at most.

    How often depends on the draw (628 of 2,000 there), that they differ does not.
    """
    g = torch.Generator().manual_seed(0)
    theta = 0.5 + 3 * torch.rand(2000, generator=g)
    k = torch.randint(0, 8, (2000,), generator=g)
    x = (theta * (k + 0.5) / 8).to(backend.device)  # from θ/2 the sums of 8 steps end on k + 1
    theta = theta.to(backend.device)
    raw = functional.if_count(x, "half", theta, T=8)[0]
    over = functional.if_count(x / theta, "half", 1.0, T=8)[0]
    assert 100 < int((raw != over).sum()) < 1900
    assert int((raw - over).abs().max()) == 1


# ---- 1, OPI --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("c", "mean", "square"),
    [(0, -0.0625, 0.0052083), (0.25, -0.03125, 0.0022786), (0.5, 0, 0.0013021),
     (0.75, 0.03125, 0.0022786)],
)  # fmt: skip
def test_1_1_errors_of_one_layer(c: float, mean: float, square: float, backend: Backend) -> None:
    """methods.md 1.1: T = 8, θ = 1, z uniform: mean and mean square of the error for c = v0/θ."""
    n = 2**14
    z = (torch.arange(n, device=backend.device) + 0.5) / n
    error = functional.if_count(z, c, T=8)[0].double() / 8 - z.double()
    assert error.mean().item() == pytest.approx(mean, abs=1e-6)
    assert error.square().mean().item() == pytest.approx(square, abs=1e-6)


def test_1_2_equivalent_offsets(backend: Backend) -> None:
    """methods.md 1.2: x = 0.3125, T = 8, c = 1/2: at once, spread over the steps, as fire level."""
    front = run(backend.device, 0.3125, 8, v=0.5)
    assert plain(front.spikes) == [0, 1, 0, 0, 1, 0, 0, 1]
    spread = run(backend.device, 0.3125, 8, bias=0.5 / 8)
    assert plain(spread.spikes) == [0, 0, 1, 0, 0, 1, 0, 1]
    assert spread.v.item() == front.v.item()
    level = run(backend.device, 0.3125, 8, fire_level=0.5)  # θ subtracted
    assert plain(level.spikes) == plain(front.spikes)
    assert level.v.item() == front.v.item() - 0.5


def test_1_6_opi(backend: Backend) -> None:
    """methods.md 1.6: x = 0.3125 at T = 8 from 0 and from θ/2, and by the method's own name."""
    zero, half = (run(backend.device, 0.3125, 8, v=v) for v in (0.0, 0.5))
    assert (plain(zero.spikes), zero.v.item()) == ([0, 0, 0, 1, 0, 0, 1, 0], 0.5)
    assert (plain(half.spikes), half.v.item()) == ([0, 1, 0, 0, 1, 0, 0, 1], 0.0)
    with torch.no_grad():
        for v_init, N in (("zero", 2), (None, 3)):
            snn = convert(wire(), method="opi", threshold=1.0, v_init=v_init, T=8)
            assert snn(torch.tensor([[0.3125]])).item() == N / 8


@pytest.mark.parametrize(
    ("x", "tie", "spikes", "v"),
    [
        (1.25, ">=", [1, 1, 1, 1], [0.75, 1, 1.25, 1.5]),
        (-0.25, ">=", [0, 0, 0, 0], [0.25, 0, -0.25, -0.5]),
        (0.125, ">=", [0, 0, 0, 1], [0.625, 0.75, 0.875, 0]),
        (0.125, ">", [0, 0, 0, 0], [0.625, 0.75, 0.875, 1]),
    ],
)
def test_1_6_edges(x: float, tie: str, spikes: list[int], v: list[float], backend: Backend) -> None:
    """methods.md 1.6, edge cases: above θ, below 0, and the tie, T = 4 from 1/2."""
    found = run(backend.device, x, 4, v=0.5, tie=tie)
    assert (plain(found.spikes), plain(found.v_seq)) == (spikes, v)


# ---- 2, QCFS -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("z", "answer"),
    [(-0.3, 0), (0.2, 0), (0.25, 0.5), (0.9, 1), (1.74, 1.5), (1.75, 2), (2.5, 2)],
)
def test_2_4_qcfs(z: float, answer: float, backend: Backend) -> None:
    """methods.md 2.4: θ = λ = 2, L = T = 4: the activation and the spikes, the tie rounding up."""
    given = torch.tensor([z], device=backend.device)
    assert maps.qcfs(given, 2.0, 4).item() == answer
    assert functional.if_rate(given, "half", 2.0, T=4, amplitude=2.0)[0].item() == answer


def test_2_4_a_figure_not_to_be_tested_against(backend: Backend) -> None:
    """methods.md 2.4: weight 1.5, spikes at t = 1, 3, 4 end at 1.5 (0 in a draft), 3, 4 at 1."""
    assert run(backend.device, [1.5, 0, 1.5, 1.5]).v.item() == 1.5
    assert run(backend.device, [0.0, 0, 1.5, 1.5]).v.item() == 1.0


# ---- 3, COS --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "iterations", "before", "after", "v", "spikes"),
    [
        ([1, 1, -1, -1], 1, 2, 1, None, [0, 1, 0, 0]),
        ([1, 1, -1, -1], 2, 2, 0, None, [0, 0, 0, 0]),
        ([-2, 1, 1, 2], 1, 1, 2, None, [0, 0, 1, 1]),
        ([-3, 0.25, 0.25, 4], 1, 1, 2, None, [0, 0, 1, 1]),
        ([0.3] * 4, 1, 1, 1, 0.7, [0, 1, 0, 0]),
        ([1.5] * 4, 1, 4, 4, 2.5, [1, 1, 1, 1]),  # the edge: all steps, nothing moves
    ],
)
def test_3_5_cos(
    x: list[float], iterations: int, before: int, after: int, v: float | None, spikes: list[int],
    backend: Backend,
) -> None:  # fmt: skip
    """methods.md 3.5: θ = 1, ρ = T = 4; the second iteration; a neuron that always fires."""
    x = [float(value) for value in x]
    assert run(backend.device, x, v=0.5).count.item() == before
    method = COS(probe=4, iterations=iterations).neuron(site(1.0), 4)
    found = run(backend.device, x, v=0.5, **method)
    assert (plain(found.spikes), found.count.item()) == (spikes, after)
    if v is not None:
        assert found.v.item() == pytest.approx(v, abs=1e-6)


@pytest.mark.parametrize(
    ("x", "start"),
    [([1, 1, -1, -1], -0.5), ([-2, 1, 1, 2], 1.5), ([-3, 0.25, 0.25, 4], 3.501), ([0.3] * 4, 0.5)],
)
def test_3_5_where_the_membrane_starts(x: list[float], start: float, backend: Backend) -> None:
    """methods.md 3.5: shifts of -1, +1, +3.001 and 0, seen in the membrane at the end."""
    found = run(backend.device, [float(value) for value in x], v=0.5, **COS().neuron(site(1.0), 4))
    assert found.v.item() == pytest.approx(start + sum(x) - found.count.item(), abs=2e-6)


# ---- 4, SRP --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "v", "mask"),
    [([1, 1, -1, -1], -1.5, 0), ([0.3] * 4, 0.7, 1), ([-0.2] * 4, -0.3, 0), ([0.125] * 4, 0, 0)],
)
def test_4_3_srp(x: list[float], v: float, mask: int, backend: Backend) -> None:
    """methods.md 4.3: θ = 1, τ = 4: who stays silent, the false silencing of 0.125 included."""
    x = [float(value) for value in x]
    alone = run(backend.device, x, v=0.5)
    assert alone.v.item() == pytest.approx(v, abs=1e-6)
    found = run(backend.device, [*x, *x], v=0.5, **SRP(probe=4).neuron(site(1.0), 4))
    assert plain(found.spikes)[4:] == [mask * s for s in plain(alone.spikes)]
    assert found.count.item() == mask * alone.count.item()
    if x == [0.125] * 4:  # what QCFS says of it
        assert maps.qcfs(torch.tensor([0.125]), 1.0, 4).item() == 0.25
        assert alone.count.item() == 1


# ---- 5, DSR --------------------------------------------------------------------------------------


def test_5_5_dsr_if(backend: Backend) -> None:
    """methods.md 5.5: IF, θ = 1, α = 1/2, x = 0.4: the spikes of OPI, a membrane 1/2 lower."""
    x = torch.full((4, 1), 0.4, device=backend.device)
    assert plain(DSRNode(1.0).to(backend.device)(x)) == [0, 1, 0, 1]
    own = run(backend.device, 0.4, 4, fire_level=0.5)
    assert (plain(own.spikes), own.v.item()) == ([0, 1, 0, 1], pytest.approx(-0.4, abs=1e-6))
    opi = run(backend.device, 0.4, 4, v=0.5)
    assert (plain(opi.spikes), opi.v.item()) == ([0, 1, 0, 1], pytest.approx(0.1, abs=1e-6))


@pytest.mark.parametrize(("mean", "dx", "dtheta"), [(0.4, 2.5, 0.0), (1.2, 0.0, 10.0)])
def test_5_5_dsr_gradients(mean: float, dx: float, dtheta: float, backend: Backend) -> None:
    """methods.md 5.5: g = 1, 2, 3, 4."""
    x = torch.full((4, 1), mean, device=backend.device, requires_grad=True)
    node = DSRNode(1.0).to(backend.device)
    node(x).backward(torch.tensor([1.0, 2, 3, 4], device=backend.device)[:, None])
    assert x.grad is not None
    assert node.v_threshold.grad is not None
    assert (plain(x.grad), node.v_threshold.grad.item()) == ([dx] * 4, dtheta)


def test_5_5_dsr_lif(backend: Backend) -> None:
    """methods.md 5.5: LIF, θ = τ = 1, dt = α = 1/2, T = 8, x = 2."""
    x = torch.full((8, 1), 2.0, dtype=torch.float64, device=backend.device)
    spikes = DSRNode(1.0, "lif", alpha=0.5, tau=1.0, dt=0.5).double().to(backend.device)(x)
    assert plain(spikes) == [2, 2, 2, 2, 2, 0, 2, 2]
    leak = {"beta": math.exp(-0.5), "input_scale": -math.expm1(-0.5)}
    assert if_run(x, fire_level=0.5, **leak).v.item() == pytest.approx(-0.1636968, abs=1e-7)
    assert representation(spikes, "lif", 1.0, 0.5).item() == pytest.approx(1.7051002, abs=1e-7)
    assert representation(x, "lif", 1.0, 0.5).item() == pytest.approx(2.0, abs=1e-12)


# ---- 6, Datta and Beerel -------------------------------------------------------------------------


def test_6_4_datta() -> None:
    """methods.md 6.4: T = 2, mu = 1, percentiles every 10: what each objective chooses."""
    d = torch.tensor([0.02, 0.05, 0.08, 0.1, 0.15, 0.2, 0.3, 0.45, 0.7, 1.2], dtype=torch.float64)

    def losses(alpha: float, beta: float) -> tuple[float, float]:
        y = beta * alpha * torch.floor(2 * d / alpha).clamp(0, 2) / 2
        e = d.clamp(0, 1) - y
        return e.sum().abs().item(), e.square().mean().item()

    assert losses(1, 1) == (pytest.approx(1.55), pytest.approx(0.04143, abs=5e-6))
    by_sum = datta_search(d, 1.0, 2, "abs_sum", range(0, 101, 10))
    assert (by_sum.alpha, by_sum.beta, by_sum.loss) == (0.5, 2.0, pytest.approx(0.05))
    assert losses(0.5, 2.0) == (pytest.approx(0.05), pytest.approx(0.02143, abs=5e-6))
    by_square = datta_search(d, 1.0, 2, "mse", range(0, 101, 10))
    assert (by_square.alpha, by_square.beta) == (0.5, 1.66)
    assert by_square.loss == pytest.approx(0.014205, abs=5e-7)
    assert losses(0.5, 1.66) == (pytest.approx(0.56), pytest.approx(0.014205, abs=5e-7))


# ---- 7, bit-serial -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("z", "bits", "value"),
    [(1.1, "100", 1.0), (3.0, "111", 1.75), (-0.2, "000", 0.0), (0.875, "100", 1.0),
     (0.124, "000", 0.0), (0.125, "001", 0.25)],
)  # fmt: skip
def test_7_3_bit_serial(z: float, bits: str, value: float, backend: Backend) -> None:
    """methods.md 7.3: θ = 1.75, T = 3: bits, their value, and QCFS with 7 levels."""
    given = torch.tensor([z], device=backend.device)
    planes = maps.bit_planes(given, 1.75, 3, planes=True)[1]
    assert "".join(map(str, plain(planes))) == bits
    assert maps.qcfs(given, 1.75, 7).item() == value
    with torch.no_grad():
        for unrolled in (False, True):
            snn = convert(wire(), method=BitSerial(unrolled), threshold=1.75, T=3)
            assert snn(torch.tensor([[z]])).item() == value


# ---- 8a, Deng and Gu -----------------------------------------------------------------------------


def test_8a_threshold_relu(backend: Backend) -> None:
    """methods.md 8a: θ = 2, T = 4, x = 0.55: the spread shift, and OPI with an earlier spike."""
    shift = ThresholdReLUMethod(shift_steps=4).neuron(site(2.0), 4)
    spread = run(backend.device, 0.55, 4, v_threshold=2.0, bias=float(shift["bias"]))
    assert (plain(spread.spikes), spread.v.item()) == ([0, 0, 1, 0], pytest.approx(1.2, abs=1e-6))
    opi = run(backend.device, 0.55, 4, v="half", v_threshold=2.0)
    assert (plain(opi.spikes), opi.v.item()) == ([0, 1, 0, 0], pytest.approx(1.2, abs=1e-6))


# ---- 9, PTL --------------------------------------------------------------------------------------


def test_9_4_ptl(backend: Backend) -> None:
    """methods.md 9.4: 0.375 at the first step, b = 0.25 spread over T = 4, θ = 0.25."""
    currents = [0.375 + 0.0625, 0.0625, 0.0625, 0.0625]
    found = run(backend.device, currents, v_threshold=0.25)
    assert (plain(found.spikes), found.v.item()) == ([1, 1, 0, 0], 0.125)
    spikes, count = hybrid_spikes(torch.tensor(currents, device=backend.device)[:, None], 0.25)
    assert (plain(spikes), plain(count)) == ([1, 1, 0, 0], [2])
    net = wire()
    net[0].bias = nn.Parameter(torch.tensor([0.25]))
    with torch.no_grad():
        snn = convert(net, method="ptl", threshold=1.0, T=4)  # the ceiling is T θ
        assert snn(torch.tensor([[0.375]])).item() == 2 * 0.25


# ---- 10, TTFS ------------------------------------------------------------------------------------


def test_10_3_ttfs(backend: Backend) -> None:
    """methods.md 10.3: T = 8, θ = 1: times, what they say, the next neuron's time."""
    a = torch.tensor([[1.0, 0.5, 0.13, 0.0]], device=backend.device)
    times = maps.ttfs_encode(a, 1.0, 8)
    assert plain(times) == [0, 4, 7, 8]
    values = maps.ttfs_decode(times, 1.0, 8)
    assert plain(values) == [1, 0.5, 0.125, 0]
    z = values @ torch.tensor([[0.5], [-0.25], [1.0], [3.0]], device=backend.device)
    assert z.item() == 0.5
    assert maps.ttfs_encode(z, 1.0, 8).item() == 4
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 1, bias=False))
    net.append(nn.ReLU())
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(4))
        net[2].weight.copy_(torch.tensor([[0.5, -0.25, 1.0, 3.0]]))
        snn = convert(net, method=TTFS(round=False), threshold=1.0, T=8)
        assert snn(a.cpu()).item() == 0.5


# ---- 11, post-training ---------------------------------------------------------------------------


def test_11_2_mmse(backend: Backend) -> None:
    """methods.md 11.2: V = 0.99 with 0.0146896, against 0.0194792 at the maximum; both forms."""
    a = [0.1, 0.2, 0.3, 0.4, 0.5, 1.1]
    values = torch.tensor([a], dtype=torch.float64, device=backend.device)
    theta, mse = maps.mmse_threshold(values, 4)
    assert theta.item() == pytest.approx(0.9 * 1.1)
    assert mse.item() == pytest.approx(0.0146896, abs=5e-8)
    at_max = maps.mmse_errors(values, torch.full_like(values[:, :1], 1.1), 4) / 6
    assert at_max.item() == pytest.approx(0.0194792, abs=5e-8)
    found = convert(wire(), torch.tensor(a)[:, None], threshold="mmse", v_init="zero", T=4)
    assert found.report["1"].threshold.item() == pytest.approx(0.99)


def test_11_2_calibration() -> None:
    """methods.md 11.2: ANN .3, .55, .8 and SNN .25, .5, .75 at T = 4: bias + 0.05, v0 + 0.2."""
    ann = torch.tensor([[0.3], [0.55], [0.8]])
    spread = convert(
        wire(), method=ThresholdReLUMethod(shift_steps=4), threshold=1.0, T=4
    )  # the offset of half a threshold spread over the steps, as there
    with torch.no_grad():
        answer = spread(ann)
    assert plain(answer) == [0.25, 0.5, 0.75]
    assert potential_error(answer, ann, 4).item() == pytest.approx(0.2)
    light = convert(wire(), ann, method="light", threshold=1.0, T=4, progress=False)
    ((_, layer),) = light.neurons()
    assert layer.node.bias.item() == pytest.approx(0.05)


def test_11_3_ltb() -> None:
    """methods.md 11.3: x = -1, .5, 1, 4 again and again: how θ grows from 0."""
    x = torch.tensor([[-1.0], [0.5], [1.0], [4.0]])
    for updates, theta in enumerate((2.75, 3.375, 3.6875, 3.84375, 3.921875), start=1):
        snn = convert(wire(), x, method=LTB(updates=updates), progress=False)
        assert snn.report["1"].threshold.item() == theta


# ---- 12, since 2023 ------------------------------------------------------------------------------


def test_12_1_group_neuron(backend: Backend) -> None:
    """methods.md 12.1: θ = 1, m = 4, x = .7, .7: three members fire, twice."""
    method = Burst(max_spikes=4, group=True).neuron(site(1.0), 2)
    assert (float(method["v_threshold"]), method["v_init"]) == (0.25, "half")
    found = run(backend.device, [0.7, 0.7], v="half", v_threshold=0.25, max_spikes=4)
    assert plain(found.spikes) == [3, 3]


@pytest.mark.parametrize(
    ("x", "spikes", "v"),
    [([1, 1, -1, -1], [1, 1, -1, -1], 0.5), ([-2, 1, 1, 2], [0, 0, 0, 1], 1.5)],
)
def test_12_3_signed(x: list[float], spikes: list[int], v: float, backend: Backend) -> None:
    """methods.md 12.3: Fast-SNN takes back what was too much and does not mend too little."""
    method = FastSNN().neuron(site(1.0), 4)
    found = run(backend.device, [float(value) for value in x], v=0.5, **method)
    assert (plain(found.spikes), found.v.item()) == (spikes, v)


@pytest.mark.parametrize(
    ("x", "spikes", "count", "q"),
    [
        ([1, 1, -1, -1], [1, 1, -1, -1], 0, 0.5),
        ([-2, 1, 1, 2], [0, 0, 0, 1], 1, 1.5),
        ([-2, 1, 1, 2, 0], [0, 0, 0, 1, 1], 2, 0.5),
        ([2.6, 0, 0, 0, 0], [1, 1, 1, 0, 0], 3, 0.1),
    ],
)
def test_12_3b_st_bif(
    x: list[float], spikes: list[int], count: int, q: float, backend: Backend
) -> None:
    """methods.md 12.3b: pos_max = 4, neg_min = 0, membrane from 1/2."""
    method = STBIF(levels=4).neuron(site(4.0), 5)
    assert float(method["v_threshold"]) == 1.0
    given = [float(value) for value in x]
    found = run(backend.device, given, v=0.5, signed=method["signed"])
    assert plain(found.spikes) == spikes
    assert (found.count.item(), found.v.item()) == (count, pytest.approx(q, abs=1e-6))


@pytest.mark.parametrize(
    ("x", "spikes"), [([1, 1, -1, -1], [0, 0, 0, 0]), ([-2, 1, 1, 2], [1, 1, 0, 0])]
)
def test_12_5_parallel(x: list[float], spikes: list[int], backend: Backend) -> None:
    """methods.md 12.5: each step's spike from the whole input."""
    found = run(backend.device, [float(value) for value in x], v=0.5, parallel=True)
    assert (plain(found.spikes), found.count.item()) == (spikes, sum(spikes))
    by_formula = [int(sum(x) + 0.5 >= k) for k in range(1, 5)]
    assert by_formula == spikes
