"""What only CPU kernels have: SIMD levels, rows in segments, threads, stores past the caches."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from support import PURE, assert_same_bits, extension
from torch import Tensor

from snnkernels.functional import if_multi_step
from snnkernels.kernels import params, reference

pytestmark = pytest.mark.skipif(PURE, reason="SNNKERNELS_TEST_PURE=1: there are no kernels")

cpu = extension("_cpu")
ISAS = [] if cpu is None else cpu.isas()
HALVES = {torch.float16: 0x3C00, torch.bfloat16: 0x3F80}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Any:
    before = cpu.isa()
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa(before)


def pack(layout: np.dtype, /, **fields: Any) -> bytes:
    """A params struct: tensors as their addresses, numbers as operands, ``base__x`` for base.x."""
    p = np.zeros((), layout)
    for name in ("v_init", "threshold", "amplitude", "input_scale", "beta", "bias", "fire_level"):
        at = p["base"] if "base" in p.dtype.names and name in p["base"].dtype.names else p
        if name in at.dtype.names:
            at[name]["inner"] = at[name]["count"] = 1
    for name, value in fields.items():
        at = p["base"] if "base" in p.dtype.names and name in p["base"].dtype.names else p
        if isinstance(value, Tensor):
            value = value.data_ptr()
        elif "data" in (at[name].dtype.names or ()):
            value = value if isinstance(value, tuple) else (0, 1, 1, value)
        at[name] = value
    return p.tobytes()


def operand(values: Tensor, inner: int) -> tuple[int, int, int, float]:
    return values.data_ptr(), inner, values.numel(), 0.0


def forward(x: Tensor, /, **fields: Any) -> bytes:
    T, N = x.shape
    return pack(
        params.IF_FORWARD,
        **{
            "x": x, "v_init": 0.5, "threshold": 1.0, "T": T, "N": N, "inner": N, "vec": 1,
            "x_rows": (N, 0), "out_rows": (N, 0), "dtype": params.DTYPE_CODES[x.dtype],
            "spike_bytes": 1, "amplitude_bits": 1, "word_bytes": 4, "alpha": 2.0, **fields,
        },
    )  # fmt: skip


def expected(x: Tensor, v: float | Tensor = 0.5, threshold: float | Tensor = 1.0) -> Any:
    state = reference.state_dtype(x.dtype)
    as_tensor = lambda value: torch.as_tensor(value, dtype=state)  # noqa: E731
    return reference.if_forward(x, as_tensor(v), as_tensor(threshold), as_tensor(1.0))


# ---- conversions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(HALVES), ids=str)
def test_every_half_is_widened(isa: str, dtype: torch.dtype) -> None:
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).reshape(1, -1)
    v = torch.empty(65536)
    # -0.0 + x is x, -0.0 included, and nothing reaches a threshold of NaN.
    cpu.if_forward(forward(x, v=v, v_init=-0.0, threshold=float("nan")))
    assert_same_bits(v, x[0].float())


@pytest.mark.parametrize("dtype", list(HALVES), ids=str)
def test_every_half_is_rounded_to(isa: str, dtype: torch.dtype) -> None:
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).float()
    halves = halves[halves.isfinite()]
    # Around each half and around each middle between two, which is a tie.
    ordered = halves.sort().values
    middles = ((ordered[1:].double() + ordered[:-1].double()) / 2).float()
    exact = torch.cat([halves, middles, torch.tensor([3e38, -3e38, 65520.0, -65520.0, 65519.0])])
    up = torch.nextafter(exact, torch.tensor(torch.inf))
    down = torch.nextafter(exact, torch.tensor(-torch.inf))
    carry = torch.cat([exact, up, down])
    carry = carry[carry.isfinite()]
    N = carry.numel()
    x, grad_x = torch.zeros(1, N, dtype=dtype), torch.empty(1, N, dtype=dtype)
    # Nothing but the carry: no gradient for spikes, the reset detached.
    cpu.if_backward(
        pack(
            params.IF_BACKWARD, x=x, grad_v=carry, grad_x=grad_x, threshold=1.0, amplitude=1.0,
            T=1, N=N, inner=N, x_rows=(N, 0), grad_x_rows=(N, 0), alpha=2.0, grad_scale=1.0,
            dtype=params.DTYPE_CODES[dtype], options=params.DETACH_RESET, word_bytes=1,
        )
    )  # fmt: skip
    # -0.0 is lost in adding what comes through the spike.
    assert_same_bits(grad_x[0], (carry + 0.0).to(dtype))


# ---- levels, lengths, segments -------------------------------------------------------------------


def special(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random currents with NaN, infinities, ties and zeros of both signs among them."""
    x = torch.rand(shape, dtype=torch.float64) * 2.4 - 0.7
    pick = torch.rand(shape)
    specials = [torch.nan, torch.inf, -torch.inf, 0.5, -0.0, 1.0, 1e-40]
    for i, value in enumerate(specials):
        x[(pick > 0.01 * i) & (pick < 0.01 * i + 0.002)] = value
    return x.to(dtype)


