"""Whole networks on a GPU: what each step from SpikingJelly to fused int8 gives.

    python benchmarks/bench_gpu_network.py --device cuda [--networks NAME ...]
        [--batch N ...] [--T T ...] [--pipelines PART ...] [--quick]

Pipelines, each as calls of Python and, of plans, replayed as a CUDA graph:

* ``A`` SpikingJelly's RateCodingRecipe, its own conversion; ``A2`` its LTB recipe (half threshold);
* ``B`` SpikingJelly's IFNode on our network with thresholds folded, bit-equal to ours;
* ``C`` plan, float32 (TF32 products are allowed for everybody), ``D`` plan, bfloat16, convolution
  and neurons apart;
* ``F`` plan, bfloat16, fused; ``G`` plan, int8, fused.

Everybody's logits are compared with the unlowered network's, then all are timed in turns.
``relative``: median time divided by B's; ``TFLOP/s``: two operations for every multiply-add of the
dense network in every step, over that time; ``of peak``: of the card's (--peak, bfloat16 dense).
``MiB``: most that a call had allocated. Expected figures: results/predictions.md, written before.
On a CPU (--quick) plans run on maps in plain PyTorch: whether everything runs, not how fast.

Rows: results/network_cuda.csv, by network, batch, T, pipeline and calls.
"""

from __future__ import annotations

import copy
import os

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from common import Skip, arguments, late, save, short, start, table
from network_rivals import Run, _sj_converted, _sj_if_node
from networks import Subject, subject
from torch import Tensor

from snnkernels import lower
from snnkernels.engine import built as engine_built
from snnkernels.engine import plan as engine_plan

KEY = ("network", "batch", "T", "pipeline", "calls")
COLUMNS = (
    *KEY, "ms", "relative", "TFLOP/s", "of peak", "MiB", "spread", "max diff", "largest logit",
    "equal predictions", "note",
)  # fmt: skip
_PEAK = 989e12  # of an H100 or H200, bfloat16, dense


def _plan(subject: Subject, precision: str, off: tuple[str, ...]) -> Run:
    plan = lower(subject.snn, precision=precision, without=off)
    return lambda x, T: plan(x, T=T)


APART, EAGER = "fuse_convolutions", "capture_graphs"
PIPELINES: dict[str, tuple[Callable[[Subject], Run], ...]] = {
    "A SpikingJelly, RateCodingRecipe": (
        partial(_sj_converted, recipe="RateCodingRecipe", steps="m", mode="99.9%"),
    ),
    "A2 SpikingJelly, LTB recipe": (
        partial(_sj_converted, recipe="LocalThresholdBalancingRecipe", steps="m"),
    ),
    "B SpikingJelly, IFNode": (_sj_if_node,),
    "C plan, float32": tuple(
        partial(_plan, precision="float32", off=off) for off in ((APART, EAGER), (APART,))
    ),
    "D plan, bfloat16, apart": tuple(
        partial(_plan, precision="bfloat16", off=off) for off in ((APART, EAGER), (APART,))
    ),
    "F plan, bfloat16, fused": tuple(
        partial(_plan, precision="bfloat16", off=off) for off in ((EAGER,), ())
    ),
    "G plan, int8, fused": tuple(
        partial(_plan, precision="int8", off=off) for off in ((EAGER,), ())
    ),
}


def on(found: Subject, device: str) -> Subject:
    """The same network there."""
    return replace(
        found, ann=copy.deepcopy(found.ann).to(device), snn=found.snn.to(device),
        calibration=found.calibration.to(device), images=found.images.to(device), made={},
    )  # fmt: skip


def macs_of(found: Subject) -> float:
    """Multiply-adds of one image and step, of every convolution and linear layer."""
    total = 0.0

    def add(module: Any, given: Any, out: Tensor) -> None:
        nonlocal total
        total += out.numel() * module.weight[0].numel() / len(given[0])

    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    hooks = [m.register_forward_hook(add) for m in found.ann.modules() if isinstance(m, kinds)]
    found.ann(found.images[:1])
    for hook in hooks:
        hook.remove()
    return total


