"""How the cost of calibration and evaluation grows with images, T, depth and ranks.

    OMP_NUM_THREADS=1 python benchmarks/bench_scaling.py

Cost is CPU time (of the process, so that what else runs on the machine hardly shows), as a ratio
to the same call at the base sizes; with several ranks it is that of the busiest one. The networks
are untrained: conv 3x3 of 16 channels on 16 x 16 images, ``depth`` times. A row also has the cost
in passes of the ANN over the same images, in one process. Rows go to ``results/scaling_cpu.csv``.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import arguments, save, short, start, table
from torch import Tensor, nn

import snnkernels
from snnkernels.distributed import evaluate
from snnkernels.distributed.team import launched

BASE = {"images": 256, "T": 8, "depth": 4, "ranks": 1}
SIZES = {"images": (512, 1024), "T": (16, 32), "depth": (8, 16), "ranks": (2, 4)}
BATCH, REPEATS = 32, 2
WORK = ("calibration", "evaluation", "evaluation, lowered")
COLUMNS = ("what", *BASE, "cost", "ANN passes")


def sized(base: dict[str, int], name: str, value: int) -> dict[str, int]:
    """Another value of one size; ranks share four times the images, to have something to share."""
    more = {"images": 4 * base["images"]} if name == "ranks" else {}
    return {**base, **more, name: value}


def network(depth: int) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Conv2d(16 if i else 3, 16, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)).eval()


def stream(images: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same few batches over and over, at no cost."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(8, BATCH, 3, 16, 16, generator=g), torch.randint(10, (8, BATCH), generator=g)
    for i in range(images // BATCH):
        yield x[i % 8], y[i % 8]


def seconds(call: Callable[[], Any]) -> float:
    call()
    times = []
    for _ in range(REPEATS):
        begin = time.process_time()
        call()
        times.append(time.process_time() - begin)
    return min(times)


def measure(sizes: dict[str, int], group: Any) -> dict[str, float]:
    """CPU seconds of this rank for each piece of work."""
    net, n, T = network(sizes["depth"]), sizes["images"], sizes["T"]
    snn = snnkernels.convert(net, [next(stream(BATCH))[0]], T=T, progress=False)
    plan = snnkernels.lower(snn)

    @torch.no_grad()
    def ann() -> None:
        for x, _ in stream(n):
            net(x)

    def calibrate() -> None:
        snnkernels.convert(net, stream(n), T=T, progress=False, process_group=group)

    found = {
        "calibration": seconds(calibrate),
        "evaluation": seconds(lambda: evaluate(snn, stream(n), [T], process_group=group)),
        "evaluation, lowered": seconds(lambda: evaluate(plan, stream(n), [T], process_group=group)),
    }
    return {**found, "ann": seconds(ann)} if group is None else found


def worker(sizes: dict[str, int]) -> None:
    torch.set_num_threads(1)
    with launched() as group:
        print(json.dumps(measure(sizes, group)))


def run(sizes: dict[str, int]) -> dict[str, float]:
    """The costs of the busiest rank."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks, started = sizes["ranks"], []
    for rank in range(ranks):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
        env |= {"MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(ranks)}
        command = [sys.executable, __file__, json.dumps(sizes)]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    found = [json.loads(p.communicate()[0].splitlines()[-1]) for p in started]
    return {what: max(f[what] for f in found) for what in found[0]}


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of docs/scaling.md."""
    found = {(r["what"], *(str(r[k]) for k in BASE)): r for r in rows}
    lines = ["| | calibration | evaluation | evaluation, lowered |", "| --- | ---: | ---: | ---: |"]
    for name, values in {"": (0,), **SIZES}.items():
        for value in values:
            size = sized(BASE, name, value) if name else BASE
            label = f"{value} {name}" if name != "T" else f"T = {value}"
            label += f" of {size['images']} images" if name == "ranks" else ""
            cells = [label if name else "the base"]
            for what in WORK:
                row = found[(what, *(str(n) for n in size.values()))]
                passes = f", {row['ANN passes']} passes" if row["ANN passes"] else ""
                cells.append(f"{row['cost']}{passes}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", choices=tuple(SIZES), help="vary this alone")
    args = start(parser.parse_args())
    base = dict(BASE, images=64) if args.quick else BASE
    sizes = [base]
    for name, values in SIZES.items():
        if args.only in (None, name):
            sizes += [sized(base, name, v) for v in values[: 1 if args.quick else None]]
    first = run(base)
    rows = []
    for size in sizes:
        found = first if size == base else run(size)
        for what in WORK:
            row = {"what": what, **size, "cost": short(found[what] / first[what])}
            row["ANN passes"] = short(found[what] / found["ann"]) if "ann" in found else ""
            rows.append(row)
    save("scaling_cpu", rows, key=("what", *BASE), folder=args.out)
    print(table(rows, COLUMNS))


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("{"):
        worker(json.loads(sys.argv[1]))
    else:
        main()
