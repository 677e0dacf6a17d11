"""What a conversion method has to state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from ..ops import Activation
from ..spiking import SpikingActivation
from ..steps import CAUSAL, Steps

if TYPE_CHECKING:
    from ..context import Context
    from ..network import ConvertedNetwork
    from ..thresholds import Site

__all__ = ["Method", "check_steps", "part_of_start", "whole_number"]


@dataclass(frozen=True)
class Method:
    """A conversion method: only what is its own; everything else is the common pipeline.

    A method's options are the fields of its dataclass: ``convert(ann, method=SRP(steps=8))``; its
    name alone, ``method="srp"``, takes their defaults.

    Class attributes:
        name: what users pass as ``method=``.
        source: the paper.
        needs: what the ANN or the caller must bring.
        trains: the activation that ANNs for it are trained with, or "" for plain ReLU.
        threshold: rule for activations without a learned ceiling; None if there is none.
        per_channel: whether that rule works per channel.
        v_init: initial potential, as :func:`snnkernels.convert` takes it.
        binary: whether its spikes are 0 and 1; others are never in one table with those unsaid.
        most_steps: the largest T.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    needs: ClassVar[str]
    trains: ClassVar[str] = ""
    threshold: ClassVar[str | None] = None
    per_channel: ClassVar[bool] = True
    v_init: ClassVar[str | float] = 0.0
    binary: ClassVar[bool] = True
    most_steps: ClassVar[int] = 2**31 - 1

    def check(self, activations: list[Activation]) -> None:
        """Raise ``ConversionError`` if the network's activations do not suit the method."""

    def learned(self, activation: Activation) -> Any:
        """The threshold that training left in ``activation``: a tensor, or None."""
        return activation.learned

    def steps(self) -> Steps:
        """Which rows a run takes, and which of them answer."""
        return CAUSAL

    def behind(self) -> nn.Module | None:
        """An activation to put behind the ANN's answer, so that neurons give it; None: none."""
        return None

    def neuron(self, site: Site, T: int) -> dict[str, Any]:
        """Arguments of the ``IFNode`` of ``site`` beside threshold, v_init and amplitude.

        ``amplitude`` may be among them: what a spike weighs, if it is not the threshold.
        """
        return {}

    def layer(self, site: Site) -> Callable[..., SpikingActivation]:
        """The class of the layer: one with a ``forward`` of its own if IFNode cannot do it."""
        return SpikingActivation

    def levels_of(self, site: Site, T: int) -> int:
        """How many steps the staircase has that thresholds from data are fitted to."""
        return T

    def settle(self, context: Context) -> None:
        """The method's own step on thresholds, when the common rules have given theirs."""

    def finish(self, snn: ConvertedNetwork, context: Context) -> None:
        """The method's own step on the spiking network, before it is measured."""

    def __str__(self) -> str:
        """As a report names it: options that are not the default in brackets."""
        own = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if getattr(self, f.name) != f.default
        ]
        return self.name + (f"({', '.join(own)})" if own else "")


def whole_number(method: Method, name: str, least: int = 1, most: int = 2**31 - 1) -> None:
    """Raise unless the option ``name`` is a whole number in ``[least, most]``."""
    value = getattr(method, name)
    if type(value) is not int:
        raise TypeError(f"{method.name}: {name}={value!r} must be an int")
    if not least <= value <= most:
        raise ValueError(f"{method.name}: {name}={value} must be at least {least}, at most {most}")


def check_steps(method: Method | type[Method], T: int) -> None:
    """Raise ValueError unless ``method`` runs as many steps."""
    if not 1 <= T <= method.most_steps:
        raise ValueError(f"T={T}: method={method.name!r} takes T from 1 to {method.most_steps}")


def part_of_start(site: Site, parts: int) -> Any:
    """v_init of neurons whose threshold is ``θ / parts``: rules follow it, numbers stay."""
    if isinstance(site.v_init, str):
        return "half"
    return site.v_init / parts if isinstance(site.start, str) else site.v_init
