"""Backward: against float64 autograd, against a derivation by hand, gradcheck, determinism."""

from __future__ import annotations

import copy
import math
import random
import sys
import zlib
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import (
    PLAIN_SURROGATES,
    SURROGATES,
    Backend,
    assert_close,
    assert_same_bits,
    currents,
    dtype_id,
    dyadic,
    expanded,
    generator,
    moved,
    operand,
)
from torch import Tensor

from snnkernels import surrogate
from snnkernels.functional import if_count, if_multi_step, if_rate, if_step
from snnkernels.kernels import backends, backward, params, reference, run
from snnkernels.kernels.spec import Asked, Grads, Neuron, Saved

ALL = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Around the two chunk sizes: 8 steps on GPUs, 64 on CPUs.
STEPS = (1, 2, 7, 8, 9, 64, 65, 130)
FORMS = ("number", "0-d", "channel", "position", "full", "runs")
OUTPUTS = ("spikes", "rate", "v_seq", "charge_seq", "v", "everything")


@dataclass(frozen=True)
class Case:
    """One loss: which arguments are leaves, and which outputs it looks at."""

    dtype: torch.dtype = torch.float64
    shape: tuple[int, ...] = (2, 3, 4, 3)
    steps: int = 9
    constant: bool = False
    threshold: str = "number"
    v: str = "number"
    amplitude: str = "none"
    input_scale: str = "none"
    v_reset: float | None = None
    tie: str = ">="
    surrogate: str = "atan"
    alpha: float | None = None
    detach_reset: bool = False
    output: str = "spikes"
    x_grad: bool = True

    def __str__(self) -> str:
        default = Case()
        words = [f"{k}={v}" for k, v in vars(self).items() if v != getattr(default, k)]
        return "Case(" + ", ".join(words) + ")"


# Another salt draws other numbers for the same cases.
SALT = ""
NAMES = ("x", "v", "threshold", "amplitude", "input_scale")


def leaves_of(case: Case, device: str = "cpu") -> dict[str, Tensor | float | str | None]:
    """Dyadic arguments, so that float32 and float64 fire at the same steps."""
    full = case.shape if case.constant else (case.steps, *case.shape)
    # Not hash(): it is salted anew in every process.
    g = generator(zlib.crc32(f"{SALT}{case}".encode()))

    def around(centre: float) -> Any:
        return lambda *size: centre + torch.randint(-4, 5, size, generator=g) / 16

    leaves: dict[str, Any] = {
        "x": dyadic(*full, seed=case.steps).to(case.dtype),
        "threshold": operand(case.threshold, case.shape, around(1.0)),
        "v": "half" if case.v == "half" else operand(case.v, case.shape, around(0.25)),
        "amplitude": None
        if case.amplitude == "none"
        else "threshold"
        if case.amplitude == "threshold"
        else operand(case.amplitude, case.shape, around(0.75)),
        "input_scale": None
        if case.input_scale == "none"
        else operand(case.input_scale, case.shape, around(1.0)),
    }
    if case.dtype == torch.float64:
        leaves = {k: v.double() if isinstance(v, Tensor) else v for k, v in leaves.items()}
    leaves = {k: moved(v, device) for k, v in leaves.items()}
    for name, leaf in leaves.items():
        if isinstance(leaf, Tensor) and (name != "x" or case.x_grad):
            leaf.requires_grad_()
    return leaves


def surrogate_of(case: Case) -> surrogate.Surrogate:
    cls = surrogate.BY_NAME[case.surrogate]
    return cls() if case.alpha is None else cls(case.alpha)


def weights(case: Case) -> list[Tensor]:
    """What the loss multiplies spikes, membrane and trace with: exact in half precision."""
    full = (case.steps, *case.shape)
    return [
        dyadic(*s, seed=50 + i, scale=8, low=-9, high=12)
        for i, s in enumerate((full, case.shape, full))
    ]


