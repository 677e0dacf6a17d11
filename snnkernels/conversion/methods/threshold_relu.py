"""Threshold ReLU with a shift at every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ..ops import Activation
from .base import Method, whole_number

if TYPE_CHECKING:
    from ..context import Context
    from ..network import ConvertedNetwork
    from ..thresholds import Site

__all__ = ["ThresholdReLUMethod"]


@dataclass(frozen=True)
class ThresholdReLUMethod(Method):
    """Thresholds at the largest activation; every step's current gains ``θ / (2 shift_steps)``.

    Without a bias a rate lacks half a step in the mean. With it the count after T steps is that
    of a membrane started at θ/2, its spikes come later (``v_init="half"`` on top would count it
    twice). The authors' code keeps the T of the shift at 32 whatever T a run has. Thresholds are
    the maxima over all of the loader (the paper: the whole training set), one for a layer, also
    where a ceiling was learned.

    The paper's networks spike in their last layer as well, and their answer is a rate: negative
    logits become 0, and at few steps classes tie. That is ``spiking_output=True``; by default
    logits are read out as everywhere else. A shift that the network was trained with
    (``ThresholdReLU(shift_steps=...)``) is part of it and stays; with the same steps here the two
    cancel where θ is its ceiling.

    Args:
        shift_steps: the T of the shift; None: the T of the conversion.
        spiking_output: neurons behind the answer, which must be one tensor.
    """

    name = "threshold_relu"
    source = "Deng, Gu: Optimal Conversion of Conventional ANNs to SNNs, ICLR 2021"
    needs = "calibration data (the paper: an ANN trained with ThresholdReLU)"
    trains = "ThresholdReLU"
    threshold = "max"
    per_channel = False

    shift_steps: int | None = 32
    spiking_output: bool = False

    def __post_init__(self) -> None:
        if self.shift_steps is not None:
            whole_number(self, "shift_steps")
        if type(self.spiking_output) is not bool:
            raise TypeError(f"{self.name}: spiking_output={self.spiking_output!r} must be a bool")

    def learned(self, activation: Activation) -> Any:
        """None: thresholds are maxima."""
        return None

    def behind(self) -> nn.Module | None:
        """The output layer's neurons."""
        return nn.ReLU() if self.spiking_output else None

    def neuron(self, site: Site, T: int) -> dict[str, Any]:
        """The shift, in the units of the current."""
        return {"bias": site.theta / (2 * (self.shift_steps or T))}

    def finish(self, snn: ConvertedNetwork, context: Context) -> None:
        """Say what the answer is."""
        context.report.notes.append(
            "the output layer spikes: the answer is the rate of its neurons, never negative, and "
            "errors are against the ANN's answer without its negative part"
            if self.spiking_output
            else "logits are read out; the paper's output layer spikes: spiking_output=True"
        )
