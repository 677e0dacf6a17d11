"""One case: everybody is checked, then timed in turns, then written down."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from cases import Call, Case, Entry
from common import Skip, short
from limits import copies, gpu_copy
from memory import taken
from ours import NAME
from rivals import stacking_loop
from timing import Timing, first_call, measure, sets

Row = dict[str, Any]
COLUMNS = (
    "section", "direction", "T", "N", "dtype", "implementation", "relative", "us", "low", "high",
    "us eager", "how", "needed bytes", "counted bytes", "share of copy", "peak memory",
    "first call", "note", "agreement",
)  # fmt: skip


class _Ready:
    """An entry built for a case: its call, its first call's seconds, its row so far."""

    def __init__(self, entry: Entry, case: Case, inputs: list[torch.Tensor]) -> None:
        self.entry = entry
        self.call: Call = entry.make(case)
        x = inputs[0]
        self.first = first_call(lambda: self.call(x), case.device)
        self.result = self.call(x)
        self.counted = entry.counted(case, self.result)
        taken_bytes = taken(lambda: self.call(x), case.device)[1]
        self.peak = taken_bytes / case.nbytes


def compare(section: str, case: Case, entries: list[Entry], args: argparse.Namespace) -> list[Row]:
    """Rows of every entry, ``relative`` to the first one, which must work."""
    with torch.set_grad_enabled(case.training):
        return _compare(section, case, entries, args)


def _compare(section: str, case: Case, entries: list[Entry], args: argparse.Namespace) -> list[Row]:
    # Past its limit of recompilations dynamo would fall back in silence: each case starts afresh.
    torch._dynamo.reset()
    print(f"{section}: {case}", flush=True)
    many = sets((3 if case.training else 2) * case.nbytes, case.device)
    inputs = [case.input(seed) for seed in range(many)]
    truth = _truth(case, inputs[0])
    ready, rows = [], []
    for entry in entries:
        row: Row = _begin(section, case, entry)
        rows.append(row)
        try:
            reason = "" if getattr(args, "all", False) else entry.skip(case)
            if reason:
                raise Skip(reason)
            one = _Ready(entry, case, inputs)
            row["agreement"] = _agreement(case, entry, one.result, truth)
        except Exception as error:
            if entry.name == NAME:
                raise
            row["note"] = _why(error)
            print(f"  left out: {entry.name}: {row['note']}")
            continue
        one.result = None
        ready.append((one, row))
    del truth
    runs = {one.entry.name: one.call for one, _ in ready}
    limit = copies(case.nbytes, "cpu") if case.device == "cpu" else {}
    times = measure({**runs, **limit}, inputs, rounds=args.rounds, most=args.case_seconds)
    copied = _copied(case, times, limit)
    for one, row in ready:
        _fill(row, one, case, times, ready[0][0], copied)
    return rows


def _begin(section: str, case: Case, entry: Entry) -> Row:
    row: Row = dict.fromkeys(COLUMNS, "")
    row |= {
        "section": section,
        "direction": "forward+backward" if case.training else "forward",
        "T": case.T, "N": case.N, "dtype": case.dtype, "implementation": entry.name,
    }  # fmt: skip
    return row


def _fill(
    row: Row, one: _Ready, case: Case, times: dict[str, Timing], first: _Ready, copied: float
) -> None:
    time, ours = times[one.entry.name], times[first.entry.name]
    steps = case.T * case.N
    needed = first.counted if one.counted is None or not one.entry.ours else one.counted
    row["relative"] = short(time.median / ours.median)
    if case.device == "cuda":
        row["us"], row["how"] = short(time.median * 1e6), time.how
        row["low"], row["high"] = short(time.low * 1e6), short(time.high * 1e6)
        row["us eager"] = "" if math.isnan(time.eager) else short(time.eager * 1e6)
    else:
        # Times of a CPU are told as ratios only: of the quickest and slowest turn, too.
        row["low"], row["high"] = short(time.low / ours.median), short(time.high / ours.median)
    row["needed bytes"] = short(needed)
    row["counted bytes"] = "" if one.counted is None else short(one.counted)
    row["share of copy"] = short(needed * steps / time.median / copied)
    row["peak memory"] = short(one.peak)
    row["first call"] = short(one.first / first.first)


def _copied(case: Case, times: dict[str, Timing], limit: dict[str, Call]) -> float:
    """Bytes per second of the quickest copy, read and written."""
    if case.device == "cuda":
        return gpu_copy()
    return 2 * case.nbytes / min(times[name].median for name in limit)


# ---- is it the same? -----------------------------------------------------------------------------


def _truth(case: Case, x: torch.Tensor) -> torch.Tensor:
    """Spikes as bytes, or the gradient, of the plain loop."""
    if not case.training:
        return stacking_loop(x)[0].to(torch.uint8)
    from cases import trained

    return trained(lambda case: stacking_loop)(case)(x)[0]


def _agreement(case: Case, entry: Entry, result: Any, truth: torch.Tensor) -> str:
    reason = entry.differs(case)
    if case.training:
        scale = truth.abs().max().clamp_min(1e-30)
        worst = float((result[0].view_as(truth) - truth).abs().max() / scale)
        loose = 1e-5 if case.dtype in ("float32", "float64") else 2e-2
        if not worst <= loose and not reason:
            raise Skip(f"not timed: its gradient is off by {worst:.2g} of the largest, unexplained")
        return f"gradient within {worst:.1g}" + (f": {reason}" if worst > loose else "")
    wrong = _differing(entry, result[0], truth)
    if wrong and not reason:
        raise Skip(f"not timed: {wrong} of {truth.numel()} spikes differ, unexplained")
    return f"{wrong} of {truth.numel()} spikes differ: {reason}" if wrong else "identical"


def _differing(entry: Entry, answer: Any, truth: torch.Tensor) -> int:
    if hasattr(answer, "unpack"):
        answer = answer.unpack()
    if entry.name.endswith("count"):
        return int((answer != truth.sum(0)).sum())
    if entry.name.endswith("rate"):
        return int(((answer.double() * truth.shape[0]).round() != truth.sum(0)).sum())
    return int((answer.reshape(truth.shape).to(torch.uint8) != truth).sum())


def _why(error: Exception) -> str:
    text = str(error).strip().splitlines()
    line = text[0][:200] if text else ""
    return line if isinstance(error, Skip) else f"{type(error).__name__}: {line}"
