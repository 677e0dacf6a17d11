"""Accuracy over a loader, counted by all ranks together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .dealing import Dealt, Split, check_call, fingerprint, identity
from .passes import Checkpoint, bar_of, run
from .team import Team

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` counted.

    Attributes:
        correct: right predictions by number of steps (of a network without T by None).
        total: number of examples.
    """

    correct: dict[int | None, int]
    total: int

    @property
    def accuracy(self) -> dict[int | None, float]:
        """The share of right predictions, by number of steps."""
        return {T: right / self.total for T, right in self.correct.items()}


class _Pair:
    """Inputs and labels as one batch."""

    def __init__(self, x: Any, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def tensors(self) -> list[Tensor]:
        return [*([self.x] if isinstance(self.x, Tensor) else self.x.tensors()), self.y]

    def to(self, device: torch.device) -> _Pair:
        return _Pair(self.x.to(device), self.y.to(device))


@torch.no_grad()
def evaluate(
    network: nn.Module,
    loader: Any,
    steps: Iterable[int] | None = None,
    *,
    process_group: Any = None,
    device: torch.device | str | None = None,
    checkpoint: Any = None,
    progress: bool = False,
) -> Evaluation:
    """Count right predictions, in memory that does not grow with the data.

    Example, under torchrun::

        torch.distributed.init_process_group()
        found = evaluate(snn, loader, [4, 8], process_group=torch.distributed.group.WORLD)
        print(found.accuracy)  # {4: ..., 8: ...}, the same on every rank as of one process

    Args:
        network: a converted network, a plan, or any module from ``[B, *]`` to logits
            ``[B, classes]``; in evaluation mode.
        loader: an iterable of ``(inputs, labels int64 [B])``, the same on every rank: batches are
            dealt whole (a ``DataLoader`` over indices reads only its own, of others what is not
            this rank's is dropped), or a :class:`Split`.
        steps: numbers of steps that answer, all from one run (``predict_curve``); None: the
            network's own T, and a network without time steps answers as it is.
        process_group: of torch.distributed; None: this process alone.
        device: where batches go; None: to the network's parameters.
        checkpoint: path of a file for the counts; the same call after a kill goes on there.
        progress: show a tqdm bar if tqdm is there, on the first rank.

    Raises:
        TypeError: an item of the loader is no such pair, or ``steps`` for a network without them.
        ValueError: an empty loader, one with a ``DistributedSampler``, ranks that read different
            data or have different networks, a network that ``fully_shard`` took apart (with a
            ``process_group``), labels that do not fit.
        Exception: what fails on one rank is raised on all.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"network must be a torch.nn.Module, got {type(network).__name__}")
    if isinstance(network, nn.parallel.DistributedDataParallel):
        network = network.module  # whose own forward is a meeting where there are buffers
    team = Team(process_group)
    curve = getattr(network, "predict_curve", None)
    if steps is not None and curve is None:
        raise TypeError(
            f"steps={steps!r} is for converted networks; {type(network).__name__} has no "
            "predict_curve: leave it out"
        )
    if steps is not None and not (steps := list(steps)):
        raise ValueError("steps is empty: give at least one number of steps")
    ends: list[Any] = [None] if curve is None else sorted({*(steps or [network.T])})  # type: ignore
    if device is None:
        found = next((t.device for t in (*network.parameters(), *network.buffers())), None)
    else:
        try:
            found = torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"device={device!r} is unknown; it must be one of torch's") from error
    counts = torch.zeros(len(ends) + 1, dtype=torch.int64)

    def work(i: int, batch: _Pair) -> None:
        batch = batch if found is None else batch.to(found)
        answers = {None: network(batch.x)} if curve is None else curve(batch.x, ends)
        for k, T in enumerate(ends):
            guess = answers[T]
            if not isinstance(guess, Tensor) or guess.dim() != 2 or len(guess) != len(batch.y):
                shape = tuple(guess.shape) if isinstance(guess, Tensor) else type(guess).__name__
                raise ValueError(
                    f"the network's answer to item {i} of loader is {shape}; it must be logits "
                    f"[{len(batch.y)}, classes]"
                )
            counts[k] += (guess.argmax(1) == batch.y).sum().cpu()
        counts[-1] += len(batch.y)
        if bar is not None:
            bar.update()

    check_call(team, network, ends)
    dealt = Dealt(loader, team, _pair, seek=checkpoint is not None)
    first = dealt.first()
    about: dict[str, Any] = {}
    if checkpoint is not None:
        about = {"steps": repr(ends), "network": identity(network)}
        about["first batch"] = fingerprint(first)
        about["ranks of a Split"] = team.size if isinstance(loader, Split) else 0
    kept = Checkpoint(checkpoint, team, about)
    if kept.state is not None:
        counts += kept.state
    bar = bar_of(loader, team, "evaluating", progress)
    try:
        if kept.done >= 0:
            dealt.start = kept.done
            run(team, dealt, work, lambda: team.sum(counts), kept)
    finally:
        if bar is not None:
            bar.close()
    whole = [int(n) for n in team.sum(counts)]
    if kept.done >= 0:
        kept.write(-1, torch.tensor(whole))
    return Evaluation(dict(zip(ends, whole, strict=False)), whole[-1])


def _pair(item: Any) -> _Pair:
    if not isinstance(item, (tuple, list)) or len(item) != 2 or not isinstance(item[1], Tensor):
        raise TypeError(
            f"loader must yield (inputs, labels), the labels a tensor; got {type(item).__name__}"
        )
    x, y = item
    if y.dim() != 1 or y.is_floating_point() or (isinstance(x, Tensor) and len(x) != len(y)):
        of = f" for inputs {tuple(x.shape)}" if isinstance(x, Tensor) else ""
        raise ValueError(
            f"labels must be integers [B], one for each input; got {tuple(y.shape)}, {y.dtype}{of}"
        )
    return _Pair(x, y)
