"""What a call costs when there is next to nothing to compute.

    python benchmarks/bench_overhead.py [--device cpu|cuda] [--quick]

Every implementation runs 1000 or 1 neurons for 4 steps or 1. ``relative`` is to ours in the same
kind of call; ``torch.add`` shows what one operation of PyTorch costs. On a GPU calls are queued
eagerly, so that the time is the host's. Rows: results/overhead_<device>.csv.
"""

from __future__ import annotations

import os

# Torch's own log would drown the table.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import argparse
import math
from collections.abc import Callable
from typing import Any

import rivals
import torch
from cases import Case
from common import Skip, arguments, late, save, short, start, table
from timing import measure

import snnkernels
from snnkernels import functional

SHAPES = [(4, 1000), (4, 1), (1, 1000), (1, 1)]
KINDS = ("module", "module, recording", "module, forward+backward", "function", "one step")
COLUMNS = ("kind", "T", "N", "implementation", "relative", "low", "high", "us", "note")
Make = Callable[[Case], Callable[[torch.Tensor], Any]]


def _node(make: Callable[[], Any], grad: bool, backward: bool = False) -> Make:
    """A module's call; with gradients it starts anew each time, or its graph would grow."""

    def built(case: Case) -> Callable[[torch.Tensor], Any]:
        node = make()

        def run(x: torch.Tensor) -> Any:
            if grad:
                node.reset()
            y = node(x)
            return torch.autograd.grad(y.sum(), x) if backward else y

        return run

    return built


def _our(**options: Any) -> Callable[[], Any]:
    def make() -> Any:
        try:
            return snnkernels.IFNode(**options)
        except (TypeError, ValueError) as error:
            raise Skip(f"this snnkernels does not take it: {error}") from None

    return make


def _lif() -> Any:
    if not hasattr(snnkernels, "LIFNode"):
        raise Skip("this snnkernels has no LIFNode")
    return snnkernels.LIFNode()


def _step(function: Callable[..., Any]) -> Make:
    return lambda case: lambda x: function(x[0], 0.5, 1.0)


def _first_of(make: Make) -> Make:
    def built(case: Case) -> Callable[[torch.Tensor], Any]:
        call = make(case)
        return lambda x: call(x[0])

    return built


def _entry(name: str) -> Make:
    """A rival of the neuron benchmark, by name."""
    found = {entry.name: entry.make for entry in rivals.forward()}
    return found[name]


def entries(kind: str) -> dict[str, Make]:
    """Who takes part, ours first."""
    grad, backward = kind != "module", kind.endswith("backward")
    if kind.startswith("module"):
        ours = {"snnkernels, IFNode": _node(_our(), grad, backward)}
        if kind == "module":
            for output in ("count", "packed"):
                ours[f"snnkernels, IFNode {output}"] = _node(_our(output=output), False)
            ours["snnkernels, IFNode uint8"] = _node(_our(spike_dtype=torch.uint8), False)
            ours["snnkernels, LIFNode"] = _node(_lif, False)
        theirs = {"SpikingJelly, IFNode": _node(rivals.sj_node, grad, backward)}
        if not backward:
            for name in ("snnTorch, Leaky(beta=1)", "Norse, IAF", "Sinabs, IAF"):
                theirs[name] = _entry(name)
        return ours | theirs
    if kind == "function":
        return {
            "snnkernels, if_multi_step": lambda case: lambda x: functional.if_multi_step(x, 0.5),
            "snnkernels, if_count": lambda case: lambda x: functional.if_count(x, 0.5),
            "SpikingJelly, if_multi_step": _entry("SpikingJelly, function"),
            "PyTorch loop, in place": _entry("PyTorch loop, in place"),
            "torch.compile, stack": _entry("torch.compile, stack"),
            "torch.add": lambda case: lambda x: torch.add(x, x),
        }
    return {
        "snnkernels, if_step": _step(functional.if_step),
        "snnkernels, IFNode": _first_of(_node(_our(step_mode="s"), False)),
        "SpikingJelly, IFNode": _first_of(_node(lambda: rivals.sj_node(step_mode="s"), False)),
        "snnTorch, Leaky(beta=1)": _entry("snnTorch, Leaky(beta=1)"),
        "torch.add": lambda case: lambda x: torch.add(x, x),
    }


def rows(kind: str, case: Case, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One kind of call at one size."""
    torch._dynamo.reset()
    found, runs, x = [], {}, case.input()
    for name, make in entries(kind).items():
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
        row |= {"kind": kind, "T": case.T, "N": case.N, "implementation": name}
        found.append(row)
        try:
            runs[name] = make(case)
            runs[name](x)
        except Exception as error:
            runs.pop(name, None)
            row["note"] = str(error).splitlines()[0][:200]
            print(f"left out: {kind}, {name}: {row['note']}")
    times = measure(runs, [x], rounds=args.rounds)
    eager = {n: t.median if math.isnan(t.eager) else t.eager for n, t in times.items()}
    ours = eager[next(iter(runs))]
    for row in found:
        name = row["implementation"]
        if name in times:
            row["relative"] = short(eager[name] / ours)
            if args.device == "cuda":
                row["us"] = short(eager[name] * 1e6)
            else:
                row["low"] = short(times[name].low / ours)
                row["high"] = short(times[name].high / ours)
    return found


def main() -> None:
    """Runs everything, prints a table, saves rows."""
    args = start(arguments(__doc__).parse_args())
    result: list[dict[str, Any]] = []
    for kind in KINDS:
        shapes = [s for s in SHAPES if s[0] == 1] if kind == "one step" else SHAPES
        for T, N in shapes[:1] if args.quick else shapes:
            if late(args, f"{kind}, T={T}, N={N}"):
                continue
            grad = kind.startswith("module,")
            with torch.set_grad_enabled(grad):
                result += rows(kind, Case(T, N, device=args.device, training=grad), args)
            path = keep(result, args)
    print(table(result, COLUMNS))
    print("rows:", path)


def keep(result: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Saves what there is: a run that is cut off loses nothing."""
    told = [{**row, "malloc": args.malloc} for row in result]
    name = f"overhead_{args.device}"
    return str(save(name, told, key=("malloc",), folder=args.out, device=args.device))


if __name__ == "__main__":
    main()
