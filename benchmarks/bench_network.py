"""Whole networks: the plan against the unlowered network, SpikingJelly, and the ANN's one pass.

    python benchmarks/bench_network.py [--networks NAME ...] [--checkpoint PATH ...] [--data PATH]
        [--batch N ...] [--T T ...] [--rivals PART ...] [--section NAME ...] [--quick]

Everybody's logits are compared with those of the unlowered network, then all are timed in turns.
Networks without a checkpoint are untrained and made to fire like trained ones (networks.py): of
those only the time says something, their predictions are near ties.

``time``: ``relative``: time divided by the plan's; ``ANN passes``: by that of one dense float32
pass of the ANN (batch norms folded, NCHW) on the same images, and so are ``p50`` and ``p99``, the
percentiles of single calls at batch 1; ``spread``: of calls, the middle half's width over their
median: a busy machine shows here, in short calls most (threads that wait for each other);
``max diff``: of logits, beside the largest; ``energy``: joules divided by the plan's, where the
processor's counters can be read; ``rate``: spikes per neuron and step.
``passes``: the plan without each pass, relative to the plan, and its spikes' memory, as planned.
``throughput``: images a second of each batch size, relative to the plan's at the first.
``layers``: results/engine_cost.csv: where the plan's time goes, and what its cost model predicts
from the rates on these images; synaptic operations are of an image and all steps, dense MACs of one
pass; ``(all)``'s prediction is of the layers that run packed.
``memory``: peak of a call in a process of its own, relative to the plan's.

Rows: results/network_cpu.csv and results/engine_cost.csv; those of the same section, network,
batch and T are replaced. A case that would take too long or too much memory is skipped, with its
reason in the row. --seconds ends a run between cases; what there is is kept.
"""

from __future__ import annotations

import os

# Progress bars and torch's own log would drown the table.
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Skip, arguments, late, save, short, start, table
from network_layers import layer_rows
from network_memory import in_a_process
from network_picture import picture
from network_rivals import ANN, PLAN, UNLOWERED, Rival, has_max_pools, made, plan_of, rivals
from networks import DEFAULT, NETWORKS, QUICK, Subject, subject

from snnkernels.engine import ALL_PASSES

SECTIONS = ("time", "passes", "throughput", "layers", "memory")
COLUMNS = (
    "section", "network", "batch", "T", "implementation", "relative", "ANN passes", "p50", "p99",
    "spread", "calls", "energy", "MiB", "max diff", "largest logit", "equal predictions", "rate",
    "note",
)  # fmt: skip
COST_COLUMNS = (
    "network", "precision", "layer", "runs", "size", "input rate", "rate", "share",
    "measured / predicted", "dense, measured / predicted", "unlowered / plan",
    "synaptic operations", "dense MACs", "note",
)  # fmt: skip
Row = dict[str, Any]
Call = Callable[[], torch.Tensor]
_OF_GPUS = ("fuse_convolutions", "capture_graphs")
_LATENCY_CALLS = 100  # p99 of fewer calls would be their maximum
_RAPL = "/sys/class/powercap/intel-rapl:*/energy_uj"


# ---- timing --------------------------------------------------------------------------------------


def in_turns(
    runs: dict[str, Call], rounds: int, most: float, calls: int = 1
) -> dict[str, list[float]]:
    """Seconds of every call of each run, in turns; at least 2 rounds, about ``most`` seconds.

    Args:
        runs: functions by name, called before.
        rounds: turns that each gets.
        most: seconds for all together.
        calls: that each run should have in the end: more in each turn.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    each = dict.fromkeys(runs, 1)
    began = time.perf_counter()
    for turn in range(rounds):
        for name, run in runs.items():
            for _ in range(each[name]):
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
        spent = time.perf_counter() - began
        if turn == 0:
            # Short ones are called until a turn is no flicker of the clock.
            wanted = -(-calls // rounds)
            each = {n: max(wanted, min(50, int(0.02 / t[0]))) for n, t in times.items()}
            ahead = sum(n * times[name][0] for name, n in each.items())
            if ahead * (rounds - 1) > most - spent:
                fit = max(0.0, most - spent) / (ahead * (rounds - 1))
                each = {name: max(1, int(n * fit)) for name, n in each.items()}
        elif spent > most:
            break
    return times


def joules(run: Call, seconds: float = 1.0) -> float | None:
    """Energy of a call by the processor's counters; None where they cannot be read."""
    counters = [path for path in Path("/").glob(_RAPL[1:]) if os.access(path, os.R_OK)]
    if not counters:
        return None
    before = [int(path.read_text()) for path in counters]
    calls, began = 0, time.perf_counter()
    while not calls or time.perf_counter() - began < seconds:
        run()
        calls += 1
    spent = [int(path.read_text()) - b for path, b in zip(counters, before, strict=True)]
    return sum(spent) / 1e6 / calls if min(spent) >= 0 else None  # a counter began again


