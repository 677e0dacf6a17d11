"""The small kernels: bits of every implementation, worked examples, edges, gradients, errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import (
    DTYPES,
    LAYOUTS,
    Backend,
    assert_close,
    assert_same_bits,
    currents,
    dtype_id,
    from_values,
    generator,
    laid_out,
    moved,
)
from torch import Tensor

from snnkernels import maps
from snnkernels.kernels import backends
from snnkernels.kernels import maps as run
from snnkernels.kernels import maps_reference as reference
from snnkernels.kernels.maps.sums import summed_to

SHAPES = ((1,), (19,), (128,), (129,), (3, 5, 4), (2, 8, 4, 4), (0,), (3, 0, 2), ())
ODD = (math.nan, math.inf, -math.inf, -0.0, 0.0, 1e-45, -1e-45, 1e-310, 3e38, -3e38)
FORMS = ("number", "0-d", "channel", "position", "full", "runs")


def in_dtype(dtype: torch.dtype) -> torch.dtype:
    return reference.state_dtype(dtype)


def inputs(*shape: int, dtype: torch.dtype, seed: int = 0, layout: str = "contiguous") -> Tensor:
    """Half on a grid of 1/8, half normal, and odd values where there is room."""
    x = currents(*shape, seed=seed, dtype=torch.float64)
    flat = x.view(-1)
    if flat.numel() > 3 * len(ODD):
        flat[: len(ODD)] = torch.tensor(ODD, dtype=torch.float64)
    return laid_out(x.to(dtype), layout if shape else "contiguous")


def threshold_of(form: str, shape: tuple[int, ...], seed: int = 1) -> tuple[Any, dict[str, Any]]:
    """A threshold in the given form, and the keywords that go with it."""
    g = generator(seed)

    def draw(*size: int) -> Tensor:
        return 0.75 + 0.125 * torch.randint(0, 6, size, generator=g) + 0.01

    if form == "number":
        return draw(1).item(), {}
    if form == "0-d" or not shape:
        return draw(1).reshape(()), {}
    if form == "channel":
        dim = min(1, len(shape) - 1)
        return draw(shape[dim]), {"channel_dim": dim}
    if form == "position":
        return draw(*shape[1:]) if len(shape) > 1 else draw(*shape), {}
    if form == "runs" and len(shape) == 4:
        return draw(shape[0], 1, *shape[2:]), {}
    return draw(*shape), {}


def expanded(threshold: Any, keywords: dict[str, Any], shape: tuple[int, ...]) -> Tensor:
    """What every element should read, without snnkernels' own broadcasting."""
    if not isinstance(threshold, Tensor):
        return torch.full(shape, threshold, dtype=torch.float64)
    if "channel_dim" in keywords:
        behind = len(shape) - 1 - keywords["channel_dim"]
        threshold = threshold.reshape(-1, *(1 for _ in range(behind)))
    return torch.broadcast_to(threshold, shape)


def on(backend: Backend, *values: Any) -> list[Any]:
    return [moved(v, backend.device) for v in values]


CASES = [
    *((shape, "contiguous", form) for shape in SHAPES for form in ("number", "full")),
    *(((2, 8, 4, 4), "contiguous", form) for form in FORMS),
    *(((3, 5, 4), layout, "channel") for layout in LAYOUTS),
    ((70_001,), "contiguous", "number"),
    ((2, 300_000), "contiguous", "channel"),
]


def cases(function: Callable) -> Callable:
    """All cases in float32, every third of the small ones in each other dtype."""
    drawn = [(torch.float32, *case) for case in CASES]
    for i, dtype in enumerate(DTYPES[1:]):
        drawn += [(dtype, *case) for case in CASES[i:-2:3]]
    ids = [
        f"{dtype_id(dtype)}-{'x'.join(map(str, shape)) or '0-d'}-{layout}-{form}"
        for dtype, shape, layout, form in drawn
    ]
    return pytest.mark.parametrize(("dtype", "shape", "layout", "form"), drawn, ids=ids)(function)


# ---- qcfs --------------------------------------------------------------------------------------

WORKED = [(-0.3, 0.0), (0.2, 0.0), (0.25, 0.5), (0.9, 1.0), (1.74, 1.5), (1.75, 2.0), (2.5, 2.0)]


def composed(x: Tensor, th: Tensor, levels: int, phase: float, gradient: str) -> Tensor:
    """The activation as its authors compose it, with a straight-through floor."""

    def floor(y: Tensor) -> Tensor:
        return y + (torch.floor(y) - y).detach()

    if gradient == "clip_floor":
        return floor(clamp(x / th) * levels + phase) / levels * th
    return th * clamp(floor(x * levels / th + phase) / levels)


def clamp(y: Tensor) -> Tensor:
    """``torch.clamp(y, 0, 1)`` with its gradient up to torch 2.14: the ends belong to it."""
    return torch.where((y < 0) | (y > 1), y.detach().clamp(0, 1), y)


@cases
def test_qcfs_bits(
    level: Backend, shape: tuple[int, ...], layout: str, form: str, dtype: torch.dtype
) -> None:
    x = inputs(*shape, dtype=dtype, layout=layout)
    th, how = threshold_of(form, shape)
    for levels, phase in ((4, 0.5), (7, 0.0)):
        got = maps.qcfs(*on(level, x, th), levels, phase, **how)
        want = reference.qcfs(x.contiguous(), expanded(th, how, shape).to(dtype), levels, phase)
        assert_same_bits(got, want, f"L={levels}")