@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 32, 33, 63, 64, 65])
@pytest.mark.parametrize("N", [1, 127, 128, 129, 2047, 2049, 4224])
def test_outputs_of_every_length(isa: str, T: int, N: int) -> None:
    x = special((T, N), torch.float32)
    want = expected(x)
    fired = want.spikes != 0
    near = (want.charge_seq - 1.0).abs() * 2.0 < 0.5
    word = reference.word_dtype(T)
    W = -(-T // reference.WORD_STEPS)
    for spikes, extra in itertools.product((None, torch.uint8, torch.float32), range(8)):
        out = None if spikes is None else torch.empty(T, N, dtype=spikes)
        v = torch.empty(N)
        count = torch.empty(N, dtype=torch.int32) if extra & 1 else None
        words, window = (torch.empty(W, N, dtype=word) if extra & bit else None for bit in (2, 4))
        asked = {"spikes": out, "count": count, "words": words, "window": window}
        if spikes == torch.float32:
            asked |= {"spike_bytes": 4, "amplitude_bits": 0x3F800000}
        given = {k: value for k, value in asked.items() if value is not None}
        cpu.if_forward(forward(x, v=v, word_bytes=word.itemsize, **given))
        assert_same_bits(v, want.v, "v")
        if out is not None:
            assert_same_bits(out, want.spikes.to(spikes), "spikes")
        if count is not None:
            assert_same_bits(count, want.count, "count")
        if words is not None:
            assert_same_bits(words, reference.pack(fired), "words")
        if window is not None:
            assert_same_bits(window, reference.pack(near), "window")


@pytest.mark.parametrize("dtype", list(params.DTYPE_CODES), ids=str)
@pytest.mark.parametrize("inner", [1, 3, 50, 127, 128, 129, 1000, 2500])
def test_rows_in_segments(isa: str, dtype: torch.dtype, inner: int) -> None:
    T, segments, gap = 6, max(3, 2600 // inner), 5
    N = segments * inner
    # x [segments, T, inner + gap], spikes [segments, T, inner].
    wide = special((segments, T, inner + gap), dtype)
    x = wide[:, :, :inner]
    state = reference.state_dtype(dtype)
    threshold = torch.rand(7, dtype=state) + 0.5
    own = threshold[(torch.arange(N) // inner) % 7]
    want = expected(x.transpose(0, 1).reshape(T, N), threshold=own)
    spikes = torch.full((segments, T, inner), 7, dtype=dtype)
    v = torch.empty(N, dtype=state)
    bits = torch.ones(1, dtype=dtype)
    one = int(bits.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]))
    rows = {"x_rows": (inner + gap, T * (inner + gap)), "out_rows": (inner, T * inner)}
    cpu.if_forward(
        forward(
            x.transpose(0, 1).reshape(T, N), spikes=spikes, spike_bytes=dtype.itemsize, v=v,
            amplitude_bits=one, inner=inner, threshold=operand(threshold, inner),
            **{**rows, "x": wide},
        )
    )  # fmt: skip
    assert_same_bits(spikes.transpose(0, 1).reshape(T, N), want.spikes, "spikes")
    assert_same_bits(v, want.v, "v")

    grad = torch.randn(segments, T, inner).to(dtype)
    grad_x = torch.empty(segments, T, inner, dtype=dtype)
    dense = torch.empty(T, N, dtype=dtype)
    packed = x.transpose(0, 1).reshape(T, N).contiguous()
    packed_grad = grad.transpose(0, 1).reshape(T, N).contiguous()
    common = {
        "v_init": 0.5, "threshold": operand(threshold, inner), "amplitude": 1.0, "T": T, "N": N,
        "alpha": 2.0, "grad_scale": 1.0, "dtype": params.DTYPE_CODES[dtype], "word_bytes": 1,
    }  # fmt: skip
    cpu.if_backward(
        pack(
            params.IF_BACKWARD, **common, inner=inner, x=wide, x_rows=rows["x_rows"],
            grad_spikes=grad, grad_rows=rows["out_rows"], grad_x=grad_x,
            grad_x_rows=rows["out_rows"],
        )
    )  # fmt: skip
    cpu.if_backward(
        pack(
            params.IF_BACKWARD, **common, inner=N, x=packed, x_rows=(N, 0), grad_rows=(N, 0),
            grad_spikes=packed_grad, grad_x=dense, grad_x_rows=(N, 0),
        )
    )  # fmt: skip
    assert_same_bits(grad_x.transpose(0, 1).reshape(T, N), dense, "grad_x")


@pytest.mark.parametrize("dtype", list(params.DTYPE_CODES), ids=str)
@pytest.mark.parametrize("surrogate", range(4))
def test_saved_charges_give_the_recomputed_gradients(
    isa: str, dtype: torch.dtype, surrogate: int
) -> None:
    T, N = 67, 300
    x = (torch.rand(T, N) * 1.2 - 0.2).to(dtype)
    state = reference.state_dtype(dtype)
    run = expected(x)
    grad = torch.randn(T, N).to(dtype)
    window = reference.pack((run.charge_seq - 1.0).abs() * 2.0 < 0.5)
    words = reference.pack(run.spikes != 0)
    found = []
    sources = [{"x": x, "x_rows": (N, 0)}, {"charges": run.charge_seq, "out_rows": (N, 0)}]
    if surrogate == 3:
        sources.append({"window": window, "words": words, "word_bytes": 4})
    for source in sources:
        grads = [torch.empty(T, N, dtype=dtype), *(torch.empty(N, dtype=state) for _ in range(3))]
        names = ("grad_x", "grad_v_init", "grad_threshold", "grad_amplitude")
        cpu.if_backward(
            pack(
                params.IF_BACKWARD, grad_spikes=grad, grad_rows=(N, 0), grad_x_rows=(N, 0), T=T,
                N=N, inner=N, v_init=0.5, threshold=1.0, amplitude=1.0, alpha=2.0, grad_scale=0.5,
                dtype=params.DTYPE_CODES[dtype], surrogate=surrogate, **source,
                **dict(zip(names, grads, strict=True)),
            )
        )  # fmt: skip
        found.append(grads)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert_same_bits(a, b)


# ---- threads, stores past the caches -------------------------------------------------------------


@pytest.mark.parametrize("N", [400_000, 399_937])
def test_large_runs_are_small_runs(isa: str, N: int, threads: None) -> None:
    """Beyond 20 MB stores bypass the caches, and threads share the neurons: same bits."""
    T = 10
    x = torch.rand(T, N) * 1.2 - 0.2
    grad = torch.randn(T, N)

    def run(x: Tensor, grad: Tensor) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        spikes, v, _ = if_multi_step(leaf, 0.5)
        spikes.backward(grad)
        return [spikes.detach(), v.detach(), leaf.grad]  # type: ignore[list-item]

    torch.set_num_threads(1)
    parts = [run(a, b) for a, b in zip(x.split(1024, 1), grad.split(1024, 1), strict=True)]
    want = [torch.cat(part, -1) for part in zip(*parts, strict=True)]
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for got, same in zip(run(x, grad), want, strict=True):
            assert_same_bits(got, same)


def test_misaligned_rows_past_the_caches(isa: str) -> None:
    T, N = 9, 333_333
    x = torch.rand(T, N) * 1.2 - 0.2
    want = expected(x)
    for offset in (0, 1, 3):
        whole = torch.full((T * N + 8,), 7, dtype=torch.uint8)
        cpu.if_forward(forward(x, spikes=whole[offset:], threshold=1.0))
        assert_same_bits(whole[offset : offset + T * N].reshape(T, N), want.spikes.to(torch.uint8))
        assert whole[:offset].tolist() == [7] * offset
        assert whole[offset + T * N :].tolist() == [7] * (8 - offset)


# ---- malformed params ----------------------------------------------------------------------------

BAD_FORWARD = [
    {"dtype": 4}, {"dtype": -1}, {"T": -1}, {"N": -1}, {"inner": 0}, {"x": 0}, {"spike_bytes": 3},
    {"words": 1, "word_bytes": 0}, {"words": 1, "word_bytes": 1}, {"window": 1, "word_bytes": 2},
    {"threshold": (1, 0, 1, 0.0)}, {"amplitude": (1, 1, 0, 0.0)},
]  # fmt: skip
BAD_GENERAL = [
    {"options": params.MASK}, {"options": params.PROBE_MASK, "probe": 21},
    {"options": params.PROBE_SHIFT, "probe": -1}, {"iterations": -1}, {"surrogate": 8},
    {"options": params.SMOOTH}, {"options": params.PARALLEL, "v_seq": 1}, {"max_spikes": -1},
    {"counts": 1, "count_times": 17}, {"counts": 1, "count_times": -1},
    {"counts": 1, "count_times": 2, "count_at": [5, 4] + [0] * 14},
    {"counts": 1, "count_times": 1, "count_at": [21] + [0] * 15}, {"beta": (1, 0, 1, 0.0)},
]  # fmt: skip
BAD_BACKWARD = [
    {"T": 0}, {"surrogate": -1}, {"surrogate": 4}, {"x": 0}, {"options": params.STRICT},
    {"x": 0, "window": 1, "word_bytes": 4},
    {"x": 0, "window": 1, "word_bytes": 4, "surrogate": 3, "grad_threshold": 1},
    {"window": 1, "word_bytes": 1, "surrogate": 3},
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_FORWARD, ids=str)
def test_malformed_forward(bad: dict[str, Any]) -> None:
    x, out = torch.zeros(20, 8), torch.zeros(20, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"."):
        cpu.if_forward(forward(x, **{"spikes": out, **bad}))


@pytest.mark.parametrize("bad", BAD_GENERAL, ids=str)
def test_malformed_general(bad: dict[str, Any]) -> None:
    x = torch.zeros(20, 8)
    fields = {"x": x, "T": 20, "N": 8, "inner": 8, "x_rows": (8, 0), "threshold": 1.0}
    cpu.if_general(pack(params.IF_GENERAL, **fields))
    with pytest.raises(ValueError, match=r"."):
        cpu.if_general(pack(params.IF_GENERAL, **{**fields, **bad}))


@pytest.mark.parametrize("bad", BAD_BACKWARD, ids=str)
def test_malformed_backward(bad: dict[str, Any]) -> None:
    x = torch.zeros(20, 8)
    fields = {"x": x, "T": 20, "N": 8, "inner": 8, "x_rows": (8, 0), "threshold": 1.0}
    cpu.if_backward(pack(params.IF_BACKWARD, **fields))
    with pytest.raises(ValueError, match=r"."):
        cpu.if_backward(pack(params.IF_BACKWARD, **{**fields, **bad}))


@pytest.mark.parametrize("call", ["if_forward", "if_general", "if_backward", "if_backward_general"])
def test_params_of_the_wrong_size(call: str) -> None:
    with pytest.raises(ValueError, match="bytes"):
        getattr(cpu, call)(b"123")