def seconds(run: Callable[[], object], device: str) -> float:
    """Of one call, waited for."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def allocated(run: Callable[[], object], device: str) -> str:
    """MiB that a call has at most, beside what there was."""
    if device != "cuda":
        return "n/a"
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return short((torch.cuda.max_memory_allocated() - before) / 2**20)


def one_case(found: Subject, batch: int, T: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Everybody on one batch and number of steps."""
    x = found.batch(batch)
    want = found.snn(x, T=T).float()
    work = 2.0 * macs_of(found) * batch * T
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    for name, makers in PIPELINES.items():
        if args.pipelines and not any(part in name for part in args.pipelines):
            continue
        for i, make in enumerate(makers):
            who = name, ("eager", "graph")[i]
            row: dict[str, Any] = {"network": found.name, "batch": batch, "T": T}
            row |= {"pipeline": name, "calls": who[1], "note": ""}
            rows[who] = row
            try:
                key = f"{who}"
                run = found.made[key] if key in found.made else make(found)
                found.made[key] = run
                for _ in range(3):  # the second captures, the third replays
                    got = run(x, T).float()
            except Skip as error:
                row["note"] = f"skipped: {error}"
                continue
            except Exception as error:
                reason = (str(error).splitlines() or [""])[0][:160]
                row["note"] = f"skipped: {type(error).__name__}: {reason}"
                continue
            row["max diff"] = short(float((got - want).abs().max()))
            row["largest logit"] = short(float(want.abs().max()))
            row["equal predictions"] = short(
                float((got.argmax(1) == want.argmax(1)).float().mean())
            )
            runs[who] = partial(run, x, T)
            row["MiB"] = allocated(runs[who], args.device)
    times: dict[tuple[str, str], list[float]] = {who: [] for who in runs}
    began = time.perf_counter()
    for turn in range(args.rounds):
        for who, call in runs.items():
            times[who].append(seconds(call, args.device))
        if turn >= 2 and time.perf_counter() - began > args.case_seconds:
            break
    medians = {who: statistics.median(values) for who, values in times.items()}
    base = medians.get(("B SpikingJelly, IFNode", "eager"))
    for who, median in medians.items():
        low, high = statistics.quantiles(times[who], n=4)[::2]
        rows[who]["spread"] = short((high - low) / median)
        rows[who]["relative"] = short(median / base) if base else ""
        if args.device == "cuda":  # on shared CPUs only ratios are quoted
            rows[who]["ms"] = short(1e3 * median)
            rows[who]["TFLOP/s"] = short(work / median / 1e12)
            rows[who]["of peak"] = short(work / median / args.peak)
    return list(rows.values())


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--networks", nargs="+", default=["vgg16-avg", "resnet34"], metavar="NAME")
    parser.add_argument("--batch", nargs="+", type=int, default=[64, 1, 256])
    parser.add_argument("--T", nargs="+", type=int, default=[8, 4, 32])
    parser.add_argument(
        "--pipelines", nargs="+", metavar="PART", help="those with PART in the name"
    )
    parser.add_argument("--peak", type=float, default=_PEAK, help="operations a second")
    parser.add_argument("--case-seconds", type=float, default=8.0, help="timing of one case")
    args = start(parser.parse_args())
    if args.quick:
        args.networks, args.batch, args.T = ["tiny-resnet"], [2], [4]
        args.case_seconds, args.rounds = 0.5, 3
    if args.device == "cpu":
        if not args.quick:
            raise SystemExit("bench_gpu_network.py measures GPUs; --quick tries it on a CPU")
        engine_built._form = lambda device: "maps"
        engine_plan.PRECISIONS["cpu"] = engine_plan.PRECISIONS["cuda"]
    torch.set_grad_enabled(False)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    path = None
    for name in args.networks:
        found = on(subject(name, None, max(args.batch)), args.device)
        for batch in args.batch:
            for T in args.T:
                if late(args, f"{name}, batch {batch}, T {T}"):
                    continue
                rows = one_case(found, batch, T, args)
                print(table(rows, COLUMNS), end="\n\n", flush=True)
                where = f"network_{'cuda' if args.device == 'cuda' else 'maps'}"
                path = save(where, rows, key=KEY, folder=args.out, device=args.device)
    print("rows:", path)


if __name__ == "__main__":
    main()
