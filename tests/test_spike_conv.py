"""The convolution of packed spikes: every SIMD level against plain PyTorch, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import PURE, at_level, extension
from torch import Tensor

from snnkernels.kernels import backends
from snnkernels.kernels import spike_maps as module
from snnkernels.kernels.spike_conv import spike_conv
from snnkernels.kernels.spike_conv_reference import _weight
from snnkernels.kernels.spike_maps import (
    PANEL,
    Branch,
    Layer,
    SpikeMap,
    branches_of,
    lanes_of,
)

LEVELS = [] if PURE or extension("_cpu") is None else extension("_cpu").isas()


@pytest.fixture(params=LEVELS or ["reference"])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """One SIMD level of the extension after the other."""
    with at_level(request.param):
        yield request.param


def dyadic(rng: random.Random, *shape: int, low: int = -8, high: int = 8) -> Tensor:
    """Multiples of 1/8, whose sums are exact in float32."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    return torch.randint(low, high + 1, shape, generator=generator) / 8


def some_spikes(rng: random.Random, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    return (torch.rand(shape, generator=generator) < rng.choice([0.05, 0.3, 0.9])).float()


def padded(value: Tensor, panels: int, fill: float) -> Tensor:
    return F.pad(value, (0, panels * PANEL - value.shape[-1]), value=fill)


def case(
    seed: int, int16: bool = False, whole: bool = False
) -> tuple[list[tuple[SpikeMap, Branch]], Layer, dict]:
    """A random layer: any kernel, stride, padding, dilation, groups, pools, tails."""
    rng = random.Random(seed)
    one = 8 if whole else 1  # eighths, or whole numbers
    never = 2**31 - 1 if whole else torch.inf
    while True:
        B, T = rng.choice([1, 2, 3]), rng.choice([1, 2, 4, 5, 16, 31, 33, 70])
        inner, out = rng.choice([1, 3, 16, 63, 64, 65, 130]), rng.choice([1, 10, 20, 64, 70, 128])
        H, W = rng.randint(3, 9), rng.randint(3, 9)
        kernel = rng.choice([(1, 1), (3, 3), (2, 3), (5, 5)])
        groups = rng.choice([1, 1, 1, 2, 5])
        if rng.random() < 0.2:
            groups = inner = out
        elif inner % groups or out % groups:
            groups = 1
        geometry: dict[str, Any] = {
            "stride": rng.choice([(1, 1), (2, 1), (2, 2), (3, 3)]),
            "padding": rng.choice([(0, 0), (1, 1), (2, 1)]),
            "dilation": rng.choice([(1, 1), (1, 1), (2, 2), (1, 3)]),
            "pool": rng.choice([(1, 1), (1, 1), (2, 2), (3, 2)]),
            "either": rng.random() < 0.2,
        }
        weight = dyadic(rng, out, inner // groups, *kernel) * one
        branches = branches_of(weight, groups=groups, int16=int16, whole=whole, **geometry)
        rows, columns = branches[0].size(H, W)
        if rows >= 1 and columns >= 1:
            break
    spikes = SpikeMap.of(some_spikes(rng, T, B, inner, H, W))
    sources = [(spikes, branch) for branch in branches]
    panels = -(-out // PANEL)
    if rng.random() < 0.4:  # a residual
        other = SpikeMap.of(some_spikes(rng, T, B, out, rows, columns))
        own = dyadic(rng, out, 1, 1, 1) * one
        sources += [(other, b) for b in branches_of(own, groups=out)]
    side = rng.choice([1, 1, 2]) if min(rows, columns) >= 2 else 1
    lanes = lanes_of(out, side, [(m.words.shape[2], b) for m, b in sources])
    if rng.random() < 0.2:
        lanes = PANEL  # is right as well
    sources = [(m, b.narrow(lanes)) for m, b in sources]
    shape = (rows // side, columns // side, out) if rng.random() < 0.3 else (out,)
    theta = dyadic(rng, *shape, low=2, high=20) * one
    start = theta / 2 if rng.random() < 0.5 else dyadic(rng, *shape) * one
    if whole:
        theta, start = theta.int(), start.int()
    layer = Layer(
        panels,
        padded(dyadic(rng, out) * one, panels, 0.0) if rng.random() < 0.5 else None,
        padded(theta, panels, never), padded(start, panels, 0), side, rng.random() < 0.3,
        lanes,
    )  # fmt: skip
    current = padded(dyadic(rng, B, rows, columns, out) * one, panels, 0.0)
    ends = sorted(rng.sample(range(1, T + 1), min(T, 3)))
    asked = {"current": current if rng.random() < 0.3 else None, "count_at": ends, "currents": True}
    return sources, layer, asked


def by_reference(*args: Any, **kwargs: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    with backends.use_backend("reference"):
        return spike_conv(*args, **kwargs)


@pytest.mark.parametrize("seed", range(72))
def test_every_level_is_the_reference(level: str, seed: int) -> None:
    # With 16 bits as well: sums of whole numbers are exact, and what follows is in one order. And
    # in whole numbers.
    sources, layer, asked = case(seed, int16=seed % 4 == 3, whole=seed % 4 == 1)
    got = spike_conv(sources, layer, **asked)
    want = by_reference(sources, layer, **asked)
    for name, a, b in zip(("words", "counts", "currents"), got, want, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b), f"{name}: {int((a != b).sum())} of {a.numel()} differ"


def test_cases_of_all_lanes() -> None:
    found = {case(seed)[1].lanes for seed in range(72)}
    assert found == {16, 32, PANEL}


@pytest.mark.parametrize(("channels", "side", "W", "want"), [
    (1, 1, 8, 16), (16, 1, 8, 16), (17, 1, 8, 32), (32, 1, 8, 32), (33, 1, 8, 64),
    (16, 2, 8, 64), (16, 1, 1024, 16), (16, 1, 1025, 64),
])  # fmt: skip
def test_lanes_by_size(channels: int, side: int, W: int, want: int) -> None:
    branches = branches_of(torch.zeros(channels, 3, 3, 3))
    assert lanes_of(channels, side, [(W, b) for b in branches]) == want


def test_narrow_and_back() -> None:
    torch.manual_seed(0)
    (branch,) = branches_of(torch.randn(20, 70, 2, 3))
    narrow = branch.narrow(32)
    assert narrow.weights.shape == (2, 128, 3, 32)
    assert torch.equal(narrow.wide().weights, branch.weights)
    assert branch.narrow(PANEL) is branch


def test_the_reference_is_a_convolution_and_the_neuron_of_the_library() -> None:
    torch.manual_seed(0)
    spikes = (torch.rand(6, 2, 10, 7, 5) < 0.3).float()
    weight = torch.randint(-4, 5, (12, 5, 3, 2)) / 4
    sources = [
        (SpikeMap.of(spikes), b)
        for b in branches_of(weight, stride=(2, 1), padding=(1, 1), groups=2)
    ]
    theta = padded(torch.arange(1, 13) / 4, 1, torch.inf)
    layer = Layer(1, None, theta, padded(theta[:12] / 2, 1, 0.0))
    words, counts, currents = spike_conv(sources, layer, count_at=(2, 6), currents=True)
    x = F.conv2d(spikes.flatten(0, 1), weight, None, (2, 1), (1, 1), 1, 2).unflatten(0, (6, 2))
    assert words is not None
    assert counts is not None
    assert currents is not None
    assert torch.equal(currents[..., :12], x.permute(0, 1, 3, 4, 2))
    from snnkernels import functional

    fired, _, _ = functional.if_multi_step(x, theta[:12] / 2, theta[:12], channel_dim=1)
    assert torch.equal(SpikeMap(words, 12).dense(), fired)
    assert torch.equal(counts[0, ..., :12].permute(0, 3, 1, 2), fired[:2].sum(0).int())
    assert torch.equal(counts[1, ..., :12].permute(0, 3, 1, 2), fired.sum(0).int())


@pytest.mark.parametrize("lanes", [16, PANEL])
def test_windows_of_one_have_a_stride(level: str, lanes: int) -> None:
    spikes = (torch.rand(3, 2, 5, 7, 9) < 0.4).float()
    weight = torch.randint(-4, 5, (6, 5, 3, 3)) / 4
    (branch,) = branches_of(weight, padding=(1, 1), pool_stride=(2, 3))
    layer = Layer(1, lanes=lanes)
    _, _, got = spike_conv(
        [(SpikeMap.of(spikes), branch.narrow(lanes))], layer, spikes=False, currents=True
    )
    x = F.conv2d(spikes[..., ::2, ::3].flatten(0, 1), weight, padding=1).unflatten(0, (3, 2))
    assert got is not None
    assert torch.equal(got[..., :6], x.permute(0, 1, 3, 4, 2))


def test_maps_pack_and_unpack() -> None:
    spikes = (torch.rand(3, 2, 70, 4, 5) < 0.5).float()
    packed = SpikeMap.of(spikes)
    assert packed.words.shape == (2, 4, 5, 3, 2)
    assert packed.words.dtype == torch.int64
    assert torch.equal(packed.dense(), spikes)
    assert packed.T == 3


def real_layer(batch: int = 6) -> tuple[list[tuple[SpikeMap, Branch]], Layer]:
    torch.manual_seed(1)
    spikes = SpikeMap.of((torch.rand(20, batch, 96, 9, 9) < 0.2).float())
    weight = torch.randn(80, 96, 3, 3) / 20
    theta = torch.rand(128) + 0.5
    theta[80:] = torch.inf
    v_init = padded(theta[:80] / 2, 2, 0.0)
    sources = [(spikes, b) for b in branches_of(weight, padding=(1, 1))]
    return sources, Layer(2, None, theta, v_init)


def test_results_depend_on_no_thread_and_no_batch(level: str, threads: None) -> None:
    sources, layer = real_layer()
    found = []
    for n in (1, 2, 3, 7):
        torch.set_num_threads(n)
        found.append(spike_conv(sources, layer, count_at=(20,)))
    for words, counts, _ in found[1:]:
        assert torch.equal(words, found[0][0])
        assert torch.equal(counts, found[0][1])
    alone = [(SpikeMap(m.words[2:3].contiguous(), m.channels), branch) for m, branch in sources]
    words, _, _ = spike_conv(alone, layer)
    assert torch.equal(words, found[0][0][2:3])


def test_real_weights_flip_only_where_the_order_of_a_sum_decides(level: str) -> None:
    sources, layer = real_layer()
    words, _, currents = spike_conv(sources, layer, currents=True)
    _, _, other = by_reference(sources, layer, currents=True)
    assert words is not None
    assert currents is not None
    assert other is not None
    weights = sources[0][1].weights.abs().sum((1, 2)).flatten()
    bound = 96 * 9 * 2**-24 * weights
    assert bool(((currents - other).abs() <= bound).all())
    # Given its own currents the kernel's neurons are the library's.
    v, fired = layer.v_init.expand(currents.shape[1:]).clone(), []
    for step in currents:
        v = v + step
        s = v >= layer.threshold
        v = torch.where(s, v - layer.threshold, v)
        fired.append(s)
    want = SpikeMap.of(torch.stack(fired).permute(0, 1, 4, 2, 3))
    assert torch.equal(words, want.words)


def test_no_sum_of_16_bits_overflows(level: str) -> None:
    torch.manual_seed(2)
    for pool in ((1, 1), (2, 2)):
        weight = torch.rand(70, 130, 3, 3)  # all of one sign: the largest sums
        (branch,) = branches_of(weight, int16=True, pool=pool)
        ones = SpikeMap.of(torch.ones(1, 1, 130, 3 * pool[0], 3 * pool[1]))
        _, _, got = spike_conv([(ones, branch)], Layer(2), spikes=False, currents=True)
        want = weight.double().sum((1, 2, 3)) * pool[0] * pool[1]
        assert got is not None
        error = (got[0, 0, 0, 0, :70] - want).abs() / want
        assert float(error.max()) < 0.5 * 130 * 9 * pool[0] * pool[1] / 30000


def test_weights_of_16_bits_are_off_by_at_most_half_a_unit() -> None:
    torch.manual_seed(3)
    weight = torch.randn(64, 100, 3, 3)
    (branch,) = branches_of(weight, int16=True)
    assert branch.scale is not None
    assert branch.weights.dtype == torch.int16
    unit = branch.scale.flatten().view(-1, 1, 1, 1)
    back = _weight(branch, torch.float32)[:, :100] * unit
    assert bool(((back - weight).abs() <= 0.5001 * unit).all())
    largest = torch.maximum(weight.clamp(min=0).sum((1, 2, 3)), -weight.clamp(max=0).sum((1, 2, 3)))
    assert bool((branch.scale.flatten() <= 1.05 * largest / 32000).all())


def test_nan_and_infinity(level: str) -> None:
    current = torch.zeros(1, 1, 1, 64)
    current[..., 0], current[..., 1], current[..., 2] = torch.nan, torch.inf, -torch.inf
    layer = Layer(1, None, torch.ones(64), torch.full((64,), 0.5))
    _, counts, _ = spike_conv([], layer, current=current, count_at=(5,), T=5)
    assert counts is not None
    assert counts.flatten()[:4].tolist() == [0, 5, 0, 0]


@pytest.mark.skipif(not LEVELS, reason="needs the CPU extension")
def test_layout_of_the_structs() -> None:
    layout = extension("_cpu").SPIKE_LAYOUT
    for record in (module.BRANCH, module.CONV):
        fields = {name: record.dtype.fields[name][1] for name in record.dtype.names}
        want = {k: v for k, v in layout[record.name].items() if k}
        if record is module.CONV:
            at = want.pop("count_at")
            want.update({f"count_at{i}": at + 8 * i for i in range(module.TIMES)})
        assert fields == want
        assert record.dtype.itemsize == layout[record.name][""]


@pytest.mark.skipif(not LEVELS, reason="needs the CPU extension")
def test_a_struct_that_makes_no_sense_is_refused() -> None:
    sources, _ = real_layer()
    run = extension("_cpu").spike_conv
    with pytest.raises(ValueError, match="bytes, expected"):
        run(b"", b"")
    good = {"B": 1, "T": 1, "OH": 9, "OW": 9, "panels": 2, "pool": 1, "lanes": PANEL}
    spikes, branch = sources[0]
    with pytest.raises(ValueError, match="OH x OW"):
        run(module.CONV.pack(**{**good, "OH": 8}), branch.pack(spikes.words))
    with pytest.raises(ValueError, match="panels"):
        run(module.CONV.pack(**{**good, "panels": 1}), branch.pack(spikes.words))
    with pytest.raises(ValueError, match="threshold and v_init"):
        run(module.CONV.pack(**good, threshold=1), b"")
    with pytest.raises(ValueError, match="whole number"):
        run(module.CONV.pack(**good), b"x")
    with pytest.raises(ValueError, match="lanes out of range"):
        run(module.CONV.pack(**{**good, "lanes": 16}), b"")
    with pytest.raises(ValueError, match="other lanes than the layer"):
        run(module.CONV.pack(**{**good, "panels": 2}), replace(branch, lanes=32).pack(spikes.words))
    with pytest.raises(ValueError, match="rising"):
        run(module.CONV.pack(**good, times=1, count_at0=2), b"")


def test_maps_that_do_not_fit_are_refused() -> None:
    sources, layer = real_layer()
    spikes, branch = sources[0]
    fewer = SpikeMap(spikes.words[:2].contiguous(), spikes.channels)
    with pytest.raises(ValueError, match=r"a source must be a contiguous torch.int64 tensor of"):
        spike_conv([sources[0], (fewer, branch)], layer)
    apart = SpikeMap(spikes.words.transpose(1, 2), spikes.channels)
    with pytest.raises(ValueError, match="a source must be"):
        spike_conv([(apart, branch)], layer)
    current = torch.zeros(1, 9, 9, 128)
    with pytest.raises(ValueError, match=r"current must be a .*\(6, 9, 9, 128\), got .*\(1, 9"):
        spike_conv(sources, layer, current=current)
    with pytest.raises(ValueError, match="current must be a contiguous"):
        spike_conv(sources, layer, current=torch.zeros(6, 9, 9, 128).bfloat16())
    with pytest.raises(ValueError, match="spikes must be"):
        spike_conv(sources, layer, spikes=torch.zeros(6, 9, 9, 19, 2, dtype=torch.int64))


def test_more_words_than_a_list_names(level: str) -> None:
    rng = random.Random(4)
    weight = dyadic(rng, 70, 20_000, 1, 1)
    spikes = SpikeMap.of(some_spikes(rng, 3, 2, 20_000, 1, 1))
    sources = [(spikes, b) for b in branches_of(weight)]
    assert len(sources) == 2
    _, _, got = spike_conv(sources, Layer(2), spikes=False, currents=True)
    want = torch.einsum("tbc,oc->tbo", spikes.dense().flatten(2), weight.flatten(1))
    assert got is not None
    assert torch.equal(got.flatten(2)[..., :70], want)
    # Each channel to itself has no list.
    each = dyadic(rng, 20_000, 1, 1, 1)
    (branch,) = branches_of(each, groups=20_000)
    _, _, got = spike_conv([(spikes, branch)], Layer(313), spikes=False, currents=True)
    assert got is not None
    assert torch.equal(got.flatten(2)[..., :20_000], spikes.dense().flatten(2) * each.flatten())


def test_16_bits_only_where_a_unit_is_small() -> None:
    weight = torch.randn(4, 70, 3, 3)
    assert branches_of(weight, int16=True)[0].scale is not None
    assert branches_of(weight, int16=True, pool=(4, 4))[0].scale is None
    assert branches_of(weight, int16=True, pool=(4, 4), either=True)[0].scale is not None