def through_functional(case: Case, leaves: dict[str, Any]) -> Tensor:
    """The loss through the public functions."""
    arguments = {
        "v_reset": case.v_reset,
        "surrogate_function": surrogate_of(case),
        "detach_reset": case.detach_reset,
        "amplitude": leaves["amplitude"],
        "input_scale": leaves["input_scale"],
        "tie": case.tie,
    }
    forms = (case.threshold, case.v, case.amplitude, case.input_scale)
    if "channel" in forms:
        arguments["channel_dim"] = min(1, len(case.shape) - 1)
    if case.constant:
        arguments["T"] = case.steps
    x, v, threshold = leaves["x"], leaves["v"], leaves["threshold"]
    a, b, c = (moved(w, x.device.type) for w in weights(case))
    if case.output == "rate":
        rate, last = if_rate(x, v, threshold, **arguments)
        return (rate.double() * a[0]).sum() + 0.25 * (last.double() * b).sum()
    store = {
        "store_v_seq": case.output in ("v_seq", "everything"),
        "store_charge_seq": case.output == "charge_seq",
    }
    spikes, last, trace = if_multi_step(x, v, threshold, **arguments, **store)
    loss = x.new_zeros((), dtype=torch.float64)
    if case.output in ("spikes", "everything", "charge_seq"):
        loss = loss + (spikes.double() * a).sum()
    if case.output in ("v", "everything"):
        loss = loss + (last.double() * b).sum()
    if trace is not None:
        loss = loss + (trace.double() * c).sum()
    return loss


def through_reference(case: Case, leaves: dict[str, Any]) -> Tensor:
    """The same loss with plain autograd through the reference."""
    x, threshold = leaves["x"], expand(leaves["threshold"], case.threshold, case)
    v = threshold / 2 if case.v == "half" else expand(leaves["v"], case.v, case)
    amplitude = torch.ones((), dtype=torch.float64)
    if case.amplitude == "threshold":
        amplitude = threshold
    elif case.amplitude != "none":
        amplitude = expand(leaves["amplitude"], case.amplitude, case)
    scale = None
    if case.input_scale != "none":
        scale = expand(leaves["input_scale"], case.input_scale, case)
    result = reference.if_forward(
        x,
        v,
        threshold,
        amplitude,
        T=case.steps if case.constant else None,
        input_scale=scale,
        v_reset=case.v_reset,
        strict=case.tie == ">",
        surrogate=surrogate_of(case),
        detach_reset=case.detach_reset,
    )
    a, b, c = weights(case)
    if case.output == "rate":
        rate = result.spikes.to(result.v.dtype).mean(0).to(x.dtype)
        return (rate.double() * a[0]).sum() + 0.25 * (result.v.double() * b).sum()
    loss = x.new_zeros((), dtype=torch.float64)
    if case.output in ("spikes", "everything", "charge_seq"):
        loss = loss + (result.spikes.double() * a).sum()
    if case.output in ("v", "everything"):
        loss = loss + (result.v.double() * b).sum()
    if case.output in ("v_seq", "everything"):
        loss = loss + (result.v_seq.double() * c).sum()
    if case.output == "charge_seq":
        loss = loss + (result.charge_seq.double() * c).sum()
    return loss


def expand(value: Any, form: str, case: Case) -> Tensor:
    if not isinstance(value, Tensor):
        return expanded(value, form, case.shape)
    if form == "channel" and len(case.shape) > 1:
        value = value.reshape(-1, *(1 for _ in case.shape[2:]))
    return value.expand(case.shape)


def gradients(loss: Tensor, leaves: dict[str, Any]) -> dict[str, Tensor]:
    wanted = {k: v for k, v in leaves.items() if isinstance(v, Tensor) and v.requires_grad}
    # The amplitude does not reach membranes: None there, or zeros.
    grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    pairs = zip(wanted.items(), grads, strict=True)
    return {k: torch.zeros_like(v) if g is None else g for (k, v), g in pairs}


def in_double(case: Case) -> dict[str, Tensor]:
    """Float64 gradients of the same numbers through the reference."""
    leaves = {
        k: v.detach().double().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v
        for k, v in leaves_of(case).items()
    }
    # Also where the case does not ask for it: the size of the terms that the others sum.
    leaves["x"].requires_grad_()
    return gradients(through_reference(case, leaves), leaves)


def check(backend: Backend, case: Case, rtol: float) -> None:
    want = in_double(case)
    leaves = leaves_of(case, backend.device)
    got = gradients(through_functional(case, leaves), leaves)
    assert got.keys() == {*want} - (set() if case.x_grad else {"x"})
    # The other gradients are sums of terms of this size, which may cancel.
    term = want["x"].abs().max().item() if want["x"].numel() else 0.0
    for name, grad in got.items():
        leaf = leaves[name]
        assert isinstance(leaf, Tensor)
        assert grad.dtype == leaf.dtype
        scale = term
        if name == "input_scale":
            # Beyond the promise of 1e-6: it sums over every step as well, and the roundings of
            # that many cancelling terms add up like a random walk.
            scale *= math.sqrt(max(case.steps * math.prod(case.shape) / max(leaf.numel(), 1), 1.0))
        assert_close(grad, want[name], rtol, f"{case} on {backend}: gradient of {name}", scale)


