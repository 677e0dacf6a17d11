"""Forward: tables computed by hand, the reference against a scalar loop, every back end by bits."""

from __future__ import annotations

import ctypes
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import (
    DTYPES,
    PURE,
    STEPS,
    Backend,
    Built,
    Case,
    assert_same_bits,
    bits,
    build,
    built,
    currents,
    dtype_id,
    dyadic,
    extension,
    from_values,
    moved,
    plain_cases,
    sampled,
)
from torch import Tensor

from snnkernels.functional import if_count, if_multi_step, if_rate, if_step
from snnkernels.kernels import backends, params, reference

# ---- tables computed by hand -------------------------------------------------------------------
# (current, T, v_init, threshold, tie) -> spikes, membranes after each step

TABLES = [
    # T = 8 of 0.3125: the ideal count is 2.5; half a threshold to start with turns 2 into 3.
    (0.3125, 8, 0.0, 1.0, ">=", [0, 0, 0, 1, 0, 0, 1, 0],
     [0.3125, 0.625, 0.9375, 0.25, 0.5625, 0.875, 0.1875, 0.5]),
    (0.3125, 8, 0.5, 1.0, ">=", [0, 1, 0, 0, 1, 0, 0, 1],
     [0.8125, 0.125, 0.4375, 0.75, 0.0625, 0.375, 0.6875, 0.0]),
    # More than a threshold a step piles up; negative currents are never cut off.
    (1.25, 4, 0.5, 1.0, ">=", [1, 1, 1, 1], [0.75, 1.0, 1.25, 1.5]),
    (-0.25, 4, 0.5, 1.0, ">=", [0, 0, 0, 0], [0.25, 0.0, -0.25, -0.5]),
    # A tie at the last step.
    (0.125, 4, 0.5, 1.0, ">=", [0, 0, 0, 1], [0.625, 0.75, 0.875, 0.0]),
    (0.125, 4, 0.5, 1.0, ">", [0, 0, 0, 0], [0.625, 0.75, 0.875, 1.0]),
]  # fmt: skip

# QCFS, threshold 2, L = T = 4, v_init = threshold / 2: current -> threshold * count / T.
QCFS = [(-0.3, 0.0), (0.2, 0.0), (0.25, 0.5), (0.9, 1.0), (1.74, 1.5), (1.75, 2.0), (2.5, 2.0)]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("z", "T", "v", "threshold", "tie", "spikes", "membranes"), TABLES)
def test_tables(
    backend: Backend,
    dtype: torch.dtype,
    z: float,
    T: int,
    v: float,
    threshold: float,
    tie: str,
    spikes: list[int],
    membranes: list[float],
) -> None:
    x = torch.full((3,), z, dtype=dtype, device=backend.device)
    state = reference.state_dtype(dtype)
    for given_x, steps in ((x, T), (x.expand(T, 3), None)):
        got, last, v_seq = if_multi_step(given_x, v, threshold, tie=tie, store_v_seq=True, T=steps)
        assert v_seq is not None
        assert_same_bits(got[:, 1].cpu(), from_values(spikes, dtype))
        assert_same_bits(v_seq[:, 1].cpu(), from_values(membranes, state))
        assert_same_bits(last.cpu(), from_values([membranes[-1]] * 3, state))
        count, counted = if_count(given_x, v, threshold, tie=tie, T=steps)
        assert count.tolist() == [sum(spikes)] * 3
        assert_same_bits(counted, last)


@pytest.mark.parametrize(("z", "rate"), QCFS)
def test_qcfs_table(backend: Backend, z: float, rate: float) -> None:
    x = torch.full((5,), z, device=backend.device)
    got, _ = if_rate(x, "half", 2.0, amplitude="threshold", T=4)
    assert got.tolist() == [rate] * 5


def test_rounding_decides_a_tie_differently_in_float32_and_float64(backend: Backend) -> None:
    # Five steps of 0.1 from 0.5: only float32 arrives at 1 (methods: floating point).
    for dtype, count in ((torch.float32, 1), (torch.float64, 0)):
        x = torch.full((1,), 0.1, dtype=dtype, device=backend.device)
        assert if_count(x, 0.5, T=5)[0].tolist() == [count]


