"""Bipolar neurons with a spike tracer: the quantised network, settled exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...options import Signed
from ..activations import QCFS
from ..errors import ConversionError
from ..impulse import ImpulseActivation, neuron_depth, refuse_pools
from ..spiking import SpikingActivation
from ..steps import Steps
from .base import Method, part_of_start, whole_number

if TYPE_CHECKING:
    from ..context import Context
    from ..network import ConvertedNetwork
    from ..thresholds import Site

__all__ = ["STBIF"]


@dataclass(frozen=True)
class STBIF(Method):
    """Spikes of both signs until the running count is the level that the ANN would choose.

    A neuron of L levels has the threshold θ / L and starts at half of it. It emits +1 at the
    threshold unless its count is L already, -1 below 0 unless its count is 0. The input is shown
    at the first step only, every bias acts there only, and nothing comes afterwards but the spikes
    of other neurons: the network settles. Its answer is ``count θ / L``, not divided by T. Once
    settled it is the network of QCFS activations with L levels, level by level (ties at a level's
    edge up to rounding); with n neurons on the longest path that is after ``n (L - 1) + 1`` steps
    at the latest, whatever the input.

    T counts all steps from the input on; none are added. Spikes are -1, 0 and 1, and both signs
    cost: the T of binary methods, whose input comes at every step, does not compare. The authors
    divide currents by the threshold; here they stay as they are, which is equal up to rounding.

    Args:
        levels: L; None takes that of each QCFS activation. Other activations need a number.
    """

    name = "st_bif"
    source = "You et al.: SpikeZIP-TF (ST-BIF neurons), ICML 2024"
    needs = (
        "an ANN trained with QCFS, or levels= and data; settling steps; its spikes are -1, 0 and "
        "1, so its T compares with no binary method's; inference only"
    )
    trains = "QCFS"
    threshold = "mmse"
    v_init = "half"
    binary = False

    levels: int | None = None

    def __post_init__(self) -> None:
        if self.levels is not None:
            whole_number(self, "levels")

    def steps(self) -> Steps:
        """The silent row, then biases in the first; the guard's count does not outlive a call."""
        return Steps(before=1, whole=True, bias="first")

    def levels_of(self, site: Site, T: int) -> int:
        """L."""
        inner = site.activation.inner
        if self.levels is not None:
            return self.levels
        if isinstance(inner, QCFS):
            return inner.levels
        raise ConversionError(
            f"{site.label}: method='st_bif' needs a number of levels, which {type(inner).__name__} "
            "has not: pass method=STBIF(levels=8), or train with QCFS"
        )

    def neuron(self, site: Site, T: int) -> dict[str, Any]:
        """One level a spike, the count kept between 0 and L."""
        levels = self.levels_of(site, T)
        return {
            "v_threshold": site.theta / levels,
            "v_init": part_of_start(site, levels),
            "signed": Signed(low=0, high=levels),
        }

    def layer(self, site: Site) -> Callable[..., SpikingActivation]:
        """Its currents come once."""
        return ImpulseActivation

    def finish(self, snn: ConvertedNetwork, context: Context) -> None:
        """Say when the network has settled."""
        refuse_pools(snn, self.name)
        levels = max(self.levels_of(site, snn.T) for site in context.sites)
        settled = neuron_depth(snn.body) * (levels - 1) + 1
        context.report.notes.append(
            "the input is shown at the first step only and biases act there once; the answer is "
            f"the settled count: exact from T={settled} on at the latest, T={snn.T} "
            + ("is enough" if settled <= snn.T else "may cut it short")
        )