def sampled(count: int, seed: int, **fixed: Any) -> list[Case]:
    r = random.Random(seed)
    cases = []
    for _ in range(count):
        name = r.choice(SURROGATES)
        case = Case(
            shape=r.choice([(2, 3, 4, 3), (5,), (2, 3), (131,), ()]),
            steps=r.choice(STEPS),
            constant=r.random() < 0.25,
            threshold=r.choice(FORMS),
            v=r.choice((*FORMS, "half")),
            amplitude=r.choice(("none", "none", "threshold", *FORMS)),
            input_scale=r.choice(("none", "none", *FORMS)),
            v_reset=r.choice((None, None, None, 0.0, -0.25)),
            tie=r.choice((">=", ">=", ">")),
            surrogate=name,
            alpha=r.choice((None, None, 0.5, 3.0)),
            detach_reset=r.random() < 0.3,
            output=r.choice(OUTPUTS),
            x_grad=r.random() < 0.9,
        )
        if not case.x_grad and case.threshold == "number":
            case = replace(case, threshold="channel")
        if case.steps > 9:
            # Steep surrogates let products over many steps explode, and rounding errors with them.
            case = replace(case, alpha=0.5)
        cases.append(replace(case, **fixed))
    return cases


def plain(**fixed: Any) -> list[Case]:
    """The kernels without options: every surrogate and T, gradients of x and v."""
    return [
        # So steep a peak as SuperSpike's own multiplies the rounding errors of many steps.
        Case(
            surrogate=s,
            steps=t,
            v=v,
            detach_reset=d,
            output=o,
            alpha=2.0 if s == "superspike" else None,
            **fixed,
        )
        for s in SURROGATES
        for t in STEPS
        for v, d, o in (("number", False, "spikes"), ("full", True, "rate"))
    ]


# ---- against float64 autograd ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=dtype_id
)
def test_plain(backend: Backend, dtype: torch.dtype, rtol: float) -> None:
    for case in plain(dtype=dtype):
        check(backend, case, rtol)


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=dtype_id
)
def test_sampled(backend: Backend, dtype: torch.dtype, rtol: float) -> None:
    count = 40 if backend.name == "reference" else 150
    for case in sampled(count, seed=17, dtype=dtype):
        check(backend, case, rtol)


# Gradients of x are rounded to 11 and 8 bits at the end, everything else is float32.
@pytest.mark.parametrize(
    ("dtype", "eps"), [(torch.float16, 2**-10), (torch.bfloat16, 2**-7)], ids=dtype_id
)
def test_half_types(backend: Backend, dtype: torch.dtype, eps: float) -> None:
    for case in [*plain(dtype=dtype)[::5], *sampled(40, seed=23, dtype=dtype, steps=9, alpha=0.5)]:
        check(backend, case, eps)


def test_every_thread_count_and_run_gives_the_same_bits(kernel: Backend, threads: None) -> None:
    shape = (4, 16, 40, 40)
    x = moved(currents(6, *shape), kernel.device).requires_grad_()
    th = moved(torch.full((16,), 0.9), kernel.device).requires_grad_()
    v = moved(torch.full(shape[1:], 0.25), kernel.device).requires_grad_()
    amplitude = moved(torch.tensor(0.75), kernel.device).requires_grad_()
    weight = moved(currents(6, *shape, seed=3), kernel.device)
    first: list[list[Tensor]] = [[], []]
    for count in (1, 1, 2, 3):
        torch.set_num_threads(count)
        general, _, _ = if_multi_step(x, v, th, channel_dim=1, amplitude=amplitude)
        plain, _, _ = if_multi_step(x, v, 0.9)
        for i, (spikes, wrt) in enumerate(((general, [x, v, th, amplitude]), (plain, [x, v]))):
            grads = torch.autograd.grad((spikes * weight).sum(), wrt)
            first[i] = first[i] or list(grads)
            for got, want in zip(grads, first[i], strict=True):
                assert_same_bits(got, want, f"{count} threads")


def test_streaming_backward(kernel: Backend, threads: None) -> None:
    """Rows above the threshold where stores bypass the caches."""
    x = currents(3, 700_032).requires_grad_()
    weight = currents(3, 700_032, seed=2)
    with backends.use_backend("reference"):
        (want,) = torch.autograd.grad((if_multi_step(x)[0] * weight).sum(), x)
    near = moved(x.detach(), kernel.device).requires_grad_()
    spikes, _, _ = if_multi_step(near)
    (got,) = torch.autograd.grad((spikes * moved(weight, kernel.device)).sum(), near)
    assert_close(got, want, 1e-6)


