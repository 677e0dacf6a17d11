"""PackedSpikes: one bit a spike, and everything that can be asked of it."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import DTYPES, Backend, assert_same_bits, currents, dtype_id, moved

from snnkernels import IFNode, PackedSpikes
from snnkernels.functional import if_count, if_multi_step, if_packed, if_rate, if_run

STEPS = (0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65, 100)


@pytest.mark.parametrize("T", STEPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_packed_spikes_are_the_spikes(level: Backend, T: int, dtype: torch.dtype) -> None:
    for shape in ((129,), (3, 5, 8), (1,), (0, 2)):
        x = moved(currents(T, *shape, seed=T, dtype=dtype), level.device)
        spikes, v, _ = if_multi_step(x, "half")
        packed, last = if_packed(x, "half")
        assert packed.shape == spikes.shape == x.shape
        assert packed.words.dtype == (
            torch.uint8 if T <= 8 else torch.int16 if T <= 16 else torch.int32
        )
        assert packed.words.shape == (-(-T // 32), *shape)
        assert_same_bits(last, v)
        assert_same_bits(packed.unpack(), spikes)
        assert_same_bits(packed.unpack(torch.uint8), spikes.to(torch.uint8))
        assert_same_bits(packed.unpack(torch.bool), spikes != 0)
        assert_same_bits(packed.count(), spikes.sum(0).int())
        assert_same_bits(packed.count(), if_count(x, "half")[0])
        if T:
            assert_same_bits(packed.rate(), if_rate(x, "half")[0])


@pytest.mark.parametrize("T", [1, 8, 9, 16, 17, 32, 33])
def test_bit_t_is_step_t(level: Backend, T: int) -> None:
    for t in range(T):
        x = torch.zeros(T, 5)
        x[t, 2] = 1.0
        words = if_packed(moved(x, level.device))[0].words.cpu()
        bits = 8 * words.element_size()
        want = [[0] * 5 for _ in range(-(-T // 32))]
        want[t // 32][2] = 1 << t % 32
        assert [[w & ((1 << bits) - 1) for w in row] for row in words.tolist()] == want


def test_amplitude_rides_along(backend: Backend) -> None:
    x = moved(currents(9, 2, 3, 4, dtype=torch.bfloat16), backend.device)
    th = moved(torch.tensor([0.7, 1.0, 1.3]), backend.device)
    for amplitude in (None, 0.3, "threshold", th):
        arguments: dict[str, Any] = {"amplitude": amplitude, "channel_dim": 1}
        want = if_multi_step(x, "half", th, **arguments)[0]
        packed = if_packed(x, "half", th, **arguments)[0]
        assert_same_bits(packed.unpack(), want)
        assert_same_bits(packed.rate(), if_rate(x, "half", th, **arguments)[0])
        assert_same_bits(packed[:, 1].unpack(), want[:, 1])
        assert_same_bits(packed[4], want[4])


def test_spikes_words_and_counts_of_one_run_agree(level: Backend) -> None:
    x = moved(currents(40, 3, 50), level.device)
    run = if_run(x, outputs=("spikes", "packed", "count"))
    assert_same_bits(run.packed.unpack(), run.spikes)
    assert_same_bits(run.packed.count(), run.count)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("amplitude", [0.0, -0.0, 1e-9])
def test_a_spike_that_weighs_nothing_is_a_spike(
    level: Backend, dtype: torch.dtype, amplitude: float
) -> None:
    """1e-9 is 0 in float16. Found by test_fuzz.py."""
    x = moved(currents(9, 130, dtype=dtype), level.device)
    run = if_run(x, outputs=("spikes", "packed", "count"), amplitude=amplitude)
    plain = if_run(x, outputs="packed")
    assert run.packed is not None
    assert plain.packed is not None
    assert_same_bits(run.packed.words, plain.packed.words)
    assert run.count is not None
    assert int(run.count.sum()) == int(run.packed.count().sum()) > 0
    assert run.spikes is not None
    weight = torch.tensor(amplitude, dtype=torch.float64).to(dtype)
    fired = run.packed.unpack(torch.bool)
    assert_same_bits(run.spikes, torch.where(fired.cpu(), weight, torch.zeros_like(weight)))


def test_the_gradient_of_an_amplitude_of_zero(backend: Backend) -> None:
    found = []
    for save in ("recompute", "bits"):
        x = moved(currents(9, 130), backend.device)
        weight = torch.zeros((), device=x.device, requires_grad=True)
        spikes = if_multi_step(x, amplitude=weight, surrogate_function="rectangle", save=save)[0]
        found += torch.autograd.grad(spikes.sum(), weight)
    assert found[0].item() > 0
    assert_same_bits(found[1], found[0])


@pytest.mark.parametrize("T", [3, 20, 70])
def test_indexing(T: int) -> None:
    x = currents(T, 4, 5, 6)
    want = if_multi_step(x)[0]
    packed = if_packed(x)[0]
    assert len(packed) == T
    for index in (0, -1, T - 1, (1, 2), (-2, slice(1, 3)), (0, ..., 2), slice(1, 3), (slice(None),
                  slice(0, 2), 1), (slice(None), ..., slice(2, 4)), ..., slice(None)):  # fmt: skip
        got = packed[index]
        got = got.unpack() if isinstance(got, PackedSpikes) else got
        assert_same_bits(got, want[index])
    # All steps of some neurons stay packed.
    assert isinstance(packed[:, 1:3], PackedSpikes)
    assert isinstance(packed[:], PackedSpikes)
    mask = torch.rand(4, 5, 6) < 0.5
    assert_same_bits(packed[:, mask].unpack(), want[:, mask])
    for bad in (T, -T - 1):
        with pytest.raises(IndexError, match=f"step {bad} is out of range for {T} steps"):
            packed[bad]
    assert sum(1 for _ in packed) == T


def test_moves_copies_and_equality() -> None:
    packed = if_packed(currents(20, 3, 4), amplitude=torch.tensor(0.5))[0]
    half = packed.to(torch.float16)
    assert half.unpack().dtype == torch.float16
    assert half.words.dtype == packed.words.dtype == torch.int32
    assert packed.cpu() == packed == packed.clone()
    assert packed.to("cpu", torch.float64).unpack().dtype == torch.float64
    assert packed != if_packed(currents(20, 3, 4, seed=9), amplitude=torch.tensor(0.5))[0]
    assert packed != if_packed(currents(20, 3, 4))[0]
    assert (packed == 3) is False
    assert pickle.loads(pickle.dumps(packed)) == packed
    assert packed.device == torch.device("cpu")
    assert packed.nbytes == 20 // 20 * 12 * 4
    assert (packed.dim(), packed.numel()) == (3, 240)
    assert "PackedSpikes(shape=(20, 3, 4), words=torch.int32" in repr(packed)
    with pytest.raises(TypeError, match="unhashable"):
        hash(packed)


@pytest.mark.gpu
def test_moves_to_a_device_and_back() -> None:
    packed = if_packed(currents(20, 3, 4), amplitude=torch.tensor(0.5))[0]
    there = packed.cuda()
    assert there.device.type == "cuda"
    assert_same_bits(there.unpack(), packed.unpack())
    assert_same_bits(there.count(), packed.count())
    assert there.cpu() == packed


def test_nodes_give_them(backend: Backend) -> None:
    x = moved(currents(20, 3, 4), backend.device)
    node = IFNode(v_init="half", output="packed", store_count=True, amplitude=0.5)
    want = IFNode(v_init="half", amplitude=0.5)
    packed, spikes = node(x), want(x)
    assert_same_bits(packed.unpack(), spikes)
    assert_same_bits(node.count, packed.count())
    assert_same_bits(node(x[0], T=5).unpack(), want(x[0], T=5))
    single = IFNode(step_mode="s", output="packed")(x[0])
    assert single.shape == (1, 3, 4)


@given(st.integers(0, 70), st.lists(st.integers(1, 4), min_size=0, max_size=3), st.integers(0, 99))
def test_unpacking_undoes_packing(T: int, shape: list[int], seed: int) -> None:
    packed, _ = if_packed(currents(T, *shape, seed=seed))
    again = PackedSpikes(packed.words, T)
    assert again == packed
    assert_same_bits(packed.count(), packed.unpack().sum(0).int())


BAD: list[tuple[tuple[Any, ...], type[Exception], str]] = [
    ((torch.zeros(1, 3), 8), TypeError, "words for T=8 must be a tensor of torch.uint8, got torch"),
    ((torch.zeros(1, 3, dtype=torch.uint8), 9), TypeError, "must be a tensor of torch.int16"),
    (([1], 8), TypeError, "got list"),
    ((torch.zeros(1, 3, dtype=torch.int32), 33), ValueError, "do not hold T=33 steps"),
    ((torch.zeros((), dtype=torch.uint8), 8), ValueError, "do not hold T=8 steps"),
    ((torch.zeros(1, 3, dtype=torch.uint8), -1), ValueError, "T=-1 must not be negative"),
    ((torch.zeros(1, 3, dtype=torch.uint8), 8.0), TypeError, "T=8.0 must be an int"),
]


@pytest.mark.parametrize(("arguments", "error", "says"), BAD, ids=lambda v: str(v)[:40])
def test_bad_words(arguments: tuple[Any, ...], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        PackedSpikes(*arguments)


WORDS = torch.zeros(1, 3, 4, dtype=torch.uint8)
BAD_AMPLITUDES: list[tuple[Any, type[Exception], str]] = [
    ("threshold", TypeError, "amplitude='threshold' is of type str; allowed are a number and a te"),
    (True, TypeError, "amplitude=True is of type bool"),
    (None, TypeError, "amplitude=None is of type NoneType"),
    ([0.5], TypeError, r"amplitude=\[0.5\] is of type list"),
    (float("nan"), ValueError, "amplitude is NaN"),
    (torch.ones(4, dtype=torch.bool), TypeError, "amplitude has dtype torch.bool; allowed are rea"),
    (torch.ones(4, dtype=torch.complex64), TypeError, "amplitude has dtype torch.complex64"),
    (torch.ones(3), ValueError, r"amplitude of shape \(3,\) does not broadcast to the neurons'"),
    (torch.ones(8, 3, 4), ValueError, r"amplitude of shape \(8, 3, 4\) does not broadcast"),
    (torch.ones(4, device="meta"), ValueError, "amplitude is on meta but the words are on cpu"),
]


@pytest.mark.parametrize(
    ("amplitude", "error", "says"), BAD_AMPLITUDES, ids=lambda v: str(v)[:40].replace("\n", " ")
)
def test_bad_amplitudes(amplitude: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        PackedSpikes(WORDS, 8, amplitude)


@pytest.mark.parametrize(
    "amplitude",
    [2, np.float32(0.5), torch.tensor(3), torch.ones(4), torch.ones(3, 1), torch.ones(1, 1, 1)],
    ids=lambda v: str(v).replace("\n", " "),
)
def test_amplitudes_of_every_form(amplitude: Any) -> None:
    packed = PackedSpikes(torch.full_like(WORDS, 3), 8, amplitude)
    want = torch.as_tensor(amplitude).float() * torch.ones(3, 4)
    want = want.reshape(3, 4)
    assert_same_bits(packed.unpack()[1], want)
    assert_same_bits(packed.rate(), want / 4)
    assert_same_bits(packed[:, 1:, 2].unpack()[0], want[1:, 2])
    assert packed == packed.clone() == PackedSpikes(packed.words, 8, packed.amplitude)


@pytest.mark.gpu
def test_a_number_in_a_tensor_may_be_anywhere() -> None:
    th = torch.tensor(0.75)
    packed = if_packed(torch.ones(4, 3, device="cuda"), v_threshold=th, amplitude="threshold")[0]
    assert packed.unpack().max().item() == 0.75
    with pytest.raises(ValueError, match="amplitude is on cpu but the words are on cuda"):
        PackedSpikes(WORDS.cuda(), 8, torch.ones(4))


def test_the_amplitude_is_its_own() -> None:
    x = currents(9, 2, 3, 4)
    th = torch.nn.Parameter(torch.tensor([[0.5], [1.0], [1.5]]))
    with torch.no_grad():
        given = if_packed(x, "half", th, amplitude="threshold")[0]
    made = PackedSpikes(given.words, 9, th)
    for packed in (given, made):
        copy, view, half = packed.clone(), packed[:, 1], packed.to(torch.float16)
        spikes, rate = packed.unpack(), packed.rate()
        assert not packed.amplitude.requires_grad
        # A view and another dtype cost no memory.
        for other in (view, half):
            assert other.amplitude.untyped_storage() == packed.amplitude.untyped_storage()
        with torch.no_grad():
            th.mul_(2)
        assert_same_bits(packed.unpack(), spikes)
        assert_same_bits(packed.rate(), rate)
        assert_same_bits(view.unpack(), spikes[:, 1])
        packed.amplitude.zero_()
        assert_same_bits(copy.unpack(), spikes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64])
def test_rates_of_whole_spikes_are_float32(backend: Backend, dtype: torch.dtype) -> None:
    x = moved(torch.full((4, 3), 0.6), backend.device)
    for amplitude in (None, 0.3, moved(torch.tensor([0.5, 1.0, 2.0]), backend.device)):
        packed = if_packed(x, amplitude=amplitude)[0]
        rate = packed.to(dtype).rate()
        assert_same_bits(rate, packed.rate())
        assert rate.dtype == torch.float32
        if amplitude is None:
            assert rate.tolist() == [0.5] * 3


def test_a_rate_of_no_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="rate of no steps"):
        if_packed(torch.zeros(0, 3))[0].rate()
