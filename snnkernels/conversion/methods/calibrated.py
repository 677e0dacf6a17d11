"""SNN Calibration: neurons corrected layer by layer by what they answer on calibration data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..correction import Walk, activations, correct_bias, correct_start, first_images, progress_bar
from ..errors import ConversionError
from ..ops import Activation
from ..spiking import SpikingActivation
from ..steps import Steps
from ..weights import own_weights, tune
from .base import Method, whole_number

if TYPE_CHECKING:
    from ..context import Context
    from ..network import ConvertedNetwork
    from ..thresholds import Site

__all__ = ["Advanced", "Light"]

_SOURCE = "Li, Deng, Dong, Gong, Gu: A Free Lunch From ANN: SNN Calibration, ICML 2021"


@dataclass(frozen=True)
class _Calibrated(Method):
    """A method on top of another: everything is the base's, and then its network is corrected."""

    threshold = "mmse"  # of the default base
    v_init = "half"

    base: Any = "opi"  # settled: a Method
    images: int = 128

    def __post_init__(self) -> None:
        from . import find_method

        base = find_method(self.base, "base")
        if isinstance(base, _Calibrated):
            raise ValueError(
                f"{self.name}: base={base} is a calibration itself; calibrate once, on top of the "
                "method that is converted with"
            )
        whole_number(self, "images")
        object.__setattr__(self, "base", base)
        for name in ("threshold", "per_channel", "v_init", "trains", "binary", "most_steps"):
            object.__setattr__(self, name, getattr(base, name))

    def check(self, activations: list[Activation]) -> None:
        """As the base."""
        self.base.check(activations)

    def learned(self, activation: Activation) -> Any:
        """As the base."""
        return self.base.learned(activation)

    def steps(self) -> Steps:
        """As the base."""
        return self.base.steps()

    def behind(self) -> nn.Module | None:
        """As the base."""
        return self.base.behind()

    def neuron(self, site: Site, T: int) -> dict[str, Any]:
        """As the base."""
        return self.base.neuron(site, T)

    def levels_of(self, site: Site, T: int) -> int:
        """As the base."""
        return self.base.levels_of(site, T)

    def layer(self, site: Site) -> Callable[..., SpikingActivation]:
        """As the base, if its neurons know of a bias."""
        layer = self.base.layer(site)
        kind = getattr(layer, "func", layer)  # a partial's
        if kind.forward is not SpikingActivation.forward:
            raise ConversionError(
                f"method='{self.name}' corrects the bias and v_init of integrate-and-fire neurons, "
                f"which those of base={self.base} ({kind.__name__}) do not have: convert with "
                f"method={str(self.base)!r} alone"
            )
        return layer

    def settle(self, context: Context) -> None:
        """As the base."""
        if context.batches is None:
            raise ValueError(
                f"loader is None, but method='{self.name}' compares the two networks on "
                "calibration data: pass loader="
            )
        self.base.settle(context)

    def __str__(self) -> str:
        own = [
            f"{f.name}={value}"
            for f in fields(self)
            if (value := getattr(self, f.name)) != f.default and str(value) != f.default
        ]
        return self.name + (f"({', '.join(own)})" if own else "")