@pytest.mark.parametrize("size", [1, 4, 5, 8, 127, 128, 133])
def test_misaligned_and_strided_gradients(kernel: Backend, size: int) -> None:
    """Incoming gradients and inputs in any layout."""
    base = currents(4, 2 * size + 1).to(kernel.device)
    weight = currents(4, size, seed=1).to(kernel.device)
    want = None
    for offset in (0, 1):
        x = torch.empty(4 * size + offset, device=kernel.device)[offset:].view(4, size)
        x = x.copy_(base[:, :size]).requires_grad_()
        spikes, _, _ = if_multi_step(x, 0.25)
        gapped = torch.empty(4, 2 * size, device=kernel.device)[:, ::2].copy_(weight)
        shifted = torch.empty(4 * size + 1, device=kernel.device)[1:].view(4, size).copy_(weight)
        across = weight.t().contiguous().t()
        for grad in (weight, gapped, shifted, across):
            (got,) = torch.autograd.grad(spikes, x, grad, retain_graph=True)
            want = got if want is None else want
            assert_same_bits(got, want)
        same = torch.autograd.grad(spikes, x, torch.ones((), device=x.device).expand(4, size))[0]
        assert bool(same.isfinite().all())


# ---- a derivation by hand, in plain Python -----------------------------------------------------


def by_hand(
    x: list[float],
    v: float,
    threshold: float,
    amplitude: float,
    scale: float | None,
    v_reset: float | None,
    detach: bool,
    slope: Any,
    grad_out: list[float],
    grad_v: float,
) -> dict[str, Any]:
    """Gradients of sum(grad_out * out) + grad_v * v_T for one neuron, by the chain rule."""
    charges, fired = [], []
    for current in x:
        m = v + (current if scale is None else current * scale)
        s = m >= threshold
        v = (m - threshold if v_reset is None else v_reset) if s else m
        charges.append(m)
        fired.append(float(s))
    grad_x, g_threshold, g_amplitude, g_scale = [0.0] * len(x), 0.0, 0.0, 0.0
    carry = grad_v  # d loss / d v after step t
    for t in reversed(range(len(x))):
        m, s = charges[t], fired[t]
        # out = amplitude s; v = m - threshold s, or m (1 - s) + v_reset s; s = spike(m - threshold)
        grad_s = amplitude * grad_out[t]
        if not detach:
            grad_s += carry * (-threshold if v_reset is None else v_reset - m)
        grad_u = grad_s * slope(m - threshold)
        g_amplitude += s * grad_out[t]
        g_threshold -= grad_u
        if v_reset is None:
            g_threshold -= carry * s
            carry = grad_u + carry
        else:
            carry = grad_u + carry * (1 - s)
        grad_x[t] = carry if scale is None else carry * scale
        g_scale += carry * x[t]
    return {
        "x": grad_x,
        "v": carry,
        "threshold": g_threshold,
        "amplitude": g_amplitude,
        "input_scale": g_scale,
    }


SLOPES = {
    "atan": lambda u: 1 / (1 + (math.pi * u) ** 2),
    "sigmoid": lambda u: 4 * math.exp(-4 * u) / (1 + math.exp(-4 * u)) ** 2,
    "triangle": lambda u: max(0.0, 1 - abs(u)),
    "rectangle": lambda u: 1.0 if abs(u) < 0.5 else 0.0,
    "superspike": lambda u: 1 / (1 + 25 * abs(u)) ** 2,
    "exponential": lambda u: math.exp(-abs(u)) / 2,
    "erf": lambda u: 2 / math.sqrt(math.pi) * math.exp(-4 * u * u),
    # Of a threshold of 1.
    "periodic_exponential": lambda u: math.exp(-2 * abs(u if u < 0 else 2 * (u - round(u)))),
}


