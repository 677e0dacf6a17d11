"""Five kernels once each, for a profiler.

ncu --kernel-name regex:if_ python benchmarks/five_kernels.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

import snnkernels
from snnkernels import functional


def kernels(device: str, T: int, N: int) -> dict[str, Callable[[], object]]:
    """Dense in two precisions, packed, count, backward."""
    single = torch.rand(T, N, device=device)
    half = single.to(torch.bfloat16)
    leaf = half.clone().requires_grad_()
    packed = getattr(functional, "if_packed", functional.if_count)
    return {
        "float32 -> float32": lambda: functional.if_multi_step(single, 0.5)[0],
        "bfloat16 -> bfloat16": lambda: functional.if_multi_step(half, 0.5)[0],
        "bfloat16 -> packed": lambda: packed(half, 0.5),
        "float32 -> count": lambda: functional.if_count(single, 0.5),
        "bfloat16, backward": lambda: functional.if_multi_step(leaf, 0.5)[0].backward(half),
    }


def main() -> None:
    """Runs each once and says so."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    args = parser.parse_args()
    N = 1 << 22 if args.device == "cuda" else 1 << 10
    print(snnkernels.backend_info())
    for name, run in kernels(args.device, 8, N).items():
        run()
        print("ran", name)
    if args.device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