def percentile(times: Sequence[float], share: float) -> float:
    """The value that a share of all do not exceed."""
    return sorted(times)[min(len(times) - 1, int(share * len(times)))]


# ---- who takes part ------------------------------------------------------------------------------


def chosen(args: argparse.Namespace) -> list[Rival]:
    """The plan, the unlowered network and the ANN always: the rest is measured in them."""
    base = (PLAN, UNLOWERED, ANN)
    wanted = args.rivals or [""]
    return [r for r in rivals() if r.name in base or any(part in r.name for part in wanted)]


def free_memory() -> float:
    """Bytes that can be taken."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable")]
    return int(found[0]) * 1024 if found else float("inf")


def runs_of(
    found: Subject, batch: int, T: int, who: list[Rival], args: argparse.Namespace
) -> tuple[dict[str, Call], dict[str, torch.Tensor], dict[str, str]]:
    """Calls by name, what each answers, and why others are not among them."""
    x = found.batch(batch)
    runs: dict[str, Call] = {}
    answers: dict[str, torch.Tensor] = {}
    notes: dict[str, str] = {}
    for rival in who:
        steps = 1 if rival.timeless else T
        need = 4.0 * rival.held * steps * batch * found.widest
        if need > 0.6 * free_memory():
            notes[rival.name] = f"skipped: would take {need / 2**30:.0f} GiB"
            continue
        try:
            run = made(rival, found)
            began = time.perf_counter()
            answers[rival.name] = run(x, T)
            took = time.perf_counter() - began
        except Skip as error:
            notes[rival.name] = f"skipped: {error}"
            continue
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0][:200]
            notes[rival.name] = f"skipped: {type(error).__name__}: {reason}"
            continue
        slow = 2 * took > args.case_seconds and not args.quick
        if slow and rival.name not in (PLAN, UNLOWERED, ANN):
            notes[rival.name] = "skipped: a call takes too long here (--case-seconds)"
            continue
        runs[rival.name] = partial(run, x, T)
        notes[rival.name] = rival.differs
        if rival.name == "SpikingJelly, IFNode":
            notes[rival.name] = "bit-equal to ours with thresholds folded"
            if has_max_pools(found):
                notes[rival.name] += "; pools the currents of each step, ours their running sums"
    return runs, answers, notes


# ---- sections ------------------------------------------------------------------------------------


def time_rows(found: Subject, batch: int, T: int, args: argparse.Namespace) -> list[Row]:
    """Everybody on one batch size and number of steps."""
    who = chosen(args)
    runs, answers, notes = runs_of(found, batch, T, who, args)
    latency = batch == 1
    calls = min(_LATENCY_CALLS, 10 if args.quick else _LATENCY_CALLS) if latency else 1
    times = in_turns(runs, args.rounds, args.case_seconds, calls)
    medians = {name: statistics.median(values) for name, values in times.items()}
    energy = {name: joules(run) for name, run in runs.items()}
    unit, ours, want = medians.get(ANN), medians.get(PLAN), answers.get(UNLOWERED)
    rows = []
    for rival in who:
        row: Row = {"section": "time", "network": found.name, "batch": batch, "T": T}
        row |= {"implementation": rival.name, "rate": short(found.rate)}
        row["note"] = notes.get(rival.name, "")
        if rival.name in (PLAN, "plan, int16"):
            _, left_out = plan_of(found, "int16" if "int16" in rival.name else "float32")
            row["note"] = "; ".join(filter(None, (row["note"], left_out)))
        rows.append(row)
        if rival.name not in medians:
            continue
        mine = medians[rival.name]
        row["calls"] = len(times[rival.name])
        quarters = [percentile(times[rival.name], share) for share in (0.25, 0.75)]
        row["spread"] = short((quarters[1] - quarters[0]) / mine)
        row["relative"] = short(mine / ours) if ours else ""
        if unit:
            row["ANN passes"] = short(mine / unit)
            if latency:
                row["p50"] = short(percentile(times[rival.name], 0.5) / unit)
                if row["calls"] >= _LATENCY_CALLS:
                    row["p99"] = short(percentile(times[rival.name], 0.99) / unit)
        used, base = energy[rival.name], energy.get(PLAN)
        row["energy"] = short(used / base) if used and base else "n/a"
        if want is not None and rival.name != UNLOWERED:
            got = answers[rival.name]
            row["max diff"] = short(float((got - want).abs().max()))
            row["largest logit"] = short(float(want.abs().max()))
            equal = got.argmax(1) == want.argmax(1)
            row["equal predictions"] = short(float(equal.float().mean()))
    return rows


def pass_rows(found: Subject, batch: int, T: int, args: argparse.Namespace) -> list[Row]:
    """The plan with each pass left out, next to the plan with all."""
    x = found.batch(batch)
    full, left_out = plan_of(found)
    plans = {"all": full}
    notes = {"all": left_out}
    for name in ALL_PASSES:
        if name in _OF_GPUS:
            continue
        plans[name], notes[name] = plan_of(found, without=[name])
    runs = {name: partial(plan, x, T=T) for name, plan in plans.items()}
    answers = {name: run() for name, run in runs.items()}
    times = in_turns(runs, args.rounds, args.case_seconds)
    whole = statistics.median(times["all"])
    rows = []
    for name, plan in plans.items():
        row: Row = {"section": "passes", "network": found.name, "batch": batch, "T": T}
        row["implementation"] = PLAN if name == "all" else f"plan without {name}"
        row["relative"] = short(statistics.median(times[name]) / whole)
        row["MiB"] = short(plan.peak_memory(batch, T) / 2**20)
        row["max diff"] = short(float((answers[name] - answers["all"]).abs().max()))
        places = len(full.explain(x).passes.get(name, []))
        did = "" if name == "all" else f"{places} places in this network"
        row |= {"rate": short(found.rate), "note": "; ".join(filter(None, (did, notes[name])))}
        rows.append(row)
    return rows


def throughput_rows(found: Subject, args: argparse.Namespace) -> list[Row]:
    """Images a second over batch sizes, all in the same turns."""
    T = 16 if 16 in args.T else args.T[0]
    who = [r for r in chosen(args) if "recipe" not in r.name.lower()]
    runs: dict[str, Call] = {}
    sizes: dict[str, tuple[str, int]] = {}
    for batch in args.batch:
        mine, _, _ = runs_of(found, batch, T, who, args)
        for name, run in mine.items():
            runs[f"{name} {batch}"] = run
            sizes[f"{name} {batch}"] = name, batch
    times = in_turns(runs, args.rounds, args.case_seconds)
    speed = {key: sizes[key][1] / statistics.median(values) for key, values in times.items()}
    base = speed[f"{PLAN} {args.batch[0]}"]
    return [
        {
            "section": "throughput", "network": found.name, "batch": batch, "T": T,
            "implementation": name, "relative": short(speed[key] / base),
            "rate": short(found.rate), "note": "images a second, of the plan's at the first size",
        }
        for key, (name, batch) in sizes.items()
    ]  # fmt: skip


def memory_rows(found: Subject, name: str, args: argparse.Namespace) -> list[Row]:
    """Peaks of one call of everybody at the largest batch and number of steps."""
    batch, T = max(args.batch), max(args.T)
    rows = []
    # A process each, which takes seconds.
    for rival in chosen(args)[: 2 if args.quick else None]:
        row: Row = {"section": "memory", "network": found.name, "batch": batch, "T": T}
        row |= {"implementation": rival.name, "rate": short(found.rate)}
        rows.append(row)
        steps = 1 if rival.timeless else T
        need = 4.0 * rival.held * steps * batch * found.widest
        try:
            if need > 0.8 * free_memory():
                raise Skip(f"would take {need / 2**30:.0f} GiB")
            row["MiB"] = short(in_a_process(name, rival.name, batch, T, args.data) / 2**20)
        except Skip as error:
            row["note"] = f"skipped: {error}"
    ours = rows[0].get("MiB")
    for row in rows:
        if ours and row.get("MiB"):
            row["relative"] = short(row["MiB"] / ours)
    return rows


# ---- the run -------------------------------------------------------------------------------------


def keep(rows: list[Row], args: argparse.Namespace) -> Path:
    """Saves rows, in the place of those of the same case."""
    rows = [{**dict.fromkeys(COLUMNS, ""), **row, "malloc": args.malloc} for row in rows]
    key = ("section", "network", "batch", "T", "malloc")
    return save("network_cpu", rows, key=key, folder=args.out)


def keep_costs(rows: list[Row], args: argparse.Namespace) -> Path:
    """The same of the layers' costs."""
    columns = ("network", "batch", "T", *COST_COLUMNS[1:])
    rows = [{**dict.fromkeys(columns, ""), **row, "malloc": args.malloc} for row in rows]
    key = ("network", "batch", "T", "precision", "malloc")
    return save("engine_cost", rows, key=key, folder=args.out)


