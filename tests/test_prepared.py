"""Plain calls that came before tell the kernels what a call checked from scratch tells them."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
import torch
from support import spy

import snnkernels
from snnkernels.functional import if_multi_step
from snnkernels.kernels import backends, params, plan, prepared

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Few neurons, and enough for a GPU's wide threads, in a multiple of them and not.
NEURONS = ((7,), (2, 3, 4), (plan.FULL * plan.THREADS * 8,), (plan.FULL * plan.THREADS * 8 + 2,))

# The struct of a kernel, and how many addresses it begins with.
LAYOUT = {"forward": (params.IF_FORWARD, 7), "backward": (params.IF_BACKWARD, 12)}


class Kept:
    """A back end that keeps what it is told, addresses reduced to whether they are there."""

    def __init__(self, gpu: bool) -> None:
        self.launches: list[tuple[str, tuple[bool, ...], bytes]] = []
        self.kernels = spy("kept", self._note, gpu)

    def _note(self, name: str, packed: bytes, device: torch.device) -> None:
        fields, addresses = LAYOUT[name]
        there = tuple(a != 0 for a in struct.unpack_from(f"{addresses}Q", packed))
        told = np.frombuffer(packed, fields).copy()
        if name == "forward":
            told["alpha"] = 0  # read with a window alone
        self.launches.append((name, there, told.tobytes()[8 * addresses :]))

    def take(self) -> list[tuple[str, tuple[bool, ...], bytes]]:
        taken, self.launches = self.launches, []
        return taken


@pytest.fixture(params=[False, True], ids=["cpu", "gpu"])
def kept(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    found = Kept(request.param)
    monkeypatch.setitem(backends._MAKERS, "kept", lambda: found.kernels)
    monkeypatch.delitem(backends._made, "kept", raising=False)
    with snnkernels.use_backend("kept"):
        yield found
    backends._made.pop("kept", None)


def found(x: torch.Tensor, v: Any = 0.0, threshold: Any = 1.0) -> bool:
    return prepared.find(x, v, threshold) is not None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", NEURONS, ids=str)
@pytest.mark.parametrize("T", [1, 8, 9, 17])
def test_kernels_are_told_the_same(
    kept: Kept, T: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = torch.zeros(T, *shape, dtype=dtype).requires_grad_()
    g, g_v = torch.zeros_like(x), torch.zeros(shape, dtype=prepared_state(dtype))
    if_multi_step(x[:1])  # the first call of all takes the long way
    kept.take()
    told, start = [], torch.ones(shape, dtype=prepared_state(dtype))
    out = torch.empty_like(x)
    # amplitude=1.0 says nothing new, but is not plain.
    for more in ({}, {"amplitude": 1.0}):
        assert found(x, "half", 0.7)
        s, v, _ = if_multi_step(x, "half", 0.7, None, "sigmoid", True, **more)
        torch.autograd.grad((s, v), x, (g, g_v))
        s = if_multi_step(x, 0.25, 3, **more)[0]
        torch.autograd.grad(s, x, g)
        s = if_multi_step(x, start, 0.7, **more)[0]
        torch.autograd.grad(s, x, g)
        if_multi_step(x.detach(), start, 0.7, out=out, **more)
        told.append(kept.take())
    assert told[0] == told[1]
    assert [name for name, _, _ in told[0]] == [*(["forward", "backward"] * 3), "forward"]
    assert found(x, start, 0.7)


def prepared_state(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def test_what_is_not_plain_is_left_alone() -> None:
    x = torch.zeros(4, 6)
    if_multi_step(x)
    with snnkernels.use_backend("reference"):
        assert not found(x)
    if backends.choose(x.device) is None:
        pytest.skip("no kernels are installed")
    assert found(x)
    assert found(x, 1, 2)
    assert found(x, torch.zeros(6))
    assert not found(x, torch.zeros(1))
    assert not found(x, torch.zeros(6, dtype=torch.float64))
    assert not found(x, torch.zeros(12)[::2])
    assert not found(x, torch.zeros(6, requires_grad=True))
    with torch.no_grad():
        assert found(x, torch.zeros(6, requires_grad=True))
    assert not found(x, 0.0, torch.ones(()))
    assert not found(x, True)
    assert not found(x[:, ::2])
    assert not found(x[:0])
    assert not found(torch.zeros(4, 0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"v_threshold": 0.0}, "v_threshold"),
        ({"v_threshold": -1}, "v_threshold"),
        ({"v_threshold": float("nan")}, "v_threshold"),
        ({"v": "most"}, "v='most' is unknown"),
        ({"v": ""}, "v='' is unknown"),
        ({"surrogate_function": "gaussian"}, "surrogate_function='gaussian'"),
    ],
    ids=str,
)
def test_errors_are_raised_every_time(arguments: dict[str, Any], message: str) -> None:
    x = torch.zeros(4, 6)
    if_multi_step(x)
    for _ in range(3):
        with pytest.raises((ValueError, TypeError), match=message):
            if_multi_step(x, **arguments)


def test_zeros_keep_their_sign() -> None:
    x = torch.full((2, 3), -0.0)
    for zero in (0.0, -0.0, 0.0, -0.0):
        v = if_multi_step(x, zero)[1]
        assert torch.equal(v.signbit(), torch.full((3,), zero is not None and str(zero) == "-0.0"))


def test_the_back_end_of_the_moment_runs_the_backward_pass() -> None:
    x = torch.rand(4, 6, requires_grad=True)
    s = if_multi_step(x, 0.5)[0]
    s_again = if_multi_step(x, 0.5)[0]
    g = torch.rand_like(s)
    with snnkernels.use_backend("reference"):
        (there,) = torch.autograd.grad(s_again, x, g)
    (here,) = torch.autograd.grad(s, x, g)
    torch.testing.assert_close(here, there, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["transposed", "expanded", "shifted", "double", "none"])
def test_gradients_that_lie_otherwise(kind: str) -> None:
    x = torch.rand(4, 6, requires_grad=True)
    dense = torch.rand(4, 6)
    if kind == "expanded":
        dense = torch.rand(4, 1).expand(4, 6)
    given = {
        "transposed": dense.t().contiguous().t(),
        "expanded": dense,
        "shifted": torch.cat([torch.zeros(1), dense.flatten()])[1:].view(4, 6),
        "double": dense,
        "none": dense,
    }[kind]
    for _ in range(2):
        s, v, _ = if_multi_step(x, 0.5)
        if kind == "none":
            (grad,) = torch.autograd.grad(v, x, dense[0])
        else:
            (grad,) = torch.autograd.grad(s, x, given, create_graph=kind == "double")
    with snnkernels.use_backend("reference"):
        s, v, _ = if_multi_step(x, 0.5)
        pair = (v, dense[0]) if kind == "none" else (s, dense.contiguous())
        (want,) = torch.autograd.grad(pair[0], x, pair[1])
    torch.testing.assert_close(grad.detach(), want, rtol=1e-6, atol=1e-6)
    assert grad.requires_grad == (kind == "double")


def test_what_is_remembered_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "_prepared", {})
    monkeypatch.setattr(prepared, "_MOST", 5)
    for n in range(1, 20):
        x = torch.full((2, n), 0.75)
        s, v, _ = if_multi_step(x, 0.5)
        assert torch.equal(s, torch.tensor([[1.0], [1.0]]).expand(2, n)), n
        assert torch.equal(v, torch.zeros(n))
        assert len(prepared._prepared) <= 5


def test_a_carried_membrane_has_its_gradient_and_its_memory() -> None:
    x, v = torch.rand(4, 6, requires_grad=True), torch.rand(6, requires_grad=True)
    g = torch.rand(4, 6)
    for start in (v.detach(), v):
        s = if_multi_step(x, start)[0]
        grads = torch.autograd.grad(s, [t for t in (x, start) if t.requires_grad], g)
        with snnkernels.use_backend("reference"):
            s = if_multi_step(x, start)[0]
            want = torch.autograd.grad(s, [t for t in (x, start) if t.requires_grad], g)
        for a, b in zip(grads, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    store = torch.rand(30)
    with pytest.raises(ValueError, match="out shares memory with v"):
        if_multi_step(x.detach(), store[3:9], out=store[:24].view(4, 6))
    node = snnkernels.IFNode()
    rows = torch.rand(12, 6)
    both = torch.cat([node(rows[:5]), node(rows[5:])])
    assert torch.equal(both, if_multi_step(rows)[0])


def test_the_addresses_are_the_first_fields() -> None:
    for fields, count in LAYOUT.values():
        assert fields.fields is not None
        offsets = [fields.fields[name][1] for name in fields.names or ()]
        assert offsets[:count] == [8 * i for i in range(count)]
        kinds = [fields.fields[name][0].kind for name in fields.names or ()]
        assert kinds[: count - 1] == ["u"] * (count - 1)
        # The last is the operand v_init, whose address comes first.
        assert (fields.names or ())[count - 1] == "v_init"
        assert params.OPERAND.fields is not None
        assert params.OPERAND.fields["data"][1] == 0
