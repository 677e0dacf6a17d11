"""The fused convolution: its reference everywhere, its kernel in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import fused_conv_cases as cases
import pytest
import torch
import torch.nn.functional as F
from fused_conv_cases import Case
from support import PURE, in_a_process

from snnkernels import functional
from snnkernels.kernels import fused_conv_tiles as tiles
from snnkernels.kernels import reference
from snnkernels.kernels.fused_conv import (
    FusedConv,
    NotFusible,
    fused_conv,
    fused_conv_reference,
    why_not,
)

INT8 = torch.int8
TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not TRITON, reason="Triton is not installed (pip install triton)")
once = pytest.mark.skipif(PURE, reason="SNNKERNELS_TEST_PURE=1: the same with the extension")


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=cases.start) as pool:
        yield pool


# ---- the reference: convolution, then neurons ----------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pool", [1, 2])
def test_reference_is_conv2d_and_if(dtype: torch.dtype, pool: int) -> None:
    case = Case(
        dtype, T=9, size=(7, 9), stride=(2, 1), padding=(1, 2), pool=pool, residual=torch.uint8,
        scaled=True, spikes=torch.uint8,
    )  # fmt: skip
    spikes, layer, given = cases.made(case)
    wide = torch.float64 if dtype == torch.int8 else torch.float32
    x = spikes.permute(0, 1, 4, 2, 3).to(wide)
    if pool == 2:
        H, W = (n // 2 * 2 for n in x.shape[-2:])
        x = x[..., :H, :W].unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).sum((4, 6))
    x = F.conv2d(
        x.flatten(0, 1), layer.weight.permute(0, 3, 1, 2).to(wide), None, layer.stride,
        layer.padding,
    ).unflatten(0, (case.T, -1))  # fmt: skip
    x = x + layer.bias[:, None, None].to(wide)
    added = given["residual"].to(wide) * given["residual_scale"].to(wide)
    x = x + added.permute(0, 1, 4, 2, 3)
    want, v = functional.if_multi_step(
        x, layer.v_init.to(wide), layer.threshold.to(wide), channel_dim=1
    )[:2]
    got = fused_conv_reference(spikes, layer, count=True, v_out=True, **given)
    assert torch.equal(got.spikes, want.permute(0, 1, 3, 4, 2).to(torch.uint8))
    assert torch.equal(got.v, v.permute(0, 2, 3, 1).to(layer.state))
    assert torch.equal(got.count, got.spikes.sum(0, dtype=torch.int32))
    assert 0.05 < float(got.spikes.float().mean()) < 0.95
    packed = fused_conv_reference(spikes, layer, output="packed", **given).spikes
    assert torch.equal(reference.unpack(packed, case.T).to(torch.uint8), got.spikes)


def test_spikes_of_a_mean_are_those_of_the_sum_with_four_times_theta() -> None:
    g = torch.Generator().manual_seed(1)
    spikes = (torch.rand(8, 2, 6, 6, 16, generator=g) < 0.4).to(torch.uint8)
    weight = torch.randint(-20, 20, (8, 16, 3, 3), generator=g, dtype=torch.int8)
    layer = FusedConv.of(weight, 4 * 30, v_init=4 * 15, pool=2)
    x = F.avg_pool2d(spikes.flatten(0, 1).permute(0, 3, 1, 2).double(), 2)
    x = F.conv2d(x, weight.double()).unflatten(0, (8, 2))
    want = functional.if_multi_step(x, 15.0, 30.0)[0]
    got = fused_conv_reference(spikes, layer).spikes
    assert torch.equal(got.permute(0, 1, 4, 2, 3).double(), want)


def test_carrying_v_is_one_call() -> None:
    spikes, layer, _ = cases.made(Case(torch.int8, T=11))
    whole = fused_conv_reference(spikes, layer, v_out=True)
    first = fused_conv_reference(spikes[:4], layer, v_out=True)
    rest = fused_conv_reference(spikes[4:], layer, v=first.v, v_out=True)
    assert torch.equal(torch.cat([first.spikes, rest.spikes]), whole.spikes)
    assert torch.equal(rest.v, whole.v)


# ---- the kernel, interpreted ---------------------------------------------------------------------


@needs_triton
@once
@pytest.mark.parametrize("T", range(1, 34))
def test_int8_is_the_reference_bit_for_bit(interpreter: ProcessPoolExecutor, T: int) -> None:
    case = cases.sampled(torch.int8, T, seed=T)
    assert interpreter.submit(cases.check, case).result() == 0, case


NAMED = {
    "7x7, stride 2": {
        "kernel": (7, 7), "stride": (2, 2), "padding": (3, 3), "size": (9, 7), "C": 3,
    },
    "dilation": {"dilation": (2, 2), "padding": (2, 2)},
    "linear": {"kernel": None, "C": 70, "N": 33, "residual": torch.uint8, "constant": True},
    "pool, odd size": {"pool": 2, "size": (9, 11), "spikes": torch.uint8},
    "channels in blocks": {"C": 40, "N": 33, "B": 1, "size": (4, 4)},
    "words of 32 steps": {"T": 33, "output": "packed", "size": (3, 3), "tile": (4, 4, 16, 32)},
    "the tile of the table": {"C": 32, "tile": None},
    "nothing but counts": {"output": None, "bias": False, "strict": True},
    "everything": {
        "T": 11, "residual": torch.uint8, "scaled": True, "full_v": True, "output": "packed",
        "pool": 2, "size": (8, 6), "stride": (1, 2),
    },
}  # fmt: skip


@needs_triton
@once
@pytest.mark.parametrize("name", NAMED)
def test_int8_named(interpreter: ProcessPoolExecutor, name: str) -> None:
    case = Case(torch.int8, **{"T": 8, "B": 1, **NAMED[name]})
    assert interpreter.submit(cases.check, case).result() == 0


@needs_triton
@once
@pytest.mark.parametrize("seed", range(12))
def test_float16_within_its_band(interpreter: ProcessPoolExecutor, seed: int) -> None:
    case = cases.sampled(torch.float16, (1, 3, 4, 7, 8, 12, 16, 33)[seed % 8], seed=100 + seed)
    flips = interpreter.submit(cases.check, case).result()
    assert flips <= 2  # of thousands of decisions


@needs_triton
@once
def test_nothing_to_do(interpreter: ProcessPoolExecutor) -> None:
    for changed in ({"T": 0}, {"T": 0, "kernel": None, "full_v": True}, {"T": 3, "B": 0}):
        for output in (torch.uint8, "packed"):
            case = Case(torch.int8, **{"T": 1, **changed}, output=output)
            assert interpreter.submit(cases.check, case).result() == 0


# ---- the kernel, on a device ---------------------------------------------------------------------

LARGE = {"B": 8, "size": (16, 16), "C": 128, "N": 192, "tile": None}


def check_on_the_device(case: Case, u: float = 2.0**-24) -> int:
    reason = why_not("cuda", case.dtype)
    if reason:
        pytest.skip(reason)
    return cases.check(case, lambda tensor: tensor.cuda(), u)


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 2, 4, 7, 8, 12, 32, 33])
def test_int8_on_the_device(T: int) -> None:
    assert check_on_the_device(replace(cases.sampled(INT8, T, seed=T), tile=None)) == 0
    assert check_on_the_device(Case(INT8, T, residual=torch.uint8, scaled=True, **LARGE)) == 0
    assert check_on_the_device(Case(INT8, T, pool=2, output="packed", **LARGE)) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 4, 8, 33])
def test_floats_on_the_device(dtype: torch.dtype, T: int) -> None:
    # Tensor cores cut off what they add: twice a rounding, and another for the sum of a block.
    for case in (Case(dtype, T, residual=dtype, **LARGE), Case(dtype, T, pool=2, **LARGE)):
        flips = check_on_the_device(case, u=2.0**-22)
        assert flips < 1e-4 * T * 8 * 16 * 16 * 192


@pytest.mark.gpu
def test_float8_on_the_device() -> None:
    case = Case(torch.float8_e4m3fn, 8, **LARGE)
    if why_not("cuda", case.dtype):
        pytest.skip(why_not("cuda", case.dtype))
    spikes, layer, _ = cases.made(case)
    want = fused_conv_reference(spikes, layer).spikes
    there = {n: getattr(layer, n).cuda() for n in ("weight", "threshold", "v_init", "bias")}
    got = fused_conv(spikes.cuda(), replace(layer, **there)).spikes
    assert float((got.cpu() != want).float().mean()) < 0.01


# ---- tiles ---------------------------------------------------------------------------------------


def test_steps_at_once_waste_little() -> None:
    assert [tiles.steps_for(T) for T in (0, 1, 2, 3, 4, 5, 8, 9, 12, 13, 16, 32, 33)] == [
        1, 1, 2, 4, 4, 8, 8, 4, 4, 8, 8, 8, 4,
    ]  # fmt: skip
    assert [tiles.inner_for(C, 64, 16) for C in (3, 16, 48, 64, 96, 128, 512)] == [
        16, 16, 16, 64, 32, 64, 64,
    ]  # fmt: skip


def test_tiles_by_shape() -> None:
    wide = tiles.tile_for(64 * 32 * 32, 128, 128, 8, torch.int8)
    assert wide == tiles.Tile(8, 16, 128, 128, 8, 3, 128)
    assert tiles.tile_for(64 * 32 * 32, 64, 64, 8, torch.bfloat16).channels == 64
    # One image of a deep layer: small tiles, for as many blocks as there can be.
    small = tiles.tile_for(16, 512, 512, 8, torch.bfloat16)
    assert (small.positions, small.channels) == (8, 32)
    assert tiles.tile_for(10, 10, 512, 4, torch.int8).steps == 4
    for M in (1, 50, 5000, 500_000):
        for N in (1, 10, 64, 100, 1000):
            for T in range(1, 34):
                tile = tiles.tile_for(M, N, 64, T, torch.int8)
                assert tile.steps * tile.positions in (64, 128)


# ---- refusals ------------------------------------------------------------------------------------

CONV = torch.ones(8, 4, 3, 3, dtype=torch.int8)


@pytest.mark.parametrize(
    ("weight", "given", "says"),
    [
        (CONV, {"groups": 2}, "groups=2"),
        (CONV.float(), {}, "float32"),
        (CONV, {"pool": 3}, "pool=3"),
        (CONV, {"threshold": torch.ones(8, 4, 4)}, "threshold of shape"),
    ],
)
def test_what_is_not_fused_says_so(weight: Any, given: dict[str, Any], says: str) -> None:
    with pytest.raises(NotFusible, match=says):
        FusedConv.of(weight, **{"threshold": 1, **given})


@pytest.mark.parametrize(
    ("weight", "given", "says"),
    [
        (CONV[0], {}, "weight has shape"),
        (CONV[:0], {}, "is empty"),
        (CONV, {"threshold": 0}, "positive"),
        (CONV.half(), {"threshold": float("inf")}, "finite"),
        (CONV, {"threshold": 0.5}, "threshold must hold whole numbers"),
        (CONV, {"bias": torch.full((8,), 2**40)}, "bias must hold whole numbers of int32"),
        (CONV, {"v_init": torch.ones(7)}, "v_init has 7 numbers"),
        (CONV, {"stride": 0}, "stride=0"),
        (CONV, {"padding": (1, 2, 3)}, "padding="),
        (CONV[:, :, 0, 0], {"stride": 2}, "a linear layer"),
    ],
)
def test_bad_layers_are_refused(weight: Any, given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        FusedConv.of(weight, **{"threshold": 1, **given})


SPIKES = torch.zeros(2, 1, 5, 5, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("spikes", "given", "says"),
    [
        (SPIKES[0], {}, "spikes has shape"),
        (SPIKES[..., :3], {}, "C = 4"),
        (SPIKES.transpose(2, 3), {}, "contiguous"),
        (SPIKES.float(), {}, "spikes has dtype"),
        (SPIKES[:, :, :2].contiguous(), {}, "smaller than the 3 x 3 kernel"),
        (SPIKES.to("meta"), {}, "spikes is on meta"),
        (SPIKES, {"output": torch.float32}, "output=torch.float32"),
        (SPIKES, {"output": "words"}, "output='words'"),
        (SPIKES, {"residual": torch.zeros(2, 1, 3, 3, 7, dtype=torch.uint8)}, "residual has shape"),
        (SPIKES, {"residual": torch.zeros(2, 1, 3, 3, 8)}, "residual has dtype"),
        (SPIKES, {"residual_scale": torch.ones(8)}, "without a residual"),
        (SPIKES, {"v": torch.zeros(1, 3, 3, 8)}, "v has dtype"),
        (SPIKES, {"v": torch.zeros(1, 8, 3, 3).permute(0, 2, 3, 1).int()}, "v must be contiguous"),
    ],
)
def test_bad_calls_are_refused(spikes: Any, given: dict[str, Any], says: str) -> None:
    layer = FusedConv.of(CONV, 3)
    for run in (fused_conv, fused_conv_reference):
        with pytest.raises(ValueError, match=says):
            run(spikes, layer, **given)


def test_sums_beyond_int32_are_refused() -> None:
    layer = FusedConv.of(torch.ones(4, 25_000, dtype=torch.int8), 3)
    fused_conv_reference(torch.zeros(600, 1, 25_000, dtype=torch.uint8), layer)
    with pytest.raises(ValueError, match=r"T=700 steps of 25000 .* can leave int32"):
        fused_conv_reference(torch.zeros(700, 1, 25_000, dtype=torch.uint8), layer)


def test_sizes_beyond_32_bits_are_refused() -> None:
    layer = FusedConv.of(CONV, 3)
    layer = replace(layer, weight=layer.weight.to("meta"))
    for B, size in ((2**21, 40), (1, 2**15)):
        spikes = torch.empty(1, B, size, size, 4, dtype=torch.uint8, device="meta")
        with pytest.raises(ValueError, match=rf"{B} images of {size} x {size} x 4 spikes"):
            fused_conv(spikes, layer)


def test_without_triton_all_but_the_launch_works() -> None:
    """As on an install for CPUs: importing Triton is an error here."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, snnkernels\n"
        "from snnkernels.kernels.fused_conv import *\n"
        "layer = FusedConv.of(torch.ones(2, 4, 3, 3, dtype=torch.int8), 3)\n"
        "spikes = torch.ones(2, 1, 3, 3, 4, dtype=torch.uint8)\n"
        "print(fused_conv_reference(spikes, layer, count=True).count.tolist(), why_not('cpu'))\n"
        "try: fused_conv(spikes, layer)\n"
        "except RuntimeError as error: print(error)\n"
    )
    done = in_a_process(code)
    assert done.returncode == 0, done.stderr
    reason = "Triton is not installed (pip install triton)"
    assert done.stdout.splitlines() == [
        f"[[[[2, 2]]]] {reason}", f"fused_conv cannot run on cpu: {reason}",
    ]  # fmt: skip


def test_a_cpu_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert why_not("cpu") == (
        "Triton has no code for cpu devices"
        if TRITON
        else "Triton is not installed (pip install triton)"
    )
    with pytest.raises(RuntimeError, match="fused_conv cannot run on cpu: Triton"):
        fused_conv(SPIKES, FusedConv.of(CONV, 3))
