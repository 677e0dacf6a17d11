"""The fused neuron against SpikingJelly and torch.compile, in one process.

    python benchmarks/neuron.py [--device cpu|cuda] [--peer spikingjelly|none] [--threads N]

Prediction: a float32 forward pass moves 8 bytes per neuron-step (read x, write spikes).
SpikingJelly also stores the charged membrane and runs some five eager kernels a step on CPUs
(about 40 bytes), so 5x out of cache and more inside; an in-place torch.compile loop moves the same
8 bytes. Fresh outputs, allocator tuned for all, spikes compared bit for bit before any timing.
"""

from __future__ import annotations

import argparse
import logging

import torch
from common import interleaved, save, tune_malloc

import snnkernels
from snnkernels import functional

SHAPES = [(4, 1_000), (4, 10_000), (8, 100_000), (16, 1_000_000)]


def inplace_loop(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    v = torch.full_like(x[0], 0.5)
    out = torch.empty_like(x)
    for t in range(x.shape[0]):
        v += x[t]
        s = (v >= 1.0).to(x.dtype)
        out[t] = s
        v -= s
    return out, v


def stacking_loop(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    v, out = torch.full_like(x[0], 0.5), []
    for current in x.unbind(0):
        v = v + current
        s = (v >= 1.0).to(x.dtype)
        v = v - s
        out.append(s)
    return torch.stack(out), v


def forward_runs(x: torch.Tensor, peer: bool) -> dict:
    runs = {"snnkernels": lambda: functional.if_multi_step(x, 0.5)[:2]}
    # Built once: compiling is not what is timed here.
    for name, loop in (("in-place", inplace_loop), ("stacking", stacking_loop)):
        compiled = torch.compile(loop, dynamic=False)
        runs[f"torch.compile, {name}"] = lambda compiled=compiled: compiled(x)
    if peer:
        from spikingjelly.activation_based import functional as sj
        from spikingjelly.activation_based import surrogate

        atan = surrogate.ATan(alpha=2.0)
        half = torch.full_like(x[0], 0.5)
        runs["spikingjelly"] = lambda: sj.if_multi_step(x, half, 1.0, None, atan, False, False)[:2]
    return runs


def training_runs(x: torch.Tensor, peer: bool) -> dict:
    grad = torch.randn_like(x)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()

    def run(leaf: torch.Tensor, spikes: torch.Tensor) -> torch.Tensor:
        leaf.grad = None
        spikes.backward(grad)
        assert leaf.grad is not None
        return leaf.grad

    runs = {"snnkernels": lambda: run(ours, functional.if_multi_step(ours, 0.5)[0])}
    if peer:
        from spikingjelly.activation_based import functional as sj
        from spikingjelly.activation_based import surrogate

        atan = surrogate.ATan(alpha=2.0)
        half = torch.full_like(x[0], 0.5)
        runs["spikingjelly"] = lambda: run(
            theirs, sj.if_multi_step(theirs, half, 1.0, None, atan, False, False)[0]
        )
    return runs


def call_runs(x: torch.Tensor) -> dict:
    from spikingjelly.activation_based import neuron, surrogate

    ours = snnkernels.IFNode()
    theirs = neuron.IFNode(
        v_reset=None, surrogate_function=surrogate.ATan(alpha=2.0), step_mode="m"
    )
    return {"snnkernels": lambda: ours(x), "spikingjelly": lambda: theirs(x)}


def rows(what: str, T: int, N: int, bytes_: int, times: dict[str, float]) -> list[dict]:
    best = times["snnkernels"]
    return [
        {
            "what": what,
            "T": T,
            "N": N,
            "implementation": name,
            "time relative to snnkernels": round(seconds / best, 2),
            "counted bytes per neuron-step": bytes_ if name == "snnkernels" else "",
        }
        for name, seconds in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", choices=["spikingjelly", "none"], default="spikingjelly")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads of everybody")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    peer = args.peer == "spikingjelly"
    logging.disable(logging.WARNING)
    tune_malloc()
    if args.threads:
        torch.set_num_threads(args.threads)
    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    timing = {"rounds": args.rounds, "wait": wait}
    table = []
    with torch.no_grad():
        for T, N in SHAPES:
            x = torch.rand(T, N, device=args.device) * 1.2 - 0.2
            runs = forward_runs(x, peer)
            first = runs["snnkernels"]()
            for name, run in runs.items():
                spikes, v = run()
                assert torch.equal(spikes, first[0]), name
                assert torch.equal(v, first[1]), name
            table += rows("forward", T, N, 8, interleaved(runs, **timing))
    for T, N in SHAPES[1:]:
        x = torch.rand(T, N, device=args.device) * 1.2 - 0.2
        runs = training_runs(x, peer)
        reference = runs["snnkernels"]()
        for name, run in runs.items():
            torch.testing.assert_close(run(), reference, msg=name)
        table += rows("forward+backward", T, N, 24, interleaved(runs, **timing))
    if peer:
        with torch.no_grad():
            runs = call_runs(torch.rand(4, 1_000, device=args.device))
            table += rows("IFNode call", 4, 1_000, 8, interleaved(runs, **timing))
    for row in table:
        print(*(f"{row[k]!s:>24}" for k in list(row)[:5]))
    print("rows:", save(f"neuron_{args.device}", table))


if __name__ == "__main__":
    main()
