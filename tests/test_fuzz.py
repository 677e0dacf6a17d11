"""Every operator with whatever it may be given: a kernel does what the reference does.

Shapes, strides, offsets, dtypes, values and options are drawn, legal or not. Either both give the
same bits, or both refuse with an error of the same type that is a ValueError or TypeError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import hypothesis
import pytest
import test_backward
import torch
from hypothesis import strategies as st
from support import DTYPES, FUZZ, Backend, assert_same_bits, moved
from torch import Tensor

from snnkernels import functional, maps
from snnkernels.kernels import backends
from snnkernels.options import Probe, Signed

fuzz = hypothesis.settings(max_examples=FUZZ, deadline=None)

SHAPES = ((), (1,), (3,), (0,), (2, 3), (17,), (128,), (131,), (2, 0), (2, 3, 4), (2, 8, 3, 3))
EXTREMES = (0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, 1e-38, 3e38, -3e38, 65504.0, 1e-7)


def values(kind: str, size: Iterable[int], seed: int) -> Tensor:
    """float64 of ``size``: multiples of 1/8, any numbers, or the ends of the ranges among them."""
    g, size = torch.Generator().manual_seed(seed), tuple(size)
    if kind == "dyadic":
        return torch.randint(-8, 17, size, generator=g) / 8
    x = torch.randn(size, generator=g, dtype=torch.float64)
    if kind == "extreme":
        odd = torch.tensor(EXTREMES, dtype=torch.float64)
        picked = odd[torch.randint(len(odd), size, generator=g)]
        x = torch.where(torch.rand(size, generator=g) < 0.3, picked, x)
    return x


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values elsewhere in memory."""
    if layout == "reversed dimensions" and x.dim():
        return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
    if layout == "slice" and x.dim():
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), 7.0).to(x.dtype)
        return wide[..., 1 : 1 + 2 * x.shape[-1] : 2].copy_(x)
    if layout == "offset":
        flat = torch.full((x.numel() + 5,), 7.0).to(x.dtype)
        return flat[3 : 3 + x.numel()].view(x.shape).copy_(x)
    if layout == "batch first" and x.dim() > 1:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "channels last" and x.dim() == 5 and x.shape[0]:
        return torch.stack([s.to(memory_format=torch.channels_last) for s in x])
    if layout == "expanded" and x.dim() and x.shape[0]:
        return x[:1].expand_as(x)
    return x.contiguous()


LAYOUTS = (
    "contiguous", "contiguous", "reversed dimensions", "slice", "offset", "batch first",
    "channels last", "expanded",
)  # fmt: skip
KINDS = ("dyadic", "any", "extreme")


@st.composite
def tensors(draw: st.DrawFn, lead: tuple[int, ...] = (), shapes: Any = SHAPES) -> Tensor:
    shape = (*lead, *draw(st.sampled_from(shapes)))
    x = values(draw(st.sampled_from(KINDS)), shape, draw(st.integers(0, 99)))
    return laid_out(x.to(draw(st.sampled_from(DTYPES))), draw(st.sampled_from(LAYOUTS)))


def operand(draw: st.DrawFn, shape: tuple[int, ...], positive: bool, channel: bool) -> Any:
    """A number or a tensor: scalar, along a channel, that broadcasts, full; now and then a bad one.

    ``channel``: 1-D tensors are along dimension ``min(1, dims - 1)``.
    """
    forms = ("number", "number", "scalar", "channel", "row", "full")
    form = "bad" if draw(st.integers(0, 19)) == 7 else draw(st.sampled_from(forms))
    if form == "number" or (form == "channel" and (not channel or not shape)):
        if positive:
            return draw(st.sampled_from((1.0, 0.5, 0.3, 2, 1e-38, 1e30)))
        return draw(st.sampled_from((0.0, 0.25, -1.5, 1, 1e30, -0.0)))
    if form == "bad":
        return draw(
            st.sampled_from((math.nan, -math.inf, "full", torch.zeros(5, 7), torch.tensor(-1.0)))
        )
    size = {
        "scalar": (),
        "row": shape[-1:],
        "full": shape,
        "channel": shape[min(1, len(shape) - 1) :][:1],
    }[form]
    x = values("any", size, draw(st.integers(0, 9)))
    x = (x.abs() + 0.125) if positive else x
    x = x.to(draw(st.sampled_from((torch.float32, torch.float32, *DTYPES))))
    return laid_out(x, draw(st.sampled_from(("contiguous", "slice", "offset"))))