def test_currents_are_not_divided_by_the_threshold(backend: Backend) -> None:
    # 7 * 0.1 < 0.7 in float64 while 7 * (0.1 / 0.7) >= 1: the raw form must not fire... or the
    # other way round; whichever it is, a scalar loop on raw numbers decides.
    for theta in (0.7, 0.3, 1.1, 1.3):
        x = torch.full((1,), theta / 7, dtype=torch.float64, device=backend.device)
        v, count = 0.0, 0
        for _ in range(21):
            v = v + x.item()
            if v >= theta:
                v, count = v - theta, count + 1
        got, last = if_count(x, 0.0, theta, T=21)
        assert (got.item(), last.item()) == (count, v)


# ---- the reference against Python's own floats -------------------------------------------------


def scalar_loop(built: Built, neuron: int) -> tuple[list[float], list[float], list[float]]:
    """One neuron in plain Python: outputs, membranes after reset, membranes before."""
    c = built.case
    v = built.v.reshape(-1)[neuron].item()
    threshold = built.threshold.reshape(-1)[neuron].item()
    amplitude = built.amplitude.reshape(-1)[neuron].item()
    scale = None if built.input_scale is None else built.input_scale.reshape(-1)[neuron].double()
    out, after, before = [], [], []
    for t in range(c.steps):
        row = built.x if c.constant else built.x[t]
        current = row.reshape(-1)[neuron].item()
        m = v + (current if scale is None else current * scale.item())
        fired = m > threshold if c.tie == ">" else m >= threshold
        v = (m - threshold if c.v_reset is None else c.v_reset) if fired else m
        out.append((1.0 if c.uint8 else amplitude) if fired else 0.0)
        after.append(v)
        before.append(m)
    return out, after, before


@pytest.mark.parametrize("case", sampled(120, seed=11, dtype=torch.float64), ids=str)
def test_reference_is_the_scalar_loop(case: Case) -> None:
    case = replace(case, shape=case.shape if math.prod(case.shape) < 60 else (2, 3))
    made, want = built(case)
    for neuron in range(math.prod(case.shape)):
        out, after, before = scalar_loop(made, neuron)
        pick = lambda t, n=neuron: t.reshape(case.steps, -1)[:, n].tolist()  # noqa: E731
        if case.steps:
            assert pick(want.spikes.double()) == out
            assert pick(want.v_seq) == after
            assert pick(want.charge_seq) == before
            assert want.v.reshape(-1)[neuron].item() == after[-1]
        assert want.count.reshape(-1)[neuron].item() == sum(s != 0 for s in out)


# ---- every back end against the reference ------------------------------------------------------


def check(backend: Backend, case: Case, seed: int = 0) -> None:
    """if_multi_step and if_count of a case give the reference's bits."""
    made, want = built(case, seed)
    try:
        run(backend, made, want)
    except Exception as error:
        raise AssertionError(f"{case} on {backend}: {error}") from error


def run(backend: Backend, made: Built, want: reference.Result) -> None:
    case = made.case
    x = moved(made.x, backend.device)
    arguments = {k: moved(v, backend.device) for k, v in made.arguments.items()}
    if case.out:
        out = torch.empty((case.steps, *case.shape), dtype=want.spikes.dtype, device=x.device)
        arguments["out"] = out
    spikes, last, trace = if_multi_step(x, **arguments)
    assert_same_bits(spikes, want.spikes, "spikes")
    assert_same_bits(last, want.v, "v")
    if case.out:
        assert spikes is out
    if case.trace == "none":
        assert trace is None
    else:
        assert trace is not None
        assert_same_bits(trace, getattr(want, case.trace), case.trace)
    for name in ("amplitude", "spike_dtype", "store_v_seq", "store_charge_seq", "out"):
        arguments.pop(name, None)
    count, counted = if_count(x, **arguments)
    assert_same_bits(count, want.count, "count")
    assert_same_bits(counted, want.v, "v of if_count")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_plain_grid(level: Backend, dtype: torch.dtype) -> None:
    # The reference against itself tests the arguments' way to it: every third case will do.
    for case in plain_cases(dtype)[:: 3 if level.name == "reference" else 1]:
        check(level, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_whole_grid_sampled(level: Backend, dtype: torch.dtype) -> None:
    for case in sampled(60 if level.name == "reference" else 250, seed=3, dtype=dtype):
        check(level, case)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 255, 256, 257, 1000])
