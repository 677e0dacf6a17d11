"""Progressive tandem learning: the conversion it starts from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from ..errors import ConversionError
from ..graphs import module_of
from ..impulse import ImpulseActivation, refuse_pools
from ..inputs import tree_map
from ..spiking import Repeat, SpikingActivation
from ..steps import Steps
from .base import Method, part_of_start

if TYPE_CHECKING:
    from ..context import Context
    from ..network import ConvertedNetwork
    from ..thresholds import Site

__all__ = ["PTL", "PTLActivation"]


class PTLActivation(ImpulseActivation):
    """Neurons whose input comes at the first step, and a T-th of every bias at each."""

    silent: Tensor | None = None  # of a constant current: what an input of zeros makes, [1, *]

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to one run, whose graph can be neither copied nor pickled."""
        return {**self.__dict__, "silent": None}

    def currents(self, x: Tensor, T: int) -> Tensor:
        """The currents ``[T - 1, B, *]`` meant by a constant one ``[B, *]``, or by T rows."""
        if not self.constant or self.silent is None:
            return super().currents(x, T)
        share = self.silent / (T - 1)
        rows = share.expand(T - 1, *x.shape).clone()
        rows[0] = (x - self.silent) + share
        return rows


class _Spread(nn.Module):
    """What runs once, also on an input of zeros: the bias in what the first neurons receive.

    Args:
        prefix: of the network.
        takers: ``(which output, the layer that receives it)``; the layers live elsewhere.
    """

    def __init__(self, prefix: fx.GraphModule, takers: list[tuple[int, PTLActivation]]) -> None:
        super().__init__()
        self.inner = prefix
        self._takers = tuple(takers)

    def forward(self, x: Any) -> Any:
        """The outputs for ``x``, a tensor or ``Inputs``; those for zeros go to the layers."""
        silent = self.inner(tree_map(x[:1], torch.zeros_like))
        for i, layer in self._takers:
            layer.silent = silent[i]
        return self.inner(x)


@dataclass(frozen=True)
class PTL(Method):
    """The spiking form that progressive tandem learning trains, of the ANN as it is.

    The image is shown at the first step only, a T-th of every bias acts at each; the threshold is
    the 99.9th percentile of the activation over T, and what a layer says is its spike count,
    not divided by T. Membranes start at 0 (``v_init="half"`` is half of that threshold).

    PTL itself is training: :func:`snnkernels.conversion.ptl.ptl_train` replaces the layers one
    after another and trains what follows. Without it expect little: the whole input meets neurons
    of at most one spike a step, while later spikes are still on their way.
    """

    name = "ptl"
    source = (
        "Wu, Xu, Han, Zhou, Zhang, Li, Tan: Progressive Tandem Learning (PTL), TPAMI 2021 "
        "(arXiv 2007.01204)"
    )
    needs = "training, layer by layer (conversion.ptl.ptl_train); data for its thresholds"
    threshold = "99.9%"
    per_channel = False
    v_init = "zero"

    def steps(self) -> Steps:
        """The silent row; biases are spread over T, so every T is a run of its own."""
        return Steps(before=1, whole=True, apart=True, bias="spread")

    def neuron(self, site: Site, T: int) -> dict[str, Any]:
        """A T-th of the ceiling."""
        return {"v_threshold": site.theta / T, "v_init": part_of_start(site, T)}

    def layer(self, site: Site) -> Callable[..., SpikingActivation]:
        """Its currents come once."""
        return PTLActivation

    def finish(self, snn: ConvertedNetwork, context: Context) -> None:
        """Find out what is bias in the first neurons' current."""
        refuse_pools(snn, self.name)
        graph = snn.body.graph
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        takers = []
        for node in graph.nodes:
            layer = module_of(snn.body, node)
            if isinstance(layer, Repeat):
                raise ConversionError(
                    "method='ptl' cannot show the input once where it also reaches layers behind "
                    "the first neurons (a shortcut around them); use another method"
                )
            if isinstance(layer, PTLActivation) and layer.constant:
                takers.append((snn._of_body[inputs.index(node.args[0])], layer))
        snn.prefix = _Spread(snn.prefix, takers)  # type: ignore[assignment]
        context.report.notes.append(
            "the image is shown at the first step only, biases are spread over T: train the layers "
            "one after another with conversion.ptl.ptl_train"
        )