def slope_of(name: str, threshold: float) -> Any:
    if name != "periodic_exponential":
        return SLOPES[name]

    def slope(u: float) -> float:
        beyond = 2 * (u - threshold * math.floor(u / threshold + 0.5))
        return math.exp(-2 * abs(u if u < 0 else beyond))

    return slope


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("v_reset", [None, -0.25])
@pytest.mark.parametrize("scale", [None, 0.75])
def test_by_hand(
    backend: Backend, name: str, detach: bool, v_reset: float | None, scale: float | None
) -> None:
    T, N = 11, 6
    x = dyadic(T, N).to(backend.device).requires_grad_()
    grad_out, grad_v = dyadic(T, N, seed=1), dyadic(N, seed=2)
    v = (dyadic(N, seed=3) / 4).to(backend.device).requires_grad_()
    threshold = (1 + dyadic(N, seed=4) / 4).to(backend.device).requires_grad_()
    amplitude = (1 + dyadic(N, seed=5)).to(backend.device).requires_grad_()
    scales = torch.full((N,), scale or 1.0, dtype=torch.float64, device=backend.device)
    scales.requires_grad_()
    spikes, last, _ = if_multi_step(
        x,
        v,
        threshold,
        v_reset,
        name,
        detach,
        amplitude=amplitude,
        input_scale=None if scale is None else scales,
    )
    loss = (spikes * moved(grad_out, backend.device)).sum()
    loss = loss + (last * moved(grad_v, backend.device)).sum()
    leaves = {"x": x, "v": v, "threshold": threshold, "amplitude": amplitude}
    if scale is not None:
        leaves["input_scale"] = scales
    got = gradients(loss, leaves)
    assert bool(spikes.detach().any())
    for n in range(N):
        want = by_hand(
            x[:, n].tolist(), v[n].item(), threshold[n].item(), amplitude[n].item(), scale,
            v_reset, detach, slope_of(name, threshold[n].item()), grad_out[:, n].tolist(),
            grad_v[n].item(),
        )  # fmt: skip
        for key, grad in got.items():
            mine = grad[:, n] if key == "x" else grad[n]
            assert_close(
                mine, torch.tensor(want[key], dtype=torch.float64), 1e-12, f"{key}, neuron {n}"
            )


# ---- gradcheck of the smooth twin --------------------------------------------------------------


SCALE = 0.75  # of the twin's surrogate


class _Smooth(torch.autograd.Function):
    """Both operators with the surrogate's primitive in place of the spike."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, v: Tensor, th: Tensor, amp: Tensor, scale: Any, c: Any) -> Any:
        steps, v_reset, kind, alpha, _ = c
        asked = Asked(v_seq=True, charge_seq=True)
        neuron = _neuron(v, th, amp, scale, v_reset)
        made = run.if_forward(x, steps, neuron, asked, kind, alpha, SCALE)
        ctx.save_for_backward(x, v, th, amp, scale)
        ctx.c = c
        return made.spikes, made.v, made.v_seq, made.charge_seq

    @staticmethod
    def backward(ctx: Any, g_s: Tensor, g_v: Tensor, g_seq: Tensor, g_charge: Tensor) -> Any:  # type: ignore[override]
        steps, v_reset, kind, alpha, detach = ctx.c
        x, v, th, amp, scale = ctx.saved_tensors
        needs = [*ctx.needs_input_grad[:5], False, False, False]
        neuron = _neuron(v, th, amp, scale, v_reset)
        given = Grads(g_s, False, g_v, g_seq, g_charge)
        saved = Saved(
            x, None, None, None, steps is not None, len(x) if steps is None else steps, x.dtype
        )
        grads = backward.if_backward(saved, neuron, given, kind, alpha, SCALE, detach, True, needs)
        return (*(g if n else None for g, n in zip(grads[:5], needs, strict=False)), None)


def _neuron(v: Tensor, th: Tensor, amp: Tensor, scale: Any, v_reset: float | None) -> Neuron:
    options = (0 if scale is None else params.INPUT_SCALE) | (
        0 if v_reset is None else params.HARD_RESET
    )
    return Neuron(
        v, th, amp, scale, options=options, v_reset=v_reset or 0.0, spike_dtype=torch.float64
    )


def smooth_arguments(T: int, constant: bool, scaled: bool, device: str) -> tuple[Any, ...]:
    g = generator(T)
    draw = lambda *s: torch.rand(s, generator=g, dtype=torch.float64).to(device).requires_grad_()  # noqa: E731
    scale = draw(2, 1) if scaled else None
    return draw(*(() if constant else (T,)), 2, 3), draw(2, 3), draw(3), draw(1), scale


# Primitives of Triangle and Rectangle have kinks; gradcheck needs none nearby.
@pytest.mark.parametrize("kind", [0, 1, 4, 5, 6])
@pytest.mark.parametrize("T", [1, 2, 5])
@pytest.mark.parametrize("v_reset", [None, -0.1])
@pytest.mark.parametrize("constant", [False, True])
def test_gradcheck(
    kernel: Backend, kind: int, T: int, v_reset: float | None, constant: bool
) -> None:
    for scaled in (False, True):
        arguments = smooth_arguments(T, constant, scaled, kernel.device)
        c = (T if constant else None, v_reset, kind, 1.5, False)
        assert torch.autograd.gradcheck(lambda *a, c=c: _Smooth.apply(*a, c), arguments)


@pytest.mark.parametrize("kind", range(len(surrogate.BY_KIND)))
@pytest.mark.parametrize("v_reset", [None, -0.1])
@pytest.mark.parametrize("detach", [False, True])
def test_smooth_twin_is_the_references(
    kernel: Backend, kind: int, v_reset: float | None, detach: bool
) -> None:
    x, v, th, amp, scale = smooth_arguments(19, False, True, kernel.device)
    got = _Smooth.apply(x, v, th, amp, scale, (None, v_reset, kind, 0.8, detach))
    weights = [
        currents(*t.shape, seed=i, dtype=torch.float64).to(t.device) for i, t in enumerate(got)
    ]
    result = reference.if_forward(
        x, v, th, amp, input_scale=scale, v_reset=v_reset, detach_reset=detach, smooth=True,
        surrogate=surrogate.BY_KIND[kind](0.8, SCALE),
    )  # fmt: skip
    want = (result.spikes, result.v, result.v_seq, result.charge_seq)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    leaves = (x, v, th, amp, scale)
    grads = [
        torch.autograd.grad(sum((o * w).sum() for o, w in zip(out, weights, strict=True)), leaves)
        for out in (got, want)
    ]
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, 1e-12)


# ---- double backward ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", sampled(12, seed=31, dtype=torch.float64, steps=5), ids=str)
def test_double_backward(backend: Backend, case: Case) -> None:
    """The gradient of a function of the gradients: equal to the reference's."""
    if case.surrogate == "rectangle":
        case = replace(case, surrogate="sigmoid")
    found = []
    for through, device in ((through_functional, backend.device), (through_reference, "cpu")):
        leaves = leaves_of(case, device)
        wanted = [v for v in leaves.values() if isinstance(v, Tensor) and v.requires_grad]
        grads = torch.autograd.grad(
            through(case, leaves), wanted, create_graph=True, allow_unused=True
        )
        second = sum((g.square() * 0.5).sum() for g in grads if g is not None)
        assert second.requires_grad
        found.append(torch.autograd.grad(second, wanted, allow_unused=True))
    for got, want in zip(*found, strict=True):
        assert (got is None or not got.any()) == (want is None or not want.any())
        if got is not None and want is not None:
            assert_close(got, want, 1e-10, f"{case}: second derivative")


