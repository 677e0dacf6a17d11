"""The monitor of spikes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.reference import WORD_STEPS
from ..neurons import IFNode
from ..packed import PackedSpikes
from .base import Monitor, Records, time_first

__all__ = ["SpikeMonitor"]


class SpikeMonitor(Monitor["PackedSpikes | Tensor"]):
    """Keeps the spikes of a network's neurons, one bit a neuron and step.

    ::

        with SpikeMonitor(net) as monitor:
            net(x)
        monitor.spikes["layer1"].unpack()  # [T, *shape]

    The neurons' kernel writes the bits beside whatever the network asks of it (spikes, counts,
    rates), so answers stay as they are. Neurons that fire more than once a step or with a sign
    (``max_spikes``, ``signed``) run a second time and leave uint8 or int8, 8 times as much.

    Args:
        net: a module that holds :class:`snnkernels.IFNode`; of a converted network layers are
            called as in the ANN, elsewhere by their path.
        layers: names of the layers to watch; all of them by default.
        every: keep one run in so many (the first, then every ``every``-th).
        max_bytes: where to stop, with a RuntimeWarning; None never stops.

    Attributes:
        nbytes: bytes held.
        full: whether ``max_bytes`` has stopped it.
        enabled: whether it records.

    Raises:
        TypeError: ``net`` is no module; ``every`` or ``max_bytes`` is no int.
        ValueError: no neurons in ``net``; ``layers`` names one that is not there; a limit below 1.
    """

    def __init__(
        self,
        net: nn.Module,
        layers: Iterable[str] | None = None,
        *,
        every: int = 1,
        max_bytes: int | None = 2**30,
    ) -> None:
        super().__init__(net, layers, every, max_bytes)

    @property
    def spikes(self) -> Mapping[str, PackedSpikes | Tensor]:
        """``{layer: spikes of its last run}``, ``[T, *shape]``, T counted since the reset.

        :class:`snnkernels.PackedSpikes`, whose :meth:`~snnkernels.PackedSpikes.unpack` gives the
        tensor (with the amplitude of the run's first call); uint8 or int8 tensors of whole numbers
        from neurons that are not binary.
        """
        return Records(self, last=True)

    @property
    def runs(self) -> Mapping[str, list[PackedSpikes | Tensor]]:
        """``{layer: [spikes of each run kept]}``, the oldest first."""
        return Records(self, last=False)

    def counts(self) -> dict[str, Tensor]:
        """``{layer: net spikes of each neuron in the last run}``, int32 ``[*shape]``."""
        return {
            name: s.count() if isinstance(s, PackedSpikes) else s.sum(0, dtype=torch.int32)
            for name, s in self.spikes.items()
        }

    def rates(self) -> dict[str, float]:
        """``{layer: spikes per neuron and step}`` over all runs kept.

        Spikes of -1 count as much as those of 1: it is how busy a layer is.
        """
        found = {}
        for name, runs in self._runs.items():
            fired = size = 0
            for record in (r for run in runs for r in run):
                if isinstance(record, PackedSpikes):
                    fired += int(record.count().sum())
                else:
                    fired += int(record.int().abs().sum())
                size += record.numel()
            if size:
                found[name] = fired / size
        return found

    def _flags(self, node: IFNode) -> tuple[str, ...]:
        return ("store_packed",) if _binary(node) else ()

    def _taken(
        self, node: IFNode, args: Any, kwargs: Any, carried: bool, v: Any
    ) -> PackedSpikes | Tensor | None:
        if _binary(node):
            return node.packed
        twin = copy.copy(node)  # shares everything but what is set here
        whole = torch.uint8 if node.signed is None else torch.int8
        twin.__dict__.update(
            output="spikes", spike_dtype=whole, amplitude=None, _v=v, _carried=carried,
            store_v_seq=False, store_count=False, store_charge_seq=False,
        )  # fmt: skip
        twin._buffers = {k: t for k, t in node._buffers.items() if k != "amplitude"}
        spikes = twin.forward(*args, **kwargs)
        return time_first(spikes, node, args, kwargs)

    def _add(self, run: list[Any], record: PackedSpikes | Tensor) -> int:
        if not run or not isinstance(record, PackedSpikes) or run[-1].T + record.T > WORD_STEPS:
            return super()._add(run, record)
        # Single steps share words, or each would take a byte for its bit.
        before: PackedSpikes = run[-1]
        run[-1] = longer = PackedSpikes.cat([before, record])
        return longer.nbytes - before.nbytes

    def _join(self, run: list[Any]) -> PackedSpikes | Tensor:
        if len(run) == 1:
            record: PackedSpikes | Tensor = run[0]
            return record
        return PackedSpikes.cat(run) if isinstance(run[0], PackedSpikes) else torch.cat(run)


def _binary(node: IFNode) -> bool:
    return node.max_spikes is None and node.signed is None
