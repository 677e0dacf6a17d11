"""Local threshold balancing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..balancing import Balancing
from ..steps import CAUSAL, Steps
from .base import Method, whole_number

if TYPE_CHECKING:
    from ..context import Context
    from ..thresholds import Site

__all__ = ["LTB"]


@dataclass(frozen=True)
class LTB(Method):
    """Thresholds that grow batch by batch while they clip the ANN; delayed read-out on request.

    See :class:`snnkernels.conversion.balancing.Balancing` for the thresholds, which any other
    method may use as ``threshold="ltb"``: one for each channel, of a linear layer for each feature.
    Neurons fire strictly above θ, as in the authors' code, and start at θ/2. Max-pools stand before
    the neurons, as in the paper, but cumulative unless ``maxpool="pre_spike"``.

    Args:
        updates: batches for balancing; the paper has 1,000 to 5,000 of 100 images.
        rate: c of the paper, 1 there.
        delay: t0, steps that are run but not read out: the answer is that of steps (t0, T], or of
            the last 4 if fewer would be left (of all, if T is less). They are part of T.
    """

    name = "ltb"
    source = "Bu, Li, Yu: Inference-Scale Complexity in ANN-SNN Conversion (LTB), CVPR 2025"
    needs = "calibration data without labels, read again and again"
    threshold = "ltb"
    v_init = "half"

    updates: int = 200
    rate: float = 1.0
    delay: int = 0

    def __post_init__(self) -> None:
        whole_number(self, "delay", least=0)
        # The rule with this object's options stands where plan() looks for it.
        object.__setattr__(self, "threshold", Balancing(self.updates, self.rate))

    def steps(self) -> Steps:
        """Rows of one call, of which the first ones are not read out."""
        return Steps(whole=True, delay=self.delay) if self.delay else CAUSAL

    def neuron(self, site: Site, T: int) -> dict[str, Any]:
        """A tie does not fire."""
        return {"tie": ">"}

    def settle(self, context: Context) -> None:
        """Say what is read out."""
        if self.delay:
            first = self.steps().first(context.T)
            context.report.notes.append(
                f"steps 1 to {first} of {context.T} are run but not read out (delay={self.delay}); "
                "rates and errors are those of the others"
            )
