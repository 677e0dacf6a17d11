"""The leaky membrane without threshold, parallel in time: a float64 loop is the truth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import snnkernels.scan as module
from snnkernels.functional import lif_scan


def loop(x: list[float], beta: float, v: float) -> list[float]:
    """Scalar float64 (Python's own)."""
    out = []
    for value in x:
        v = beta * v + value
        out.append(v)
    return out


def currents(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


STEPS = [1, 2, 7, 31, 32, 33, 64, 100, 1025]


@pytest.mark.parametrize("chunk", [None, 1, 2, 5, 32, 4096])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.95, 1.0, -0.75])
def test_against_a_scalar_loop(beta: float, chunk: int | None) -> None:
    for T in STEPS:
        x = currents(T, 3, seed=T)
        got = lif_scan(x, beta, 0.25, chunk=chunk)
        want = [loop(x[:, i].tolist(), beta, 0.25) for i in range(3)]
        expected = torch.tensor(want, dtype=torch.float64).t()
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 4, 32])
def test_dyadic_numbers_are_exact(chunk: int) -> None:
    """beta = 1 is a running sum; beta = 1/2 keeps few steps exact. T = 5, by hand."""
    x = torch.tensor([1.0, 0.0, 2.0, -1.0, 4.0])
    assert lif_scan(x, 1.0, chunk=chunk).tolist() == [1, 1, 3, 2, 6]
    assert lif_scan(x, 0.5, 2.0, chunk=chunk).tolist() == [2, 1, 2.5, 0.25, 4.125]
    assert lif_scan(x, 0.0, 7.0, chunk=chunk).tolist() == x.tolist()


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 3, 4, 5), (0,)])
def test_shapes_strides_and_starts(shape: tuple[int, ...]) -> None:
    x = currents(70, *shape)
    got = lif_scan(x, 0.9, chunk=8)
    assert got.shape == x.shape
    torch.testing.assert_close(got, lif_scan(x, 0.9, chunk=1))
    start = currents(*(shape[-1:] or (1,)), seed=1).reshape(shape[-1:])
    torch.testing.assert_close(lif_scan(x, 0.9, start, chunk=8), lif_scan(x, 0.9, start, chunk=1))
    if len(shape) > 1:
        turned = x.movedim(-1, 1)
        torch.testing.assert_close(lif_scan(turned, 0.9, chunk=8), got.movedim(-1, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sixteen_bits_are_rounded_once(dtype: torch.dtype) -> None:
    x = currents(200, 5, dtype=dtype)
    for chunk in (1, 16):
        got = lif_scan(x, 0.875, chunk=chunk)
        assert got.dtype == dtype
        want = lif_scan(x.double(), 0.875, chunk=1)
        torch.testing.assert_close(got.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 16])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_gradients(beta: float, chunk: int) -> None:
    """Of x, beta and v_init, twice."""
    x = currents(11, 2).requires_grad_()
    leak = torch.tensor(beta * 0.9 + 0.05, dtype=torch.float64, requires_grad=True)
    start = currents(2, seed=2).requires_grad_()

    def run(x: Tensor, leak: Tensor, start: Tensor) -> Tensor:
        return lif_scan(x, leak, start, chunk=chunk)

    assert torch.autograd.gradcheck(run, (x, leak, start))
    assert torch.autograd.gradgradcheck(run, (x, leak, start))


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_the_leak_has_a_gradient_at_its_ends(beta: float) -> None:
    """d/d beta of v_T = sum_k beta^k x_{T-k}: x_{T-1} at 0, sum_k k x_{T-k} at 1."""
    x = currents(40, 1)
    leak = torch.tensor(beta, dtype=torch.float64, requires_grad=True)
    lif_scan(x, leak, chunk=8)[-1].sum().backward()
    k = torch.arange(40, dtype=torch.float64)
    want = x[-2, 0] if beta == 0 else (k * x[:, 0].flip(0)).sum()
    torch.testing.assert_close(leak.grad, want)


def test_gradient_of_a_long_run_is_the_reverse_scan() -> None:
    x = currents(500, 3).requires_grad_()
    weight = currents(500, 3, seed=5)
    (lif_scan(x, 0.9, chunk=32) * weight).sum().backward()
    torch.testing.assert_close(x.grad, lif_scan(weight.flip(0), 0.9, chunk=1).flip(0))


def test_the_faster_way_is_chosen() -> None:
    """Few neurons and many steps: chunks; else the loop."""
    assert module._faster(torch.empty(4096, 16)) > 1
    assert module._faster(torch.empty(8, 16)) == 1
    assert module._faster(torch.empty(256, 1 << 20, device="meta")) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([1.0], 0.5), TypeError, "x must be a floating-point tensor"),
        ((torch.ones(3, dtype=torch.int64), 0.5), TypeError, "int64"),
        ((torch.ones(()), 0.5), ValueError, "at least one step"),
        ((torch.ones(0, 2), 0.5), ValueError, "at least one step"),
        ((torch.ones(3, 2), 1.5), ValueError, "beta=1.5 must lie"),
        ((torch.ones(3, 2), float("nan")), ValueError, "beta=nan must lie"),
        ((torch.ones(3, 2), torch.ones(2)), ValueError, "one floating-point number"),
        ((torch.ones(3, 2), torch.tensor(1)), ValueError, "int64"),
        ((torch.ones(3, 2), lambda v: 0.5), TypeError, "is not linear"),
        ((torch.ones(3, 2), True), TypeError, "bool"),
        ((torch.ones(3, 2), 0.5, torch.ones(3)), ValueError, "broadcast"),
        ((torch.ones(3, 2), 0.5, torch.ones(2, 2)), ValueError, "broadcast"),
    ],
)
def test_what_is_not_a_linear_recurrence_is_refused(
    arguments: tuple, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        lif_scan(*arguments)


@pytest.mark.parametrize("chunk", [0, -1, 1.5, True])
def test_chunks_are_checked(chunk: object) -> None:
    with pytest.raises(ValueError, match="chunk="):
        lif_scan(torch.ones(3), 0.5, chunk=chunk)  # type: ignore[arg-type]