@pytest.mark.parametrize("gradient", ["clip_floor", "floor_clip"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_qcfs_gradient_bits(level: Backend, dtype: torch.dtype, form: str, gradient: str) -> None:
    """Gradients of every implementation are those of the reference, the threshold's too."""
    for shape in ((2, 8, 4, 4), (3, 1500), (129,)):
        x = currents(*shape, dtype=dtype)
        grad = currents(*shape, seed=5, dtype=dtype)
        th, how = threshold_of(form, shape)
        results = []
        for name in (level.name, "reference"):
            with backends.use_backend(name):
                device = level.device if name == level.name else "cpu"
                leaves = [moved(x, device).requires_grad_()]
                given = moved(th, device)
                if isinstance(th, Tensor):
                    given = given.detach().clone().requires_grad_()
                    leaves.append(given)
                out = maps.qcfs(leaves[0], given, 5, gradient=gradient, **how)
                results.append(torch.autograd.grad(out, leaves, moved(grad, device)))
        for got, want in zip(*results, strict=True):
            assert_same_bits(got, want, f"{shape}")


@pytest.mark.parametrize("gradient", ["clip_floor", "floor_clip"])
def test_qcfs_gradients_are_autograds(backend: Backend, gradient: str) -> None:
    x = (torch.rand(40, 6, dtype=torch.float64, generator=generator(3)) * 4 - 1).requires_grad_()
    th = (0.5 + torch.rand(6, dtype=torch.float64, generator=generator(4))).requires_grad_()
    grad = torch.randn(40, 6, dtype=torch.float64, generator=generator(5))
    want = torch.autograd.grad(composed(x, th, 4, 0.5, gradient), (x, th), grad)
    x2, th2 = (moved(t.detach(), backend.device).requires_grad_() for t in (x, th))
    out = maps.qcfs(x2, th2, 4, gradient=gradient, channel_dim=1)
    got = torch.autograd.grad(out, (x2, th2), moved(grad, backend.device))
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, 1e-12)


@pytest.mark.parametrize("gradient", ["clip_floor", "floor_clip"])
def test_qcfs_can_be_differentiated_again(gradient: str) -> None:
    x = torch.tensor([0.3, 0.9, 1.4, 3.0], dtype=torch.float64, requires_grad=True)
    th = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    weight = torch.ones(4, dtype=torch.float64, requires_grad=True)
    results = []
    for function in (lambda: maps.qcfs(x, th, 4, gradient=gradient),
                     lambda: composed(x, th, 4, 0.5, gradient)):  # fmt: skip
        first = torch.autograd.grad(function(), (x, th), weight, create_graph=True)
        results.append(torch.autograd.grad(sum(f.sum() for f in first), weight))
    assert_close(results[0][0], results[1][0], 1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_qcfs_rounds_its_phase_once(level: Backend, dtype: torch.dtype) -> None:
    """A phase that the dtype does not hold, at values where its rounding decides."""
    x = torch.cat([from_values([0.306640625]), torch.rand(4000, generator=generator(3))]).to(dtype)
    th = torch.cat([from_values([0.54296875]), 0.1 + torch.rand(4000, generator=generator(4))])
    for gradient in ("clip_floor", "floor_clip"):
        for phase in (0.3, 0.1, -0.7, 1e-9):
            results = []
            for name in (level.name, "reference"):
                with backends.use_backend(name):
                    device = level.device if name == level.name else "cpu"
                    leaves = [t.to(device, copy=True).requires_grad_() for t in (x, th)]
                    out = maps.qcfs(*leaves, 3, phase, gradient)
                    first = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
                    again = torch.autograd.grad(out.sum(), leaves, create_graph=True)
                    results.append((out.detach(), *first, *(g.detach() for g in again)))
            for got, want in zip(*results, strict=True):
                assert_same_bits(got, want, f"{phase}")
    # In bfloat16 0.3 is 0.30078125.
    if dtype == torch.bfloat16:
        one = maps.qcfs(x[:1].to(level.device), th[:1].to(level.device), 3, 0.3)
        assert one.item() == 0.36328125


def test_qcfs_worked_example(backend: Backend) -> None:
    z = moved(from_values([z for z, _ in WORKED]), backend.device)
    for gradient in ("clip_floor", "floor_clip"):
        assert maps.qcfs(z, 2.0, 4, gradient=gradient).tolist() == [a for _, a in WORKED]


def test_qcfs_where_the_gradient_passes(backend: Backend) -> None:
    x = from_values([-0.375, -0.25, -0.125, 0.0, 1.0, 2.0, 2.125, 2.25, 2.5, math.nan])
    for gradient, want in (
        ("clip_floor", [0, 0, 0, 1, 1, 1, 0, 0, 0, 0]),
        ("floor_clip", [0, 1, 1, 1, 1, 1, 1, 0, 0, 0]),
    ):
        leaf = moved(x.clone(), backend.device).requires_grad_()
        maps.qcfs(leaf, 2.0, 4, gradient=gradient).sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.tolist() == want


def test_thresholds_are_checked_as_they_are_read(backend: Backend) -> None:
    """What rounds to a positive finite number is allowed, and only that."""
    x = torch.ones(2, 3, device=backend.device)
    for dtype, smallest, largest in (
        (torch.float16, 2.0**-24, 65519.0),
        (torch.bfloat16, 2.0**-133, 3.39e38),
        (torch.float32, 2.0**-149, 3.4e38),
        (torch.float64, 5e-324, 1e308),
    ):
        for th in (smallest, largest):
            held = torch.tensor(th, dtype=torch.float64).to(dtype).item()
            given = torch.tensor(th, dtype=torch.float64, device=x.device)
            for one in (th, given):
                assert maps.qcfs(x.to(dtype) * held, one, 1).tolist() == [[held] * 3] * 2
        if dtype == torch.float64:
            for function in (maps.ttfs_encode, maps.bit_planes):
                function(x.double(), 1e-50, 3)
            maps.dsr_backward(x.double(), x.double(), 1e-50, "lif", 1e-50, 1e-50)


def test_qcfs_that_overflows_its_dtype_saturates(backend: Backend) -> None:
    x = moved(from_values([300.0, -300.0, 200.0], torch.float16), backend.device)
    assert maps.qcfs(x, 600.0, 255).tolist() == [600.0, 0.0, 200.0]


def test_qcfs_edges(backend: Backend) -> None:
    x = moved(from_values([math.nan, math.inf, -math.inf, -0.0]), backend.device)
    got = maps.qcfs(x, 2.0, 4).tolist()
    assert math.isnan(got[0])
    assert got[1:] == [2.0, 0.0, 0.0]


def test_qcfs_threshold_gradient_does_not_depend_on_threads(threads: None) -> None:
    x = torch.randn(1_000_003, generator=generator(0))
    grads = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        th = torch.tensor(0.7, requires_grad=True)
        maps.qcfs(x, th, 8).sum().backward()
        grads.append(th.grad)
    assert grads[0] == grads[1] == grads[2]


def test_qcfs_keeps_only_x() -> None:
    x = torch.randn(5, 6, requires_grad=True)
    th = torch.tensor(1.0, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        maps.qcfs(x, th, 4)
    assert sorted(t.numel() for t in kept) == [1, 30]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_qcfs_module_is_what_it_was(backend: Backend, dtype: torch.dtype) -> None:
    from snnkernels.conversion import QCFS

    x = inputs(2000, dtype=dtype).to(backend.device)
    for ceiling in (2.0, 1.7, 0.3):
        act = QCFS(5, ceiling).to(backend.device)
        lam = act.lam.detach().to(dtype)
        want = lam * torch.clamp(torch.floor(x * 5 / lam + 0.5) / 5, 0, 1)
        assert_same_bits(act(x).detach(), want)


# ---- cumulative max-pool -----------------------------------------------------------------------

POOLS = [
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 1, "padding": 1},
    {"kernel_size": (3, 2), "stride": (1, 2), "padding": (0, 1)},
    {"kernel_size": 2, "stride": 3, "ceil_mode": True},
    {"kernel_size": 3, "stride": 2, "dilation": 2, "padding": 1, "ceil_mode": True},
    {"kernel_size": (2, 3), "stride": (3, 2), "dilation": (3, 2)},
    {"kernel_size": (5, 4), "stride": 2, "padding": 2},
    {"kernel_size": 9, "padding": 4, "stride": 3},
    {"kernel_size": 1},
]


def geometry(pool: dict[str, Any]) -> tuple[Any, ...]:
    stride, ceil = pool.get("stride"), pool.get("ceil_mode", False)
    window = (pool["kernel_size"], stride, pool.get("padding", 0), pool.get("dilation", 1))
    return (*maps.pool_geometry(*window), ceil)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_pool_bits(level: Backend, pool: dict[str, Any], dtype: torch.dtype) -> None:
    for T, size in ((1, (9, 9)), (4, (9, 10)), (7, (11, 301))):
        x = inputs(T, 2, 3, *size, dtype=dtype, seed=T)
        want, _, peak = reference.cumulative_max_pool(x, *geometry(pool), None, None)
        given = x.to(level.device)
        got = maps.cumulative_max_pool(given, **pool)
        assert_same_bits(got, want)
        again, _, last = maps.pool_steps(given, *geometry(pool), None, None, True)
        assert_same_bits(again, want)
        assert_same_bits(last, peak, "peak")


@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_pool_in_pieces(level: Backend, pool: dict[str, Any]) -> None:
    x = inputs(6, 2, 3, 9, 11, dtype=torch.float32).to(level.device)
    whole = maps.cumulative_max_pool(x, **pool)
    first, total, peak = maps.pool_steps(x[:2], *geometry(pool), None, None, True)
    second, _, _ = maps.pool_steps(x[2:], *geometry(pool), total, peak, True)
    assert_same_bits(torch.cat([first, second]), whole)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pool_layouts(kernel: Backend, layout: str) -> None:
    x = laid_out(inputs(3, 2, 2, 6, 8, dtype=torch.float32), layout)
    got = maps.cumulative_max_pool(moved(x, kernel.device), 2)
    want = reference.cumulative_max_pool(x.contiguous(), *geometry(POOLS[0]), None, None)[0]
    assert_same_bits(got, want)


def test_pool_worked_example(backend: Backend) -> None:
    x = from_values([[1, 0, 0, 0], [0, 3, 0, 0], [0, -5, 0, 0]]).view(3, 1, 1, 2, 2)
    got = maps.cumulative_max_pool(moved(x, backend.device), 2)
    assert got.flatten().tolist() == [1.0, 2.0, -2.0]  # maxima of the sums: 1, 3, 1


def test_pool_edges(backend: Backend) -> None:
    nan = torch.zeros(2, 1, 1, 2, 4)
    nan[0, 0, 0, 1, 1] = math.nan
    got = maps.cumulative_max_pool(nan.to(backend.device), 2)
    assert got[..., 0].isnan().all()
    assert not got[..., 1].isnan().any()
    for shape in ((0, 2, 3, 4, 4), (3, 0, 3, 4, 4), (3, 2, 0, 4, 4)):
        empty = torch.zeros(shape, device=backend.device)
        assert maps.cumulative_max_pool(empty, 2).shape == (*shape[:3], 2, 2)
    signed = torch.full((1, 1, 1, 2, 2), -0.0).to(backend.device)
    assert math.copysign(1, maps.cumulative_max_pool(signed, 2).item()) == -1


def test_an_empty_map_has_no_maximum(backend: Backend) -> None:
    """Found by test_fuzz.py: padding made windows for it, and the kernel answered -inf."""
    for size in ((0, 0), (0, 4), (4, 0)):
        with pytest.raises(ValueError, match="H and W must be at least 1"):
            maps.cumulative_max_pool(torch.zeros(1, 1, 1, *size, device=backend.device), 4, 1, 2)


def test_pool_gradient(backend: Backend) -> None:
    x = torch.randn(4, 2, 3, 6, 6, generator=generator(2)).to(backend.device).requires_grad_()
    out = maps.cumulative_max_pool(x, 3, 2, 1)
    assert out.requires_grad
    grad = torch.randn(out.shape, generator=generator(3)).to(backend.device)
    (got,) = torch.autograd.grad(out, x, grad)
    sums = x.cumsum(0).flatten(0, 1)
    peaks = torch.nn.functional.max_pool2d(sums, 3, 2, 1).unflatten(0, (4, 2))
    first = peaks - torch.cat([torch.zeros_like(peaks[:1]), peaks[:-1]])
    assert_close(got, torch.autograd.grad(first, x, grad)[0], 1e-5)


# ---- dsr ---------------------------------------------------------------------------------------


@cases
def test_dsr_bits(
    level: Backend, shape: tuple[int, ...], layout: str, form: str, dtype: torch.dtype
) -> None:
    x = inputs(5, *shape, dtype=dtype, layout=layout)
    grad = currents(5, *shape, seed=9, dtype=dtype)
    th, how = threshold_of(form, shape)
    for kind, tau, dt in (("if", 1.0, 1.0), ("lif", 2.0, 0.7)):
        results = []
        for name in (level.name, "reference"):
            with backends.use_backend(name):
                device = level.device if name == level.name else "cpu"
                given = [moved(v, device) for v in (x, grad, th)]
                results.append(maps.dsr_backward(*given, kind, tau, dt, **how))
        for got, want, what in zip(*results, ("x", "threshold"), strict=True):
            assert_same_bits(got, want, f"{kind} {what}")
        if x.numel():
            assert results[0][0].stride(0) == 0


def test_dsr_worked_example(backend: Backend) -> None:
    g = moved(from_values([1, 2, 3, 4]), backend.device)
    for mean, dx, dth in ((0.4, 2.5, 0.0), (1.2, 0.0, 10.0), (-0.1, 0.0, 0.0)):
        x = torch.full((4,), mean).to(backend.device)
        got, threshold = maps.dsr_backward(x, g, 1.0)
        assert got.tolist() == [dx] * 4
        assert threshold.item() == dth


def test_dsr_against_scalars(backend: Backend) -> None:
    """float64 loops over the formulas, both kinds."""
    g = generator(8)
    x = torch.rand(6, 40, generator=g, dtype=torch.float64) * 2 - 0.3
    grad = torch.randn(6, 40, generator=g, dtype=torch.float64)
    for kind, tau, dt, th in (("if", 1.0, 1.0, 0.6), ("lif", 2.0, 0.5, 0.2)):
        got, threshold = maps.dsr_backward(*on(backend, x, grad), th, kind, tau, dt)
        want, total = torch.zeros(40, dtype=torch.float64), 0.0
        w = [math.exp(-(6 - t) * dt / tau) if kind == "lif" else 1.0 for t in range(1, 7)]
        for i in range(40):
            mean = sum(a * b for a, b in zip(w, x[:, i].tolist(), strict=True)) / sum(w)
            G = 6 * sum(a * b for a, b in zip(w, grad[:, i].tolist(), strict=True)) / sum(w)
            if kind == "if":
                want[i] = G / 6 if 0 <= mean <= th else 0
                total += G if mean > th else 0
            else:
                want[i] = G / (tau * 6) if 0 < mean < tau * th / dt else 0
                total += dt * G if mean > tau * th / dt else 0
        assert (want != 0).any()
        assert total != 0
        assert_close(got, want.expand(6, 40), 1e-12)
        assert threshold.item() == pytest.approx(total, rel=1e-12)


# ---- mmse --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_mmse_bits(level: Backend, dtype: torch.dtype) -> None:
    for C, n, K in ((1, 1, 1), (3, 7, 5), (2, 1025, 4), (1, 5000, 3), (2, 0, 3), (0, 4, 2)):
        values = currents(C, n, seed=n, dtype=dtype)
        candidates = 0.5 + torch.rand(C, K, generator=generator(K)).double()
        for T, fraction in ((4, 0.0), (7, 0.5)):
            got = maps.mmse_errors(*on(level, values, candidates), T, fraction)
            with backends.use_backend("reference"):
                want = maps.mmse_errors(values, candidates, T, fraction)
            assert_same_bits(got, want, f"{C, n, K}")
            wide, v = values.double()[:, None], candidates.to(in_dtype(dtype)).double()[..., None]
            steps = torch.floor(wide * T / v + fraction).clamp(0, T)
            plain = (wide - v / T * steps).square().sum(2)
            if dtype == torch.float64 and C and n:
                assert_close(got, plain, 1e-9)


def test_mmse_worked_example(backend: Backend) -> None:
    a = moved(from_values([[0.1, 0.2, 0.3, 0.4, 0.5, 1.1]]), backend.device)
    threshold, mse = maps.mmse_threshold(a, 4)
    assert threshold.item() == pytest.approx(0.99)
    assert mse.item() == pytest.approx(0.0146896, abs=1e-7)
    at_max = maps.mmse_errors(a, a.amax(1, keepdim=True), 4) / 6
    assert at_max.item() == pytest.approx(0.0194792, abs=1e-7)


def test_mmse_edges(backend: Backend) -> None:
    silent = torch.zeros(2, 5).to(backend.device)
    silent[1] = 0.5
    threshold, mse = maps.mmse_threshold(silent, 4)
    assert threshold.tolist() == [0.0, 0.5]
    assert mse.tolist() == [0.0, 0.0]
    bad = torch.tensor([[1.0, math.nan]]).to(backend.device)
    assert maps.mmse_errors(bad, torch.ones(1, 2).to(backend.device), 4).isnan().all()


# ---- histogram ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_histogram_bits(level: Backend, dtype: torch.dtype) -> None:
    for C, n, bins in ((1, 5000, 64), (7, 999, 10), (3, 1, 2), (2, 0, 4), (64, 5000, 32)):
        g = generator(n)
        values = torch.randn(C, n, generator=g).to(dtype)
        values[:, n // 2 : n // 2 + 3] = 0
        scale = bins / (1 + torch.rand(C, generator=g)).double()
        tables = []
        for device in (level.device, "cpu"):
            counts = torch.ones(C, bins, dtype=torch.int64, device=device)
            tables.append((counts, torch.full_like(counts, 0.3, dtype=torch.float64)))
        for _ in range(2):
            maps.histogram_update(*tables[0], *on(level, values, scale))
            reference.histogram_update(*tables[1], values, scale)
        assert_same_bits(tables[0][0], tables[1][0], "counts")
        if level.device == "cpu":
            assert_same_bits(tables[0][1], tables[1][1], "sums")
        else:
            assert_close(tables[0][1], tables[1][1], 1e-12, "sums")


def test_histogram_stays_inside_its_table(backend: Backend) -> None:
    values = from_values([[*list(ODD), 0.5, 1.5]], torch.float64).to(backend.device)
    counts = torch.zeros(1, 4, dtype=torch.int64, device=backend.device)
    sums = torch.zeros(1, 4, dtype=torch.float64, device=backend.device)
    maps.histogram_update(counts, sums, values, torch.full_like(sums[:, 0], 2.0))
    # 1e-45, 1e-310 | 0.5 | | 1.5, 3e38, inf
    assert counts.tolist() == [[2, 1, 0, 3]]


def test_histogram_scale_is_checked_before_anything_is_counted(backend: Backend) -> None:
    for bad in (0.0, -0.0, -1.0, math.nan, -math.inf):
        counts = torch.zeros(2, 4, dtype=torch.int64)
        scale = torch.tensor([2.0, bad], dtype=torch.float64)
        with pytest.raises(ValueError, match=f"scale must be positive; element 1 of 2 is {bad}"):
            maps.histogram_update(counts, counts.double(), torch.ones(2, 3), scale)
        assert not counts.any()


def test_histogram_bins_of_a_scale_nobody_looked_at(level: Backend) -> None:
    """CUDA tensors are not checked: the same bins everywhere, inside the table."""
    bad = (math.inf, 0.0, -1.0, math.nan, -math.inf)
    values = from_values([[0.5, 2.0, math.inf, 0.0, -1.0, math.nan]] * len(bad))
    scale = torch.tensor(bad, dtype=torch.float64)
    tables = []
    for name, device in ((level.name, level.device), ("reference", "cpu")):
        with backends.use_backend(name):
            counts = torch.zeros(len(bad), 4, dtype=torch.int64, device=device)
            tables.append((counts, torch.zeros_like(counts, dtype=torch.float64)))
            run.histogram_update(*tables[-1], values.to(device), scale.to(device))
    for got, want in zip(*tables, strict=True):
        assert_same_bits(got, want)
    edges = [[0, 0, 0, 3], [2, 0, 0, 1], [3, 0, 0, 0], [0, 0, 0, 3], [3, 0, 0, 0]]
    assert tables[0][0].tolist() == edges


def test_histogram_of_a_channel_without_a_range(backend: Backend) -> None:
    """An infinite scale is allowed: what the converter has before the first positive value."""
    counts = torch.zeros(1, 4, dtype=torch.int64, device=backend.device)
    values = torch.zeros(1, 5, device=backend.device)
    maps.histogram_update(counts, counts.double(), values, 4 / values.double()[:, 0])
    assert not counts.any()


def test_histogram_worked_example(backend: Backend) -> None:
    from snnkernels.conversion.histogram import Histogram

    histogram = Histogram(1, 4, torch.device(backend.device))
    histogram.update(torch.tensor([[0.0, 1.0, 2.0, 4.0]]).to(backend.device))
    histogram.update(torch.tensor([[8.0, 0.5, 0.0, 3.0]]).to(backend.device))
    # 4 had a range of 8, in bins of 2; 8 has one of 16, in bins of 4. Zeros are in the total alone.
    assert histogram.counts.tolist() == [[4, 1, 1, 0]]
    tables = histogram.tables()
    units = torch.tensor([[0.0, 8.0, 16.0, 16.0]]) * 2.0**-24  # of the power of two above each bin
    assert (tables["mantissas"].cpu() * units).tolist() == [[0.0, 4.0, 8.0, 0.0]]
    # What lies in the first bin, by its power of two: 0.5; 1; 2 and 3.
    low = slice(148, 151)
    assert tables["low_counts"][0, low].tolist() == [1, 1, 2]
    sums = tables["low_mantissas"][0, low].cpu() * torch.tensor([1.0, 2.0, 4.0]) * 2.0**-24
    assert sums.tolist() == [0.5, 1.0, 5.0]
    assert tables["low_counts"].sum() == 4
    assert histogram.total == 8


# ---- time to first spike -----------------------------------------------------------------------


@cases
def test_ttfs_bits(
    level: Backend, shape: tuple[int, ...], layout: str, form: str, dtype: torch.dtype
) -> None:
    a = inputs(*shape, dtype=dtype, layout=layout)
    th, how = threshold_of(form, shape)
    every = expanded(th, how, shape).to(in_dtype(dtype))
    for T, round_ in ((1, False), (8, False), (7, True), (300, True)):
        if T > 8 and a.numel() > 1000:
            continue
        got = maps.ttfs_encode(*on(level, a, th), T, round_, **how)
        times = torch.uint8 if T <= 255 else torch.int16
        want = reference.ttfs_encode(a.contiguous(), every, T, round_, times)
        assert_same_bits(got, want, f"T={T}")
        th_ = expanded(th, how, shape).to(in_dtype(dtype))
        back = maps.ttfs_decode(got, moved(th, level.device), T, dtype, **how)
        assert_same_bits(back, reference.ttfs_decode(want, th_, T, dtype), f"T={T} decoded")


def test_ttfs_worked_example(backend: Backend) -> None:
    a = moved(from_values([1, 0.5, 0.13, 0, 2.0, -1.0, math.nan]), backend.device)
    times = maps.ttfs_encode(a, 1.0, 8)
    assert times.tolist() == [0, 4, 7, 8, 0, 8, 8]
    assert maps.ttfs_decode(times, 1.0, 8).tolist() == [1.0, 0.5, 0.125, 0.0, 1.0, 0.0, 0.0]
    # Rounded to the nearest level; half way is up.
    near = moved(from_values([0.0624, 0.0625, 0.18, 0.19]), backend.device)
    assert maps.ttfs_encode(near, 1.0, 8, round=True).tolist() == [8, 7, 7, 6]


def test_ttfs_times_out_of_range_are_no_spikes(level: Backend) -> None:
    for T, times in ((8, [0, 8, 9, 32767, -1, -32768]), (300, [0, 300, 301, 32767, -1, -300])):
        given = torch.tensor(times, dtype=torch.int16)
        for name, device in ((level.name, level.device), ("reference", "cpu")):
            with backends.use_backend(name):
                assert maps.ttfs_decode(given.to(device), 1.0, T).tolist() == [1.0] + [0.0] * 5
    late = torch.tensor([255, 3], dtype=torch.uint8, device=level.device)
    assert maps.ttfs_decode(late, 1.0, 4).tolist() == [0.0, 0.25]


def test_ttfs_every_level_is_met_exactly(backend: Backend) -> None:
    for T, th in ((8, 0.3), (100, 0.7), (2000, 1.1)):
        times = torch.arange(T + 1).to(torch.uint8 if T <= 255 else torch.int16)
        levels = maps.ttfs_decode(times.to(backend.device), th, T)
        assert maps.ttfs_encode(levels, th, T).cpu().tolist() == times.tolist()


def test_ttfs_thresholds_too_small_for_their_levels(backend: Backend) -> None:
    """Of equal levels the first time counts, as in the definition."""
    a = moved(from_values([0.0, 1e-45, 3e-45, 4e-45]), backend.device)
    th = 4e-45
    want = reference.ttfs_encode(a.cpu(), torch.tensor(th), 16, False, torch.uint8)
    assert_same_bits(maps.ttfs_encode(a, th, 16), want)


# ---- bit planes --------------------------------------------------------------------------------


@cases
def test_bit_plane_bits(
    level: Backend, shape: tuple[int, ...], layout: str, form: str, dtype: torch.dtype
) -> None:
    z = inputs(*shape, dtype=dtype, layout=layout)
    th, how = threshold_of(form, shape)
    every = expanded(th, how, shape).to(in_dtype(dtype))
    for T in (1, 3, 8, 12, 31):
        if T > 8 and z.numel() > 1000:
            continue
        q, planes = maps.bit_planes(*on(level, z, th), T, planes=True, **how)
        kind = torch.uint8 if T <= 8 else torch.int16 if T <= 15 else torch.int32
        want, rows = reference.bit_planes(z.contiguous(), every, T, kind)
        assert_same_bits(q, want, f"T={T}")
        assert_same_bits(planes, rows, f"planes of T={T}")
        assert_same_bits(maps.bit_planes(*on(level, z, th), T, **how), want, f"T={T} alone")


def test_bit_planes_worked_example(backend: Backend) -> None:
    z = moved(from_values([1.1, 3.0, -0.2, 0.875, 0.124, 0.125, math.nan]), backend.device)
    q, planes = maps.bit_planes(z, 1.75, 3, planes=True)
    assert q.tolist() == [0b100, 0b111, 0, 0b100, 0, 0b001, 0]
    words = ["".join(map(str, column)) for column in planes.T.tolist()]
    assert words == ["100", "111", "000", "100", "000", "001", "000"]


# ---- bits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 7, 8, 9, 16, 17, 31, 32, 33, 64, 70])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8, torch.bool], ids=dtype_id)
def test_pack_and_unpack_bits(level: Backend, T: int, dtype: torch.dtype) -> None:
    for shape in ((5,), (129,), (2, 3, 4), (), (0, 3), (40_000,)):
        if len(shape) == 1 and shape[0] > 1000 and T not in (8, 33):
            continue
        spikes = (torch.rand(T, *shape, generator=generator(T)) < 0.4).to(dtype)
        words = maps.pack_bits(spikes.to(level.device))
        kind = torch.uint8 if T <= 8 else torch.int16 if T <= 16 else torch.int32
        assert_same_bits(words, reference.pack_bits(spikes, kind), "words")
        counts = maps.popcount(words)
        assert_same_bits(counts, (spikes != 0).sum(0, dtype=torch.int32), "counts")
        back = maps.unpack_bits(words, T, torch.uint8 if dtype == torch.bool else dtype)
        assert_same_bits(back, spikes.to(back.dtype), "spikes")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("form", FORMS)
def test_unpacked_amplitudes(level: Backend, dtype: torch.dtype, form: str) -> None:
    for shape in ((2, 8, 4, 4), (129,)):
        spikes = torch.rand(9, *shape, generator=generator(0)) < 0.5
        amplitude, how = threshold_of(form, shape)
        words = maps.pack_bits(spikes.to(level.device))
        got = maps.unpack_bits(words, 9, dtype, moved(amplitude, level.device), **how)
        every = expanded(amplitude, how, shape).to(dtype)
        assert_same_bits(got, torch.where(spikes, every, torch.zeros_like(every)))
    inf = maps.unpack_bits(words, 9, dtype, math.inf)
    assert bool(torch.isin(inf.cpu(), torch.tensor([0.0, math.inf], dtype=dtype)).all())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_layouts(kernel: Backend, layout: str) -> None:
    spikes = laid_out((currents(9, 4, 6) > 0.3).float(), layout)
    words = maps.pack_bits(moved(spikes, kernel.device))
    assert_same_bits(words, reference.pack_bits(spikes, torch.int16))
    # The same memory as integers of half the width of float32.
    strided = laid_out(words.cpu().view(torch.bfloat16), layout).view(torch.int16)
    got = maps.unpack_bits(moved(strided, kernel.device), 9)
    assert_same_bits(got, reference.unpack_bits(strided.contiguous(), 9, torch.ones(4, 6)))


def test_whatever_is_not_zero_is_a_spike(backend: Backend) -> None:
    for dtype in DTYPES:
        values = from_values([math.nan, math.inf, -0.0, 0.0, -1.0, 1e-310, 6e-8], dtype)
        want = (values != 0).to(torch.uint8).tolist()
        assert maps.pack_bits(values[None].to(backend.device))[0].tolist() == want
    integers = torch.tensor([[0, 1, 2, 128, 255]], dtype=torch.uint8, device=backend.device)
    assert maps.pack_bits(integers)[0].tolist() == [0, 1, 1, 1, 1]


def test_packed_worked_example(backend: Backend) -> None:
    spikes = torch.zeros(33, 1, device=backend.device)
    spikes[[0, 2, 31, 32]] = 1
    words = maps.pack_bits(spikes)
    assert words.flatten().tolist() == [1 + 4 - 2**31, 1]
    assert maps.popcount(words).tolist() == [4]


# ---- sums --------------------------------------------------------------------------------------


def test_sums_over_whatever_is_shared(level: Backend) -> None:
    """The reduction behind threshold gradients: every broadcast pattern, and many sizes."""
    g = generator(1)
    for shape in ((4, 3, 5, 2), (7, 2, 1030), (2, 5000)):
        shares = torch.randn(shape, generator=g)
        patterns = [(), (1,) * len(shape), shape, shape[1:], (shape[0], *(1 for _ in shape[1:]))]
        if len(shape) == 4:
            patterns += [(4, 1, 5, 1), (1, 3, 1, 2), (3, 1, 1), (1, 3, 5, 1)]
        for pattern in patterns:
            like = torch.empty(pattern, dtype=torch.float64)
            got = summed_to(shares.to(level.device), like.to(level.device))
            assert_close(got, shares.double().sum_to_size(pattern), 1e-12, str(pattern))
            with backends.use_backend("reference"):
                want = summed_to(shares, like)
            assert_same_bits(got, want, str(pattern))


# ---- bad arguments -----------------------------------------------------------------------------

X = torch.ones(4, 3)
POOLED = torch.ones(2, 1, 1, 4, 4)
TABLES = (torch.zeros(4, 5, dtype=torch.int64), torch.zeros(4, 5, dtype=torch.float64))
SCALE = torch.ones(4, dtype=torch.float64)
WORDS = torch.zeros(1, 3, dtype=torch.uint8)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: maps.qcfs([1.0], 1.0, 4), TypeError, "x must be a torch.Tensor, got list"),
    (lambda: maps.qcfs(X.int(), 1.0, 4), TypeError, r"x has dtype torch.int32; allowed are float3"),
    (lambda: maps.qcfs(X, 0.0, 4), ValueError, r"threshold=0.0 must be positive and finite"),
    (lambda: maps.qcfs(X, -X, 4), ValueError, r"threshold must be positive and finite; element 0"),
    (lambda: maps.qcfs(X, "1", 4), TypeError, r"threshold='1' is of type str; allowed are a n"),
    (lambda: maps.qcfs(X, X[:, :2], 4), ValueError, r"threshold of shape \(4, 2\) does not broad"),
    (lambda: maps.qcfs(X, torch.ones(4), 4, channel_dim=1), ValueError, "threshold has 4 elements"),
    (lambda: maps.qcfs(X, 1.0, 4, channel_dim=0.5), TypeError, r"channel_dim=0.5 must be an int"),
    (lambda: maps.qcfs(X, 1.0, 0), ValueError, r"levels=0 is out of range; allowed are 1 to"),
    (lambda: maps.qcfs(X, 1.0, 4.0), TypeError, r"levels=4.0 must be an int"),
    (lambda: maps.qcfs(X, 1.0, 4, math.nan), ValueError, "phase is NaN"),
    (lambda: maps.qcfs(X, 1.0, 4, math.inf), ValueError, "phase=inf must be finite"),
    (lambda: maps.qcfs(X.half(), 1.0, 4, 1e5), ValueError, "phase=100000.0 must be finite; in fl"),
    (lambda: maps.qcfs(X, 1.0, 4, 1e39), ValueError, r"phase=1e\+39 must be finite; in float32 it"),
    (lambda: maps.qcfs(X.half(), 1e5, 4), ValueError,
     "threshold=100000.0 must be positive and finite; in float16 it is inf"),
    (lambda: maps.qcfs(X.half(), 1e-8, 4), ValueError,
     "threshold=1e-08 must be positive and finite; in float16 it is 0.0"),
    (lambda: maps.qcfs(X.half(), torch.tensor([1.0, 1e5, 2.0]), 4), ValueError,
     "threshold must be positive and finite; 100000.0 is inf in float16"),
    (lambda: maps.qcfs(X.half(), torch.tensor([1.0, 2.0**-25, 2.0]), 4), ValueError,
     r"threshold must be positive and finite; 2.98\d*e-08 is 0.0 in float16"),
    (lambda: maps.qcfs(X.bfloat16(), 3.4e38, 4), ValueError, r"threshold=3.4e\+38 must be"),
    (lambda: maps.dsr_backward(X, X, 1e-50), ValueError, "in float32 it is 0.0"),
    (lambda: maps.dsr_backward(X, X, 1.0, "lif", 1e39), ValueError, r"tau=1e\+39 must be positive"),
    (lambda: maps.ttfs_encode(X, torch.tensor(1e39).double(), 8), ValueError, "threshold must be"),
    (lambda: maps.ttfs_decode(WORDS, 1e39, 8), ValueError, "in float32 it is inf"),
    (lambda: maps.bit_planes(X, 1e39, 4), ValueError, "in float32 it is inf"),
    (lambda: maps.qcfs(X, 1.0, 4, gradient="both"), ValueError, "gradient='both' is unknown; allo"),
    (lambda: maps.cumulative_max_pool(X, 2), ValueError, r"x_seq has shape \(4, 3\); it must be"),
    (lambda: maps.cumulative_max_pool(POOLED, 0), ValueError, "kernel_size=0 must be at least 1"),
    (lambda: maps.cumulative_max_pool(POOLED, (2, 2, 2)), ValueError, r"kernel_size=\(2, 2, 2\) m"),
    (lambda: maps.cumulative_max_pool(POOLED, 2.0), TypeError, "kernel_size=2.0 must be an int or"),
    (lambda: maps.cumulative_max_pool(POOLED, 2, 0), ValueError, "stride=0 must be at least 1"),
    (lambda: maps.cumulative_max_pool(POOLED, 2, 1, 2), ValueError, "padding=2 must be at most ha"),
    (lambda: maps.cumulative_max_pool(POOLED, 5), ValueError, "kernel_size=5 with dilation=1 does"),
    (lambda: maps.dsr_backward(X[:0], X[:0], 1.0), ValueError, "with T at least 1"),
    (lambda: maps.dsr_backward(X, X[0], 1.0), ValueError, r"grad_out is \(3,\) on cpu; expected"),
    (lambda: maps.dsr_backward(X, X, 1.0, "alif"), ValueError, "kind='alif' is unknown; allowed a"),
    (lambda: maps.dsr_backward(X, X, 1.0, "lif", 0.0), ValueError, "tau=0.0 must be positive"),
    (lambda: maps.dsr_backward(X, X, 1.0, "lif", 1.0, -1), ValueError, "dt=-1.0 must be positive"),
    (lambda: maps.mmse_errors(X[0], X, 4), ValueError, r"values has shape \(3,\); it must be"),
    (lambda: maps.mmse_errors(X, X[:2], 4), ValueError, r"candidates has shape \(2, 3\); it must "),
    (lambda: maps.mmse_errors(X, X, 0), ValueError, "T=0 is out of range; allowed are 1 to"),
    (lambda: maps.mmse_errors(X, X, 4, math.inf), ValueError, "v_init_fraction=inf must be finite"),
    (lambda: maps.mmse_errors(X, X, 4, 1e39), ValueError, r"fraction=1e\+39 must be finite; in"),
    (lambda: maps.mmse_errors(X, 0 * X, 4), ValueError, "candidates must be positive and finite"),
    (lambda: maps.mmse_errors(X, -X, 4), ValueError, "element 0 of 12 is -1.0"),
    (lambda: maps.mmse_errors(X, X.double() * 1e-50, 4), ValueError, "in float32 it is 0.0"),
    (lambda: maps.mmse_threshold(X / 0, 4), ValueError, "values must be finite; channel 0 has inf"),
    (lambda: maps.mmse_threshold(X.log() / 0, 4), ValueError, "channel 0 has nan"),
    (lambda: maps.mmse_threshold(X * -math.inf, 4), ValueError, "channel 0 has -inf"),
    (lambda: maps.mmse_threshold(X[:, :0], 4), ValueError, "with n at least 1"),
    (lambda: maps.mmse_threshold(X, 4, 0.0, 101), ValueError, "candidates=101 is out of range; al"),
    (lambda: maps.histogram_update(*TABLES[::-1], X, SCALE), TypeError, "counts has dtype torch.f"),
    (lambda: maps.histogram_update(TABLES[0], TABLES[1][:, :3].clone(), X, SCALE), ValueError,
     r"sums has shape \(4, 3\); that of counts is \(4, 5\)"),
    (lambda: maps.histogram_update(TABLES[0][:2], TABLES[1], X, SCALE), ValueError,
     r"counts has shape \(2, 5\); it must be \[4, bins\]"),
    (lambda: maps.histogram_update(TABLES[0], TABLES[1].T.contiguous().T, X, SCALE), ValueError,
     "sums must be contiguous"),
    (lambda: maps.histogram_update(*TABLES, X, SCALE[:2]), ValueError, r"scale has shape \(2,\); "),
    (lambda: maps.ttfs_encode(X, 1.0, 32768), ValueError, "T=32768 is out of range; allowed are 1"),
    (lambda: maps.ttfs_decode(X, 1.0, 8), TypeError, "times has dtype torch.float32; allowed are "),
    (lambda: maps.ttfs_decode(WORDS, 1.0, 8, torch.int32), ValueError, "dtype=torch.int32 is not"),
    (lambda: maps.bit_planes(X, 1.0, 32), ValueError, "T=32 is out of range; allowed are 1 to 31"),
    (lambda: maps.bit_planes(X, 1.0, True), TypeError, "T=True must be an int"),
    (lambda: maps.pack_bits(X[:0]), ValueError, "with T at least 1"),
    (lambda: maps.pack_bits(X.long()), TypeError, "spikes has dtype torch.int64; allowed are"),
    (lambda: maps.unpack_bits(WORDS, 9), ValueError, r"words is torch.uint8 \(1, 3\), which does "),
    (lambda: maps.unpack_bits(WORDS, 8, torch.bool), ValueError, "dtype=torch.bool is not offered"),
    (lambda: maps.unpack_bits(WORDS, 8, torch.uint8, 2.0), ValueError, "amplitude cannot be combi"),
    (lambda: maps.popcount(X), TypeError, "words has dtype torch.float32; allowed are uint8, int1"),
    (lambda: maps.popcount(WORDS[0, 0]), ValueError, "words has no dimensions"),
]  # fmt: skip


@pytest.mark.parametrize("i", range(len(BAD)))
def test_bad_arguments_are_named(i: int) -> None:
    call, kind, message = BAD[i]
    with pytest.raises(kind, match=message):
        call()


def test_public_names_are_documented() -> None:
    from snnkernels import functional

    for name in maps.__all__:
        assert getattr(maps, name).__doc__
        assert getattr(functional, name) is getattr(maps, name)


# ---- operators ---------------------------------------------------------------------------------

TH = torch.tensor([0.5, 1.0, 1.5])
OPERATORS: dict[str, list[tuple[Any, ...]]] = {
    "qcfs": [(X, None, 1.0, 4, 0.5), (X.T, torch.ones(4), 0.0, 4, 0.5)],
    "qcfs_backward": [
        (X, X, None, 1.0, 4, 0.5, True, False),
        (X, X, TH, 0.0, 4, 0.5, False, True),
    ],
    "cumulative_max_pool": [
        (POOLED, [2, 2], [2, 2], [0, 0], [1, 1], False, None, None, False),
        (POOLED, [3, 2], [2, 2], [1, 0], [1, 1], True, POOLED[0], None, True),
        (POOLED[:0], [2, 2], [2, 2], [0, 0], [1, 1], False, None, None, True),
        (POOLED.half(), [3, 3], [1, 1], [1, 1], [1, 1], False, None, None, True),
    ],
    "dsr_backward": [(X, X, None, 1.0, False, 1.0, 1.0), (X, X, TH, 0.0, True, 2.0, 0.5)],
    "mmse_errors": [(X, X, 4, 0.5), (X[:, :0], X, 4, 0.0)],
    "histogram_update": [(*TABLES, X, SCALE)],
    "ttfs_encode": [(X, None, 1.0, 8, False), (X.T, torch.ones(4), 0.0, 300, True)],
    "ttfs_decode": [(WORDS, None, 1.0, 8, torch.float16), (WORDS, TH, 0.0, 8, torch.float64)],
    "bit_planes": [(X, None, 1.0, 3, False), (X.T, torch.ones(4), 0.0, 9, True)],
    "unpack_bits": [(WORDS, 7, torch.uint8, None, 1.0), (WORDS, 8, torch.float32, TH, 0.0)],
    "popcount": [(WORDS,), (torch.zeros(2, 3, 5, dtype=torch.int32),)],
    "pack_bits": [(X,), (torch.ones(40, 3),)],
}


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(backend: Backend, name: str) -> None:
    for sample in OPERATORS[name]:
        given = tuple(
            v.clone().to(backend.device) if isinstance(v, Tensor) and v.is_contiguous()
            else moved(v, backend.device) for v in sample
        )  # fmt: skip
        torch.library.opcheck(getattr(torch.ops.snnkernels, name).default, given)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
def test_compile_has_no_breaks(kernel: Backend) -> None:
    def everything(x: Tensor, th: Tensor, x_seq: Tensor, spikes: Tensor) -> list[Tensor]:
        words = maps.pack_bits(spikes)
        times = maps.ttfs_encode(x, th, 8)
        return [
            maps.qcfs(x, th, 4),
            maps.cumulative_max_pool(x_seq, 2),
            *maps.dsr_backward(spikes, spikes, 0.5),
            maps.mmse_errors(x, x.abs() + 0.1, 4),
            times,
            maps.ttfs_decode(times, th, 8),
            maps.bit_planes(x, th, 4),
            words,
            maps.popcount(words),
            maps.unpack_bits(words, spikes.shape[0], torch.float32, 2.0),
        ]

    x, x_seq = currents(6, 5).to(kernel.device), currents(3, 2, 2, 4, 4).to(kernel.device)
    given = (x, torch.full((5,), 0.8, device=kernel.device), x_seq, (currents(9, 7) > 0).float())
    given = tuple(v.to(kernel.device) for v in given)
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*given), everything(*given), strict=True):
        assert_same_bits(got, want)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
def test_compiled_qcfs_has_its_gradients(kernel: Backend) -> None:
    x = currents(6, 5).to(kernel.device)
    results = []
    for function in (maps.qcfs, torch.compile(maps.qcfs, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_(), torch.tensor(0.8, device=x.device).requires_grad_()]
        out = function(*leaves, 4)
        results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    for got, want in zip(*results, strict=True):
        assert_same_bits(got, want)
