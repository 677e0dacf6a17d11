"""Where a conversion's batches come from, and which of them are this process's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..distributed.dealing import Dealt, Split, fingerprint, identity
from ..distributed.passes import Checkpoint, run
from ..distributed.team import Team
from .calibration import SAMPLE, Statistics, batch_of, batches, check_loader
from .errors import ConversionError

__all__ = ["Source"]


class Source:
    """A loader whose batches are dealt to the ranks of a team.

    Args:
        loader, inputs: as :func:`snnkernels.convert` takes them.
        device: where batches go.
        team: the ranks.
        checkpoint: path for the statistics of passes, or None.
        in_order: every rank needs every batch, in the loader's order: nothing is dealt.

    Attributes:
        first: the first batch, the same on every rank.

    Raises:
        TypeError, ValueError: ``loader`` is none, is empty, or not the same on every rank.
    """

    def __init__(
        self,
        loader: Any,
        device: torch.device | None,
        inputs: Any,
        team: Team,
        *,
        checkpoint: Any = None,
        in_order: bool = False,
    ) -> None:
        self.loader, self.device, self.inputs, self.team = loader, device, inputs, team
        self.in_order = in_order
        self._path = checkpoint
        self._network = 0
        split = isinstance(loader, Split)
        if split and in_order:
            raise ConversionError(
                "threshold='ltb' follows the batches in one order, which a distributed.Split does "
                "not have: pass the same loader on every rank, or another threshold"
            )
        if not split:
            check_loader(loader, inputs)
        self._dealt: Dealt | None = self._deal()
        self.first = self._to(self._dealt.first())
        self._bind: Callable[[Any], Any] = lambda x: x

    def bind(self, bind: Callable[[Any], Any]) -> None:
        """What batches go through from now on; ``first`` goes through it at once."""
        self._bind = bind
        self.first = bind(self.first)

    def belongs_to(self, model: nn.Module) -> None:
        """Statistics are of this network: another one's checkpoint is refused."""
        if self._path is not None:
            self._network = identity(model)

    @property
    def apart(self) -> bool:
        """Whether statistics come from elsewhere too: other ranks, a file."""
        return self.team.size > 1 or self._path is not None

    def _deal(self) -> Dealt:
        # Alone, a rank deals everything to itself.
        team = Team() if self.in_order else self.team
        seek = self._path is not None
        return Dealt(self.loader, team, lambda item: batch_of(item, self.inputs), seek=seek)

    def _to(self, x: Any) -> Any:
        return x if self.device is None else x.to(self.device)

    def rest(self) -> Iterator[Any]:
        """All batches from the second on, in the loader's order (``in_order``)."""
        assert self._dealt is not None
        dealt, self._dealt = self._dealt, None
        return (self._bind(self._to(x)) for i, x in dealt if i > 0)

    def again(self) -> Iterator[Any]:
        """The loader's batches anew, the same on every rank (a Split: those of rank 0)."""
        if isinstance(self.loader, Split) and self.team.size > 1:
            items: Any = self._told()
        else:
            loader = self.loader.loader if isinstance(self.loader, Split) else self.loader
            items = batches(loader, self.device, self.inputs)
        return map(self._bind, items)

    def _told(self) -> Iterator[Any]:
        """What rank 0's loader gives, told to all batch by batch."""
        own = (batch_of(item, self.inputs) for item in self.loader) if self.team.leads else iter(())
        while True:
            x = failed = None
            try:
                x = next(own, None)
            except Exception as error:  # told to the others, who would wait for a batch
                failed = error
            self.team.agree(failed)
            x = self.team.broadcast(None if x is None else x.to(torch.device("cpu")))
            if x is None:
                return
            yield self._to(x)

    def run(
        self, work: Callable[[int, Any], None], found: dict[str, Statistics], name: str
    ) -> None:
        """``work(number, batch)`` for this rank's batches; ``found`` becomes that of all ranks.

        A loader that can be read only once gives a second pass its first inputs alone. ``name``
        goes behind the checkpoint's, for one file a pass.
        """
        team = Team() if self.in_order else self.team
        path = None if self._path is None else f"{self._path}{name}"
        path = path if team is self.team or self.team.leads else None  # of ranks for themselves
        kept = Checkpoint(path, team, self._kept_for(found) if path else {})
        if kept.state is not None:
            for key, tables in kept.state.items():
                _histogram(found[key]).load(tables)
        if kept.done >= 0:
            dealt, self._dealt = self._dealt, None
            if dealt is None:
                dealt = self._deal()
                if dealt.first(empty=True) is None:
                    if team.leads:
                        work(0, self.first[:SAMPLE])
                    dealt = None
            if dealt is not None:
                dealt.start = kept.done
                run(
                    team, dealt, lambda i, x: work(i, self._bind(self._to(x))),
                    lambda: _tables(found, team), kept,
                )  # fmt: skip
        for layer, statistics in found.items():
            if statistics.histogram is not None:
                try:
                    statistics.histogram.merge(team)
                except OverflowError as error:
                    raise ConversionError(f"{layer}: {error}") from error
        if kept.done >= 0:
            kept.write(-1, _tables(found, Team()))

    def _kept_for(self, found: dict[str, Statistics]) -> dict[str, Any]:
        tables = {
            name: tuple(s.histogram.counts.shape)
            for name, s in found.items()
            if s.histogram is not None
        }
        ranks = self.team.size if isinstance(self.loader, Split) else 0
        return {
            "network": self._network,
            "first batch": fingerprint(self.first),
            "layers": repr(tables),
            "ranks of a Split": ranks,
        }

    def same(self, x: Any, what: str) -> None:
        """Check that all ranks have the same ``x``.

        Raises:
            ConversionError: they have not.
        """
        if len(set(self.team.gather(fingerprint(x)))) > 1:
            raise ConversionError(
                f"the ranks have read different {what}: the loader must give the same every time "
                "it is read (no shuffling, or the same torch.manual_seed on every rank)"
            )


def _histogram(statistics: Statistics) -> Any:
    assert statistics.histogram is not None
    return statistics.histogram


def _tables(found: dict[str, Statistics], team: Team) -> dict[str, Any]:
    """The tables of all ranks together, on the CPU."""
    whole = {}
    for name, statistics in found.items():
        if statistics.histogram is not None:
            copied = statistics.histogram.copy()
            copied.merge(team)
            whole[name] = {key: table.cpu() for key, table in copied.tables().items()}
    return whole
