"""What a forward pass keeps for its backward pass: the same gradients from less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import DTYPES, Backend, assert_close, assert_same_bits, currents, dtype_id, moved
from torch import Tensor

from snnkernels import IFNode, surrogate
from snnkernels.functional import if_multi_step, if_rate


def gradients(
    backend: Backend, save: str, dtype: torch.dtype, shape: tuple[int, ...], learned: bool,
    detach: bool = False, kind: str = "rectangle", rate: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    x = moved(currents(*shape, dtype=dtype), backend.device).requires_grad_()
    state = torch.float64 if dtype == torch.float64 else torch.float32
    v = torch.full(shape[1:], 0.25, dtype=state, device=backend.device, requires_grad=True)
    leaves = [x, v]
    th: Any = 1.0
    if learned:
        th = torch.linspace(0.75, 1.25, shape[1], dtype=state, device=backend.device)
        leaves.append(th.requires_grad_())
    given: dict[str, Any] = {
        "v": v, "v_threshold": th, "channel_dim": 0, "save": save, "detach_reset": detach,
        "surrogate_function": kind, "amplitude": "threshold" if learned else None,
    }  # fmt: skip
    if rate:
        out, last = if_rate(x, **given)
        g = moved(currents(*shape[1:], seed=2, dtype=dtype), backend.device)
    else:
        out, last, _ = if_multi_step(x, **given)
        g = moved(currents(*shape, seed=2, dtype=dtype), backend.device)
    g_v = moved(currents(*shape[1:], seed=3, dtype=state), backend.device)
    return out.detach(), torch.autograd.grad((out, last), leaves, (g, g_v))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(1, 3), (8, 129), (9, 2, 8), (33, 70), (70, 3, 8), (130, 4)])
@pytest.mark.parametrize("learned", [False, True])
def test_saves_agree(
    level: Backend, dtype: torch.dtype, shape: tuple[int, ...], learned: bool
) -> None:
    """Bits and charges hold what recomputing gives: the same bits in every gradient."""
    for detach in (False, True):
        for rate in (False, True):
            arguments = (dtype, shape, learned, detach)
            out, want = gradients(level, "recompute", *arguments, rate=rate)
            for save in ("trace", "bits"):
                other, got = gradients(level, save, *arguments, rate=rate)
                assert_same_bits(other, out)
                for a, b in zip(got, want, strict=True):
                    # Channel sums and the order of slope and amplitude may round differently.
                    assert_close(a, b, {torch.float64: 1e-12}.get(dtype, 1e-6) if a.dtype
                                 in (torch.float32, torch.float64) else 1e-2)  # fmt: skip


@pytest.mark.parametrize("kind", ["atan", "sigmoid", "triangle"])
def test_traces_serve_every_surrogate(kernel: Backend, kind: str) -> None:
    for learned in (False, True):
        arguments = (torch.float32, (20, 3, 50), learned)
        _, want = gradients(kernel, "recompute", *arguments, kind=kind)
        _, got = gradients(kernel, "trace", *arguments, kind=kind)
        for a, b in zip(got, want, strict=True):
            assert_close(a, b, 1e-6)


def kept_bytes(save: str, learned: bool = False) -> dict[tuple[int, ...], int]:
    """Shapes and sizes of what is saved, beside parameters."""
    kept: dict[tuple[int, ...], int] = {}

    def note(t: Tensor) -> Tensor:
        kept[tuple(t.shape)] = kept.get(tuple(t.shape), 0) + t.numel() * t.element_size()
        return t

    x = currents(64, 10, 100).requires_grad_()
    th = torch.tensor(1.0, requires_grad=learned)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        if_multi_step(x, 0.0, th, surrogate_function="rectangle", save=save)
    kept.pop((), None)
    return kept


def test_what_is_kept(backend: Backend) -> None:
    """Per neuron-step: 4 bytes of x or of the charged membrane, one bit, or two."""
    steps = 64 * 1000
    assert kept_bytes("recompute") == {(64, 10, 100): 4 * steps}
    assert kept_bytes("trace") == {(64, 10, 100): 4 * steps}
    assert kept_bytes("bits") == {(2, 10, 100): steps // 8}
    assert kept_bytes("bits", learned=True) == {(2, 10, 100): steps // 4}


def test_a_constant_current_is_recomputed(backend: Backend) -> None:
    x = moved(currents(50), backend.device).requires_grad_()
    for save in ("trace", "bits"):
        grads = [
            torch.autograd.grad(
                if_multi_step(x, T=9, save=s, surrogate_function="rectangle")[0].sum(), x
            )[0]
            for s in (save, "recompute")
        ]
        assert_same_bits(*grads)


def test_nodes_have_it(backend: Backend) -> None:
    x = moved(currents(9, 4, 5), backend.device).requires_grad_()
    found = []
    for save in ("recompute", "trace", "bits"):
        node = IFNode(surrogate_function="rectangle", save=save, output="rate")
        found.append(torch.autograd.grad(node(x).sum(), x)[0])
    for other in found[1:]:
        assert_close(other, found[0], 1e-6)


def test_no_second_derivative_without_currents(backend: Backend) -> None:
    x = moved(currents(9, 4), backend.device).requires_grad_()
    (g,) = torch.autograd.grad(if_multi_step(x)[0].sum(), x, create_graph=True)
    assert g.requires_grad
    for save in ("trace", "bits"):
        spikes, _, _ = if_multi_step(x, surrogate_function="rectangle", save=save)
        with pytest.raises(RuntimeError, match="second derivative needs the currents"):
            torch.autograd.grad(spikes.sum(), x, create_graph=True)


X = torch.zeros(4, 3, requires_grad=True)

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"save": "bit"}, "save='bit' is unknown; allowed: recompute, trace, bits"),
    ({"save": "bits"}, "needs surrogate_function='rectangle', not ATan"),
    ({"save": "bits", "surrogate_function": surrogate.Sigmoid()}, "not Sigmoid"),
    ({"save": "trace", "v_reset": 0.0}, "save='trace' is for plain neurons"),
    ({"save": "trace", "tie": ">"}, "is for plain neurons"),
    ({"save": "trace", "store_v_seq": True}, "cannot be combined with v_seq"),
]


@pytest.mark.parametrize(("arguments", "says"), REFUSED, ids=lambda v: str(v)[:40])
def test_bad_saves(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        if_multi_step(X, **arguments)


def test_without_gradients_nothing_is_saved_and_everything_goes(backend: Backend) -> None:
    with torch.no_grad():
        if_multi_step(moved(X.detach(), backend.device), save="bits", v_reset=0.0)


@pytest.mark.parametrize("save", ["recompute", "trace", "bits"])
def test_no_steps_pass_the_membrane_on(backend: Backend, save: str) -> None:
    x = torch.zeros(0, 3, device=backend.device, requires_grad=True)
    v = torch.ones(3, device=backend.device, requires_grad=True)
    s, v_out, _ = if_multi_step(x, v, surrogate_function="rectangle", save=save)
    (s.sum() + v_out.sum()).backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 3)
    assert torch.equal(v.grad, torch.ones_like(v))
