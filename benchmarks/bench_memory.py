"""What a layer's training and inference cost in memory.

    python benchmarks/bench_memory.py [--device cpu|cuda] [--quick] [--dtype float32 ...]

The current is made inside what is measured and let go by its maker, as a convolution's output is:
so an implementation pays for it exactly when it keeps it. In units of the current's size,

``kept``: between forward and backward, besides the spikes, which the next layer has anyway;
``peak, training`` and ``peak, inference``: the most at any moment, current and spikes included.

How it is measured: memory.py. Rows: results/memory_<device>.csv.
"""

from __future__ import annotations

import os

# Torch's own log would drown the table.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import argparse
from dataclasses import replace
from typing import Any

import ours
import rivals
import torch
from cases import DTYPES, Case, Entry
from common import arguments, late, save, short, start, table
from memory import taken

SHAPE = {"cpu": (16, 200_000), "cuda": (16, 1 << 22)}
_ONLY = "inference"
COLUMNS = ("implementation", "T", "N", "dtype", "kept", "peak, training", "peak, inference", "note")


def entries() -> list[Entry]:
    """Everybody who has gradients, ours with every ``save=``, then who answers in less."""
    saving = [
        Entry(f"{ours.NAME}, save={save!r}", ours.saving_forward(save)) for save in ours.SAVES
    ]
    return [ours.base(), *saving, *rivals.differentiable(), *_inference()]


def _inference() -> list[Entry]:
    plain = [entry for entry in rivals.forward() if "loop, in place" in entry.name]
    return [replace(entry, tags=frozenset({_ONLY})) for entry in [*ours.outputs()[1:], *plain]]


def trained(entry: Entry, case: Case, row: dict[str, Any]) -> None:
    """Fills in what training takes."""
    leaf = case.input()
    call = entry.make(case)
    grad = torch.ones(case.T, case.N, dtype=case.torch_dtype, device=case.device)

    def forward() -> torch.Tensor:
        return call(leaf.clone())[0]

    def both() -> Any:
        spikes = forward()
        return torch.autograd.grad(spikes, leaf, grad.to(spikes.dtype).view_as(spikes))

    both()  # compiles, warms up
    spikes = forward()
    size = ours.nbytes(spikes)
    del spikes
    row["kept"] = short((taken(forward, case.device)[0] - size) / case.nbytes)
    row["peak, training"] = short(taken(both, case.device)[1] / case.nbytes)


def inferred(entry: Entry, case: Case, row: dict[str, Any]) -> None:
    """Fills in what inference takes."""
    source = case.input()
    with torch.no_grad():
        call = entry.make(case)
        call(source)
        peak = taken(lambda: call(source.clone()), case.device)[1]
    row["peak, inference"] = short(peak / case.nbytes)


_FILLS = ((inferred, False), (trained, True))


def rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Everybody, in every dtype asked for."""
    T, N = (4, 1000) if args.quick else SHAPE[args.device]
    found = []
    for dtype in args.dtype:
        for entry in entries():
            if late(args, f"{entry.name}, {dtype}"):
                continue
            torch._dynamo.reset()
            row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
            row |= {"implementation": entry.name, "T": T, "N": N, "dtype": dtype}
            found.append(row)
            fills = ((inferred, False),) if _ONLY in entry.tags else _FILLS
            for fill, training in fills:
                case = Case(T, N, dtype, args.device, training)
                try:
                    fill(entry, case, row)
                except Exception as error:
                    row["note"] = (str(error).splitlines() or [type(error).__name__])[0][:200]
                    print(f"left out: {entry.name}, {fill.__name__}: {row['note']}")
            keep(found, args)
    return found


def keep(found: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Saves what there is: a run that is cut off loses nothing."""
    name = f"memory_{args.device}"
    return str(save(name, found, folder=args.out, device=args.device))


def main() -> None:
    """Runs everything, prints a table, saves rows."""
    parser = arguments(__doc__)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    args = start(parser.parse_args())
    result = rows(args)
    print(table(result, COLUMNS))
    print("rows:", keep(result, args))


if __name__ == "__main__":
    main()
