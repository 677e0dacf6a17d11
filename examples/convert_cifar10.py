"""Convert trained CIFAR-10 networks and tabulate accuracy against the number of time steps.

    python examples/convert_cifar10.py --weights vgg9.safetensors --data cifar10_jpeg.npz
    python examples/convert_cifar10.py --weights vgg16_qcfs.safetensors --data cifar10_jpeg.npz \
        --method qcfs srp:probe=8 cos parallel --T 8

``--weights`` takes checkpoints that name their architecture (``snnkernels.models``, or those of
``train_cifar10.py``); ``--data`` takes a bundle of JPEG copies (``.npz``) or the official archives,
packed or not. Thresholds come from training images, accuracies from test images; each row carries
its checkpoint's hash. The logits of all numbers of steps come from one run over the largest of
them. T counts the steps that answer: what a method adds to them stands beside its name, and so does
whether its spikes are other than 0 and 1, for then T compares with no binary method's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import snnkernels
from snnkernels import data, models
from snnkernels.cli import markdown_table, print_table, progress_bar
from snnkernels.conversion import ACTIVATIONS
from snnkernels.conversion.methods import METHODS
from snnkernels.conversion.starts import parse_start
from snnkernels.sweep import parse_trial


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--weights", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--data", type=Path, required=True, metavar="PATH")
    parser.add_argument(
        "--method",
        nargs="+",
        default=["opi"],
        help=f"one or more of {', '.join(METHODS)}, with options as in srp:probe=8",
    )
    parser.add_argument(
        "--threshold",
        help="mmse, max, 99.9%% or a number; by default what the network learned, else the "
        "method's own rule",
    )
    parser.add_argument("--T", type=int, default=32, help="steps the thresholds are made for")
    parser.add_argument("--ts", default="1,2,4,8,16,32", help="numbers of steps to evaluate")
    parser.add_argument(
        "--v-init",
        help="initial potentials, one row each: 'own' (the method's), numbers, half, zero, 25%%, "
        "uniform, normal, mse; by default 0,half for opi, own for others",
    )
    parser.add_argument("--calibration", type=int, default=1024, help="training images to use")
    parser.add_argument("--limit", type=int, help="test images to use; all of them by default")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here too")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table here too")
    args = parser.parse_args(argv)
    try:
        args.ts = [int(t) for t in args.ts.split(",")]
        args.method = [parse_trial(text) for text in args.method]
        wanted = None if args.v_init is None else [_start(v) for v in args.v_init.split(",")]
    except (TypeError, ValueError) as e:
        parser.error(str(e))
    if args.threshold is not None:
        with contextlib.suppress(ValueError):  # else it is a rule's name
            args.threshold = float(args.threshold)
    args.rows = []
    for trial in args.method:
        starts = wanted or ([0.0, "half"] if trial.label == "opi" else [None])
        told = {"threshold": args.threshold, **trial.arguments}
        args.rows += [(trial.method, {"v_init": v, **told}) for v in starts]
    sizes = [*args.ts, args.T, args.calibration, args.batch_size]
    if min(sizes) < 1 or (args.limit is not None and args.limit < 1):
        parser.error("numbers of steps and of images must be at least 1")
    return args


def _start(text: str) -> float | str | None:
    """What ``convert`` takes as v_init."""
    if text == "own":
        return None
    try:
        return float(text)
    except ValueError:
        parse_start(text)
        return text


def _threshold(snn: snnkernels.ConvertedNetwork) -> str:
    """How the thresholds came about: what the report says of the layers."""
    found = (snn.report[name].action.partition("θ ")[2] for name, _ in snn.neurons())
    return " and ".join(dict.fromkeys(found))


def evaluate(
    ann: torch.nn.Module,
    spiking: Sequence[torch.nn.Module],
    test: data.ImageSet,
    ts: list[int],
    batch_size: int,
    what: str,
) -> tuple[float, list[list[float]]]:
    """Return the accuracy of the ANN, and of each spiking network at each of ``ts``."""
    ann_right = 0
    right = torch.zeros(len(spiking), len(ts), dtype=torch.int64)
    with progress_bar(what, len(test)) as bar, torch.no_grad():
        for start in range(0, len(test), batch_size):
            x, y = test[start : start + batch_size]
            ann_right += int((ann(x).argmax(1) == y).sum())
            for i, snn in enumerate(spiking):
                answers = snn.predict_curve(x, ts)
                right[i] += torch.stack([(answers[t].argmax(1) == y).sum() for t in ts])
            bar.update(len(y))
    return ann_right / len(test), (right.double() / len(test)).tolist()


def convert(args: argparse.Namespace) -> dict:
    """Run the whole comparison and return what ``--json`` writes."""
    calibration_set = data.load_cifar10(args.data, train=True, limit=args.calibration)
    test = data.load_cifar10(args.data, train=False, limit=args.limit)
    size = max(args.batch_size, 64)
    calibration = [calibration_set[i : i + size][0] for i in range(0, len(calibration_set), size)]
    results = []
    for path in args.weights:
        checkpoint = models.load_checkpoint(path, activations=ACTIVATIONS)
        start = time.perf_counter()
        spiking = [
            snnkernels.convert(
                checkpoint.model,
                calibration,
                method=method,
                T=args.T,
                **told,
            )
            for method, told in args.rows
        ]
        converted = time.perf_counter()
        ann, curves = evaluate(checkpoint.model, spiking, test, args.ts, args.batch_size, path.stem)
        results.append(
            {
                "network": path.stem,
                "architecture": checkpoint.architecture,
                "sha256": checkpoint.sha256,
                "ann": ann,
                "curves": [
                    {
                        "method": str(method),
                        "extra_steps": snn.extra_steps,
                        "binary": method.binary,
                        "threshold": _threshold(snn),
                        "v_init": method.v_init if told["v_init"] is None else told["v_init"],
                        "accuracy": accuracy,
                    }
                    for (method, told), snn, accuracy in zip(
                        args.rows, spiking, curves, strict=True
                    )
                ],
                "seconds_to_convert": round(converted - start, 1),
                "seconds_to_evaluate": round(time.perf_counter() - converted, 1),
            }
        )
    return {
        "data": test.name,
        "test_images": len(test),
        "calibration_images": len(calibration_set),
        "method": ", ".join(trial.label for trial in args.method),
        "T": args.T,
        "ts": args.ts,
        "torch": torch.__version__,
        "results": results,
    }


def table(summary: dict) -> tuple[str, list[str], list[list[str]]]:
    """Return title, header and rows of the results as text."""
    title = (
        f"{summary['data']}: accuracy (%) on {summary['test_images']} test images; "
        f"{summary['method']}, thresholds for T = {summary['T']}, "
        f"{summary['calibration_images']} training images to calibrate"
    )
    header = ["network", "checkpoint", "method", "threshold", "v_init", "ANN"]
    header += [f"T={t}" for t in summary["ts"]]
    rows: list[list[str]] = []
    for r in summary["results"]:
        for curve in r["curves"]:
            start, extra = curve["v_init"], curve["extra_steps"]
            v_init = {"half": "θ/2", "zero": "0"}.get(start, start)
            v_init = v_init if isinstance(v_init, str) else f"{v_init:g}"
            method = curve["method"] + (f" +{extra} steps" if extra else "")
            method += "" if curve["binary"] else ", not binary"
            cells = [r["network"], r["sha256"][:12], method, curve["threshold"]]
            cells.append(v_init)
            rows.append([*cells, *(f"{100 * a:.1f}" for a in (r["ann"], *curve["accuracy"]))])
    return title, header, rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; 0 when done, 1 for an error told on stderr, 130 when interrupted."""
    args = parse(argv)
    try:
        summary = convert(args)
        title, header, rows = table(summary)
        print_table(title, header, rows)
        for r in summary["results"]:
            print(
                f"{r['network']}: converted in {r['seconds_to_convert']} s, "
                f"evaluated in {r['seconds_to_evaluate']} s"
            )
        if args.json:
            args.json.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        if args.markdown:
            command = shlex.join(["python", *(sys.argv if argv is None else [__file__, *argv])])
            text = f"{title}\n\n{markdown_table(header, rows)}\n```\n{command}\n```\n"
            args.markdown.write_text(text, encoding="utf-8")
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (ImportError, OSError, RuntimeError, ValueError) as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
