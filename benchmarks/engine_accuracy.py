"""Whether plans answer as the converted network does, over a whole test set.

    python benchmarks/engine_accuracy.py vgg9.safetensors resnet10.safetensors \
        --data cifar10_jpeg.npz --T 8

Counts predictions that differ from those of the converted network: of its plans in float32, int16
and int8, and of the same network with its convolutions in channels_last, where the library adds in
another order as well. Expected: a plan differs no more often than twice as often as channels_last,
and its accuracy by at most 0.1 point. With ``--runs plan "plan, int8"`` the first
of those is what the others are compared with. Rows go to ``results/engine_accuracy.csv``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import RESULTS, save, table

import snnkernels
from snnkernels import data, models
from snnkernels.conversion import ACTIVATIONS

KEY = ("network", "T", "images", "run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="+")
    parser.add_argument("--data", type=Path, required=True, metavar="PATH", help="CIFAR-10")
    parser.add_argument("--T", type=int, default=8, help="steps")
    parser.add_argument("--images", type=int, metavar="N", help="test images; default: all")
    parser.add_argument("--calibration", type=int, default=1024, help="training images")
    parser.add_argument("--runs", nargs="+", metavar="RUN", help="some, the first to compare with")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    args = parser.parse_args()
    snnkernels.tune_malloc()
    train = data.load_cifar10(args.data, train=True, limit=args.calibration)
    test = data.load_cifar10(args.data, train=False, limit=args.images)
    batches = [train[i : i + 64][0] for i in range(0, len(train), 64)]
    for path in args.checkpoint:
        checkpoint = models.load_checkpoint(path, activations=ACTIVATIONS)
        make = lambda: snnkernels.convert(checkpoint.model, batches, T=args.T, progress=False)  # noqa: B023, E731
        snn, last = make(), make().to(memory_format=torch.channels_last)
        runs = {
            "converted": snn,
            "converted, channels_last": last,
            "plan": snnkernels.lower(snn),
            "plan, int16": snnkernels.lower(snn, precision="int16"),
            "plan, int8": snnkernels.lower(snn, precision="int8"),
        }
        runs = {name: runs[name] for name in args.runs or runs}
        first = next(iter(runs))
        found: dict[str, list[torch.Tensor]] = {name: [] for name in runs}
        labels = []
        with torch.no_grad():
            for i in range(0, len(test), 50):
                x, y = test[i : i + 50]
                labels.append(y)
                for name, run in runs.items():
                    image = x.contiguous(memory_format=torch.channels_last) if run is last else x
                    found[name].append(run(image).argmax(1))
        guesses = {name: torch.cat(parts) for name, parts in found.items()}
        truth = torch.cat(labels)
        rows = [
            {
                "network": f"{path.stem} {checkpoint.hash}",
                "data": test.name,
                "images": len(test),
                "T": args.T,
                "run": name,
                "accuracy": f"{100 * float((guess == truth).double().mean()):.2f}",
                "differing": int((guess != guesses[first]).sum()),
                "against": first,
            }
            for name, guess in guesses.items()
            if name == "converted" or name != first
        ]
        save("engine_accuracy", rows, key=KEY, folder=args.out)
        print(table(rows, ["network", "T", "run", "accuracy", "differing"]), "\n")


if __name__ == "__main__":
    main()