def test_offsets_into_a_sentinel_buffer(kernel: Backend, size: int) -> None:
    """Views that start at any element: right results, nothing written outside."""
    for dtype in DTYPES:
        store = currents(3 * size + 16, seed=size, dtype=dtype)
        for offset in range(0, 16, 3):
            x = store[offset : offset + 3 * size].view(3, size)
            canvas = torch.full((3 * size + 40,), 7.0, dtype=dtype)
            target = canvas.to(kernel.device)
            out = target[offset : offset + 3 * size].view(3, size)
            if_multi_step(moved(x, kernel.device), 0.5, out=out)
            want = reference.if_forward(
                x, torch.tensor(0.5), torch.tensor(1.0), torch.tensor(1.0)
            ).spikes
            canvas[offset : offset + 3 * size] = want.reshape(-1)
            assert_same_bits(target, canvas)


EXTREMES = {
    torch.float32: (1e-45, -1e-45, 1.1754944e-38, 3.4028235e38, -3.4028235e38),
    torch.float64: (5e-324, -5e-324, 2.2250738585072014e-308, 1.7976931348623157e308, -1e308),
    torch.float16: (6e-8, -6e-8, 6.1035e-05, 65504.0, -65504.0),
    torch.bfloat16: (9.2e-41, -9.2e-41, 1.1754944e-38, 3.3895e38, -3.3895e38),
}


def values_of(dtype: torch.dtype) -> st.SearchStrategy[float]:
    return st.one_of(
        st.integers(-24, 40).map(lambda k: k / 8),
        st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan, *EXTREMES[dtype]]),
        st.floats(-4, 4, width=32),
    )


@st.composite
def runs(draw: st.DrawFn) -> tuple[Tensor, dict, dict]:
    dtype = draw(st.sampled_from(DTYPES))
    state = reference.state_dtype(dtype)
    shape = draw(st.sampled_from([(1,), (5,), (2, 3), (130,), (2, 64)]))
    steps = draw(st.integers(0, 11))
    some = draw(st.lists(values_of(dtype), min_size=8, max_size=24))
    picks = torch.randint(
        len(some), (steps, *shape), generator=torch.Generator().manual_seed(len(some))
    )
    x = torch.tensor(some, dtype=torch.float64).to(dtype)[picks]
    positive = st.one_of(
        st.sampled_from([1.0, 0.5, 2.0, 1e-38, 1e30]),
        st.floats(0.0078125, 100, width=32),
    )
    threshold = draw(positive)
    v = draw(values_of(torch.float32))
    if draw(st.booleans()):
        v = (
            torch.tensor(some, dtype=torch.float64)
            .to(state)[torch.arange(math.prod(shape)) % len(some)]
            .reshape(shape)
        )
    elif math.isnan(v):
        v = 0.25
    if draw(st.booleans()):
        threshold = torch.full(shape, threshold, dtype=state)
    options = {
        "v_reset": draw(st.sampled_from([None, None, 0.0, -0.0, 0.5])),
        "tie": draw(st.sampled_from([">=", ">"])),
        "input_scale": draw(st.sampled_from([None, None, 0.1, 3.0])),
        "amplitude": draw(st.sampled_from([None, 0.1, 0.0, -1.5])),
        "spike_dtype": draw(st.sampled_from([None, torch.uint8])),
        "store_charge_seq": draw(st.booleans()),
    }
    return x, {"v": v, "v_threshold": threshold}, options


@given(drawn=runs())
def test_extreme_values(kernel: Backend, drawn: tuple[Tensor, dict, dict]) -> None:
    x, operands, options = drawn
    with backends.use_backend("reference"):
        want = if_multi_step(x, **operands, **options)
    device = kernel.device
    got = if_multi_step(
        moved(x, device), **{k: moved(v, device) for k, v in operands.items()}, **options
    )
    for a, b, what in zip(got, want, ("spikes", "v", "charge_seq"), strict=True):
        if b is not None:
            assert_same_bits(a, b, what)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("size", [4, 131])
