"""Where a membrane should start: the ablation of OPI, one layer and a whole network.

    python benchmarks/opi_ablation.py
    python benchmarks/opi_ablation.py --network vgg9.safetensors --data cifar10_jpeg.npz

One layer: integrate-and-fire neurons with v_init = c θ and currents that are constant in time and
uniform on [0, θ], against the closed forms for the mean error, θ/T (c - 1/2), and the mean squared
error, θ²/3T² (1 - 3c + 3c²) (Bu et al., OPI, AAAI 2022; the closed forms are derived in
docs/opi.md). Ends with an error if a measured value is off by more than 2 %. A network: accuracy
with every rule for v_init, on test images; thresholds from training images. Rows go to
``results/opi_ablation.csv``, the picture to ``docs/opi_ablation.png``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import RESULTS, load, save, table

import snnkernels
from snnkernels import data, functional, models

STEPS = (4, 8, 16)
FRACTIONS = tuple(i / 16 for i in range(16))
RULES = ("zero", "25%", "half", "uniform", "normal", "mse")
KEY = ("section", "network", "T", "v_init")
TOLERANCE = 0.02
PICTURE = Path(__file__).parents[1] / "docs" / "opi_ablation.png"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--neurons", type=int, default=1 << 20, help="currents of the one layer")
    parser.add_argument("--network", type=Path, metavar="FILE", help="a checkpoint, ReLU network")
    parser.add_argument("--data", type=Path, metavar="PATH", help="CIFAR-10, for --network")
    parser.add_argument("--images", type=int, default=512, help="test images")
    parser.add_argument("--calibration", type=int, default=512, help="training images")
    parser.add_argument("--T", type=int, default=8, help="steps the thresholds are made for")
    parser.add_argument("--ts", default="1,2,4,8,16", help="numbers of steps to evaluate")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="the picture to write")
    args = parser.parse_args()
    if (args.network is None) != (args.data is None):
        parser.error("--network and --data go together")
    return args


def closed_forms(c: float, T: int, theta: float) -> tuple[float, float]:
    """Mean and mean squared error of one layer, currents uniform on [0, θ]."""
    return theta / T * (c - 0.5), theta**2 / (3 * T**2) * (1 - 3 * c + 3 * c * c)


def one_layer(neurons: int) -> list[dict[str, object]]:
    """Measured and predicted errors of every start, in units of θ; SystemExit where they differ."""
    rows: list[dict[str, object]] = []
    theta, draw = 1.0, torch.Generator().manual_seed(0)
    z = torch.rand(neurons, generator=draw, dtype=torch.float64)
    for T in STEPS:
        for c in FRACTIONS:
            count, _ = functional.if_count(z, c * theta, theta, T=T)
            error = theta * count / T - z
            mean, square = error.mean().item(), error.square().mean().item()
            of_mean, of_square = closed_forms(c, T, theta)
            # The mean passes through 0: a deviation is relative to its largest value, at c = 0.
            off = max(abs(mean - of_mean) / (theta / (2 * T)), abs(square / of_square - 1))
            if off > TOLERANCE:
                raise SystemExit(f"T={T}, c={c}: off by {off:.1%}, allowed are {TOLERANCE:.0%}")
            rows.append(
                {
                    "section": "layer",
                    "T": T,
                    "v_init": c,
                    "mean error": f"{mean:.6f}",
                    "closed form": f"{of_mean:.6f}",
                    "mean squared error": f"{square:.7f}",
                    "closed form squared": f"{of_square:.7f}",
                    "off": f"{off:.4f}",
                    "neurons": neurons,
                }
            )
    return rows


@torch.no_grad()
def whole_network(args: argparse.Namespace) -> list[dict[str, object]]:
    """Accuracy with every rule for v_init after every number of steps."""
    checkpoint = models.load_checkpoint(args.network)
    train = data.load_cifar10(args.data, train=True, limit=args.calibration)
    test = data.load_cifar10(args.data, train=False, limit=args.images)
    calibration = [train[i : i + 64][0] for i in range(0, len(train), 64)]
    ends = [int(t) for t in args.ts.split(",")]
    name = "JPEG copies of CIFAR-10" if "JPEG" in test.name else test.name
    rows: list[dict[str, object]] = []
    for rule in RULES:
        snn = snnkernels.convert(
            checkpoint.model, calibration, T=args.T, v_init=rule, progress=False
        )
        right, ann = dict.fromkeys(ends, 0), 0
        for start in range(0, len(test), 64):
            x, y = test[start : start + 64]
            ann += int((checkpoint.model(x).argmax(1) == y).sum())
            for T, answer in snn.predict_curve(x, ends).items():
                right[T] += int((answer.argmax(1) == y).sum())
        rows += [
            {
                "section": "network",
                "network": checkpoint.architecture,
                "data": name,
                "images": len(test),
                "for T": args.T,
                "T": T,
                "v_init": rule,
                "accuracy": f"{100 * right[T] / len(test):.1f}",
                "ANN": f"{100 * ann / len(test):.1f}",
            }
            for T in ends
        ]
        print(table(rows[-len(ends) :], ("network", "v_init", "T", "accuracy", "ANN")), flush=True)
    return rows


def picture(rows: list[dict[str, str]], path: Path) -> str:
    """Draw both errors against c; says why where it cannot."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return "none, matplotlib is not installed"
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    panels = (
        ("mean error · T / θ", "mean error", "closed form", 1),
        ("mean squared error · T² / θ²", "mean squared error", "closed form squared", 2),
    )
    layer = [row for row in rows if row["section"] == "layer"]
    for axis, (title, measured, form, power) in zip(axes, panels, strict=True):
        for T, marker, colour in zip(STEPS, "osD", ("#0b6e99", "#d1632a", "#5b8c3e"), strict=True):
            of_T = sorted(
                (row for row in layer if int(row["T"]) == T), key=lambda row: float(row["v_init"])
            )
            c = [float(row["v_init"]) for row in of_T]
            value = [float(row[measured]) * T**power for row in of_T]
            size = {4: 9, 8: 6, 16: 3}[T]
            axis.plot(c, value, marker, color=colour, ms=size, mfc="none", label=f"measured, T={T}")
            if STEPS[0] == T:
                smooth = [float(row[form]) * T**power for row in of_T]
                axis.plot(c, smooth, color="#333333", lw=1, label="closed form", zorder=0)
        axis.axvline(0.5, color="#999999", lw=0.8, ls=":")
        axis.set_xlabel("v_init / θ")
        axis.set_title(title, fontsize="medium")
        axis.grid(alpha=0.25)
    axes[0].axhline(0, color="#999999", lw=0.8)
    axes[1].set_ylim(bottom=0)
    axes[1].legend(frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return str(path.name)


def main() -> None:
    args = parse()
    rows = one_layer(args.neurons)
    print(f"one layer: {len(rows)} starts within {TOLERANCE:.0%} of the closed forms")
    if args.network is not None:
        rows += whole_network(args)
    path = save("opi_ablation", rows, key=KEY, folder=args.out)
    print(f"rows: {path.name}; picture: {picture(load(path), args.picture)}")


if __name__ == "__main__":
    main()