@pytest.mark.parametrize("name", ["atan", "sigmoid"])
def test_gradgradcheck(backend: Backend, name: str) -> None:
    """Second derivatives of T = 1 with detached spikes are those of the surrogate."""
    x = dyadic(1, 4).to(backend.device).requires_grad_()
    spikes, _, _ = if_multi_step(x, 0.25, 1.0, None, name)
    (first,) = torch.autograd.grad(spikes.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    u = (x.detach() - 0.75).requires_grad_()
    s = surrogate.resolve(name)
    (d1,) = torch.autograd.grad(s.primitive(u).sum(), u, create_graph=True)
    (d2,) = torch.autograd.grad(d1.sum(), u)
    assert_close(first, d1, 1e-12)
    assert_close(second, d2, 1e-12)


# ---- presence and absence ----------------------------------------------------------------------


def test_no_gradient_is_silently_zero(backend: Backend) -> None:
    """Each leaf alone and all together, through each output that depends on it."""
    shape, T = (2, 3), 6
    draw = {
        "x": lambda: dyadic(T, *shape, seed=1),
        "v": lambda: dyadic(*shape, seed=2) / 8,
        "threshold": lambda: 1 + dyadic(3, seed=3) / 16,
        "amplitude": lambda: 1 + dyadic(1, seed=4) / 8,
        "input_scale": lambda: 1 + dyadic(3, seed=5) / 16,
    }
    for alone in (*draw, "all"):
        leaves = {k: moved(f(), backend.device) for k, f in draw.items()}
        for name, leaf in leaves.items():
            leaf.requires_grad_(alone in (name, "all"))
        spikes, last, v_seq = if_multi_step(
            leaves["x"], leaves["v"], leaves["threshold"], channel_dim=1, store_v_seq=True,
            amplitude=leaves["amplitude"], input_scale=leaves["input_scale"],
        )  # fmt: skip
        rate, rated = if_rate(
            leaves["x"], leaves["v"], leaves["threshold"], channel_dim=1,
            amplitude=leaves["amplitude"], input_scale=leaves["input_scale"],
        )  # fmt: skip
        count, counted = if_count(leaves["x"], leaves["v"], leaves["threshold"], channel_dim=1,
                                  input_scale=leaves["input_scale"])  # fmt: skip
        assert not count.requires_grad
        for name, leaf in leaves.items():
            if not leaf.requires_grad:
                continue
            outputs = {"spikes": spikes, "rate": rate}
            if name != "amplitude":
                outputs |= {"v": last, "v_seq": v_seq, "v of rate": rated, "v of count": counted}
            for what, output in outputs.items():
                (grad,) = torch.autograd.grad(output.sum(), leaf, retain_graph=True)
                assert bool((grad != 0).any()), f"{what} -> {name} ({alone})"
                if what == "spikes" and name == "x":
                    assert bool((grad != 0).all()), "a row of zeros in the gradient of x"


def test_uint8_spikes_carry_no_gradient(backend: Backend) -> None:
    x = moved(currents(4, 6), backend.device).requires_grad_()
    spikes, last, _ = if_multi_step(x, spike_dtype=torch.uint8)
    assert not spikes.requires_grad
    assert last.requires_grad
    (grad,) = torch.autograd.grad(last.sum(), x)
    assert bool(grad.any())


def test_half_threshold_start_sends_its_gradient_to_the_threshold(backend: Backend) -> None:
    x = moved(dyadic(4, 6), backend.device)
    th = torch.full((6,), 1.0, dtype=torch.float64, device=x.device, requires_grad=True)
    (whole,) = torch.autograd.grad(if_multi_step(x, "half", th)[0].sum(), th)
    v = (th.detach() / 2).requires_grad_()
    outputs = if_multi_step(x, v, th)[0].sum()
    g_th, g_v = torch.autograd.grad(outputs, (th, v))
    assert_close(whole, g_th + g_v / 2, 1e-12)


def test_no_graph_when_no_gradient_is_needed(backend: Backend) -> None:
    x = moved(currents(4, 6), backend.device)
    assert not if_multi_step(x)[0].requires_grad
    with torch.no_grad():
        assert not if_multi_step(x.requires_grad_())[0].requires_grad


def test_empty_and_no_steps(backend: Backend) -> None:
    x = torch.empty(3, 0, 2, device=backend.device, requires_grad=True)
    th = torch.ones(2, device=backend.device, requires_grad=True)
    spikes, last, _ = if_multi_step(x, "half", th)
    g_x, g_th = torch.autograd.grad(spikes.sum() + last.sum(), (x, th))
    assert g_x.shape == x.shape
    assert g_th.tolist() == [0.0, 0.0]
    x = torch.empty(0, 5, 2, device=backend.device, requires_grad=True)
    spikes, last, _ = if_multi_step(x, "half", th)
    g_x, g_th = torch.autograd.grad(spikes.sum() + last.sum(), (x, th))
    assert g_x.shape == x.shape
    assert g_th.tolist() == [2.5, 2.5]


def test_steps_chain_like_one_call(backend: Backend) -> None:
    x = moved(dyadic(6, 9), backend.device).requires_grad_()
    v0 = moved(dyadic(9, seed=1) / 8, backend.device).requires_grad_()
    weight = moved(dyadic(6, 9, seed=2), backend.device)
    (whole_x, whole_v) = torch.autograd.grad((if_multi_step(x, v0)[0] * weight).sum(), (x, v0))
    v, loss = v0, torch.zeros((), dtype=torch.float64, device=x.device)
    for t in range(6):
        s, v = if_step(x[t], v)
        loss = loss + (s * weight[t]).sum()
    g_x, g_v = torch.autograd.grad(loss, (x, v0))
    assert_close(g_x, whole_x, 1e-12)
    assert_close(g_v, whole_v, 1e-12)


def test_a_second_backward_needs_no_saved_spikes(backend: Backend) -> None:
    """Only inputs are kept: nothing of size [T, ...] besides x."""
    x = moved(currents(8, 100), backend.device).requires_grad_()
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        if_multi_step(x, 0.5, 0.9)
    assert [t.data_ptr() for t in kept if t.numel() >= 800] == [x.data_ptr()]


# ---- surrogates --------------------------------------------------------------------------------


@given(
    name=st.sampled_from(SURROGATES),
    alpha=st.floats(0.25, 8),
    scale=st.sampled_from((1.0, 0.3, 7.0)),
    u=st.lists(st.floats(-6, 6), min_size=1, max_size=20),
)
def test_derivative_is_that_of_the_primitive(
    name: str, alpha: float, scale: float, u: list[float]
) -> None:
    s = surrogate.BY_NAME[name](alpha, scale)
    at = torch.tensor(u, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(s.primitive(at).sum(), at)
    kinks = {"rectangle": [0.5], "triangle": [1.0]}.get(name, [])
    away = torch.ones_like(at, dtype=torch.bool)
    for kink in kinks:
        away &= ((at * alpha).abs() - kink).abs() > 1e-9
    torch.testing.assert_close(s.derivative(at)[away], slope[away], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SURROGATES)
def test_surrogates_have_area_one_and_known_values(name: str) -> None:
    s = surrogate.resolve(name)
    u = torch.linspace(-200, 200, 2_000_001, dtype=torch.float64)
    area = torch.trapezoid(s.derivative(u), u).item()
    if name == "periodic_exponential":
        # Without end: 2 / alpha below 0 and above, then the same between two multiples of 1.
        assert s.primitive(torch.zeros(1)).item() == 0.5
        one = torch.linspace(0.5, 1.5, 10_001, dtype=torch.float64)
        period = torch.trapezoid(s.derivative(one), one).item()
        assert period == pytest.approx((1 - math.exp(-2)) / 2, abs=1e-4)
        rise = s.primitive(one[-1]) - s.primitive(one[0])
        assert rise.item() == pytest.approx(period, abs=1e-4)
    else:
        assert area == pytest.approx(0.08 if name == "superspike" else 1, abs=2e-3)
        assert s.primitive(torch.zeros(1)).item() == pytest.approx(area / 2, abs=1e-3)
    double = replace(s, scale=2.0)
    assert torch.equal(double.derivative(u), 2 * s.derivative(u))
    assert not double.plain
    assert s.plain == (name in PLAIN_SURROGATES)
    for point in (-0.7, -0.2, 0.0, 0.3, 0.9):
        got = s.derivative(torch.tensor(point, dtype=torch.float64)).item()
        assert got == pytest.approx(SLOPES[name](point), rel=1e-12)
    for dtype in (torch.float32, torch.bfloat16):
        assert s.derivative(torch.zeros(2, dtype=dtype)).dtype == dtype
        assert s.primitive(torch.zeros(2, dtype=dtype)).dtype == dtype
        assert s(torch.tensor([-0.1, 0.0], dtype=dtype)).tolist() == [0, 1]
    assert copy.deepcopy(s) == s
    assert hash(s) == hash(surrogate.resolve(name))


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf, math.nan, "2", None])
def test_bad_alpha(alpha: Any) -> None:
    with pytest.raises(ValueError, match=r"ATan: alpha=.* must be a positive finite number"):
        surrogate.ATan(alpha)
    with pytest.raises(ValueError, match=r"Erf: scale=.* must be a positive finite number"):
        surrogate.Erf(scale=alpha)