def test_nan_and_infinities(backend: Backend, dtype: torch.dtype, size: int) -> None:
    x = torch.full((5, size), 0.5, dtype=dtype)
    x[:, 0], x[2, 1], x[:, 2], x[:, 3] = math.nan, math.nan, math.inf, -math.inf
    spikes, v, v_seq = if_multi_step(moved(x, backend.device), store_v_seq=True)
    assert v_seq is not None
    spikes, v, v_seq = spikes.cpu(), v.cpu(), v_seq.cpu()
    assert spikes[:, 0].tolist() == [0] * 5
    assert v_seq[:, 0].isnan().all()
    assert spikes[:, 1].tolist() == [0, 1, 0, 0, 0]
    assert v_seq[:, 1].isnan().tolist() == [False, False, True, True, True]
    assert spikes[:, 2].tolist() == [1] * 5
    assert spikes[:, 3].tolist() == [0] * 5
    # Soft reset keeps +inf (inf - theta) and -inf, and never makes NaN of them.
    assert v[2] == math.inf
    assert v[3] == -math.inf


def test_the_sign_of_zero_survives(backend: Backend) -> None:
    x = from_values([[-0.0, 0.0, -0.5, 1.0]] * 2).to(backend.device)
    v = from_values([-0.0, -0.0, 0.5, -1.0]).to(backend.device)
    spikes, last, trace = if_multi_step(x, v, 1.0, amplitude=-0.0, store_charge_seq=True)
    assert trace is not None
    assert bits(trace[0]).tolist() == bits(from_values([-0.0, 0.0, 0.0, 0.0])).tolist()
    assert bits(spikes[1]).tolist() == bits(from_values([0.0, 0.0, 0.0, -0.0])).tolist()
    assert bits(last).tolist() == bits(from_values([-0.0, 0.0, -0.5, 0.0])).tolist()


def test_the_comparison_sees_one_flipped_bit() -> None:
    want = currents(2, 999)
    for index, bit in ((0, 0), (777, 31), (1997, 12)):
        broken = want.clone()
        flat = broken.view(torch.int32).view(-1)
        flat[index] = int(flat[index]) ^ (1 << bit if bit < 31 else -(1 << 31))
        with pytest.raises(AssertionError, match="1 of 1998 elements differ"):
            assert_same_bits(broken, want)
    zeros = torch.zeros(3)
    with pytest.raises(AssertionError, match=r"first at \(0,\)"):
        assert_same_bits(-zeros, zeros)
    with pytest.raises(AssertionError, match=r"torch.float64"):
        assert_same_bits(zeros.double(), zeros)
    nans = torch.full((3,), math.nan)
    assert_same_bits(-nans, nans)
    with pytest.raises(AssertionError):
        assert_same_bits(nans, zeros)


