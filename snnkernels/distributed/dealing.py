"""Batches dealt to ranks: whole batches, the i-th to rank i modulo their number."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from .team import Team, portable

__all__ = ["SHARDED", "Dealt", "Split", "check_call", "fingerprint", "identity", "sharded"]

_PROBE = 4096  # elements of a batch that its fingerprint looks at
_KEPT = 1024  # fingerprints: workers read ahead of what is asked for


class Split:
    """A loader that gives each rank a part of the data of its own.

    Wrap what reads other files on every rank (web-scale streams). No two ranks may give the same
    example, which is not checked. Without this every rank's loader gives all batches in the same
    order, which is.

    Args:
        loader: an iterable of batches.

    Raises:
        TypeError: it is none.
    """

    def __init__(self, loader: Any) -> None:
        if isinstance(loader, Tensor) or not hasattr(loader, "__iter__"):
            raise TypeError(
                f"Split takes a loader, an iterable of batches; got {type(loader).__name__}"
            )
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


class Dealt:
    """The batches of a loader that are this rank's.

    ``first()`` gives batch 0 to every rank; iterating then gives ``(number, batch)`` for the
    batches of this rank (batch 0 to rank 0), each once.

    A ``DataLoader`` over a data set with indices is asked for this rank's batches only, in the
    order of its own batch sampler. Of any other iterable all batches are read and the others are
    dropped.

    Args:
        loader: an iterable of batches, the same on every rank, or a :class:`Split`.
        team: the ranks.
        view: a function from an item of the loader to the batch, a tensor or what has
            ``tensors()``.
        seek: have a ``DataLoader`` asked by index even where there is only one rank.

    Attributes:
        start: this many batches, from the beginning, are left out: they are done. To be set before
            iterating.
        stamps: by number of rounds of ``team.size`` batches a fingerprint of what was read until
            then, which must be the same everywhere; a Split has none.
        rounds: how many batches this rank was given.
        read: number of batches there are, known at the end.

    Raises:
        ValueError: a ``DistributedSampler``.
    """

    def __init__(
        self, loader: Any, team: Team, view: Callable[[Any], Any], *, seek: bool = False
    ) -> None:
        self.team, self.view, self.start = team, view, 0
        self.stamps: dict[int, int] = {}
        self.rounds = 0
        self.read = 0
        self._stamp = 0
        self._held: Any = None
        _refuse_samplers(loader)
        if isinstance(loader, Split):
            self._items = self._of_split(loader)
        elif (team.size > 1 or seek) and _has_indices(loader):
            self._items = self._of_indices(loader)
        else:
            self._items = self._of_all([loader] if isinstance(loader, Tensor) else loader)
        self._own = self._rest()

    def first(self, empty: bool = False) -> Any:
        """Batch 0, the same on every rank; with ``empty`` None where there is none.

        Raises:
            ValueError: there is none, or the ranks have read different ones.
        """
        found = failed = None
        try:
            found = next(self._items, (0, None))
        except Exception as error:  # told to the others first, who would wait for this rank
            failed = error
        self.team.agree(failed)
        assert found is not None
        told = self.team.gather(None if found[1] is None else fingerprint(found[1]))
        if empty and set(told) == {None}:
            return None
        if None in told:
            raise ValueError(_EMPTY)
        if len(set(told)) > 1:
            raise ValueError(_DIFFERENT)
        self._held = found
        return found[1]

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return self

    def __next__(self) -> tuple[int, Any]:
        found = next(self._own)
        self.rounds += 1
        return found

    def _rest(self) -> Iterator[tuple[int, Any]]:
        if self._held is not None and self.team.leads and self.start == 0:
            yield self._held
        self._held = None
        for i, item in self._items:
            if i >= self.start:
                yield i, item

    def _close(self, i: int) -> None:
        """Batch i has been read: note the fingerprint where a round ends."""
        self.read = i + 1
        if self.read % self.team.size == 0:
            if len(self.stamps) > _KEPT:
                del self.stamps[min(self.stamps)]
            self.stamps[self.read // self.team.size] = self._stamp

    def _of_all(self, items: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        rank, size = self.team.rank, self.team.size
        own: tuple[int, Any] | None = None
        i = -1
        for item in items:
            x = self.view(item)
            if i < 0 and len(x) == 0:
                continue
            i += 1
            if size > 1:
                self._stamp = fingerprint(x, self._stamp)
            if i == 0:
                yield 0, x
            elif i % size == rank:
                own = i, x
            self._close(i)
            # A whole round is read first, so that ranks that have as many batches have read alike.
            if own is not None and self.read % size == 0:
                yield own
                own = None
        if own is not None:
            yield own

    def _of_indices(self, loader: DataLoader[Any]) -> Iterator[tuple[int, Any]]:
        plan = _Plan(loader, self)
        for item in _again(loader, plan):
            yield plan.numbers.pop(0), self.view(item)

    def _of_split(self, loader: Split) -> Iterator[tuple[int, Any]]:
        rank, size = self.team.rank, self.team.size
        items = (x for x in map(self.view, loader) if len(x) > 0)
        said: tuple[Any, Any] = (None, None)
        if rank == 0:
            try:
                said = next(items, None), None
            except Exception as error:
                said = None, portable(error)
        x, failed = self.team.broadcast((_on_cpu(said[0]), said[1]))
        if failed is not None:
            raise failed
        yield 0, x
        for n, x in enumerate(items, start=int(rank == 0)):
            yield n * size + rank, x


class _Plan:
    """A batch sampler: batch 0 and this rank's, from ``start`` on, of the loader's own."""

    def __init__(self, loader: DataLoader[Any], dealt: Dealt) -> None:
        self.loader, self.dealt = loader, dealt
        self.numbers: list[int] = []  # of the batches that are on their way

    def __iter__(self) -> Iterator[Any]:
        dealt, rank, size = self.dealt, self.dealt.team.rank, self.dealt.team.size
        own: Any = None
        for i, indices in enumerate(self.loader.batch_sampler):  # type: ignore[arg-type]
            dealt._stamp = zlib.crc32(repr(list(indices)).encode(), dealt._stamp)
            if i == 0:
                self.numbers.append(0)
                yield indices
            elif i % size == rank and i >= dealt.start:  # workers read ahead: it may still rise
                own = i, indices
            dealt._close(i)
            if own is not None and dealt.read % size == 0:
                self.numbers.append(own[0])
                yield own[1]
                own = None
        if own is not None:
            self.numbers.append(own[0])
            yield own[1]


def _again(loader: DataLoader[Any], plan: _Plan) -> DataLoader[Any]:
    """The loader with another batch sampler."""
    workers = loader.num_workers > 0
    return DataLoader(
        loader.dataset,
        batch_sampler=plan,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context if workers else None,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor if workers else None,
    )


def fingerprint(x: Any, before: int = 0) -> int:
    """A number that tells batches apart: of shapes, dtypes and some of the elements."""
    for t in [x] if isinstance(x, Tensor) else x.tensors():
        before = zlib.crc32(f"{tuple(t.shape)} {t.dtype}".encode(), before)
        few = t.detach().reshape(-1)
        few = few[:: max(len(few) // _PROBE, 1)].contiguous().cpu()
        before = zlib.crc32(few.view(torch.uint8).numpy().tobytes(), before)
    return before


def _has_indices(loader: Any) -> bool:
    """Whether any batch of the loader can be had without those before it."""
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset):
        return False
    return loader.batch_sampler is not None


def identity(network: nn.Module) -> int:
    """A number that tells networks apart: of what they are made of, parameters and buffers."""
    found = zlib.crc32(f"{network}{getattr(network, 'code', '')}".encode())
    for name, tensor in network.state_dict().items():
        if isinstance(tensor, Tensor):
            found = fingerprint(tensor, zlib.crc32(name.encode(), found))
    return found


SHARDED = (
    "the network's parameters are DTensors, spread over processes. On every rank get them whole, "
    "torch.distributed.checkpoint.state_dict.get_model_state_dict(network, options="
    "StateDictOptions(full_state_dict=True)), load them into a network that fully_shard was not "
    "applied to, and go on with that"
)


def sharded(network: nn.Module) -> bool:
    """Whether a parameter or buffer is a DTensor."""
    found = (*network.parameters(), *network.buffers())
    return any(type(t).__name__ == "DTensor" for t in found)


def check_call(team: Team, network: nn.Module, *arguments: Any) -> None:
    """Check that all ranks have the same network, whole, and say the same.

    Raises:
        ValueError: they do not.
    """
    if team.size == 1:
        return
    if sharded(network):  # its forward is a meeting, and ranks run different numbers of batches
        raise ValueError(SHARDED)
    told = team.gather((identity(network), repr(arguments)))
    for rank, (other, theirs) in enumerate(told):
        if theirs != told[0][1]:
            raise ValueError(
                f"ranks 0 and {rank} do not make the same call: {told[0][1]} and {theirs}"
            )
        if other != told[0][0]:
            raise ValueError(
                f"ranks 0 and {rank} have different networks: build and load the same weights on "
                "every rank (torch.manual_seed before an untrained one)"
            )


_EMPTY = "loader is empty: calibration needs at least one batch of inputs"
_DIFFERENT = (
    "the ranks have read different batches. Give every rank the same loader in the same order "
    "(no shuffling, or the same torch.manual_seed everywhere): whole batches are dealt to them. If "
    "every rank's loader has a part of its own, wrap it: snnkernels.distributed.Split(loader)"
)


def _on_cpu(x: Any) -> Any:
    return None if x is None else x.to(torch.device("cpu"))


def _refuse_samplers(loader: Any) -> None:
    inner = loader.loader if isinstance(loader, Split) else loader
    if not isinstance(inner, DataLoader):
        return
    batch_sampler = inner.batch_sampler
    for sampler in (inner.sampler, batch_sampler, getattr(batch_sampler, "sampler", None)):
        if hasattr(sampler, "num_replicas"):
            raise ValueError(
                f"loader has a {type(sampler).__name__}, which repeats examples (or drops them) so "
                "that ranks get as many: nothing measured on it is exact. Pass the loader without "
                "it, the same on every rank: whole batches are dealt to the ranks"
            )