@pytest.fixture
def spikingjelly(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Classes that look like SpikingJelly's, in a module of such a name."""
    module = ModuleType("spikingjelly.activation_based.surrogate")
    for name in (
        "ATan", "Sigmoid", "PiecewiseQuadratic", "Rect", "Erf", "PiecewiseExp", "SoftSign",
        "SuperSpike", "S2NN",
    ):  # fmt: skip

        def init(self: Any, alpha: float = 2.0, spiking: bool = True) -> None:
            self.alpha, self.spiking = alpha, spiking

        setattr(module, name, type(name, (), {"__init__": init, "__module__": module.__name__}))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_spikingjellys_objects(backend: Backend, spikingjelly: ModuleType) -> None:
    pairs = {
        "ATan": surrogate.ATan,
        "Sigmoid": surrogate.Sigmoid,
        "PiecewiseQuadratic": surrogate.Triangle,
        "Rect": surrogate.Rectangle,
        "Erf": surrogate.Erf,
        "PiecewiseExp": surrogate.Exponential,
        "SoftSign": lambda a: surrogate.SuperSpike(a, a / 2),
        "SuperSpike": lambda a: surrogate.SuperSpike(1, a),
    }
    x = moved(dyadic(3, 4), backend.device).requires_grad_()
    for name, cls in pairs.items():
        theirs = getattr(spikingjelly, name)(alpha=1.5)
        assert surrogate.resolve(theirs) == cls(1.5)
        (got,) = torch.autograd.grad(if_multi_step(x, surrogate_function=theirs)[0].sum(), x)
        (want,) = torch.autograd.grad(if_multi_step(x, surrogate_function=cls(1.5))[0].sum(), x)
        assert_same_bits(got, want)
    with pytest.raises(TypeError, match=r"S2NN.*allowed are None, a name"):
        surrogate.resolve(spikingjelly.S2NN())
    with pytest.raises(ValueError, match="spiking=False"):
        surrogate.resolve(spikingjelly.ATan(spiking=False))
