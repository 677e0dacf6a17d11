"""The fused neuron against its rivals: forward, training, outputs, dtypes, and the copy limit.

    python benchmarks/bench_neuron.py [--section NAME ...] [--device cpu|cuda] [--quick] [--all]

Everybody is first compared with a plain loop, spike by spike (half of the inputs meet the threshold
exactly), then timed in turns on fresh outputs. Rows: results/neuron_<device>.csv, one section
replacing its own; results/predictions.md says what was expected, and how bytes are counted.

``relative``: time divided by that of snnkernels with fresh spikes in the input's dtype.
``needed bytes``: what the answer has to read and write per neuron-step; ``counted bytes``: what the
implementation moves; ``share of copy``: needed bytes over time, of the machine's best copy.
``peak memory``: beyond inputs, in units of the input. ``first call``: relative to our first call.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time

# Torch's own log would drown the table.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
# A compiler's cold start is part of what a user waits for, so its caches start empty.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp(prefix="snnkernels_inductor_"))

import limits
import ours
import rivals
import sj14
from cases import Case, Entry
from common import arguments, late, save, short, start, table
from compare import COLUMNS, Row, compare
from picture import picture

SECTIONS = ("forward", "outputs", "training", "dtypes", "limits")
_CPU = [(4, 10**4), (8, 10**5), (128, 10**5), (16, 10**6), (32, 10**6), (64, 10**6), (16, 10**7)]
_CPU_DTYPES = [(8, 10**5), (16, 10**6)]
_QUICK = [(4, 1000)]
# The most telling first: --seconds may end the run anywhere.
_GPU_T = (8, 4, 32, 16, 2, 1)
_GPU_N = tuple(1 << k for k in (24, 20, 12, 16, 22))
_GPU_DTYPES = ("float32", "bfloat16", "float16")
_GPU_RIVALS_T, _GPU_RIVALS_N = (4, 8, 32), tuple(1 << k for k in (12, 20, 24))
_GPU_COMPILE_T, _GPU_COMPILE_N = (8,), (1 << 12, 1 << 20, 1 << 24)


def cases(section: str, args: argparse.Namespace) -> list[Case]:
    """The sizes of a section."""
    training = section == "training"
    if args.size:
        shapes = [tuple(map(int, size.split("x"))) for size in args.size]
        names = ("float64", "float16", "bfloat16") if section == "dtypes" else ("float32",)
        return [Case(T, N, name, args.device, training) for T, N in shapes for name in names]
    if args.quick:
        dtypes = ("float64", "float16", "bfloat16") if section == "dtypes" else ("float32",)
        return [Case(*s, d, args.device, training) for s in _QUICK for d in dtypes]
    if args.device == "cpu":
        if section == "dtypes":
            both = (False, True)
            names = ("float64", "float16", "bfloat16")
            return [Case(*s, d, "cpu", t) for d in names for s in _CPU_DTYPES for t in both]
        # The largest would need more than 24 GiB for rivals that keep every step.
        shapes = _CPU[:-1] if training and not args.all else _CPU
        return [Case(*shape, "float32", "cpu", training) for shape in shapes]
    names = _GPU_DTYPES[1:] if section == "dtypes" else _GPU_DTYPES[:1]
    both = (False, True) if section == "dtypes" else (training,)
    return [
        Case(T, N, name, "cuda", t) for t in both for name in names for N in _GPU_N for T in _GPU_T
    ]


def entries(section: str, case: Case, args: argparse.Namespace) -> list[Entry]:
    """Who takes part in a case of a section, ours first."""
    if section == "outputs":
        return ours.outputs()
    if case.training:
        found = [*ours.training(), *rivals.training()]
    elif section == "dtypes":
        found = [*ours.outputs(), *rivals.forward()]
    else:
        found = [ours.base(), ours.reference(), *rivals.forward()]
    if case.device == "cuda" and not args.all:
        found = [entry for entry in found if entry.ours or _on_gpu(case, entry)]
    return found


def _on_gpu(case: Case, entry: Entry) -> bool:
    # Ours takes the whole grid; rivals enough of it to draw a line, in the minutes there are.
    if entry.compiles:
        if "SpikingJelly" in entry.name or case.dtype == "float16":
            return False  # seconds of compiling each, for the kernel that the function runs too
        return case.T in _GPU_COMPILE_T and case.N in _GPU_COMPILE_N
    return case.T in _GPU_RIVALS_T and case.N in _GPU_RIVALS_N


def limit_rows(args: argparse.Namespace) -> list[Row]:
    """Copies of the sizes that the other sections move: CPU relative to the best one."""
    from timing import measure

    rows = []
    shapes = _QUICK if args.quick else _CPU if args.device == "cpu" else [(8, 1 << 24)]
    for T, N in shapes:
        case = Case(T, N, device=args.device)
        runs = limits.copies(case.nbytes, args.device)
        x = case.input()
        times = measure(runs, [x], rounds=args.rounds, most=args.case_seconds)
        best = min(t.median for t in times.values())
        for name, taken in times.items():
            row = dict.fromkeys(COLUMNS, "")
            row |= {"section": "limits", "direction": "copy", "T": T, "N": N, "dtype": "float32"}
            row |= {"implementation": name, "relative": short(taken.median / best)}
            row["share of copy"] = short(best / taken.median)
            if args.device == "cuda":
                moved = 2 * max(case.nbytes, 1 << 30)
                row["us"] = short(taken.median * 1e6)
                row["note"] = f"{moved / taken.median / 1e12:.2f} TB/s, read and written"
            rows.append(row)
    return rows


def section_rows(section: str, args: argparse.Namespace) -> list[Row]:
    """Measures a section, keeping after every case what there is."""
    if section == "limits":
        rows = limit_rows(args)
        keep(rows, args)
        return rows
    rows = []
    for case in cases(section, args):
        if late(args, f"{section}: {case}"):
            continue
        found = entries(section, case, args)
        if args.only:
            found = [e for e in found if e is found[0] or any(o in e.name for o in args.only)]
        rows += compare(section, case, found, args)
        keep(rows, args)
    if section == "forward" and args.sj14:
        rows += sj14.rows(args, rows)
        keep(rows, args)
    return rows


def keep(rows: list[Row], args: argparse.Namespace) -> str:
    """Saves rows, in the place of those with the same section and malloc setting (and size)."""
    rows = [{**row, "malloc": args.malloc} for row in rows]
    key: tuple[str, ...] = ("section", "malloc")
    if args.size:
        key += ("direction", "T", "N", "dtype")
    path = save(f"neuron_{args.device}", rows, key=key, folder=args.out, device=args.device)
    return str(path)


def main() -> None:
    """Runs the sections asked for, prints one table, saves rows and a picture."""
    parser = arguments(__doc__)
    parser.add_argument("--section", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--size", nargs="+", metavar="TxN", help="these alone, not the whole grid")
    parser.add_argument("--all", action="store_true", help="nobody is skipped for taking long")
    parser.add_argument(
        "--only", nargs="+", metavar="PART", help="ours and whose name has one of these in it"
    )
    parser.add_argument("--case-seconds", type=float, default=20.0, help="timing of one case")
    parser.add_argument(
        "--sj14", metavar="PATH", help="folder with SpikingJelly 0.0.0.0.14 (CuPy), GPU only"
    )
    args = start(parser.parse_args())
    rows: list[Row] = []
    end = args.deadline
    for i, section in enumerate(args.section):
        # What is left of --seconds, in equal parts for the sections to come.
        now = time.monotonic()
        args.deadline = now + (end - now) / (len(args.section) - i)
        rows += section_rows(section, args)
    print(table(rows, COLUMNS))
    path = args.out / f"neuron_{args.device}.csv"
    print("rows:", path)
    print("picture:", picture(path))


if __name__ == "__main__":
    main()
