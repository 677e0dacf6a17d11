"""Which rows a run of a converted network takes, and which of them answer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CAUSAL", "Clock", "Steps"]


@dataclass(frozen=True)
class Steps:
    """How a method spends time.

    Attributes:
        before: rows before those that answer (SRP's probe, after which all state starts anew).
        least: rows that a run takes at least, whatever T (COS's probe looks at its first rows).
        extra: steps that the method adds to T, in its latency.
        whole: neurons need all their rows in one call; a run cannot go on from where one ended.
        parallel: no rows at all: one pass on counts.
        apart: every T is a run of its own, because neurons do something else for another T.
        windows: further windows of T steps each in the latency, where layers wait for each other.
        bias: when the constant terms of the layers between neurons act: ``"every"`` step; once, in
            the ``"first"`` or the ``"last"``; or ``"spread"``, a T-th in each. Otherwise than in
            every step takes ``before=1``: a silent row, in which neurons emit nothing, so that
            what the layers make of it is the constant terms (see :meth:`Clock.currents`).
        delay: answering steps that are run and not read out; where fewer than 4 would be left, the
            last 4 are read out, or all if T is less. Needs ``whole``.
    """

    before: int = 0
    least: int = 0
    extra: int = 0
    whole: bool = False
    parallel: bool = False
    apart: bool = False
    windows: int = 0
    bias: str = "every"
    delay: int = 0

    def first(self, T: int) -> int:
        """How many answering steps of a run of T pass before those that are read out."""
        return min(self.delay, max(T - 4, 0))

    def rows(self, T: int) -> int:
        """Rows of a run that answers for T steps."""
        return self.before + max(T, self.least)

    def added(self, T: int) -> int:
        """Steps of latency beside the T that were asked for."""
        return self.extra + self.windows * T


CAUSAL = Steps()


class Clock:
    """What the layers of one network know about the run they are in; one object for all."""

    def __init__(self, steps: Steps = CAUSAL) -> None:
        self.steps = steps
        # The numbers of answering steps after which counts are wanted, ascending; None: after all.
        self.ends: tuple[int, ...] | None = None
        self.levels = 1  # T of a parallel run, or of one of those that are apart

    def answering(self, rows: Tensor) -> list[Tensor]:
        """``rows`` ``[T, ...]``, those that answer, cut at the ends."""
        rows = rows[self.steps.before :]
        starts = (0, *(self.ends or ())[:-1])
        ends = self.ends or (len(rows),)
        return [rows[a:b] for a, b in zip(starts, ends, strict=True)]

    def currents(self, rows: Tensor) -> Tensor:
        """What affine layers made of ``[1 + T, ...]`` spikes, as the currents ``[T, ...]`` meant.

        The first row, of no spikes, holds the constant terms that every other row has as well;
        they are left where ``steps.bias`` says and taken away elsewhere.
        """
        silent, rows = rows[:1], rows[1:]
        if self.steps.bias == "first":
            return torch.cat([rows[:1], rows[1:] - silent])
        if self.steps.bias == "last":
            return torch.cat([rows[:-1] - silent, rows[-1:]])
        return (rows - silent) + silent / len(rows)