def outcome(call: Callable[[], Any]) -> Any:
    """What a call gives, or the refusal; every other exception is a finding."""
    try:
        return call()
    except (ValueError, TypeError) as error:
        return error


def parts(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    if hasattr(found, "words"):  # PackedSpikes
        return [found.words]
    return [p for item in found if item is not None for p in parts(item)]


def differ_on(kernel: Backend, call: Callable[..., Any], *args: Any, **given: Any) -> None:
    """Asserts that the kernel does what the reference does."""

    with backends.use_backend("reference"), torch.no_grad():
        want = outcome(lambda: call(*args, **given))
    device = kernel.device
    with torch.no_grad():
        got = outcome(
            lambda: call(
                *(moved(a, device) for a in args), **{k: moved(v, device) for k, v in given.items()}
            )
        )
    if isinstance(want, Exception):
        assert len(str(want)) >= len("v is NaN"), repr(want)
        assert type(got) is type(want), f"{got!r}, expected {want!r}"
        return
    assert not isinstance(got, Exception), f"{got!r}, the reference answers"
    for i, (a, b) in enumerate(zip(parts(got), parts(want), strict=True)):
        assert_same_bits(a, b, f"part {i}")


@fuzz
@hypothesis.given(data=st.data())
def test_if_run(kernel: Backend, data: st.DataObject) -> None:
    """The forward operator with every output and every option, in every layout of time."""
    draw = data.draw
    constant = draw(st.booleans())
    steps = draw(st.sampled_from((1, 2, 4, 7, 9, 16, 33)))
    layout = draw(st.sampled_from(("T,N", "T,N", "T,N", "N,T", "T*N", "N*T")))
    if constant and draw(st.integers(0, 3)):
        layout = "T,N"  # it has no other
    x = draw(tensors(lead=() if constant else (steps,)))
    shape = tuple(x.shape if constant else x.shape[1:])
    if not constant and layout != "T,N" and len(shape):
        if layout == "N,T":
            x = x.transpose(0, 1)
        elif layout == "T*N":
            x = x.reshape(steps * shape[0], *shape[1:])
        else:
            x = x.transpose(0, 1).reshape(steps * shape[0], *shape[1:])
    given: dict[str, Any] = {"layout": layout}
    if constant or layout in ("T*N", "N*T"):
        given["T"] = steps
    channel = draw(st.booleans())
    if channel and shape:
        given["channel_dim"] = min(1, len(shape) - 1)
    given["v"] = draw(st.sampled_from(("half", None)))
    if given["v"] is None:
        given["v"] = operand(draw, shape, False, channel)
    given["v_threshold"] = operand(draw, shape, True, channel)
    some = [
        name
        for name in (
            "amplitude", "input_scale", "beta", "bias", "fire_level", "max_spikes", "signed",
            "mask", "probe", "parallel", "v_reset", "tie", "spike_dtype", "count_at",
        )
        if draw(st.integers(0, 7)) == 3
    ]  # fmt: skip
    for name in some:
        given[name] = {
            "amplitude": lambda: (
                draw(st.sampled_from(("threshold", 0.5, -1.25)))
                if draw(st.booleans())
                else operand(draw, shape, False, channel)
            ),
            "input_scale": lambda: operand(draw, shape, False, channel),
            "beta": lambda: operand(draw, shape, False, channel),
            "bias": lambda: operand(draw, shape, False, channel),
            "fire_level": lambda: operand(draw, shape, False, channel),
            "max_spikes": lambda: draw(st.sampled_from((1, 3, 7, 255, 0))),
            "signed": lambda: draw(
                st.sampled_from((Signed(), Signed(-2, 5, 0.25), Signed(high=0), Signed(margin=-1)))
            ),
            "mask": lambda: values("dyadic", shape, 3) > 0,
            "probe": lambda: Probe(
                draw(st.integers(0, 9)),
                draw(st.sampled_from(("mask", "shift"))),
                draw(st.sampled_from((0.0, 1e-3, 0.5))),
                draw(st.sampled_from((1, 1, 3))),
            ),
            "parallel": lambda: True,
            "v_reset": lambda: draw(st.sampled_from((0.0, -0.25, math.nan))),
            "tie": lambda: draw(st.sampled_from((">", ">", ">", "=>"))),
            "spike_dtype": lambda: draw(
                st.sampled_from((torch.uint8, torch.uint8, x.dtype, torch.int8))
            ),
            "count_at": lambda: sorted(
                draw(st.lists(st.integers(0, steps + 1), max_size=4, unique=True))
            ),
        }[name]()
    outputs = draw(
        st.lists(
            st.sampled_from(("spikes", "packed", "count", "rate", "v_seq", "charge_seq")),
            unique=True,
            max_size=4,
        )
    )
    differ_on(kernel, functional.if_run, x, outputs=outputs, **given)


@fuzz
@hypothesis.given(seed=st.integers(0, 2**32), dtype=st.sampled_from(DTYPES[:2]))
def test_if_backward(kernel: Backend, seed: int, dtype: torch.dtype) -> None:
    """The backward operator, against float64 autograd."""
    (case,) = test_backward.sampled(1, seed=seed, dtype=dtype, alpha=0.5)
    test_backward.check(kernel, case, 1e-5 if dtype == torch.float32 else 1e-10)


@fuzz
@hypothesis.given(data=st.data())
def test_qcfs(kernel: Backend, data: st.DataObject) -> None:
    x = data.draw(tensors())
    theta = operand(data.draw, tuple(x.shape), True, False)
    levels = data.draw(st.sampled_from((1, 2, 3, 4, 8, 16, 1000, 0, 2.5)))
    phase = data.draw(st.sampled_from((0.5, 0.0, 0.3, -1.0, 0.75, 2.0, math.inf)))
    differ_on(kernel, maps.qcfs, x, theta, levels, phase=phase)


@fuzz
@hypothesis.given(data=st.data())
def test_codes(kernel: Backend, data: st.DataObject) -> None:
    """Time to first spike and back, bit planes."""
    x = data.draw(tensors())
    theta = operand(data.draw, tuple(x.shape), True, False)
    T = data.draw(st.sampled_from((1, 2, 5, 8, 15, 16, 31, 255, 256, 0, -1)))
    differ_on(kernel, maps.ttfs_encode, x, theta, T, data.draw(st.booleans()))
    small = T if 1 <= T <= 16 else data.draw(st.sampled_from((3, 17, 40)))
    differ_on(kernel, maps.bit_planes, x, theta, small, data.draw(st.booleans()))
    kind = data.draw(st.sampled_from((torch.uint8, torch.int16, torch.int32)))
    times = torch.randint(-40 if kind.is_signed else 0, 120, x.shape).to(kind)
    times = laid_out(times, data.draw(st.sampled_from(LAYOUTS)))
    differ_on(kernel, maps.ttfs_decode, times, theta, T, data.draw(st.sampled_from(DTYPES)))


@fuzz
@hypothesis.given(data=st.data())
def test_bits(kernel: Backend, data: st.DataObject) -> None:
    """Packing, unpacking with weights, counting."""
    draw, T = data.draw, data.draw(st.sampled_from((0, 1, 7, 8, 9, 16, 17, 32, 33, 70)))
    x = draw(tensors(lead=(T,)))
    if draw(st.booleans()):
        x = (x > 0).to(draw(st.sampled_from((torch.uint8, torch.bool, torch.int64))))
    differ_on(kernel, maps.pack_bits, x)
    kind = draw(st.sampled_from((torch.uint8, torch.int16, torch.int32, torch.int64)))
    low, high = (0, 256) if kind == torch.uint8 else (-(2**15), 2**15)
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    size = (draw(st.integers(0, 3)), *x.shape[1:])
    words = torch.randint(low, high, size, generator=g).to(kind)
    words = laid_out(words, draw(st.sampled_from(LAYOUTS)))
    differ_on(kernel, maps.popcount, words)
    amplitude = None if draw(st.booleans()) else operand(draw, tuple(x.shape[1:]), False, False)
    dtype = draw(st.sampled_from((*DTYPES, torch.uint8, torch.int8)))
    differ_on(kernel, maps.unpack_bits, words, T, dtype, amplitude)


@fuzz
@hypothesis.given(data=st.data())
def test_cumulative_max_pool(kernel: Backend, data: st.DataObject) -> None:
    draw = data.draw
    sizes = tuple(draw(st.integers(lo, hi)) for lo, hi in ((0, 9), (0, 3), (0, 3), (0, 9), (0, 9)))
    x = draw(tensors(shapes=(sizes,)))
    pair = st.one_of(st.integers(0, 4), st.tuples(st.integers(1, 4), st.integers(1, 4)))
    kernel_size = draw(pair)
    given = {
        "stride": draw(st.one_of(st.none(), pair)),
        "padding": draw(st.one_of(st.just(0), st.integers(-1, 2))),
        "dilation": draw(st.integers(1, 3)),
        "ceil_mode": draw(st.booleans()),
    }
    differ_on(kernel, maps.cumulative_max_pool, x, kernel_size, **given)


@fuzz
@hypothesis.given(data=st.data())
def test_statistics(kernel: Backend, data: st.DataObject) -> None:
    """Errors of candidate thresholds, histograms that are added to in place."""
    draw = data.draw
    channels, n, bins = draw(st.integers(0, 3)), draw(st.integers(0, 70)), draw(st.integers(0, 9))
    x = draw(tensors(shapes=((channels, n),)))
    g = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    candidates = torch.rand(channels, draw(st.integers(0, 5)), generator=g) + 0.01
    candidates = candidates.to(draw(st.sampled_from(DTYPES)))
    fraction = draw(st.sampled_from((0.0, 0.5, -1.0, math.nan)))
    differ_on(kernel, maps.mmse_errors, x, candidates, draw(st.integers(0, 40)), fraction)
    scale = torch.rand(channels, generator=g, dtype=torch.float64) + draw(
        st.sampled_from((0.1, 5.0, 1e300, -1.0))
    )

    def updated(values: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        counts = torch.full((channels, bins), 2, dtype=torch.int64, device=values.device)
        sums = torch.full((channels, bins), 0.5, dtype=torch.float64, device=values.device)
        maps.histogram_update(counts, sums, values, scale)
        return counts, sums

    differ_on(kernel, updated, x, scale)


@fuzz
@hypothesis.given(data=st.data())
def test_dsr_backward(kernel: Backend, data: st.DataObject) -> None:
    draw, T = data.draw, data.draw(st.sampled_from((0, 1, 2, 5, 9)))
    x = draw(tensors(lead=(T,)))
    grad = laid_out(values("any", x.shape, 5).to(x.dtype), draw(st.sampled_from(LAYOUTS)))
    theta = operand(draw, tuple(x.shape[1:]), True, False)
    given = draw(
        st.sampled_from(({}, {"kind": "lif", "tau": 2.0, "dt": 0.5}, {"kind": "lif", "tau": -1.0}))
    )
    differ_on(kernel, maps.dsr_backward, x, grad, theta, **given)


def test_the_comparison_finds_a_difference(kernel: Backend) -> None:
    """What the fuzz tests rest on."""

    def wrong(x: Tensor) -> Tensor:
        return x + (backends.get_backend() != "reference")

    def refuses(x: Tensor) -> Tensor:
        if backends.get_backend() == "reference":
            return x
        raise ValueError("this is refused by the kernel only")

    if kernel.name == "reference":
        pytest.skip("nothing else is there")
    for bad in (wrong, refuses):
        with pytest.raises(AssertionError):
            differ_on(kernel, bad, torch.zeros(3))
