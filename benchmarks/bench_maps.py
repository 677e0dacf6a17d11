"""The small kernels against their plain PyTorch forms, in one process.

    python benchmarks/bench_maps.py [--device cpu|cuda] [--threads N] [--rounds N] [--quick]

The plain form is the reference of kernels/maps_reference.py, which tests hold to the same bits,
unless PyTorch has a shorter way, which is then written here. Outputs are fresh, the allocator is
tuned for both, results compared before any timing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import arguments, interleaved, late, save, start
from torch import Tensor

from snnkernels import maps
from snnkernels.kernels import maps_reference as reference

N = 1 << 20


class FloorSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return torch.floor(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def composed_qcfs(x: Tensor, th: Tensor) -> Tensor:
    return th * torch.clamp(FloorSTE.apply(x * 8 / th + 0.5) / 8, 0, 1)


def gradients(function: Callable, x: Tensor, th: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(x, th), (x, th), grad)


def pool_runs(x: Tensor, k: int, s: int, p: int) -> tuple[Callable, Callable]:
    window = ([k, k], [s, s], [p, p], [1, 1], False, None, None)
    return (
        lambda: maps.cumulative_max_pool(x, k, s, p),
        lambda: reference.cumulative_max_pool(x, *window)[0],
    )


def dsr_plain(x: Tensor, grad: Tensor, th: float) -> tuple[Tensor, Tensor]:
    G, mean = grad.sum(0), x.mean(0)
    inside = (mean >= 0) & (mean <= th)
    return (G / len(x) * inside).expand(x.shape), (G * (mean > th)).sum()


def histogram_runs(values: Tensor, bins: int) -> tuple[Callable, Callable]:
    tables = [
        torch.zeros(len(values), bins, dtype=d, device=values.device)
        for d in (torch.int64, torch.float64)
    ]
    scale = bins / values.amax(1).double()
    return (
        lambda: maps.histogram_update(*tables, values, scale),
        lambda: reference.histogram_update(*tables, values, scale),
    )


def mmse_plain(values: Tensor, candidates: Tensor, T: int) -> Tensor:
    errors = []
    for v in candidates.unbind(1):
        v = v[:, None]
        steps = torch.floor(values * T / v + 0.5).clamp_(0, T)
        errors.append((values - v / T * steps).double().square_().sum(1))
    return torch.stack(errors, 1)


def unpack_plain(words: Tensor, T: int) -> Tensor:
    bits = torch.arange(T, device=words.device).view(-1, 1)
    return (words >> bits & 1).float()


def rows(device: str) -> dict[str, tuple[str, Callable, Callable, float]]:
    """name -> (size, ours, plain PyTorch, tolerance)."""
    x = torch.randn(N, device=device)
    th = torch.tensor(1.0, device=device)
    leaf, leaf_th = x.clone().requires_grad_(), th.clone().requires_grad_()
    x_seq = torch.randn(8, N, device=device)
    maps_seq = torch.randn(8, 8, 64, 32, 32, device=device)
    values = torch.relu(torch.randn(64, N // 16, device=device))
    few = values[:, : N // 256].contiguous()
    candidates = few.amax(1)[:, None] * (1 - 0.01 * torch.arange(95, device=device))
    spikes = (x_seq > 0).float()
    words = maps.pack_bits(spikes)
    times = maps.ttfs_encode(x, 1.0, 8)
    every = torch.ones((), device=device)
    return {
        "qcfs": (f"{N}", lambda: maps.qcfs(x, th, 8), lambda: composed_qcfs(x, th), 0.0),
        "qcfs, forward + backward": (
            f"{N}",
            lambda: gradients(
                lambda a, b: maps.qcfs(a, b, 8, gradient="floor_clip"), leaf, leaf_th, x
            ),
            lambda: gradients(composed_qcfs, leaf, leaf_th, x),
            1e-3,
        ),
        "cumulative max-pool 2x2": ("8x8x64x32x32", *pool_runs(maps_seq, 2, 2, 0), 0.0),
        "cumulative max-pool 3x3, stride 2": ("8x8x64x32x32", *pool_runs(maps_seq, 3, 2, 1), 0.0),
        "dsr backward": (
            f"8x{N}",
            lambda: maps.dsr_backward(x_seq, spikes, 0.25),
            lambda: dsr_plain(x_seq, spikes, 0.25),
            1e-3,
        ),
        "mmse errors, 95 candidates": (
            f"64x{few.shape[1]}",
            lambda: maps.mmse_errors(few, candidates, 8, 0.5),
            lambda: mmse_plain(few, candidates, 8),
            1e-6,
        ),
        "histogram, per channel": (f"64x{N // 16}", *histogram_runs(values, 1024), 0.0),
        "histogram, per layer": (f"1x{4 * N}", *histogram_runs(values.view(1, -1), 8192), 0.0),
        "ttfs encode": (
            f"{N}, T=8",
            lambda: maps.ttfs_encode(x, 1.0, 8),
            lambda: (8 - torch.floor(x * 8).clamp_(0, 8)).to(torch.uint8),
            0.0,
        ),
        "ttfs decode": (
            f"{N}, T=8",
            lambda: maps.ttfs_decode(times, 1.0, 8),
            lambda: (8 - times).float() / 8,
            0.0,
        ),
        "bit planes": (
            f"{N}, T=4",
            lambda: maps.bit_planes(x, 1.0, 4),
            lambda: reference.bit_planes(x, every, 4, torch.uint8)[0],
            0.0,
        ),
        "pack bits": (
            f"8x{N}",
            lambda: maps.pack_bits(spikes),
            lambda: reference.pack_bits(spikes, torch.uint8),
            0.0,
        ),
        "unpack bits": (
            f"8x{N}",
            lambda: maps.unpack_bits(words, 8),
            lambda: unpack_plain(words, 8),
            0.0,
        ),
        "popcount": (
            f"8x{N}",
            lambda: maps.popcount(words),
            lambda: unpack_plain(words, 8).sum(0, dtype=torch.int32),
            0.0,
        ),
    }


def compare(name: str, ours: Any, plain: Any, tolerance: float) -> None:
    pairs = zip(ours, plain, strict=True) if isinstance(ours, tuple) else [(ours, plain)]
    for got, want in pairs:
        if got is not None:
            close = {"rtol": tolerance, "atol": tolerance * float(want.abs().max())}
            torch.testing.assert_close(got, want, **close, check_dtype=False, msg=name)


def main() -> None:
    """Compares, then times, every small kernel; ``--quick`` takes fewer rounds."""
    args = start(arguments(__doc__).parse_args())
    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    table = []
    for name, (size, ours, plain, tolerance) in rows(args.device).items():
        if late(args, name):
            continue
        compare(name, ours(), plain(), tolerance)
        times = interleaved({"snnkernels": ours, "PyTorch": plain}, rounds=args.rounds, wait=wait)
        ratio = times["PyTorch"] / times["snnkernels"]
        table.append({"what": name, "size": size, "PyTorch / snnkernels": round(ratio, 2)})
        print(f"{name:>36} {size:>14} {ratio:8.2f}x")
    path = save(f"maps_{args.device}", table, folder=args.out, device=args.device)
    print("rows:", path)


if __name__ == "__main__":
    main()