def one_network(name: str, args: argparse.Namespace) -> None:
    """All sections of one network; what is measured is kept case by case."""
    try:
        found = subject(name, args.data, max(args.batch))
    except Skip as error:
        print(f"left out: {name}: {error}")
        return
    print(f"\n{found.name}: {found.rate:.3f} spikes per neuron and step", flush=True)
    T = 16 if 16 in args.T else args.T[0]
    batch = 8 if 8 in args.batch else args.batch[0]
    where = f"{found.name}, "
    if "time" in args.section:
        # The case of the floors first: --seconds may end the run anywhere.
        cases = [(b, t) for b in args.batch for t in args.T]
        for b, t in sorted(cases, key=lambda case: case != (batch, T)):
            if not late(args, f"{where}batch {b}, T {t}"):
                show(rows := time_rows(found, b, t, args), COLUMNS)
                keep(rows, args)
    if "passes" in args.section and not late(args, where + "passes"):
        show(rows := pass_rows(found, batch, T, args), COLUMNS)
        keep(rows, args)
    if "throughput" in args.section and not late(args, where + "throughput"):
        show(rows := throughput_rows(found, args), COLUMNS)
        keep(rows, args)
    if "layers" in args.section:
        for precision in ("float32", "int16"):
            if not late(args, f"{where}layers, {precision}"):
                rows = layer_rows(found, batch, T, precision, args.rounds)
                show(rows, COST_COLUMNS)
                keep_costs(rows, args)
    if "memory" in args.section and not late(args, where + "memory"):
        show(rows := memory_rows(found, name, args), COLUMNS)
        keep(rows, args)


