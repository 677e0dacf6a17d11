"""The leaky membrane over many steps: lif_scan in chunks against the plain loop over time.

    python benchmarks/bench_scan.py

Ratios of interleaved medians in one process. The loop writes into one tensor without gradients and
collects its steps with them, each the faster of the two. Where a row is above 1 chunks win,
and ``lif_scan`` should choose them (``snnkernels/scan.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from common import arguments, interleaved, save, start
from torch import Tensor

from snnkernels.functional import lif_scan

STEPS = (64, 256, 1024, 4096)
NEURONS = (1, 16, 256, 1024, 4096, 16384)
CHUNKS = (16, 32, 64)
LARGEST = 1 << 24  # elements: the loop's side is clear above
BETA = 0.9375


def loop(x: Tensor) -> Tensor:
    """Step by step into one tensor."""
    out = torch.empty_like(x)
    v = torch.zeros_like(x[0])
    for step, row in zip(x.unbind(0), out.unbind(0), strict=True):
        v = torch.add(step, v, alpha=BETA, out=row)
    return out


def learning_loop(x: Tensor) -> Tensor:
    """Step by step, with gradients."""
    out, v = [], torch.zeros_like(x[0])
    for step in x.unbind(0):
        v = torch.add(step, v, alpha=BETA)
        out.append(v)
    return torch.stack(out)


def trained(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    """Forward and backward."""
    ones = torch.ones_like(x)
    return lambda: torch.autograd.grad(function(x), x, ones)[0]


def main() -> None:
    """Compares, then times; ``--quick`` takes few sizes."""
    args = start(arguments(__doc__).parse_args())
    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    table = []
    for T in STEPS[:2] if args.quick else STEPS:
        for N in NEURONS[:2] if args.quick else NEURONS:
            if T * N > LARGEST:
                continue
            x = torch.randn(T, N, device=args.device)
            z = x.clone().requires_grad_()
            forward = {"loop": partial(loop, x)}
            both = {"loop": trained(learning_loop, z)}
            for chunk in CHUNKS:
                scan = partial(lif_scan, beta=BETA, chunk=chunk)
                forward[str(chunk)], both[str(chunk)] = partial(scan, x), trained(scan, z)
            for what, runs in (("forward", forward), ("forward + backward", both)):
                want = runs["loop"]()
                for run in runs.values():
                    torch.testing.assert_close(run(), want, rtol=1e-4, atol=1e-4)
                times = interleaved(runs, rounds=args.rounds, wait=wait)
                ratios = {f"loop / chunks of {c}": times["loop"] / times[str(c)] for c in CHUNKS}
                row = {"what": what, "T": T, "neurons": N}
                table.append(row | {k: float(f"{v:.3g}") for k, v in ratios.items()})
                print(f"{what:>20} T={T:<5} N={N:<6}", *(f"{r:8.2f}x" for r in ratios.values()))
    print("rows:", save(f"lif_scan_{args.device}", table, folder=args.out, device=args.device))


if __name__ == "__main__":
    main()
