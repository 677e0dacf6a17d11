"""SpikingJelly 0.0.0.0.14 with CuPy, the last release that has it, in a process of its own.

It shares its import name with 2.0.0, so it lives in a folder that only the child's path holds, and
the child prints its times as JSON. Its CuPy kernels run in training mode only; without gradients
that is still a forward pass. It needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from cases import Case
from common import short
from compare import COLUMNS, Row

NAME = "SpikingJelly 0.0.0.0.14, CuPy"


def rows(args: argparse.Namespace, ours: list[Row]) -> list[Row]:
    """Its rows at the sizes of ``ours``, relative to them; none, with a reason, where it fails."""
    wanted = [
        row for row in ours
        if row["implementation"] == "snnkernels" and row["dtype"] == "float32" and row["us"] != ""
    ]  # fmt: skip
    sizes = [(row["T"], row["N"]) for row in wanted][:12]
    path = filter(None, [str(Path(args.sj14).resolve()), os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, __file__, json.dumps(sizes)]
    try:
        child = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, check=True
        )
        found = json.loads(child.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError) as error:
        last = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1:]
        print(f"left out: {NAME}: {type(error).__name__}", *last)
        return []
    result = []
    for row, (microseconds, wrong) in zip(wanted, found, strict=False):
        total = row["T"] * row["N"]
        mine = dict.fromkeys(COLUMNS, "")
        mine |= {k: row[k] for k in ("section", "direction", "T", "N", "dtype", "needed bytes")}
        mine |= {"implementation": NAME, "us": short(microseconds), "how": "eager"}
        mine["agreement"] = f"{wrong} of {total} spikes differ" if wrong else "identical"
        mine["relative"] = short(microseconds / row["us"])
        mine["share of copy"] = short(row["share of copy"] * row["us"] / microseconds)
        mine["counted bytes"] = short(36 + 8 / row["T"])
        mine["note"] = "a process of its own, not in turns with the others"
        result.append(mine)
    return result


def _child(sizes: list[tuple[int, int]]) -> None:
    """Times the old release; runs in the child."""
    import numpy
    from rivals import stacking_loop
    from timing import measure, sets

    setattr(numpy, "int", int)  # noqa: B010 - the old release asks for the name NumPy dropped
    from spikingjelly.activation_based import neuron, surrogate

    found = []
    with torch.no_grad():
        for T, N in sizes:
            case = Case(T, N, device="cuda")
            node = neuron.IFNode(
                v_reset=None, surrogate_function=surrogate.ATan(), step_mode="m", backend="cupy"
            ).cuda()

            def run(x: torch.Tensor, node: Any = node) -> Any:
                node.reset()
                node.v = torch.full_like(x[0], 0.5)
                return node(x)

            inputs = [case.input(seed) for seed in range(sets(2 * case.nbytes, "cuda"))]
            wrong = int((run(inputs[0]) != stacking_loop(inputs[0])[0]).sum())
            time = measure({"it": run}, inputs, rounds=7)["it"]
            # It waits for small copies at every call: eager time is the only one it has.
            seconds = time.median if time.how == "eager" else time.eager
            found.append((seconds * 1e6, wrong))
    print(json.dumps(found))


if __name__ == "__main__":
    _child([tuple(size) for size in json.loads(sys.argv[1])])
