"""Where a converted network's error enters, layer by layer: why a method does well or badly.

    python benchmarks/error_sources.py vgg9_qcfs_l8.safetensors --data cifar10_jpeg.npz \
        --methods qcfs srp

Rows are those of ``snn.report``: each layer's error over the root mean square of the ANN's
activation, and the parts of it that clipping, quantisation and unevenness add there or that came
in with the layer's input. Rows go to ``results/error_sources.csv``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import RESULTS, save, table

import snnkernels
from snnkernels import data, models
from snnkernels.conversion import ACTIVATIONS
from snnkernels.sweep import parse_trial

PARTS = ("rate", "error", "clipping", "quantisation", "unevenness", "inherited")
KEY = ("network", "method", "T")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="+")
    parser.add_argument("--data", type=Path, required=True, metavar="PATH", help="CIFAR-10")
    parser.add_argument("--methods", nargs="+", default=["opi"], metavar="METHOD")
    parser.add_argument("--T", type=int, default=8, help="steps")
    parser.add_argument("--calibration", type=int, default=1024, help="training images")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    args = parser.parse_args()
    train = data.load_cifar10(args.data, train=True, limit=args.calibration)
    batches = [train[i : i + 64][0] for i in range(0, len(train), 64)]
    for path in args.checkpoint:
        checkpoint = models.load_checkpoint(path, activations=ACTIVATIONS)
        for trial in map(parse_trial, args.methods):
            snn = snnkernels.convert(
                checkpoint.model, batches, method=trial.method, T=args.T, **trial.arguments
            )
            about = {"network": f"{path.stem} {checkpoint.hash}", "method": trial.label}
            rows = [
                {**about, "T": args.T, "layer": row.name, "θ": f"{row.threshold.mean():.4g}"}
                | {part: f"{getattr(row, part):.4f}" for part in PARTS}
                for row in snn.report.rows
                if row.threshold is not None and row.error is not None
            ]
            output = snn.report["output"].error
            rows.append({**about, "T": args.T, "layer": "output", "error": f"{output:.4f}"})
            save("error_sources", rows, key=KEY, folder=args.out)
            print(table(rows, ["layer", "θ", *PARTS]), "\n")


if __name__ == "__main__":
    main()