@pytest.mark.skipif(PURE, reason="SNNKERNELS_TEST_PURE=1: nothing but the reference")
@pytest.mark.parametrize("output", ["spikes", "v", "count"])
def test_a_broken_kernel_is_caught(monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    """The grid fails for a kernel that gets one bit wrong, and for one that writes nothing."""
    good = backends.kernels("cpu")

    def one_bit(packed: bytes, device: torch.device) -> None:
        good.forward(packed, device)
        if address := int(np.frombuffer(packed, params.IF_FORWARD)[output][0]):
            ctypes.c_uint32.from_address(address + 4 * 17).value ^= 1

    case = Case(shape=(129,), steps=8)
    for forward in (one_bit, lambda packed, device: None):
        broken = replace(good, name="broken", forward=forward)
        monkeypatch.setitem(backends._MAKERS, "broken", lambda broken=broken: broken)
        monkeypatch.delitem(backends._made, "broken", raising=False)
        with backends.use_backend("broken"), pytest.raises(AssertionError, match="differ"):
            check(Backend("broken"), case)
    monkeypatch.delitem(backends._made, "broken")


# ---- large: threads and stores past the caches -------------------------------------------------

# Above 256 K neuron-steps threads share the blocks; above 20 MB of rows stores bypass the caches.
LARGE = [
    ((4, 70_000), torch.float32, None),  # threads, no streaming, a tail
    ((4, 1_310_720), torch.float32, None),  # streaming
    ((3, 1_310_784), torch.float32, torch.uint8),
    ((2, 2_621_440), torch.bfloat16, None),
    ((2, 2_621_473), torch.float16, torch.uint8),  # rows off the 64-byte grid
    ((2, 1_310_720), torch.float64, None),
]


@pytest.mark.parametrize(("shape", "dtype", "spike_dtype"), LARGE, ids=str)
def test_large(
    kernel: Backend,
    threads: None,
    shape: tuple[int, int],
    dtype: torch.dtype,
    spike_dtype: torch.dtype | None,
) -> None:
    x = currents(*shape, dtype=dtype)
    with backends.use_backend("reference"):
        want = if_multi_step(x, "half", 1.0, amplitude=0.3, spike_dtype=spike_dtype)
    x = moved(x, kernel.device)
    for count in (1, 2, 3) if kernel.name == "cpu" else (torch.get_num_threads(),):
        torch.set_num_threads(count)
        got = if_multi_step(x, "half", 1.0, amplitude=0.3, spike_dtype=spike_dtype)
        assert_same_bits(got[0], want[0], f"spikes, {count} threads")
        assert_same_bits(got[1], want[1], f"v, {count} threads")
        counted = if_count(x, "half", 1.0)
        assert_same_bits(counted[0], (want[0] != 0).sum(0, dtype=torch.int32), "count")
        assert_same_bits(counted[1], want[1], "v of if_count")


def test_threads_share_the_general_neuron_too(kernel: Backend, threads: None) -> None:
    x = currents(5, 80_001)
    with backends.use_backend("reference"):
        want = if_multi_step(x, v_reset=0.0, store_v_seq=True, tie=">")
    x = moved(x, kernel.device)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for a, b in zip(
            if_multi_step(x, v_reset=0.0, store_v_seq=True, tie=">"), want, strict=True
        ):
            assert_same_bits(a, b)


# ---- identities on dyadic data -----------------------------------------------------------------


@given(
    steps=st.integers(1, 40),
    threshold=st.sampled_from([0.25, 1.0, 1.5, 3.0]),
    v=st.integers(-20, 40).map(lambda k: k / 16),
    seed=st.integers(0, 10**6),
)
def test_conservation(kernel: Backend, steps: int, threshold: float, v: float, seed: int) -> None:
    """sum x = v_T - v_init + threshold * count, without any rounding."""
    x = dyadic(steps, 37, seed=seed).float()
    count, last = if_count(moved(x, kernel.device), v, threshold)
    assert torch.equal(x.sum(0), last.cpu() - v + threshold * count.cpu())


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_closed_form(backend: Backend, dtype: torch.dtype) -> None:
    """Constant z, 0 <= v_init < threshold: count = clip(floor((T z + v_init)/threshold), 0, T)."""
    z = (torch.arange(-24, 49).double() / 16).to(dtype)
    for threshold in (1.0, 1.5, 0.75):
        for v in (0.0, threshold / 2, threshold - 1 / 64):
            for T in (1, 2, 4, 7, 32, 100):
                want = ((T * z.double() + v) / threshold).floor().clamp(0, T)
                count, _ = if_count(z.to(backend.device), v, threshold, T=T)
                assert torch.equal(count.cpu().double(), want), (threshold, v, T)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("options", [{}, {"v_reset": 0.0}, {"tie": ">"}, {"input_scale": 0.7}])
def test_chunks_of_time(kernel: Backend, dtype: torch.dtype, options: dict) -> None:
    """Cutting T anywhere and carrying v gives the bits of one call."""
    x = moved(currents(19, 133, dtype=dtype), kernel.device)
    spikes, last, v_seq = if_multi_step(x, "half", 0.9, store_v_seq=True, **options)
    for k in range(20):
        first = if_multi_step(x[:k], "half", 0.9, store_v_seq=True, **options)
        second = if_multi_step(x[k:], first[1], 0.9, store_v_seq=True, **options)
        assert_same_bits(torch.cat([first[0], second[0]]), spikes)
        assert_same_bits(torch.cat([first[2], second[2]]), v_seq)
        assert_same_bits(second[1], last)


def test_neurons_are_independent(kernel: Backend) -> None:
    x = currents(9, 517)
    threshold = currents(517, seed=5).abs() + 0.25
    order = torch.randperm(517, generator=torch.Generator().manual_seed(0))
    x, threshold, order = (moved(t, kernel.device) for t in (x, threshold, order))
    spikes, v, _ = if_multi_step(x, "half", threshold)
    shuffled, v_shuffled, _ = if_multi_step(x[:, order], "half", threshold[order])
    assert_same_bits(shuffled, spikes[:, order])
    assert_same_bits(v_shuffled, v[order])


def test_powers_of_two_scale_everything(kernel: Backend) -> None:
    x = moved(currents(12, 200), kernel.device)
    spikes, v, _ = if_multi_step(x, 0.3, 0.7)
    for factor in (2.0**-20, 0.5, 4.0, 2.0**30):
        scaled, v_scaled, _ = if_multi_step(x * factor, 0.3 * factor, 0.7 * factor)
        assert_same_bits(scaled, spikes)
        assert_same_bits(v_scaled, v * factor)


# ---- the other functions -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_rate_and_step_agree_with_multi_step(backend: Backend, dtype: torch.dtype) -> None:
    x = moved(currents(7, 3, 65, dtype=dtype), backend.device)
    for arguments in (
        {"v": "half", "v_threshold": 0.8},
        {"v": 0.1, "v_reset": 0.0, "tie": ">", "input_scale": 1.3},
    ):
        spikes, last, _ = if_multi_step(x, **arguments)
        count, counted = if_count(x, **arguments)
        assert_same_bits(count, (spikes != 0).sum(0, dtype=torch.int32))
        assert_same_bits(counted, last)
        rate, rated = if_rate(x, **arguments, amplitude=0.75)
        state = reference.state_dtype(dtype)
        assert_same_bits(rate, (0.75 * count.to(state) / 7).to(dtype))
        assert_same_bits(rated, last)
        v = arguments["v"]
        for t in range(7):
            step, v = if_step(x[t], **{**arguments, "v": v})
            assert_same_bits(step, spikes[t])
        assert_same_bits(v, last)


def test_constant_current_is_the_expanded_one(backend: Backend) -> None:
    z = moved(currents(4, 33), backend.device)
    for T in STEPS[1:]:
        constant = if_multi_step(z, "half", T=T, store_charge_seq=True)
        for a, b in zip(
            constant, if_multi_step(z.expand(T, 4, 33), "half", store_charge_seq=True), strict=True
        ):
            assert_same_bits(a, b)


def test_count_needs_no_tensor_of_all_steps(kernel: Backend) -> None:
    if kernel.name == "reference":
        pytest.skip("the reference does keep every step")
    # [T, 1000] of anything would be a gigabyte and more.
    z = torch.full((1000,), 0.25, device=kernel.device)
    T = 10**6 if kernel.name != "host_shim" else 10**4
    count, v = if_count(z, 0.0, T=T)
    assert count.tolist() == [T // 4] * 1000
    assert v.tolist() == [0.0] * 1000
    count, _ = if_count(z.expand(T, 1000)[:: T // 1000], 0.0)
    assert count.tolist() == [250] * 1000


def test_no_time_steps(backend: Backend) -> None:
    x = torch.empty(0, 4, 3, device=backend.device)
    v = moved(currents(4, 3), backend.device)
    spikes, last, v_seq = if_multi_step(x, v, store_v_seq=True)
    assert spikes.shape == (0, 4, 3)
    assert v_seq is not None
    assert v_seq.shape == (0, 4, 3)
    assert_same_bits(last, v)
    assert last.data_ptr() != v.data_ptr()
    assert if_count(x, v)[0].tolist() == [[0] * 3] * 4
    assert if_multi_step(x, "half", 3.0)[1].unique().tolist() == [1.5]
    with pytest.raises(ValueError, match="no time steps"):
        if_rate(x)


def test_inputs_are_left_alone(backend: Backend) -> None:
    x, v, th = (moved(currents(*s), backend.device) for s in ((5, 40), (40,), (40,)))
    th = th.abs() + 0.5
    before = [t.clone() for t in (x, v, th)]
    spikes, last, _ = if_multi_step(x, v, th, amplitude="threshold")
    for now, then in zip((x, v, th), before, strict=True):
        assert_same_bits(now, then)
    assert {last.data_ptr(), spikes.data_ptr()}.isdisjoint({x.data_ptr(), v.data_ptr()})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
def test_amplitude_is_rounded_once_and_selected(backend: Backend, dtype: torch.dtype) -> None:
    # Just above a tie of the half type: a detour over a coarser type would go down to 1.
    step = 2.0**-10 if dtype == torch.float16 else 2.0**-7
    tie = 1 + step / 2
    number = tie + 2.0**-20
    x = torch.ones(1, 3, dtype=dtype, device=backend.device)
    assert if_multi_step(x, amplitude=number)[0][0, 0].item() == 1 + step
    tensor = torch.tensor(number, dtype=torch.float64, device=backend.device)
    assert if_multi_step(x, amplitude=tensor)[0][0, 0].item() == 1 + step
    spikes, _, _ = if_multi_step(x, amplitude=number, spike_dtype=torch.uint8)
    assert spikes.tolist() == [[1, 1, 1]]
    assert spikes.amplitude == number


def test_uint8_spikes_carry_their_amplitude(backend: Backend) -> None:
    x = moved(currents(4, 6), backend.device)
    amplitude = torch.arange(6.0, device=x.device)
    spikes, _, _ = if_multi_step(x, amplitude=amplitude, spike_dtype=torch.uint8)
    assert torch.equal(spikes.amplitude, amplitude)
    weighed, _, _ = if_multi_step(x, amplitude=amplitude)
    assert torch.equal(spikes * amplitude, weighed)
    assert spikes.max().item() == 1


def test_thresholds_are_subtracted_exactly_as_stored(backend: Backend) -> None:
    # 0.1 is not a float32: the threshold in force is its float32 neighbour, whatever its form.
    x = torch.ones(1, 2, device=backend.device)
    want = torch.ones(2) - torch.full((2,), 0.1)
    for threshold in (0.1, torch.tensor(0.1, dtype=torch.float64), torch.full((2,), 0.1)):
        assert_same_bits(if_multi_step(x, 0.0, moved(threshold, backend.device))[1], want)


def test_every_isa_has_a_name() -> None:
    module = extension("_cpu")
    if module is None:
        pytest.skip("no CPU extension")
    assert module.isas()[0] == module.isa()
    assert "baseline" in module.isas()
    with pytest.raises(ValueError, match="'sse9' is not one of"):
        module.set_isa("sse9")


def test_build_gives_the_forms_it_says() -> None:
    """The grid is only worth its cases if the layouts and forms are what their names say."""
    strides = {
        name: build(Case(shape=(3, 4), layout=name)).x
        for name in ("transposed", "step2", "expanded")
    }
    assert all(not t.is_contiguous() for t in strides.values())
    misaligned = build(Case(shape=(3, 4), layout="misaligned")).x
    assert misaligned.data_ptr() % 4
    narrow = build(Case(shape=(3, 4), layout="narrow")).x
    assert narrow.storage_offset() == 1
    fired = [built(c)[1].count.double().mean().item() for c in sampled(50, 5, shape=(99,), steps=9)]
    assert 0.5 < sum(fired) / len(fired) < 6


@pytest.mark.parametrize("value", [3.4028235e38, 1e39, -3.4028235e38, 1e-46])
def test_numbers_are_rounded_to_float32_never_refused(kernel: Backend, value: float) -> None:
    """The largest float32 written as a decimal lies a little above it."""
    x = currents(3, 5).to(kernel.device)
    for number in (
        {"v": value},
        {"v_threshold": abs(value), "v": 0.5},
        {"amplitude": value},
        {"input_scale": value},
        {"v_reset": value},
    ):
        if number.get("v_threshold") in (1e39, 1e-46):
            # Rounds to infinity or to 0, which are no thresholds.
            with pytest.raises(ValueError, match="in float32 it is"):
                if_multi_step(x, **number)
            continue
        got = if_multi_step(x, **number, store_v_seq=True)
        with backends.use_backend("reference"):
            want = if_multi_step(x, **number, store_v_seq=True)
        for a, b in zip(got, want, strict=True):
            assert_same_bits(a, b)
