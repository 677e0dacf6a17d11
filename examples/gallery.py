"""Draw the pictures of the documentation, from a network trained on handwritten digits in seconds.

    python examples/gallery.py                        # all, into docs/gallery
    python examples/gallery.py --only raster --out .  # one of them

Every picture is one function: what it shows of the product, it calls.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import snnkernels
from snnkernels import data, metrics, plots

STEPS = [1, 2, 4, 8, 16, 32]
DPI = 110

PICTURES: dict[str, Callable[[Any], Any]] = {}


def picture(draw: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function from what was trained to axes, by its name the file's."""
    PICTURES[draw.__name__] = draw
    return draw


class Trained:
    """The tutorial's network, its data, and conversions of it."""

    def __init__(self, epochs: int = 6, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.images, labels = data.digits(train=True)[:]
        self.test_images, self.test_labels = data.digits(train=False)[:]
        self.ann = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 64), nn.ReLU(),
            nn.Linear(64, 10),
        )  # fmt: skip
        optimizer = torch.optim.Adam(self.ann.parameters(), lr=5e-3)
        for _ in range(epochs):
            for batch in torch.randperm(len(self.images)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(self.ann(self.images[batch]), labels[batch]).backward()
                optimizer.step()
        self.ann.eval()

    def convert(self, **options: Any) -> Any:
        """A conversion with thresholds for 8 steps."""
        calibration = [self.images[:512]]
        return snnkernels.convert(self.ann, calibration, T=8, progress=False, **options)

    def accuracy(self, logits: torch.Tensor) -> float:
        """Of the test images, a fraction."""
        return (logits.argmax(1) == self.test_labels).float().mean().item()

    def curve(self, snn: Any) -> list[float]:
        """Accuracies at STEPS."""
        with torch.no_grad():
            return [self.accuracy(y) for y in snn.predict_curve(self.test_images, STEPS).values()]

    @property
    def reached(self) -> float:
        """The ANN's accuracy."""
        with torch.no_grad():
            return self.accuracy(self.ann(self.test_images))

    def watched(self, layer: str, T: int = 32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Spikes and membranes of a layer on one image, ``[T, neurons]``, and thresholds."""
        snn = self.convert()
        with (
            snnkernels.SpikeMonitor(snn, [layer]) as spikes,
            snnkernels.VoltageMonitor(snn, [layer]) as volts,
            torch.no_grad(),
        ):
            snn(self.test_images[3:4], T=T)
        theta = snn.report[layer].threshold
        fired = spikes.spikes[layer].unpack().flatten(1) != 0
        return fired, volts.v[layer].flatten(1), theta


@picture
def accuracy(t: Trained) -> Any:
    """Accuracy against T, by where membranes start."""
    curves = {
        "start at θ/2": t.curve(t.convert()),
        "start at 0": t.curve(t.convert(v_init="zero")),
    }
    return plots.accuracy_curve(STEPS, curves, ann=t.reached)


@picture
def rate_activation(t: Trained) -> Any:
    """What the spikes of a layer stand for, against the ANN."""
    points = t.convert().report["6"].points
    return plots.rate_activation(points[0], points[1], title="layer 6, T = 8")


@picture
def error_sources(t: Trained) -> Any:
    """Where errors enter, by layer."""
    return plots.error_sources(t.convert().report)


@picture
def correlations(t: Trained) -> Any:
    """How well layers follow the ANN."""
    return plots.correlations(t.convert().report)


@picture
def raster(t: Trained) -> Any:
    """Spikes of a layer on one image."""
    fired, _, _ = t.watched("9")
    return plots.raster(fired[:, fired.any(0)], title="layer 9, one image")


@picture
def membrane(t: Trained) -> Any:
    """Membranes of three neurons, and when they fire."""
    fired, v, theta = t.watched("9", T=24)
    some = fired.sum(0).argsort(descending=True)[[0, 6, 12]]
    return plots.membrane(
        v[:, some], theta.flatten()[some], spikes=fired[:, some],
        labels=[f"neuron {i}" for i in some.tolist()],
    )  # fmt: skip


@picture
def rate_histogram(t: Trained) -> Any:
    """How often neurons fire, by layer."""
    rates = metrics.firing_rates(t.convert(), t.test_images, T=16, per="neuron")
    return plots.rate_histogram(rates)


@picture
def energy_layers(t: Trained) -> Any:
    """Energy of the arithmetic, by layer."""
    return plots.energy_layers(metrics.synaptic_operations(t.convert(), t.test_images))


@picture
def accuracy_energy(t: Trained) -> Any:
    """Accuracy against the energy of an image."""
    lines: dict[str, list[float]] = {}
    curves: dict[str, list[float]] = {}
    for label, options in (("start at θ/2", {}), ("start at 0", {"v_init": "zero"})):
        snn = t.convert(**options)
        found = [
            metrics.energy(metrics.synaptic_operations(snn, t.test_images, T=T)) for T in STEPS
        ]
        lines[label] = [e.snn * 1e-6 for e in found]
        curves[label] = t.curve(snn)
    ann = found[0].ann * 1e-6, t.reached
    return plots.accuracy_energy(lines, curves, steps=STEPS, ann=ann)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw what is asked for."""
    import matplotlib
    import matplotlib.pyplot

    matplotlib.use("agg")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PICTURES, default=list(PICTURES))
    folder = Path(__file__).resolve().parent.parent / "docs" / "gallery"
    parser.add_argument("--out", type=Path, default=folder, metavar="DIR")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    trained = Trained()
    for name in args.only:
        figure = PICTURES[name](trained).figure
        figure.savefig(args.out / f"{name}.png", dpi=DPI, bbox_inches="tight")
        matplotlib.pyplot.close(figure)


if __name__ == "__main__":
    main()