def show(rows: list[Row], columns: Sequence[str]) -> None:
    """Prints a table of one case."""
    print(table(rows, columns), end="\n\n", flush=True)


def main() -> None:
    """Runs what is asked for, network by network, saves rows and a picture."""
    parser = arguments(__doc__)
    parser.set_defaults(rounds=9)
    parser.add_argument("--section", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--networks", nargs="*", choices=list(NETWORKS), help="untrained ones")
    parser.add_argument(
        "--checkpoint", nargs="*", default=[], metavar="PATH", help="trained ones (.safetensors)"
    )
    parser.add_argument("--data", type=Path, metavar="PATH", help="CIFAR-10 (default: synthetic)")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--T", nargs="+", type=int, default=[4, 8, 16, 32])
    parser.add_argument(
        "--rivals",
        nargs="+",
        metavar="PART",
        help="plan, unlowered, ANN and whose name has PART in it",
    )
    parser.add_argument("--passes", action="store_true", help="the section of that name alone")
    parser.add_argument("--case-seconds", type=float, default=60.0, help="timing of one case")
    args = start(parser.parse_args())
    if args.device != "cpu":
        raise SystemExit("bench_network.py measures the engine, which runs on CPUs")
    if args.passes:
        args.section = ["passes"]
    names = args.networks
    if args.quick:
        names = QUICK if names is None else names
        args.batch, args.T, args.case_seconds, args.rounds = [1, 2], [4], 0.3, 2
    elif names is None:
        names = () if args.checkpoint else DEFAULT
    torch.set_grad_enabled(False)
    for name in (*args.checkpoint, *names):
        if not late(args, name):
            one_network(name, args)
    path = args.out / "network_cpu.csv"
    print("rows:", path)
    print("picture:", picture(path))


if __name__ == "__main__":
    main()