@dataclass(frozen=True)
class Light(_Calibrated):
    """Per channel, every neuron's bias takes back the mean error of what it answers.

    In order of execution, layer by layer: the spiking layer runs on what the corrected layers
    before it send, and ``bias -= mean(snn) - mean(ann)`` over images and space, once. The bias is
    the neuron's own, added to its current at every step: there is one for every neuron, also where
    the current is a sum, a concatenation or comes from a layer without a bias or one that feeds
    others too. (The authors add it to the convolution's bias, the same where one convolution feeds
    one neuron, and run their neurons with θ / 2T more at every step where ours start at θ/2.)

    Args:
        base: the method that is corrected, an object or a name: ``Light(base=SRP(probe=8))``.
        images: of the loader's first batches, run together; memory is that of a call on so many.
    """

    name = "light"
    source = _SOURCE
    needs = "as its base (opi), and calibration data"

    def finish(self, snn: ConvertedNetwork, context: Context) -> None:
        """Correct the biases."""
        self.base.finish(snn, context)
        images = first_images(context, self.images)
        wanted = activations(context.model, [s.path for s in context.sites], images)
        sites = {site.path: site for site in context.sites}
        walk = Walk(snn, images, context.T)
        with progress_bar("light calibration", len(walk), context.progress) as bar:
            for stop in walk:
                correct_bias(stop, wanted.pop(stop.path), sites[stop.path])
                bar.update()
        context.report.notes.append(
            f"{self.name}: the bias of every channel was corrected at T={context.T} on "
            f"{len(images)} images"
        )


@dataclass(frozen=True)
class Advanced(_Calibrated):
    """Weights, then biases, then initial potentials: layer by layer, each by the error then left.

    * Weights: Adam on the layers between the neurons before and these, for the staircase of the
      mean current (its floor passes gradients on) to give the ANN's activations; a layer that feeds
      several neurons is tuned for the first. Kept only where it lowers the squared error of the
      spiking layer's answer on these images, and reported where not.
    * Biases: as :class:`Light`.
    * Potentials: ``v_init += T (mean(ann) - mean(snn))`` for every neuron of the layer, over images
      only. The network is bound to the size of its input from then on.

    Args:
        base: the method that is corrected, an object or a name.
        images: of the loader's first batches, run together; the authors' weights see 1,024.
        iterations: of Adam for each layer; 0 leaves the weights. The authors have 5,000.
        lr: its first rate, cosine to 0; the authors have 1e-5 to 4e-5 for their many iterations.
        batch: images of an iteration.
        potentials: whether to correct them.
    """

    name = "advanced"
    source = _SOURCE
    needs = "as its base (opi), and calibration data; weights are tuned, without labels"

    iterations: int = 50
    lr: float = 1e-3
    batch: int = 32
    potentials: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number(self, "iterations", least=0)
        whole_number(self, "batch")
        if isinstance(self.lr, bool) or not 0 < self.lr < math.inf:
            raise ValueError(f"advanced: lr={self.lr!r} must be positive and finite")

    def finish(self, snn: ConvertedNetwork, context: Context) -> None:
        """Tune the weights, correct biases and potentials."""
        self.base.finish(snn, context)
        images = first_images(context, self.images)
        wanted = activations(context.model, [s.path for s in context.sites], images)
        sites = {site.path: site for site in context.sites}
        if self.iterations:
            own_weights(snn)  # they are the ANN's, which stays what it is
        walk = Walk(snn, images, context.T, rates=self.iterations > 0)
        draw = torch.Generator().manual_seed(0)
        kept, tuned, done = [], 0, set[int]()
        total = len(walk) * max(self.iterations, 1)
        with progress_bar("advanced calibration", total, context.progress) as bar:
            for stop in walk:
                target, site = wanted.pop(stop.path), sites[stop.path]
                if self.iterations:
                    better = tune(
                        stop, target, site, done,
                        iterations=self.iterations, lr=self.lr, batch=self.batch, draw=draw,
                        step=bar.update,
                    )  # fmt: skip
                    tuned += better is True
                    kept += [site.label] if better is False else []
                else:
                    bar.update()
                correct_bias(stop, target, site)
                if self.potentials:
                    correct_start(stop, target, site)
        notes = [f"{len(images)} images at T={context.T}: biases"]
        notes += [f"weights before {tuned} layers"] if self.iterations else []
        notes += ["initial potentials of every position (the input's size is fixed now)"] * (
            self.potentials
        )
        context.report.notes.append(f"advanced: corrected on {', '.join(notes)}")
        if kept:
            context.report.notes.append(
                f"advanced: weights before {', '.join(kept)} stayed: tuning them did not lower the "
                "error there"
            )
