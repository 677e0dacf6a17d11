"""The monitor of membranes."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..neurons import IFNode
from .base import Monitor, Records, time_first

__all__ = ["VoltageMonitor"]


class VoltageMonitor(Monitor[Tensor]):
    """Keeps the membranes of a network's neurons after each step.

    Args:
        net: a module that holds :class:`snnkernels.IFNode`; layers are called as by
            :class:`SpikeMonitor`.
        layers: names of the layers to watch; all of them by default.
        at: ``"reset"``: as a step leaves them (``store_v_seq``); ``"charge"``: before it fires.
        neurons: what to keep of ``[*shape]`` flattened: a slice, or indices. All by default: 4
            bytes (float64: 8) a neuron and step, 32 times what :class:`SpikeMonitor` keeps.
        every: keep one run in so many (the first, then every ``every``-th).
        max_bytes: where to stop, with a RuntimeWarning; None never stops.

    Attributes:
        nbytes: bytes held.
        full: whether ``max_bytes`` has stopped it.
        enabled: whether it records.

    In training the neurons' ``save`` must be ``"recompute"``, which is the default.

    Raises:
        TypeError: ``net`` is no module; ``every`` or ``max_bytes`` is no int.
        ValueError: as :class:`SpikeMonitor`; ``at`` is neither.
    """

    def __init__(
        self,
        net: nn.Module,
        layers: Iterable[str] | None = None,
        *,
        at: str = "reset",
        neurons: slice | Iterable[int] | None = None,
        every: int = 1,
        max_bytes: int | None = 2**30,
    ) -> None:
        if at not in ("reset", "charge"):
            raise ValueError(f"at={at!r} is unknown; allowed are 'reset' and 'charge'")
        self.at = at
        self._keeps = _neurons_kept(neurons)
        super().__init__(net, layers, every, max_bytes)

    @property
    def v(self) -> Mapping[str, Tensor]:
        """``{layer: membranes of its last run}``, ``[T, *shape]`` or ``[T, neurons]``.

        float32, float64 from inputs of float64; T counted since the reset.
        """
        return Records(self, last=True)

    @property
    def runs(self) -> Mapping[str, list[Tensor]]:
        """``{layer: [membranes of each run kept]}``, the oldest first."""
        return Records(self, last=False)

    def _flags(self, node: IFNode) -> tuple[str, ...]:
        return ("store_v_seq",) if self.at == "reset" else ("store_charge_seq",)

    def _taken(self, node: IFNode, args: Any, kwargs: Any, carried: bool, v: Any) -> Tensor | None:
        trace = node.v_seq if self.at == "reset" else node.charge_seq
        if trace is None:
            return None
        trace = trace.detach()
        if node.step_mode == "m":
            trace = time_first(trace, node, args, kwargs)
        if self._keeps is None:
            return trace
        # A copy, or the few neurons would keep all in memory.
        return trace.flatten(1)[:, self._keeps].clone()

    def _join(self, run: list[Any]) -> Tensor:
        return run[0] if len(run) == 1 else torch.cat(run)


def _neurons_kept(neurons: Any) -> Any:
    if neurons is None or isinstance(neurons, slice):
        return neurons
    try:
        return [operator.index(i) for i in neurons]
    except TypeError:
        raise TypeError(f"neurons={neurons!r} must be a slice, indices (ints) or None") from None
